//! How a site that is behind gets the run's state: from all holders at once, chunk by chunk with hashes, into a file, so that what has come is
//! not fetched again after a broken line, nor after this process was killed, as long as the run has not gone on from that state.

use std::path::Path;
use std::time::Duration;
use wire::{BlobClient, BlobRequest, FetchError};

/// Fetches a state. While each try brings something, another follows after `pause`; a try that brings nothing is the last: the holders may have
/// gone on, and the coordinator knows which state is to be had now.
///
/// `place` is where chunks are kept; where there is no room they are kept in memory.
///
/// # Errors
/// What a person is told.
pub(crate) async fn fetch_state(
    client: &BlobClient,
    request: &BlobRequest,
    place: &Path,
    pause: Duration,
) -> Result<Vec<u8>, String> {
    if request.holders.is_empty() {
        return Err("no site that holds it can be dialled".to_owned());
    }
    let mut missing_before = u64::MAX;
    loop {
        match client.fetch_to_file(request, place).await {
            Ok(()) => return take(place).await,
            Err(FetchError::Holders { missing_chunks, .. }) if missing_chunks < missing_before => {
                missing_before = missing_chunks;
                tokio::time::sleep(pause).await;
            }
            Err(FetchError::File { .. }) => return client.fetch(request).await.map_err(|error| error.to_string()),
            Err(error) => return Err(error.to_string()),
        }
    }
}

/// The content of a file that is not needed any more.
async fn take(place: &Path) -> Result<Vec<u8>, String> {
    let content = tokio::fs::read(place).await;
    // One that stays is overwritten by the next.
    let _ = tokio::fs::remove_file(place).await;
    content.map_err(|source| format!("cannot read '{}': {source}", place.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use base::random::Random;
    use base::{ContentHash, Round};
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};
    use wire::limits::CHUNK_BYTES_MAX;
    use wire::{Blob, BlobKey, BlobSource, Holder, Identity, Listener, Traffic, serve_blobs};

    const KEY: BlobKey = BlobKey::State { round: Round(9) };
    const CHUNKS: u64 = 11;
    const PAUSE: Duration = Duration::from_millis(1);

    /// Has the state for a number of chunks, then not for some requests, then again.
    struct Forgetful {
        blob: Blob,
        asked: AtomicU64,
        absent: std::ops::Range<u64>,
    }

    impl BlobSource for Forgetful {
        fn open(&self, _: ContentHash, key: &BlobKey) -> Option<Blob> {
            let number = self.asked.fetch_add(1, Ordering::Relaxed);
            (*key == KEY && !self.absent.contains(&number)).then(|| self.blob.clone())
        }
    }

    fn content() -> Vec<u8> {
        let mut random = Random::new(3, 0);
        let bytes = (CHUNKS as usize - 1) * CHUNK_BYTES_MAX + 8;
        (0..bytes / 8).flat_map(|_| random.next_u64().to_le_bytes()).collect()
    }

    fn forgetful(content: &[u8], absent: std::ops::Range<u64>) -> Arc<Forgetful> {
        Arc::new(Forgetful { blob: Blob::memory(content.to_vec()), asked: AtomicU64::new(0), absent })
    }

    async fn serve(source: Arc<Forgetful>) -> Holder {
        let identity = Identity::generate().unwrap();
        let address = "127.0.0.1:0".parse().unwrap();
        let mut listener = Listener::bind(address, &identity, &Traffic::new()).await.unwrap();
        let holder = Holder { address: listener.address().to_string(), fingerprint: identity.fingerprint() };
        tokio::spawn(async move {
            while let Some(incoming) = listener.accept().await {
                let source: Arc<dyn BlobSource> = source.clone();
                tokio::spawn(async move { serve_blobs(incoming.connection, source).await });
            }
        });
        holder
    }

    fn request(content: &[u8], holders: Vec<Holder>) -> BlobRequest {
        let bytes = content.len() as u64;
        BlobRequest { key: KEY, bytes, bytes_max: bytes, hash: ContentHash::of(content), holders, streams: 1 }
    }

    fn client() -> BlobClient {
        BlobClient::new(Identity::generate().unwrap(), Traffic::new())
    }

    #[tokio::test]
    async fn a_state_comes_from_several_holders_and_what_had_come_is_not_fetched_again() {
        let (content, folder) = (content(), tempfile::tempdir().unwrap());
        let place = folder.path().join("state.fetched");
        let sources = [forgetful(&content, 3..5), forgetful(&content, 4..6)];
        let mut holders = Vec::new();
        for source in &sources {
            holders.push(serve(source.clone()).await);
        }
        let request = BlobRequest { streams: 2, ..request(&content, holders) };
        let fetched = fetch_state(&client(), &request, &place, PAUSE).await.unwrap();
        assert!(fetched == content);
        let served = sources.each_ref().map(|source| source.asked.load(Ordering::Relaxed));
        assert!(served.iter().all(|asked| *asked > 3), "both serve: {served:?}");
        // Answers that were on their way when a stream was given up come twice; a second fetch of all would ask for twice as many and more.
        assert!(served.iter().sum::<u64>() < 2 * CHUNKS, "what had come is kept: {served:?}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "nothing is left behind");
    }

    #[tokio::test]
    async fn another_process_goes_on_where_one_was_killed() {
        let (content, folder) = (content(), tempfile::tempdir().unwrap());
        let place = folder.path().join("state.fetched");
        let gone = forgetful(&content, 6..u64::MAX);
        let holders = vec![serve(gone).await];
        let error = fetch_state(&client(), &request(&content, holders), &place, PAUSE).await.unwrap_err();
        assert!(error.contains("could not be fetched"), "{error}");
        let healthy = forgetful(&content, 0..0);
        let holders = vec![serve(healthy.clone()).await];
        let fetched = fetch_state(&client(), &request(&content, holders), &place, PAUSE).await.unwrap();
        assert!(fetched == content);
        assert_eq!(healthy.asked.load(Ordering::Relaxed), CHUNKS - 6, "only what was missing");
    }

    #[tokio::test]
    async fn a_state_that_cannot_be_written_is_fetched_into_memory() {
        let content = content();
        let holders = vec![serve(forgetful(&content, 0..0)).await];
        let nowhere = Path::new("no/such/folder/state.fetched");
        let fetched = fetch_state(&client(), &request(&content, holders), nowhere, PAUSE).await.unwrap();
        assert!(fetched == content);
        let error = fetch_state(&client(), &request(&content, Vec::new()), nowhere, PAUSE).await.unwrap_err();
        assert_eq!(error, "no site that holds it can be dialled");
    }
}
