//! What the tests share: where Python is, one process for many engines, models and batches.
#![allow(dead_code, reason = "each test file uses a part")]
#![allow(clippy::unwrap_used, clippy::print_stderr)] // Helpers of tests may panic and print, as the tests do.

use base::config::TrainSection;
use base::{ModelShape, NamedTensors};
use engine::{Engine, Interrupter, PrecisionChoice};
use engine_torch::{Compile, ModelDescription, TorchEngine, TorchOptions, TorchProcess};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};

/// The interpreter of the tests.
pub(crate) fn python() -> PathBuf {
    std::env::var_os("BERINGIA_PYTHON").map_or_else(|| PathBuf::from("python3"), PathBuf::from)
}

/// Whether Python can import `modules`. Where it cannot, the test is left out, and says so; in CI it fails.
pub(crate) fn has_modules(modules: &str) -> bool {
    let import = format!("import {modules}");
    let status = Command::new(python()).args(["-c", &import]).stdin(Stdio::null()).stderr(Stdio::null()).status();
    let found = status.is_ok_and(|status| status.success());
    let program = python();
    assert!(found || std::env::var_os("CI").is_none(), "{} cannot `{import}`: CI must have it", program.display());
    if !found {
        eprintln!("left out: {} cannot `{import}`", program.display());
    }
    found
}

/// One thread and no compiler: quick to start, and the same bits each time.
pub(crate) fn options() -> TorchOptions {
    TorchOptions {
        precision: PrecisionChoice::Fixed(engine::Precision::F32),
        threads: Some(1),
        compile: Compile::Off,
        python: Some(python()),
        ..TorchOptions::new("cpu")
    }
}

/// Engines one after the other in few processes: importing PyTorch takes seconds, an engine milliseconds.
pub(crate) struct Pool {
    options: TorchOptions,
    idle: Receiver<TorchProcess>,
    returned: Sender<TorchProcess>,
}

impl Pool {
    pub(crate) fn new(options: TorchOptions) -> Self {
        let (returned, idle) = channel();
        Self { options, idle, returned }
    }

    pub(crate) fn engine(&self, shape: &ModelShape, train: &TrainSection, initial: &NamedTensors) -> TorchEngine {
        self.engine_of(&ModelDescription::Llama(shape.clone()), train, initial)
    }

    pub(crate) fn engine_of(
        &self,
        model: &ModelDescription,
        train: &TrainSection,
        initial: &NamedTensors,
    ) -> TorchEngine {
        let process = self.idle.try_recv().unwrap_or_else(|_| TorchProcess::start(&self.options).unwrap());
        TorchEngine::borrowing(model, train, process, initial, self.returned.clone()).unwrap()
    }
}

/// All bits that a run continues with.
pub(crate) fn state_bits(engine: &mut dyn Engine) -> (Vec<Vec<u32>>, u64) {
    let state = engine.save().unwrap();
    let tensors = [&state.parameters, &state.first_moments, &state.second_moments];
    let bits = |named: &&NamedTensors| {
        named.values().flat_map(|tensor| tensor.values.iter().map(|value| value.to_bits())).collect()
    };
    (tensors.iter().map(bits).collect(), state.optimizer_steps)
}

pub(crate) fn interrupter(engine: &TorchEngine) -> Interrupter {
    engine.interrupter().unwrap()
}
