//! Parameters of `flex` lie in the host's memory: they are read and changed where they are, without a copy of a tensor.

use super::{FlexTensor, values};
use burn::backend::Flex;
use burn::tensor::Tensor;
use std::ops::Range;

/// Takes a tensor's primitive out, to be put back.
pub(super) fn take(tensor: &mut Tensor<2>) -> FlexTensor {
    let placeholder = Tensor::empty([1, 1], &tensor.device());
    primitive(std::mem::replace(tensor, placeholder))
}

pub(super) fn primitive(tensor: Tensor<2>) -> FlexTensor {
    tensor
        .try_into_primitive::<Flex>()
        .unwrap_or_else(|error| unreachable!("fused kernels are chosen for flex only: {error:?}"))
}

/// Copies some elements of a parameter to `target`, which is as long as `elements`.
pub(crate) fn read(parameter: &Tensor<2>, elements: Range<usize>, target: &mut [f32]) {
    target.copy_from_slice(&values(&primitive(parameter.clone()).to_contiguous())[elements]);
}

/// Adds `change`, which is as long as `elements`, to some elements of a parameter.
pub(crate) fn add(parameter: &mut Tensor<2>, elements: Range<usize>, change: &[f32]) {
    let mut taken = take(parameter);
    let changed = &mut taken.storage_mut::<f32>()[elements];
    changed.iter_mut().zip(change).for_each(|(value, change)| *value += change);
    *parameter = Tensor::from_primitive::<Flex>(taken);
}
