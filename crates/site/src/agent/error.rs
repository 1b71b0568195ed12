//! How a site's part in a run ends badly, and what it says then.

use crate::folder::FolderError;
use crate::join::JoinError;
use crate::trainer::TrainError;
use crate::watchdog::Hang;
use base::Hint;
use engine::EngineError;
use objects::OpenError;
use rounds::LeaveReason;
use wire::{IdentityError, ListenError};

/// Why a site's part ended badly.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AgentError {
    /// It did not get in.
    #[error(transparent)]
    Join(#[from] JoinError),
    /// The key of this machine.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The port for the other sites.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The object store.
    #[error(transparent)]
    Objects(#[from] OpenError),
    /// What is in the folder.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// The engine or the data.
    #[error(transparent)]
    Train(#[from] TrainError),
    /// It was asked to stop before it took part.
    #[error("asked to stop before it was ready")]
    Stopped,
    /// The coordinator went on without this site.
    #[error("the run goes on without this site: {}", describe(*.0))]
    Dropped(LeaveReason),
    /// The engine does not come back from a call: this process cannot go on with it.
    #[error(
        "engine {engine} hangs: '{call}' at inner step {step} of the run has not come back for {seconds:.0} s \
         (it may take {bound_seconds:.0} s)",
        call = .hang.call, step = .hang.step, seconds = .hang.seconds, bound_seconds = .hang.bound_seconds
    )]
    EngineHung {
        /// Engine and device.
        engine: String,
        /// Which call, since when.
        hang: Hang,
    },
    /// A thread or task of this process ended unexpectedly.
    #[error("the engine's thread ended: this is a bug")]
    Internal,
}

impl Hint for AgentError {
    fn hint(&self) -> Option<String> {
        match self {
            Self::Join(error) => error.hint(),
            Self::Identity(error) => error.hint(),
            Self::Listen(error) => error.hint(),
            Self::Objects(error) => error.hint(),
            Self::Folder(error) => error.hint(),
            Self::Train(error) => error.hint(),
            Self::Stopped => Some("run the same `beringia join` again: nothing was changed".to_owned()),
            Self::Dropped(LeaveReason::StepsDiffer) => Some(
                "look at this machine's device with `beringia doctor`, and join with another one or with other memory"
                    .to_owned(),
            ),
            Self::Dropped(_) => {
                Some("run the same `beringia join` again: it goes on from its last checkpoint".to_owned())
            }
            Self::EngineHung { .. } => Some(
                "see the device's driver messages (`dmesg | tail`), then run the same `beringia join` again: it goes on \
                 from its last checkpoint"
                    .to_owned(),
            ),
            Self::Internal => Some("report it with the last lines of events.jsonl; `beringia join` resumes".to_owned()),
        }
    }
}

/// A reason in words.
pub fn describe(reason: LeaveReason) -> &'static str {
    match reason {
        LeaveReason::Finished => "the run finished",
        LeaveReason::Stopped => "it was asked to stop",
        LeaveReason::ConnectionLost => "its connection was lost",
        LeaveReason::TooSlow => "it did not finish its inner steps before the deadline",
        LeaveReason::DeltasMissing => "it did not fetch the other sites' deltas before the deadline",
        LeaveReason::Diverged => "its state differs from that of the other sites",
        LeaveReason::Misbehaved => "it broke the protocol",
        LeaveReason::EngineFailed => "its engine failed",
        LeaveReason::EngineNotFinite => "its engine gave a number that is not finite",
        LeaveReason::EngineHung => "its engine did not come back from a call",
        LeaveReason::Revoked => "its key was revoked",
        LeaveReason::DeltaUnwanted => "no other site could take its delta before the deadline",
        LeaveReason::StepsDiffer => "its device computes the same inner step differently from one time to the next",
        _ => "for a reason that this version does not know",
    }
}

/// What the coordinator is told when the engine's thread ends with an error.
pub(super) fn leave_reason(error: &TrainError) -> LeaveReason {
    match error {
        TrainError::NotFinite { .. } | TrainError::Engine(EngineError::NotFinite { .. }) => {
            LeaveReason::EngineNotFinite
        }
        _ => LeaveReason::EngineFailed,
    }
}
