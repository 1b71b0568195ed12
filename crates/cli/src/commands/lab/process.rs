//! A child process of the lab: started, asked, ended; it does not outlive this value.

use crate::failure::Failure;
use rustix::process::{Pid, Signal, kill_process};
use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// Between two looks at a process whose end is awaited.
const POLL: Duration = Duration::from_millis(20);

/// A child that has been told to stop has this long.
pub(super) const CHILD_GRACE: Duration = Duration::from_secs(30);

/// What it says goes to files: a pipe that nobody reads would stop it.
pub(super) struct Process {
    name: String,
    child: Child,
    out: PathBuf,
    log: PathBuf,
}

impl Process {
    /// Starts `command` with its standard output in `NAME.out` of the folder, and standard error added to `NAME.log`.
    pub(super) fn start(name: &str, command: &mut Command, folder: &Path) -> Result<Self, Failure> {
        let failed = |error: std::io::Error| {
            Failure::new(
                format!("{name} could not be started: {error}"),
                "see that the machine has memory left: `free -h`",
            )
        };
        let (out, log) = (folder.join(format!("{name}.out")), folder.join(format!("{name}.log")));
        let stdout = File::create(&out).map_err(failed)?;
        let stderr = OpenOptions::new().create(true).append(true).open(&log).map_err(failed)?;
        let child = command.stdin(Stdio::null()).stdout(stdout).stderr(stderr).spawn().map_err(failed)?;
        Ok(Self { name: name.to_owned(), child, out, log })
    }

    /// What it has said on standard output so far.
    pub(super) fn said(&self) -> String {
        std::fs::read_to_string(&self.out).unwrap_or_default()
    }

    /// How it ended, if it has.
    pub(super) fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Why somebody should read its log.
    pub(super) fn failure(&self, what: &str) -> Failure {
        Failure::new(format!("{} {what}", self.name), format!("read {}", self.log.display()))
    }

    /// Waits for the end and gives the last line of standard output as JSON.
    pub(super) fn object(mut self) -> Result<serde_json::Value, Failure> {
        let status = self.child.wait();
        let said = self.said();
        let object = said.lines().last().and_then(|line| serde_json::from_str(line).ok());
        match (status, object) {
            (Ok(status), Some(object)) if status.success() => Ok(object),
            (status, _) => {
                let status = status.map_or_else(|error| error.to_string(), |status| status.to_string());
                Err(self.failure(&format!("failed ({status})")))
            }
        }
    }

    /// Sends a signal to a process that has not ended; one that has needs none.
    pub(super) fn signal(&mut self, signal: Signal) {
        if self.ended().is_none() {
            let _gone = kill_process(Pid::from_child(&self.child), signal);
        }
    }

    /// Waits for its end as long as that; tells whether it has ended.
    pub(super) fn ends_within(&mut self, patience: Duration) -> bool {
        let began = Instant::now();
        loop {
            if self.ended().is_some() {
                return true;
            }
            if began.elapsed() >= patience {
                return false;
            }
            std::thread::sleep(POLL);
        }
    }

    /// Ends a process that should have ended: asks it to leave, and kills it if it does not.
    pub(super) fn end(&mut self) {
        self.signal(Signal::TERM);
        if !self.ends_within(CHILD_GRACE) {
            self.kill();
        }
    }

    /// SIGKILL, and waits until it is gone.
    pub(super) fn kill(&mut self) {
        // Only a process that is still there is ended; one that was waited for is not.
        if self.ended().is_none() {
            let _gone = self.child.kill();
            let _gone = self.child.wait();
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}
