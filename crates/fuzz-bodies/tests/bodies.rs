//! Every fuzz body over its corpora and over mutations of them: what `cargo fuzz` does for minutes, in seconds and everywhere.
//!
//! The mutations are the same in every run, unless `FUZZ_SEED` names others; a failure prints the input, and the seed with it.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stderr,
    reason = "a test's helper may panic, and a seed must be seen"
)]

use base::random::Random;
use fuzz_bodies::{TARGETS, Target, mutate::mutated};
use std::collections::BTreeSet;
use std::fmt::Write;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};

const SEED: u64 = 20_261_123;

fn fuzz_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz")
}

fn names_in(folder: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// The corpora in the repository, and those that the generator makes today.
fn corpora(target: &Target) -> Vec<Vec<u8>> {
    let folder = fuzz_folder().join("corpus").join(target.name);
    let stored = names_in(&folder).into_iter().map(|name| fs::read(folder.join(name)).unwrap());
    stored.chain((target.seeds)().into_iter().map(|(_, input)| input)).collect()
}

/// Runs a body; where it fails, says with what.
fn check(target: &Target, input: &[u8], about: &str) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| (target.body)(input))) {
        let hex = input.iter().take(2_000).fold(String::new(), |mut hex, byte| {
            write!(hex, "{byte:02x}").unwrap();
            hex
        });
        eprintln!("{}: {about}, {} bytes: {hex}", target.name, input.len());
        resume_unwind(panic);
    }
}

fn seed() -> u64 {
    std::env::var("FUZZ_SEED").map_or(SEED, |text| text.parse().expect("FUZZ_SEED is a number"))
}

/// Over the corpora and `mutations` of them: a part of the targets, so that several threads share the work.
fn run_part(part: usize) {
    let seed = seed();
    for (index, target) in TARGETS.iter().enumerate().filter(|(index, _)| index % PARTS == part) {
        let corpora = corpora(target);
        corpora.iter().for_each(|input| check(target, input, "of the corpora"));
        let mut random = Random::new(seed, index as u64);
        for mutation in 0..target.mutations {
            let [original, other] = [0; 2].map(|_| &corpora[random.next_below(corpora.len() as u64) as usize]);
            let input = mutated(&mut random, original, other);
            check(target, &input, &format!("mutation {mutation} with FUZZ_SEED={seed}"));
        }
    }
}

const PARTS: usize = 4;

#[test]
fn nothing_that_was_found_or_is_nearly_right_breaks_a_parser_1_of_4() {
    run_part(0);
}

#[test]
fn nothing_that_was_found_or_is_nearly_right_breaks_a_parser_2_of_4() {
    run_part(1);
}

#[test]
fn nothing_that_was_found_or_is_nearly_right_breaks_a_parser_3_of_4() {
    run_part(2);
}

#[test]
fn nothing_that_was_found_or_is_nearly_right_breaks_a_parser_4_of_4() {
    run_part(3);
}

#[test]
fn every_body_has_its_fuzz_target_and_its_corpora() {
    let names: BTreeSet<String> = TARGETS.iter().map(|target| target.name.to_owned()).collect();
    assert_eq!(names.len(), TARGETS.len(), "two targets have one name");
    let sources: BTreeSet<String> = names.iter().map(|name| format!("{name}.rs")).collect();
    assert_eq!(names_in(&fuzz_folder().join("fuzz_targets")), sources);
    assert_eq!(names_in(&fuzz_folder().join("corpus")), names);
    let manifest = fs::read_to_string(fuzz_folder().join("Cargo.toml")).unwrap();
    for name in &names {
        assert!(manifest.contains(&format!("name = \"{name}\"\n")), "fuzz/Cargo.toml has no binary {name}");
        let source = fs::read_to_string(fuzz_folder().join(format!("fuzz_targets/{name}.rs"))).unwrap();
        assert!(source.contains(&format!("::{name}(bytes)")), "{name}.rs calls another body");
    }
}
