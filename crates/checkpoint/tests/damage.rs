//! Bits that flip and ends that go missing in a checkpoint on disk: each is noticed, and the checkpoint before it is taken.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test's helper may panic, and a seed must be seen")]

use base::random::Random;
use base::{HostTensor, NamedTensors, Round};
use checkpoint::{load, load_latest, save};
use std::fs;
use std::path::{Path, PathBuf};

const DAMAGES: u64 = 1_000;

/// The same in every run, unless `FUZZ_SEED` names another.
const SEED: u64 = 20_261_123;

/// What a site saves, small: parameters, momentum, moments, and its place in the run.
fn tensors(round: u64) -> Vec<(&'static str, NamedTensors)> {
    let tensor = |shape: &[usize], first: u64| HostTensor {
        shape: shape.to_vec(),
        values: (0..shape.iter().product()).map(|index: usize| (first + index as u64) as f32 / 7.0).collect(),
    };
    let named = |first| {
        let matrix = ("layers.0.weight".to_owned(), tensor(&[12, 8], first));
        NamedTensors::from([matrix, ("norm.weight".to_owned(), tensor(&[8], first + 3))])
    };
    ["model", "outer_momentum", "inner_first_moment"].into_iter().map(|stem| (stem, named(round))).collect()
}

fn state(round: u64) -> serde_json::Value {
    serde_json::json!({ "step": 20 * round, "tokens": 1_000 * round, "seed": 1 })
}

fn save_round(root: &Path, round: u64) -> PathBuf {
    let tensors = tensors(round);
    let named: Vec<_> = tensors.iter().map(|(stem, tensors)| (*stem, tensors)).collect();
    save(root, Round(round), &named, &state(round), 2).unwrap().path
}

/// One flipped bit, or any part of the end missing.
fn damaged(random: &mut Random, whole: &[u8]) -> (Vec<u8>, String) {
    if random.next_below(2) == 0 {
        let length = random.next_below(whole.len() as u64) as usize;
        return (whole[..length].to_vec(), format!("cut to {length} of {} bytes", whole.len()));
    }
    let bit = random.next_below(8 * whole.len() as u64) as usize;
    let mut bytes = whole.to_vec();
    bytes[bit / 8] ^= 1 << (bit % 8);
    (bytes, format!("bit {bit} flipped"))
}

#[test]
fn a_thousand_truncations_and_flipped_bits_are_all_refused_and_the_checkpoint_before_is_taken() {
    let seed = std::env::var("FUZZ_SEED").map_or(SEED, |text| text.parse().unwrap());
    eprintln!("FUZZ_SEED={seed}");
    let mut random = Random::new(seed, 0);
    let root = tempfile::tempdir().unwrap();
    save_round(root.path(), 1);
    let newest = save_round(root.path(), 2);
    let mut files: Vec<PathBuf> = fs::read_dir(&newest).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    // Three files of tensors, the state, the manifest and its seal.
    assert_eq!(files.len(), 6, "{files:?}");
    let before: std::collections::BTreeMap<String, NamedTensors> =
        tensors(1).into_iter().map(|(stem, tensors)| (stem.to_owned(), tensors)).collect();
    for number in 0..DAMAGES {
        let file = &files[random.next_below(files.len() as u64) as usize];
        let whole = fs::read(file).unwrap();
        let (bytes, what) = damaged(&mut random, &whole);
        fs::write(file, &bytes).unwrap();
        let about = format!("number {number} with FUZZ_SEED={seed}: {}, {what}", file.display());
        load::<serde_json::Value>(&newest).map(|_| panic!("loaded {about}")).unwrap_err();
        let loaded = load_latest::<serde_json::Value>(root.path()).unwrap_or_else(|error| panic!("{about}: {error}"));
        assert_eq!((loaded.round, &loaded.tensors, loaded.state), (Round(1), &before, state(1)), "{about}");
        assert_eq!(loaded.skipped.len(), 1, "{about}");
        fs::write(file, whole).unwrap();
    }
    assert_eq!(load_latest::<serde_json::Value>(root.path()).unwrap().round, Round(2));
}
