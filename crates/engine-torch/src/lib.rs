//! The PyTorch engine: whatever device PyTorch drives, behind the same [`engine::Engine`] as the native one.
//!
//! [`TorchEngine`] starts a Python interpreter beside the agent and talks to it over a Unix socket: JSON objects say what
//! to do, tensors lie in a file in shared memory that both sides have open. The Python package is part of this binary
//! and unpacked at start, so an installed PyTorch is all that a site needs.
//!
//! `options` is what a user chooses; `package` the embedded Python; `process` starts, watches and ends the interpreter
//! through a `leash` and keeps the end of what it says (`tail`); `protocol` is the frames and their JSON; `arena` the
//! shared memory; `places` the two orders of the parameters; `engine` puts them together.
//!
//! What comes out of the other process is treated as input, not as truth: every length, count and number is checked
//! before it is used.
//!
//! # Unsafe code
//! Only in `arena`, where bytes are copied to and from the mapping; each use states why it is sound.

#[cfg(target_endian = "big")]
compile_error!("tensors are exchanged as little-endian f32: a big-endian host would have to swap them");

mod arena;
mod describe;
mod devices;
mod engine;
#[doc(hidden)]
pub mod fuzzing;
mod leash;
mod options;
mod package;
mod places;
mod process;
mod protocol;
mod tail;

pub use crate::describe::{DescribedModel, describe_model};
pub use crate::devices::{devices, measured_devices};
pub use crate::engine::TorchEngine;
pub use crate::options::{Compile, ModelDescription, Start, TorchOptions, positions_of};
pub use crate::process::TorchProcess;
