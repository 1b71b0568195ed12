//! The lab's faults: processes that are killed or stopped and links that are cut cost time and nothing else.

use crate::support::{Place, TINY_MODEL, figure};
use serde_json::Value;

/// A tiny model in rounds of four steps.
const SETTINGS: [&str; 2] = ["sync.inner_steps=4", "evaluate.sample_tokens=0"];

/// Steps take the same time on every machine: a round a fifth of a second, and all of them longer than what is to happen.
const ENGINE: &str = "emulated:0.05";
const ROUNDS: &str = "80";

fn lab<'a>(faults: &[&'a str]) -> Vec<&'a str> {
    let fixed = ["lab", "--site", ENGINE, "--site", ENGINE, "--link", "200Mbit/s,2ms"];
    let work = ["--rounds", ROUNDS, "--measure-seconds", "0.1", "--data", "texts", "--restart-after", "500ms"];
    let settings = TINY_MODEL.into_iter().chain(SETTINGS).flat_map(|setting| ["--set", setting]);
    fixed.into_iter().chain(work).chain(settings).chain(faults.iter().copied()).collect()
}

fn fault<'a>(report: &'a Value, name: &str) -> &'a Value {
    let each = report["faults"]["each"].as_array().unwrap();
    each.iter().find(|fault| fault["fault"].as_str().unwrap().starts_with(name)).unwrap_or_else(|| panic!("{report}"))
}

#[test]
fn what_is_killed_stopped_or_cut_off_comes_back_and_no_invariant_is_violated() {
    let place = Place::new();
    let faults =
        ["--kill", "b@1s", "--kill", "coordinator@3s", "--cut", "a-b@6s..7s", "--stop", "site-a@8500ms..9500ms"];
    let report = place.object(&lab(&faults));
    assert_eq!(report["identical"], true, "{report}");
    // Rounds are shorter while a site is expected back, and so there are more of them.
    assert!(report["rounds"].as_u64().unwrap() >= ROUNDS.parse().unwrap(), "{report}");
    for finding in report["invariants"].as_array().unwrap() {
        assert_eq!(finding["violations"], Value::Array(Vec::new()), "{finding}");
        assert!(finding["checked"].as_u64().unwrap() > 0 || finding["invariant"] == "I4 cost of faults", "{finding}");
    }
    assert_eq!(report["faults"]["ended_badly"], Value::Array(Vec::new()), "{report}");
    for name in ["kill site-b", "kill coordinator", "cut site-a-site-b", "stop site-a"] {
        let fault = fault(&report, name);
        for field in ["mended_after_seconds", "rejoin_seconds", "next_commit_seconds", "joint_commit_seconds"] {
            assert!(fault[field].is_number(), "{name}: {field} in {fault}");
        }
        let seconds = |field: &str| fault[field].as_f64().unwrap_or(f64::NAN);
        figure(
            &format!("lab-{}", name.replace(' ', "-")),
            &format!(
                "mended after {:.1} s; back in a round {:.1} s later, a commit with all sites {:.1} s after the fault, longest \
                 time without a commit {:.1} s",
                seconds("mended_after_seconds"),
                seconds("rejoin_seconds"),
                seconds("joint_commit_seconds"),
                seconds("longest_commit_gap_seconds")
            ),
        );
    }
}

#[test]
fn faults_that_make_no_sense_are_refused_before_any_work() {
    let place = Place::new();
    for (faults, words) in [
        (
            &["--kill", "site-z@1s"][..],
            "error: --kill site-z@1s: there is no 'site-z'; this lab has site-a, site-b, coordinator\n",
        ),
        (
            &["--kill", "b@1s", "--kill", "b@1.2s"],
            "comes before 'kill site-b@1s' is over, at 1.5 s\nhint: try `--kill site-b@20s`",
        ),
        (&["--chaos", "1"], "error: --chaos 1: 5 s to a day are expected"),
    ] {
        let ended = place.ended(&lab(faults));
        assert!(ended.failure().contains(words), "{faults:?}: {}", ended.failure());
        assert!(!place.join("lab").exists());
    }
}
