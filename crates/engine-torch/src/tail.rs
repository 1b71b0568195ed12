//! The last words of another process: the end of its stderr, of bounded length.

use std::collections::VecDeque;
use std::io::Read;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Bytes of stderr that are kept: a Python traceback is some 3 KiB, and each of sixteen ranks may write one, and `torchrun`
/// its own.
const TAIL_BYTES_MAX: usize = 64 << 10;

/// Bytes that are read at once.
const READ_BYTES: usize = 4096;

/// Lines that are quoted, and the characters of each.
const QUOTED_LINES_MAX: usize = 12;
const QUOTED_CHARACTERS_MAX: usize = 300;

/// The end of a stream that a thread reads until it closes.
#[derive(Clone, Default)]
pub(crate) struct Tail {
    shared: Arc<(Mutex<Kept>, Condvar)>,
}

#[derive(Default)]
struct Kept {
    bytes: VecDeque<u8>,
    /// Whether there is a stream that may bring more.
    open: bool,
}

impl Tail {
    /// Reads `stream` on a thread of its own, which ends with the stream.
    pub(crate) fn follow(mut stream: impl Read + Send + 'static) -> Self {
        let tail = Self::default();
        let kept = tail.clone();
        kept.lock().open = true;
        thread::spawn(move || {
            let mut buffer = [0; READ_BYTES];
            while let Ok(length @ 1..) = stream.read(&mut buffer) {
                kept.push(&buffer[..length]);
            }
            kept.close();
        });
        tail
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.shared.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, bytes: &[u8]) {
        let mut kept = self.lock();
        kept.bytes.extend(bytes);
        let excess = kept.bytes.len().saturating_sub(TAIL_BYTES_MAX);
        kept.bytes.drain(..excess);
    }

    fn close(&self) {
        self.lock().open = false;
        self.shared.1.notify_all();
    }

    /// The last lines that hold something, printable; waits up to `wait` for the stream to end.
    pub(crate) fn lines(&self, wait: Duration) -> Vec<String> {
        let lines = self.all_lines(wait);
        lines[lines.len().saturating_sub(QUOTED_LINES_MAX)..].to_vec()
    }

    /// The last of all kept lines that `is_wanted`; waits as [`Tail::lines`].
    pub(crate) fn last_line(&self, wait: Duration, is_wanted: impl Fn(&str) -> bool) -> Option<String> {
        self.all_lines(wait).into_iter().rev().find(|line| is_wanted(line))
    }

    fn all_lines(&self, wait: Duration) -> Vec<String> {
        let deadline = Instant::now() + wait;
        let mut kept = self.lock();
        while let (true, Some(left)) = (kept.open, deadline.checked_duration_since(Instant::now())) {
            let waited = self.shared.1.wait_timeout(kept, left);
            kept = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        let bytes: Vec<u8> = kept.bytes.iter().copied().collect();
        let text = String::from_utf8_lossy(&bytes);
        text.lines().map(|line| printable(line, QUOTED_CHARACTERS_MAX)).filter(|line| !line.is_empty()).collect()
    }
}

/// `text` without control characters, which could move a terminal's cursor, and at most `characters_max` long.
pub(crate) fn printable(text: &str, characters_max: usize) -> String {
    let clean = text.chars().map(|c| if c.is_control() { ' ' } else { c });
    let kept: String = clean.take(characters_max).collect();
    kept.trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Longer than any test may take: reached only where the stream's end was missed.
    const FOREVER: Duration = Duration::from_secs(30);

    #[test]
    fn the_end_is_kept_and_made_printable() {
        let mut text = "x\n".repeat(TAIL_BYTES_MAX);
        text.push_str("Traceback:\n\n\u{1b}[31mout of cheese\u{7}\n");
        let lines = Tail::follow(std::io::Cursor::new(text)).lines(FOREVER);
        assert_eq!(lines.len(), QUOTED_LINES_MAX);
        assert_eq!(lines[QUOTED_LINES_MAX - 2..], ["Traceback:", " [31mout of cheese"]);
    }

    #[test]
    fn a_line_is_found_before_those_that_are_quoted() {
        let text = format!("rank 1: out of memory: 2 GiB\n{}", "Traceback\n".repeat(2 * QUOTED_LINES_MAX));
        let tail = Tail::follow(std::io::Cursor::new(text));
        let found = tail.last_line(FOREVER, |line| line.contains("out of memory"));
        assert_eq!(found.as_deref(), Some("rank 1: out of memory: 2 GiB"));
        assert_eq!(tail.last_line(FOREVER, |line| line.contains("cheese")), None);
    }

    #[test]
    fn a_line_without_end_and_bytes_that_are_no_text_are_cut() {
        let mut bytes = vec![b'a'; 100 * TAIL_BYTES_MAX];
        bytes.extend([0xFF, 0xC3]);
        let lines = Tail::follow(std::io::Cursor::new(bytes)).lines(FOREVER);
        assert_eq!(lines, ["a".repeat(QUOTED_CHARACTERS_MAX)]);
    }
}
