//! What comes over a socket: before TLS, inside it before anybody has said who he is, and from members; invites, addresses and files
//! that the network crate keeps.

use crate::memory::Bound;
use crate::place::Place;
use base::ContentHash;
use std::path::{Component, Path};
use std::sync::LazyLock;
use wire::frame::{self, FrameDecoder, FrameError};
use wire::limits::{CHUNK_BYTES_MAX, FRAME_BYTES_MAX, HANDSHAKE_BYTES_MAX};
use wire::message::{FromCoordinator, FromSite, Greeting};
use wire::probe::ProbeGreeting;
use wire::{Blob, BlobKey, Identity, Invite, Proxy, fuzzing};

/// Messages: sequences grow by doubling, and the smallest element of any takes an eighth of what it takes in memory.
const MESSAGE: Bound = Bound { base_bytes: 2 << 20, per_byte: 32 };

/// Texts and names.
const TEXT: Bound = Bound { base_bytes: 64 << 10, per_byte: 32 };

static IDENTITY: LazyLock<Identity> = LazyLock::new(|| Identity::generate().expect("a key can be made"));

/// A message that is read is the same when it is written and read again, and is not longer then.
fn is_the_same_again(body: &[u8], reread: impl Fn(&[u8]) -> Result<Vec<u8>, FrameError>) -> bool {
    let Ok(written) = MESSAGE.check(body.len(), || reread(body)) else { return false };
    let again = &written[size_of::<u32>()..];
    assert!(again.len() <= body.len(), "{} bytes became {}", body.len(), again.len());
    assert_eq!(reread(again).as_ref(), Ok(&written), "it is another message when it is written and read again");
    true
}

/// A stream cut into frames, in pieces of any length: the same frames as in one piece, and never more bytes than came.
pub fn frames(bytes: &[u8]) {
    let Some((step, stream)) = bytes.split_first() else { return };
    let cut = |step: usize| {
        let (mut decoder, mut bodies) = (FrameDecoder::new(), Vec::new());
        for piece in stream.chunks(step) {
            decoder.push(piece);
            loop {
                match decoder.next_body() {
                    Ok(Some(body)) => bodies.push(body),
                    Ok(None) => break,
                    Err(error) => return (bodies, Some(error)),
                }
            }
        }
        (bodies, None)
    };
    let bound = Bound { base_bytes: 64 << 10, per_byte: 64 };
    let whole = bound.check(stream.len(), || cut(stream.len().max(1)));
    assert!(whole.0.iter().all(|body| body.len() <= FRAME_BYTES_MAX));
    assert_eq!(whole, cut(usize::from(*step).max(1)), "the pieces in which bytes arrive change what they mean");
}

/// The first bytes inside TLS.
pub fn preamble(bytes: &[u8]) {
    let Some(first) = bytes.first_chunk() else { return };
    if let Ok(purpose) = fuzzing::preamble(first) {
        assert_eq!(fuzzing::preamble_bytes(purpose)[..11], first[..11]);
    }
}

/// Whatever a stranger sends in place of a TLS handshake takes no more memory than [`HANDSHAKE_BYTES_MAX`] allows for.
pub fn tls_of_a_stranger(bytes: &[u8]) {
    LazyLock::force(&IDENTITY);
    let bound = Bound { base_bytes: HANDSHAKE_BYTES_MAX, per_byte: 0 };
    bound.check(bytes.len(), || fuzzing::server_hears(&IDENTITY, bytes));
}

/// The same of who answers where we connect.
pub fn tls_of_a_server(bytes: &[u8]) {
    LazyLock::force(&IDENTITY);
    let bound = Bound { base_bytes: HANDSHAKE_BYTES_MAX, per_byte: 0 };
    bound.check(bytes.len(), || fuzzing::client_hears(&IDENTITY, bytes));
}

/// The first message of whoever has a key.
pub fn greeting(bytes: &[u8]) {
    if is_the_same_again(bytes, fuzzing::reread::<Greeting>) {
        let greeting: Greeting = frame::decode(bytes).expect("it was read before");
        let _ = greeting.is_acceptable();
    }
}

/// The coordinator's messages, as a site reads them.
pub fn from_coordinator(bytes: &[u8]) {
    if !is_the_same_again(bytes, fuzzing::reread::<FromCoordinator>) {
        return;
    }
    if let Ok(FromCoordinator::Welcome(welcome)) = frame::decode(bytes)
        && welcome.is_acceptable()
    {
        welcome.files.iter().for_each(|file| stays_inside(&file.name));
    }
}

/// A site's messages, as the coordinator reads them.
pub fn from_site(bytes: &[u8]) {
    is_the_same_again(bytes, fuzzing::reread::<FromSite>);
}

/// Requests for chunks, and what announces them.
pub fn chunk_messages(bytes: &[u8]) {
    is_the_same_again(bytes, fuzzing::chunk_request);
    is_the_same_again(bytes, fuzzing::chunk_reply);
}

/// A holder's answer, with the bytes that follow it: what is taken has the hash that was asked for.
pub fn chunk_answers(bytes: &[u8]) {
    let Some((cut, rest)) = bytes.split_first() else { return };
    let (body, content) = rest.split_at(usize::from(*cut).min(rest.len()));
    let hash = ContentHash::of(b"a delta");
    let accepted = MESSAGE.check(bytes.len(), || fuzzing::fetched(content.len() as u64, hash, &[(body, content)]));
    assert!(accepted.is_err() || content == b"a delta", "something else was taken for what was asked for");
}

/// A probe's messages.
pub fn probe_messages(bytes: &[u8]) {
    is_the_same_again(bytes, fuzzing::reread::<ProbeGreeting>);
    is_the_same_again(bytes, fuzzing::probe_request);
    is_the_same_again(bytes, fuzzing::probe_reply);
}

/// A name that is served stays inside the folder that it is looked up in.
pub fn blob_name(bytes: &[u8]) {
    let Ok(name) = str::from_utf8(bytes) else { return };
    if (BlobKey::File { name: name.to_owned() }).is_valid() {
        stays_inside(name);
    }
}

fn stays_inside(name: &str) {
    let is_plain = Path::new(name).components().all(|component| matches!(component, Component::Normal(_)));
    assert!(is_plain && !name.is_empty(), "{name:?} leaves its folder");
}

/// An invite is the same when it is written and read again.
pub fn invite(bytes: &[u8]) {
    let Ok(text) = str::from_utf8(bytes) else { return };
    if let Ok(invite) = TEXT.check(text.len(), || text.parse::<Invite>()) {
        let word = invite.to_string();
        assert!(word.len() <= wire::invite::INVITE_BYTES_MAX);
        assert_eq!(word.parse::<Invite>(), Ok(invite));
    }
}

/// A proxy's address is the same when it is written and read again.
pub fn proxy(bytes: &[u8]) {
    let Ok(text) = str::from_utf8(bytes) else { return };
    if let Ok(proxy) = TEXT.check(text.len(), || text.parse::<Proxy>()) {
        assert_eq!(proxy.to_string().parse::<Proxy>(), Ok(proxy));
    }
}

/// A key and its certificate, from a file.
pub fn identity(bytes: &[u8]) {
    let bound = Bound { base_bytes: 256 << 10, per_byte: 32 };
    bound.check(bytes.len(), || fuzzing::is_identity(bytes));
}

/// A packed file never unpacks to more than was announced.
pub fn unpacked(bytes: &[u8]) {
    let Some((length, packed)) = bytes.split_first_chunk::<3>() else { return };
    let expected = u64::from(u32::from_le_bytes([length[0], length[1], length[2], 0]));
    let mut content = Vec::new();
    // The window and tables of zstd are not counted: `wire::packed` bounds them.
    let bound = Bound { base_bytes: (256 << 10) + 3 * expected as usize, per_byte: 8 };
    let unpacked = bound.check(bytes.len(), || wire::packed::unpack(packed, &mut content, expected));
    assert!(content.len() as u64 <= expected);
    assert!(unpacked.is_err() || content.len() as u64 == expected);
}

/// A blob that was half fetched: of what its journal claims, only chunks that are really there count.
pub fn partial_file(bytes: &[u8]) {
    thread_local! {
        static PLACE: Place = Place::new();
    }
    let Some((damage, journal)) = bytes.split_first() else { return };
    let mut content = UNFINISHED.clone();
    if *damage < 0x80 {
        content[usize::from(*damage) << 10] ^= 1;
    }
    PLACE.with(|place| {
        place.write("blob.partial", &content);
        place.write("blob.chunks", journal);
        let bound = Bound { base_bytes: 2 * CHUNK_BYTES_MAX, per_byte: 8 };
        let here = bound.check(bytes.len(), || {
            fuzzing::partial_file(&place.path().join("blob"), ContentHash::of(&UNFINISHED), content.len() as u64)
        });
        let here = here.expect("the file system of temporary files works");
        assert!(here.len() == 2 && (*damage >= 0x80 || !here[0]), "a damaged chunk was kept");
    });
}

/// A blob of two chunks, the second short.
pub(crate) static UNFINISHED: LazyLock<Vec<u8>> =
    LazyLock::new(|| (0..CHUNK_BYTES_MAX + 100).map(|index| (index / 3) as u8).collect());

/// [`UNFINISHED`] to be served.
pub(crate) fn unfinished() -> Blob {
    Blob::memory(UNFINISHED.clone())
}

/// The name of an object in a store, which others can write to.
pub fn object_name(bytes: &[u8]) {
    let Ok(name) = str::from_utf8(bytes) else { return };
    if let Some(key) = TEXT.check(name.len(), || objects::ObjectKey::of_name(name)) {
        let hash = ContentHash::of(bytes);
        assert_eq!(objects::ObjectKey::of_name(&key.name(hash)), Some(key));
    }
}
