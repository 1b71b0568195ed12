//! What `--link` says about one link: `20Mbit/s,50ms,0.1%`. Parsing and nothing else.

use serde::Deserialize;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// Slowest and fastest link. At 1 kbit/s one segment takes 12 s; above 100 Gbit/s no relay in user space means anything.
const BITS_PER_SECOND: std::ops::RangeInclusive<u64> = 1_000..=100_000_000_000;

/// Longest round trip, and longest jitter: a handshake of four round trips must end within 10 s.
const ROUND_TRIP_MICROSECONDS_MAX: u64 = 2_000_000;

/// Most loss: above it hardly a connection lives through its handshake.
const LOSS_PARTS_PER_MILLION_MAX: u64 = 500_000;

/// Units of a rate, in bits a second. Longer ones first: they end in the shorter ones.
const RATE_UNITS: [(&str, f64); 4] = [("kbit/s", 1e3), ("Mbit/s", 1e6), ("Gbit/s", 1e9), ("bit/s", 1.0)];

/// Units of a time, in microseconds.
const TIME_UNITS: [(&str, f64); 3] = [("us", 1.0), ("ms", 1e3), ("s", 1e6)];

/// Loss, in parts per million.
const LOSS_UNITS: [(&str, f64); 1] = [("%", 1e4)];

/// What is expected, for messages.
const EXPECTED: &str = "RATE[,ROUND-TRIP[,JITTER]][,LOSS] is expected, as in 20Mbit/s,50ms,5ms,0.1%";

/// One direction of a link between two sites, or between a site and the coordinator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub(super) struct LinkSpec {
    /// Bits of TCP payload a second, of all connections of this direction together.
    pub(super) bits_per_second: u64,
    /// Round trip over two links like this one: this direction contributes half of it.
    pub(super) round_trip: Duration,
    /// The round trip varies by up to this: this direction's pieces come up to half of it later.
    pub(super) jitter: Duration,
    /// Probability, in parts per million, that a connection breaks within 64 KiB in this direction.
    pub(super) loss_parts_per_million: u32,
}

impl LinkSpec {
    /// Probability that a connection breaks within 64 KiB.
    pub(super) fn loss(&self) -> f64 {
        f64::from(self.loss_parts_per_million) / 1e6
    }

    /// The same link on which no connection breaks.
    pub(super) fn without_loss(self) -> Self {
        Self { loss_parts_per_million: 0, ..self }
    }
}

impl FromStr for LinkSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (mut rate, mut times, mut loss) = (None, Vec::new(), None);
        for part in text.split(',').map(str::trim) {
            let quantity = Quantity::parse(part).map_err(|problem| format!("{problem}; {EXPECTED}"))?;
            let twice = match quantity {
                Quantity::Rate(value) => rate.replace(value).is_some(),
                Quantity::Time(value) => {
                    times.push(Duration::from_micros(value));
                    times.len() > 2
                }
                Quantity::Loss(value) => loss.replace(value).is_some(),
            };
            if twice {
                return Err(format!("'{part}' is one too many of its kind in '{text}'; {EXPECTED}"));
            }
        }
        let mut times = times.into_iter();
        Ok(Self {
            bits_per_second: rate.ok_or_else(|| format!("'{text}' has no rate; {EXPECTED}"))?,
            round_trip: times.next().unwrap_or_default(),
            jitter: times.next().unwrap_or_default(),
            loss_parts_per_million: loss.unwrap_or_default() as u32,
        })
    }
}

impl TryFrom<String> for LinkSpec {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl fmt::Display for LinkSpec {
    /// What [`FromStr`] reads back.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}Mbit/s", self.bits_per_second as f64 / 1e6)?;
        if !self.round_trip.is_zero() || !self.jitter.is_zero() {
            write!(formatter, ",{}ms", self.round_trip.as_micros() as f64 / 1e3)?;
        }
        if !self.jitter.is_zero() {
            write!(formatter, ",{}ms", self.jitter.as_micros() as f64 / 1e3)?;
        }
        if self.loss_parts_per_million > 0 {
            write!(formatter, ",{}%", f64::from(self.loss_parts_per_million) / 1e4)?;
        }
        Ok(())
    }
}

/// A number with its unit: bits a second, microseconds, or parts per million.
enum Quantity {
    Rate(u64),
    Time(u64),
    Loss(u64),
}

impl Quantity {
    fn parse(part: &str) -> Result<Self, String> {
        if let Some(value) = number_before(part, &RATE_UNITS)? {
            let range = (*BITS_PER_SECOND.start(), *BITS_PER_SECOND.end());
            return within(part, value, range, "a rate is 1kbit/s to 100Gbit/s").map(Self::Rate);
        }
        if let Some(value) = number_before(part, &TIME_UNITS)? {
            return within(part, value, (0, ROUND_TRIP_MICROSECONDS_MAX), "a time is 0 to 2s").map(Self::Time);
        }
        if let Some(value) = number_before(part, &LOSS_UNITS)? {
            return within(part, value, (0, LOSS_PARTS_PER_MILLION_MAX), "a loss is 0 to 50%").map(Self::Loss);
        }
        Err(format!("'{part}' has no unit: they are kbit/s, Mbit/s, Gbit/s, us, ms, s and %"))
    }
}

fn within(part: &str, value: f64, (least, most): (u64, u64), expected: &str) -> Result<u64, String> {
    let rounded = value.round();
    match rounded >= least as f64 && rounded <= most as f64 {
        true => Ok(rounded as u64),
        false => Err(format!("'{part}': {expected}")),
    }
}

/// The number in front of one of these units, times the unit. `None` where another unit follows, or none.
fn number_before(part: &str, units: &[(&str, f64)]) -> Result<Option<f64>, String> {
    let split = part.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(part.len());
    let (digits, unit) = (&part[..split], part[split..].trim_start());
    let Some((_, factor)) = units.iter().find(|(name, _)| *name == unit) else { return Ok(None) };
    // Digits and points only: no sign, no exponent, no infinity.
    match digits.parse::<f64>() {
        Ok(number) => Ok(Some(number * factor)),
        Err(_) => Err(format!("'{part}' has no number before its unit")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn spec(bits_per_second: u64, round_trip_ms: u64, jitter_ms: u64, loss_parts_per_million: u32) -> LinkSpec {
        let (round_trip, jitter) = (Duration::from_millis(round_trip_ms), Duration::from_millis(jitter_ms));
        LinkSpec { bits_per_second, round_trip, jitter, loss_parts_per_million }
    }

    #[test]
    fn a_link_is_a_rate_a_round_trip_jitter_and_loss() {
        for (text, expected) in [
            ("20Mbit/s,50ms,0.1%", spec(20_000_000, 50, 0, 1_000)),
            ("20 Mbit/s, 50 ms, 5 ms, 0.1 %", spec(20_000_000, 50, 5, 1_000)),
            ("1.5Gbit/s", spec(1_500_000_000, 0, 0, 0)),
            ("64kbit/s,2s", spec(64_000, 2_000, 0, 0)),
            ("1000bit/s,1000us,2000us", spec(1_000, 1, 2, 0)),
            ("5%,100ms,1Mbit/s", spec(1_000_000, 100, 0, 50_000)),
            ("100Gbit/s,0ms,0%", spec(100_000_000_000, 0, 0, 0)),
        ] {
            assert_eq!(text.parse::<LinkSpec>().as_ref(), Ok(&expected), "{text}");
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_the_reason() {
        for (text, reason) in [
            ("", "'' has no unit"),
            ("50ms", "'50ms' has no rate"),
            ("20", "'20' has no unit"),
            ("20MB/s", "'20MB/s' has no unit"),
            ("20mbit", "'20mbit' has no unit"),
            ("Mbit/s", "no number before its unit"),
            ("1.2.3Mbit/s", "no number before its unit"),
            ("-20Mbit/s", "has no unit"),
            ("1e3Mbit/s", "has no unit"),
            ("infMbit/s", "has no unit"),
            ("999bit/s", "a rate is 1kbit/s"),
            ("101Gbit/s", "a rate is 1kbit/s"),
            ("20Mbit/s,3s", "a time is 0 to 2s"),
            ("20Mbit/s,51%", "a loss is 0 to 50%"),
            ("20Mbit/s,10Mbit/s", "'10Mbit/s' is one too many"),
            ("20Mbit/s,1ms,2ms,3ms", "'3ms' is one too many"),
            ("20Mbit/s,1%,2%", "'2%' is one too many"),
            ("20Mbit/s,,1%", "'' has no unit"),
        ] {
            let refused = text.parse::<LinkSpec>().unwrap_err();
            assert!(refused.contains(reason) && refused.contains("20Mbit/s,50ms,5ms,0.1%"), "{text}: {refused}");
        }
    }

    proptest! {
        #[test]
        fn every_link_is_read_as_it_is_written(
            bits_per_second in BITS_PER_SECOND,
            round_trip in 0..=ROUND_TRIP_MICROSECONDS_MAX,
            jitter in 0..=ROUND_TRIP_MICROSECONDS_MAX,
            loss in 0..=LOSS_PARTS_PER_MILLION_MAX as u32,
        ) {
            let (round_trip, jitter) = (Duration::from_micros(round_trip), Duration::from_micros(jitter));
            let spec = LinkSpec { bits_per_second, round_trip, jitter, loss_parts_per_million: loss };
            prop_assert_eq!(spec.to_string().parse::<LinkSpec>(), Ok(spec));
        }

        #[test]
        fn no_text_is_a_panic(text in "[0-9.,%a-zMGä/ ]{0,24}") {
            if let Ok(spec) = text.parse::<LinkSpec>() {
                prop_assert!(BITS_PER_SECOND.contains(&spec.bits_per_second) && spec.loss() <= 0.5);
            }
        }
    }
}
