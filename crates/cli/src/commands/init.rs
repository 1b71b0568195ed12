//! `beringia init`: from a folder of text to a run that can be trained.
//!
//! Everything is made in a folder beside the wanted one, which takes its name when it is complete: an interrupted
//! `init` leaves no run. [`create`] does the work for any corpus and any settings.

use crate::failure::Failure;
use crate::format::{bytes, count, counted};
use crate::models::save_initial_state;
use crate::output::Output;
use crate::overrides::{self, Override};
use crate::progress::Progress;
use crate::run_file;
use crate::transformers::TransformersModel;
use base::{ContentHash, ModelShape, NamedTensors, RunConfig};
use data::documents::CorpusWarning;
use data::prepare::Prepared;
use data::{Corpus, Manifest, PrepareOptions, PrepareProgress, TokenizerSource};
use serde::Serialize;
use site::RunFolder;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Fewest steps of a new run: below this a learning-rate schedule has no shape.
const STEPS_MIN: u64 = 200;
/// Most steps of a new run: at 2,048 tokens a step 41 million tokens, some hours on a laptop's CPU.
const STEPS_MAX: u64 = 20_000;
/// Warm-up, as a part of all steps.
const WARMUP_DIVISOR: u64 = 20;
/// Shortest sequence worth training on.
const SEQUENCE_LENGTH_MIN: u64 = 16;
/// Skipped files that are named; all are counted.
const SKIPPED_SHOWN_MAX: usize = 5;

/// Make a run from a folder of text: settings, tokenizer, tokens, initial weights.
#[derive(Debug, clap::Args)]
#[command(after_long_help = run_file::keys_help())]
pub(crate) struct Args {
    /// Folder of the new run.
    run: PathBuf,
    /// Folder of .txt, .md, .jsonl or .parquet files (any UTF-8 text), or one such file.
    #[arg(long, value_name = "FOLDER")]
    data: PathBuf,
    /// A Hugging Face tokenizer.json to use; otherwise one is trained on the data.
    #[arg(long, value_name = "FILE", conflicts_with = "vocabulary")]
    tokenizer: Option<PathBuf>,
    /// Tokens of the tokenizer that is trained; 2048 for the smallest size.
    #[arg(long, value_name = "TOKENS")]
    vocabulary: Option<usize>,
    /// Size of the model, a Llama, in parameters.
    #[arg(long, value_enum, default_value = "1m")]
    size: Size,
    /// Another model than Llama: the config.json of any causal language model that transformers builds. PyTorch sites
    /// train it.
    #[arg(long, value_name = "FILE", conflicts_with = "size")]
    model_config: Option<PathBuf>,
    /// With --model-config: the interpreter that has PyTorch and transformers; BERINGIA_PYTHON or python3 unless given.
    #[arg(long, value_name = "PATH", requires = "model_config")]
    python: Option<PathBuf>,
    /// A key of run.toml to set, as in train.steps=100; may be repeated.
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    overrides: Vec<Override>,
}

/// Models that `--size` offers. Counts hold for the tokenizer trained by default.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Size {
    /// About 1 million: minutes on a laptop.
    #[value(name = "1m")]
    Million1,
    /// About 5 million: an hour on a laptop.
    #[value(name = "5m")]
    Million5,
    /// About 25 million.
    #[value(name = "25m")]
    Million25,
    /// About 100 million: needs a GPU or many sites.
    #[value(name = "100m")]
    Million100,
}

impl Size {
    /// Tokens of a tokenizer that is trained for this size: its embedding takes about an eighth to a quarter of the model.
    pub(crate) fn vocabulary_size(self) -> usize {
        match self {
            Self::Million1 => 2_048,
            Self::Million5 => 4_096,
            Self::Million25 => 8_192,
            Self::Million100 => 16_384,
        }
    }

    /// Settings for a run of this size, with `vocab_size` tokens. Learning rates fall with the width, as in
    /// Kaplan et al. 2020 (arXiv 2001.08361), appendix D.6.
    pub(crate) fn config(self, name: &str, vocab_size: usize) -> RunConfig {
        let (hidden_size, intermediate_size, layers, heads, sequence_length, learning_rate) = match self {
            Self::Million1 => (128, 352, 4, 4, 256, 3e-3),
            Self::Million5 => (256, 688, 6, 8, 256, 2e-3),
            Self::Million25 => (512, 1_376, 7, 8, 512, 1e-3),
            Self::Million100 => (768, 2_048, 14, 12, 1_024, 6e-4),
        };
        let shape = ModelShape {
            vocab_size,
            hidden_size,
            intermediate_size,
            num_hidden_layers: layers,
            num_attention_heads: heads,
            num_key_value_heads: heads / 2,
            max_position_embeddings: sequence_length,
            rope_theta: 10_000.0,
            rms_norm_eps: 1e-5,
            tie_word_embeddings: true,
        };
        let mut config = RunConfig::new(name, shape);
        config.data.sequence_length = sequence_length;
        config.train.learning_rate = learning_rate;
        config
    }
}

/// What [`create`] makes a run of.
pub(crate) struct InitOptions<'a> {
    /// Its text.
    pub(crate) corpus: Corpus,
    /// Its tokenizer.
    pub(crate) tokenizer: TokenizerSource,
    /// Its model.
    pub(crate) model: ModelSource,
    /// Changes the settings that were chosen, before anything is made of them.
    pub(crate) configure: &'a dyn Fn(&mut RunConfig),
}

/// Which model a run is made for.
pub(crate) enum ModelSource {
    /// A Llama.
    Size(Size),
    /// What a `config.json` describes.
    Transformers(TransformersModel),
}

impl ModelSource {
    /// Settings for a run of this model, with `vocab_size` tokens.
    fn config(&self, name: &str, vocab_size: usize) -> RunConfig {
        match self {
            Self::Size(size) => size.config(name, vocab_size),
            Self::Transformers(model) => {
                // What suits a small Llama suits a small model of another family.
                let mut config = Size::Million5.config(name, vocab_size);
                config.model = model.shape(vocab_size);
                config.data.sequence_length = config.data.sequence_length.min(model.positions());
                config.train.learning_rate = Size::Million25.config(name, vocab_size).train.learning_rate;
                config
            }
        }
    }

    /// Tokens of a tokenizer that is trained for it.
    fn vocabulary_size(&self) -> usize {
        match self {
            Self::Size(size) => size.vocabulary_size(),
            Self::Transformers(_) => Size::Million5.vocabulary_size(),
        }
    }

    /// Its initial parameters; a model of transformers is described in `config` by the way.
    fn initial_parameters(&self, config: &mut RunConfig) -> Result<NamedTensors, Failure> {
        match self {
            Self::Size(_) => Ok(engine::initial_parameters(&config.model, config.run.seed)),
            Self::Transformers(model) => model.build(config),
        }
    }
}

/// What a new run consists of; with `--json` it is printed as it is.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Summary {
    /// Its folder.
    pub(crate) run: PathBuf,
    /// Files that were read.
    pub(crate) files: u64,
    /// Documents in them.
    pub(crate) documents: u64,
    /// UTF-8 bytes of the documents.
    pub(crate) document_bytes: u64,
    /// Files that are not text.
    pub(crate) binary_files: u64,
    /// The first of their names.
    pub(crate) binary_names: Vec<String>,
    /// Lines, rows and files that could not be read.
    pub(crate) warnings: u64,
    /// The first of them.
    pub(crate) warnings_kept: Vec<CorpusWarning>,
    /// Tokens to train on.
    pub(crate) train_tokens: u64,
    /// Tokens held out.
    pub(crate) validation_tokens: u64,
    /// Tokens in the vocabulary.
    pub(crate) vocabulary_size: u64,
    /// BLAKE3 of the tokenizer.
    pub(crate) tokenizer_hash: ContentHash,
    /// BLAKE3 of the data's manifest.
    pub(crate) data_hash: ContentHash,
    /// BLAKE3 of the initial global state.
    pub(crate) state_hash: ContentHash,
    /// Parameters of the model.
    pub(crate) parameters: u64,
    /// Memory that training takes, by an estimate.
    pub(crate) memory_bytes_estimate: u64,
    /// Inner steps.
    pub(crate) steps: u64,
    /// Tokens in one inner step.
    pub(crate) step_tokens: u64,
    /// Whether only PyTorch engines train it.
    pub(crate) needs_torch: bool,
}

/// Runs the command.
pub(crate) fn run(args: Args, output: &Output) -> Result<(), Failure> {
    refuse_existing(&args.run)?;
    // Checked before the text is read, which may take long.
    let model = match args.model_config {
        None => ModelSource::Size(args.size),
        Some(path) => ModelSource::Transformers(TransformersModel::read(&path, args.python)?),
    };
    overrides::check(&model.config(&run_name(&args.run), model.vocabulary_size()), &args.overrides)?;
    let corpus = Corpus::folder(&args.data)?;
    output.line(format_args!(
        "reading    {} in {}",
        bytes(corpus.file_bytes()),
        counted(corpus.files().len() as u64, "file")
    ));
    let vocabulary_size = args.vocabulary.unwrap_or_else(|| model.vocabulary_size());
    let tokenizer = args.tokenizer.map_or(TokenizerSource::Train { vocabulary_size }, TokenizerSource::Load);
    let mut progress = Progress::new(output, "encoding", corpus.file_bytes());
    let configure = |config: &mut RunConfig| overrides::apply(config, &args.overrides);
    let options = InitOptions { corpus, tokenizer, model, configure: &configure };
    let summary = create(&args.run, options, &mut |step| {
        if let PrepareProgress::Encoding { file_bytes, .. } = step {
            progress.set(file_bytes);
        }
    })?;
    drop(progress);
    print(&summary, output);
    output.object(&summary);
    Ok(())
}

/// Makes the run `folder`: data, `run.toml`, and the checkpoint of round 0.
///
/// # Errors
/// The folder is there already, there is no text, or something cannot be written; then there is no new folder.
pub(crate) fn create(
    folder: &Path,
    options: InitOptions<'_>,
    progress: &mut dyn FnMut(PrepareProgress),
) -> Result<Summary, Failure> {
    refuse_existing(folder)?;
    let partial = PartialRun::create(folder)?;
    let run = RunFolder::new(&partial.0);
    let prepared =
        data::prepare(&options.corpus, &options.tokenizer, &run.data(), &PrepareOptions::default(), progress)?;
    let mut config = choose_settings(folder, &options.model, &prepared.manifest)?;
    (options.configure)(&mut config);
    config.validate()?;
    let parameters = options.model.initial_parameters(&mut config)?;
    fs::write(run.run_file(), run_file::render(&config)).map_err(|error| write_failure(folder, &error))?;
    let state = save_initial_state(&run, &config, &parameters)?;
    partial.complete(folder)?;
    Ok(summarise(folder, &config, prepared, state.saved.state_hash))
}

fn refuse_existing(folder: &Path) -> Result<(), Failure> {
    let place = folder.display();
    if RunFolder::new(folder).run_file().exists() {
        let hint = format!("`beringia train {place}` continues it; name another folder for a new run");
        return Err(Failure::new(format!("{place} is a run already"), hint));
    }
    let is_empty_folder = || fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_none());
    if fs::symlink_metadata(folder).is_ok() && !is_empty_folder() {
        let hint = "name a folder that does not exist yet: `beringia init NEW --data FOLDER`";
        return Err(Failure::new(format!("{place} is there already and not an empty folder"), hint));
    }
    Ok(())
}

/// The model's settings, fitted to the text that there is.
fn choose_settings(folder: &Path, model: &ModelSource, manifest: &Manifest) -> Result<RunConfig, Failure> {
    let mut config = model.config(&run_name(folder), manifest.vocabulary_size as usize);
    // A sample has one token more than it predicts, and both splits must hold one.
    let tokens = manifest.train.tokens.min(manifest.validation.tokens).saturating_sub(1);
    if tokens < SEQUENCE_LENGTH_MIN {
        let message = format!(
            "{} for training and {} for validation are too few",
            counted(manifest.train.tokens, "token"),
            counted(manifest.validation.tokens, "token"),
        );
        return Err(Failure::new(message, "add text to the data folder; a megabyte is a start"));
    }
    let available = 1 << tokens.ilog2();
    config.data.sequence_length = config.data.sequence_length.min(available);
    let step_tokens = (config.train.batch_samples * config.data.sequence_length) as u64;
    config.train.steps = (manifest.train.tokens / step_tokens).clamp(STEPS_MIN, STEPS_MAX);
    config.train.warmup_steps = config.train.steps / WARMUP_DIVISOR;
    Ok(config)
}

/// The folder's name, with what a name may not have replaced.
fn run_name(folder: &Path) -> String {
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    let plain = |c: char| if c.is_ascii_alphanumeric() || c == '_' { c } else { '-' };
    let name: String = name.chars().map(plain).take(64).collect();
    if name.is_empty() { "run".to_owned() } else { name }
}

/// A folder that is removed unless it is completed.
struct PartialRun(PathBuf);

impl PartialRun {
    fn create(folder: &Path) -> Result<Self, Failure> {
        let name = folder.file_name().unwrap_or_default().to_string_lossy();
        let path = folder.with_file_name(format!(".{name}.partial"));
        let remove = if path.exists() { fs::remove_dir_all(&path) } else { Ok(()) };
        remove.and_then(|()| fs::create_dir_all(&path)).map_err(|error| write_failure(folder, &error))?;
        Ok(Self(path))
    }

    /// Gives the folder its name.
    fn complete(self, folder: &Path) -> Result<(), Failure> {
        let complete = || {
            fs::File::open(RunFolder::new(&self.0).run_file())?.sync_all()?;
            if folder.exists() {
                fs::remove_dir(folder)?;
            }
            fs::rename(&self.0, folder)
        };
        complete().map_err(|error| write_failure(folder, &error))
    }
}

impl Drop for PartialRun {
    fn drop(&mut self) {
        // After `complete` it has another name and this finds nothing; a failure leaves what the next init removes.
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn write_failure(folder: &Path, error: &io::Error) -> Failure {
    let parent = folder.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let hint = match error.kind() {
        io::ErrorKind::StorageFull => {
            "free some space and run the same command again; nothing half done is left".to_owned()
        }
        _ => format!("make {} writable and run the same command again", parent.display()),
    };
    Failure::new(format!("the run {} cannot be written: {error}", folder.display()), hint)
}

fn summarise(folder: &Path, config: &RunConfig, prepared: Prepared, state_hash: ContentHash) -> Summary {
    let Prepared { manifest, report } = prepared;
    Summary {
        run: folder.to_owned(),
        files: report.files,
        documents: report.documents,
        document_bytes: report.document_bytes,
        binary_files: report.binary_files,
        binary_names: report.binary_names,
        warnings: report.warnings,
        warnings_kept: report.warnings_kept,
        train_tokens: manifest.train.tokens,
        validation_tokens: manifest.validation.tokens,
        vocabulary_size: manifest.vocabulary_size,
        tokenizer_hash: manifest.tokenizer.blake3,
        data_hash: manifest.hash(),
        state_hash,
        parameters: config.schema().elements() as u64,
        memory_bytes_estimate: memory_bytes_estimate(config),
        steps: config.train.steps,
        step_tokens: (config.train.batch_samples * config.data.sequence_length) as u64,
        needs_torch: config.transformers.is_some(),
    }
}

/// Memory of one site, in f32: parameters, gradients, two moments, the state before the round and the outer momentum;
/// and for each token of a micro-batch what the fused blocks keep for the backward pass (input, projections, context and
/// middle: 5 vectors of the model's width, and 2 of the feed-forward's), what one block works with, and the logits.
/// Measured: 114 MB where this gives 105 (1m), 312 MB where it gives 333 (5m).
fn memory_bytes_estimate(config: &RunConfig) -> u64 {
    const PARAMETER_COPIES: usize = 6;
    let model = &config.model;
    let kept = 5 * model.hidden_size + 2 * model.intermediate_size;
    let worked_with = 8 * model.hidden_size + 4 * model.intermediate_size;
    let of_token = model.num_hidden_layers * kept + worked_with + model.vocab_size;
    let tokens = config.train.micro_batch_samples.min(config.train.batch_samples) * config.data.sequence_length;
    let elements = PARAMETER_COPIES * config.schema().elements() + tokens * of_token;
    (elements * size_of::<f32>()) as u64
}

fn print(summary: &Summary, output: &Output) {
    let text = summary.document_bytes;
    output.line(format_args!("found      {}, {} of text", counted(summary.documents, "document"), bytes(text)));
    for line in skipped_lines(summary) {
        output.line(format_args!("skipped    {line}"));
    }
    let (train, validation) = (summary.train_tokens, summary.validation_tokens);
    let token_bytes = text as f64 / (train + validation) as f64;
    output.line(format_args!(
        "tokenizer  {} tokens, BLAKE3 {}",
        count(summary.vocabulary_size),
        summary.tokenizer_hash.short()
    ));
    output.line(format_args!(
        "tokens     {} to train on, {} held out for validation; a token is {token_bytes:.2} bytes",
        count(train),
        count(validation)
    ));
    output.line(format_args!(
        "model      {} parameters; training takes about {} of memory",
        count(summary.parameters),
        bytes(summary.memory_bytes_estimate)
    ));
    let passes = (summary.steps * summary.step_tokens) as f64 / train as f64;
    output.line(format_args!(
        "steps      {} of {} tokens: {passes:.1} passes over the text",
        count(summary.steps),
        count(summary.step_tokens)
    ));
    let run = summary.run.display();
    output.line(format_args!("wrote      {run}; settings are in {run}/run.toml"));
    output.line(format_args!(
        "next       beringia train {run}{}",
        if summary.needs_torch { " --engine torch:cpu" } else { "" }
    ));
}

/// What was left out of the corpus, and why.
fn skipped_lines(summary: &Summary) -> Vec<String> {
    let binary = summary.binary_names.iter().map(|name| format!("{name}: not UTF-8 text"));
    let warnings = summary.warnings_kept.iter().map(ToString::to_string);
    let mut lines: Vec<String> = binary.chain(warnings).take(SKIPPED_SHOWN_MAX).collect();
    let all = summary.binary_files + summary.warnings;
    if all > lines.len() as u64 {
        lines.push(format!("and {} more", count(all - lines.len() as u64)));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_what_their_names_say() {
        let parameters = |size: Size| {
            let config = size.config("x", size.vocabulary_size());
            config.validate().unwrap();
            config.schema().elements() as f64 / 1e6
        };
        for (size, millions) in
            [(Size::Million1, 1.0), (Size::Million5, 5.0), (Size::Million25, 25.0), (Size::Million100, 100.0)]
        {
            let found = parameters(size);
            assert!((found / millions - 1.0).abs() < 0.1, "{size:?}: {found} million");
        }
    }

    #[test]
    fn names_follow_the_folder() {
        let names = ["runs/north", "north pole.2", "..", "Öre"].map(|folder| run_name(Path::new(folder)));
        assert_eq!(names, ["north", "north-pole-2", "run", "-re"]);
    }
}
