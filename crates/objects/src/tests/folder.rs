//! On a folder, where a test can put what a store should never hold.

use super::*;
use std::path::PathBuf;
use tempfile::TempDir;

fn open(folder: &TempDir) -> ObjectStore {
    ObjectStore::open(&format!("file://{}", folder.path().display()), "run-1").unwrap()
}

fn path_of(folder: &TempDir, key: ObjectKey, hash: ContentHash) -> PathBuf {
    folder.path().join("run-1").join(key.name(hash))
}

#[tokio::test]
async fn what_is_left_is_taken() {
    let folder = tempfile::tempdir().unwrap();
    round_trips(&open(&folder)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sites_that_ask_first_wait() {
    let folder = tempfile::tempdir().unwrap();
    everyone_at_once(&open(&folder), 5).await;
}

#[tokio::test]
async fn a_site_forgets_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder);
    assert_eq!(store.forget_before(Round(9), SiteId(1)).await.unwrap(), 0, "nothing was ever left");
    forgets(&store).await;
    // What others keep there stays.
    let other = folder.path().join("run-1/round-of-applause");
    std::fs::write(&other, "kept").unwrap();
    store.forget_before(Round(9), SiteId(1)).await.unwrap();
    assert!(other.exists());
}

#[tokio::test]
async fn what_nobody_left_is_missed_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let patience = Duration::from_millis(120);
    let outcome = open(&folder).get(&delta(12, 3), 10, ContentHash::of(b"x"), patience).await;
    let error = outcome.unwrap_err();
    assert!(matches!(error, GetError::Patience { failure: None, waited_seconds, .. } if waited_seconds >= 0.12));
    assert!(error.to_string().starts_with("delta of site 3, round 12, fragment 1 was not in the object store after"));
}

#[tokio::test]
async fn another_length_is_refused_before_it_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder);
    let hash = ContentHash::of(b"what was announced");
    let path = path_of(&folder, delta(1, 1), hash);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    // A tebibyte that takes no space: whoever took memory for it, or read it, would not end.
    std::fs::File::create(&path).unwrap().set_len(1 << 40).unwrap();
    let error = store.get(&delta(1, 1), 18, hash, PATIENCE).await.unwrap_err();
    assert!(matches!(error, GetError::Length { expected: 18, found, .. } if found == 1 << 40), "{error}");
}

#[tokio::test]
async fn another_content_is_not_handed_out() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder);
    let hash = ContentHash::of(b"good");
    store.put(&delta(1, 1), Bytes::from_static(b"good")).await.unwrap();
    std::fs::write(path_of(&folder, delta(1, 1), hash), b"evil").unwrap();
    let error = store.get(&delta(1, 1), 4, hash, PATIENCE).await.unwrap_err();
    assert!(
        matches!(error, GetError::Hash { expected, found, .. } if expected == hash && found == ContentHash::of(b"evil"))
    );
}

#[tokio::test]
async fn a_repeated_round_does_not_replace_what_is_being_read() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder);
    for text in [b"first", b"again"] {
        store.put(&delta(1, 1), Bytes::from_static(text)).await.unwrap();
    }
    for text in [b"first", b"again"] {
        let got = store.get(&delta(1, 1), 5, ContentHash::of(text), PATIENCE).await.unwrap();
        assert_eq!(&got.content[..], text);
    }
}
