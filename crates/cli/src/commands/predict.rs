//! `beringia predict`: step time and memory of the layouts of a table, one prediction a row, nothing searched.

use crate::failure::Failure;
use crate::output::Output;
use crate::texts;
use base::Hint;
use planner::predict::{Predicted, RowError, predict_table};
use planner::{Catalogue, Prediction};
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};

/// Longest table, bytes: some hundred thousand rows.
const TABLE_BYTES_MAX: u64 = 64 << 20;

/// Longest device file, bytes.
const DEVICES_BYTES_MAX: u64 = 8 << 20;

/// Rows without prediction that are told one by one.
const ERRORS_SHOWN_MAX: usize = 20;

/// Predict step time, tokens/s and memory of layouts that you give, one a row of a CSV
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The layouts: a CSV with the columns that docs/planner.md lists; an empty cell is its default.
    #[arg(long, value_name = "FILE")]
    table: PathBuf,
    /// Devices of your own: [[device]] tables that add to the catalogue, or override single figures of it.
    #[arg(long, value_name = "FILE")]
    devices: Option<PathBuf>,
}

/// Runs the command. It ends the process by itself where a row could not be predicted: the others' predictions are its output all the same.
pub(crate) fn run(args: Args, output: &Output) -> Result<(), Failure> {
    let catalogue = catalogue(args.devices.as_deref())?;
    let text = texts::read(&args.table, TABLE_BYTES_MAX)?;
    let predicted = predict_table(&catalogue, &text).map_err(|error| {
        let place = args.table.display().to_string();
        Failure::from(error).about(&place)
    })?;
    output.text(&predicted.csv);
    output.object(&object(&predicted));
    tell_too_large(&predicted, output);
    let failed = tell_errors(&predicted, &args.table, output);
    output.finish()?;
    match failed {
        0 => Ok(()),
        _ => std::process::exit(1),
    }
}

/// The catalogue that comes with the program, with a user's own devices over it.
///
/// # Errors
/// The file cannot be read or is no device file.
pub(crate) fn catalogue(devices: Option<&Path>) -> Result<Catalogue, Failure> {
    let built_in = Catalogue::built_in();
    let Some(path) = devices else { return Ok(built_in) };
    let text = texts::read(path, DEVICES_BYTES_MAX)?;
    built_in.with_user_file(&text).map_err(|error| Failure::from(error).about(&path.display().to_string()))
}

/// Says on standard error which rows were predicted although no device holds them.
fn tell_too_large(predicted: &Predicted, output: &Output) {
    let rows = predicted.rows.iter().enumerate().filter_map(|(row, found)| Some((row + 1, found.as_ref().ok()?)));
    let too_large: Vec<_> = rows.filter(|(_, prediction)| prediction.fits == Some(false)).collect();
    for (row, prediction) in too_large.iter().take(ERRORS_SHOWN_MAX) {
        let needed = prediction.memory.total().gib();
        output.notice(format_args!(
            "note: row {row} is predicted, but its {needed:.1} GiB do not fit the device's memory"
        ));
    }
    if too_large.len() > ERRORS_SHOWN_MAX {
        output.notice(format_args!("note: {} rows do not fit their device's memory", too_large.len()));
    }
}

/// Says on standard error which rows have no prediction and why; how many.
fn tell_errors(predicted: &Predicted, table: &Path, output: &Output) -> usize {
    let failed = predicted.errors().count();
    for error in predicted.errors().take(ERRORS_SHOWN_MAX) {
        output.notice(format_args!("error: {}: {error}", table.display()));
        if let Some(hint) = error.hint() {
            output.notice(format_args!("hint: {hint}"));
        }
    }
    if failed > 0 {
        output.notice(format_args!("error: {failed} of {} rows have no prediction", predicted.rows.len()));
    }
    failed
}

fn object(predicted: &Predicted) -> Value {
    let rows: Vec<Value> =
        predicted.rows.iter().enumerate().map(|(row, found)| row_object(predicted, row, found)).collect();
    json!({ "ok": predicted.errors().next().is_none(), "rows": rows, "failed": predicted.errors().count() })
}

/// The cells as they were given, and what is predicted or why not.
fn row_object(predicted: &Predicted, row: usize, found: &Result<Prediction, RowError>) -> Value {
    let given: Map<String, Value> = predicted
        .table
        .header()
        .iter()
        .filter_map(|column| {
            Some((column.clone(), predicted.table.cell(row, column).filter(|cell| !cell.is_empty())?.into()))
        })
        .collect();
    match found {
        Ok(prediction) => json!({
            "row": row + 1,
            "given": given,
            "step_seconds": prediction.step.0,
            "tokens_per_second_per_device": prediction.tokens_per_second_per_device,
            "tflops_per_device": prediction.useful.tera(),
            "mfu": prediction.mfu,
            "memory_gib": prediction.memory.total().gib(),
            "fits": prediction.fits,
            "compute_share": prediction.compute_share,
            "communication_share": prediction.communication_share,
            "bubble_share": prediction.bubble_share,
        }),
        Err(error) => {
            json!({ "row": row + 1, "given": given, "column": error.column, "error": error.to_string(), "hint": error.hint() })
        }
    }
}
