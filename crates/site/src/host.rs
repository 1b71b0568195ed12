//! The host's thread: encodes and merges beside the engine.
//!
//! It alone changes the global state. Jobs are done in order, which is the order of rounds: a round's own snapshot is encoded against
//! the state before its commit.

use crate::merger::{Merged, Merger};
use crate::trainer::{Progress, TrainError};
use crate::worker::Done;
use base::{ContentHash, Round, SiteId};
use bytes::Bytes;
use rounds::{Commit, Contribution, Contributor, FragmentPlan, Measurement, RoundPlan, SampleRange};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Instant;
use wire::Blob;

/// What a site merges for all in a sharded round.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PartKey {
    pub(crate) round: Round,
    pub(crate) fragment: FragmentPlan,
}

/// What one reducer fetches of a delta.
pub(crate) struct Slice {
    pub(crate) reducer: SiteId,
    pub(crate) hash: ContentHash,
    pub(crate) blob: Blob,
}

/// What the host's thread is asked to do.
pub(crate) enum HostJob {
    /// Encode what the engine has trained.
    Encode { plan: RoundPlan, values: Arc<Vec<f32>>, progress: Progress, abandon: Arc<AtomicBool> },
    /// Merge the slices of these contributors' deltas for everybody.
    Reduce { key: PartKey, values: usize, contributors: Vec<Contributor>, slices: Vec<Bytes>, abandon: Arc<AtomicBool> },
    /// Merge the deltas of a commit, in its order, or take its merged parts.
    /// Then, where somebody asks for it, the engine computes the gradient of these samples at the merged parameters.
    Merge { commit: Commit, inputs: Vec<Bytes>, witness: Option<Vec<SampleRange>> },
    /// Take over a state that was fetched.
    Install { commit: Commit, bytes: Vec<u8> },
    /// Plans were withdrawn: their snapshots will not be sent.
    Withdraw,
}

/// A gradient that this site is asked for.
pub(crate) struct Question {
    pub(crate) round: Round,
    pub(crate) state_hash: ContentHash,
    /// The global parameters then: they go on.
    pub(crate) parameters: Vec<f32>,
    pub(crate) samples: Vec<SampleRange>,
}

impl Question {
    fn new(merged: &Merged, merger: &Merger, samples: Vec<SampleRange>) -> Self {
        let parameters = merger.state().read().unwrap_or_else(PoisonError::into_inner).parameters.clone();
        Self { round: merged.round, state_hash: merged.state_hash, parameters, samples }
    }
}

/// Does jobs until there are no more, or one fails; `answer` gives false when nobody listens any more.
pub(crate) fn run(mut merger: Merger, jobs: &std::sync::mpsc::Receiver<HostJob>, mut answer: impl FnMut(Done) -> bool) {
    let mut merge_seconds = 0.0;
    while let Ok(job) = jobs.recv() {
        let done = match job {
            HostJob::Encode { abandon, .. } if abandon.load(Ordering::Relaxed) => continue,
            HostJob::Encode { plan, values, progress, abandon } => {
                encode(&mut merger, &plan, &values, &progress, (abandon, merge_seconds))
            }
            HostJob::Reduce { abandon, .. } if abandon.load(Ordering::Relaxed) => continue,
            HostJob::Reduce { key, values, contributors, slices, abandon } => {
                match merger.reduce(key.fragment, values, (&contributors, &slices)) {
                    Ok((part, clipped)) => {
                        let blob = Blob::memory(part.clone());
                        Done::Reduced { key, part, clipped, hash: hash_of(&blob), blob, abandoned: abandon }
                    }
                    Err(error) => Done::Failed(TrainError::Merge(error)),
                }
            }
            HostJob::Merge { commit, inputs, witness } => {
                let began = Instant::now();
                let merged = merger.merge(&commit, &inputs);
                merge_seconds = began.elapsed().as_secs_f64();
                if let (Some(samples), Ok(merged)) = (witness, &merged) {
                    answer(Done::Witness(Question::new(merged, &merger, samples)));
                }
                merged.map_or_else(|error| Done::Failed(TrainError::Merge(error)), Done::Merged)
            }
            HostJob::Install { commit, bytes } => install(&mut merger, commit, &bytes),
            HostJob::Withdraw => {
                merger.withdraw();
                continue;
            }
        };
        if !answer(done) {
            return;
        }
    }
}

fn encode(
    merger: &mut Merger,
    plan: &RoundPlan,
    values: &Arc<Vec<f32>>,
    progress: &Progress,
    (abandoned, merge_seconds): (Arc<AtomicBool>, f64),
) -> Done {
    let (round, fragment) = (plan.round, plan.fragment);
    let began = Instant::now();
    match merger.encode(round, fragment, values) {
        Ok(delta) => {
            let (lost_part, encode_seconds) = (merger.lost_part(), began.elapsed().as_secs_f64());
            let measurement = Measurement { lost_part, encode_seconds, merge_seconds, links: Vec::new() };
            let contribution = Contribution {
                tokens: progress.loss.tokens,
                delta_hash: ContentHash::of(&delta),
                delta_bytes: delta.len() as u64,
                loss_nats: progress.loss_nats(),
                compute_seconds: progress.compute_seconds,
            };
            let slices = slices(merger, plan, &delta);
            Done::Encoded { round, fragment, delta, slices, contribution, measurement, abandoned }
        }
        Err(not_finite) => Done::Failed(TrainError::NotFinite {
            step: plan.first_step + plan.steps,
            what: format!("delta of {}", not_finite.parameter),
            value: f64::from(not_finite.value),
        }),
    }
}

/// What each reducer fetches of a delta, in the order of the plan's parts. One that cannot be cut there is left out: the coordinator that made
/// such a plan is told by their number.
fn slices(merger: &mut Merger, plan: &RoundPlan, delta: &Bytes) -> Vec<Slice> {
    if plan.parts.is_empty() {
        return Vec::new();
    }
    let codec = merger.codec(plan.fragment);
    let slice = |part: &rounds::Part| {
        let blob = Blob::memory(delta.slice(codec.slice(&part.values)?));
        Some(Slice { reducer: part.site, hash: hash_of(&blob), blob })
    };
    plan.parts.iter().filter_map(slice).collect()
}

fn hash_of(blob: &Blob) -> ContentHash {
    blob.hash().unwrap_or_else(|error| unreachable!("memory can be read: {error}"))
}

fn install(merger: &mut Merger, commit: Commit, bytes: &[u8]) -> Done {
    let round = commit.round;
    let installed = merger.state().write().unwrap_or_else(PoisonError::into_inner).decode(commit, bytes);
    if !installed {
        return Done::InstallFailed;
    }
    merger.start_over();
    Done::Installed { round, state_hash: ContentHash::of(bytes) }
}
