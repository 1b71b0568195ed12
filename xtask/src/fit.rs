//! `cargo xtask fit`: makes the performance model's fitted constants again from a folder of measured tables, lays the errors of the
//! judging half beside those of a naive model, and says whether the constants that the program ships with are the ones that came out.
//!
//! The mathematics is in `planner::fit`; here are files and print. The tables themselves are not part of the repository.

use planner::Catalogue;
use planner::fit::{Observation, fit, judge, memory, tables::TABLES, unseen};
use planner::model::constants::{Constants, DESCRIPTIONS, FITTED};
use std::path::{Path, PathBuf};

/// Relative difference of a constant that says nothing: the search ends at steps of 0.2 %, and four digits are written.
const SAME: f64 = 0.005;

/// Most fits in a row, each from the last one's end.
const SETTLING_FITS_MAX: usize = 20;

/// Where the constants are written down.
const CONSTANTS_FILE: &str = "crates/planner/src/model/constants.rs";

/// Table of published memory: nothing is fitted on it.
const MEMORY_TABLE: &str = "korthikanti_fig1_memory.csv";

/// What to fit on, and what to do with it
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Folder of the measured tables
    #[arg(default_value = "../shared/validation")]
    folder: PathBuf,
    /// Judge the shipped constants only; nothing is fitted
    #[arg(long)]
    judge: bool,
    /// Print every row with its prediction
    #[arg(long)]
    rows: bool,
    /// Write the constants into the source file where they differ
    #[arg(long)]
    write: bool,
}

/// Why there is no fit.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum FitError {
    /// A file cannot be read or written.
    #[error("{path}: {source}")]
    File { path: PathBuf, source: std::io::Error },
    /// A table is not what its reader expects.
    #[error("{table}: {source}")]
    Table { table: &'static str, source: planner::fit::tables::TableReadError },
    /// What is shipped is not what the tables give.
    #[error("{0} of {count} constants in {CONSTANTS_FILE} are not what the fit gives", count = DESCRIPTIONS.len())]
    Differs(usize),
    /// The source file has no line for a constant.
    #[error("{CONSTANTS_FILE} has no line for {0}")]
    NoLine(&'static str),
}

impl FitError {
    /// The command or edit that mends it.
    pub(crate) fn hint(&self) -> Option<&'static str> {
        match self {
            Self::File { .. } => Some("`cargo xtask fit FOLDER` with the folder of the measured tables"),
            Self::Differs(_) => Some("`cargo xtask fit --write` writes them; look at the errors of both first"),
            _ => None,
        }
    }
}

/// Fits and compares.
///
/// # Errors
/// A table cannot be read, or the shipped constants are others and were not to be written.
pub(crate) fn run(options: &Options) -> Result<(), FitError> {
    let catalogue = Catalogue::built_in();
    let observations = observations(&catalogue, &options.folder)?;
    println!("shipped constants (mean absolute error of step time, percent):");
    print_errors(&observations, &FITTED);
    print_memory(&catalogue, &options.folder)?;
    print_unseen(&catalogue, options.rows);
    if options.rows {
        observations.iter().for_each(print_row);
    }
    if options.judge {
        return Ok(());
    }
    let fitted = if options.write { settled(&observations) } else { fit(&observations, &FITTED) };
    println!("\nfitted again:");
    print_errors(&observations, &fitted);
    settle(&fitted, options.write)
}

/// A fit that gives itself when it begins with itself: searches from where the last one ended.
fn settled(observations: &[Observation<'_>]) -> Constants {
    let mut start = FITTED;
    for _ in 0..SETTLING_FITS_MAX {
        let found = fit(observations, &start);
        if differences(&start, &found).is_empty() {
            return start;
        }
        start = written(&found);
        println!("\na fit from where the last one ended: {start:?}");
        print_errors(observations, &start);
    }
    start
}

/// Constants as the source file has them: four digits.
fn written(constants: &Constants) -> Constants {
    let round = |value: f64| four_digits(value).parse().unwrap_or(value);
    Constants::from_values(&constants.to_values().into_iter().map(round).collect::<Vec<_>>())
}

/// Name, value before and value after of the constants that are not the same.
fn differences(before: &Constants, after: &Constants) -> Vec<(&'static str, f64, f64)> {
    DESCRIPTIONS
        .iter()
        .zip(before.to_values().into_iter().zip(after.to_values()))
        .filter(|(_, (before, after))| (after / before - 1.0).abs() > SAME)
        .map(|(description, (before, after))| (description.name, before, after))
        .collect()
}

fn observations<'a>(catalogue: &'a Catalogue, folder: &Path) -> Result<Vec<Observation<'a>>, FitError> {
    let mut observations = Vec::new();
    for (table, reader) in TABLES {
        let text = read(&folder.join(table))?;
        observations.extend(reader(catalogue, &text).map_err(|source| FitError::Table { table, source })?);
    }
    Ok(observations)
}

fn read(path: &Path) -> Result<String, FitError> {
    std::fs::read_to_string(path).map_err(|source| FitError::File { path: path.to_owned(), source })
}

fn print_errors(observations: &[Observation<'_>], constants: &Constants) {
    println!("{:16} {:>5} {:>5} {:>9} {:>9} {:>9}", "table", "fit", "judge", "fit %", "judged %", "naive %");
    for error in judge(observations, constants) {
        println!(
            "{:16} {:>5} {:>5} {:>9.2} {:>9.2} {:>9.2}",
            error.table, error.rows.0, error.rows.1, error.fitted_percent, error.judged_percent, error.naive_percent
        );
    }
}

fn print_memory(catalogue: &Catalogue, folder: &Path) -> Result<(), FitError> {
    let text = read(&folder.join(MEMORY_TABLE))?;
    println!("\nmemory (nothing of it is fitted):");
    let rows = memory::compare(catalogue, &text).map_err(|source| FitError::Table { table: MEMORY_TABLE, source })?;
    for row in rows {
        let error = 100.0 * (row.predicted_gib / row.published_gib - 1.0);
        println!("{:24} {:>8.2} GiB, published {:>8.2}, {error:+.1} %", row.name, row.predicted_gib, row.published_gib);
    }
    Ok(())
}

/// Published runs that no fit uses: the mean error of each family, and each row where that is wanted.
fn print_unseen(catalogue: &Catalogue, rows: bool) {
    let runs = unseen::compare(catalogue, &FITTED);
    println!("\nnever fitted (crates/planner/src/fit/unseen.csv):");
    for run in runs.iter().filter(|_| rows) {
        match &run.predicted {
            Ok(step) => println!(
                "{:20} {:36} measured {:>9.4} s, predicted over measured {:.3}",
                run.family,
                run.case,
                run.measured.0,
                *step / run.measured
            ),
            Err(error) => println!("{:20} {:36} {error}", run.family, run.case),
        }
    }
    for (family, count, percent) in unseen::families(&runs) {
        println!("{family:20} {count:>4} rows {percent:>8.1} %");
    }
}

fn print_row(observation: &Observation<'_>) {
    let (layout, shape) = (&observation.case.layout, &observation.case.shape);
    let half = if observation.fits() { "fits" } else { "judges" };
    let ratio = observation.ratio(&FITTED).unwrap_or(f64::NAN);
    println!(
        "{} row {} ({half}): measured {:.3} s, predicted over measured {ratio:.3}\n  {} {shape:?} {layout:?}",
        observation.table, observation.row, observation.measured.0, observation.case.devices[0].name
    );
}

/// Says which constants differ, and writes them where that is wanted.
fn settle(fitted: &Constants, write: bool) -> Result<(), FitError> {
    let different = differences(&FITTED, fitted);
    for (name, shipped, found) in &different {
        println!("{name}: shipped {shipped}, fitted {}", four_digits(*found));
    }
    match (different.is_empty(), write) {
        (true, _) => {
            println!("\n{CONSTANTS_FILE} holds what the fit gives");
            Ok(())
        }
        (false, false) => Err(FitError::Differs(different.len())),
        (false, true) => rewrite(&different),
    }
}

fn rewrite(different: &[(&'static str, f64, f64)]) -> Result<(), FitError> {
    let path = Path::new(CONSTANTS_FILE);
    let mut text = read(path)?;
    for (name, _, found) in different {
        let start = format!("    {name} = ");
        let at = text.find(&start).ok_or(FitError::NoLine(name))? + start.len();
        let end = at + text[at..].find(',').ok_or(FitError::NoLine(name))?;
        text.replace_range(at..end, &four_digits(*found));
    }
    std::fs::write(path, text).map_err(|source| FitError::File { path: path.to_owned(), source })?;
    println!("\n{} constants written to {CONSTANTS_FILE}", different.len());
    Ok(())
}

/// A number with four significant digits, as a Rust literal of a float.
fn four_digits(value: f64) -> String {
    let decimals = (3 - value.abs().log10().floor() as i32).clamp(1, 9) as usize;
    format!("{value:.decimals$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_with_four_digits() {
        assert_eq!(
            [0.84593, 1101.04, 43.238, 0.05194, 6.3812].map(four_digits),
            ["0.8459", "1101.0", "43.24", "0.05194", "6.381"]
        );
    }
}
