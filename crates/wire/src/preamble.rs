//! The first twelve bytes each way inside TLS: is this Beringia, in which version, and what for?
//!
//! ```text
//! "BERINGIA" | version u16 LE | purpose u8 | 0
//! ```
//! This layout is the one thing that no version may change, so that any two can tell each other apart. The client speaks
//! first; the server answers with its own version also when it refuses, so that both ends can name both versions.

use crate::limits::PROTOCOL_VERSION;
use base::Hint;

const MAGIC: [u8; 8] = *b"BERINGIA";

/// Length of a preamble.
pub(crate) const PREAMBLE_BYTES: usize = 12;

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Purpose {
    /// Messages between a site and the coordinator.
    Control = 1,
    /// Chunks of blobs, asked for by the side that connects.
    Blob = 2,
    /// Questions about the connection and the machines at its ends, see [`crate::probe`].
    Probe = 3,
}

/// Why a peer's preamble was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PreambleError {
    /// Some other program.
    #[error("the peer does not speak the protocol of beringia")]
    NotBeringia,
    /// The peer must be updated.
    #[error("the peer speaks protocol version {theirs}, older than version {ours} of this side")]
    PeerOlder {
        /// The peer's version.
        theirs: u16,
        /// Ours.
        ours: u16,
    },
    /// We must be updated.
    #[error("the peer speaks protocol version {theirs}, newer than version {ours} of this side")]
    PeerNewer {
        /// The peer's version.
        theirs: u16,
        /// Ours.
        ours: u16,
    },
    /// Same version, but a purpose it does not have.
    #[error("the peer named purpose {0}, which protocol version {PROTOCOL_VERSION} does not have")]
    Purpose(u8),
}

impl Hint for PreambleError {
    fn hint(&self) -> Option<String> {
        Some(match self {
            Self::NotBeringia => "check the host and port: another program answers or calls there".to_owned(),
            Self::PeerOlder { .. } => {
                "update beringia on the other side; `beringia --version` shows what each side runs".to_owned()
            }
            Self::PeerNewer { .. } => {
                "update beringia on this side; `beringia --version` shows what each side runs".to_owned()
            }
            Self::Purpose(_) => "install the same build of beringia on both sides".to_owned(),
        })
    }
}

pub(crate) fn encode(version: u16, purpose: u8) -> [u8; PREAMBLE_BYTES] {
    let mut bytes = [0; PREAMBLE_BYTES];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..10].copy_from_slice(&version.to_le_bytes());
    bytes[10] = purpose;
    bytes
}

/// Reads a peer's preamble; the last byte is reserved and not looked at.
pub(crate) fn decode(bytes: &[u8; PREAMBLE_BYTES]) -> Result<Purpose, PreambleError> {
    if bytes[..8] != MAGIC {
        return Err(PreambleError::NotBeringia);
    }
    let (theirs, ours) = (u16::from_le_bytes([bytes[8], bytes[9]]), PROTOCOL_VERSION);
    match theirs.cmp(&ours) {
        std::cmp::Ordering::Less => Err(PreambleError::PeerOlder { theirs, ours }),
        std::cmp::Ordering::Greater => Err(PreambleError::PeerNewer { theirs, ours }),
        std::cmp::Ordering::Equal => match bytes[10] {
            1 => Ok(Purpose::Control),
            2 => Ok(Purpose::Blob),
            3 => Ok(Purpose::Probe),
            other => Err(PreambleError::Purpose(other)),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_refusal_has_its_name_and_side() {
        let ours = PROTOCOL_VERSION;
        assert_eq!(decode(&encode(ours, 1)), Ok(Purpose::Control));
        assert_eq!(decode(&encode(ours, 2)), Ok(Purpose::Blob));
        assert_eq!(decode(&encode(ours, 3)), Ok(Purpose::Probe));
        assert_eq!(decode(&encode(ours, 9)), Err(PreambleError::Purpose(9)));
        assert_eq!(decode(b"GET / HTTP/1"), Err(PreambleError::NotBeringia));
        let older = decode(&encode(ours - 1, 1)).unwrap_err();
        assert_eq!(older, PreambleError::PeerOlder { theirs: ours - 1, ours });
        assert!(older.hint().unwrap().contains("on the other side"));
        let newer = decode(&encode(ours + 1, 1)).unwrap_err();
        assert_eq!(newer, PreambleError::PeerNewer { theirs: ours + 1, ours });
        assert!(newer.hint().unwrap().contains("on this side"));
        for version in [ours - 1, ours] {
            assert!(older.to_string().contains(&version.to_string()));
        }
    }
}
