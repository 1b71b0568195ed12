//! How sites come to take part: those that have just come, those that come back, and all of them when a term begins.
//!
//! A site says which state it holds. From a recent one it is told the commits since; else it fetches the last state that all agreed on. When a
//! term begins nobody has a part in the run yet: it goes on from the newest state that is held.

use super::{Command, Committed, Coordinator, Note, Record, Site, tell};
use crate::plan::Directive;
use base::{ContentHash, Round, SiteId, Term};
use std::sync::Arc;

impl Coordinator {
    /// Lets sites take part that hold a state from which they can follow, and sends the others to fetch one.
    pub(super) fn place_newcomers(&mut self, commands: &mut Vec<Command>) {
        if self.started && self.open.is_empty() && self.sites.current().is_empty() {
            self.started = false;
        }
        if !self.started {
            if !self.is_gathered() && !self.is_over_for_somebody() {
                return;
            }
            (self.started, self.gathering_ticks) = (true, Some(0));
            self.roll_back_to_what_is_held(commands);
            self.started_at = self.last().commit.round;
        }
        self.place_who_can_follow(commands);
        self.forget_the_awaited();
        // Where the run is lost nobody knows yet which state it goes on from.
        if self.sites.waiting().is_empty() || self.is_lost() || !self.may_fetch() {
            return;
        }
        let settled =
            self.history.newest_first().find_map(|committed| Some((&committed.commit, committed.state_hash?)));
        let Some((commit, state_hash)) = settled.filter(|_| !self.sites.current().is_empty()) else { return };
        let (commit, from): (_, Arc<[SiteId]>) = (Arc::new(commit.clone()), self.sites.current().into());
        let waiting: Vec<SiteId> = self.sites.waiting().iter().copied().collect();
        self.tell_peers_in_time(commands);
        // Asked once: each reports `Ready` again when it has the state, or when it could not get it.
        for id in &waiting {
            self.sites.send_for_state(*id, commit.round);
        }
        tell(&waiting, &Directive::FetchState { commit, state_hash, from }, commands);
    }

    fn place_who_can_follow(&mut self, commands: &mut Vec<Command>) {
        let held = |id: &SiteId| Some((*id, self.sites.get(id)?.held()?));
        let waiting: Vec<(SiteId, (Round, ContentHash))> = self.sites.waiting().iter().filter_map(held).collect();
        for (id, (round, state_hash)) in waiting {
            if self.can_follow_from(round, state_hash) {
                self.place(id, round, commands);
            }
        }
    }

    /// Every step is done, and a site that holds the last state has not been told so: the others have been, before this
    /// coordinator was started again, and will not come back.
    pub(super) fn is_over_for_somebody(&self) -> bool {
        let Committed { commit, state_hash, .. } = self.last();
        let holds_it =
            |site: &Site| site.held().is_some_and(|(round, hash)| (round, Some(hash)) == (commit.round, *state_hash));
        self.is_over() && self.sites.values().any(holds_it)
    }

    /// Every step is done, and all sites agreed on the last state.
    pub(super) fn is_over(&self) -> bool {
        let Committed { commit, state_hash, .. } = self.last();
        let is_done =
            commit.step >= self.settings.steps_total && self.flushes_committed() + 1 >= self.settings.sync.fragments;
        is_done && state_hash.is_some()
    }

    /// Whether the deltas of all commits after that state can still be fetched from some site.
    fn can_follow_from(&self, round: Round, state_hash: ContentHash) -> bool {
        let last = self.last().commit.round;
        // A site may say that it holds a round that this log has not got.
        let known = self.history.get(round);
        let is_known = known.is_some_and(|committed| committed.state_hash == Some(state_hash));
        let is_near = || last.0.checked_sub(round.0).is_some_and(|behind| behind <= self.rounds_kept() / 2);
        let are_kept = || round >= self.started_at && is_near() && self.history.after(round).is_some();
        is_known && (round == last || are_kept()) && self.can_catch_up_from(round)
    }

    /// Tells a site that becomes current what it must follow: commits since its state, then the rounds that are open, in which it
    /// has no part.
    fn place(&mut self, id: SiteId, round: Round, commands: &mut Vec<Command>) {
        let last = self.last().commit.round;
        self.tell_peers_in_time(commands);
        self.sites.place(id, round, last);
        self.polls.join(id, round);
        let newer = self.history.after(round).into_iter().flatten();
        let commit = |committed: &Committed| Directive::Commit(Arc::new(committed.commit.clone()));
        commands.extend(newer.map(|committed| Command::Send(id, commit(committed))));
        for open in &self.open {
            let mut plan = open.plan.clone();
            // What it delivered before it left and came back still counts, but is not to be done again.
            plan.assignments.retain(|assignment| assignment.site != id);
            commands.push(Command::Send(id, Directive::Begin(Arc::new(plan))));
            match &open.reduction {
                None => {
                    let ready = open.deliveries.keys().map(|from| Command::Send(id, Self::delta_ready(open, *from)));
                    commands.extend(ready);
                }
                Some(reduction) => {
                    let (term, round) = (open.plan.term, open.plan.round);
                    let ready = reduction.merged().into_iter().map(|part| Directive::PartReady { term, round, part });
                    commands.extend(ready.map(|ready| Command::Send(id, ready)));
                }
            }
        }
    }

    fn roll_back_to_what_is_held(&mut self, commands: &mut Vec<Command>) {
        let from = self.last().commit.round;
        let held: Vec<(Round, ContentHash)> = self.sites.values().filter_map(Site::held).collect();
        let is_known = |(round, hash): &&(Round, ContentHash)| {
            // A commit whose state nobody had confirmed when the coordinator stopped is settled by who holds it.
            self.history.get(*round).is_some_and(|known| known.state_hash.is_none_or(|known| known == *hash))
        };
        let to = held.iter().filter(is_known).map(|(round, _)| *round).max().unwrap_or(Round(0));
        if to < from {
            self.history.retain(|committed| committed.commit.round <= to);
            self.told_over = None;
            self.go_on_from_last();
            // Rounds will be committed again under the same numbers: the new term tells them apart.
            self.term = Term(self.term.0 + 1);
            commands.push(Command::Persist(Record::RolledBack { to }));
            commands.push(Command::Persist(Record::TermStarted { term: self.term }));
            commands.push(Command::Note(Note::RolledBack { from, to }));
        }
        self.polls.clear();
        if self.last().state_hash.is_none()
            && let Some((round, state_hash)) = held.into_iter().find(|(round, _)| *round == to)
        {
            self.history.settle(round, state_hash);
            commands.push(Command::Persist(Record::StateHash { round, state_hash }));
        }
        // Nobody can be asked any more what an older one was.
        self.history.retain(|committed| committed.state_hash.is_some());
    }
}
