//! `cargo xtask published`: what others have published of their runs, what `beringia plan` says of the same sites, and the difference.
//!
//! Each case is the command that docs/published.md shows; the figure is read from its JSON. A published figure is a constant here, with its source in the
//! cluster file.

use crate::runs::Failure;
use serde_json::Value;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Beginning of a command that predicts a table given on its line.
pub(crate) const PREDICTED: &str = "printf 'device,";

/// Where a figure comes from.
enum Figure {
    /// Share of a round in inner steps.
    Utilisation(&'static str),
    /// Model FLOP utilisation of the only row of a table of layouts.
    Mfu(&'static str),
    /// Tokens a second of the first over the sum of the others.
    Share(&'static str, &'static [&'static str]),
}

/// A published run.
struct Case {
    name: &'static str,
    figure: Figure,
    /// The published range.
    published: (f64, f64),
}

/// Options of the three INTELLECT-1 runs beside their cluster.
macro_rules! intellect {
    ($place:literal) => {
        concat!(
            "--cluster docs/clusters/intellect-",
            $place,
            ".toml --model intellect-1-10b --tokens 1T --batch 1792 --sequence 8192 --strategy diloco --inner-steps 100 \
             --bits 8 --exchange ring --coding-gb-s 1000 --all-sites"
        )
    };
}

/// Options of the two runs of sparse deltas beside cluster and model.
macro_rules! sparse {
    ($cluster:literal, $model:literal, $batch:literal) => {
        concat!(
            "--cluster docs/clusters/",
            $cluster,
            ".toml --model ",
            $model,
            " --tokens 1.1T --batch ",
            $batch,
            " --sequence 2048 --strategy diloco --inner-steps 30 --bits 14 --density 0.015625 --exchange storage \
             --coding-gb-s 1000 --all-sites"
        )
    };
}

const CASES: &[Case] = &[
    Case {
        name: "HETHUB, 140B on 128 + 640 of two makers, of the sum of both alone",
        figure: Figure::Share(
            "--cluster docs/clusters/hethub.toml --model 140B --tokens 1T --batch 1536",
            &[
                "--cluster docs/clusters/hethub-amd.toml --model 140B --tokens 1T --batch 1536",
                "--cluster docs/clusters/hethub-other.toml --model 140B --tokens 1T --batch 1536",
            ],
        ),
        published: (97.49, 97.49),
    },
    Case {
        name: "China Telecom, 177B over 500 km",
        figure: Figure::Utilisation(
            "--cluster docs/clusters/china-telecom.toml --model gpt3-175b --tokens 1T --batch 2048 --strategy synchronous --all-sites",
        ),
        published: (97.0, 99.0),
    },
    Case {
        name: "NVIDIA NeMo, 340B over 1,000 km",
        figure: Figure::Utilisation(
            "--cluster docs/clusters/nvidia.toml --model 340B --tokens 1T --batch 2304 --strategy synchronous --all-sites",
        ),
        published: (96.0, 96.0),
    },
    Case {
        name: "INTELLECT-1, 10B, MFU of one site, FSDP",
        figure: Figure::Mfu(
            "device,devices,layers,hidden,ffn,heads,kv_heads,vocab,seq,global_batch,dp,zero\nH100,8,42,4096,14336,32,8,128256,8192,128,8,3\n",
        ),
        published: (43.3, 43.3),
    },
    Case { name: "INTELLECT-1, USA", figure: Figure::Utilisation(intellect!("usa")), published: (95.7, 95.7) },
    Case {
        name: "INTELLECT-1, USA and Europe",
        figure: Figure::Utilisation(intellect!("europe")),
        published: (85.6, 85.6),
    },
    Case { name: "INTELLECT-1, global", figure: Figure::Utilisation(intellect!("global")), published: (83.0, 83.0) },
    Case {
        name: "Covenant-72B, 20 peers",
        figure: Figure::Utilisation(sparse!("covenant", "72B", "3840")),
        published: (94.5, 94.5),
    },
    Case {
        name: "SparseLoCo, 8B, 15 peers",
        figure: Figure::Utilisation(sparse!("sparseloco", "llama-3-8b", "2880")),
        published: (95.7, 95.7),
    },
    Case {
        name: "Streaming DiLoCo, 1B over 1 Gbit/s",
        figure: Figure::Utilisation(
            "--cluster docs/clusters/streaming-diloco.toml --model 1B --tokens 25B --batch 512 --sequence 2048 --strategy streaming \
             --inner-steps 100 --fragments 8 --overlap-steps 1 --bits 4 --coding-gb-s 1000 --all-sites",
        ),
        published: (76.1, 76.1),
    },
];

/// Settings of the command.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// The program; the one beside this unless given
    #[arg(long, value_name = "PATH")]
    beringia: Option<PathBuf>,
    /// Print the commands instead
    #[arg(long)]
    commands: bool,
}

/// Runs the command.
pub(crate) fn run(options: &Options) -> Result<(), Failure> {
    if options.commands {
        CASES.iter().flat_map(|case| case.figure.commands()).for_each(|command| println!("{command}"));
        return Ok(());
    }
    print!("{}", table(&crate::docs::program(options.beringia.as_deref())?)?);
    Ok(())
}

/// All cases beside what a plan says of them.
pub(crate) fn table(program: &Path) -> Result<String, Failure> {
    let width = CASES.iter().map(|case| case.name.chars().count()).max().unwrap_or(0);
    let mut text = format!("{:<width$}  {:>10}  {:>7}  {:>6}\n", "case", "published", "plan", "error");
    for case in CASES {
        let planned = 100.0 * case.figure.of(program)?;
        let (least, most) = case.published;
        let published = if least < most { format!("{least} to {most} %") } else { format!("{least} %") };
        let error = 100.0 * (planned / planned.clamp(least, most) - 1.0);
        text.push_str(&format!("{:<width$}  {published:>10}  {planned:>5.1} %  {error:>+4.1} %\n", case.name));
    }
    Ok(text)
}

impl Figure {
    /// The commands as a user types them.
    fn commands(&self) -> Vec<String> {
        match self {
            Self::Utilisation(arguments) => vec![format!("beringia plan {arguments}")],
            Self::Mfu(table) => {
                vec![format!("printf '{}' | beringia predict --table /dev/stdin", table.replace('\n', "\\n"))]
            }
            Self::Share(all, parts) => {
                [all].into_iter().chain(*parts).map(|arguments| format!("beringia plan {arguments}")).collect()
            }
        }
    }

    fn of(&self, program: &Path) -> Result<f64, Failure> {
        match self {
            Self::Utilisation(arguments) => figure(&best(program, arguments)?["utilisation"]),
            Self::Mfu(table) => figure(&predicted(program, table)?["rows"][0]["mfu"]),
            Self::Share(all, parts) => {
                let speed = |arguments| figure(&best(program, arguments)?["tokens_per_second"]);
                let alone = parts.iter().map(|part| speed(part)).sum::<Result<f64, Failure>>();
                Ok(speed(all)? / alone?)
            }
        }
    }
}

fn figure(value: &Value) -> Result<f64, Failure> {
    value.as_f64().ok_or_else(|| format!("{value} is no figure").into())
}

/// What is predicted of a table of layouts.
fn predicted(program: &Path, table: &str) -> Result<Value, Failure> {
    let mut child = Command::new(program)
        .args(["predict", "--table", "/dev/stdin", "--json"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    // Dropped at the end of the statement: the table ends there.
    child.stdin.take().ok_or("no pipe")?.write_all(table.as_bytes())?;
    Ok(serde_json::from_slice(&child.wait_with_output()?.stdout)?)
}

/// The best plan of a command.
fn best(program: &Path, command: &str) -> Result<Value, Failure> {
    let output = Command::new(program).arg("plan").args(command.split_whitespace()).arg("--json").output()?;
    if !output.status.success() {
        return Err(format!("beringia plan {command}: {}", String::from_utf8_lossy(&output.stderr)).into());
    }
    let mut report: Value = serde_json::from_slice(&output.stdout)?;
    Ok(report["plans"][0].take())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_published_case_is_shown_with_its_command() {
        let document = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/published.md")).unwrap();
        for command in CASES.iter().flat_map(|case| case.figure.commands()) {
            let words = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
            assert!(document.contains(&format!("$ {}", words(&command))), "{command}");
        }
    }
}
