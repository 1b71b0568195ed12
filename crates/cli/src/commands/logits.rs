//! `beringia logits`: what the model computes, as numbers, for holding it to another implementation
//! (`python/hf_parity.py`). Hidden: nobody reads logits.

use crate::engines::EngineArgs;
use crate::failure::Failure;
use crate::models::Model;
use crate::output::Output;
use serde::Serialize;
use std::path::PathBuf;

/// Print the logits of one sequence.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Folder of a run, or of a Hugging Face model.
    model: PathBuf,
    /// Token ids, separated by commas.
    #[arg(long, value_delimiter = ',', required = true)]
    tokens: Vec<u32>,
    #[command(flatten)]
    engine: EngineArgs,
}

/// What `--json` prints: positions × vocabulary, row-major.
#[derive(Debug, Serialize)]
struct Report {
    shape: [usize; 2],
    logits: Vec<f32>,
}

/// Runs the command.
pub(crate) fn run(args: Args, output: &Output) -> Result<(), Failure> {
    let model = Model::load(&args.model, output)?;
    let mut engine = args.engine.create(&model.config, &model.parameters)?;
    let logits = engine.logits(&args.tokens)?;
    let vocab_size = model.config.model.vocab_size;
    for row in logits.chunks_exact(vocab_size) {
        let row: Vec<String> = row.iter().map(ToString::to_string).collect();
        output.line(row.join(" "));
    }
    output.object(&Report { shape: [args.tokens.len(), vocab_size], logits });
    Ok(())
}
