//! `beringia eval`: how well a model predicts a text.
//!
//! The text is encoded whole, without beginning- or end-of-text tokens. Window k holds the tokens [kT, kT + T], so that T + 1
//! tokens predict T, neighbours share one, and every token but the first is predicted once; the last window may be
//! shorter. T is the run's `sequence_length`, or the longest sequence of a Hugging Face model.
//! ```text
//! nats per token = Σ -ln p(token | tokens before it in its window) / predicted tokens
//! bits per byte  = the same sum / (ln 2 · UTF-8 bytes of the predicted tokens)
//! ```
//! Without a text, a run is measured on its own validation samples, beside the bigram model of its training tokens.

use crate::engines::EngineArgs;
use crate::failure::Failure;
use crate::format::{bytes, count};
use crate::models::Model;
use crate::output::Output;
use crate::progress::Progress;
use base::TokenBatch;
use data::{BigramModel, Split, TextTokenizer, ValidationSet, bits_per_byte};
use engine::{Engine, LossSum};
use serde::Serialize;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Longest text that is read, bytes: with its tokens (4 bytes each, at worst one a byte) 1.3 GB of memory.
const TEXT_BYTES_MAX: u64 = 256 << 20;

/// Measure how well a model predicts text: nats per token and bits per byte.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Folder of a run, or of a Hugging Face model.
    model: PathBuf,
    /// UTF-8 text to predict; without one, a run's own validation text.
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    #[command(flatten)]
    engine: EngineArgs,
}

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Report {
    /// What was measured.
    model: String,
    /// On what: a file, or `validation`.
    text: String,
    nats_per_token: f64,
    bits_per_byte: f64,
    /// Predicted tokens.
    tokens: u64,
    /// UTF-8 bytes of the predicted tokens.
    bytes: u64,
    seconds: f64,
    /// Of the bigram model on the same samples, where the run's validation text was measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    bigram_bits_per_byte: Option<f64>,
}

/// Token windows to predict, and the UTF-8 bytes of what is predicted.
struct Windows {
    batches: Vec<TokenBatch>,
    bytes: u64,
    name: String,
    bigram_bits_per_byte: Option<f64>,
}

/// Runs the command.
pub(crate) fn run(args: Args, output: &Output) -> Result<(), Failure> {
    let model = Model::load(&args.model, output)?;
    let mut engine = args.engine.create(&model.config, &model.parameters)?;
    let windows = match &args.text {
        Some(path) => text_windows(&model, path)?,
        None => validation_windows(&model)?,
    };
    let started = Instant::now();
    let loss = measure(&mut *engine, &windows.batches, output)?;
    let report = Report {
        model: model.name,
        text: windows.name,
        nats_per_token: loss.nats / loss.tokens as f64,
        bits_per_byte: bits_per_byte(loss.nats, windows.bytes),
        tokens: loss.tokens,
        bytes: windows.bytes,
        seconds: started.elapsed().as_secs_f64(),
        bigram_bits_per_byte: windows.bigram_bits_per_byte,
    };
    print(&report, output);
    output.object(&report);
    Ok(())
}

fn measure(engine: &mut dyn Engine, batches: &[TokenBatch], output: &Output) -> Result<LossSum, Failure> {
    let mut progress = Progress::new(output, "evaluating", batches.len() as u64);
    let mut sum = LossSum::default();
    for (index, batch) in batches.iter().enumerate() {
        let loss = engine.evaluate(batch)?;
        sum.nats += loss.nats;
        sum.tokens += loss.tokens;
        progress.set(index as u64 + 1);
    }
    if sum.nats.is_finite() {
        return Ok(sum);
    }
    let message = format!("the loss is {}, not a finite number", sum.nats);
    Err(Failure::new(message, "the model is damaged: use an earlier checkpoint"))
}

/// The windows of a text file.
fn text_windows(model: &Model, path: &Path) -> Result<Windows, Failure> {
    let text = read_text(path)?;
    let tokenizer = model.tokenizer()?;
    let tokens = tokenizer.encode(&text)?;
    if tokens.len() < 2 {
        let message = format!("{} has {} tokens; 2 are needed to predict one", path.display(), tokens.len());
        return Err(Failure::new(message, "name a longer text with --text FILE"));
    }
    Ok(Windows {
        batches: cut(&tokens, model.config.data.sequence_length, model.config.train.micro_batch_samples),
        bytes: text_bytes(&tokenizer, &tokens[1..]),
        name: path.display().to_string(),
        bigram_bits_per_byte: None,
    })
}

fn text_bytes(tokenizer: &TextTokenizer, tokens: &[u32]) -> u64 {
    tokens.iter().map(|token| tokenizer.token_bytes(*token) as u64).sum()
}

/// Windows of `sequence_length` + 1 tokens with stride `sequence_length`, whole ones `samples_max` at a time.
fn cut(tokens: &[u32], sequence_length: usize, samples_max: usize) -> Vec<TokenBatch> {
    let starts: Vec<usize> = (0..tokens.len() - 1).step_by(sequence_length).collect();
    let window = |start: &usize| &tokens[*start..tokens.len().min(start + sequence_length + 1)];
    let (whole, partial): (Vec<_>, Vec<_>) =
        starts.iter().map(window).partition(|window| window.len() == sequence_length + 1);
    let batch = |windows: &[&[u32]]| TokenBatch {
        samples: windows.len(),
        sequence_length: windows[0].len() - 1,
        tokens: windows.concat(),
    };
    whole.chunks(samples_max.max(1)).chain(partial.chunks(1)).map(batch).collect()
}

fn read_text(path: &Path) -> Result<String, Failure> {
    let hint = "name a UTF-8 text file with --text FILE";
    let fail = |reason: String| Failure::new(format!("{}: {reason}", path.display()), hint);
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|file| file.take(TEXT_BYTES_MAX + 1).read_to_end(&mut bytes));
    read.map_err(|error| fail(error.to_string()))?;
    if bytes.len() as u64 > TEXT_BYTES_MAX {
        return Err(fail(format!("longer than the {TEXT_BYTES_MAX} bytes that are read")));
    }
    String::from_utf8(bytes).map_err(|error| fail(format!("is not UTF-8 text: {}", error.utf8_error())))
}

/// The validation samples that a run is measured on while it trains.
fn validation_windows(model: &Model) -> Result<Windows, Failure> {
    let Some(run) = &model.run else {
        let hint = "name one: `beringia eval FOLDER --text FILE`";
        return Err(Failure::new(format!("{} has no validation text of its own", model.name), hint));
    };
    let config = &model.config;
    let dataset = run.dataset(config, Split::Validation, false)?;
    let tokenizer = dataset.tokenizer(&run.data())?;
    let (sequence_length, samples_max) = (config.data.sequence_length, config.evaluate.samples_max);
    let set = ValidationSet::select(&dataset, &tokenizer, sequence_length, samples_max)?;
    let bigram = BigramModel::fit_dataset(&run.dataset(config, Split::Train, false)?)?.score(&set)?;
    Ok(Windows {
        batches: set.batches(config.train.micro_batch_samples).collect(),
        bytes: set.bytes,
        name: Split::Validation.to_string(),
        bigram_bits_per_byte: Some(bigram.bits_per_byte),
    })
}

fn print(report: &Report, output: &Output) {
    output.line(format_args!("model      {}", report.model));
    let (tokens, text_bytes) = (count(report.tokens), bytes(report.bytes));
    output.line(format_args!("text       {}: {tokens} predicted tokens, {text_bytes}", report.text));
    output.line(format_args!("loss       {:.4} nats per token", report.nats_per_token));
    output.line(format_args!("           {:.4} bits per byte", report.bits_per_byte));
    if let Some(bigram) = report.bigram_bits_per_byte {
        let change = 100.0 * (report.bits_per_byte / bigram - 1.0);
        let side = if change < 0.0 { "under" } else { "over" };
        output.line(format_args!("bigram     {bigram:.4} bits per byte; the model is {:.1} % {side} it", change.abs()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_token_but_the_first_is_predicted_once() {
        for length in 2..40u32 {
            let tokens: Vec<u32> = (0..length).collect();
            let batches = cut(&tokens, 8, 2);
            let predicted: Vec<u32> = batches
                .iter()
                .flat_map(|batch| batch.tokens.chunks_exact(batch.sequence_length + 1))
                .flat_map(|window| window[1..].to_vec())
                .collect();
            assert_eq!(predicted, tokens[1..]);
            assert!(batches.iter().all(|batch| batch.samples <= 2));
        }
    }
}
