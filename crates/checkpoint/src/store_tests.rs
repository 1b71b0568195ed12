//! Every way in which a checkpoint can be cut, changed or refused, and that a good one is always left.

use super::*;
use base::HostTensor;
use base::random::Random;
use std::cell::Cell;
use std::rc::Rc;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct State {
    cursor: u64,
    speed: f64,
}

fn state(round: u64) -> State {
    // A third has no short decimal form: the state must come back with the same bits.
    State { cursor: round * 1_000, speed: round as f64 / 3.0 }
}

fn tensors(round: u64) -> NamedTensors {
    let tensor = |shape: &[usize]| HostTensor {
        shape: shape.to_vec(),
        values: (0..shape.iter().product()).map(|index: usize| (index as u64 * 7 + round) as f32 / 3.0).collect(),
    };
    [("model.norm.weight", tensor(&[8])), ("model.embed_tokens.weight", tensor(&[10, 8]))]
        .map(|(name, tensor)| (name.to_owned(), tensor))
        .into()
}

fn save_round(disk: &dyn Disk, root: &Path, round: u64, keep: usize) -> Result<Saved, SaveError> {
    let (model, outer) = (tensors(round), tensors(round + 1_000));
    save_on(disk, root, Round(round), &[("model", &model), ("outer", &outer)], &state(round), keep)
}

fn assert_is_round(loaded: &Loaded<State>, round: u64) {
    assert_eq!(loaded.round, Round(round));
    assert_eq!(loaded.state, state(round));
    assert_eq!(loaded.state.speed.to_bits(), state(round).speed.to_bits());
    assert_eq!(loaded.tensors["model"], tensors(round));
    assert_eq!(loaded.tensors["outer"], tensors(round + 1_000));
    assert_eq!(loaded.tensors.len(), 2);
}

fn rounds(root: &Path) -> Vec<u64> {
    list(root).unwrap().iter().map(|entry| entry.round.0).collect()
}

fn names(root: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(root).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn what_is_saved_is_loaded() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path().join("a/checkpoints");
    let saved = save_round(&RealDisk, &root, 12, 3).unwrap();
    assert_eq!(saved.path, root.join("round-00000012"));
    assert!(saved.warnings.is_empty());
    let on_disk: u64 = fs::read_dir(&saved.path).unwrap().map(|file| file.unwrap().metadata().unwrap().len()).sum();
    assert_eq!(saved.bytes, on_disk);
    let loaded: Loaded<State> = load_latest(&root).unwrap();
    assert_is_round(&loaded, 12);
    assert_eq!(loaded.manifest_hash, saved.manifest_hash);
    assert!(loaded.skipped.is_empty());
    assert_is_round(&load(&saved.path).unwrap(), 12);
}

#[test]
fn equal_content_gives_equal_bytes() {
    let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let hash = |root: &Path| save_round(&RealDisk, root, 5, 2).unwrap().manifest_hash;
    assert_eq!(hash(a.path()), hash(b.path()));
}
