//! From the numbers of one training to the figures of a table. Pure arithmetic.
//!
//! ```text
//! tokens/s      Σ over sites of tokens between two ends of rounds / seconds between them
//! utilisation   tokens/s / Σ over sites of tokens/s alone, mean of before and after
//! sent          bytes of the site's interface between the same two ends of rounds / steps × 1,000
//! ```
//! The first round is left out of both, because the start is told apart: seconds to the first step, and bytes until then.
//! A stall is the longest time between the ends of two successive steps of a site.

use crate::runs::{mean, median};
use crate::wan::series::{Point, Sent, Step, curve, sent_until};
use serde::{Deserialize, Serialize};

/// Steps of all sites over which the training loss of a curve is a mean.
const CURVE_WINDOW_STEPS: usize = 40;

/// One training's figures, as they are stored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Figures {
    /// Of all sites together, without the first round.
    pub(crate) tokens_per_second: f64,
    /// Sum of the sites' tokens a second alone, before and after.
    pub(crate) alone_tokens_per_second: [f64; 2],
    /// Bytes that each site sent in 1,000 steps, without the first round.
    pub(crate) sent_bytes_per_1000_steps: Vec<f64>,
    /// Bytes that each site had sent before the last of them ended its first step.
    pub(crate) start_bytes: Vec<f64>,
    /// From the start of the sites to the end of the first step of the last of them.
    pub(crate) first_step_seconds: f64,
    /// Longest time between two successive steps of a site.
    pub(crate) stall_seconds: f64,
    /// From the start of the sites to the end of the last step.
    pub(crate) seconds: f64,
    /// Trained by all sites.
    pub(crate) tokens: f64,
    /// On the held-out text after the last step, nats per token; none where the training was cut short.
    pub(crate) validation_nats: Option<f64>,
    /// Training loss over time.
    pub(crate) curve: Vec<Point>,
}

impl Figures {
    /// Tokens a second over those of the sites alone.
    pub(crate) fn utilisation(&self) -> f64 {
        self.tokens_per_second / mean(self.alone_tokens_per_second.into_iter())
    }
}

/// What a site left behind.
#[derive(Debug, Clone, Default)]
pub(crate) struct SiteSeries {
    /// Its steps, ascending.
    pub(crate) steps: Vec<Step>,
    /// Readings of its interface, ascending.
    pub(crate) sent: Vec<Sent>,
}

/// Computes everything but the solo speeds and the validation.
///
/// # Errors
/// A site made fewer than two steps, or nobody read its interface.
pub(crate) fn figures(
    sites: &[SiteSeries],
    step_tokens: f64,
    steps_per_round: u64,
    alone_tokens_per_second: [f64; 2],
    validation_nats: Option<f64>,
) -> Result<Figures, String> {
    let few = sites.iter().position(|site| site.steps.len() < 2);
    if let Some(few) = few {
        return Err(format!("site {few} made {} steps; two are needed", sites[few].steps.len()));
    }
    if sites.iter().any(|site| site.sent.is_empty()) {
        return Err("an interface's counter was not read".to_owned());
    }
    let first_step_seconds = sites.iter().map(|site| site.steps[0].seconds).fold(0.0, f64::max);
    let ends = sites.iter().flat_map(|site| site.steps.last());
    let steps: Vec<Vec<Step>> = sites.iter().map(|site| site.steps.clone()).collect();
    Ok(Figures {
        tokens_per_second: sites.iter().map(|site| site_speed(site, step_tokens, steps_per_round)).sum(),
        alone_tokens_per_second,
        sent_bytes_per_1000_steps: sites.iter().map(|site| site_sent(site, steps_per_round)).collect(),
        start_bytes: sites.iter().map(|site| start_bytes(site, first_step_seconds)).collect(),
        first_step_seconds,
        stall_seconds: sites.iter().map(|site| stall_seconds(&site.steps)).fold(0.0, f64::max),
        seconds: ends.map(|step| step.seconds).fold(0.0, f64::max),
        tokens: sites.iter().map(|site| site.steps.len() as f64 * step_tokens).sum(),
        validation_nats,
        curve: curve(&steps, step_tokens, CURVE_WINDOW_STEPS),
    })
}

/// Between which steps speed is measured, and until when bytes are counted: the ends of the first and the last whole round;
/// where there is one round or none, the first and the last step, and all that was sent since, for a round's bytes may
/// come after its last step.
fn window(site: &SiteSeries, steps_per_round: u64) -> (Step, Step, f64) {
    let steps = &site.steps;
    let mut ends = steps.iter().filter(|step| step.step.is_multiple_of(steps_per_round.max(1)));
    match ends.next().copied().zip(ends.next_back().copied()) {
        Some((from, to)) => (from, to, to.seconds),
        None => (steps[0], steps[steps.len() - 1], f64::INFINITY),
    }
}

fn site_speed(site: &SiteSeries, step_tokens: f64, steps_per_round: u64) -> f64 {
    let (from, to, _) = window(site, steps_per_round);
    (to.step - from.step) as f64 * step_tokens / (to.seconds - from.seconds)
}

fn site_sent(site: &SiteSeries, steps_per_round: u64) -> f64 {
    let (from, to, until_seconds) = window(site, steps_per_round);
    let bytes = sent_until(&site.sent, until_seconds) - sent_until(&site.sent, from.seconds);
    bytes / (to.step - from.step) as f64 * 1e3
}

fn start_bytes(site: &SiteSeries, until_seconds: f64) -> f64 {
    sent_until(&site.sent, until_seconds) - sent_until(&site.sent, f64::NEG_INFINITY)
}

fn stall_seconds(steps: &[Step]) -> f64 {
    steps.windows(2).map(|pair| pair[1].seconds - pair[0].seconds).fold(0.0, f64::max)
}

/// The middle and the ends of several measurements.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Spread {
    /// Middle one.
    pub(crate) median: f64,
    /// Smallest.
    pub(crate) least: f64,
    /// Largest.
    pub(crate) most: f64,
}

impl Spread {
    /// Of all values that are numbers; none where there are none.
    pub(crate) fn of(values: impl Iterator<Item = f64>) -> Option<Self> {
        let values: Vec<f64> = values.filter(|value| value.is_finite()).collect();
        let least = values.iter().copied().reduce(f64::min)?;
        let most = values.iter().copied().reduce(f64::max)?;
        Some(Self { median: median(&values), least, most })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `count` steps of half a second from second 3 on, each sending 100 bytes, with a stall of 2 s after the second.
    fn site(count: u64) -> SiteSeries {
        let at = |step: u64| 3.0 + 0.5 * step as f64 + if step > 2 { 2.0 } else { 0.0 };
        let steps: Vec<Step> = (1..=count).map(|step| Step { seconds: at(step), step, nats: 5.0 }).collect();
        let mut sent = vec![Sent { seconds: -1.0, bytes: 50.0 }, Sent { seconds: 0.0, bytes: 50.0 }];
        sent.extend(steps.iter().map(|step| Sent { seconds: step.seconds, bytes: 1000.0 + 100.0 * step.step as f64 }));
        SiteSeries { steps, sent }
    }

    #[test]
    fn figures_leave_the_first_round_out_and_tell_the_start_apart() {
        let found = figures(&[site(12), site(12)], 1024.0, 4, [4000.0, 4200.0], Some(2.5)).unwrap();
        // From step 4 to step 12: 8 steps in 4 s, both sites.
        assert!((found.tokens_per_second - 2.0 * 2048.0).abs() < 1e-9);
        assert!((found.utilisation() - 4096.0 / 4100.0).abs() < 1e-12);
        assert_eq!(found.sent_bytes_per_1000_steps, [100_000.0, 100_000.0]);
        assert_eq!((found.first_step_seconds, found.stall_seconds, found.seconds), (3.5, 2.5, 11.0));
        assert_eq!(found.start_bytes, [1050.0, 1050.0]);
        assert_eq!((found.tokens, found.validation_nats), (24.0 * 1024.0, Some(2.5)));
    }

    #[test]
    fn one_round_is_measured_from_its_first_step() {
        let mut late = site(6);
        late.sent.push(Sent { seconds: 20.0, bytes: 5_100.0 });
        let found = figures(&[late], 1000.0, 20, [1.0, 1.0], None).unwrap();
        // From 1,100 at the first step on, in 5 steps; the round's bytes come after the last step.
        assert_eq!(found.sent_bytes_per_1000_steps, [800_000.0]);
        assert!((found.tokens_per_second - 5.0 * 1000.0 / 4.5).abs() < 1e-9);
        let error = figures(&[site(6), site(1)], 1000.0, 20, [1.0, 1.0], None).unwrap_err();
        assert_eq!(error, "site 1 made 1 steps; two are needed");
    }

    #[test]
    fn a_spread_leaves_out_what_is_no_number() {
        let spread = Spread::of([3.0, f64::NAN, 1.0, 2.0].into_iter()).unwrap();
        assert_eq!((spread.median, spread.least, spread.most), (2.0, 1.0, 3.0));
        assert_eq!(Spread::of(std::iter::empty()), None);
    }
}
