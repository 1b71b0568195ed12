//! What the tests share: where Python is, one process for many engines, models and batches.
#![allow(dead_code, reason = "each test file uses a part")]
#![allow(clippy::unwrap_used, clippy::print_stderr)] // Helpers of tests may panic and print, as the tests do.

use base::config::TrainSection;
use base::{ModelShape, NamedTensors};
use engine::{Engine, EngineError, PrecisionChoice};
use engine_torch::{Compile, ModelDescription, TorchEngine, TorchOptions, TorchProcess};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};

/// The interpreter of the tests.
pub(crate) fn python() -> PathBuf {
    std::env::var_os("BERINGIA_PYTHON").map_or_else(|| PathBuf::from("python3"), PathBuf::from)
}

/// Whether Python has `module`. Where it has not, the test is left out, and says so; in CI it fails.
pub(crate) fn has_module(module: &str) -> bool {
    // Looked for, not imported: that would take seconds.
    let find = format!("import sys, importlib.util as u; sys.exit(u.find_spec('{module}') is None)");
    let status = Command::new(python()).args(["-c", &find]).stdin(Stdio::null()).stderr(Stdio::null()).status();
    let found = status.is_ok_and(|status| status.success());
    let program = python();
    assert!(found || std::env::var_os("CI").is_none(), "{} has no {module}: CI must have it", program.display());
    if !found {
        eprintln!("left out: {} has no {module}", program.display());
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
        self.try_engine_of(model, train, initial).unwrap()
    }

    pub(crate) fn try_engine_of(
        &self,
        model: &ModelDescription,
        train: &TrainSection,
        initial: &NamedTensors,
    ) -> Result<TorchEngine, EngineError> {
        TorchEngine::borrowing(model, train, self.process(), initial, self.returned.clone())
    }

    pub(crate) fn process(&self) -> TorchProcess {
        self.idle.try_recv().unwrap_or_else(|_| TorchProcess::start(&self.options).unwrap())
    }

    pub(crate) fn put_back(&self, process: TorchProcess) {
        self.returned.send(process).unwrap();
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

/// Fields of `/proc/PID/stat` after the command's name; empty where the process is gone.
#[cfg(target_os = "linux")]
fn process_fields(process: u32) -> Vec<String> {
    let text = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    text.rsplit(')').next().unwrap_or_default().split_whitespace().map(str::to_owned).collect()
}

/// Whether a process computes, waits or is stopped: not gone, and not dead with nobody to ask how it ended.
#[cfg(target_os = "linux")]
pub(crate) fn is_running(process: u32) -> bool {
    process_fields(process).first().is_some_and(|state| !["Z", "X"].contains(&state.as_str()))
}

/// Processor time that a process has used, in the kernel's ticks (1/100 s).
#[cfg(target_os = "linux")]
pub(crate) fn processor_ticks(process: u32) -> u64 {
    let fields = process_fields(process);
    fields.iter().skip(11).take(2).map(|ticks| ticks.parse::<u64>().unwrap()).sum()
}

/// Processes that `process` started, and those that they did.
#[cfg(target_os = "linux")]
pub(crate) fn descendants(process: u32) -> Vec<u32> {
    let numbers = std::fs::read_dir("/proc").unwrap().flatten();
    let all: Vec<u32> = numbers.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    let parent = |number: &u32| process_fields(*number).get(1).and_then(|parent| parent.parse::<u32>().ok());
    let mut found = vec![process];
    let mut next = 0;
    while let Some(ancestor) = found.get(next).copied() {
        found.extend(all.iter().filter(|number| parent(number) == Some(ancestor)));
        next += 1;
    }
    found.split_off(1)
}

/// Looks again and again until `true`, for a minute at most.
pub(crate) fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while !condition() {
        assert!(std::time::Instant::now() < deadline, "waited in vain until {what}");
        std::thread::yield_now();
    }
}

/// An executable script. Written by a child and renamed into place: no other test's child can hold it open for writing.
pub(crate) fn script(folder: &std::path::Path, text: &str) -> PathBuf {
    let path = folder.join("python");
    let written = folder.join("written");
    let mut shell = Command::new("/bin/sh");
    shell.arg("-c").arg("cat > \"$0\" && chmod 700 \"$0\"").arg(&written).stdin(Stdio::piped());
    let mut child = shell.spawn().unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), text.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success());
    std::fs::rename(written, &path).unwrap();
    path
}
