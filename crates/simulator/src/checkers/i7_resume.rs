//! I7: 100 steps equal 50 steps, stop, resume, 50 steps.
//!
//! Without faults, with shares that do not depend on measured speeds, and where nothing is on its way between rounds (`diloco`), a run that
//! is stopped at the end of a round and gone on with by new processes gives the same parameters and momentum as one that is not: bit for
//! bit. Terms differ, since another coordinator went on; so the values are compared, and not the hash that has the term in it.

use super::Violation;
use crate::options::Options;
use crate::world::World;

/// The first part of the run, rounds.
const ROUNDS_BEFORE: u64 = 3;

/// Runs a seed in one go, and in two; says what differs.
pub fn check(seed: u64, options: &Options) -> Option<Violation> {
    let options = Options { faults: false, minutes: Some(1.0), trace_lines_max: 0, ..options.clone() };
    let mut whole = World::repeatable(seed, &options)?;
    let violation = whole.run();
    let whole = whole.into_end(violation);
    let mut first = World::repeatable(seed, &options)?;
    first.stop_after(ROUNDS_BEFORE);
    let violation = first.run();
    let mut second = World::repeatable(seed, &options)?.with_disks_of(first);
    let violation = violation.or_else(|| second.run());
    let resumed = second.into_end(violation);
    let seconds = resumed.virtual_seconds;
    if let Some(violation) = whole.violation.or(resumed.violation) {
        return Some(violation);
    }
    let differs = whole.values.iter().zip(&resumed.values).position(|(one, other)| one != other)?;
    let what = format!("machine {differs} holds other values after the run was stopped and gone on with");
    Some(Violation { invariant: "I7 resume", what, seconds })
}
