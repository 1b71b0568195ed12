//! What is settled before anything is looked for: strategy, H, bits, exchange, of a run that was published or that somebody has configured.
//!
//! A filter over the ways that [`super::between`] tries, with the given values in place of the tried ones: they need not be among those.

use super::Task;
use super::between::{Judged, Strategy, Wan, Way, fragments, judged, round_case};
use crate::units::{BytesPerSecond, Seconds, plain};
use crate::wan::loss::loss_ratio;
use crate::wan::{Exchange, RoundCase, round_time_at};
use base::Hint;

/// Most inner steps and fragments that can be meant.
pub const STEPS_MAX: u32 = 100_000;

/// Most bits a parameter takes.
pub const BITS_MAX: u32 = 64;

/// What is given of the way between the sites; the rest is looked for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Given {
    /// Which strategy.
    pub strategy: Option<Strategy>,
    /// H.
    pub inner_steps: Option<u32>,
    /// P.
    pub fragments: Option<u32>,
    /// tau.
    pub overlap_steps: Option<u32>,
    /// Bits of a value that travels, its place included.
    pub bits: Option<u32>,
    /// Share of the values that travel, as codes that keep the largest do.
    pub density: f64,
    /// How the deltas meet.
    pub exchange: Option<Exchange>,
    /// Coding and decoding, bytes of f32 a second, where it is not what a site's CPU does.
    pub coding: Option<BytesPerSecond>,
}

impl Default for Given {
    fn default() -> Self {
        Self {
            strategy: None,
            inner_steps: None,
            fragments: None,
            overlap_steps: None,
            bits: None,
            density: 1.0,
            exchange: None,
            coding: None,
        }
    }
}

/// Why nothing travels like that.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum GivenError {
    /// A number out of its range.
    #[error("{option} {} is not between {} and {greatest}", plain(*found), plain(*least))]
    Range {
        /// The option.
        option: &'static str,
        /// Its value.
        found: f64,
        /// Least.
        least: f64,
        /// Greatest.
        greatest: f64,
    },
    /// A setting that the strategy does not have.
    #[error("{option} {found} is given, but {} has none", .strategy.name())]
    Foreign {
        /// The option.
        option: &'static str,
        /// Its value.
        found: u32,
        /// The strategy.
        strategy: Strategy,
    },
}

impl Hint for GivenError {
    fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Range { option, least, .. } => format!("give {option} a number from {least}, or leave it out"),
            Self::Foreign { option, strategy: Strategy::Diloco, .. } => {
                format!("leave {option} out, or take --strategy streaming")
            }
            Self::Foreign { option, .. } => format!("leave {option} out, or take --strategy diloco or streaming"),
        })
    }
}

impl Given {
    /// Refuses what contradicts itself.
    ///
    /// # Errors
    /// A number out of its range, or a setting that the strategy does not have.
    pub fn check(&self) -> Result<(), GivenError> {
        let steps = f64::from(STEPS_MAX);
        let numbers = [
            ("--inner-steps", self.inner_steps.map(f64::from), 1.0, steps),
            ("--fragments", self.fragments.map(f64::from), 1.0, steps),
            ("--overlap-steps", self.overlap_steps.map(f64::from), 0.0, steps),
            ("--bits", self.bits.map(f64::from), 1.0, f64::from(BITS_MAX)),
            ("--density", Some(self.density), 1e-6, 1.0),
            ("--coding-gb-s", self.coding.map(|rate| rate.0 / 1e9), 1e-3, 1e6),
        ];
        for (option, found, least, greatest) in numbers {
            if let Some(found) = found.filter(|found| !(least..=greatest).contains(found)) {
                return Err(GivenError::Range { option, found, least, greatest });
            }
        }
        match self.strategy.and_then(|strategy| Some((strategy, self.foreign(strategy)?))) {
            Some((strategy, (option, found))) => Err(GivenError::Foreign { option, found, strategy }),
            None => Ok(()),
        }
    }

    /// The given setting that a strategy does not have.
    fn foreign(&self, strategy: Strategy) -> Option<(&'static str, u32)> {
        let beyond =
            |option, given: Option<u32>, most| given.filter(|given| *given > most).map(|given| (option, given));
        let inner = || beyond("--inner-steps", self.inner_steps, 1);
        let streamed = || beyond("--fragments", self.fragments, 1).or(beyond("--overlap-steps", self.overlap_steps, 0));
        match strategy {
            Strategy::Synchronous => inner().or_else(streamed),
            Strategy::Diloco => streamed(),
            Strategy::Streaming => None,
        }
    }

    /// A tried way with the given values; none where its strategy is another or does not have them.
    fn settle(&self, task: &Task, way: Way) -> Option<Way> {
        if self.strategy.is_some_and(|strategy| strategy != way.strategy) || self.foreign(way.strategy).is_some() {
            return None;
        }
        let mut way = way;
        way.bits = self.bits.unwrap_or(way.bits);
        way.exchange = self.exchange.unwrap_or(way.exchange);
        if way.strategy != Strategy::Synchronous {
            way.inner_steps = self.inner_steps.unwrap_or(way.inner_steps);
        }
        if way.strategy == Strategy::Streaming {
            way.overlap_steps = self.overlap_steps.unwrap_or(way.overlap_steps);
            way.fragments = self.fragments.unwrap_or_else(|| fragments(task.shape.layers, way.inner_steps));
            if self.inner_steps.is_none() {
                // As run.toml wants it; where both are given, others than ours may have run otherwise.
                way.inner_steps = way.inner_steps.next_multiple_of(way.fragments);
            }
        }
        Some(way)
    }
}

/// Every way for so many sites that has what is given; those that lose least information first.
pub fn settled(task: &Task, given: &Given, sites: usize, step: Seconds, wan: Wan) -> Vec<Judged> {
    let tried = judged(task, sites, step, wan);
    if sites < 2 || *given == Given::default() {
        return tried.collect();
    }
    let mut ways: Vec<Way> = Vec::new();
    for way in tried.filter_map(|judged| given.settle(task, judged.way)) {
        if !ways.contains(&way) {
            ways.push(way);
        }
    }
    ways.into_iter().map(|way| judge(task, given, sites, step, wan, way)).collect()
}

fn judge(task: &Task, given: &Given, sites: usize, step: Seconds, wan: Wan, way: Way) -> Judged {
    let tried = round_case(task, sites, step, wan, way);
    let case = RoundCase {
        bits_per_parameter: tried.bits_per_parameter * given.density,
        coding: given.coding.unwrap_or(tried.coding),
        ..tried
    };
    let loss = loss_ratio(task.shape.parameters(), sites as f64, f64::from(way.inner_steps));
    Judged { way, round: round_time_at(&case, wan.rate, wan.rate), loss }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models;
    use crate::units::BytesPerSecond;

    fn task() -> Task {
        Task { shape: models::parse("llama-3-8b").unwrap(), global_batch: 512, tokens: 1e11 }
    }

    const WAN: Wan = Wan { rate: BytesPerSecond(1e9), round_trip: Seconds(0.05) };

    fn settled_to(given: Given) -> Vec<Judged> {
        given.check().unwrap();
        settled(&task(), &given, 3, Seconds(4.0), WAN)
    }

    #[test]
    fn what_is_given_and_among_the_tried_is_judged_as_if_it_were_tried() {
        let tried: Vec<Judged> = judged(&task(), 3, Seconds(4.0), WAN).collect();
        for judged in &tried {
            let way = judged.way;
            let given = Given {
                strategy: Some(way.strategy),
                inner_steps: Some(way.inner_steps),
                fragments: Some(way.fragments),
                overlap_steps: Some(way.overlap_steps),
                bits: Some(way.bits),
                exchange: Some(way.exchange),
                ..Given::default()
            };
            assert_eq!(settled_to(given), [*judged]);
        }
        assert_eq!(settled_to(Given::default()), tried);
    }

    #[test]
    fn values_that_nobody_tries_are_taken() {
        let strategy = Some(Strategy::Diloco);
        let found = settled_to(Given { strategy, inner_steps: Some(77), bits: Some(14), ..Given::default() });
        assert!(!found.is_empty());
        assert!(found.iter().all(|judged| (judged.way.inner_steps, judged.way.bits) == (77, 14)));
        let sparse = Given { strategy, inner_steps: Some(77), bits: Some(14), density: 1.0 / 64.0, ..Given::default() };
        let sparse = settled_to(sparse);
        assert!((found[0].round.sent.0 / sparse[0].round.sent.0 - 64.0).abs() < 1e-9);
        let coded =
            |coding| settled_to(Given { coding, bits: Some(4), inner_steps: Some(77), strategy, ..Given::default() });
        assert!(coded(Some(BytesPerSecond(1e12)))[0].round.stall < coded(None)[0].round.stall);
        let streaming = settled_to(Given { fragments: Some(6), inner_steps: Some(60), ..Given::default() });
        assert!(streaming.iter().all(|judged| judged.way.strategy == Strategy::Streaming) && !streaming.is_empty());
        let sevens = settled_to(Given { fragments: Some(7), ..Given::default() });
        assert!(sevens.iter().all(|judged| judged.way.inner_steps % 7 == 0) && !sevens.is_empty());
    }

    #[test]
    fn what_contradicts_itself_is_refused() {
        let refused = |given: Given| given.check().unwrap_err();
        let synchronous = Given { strategy: Some(Strategy::Synchronous), ..Given::default() };
        let error = refused(Given { inner_steps: Some(30), ..synchronous });
        assert_eq!(error.to_string(), "--inner-steps 30 is given, but synchronous has none");
        let diloco = Given { strategy: Some(Strategy::Diloco), ..Given::default() };
        assert!(matches!(refused(Given { overlap_steps: Some(1), ..diloco }), GivenError::Foreign { .. }));
        for density in [0.0, -1.0, 1.5, f64::NAN] {
            assert!(matches!(refused(Given { density, ..diloco }), GivenError::Range { .. }), "{density}");
        }
        assert!(refused(Given { bits: Some(0), ..diloco }).hint().unwrap().contains("--bits"));
    }
}
