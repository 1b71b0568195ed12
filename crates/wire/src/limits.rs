//! Every bound of the protocol, in one place, with its arithmetic.
//!
//! A peer decides nothing about our memory or time beyond these numbers: lengths are compared with them before
//! anything is allocated, and waits end with them. The worst that all strangers together can hold is
//! `HANDSHAKES_MAX` × `HANDSHAKE_BYTES_MAX` = 256 × 256 KiB = 64 MiB for `HANDSHAKE_SECONDS_MAX`. Who has proven a key, which anybody can
//! make, may say [`GREETING_BYTES_MAX`] before he is known; a member has the budgets of [`crate::peers`].

use std::time::Duration;

/// Version of the protocol this crate speaks. Both ends must speak the same one.
pub const PROTOCOL_VERSION: u16 = 9;

/// No peer makes a holder send more slowly than this: 120 KB are sent before [`FETCH_STALL_SECONDS_MAX`] ends, and who asks for
/// more at such a pace does not get it.
pub const PACE_BYTES_PER_SECOND_MIN: u64 = 4_096;

/// Body of one control frame. The largest message is a `run.toml` (256 KiB) with a few hundred hashes; 4 times that.
pub const FRAME_BYTES_MAX: usize = 1 << 20;

/// Body of the first frame of a connection that we accepted. A greeting has texts of 64, 249 and 1,024 bytes at most; twice that, and some.
pub const GREETING_BYTES_MAX: usize = 4 * 1024;

/// Body of a request for a chunk, or of a question: names have at most [`BLOB_NAME_BYTES_MAX`] bytes.
pub const REQUEST_BYTES_MAX: usize = 4 * 1024;

const _: () = assert!(2 * (RUN_NAME_BYTES_MAX + ADDRESS_BYTES_MAX + 1_024) <= GREETING_BYTES_MAX);
const _: () = assert!(2 * BLOB_NAME_BYTES_MAX <= REQUEST_BYTES_MAX);

/// Body of one frame from a site to its coordinator. The longest are 1,024 hashes of slices, 32 KiB, and what is known of 1,024 links,
/// 32 bytes each; four times that. A queue of 4,096 of them takes 512 MiB, and [`PEER_BYTES_PER_SECOND_MAX`] keeps one peer from filling it.
pub const SITE_MESSAGE_BYTES_MAX: usize = 128 * 1024;

const _: () = assert!(SITE_MESSAGE_BYTES_MAX <= FRAME_BYTES_MAX);

/// Connections of one peer to one listener. A fetch has at most [`STREAMS_MAX`] streams, and a site fetches the fragments of several rounds from
/// another at once: eight times that. Each holds a chunk, 1 MiB, while it is served from a file: 256 MiB.
pub const PEER_CONNECTIONS_MAX: usize = 8 * STREAMS_MAX;

/// Messages of one peer that are read at once. A site in a run of 500 says some 2,000 in a round: of each other site that it holds a
/// slice, a part or a delta, and how long that took.
pub const PEER_MESSAGES_BURST: f64 = 8_192.0;

/// Messages of one peer that are read each second after that. Requests for chunks among them: 4,096 of 1 MiB are 34 Gbit/s. At some 20 us
/// each they take a tenth of a core.
pub const PEER_MESSAGES_PER_SECOND_MAX: f64 = 4_096.0;

/// Bytes of messages of one peer that are read at once: a burst of 8,192 of them at 512 bytes, or 32 of the longest.
pub const PEER_BYTES_BURST: f64 = (4 << 20) as f64;

/// Bytes of messages of one peer that are read each second after that: a round of 2,000 messages of 60 bytes has 120 KB.
pub const PEER_BYTES_PER_SECOND_MAX: f64 = (1 << 20) as f64;

/// Bytes read at once into a frame buffer: one TLS record.
pub(crate) const READ_BYTES: usize = 16 * 1024;

/// Socket bytes buffered ahead of TLS, a connection: rustls by itself asks for 4 KiB, a system call each.
pub(crate) const SOCKET_READ_BYTES: usize = 64 * 1024;

/// Plaintext that TLS holds while the socket is full, a connection.
pub(crate) const SOCKET_WRITE_BYTES: usize = 128 * 1024;

/// Connections that are not yet authenticated. One more pushes out the oldest, so that silent strangers cannot keep
/// others out for longer than it takes them to be displaced.
pub const HANDSHAKES_MAX: usize = 256;

/// What one connection may hold before authentication: an incoming TLS handshake message (64 KiB, the bound of rustls),
/// our socket buffer (64 KiB), our own side of the handshake (under 2 KiB) and the task; twice that, rounded up.
pub const HANDSHAKE_BYTES_MAX: usize = 256 * 1024;

const _: () = assert!(64 * 1024 + SOCKET_READ_BYTES <= HANDSHAKE_BYTES_MAX / 2);

/// From an accepted socket to an authenticated peer. Three round trips of 0.5 s and a busy machine's seconds.
pub const HANDSHAKE_SECONDS_MAX: u64 = 10;

/// Name resolution and TCP connect. Linux retries a SYN after 1, 3 and 7 s: three losses are survived.
pub const CONNECT_SECONDS_MAX: u64 = 10;

/// Authenticated connections that wait for the application to take them.
pub(crate) const INCOMING_QUEUED_MAX: usize = 64;

/// Refusals that wait for the application; more are only counted.
pub(crate) const REFUSALS_QUEUED_MAX: usize = 32;

/// Refusals told to the application in each minute; more are only counted. One every two seconds fills a log with
/// 43,200 lines a day, some 5 MB.
pub const REFUSALS_REPORTED_PER_MINUTE_MAX: u32 = 30;

/// Pause after the system could not accept a connection (no file descriptors left).
pub(crate) const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// A certificate's DER. Ours have about 330 bytes; one with a 4,096-bit RSA key has 1,300.
pub(crate) const CERTIFICATE_BYTES_MAX: usize = 4 * 1024;

/// An identity file: key and certificate as PEM, about 700 bytes.
pub(crate) const IDENTITY_FILE_BYTES_MAX: u64 = 16 * 1024;

/// `host:port` in an invite: DNS allows 253, the port takes 6; a length of one byte leaves 255.
pub const ADDRESS_BYTES_MAX: usize = 255;

/// A run's name.
pub const RUN_NAME_BYTES_MAX: usize = 64;

/// A blob's name: what file systems allow.
pub const BLOB_NAME_BYTES_MAX: usize = 255;

/// One chunk of a blob: the unit of request, hash and retry. At 20 Mbit/s it takes 0.4 s, at 10 Gbit/s 0.8 ms. A power of
/// two times 1,024, so that its hash is a subtree of the whole's BLAKE3 tree.
pub const CHUNK_BYTES_MAX: usize = 1 << 20;

const _: () = assert!(CHUNK_BYTES_MAX.is_power_of_two() && CHUNK_BYTES_MAX >= 1024);

/// Chunks in a blob: 2^24 of 1 MiB are 16 TiB, f32 parameters and two moments of a model of 1.4 × 10^12.
pub const BLOB_CHUNKS_MAX: u64 = 1 << 24;

/// Chunks asked for ahead, a stream (at least 2, so that the link is not idle between two chunks). With 8
/// streams 32 MiB are asked for: 2.6 Gbit/s at 100 ms round trip, where the windows do not end first.
pub const CHUNKS_IN_FLIGHT_MAX: usize = 4;

/// Parallel streams of one fetch. With [`STREAM_WINDOW_BYTES`] each: 64 MiB on their way, 5 Gbit/s at 100 ms.
pub const STREAMS_MAX: usize = 32;

/// What one TCP stream is counted on to have on its way. Linux lets a sender's buffer grow to 4 MiB (`tcp_wmem`) and a
/// receiver's window to half of 6 MiB (`tcp_rmem`), both with the packets' own overhead: 2 MiB is what is left on any host.
pub const STREAM_WINDOW_BYTES: usize = 2 << 20;

/// Chunks that make another stream worth its handshake.
pub(crate) const CHUNKS_PER_STREAM_MIN: u64 = 2;

/// What is already here of chunks whose stream broke: one a stream. More are fetched anew.
pub(crate) const TORN_CHUNKS_MAX: usize = STREAMS_MAX;

/// A stream that broke after this much of a chunk has made progress, and its holder is not blamed.
pub(crate) const PROGRESS_BYTES_MIN: usize = 64 * 1024;

/// How often a holder's broken streams are forgiven for that, a chunk of the blob. A chunk that is torn as often as it can be
/// is complete after that; without a bound, a holder that tears what it then damages would be asked for ever.
pub(crate) const FORGIVEN_PER_CHUNK_MAX: u64 = (CHUNK_BYTES_MAX / PROGRESS_BYTES_MIN) as u64;

/// A chunk must be complete this long after the one before it: 1 MiB in 30 s is 0.28 Mbit/s, a stream. Slower is stalled.
pub const FETCH_STALL_SECONDS_MAX: u64 = 30;

/// Failures in a row, without a chunk between them, after which a holder is given up.
pub const HOLDER_FAILURES_MAX: u32 = 4;

/// Places that hold the same blob, in one fetch.
pub const HOLDERS_MAX: usize = 256;

/// First pause before a holder is tried again; it doubles with each failure in a row: 0.1, 0.2, 0.4 s.
pub(crate) const RETRY_PAUSE: Duration = Duration::from_millis(100);

/// A served blob connection without a request is closed. Longer than the longest usual round.
pub const BLOB_IDLE_SECONDS_MAX: u64 = 1_800;

/// An unused connection older than this is not used again by the client: well under what the server allows.
pub(crate) const POOL_IDLE_SECONDS_MAX: u64 = 1_200;

const _: () = assert!(POOL_IDLE_SECONDS_MAX < BLOB_IDLE_SECONDS_MAX);

/// How long a finished fetch waits for its streams to put their connections back: a few task switches.
pub(crate) const POOL_RETURN_WAIT: Duration = Duration::from_millis(10);

/// Unused connections kept open, over all holders: 64 sites with 4 streams each.
pub(crate) const POOL_CONNECTIONS_MAX: usize = 256;

/// Probes that one listener answers at the same time; a third is told to come again.
pub const PROBES_MAX: usize = 2;

/// Streams of a probe's transfers: as many as a site fetches a delta with.
pub const PROBE_STREAMS: usize = 4;

/// One transfer of a probe, each way. At 1 Gbit/s it is the time that ends it, at 10 Gbit/s these 256 MiB do, after 0.2 s.
pub const PROBE_TRANSFER_BYTES_MAX: u64 = 256 << 20;

/// The same, a stream.
pub const PROBE_STREAM_BYTES_MAX: u64 = PROBE_TRANSFER_BYTES_MAX / PROBE_STREAMS as u64;

/// One transfer of a probe, each way: 13 round trips of 150 ms, in which a TCP window has grown from 15 kB to 100 MB.
pub const PROBE_TRANSFER_SECONDS: f64 = 2.0;

/// A transfer that lasts longer than twice this is measured without this part of it, in which TCP's window grows.
pub(crate) const PROBE_SETTLE_SECONDS: f64 = 0.5;

const _: () = assert!(2.0 * PROBE_SETTLE_SECONDS < PROBE_TRANSFER_SECONDS);

/// One piece of a transfer. Small, so that a slow link (1 Mbit/s: 0.5 s) shows a rate all the same; large enough that its
/// header of some 6 bytes and the calls for it do not count.
pub(crate) const PROBE_CHUNK_BYTES: usize = 64 * 1024;

/// Pings of one probe.
pub const PROBE_PINGS_MAX: usize = 64;

/// Requests on one connection of a probe: its pings and room for every other question.
pub(crate) const PROBE_REQUESTS_MAX: usize = PROBE_PINGS_MAX + 8;

/// From the greeting to the end of one connection of a probe. The command that asks is done after 20 s.
pub const PROBE_SECONDS_MAX: u64 = 30;

/// TCP connect, and then the handshake, of a probe: it has to tell within seconds that nobody answers.
pub const PROBE_CONNECT_SECONDS_MAX: u64 = 4;

/// Any answer of a probe. Reference results may have to be computed first, on a machine that is training.
pub const PROBE_ANSWER_SECONDS_MAX: u64 = 8;

/// How long one connection of a probe waits for one of those before it to end.
pub const PROBE_SLOT_SECONDS_MAX: u64 = 2;

/// Vectors of reference results: 30 operations, loss, gradient and parameters, and as many again.
pub const PROBE_VECTORS_MAX: usize = 64;

/// Numbers in one of them: 8 times the largest operation's 64 x 256. As f32 they are 512 KiB, half a frame.
pub const PROBE_VECTOR_VALUES_MAX: usize = 1 << 17;

const _: () = assert!(PROBE_VECTOR_VALUES_MAX * size_of::<f32>() <= FRAME_BYTES_MAX / 2);
