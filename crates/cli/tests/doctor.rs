//! `beringia doctor` and `beringia devices` as a user starts them: alone, against a coordinator at work, and against what
//! else may stand at an invite's address.

#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a test's helper may panic, and shows the logs of what failed"
)]

#[path = "support/mod.rs"]
#[allow(dead_code, reason = "shared with the tests of several sites")]
mod support;

use base::ContentHash;
use serde_json::Value;
use std::io::{Read, Write};
use std::net::TcpListener;
use support::{Coordinator, Ended, Place};
use telemetry::Event;
use wire::limits::PROBES_MAX;
use wire::probe::Prober;
use wire::{Identity, Invite, Secret};

/// No machine has this interpreter: keeps PyTorch, which takes seconds to start, out of what is not about it.
const NO_PYTHON: &str = "no-such-python";

fn doctor(place: &Place, arguments: &[&str]) -> Ended {
    place.ended(&[&["doctor", "--json", "--python", NO_PYTHON], arguments].concat())
}

fn check<'a>(report: &'a Value, name: &str) -> &'a Value {
    let mut found = report["checks"].as_array().unwrap().iter().filter(|check| check["name"] == name);
    let check = found.next().unwrap_or_else(|| panic!("no check {name}: {report}"));
    assert!(found.next().is_none(), "two checks {name}: {report}");
    check
}

fn number(check: &Value, field: &str) -> f64 {
    check[field].as_f64().unwrap_or_else(|| panic!("{field} of {check}"))
}

/// The rows of a kind, each within its bound.
fn rows_within(report: &Value, kind: &str) -> usize {
    let rows = report["numerics"]["rows"].as_array().unwrap();
    let rows: Vec<&Value> = rows.iter().filter(|row| row["kind"] == kind).collect();
    for row in &rows {
        assert!(row["ok"] == true && number(row, "distance") <= number(row, "bound"), "{row}");
    }
    rows.len()
}

/// Checks before `name` are well, `name` failed with that text and hint, and so did the command.
fn assert_failed(ended: &Ended, name: &str, fact: &str, hint: &str) {
    let report = ended.object();
    assert_eq!((ended.code, &report["ok"]), (Some(1), &Value::Bool(false)), "{ended:?}");
    let failed = check(&report, name);
    assert_eq!(failed["status"], "failed", "{failed}");
    assert!(failed["fact"].as_str().unwrap().contains(fact), "{failed}");
    assert!(failed["hint"].as_str().unwrap().contains(hint), "{failed}");
    for earlier in ["reachable", "identity", "admitted", "version"].into_iter().take_while(|earlier| *earlier != name) {
        assert_eq!(check(&report, earlier)["status"], "ok");
    }
    assert_eq!(rows_within(&report, "operation"), 30, "the own numbers are looked at all the same");
}

#[test]
fn a_machine_alone() {
    let place = Place::new();
    let ended = doctor(&place, &[]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert_eq!(ended.stdout.lines().count(), 1, "{ended:?}");
    let report = ended.object();
    assert_eq!(report["ok"], true);
    for name in ["devices", "memory", "disk", "clock", "address", "operations"] {
        let check = check(&report, name);
        assert!(check["status"] == "ok" || check["hint"].is_string(), "{check}");
    }
    assert!(number(check(&report, "memory"), "available_bytes") > 0.0);
    assert!(number(check(&report, "disk"), "free_bytes") > 0.0 && number(check(&report, "disk"), "sync_seconds") > 0.0);
    assert!(check(&report, "address")["cards"].as_array().unwrap().iter().any(|card| card["name"] == "lo"), "{report}");
    assert_eq!(report["devices"][0]["info"]["engine"], "flex");
    assert_eq!(report["numerics"]["reference"]["engine"], "definition");
    assert_eq!((rows_within(&report, "operation"), rows_within(&report, "training_step")), (30, 0));
    let loopback = doctor(&place, &["--advertise", "127.0.0.1"]).object();
    assert_eq!(check(&loopback, "address")["status"], "warning");
    assert_eq!(check(&loopback, "address")["card"]["name"], "lo");
    let text = place.ended(&["doctor", "--python", NO_PYTHON]);
    assert!(text.code == Some(0) && text.stdout.contains("\nmatmul ") && text.stdout.contains("\nok "), "{text:?}");
}

#[test]
fn an_engine_that_is_not_there_fails() {
    let place = Place::new();
    let ended = doctor(&place, &["--engine", "warp"]);
    let report = ended.object();
    assert_eq!((ended.code, &report["ok"]), (Some(1), &Value::Bool(false)), "{ended:?}");
    assert!(check(&report, "engine")["fact"].as_str().unwrap().contains("there is no engine 'warp'"), "{report}");
    assert_eq!(report["numerics"], Value::Null);
}

#[test]
fn a_pair_is_examined_and_its_run_goes_on() {
    let place = Place::new();
    place.init("run", &["train.steps=1000000"]);
    let coordinator = Coordinator::start(&place, "run", &["--sites", "1"]);
    let site = coordinator.join(&place, "site-a", &[]);
    place.wait_for_commit("run", 1);
    let ended = doctor(&place, &[&coordinator.invite]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let report = ended.object();
    assert_eq!(report["ok"], true);
    for name in ["reachable", "identity", "admitted", "version", "route", "round_trip", "operations", "training_step"] {
        assert_eq!(check(&report, name)["status"], "ok", "{report}");
    }
    assert_eq!(check(&report, "route")["card"]["name"], "lo");
    assert_eq!(check(&report, "version")["there"], env!("CARGO_PKG_VERSION"));
    let round_trip = check(&report, "round_trip");
    assert!(number(round_trip, "min_seconds") > 0.0);
    assert!(number(round_trip, "median_seconds") <= number(round_trip, "max_seconds"));
    for name in ["bandwidth_from", "bandwidth_to"] {
        let bandwidth = check(&report, name);
        assert!(number(bandwidth, "bits_per_second") > 0.0 && bandwidth["streams"] == 4, "{bandwidth}");
    }
    assert_eq!(report["numerics"]["reference"]["engine"], "flex");
    assert_eq!((rows_within(&report, "operation"), rows_within(&report, "training_step")), (30, 3));
    let rounds = |place: &Place| {
        let committed = |event: &Event| match event {
            Event::RoundCommitted { round, .. } => Some(round.0),
            _ => None,
        };
        place.events("run").iter().filter_map(|record| committed(&record.event)).max().unwrap()
    };
    // Two more commits: one was under way when the probe ended.
    place.wait_for_commit("run", rounds(&place) + 2);
    for record in place.events("run") {
        let disturbed = matches!(
            record.event,
            Event::SiteLeft { .. } | Event::PeerRefused { .. } | Event::Warning { .. } | Event::Diverged { .. }
        );
        assert!(!disturbed, "{record:?}");
    }
    let joined = place.events("run").iter().filter(|record| matches!(record.event, Event::SiteJoined { .. })).count();
    assert_eq!(joined, 1, "a probe becomes no site");
    site.terminate();
    site.end();
    coordinator.process.terminate();
    coordinator.process.end();
}

#[test]
fn who_is_not_invited_is_told_nothing() {
    let place = Place::new();
    place.init("run", &[]);
    let coordinator = Coordinator::start(&place, "run", &[]);
    let real: Invite = coordinator.invite.parse().unwrap();
    let with = |run: &str, secret: Secret| Invite::new(real.address(), run, real.fingerprint(), secret).unwrap();
    let wrong = with("run", Secret::generate().unwrap()).to_string();
    assert_failed(&doctor(&place, &[&wrong]), "admitted", "the invite is not valid any more", "beringia admit");
    let other = with("other", real.secret().clone()).to_string();
    assert_failed(&doctor(&place, &[&other]), "admitted", "this is run 'run', not 'other'", "beringia admit");
    let refused = place.wait_for_event("run", "a refusal", |event| match event {
        Event::PeerRefused { reason, .. } => Some(reason.clone()),
        _ => None,
    });
    assert_eq!(refused, "the invite is not valid any more");
    let imposter = Invite::new(real.address(), "run", ContentHash::of(b"another"), real.secret().clone()).unwrap();
    let ended = doctor(&place, &[&imposter.to_string()]);
    assert_failed(&ended, "identity", "is not who it should be", "ask for a new invite");
}

#[test]
fn more_probes_than_a_coordinator_answers_are_asked_to_wait() {
    let place = Place::new();
    place.init("run", &[]);
    let coordinator = Coordinator::start(&place, "run", &[]);
    let invite: Invite = coordinator.invite.parse().unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let mut held = Vec::new();
    for _ in 0..PROBES_MAX {
        let prober = Prober::new(Identity::generate().unwrap(), invite.clone(), "test");
        held.push(runtime.block_on(prober.connect()).unwrap());
    }
    let ended = doctor(&place, &[&coordinator.invite]);
    assert_failed(&ended, "admitted", "2 probes are being answered already", "try again");
    for asked in held {
        runtime.block_on(asked.close()).unwrap();
    }
    let ended = doctor(&place, &[&coordinator.invite]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
}

#[test]
fn nobody_and_other_programs_are_told_apart() {
    let place = Place::new();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let invite = Invite::new(&address, "run", ContentHash::of(b"nobody"), Secret::generate().unwrap()).unwrap();
    let other_program = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n").unwrap();
        let _left = stream.read(&mut [0; 64]);
    });
    let ended = doctor(&place, &[&invite.to_string()]);
    assert_failed(&ended, "identity", "does not speak the protocol of beringia", "check the host and port");
    other_program.join().unwrap();
    // The listener is gone with its thread.
    let ended = doctor(&place, &[&invite.to_string()]);
    assert_failed(&ended, "reachable", "Connection refused", "--advertise HOST");
    let typo = place.ended(&["doctor", "beringia1-oops"]);
    assert!(typo.failure().contains("the invite's checksum does not fit"), "{typo:?}");
}

#[test]
fn devices_are_listed_with_what_is_missing() {
    let place = Place::new();
    let inventory = place.object(&["devices", "--python", NO_PYTHON]);
    let flex = &inventory["devices"][0];
    assert_eq!(flex["info"]["engine"], "flex");
    assert!(!flex["info"]["name"].as_str().unwrap().is_empty());
    for rate in ["matrix_f32_tflops", "copy_gigabytes_per_second"] {
        assert!(number(&flex["rates"], rate) > 0.0, "{flex}");
    }
    let torch =
        inventory["left_out"].as_array().unwrap().iter().find(|left_out| left_out["engine"] == "torch").unwrap();
    assert!(torch["reason"].as_str().unwrap().contains(NO_PYTHON), "{torch}");
    assert!(torch["hint"].as_str().is_some_and(|hint| !hint.is_empty()), "{torch}");
    let table = place.ended(&["devices", "--no-measure", "--python", NO_PYTHON]);
    assert!(table.code == Some(0) && table.stdout.starts_with("engine "), "{table:?}");
    assert!(table.stdout.contains("\nflex ") && table.stdout.contains("not here: torch: "), "{table:?}");
}
