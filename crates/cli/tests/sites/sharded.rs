//! Sharded rounds: the same bits as a mesh for fewer bytes, and a round whose reducer is gone goes on in the mesh.

use crate::support::{Coordinator, Place, assert_identical_after_every_commit, assert_ledger_adds_up};
use serde_json::Value;
use telemetry::Event;

const SITES: [&str; 3] = ["site-a", "site-b", "site-c"];

const STREAMING: [&str; 4] = ["sync.strategy=streaming", "sync.fragments=2", "sync.overlap_steps=3", "sync.codec=int8"];

/// Trains three unequal sites; gives the final hash and the bytes that they fetched of rounds.
fn train(place: &Place, kind: &str, exchange: &str, settings: &[&str]) -> (Value, u64) {
    let run = format!("{kind}-{exchange}");
    let exchange_setting = format!("sync.exchange={exchange}");
    let fixed = ["run.name=run", "sync.sites=3", "sync.shares=[1.0, 2.0, 5.0]", "train.steps=12", &exchange_setting];
    place.init(&run, &[&fixed[..], settings].concat());
    let folders = SITES.map(|site| format!("{run}-{site}"));
    let names: Vec<&str> = folders.iter().map(String::as_str).collect();
    let coordinator = Coordinator::start(place, &run, &["--json"]);
    let sites = coordinator.join_all(place, &names);
    let summary = coordinator.process.object();
    for site in sites {
        assert_eq!(site.object()["state_hash"], summary["state_hash"], "{run}");
    }
    assert_identical_after_every_commit(place, &run, &names);
    assert_eq!(exchanges(place, &run), [(exchange.to_owned(), "as configured".to_owned())], "{run}");
    let bytes = |record: telemetry::Record| match record.event {
        Event::DeltaFetched { bytes, .. } => Some(bytes),
        _ => None,
    };
    (summary["state_hash"].clone(), place.events(&run).into_iter().filter_map(bytes).sum())
}

/// How deltas travelled, and why, as the coordinator logged it.
fn exchanges(place: &Place, run: &str) -> Vec<(String, String)> {
    let chosen = place.events(run).into_iter().filter_map(|record| match record.event {
        Event::ExchangeChosen { exchange, reason, .. } => Some((exchange, reason)),
        _ => None,
    });
    chosen.collect()
}

#[test]
fn a_sharded_run_has_the_bits_of_a_mesh_for_two_thirds_of_its_bytes() {
    let place = Place::new();
    let (mesh, mesh_bytes) = train(&place, "f32", "mesh", &[]);
    let (sharded, sharded_bytes) = train(&place, "f32", "sharded", &[]);
    assert_eq!(mesh, sharded);
    // (S - 1)/S (b + 32) of (S - 1) b bits a value, with S = 3 and b = 32.
    assert_eq!(sharded_bytes * 3, mesh_bytes * 2);
}

#[test]
fn overlapped_coded_and_joint_rounds_have_the_bits_of_a_mesh() {
    let place = Place::new();
    let synchronous = ["sync.strategy=synchronous", "sync.codec=bf16"];
    for (kind, settings) in [("streaming", &STREAMING[..]), ("synchronous", &synchronous)] {
        assert_eq!(train(&place, kind, "mesh", settings).0, train(&place, kind, "sharded", settings).0, "{kind}");
    }
}

#[test]
fn a_round_whose_reducer_is_killed_goes_on_in_the_mesh_and_the_next_is_sharded() {
    let place = Place::new();
    let long_rounds = ["sync.sites=3", "sync.shares=[1.0, 1.0, 2.0]", "sync.inner_steps=20", "train.steps=80"];
    place.init("run", &[&long_rounds[..], &["sync.exchange=sharded"]].concat());
    let coordinator = Coordinator::start(&place, "run", &["--json"]);
    let quick = [SITES[0], SITES[1]].map(|site| coordinator.join(&place, site, &[]));
    // The others wait for it in the middle of its round.
    let slow = coordinator.join(&place, SITES[2], &["--slowdown", "20"]);
    place.wait_for_step(SITES[2], 2);
    slow.kill();
    let summary = coordinator.process.object();
    assert_eq!((&summary["finished"], &summary["rounds"]), (&true.into(), &4.into()));
    for site in quick {
        assert_eq!(site.object()["state_hash"], summary["state_hash"]);
    }
    let as_configured = || ("sharded".to_owned(), "as configured".to_owned());
    let id_of_slow = place.wait_for_event("run", "the slow site", |event| match event {
        Event::SiteJoined { site, name, .. } if name == SITES[2] => Some(*site),
        _ => None,
    });
    let fell_back = ("mesh".to_owned(), format!("site {id_of_slow} left"));
    assert_eq!(exchanges(&place, "run"), [as_configured(), fell_back, as_configured()]);
    let ledger = assert_ledger_adds_up(&summary["ledger"]);
    assert_eq!((ledger.returned > 0, ledger.lost), (true, 0), "{ledger:?}");
    assert_identical_after_every_commit(&place, "run", &SITES);
}
