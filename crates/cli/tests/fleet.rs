//! `beringia simulate --plan` and `--crowd` as a user meets them: through the binary.

#![allow(clippy::unwrap_used, reason = "a test's helper may panic")]

use serde_json::Value;
use std::fs;
use std::process::{Command, Output};
use tempfile::TempDir;

const CLUSTER: &str = r#"
[link_default]
gbit_s = 10
round_trip_ms = 20

[[site]]
name = "oslo"
device = "H100"
devices = 512

[[site]]
name = "lyon"
device = "A100"
devices = 1024
wan_gbit_s = 8

[[site]]
name = "kobe"
device = "H20"
devices = 512
"#;

const FLEET: &str = "simulate --plan cluster.toml --model llama-3-8b --batch 1024 --days 0.5 --device-hours 1500";

struct Place(TempDir);

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("cluster.toml"), CLUSTER).unwrap();
        Self(folder)
    }

    /// Runs the binary in this folder, arguments divided by spaces.
    fn run(&self, arguments: &str) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_beringia"));
        command.current_dir(self.0.path()).args(arguments.split(' ')).output().unwrap()
    }

    fn text(&self, arguments: &str) -> String {
        let output = self.run(arguments);
        assert!(output.status.success(), "{arguments}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    fn object(&self, arguments: &str) -> Value {
        serde_json::from_str(&self.text(&format!("{arguments} --json"))).unwrap()
    }

    fn failure(&self, arguments: &str) -> String {
        let output = self.run(arguments);
        assert_eq!(output.status.code(), Some(1), "{arguments}: {}", String::from_utf8_lossy(&output.stdout));
        String::from_utf8(output.stderr).unwrap()
    }
}

#[test]
fn a_fleet_says_what_became_of_its_time() {
    let place = Place::new();
    let fleet = place.object(&format!("{FLEET} --seed 7"));
    let number = |key: &str| fleet[key].as_f64().unwrap();
    assert_eq!((fleet["seed"].as_u64(), number("days")), (Some(7), 0.5));
    assert!(number("goodput") > 0.3 && number("goodput") < 1.0 && number("committed_of_capacity") < 1.0, "{fleet}");
    assert!(fleet["sites"].as_array().unwrap().iter().all(|site| site["replicas"].as_f64().unwrap() > 1.0));
    assert_eq!(fleet["rates"]["on_failure"], "replica");
    let goodput = number("tokens_committed") / number("tokens_without_failures");
    assert!((number("goodput") - goodput).abs() < 1e-12);
    let lost: f64 = fleet["lost_of_capacity"].as_object().unwrap().values().map(|part| part.as_f64().unwrap()).sum();
    assert!((number("committed_of_capacity") + lost - 1.0).abs() < 1e-9, "{fleet}");
    assert!(fleet["faults"]["failures"].as_u64().unwrap() > 5, "{fleet}");
    assert!(number("rounds") > 100.0 && number("decisions") > number("rounds"));
}

/// Sites (device, number, Gbit/s of its access if that is thin) behind equal links of so many Gbit/s.
fn cluster(gbit_s: f64, round_trip_ms: f64, sites: &[(&str, u32, Option<f64>)]) -> String {
    let mut text = format!("[link_default]\ngbit_s = {gbit_s}\nround_trip_ms = {round_trip_ms}\n");
    for (place, (device, devices, access)) in sites.iter().enumerate() {
        text += &format!("\n[[site]]\nname = \"s{place}\"\ndevice = \"{device}\"\ndevices = {devices}\n");
        text += &access.map_or_else(String::new, |access| format!("wan_gbit_s = {access}\n"));
    }
    text
}

#[test]
fn what_nothing_disturbs_is_as_fast_as_its_plan_says() {
    let place = Place::new();
    let unlike = [("H100", 512, None), ("A100", 1024, None), ("H20", 512, None)];
    let several: Vec<_> = [("H100", 64, Some(2.0)), ("A100", 64, None), ("H20", 64, Some(4.0))].repeat(4);
    let clusters = [
        CLUSTER.to_owned(),
        cluster(100.0, 20.0, &unlike),
        cluster(2.0, 20.0, &unlike),
        cluster(100.0, 20.0, &[("H100", 512, None); 3]),
        cluster(1.0, 20.0, &[("H100", 512, None); 3]),
        cluster(5.0, 60.0, &[("H100", 1024, None); 2]),
        cluster(1.0, 20.0, &several),
    ];
    let mut ways = Vec::new();
    for cluster in clusters {
        fs::write(place.0.path().join("other.toml"), &cluster).unwrap();
        let fleet = place.object("simulate --plan other.toml --model llama-3-8b --batch 1024 --days 0.05 --seed 1");
        let number = |key: &str| fleet[key].as_f64().unwrap();
        let ratio = number("tokens_without_failures") / number("tokens_planned");
        assert!((ratio - 1.0).abs() < 0.05, "{ratio} of the plan: {fleet}");
        ways.push(fleet["way"].as_str().unwrap().to_owned());
    }
    let sharded = ways.iter().filter(|way| way.ends_with("sharded")).count();
    assert!(sharded > 0 && sharded < ways.len(), "{ways:?}");
}

#[test]
fn a_site_that_goes_on_without_a_replica_loses_less_than_one_that_stops() {
    let place = Place::new();
    // 14 failures are to be expected: each is 150 s of all sites, or ten minutes of one.
    let often = "simulate --plan cluster.toml --model llama-3-8b --batch 1024 --days 0.3 --device-hours 1000 --seed 7";
    let goodput = |options: &str| place.object(&format!("{often}{options}"))["goodput"].as_f64().unwrap();
    let (replica, site) = (goodput(""), goodput(" --on-failure site"));
    assert!(replica > site, "{replica} and {site}");
    assert!(goodput(" --restart-seconds 10") > replica);
}

#[test]
fn a_seed_gives_the_same_report_and_failures_that_never_come_cost_nothing() {
    let place = Place::new();
    let timeless = |text: String| text[..text.rfind(" in ").unwrap()].to_owned();
    let report = timeless(place.text(&format!("{FLEET} --seed 0x2a")));
    assert_eq!(report, timeless(place.text(&format!("{FLEET} --seed 42"))));
    for part in ["goodput ", "failed devices", "sites that had left", "slow spells", "seed    0x2a"] {
        assert!(report.contains(part), "{part}: {report}");
    }
    let calm = "simulate --plan cluster.toml --model llama-3-8b --batch 1024 --days 0.2 --seed 3 --device-hours 1e12 --leave-days 1e9 --slow-days 1e9";
    assert!(place.object(calm)["goodput"].as_f64().unwrap() > 0.99);
}

#[test]
fn what_cannot_be_simulated_is_refused_with_what_mends_it() {
    let place = Place::new();
    let message = place.failure(&format!("{FLEET} --quorum 0"));
    assert!(message.starts_with("error: --quorum 0 is not above 0 and at most 1\nhint: "), "{message}");
    assert!(
        place.failure("simulate --plan cluster.toml --model llama-3-8b --days=-1").contains("--days -1 is not above 0")
    );
    assert!(
        place
            .failure("simulate --plan cluster.toml --model llama-3-8b --device-hours nan")
            .contains("--device-hours NaN")
    );
    assert!(place.failure("simulate --plan cluster.toml --model llama-3-70").contains("did you mean \"llama-3-70b\"?"));
    assert!(place.failure("simulate --plan gone.toml --model llama-3-8b").contains("gone.toml cannot be read"));
    // What clap itself refuses.
    assert_eq!(place.run("simulate --plan cluster.toml").status.code(), Some(2));
    assert_eq!(place.run("simulate --days 3").status.code(), Some(2));
}

#[test]
fn the_decisions_for_a_crowd_are_timed_through_a_whole_round() {
    let crowd = Place::new().object("simulate --crowd 12");
    let parts = crowd["parts"].as_array().unwrap();
    let names: Vec<&str> = parts.iter().map(|part| part["part"].as_str().unwrap()).collect();
    assert_eq!(names, ["connect", "ready", "compute", "hold", "apply"]);
    assert!(parts.iter().all(|part| part["events"] == part["of"]));
    assert_eq!((parts[3]["events"].as_u64(), crowd["rounds_committed"].as_u64()), (Some(132), Some(1)));
}
