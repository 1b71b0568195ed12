//! Where a run outlives its process: [`store`] keeps checkpoints that a crash, a full disk or a flipped bit
//! cannot turn into wrong numbers; [`huggingface`] writes and reads the folders that `transformers` uses;
//! [`tensors`] is the safetensors encoding that both share, also for sending.
//!
//! Only safetensors and bounded JSON are ever read. No format here can run code when it is loaded.

mod disk;
pub mod huggingface;
pub mod store;
pub mod tensors;

pub use huggingface::{ExportError, ImportError, export, export_described, import};
pub use store::{LoadError, Loaded, SaveError, Saved, Skipped, list, load, load_latest, save};
pub use tensors::{ReaderBounds, TensorsError, decode_tensors, encode_tensors};
