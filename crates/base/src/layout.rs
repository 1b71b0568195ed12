//! What lies where in a run's folder: the same on the coordinator's machine and at each site.
//!
//! ```text
//! run.toml                      settings (base::config)
//! data/                         manifest.json, tokenizer.json, token shards (data)
//! checkpoints/round-00000000/   the initial state, written by `beringia init`; later ones beside it (checkpoint)
//! events.jsonl                  what happened (telemetry)
//! state.fetched.partial         the run's state on its way to a site, with state.fetched.chunks (wire)
//! speed.json                    what a site's engine was measured at when it last started (site)
//! links.toml                    what lay between a lab's sites (cli)
//! identity.pem                  this machine's key (wire)
//! coordinator.redb              the coordinator's durable log (coordinator)
//! coordinator.jsonl             the same as earlier versions wrote it: taken over once
//! ```

/// Settings.
pub const RUN_FILE: &str = "run.toml";
/// Token shards, tokenizer and manifest.
pub const DATA_FOLDER: &str = "data";
/// Checkpoints.
pub const CHECKPOINTS_FOLDER: &str = "checkpoints";
/// The initial state, among the checkpoints.
pub const INITIAL_CHECKPOINT: &str = "round-00000000";
/// Event log.
pub const EVENTS_FILE: &str = "events.jsonl";
/// The run's state, fetched from other sites: there only until it is taken over.
pub const FETCHED_STATE_FILE: &str = "state.fetched";
/// Speed of a site's engine when it was last measured.
pub const SPEED_FILE: &str = "speed.json";
/// Newest term of a coordinator that a site has followed.
pub const TERM_FILE: &str = "term";
/// The coordinator's durable log.
pub const COORDINATOR_DATABASE: &str = "coordinator.redb";
/// The same as lines of JSON, as earlier versions wrote it.
pub const COORDINATOR_LOG: &str = "coordinator.jsonl";
