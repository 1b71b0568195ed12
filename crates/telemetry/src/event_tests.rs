//! Tests of `event`: every event there is, in and out of a line, and against its documentation.

use super::*;

fn hash(text: &str) -> ContentHash {
    ContentHash::of(text.as_bytes())
}

/// One of each event, with every field set. The match makes a new event a compile error here until it is added.
pub(crate) fn one_of_each() -> Vec<Event> {
    let complete = |event: &Event| match event {
        Event::RunStarted { .. }
        | Event::SiteJoined { .. }
        | Event::SiteReady { .. }
        | Event::SiteLeft { .. }
        | Event::RoundStarted { .. }
        | Event::Step { .. }
        | Event::RoundComputed { .. }
        | Event::DeltaFetched { .. }
        | Event::DeltaRefused { .. }
        | Event::DeltaClipped { .. }
        | Event::RouteChosen { .. }
        | Event::ExchangeChosen { .. }
        | Event::RoundCommitted { .. }
        | Event::RoundApplied { .. }
        | Event::Diverged { .. }
        | Event::Evaluated { .. }
        | Event::Sample { .. }
        | Event::CheckpointSaved { .. }
        | Event::CheckpointSkipped { .. }
        | Event::Ledger { .. }
        | Event::Straggler { .. }
        | Event::SharesChanged { .. }
        | Event::SettingsChanged { .. }
        | Event::PeerRefused { .. }
        | Event::Warning { .. }
        | Event::SiteDevice { .. }
        | Event::MicroBatchReduced { .. }
        | Event::EngineRestarted { .. }
        | Event::EngineHung { .. }
        | Event::RoundClosed { .. }
        | Event::RoundAbandoned { .. }
        | Event::RolledBack { .. }
        | Event::StepRecomputed { .. }
        | Event::StepMismatch { .. }
        | Event::RunFinished { .. } => 35,
    };
    let (site, round, term) = (SiteId(2), Round(3), Term(1));
    let events = vec![
        Event::RunStarted {
            run: "tiny".to_owned(),
            strategy: "diloco".to_owned(),
            sites: 3,
            parameters: 1_000_000,
            tokens_planned: 2_000_000,
            rounds_planned: 50,
            engine: Some("flex".to_owned()),
            resumed_round: Some(Round(2)),
        },
        Event::SiteJoined {
            site,
            name: "site-c".to_owned(),
            address: "127.0.0.1:7000".to_owned(),
            engine: "flex".to_owned(),
            threads: 2,
            slowdown: 1.5,
        },
        Event::SiteDevice {
            site,
            engine: "torch:npu:0".to_owned(),
            name: "Ascend 910B".to_owned(),
            maker: "Huawei".to_owned(),
            driver: "CANN 8.1".to_owned(),
            memory_bytes: Some(64 << 30),
            precision: "bf16".to_owned(),
        },
        Event::SiteReady { site, tokens_per_second: 1_234.5 },
        Event::RoundStarted {
            round,
            term,
            leases: vec![LeaseShare {
                site,
                start: 10,
                end: 50,
                steps: 20,
                samples_per_step: 2,
                samples: 40,
                ranges: vec![SampleSpan { start: 10, end: 50 }],
                share: 0.25,
            }],
        },
        Event::Step {
            site,
            round,
            step: 41,
            loss_nats: 2.5,
            learning_rate: 1e-3,
            gradient_norm: 0.7,
            tokens: 512,
            seconds: 0.4,
        },
        Event::RoundComputed { round, site, tokens: 10_240, compute_seconds: 8.0, loss_nats: 2.4 },
        Event::DeltaFetched { round, from_site: site, bytes: 4_000_000, seconds: 0.1 },
        Event::DeltaRefused { round, from_site: site, reason: "f32: not a number".to_owned() },
        Event::DeltaClipped { round, site, norm: 5e4, median: 5.0, factor: 5e-4, values: 1_000 },
        Event::RouteChosen { from_site: site, route: "direct".to_owned(), reason: "20.00 Mbit/s".to_owned() },
        Event::ExchangeChosen { round, exchange: "sharded".to_owned(), reason: "4 sites, bf16".to_owned() },
        Event::RoundClosed {
            round,
            term,
            contributors: vec![Contributor { site, tokens: 10_240, weight: 1.0 }],
            cursor: 50,
        },
        Event::RoundAbandoned { round },
        Event::RolledBack { from: round, to: Round(1) },
        Event::RoundCommitted {
            round,
            term,
            contributors: vec![Contributor { site, tokens: 10_240, weight: 1.0 }],
            cursor: 50,
            state_hash: hash("state"),
            seconds: 9.0,
            tokens_total: 30_720,
        },
        Event::RoundApplied { round, site, state_hash: hash("state") },
        Event::Diverged { round, site, hash_expected: hash("a"), hash_found: hash("b") },
        Event::Evaluated {
            round,
            step: 60,
            nats_per_token: 2.3,
            bits_per_byte: 2.2,
            bigram_bits_per_byte: 3.3,
            tokens: 16_384,
        },
        Event::Sample { round, text: "To be\nor \"not\" \u{1b}[31m".to_owned() },
        Event::CheckpointSaved { round, path: "checkpoints/round-00000003".to_owned(), bytes: 12, seconds: 0.5 },
        Event::CheckpointSkipped { path: "checkpoints/round-00000002".to_owned(), reason: "cut".to_owned() },
        Event::Ledger { leased: 9, committed: 5, returned: 3, lost: 1 },
        Event::SettingsChanged {
            round,
            inner_steps: 12,
            fragments: 4,
            overlap_steps: 3,
            codec: "lowrank".to_owned(),
            rank: 8,
            reason: "18.0 Mbit/s from site-a to site-b, 2 sites: it fits".to_owned(),
        },
        Event::Straggler { round, site, reason: "slow link".to_owned(), waited_seconds: 2.5 },
        Event::SharesChanged { reason: "speed".to_owned(), shares: vec![SiteShare { site, share: 0.3 }] },
        Event::PeerRefused { address: "10.0.0.9:1".to_owned(), reason: "wrong secret".to_owned() },
        Event::Warning { message: "disk full".to_owned(), hint: Some("free space".to_owned()) },
        Event::MicroBatchReduced { site, from_samples: 8, to_samples: 4, reason: "8 GiB wanted".to_owned() },
        Event::EngineRestarted { site, round, attempt: 1, reason: "signal 9".to_owned() },
        Event::EngineHung { site, engine: "wgpu:0".to_owned(), call: "inner step".to_owned(), step: 41, seconds: 45.5 },
        Event::StepRecomputed { site, round, step: 41, by: "itself".to_owned(), seconds: 0.5 },
        Event::StepMismatch {
            site,
            engine: "torch:cuda:0".to_owned(),
            round,
            step: 41,
            quantity: "gradient norm".to_owned(),
            difference: 0.25,
            bound: 8e-5,
            by: "site 1".to_owned(),
        },
        Event::SiteLeft { site, reason: "SIGTERM".to_owned() },
        Event::RunFinished { verdict: "good".to_owned(), state_hash: hash("end"), rounds: 50, tokens: 2_000_000 },
    ];
    assert_eq!(events.len(), complete(&events[0]));
    assert_eq!(events.len(), Event::SCHEMA.len());
    events
}

pub(crate) fn record(seq: u64, event: Event) -> Record {
    Record { v: EVENT_VERSION, seq, unix_ms: 1_700_000_000_000 + seq, source: "coordinator".to_owned(), event }
}

#[test]
fn every_event_survives_a_line() {
    for (seq, event) in one_of_each().into_iter().enumerate() {
        let record = record(seq as u64, event);
        let line = record.to_line();
        assert_eq!(line.matches('\n').count(), 1, "{line}");
        assert!(!line.contains('\u{1b}'), "control characters are escaped");
        assert_eq!(Record::from_line(line.as_bytes()).unwrap(), record);
        let value: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(value["event"], record.event.name());
    }
}

#[test]
fn the_schema_lists_exactly_the_fields_of_each_line() {
    for event in one_of_each() {
        let line = record(0, event.clone()).to_line();
        let value: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&line).unwrap();
        let mut found: Vec<&str> = value.keys().map(String::as_str).collect();
        let (_, fields) = Event::SCHEMA.iter().find(|(name, _)| *name == event.name()).unwrap();
        let mut expected = [&["v", "seq", "unix_ms", "source", "event"][..], fields].concat();
        found.sort_unstable();
        expected.sort_unstable();
        assert_eq!(found, expected, "{}", event.name());
    }
}

#[test]
fn a_line_of_the_future_is_told_apart_from_a_damaged_one() {
    let line = |v: u32, event: &str| format!(r#"{{"v":{v},"seq":1,"unix_ms":2,"source":"s","event":"{event}"}}"#);
    let unknown = Record::from_line(line(1, "teleported").as_bytes());
    assert_eq!(unknown, Err(LineError::Unknown { event: "teleported".to_owned(), v: 1 }));
    assert!(matches!(Record::from_line(line(2, "warning").as_bytes()), Err(LineError::Unknown { .. })));
    for damaged in ["", "{", "[]", "null", r#"{"v":1}"#, &line(1, "warning"), "\u{0}"] {
        assert!(matches!(Record::from_line(damaged.as_bytes()), Err(LineError::Malformed { .. })), "{damaged}");
    }
    assert!(matches!(Record::from_line(&[0xff, 0xfe]), Err(LineError::Malformed { .. })));
}

#[test]
fn fields_that_are_added_later_do_not_disturb() {
    let line = r#"{"v":1,"seq":1,"unix_ms":2,"source":"s","event":"warning","message":"m","colour":"red"}"#;
    let event = Event::Warning { message: "m".to_owned(), hint: None };
    assert_eq!(Record::from_line(line.as_bytes()).unwrap().event, event);
}

/// The section of a level-3 heading, down to the next heading.
fn section<'a>(document: &'a str, heading: &str) -> &'a str {
    let start = document.find(heading).unwrap_or_else(|| panic!("docs/events.md has no section {heading:?}"));
    let rest = &document[start + heading.len()..];
    &rest[..rest.find("\n#").unwrap_or(rest.len())]
}

#[test]
fn every_event_and_field_is_documented() {
    let document = include_str!("../../../docs/events.md");
    for (name, fields) in Event::SCHEMA {
        let section = section(document, &format!("\n### `{name}`\n"));
        for field in *fields {
            assert!(section.contains(&format!("\n| `{field}` |")), "docs/events.md: {name} lacks {field}");
        }
        let rows = section.matches("\n| `").count();
        assert_eq!(rows, fields.len(), "docs/events.md: {name} documents a field that is not there");
    }
    let status = section(document, "\n## Status as JSON\n");
    let value = crate::RunView::default().to_json();
    for key in value.as_object().unwrap().keys() {
        assert!(status.contains(&format!("\n| `{key}` |")), "docs/events.md: the status lacks {key}");
    }
}
