//! `beringia status`: where a run stands, from its folder or, given an invite, from its coordinator.

use crate::failure::Failure;
use crate::invites::invite_of;
use crate::output::Output;
use crate::signals::runtime;
use base::layout::EVENTS_FILE;
use std::path::Path;
use std::time::Duration;
use telemetry::RunView;
use wire::message::{FromCoordinator, Greeting, Role};
use wire::{Identity, Invite, Purpose, Traffic};

/// The coordinator answers at once; a busy machine may need some seconds.
const ANSWER_SECONDS_MAX: u64 = 30;

/// Width of the table, characters.
const TABLE_WIDTH: usize = 120;

/// Show sites, round, speed, loss and hashes of a run
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Folder of the run, or an invite, or `@FILE` or `-`.
    run: String,
}

/// Runs the command.
pub(crate) fn run(args: Args, output: &Output) -> Result<(), Failure> {
    let folder = Path::new(&args.run);
    if !folder.exists()
        && let Ok(invite) = invite_of(&args.run)
    {
        return ask(&invite, output);
    }
    let path = folder.join(EVENTS_FILE);
    if !path.is_file() {
        let message = format!("{}: no events yet, and it is no invite", path.display());
        return Err(Failure::new(
            message,
            "name the folder of a run that was started, or the invite of `beringia serve`",
        ));
    }
    let records = telemetry::read(&path)?.collect::<Result<Vec<_>, _>>()?;
    let view = RunView::of(&records);
    output.object(&view.to_json());
    output.text(&view.render_table(TABLE_WIDTH));
    Ok(())
}

fn ask(invite: &Invite, output: &Output) -> Result<(), Failure> {
    let runtime = runtime()?;
    let status = runtime.block_on(async {
        let identity = Identity::generate()?;
        let (address, fingerprint) = (invite.address(), invite.fingerprint());
        let mut connection = wire::connect(&identity, &Traffic::new(), address, fingerprint, Purpose::Control).await?;
        let greeting =
            Greeting { run: invite.run().to_owned(), secret: Some(invite.secret().clone()), role: Role::Observer };
        let lost = |reason: String| {
            Failure::new(
                format!("the coordinator at {address}: {reason}"),
                "see that `beringia serve` still runs there",
            )
        };
        connection.send(&greeting).await.map_err(|error| lost(error.to_string()))?;
        match connection.recv_timeout(Duration::from_secs(ANSWER_SECONDS_MAX)).await {
            Ok(FromCoordinator::Status(status)) => Ok(status),
            Ok(FromCoordinator::Refused { reason, hint }) => Err(Failure::new(reason, hint)),
            Ok(_) => Err(lost("it sent something else than a status".to_owned())),
            Err(error) => Err(lost(error.to_string())),
        }
    })?;
    let status: serde_json::Value = serde_json::from_str(&status).map_err(|error| {
        Failure::new(format!("the status is no JSON: {error}"), "use the same version on both sides")
    })?;
    output.object(&status);
    output.text(&table(&status));
    Ok(())
}

/// The same facts as the table of a folder, from the status object.
fn table(status: &serde_json::Value) -> String {
    let field = |name: &str| match &status[name] {
        serde_json::Value::String(text) => text.clone(),
        serde_json::Value::Null => "-".to_owned(),
        other => other.to_string(),
    };
    let mut text = format!(
        "run {}  {}\nround {} of {}  {} of {} tokens\n",
        field("run"),
        field("state"),
        field("round"),
        field("rounds_planned"),
        field("tokens"),
        field("tokens_planned")
    );
    text.push_str(&format!("loss {}  state {}\n", field("loss_nats"), field("state_hash")));
    if status["exchange"].is_string() {
        text.push_str(&format!("exchange {}\n", field("exchange")));
    }
    for site in status["sites"].as_array().into_iter().flatten() {
        let field = |name: &str| site[name].as_str().map_or_else(|| site[name].to_string(), str::to_owned);
        text.push_str(&format!(
            "site {} {}  {}  {}  {} tokens/s  share {}\n",
            field("site"),
            field("name"),
            field("engine"),
            field("state"),
            field("tokens_per_second"),
            field("share")
        ));
    }
    text
}
