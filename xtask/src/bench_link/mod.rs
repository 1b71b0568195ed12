//! `cargo xtask bench link`: how much of a link bulk transfer fills, beside `iperf3 -P 8` on the same link.
//!
//! For each delay three network namespaces are made, two ends and a router whose `tbf` is the link; then `iperf3` and a
//! fetch of about as many bytes alternate. Both count what the receiver got, from the first packet on: connecting, TLS and
//! the growth of windows included. The result is the quotient of the medians. Needs root, `ip`, `tc` and `iperf3`.

mod delay_line;
mod link;

use crate::runs::{Failure, json_of, median};
use link::{FAR, Link, Shape, inside};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Part of iperf3's goodput with which the bench succeeds.
const RATIO_MIN: f64 = 0.95;

/// Streams of iperf3.
const IPERF_STREAMS: &str = "8";

/// Where the far end listens.
const PORT: u16 = 7_000;

/// Settings of the bench.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Rate of the link
    #[arg(long, value_name = "MBIT/S", default_value_t = 1_000)]
    megabits: u32,
    /// Delay added to each round trip, milliseconds
    #[arg(long, value_name = "MS", value_delimiter = ',', default_value = "0,50,100")]
    delays: Vec<u64>,
    /// What the router holds at most, milliseconds at the link's rate
    #[arg(long, value_name = "MS", default_value_t = 50)]
    queue: u64,
    /// Pairs of measurements for each delay
    #[arg(long, value_name = "N", default_value_t = 5)]
    repeats: usize,
    /// Length of one measurement, seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 8.0)]
    seconds: f64,
    /// Streams a fetch begins with
    #[arg(long, value_name = "N", default_value_t = 8)]
    streams: usize,
    /// Fetches of 100 kB after each large one, half a second apart
    #[arg(long, value_name = "N", default_value_t = 4)]
    small: usize,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// All measurements with one delay.
struct Measured {
    delay_ms: u64,
    round_trip_ms: f64,
    iperf_megabits: Vec<f64>,
    retransmits: Vec<f64>,
    fetch_megabits: Vec<f64>,
    small_ms: Vec<f64>,
}

impl Measured {
    fn ratio(&self) -> f64 {
        median(&self.fetch_megabits) / median(&self.iperf_megabits)
    }
}

/// Runs the bench and prints it.
///
/// # Errors
/// Not root, a tool is missing, or less than [`RATIO_MIN`] of iperf3.
pub(crate) fn run(options: &Options) -> Result<(), Failure> {
    let program = build_end()?;
    let measured =
        options.delays.iter().map(|delay| measure(options, &program, *delay)).collect::<Result<Vec<_>, _>>()?;
    report(options, &measured)
}

/// Builds the program of the two ends, in release, and gives its path.
fn build_end() -> Result<PathBuf, Failure> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    let output = Command::new(cargo)
        .args([
            "build",
            "--release",
            "--package",
            "wire",
            "--example",
            "link_end",
            "--message-format",
            "json-render-diagnostics",
        ])
        .stderr(Stdio::inherit())
        .output()?;
    if !output.status.success() {
        return Err("the example link_end does not build; cargo's message is above".into());
    }
    let text = String::from_utf8(output.stdout)?;
    let messages = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let executable = messages.filter_map(|message| Some(message["executable"].as_str()?.to_owned())).next_back();
    Ok(executable.ok_or("cargo named no executable for link_end")?.into())
}

fn measure(options: &Options, program: &Path, delay_ms: u64) -> Result<Measured, Failure> {
    let shape = Shape {
        megabits: options.megabits,
        delay: Duration::from_millis(delay_ms),
        queue: Duration::from_millis(options.queue),
    };
    let link = Link::make(shape)?;
    let mebibytes = (f64::from(options.megabits) * 1e6 / 8.0 * options.seconds / f64::from(1 << 20)) as u64;
    let _iperf = Served::iperf(&link)?;
    let far = Served::blobs(&link, program, mebibytes)?;
    let mut measured = Measured {
        delay_ms,
        round_trip_ms: round_trip(&link)?,
        iperf_megabits: Vec::new(),
        retransmits: Vec::new(),
        fetch_megabits: Vec::new(),
        small_ms: Vec::new(),
    };
    for _ in 0..options.repeats {
        let (megabits, retransmits) = iperf(&link, options.seconds)?;
        measured.iperf_megabits.push(megabits);
        measured.retransmits.push(retransmits);
        let fetched = fetch(&link, program, &far.first_line, options)?;
        measured.fetch_megabits.push(fetched.0);
        measured.small_ms.extend(fetched.1);
        if !options.json {
            println!("delay {delay_ms} ms: iperf3 {megabits:.1} Mbit/s, fetch {:.1} Mbit/s", fetched.0);
        }
    }
    match link.line_drops() {
        0 => Ok(measured),
        drops => Err(format!("the delay line had no room for {drops} packets: this machine is too slow for it").into()),
    }
}

/// A process at the far end.
struct Served {
    child: Child,
    /// What it printed first.
    first_line: Value,
}

impl Served {
    fn iperf(link: &Link) -> Result<Self, Failure> {
        let mut command = Link::command(link.far(), Path::new("iperf3"));
        // It says so when it listens.
        command.args(["--server", "--forceflush", "--bind", FAR]);
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn()?;
        let stdout = child.stdout.take().ok_or("iperf3 has no output")?;
        let served = Self { child, first_line: Value::Null };
        let mut lines = BufReader::new(stdout).lines();
        while !lines.next().ok_or("iperf3 does not listen")??.contains("listening") {}
        // Read to the end, so that it never waits for a full pipe.
        std::thread::spawn(move || lines.for_each(drop));
        Ok(served)
    }

    fn blobs(link: &Link, program: &Path, mebibytes: u64) -> Result<Self, Failure> {
        let mut command = Link::command(link.far(), program);
        command.args(["serve", &format!("{FAR}:{PORT}"), &mebibytes.to_string()]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn()?;
        let stdout = child.stdout.take().ok_or("link_end has no output")?;
        let mut served = Self { child, first_line: Value::Null };
        let line = BufReader::new(stdout).lines().next().ok_or("link_end printed nothing")??;
        served.first_line = serde_json::from_str(&line)?;
        Ok(served)
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // `ip netns exec` has replaced itself by the program: this ends it, not a parent of it.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Round trip of the idle link, milliseconds: the shortest of 5 TCP connects.
fn round_trip(link: &Link) -> Result<f64, Failure> {
    let shortest = inside(link.near(), || {
        let mut shortest = Duration::MAX;
        for _ in 0..5 {
            let started = Instant::now();
            TcpStream::connect((FAR, PORT))?;
            shortest = shortest.min(started.elapsed());
        }
        Ok(shortest)
    })?;
    Ok(1e3 * shortest.as_secs_f64())
}

/// Goodput from the far end to the near one, Mbit/s, and segments sent again.
fn iperf(link: &Link, seconds: f64) -> Result<(f64, f64), Failure> {
    let mut command = Link::command(link.near(), Path::new("iperf3"));
    command.args(["--client", FAR, "--reverse", "--parallel", IPERF_STREAMS, "--json"]);
    let result = json_of(command.args(["--time", &format!("{seconds:.0}")]))?;
    let bits = result["end"]["sum_received"]["bits_per_second"].as_f64().ok_or("iperf3 names no rate")?;
    Ok((bits / 1e6, result["end"]["sum_sent"]["retransmits"].as_f64().unwrap_or(f64::NAN)))
}

/// Goodput of one fetch from the far end, Mbit/s, and the milliseconds of each small fetch after it.
fn fetch(link: &Link, program: &Path, far: &Value, options: &Options) -> Result<(f64, Vec<f64>), Failure> {
    let mut command = Link::command(link.near(), program);
    command.arg("fetch");
    for key in ["address", "fingerprint", "hash"] {
        command.arg(far[key].as_str().ok_or("link_end's line is not complete")?);
    }
    command.arg(far["bytes"].to_string()).arg(options.streams.to_string());
    command.arg(far["small_hash"].as_str().ok_or("link_end's line is not complete")?).arg(options.small.to_string());
    let result = json_of(&mut command)?;
    let number = |value: &Value| value.as_f64().ok_or("link_end names no number");
    let megabits = 8e-6 * number(&result["bytes"])? / number(&result["seconds"])?;
    let small = result["small_seconds"].as_array().cloned().unwrap_or_default();
    Ok((megabits, small.iter().filter_map(Value::as_f64).map(|seconds| 1e3 * seconds).collect()))
}

fn report(options: &Options, measured: &[Measured]) -> Result<(), Failure> {
    let smallest = measured.iter().map(Measured::ratio).fold(f64::INFINITY, f64::min);
    if options.json {
        let rows: Vec<Value> = measured.iter().map(row).collect();
        let (megabits, queue_ms) = (options.megabits, options.queue);
        println!("{}", json!({ "megabits": megabits, "queue_ms": queue_ms, "ratio_min": smallest, "delays": rows }));
    } else {
        println!("Mbit/s of goodput, median (smallest to largest) of {}", options.repeats);
        println!(
            "added ms   trip ms   iperf3 -P {IPERF_STREAMS}                fetch                      ratio   100 kB, ms"
        );
        for row in measured {
            println!(
                "{:>8} {:>9.1}   {:<24} {:<24} {:>7.3} {:>12}",
                row.delay_ms,
                row.round_trip_ms,
                spread(&row.iperf_megabits),
                spread(&row.fetch_megabits),
                row.ratio(),
                spread(&row.small_ms),
            );
        }
    }
    // NaN is not enough either.
    if smallest >= RATIO_MIN {
        return Ok(());
    }
    Err(format!("a fetch has {smallest:.3} of iperf3's goodput, wanted is at least {RATIO_MIN}").into())
}

fn row(measured: &Measured) -> Value {
    json!({
        "delay_ms": measured.delay_ms, "round_trip_ms": measured.round_trip_ms, "ratio": measured.ratio(),
        "iperf3_megabits": measured.iperf_megabits, "iperf3_retransmits": measured.retransmits,
        "fetch_megabits": measured.fetch_megabits, "small_ms": measured.small_ms,
    })
}

fn spread(values: &[f64]) -> String {
    let (low, high) = values
        .iter()
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(*value), high.max(*value)));
    format!("{:.1} ({low:.1} to {high:.1})", median(values))
}
