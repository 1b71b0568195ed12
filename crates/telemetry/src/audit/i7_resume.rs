//! I7: 100 steps equal 50 steps, stop, resume, 50 steps.
//!
//! Logs do not have two runs to compare. What they show is its condition: no checkpoint was ever unreadable, neither on
//! resuming nor among those on disk at the end.

use super::{Circumstances, Finding, RunLogs};
use crate::event::Event;

const LIMITS: &str = "that a resumed run has the same bits as one that was not stopped: a test compares the two";

pub(super) fn check(logs: &RunLogs, circumstances: &Circumstances) -> Finding {
    let mut finding = Finding::new("I7 resume", "checkpoints saved, or loaded at the end", LIMITS);
    finding.checked = circumstances.checkpoints_loaded;
    for log in std::iter::once(&logs.coordinator).chain(&logs.sites) {
        for event in log.events() {
            match event {
                Event::CheckpointSaved { .. } => finding.checked += 1,
                Event::CheckpointSkipped { path, reason } => {
                    finding.violated(format!("{}: checkpoint {path} was unreadable: {reason}", log.name));
                }
                _ => {}
            }
        }
    }
    circumstances.checkpoints_unreadable.iter().for_each(|what| finding.violated(what.clone()));
    finding
}
