//! `beringia plan --check RUN`: what the plan would have said of a run, beside what its event log says happened.
//!
//! Predicted from what was known before the first round: the sites' speeds as each measured itself alone, run.toml, and the links of a cluster file.
//! ```text
//! step     samples of a step over the sum of speeds, in whole samples         planner::wan::compute_seconds
//! stall    what coding, transfer and delay take longer than tau steps         rounds::stall, as the adaptive settings have it
//! bytes    deltas of the round's fragment, each to every other site           rounds::Settings::delta_bytes
//! ```
//! Measured from the first lease to the last commit; bytes as the receivers counted them.

use crate::failure::Failure;
use crate::output::Output;
use base::SiteId;
use base::config::Strategy;
use planner::search::Links;
use planner::units::Seconds;
use planner::wan::{Link, compute_seconds};
use rounds::schedule::fragment_of;
use rounds::stall::{Conditions, RoundShape, round_time};
use rounds::{FragmentPlan, Settings};
use serde_json::json;
use site::RunFolder;
use std::collections::BTreeMap;
use std::path::Path;
use telemetry::{Event, Record};

/// Messages that cross a link with nothing but delay between a snapshot and its merge: report, commit, request.
const MESSAGES: f64 = 1.5;

/// Encoding, checking and merging of a value of one delta: 2 GB/s of f32, as `planner::search::between` takes it.
const HOST_SECONDS_PER_ELEMENT: f64 = 2e-9;

/// One round of a run.
#[derive(Debug, Clone, Default)]
struct Round {
    /// Samples leased.
    samples: u64,
    sites: usize,
    /// Inner steps.
    steps: u64,
    committed: bool,
    bytes: u64,
}

/// What the log of a run says.
#[derive(Debug, Default)]
struct Measured {
    speeds: BTreeMap<SiteId, f64>,
    rounds: BTreeMap<u64, Round>,
    tokens: u64,
    seconds: f64,
    sharded: bool,
    changed: bool,
}

/// Runs the check and prints both sides.
pub(super) fn run(folder: &Path, links: Option<&Links>, output: &Output) -> Result<(), Failure> {
    let run = RunFolder::new(folder);
    let (config, _) = run.config()?;
    let records: Result<Vec<Record>, _> = telemetry::read(&run.events())?.collect();
    let measured = Measured::of(&records?);
    if measured.tokens == 0 || measured.seconds <= 0.0 || measured.speeds.is_empty() {
        let message = format!("{} has no committed round of a site that measured its speed", run.events().display());
        return Err(Failure::new(
            message,
            "name the folder of the run that the coordinator served, after its first rounds",
        ));
    }
    let settings = Settings::new(&config);
    let predicted = predict(&settings, &measured, links);
    report(&predicted, &measured, links.is_some(), output);
    Ok(())
}

impl Measured {
    fn of(records: &[Record]) -> Self {
        let mut found = Self::default();
        let mut began = None;
        for record in records {
            match &record.event {
                Event::SiteReady { site, tokens_per_second } => {
                    found.speeds.entry(*site).or_insert(*tokens_per_second);
                }
                Event::RoundStarted { round, leases, .. } => {
                    began.get_or_insert(record.unix_ms);
                    let entry = found.rounds.entry(round.0).or_default();
                    entry.samples = leases.iter().map(|lease| lease.end - lease.start).sum();
                    entry.sites = leases.len();
                    entry.steps = leases.iter().map(|lease| lease.steps).max().unwrap_or(0);
                }
                Event::DeltaFetched { round, bytes, .. } => found.rounds.entry(round.0).or_default().bytes += bytes,
                Event::RoundCommitted { round, contributors, .. } => {
                    found.rounds.entry(round.0).or_default().committed = true;
                    found.tokens += contributors.iter().map(|contributor| contributor.tokens).sum::<u64>();
                    found.seconds = began.map_or(0.0, |began| record.unix_ms.saturating_sub(began) as f64 / 1e3);
                }
                Event::ExchangeChosen { exchange, .. } => found.sharded = exchange == "sharded",
                Event::SettingsChanged { .. } => found.changed = true,
                _ => {}
            }
        }
        found
    }

    fn committed(&self) -> impl Iterator<Item = (u64, &Round)> {
        self.rounds.iter().filter(|(_, round)| round.committed).map(|(number, round)| (*number, round))
    }

    fn bytes(&self) -> u64 {
        self.committed().map(|(_, round)| round.bytes).sum()
    }
}

#[derive(Debug, Clone, Copy)]
struct Predicted {
    tokens_per_second: f64,
    bytes: f64,
    utilisation: f64,
}

fn predict(settings: &Settings, measured: &Measured, links: Option<&Links>) -> Predicted {
    let tokens_per_sample = settings.sequence_length as f64;
    let speeds: Vec<f64> = measured.speeds.values().map(|tokens| tokens / tokens_per_sample).collect();
    let (mut seconds, mut compute, mut bytes) = (0.0, 0.0, 0.0);
    for (number, round) in measured.committed() {
        let plan = FragmentPlan {
            index: fragment_of(base::Round(number), settings.sync.fragments),
            count: settings.sync.fragments,
            codec: settings.sync.codec,
            rank: 0,
        };
        let delta = settings.delta_bytes(plan);
        let others = (round.sites as f64 - 1.0).max(0.0);
        // In a sharded round each site receives a slice of every delta, and every other's merged slice.
        let copies = if measured.sharded { 2.0 * others / (round.sites as f64).max(1.0) } else { others };
        bytes += delta as f64 * copies * round.sites as f64;
        if round.samples == 0 {
            continue;
        }
        let step = compute_seconds(&speeds, round.samples).0 / round.steps.max(1) as f64;
        let link = links.and_then(|links| narrowest(links, round.sites));
        let conditions = Conditions {
            step_seconds: step,
            seconds_per_byte: link.map_or(0.0, |link| copies / others.max(1.0) / link.throughput(link.up).0),
            latency_seconds: link.map_or(0.0, |link| link.round_trip.0 * MESSAGES),
            host_seconds_per_element: HOST_SECONDS_PER_ELEMENT * round.sites as f64,
        };
        let shape = RoundShape {
            steps: round.steps,
            overlap_steps: if settings.sync.strategy == Strategy::Streaming { settings.sync.overlap_steps } else { 0 },
            elements: settings.elements(plan),
            encoded_bytes: delta,
        };
        let time = round_time(&shape, &conditions);
        compute += time.compute_seconds;
        seconds += time.compute_seconds + time.stall_seconds;
    }
    Predicted {
        tokens_per_second: measured.tokens as f64 / f64::max(seconds, f64::MIN_POSITIVE),
        bytes,
        utilisation: compute / f64::max(seconds, f64::MIN_POSITIVE),
    }
}

/// The thinnest of the links and the longest delay among so many sites.
fn narrowest(links: &Links, sites: usize) -> Option<Link> {
    let pairs = (0..sites).flat_map(|one| (one + 1..sites).map(move |other| (one, other)));
    pairs.filter_map(|(one, other)| links.between(one, other)).reduce(|worst, link| {
        let thinner = if link.throughput(link.up).0 < worst.throughput(worst.up).0 { link } else { worst };
        Link { round_trip: Seconds(worst.round_trip.0.max(link.round_trip.0)), ..thinner }
    })
}

fn report(predicted: &Predicted, measured: &Measured, linked: bool, output: &Output) {
    let (tokens, bytes) = (measured.tokens as f64 / measured.seconds, measured.bytes() as f64);
    let percent =
        |predicted: f64, measured: f64| if measured == predicted { 0.0 } else { 100.0 * (predicted / measured - 1.0) };
    let rounds = measured.committed().count();
    output.object(&json!({
        "rounds": rounds,
        "seconds": measured.seconds,
        "tokens_per_second": { "predicted": predicted.tokens_per_second, "measured": tokens, "difference_percent": percent(predicted.tokens_per_second, tokens) },
        "bytes": { "predicted": predicted.bytes, "measured": bytes, "difference_percent": percent(predicted.bytes, bytes) },
        "utilisation_predicted": predicted.utilisation,
        "links_known": linked,
    }));
    output.line(format_args!(
        "{rounds} rounds in {:.1} s          predicted       measured  difference",
        measured.seconds
    ));
    for (name, predicted, measured) in
        [("tokens/s", predicted.tokens_per_second, tokens), ("bytes", predicted.bytes, bytes)]
    {
        output.line(format_args!(
            "{name:<24} {predicted:>14.0} {measured:>14.0} {:>+10.1} %",
            percent(predicted, measured)
        ));
    }
    output.line(format_args!("of the time in inner steps, predicted: {:.1} %", 100.0 * predicted.utilisation));
    if !linked {
        output.line("the links were taken as free: name them with --cluster");
    }
    if measured.changed {
        output.line("settings changed during the run: the prediction is of those it began with");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use base::{ContentHash, Round as RoundNumber, Term};
    use telemetry::LeaseShare;
    use telemetry::event::{Contributor, EVENT_VERSION};

    fn record(unix_ms: u64, event: Event) -> Record {
        Record { v: EVENT_VERSION, seq: 0, unix_ms, source: "coordinator".to_owned(), event }
    }

    fn lease(site: u32, start: u64, end: u64) -> LeaseShare {
        LeaseShare {
            site: SiteId(site),
            start,
            end,
            steps: 10,
            samples_per_step: 6,
            samples: 90,
            ranges: Vec::new(),
            share: 0.5,
        }
    }

    fn settings() -> Settings {
        let shape = base::ModelShape {
            vocab_size: 300,
            hidden_size: 32,
            intermediate_size: 48,
            num_hidden_layers: 2,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            max_position_embeddings: 64,
            rope_theta: 10_000.0,
            rms_norm_eps: 1e-5,
            tie_word_embeddings: true,
        };
        Settings::new(&base::RunConfig::new("check", shape))
    }

    /// One round of two sites of 300 and 600 tokens a second, 90 samples in 10 steps, that took a second more than computing does.
    fn one_round(settings: &Settings) -> Measured {
        let ready = |site, speed| Event::SiteReady { site: SiteId(site), tokens_per_second: speed };
        let round = RoundNumber(1);
        let fragments = settings.sync.fragments;
        let index = fragment_of(round, fragments);
        let plan = FragmentPlan { index, count: fragments, codec: settings.sync.codec, rank: 0 };
        let bytes = settings.delta_bytes(plan);
        let fetched = |from| Event::DeltaFetched { round, from_site: SiteId(from), bytes, seconds: 0.1 };
        let contributor = |site, tokens| Contributor { site: SiteId(site), tokens, weight: 0.5 };
        let per_sample = settings.sequence_length;
        Measured::of(&[
            record(0, ready(0, 300.0)),
            record(0, ready(1, 600.0)),
            record(
                1_000,
                Event::RoundStarted { round, term: Term(1), leases: vec![lease(0, 0, 30), lease(1, 30, 90)] },
            ),
            record(2_000, fetched(0)),
            record(2_000, fetched(1)),
            record(
                2_000 + per_sample * 100,
                Event::RoundCommitted {
                    round,
                    term: Term(1),
                    contributors: vec![contributor(0, 30 * per_sample), contributor(1, 60 * per_sample)],
                    cursor: 90,
                    state_hash: ContentHash::of(b"state"),
                    seconds: 1.0,
                    tokens_total: 90 * per_sample,
                },
            ),
        ])
    }

    #[test]
    fn a_round_that_went_as_planned_has_no_difference() {
        let settings = settings();
        let measured = one_round(&settings);
        let predicted = predict(&settings, &measured, None);
        assert_eq!(predicted.bytes, measured.bytes() as f64);
        // 90 samples at 900 tokens a second, and a little host work; the run took one second more.
        let seconds = measured.tokens as f64 / predicted.tokens_per_second;
        let computing = 90.0 * settings.sequence_length as f64 / 900.0;
        assert!(seconds >= computing && seconds < computing + 0.5, "{seconds} {computing}");
        assert!((measured.seconds - computing - 1.0).abs() < 1e-9, "{}", measured.seconds);
    }

    #[test]
    fn a_thin_link_predicts_a_slower_run() {
        let settings = settings();
        let measured = one_round(&settings);
        let link = Link { round_trip: Seconds(0.05), streams: 8.0, ..Link::ideal(planner::units::BitsPerSecond(1e4)) };
        let (free, thin) =
            (predict(&settings, &measured, None), predict(&settings, &measured, Some(&Links::all(link))));
        assert!(thin.tokens_per_second < 0.9 * free.tokens_per_second && thin.bytes == free.bytes, "{thin:?} {free:?}");
    }
}
