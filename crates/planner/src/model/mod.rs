//! Time and memory of one training step on one site, from shape, layout and the makers' figures.
//!
//! ```text
//! layer       matrix products + attention + memory traffic            operators, rates
//! + exchange  tensor, expert, context parallel; sharded parameters    collectives
//! stage       layers of it, logits, transfers
//! pipeline    m max t + (sum t - max t) / v                            pipeline
//! + gradients over data-parallel ranks, optimiser                     step
//! ```
//! Sources: Megatron-LM (arXiv 2104.04473), Korthikanti et al. (2205.05198), Calculon (SC23), ZeRO (1910.02054). What the makers'
//! figures do not tell is in [`constants`], fitted.

pub mod collectives;
pub mod constants;
pub mod layout;
pub mod memory;
pub mod operators;
pub mod pipeline;
pub mod rates;
pub mod shape;
pub mod step;

use crate::catalogue::{Device, Precision};
use crate::units::{BitsPerSecond, FlopPerSecond, Seconds};
use base::Hint;
use constants::{Constants, FITTED};
use layout::Layout;
use memory::Memory;
use shape::Transformer;

/// Most pipeline stages.
const STAGES_MAX: f64 = 4096.0;

/// Share of a device's memory that a run can use: the driver's context, communication buffers and fragmentation take the rest.
pub const USABLE_MEMORY: f64 = 0.94;

/// One site's work: what is trained, how it is laid out, on what.
#[derive(Debug, Clone)]
pub struct Case<'a> {
    /// The model.
    pub shape: Transformer,
    /// Its layout.
    pub layout: Layout,
    /// Number format of matrix products.
    pub precision: Precision,
    /// Kinds of devices in the order of the pipeline's stages, each on an equal run of stages; one for a uniform site.
    pub devices: Vec<&'a Device>,
    /// Layers of each stage, where they are not even.
    pub stage_layers: Option<Vec<f64>>,
    /// Devices of a node.
    pub devices_per_node: f64,
    /// Network between nodes, for each device.
    pub network: BitsPerSecond,
}

/// What a step takes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Prediction {
    /// Time of a step.
    pub step: Seconds,
    /// Tokens each device trains on in a second.
    pub tokens_per_second_per_device: f64,
    /// Useful work (no recomputation) of each device.
    pub useful: FlopPerSecond,
    /// That over the peak of the precision, mean over kinds of devices.
    pub mfu: f64,
    /// Memory of the fullest device.
    pub memory: Memory,
    /// Least memory of a device over what the fullest one needs, unknown where the catalogue does not say.
    pub fits: Option<bool>,
    /// Share of the step in computation.
    pub compute_share: f64,
    /// Share in exposed communication.
    pub communication_share: f64,
    /// Share in which the mean stage waits.
    pub bubble_share: f64,
}

/// Why nothing can be predicted.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// The catalogue does not know a figure that the prediction needs.
    #[error("{key} of {device} is unknown, and nothing is guessed")]
    UnknownFigure {
        /// The device.
        device: String,
        /// The catalogue's key.
        key: &'static str,
    },
    /// A layout that cannot be.
    #[error("{what}: {reason}")]
    Impossible {
        /// Which part.
        what: &'static str,
        /// Why not.
        reason: String,
    },
}

impl Hint for ModelError {
    fn hint(&self) -> Option<String> {
        Some(match self {
            Self::UnknownFigure { device, key } => {
                format!("put a [[device]] with name = \"{device}\" and {key} = ... into your devices file")
            }
            Self::Impossible { what, .. } => format!("change {what}"),
        })
    }
}

impl Case<'_> {
    /// Predicts one step with the shipped constants.
    pub fn predict(&self) -> Result<Prediction, ModelError> {
        step::predict(self, &FITTED)
    }

    /// Predicts one step with other constants, as the fit does.
    pub fn predict_with(&self, constants: &Constants) -> Result<Prediction, ModelError> {
        step::predict(self, constants)
    }

    /// Refuses what the formulas take for granted.
    pub fn validate(&self) -> Result<(), ModelError> {
        let layout = &self.layout;
        let fail = |what, reason: String| Err(ModelError::Impossible { what, reason });
        if !(1.0..=STAGES_MAX).contains(&layout.pp) || layout.pp > self.shape.layers {
            return fail("pp", format!("{} stages for {} layers", layout.pp, self.shape.layers));
        }
        if self.devices.is_empty() || self.devices.len() as f64 > layout.pp {
            return fail("device", format!("{} kinds of devices for {} stages", self.devices.len(), layout.pp));
        }
        if layout.tp > self.shape.heads {
            return fail("tp", format!("{} ranks for {} heads", layout.tp, self.shape.heads));
        }
        if layout.ep > self.shape.experts || layout.ep > layout.dp * layout.cp * layout.tp {
            let reason =
                format!("{} ranks for {} experts and {} data-parallel ranks", layout.ep, self.shape.experts, layout.dp);
            return fail("ep", reason);
        }
        if self.stage_layers.as_ref().is_some_and(|layers| layers.len() as f64 != layout.pp) {
            return fail("stage_layers", format!("one number for each of the {} stages", layout.pp));
        }
        Ok(())
    }

    fn prediction(&self, step: Seconds, communication: Seconds, bubble: Seconds, memory: Memory) -> Prediction {
        let tokens = self.layout.global_batch * self.shape.seq;
        let devices = self.layout.devices();
        let useful = self.shape.training_flop(tokens) / devices / step;
        let peaks: Vec<f64> = self.devices.iter().filter_map(|device| Some(device.peak(self.precision)?.0)).collect();
        let peak = peaks.iter().sum::<f64>() / peaks.len().max(1) as f64;
        let least = self.devices.iter().map(|device| device.memory()).collect::<Option<Vec<_>>>();
        let fits = least.map(|sizes| sizes.iter().all(|size| memory.total() <= *size * USABLE_MEMORY));
        let communication_share = (communication / step).min(1.0);
        let bubble_share = (bubble / step).min(1.0 - communication_share);
        Prediction {
            step,
            tokens_per_second_per_device: tokens / devices / step.0,
            useful,
            mfu: useful.0 / peak,
            memory,
            fits,
            compute_share: 1.0 - communication_share - bubble_share,
            communication_share,
            bubble_share,
        }
    }
}
