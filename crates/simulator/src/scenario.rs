//! The run that a seed stands for: how many sites, how fast, over what links, with which settings.

use crate::options::Options;
use base::config::{Codec, Exchange, Strategy};
use base::random::Random;
use base::{ContentHash, ModelShape, RunConfig, Term};
use rounds::coordinator::DEADLINE_FACTOR;
use rounds::schedule::lookahead;
use std::sync::Arc;

/// Stream of random numbers for this.
const STREAM: u64 = 1;

/// Stream of random numbers for what came later: what the first stream gives a seed does not depend on it.
const LATER_STREAM: u64 = 5;

/// Inner steps of a round.
const STEPS_PER_ROUND: u64 = 4;

/// Samples of an inner step, over all sites.
const BATCH_SAMPLES: usize = 12;

/// Of inner steps: about one in two rounds.
const RECOMPUTE_SHARE: f64 = 0.04;

/// Of those.
const WITNESS_SHARE: f64 = 0.5;

/// Rounds of a run that is made twice.
const REPEATABLE_ROUNDS: u64 = 7;

/// Tokens of a sample.
const SEQUENCE_LENGTH: usize = 16;

/// A 3-layer Llama of 572 parameters: real shapes, and a hash of them costs a microsecond.
const MODEL: ModelShape = ModelShape {
    vocab_size: 8,
    hidden_size: 4,
    intermediate_size: 8,
    num_hidden_layers: 3,
    num_attention_heads: 2,
    num_key_value_heads: 2,
    max_position_embeddings: 32,
    rope_theta: 10_000.0,
    rms_norm_eps: 1e-5,
    tie_word_embeddings: false,
};

/// What does not change during a simulation.
#[derive(Debug, Clone)]
pub(crate) struct Scenario {
    pub(crate) config: Arc<RunConfig>,
    /// Tokens a second, by site.
    pub(crate) speeds: Vec<f64>,
    /// One way, between any two machines.
    pub(crate) latency_seconds: f64,
    /// Of a transfer between sites.
    pub(crate) bytes_per_second: f64,
    /// The phase with faults.
    pub(crate) fault_seconds: f64,
    /// Mean time from one fault to the next.
    pub(crate) fault_every_seconds: f64,
    /// Part of the steps that are made twice which come out otherwise, until faults stop.
    pub(crate) miscomputes: f64,
    /// Sites call a coordinator that is away, as they do unless `--coordinator-wait 0` is set; else they end, and are started again.
    pub(crate) sites_call: bool,
}

impl Scenario {
    pub(crate) fn draw(seed: u64, options: &Options) -> Self {
        let mut random = Random::new(seed, STREAM);
        let sites = options.sites.unwrap_or(2 + random.next_below(4) as u32).max(1);
        let mut config = RunConfig::new("simulated", MODEL);
        config.run.seed = seed;
        config.data.sequence_length = SEQUENCE_LENGTH;
        config.train.batch_samples = BATCH_SAMPLES;
        config.checkpoint.every_rounds = 1 + random.next_below(4);
        config.checkpoint.keep = 2;
        let sync = &mut config.sync;
        sync.sites = sites;
        sync.exchange = Exchange::Mesh;
        sync.recompute_share = 0.0;
        sync.outer_momentum = [0.0, 0.9][random.next_below(4).min(1) as usize];
        sync.outer_learning_rate = 0.7;
        sync.codec = [Codec::F32, Codec::F32, Codec::Bf16, Codec::Int8, Codec::E3m0][random.next_below(5) as usize];
        sync.grace_seconds = 0.5 + 3.0 * random.next_unit();
        sync.deadline_seconds = 15.0 + 20.0 * random.next_unit();
        sync.quorum = [1.0, 1.0, 0.5, 0.67][random.next_below(4) as usize];
        (sync.strategy, sync.fragments, sync.overlap_steps) = match random.next_below(4) {
            0 | 1 => (Strategy::DiLoCo, 1, 0),
            _ => {
                let fragments = 1 + random.next_below(3) as u32;
                let inner_steps = STEPS_PER_ROUND * u64::from(fragments);
                (Strategy::Streaming, fragments, random.next_below(inner_steps))
            }
        };
        sync.inner_steps = STEPS_PER_ROUND * u64::from(sync.fragments);
        let mut later = Random::new(seed, LATER_STREAM);
        let (sites_call, is_sharded) = (later.next_below(4) != 0, later.next_below(3) == 0);
        if options.sharded.unwrap_or(is_sharded) {
            sync.exchange = Exchange::Sharded;
        }
        // Half of the seeds recompute steps, half of these on machines that compute some of them wrong.
        let (recomputes, is_sound) = (later.next_below(2) == 0, later.next_below(2) == 0);
        if recomputes {
            (sync.recompute_share, sync.witness_share) = (RECOMPUTE_SHARE, WITNESS_SHARE);
        }
        let miscomputes = if is_sound || !options.faults { 0.0 } else { 0.2 };
        let fault_seconds = options.minutes.map_or(60.0 + 180.0 * random.next_unit(), |minutes| minutes * 60.0);
        let speeds: Vec<f64> = (0..sites).map(|_| 40.0 * libm::exp2(3.0 * random.next_unit())).collect();
        let mut scenario = Self {
            speeds,
            latency_seconds: 0.002 + 0.1 * random.next_unit(),
            bytes_per_second: 5e3 * libm::exp2(8.0 * random.next_unit()),
            fault_seconds,
            fault_every_seconds: 4.0 + 20.0 * random.next_unit(),
            miscomputes,
            sites_call: options.sites_call.unwrap_or(sites_call),
            config: Arc::new(config),
        };
        // Some end amid faults, most go on until they are told to stop.
        let rounds = fault_seconds / scenario.round_seconds() * (0.2 + 3.0 * random.next_unit());
        let mut config = (*scenario.config).clone();
        config.train.steps = STEPS_PER_ROUND * (rounds as u64).max(4);
        scenario.config = Arc::new(config);
        scenario
    }

    /// The same where nothing is on its way between rounds, nobody is left out, and shares do not follow measured speeds.
    pub(crate) fn repeatable(mut self) -> Self {
        let mut config = (*self.config).clone();
        config.sync.shares = self.speeds.clone();
        config.sync.quorum = 1.0;
        (config.sync.strategy, config.sync.fragments, config.sync.overlap_steps) = (Strategy::DiLoCo, 1, 0);
        config.sync.inner_steps = STEPS_PER_ROUND;
        config.sync.codec = Codec::F32;
        config.train.steps = STEPS_PER_ROUND * REPEATABLE_ROUNDS;
        self.config = Arc::new(config);
        self
    }

    /// Compute time of a round where all sites take part, by speed.
    pub(crate) fn round_seconds(&self) -> f64 {
        let tokens = (BATCH_SAMPLES * SEQUENCE_LENGTH) as f64 * STEPS_PER_ROUND as f64;
        tokens / self.speeds.iter().sum::<f64>()
    }

    /// The longest that a round may take before the coordinator drops who holds it up, where the slowest site is alone.
    pub(crate) fn deadline_seconds(&self) -> f64 {
        let slowest = self.speeds.iter().copied().fold(f64::INFINITY, f64::min);
        let tokens = (BATCH_SAMPLES * SEQUENCE_LENGTH) as f64 * STEPS_PER_ROUND as f64;
        let open = lookahead(STEPS_PER_ROUND, self.config.sync.overlap_steps) + 1;
        DEADLINE_FACTOR * tokens / slowest * open as f64 + self.config.sync.deadline_seconds
    }

    /// BLAKE3 of a site's certificate.
    pub(crate) fn fingerprint(site: usize) -> ContentHash {
        ContentHash::of(format!("certificate of site {site}").as_bytes())
    }
}

/// A term before all.
pub(crate) const NO_TERM: Term = Term(0);
