//! BLAKE3 content hashes: how two places know that they hold the same bytes.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};
use std::fmt;
use std::str::FromStr;

/// The BLAKE3 hash (32 bytes) of some content. Printed, and in human-readable formats stored, as 64
/// hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct ContentHash(pub [u8; 32]);

/// The text was not 64 hexadecimal digits.
#[derive(Debug, Clone, thiserror::Error)]
#[error("'{0}' is not a hash: 64 hexadecimal digits are expected")]
pub struct HashTextError(String);

impl ContentHash {
    /// Hash of one slice.
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }

    /// A hasher for content that comes in parts; finish it with [`ContentHash::finish`].
    pub fn hasher() -> blake3::Hasher {
        blake3::Hasher::new()
    }

    /// The hash of everything that `hasher` was given.
    pub fn finish(hasher: &blake3::Hasher) -> Self {
        Self(*hasher.finalize().as_bytes())
    }

    /// The first 12 digits: enough for a person to compare.
    pub fn short(&self) -> String {
        self.to_string()[..12].to_owned()
    }
}

impl fmt::Display for ContentHash {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(formatter, "{byte:02x}"))
    }
}

impl fmt::Debug for ContentHash {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "ContentHash({self})")
    }
}

impl FromStr for ContentHash {
    type Err = HashTextError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let hash = blake3::Hash::from_hex(text).map_err(|_| HashTextError(text.chars().take(80).collect()))?;
        Ok(Self(*hash.as_bytes()))
    }
}

impl Serialize for ContentHash {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() { serializer.collect_str(self) } else { self.0.serialize(serializer) }
    }
}

impl<'de> Deserialize<'de> for ContentHash {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if deserializer.is_human_readable() {
            String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
        } else {
            <[u8; 32]>::deserialize(deserializer).map(Self)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_round_trip_and_refusals() {
        let hash = ContentHash::of(b"land bridge");
        assert_eq!(hash.to_string().parse::<ContentHash>().unwrap(), hash);
        for bad in ["", "00", &"g".repeat(64), &"0".repeat(65)] {
            assert!(bad.parse::<ContentHash>().is_err(), "{bad}");
        }
    }
}
