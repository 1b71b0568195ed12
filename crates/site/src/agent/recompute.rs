//! Steps that are made twice, as the agent sees them.

use super::{Agent, AgentError};
use crate::host::HostJob;
use base::Round;
use rounds::{MemberEvent, StepMismatch, StepVerdict};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use telemetry::Event;

impl Agent {
    /// The engine's thread has made a step twice. Where the results differ it has given up all jobs that had come by then: what comes now
    /// counts again.
    pub(super) async fn recomputed(
        &mut self,
        (round, attempt): (Round, u32),
        verdict: StepVerdict,
        abandoned: &Arc<AtomicBool>,
    ) -> Result<(), AgentError> {
        if let Some(mismatch) = verdict.mismatch {
            if self.ending.is_none() && Arc::ptr_eq(&self.abandon, abandoned) {
                self.abandon = Arc::default();
            }
            // Own deltas on their way will not be merged, and must not come with the next one.
            self.host_job(HostJob::Withdraw);
            self.emit(self.mismatch_event(round, verdict.step, mismatch));
        }
        self.feed(MemberEvent::Recomputed { round, attempt, verdict }).await
    }

    fn mismatch_event(&self, round: Round, step: u64, mismatch: StepMismatch) -> Event {
        let StepMismatch { quantity, difference, bound } = mismatch;
        let (site, engine) = (self.site, self.engine.device.engine.clone());
        let (quantity, by) = (quantity.name().to_owned(), "itself".to_owned());
        Event::StepMismatch { site, engine, round, step, quantity, difference, bound, by }
    }
}
