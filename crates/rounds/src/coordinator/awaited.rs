//! A newcomer that fetches states in vain is waited for.
//!
//! While a state is on its way the run goes on, and who has it follows from the deltas that the others have kept. Where a state takes longer than
//! the others keep deltas, because rounds are short or the plan has left nothing of the links, it would come too late each time, and fetch the next
//! one for ever. So when one was fetched in vain no round is planned: those that are open close, all fetch the state that is last then, which stays
//! the last, and have a part in the next round. The others stand still meanwhile, for at most twice the time that the fetch in vain took; over
//! that the run goes on, and that site is not waited for again before it has come anew.

use super::{Coordinator, Site};
use base::{Round, SiteId};

/// Time for words, in addition to the transfer.
const WORDS_TICKS: u32 = 6;

/// However long a fetch took, nobody stands still for longer: half an hour.
const AWAITED_TICKS_MAX: u32 = 1_800;

/// Whom the run waits for.
#[derive(Debug, Clone)]
pub(super) struct Awaited {
    site: SiteId,
    ticks_left: u32,
}

/// A state that a site was asked to fetch.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Asked {
    round: Round,
    /// Since then, while it has not answered.
    ticks: u32,
    is_awaited: bool,
}

impl Site {
    /// It is sent to fetch the state after that round.
    pub(super) fn ask(&mut self, round: Round) {
        self.is_fetching = true;
        (self.asked.round, self.asked.ticks) = (round, 0);
    }

    /// Whether what it holds is a state that it was sent to fetch.
    fn has_fetched(&self) -> bool {
        self.held().is_some_and(|(round, _)| round > Round(0) && round == self.asked.round)
    }
}

impl Coordinator {
    /// Whether sites that cannot follow are to be sent for a state now. The first of them that has fetched one in vain is waited for from now on.
    pub(super) fn may_fetch(&mut self) -> bool {
        self.forget_the_awaited();
        let in_vain =
            |id: &&SiteId| self.sites.get(id).is_some_and(|site| site.has_fetched() && !site.asked.is_awaited);
        if self.awaited.is_none()
            && let Some(id) = self.sites.waiting().iter().find(in_vain).copied()
            && let Some(site) = self.sites.get_mut(&id)
        {
            let ticks_left = (2 * site.asked.ticks + WORDS_TICKS).min(AWAITED_TICKS_MAX);
            site.asked.is_awaited = true;
            self.awaited = Some(Awaited { site: id, ticks_left });
        }
        self.awaited.is_none() || (self.open.is_empty() && self.last().state_hash.is_some())
    }

    /// Whether no round is planned because somebody is waited for.
    pub(super) fn is_waiting(&mut self) -> bool {
        self.forget_the_awaited();
        self.awaited.is_some()
    }

    pub(super) fn forget_the_awaited(&mut self) {
        let is_coming = |awaited: &mut Awaited| {
            awaited.ticks_left > 0 && self.sites.get(&awaited.site).is_some_and(|site| site.since().is_none())
        };
        self.awaited.take_if(|awaited| !is_coming(awaited));
    }

    /// A second has passed.
    pub(super) fn count_fetches(&mut self) {
        for (_, site) in self.sites.iter_mut().filter(|(_, site)| site.is_fetching) {
            site.asked.ticks = site.asked.ticks.saturating_add(1);
        }
        // Before that the open rounds close, each by its deadline.
        if let Some(awaited) = self.awaited.as_mut().filter(|_| self.open.is_empty()) {
            awaited.ticks_left = awaited.ticks_left.saturating_sub(1);
        }
    }
}
