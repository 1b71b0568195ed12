//! The `beringia` binary: one file a command, all of them printing through [`output::Output`] and failing with
//! a [`failure::Failure`] that says what mends it.
//!
//! Exit status: 0 when the command did what it was asked, 1 when it could not, 2 when it was asked wrongly.
//! What a command computes lies in the crates below; here are arguments, messages and nothing else.

mod commands;
mod engines;
mod failure;
mod format;
mod invites;
mod models;
mod output;
mod overrides;
mod progress;
mod run_file;
mod signals;
mod texts;
mod transformers;
mod watch;

use clap::{Parser, Subcommand};
use commands::{
    devices, doctor, eval, export, init, join, lab, logits, measure, members, plan, predict, sample, serve, simulate,
    status, train,
};
use failure::Failure;
use output::Output;
use std::process::ExitCode;

/// Train one language model over several sites.
#[derive(Debug, Parser)]
#[command(name = "beringia", version, about, max_term_width = 100)]
struct Cli {
    /// Print one JSON object on standard output; everything else goes to standard error.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

/// In the order in which a user meets them.
#[derive(Debug, Subcommand)]
enum Command {
    Init(init::Args),
    Train(train::Args),
    Serve(serve::Args),
    Join(join::Args),
    Status(status::Args),
    Members(members::Args),
    Admit(members::AdmitArgs),
    Revoke(members::RevokeArgs),
    Sample(sample::Args),
    Eval(eval::Args),
    Export(export::Args),
    Lab(lab::Args),
    Devices(devices::Args),
    Doctor(doctor::Args),
    Simulate(simulate::Args),
    Plan(plan::Args),
    Predict(predict::Args),
    #[command(hide = true)]
    Logits(logits::Args),
    #[command(hide = true)]
    Measure(measure::Args),
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return refuse_usage(&error),
    };
    let output = Output::new(cli.json);
    let done = run(cli.command, &output).and_then(|()| output.finish());
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            output.failure(&failure);
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command, output: &Output) -> Result<(), Failure> {
    match command {
        Command::Init(args) => init::run(args, output),
        Command::Train(args) => train::run(args, output),
        Command::Serve(args) => serve::run(args, output),
        Command::Join(args) => join::run(args, output),
        Command::Status(args) => status::run(args, output),
        Command::Members(args) => members::run(args, output),
        Command::Admit(args) => members::admit(args, output),
        Command::Revoke(args) => members::revoke(args, output),
        Command::Sample(args) => sample::run(args, output),
        Command::Eval(args) => eval::run(args, output),
        Command::Export(args) => export::run(args, output),
        Command::Lab(args) => lab::run(args, output),
        Command::Devices(args) => devices::run(args, output),
        Command::Doctor(args) => doctor::run(args, output),
        Command::Simulate(args) => simulate::run(args, output),
        Command::Plan(args) => plan::run(args, output),
        Command::Predict(args) => predict::run(args, output),
        Command::Logits(args) => logits::run(args, output),
        Command::Measure(args) => measure::run(args, output),
    }
}

/// Help and version, or what is wrong with the arguments: clap's text, and an object where one was asked for.
fn refuse_usage(error: &clap::Error) -> ExitCode {
    // Arguments that do not parse tell no more than whether the word is among them.
    if error.use_stderr() && std::env::args_os().any(|argument| argument == "--json") {
        let text = error.to_string();
        let message = text.lines().next().unwrap_or_default().trim_start_matches("error: ");
        Output::new(true).object(&Failure::new(message, "`beringia --help` lists commands and arguments"));
    }
    // Where the terminal is gone there is nobody to tell.
    let _ = error.print();
    if error.use_stderr() { ExitCode::from(2) } else { ExitCode::SUCCESS }
}
