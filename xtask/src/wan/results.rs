//! Finished measurements, one JSON object a line, so that a long bench can go on where it was stopped.

use crate::runs::Failure;
use crate::wan::figures::Figures;
use crate::wan::link::{LinkKind, LinkMeasured};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

/// How long a system trains.
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Budget {
    /// Inner steps of each site.
    Steps(u64),
    /// Since the sites were started.
    Minutes(f64),
}

impl fmt::Display for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Steps(steps) => write!(f, "{steps} steps a site"),
            Self::Minutes(minutes) => write!(f, "{minutes} minutes"),
        }
    }
}

/// What tells one measurement from the others.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Key {
    /// Name of the system.
    pub(crate) system: String,
    /// Beringia's engine; [`PEER`] for the peers.
    pub(crate) engine: String,
    /// Name of the model.
    pub(crate) size: String,
    /// Between the sites.
    pub(crate) link: LinkKind,
    /// Of initial weights and data order.
    pub(crate) seed: u64,
    /// How long it trains.
    pub(crate) budget: Budget,
    /// Tells equal measurements apart.
    pub(crate) repeat: u64,
}

/// Stands for the engine of a peer.
pub(crate) const PEER: &str = "peer";

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { system, engine, size, link, seed, budget, repeat } = self;
        write!(f, "{system} ({engine}), {size}, link {link}, seed {seed}, {budget}, repeat {repeat}")
    }
}

/// One measurement.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Cell {
    /// Which.
    #[serde(flatten)]
    pub(crate) key: Key,
    /// Settings of the run, or arguments of the script.
    pub(crate) settings: Vec<String>,
    /// What iperf3 saw on such a link.
    pub(crate) link_measured: LinkMeasured,
    /// How it ended.
    pub(crate) outcome: Outcome,
}

/// How a measurement ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Outcome {
    /// Well.
    Done(Figures),
    /// The system failed, and why.
    Failed(String),
}

impl Cell {
    /// Its figures, where it has some.
    pub(crate) fn figures(&self) -> Option<&Figures> {
        match &self.outcome {
            Outcome::Done(figures) => Some(figures),
            Outcome::Failed(_) => None,
        }
    }
}

/// The file of results and what is in it.
#[derive(Debug)]
pub(crate) struct Results {
    path: PathBuf,
    cells: Vec<Cell>,
}

impl Results {
    /// Opens a file of results; one that is not there is empty.
    ///
    /// # Errors
    /// A line that is no measurement.
    pub(crate) fn open(path: &Path) -> Result<Self, Failure> {
        let text = if path.exists() { fs::read_to_string(path)? } else { String::new() };
        let cells = parse(&text).map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(Self { path: path.to_owned(), cells })
    }

    /// All measurements, the newest of each key.
    pub(crate) fn cells(&self) -> &[Cell] {
        &self.cells
    }

    /// The measurement of that key and those settings.
    pub(crate) fn find(&self, key: &Key, settings: &[String]) -> Option<&Cell> {
        self.cells.iter().find(|cell| cell.key == *key && cell.settings == settings)
    }

    /// Appends a measurement.
    ///
    /// # Errors
    /// The file cannot be written.
    pub(crate) fn add(&mut self, cell: Cell) -> Result<(), Failure> {
        let mut file = OpenOptions::new().create(true).append(true).open(&self.path)?;
        file.write_all(format!("{}\n", serde_json::to_string(&cell)?).as_bytes())?;
        file.sync_all()?;
        replace(&mut self.cells, cell);
        Ok(())
    }
}

/// A newer measurement of the same key takes the place of the older one.
fn replace(cells: &mut Vec<Cell>, cell: Cell) {
    match cells.iter_mut().find(|old| old.key == cell.key) {
        Some(old) => *old = cell,
        None => cells.push(cell),
    }
}

fn parse(text: &str) -> Result<Vec<Cell>, String> {
    let mut cells = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let cell = serde_json::from_str(line).map_err(|error| format!("line {}: {error}", number + 1))?;
        replace(&mut cells, cell);
    }
    Ok(cells)
}

/// Measurements for the tests of tables and pictures.
#[cfg(test)]
pub(crate) mod examples {
    use super::*;
    use crate::wan::series::Point;

    /// A training of 600 tokens in 100 seconds at that speed beside 4,000 tokens/s alone.
    pub(crate) fn cell(system: &str, engine: &str, seed: u64, speed: f64, nats: f64) -> Cell {
        let point = |seconds: f64| Point { seconds, tokens: 6.0 * seconds, nats: 3.0 - seconds / 100.0 };
        let figures = Figures {
            tokens_per_second: speed,
            alone_tokens_per_second: [3_900.0, 4_100.0],
            sent_bytes_per_1000_steps: vec![50e6, 40e6],
            start_bytes: vec![1e6, 3e6],
            first_step_seconds: 2.5,
            stall_seconds: 0.75,
            seconds: 100.0,
            tokens: 600.0,
            validation_nats: Some(nats),
            curve: (1..=10).map(|tenth| point(10.0 * f64::from(tenth))).collect(),
        };
        let key = Key {
            system: system.to_owned(),
            engine: engine.to_owned(),
            size: "5M".to_owned(),
            link: LinkKind { mbit: Some(20), round_trip_ms: 50 },
            seed,
            budget: Budget::Steps(300),
            repeat: 0,
        };
        let link_measured = LinkMeasured { bits_per_second: [19e6, 19e6], round_trip_ms: 50.0 };
        Cell { key, settings: vec!["a=b".to_owned()], link_measured, outcome: Outcome::Done(figures) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_measurement_is_read_as_it_was_written_and_the_newest_counts() {
        let first = examples::cell("ddp", PEER, 1, 200.0, 1.9);
        let mut failed = first.clone();
        failed.outcome = Outcome::Failed("no route".to_owned());
        let other = examples::cell("ddp", PEER, 2, 200.0, 1.9);
        let text: String = [&first, &other, &failed].map(|cell| serde_json::to_string(cell).unwrap() + "\n").concat();
        assert_eq!(parse(&text).unwrap(), [failed, other.clone()]);
        let results = Results { path: PathBuf::new(), cells: vec![first.clone()] };
        assert!(results.find(&first.key, &first.settings).is_some());
        assert!(results.find(&first.key, &[]).is_none() && results.find(&other.key, &first.settings).is_none());
        assert!(parse("{\"system\": \"ddp\"}").unwrap_err().starts_with("line 1:"));
    }
}
