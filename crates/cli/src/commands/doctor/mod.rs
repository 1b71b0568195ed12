//! `beringia doctor`: is this machine, and with an invite the pair of it and the coordinator, fit for a run? Before any
//! compute is spent, within 20 s.
//!
//! It judges and changes nothing: a probe becomes no site, and what it writes to the disk it removes.

mod cards;
mod check;
mod clock;
mod machine;
mod numerics;
mod pair;

pub(crate) use numerics::reference_here;

use super::devices::{self, Inventory};
use crate::engines::EngineArgs;
use crate::failure::Failure;
use crate::invites::invite_of;
use crate::output::Output;
use crate::signals::runtime;
use check::{Check, Status};
use clock::Clocks;
use numerics::{Comparison, Results};
use pair::{Budget, Pair};
use std::path::Path;
use std::sync::mpsc;
use wire::Invite;

/// The whole command; starting and printing take what is left of 20 s.
const SECONDS_MAX: f64 = 19.0;

/// The own engine's numbers are waited for this long before the network is measured, so that one does not slow the other
/// down: enough for every engine but one that has to start a process first.
const NUMERICS_SECONDS: f64 = 3.0;

/// A disk or a name service that takes longer hangs.
const SLOW_SECONDS: f64 = 4.0;

/// Check this machine or, given an invite, the way to the coordinator, and compare their numbers
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The invite that `beringia serve` or `admit` printed, or `@FILE` or `-`.
    invite: Option<String>,
    /// The host that you mean to advertise, to see which network card it is.
    #[arg(long, value_name = "HOST")]
    advertise: Option<String>,
    #[command(flatten)]
    engine: EngineArgs,
}

/// Work on a thread of its own; it may hang in a driver without holding up anything else.
struct Background<T>(mpsc::Receiver<T>);

impl<T: Send + 'static> Background<T> {
    fn start(work: impl FnOnce() -> T + Send + 'static) -> Self {
        let (sender, receiver) = mpsc::sync_channel(1);
        std::thread::spawn(move || {
            // Nobody waits any more where the time was over.
            let _late = sender.send(work());
        });
        Self(receiver)
    }

    /// The result, unless it takes longer than that or the work panicked.
    fn wait(&self, budget: Budget, seconds_max: f64) -> Option<T> {
        self.0.recv_timeout(budget.left(seconds_max)).ok()
    }
}

/// Everything that was found.
struct Findings {
    checks: Vec<Check>,
    inventory: Option<Inventory>,
    comparison: Option<Comparison>,
}

/// Runs the command. It ends the process by itself where a check failed: the report is the command's one object, and a
/// thread that hangs in a driver must not keep it.
pub(crate) fn run(args: Args, output: &Output) -> Result<(), Failure> {
    let invite = args.invite.as_deref().map(invite_of).transpose()?;
    let findings = examine(args, invite, output)?;
    let failed = findings.checks.iter().filter(|check| check.status == Status::Failed).count();
    report(&findings, failed, output);
    output.finish()?;
    match failed {
        0 => Ok(()),
        _ => std::process::exit(1),
    }
}

fn examine(args: Args, invite: Option<Invite>, output: &Output) -> Result<Findings, Failure> {
    let (budget, clocks) = (Budget::of(SECONDS_MAX), Clocks::read());
    let Args { engine: engine_args, advertise, .. } = args;
    let (engine, python) = (engine_args.engine.clone(), engine_args.python.clone());
    let numbers = Background::start(move || numerics::compute(&engine_args));
    let inventory = Background::start(move || devices::inventory(None, python.as_deref()));
    let disk = Background::start(|| machine::disk(Path::new(".")));
    let address = Background::start(move || cards::address(advertise.as_deref()));
    let memory = machine::memory();
    let say = |what: &str| output.notice(what);
    say(&format!("comparing the numbers of engine {engine}"));
    let mut results = numbers.wait(budget, NUMERICS_SECONDS);
    let pair = match invite {
        Some(invite) => {
            let expected = numerics::expected();
            let runtime = runtime()?;
            let pair = runtime.block_on(pair::examine(invite, &expected, budget, &say));
            runtime.shutdown_background();
            pair
        }
        None => Pair::default(),
    };
    results = results.or_else(|| numbers.wait(budget, SECONDS_MAX));
    let inventory = inventory.wait(budget, SECONDS_MAX);
    let mut checks = vec![device_check(inventory.as_ref())];
    checks.push(memory);
    checks.push(disk.wait(budget, SLOW_SECONDS).unwrap_or_else(|| {
        Check::failed("disk", "writing and syncing 1 MiB here takes too long", "run it in a folder on a local disk")
    }));
    checks.push(clocks.check());
    checks.push(address.wait(budget, SLOW_SECONDS).unwrap_or_else(|| {
        Check::failed("address", "its name is not resolved in time", "advertise an address instead of a name")
    }));
    checks.extend(pair.checks);
    let (numeric_checks, comparison) = compared(results, pair.reference.as_ref(), &engine);
    checks.extend(numeric_checks);
    Ok(Findings { checks, inventory, comparison })
}

fn compared(
    results: Option<Result<Results, Failure>>,
    reference: Option<&wire::probe::Reference>,
    engine: &str,
) -> (Vec<Check>, Option<Comparison>) {
    match results {
        Some(Ok(results)) => {
            let comparison = Comparison::new(&results, reference);
            (comparison.checks(), Some(comparison))
        }
        Some(Err(failure)) => (vec![Check::of_failure("engine", failure)], None),
        None => {
            let fact = format!("engine '{engine}' gave no numbers in time");
            let hint = "see that its device works at all: `beringia devices`; `--engine flex` runs on any CPU";
            (vec![Check::failed("engine", fact, hint)], None)
        }
    }
}

fn device_check(inventory: Option<&Inventory>) -> Check {
    match inventory {
        Some(inventory) if !inventory.devices.is_empty() => {
            let named = inventory.devices.iter().map(|device| format!("{} ({})", device.info.engine, device.info.name));
            let fact = named.collect::<Vec<_>>().join(", ");
            Check::ok("devices", fact).with("count", inventory.devices.len())
        }
        Some(_) => Check::failed("devices", "no engine has a device here", "`beringia devices` says why"),
        None => {
            let hint = "a driver hangs: see what the maker's own tool says, for example `nvidia-smi` or `vulkaninfo`";
            Check::warning("devices", "the devices could not be listed in time", hint)
        }
    }
}

fn report(findings: &Findings, failed: usize, output: &Output) {
    output.object(&serde_json::json!({
        "ok": failed == 0,
        "version": env!("CARGO_PKG_VERSION"),
        "checks": findings.checks,
        "devices": findings.inventory.as_ref().map(|inventory| &inventory.devices),
        "left_out": findings.inventory.as_ref().map(|inventory| &inventory.left_out),
        "numerics": findings.comparison.as_ref().map(Comparison::to_json),
    }));
    if let Some(comparison) = &findings.comparison {
        output.line(comparison.render());
    }
    for check in &findings.checks {
        output.line(check.render());
    }
    let warnings = findings.checks.iter().filter(|check| check.status == Status::Warning).count();
    let verdict = match (failed, warnings) {
        (0, 0) => "all is well".to_owned(),
        (0, _) => format!("no check failed; {}", crate::format::counted(warnings as u64, "warning")),
        _ => format!("{} failed", crate::format::counted(failed as u64, "check")),
    };
    output.line(format_args!("\n{verdict}"));
}
