//! Bulk transfer from holders that work, die, stall, lie and forget.

use super::{bounded, identity, listen};
use crate::blob::fetch::FetchError;
use crate::blob::protocol::{ChunkReply, ChunkRequest};
use crate::limits::CHUNK_BYTES_MAX;
use crate::{Blob, BlobClient, BlobKey, BlobRequest, BlobSource, Connection, Holder, Identity, Traffic, serve_blobs};
use base::random::Random;
use base::{ContentHash, Hint, Round, SiteId};
use bytes::Bytes;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

pub(super) fn random_bytes(seed: u64, bytes: usize) -> Vec<u8> {
    let mut random = Random::new(seed, 0);
    (0..bytes.div_ceil(8)).flat_map(|_| random.next_u64().to_le_bytes()).take(bytes).collect()
}

pub(super) fn delta(round: u64) -> BlobKey {
    BlobKey::Delta { round: Round(round), fragment: 0, site: SiteId(1) }
}

/// Blobs in memory, for one peer or for all; counts chunks.
#[derive(Default)]
pub(super) struct Shelf {
    blobs: BTreeMap<BlobKey, Blob>,
    only_for: Option<ContentHash>,
    pub(super) opened: AtomicU64,
}

impl BlobSource for Shelf {
    fn open(&self, peer: ContentHash, key: &BlobKey) -> Option<Blob> {
        self.opened.fetch_add(1, Ordering::Relaxed);
        self.blobs.get(key).filter(|_| self.only_for.is_none_or(|only| only == peer)).cloned()
    }
}

/// A holder that serves `source`; returns how to reach it and its count of connections.
pub(super) async fn serve(source: Arc<dyn BlobSource>) -> (Holder, Arc<AtomicU64>) {
    serve_with(move |connection| {
        let source = source.clone();
        async move {
            let _ = serve_blobs(connection, source).await;
        }
    })
    .await
}

/// A holder that does whatever it likes with its connections.
pub(super) async fn serve_with<F: Future<Output = ()> + Send + 'static>(
    handle: impl Fn(Connection) -> F + Send + 'static,
) -> (Holder, Arc<AtomicU64>) {
    let identity = identity();
    let mut listener = listen(&identity).await;
    let holder = Holder { address: listener.address().to_string(), fingerprint: identity.fingerprint() };
    let connections = Arc::new(AtomicU64::new(0));
    let counted = connections.clone();
    tokio::spawn(async move {
        while let Some(incoming) = listener.accept().await {
            counted.fetch_add(1, Ordering::Relaxed);
            tokio::spawn(handle(incoming.connection));
        }
    });
    (holder, connections)
}

pub(super) fn shelf(key: BlobKey, content: &[u8]) -> Arc<Shelf> {
    let blobs = BTreeMap::from([(key, Blob::memory(content.to_vec()))]);
    Arc::new(Shelf { blobs, ..Shelf::default() })
}

pub(super) fn client() -> BlobClient {
    BlobClient::new(identity(), Traffic::new())
}

pub(super) fn request(key: BlobKey, content: &[u8], holders: Vec<Holder>, streams: usize) -> BlobRequest {
    let bytes = content.len() as u64;
    BlobRequest { key, bytes, bytes_max: bytes, hash: ContentHash::of(content), holders, streams }
}

/// Answers requests as `serve_blobs` does, after `mangle` has changed the reply. `None` ends the connection.
async fn serve_mangled(
    mut connection: Connection,
    content: Arc<Vec<u8>>,
    mut mangle: impl FnMut(u64, ChunkReply, Vec<u8>) -> Option<(ChunkReply, Vec<u8>)>,
) {
    let blob = Blob::memory(content.to_vec());
    while let Ok(ChunkRequest { index, .. }) = connection.recv().await {
        let (chunk, hash) = blob.chunk(index).await.unwrap();
        let reply = ChunkReply::Chunk { blob_bytes: blob.bytes(), chunk_bytes: chunk.len() as u32, hash, sent: None };
        let Some((reply, chunk)) = mangle(index, reply, chunk.to_vec()) else { return };
        let (sender, _) = connection.halves();
        if sender.queue(&reply).await.is_err() || sender.send_raw(Bytes::from(chunk)).await.is_err() {
            return;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn blobs_of_all_lengths_arrive_over_any_number_of_streams() {
    bounded(async {
        let content = random_bytes(1, 9 * CHUNK_BYTES_MAX + 12_345);
        let client = client();
        for bytes in [0, 1, CHUNK_BYTES_MAX - 1, CHUNK_BYTES_MAX, CHUNK_BYTES_MAX + 1, content.len()] {
            let content = &content[..bytes];
            let (holder, connections) = serve(shelf(delta(1), content)).await;
            for streams in [1, 4] {
                let fetched = client.fetch(&request(delta(1), content, vec![holder.clone()], streams)).await.unwrap();
                assert!(fetched == content, "{bytes} bytes over {streams} streams");
            }
            let most = if bytes > CHUNK_BYTES_MAX + 1 { 5 } else { 1 };
            assert!(connections.load(Ordering::Relaxed) <= most, "short blobs use one stream, and keep it");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn several_holders_share_the_work_and_traffic_is_counted() {
    bounded(async {
        let content = random_bytes(2, 16 * CHUNK_BYTES_MAX);
        let shelves = [shelf(delta(1), &content), shelf(delta(1), &content)];
        let holders = vec![serve(shelves[0].clone()).await.0, serve(shelves[1].clone()).await.0];
        let client = client();
        assert!(client.fetch(&request(delta(1), &content, holders, 4)).await.unwrap() == content);
        let served: Vec<u64> = shelves.iter().map(|shelf| shelf.opened.load(Ordering::Relaxed)).collect();
        assert_eq!(served.iter().sum::<u64>(), 16, "every chunk is asked for once");
        assert!(served.iter().all(|&chunks| chunks > 0), "{served:?}");
        let overhead = client.traffic().bytes_received() as f64 / content.len() as f64;
        assert!((1.0..1.01).contains(&overhead), "{overhead}");
    })
    .await;
}

#[tokio::test]
async fn one_connection_serves_round_after_round() {
    bounded(async {
        let contents: Vec<Vec<u8>> = (0..5).map(|round| random_bytes(round, 1000)).collect();
        let blobs = contents.iter().zip(0..).map(|(content, round)| (delta(round), Blob::memory(content.clone())));
        let (holder, connections) = serve(Arc::new(Shelf { blobs: blobs.collect(), ..Shelf::default() })).await;
        let client = client();
        for (content, round) in contents.iter().zip(0..) {
            let fetched = client.fetch(&request(delta(round), content, vec![holder.clone()], 4)).await.unwrap();
            assert_eq!(fetched, *content);
            assert_eq!(client.idle_connections(), 1);
        }
        assert_eq!(connections.load(Ordering::Relaxed), 1);
        client.close_idle();
        assert_eq!(client.idle_connections(), 0);
    })
    .await;
}

#[tokio::test]
async fn a_kept_connection_that_the_holder_closed_is_replaced() {
    bounded(async {
        let content = Arc::new(random_bytes(3, 100));
        let served = content.clone();
        let (holder, connections) = serve_with(move |connection| {
            let (mut replies, content) = (0, served.clone());
            serve_mangled(connection, content, move |_, reply, chunk| {
                replies += 1;
                (replies == 1).then_some((reply, chunk))
            })
        })
        .await;
        let client = client();
        for _ in 0..6 {
            let fetched = client.fetch(&request(delta(1), &content, vec![holder.clone()], 1)).await.unwrap();
            assert_eq!(fetched, *content);
        }
        assert_eq!(connections.load(Ordering::Relaxed), 6);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_chunk_is_noticed_and_fetched_again() {
    bounded(async {
        let content = Arc::new(random_bytes(4, 5 * CHUNK_BYTES_MAX));
        let damaged = Arc::new(AtomicU64::new(0));
        let (served, count) = (content.clone(), damaged.clone());
        let (holder, _) = serve_with(move |connection| {
            let (content, damaged) = (served.clone(), count.clone());
            serve_mangled(connection, content, move |index, reply, mut chunk| {
                if index == 3 && damaged.fetch_add(1, Ordering::Relaxed) == 0 {
                    chunk[CHUNK_BYTES_MAX / 2] ^= 0x10;
                }
                Some((reply, chunk))
            })
        })
        .await;
        let fetched = client().fetch(&request(delta(1), &content, vec![holder], 2)).await.unwrap();
        assert!(fetched == *content);
        assert_eq!(damaged.load(Ordering::Relaxed), 2, "once damaged, once whole");
    })
    .await;
}

#[tokio::test]
async fn a_holder_whose_copy_is_another_is_found_out_by_the_whole() {
    bounded(async {
        let (content, other) = (random_bytes(5, 3 * CHUNK_BYTES_MAX), random_bytes(6, 3 * CHUNK_BYTES_MAX));
        let (holder, _) = serve(shelf(delta(1), &other)).await;
        let request = request(delta(1), &content, vec![holder], 2);
        let error = client().fetch(&request).await.unwrap_err();
        assert!(matches!(error, FetchError::Hash { .. }), "{error}");
        for hash in [ContentHash::of(&content), ContentHash::of(&other)] {
            assert!(error.to_string().contains(&hash.to_string()), "{error}");
        }
        let folder = tempfile::tempdir().unwrap();
        let error = client().fetch_to_file(&request, &folder.path().join("blob")).await.unwrap_err();
        assert!(matches!(error, FetchError::Hash { .. }), "{error}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "nothing wrong is kept");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_holder_that_dies_in_mid_transfer_is_replaced_by_another() {
    bounded(async {
        let content = Arc::new(random_bytes(7, 12 * CHUNK_BYTES_MAX));
        let left = Arc::new(AtomicU64::new(4));
        let (served, count) = (content.clone(), left.clone());
        let (mortal, _) = serve_with(move |connection| {
            let (content, left) = (served.clone(), count.clone());
            serve_mangled(connection, content, move |_, reply, chunk| {
                let alive = left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok();
                alive.then_some((reply, chunk))
            })
        })
        .await;
        let healthy = shelf(delta(1), &content);
        let (other, _) = serve(healthy.clone()).await;
        let fetched = client().fetch(&request(delta(1), &content, vec![mortal, other], 4)).await.unwrap();
        assert!(fetched == *content);
        assert_eq!(left.load(Ordering::Relaxed), 0, "the first holder did serve until it died");
        assert!(healthy.opened.load(Ordering::Relaxed) >= 8);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_resumes_from_what_had_arrived() {
    bounded(async {
        let content = Arc::new(random_bytes(8, 10 * CHUNK_BYTES_MAX + 1));
        let served = content.clone();
        let (forgetful, _) = serve_with(move |connection| {
            let (mut replies, content) = (0, served.clone());
            serve_mangled(connection, content, move |_, reply, chunk| {
                replies += 1;
                Some(if replies <= 6 { (reply, chunk) } else { (ChunkReply::NotFound, Vec::new()) })
            })
        })
        .await;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state");
        let key = BlobKey::State { round: Round(9) };
        let error =
            client().fetch_to_file(&request(key.clone(), &content, vec![forgetful], 1), &path).await.unwrap_err();
        assert!(matches!(error, FetchError::Holders { .. }), "{error}");
        assert!(!path.exists(), "an unfinished file has no name");

        let healthy = shelf(key.clone(), &content);
        let (holder, _) = serve(healthy.clone()).await;
        client().fetch_to_file(&request(key, &content, vec![holder], 4), &path).await.unwrap();
        assert!(std::fs::read(&path).unwrap() == *content);
        assert_eq!(healthy.opened.load(Ordering::Relaxed), 11 - 6, "only what was missing was fetched");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_holder_is_given_up_for_one_that_answers() {
    bounded(async {
        let content = random_bytes(9, 6 * CHUNK_BYTES_MAX);
        let (silent, connections) =
            serve_with(|mut connection| async move { while connection.recv::<ChunkRequest>().await.is_ok() {} }).await;
        let (other, _) = serve(shelf(delta(1), &content)).await;
        let client = BlobClient::with_stall(identity(), Traffic::new(), Duration::from_secs(1));
        let fetched = client.fetch(&request(delta(1), &content, vec![silent.clone(), other], 2)).await.unwrap();
        assert!(fetched == content);
        assert!(connections.load(Ordering::Relaxed) >= 1);
        let client = BlobClient::with_stall(identity(), Traffic::new(), Duration::from_millis(20));
        let error = client.fetch(&request(delta(1), &content, vec![silent], 2)).await.unwrap_err();
        assert!(error.to_string().contains("no chunk for 20ms"), "{error}");
    })
    .await;
}

#[tokio::test]
async fn what_is_not_ours_to_have_is_not_found() {
    bounded(async {
        let content = random_bytes(10, 10);
        let (member, stranger) = (identity(), identity());
        let blobs = BTreeMap::from([(delta(1), Blob::memory(content.clone()))]);
        let only_for = Some(member.fingerprint());
        let (holder, _) = serve(Arc::new(Shelf { blobs, only_for, ..Shelf::default() })).await;
        let wanted = request(delta(1), &content, vec![holder.clone()], 1);
        let as_peer = |identity: Identity| BlobClient::new(identity, Traffic::new());
        assert_eq!(as_peer(member).fetch(&wanted).await.unwrap(), content);
        let error = as_peer(stranger).fetch(&wanted).await.unwrap_err();
        assert!(error.to_string().contains(&holder.address) && error.hint().is_some(), "{error}");
        let escape = BlobKey::File { name: "../secret".to_owned() };
        let (open_to_all, _) = serve(shelf(escape.clone(), &content)).await;
        let error = client().fetch(&request(escape, &content, vec![open_to_all], 1)).await.unwrap_err();
        assert!(matches!(error, FetchError::Holders { .. }), "{error}");
    })
    .await;
}

#[tokio::test]
async fn lengths_are_checked_before_memory_is_taken() {
    bounded(async {
        let content = random_bytes(11, 100);
        let (holder, connections) = serve(shelf(delta(1), &content)).await;
        let mut wanted = request(delta(1), &content, vec![holder], 1);
        wanted.bytes = u64::MAX;
        let error = client().fetch(&wanted).await.unwrap_err();
        assert!(matches!(error, FetchError::TooLong { bytes: u64::MAX, bytes_max: 100, .. }), "{error}");
        wanted.bytes_max = u64::MAX;
        let error = client().fetch(&wanted).await.unwrap_err();
        assert!(matches!(error, FetchError::TooLong { .. }), "{error}");
        assert_eq!(connections.load(Ordering::Relaxed), 0);
        wanted.bytes = 101;
        let error = client().fetch(&wanted).await.unwrap_err();
        assert!(error.to_string().contains("its copy has 100 bytes, expected were 101"), "{error}");
        wanted.holders.clear();
        let error = client().fetch(&wanted).await.unwrap_err();
        assert!(error.to_string().contains("nobody holds it"), "{error}");
    })
    .await;
}

#[tokio::test]
async fn a_chunk_longer_than_asked_for_is_refused() {
    bounded(async {
        let content = Arc::new(random_bytes(12, 100));
        let served = content.clone();
        let (holder, _) = serve_with(move |connection| {
            serve_mangled(connection, served.clone(), |_, reply, chunk| match reply {
                ChunkReply::Chunk { blob_bytes, hash, .. } => {
                    Some((ChunkReply::Chunk { blob_bytes, chunk_bytes: u32::MAX, hash, sent: None }, chunk))
                }
                other => Some((other, chunk)),
            })
        })
        .await;
        let error = client().fetch(&request(delta(1), &content, vec![holder], 1)).await.unwrap_err();
        assert!(error.to_string().contains("does not fit the request"), "{error}");
    })
    .await;
}

#[tokio::test]
async fn a_file_that_cannot_be_written_is_named() {
    bounded(async {
        let content = random_bytes(13, 100);
        let (holder, _) = serve(shelf(delta(1), &content)).await;
        let wanted = request(delta(1), &content, vec![holder], 1);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("missing").join("blob");
        let error = client().fetch_to_file(&wanted, &path).await.unwrap_err();
        assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
        assert!(error.hint().unwrap().contains("df -h"), "{:?}", error.hint());
        let path = folder.path().join("blob");
        let (other, _) = crate::blob::file::PartialFile::open(&path, wanted.hash, wanted.bytes).unwrap();
        let error = client().fetch_to_file(&wanted, &path).await.unwrap_err();
        assert!(matches!(error, FetchError::Busy { .. }), "{error}");
        drop(other);
        client().fetch_to_file(&wanted, &path).await.unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), content);
    })
    .await;
}
