//! Engines beside each other: a run may begin on one and go on on another, optimiser included, and they compute the same.
//!
//! Each engine passes the conformance suite in its own crate; here are the pairs. What the machine lacks is named and left
//! out; in CI it must be there.

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test's helper may panic, and says what was left out")]

use base::config::TrainSection;
use base::{ModelShape, NamedTensors};
use engine::conformance::{self, Expectations, Factory};
use engine::{Engine, Precision, PrecisionChoice};
use engine_burn::BurnEngine;
use engine_torch::{Compile, ModelDescription, TorchEngine, TorchOptions};
use std::path::PathBuf;
use std::process::{Command, Stdio};

fn left_out(what: &str) {
    assert!(std::env::var_os("CI").is_none(), "{what}: CI must have it");
    eprintln!("left out: {what}");
}

fn python() -> PathBuf {
    std::env::var_os("BERINGIA_PYTHON").map_or_else(|| PathBuf::from("python3"), PathBuf::from)
}

fn burn(
    device: &'static str,
    precision: Precision,
) -> impl Fn(&ModelShape, &TrainSection, &NamedTensors) -> Box<dyn Engine> {
    move |shape, train, initial| {
        Box::new(BurnEngine::new(shape, train, device, PrecisionChoice::Fixed(precision), initial).unwrap())
    }
}

fn torch(shape: &ModelShape, train: &TrainSection, initial: &NamedTensors) -> Box<dyn Engine> {
    let options = TorchOptions {
        precision: PrecisionChoice::Fixed(Precision::F32),
        threads: Some(1),
        compile: Compile::Off,
        python: Some(python()),
        ..TorchOptions::new("cpu")
    };
    Box::new(TorchEngine::new(&ModelDescription::Llama(shape.clone()), train, &options, initial).unwrap())
}

/// What two engines in f32 have in common: figures, not bits.
const ACROSS: Expectations = Expectations { precision: Precision::F32, repeatable: false };

fn go_on_both_ways(first: &Factory<'_>, second: &Factory<'_>, expected: &Expectations) {
    let shape = conformance::tiny_shape(true);
    conformance::continues_elsewhere(first, second, expected, &shape);
    conformance::continues_elsewhere(second, first, expected, &shape);
}

#[test]
fn native_and_pytorch_continue_each_other() {
    let find = "import sys, importlib.util as u; sys.exit(u.find_spec('torch') is None)";
    let found = Command::new(python()).args(["-c", find]).stdin(Stdio::null()).stderr(Stdio::null()).status();
    if !found.is_ok_and(|status| status.success()) {
        return left_out("Python has no torch");
    }
    go_on_both_ways(&burn("flex", Precision::F32), &torch, &ACROSS);
}

#[test]
fn the_processor_and_a_gpu_continue_each_other() {
    if !engine_burn::devices().iter().any(|device| device.engine.starts_with("wgpu")) {
        return left_out("no wgpu adapter");
    }
    go_on_both_ways(&burn("flex", Precision::F32), &burn("wgpu", Precision::F32), &ACROSS);
}

#[test]
fn precisions_continue_each_other() {
    let expected = Expectations { precision: Precision::Bf16, repeatable: false };
    go_on_both_ways(&burn("flex", Precision::F32), &burn("flex", Precision::Bf16), &expected);
}
