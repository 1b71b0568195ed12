//! `beringia serve`: the coordinator of a run.

use super::doctor;
use crate::failure::Failure;
use crate::models::refresh_initial_state;
use crate::output::Output;
use crate::signals::{SAVE_SECONDS_MAX, runtime, stop_overdue, stop_requested};
use crate::watch::Watch;
use base::layout::EVENTS_FILE;
use coordinator::{ReferenceSource, RunFiles, ServeOptions};
use site::RunFolder;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;
use telemetry::log::system_unix_ms;
use telemetry::{EventLog, Reporter};
use wire::Identity;

/// Seconds of an hour.
pub(crate) const SECONDS_PER_HOUR: f64 = 3_600.0;

/// A year: what is valid for longer has no end.
const HOURS_MAX: f64 = 8_766.0;

/// Hours for which an invite is valid.
pub(crate) fn hours(text: &str) -> Result<f64, String> {
    let hours: f64 = text.parse().map_err(|_| "not a number of hours, as in 24 or 0.5".to_owned())?;
    match (0.0..=HOURS_MAX).contains(&hours) {
        true => Ok(hours),
        false => Err(format!("not within 0 and {HOURS_MAX} hours")),
    }
}

/// Coordinate a run: prints one invite for the sites, and their rounds as they close
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Folder of the run.
    run: PathBuf,
    /// Address and port to listen on; port 0 takes any.
    #[arg(long, value_name = "HOST:PORT", default_value = "0.0.0.0:7447")]
    listen: SocketAddr,
    /// Host name or address that the sites can reach, for the invite.
    #[arg(long, value_name = "HOST", default_value = "")]
    advertise: String,
    /// Hours for which the invite that is printed admits new machines; 0 prints none: `beringia admit` makes one for each.
    #[arg(long, value_name = "H", default_value_t = 24.0, value_parser = hours)]
    invite_hours: f64,
    /// Sites to wait for before the first round; [sync] sites unless given.
    #[arg(long, value_name = "N")]
    sites: Option<u32>,
    /// Stop after this many rounds of the run.
    #[arg(long, value_name = "R")]
    rounds: Option<u64>,
    /// Stop after this many minutes of training, at the end of a round.
    #[arg(long, value_name = "M")]
    minutes: Option<f64>,
    /// After SIGTERM or Ctrl-C, time for the open round to close and the sites to leave, before it leaves as it is.
    #[arg(long, value_name = "SECONDS", default_value_t = SAVE_SECONDS_MAX, hide = true)]
    leave_seconds: f64,
}

/// Runs the command.
pub(crate) fn run(args: Args, output: &Output) -> Result<(), Failure> {
    if !(0.0..=SAVE_SECONDS_MAX).contains(&args.leave_seconds) {
        return Err(Failure::new(format!("--leave-seconds must be 0 to {SAVE_SECONDS_MAX}"), "leave it out"));
    }
    let folder = RunFolder::new(&args.run);
    refresh_initial_state(&folder, &folder.config()?.0, output)?;
    let mut files = RunFiles::open(&args.run)?;
    if let Some(sites) = args.sites {
        files.config.sync.sites = sites;
        files.config.validate()?;
    }
    let (store, lines) = coordinator::open_log(&args.run)?;
    let identity = Identity::load_or_create(&args.run)?;
    let log = EventLog::open(&args.run.join(EVENTS_FILE), "coordinator", Box::new(system_unix_ms))?;
    let reporter = Reporter::new(log, Watch::new(output, &files.config).watcher());
    let options = ServeOptions {
        run: args.run.clone(),
        invite_seconds: (args.invite_hours > 0.0).then_some(args.invite_hours * SECONDS_PER_HOUR),
        listen: args.listen,
        advertised_host: args.advertise,
        rounds_max: args.rounds,
        train_seconds_max: args.minutes.map(|minutes| minutes * 60.0),
        reference: Some(ReferenceSource::new(doctor::reference_here)),
    };
    let (name, sites) = (files.config.run.name.clone(), files.config.sync.sites);
    let runtime = runtime()?;
    let run_folder = args.run.clone();
    let on_invite = |invite: Option<&wire::Invite>| {
        let text = match invite {
            Some(invite) => format!("beringia join {invite}"),
            None => format!("beringia admit {}", run_folder.display()),
        };
        if output.is_json() {
            output.notice(&text);
        } else {
            let who = if invite.is_some() { "on each of them" } else { "an invite for each of them" };
            output.line(format_args!("run '{name}' waits for {sites} site(s); {who}:\n\n  {text}\n"));
        }
    };
    let served =
        coordinator::serve(files, identity, (Box::new(store), lines), options, reporter, on_invite, stop_requested());
    let overdue = Duration::from_secs_f64(args.leave_seconds);
    let served = runtime.block_on(async {
        tokio::select! {
            served = served => served.map(Some),
            () = stop_overdue(overdue) => Ok(None),
        }
    });
    runtime.shutdown_background();
    let Some(summary) = served? else {
        output.object(&serde_json::json!({ "run": name, "finished": false, "left_in_mid_round": true }));
        output.line(
            "the round is still open: left in the middle of it. The log has every commit; the same command on the same",
        );
        output.line("port goes on from here, and the sites, which keep what they hold, find it");
        return Ok(());
    };
    let ledger = summary.ledger;
    output.object(&serde_json::json!({
        "run": name,
        "rounds": summary.rounds,
        "tokens": summary.tokens,
        "finished": summary.finished,
        "state_hash": summary.state_hash,
        "ledger": {
            "leased": ledger.leased,
            "committed": ledger.committed,
            "returned": ledger.returned,
            "lost": ledger.lost,
        },
    }));
    let state = summary.state_hash.map_or_else(|| "not agreed".to_owned(), |hash| hash.short());
    let how = if summary.finished { "finished" } else { "stopped; the same command goes on from here" };
    output.line(format_args!("round {}, {} tokens, state {state}: {how}", summary.rounds, summary.tokens));
    Ok(())
}
