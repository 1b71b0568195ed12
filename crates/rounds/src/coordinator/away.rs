//! Sites that were lost a moment ago and may be back soon.
//!
//! The others take over the samples of one that is lost, and with it rounds become longer: with half of the speed gone, twice as long. One that
//! comes back would have to wait for the end of such a round. So for a while after a loss rounds have fewer inner steps, as many as take about
//! the time that they took with everybody: what is sent in an hour stays the same, and who comes back has a part in the next round soon. Where
//! shares are configured nobody's speed is in use, and rounds stay as long as they are.

use super::Coordinator;
use crate::plan::LeaveReason;
use base::{Round, SiteId};
use std::collections::BTreeMap;

/// For so many rounds a lost site is expected: with rounds of a minute long enough to start a machine again.
const ROUNDS_EXPECTED: u64 = 8;

/// Sites that are expected back: what each could do, as the weights of shares have it, and until which round.
#[derive(Debug, Clone, Default)]
pub(super) struct Away(BTreeMap<SiteId, (f64, Round)>);

impl Away {
    /// A site has left after that round was planned.
    pub(super) fn left(&mut self, site: SiteId, reason: LeaveReason, weight: Option<f64>, round: Round) {
        let may_return = matches!(
            reason,
            LeaveReason::ConnectionLost
                | LeaveReason::EngineFailed
                | LeaveReason::EngineHung
                | LeaveReason::DeltasMissing
        );
        if let Some(weight) = weight.filter(|_| may_return) {
            self.0.insert(site, (weight, Round(round.0 + ROUNDS_EXPECTED)));
        }
    }

    /// Sites that are expected.
    #[cfg(test)]
    pub(super) fn entries(&self) -> usize {
        self.0.len()
    }

    /// Inner steps, of `steps`, that the sites with these weights make in the time that all of them make with those who are expected.
    ///
    /// Where `site` of `present` is the same as one that was away, it is back.
    pub(super) fn steps(&mut self, round: Round, steps: u64, present: &BTreeMap<SiteId, f64>) -> u64 {
        self.0.retain(|site, (_, until)| *until >= round && !present.contains_key(site));
        let here: f64 = present.values().sum();
        let away: f64 = self.0.values().map(|(weight, _)| weight).sum();
        if away <= 0.0 {
            return steps;
        }
        let part = here / (here + away);
        ((steps as f64 * part).round() as u64).max(1).min(steps)
    }
}

impl Coordinator {
    /// Inner steps of a round that the sites in `current` begin, of which `left` are left in the run.
    pub(super) fn steps_of_round(&mut self, round: Round, left: u64, current: &[SiteId]) -> u64 {
        let steps = self.settings.steps_per_round;
        // Where rounds overlap their steps are the schedule's, and short: P rounds to H steps. Adaptive ones are what was chosen, and measured as such.
        if self.settings.sync.overlap_steps > 0 || self.settings.sync.adaptive {
            return steps.min(left);
        }
        let speed = |id: &SiteId| self.sites.get(id).map_or(0.0, |site| site.speed.believed);
        let present =
            current.iter().map(|id| (*id, self.weights.get(id).copied().unwrap_or_else(|| speed(id)))).collect();
        self.away.steps(round, steps, &present).min(left)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn present(weights: &[(u32, f64)]) -> BTreeMap<SiteId, f64> {
        weights.iter().map(|(site, weight)| (SiteId(*site), *weight)).collect()
    }

    #[test]
    fn a_round_without_a_lost_site_takes_the_time_of_one_with_it() {
        let mut away = Away::default();
        away.left(SiteId(1), LeaveReason::ConnectionLost, Some(30.0), Round(4));
        let alone = present(&[(0, 10.0)]);
        assert_eq!(away.steps(Round(5), 20, &alone), 5, "a fourth of the speed, a fourth of the steps");
        assert_eq!(away.steps(Round(12), 20, &alone), 5);
        assert_eq!(away.steps(Round(13), 20, &alone), 20, "it is not expected any more");
        assert_eq!(away.steps(Round(14), 20, &alone), 20);
    }

    #[test]
    fn who_is_back_or_will_not_be_shortens_nothing() {
        let mut away = Away::default();
        away.left(SiteId(1), LeaveReason::ConnectionLost, Some(30.0), Round(4));
        assert_eq!(away.steps(Round(5), 20, &present(&[(0, 10.0), (1, 28.0)])), 20);
        assert_eq!(
            away.steps(Round(6), 20, &present(&[(0, 10.0)])),
            20,
            "it left once more, and was not counted as lost"
        );
        for reason in [LeaveReason::Finished, LeaveReason::Stopped, LeaveReason::Revoked, LeaveReason::Diverged] {
            away.left(SiteId(1), reason, Some(30.0), Round(6));
        }
        away.left(SiteId(1), LeaveReason::ConnectionLost, None, Round(6));
        assert_eq!(away.steps(Round(7), 20, &present(&[(0, 10.0)])), 20);
    }

    #[test]
    fn a_round_has_a_step_and_no_more_than_are_left() {
        let mut away = Away::default();
        away.left(SiteId(1), LeaveReason::ConnectionLost, Some(1e9), Round(4));
        assert_eq!(away.steps(Round(5), 20, &present(&[(0, 1.0)])), 1);
        assert_eq!(away.steps(Round(5), 0, &present(&[(0, 1.0)])), 0, "the run is over");
        assert_eq!(away.steps(Round(5), 3, &BTreeMap::new()), 1, "nobody is here yet");
    }
}
