//! I6: bad input gives an error; never a panic, never unbounded memory.
//!
//! No process ended that nobody ended, and each log is whole but for a line for each life that was cut short.

use super::{Finding, ProcessLog, RunLogs};
use crate::event::Event;

const LIMITS: &str = "memory and the lengths of queues";

pub(super) fn check(logs: &RunLogs, ended_badly: &[String]) -> Finding {
    let mut finding = Finding::new("I6 bounded", "lives of processes", LIMITS);
    ended_badly.iter().for_each(|what| finding.violated(what.clone()));
    for log in std::iter::once(&logs.coordinator).chain(&logs.sites) {
        let lives = lives(log);
        finding.checked += lives;
        if log.malformed_lines > lives {
            finding.violated(format!("the log of {} has {} lines that are no records", log.name, log.malformed_lines));
        }
    }
    finding
}

/// Processes that have written the log: a coordinator says that it starts, a site that it is ready.
fn lives(log: &ProcessLog) -> u64 {
    let begins = |event: &&Event| matches!(event, Event::RunStarted { .. } | Event::SiteReady { .. });
    let is_site = !log.events().any(|event| matches!(event, Event::RunStarted { .. }));
    // The coordinator's log also says when sites are ready.
    log.events().filter(begins).filter(|event| is_site || matches!(event, Event::RunStarted { .. })).count() as u64
}
