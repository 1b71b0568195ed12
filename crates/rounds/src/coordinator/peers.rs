//! When sites are told who is there.
//!
//! Who comes or leaves changes the list for everybody. Said at once, n sites that come together would each cause n messages with up to n entries: so
//! only the first change after a tick is said at once, and those after it together, at the next tick, or before anything is said that names one
//! of those who have come.

use super::{Command, Coordinator, tell};
use crate::plan::{Directive, Peer};
use base::SiteId;
use std::sync::Arc;

/// What sites know of the list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum PeersTold {
    /// It has not changed since the last tick.
    #[default]
    BeforeTick,
    /// They have been told since the last tick.
    SinceTick,
    /// It has changed after that.
    Outdated,
}

impl Coordinator {
    /// The list has changed.
    pub(super) fn tell_peers(&mut self, commands: &mut Vec<Command>) {
        match self.peers_told {
            PeersTold::BeforeTick => self.tell_peers_now(commands),
            PeersTold::SinceTick | PeersTold::Outdated => self.peers_told = PeersTold::Outdated,
        }
    }

    /// A second has passed.
    pub(super) fn tell_peers_of_the_tick(&mut self, commands: &mut Vec<Command>) {
        match self.peers_told {
            PeersTold::Outdated => self.tell_peers_now(commands),
            PeersTold::BeforeTick | PeersTold::SinceTick => self.peers_told = PeersTold::BeforeTick,
        }
    }

    /// Sites that have come are about to be named.
    pub(super) fn tell_peers_in_time(&mut self, commands: &mut Vec<Command>) {
        if self.peers_told == PeersTold::Outdated {
            self.tell_peers_now(commands);
        }
    }

    fn tell_peers_now(&mut self, commands: &mut Vec<Command>) {
        let peers: Arc<[Peer]> = self.sites.values().map(|site| site.peer.clone()).collect();
        let sites: Vec<SiteId> = self.sites.keys().copied().collect();
        tell(&sites, &Directive::Peers(peers), commands);
        self.peers_told = PeersTold::SinceTick;
    }
}
