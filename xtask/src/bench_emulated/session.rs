//! One run of two emulated sites in two network namespaces, whose link is changed while they train.
//!
//! The sites begin over a link without a limit, for the initial state need not be waited for. Then each rate is set by `tc tbf` on
//! both ends, what was on its way is left to settle, and whole rounds are timed by the steps in both event logs.

use super::log::{SiteLog, agreement, speed};
use super::work::{Row, SITES, text, vocabulary};
use crate::namespaces::{Namespaces, Tbf};
use crate::runs::{Failure, Process, Programs, json_of, mean};
use crate::wan::processes::{log_end, unix_seconds};
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

/// Name of the interface in both namespaces, and the addresses there.
const INTERFACE: &str = "e0";
const ADDRESSES: [&str; SITES] = ["10.92.0.1", "10.92.0.2"];

/// How often the logs are looked at.
const POLL: Duration = Duration::from_millis(50);
/// Longest time until the first step, seconds: both sites fetch 3 MB without a limit.
const START_SECONDS_MAX: f64 = 90.0;
/// A window that takes longer than at this utilisation is cut short: less than half is all that is asked.
const UTILISATION_LEAST: f64 = 0.40;
/// Longest settling, as a multiple of its time without waiting, and longest at all beyond that, seconds.
const SETTLING_FACTOR: f64 = 12.0;
const SETTLING_SECONDS: f64 = 30.0;

/// Smallest burst: two Ethernet frames.
const BURST_BYTES_MIN: u64 = 2 * 1514;
/// A burst of more than that, seconds at the rate: what one timer tick of an old kernel may be late.
const BURST_SECONDS: f64 = 0.004;
/// Queue, seconds at the rate, and the least: eight connections begin with 14 kB each at once. A fragment of the model is a thousand
/// times that, one of the emulation is not, and waiting for what a short queue has dropped would be an artefact of the scale.
const QUEUE_SECONDS: f64 = 0.1;
const QUEUE_BYTES_MIN: u64 = 256 * 1024;

/// What all rows share.
#[derive(Debug)]
pub(super) struct Place<'a> {
    pub(super) programs: &'a Programs,
    pub(super) binary: PathBuf,
    /// Emptied for each row.
    pub(super) folder: PathBuf,
}

/// A run under way; dropping it ends all its processes.
pub(super) struct Session {
    row: Row,
    /// n.
    pub(super) parameters: u64,
    logs: [SiteLog; SITES],
    // In the order in which they are to be dropped.
    processes: Vec<Process>,
    namespaces: Namespaces,
}

impl Session {
    /// Makes a run for the row, and starts both sites.
    ///
    /// # Errors
    /// Not root, or what the program says.
    pub(super) fn start(place: &Place<'_>, row: Row) -> Result<Self, Failure> {
        if place.folder.exists() {
            fs::remove_dir_all(&place.folder)?;
        }
        let texts = place.folder.join("texts");
        fs::create_dir_all(&texts)?;
        fs::write(texts.join("text.txt"), text())?;
        let run = place.folder.join("run");
        let parameters = place.init(row, &texts, &run)?;
        let namespaces = Namespaces::make("emu", &["a", "b"])?;
        namespaces.join(0, 1, INTERFACE)?;
        for (site, address) in ADDRESSES.iter().enumerate() {
            namespaces.address(site, INTERFACE, &format!("{address}/24"))?;
        }
        let logs = [0, 1].map(|site| SiteLog::new(place.site(site).join("events.jsonl")));
        let mut session = Self { row, parameters, logs, processes: Vec::new(), namespaces };
        let invite = session.serve(place, &run)?;
        for site in 0..SITES {
            let process = session.join(place, &invite, site)?;
            session.processes.push(process);
        }
        let started = unix_seconds();
        while session.step()? == 0 {
            if unix_seconds() - started > START_SECONDS_MAX {
                return Err(format!("no step after {START_SECONDS_MAX} s: {}", log_end(&place.log("join-1"))).into());
            }
            std::thread::sleep(POLL);
        }
        Ok(session)
    }

    /// Utilisation over a link of so many bits a second: steps a second times the seconds of a step, which are exact and all that
    /// a site alone takes. Where it is below [`UTILISATION_LEAST`] that is all it says.
    ///
    /// # Errors
    /// A process ended, or nothing moves.
    pub(super) fn measure(&mut self, bits_per_second: f64) -> Result<f64, Failure> {
        for site in 0..SITES {
            self.namespaces.shape(site, INTERFACE, tbf(bits_per_second))?;
        }
        let window = self.row.window();
        let settled = self.step()?.next_multiple_of(window.round_steps) + window.settling_rounds * window.round_steps;
        let settling = (settled - self.step()?) as f64 * self.row.method.step_seconds;
        if !self.wait_for(settled, SETTLING_FACTOR * settling + SETTLING_SECONDS)? {
            return Ok(0.0);
        }
        let (end, seconds) = (settled + window.steps, window.steps as f64 * self.row.method.step_seconds);
        self.wait_for(end, seconds / UTILISATION_LEAST)?;
        let now = unix_seconds();
        let speeds = self.logs.iter().map(|log| speed(log, settled, end, now));
        let speeds: Vec<f64> = speeds.collect::<Option<_>>().ok_or("a step is missing in an event log")?;
        Ok(mean(speeds.into_iter()) * self.row.method.step_seconds)
    }

    /// Bits that a delta has for each parameter, over all fragments that have travelled.
    pub(super) fn bits_per_parameter(&self) -> f64 {
        let window = self.row.window();
        let fragments = (window.steps / window.round_steps) as usize;
        let is_step_a_round = window.round_steps == 1;
        let rounds = if is_step_a_round { 1 } else { fragments };
        let bytes: f64 = self.logs[0].fetched.values().take(rounds).sum();
        8.0 * bytes / self.parameters as f64
    }

    /// Rounds after which both sites held the same global state.
    ///
    /// # Errors
    /// They differ.
    pub(super) fn check_agreement(&mut self) -> Result<usize, Failure> {
        self.step()?;
        let [first, second] = &self.logs;
        match agreement(first, second) {
            (rounds, None) => Ok(rounds),
            (_, Some(round)) => Err(format!("the sites hold different states after round {round}").into()),
        }
    }

    /// Inner steps that both have made.
    fn step(&mut self) -> Result<u64, Failure> {
        for process in &mut self.processes {
            if process.has_ended()? {
                return Err("a process of the run has ended".into());
            }
        }
        self.logs.iter_mut().try_for_each(SiteLog::read)?;
        Ok(self.logs.iter().map(SiteLog::last_step).min().unwrap_or(0))
    }

    /// Whether both make that step in time.
    fn wait_for(&mut self, step: u64, seconds_max: f64) -> Result<bool, Failure> {
        let started = unix_seconds();
        while self.step()? < step {
            if unix_seconds() - started > seconds_max {
                return Ok(false);
            }
            std::thread::sleep(POLL);
        }
        Ok(true)
    }

    /// Starts the coordinator beside the first site, and gives its invite.
    fn serve(&mut self, place: &Place<'_>, run: &Path) -> Result<String, Failure> {
        let mut command = self.namespaces.command(0, &place.binary);
        command.arg("serve").arg(run).args(["--listen", &format!("{}:0", ADDRESSES[0])]).stdout(Stdio::piped());
        let mut process = Process::start(&mut command, place.log("serve"))?;
        let mut lines = BufReader::new(process.take_stdout().ok_or("the coordinator has no output")?).lines();
        self.processes.push(process);
        let invite = loop {
            let line = lines.next().ok_or_else(|| format!("no invite: {}", log_end(&place.log("serve"))))??;
            if let Some((_, invite)) = line.split_once("beringia join ") {
                break invite.trim().to_owned();
            }
        };
        // Read to the end, so that the coordinator never waits for a full pipe.
        std::thread::spawn(move || lines.for_each(drop));
        Ok(invite)
    }

    fn join(&self, place: &Place<'_>, invite: &str, site: usize) -> Result<Process, Failure> {
        let mut command = self.namespaces.command(site, &place.binary);
        command.args(["join", invite, "--name", &format!("site-{site}"), "--folder"]).arg(place.site(site));
        command.args(["--listen", &format!("{}:0", ADDRESSES[site]), "--measure-seconds", "0", "--threads", "1"]);
        command
            .args(["--engine", &engine(self.row)])
            .stdout(File::create(place.folder.join(format!("join-{site}.out")))?);
        Process::start(&mut command, place.log(&format!("join-{site}")))
    }
}

impl Place<'_> {
    fn log(&self, process: &str) -> PathBuf {
        self.folder.join(format!("{process}.log"))
    }

    fn site(&self, site: usize) -> PathBuf {
        self.folder.join(format!("site-{site}"))
    }

    /// Makes the run and gives the number of its parameters.
    fn init(&self, row: Row, texts: &Path, run: &Path) -> Result<u64, Failure> {
        let mut command = self.programs.command(&self.binary);
        command.args(["--json", "init"]).arg(run).arg("--data").arg(texts).args(vocabulary());
        for setting in row.settings() {
            command.args(["--set", &setting]);
        }
        Ok(json_of(&mut command)?["parameters"].as_u64().ok_or("init names no parameters")?)
    }
}

fn engine(row: Row) -> String {
    format!("emulated:{}", row.method.step_seconds)
}

fn tbf(bits_per_second: f64) -> Tbf {
    let bytes = |seconds: f64| (bits_per_second / 8.0 * seconds) as u64;
    let burst_bytes = bytes(BURST_SECONDS).max(BURST_BYTES_MIN);
    let limit_bytes = bytes(QUEUE_SECONDS).max(QUEUE_BYTES_MIN) + burst_bytes;
    Tbf { bits_per_second: bits_per_second as u64, burst_bytes, limit_bytes }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_link_still_has_room_for_some_frames() {
        let slow = tbf(200_000.0);
        assert_eq!((slow.burst_bytes, slow.limit_bytes), (3_028, 265_172));
        // 0.1 s and 4 ms of 12.5 MB/s.
        assert_eq!(tbf(1e8).limit_bytes, 1_250_000 + 50_000);
    }
}
