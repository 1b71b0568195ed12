//! What sites and the coordinator say to each other on a control connection. Sizes are bounded by the frame; counts
//! and texts are checked by `is_acceptable` right after decoding.

use crate::invite::Secret;
use crate::limits::{ADDRESS_BYTES_MAX, RUN_NAME_BYTES_MAX};
use base::config::RUN_TOML_BYTES_MAX;
use base::{ContentHash, Round, SiteId};
use rounds::{Directive, Report};
use serde::{Deserialize, Serialize};

/// Files of a run that a site fetches. A frame of 1 MiB holds 4,000 with names of 200 bytes.
pub const RUN_FILES_MAX: usize = 4_000;

/// Any other text in a message: names of engines, reasons, hints.
pub const TEXT_BYTES_MAX: usize = 1_024;

/// First message of whoever connects to a coordinator.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Greeting {
    /// Name of the run, from the invite.
    pub run: String,
    /// The invite's secret; a machine that has been admitted before needs none.
    pub secret: Option<Secret>,
    /// What it wants.
    pub role: Role,
}

/// What a peer of the coordinator wants.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Role {
    /// To train.
    Site(SiteHello),
    /// To see the status once.
    Observer,
}

/// How a site presents itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SiteHello {
    /// For people.
    pub name: String,
    /// Host under which other sites reach it; empty means where the coordinator sees it come from.
    pub advertised_host: String,
    /// Port on which it serves deltas and state; 0 where it cannot be dialled.
    pub port: u16,
    /// Engine and device.
    pub engine: String,
    /// Host threads of the engine.
    pub threads: u64,
    /// Artificial factor by which it is slowed down; 1 is none.
    pub slowdown: f64,
}

/// A file of the run, to be fetched from the coordinator.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunFile {
    /// Path relative to the run's folder, with `/`.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// Its hash.
    pub hash: ContentHash,
    /// Its packed form, where there is one: see [`crate::packed`].
    pub packed: Option<PackedFile>,
}

/// The packed form of a file, to be fetched in its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PackedFile {
    /// Its length.
    pub bytes: u64,
    /// Its hash.
    pub hash: ContentHash,
}

impl RunFile {
    /// What the packed form is asked for by.
    pub fn packed_name(&self) -> String {
        format!("{}.zst", self.name)
    }
}

/// The coordinator's answer to a site that is admitted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// The site's id, the same whenever it comes back.
    pub site: SiteId,
    /// Text of `run.toml`.
    pub run_toml: String,
    /// Hash of `[model]` and the seed.
    pub model_hash: ContentHash,
    /// Everything that a site needs to begin.
    pub files: Vec<RunFile>,
}

/// From the coordinator.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum FromCoordinator {
    /// Not admitted.
    Refused {
        /// Why.
        reason: String,
        /// What mends it.
        hint: String,
    },
    /// Admitted.
    Welcome(Welcome),
    /// What to do.
    Directive(Directive),
    /// The status view, as JSON.
    Status(String),
    /// Still there.
    Pulse,
}

/// From a site that is admitted.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum FromSite {
    /// Part of the protocol of rounds.
    Report(Report),
    /// It has measured the global model on the validation split.
    Evaluated {
        /// After this round.
        round: Round,
        /// Mean loss, nats a token.
        nats_per_token: f64,
        /// Bits a byte of text.
        bits_per_byte: f64,
        /// Of a bigram model, on the same text.
        bigram_bits_per_byte: f64,
        /// Tokens predicted.
        tokens: u64,
    },
    /// It has fetched another site's delta.
    Fetched {
        /// Round of the delta.
        round: Round,
        /// Whose.
        from: SiteId,
        /// Its size.
        bytes: u64,
        /// Time of the transfer.
        seconds: f64,
    },
    /// Still there.
    Pulse,
}

impl Greeting {
    /// Whether every text is within its bound.
    pub fn is_acceptable(&self) -> bool {
        let role_fits = match &self.role {
            Role::Observer => true,
            Role::Site(hello) => {
                let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
                !hello.name.is_empty()
                    && hello.name.len() <= RUN_NAME_BYTES_MAX
                    && hello.name.chars().all(plain)
                    && hello.advertised_host.len() <= ADDRESS_BYTES_MAX - ":65535".len()
                    && hello.engine.len() <= TEXT_BYTES_MAX
                    && hello.slowdown.is_finite()
            }
        };
        self.run.len() <= RUN_NAME_BYTES_MAX && role_fits
    }
}

impl Welcome {
    /// Whether counts and texts are within their bounds and every file stays inside the run's folder.
    pub fn is_acceptable(&self) -> bool {
        let is_valid = |name: String| crate::BlobKey::File { name }.is_valid();
        let inside = |file: &RunFile| is_valid(file.name.clone()) && is_valid(file.packed_name());
        self.run_toml.len() <= RUN_TOML_BYTES_MAX && self.files.len() <= RUN_FILES_MAX && self.files.iter().all(inside)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn welcome(name: &str) -> Welcome {
        let file = RunFile { name: name.to_owned(), bytes: 1, hash: ContentHash::default(), packed: None };
        Welcome { site: SiteId(0), run_toml: String::new(), model_hash: ContentHash::default(), files: vec![file] }
    }

    #[test]
    fn a_file_outside_the_folder_is_refused() {
        assert!(welcome("data/train-00000.tokens").is_acceptable());
        for name in ["../../.ssh/authorized_keys", "/etc/passwd", "data//x", "", "a\\..\\b"] {
            assert!(!welcome(name).is_acceptable(), "{name}");
        }
    }

    #[test]
    fn a_name_that_would_break_a_path_is_refused() {
        let greeting = |name: &str| Greeting {
            run: "run".to_owned(),
            secret: None,
            role: Role::Site(SiteHello {
                name: name.to_owned(),
                advertised_host: String::new(),
                port: 1,
                engine: "flex".to_owned(),
                threads: 1,
                slowdown: 1.0,
            }),
        };
        assert!(greeting("site-a").is_acceptable());
        for name in ["", "a/b", "a b", &"x".repeat(65)] {
            assert!(!greeting(name).is_acceptable(), "{name}");
        }
    }
}
