//! How a run ends: sites that hold the last state are told, save it and leave.
//!
//! A coordinator that dies amid that comes back to a part of them, or to nobody. That some were told is in its log, so that the next process
//! does not wait for them for ever, nor goes back to an older state that others hold.

use super::{Command, Coordinator, Phase, Record};
use crate::plan::{Directive, LeaveReason};
use base::SiteId;

impl Coordinator {
    pub(super) fn finish(&mut self, commands: &mut Vec<Command>) {
        let (round, state_hash) = (self.last().commit.round, self.last().state_hash);
        let Phase::Finishing(told) = &mut self.phase else { return };
        if self.sites.is_empty() {
            commands.push(Command::Done);
            return;
        }
        let Some(state_hash) = state_hash else { return };
        if self.sites.current().is_empty() {
            // Nobody is left to give the final state to those who were still on their way.
            let others: Vec<SiteId> = self.sites.keys().copied().collect();
            for site in others {
                self.drop_site(site, LeaveReason::Finished, commands);
            }
            commands.push(Command::Done);
            return;
        }
        if told.len() == self.sites.current().len() {
            // Who was told and has left is not among them any more.
            return;
        }
        let untold: Vec<SiteId> = self.sites.current().iter().copied().filter(|site| told.insert(*site)).collect();
        if !untold.is_empty() && self.told_over.replace(round) != Some(round) {
            commands.push(Command::Persist(Record::Over { round }));
        }
        let untold = untold.into_iter();
        commands.extend(untold.map(|site| Command::Send(site, Directive::Finish { round, state_hash })));
    }

    /// Every step is done, and nobody is here, or nobody who has the last state and somebody was told before this process that the run is over:
    /// who has it will not come back.
    pub(super) fn waits_in_vain(&self) -> bool {
        let told = self.told_over == Some(self.last().commit.round);
        self.is_over() && !self.started && (self.sites.is_empty() || (told && !self.is_over_for_somebody()))
    }
}
