//! Processes that are asked to leave while they are busy, stopped for a while, or killed all at once.

use crate::support::{
    Coordinator, Place, assert_identical_after_every_commit, assert_invariants, assert_ledger_adds_up, figure, hashes,
};
use std::time::Instant;
use telemetry::Event;

const SITES: [&str; 2] = ["site-a", "site-b"];

/// A step takes so many times as long: some seconds, which no signal cuts short.
const BUSY: [&str; 2] = ["--slowdown", "500"];

fn last_commit(place: &Place) -> u64 {
    *hashes(&place.events("run")).last_key_value().unwrap().0
}

/// Waits until the coordinator has closed a round after `round` with deltas of so many sites.
fn wait_for_joint_commit(place: &Place, after: u64, sites: usize) -> u64 {
    place.wait_for_event("run", &format!("a commit of {sites} sites after round {after}"), |event| match event {
        Event::RoundClosed { round, contributors, .. } if round.0 > after && contributors.len() == sites => {
            Some(round.0)
        }
        _ => None,
    })
}

#[test]
fn a_site_whose_engine_is_busy_leaves_all_the_same_and_comes_back() {
    let place = Place::new();
    place.init("run", &["sync.sites=1", "train.steps=12"]);
    let coordinator = Coordinator::start(&place, "run", &["--json"]);
    let busy = coordinator.join(&place, SITES[0], &[&BUSY[..], &["--leave-seconds", "0"]].concat());
    place.wait_for_step(SITES[0], 1);
    busy.terminate();
    let ended = busy.end();
    assert_eq!(
        ended.failure(),
        "error: asked to stop, and not done with saving after 0 s: it leaves with its last checkpoint\n\
         hint: run the same `beringia join` again: it goes on from its last checkpoint, and fetches what is newer\n"
    );
    let back = coordinator.join(&place, SITES[0], &[]);
    let summary = coordinator.process.object();
    assert_eq!((&summary["finished"], &summary["rounds"]), (&true.into(), &3.into()));
    assert_eq!(back.object()["state_hash"], summary["state_hash"]);
    let ledger = assert_ledger_adds_up(&summary["ledger"]);
    assert!(ledger.returned > 0, "{ledger:?}");
    assert_identical_after_every_commit(&place, "run", &SITES[..1]);
}

#[test]
fn a_site_that_is_asked_to_leave_before_it_is_ready_is_gone_at_once() {
    let place = Place::new();
    place.init("run", &["sync.sites=1"]);
    // A port that takes connections and says nothing: the site waits for a handshake.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = silent.local_addr().unwrap().to_string();
    let secret = wire::Secret::generate().unwrap();
    let invite = wire::Invite::new(&address, "run", base::ContentHash::of(b"nobody"), secret).unwrap();
    let site = crate::support::join(&place, &invite.to_string(), SITES[0], &[]);
    let _held = silent.accept().unwrap();
    site.terminate();
    let ended = site.end();
    let expected =
        "error: asked to stop before it was ready\nhint: run the same `beringia join` again: nothing was changed\n";
    // Before its handler is there the signal ends the process as it ends any other.
    assert!(ended.code.is_none() || ended.failure() == expected, "{ended:?}");
}

#[test]
fn a_coordinator_that_is_asked_to_leave_in_mid_round_leaves_and_the_run_goes_on() {
    let place = Place::new();
    place.init("run", &["sync.sites=2", "train.steps=200000"]);
    let coordinator = Coordinator::start(&place, "run", &["--json", "--leave-seconds", "0"]);
    let address = coordinator.address();
    let sites = [coordinator.join(&place, SITES[0], &[]), coordinator.join(&place, SITES[1], &["--slowdown", "50"])];
    place.wait_for_commit("run", 2);
    coordinator.process.terminate();
    let left = coordinator.process.object();
    assert_eq!((&left["finished"], &left["left_in_mid_round"]), (&false.into(), &true.into()));
    let round = last_commit(&place);
    let coordinator = Coordinator::start(&place, "run", &["--json", "--listen", &address]);
    place.wait_for_commit("run", round + 2);
    coordinator.process.terminate();
    let summary = coordinator.process.object();
    for site in sites {
        assert_eq!(site.object()["state_hash"], summary["state_hash"], "the processes of the beginning end the run");
    }
    assert_ledger_adds_up(&summary["ledger"]);
    assert_identical_after_every_commit(&place, "run", &SITES);
}

/// Its connection stays open and is silent, as one is whose other end has vanished without a word.
#[test]
fn a_site_that_is_stopped_is_missed_after_its_silence_and_takes_part_again_when_it_goes_on() {
    let place = Place::new();
    place.init("run", &["sync.sites=2", "train.steps=200000"]);
    let coordinator = Coordinator::start(&place, "run", &["--json"]);
    let sites = coordinator.join_all(&place, &SITES);
    wait_for_joint_commit(&place, 2, 2);
    let began = Instant::now();
    sites[1].signal("STOP");
    place.wait_for_event("run", "the departure of a silent site", |event| match event {
        Event::SiteLeft { reason, .. } if reason == "connection_lost" => Some(()),
        _ => None,
    });
    let missed = began.elapsed().as_secs_f64();
    let alone = wait_for_joint_commit(&place, last_commit(&place), 1);
    let went_on = Instant::now();
    sites[1].signal("CONT");
    wait_for_joint_commit(&place, alone, 2);
    let text = format!(
        "missed after {missed:.1} s, when the others went on; a commit with all sites {:.1} s after it went on",
        went_on.elapsed().as_secs_f64()
    );
    figure("stopped-site", &text);
    coordinator.process.terminate();
    let summary = coordinator.process.object();
    for site in sites {
        assert_eq!(site.object()["state_hash"], summary["state_hash"]);
    }
    assert_identical_after_every_commit(&place, "run", &SITES);
}

#[test]
fn a_run_whose_processes_are_all_killed_goes_on_from_what_is_on_disk() {
    let place = Place::new();
    place.init("run", &["sync.sites=2", "train.steps=200000", "checkpoint.every_rounds=3"]);
    let coordinator = Coordinator::start(&place, "run", &["--json"]);
    let address = coordinator.address();
    let sites = coordinator.join_all(&place, &SITES);
    place.wait_for_commit("run", 7);
    coordinator.process.kill();
    sites.into_iter().for_each(crate::support::Process::kill);
    let before = last_commit(&place);
    let coordinator = Coordinator::start(&place, "run", &["--json", "--listen", &address]);
    let sites = coordinator.join_all(&place, &SITES);
    let resumed = place.wait_for_event("run", "the round after the last checkpoint", |event| match event {
        Event::RoundStarted { round, term, .. } if term.0 > 1 => Some(round.0),
        _ => None,
    });
    assert!(resumed > 3, "what was saved is not done again: round {resumed} of {before}");
    wait_for_joint_commit(&place, before, 2);
    coordinator.process.terminate();
    let summary = coordinator.process.object();
    for site in sites {
        assert_eq!(site.object()["state_hash"], summary["state_hash"]);
    }
    assert_ledger_adds_up(&summary["ledger"]);
    assert_invariants(&place, "run", &SITES);
    figure("all-killed", &format!("killed after round {before}, gone on with at round {resumed}"));
}
