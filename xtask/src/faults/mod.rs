//! `cargo xtask faults`: runs the test of each fault, and writes docs/faults.md from what was seen.
//!
//! The list says what is done and which test does it; whether that test passes, and the figure that it leaves behind, are
//! found by running it. Every fault has one.

mod list;

use crate::runs::Failure;
use list::{FAULTS, Fault, Proof, Suite};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

/// Where tests leave their figures: a folder in this variable.
const FIGURES_FOLDER: &str = "BERINGIA_FIGURES";

/// The table's place.
const DOCUMENT: &str = "docs/faults.md";

/// Settings of the command.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Print the table, and leave docs/faults.md as it is
    #[arg(long)]
    dry_run: bool,
}

/// What running the tests has shown.
#[derive(Debug, Default)]
struct Seen {
    /// Names of tests with whether they passed.
    passed: BTreeMap<String, bool>,
    figures: BTreeMap<String, String>,
}

/// Runs the command.
pub(crate) fn run(options: &Options) -> Result<(), Failure> {
    let folder = std::env::temp_dir().join(format!("beringia-figures-{}", std::process::id()));
    fs::create_dir_all(&folder)?;
    let seen = see(&folder);
    let removed = fs::remove_dir_all(&folder);
    let (seen, ()) = (seen?, removed?);
    let table = document(&seen);
    if options.dry_run {
        print!("{table}");
    } else {
        fs::write(DOCUMENT, table)?;
        println!("{DOCUMENT}: {} faults, {} tests", FAULTS.len(), seen.passed.len());
    }
    let failed: Vec<&str> = seen.passed.iter().filter(|(_, passed)| !**passed).map(|(name, _)| name.as_str()).collect();
    if failed.is_empty() { Ok(()) } else { Err(format!("failed: {}", failed.join(", ")).into()) }
}

fn proofs() -> impl Iterator<Item = &'static Proof> {
    FAULTS.iter().flat_map(|fault| fault.proofs)
}

/// Runs every test of the list, those of one binary together.
fn see(figures: &Path) -> Result<Seen, Failure> {
    let mut suites: BTreeMap<Suite, BTreeSet<&str>> = BTreeMap::new();
    for proof in proofs() {
        // Library tests of all packages run together.
        let suite =
            Suite { package: if proof.suite.target.is_some() { proof.suite.package } else { "lib" }, ..proof.suite };
        suites.entry(suite).or_default().insert(proof.test);
    }
    let mut seen = Seen::default();
    for (suite, tests) in suites {
        eprintln!("{}: {} tests", suite.name(), tests.len());
        let said = run_suite(suite, &tests, figures)?;
        for test in tests {
            let passed = result_of(&said, test).ok_or_else(|| format!("{}: there is no test {test}", suite.name()))?;
            seen.passed.insert(test.to_owned(), passed);
        }
    }
    for entry in fs::read_dir(figures)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        seen.figures.insert(name, fs::read_to_string(&path)?);
    }
    Ok(seen)
}

fn run_suite(suite: Suite, tests: &BTreeSet<&str>, figures: &Path) -> Result<String, Failure> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    let mut command = Command::new(cargo);
    // Of the whole workspace, whose features are those that are built already; a package alone has others, and builds its dependencies anew.
    command.args(["test", "--workspace", "--no-fail-fast"]);
    match suite.target {
        Some(target) => command.args(["--test", target]),
        None => command.arg("--lib"),
    };
    command.arg("--").args(tests).env(FIGURES_FOLDER, figures);
    let output = command.stderr(Stdio::inherit()).output()?;
    Ok(String::from_utf8(output.stdout)?)
}

/// Whether a test passed, from the lines of its binary: `test module::name ... ok`.
fn result_of(said: &str, test: &str) -> Option<bool> {
    said.lines().find_map(|line| {
        let (name, result) = line.strip_prefix("test ")?.split_once(" ... ")?;
        (name == test || name.ends_with(&format!("::{test}"))).then_some(result == "ok")
    })
}

fn document(seen: &Seen) -> String {
    let mut text = String::from(
        "# Faults\n\nWhat was done to a run, what is seen then, and the test that does it: written by `cargo xtask faults`, which runs \
         every test named here and takes the figures from it. Figures are of tests with tiny models on one machine, in the development \
         profile; those of 15 minutes of kills are made by `cargo xtask bench chaos`. `simulated` are tests in virtual time, of the code that \
         ships ([simulator.md](simulator.md)). What is promised to whom is in [lab.md](lab.md) and the other pages.\n\n\
         | fault | what is done | what is seen | figure | test |\n|---|---|---|---|---|\n",
    );
    FAULTS.iter().for_each(|fault| text.push_str(&row(fault, seen)));
    text
}

fn row(fault: &Fault, seen: &Seen) -> String {
    let figures: Vec<&str> =
        fault.figures.iter().filter_map(|name| seen.figures.get(*name)).map(String::as_str).collect();
    let test = |proof: &Proof| {
        let failed = match seen.passed.get(proof.test) {
            Some(true) => "",
            _ => " **FAILED**",
        };
        format!("`{}` {}{failed}", proof.suite.name(), proof.test.replace('_', " "))
    };
    let tests: Vec<String> = fault.proofs.iter().map(test).collect();
    let Fault { name, done, seen, .. } = fault;
    format!("| {name} | {done} | {seen} | {} | {} |\n", figures.join("; "), tests.join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    /// Files in which the tests of a suite are.
    fn sources(suite: Suite) -> PathBuf {
        let package = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates").join(suite.package);
        package.join(if suite.target.is_some() { "tests" } else { "src" })
    }

    fn text_below(folder: &Path) -> String {
        let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        let read = |path: PathBuf| match path.is_dir() {
            true => text_below(&path),
            false => fs::read_to_string(&path).unwrap_or_default(),
        };
        entries.map(read).collect()
    }

    #[test]
    fn every_test_of_the_list_exists() {
        assert!(FAULTS.iter().all(|fault| !fault.proofs.is_empty()), "each has one");
        for proof in proofs() {
            let text = text_below(&sources(proof.suite));
            assert!(text.contains(&format!("fn {}(", proof.test)), "{}: {}", proof.suite.name(), proof.test);
        }
    }

    #[test]
    fn results_are_read_from_the_lines_of_a_test_binary() {
        let said = "running 2 tests\ntest a::one ... ok\ntest one_more ... FAILED\n";
        assert_eq!(result_of(said, "one"), Some(true));
        assert_eq!(result_of(said, "one_more"), Some(false));
        assert_eq!(result_of(said, "more"), None);
    }

    #[test]
    fn the_table_tells_what_failed() {
        let mut seen = Seen::default();
        seen.passed.extend(proofs().map(|proof| (proof.test.to_owned(), true)));
        let good = document(&seen);
        assert!(!good.contains("FAILED"));
        let Some(first) = proofs().next() else { panic!("the list is empty") };
        seen.passed.insert(first.test.to_owned(), false);
        assert!(document(&seen).contains("**FAILED**"));
    }
}
