//! An invite: everything a newcomer must know, as one word that can be copied.
//!
//! ```text
//! beringia1-  base32( fingerprint 32 | secret 16 | length 1 | address | length 1 | run | checksum 4 )
//! ```
//! The alphabet is Crockford's base32 (no i, l, o, u; case does not matter; o reads as 0, i and l as 1), because
//! invites are also read out and typed. The checksum is the start of a BLAKE3: a slip of the hand goes unseen once in
//! 2^32. It protects against mistakes, not against forgers; the fingerprint and the secret do that.

use crate::limits::{ADDRESS_BYTES_MAX, RUN_NAME_BYTES_MAX};
use crate::tls;
use base::{ContentHash, Hint};
use data_encoding::{DecodeError, DecodeKind, Encoding, Specification};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de, ser};
use std::fmt;
use std::str::FromStr;
use std::sync::LazyLock;
use subtle::ConstantTimeEq;

const PREFIX: &str = "beringia1-";
const PREFIX_ANY_VERSION: &str = "beringia";
const SECRET_BYTES: usize = 16;
const CHECKSUM_BYTES: usize = 4;
const PAYLOAD_BYTES_MAX: usize = 32 + SECRET_BYTES + 1 + ADDRESS_BYTES_MAX + 1 + RUN_NAME_BYTES_MAX + CHECKSUM_BYTES;

/// Longest invite: 5 bits a character.
pub const INVITE_BYTES_MAX: usize = PREFIX.len() + (PAYLOAD_BYTES_MAX * 8).div_ceil(5);

static BASE32: LazyLock<Encoding> = LazyLock::new(|| {
    let mut specification = Specification::new();
    specification.symbols.push_str("0123456789abcdefghjkmnpqrstvwxyz");
    specification.translate.from.push_str("ABCDEFGHJKMNPQRSTVWXYZoOiIlL");
    specification.translate.to.push_str("abcdefghjkmnpqrstvwxyz001111");
    #[expect(clippy::expect_used, reason = "a constant specification; the tests use it")]
    specification.encoding().expect("32 distinct symbols")
});

/// A one-time secret of 128 random bits. It is compared in constant time, `Debug` hides it, and only binary formats
/// (the wire) serialise it: a log or a JSON report that meets one fails instead of showing it.
#[derive(Clone)]
pub struct Secret([u8; SECRET_BYTES]);

/// The system's random numbers are not available.
#[derive(Debug, Clone, Copy, thiserror::Error)]
#[error("the system's random number generator failed")]
pub struct RandomError;

impl Secret {
    /// A new secret from the system's generator.
    ///
    /// # Errors
    /// The generator failed.
    pub fn generate() -> Result<Self, RandomError> {
        tls::random_bytes().map(Self).map_err(|_| RandomError)
    }

    /// A hash under which a secret can be remembered without being kept.
    pub fn digest(&self) -> ContentHash {
        ContentHash::of(&[b"beringia invite secret ".as_slice(), &self.0].concat())
    }
}

impl PartialEq for Secret {
    fn eq(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl Eq for Secret {}

impl fmt::Debug for Secret {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Secret(..)")
    }
}

impl Serialize for Secret {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match serializer.is_human_readable() {
            true => Err(ser::Error::custom("a secret is not written as text")),
            false => self.0.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for Secret {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match deserializer.is_human_readable() {
            true => Err(de::Error::custom("a secret is not read from text")),
            false => Deserialize::deserialize(deserializer).map(Self),
        }
    }
}

/// Where a run is coordinated and how both ends prove who they are. `Display` writes the whole word, secret
/// included; `Debug` hides the secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Invite {
    address: String,
    run: String,
    fingerprint: ContentHash,
    secret: Secret,
}

/// Why an invite was not made or not understood. No variant repeats the text, which holds a secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InviteError {
    /// Some other word.
    #[error("this is not an invite: an invite starts with '{PREFIX}'")]
    NotAnInvite,
    /// Another version of the format.
    #[error("this invite has another format than '{PREFIX}…': it was made by another version of beringia")]
    OtherVersion,
    /// More than any invite has.
    #[error("the invite has {found} characters, at most {INVITE_BYTES_MAX} are possible")]
    TooLong {
        /// Characters found.
        found: usize,
    },
    /// A character that no invite has.
    #[error("character {position} of the invite is none that an invite can have")]
    Character {
        /// Counted from 1.
        position: usize,
    },
    /// A typo, or a part is missing.
    #[error("the invite's checksum does not fit: a character is wrong, missing or too many")]
    Checksum,
    /// The checksum fits, but the content does not.
    #[error("the invite is malformed: {0}")]
    Malformed(&'static str),
    /// No `host:port`.
    #[error("'{0}' is not an address: host:port is expected, with at most {ADDRESS_BYTES_MAX} characters")]
    Address(String),
    /// Not a run's name.
    #[error("'{0}' is not a run's name: 1 to {RUN_NAME_BYTES_MAX} letters, digits, '-' and '_' are expected")]
    RunName(String),
}

impl Hint for InviteError {
    fn hint(&self) -> Option<String> {
        Some(match self {
            Self::OtherVersion => "install the same version on all sites; `beringia --version` shows yours".to_owned(),
            Self::Address(_) => "give the host alone: `--advertise HOST`".to_owned(),
            Self::RunName(_) => "change [run] name in run.toml".to_owned(),
            _ => "copy the whole word that `beringia serve` printed, from 'beringia1-' to its end".to_owned(),
        })
    }
}

impl Invite {
    /// An invite to the coordinator at `address` (host:port).
    ///
    /// # Errors
    /// The address or the run's name is none.
    pub fn new(address: &str, run: &str, fingerprint: ContentHash, secret: Secret) -> Result<Self, InviteError> {
        if !is_address(address) {
            return Err(InviteError::Address(clip(address)));
        }
        if !is_run_name(run) {
            return Err(InviteError::RunName(clip(run)));
        }
        Ok(Self { address: address.to_owned(), run: run.to_owned(), fingerprint, secret })
    }

    /// `host:port` of the coordinator.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// The run's name.
    pub fn run(&self) -> &str {
        &self.run
    }

    /// The coordinator's fingerprint, to be pinned.
    pub fn fingerprint(&self) -> ContentHash {
        self.fingerprint
    }

    /// What proves the newcomer to the coordinator.
    pub fn secret(&self) -> &Secret {
        &self.secret
    }

    fn payload(&self) -> Vec<u8> {
        let mut payload = Vec::with_capacity(PAYLOAD_BYTES_MAX);
        payload.extend_from_slice(&self.fingerprint.0);
        payload.extend_from_slice(&self.secret.0);
        for text in [&self.address, &self.run] {
            payload.push(text.len() as u8);
            payload.extend_from_slice(text.as_bytes());
        }
        payload.extend_from_slice(&checksum(&payload));
        payload
    }

    fn from_payload(payload: &[u8]) -> Result<Self, InviteError> {
        let (content, check) = payload.split_last_chunk::<CHECKSUM_BYTES>().ok_or(InviteError::Checksum)?;
        if checksum(content) != *check {
            return Err(InviteError::Checksum);
        }
        let short = InviteError::Malformed("it is too short");
        let (fingerprint, rest) = content.split_first_chunk().ok_or(short.clone())?;
        let (secret, rest) = rest.split_first_chunk().ok_or(short)?;
        let (address, rest) = take_text(rest)?;
        let (run, rest) = take_text(rest)?;
        if !rest.is_empty() {
            return Err(InviteError::Malformed("something follows its last field"));
        }
        Self::new(address, run, ContentHash(*fingerprint), Secret(*secret))
    }
}

impl fmt::Display for Invite {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{PREFIX}{}", BASE32.encode(&self.payload()))
    }
}

impl FromStr for Invite {
    type Err = InviteError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let text = text.trim();
        if text.len() > INVITE_BYTES_MAX {
            return Err(InviteError::TooLong { found: text.chars().count() });
        }
        let starts_with = |prefix: &str| text.get(..prefix.len()).is_some_and(|s| s.eq_ignore_ascii_case(prefix));
        if !starts_with(PREFIX) {
            let other_version = starts_with(PREFIX_ANY_VERSION) && text.contains('-');
            return Err(if other_version { InviteError::OtherVersion } else { InviteError::NotAnInvite });
        }
        let payload = BASE32.decode(&text.as_bytes()[PREFIX.len()..]).map_err(describe)?;
        Self::from_payload(&payload)
    }
}

fn describe(error: DecodeError) -> InviteError {
    match error.kind {
        DecodeKind::Symbol => InviteError::Character { position: PREFIX.len() + error.position + 1 },
        // A length that no byte sequence has, or bits that must be zero: something is missing or wrong.
        _ => InviteError::Checksum,
    }
}

fn checksum(content: &[u8]) -> [u8; CHECKSUM_BYTES] {
    let [a, b, c, d, ..] = ContentHash::of(content).0;
    [a, b, c, d]
}

fn take_text(bytes: &[u8]) -> Result<(&str, &[u8]), InviteError> {
    let (length, rest) = bytes.split_first().ok_or(InviteError::Malformed("it is too short"))?;
    let (text, rest) = rest.split_at_checked(usize::from(*length)).ok_or(InviteError::Malformed("it is too short"))?;
    let text = std::str::from_utf8(text).map_err(|_| InviteError::Malformed("its text is not UTF-8"))?;
    Ok((text, rest))
}

/// Whether `text` is `host:port` (also `[v6]:port`) with a port other than 0.
pub(crate) fn is_address(text: &str) -> bool {
    let Some((host, port)) = text.rsplit_once(':') else { return false };
    let host_fits = !host.is_empty() && host.chars().all(|c| c.is_ascii_graphic());
    let port_fits = port.parse::<u16>().is_ok_and(|port| port != 0) && port.chars().all(|c| c.is_ascii_digit());
    text.len() <= ADDRESS_BYTES_MAX && host_fits && port_fits
}

fn is_run_name(text: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    (1..=RUN_NAME_BYTES_MAX).contains(&text.len()) && text.chars().all(allowed)
}

/// Enough of a bad text for a message.
fn clip(text: &str) -> String {
    text.chars().take(80).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> Invite {
        let fingerprint = ContentHash::of(b"coordinator");
        Invite::new("beringia.example:4520", "my-run_1", fingerprint, Secret([7; 16])).unwrap()
    }

    #[test]
    fn an_invite_is_one_word_and_comes_back() {
        let word = sample().to_string();
        assert!(word.starts_with("beringia1-") && word.chars().all(|c| c.is_ascii_alphanumeric() || c == '-'));
        assert_eq!(word.parse::<Invite>().unwrap(), sample());
        assert_eq!(format!(" {}\n", word.to_uppercase()).parse::<Invite>().unwrap(), sample());
        let misread = "beringia1-".to_owned() + &word[10..].replace('0', "O").replace('1', "l");
        assert_eq!(misread.parse::<Invite>().unwrap(), sample());
    }

    #[test]
    fn the_longest_invite_fits_its_bound() {
        let address = format!("{}:65535", "h".repeat(ADDRESS_BYTES_MAX - 6));
        let run = "r".repeat(RUN_NAME_BYTES_MAX);
        let invite = Invite::new(&address, &run, ContentHash::default(), Secret([0xff; 16])).unwrap();
        assert_eq!(invite.to_string().len(), INVITE_BYTES_MAX);
        assert_eq!(invite.to_string().parse::<Invite>().unwrap(), invite);
    }

    #[test]
    fn every_single_typo_is_named() {
        let word = sample().to_string();
        for position in 10..word.len() {
            let mut typo = word.clone().into_bytes();
            typo[position] = if typo[position] == b'7' { b'8' } else { b'7' };
            let error = String::from_utf8(typo).unwrap().parse::<Invite>().unwrap_err();
            assert_eq!(error, InviteError::Checksum, "at {position}");
        }
        let mut swapped = word.clone().into_bytes();
        let at = (10..swapped.len() - 1).find(|&i| swapped[i] != swapped[i + 1]).unwrap();
        swapped.swap(at, at + 1);
        assert_eq!(String::from_utf8(swapped).unwrap().parse::<Invite>().unwrap_err(), InviteError::Checksum);
        assert_eq!(word[..word.len() - 1].parse::<Invite>().unwrap_err(), InviteError::Checksum);
        let impossible = format!("{}u{}", &word[..20], &word[21..]);
        assert_eq!(impossible.parse::<Invite>().unwrap_err(), InviteError::Character { position: 21 });
    }

    #[test]
    fn other_words_are_refused_by_name() {
        assert_eq!("hello".parse::<Invite>().unwrap_err(), InviteError::NotAnInvite);
        assert_eq!("".parse::<Invite>().unwrap_err(), InviteError::NotAnInvite);
        assert_eq!("beringia1-".parse::<Invite>().unwrap_err(), InviteError::Checksum);
        assert_eq!("beringia2-00".parse::<Invite>().unwrap_err(), InviteError::OtherVersion);
        let long = "beringia1-".to_owned() + &"0".repeat(INVITE_BYTES_MAX);
        assert!(matches!(long.parse::<Invite>().unwrap_err(), InviteError::TooLong { .. }));
    }

    #[test]
    fn only_real_addresses_and_names_are_accepted() {
        let with = |address: &str, run: &str| Invite::new(address, run, ContentHash::default(), Secret([0; 16]));
        for address in ["", "host", "host:", ":1", "host:0", "host:65536", "host:+1", "a b:1", &"h".repeat(300)] {
            assert!(matches!(with(address, "r"), Err(InviteError::Address(_))), "{address}");
        }
        assert!(with("[::1]:4520", "r").is_ok());
        for run in ["", "a/b", "a b", &"r".repeat(65)] {
            assert!(matches!(with("h:1", run), Err(InviteError::RunName(_))), "{run}");
        }
    }

    #[test]
    fn the_secret_is_shown_by_nothing_but_the_word() {
        assert_eq!(format!("{:?}", Secret::generate().unwrap()), "Secret(..)");
        assert!(format!("{:?}", sample()).contains("Secret(..)"));
        assert_ne!(Secret::generate().unwrap(), Secret::generate().unwrap());
        let bytes = postcard::to_stdvec(&Secret([7; 16])).unwrap();
        assert_eq!(postcard::from_bytes::<Secret>(&bytes).unwrap(), Secret([7; 16]));
        let hint = "x".parse::<Invite>().unwrap_err().hint().unwrap();
        assert!(hint.contains("beringia serve"));
    }

    proptest! {
        #[test]
        fn any_text_is_refused_without_a_panic(text in "\\PC{0,700}") {
            let _ = text.parse::<Invite>();
            let prefixed = format!("beringia1-{text}").parse::<Invite>();
            prop_assert!(prefixed.is_err());
        }
    }
}
