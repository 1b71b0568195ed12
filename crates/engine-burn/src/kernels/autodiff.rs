//! The fused operations as nodes of Burn's autodiff graph.

use super::attention::AttentionSpec;
use super::block::BLOCK_WEIGHTS;
use super::buffers::recycle;
use super::{FlexTensor, FusedBlocks, block, columns, head, ids_of, rotary, tensor, values, weights_of};
use burn::backend::Flex;
use burn::backend::autodiff::Autodiff;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::{FloatTensor, IntTensor};
use std::sync::Arc;

/// Parents of a block's node: the residual stream and the parameters.
const BLOCK_PARENTS: usize = 1 + BLOCK_WEIGHTS;

#[derive(Debug)]
struct EmbeddingBackward;

impl Backward<Flex, 1> for EmbeddingBackward {
    /// Ids, and the number of rows of the table.
    type State = (IntTensor<Flex>, usize);

    fn backward(self, ops: Ops<Self::State, 1>, gradients: &mut Gradients, _: &mut Checkpointer) {
        let (ids, vocabulary) = ops.state;
        let gradient = gradients.consume::<Flex>(&ops.node).to_contiguous();
        let hidden = columns(&gradient);
        let table = head::embed_backward(values(&gradient), hidden, ids_of(&ids), vocabulary);
        let [parent] = ops.parents;
        if let Some(node) = parent {
            gradients.register::<Flex>(node.id, tensor(table, [vocabulary, hidden]));
        }
        recycle(gradient);
    }
}

#[derive(Debug)]
struct BlockBackward;

/// What a block's backward pass reads.
#[derive(Debug, Clone)]
struct BlockState {
    x: FlexTensor,
    weights: [FlexTensor; BLOCK_WEIGHTS],
    cosine: FlexTensor,
    sine: FlexTensor,
    saved: Arc<block::Saved>,
    spec: AttentionSpec,
}

impl Backward<Flex, BLOCK_PARENTS> for BlockBackward {
    type State = BlockState;

    fn backward(self, ops: Ops<Self::State, BLOCK_PARENTS>, gradients: &mut Gradients, _: &mut Checkpointer) {
        let BlockState { x, weights, cosine, sine, saved, spec } = ops.state;
        let d_out = gradients.consume::<Flex>(&ops.node).to_contiguous();
        let rotary = rotary(&cosine, &sine);
        let found = block::backward(spec, rotary, values(&x), weights_of(&weights), &saved, values(&d_out));
        let shape_of = |tensor: &FlexTensor| [tensor.layout().shape()[0], columns(tensor)];
        let tensors = std::iter::once(&x).chain(&weights);
        let results = std::iter::once(found.x_nh).chain(found.weights);
        for ((parent, like), gradient) in ops.parents.into_iter().zip(tensors).zip(results) {
            if let Some(node) = parent {
                gradients.register::<Flex>(node.id, tensor(gradient, shape_of(like)));
            }
        }
        recycle(d_out);
        recycle(x);
    }
}

#[derive(Debug)]
struct HeadLossBackward;

impl Backward<Flex, 3> for HeadLossBackward {
    /// The stream, the norm's weight, the output projection, and what was kept.
    type State = ([FlexTensor; 3], Arc<head::Saved>);

    fn backward(self, ops: Ops<Self::State, 3>, gradients: &mut Gradients, _: &mut Checkpointer) {
        let (inputs, saved) = ops.state;
        let upstream = gradients.consume::<Flex>(&ops.node).to_contiguous();
        let [x, norm, head] = inputs.each_ref().map(values);
        let (d_x, d_norm, d_head) = head::loss_backward(x, norm, head, &saved, values(&upstream)[0]);
        for ((parent, like), gradient) in ops.parents.into_iter().zip(&inputs).zip([d_x, d_norm, d_head]) {
            if let Some(node) = parent {
                let shape = [like.layout().shape()[0], columns(like)];
                gradients.register::<Flex>(node.id, tensor(gradient, shape));
            }
        }
        let [x, ..] = inputs;
        recycle(x);
    }
}

impl<C: CheckpointStrategy> FusedBlocks for Autodiff<Flex, C> {
    fn embedding(table: FloatTensor<Self>, ids: IntTensor<Self>) -> FloatTensor<Self> {
        match EmbeddingBackward.prepare::<C>([table.node()]).compute_bound().stateful() {
            OpsKind::Tracked(preparation) => {
                let table = table.primitive().clone();
                let vocabulary = table.layout().shape()[0];
                preparation.finish((ids.clone(), vocabulary), Flex::embedding(table, ids))
            }
            OpsKind::UnTracked(preparation) => preparation.finish(Flex::embedding(table.into_primitive(), ids)),
        }
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
        let [w0, w1, w2, w3, w4, w5, w6, w7, w8] = weights.each_ref().map(|weight| weight.node());
        let nodes = [x.node(), w0, w1, w2, w3, w4, w5, w6, w7, w8];
        let (cosine, sine) = (cosine.into_primitive(), sine.into_primitive());
        let preparation = BlockBackward.prepare::<C>(nodes).compute_bound().stateful();
        let (x, weights) = (x.into_primitive(), weights.map(|weight| weight.into_primitive()));
        let (out, saved) = block::forward(spec, rotary(&cosine, &sine), values(&x), weights_of(&weights));
        let out = tensor(out, [spec.samples * spec.positions, columns(&x)]);
        match preparation {
            OpsKind::Tracked(preparation) => {
                preparation.finish(BlockState { x, weights, cosine, sine, saved: Arc::new(saved), spec }, out)
            }
            OpsKind::UnTracked(preparation) => preparation.finish(out),
        }
    }

    fn head_loss(
        x: FloatTensor<Self>,
        norm: FloatTensor<Self>,
        head: FloatTensor<Self>,
        targets: IntTensor<Self>,
        epsilon: f64,
    ) -> FloatTensor<Self> {
        let nodes = [x.node(), norm.node(), head.node()];
        let preparation = HeadLossBackward.prepare::<C>(nodes).compute_bound().stateful();
        let inputs = [x.into_primitive(), norm.into_primitive(), head.into_primitive()];
        let [x, norm, head] = inputs.each_ref().map(values);
        let (nats, saved) = head::loss(x, norm, head, ids_of(&targets), epsilon as f32);
        let out = tensor(vec![nats as f32], [1]);
        match preparation {
            OpsKind::Tracked(preparation) => preparation.finish((inputs, Arc::new(saved)), out),
            OpsKind::UnTracked(preparation) => preparation.finish(out),
        }
    }
}
