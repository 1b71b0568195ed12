//! The native engine: the Llama family on Burn, the device chosen at run time.
//!
//! The only crate that imports Burn. [`BurnEngine`] implements [`engine::Engine`]; [`devices`] lists what this build can use of
//! this machine, [`measure_rates`] measures one. `model` states the model in Burn's operations for every device, `kernels` holds
//! its blocks fused by hand for the CPU, `optimizer` is `torch.optim.AdamW`, `weights` carries tensors over the seam.
//! `device` opens devices, `failure` turns their panics into errors, `memory` knows what does not fit before it is tried.
//!
//! # Unsafe code
//! Only in `kernels::linear`, where the `gemm` crate takes pointers and strides; the use states why it is sound.

mod device;
mod engine;
mod failure;
mod kernels;
mod memory;
mod model;
mod operations;
mod optimizer;
mod rates;
mod weights;

pub use device::devices;
pub use engine::BurnEngine;
pub use model::BlockKernels;
pub use rates::measure_rates;
