//! The engine's thread of a simulated site: a small model that learns from positions, in virtual time.
//!
//! A step on the samples at positions x_1 .. x_n takes each parameter towards numbers that are drawn from the positions:
//! ```text
//! L_j = L_j - 0.05 * mean over i of (0.1 * L_j - target(x_i, j))
//! ```
//! So the parameters depend on which samples were trained, in which order, and from where: a sample that is trained twice or by nobody
//! shows in the bits.

use super::host::{LocalChange, Merged, Progress};
use base::random::mix64;
use base::{Fragment, Round};
use rounds::{Assignment, RoundPlan};
use std::collections::{BTreeSet, VecDeque};
use std::ops::Range;

const LEARNING_RATE: f32 = 0.05;
const DECAY: f32 = 0.1;

/// Jobs are done in order.
#[derive(Debug, Clone)]
pub(crate) enum Job {
    Prepare,
    Train { plan: RoundPlan, assignment: Assignment, steps: Range<u64>, generation: u64 },
    Snapshot { plan: RoundPlan, generation: u64 },
    Apply(Merged),
    StartOver,
    Finish,
}

/// The engine's own parameters.
pub(crate) struct Engine {
    pub(crate) local: Vec<f32>,
    /// Rounds whose snapshots are still what the parameters are counted from.
    in_flight: BTreeSet<Round>,
    /// The global parameters were put in as they were after this round.
    given: Round,
    work: (Round, Progress),
    pub(crate) queue: VecDeque<Job>,
    /// The job at hand, and the seconds that it takes.
    pub(crate) busy: Option<(Job, f64)>,
}

impl Engine {
    pub(crate) fn new(parameters: Vec<f32>, round: Round) -> Self {
        Self {
            local: parameters,
            in_flight: BTreeSet::new(),
            given: round,
            work: (Round(0), Progress::default()),
            queue: VecDeque::new(),
            busy: None,
        }
    }

    /// What to do next: of several inner steps the first, for what slows a machine down or is mended is felt from the next step on.
    pub(crate) fn next(&mut self) -> Option<Job> {
        let job = self.queue.pop_front()?;
        let Job::Train { plan, assignment, steps, generation } = job else { return Some(job) };
        let first = steps.start..steps.end.min(steps.start + 1);
        if first.end < steps.end {
            let (plan, assignment, steps) = (plan.clone(), assignment.clone(), first.end..steps.end);
            self.queue.push_front(Job::Train { plan, assignment, steps, generation });
        }
        Some(Job::Train { plan, assignment, steps: first, generation })
    }

    /// Makes some steps of an assignment, which took so long.
    pub(crate) fn train(&mut self, plan: &RoundPlan, assignment: &Assignment, steps: Range<u64>, cost: Progress) {
        let before: u64 = (0..steps.start).map(|index| assignment.step_samples(index)).sum();
        let positions = assignment.lease.iter().flat_map(|range| range.start..range.end);
        let mut positions = positions.skip(before as usize);
        for index in steps {
            let batch: Vec<u64> = positions.by_ref().take(assignment.step_samples(index) as usize).collect();
            self.step(&batch);
        }
        if self.work.0 != plan.round {
            self.work = (plan.round, Progress::default());
        }
        self.work.1.tokens += cost.tokens;
        self.work.1.compute_seconds += cost.compute_seconds;
    }

    fn step(&mut self, positions: &[u64]) {
        let gradient = gradient(&self.local, positions);
        self.local.iter_mut().zip(gradient).for_each(|(value, gradient)| *value -= LEARNING_RATE * gradient);
    }

    /// The fragment's parameters, and what was trained in the round.
    pub(crate) fn snapshot(&mut self, plan: &RoundPlan, fragment: &Fragment) -> (Vec<f32>, Progress) {
        let progress = if self.work.0 == plan.round { self.work.1 } else { Progress::default() };
        self.work = (Round(0), Progress::default());
        self.in_flight.insert(plan.round);
        let mut values = vec![0.0; fragment.elements()];
        fragment.gather(&self.local, &mut values);
        (values, progress)
    }

    /// Takes over what was merged of a fragment. `global` are the parameters as they are now, after `round`.
    pub(crate) fn apply(&mut self, merged: &Merged, fragment: &Fragment, global: (&[f32], Round)) {
        if merged.round > self.given {
            let is_in_flight = self.in_flight.contains(&merged.round);
            match &merged.local {
                LocalChange::Add { counts_from_snapshot: true, .. } if !is_in_flight => self.put_back(global),
                LocalChange::Add { change, .. } => {
                    let mut values = vec![0.0; fragment.elements()];
                    fragment.gather(&self.local, &mut values);
                    values.iter_mut().zip(change).for_each(|(value, change)| *value += change);
                    fragment.scatter(&values, &mut self.local);
                }
                LocalChange::Become(values) => fragment.scatter(values, &mut self.local),
            }
        }
        self.in_flight.remove(&merged.round);
    }

    /// Forgets what was trained and not merged.
    pub(crate) fn put_back(&mut self, (parameters, round): (&[f32], Round)) {
        self.local.copy_from_slice(parameters);
        self.in_flight.clear();
        self.given = round;
        self.work = (Round(0), Progress::default());
    }
}

/// Of the samples at these positions.
pub(crate) fn gradient(parameters: &[f32], positions: &[u64]) -> Vec<f32> {
    let scale = 1.0 / positions.len().max(1) as f32;
    let mean = |index| positions.iter().map(|position| target(*position, index)).sum::<f32>() * scale;
    parameters.iter().enumerate().map(|(index, value)| DECAY * value - mean(index)).collect()
}

/// In -0.5..0.5.
fn target(position: u64, index: usize) -> f32 {
    let bits = mix64(position.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ mix64(index as u64));
    (bits >> 40) as f32 / (1u64 << 24) as f32 - 0.5
}
