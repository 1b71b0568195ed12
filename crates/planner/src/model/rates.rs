//! From a maker's figures to rates that training reaches: peaks times the fitted fractions of [`super::constants`].

use super::ModelError;
use super::constants::Constants;
use crate::catalogue::{Device, Family, Precision};
use crate::units::{BitsPerSecond, Bytes, BytesPerSecond, Flop, FlopPerSecond, Seconds};

/// Memory bandwidth that streaming kernels reach over the printed one (BabelStream on A100 and H100: 0.85 to 0.93).
const STREAM_FRACTION: f64 = 0.87;

/// Fused attention on Hopper over the bf16 peak, in stacks of fused kernels: 335 TFLOP/s, forward and backward (arXiv 2307.08691, section 4.1).
const FUSED_ATTENTION_HOPPER: f64 = 335.0 / 989.4;

/// Sustained fraction of peak where nothing is measured: the least of the families that are.
const GEMM_FRACTION_UNKNOWN: f64 = 0.55;

/// What one device does in a second.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rates {
    /// Matrix products of the layers.
    pub gemm: FlopPerSecond,
    /// Matrix products in 16 bits, for what FP8 leaves out.
    pub gemm_wide: FlopPerSecond,
    /// Fused attention.
    pub attention: FlopPerSecond,
    /// The same as plain modules call it.
    pub attention_eager: FlopPerSecond,
    /// Memory traffic of streaming kernels.
    pub memory: BytesPerSecond,
    /// Share of operand traffic that is not hidden.
    pub exposed_traffic: f64,
}

impl Rates {
    /// Rates of a device in a precision, or which figure of the catalogue is missing.
    pub fn of(device: &Device, precision: Precision, constants: &Constants) -> Result<Self, ModelError> {
        let wide = if precision == Precision::Fp8 { widest_16_bit(device) } else { precision };
        let peak_wide = peak(device, wide)?;
        let gemm_wide = peak_wide * gemm_fraction(device, constants);
        let gemm = match precision {
            Precision::Fp8 => peak(device, precision)? * fp8_fraction(device, constants),
            _ => gemm_wide,
        };
        let (attention, attention_eager) = match device.family {
            Family::Hopper | Family::Blackwell => (FUSED_ATTENTION_HOPPER, constants.attention_fraction_hopper),
            _ => (constants.attention_fraction, constants.attention_fraction),
        };
        Ok(Self {
            gemm,
            gemm_wide,
            attention: peak_wide * attention,
            attention_eager: peak_wide * attention_eager,
            memory: device.memory_bandwidth().ok_or_else(|| missing(device, "memory_bandwidth_gb_s"))?
                * STREAM_FRACTION,
            exposed_traffic: constants.gemm_exposed_traffic,
        })
    }

    /// Fused attention of this software.
    pub fn attention_of(&self, eager: bool) -> FlopPerSecond {
        if eager { self.attention_eager } else { self.attention }
    }

    /// Time of (m, k) x (k, n), with the part of its operand traffic that arithmetic does not hide: efficiency falls as
    /// 1 / (1 + R c (1/m + 1/n + 1/k)), R being the rate over the bandwidth.
    pub fn product(&self, m: f64, n: f64, k: f64) -> Seconds {
        product_at(self.gemm, self, m, n, k)
    }

    /// The same for what FP8 leaves in 16 bits: output projection, attention.
    pub fn product_wide(&self, m: f64, n: f64, k: f64) -> Seconds {
        product_at(self.gemm_wide, self, m, n, k)
    }
}

fn product_at(rate: FlopPerSecond, rates: &Rates, m: f64, n: f64, k: f64) -> Seconds {
    let traffic = Bytes(2.0 * (m * n + n * k + m * k)) * rates.exposed_traffic;
    Flop(2.0 * m * n * k) / rate + traffic / rates.memory
}

fn widest_16_bit(device: &Device) -> Precision {
    if device.bf16_tflops.is_some() { Precision::Bf16 } else { Precision::Fp16 }
}

fn peak(device: &Device, precision: Precision) -> Result<FlopPerSecond, ModelError> {
    device.peak(precision).ok_or_else(|| missing(device, precision.key()))
}

fn missing(device: &Device, key: &'static str) -> ModelError {
    ModelError::UnknownFigure { device: device.name.clone(), key }
}

fn gemm_fraction(device: &Device, constants: &Constants) -> f64 {
    match device.family {
        Family::Ampere => constants.gemm_fraction_ampere,
        Family::Hopper | Family::Blackwell => constants.gemm_fraction_hopper,
        Family::Graphics => constants.gemm_fraction_graphics,
        _ => match (device.measured_bf16_gemm_tflops, device.bf16_tflops) {
            (Some(measured), Some(peak)) => (measured / peak).min(1.0) * constants.gemm_fraction_of_benchmark,
            _ => GEMM_FRACTION_UNKNOWN,
        },
    }
}

fn fp8_fraction(device: &Device, constants: &Constants) -> f64 {
    // What FP8 keeps of its peak is measured on Hopper only; elsewhere its ratio to 16 bits there is taken.
    match device.family {
        Family::Hopper | Family::Blackwell => constants.gemm_fraction_hopper_fp8,
        _ => gemm_fraction(device, constants) * constants.gemm_fraction_hopper_fp8 / constants.gemm_fraction_hopper,
    }
}

/// Links of one device.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Links {
    /// Scale-up link, one way, where there is one.
    pub scale_up: Option<BytesPerSecond>,
    /// PCIe slot, one way.
    pub pcie: BytesPerSecond,
    /// The node's network divided by its devices.
    pub network: BitsPerSecond,
    /// Devices that the scale-up link joins.
    pub node: f64,
}

impl Links {
    /// Links of a device on nodes of `node` devices with `network` for each.
    pub fn of(device: &Device, node: f64, network: BitsPerSecond) -> Result<Self, ModelError> {
        let scale_up = device.scale_up_one_way();
        let pcie = device.pcie_one_way();
        if node > 1.0 && scale_up.is_none() && pcie.is_none() {
            return Err(missing(device, "scale_up_gb_s"));
        }
        // Without either, nothing leaves the device but over the network.
        let pcie = pcie.unwrap_or(network.bytes_per_second());
        let domain = device.scale_up_domain_devices.map_or(node, |devices| f64::from(devices).max(node));
        Ok(Self { scale_up, pcie, network, node: domain })
    }

    /// Bandwidth of a collective inside the node.
    pub fn inside(&self, constants: &Constants) -> BytesPerSecond {
        self.scale_up.map_or(self.pcie * constants.pcie_fraction, |link| link * constants.scale_up_fraction)
    }
}
