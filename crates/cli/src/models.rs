//! Where a model comes from: the newest checkpoint of a run, or a Hugging Face folder.

use crate::failure::Failure;
use crate::output::Output;
use base::{NamedTensors, Round, RunConfig};
use data::TextTokenizer;
use site::{Mode, RunFolder, SavedState, TrainingState};
use std::path::{Path, PathBuf};

/// Present in every folder that `save_pretrained` wrote.
const HUGGING_FACE_CONFIG: &str = "config.json";

/// A model to compute with.
pub(crate) struct Model {
    /// The run it belongs to; none for a Hugging Face folder.
    pub(crate) run: Option<RunFolder>,
    /// The run's settings; for a Hugging Face folder its shape and defaults, with the longest sequence it takes.
    pub(crate) config: RunConfig,
    /// Its parameters.
    pub(crate) parameters: NamedTensors,
    /// What a report calls it.
    pub(crate) name: String,
    tokenizer: PathBuf,
}

impl Model {
    /// Loads the newest intact checkpoint of the run at `path`, or the Hugging Face folder there.
    ///
    /// # Errors
    /// Neither is there, or it is refused.
    pub(crate) fn load(path: &Path, output: &Output) -> Result<Self, Failure> {
        let run = RunFolder::new(path);
        if run.run_file().exists() {
            return Self::of_run(run, output);
        }
        if path.join(HUGGING_FACE_CONFIG).exists() {
            return Self::of_hugging_face(path);
        }
        let place = path.display();
        let message = match path.exists() {
            true => format!("{place} is neither a run (no run.toml) nor a Hugging Face folder (no config.json)"),
            false => format!("{place} does not exist"),
        };
        Err(Failure::new(message, format!("`beringia init {place} --data FOLDER` makes a run")))
    }

    fn of_run(run: RunFolder, output: &Output) -> Result<Self, Failure> {
        let (config, _) = run.config()?;
        let state = newest_state(&run, &config, output)?;
        let name = format!("{} after step {}", config.run.name, state.saved.step);
        let parameters = config.schema().unflatten(&state.global.parameters);
        let tokenizer = run.data().join(data::manifest::TOKENIZER_FILE);
        Ok(Self { run: Some(run), config, parameters, name, tokenizer })
    }

    fn of_hugging_face(path: &Path) -> Result<Self, Failure> {
        let (shape, parameters) = checkpoint::import(path)?;
        let mut config = RunConfig::new("hugging-face", shape);
        config.data.sequence_length = config.model.max_position_embeddings;
        let tokenizer = path.join(data::manifest::TOKENIZER_FILE);
        Ok(Self { run: None, config, parameters, name: path.display().to_string(), tokenizer })
    }

    /// The tokenizer that belongs to it.
    ///
    /// # Errors
    /// It is missing, cannot be used, or has tokens that the model does not know.
    pub(crate) fn tokenizer(&self) -> Result<TextTokenizer, Failure> {
        let tokenizer = TextTokenizer::load(&self.tokenizer)?;
        let (found, known) = (tokenizer.vocabulary_size(), self.config.model.vocab_size);
        if found > known {
            let path = self.tokenizer.display();
            let message = format!("{path} has {found} tokens, the model knows {known}");
            return Err(Failure::new(message, "put the tokenizer.json that the model was trained with there"));
        }
        Ok(tokenizer)
    }
}

/// The newest intact state of a run; what was skipped is told to the user.
///
/// # Errors
/// No checkpoint is intact, or it is of another model.
pub(crate) fn newest_state(run: &RunFolder, config: &RunConfig, output: &Output) -> Result<TrainingState, Failure> {
    refresh_initial_state(run, config, output)?;
    let (state, skipped) = run.newest(config)?;
    for checkpoint in &skipped {
        let (path, reason) = (checkpoint.path.display(), &checkpoint.reason);
        output.warning(format_args!("{path} is damaged and was skipped: {reason}"));
    }
    if !skipped.is_empty() {
        output.warning(format_args!("the checkpoint before it is used: step {}", state.saved.step));
    }
    Ok(state)
}

/// Before the first step, `[model]`, `[sync] strategy` and `seed` may still be edited: the initial state is then made anew, and takes
/// the place of the one that `beringia init` made. Nothing is lost: it follows from the settings.
///
/// # Errors
/// The new state cannot be written.
pub(crate) fn refresh_initial_state(run: &RunFolder, config: &RunConfig, output: &Output) -> Result<(), Failure> {
    if checkpoint::list(&run.checkpoints()).is_ok_and(|entries| entries.iter().any(|entry| entry.round != Round(0))) {
        return Ok(());
    }
    // What cannot be loaded is reported by whoever needs it.
    let Ok(loaded) = checkpoint::load_latest::<SavedState>(&run.checkpoints()) else { return Ok(()) };
    let schema = config.schema();
    let (mode, seed) = (loaded.state.mode, loaded.state.seed);
    let fits = TrainingState::from_checkpoint(config, &schema, loaded.state, &loaded.tensors).is_ok();
    // What transformers has made cannot be made anew here: a state that does not fit is refused where it is loaded.
    if (fits && seed == config.run.seed) || mode != Mode::Initial || config.transformers.is_some() {
        return Ok(());
    }
    save_initial_state(run, config, &engine::initial_parameters(&config.model, config.run.seed))?;
    output
        .warning("[model], [sync] strategy or seed was changed before the first step: the initial state was made anew");
    Ok(())
}

/// Saves `parameters` as the state of round 0.
///
/// # Errors
/// They cannot be written.
pub(crate) fn save_initial_state(
    run: &RunFolder,
    config: &RunConfig,
    parameters: &NamedTensors,
) -> Result<TrainingState, Failure> {
    let state = TrainingState::initial(config, parameters)
        .unwrap_or_else(|error| unreachable!("initial parameters are of the model they are made for: {error}"));
    state.save(&run.checkpoints(), Round(0), &config.schema(), config.checkpoint.keep)?;
    Ok(state)
}
