//! What the lab found, for people and as JSON.

use super::crew::Incidents;
use super::faults::{FaultReport, Faults, median, observe};
use super::wan::LinkReport;
use super::{Lab, Watched};
use crate::output::Output;
use base::ContentHash;
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::PathBuf;
use telemetry::view::SiteView;
use telemetry::{Event, Finding, Record, RunLogs};

/// One site of the report.
#[derive(Debug, Clone, Serialize)]
struct SiteReport {
    name: String,
    engine: String,
    device: Option<String>,
    precision: Option<String>,
    threads: u64,
    slowdown: f64,
    /// Tokens committed over the time of training.
    tokens_per_second: f64,
    /// The same site alone.
    tokens_per_second_alone: f64,
    /// Part of all committed tokens.
    share: f64,
    /// Time in inner steps.
    compute_seconds: f64,
    /// The rest of the rounds' time: exchange, outer step, waiting for others.
    idle_seconds: f64,
    bytes_sent: u64,
    /// Tokens a second together over alone.
    utilisation: f64,
    hash: Option<ContentHash>,
}

/// The report; `--json` prints it as it is.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Report {
    sites: Vec<SiteReport>,
    /// With `--link`: every direction, by pair.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    links: Vec<LinkReport>,
    rounds: u64,
    tokens: u64,
    seconds: f64,
    tokens_per_second: f64,
    utilisation: f64,
    pub(super) identical: bool,
    state_hash: Option<ContentHash>,
    validation_bits_per_byte_start: Option<f64>,
    validation_bits_per_byte_end: Option<f64>,
    bigram_bits_per_byte: Option<f64>,
    ledger: telemetry::LedgerCounts,
    folder: PathBuf,
    /// With faults: what they were, and what they did.
    #[serde(skip_serializing_if = "Option::is_none")]
    faults: Option<FaultSection>,
    /// I1 to I7, as far as what was written shows them.
    invariants: Vec<Finding>,
    pub(super) verdict: String,
}

/// What went wrong, on purpose and otherwise.
#[derive(Debug, Clone, Serialize)]
pub(super) struct FaultSection {
    /// Of `--chaos`.
    #[serde(skip_serializing_if = "Option::is_none")]
    chaos_seed: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    chaos_seconds: Option<f64>,
    restart_after_seconds: f64,
    each: Vec<FaultReport>,
    /// Not done, because the run was about to end.
    left_out: Vec<String>,
    /// Processes that ended although nobody ended them.
    ended_badly: Vec<String>,
    /// From the start of a site's process until it has a part in a round; median.
    site_rejoin_seconds: Option<f64>,
    /// From a site's end to the next commit with a delta of everybody; median.
    site_joint_commit_seconds: Option<f64>,
    /// From the start of the coordinator's process to its next commit; median.
    coordinator_commit_seconds: Option<f64>,
    /// The longest that a site which was not hit stood still.
    stall_seconds: Option<f64>,
    /// What a newcomer fetches.
    state_bytes: u64,
    /// What that takes alone over the slowest of the same links.
    transfer_seconds: Option<f64>,
    site_rejoin_transfers: Option<f64>,
    coordinator_commit_transfers: Option<f64>,
}

impl FaultSection {
    pub(super) fn new(
        faults: &Faults,
        incidents: &Incidents,
        logs: &RunLogs,
        (state_bytes, transfer_seconds): (u64, Option<f64>),
    ) -> Self {
        let each = observe(&incidents.observed, logs);
        let median_of = |concerns: &str, figure: fn(&FaultReport) -> Option<f64>| {
            median(&each.iter().filter(|report| report.is_of(concerns)).filter_map(figure).collect::<Vec<_>>())
        };
        let site_rejoin_seconds = median_of("site", |report| report.rejoin_seconds);
        let coordinator_commit_seconds = median_of("coordinator", |report| report.next_commit_seconds);
        let transfers = |seconds: Option<f64>| Some(seconds? / transfer_seconds?);
        Self {
            chaos_seed: faults.chaos.map(|(seed, _)| seed),
            chaos_seconds: faults.chaos.map(|(_, period)| period),
            restart_after_seconds: faults.restart_after.as_secs_f64(),
            left_out: incidents.left_out.clone(),
            ended_badly: incidents.ended_badly.clone(),
            site_rejoin_seconds,
            site_joint_commit_seconds: median_of("site", |report| report.joint_commit_seconds),
            coordinator_commit_seconds,
            stall_seconds: each.iter().filter_map(|report| report.stall_seconds).reduce(f64::max),
            state_bytes,
            transfer_seconds,
            site_rejoin_transfers: transfers(site_rejoin_seconds),
            coordinator_commit_transfers: transfers(coordinator_commit_seconds),
            each,
        }
    }

    fn print(&self, output: &Output) {
        for fault in &self.each {
            output.line(fault.line());
        }
        for text in &self.left_out {
            output.line(format_args!("left out   {text}: the run was about to end"));
        }
        for text in &self.ended_badly {
            output.line(format_args!("lost       {text}"));
        }
        let seconds = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.2} s"));
        let times = |value: Option<f64>| value.map_or_else(String::new, |value| format!(" ({value:.0} transfers)"));
        output.line(format_args!(
            "recovery   medians: a site's process has a part in a round after {}{}, joint commit {} after a site's end, the \
             coordinator's process commits after {}{}; the state's {:.1} MB alone take {}",
            seconds(self.site_rejoin_seconds),
            times(self.site_rejoin_transfers),
            seconds(self.site_joint_commit_seconds),
            seconds(self.coordinator_commit_seconds),
            times(self.coordinator_commit_transfers),
            self.state_bytes as f64 / 1e6,
            seconds(self.transfer_seconds)
        ));
    }
}

/// One line for an invariant, and one for each violation.
fn print_finding(finding: &Finding, output: &Output) {
    let Finding { invariant, checked, what, violations, .. } = finding;
    let held = match (violations.is_empty(), checked) {
        (false, _) => "VIOLATED",
        (true, 0) => "not shown",
        (true, _) => "held",
    };
    output.line(format_args!("invariant  {invariant:<18} {held:<9} {checked} {what}"));
    for violation in violations {
        output.line(format_args!("           {violation}"));
    }
}

impl Report {
    /// What `lab` saw, with each site's speed alone.
    pub(super) fn new(
        lab: &Lab,
        watched: &Watched,
        span: &TrainingSpan,
        alone: &[f64],
        (links, faults, invariants): (Vec<LinkReport>, Option<FaultSection>, Vec<Finding>),
    ) -> Self {
        let view = watched.watch.view();
        let tokens: u64 = span.tokens.iter().sum();
        let sites: Vec<SiteReport> = (0..lab.sites.len()).map(|index| site(lab, watched, span, alone, index)).collect();
        let first = sites.first().and_then(|site| site.hash);
        let identical = first.is_some() && sites.iter().all(|site| site.hash == first);
        let validation = view.validation.as_ref();
        let tokens_per_second = tokens as f64 / span.seconds.max(1e-9);
        let mut report = Self {
            sites,
            links,
            rounds: view.round.0,
            tokens,
            seconds: span.seconds,
            tokens_per_second,
            utilisation: tokens_per_second / alone.iter().sum::<f64>(),
            identical,
            state_hash: view.state_hash,
            validation_bits_per_byte_start: validation.map(|validation| validation.bits_per_byte_start),
            validation_bits_per_byte_end: validation.map(|validation| validation.bits_per_byte),
            bigram_bits_per_byte: validation.map(|validation| validation.bigram_bits_per_byte),
            ledger: view.ledger,
            folder: lab.folder.clone(),
            faults,
            invariants,
            verdict: String::new(),
        };
        report.verdict = verdict(&report);
        report
    }

    /// Whether all sites end with one model, and no invariant was violated.
    pub(super) fn is_good(&self) -> bool {
        self.identical && self.invariants.iter().all(Finding::is_held)
    }

    /// For people.
    pub(super) fn print(&self, output: &Output) {
        output.line("");
        output.line("site     engine        tokens/s   alone  share   idle  of alone     sent  state");
        for site in &self.sites {
            output.line(site.line());
        }
        for link in &self.links {
            output.line(link.line());
        }
        let number = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.3}"));
        output.line(format_args!(
            "validation {} bits/byte at the start, {} at the end, a bigram model has {}",
            number(self.validation_bits_per_byte_start),
            number(self.validation_bits_per_byte_end),
            number(self.bigram_bits_per_byte)
        ));
        let telemetry::LedgerCounts { leased, committed, returned, lost } = self.ledger;
        output
            .line(format_args!("samples    leased {leased}, committed {committed}, returned {returned}, lost {lost}"));
        if let Some(faults) = &self.faults {
            faults.print(output);
        }
        self.invariants.iter().for_each(|finding| print_finding(finding, output));
        output.line(format_args!("try        beringia sample {}/site-a \"fn main\"", self.folder.display()));
        output.line(&self.verdict);
    }
}

fn site(lab: &Lab, watched: &Watched, span: &TrainingSpan, alone: &[f64], index: usize) -> SiteReport {
    let (spec, outcome) = (&lab.sites[index], &watched.outcomes[index]);
    let id = outcome["site"].as_u64().unwrap_or(index as u64);
    let tokens = span.tokens.get(id as usize).copied().unwrap_or_default();
    let tokens_per_second = tokens as f64 / span.seconds.max(1e-9);
    let seen: Option<&SiteView> = watched.watch.view().sites.values().find(|seen| u64::from(seen.site.0) == id);
    SiteReport {
        name: spec.name.clone(),
        engine: spec.engine.clone(),
        device: seen.and_then(|seen| seen.device.clone()),
        precision: seen.and_then(|seen| seen.precision.clone()),
        threads: lab.threads(spec) as u64,
        slowdown: spec.slowdown,
        tokens_per_second,
        tokens_per_second_alone: alone[index],
        share: tokens as f64 / span.tokens.iter().sum::<u64>().max(1) as f64,
        compute_seconds: seen.map_or(0.0, |seen| seen.compute_seconds),
        idle_seconds: seen.map_or(0.0, |seen| seen.idle_seconds),
        bytes_sent: outcome["bytes_sent"].as_u64().unwrap_or_default(),
        utilisation: tokens_per_second / alone[index],
        hash: outcome["state_hash"].as_str().and_then(|text| text.parse().ok()),
    }
}

impl SiteReport {
    fn line(&self) -> String {
        let span_seconds = self.compute_seconds + self.idle_seconds;
        format!(
            "{:<8} {:<12} {:>9.0} {:>7.0} {:>5.1}% {:>5.1}% {:>8.1}% {:>6.1}MB  {}",
            self.name,
            self.engine,
            self.tokens_per_second,
            self.tokens_per_second_alone,
            100.0 * self.share,
            100.0 * self.idle_seconds / span_seconds.max(1e-9),
            100.0 * self.utilisation,
            self.bytes_sent as f64 / 1e6,
            self.hash.map_or_else(|| "-".to_owned(), |hash| hash.short())
        )
    }
}

/// The time from the first lease to the last commit, and each site's committed tokens in it.
pub(super) struct TrainingSpan {
    seconds: f64,
    tokens: Vec<u64>,
    /// Between neighbouring commits.
    gaps_seconds: Vec<f64>,
}

impl TrainingSpan {
    pub(super) fn of(records: &[Record]) -> Self {
        let (mut began, mut times) = (None, Vec::new());
        // By round, so that one that is void is forgotten.
        let mut rounds = BTreeMap::new();
        for record in records {
            match &record.event {
                Event::RoundStarted { .. } => {
                    began.get_or_insert(record.unix_ms);
                }
                Event::RoundClosed { round, contributors, .. } => {
                    times.push(record.unix_ms);
                    rounds.insert(*round, contributors);
                }
                Event::RolledBack { to, .. } => {
                    rounds.split_off(&to.next());
                }
                _ => {}
            }
        }
        let mut tokens = Vec::new();
        for contributor in rounds.values().copied().flatten() {
            let index = contributor.site.0 as usize;
            tokens.resize(tokens.len().max(index + 1), 0);
            tokens[index] += contributor.tokens;
        }
        let seconds = |from: u64, to: u64| to.saturating_sub(from) as f64 / 1e3;
        let last = times.last().copied();
        Self {
            seconds: began.zip(last).map_or(0.0, |(began, last)| seconds(began, last)),
            tokens,
            gaps_seconds: times.windows(2).map(|pair| seconds(pair[0], pair[1])).collect(),
        }
    }

    /// What a round usually takes.
    pub(super) fn round_seconds(&self) -> f64 {
        median(&self.gaps_seconds).unwrap_or(self.seconds)
    }
}

/// The result in words.
fn verdict(report: &Report) -> String {
    let sites = report.sites.len();
    let violated: Vec<&str> =
        report.invariants.iter().filter(|finding| !finding.is_held()).map(|finding| finding.invariant).collect();
    if !violated.is_empty() {
        return format!("VIOLATED: {}", violated.join(", "));
    }
    if !report.identical {
        return format!("NOT IDENTICAL: the {sites} sites do not end with the same model");
    }
    let learned = match (report.validation_bits_per_byte_end, report.bigram_bits_per_byte) {
        (Some(model), Some(bigram)) if model < bigram => {
            format!("{:.1} % under a bigram model", 100.0 * (1.0 - model / bigram))
        }
        (Some(_), Some(_)) => "not yet better than a bigram model: give it more --minutes".to_owned(),
        _ => "not validated".to_owned(),
    };
    format!(
        "one model, bit for bit the same on {sites} site(s) after {} rounds; {learned}; {:.0} % of what the sites do alone",
        report.rounds,
        100.0 * report.utilisation
    )
}
