//! What the coordinator and the sites say to each other, as plain data. `wire` gives it bytes.

use crate::digest::{DigestBounds, GradientDigest};
use crate::exchange::{MergedPart, Part};
use crate::ledger::SampleRange;
use crate::recompute::{StepCheck, StepVerdict};
use crate::schedule::Effects;
use crate::shares::step_samples;
use base::config::Codec;
use base::{ContentHash, Round, SiteId, Term};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// A site as the others see it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// Its id.
    pub site: SiteId,
    /// Its name, for people.
    pub name: String,
    /// `host:port` where it serves its deltas and state; empty where it cannot be dialled.
    pub address: String,
    /// BLAKE3 of its certificate.
    pub fingerprint: ContentHash,
}

impl Peer {
    /// Whether others can fetch from it.
    pub fn can_be_dialled(&self) -> bool {
        !self.address.is_empty()
    }
}

/// One site's work in a round.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Assignment {
    /// Who works.
    pub site: SiteId,
    /// Samples of the whole round.
    pub samples: u64,
    /// Its inner steps; see [`Assignment::step_samples`].
    pub steps: u64,
    /// `samples` positions, in training order.
    pub lease: Vec<SampleRange>,
    /// Its part of the round's samples.
    pub share: f64,
}

impl Assignment {
    /// Samples of inner step `index`, from 0: as even as whole samples allow.
    pub fn step_samples(&self, index: u64) -> u64 {
        step_samples(self.samples, self.steps, index)
    }

    /// The positions of inner step `index`, from 0, in training order.
    pub fn step_lease(&self, index: u64) -> Vec<SampleRange> {
        let mut skipped: u64 = (0..index).map(|before| self.step_samples(before)).sum();
        let mut wanted = self.step_samples(index);
        let mut ranges = Vec::new();
        for range in &self.lease {
            let skip = skipped.min(range.samples());
            let taken = wanted.min(range.samples() - skip);
            if taken > 0 {
                ranges.push(SampleRange { start: range.start + skip, end: range.start + skip + taken });
            }
            (skipped, wanted) = (skipped - skip, wanted - taken);
        }
        ranges
    }
}

/// What a round synchronises, and how it is coded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FragmentPlan {
    /// Which fragment.
    pub index: u32,
    /// Of how many.
    pub count: u32,
    /// How its deltas are coded.
    pub codec: Codec,
    /// Rank of a low-rank codec; 0: as the configuration has it.
    #[serde(default)]
    pub rank: u32,
}

impl FragmentPlan {
    /// The rank to code with, where the configuration says `rank`.
    pub fn rank_or(&self, rank: u32) -> u32 {
        if self.rank > 0 { self.rank } else { rank }
    }
}

/// A round as it begins.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RoundPlan {
    /// Fencing number of the coordinator that made it.
    pub term: Term,
    /// The round that will be committed.
    pub round: Round,
    /// Which attempt at it: greater where a plan of the same term for the same round was withdrawn. Reports say which they answer.
    pub attempt: u32,
    /// Inner steps of the run before this round: the place in the learning-rate schedule.
    pub first_step: u64,
    /// Inner steps of a site that has its full share; none in the rounds at the end of a run that only synchronise.
    pub steps: u64,
    /// What is synchronised at its end.
    pub fragment: FragmentPlan,
    /// Which earlier commits take effect in it.
    pub effects: Effects,
    /// Work, ascending by site. A site that is not listed only follows.
    pub assignments: Vec<Assignment>,
    /// Who merges which values for all, where the round is sharded; empty where every site fetches and merges every delta.
    pub parts: Vec<Part>,
    /// The inner step that its site makes twice.
    pub check: Option<StepCheck>,
}

/// What a site has to give for a round.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Contribution {
    /// Tokens trained on.
    pub tokens: u64,
    /// BLAKE3 of the encoded delta.
    pub delta_hash: ContentHash,
    /// Its size.
    pub delta_bytes: u64,
    /// Mean training loss of the round, nats per token.
    pub loss_nats: f64,
    /// Time in inner steps.
    pub compute_seconds: f64,
}

/// Most links in a [`Measurement`]: the peers of a large run, 32 bytes each in a frame of 1 MiB.
pub const LINK_REPORTS_MAX: usize = 1_024;

/// What a site knows of the way from another site to it, from what it has fetched.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LinkReport {
    /// Who sends.
    pub from: SiteId,
    /// Goodput.
    pub bytes_per_second: f64,
    /// Without queues; 0 where it is not known.
    pub round_trip_seconds: f64,
    /// Part of the bytes that was sent again, 0 to 1; 0 where it is not known.
    pub loss: f64,
}

/// What a site has measured by the time it delivers for a round: adaptive settings are decided on it.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Measurement {
    /// Norm of what coding left over of the round's delta, over the norm of that delta; both with all residuals added up.
    pub lost_part: f64,
    /// Time in which the host encoded the delta.
    pub encode_seconds: f64,
    /// Time in which it merged the last commit; 0 before the first.
    pub merge_seconds: f64,
    /// The links that are known.
    pub links: Vec<LinkReport>,
}

/// No link, host or codec is measured beyond these; see [`Measurement::is_acceptable`].
const BYTES_PER_SECOND_MAX: f64 = 1e15;
const SECONDS_MAX: f64 = 1e6;
const LOST_PART_MAX: f64 = 1e3;

impl Measurement {
    /// Whether every number is one that can have been measured.
    pub fn is_acceptable(&self) -> bool {
        // NaN is in no range.
        let link = |link: &LinkReport| {
            link.bytes_per_second > 0.0
                && link.bytes_per_second <= BYTES_PER_SECOND_MAX
                && (0.0..=SECONDS_MAX).contains(&link.round_trip_seconds)
                && (0.0..=1.0).contains(&link.loss)
        };
        (0.0..=LOST_PART_MAX).contains(&self.lost_part)
            && (0.0..=SECONDS_MAX).contains(&self.encode_seconds)
            && (0.0..=SECONDS_MAX).contains(&self.merge_seconds)
            && self.links.len() <= LINK_REPORTS_MAX
            && self.links.iter().all(link)
    }
}

/// A contribution that is part of a commit, or may become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Contributor {
    /// Who.
    pub site: SiteId,
    /// Its weight in the merge: what it trained on since its last delta of this fragment that was merged.
    pub tokens: u64,
    /// What must be merged.
    pub delta_hash: ContentHash,
    /// Its size.
    pub delta_bytes: u64,
}

/// The durable fact that a round closed with exactly these contributors.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Commit {
    /// Term in which it closed.
    pub term: Term,
    /// The round.
    pub round: Round,
    /// What is merged.
    pub fragment: FragmentPlan,
    /// Ascending by site id: the order of the merge.
    pub contributors: Vec<Contributor>,
    /// The ledger's cursor after the round.
    pub cursor: u64,
    /// Inner steps of the run up to the end of the round.
    pub step: u64,
    /// Samples of the run whose training is part of the model.
    pub samples: u64,
    /// The merge, where the round was sharded: every value of the fragment, in order. Else the deltas are to be merged.
    #[serde(default)]
    pub parts: Vec<MergedPart>,
}

impl Commit {
    /// Round 0: the state that every run begins with.
    pub fn initial() -> Self {
        let fragment = FragmentPlan { index: 0, count: 1, codec: Codec::F32, rank: 0 };
        let (contributors, parts) = (Vec::new(), Vec::new());
        Self { term: Term(0), round: Round(0), fragment, contributors, cursor: 0, step: 0, samples: 0, parts }
    }
}

/// What is shared is written as if it was not.
mod shared {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};
    use std::sync::Arc;

    pub(super) fn serialize<T: Serialize, S: Serializer>(value: &Arc<T>, serializer: S) -> Result<S::Ok, S::Error> {
        value.as_ref().serialize(serializer)
    }

    pub(super) fn deserialize<'de, T: Deserialize<'de>, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Arc<T>, D::Error> {
        T::deserialize(deserializer).map(Arc::new)
    }
}

/// The same of a list.
mod shared_list {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};
    use std::sync::Arc;

    pub(super) fn serialize<T: Serialize, S: Serializer>(list: &Arc<[T]>, serializer: S) -> Result<S::Ok, S::Error> {
        list.as_ref().serialize(serializer)
    }

    pub(super) fn deserialize<'de, T: Deserialize<'de>, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Arc<[T]>, D::Error> {
        Vec::<T>::deserialize(deserializer).map(Arc::<[T]>::from)
    }
}

/// From the coordinator to a site. What grows with the number of sites is shared: the coordinator says the same to all, and n copies of what n
/// sites do would take n^2 times the memory.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Directive {
    /// Everybody who is connected now.
    Peers(#[serde(with = "shared_list")] Arc<[Peer]>),
    /// Take the global state of a committed round from one of these sites.
    FetchState {
        /// The commit that made the state; its term, round and cursor are part of the hash.
        #[serde(with = "shared")]
        commit: Arc<Commit>,
        /// BLAKE3 that the state must have.
        state_hash: ContentHash,
        /// Sites that hold it.
        #[serde(with = "shared_list")]
        from: Arc<[SiteId]>,
    },
    /// Start working.
    Begin(#[serde(with = "shared")] Arc<RoundPlan>),
    /// A site's delta can be fetched from it.
    DeltaReady {
        /// Term of the plan.
        term: Term,
        /// Round of the plan.
        round: Round,
        /// What to fetch.
        contributor: Contributor,
    },
    /// A slice of a site's delta can be fetched from it: those values that the receiver merges in this round.
    SliceReady {
        /// Term of the plan.
        term: Term,
        /// Round of the plan.
        round: Round,
        /// Whose.
        from: SiteId,
        /// BLAKE3 of the slice.
        hash: ContentHash,
    },
    /// Merge the slices of these, ascending by site, and give the result to all. The receiver holds them.
    Reduce {
        /// Term of the plan.
        term: Term,
        /// Round of the plan.
        round: Round,
        /// Whose, with their weights.
        #[serde(with = "shared_list")]
        contributors: Arc<[Contributor]>,
    },
    /// A merged part can be fetched from the site that made it, or from any other that holds it.
    PartReady {
        /// Term of the plan.
        term: Term,
        /// Round of the plan.
        round: Round,
        /// What to fetch.
        part: MergedPart,
    },
    /// Merge these and take the outer step.
    Commit(#[serde(with = "shared")] Arc<Commit>),
    /// The run is over: save and leave.
    Finish {
        /// Last committed round.
        round: Round,
        /// What every site holds.
        state_hash: ContentHash,
    },
    /// The coordinator goes on without this site.
    Dropped {
        /// Why.
        reason: LeaveReason,
    },
    /// Which term the coordinator leads in: said to a site that is ready, before anything is asked of it.
    Lead {
        /// Its fencing number.
        term: Term,
    },
    /// Said before the commit of that round: say what the gradient of these samples is at the global parameters after it.
    Witness {
        /// The round.
        round: Round,
        /// Positions of the sample order.
        samples: Vec<SampleRange>,
    },
    /// Say what you hold ([`Report::Ready`]): all plans are withdrawn, and commits whose deltas are not all there will be told again,
    /// if they are still to be had.
    Recall {
        /// How many times that was asked over this connection.
        number: u32,
    },
}

/// Why a site is no longer part of the run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum LeaveReason {
    /// It said so: the run finished.
    Finished,
    /// It said so: asked to stop.
    Stopped,
    /// Its connection ended without a word.
    ConnectionLost,
    /// It did not finish its inner steps before the deadline.
    TooSlow,
    /// It did not fetch the other sites' deltas before the deadline.
    DeltasMissing,
    /// Its state differs from the others' after a commit (invariant I1).
    Diverged,
    /// It broke the protocol.
    Misbehaved,
    /// Its engine failed.
    EngineFailed,
    /// Its engine gave a number that is not finite.
    EngineNotFinite,
    /// Its engine did not come back from a call.
    EngineHung,
    /// It may not come back: whoever runs the coordinator said so.
    Revoked,
    /// No other site had taken its delta by the deadline: it cannot be fetched, or is none.
    DeltaUnwanted,
    /// Its inner steps came out otherwise when they were made again, more than once.
    StepsDiffer,
}

/// Longest text in a [`SiteDevice`].
pub const DEVICE_TEXT_BYTES_MAX: usize = 256;

/// What a site computes on, for people.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct SiteDevice {
    /// Engine and device as `--engine` takes it.
    pub engine: String,
    /// What the maker calls the device.
    pub name: String,
    /// Who made it; empty where the system does not tell.
    pub maker: String,
    /// Driver or software stack with its version; empty where there is none.
    pub driver: String,
    /// Memory of the device, where the driver tells.
    pub memory_bytes: Option<u64>,
    /// What matrix products are computed in: `f32` or `bf16`.
    pub precision: String,
}

impl SiteDevice {
    /// What computes alike: the engine, whichever of a machine's devices it runs on, and the precision. Empty where the engine is not known.
    pub fn kind(&self) -> String {
        let engine = match self.engine.rsplit_once(':') {
            Some((engine, number)) if number.parse::<u32>().is_ok() => engine,
            _ => self.engine.as_str(),
        };
        if engine.is_empty() { String::new() } else { format!("{engine} {}", self.precision) }
    }

    /// The same with texts of at most [`DEVICE_TEXT_BYTES_MAX`].
    #[must_use]
    pub fn clipped(mut self) -> Self {
        for text in [&mut self.engine, &mut self.name, &mut self.maker, &mut self.driver, &mut self.precision] {
            text.truncate(text.floor_char_boundary(DEVICE_TEXT_BYTES_MAX));
        }
        self
    }
}

/// From a site to the coordinator.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Report {
    /// It holds the state of a committed round and can train.
    Ready {
        /// Round of the state.
        round: Round,
        /// Its hash.
        state_hash: ContentHash,
        /// Measured at join.
        tokens_per_second: f64,
        /// Number of the newest [`Directive::Recall`] that came over this connection, 0 before the first: what was said before that was
        /// followed does not count.
        recall: u32,
    },
    /// Its inner steps are done and its delta can be fetched.
    Computed {
        /// Round of the plan.
        round: Round,
        /// Attempt of the plan.
        attempt: u32,
        /// What it has.
        contribution: Contribution,
        /// BLAKE3 of its slice for each part of the plan, in that order; none where the plan has none.
        slice_hashes: Vec<ContentHash>,
    },
    /// It has fetched and checked a delta.
    Holds {
        /// Round of the plan.
        round: Round,
        /// Attempt of the plan.
        attempt: u32,
        /// Whose.
        from: SiteId,
    },
    /// It has fetched and checked the slice of a delta that it is to merge.
    HoldsSlice {
        /// Round of the plan.
        round: Round,
        /// Attempt of the plan.
        attempt: u32,
        /// Whose.
        from: SiteId,
    },
    /// It has merged its part, and all others can fetch that.
    Reduced {
        /// Round of the plan.
        round: Round,
        /// Attempt of the plan.
        attempt: u32,
        /// BLAKE3 of the merged part.
        hash: ContentHash,
    },
    /// It has fetched and checked a merged part.
    HoldsPart {
        /// Round of the plan.
        round: Round,
        /// Attempt of the plan.
        attempt: u32,
        /// Who merged it.
        from: SiteId,
    },
    /// It has taken the outer step.
    Applied {
        /// The committed round.
        round: Round,
        /// Hash of its global state (invariant I1).
        state_hash: ContentHash,
    },
    /// It leaves.
    Leave {
        /// Why.
        reason: LeaveReason,
    },
    /// What it computes on, once the engine runs.
    Device(SiteDevice),
    /// Said before [`Report::Computed`] where settings are adaptive.
    Measured {
        /// Round of the plan.
        round: Round,
        /// What it knows now.
        measurement: Measurement,
    },
    /// It has made an inner step twice. Where the results differ, it has gone back to the global state, and delivers nothing of this round.
    Recomputed {
        /// Round of the plan.
        round: Round,
        /// Attempt of the plan.
        attempt: u32,
        /// What came of it.
        verdict: StepVerdict,
    },
    /// It has computed a gradient that it was asked for ([`Directive::Witness`]).
    Witnessed {
        /// After the commit of this round.
        round: Round,
        /// Hash of the global state whose parameters it was computed at.
        state_hash: ContentHash,
        /// The gradient.
        digest: GradientDigest,
        /// How far it may be from that of another machine with the same kind of engine.
        bounds: DigestBounds,
    },
}

impl Report {
    /// The plan that it answers, if it answers one: its round and which attempt at that. What a step has shown counts whatever became of the plan.
    pub fn answers(&self) -> Option<(Round, u32)> {
        match *self {
            Self::Computed { round, attempt, .. }
            | Self::Holds { round, attempt, .. }
            | Self::HoldsSlice { round, attempt, .. }
            | Self::Reduced { round, attempt, .. }
            | Self::HoldsPart { round, attempt, .. } => Some((round, attempt)),
            Self::Ready { .. }
            | Self::Applied { .. }
            | Self::Leave { .. }
            | Self::Device(_)
            | Self::Recomputed { .. }
            | Self::Witnessed { .. }
            | Self::Measured { .. } => None,
        }
    }
}

/// Hash of the global state after a commit (invariant I1): BLAKE3 of the parameters and outer buffers as little-endian
/// f32, then term, round and cursor as little-endian u64. [`state_trailer`] is the last part.
pub fn state_trailer(term: Term, round: Round, cursor: u64) -> [u8; 24] {
    let mut trailer = [0; 24];
    trailer[..8].copy_from_slice(&term.0.to_le_bytes());
    trailer[8..16].copy_from_slice(&round.0.to_le_bytes());
    trailer[16..].copy_from_slice(&cursor.to_le_bytes());
    trailer
}
