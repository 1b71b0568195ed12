//! Plans: what fits, what binds, what is left out, and that better sites never make a worse plan.

use super::between::Strategy as Kind;
use super::*;
use crate::catalogue::Catalogue;

fn shape(layers: f64, hidden: f64) -> Transformer {
    Transformer {
        layers,
        hidden,
        ffn: 3.5 * hidden,
        heads: hidden / 128.0,
        kv_heads: 8.0,
        vocab: 128_256.0,
        seq: 4_096.0,
        experts: 1.0,
        experts_per_token: 1.0,
        gated: true,
    }
}

fn link(gigabits: f64, delay: f64) -> Link {
    let rate = BitsPerSecond::from_gigabits(gigabits);
    Link { up: rate, down: rate, round_trip: Seconds(delay), loss: 0.0, streams: 32.0, loss_based: false }
}

fn site<'a>(catalogue: &'a Catalogue, device: &str, devices: u32, gigabits: f64) -> SiteSpec<'a> {
    SiteSpec {
        name: format!("{device} x {devices}"),
        device: catalogue.find(device).unwrap(),
        devices,
        devices_per_node: 8,
        network: BitsPerSecond::from_gigabits(200.0),
        link: link(gigabits, 0.02),
        precision: Precision::Bf16,
    }
}

fn task() -> Task {
    Task { shape: shape(80.0, 8192.0), global_batch: 1024, tokens: 1.4e12 }
}

#[test]
fn three_makers_share_a_model_by_their_speeds() {
    let catalogue = Catalogue::built_in();
    let sites = [
        site(&catalogue, "A100", 512, 10.0),
        site(&catalogue, "Ascend 910B", 1024, 10.0),
        site(&catalogue, "H20", 512, 10.0),
    ];
    let best = plans(&task(), &sites, 3).unwrap();
    let plan = &best[0];
    assert_eq!(plan.sites.len(), 3, "{:?}", plan.reasons);
    assert!((plan.sites.iter().map(|site| site.share).sum::<f64>() - 1.0).abs() < 1e-9);
    assert_eq!(plan.sites[0].name, "Ascend 910B x 1024");
    assert!(plan.round.utilisation > 0.9 && plan.way.strategy == Kind::Streaming, "{:?}", plan.reasons);
    assert!(plan.sites.iter().all(|site| site.prediction.fits == Some(true)));
}

#[test]
fn a_fast_link_makes_it_synchronous_and_a_thin_one_coarse() {
    let catalogue = Catalogue::built_in();
    // Small enough, and with sites enough, that outer steps cost loss.
    let task = Task { shape: shape(16.0, 1024.0), global_batch: 1024, tokens: 1e10 };
    let way = |gigabits: f64| {
        let sites = [8, 8, 8, 8]
            .map(|devices| SiteSpec { link: link(gigabits, 1e-4), ..site(&catalogue, "A100", devices, 1.0) });
        plans(&task, &sites, 4).unwrap().into_iter().find(|plan| plan.sites.len() == 4).unwrap().way
    };
    assert_eq!(way(100_000.0).strategy, Kind::Synchronous);
    let thin = way(0.05);
    assert_eq!((thin.strategy, thin.bits), (Kind::Streaming, 4));
}

#[test]
fn a_site_that_costs_more_than_it_brings_is_left_out() {
    let catalogue = Catalogue::built_in();
    let sites = [site(&catalogue, "H100", 1024, 0.01), site(&catalogue, "A100", 64, 0.01)];
    let best = plans(&task(), &sites, 1).unwrap();
    assert_eq!(best[0].left_out, ["A100 x 64"]);
    assert!(best[0].reasons.iter().any(|reason| reason.contains("A100 x 64 is left out")));
}

#[test]
fn a_model_that_fits_nowhere_says_by_how_much_and_what_would_do() {
    let catalogue = Catalogue::built_in();
    let error = plans(&task(), &[site(&catalogue, "A100 40GB", 8, 10.0)], 1).unwrap_err();
    let PlanError::DoesNotFit { needed_gib, usable_gib, devices_factor, .. } = &error else { panic!("{error}") };
    assert!(needed_gib > usable_gib && devices_factor.is_some(), "{error}");
    assert!(error.hint().unwrap().contains("times its devices"));
}

#[test]
fn an_unknown_figure_is_named() {
    let catalogue = Catalogue::built_in();
    let error = plans(&task(), &[site(&catalogue, "MLU590", 64, 10.0)], 1).unwrap_err();
    assert_eq!(error.to_string(), "bf16_tflops of MLU590 (Siyuan 590) is unknown, and nothing is guessed");
}

#[test]
fn one_hundred_thousand_devices_in_eight_sites_are_planned() {
    let catalogue = Catalogue::built_in();
    let kinds = ["A100", "H100", "Ascend 910B", "H20", "MI300X", "H800", "A800", "H200"];
    let sites: Vec<_> = kinds.iter().map(|kind| site(&catalogue, kind, 12_500, 100.0)).collect();
    let task = Task { global_batch: 16_384, ..task() };
    let best = plans(&task, &sites, 1).unwrap();
    assert!(best[0].sites.len() > 1 && best[0].tokens_per_second > 1e7, "{:?}", best[0].reasons);
}

mod properties {
    use super::*;
    use proptest::prelude::*;

    fn best(task: &Task, sites: &[SiteSpec<'_>]) -> f64 {
        plans(task, sites, 1).map_or(f64::INFINITY, |plans| plans[0].time_to_loss.0)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn a_better_cluster_never_has_a_worse_plan(devices in 16_u32..200, gigabits in 0.1..100.0_f64, more in 1.0..5.0_f64) {
            let catalogue = Catalogue::built_in();
            let task = Task { shape: shape(32.0, 4096.0), global_batch: 256, tokens: 1e11 };
            let sites = [site(&catalogue, "A100", devices, gigabits), site(&catalogue, "A100", devices, gigabits)];
            let now = best(&task, &sites);
            let mut wider = sites.clone();
            wider.iter_mut().for_each(|site| site.link = link(gigabits * more, 0.02));
            prop_assert!(best(&task, &wider) <= now * (1.0 + 1e-9), "bandwidth");
            let mut device = catalogue.find("A100").unwrap().clone();
            device.memory_gib = device.memory_gib.map(|memory| memory * more);
            let roomier = sites.clone().map(|site| SiteSpec { device: &device, ..site });
            prop_assert!(best(&task, &roomier) <= now * (1.0 + 1e-9), "memory");
            let larger = sites.clone().map(|site| SiteSpec { devices: site.devices + (f64::from(devices) * (more - 1.0) / 5.0) as u32, ..site });
            prop_assert!(best(&task, &larger) <= now * (1.0 + 1e-9), "devices");
            let inner = sites.clone().map(|site| SiteSpec { network: site.network * more, ..site });
            prop_assert!(best(&task, &inner) <= now * (1.0 + 1e-9), "network");
        }
    }
}
