//! A site's side of the protocol as a state machine: directives and local results in, commands out.
//!
//! It holds no tensor. The shell (`site`) trains, fetches, merges and hashes as told and reports back with events. The
//! order of things is kept here: a commit is applied only when every contributor's delta is held and the engine is idle;
//! directives that arrive while a commit is being applied wait; a directive of an older term is refused.

use crate::plan::{Assignment, Commit, Contribution, Contributor, Directive, LeaveReason, Peer, Report, RoundPlan};
use base::{ContentHash, Round, SiteId, Term};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Directives that may wait while a commit is applied: one `Begin`, one `DeltaReady` a site, some `Peers`. The coordinator
/// never sends more; a peer that does is refused.
pub const BACKLOG_MAX: usize = 65_536;

/// What happened at a site.
#[derive(Debug, Clone, PartialEq)]
pub enum MemberEvent {
    /// The coordinator said something.
    Directive(Directive),
    /// The inner steps of the current plan are done and the delta is being served.
    Trained(Contribution),
    /// A delta is held and its hash is right.
    DeltaHeld {
        /// Round of the plan.
        round: Round,
        /// Whose.
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
    /// The commit has been applied.
    Applied {
        /// Its round.
        round: Round,
        /// Hash of the state after it.
        state_hash: ContentHash,
    },
    /// The engine failed or gave a number that is not finite.
    EngineFailed,
    /// Somebody asked this process to stop.
    StopRequested,
}

/// What the shell must do, in this order.
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
    /// Run the inner steps of the assignment.
    Train {
        /// The plan it is part of.
        plan: RoundPlan,
        /// This site's work.
        assignment: Assignment,
    },
    /// Stop training: its result is no longer wanted.
    AbandonTraining,
    /// Fetch a delta from the site that made it.
    FetchDelta {
        /// Round of the plan.
        round: Round,
        /// What to fetch.
        contributor: Contributor,
    },
    /// Merge and take the outer step.
    Apply(Commit),
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

/// A site of one run.
#[derive(Debug, Clone)]
pub struct Member {
    site: SiteId,
    tokens_per_second: f64,
    term: Term,
    round: Round,
    state_hash: ContentHash,
    plan: Option<RoundPlan>,
    training: bool,
    announced: BTreeMap<SiteId, Contributor>,
    held: BTreeSet<SiteId>,
    commit: Option<Commit>,
    applying: bool,
    backlog: VecDeque<Directive>,
}

impl Member {
    /// A site that holds the state of `round` and trains `tokens_per_second` alone.
    pub fn new(site: SiteId, round: Round, state_hash: ContentHash, tokens_per_second: f64) -> Self {
        Self {
            site,
            tokens_per_second,
            term: Term(0),
            round,
            state_hash,
            plan: None,
            training: false,
            announced: BTreeMap::new(),
            held: BTreeSet::new(),
            commit: None,
            applying: false,
            backlog: VecDeque::new(),
        }
    }

    /// What to say first.
    pub fn start(&self) -> MemberCommand {
        self.ready()
    }

    /// Last committed round that is applied here.
    pub fn round(&self) -> Round {
        self.round
    }

    fn ready(&self) -> MemberCommand {
        let Self { round, state_hash, tokens_per_second, .. } = *self;
        MemberCommand::Report(Report::Ready { round, state_hash, tokens_per_second })
    }

    /// Takes one event.
    ///
    /// # Errors
    /// A directive that the protocol does not allow: the site must leave.
    pub fn handle(&mut self, event: MemberEvent) -> Result<Vec<MemberCommand>, ProtocolError> {
        let mut commands = Vec::new();
        match event {
            MemberEvent::Directive(directive) if self.applying => self.postpone(directive)?,
            MemberEvent::Directive(directive) => self.follow(directive, &mut commands)?,
            MemberEvent::Trained(contribution) => self.trained(contribution, &mut commands),
            MemberEvent::DeltaHeld { round, from } => self.delta_held(round, from, &mut commands),
            MemberEvent::StateHeld { round, state_hash } => {
                (self.round, self.state_hash) = (round, state_hash);
                self.forget_round();
                commands.push(self.ready());
            }
            MemberEvent::StateUnavailable => commands.push(self.ready()),
            MemberEvent::Applied { round, state_hash } => self.applied(round, state_hash, &mut commands)?,
            MemberEvent::EngineFailed => Self::leave(LeaveReason::EngineFailed, &mut commands),
            MemberEvent::StopRequested => Self::leave(LeaveReason::Stopped, &mut commands),
        }
        self.apply_when_possible(&mut commands);
        Ok(commands)
    }

    fn leave(reason: LeaveReason, commands: &mut Vec<MemberCommand>) {
        commands.push(MemberCommand::Report(Report::Leave { reason }));
        commands.push(MemberCommand::Quit(reason));
    }

    fn refuse(&self, what: impl Into<String>) -> ProtocolError {
        ProtocolError { what: what.into(), round: self.round, term: self.term }
    }

    fn postpone(&mut self, directive: Directive) -> Result<(), ProtocolError> {
        if self.backlog.len() >= BACKLOG_MAX {
            return Err(self.refuse(format!("more than {BACKLOG_MAX} directives during one commit")));
        }
        self.backlog.push_back(directive);
        Ok(())
    }

    fn follow(&mut self, directive: Directive, commands: &mut Vec<MemberCommand>) -> Result<(), ProtocolError> {
        match directive {
            Directive::Peers(peers) => commands.push(MemberCommand::Peers(peers)),
            Directive::FetchState { commit, state_hash, from } => {
                self.stop_training(commands);
                commands.push(MemberCommand::FetchState { commit, state_hash, from });
            }
            Directive::Begin(plan) => self.begin(plan, commands)?,
            Directive::DeltaReady { term, round, contributor } => {
                let expected = self.plan.as_ref().is_some_and(|plan| plan.round == round && plan.term == term);
                if expected && contributor.site != self.site {
                    self.announced.insert(contributor.site, contributor);
                    commands.push(MemberCommand::FetchDelta { round, contributor });
                }
            }
            Directive::Commit(commit) => {
                if commit.term < self.term {
                    return Err(self.refuse(format!("a commit of the older term {}", commit.term)));
                }
                if commit.round != self.round.next() {
                    return Err(self.refuse(format!("a commit of round {}", commit.round)));
                }
                let announced = |c: &Contributor| self.announced.get(&c.site).is_none_or(|announced| announced == c);
                if let Some(other) = commit.contributors.iter().find(|contributor| !announced(contributor)) {
                    return Err(self.refuse(format!("a commit with another delta of site {}", other.site)));
                }
                self.commit = Some(commit);
            }
            Directive::Finish { round, state_hash } => {
                commands.push(MemberCommand::Finish { round, state_hash });
                commands.push(MemberCommand::Report(Report::Leave { reason: LeaveReason::Finished }));
            }
            Directive::Dropped { reason } => commands.push(MemberCommand::Quit(reason)),
        }
        Ok(())
    }

    fn begin(&mut self, plan: RoundPlan, commands: &mut Vec<MemberCommand>) -> Result<(), ProtocolError> {
        if plan.term < self.term {
            return Err(self.refuse(format!("a plan of the older term {}", plan.term)));
        }
        if plan.round != self.round.next() {
            return Err(self.refuse(format!("a plan for round {}", plan.round)));
        }
        self.stop_training(commands);
        self.forget_round();
        self.term = plan.term;
        if let Some(assignment) = plan.assignments.iter().find(|assignment| assignment.site == self.site) {
            self.training = true;
            commands.push(MemberCommand::Train { plan: plan.clone(), assignment: assignment.clone() });
        }
        self.plan = Some(plan);
        Ok(())
    }

    fn stop_training(&mut self, commands: &mut Vec<MemberCommand>) {
        if std::mem::take(&mut self.training) {
            commands.push(MemberCommand::AbandonTraining);
        }
    }

    fn forget_round(&mut self) {
        self.plan = None;
        self.announced.clear();
        self.held.clear();
        self.commit = None;
    }

    fn trained(&mut self, contribution: Contribution, commands: &mut Vec<MemberCommand>) {
        if !std::mem::take(&mut self.training) {
            return;
        }
        if let Some(plan) = &self.plan {
            self.held.insert(self.site);
            commands.push(MemberCommand::Report(Report::Computed { round: plan.round, contribution }));
        }
    }

    fn delta_held(&mut self, round: Round, from: SiteId, commands: &mut Vec<MemberCommand>) {
        if self.plan.as_ref().is_some_and(|plan| plan.round == round) && self.announced.contains_key(&from) {
            self.held.insert(from);
            commands.push(MemberCommand::Report(Report::Holds { round, from }));
        }
    }

    fn apply_when_possible(&mut self, commands: &mut Vec<MemberCommand>) {
        let Some(commit) = &self.commit else { return };
        let all_held = commit.contributors.iter().all(|contributor| self.held.contains(&contributor.site));
        if self.applying || !all_held {
            return;
        }
        let commit = commit.clone();
        self.stop_training(commands);
        self.commit = None;
        self.applying = true;
        commands.push(MemberCommand::Apply(commit));
    }

    fn applied(
        &mut self,
        round: Round,
        state_hash: ContentHash,
        commands: &mut Vec<MemberCommand>,
    ) -> Result<(), ProtocolError> {
        self.applying = false;
        (self.round, self.state_hash) = (round, state_hash);
        self.forget_round();
        commands.push(MemberCommand::Report(Report::Applied { round, state_hash }));
        // A postponed directive may start the next commit, which postpones the rest again.
        while !self.applying
            && let Some(directive) = self.backlog.pop_front()
        {
            self.follow(directive, commands)?;
            self.apply_when_possible(commands);
        }
        Ok(())
    }
}
