//! The peers' side: their own scripts, in the namespaces, pinned, with the bench's texts, weights and validation.

use crate::runs::{Failure, Process};
use crate::wan::figures::SiteSeries;
use crate::wan::link::{Link, hosts};
use crate::wan::processes::{log_end, on_core, side_by_side, unix_seconds, wait_until};
use crate::wan::results::Budget;
use crate::wan::series::{peer_steps, peer_validation, sent};
use crate::wan::systems::{Peer, Python};
use crate::wan::work::{BATCH_SAMPLES, SITES, Size, Work};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// Starts a script with the bench's texts and weights.
const LAUNCHER: &str = include_str!("peer.py");
/// Steps of a training that ends by time.
const STEPS_MAX: u64 = 10_000_000;
/// Time limit of a training that ends by steps, seconds; the bench has its own.
const SECONDS_MAX: f64 = 1e9;
/// After one site has validated, the other is given this long. Sites that end by time may wait for each other for ever.
const LAST_SITE_SECONDS_MAX: u64 = 60;
/// Time for torchft's lighthouse to listen.
const LIGHTHOUSE_START: Duration = Duration::from_secs(1);
/// How much more time a solo run has that was too short.
const SOLO_STRETCH: f64 = 5.0;
/// Where torchft's lighthouse listens, as `train.py` expects it.
const LIGHTHOUSE_ADDRESS: &str = "[::]:29510";

/// Interpreters of the peers.
#[derive(Debug, clap::Args)]
pub(crate) struct Pythons {
    /// The peers' scripts: train.py, hmtrain.py, solo.py, model.py, tunlink.c
    #[arg(long, value_name = "FOLDER")]
    peers: Option<PathBuf>,
    /// Interpreter with PyTorch, for DDP and the solo runs; PEERS_PY unless given
    #[arg(long, value_name = "PATH")]
    peers_python: Option<PathBuf>,
    /// Interpreter with torchft 0.2.0; PEERS_PY_TORCHFT unless given
    #[arg(long, value_name = "PATH")]
    torchft_python: Option<PathBuf>,
    /// Interpreter with hivemind 1.1.12; PEERS_PY_HIVEMIND unless given
    #[arg(long, value_name = "PATH")]
    hivemind_python: Option<PathBuf>,
}

impl Pythons {
    /// The folder of scripts.
    ///
    /// # Errors
    /// It was not named.
    pub(crate) fn folder(&self) -> Result<&Path, Failure> {
        Ok(self.peers.as_deref().ok_or("the peers' scripts are needed\nhint: --peers FOLDER, or other --systems")?)
    }

    fn python(&self, which: Python) -> Result<PathBuf, Failure> {
        let (given, variable, flag) = match which {
            Python::Torch => (&self.peers_python, "PEERS_PY", "--peers-python"),
            Python::Torchft => (&self.torchft_python, "PEERS_PY_TORCHFT", "--torchft-python"),
            Python::Hivemind => (&self.hivemind_python, "PEERS_PY_HIVEMIND", "--hivemind-python"),
        };
        let named = given.clone().or_else(|| std::env::var_os(variable).map(PathBuf::from));
        Ok(named.ok_or_else(|| format!("which Python runs {which:?}?\nhint: {flag} PATH, or {variable}=PATH"))?)
    }
}

/// The scripts and the work.
pub(crate) struct Peers<'a> {
    pub(crate) pythons: &'a Pythons,
    pub(crate) work: &'a Work,
    /// Initial weights as `beringia export` writes them; the peers' own where there are none.
    pub(crate) weights: Option<PathBuf>,
}

/// What both sites of a peer left behind.
pub(crate) struct Trained {
    /// By site.
    pub(crate) sites: Vec<SiteSeries>,
    /// Of the first site that validated; none where the training was cut short.
    pub(crate) validation_nats: Option<f64>,
}

/// One training of a peer.
pub(crate) struct Training<'a> {
    pub(crate) peer: &'a Peer,
    pub(crate) size: Size,
    pub(crate) seed: u64,
    pub(crate) budget: Budget,
    /// For its logs; exists.
    pub(crate) folder: &'a Path,
    /// After which it is given up.
    pub(crate) seconds_max: f64,
    /// After which it is cut short, and what it has done counts.
    pub(crate) seconds_cut: f64,
}

impl Training<'_> {
    fn file(&self, kind: &str, site: usize) -> PathBuf {
        self.folder.join(format!("{kind}-{site}"))
    }

    /// Steps of a site so far, and its validation at the end.
    fn log(&self, site: usize) -> String {
        fs::read_to_string(self.file("steps", site)).unwrap_or_default()
    }

    /// Of the first site that has validated.
    fn validation(&self) -> Option<f64> {
        (0..SITES).find_map(|site| peer_validation(&self.log(site)))
    }
}

impl Peers<'_> {
    /// Parameters and initial loss of the peers' model.
    ///
    /// # Errors
    /// What Python says.
    pub(crate) fn check(&self, size: Size) -> Result<(u64, f64), Failure> {
        let mut command = Command::new(self.pythons.python(Python::Torch)?);
        self.arguments(&mut command, &["check"], Path::new("."))?;
        let report = crate::runs::json_of(command.arg(size.name))?;
        let found = report["parameters"].as_u64().zip(report["nats"].as_f64());
        Ok(found.ok_or("the peers' model names no parameters and nats")?)
    }

    /// Tokens a second of both cores, each with a process of its own at the same time. `solo.py` fails where the time is over after
    /// two steps: it is then given more.
    ///
    /// # Errors
    /// What `solo.py` says.
    pub(crate) fn alone(&self, size: Size, seconds: f64) -> Result<f64, Failure> {
        self.solo(size, seconds).or_else(|_| self.solo(size, SOLO_STRETCH * seconds))
    }

    fn solo(&self, size: Size, seconds: f64) -> Result<f64, Failure> {
        let (python, script) = (self.pythons.python(Python::Torch)?, self.pythons.folder()?.join("solo.py"));
        let (batch, seconds) = ((BATCH_SAMPLES / SITES as u64).to_string(), seconds.to_string());
        let solo = |core: usize| {
            let mut command = on_core(core, &python);
            command.arg(&script).args([size.name, &batch, &seconds, &core.to_string()]);
            command.env("PEERS_TEXTS", &self.work.peer_texts).env("CUDA_VISIBLE_DEVICES", "");
            command
        };
        let speed = |text: String| solo_speed(&text).ok_or_else(|| format!("solo.py printed: {text}").into());
        side_by_side((0..SITES).map(solo))?.into_iter().map(speed).sum()
    }

    /// Trains over the link; the folder of `training` takes the logs.
    ///
    /// # Errors
    /// A site that made no validation, with the end of its log.
    pub(crate) fn train(&self, link: &Link, training: &Training<'_>) -> Result<Trained, Failure> {
        fs::write(training.file("hosts", 0), hosts())?;
        let _lighthouse = match training.peer.python {
            Python::Torchft => Some(self.lighthouse(link, training.folder)?),
            Python::Torch | Python::Hivemind => None,
        };
        let count = |site| link.count_sent(site, &training.file("sent", site));
        let readings = (0..SITES).map(count).collect::<Result<Vec<_>, _>>()?;
        let started = unix_seconds();
        let start = |site| self.start(link, training, site, started);
        let mut sites = (0..SITES).map(start).collect::<Result<Vec<_>, _>>()?;
        let (mut first_validated, mut is_cut): (Option<Instant>, bool) = (None, false);
        let mut is_over = || {
            if training.validation().is_some() {
                first_validated.get_or_insert_with(Instant::now);
            }
            is_cut = first_validated.is_none() && unix_seconds() - started > training.seconds_cut;
            is_cut || first_validated.is_some_and(|since| since.elapsed().as_secs() > LAST_SITE_SECONDS_MAX)
        };
        let ended = wait_until(&mut sites, training.seconds_max, &mut is_over);
        drop(readings);
        link.kill_all();
        let validation_nats = training.validation();
        if validation_nats.is_none() && !is_cut {
            let why = ended.err().map_or_else(|| "ended without a validation".to_owned(), |error| error.to_string());
            let ends = (0..SITES).map(|site| log_end(&training.file("stderr", site))).collect::<Vec<_>>();
            return Err(format!("{why}: {}", ends.join(" || ")).into());
        }
        let series = |site: usize| -> Result<SiteSeries, Failure> {
            let counted = fs::read_to_string(training.file("sent", site))?;
            Ok(SiteSeries { steps: peer_steps(&training.log(site), started), sent: sent(&counted, started) })
        };
        Ok(Trained { sites: (0..SITES).map(series).collect::<Result<_, _>>()?, validation_nats })
    }

    fn start(&self, link: &Link, training: &Training<'_>, site: usize, started: f64) -> Result<Process, Failure> {
        let python = self.pythons.python(training.peer.python)?;
        let mut command = link.named_command(site, &python, &training.file("hosts", 0));
        self.arguments(&mut command, &[training.peer.script], training.folder)?;
        let (steps, seconds) = match training.budget {
            Budget::Steps(steps) => (steps, SECONDS_MAX),
            Budget::Minutes(minutes) => (STEPS_MAX, 60.0 * minutes),
        };
        command.args(["--size", training.size.name, "--bs", &(BATCH_SAMPLES / SITES as u64).to_string()]);
        command.args(["--rank", &site.to_string(), "--seed", &training.seed.to_string()]);
        command.args(["--steps", &steps.to_string(), "--secs", &seconds.to_string()]);
        command.arg("--out").arg(training.file("steps", site)).args(&training.peer.arguments);
        command.env("WAN_STARTED", started.to_string()).stdout(File::create(training.file("stdout", site))?);
        Process::start(&mut command, training.file("stderr", site))
    }

    /// What every start of a script has in common.
    fn arguments(&self, command: &mut Command, script: &[&str], folder: &Path) -> Result<(), Failure> {
        command.args(["-c", LAUNCHER]).arg(self.pythons.folder()?).arg(&self.work.validation);
        command.arg(self.weights.as_deref().unwrap_or(Path::new("-"))).args(script);
        command.env("PEERS_TEXTS", &self.work.peer_texts).env("PEERS_WORK", folder);
        command.env("GLOO_SOCKET_IFNAME", "w0").env("CUDA_VISIBLE_DEVICES", "");
        command.env("PYTHONWARNINGS", "ignore").env("RUST_LOG", "warn");
        Ok(())
    }

    /// torchft's own coordinator, beside the first site.
    fn lighthouse(&self, link: &Link, folder: &Path) -> Result<Process, Failure> {
        let program = self.pythons.python(Python::Torchft)?.with_file_name("torchft_lighthouse");
        let mut command = link.command(0, &program);
        command.args(["--min_replicas", "1", "--join_timeout_ms", "5000", "--bind", LIGHTHOUSE_ADDRESS]);
        command.env("RUST_LOG", "warn").stdout(File::create(folder.join("lighthouse.stdout"))?);
        let started = Process::start(&mut command, folder.join("lighthouse.stderr"))?;
        std::thread::sleep(LIGHTHOUSE_START);
        Ok(started)
    }
}

/// Tokens a second in the line that `solo.py` prints.
fn solo_speed(text: &str) -> Option<f64> {
    text.split_once("mean_tok/s=")?.1.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_of_solo_is_read() {
        let line = "solo 5M params=4934912 bs=4 rank=0 steps=24 mean_tok/s=2050 med_tok/s=2060 loss=3.1";
        assert_eq!(solo_speed(line), Some(2050.0));
        assert_eq!(solo_speed("Traceback"), None);
    }
}
