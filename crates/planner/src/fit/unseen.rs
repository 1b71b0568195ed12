//! Published runs that no fit uses, beside what the shipped constants say of them: what a reader may expect of a table of his own.
//!
//! The rows of `unseen.csv` are read as [`crate::predict`] reads a user's table, defaults included, so that they judge the defaults as
//! well; each names its source. What a source leaves out is left empty.

use crate::catalogue::Catalogue;
use crate::csv::Table;
use crate::model::constants::Constants;
use crate::predict::{CellError, RowError, case};
use crate::units::Seconds;

/// The rows, with family, measured step and source beside the columns of a table of layouts.
const ROWS: &str = include_str!("unseen.csv");

/// One published run.
#[derive(Debug, Clone, PartialEq)]
pub struct UnseenRow {
    /// Runs of one kind of software and device.
    pub family: String,
    /// Model and size of the run.
    pub case: String,
    /// Published time of a step.
    pub measured: Seconds,
    /// The model's, or why there is none.
    pub predicted: Result<Seconds, RowError>,
}

impl UnseenRow {
    /// Prediction over measurement, where there is a prediction.
    pub fn ratio(&self) -> Option<f64> {
        self.predicted.as_ref().ok().map(|step| *step / self.measured)
    }
}

/// Predicts every row with these constants.
pub fn compare(catalogue: &Catalogue, constants: &Constants) -> Vec<UnseenRow> {
    let table = Table::parse(ROWS).unwrap_or_else(|error| unreachable!("our own table parses: {error}"));
    let cell = |row: usize, column: &str| table.cell(row, column).unwrap_or_default().to_owned();
    (0..table.len())
        .map(|row| UnseenRow {
            family: cell(row, "family"),
            case: cell(row, "case"),
            measured: Seconds(cell(row, "measured_step_seconds").parse().unwrap_or(f64::NAN)),
            predicted: case(catalogue, &table, row).and_then(|case| {
                let failed =
                    |error| RowError { row: row + 1, column: "case".to_owned(), error: CellError::Model(error) };
                case.predict_with(constants).map(|prediction| prediction.step).map_err(failed)
            }),
        })
        .collect()
}

/// Mean absolute percentage error of each family, in the order of the table, and how many rows it has.
pub fn families(rows: &[UnseenRow]) -> Vec<(String, usize, f64)> {
    let mut families: Vec<(String, usize, f64)> = Vec::new();
    for row in rows {
        let Some(ratio) = row.ratio() else { continue };
        let error = 100.0 * (ratio - 1.0).abs();
        match families.iter_mut().find(|(family, ..)| *family == row.family) {
            Some((_, count, sum)) => (*count, *sum) = (*count + 1, *sum + error),
            None => families.push((row.family.clone(), 1, error)),
        }
    }
    families.into_iter().map(|(family, count, sum)| (family, count, sum / count as f64)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::constants::FITTED;

    #[test]
    fn every_published_run_can_be_predicted_and_names_its_source() {
        let table = Table::parse(ROWS).unwrap();
        for (row, run) in compare(&Catalogue::built_in(), &FITTED).iter().enumerate() {
            assert!(run.measured.0 > 0.0 && run.ratio().is_some(), "{run:?}");
            assert!(table.cell(row, "source").is_some_and(|source| source.len() > 8), "{run:?}");
        }
    }

    /// Families whose software and devices the fitted tables know, if not their layouts.
    const KNOWN_KINDS: &[&str] =
        &["llama3", "nemotron4", "nemo_fp8_h100", "flagperf", "sc21_table2", "pythia", "vtrain_single"];

    #[test]
    fn kinds_of_runs_that_the_fit_knows_are_within_a_sixth_on_average() {
        let found = families(&compare(&Catalogue::built_in(), &FITTED));
        for (family, _, percent) in found.iter().filter(|(family, ..)| KNOWN_KINDS.contains(&family.as_str())) {
            assert!(*percent < 100.0 / 6.0, "{family}: {percent}");
        }
        assert!(KNOWN_KINDS.iter().all(|kind| found.iter().any(|(family, ..)| family == kind)));
    }
}
