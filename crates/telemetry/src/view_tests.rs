//! Tests of `view`: the status by hand, bounds, and that cutting a log changes nothing.

use super::*;
use crate::event::event_tests::{one_of_each, record};
use crate::event::{Contributor, LeaseShare};
use crate::log::Follower;
use proptest::prelude::*;
use std::io::Write as _;

fn apply_all(events: Vec<Event>) -> RunView {
    let records: Vec<Record> = events.into_iter().enumerate().map(|(i, event)| record(i as u64, event)).collect();
    RunView::of(&records)
}

fn started(resumed_round: Option<Round>) -> Event {
    Event::RunStarted {
        run: "tiny".to_owned(),
        strategy: "diloco".to_owned(),
        sites: 2,
        parameters: 1_000,
        tokens_planned: 10_000,
        rounds_planned: 10,
        engine: None,
        resumed_round,
    }
}

fn joined(site: u32, name: &str) -> Event {
    Event::SiteJoined {
        site: SiteId(site),
        name: name.to_owned(),
        address: "127.0.0.1:1".to_owned(),
        engine: "flex".to_owned(),
        threads: 1,
        slowdown: 1.0,
    }
}

fn committed(round: u64, tokens: [u64; 2], seconds: f64, tokens_total: u64) -> Event {
    let contributor = |site| Contributor { site: SiteId(site as u32), tokens: tokens[site], weight: 0.5 };
    Event::RoundCommitted {
        round: Round(round),
        term: Term(1),
        contributors: vec![contributor(0), contributor(1)],
        cursor: round * 10,
        state_hash: ContentHash::of(&round.to_le_bytes()),
        seconds,
        tokens_total,
    }
}

fn lease(site: u32, share: f64) -> LeaseShare {
    LeaseShare {
        site: SiteId(site),
        start: 0,
        end: 8,
        steps: 4,
        samples_per_step: 2,
        samples: 8,
        ranges: Vec::new(),
        share,
    }
}

#[test]
fn the_status_of_a_small_run_by_hand() {
    let view = apply_all(vec![
        started(None),
        joined(0, "site-a"),
        joined(1, "site-b"),
        Event::SiteReady { site: SiteId(0), tokens_per_second: 300.0 },
        Event::RoundStarted { round: Round(1), term: Term(1), leases: vec![lease(0, 0.75), lease(1, 0.25)] },
        Event::RoundComputed { round: Round(1), site: SiteId(0), tokens: 750, compute_seconds: 2.5, loss_nats: 3.0 },
        Event::DeltaFetched { round: Round(1), from_site: SiteId(0), bytes: 400, seconds: 0.1 },
        Event::DeltaRefused { round: Round(1), from_site: SiteId(1), reason: "not a number".to_owned() },
        Event::DeltaClipped { round: Round(1), site: SiteId(1), norm: 10.0, median: 1.0, factor: 0.5, values: 100 },
        committed(1, [750, 250], 4.0, 1_000),
        Event::RoundApplied { round: Round(1), site: SiteId(0), state_hash: ContentHash::of(&1u64.to_le_bytes()) },
        committed(2, [750, 250], 6.0, 2_000),
        Event::SiteLeft { site: SiteId(1), reason: "SIGTERM".to_owned() },
    ]);
    assert_eq!(view.state, RunState::Training);
    assert_eq!((view.round, view.tokens()), (Round(2), 2_000));
    assert_eq!(view.tokens_per_second(), Some(200.0), "2,000 tokens in 10 s");
    assert_eq!(view.eta_seconds(), Some(40.0), "8,000 tokens at 200 a second");
    let site = &view.sites[&SiteId(0)];
    assert_eq!((site.state, site.share, site.tokens, site.bytes_sent), (SiteState::Ready, Some(0.75), 1_500, 400));
    assert_eq!(site.tokens_per_second, Some(300.0));
    assert_eq!(site.state_hash, Some(ContentHash::of(&1u64.to_le_bytes())));
    assert_eq!((site.compute_seconds, site.idle_seconds), (2.5, 1.5), "round 2 has no word of its compute time");
    assert_eq!(site.idle_fraction(), Some(0.375));
    assert_eq!((site.deltas_refused, site.deltas_clipped, view.warnings_total), (0, 0, 2));
    assert_eq!((view.sites[&SiteId(1)].deltas_refused, view.sites[&SiteId(1)].deltas_clipped), (1, 1));
    assert_eq!(view.members().count(), 1);
    assert_eq!(view.sites[&SiteId(1)].idle_fraction(), None);
    assert_eq!(view.sites[&SiteId(1)].left_reason.as_deref(), Some("SIGTERM"));
    let table = view.render_table(100);
    for expected in
        ["round 2 of 10", "2.00 k of 10.0 k tokens", "200 tokens/s", "40s left", "site-a", "75.0%", "37.5%", "left"]
    {
        assert!(table.contains(expected), "{expected}:\n{table}");
    }
}

#[test]
fn a_quick_site_may_finish_the_next_round_before_the_commit_is_logged() {
    let computed = |round, compute_seconds| Event::RoundComputed {
        round: Round(round),
        site: SiteId(0),
        tokens: 100,
        compute_seconds,
        loss_nats: 3.0,
    };
    let view = apply_all(vec![
        started(None),
        computed(1, 2.0),
        computed(2, 3.0),
        committed(1, [100, 100], 4.0, 200),
        committed(2, [100, 100], 4.0, 400),
    ]);
    let site = &view.sites[&SiteId(0)];
    assert_eq!((site.compute_seconds, site.idle_seconds), (5.0, 3.0));
}

#[test]
fn steps_count_until_their_round_is_committed() {
    let step = |step, tokens| Event::Step {
        site: SiteId(0),
        round: Round(1),
        step,
        loss_nats: 2.0,
        learning_rate: 1e-3,
        gradient_norm: 1.0,
        tokens,
        seconds: 0.5,
    };
    let mut events = vec![started(None), step(1, 100), step(2, 100)];
    let view = apply_all(events.clone());
    assert_eq!((view.tokens(), view.step, view.tokens_per_second()), (200, 2, Some(200.0)));
    events.extend([committed(1, [200, 100], 2.0, 300), step(3, 100)]);
    let view = apply_all(events);
    assert_eq!((view.tokens(), view.tokens_per_second()), (400, Some(150.0)));
}

#[test]
fn a_resumed_run_keeps_what_was_reached_and_forgets_members() {
    let view = apply_all(vec![
        started(None),
        joined(0, "site-a"),
        committed(1, [500, 500], 1.0, 1_000),
        started(Some(Round(1))),
    ]);
    assert_eq!((view.state, view.round, view.tokens()), (RunState::Waiting, Round(1), 1_000));
    assert!(view.sites.is_empty());
    assert_eq!(view.eta_seconds(), None);
    assert_eq!(apply_all(vec![committed(1, [1, 1], 1.0, 2), started(None)]).tokens(), 0);
}

#[test]
fn every_event_changes_the_view_it_should() {
    let mut view = RunView::default();
    for (index, event) in one_of_each().into_iter().enumerate() {
        let before = RunView { unix_ms: 0, ..view.clone() };
        view.apply(&record(index as u64, event.clone()));
        let changed = before != RunView { unix_ms: 0, ..view.clone() };
        assert!(changed, "{} changes nothing", event.name());
    }
    assert_eq!(view.state, RunState::Finished);
    assert_eq!((view.divergences, view.warnings_total), (1, 13));
    assert_eq!((view.steps_recomputed, view.step_mismatches), (2, 1));
    assert_eq!(view.validation.as_ref().unwrap().bits_per_byte_start, 2.2);
    let json = view.to_json();
    assert_eq!(json["sites"][0]["state"], "left");
    assert_eq!((&json["sites"][0]["deltas_refused"], &json["sites"][0]["deltas_clipped"]), (&1.into(), &1.into()));
    assert_eq!((&json["sites"][0]["device"], &json["sites"][0]["precision"]), (&"Ascend 910B".into(), &"bf16".into()));
    assert_eq!((&json["sites"][0]["compute_seconds"], &json["sites"][0]["idle_seconds"]), (&8.0.into(), &1.0.into()));
    assert_eq!(json["validation"]["bigram_bits_per_byte"], 3.3);
    assert_eq!(json["ledger"]["lost"], 1);
    assert_eq!(json["state_hash"].as_str().unwrap().len(), 64);
    assert_eq!(json["eta_seconds"], serde_json::Value::Null);
}

#[test]
fn memory_is_bounded_whatever_the_log_holds() {
    let mut view = RunView::default();
    for index in 0..(SITES_MAX as u32 + 50) {
        view.apply(&record(0, joined(index, &"n".repeat(10_000))));
        let long = "w".repeat(100_000);
        if index < 100 {
            view.apply(&record(0, Event::Warning { message: long.clone(), hint: Some(long) }));
        }
    }
    assert_eq!(view.sites.len(), SITES_MAX);
    assert_eq!((view.warnings.len(), view.warnings_total), (WARNINGS_MAX, 100));
    assert!(view.warnings.iter().all(|warning| warning.message.len() <= TEXT_CHARS_MAX));
    assert!(view.sites.values().all(|site| site.name.len() <= TEXT_CHARS_MAX));
}

#[test]
fn a_table_keeps_its_width_and_shows_no_control_characters() {
    let mut events = one_of_each();
    events.push(Event::Warning { message: "evil \u{1b}[31m\nline".to_owned(), hint: None });
    events.push(joined(7, "\u{1b}[2Jname"));
    let view = apply_all(events);
    for width in [0, 20, 80, 200] {
        let table = view.render_table(width);
        assert!(table.lines().all(|line| line.chars().count() <= width), "{table}");
        assert!(table.chars().all(|c| c == '\n' || !c.is_control()), "{table:?}");
    }
    assert!(RunView::default().render_table(80).contains("nothing logged yet"));
}

#[test]
fn quantities_and_durations_read_well() {
    let cases =
        [(0.0, "0"), (999.4, "999"), (999.5, "1.00 k"), (12_345.0, "12.3 k"), (3.4e6, "3.40 M"), (5e14, "500 T")];
    for (value, text) in cases {
        assert_eq!(counted(value), text);
    }
    let cases = [(0.4, "0s"), (59.4, "59s"), (59.6, "1m 00s"), (7_500.0, "2h 05m"), (273_600.0, "3d 4h"), (-1.0, "0s")];
    for (seconds, text) in cases {
        assert_eq!(duration(seconds), text);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// A view of the whole log equals one that followed it while it was written in arbitrary pieces, and one that
    /// was handed over in the middle.
    #[test]
    fn a_log_read_in_pieces_gives_the_same_view(
        order in prop::collection::vec(0usize..24, 0..60),
        pieces in prop::collection::vec(1usize..400, 1..40),
        handover in 0usize..60,
    ) {
        let events = one_of_each();
        let records: Vec<Record> =
            order.iter().enumerate().map(|(seq, &index)| record(seq as u64, events[index].clone())).collect();
        let whole = RunView::of(&records);

        let content: String = records.iter().map(Record::to_line).collect();
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let mut follower = Follower::new(file.path());
        let mut followed = RunView::default();
        let mut rest = content.as_bytes();
        for piece in pieces.iter().cycle() {
            if rest.is_empty() {
                break;
            }
            let (part, after) = rest.split_at((*piece).min(rest.len()));
            file.write_all(part).unwrap();
            rest = after;
            follower.poll().unwrap().iter().for_each(|record| followed.apply(record));
        }
        prop_assert_eq!(&followed, &whole);
        prop_assert_eq!(followed.to_json(), whole.to_json());

        let (first, second) = records.split_at(handover.min(records.len()));
        let mut handed = RunView::of(first);
        second.iter().for_each(|record| handed.apply(record));
        prop_assert_eq!(handed, whole);
    }
}
