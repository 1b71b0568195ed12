//! Questions about a connection and the machine at its other end, asked before any compute is spent.
//!
//! A probe greets like everybody else and then asks: pings (round trip, clock), reference results (numbers that the other
//! side's engine computed, to be compared with one's own) and, on streams of their own, transfers each way. It is no member of
//! anything, and both sides hold it to [`crate::limits`]: its connections, bytes and seconds are few, and no length that
//! the other side names is believed before it is compared.
//!
//! The bandwidth of a transfer is what its receiver saw in the sockets, TLS records included, after TCP's window had
//! time to grow. It is a floor: the link may carry more than a few streams can take in two seconds.

mod answer;
mod ask;
mod transfer;

pub use answer::{AnswerError, serve_probe, welcome_probe};
pub use ask::{Asked, Bandwidth, Direction, Ping, ProbeError, Prober};
#[cfg(test)]
pub(crate) use transfer::{ChunkHeader, drain};
pub use transfer::{Transfer, TransferError};

use crate::invite::Secret;
use crate::limits::{PROBE_VECTOR_VALUES_MAX, PROBE_VECTORS_MAX, RUN_NAME_BYTES_MAX};
use crate::message::TEXT_BYTES_MAX;
use serde::{Deserialize, Serialize};

/// First message of a probe's connection.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ProbeGreeting {
    /// Name of the run, from the invite.
    pub run: String,
    /// The invite's secret; a machine that has been admitted before needs none.
    pub secret: Option<Secret>,
    /// What the connection is for.
    pub kind: ProbeKind,
    /// Version of the program that asks.
    pub version: String,
}

/// What one connection of a probe is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ProbeKind {
    /// Pings and reference results.
    Questions,
    /// One transfer.
    Stream,
}

/// The answer to a greeting that is accepted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProbeWelcome {
    /// Version of the program that answers.
    pub version: String,
    /// `host:port` from which it sees the connection come.
    pub seen_as: String,
}

/// Numbers to compare one's own with.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Reference {
    /// Engine that computed them.
    pub engine: String,
    /// Its device, as the maker calls it.
    pub device: String,
    /// What it multiplied matrices in.
    pub precision: String,
    /// The results.
    pub vectors: Vec<ReferenceVector>,
}

/// One result.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ReferenceVector {
    /// What was computed.
    pub name: String,
    /// The result, flat.
    pub values: Vec<f32>,
}

impl Reference {
    /// Whether it is within the bounds of what travels.
    pub fn is_acceptable(&self) -> bool {
        let fits = |vector: &ReferenceVector| {
            vector.name.len() <= TEXT_BYTES_MAX && vector.values.len() <= PROBE_VECTOR_VALUES_MAX
        };
        let texts = [&self.engine, &self.device, &self.precision];
        texts.into_iter().all(|text| text.len() <= TEXT_BYTES_MAX)
            && self.vectors.len() <= PROBE_VECTORS_MAX
            && self.vectors.iter().all(fits)
    }
}

/// From the side that asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum ProbeRequest {
    Ping,
    Reference,
    /// Chunks from the side that answers.
    Download,
    /// Chunks to it.
    Upload,
}

/// From the side that answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) enum ProbeReply {
    /// Not accepted, or not possible.
    Refused {
        reason: String,
        hint: String,
    },
    Welcome(ProbeWelcome),
    /// Its clock.
    Pong {
        unix_ns: u64,
    },
    /// That many vectors follow, each a message.
    Reference {
        engine: String,
        device: String,
        precision: String,
        vectors: u32,
    },
    Vector(ReferenceVector),
    /// What it received of an upload.
    Received(Transfer),
}

impl ProbeGreeting {
    /// Whether every text is within its bound.
    pub fn is_acceptable(&self) -> bool {
        self.run.len() <= RUN_NAME_BYTES_MAX && self.version.len() <= TEXT_BYTES_MAX
    }
}
