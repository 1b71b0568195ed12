//! Plans: what fits, what binds, what is left out, and that better sites never make a worse plan.

use super::account::Tariff;
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

fn site<'a>(catalogue: &'a Catalogue, device: &str, devices: u32) -> SiteSpec<'a> {
    SiteSpec {
        name: format!("{device} x {devices}"),
        groups: vec![Group { device: catalogue.find(device).unwrap(), devices }],
        devices_per_node: 8,
        network: BitsPerSecond::from_gigabits(200.0),
        access: None,
        precision: Precision::Bf16,
        measured: None,
        tariff: Tariff::default(),
    }
}

fn named<'a>(name: &str, site: SiteSpec<'a>) -> SiteSpec<'a> {
    SiteSpec { name: name.to_owned(), ..site }
}

fn task() -> Task {
    Task { shape: shape(80.0, 8192.0), global_batch: 1024, tokens: 1.4e12 }
}

/// The fastest plans over links of so many Gbit/s between all.
fn fastest(task: &Task, sites: &[SiteSpec<'_>], gigabits: f64) -> Result<Vec<Plan>, PlanError> {
    plans(task, sites, &Links::all(link(gigabits, 0.02)), &Wish { count: 100, ..Wish::default() })
}

#[test]
fn three_makers_share_a_model_by_their_speeds() {
    let catalogue = Catalogue::built_in();
    let sites = [site(&catalogue, "A100", 512), site(&catalogue, "Ascend 910B", 1024), site(&catalogue, "H20", 512)];
    let plan = &fastest(&task(), &sites, 10.0).unwrap()[0];
    assert_eq!(plan.sites.len(), 3, "{:?}", plan.reasons);
    assert!((plan.sites.iter().map(|site| site.share).sum::<f64>() - 1.0).abs() < 1e-9);
    assert!(plan.sites[1].share > plan.sites[0].share && plan.sites[0].share > plan.sites[2].share);
    assert!(plan.round.utilisation > 0.9 && plan.way.strategy == Kind::Streaming, "{:?}", plan.reasons);
    assert!(plan.sites.iter().all(|site| site.prediction.fits == Some(true)));
    // What the layouts were predicted to take for their shares is the step that the team was given.
    assert!(plan.sites.iter().all(|site| (site.prediction.step / plan.step - 1.0).abs() < 0.1), "{plan:?}");
}

#[test]
fn a_fast_link_makes_it_synchronous_and_a_thin_one_coarse() {
    let catalogue = Catalogue::built_in();
    // Small enough, and with sites enough, that outer steps cost loss.
    let task = Task { shape: shape(16.0, 1024.0), global_batch: 1024, tokens: 1e10 };
    let way = |gigabits: f64| {
        let sites = ["a", "b", "c", "d"].map(|name| named(name, site(&catalogue, "A100", 8)));
        let links = Links::all(link(gigabits, 1e-4));
        let all = plans(&task, &sites, &links, &Wish { count: 100, ..Wish::default() }).unwrap();
        all.into_iter().find(|plan| plan.sites.len() == 4).unwrap().way
    };
    assert_eq!(way(100_000.0).strategy, Kind::Synchronous);
    let thin = way(0.05);
    // Merged parts travel in f32: four sites send less of 4 bits in a mesh (3 x 4.25 bits a value, 3/4 x 36.25 sharded).
    assert_eq!((thin.strategy, thin.bits, thin.exchange), (Kind::Streaming, 4, crate::wan::Exchange::Mesh));
}

#[test]
fn a_site_that_costs_more_than_it_brings_is_left_out_and_its_price_is_told() {
    let catalogue = Catalogue::built_in();
    let sites = [site(&catalogue, "H100", 1024), site(&catalogue, "A100", 64)];
    let best = &fastest(&task(), &sites, 0.01).unwrap()[0];
    assert_eq!(best.left_out[0].name, "A100 x 64");
    let with = best.alternatives.iter().find(|other| other.what == "with A100 x 64").unwrap();
    assert!(with.ratio > 1.0, "{with:?}");
}

#[test]
fn one_thin_link_among_thick_ones_binds_by_name() {
    let catalogue = Catalogue::built_in();
    let sites = ["a", "b", "c"].map(|name| named(name, site(&catalogue, "A100", 512)));
    let mut links = Links::all(link(100.0, 0.02));
    links.pairs.insert((0, 2), link(0.02, 0.02));
    let all = plans(&task(), &sites, &links, &Wish { count: 100, ..Wish::default() }).unwrap();
    let three = all.iter().find(|plan| plan.sites.len() == 3).unwrap();
    assert_eq!(three.binding, Binding::Link);
    assert!(
        three.reasons.iter().any(|reason| reason.contains("the link a - c binds: 0.020 Gbit/s")),
        "{:?}",
        three.reasons
    );
    let spanned = SiteSpec { access: Some(BitsPerSecond::from_gigabits(0.02)), ..sites[0].clone() };
    let narrow = [spanned, sites[1].clone()];
    let two = fastest(&task(), &narrow, 100.0).unwrap().into_iter().find(|plan| plan.sites.len() == 2).unwrap();
    assert!(two.round.utilisation < 0.9, "{:?}", two.reasons);
}

#[test]
fn a_model_that_fits_nowhere_says_by_how_much_and_what_would_do() {
    let catalogue = Catalogue::built_in();
    let error = fastest(&task(), &[site(&catalogue, "A100 40GB", 8)], 10.0).unwrap_err();
    let PlanError::DoesNotFit { needed_gib, usable_gib, devices_needed, .. } = &error else { panic!("{error}") };
    assert!(needed_gib > usable_gib, "{error}");
    let needed = devices_needed.unwrap();
    assert!(error.hint().unwrap().contains(&format!("{needed} devices (it has 8)")), "{:?}", error.hint());
    assert!(fastest(&task(), &[site(&catalogue, "A100 40GB", needed)], 10.0).is_ok());
    // The smallest change that would do.
    assert!(fastest(&task(), &[site(&catalogue, "A100 40GB", needed - 1)], 10.0).is_err());
}

#[test]
fn an_unknown_figure_is_named_and_a_site_without_it_left_out() {
    let catalogue = Catalogue::built_in();
    let unknown = site(&catalogue, "MLU590", 64);
    let error = fastest(&task(), core::slice::from_ref(&unknown), 10.0).unwrap_err();
    assert_eq!(error.to_string(), "bf16_tflops of MLU590 (Siyuan 590) is unknown, and nothing is guessed");
    let plan = &fastest(&task(), &[unknown, site(&catalogue, "A100", 512)], 10.0).unwrap()[0];
    assert!(plan.left_out[0].why.starts_with("bf16_tflops of MLU590"), "{:?}", plan.left_out);
}

#[test]
fn sites_without_a_link_are_refused() {
    let catalogue = Catalogue::built_in();
    let sites = [site(&catalogue, "A100", 512), site(&catalogue, "H100", 512)];
    let error = plans(&task(), &sites, &Links::default(), &Wish::default()).unwrap_err();
    assert_eq!(error.to_string(), "no link joins A100 x 512 and H100 x 512");
}

/// A cheap slow site and a dear fast one.
fn priced(catalogue: &Catalogue) -> [SiteSpec<'_>; 2] {
    let tariff = |price: f64, carbon: f64| Tariff {
        device_hour: Some(price),
        carbon_per_kilowatt_hour: Some(carbon),
        ..Tariff::default()
    };
    [
        SiteSpec { tariff: tariff(1.0, 600.0), ..named("cheap", site(catalogue, "A100", 512)) },
        SiteSpec { tariff: tariff(9.0, 20.0), ..named("dear", site(catalogue, "H100", 512)) },
    ]
}

#[test]
fn each_objective_has_the_least_of_its_figure() {
    let catalogue = Catalogue::built_in();
    let best = |objective: Objective| {
        let wish = Wish { objective, ..Wish::default() };
        plans(&task(), &priced(&catalogue), &Links::all(link(10.0, 0.02)), &wish).unwrap().remove(0)
    };
    let all = Objective::ALL.map(best);
    for (index, objective) in Objective::ALL.into_iter().enumerate() {
        let least = all[index].figure(objective).unwrap();
        assert!(all.iter().all(|plan| plan.figure(objective).unwrap() >= least * (1.0 - 1e-9)), "{objective:?}");
    }
    assert_eq!((all[0].sites.len(), all[1].sites.len()), (2, 1), "fast takes both, cheap takes one");
    assert_eq!((all[1].sites[0].name.as_str(), all[3].sites[0].name.as_str()), ("cheap", "dear"));
}

#[test]
fn energy_is_power_times_time_and_money_follows_it() {
    let catalogue = Catalogue::built_in();
    let tariff = Tariff {
        power: Some(Watts(1_000.0)),
        pue: 1.5,
        kilowatt_hour: Some(0.1),
        carbon_per_kilowatt_hour: Some(500.0),
        ..Tariff::default()
    };
    let sites = [SiteSpec { tariff, ..site(&catalogue, "A100", 512) }];
    let plan = &fastest(&task(), &sites, 1.0).unwrap()[0];
    let energy = plan.account.energy.unwrap().kilowatt_hours();
    let devices: f64 = plan.sites[0].devices.iter().map(|(_, count)| count).sum();
    assert!((energy / (devices * 1.5 * plan.time_to_loss.hours()) - 1.0).abs() < 1e-9, "{energy}");
    assert!((plan.account.cost.unwrap() / (0.1 * energy) - 1.0).abs() < 1e-9);
    assert!((plan.account.carbon.unwrap().tonnes() / (500e-6 * energy) - 1.0).abs() < 1e-9);
}

#[test]
fn h100_nodes_that_trained_gpt3_drew_what_is_assumed() {
    let catalogue = Catalogue::built_in();
    let group = Group { device: catalogue.find("H100").unwrap(), devices: 1 };
    let watts = account::device_power(&Tariff::default(), &group).unwrap();
    assert!((watts.0 / 856.0 - 1.0).abs() < 1e-9, "{watts:?}");
}

#[test]
fn caps_that_cannot_be_met_say_what_could_be() {
    let catalogue = Catalogue::built_in();
    let refused = |caps: Caps| {
        let wish = Wish { caps, ..Wish::default() };
        plans(&task(), &priced(&catalogue), &Links::all(link(10.0, 0.02)), &wish).unwrap_err()
    };
    let fastest =
        plans(&task(), &priced(&catalogue), &Links::all(link(10.0, 0.02)), &Wish::default()).unwrap().remove(0);
    let hours = fastest.time_to_loss.hours();
    let error = refused(Caps { hours: Some(hours / 2.0), ..Caps::default() });
    assert!(matches!(error, PlanError::OutOfReach { option: "--max-hours", .. }), "{error}");
    let cheapest = plans(
        &task(),
        &priced(&catalogue),
        &Links::all(link(10.0, 0.02)),
        &Wish { objective: Objective::Cost, ..Wish::default() },
    );
    let cost = cheapest.unwrap()[0].account.cost.unwrap();
    let error = refused(Caps { hours: Some(hours * 1.01), cost: Some(cost * 1.01), ..Caps::default() });
    assert!(error.to_string().starts_with("the caps contradict each other: --max-hours"), "{error}");
    let unknown = plans(
        &task(),
        &[site(&catalogue, "A100", 512)],
        &Links::default(),
        &Wish { objective: Objective::Cost, ..Wish::default() },
    );
    assert_eq!(unknown.unwrap_err().to_string(), "the price of A100 x 512 is unknown, and nothing is guessed");
}

#[test]
fn a_power_limit_leaves_devices_off_and_is_named() {
    let catalogue = Catalogue::built_in();
    let tariff = Tariff { power: Some(Watts(1_000.0)), power_limit: Some(Watts(256e3)), ..Tariff::default() };
    let sites = [SiteSpec { tariff, ..site(&catalogue, "A100", 512) }];
    let plan = &fastest(&task(), &sites, 1.0).unwrap()[0];
    assert!(plan.sites[0].devices[0].1 <= 256.0 && plan.binding == Binding::Power, "{:?}", plan.reasons);
}

#[test]
fn one_pipeline_over_two_makers_gives_the_faster_one_more_layers() {
    let catalogue = Catalogue::built_in();
    let group = |device: &str, devices| Group { device: catalogue.find(device).unwrap(), devices };
    let mixed = SiteSpec { groups: vec![group("A100", 64), group("H100", 64)], ..site(&catalogue, "A100", 64) };
    let fast = |site: SiteSpec<'_>| fastest(&task(), &[site], 1.0).unwrap().remove(0);
    let (together, alone) = (fast(mixed), fast(site(&catalogue, "H100", 64)));
    let site = &together.sites[0];
    assert_eq!(site.devices.len(), 2, "{:?}", site.devices);
    assert!(together.tokens_per_second > alone.tokens_per_second, "{:?}", site.devices);
    let layers = site.stage_layers.as_ref().unwrap();
    assert_eq!((layers.iter().sum::<f64>(), layers.len() as f64), (80.0, site.layout.pp));
    assert!(layers.last() > layers.first(), "{layers:?}");
}

#[test]
fn one_hundred_thousand_devices_in_eight_sites_are_planned() {
    let catalogue = Catalogue::built_in();
    let kinds = ["A100", "H100", "Ascend 910B", "H20", "MI300X", "H800", "A800", "H200"];
    let sites: Vec<_> = kinds.iter().map(|kind| site(&catalogue, kind, 12_500)).collect();
    let task = Task { global_batch: 16_384, ..task() };
    let best = fastest(&task, &sites, 100.0).unwrap();
    assert!(best[0].sites.len() > 1 && best[0].tokens_per_second > 1e7, "{:?}", best[0].reasons);
}

#[test]
fn more_than_ten_sites_are_planned_by_leaving_out_one_after_the_other() {
    let catalogue = Catalogue::built_in();
    let sites: Vec<_> = (0..12).map(|index| named(&format!("s{index}"), site(&catalogue, "A100", 64))).collect();
    let mut links = Links::all(link(10.0, 0.02));
    for other in 0..11 {
        links.pairs.insert((other, 11), link(0.001, 0.5));
    }
    let task = Task { shape: shape(16.0, 2048.0), global_batch: 2_048, tokens: 1e11 };
    let plan = &plans(&task, &sites, &links, &Wish::default()).unwrap()[0];
    assert!(plan.left_out.iter().any(|site| site.name == "s11"), "{:?}", plan.left_out);
}

mod properties {
    use super::*;
    use proptest::prelude::*;

    fn best(task: &Task, sites: &[SiteSpec<'_>], gigabits: f64) -> f64 {
        fastest(task, sites, gigabits).map_or(f64::INFINITY, |plans| plans[0].time_to_loss.0)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(12))]

        #[test]
        fn a_better_cluster_never_has_a_slower_plan(
            (a100, h100) in (16_u32..200, 16_u32..200),
            gigabits in 0.01..100.0_f64,
            more in 1.0..5.0_f64,
        ) {
            let catalogue = Catalogue::built_in();
            let task = Task { shape: shape(32.0, 4096.0), global_batch: 256, tokens: 1e11 };
            let sites = [site(&catalogue, "A100", a100), site(&catalogue, "H100", h100)];
            let now = best(&task, &sites, gigabits);
            prop_assert!(best(&task, &sites, gigabits * more) <= now * (1.0 + 1e-9), "bandwidth");
            let mut device = catalogue.find("A100").unwrap().clone();
            device.memory_gib = device.memory_gib.map(|memory| memory * more);
            let mut roomier = sites.clone();
            roomier[0].groups[0].device = &device;
            prop_assert!(best(&task, &roomier, gigabits) <= now * (1.0 + 1e-9), "memory");
            let mut larger = sites.clone();
            larger[0].groups[0].devices += (f64::from(a100) * (more - 1.0)) as u32;
            prop_assert!(best(&task, &larger, gigabits) <= now * (1.0 + 1e-9), "devices");
            let inner = sites.clone().map(|site| SiteSpec { network: site.network * more, ..site });
            prop_assert!(best(&task, &inner, gigabits) <= now * (1.0 + 1e-9), "network");
            let mut third = sites.to_vec();
            third.push(named("third", site(&catalogue, "A100", 64)));
            prop_assert!(best(&task, &third, gigabits) <= now * (1.0 + 1e-9), "sites");
        }

        #[test]
        fn one_better_link_access_or_device_never_makes_a_slower_plan(
            gigabits in 0.01..20.0_f64,
            more in 1.0..8.0_f64,
            (delay, loss, streams) in (0.0..0.2_f64, 0.0..0.02_f64, 1_u32..64),
            extra in 1_u32..40,
        ) {
            let catalogue = Catalogue::built_in();
            let task = Task { shape: shape(24.0, 2048.0), global_batch: 512, tokens: 3e10 };
            let narrow = Some(BitsPerSecond::from_gigabits(gigabits));
            let mixed = SiteSpec {
                groups: vec![
                    Group { device: catalogue.find("A100").unwrap(), devices: 16 },
                    Group { device: catalogue.find("H100").unwrap(), devices: 16 },
                ],
                ..named("mixed", site(&catalogue, "A100", 16))
            };
            let limited = Tariff { power_limit: Some(Watts(20e3)), ..Tariff::default() };
            let sites = [
                mixed,
                SiteSpec { access: narrow, ..named("narrow", site(&catalogue, "Ascend 910B", 32)) },
                SiteSpec { tariff: limited, ..named("limited", site(&catalogue, "H20", 48)) },
            ];
            let poor = Link { loss, streams: f64::from(streams), loss_based: true, ..link(gigabits, delay) };
            let mut links = Links::all(poor);
            links.pairs.insert((0, 1), poor);
            let of = |sites: &[SiteSpec<'_>], links: &Links| {
                plans(&task, sites, links, &Wish { count: 1, ..Wish::default() })
                    .map_or(f64::INFINITY, |plans| plans[0].time_to_loss.0)
            };
            let now = of(&sites, &links) * (1.0 + 1e-9);
            let better = |change: &dyn Fn(&mut Link)| {
                let mut links = links.clone();
                links.pairs.values_mut().for_each(change);
                of(&sites, &links)
            };
            prop_assert!(better(&|link| link.up = link.up * more) <= now, "one direction of one link");
            prop_assert!(better(&|link| link.round_trip = link.round_trip * (1.0 / more)) <= now, "delay");
            prop_assert!(better(&|link| link.loss /= more) <= now, "loss");
            prop_assert!(better(&|link| link.streams *= more) <= now, "streams");
            let changed = |change: &dyn Fn(&mut [SiteSpec<'_>; 3])| {
                let mut sites = sites.clone();
                change(&mut sites);
                of(&sites, &links)
            };
            prop_assert!(changed(&|sites| sites[0].groups[1].devices += extra) <= now, "devices of one kind of two");
            prop_assert!(changed(&|sites| sites[1].access = narrow.map(|rate| rate * more)) <= now, "access");
            prop_assert!(changed(&|sites| sites[2].tariff.power_limit = Some(Watts(20e3 * more))) <= now, "power");
        }
    }
}
