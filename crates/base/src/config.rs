//! `run.toml`: everything that decides what a run computes, in one strict file.
//!
//! Unknown keys are errors with a suggestion. The text itself travels to every site and its hash is compared,
//! so that no two sites can train by different files.

use crate::hash::ContentHash;
use crate::hint::Hint;
use crate::schema::ParameterSchema;
use crate::shape::{ModelShape, ShapeError};
use crate::transformers::TransformersSection;
use serde::{Deserialize, Serialize};

/// Longest accepted `run.toml`, bytes: a hundred times what `beringia init` writes.
pub const RUN_TOML_BYTES_MAX: usize = 256 * 1024;

/// Most fragments of a run: more than any model has layers.
pub const FRAGMENTS_MAX: u64 = 1_000;

/// One run, as `run.toml` describes it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunConfig {
    /// Name and seed.
    pub run: RunSection,
    /// Shape of the model. Of a model that `transformers` builds, only `vocab_size` and `max_position_embeddings` decide
    /// anything.
    pub model: ModelShape,
    /// A model other than Llama.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transformers: Option<TransformersSection>,
    /// How text becomes batches.
    #[serde(default)]
    pub data: DataSection,
    /// The inner loop.
    #[serde(default)]
    pub train: TrainSection,
    /// Rounds between sites.
    #[serde(default)]
    pub sync: SyncSection,
    /// Autosave.
    #[serde(default)]
    pub checkpoint: CheckpointSection,
    /// Validation and samples while training.
    #[serde(default)]
    pub evaluate: EvaluateSection,
}

/// `[run]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunSection {
    /// Letters, digits, `-` and `_`.
    pub name: String,
    /// Seeds the initial weights and the order of the data.
    #[serde(default = "default_seed")]
    pub seed: u64,
}

fn default_seed() -> u64 {
    1
}

/// `[data]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DataSection {
    /// Tokens in one training sample (the context length).
    pub sequence_length: usize,
}

impl Default for DataSection {
    fn default() -> Self {
        Self { sequence_length: 256 }
    }
}

/// The inner optimiser.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum InnerOptimizer {
    /// `torch.optim.AdamW`.
    AdamW,
    /// Plain stochastic gradient descent, no momentum: for proofs, not for training.
    Sgd,
}

/// `[train]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainSection {
    /// Samples in one inner step, over all sites together.
    pub batch_samples: usize,
    /// Samples an engine computes at once; more are accumulated.
    pub micro_batch_samples: usize,
    /// Inner steps of the whole run; the learning-rate schedule ends there.
    pub steps: u64,
    /// `adamw` or `sgd`.
    pub optimizer: InnerOptimizer,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Steps of linear warm-up from 0.
    pub warmup_steps: u64,
    /// Learning rate at the end of the cosine, as a fraction of the peak.
    pub learning_rate_final_fraction: f64,
    /// AdamW's first moment decay.
    pub beta1: f64,
    /// AdamW's second moment decay.
    pub beta2: f64,
    /// AdamW's epsilon.
    pub epsilon: f64,
    /// AdamW's decoupled weight decay, on matrices only (norm weights are not decayed).
    pub weight_decay: f64,
    /// Global gradient norm above which gradients are scaled down; 0 turns clipping off.
    pub gradient_clip_norm: f64,
}

impl Default for TrainSection {
    fn default() -> Self {
        Self {
            batch_samples: 8,
            micro_batch_samples: 8,
            steps: 1_000,
            optimizer: InnerOptimizer::AdamW,
            learning_rate: 1e-3,
            warmup_steps: 50,
            learning_rate_final_fraction: 0.1,
            beta1: 0.9,
            beta2: 0.95,
            epsilon: 1e-8,
            weight_decay: 0.1,
            gradient_clip_norm: 1.0,
        }
    }
}

impl TrainSection {
    /// Learning rate of inner step `step` (the first is 0): linear warm-up, then a cosine down to
    /// `learning_rate_final_fraction` of the peak at `steps`.
    pub fn learning_rate_at(&self, step: u64) -> f64 {
        if step < self.warmup_steps {
            return self.learning_rate * (step + 1) as f64 / self.warmup_steps as f64;
        }
        let span = self.steps.saturating_sub(self.warmup_steps).max(1);
        let progress = ((step - self.warmup_steps) as f64 / span as f64).min(1.0);
        let floor = self.learning_rate_final_fraction;
        self.learning_rate * (floor + (1.0 - floor) * 0.5 * (1.0 + libm::cos(std::f64::consts::PI * progress)))
    }
}

/// How sites are kept together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Strategy {
    /// Gradients are merged at every inner step: exactly data parallelism.
    Synchronous,
    /// `inner_steps` alone, then one outer step on the merged deltas (arXiv 2311.08105).
    DiLoCo,
    /// The same for each fragment in turn, coded, while the sites go on training (arXiv 2501.18512).
    Streaming,
}

impl Strategy {
    /// As `run.toml` has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Synchronous => "synchronous",
            Self::DiLoCo => "diloco",
            Self::Streaming => "streaming",
        }
    }
}

/// How a fragment's values travel; `formats` says what each does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Codec {
    /// As they are.
    F32,
    /// Rounded to 16 bits.
    Bf16,
    /// 8-bit integers in blocks with a scale.
    Int8,
    /// 4 bits, sign and exponent only, in blocks with a scale.
    E3m0,
    /// 4 bits in blocks of 32 with a shared exponent (OCP MX).
    Mxfp4,
    /// Each matrix as a product of two thin factors of `rank`, in 4 bits.
    LowRank,
    /// The 96 largest of each 4,096, in 2 bits each.
    Sparse96,
    /// The 64 largest of each 4,096, in 2 bits each (arXiv 2508.15706).
    Sparse,
}

impl Codec {
    /// As `run.toml` has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
            Self::E3m0 => "e3m0",
            Self::Mxfp4 => "mxfp4",
            Self::LowRank => "lowrank",
            Self::Sparse96 => "sparse96",
            Self::Sparse => "sparse",
        }
    }
}

/// How deltas get from site to site and are merged. The bits are the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Exchange {
    /// The one of the others that keeps the busiest link for a shorter time.
    Auto,
    /// Every site fetches every delta and merges all of it.
    Mesh,
    /// Every site merges one part of all deltas and gives that to the others, where the codec can be cut and all sites can be dialled.
    Sharded,
}

/// How the deltas of a round become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MergeRule {
    /// Their mean, weighted by tokens.
    Mean,
    /// The same, value by value, without the largest and the smallest: for sites that one does not fully trust.
    TrimmedMean,
}

/// `[sync]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SyncSection {
    /// `synchronous`, `diloco` or `streaming`.
    pub strategy: Strategy,
    /// H: inner steps between two outer steps of the same parameters. `synchronous` always takes 1.
    pub inner_steps: u64,
    /// P: parts of the parameters that are synchronised in turn, every H / P inner steps one. `streaming` only.
    pub fragments: u32,
    /// Inner steps that a site makes while a fragment travels; less than H. `streaming` only.
    pub overlap_steps: u64,
    /// How much of a fragment's local parameters the global ones replace when they arrive: 1 all, 0.5 half.
    pub mixing: f64,
    /// Whether what a site has learnt while a fragment travelled stays in its local parameters.
    pub keep_overlapped: bool,
    /// How deltas are coded: `f32`, `bf16`, `int8`, `e3m0`, `mxfp4`, `lowrank`, `sparse96` or `sparse`.
    pub codec: Codec,
    /// Columns of a factor, where the codec is `lowrank`.
    pub rank: u32,
    /// Whether H, fragments, overlap, codec and rank follow the measured links from what is set here. `streaming` only.
    pub adaptive: bool,
    /// How deltas get from site to site: `auto`, `mesh` or `sharded`.
    pub exchange: Exchange,
    /// How deltas become one: `mean` or `trimmed-mean`.
    pub merge: MergeRule,
    /// A delta whose norm is more than so many times the median of the round's contributors counts as one of that norm; 0 turns that
    /// off. `mean` only, and of three contributors or more.
    pub clip_norm: f64,
    /// Whether what coding lost stays in the site's own parameters, so that its next delta holds it. Otherwise the site takes over
    /// what was merged, and adds `error_feedback` of what was lost to its next delta.
    pub keep_residual: bool,
    /// Part of what coding lost that is added to the next delta, where it is not kept.
    pub error_feedback: f64,
    /// Step size of the outer Nesterov momentum. Published for long runs: 0.7 (arXiv 2311.08105).
    pub outer_learning_rate: f64,
    /// Decay of the outer Nesterov momentum. Published for long runs: 0.9. Below some hundred rounds it costs more than it
    /// gives (docs/benchmarks.md), so the default is plain averaging: step size 1, decay 0.
    pub outer_momentum: f64,
    /// Whether AdamW's steps at a site are as long as those of the batch of all sites: its second moment is taken less the noise that
    /// the site's share of the batch has more. Not for `synchronous`, which steps on the joint gradient.
    pub joint_second_moment: bool,
    /// Sites to wait for before the first round.
    pub sites: u32,
    /// Fixed shares of the batch by site id, for repeatable runs; empty means by measured speed.
    pub shares: Vec<f64>,
    /// Part of the working sites whose deltas are enough to close a round, once the grace window has passed; 1 waits for all.
    pub quorum: f64,
    /// Longest grace window, seconds: what a round waits for late sites once a quorum has delivered. It adapts below that.
    pub grace_seconds: f64,
    /// Longest a round may take beyond its expected time before a silent site is dropped, seconds.
    pub deadline_seconds: f64,
    /// Part of the inner steps that are made twice, to see whether a site computes the same again; 0 none. At most one in a round.
    pub recompute_share: f64,
    /// Part of those that another site with the same engine recomputes as well; 0 none.
    pub witness_share: f64,
}

impl Default for SyncSection {
    fn default() -> Self {
        Self {
            strategy: Strategy::DiLoCo,
            inner_steps: 20,
            fragments: 1,
            overlap_steps: 0,
            mixing: 1.0,
            keep_overlapped: true,
            codec: Codec::F32,
            rank: 10,
            adaptive: false,
            exchange: Exchange::Auto,
            merge: MergeRule::Mean,
            clip_norm: 5.0,
            keep_residual: true,
            error_feedback: 1.0,
            outer_learning_rate: 1.0,
            outer_momentum: 0.0,
            joint_second_moment: true,
            sites: 1,
            shares: Vec::new(),
            quorum: 1.0,
            grace_seconds: 20.0,
            deadline_seconds: 60.0,
            recompute_share: 0.005,
            witness_share: 0.1,
        }
    }
}

/// `[checkpoint]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CheckpointSection {
    /// Rounds between two autosaves.
    pub every_rounds: u64,
    /// Checkpoints kept; at least 2, so that there is one to fall back to.
    pub keep: usize,
}

impl Default for CheckpointSection {
    fn default() -> Self {
        Self { every_rounds: 5, keep: 3 }
    }
}

/// `[evaluate]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EvaluateSection {
    /// Rounds between two validations.
    pub every_rounds: u64,
    /// Most validation samples (of `sequence_length` tokens) used each time.
    pub samples_max: usize,
    /// Tokens of the text sampled after each validation; 0 turns samples off.
    pub sample_tokens: usize,
}

impl Default for EvaluateSection {
    fn default() -> Self {
        Self { every_rounds: 5, samples_max: 64, sample_tokens: 48 }
    }
}

/// Why a `run.toml` is refused.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// A key that nothing reads.
    #[error("run.toml: unknown key '{key}' in {section}")]
    UnknownKey {
        /// The key as written.
        key: String,
        /// `[train]`, or `the top level`.
        section: String,
        /// The nearest known key, where one is near.
        near: Option<String>,
    },
    /// Not TOML, or a value of the wrong type.
    #[error("run.toml: {0}")]
    Syntax(String),
    /// A value out of its range.
    #[error("run.toml: {field}: {reason}")]
    Value {
        /// `[section] key`
        field: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A model that cannot exist.
    #[error("run.toml: {0}")]
    Shape(#[from] ShapeError),
}

impl Hint for ConfigError {
    fn hint(&self) -> Option<String> {
        Some(match self {
            Self::UnknownKey { near: Some(near), .. } => format!("did you mean '{near}'?"),
            Self::UnknownKey { section, .. } => {
                format!("remove it; `beringia init --help` lists the keys of {section}")
            }
            Self::Syntax(_) => "correct the line named above; `beringia init` writes a complete example".to_owned(),
            Self::Value { field, .. } => format!("set {field} to a value in that range"),
            Self::Shape(error) => format!("change {} in [model]", error.field),
        })
    }
}

impl RunConfig {
    /// A run of that name with default settings.
    pub fn new(name: &str, model: ModelShape) -> Self {
        Self {
            run: RunSection { name: name.to_owned(), seed: default_seed() },
            model,
            transformers: None,
            data: DataSection::default(),
            train: TrainSection::default(),
            sync: SyncSection::default(),
            checkpoint: CheckpointSection::default(),
            evaluate: EvaluateSection::default(),
        }
    }

    /// Parses and checks a `run.toml`.
    ///
    /// # Errors
    /// Unknown keys, wrong types, values out of range.
    pub fn from_toml(text: &str) -> Result<Self, ConfigError> {
        if text.len() > RUN_TOML_BYTES_MAX {
            return Err(ConfigError::Syntax(format!("{} bytes, at most {RUN_TOML_BYTES_MAX} are read", text.len())));
        }
        let table: toml::Table = toml::from_str(text).map_err(|error| ConfigError::Syntax(error.to_string()))?;
        refuse_unknown_keys(&table)?;
        let config: Self = toml::from_str(text).map_err(|error| ConfigError::Syntax(error.to_string()))?;
        config.validate()?;
        Ok(config)
    }

    /// The same settings as a `run.toml` without comments.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).unwrap_or_else(|error| unreachable!("every field of RunConfig is representable: {error}"))
    }

    /// Names, shapes and canonical order of the model's parameters.
    pub fn schema(&self) -> ParameterSchema {
        match &self.transformers {
            None => ParameterSchema::llama(&self.model),
            Some(section) => {
                section.schema().unwrap_or_else(|reason| panic!("[transformers] was not validated: {reason}"))
            }
        }
    }

    /// What two machines must have in common to train the same model: BLAKE3 of `[run]`, `[model]` and `[transformers]`.
    pub fn model_hash(&self) -> ContentHash {
        let (run, transformers) = (self.run.clone(), self.transformers.clone());
        let fixed = Self { run, transformers, ..Self::new("x", self.model.clone()) };
        ContentHash::of(fixed.to_toml().as_bytes())
    }

    /// Inner steps in one round: H / P, or 1 where gradients are merged each step.
    pub fn steps_per_round(&self) -> u64 {
        match self.sync.strategy {
            Strategy::Synchronous => 1,
            Strategy::DiLoCo => self.sync.inner_steps,
            Strategy::Streaming => self.sync.inner_steps / u64::from(self.sync.fragments),
        }
    }

    /// Rounds after which every inner step of the run is part of every parameter: those in which sites train, and one more for
    /// each fragment but the last.
    pub fn rounds_total(&self) -> u64 {
        self.train.steps.div_ceil(self.steps_per_round()) + u64::from(self.sync.fragments) - 1
    }

    /// Checks ranges that the types cannot.
    pub fn validate(&self) -> Result<(), ConfigError> {
        match &self.transformers {
            None => self.model.validate()?,
            Some(section) => {
                let refuse = |reason| ConfigError::Value { field: "[transformers] parameters".to_owned(), reason };
                section.schema().map_err(refuse)?;
                self.model.validate_text_sizes()?;
            }
        }
        let check = |holds: bool, field: &str, reason: String| {
            if holds { Ok(()) } else { Err(ConfigError::Value { field: field.to_owned(), reason }) }
        };
        let name = &self.run.name;
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        check(
            !name.is_empty() && name.len() <= 64 && name.chars().all(plain),
            "[run] name",
            format!("'{name}' must be 1 to 64 letters, digits, '-' or '_'"),
        )?;
        let counts = [
            ("[data] sequence_length", self.data.sequence_length as u64, 1, self.model.max_position_embeddings as u64),
            ("[train] batch_samples", self.train.batch_samples as u64, 1, 1 << 24),
            ("[train] micro_batch_samples", self.train.micro_batch_samples as u64, 1, 1 << 20),
            ("[train] steps", self.train.steps, 1, 1 << 40),
            ("[train] warmup_steps", self.train.warmup_steps, 0, 1 << 40),
            ("[sync] inner_steps", self.sync.inner_steps, 1, 1 << 20),
            ("[sync] sites", u64::from(self.sync.sites), 1, 10_000),
            ("[sync] fragments", u64::from(self.sync.fragments), 1, FRAGMENTS_MAX),
            ("[sync] rank", u64::from(self.sync.rank), 1, 4_096),
            ("[checkpoint] every_rounds", self.checkpoint.every_rounds, 1, 1 << 40),
            ("[checkpoint] keep", self.checkpoint.keep as u64, 2, 1 << 20),
            ("[evaluate] every_rounds", self.evaluate.every_rounds, 1, 1 << 40),
            ("[evaluate] samples_max", self.evaluate.samples_max as u64, 1, 1 << 24),
        ];
        for (field, value, minimum, maximum) in counts {
            check((minimum..=maximum).contains(&value), field, format!("{value} is outside {minimum}..={maximum}"))?;
        }
        let reals = [
            ("[train] learning_rate", self.train.learning_rate, 0.0, 1e3),
            ("[train] learning_rate_final_fraction", self.train.learning_rate_final_fraction, 0.0, 1.0),
            ("[train] beta1", self.train.beta1, 0.0, 0.999_999),
            ("[train] beta2", self.train.beta2, 0.0, 0.999_999_9),
            ("[train] epsilon", self.train.epsilon, 0.0, 1.0),
            ("[train] weight_decay", self.train.weight_decay, 0.0, 10.0),
            ("[train] gradient_clip_norm", self.train.gradient_clip_norm, 0.0, 1e9),
            ("[sync] outer_learning_rate", self.sync.outer_learning_rate, 0.0, 10.0),
            ("[sync] outer_momentum", self.sync.outer_momentum, 0.0, 0.999_999),
            ("[sync] clip_norm", self.sync.clip_norm, 0.0, 1e6),
            ("[sync] mixing", self.sync.mixing, 0.0, 1.0),
            ("[sync] error_feedback", self.sync.error_feedback, 0.0, 1.0),
            ("[sync] quorum", self.sync.quorum, 0.0, 1.0),
            ("[sync] grace_seconds", self.sync.grace_seconds, 0.0, 1e6),
            ("[sync] deadline_seconds", self.sync.deadline_seconds, 0.1, 1e6),
            ("[sync] recompute_share", self.sync.recompute_share, 0.0, 1.0),
            ("[sync] witness_share", self.sync.witness_share, 0.0, 1.0),
        ];
        for (field, value, minimum, maximum) in reals {
            // NaN is in no range.
            check((minimum..=maximum).contains(&value), field, format!("{value} is outside {minimum}..={maximum}"))?;
        }
        let positive = |share: &f64| share.is_finite() && *share > 0.0;
        check(self.sync.shares.iter().all(positive), "[sync] shares", "every share must be positive".to_owned())?;
        self.validate_sync()
    }

    /// What the keys of `[sync]` must be to one another.
    fn validate_sync(&self) -> Result<(), ConfigError> {
        let SyncSection { strategy, inner_steps, fragments, overlap_steps, adaptive, .. } = self.sync;
        let refuse = |field: &str, reason: String| Err(ConfigError::Value { field: format!("[sync] {field}"), reason });
        let clip_norm = self.sync.clip_norm;
        if clip_norm > 0.0 && clip_norm < 1.0 {
            let reason = format!("{clip_norm} would clip half of all deltas: take 0 for none, or 1 and more");
            return refuse("clip_norm", reason);
        }
        if (self.sync.exchange, self.sync.codec, adaptive) == (Exchange::Sharded, Codec::LowRank, false) {
            return refuse(
                "exchange",
                "sharded needs a codec that can be cut by values, and lowrank cannot".to_owned(),
            );
        }
        if (self.sync.exchange, self.sync.merge) == (Exchange::Sharded, MergeRule::TrimmedMean) {
            let reason =
                "sharded lets one site merge a part for all, who would have to trust it: trimmed-mean needs mesh";
            return refuse("exchange", reason.to_owned());
        }
        if strategy != Strategy::Streaming {
            let name = strategy.name();
            return match () {
                () if fragments != 1 => {
                    refuse("fragments", format!("{fragments} needs strategy streaming, not {name}"))
                }
                () if overlap_steps != 0 => {
                    refuse("overlap_steps", format!("{overlap_steps} needs strategy streaming, not {name}"))
                }
                () if adaptive => refuse("adaptive", format!("true needs strategy streaming, not {name}")),
                () => Ok(()),
            };
        }
        if !inner_steps.is_multiple_of(u64::from(fragments)) {
            let reason =
                format!("{fragments} does not divide inner_steps = {inner_steps}: fragments start H / P steps apart");
            return refuse("fragments", reason);
        }
        if overlap_steps >= inner_steps {
            let reason =
                format!("{overlap_steps} is not less than inner_steps = {inner_steps}: a fragment is in flight once");
            return refuse("overlap_steps", reason);
        }
        Ok(())
    }
}

/// serde reports an unknown key among all those expected; a person wants the nearest one.
fn refuse_unknown_keys(table: &toml::Table) -> Result<(), ConfigError> {
    let shape = ModelShape {
        vocab_size: 1,
        hidden_size: 2,
        intermediate_size: 1,
        num_hidden_layers: 1,
        num_attention_heads: 1,
        num_key_value_heads: 1,
        max_position_embeddings: 1,
        rope_theta: 1.0,
        rms_norm_eps: 1e-5,
        tie_word_embeddings: false,
    };
    let transformers = Some(TransformersSection { config: String::new(), parameters: Vec::new() });
    let complete = RunConfig { transformers, ..RunConfig::new("known-keys", shape) };
    let known: toml::Table = toml::from_str(&complete.to_toml())
        .unwrap_or_else(|error| unreachable!("our own serialisation parses: {error}"));
    for (section, value) in table {
        let Some(known_section) = known.get(section).and_then(toml::Value::as_table) else {
            let near = nearest(section, known.keys());
            return Err(ConfigError::UnknownKey { key: section.clone(), section: "the top level".to_owned(), near });
        };
        for key in value.as_table().into_iter().flat_map(toml::Table::keys) {
            if !known_section.contains_key(key) {
                let near = nearest(key, known_section.keys());
                return Err(ConfigError::UnknownKey { key: key.clone(), section: format!("[{section}]"), near });
            }
        }
    }
    Ok(())
}

fn nearest<'a>(word: &str, known: impl Iterator<Item = &'a String>) -> Option<String> {
    known
        .map(|candidate| (strsim::jaro_winkler(word, candidate), candidate))
        .filter(|(similarity, _)| *similarity > 0.7)
        .max_by(|left, right| left.0.total_cmp(&right.0))
        .map(|(_, candidate)| candidate.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> RunConfig {
        let shape = ModelShape {
            vocab_size: 512,
            hidden_size: 64,
            intermediate_size: 128,
            num_hidden_layers: 2,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            max_position_embeddings: 256,
            rope_theta: 10_000.0,
            rms_norm_eps: 1e-5,
            tie_word_embeddings: true,
        };
        RunConfig::new("test", shape)
    }

    #[test]
    fn round_trip() {
        assert_eq!(RunConfig::from_toml(&config().to_toml()).unwrap(), config());
    }

    #[test]
    fn unknown_key_suggests_the_near_one() {
        let text = config().to_toml().replace("\nlearning_rate =", "\nlearing_rate =");
        let error = RunConfig::from_toml(&text).unwrap_err();
        assert_eq!(error.to_string(), "run.toml: unknown key 'learing_rate' in [train]");
        assert_eq!(error.hint().unwrap(), "did you mean 'learning_rate'?");
        let error = RunConfig::from_toml(&config().to_toml().replace("[sync]", "[synk]")).unwrap_err();
        assert_eq!(error.hint().unwrap(), "did you mean 'sync'?");
    }

    #[test]
    fn values_out_of_range_are_refused() {
        let refuse = |change: &dyn Fn(&mut RunConfig)| {
            let mut changed = config();
            change(&mut changed);
            RunConfig::from_toml(&changed.to_toml()).unwrap_err()
        };
        refuse(&|c| c.train.learning_rate = f64::NAN);
        refuse(&|c| c.train.batch_samples = 0);
        refuse(&|c| c.run.name = "../evil".to_owned());
        refuse(&|c| c.sync.shares = vec![1.0, -1.0]);
        refuse(&|c| c.model.num_key_value_heads = 3);
        refuse(&|c| c.data.sequence_length = 257);
        refuse(&|c| c.sync.clip_norm = 0.5);
        refuse(&|c| c.sync.clip_norm = f64::INFINITY);
        refuse(&|c| c.sync.fragments = 2);
        refuse(&|c| c.sync.overlap_steps = 1);
        refuse(&|c| c.sync.adaptive = true);
        refuse(&|c| (c.sync.exchange, c.sync.codec) = (Exchange::Sharded, Codec::LowRank));
        let streaming = |fragments, overlap_steps| {
            move |c: &mut RunConfig| {
                (c.sync.strategy, c.sync.inner_steps) = (Strategy::Streaming, 20);
                (c.sync.fragments, c.sync.overlap_steps) = (fragments, overlap_steps);
            }
        };
        refuse(&streaming(3, 0));
        refuse(&streaming(0, 0));
        refuse(&streaming(4, 20));
        let mut changed = config();
        streaming(4, 19)(&mut changed);
        changed.validate().unwrap();
        assert_eq!((changed.steps_per_round(), changed.rounds_total()), (5, 203));
    }

    #[test]
    fn schedule_warms_up_peaks_and_ends() {
        let train = TrainSection { steps: 100, warmup_steps: 10, learning_rate: 1.0, ..TrainSection::default() };
        assert!((train.learning_rate_at(0) - 0.1).abs() < 1e-12);
        assert!((train.learning_rate_at(9) - 1.0).abs() < 1e-12);
        assert!((train.learning_rate_at(10) - 1.0).abs() < 1e-12);
        assert!((train.learning_rate_at(100) - 0.1).abs() < 1e-12);
        assert!((train.learning_rate_at(1_000) - 0.1).abs() < 1e-12);
    }
}
