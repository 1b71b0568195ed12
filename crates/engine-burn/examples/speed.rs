//! Inner steps per second of this engine, for `cargo xtask bench engine`.
//!
//! Reads a number of steps per line from standard input, runs them, and answers with one line of JSON, until the input ends:
//! so that two engines can take turns in one run. Threads: `RAYON_NUM_THREADS`. The argument is a device, `composed` for Burn's operations on the CPU, or
//! nothing for its fused blocks.
#![allow(clippy::print_stdout)] // The answers are this program's output.

use base::{ModelShape, TokenBatch};
use engine::{Engine, PrecisionChoice, conformance};
use engine_burn::{BlockKernels, BurnEngine};
use std::io::{BufRead, Write};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let shape = bench_shape();
    let train = base::config::TrainSection::default();
    let initial = engine::initial_parameters(&shape, 1);
    let mut engine = match std::env::args().nth(1).as_deref() {
        None => BurnEngine::with_kernels(&shape, &train, "flex", &initial, BlockKernels::Fused)?,
        Some("composed") => BurnEngine::with_kernels(&shape, &train, "flex", &initial, BlockKernels::Composed)?,
        Some(device) => BurnEngine::new(&shape, &train, device, PrecisionChoice::Auto, &initial)?,
    };
    let mut seed = 0;
    for line in std::io::stdin().lock().lines() {
        let batches: Vec<TokenBatch> = (0..line?.trim().parse::<u64>()?)
            .map(|index| conformance::random_batch(&shape, 8, 256, seed + index))
            .collect();
        seed += batches.len() as u64;
        let start = std::time::Instant::now();
        let mut loss_nats = f64::NAN;
        for batch in &batches {
            loss_nats = engine.inner_step(batch, 1e-3)?.loss_nats;
        }
        let seconds = start.elapsed().as_secs_f64();
        let tokens: u64 = batches.iter().map(TokenBatch::predicted_tokens).sum();
        println!(
            "{{\"tokens_per_second\": {:.1}, \"loss_nats\": {loss_nats:.4}, \"memory_peak_bytes\": {}, \"threads\": {}}}",
            tokens as f64 / seconds,
            memory_peak_bytes(),
            engine.device().threads,
        );
        std::io::stdout().flush()?;
    }
    Ok(())
}

/// The model of the comparison: 4.9 million parameters.
fn bench_shape() -> ModelShape {
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
        tie_word_embeddings: false,
    }
}

/// VmHWM of this process, 0 where the system does not tell.
fn memory_peak_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.trim().trim_end_matches("kB").trim().parse::<u64>().ok()).unwrap_or(0) * 1024
}
