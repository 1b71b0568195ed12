//! Engines beside each other: a run may begin on one and go on on another, optimiser included, and they compute the same.
//!
//! Each engine passes the conformance suite in its own crate; here are the pairs. What the machine lacks is named and left
//! out.

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test's helper may panic, and says what was left out")]

#[path = "support/needs.rs"]
mod needs;

use base::config::TrainSection;
use base::{ModelShape, NamedTensors};
use engine::conformance::{self, Expectations, Factory};
use engine::{Engine, Precision, PrecisionChoice};
use engine_burn::BurnEngine;
use engine_torch::{Compile, ModelDescription, TorchEngine, TorchOptions};
use needs::{no_torch, no_wgpu, python};

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
    if no_torch() {
        return;
    }
    go_on_both_ways(&burn("flex", Precision::F32), &torch, &ACROSS);
}

#[test]
fn the_processor_and_a_gpu_continue_each_other() {
    if no_wgpu() {
        return;
    }
    go_on_both_ways(&burn("flex", Precision::F32), &burn("wgpu", Precision::F32), &ACROSS);
}

#[test]
fn precisions_continue_each_other() {
    let expected = Expectations { precision: Precision::Bf16, repeatable: false };
    go_on_both_ways(&burn("flex", Precision::F32), &burn("flex", Precision::Bf16), &expected);
}
