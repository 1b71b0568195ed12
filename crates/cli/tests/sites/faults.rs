//! Sites and coordinators that go away, and strangers at the door: the run goes on, identical, and its ledger adds up.

use crate::support::{
    Coordinator, Place, Process, assert_identical_after_every_commit, assert_ledger_adds_up, hashes, join,
};
use std::io::Write;
use std::net::TcpStream;
use telemetry::Event;

const SITES: [&str; 3] = ["site-a", "site-b", "site-c"];

/// Rounds of 20 steps, which a site slowed down by [`SLOW`] does not finish before a signal reaches it.
const LONG_ROUNDS: [&str; 3] = ["sync.sites=3", "sync.shares=[1.0, 1.0, 2.0]", "sync.inner_steps=20"];
const SLOW: [&str; 2] = ["--slowdown", "20"];

/// A run of three sites, the last of them in the middle of round 2.
fn in_round_two(place: &Place, steps: &str) -> (Coordinator, [Process; 2], Process) {
    place.init("run", &[&LONG_ROUNDS[..], &[steps]].concat());
    let coordinator = Coordinator::start(place, "run", &["--json"]);
    let quick = [SITES[0], SITES[1]].map(|site| coordinator.join(place, site, &[]));
    let slow = coordinator.join(place, SITES[2], &SLOW);
    place.wait_for_step(SITES[2], 2);
    (coordinator, quick, slow)
}

#[test]
fn a_site_that_leaves_in_mid_round_gives_its_lease_back_and_may_return() {
    let place = Place::new();
    let (coordinator, quick, slow) = in_round_two(&place, "train.steps=200000");
    slow.terminate();
    let left = slow.object();
    assert_eq!((&left["finished"], &left["round"]), (&false.into(), &1.into()));
    place.wait_for_commit("run", 3);
    let back = coordinator.join(&place, SITES[2], &[]);
    let returned_in = place.wait_for_event(SITES[2], "a round after its return", |event| match event {
        Event::RoundApplied { round, .. } if round.0 > 1 => Some(round.0),
        _ => None,
    });
    assert!(returned_in > 3, "it took the state of round 3 or later from the others: applied {returned_in}");
    coordinator.process.terminate();
    let summary = coordinator.process.object();
    for site in quick.into_iter().chain([back]) {
        assert_eq!(site.object()["state_hash"], summary["state_hash"]);
    }
    let ledger = assert_ledger_adds_up(&summary["ledger"]);
    assert_eq!((ledger.returned > 0, ledger.lost), (true, 0), "{ledger:?}");
    assert_identical_after_every_commit(&place, "run", &SITES);
}

#[test]
fn a_site_that_is_killed_in_mid_round_does_not_stop_the_others() {
    let place = Place::new();
    let (coordinator, quick, slow) = in_round_two(&place, "train.steps=60");
    slow.kill();
    let summary = coordinator.process.object();
    assert_eq!((&summary["finished"], &summary["rounds"]), (&true.into(), &3.into()));
    for site in quick {
        assert_eq!(site.object()["state_hash"], summary["state_hash"]);
    }
    let ledger = assert_ledger_adds_up(&summary["ledger"]);
    assert!(ledger.returned > 0, "{ledger:?}");
    assert_identical_after_every_commit(&place, "run", &SITES);
    let left = place.events("run").into_iter().find_map(|record| match record.event {
        Event::SiteLeft { reason, .. } => Some(reason),
        _ => None,
    });
    assert_eq!(left.unwrap(), "connection_lost");
}

#[test]
fn a_coordinator_that_is_killed_and_started_again_is_found_by_its_sites() {
    let place = Place::new();
    place.init("run", &["sync.sites=2", "train.steps=200000"]);
    let coordinator = Coordinator::start(&place, "run", &["--json"]);
    let address = coordinator.address();
    let sites = coordinator.join_all(&place, &SITES[..2]);
    let mut coordinator = coordinator.process;
    let mut round = 0;
    for _ in 0..3 {
        place.wait_for_commit("run", round + 3);
        coordinator.kill();
        round = *hashes(&place.events("run")).last_key_value().unwrap().0;
        coordinator = Coordinator::start(&place, "run", &["--json", "--listen", &address]).process;
    }
    place.wait_for_commit("run", round + 3);
    coordinator.terminate();
    let summary = coordinator.object();
    for site in sites {
        assert_eq!(site.object()["state_hash"], summary["state_hash"], "the processes of the beginning end the run");
    }
    assert_ledger_adds_up(&summary["ledger"]);
    assert_identical_after_every_commit(&place, "run", &SITES[..2]);
}

#[test]
fn sites_that_do_not_wait_for_a_coordinator_save_and_come_back_by_their_keys() {
    let place = Place::new();
    place.init("run", &["sync.sites=2", "train.steps=200000"]);
    let coordinator = Coordinator::start(&place, "run", &["--json"]);
    let (address, invite) = (coordinator.address(), coordinator.invite.clone());
    let sites = [SITES[0], SITES[1]].map(|site| coordinator.join(&place, site, &["--coordinator-wait", "0"]));
    place.wait_for_commit("run", 3);
    coordinator.process.kill();
    for site in sites {
        let ended = site.end();
        let failure = ended.failure();
        assert!(failure.starts_with(&format!("error: the coordinator at {address}: ")), "{failure}");
        let hint = "hint: see that `beringia serve` still runs there, then join again\n";
        assert!(failure.ends_with(hint), "{failure}");
    }
    for site in &SITES[..2] {
        assert!(newest_checkpoint(&place, site) >= 3, "{site} saved what it held");
    }
    let rounds_before = *hashes(&place.events("run")).last_key_value().unwrap().0;
    let coordinator = Coordinator::start(&place, "run", &["--json", "--listen", &address]);
    // Machines that were admitted are known by their keys: the old invite still leads them back.
    let sites = [SITES[0], SITES[1]].map(|site| join(&place, &invite, site, &[]));
    place.wait_for_commit("run", rounds_before + 3);
    coordinator.process.terminate();
    let summary = coordinator.process.object();
    for site in sites {
        assert_eq!(site.object()["state_hash"], summary["state_hash"]);
    }
    assert_ledger_adds_up(&summary["ledger"]);
    assert_identical_after_every_commit(&place, "run", &SITES[..2]);
}

fn newest_checkpoint(place: &Place, site: &str) -> u64 {
    checkpoint::list(&place.join(site).join("checkpoints")).unwrap().iter().map(|entry| entry.round.0).max().unwrap()
}

#[test]
fn who_was_not_admitted_is_served_nothing() {
    let place = Place::new();
    place.init("run", &[]);
    let coordinator = Coordinator::start(&place, "run", &[]);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (invite, traffic) = (coordinator.invite.parse::<wire::Invite>().unwrap(), wire::Traffic::new());
    let identity = wire::Identity::generate().unwrap();
    for (purpose, why) in [
        (wire::Purpose::Blob, "it was not admitted to this run"),
        (wire::Purpose::Control, "no greeting: the peer sent nothing for 10s"),
    ] {
        // Held open: it is the coordinator that ends it.
        let _connection = runtime
            .block_on(wire::connect(&identity, &traffic, invite.address(), invite.fingerprint(), purpose))
            .unwrap();
        place.wait_for_event("run", why, |event| match event {
            Event::PeerRefused { reason, .. } if reason == why => Some(()),
            _ => None,
        });
    }
}

/// What a stranger may say: nothing, noise, a request of another protocol, a TLS record that announces more than
/// TLS allows, and one that announces much and stops.
const STRANGERS: [&[u8]; 5] = [
    b"",
    &[0xa5; 3000],
    b"GET / HTTP/1.1\r\n\r\n",
    &[0x16, 3, 3, 0xff, 0xff, 1, 0xff, 0xff],
    &[0x16, 3, 1, 0x3f, 0xff, 1],
];

/// Connections of each kind: more than may be in their handshake at once.
const STRANGERS_EACH: usize = 80;

/// The worst that strangers can hold, by `wire::limits`: 256 handshakes of 256 KiB.
const STRANGERS_BYTES_MAX: u64 = 64 << 20;

/// Connections on which `each` strangers of every kind have said their words, and wait.
fn strangers(address: &str, each: usize) -> Vec<TcpStream> {
    let connect = |words: &&[u8]| {
        let mut connection = TcpStream::connect(address).unwrap();
        // It may have been turned away before it has finished.
        let _refused = connection.write_all(words);
        connection
    };
    STRANGERS.iter().cycle().take(STRANGERS.len() * each).map(connect).collect()
}

#[test]
fn strangers_neither_stop_a_run_nor_take_its_memory() {
    let place = Place::new();
    place.init("run", &["sync.sites=2", "train.steps=200000"]);
    let coordinator = Coordinator::start(&place, "run", &["--json"]);
    let sites = coordinator.join_all(&place, &SITES[..2]);
    place.wait_for_commit("run", 1);
    let site_address = place.wait_for_event("run", "a site's address", |event| match event {
        Event::SiteJoined { name, address, .. } if name == SITES[0] => Some(address.clone()),
        _ => None,
    });
    let before = [&coordinator.process, &sites[0]].map(Process::memory_bytes_max);
    let addresses = [coordinator.address(), site_address];
    let mut connections = Vec::new();
    // First one of each kind, because a flood of refusals is not logged in full.
    connections.extend(addresses.iter().flat_map(|address| strangers(address, 1)));
    for log in ["run", SITES[0]] {
        for why in ["the peer does not speak the protocol of beringia", "the handshake was not complete after 10s"] {
            place.wait_for_event(log, why, |event| match event {
                Event::PeerRefused { reason, .. } if reason == why => Some(()),
                _ => None,
            });
        }
    }
    connections.extend(addresses.iter().flat_map(|address| strangers(address, STRANGERS_EACH)));
    let round = *hashes(&place.events("run")).last_key_value().unwrap().0;
    place.wait_for_commit("run", round + 2);
    for (process, before) in [&coordinator.process, &sites[0]].into_iter().zip(before) {
        let grown = process.memory_bytes_max() - before;
        assert!(grown < STRANGERS_BYTES_MAX, "{grown} bytes more");
    }
    coordinator.process.terminate();
    let summary = coordinator.process.object();
    for site in sites {
        assert_eq!(site.object()["state_hash"], summary["state_hash"]);
    }
    assert_identical_after_every_commit(&place, "run", &SITES[..2]);
}
