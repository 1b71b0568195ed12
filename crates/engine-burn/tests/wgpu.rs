//! The suite that every engine passes, on the first adapter of this machine: a GPU, or lavapipe.
#![cfg(feature = "wgpu")]
#![allow(clippy::unwrap_used)] // Helpers of tests may panic, as the tests do.
#![allow(clippy::print_stderr)] // A test that was left out says so.

use base::config::TrainSection;
use base::{ModelShape, TokenBatch};
use engine::conformance::{self, Expectations};
use engine::{Engine, EngineError, Precision, PrecisionChoice};
use engine_burn::{BurnEngine, devices, measure_rates};

/// Whether there is an adapter. Without one the tests pass and say that they were left out, but not in CI.
fn has_adapter() -> bool {
    let found = devices().iter().any(|device| device.engine == "wgpu:0");
    assert!(found || std::env::var_os("CI").is_none(), "CI needs an adapter: install mesa-vulkan-drivers");
    if !found {
        eprintln!("left out: no wgpu adapter on this machine");
    }
    found
}

fn engine(shape: &ModelShape, train: &TrainSection) -> BurnEngine {
    let initial = engine::initial_parameters(shape, 1);
    BurnEngine::new(shape, train, "wgpu", PrecisionChoice::Fixed(Precision::F32), &initial).unwrap()
}

#[test]
fn the_first_adapter_conforms() {
    if !has_adapter() {
        return;
    }
    conformance::run_all(
        &|shape, train, initial| {
            let precision = PrecisionChoice::Fixed(Precision::F32);
            Box::new(BurnEngine::new(shape, train, "wgpu", precision, initial).unwrap())
        },
        &Expectations { precision: Precision::F32, repeatable: false },
    );
}

#[test]
fn adapters_are_listed_with_what_their_drivers_tell() {
    if !has_adapter() {
        return;
    }
    let listed = devices();
    let engines: Vec<&str> = listed.iter().map(|device| device.engine.as_str()).collect();
    assert_eq!(engines[..2], ["flex", "wgpu:0"]);
    for device in &listed[1..] {
        assert!(!device.name.is_empty() && !device.maker.is_empty() && !device.driver.is_empty(), "{device:?}");
    }
    let shape = conformance::tiny_shape(true);
    let opened = engine(&shape, &TrainSection::default()).device();
    assert_eq!(opened.engine, "wgpu:0", "wgpu is the first adapter");
    assert_eq!(opened.name, listed[1].name);
}

#[test]
fn an_index_too_high_is_refused_with_what_there_is() {
    if !has_adapter() {
        return;
    }
    let shape = conformance::tiny_shape(true);
    let initial = engine::initial_parameters(&shape, 1);
    let build = |name| BurnEngine::new(&shape, &TrainSection::default(), name, PrecisionChoice::Auto, &initial);
    let refused = build("wgpu:99").unwrap_err();
    assert!(matches!(&refused, EngineError::Device { device, .. } if device == "wgpu:99"), "{refused:?}");
    assert!(refused.to_string().contains("this machine has wgpu:0 to wgpu:"), "{refused}");
}

#[test]
fn rates_are_measured() {
    if !has_adapter() {
        return;
    }
    let rates = measure_rates("wgpu", 0.5).unwrap();
    for rate in [rates.matrix_f32_tflops, rates.copy_gigabytes_per_second] {
        assert!(rate.is_some_and(|rate| rate.is_finite() && rate > 0.0), "{rates:?}");
    }
}

/// Logits of 2^20 ids a row: 2^15 rows take 128 GiB in one piece, which no adapter binds; 8 rows take 32 MiB.
#[test]
fn a_batch_too_large_changes_nothing_and_a_smaller_micro_batch_fits() {
    if !has_adapter() {
        return;
    }
    let shape = ModelShape {
        vocab_size: 1 << 20,
        hidden_size: 4,
        num_attention_heads: 2,
        num_key_value_heads: 1,
        ..conformance::tiny_shape(true)
    };
    let train = TrainSection { micro_batch_samples: 1 << 14, ..TrainSection::default() };
    let mut engine = engine(&shape, &train);
    let large = TokenBatch { samples: 1 << 14, sequence_length: 2, tokens: vec![7; 3 << 14] };
    let before = engine.save().unwrap();
    let refused = engine.inner_step(&large, 1e-3).unwrap_err();
    assert!(matches!(&refused, EngineError::OutOfMemory { device, .. } if device == "wgpu:0"), "{refused:?}");
    assert!(matches!(engine.evaluate(&large), Err(EngineError::OutOfMemory { .. })));
    assert_eq!(engine.save().unwrap(), before);
    engine.set_micro_batch_samples(4);
    let small = large.slice(0..8);
    let report = engine.inner_step(&small, 1e-3).unwrap();
    assert!(report.loss_nats.is_finite());
}
