//! The native engine: the Llama family on Burn, the device chosen at run time.
//!
//! The only crate that imports Burn. [`BurnEngine`] implements [`engine::Engine`]; `model` states the model in Burn's
//! operations for every device, `optimizer` is
//! `torch.optim.AdamW`, `weights` carries tensors over the seam.

mod engine;
mod model;
mod optimizer;
mod weights;

pub use engine::BurnEngine;
pub use model::BlockKernels;
