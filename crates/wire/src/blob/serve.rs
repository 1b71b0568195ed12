//! The holder's side: answers requests for chunks until the peer leaves.
//!
//! One request is handled at a time, so that a connection holds at most one chunk in memory however many it asks for.

use super::protocol::{self, ChunkReply, ChunkRequest, Sent};
use super::{Blob, BlobSource};
use crate::connection::{Connection, RecvError, SendError};
use crate::limits::{BLOB_IDLE_SECONDS_MAX, FETCH_STALL_SECONDS_MAX, PACE_BYTES_PER_SECOND_MIN};
use bytes::Bytes;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::timeout;

/// Why serving a peer ended early.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// What the peer sent is no request.
    #[error(transparent)]
    Recv(#[from] RecvError),
    /// The peer is gone, or takes nothing.
    #[error(transparent)]
    Send(#[from] SendError),
}

/// Serves the blobs of `source` to one peer, until it leaves or is idle for [`BLOB_IDLE_SECONDS_MAX`].
///
/// # Errors
/// The peer broke the protocol, or vanished or stalled inside a reply.
pub async fn serve_blobs(mut connection: Connection, source: Arc<dyn BlobSource>) -> Result<(), ServeError> {
    let stall = Duration::from_secs(FETCH_STALL_SECONDS_MAX);
    let mut pace = None;
    loop {
        let request: ChunkRequest = match connection.recv_timeout(Duration::from_secs(BLOB_IDLE_SECONDS_MAX)).await {
            Ok(request) => request,
            Err(RecvError::Closed | RecvError::Lost(_) | RecvError::Timeout(_)) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let asked =
            (request.pace_bytes_per_second > 0).then(|| request.pace_bytes_per_second.max(PACE_BYTES_PER_SECOND_MIN));
        if pace != asked {
            // A system that cannot pace sends as fast as the connection goes.
            let _ = connection.set_pacing_rate(asked.unwrap_or(u64::MAX));
            pace = asked;
        }
        let (reply, content) = answer(&connection, &*source, &request).await;
        timeout(stall, send(&mut connection, &reply, content)).await.map_err(|_| SendError::Timeout(stall))??;
    }
}

async fn answer(connection: &Connection, source: &dyn BlobSource, request: &ChunkRequest) -> (ChunkReply, Bytes) {
    let known = request.key.is_valid().then(|| source.open(connection.peer(), &request.key)).flatten();
    match known {
        None => (ChunkReply::NotFound, Bytes::new()),
        Some(blob) => {
            let sent =
                connection.tcp_info().map(|info| Sent { bytes: info.bytes_sent, again: info.bytes_retransmitted });
            chunk_of(&blob, request, sent).await
        }
    }
}

async fn chunk_of(blob: &Blob, request: &ChunkRequest, sent: Option<Sent>) -> (ChunkReply, Bytes) {
    let (blob_bytes, offset) = (blob.bytes(), request.offset as usize);
    if request.index >= protocol::chunks(blob_bytes) || offset >= protocol::chunk_bytes(blob_bytes, request.index) {
        return (ChunkReply::OutOfRange { blob_bytes }, Bytes::new());
    }
    match blob.chunk(request.index).await {
        Ok((content, hash)) => {
            let rest = content.slice(offset..);
            (ChunkReply::Chunk { blob_bytes, chunk_bytes: rest.len() as u32, hash, sent }, rest)
        }
        Err(_) => (ChunkReply::Unreadable, Bytes::new()),
    }
}

async fn send(connection: &mut Connection, reply: &ChunkReply, content: Bytes) -> Result<(), SendError> {
    let (sender, _) = connection.halves();
    sender.queue(reply).await?;
    sender.send_raw(content).await
}
