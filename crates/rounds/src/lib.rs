//! What is decided in a run, and nothing else: who takes part, who trains on which samples, when a round
//! closes, what the merged parameters are.
//!
//! Two state machines face each other, [`Coordinator`] and [`Member`]. Both take an event and return commands;
//! the shells around them (`coordinator`, `site`) own the sockets, the clock and the disk. The arithmetic that
//! every site repeats ([`merge`], [`outer`]) is here too, because it must be the same everywhere.
//!
//! Nothing here reads a clock, draws randomness or touches I/O: time is an argument.

pub mod adaptive;
pub mod clip;
mod codec;
pub mod coordinator;
pub mod digest;
pub mod exchange;
pub mod ledger;
pub mod member;
pub mod merge;
pub mod outer;
pub mod plan;
pub mod recompute;
pub mod routes;
pub mod schedule;
pub mod shares;
pub mod stall;
pub mod witness;

pub use clip::Clipped;
pub use codec::{EncoderMemory, FragmentCodec};
pub use coordinator::{Command, Coordinator, Event, Settings};
pub use digest::{DigestBounds, GradientDigest};
pub use exchange::{MergedPart, Part};
pub use ledger::{Ledger, LedgerTotals, SampleRange};
pub use member::{Member, MemberCommand, MemberEvent};
pub use merge::{Weighed, merge, merge_part, merge_weighed, token_weights, weigh};
pub use outer::{OuterOptimizer, OuterRule};
pub use plan::{
    Assignment, Commit, Contribution, Contributor, Directive, FragmentPlan, LeaveReason, LinkReport, Measurement, Peer,
    Report, RoundPlan, SiteDevice,
};
pub use recompute::{StepCheck, StepMismatch, StepQuantity, StepVerdict};
pub use routes::{OpenRoutes, Route, RouteChoice, RouteReason, Routes};
