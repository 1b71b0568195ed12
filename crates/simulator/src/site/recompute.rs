//! Steps that are made twice at a simulated site, as `site::worker` and `site::agent` have it.
//!
//! The simulated engine is exact, so a check shows nothing, except on machines that now and then compute something wrong: then the step comes
//! out otherwise, the engine goes back to the global state, and nothing that was told it before counts any more.

use super::engine::gradient;
use super::host::HostJob;
use super::{SiteDisk, SiteProcess};
use crate::around::Around;
use rounds::{
    Assignment, DigestBounds, GradientDigest, MemberEvent, Report, RoundPlan, SiteDevice, StepMismatch, StepQuantity,
    StepVerdict,
};
use std::ops::Range;
use wire::message::FromSite;

/// What a step costs that is made again: it changes nothing here when it takes longer.
const CHECK_SECONDS: f64 = 0.1;

impl SiteProcess {
    /// What a step among these shows that was made twice, where one is.
    pub(super) fn verdict(
        &self,
        plan: &RoundPlan,
        assignment: &Assignment,
        steps: &Range<u64>,
        around: &mut Around,
    ) -> Option<StepVerdict> {
        let check = plan.check.filter(|check| check.site == assignment.site && steps.contains(&check.step))?;
        let chance = around.scenario.miscomputes;
        // A seed whose machines are sound draws nothing: what happens to it does not depend on this.
        let is_wrong = chance > 0.0 && around.now < around.scenario.fault_seconds && around.random.next_unit() < chance;
        let mismatch = StepMismatch { quantity: StepQuantity::Movement, difference: 0.5, bound: 0.0 };
        let step = plan.first_step + check.step + 1;
        Some(StepVerdict { step, seconds: CHECK_SECONDS, mismatch: is_wrong.then_some(mismatch) })
    }

    /// Says what it computes on, where that is of use.
    pub(super) fn present(&mut self, around: &mut Around) {
        if self.config.sync.recompute_share > 0.0 {
            let (engine, precision) = ("simulated".to_owned(), "f32".to_owned());
            let device = SiteDevice { engine, precision, ..SiteDevice::default() };
            self.tell(FromSite::Report(Report::Device(device)), around);
        }
    }

    /// Answers what it was asked for once that is merged: at once, for the model is small.
    pub(super) fn witness(&mut self, around: &mut Around) {
        let (round, state_hash) = self.held;
        let Some((_, samples)) = self.witness.take_if(|(wanted, _)| *wanted <= round) else { return };
        let positions: Vec<u64> = samples.iter().flat_map(|range| range.start..range.end).collect();
        let gradient = gradient(&self.state.parameters, &positions);
        let digest = GradientDigest::of(1.0, &gradient, &self.config.schema(), round.0);
        let bounds = DigestBounds { loss: 0.0, gradient: 0.0 };
        self.tell(FromSite::Report(Report::Witnessed { round, state_hash, digest, bounds }), around);
    }

    pub(super) fn recomputed(
        &mut self,
        plan: &RoundPlan,
        verdict: StepVerdict,
        disk: &mut SiteDisk,
        around: &mut Around,
    ) {
        if verdict.mismatch.is_some() {
            self.generation += 1;
            self.start_over(around);
            self.host.queue.push_back(HostJob::Withdraw);
        }
        let (round, attempt) = (plan.round, plan.attempt);
        self.feed(MemberEvent::Recomputed { round, attempt, verdict }, disk, around);
    }
}
