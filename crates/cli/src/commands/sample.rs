//! `beringia sample`: text from a model, as it is drawn.

use crate::engines::EngineArgs;
use crate::failure::Failure;
use crate::models::Model;
use crate::output::Output;
use serde::Serialize;
use site::sampling::{SampleOptions, sample};
use std::path::PathBuf;
use std::time::Instant;

/// Most tokens that one command draws.
const TOKENS_MAX: i64 = 1_000_000;

/// Write text from a run's newest checkpoint, or from a Hugging Face folder.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Folder of a run, or of a Hugging Face model.
    model: PathBuf,
    /// Text to continue; without one a document is begun.
    #[arg(default_value = "")]
    prompt: String,
    /// Most tokens to write; the end of a document ends it before.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(0..=TOKENS_MAX))]
    tokens: u32,
    /// 0 always takes the likeliest token; 1 draws as the model predicts.
    #[arg(long, default_value_t = 0.8)]
    temperature: f64,
    /// Draw among the K likeliest tokens only; 0 for all.
    #[arg(long, value_name = "K", default_value_t = 40)]
    top_k: usize,
    /// Equal seeds give equal text.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    #[command(flatten)]
    engine: EngineArgs,
}

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Report {
    model: String,
    prompt: String,
    text: String,
    tokens: usize,
    seed: u64,
    seconds: f64,
    tokens_per_second: f64,
}

/// Runs the command.
pub(crate) fn run(args: Args, output: &Output) -> Result<(), Failure> {
    let model = Model::load(&args.model, output)?;
    let mut engine = args.engine.create(&model.config, &model.parameters)?;
    let tokenizer = model.tokenizer()?;
    let prompt = tokenizer.encode(&args.prompt)?;
    let options = SampleOptions {
        tokens: args.tokens as usize,
        temperature: args.temperature,
        top_k: args.top_k,
        seed: args.seed,
    };
    let started = Instant::now();
    let mut text = String::new();
    output.text(&args.prompt);
    let sequence_length = model.config.data.sequence_length;
    let drawn = sample(&mut *engine, &tokenizer, &prompt, &options, sequence_length, &mut |piece| {
        output.text(piece);
        text.push_str(piece);
    });
    output.line("");
    let tokens = drawn?.len();
    let seconds = started.elapsed().as_secs_f64();
    output.object(&Report {
        model: model.name,
        prompt: args.prompt,
        text,
        tokens,
        seed: args.seed,
        seconds,
        tokens_per_second: tokens as f64 / seconds,
    });
    Ok(())
}
