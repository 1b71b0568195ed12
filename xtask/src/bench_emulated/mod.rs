//! `cargo xtask bench emulated`: what link a run of 1B, 10B or 100B parameters needs, beside the published table of arXiv 2501.18512.
//!
//! Coordinator, sites, codecs, transfers and merges are the binary's own, over a link of two network namespaces; only the engine
//! sleeps instead of computing (`--engine emulated:SECONDS`). Parameters and seconds are scaled down by stated factors and the
//! link's rate by their quotient (`work`), so that the traffic of a step over what the link carries in a step is the model's own. For each
//! row the rates of the published table are searched (`search`) for the least that gives 50 to 99 % utilisation: steps a second over
//! those of an engine alone, whose steps take exactly the seconds that were stated.
//!
//! What is not scaled down: messages, headers, and the machine's own work on a round. They count against Beringia.

mod log;
mod published;
mod search;
mod session;
mod work;

use crate::runs::{Failure, Programs};
use published::{WANTED, gigabits, index_of, is_within};
use search::{Search, Step};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use session::{Place, Session};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use work::Row;

/// Settings of the bench.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    #[command(flatten)]
    programs: Programs,
    /// Which rows: models (1B, 10B, 100B), methods, or both as in 1B/overlap-e3m0; all unless given
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    rows: Vec<String>,
    /// Where everything is made; what is there is removed, but for the results
    #[arg(long, value_name = "FOLDER", default_value = "target/bench-emulated")]
    folder: PathBuf,
    /// Go on with a file of results; rows in it are not measured again
    #[arg(long, value_name = "FILE")]
    resume: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// What was found for one row.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Measured {
    model: String,
    method: String,
    /// Of the run.
    settings: Vec<String>,
    /// n.
    parameters: u64,
    /// s, as the engine sleeps.
    step_seconds: f64,
    /// Of a delta, for each parameter of the fragment.
    bits_per_parameter: f64,
    /// Rounds after which both sites held the same state; they never differed.
    rounds_identical: usize,
    /// Utilisation by number of the rate.
    points: BTreeMap<i32, f64>,
    /// Number of the least rate that is enough, for each wanted utilisation; none where the fastest is not.
    least: [Option<i32>; WANTED.len()],
}

/// Measures the rows that are asked for, and prints them beside the published table.
///
/// # Errors
/// Not root, a process that failed, or sites that differ.
pub(crate) fn run(options: &Options) -> Result<(), Failure> {
    let rows = work::choose(&options.rows)?;
    fs::create_dir_all(&options.folder)?;
    let folder = options.folder.canonicalize()?;
    let path = options.resume.clone().unwrap_or_else(|| folder.join("results.jsonl"));
    if options.resume.is_none() && path.exists() {
        fs::remove_file(&path)?;
    }
    let known = read(&path)?;
    let binary = options.programs.binary()?.canonicalize()?;
    let place = Place { programs: &options.programs, binary, folder: folder.join("row") };
    let mut all = Vec::new();
    for row in rows {
        let measured = match known.iter().find(|known| known.is_of(row)) {
            Some(known) => known.clone(),
            None => {
                let measured = measure(&place, row)?;
                let mut file = OpenOptions::new().create(true).append(true).open(&path)?;
                file.write_all(format!("{}\n", serde_json::to_string(&measured)?).as_bytes())?;
                measured
            }
        };
        all.push((row, measured));
    }
    match options.json {
        true => {
            println!("{}", json!({ "rows": all.iter().map(|(row, found)| object(*row, found)).collect::<Vec<_>>() }))
        }
        false => println!("{}", table(&all)),
    }
    Ok(())
}

fn read(path: &Path) -> Result<Vec<Measured>, Failure> {
    let text = if path.exists() { fs::read_to_string(path)? } else { String::new() };
    let lines =
        text.lines().map(|line| serde_json::from_str(line).map_err(|error| format!("{}: {error}", path.display())));
    Ok(lines.collect::<Result<_, _>>()?)
}

fn measure(place: &Place<'_>, row: Row) -> Result<Measured, Failure> {
    let published = row.published().ok_or("a row without a published one")?;
    let mut session = Session::start(place, row)?;
    let mut search = Search::default();
    let mut least = [None; WANTED.len()];
    for (column, wanted) in WANTED.into_iter().enumerate() {
        least[column] = loop {
            match search.step(wanted, index_of(published[0])) {
                Step::Found(index) => break Some(index),
                Step::Beyond => break None,
                Step::Measure(index) => {
                    let link = row.link_bits_per_second(gigabits(index), session.parameters);
                    let utilisation = session.measure(link)?;
                    let (model, method) = (row.model.name, row.method.name);
                    let (rate, mbit) = (gigabits(index), link / 1e6);
                    eprintln!("{model} {method}: {rate:.3} Gbit/s, emulated {mbit:.2} Mbit/s: {utilisation:.4}");
                    search.points.insert(index, utilisation);
                }
            }
        };
    }
    Ok(Measured {
        model: row.model.name.to_owned(),
        method: row.method.name.to_owned(),
        settings: row.settings(),
        parameters: session.parameters,
        step_seconds: row.method.step_seconds,
        bits_per_parameter: session.bits_per_parameter(),
        rounds_identical: session.check_agreement()?,
        points: search.points,
        least,
    })
}

impl Measured {
    fn is_of(&self, row: Row) -> bool {
        (self.model.as_str(), self.method.as_str()) == (row.model.name, row.method.name)
            && self.settings == row.settings()
            && self.step_seconds == row.method.step_seconds
    }
}

/// All of a row, with the published figures.
fn object(row: Row, found: &Measured) -> Value {
    let columns = WANTED.into_iter().zip(found.least).zip(row.published().unwrap_or_default());
    let columns = columns.map(|((utilisation, least), published)| {
        let gigabits = least.map(gigabits);
        json!({
            "utilisation": utilisation, "gigabits": gigabits, "published_gigabits": published,
            "ratio": gigabits.map(|gigabits| gigabits / published),
        })
    });
    let points = found.points.iter().map(|(index, utilisation)| json!([gigabits(*index), utilisation]));
    json!({
        "model": found.model, "method": found.method, "published_method": row.method.published,
        "parameter_factor": row.parameter_factor(found.parameters), "time_factor": row.time_factor(),
        "parameters": found.parameters, "step_seconds": found.step_seconds,
        "bits_per_parameter": found.bits_per_parameter,
        "rounds_identical": found.rounds_identical, "settings": found.settings,
        "columns": columns.collect::<Vec<_>>(), "points": points.collect::<Vec<_>>(),
    })
}

/// The rows as Markdown: ours / published (ratio), Gbit/s.
fn table(all: &[(Row, Measured)]) -> String {
    let mut text = "Gbit/s: measured / published (ratio); * where measured is above published\n\n".to_owned();
    text += "| model | method | beside | bits a value |";
    WANTED.iter().for_each(|wanted| text += &format!(" {:.0} % |", 100.0 * wanted));
    text += "\n|---|---|---|---:|---:|---:|---:|---:|---:|\n";
    for (row, found) in all {
        let (model, method, beside) = (row.model.name, row.method.name, row.method.published);
        // Writing to a string cannot fail.
        let _ = write!(text, "| {model} | {method} | {beside} | {:.2} |", found.bits_per_parameter);
        for (least, published) in found.least.into_iter().zip(row.published().unwrap_or_default()) {
            text += &match least.map(gigabits) {
                Some(rate) => {
                    let mark = if is_within(rate, published) { "" } else { "*" };
                    format!(" {} / {published} ({:.2}){mark} |", rounded(rate), rate / published)
                }
                None => format!(" > 1000 / {published}* |"),
            };
        }
        text.push('\n');
    }
    for (row, found) in all {
        let (factor, time) = (row.parameter_factor(found.parameters), row.time_factor());
        let (model, method, rounds) = (row.model.name, row.method.name, found.rounds_identical);
        let _ =
            writeln!(text, "{model} {method}: F = {factor:.0}, T = {time:.2}; identical after all of {rounds} rounds");
    }
    text
}

/// As the published table prints it; below 0.1 with one digit more.
fn rounded(gigabits: f64) -> String {
    if gigabits < 0.1 { format!("{gigabits:.2}") } else { format!("{gigabits:.1}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(row: Row) -> Measured {
        Measured {
            model: row.model.name.to_owned(),
            method: row.method.name.to_owned(),
            settings: row.settings(),
            parameters: 2_500_000,
            step_seconds: row.method.step_seconds,
            bits_per_parameter: 4.25,
            rounds_identical: 70,
            points: [(7, 0.45), (8, 0.52)].into(),
            least: [Some(5), Some(12), Some(13), Some(22), None],
        }
    }

    #[test]
    fn a_table_says_which_figures_are_above_the_published_ones() {
        let row = work::choose(&["1B/overlap-e3m0".to_owned()]).unwrap()[0];
        let found = measured(row);
        let text = table(&[(row, found.clone())]);
        let wanted =
            "| 4.25 | 0.3 / 0.4 (0.64) | 1.0 / 0.9 (1.06) | 1.2 / 1.7 (0.68) | 6.3 / 2 (3.13)* | > 1000 / 3* |";
        assert!(text.contains(wanted), "{text}");
        assert!(text.contains("F = 400, T = 1.00; identical after all of 70 rounds"), "{text}");
        let object = object(row, &found);
        assert_eq!((&object["columns"][4]["gigabits"], &object["parameter_factor"]), (&Value::Null, &400.0.into()));
        let line = serde_json::to_string(&found).unwrap();
        assert_eq!(serde_json::from_str::<Measured>(&line).unwrap(), found);
        assert!(found.is_of(row));
    }
}
