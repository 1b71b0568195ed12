//! Beringia's side: a coordinator beside the first site, both sites pinned, each in its namespace.

use crate::runs::{Failure, Process, Programs, json_of};
use crate::wan::figures::SiteSeries;
use crate::wan::link::{ADDRESSES, Link};
use crate::wan::processes::{log_end, on_core, side_by_side, unix_seconds, wait_until};
use crate::wan::results::Budget;
use crate::wan::series::{beringia_steps, sent};
use crate::wan::work::{BATCH_SAMPLES, SITES, Size, Work};
use serde_json::Value;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Steps of a run that ends by time: more than any makes, and the schedule is flat.
const STEPS_MAX: u64 = 1_000_000;
/// Time to save and leave after a site was asked to, and for a coordinator after its sites, seconds.
const LEAVE_SECONDS_MAX: f64 = 120.0;

/// The program and the work.
pub(crate) struct Beringia<'a> {
    pub(crate) programs: &'a Programs,
    pub(crate) binary: &'a Path,
    pub(crate) work: &'a Work,
}

impl Beringia<'_> {
    /// Makes the run `folder`.
    ///
    /// # Errors
    /// A setting that is refused, or a model or text other than the peers'.
    pub(crate) fn init(
        &self,
        size: Size,
        seed: u64,
        budget: Budget,
        settings: &[String],
        folder: &Path,
    ) -> Result<(), Failure> {
        let steps = if let Budget::Steps(steps) = budget { steps } else { STEPS_MAX };
        let mut command = self.programs.command(self.binary);
        command.args(["--json", "init"]).arg(folder).arg("--data").arg(&self.work.documents);
        command.arg("--tokenizer").arg(&self.work.tokenizer);
        for setting in size.settings(seed, steps).iter().chain(settings) {
            command.args(["--set", setting]);
        }
        Ok(self.work.check(size, &json_of(&mut command)?)?)
    }

    /// Writes a run's weights for the peers.
    ///
    /// # Errors
    /// What `beringia export` says.
    pub(crate) fn export(&self, run: &Path, folder: &Path) -> Result<(), Failure> {
        let mut command = self.programs.command(self.binary);
        json_of(command.args(["--json", "export"]).arg(run).args(["--to", "hf", "--out"]).arg(folder)).map(drop)
    }

    /// Tokens a second of both cores, each with an engine of its own at the same time.
    ///
    /// # Errors
    /// What `beringia measure` says.
    pub(crate) fn alone(&self, run: &Path, engine: &str, seconds: f64) -> Result<f64, Failure> {
        let measure = |core| {
            let mut command = on_core(core, self.binary);
            command.envs(self.programs.command(self.binary).get_envs().filter_map(|(key, value)| Some((key, value?))));
            command.args(["--json", "measure"]).arg(run).args(["--engine", engine, "--threads", "1"]);
            command.args(["--samples", &(BATCH_SAMPLES / SITES as u64).to_string(), "--seconds", &seconds.to_string()]);
            command
        };
        let speed = |text: String| {
            let report: Value = serde_json::from_str(&text)?;
            Ok(report["tokens_per_second"].as_f64().ok_or("measure names no tokens_per_second")?)
        };
        side_by_side((0..SITES).map(measure))?.into_iter().map(speed).sum()
    }

    /// Nats per token of the model of a run or site on the validation text.
    ///
    /// # Errors
    /// What `beringia eval` says.
    pub(crate) fn validate(&self, run: &Path) -> Result<f64, Failure> {
        let mut command = self.programs.command(self.binary);
        let report = json_of(command.args(["--json", "eval"]).arg(run).arg("--text").arg(&self.work.validation))?;
        Ok(report["nats_per_token"].as_f64().ok_or("eval names no nats_per_token")?)
    }

    /// Trains the run over the link and gives what its sites left behind, and the folder of the first. After `seconds_end`
    /// the sites are asked to save and leave.
    ///
    /// # Errors
    /// A process that failed, sites that end with different models, or time that is up.
    pub(crate) fn train(
        &self,
        link: &Link,
        run: &Path,
        engine: &str,
        (seconds_end, seconds_max): (f64, f64),
    ) -> Result<(Vec<SiteSeries>, PathBuf), Failure> {
        let (coordinator, invite) = self.serve(link, run)?;
        let site_folder = |site: usize| run.with_file_name(format!("site-{site}"));
        let counter = |site: usize| run.with_file_name(format!("sent-{site}"));
        let readings = (0..SITES).map(|site| link.count_sent(site, &counter(site))).collect::<Result<Vec<_>, _>>()?;
        let started = unix_seconds();
        let join = |site| self.join(link, &invite, site, engine, &site_folder(site));
        let mut sites = (0..SITES).map(join).collect::<Result<Vec<_>, _>>()?;
        wait_until(&mut sites, seconds_max, &mut || unix_seconds() - started > seconds_end)?;
        let is_early = !sites.is_empty();
        sites.iter().try_for_each(Process::ask_to_leave)?;
        wait_until(&mut sites, LEAVE_SECONDS_MAX, &mut || false)?;
        if is_early {
            coordinator.ask_to_leave()?;
        }
        wait_until(&mut vec![coordinator], LEAVE_SECONDS_MAX, &mut || false)?;
        drop(readings);
        let series = |site: usize| {
            let events = fs::read_to_string(site_folder(site).join("events.jsonl"))?;
            let counted = fs::read_to_string(counter(site))?;
            Ok(SiteSeries { steps: beringia_steps(&events, started), sent: sent(&counted, started) })
        };
        // Sites that were asked to leave have left after different rounds.
        if !is_early {
            self.check_agreement(run)?;
        }
        Ok(((0..SITES).map(series).collect::<Result<_, Failure>>()?, site_folder(0)))
    }

    /// Both sites must end with the same global state.
    fn check_agreement(&self, run: &Path) -> Result<(), Failure> {
        let hash = |site: usize| -> Result<Value, Failure> {
            let text = fs::read_to_string(joined(run, site))?;
            Ok(serde_json::from_str::<Value>(&text).map_err(|error| format!("join: {error}: {text}"))?["state_hash"]
                .clone())
        };
        let (first, second) = (hash(0)?, hash(1)?);
        if first == second { Ok(()) } else { Err(format!("the sites end with {first} and {second}").into()) }
    }

    /// Starts the coordinator on the first site's core and gives its invite.
    fn serve(&self, link: &Link, run: &Path) -> Result<(Process, String), Failure> {
        let mut command = link.command(0, self.binary);
        command.arg("serve").arg(run).args(["--listen", &format!("{}:0", ADDRESSES[0])]).stdout(Stdio::piped());
        let log = run.with_file_name("serve.log");
        let mut coordinator = Process::start(&mut command, log.clone())?;
        let mut lines = BufReader::new(coordinator.take_stdout().ok_or("the coordinator has no output")?).lines();
        let invite = loop {
            let line = lines.next().ok_or_else(|| format!("no invite: {}", log_end(&log)))??;
            if let Some((_, invite)) = line.split_once("beringia join ") {
                break invite.trim().to_owned();
            }
        };
        // Read to the end, so that the coordinator never waits for a full pipe.
        std::thread::spawn(move || lines.for_each(drop));
        Ok((coordinator, invite))
    }

    fn join(&self, link: &Link, invite: &str, site: usize, engine: &str, folder: &Path) -> Result<Process, Failure> {
        let mut command: Command = link.command(site, self.binary);
        command.envs(self.programs.command(self.binary).get_envs().filter_map(|(key, value)| Some((key, value?))));
        command.args(["--json", "join", invite, "--name", &format!("site-{site}"), "--folder"]).arg(folder);
        command.args(["--listen", &format!("{}:0", ADDRESSES[site]), "--measure-seconds", "0"]);
        command.args(["--engine", engine, "--threads", "1"]);
        command.stdout(File::create(joined(folder, site))?);
        Process::start(&mut command, folder.with_file_name(format!("join-{site}.log")))
    }
}

/// What `join --json` of a site prints, beside the run's folder.
fn joined(beside: &Path, site: usize) -> PathBuf {
    beside.with_file_name(format!("join-{site}.json"))
}
