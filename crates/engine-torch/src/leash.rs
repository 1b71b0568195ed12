//! What holds the Python process: asks whether it ended, and ends it, from any thread.
//!
//! `torchrun` gives each rank a session of its own, out of reach of a signal to the process group. On Linux everything
//! that we started is therefore found by a variable in its environment, which children inherit.

use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ExitStatus};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Marks the processes of one engine; its value is unique to the engine's folder.
pub(crate) const MARK_VARIABLE: &str = "BERINGIA_TORCH_FOLDER";

/// Between two looks at a process that is about to end.
const LOOK_PERIOD: Duration = Duration::from_millis(5);

/// Rounds of killing: a process that is killed may have started another since the list was made.
const KILL_ROUNDS_MAX: usize = 3;

/// Shared by an engine and its interrupters.
#[derive(Debug, Default)]
pub(crate) struct Leash {
    held: Mutex<Held>,
}

#[derive(Debug, Default)]
struct Held {
    child: Option<Child>,
    /// Value of [`MARK_VARIABLE`].
    mark: String,
    stream: Option<UnixStream>,
    interrupted: bool,
}

impl Leash {
    fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Holds a process that was just started.
    pub(crate) fn hold(&self, child: Child, mark: String) {
        let mut held = self.lock();
        (held.child, held.mark) = (Some(child), mark);
    }

    /// Before a process is started: what was held is forgotten.
    pub(crate) fn reset(&self) {
        *self.lock() = Held::default();
    }

    /// Ends the process because a call takes too long.
    pub(crate) fn interrupt(&self) {
        self.lock().interrupted = true;
        self.kill();
    }

    /// Whether [`Leash::interrupt`] was called since the process was started.
    pub(crate) fn is_interrupted(&self) -> bool {
        self.lock().interrupted
    }

    /// Number of the process, where it is ours and was not ended.
    pub(crate) fn process_id(&self) -> Option<u32> {
        self.lock().child.as_ref().map(Child::id)
    }

    /// Also holds the connection, to break it: all that can be done about a process that somebody else started.
    pub(crate) fn hold_connection(&self, stream: UnixStream) {
        self.lock().stream = Some(stream);
    }

    /// How the process ended; `None` while it runs, and where it is not ours.
    pub(crate) fn ended(&self) -> Option<ExitStatus> {
        // An error means that it was waited for already, which nobody but this function does.
        self.lock().child.as_mut().and_then(|child| child.try_wait().ok().flatten())
    }

    /// As [`Leash::ended`], with a little patience.
    pub(crate) fn ended_within(&self, patience: Duration) -> Option<ExitStatus> {
        let deadline = Instant::now() + patience;
        loop {
            let ended = self.ended();
            if ended.is_some() || Instant::now() >= deadline || self.lock().child.is_none() {
                return ended;
            }
            thread::sleep(LOOK_PERIOD);
        }
    }

    /// Ends the process, everything it started, and the connection. Does nothing the second time.
    pub(crate) fn kill(&self) {
        let mut held = self.lock();
        if let Some(stream) = &held.stream {
            // Fails where it is closed already.
            let _ = stream.shutdown(Shutdown::Both);
        }
        if let Some(child) = &mut held.child {
            // Not yet waited for, so the number is still its own; a process that has ended takes no harm.
            if let (Ok(None), Some(group)) = (child.try_wait(), rustix::process::Pid::from_raw(child.id() as i32)) {
                let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
            }
            kill_marked(&held.mark);
        }
    }

    /// [`Leash::kill`], then waits for the process and lets go.
    pub(crate) fn end(&self, patience: Duration) {
        self.kill();
        self.ended_within(patience);
        let mut held = self.lock();
        (held.child, held.stream) = (None, None);
    }
}

/// Kills every process that has the mark in its environment.
#[cfg(target_os = "linux")]
fn kill_marked(mark: &str) {
    use rustix::process::{Signal, kill_process};
    for _ in 0..KILL_ROUNDS_MAX {
        let marked = marked_processes(mark).unwrap_or_default();
        if marked.is_empty() {
            return;
        }
        for process in marked {
            let _ = kill_process(process, Signal::KILL);
        }
    }
}

#[cfg(not(target_os = "linux"))]
fn kill_marked(_mark: &str) {}

#[cfg(target_os = "linux")]
fn marked_processes(mark: &str) -> std::io::Result<Vec<rustix::process::Pid>> {
    let wanted = format!("{MARK_VARIABLE}={mark}").into_bytes();
    let mut marked = Vec::new();
    for entry in std::fs::read_dir("/proc")?.flatten() {
        let number = entry.file_name().to_str().and_then(|name| name.parse().ok());
        let Some(process) = number.and_then(rustix::process::Pid::from_raw) else { continue };
        // Processes of other users, and those that ended meanwhile, cannot be read: they are not ours to end.
        let environment = std::fs::read(entry.path().join("environ")).unwrap_or_default();
        if environment.split(|byte| *byte == 0).any(|variable| variable == wanted) {
            marked.push(process);
        }
    }
    Ok(marked)
}

/// `killed by signal 9 (SIGKILL)` or `ended with exit code 1`.
pub(crate) fn describe_end(status: ExitStatus) -> String {
    match (status.signal(), status.code()) {
        (Some(signal), _) => format!("its process was killed by signal {signal}{}", signal_name(signal)),
        (None, Some(code)) => format!("its process ended with exit code {code}"),
        (None, None) => format!("its process ended: {status}"),
    }
}

/// The signals that end a process which computes; the numbers are the same on Linux and macOS.
fn signal_name(signal: i32) -> &'static str {
    match signal {
        4 => " (SIGILL, an instruction that this processor does not have)",
        6 => " (SIGABRT)",
        8 => " (SIGFPE)",
        9 => " (SIGKILL, by hand or by the kernel for want of memory)",
        11 => " (SIGSEGV)",
        15 => " (SIGTERM)",
        _ => "",
    }
}
