//! How long sites wait for each other under given settings and links: one closed formula that the adaptive settings and a planner
//! share. It knows averages alone; what jitter adds is for the caller's margin.
//!
//! A round has S = H / P inner steps of c seconds. At its end a fragment is snapshotted, and the merge takes effect tau steps later
//! ([`crate::schedule`]). Until then the host encodes and merges it (h seconds), its bytes cross the link (u seconds), and reports and
//! requests cross it with nothing but delay (l seconds):
//!
//! ```text
//! m = h + l + u                                             from the snapshot to the merged fragment
//! w = max(0, u - S c, h - S c, (m - tau c) / (q + 1))       what a site waits in each round, q = floor(tau / S)
//! utilisation = S c / (S c + w)
//! ```
//!
//! Link and host serve one fragment after the other, so a round cannot be shorter than either needs. And a merge must be there after
//! tau steps: between its snapshot and that point lie q rounds' waits, and its own.

/// What the time of a round depends on beside its settings. All finite, none negative.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Conditions {
    /// c: one inner step of the fastest site.
    pub step_seconds: f64,
    /// What the busiest link or site needs for one byte of an encoded fragment, all the copies that it carries included.
    pub seconds_per_byte: f64,
    /// l: from the snapshot to the commit, without host work and without bytes.
    pub latency_seconds: f64,
    /// Encoding, checking and merging of one value of a fragment, over all deltas.
    pub host_seconds_per_element: f64,
}

/// The rounds of some settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RoundShape {
    /// S: inner steps of a round, at least 1.
    pub steps: u64,
    /// tau: inner steps from a snapshot until its merge takes effect.
    pub overlap_steps: u64,
    /// Values of the largest fragment.
    pub elements: u64,
    /// Its size when encoded.
    pub encoded_bytes: u64,
}

/// Where the time of a round goes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RoundTime {
    /// S c.
    pub compute_seconds: f64,
    /// h.
    pub host_seconds: f64,
    /// u.
    pub link_seconds: f64,
    /// m.
    pub merge_seconds: f64,
    /// tau c: what m may be.
    pub overlap_seconds: f64,
    /// w.
    pub stall_seconds: f64,
}

impl RoundTime {
    /// Part of the time in which sites compute, 0 to 1.
    pub fn utilisation(&self) -> f64 {
        let seconds = self.compute_seconds + self.stall_seconds;
        if seconds > 0.0 { self.compute_seconds / seconds } else { 1.0 }
    }

    /// The largest part of a time limit that is used: above 1 somebody waits in every round.
    pub fn load(&self) -> f64 {
        let part = |seconds: f64, limit: f64| if seconds > 0.0 { seconds / limit } else { 0.0 };
        part(self.link_seconds, self.compute_seconds)
            .max(part(self.host_seconds, self.compute_seconds))
            .max(part(self.merge_seconds, self.overlap_seconds))
    }
}

/// The steady state of rounds of that shape.
pub fn round_time(shape: &RoundShape, conditions: &Conditions) -> RoundTime {
    let steps = shape.steps.max(1);
    let compute_seconds = steps as f64 * conditions.step_seconds;
    let overlap_seconds = shape.overlap_steps as f64 * conditions.step_seconds;
    let host_seconds = shape.elements as f64 * conditions.host_seconds_per_element;
    let link_seconds = shape.encoded_bytes as f64 * conditions.seconds_per_byte;
    let merge_seconds = host_seconds + conditions.latency_seconds + link_seconds;
    let waits = (shape.overlap_steps / steps) as f64 + 1.0;
    let stall_seconds = (link_seconds - compute_seconds)
        .max(host_seconds - compute_seconds)
        .max((merge_seconds - overlap_seconds) / waits)
        .max(0.0);
    RoundTime { compute_seconds, host_seconds, link_seconds, merge_seconds, overlap_seconds, stall_seconds }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schedule::effects;
    use base::Round;
    use proptest::prelude::*;

    /// Seconds of a round late in a run, by following every snapshot through host, link and delay.
    fn simulated_seconds(shape: &RoundShape, conditions: &Conditions) -> f64 {
        // Waits come in bursts, one in q + 1 rounds: many of them must be seen.
        const ROUNDS: usize = 8_000;
        let time = round_time(shape, conditions);
        let mut merged = vec![0.0f64; ROUNDS + 1];
        let mut ends = vec![0.0f64; ROUNDS + 1];
        let (mut host_free, mut link_free) = (0.0f64, 0.0f64);
        for round in 1..=ROUNDS {
            let effects = effects(Round(round as u64), shape.steps, shape.overlap_steps);
            let mut now: f64 = merged[effects.before.0 as usize].max(ends[round - 1]);
            now += effects.after_steps as f64 * conditions.step_seconds;
            now = now.max(merged[effects.during.0 as usize]);
            now += (shape.steps - effects.after_steps) as f64 * conditions.step_seconds;
            ends[round] = now;
            host_free = now.max(host_free) + time.host_seconds;
            link_free = host_free.max(link_free) + time.link_seconds;
            merged[round] = link_free + conditions.latency_seconds;
        }
        (ends[ROUNDS] - ends[ROUNDS / 2]) / (ROUNDS / 2) as f64
    }

    proptest! {
        #[test]
        fn the_formula_is_what_a_simulation_of_each_round_ends_at(
            steps in 1u64..20, overlap_steps in 0u64..40, link in 0.0f64..6.0, host in 0.0f64..2.0, delay in 0.0f64..4.0,
        ) {
            let conditions = Conditions {
                step_seconds: 0.1, seconds_per_byte: link / 1e6, latency_seconds: delay, host_seconds_per_element: host / 1e6,
            };
            let shape = RoundShape { steps, overlap_steps, elements: 1_000_000, encoded_bytes: 1_000_000 };
            let time = round_time(&shape, &conditions);
            let (expected, found) = (time.compute_seconds + time.stall_seconds, simulated_seconds(&shape, &conditions));
            prop_assert!((found / expected - 1.0).abs() < 0.02, "{found} s simulated, {expected} s by the formula");
            prop_assert_eq!(time.load() <= 1.0, time.stall_seconds <= 0.0);
        }
    }

    /// arXiv 2501.18512, table 4: Streaming DiLoCo with overlap and 4-bit deltas, two sites, H = 100. Parameters, fragments, seconds of
    /// a step, our H (a multiple of the fragments), and Gbit/s for 50, 80, 90, 95 and 99 %.
    type Published = (f64, u64, f64, u64, [f64; 5]);
    const PUBLISHED: [Published; 3] = [
        (1e9, 8, 0.1, 96, [0.4, 0.9, 1.7, 2.0, 3.0]),
        (1e10, 16, 0.8, 96, [0.4, 0.9, 1.4, 1.4, 1.7]),
        (1e11, 36, 4.9, 108, [0.5, 0.9, 1.1, 1.1, 1.4]),
    ];

    #[test]
    fn the_published_bandwidths_are_enough_for_the_published_utilisations() {
        for (parameters, fragments, step_seconds, inner_steps, gigabits) in PUBLISHED {
            let elements = parameters as u64 / fragments;
            let encoded_bytes = formats::CodecKind::E3m0.codec().encoded_bytes(elements as usize) as u64;
            let shape = RoundShape { steps: inner_steps / fragments, overlap_steps: 5, elements, encoded_bytes };
            for (gigabits, wanted) in gigabits.into_iter().zip([0.5, 0.8, 0.9, 0.95, 0.99]) {
                let seconds_per_byte = 8.0 / (gigabits * 1e9);
                let conditions =
                    Conditions { step_seconds, seconds_per_byte, latency_seconds: 0.0, host_seconds_per_element: 0.0 };
                let found = round_time(&shape, &conditions).utilisation();
                assert!(found >= wanted, "{parameters:e} at {gigabits} Gbit/s: {found} of {wanted}");
            }
        }
    }

    #[test]
    fn without_overlap_a_round_waits_for_the_whole_merge() {
        let conditions = Conditions {
            step_seconds: 0.5,
            seconds_per_byte: 1e-6,
            latency_seconds: 0.3,
            host_seconds_per_element: 0.0,
        };
        let shape = RoundShape { steps: 20, overlap_steps: 0, elements: 1, encoded_bytes: 5_000_000 };
        let time = round_time(&shape, &conditions);
        assert!((time.stall_seconds - 5.3).abs() < 1e-9 && (time.utilisation() - 10.0 / 15.3).abs() < 1e-9);
        assert_eq!(time.load(), f64::INFINITY);
    }
}
