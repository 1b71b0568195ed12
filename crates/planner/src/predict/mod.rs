//! A table of layouts in, the same table with predictions out: one step for each row, no search.
//!
//! Columns that the table may have, in any order; an empty cell or a missing column means its default:
//!
//! | column | default | meaning |
//! |---|---|---|
//! | case | empty | any name |
//! | device | needed | catalogue name; several kinds of one pipeline joined by `+` in the order of the stages |
//! | devices | tp pp dp cp | devices in all |
//! | layers, hidden | needed | |
//! | ffn | 4 hidden | width of the feed-forward, of one expert where there are several. 4 hidden means two matrices (GPT), any other width three (gated) |
//! | heads, kv_heads | hidden / 128, heads | |
//! | vocab, seq | 51,200, 2,048 | |
//! | micro_batch, global_batch | 1, dp micro_batch | sequences |
//! | tp, pp, cp, ep | 1 | |
//! | dp | devices / (tp pp cp) | |
//! | experts, experts_per_token | 1, 2 of several | |
//! | zero | 1 | stage; 3 is FSDP |
//! | recompute | none | none, selective, full |
//! | precision | bf16 | fp32, tf32, bf16, fp16, fp8 |
//! | gpus_per_node | 8 | |
//! | interconnect_gbit_s | 200 | network of a node divided by its devices |
//! | interleave | see [`default_interleave`] | model chunks of a device |
//! | stack | classic for fp16, else modern | attention and kernels: loss-scaled fp16 is the mark of the stacks of 2020 to 2022 |
//! | overlap | see [`default_overlap`] | none, data, full |
//!
//! Fully sharded runs (zero 3) are taken to wrap plain modules, whose small operations run one by one; not so in FP8, whose products come with fused
//! kernels or a compiler, and on TPUs, whose compiler fuses.

use crate::catalogue::{Catalogue, CatalogueError, Device, Family, Fp8Scale, Precision};
use crate::csv::{CsvError, Table, quoted};
use crate::model::layout::{Layout, Overlap, Recompute, Stack};
use crate::model::shape::Transformer;
use crate::model::{Case, ModelError, Prediction};
use crate::units::BitsPerSecond;
use base::Hint;
use core::fmt::Write as _;

/// Every column that is read.
const COLUMNS: &[&str] = &[
    "case",
    "device",
    "devices",
    "layers",
    "hidden",
    "ffn",
    "heads",
    "kv_heads",
    "vocab",
    "seq",
    "global_batch",
    "micro_batch",
    "tp",
    "pp",
    "dp",
    "cp",
    "ep",
    "experts",
    "experts_per_token",
    "zero",
    "recompute",
    "precision",
    "gpus_per_node",
    "interconnect_gbit_s",
    "interleave",
    "stack",
    "overlap",
];

/// Columns that a prediction adds.
const ADDED: &str = "step_seconds,tokens_per_second_per_device,tflops_per_device,mfu,memory_gib,compute_share,communication_share,\
                     bubble_share,error";

/// Greatest whole number of each column: some hundred times what anybody has, so that a slip of the keyboard is not computed with.
const GREATEST: &[(&str, f64)] = &[
    ("devices", 1e8),
    ("layers", 1e4),
    ("hidden", 1e6),
    ("ffn", 1e7),
    ("heads", 1e5),
    ("kv_heads", 1e5),
    ("vocab", 1e8),
    ("seq", 1e9),
    ("global_batch", 1e9),
    ("micro_batch", 1e6),
    ("tp", 1e4),
    ("pp", 4_096.0),
    ("dp", 1e8),
    ("cp", 1e5),
    ("ep", 1e5),
    ("experts", 1e5),
    ("experts_per_token", 1e5),
    ("gpus_per_node", 1e5),
    ("interleave", 1e4),
];

/// Network of a device, Gbit/s: 1 Mbit/s to 1 Pbit/s.
const NETWORK_GIGABITS: core::ops::RangeInclusive<f64> = 1e-3..=1e6;

/// Characters of a column's name that a complaint repeats.
const COLUMN_CHARACTERS_SHOWN: usize = 80;

/// Width of a head where none is given.
const HEAD_SIZE: f64 = 128.0;

/// Most chunks of a device that are assumed.
const INTERLEAVE_MAX: u32 = 8;

/// Least layers of an assumed chunk.
const CHUNK_LAYERS_MIN: f64 = 2.0;

/// Why a row cannot be predicted.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum CellError {
    /// The text is no number of the allowed range.
    #[error("\"{found}\" is not {expected}")]
    Value {
        /// What it says.
        found: String,
        /// What may stand there.
        expected: String,
    },
    /// FP8 on a device that has none.
    #[error("{0} has no FP8 products")]
    NoFp8(String),
    /// A layout that cannot be.
    #[error("{0}")]
    Impossible(String),
    /// A cell that has no default is empty.
    #[error("the cell is empty and has no default")]
    Empty,
    /// No such device.
    #[error(transparent)]
    Device(#[from] CatalogueError),
    /// The model has no answer.
    #[error(transparent)]
    Model(#[from] ModelError),
}

/// A row's error with its place.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("row {row}, column {column}: {error}")]
pub struct RowError {
    /// Row, counted from 1 after the header.
    pub row: usize,
    /// Column.
    pub column: String,
    /// What is wrong.
    #[source]
    pub error: CellError,
}

impl Hint for RowError {
    fn hint(&self) -> Option<String> {
        match &self.error {
            CellError::Device(error) => error.hint(),
            CellError::Model(error) => error.hint(),
            CellError::NoFp8(_) => Some(format!("write bf16 into {} of row {}", self.column, self.row)),
            CellError::Impossible(_) => Some(format!("change {} of row {}", self.column, self.row)),
            CellError::Empty => Some(format!("fill in {} of row {}", self.column, self.row)),
            CellError::Value { expected, .. } => {
                Some(format!("write {expected} into {} of row {}", self.column, self.row))
            }
        }
    }
}

/// Why a whole table cannot be read.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum PredictError {
    /// No table.
    #[error(transparent)]
    Csv(#[from] CsvError),
    /// A column that means nothing here.
    #[error("the header has an unknown column \"{column}\"")]
    UnknownColumn {
        /// Its name.
        column: String,
        /// The nearest known one.
        near: Option<&'static str>,
    },
}

impl Hint for PredictError {
    fn hint(&self) -> Option<String> {
        match self {
            Self::Csv(error) => error.hint(),
            Self::UnknownColumn { near: Some(near), .. } => Some(format!("did you mean \"{near}\"?")),
            Self::UnknownColumn { .. } => Some(format!("the columns are {}", COLUMNS.join(","))),
        }
    }
}

/// Predictions of a table.
#[derive(Debug, Clone)]
pub struct Predicted {
    /// One for each row.
    pub rows: Vec<Result<Prediction, RowError>>,
    /// What was read: the cells of each row.
    pub table: Table,
    /// The table with the added columns; a row without prediction says why in the last.
    pub csv: String,
}

impl Predicted {
    /// Rows without prediction.
    pub fn errors(&self) -> impl Iterator<Item = &RowError> {
        self.rows.iter().filter_map(|row| row.as_ref().err())
    }
}

/// Predicts every row of a table.
pub fn predict_table(catalogue: &Catalogue, text: &str) -> Result<Predicted, PredictError> {
    let table = Table::parse(text)?;
    for column in table.header() {
        if !COLUMNS.contains(&column.as_str()) {
            let (near, column) = (nearest(column), column.chars().take(COLUMN_CHARACTERS_SHOWN).collect());
            return Err(PredictError::UnknownColumn { column, near });
        }
    }
    let rows: Vec<_> = (0..table.len())
        .map(|row| {
            let case = case(catalogue, &table, row)?;
            case.predict().map_err(|error| {
                let (column, error) = match error {
                    ModelError::Impossible { what, reason } => (what, CellError::Impossible(reason)),
                    error @ ModelError::UnknownFigure { .. } => ("device", error.into()),
                };
                RowError { row: row + 1, column: column.to_owned(), error }
            })
        })
        .collect();
    let csv = written(&table, &rows);
    Ok(Predicted { rows, table, csv })
}

fn nearest(column: &str) -> Option<&'static str> {
    COLUMNS
        .iter()
        .map(|known| (strsim::jaro_winkler(column, known), *known))
        .filter(|(similarity, _)| *similarity > 0.8)
        .max_by(|left, right| left.0.total_cmp(&right.0))
        .map(|(_, known)| known)
}

fn written(table: &Table, rows: &[Result<Prediction, RowError>]) -> String {
    let mut csv = format!("{},{ADDED}\n", table.header().iter().map(|name| quoted(name)).collect::<Vec<_>>().join(","));
    for (row, predicted) in rows.iter().enumerate() {
        for column in table.header() {
            csv.push_str(&quoted(table.cell(row, column).unwrap_or_default()));
            csv.push(',');
        }
        // Writing into a string cannot fail.
        let _ = match predicted {
            Ok(prediction) => write_prediction(&mut csv, prediction),
            Err(error) => writeln!(csv, ",,,,,,,,{}", quoted(&error.to_string())),
        };
    }
    csv
}

fn write_prediction(csv: &mut String, prediction: &Prediction) -> core::fmt::Result {
    let memory = prediction.memory.total().gib();
    // A toy's memory is not nothing.
    let digits = if memory < 0.1 { 9 } else { 3 };
    writeln!(
        csv,
        "{:.6},{:.3},{:.3},{:.4},{memory:.digits$},{:.4},{:.4},{:.4},",
        prediction.step.0,
        prediction.tokens_per_second_per_device,
        prediction.useful.tera(),
        prediction.mfu,
        prediction.compute_share,
        prediction.communication_share,
        prediction.bubble_share,
    )
}

/// Greatest whole number of a column.
fn greatest(column: &str) -> f64 {
    let known = GREATEST.iter().find(|(name, _)| *name == column);
    known.unwrap_or_else(|| unreachable!("{column} is no column of whole numbers")).1
}

/// One row's cells.
struct Cells<'a> {
    table: &'a Table,
    row: usize,
}

impl<'a> Cells<'a> {
    fn text(&self, column: &str) -> Option<&'a str> {
        self.table.cell(self.row, column).filter(|cell| !cell.is_empty())
    }

    fn error(&self, column: &str, error: CellError) -> RowError {
        RowError { row: self.row + 1, column: column.to_owned(), error }
    }

    fn wrong(&self, column: &str, found: &str, expected: impl Into<String>) -> RowError {
        self.error(column, CellError::Value { found: found.chars().take(40).collect(), expected: expected.into() })
    }

    /// A whole number from 1.
    fn whole(&self, column: &str) -> Result<Option<f64>, RowError> {
        let Some(found) = self.text(column) else { return Ok(None) };
        match found.parse::<f64>() {
            Ok(number) if (1.0..=greatest(column)).contains(&number) && number.fract() == 0.0 => Ok(Some(number)),
            _ => Err(self.wrong(column, found, format!("a whole number from 1 to {}", greatest(column)))),
        }
    }

    fn needed(&self, column: &str) -> Result<f64, RowError> {
        self.whole(column)?.ok_or_else(|| self.error(column, CellError::Empty))
    }

    fn choice<T: Copy>(&self, column: &str, choices: &[(&str, T)]) -> Result<Option<T>, RowError> {
        let Some(found) = self.text(column) else { return Ok(None) };
        let known = choices.iter().find(|(name, _)| found.eq_ignore_ascii_case(name));
        let names: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
        known
            .map(|(_, value)| Some(*value))
            .ok_or_else(|| self.wrong(column, found, format!("one of {}", names.join(", "))))
    }
}

/// What one row of a table of layouts describes.
pub(crate) fn case<'a>(catalogue: &'a Catalogue, table: &Table, row: usize) -> Result<Case<'a>, RowError> {
    let cells = Cells { table, row };
    let devices = devices(catalogue, &cells)?;
    let precision = precision(&cells)?;
    let shape = shape(&cells)?;
    let compiled = devices.iter().any(|device| device.family == Family::Tpu);
    let network = match cells.text("interconnect_gbit_s") {
        None => 200.0,
        Some(found) => {
            let rate = found.parse::<f64>().ok().filter(|rate| NETWORK_GIGABITS.contains(rate));
            let (least, greatest) = NETWORK_GIGABITS.into_inner();
            let expected = || format!("a number of Gbit/s from {least} to {greatest}");
            rate.ok_or_else(|| cells.wrong("interconnect_gbit_s", found, expected()))?
        }
    };
    let without = devices.iter().find(|device| precision == Precision::Fp8 && device.fp8_scale == Fp8Scale::None);
    if let Some(device) = without {
        return Err(cells.error("precision", CellError::NoFp8(device.name.clone())));
    }
    Ok(Case {
        layout: layout(&cells, &shape, precision, compiled)?,
        shape,
        precision,
        devices,
        stage_layers: None,
        devices_per_node: cells.whole("gpus_per_node")?.unwrap_or(8.0),
        network: BitsPerSecond::from_gigabits(network),
    })
}

fn devices<'a>(catalogue: &'a Catalogue, cells: &Cells<'_>) -> Result<Vec<&'a Device>, RowError> {
    let names = cells.text("device").ok_or_else(|| cells.error("device", CellError::Empty))?;
    // A name may contain a plus itself.
    if let Ok(device) = catalogue.find(names) {
        return Ok(vec![device]);
    }
    names
        .split('+')
        .map(|name| catalogue.find(name.trim()).map_err(|error| cells.error("device", error.into())))
        .collect()
}

fn precision(cells: &Cells<'_>) -> Result<Precision, RowError> {
    let Some(found) = cells.text("precision") else { return Ok(Precision::Bf16) };
    Precision::parse(found).ok_or_else(|| cells.wrong("precision", found, "one of fp32, tf32, bf16, fp16, fp8"))
}

fn shape(cells: &Cells<'_>) -> Result<Transformer, RowError> {
    let hidden = cells.needed("hidden")?;
    let heads = cells.whole("heads")?.unwrap_or((hidden / HEAD_SIZE).round().max(1.0));
    let ffn = cells.whole("ffn")?.unwrap_or(4.0 * hidden);
    let experts = cells.whole("experts")?.unwrap_or(1.0);
    let kv_heads = cells.whole("kv_heads")?.unwrap_or(heads);
    if heads > hidden {
        return Err(cells.wrong("heads", &heads.to_string(), format!("a whole number up to the width, {hidden}")));
    }
    if kv_heads > heads {
        return Err(cells.wrong("kv_heads", &kv_heads.to_string(), format!("a whole number up to the heads, {heads}")));
    }
    let seq = cells.whole("seq")?.unwrap_or(2_048.0);
    if let Some(cp) = cells.whole("cp")?.filter(|cp| *cp > seq) {
        return Err(cells.wrong(
            "cp",
            &cp.to_string(),
            format!("a whole number up to the tokens of a sequence, {seq}"),
        ));
    }
    let experts_per_token = cells.whole("experts_per_token")?.unwrap_or(2.0_f64.min(experts));
    if experts_per_token > experts {
        let found = experts_per_token.to_string();
        return Err(cells.wrong("experts_per_token", &found, format!("a whole number up to the experts, {experts}")));
    }
    Ok(Transformer {
        layers: cells.needed("layers")?,
        hidden,
        ffn,
        heads,
        kv_heads,
        vocab: cells.whole("vocab")?.unwrap_or(51_200.0),
        seq,
        experts,
        experts_per_token,
        gated: ffn != 4.0 * hidden || experts > 1.0,
    })
}

fn layout(cells: &Cells<'_>, shape: &Transformer, precision: Precision, compiled: bool) -> Result<Layout, RowError> {
    let degree = |column: &str| Ok::<f64, RowError>(cells.whole(column)?.unwrap_or(1.0));
    let (tp, pp, cp) = (degree("tp")?, degree("pp")?, degree("cp")?);
    let dp = data_parallel(cells, tp * pp * cp)?;
    let micro_batch = degree("micro_batch")?;
    let stacks = [("classic", Stack::Classic), ("modern", Stack::Modern)];
    let stack = cells.choice("stack", &stacks)?.unwrap_or(if precision == Precision::Fp16 {
        Stack::Classic
    } else {
        Stack::Modern
    });
    let overlaps = [("none", Overlap::None), ("data", Overlap::Data), ("full", Overlap::Full)];
    let recomputes = [("none", Recompute::None), ("selective", Recompute::Selective), ("full", Recompute::Full)];
    let recompute = cells.choice("recompute", &recomputes)?.unwrap_or(Recompute::None);
    let zeros = [("0", 0), ("1", 1), ("2", 2), ("3", 3)];
    let zero = cells.choice("zero", &zeros)?.unwrap_or(1);
    let overlap = cells.choice("overlap", &overlaps)?.unwrap_or(default_overlap(stack, precision, zero));
    let global_batch = cells.whole("global_batch")?.unwrap_or(dp * micro_batch);
    if global_batch < dp * micro_batch {
        let expected = format!("a whole number from dp micro_batch, {}", dp * micro_batch);
        return Err(cells.wrong("global_batch", &global_batch.to_string(), expected));
    }
    Ok(Layout {
        tp,
        pp,
        dp,
        cp,
        ep: degree("ep")?,
        zero,
        micro_batch,
        global_batch,
        interleave: cells.whole("interleave")?.unwrap_or(default_interleave(shape.layers, pp, stack)),
        recompute,
        stack,
        overlap,
        eager: default_eager(zero, precision, compiled),
        launch_blocking: false,
        // Both came with the same paper (arXiv 2205.05198).
        sequence_parallel: tp > 1.0 && (stack == Stack::Modern || recompute == Recompute::Selective),
    })
}

/// Today's stacks interleave: the most even chunks up to eight of at least two layers, short stages being filled up as Llama 3's ends are (126 layers on
/// 16 stages: eight each, less one at both ends). Classic ones are taken as plain 1F1B.
pub fn default_interleave(layers: f64, pp: f64, stack: Stack) -> f64 {
    if pp <= 1.0 || stack == Stack::Classic {
        return 1.0;
    }
    let stage = (layers / pp).ceil();
    let is_even = |chunks: &f64| stage % chunks == 0.0 && stage / chunks >= CHUNK_LAYERS_MIN;
    (1..=INTERLEAVE_MAX).rev().map(f64::from).find(is_even).unwrap_or(1.0)
}

/// Whether modules are plain: those that full sharding wraps are, unless FP8 or a TPU's compiler fuses them.
pub fn default_eager(zero: u8, precision: Precision, compiled: bool) -> bool {
    zero == 3 && precision != Precision::Fp8 && !compiled
}

/// What software of this kind hides: nothing in 2020 to 2022, but for the gathers of fully sharded parameters; later the gradients as well. FP8 is the
/// mark of stacks (Transformer Engine, NeMo, torch.compile) that also overlap tensor-parallel collectives with the products they feed.
pub fn default_overlap(stack: Stack, precision: Precision, zero: u8) -> Overlap {
    match (stack, precision) {
        (Stack::Classic, _) if zero < 3 => Overlap::None,
        (Stack::Modern, Precision::Fp8) => Overlap::Full,
        _ => Overlap::Data,
    }
}

fn data_parallel(cells: &Cells<'_>, model_parallel: f64) -> Result<f64, RowError> {
    let (dp, devices) = (cells.whole("dp")?, cells.whole("devices")?);
    let Some(devices) = devices else { return Ok(dp.unwrap_or(1.0)) };
    let taken = model_parallel * dp.unwrap_or((devices / model_parallel).floor());
    if taken == devices {
        return Ok(devices / model_parallel);
    }
    let expected = match dp {
        Some(_) => format!("tp pp cp dp, {taken}"),
        None => format!("a multiple of tp pp cp, {model_parallel}"),
    };
    Err(cells.wrong("devices", &devices.to_string(), expected))
}

#[cfg(test)]
mod tests;
