//! What happens when sites lack deltas that nobody has.
//!
//! A commit names deltas that a quorum of sites held when it was made. Sites that had not merged them then may wait for them for ever: every
//! holder may have left since. Where *some* site still reaches the log's last commit, such a site is *recalled*
//! ([`Directive::Recall`]): it says what it holds, and is sent to fetch a state. Where *no* site does, the run itself cannot go on from that
//! commit, unless a site that is away has its state. So all are recalled: the run is where it is after a restart of the coordinator, and
//! begins from the newest state that is held once enough sites have said what they hold ([`Coordinator::is_gathered`]).
//!
//! Nobody is dropped for it: a site that is dropped ends, and comes back at another time than the next one, so that there
//! might never be a moment at which all have said what they hold.
//!
//! Times are counted in ticks, not in differences of times: a clock that jumps must not undo a commit.

use super::{Command, Coordinator, Note, Phase, Site};
use crate::plan::{Directive, LeaveReason};
use base::{Round, SiteId};
use std::collections::BTreeSet;

/// Merging what has been fetched, and saying so, takes less.
const STRANDED_TICKS_MAX: u32 = 6;

/// For a site that is away and may hold a newer state than all that are here the run waits for so long: ten minutes, in which a machine
/// boots and loads a large model. Then it goes on with those that are here.
const GATHERING_TICKS_MAX: u32 = 600;

impl Site {
    /// Whether the deltas of that commit came here, or could have come from those that had them then, of a site that takes part. One that
    /// came with the state after it never had them.
    fn has_deltas_of(&self, round: Round) -> bool {
        self.since().is_some_and(|since| self.placed_at < round || (since < round && self.applied >= round))
    }

    /// The last commit whose state it has, of a site that takes part.
    pub(super) fn reached(&self) -> Option<Round> {
        self.since().map(|since| since.max(self.applied))
    }
}

impl Coordinator {
    /// Whether a site that holds the state of `round` can have all deltas of the commits after it.
    pub(super) fn can_catch_up_from(&self, round: Round) -> bool {
        let is_to_be_had = |round| self.sites.values().any(|site| site.has_deltas_of(Round(round)));
        (round.0 + 1..=self.last().commit.round.0).all(is_to_be_had)
    }

    fn is_stranded(&self, site: &Site) -> bool {
        site.reached().is_some_and(|round| !self.can_catch_up_from(round))
    }

    /// Whether no site that takes part can reach the last commit.
    pub(super) fn is_lost(&self) -> bool {
        let current = self.sites.current();
        let is_stranded = |id: &SiteId| self.sites.get(id).is_some_and(|site| self.is_stranded(site));
        matches!(self.phase, Phase::Working) && !current.is_empty() && current.iter().all(is_stranded)
    }

    /// A second has passed: recalls whoever waits in vain.
    pub(super) fn recall_the_stranded(&mut self, commands: &mut Vec<Command>) {
        self.gathering_ticks = self.gathering_ticks.map(|ticks| if self.started { 0 } else { ticks.saturating_add(1) });
        self.count_fetches();
        self.vain_ticks = if self.waits_in_vain() { self.vain_ticks + 1 } else { 0 };
        if self.vain_ticks > self.settings.sync.deadline_seconds.ceil() as u32 {
            self.phase = Phase::Finishing(Default::default());
        }
        self.lost_ticks = if self.is_lost() { self.lost_ticks + 1 } else { 0 };
        if self.lost_ticks > STRANDED_TICKS_MAX {
            return self.regroup(commands);
        }
        let is_over = !matches!(self.phase, Phase::Working);
        let stranded: BTreeSet<SiteId> =
            self.sites.iter().filter(|(_, site)| self.is_stranded(site)).map(|(id, _)| *id).collect();
        let all_are = stranded.len() == self.sites.current().len();
        for (id, site) in self.sites.iter_mut() {
            site.stranded_ticks = if stranded.contains(&id) { site.stranded_ticks + 1 } else { 0 };
        }
        for id in stranded {
            match self.sites[&id].stranded_ticks > STRANDED_TICKS_MAX {
                // Whoever has the last state has left with it: the run is over.
                true if is_over && all_are => self.drop_site(id, LeaveReason::DeltasMissing, commands),
                // All together, once the run is lost for long enough.
                true if !all_are => self.recall(id, false, commands),
                _ => {}
            }
        }
        self.recall_the_silent(commands);
    }

    /// A site whose line was broken merges what had been committed before it says what it holds. What it waits for may be lost, and it
    /// cannot know that.
    fn recall_the_silent(&mut self, commands: &mut Vec<Command>) {
        let allowed_ticks = self.settings.sync.deadline_seconds.ceil() as u32;
        for (id, site) in self.sites.iter_mut() {
            let says_nothing =
                site.since().is_none() && site.held().is_none() && !site.is_fetching && !site.is_recalled;
            site.unready_ticks = if says_nothing { site.unready_ticks + 1 } else { 0 };
            if site.unready_ticks > allowed_ticks {
                (site.recalls, site.is_recalled) = (site.recalls + 1, true);
                commands.push(Command::Send(id, Directive::Recall { number: site.recalls }));
            }
        }
    }

    /// Takes a site out of the run until it has said anew what it holds. What it has delivered to everybody still counts, unless it is
    /// distrusted.
    pub(super) fn recall(&mut self, id: SiteId, distrusted: bool, commands: &mut Vec<Command>) {
        let Some(site) = self.sites.get(&id) else { return };
        let (number, heard) = (site.recalls + 1, site.heard);
        let (device, mut anew) = (site.device.clone(), Site::new(site.peer.clone(), heard));
        (anew.device, anew.recalls, anew.is_recalled) = (device, number, true);
        self.sites.insert(anew);
        self.withdraw(id, distrusted);
        commands.push(Command::Send(id, Directive::Recall { number }));
    }

    /// Nobody can go on from the last commit: everybody says what it holds, as after a restart of the coordinator.
    fn regroup(&mut self, commands: &mut Vec<Command>) {
        commands.push(Command::Note(Note::Regrouped { round: self.last().commit.round }));
        self.abandon_open();
        for site in self.sites.current().to_vec() {
            self.recall(site, false, commands);
        }
        (self.started, self.lost_ticks, self.gathering_ticks) = (false, 0, Some(0));
    }

    /// Whether enough sites have said what they hold for the run to begin, or to begin anew.
    pub(super) fn is_gathered(&self) -> bool {
        // Before it has begun nobody takes part.
        let ready = self.sites.waiting().len();
        // Before the first start of a term nobody has been asked, and nobody knows who will come.
        let Some(ticks) = self.gathering_ticks else { return ready >= self.settings.sites as usize };
        let are_missing = ready < self.settings.sites as usize || self.sites.values().any(|site| site.is_recalled);
        ready > 0 && (!are_missing || ticks > GATHERING_TICKS_MAX)
    }
}
