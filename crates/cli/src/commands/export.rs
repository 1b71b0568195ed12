//! `beringia export`: a run's newest model in a form that other programs load.

use crate::failure::Failure;
use crate::models::Model;
use crate::output::Output;
use data::Manifest;
use serde::Serialize;
use std::path::PathBuf;

/// Where an export goes unless told otherwise, within the run's folder.
const FOLDER_DEFAULT: &str = "hf";

/// Write the newest model as a folder that Hugging Face's transformers loads.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Folder of the run.
    run: PathBuf,
    /// Form of the export.
    #[arg(long, value_enum)]
    to: Format,
    /// Folder to write; `hf` in the run's folder unless given.
    #[arg(long, visible_alias = "output", value_name = "FOLDER")]
    out: Option<PathBuf>,
}

/// Forms that other programs load.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    /// config.json, model.safetensors in f32 and tokenizer.json, as `save_pretrained` writes them.
    Hf,
}

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Report {
    model: String,
    folder: PathBuf,
    parameters: usize,
}

/// Runs the command.
pub(crate) fn run(args: Args, output: &Output) -> Result<(), Failure> {
    let Format::Hf = args.to;
    let model = Model::load(&args.run, output)?;
    let Some(run) = &model.run else {
        let message = format!("{} is a Hugging Face folder already", args.run.display());
        return Err(Failure::new(message, "name the folder of a run: `beringia export RUN --to hf`"));
    };
    let folder = args.out.unwrap_or_else(|| args.run.join(FOLDER_DEFAULT));
    let manifest = Manifest::read(&run.data())?;
    // Refuses a tokenizer that is not the one of the run's tokens.
    data::dataset::load_tokenizer(&run.data(), &manifest)?;
    let tokenizer = run.data().join(&manifest.tokenizer.name);
    let (shape, end_of_text) = (&model.config.model, Some(manifest.end_of_text));
    let schema = model.config.schema();
    match &model.config.transformers {
        None => checkpoint::export(&folder, shape, &model.parameters, Some(&tokenizer), end_of_text)?,
        Some(section) => {
            let config = serde_json::from_str(&section.config).map_err(|error| {
                Failure::new(format!("[transformers] config: {error}"), "restore run.toml as `beringia init` wrote it")
            })?;
            let (tensors, tokenizer) = (&model.parameters, Some(tokenizer.as_path()));
            checkpoint::export_described(&folder, &schema, shape, config, tensors, tokenizer, end_of_text)?;
        }
    }
    output.line(format_args!("wrote      {}: {}", folder.display(), model.name));
    output.line(format_args!(
        "load it    AutoModelForCausalLM.from_pretrained(\"{0}\"), AutoTokenizer.from_pretrained(\"{0}\")",
        folder.display()
    ));
    output.object(&Report { model: model.name, folder, parameters: schema.elements() });
    Ok(())
}
