//! What reads bytes from a peer or a file and is private otherwise, for `crates/fuzz-bodies` and for nobody else.
//!
//! Each function is the shipped parser without its socket. Those of messages give the message written again, as a frame: what is read
//! is then compared with what is written without the type being known outside.

use crate::blob::file::PartialFile;
use crate::blob::protocol::{ChunkReply, ChunkRequest};
use crate::blob::transfer::Transfer;
use crate::blob::{Blob, protocol, stream};
use crate::frame::{self, FrameError};
use crate::identity::Identity;
use crate::limits::SOCKET_WRITE_BYTES;
use crate::preamble::{self, PREAMBLE_BYTES, PreambleError, Purpose};
use crate::probe::{ProbeReply, ProbeRequest};
use base::ContentHash;
use rustls::pki_types::ServerName;
use rustls::{ClientConnection, ServerConnection};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io;
use std::path::Path;

/// Reads a message of type `T` and writes it again, as a frame.
///
/// # Errors
/// The body is no such message.
pub fn reread<T: Serialize + DeserializeOwned>(body: &[u8]) -> Result<Vec<u8>, FrameError> {
    frame::encode(&frame::decode::<T>(body)?)
}

/// A request for a chunk.
///
/// # Errors
/// The body is none.
pub fn chunk_request(body: &[u8]) -> Result<Vec<u8>, FrameError> {
    reread::<ChunkRequest>(body)
}

/// The answer to one.
///
/// # Errors
/// The body is none.
pub fn chunk_reply(body: &[u8]) -> Result<Vec<u8>, FrameError> {
    reread::<ChunkReply>(body)
}

/// A question of a probe.
///
/// # Errors
/// The body is none.
pub fn probe_request(body: &[u8]) -> Result<Vec<u8>, FrameError> {
    reread::<ProbeRequest>(body)
}

/// The answer to one.
///
/// # Errors
/// The body is none.
pub fn probe_reply(body: &[u8]) -> Result<Vec<u8>, FrameError> {
    reread::<ProbeReply>(body)
}

/// The first bytes inside TLS.
///
/// # Errors
/// Another program, version or purpose.
pub fn preamble(bytes: &[u8; PREAMBLE_BYTES]) -> Result<Purpose, PreambleError> {
    preamble::decode(bytes)
}

/// The preamble of a peer that connects for `purpose`.
pub fn preamble_bytes(purpose: Purpose) -> [u8; PREAMBLE_BYTES] {
    preamble::encode(crate::limits::PROTOCOL_VERSION, purpose as u8)
}

/// Whether that is an identity file.
pub fn is_identity(pem: &[u8]) -> bool {
    Identity::from_pem(pem).is_ok()
}

/// A new identity file.
///
/// # Errors
/// No random numbers.
pub fn identity_file() -> Result<Vec<u8>, crate::IdentityError> {
    crate::identity::generate_pem()
}

/// What a listener's TLS makes of bytes from a stranger: whether it would still listen.
pub fn server_hears(identity: &Identity, bytes: &[u8]) -> bool {
    let session = ServerConnection::new(identity.server_config());
    session.is_ok_and(|session| hears(session.into(), bytes))
}

/// What TLS makes of bytes that answer a connection of ours.
pub fn client_hears(identity: &Identity, bytes: &[u8]) -> bool {
    client(identity).is_some_and(|session| hears(session.into(), bytes))
}

/// The first bytes that a site sends.
pub fn client_hello(identity: &Identity) -> Vec<u8> {
    let mut hello = Vec::new();
    if let Some(mut session) = client(identity) {
        // Writing to memory does not fail.
        let _ = session.write_tls(&mut hello);
    }
    hello
}

fn client(identity: &Identity) -> Option<ClientConnection> {
    let name = ServerName::try_from(crate::tls::SERVER_NAME).ok()?;
    ClientConnection::new(identity.client_config(identity.fingerprint()), name).ok()
}

fn hears(mut session: rustls::Connection, mut bytes: &[u8]) -> bool {
    session.set_buffer_limit(Some(SOCKET_WRITE_BYTES));
    while !bytes.is_empty() {
        let taken = session.read_tls(&mut bytes);
        if !taken.is_ok_and(|taken| taken > 0) || session.process_new_packets().is_err() {
            return false;
        }
    }
    true
}

/// Opens the unfinished file at `path`; which of its chunks are really there.
///
/// # Errors
/// The file system refused.
pub fn partial_file(path: &Path, expected: ContentHash, blob_bytes: u64) -> io::Result<Vec<bool>> {
    let (_partial, here) = PartialFile::open(path, expected, blob_bytes)?;
    Ok(here.iter().map(Option::is_some).collect())
}

/// A chunk as a holder answers it: the body of the reply's frame, and the bytes that follow it.
///
/// # Errors
/// The blob cannot be read.
pub async fn answered_chunk(blob: &Blob, index: u64) -> io::Result<(Vec<u8>, Vec<u8>)> {
    let (content, hash) = blob.chunk(index).await?;
    let reply = ChunkReply::Chunk { blob_bytes: blob.bytes(), chunk_bytes: content.len() as u32, hash, sent: None };
    let frame = frame::encode(&reply).map_err(io::Error::other)?;
    Ok((frame[size_of::<u32>()..].to_vec(), content.to_vec()))
}

/// What a fetch of a blob of `blob_bytes` bytes with that hash makes of the answers for its chunks, in order: each the body of a
/// reply's frame and the bytes that follow it. The steps are those of a stream and its fetch, without the connection.
///
/// # Errors
/// Why it is refused.
pub fn fetched(blob_bytes: u64, hash: ContentHash, answers: &[(&[u8], &[u8])]) -> Result<Vec<u8>, String> {
    if answers.len() as u64 != protocol::chunks(blob_bytes) {
        return Err("an answer is missing, or one too many".to_owned());
    }
    let mut transfer = Transfer::new(blob_bytes, vec![None; protocol::chunks(blob_bytes) as usize], 1);
    let mut content = Vec::new();
    for ((body, chunk), index) in answers.iter().zip(0..) {
        let reply: ChunkReply = frame::decode(body).map_err(|error| error.to_string())?;
        let (announced_bytes, announced, _) = stream::accept(reply, blob_bytes).map_err(|error| error.to_string())?;
        if [announced_bytes, protocol::chunk_bytes(blob_bytes, index)] != [chunk.len(); 2] {
            return Err("its reply does not fit the request".to_owned());
        }
        let verified = stream::verified(index, chunk, blob_bytes, announced).map_err(|error| error.to_string())?;
        transfer.arrived(None, index, verified);
        content.extend_from_slice(chunk);
    }
    match transfer.root() {
        Some(found) if found == hash => Ok(content),
        _ => Err("it has another hash".to_owned()),
    }
}
