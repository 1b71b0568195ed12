//! `beringia join`: a site of a run.

use crate::engines::EngineArgs;
use crate::failure::Failure;
use crate::invites::invite_of;
use crate::output::Output;
use crate::signals::{SAVE_SECONDS_MAX, runtime, stop_overdue, stop_requested};
use crate::watch::warning_text;
use base::layout::EVENTS_FILE;
use site::{JoinOptions, RunFolder};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;
use telemetry::log::system_unix_ms;
use telemetry::{Event, EventLog, Record, Reporter, Watcher};
use wire::Proxy;

/// A month: longer than anybody leaves a coordinator alone.
const COORDINATOR_WAIT_SECONDS_MAX: f64 = 30.0 * 86_400.0;

/// Take part in a run: fetches everything, checks every hash, trains
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The invite that `beringia serve` or `admit` printed; `@FILE` or `-` reads it from a file or standard input, and keeps it out of the list of processes.
    invite: String,
    /// Name of this site: letters, digits, '-', '_' and '.'.
    #[arg(long, default_value = "site")]
    name: String,
    /// Where this site keeps the run; RUN-NAME unless given.
    #[arg(long, value_name = "FOLDER")]
    folder: Option<PathBuf>,
    /// Address and port for the other sites; port 0 takes any.
    #[arg(long, value_name = "HOST:PORT", default_value = "0.0.0.0:0")]
    listen: SocketAddr,
    /// Host name or address under which the other sites reach this one; as the coordinator sees it unless given.
    #[arg(long, value_name = "HOST", default_value = "")]
    advertise: String,
    /// Object store to leave deltas in, and to take those of others from where that is faster: an S3 bucket, or a folder that all
    /// sites see. Credentials come from the environment: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL.
    #[arg(long, value_name = "s3://BUCKET/PREFIX|file:///FOLDER")]
    objects: Option<String>,
    /// The others cannot dial this site: it listens nowhere, and they take its deltas from the object store alone.
    #[arg(long, requires = "objects", conflicts_with = "advertise")]
    dial_out_only: bool,
    /// SOCKS5 proxy for every connection that this site opens: for networks that let nothing else out.
    #[arg(long, value_name = "socks5://HOST:PORT")]
    proxy: Option<String>,
    /// Make every inner step take this many times as long: to try sites of unequal speed on one machine.
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0)]
    slowdown: f64,
    /// Time for measuring the own speed before the first round.
    #[arg(long, value_name = "SECONDS", default_value_t = 3.0)]
    measure_seconds: f64,
    /// How long to call a coordinator that went away, keeping the model in memory; 0 saves and leaves at once.
    #[arg(long, value_name = "SECONDS", default_value_t = 3600.0)]
    coordinator_wait: f64,
    /// Least time after which a call of the engine is taken for hung; 45 unless given. Raise it where one step takes longer.
    #[arg(long, value_name = "SECONDS")]
    hang_seconds: Option<f64>,
    /// After SIGTERM or Ctrl-C, time for saving before it leaves as it is.
    #[arg(long, value_name = "SECONDS", default_value_t = SAVE_SECONDS_MAX, hide = true)]
    leave_seconds: f64,
    #[command(flatten)]
    engine: EngineArgs,
}

/// Runs the command.
pub(crate) fn run(args: Args, output: &Output) -> Result<(), Failure> {
    let invite = invite_of(&args.invite)?;
    let proxy = args.proxy.as_deref().map(str::parse::<Proxy>).transpose()?;
    if !(1.0..=1e4).contains(&args.slowdown) || !(0.0..=600.0).contains(&args.measure_seconds) {
        let message = "--slowdown must be 1 to 10000 and --measure-seconds 0 to 600";
        return Err(Failure::new(message, "leave them out on a real site"));
    }
    if !(0.0..=COORDINATOR_WAIT_SECONDS_MAX).contains(&args.coordinator_wait) {
        let message = format!("--coordinator-wait must be 0 to {COORDINATOR_WAIT_SECONDS_MAX}");
        return Err(Failure::new(message, "leave it out: an hour"));
    }
    if !(0.0..=SAVE_SECONDS_MAX).contains(&args.leave_seconds) {
        return Err(Failure::new(format!("--leave-seconds must be 0 to {SAVE_SECONDS_MAX}"), "leave it out"));
    }
    let folder = args.folder.clone().unwrap_or_else(|| PathBuf::from(format!("{}-{}", invite.run(), args.name)));
    std::fs::create_dir_all(&folder).map_err(|error| {
        let folder = folder.display();
        Failure::new(format!("{folder}: {error}"), format!("make room or allow writing: `df -h {folder}`"))
    })?;
    args.engine.use_threads()?;
    let log = EventLog::open(&folder.join(EVENTS_FILE), &args.name, Box::new(system_unix_ms))?;
    let mut reporter = Reporter::new(log, lines(output.is_json()));
    if let Some((message, hint)) = args.engine.warning() {
        reporter.warn(message, Some(hint));
    }
    output.line(format_args!("site '{}' joins run '{}' at {}", args.name, invite.run(), invite.address()));
    let mut hang = args.engine.hang_bounds();
    if let Some(seconds) = args.hang_seconds {
        hang.seconds_min = seconds;
    }
    let options = JoinOptions {
        invite,
        folder: RunFolder::new(&folder),
        name: args.name.clone(),
        listen: (!args.dial_out_only).then_some(args.listen),
        objects: args.objects,
        advertised_host: args.advertise,
        proxy,
        engine: args.engine.engine.clone(),
        threads: rayon::current_num_threads(),
        slowdown: args.slowdown,
        measure_seconds: args.measure_seconds,
        coordinator_wait: Duration::from_secs_f64(args.coordinator_wait),
        hang,
    };
    let runtime = runtime()?;
    let overdue = Duration::from_secs_f64(args.leave_seconds);
    let joined = site::join(options, args.engine.factory(), reporter, stop_requested());
    let outcome = runtime.block_on(async {
        tokio::select! {
            joined = joined => joined.map_err(Failure::from),
            () = stop_overdue(overdue) => Err(not_saved(overdue)),
        }
    });
    runtime.shutdown_background();
    let outcome = outcome?;
    output.object(&serde_json::json!({
        "site": outcome.site,
        "name": args.name,
        "round": outcome.round,
        "state_hash": outcome.state_hash,
        "finished": outcome.finished,
        "bytes_sent": outcome.bytes_sent,
        "bytes_received": outcome.bytes_received,
        "folder": folder,
    }));
    let how = if outcome.finished { "the run is over" } else { "left; the same command goes on from here" };
    output.line(format_args!("round {}, state {}: {how}", outcome.round, outcome.state_hash.short()));
    output.line(format_args!("try it: beringia sample {} \"The \"", folder.display()));
    Ok(())
}

/// The engine is in a call that is longer, or what is saved is larger: the process ends without it.
fn not_saved(patience: Duration) -> Failure {
    let seconds = patience.as_secs_f64();
    Failure::new(
        format!("asked to stop, and not done with saving after {seconds} s: it leaves with its last checkpoint"),
        "run the same `beringia join` again: it goes on from its last checkpoint, and fetches what is newer",
    )
}

/// A site's events as plain lines: one a round, not one a step.
fn lines(quiet: bool) -> Watcher {
    Box::new(move |record: &Record| {
        if let Some(text) = warning_text(&record.event) {
            return crate::output::to_stderr(&format!("{text}\n"));
        }
        let line = match &record.event {
            _ if quiet => return,
            Event::SiteReady { tokens_per_second, .. } => format!("ready: {tokens_per_second:.0} tokens/s alone"),
            Event::RoundApplied { round, state_hash, .. } => format!("round {round}: state {}", state_hash.short()),
            Event::Evaluated { step, bits_per_byte, bigram_bits_per_byte, .. } => {
                format!("step {step}: validation {bits_per_byte:.4} bits/byte (bigram model {bigram_bits_per_byte:.4})")
            }
            Event::RouteChosen { from_site, route, reason } => {
                format!("deltas of site {from_site} come by way of {route}: {reason}")
            }
            Event::CheckpointSaved { path, .. } => format!("saved {path}"),
            _ => return,
        };
        crate::output::to_stderr(&format!("{line}\n"));
    })
}
