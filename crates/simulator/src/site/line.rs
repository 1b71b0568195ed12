//! A simulated site's line to the coordinator: dialled at the start, and again when it breaks, as `site::line` does it.
//!
//! A site that is set to call keeps what it holds, goes on with what is planned, and dials until somebody answers; then the coordinator is
//! told what it holds. One that is not ends when its line breaks, and its supervisor starts it again.

use super::{SiteDisk, SiteEvent, SiteFate, SiteProcess};
use crate::around::Around;
use crate::network::{COORDINATOR, ConnectionId, Packet, Way};
use crate::queue::Happening;
use base::SiteId;
use rounds::{Directive, MemberEvent};
use std::sync::Arc;
use wire::limits::CONNECT_SECONDS_MAX;
use wire::message::FromCoordinator;

/// As `site::line` has it: after this long without a word the coordinator is gone.
const COORDINATOR_SILENCE_SECONDS: f64 = 20.0;

/// As there: the pauses between two calls.
const PAUSE_SECONDS: std::ops::RangeInclusive<f64> = 0.25..=4.0;

/// As `site::join` has it: a process whose first call nobody answers ends.
const WELCOME_SECONDS: f64 = 30.0;

/// The line, or the calls that are to make it anew.
#[derive(Debug, Default)]
pub(super) struct Line {
    connection: Option<ConnectionId>,
    /// The newest that there was.
    newest: Option<ConnectionId>,
    /// Calls so far.
    calls: u64,
    pause_seconds: f64,
    heard: f64,
}

impl Line {
    pub(super) fn connection(&self) -> Option<ConnectionId> {
        self.connection
    }

    pub(super) fn is_over(&self, id: ConnectionId) -> bool {
        self.connection == Some(id)
    }

    pub(super) fn is_silent(&self, now: f64) -> bool {
        self.connection.is_some() && now - self.heard > COORDINATOR_SILENCE_SECONDS
    }
}

impl SiteProcess {
    /// Whether that call of that process is not given up.
    pub(crate) fn dials(&self, process: u64, call: u64) -> bool {
        self.process == process && self.line.calls == call && self.line.connection.is_none()
    }

    /// Whether it has lost the coordinator and calls it.
    pub(crate) fn is_calling(&self) -> bool {
        self.site.is_some() && self.line.connection.is_none() && self.ending.is_none()
    }

    /// Calls once.
    pub(super) fn dial(&mut self, around: &mut Around) {
        self.line.calls += 1;
        let (machine, process, call) = (self.machine, self.process, self.line.calls);
        // Both ways, and the listener's and the loop's wake-ups.
        let dialled = around.now + 2.0 * around.net.delay(machine + 1, COORDINATOR);
        around.queue.push(dialled, Happening::Dials(machine, process, call));
        let patience = if self.site.is_some() { CONNECT_SECONDS_MAX as f64 } else { WELCOME_SECONDS };
        self.at(around, patience, SiteEvent::NotWelcome(call));
    }

    /// Nobody answered a call.
    pub(super) fn not_welcome(&mut self, call: u64, around: &mut Around) {
        if !self.dials(self.process, call) {
            return;
        }
        if self.site.is_none() {
            self.fate = SiteFate::Failed;
            return;
        }
        let pause = self.line.pause_seconds.clamp(*PAUSE_SECONDS.start(), *PAUSE_SECONDS.end());
        self.line.pause_seconds = 2.0 * pause;
        self.line.calls += 1;
        // Sites that lost their coordinator together do not come back together.
        let spread = 0.5 + 0.5 * around.random.next_unit();
        self.at(around, pause * spread, SiteEvent::Calls);
    }

    pub(super) fn arrives(&mut self, id: ConnectionId, packet: Packet, disk: &mut SiteDisk, around: &mut Around) {
        let is_new = self.line.newest.is_none_or(|newest| newest < id);
        match packet {
            Packet::ToSite(FromCoordinator::Welcome(welcome)) if is_new => {
                self.welcomed(id, welcome.site, disk, around);
            }
            Packet::End if is_new => self.not_welcome(self.line.calls, around),
            // Of a line that was given up.
            _ if !self.line.is_over(id) => {}
            Packet::ToSite(FromCoordinator::Directive(directive)) => {
                self.line.heard = around.now;
                self.feed(MemberEvent::Directive(directive), disk, around);
            }
            Packet::ToSite(_) => self.line.heard = around.now,
            Packet::End | Packet::ToCoordinator(_) => self.lose_coordinator(around),
        }
    }

    fn welcomed(&mut self, id: ConnectionId, site: SiteId, disk: &mut SiteDisk, around: &mut Around) {
        let calls = self.line.calls;
        self.line = Line { connection: Some(id), newest: Some(id), calls, pause_seconds: 0.0, heard: around.now };
        self.present(around);
        match self.site {
            None => {
                self.site = Some(site);
                self.host = super::Host::new(site, Arc::clone(&self.config), around.sabotage);
                self.engine.queue.push_back(super::Job::Prepare);
                self.at(around, 0.0, SiteEvent::Pulse);
            }
            // It came back knowing this site as another one.
            Some(own) if own != site => self.end(SiteFate::Failed, around),
            Some(_) => {
                self.recall = 0;
                if self.member.is_some() {
                    self.feed(MemberEvent::Reconnected, disk, around);
                }
            }
        }
    }

    pub(super) fn lose_coordinator(&mut self, around: &mut Around) {
        self.hang_up(around);
        if self.ending.is_some() {
            return;
        }
        match around.scenario.sites_call {
            true => self.dial(around),
            false => self.end(SiteFate::Failed, around),
        }
    }

    /// Closes this end of the line.
    pub(super) fn hang_up(&mut self, around: &mut Around) {
        if let Some(connection) = self.line.connection.take() {
            let Around { net, queue, now, .. } = around;
            net.send(connection, Way::Up, Packet::End, *now, queue);
        }
    }

    /// Before there is a member; see `site::agent`.
    pub(super) fn heard_early(&mut self, event: MemberEvent, around: &mut Around) {
        match event {
            MemberEvent::Directive(Directive::Peers(peers)) => self.set_peers(peers.to_vec()),
            MemberEvent::Directive(Directive::Recall { number }) => self.recall = number,
            MemberEvent::Directive(Directive::Finish { .. } | Directive::Dropped { .. }) => {
                self.end(SiteFate::Over, around);
            }
            _ => {}
        }
    }
}
