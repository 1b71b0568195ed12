//! [`engine::numerics`]' operations in Burn's own: does this device compute what others do?
//!
//! Each is written as `model` writes it, so that the comparison is one of what training runs.

use crate::model::{causal_bias, rms_norm, rotate};
use base::HostTensor;
use burn::tensor::{DType, Device, FloatDType, Int, Tensor, TensorData, activation};
use engine::Precision;
use engine::numerics::{Operation, RMS_NORM_EPSILON, ROTARY_THETA};

/// The result of `operation`, of any shape, or why there is none.
pub(crate) fn compute(operation: &Operation, device: &Device) -> Result<Tensor<1>, String> {
    let input = |index: usize| operation.inputs.get(index).ok_or_else(|| format!("{} lacks inputs", operation.name));
    let matrix = |index: usize| input(index).and_then(|tensor| upload::<2>(tensor, device));
    let cube = |index: usize| input(index).and_then(|tensor| upload::<3>(tensor, device));
    let ids = |index: usize| input(index).map(|tensor| upload_ids(tensor, device));
    Ok(match operation.name {
        "add" => flat(matrix(0)? + matrix(1)?),
        "subtract" => flat(matrix(0)? - matrix(1)?),
        "multiply" => flat(matrix(0)? * matrix(1)?),
        "divide" => flat(matrix(0)? / matrix(1)?),
        "maximum" => flat(matrix(0)?.max_pair(matrix(1)?)),
        "square" => flat(matrix(0)?.square()),
        "round_to_bf16" if !device.supports_dtype(DType::BF16) => flat(rounded_by_arithmetic(matrix(0)?)),
        "round_to_bf16" => flat(matrix(0)?.cast(FloatDType::BF16).cast(FloatDType::F32)),
        "exp" => flat(matrix(0)?.exp()),
        "log" => flat(matrix(0)?.log()),
        "sqrt" => flat(matrix(0)?.sqrt()),
        "reciprocal_sqrt" => flat(matrix(0)?.sqrt().recip()),
        "sigmoid" => flat(activation::sigmoid(matrix(0)?)),
        "silu" => flat(activation::silu(matrix(0)?)),
        "tanh" => flat(matrix(0)?.tanh()),
        "sine" => flat(matrix(0)?.sin()),
        "cosine" => flat(matrix(0)?.cos()),
        "sum_rows" => flat(matrix(0)?.sum_dim(1)),
        "max_rows" => flat(matrix(0)?.max_dim(1)),
        "mean_columns" => flat(matrix(0)?.mean_dim(0)),
        "softmax" => flat(activation::softmax(matrix(0)?, 1)),
        "log_softmax" => flat(activation::log_softmax(matrix(0)?, 1)),
        "cross_entropy" => flat(activation::log_softmax(matrix(0)?, 1).gather(1, ids(1)?.unsqueeze_dim(1)).sum().neg()),
        "embedding" => flat(matrix(0)?.select(0, ids(1)?)),
        "rms_norm" => flat(rms_norm(matrix(0)?, upload::<1>(input(1)?, device)?.unsqueeze(), RMS_NORM_EPSILON)),
        "rotary" => flat(rotary(matrix(0)?)),
        "causal_attention" => flat(causal_attention(cube(0)?, cube(1)?, cube(2)?)),
        "matmul" | "matmul_long" => flat(matrix(0)?.matmul(matrix(1)?)),
        "matmul_transposed" => flat(matrix(0)?.matmul(matrix(1)?.transpose())),
        "batched_matmul" => flat(cube(0)?.matmul(cube(1)?)),
        unknown => return Err(format!("does not know the operation {unknown}")),
    })
}

/// x rounded to bf16's 8 significant bits, ties to even, where the device has no such type.
fn rounded_by_arithmetic(x: Tensor<2>) -> Tensor<2> {
    let nearest = leading_bits(x.clone(), 8);
    // Ties go either way in `leading_bits`. The other neighbour lies as far from x on the other side; the even one of the two
    // needs a bit less, and only where there is a tie can it be the other.
    let other = x.clone() + (x - nearest.clone());
    let nearest_is_odd = leading_bits(nearest.clone(), 7).not_equal(nearest.clone());
    let other_is_even = leading_bits(other.clone(), 7).equal(other.clone());
    nearest.mask_where(nearest_is_odd.bool_and(other_is_even), other)
}

/// x rounded to `bits` of its 24 significant bits (Veltkamp's splitting; Dekker 1971, section 5).
fn leading_bits(x: Tensor<2>, bits: i32) -> Tensor<2> {
    let widened = x.clone().mul_scalar(2.0_f32.powi(24 - bits) + 1.0);
    widened.clone() - (widened - x)
}

/// A square matrix times its transpose, of operands rounded to `precision`, in f32.
pub(crate) fn trial_product(side: usize, precision: Precision, device: &Device) -> Tensor<2> {
    // Numbers of both signs that bf16 does not hold exactly.
    let values: Vec<f32> = (0..side * side).map(|index| ((index * 37 % 101) as f32 - 50.0) / 77.0).collect();
    let matrix = Tensor::<2>::from_data(TensorData::new(values, [side, side]), device);
    match precision {
        Precision::F32 => matrix.clone().matmul(matrix.transpose()),
        Precision::Bf16 => {
            let rounded = matrix.cast(FloatDType::BF16);
            rounded.clone().matmul(rounded.transpose()).cast(FloatDType::F32)
        }
    }
}

fn upload<const D: usize>(tensor: &HostTensor, device: &Device) -> Result<Tensor<D>, String> {
    let shape: [usize; D] = tensor.shape.clone().try_into().map_err(|shape| format!("{shape:?} is not of rank {D}"))?;
    if shape.iter().product::<usize>() != tensor.values.len() {
        return Err(format!("{} values for {shape:?}", tensor.values.len()));
    }
    Ok(Tensor::from_data(TensorData::new(tensor.values.clone(), shape), device))
}

fn upload_ids(tensor: &HostTensor, device: &Device) -> Tensor<1, Int> {
    let ids: Vec<i32> = tensor.values.iter().map(|id| *id as i32).collect();
    let length = ids.len();
    Tensor::from_data(TensorData::new(ids, [length]), device)
}

fn flat<const D: usize>(tensor: Tensor<D>) -> Tensor<1> {
    let elements = tensor.dims().iter().product::<usize>();
    tensor.reshape([elements])
}

/// Angles are made on the device, for its sine and cosine of large ones are part of the question.
fn rotary(x_td: Tensor<2>) -> Tensor<4> {
    let ([positions, size], device) = (x_td.dims(), x_td.device());
    let frequency = |pair: usize| libm::pow(ROTARY_THETA, -2.0 * pair as f64 / size as f64) as f32;
    let angles: Vec<f32> =
        (0..positions).flat_map(|t| (0..size / 2).map(move |pair| t as f32 * frequency(pair))).collect();
    let angles_td = Tensor::<2>::from_data(TensorData::new(angles, [positions, size / 2]), &device);
    rotate(x_td.unsqueeze(), angles_td.clone().cos(), angles_td.sin())
}

fn causal_attention(q_atd: Tensor<3>, k_atd: Tensor<3>, v_atd: Tensor<3>) -> Tensor<3> {
    let [_, positions, size] = q_atd.dims();
    let bias_att = causal_bias(positions, &q_atd.device()).unsqueeze::<3>();
    let scores_att = q_atd.mul_scalar((size as f64).sqrt().recip()).matmul(k_atd.swap_dims(1, 2)) + bias_att;
    activation::softmax(scores_att, 2).matmul(v_atd)
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine::numerics::{operations, reference, relative_distance};

    #[test]
    fn operations_on_the_processor_are_those_of_their_definitions() {
        for operation in operations() {
            let found = compute(&operation, &Device::flex()).unwrap().into_data().try_into_vec::<f32>().unwrap();
            let distance = relative_distance(&found, &reference(&operation));
            assert!(distance <= operation.bound, "{}: {distance} where {} is allowed", operation.name, operation.bound);
        }
    }

    #[test]
    fn rounding_by_arithmetic_is_that_of_the_type() {
        let quarter_units = (-1024..1024).map(|n| 1.0 + f32::from(n as i16) / 1024.0);
        let values: Vec<f32> = quarter_units.chain((0..4096).map(|n| (n as f32 * 0.37).sin() * 3.0e-3)).collect();
        let rows = values.len();
        let x = Tensor::<2>::from_data(TensorData::new(values, [rows, 1]), &Device::flex());
        let read = |tensor: Tensor<2>| tensor.into_data().try_into_vec::<f32>().unwrap();
        let expected = read(x.clone().cast(FloatDType::BF16).cast(FloatDType::F32));
        assert_eq!(read(rounded_by_arithmetic(x)), expected);
    }

    #[test]
    fn what_is_no_operation_is_refused() {
        let tensor = |shape: &[usize], length: usize| HostTensor { shape: shape.to_vec(), values: vec![0.0; length] };
        for (name, inputs, expected) in [
            ("conv", vec![], "does not know the operation conv"),
            ("add", vec![tensor(&[1, 1], 1)], "add lacks inputs"),
            ("exp", vec![tensor(&[4], 4)], "[4] is not of rank 2"),
            ("exp", vec![tensor(&[2, 2], 3)], "3 values for [2, 2]"),
        ] {
            let refused = compute(&Operation { name, inputs, bound: 0.0 }, &Device::flex());
            assert_eq!(refused.unwrap_err(), expected);
        }
    }
}
