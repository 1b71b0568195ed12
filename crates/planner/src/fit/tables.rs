//! The published tables of measured steps, read into observations. What a table leaves out is filled in here, with its source:
//! facts of the run, never a factor.
//!
//! | table | filled in |
//! |---|---|
//! | megatron_sc21 | micro-batch and chunks from the paper's own scripts (Megatron-LM, `examples/sc21/run_table_1.sh`); 8 x 200 Gbit/s a node (paper, section 5) |
//! | megascale | micro-batch 1, 6 chunks a device, 8 x 200 Gbit/s a node (arXiv 2402.15627, sections 5 and 6); MegaScale's rows overlap everything, Megatron-LM's nothing |
//! | vtrain_multi | full recomputation, no interleaving (DeepSpeed's pipeline); 4 x 200 Gbit/s a node of 8 (arXiv 2312.12391, section 4) |
//! | llm_foundry | sizes of the MPT family by name; 200 Gbit/s a device on A100 (section titles), 400 on H100 |
//! | bigscience | full recomputation, ZeRO stage 1; Jean Zay: 4 x 100 Gbit/s Omni-Path a node of 8 (the project's log) |
//! | sailor | OPT-350M and GPT-Neo 2.7B by name (the latter with 32 heads: what the table's memory column says), 2,048 tokens, plain modules; Alps 200 Gbit/s a device; RTX nodes 1 Gbit/s (unpublished: what the table's own gradient times say) |
//! | korthikanti | A100-80GB, fp16; 8 x 200 Gbit/s a node |

use super::Observation;
use crate::catalogue::{Catalogue, CatalogueError, Device, Precision};
use crate::csv::{CsvError, Table};
use crate::model::Case;
use crate::model::layout::{Layout, Overlap, Recompute, Stack};
use crate::model::shape::Transformer;
use crate::units::{BitsPerSecond, Seconds};

/// Why a table of measurements cannot be read.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum TableReadError {
    /// No CSV.
    #[error(transparent)]
    Csv(#[from] CsvError),
    /// A device of it is not in the catalogue.
    #[error(transparent)]
    Device(#[from] CatalogueError),
    /// A cell that should be a number.
    #[error("row {row}, column {column}: \"{found}\" is no number")]
    Number {
        /// Row, counted from 1 after the header.
        row: usize,
        /// Column.
        column: String,
        /// What it says.
        found: String,
    },
}

/// How a table's text becomes observations.
pub type Reader = for<'a> fn(&'a Catalogue, &str) -> Result<Vec<Observation<'a>>, TableReadError>;

/// Every table that fits or judges: file name and reader.
pub const TABLES: &[(&str, Reader)] = &[
    ("megatron_sc21_table1.csv", megatron_sc21),
    ("megascale_table2_175B.csv", megascale),
    ("vtrain_ground_truth_multi.csv", vtrain),
    ("llm_foundry_mpt_h100_a100.csv", llm_foundry),
    ("bigscience_megatron_deepspeed.csv", bigscience),
    ("sailor_gh200_rtx_measured.csv", sailor),
    ("korthikanti_table5.csv", korthikanti),
];

/// A GPT: feed-forward of 4 h without a gate, every head with keys of its own.
pub fn gpt(layers: f64, hidden: f64, heads: f64, vocab: f64, seq: f64) -> Transformer {
    Transformer {
        layers,
        hidden,
        ffn: 4.0 * hidden,
        heads,
        kv_heads: heads,
        vocab,
        seq,
        experts: 1.0,
        experts_per_token: 1.0,
        gated: false,
    }
}

/// The layout from which the tables differ in what they name: Megatron-LM of 2021.
pub fn classic_layout() -> Layout {
    Layout {
        tp: 1.0,
        pp: 1.0,
        dp: 1.0,
        cp: 1.0,
        ep: 1.0,
        zero: 0,
        micro_batch: 1.0,
        global_batch: 1.0,
        interleave: 1.0,
        recompute: Recompute::Full,
        stack: Stack::Classic,
        overlap: Overlap::None,
        sequence_parallel: false,
        eager: false,
        launch_blocking: false,
    }
}

fn case<'a>(device: &'a Device, shape: Transformer, layout: Layout, network_gigabits: f64) -> Case<'a> {
    Case {
        shape,
        layout,
        precision: Precision::Fp16,
        devices: vec![device],
        stage_layers: None,
        devices_per_node: 8.0,
        network: BitsPerSecond::from_gigabits(network_gigabits),
    }
}

fn number(table: &Table, row: usize, column: &str) -> Result<f64, TableReadError> {
    let found = table.cell(row, column).ok_or_else(|| CsvError::NoColumn { column: column.to_owned() })?;
    found.replace(',', "").parse().map_err(|_| TableReadError::Number {
        row: row + 1,
        column: column.to_owned(),
        found: found.chars().take(40).collect(),
    })
}

fn megatron_sc21<'a>(catalogue: &'a Catalogue, text: &str) -> Result<Vec<Observation<'a>>, TableReadError> {
    /// Hidden size, micro-batch, chunks a device.
    const SCRIPTS: &[(f64, f64, f64)] = &[
        (2304.0, 16.0, 1.0),
        (3072.0, 16.0, 1.0),
        (4096.0, 16.0, 1.0),
        (6144.0, 8.0, 1.0),
        (8192.0, 4.0, 1.0),
        (10240.0, 2.0, 3.0),
        (12288.0, 2.0, 2.0),
        (16384.0, 1.0, 2.0),
        (20480.0, 1.0, 3.0),
        (25600.0, 1.0, 1.0),
    ];
    let table = Table::parse(text)?;
    let device = catalogue.find("A100 80GB")?;
    let read = |row: usize| -> Result<Observation<'a>, TableReadError> {
        let value = |column: &str| number(&table, row, column);
        let hidden = value("hidden")?;
        let (_, micro_batch, interleave) =
            SCRIPTS.iter().copied().find(|script| script.0 == hidden).unwrap_or((hidden, 1.0, 1.0));
        let layout = Layout {
            tp: value("TP")?,
            pp: value("PP")?,
            dp: value("DP_derived")?,
            global_batch: value("global_batch")?,
            micro_batch,
            interleave,
            ..classic_layout()
        };
        let shape = gpt(value("layers")?, hidden, value("heads")?, 51_200.0, value("seq")?);
        let measured = Seconds(value("iter_time_s_derived_eq3_V51200")?);
        Ok(Observation { table: "megatron_sc21", row: row + 1, case: case(device, shape, layout, 200.0), measured })
    };
    (0..table.len()).map(read).collect()
}

fn megascale<'a>(catalogue: &'a Catalogue, text: &str) -> Result<Vec<Observation<'a>>, TableReadError> {
    let table = Table::parse(text)?;
    let device = catalogue.find("A100 80GB")?;
    let read = |row: usize| -> Result<Observation<'a>, TableReadError> {
        let value = |column: &str| number(&table, row, column);
        let overlap = if table.cell(row, "system") == Some("MegaScale") { Overlap::Full } else { Overlap::None };
        let layout = Layout {
            tp: value("TP")?,
            pp: value("PP")?,
            dp: value("DP_derived")?,
            global_batch: value("global_batch")?,
            interleave: 6.0,
            recompute: Recompute::Selective,
            stack: Stack::Modern,
            overlap,
            sequence_parallel: true,
            zero: 1,
            ..classic_layout()
        };
        let shape = gpt(value("layers")?, value("hidden")?, value("heads")?, 64_000.0, 2048.0);
        let case = Case { precision: Precision::Bf16, ..case(device, shape, layout, 200.0) };
        Ok(Observation { table: "megascale", row: row + 1, case, measured: Seconds(value("iter_s")?) })
    };
    (0..table.len()).map(read).collect()
}

fn vtrain<'a>(catalogue: &'a Catalogue, text: &str) -> Result<Vec<Observation<'a>>, TableReadError> {
    let table = Table::parse(text)?;
    let device = catalogue.find("A100 80GB")?;
    let read = |row: usize| -> Result<Observation<'a>, TableReadError> {
        let value = |column: &str| number(&table, row, column);
        let layout = Layout {
            tp: value("tensor parallelism")?,
            pp: value("pipeline parallelism")?,
            dp: value("data parallelism")?,
            micro_batch: value("micro batch")?,
            global_batch: value("global batch")?,
            ..classic_layout()
        };
        let shape = gpt(
            value("# layers")?,
            value("hidden size")?,
            value("attention heads")?,
            51_200.0,
            value("sequence length")?,
        );
        let measured = Seconds(value("iteration time (ms)")? / 1e3);
        Ok(Observation { table: "vtrain_multi", row: row + 1, case: case(device, shape, layout, 100.0), measured })
    };
    (0..table.len()).map(read).collect()
}

/// The MPT family: name, layers, width, heads.
const MPT: &[(&str, f64, f64, f64)] = &[
    ("125m", 12.0, 768.0, 12.0),
    ("350m", 24.0, 1024.0, 16.0),
    ("760m", 24.0, 1536.0, 12.0),
    ("1b", 24.0, 2048.0, 16.0),
    ("3b", 32.0, 2560.0, 20.0),
    ("7b", 32.0, 4096.0, 32.0),
    ("13b", 40.0, 5120.0, 40.0),
    ("30b", 48.0, 7168.0, 56.0),
    ("70b", 80.0, 8192.0, 64.0),
];

fn llm_foundry<'a>(catalogue: &'a Catalogue, text: &str) -> Result<Vec<Observation<'a>>, TableReadError> {
    let table = Table::parse(text)?;
    let mut observations = Vec::new();
    for row in 0..table.len() {
        let value = |column: &str| number(&table, row, column);
        let flag = |column: &str| table.cell(row, column) == Some("True");
        let known = MPT.iter().find(|size| table.cell(row, "Model") == Some(size.0));
        let (Some((_, layers, hidden, heads)), false) = (known, flag("Activation CPUOffload")) else { continue };
        let device = catalogue.find(table.cell(row, "GPU").unwrap_or_default())?;
        let network = if device.name.starts_with('H') { 400.0 } else { 200.0 };
        let (gpus, seq) = (value("# GPUs")?, value("SeqLen (T)")?);
        let layout = Layout {
            dp: gpus,
            micro_batch: value("MicroBatchSize")?,
            global_batch: value("GlobalBatchSize")?,
            zero: if table.cell(row, "Sharding Strategy") == Some("SHARD_GRAD_OP") { 2 } else { 3 },
            recompute: if flag("Activation Checkpointing") { Recompute::Full } else { Recompute::None },
            stack: Stack::Modern,
            overlap: Overlap::Data,
            eager: true,
            ..classic_layout()
        };
        let precision = table.cell(row, "Precision").and_then(Precision::parse).unwrap_or(Precision::Bf16);
        let case = Case { precision, ..case(device, gpt(*layers, *hidden, *heads, 50_368.0, seq), layout, network) };
        let measured = Seconds(layout.global_batch * seq / (value("Throughput (T/s/GPU)")? * gpus));
        observations.push(Observation { table: "llm_foundry", row: row + 1, case, measured });
    }
    Ok(observations)
}

/// Rows of BigScience's log with a step time. A row whose printed rate and printed time disagree by more than 5 % is left out:
/// nobody can say which is right.
fn bigscience<'a>(catalogue: &'a Catalogue, text: &str) -> Result<Vec<Observation<'a>>, TableReadError> {
    let table = Table::parse(text)?;
    let device = catalogue.find("A100 80GB")?;
    let mut observations = Vec::new();
    for row in 0..table.len() {
        let cell = |column: &str| table.cell(row, column).unwrap_or_default();
        let value = |column: &str| cell(column).trim_end_matches(['B', 'G']).parse::<f64>().ok();
        let text = format!("{} / {}", cell("last_env_settings_before_table"), cell("text_before_table"));
        let named = |key: &str, column: &str| value(column).or_else(|| last_setting(&text, key));
        let (Some(seconds), Some(billions), Some(rate)) = (value("Sec/it"), value("Size"), value("TFLOPs")) else {
            continue;
        };
        let (Some(tp), Some(pp), Some(nodes), Some(global_batch)) =
            (value("TP"), value("PP"), value("Nodes"), value("GBS"))
        else {
            continue;
        };
        let (Some(hidden), Some(heads)) = (named("HIDDEN", "NHIDDEN"), named("NHEADS", "NHEADS")) else { continue };
        let printed = billions * 8.0 * 2048.0 * global_batch / (seconds * nodes * 8.0 * 1e3);
        if (printed / rate - 1.0).abs() > 0.05 {
            continue;
        }
        let Some((hidden, layers)) = bigscience_shape(billions * 1e9, hidden, named("NLAYERS", "Layers")) else {
            continue;
        };
        // Heads that do not divide the width are a setting of another experiment.
        if hidden % heads != 0.0 {
            continue;
        }
        let layout = Layout {
            tp,
            pp,
            dp: nodes * 8.0 / (tp * pp),
            micro_batch: value("MBS").unwrap_or(1.0),
            global_batch,
            zero: value("ZS").unwrap_or(1.0) as u8,
            launch_blocking: true,
            ..classic_layout()
        };
        let case = case(device, gpt(layers, hidden, heads, BIGSCIENCE_VOCAB, 2048.0), layout, 50.0);
        observations.push(Observation { table: "bigscience", row: row + 1, case, measured: Seconds(seconds) });
    }
    Ok(observations)
}

/// Tokens of the vocabulary that the log's experiments used.
const BIGSCIENCE_VOCAB: f64 = 150_257.0;

/// Width and layers of a row. The log's settings are sometimes of another experiment: where they miss the printed size by a few percent,
/// the size says how many layers there were (they were cut to fit the stages); where they miss it by more, the width is the
/// old one, and a multiple of 512 as all of them.
fn bigscience_shape(parameters: f64, hidden: f64, named_layers: Option<f64>) -> Option<(f64, f64)> {
    let layers_at = |hidden: f64| ((parameters - BIGSCIENCE_VOCAB * hidden) / (12.0 * hidden * hidden)).round();
    let layers = layers_at(hidden);
    match named_layers {
        Some(named) if (named / layers - 1.0).abs() < 0.03 => Some((hidden, named)),
        Some(named) if (named / layers - 1.0).abs() > 0.1 => {
            let width = ((parameters / (12.0 * named)).sqrt() / 512.0).round() * 512.0;
            ((layers_at(width) / named - 1.0).abs() < 0.03).then_some((width, named))
        }
        _ => Some((hidden, layers)),
    }
}

/// The number after the last `key=` of a text.
fn last_setting(text: &str, key: &str) -> Option<f64> {
    let start = text.rfind(&format!("{key}="))? + key.len() + 1;
    let digits: String = text[start..].chars().take_while(char::is_ascii_digit).collect();
    digits.parse().ok()
}

fn sailor<'a>(catalogue: &'a Catalogue, text: &str) -> Result<Vec<Observation<'a>>, TableReadError> {
    let table = Table::parse(text)?;
    let mut observations = Vec::new();
    for row in 0..table.len() {
        let value = |column: &str| number(&table, row, column);
        let cell = |column: &str| table.cell(row, column).unwrap_or_default();
        let kinds = cell("(gpu_type,gpus_per_node,tp)");
        let names: Vec<&str> = kinds.split('\'').skip(1).step_by(2).collect();
        let tp = last_number(kinds);
        let dp = last_number(cell("dp_per_stage"));
        // One row's step is no longer than its gradients' reduction alone: the same figure stands in both columns.
        if cell("measured_iter_s") == cell("grad_reduce_s") {
            continue;
        }
        // The two rows that repeat each other under different layouts: one is a slip, nobody can say which.
        if cell("config").contains("N3/plan_config_N3_D1") || cell("config").contains("N6/plan_config_N6_D2") {
            continue;
        }
        let mixed = names.len() > 1;
        let devices = names.iter().map(|name| catalogue.find(name)).collect::<Result<Vec<_>, _>>()?;
        let shape = if cell("config").contains("NEO") {
            gpt(32.0, 2560.0, 32.0, 50_257.0, 2048.0)
        } else {
            gpt(24.0, 1024.0, 16.0, 50_272.0, 2048.0)
        };
        let layout = Layout {
            tp,
            dp,
            pp: value("pp_stages")?,
            micro_batch: value("mbs")?,
            global_batch: value("gbs")?,
            recompute: Recompute::None,
            eager: true,
            ..classic_layout()
        };
        let slowest = slowest(&devices);
        let network = if mixed { 1.0 / tp } else { 200.0 };
        let case = Case { devices_per_node: tp, ..case(slowest, shape, layout, network) };
        observations.push(Observation {
            table: "sailor",
            row: row + 1,
            case,
            measured: Seconds(value("measured_iter_s")?),
        });
    }
    Ok(observations)
}

/// Where all kinds stand in every stage, the slowest sets the pace.
fn slowest<'a>(devices: &[&'a Device]) -> &'a Device {
    let rate = |device: &&Device| device.peak(Precision::Fp16).map_or(0.0, |rate| rate.0);
    devices
        .iter()
        .copied()
        .min_by(|left, right| rate(left).total_cmp(&rate(right)))
        .unwrap_or_else(|| unreachable!("a row names a device"))
}

fn last_number(text: &str) -> f64 {
    text.split(|letter: char| !letter.is_ascii_digit())
        .rfind(|part| !part.is_empty())
        .and_then(|part| part.parse().ok())
        .unwrap_or(1.0)
}

fn korthikanti<'a>(catalogue: &'a Catalogue, text: &str) -> Result<Vec<Observation<'a>>, TableReadError> {
    let table = Table::parse(text)?;
    let device = catalogue.find("A100 80GB")?;
    let mut observations = Vec::new();
    for row in 0..table.len() {
        let value = |column: &str| number(&table, row, column);
        let shape = gpt(value("layers")?, value("hidden")?, value("heads")?, 51_200.0, 2048.0);
        let full = Layout {
            tp: value("TP")?,
            pp: value("PP")?,
            dp: value("DP")?,
            micro_batch: value("microbatch")?,
            global_batch: value("global_batch")?,
            interleave: value("interleave")?,
            ..classic_layout()
        };
        let selective = Layout { recompute: Recompute::Selective, sequence_parallel: true, ..full };
        for (layout, column) in [(full, "iter_s_full_recompute"), (selective, "iter_s_seq_par+selective")] {
            let measured = Seconds(value(column)?);
            observations.push(Observation {
                table: "korthikanti",
                row: row + 1,
                case: case(device, shape, layout, 200.0),
                measured,
            });
        }
    }
    Ok(observations)
}
