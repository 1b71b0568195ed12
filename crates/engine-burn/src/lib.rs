//! The native engine: the Llama family on Burn, the device chosen at run time.
//!
//! The only crate that imports Burn. [`BurnEngine`] implements [`engine::Engine`]; `model` states the model in Burn's
//! operations for every device, `kernels` holds its blocks fused by hand for the CPU, `optimizer` is
//! `torch.optim.AdamW`, `weights` carries tensors over the seam.
//!
//! # Unsafe code
//! Only in `kernels::linear`, where the `gemm` crate takes pointers and strides; the use states why it is sound.

mod engine;
mod kernels;
mod model;
mod optimizer;
mod weights;

pub use engine::BurnEngine;
pub use model::BlockKernels;
