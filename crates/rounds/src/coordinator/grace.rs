//! How long a round waits for late sites: a window that follows what the sites of this run have needed.
//!
//! The window of a round is twice the largest lateness among the last [`HISTORY`] rounds that all sites finished, where lateness is
//! the time from the quorum's delivery to the last one's. It is never shorter than the time for which nobody waits anyway, because
//! the merge takes effect later (the overlap), and never longer than `grace_seconds`. Until a few rounds are known it is as long
//! as that.

use std::collections::VecDeque;

/// Rounds that are remembered.
const HISTORY: usize = 16;

/// Fewer say too little.
const HISTORY_MIN: usize = 3;

/// Times the largest known lateness.
const GRACE_FACTOR: f64 = 2.0;

/// A shorter window would be lost in a busy machine's hiccups.
const GRACE_SECONDS_MIN: f64 = 0.5;

#[derive(Debug, Clone, Default)]
pub(super) struct Grace {
    lateness_seconds: VecDeque<f64>,
}

impl Grace {
    /// A round was finished by all its sites, the last one that much after the quorum.
    pub(super) fn observe(&mut self, lateness_seconds: f64) {
        self.lateness_seconds.push_back(lateness_seconds.max(0.0));
        if self.lateness_seconds.len() > HISTORY {
            self.lateness_seconds.pop_front();
        }
    }

    /// Seconds to wait after the quorum.
    pub(super) fn window(&self, overlap_seconds: f64, grace_seconds_max: f64) -> f64 {
        if self.lateness_seconds.len() < HISTORY_MIN {
            return grace_seconds_max;
        }
        let largest = self.lateness_seconds.iter().copied().fold(0.0, f64::max);
        (GRACE_FACTOR * largest).max(GRACE_SECONDS_MIN).max(overlap_seconds).min(grace_seconds_max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_window_follows_the_sites_and_keeps_its_bounds() {
        let mut grace = Grace::default();
        assert_eq!(grace.window(0.0, 20.0), 20.0, "nothing is known yet");
        (0..3).for_each(|_| grace.observe(1.5));
        assert_eq!(grace.window(0.0, 20.0), 3.0);
        assert_eq!(grace.window(7.0, 20.0), 7.0, "nobody waits while the merge has not taken effect");
        assert_eq!(grace.window(50.0, 20.0), 20.0);
        grace.observe(30.0);
        assert_eq!(grace.window(0.0, 20.0), 20.0);
        (0..HISTORY).for_each(|_| grace.observe(0.0));
        assert_eq!(grace.window(0.0, 20.0), GRACE_SECONDS_MIN);
    }
}
