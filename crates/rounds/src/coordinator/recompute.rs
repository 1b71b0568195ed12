//! Steps that are recomputed, by their site ([`crate::recompute`]) and by others ([`crate::witness`]): which, and what follows where the
//! results differ.
//!
//! Nothing that such a site has not given to a commit can be told from the wrong step: what it delivered for open rounds is left out, its
//! leases go back, and it is recalled, so that it begins anew from the global state. That costs at most the rounds that are open. A site
//! that it happens to again soon is out of the run: its device is broken, and others can have its samples. Where one site stands against
//! one other it only begins anew, each time: it may be the other that is wrong.
//!
//! Nothing of it is in the durable log: a coordinator that is restarted trusts everybody anew.

use super::{Command, Coordinator, Note};
use crate::digest::TENSORS_MAX;
use crate::plan::{Assignment, Directive, LeaveReason, RoundPlan};
use crate::recompute::{Consequence, StepCheck, StepVerdict, choose};
use crate::witness::{Answer, Comparison, Judgement, choose_witnesses};
use base::{Round, SiteId, Term};

/// An answer that is not there after so many rounds will not come: its site has fetched a later state, or is far behind.
const ANSWER_ROUNDS_MAX: u64 = 16;

impl Coordinator {
    /// The step of a new plan that is made twice.
    pub(super) fn check(&mut self, plan: (Term, Round, u32), assignments: &[Assignment]) -> Option<StepCheck> {
        let check = choose(self.settings.seed, self.settings.sync.recompute_share, plan, assignments)?;
        let (_, round, attempt) = plan;
        self.checks.plan(round, attempt, check);
        Some(check)
    }

    /// A site has made a step twice.
    pub(super) fn recomputed(
        &mut self,
        site: SiteId,
        (round, attempt): (Round, u32),
        verdict: &StepVerdict,
        commands: &mut Vec<Command>,
    ) {
        if !verdict.is_acceptable() {
            return self.drop_site(site, LeaveReason::Misbehaved, commands);
        }
        let consequence = self.checks.settle(site, (round, attempt), verdict);
        if consequence != Consequence::Ignore {
            self.note_step(site, round, None, *verdict, commands);
        }
        self.follow_up(site, consequence, commands);
    }

    fn note_step(
        &self,
        site: SiteId,
        round: Round,
        by: Option<SiteId>,
        verdict: StepVerdict,
        commands: &mut Vec<Command>,
    ) {
        let engine = self.sites.get(&site).map(|site| site.device.engine.clone()).unwrap_or_default();
        commands.push(Command::Note(Note::StepRecomputed { site, engine, round, by, verdict }));
    }

    fn follow_up(&mut self, site: SiteId, consequence: Consequence, commands: &mut Vec<Command>) {
        match consequence {
            Consequence::Ignore | Consequence::GoOn => {}
            // One that takes no part has begun anew already.
            Consequence::BeginAnew if self.sites.get(&site).is_none_or(|site| site.since().is_none()) => {}
            Consequence::BeginAnew => self.recall(site, true, commands),
            Consequence::Leave => self.drop_site(site, LeaveReason::StepsDiffer, commands),
        }
    }

    /// Asks for the gradient of a step that was made twice in the round of that plan, which is being committed.
    pub(super) fn ask_witnesses(&mut self, plan: &RoundPlan, commands: &mut Vec<Command>) {
        let Some(StepCheck { site, step }) = plan.check.filter(|_| !self.awaits_answers(plan.round)) else { return };
        let (seed, share) = (self.settings.seed, self.settings.sync.witness_share);
        let chosen = choose_witnesses(seed, share, plan.round, &self.alike(site));
        let lease = plan.assignments.iter().find(|assignment| assignment.site == site);
        // A site that has left, or begins anew, has no part in the plan any more.
        let Some(samples) = lease.map(|assignment| assignment.step_lease(step)).filter(|_| !chosen.is_empty()) else {
            return;
        };
        let asked: Vec<SiteId> = std::iter::once(site).chain(chosen).collect();
        let (round, number) = (plan.round, plan.first_step + step + 1);
        let ask = |site: &SiteId| Command::Send(*site, Directive::Witness { round, samples: samples.clone() });
        commands.extend(asked.iter().map(ask));
        self.checks.comparison = Some(Comparison::new(round, number, asked));
    }

    /// Whether sites still compute what they were asked for last.
    fn awaits_answers(&self, round: Round) -> bool {
        self.checks.comparison.as_ref().is_some_and(|comparison| {
            round.0 <= comparison.round.0 + ANSWER_ROUNDS_MAX
                && comparison.asked.iter().all(|site| self.sites.contains_key(site))
        })
    }

    /// Others that take part and compute as that site does.
    fn alike(&self, id: SiteId) -> Vec<SiteId> {
        let kind = |id: &SiteId| {
            let site = self.sites.get(id).filter(|site| site.since().is_some())?;
            Some(site.device.kind()).filter(|kind| !kind.is_empty())
        };
        let Some(wanted) = kind(&id).filter(|_| self.settings.schema.parameters().len() <= TENSORS_MAX) else {
            return Vec::new();
        };
        let others = self.sites.current().iter().copied().filter(|other| *other != id);
        others.filter(|other| kind(other).as_ref() == Some(&wanted)).collect()
    }

    /// A site has computed a gradient that it was asked for.
    pub(super) fn witnessed(&mut self, site: SiteId, round: Round, answer: Answer, commands: &mut Vec<Command>) {
        let tensors = self.settings.schema.parameters().len();
        if !answer.digest.is_acceptable(tensors) || !answer.bounds.is_acceptable() {
            return self.drop_site(site, LeaveReason::Misbehaved, commands);
        }
        let comparison = self.checks.comparison.as_mut().filter(|comparison| comparison.round == round);
        if !comparison.is_some_and(|comparison| comparison.answer(site, answer)) {
            return;
        }
        let Some(comparison) = self.checks.comparison.take() else { return };
        let step = comparison.step;
        let Some(Judgement { accused, by, mismatch, is_certain }) = comparison.judge() else {
            let verdict = StepVerdict { step, seconds: 0.0, mismatch: None };
            if let [site, witness, ..] = comparison.asked[..] {
                self.note_step(site, round, Some(witness), verdict, commands);
            }
            return;
        };
        let verdict = StepVerdict { step, seconds: 0.0, mismatch: Some(mismatch) };
        self.note_step(accused, round, Some(by), verdict, commands);
        let consequence = if is_certain { self.checks.suspect(accused) } else { Consequence::BeginAnew };
        self.follow_up(accused, consequence, commands);
    }
}
