//! What every other crate names: ids, content hashes, the model's shape, the canonical order of its
//! parameters, the run configuration, seeded random numbers.
//!
//! Pure: no I/O, no clock, no global state.

pub mod batch;
pub mod config;
pub mod hash;
pub mod hint;
pub mod ids;
pub mod layout;
pub mod random;
pub mod schema;
pub mod shape;
pub mod tensor;
pub mod transformers;

pub use batch::TokenBatch;
pub use config::RunConfig;
pub use hash::ContentHash;
pub use hint::Hint;
pub use ids::{Round, SiteId, Term};
pub use schema::{Fragment, ParameterSchema, ParameterSpec};
pub use shape::ModelShape;
pub use tensor::{HostTensor, NamedTensors, TensorMismatch};
