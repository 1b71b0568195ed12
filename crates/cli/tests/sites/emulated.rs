//! Sites whose engines sleep instead of computing: all else is as with any engine, and nobody takes them for one that learns.

use crate::support::{Coordinator, Place, assert_identical_after_every_commit};
use telemetry::Event;

const SITES: [&str; 2] = ["site-a", "site-b"];

#[test]
fn emulated_sites_hold_one_model_and_say_what_they_are() {
    let place = Place::new();
    let streaming = ["sync.strategy=streaming", "sync.inner_steps=4", "sync.fragments=2", "sync.overlap_steps=3"];
    let settings = ["sync.codec=e3m0", "sync.sites=2", "sync.shares=[1.0, 1.0]", "train.steps=12"];
    place.init("run", &[&streaming[..], &settings].concat());
    let coordinator = Coordinator::start(&place, "run", &["--json"]);
    let sites = SITES.map(|site| coordinator.join(&place, site, &["--engine", "emulated:0.01"]));
    let summary = coordinator.process.object();
    for site in sites {
        assert_eq!(site.object()["state_hash"], summary["state_hash"]);
    }
    assert_eq!((&summary["rounds"], &summary["finished"]), (&7.into(), &true.into()));
    assert_identical_after_every_commit(&place, "run", &SITES);
    for site in SITES {
        let steps = place.events(site).into_iter().filter_map(|record| match record.event {
            Event::Step { seconds, gradient_norm, .. } => Some((seconds, gradient_norm)),
            _ => None,
        });
        let steps: Vec<(f64, f64)> = steps.collect();
        assert_eq!(steps.len(), 12);
        assert!(steps.iter().all(|(seconds, norm)| *seconds >= 0.01 && *norm > 0.0), "{site}: {steps:?}");
        place.wait_for_event(site, "a warning of the emulation", |event| match event {
            Event::Warning { message, .. } => message.contains("'emulated:0.01' is an emulation").then_some(()),
            _ => None,
        });
    }
    let device = place.wait_for_event("run", "a site's device", |event| match event {
        Event::SiteDevice { engine, name, .. } => Some((engine.clone(), name.clone())),
        _ => None,
    });
    let name = "emulation: sleeps 0.01 s a step, learns nothing";
    assert_eq!(device, ("emulated:0.01".to_owned(), name.to_owned()));
}

#[test]
fn an_emulation_is_not_taken_for_an_engine_and_its_seconds_are_checked() {
    let place = Place::new();
    let doctor = place.ended(&["doctor", "--engine", "emulated:0.1"]);
    assert_eq!(doctor.code, Some(1), "{doctor:?}");
    assert!(doctor.stdout.contains("engine 'emulated:0.1' is an emulation"), "{doctor:?}");
    place.init("run", &[]);
    let refused = place.ended(&["train", "run", "--engine", "emulated:fast"]);
    let wanted = "error: device emulated:fast: 'fast' is not the seconds of a step, 0.001 to 30, as in emulated:0.1";
    assert!(refused.failure().starts_with(wanted), "{refused:?}");
    let precise = place.ended(&["train", "run", "--engine", "emulated:0.01", "--precision", "bf16"]);
    assert!(precise.failure().contains("multiplies nothing in bf16"), "{precise:?}");
}
