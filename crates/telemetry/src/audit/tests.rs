//! Each checker is proved by a log of a run that went well, and by one line of it that is wrong.

use super::*;
use crate::event::event_tests::record;
use crate::event::{Contributor, LeaseShare, SampleSpan};
use base::{ContentHash, SiteId, Term};

fn hash(text: &str) -> ContentHash {
    ContentHash::of(text.as_bytes())
}

fn started(resumed: u64) -> Event {
    Event::RunStarted {
        run: "lab".to_owned(),
        strategy: "diloco".to_owned(),
        sites: 2,
        parameters: 1_000,
        tokens_planned: 10_000,
        rounds_planned: 10,
        engine: None,
        resumed_round: (resumed > 0).then_some(Round(resumed)),
    }
}

fn planned(term: u64, round: u64, leases: &[(u32, u64, u64)]) -> Event {
    let lease = |(site, start, end): &(u32, u64, u64)| LeaseShare {
        site: SiteId(*site),
        start: *start,
        end: *end,
        steps: 1,
        samples_per_step: 1,
        samples: end - start,
        ranges: vec![SampleSpan { start: *start, end: *end }],
        share: 0.5,
    };
    Event::RoundStarted { round: Round(round), term: Term(term), leases: leases.iter().map(lease).collect() }
}

fn computed(round: u64, site: u32) -> Event {
    Event::RoundComputed { round: Round(round), site: SiteId(site), tokens: 10, compute_seconds: 1.0, loss_nats: 2.0 }
}

fn closed(term: u64, round: u64, sites: &[u32]) -> Event {
    let contributor = |site: &u32| Contributor { site: SiteId(*site), tokens: 10, weight: 1.0 / sites.len() as f64 };
    let contributors = sites.iter().map(contributor).collect();
    Event::RoundClosed { round: Round(round), term: Term(term), contributors, cursor: 0 }
}

fn applied(site: u32, round: u64, state: &str) -> Event {
    Event::RoundApplied { round: Round(round), site: SiteId(site), state_hash: hash(state) }
}

fn ready(site: u32) -> Event {
    Event::SiteReady { site: SiteId(site), tokens_per_second: 1.0 }
}

fn saved(round: u64) -> Event {
    Event::CheckpointSaved { round: Round(round), path: "c".to_owned(), bytes: 1, seconds: 0.1 }
}

fn ledger(leased: u64, committed: u64, returned: u64) -> Event {
    Event::Ledger { leased, committed, returned, lost: 0 }
}

/// Records one second apart, the first at second `at`.
fn log(name: &str, at: u64, events: Vec<Event>) -> ProcessLog {
    let stamp = |(index, event)| {
        let mut record = record(index as u64, event);
        record.unix_ms = (at + index as u64) * 1_000;
        record
    };
    let records = events.into_iter().enumerate().map(stamp).collect();
    ProcessLog { name: name.to_owned(), records, malformed_lines: 0 }
}

/// A coordinator that was killed after round 1: round 2 is closed by its next process, without site 1 at first.
fn good() -> RunLogs {
    let coordinator = vec![
        started(0),
        planned(1, 1, &[(0, 0, 10), (1, 10, 20)]),
        computed(1, 0),
        computed(1, 1),
        closed(1, 1, &[0, 1]),
        ledger(20, 20, 0),
        planned(1, 2, &[(0, 20, 30), (1, 30, 40)]),
        computed(2, 0),
        started(1),
        planned(2, 2, &[(0, 20, 30), (1, 30, 40)]),
        computed(2, 0),
        Event::Straggler { round: Round(2), site: SiteId(1), reason: "slow link".to_owned(), waited_seconds: 1.0 },
        closed(2, 2, &[0]),
        ledger(60, 30, 20),
        planned(2, 3, &[(0, 40, 50), (1, 50, 60)]),
        computed(3, 0),
        computed(3, 1),
        closed(2, 3, &[0, 1]),
        ledger(80, 60, 20),
    ];
    let site = |site| vec![ready(site), applied(site, 1, "1"), applied(site, 2, "2"), applied(site, 3, "3"), saved(3)];
    RunLogs {
        coordinator: log("coordinator", 0, coordinator),
        sites: vec![log("site-a", 0, site(0)), log("site-b", 0, site(1))],
    }
}

/// What is violated, and only that.
fn violated(logs: &RunLogs, circumstances: &Circumstances) -> Vec<String> {
    let findings = audit(logs, circumstances);
    let each = findings.iter().flat_map(|finding| {
        finding.violations.iter().map(|violation| format!("{}: {violation}", &finding.invariant[..2]))
    });
    each.collect()
}

fn violated_by(change: impl FnOnce(&mut RunLogs)) -> Vec<String> {
    let mut logs = good();
    change(&mut logs);
    violated(&logs, &Circumstances::default())
}

fn replace(log: &mut ProcessLog, index: usize, event: Event) {
    log.records[index].event = event;
}

fn insert(log: &mut ProcessLog, index: usize, event: Event) {
    let record = Record { event, ..log.records[index].clone() };
    log.records.insert(index, record);
}

#[test]
fn a_run_that_went_well_is_held_and_says_how_much_was_compared() {
    let logs = good();
    let findings = audit(&logs, &Circumstances { healed: Some((8_000, 10.0)), ..Circumstances::default() });
    assert!(findings.iter().all(Finding::is_held), "{findings:?}");
    let names: Vec<&str> = findings.iter().map(|finding| finding.invariant).collect();
    let expected =
        ["I1 equal state", "I2 ledger", "I3 one commit", "I4 cost of faults", "I5 heal", "I6 bounded", "I7 resume"];
    assert_eq!(names, expected, "as the simulator has them");
    let checked: Vec<u64> = findings.iter().map(|finding| finding.checked).collect();
    assert_eq!(checked, [3, 60, 9, 0, 1, 4, 2]);
}

#[test]
fn a_state_that_is_another_one_violates_i1() {
    let found = violated_by(|logs| replace(&mut logs.sites[1], 2, applied(1, 2, "another")));
    let (one, other) = (hash("2").short(), hash("another").short());
    assert_eq!(found, [format!("I1: after round 2: site-a {one}, site-b {other}")]);
    // After a rollback a round may be committed again, with another term in its hash.
    let rolled_back = Event::RolledBack { from: Round(2), to: Round(1) };
    let found = violated_by(|logs| {
        replace(&mut logs.sites[1], 2, applied(1, 2, "another"));
        insert(&mut logs.coordinator, 0, rolled_back);
    });
    assert!(found.iter().all(|violation| !violation.starts_with("I1")), "{found:?}");
}

#[test]
fn samples_that_are_committed_twice_violate_i2() {
    let found = violated_by(|logs| replace(&mut logs.coordinator, 14, planned(2, 3, &[(0, 40, 50), (1, 35, 45)])));
    assert_eq!(found, ["I2: samples 40..45 of round 3 were committed in round 3"]);
    let found = violated_by(|logs| replace(&mut logs.coordinator, 14, planned(2, 3, &[(0, 15, 22), (1, 50, 60)])));
    assert_eq!(found, ["I2: samples 20..22 of round 3 were committed in round 2"]);
}

#[test]
fn a_ledger_that_does_not_add_up_violates_i2() {
    let found = violated_by(|logs| replace(&mut logs.coordinator, 18, ledger(79, 60, 20)));
    assert!(found.len() == 1 && found[0].starts_with("I2: the ledger does not add up"), "{found:?}");
    let found = violated_by(|logs| replace(&mut logs.coordinator, 18, ledger(80, 59, 20)));
    assert_eq!(found, ["I2: 60 samples were merged, the ledger has 59"]);
}

#[test]
fn a_contributor_that_had_no_part_or_said_nothing_violates_i2() {
    let found = violated_by(|logs| replace(&mut logs.coordinator, 4, closed(1, 1, &[0, 1, 2])));
    assert_eq!(found, ["I2: site 2 had no part in round 1, and was merged in it"]);
    let found = violated_by(|logs| {
        logs.coordinator.records.remove(3);
    });
    assert_eq!(found, ["I2: site 1 had not reported round 1, and was merged in it"]);
}

#[test]
fn rounds_out_of_order_and_terms_that_fall_violate_i3() {
    let found = violated_by(|logs| insert(&mut logs.coordinator, 13, closed(2, 2, &[])));
    assert_eq!(found, ["I3: round 2 was closed after round 2"]);
    let found = violated_by(|logs| replace(&mut logs.coordinator, 8, started(0)));
    assert_eq!(found[0], "I3: round 1 was closed, and lost when the coordinator died");
    let found = violated_by(|logs| replace(&mut logs.coordinator, 9, planned(1, 2, &[(0, 20, 30), (1, 30, 40)])));
    assert_eq!(found, ["I3: round 2 is of term 1, after term 1"]);
    let found = violated_by(|logs| replace(&mut logs.sites[0], 3, applied(0, 2, "2")));
    assert_eq!(found, ["I3: site-a applied round 2 after round 2"]);
    let found = violated_by(|logs| replace(&mut logs.sites[0], 3, applied(0, 5, "5")));
    assert_eq!(found, ["I3: site-a applied round 5, which was never closed"]);
}

#[test]
fn a_rollback_of_what_somebody_holds_violates_i4() {
    let back = |at| Record { unix_ms: at, ..record(0, Event::RolledBack { from: Round(3), to: Round(1) }) };
    let found = violated_by(|logs| logs.coordinator.records.push(back(2_500)));
    let expected = ["I4: round 3 was rolled back to round 1 while site-a had round 2"];
    assert_eq!(found[..1], expected);
    // Both sites were killed, and had saved nothing after round 1.
    let found = violated_by(|logs| {
        for (index, site) in logs.sites.iter_mut().enumerate() {
            site.records.truncate(2);
            site.records.push(Record { unix_ms: 2_000, ..record(2, saved(1)) });
            site.records.push(Record { unix_ms: 3_000, ..record(3, applied(index as u32, 2, "2")) });
            site.records.push(Record { unix_ms: 4_000, ..record(4, ready(index as u32)) });
        }
        logs.coordinator.records.push(back(5_000));
    });
    assert_eq!(found, Vec::<String>::new());
    // Both are away, and with them what they had.
    let found = violated_by(|logs| {
        for site in [0, 1] {
            let left = Event::SiteLeft { site: SiteId(site), reason: "connection_lost".to_owned() };
            logs.coordinator.records.push(record(0, left));
        }
        logs.coordinator.records.push(back(2_500));
    });
    assert_eq!(found, Vec::<String>::new());
    let dropped = Event::SiteLeft { site: SiteId(1), reason: "misbehaved".to_owned() };
    let found = violated_by(|logs| insert(&mut logs.coordinator, 18, dropped));
    assert_eq!(found, ["I4: site 1 was dropped: misbehaved"]);
}

#[test]
fn a_run_that_does_not_go_on_violates_i5() {
    let logs = good();
    let healed = |at, bound| Circumstances { healed: Some((at, bound)), ..Circumstances::default() };
    assert_eq!(violated(&logs, &healed(13_000, 3.0)), ["I5: 4.0 s from the last fault to a commit, at most 3.0"]);
    assert_eq!(violated(&logs, &healed(18_000, 4.0)), ["I5: no commit after the last fault was mended"]);
}

#[test]
fn a_process_that_ends_by_itself_violates_i6_and_an_unreadable_checkpoint_i7() {
    let logs = good();
    let circumstances = Circumstances {
        ended_badly: vec!["site-a ended".to_owned()],
        checkpoints_unreadable: vec!["torn".to_owned()],
        ..Circumstances::default()
    };
    assert_eq!(violated(&logs, &circumstances), ["I6: site-a ended", "I7: torn"]);
    let found = violated_by(|logs| logs.sites[1].malformed_lines = 2);
    assert_eq!(found, ["I6: the log of site-b has 2 lines that are no records"]);
    let skipped = Event::CheckpointSkipped { path: "c".to_owned(), reason: "cut".to_owned() };
    let found = violated_by(|logs| insert(&mut logs.sites[0], 0, skipped));
    assert_eq!(found, ["I7: site-a: checkpoint c was unreadable: cut"]);
}
