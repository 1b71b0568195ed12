//! Which way another site's delta is fetched: directly from the sites, or from an object store.
//!
//! Both ways bring the same bytes, checked against the same hash, so that each site may decide for itself and at any time. It
//! goes by what the ways have carried: the bits of a delta over the seconds from asking for it to having it, with all that
//! lies between (handshakes, a sender that is still busy with others, an object that is not there yet). Of each site a
//! delta is first fetched once directly and once from the store, then by the faster way; the other one is tried again now and
//! then, because links change. Whichever is first, the other one follows where it fails or takes long.

use base::SiteId;
use std::collections::BTreeMap;
use std::fmt;

/// The other way must have been this much faster: measurements of the same link differ by as much.
const SWITCH_FACTOR: f64 = 1.25;

/// After so many deltas of a site the slower way is tried again: one in 32 costs 3 % even where it takes twice as long.
const MEASURE_AGAIN: u32 = 32;

/// Part of the newest measurement in what is believed.
const NEWEST_WEIGHT: f64 = 0.5;

/// Head start of a way while nothing is known: what a TCP connection that nobody answers may take.
const HEAD_START_UNKNOWN_SECONDS: f64 = 10.0;

/// Head start where speeds are known: so many times what the faster way should take, and a second for what is not bytes.
const HEAD_START_FACTOR: f64 = 2.0;
const HEAD_START_SECONDS_MIN: f64 = 1.0;

/// A way for a delta.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Route {
    /// From the site that made it, or another one that holds it.
    Direct,
    /// From where that site has left it.
    ObjectStore,
}

impl Route {
    fn other(self) -> Self {
        match self {
            Self::Direct => Self::ObjectStore,
            Self::ObjectStore => Self::Direct,
        }
    }
}

impl fmt::Display for Route {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Direct => "direct",
            Self::ObjectStore => "object store",
        })
    }
}

/// Which ways there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OpenRoutes {
    /// The site can be dialled.
    pub direct: bool,
    /// This site has an object store.
    pub object_store: bool,
}

/// Why a way was chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RouteReason {
    /// There is no other.
    OnlyWay,
    /// It has not been measured.
    NotMeasured,
    /// It has been faster, or not enough slower to change.
    Measured {
        /// What it has carried.
        bits_per_second: f64,
        /// What the other one has; 0 where it failed.
        other_bits_per_second: f64,
    },
    /// It was the slower one when it was last measured, a while ago.
    MeasuredAnew,
}

impl fmt::Display for RouteReason {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OnlyWay => formatter.write_str("there is no other way"),
            Self::NotMeasured => formatter.write_str("it has not been measured yet"),
            Self::Measured { bits_per_second, other_bits_per_second: 0.0 } => {
                write!(formatter, "{:.2} Mbit/s, and the other way failed", bits_per_second / 1e6)
            }
            Self::Measured { bits_per_second, other_bits_per_second } => {
                let (this, other) = (bits_per_second / 1e6, other_bits_per_second / 1e6);
                write!(formatter, "{this:.2} Mbit/s, and {other:.2} Mbit/s the other way")
            }
            Self::MeasuredAnew => formatter.write_str("it is measured again"),
        }
    }
}

/// How a delta is to be fetched.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RouteChoice {
    /// The way to begin with.
    pub first: Route,
    /// The one that follows where the first fails, or has not ended after [`RouteChoice::head_start_seconds`].
    pub second: Option<Route>,
    /// How long the first way is alone.
    pub head_start_seconds: f64,
    /// Why it is the first.
    pub reason: RouteReason,
    /// Whether it is to stay and another one than so far.
    pub is_news: bool,
}

/// What is known of the ways to each site.
#[derive(Debug, Clone, Default)]
pub struct Routes(BTreeMap<SiteId, Ways>);

#[derive(Debug, Clone, Copy, Default)]
struct Ways {
    /// Bits per second; 0 where the last try failed.
    direct: Option<f64>,
    object_store: Option<f64>,
    chosen: Option<Route>,
    since_measured: u32,
}

impl Ways {
    fn rate(&self, route: Route) -> Option<f64> {
        match route {
            Route::Direct => self.direct,
            Route::ObjectStore => self.object_store,
        }
    }

    fn set(&mut self, route: Route, rate: f64) {
        match route {
            Route::Direct => self.direct = Some(rate),
            Route::ObjectStore => self.object_store = Some(rate),
        }
    }

    /// Of two open ways.
    fn choose(&mut self) -> (Route, RouteReason) {
        let (Some(direct), Some(object_store)) = (self.direct, self.object_store) else {
            let route = if self.direct.is_none() { Route::Direct } else { Route::ObjectStore };
            return (route, RouteReason::NotMeasured);
        };
        // An object store may cost money.
        let so_far = self.chosen.unwrap_or(Route::Direct);
        let rate = |route| if route == Route::Direct { direct } else { object_store };
        let other = so_far.other();
        let route = if rate(other) > SWITCH_FACTOR * rate(so_far) { other } else { so_far };
        self.since_measured += 1;
        if self.since_measured >= MEASURE_AGAIN {
            self.since_measured = 0;
            return (route.other(), RouteReason::MeasuredAnew);
        }
        let (bits_per_second, other_bits_per_second) = (rate(route), rate(route.other()));
        (route, RouteReason::Measured { bits_per_second, other_bits_per_second })
    }

    fn head_start_seconds(&self, bytes: u64) -> f64 {
        let fastest = self.direct.unwrap_or(0.0).max(self.object_store.unwrap_or(0.0));
        if fastest > 0.0 {
            HEAD_START_SECONDS_MIN + HEAD_START_FACTOR * bits(bytes) / fastest
        } else {
            HEAD_START_UNKNOWN_SECONDS
        }
    }
}

fn bits(bytes: u64) -> f64 {
    8.0 * bytes as f64
}

impl Routes {
    /// The way for the next delta of `from`, which has `bytes`; `None` where there is none.
    pub fn choose(&mut self, from: SiteId, bytes: u64, open: OpenRoutes) -> Option<RouteChoice> {
        let ways = self.0.entry(from).or_default();
        let (first, reason) = match (open.direct, open.object_store) {
            (true, true) => ways.choose(),
            (true, false) => (Route::Direct, RouteReason::OnlyWay),
            (false, true) => (Route::ObjectStore, RouteReason::OnlyWay),
            (false, false) => return None,
        };
        let second = (open.direct && open.object_store).then_some(first.other());
        let to_stay = matches!(reason, RouteReason::OnlyWay | RouteReason::Measured { .. });
        let is_news = to_stay && ways.chosen != Some(first);
        if is_news {
            ways.chosen = Some(first);
        }
        Some(RouteChoice { first, second, head_start_seconds: ways.head_start_seconds(bytes), reason, is_news })
    }

    /// A delta of `from` came that way; or had not come yet when it came the other way.
    pub fn measured(&mut self, from: SiteId, route: Route, bytes: u64, seconds: f64) {
        let ways = self.0.entry(from).or_default();
        // A clock that stood still has measured nothing slower than this.
        let newest = bits(bytes) / seconds.max(1e-6);
        let believed = match ways.rate(route) {
            Some(before) if before > 0.0 => (1.0 - NEWEST_WEIGHT) * before + NEWEST_WEIGHT * newest,
            _ => newest,
        };
        ways.set(route, believed);
    }

    /// No delta of `from` could be had that way.
    pub fn failed(&mut self, from: SiteId, route: Route) {
        self.0.entry(from).or_default().set(route, 0.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FROM: SiteId = SiteId(1);
    const BYTES: u64 = 1_000_000;
    const BOTH: OpenRoutes = OpenRoutes { direct: true, object_store: true };

    /// Fetches a delta, where the ways take so many seconds; `None` fails.
    fn fetch(routes: &mut Routes, direct: Option<f64>, object_store: Option<f64>) -> RouteChoice {
        let choice = routes.choose(FROM, BYTES, BOTH).unwrap();
        let takes = |route| if route == Route::Direct { direct } else { object_store };
        match takes(choice.first) {
            Some(seconds) => routes.measured(FROM, choice.first, BYTES, seconds),
            None => routes.failed(FROM, choice.first),
        }
        choice
    }

    #[test]
    fn each_way_is_measured_and_the_faster_one_kept() {
        for (direct, object_store, faster) in [(1.0, 4.0, Route::Direct), (4.0, 1.0, Route::ObjectStore)] {
            let mut routes = Routes::default();
            let choices: Vec<_> = (0..10).map(|_| fetch(&mut routes, Some(direct), Some(object_store))).collect();
            assert_eq!((choices[0].first, choices[0].reason), (Route::Direct, RouteReason::NotMeasured));
            assert_eq!((choices[1].first, choices[1].reason), (Route::ObjectStore, RouteReason::NotMeasured));
            for choice in &choices[2..] {
                assert_eq!((choice.first, choice.second), (faster, Some(faster.other())));
                // Twice the second that the faster way takes, and one.
                assert_eq!(choice.head_start_seconds, 3.0);
            }
            let text = choices[2].reason.to_string();
            assert_eq!(text, "8.00 Mbit/s, and 2.00 Mbit/s the other way");
        }
    }

    #[test]
    fn a_way_that_fails_is_left_and_one_that_mends_is_found_again() {
        let mut routes = Routes::default();
        (0..2).for_each(|_| {
            fetch(&mut routes, Some(1.0), Some(2.0));
        });
        assert_eq!(fetch(&mut routes, None, Some(2.0)).first, Route::Direct);
        let next = fetch(&mut routes, None, Some(2.0));
        assert_eq!(next.first, Route::ObjectStore);
        assert_eq!(next.reason.to_string(), "4.00 Mbit/s, and the other way failed");
        let until_direct = (0..).find(|_| fetch(&mut routes, Some(1.0), Some(2.0)).first == Route::Direct);
        assert!(until_direct.unwrap() < MEASURE_AGAIN as usize);
        assert_eq!(fetch(&mut routes, Some(1.0), Some(2.0)).first, Route::Direct, "it is the faster one again");
    }

    #[test]
    fn small_differences_change_nothing() {
        let mut routes = Routes::default();
        let choices: Vec<_> = (0..100).map(|_| fetch(&mut routes, Some(1.0), Some(0.9))).collect();
        let news: Vec<_> = choices.iter().filter(|choice| choice.is_news).map(|choice| choice.first).collect();
        assert_eq!(news, [Route::Direct]);
        let anew = choices.iter().filter(|choice| choice.reason == RouteReason::MeasuredAnew).count();
        assert_eq!(anew, (100 - 2) / MEASURE_AGAIN as usize);
    }

    #[test]
    fn where_there_is_one_way_it_is_that() {
        let mut routes = Routes::default();
        for (direct, object_store, only) in [(true, false, Route::Direct), (false, true, Route::ObjectStore)] {
            let choice = routes.choose(FROM, BYTES, OpenRoutes { direct, object_store }).unwrap();
            assert_eq!((choice.first, choice.second, choice.reason), (only, None, RouteReason::OnlyWay));
        }
        assert_eq!(routes.choose(FROM, BYTES, OpenRoutes { direct: false, object_store: false }), None);
    }
}
