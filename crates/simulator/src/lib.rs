//! A simulator of whole runs: virtual time, links, disks and faults drive the code that ships, on one thread, from a seed.
//!
//! What ships and runs here: the coordinator's decisions and its shell ([`coordinator::Desk`]), its log in its database, on a disk that
//! loses what was not synced; the member of each site, the codecs, the merge and the outer step on real parameters. What is the simulator's
//! own is what surrounds them: the site's shell, which does what `site::agent` does in the same order; a small engine; links. See
//! `docs/simulator.md`.
//!
//! A run has a phase of faults, drawn from the seed; then all are mended, and it must heal, go on and end. While it runs, the
//! [`checkers`] watch what can be seen of it. The same seed and options give the same run, to the last bit.
//!
//! [`fleet`] is leaner and larger: months of sites that a plan describes, for how much of their time becomes tokens.

mod around;
pub mod checkers;
mod coordinator_node;
mod disk;
mod faults;
pub mod fleet;
mod network;
mod options;
mod queue;
mod runner;
mod scenario;
mod site;
mod trace;
mod world;

pub use checkers::Violation;
pub use options::{Options, Sabotage};
pub use runner::{Outcome, Progress, run, run_many};
