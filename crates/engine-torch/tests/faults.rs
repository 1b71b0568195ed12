//! What goes wrong with a process: killed, stopped, out of memory, asked for what there is not. Nothing hangs, nothing
//! is left behind, and the engine says which of these it was.

#![cfg(target_os = "linux")] // Processes are looked up in /proc.
#![allow(clippy::unwrap_used, clippy::print_stderr)] // Helpers of tests may panic and print, as the tests do.

mod common;

use base::config::TrainSection;
use base::{ModelShape, TokenBatch};
use common::{descendants, has_module, is_running, options, processor_ticks, script, state_bits, wait_until};
use engine::conformance::{random_batch, tiny_shape};
use engine::{Engine, EngineError, initial_parameters};
use engine_torch::{Compile, ModelDescription, TorchEngine, TorchOptions};
use rustix::process::{Pid, Signal, kill_process};
use std::fs;
use std::thread;

fn open(shape: &ModelShape, options: &TorchOptions) -> Result<TorchEngine, EngineError> {
    let model = ModelDescription::Llama(shape.clone());
    TorchEngine::new(&model, &TrainSection::default(), options, &initial_parameters(shape, 1))
}

fn start(options: &TorchOptions) -> TorchEngine {
    open(&tiny_shape(false), options).unwrap()
}

fn refused(options: &TorchOptions) -> EngineError {
    match open(&tiny_shape(false), options) {
        Err(error) => error,
        Ok(_) => panic!("an engine on {options:?}"),
    }
}

fn batch(seed: u64) -> TokenBatch {
    random_batch(&tiny_shape(false), 4, 12, seed)
}

/// A batch that takes minutes: nothing waits for it.
fn endless_batch() -> TokenBatch {
    random_batch(&tiny_shape(false), 400_000, 16, 9)
}

fn signal(process: u32, signal: Signal) {
    kill_process(Pid::from_raw(process as i32).unwrap(), signal).unwrap();
}

fn steps(engine: &mut TorchEngine, range: std::ops::Range<u64>) {
    for step in range {
        engine.inner_step(&batch(100 + step), 1e-2).unwrap();
    }
}

/// As a round ends: all parameters are read, changed and written.
fn halve_parameters(engine: &mut TorchEngine) {
    let whole = engine.schema().whole();
    let mut values = vec![0.0; whole.elements()];
    engine.read_fragment(&whole, &mut values).unwrap();
    values.iter_mut().for_each(|value| *value *= 0.5);
    engine.write_fragment(&whole, &values).unwrap();
}

fn lost(result: Result<engine::StepReport, EngineError>) -> String {
    match result {
        Err(EngineError::Lost { reason, .. }) => reason,
        other => panic!("{other:?}"),
    }
}

/// Waits until `process` is computing, then does something to it.
fn once_busy(process: u32, act: impl FnOnce() + Send + 'static) -> thread::JoinHandle<()> {
    let before = processor_ticks(process);
    thread::spawn(move || {
        wait_until("the step computes", || processor_ticks(process) >= before + 10);
        act();
    })
}

#[test]
fn an_engine_killed_in_a_step_recovers_with_the_same_bits_and_a_stopped_one_ends() {
    if !has_module("torch") {
        return;
    }
    let mut engine = start(&options());
    steps(&mut engine, 0..4);
    halve_parameters(&mut engine);
    steps(&mut engine, 4..8);
    let uninterrupted = state_bits(&mut engine);

    let first = engine.process_id().unwrap();
    let killer = once_busy(first, move || signal(first, Signal::KILL));
    let reason = lost(engine.inner_step(&endless_batch(), 1e-2));
    killer.join().unwrap();
    assert!(reason.starts_with("its process was killed by signal 9 (SIGKILL"), "{reason}");
    assert_eq!(lost(engine.inner_step(&batch(1), 1e-2)), reason, "and so does every later call");
    assert!(matches!(engine.evaluate(&batch(1)), Err(EngineError::Lost { .. })));
    assert!(matches!(engine.save(), Err(EngineError::Lost { .. })));
    engine.recover().unwrap();
    assert_ne!(engine.process_id(), Some(first));
    steps(&mut engine, 4..8);
    assert_eq!(state_bits(&mut engine), uninterrupted);

    // A process that does not answer: an interrupter ends it.
    let process = engine.process_id().unwrap();
    let interrupt = engine.interrupter().unwrap();
    signal(process, Signal::STOP);
    // The call waits for an answer, or will: the outcome is the same.
    let interrupter = thread::spawn(interrupt);
    assert_eq!(lost(engine.inner_step(&batch(1), 1e-2)), "it was ended because it did not answer");
    interrupter.join().unwrap();
    wait_until("the interrupted process is gone", || !is_running(process));

    // And so does drop.
    engine.recover().unwrap();
    let process = engine.process_id().unwrap();
    steps(&mut engine, 0..1);
    signal(process, Signal::STOP);
    drop(engine);
    wait_until("the dropped process is gone", || !is_running(process));
}

#[test]
fn no_file_is_left_while_the_engine_runs_nor_a_process_when_the_agent_is_killed() {
    const ROLE: &str = "BERINGIA_TEST_AGENT";
    if std::env::var_os(ROLE).is_some() {
        let mut engine = start(&options());
        steps(&mut engine, 0..1);
        eprintln!("engine {}", engine.process_id().unwrap());
        // The parent kills this process here.
        let _ = std::io::stdin().read_line(&mut String::new());
        return;
    }
    if !has_module("torch") {
        return;
    }
    let name = "no_file_is_left_while_the_engine_runs_nor_a_process_when_the_agent_is_killed";
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", name, "--nocapture"]).env(ROLE, "1");
    command.stdin(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    let mut agent = command.stdout(std::process::Stdio::null()).spawn().unwrap();
    let said = std::io::BufRead::lines(std::io::BufReader::new(agent.stderr.take().unwrap()));
    let process = said.map_while(Result::ok).find_map(|line| line.strip_prefix("engine ")?.parse::<u32>().ok());
    let process = process.unwrap();

    let maps = fs::read_to_string(format!("/proc/{process}/maps")).unwrap();
    let is_arena = |line: &&str| line.contains(" rw-s ") && line.contains("/beringia-");
    let shared: Vec<&str> = maps.lines().filter(is_arena).collect();
    assert!(!shared.is_empty(), "tensors are in shared memory");
    assert!(shared.iter().all(|line| line.ends_with("(deleted)")), "{shared:?}");
    let environment = fs::read(format!("/proc/{process}/environ")).unwrap();
    let environment = String::from_utf8_lossy(&environment).into_owned();
    let folder = environment.split('\0').find_map(|variable| variable.strip_prefix("BERINGIA_TORCH_FOLDER=")).unwrap();
    assert!(!fs::exists(folder).unwrap(), "{folder} holds the package, which is imported");

    agent.kill().unwrap();
    agent.wait().unwrap();
    wait_until("the engine ends with its agent", || !is_running(process));
}

#[test]
fn software_that_is_missing_is_named_with_its_command() {
    let absent = TorchOptions { python: Some("/nowhere/python3".into()), ..options() };
    match refused(&absent) {
        EngineError::Missing { what, reason, install, .. } => {
            assert!(what.starts_with("Python"), "{what}");
            assert_eq!(reason, "there is no '/nowhere/python3'");
            assert!(install.contains("apt-get install python3"), "{install}");
        }
        other => panic!("{other:?}"),
    }
    let folder = tempfile::tempdir().unwrap();
    let broken = script(folder.path(), "#!/bin/sh\necho 'first' >&2\necho 'no such library' >&2\nexit 3\n");
    let reason = refused(&TorchOptions { python: Some(broken), ..options() }).to_string();
    assert!(reason.contains("exit code 3") && reason.ends_with("first\nno such library"), "{reason}");
    if !has_module("torch") {
        return;
    }
    match refused(&TorchOptions { device: "npu".to_owned(), ..options() }) {
        EngineError::Missing { engine, what, install, .. } => {
            assert_eq!((engine.as_str(), what.as_str()), ("torch:npu", "torch_npu"));
            assert!(install.ends_with("-m pip install torch_npu"), "{install}");
        }
        other => panic!("{other:?}"),
    }
    let ranks = TorchOptions { ranks: 2, compile: Compile::On, ..options() };
    assert!(refused(&ranks).to_string().contains("compile is off with several ranks"));
    let none = refused(&TorchOptions { device: "nonesuch:3".to_owned(), ..options() });
    assert!(matches!(&none, EngineError::Device { device, .. } if device == "torch:nonesuch:3"), "{none:?}");
}

#[test]
fn a_torch_that_is_absent_or_too_old_is_named() {
    let python = common::python();
    if !has_module("json") {
        return;
    }
    let with = |module: &str| {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("torch.py"), module).unwrap();
        let (stub, python) = (folder.path().display(), python.display());
        let text = format!("#!/bin/sh\nPYTHONPATH='{stub}':\"$PYTHONPATH\" exec '{python}' \"$@\"\n");
        let python = script(folder.path(), &text);
        let one = refused(&TorchOptions { python: Some(python.clone()), ..options() });
        let listed = engine_torch::devices(Some(&python)).unwrap_err();
        (one, listed)
    };
    let (old, listed) = with("__version__ = '1.13.1'\nclass version:\n    cuda = None\n");
    for error in [old, listed] {
        match error {
            EngineError::Missing { what, reason, install, .. } => {
                assert!(format!("{what} {reason}").contains("torch 1.13.1 is installed"), "{what}: {reason}");
                assert!(install.contains("-m pip install --upgrade"), "{install}");
            }
            other => panic!("{other:?}"),
        }
    }
    let (absent, listed) = with("raise ModuleNotFoundError(\"No module named 'torch'\")\n");
    for error in [absent, listed] {
        match error {
            EngineError::Missing { install, .. } => assert!(install.ends_with("-m pip install torch"), "{install}"),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_batch_that_does_not_fit_into_memory_changes_nothing() {
    if !has_module("torch") {
        return;
    }
    // 16 GiB of addresses. A batch of 2^17 tokens over a vocabulary of 2^16 needs 32 GiB for its logits.
    let folder = tempfile::tempdir().unwrap();
    let limited = format!("#!/bin/sh\nulimit -v 16777216\nexec '{}' \"$@\"\n", common::python().display());
    let options = TorchOptions { python: Some(script(folder.path(), &limited)), ..options() };
    let shape = ModelShape { vocab_size: 1 << 16, hidden_size: 8, ..tiny_shape(true) };
    let mut engine = open(&shape, &options).unwrap();
    engine.inner_step(&random_batch(&shape, 2, 16, 1), 1e-2).unwrap();
    let before = state_bits(&mut engine);
    let large = random_batch(&shape, 1 << 13, 16, 2);
    engine.set_micro_batch_samples(large.samples);
    let refused = engine.inner_step(&large, 1e-2);
    assert!(matches!(refused, Err(EngineError::OutOfMemory { .. })), "{refused:?}");
    assert_eq!(state_bits(&mut engine), before);
    engine.set_micro_batch_samples(2);
    assert_eq!(engine.micro_batch_samples(), 2);
    engine.inner_step(&random_batch(&shape, 4, 16, 3), 1e-2).unwrap();
}

#[test]
fn two_ranks_compute_what_one_does_and_end_together() {
    if !has_module("torch") {
        return;
    }
    let mut one = start(&options());
    let mut two = start(&TorchOptions { ranks: 2, ..options() });
    for step in 0..3 {
        let (of_one, of_two) =
            (one.inner_step(&batch(step), 1e-2).unwrap(), two.inner_step(&batch(step), 1e-2).unwrap());
        // Sums of gradients in another order.
        assert!((of_one.loss_nats - of_two.loss_nats).abs() < 1e-5 * of_one.loss_nats, "{of_one:?} {of_two:?}");
    }
    // A state does not depend on the number of ranks that saved it.
    let saved = state_bits(&mut two);
    let state = two.save().unwrap();
    one.restore(&state).unwrap();
    assert_eq!(state_bits(&mut one), saved);

    let launcher = two.process_id().unwrap();
    let ranks = descendants(launcher);
    assert!(ranks.len() >= 2, "{ranks:?}");
    signal(*ranks.iter().max().unwrap(), Signal::KILL);
    lost(two.inner_step(&batch(9), 1e-2));
    let is_gone = |process: &u32| !is_running(*process);
    wait_until("all ranks and their launcher are gone", || ranks.iter().chain([&launcher]).all(is_gone));
}

/// A package whose rank 0 says hello, and that ends as a rank other than 0 does when it has no memory left.
const OTHER_RANK_OUT_OF_MEMORY: &str = r#"
import json, socket, struct, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[sys.argv.index("--socket") + 1])
hello = json.dumps({"protocol": 1, "python": "3", "torch": "2", "rank_count": 2}).encode()
connection.sendall(struct.pack("<I", len(hello)) + hello)
connection.recv(4)
print("rank 1: out of memory: 2 GiB wanted", *["Traceback"] * 40, sep="\n", file=sys.stderr, flush=True)
sys.exit(1)
"#;

#[test]
fn another_rank_out_of_memory_is_told_as_such() {
    if !has_module("json") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let python =
        script(folder.path(), &format!("#!/usr/bin/env {}{OTHER_RANK_OUT_OF_MEMORY}", common::python().display()));
    let error = refused(&TorchOptions { python: Some(python), ranks: 2, ..options() });
    match error {
        EngineError::OutOfMemory { reason, .. } => assert_eq!(reason, "rank 1: out of memory: 2 GiB wanted"),
        other => panic!("{other:?}"),
    }
}
