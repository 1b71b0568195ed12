//! Every event a run can log. `docs/events.md` describes each field with its unit, and a test keeps the two equal.
//!
//! A log outlives the program that wrote it, so the rules of change are: an event or a field may be added (with a
//! default), none is renamed or given another meaning without raising [`EVENT_VERSION`]; readers skip and count
//! what they do not know.

use base::{ContentHash, Round, SiteId, Term};
use serde::{Deserialize, Serialize};

/// Version of the line format, `v` in each line.
pub const EVENT_VERSION: u32 = 1;

/// One line of a log.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// [`EVENT_VERSION`] of the writer.
    pub v: u32,
    /// Number of the record in its log, from 0; a gap means that records could not be written.
    pub seq: u64,
    /// Milliseconds since 1970-01-01 UTC.
    pub unix_ms: u64,
    /// Who wrote it: `coordinator`, or a site's name.
    pub source: String,
    /// What happened.
    #[serde(flatten)]
    pub event: Event,
}

/// A site's part of a round.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LeaseShare {
    /// Who trains it.
    pub site: SiteId,
    /// First sample (cursor of the permutation).
    pub start: u64,
    /// One past the last sample.
    pub end: u64,
    /// Inner steps.
    pub steps: u64,
    /// Samples in its largest inner step; the others have this many or one less.
    pub samples_per_step: u64,
    /// Samples of the whole round.
    #[serde(default)]
    pub samples: u64,
    /// Exactly which samples: ascending ranges. Those that came back from another lease need not be next to the others.
    #[serde(default)]
    pub ranges: Vec<SampleSpan>,
    /// Part of the joint batch, 0 to 1.
    pub share: f64,
}

/// Samples `start..end` of the run's order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SampleSpan {
    /// The first.
    pub start: u64,
    /// One past the last.
    pub end: u64,
}

/// A site whose delta was merged.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Contributor {
    /// Who.
    pub site: SiteId,
    /// Tokens behind its delta.
    pub tokens: u64,
    /// Its weight in the merge, 0 to 1.
    pub weight: f64,
}

/// A site's part of the batch.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SiteShare {
    /// Who.
    pub site: SiteId,
    /// Part of the joint batch, 0 to 1.
    pub share: f64,
}

/// Samples by what became of them. `leased` = `committed` + `returned` + `lost` + those in the open round.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct LedgerCounts {
    /// Given to sites.
    pub leased: u64,
    /// In a committed round.
    pub committed: u64,
    /// Given back uncommitted, to be leased again.
    pub returned: u64,
    /// Set aside after three leases without a commit.
    pub lost: u64,
}

/// Declares [`Event`] together with the list of its names, so that a reader can tell an event of the future from a
/// damaged line.
macro_rules! events {
    ($($(#[$doc:meta])* $variant:ident = $name:literal { $($(#[$field_meta:meta])* $field:ident: $kind:ty,)* })*) => {
        /// What happened. In a line, `event` holds the name in `snake_case` and the fields stand beside it.
        #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
        #[serde(tag = "event")]
        #[non_exhaustive]
        pub enum Event {
            $($(#[$doc])* #[serde(rename = $name)] $variant { $($(#[$field_meta])* $field: $kind,)* },)*
        }

        impl Event {
            /// Each event's name with the names of its fields.
            pub const SCHEMA: &'static [(&'static str, &'static [&'static str])] =
                &[$(($name, &[$(stringify!($field)),*])),*];

            /// The name of this event in a line.
            pub fn name(&self) -> &'static str {
                match self {
                    $(Self::$variant { .. } => $name,)*
                }
            }
        }
    };
}

events! {
    /// A process began to train or to coordinate.
    RunStarted = "run_started" {
        /// Name of the run.
        run: String,
        /// `synchronous` or `diloco`.
        strategy: String,
        /// Sites the run waits for.
        sites: u32,
        /// Parameters of the model.
        parameters: u64,
        /// Tokens of the whole run.
        tokens_planned: u64,
        /// Rounds of the whole run.
        rounds_planned: u64,
        /// Engine and device of this process, where it trains itself.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        engine: Option<String>,
        /// Round of the checkpoint from which it resumed.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        resumed_round: Option<Round>,
    }
    /// A site was admitted.
    SiteJoined = "site_joined" {
        /// Its id.
        site: SiteId,
        /// Its name.
        name: String,
        /// Where other sites reach it, `host:port`; empty where they cannot.
        address: String,
        /// Engine and device.
        engine: String,
        /// Host threads its engine uses.
        threads: u64,
        /// Artificial factor by which the site is slowed down; 1 is none.
        slowdown: f64,
    }
    /// What a site computes on.
    SiteDevice = "site_device" {
        /// Who.
        site: SiteId,
        /// Engine and device as `--engine` takes it.
        engine: String,
        /// What the maker calls the device.
        name: String,
        /// Who made it; empty where the system does not tell.
        maker: String,
        /// Driver or software stack with its version; empty where there is none.
        driver: String,
        /// Memory of the device; null where the driver does not tell.
        memory_bytes: Option<u64>,
        /// What matrix products are computed in: `f32` or `bf16`.
        precision: String,
    }
    /// A site holds the global state and has measured its speed.
    SiteReady = "site_ready" {
        /// Who.
        site: SiteId,
        /// Training tokens a second, measured alone.
        tokens_per_second: f64,
    }
    /// A site is no longer a member.
    SiteLeft = "site_left" {
        /// Who.
        site: SiteId,
        /// Why, in words.
        reason: String,
    }
    /// Leases were given out.
    RoundStarted = "round_started" {
        /// The round.
        round: Round,
        /// Its coordinator's term.
        term: Term,
        /// One for each participant.
        leases: Vec<LeaseShare>,
    }
    /// One inner step.
    Step = "step" {
        /// Who made it.
        site: SiteId,
        /// The round it belongs to.
        round: Round,
        /// Inner steps made so far in the run, this one included.
        step: u64,
        /// Mean training loss, nats a token.
        loss_nats: f64,
        /// Learning rate of this step.
        learning_rate: f64,
        /// Global gradient norm before clipping.
        gradient_norm: f64,
        /// Tokens of this step.
        tokens: u64,
        /// Time of this step.
        seconds: f64,
    }
    /// A site made all its inner steps of a round.
    RoundComputed = "round_computed" {
        /// The round.
        round: Round,
        /// Who.
        site: SiteId,
        /// Tokens trained in it.
        tokens: u64,
        /// Time spent computing.
        compute_seconds: f64,
        /// Mean training loss of the round, nats a token.
        loss_nats: f64,
    }
    /// Another site's delta, a slice of it, or a part that it merged arrived and its hash agreed.
    DeltaFetched = "delta_fetched" {
        /// The round.
        round: Round,
        /// From whom.
        from_site: SiteId,
        /// Bytes received.
        bytes: u64,
        /// Time of the transfer.
        seconds: f64,
    }
    /// A delta, a slice of it or a merged part that came from another site is not one: its round goes on without it, or with what comes instead.
    DeltaRefused = "delta_refused" {
        /// The round.
        round: Round,
        /// Who made it.
        from_site: SiteId,
        /// Why, in words.
        reason: String,
    }
    /// A delta was longer than `[sync] clip_norm` allows, and counts for less in the merge of this site. One event for each such delta or slice.
    DeltaClipped = "delta_clipped" {
        /// The round.
        round: Round,
        /// Whose delta.
        site: SiteId,
        /// Its norm.
        norm: f64,
        /// Median of the norms of the round's contributors.
        median: f64,
        /// What it was multiplied by, 0 to 1.
        factor: f64,
        /// Values that the norms are of: those of the fragment, or of the part that this site merges.
        values: u64,
    }
    /// Another site's deltas come another way from now on.
    RouteChosen = "route_chosen" {
        /// Whose deltas.
        from_site: SiteId,
        /// `direct` or `object store`.
        route: String,
        /// Why, in words.
        reason: String,
    }
    /// Deltas travel another way than in the rounds before, from this one on or in this one.
    ExchangeChosen = "exchange_chosen" {
        /// Which.
        round: Round,
        /// `mesh` or `sharded`.
        exchange: String,
        /// Why, in words with their numbers.
        reason: String,
    }
    /// A commit is in the coordinator's log. What sites hold after it, `round_committed` says later.
    RoundClosed = "round_closed" {
        /// The round.
        round: Round,
        /// Its coordinator's term.
        term: Term,
        /// Whose deltas are merged.
        contributors: Vec<Contributor>,
        /// Samples consumed so far: where the next lease begins.
        cursor: u64,
    }
    /// Every working site left while a round was open: it is planned anew.
    RoundAbandoned = "round_abandoned" {
        /// Which.
        round: Round,
    }
    /// No site holds the last commits any more: they are void, and their samples are leased again.
    RolledBack = "rolled_back" {
        /// The last commit before.
        from: Round,
        /// The last commit now.
        to: Round,
    }
    /// A round closed, and all sites hold the same state after it.
    RoundCommitted = "round_committed" {
        /// The round.
        round: Round,
        /// Its coordinator's term.
        term: Term,
        /// Whose deltas were merged.
        contributors: Vec<Contributor>,
        /// Samples consumed so far: where the next lease begins.
        cursor: u64,
        /// BLAKE3 of the global state after the round.
        state_hash: ContentHash,
        /// From the round's start to its commit.
        seconds: f64,
        /// Tokens committed so far in the run.
        tokens_total: u64,
    }
    /// A site made the outer step.
    RoundApplied = "round_applied" {
        /// The round.
        round: Round,
        /// Who.
        site: SiteId,
        /// BLAKE3 of its global state after the round.
        state_hash: ContentHash,
    }
    /// A site's state is not that of the run: invariant I1 is broken.
    Diverged = "diverged" {
        /// The round.
        round: Round,
        /// Who.
        site: SiteId,
        /// The run's hash.
        hash_expected: ContentHash,
        /// The site's.
        hash_found: ContentHash,
    }
    /// Loss on the validation text.
    Evaluated = "evaluated" {
        /// After this round.
        round: Round,
        /// Inner steps made so far in the run.
        step: u64,
        /// Mean validation loss, nats a token.
        nats_per_token: f64,
        /// The same per byte of text, in bits.
        bits_per_byte: f64,
        /// What a bigram model of the training tokens reaches on the same text.
        bigram_bits_per_byte: f64,
        /// Validation tokens used.
        tokens: u64,
    }
    /// Text from the model.
    Sample = "sample" {
        /// After this round.
        round: Round,
        /// The text.
        text: String,
    }
    /// A batch did not fit the device's memory: from now on fewer samples are computed at once.
    MicroBatchReduced = "micro_batch_reduced" {
        /// Whose device.
        site: SiteId,
        /// Samples computed at once before.
        from_samples: u64,
        /// Samples computed at once from now on.
        to_samples: u64,
        /// What the device said.
        reason: String,
    }
    /// An engine was lost and started again; what it had not finished is done anew.
    EngineRestarted = "engine_restarted" {
        /// Whose engine.
        site: SiteId,
        /// The last committed round when it was lost.
        round: Round,
        /// How often since that commit, this time included.
        attempt: u64,
        /// How it was lost.
        reason: String,
    }
    /// An engine did not come back from a call: the site leaves.
    EngineHung = "engine_hung" {
        /// Whose engine.
        site: SiteId,
        /// Engine and device.
        engine: String,
        /// Which call.
        call: String,
        /// Inner step of the run that was being made, or the last one that was.
        step: u64,
        /// How long it has taken when it was given up.
        seconds: f64,
    }
    /// An inner step was made again, with the same result.
    StepRecomputed = "step_recomputed" {
        /// Who.
        site: SiteId,
        /// The round it belongs to.
        round: Round,
        /// Number of the inner step in the run, from 1.
        step: u64,
        /// Who made it again: `itself`, or `site` and a number.
        by: String,
        /// What that has cost, where it is known.
        seconds: f64,
    }
    /// An inner step came out otherwise when it was made again: what the site has learnt since its last merge is left out.
    StepMismatch = "step_mismatch" {
        /// Who.
        site: SiteId,
        /// Engine and device.
        engine: String,
        /// The round it belongs to.
        round: Round,
        /// Number of the inner step in the run, from 1.
        step: u64,
        /// What differs: `loss`, `gradient norm`, `gradient` or `movement of the parameters`.
        quantity: String,
        /// By which part of it.
        difference: f64,
        /// By which part it may.
        bound: f64,
        /// Who made it again: `itself`, or `site` and a number.
        by: String,
    }
    /// A checkpoint is on stable storage.
    CheckpointSaved = "checkpoint_saved" {
        /// After this round.
        round: Round,
        /// Its folder.
        path: String,
        /// Bytes of all its files.
        bytes: u64,
        /// Time of the save.
        seconds: f64,
    }
    /// A checkpoint was not trusted on resuming, and the one before it was taken.
    CheckpointSkipped = "checkpoint_skipped" {
        /// Its folder.
        path: String,
        /// What is wrong with it.
        reason: String,
    }
    /// Where the samples stand.
    Ledger = "ledger" {
        /// Samples given to sites.
        leased: u64,
        /// Samples in a committed round.
        committed: u64,
        /// Samples given back uncommitted.
        returned: u64,
        /// Samples set aside after three leases without a commit.
        lost: u64,
    }
    /// A round closed without a site that had a part in it: what it has learnt counts later.
    Straggler = "straggler" {
        /// Which.
        round: Round,
        /// Who.
        site: SiteId,
        /// `slow compute`, `slow link` or `silent`.
        reason: String,
        /// How long the round had waited for it, seconds.
        waited_seconds: f64,
    }
    /// The batch is cut differently from the next round on.
    SharesChanged = "shares_changed" {
        /// Why, in words.
        reason: String,
        /// One for each member.
        shares: Vec<SiteShare>,
    }
    /// Rounds from this one on are of another kind, because of the links or of the model's quality.
    SettingsChanged = "settings_changed" {
        /// The first of them.
        round: Round,
        /// H: inner steps between two merges of the same parameters.
        inner_steps: u64,
        /// P: parts of the parameters that are merged in turn.
        fragments: u32,
        /// tau: inner steps that sites make while a fragment travels.
        overlap_steps: u64,
        /// How deltas are coded.
        codec: String,
        /// Its rank where it has one; else 0.
        rank: u32,
        /// Why, in words with their numbers.
        reason: String,
    }
    /// A connection was turned away.
    PeerRefused = "peer_refused" {
        /// Whence, `host:port`.
        address: String,
        /// Why, in words.
        reason: String,
    }
    /// Something a person should look at; the run goes on.
    Warning = "warning" {
        /// What happened and why.
        message: String,
        /// What mends it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        hint: Option<String>,
    }
    /// The run, or this site's part in it, ended.
    RunFinished = "run_finished" {
        /// How, in words.
        verdict: String,
        /// BLAKE3 of the final global state.
        state_hash: ContentHash,
        /// Rounds committed.
        rounds: u64,
        /// Tokens committed.
        tokens: u64,
    }
}

impl Event {
    /// What a person should be told of it, with what mends it; `None` for what belongs to a run without trouble.
    pub fn warning(&self) -> Option<(String, Option<String>)> {
        let told = |message: String| Some((message, None));
        match self {
            Self::Warning { message, hint } => Some((message.clone(), hint.clone())),
            Self::PeerRefused { address, reason } => told(format!("refused {address}: {reason}")),
            Self::DeltaRefused { round, from_site, reason } => Some((
                format!("round {round}: what came from site {from_site} was refused: {reason}"),
                Some("see what that site runs; `beringia revoke` shuts it out".to_owned()),
            )),
            Self::DeltaClipped { round, site, norm, median, factor, .. } => told(format!(
                "round {round}: the delta of site {site} counts {factor:.2e}: its norm is {norm:.3e}, the median {median:.3e}"
            )),
            Self::CheckpointSkipped { path, reason } => told(format!("checkpoint {path} was skipped: {reason}")),
            Self::Diverged { round, site, hash_expected, hash_found } => {
                let (expected, found) = (hash_expected.short(), hash_found.short());
                told(format!("site {site} diverged in round {round}: {found}, not {expected}"))
            }
            Self::MicroBatchReduced { site, from_samples, to_samples, reason } => {
                told(format!("site {site}: micro-batch reduced from {from_samples} to {to_samples} samples: {reason}"))
            }
            Self::EngineRestarted { site, round, attempt, reason } => {
                told(format!("site {site}: engine started again (attempt {attempt} after round {round}): {reason}"))
            }
            Self::Straggler { round, site, reason, waited_seconds } => told(format!(
                "round {round} closed without site {site} after {waited_seconds:.1} s ({reason}): its work counts later"
            )),
            Self::RolledBack { from, to } => Some((
                format!("no site holds round {from} any more: the run goes back to round {to}"),
                Some("save more often: lower [checkpoint] every_rounds".to_owned()),
            )),
            Self::RoundAbandoned { round } => Some((
                format!("every working site left during round {round}; its samples will be leased again"),
                Some("run the same `beringia join` again on the sites".to_owned()),
            )),
            Self::EngineHung { site, engine, call, step, seconds } => told(format!(
                "site {site}: engine {engine} did not come back from '{call}' at inner step {step} for {seconds:.0} s"
            )),
            Self::StepMismatch { site, engine, round, step, quantity, difference, bound, by } => Some((
                format!(
                    "site {site}: inner step {step} (round {round}) on {engine}, made again by {by}, gives another {quantity}: \
                     {difference:.1e} apart, at most {bound:.1e} is noise; its work since the last merge is left out"
                ),
                Some(
                    "run `beringia doctor` on that machine, and replace its device or memory if it happens again"
                        .to_owned(),
                ),
            )),
            _ => None,
        }
    }
}

/// A line that is not one of our records.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LineError {
    /// A record of a newer program: skipped without loss.
    #[error("unknown event '{event}' (version {v})")]
    Unknown {
        /// Its name.
        event: String,
        /// Its version.
        v: u32,
    },
    /// Torn or damaged.
    #[error("not an event: {reason}")]
    Malformed {
        /// What the parser met.
        reason: String,
    },
}

/// What every line of every version has.
#[derive(Deserialize)]
struct Envelope {
    v: u32,
    event: String,
}

impl Record {
    /// The record as one line, with its line end. Text inside is escaped, so that a line is always one line.
    pub fn to_line(&self) -> String {
        let mut line = serde_json::to_string(self)
            .unwrap_or_else(|error| unreachable!("every event is representable in JSON: {error}"));
        line.push('\n');
        line
    }

    /// Parses one line, with or without its line end.
    ///
    /// # Errors
    /// [`LineError::Unknown`] for a well-formed record of a newer program, [`LineError::Malformed`] otherwise.
    pub fn from_line(line: &[u8]) -> Result<Self, LineError> {
        let malformed = |error: serde_json::Error| LineError::Malformed { reason: error.to_string() };
        let envelope: Envelope = serde_json::from_slice(line).map_err(malformed)?;
        let known = Event::SCHEMA.iter().any(|(name, _)| *name == envelope.event);
        if !known || envelope.v > EVENT_VERSION {
            let event = envelope.event.chars().take(80).collect();
            return Err(LineError::Unknown { event, v: envelope.v });
        }
        serde_json::from_slice(line).map_err(malformed)
    }
}

#[cfg(test)]
#[path = "event_tests.rs"]
pub(crate) mod event_tests;
