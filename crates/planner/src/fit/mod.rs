//! Making the fitted constants again, and judging them: measured steps in, constants and errors out.
//!
//! Rows are divided by a hash of their layout (so that the same layout, measured twice, is never on both sides): the even half fits,
//! the odd half judges. The naive model beside it has one constant MFU for each table, the median of the fitting half.

pub mod memory;
pub mod tables;
pub mod unseen;

use crate::model::Case;
use crate::model::constants::{Constants, DESCRIPTIONS};
use crate::units::Seconds;

/// Rounds of the pattern search; each tries every constant in both directions.
const ROUNDS: usize = 400;

/// First step of the search, as a factor's logarithm, and the step at which it ends.
const STEP_FIRST: f64 = 0.4;
const STEP_LAST: f64 = 0.002;

/// Weight of the pull towards the values the search began with, for each unit of log distance: it decides only what data does not.
const PRIOR_WEIGHT: f64 = 0.0005;

/// One measured step.
#[derive(Debug, Clone)]
pub struct Observation<'a> {
    /// Name of the table.
    pub table: &'static str,
    /// Row, counted from 1 after the header.
    pub row: usize,
    /// What ran.
    pub case: Case<'a>,
    /// How long a step took.
    pub measured: Seconds,
}

impl Observation<'_> {
    /// Whether the row fits (else it judges): FNV-1a of the layout, last bit after folding.
    pub fn fits(&self) -> bool {
        let (shape, layout) = (&self.case.shape, &self.case.layout);
        let key = format!("{} {shape:?} {layout:?} {}", self.table, self.case.devices.len());
        let hash = key
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
        (hash ^ (hash >> 32)) & 1 == 0
    }

    /// Prediction over measurement; `None` where nothing can be predicted.
    pub fn ratio(&self, constants: &Constants) -> Option<f64> {
        Some(self.case.predict_with(constants).ok()?.step / self.measured)
    }
}

/// Errors of one table.
#[derive(Debug, Clone, PartialEq)]
pub struct TableError {
    /// Its name.
    pub table: &'static str,
    /// Rows that fitted and rows that judge.
    pub rows: (usize, usize),
    /// Mean absolute percentage error on the rows that fitted.
    pub fitted_percent: f64,
    /// The same on the rows that judge: the figure to quote.
    pub judged_percent: f64,
    /// The same of the naive model, constant MFU of the fitting half, on the rows that judge.
    pub naive_percent: f64,
}

/// Searches from perturbed bests, against local minima.
const RESTARTS: u64 = 64;

/// Largest perturbation, as a factor's logarithm.
const PERTURBATION: f64 = 0.35;

/// Finds constants for these observations, those of the fitting half only, from a start.
pub fn fit(observations: &[Observation<'_>], start: &Constants) -> Constants {
    let chosen: Vec<&Observation<'_>> = observations.iter().filter(|observation| observation.fits()).collect();
    let origin = start.to_values();
    let (mut best, mut values) = search(&chosen, &origin, origin.clone());
    for restart in 0..RESTARTS {
        let (found, tried) = search(&chosen, &origin, perturbed(&values, restart));
        if found < best {
            (best, values) = (found, tried);
        }
    }
    Constants::from_values(&values)
}

fn in_range(index: usize, value: f64) -> f64 {
    value.clamp(DESCRIPTIONS[index].least.max(1e-9), DESCRIPTIONS[index].greatest)
}

/// The values, each times a factor that the restart's number fixes (SplitMix64).
fn perturbed(values: &[f64], restart: u64) -> Vec<f64> {
    let mut state = restart.wrapping_mul(0x2545_f491_4f6c_dd1d);
    let mut uniform = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed >> 11) as f64 / (1_u64 << 53) as f64
    };
    values
        .iter()
        .enumerate()
        .map(|(index, value)| in_range(index, value * (PERTURBATION * (2.0 * uniform() - 1.0)).exp()))
        .collect()
}

/// Coordinate search with shrinking steps: the objective reached, and where.
fn search(chosen: &[&Observation<'_>], origin: &[f64], mut values: Vec<f64>) -> (f64, Vec<f64>) {
    let mut best = objective(chosen, &values, origin);
    let mut step = STEP_FIRST;
    for _ in 0..ROUNDS {
        let before = best;
        for index in 0..values.len() {
            for factor in [step.exp(), (-step).exp()] {
                let mut tried = values.clone();
                tried[index] = in_range(index, tried[index] * factor);
                let found = objective(chosen, &tried, origin);
                if found < best {
                    (best, values) = (found, tried);
                }
            }
        }
        if before - best < 1e-7 {
            step *= 0.6;
        }
        if step < STEP_LAST {
            break;
        }
    }
    (best, values)
}

/// Mean over tables of the mean absolute log error, and the pull to the start.
fn objective(observations: &[&Observation<'_>], values: &[f64], origin: &[f64]) -> f64 {
    let constants = Constants::from_values(values);
    let mut sums: Vec<(&str, f64, f64)> = Vec::new();
    for observation in observations {
        let Some(ratio) = observation.ratio(&constants) else { continue };
        match sums.iter_mut().find(|(table, ..)| *table == observation.table) {
            Some((_, sum, count)) => (*sum, *count) = (*sum + ratio.ln().abs(), *count + 1.0),
            None => sums.push((observation.table, ratio.ln().abs(), 1.0)),
        }
    }
    let data: f64 = sums.iter().map(|(_, sum, count)| sum / count).sum::<f64>() / sums.len().max(1) as f64;
    let distance: f64 = values.iter().zip(origin).map(|(value, origin)| (value / origin.max(1e-9)).ln().abs()).sum();
    data + PRIOR_WEIGHT * distance
}

/// Errors of each table under these constants.
pub fn judge(observations: &[Observation<'_>], constants: &Constants) -> Vec<TableError> {
    let mut names: Vec<&'static str> = Vec::new();
    for observation in observations {
        if !names.contains(&observation.table) {
            names.push(observation.table);
        }
    }
    names.into_iter().map(|table| judge_table(table, observations, constants)).collect()
}

fn judge_table(table: &'static str, observations: &[Observation<'_>], constants: &Constants) -> TableError {
    let rows: Vec<&Observation<'_>> = observations.iter().filter(|observation| observation.table == table).collect();
    let (fitting, judging): (Vec<_>, Vec<_>) = rows.into_iter().partition(|row| row.fits());
    // The naive model: seconds = flop of the step over a constant rate; its ratio to measurement is scaled by one constant.
    let naive_ratio = |row: &&Observation<'_>| naive_seconds(&row.case).0 / row.measured.0;
    let mut ratios: Vec<f64> = fitting.iter().map(naive_ratio).collect();
    ratios.sort_by(f64::total_cmp);
    let constant = ratios.get(ratios.len() / 2).copied().unwrap_or(1.0);
    let model = |row: &&Observation<'_>| row.ratio(constants);
    TableError {
        table,
        rows: (fitting.len(), judging.len()),
        fitted_percent: mean_percent(fitting.iter().filter_map(model)),
        judged_percent: mean_percent(judging.iter().filter_map(model)),
        naive_percent: mean_percent(judging.iter().map(|row| naive_ratio(row) / constant)),
    }
}

/// Step at the peak rate: the naive model but for its one constant.
fn naive_seconds(case: &Case<'_>) -> Seconds {
    let tokens = case.layout.global_batch * case.shape.seq;
    let slowest = case
        .devices
        .iter()
        .filter_map(|device| device.peak(case.precision))
        .map(|rate| rate.0)
        .fold(f64::INFINITY, f64::min);
    Seconds(case.shape.training_flop(tokens).0 / case.layout.devices() / slowest)
}

/// Mean of |ratio - 1|, percent; 0 of none.
fn mean_percent(ratios: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = ratios.fold((0.0, 0.0), |(sum, count), ratio| (sum + (ratio - 1.0).abs(), count + 1.0));
    if count == 0.0 { 0.0 } else { 100.0 * sum / count }
}
