//! What a user chooses: the model, the device, and how Python is started.

use base::{ModelShape, ParameterSchema};
use engine::PrecisionChoice;
use engine::checks::TextLimits;
use serde_json::{Value, json};
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

/// Names the interpreter where [`TorchOptions::python`] does not.
pub(crate) const PYTHON_VARIABLE: &str = "BERINGIA_PYTHON";

/// Longest wait for Python to import PyTorch and connect, seconds: 2 to 4 from a warm disk, a minute from a cold network
/// file system.
const CONNECT_SECONDS: u64 = 120;

/// The model that Python builds.
#[derive(Debug, Clone, PartialEq)]
pub enum ModelDescription {
    /// The Llama family, computed by the package's own model: needs no `transformers`.
    Llama(ModelShape),
    /// Any causal language model that `transformers` builds from a configuration.
    HuggingFace {
        /// The object of its `config.json`.
        config: Value,
        /// Names, shapes and canonical order of its parameters, as the checkpoint has them.
        schema: ParameterSchema,
    },
}

impl ModelDescription {
    pub(crate) fn schema(&self) -> ParameterSchema {
        match self {
            Self::Llama(shape) => ParameterSchema::llama(shape),
            Self::HuggingFace { schema, .. } => schema.clone(),
        }
    }

    /// The object of a `config.json`, in the keys of `transformers.LlamaConfig` for a Llama.
    pub(crate) fn config(&self) -> Value {
        match self {
            Self::HuggingFace { config, .. } => config.clone(),
            Self::Llama(shape) => json!({
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "vocab_size": shape.vocab_size,
                "hidden_size": shape.hidden_size,
                "intermediate_size": shape.intermediate_size,
                "num_hidden_layers": shape.num_hidden_layers,
                "num_attention_heads": shape.num_attention_heads,
                "num_key_value_heads": shape.num_key_value_heads,
                "head_dim": shape.head_size(),
                "max_position_embeddings": shape.max_position_embeddings,
                "rope_theta": shape.rope_theta,
                "rms_norm_eps": shape.rms_norm_eps,
                "tie_word_embeddings": shape.tie_word_embeddings,
                "hidden_act": "silu",
                "attention_bias": false,
                "mlp_bias": false,
            }),
        }
    }

    /// Tokens that the model knows and positions that it takes; `None` where the configuration does not say under the usual
    /// keys, and Python has to judge.
    pub(crate) fn limits(&self) -> TextLimits {
        match self {
            Self::Llama(shape) => {
                TextLimits { vocabulary: Some(shape.vocab_size), positions: Some(shape.max_position_embeddings) }
            }
            Self::HuggingFace { config, .. } => {
                TextLimits { vocabulary: number(config, &["vocab_size"]), positions: positions_of(config) }
            }
        }
    }
}

/// Longest text that the model of a `config.json` takes, tokens, under the keys of several families.
pub fn positions_of(config: &Value) -> Option<usize> {
    number(config, &["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"])
}

fn number(config: &Value, keys: &[&str]) -> Option<usize> {
    keys.iter().find_map(|key| config.get(key)?.as_u64()).and_then(|number| usize::try_from(number).ok())
}

/// Whether `torch.compile` is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Compile {
    /// Where it works; eager where it fails.
    #[default]
    Auto,
    /// Always: a failure is an error.
    On,
    /// Never.
    Off,
}

impl fmt::Display for Compile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::On => "on",
            Self::Off => "off",
        })
    }
}

/// Who starts Python.
#[derive(Clone, Default)]
pub enum Start {
    /// This process.
    #[default]
    Spawn,
    /// Somebody else on this host, with the command line that the callback is given: inside a container that has the
    /// maker's software, under a batch system, or with a debugger.
    Print(Arc<dyn Fn(&str) + Send + Sync>),
}

impl fmt::Debug for Start {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Spawn => "Spawn",
            Self::Print(_) => "Print",
        })
    }
}

/// How Python is started and on what it computes.
#[derive(Debug, Clone)]
pub struct TorchOptions {
    /// What follows `torch:` in a device string, for example `cpu` or `cuda:1`.
    pub device: String,
    /// What matrix products are computed in.
    pub precision: PrecisionChoice,
    /// Host threads; `None` leaves PyTorch's own choice.
    pub threads: Option<usize>,
    /// Processes that share the model, one device each (`torchrun`). At least 1.
    pub ranks: usize,
    /// Whether `torch.compile` is used.
    pub compile: Compile,
    /// The interpreter; `None`: the environment's `BERINGIA_PYTHON`, else `python3`.
    pub python: Option<PathBuf>,
    /// Who starts it.
    pub start: Start,
    /// Longest wait until it has connected, seconds.
    pub connect_seconds: u64,
}

impl TorchOptions {
    /// One process on `device` (`cpu`, `cuda:1`, ...), everything else chosen by itself.
    pub fn new(device: impl Into<String>) -> Self {
        Self {
            device: device.into(),
            precision: PrecisionChoice::Auto,
            threads: None,
            ranks: 1,
            compile: Compile::Auto,
            python: None,
            start: Start::Spawn,
            connect_seconds: CONNECT_SECONDS,
        }
    }

    /// The device string as `--engine` takes it.
    pub(crate) fn engine_name(&self) -> String {
        format!("torch:{}", self.device)
    }

    /// Why nothing can be started so, before anything is.
    pub(crate) fn conflict(&self) -> Option<String> {
        let kind = self.device.split_once(':').map(|(kind, _)| kind);
        match self.ranks {
            0 => Some("0 ranks cannot hold a model".to_owned()),
            1 => None,
            _ if self.compile == Compile::On => Some("compile is off with several ranks".to_owned()),
            ranks => kind
                .filter(|kind| *kind != "cpu")
                .map(|kind| format!("names one device for {ranks} ranks, which take a device each: use torch:{kind}")),
        }
    }

    pub(crate) fn interpreter(&self) -> PathBuf {
        interpreter(self.python.clone())
    }
}

/// `python`, else what the environment names, else `python3`.
pub(crate) fn interpreter(python: Option<PathBuf>) -> PathBuf {
    python
        .or_else(|| std::env::var_os(PYTHON_VARIABLE).filter(|value| !value.is_empty()).map(PathBuf::from))
        .unwrap_or_else(|| PathBuf::from("python3"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_found_under_the_keys_of_several_families() {
        let limits = |config| ModelDescription::HuggingFace { config, schema: ParameterSchema::new([]) }.limits();
        let gpt2 = limits(json!({ "model_type": "gpt2", "vocab_size": 50, "n_positions": 32 }));
        assert_eq!((gpt2.vocabulary, gpt2.positions), (Some(50), Some(32)));
        let odd = limits(json!({ "vocab_size": -1, "text_config": {} }));
        assert_eq!((odd.vocabulary, odd.positions), (None, None));
    }

    #[test]
    fn ranks_take_a_device_each_and_are_not_compiled() {
        let conflict = |device: &str, ranks, compile| {
            TorchOptions { ranks, compile, ..TorchOptions::new(device) }.conflict().unwrap_or_default()
        };
        assert_eq!(conflict("cuda:1", 1, Compile::On), "");
        assert_eq!(conflict("cuda", 2, Compile::Auto), "");
        assert_eq!(conflict("cpu:0", 2, Compile::Off), "");
        assert_eq!(conflict("cuda", 2, Compile::On), "compile is off with several ranks");
        assert!(conflict("npu:1", 2, Compile::Auto).ends_with("use torch:npu"));
        assert!(conflict("cpu", 0, Compile::Auto).starts_with("0 ranks"));
    }

    #[test]
    fn choices_are_written_as_the_command_line_takes_them() {
        assert_eq!([Compile::Auto, Compile::On, Compile::Off].map(|choice| choice.to_string()), ["auto", "on", "off"]);
        assert_eq!(TorchOptions::new("cuda:1").engine_name(), "torch:cuda:1");
        let named = interpreter(Some(PathBuf::from("some/python")));
        assert_eq!(named, PathBuf::from("some/python"));
    }
}
