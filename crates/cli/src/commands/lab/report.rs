//! What the lab found, for people and as JSON.

use super::wan::LinkReport;
use super::{Lab, Watched};
use crate::output::Output;
use base::ContentHash;
use serde::Serialize;
use std::path::PathBuf;
use telemetry::view::SiteView;
use telemetry::{Event, Record};

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
    pub(super) verdict: String,
}

impl Report {
    /// What `lab` saw, with each site's speed alone.
    pub(super) fn new(
        lab: &Lab,
        watched: &Watched,
        span: &TrainingSpan,
        alone: &[f64],
        links: Vec<LinkReport>,
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
            verdict: String::new(),
        };
        report.verdict = verdict(&report);
        report
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
}

impl TrainingSpan {
    pub(super) fn of(records: &[Record]) -> Self {
        let mut span = Self { seconds: 0.0, tokens: Vec::new() };
        let mut began = None;
        for record in records {
            match &record.event {
                Event::RoundStarted { .. } => {
                    began.get_or_insert(record.unix_ms);
                }
                Event::RoundCommitted { contributors, .. } => {
                    span.seconds = began.map_or(0.0, |began| record.unix_ms.saturating_sub(began) as f64 / 1e3);
                    for contributor in contributors {
                        let index = contributor.site.0 as usize;
                        span.tokens.resize(span.tokens.len().max(index + 1), 0);
                        span.tokens[index] += contributor.tokens;
                    }
                }
                _ => {}
            }
        }
        span
    }
}

/// The result in words.
fn verdict(report: &Report) -> String {
    let sites = report.sites.len();
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
