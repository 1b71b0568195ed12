//! `cargo xtask bench chaos`: what a kill a minute costs.
//!
//! Labs without faults and labs in which a process is killed in each period (SIGKILL; the coordinator as often as each site, from a seed)
//! alternate on the same machine and do the same rounds. Goodput is the quotient of their committed tokens a second: tokens committed over
//! tokens that the same machine commits without faults in the same time. A lab fails, and so does the bench, where an invariant is violated:
//! diverged states, samples committed twice, unreadable checkpoints.

use crate::runs::{Failure, Programs, json_of, median};
use serde::Serialize;
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};

/// What is wanted at a kill a minute, and at one in five minutes.
const GOODPUT_WANTED: [(f64, f64); 2] = [(60.0, 0.88), (300.0, 0.95)];

/// Settings of the bench.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    #[command(flatten)]
    programs: Programs,
    /// Seconds in which one process is killed; may be repeated
    #[arg(long = "chaos", value_name = "SECONDS", default_values_t = [60.0])]
    periods: Vec<f64>,
    /// Pairs of labs for each of them
    #[arg(long, value_name = "N", default_value_t = 1)]
    pairs: usize,
    /// Training time of a lab without faults; the others do the same rounds
    #[arg(long, value_name = "M", default_value_t = 15.0)]
    minutes: f64,
    /// Sites of a lab
    #[arg(long, value_name = "N", default_value_t = 2)]
    sites: u32,
    /// Engine of a site, as `lab --site` takes it; may be repeated, and is instead of `--sites`
    #[arg(long = "site", value_name = "ENGINE", conflicts_with = "sites")]
    engines: Vec<String>,
    /// Pause before a process that was killed is started again
    #[arg(long, value_name = "TIME", default_value = "3s")]
    restart_after: String,
    /// Link between the sites, and to the coordinator, as `lab` takes it; loopback unless given
    #[arg(long, value_name = "LINK")]
    link: Option<String>,
    /// A key of run.toml to set; may be repeated
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    overrides: Vec<String>,
    /// Seed of the first lab with faults; each further one has the next
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Where the labs are; what is there is removed
    #[arg(long, value_name = "FOLDER", default_value = "target/bench-chaos")]
    folder: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// One pair of labs.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct Pair {
    chaos_seconds: f64,
    seed: u64,
    rounds: u64,
    kills: usize,
    /// Committed tokens a second with faults over those without.
    goodput: f64,
    clean_tokens_per_second: f64,
    faulty_tokens_per_second: f64,
    /// Of the lab with faults, as it prints them.
    recovery: Value,
}

/// Runs the bench.
pub(crate) fn run(options: &Options) -> Result<(), Failure> {
    if options.folder.exists() {
        fs::remove_dir_all(&options.folder)?;
    }
    fs::create_dir_all(&options.folder)?;
    let (binary, texts) = (options.programs.binary()?, options.programs.texts(&options.folder)?);
    let lab = |name: &str, arguments: &[String]| options.lab(&binary, &texts, name, arguments);
    let mut pairs = Vec::new();
    let mut rounds = None;
    for period in &options.periods {
        for number in 0..options.pairs {
            let seed = options.seed + pairs.len() as u64;
            let chaos = ["--chaos".to_owned(), period.to_string(), "--chaos-seed".to_owned(), seed.to_string()];
            let name = |kind: &str| format!("{kind}-{period}-{number}");
            let clean = lab(&name("clean"), &work(rounds, options.minutes))?;
            let done = clean["rounds"].as_u64().ok_or("the lab says nothing of rounds")?;
            rounds = Some(done);
            let faulty = lab(&name("chaos"), &[&work(rounds, options.minutes)[..], &chaos].concat())?;
            let pair = Pair::of(&clean, &faulty, *period, seed).ok_or("the lab lacks a figure")?;
            eprintln!("{}", pair.line());
            pairs.push(pair);
        }
    }
    print(options, &pairs);
    Ok(())
}

/// As many rounds as before, or as many as fit the time.
fn work(rounds: Option<u64>, minutes: f64) -> [String; 2] {
    match rounds {
        Some(rounds) => ["--rounds".to_owned(), rounds.to_string()],
        None => ["--minutes".to_owned(), minutes.to_string()],
    }
}

impl Options {
    fn lab(&self, binary: &Path, texts: &Path, name: &str, arguments: &[String]) -> Result<Value, Failure> {
        let mut command = self.programs.command(binary);
        command.args(["--json", "lab"]);
        match self.engines.is_empty() {
            true => command.args(["--sites", &self.sites.to_string()]),
            false => command.args(self.engines.iter().flat_map(|engine| ["--site", engine])),
        };
        command.args(["--measure-seconds", "1", "--data"]);
        command.arg(texts).arg("--folder").arg(self.folder.join(name)).args(arguments);
        command.args(["--restart-after", &self.restart_after]);
        command.args(self.link.iter().flat_map(|link| ["--link", link]));
        command.args(self.overrides.iter().flat_map(|setting| ["--set", setting]));
        json_of(&mut command)
    }
}

impl Pair {
    fn of(clean: &Value, faulty: &Value, chaos_seconds: f64, seed: u64) -> Option<Self> {
        let speed = |report: &Value| report["tokens_per_second"].as_f64();
        let (clean_tokens_per_second, faulty_tokens_per_second) = (speed(clean)?, speed(faulty)?);
        let section = &faulty["faults"];
        let names = [
            "site_rejoin_seconds",
            "site_joint_commit_seconds",
            "coordinator_commit_seconds",
            "stall_seconds",
            "transfer_seconds",
            "site_rejoin_transfers",
            "coordinator_commit_transfers",
            "left_out",
            "ended_badly",
        ];
        let recovery = names.iter().map(|name| ((*name).to_owned(), section[name].clone())).collect();
        Some(Self {
            chaos_seconds,
            seed,
            rounds: faulty["rounds"].as_u64()?,
            kills: section["each"].as_array()?.len(),
            goodput: faulty_tokens_per_second / clean_tokens_per_second,
            clean_tokens_per_second,
            faulty_tokens_per_second,
            recovery: Value::Object(recovery),
        })
    }

    fn line(&self) -> String {
        let seconds = |name: &str| self.recovery[name].as_f64().map_or_else(|| "-".to_owned(), |s| format!("{s:.1} s"));
        let times = |name: &str| {
            self.recovery[name].as_f64().map_or_else(String::new, |times| format!(" ({times:.0} bare transfers)"))
        };
        format!(
            "a kill in {} s, seed {}: {} kills in {} rounds; goodput {:.1} % ({:.0} of {:.0} tokens/s); a site back after {}{}, \
             joint commit {} after a kill, coordinator back after {}{}, longest stall of others {}",
            self.chaos_seconds,
            self.seed,
            self.kills,
            self.rounds,
            100.0 * self.goodput,
            self.faulty_tokens_per_second,
            self.clean_tokens_per_second,
            seconds("site_rejoin_seconds"),
            times("site_rejoin_transfers"),
            seconds("site_joint_commit_seconds"),
            seconds("coordinator_commit_seconds"),
            times("coordinator_commit_transfers"),
            seconds("stall_seconds")
        )
    }
}

fn print(options: &Options, pairs: &[Pair]) {
    let summaries: Vec<Value> = options.periods.iter().map(|period| summary(*period, pairs)).collect();
    if options.json {
        println!("{}", json!({ "pairs": pairs, "summaries": summaries }));
        return;
    }
    pairs.iter().for_each(|pair| println!("{}", pair.line()));
    for summary in summaries {
        let number = |name: &str| 100.0 * summary[name].as_f64().unwrap_or(f64::NAN);
        println!(
            "a kill in {} s: goodput {:.1} % (median of {}; {:.1} to {:.1} %; wanted {})",
            summary["chaos_seconds"],
            number("goodput_median"),
            summary["pairs"],
            number("goodput_least"),
            number("goodput_most"),
            summary["wanted"]
                .as_f64()
                .map_or_else(|| "nothing".to_owned(), |wanted| format!("{:.0} %", 100.0 * wanted))
        );
    }
}

fn summary(period: f64, pairs: &[Pair]) -> Value {
    let goodputs: Vec<f64> =
        pairs.iter().filter(|pair| pair.chaos_seconds == period).map(|pair| pair.goodput).collect();
    let wanted = GOODPUT_WANTED.iter().find(|(at, _)| *at == period).map(|(_, wanted)| *wanted);
    json!({
        "chaos_seconds": period,
        "pairs": goodputs.len(),
        "goodput_median": median(&goodputs),
        "goodput_least": goodputs.iter().copied().fold(f64::INFINITY, f64::min),
        "goodput_most": goodputs.iter().copied().fold(f64::NEG_INFINITY, f64::max),
        "wanted": wanted,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn goodput_is_a_quotient_of_speeds_and_its_median_is_printed() {
        let report = |speed: f64| json!({ "tokens_per_second": speed, "rounds": 7, "faults": { "each": [{}, {}] } });
        let pair = |speed| Pair::of(&report(100.0), &report(speed), 60.0, 1).unwrap();
        assert_eq!((pair(90.0).goodput, pair(90.0).kills, pair(90.0).rounds), (0.9, 2, 7));
        assert!(pair(90.0).line().contains("goodput 90.0 % (90 of 100 tokens/s); a site back after -, joint"));
        let found = summary(60.0, &[pair(90.0), pair(80.0), pair(95.0), Pair { chaos_seconds: 300.0, ..pair(1.0) }]);
        assert_eq!(
            (&found["goodput_median"], &found["goodput_least"], &found["wanted"]),
            (&json!(0.9), &json!(0.8), &json!(0.88))
        );
        assert_eq!(Pair::of(&json!({}), &report(1.0), 60.0, 1), None);
    }

    #[test]
    fn labs_do_the_rounds_of_the_first() {
        assert_eq!(work(None, 1.5), ["--minutes", "1.5"]);
        assert_eq!(work(Some(40), 1.5), ["--rounds", "40"]);
    }
}
