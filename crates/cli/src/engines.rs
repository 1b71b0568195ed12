//! Which engine a command computes with: `--engine` and what goes with it, in one place.

use crate::failure::Failure;
use base::{NamedTensors, RunConfig};
use engine::{EMULATED, EmulatedEngine, Engine, EngineError, Precision, PrecisionChoice, emulated_seconds};
use engine_burn::BurnEngine;
use engine_torch::{Compile, ModelDescription, Start, TorchEngine, TorchOptions};
use site::HangBounds;
use std::path::PathBuf;
use std::sync::Arc;

/// Kinds of engines of this build, the one that runs everywhere first.
const KINDS: &[&str] = &[
    "flex",
    #[cfg(feature = "wgpu")]
    "wgpu",
    #[cfg(feature = "vulkan")]
    "vulkan",
    #[cfg(feature = "cuda")]
    "cuda",
    #[cfg(feature = "rocm")]
    "rocm",
    #[cfg(feature = "metal")]
    "metal",
    TORCH,
];

/// Kinds that a build may have, with the cargo feature of the same name.
const OPTIONAL_KINDS: [&str; 5] = ["wgpu", "vulkan", "cuda", "rocm", "metal"];

/// Begins the device strings of the PyTorch engine.
const TORCH: &str = "torch";

/// Most threads that `--threads` takes: above the processors of any one machine, below what a system refuses.
const THREADS_MAX: i64 = 1024;

/// Kernels of a first step: `torch.compile` takes up to two minutes, choosing among matrix products by trial as long.
const COMPILE_SECONDS_MAX: f64 = 300.0;

/// Most ranks of one site on one machine: accelerators in the largest single machines, eight times over.
const RANKS_MAX: i64 = 128;

/// Arguments of every command that computes.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct EngineArgs {
    /// What computes: flex (any CPU), wgpu[:N] (any GPU), cuda[:N], or torch:DEVICE (cpu, cuda, npu, musa, mlu, xpu, mps);
    /// `beringia devices` lists what is here. emulated:SECONDS learns nothing: its steps sleep, for benches of links.
    #[arg(long, default_value = KINDS[0])]
    pub(crate) engine: String,
    /// What matrix products are computed in: f32, bf16, or auto: bf16 where the device multiplies it natively.
    #[arg(long, value_name = "PRECISION", default_value = "auto")]
    pub(crate) precision: PrecisionChoice,
    /// Threads that compute; all processors unless given.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=THREADS_MAX))]
    pub(crate) threads: Option<u16>,
    /// torch: processes that share the model with FSDP2, one device each.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=RANKS_MAX))]
    pub(crate) ranks: u16,
    /// torch: whether to use torch.compile; auto falls back to eager where it fails.
    #[arg(long, value_name = "WHEN", default_value = "auto", value_parser = parse_compile)]
    pub(crate) torch_compile: Compile,
    /// torch: the interpreter that has PyTorch; BERINGIA_PYTHON or python3 unless given.
    #[arg(long, value_name = "PATH")]
    pub(crate) python: Option<PathBuf>,
    /// torch: print the command that starts the engine instead of running it, and wait for the engine: it may then run in a
    /// container or under a batch system on this host.
    #[arg(long)]
    pub(crate) engine_elsewhere: bool,
}

fn parse_compile(text: &str) -> Result<Compile, String> {
    match text {
        "auto" => Ok(Compile::Auto),
        "on" => Ok(Compile::On),
        "off" => Ok(Compile::Off),
        _ => Err("auto, on or off is expected".to_owned()),
    }
}

impl EngineArgs {
    /// The engine they name, starting from `parameters`.
    ///
    /// # Errors
    /// An engine that this build or machine does not have, a thread pool that has another size, or parameters of another
    /// model.
    pub(crate) fn create(&self, config: &RunConfig, parameters: &NamedTensors) -> Result<Box<dyn Engine>, Failure> {
        self.use_threads()?;
        Ok(self.build(config, parameters)?)
    }

    /// Refuses an unknown engine and sizes the thread pool, before there is anything to compute.
    ///
    /// # Errors
    /// An engine that this build does not have, or a pool that has another size.
    pub(crate) fn use_threads(&self) -> Result<(), Failure> {
        check_kind(&self.engine)?;
        self.threads.map_or(Ok(()), |threads| use_threads(threads.into()))
    }

    /// Makes the engine later, once a site knows the run's settings. Call [`EngineArgs::use_threads`] first.
    pub(crate) fn factory(self) -> site::EngineFactory {
        Box::new(move |config, state| self.build(config, &state.inner.parameters))
    }

    fn build(&self, config: &RunConfig, parameters: &NamedTensors) -> Result<Box<dyn Engine>, EngineError> {
        if let Some(options) = self.torch_options() {
            let model = model_description(config)?;
            return Ok(Box::new(TorchEngine::new(&model, &config.train, &options, parameters)?));
        }
        if let Some(seconds) = emulated_seconds(&self.engine)? {
            self.refuse_emulated_precision()?;
            return Ok(Box::new(EmulatedEngine::new(seconds, &config.model, config.schema(), parameters)?));
        }
        if config.transformers.is_some() {
            let reason = "it computes Llamas only; `--engine torch:cpu` trains what transformers builds".to_owned();
            return Err(EngineError::Device { device: self.engine.clone(), reason });
        }
        let engine = BurnEngine::new(&config.model, &config.train, &self.engine, self.precision, parameters)?;
        Ok(Box::new(engine))
    }

    /// Bytes of a delta do not depend on the precision of matrix products, so that there is nothing to emulate.
    fn refuse_emulated_precision(&self) -> Result<(), EngineError> {
        match self.precision {
            PrecisionChoice::Fixed(Precision::Bf16) => {
                let reason = "it is an emulation, which multiplies nothing in bf16".to_owned();
                Err(EngineError::Device { device: self.engine.clone(), reason })
            }
            PrecisionChoice::Auto | PrecisionChoice::Fixed(Precision::F32) => Ok(()),
        }
    }

    /// What a user must know of a run on this engine before anything else, and what to do about it.
    pub(crate) fn warning(&self) -> Option<(String, String)> {
        let (kind, _) = self.engine.split_once(':')?;
        (kind == EMULATED).then(|| {
            let message =
                format!("engine '{}' is an emulation: its steps sleep and the model learns nothing", self.engine);
            (message, format!("use `--engine {}` to train", KINDS[0]))
        })
    }

    /// How long calls of this engine may take. One that compiles kernels for its device takes minutes for the first step of
    /// each shape; on the CPU nothing is compiled.
    pub(crate) fn hang_bounds(&self) -> HangBounds {
        let compile_seconds_max = match self.engine.as_str() {
            "flex" => 0.0,
            _ if self.warning().is_some() => 0.0,
            "torch:cpu" if self.torch_compile != Compile::On => 0.0,
            _ => COMPILE_SECONDS_MAX,
        };
        HangBounds { compile_seconds_max, ..HangBounds::default() }
    }

    /// How the PyTorch engine is started; `None` where another engine is asked for.
    pub(crate) fn torch_options(&self) -> Option<TorchOptions> {
        let device = self.engine.strip_prefix(TORCH)?.strip_prefix(':')?;
        let print =
            |command: &str| crate::output::to_stderr(&format!("start the engine on this host with:\n  {command}\n"));
        Some(TorchOptions {
            precision: self.precision,
            threads: self.threads.map(usize::from),
            ranks: self.ranks.into(),
            compile: self.torch_compile,
            python: self.python.clone(),
            start: if self.engine_elsewhere { Start::Print(Arc::new(print)) } else { Start::Spawn },
            ..TorchOptions::new(device)
        })
    }
}

fn model_description(config: &RunConfig) -> Result<ModelDescription, EngineError> {
    let Some(section) = &config.transformers else { return Ok(ModelDescription::Llama(config.model.clone())) };
    let parsed = serde_json::from_str(&section.config).map_err(|error| EngineError::Shape {
        what: "[transformers] config".to_owned(),
        reason: format!("is not the JSON of a config.json: {error}"),
    })?;
    Ok(ModelDescription::HuggingFace { config: parsed, schema: config.schema() })
}

/// Whether this build has the engine that `spec` begins with.
pub(crate) fn check_kind(spec: &str) -> Result<(), Failure> {
    let (kind, device) = spec.split_once(':').unwrap_or((spec, ""));
    if kind == TORCH && device.is_empty() {
        let message = "the PyTorch engine needs a device";
        return Err(Failure::new(message, "write it behind the colon: `--engine torch:cpu`"));
    }
    if KINDS.contains(&kind) {
        return Ok(());
    }
    if emulated_seconds(spec)?.is_some() {
        return Ok(());
    }
    let message = format!("there is no engine '{spec}' in this build; it has: {}", KINDS.join(", "));
    let hint = match OPTIONAL_KINDS.contains(&kind) {
        true => format!("build it in: `cargo build --release --features {kind}` (docs/engine.md)"),
        false => format!("use `--engine {}`, which runs on any CPU", KINDS[0]),
    };
    Err(Failure::new(message, hint))
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
