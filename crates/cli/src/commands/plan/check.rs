//! `beringia plan --check RUN`: what would have been said of a run before it began, beside what its event log says happened.
//!
//! Predicted from what was known before the first round: the sites' speeds as each measured itself alone, run.toml, and the links: those of a
//! cluster file, or those that a lab has written down. `simulator::fleet` lets the shipped coordinator and members make the same rounds over them
//! in virtual time, with nothing that fails; deltas take their bytes over the links, and the validations of the first site a third of the time
//! of inner steps on as many tokens.
//! Measured from the first plan of a round to the last commit; bytes as the receivers counted them.

use crate::commands::lab::LINKS_FILE;
use crate::commands::lab::wan::{LINKS_FILE_BYTES_MAX, Links as LabLinks};
use crate::failure::Failure;
use crate::output::Output;
use crate::texts;
use base::layout::RUN_FILE;
use base::{RunConfig, SiteId};
use planner::search::Links;
use rounds::Settings;
use serde_json::json;
use simulator::fleet::{Fleet, FleetLink, FleetSite, Rates, Validation, simulate};
use site::RunFolder;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use telemetry::{Event, Record};

/// All that a host does for a delta on one core (subtract, encode, hash, write; read, merge, step, give to the engine): bytes of f32 a second.
/// In labs 0.87 M parameters take 5 ms until they are offered and 8 ms to be merged.
const CODING_BYTES_PER_SECOND: f64 = 3e8;

/// A way that nothing bounds: loopback, bytes a second and seconds.
const LOOPBACK: FleetLink = FleetLink { bytes_per_second: 1e15, round_trip_seconds: 0.0 };

/// Longer than any run: the simulation ends with its last round.
const SECONDS_MAX: f64 = 1e7;

/// A site as it was before the first round.
#[derive(Debug, Clone, Default)]
struct Known {
    name: String,
    tokens_per_second: f64,
}

/// What the log of a run says.
#[derive(Debug, Default)]
struct Measured {
    /// Of the sites that the first round was planned for.
    sites: BTreeMap<SiteId, Known>,
    committed: BTreeSet<u64>,
    bytes_of_round: BTreeMap<u64, u64>,
    tokens: u64,
    seconds: f64,
    settings_changed: bool,
    sites_changed: bool,
}

/// What lies between the sites.
enum Way<'a> {
    /// As a cluster file says; sites in its order.
    Cluster(&'a Links),
    /// As a lab has written down.
    Lab(LabLinks),
    /// Nothing is known of it.
    Free,
}

#[derive(Debug, Clone, Copy, PartialEq)]
struct Predicted {
    tokens_per_second: f64,
    bytes: f64,
    utilisation: f64,
}

/// Runs the check and prints both sides.
pub(super) fn run(folder: &Path, links: Option<&Links>, output: &Output) -> Result<(), Failure> {
    // A lab's folder has the coordinator's in it.
    let inner = folder.join("run");
    let is_lab = !folder.join(RUN_FILE).exists() && inner.join(RUN_FILE).exists();
    let run = RunFolder::new(if is_lab { &inner } else { folder });
    let (config, _) = run.config()?;
    let records: Result<Vec<Record>, _> = telemetry::read(&run.events())?.collect();
    let measured = Measured::of(&records?);
    if measured.tokens == 0 || measured.seconds <= 0.0 || measured.sites.is_empty() {
        let message = format!("{} has no committed round of a site that measured its speed", run.events().display());
        return Err(Failure::new(
            message,
            "name the folder of the run that the coordinator served, after its first rounds",
        ));
    }
    let way = match links {
        Some(links) => Way::Cluster(links),
        None => lab_links(&run, &measured)?,
    };
    let predicted = predict(&config, &measured, &way)?;
    report(&predicted, &measured, !matches!(way, Way::Free), output);
    Ok(())
}

fn lab_links(run: &RunFolder, measured: &Measured) -> Result<Way<'static>, Failure> {
    let path = run.root().join(LINKS_FILE);
    if !path.exists() {
        return Ok(Way::Free);
    }
    let names: Vec<String> = measured.sites.values().map(|site| site.name.clone()).collect();
    let failed = |problem: String| {
        let hint = "remove it, and name the links with --cluster";
        Failure::new(format!("{}: {problem}", path.display()), hint)
    };
    LabLinks::from_toml(&texts::read(&path, LINKS_FILE_BYTES_MAX)?, &names).map(Way::Lab).map_err(failed)
}

impl Measured {
    fn of(records: &[Record]) -> Self {
        let mut found = Self::default();
        let mut began = None;
        for record in records {
            match &record.event {
                Event::SiteJoined { site, name, .. } if began.is_none() => {
                    found.sites.entry(*site).or_default().name.clone_from(name);
                }
                Event::SiteReady { site, tokens_per_second } if began.is_none() => {
                    found.sites.entry(*site).or_default().tokens_per_second = *tokens_per_second;
                }
                Event::SiteJoined { .. } => found.sites_changed = true,
                Event::RoundStarted { leases, .. } if began.is_none() => {
                    began = Some(record.unix_ms);
                    found.sites.retain(|site, _| leases.iter().any(|lease| lease.site == *site));
                }
                Event::DeltaFetched { round, bytes, .. } => *found.bytes_of_round.entry(round.0).or_default() += bytes,
                Event::RoundCommitted { round, tokens_total, .. } => {
                    found.committed.insert(round.0);
                    // A fragment's contributors name the tokens of all steps since its last merge: summed up they would count several times.
                    found.tokens = *tokens_total;
                    found.seconds = began.map_or(0.0, |began| record.unix_ms.saturating_sub(began) as f64 / 1e3);
                }
                Event::SettingsChanged { .. } => found.settings_changed = true,
                _ => {}
            }
        }
        found
    }

    fn bytes(&self) -> u64 {
        self.committed.iter().filter_map(|round| self.bytes_of_round.get(round)).sum()
    }
}

impl Way<'_> {
    /// From one site to another, or from a site to itself, which stands for its way to the coordinator.
    fn between(&self, from: usize, to: usize, sites: usize) -> FleetLink {
        match self {
            Self::Cluster(links) if from != to => links.between(from, to).map_or(LOOPBACK, |link| FleetLink {
                bytes_per_second: link.throughput(link.up.min(link.down)).0,
                round_trip_seconds: link.round_trip.0,
            }),
            Self::Lab(links) => {
                let to = if from == to { sites } else { to };
                let (bytes_per_second, round_trip_seconds) = links.way(from, to);
                FleetLink { bytes_per_second, round_trip_seconds }
            }
            Self::Cluster(_) | Self::Free => LOOPBACK,
        }
    }
}

fn predict(config: &RunConfig, measured: &Measured, way: &Way<'_>) -> Result<Predicted, Failure> {
    let sites = measured.sites.len();
    let site = |known: &Known| FleetSite {
        name: known.name.clone(),
        devices: 1.0,
        replicas: 1.0,
        tokens_per_second: known.tokens_per_second,
        access_bytes_per_second: None,
    };
    let row = |from: usize| (0..sites).map(|to| way.between(from, to, sites)).collect();
    let mut settings = Settings::new(config);
    settings.sites = settings.sites.min(sites as u32);
    // Of a run that was ended early, as many rounds as it made.
    settings.steps_total = settings.steps_total.min(measured.committed.len() as u64 * settings.steps_per_round);
    let fleet = Fleet {
        sites: measured.sites.values().map(site).collect(),
        links: (0..sites).map(row).collect(),
        settings,
        coding_bytes_per_second: CODING_BYTES_PER_SECOND,
        checkpoint_rounds: config.checkpoint.every_rounds,
        validation: Some(Validation {
            every_rounds: config.evaluate.every_rounds,
            tokens: (config.evaluate.samples_max * config.data.sequence_length) as f64,
        }),
        seconds: SECONDS_MAX,
        rates: Rates::none(),
    };
    let outcome = simulate(&fleet, 0)?;
    Ok(Predicted {
        tokens_per_second: outcome.tokens_committed / f64::max(outcome.seconds, f64::MIN_POSITIVE),
        bytes: outcome.fetched_bytes,
        utilisation: outcome.tokens_committed / outcome.tokens_capacity,
    })
}

fn report(predicted: &Predicted, measured: &Measured, linked: bool, output: &Output) {
    let (tokens, bytes) = (measured.tokens as f64 / measured.seconds, measured.bytes() as f64);
    let percent =
        |predicted: f64, measured: f64| if measured == predicted { 0.0 } else { 100.0 * (predicted / measured - 1.0) };
    let rounds = measured.committed.len();
    output.object(&json!({
        "rounds": rounds,
        "seconds": measured.seconds,
        "tokens_per_second": { "predicted": predicted.tokens_per_second, "measured": tokens, "difference_percent": percent(predicted.tokens_per_second, tokens) },
        "bytes": { "predicted": predicted.bytes, "measured": bytes, "difference_percent": percent(predicted.bytes, bytes) },
        "utilisation_predicted": predicted.utilisation,
        "links_known": linked,
        "settings_changed": measured.settings_changed,
        "sites_changed": measured.sites_changed,
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
    if measured.settings_changed {
        output.line("settings changed during the run: the prediction is of those it began with");
    }
    if measured.sites_changed {
        output.line("sites came later or came back: the prediction is of those it began with");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use base::{ContentHash, Round, Term};
    use planner::units::{BitsPerSecond, Seconds};
    use planner::wan::Link;
    use rounds::FragmentPlan;
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

    fn config() -> RunConfig {
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
        let mut config = RunConfig::new("check", shape);
        config.sync.inner_steps = 10;
        config.sync.sites = 2;
        config.train.batch_samples = 9;
        config.train.steps = 1_000;
        // One validation, at the end.
        config.evaluate.every_rounds = 1_000;
        config
    }

    /// One round of two sites of 300 and 600 tokens a second, 90 samples in 10 steps, that took a second more than computing does.
    fn one_round(config: &RunConfig) -> Measured {
        let joined = |site| Event::SiteJoined {
            site: SiteId(site),
            name: format!("site-{site}"),
            address: String::new(),
            engine: "flex".to_owned(),
            threads: 1,
            slowdown: 1.0,
        };
        let ready = |site, speed| Event::SiteReady { site: SiteId(site), tokens_per_second: speed };
        let round = Round(1);
        let settings = Settings::new(config);
        let plan = FragmentPlan { index: 0, count: 1, codec: config.sync.codec, rank: config.sync.rank };
        let bytes = settings.delta_bytes(plan);
        let fetched = |from| Event::DeltaFetched { round, from_site: SiteId(from), bytes, seconds: 0.1 };
        let contributor = |site, tokens| Contributor { site: SiteId(site), tokens, weight: 0.5 };
        let per_sample = settings.sequence_length;
        Measured::of(&[
            record(0, joined(0)),
            record(0, joined(1)),
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
    fn a_round_over_free_links_takes_what_its_computing_takes() {
        let config = config();
        let measured = one_round(&config);
        let predicted = predict(&config, &measured, &Way::Free).unwrap();
        assert_eq!(predicted.bytes, measured.bytes() as f64);
        // 90 samples at 900 tokens a second, and a little host work; the run took one second more.
        let seconds = measured.tokens as f64 / predicted.tokens_per_second;
        let computing = 90.0 * config.data.sequence_length as f64 / 900.0;
        assert!(seconds >= computing && seconds < computing + 0.1, "{seconds} {computing}");
        assert!((measured.seconds - computing - 1.0).abs() < 1e-9, "{}", measured.seconds);
    }

    #[test]
    fn a_thin_link_takes_its_bytes_and_a_validation_a_third_of_a_step() {
        let mut config = config();
        let measured = one_round(&config);
        let seconds = |config: &RunConfig, way: &Way<'_>| {
            let predicted = predict(config, &measured, way).unwrap();
            measured.tokens as f64 / predicted.tokens_per_second
        };
        let free = seconds(&config, &Way::Free);
        let link = Link { round_trip: Seconds(0.05), streams: 8.0, ..Link::ideal(BitsPerSecond(1e4)) };
        let links = Links::all(link);
        // A delta each way at once, at 94 % of 10 kbit/s.
        let transfer = measured.bytes() as f64 / 2.0 / (0.94 * 1e4 / 8.0);
        let thin = seconds(&config, &Way::Cluster(&links)) - free;
        assert!(thin > transfer && thin < transfer + 0.5, "{thin} {transfer}");
        // Two rounds with a validation between them: 10 samples of the first site, a third of the time that training takes.
        config.evaluate.every_rounds = 1;
        config.evaluate.samples_max = 10;
        let mut longer = one_round(&config);
        longer.committed.insert(2);
        let validated = predict(&config, &longer, &Way::Free).unwrap();
        config.evaluate.every_rounds = 1_000;
        let plain = predict(&config, &longer, &Way::Free).unwrap();
        let both = 2.0 * measured.tokens as f64;
        let more = both / validated.tokens_per_second - both / plain.tokens_per_second;
        let expected = 10.0 * config.data.sequence_length as f64 / 3.0 / 300.0;
        assert!((more / expected - 1.0).abs() < 0.05, "{more} {expected}");
    }
}
