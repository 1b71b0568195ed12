//! Automation of the project: the gate that every change passes, and the benches.
//!
//! `cargo xtask verify` only looks; `cargo xtask fix` edits. What a user of Beringia needs is in the binary
//! `beringia`, not here.

// The one purpose of this program is to talk to whoever runs it.
#![allow(clippy::print_stdout, clippy::print_stderr)]

mod arrows;
mod finding;
mod purity;
mod tidy;
mod tokens;
mod verify;

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
}

fn main() -> ExitCode {
    let outcome = match Arguments::parse().command {
        Task::Verify(options) => verify::run(options),
        Task::Fix => verify::fix(),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            if let Some(hint) = error.hint() {
                eprintln!("hint: {hint}");
            }
            ExitCode::FAILURE
        }
    }
}
