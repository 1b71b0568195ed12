//! What the seam between the agent and PyTorch costs: `cargo run --release -p engine-torch --example seam -- cpu [THREADS] [on]`,
//! where `on` turns `torch.compile` on.
//!
//! One model of 4.95M parameters (h 256, 6 layers, 8 heads, f 704, vocabulary 512), T 256, batch 8. A step as
//! the agent sees it, over the same step as Python times it; and bytes a second of all parameters read, written, and
//! written with the optimiser remembered.
#![allow(clippy::print_stdout)] // It is a program that prints.

use base::config::TrainSection;
use base::{Fragment, ModelShape};
use engine::conformance::random_batch;
use engine::{Engine, EngineError, initial_parameters};
use engine_torch::{Compile, ModelDescription, TorchEngine, TorchOptions};
use std::time::Instant;

const STEPS: u64 = 10;
const COPIES: u32 = 20;

fn shape() -> ModelShape {
    ModelShape {
        vocab_size: 512,
        hidden_size: 256,
        intermediate_size: 704,
        num_hidden_layers: 6,
        num_attention_heads: 8,
        num_key_value_heads: 8,
        max_position_embeddings: 256,
        rope_theta: 10_000.0,
        rms_norm_eps: 1e-5,
        tie_word_embeddings: true,
    }
}

fn main() -> Result<(), EngineError> {
    let mut arguments = std::env::args().skip(1);
    let device = arguments.next().unwrap_or_else(|| "cpu".to_owned());
    let threads = arguments.next().and_then(|count| count.parse().ok()).unwrap_or(1);
    let compile = if arguments.next().as_deref() == Some("on") { Compile::On } else { Compile::Off };
    let options = TorchOptions { threads: Some(threads), compile, ..TorchOptions::new(device) };
    let shape = shape();
    let model = ModelDescription::Llama(shape.clone());
    let start = Instant::now();
    let initial = initial_parameters(&shape, 1);
    let mut engine = TorchEngine::new(&model, &TrainSection::default(), &options, &initial)?;
    println!("{}, {}, up in {:.2} s", engine.device().name, engine.versions(), start.elapsed().as_secs_f64());
    print_steps(&mut engine, &shape)?;
    print_copies(&mut engine)
}

fn print_steps(engine: &mut TorchEngine, shape: &ModelShape) -> Result<(), EngineError> {
    let mut ratios = Vec::new();
    for step in 0..STEPS + 2 {
        let batch = random_batch(shape, 8, 256, step);
        let start = Instant::now();
        let inside = engine.inner_step(&batch, 1e-3)?.seconds;
        let outside = start.elapsed().as_secs_f64();
        // Two steps warm it up.
        if step >= 2 {
            ratios.push((outside / inside, outside - inside, inside));
        }
    }
    ratios.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (ratio, added, inside) = ratios[ratios.len() / 2];
    println!(
        "a step: {inside:.4} s in Python, {:.1} us more outside, ratio {ratio:.5} (median of {STEPS})",
        added * 1e6
    );
    Ok(())
}

fn print_copies(engine: &mut TorchEngine) -> Result<(), EngineError> {
    let elements = engine.schema().elements();
    let mut values = vec![0.0; elements];
    // All parameters but one: such a write is not remembered for `recover`.
    let part = Fragment { index: 0, ranges: std::iter::once(0..elements - 1).collect() };
    let whole = engine.schema().whole();
    let mut time = |what: &str, act: &mut dyn FnMut(&mut TorchEngine) -> Result<(), EngineError>| {
        act(engine)?;
        let start = Instant::now();
        (0..COPIES).try_for_each(|_| act(engine))?;
        let seconds = start.elapsed().as_secs_f64() / f64::from(COPIES);
        println!("{what}: {:.2} ms, {:.2} GB/s", seconds * 1e3, elements as f64 * 4.0 / seconds / 1e9);
        Ok::<(), EngineError>(())
    };
    time("read_fragment", &mut |engine| engine.read_fragment(&whole, &mut values))?;
    time("write_fragment", &mut |engine| engine.write_fragment(&part, &values[1..]))?;
    time("write_fragment, remembered", &mut |engine| engine.write_fragment(&whole, &values))
}
