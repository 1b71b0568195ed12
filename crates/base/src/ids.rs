//! Names of things that are counted: sites, rounds, terms.

use serde::{Deserialize, Serialize};
use std::fmt;

macro_rules! counted_id {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(formatter, "{}", self.0)
            }
        }
    };
}

counted_id!(
    /// A site of a run, given by the coordinator at its first admission. Merges go in this order.
    SiteId(u32)
);
counted_id!(
    /// A round of outer synchronisation. Round 0 is the initial state; round 1 is the first to commit.
    Round(u64)
);
counted_id!(
    /// The coordinator's fencing number: a message of an older term is refused.
    Term(u64)
);

impl Round {
    /// The round after this one.
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}
