//! I7: stopping and going on gives the bits of not stopping.

use crate::support::{Coordinator, Place, Process, assert_identical_after_every_commit};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;
use telemetry::Event;

const SITES: [&str; 3] = ["site-a", "site-b", "site-c"];

/// BLAKE3 of each tensor file of a checkpoint.
fn tensors(checkpoint: &Path) -> BTreeMap<String, String> {
    let files = std::fs::read_dir(checkpoint).unwrap().map(|entry| entry.unwrap().path());
    let files = files.filter(|path| path.extension().is_some_and(|extension| extension == "safetensors"));
    let hash = |path: &Path| base::ContentHash::of(&std::fs::read(path).unwrap()).to_string();
    files.map(|path| (path.file_name().unwrap().to_str().unwrap().to_owned(), hash(&path))).collect()
}

/// A run of three sites from a copy of `from`, up to each of those rounds in turn, with new processes each time.
/// Gives the last summary and the tensors of each site id: parameters, outer momentum, inner moments.
fn run_in_parts(
    place: &Place,
    from: &str,
    name: &str,
    parts: &[u64],
) -> (Value, BTreeMap<u64, BTreeMap<String, String>>) {
    place.copy(from, name);
    let folders = SITES.map(|site| format!("{name}-{site}"));
    let names: Vec<&str> = folders.iter().map(String::as_str).collect();
    let (mut summary, mut ids) = (Value::Null, Vec::new());
    for rounds in parts {
        let coordinator = Coordinator::start(place, name, &["--json", "--rounds", &rounds.to_string()]);
        let sites = coordinator.join_all(place, &names);
        summary = coordinator.process.object();
        ids = sites.into_iter().map(|site| site.object()["site"].as_u64().unwrap()).collect();
        assert_eq!(summary["rounds"], *rounds);
    }
    assert_identical_after_every_commit(place, name, &names);
    let newest = |site: &str| place.join(site).join(format!("checkpoints/round-{:08}", parts.last().unwrap()));
    (summary, ids.into_iter().zip(names).map(|(id, site)| (id, tensors(&newest(site)))).collect())
}

#[test]
fn ten_rounds_of_three_sites_equal_five_and_five() {
    let place = Place::new();
    place.init("new", &["run.name=run", "sync.sites=3", "sync.shares=[1.0, 2.0, 5.0]", "sync.outer_momentum=0.5"]);
    let (whole_summary, whole) = run_in_parts(&place, "new", "whole", &[10]);
    let (parts_summary, parts) = run_in_parts(&place, "new", "parts", &[5, 10]);
    assert!(whole_summary["finished"] == true && parts_summary["finished"] == true);
    assert_eq!(whole.len(), 3);
    for file in ["model", "outer_momentum", "inner_first_moment", "inner_second_moment"] {
        assert!(whole[&0].contains_key(&format!("{file}.safetensors")), "{file}: {:?}", whole[&0].keys());
    }
    assert_eq!(whole, parts);
    assert_ne!(whole[&0]["inner_first_moment.safetensors"], whole[&1]["inner_first_moment.safetensors"]);
    assert_eq!(whole[&0]["model.safetensors"], whole[&1]["model.safetensors"]);
}

/// Trains alone; one thread, so that bits do not depend on the machine.
fn train(place: &Place, run: &str, steps: u64) -> Value {
    place.object(&["train", run, "--threads", "1", "--steps", &steps.to_string()])
}

#[test]
fn twenty_steps_of_one_site_equal_ten_and_ten() {
    let place = Place::new();
    place.init("whole", &["run.name=run", "train.steps=20"]);
    place.copy("whole", "parts");
    let whole = train(&place, "whole", 20);
    let first = train(&place, "parts", 10);
    let parts = train(&place, "parts", 20);
    assert_eq!((&first["step"], &first["finished"]), (&10.into(), &false.into()));
    assert_eq!((&parts["step"], &parts["finished"]), (&20.into(), &true.into()));
    assert_eq!(whole["state_hash"], parts["state_hash"]);
    assert_eq!(whole["tokens"], parts["tokens"]);
    let newest = |run: &str| tensors(&place.join(run).join("checkpoints/round-00000020"));
    assert_eq!(newest("whole"), newest("parts"));
    assert_ne!(first["state_hash"], parts["state_hash"]);
}

#[test]
fn training_stopped_by_a_signal_goes_on_with_the_same_bits() {
    let place = Place::new();
    let steps = 600;
    place.init("whole", &["run.name=run", "train.steps=600", "evaluate.every_rounds=1000"]);
    place.copy("whole", "parts");
    let whole = train(&place, "whole", steps);
    let mut command = place.beringia(&["--json", "train", "parts", "--threads", "1"]);
    let training = Process::start(&place, "train", &mut command);
    place.wait_for_event("parts", "step 7", |event| matches!(event, Event::Step { step: 7, .. }).then_some(()));
    training.terminate();
    let stopped = training.object();
    assert_eq!(stopped["finished"], false, "the signal came before the end: {stopped}");
    let parts = train(&place, "parts", steps);
    assert_eq!((&parts["state_hash"], &parts["step"]), (&whole["state_hash"], &steps.into()));
}
