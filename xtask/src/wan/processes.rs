//! Waiting for the processes of one measurement, with a bound on its time.

use crate::runs::{Failure, Process};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How often processes are looked at.
const POLL: Duration = Duration::from_millis(200);
/// Lines of a failed process' log that are told.
const LOG_LINES: usize = 3;

/// Seconds since 1970.
pub(crate) fn unix_seconds() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

/// Waits until all have ended, `is_over` says that nothing more is to be expected, or the time is up. A process that fails ends
/// the wait, too.
///
/// # Errors
/// A process that failed, or time that is up; what still runs is ended with `processes`.
pub(crate) fn wait_until(
    processes: &mut Vec<Process>,
    seconds_max: f64,
    is_over: &mut dyn FnMut() -> bool,
) -> Result<(), Failure> {
    let started = Instant::now();
    while !processes.is_empty() {
        let mut failed = None;
        processes.retain_mut(|process| {
            process.has_ended().map_or_else(
                |error| {
                    failed = Some(error);
                    false
                },
                |ended| !ended,
            )
        });
        if let Some(error) = failed {
            return Err(error);
        }
        if is_over() {
            return Ok(());
        }
        if started.elapsed().as_secs_f64() > seconds_max {
            return Err(format!("not over after {:.0} minutes", seconds_max / 60.0).into());
        }
        std::thread::sleep(POLL);
    }
    Ok(())
}

/// The end of a log, for a message.
pub(crate) fn log_end(path: &Path) -> String {
    let text = std::fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    last_lines(&text)
}

fn last_lines(text: &str) -> String {
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    lines[lines.len().saturating_sub(LOG_LINES)..].join(" | ")
}

/// Runs two commands side by side, one for each site's core, and gives what they print.
///
/// # Errors
/// One that failed, with what it said.
pub(crate) fn side_by_side(commands: impl Iterator<Item = Command>) -> Result<Vec<String>, Failure> {
    let start =
        |mut command: Command| command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let children: Vec<_> = commands.map(start).collect::<Result<_, _>>()?;
    let mut texts = Vec::new();
    for child in children {
        let output = child.wait_with_output()?;
        if !output.status.success() {
            return Err(last_lines(&String::from_utf8_lossy(&output.stderr)).into());
        }
        texts.push(String::from_utf8(output.stdout)?);
    }
    Ok(texts)
}

/// A command held to a core of this machine.
pub(crate) fn on_core(core: usize, program: &Path) -> Command {
    let mut command = Command::new("taskset");
    command.args(["-c", &core.to_string()]).arg(program);
    command
}
