//! One seed, or many of them on several threads.

use crate::checkers::{Violation, i7_resume};
use crate::options::Options;
use crate::world::World;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Every so many seeds I7 is checked as well: it takes two runs without faults.
const RESUME_EVERY: u64 = 16;

/// What came of one seed.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// Which.
    pub seed: u64,
    /// The first invariant that was violated, if any.
    pub violation: Option<Violation>,
    /// How long the run was, in its own time.
    pub virtual_seconds: f64,
    /// Rounds committed.
    pub commits: u64,
    /// Things that broke.
    pub faults: u64,
    /// The last lines of what was to be seen; empty where nothing was violated.
    pub trace: Vec<String>,
}

/// Simulates one seed.
pub fn run(seed: u64, options: &Options) -> Outcome {
    let Some(mut world) = World::new(seed, options) else {
        // The system has no random numbers for a secret: nothing can be said of the seed.
        let what = "the system's random number generator failed".to_owned();
        let violation = Some(Violation { invariant: "none", what, seconds: 0.0 });
        return Outcome { seed, violation, virtual_seconds: 0.0, commits: 0, faults: 0, trace: Vec::new() };
    };
    let violation = world.run();
    let end = world.into_end(violation);
    let resumes = end.violation.is_none() && seed.is_multiple_of(RESUME_EVERY) && options.faults;
    let violation = end.violation.or_else(|| if resumes { i7_resume::check(seed, options) } else { None });
    let trace = if violation.is_some() { end.trace } else { Vec::new() };
    let (virtual_seconds, commits, faults) = (end.virtual_seconds, end.commits, end.faults);
    Outcome { seed, violation, virtual_seconds, commits, faults, trace }
}

/// Sums over the seeds that are done.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Progress {
    /// How many.
    pub seeds: u64,
    /// Their time, added up.
    pub virtual_seconds: f64,
    /// Rounds committed in all.
    pub commits: u64,
    /// Things that broke in all.
    pub faults: u64,
}

/// Simulates `seeds` seeds from `first` on, on so many threads, until one violates an invariant; gives the sums and the violated
/// outcome with the lowest seed. `on_progress` is called after each seed.
pub fn run_many(
    first: u64,
    seeds: u64,
    threads: usize,
    options: &Options,
    on_progress: impl Fn(&Progress) + Sync,
) -> (Progress, Option<Outcome>) {
    let (next, is_over) = (AtomicU64::new(0), AtomicBool::new(false));
    let results = Mutex::new((Progress::default(), None::<Outcome>));
    std::thread::scope(|scope| {
        for _ in 0..threads.max(1) {
            scope.spawn(|| {
                while !is_over.load(Ordering::Relaxed) {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    if index >= seeds {
                        return;
                    }
                    let outcome = run(first.wrapping_add(index), options);
                    let mut results = results.lock().unwrap_or_else(PoisonError::into_inner);
                    let (progress, worst) = &mut *results;
                    progress.seeds += 1;
                    progress.virtual_seconds += outcome.virtual_seconds;
                    progress.commits += outcome.commits;
                    progress.faults += outcome.faults;
                    on_progress(progress);
                    if outcome.violation.is_some() {
                        is_over.store(true, Ordering::Relaxed);
                        if worst.as_ref().is_none_or(|worst| outcome.seed < worst.seed) {
                            *worst = Some(outcome);
                        }
                    }
                }
            });
        }
    });
    results.into_inner().unwrap_or_else(PoisonError::into_inner)
}
