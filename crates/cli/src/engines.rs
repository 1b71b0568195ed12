//! Which engine a command computes with: `--engine` and `--threads`, in one place.

use crate::failure::Failure;
use base::{NamedTensors, RunConfig};
use engine::Engine;
use engine_burn::BurnEngine;

/// Engines of this build, the one that runs everywhere first.
const ENGINES: [&str; 1] = ["flex"];

/// Most threads that `--threads` takes: above the processors of any one machine, below what a system refuses.
const THREADS_MAX: i64 = 1024;

/// Arguments of every command that computes.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct EngineArgs {
    /// What computes: `flex` runs on any CPU.
    #[arg(long, default_value = ENGINES[0])]
    pub(crate) engine: String,
    /// Threads that compute; all processors unless given.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=THREADS_MAX))]
    pub(crate) threads: Option<u16>,
}

impl EngineArgs {
    /// The engine they name, starting from `parameters`.
    ///
    /// # Errors
    /// As [`create_engine`].
    pub(crate) fn create(&self, config: &RunConfig, parameters: &NamedTensors) -> Result<Box<dyn Engine>, Failure> {
        create_engine(&self.engine, config, parameters, self.threads.map(usize::from))
    }

    /// Refuses an unknown engine and sizes the thread pool, before there is anything to compute.
    ///
    /// # Errors
    /// As [`create_engine`].
    pub(crate) fn use_threads(&self) -> Result<(), Failure> {
        check_name(&self.engine)?;
        self.threads.map_or(Ok(()), |threads| use_threads(threads.into()))
    }

    /// Makes the engine later, once a site knows the run's settings. Call [`EngineArgs::use_threads`] first.
    pub(crate) fn factory(self) -> site::EngineFactory {
        Box::new(move |config, state| {
            let engine = BurnEngine::new(&config.model, &config.train, &self.engine, &state.inner.parameters)?;
            Ok(Box::new(engine))
        })
    }
}

fn check_name(spec: &str) -> Result<(), Failure> {
    if ENGINES.contains(&spec) {
        return Ok(());
    }
    let message = format!("there is no engine '{spec}' in this build; it has: {}", ENGINES.join(", "));
    Err(Failure::new(message, format!("use `--engine {}`, which runs on any CPU", ENGINES[0])))
}

/// Makes the engine that `spec` names. `threads` holds for the whole process: it sizes the one thread pool, so it
/// must be asked for before anything has used that.
///
/// # Errors
/// An engine that this build does not have, a pool that has another size, or parameters of another model.
pub(crate) fn create_engine(
    spec: &str,
    config: &RunConfig,
    parameters: &NamedTensors,
    threads: Option<usize>,
) -> Result<Box<dyn Engine>, Failure> {
    check_name(spec)?;
    threads.map_or(Ok(()), use_threads)?;
    Ok(Box::new(BurnEngine::new(&config.model, &config.train, spec, parameters)?))
}

/// Gives the process's thread pool its size.
fn use_threads(threads: usize) -> Result<(), Failure> {
    let built = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
    match built {
        Err(error) if rayon::current_num_threads() != threads => {
            let message = format!("{threads} threads could not be started: {error}");
            Err(Failure::new(message, "leave out --threads to use every processor"))
        }
        _ => Ok(()),
    }
}
