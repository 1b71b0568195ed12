//! The coordinator's process around [`rounds::Coordinator`]: sockets, the durable log, the clock.
//!
//! It decides nothing itself and never touches a tensor: the [`desk`] moves messages to the state machine, does what that says in the
//! order it says it, and writes each decision to the [`store`] before its effect leaves the process; [`mod@serve`] gives it sockets and a
//! clock.

pub mod access;
pub mod desk;
pub mod files;
pub mod probes;
pub mod serve;
pub mod store;

pub use access::{Access, AccessError, AccessFolder, Door, Member};
pub use desk::{Briefing, Desk, DeskOptions, LinkNumber, Moment, Outlet, Summary, Verdict, Visitor};
pub use files::{FilesError, RunFiles};
pub use probes::ReferenceSource;
pub use serve::{ServeError, ServeOptions, serve};
pub use store::{DatabaseStore, FileStore, Line, Store, StoreError, open_log};
