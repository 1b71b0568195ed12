//! `cargo xtask bench check`: what `beringia plan --check` says of labs that differ in sites, links, codecs and H.
//!
//! Each is a lab of real processes over links that the lab makes; its folder is then checked. Predicted is from the speed that each site measured before the
//! first round, run.toml and the links; nothing that happened later goes in. It fails where the median is off by more than is wanted of a
//! single one: single labs depend on what else the machine does, all of them together on the model.

use crate::runs::{Failure, Programs, json_of, median};
use serde::Serialize;
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};

/// Differences that are wanted of each lab, percent.
const TOKENS_WANTED_PERCENT: f64 = 5.0;
const BYTES_WANTED_PERCENT: f64 = 1.0;

/// Links that are unlike in both directions.
const UNLIKE: &str = "\
default = \"20Mbit/s,30ms\"

[links]
\"site-a -> site-b\" = \"40Mbit/s,10ms\"
\"site-b <-> site-c\" = \"8Mbit/s,80ms\"
";

/// Stands for the file of [`UNLIKE`] links among a lab's arguments.
const UNLIKE_FILE: &str = "UNLIKE";

/// The labs, as their arguments.
const LABS: [&str; 10] = [
    "--sites 2 --link 20Mbit/s,20ms",
    "--sites 2 --link 10Mbit/s,60ms --set sync.codec=lowrank --set sync.inner_steps=5",
    "--sites 2 --link 5Mbit/s,50ms --set sync.strategy=streaming --set sync.fragments=4 --set sync.overlap_steps=2 --set sync.codec=mxfp4",
    "--sites 2 --link 100Mbit/s,10ms --set sync.codec=bf16 --set sync.inner_steps=50",
    "--sites 2 --set sync.codec=int8 --set sync.inner_steps=10",
    "--sites 2 --link 2Mbit/s,100ms --set sync.codec=sparse --set sync.inner_steps=30",
    "--sites 3 --link 50Mbit/s,40ms --set sync.codec=int8",
    "--sites 3 --link 20Mbit/s,20ms --set sync.exchange=sharded --set sync.codec=int8",
    "--sites 3 --link UNLIKE --set sync.strategy=streaming --set sync.fragments=2 --set sync.overlap_steps=4 --set sync.codec=e3m0",
    "--sites 3 --link 20Mbit/s,30ms --set sync.codec=bf16 --set sync.inner_steps=10",
];

/// Settings of the bench.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    #[command(flatten)]
    programs: Programs,
    /// Training time of each lab
    #[arg(long, value_name = "M", default_value_t = 1.0)]
    minutes: f64,
    /// Time for measuring each site alone
    #[arg(long, value_name = "SECONDS", default_value_t = 8.0)]
    measure_seconds: f64,
    /// Only the labs with these numbers, from 1
    #[arg(long, value_name = "N")]
    only: Vec<usize>,
    /// Where the labs are; what is there is removed
    #[arg(long, value_name = "FOLDER", default_value = "target/bench-check")]
    folder: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// One lab.
#[derive(Debug, Serialize)]
struct Checked {
    lab: String,
    rounds: u64,
    utilisation_predicted: f64,
    tokens_per_second: Sides,
    bytes: Sides,
}

#[derive(Debug, Serialize)]
struct Sides {
    predicted: f64,
    measured: f64,
    difference_percent: f64,
}

/// Runs the bench.
pub(crate) fn run(options: &Options) -> Result<(), Failure> {
    if options.folder.exists() {
        fs::remove_dir_all(&options.folder)?;
    }
    fs::create_dir_all(&options.folder)?;
    let (binary, texts) = (options.programs.binary()?, options.programs.texts(&options.folder)?);
    let unlike = options.folder.join("unlike.toml");
    fs::write(&unlike, UNLIKE)?;
    let wanted = |number: usize| options.only.is_empty() || options.only.contains(&number);
    let mut all = Vec::new();
    for (number, lab) in (1..).zip(LABS).filter(|(number, _)| wanted(*number)) {
        let arguments = lab.replace(UNLIKE_FILE, &unlike.display().to_string());
        let checked = options.lab((number, lab), &arguments, (&binary, &texts))?;
        eprintln!("{}", checked.row());
        all.push(checked);
    }
    print(options, &all)
}

impl Options {
    fn lab(
        &self,
        (number, lab): (usize, &str),
        arguments: &str,
        (binary, texts): (&Path, &Path),
    ) -> Result<Checked, Failure> {
        let folder = self.folder.join(number.to_string());
        let mut command = self.programs.command(binary);
        command.args(["--json", "lab", "--minutes", &self.minutes.to_string()]);
        command.args(["--measure-seconds", &self.measure_seconds.to_string()]);
        command.arg("--data").arg(texts).arg("--folder").arg(&folder).args(arguments.split(' '));
        json_of(&mut command)?;
        let mut check = self.programs.command(binary);
        let said = json_of(check.args(["--json", "plan", "--check"]).arg(&folder))?;
        Checked::of(lab, &said).ok_or_else(|| "the check lacks a figure".into())
    }
}

impl Checked {
    fn of(lab: &str, said: &Value) -> Option<Self> {
        let sides = |name: &str| {
            let of = |side: &str| said[name][side].as_f64();
            Some(Sides {
                predicted: of("predicted")?,
                measured: of("measured")?,
                difference_percent: of("difference_percent")?,
            })
        };
        Some(Self {
            lab: lab.to_owned(),
            rounds: said["rounds"].as_u64()?,
            utilisation_predicted: said["utilisation_predicted"].as_f64()?,
            tokens_per_second: sides("tokens_per_second")?,
            bytes: sides("bytes")?,
        })
    }

    fn row(&self) -> String {
        let Self { lab, rounds, utilisation_predicted, tokens_per_second, bytes } = self;
        format!(
            "| `{lab}` | {rounds} | {:.0} % | {:.0} | {:.0} | {:+.1} % | {:+.2} % |",
            100.0 * utilisation_predicted,
            tokens_per_second.predicted,
            tokens_per_second.measured,
            tokens_per_second.difference_percent,
            bytes.difference_percent,
        )
    }
}

fn print(options: &Options, all: &[Checked]) -> Result<(), Failure> {
    let off = |of: &dyn Fn(&Checked) -> &Sides| -> Vec<f64> {
        all.iter().map(|checked| of(checked).difference_percent.abs()).collect()
    };
    let (tokens, bytes) = (off(&|checked| &checked.tokens_per_second), off(&|checked| &checked.bytes));
    let within = |differences: &[f64], bound: f64| differences.iter().filter(|off| **off <= bound).count();
    let (tokens_within, bytes_within) = (within(&tokens, TOKENS_WANTED_PERCENT), within(&bytes, BYTES_WANTED_PERCENT));
    let (tokens, bytes) = (median(&tokens), median(&bytes));
    if options.json {
        println!("{}", json!({ "labs": all, "median_tokens_percent": tokens, "median_bytes_percent": bytes }));
    } else {
        println!("| lab | rounds | in inner steps, predicted | tokens/s predicted | measured | difference | bytes |");
        println!("|---|---:|---:|---:|---:|---:|---:|");
        all.iter().for_each(|checked| println!("{}", checked.row()));
        println!(
            "\ntokens/s: {tokens_within} of {} within {TOKENS_WANTED_PERCENT} %, median {tokens:.1} %; bytes: {bytes_within} within {BYTES_WANTED_PERCENT} %, median {bytes:.2} %",
            all.len()
        );
    }
    if tokens > TOKENS_WANTED_PERCENT || bytes > BYTES_WANTED_PERCENT {
        return Err("the median of the labs is further off than a single one may be".into());
    }
    Ok(())
}
