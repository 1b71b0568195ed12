//! Deltas by way of an object store, over processes: what their arguments and environments mean. What a store may do is in the tests of
//! `site`.

use crate::moto::{Moto, SECRET, no_moto};
use crate::support::{Coordinator, Place, assert_identical_after_every_commit, assert_ledger_adds_up, join_with};
use serde_json::Value;
use std::fs;
use std::path::PathBuf;
use telemetry::Event;

const STEPS: &str = "train.steps=12";
const SITES: [&str; 2] = ["site-a", "site-b"];

/// Trains the same run over two sites that are told this; gives the hash of the state that both end with.
fn train(place: &Place, run: &str, told: &[&str], environment: &[(&str, String)]) -> Value {
    place.init(run, &["run.name=run", "sync.sites=2", "sync.shares=[1.0, 2.0]", STEPS]);
    let coordinator = Coordinator::start(place, run, &["--json"]);
    let names = SITES.map(|site| format!("{run}-{site}"));
    let processes = names.each_ref().map(|name| {
        let process = join_with(place, &coordinator.invite, name, told, environment);
        // Sites get their numbers in this order, and with them their parts.
        place.wait_for_event(run, "the site's arrival", |event| match event {
            Event::SiteJoined { name: joined, .. } => (joined == name).then_some(()),
            _ => None,
        });
        process
    });
    let summary = coordinator.process.object();
    for process in processes {
        assert_eq!(process.object()["state_hash"], summary["state_hash"], "{run}");
    }
    assert_identical_after_every_commit(place, run, &names.each_ref().map(String::as_str));
    let ledger = assert_ledger_adds_up(&summary["ledger"]);
    assert_eq!((&summary["finished"], ledger.returned, ledger.lost), (&true.into(), 0, 0), "{run}");
    summary["state_hash"].clone()
}

fn routes(place: &Place, site: &str) -> Vec<(String, String)> {
    let chosen = place.events(site).into_iter().filter_map(|record| match record.event {
        Event::RouteChosen { route, reason, .. } => Some((route, reason)),
        _ => None,
    });
    chosen.collect()
}

fn addresses(place: &Place, run: &str) -> Vec<String> {
    let addresses = place.events(run).into_iter().filter_map(|record| match record.event {
        Event::SiteJoined { address, .. } => Some(address),
        _ => None,
    });
    addresses.collect()
}

#[test]
fn a_folder_and_a_bucket_do_as_connections_do_and_no_secret_is_written_down() {
    let place = Place::new();
    let direct = train(&place, "direct", &[], &[]);
    assert!(addresses(&place, "direct").iter().all(|address| address.starts_with("127.0.0.1:")));
    let folder = place.join("store");
    fs::create_dir(&folder).unwrap();
    let url = format!("file://{}", folder.display());
    assert_eq!(train(&place, "folder", &["--objects", &url, "--dial-out-only"], &[]), direct);
    assert_eq!(addresses(&place, "folder"), ["", ""]);
    let only = ("object store".to_owned(), "there is no other way".to_owned());
    assert_eq!(routes(&place, "folder-site-a"), [only]);
    if no_moto() {
        return;
    }
    let moto = Moto::start();
    moto.make_bucket("deltas");
    let told = ["--objects", "s3://deltas/some/prefix", "--dial-out-only"];
    assert_eq!(train(&place, "bucket", &told, &moto.environment()), direct);
    assert_nowhere(&place, SECRET);
}

/// Neither in what the processes of the bucket's run have said nor in what they have written.
fn assert_nowhere(place: &Place, secret: &str) {
    let texts = ["run.toml", "events.jsonl", "coordinator.redb"];
    let written = ["bucket", "bucket-site-a", "bucket-site-b"].into_iter();
    let written = written.flat_map(|folder| texts.map(|text| place.join(folder).join(text)));
    let said = fs::read_dir(place.path()).unwrap().map(|entry| entry.unwrap().path());
    let files: Vec<PathBuf> = written.chain(said).filter(|path| path.is_file()).collect();
    assert!(files.iter().filter(|path| path.ends_with("events.jsonl")).count() == 3, "{files:?}");
    for path in files {
        assert!(!String::from_utf8_lossy(&fs::read(&path).unwrap()).contains(secret), "{}", path.display());
    }
}

#[test]
fn a_store_that_cannot_be_is_refused_before_anything_is_dialled() {
    let place = Place::new();
    place.init("run", &[]);
    let coordinator = Coordinator::start(&place, "run", &[]);
    let refused = |told: &[&str]| {
        let ended = join_with(&place, &coordinator.invite, "site-a", told, &[]).end();
        ended.failure().to_owned()
    };
    let missing = format!("file://{}", place.join("missing").display());
    let failure = refused(&["--objects", &missing]);
    assert!(failure.contains("there is no such folder\nhint: mkdir -p "), "{failure}");
    let failure = refused(&["--objects", "s3://me:password@bucket"]);
    assert!(!failure.contains("password@") && failure.contains("hint: give credentials in AWS_"), "{failure}");
    let ended = join_with(&place, &coordinator.invite, "site-a", &["--dial-out-only"], &[]).end();
    assert_eq!(ended.code, Some(2), "{ended:?}");
    assert!(ended.stderr.contains("--objects"), "{ended:?}");
}
