//! The same work on a folder and on a server of S3.

mod folder;
mod opening;
mod s3;

use crate::{GetError, ObjectKey, ObjectStore};
use base::{ContentHash, Round, SiteId};
use bytes::Bytes;
use std::time::Duration;

/// Longer than any object of a test takes to appear.
const PATIENCE: Duration = Duration::from_secs(20);

fn delta(round: u64, site: u32) -> ObjectKey {
    ObjectKey::Delta { round: Round(round), fragment: 1, site: SiteId(site) }
}

/// Bytes that no part shares with another.
fn content(bytes: usize, seed: u32) -> Bytes {
    let mut content = vec![0; bytes];
    for (index, word) in content.chunks_mut(4).enumerate() {
        word.copy_from_slice(&(index as u32 ^ seed).wrapping_mul(2_654_435_761).to_le_bytes()[..word.len()]);
    }
    content.into()
}

async fn leave_and_take(store: &ObjectStore, key: ObjectKey, bytes: usize) {
    let content = content(bytes, 7);
    let put = store.put(&key, content.clone()).await.unwrap();
    assert_eq!(put.bytes, bytes as u64);
    let got = store.get(&key, bytes as u64, ContentHash::of(&content), PATIENCE).await.unwrap();
    assert!(got.content == content, "{key}");
    assert_eq!(got.transfer.bytes, bytes as u64);
    assert!(put.seconds > 0.0 && got.transfer.seconds > 0.0 && got.transfer.bits_per_second().is_finite());
}

/// Nothing, a byte, one part, two parts; a second time over the first.
async fn round_trips(store: &ObjectStore) {
    for (round, bytes) in [0, 1, 5 << 20, (5 << 20) + 13].into_iter().enumerate() {
        leave_and_take(store, delta(round as u64, 3), bytes).await;
    }
    leave_and_take(store, delta(1, 3), 1).await;
    leave_and_take(store, delta(3, 3), (5 << 20) + 13).await;
    leave_and_take(store, ObjectKey::State { round: Round(4) }, 1_000).await;
}

/// Sites that ask for each other's deltas before they have left their own.
async fn everyone_at_once(store: &ObjectStore, sites: u32) {
    let mut tasks = tokio::task::JoinSet::new();
    for site in 0..sites {
        for other in 0..sites {
            let (store, expected) = (store.clone(), content(10_000, other));
            tasks.spawn(async move {
                let hash = ContentHash::of(&expected);
                let got = store.get(&delta(9, other), 10_000, hash, PATIENCE).await.unwrap();
                assert!(got.content == expected);
            });
        }
        let store = store.clone();
        tasks.spawn(async move {
            store.put(&delta(9, site), content(10_000, site)).await.unwrap();
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
}

async fn is_there(store: &ObjectStore, key: ObjectKey) -> bool {
    let content = content(100, 1);
    match store.get(&key, 100, ContentHash::of(&content), Duration::ZERO).await {
        Ok(_) => true,
        Err(GetError::Patience { failure: None, .. }) => false,
        Err(error) => panic!("{error}"),
    }
}

/// A site removes its own old deltas and old states, and nothing else.
async fn forgets(store: &ObjectStore) {
    let state = |round| ObjectKey::State { round: Round(round) };
    let keys = [delta(1, 1), delta(2, 1), delta(3, 1), delta(2, 2), state(2), state(3)];
    for key in keys {
        store.put(&key, content(100, 1)).await.unwrap();
    }
    assert_eq!(store.forget_before(Round(3), SiteId(1)).await.unwrap(), 3);
    let mut left = Vec::new();
    for key in keys {
        if is_there(store, key).await {
            left.push(key);
        }
    }
    assert_eq!(left, [delta(3, 1), delta(2, 2), state(3)]);
    assert_eq!(store.forget_before(Round(3), SiteId(1)).await.unwrap(), 0);
}
