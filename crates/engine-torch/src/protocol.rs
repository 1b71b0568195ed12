//! What the agent and Python say to each other: length-prefixed JSON objects, without a number of any tensor.
//!
//! A frame is a u32 (little-endian) and that many bytes of UTF-8 JSON. The agent asks, Python answers, one request
//! at a time. docs/torch.md lists the requests.

use base::config::{InnerOptimizer, TrainSection};
use engine::{EngineError, Precision};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::tail::printable;

/// Version of everything in this file.
pub(crate) const PROTOCOL: u64 = 1;

/// Longest frame, bytes. The longest is the answer to `init`: some 70 bytes a parameter tensor, so 200,000 tensors.
pub(crate) const FRAME_BYTES_MAX: usize = 16 << 20;

/// Characters of a text from Python that are shown.
const TEXT_CHARACTERS_MAX: usize = 2_000;

/// Elements that a model may have: as [`base::ModelShape::validate`], more than any machine holds.
const ELEMENTS_MAX: usize = 1 << 40;

#[derive(Debug, Serialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub(crate) enum Request<'a> {
    Arena { path: &'a str, bytes: u64 },
    Init { model: &'a Value, train: Train, seed: Option<u64> },
    InnerStep { samples: usize, sequence_length: usize, learning_rate: f64, batch_share: f64, tokens: u64 },
    Gradient { samples: usize, sequence_length: usize, tokens: u64, gradient: u64 },
    Evaluate { samples: usize, sequence_length: usize, tokens: u64 },
    Logits { length: usize, tokens: u64, logits: u64 },
    Read { ranges: &'a [[usize; 2]], values: u64 },
    Write { ranges: &'a [[usize; 2]], values: u64 },
    Save { parameters: Option<u64>, first: u64, second: u64 },
    Restore { parameters: u64, first: Option<u64>, second: Option<u64>, optimizer_steps: u64 },
    MicroBatch { samples: usize },
    Operation { name: &'a str, inputs: &'a [Input<'a>], output: u64 },
    Measure { seconds: f64 },
    Close {},
}

#[derive(Debug, Serialize)]
pub(crate) struct Train {
    optimizer: InnerOptimizer,
    beta1: f64,
    beta2: f64,
    epsilon: f64,
    weight_decay: f64,
    gradient_clip_norm: f64,
    micro_batch_samples: usize,
}

impl From<&TrainSection> for Train {
    fn from(train: &TrainSection) -> Self {
        Self {
            optimizer: train.optimizer,
            beta1: train.beta1,
            beta2: train.beta2,
            epsilon: train.epsilon,
            weight_decay: train.weight_decay,
            gradient_clip_norm: train.gradient_clip_norm,
            micro_batch_samples: train.micro_batch_samples,
        }
    }
}

#[derive(Debug, Serialize)]
pub(crate) struct Input<'a> {
    pub(crate) offset: u64,
    pub(crate) shape: &'a [usize],
}

#[derive(Debug, Deserialize)]
pub(crate) struct Hello {
    pub(crate) protocol: u64,
    pub(crate) python: String,
    pub(crate) torch: String,
    pub(crate) rank_count: usize,
}

/// Every answer, read first for whether it is an error.
#[derive(Debug, Deserialize)]
struct Outcome {
    error: Option<Failure>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Failure {
    kind: String,
    what: String,
    reason: String,
    value: String,
    install: String,
}

/// An answer without anything in it.
#[derive(Debug, Deserialize)]
pub(crate) struct Done {
    pub(crate) ok: bool,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Initialised {
    pub(crate) device: TorchDevice,
    pub(crate) parameters: Vec<(String, Vec<usize>)>,
    #[serde(default)]
    pub(crate) compiled: bool,
}

#[derive(Debug, Clone, Deserialize)]
pub(crate) struct TorchDevice {
    pub(crate) name: String,
    pub(crate) maker: String,
    pub(crate) driver: String,
    pub(crate) memory_bytes: Option<u64>,
    pub(crate) threads: usize,
    pub(crate) precision: Precision,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Step {
    pub(crate) loss_nats: f64,
    pub(crate) tokens: u64,
    pub(crate) gradient_norm: f64,
    pub(crate) seconds: f64,
    pub(crate) joules: Option<f64>,
    #[serde(default)]
    pub(crate) compiled: bool,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Loss {
    pub(crate) nats: f64,
    pub(crate) tokens: u64,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Saved {
    pub(crate) optimizer_steps: u64,
    pub(crate) has_moments: bool,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Computed {
    pub(crate) elements: usize,
}

/// What a frame turned out to be.
pub(crate) enum Answer<T> {
    Fine(T),
    /// Python refused; it is as it was.
    Refused(EngineError),
    /// Not of this protocol: nothing that follows can be trusted.
    Broken(String),
}

impl<T: for<'de> Deserialize<'de>> Answer<T> {
    /// Reads the frame that answers `engine`'s request.
    pub(crate) fn parse(frame: &[u8], engine: &str) -> Self {
        match serde_json::from_slice(frame) {
            Err(error) => Self::Broken(format!("its answer is not of the protocol: {error}")),
            Ok(Outcome { error: Some(failure) }) => failure.into_error(engine).map_or_else(Self::Broken, Self::Refused),
            Ok(Outcome { error: None }) => serde_json::from_slice(frame)
                .map_or_else(|error| Self::Broken(format!("its answer is not of the protocol: {error}")), Self::Fine),
        }
    }
}

impl Failure {
    fn into_error(self, engine: &str) -> Result<EngineError, String> {
        let text = |text: &str| printable(text, TEXT_CHARACTERS_MAX);
        let device = engine.to_owned();
        let (what, reason) = (text(&self.what), text(&self.reason));
        Ok(match self.kind.as_str() {
            "shape" => EngineError::Shape { what, reason },
            "not_finite" => EngineError::NotFinite { what: quantity(&what)?, value: not_finite_value(&self.value)? },
            "out_of_memory" => EngineError::OutOfMemory { device, reason },
            "device" => EngineError::Device { device, reason },
            "missing" => EngineError::Missing { engine: device, what, reason, install: text(&self.install) },
            "internal" => EngineError::Device { device, reason: format!("the PyTorch engine failed: {reason}") },
            other => return Err(format!("its error is of the unknown kind '{}'", text(other))),
        })
    }
}

fn quantity(what: &str) -> Result<&'static str, String> {
    match what {
        "loss" => Ok("loss"),
        "gradient norm" => Ok("gradient norm"),
        _ => Err(format!("its error names '{what}', neither loss nor gradient norm")),
    }
}

/// `NaN`, `inf`, `-inf`: numbers that JSON cannot write.
fn not_finite_value(text: &str) -> Result<f64, String> {
    let shown = printable(text, TEXT_CHARACTERS_MAX);
    match text.parse::<f64>() {
        Ok(value) if !value.is_finite() => Ok(value),
        _ => Err(format!("its error calls '{shown}' not finite")),
    }
}

/// Elements of the parameters that an answer lists.
pub(crate) fn count_elements(parameters: &[(String, Vec<usize>)]) -> Result<usize, String> {
    let of_shape = |shape: &[usize]| shape.iter().try_fold(1, |product: usize, length| product.checked_mul(*length));
    let total = parameters.iter().try_fold(0, |sum: usize, (_, shape)| sum.checked_add(of_shape(shape)?));
    match total {
        Some(total) if total <= ELEMENTS_MAX => Ok(total),
        _ => Err(format!("its model has more than {ELEMENTS_MAX} elements")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse<T: for<'de> Deserialize<'de>>(answer: &Value) -> Answer<T> {
        Answer::parse(answer.to_string().as_bytes(), "torch:cpu")
    }

    fn refused(answer: &Value) -> String {
        match parse::<Done>(answer) {
            Answer::Refused(error) => format!("{error:?}"),
            Answer::Broken(reason) => format!("broken: {reason}"),
            Answer::Fine(done) => format!("{done:?}"),
        }
    }

    #[test]
    fn requests_are_written_as_the_protocol_says() {
        let written = |request: &Request<'_>| serde_json::to_value(request).unwrap();
        let step =
            Request::InnerStep { samples: 2, sequence_length: 8, learning_rate: 0.5, batch_share: 0.25, tokens: 64 };
        let expected = json!({
            "op": "inner_step", "samples": 2, "sequence_length": 8, "learning_rate": 0.5, "batch_share": 0.25, "tokens": 64
        });
        assert_eq!(written(&step), expected);
        assert_eq!(written(&Request::Close {}), json!({ "op": "close" }));
        let read = Request::Read { ranges: &[[0, 3], [5, 6]], values: 0 };
        assert_eq!(written(&read), json!({ "op": "read", "ranges": [[0, 3], [5, 6]], "values": 0 }));
        let train = Train::from(&TrainSection::default());
        let init = written(&Request::Init { model: &json!({}), train, seed: None });
        assert_eq!(init["train"]["optimizer"], "adamw");
        assert_eq!(init["seed"], Value::Null);
    }

    #[test]
    fn each_kind_of_error_has_its_own() {
        let error =
            |kind: &str| json!({ "error": { "kind": kind, "what": "batch", "reason": "why", "install": "pip" } });
        assert_eq!(refused(&error("shape")), r#"Shape { what: "batch", reason: "why" }"#);
        assert!(refused(&error("out_of_memory")).starts_with("OutOfMemory"));
        assert!(refused(&error("device")).starts_with("Device"));
        assert!(refused(&error("missing")).contains(r#"install: "pip""#));
        assert!(refused(&error("internal")).contains("the PyTorch engine failed: why"));
        let not_finite = json!({ "error": { "kind": "not_finite", "what": "loss", "value": "-inf" } });
        assert_eq!(refused(&not_finite), r#"NotFinite { what: "loss", value: -inf }"#);
    }

    #[test]
    fn nonsense_is_named_and_does_not_reach_the_terminal() {
        assert!(refused(&json!({ "error": { "kind": "\u{1b}[2J" } })).contains("unknown kind ' [2J'"));
        assert!(
            refused(&json!({ "error": { "kind": "not_finite", "what": "loss", "value": "3" } })).starts_with("broken")
        );
        assert!(refused(&json!({ "error": { "kind": "not_finite", "what": "mood" } })).starts_with("broken"));
        assert!(refused(&json!({ "error": "no object" })).starts_with("broken"));
        assert!(refused(&json!({})).starts_with("broken"));
        let negative = json!({ "nats": 1.0, "tokens": -5 });
        assert!(matches!(parse::<Loss>(&negative), Answer::Broken(_)));
        let quoted = json!({ "nats": "NaN", "tokens": 5 });
        assert!(matches!(parse::<Loss>(&quoted), Answer::Broken(_)));
        assert!(matches!(Answer::<Loss>::parse(br#"{"nats":NaN,"tokens":5}"#, "torch:cpu"), Answer::Broken(_)));
        let deep = "[".repeat(100_000);
        assert!(matches!(Answer::<Done>::parse(deep.as_bytes(), "torch:cpu"), Answer::Broken(_)));
    }

    #[test]
    fn a_model_larger_than_any_machine_is_refused() {
        let of = |shape: &[usize]| count_elements(&[("a".to_owned(), vec![2, 3]), ("b".to_owned(), shape.to_vec())]);
        assert_eq!(of(&[]), Ok(7));
        assert!(of(&[usize::MAX, 2]).is_err());
        assert!(of(&[ELEMENTS_MAX]).is_err());
    }
}
