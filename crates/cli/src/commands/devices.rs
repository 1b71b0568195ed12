//! `beringia devices`: what this machine has to compute on, and how fast that is.
//!
//! Engines that cannot be used are listed with the reason: what is missing is the more frequent question.

use crate::engines::check_kind;
use crate::failure::Failure;
use crate::format::bytes;
use crate::output::Output;
use base::Hint;
use engine::{DeviceRates, DeviceReport, EngineError};
use planner::catalogue::Fp8Scale;
use planner::{Catalogue, Device};
use serde::Serialize;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// Measuring one device takes about this long.
const MEASURE_SECONDS: f64 = 1.5;

/// Stacks of the native engine that need a cargo feature, a driver and a device.
const STACKS: [&str; 5] = ["wgpu", "vulkan", "cuda", "rocm", "metal"];

/// List the devices of this machine: maker, memory, driver, measured speed; or those that plans know
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Leave out the measuring, which takes some seconds a device.
    #[arg(long)]
    no_measure: bool,
    /// List instead the devices that `plan` and `predict` know by name, in their makers' figures.
    #[arg(long, conflicts_with_all = ["no_measure", "python"])]
    catalogue: bool,
    /// torch: the interpreter that has PyTorch; BERINGIA_PYTHON or python3 unless given.
    #[arg(long, value_name = "PATH")]
    python: Option<PathBuf>,
}

/// Devices and engines without any.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Inventory {
    /// Every device of every engine, by the name that `--engine` takes.
    pub(crate) devices: Vec<DeviceReport>,
    /// Engines that have no device here.
    pub(crate) left_out: Vec<LeftOut>,
}

/// An engine that cannot be used on this machine.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct LeftOut {
    /// As `--engine` takes it.
    pub(crate) engine: String,
    /// Why it cannot be used.
    pub(crate) reason: String,
    /// What mends it.
    pub(crate) hint: String,
}

impl LeftOut {
    fn new(engine: &str, failure: impl Into<Failure>) -> Self {
        let Failure { message, hint } = failure.into();
        Self { engine: engine.to_owned(), reason: message, hint }
    }
}

/// Runs the command.
pub(crate) fn run(args: Args, output: &Output) -> Result<(), Failure> {
    if args.catalogue {
        let known = Catalogue::built_in();
        output.object(&catalogue_object(&known));
        output.text(&catalogue_table(&known));
        return Ok(());
    }
    let seconds = (!args.no_measure).then_some(MEASURE_SECONDS);
    if seconds.is_some() {
        output.notice("measuring; `--no-measure` lists the devices at once");
    }
    let inventory = inventory(seconds, args.python.as_deref());
    output.object(&inventory);
    output.text(&table(&inventory.devices));
    for left_out in &inventory.left_out {
        output.line(format_args!("\nnot here: {}: {}\n  hint: {}", left_out.engine, left_out.reason, left_out.hint));
    }
    Ok(())
}

/// What every engine of this build finds on this machine; each device is measured for `measure_seconds`.
pub(crate) fn inventory(measure_seconds: Option<f64>, python: Option<&Path>) -> Inventory {
    let mut found = Inventory { devices: Vec::new(), left_out: Vec::new() };
    for info in engine_burn::devices() {
        let rates = match measure_seconds {
            None => DeviceRates::default(),
            Some(seconds) => match engine_burn::measure_rates(&info.engine, seconds) {
                Ok(rates) => rates,
                Err(error) => {
                    found.left_out.push(LeftOut::new(&info.engine, error));
                    continue;
                }
            },
        };
        found.devices.push(DeviceReport { info, rates });
    }
    for stack in STACKS {
        let is_named = |engine: &str| engine.split(':').next() == Some(stack);
        let is_known = found.devices.iter().any(|device| is_named(&device.info.engine))
            || found.left_out.iter().any(|left_out| is_named(&left_out.engine));
        if !is_known && let Some(left_out) = why_not(stack) {
            found.left_out.push(left_out);
        }
    }
    match torch_devices(measure_seconds, python) {
        Ok(devices) => found.devices.extend(devices),
        Err(error) => found.left_out.push(LeftOut::new("torch", error)),
    }
    found
}

/// Why a stack of the native engine has no device: it is not in this build, or what opening its first device says.
fn why_not(stack: &str) -> Option<LeftOut> {
    if let Err(failure) = check_kind(stack) {
        return Some(LeftOut::new(stack, failure));
    }
    let error = engine_burn::measure_rates(stack, 0.0).err()?;
    let EngineError::Device { reason, .. } = &error else { return Some(LeftOut::new(stack, error)) };
    let hint = error.hint().unwrap_or_default();
    Some(LeftOut { engine: stack.to_owned(), reason: reason.clone(), hint })
}

fn torch_devices(measure_seconds: Option<f64>, python: Option<&Path>) -> Result<Vec<DeviceReport>, EngineError> {
    match measure_seconds {
        None => engine_torch::devices(python),
        Some(seconds) => engine_torch::measured_devices(python, seconds),
    }
}

/// One line a device; columns as wide as what they hold.
fn table(devices: &[DeviceReport]) -> String {
    let number = |value: Option<f64>, digits: usize| value.map_or("-".to_owned(), |value| format!("{value:.digits$}"));
    let text = |value: &str| if value.is_empty() { "-".to_owned() } else { value.to_owned() };
    let head = ["engine", "name", "maker", "memory", "driver", "f32 TFLOP/s", "bf16 TFLOP/s", "copy GB/s"];
    let mut rows = vec![head.map(str::to_owned)];
    rows.extend(devices.iter().map(|DeviceReport { info, rates }| {
        [
            info.engine.clone(),
            text(&info.name),
            text(&info.maker),
            info.memory_bytes.map_or("-".to_owned(), bytes),
            text(&info.driver),
            number(rates.matrix_f32_tflops, 2),
            number(rates.matrix_bf16_tflops, 2),
            number(rates.copy_gigabytes_per_second, 1),
        ]
    }));
    // Numbers stand under each other by their last digit.
    columns(&rows, &|column| column == 3 || column >= 5)
}

/// Rows of cells, columns as wide as what they hold; those of numbers aligned to the right.
fn columns<const N: usize>(rows: &[[String; N]], is_number: &dyn Fn(usize) -> bool) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; N] = std::array::from_fn(width);
    let mut table = String::new();
    for row in rows {
        let cell = |(column, text): (usize, &String)| {
            let width = widths[column];
            if is_number(column) { format!("{text:>width$}") } else { format!("{text:<width$}") }
        };
        let line = row.iter().enumerate().map(cell).collect::<Vec<_>>().join("  ");
        table.push_str(line.trim_end());
        table.push('\n');
    }
    table
}

/// What plans know: one line a device.
fn catalogue_table(known: &Catalogue) -> String {
    let number = |value: Option<f64>| value.map_or("?".to_owned(), |value| value.to_string());
    let head = ["name", "maker", "memory GiB", "bf16 TFLOP/s", "fp8 TFLOP/s", "status", "also called"];
    let mut rows = vec![head.map(str::to_owned)];
    rows.extend(known.devices().iter().map(|device| {
        [
            device.name.clone(),
            device.vendor.clone(),
            number(device.memory_gib),
            number(device.bf16_tflops),
            if device.fp8_scale == Fp8Scale::None { "none".to_owned() } else { number(device.fp8_tflops) },
            device.status.clone(),
            device.aliases.join(", "),
        ]
    }));
    columns(&rows, &|column| (2..5).contains(&column))
}

/// The same as one object; unknown is null.
fn catalogue_object(known: &Catalogue) -> Value {
    let device = |device: &Device| {
        json!({
            "name": device.name,
            "aliases": device.aliases,
            "maker": device.vendor,
            "status": device.status,
            "memory_gib": device.memory_gib,
            "bf16_tflops": device.bf16_tflops,
            "fp8_tflops": device.fp8_tflops.filter(|_| device.fp8_scale != Fp8Scale::None),
            "source": device.source,
        })
    };
    json!({ "devices": known.devices().iter().map(device).collect::<Vec<_>>() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine::{DeviceInfo, Precision};

    #[test]
    fn the_catalogue_has_a_line_for_each_device_it_knows() {
        let known = Catalogue::built_in();
        let table = catalogue_table(&known);
        assert_eq!(table.lines().count(), known.devices().len() + 1);
        let line = table.lines().find(|line| line.starts_with("Ascend 910D ")).unwrap();
        assert!(line.contains('?'), "unknown stays unknown: {line}");
        assert_eq!(catalogue_object(&known)["devices"].as_array().unwrap().len(), known.devices().len());
    }

    #[test]
    fn devices_are_lines_of_aligned_columns() {
        let device = |engine: &str, name: &str, memory_bytes, rates| {
            let (maker, driver) = (String::new(), "1.2".to_owned());
            let (engine, name, precision) = (engine.to_owned(), name.to_owned(), Precision::F32);
            let info = DeviceInfo { engine, name, maker, driver, memory_bytes, threads: 1, precision };
            DeviceReport { info, rates }
        };
        let rates = DeviceRates {
            matrix_f32_tflops: Some(12.345),
            matrix_bf16_tflops: None,
            copy_gigabytes_per_second: Some(1_500.0),
        };
        let devices = [
            device("flex", "A processor", Some(16_000_000_000), DeviceRates::default()),
            device("cuda:0", "GPU", None, rates),
        ];
        let expected = "\
engine  name         maker   memory  driver  f32 TFLOP/s  bf16 TFLOP/s  copy GB/s
flex    A processor  -      16.0 GB  1.2               -             -          -
cuda:0  GPU          -            -  1.2           12.35             -     1500.0
";
        assert_eq!(table(&devices), expected);
    }
}
