//! What an engine computes on, and in which precision.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// What an engine's matrix products are computed in. Master weights, optimiser, normalisation, softmax and loss are f32
/// always.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// IEEE single precision, 24 bits of significand.
    F32,
    /// bfloat16, 8 bits of significand, products accumulated in f32.
    Bf16,
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        })
    }
}

/// What a user asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PrecisionChoice {
    /// bf16 on accelerators that multiply it natively, f32 everywhere else.
    #[default]
    Auto,
    /// That one, or an error where the device cannot.
    Fixed(Precision),
}

impl fmt::Display for PrecisionChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Fixed(precision) => precision.fmt(f),
        }
    }
}

impl FromStr for PrecisionChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "f32" => Ok(Self::Fixed(Precision::F32)),
            "bf16" => Ok(Self::Fixed(Precision::Bf16)),
            _ => Err(format!("'{text}' is not a precision: auto, f32 or bf16")),
        }
    }
}

/// The device an engine computes on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DeviceInfo {
    /// Engine and device string as `--engine` takes it, for example `flex`, `wgpu:0` or `torch:cuda:1`.
    pub engine: String,
    /// What the maker calls the device.
    pub name: String,
    /// Who made it; empty where the system does not tell.
    pub maker: String,
    /// Driver or software stack with its version; empty where there is none.
    pub driver: String,
    /// Memory of the device; `None` where the driver does not tell.
    pub memory_bytes: Option<u64>,
    /// Host threads the engine uses.
    pub threads: usize,
    /// What matrix products are computed in.
    pub precision: Precision,
}

/// Speeds of a device as measured, not as printed in a data sheet.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct DeviceRates {
    /// Largest matrix product, f32, in 10^12 floating-point operations a second (2·m·n·k a product).
    pub matrix_f32_tflops: Option<f64>,
    /// The same in bf16; `None` where the device has none.
    pub matrix_bf16_tflops: Option<f64>,
    /// Copy within the device's memory, 10^9 bytes read and written a second.
    pub copy_gigabytes_per_second: Option<f64>,
}

/// One line of `beringia devices`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DeviceReport {
    /// What it is.
    pub info: DeviceInfo,
    /// How fast it is; all `None` where it was not measured.
    pub rates: DeviceRates,
}
