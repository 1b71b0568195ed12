//! Which link is measured next, to find the least rate that gives a utilisation. Pure.
//!
//! Utilisation grows with the rate, so that each measured rate bounds all wanted utilisations: between the fastest that was too slow and
//! the slowest above it that was enough, the middle is next; where one side is open, a rate [`STRIDE`] numbers further.

use std::collections::BTreeMap;

/// Numbers of the slowest and the fastest rate that are tried: 0.013 and 1,000 Gbit/s.
pub(super) const SLOWEST: i32 = -11;
/// See [`SLOWEST`].
pub(super) const FASTEST: i32 = 49;
/// Numbers between two rates as long as nothing bounds the search: a factor of 2.1.
const STRIDE: i32 = 4;

/// Utilisation by number of the rate.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Search {
    pub(super) points: BTreeMap<i32, f64>,
}

/// What is known of a wanted utilisation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Measure this rate.
    Measure(i32),
    /// This is the least that is enough; the slowest of all is not known to be the least.
    Found(i32),
    /// The fastest is not enough.
    Beyond,
}

impl Search {
    /// What to do next, from `start` on where nothing is known.
    pub(super) fn step(&self, wanted: f64, start: i32) -> Step {
        let slow = self.points.iter().rev().find(|(_, found)| **found < wanted).map(|(index, _)| *index);
        let enough = self.points.keys().copied().find(|index| slow.is_none_or(|slow| *index > slow));
        match (slow, enough) {
            (None, None) => Step::Measure(start.clamp(SLOWEST, FASTEST)),
            (Some(FASTEST), _) => Step::Beyond,
            (Some(slow), None) => Step::Measure((slow + STRIDE).min(FASTEST)),
            (None, Some(SLOWEST)) => Step::Found(SLOWEST),
            (None, Some(enough)) => Step::Measure((enough - STRIDE).max(SLOWEST)),
            (Some(slow), Some(enough)) if enough - slow == 1 => Step::Found(enough),
            (Some(slow), Some(enough)) => Step::Measure(slow + (enough - slow) / 2),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Searches in a link that is waited for as long as a reduction of 100 / rate exceeds what is hidden.
    fn find(utilisation: impl Fn(i32) -> f64, start: i32) -> (Vec<Step>, usize) {
        let mut search = Search::default();
        let found = super::super::published::WANTED.map(|wanted| {
            loop {
                match search.step(wanted, start) {
                    Step::Measure(index) => assert!(search.points.insert(index, utilisation(index)).is_none()),
                    done => return done,
                }
            }
        });
        (found.to_vec(), search.points.len())
    }

    #[test]
    fn the_least_rate_is_found_from_anywhere_in_few_measurements() {
        let utilisation = |index: i32| 1.0 / (1.0 + (1.5 / super::super::published::gigabits(index) - 0.5).max(0.0));
        let least = super::super::published::WANTED
            .map(|wanted| Step::Found((SLOWEST..=FASTEST).find(|index| utilisation(*index) >= wanted).unwrap()));
        for start in [-40, 0, 5, 20, 49, 90] {
            let (found, measurements) = find(utilisation, start);
            assert_eq!(found, least, "from {start}");
            assert!(measurements <= 24, "from {start}: {measurements}");
        }
        assert!(find(utilisation, 5).1 <= 12);
    }

    #[test]
    fn ends_of_the_range_end_the_search() {
        assert_eq!(find(|_| 0.3, 40).0, [Step::Beyond; 5]);
        assert_eq!(find(|_| 1.0, 0).0, [Step::Found(SLOWEST); 5]);
    }

    #[test]
    fn a_slower_rate_that_was_enough_by_chance_does_not_count() {
        let search = Search { points: [(3, 0.95), (5, 0.85), (6, 0.92)].into() };
        assert_eq!(search.step(0.9, 0), Step::Found(6));
        assert_eq!(search.step(0.94, 0), Step::Measure(10));
    }
}
