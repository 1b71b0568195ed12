//! What a run says about itself. [`event`] is the vocabulary, [`log`] writes and reads it as JSON lines, [`view`]
//! folds it into the status of a run, [`terminal`] shows progress while training, [`audit`] checks the invariants of a run that
//! has happened.
//!
//! Every number a person or a tool sees comes from events, so that a status of yesterday's log is the status of
//! yesterday. Nothing here decides anything: no event is read back by the training itself.

pub mod audit;
pub mod event;
pub mod log;
pub mod reporter;
pub mod terminal;
pub mod view;

pub use audit::{Circumstances, Finding, ProcessLog, RunLogs, audit};
pub use event::{Event, LeaseShare, LedgerCounts, Record};
pub use log::{EventLog, Follower, LogError, read};
pub use reporter::{Reporter, Watcher};
pub use terminal::{EtaModel, Mode, Position, Progress};
pub use view::RunView;
