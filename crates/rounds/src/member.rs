//! A site's side of the protocol as a state machine: directives and local results in, commands out.
//!
//! It holds no tensor. The shell (`site`) trains, encodes, fetches, merges and applies as told and reports back with events. Two
//! things go on side by side at a site, and the order inside each is kept here:
//!
//! - the *engine* trains the rounds it has a part in, one after the other, takes a snapshot at the end of each, and takes over merged
//!   fragments at the points that the plan names ([`crate::schedule`]). It is told of work ahead, so that it never idles while there
//!   is some, and is held back only at a point whose commit has not been merged here yet;
//! - the *host* encodes snapshots, fetches the others' deltas, and merges commits in order: each when all its deltas are held and
//!   the own snapshot of that round, which is taken against the state before it, has been encoded.
//!
//! In a sharded round the host also merges one part of all deltas for everybody ([`sharded`]), and the commit is made of the merged parts.
//!
//! A coordinator of an older term is refused, whatever it says: it tells its term before it asks for anything. The shell keeps the newest
//! term on disk ([`Member::term`], [`Member::after_term`]), so that a site that starts again refuses it as well. Commits are another
//! matter: those that a newcomer must catch up with were made in the terms of their time, and come from the coordinator of this one.

mod sharded;

use crate::exchange::{MergedPart, is_cut};
use crate::ledger::SampleRange;
use crate::plan::{
    Assignment, Commit, Contribution, Contributor, Directive, FragmentPlan, LeaveReason, Peer, Report, RoundPlan,
};
use crate::recompute::StepVerdict;
use base::{ContentHash, Round, SiteId, Term};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;
use std::sync::Arc;

/// Commits that may wait to be merged, and plans that may wait for the engine. The coordinator never sends as many; a peer that does
/// is refused.
pub const WAITING_MAX: usize = 65_536;

/// No run has more rounds: its inner steps are at most 2^40, and what only synchronises at its end adds a few.
const ROUND_MAX: Round = Round(1 << 41);

/// What happened at a site.
#[derive(Debug, Clone, PartialEq)]
pub enum MemberEvent {
    /// The coordinator said something.
    Directive(Directive),
    /// The snapshot of a round is encoded and being served.
    Encoded {
        /// Round of the plan.
        round: Round,
        /// What this site has to give.
        contribution: Contribution,
        /// BLAKE3 of its slice for each part of the plan.
        slice_hashes: Vec<ContentHash>,
    },
    /// A delta is held and its hash is right.
    DeltaHeld {
        /// Round of the plan.
        round: Round,
        /// Whose.
        from: SiteId,
    },
    /// The slice of a delta is held and its hash is right.
    SliceHeld {
        /// Round of the plan.
        round: Round,
        /// Whose.
        from: SiteId,
    },
    /// A step of a plan was made twice, as it asks. Where the results differ, the engine has begun anew from the global state, and does
    /// nothing more of what it was told before.
    Recomputed {
        /// Round of the plan.
        round: Round,
        /// Attempt of the plan.
        attempt: u32,
        /// What came of it.
        verdict: StepVerdict,
    },
    /// This site's part is merged and being served.
    Reduced {
        /// Round of the plan.
        round: Round,
        /// BLAKE3 of it.
        hash: ContentHash,
    },
    /// A merged part is held and its hash is right.
    PartHeld {
        /// Round of the plan.
        round: Round,
        /// Who merged it.
        from: SiteId,
    },
    /// The global state of a round is in place.
    StateHeld {
        /// Its round.
        round: Round,
        /// Its hash.
        state_hash: ContentHash,
    },
    /// The state could not be fetched; what was held before is still there.
    StateUnavailable,
    /// A commit is part of the global state.
    Merged {
        /// Its round.
        round: Round,
        /// Hash of the state after it.
        state_hash: ContentHash,
    },
    /// The line to the coordinator was broken and is made anew. What was said meanwhile is lost on both sides.
    Reconnected,
    /// Somebody asked this process to stop.
    StopRequested,
}

/// What the shell must do. Commands for the engine are done one after the other in this order, and so are those for the host.
#[derive(Debug, Clone, PartialEq)]
pub enum MemberCommand {
    /// Send to the coordinator.
    Report(Report),
    /// The other sites are now these.
    Peers(Vec<Peer>),
    /// Fetch the state of a commit from one of these sites.
    FetchState {
        /// The commit that made it.
        commit: Commit,
        /// The hash it must have.
        state_hash: ContentHash,
        /// Who holds it.
        from: Vec<SiteId>,
    },
    /// Engine: make some inner steps of the assignment.
    Train {
        /// The plan it is part of.
        plan: RoundPlan,
        /// This site's work.
        assignment: Assignment,
        /// Which steps of it, from 0.
        steps: Range<u64>,
    },
    /// Engine: take a snapshot of the plan's fragment, to be encoded.
    Snapshot {
        /// The plan it is part of.
        plan: RoundPlan,
    },
    /// Engine: take over the fragment that this commit merged.
    Apply {
        /// The commit's round.
        round: Round,
    },
    /// Engine: forget all work that is not done; what was trained in rounds that are not committed is lost.
    Abandon,
    /// Fetch a delta from the site that made it, or from any other that holds it.
    FetchDelta {
        /// Round of the plan.
        round: Round,
        /// Which fragment of how many.
        fragment: FragmentPlan,
        /// What to fetch.
        contributor: Contributor,
    },
    /// Fetch the slice of a delta from the site that made it.
    FetchSlice {
        /// Round of the plan.
        round: Round,
        /// Which fragment of how many.
        fragment: FragmentPlan,
        /// Which values of it: those that this site merges.
        values: Range<u64>,
        /// Whose.
        from: SiteId,
        /// BLAKE3 of the slice.
        hash: ContentHash,
    },
    /// Host: merge the slices of these, in this order, and serve the result.
    Reduce {
        /// Round of the plan.
        round: Round,
        /// Which fragment of how many.
        fragment: FragmentPlan,
        /// Which values of it.
        values: Range<u64>,
        /// Whose, with their weights.
        contributors: Vec<Contributor>,
    },
    /// Fetch a merged part from the site that made it, or from any other that holds it.
    FetchPart {
        /// Round of the plan.
        round: Round,
        /// Which fragment of how many.
        fragment: FragmentPlan,
        /// What to fetch.
        part: MergedPart,
    },
    /// Host: merge, or take the merged parts, and take the outer step.
    Merge(Commit),
    /// Host and engine: after the merge of that round, compute the gradient of these samples at the global parameters and report it.
    Witness {
        /// The round.
        round: Round,
        /// Positions of the sample order.
        samples: Vec<SampleRange>,
    },
    /// Save everything and end the process well.
    Finish {
        /// Last committed round.
        round: Round,
        /// What every site holds.
        state_hash: ContentHash,
    },
    /// Save what is held and end the process, for this reason.
    Quit(LeaveReason),
}

/// A directive that the protocol does not allow here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the coordinator sent {what}, but this site is at round {round}, term {term}")]
pub struct ProtocolError {
    /// What was sent.
    pub what: String,
    /// Last committed round here.
    pub round: Round,
    /// Newest term seen here.
    pub term: Term,
}

/// How far the engine has been told to go in a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Start,
    Middle,
}

/// A site of one run.
#[derive(Debug, Clone)]
pub struct Member {
    site: SiteId,
    tokens_per_second: f64,
    /// Newest term of a coordinator that was followed.
    term: Term,
    /// Term of the last commit.
    commit_term: Term,
    /// Last commit that is part of the global state here, and the state's hash.
    round: Round,
    state_hash: ContentHash,
    /// Last commit that the engine has been told to take over.
    applied: Round,
    plans: BTreeMap<Round, RoundPlan>,
    /// The round that the engine is told of next, and where in it.
    next: (Round, Place),
    encoded: BTreeSet<Round>,
    announced: BTreeMap<(Round, SiteId), Contributor>,
    held: BTreeSet<(Round, SiteId)>,
    shards: sharded::Shards,
    /// Ascending, without gaps, the next to be merged first.
    commits: VecDeque<Commit>,
    merging: bool,
    /// The coordinator is back, or asks for it, and has not been told yet what this site holds.
    rejoining: bool,
    /// The newest number of [`Directive::Recall`] over this connection.
    recall: u32,
    /// A state was asked for, and has neither come nor been given up: what this site will hold is not known.
    fetching_state: bool,
    finish: Option<(Round, ContentHash)>,
}

impl Member {
    /// A site that holds the state of `round` and trains `tokens_per_second` alone.
    pub fn new(site: SiteId, round: Round, state_hash: ContentHash, tokens_per_second: f64) -> Self {
        Self {
            site,
            tokens_per_second,
            term: Term(0),
            commit_term: Term(0),
            round,
            state_hash,
            applied: round,
            plans: BTreeMap::new(),
            next: (round.next(), Place::Start),
            encoded: BTreeSet::new(),
            announced: BTreeMap::new(),
            held: BTreeSet::new(),
            shards: sharded::Shards::default(),
            commits: VecDeque::new(),
            merging: false,
            rejoining: false,
            recall: 0,
            fetching_state: false,
            finish: None,
        }
    }

    /// The same for a site that has followed a coordinator of `term` before: no older one is followed any more.
    #[must_use]
    pub fn after_term(self, term: Term) -> Self {
        Self { term: self.term.max(term), ..self }
    }

    /// The same for a site that was recalled before its engine was ready: [`Directive::Recall`].
    #[must_use]
    pub fn after_recall(self, recall: u32) -> Self {
        Self { recall, ..self }
    }

    /// Newest term of a coordinator that was followed: to be on disk before what [`Member::handle`] gave is done.
    pub fn term(&self) -> Term {
        self.term
    }

    /// What to say first.
    pub fn start(&self) -> MemberCommand {
        self.ready()
    }

    /// Last committed round that is part of the global state here.
    pub fn round(&self) -> Round {
        self.round
    }

    /// Last commit that has come; it may not be merged yet.
    pub fn newest_commit(&self) -> Round {
        self.last_commit()
    }

    fn ready(&self) -> MemberCommand {
        let Self { round, state_hash, tokens_per_second, recall, .. } = *self;
        MemberCommand::Report(Report::Ready { round, state_hash, tokens_per_second, recall })
    }

    /// Takes one event.
    ///
    /// # Errors
    /// A directive that the protocol does not allow: the site must leave.
    pub fn handle(&mut self, event: MemberEvent) -> Result<Vec<MemberCommand>, ProtocolError> {
        let mut commands = Vec::new();
        match event {
            MemberEvent::Directive(directive) => self.follow(directive, &mut commands)?,
            MemberEvent::Encoded { round, contribution, slice_hashes } => {
                self.encoded(round, contribution, slice_hashes, &mut commands);
            }
            MemberEvent::Recomputed { round, attempt, verdict } => {
                commands.push(MemberCommand::Report(Report::Recomputed { round, attempt, verdict }));
                if verdict.mismatch.is_some() && self.attempt(round) == attempt {
                    self.give_up_own_work();
                }
            }
            MemberEvent::DeltaHeld { round, from } => self.delta_held(round, from, &mut commands),
            MemberEvent::SliceHeld { round, from } => self.slice_held(round, from, &mut commands),
            MemberEvent::Reduced { round, hash } => self.reduced(round, hash, &mut commands),
            MemberEvent::PartHeld { round, from } => self.part_held(round, from, &mut commands),
            MemberEvent::StateHeld { round, state_hash } => {
                self.start_over(round, state_hash);
                commands.push(self.ready());
            }
            MemberEvent::StateUnavailable => {
                (self.fetching_state, self.rejoining) = (false, false);
                commands.push(self.ready());
            }
            MemberEvent::Merged { round, state_hash } => self.merged(round, state_hash, &mut commands),
            MemberEvent::Reconnected => (self.rejoining, self.recall) = (true, 0),
            MemberEvent::StopRequested => {
                let reason = LeaveReason::Stopped;
                commands.push(MemberCommand::Report(Report::Leave { reason }));
                commands.push(MemberCommand::Quit(reason));
            }
        }
        self.merge_when_possible(&mut commands);
        self.rejoin_when_possible(&mut commands);
        self.drive_engine(&mut commands);
        self.finish_when_possible(&mut commands);
        Ok(commands)
    }

    fn refuse(&self, what: impl Into<String>) -> ProtocolError {
        ProtocolError { what: what.into(), round: self.round, term: self.term }
    }

    fn follow(&mut self, directive: Directive, commands: &mut Vec<MemberCommand>) -> Result<(), ProtocolError> {
        match directive {
            Directive::Peers(peers) => commands.push(MemberCommand::Peers(peers.to_vec())),
            Directive::FetchState { commit, .. } if commit.round > ROUND_MAX => {
                return Err(self.refuse(format!("the state of round {}", commit.round)));
            }
            Directive::FetchState { commit, state_hash, from } => {
                self.fetching_state = true;
                commands.push(MemberCommand::Abandon);
                let (commit, from) = (Arc::unwrap_or_clone(commit), from.to_vec());
                commands.push(MemberCommand::FetchState { commit, state_hash, from });
            }
            Directive::Begin(plan) => self.begin(Arc::unwrap_or_clone(plan), commands)?,
            Directive::DeltaReady { term, round, contributor } => {
                if let Some(fragment) = self.planned(term, round).map(|plan| plan.fragment) {
                    self.announce(round, fragment, contributor, commands);
                }
            }
            Directive::SliceReady { term, round, from, hash } => {
                self.slice_ready((term, round), from, hash, commands)?;
            }
            Directive::Reduce { term, round, contributors } => {
                self.reduce((term, round), contributors.to_vec(), commands)?;
            }
            Directive::PartReady { term, round, part } => {
                if let Some(fragment) = self.planned(term, round).map(|plan| plan.fragment) {
                    self.announce_part(round, fragment, part, commands)?;
                }
            }
            Directive::Witness { round, samples } => commands.push(MemberCommand::Witness { round, samples }),
            Directive::Commit(commit) => self.commit(Arc::unwrap_or_clone(commit), commands)?,
            Directive::Finish { round, state_hash } => self.finish = Some((round, state_hash)),
            Directive::Dropped { reason } => commands.push(MemberCommand::Quit(reason)),
            Directive::Lead { term } if term < self.term => {
                return Err(self.refuse(format!("that it leads in the older term {term}")));
            }
            Directive::Lead { term } => self.term = term,
            Directive::Recall { number } => {
                (self.rejoining, self.recall) = (true, number);
                self.keep_what_can_be_merged();
            }
        }
        Ok(())
    }

    /// Forgets commits from the first on whose deltas are not all here.
    fn keep_what_can_be_merged(&mut self) {
        let held = self.commits.iter().take_while(|commit| self.holds_all(commit)).count();
        self.commits.truncate(held.max(usize::from(self.merging)));
    }

    fn planned(&self, term: Term, round: Round) -> Option<&RoundPlan> {
        self.plans.get(&round).filter(|plan| plan.term == term)
    }

    /// Fetches a delta that is not held and not on its way. The own one is, unless this process did not make it.
    fn announce(
        &mut self,
        round: Round,
        fragment: FragmentPlan,
        contributor: Contributor,
        commands: &mut Vec<MemberCommand>,
    ) {
        let key = (round, contributor.site);
        if contributor.site == self.site && self.works_in(round) {
            return;
        }
        if self.announced.insert(key, contributor).is_none() {
            commands.push(MemberCommand::FetchDelta { round, fragment, contributor });
        }
    }

    /// Of the plan for that round.
    fn attempt(&self, round: Round) -> u32 {
        self.plans.get(&round).map_or(0, |plan| plan.attempt)
    }

    fn works_in(&self, round: Round) -> bool {
        self.assignment(round).is_some()
    }

    fn assignment(&self, round: Round) -> Option<&Assignment> {
        self.plans.get(&round)?.assignments.iter().find(|assignment| assignment.site == self.site)
    }

    fn last_commit(&self) -> Round {
        self.commits.back().map_or(self.round, |commit| commit.round)
    }

    fn commit(&mut self, commit: Commit, commands: &mut Vec<MemberCommand>) -> Result<(), ProtocolError> {
        if commit.term < self.commit_term {
            return Err(self.refuse(format!("a commit of the older term {}", commit.term)));
        }
        if commit.round > Round(0) && (commit.term, commit.round) == (self.commit_term, self.last_commit()) {
            // Said twice: in one term a round is committed once.
            return Ok(());
        }
        if commit.round != self.last_commit().next() || self.commits.len() >= WAITING_MAX {
            return Err(self.refuse(format!("a commit of round {}", commit.round)));
        }
        if !commit.parts.is_empty() {
            self.announce_parts(&commit, commands)?;
            self.commit_term = commit.term;
            self.commits.push_back(commit);
            return Ok(());
        }
        for contributor in &commit.contributors {
            let announced = self.announced.get(&(commit.round, contributor.site));
            if announced.is_some_and(|announced| announced != contributor) {
                return Err(self.refuse(format!("a commit with another delta of site {}", contributor.site)));
            }
            self.announce(commit.round, commit.fragment, *contributor, commands);
        }
        self.commit_term = commit.term;
        self.commits.push_back(commit);
        Ok(())
    }

    fn begin(&mut self, plan: RoundPlan, commands: &mut Vec<MemberCommand>) -> Result<(), ProtocolError> {
        if plan.term < self.term {
            return Err(self.refuse(format!("a plan of the older term {}", plan.term)));
        }
        if self.plans.get(&plan.round) == Some(&plan) {
            // Said twice.
            return Ok(());
        }
        let newest = self.plans.keys().next_back().copied().unwrap_or(Round(0)).max(self.last_commit());
        if !plan.parts.is_empty() && !is_cut(&plan.parts) {
            return Err(self.refuse(format!("a plan for round {} whose parts are not one after the other", plan.round)));
        }
        if plan.round <= self.last_commit() || plan.round > newest.next() || self.plans.len() >= WAITING_MAX {
            return Err(self.refuse(format!("a plan for round {}", plan.round)));
        }
        if self.plans.contains_key(&plan.round) {
            self.abandon_from(plan.round, commands);
        }
        self.term = plan.term;
        self.plans.insert(plan.round, plan);
        Ok(())
    }

    /// Rounds from this one on are planned anew. The engine begins from the global state: what it had not given for earlier rounds, which
    /// were committed without it, will not be given.
    fn abandon_from(&mut self, round: Round, commands: &mut Vec<MemberCommand>) {
        self.plans.retain(|planned, _| *planned < round);
        self.encoded.retain(|encoded| *encoded < round);
        self.announced.retain(|(announced, _), _| *announced < round);
        self.held.retain(|(held, _)| *held < round);
        self.shards.retain(|planned| planned < round);
        self.give_up_own_work();
        commands.push(MemberCommand::Abandon);
        self.next = (round, Place::Start);
    }

    /// Only follows in rounds for which it has nothing to give yet.
    fn give_up_own_work(&mut self) {
        for (_, plan) in self.plans.iter_mut().filter(|(planned, _)| !self.encoded.contains(planned)) {
            plan.assignments.retain(|assignment| assignment.site != self.site);
        }
    }

    /// A state has been fetched: whatever was going on is void.
    fn start_over(&mut self, round: Round, state_hash: ContentHash) {
        let Self { term, recall, .. } = *self;
        *self = Self { term, recall, ..Self::new(self.site, round, state_hash, self.tokens_per_second) };
    }

    fn encoded(
        &mut self,
        round: Round,
        contribution: Contribution,
        slice_hashes: Vec<ContentHash>,
        commands: &mut Vec<MemberCommand>,
    ) {
        if self.works_in(round) {
            self.encoded.insert(round);
            self.held.insert((round, self.site));
            let attempt = self.attempt(round);
            commands.push(MemberCommand::Report(Report::Computed { round, attempt, contribution, slice_hashes }));
        }
    }

    fn delta_held(&mut self, round: Round, from: SiteId, commands: &mut Vec<MemberCommand>) {
        if round > self.round && self.announced.contains_key(&(round, from)) {
            self.held.insert((round, from));
            commands.push(MemberCommand::Report(Report::Holds { round, attempt: self.attempt(round), from }));
        }
    }

    fn holds_all(&self, commit: &Commit) -> bool {
        match commit.parts.is_empty() {
            true => commit.contributors.iter().all(|contributor| self.held.contains(&(commit.round, contributor.site))),
            false => self.shards.hold_all(commit),
        }
    }

    fn merge_when_possible(&mut self, commands: &mut Vec<MemberCommand>) {
        let Some(commit) = self.commits.front() else { return };
        let round = commit.round;
        let own_taken = self.encoded.contains(&round) || !self.works_in(round);
        if !self.merging && self.holds_all(commit) && own_taken {
            self.merging = true;
            commands.push(MemberCommand::Merge(commit.clone()));
        }
    }

    fn merged(&mut self, round: Round, state_hash: ContentHash, commands: &mut Vec<MemberCommand>) {
        // Not so after `start_over`.
        if !std::mem::take(&mut self.merging) || self.commits.pop_front().is_none() {
            return;
        }
        (self.round, self.state_hash) = (round, state_hash);
        self.announced.retain(|(announced, _), _| *announced > round);
        self.held.retain(|(held, _)| *held > round);
        self.shards.retain(|planned| planned > round);
        self.encoded.retain(|encoded| *encoded > round);
        self.forget_plans();
        commands.push(MemberCommand::Report(Report::Applied { round, state_hash }));
    }

    /// To a coordinator that is back a site is a newcomer with the state that it holds. Commits that had come before the line broke
    /// are merged first: they are in the coordinator's log, and what they need was held by sites. It asks again
    /// ([`Directive::Recall`]) where that may have been lost. Rounds that are not committed are planned anew. A state that is on its way is
    /// waited for: the coordinator is told of one state only.
    fn rejoin_when_possible(&mut self, commands: &mut Vec<MemberCommand>) {
        if self.rejoining && self.commits.is_empty() && !self.fetching_state {
            self.start_over(self.round, self.state_hash);
            commands.push(MemberCommand::Abandon);
            commands.push(self.ready());
        }
    }

    /// A plan is needed until the engine is through with it and its commit is merged.
    fn forget_plans(&mut self) {
        let (next, merged) = (self.next.0, self.round);
        self.plans.retain(|round, _| *round >= next || *round > merged);
    }

    /// Tells the engine of all work that it can do without waiting for a commit.
    fn drive_engine(&mut self, commands: &mut Vec<MemberCommand>) {
        loop {
            let (round, place) = self.next;
            let Some(assignment) = self.assignment(round) else {
                // Nothing to train: what is merged takes effect at once, before the next plan can come.
                if !self.plans.contains_key(&round) && round > self.round {
                    return self.apply_through(self.round, commands);
                }
                self.next = (round.next(), Place::Start);
                self.forget_plans();
                continue;
            };
            let (assignment, plan) = (assignment.clone(), self.plans[&round].clone());
            let middle = plan.effects.after_own_steps(assignment.steps, plan.steps);
            let (needed, steps) = match place {
                Place::Start => (plan.effects.before, 0..middle),
                Place::Middle => (plan.effects.during, middle..assignment.steps),
            };
            // What was committed before this site came is in its state.
            self.apply_through(needed.min(self.round), commands);
            if self.applied < needed {
                return;
            }
            if !steps.is_empty() {
                commands.push(MemberCommand::Train { plan: plan.clone(), assignment, steps });
            }
            self.next = match place {
                Place::Start => (round, Place::Middle),
                Place::Middle => {
                    commands.push(MemberCommand::Snapshot { plan });
                    (round.next(), Place::Start)
                }
            };
            self.forget_plans();
        }
    }

    fn apply_through(&mut self, round: Round, commands: &mut Vec<MemberCommand>) {
        while self.applied < round {
            self.applied = self.applied.next();
            commands.push(MemberCommand::Apply { round: self.applied });
        }
    }

    /// The end comes when everything that was committed is merged.
    fn finish_when_possible(&mut self, commands: &mut Vec<MemberCommand>) {
        let Some((round, state_hash)) = self.finish.filter(|(round, _)| *round <= self.round) else { return };
        self.finish = None;
        self.apply_through(self.round, commands);
        commands.push(MemberCommand::Finish { round, state_hash });
        commands.push(MemberCommand::Report(Report::Leave { reason: LeaveReason::Finished }));
    }
}
