//! The agent of a site: trains a run on an engine, alone ([`train_alone`]) or together with other sites ([`join`]).
//!
//! [`folder`] says what lies where, [`state`] what is kept, [`trainer`] trains and takes over, [`merger`] does the arithmetic between sites; `worker`
//! and `host` give each a thread, [`watchdog`] sees when an engine does not come back, `shelf` serves what the others
//! fetch, `transit` fetches what they have, `line` keeps in touch with the coordinator, [`agent`] is the loop in which they meet.

pub mod agent;
pub mod alone;
pub mod folder;
mod host;
mod join;
mod known_speed;
mod line;
pub mod merger;
mod newcomer;
pub mod sampling;
mod shelf;
pub mod state;
pub mod trainer;
mod transit;
pub mod watchdog;
mod worker;

pub use agent::{AgentError, EngineFactory, JoinOptions, join};
pub use alone::train_alone;
pub use folder::{FolderError, RunFolder};
pub use join::JoinError;
pub use merger::{Clipped, Fragments, LocalChange, Merged, Merger};
pub use state::{GlobalState, Mode, SavedState, SharedState, TrainingState};
pub use trainer::{Evaluation, Progress, TrainError, Trainer};
pub use watchdog::HangBounds;
