//! One run over unlike engines: native on the CPU, native on a GPU (lavapipe where there is no other), PyTorch.
//!
//! What a test needs and the machine lacks is named, and the test left out.

use crate::needs::{no_torch, no_wgpu};
use crate::support::{
    Coordinator, Place, Process, assert_identical_after_every_commit, assert_ledger_adds_up, wait_for,
};
use serde_json::Value;
use std::process::Command;
use telemetry::Event;

const SITES: [&str; 3] = ["site-a", "site-b", "site-c"];

/// Steps after which a PyTorch site can be met in the middle of a round.
const MANY_STEPS: &str = "train.steps=200000";

/// What a site that computes with `engine` is told.
fn with(engine: &str) -> [&str; 4] {
    ["--engine", engine, "--precision", "f32"]
}

/// Processes that PyTorch engines of this agent run in.
fn torch_children(agent: &Process) -> Vec<u32> {
    let children = Command::new("pgrep").args(["--parent", &agent.id().to_string()]).output().unwrap();
    String::from_utf8(children.stdout).unwrap().lines().map(|line| line.trim().parse().unwrap()).collect()
}

fn signal(process: u32, signal: &str) {
    assert!(Command::new("kill").args([signal, &process.to_string()]).status().unwrap().success());
}

/// Whether a process has ended; one that nobody has waited for yet has.
fn is_gone(process: u32) -> bool {
    let state = Command::new("ps").args(["-o", "state=", "-p", &process.to_string()]).output().unwrap();
    let state = String::from_utf8(state.stdout).unwrap();
    state.trim().is_empty() || state.trim().starts_with('Z')
}

fn reason_of_leaving(place: &Place) -> Option<String> {
    place.events("run").into_iter().find_map(|record| match record.event {
        Event::SiteLeft { reason, .. } if reason != "finished" => Some(reason),
        _ => None,
    })
}

#[test]
fn three_stacks_train_one_model() {
    if no_torch() || no_wgpu() {
        return;
    }
    let place = Place::new();
    place.init("run", &["sync.sites=3", "sync.shares=[3.0, 1.0, 4.0]", "train.steps=16"]);
    let coordinator = Coordinator::start(&place, "run", &["--json"]);
    let sites: Vec<Process> = SITES
        .into_iter()
        .zip(["flex", "wgpu", "torch:cpu"])
        .map(|(site, engine)| coordinator.join(&place, site, &with(engine)))
        .collect();
    let summary = coordinator.process.object();
    assert_eq!((&summary["rounds"], &summary["finished"]), (&4.into(), &true.into()));
    for site in sites {
        assert_eq!(site.object()["state_hash"], summary["state_hash"]);
    }
    assert_identical_after_every_commit(&place, "run", &SITES);
    let ledger = assert_ledger_adds_up(&summary["ledger"]);
    assert_eq!((ledger.committed, ledger.returned, ledger.lost), (4 * 4 * 8, 0, 0));
    let losses = losses_of_last_round(&place);
    assert_eq!(losses.len(), 3, "every site trained in the last round");
}

/// By site.
fn losses_of_last_round(place: &Place) -> Vec<f64> {
    let losses = place.events("run").into_iter().filter_map(|record| match record.event {
        Event::RoundComputed { round, loss_nats, .. } if round.0 == 4 => Some(loss_nats),
        _ => None,
    });
    losses.collect()
}

#[test]
fn a_killed_pytorch_process_is_started_again() {
    if no_torch() {
        return;
    }
    let place = Place::new();
    place.init("run", &["sync.sites=2", "sync.shares=[1.0, 1.0]", MANY_STEPS, "sync.inner_steps=20"]);
    let coordinator = Coordinator::start(&place, "run", &["--json"]);
    let native = coordinator.join(&place, SITES[0], &[]);
    let torch = coordinator.join(&place, SITES[1], &with("torch:cpu"));
    place.wait_for_step(SITES[1], 2);
    let children = torch_children(&torch);
    assert_eq!(children.len(), 1, "one Python process");
    signal(children[0], "-KILL");
    let restarted = place.wait_for_event(SITES[1], "the restart of its engine", |event| match event {
        Event::EngineRestarted { round, .. } => Some(round.0),
        _ => None,
    });
    place.wait_for_commit("run", restarted + 2);
    coordinator.process.terminate();
    let summary = coordinator.process.object();
    for site in [native, torch] {
        assert_eq!(site.object()["state_hash"], summary["state_hash"]);
    }
    assert_identical_after_every_commit(&place, "run", &SITES[..2]);
    assert_eq!(reason_of_leaving(&place), None, "nobody was dropped");
    let ledger = assert_ledger_adds_up(&summary["ledger"]);
    assert_eq!(ledger.lost, 0);
}

#[test]
fn a_pytorch_process_that_hangs_is_named_and_left_behind() {
    if no_torch() {
        return;
    }
    let place = Place::new();
    place.init("run", &["sync.sites=2", "sync.shares=[1.0, 1.0]", MANY_STEPS, "sync.inner_steps=20"]);
    let coordinator = Coordinator::start(&place, "run", &["--json"]);
    let native = coordinator.join(&place, SITES[0], &[]);
    // Above what a step, or the first call of a new process, takes on a busy machine; far under the usual 45 s.
    let torch = coordinator.join(&place, SITES[1], &[&with("torch:cpu")[..], &["--hang-seconds", "12"]].concat());
    place.wait_for_step(SITES[1], 2);
    let children = torch_children(&torch);
    signal(children[0], "-STOP");
    let (engine, seconds) = place.wait_for_event(SITES[1], "the hang of its engine", |event| match event {
        Event::EngineHung { engine, seconds, .. } => Some((engine.clone(), *seconds)),
        _ => None,
    });
    assert_eq!(engine, "torch:cpu");
    assert!(seconds >= 12.0, "named after {seconds} s");
    let ended = torch.end();
    assert!(ended.failure().contains("torch:cpu"), "{}", ended.failure());
    wait_for("the end of the stopped process", || is_gone(children[0]).then_some(()));
    // The others go on without it.
    let newest = place.events("run").iter().filter(|r| matches!(r.event, Event::RoundCommitted { .. })).count() as u64;
    place.wait_for_commit("run", newest + 2);
    assert_eq!(reason_of_leaving(&place).as_deref(), Some("engine_hung"));
    coordinator.process.terminate();
    let summary = coordinator.process.object();
    assert_eq!(native.object()["state_hash"], summary["state_hash"]);
    assert_identical_after_every_commit(&place, "run", &SITES[..2]);
}

#[test]
fn engines_that_cannot_be_had_say_what_is_missing() {
    let place = Place::new();
    place.init("run", &[]);
    let refused = |arguments: &[&str], python: &str, words: &[&str]| {
        let mut command = place.beringia(&[&["train", "run"], arguments].concat());
        let ended = Process::start(&place, "train", command.env("BERINGIA_PYTHON", python)).end();
        let failure = ended.failure();
        for word in words {
            assert!(failure.contains(word), "{arguments:?}: '{word}' is not in: {failure}");
        }
        assert!(failure.contains("hint: "), "{failure}");
    };
    refused(&["--engine", "abacus"], "python3", &["no engine 'abacus'", "flex"]);
    refused(&["--engine", "torch"], "python3", &["needs a device", "torch:cpu"]);
    refused(&["--engine", "rocm"], "python3", &["rocm", "--features rocm"]);
    refused(&["--engine", "torch:cpu"], "no-such-python", &["no-such-python", "install"]);
    refused(&["--engine", "wgpu:99"], "python3", &["wgpu:99"]);
    // Nothing was changed by any of them.
    assert!(!place.join("run/checkpoints/round-00000001").exists());
}

#[test]
fn pytorch_refuses_devices_and_plug_ins_that_are_not_there() {
    if no_torch() {
        return;
    }
    let place = Place::new();
    place.init("run", &[]);
    for (engine, words) in [
        ("torch:npu", ["torch_npu", "pip install torch_npu"]),
        ("torch:musa", ["torch_musa", "install"]),
        ("torch:mlu", ["torch_mlu", "install"]),
        ("torch:cuda:99", ["cuda:99", "torch"]),
        ("torch:abacus", ["abacus", "torch"]),
    ] {
        let ended = place.ended(&["train", "run", "--engine", engine]);
        for word in words {
            assert!(ended.failure().contains(word), "{engine}: '{word}' is not in: {}", ended.failure());
        }
    }
}

#[test]
fn another_family_of_models_trains_on_two_pytorch_sites() {
    if no_torch() {
        return;
    }
    let place = Place::new();
    let config = r#"{"model_type": "gpt2", "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}"#;
    std::fs::write(place.join("config.json"), config).unwrap();
    let arguments = ["init", "run", "--data", "texts", "--vocabulary", "300", "--model-config", "config.json"];
    let settings = ["sync.sites=2", "train.steps=8", "sync.inner_steps=4", "evaluate.sample_tokens=0"];
    let settings: Vec<&str> = settings.iter().flat_map(|setting| ["--set", setting]).collect();
    let made: Value = place.object(&[&arguments[..], &settings].concat());
    assert!(made["parameters"].as_u64().unwrap() > 30_000);
    let coordinator = Coordinator::start(&place, "run", &["--json"]);
    let sites = SITES[..2].iter().map(|site| coordinator.join(&place, site, &with("torch:cpu")));
    let sites: Vec<Process> = sites.collect();
    let summary = coordinator.process.object();
    assert_eq!((&summary["rounds"], &summary["finished"]), (&2.into(), &true.into()));
    for site in sites {
        assert_eq!(site.object()["state_hash"], summary["state_hash"]);
    }
    assert_identical_after_every_commit(&place, "run", &SITES[..2]);
    let native = place.ended(&["eval", "run"]);
    assert!(native.failure().contains("Llama"), "{}", native.failure());
}
