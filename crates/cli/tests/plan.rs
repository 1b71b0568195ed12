//! `beringia predict` and `beringia plan` as a user meets them: through the binary, down to the words of each refusal.

#![allow(clippy::unwrap_used, reason = "a test's helper may panic")]

use serde_json::Value;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output};
use tempfile::TempDir;

const CLUSTER: &str = r#"
[link_default]
gbit_s = 10
round_trip_ms = 20

[[site]]
name = "oslo"
device = "H100"
devices = 64
price_per_device_hour = 2.5
carbon_g_per_kwh = 30

[[site]]
name = "lyon"
device = "A100"
devices = 128
price_per_device_hour = 1.2
carbon_g_per_kwh = 56
"#;

const CASES: &str = "case,device,devices,layers,hidden,ffn,heads,kv_heads,vocab,seq,global_batch,micro_batch,tp,pp,dp,cp,ep,experts,\
                     experts_per_token,zero,recompute,precision,gpus_per_node,interconnect_gbit_s\n\
                     good,A100,64,32,4096,,32,,,2048,256,1,1,1,64,,,,,1,full,bf16,8,200\n";

struct Place(TempDir);

impl Place {
    fn with(files: &[(&str, &str)]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(folder.path().join(name), text).unwrap();
        }
        Self(folder)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Runs the binary in this folder, arguments divided by spaces.
    fn run(&self, arguments: &str) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_beringia"));
        command.current_dir(self.0.path()).args(arguments.split(' ')).output().unwrap()
    }

    /// Standard output of a command that must succeed.
    fn text(&self, arguments: &str) -> String {
        let output = self.run(arguments);
        assert!(output.status.success(), "{arguments}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    fn object(&self, arguments: &str) -> Value {
        let text = self.text(&format!("{arguments} --json"));
        assert_eq!(text.matches('\n').count(), 1, "{text}");
        serde_json::from_str(&text).unwrap()
    }

    /// Standard error of a command that must fail with status 1.
    fn failure(&self, arguments: &str) -> String {
        let output = self.run(arguments);
        assert_eq!(output.status.code(), Some(1), "{arguments}: {}", String::from_utf8_lossy(&output.stdout));
        String::from_utf8(output.stderr).unwrap()
    }
}

#[test]
fn predict_adds_its_columns_and_says_the_same_as_json() {
    let place = Place::with(&[("cases.csv", CASES)]);
    let text = place.text("predict --table cases.csv");
    let mut lines = text.lines();
    let header: Vec<&str> = lines.next().unwrap().split(',').collect();
    assert_eq!(
        &header[24..],
        [
            "step_seconds",
            "tokens_per_second_per_device",
            "tflops_per_device",
            "mfu",
            "memory_gib",
            "compute_share",
            "communication_share",
            "bubble_share",
            "error"
        ]
    );
    let row: Vec<&str> = lines.next().unwrap().split(',').collect();
    let object = place.object("predict --table cases.csv");
    assert_eq!((object["ok"].as_bool(), object["failed"].as_u64()), (Some(true), Some(0)));
    let step = object["rows"][0]["step_seconds"].as_f64().unwrap();
    assert!((row[24].parse::<f64>().unwrap() - step).abs() < 1e-6 && step > 0.1, "{row:?}");
    assert_eq!(object["rows"][0]["given"]["recompute"], "full");
}

#[test]
fn one_bad_row_does_not_hide_the_others_but_fails_the_command() {
    let cases = format!("{CASES}bad,A1000,,32,4096,,,,,,,,,,,,,,,,,,,\nabsurd,A100,,3e9,4096,,,,,,,,,,,,,,,,,,,\n");
    let place = Place::with(&[("cases.csv", &cases)]);
    let output = place.run("predict --table cases.csv");
    assert_eq!(output.status.code(), Some(1));
    let (rows, errors) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert_eq!(rows.lines().count(), 4);
    assert!(!rows.lines().nth(1).unwrap().split(',').nth(24).unwrap().is_empty());
    assert!(
        errors.contains(
            "error: cases.csv: row 2, column device: no device is called \"A1000\" in the catalogue\nhint: did you mean \"A100"
        ),
        "{errors}"
    );
    assert!(
        errors.contains("error: cases.csv: row 3, column layers: \"3e9\" is not a whole number from 1 to 10000\n"),
        "{errors}"
    );
    assert!(errors.ends_with("error: 2 of 3 rows have no prediction\n"), "{errors}");
    let output = place.run("predict --table cases.csv --json");
    let object: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((output.status.code(), object["failed"].as_u64()), (Some(1), Some(2)));
    assert_eq!(object["rows"][1]["column"], "device");
}

#[test]
fn predict_refuses_tables_that_it_cannot_read() {
    let place = Place::with(&[
        ("column.csv", "device,layer,hidden\nA100,32,4096\n"),
        ("ragged.csv", "device,layers,hidden\nA100,32\n"),
        ("empty.csv", ""),
        ("devices.toml", "[[device]]\nname = \"Mine\"\n"),
    ]);
    assert_eq!(
        place.failure("predict --table column.csv"),
        "error: column.csv: the header has an unknown column \"layer\"\nhint: did you mean \"layers\"?\n"
    );
    assert!(place.failure("predict --table ragged.csv").contains("row 1 has 2 cells, the header 3"));
    assert!(place.failure("predict --table empty.csv").contains("the table is empty"));
    assert!(place.failure("predict --table gone.csv").contains("gone.csv cannot be read"));
    assert!(place.failure("predict --table ragged.csv --devices devices.toml").contains("devices.toml"));
}

#[test]
fn a_device_of_ones_own_is_predicted() {
    let mine = "[[device]]\nname = \"Mine\"\nvendor = \"us\"\nkind = \"npu\"\nstatus = \"announced\"\nmemory_gib = 128\nmemory_bandwidth_gb_s = 4000\n\
                bf16_tflops = 1000\nfp8_scale = \"none\"\nscale_up_gb_s = 900\nsource = \"a wish\"\n";
    let cases = CASES.replace("A100", "Mine");
    let place = Place::with(&[("cases.csv", &cases), ("devices.toml", mine)]);
    assert!(place.failure("predict --table cases.csv").contains("no device is called \"Mine\""));
    assert!(place.object("predict --table cases.csv --devices devices.toml")["ok"].as_bool().unwrap());
}

const PLAN: &str = "plan --cluster cluster.toml --model llama-3-8b --tokens 100B --batch 512";

#[test]
fn a_plan_names_shares_layouts_links_and_reasons() {
    let place = Place::with(&[("cluster.toml", CLUSTER)]);
    let text = place.text(&format!(
        "{PLAN} --what-if site=oslo --what-if link=oslo,lyon+10 --what-if device=lyon:H100 --picture plan.svg"
    ));
    for part in [
        "plan 1  least time: 2 sites, ",
        "oslo ",
        "64 H100",
        "128 A100",
        "link oslo - lyon: ",
        "binds: ",
        "why: ",
        "otherwise: synchronous instead of ",
        "otherwise: without lyon",
        "plan 2  ",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert_eq!(text.matches("\nwhat if ").count(), 3, "{text}");
    let picture = fs::read_to_string(place.path("plan.svg")).unwrap();
    assert!(picture.starts_with("<svg ") && picture.contains("oslo"));
    let object = place.object(PLAN);
    let plan = &object["plans"][0];
    let shares: f64 = plan["sites"].as_array().unwrap().iter().map(|site| site["share"].as_f64().unwrap()).sum();
    assert!((shares - 1.0).abs() < 1e-9);
    let hours = plan["hours_for_tokens"].as_f64().unwrap();
    assert!((hours * 3600.0 * plan["tokens_per_second"].as_f64().unwrap() / 100e9 - 1.0).abs() < 1e-9);
    // 64 at 2.5 and 128 at 1.2 an hour.
    let cost = plan["totals"]["cost"].as_f64().unwrap();
    assert!(
        (cost / (plan["hours_to_loss"].as_f64().unwrap() * (64.0 * 2.5 + 128.0 * 1.2)) - 1.0).abs() < 1e-6,
        "{cost}"
    );
}

#[test]
fn objectives_and_caps_choose_among_plans() {
    let place = Place::with(&[("cluster.toml", CLUSTER)]);
    let figure = |options: &str, name: &str| {
        place.object(&format!("{PLAN}{options}"))["plans"][0]["totals"][name].as_f64().unwrap()
    };
    assert!(figure(" --objective carbon", "carbon_tonnes") <= figure("", "carbon_tonnes"));
    assert!(figure(" --objective cost", "cost") <= figure("", "cost"));
    let message = place.failure(&format!("{PLAN} --max-hours 0.01"));
    assert!(
        message.starts_with("error: no plan takes at most 0.01 h: the least is ")
            && message.contains("\nhint: raise --max-hours to "),
        "{message}"
    );
    let hours = place.object(PLAN)["plans"][0]["hours_to_loss"].as_f64().unwrap() * 1.001;
    let cost = figure(" --objective cost", "cost") * 1.001;
    let message = place.failure(&format!("{PLAN} --max-hours {hours} --max-cost {cost}"));
    assert!(message.starts_with("error: the caps contradict each other: --max-hours "), "{message}");
    let message = place.failure(&format!("{PLAN} --max-kwh=-1"));
    assert!(message.starts_with("error: --max-kwh -1 is no positive number\nhint: "), "{message}");
}

#[test]
fn bad_clusters_are_refused_with_what_mends_them() {
    let place = Place::with(&[
        ("cluster.toml", CLUSTER),
        ("device.toml", &CLUSTER.replace("\"H100\"", "\"H1000\"")),
        ("unit.toml", &CLUSTER.replace("gbit_s = 10", "gbit_s = 1e12")),
        ("key.toml", &CLUSTER.replace("gbit_s = 10", "gbyte_s = 10")),
        ("apart.toml", &CLUSTER.replace("[link_default]\ngbit_s = 10\nround_trip_ms = 20\n", "")),
        ("small.toml", "[[site]]\nname = \"home\"\ndevice = \"RTX 4090\"\ndevices = 2\ndevices_per_node = 2\n"),
    ]);
    let refused = |cluster: &str, model: &str| place.failure(&format!("plan --cluster {cluster} --model {model}"));
    let message = refused("device.toml", "llama-3-8b");
    assert!(
        message.starts_with(
            "error: device.toml: line 6, site \"oslo\": no device is called \"H1000\" in the catalogue\nhint: did you mean \"H100"
        ),
        "{message}"
    );
    assert!(refused("unit.toml", "llama-3-8b").contains("link_default: gbit_s = 1000000000000 is not between"));
    assert!(refused("key.toml", "llama-3-8b").contains("unknown field `gbyte_s`"));
    assert!(
        refused("apart.toml", "llama-3-8b")
            .starts_with("error: apart.toml: no link joins oslo and lyon\nhint: add [[link]]")
    );
    let message = refused("small.toml", "llama-3-70b");
    assert!(
        message.starts_with("error: small.toml: home cannot hold the model: the leanest layout needs "),
        "{message}"
    );
    assert!(message.contains(" too few\nhint: give home ") && message.contains(" devices (it has 2)"), "{message}");
    assert!(refused("cluster.toml", "llama-3-70").contains("hint: did you mean \"llama-3-70b\"?"));
    assert!(place.failure(&format!("{PLAN} --what-if more")).contains("hint: write site=NAME"));
    // A change that cannot be made is told beside the plan.
    assert!(place.text(&format!("{PLAN} --what-if site=olso")).contains("hint: did you mean \"oslo\"?"));
}

/// Every refusal of a cluster names file and place, and what mends it.
#[test]
fn clusters_that_contradict_themselves_say_where_and_what_mends_them() {
    let cases = [
        ("gbit_s = 10", "gbit_s = nan", "link_default: gbit_s = NaN is not between", "give gbit_s its true value"),
        ("\"lyon\"", "\"oslo\"", "line 13, site \"oslo\": another site has that name", "another name"),
        ("\"lyon\"", "\"\\u001b[31m\"", "line 13, site \"\\u{1b}[31m\": the name is empty, ", "short name"),
        ("devices = 64", "devices = 0", "line 6, site \"oslo\": devices = 0 is not between", "its true value"),
        ("devices = 64", "devices = 64.5", "TOML parse error at line 9, column 11", "docs/plan.md"),
        ("devices = 128", "devices = 128\nprecision = \"fp8\"", "A100 SXM4 80GB has no FP8 products", "\"bf16\""),
    ];
    for (from, to, message, hint) in cases {
        let place = Place::with(&[("c.toml", &CLUSTER.replacen(from, to, 1))]);
        let told = place.failure("plan --cluster c.toml --model llama-3-8b");
        assert!(told.starts_with("error: c.toml: ") && told.contains(message), "{told}");
        assert!(told.contains("\nhint: ") && told.contains(hint), "{told}");
    }
    let link = |ends: &str| format!("{CLUSTER}[[link]]\nbetween = [{ends}]\ngbit_s = 1\n");
    for (text, message) in [
        (link("\"oslo\", \"oslo\""), "line 19, link oslo - oslo joins a site with itself"),
        (link("\"oslo\", \"lion\""), "line 19, link oslo - lion names \"lion\", which is no site"),
        (link("\"oslo\", \"lyon\", \"rome\""), "expected the names of two sites"),
        (link("\"oslo\", \"lyon\"") + &link("\"lyon\", \"oslo\"")[CLUSTER.len()..], "another link joins these two"),
    ] {
        let told = Place::with(&[("c.toml", &text)]).failure("plan --cluster c.toml --model llama-3-8b");
        assert!(told.contains(message), "{told}");
    }
}

#[test]
fn what_does_not_fit_says_the_least_change_that_would_do() {
    let home =
        |devices: u32, more: &str| format!("[[site]]\nname = \"home\"\ndevice = \"A100\"\ndevices = {devices}\n{more}");
    let refused = |text: &str, options: &str| {
        Place::with(&[("c.toml", text)]).failure(&format!("plan --cluster c.toml --model llama-3-8b {options}"))
    };
    // The number that is named is enough, and one less is not.
    let told = refused(&home(1, ""), "--sequence 65536");
    let needed: u32 = told.split("give home ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
    assert!(refused(&home(needed - 1, ""), "--sequence 65536").contains(&format!("give home {needed} devices")));
    let enough = Place::with(&[("c.toml", &home(needed, ""))]);
    enough.text("plan --cluster c.toml --model llama-3-8b --sequence 65536");
    // So is the sequence.
    let told = refused(&home(16, ""), "--sequence 16777216 --batch 8 --tokens 1T");
    let tokens: u32 = told.split("--sequence ").nth(1).unwrap().split([' ', '\n']).next().unwrap().parse().unwrap();
    let place = Place::with(&[("c.toml", &home(16, ""))]);
    place.text(&format!("plan --cluster c.toml --model llama-3-8b --batch 8 --tokens 1T --sequence {tokens}"));
    let told = refused(&home(8, "power_limit_kw = 0.001\n"), "--plans 1");
    assert!(told.contains("home: power_limit_kw = 0.001 does not run one of its devices\nhint: raise power"), "{told}");
    let told = refused(&home(8, "tokens_per_second = 1e9\n"), "--plans 1");
    assert!(told.contains("home: tokens_per_second = 1000000000 would be "), "{told}");
    for told in [refused(&home(64, ""), "--tokens 1e6"), refused(&home(64, ""), "--tokens 1,4T")] {
        assert!(told.starts_with("error: --tokens "), "{told}");
    }
}

#[test]
fn what_is_settled_beforehand_is_not_looked_for() {
    let place = Place::with(&[("cluster.toml", CLUSTER)]);
    let plan = |options: &str| place.object(&format!("{PLAN} --plans 1 --all-sites {options}"))["plans"][0].clone();
    let found = plan("--strategy diloco --inner-steps 77 --bits 14 --exchange storage");
    let figure = |name: &str| found[name].as_f64().unwrap();
    assert_eq!((found["strategy"].as_str(), found["exchange"].as_str()), (Some("diloco"), Some("storage")));
    assert_eq!((figure("inner_steps"), figure("bits")), (77.0, 14.0));
    let sparse = plan("--strategy diloco --inner-steps 77 --bits 14 --exchange storage --density 0.015625");
    let sent = |plan: &Value| plan["sent_bytes_per_site_and_round"].as_f64().unwrap();
    assert!((sent(&found) / sent(&sparse) - 64.0).abs() < 1e-6);
    assert_eq!(plan("--strategy synchronous")["sites"].as_array().unwrap().len(), 2);
    let text =
        place.text(&format!("{PLAN} --strategy diloco --inner-steps 77 --bits 14 --density 0.015625 --all-sites"));
    assert!(text.contains("diloco, H = 77, 14 bits of 1.562 % of the values\n"), "{text}");
    let told = place.failure(&format!("{PLAN} --strategy synchronous --inner-steps 30"));
    assert!(told.starts_with("error: --inner-steps 30 is given, but synchronous has none\nhint: leave "), "{told}");
    let told = place.failure(&format!("{PLAN} --density 2"));
    assert!(told.starts_with("error: --density 2 is not between"), "{told}");
    let told = place.failure("plan --cluster cluster.toml --model llama-3-8b --tokens 100M --batch 1024 --strategy diloco --all-sites --inner-steps 300");
    assert!(told.starts_with("error: the run ends before its first merge: "), "{told}");
}

#[test]
fn a_measured_speed_takes_the_place_of_the_predicted_one() {
    let text = CLUSTER.replacen("devices = 64", "devices = 64\ntokens_per_second = 100000", 1);
    let place = Place::with(&[("cluster.toml", &text)]);
    let plan = place.object(&format!("{PLAN} --plans 100"));
    let alone = plan["plans"]
        .as_array()
        .unwrap()
        .iter()
        .find(|plan| plan["sites"].as_array().unwrap().len() == 1 && plan["sites"][0]["name"] == "oslo");
    let speed = alone.unwrap()["tokens_per_second"].as_f64().unwrap();
    assert!((speed / 100_000.0 - 1.0).abs() < 1e-6, "{speed}");
}

#[test]
fn rows_that_no_device_holds_or_that_lack_sense_are_told() {
    let row = |from: &str, to: &str| CASES.replace(from, to);
    let place = Place::with(&[
        ("large.csv", &row(",2048,256,", ",2000000,256,")),
        ("fp8.csv", &row("bf16", "fp8")),
        ("network.csv", &row(",8,200", ",8,1e-300")),
        ("devices.csv", &row("A100,64", "A100,65")),
        ("semicolon.csv", &CASES.replace(',', ";")),
    ]);
    let output = place.run("predict --table large.csv");
    assert!(output.status.success());
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(
        told.starts_with("note: row 1 is predicted, but its ") && told.ends_with("do not fit the device's memory\n"),
        "{told}"
    );
    assert_eq!(place.object("predict --table large.csv")["rows"][0]["fits"], false);
    for (file, message) in [
        (
            "fp8.csv",
            "fp8.csv: row 1, column precision: A100 SXM4 80GB has no FP8 products\nhint: write bf16 into precision of row 1",
        ),
        (
            "network.csv",
            "network.csv: row 1, column interconnect_gbit_s: \"1e-300\" is not a number of Gbit/s from 0.001 to",
        ),
        (
            "devices.csv",
            "devices.csv: row 1, column devices: \"65\" is not tp pp cp dp, 64\nhint: write tp pp cp dp, 64 into",
        ),
        ("semicolon.csv", "semicolon.csv: the header is one cell that holds a semicolon"),
    ] {
        let told = place.failure(&format!("predict --table {file}"));
        assert!(told.starts_with(&format!("error: {message}")), "{told}");
    }
    let known = place.object("devices --catalogue");
    assert!(known["devices"].as_array().unwrap().iter().any(|device| device["name"] == "A100 SXM4 80GB"));
}
