//! Addresses and settings, good and bad.

use super::*;
use crate::OpenError;
use base::Hint;

fn setting(name: &str, value: &str) -> (String, String) {
    (name.to_owned(), value.to_owned())
}

fn credentials() -> Vec<(String, String)> {
    vec![
        setting("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE"),
        setting("AWS_SECRET_ACCESS_KEY", "very-secret"),
        setting("AWS_SESSION_TOKEN", "very-secret-too"),
    ]
}

#[test]
fn names_are_read_back() {
    for key in [delta(12, 3), ObjectKey::State { round: Round(123_456_789_012) }] {
        assert_eq!(ObjectKey::of_name(&key.name(ContentHash::of(b"x"))), Some(key));
    }
    assert!(delta(12, 3).name(ContentHash::of(b"x")).starts_with("round-00000012-fragment-1-site-3-"));
    for other in ["", "round", "round-1", "round-x-state-0", "round-1-fragment-1-site--1-0", "round-1-state-0-0"] {
        assert_eq!(ObjectKey::of_name(other), None, "{other}");
    }
}

#[test]
fn addresses_that_name_no_store_are_refused() {
    for bad in ["", "bucket", "s3:///prefix", "ftp://host/x", "https://bucket.s3.amazonaws.com"] {
        let error = ObjectStore::open_with(bad, "run", credentials()).unwrap_err();
        assert!(matches!(error, OpenError::Url { .. }), "{bad}: {error}");
        assert!(error.hint().unwrap().contains("s3://BUCKET/PREFIX"));
    }
    let folder = tempfile::tempdir().unwrap();
    let missing = format!("file://{}/missing", folder.path().display());
    assert!(matches!(ObjectStore::open_with(&missing, "run", []), Err(OpenError::Folder { .. })));
    for bad in ["", ".", "..", "a/b", "a b", &"x".repeat(129)] {
        let error = ObjectStore::open_with("s3://bucket", bad, credentials()).unwrap_err();
        assert!(matches!(error, OpenError::Run { .. }), "{bad}: {error}");
    }
}

#[test]
fn half_a_pair_of_credentials_is_refused() {
    let half = [setting("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")];
    let error = ObjectStore::open_with("s3://bucket", "run", half).unwrap_err();
    assert!(matches!(error, OpenError::Settings { .. }));
    assert!(error.to_string().contains("SecretAccessKey"), "{error}");
}

#[test]
fn secrets_are_not_printed() {
    let store = ObjectStore::open_with("s3://bucket/prefix", "run", credentials()).unwrap();
    assert_eq!(
        format!("{store:?}"),
        r#"ObjectStore { url: "s3://bucket/prefix", folder: Path { raw: "prefix/run" } }"#
    );
    let in_url = ObjectStore::open_with("s3://me:very-secret@bucket", "run", []).unwrap_err();
    let endpoint = credentials().into_iter().chain([setting("AWS_ENDPOINT_URL", "http://me:very-secret@127.0.0.1")]);
    let in_endpoint = ObjectStore::open_with("s3://bucket", "run", endpoint).unwrap_err();
    for error in [in_url, in_endpoint] {
        assert!(matches!(error, OpenError::Secret { .. }));
        assert!(!format!("{error} {error:?} {}", error.hint().unwrap()).contains("very-secret"));
    }
}
