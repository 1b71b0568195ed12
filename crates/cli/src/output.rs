//! The only place that writes to the user.
//!
//! Without `--json`, text goes to standard output. With it, standard output carries one object and nothing else;
//! text is left out. Warnings and progress go to standard error in both cases. Writing never panics: a reader that
//! went away (`beringia ... | head`) ends the output, not the work; any other failure is reported by
//! [`Output::finish`], so that a report cut off by a full disk does not pass for a whole one.

use crate::failure::Failure;
use serde::Serialize;
use std::fmt::Display;
use std::io::{self, ErrorKind, IsTerminal, Write};
use std::sync::Mutex;

/// ANSI: bold red, bold yellow, bold green.
const ERROR_STYLE: &str = "\x1b[1;31m";
const WARNING_STYLE: &str = "\x1b[1;33m";
const HINT_STYLE: &str = "\x1b[1;32m";
const PLAIN_STYLE: &str = "\x1b[0m";

/// Standard output and standard error of one command.
#[derive(Debug)]
pub(crate) struct Output {
    json: bool,
    terminal: bool,
    colours: bool,
    /// The first error of standard output; nothing more is written after it.
    broken: Mutex<Option<io::Error>>,
}

impl Output {
    /// Output as `--json` asks for it. Colours only on a terminal and without `NO_COLOR` (no-color.org).
    pub(crate) fn new(json: bool) -> Self {
        let terminal = io::stderr().is_terminal();
        let wanted = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        Self { json, terminal, colours: terminal && wanted, broken: Mutex::new(None) }
    }

    /// Whether one object is wanted instead of text.
    pub(crate) fn is_json(&self) -> bool {
        self.json
    }

    /// Whether someone watches: bars are drawn on standard error then, plain lines written otherwise.
    pub(crate) fn is_terminal(&self) -> bool {
        self.terminal && !self.json
    }

    /// One line of text.
    pub(crate) fn line(&self, text: impl Display) {
        if !self.json {
            self.write(&format!("{text}\n"));
        }
    }

    /// Text without a line end, shown at once.
    pub(crate) fn text(&self, text: &str) {
        if !self.json {
            self.write(text);
        }
    }

    /// The command's one object, on a line of its own.
    pub(crate) fn object(&self, value: &impl Serialize) {
        if self.json {
            let json = serde_json::to_string(value);
            let json = json.unwrap_or_else(|error| unreachable!("our own reports are representable: {error}"));
            self.write(&format!("{json}\n"));
        }
    }

    /// Something the user should know although the command goes on.
    pub(crate) fn warning(&self, text: impl Display) {
        self.labelled(WARNING_STYLE, "warning", &text);
    }

    /// One line of progress on standard error.
    pub(crate) fn notice(&self, text: impl Display) {
        to_stderr(&format!("{text}\n"));
    }

    /// Why the command ends.
    pub(crate) fn failure(&self, failure: &Failure) {
        self.object(failure);
        self.labelled(ERROR_STYLE, "error", &failure.message);
        self.labelled(HINT_STYLE, "hint", &failure.hint);
    }

    /// Whether everything was written.
    ///
    /// # Errors
    /// Standard output failed, other than by a reader that went away.
    pub(crate) fn finish(&self) -> Result<(), Failure> {
        match &*lock(&self.broken) {
            Some(error) if error.kind() != ErrorKind::BrokenPipe => {
                Err(Failure::new(format!("standard output: {error}"), "write to a file or device that has room"))
            }
            _ => Ok(()),
        }
    }

    fn labelled(&self, style: &str, label: &str, text: &dyn Display) {
        let (style, plain) = if self.colours { (style, PLAIN_STYLE) } else { ("", "") };
        to_stderr(&format!("{style}{label}:{plain} {text}\n"));
    }

    fn write(&self, text: &str) {
        let mut broken = lock(&self.broken);
        if broken.is_none() {
            let mut stdout = io::stdout().lock();
            *broken = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).err();
        }
    }
}

/// Where standard error is gone there is nobody to tell.
pub(crate) fn to_stderr(text: &str) {
    let _ = io::stderr().lock().write_all(text.as_bytes());
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
