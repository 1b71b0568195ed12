//! Everything a site must keep to go on with the same bits: global parameters, outer and inner optimiser, and the
//! place in the run.

use base::{ContentHash, NamedTensors, ParameterSchema, RunConfig, SiteId, TensorMismatch};
use engine::EngineState;
use rounds::plan::state_trailer;
use rounds::{Commit, Ledger, OuterOptimizer};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::{Arc, RwLock};

/// File of the global parameters in a checkpoint.
pub const MODEL_STEM: &str = "model";
/// Files of the inner optimiser in a checkpoint.
pub const INNER_STEMS: [&str; 2] = ["inner_first_moment", "inner_second_moment"];
/// Prefix of the files of the outer optimiser's buffers.
pub const OUTER_PREFIX: &str = "outer_";

/// Who trained the state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// Nobody yet: `beringia init` made it.
    Initial,
    /// `beringia train`: checkpoints are numbered by inner steps.
    Alone,
    /// `beringia join`: checkpoints are numbered by rounds.
    Sites,
}

/// `state.json` of a checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedState {
    /// Who trained it.
    pub mode: Mode,
    /// The commit that made the global state: term, round, cursor.
    pub commit: Commit,
    /// Hash of the global state (invariant I1).
    pub state_hash: ContentHash,
    /// Inner steps of the run so far.
    pub step: u64,
    /// Tokens of the run so far.
    pub tokens: u64,
    /// AdamW steps of this site's inner optimiser.
    pub optimizer_steps: u64,
    /// Seed of the sample order and of sampling: with `commit.cursor` the whole random state.
    pub seed: u64,
    /// Sample accounting; at a site the coordinator keeps it.
    pub ledger: Option<Ledger>,
    /// This site's id.
    pub site: Option<SiteId>,
}

/// Global state of a run, the same bits at every site after each commit.
#[derive(Debug, Clone, PartialEq)]
pub struct GlobalState {
    /// Flat parameters in canonical order.
    pub parameters: Vec<f32>,
    /// Outer optimiser with its buffers.
    pub outer: OuterOptimizer,
    /// The commit that made it.
    pub commit: Commit,
}

/// Global state, shared between the thread that merges and those who read or fetch it. Only that thread writes, and only while it
/// merges: an engine that hangs holds nobody up.
pub type SharedState = Arc<RwLock<GlobalState>>;

impl GlobalState {
    /// Number of bytes of [`GlobalState::encode`].
    pub fn encoded_bytes(&self) -> u64 {
        let buffers = 1 + self.outer.buffers().len();
        (buffers * self.parameters.len() * size_of::<f32>() + 24) as u64
    }

    /// Parameters and outer buffers as little-endian f32, then term, round and cursor as little-endian u64: what a newcomer
    /// fetches. Its BLAKE3 is the state hash of invariant I1.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.encoded_bytes() as usize);
        self.for_each_part(|part| bytes.extend_from_slice(part));
        bytes
    }

    /// BLAKE3 of [`GlobalState::encode`], without holding a copy of it.
    pub fn hash(&self) -> ContentHash {
        let mut hasher = ContentHash::hasher();
        self.for_each_part(|part| {
            hasher.update(part);
        });
        ContentHash::finish(&hasher)
    }

    fn for_each_part(&self, mut part: impl FnMut(&[u8])) {
        for values in std::iter::once(&self.parameters).chain(self.outer.buffers()) {
            little_endian(values, &mut part);
        }
        part(&state_trailer(self.commit.term, self.commit.round, self.commit.cursor));
    }

    /// Takes over the bytes of [`GlobalState::encode`], whose hash has been checked, as the state after `commit`.
    ///
    /// Gives false, changing nothing, where the length is another model's.
    #[must_use]
    pub fn decode(&mut self, commit: Commit, bytes: &[u8]) -> bool {
        if bytes.len() as u64 != self.encoded_bytes() {
            return false;
        }
        let elements = self.parameters.len();
        let mut values = bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
        self.parameters.iter_mut().zip(values.by_ref().take(elements)).for_each(|(to, from)| *to = from);
        for buffer in self.outer.buffers_mut() {
            buffer.iter_mut().zip(values.by_ref().take(elements)).for_each(|(to, from)| *to = from);
        }
        self.commit = commit;
        true
    }
}

/// Gives `part` the bytes of `values`, in pieces.
fn little_endian(values: &[f32], part: &mut impl FnMut(&[u8])) {
    if cfg!(target_endian = "little") {
        part(bytemuck::cast_slice(values));
        return;
    }
    // 64 KiB at a time stays in the second-level cache.
    const PART_ELEMENTS: usize = 16 * 1024;
    for values in values.chunks(PART_ELEMENTS) {
        part(&values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>());
    }
}

/// All that a checkpoint holds.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainingState {
    /// The same at all sites.
    pub global: GlobalState,
    /// This site's inner optimiser; empty moments where it has not stepped yet.
    pub inner: EngineState,
    /// The place in the run.
    pub saved: SavedState,
}

impl TrainingState {
    /// The state of round 0 from initial parameters.
    ///
    /// # Errors
    /// Tensors of another model.
    pub fn initial(config: &RunConfig, parameters: &NamedTensors) -> Result<Self, TensorMismatch> {
        let schema = config.schema();
        let commit = Commit::initial();
        let outer = OuterOptimizer::new(config, &schema);
        let global = GlobalState { parameters: schema.flatten(parameters)?, outer, commit: commit.clone() };
        let saved = SavedState {
            mode: Mode::Initial,
            commit,
            state_hash: global.hash(),
            step: 0,
            tokens: 0,
            optimizer_steps: 0,
            seed: config.run.seed,
            ledger: None,
            site: None,
        };
        let inner = EngineState { parameters: parameters.clone(), ..EngineState::default() };
        Ok(Self { global, inner, saved })
    }

    /// Puts a checkpoint's parts together.
    ///
    /// # Errors
    /// Tensors of another model, or a global state whose hash is not the one saved with it.
    pub fn from_checkpoint(
        config: &RunConfig,
        schema: &ParameterSchema,
        saved: SavedState,
        tensors: &BTreeMap<String, NamedTensors>,
    ) -> Result<Self, TensorMismatch> {
        let missing = |stem: &str| TensorMismatch { name: stem.to_owned(), reason: "is missing".to_owned() };
        let parameters = tensors.get(MODEL_STEM).ok_or_else(|| missing(MODEL_STEM))?;
        let mut outer = OuterOptimizer::new(config, schema);
        let names = outer.buffer_names();
        for (name, buffer) in names.iter().zip(outer.buffers_mut()) {
            // A run that was trained alone or has just begun has no outer buffers: they are zero.
            if let Some(tensors) = tensors.get(&format!("{OUTER_PREFIX}{name}")) {
                *buffer = schema.flatten(tensors)?;
            }
        }
        let global = GlobalState { parameters: schema.flatten(parameters)?, outer, commit: saved.commit.clone() };
        let found = global.hash();
        if found != saved.state_hash {
            let (expected, name) = (saved.state_hash, "global state".to_owned());
            let reason = format!("BLAKE3 {found}, saved as {expected}; was [sync] strategy changed in mid-run?");
            return Err(TensorMismatch { name, reason });
        }
        let moments = |stem: &str| tensors.get(stem).cloned().unwrap_or_default();
        let inner = EngineState {
            parameters: parameters.clone(),
            first_moments: moments(INNER_STEMS[0]),
            second_moments: moments(INNER_STEMS[1]),
            optimizer_steps: saved.optimizer_steps,
        };
        Ok(Self { global, inner, saved })
    }

    /// Writes the checkpoint number `round` into `root`.
    ///
    /// # Errors
    /// The disk is full or fails; earlier checkpoints are as they were.
    pub fn save(
        &self,
        root: &std::path::Path,
        round: base::Round,
        schema: &ParameterSchema,
        keep: usize,
    ) -> Result<checkpoint::Saved, checkpoint::SaveError> {
        let model = schema.unflatten(&self.global.parameters);
        let outer: Vec<(String, NamedTensors)> = self
            .global
            .outer
            .buffer_names()
            .iter()
            .zip(self.global.outer.buffers())
            .filter(|(_, buffer)| buffer.iter().any(|value| *value != 0.0))
            .map(|(name, buffer)| (format!("{OUTER_PREFIX}{name}"), schema.unflatten(buffer)))
            .collect();
        let mut tensors = vec![(MODEL_STEM, &model)];
        tensors.extend(outer.iter().map(|(stem, tensors)| (stem.as_str(), tensors)));
        for (stem, moments) in INNER_STEMS.into_iter().zip([&self.inner.first_moments, &self.inner.second_moments]) {
            if !moments.is_empty() {
                tensors.push((stem, moments));
            }
        }
        checkpoint::save(root, round, &tensors, &self.saved, keep)
    }
}
