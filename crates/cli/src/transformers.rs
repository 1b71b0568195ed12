//! Models that transformers builds from a `config.json`: from that file to a run's first state.
//!
//! PyTorch is asked for the tensors' names, shapes and initial values; from then on a run needs it on its sites only.

use crate::failure::Failure;
use base::transformers::TransformersSection;
use base::{ModelShape, NamedTensors, RunConfig};
use engine_torch::{TorchOptions, describe_model, positions_of};
use serde_json::{Map, Value};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

/// Longest `config.json` that is read: real ones have one or two thousand bytes.
const CONFIG_BYTES_MAX: u64 = 64 << 10;

/// Positions of a model whose configuration names no bound.
const POSITIONS_DEFAULT: usize = 2_048;

/// What a `config.json` says.
pub(crate) struct TransformersModel {
    path: PathBuf,
    config: Value,
    python: Option<PathBuf>,
}

impl TransformersModel {
    /// Reads a `config.json`, or the one in a folder; `python` is the interpreter that has transformers.
    ///
    /// # Errors
    /// It is missing, too long, not JSON, or names no model.
    pub(crate) fn read(path: &Path, python: Option<PathBuf>) -> Result<Self, Failure> {
        let path = if path.is_dir() { path.join("config.json") } else { path.to_owned() };
        let place = path.display().to_string();
        let hint = "name the config.json of a causal language model, as `save_pretrained` writes it";
        let refuse = |reason: String| Failure::new(format!("{place}: {reason}"), hint);
        let mut text = String::new();
        let opened = File::open(&path).map_err(|error| refuse(error.to_string()))?;
        opened.take(CONFIG_BYTES_MAX + 1).read_to_string(&mut text).map_err(|error| refuse(error.to_string()))?;
        if text.len() as u64 > CONFIG_BYTES_MAX {
            return Err(refuse(format!("is longer than {CONFIG_BYTES_MAX} bytes")));
        }
        let config: Map<String, Value> = serde_json::from_str(&text).map_err(|error| refuse(error.to_string()))?;
        if !config.get("model_type").is_some_and(Value::is_string) {
            return Err(refuse("has no model_type".to_owned()));
        }
        Ok(Self { path, config: Value::Object(config), python })
    }

    fn number(&self, names: &[&str]) -> Option<usize> {
        names.iter().find_map(|name| self.config.get(*name)?.as_u64()).and_then(|number| usize::try_from(number).ok())
    }

    /// Longest text that it takes, tokens.
    pub(crate) fn positions(&self) -> usize {
        positions_of(&self.config).unwrap_or(POSITIONS_DEFAULT)
    }

    /// `[model]` of a run: the numbers that have to do with text, and of the others those that the configuration names.
    pub(crate) fn shape(&self, vocab_size: usize) -> ModelShape {
        let named = |names: &[&str]| self.number(names).unwrap_or(1);
        let heads = named(&["num_attention_heads", "n_head"]);
        ModelShape {
            vocab_size,
            hidden_size: named(&["hidden_size", "n_embd", "d_model"]),
            intermediate_size: named(&["intermediate_size", "n_inner", "ffn_dim"]),
            num_hidden_layers: named(&["num_hidden_layers", "n_layer"]),
            num_attention_heads: heads,
            num_key_value_heads: self.number(&["num_key_value_heads"]).unwrap_or(heads),
            max_position_embeddings: self.positions(),
            rope_theta: 10_000.0,
            rms_norm_eps: 1e-5,
            tie_word_embeddings: self.config.get("tie_word_embeddings").and_then(Value::as_bool).unwrap_or(true),
        }
    }

    /// Has transformers build the model with the run's vocabulary and seed; puts its description into `config` and gives
    /// its initial parameters.
    ///
    /// # Errors
    /// Python, PyTorch or transformers is missing, or the configuration is none of a causal language model.
    pub(crate) fn build(&self, config: &mut RunConfig) -> Result<NamedTensors, Failure> {
        let mut described = self.config.clone();
        described["vocab_size"] = config.model.vocab_size.into();
        let options = TorchOptions { python: self.python.clone(), ..TorchOptions::new("cpu") };
        let built = describe_model(&described, config.run.seed, &options)
            .map_err(|error| Failure::from(error).about(&self.path.display().to_string()))?;
        config.transformers = Some(TransformersSection::new(described.to_string(), &built.schema));
        Ok(built.initial)
    }
}
