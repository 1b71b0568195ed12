//! The published needs and rounds beside the model.

use super::schedule::Hiding;
use super::*;
use crate::csv::Table;

/// Simulated Gbit/s for a compute utilisation: arXiv 2501.18512 table 4 and 2503.09799 table 6 (two sites, bf16 but for FP4; layers of the
/// second paper's models are their makers').
const NEEDS: &str = include_str!("published_needs.csv");

/// The two papers print needs for the same case (10B, 0.8 s, H = 100) that differ by 1.2 to 1.45, the later ones lower. What crosses is
/// taken between them, for this comparison only.
const PUBLISHED_VOLUME: f64 = 0.81;

/// The papers searched 50 bandwidths from 0.1 to 1,000 Gbit/s, evenly on a logarithmic scale, and print the least that suffices: every printed
/// figure is 10^(4 k / 49 - 1).
fn on_the_papers_grid(gigabits: f64) -> f64 {
    let step = ((gigabits.log10() + 1.0) * 49.0 / 4.0).ceil();
    10_f64.powf(step * 4.0 / 49.0 - 1.0)
}

fn published_case(table: &Table, row: usize) -> RoundCase {
    let number = |column: &str| table.cell(row, column).unwrap().parse::<f64>().unwrap();
    let method = table.cell(row, "method").unwrap();
    let layers = number("layers");
    RoundCase {
        parameters: number("parameters") * PUBLISHED_VOLUME,
        layers,
        bits_per_parameter: if method.ends_with("FP4") { 4.0 } else { 16.0 },
        sites: 2.0,
        inner_steps: number("inner_steps"),
        // Fragments of three layers.
        fragments: if method.starts_with("Streaming") { layers / 3.0 } else { 1.0 },
        overlap_steps: if method.contains("overlap") { 1.0 } else { 0.0 },
        step: Seconds(number("step_seconds")),
        link: Link::ideal(BitsPerSecond::from_gigabits(1.0)),
        exchange: Exchange::Ring,
        hiding: Hiding::Layerwise,
        coding: BytesPerSecond(f64::INFINITY),
    }
}

#[test]
fn all_33_published_needs_are_within_a_factor_of_1_3() {
    let table = Table::parse(NEEDS).unwrap();
    assert_eq!(table.len(), 33);
    let mut worst = 1.0_f64;
    for row in 0..table.len() {
        for percent in [50, 80, 90, 95, 99] {
            let printed = table.cell(row, &format!("gbit_s_{percent}")).unwrap();
            // "1000.0+" is the end of the paper's search: a lower bound.
            let Ok(printed) = printed.parse::<f64>() else { continue };
            let case = published_case(&table, row);
            let need = on_the_papers_grid(bandwidth_for(&case, f64::from(percent) / 100.0).unwrap().gigabits());
            let factor = (need / printed).max(printed / need);
            worst = worst.max(factor);
            assert!(factor <= 1.3, "row {}, {percent} %: {need:.2} for {printed} Gbit/s", row + 1);
        }
    }
    assert!(worst > 1.05, "a model that is never off repeats its input: {worst}");
}

/// A measured round: name, parameters, bits a parameter, sites, compute seconds, link, exchange, seconds of the published round.
type Measured = (&'static str, f64, f64, f64, f64, (f64, f64), Exchange, f64);

/// INTELLECT-1 (arXiv 2412.01152, table 2; links of 0.5 to 4 Gbit/s: their geometric mean in one country, the least across oceans),
/// Covenant-72B (2603.08163) and SparseLoCo (2508.15706; 500 down, 110 up Mbit/s; 64 of 4,096 values in 12 + 2 bits).
const ROUNDS: &[Measured] = &[
    ("INTELLECT-1 baseline", 10e9, 8.0, 1.0, 2280.0, (1.414, 1.414), Exchange::Ring, 2280.0),
    ("INTELLECT-1 USA", 10e9, 8.0, 14.0, 2280.0, (1.414, 1.414), Exchange::Ring, 2383.0),
    ("INTELLECT-1 USA, Europe", 10e9, 8.0, 14.0, 2280.0, (0.5, 0.5), Exchange::Ring, 2662.0),
    ("INTELLECT-1 global", 10e9, 8.0, 14.0, 2280.0, (0.5, 0.5), Exchange::Ring, 2749.0),
    ("Covenant-72B", 72e9, 0.21875, 20.0, 1200.0, (0.5, 0.11), Exchange::UploadBound, 1270.0),
    ("SparseLoCo 8B", 8e9, 0.21875, 15.0, 270.0, (0.5, 0.11), Exchange::UploadBound, 282.0),
];

#[test]
fn measured_rounds_are_within_ten_percent() {
    for (name, parameters, bits, sites, seconds, (down, up), exchange, published) in ROUNDS {
        let case = RoundCase {
            parameters: *parameters,
            layers: 32.0,
            bits_per_parameter: *bits,
            sites: *sites,
            inner_steps: 1.0,
            fragments: 1.0,
            overlap_steps: 0.0,
            step: Seconds(*seconds),
            link: Link {
                up: BitsPerSecond::from_gigabits(*up),
                down: BitsPerSecond::from_gigabits(*down),
                ..Link::ideal(BitsPerSecond::ZERO)
            },
            exchange: *exchange,
            hiding: Hiding::Snapshot,
            coding: BytesPerSecond(f64::INFINITY),
        };
        let ratio = round_time(&case).total().0 / published;
        assert!((ratio - 1.0).abs() < 0.10, "{name}: {ratio}");
    }
}

#[test]
fn the_seventh_round_streams_four_bits_over_one_gigabit() {
    // Streaming DiLoCo, 1B, two sites, 1 Gbit/s: 2,412 of 3,168 hours in computation (arXiv 2501.18512, table 1).
    let case = RoundCase {
        parameters: 1e9,
        layers: 24.0,
        bits_per_parameter: 4.0,
        sites: 2.0,
        inner_steps: 100.0,
        fragments: 8.0,
        overlap_steps: 1.0,
        step: Seconds(0.1),
        link: Link::ideal(BitsPerSecond::from_gigabits(1.0)),
        exchange: Exchange::Ring,
        hiding: Hiding::Layerwise,
        coding: BytesPerSecond(f64::INFINITY),
    };
    let ratio = round_time(&case).utilisation / (2412.0 / 3168.0);
    assert!((ratio - 1.0).abs() < 0.10, "{ratio}");
}

#[test]
fn sharded_rounds_send_their_merges_in_f32() {
    // 1e9 values: 3 x 0.5 GB in a mesh of four, 3/4 of 0.5 + 4 GB sharded. At 32 bits, or among many, it is the other way round.
    let bytes =
        |exchange: Exchange, bits: f64, sites: f64| exchange.bytes(Bytes(bits / 8.0 * 1e9), Bytes(4e9), sites).0;
    assert_eq!((bytes(Exchange::Mesh, 4.0, 4.0), bytes(Exchange::Sharded, 4.0, 4.0)), (Bytes(1.5e9), Bytes(3.375e9)));
    assert!(bytes(Exchange::Sharded, 32.0, 4.0).0 < bytes(Exchange::Mesh, 32.0, 4.0).0);
    assert!(bytes(Exchange::Sharded, 4.0, 10.0).0 < bytes(Exchange::Mesh, 4.0, 10.0).0);
    assert_eq!(bytes(Exchange::Sharded, 32.0, 7.0), bytes(Exchange::Ring, 32.0, 7.0));
}

#[test]
fn a_link_that_is_never_idle_bounds_the_rounds_however_long_the_overlap_is() {
    // S = 2 steps of 1 s, u = 3 s of transfer, delays of 2 s: m = 5 s. With tau = 5 a merge has q = 2 rounds' waits before its own.
    let case = |overlap_steps: f64, gigabits: f64| RoundCase {
        parameters: 10e9 / 8.0,
        layers: 10.0,
        bits_per_parameter: 8.0,
        sites: 2.0,
        inner_steps: 20.0,
        fragments: 10.0,
        overlap_steps,
        step: Seconds(1.0),
        link: Link { round_trip: Seconds(2.0 / 3.0), ..Link::ideal(BitsPerSecond::from_gigabits(gigabits)) },
        exchange: Exchange::Mesh,
        hiding: Hiding::Snapshot,
        coding: BytesPerSecond(f64::INFINITY),
    };
    let stall = |overlap_steps, gigabits| {
        let case = case(overlap_steps, gigabits);
        let rate = case.link.up.bytes_per_second();
        round_time_at(&case, rate, rate).stall.0 / case.fragments
    };
    let third = 1.0 / 3.0;
    assert!((stall(5.0, third) - 1.0).abs() < 1e-9, "{}", stall(5.0, third));
    assert!((stall(1.0, third) - 4.0).abs() < 1e-9, "the merge is late: {}", stall(1.0, third));
    assert!((stall(2.0, 1.0) - 0.5).abs() < 1e-9, "3 s less 2, over two rounds: {}", stall(2.0, 1.0));
    // Encoding and merging take 0.4 s each. With tau = 2 another fragment is on its way, and 0.2 s are waited for it; with tau = 1 there is none.
    let coded = |overlap_steps| {
        let case = RoundCase { coding: BytesPerSecond(5e9 / 8.0), ..case(overlap_steps, 1.0) };
        let rate = case.link.up.bytes_per_second();
        round_time_at(&case, rate, rate).stall.0 / case.fragments
    };
    assert!((coded(2.0) - (3.8 + 0.2 - 2.0) / 2.0).abs() < 1e-9 && (coded(1.0) - 2.8).abs() < 1e-9);
}

fn lossy(loss: f64, loss_based: bool, streams: f64) -> BytesPerSecond {
    let rate = BitsPerSecond::from_gigabits(10.0);
    Link { round_trip: Seconds(0.02), loss, loss_based, streams, ..Link::ideal(rate) }.throughput(rate)
}

#[test]
fn delay_and_loss_bound_a_stream_and_streams_help() {
    // 2 MiB every 20 ms are 105 MB/s.
    assert!((lossy(0.0, false, 1.0).0 / 104.86e6 - 1.0).abs() < 0.001);
    assert_eq!(lossy(0.0, false, 4.0).0, 4.0 * lossy(0.0, false, 1.0).0);
    // 1.22 / sqrt(1e-4) segments of 1,448 bytes every 20 ms are 8.8 MB/s.
    assert!((lossy(1e-4, true, 1.0).0 / 8.83e6 - 1.0).abs() < 0.01);
    assert!(lossy(1e-4, false, 32.0).0 > 1.1e9);
}

#[test]
fn unequal_sites_finish_together() {
    let together = compute_seconds(&[12.0, 1.0], 130);
    assert_eq!(together, Seconds(10.0));
    // One sample more or less is the most that whole samples cost.
    assert!(compute_seconds(&[12.0, 1.0], 137).0 <= 137.0 / 13.0 + 1.0);
    assert_eq!(compute_seconds(&[0.0], 1).0, f64::INFINITY);
}

mod properties {
    use super::*;
    use proptest::prelude::*;

    fn any_case() -> impl Strategy<Value = RoundCase> {
        let sizes = (1e6..1e12_f64, 1u32..200, 1u32..33, 1u32..500, 1u32..40);
        let times = (0.0..3.0_f64, 0.01..60.0_f64, 0.001..400.0_f64, 0.0..0.4_f64, prop::bool::ANY);
        (sizes, times).prop_map(
            |((parameters, layers, bits, steps, fragments), (tau, step, gigabits, delay, snapshot))| RoundCase {
                parameters,
                layers: f64::from(layers),
                bits_per_parameter: f64::from(bits),
                sites: 3.0,
                inner_steps: f64::from(steps),
                fragments: f64::from(fragments),
                overlap_steps: tau,
                step: Seconds(step),
                link: Link {
                    round_trip: Seconds(delay),
                    streams: 8.0,
                    ..Link::ideal(BitsPerSecond::from_gigabits(gigabits))
                },
                exchange: Exchange::Mesh,
                hiding: if snapshot { Hiding::Snapshot } else { Hiding::Layerwise },
                coding: BytesPerSecond(1e9),
            },
        )
    }

    proptest! {
        #[test]
        fn a_better_link_never_lowers_utilisation(case in any_case(), more in 1.0..10.0_f64) {
            let now = round_time(&case).utilisation;
            let wider = Link { up: case.link.up * more, down: case.link.down * more, ..case.link };
            let wider = round_time(&RoundCase { link: wider, ..case });
            prop_assert!(wider.utilisation >= now - 1e-12);
            let nearer = Link { round_trip: case.link.round_trip / more, ..case.link };
            let nearer = round_time(&RoundCase { link: nearer, ..case });
            prop_assert!(nearer.utilisation >= now - 1e-12);
            let fewer_bits = RoundCase { bits_per_parameter: case.bits_per_parameter / more, ..case };
            prop_assert!(round_time(&fewer_bits).utilisation >= now - 1e-12);
        }

        #[test]
        fn utilisation_is_a_share(case in any_case()) {
            let time = round_time(&case);
            prop_assert!((0.0..=1.0).contains(&time.utilisation));
            prop_assert!(time.stall.0 >= 0.0 && time.total().0.is_finite());
        }
    }
}
