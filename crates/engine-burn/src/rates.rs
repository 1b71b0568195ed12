//! Speeds of a device as measured: its largest matrix product and a copy in its own memory.
//!
//! Work doubles until a call takes a fair part of the time that is allowed, so that a software adapter is done in a second and
//! a data-centre GPU still has something to do. The best call counts: the question is what the device can do, not
//! what else runs on it.

use crate::{device, failure};
use burn::tensor::{FloatDType, Tensor, TensorData};
use device::OpenDevice;
use engine::{DeviceRates, EngineError};
use std::time::{Duration, Instant};

/// Smallest square matrix that is multiplied: 2·256³ = 34 MFLOP, a few milliseconds of one CPU core.
const MATRIX_SIDE_MIN: usize = 256;

/// Largest one: 2·8192³ = 1.1 TFLOP, a millisecond of an H100 in bf16; three such matrices are 768 MiB in f32.
const MATRIX_SIDE_MAX: usize = 8192;

/// Shortest and longest vector that is copied: 4 MiB to 1 GiB.
const COPY_ELEMENTS_MIN: usize = 1 << 20;
const COPY_ELEMENTS_MAX: usize = 1 << 28;

/// Shortest time allowed: one call of each kind has to fit.
const SECONDS_MIN: f64 = 0.1;

/// A call that takes longer than this part of a measurement's time is not made longer.
const LONG_CALL_SHARE: f64 = 0.1;

/// Measures the device `name` for about `seconds`; compiling and choosing kernels comes on top, once for each.
///
/// # Errors
/// No such device, or it fails.
pub fn measure_rates(name: &str, seconds: f64) -> Result<DeviceRates, EngineError> {
    let opened = device::open(name)?;
    let kinds = if opened.multiplies_bf16 { 3.0 } else { 2.0 };
    let allowed = Duration::from_secs_f64(seconds.clamp(SECONDS_MIN, 3600.0) / kinds);
    failure::guarded(&opened.info.engine, || {
        let bf16 = match opened.multiplies_bf16 {
            true => Some(matrix_tflops(&opened, FloatDType::BF16, allowed)?),
            false => None,
        };
        Ok(DeviceRates {
            matrix_f32_tflops: Some(matrix_tflops(&opened, FloatDType::F32, allowed)?),
            matrix_bf16_tflops: bf16,
            copy_gigabytes_per_second: Some(copy_gigabytes_per_second(&opened, allowed)?),
        })
    })
}

fn matrix_tflops(opened: &OpenDevice, precision: FloatDType, allowed: Duration) -> Result<f64, EngineError> {
    let sides = std::iter::successors(Some(MATRIX_SIDE_MIN), |side| Some(side * 2));
    let sides = sides.take_while(|side| *side <= MATRIX_SIDE_MAX && holds(opened, side * side));
    best_rate(opened, sides, allowed, |side| {
        let pattern = pattern(side, opened);
        let matrix = (pattern.clone().unsqueeze_dim::<2>(0) * pattern.unsqueeze_dim::<2>(1)).cast(precision);
        let multiply = move || first(matrix.clone().matmul(matrix.clone()).slice([0..1, 0..1]).reshape([1]));
        (2.0 * (side as f64).powi(3) / 1e12, multiply)
    })
}

fn copy_gigabytes_per_second(opened: &OpenDevice, allowed: Duration) -> Result<f64, EngineError> {
    let lengths = std::iter::successors(Some(COPY_ELEMENTS_MIN), |length| Some(length * 2));
    let lengths = lengths.take_while(|length| *length <= COPY_ELEMENTS_MAX && holds(opened, *length));
    best_rate(opened, lengths, allowed, |length| {
        let values = Tensor::<1>::zeros([length], &opened.device);
        // Read once, written once: 8 bytes an element.
        (8.0 * length as f64 / 1e9, move || first(values.clone().add_scalar(1.0).narrow(0, 0, 1)))
    })
}

fn holds(opened: &OpenDevice, elements: usize) -> bool {
    opened.buffer_bytes_max.is_none_or(|bytes_max| (elements as u64) * 4 <= bytes_max)
}

/// `((i mod 13) − 6) / 8`: numbers of both signs, so that products neither overflow nor vanish.
fn pattern(length: usize, opened: &OpenDevice) -> Tensor<1> {
    let values: Vec<f32> = (0..length).map(|index| ((index % 13) as f32 - 6.0) / 8.0).collect();
    Tensor::from_data(TensorData::new(values, [length]), &opened.device)
}

/// Waits for one element, and so for the kernel that computes it.
fn first(element: Tensor<1>) -> Result<(), String> {
    element.try_into_data().map(drop).map_err(|error| error.to_string())
}

/// The best of work over time among calls of growing size.
fn best_rate<Call: FnMut() -> Result<(), String>>(
    opened: &OpenDevice,
    sizes: impl Iterator<Item = usize>,
    allowed: Duration,
    prepare: impl Fn(usize) -> (f64, Call),
) -> Result<f64, EngineError> {
    let timed = |call: &mut Call| {
        let start = Instant::now();
        call().map_err(|reason| failure::classify(&opened.info.engine, &reason)).map(|()| start.elapsed())
    };
    let start = Instant::now();
    let mut best: f64 = 0.0;
    for size in sizes {
        let (work, mut call) = prepare(size);
        // The first call of a size compiles kernels and chooses between them: not work of the device.
        timed(&mut call)?;
        let took = timed(&mut call)?;
        best = best.max(work / took.as_secs_f64());
        if start.elapsed() > allowed || took > allowed.mul_f64(LONG_CALL_SHARE) {
            break;
        }
    }
    Ok(best)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_processor_has_rates_and_an_unknown_device_none() {
        let rates = measure_rates("flex", 0.1).unwrap();
        for rate in [rates.matrix_f32_tflops, rates.matrix_bf16_tflops, rates.copy_gigabytes_per_second] {
            assert!(rate.is_some_and(|rate| rate.is_finite() && rate > 0.0), "{rates:?}");
        }
        assert!(matches!(measure_rates("gpu", 0.1), Err(EngineError::Device { .. })));
    }
}
