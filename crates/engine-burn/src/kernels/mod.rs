//! Blocks of the model fused by hand for the CPU, as operations of a Burn backend.
//!
//! [`FusedBlocks`] extends Burn's backends: `flex` computes forward, and autodiff over `flex` registers the
//! hand-written backward pass as one node of Burn's graph. `block` and `head` are plain functions on slices and know
//! nothing of Burn; this file and `autodiff` carry tensors to them and back.

mod adamw;
mod attention;
mod autodiff;
mod block;
mod buffers;
mod elementwise;
mod head;
mod linear;
pub(crate) mod parameters;

pub(crate) use adamw::{adamw, sum_of_squares};
pub(crate) use attention::AttentionSpec;

use crate::model::Block;
use attention::Rotary;
use block::Weights;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, Dispatch, Flex, backend_extension};
use burn::tensor::{Int, Tensor, TensorData};

/// The fused operations. Tensors are f32 and row-major; shapes as in [`crate::model`].
#[backend_extension(Autodiff, Flex)]
pub(crate) trait FusedBlocks: Backend {
    /// Rows `[n, h]` of the table `[v, h]`.
    fn embedding(table: FloatTensor<Self>, ids: IntTensor<Self>) -> FloatTensor<Self>;

    /// One transformer block on the residual stream `[n, h]`; `cosine` and `sine` `[t, d/2]` are constants.
    #[allow(clippy::too_many_arguments)] // The backend extension takes tensors one by one.
    fn transformer_block(
        x: FloatTensor<Self>,
        query: FloatTensor<Self>,
        key: FloatTensor<Self>,
        value: FloatTensor<Self>,
        output: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        down: FloatTensor<Self>,
        attention_norm: FloatTensor<Self>,
        feed_forward_norm: FloatTensor<Self>,
        cosine: FloatTensor<Self>,
        sine: FloatTensor<Self>,
        spec: AttentionSpec,
    ) -> FloatTensor<Self>;

    /// Final norm, output projection and summed cross-entropy: one element, nats.
    fn head_loss(
        x: FloatTensor<Self>,
        norm: FloatTensor<Self>,
        head: FloatTensor<Self>,
        targets: IntTensor<Self>,
        epsilon: f64,
    ) -> FloatTensor<Self>;
}

impl FusedBlocks for Flex {
    fn embedding(table: FloatTensor<Self>, ids: IntTensor<Self>) -> FloatTensor<Self> {
        let (hidden, rows) = (columns(&table), ids_of(&ids).len());
        tensor(head::embed(values(&table), hidden, ids_of(&ids)), [rows, hidden])
    }

    fn transformer_block(
        x: FloatTensor<Self>,
        query: FloatTensor<Self>,
        key: FloatTensor<Self>,
        value: FloatTensor<Self>,
        output: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        down: FloatTensor<Self>,
        attention_norm: FloatTensor<Self>,
        feed_forward_norm: FloatTensor<Self>,
        cosine: FloatTensor<Self>,
        sine: FloatTensor<Self>,
        spec: AttentionSpec,
    ) -> FloatTensor<Self> {
        let weights = [query, key, value, output, gate, up, down, attention_norm, feed_forward_norm];
        let (out, _) = block::forward(spec, rotary(&cosine, &sine), values(&x), weights_of(&weights));
        tensor(out, [spec.samples * spec.positions, columns(&x)])
    }

    fn head_loss(
        x: FloatTensor<Self>,
        norm: FloatTensor<Self>,
        head: FloatTensor<Self>,
        targets: IntTensor<Self>,
        epsilon: f64,
    ) -> FloatTensor<Self> {
        let (nats, _) = head::loss(values(&x), values(&norm), values(&head), ids_of(&targets), epsilon as f32);
        tensor(vec![nats as f32], [1])
    }
}

type FlexTensor = FloatTensor<Flex>;

/// Elements of a contiguous f32 tensor.
fn values(tensor: &FlexTensor) -> &[f32] {
    tensor.as_slice::<f32>().unwrap_or_else(|| unreachable!("the model makes contiguous f32 tensors only"))
}

/// Token ids.
fn ids_of(tensor: &IntTensor<Flex>) -> &[i32] {
    tensor.as_slice::<i32>().unwrap_or_else(|| unreachable!("the model makes contiguous i32 ids only"))
}

fn columns(tensor: &FlexTensor) -> usize {
    tensor.layout().shape()[1]
}

fn tensor<const D: usize>(values: Vec<f32>, shape: [usize; D]) -> FlexTensor {
    FlexTensor::from_data(TensorData::new(values, shape))
}

fn rotary<'a>(cosine: &'a FlexTensor, sine: &'a FlexTensor) -> Rotary<'a> {
    Rotary { cosine: values(cosine), sine: values(sine) }
}

fn weights_of(tensors: &[FlexTensor; block::BLOCK_WEIGHTS]) -> Weights<'_> {
    let [query, key, value, output, gate, up, down, attention_norm, feed_forward_norm] = tensors.each_ref().map(values);
    Weights { query, key, value, output, gate, up, down, attention_norm, feed_forward_norm }
}

/// [`FusedBlocks::embedding`] on Burn's tensors.
pub(crate) fn embedding(table_vh: Tensor<2>, ids_n: Tensor<1, Int>) -> Tensor<2> {
    Tensor::from_dispatch(Dispatch::embedding(table_vh.into_dispatch(), ids_n.into_dispatch()))
}

/// [`FusedBlocks::transformer_block`] on Burn's tensors.
pub(crate) fn block(
    x_nh: Tensor<2>,
    block: Block,
    cosine: Tensor<2>,
    sine: Tensor<2>,
    spec: AttentionSpec,
) -> Tensor<2> {
    Tensor::from_dispatch(Dispatch::transformer_block(
        x_nh.into_dispatch(),
        block.query.into_dispatch(),
        block.key.into_dispatch(),
        block.value.into_dispatch(),
        block.output.into_dispatch(),
        block.gate.into_dispatch(),
        block.up.into_dispatch(),
        block.down.into_dispatch(),
        block.attention_norm.into_dispatch(),
        block.feed_forward_norm.into_dispatch(),
        cosine.into_dispatch(),
        sine.into_dispatch(),
        spec,
    ))
}

/// [`FusedBlocks::head_loss`] on Burn's tensors.
pub(crate) fn head_loss(
    x_nh: Tensor<2>,
    norm_1h: Tensor<2>,
    head_vh: Tensor<2>,
    targets_n: Tensor<1, Int>,
    epsilon: f64,
) -> Tensor<1> {
    Tensor::from_dispatch(Dispatch::head_loss(
        x_nh.into_dispatch(),
        norm_1h.into_dispatch(),
        head_vh.into_dispatch(),
        targets_n.into_dispatch(),
        epsilon,
    ))
}
