//! What the tests of a site's engine need: an engine that fails when it is told to, a small run, and a coordinator.
//!
//! The coordinator's decisions and the network are those that ship; only its shell is replaced, because the crate that
//! holds it lies beside this one.

#![allow(clippy::unwrap_used, reason = "a test's helper may panic")]

mod coordinator;
mod engine;

pub(crate) use coordinator::{Coordinated, Pulses, coordinate, coordinate_with};
pub(crate) use engine::{Fault, Method, TestEngine, Trouble};

use base::{ModelShape, RunConfig};
use data::{Corpus, PrepareOptions, TokenizerSource};
use site::{RunFolder, TrainingState};
use std::process::Command;
use tempfile::TempDir;

/// A run as `beringia init` makes it, in a folder that is removed afterwards.
pub(crate) struct Run {
    place: TempDir,
    pub(crate) folder: RunFolder,
    pub(crate) config: RunConfig,
}

impl Run {
    pub(crate) fn new(configure: impl FnOnce(&mut RunConfig)) -> Self {
        let place = tempfile::tempdir().unwrap();
        let texts = place.path().join("texts");
        std::fs::create_dir(&texts).unwrap();
        for document in 0..8 {
            let line = format!("geese number {document} walk over the ice of the bridge and call. ");
            std::fs::write(texts.join(format!("{document}.txt")), line.repeat(40)).unwrap();
        }
        let folder = RunFolder::new(place.path().join("run"));
        std::fs::create_dir(folder.root()).unwrap();
        let (corpus, tokenizer) = (Corpus::folder(&texts).unwrap(), TokenizerSource::Train { vocabulary_size: 280 });
        let prepared =
            data::prepare(&corpus, &tokenizer, &folder.data(), &PrepareOptions::default(), &mut |_| {}).unwrap();
        let mut config = settings(prepared.manifest.vocabulary_size as usize);
        configure(&mut config);
        config.validate().unwrap();
        std::fs::write(folder.run_file(), config.to_toml()).unwrap();
        let run = Self { place, folder, config };
        let (state, schema) = (run.initial_state(), TestEngine::schema_of(&run.config));
        state.save(&run.folder.checkpoints(), base::Round(0), &schema, 2).unwrap();
        run
    }

    pub(crate) fn initial_state(&self) -> TrainingState {
        let initial = engine_initial(&self.config);
        TrainingState::initial(&self.config, &initial).unwrap()
    }

    /// The folder of a site, which holds all of the run already.
    pub(crate) fn site_folder(&self, name: &str) -> RunFolder {
        let folder = self.place.path().join(name);
        let copied = Command::new("cp").arg("-r").arg(self.folder.root()).arg(&folder).status().unwrap();
        assert!(copied.success());
        RunFolder::new(folder)
    }
}

fn engine_initial(config: &RunConfig) -> base::NamedTensors {
    ::engine::initial_parameters(&config.model, config.run.seed)
}

/// Rounds of 4 steps of 8 samples, three of them, shared equally by two sites.
fn settings(vocab_size: usize) -> RunConfig {
    let shape = ModelShape {
        vocab_size,
        hidden_size: 8,
        intermediate_size: 8,
        num_hidden_layers: 1,
        num_attention_heads: 2,
        num_key_value_heads: 1,
        max_position_embeddings: 16,
        rope_theta: 10_000.0,
        rms_norm_eps: 1e-5,
        tie_word_embeddings: true,
    };
    let mut config = RunConfig::new("engines", shape);
    config.data.sequence_length = 16;
    config.train.batch_samples = 8;
    config.train.micro_batch_samples = 8;
    config.train.warmup_steps = 2;
    config.train.steps = 12;
    config.sync.sites = 2;
    config.sync.shares = vec![1.0, 1.0];
    config.sync.inner_steps = 4;
    // Calls of the engine are counted.
    config.sync.recompute_share = 0.0;
    config.evaluate.samples_max = 4;
    config.evaluate.sample_tokens = 0;
    config.evaluate.every_rounds = 2;
    config.checkpoint.every_rounds = 1;
    config
}
