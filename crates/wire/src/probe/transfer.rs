//! One stream of a transfer: chunks until time or bytes are used up, and the rate at which they arrived.
//!
//! A chunk is a message with its length and then as many bytes, which no frame holds; a length of 0 ends the transfer.

use crate::connection::{Receiver, RecvError, SendError, Sender};
use crate::limits::{
    PROBE_ANSWER_SECONDS_MAX, PROBE_CHUNK_BYTES, PROBE_SETTLE_SECONDS, PROBE_SLOT_SECONDS_MAX, PROBE_STREAM_BYTES_MAX,
    PROBE_TRANSFER_SECONDS,
};
use base::random::Random;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::time::Duration;
use tokio::time::{Instant, timeout, timeout_at};

/// What one end saw of a transfer.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Transfer {
    /// Bytes in the socket, within `seconds`.
    pub bytes: u64,
    /// The span that was measured.
    pub seconds: f64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ChunkHeader {
    pub(crate) bytes: u32,
}

/// Why a transfer was given up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TransferError {
    /// Nothing, or no chunk, came.
    #[error(transparent)]
    Recv(#[from] RecvError),
    /// A chunk over its bound was announced.
    #[error("a chunk of {bytes} bytes was announced; at most {PROBE_CHUNK_BYTES} are accepted")]
    Chunk {
        /// The announced length.
        bytes: u32,
    },
    /// More chunks than were agreed on.
    #[error("more than {bytes_max} bytes were sent")]
    Budget {
        /// What was agreed on.
        bytes_max: u64,
    },
}

/// Sends chunks until the budget or the time is used up, and then the end. On a timeout the last chunk may be torn: the
/// connection is of no more use.
pub(super) async fn pour(sender: &mut Sender) -> Result<(), SendError> {
    let content = noise();
    let header = ChunkHeader { bytes: PROBE_CHUNK_BYTES as u32 };
    // The receiver's time begins with the first chunk that reaches it: a long round trip is no reason to stop early.
    let until = Instant::now() + Duration::from_secs_f64(PROBE_TRANSFER_SECONDS) + Duration::from_secs(1);
    for _ in 0..PROBE_STREAM_BYTES_MAX / PROBE_CHUNK_BYTES as u64 {
        let sent = timeout_at(until, async {
            sender.queue(&header).await?;
            sender.send_raw(content.clone()).await
        });
        match sent.await {
            Ok(sent) => sent?,
            Err(_) => return Ok(()),
        }
    }
    timeout_at(until, sender.send(&ChunkHeader { bytes: 0 })).await.unwrap_or(Ok(()))
}

/// Bytes that no middlebox makes smaller.
fn noise() -> Bytes {
    let mut random = Random::new(1, 0);
    (0..PROBE_CHUNK_BYTES / size_of::<u64>()).flat_map(|_| random.next_u64().to_le_bytes()).collect()
}

/// Receives chunks until they end, or for [`PROBE_TRANSFER_SECONDS`] from the first one. On a timeout the last chunk may be
/// torn, as in [`pour`].
pub(crate) async fn drain(receiver: &mut Receiver, bytes_max: u64) -> Result<Transfer, TransferError> {
    let answer = Duration::from_secs(PROBE_ANSWER_SECONDS_MAX);
    let mut header: ChunkHeader = receiver.recv_timeout(answer).await?;
    let mut meter = Meter::start(receiver.traffic().bytes_received());
    let mut received = 0;
    let chunks = async {
        while header.bytes > 0 {
            if header.bytes as usize > PROBE_CHUNK_BYTES {
                return Err(TransferError::Chunk { bytes: header.bytes });
            }
            received += u64::from(header.bytes);
            if received > bytes_max {
                return Err(TransferError::Budget { bytes_max });
            }
            receiver.recv_raw(header.bytes as usize).await?;
            meter.look(receiver.traffic().bytes_received());
            header = receiver.recv().await?;
        }
        Ok(())
    };
    // Time that is over is not an error: what came until then was measured.
    timeout(Duration::from_secs_f64(PROBE_TRANSFER_SECONDS), chunks).await.unwrap_or(Ok(()))?;
    Ok(meter.read(receiver.traffic().bytes_received()))
}

/// Takes what is still on its way until the sender leaves: a socket that is closed with unread bytes in it resets the
/// connection, and the answer before that may be lost.
pub(super) async fn discard(receiver: &mut Receiver) {
    let rest = async { while receiver.recv_raw(PROBE_CHUNK_BYTES).await.is_ok() {} };
    let _late = timeout(Duration::from_secs(PROBE_SLOT_SECONDS_MAX), rest).await;
}

/// Bytes over time, from the start and from when TCP's window had time to grow.
struct Meter {
    started: (Instant, u64),
    settled: Option<(Instant, u64)>,
}

impl Meter {
    fn start(bytes: u64) -> Self {
        Self { started: (Instant::now(), bytes), settled: None }
    }

    fn look(&mut self, bytes: u64) {
        if self.settled.is_none() && self.started.0.elapsed().as_secs_f64() >= PROBE_SETTLE_SECONDS {
            self.settled = Some((Instant::now(), bytes));
        }
    }

    fn read(&self, bytes: u64) -> Transfer {
        let long_enough = |since: &(Instant, u64)| since.0.elapsed().as_secs_f64() >= PROBE_SETTLE_SECONDS;
        let (since, before) = self.settled.filter(long_enough).unwrap_or(self.started);
        Transfer { bytes: bytes.saturating_sub(before), seconds: since.elapsed().as_secs_f64() }
    }
}
