//! `beringia serve`: the coordinator of a run.

use super::doctor;
use crate::failure::Failure;
use crate::models::refresh_initial_state;
use crate::output::Output;
use crate::signals::{runtime, stop_requested};
use crate::watch::Watch;
use base::layout::EVENTS_FILE;
use coordinator::{ReferenceSource, RunFiles, ServeOptions};
use site::RunFolder;
use std::net::SocketAddr;
use std::path::PathBuf;
use telemetry::log::system_unix_ms;
use telemetry::{EventLog, Reporter};
use wire::Identity;

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
    /// Sites to wait for before the first round; [sync] sites unless given.
    #[arg(long, value_name = "N")]
    sites: Option<u32>,
    /// Stop after this many rounds of the run.
    #[arg(long, value_name = "R")]
    rounds: Option<u64>,
    /// Stop after this many minutes of training, at the end of a round.
    #[arg(long, value_name = "M")]
    minutes: Option<f64>,
}

/// Runs the command.
pub(crate) fn run(args: Args, output: &Output) -> Result<(), Failure> {
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
        listen: args.listen,
        advertised_host: args.advertise,
        rounds_max: args.rounds,
        train_seconds_max: args.minutes.map(|minutes| minutes * 60.0),
        reference: Some(ReferenceSource::new(doctor::reference_here)),
    };
    let (name, sites) = (files.config.run.name.clone(), files.config.sync.sites);
    let runtime = runtime()?;
    let on_invite = |invite: &wire::Invite| {
        let text = format!("beringia join {invite}");
        if output.is_json() {
            output.notice(&text);
        } else {
            output.line(format_args!("run '{name}' waits for {sites} site(s); on each of them:\n\n  {text}\n"));
        }
    };
    let served =
        coordinator::serve(files, identity, (Box::new(store), lines), options, reporter, on_invite, stop_requested());
    let summary = runtime.block_on(served)?;
    runtime.shutdown_background();
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
