//! I5: after the last fault is mended, the next commit comes within two deadlines.
//!
//! A deadline is that of the coordinator: three times the slowest site's round, and `deadline_seconds`. Whoever asks knows both.

use super::{Finding, ProcessLog};
use crate::event::Event;

const LIMITS: &str = "nothing, where clocks agree";

pub(super) fn check(coordinator: &ProcessLog, healed: Option<(u64, f64)>) -> Finding {
    let mut finding = Finding::new("I5 heal", "last faults that were mended", LIMITS);
    let Some((healed, bound_seconds)) = healed else { return finding };
    finding.checked = 1;
    let goes_on = |event: &Event| matches!(event, Event::RoundClosed { .. } | Event::RunFinished { .. });
    let after = coordinator.records.iter().filter(|record| record.unix_ms >= healed);
    let next = after.into_iter().find(|record| goes_on(&record.event));
    match next.map(|record| (record.unix_ms - healed) as f64 / 1e3) {
        None => finding.violated("no commit after the last fault was mended".to_owned()),
        Some(seconds) if seconds > bound_seconds => {
            finding.violated(format!("{seconds:.1} s from the last fault to a commit, at most {bound_seconds:.1}"));
        }
        Some(_) => {}
    }
    finding
}
