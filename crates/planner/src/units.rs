//! Quantities as types, so that a gigabit is never added to a gigabyte.
//!
//! Each wraps one `f64` in the base unit that its name gives. Conversions are named constructors; the only arithmetic between
//! different quantities is what makes sense: bytes / (bytes/s) = s, FLOP / (FLOP/s) = s, W × s = J.
//!
//! ```compile_fail
//! use planner::units::{BitsPerSecond, Bytes};
//! // Bits and bytes do not meet without `bytes_per_second()`.
//! let _ = Bytes::from_gib(1.0) / BitsPerSecond::from_gigabits(1.0);
//! ```

use core::iter::Sum;
use core::ops::{Add, AddAssign, Div, Mul, Sub};

macro_rules! quantity {
    ($(#[$documentation:meta])* $name:ident) => {
        $(#[$documentation])*
        #[derive(Debug, Clone, Copy, PartialEq, PartialOrd, Default)]
        pub struct $name(pub f64);

        impl $name {
            /// Nothing of it.
            pub const ZERO: Self = Self(0.0);

            /// The larger of two.
            pub fn max(self, other: Self) -> Self {
                Self(self.0.max(other.0))
            }

            /// The smaller of two.
            pub fn min(self, other: Self) -> Self {
                Self(self.0.min(other.0))
            }
        }

        impl Add for $name {
            type Output = Self;
            fn add(self, other: Self) -> Self {
                Self(self.0 + other.0)
            }
        }

        impl AddAssign for $name {
            fn add_assign(&mut self, other: Self) {
                self.0 += other.0;
            }
        }

        impl Sub for $name {
            type Output = Self;
            fn sub(self, other: Self) -> Self {
                Self(self.0 - other.0)
            }
        }

        impl Mul<f64> for $name {
            type Output = Self;
            fn mul(self, factor: f64) -> Self {
                Self(self.0 * factor)
            }
        }

        impl Div<f64> for $name {
            type Output = Self;
            fn div(self, divisor: f64) -> Self {
                Self(self.0 / divisor)
            }
        }

        /// How many times the other.
        impl Div for $name {
            type Output = f64;
            fn div(self, other: Self) -> f64 {
                self.0 / other.0
            }
        }

        impl Sum for $name {
            fn sum<I: Iterator<Item = Self>>(items: I) -> Self {
                Self(items.map(|item| item.0).sum())
            }
        }
    };
}

quantity!(
    /// Bytes, of memory or on a link.
    Bytes
);
quantity!(
    /// Bytes per second: memory bandwidth, scale-up links.
    BytesPerSecond
);
quantity!(
    /// Bits per second: links of a network, as they are sold.
    BitsPerSecond
);
quantity!(
    /// Seconds.
    Seconds
);
quantity!(
    /// Floating-point operations; a multiply-add is two.
    Flop
);
quantity!(
    /// Floating-point operations per second.
    FlopPerSecond
);

quantity!(
    /// Watts.
    Watts
);
quantity!(
    /// Joules.
    Joules
);
quantity!(
    /// Grams of carbon dioxide, or of what warms as much.
    Grams
);

/// Joules of a kWh.
const KILOWATT_HOUR: f64 = 3.6e6;

/// Seconds of an hour.
const HOUR: f64 = 3_600.0;

impl Seconds {
    /// In hours.
    pub fn hours(self) -> f64 {
        self.0 / HOUR
    }

    /// From milliseconds.
    pub fn from_milliseconds(milliseconds: f64) -> Self {
        Self(milliseconds / 1e3)
    }

    /// From hours.
    pub fn from_hours(hours: f64) -> Self {
        Self(hours * HOUR)
    }
}

impl Joules {
    /// In kWh.
    pub fn kilowatt_hours(self) -> f64 {
        self.0 / KILOWATT_HOUR
    }
}

impl Grams {
    /// In tonnes (10^6 g).
    pub fn tonnes(self) -> f64 {
        self.0 / 1e6
    }
}

impl Mul<Seconds> for Watts {
    type Output = Joules;
    fn mul(self, time: Seconds) -> Joules {
        Joules(self.0 * time.0)
    }
}

/// Bytes in a GiB.
const GIB: f64 = 1_073_741_824.0;

impl Bytes {
    /// From GiB (2^30 bytes).
    pub fn from_gib(gib: f64) -> Self {
        Self(gib * GIB)
    }

    /// In GiB (2^30 bytes).
    pub fn gib(self) -> f64 {
        self.0 / GIB
    }
}

impl BytesPerSecond {
    /// From GB/s (10^9 bytes a second).
    pub fn from_gigabytes(gigabytes: f64) -> Self {
        Self(gigabytes * 1e9)
    }
}

impl BitsPerSecond {
    /// From Gbit/s (10^9 bits a second).
    pub fn from_gigabits(gigabits: f64) -> Self {
        Self(gigabits * 1e9)
    }

    /// In Gbit/s.
    pub fn gigabits(self) -> f64 {
        self.0 / 1e9
    }

    /// From a rate in bytes: a byte is eight bits.
    pub fn from_bytes_per_second(rate: BytesPerSecond) -> Self {
        Self(rate.0 * 8.0)
    }

    /// The same rate in bytes: eight bits are one.
    pub fn bytes_per_second(self) -> BytesPerSecond {
        BytesPerSecond(self.0 / 8.0)
    }
}

impl FlopPerSecond {
    /// From TFLOP/s (10^12 a second).
    pub fn from_tera(tera: f64) -> Self {
        Self(tera * 1e12)
    }

    /// In TFLOP/s.
    pub fn tera(self) -> f64 {
        self.0 / 1e12
    }
}

impl Div<BytesPerSecond> for Bytes {
    type Output = Seconds;
    fn div(self, rate: BytesPerSecond) -> Seconds {
        Seconds(self.0 / rate.0)
    }
}

impl Div<FlopPerSecond> for Flop {
    type Output = Seconds;
    fn div(self, rate: FlopPerSecond) -> Seconds {
        Seconds(self.0 / rate.0)
    }
}

impl Div<Seconds> for Flop {
    type Output = FlopPerSecond;
    fn div(self, time: Seconds) -> FlopPerSecond {
        FlopPerSecond(self.0 / time.0)
    }
}

impl Div<Seconds> for Bytes {
    type Output = BytesPerSecond;
    fn div(self, time: Seconds) -> BytesPerSecond {
        BytesPerSecond(self.0 / time.0)
    }
}

/// A number in a message: as it is, or as a power of ten where that would be long.
pub fn plain(number: f64) -> String {
    let is_short = number == 0.0 || !number.is_finite() || (1e-6..1e15).contains(&number.abs());
    if is_short { number.to_string() } else { format!("{number:e}") }
}

/// A count as people write it: "70B", "1.4T", "512k", "2e12", "1,024"; none where it is no finite number, or where a comma stands elsewhere than
/// before three digits ("1,4T" is 1.4 to some and would be 14 here).
pub fn parse_count(text: &str) -> Option<f64> {
    let text = text.trim();
    let (digits, factor) = match text.chars().last()? {
        'k' | 'K' => (&text[..text.len() - 1], 1e3),
        'm' | 'M' => (&text[..text.len() - 1], 1e6),
        'b' | 'B' | 'g' | 'G' => (&text[..text.len() - 1], 1e9),
        't' | 'T' => (&text[..text.len() - 1], 1e12),
        _ => (text, 1.0),
    };
    let digits = digits.trim();
    let mut groups =
        digits.split([',', '_']).skip(1).map(|group| group.split(['.', 'e', 'E']).next().unwrap_or_default());
    if groups.any(|group| group.len() != 3) {
        return None;
    }
    let number: f64 = digits.replace([',', '_'], "").parse().ok()?;
    (number * factor).is_finite().then_some(number * factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eight_gigabits_carry_one_gigabyte() {
        assert_eq!(BitsPerSecond::from_gigabits(8.0).bytes_per_second(), BytesPerSecond::from_gigabytes(1.0));
        assert_eq!(Bytes(3e9) / BitsPerSecond::from_gigabits(8.0).bytes_per_second(), Seconds(3.0));
    }

    #[test]
    fn a_kilowatt_for_an_hour_is_a_kilowatt_hour() {
        assert_eq!((Watts(1_000.0) * Seconds::from_hours(1.0)).kilowatt_hours(), 1.0);
    }

    #[test]
    fn counts_are_read_as_people_write_them() {
        let counts = ["70B", "1.4T", "512k", "2e12", "1,024"].map(parse_count);
        assert_eq!(counts, [70e9, 1.4e12, 512e3, 2e12, 1024.0].map(Some));
        assert_eq!(["", "B", "seven", "1e400", "NaN", "1,4T", "1,0000", "1,"].map(parse_count), [None; 8]);
        assert_eq!(["1,400.5B", "1_000_000"].map(parse_count), [1.4005e12, 1e6].map(Some));
    }

    #[test]
    fn numbers_in_messages_are_short() {
        assert_eq!([-80.0, 0.5, 1e300, 1e-300, f64::NAN].map(plain), ["-80", "0.5", "1e300", "1e-300", "NaN"]);
    }

    #[test]
    fn a_gib_is_not_a_gigabyte() {
        assert_eq!(Bytes::from_gib(1.0).0, 1_073_741_824.0);
        assert_eq!(Bytes(1_073_741_824.0).gib(), 1.0);
    }
}
