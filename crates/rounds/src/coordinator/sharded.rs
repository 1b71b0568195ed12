//! Sharded rounds: whether a round is one, and what its reducers are told ([`super::reduction`]).
//!
//! Nothing of it is in the durable log before the commit, which names the merged parts: a coordinator that is restarted plans the
//! round anew.

use super::reduction::{Next, Patience};
use super::{Command, Coordinator, Note, OpenRound, tell, tell_others};
use crate::exchange::{self, Decision, Part};
use crate::plan::{Directive, FragmentPlan};
use base::config::{Exchange, MergeRule};
use base::{ContentHash, Round, SiteId};

/// Rounds in a mesh after one that a late reducer has held up: whatever it is that keeps it may last.
const MESH_ROUNDS_AFTER_LATE: u64 = 16;

/// What is known of exchanges.
#[derive(Debug, Clone, Default)]
pub(super) struct Exchanges {
    pub(super) links: exchange::Links,
    /// Whether the newest plan is sharded.
    is_sharded: bool,
    /// What people were told last.
    told: Option<bool>,
    /// A reducer was late in this round.
    late: Option<Round>,
}

impl Coordinator {
    /// Who merges what in a round that is being planned; nobody where it is a mesh.
    pub(super) fn parts(
        &mut self,
        round: Round,
        fragment: FragmentPlan,
        current: &[SiteId],
        commands: &mut Vec<Command>,
    ) -> Vec<Part> {
        let cannot_be_dialled = |site: &&SiteId| self.sites.get(site).is_none_or(|site| !site.peer.can_be_dialled());
        let undialled = current.iter().find(cannot_be_dialled).copied();
        // A part is merged by one site, whom the others would have to trust.
        let setting = match self.settings.sync.merge {
            MergeRule::TrimmedMean => Exchange::Mesh,
            MergeRule::Mean => self.settings.sync.exchange,
        };
        let travelling = self.settings.travelling(fragment);
        let exchanges = &self.exchanges;
        let late = exchanges.late.filter(|late| round.0 <= late.0 + MESH_ROUNDS_AFTER_LATE);
        let Decision { parts, reason } = match late {
            Some(late) => {
                Decision { parts: Vec::new(), reason: format!("a site merged its part of round {late} late") }
            }
            None => {
                let sites = (current, undialled);
                exchange::decide(setting, &travelling, sites, &exchanges.links, exchanges.is_sharded)
            }
        };
        self.exchanges.is_sharded = !parts.is_empty();
        self.tell_exchange(round, !parts.is_empty(), reason, commands);
        parts
    }

    fn tell_exchange(&mut self, round: Round, is_sharded: bool, reason: String, commands: &mut Vec<Command>) {
        if self.exchanges.told.replace(is_sharded) != Some(is_sharded) {
            commands.push(Command::Note(Note::ExchangeChosen { round, is_sharded, reason }));
        }
    }

    /// Tells the reducers of a round what they can fetch of a delta.
    pub(super) fn tell_slices(
        open: &OpenRound,
        from: SiteId,
        slice_hashes: &[ContentHash],
        commands: &mut Vec<Command>,
    ) {
        let slices = open.plan.parts.iter().zip(slice_hashes).filter(|(part, _)| part.site != from);
        commands.extend(slices.map(|(part, hash)| {
            let (term, round, hash) = (open.plan.term, open.plan.round, *hash);
            Command::Send(part.site, Directive::SliceReady { term, round, from, hash })
        }));
    }

    pub(super) fn holds_slice(&mut self, site: SiteId, round: Round, from: SiteId) {
        let open = self.open.iter_mut().find(|open| open.plan.round == round);
        if let Some(reduction) = open.and_then(|open| open.reduction.as_mut()) {
            reduction.hold_slice(site, from);
        }
    }

    pub(super) fn holds_part(&mut self, site: SiteId, round: Round, from: SiteId) {
        let open = self.open.iter_mut().find(|open| open.plan.round == round);
        if let Some(reduction) = open.and_then(|open| open.reduction.as_mut()) {
            reduction.hold_part(site, from);
        }
    }

    /// A reducer has merged its part.
    pub(super) fn reduced(&mut self, site: SiteId, round: Round, hash: ContentHash, commands: &mut Vec<Command>) {
        let Some(open) = self.open.iter_mut().find(|open| open.plan.round == round) else { return };
        let term = open.plan.term;
        // Not of a round that has been given back to the mesh meanwhile.
        let Some(part) = open.reduction.as_mut().and_then(|reduction| reduction.merge(site, hash)) else { return };
        tell_others(self.sites.current(), site, &Directive::PartReady { term, round, part }, commands);
    }

    /// Takes every step that has become possible in sharded rounds before their commits.
    pub(super) fn drive_reductions(&mut self, now: f64, commands: &mut Vec<Command>) {
        for index in 0..self.open.len() {
            if self.open[index].reduction.is_none() {
                continue;
            }
            let (enough, waited, is_over) = self.patience(index, now);
            let reducer_seconds = self.settings.sync.grace_seconds;
            let open = &mut self.open[index];
            match open.next_of_reduction(now, Patience { enough, is_over: is_over && index == 0, reducer_seconds }) {
                Next::Wait => {}
                Next::Reduce(contributors) => {
                    if contributors.len() == open.plan.assignments.len() {
                        self.grace.observe(waited);
                    }
                    self.reduce(index, contributors, now, commands);
                }
                Next::Late(sites) => {
                    let names: Vec<String> = sites.iter().map(ToString::to_string).collect();
                    self.exchanges.late = Some(open.plan.round);
                    open.fall_back(format!("its part of the merge is late at site {}", names.join(", ")));
                }
            }
        }
        self.tell_fallbacks(now, commands);
    }

    fn reduce(&mut self, index: usize, sites: Vec<SiteId>, now: f64, commands: &mut Vec<Command>) {
        let open = &mut self.open[index];
        let contributors = sites.iter().map(|site| open.contributor(*site)).collect();
        let (term, round) = (open.plan.term, open.plan.round);
        let Some(reduction) = &mut open.reduction else { return };
        reduction.tell(sites, now);
        let reducers: Vec<SiteId> = reduction.parts().iter().map(|part| part.site).collect();
        tell(&reducers, &Directive::Reduce { term, round, contributors }, commands);
    }

    /// Announces the whole deltas of rounds that were given back to the mesh.
    pub(super) fn tell_fallbacks(&mut self, now: f64, commands: &mut Vec<Command>) {
        let mut told = Vec::new();
        for open in &mut self.open {
            let Some(reason) = open.fell_back.take() else { continue };
            open.deadline = open.deadline.max(now + self.settings.sync.deadline_seconds);
            told.push((open.plan.round, reason));
            for from in open.deliveries.keys() {
                tell_others(self.sites.current(), *from, &Self::delta_ready(open, *from), commands);
            }
        }
        told.into_iter().for_each(|(round, reason)| self.tell_exchange(round, false, reason, commands));
    }
}
