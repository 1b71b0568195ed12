//! The side that answers probes. Whom it answers, and with which numbers, its caller decides.

use super::transfer::{self, TransferError};
use super::{ProbeGreeting, ProbeKind, ProbeReply, ProbeRequest, ProbeWelcome, Reference};
use crate::connection::{Connection, RecvError, SendError};
use crate::limits::{PROBE_ANSWER_SECONDS_MAX, PROBE_REQUESTS_MAX, PROBE_SECONDS_MAX, PROBE_STREAM_BYTES_MAX};
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::time::timeout;

/// Why a probe was not answered to its end.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AnswerError {
    /// What came is no question.
    #[error(transparent)]
    Recv(#[from] RecvError),
    /// The peer is gone, or takes nothing.
    #[error(transparent)]
    Send(#[from] SendError),
    /// A transfer was out of bounds.
    #[error(transparent)]
    Transfer(#[from] TransferError),
    /// It stayed too long.
    #[error("the probe was not done after {PROBE_SECONDS_MAX} s")]
    Timeout,
    /// It asked too much.
    #[error("the probe asked more than {PROBE_REQUESTS_MAX} questions")]
    Questions,
}

/// Answers a greeting: with a welcome, or with why there is none and what mends it.
///
/// # Errors
/// The peer is gone.
pub async fn welcome_probe(
    connection: &mut Connection,
    version: &str,
    refusal: Option<(&str, &str)>,
) -> Result<(), AnswerError> {
    let answer = match refusal {
        Some((reason, hint)) => ProbeReply::Refused { reason: reason.to_owned(), hint: hint.to_owned() },
        None => {
            let seen_as = connection.address().to_string();
            ProbeReply::Welcome(ProbeWelcome { version: version.to_owned(), seen_as })
        }
    };
    connection.send_timeout(&answer, Duration::from_secs(PROBE_ANSWER_SECONDS_MAX)).await?;
    if refusal.is_some() {
        connection.close().await?;
    }
    Ok(())
}

/// Answers the questions of a probe that was welcomed, until it leaves. `reference` gives the numbers, or why there are
/// none.
///
/// # Errors
/// The peer broke the protocol, vanished, or took too long.
pub async fn serve_probe<F>(
    connection: &mut Connection,
    greeting: &ProbeGreeting,
    reference: impl Fn() -> F,
) -> Result<(), AnswerError>
where
    F: Future<Output = Result<Arc<Reference>, String>>,
{
    let answering = async {
        match greeting.kind {
            ProbeKind::Questions => answer_questions(connection, reference).await,
            ProbeKind::Stream => answer_stream(connection).await,
        }
    };
    timeout(Duration::from_secs(PROBE_SECONDS_MAX), answering).await.map_err(|_| AnswerError::Timeout)?
}

async fn answer_questions<F>(connection: &mut Connection, reference: impl Fn() -> F) -> Result<(), AnswerError>
where
    F: Future<Output = Result<Arc<Reference>, String>>,
{
    for _ in 0..PROBE_REQUESTS_MAX {
        match connection.recv().await {
            Ok(ProbeRequest::Ping) => connection.send(&ProbeReply::Pong { unix_ns: unix_ns() }).await?,
            Ok(ProbeRequest::Reference) => send_reference(connection, reference().await).await?,
            Ok(ProbeRequest::Download | ProbeRequest::Upload) => {
                let reason = "a transfer needs a stream of its own".to_owned();
                let hint = "install the same build of beringia on both sides".to_owned();
                connection.send(&ProbeReply::Refused { reason, hint }).await?;
            }
            Err(RecvError::Closed | RecvError::Lost(_)) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
    Err(AnswerError::Questions)
}

async fn send_reference(
    connection: &mut Connection,
    reference: Result<Arc<Reference>, String>,
) -> Result<(), AnswerError> {
    let reference = match reference {
        Ok(reference) => reference,
        Err(reason) => {
            let hint = "look into the log of the coordinator".to_owned();
            return Ok(connection.send(&ProbeReply::Refused { reason, hint }).await?);
        }
    };
    assert!(reference.is_acceptable(), "our own reference results are within the bounds");
    let announced = ProbeReply::Reference {
        engine: reference.engine.clone(),
        device: reference.device.clone(),
        precision: reference.precision.clone(),
        vectors: reference.vectors.len() as u32,
    };
    connection.send(&announced).await?;
    for vector in &reference.vectors {
        connection.send(&ProbeReply::Vector(vector.clone())).await?;
    }
    Ok(())
}

/// One transfer: its bytes and time are bounded, whatever the peer does.
async fn answer_stream(connection: &mut Connection) -> Result<(), AnswerError> {
    match connection.recv().await? {
        ProbeRequest::Download => {
            transfer::pour(connection.halves().0).await?;
            // The peer leaves when it has seen enough.
            let _left = connection.recv::<ProbeRequest>().await;
            Ok(())
        }
        ProbeRequest::Upload => {
            let received = transfer::drain(connection.halves().1, PROBE_STREAM_BYTES_MAX).await?;
            connection.send(&ProbeReply::Received(received)).await?;
            transfer::discard(connection.halves().1).await;
            Ok(())
        }
        ProbeRequest::Ping | ProbeRequest::Reference => Err(AnswerError::Questions),
    }
}

/// The system clock; 0 where it stands before 1970.
pub(super) fn unix_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64)
}
