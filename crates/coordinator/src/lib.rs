//! The coordinator's process around [`rounds::Coordinator`]: sockets, the durable log, the clock.
//!
//! It decides nothing itself and never touches a tensor: it moves messages to the state machine, does what that says in the
//! order it says it, and writes each decision to the [`store`] before its effect leaves the process.

pub mod files;
pub mod probes;
pub mod serve;
pub mod store;

pub use files::{FilesError, RunFiles};
pub use probes::ReferenceSource;
pub use serve::{ServeError, ServeOptions, Summary, serve};
pub use store::{FileStore, Line, Store, StoreError};
