//! The invariants of a lab that has ended: event logs of all processes, checkpoints on all disks, the coordinator's durable log.

use super::crew::Incidents;
use crate::failure::Failure;
use base::layout::{CHECKPOINTS_FOLDER, EVENTS_FILE};
use coordinator::Line;
use rounds::coordinator::{Committed, Record};
use rounds::{Ledger, SampleRange};
use std::path::Path;
use telemetry::{Circumstances, Finding, ProcessLog, RunLogs, audit};

/// Words of a panic on standard error.
const PANIC: &str = "panicked at";

/// What event logs leave open of I2 and I3: what the log on the coordinator's disk says.
const LOG_LIMITS: &str = "what engines really trained on: ranges are the coordinator's";

/// Reads what everybody wrote. Sites are in the order of their names.
pub(super) fn read_logs(run: &Path, folder: &Path, sites: &[&str]) -> Result<RunLogs, Failure> {
    let coordinator = ProcessLog::read("coordinator", &run.join(EVENTS_FILE))?;
    let site = |name: &&str| ProcessLog::read(name, &folder.join(name).join(EVENTS_FILE));
    Ok(RunLogs { coordinator, sites: sites.iter().map(site).collect::<Result<_, _>>()? })
}

/// Checks the invariants. `healed`: when the last fault was mended, and how long the next commit may take then.
pub(super) fn check(
    (run, folder): (&Path, &Path),
    sites: &[&str],
    logs: &RunLogs,
    incidents: &Incidents,
    healed: Option<(u64, f64)>,
) -> Vec<Finding> {
    let mut circumstances =
        Circumstances { healed, ended_badly: incidents.ended_badly.clone(), ..Circumstances::default() };
    circumstances.ended_badly.extend(panics(folder));
    for site in sites {
        load_checkpoints(&folder.join(site).join(CHECKPOINTS_FOLDER), &mut circumstances);
    }
    let mut findings = audit(logs, &circumstances);
    findings.push(check_log(run));
    findings
}

fn panics(folder: &Path) -> Vec<String> {
    let logs = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let logs = logs.filter(|path| path.extension().is_some_and(|extension| extension == "log"));
    let panicked = |path: &std::path::PathBuf| std::fs::read_to_string(path).is_ok_and(|text| text.contains(PANIC));
    logs.filter(panicked).map(|path| format!("{}: a process panicked", path.display())).collect()
}

/// Loads each checkpoint, with all its hashes.
fn load_checkpoints(root: &Path, circumstances: &mut Circumstances) {
    // A site that has not saved has no folder.
    for entry in checkpoint::list(root).unwrap_or_default() {
        match checkpoint::load::<serde_json::Value>(&entry.path) {
            Ok(_) => circumstances.checkpoints_loaded += 1,
            Err(error) => circumstances.checkpoints_unreadable.push(error.to_string()),
        }
    }
}

/// The log that decisions are in before they have an effect: every commit, also one that no event tells of.
fn check_log(run: &Path) -> Finding {
    let mut finding = Finding {
        invariant: "I2, I3 on disk",
        checked: 0,
        what: "commits in the coordinator's durable log, with the ledger after each",
        violations: Vec::new(),
        limits: LOG_LIMITS,
    };
    let lines = match coordinator::open_log(run) {
        Ok((_store, lines)) => lines,
        Err(error) => {
            finding.violations.push(error.to_string());
            return finding;
        }
    };
    let mut last: Option<Box<Committed>> = None;
    let mut history: Vec<Box<Committed>> = Vec::new();
    for line in lines {
        match line {
            Line::Decision(Record::Committed(committed)) => {
                finding.checked += 1;
                finding.violations.extend(compare(last.as_deref(), &committed).err());
                history.push(committed.clone());
                last = Some(committed);
            }
            Line::Decision(Record::RolledBack { to }) => {
                history.retain(|committed| committed.commit.round <= to);
                last = history.last().cloned();
            }
            _ => {}
        }
    }
    finding
}

/// Whether a commit follows the one before it, and its ledger adds up and has lost nothing that was committed.
fn compare(before: Option<&Committed>, committed: &Committed) -> Result<(), String> {
    let (round, ledger) = (committed.commit.round, &committed.ledger);
    let in_round = |problem: String| format!("round {round}: {problem}");
    ledger.audit().map_err(in_round)?;
    let samples = |ledger: &Ledger| ledger.committed().iter().map(SampleRange::samples).sum::<u64>();
    if samples(ledger) != ledger.totals().committed {
        let (ranges, sum) = (samples(ledger), ledger.totals().committed);
        return Err(in_round(format!("{sum} samples were committed, in ranges of {ranges}: some twice")));
    }
    let last = before.map_or(base::Round(0), |before| before.commit.round);
    if round != last.next() {
        return Err(in_round(format!("follows round {last}")));
    }
    let Some(before) = before else { return Ok(()) };
    if committed.commit.term < before.commit.term {
        return Err(in_round(format!("term {} after term {}", committed.commit.term, before.commit.term)));
    }
    let holds = |range: &SampleRange| {
        ledger.committed().iter().any(|other| other.start <= range.start && range.end <= other.end)
    };
    match before.ledger.committed().iter().find(|range| !holds(range)) {
        Some(range) => Err(in_round(format!("samples {}..{} are not committed any more", range.start, range.end))),
        None => Ok(()),
    }
}
