//! The gate: one command that says whether a change may land. It changes no file of the repository.
//!
//! Cheap checks come first and the first failure ends it, so that the common mistakes cost seconds. What mends
//! is another command, `cargo xtask fix`, so that looking never edits.

use crate::arrows::{self, Metadata};
use crate::finding::Finding;
use crate::{purity, tidy};
use proc_macro2::TokenStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

/// Which of the slow steps to leave out.
#[derive(Debug, Clone, Copy, clap::Args)]
pub(crate) struct VerifyOptions {
    /// Leave out clippy and the tests: what remains takes seconds
    #[arg(long)]
    quick: bool,
    /// Leave out the tests only
    #[arg(long)]
    no_tests: bool,
}

/// Why the gate stays shut.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum VerifyError {
    /// One of our own rules is broken.
    #[error("{}", listed(.0))]
    Findings(Vec<Finding>),
    /// A command said no.
    #[error("`{command}` failed: {status}")]
    Refused { command: String, status: std::process::ExitStatus },
    /// A command could not be started.
    #[error("cannot start `{command}`: {source}")]
    Start { command: String, source: std::io::Error },
    /// A command printed what this program does not understand.
    #[error("cannot read what `{command}` printed: {reason}")]
    Output { command: String, reason: String },
    /// A tool that the gate needs is missing.
    #[error("{tool} is not installed, and CI is set: the gate would pass without looking")]
    Missing { tool: &'static str, install: &'static str },
}

impl VerifyError {
    /// The command or edit that mends it.
    pub(crate) fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Refused { command, .. } if command.contains("fmt") || command.contains("clippy") => {
                Some("`cargo xtask fix` mends what can be mended without thinking")
            }
            Self::Missing { install, .. } => Some(install),
            Self::Start { command, .. } if command.starts_with("git") => Some("run this in a git checkout"),
            _ => None,
        }
    }
}

fn listed(findings: &[Finding]) -> String {
    findings.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
}

/// What a step that did not fail has to say.
enum Outcome {
    Passed,
    Skipped(&'static str),
}

struct Step {
    name: &'static str,
    run: fn(&Path) -> Result<Outcome, VerifyError>,
}

const CHEAP_STEPS: &[Step] = &[
    Step { name: "format", run: format },
    Step { name: "arrows between crates", run: arrows },
    Step { name: "purity and tidy", run: sources },
    Step { name: "licences, bans, sources", run: deny },
];
const CLIPPY: Step = Step { name: "clippy", run: clippy };
const TESTS: Step = Step { name: "tests", run: tests };

/// Runs the steps in order; stops at the first failure.
///
/// # Errors
/// The first step that failed.
pub(crate) fn run(options: VerifyOptions) -> Result<(), VerifyError> {
    let root = workspace_root()?;
    let start = Instant::now();
    let slow = [(!options.quick).then_some(&CLIPPY), (!options.quick && !options.no_tests).then_some(&TESTS)];
    for step in CHEAP_STEPS.iter().chain(slow.into_iter().flatten()) {
        run_step(step, &root)?;
    }
    println!("verify: all passed in {:.1} s", start.elapsed().as_secs_f64());
    Ok(())
}

fn run_step(step: &Step, root: &Path) -> Result<(), VerifyError> {
    let start = Instant::now();
    println!("verify: {} ...", step.name);
    let outcome = (step.run)(root);
    let seconds = start.elapsed().as_secs_f64();
    match &outcome {
        Ok(Outcome::Passed) => println!("verify: {} passed in {seconds:.1} s", step.name),
        Ok(Outcome::Skipped(why)) => println!("verify: {} SKIPPED: {why}", step.name),
        Err(_) => println!("verify: {} FAILED after {seconds:.1} s", step.name),
    }
    outcome.map(|_| ())
}

/// Mends what can be mended mechanically: formatting and clippy's certain suggestions.
///
/// # Errors
/// One of the two commands failed.
pub(crate) fn fix() -> Result<(), VerifyError> {
    let root = workspace_root()?;
    call(&root, "cargo", &["fmt", "--all"])?;
    // Formatting may just have changed files, so that the tree is allowed to be dirty.
    call(&root, "cargo", &["clippy", "--fix", "--workspace", "--all-targets", "--allow-dirty", "--allow-staged"])
}

fn format(root: &Path) -> Result<Outcome, VerifyError> {
    call(root, "cargo", &["fmt", "--all", "--check"]).map(|()| Outcome::Passed)
}

fn clippy(root: &Path) -> Result<Outcome, VerifyError> {
    call(root, "cargo", &["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]).map(|()| Outcome::Passed)
}

fn tests(root: &Path) -> Result<Outcome, VerifyError> {
    call(root, "cargo", &["test", "--workspace"]).map(|()| Outcome::Passed)
}

fn arrows(root: &Path) -> Result<Outcome, VerifyError> {
    let arguments = ["metadata", "--format-version", "1", "--no-deps"];
    let text = read(root, "cargo", &arguments)?;
    let metadata: Metadata = serde_json::from_str(&text)
        .map_err(|error| VerifyError::Output { command: spelled("cargo", &arguments), reason: error.to_string() })?;
    passed_without(arrows::check(&metadata))
}

fn sources(root: &Path) -> Result<Outcome, VerifyError> {
    // Tracked files and new ones that are not ignored: what the next commit may hold.
    let listing = read(root, "git", &["ls-files", "-z", "--cached", "--others", "--exclude-standard"])?;
    let mut findings = Vec::new();
    for path in listing.split('\0').filter(|path| !path.is_empty()) {
        // A file that is gone, a link or binary data has no lines to hold to a rule.
        if let Ok(text) = std::fs::read_to_string(root.join(path)) {
            findings.extend(check_source(root, path, &text));
        }
    }
    passed_without(findings)
}

fn check_source(root: &Path, path: &str, text: &str) -> Vec<Finding> {
    let tokens = path.ends_with(".rs").then(|| text.parse::<TokenStream>());
    let tokens = match tokens.transpose() {
        Ok(tokens) => tokens,
        Err(error) => {
            let line = error.span().start().line;
            return vec![Finding::at(
                path,
                line,
                format!("not Rust: {error}"),
                "a file that is no Rust cannot be checked",
            )];
        }
    };
    let mut findings = tidy::check(path, text, tokens.as_ref(), &|file| root.join(file).exists());
    if let (Some(crate_name), Some(tokens)) = (crate_of_source(path), tokens)
        && arrows::is_pure(crate_name)
    {
        findings.extend(purity::check(path, tokens));
    }
    findings
}

/// `x` for `crates/x/src/...`: the sources that ship.
fn crate_of_source(path: &str) -> Option<&str> {
    let (crate_name, rest) = path.strip_prefix("crates/")?.split_once('/')?;
    (rest.starts_with("src/") && !tidy::is_test_module(path)).then_some(crate_name)
}

fn deny(root: &Path) -> Result<Outcome, VerifyError> {
    let installed = Command::new("cargo").args(["deny", "--version"]).output().is_ok_and(|out| out.status.success());
    if !installed && std::env::var_os("CI").is_some_and(|value| !value.is_empty()) {
        let install = "cargo install cargo-deny --locked";
        return Err(VerifyError::Missing { tool: "cargo-deny", install });
    }
    if !installed {
        return Ok(Outcome::Skipped("cargo-deny is missing; `cargo install cargo-deny --locked` adds it"));
    }
    // Warnings about double versions are for who updates dependencies, by calling cargo deny directly.
    call(root, "cargo", &["deny", "--log-level", "error", "check", "licenses", "bans", "sources"])
        .map(|()| Outcome::Passed)
}

fn passed_without(findings: Vec<Finding>) -> Result<Outcome, VerifyError> {
    if findings.is_empty() { Ok(Outcome::Passed) } else { Err(VerifyError::Findings(findings)) }
}

fn workspace_root() -> Result<PathBuf, VerifyError> {
    let arguments = ["locate-project", "--workspace", "--message-format", "plain"];
    let manifest = read(Path::new("."), "cargo", &arguments)?;
    Ok(Path::new(manifest.trim()).parent().map_or_else(|| PathBuf::from("."), Path::to_path_buf))
}

fn spelled(program: &str, arguments: &[&str]) -> String {
    format!("{program} {}", arguments.join(" "))
}

/// Runs a command that talks to the user itself.
fn call(root: &Path, program: &str, arguments: &[&str]) -> Result<(), VerifyError> {
    let command = spelled(program, arguments);
    match Command::new(program).args(arguments).current_dir(root).status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(VerifyError::Refused { command, status }),
        Err(source) => Err(VerifyError::Start { command, source }),
    }
}

/// Runs a command and returns what it prints.
fn read(root: &Path, program: &str, arguments: &[&str]) -> Result<String, VerifyError> {
    let command = spelled(program, arguments);
    let output =
        match Command::new(program).args(arguments).current_dir(root).stderr(std::process::Stdio::inherit()).output() {
            Ok(output) => output,
            Err(source) => return Err(VerifyError::Start { command, source }),
        };
    if !output.status.success() {
        return Err(VerifyError::Refused { command, status: output.status });
    }
    String::from_utf8(output.stdout).map_err(|error| VerifyError::Output { command, reason: error.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_shipped_sources_must_be_pure() {
        assert_eq!(crate_of_source("crates/rounds/src/ledger.rs"), Some("rounds"));
        assert_eq!(crate_of_source("crates/rounds/tests/golden.rs"), None);
        assert_eq!(crate_of_source("crates/rounds/src/ledger/tests.rs"), None);
        assert_eq!(crate_of_source("xtask/src/main.rs"), None);
    }

    #[test]
    fn a_clock_in_a_pure_crate_shuts_the_gate_and_one_above_does_not() {
        let text = "//! Why.\nuse std::time::Instant;\n";
        let found = check_source(Path::new("."), "crates/rounds/src/lib.rs", text);
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!(check_source(Path::new("."), "crates/site/src/lib.rs", text), []);
    }

    #[test]
    fn a_file_that_is_no_rust_is_a_finding_not_a_panic() {
        assert_eq!(check_source(Path::new("."), "crates/site/src/lib.rs", "fn main( {").len(), 1);
    }

    #[test]
    fn the_present_workspace_keeps_its_arrows() {
        let root = workspace_root().unwrap();
        assert!(arrows(&root).is_ok_and(|outcome| matches!(outcome, Outcome::Passed)));
    }
}
