//! Tensors over the seam: host f32 by Hugging Face name or in the canonical flat order, to and from the device.
//!
//! On the device every parameter has rank 2; a norm weight of h elements is a row `[1, h]`.

use crate::failure;
use crate::kernels;
use crate::model::BlockKernels;
use base::{Fragment, NamedTensors, ParameterSchema, ParameterSpec};
use burn::tensor::{Device, Tensor, TensorData};
use engine::EngineError;
use std::ops::Range;

/// Rows and columns of a parameter on the device.
fn matrix_shape(parameter: &ParameterSpec) -> [usize; 2] {
    match parameter.shape.as_slice() {
        [rows, columns] => [*rows, *columns],
        _ => [1, parameter.range.len()],
    }
}

/// Whether weight decay applies: to matrices, not to norm weights.
pub(crate) fn is_decayed(parameter: &ParameterSpec) -> bool {
    parameter.shape.len() >= 2
}

/// Uploads `values` as the tensor of `parameter`.
fn upload(parameter: &ParameterSpec, values: Vec<f32>, device: &Device) -> Tensor<2> {
    Tensor::from_data(TensorData::new(values, matrix_shape(parameter)), device)
}

/// Uploads named tensors in canonical order.
pub(crate) fn from_named(
    schema: &ParameterSchema,
    named: &NamedTensors,
    device: &Device,
) -> Result<Vec<Tensor<2>>, EngineError> {
    let flat = schema
        .flatten(named)
        .map_err(|mismatch| EngineError::Shape { what: mismatch.name, reason: mismatch.reason })?;
    Ok(schema.parameters().iter().map(|p| upload(p, flat[p.range.clone()].to_vec(), device)).collect())
}

/// Downloads all tensors under their names.
pub(crate) fn to_named(
    schema: &ParameterSchema,
    tensors: &[Tensor<2>],
    device_name: &str,
) -> Result<NamedTensors, EngineError> {
    let download_one = |(parameter, tensor): (&ParameterSpec, &Tensor<2>)| {
        let values = download(tensor, device_name)?;
        Ok((parameter.name.clone(), base::HostTensor { shape: parameter.shape.clone(), values }))
    };
    schema.parameters().iter().zip(tensors).map(download_one).collect()
}

/// Elements of a tensor, row-major.
pub(crate) fn download<const D: usize>(tensor: &Tensor<D>, device_name: &str) -> Result<Vec<f32>, EngineError> {
    let data = tensor.clone().try_into_data().map_err(|error| failure::classify(device_name, &error.to_string()))?;
    data.try_into_vec::<f32>().map_err(|error| failure::classify(device_name, &format!("{error:?}")))
}

/// Where a fragment and one parameter overlap: `(elements of the parameter, elements of the fragment's values)`.
fn overlaps(fragment: &Fragment, parameter: &ParameterSpec) -> Vec<(Range<usize>, Range<usize>)> {
    let mut offset = 0;
    let mut found = Vec::new();
    for range in &fragment.ranges {
        let start = range.start.max(parameter.range.start);
        let end = range.end.min(parameter.range.end);
        if start < end {
            let inside = start - parameter.range.start..end - parameter.range.start;
            let values_start = offset + start - range.start;
            found.push((inside, values_start..values_start + end - start));
        }
        offset += range.len();
    }
    found
}

/// Copies the elements of a checked fragment to `values`.
pub(crate) fn read_fragment(
    schema: &ParameterSchema,
    tensors: &[Tensor<2>],
    fragment: &Fragment,
    values: &mut [f32],
    (block_kernels, device_name): (BlockKernels, &str),
) -> Result<(), EngineError> {
    for (parameter, tensor) in schema.parameters().iter().zip(tensors) {
        let parts = overlaps(fragment, parameter);
        if parts.is_empty() {
            continue;
        }
        if block_kernels == BlockKernels::Fused {
            for (inside, outside) in parts {
                kernels::parameters::read(tensor, inside, &mut values[outside]);
            }
            continue;
        }
        let elements = download(tensor, device_name)?;
        for (inside, outside) in parts {
            values[outside].copy_from_slice(&elements[inside]);
        }
    }
    Ok(())
}

/// Adds `change` to the elements of a checked fragment, where the device's memory is the host's.
pub(crate) fn add_to_fragment(
    schema: &ParameterSchema,
    tensors: &mut [Tensor<2>],
    fragment: &Fragment,
    change: &[f32],
) {
    for (parameter, tensor) in schema.parameters().iter().zip(tensors) {
        for (inside, outside) in overlaps(fragment, parameter) {
            kernels::parameters::add(tensor, inside, &change[outside]);
        }
    }
}

/// Tensors with the elements of a checked fragment replaced, by their place in canonical order.
pub(crate) fn written(
    schema: &ParameterSchema,
    tensors: &[Tensor<2>],
    fragment: &Fragment,
    values: &[f32],
    device: &Device,
    device_name: &str,
) -> Result<Vec<(usize, Tensor<2>)>, EngineError> {
    let mut changed = Vec::new();
    for (index, (parameter, tensor)) in schema.parameters().iter().zip(tensors).enumerate() {
        let parts = overlaps(fragment, parameter);
        let covered: usize = parts.iter().map(|(inside, _)| inside.len()).sum();
        if covered == 0 {
            continue;
        }
        let mut elements =
            if covered == parameter.range.len() { vec![0.0; covered] } else { download(tensor, device_name)? };
        for (inside, outside) in parts {
            elements[inside].copy_from_slice(&values[outside]);
        }
        changed.push((index, upload(parameter, elements, device)));
    }
    Ok(changed)
}
