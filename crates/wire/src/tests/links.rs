//! Streams that break in the middle of a chunk, and what is learnt of a link by using it.

use super::blobs::{client, delta, random_bytes, request, serve, serve_with, shelf};
use super::{bounded, connected, identity};
use crate::blob::fetch::FetchError;
use crate::blob::protocol::{ChunkReply, ChunkRequest};
use crate::limits::{CHUNK_BYTES_MAX, HOLDER_FAILURES_MAX, PROGRESS_BYTES_MIN};
use crate::{Blob, Connection, Holder, Purpose, Traffic, connect, serve_blobs};
use bytes::Bytes;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

/// Requests that a holder saw, and the content it sent.
#[derive(Default)]
struct Seen {
    /// Chunk and offset of each.
    requests: Vec<(u64, u32)>,
    content_bytes: usize,
}

/// How a holder treats the answer to a request: the rest of the chunk as it will be sent, and how much of it.
type Tear = Arc<dyn Fn(usize, Vec<u8>) -> (Vec<u8>, usize) + Send + Sync>;

/// A holder whose connections end after `tear` has cut an answer short. The requests are counted over all connections.
async fn serve_torn(content: &[u8], tear: Tear) -> (Holder, Arc<Mutex<Seen>>) {
    let (blob, seen) = (Blob::memory(content.to_vec()), Arc::new(Mutex::new(Seen::default())));
    let noted = seen.clone();
    let (holder, _) =
        serve_with(move |connection| answer_torn(connection, blob.clone(), noted.clone(), tear.clone())).await;
    (holder, seen)
}

async fn answer_torn(mut connection: Connection, blob: Blob, seen: Arc<Mutex<Seen>>, tear: Tear) {
    while let Ok(ChunkRequest { index, offset, .. }) = connection.recv().await {
        let (chunk, hash) = blob.chunk(index).await.unwrap();
        let rest = chunk.slice(offset as usize..);
        let reply = ChunkReply::Chunk { blob_bytes: blob.bytes(), chunk_bytes: rest.len() as u32, hash, sent: None };
        let request = {
            let mut seen = seen.lock().unwrap();
            seen.requests.push((index, offset));
            seen.requests.len() - 1
        };
        let announced = rest.len();
        let (mut rest, kept) = tear(request, rest.to_vec());
        rest.truncate(kept);
        seen.lock().unwrap().content_bytes += rest.len();
        let (sender, _) = connection.halves();
        if sender.queue(&reply).await.is_err() || sender.send_raw(Bytes::from(rest)).await.is_err() {
            return;
        }
        if kept < announced {
            let _ = connection.close().await;
            // A socket that is closed with unread requests in it would take back what was sent.
            while connection.recv::<ChunkRequest>().await.is_ok() {}
            return;
        }
    }
}

#[tokio::test]
async fn a_broken_stream_goes_on_at_the_byte_where_it_stopped() {
    bounded(async {
        let content = random_bytes(20, CHUNK_BYTES_MAX - 7);
        let stops = [300_000, 123_456, 1];
        let tear: Tear = Arc::new(move |request, rest: Vec<u8>| {
            let kept = stops.get(request).copied().unwrap_or(rest.len());
            (rest, kept)
        });
        let (holder, seen) = serve_torn(&content, tear).await;
        let client = client();
        assert!(client.fetch(&request(delta(1), &content, vec![holder.clone()], 1)).await.unwrap() == content);
        let seen = seen.lock().unwrap();
        assert_eq!(seen.requests, [(0, 0), (0, 300_000), (0, 423_456), (0, 423_457)]);
        assert_eq!(seen.content_bytes, content.len(), "no byte came twice");
        let link = client.link(&holder).unwrap();
        assert_eq!((link.connections, link.reconnects, link.bytes), (4, 3, content.len() as u64));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_link_that_breaks_all_the_time_still_brings_every_byte_once() {
    bounded(async {
        let content = random_bytes(21, 3 * CHUNK_BYTES_MAX + 99);
        let tear: Tear = Arc::new(|_, rest: Vec<u8>| {
            let kept = rest.len().min(2 * PROGRESS_BYTES_MIN + 5);
            (rest, kept)
        });
        let (holder, seen) = serve_torn(&content, tear).await;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("blob");
        client().fetch_to_file(&request(delta(1), &content, vec![holder], 1), &path).await.unwrap();
        assert!(std::fs::read(&path).unwrap() == content);
        let seen = seen.lock().unwrap();
        assert_eq!(seen.content_bytes, content.len(), "no byte came twice");
        assert!(seen.requests.len() > 20, "it did break: {}", seen.requests.len());
    })
    .await;
}

#[tokio::test]
async fn a_holder_that_breaks_off_at_once_is_given_up() {
    bounded(async {
        let content = random_bytes(22, CHUNK_BYTES_MAX);
        let (holder, seen) = serve_torn(&content, Arc::new(|_, rest| (rest, 10))).await;
        let error = client().fetch(&request(delta(1), &content, vec![holder], 1)).await.unwrap_err();
        assert!(matches!(error, FetchError::Holders { .. }), "{error}");
        assert_eq!(seen.lock().unwrap().requests.len(), HOLDER_FAILURES_MAX as usize);
    })
    .await;
}

#[tokio::test]
async fn a_torn_chunk_with_wrong_bytes_is_fetched_anew() {
    bounded(async {
        let content = random_bytes(23, CHUNK_BYTES_MAX);
        let tear: Tear = Arc::new(|request, mut rest: Vec<u8>| {
            let kept = if request == 0 { rest.len() / 2 } else { rest.len() };
            rest[77] ^= u8::from(request == 0);
            (rest, kept)
        });
        let (holder, seen) = serve_torn(&content, tear).await;
        assert!(client().fetch(&request(delta(1), &content, vec![holder], 1)).await.unwrap() == content);
        let half = CHUNK_BYTES_MAX as u32 / 2;
        assert_eq!(seen.lock().unwrap().requests, [(0, 0), (0, half), (0, 0)]);
    })
    .await;
}

#[tokio::test]
async fn another_holder_is_asked_for_the_whole_chunk() {
    bounded(async {
        let content = random_bytes(24, CHUNK_BYTES_MAX);
        // Too little to be forgiven, so that the other holder has its turn.
        let (torn, _) = serve_torn(&content, Arc::new(|_, rest| (rest, 1_000))).await;
        let (whole, seen) = serve_torn(&content, Arc::new(|_, rest: Vec<u8>| (rest.clone(), rest.len()))).await;
        assert!(client().fetch(&request(delta(1), &content, vec![torn, whole], 1)).await.unwrap() == content);
        assert_eq!(seen.lock().unwrap().requests, [(0, 0)]);
    })
    .await;
}

#[tokio::test]
async fn places_outside_the_blob_are_refused_without_harm() {
    bounded(async {
        let content = random_bytes(25, 2 * CHUNK_BYTES_MAX + 10);
        let (holder, _) = serve(shelf(delta(1), &content)).await;
        let (identity, traffic) = (identity(), Traffic::new());
        let mut connection =
            connect(&identity, &traffic, &holder.address, holder.fingerprint, Purpose::Blob).await.unwrap();
        let outside = ChunkReply::OutOfRange { blob_bytes: content.len() as u64 };
        for (index, offset) in [(0, CHUNK_BYTES_MAX as u32), (2, 10), (3, 0), (u64::MAX, u32::MAX), (1, u32::MAX)] {
            connection.send(&ChunkRequest { key: delta(1), index, offset, pace_bytes_per_second: 0 }).await.unwrap();
            assert_eq!(connection.recv::<ChunkReply>().await.unwrap(), outside, "{index} {offset}");
        }
        connection.send(&ChunkRequest { key: delta(1), index: 2, offset: 9, pace_bytes_per_second: 1 }).await.unwrap();
        let reply = connection.recv::<ChunkReply>().await.unwrap();
        assert!(matches!(reply, ChunkReply::Chunk { chunk_bytes: 1, .. }), "{reply:?}");
        assert_eq!(connection.halves().1.recv_raw(1).await.unwrap(), content[content.len() - 1..]);
    })
    .await;
}

#[tokio::test]
async fn the_rest_of_a_chunk_must_be_as_long_as_the_rest() {
    bounded(async {
        let content = random_bytes(26, CHUNK_BYTES_MAX);
        let blob = Blob::memory(content.clone());
        let (holder, _) = serve_with(move |mut connection| {
            let blob = blob.clone();
            async move {
                while let Ok(ChunkRequest { offset, .. }) = connection.recv().await {
                    let (chunk, hash) = blob.chunk(0).await.unwrap();
                    // Whole again, whatever was asked for; the first time it breaks off in the middle.
                    let chunk_bytes = chunk.len() as u32;
                    let reply = ChunkReply::Chunk { blob_bytes: blob.bytes(), chunk_bytes, hash, sent: None };
                    let content = if offset == 0 { chunk.slice(..200_000) } else { chunk };
                    let (sender, _) = connection.halves();
                    if sender.queue(&reply).await.is_err() || sender.send_raw(content).await.is_err() || offset == 0 {
                        return;
                    }
                }
            }
        })
        .await;
        let error = client().fetch(&request(delta(1), &content, vec![holder], 1)).await.unwrap_err();
        assert!(error.to_string().contains("does not fit the request"), "{error}");
    })
    .await;
}

#[tokio::test]
async fn a_small_fetch_on_a_kept_connection_is_one_request_and_one_answer() {
    bounded(async {
        let content = random_bytes(27, 100_000);
        let served = shelf(delta(1), &content);
        let (holder, connections) = serve(served.clone()).await;
        let client = client();
        let wanted = request(delta(1), &content, vec![holder], 8);
        client.fetch(&wanted).await.unwrap();
        for fetches in 2..5 {
            let before = client.traffic().bytes_sent();
            client.fetch(&wanted).await.unwrap();
            let sent = client.traffic().bytes_sent() - before;
            // One TLS record (22 bytes around its content) with one frame (4): nothing else is said before the answer.
            assert!(sent <= 64, "{sent} bytes");
            assert_eq!(served.opened.load(Ordering::Relaxed), fetches);
        }
        assert_eq!(connections.load(Ordering::Relaxed), 1);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fetch_tells_what_the_link_is_like() {
    bounded(async {
        let content = random_bytes(28, 6 * CHUNK_BYTES_MAX);
        let (holder, _) = serve(shelf(delta(1), &content)).await;
        let client = client();
        assert_eq!(client.link(&holder), None);
        client.fetch(&request(delta(1), &content, vec![holder.clone()], 2)).await.unwrap();
        let link = client.link(&holder).unwrap();
        assert_eq!((link.bytes, link.reconnects), (content.len() as u64, 0));
        // A second stream may still have been connecting when all was there.
        assert!((1..=2).contains(&link.connections), "{link:?}");
        assert!(link.samples >= 1 && link.seconds > 0.0, "{link:?}");
        assert!(link.bytes_per_second.is_some_and(|rate| rate > 1e5 && rate < 1e12), "{link:?}");
        assert!(link.round_trip_seconds.is_some_and(|seconds| seconds > 0.0 && seconds < 60.0), "{link:?}");
        assert!(link.loss.is_none_or(|loss| (0.0..=1.0).contains(&loss)), "{link:?}");
        assert_eq!(link.loss.is_some(), cfg!(target_os = "linux"), "{link:?}");
        let [(found, same, Some(path))] = &client.links()[..] else { panic!("one link, with its way") };
        assert_eq!((found, same), (&holder, &link));
        assert!(path.local.ip().is_loopback() && path.peer.to_string() == holder.address, "{path:?}");
        assert!(path.interface.as_ref().is_some_and(|name| name.starts_with("lo")), "{path:?}");
    })
    .await;
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn a_connection_is_paced_and_tells_what_tcp_counted() {
    bounded(async {
        let (mut one, mut other) = connected().await;
        one.set_pacing_rate(50_000_000).unwrap();
        one.send("hello").await.unwrap();
        assert_eq!(other.recv::<String>().await.unwrap(), "hello");
        let info = one.tcp_info().unwrap();
        assert_eq!(info.pacing_bytes_per_second_max, 50_000_000);
        assert!(info.bytes_sent >= one.traffic().bytes_sent(), "{info:?}");
        assert_eq!(other.tcp_info().unwrap().pacing_bytes_per_second_max, u64::MAX);
        assert!(one.path().congestion_control.is_some());
    })
    .await;
}

#[tokio::test]
async fn a_peer_that_counts_nonsense_is_not_believed() {
    bounded(async {
        let content = random_bytes(29, 4 * CHUNK_BYTES_MAX);
        let blob = Blob::memory(content.clone());
        let (holder, _) = serve_with(move |mut connection| {
            let blob = blob.clone();
            async move {
                let mut count = 0;
                while let Ok(ChunkRequest { index, .. }) = connection.recv().await {
                    let (chunk, hash) = blob.chunk(index).await.unwrap();
                    count += 1;
                    let sent = Some(crate::blob::protocol::Sent { bytes: u64::MAX / count, again: u64::MAX });
                    let chunk_bytes = chunk.len() as u32;
                    let reply = ChunkReply::Chunk { blob_bytes: blob.bytes(), chunk_bytes, hash, sent };
                    let (sender, _) = connection.halves();
                    if sender.queue(&reply).await.is_err() || sender.send_raw(chunk).await.is_err() {
                        return;
                    }
                }
            }
        })
        .await;
        let client = client();
        assert!(client.fetch(&request(delta(1), &content, vec![holder.clone()], 1)).await.unwrap() == content);
        assert_eq!(client.link(&holder).unwrap().loss, None);
    })
    .await;
}

/// A holder that serves blobs as it should, for one connection, paced: what it sends is spread, and arrives whole.
#[cfg(target_os = "linux")]
#[tokio::test]
async fn a_paced_holder_serves_whole_blobs() {
    bounded(async {
        let content = random_bytes(30, 300_000);
        let source = shelf(delta(1), &content);
        let (holder, _) = serve_with(move |connection| {
            let source = source.clone();
            async move {
                connection.set_pacing_rate(20_000_000).unwrap();
                let _ = serve_blobs(connection, source).await;
            }
        })
        .await;
        let client = client();
        assert!(client.fetch(&request(delta(1), &content, vec![holder], 1)).await.unwrap() == content);
    })
    .await;
}
