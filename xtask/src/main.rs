//! Automation of the project: the gate that every change passes, and the benches.
//!
//! `cargo xtask verify` only looks; `cargo xtask fix` edits. What a user of Beringia needs is in the binary
//! `beringia`, not here.

// The one purpose of this program is to talk to whoever runs it.
#![allow(clippy::print_stdout, clippy::print_stderr)]

mod arrows;
mod bench_chaos;
mod bench_check;
mod bench_curves;
mod bench_diloco;
mod bench_emulated;
mod bench_engine;
#[cfg(target_os = "linux")]
mod bench_link;
mod bench_mixed;
mod bench_plan;
mod chart;
mod docs;
mod faults;
mod finding;
mod fit;
mod namespaces;
mod published;
mod purity;
mod runs;
mod tidy;
mod tokens;
mod verify;
mod wan;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Checks and measures this repository
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    command: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Say whether the tree may land: format, arrows between crates, tidiness, licences, clippy, tests. Edits nothing
    Verify(verify::VerifyOptions),
    /// Mend what can be mended without thinking: formatting, and clippy's certain suggestions
    Fix,
    /// Make the performance model's constants again from measured tables, and judge them on the rows that did not fit
    Fit(fit::Options),
    /// Run the test of every fault and write docs/faults.md from what was seen
    Faults(faults::Options),
    /// Run the commands that the documents show and compare what they print
    Docs(docs::Options),
    /// Published runs beside what a plan says of them
    Published(published::Options),
    /// Measure, and print what was compared with what
    #[command(subcommand)]
    Bench(Bench),
}

#[derive(Debug, Subcommand)]
enum Bench {
    /// Speed of the native engine against PyTorch on the CPU: [--python PATH] [--threads N] [--rounds N] [--steps N] [--json]
    Engine {
        /// Its own arguments
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Validation loss of sites that merge every H steps against one site on the same samples
    Diloco(Box<bench_diloco::Options>),
    /// Speed of sites of unlike engines together against the sum of what each does alone
    Mixed(Box<bench_mixed::Options>),
    /// Goodput of bulk transfer against iperf3 on the same shaped link; needs root
    #[cfg(target_os = "linux")]
    Link(bench_link::Options),
    /// Tokens committed with a kill a minute over those without, and times of recovery
    Chaos(Box<bench_chaos::Options>),
    /// Validation loss of sites of unlike engines against sites of one engine
    Curves(Box<bench_curves::Options>),
    /// Gbit/s that models of 1B to 100B need for 50 to 99 % utilisation, with steps that sleep, beside a published table. Needs root
    Emulated(Box<bench_emulated::Options>),
    /// What `plan --check` says of ten labs: predicted against measured tokens a second and bytes
    Check(bench_check::Options),
    /// Plans a second of small clusters, and time and memory of the plan of 100,000 devices
    Plan(bench_plan::Options),
    /// Beringia beside PyTorch DDP, torchft and hivemind over a thin link: speed, bytes, loss. Needs root
    Wan(Box<wan::Options>),
}

fn main() -> ExitCode {
    let outcome = match Arguments::parse().command {
        Task::Verify(options) => verify::run(options).map_err(|error| (error.to_string(), error.hint())),
        Task::Fix => verify::fix().map_err(|error| (error.to_string(), error.hint())),
        Task::Fit(options) => fit::run(&options).map_err(|error| (error.to_string(), error.hint())),
        Task::Faults(options) => faults::run(&options).map_err(|error| (error.to_string(), None)),
        Task::Docs(options) => docs::run(&options).map_err(|error| (error.to_string(), None)),
        Task::Published(options) => published::run(&options).map_err(|error| (error.to_string(), None)),
        Task::Bench(Bench::Chaos(options)) => bench_chaos::run(&options).map_err(|error| (error.to_string(), None)),
        Task::Bench(Bench::Engine { arguments }) => {
            bench_engine::run(&arguments).map_err(|error| (error.to_string(), None))
        }
        Task::Bench(Bench::Mixed(options)) => bench_mixed::run(&options).map_err(|error| (error.to_string(), None)),
        #[cfg(target_os = "linux")]
        Task::Bench(Bench::Link(options)) => bench_link::run(&options).map_err(|error| (error.to_string(), None)),
        Task::Bench(Bench::Curves(options)) => bench_curves::run(&options).map_err(|error| (error.to_string(), None)),
        Task::Bench(Bench::Emulated(options)) => {
            bench_emulated::run(&options).map_err(|error| (error.to_string(), None))
        }
        Task::Bench(Bench::Check(options)) => bench_check::run(&options).map_err(|error| (error.to_string(), None)),
        Task::Bench(Bench::Plan(options)) => bench_plan::run(&options).map_err(|error| (error.to_string(), None)),
        Task::Bench(Bench::Wan(options)) => wan::run(&options).map_err(|error| (error.to_string(), None)),
        Task::Bench(Bench::Diloco(options)) => bench_diloco::run(&options).map_err(|error| (error.to_string(), None)),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err((message, hint)) => {
            eprintln!("error: {message}");
            if let Some(hint) = hint {
                eprintln!("hint: {hint}");
            }
            ExitCode::FAILURE
        }
    }
}
