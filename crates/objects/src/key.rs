//! Names of objects. All objects of a run lie side by side, without folders for rounds: a folder could be removed by one
//! site, as empty, while another is writing its first object into it.

use base::{ContentHash, Round, SiteId};
use std::fmt;

/// What an object holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum ObjectKey {
    /// What a site adds to a round.
    Delta {
        /// The round.
        round: Round,
        /// Index of the fragment.
        fragment: u32,
        /// Whose delta.
        site: SiteId,
    },
    /// Global parameters and outer momentum after a round's commit.
    State {
        /// The round.
        round: Round,
    },
}

impl ObjectKey {
    /// The object's name inside the run's folder: `round-00000012-fragment-1-site-3-HASH`, `round-00000012-state-HASH`,
    /// with the first 12 digits of the content's BLAKE3.
    pub fn name(&self, hash: ContentHash) -> String {
        let hash = hash.short();
        match self {
            Self::Delta { round: Round(round), fragment, site } => {
                format!("round-{round:08}-fragment-{fragment}-site-{site}-{hash}")
            }
            Self::State { round: Round(round) } => format!("round-{round:08}-state-{hash}"),
        }
    }

    /// The key in a name that [`Self::name`] made; `None` for whatever else lies there.
    pub fn of_name(name: &str) -> Option<Self> {
        let parts: Vec<&str> = name.split('-').collect();
        match parts[..] {
            ["round", round, "fragment", fragment, "site", site, _hash] => Some(Self::Delta {
                round: Round(round.parse().ok()?),
                fragment: fragment.parse().ok()?,
                site: SiteId(site.parse().ok()?),
            }),
            ["round", round, "state", _hash] => Some(Self::State { round: Round(round.parse().ok()?) }),
            _ => None,
        }
    }

    /// Whether `own` may remove the object once rounds before `round` are not needed: its own deltas, and states, which
    /// belong to nobody.
    pub(crate) fn is_forgotten_before(&self, round: Round, own: SiteId) -> bool {
        match self {
            Self::Delta { round: of, site, .. } => *of < round && *site == own,
            Self::State { round: of } => *of < round,
        }
    }
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Delta { round, fragment, site } => {
                write!(formatter, "delta of site {site}, round {round}, fragment {fragment}")
            }
            Self::State { round } => write!(formatter, "state of round {round}"),
        }
    }
}
