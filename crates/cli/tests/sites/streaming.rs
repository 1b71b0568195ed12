//! Rounds that overlap with training: coded fragments, late sites, and bits that do not depend on what arrives when.

use crate::support::{Coordinator, Place, assert_identical_after_every_commit, assert_ledger_adds_up, hashes};
use serde_json::Value;
use std::collections::BTreeMap;
use telemetry::Event;

const SITES: [&str; 3] = ["site-a", "site-b", "site-c"];

/// Rounds of 2 steps, two fragments, merges that take effect 3 steps after their snapshot: two rounds are open while sites train.
const STREAMING: [&str; 7] = [
    "sync.strategy=streaming",
    "sync.inner_steps=4",
    "sync.fragments=2",
    "sync.overlap_steps=3",
    "sync.sites=3",
    "sync.rank=2",
    "train.steps=12",
];

/// Trains three unequal sites; gives each round's contributors and the final hash.
fn train(place: &Place, run: &str, codec: &str) -> (Vec<Vec<u64>>, Value, Value) {
    let codec = format!("sync.codec={codec}");
    place.init(run, &[&STREAMING[..], &["run.name=run", "sync.shares=[1.0, 2.0, 5.0]", &codec]].concat());
    let folders = SITES.map(|site| format!("{run}-{site}"));
    let names: Vec<&str> = folders.iter().map(String::as_str).collect();
    let coordinator = Coordinator::start(place, run, &["--json"]);
    let sites = coordinator.join_all(place, &names);
    let summary = coordinator.process.object();
    for site in sites {
        assert_eq!(site.object()["state_hash"], summary["state_hash"], "{codec}");
    }
    assert_identical_after_every_commit(place, run, &names);
    // Six rounds of two steps, and one more for the fragment that the sixth leaves out.
    assert_eq!((&summary["rounds"], &summary["finished"]), (&7.into(), &true.into()), "{codec}");
    names.iter().for_each(|site| assert_eq!(hashes(&place.events(site)).len(), 7, "{codec}: {site}"));
    let ledger = assert_ledger_adds_up(&summary["ledger"]);
    assert_eq!((ledger.committed, ledger.returned, ledger.lost), (12 * 8, 0, 0), "{codec}");
    let tokens = place.events(run).into_iter().filter_map(|record| match record.event {
        Event::RoundCommitted { contributors, .. } => Some(contributors.iter().map(|site| site.tokens).collect()),
        _ => None,
    });
    let delta_bytes = place.wait_for_event(names[0], "a fetched delta", |event| match event {
        // Fragments differ in size.
        Event::DeltaFetched { round, bytes, .. } if round.0 == 1 => Some((*bytes).into()),
        _ => None,
    });
    (tokens.collect(), delta_bytes, summary["state_hash"].clone())
}

#[test]
fn streaming_sites_are_identical_and_a_replay_gives_the_same_bits() {
    let place = Place::new();
    let (tokens, f32_bytes, f32_hash) = train(&place, "f32", "f32");
    // A fragment's weights are what was trained since its last merge: the rounds of two steps before it, 1:2:5 of 16 samples
    // of 32 tokens each.
    let (one, two) = (vec![64, 128, 320], vec![128, 256, 640]);
    assert_eq!(tokens, [one.clone(), two.clone(), two.clone(), two.clone(), two.clone(), two, one]);
    assert_eq!(train(&place, "again", "f32"), (tokens.clone(), f32_bytes.clone(), f32_hash.clone()));
    let (sparse_tokens, sparse_bytes, sparse_hash) = train(&place, "sparse", "sparse");
    assert_eq!(train(&place, "sparse-again", "sparse").2, sparse_hash);
    assert_eq!(sparse_tokens, tokens);
    assert_ne!(sparse_hash, f32_hash);
    assert!(sparse_bytes.as_u64().unwrap() * 100 < f32_bytes.as_u64().unwrap(), "{sparse_bytes} of {f32_bytes} bytes");
}

#[test]
fn every_codec_keeps_the_sites_identical() {
    let place = Place::new();
    let mut bytes = BTreeMap::new();
    for codec in ["bf16", "int8", "mxfp4", "e3m0", "sparse96"] {
        bytes.insert(train(&place, codec, codec).1.as_u64().unwrap(), codec);
    }
    let low_rank = train(&place, "lowrank", "lowrank").1.as_u64().unwrap();
    assert!(bytes.iter().all(|(bytes, codec)| *codec == "sparse96" || low_rank < bytes / 2), "{low_rank}: {bytes:?}");
    assert_eq!(bytes.into_values().collect::<Vec<_>>(), ["sparse96", "e3m0", "mxfp4", "int8", "bf16"]);
}

#[test]
fn a_quorum_goes_on_without_a_slow_site_which_is_named_and_loses_nothing() {
    let place = Place::new();
    let quorum = ["sync.quorum=0.6", "sync.grace_seconds=0.3", "sync.shares=[1.0, 1.0, 1.0]", "sync.codec=sparse"];
    place.init("run", &[&STREAMING[..], &quorum].concat());
    let coordinator = Coordinator::start(&place, "run", &["--json"]);
    let quick = [SITES[0], SITES[1]].map(|site| coordinator.join(&place, site, &[]));
    // Its two steps of a round take it seconds, where the others and the grace window together take one.
    let slow = coordinator.join(&place, SITES[2], &["--slowdown", "600"]);
    place.wait_for_event("run", "a straggler that computes slowly", |event| match event {
        Event::Straggler { reason, .. } => (reason == "slow compute").then_some(()),
        _ => None,
    });
    let summary = coordinator.process.object();
    for site in quick.into_iter().chain([slow]) {
        assert_eq!(site.object()["state_hash"], summary["state_hash"]);
    }
    assert_eq!((&summary["rounds"], &summary["finished"]), (&7.into(), &true.into()));
    let ledger = assert_ledger_adds_up(&summary["ledger"]);
    assert_eq!((ledger.committed, ledger.returned, ledger.lost), (12 * 8, 0, 0));
    assert_identical_after_every_commit(&place, "run", &SITES);
}
