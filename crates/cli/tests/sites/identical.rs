//! I1 and I2 while nothing goes wrong, and what a run says about itself.

use crate::support::{Coordinator, Place, assert_identical_after_every_commit, assert_ledger_adds_up, hashes};
use serde_json::Value;
use std::collections::BTreeSet;
use telemetry::Event;

const SITES: [&str; 3] = ["site-a", "site-b", "site-c"];

#[test]
fn three_unequal_sites_end_identical() {
    let place = Place::new();
    place.init("run", &["sync.sites=3", "sync.shares=[1.0, 2.0, 5.0]", "train.steps=24"]);
    let coordinator = Coordinator::start(&place, "run", &["--json"]);
    let sites = coordinator.join_all(&place, &SITES);
    let summary = coordinator.process.object();
    let outcomes: Vec<Value> = sites.into_iter().map(|site| site.object()).collect();
    assert_eq!((&summary["rounds"], &summary["finished"]), (&6.into(), &true.into()));
    for outcome in &outcomes {
        assert_eq!((&outcome["state_hash"], &outcome["round"]), (&summary["state_hash"], &6.into()));
    }
    assert_identical_after_every_commit(&place, "run", &SITES);
    for site in SITES {
        assert_eq!(hashes(&place.events(site)).len(), 6, "{site} applied every round");
    }
    let ledger = assert_ledger_adds_up(&summary["ledger"]);
    assert_eq!((ledger.committed, ledger.returned, ledger.lost), (6 * 4 * 8, 0, 0));
    shares_are_as_set(&place);
    deltas_go_from_site_to_site(&place, &outcomes);
}

fn shares_are_as_set(place: &Place) {
    let rounds = place.events("run").into_iter().filter_map(|record| match record.event {
        Event::RoundCommitted { contributors, .. } => Some(contributors),
        _ => None,
    });
    for contributors in rounds {
        let tokens: Vec<u64> = contributors.iter().map(|contributor| contributor.tokens).collect();
        // 4 steps of 1, 2 and 5 samples of 32 tokens.
        assert_eq!(tokens, [128, 256, 640]);
    }
}

/// The coordinator sends each site the files of the run and nothing of a tensor's size after that: what the sites
/// received beyond those files, they sent one another.
fn deltas_go_from_site_to_site(place: &Place, outcomes: &[Value]) {
    let sum = |key: &str| outcomes.iter().map(|outcome| outcome[key].as_u64().unwrap()).sum::<u64>();
    let delta_bytes = place.wait_for_event("site-a", "a fetched delta", |event| match event {
        Event::DeltaFetched { bytes, .. } => Some(*bytes),
        _ => None,
    });
    let deltas = 6 * 3 * 2 * delta_bytes;
    let files = ["data", "checkpoints/round-00000000"].map(|folder| folder_bytes(&place.join("run").join(folder)));
    let files = 3 * files.iter().sum::<u64>();
    assert!(sum("bytes_sent") > deltas, "sites send the deltas: {} of {deltas}", sum("bytes_sent"));
    let from_coordinator = sum("bytes_received") - deltas;
    // Beside the files: messages, TLS, hashes of chunks, requests for blobs. A twentieth of the deltas is not a delta a site.
    let margin = 3 * 200_000;
    assert!(from_coordinator < files + margin, "{from_coordinator} bytes for {files} of files");
}

fn folder_bytes(folder: &std::path::Path) -> u64 {
    std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum()
}

#[test]
fn status_tells_of_a_run_from_its_folder_and_over_the_network() {
    let place = Place::new();
    place.init("run", &["sync.sites=2", "train.steps=4000"]);
    let coordinator = Coordinator::start(&place, "run", &["--json"]);
    let sites = coordinator.join_all(&place, &SITES[..2]);
    place.wait_for_commit("run", 2);
    for of in ["run", &coordinator.invite] {
        let status = place.object(&["status", of]);
        assert_eq!((&status["run"], &status["state"]), (&"run".into(), &"training".into()), "{status}");
        assert!(status["round"].as_u64().unwrap() >= 2, "{status}");
        assert!(status["tokens_per_second"].as_f64().unwrap() > 0.0, "{status}");
        assert!(status["loss_nats"].as_f64().unwrap() > 0.0, "{status}");
        assert_eq!(status["state_hash"].as_str().unwrap().len(), 64, "{status}");
        let names: BTreeSet<&str> =
            status["sites"].as_array().unwrap().iter().map(|site| site["name"].as_str().unwrap()).collect();
        assert_eq!(names, BTreeSet::from(["site-a", "site-b"]));
        let text = place.ended(&["status", of]);
        assert!(text.stdout.starts_with("run run  ") && text.stdout.contains("site-b"), "{text:?}");
    }
    let site = place.object(&["status", "site-a"]);
    assert!(site["state_hash"].is_string() || site["step"].is_u64(), "a site's folder has a status too: {site}");
    coordinator.process.terminate();
    let summary = coordinator.process.object();
    assert_eq!(summary["finished"], false);
    for site in sites {
        assert_eq!(site.object()["state_hash"], summary["state_hash"]);
    }
}

#[test]
fn the_lab_reports_what_it_promises() {
    let place = Place::new();
    let report =
        place.object(&["lab", "--rounds", "2", "--measure-seconds", "0.2", "--data", "texts", "--folder", "lab"]);
    let keys = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<BTreeSet<_>>();
    let has = |value: &Value, wanted: &[&str]| {
        let keys = keys(value);
        wanted.iter().for_each(|key| assert!(keys.contains(*key), "{key} is missing: {value}"));
    };
    has(&report, &["sites", "rounds", "tokens", "tokens_per_second", "utilisation", "identical", "ledger"]);
    has(&report, &["validation_bits_per_byte_start", "validation_bits_per_byte_end", "bigram_bits_per_byte"]);
    assert_eq!(keys(&report["ledger"]), ["leased", "committed", "returned", "lost"].map(str::to_owned).into());
    let sites = report["sites"].as_array().unwrap();
    assert_eq!(sites.len(), 3);
    for site in sites {
        has(site, &["name", "engine", "tokens_per_second", "share", "bytes_sent", "utilisation", "hash"]);
        assert_eq!(site["hash"], sites[0]["hash"]);
        assert!(
            site["tokens_per_second"].as_f64().unwrap() > 0.0 && site["bytes_sent"].as_u64().unwrap() > 0,
            "{site}"
        );
    }
    assert_eq!((&report["identical"], &report["rounds"]), (&true.into(), &2.into()));
    let share: f64 = sites.iter().map(|site| site["share"].as_f64().unwrap()).sum();
    assert!((share - 1.0).abs() < 1e-9, "{report}");
    assert_ledger_adds_up(&report["ledger"]);
    let (start, end) = (&report["validation_bits_per_byte_start"], &report["validation_bits_per_byte_end"]);
    assert!(end.as_f64().unwrap() < start.as_f64().unwrap(), "it learns: {report}");
}
