//! Makes the fitted constants again from a folder of measured tables, and prints the errors beside those of a naive model.
//!
//! `cargo run -p planner --example fit -- <folder> [rows]`; with `rows`, every row's error as well.

#![allow(clippy::print_stdout)]

use planner::Catalogue;
use planner::fit::{Observation, fit, judge, memory, tables::TABLES};
use planner::model::constants::{Constants, DESCRIPTIONS, FITTED};
use std::error::Error;
use std::path::Path;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let folder = arguments.next().ok_or("give the folder of measured tables")?;
    let mode = arguments.next().unwrap_or_default();
    let catalogue = Catalogue::built_in();
    let mut observations = Vec::new();
    for (file, reader) in TABLES {
        let text = std::fs::read_to_string(Path::new(&folder).join(file))?;
        observations.extend(reader(&catalogue, &text)?);
    }
    println!("shipped constants:");
    print_errors(&observations, &FITTED);
    if mode == "rows" {
        print_rows(&observations, &FITTED);
        return Ok(());
    }
    let fitted = fit(&observations, &FITTED);
    println!("\nfitted again:");
    for (value, description) in fitted.to_values().iter().zip(DESCRIPTIONS) {
        println!("    {} = {value:.4} {}", description.name, description.unit);
    }
    print_errors(&observations, &fitted);
    if mode == "fitrows" {
        print_rows(&observations, &fitted);
    }
    print_memory(&catalogue, &folder)
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

fn print_rows(observations: &[Observation<'_>], constants: &Constants) {
    for observation in observations {
        let layout = &observation.case.layout;
        let shape = &observation.case.shape;
        let shares = observation.case.predict_with(constants).map(|prediction| {
            format!(
                "comp {:.2} comm {:.2} bubble {:.2} mem {:.1}",
                prediction.compute_share,
                prediction.communication_share,
                prediction.bubble_share,
                prediction.memory.total().gib()
            )
        });
        println!(
            "{:15} {:>4} {} h{} L{} a{} s{} tp{} pp{} dp{} mb{} gb{} z{} {:?} {:?} {:?} measured {:.3} ratio {:.3} {}",
            observation.table,
            observation.row,
            observation.case.devices[0].name,
            shape.hidden,
            shape.layers,
            shape.heads,
            shape.seq,
            layout.tp,
            layout.pp,
            layout.dp,
            layout.micro_batch,
            layout.global_batch,
            layout.zero,
            layout.recompute,
            layout.overlap,
            observation.case.precision,
            observation.measured.0,
            observation.ratio(constants).unwrap_or(f64::NAN),
            shares.unwrap_or_else(|error| error.to_string()),
        );
    }
}

fn print_memory(catalogue: &Catalogue, folder: &str) -> Result<(), Box<dyn Error>> {
    let text = std::fs::read_to_string(Path::new(folder).join("korthikanti_fig1_memory.csv"))?;
    println!("\nmemory (nothing of it is fitted):");
    for row in memory::compare(catalogue, &text)? {
        let error = 100.0 * (row.predicted_gib / row.published_gib - 1.0);
        println!("{:24} {:>8.2} GiB, published {:>8.2}, {error:+.1} %", row.name, row.predicted_gib, row.published_gib);
    }
    Ok(())
}
