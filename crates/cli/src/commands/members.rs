//! `beringia members`, `admit` and `revoke`: who takes part in a run, told to its coordinator through the run's folder. The coordinator need
//! not be at work: it reads this when it starts, and once a second.

use super::serve::{SECONDS_PER_HOUR, hours};
use crate::failure::Failure;
use crate::output::Output;
use coordinator::{AccessFolder, Member};
use serde_json::json;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

/// Characters of a fingerprint that are shown, and that are enough to name one.
const FINGERPRINT_CHARACTERS: usize = 16;

/// Show the machines that a run has admitted
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Folder of the run, on the coordinator's machine.
    run: PathBuf,
}

/// Make an invite that admits one machine
#[derive(Debug, clap::Args)]
pub(crate) struct AdmitArgs {
    /// Folder of the run, on the coordinator's machine.
    run: PathBuf,
    /// Hours for which it is valid.
    #[arg(long, value_name = "H", default_value_t = 24.0, value_parser = hours)]
    hours: f64,
}

/// Shut a machine out of a run, at once and for good
#[derive(Debug, clap::Args)]
pub(crate) struct RevokeArgs {
    /// Folder of the run, on the coordinator's machine.
    run: PathBuf,
    /// Number or name of the site, or the start of its fingerprint, as `beringia members` shows them.
    member: String,
}

/// Runs `members`.
pub(crate) fn run(args: Args, output: &Output) -> Result<(), Failure> {
    let members = AccessFolder::of(&args.run).members()?;
    output.object(&json!({ "members": members.iter().map(object).collect::<Vec<_>>() }));
    output.line(format_args!("{:>4}  {:24}{:18}  state", "site", "name", "fingerprint"));
    for member in &members {
        let fingerprint = short(member);
        output.line(format_args!("{:>4}  {:24}{fingerprint:18}  {}", member.site.0, member.name, state(member)));
    }
    Ok(())
}

/// Runs `admit`.
pub(crate) fn admit(args: AdmitArgs, output: &Output) -> Result<(), Failure> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let ends = now + (args.hours * SECONDS_PER_HOUR) as u64;
    let invite = AccessFolder::of(&args.run).admit(ends)?.to_string();
    output.object(&json!({ "invite": invite, "ends_unix_seconds": ends }));
    output.line(format_args!("for one machine, within {} hours:\n\n  beringia join {invite}\n", args.hours));
    Ok(())
}

/// Runs `revoke`.
pub(crate) fn revoke(args: RevokeArgs, output: &Output) -> Result<(), Failure> {
    let folder = AccessFolder::of(&args.run);
    let members = folder.members()?;
    let named = |member: &&Member| {
        let (number, fingerprint) = (member.site.0.to_string(), member.fingerprint.to_string());
        let is_start = args.member.len() >= FINGERPRINT_CHARACTERS / 2 && fingerprint.starts_with(&args.member);
        args.member == number || args.member == member.name || is_start
    };
    let found: Vec<&Member> = members.iter().filter(named).collect();
    let [member] = found[..] else {
        let message = match found.len() {
            0 => format!("no member of this run is '{}'", args.member),
            count => format!("{count} members of this run are '{}'", args.member),
        };
        let hint = format!("name one by its number or fingerprint: `beringia members {}`", args.run.display());
        return Err(Failure::new(message, hint));
    };
    folder.revoke(member.fingerprint)?;
    output.object(&object(member));
    output.line(format_args!("site {} ({}, {}) is shut out", member.site.0, member.name, short(member)));
    Ok(())
}

fn object(member: &Member) -> serde_json::Value {
    let Member { site, name, fingerprint, connected, revoked } = member;
    json!({ "site": site, "name": name, "fingerprint": fingerprint, "connected": connected, "revoked": revoked })
}

fn short(member: &Member) -> String {
    member.fingerprint.to_string().chars().take(FINGERPRINT_CHARACTERS).collect()
}

fn state(member: &Member) -> &'static str {
    match (member.revoked, member.connected) {
        (true, _) => "revoked",
        (false, true) => "here",
        (false, false) => "away",
    }
}
