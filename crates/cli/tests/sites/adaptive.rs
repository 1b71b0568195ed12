//! Settings that follow the links: over a thin one, sites change what they send, say why, and still hold one model.

use crate::support::{Place, TINY_MODEL, assert_identical_after_every_commit};
use std::fs;
use telemetry::Event;

/// A tiny model that begins with uncoded deltas of some 190 kB in rounds of four steps. No machine takes as long for these as 1 Mbit/s
/// for a delta (1.5 s).
const SETTINGS: [&str; 6] = [
    "sync.strategy=streaming",
    "sync.adaptive=true",
    "sync.inner_steps=4",
    "sync.overlap_steps=1",
    "sync.codec=f32",
    "evaluate.sample_tokens=0",
];

#[test]
fn sites_on_a_thin_link_send_less_say_why_and_end_with_one_model() {
    let place = Place::new();
    let links = "default = \"100Mbit/s,2ms\"\n[links]\n\"site-a <-> site-b\" = \"1Mbit/s,2ms\"\n";
    fs::write(place.join("links.toml"), links).unwrap();
    let fixed = ["lab", "--sites", "2", "--rounds", "20", "--measure-seconds", "0.1", "--data", "texts", "--link"];
    let arguments = fixed.into_iter().chain(["links.toml"]);
    let settings = TINY_MODEL.into_iter().chain(SETTINGS).flat_map(|setting| ["--set", setting]);
    let report = place.object(&arguments.chain(settings).collect::<Vec<_>>());
    assert_eq!(report["identical"], true, "{report}");
    let folder = |part: &str| format!("{}/{part}", report["folder"].as_str().unwrap());

    let (mut changes, mut sizes) = (Vec::new(), Vec::new());
    for record in place.events(&folder("run")) {
        match record.event {
            Event::SettingsChanged { round, codec, reason, .. } => changes.push((round, codec, reason)),
            Event::DeltaFetched { round, bytes, .. } => sizes.push((round, bytes)),
            _ => {}
        }
    }
    let (first_changed, codec, reason) = changes.first().expect("a change");
    for words in ["Mbit/s from site-", ", 2 sites: H = 4, P = 1, tau = 1, f32 sends ", " kB in "] {
        assert!(reason.contains(words), "'{words}' is not in: {reason}");
    }
    assert_ne!(codec, "f32", "{reason}");
    let of =
        |is: &dyn Fn(base::Round) -> bool| sizes.iter().filter(|(round, _)| is(*round)).map(|(_, bytes)| *bytes).max();
    let (before, after) = (of(&|round| round < *first_changed).unwrap(), of(&|round| round >= *first_changed).unwrap());
    assert!(after * 4 < before, "{before} bytes before round {first_changed}, {after} after: {changes:?}");
    let sites = ["site-a", "site-b"].map(folder);
    assert_identical_after_every_commit(&place, &folder("run"), &[&sites[0], &sites[1]]);
}
