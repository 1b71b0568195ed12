//! `cargo xtask bench engine`: tokens per second of this engine and of PyTorch, for the same model, in one run.
//!
//! Both programs are started once and train by turns, so that neither finds a quieter machine than the other: in a round
//! each takes as many steps, who begins alternates, and the result is the median of the rounds' ratios. A ratio above 1
//! means that this engine is faster. Peak memory is each process' VmHWM, its libraries included.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

type Failure = Box<dyn std::error::Error>;

/// Steps before the first round: memory pools, page faults, code paths.
const WARM_UP_STEPS: u32 = 3;

/// Settings of a comparison.
struct Settings {
    python: String,
    threads: usize,
    rounds: usize,
    steps: u32,
    json: bool,
}

const USAGE: &str = "usage: cargo xtask bench engine [--python PATH] [--threads N] [--rounds N] [--steps N] [--json]";

impl Settings {
    fn parse(arguments: &[String]) -> Result<Self, Failure> {
        let python = std::env::var("BERINGIA_PYTHON").unwrap_or_else(|_| "python3".to_owned());
        let mut settings = Self { python, threads: 2, rounds: 5, steps: 10, json: false };
        let mut rest = arguments.iter();
        while let Some(flag) = rest.next() {
            let mut value = || rest.next().ok_or_else(|| format!("{flag} needs a value\nhint: {USAGE}"));
            match flag.as_str() {
                "--python" => settings.python = value()?.clone(),
                "--threads" => settings.threads = positive(flag, value()?)?,
                "--rounds" => settings.rounds = positive(flag, value()?)?,
                "--steps" => settings.steps = positive(flag, value()?)?.try_into()?,
                "--json" => settings.json = true,
                _ => return Err(format!("unknown argument '{flag}'\nhint: {USAGE}").into()),
            }
        }
        Ok(settings)
    }
}

fn positive(flag: &str, text: &str) -> Result<usize, Failure> {
    match text.parse() {
        Ok(number) if number > 0 => Ok(number),
        _ => Err(format!("{flag} {text} is not a positive number\nhint: {USAGE}").into()),
    }
}

/// One of the two programs: a number of steps goes in, a line of JSON comes out.
struct Contender {
    name: &'static str,
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

/// A contender's answer.
#[derive(Debug, serde::Deserialize)]
struct Answer {
    tokens_per_second: f64,
    loss_nats: f64,
    memory_peak_bytes: u64,
    #[serde(default)]
    version: String,
}

impl Contender {
    fn start(name: &'static str, command: &mut Command) -> Result<Self, Failure> {
        let program = command.get_program().to_string_lossy().into_owned();
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().map_err(|error| {
            format!("cannot start {program}: {error}\nhint: pass --python PATH, or set BERINGIA_PYTHON")
        })?;
        let (input, output) = child.stdin.take().zip(child.stdout.take()).ok_or("no pipes to a child")?;
        Ok(Self { name, child, input, output: BufReader::new(output) })
    }

    fn train(&mut self, steps: u32) -> Result<Answer, Failure> {
        let mut line = String::new();
        let sent = writeln!(self.input, "{steps}").and_then(|()| self.input.flush());
        if sent.is_err() || self.output.read_line(&mut line)? == 0 {
            let status = self.child.wait()?;
            return Err(format!("{} ended ({status}); its own message is above", self.name).into());
        }
        Ok(serde_json::from_str(&line)?)
    }
}

impl Drop for Contender {
    fn drop(&mut self) {
        // The children also end by themselves when their input closes.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs the comparison and prints it.
pub(crate) fn run(arguments: &[String]) -> Result<(), Failure> {
    let settings = Settings::parse(arguments)?;
    let engine_program = build_engine()?;
    let threads = settings.threads.to_string();
    let mut engine = Contender::start("engine-burn", Command::new(engine_program).env("RAYON_NUM_THREADS", &threads))?;
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../python/engine_speed.py");
    let mut torch = Contender::start("PyTorch", Command::new(&settings.python).args([script, "--threads", &threads]))?;
    let (mut of_engine, mut of_torch) = (Vec::new(), Vec::new());
    engine.train(WARM_UP_STEPS)?;
    torch.train(WARM_UP_STEPS)?;
    for round in 0..settings.rounds {
        if round % 2 == 0 {
            of_engine.push(engine.train(settings.steps)?);
            of_torch.push(torch.train(settings.steps)?);
        } else {
            of_torch.push(torch.train(settings.steps)?);
            of_engine.push(engine.train(settings.steps)?);
        }
    }
    report(&settings, &of_engine, &of_torch);
    Ok(())
}

/// Builds the example that trains, in release, and gives its path.
fn build_engine() -> Result<std::path::PathBuf, Failure> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    let output = Command::new(cargo)
        .args(["build", "--release", "--package", "engine-burn", "--example", "speed", "--message-format", "json"])
        .stderr(Stdio::inherit())
        .output()?;
    if !output.status.success() {
        return Err("the engine does not build; cargo's message is above".into());
    }
    let text = String::from_utf8(output.stdout)?;
    let messages = text.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let executables = messages.filter(|message| message["target"]["name"] == "speed");
    let paths: Vec<String> =
        executables.filter_map(|message| message["executable"].as_str().map(str::to_owned)).collect();
    Ok(paths.into_iter().next_back().ok_or("cargo named no executable for the example 'speed'")?.into())
}

/// Median, lowest and highest.
struct Spread {
    median: f64,
    lowest: f64,
    highest: f64,
}

fn spread(values: impl Iterator<Item = f64>) -> Spread {
    let mut sorted: Vec<f64> = values.collect();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    let median =
        if sorted.len().is_multiple_of(2) { f64::midpoint(sorted[middle - 1], sorted[middle]) } else { sorted[middle] };
    Spread { median, lowest: sorted[0], highest: sorted[sorted.len() - 1] }
}

fn report(settings: &Settings, engine: &[Answer], torch: &[Answer]) {
    let ratio =
        spread(engine.iter().zip(torch).map(|(ours, theirs)| ours.tokens_per_second / theirs.tokens_per_second));
    let [ours, theirs] = [engine, torch].map(|answers| spread(answers.iter().map(|a| a.tokens_per_second)));
    let [our_last, their_last] = [engine, torch].map(|answers| &answers[answers.len() - 1]);
    if settings.json {
        let side = |spread: &Spread, last: &Answer| {
            serde_json::json!({
                "tokens_per_second": spread.median,
                "tokens_per_second_lowest": spread.lowest,
                "tokens_per_second_highest": spread.highest,
                "memory_peak_bytes": last.memory_peak_bytes,
            })
        };
        let object = serde_json::json!({
            "ratio": ratio.median,
            "ratio_lowest": ratio.lowest,
            "ratio_highest": ratio.highest,
            "threads": settings.threads,
            "rounds": settings.rounds,
            "steps_per_round": settings.steps,
            "engine_burn": side(&ours, our_last),
            "pytorch": side(&theirs, their_last),
            "pytorch_version": their_last.version,
        });
        println!("{object}");
        return;
    }
    println!(
        "Llama of 4.9M parameters (h 256, 6 layers, 8 heads, f 704, vocabulary 512), T 256, batch 8, f32, AdamW, clipping"
    );
    println!(
        "{} threads each, {} rounds of {} steps by turns; PyTorch {} (eager, CPU)",
        settings.threads, settings.rounds, settings.steps, their_last.version
    );
    for (name, spread, last) in [("engine-burn", &ours, our_last), ("PyTorch", &theirs, their_last)] {
        println!(
            "{name:<12} {:>7.0} tokens/s (lowest {:.0}, highest {:.0})   peak memory {:>5} MiB   loss {:.3}",
            spread.median,
            spread.lowest,
            spread.highest,
            last.memory_peak_bytes >> 20,
            last.loss_nats,
        );
    }
    println!("ratio        {:>7.2} (lowest {:.2}, highest {:.2})", ratio.median, ratio.lowest, ratio.highest);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_lies_between_the_middle_two() {
        let spread = spread([4.0, 1.0, 3.0, 2.0].into_iter());
        assert_eq!((spread.median, spread.lowest, spread.highest), (2.5, 1.0, 4.0));
    }

    #[test]
    fn arguments_are_checked() {
        let parse = |text: &str| Settings::parse(&text.split(' ').map(str::to_owned).collect::<Vec<_>>());
        assert_eq!(parse("--threads 3 --json").map(|s| (s.threads, s.json)).ok(), Some((3, true)));
        for wrong in ["--threads 0", "--rounds", "--speed 3"] {
            let message = parse(wrong).err().map(|error| error.to_string()).unwrap_or_default();
            assert!(message.contains("hint: usage"), "{wrong}: {message}");
        }
    }
}
