//! The published memory of Korthikanti et al., figure 1, beside the model's.

use super::tables::{TableReadError, classic_layout, gpt};
use crate::catalogue::{Catalogue, Precision};
use crate::csv::Table;
use crate::model::Case;
use crate::model::layout::{Layout, Recompute};
use crate::model::memory::memory;
use crate::units::BitsPerSecond;

/// Name, layers, width, heads, stages, chunks a device, micro-batch of the paper's table 3; tensor parallelism is 8 throughout.
const MODELS: &[(&str, f64, f64, f64, f64, f64, f64)] = &[
    ("22B", 48.0, 6144.0, 64.0, 1.0, 1.0, 4.0),
    ("175B", 96.0, 12288.0, 96.0, 8.0, 3.0, 1.0),
    ("530B", 105.0, 20480.0, 128.0, 35.0, 3.0, 1.0),
    ("1T", 128.0, 25600.0, 160.0, 64.0, 1.0, 1.0),
];

/// One row: predicted and published GiB, of states and activations together.
#[derive(Debug, Clone, PartialEq)]
pub struct MemoryRow {
    /// Model and recomputation.
    pub name: String,
    /// The model's figure for the fullest device, buffers included.
    pub predicted_gib: f64,
    /// The paper's.
    pub published_gib: f64,
}

/// Compares each row of `korthikanti_fig1_memory.csv`.
pub fn compare(catalogue: &Catalogue, text: &str) -> Result<Vec<MemoryRow>, TableReadError> {
    let table = Table::parse(text)?;
    let device = catalogue.find("A100 80GB")?;
    let mut rows = Vec::new();
    for row in 0..table.len() {
        let cell = |column: &str| table.cell(row, column).unwrap_or_default();
        let Some((_, layers, hidden, heads, pp, interleave, micro_batch)) =
            MODELS.iter().copied().find(|model| model.0 == cell("model"))
        else {
            continue;
        };
        let selective = cell("recompute") != "none";
        let layout = Layout {
            tp: 8.0,
            pp,
            interleave,
            micro_batch,
            global_batch: micro_batch * pp.max(2.0) * 8.0,
            recompute: if selective { Recompute::Selective } else { Recompute::None },
            sequence_parallel: selective,
            ..classic_layout()
        };
        let case = Case {
            shape: gpt(layers, hidden, heads, 51_200.0, 2048.0),
            layout,
            precision: Precision::Fp16,
            devices: vec![device],
            stage_layers: None,
            devices_per_node: 8.0,
            network: BitsPerSecond::from_gigabits(200.0),
        };
        let published = |column: &str| cell(column).parse::<f64>().unwrap_or(f64::NAN);
        rows.push(MemoryRow {
            name: format!("{} {}", cell("model"), cell("recompute")),
            predicted_gib: memory(&case).total().gib(),
            published_gib: published("par_opt_GiB_per_GPU") + published("activation_GiB_per_GPU"),
        });
    }
    Ok(rows)
}
