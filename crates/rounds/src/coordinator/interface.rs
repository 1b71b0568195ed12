//! What goes into the coordinator's decisions and what comes out of them.

use crate::adaptive::{Change, Choice};
use crate::codec::FragmentCodec;
use crate::exchange::{Travelling, may_be_sharded};
use crate::ledger::{Ledger, LedgerTotals};
use crate::plan::{Commit, Contribution, Directive, FragmentPlan, LeaveReason, Peer, Report, RoundPlan, SiteDevice};
use crate::recompute::StepVerdict;
use crate::schedule::lookahead;
use base::config::SyncSection;
use base::{ContentHash, ParameterSchema, Round, RunConfig, SiteId, Term};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// What the decisions depend on.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// Sites to wait for before the first round of a term.
    pub sites: u32,
    /// Samples in an inner step, over all sites.
    pub batch_samples: u64,
    /// Tokens predicted in one sample.
    pub sequence_length: u64,
    /// Inner steps in a round (H / P).
    pub steps_per_round: u64,
    /// Inner steps of the run.
    pub steps_total: u64,
    /// What is drawn at random follows from it.
    pub seed: u64,
    /// Rounds, overlap, codec, quorum and grace.
    pub sync: SyncSection,
    /// What is cut into fragments: the size of every delta follows from it.
    pub schema: ParameterSchema,
}

impl Settings {
    /// The settings of a run.
    pub fn new(config: &RunConfig) -> Self {
        Self {
            sites: config.sync.sites,
            batch_samples: config.train.batch_samples as u64,
            sequence_length: config.data.sequence_length as u64,
            steps_per_round: config.steps_per_round(),
            steps_total: config.train.steps,
            seed: config.run.seed,
            sync: config.sync.clone(),
            schema: config.schema(),
        }
    }

    /// Size of an encoded delta of a fragment.
    pub fn delta_bytes(&self, plan: FragmentPlan) -> u64 {
        let fragments = self.schema.fragments(plan.count);
        let rank = plan.rank_or(self.sync.rank);
        let bytes = |fragment| FragmentCodec::new(plan, rank, &self.schema, fragment).encoded_bytes() as u64;
        fragments.get(plan.index as usize).map_or(0, bytes)
    }

    /// Values of a fragment.
    pub fn elements(&self, plan: FragmentPlan) -> u64 {
        self.schema.fragments(plan.count).get(plan.index as usize).map_or(0, |fragment| fragment.elements() as u64)
    }

    /// What a round of that fragment sends.
    pub(crate) fn travelling(&self, plan: FragmentPlan) -> Travelling {
        let fragments = self.schema.fragments(plan.count);
        let rank = plan.rank_or(self.sync.rank);
        let codec = fragments.get(plan.index as usize).map(|fragment| {
            let codec = FragmentCodec::new(plan, rank, &self.schema, fragment);
            (codec.encoded_bytes() as u64, codec.block_values(), fragment.elements() as u64)
        });
        let (delta_bytes, block_values, elements) = codec.unwrap_or_default();
        Travelling { codec: plan.codec, elements, delta_bytes, block_values }
    }

    /// The same with rounds of another kind.
    #[must_use]
    pub fn with(mut self, choice: &Choice) -> Self {
        let Choice { inner_steps, fragments, overlap_steps, codec, rank } = *choice;
        self.sync = SyncSection { inner_steps, fragments, overlap_steps, codec, ..self.sync };
        if rank > 0 {
            self.sync.rank = rank;
        }
        self.steps_per_round = (inner_steps / u64::from(fragments.max(1))).max(1);
        self
    }

    /// Rounds for which sites keep what they have fetched, so that one that was away or slow can catch up from any of them: those
    /// that are open, and as many as fit the size of the parameters.
    pub fn rounds_kept(&self, plan: FragmentPlan, sites: usize) -> u64 {
        let travelling = self.travelling(plan);
        let deltas = travelling.delta_bytes * sites as u64;
        let round_bytes = match may_be_sharded(self.sync.exchange, &travelling, sites) {
            // Merged parts, and what of it falls back to the mesh.
            true => deltas.max(travelling.elements * size_of::<f32>() as u64),
            false => deltas,
        };
        let parameter_bytes = (self.schema.elements() * size_of::<f32>()) as u64;
        let fit = parameter_bytes / round_bytes.max(1);
        // A site does not know the adapted overlap: it is less than H, and so open rounds are no more than fragments.
        let open = match self.sync.adaptive {
            true => u64::from(plan.count),
            false => lookahead(self.steps_per_round, self.sync.overlap_steps),
        };
        open + 2 + fit.min(ROUNDS_KEPT_MAX)
    }
}

/// More are never needed: what is older is fetched as a whole state.
const ROUNDS_KEPT_MAX: u64 = 64;

/// What happened.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A site was admitted and its connection is up.
    Connected(Peer),
    /// A site said something.
    Reported(SiteId, Report),
    /// A site's connection ended, or it broke the protocol.
    Disconnected(SiteId, LeaveReason),
    /// A site's connection carries words: it is there.
    Heard(SiteId),
    /// A site has measured the model's validation loss.
    Evaluated {
        /// Who.
        site: SiteId,
        /// After this round.
        round: Round,
        /// Mean loss, nats a token.
        nats_per_token: f64,
    },
    /// A second passed.
    Tick,
    /// Finish after the round in progress.
    StopRequested,
}

/// What the shell must do, in this order.
#[derive(Debug, Clone, PartialEq)]
pub enum Command {
    /// Write to the durable log and sync before any later command.
    Persist(Record),
    /// Send to one site.
    Send(SiteId, Directive),
    /// Tell people.
    Note(Note),
    /// The run is over and every site has left.
    Done,
}

/// A line of the coordinator's durable log.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "record", rename_all = "snake_case")]
pub enum Record {
    /// A new coordinator process took over.
    TermStarted {
        /// Its fencing number.
        term: Term,
    },
    /// A round closed.
    Committed(Box<Committed>),
    /// All sites agreed on the state after it.
    StateHash {
        /// The round.
        round: Round,
        /// The hash.
        state_hash: ContentHash,
    },
    /// Rounds from this one on are of another kind.
    SettingsChanged {
        /// The first of them.
        round: Round,
        /// Their settings.
        choice: Choice,
        /// Why, for people.
        reason: String,
    },
    /// No site holds a later round any more: its commits are void and their samples will be leased again.
    RolledBack {
        /// The round that counts as the last.
        to: Round,
    },
    /// Sites that hold the state after this round are told from now on that the run is over: they save it and leave.
    Over {
        /// The last round.
        round: Round,
    },
}

/// A commit, and the ledger right after it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Committed {
    /// The commit.
    pub commit: Commit,
    /// Leases of rounds that were open then are open in it.
    pub ledger: Ledger,
    /// Agreed by all sites; not known before they have applied the commit.
    pub state_hash: Option<ContentHash>,
}

/// What keeps a straggler.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Lateness {
    /// It is still making its inner steps, and says that it is there.
    SlowCompute,
    /// Its delta is ready, but the others could not fetch it yet.
    SlowLink,
    /// Nothing has been heard of it for a while.
    Silent,
}

/// A decision, and why, for people.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Note {
    /// A site can train.
    SiteReady {
        /// Who.
        site: SiteId,
        /// Measured at join.
        tokens_per_second: f64,
    },
    /// What a site computes on.
    SiteDevice {
        /// Who.
        site: SiteId,
        /// On what.
        device: Box<SiteDevice>,
    },
    /// A site is gone.
    SiteLeft {
        /// Who.
        site: SiteId,
        /// Why.
        reason: LeaveReason,
    },
    /// Work was handed out.
    RoundStarted(Arc<RoundPlan>),
    /// A site finished its inner steps.
    Computed {
        /// Who.
        site: SiteId,
        /// Which round.
        round: Round,
        /// With what.
        contribution: Contribution,
    },
    /// A round closed.
    Committed {
        /// With what.
        commit: Arc<Commit>,
        /// Since it began.
        seconds: f64,
        /// Sums after it.
        totals: LedgerTotals,
    },
    /// A round closed without a site that was to be part of it.
    Straggler {
        /// Who.
        site: SiteId,
        /// Which round.
        round: Round,
        /// What kept it.
        reason: Lateness,
        /// How long the round had waited, seconds.
        waited_seconds: f64,
    },
    /// A step was recomputed, by its site or by others as well.
    StepRecomputed {
        /// Who.
        site: SiteId,
        /// Its engine and device.
        engine: String,
        /// In which round.
        round: Round,
        /// The other site that has recomputed it; itself where there is none.
        by: Option<SiteId>,
        /// What came of it.
        verdict: StepVerdict,
    },
    /// All sites hold the same state.
    Agreed {
        /// After this round.
        round: Round,
        /// The state.
        state_hash: ContentHash,
    },
    /// A site holds another state than the majority.
    Diverged {
        /// Who.
        site: SiteId,
        /// After which round.
        round: Round,
        /// The majority's.
        expected: ContentHash,
        /// The site's.
        found: ContentHash,
    },
    /// The division of the batch changed.
    SharesMoved {
        /// Weight of each current site.
        weights: Vec<(SiteId, f64)>,
    },
    /// Rounds from this one on are of another kind.
    SettingsChanged {
        /// The first of them.
        round: Round,
        /// From what to what, and why.
        change: Box<Change>,
    },
    /// Deltas travel another way than in the rounds before, from this one on or in this one.
    ExchangeChosen {
        /// Which.
        round: Round,
        /// Whether each site merges a part; else each fetches every delta.
        is_sharded: bool,
        /// Why.
        reason: String,
    },
    /// See [`Record::RolledBack`].
    RolledBack {
        /// The last commit in the log.
        from: Round,
        /// The newest round that a site still holds.
        to: Round,
    },
    /// No site can reach the last commit any more: all are asked what they hold, and the run goes on from the newest state that is.
    Regrouped {
        /// The last commit in the log.
        round: Round,
    },
    /// A site answered a plan that was withdrawn: its answer does not count.
    Outdated {
        /// Who.
        site: SiteId,
        /// Round of the plan.
        round: Round,
        /// Attempt of the plan.
        attempt: u32,
    },
    /// Every working site left: the round will begin anew.
    RoundAbandoned {
        /// Which.
        round: Round,
    },
}
