//! Fleets in virtual time: what breaks costs what it must, nothing is lost twice, and the same seed gives the same month.

use super::*;
use base::ParameterSchema;
use base::config::{Codec, Exchange, Strategy, SyncSection};

/// Hours of most of these runs.
const HOURS: f64 = 12.0;

/// Streaming rounds of 2 steps over sites of equal speed, 4,096 devices each.
fn fleet(sites: usize, rates: Rates) -> Fleet {
    let (fragments, inner_steps) = (5, 10);
    let sync = SyncSection {
        strategy: Strategy::Streaming,
        inner_steps,
        fragments,
        overlap_steps: 5,
        codec: Codec::Mxfp4,
        exchange: Exchange::Mesh,
        sites: sites as u32,
        recompute_share: 0.0,
        ..SyncSection::default()
    };
    let layer = |layer: u32| (format!("layers.{layer}"), vec![200_000_000]);
    let settings = Settings {
        sites: sites as u32,
        seed: 0,
        batch_samples: 1_024,
        sequence_length: 4_096,
        steps_per_round: inner_steps / u64::from(fragments),
        steps_total: 1 << 40,
        sync,
        schema: ParameterSchema::new((0..fragments).map(layer)),
    };
    // A step of 10 s.
    let speed = 1_024.0 * 4_096.0 / 10.0 / sites as f64;
    let site = |place| FleetSite {
        name: format!("s{place}"),
        devices: 4_096.0,
        replicas: 1.0,
        tokens_per_second: speed,
        access_bytes_per_second: None,
    };
    let link = FleetLink { bytes_per_second: 1e9, round_trip_seconds: 0.02 };
    Fleet {
        sites: (0..sites).map(site).collect(),
        links: vec![vec![link; sites]; sites],
        settings,
        coding_bytes_per_second: 2e9,
        checkpoint_rounds: 5,
        validation: None,
        seconds: HOURS * 3_600.0,
        rates,
    }
}

fn adds_up(outcome: &FleetOutcome) {
    let sum = outcome.tokens_committed + outcome.lost.total();
    assert!((sum / outcome.tokens_capacity - 1.0).abs() < 1e-9, "{outcome:?}");
    assert!(outcome.lost.uncommitted >= -1.0, "more committed than trained: {outcome:?}");
}

#[test]
fn nothing_breaks_and_nearly_all_time_is_training() {
    let outcome = simulate(&fleet(3, Rates::none()), 1).unwrap();
    adds_up(&outcome);
    assert!(outcome.tokens_committed / outcome.tokens_capacity > 0.99, "{outcome:?}");
    // A round has 2 steps of 10 s.
    assert!((outcome.rounds as f64 / (HOURS * 3_600.0 / 20.0) - 1.0).abs() < 0.02, "{outcome:?}");
    assert!(outcome.faults.is_empty() && outcome.left.is_empty() && outcome.stragglers == 0, "{outcome:?}");
}

#[test]
fn a_thin_link_makes_sites_wait() {
    let mut thin = fleet(3, Rates::none());
    // 100 MB of a fragment's delta to two others: 40 s of 20 s of steps.
    thin.links = vec![vec![FleetLink { bytes_per_second: 2.5e6, round_trip_seconds: 0.02 }; 3]; 3];
    let outcome = simulate(&thin, 1).unwrap();
    adds_up(&outcome);
    assert!(outcome.lost.waiting / outcome.tokens_capacity > 0.3, "{outcome:?}");
}

#[test]
fn failures_stop_one_site_and_the_others_go_on() {
    let often = Rates { failures_per_device_hour: 1.0 / 4_096.0, ..Rates::none() };
    let outcome = simulate(&fleet(4, often), 7).unwrap();
    adds_up(&outcome);
    let failures = outcome.faults[&Fault::Failure];
    // One an hour of each site that runs.
    assert!((24..=72).contains(&failures), "{outcome:?}");
    let down = outcome.lost.failures / outcome.tokens_capacity;
    let expected = failures as f64 * 600.0 / (4.0 * HOURS * 3_600.0);
    assert!((down / expected - 1.0).abs() < 0.05, "{down} of {expected}");
    let goodput = outcome.tokens_committed / outcome.tokens_capacity;
    assert!(goodput > 0.7 && goodput < 1.0 - down, "{goodput}: {outcome:?}");
}

#[test]
fn a_site_of_replicas_goes_on_without_the_one_that_failed() {
    let often = Rates { failures_per_device_hour: 1.0 / 4_096.0, ..Rates::none() };
    let with = |replicas| {
        let mut all = fleet(4, often);
        all.settings.sync.deadline_seconds = 600.0;
        all.sites.iter_mut().for_each(|site| site.replicas = replicas);
        simulate(&all, 7).unwrap()
    };
    let (whole, parts) = (with(1.0), with(32.0));
    adds_up(&parts);
    // Nobody leaves: all wait for who restarts.
    assert!(parts.left.is_empty() && parts.lost.joining < 0.01 * parts.tokens_capacity, "{parts:?}");
    assert!(parts.tokens_committed > whole.tokens_committed, "{parts:?}, {whole:?}");
    // 150 s for each failure, but for restarts that overlap, and what 1 of 32 replicas trains in the rest of its 600 s.
    let failures = parts.faults[&Fault::Failure] as f64;
    let seconds = parts.lost.failures / parts.tokens_capacity * 4.0 * HOURS * 3_600.0 / failures;
    assert!((140.0..=150.0 + 450.0 / 32.0).contains(&seconds), "{seconds}: {parts:?}");
}

#[test]
fn the_last_replica_that_fails_stops_the_site() {
    // Two a minute of each site, whose replicas are away for ten.
    let often = Rates { failures_per_device_hour: 120.0 / 4_096.0, ..Rates::none() };
    let mut two = fleet(3, often);
    two.sites.iter_mut().for_each(|site| site.replicas = 4.0);
    let outcome = simulate(&two, 3).unwrap();
    adds_up(&outcome);
    assert!(outcome.left.contains_key("connection lost"), "{outcome:?}");
}

#[test]
fn a_state_comes_from_all_its_holders_at_once() {
    // 8 GB at 25 MB/s: 320 s from one site, 80 s from four. Deltas take 4 of a round's 20 s.
    let joining = |sites| {
        let rates = Rates { leavings_per_second: 1.0 / 14_400.0, away_seconds: 3_600.0, ..Rates::none() };
        let mut thin = fleet(sites, rates);
        thin.links = vec![vec![FleetLink { bytes_per_second: 25e6, round_trip_seconds: 0.02 }; sites]; sites];
        let outcome = simulate(&thin, 5).unwrap();
        adds_up(&outcome);
        let seconds = outcome.lost.joining / outcome.tokens_capacity * sites as f64 * HOURS * 3_600.0;
        seconds / outcome.faults[&Fault::Leave] as f64
    };
    let (one, four) = (joining(2), joining(5));
    assert!(one > 320.0 && four > 80.0 && four < 0.5 * one, "{one} s and {four} s");
}

#[test]
fn every_kind_of_fault_is_survived_by_every_exchange_and_quorum() {
    let rates = Rates {
        failures_per_device_hour: 1.0 / 4_096.0,
        stops_per_device_hour: 0.3 / 4_096.0,
        spells_per_second: 1.0 / 7_200.0,
        leavings_per_second: 1.0 / 20_000.0,
        ..Rates::published()
    };
    for (exchange, quorum, seed) in
        [(Exchange::Mesh, 1.0, 1), (Exchange::Mesh, 0.6, 2), (Exchange::Sharded, 1.0, 3), (Exchange::Sharded, 0.6, 4)]
    {
        let mut all = fleet(5, rates);
        (all.settings.sync.exchange, all.settings.sync.quorum) = (exchange, quorum);
        let outcome = simulate(&all, seed).unwrap();
        adds_up(&outcome);
        assert_eq!(outcome.faults.len(), 4, "{outcome:?}");
        let there = outcome.tokens_capacity - outcome.lost.leaving - outcome.lost.failures - outcome.lost.stops;
        assert!(outcome.tokens_committed / there > 0.8, "{exchange:?} {quorum}: {outcome:?}");
        assert!(!outcome.left.contains_key("diverged") && !outcome.left.contains_key("misbehaved"), "{outcome:?}");
    }
}

#[test]
fn a_seed_gives_the_same_month_again_and_another_one_another() {
    let often = Rates { failures_per_device_hour: 1.0 / 4_096.0, ..Rates::published() };
    let of = |seed| simulate(&Fleet { seconds: 7_200.0, ..fleet(3, often) }, seed).unwrap();
    assert_eq!(of(5), of(5));
    assert_ne!(of(5), of(6));
}

#[test]
fn a_fleet_without_links_is_refused() {
    let mut empty = fleet(2, Rates::none());
    empty.links.pop();
    assert_eq!(simulate(&empty, 1), Err(FleetError::Shape { sites: 2, links: 1 }));
}

#[test]
fn a_crowd_commits_its_rounds() {
    let mut crowd = Crowd::new(20);
    let round = 20 + 20 * 19 + 20;
    (0..40 + 3 * round).for_each(|_| crowd.step());
    assert_eq!((crowd.rounds(), crowd.phase()), (3, CrowdPhase::Compute));
}
