//! The lab's links: sites that talk over slow connections which break still hold one model.

use crate::support::{Place, TINY_MODEL};
use serde_json::Value;
use std::fs;

/// A tiny model in rounds of two steps, so that a round's delta is a few blocks of the loss.
const SETTINGS: [&str; 2] = ["sync.inner_steps=2", "evaluate.sample_tokens=0"];

/// A fifth of all blocks of 64 KiB breaks their connection.
const BREAKING: &str = "100Mbit/s,4ms,2ms,20%";

fn lab(link: &str) -> Vec<&str> {
    let fixed = ["lab", "--sites", "2", "--rounds", "6", "--measure-seconds", "0.1", "--data", "texts", "--link", link];
    fixed.into_iter().chain(TINY_MODEL.into_iter().chain(SETTINGS).flat_map(|setting| ["--set", setting])).collect()
}

fn link<'a>(report: &'a Value, from: &str, to: &str) -> &'a Value {
    let links = report["links"].as_array().unwrap();
    links
        .iter()
        .find(|link| link["from"] == from && link["to"] == to)
        .unwrap_or_else(|| panic!("{from} {to}: {report}"))
}

#[test]
fn sites_over_breaking_links_end_with_one_model() {
    let place = Place::new();
    let report = place.object(&lab(BREAKING));
    assert_eq!((&report["identical"], &report["rounds"]), (&true.into(), &6.into()), "{report}");
    assert_eq!(report["links"].as_array().unwrap().len(), 6, "two sites and the coordinator, both ways");
    let mut broken = 0;
    for (from, to) in [("site-a", "site-b"), ("site-b", "site-a")] {
        let link = link(&report, from, to);
        assert!(link["bytes"].as_u64().unwrap() > 6 * 65_536, "every delta went this way: {link}");
        assert!(link["measured_round_trip_seconds"].as_f64().unwrap() >= 0.004, "{link}");
        broken += link["connections_broken"].as_u64().unwrap();
    }
    assert!(broken > 0, "{report}");
    for site in ["site-a", "site-b"] {
        let link = link(&report, site, "coordinator");
        assert!(link["bytes"].as_u64().unwrap() > 0, "{link}");
        assert_eq!((&link["loss"], &link["connections_broken"]), (&0.0.into(), &0.into()), "{link}");
    }
}

#[test]
fn links_that_make_no_sense_are_refused_before_any_work() {
    let place = Place::new();
    fs::write(place.join("links.toml"), "default = \"20Mbit/s\"\n[links]\n\"site-a -> site-z\" = \"1Mbit/s\"\n")
        .unwrap();
    for (link, words) in [
        ("20MB/s", &["--link 20MB/s", "has no unit", "hint: try `--link 20Mbit/s,50ms,0.1%`"][..]),
        ("absent.toml", &["--link absent.toml", "a file that exists"]),
        ("links.toml", &["links.toml", "there is no 'site-z'", "site-a, site-b, coordinator"]),
    ] {
        let ended = place.ended(&lab(link));
        for word in words {
            assert!(ended.failure().contains(word), "{link}: '{word}' is not in: {}", ended.failure());
        }
        assert!(!place.join("lab").exists());
    }
}
