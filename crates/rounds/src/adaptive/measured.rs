//! From what was measured on each link to the few numbers that a round's time depends on, smoothed over rounds.

use crate::stall::Conditions;
use std::collections::BTreeMap;

/// Trips between sites (or site and coordinator) from a snapshot to its commit, in round trips: Computed and DeltaReady half a one
/// each, the request for the delta one, Holds and Commit half a one each.
const ROUND_TRIPS: f64 = 3.0;

/// A loss among the last segments of an answer is found a round trip later; TCP's initial window has ten (RFC 6928). Earlier losses
/// are part of the measured goodput.
const TAIL_SEGMENTS: f64 = 10.0;

/// Bounds that no link has: a dead one, and one beyond any network.
const BYTES_PER_SECOND: (f64, f64) = (1.0, 1e15);

/// Nobody trains over a longer round trip.
const ROUND_TRIP_SECONDS_MAX: f64 = 1e3;

/// Bounds of an inner step, seconds: a century is none.
const STEP_SECONDS: (f64, f64) = (1e-6, 3e9);

/// Host work on one value, seconds: more is no measurement.
const HOST_SECONDS_PER_ELEMENT_MAX: f64 = 1.0;

/// Weight of the newest round: with noise of +-10 % (uniform) the smoothed value stays within about 4 %.
const SMOOTHING: f64 = 0.25;

/// Times that the newest value is above or below the smoothed one: no noise, the link has changed.
const BREAK_FACTOR: f64 = 2.0;

/// Rounds in a row for which it must be so before the past is forgotten.
const BREAK_ROUNDS: u32 = 2;

/// One way between two sites, as the site that fetches has measured it.
#[derive(Debug, Clone, PartialEq)]
pub struct LinkMeasure {
    /// Who sends, for people as well.
    pub from: String,
    /// Who receives.
    pub to: String,
    /// Goodput.
    pub bytes_per_second: f64,
    /// Without queues.
    pub round_trip_seconds: f64,
    /// Part of the bytes that was sent again, 0 to 1.
    pub loss: f64,
}

/// What the measured goodputs of one site's links are to one another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sharing {
    /// Each was measured while the site's other links rested: together they are slower. A site's times add up.
    Apart,
    /// They were measured while all were busy, as in rounds that fetch from everybody at once: each is a share already.
    Together,
}

/// How deltas get from site to site.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exchange {
    /// Every site fetches every other's delta.
    Mesh,
    /// Every site merges a part and gives it back: 2 / n of a delta crosses each link, in two trips.
    Sharded,
}

/// What is known when a round closes.
#[derive(Debug, Clone, PartialEq)]
pub struct Measured {
    /// An inner step of the fastest site.
    pub step_seconds: f64,
    /// Encoding, checking and merging of one value of a fragment, over all deltas; 0 where it is not known.
    pub host_seconds_per_element: f64,
    /// Sites that take part.
    pub sites: usize,
    /// What is known of their links.
    pub links: Vec<LinkMeasure>,
    /// Whether the goodputs are shares.
    pub sharing: Sharing,
    /// How deltas travel.
    pub exchange: Exchange,
}

/// The limits that [`Conditions`] come from, in words.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Bottleneck {
    pub(super) from: String,
    pub(super) to: String,
    pub(super) bytes_per_second: f64,
}

impl Measured {
    /// The numbers of the time model, and the slowest link; `None` where no link or no step has been measured.
    pub(super) fn conditions(&self) -> Option<(Conditions, Bottleneck)> {
        if self.step_seconds.is_nan() || self.step_seconds <= 0.0 {
            return None;
        }
        let step_seconds = self.step_seconds.clamp(STEP_SECONDS.0, STEP_SECONDS.1);
        let known = || self.links.iter().filter(|link| !link.bytes_per_second.is_nan());
        let slowest = known().min_by(|one, other| one.bytes_per_second.total_cmp(&other.bytes_per_second))?;
        let latency_seconds = known().map(LinkMeasure::latency_seconds).fold(0.0, f64::max) * self.trips();
        let host = self.host_seconds_per_element;
        let host_seconds_per_element = if host > 0.0 { host.min(HOST_SECONDS_PER_ELEMENT_MAX) } else { 0.0 };
        let seconds_per_byte = self.seconds_per_byte(&known().collect::<Vec<_>>());
        let bottleneck =
            Bottleneck { from: slowest.from.clone(), to: slowest.to.clone(), bytes_per_second: slowest.rate() };
        Some((Conditions { step_seconds, seconds_per_byte, latency_seconds, host_seconds_per_element }, bottleneck))
    }

    /// What the site with the most to do, sending or receiving, needs for one byte of a delta with all its copies. A link that has not
    /// been measured counts as the site's slowest.
    fn seconds_per_byte(&self, links: &[&LinkMeasure]) -> f64 {
        let copies = self.sites.saturating_sub(1).max(1) as f64;
        let mut sides: BTreeMap<(bool, &str), (f64, f64, f64)> = BTreeMap::new();
        for link in links {
            let seconds = 1.0 / link.rate();
            for side in [(true, link.from.as_str()), (false, link.to.as_str())] {
                let (count, sum, longest) = sides.entry(side).or_default();
                (*count, *sum, *longest) = (*count + 1.0, *sum + seconds, longest.max(seconds));
            }
        }
        let busy = |(count, sum, longest): &(f64, f64, f64)| match self.sharing {
            Sharing::Together => *longest,
            Sharing::Apart => sum + longest * (copies - count).max(0.0),
        };
        sides.values().map(busy).fold(0.0, f64::max) * self.part_of_delta()
    }

    /// Of a delta, what one link carries in a round.
    fn part_of_delta(&self) -> f64 {
        match self.exchange {
            Exchange::Mesh => 1.0,
            Exchange::Sharded => 2.0 / self.sites.max(2) as f64,
        }
    }

    /// [`ROUND_TRIPS`]; a merged part needs to be announced and fetched as well.
    fn trips(&self) -> f64 {
        match self.exchange {
            Exchange::Mesh => ROUND_TRIPS,
            Exchange::Sharded => ROUND_TRIPS + 2.0,
        }
    }
}

impl LinkMeasure {
    fn rate(&self) -> f64 {
        self.bytes_per_second.clamp(BYTES_PER_SECOND.0, BYTES_PER_SECOND.1)
    }

    /// A round trip, with the part of one that losses at the end of an answer cost.
    fn latency_seconds(&self) -> f64 {
        let measured = self.round_trip_seconds;
        let seconds = if measured > 0.0 { measured.min(ROUND_TRIP_SECONDS_MAX) } else { 0.0 };
        seconds * (1.0 + (TAIL_SEGMENTS * self.loss.max(0.0)).min(1.0) / ROUND_TRIPS)
    }
}

/// The mean of the last rounds' conditions.
#[derive(Debug, Clone, Default)]
pub(super) struct Smoothed {
    mean: Option<Conditions>,
    rounds: u32,
    broken: u32,
    sites: usize,
}

impl Smoothed {
    /// Takes the newest and gives the mean. Other sites, or a break, begin anew.
    pub(super) fn add(&mut self, newest: Conditions, sites: usize) -> Conditions {
        let before = self.mean.filter(|_| self.sites == sites);
        self.sites = sites;
        let is_break = before.is_some_and(|mean| differs(newest, mean));
        self.broken = if is_break { self.broken + 1 } else { 0 };
        let mean = match before {
            Some(mean) if self.broken < BREAK_ROUNDS => {
                // The first rounds count alike.
                self.rounds = self.rounds.saturating_add(1);
                mix(mean, newest, SMOOTHING.max(1.0 / f64::from(self.rounds)))
            }
            _ => {
                (self.rounds, self.broken) = (1, 0);
                newest
            }
        };
        self.mean = Some(mean);
        mean
    }
}

fn differs(newest: Conditions, mean: Conditions) -> bool {
    let apart = |one: f64, other: f64| one > BREAK_FACTOR * other || other > BREAK_FACTOR * one;
    apart(newest.seconds_per_byte, mean.seconds_per_byte) || apart(newest.step_seconds, mean.step_seconds)
}

fn mix(mean: Conditions, newest: Conditions, part: f64) -> Conditions {
    let mix = |mean: f64, newest: f64| mean + part * (newest - mean);
    Conditions {
        step_seconds: mix(mean.step_seconds, newest.step_seconds),
        seconds_per_byte: mix(mean.seconds_per_byte, newest.seconds_per_byte),
        latency_seconds: mix(mean.latency_seconds, newest.latency_seconds),
        host_seconds_per_element: mix(mean.host_seconds_per_element, newest.host_seconds_per_element),
    }
}
