//! Several sites are one: the arithmetic of a round against training on one machine, without sockets or processes.
//!
//! The coordinator, the trainer, the engine, the checkpoints and the data are those that ship; only the network between
//! them is replaced by function calls. The merge is an argument, so that each proof can also be run with a merge that is
//! wrong and shown to fail.

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test's helper may panic, and says what it has found")]

use base::config::{InnerOptimizer, MergeRule, Strategy};
use base::random::Random;
use base::{ContentHash, ModelShape, NamedTensors, RunConfig, SiteId};
use bytes::Bytes;
use data::{Corpus, PrepareOptions, TokenizerSource};
use engine::PrecisionChoice;
use engine_burn::BurnEngine;
use rounds::coordinator::{Note, Record};
use rounds::{Command, Commit, Contribution, Contributor, Coordinator, Directive, Peer, Report, RoundPlan, Settings};
use site::{GlobalState, Merger, Mode, Progress, RunFolder, SavedState, Trainer, TrainingState, train_alone};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, RwLock};
use telemetry::{Event, EventLog, Reporter};
use tempfile::TempDir;

/// Learning rate of plain gradient descent: ten steps move this model by 9 % of its norm, so that a merge that is wrong
/// cannot hide behind parameters that hardly changed. At 0.5 descent is unstable here and multiplies any rounding.
const SGD_LEARNING_RATE: f64 = 0.1;

/// Bound of "three sites equal one". Sums in another order, and the way over a delta and back, cost each element some
/// roundings of 2^-24 = 6e-8 of its size a step. They do not add up in one direction: after ten steps the norm of the
/// difference is 1.4e-7 of the parameters', and the worst element is off by 6e-7.
const RELATIVE_ERROR_MAX: f64 = 1e-5;

/// Wrong merges must miss the bound by at least this factor; they miss it by 590 (halving) and 1,150 (equal weights).
const WRONG_MERGE_FACTOR: f64 = 100.0;

/// An element is compared with itself, or with the standard deviation of the initial matrices where it is smaller: its
/// rounding is that of the numbers it is a difference of, not its own.
const ELEMENT_FLOOR: f64 = 0.02;

const VOCABULARY_SIZE: usize = 300;

/// A run in a folder that is removed afterwards.
struct Run {
    _place: TempDir,
    folder: RunFolder,
    config: RunConfig,
    initial: NamedTensors,
}

impl Run {
    /// A tiny Llama and a small text; `configure` makes of the settings what a test needs.
    fn new(configure: impl FnOnce(&mut RunConfig)) -> Self {
        let place = tempfile::tempdir().unwrap();
        let texts = place.path().join("texts");
        std::fs::create_dir(&texts).unwrap();
        for document in 0..24 {
            std::fs::write(texts.join(format!("{document:02}.txt")), text(document)).unwrap();
        }
        let folder = RunFolder::new(place.path().join("run"));
        std::fs::create_dir(folder.root()).unwrap();
        let tokenizer = TokenizerSource::Train { vocabulary_size: VOCABULARY_SIZE };
        let corpus = Corpus::folder(&texts).unwrap();
        let prepared =
            data::prepare(&corpus, &tokenizer, &folder.data(), &PrepareOptions::default(), &mut |_| {}).unwrap();
        let mut config = settings(prepared.manifest.vocabulary_size as usize);
        configure(&mut config);
        config.validate().unwrap();
        let initial = engine::initial_parameters(&config.model, config.run.seed);
        Self { _place: place, folder, config, initial }
    }

    fn initial_state(&self) -> TrainingState {
        TrainingState::initial(&self.config, &self.initial).unwrap()
    }

    /// A trainer that continues from `state`, as a process that has just started makes it.
    fn trainer(&self, state: &TrainingState) -> Trainer {
        let initial = &state.inner.parameters;
        let mut engine =
            BurnEngine::new(&self.config.model, &self.config.train, "flex", PrecisionChoice::Auto, initial).unwrap();
        engine::Engine::restore(&mut engine, &state.inner).unwrap();
        Trainer::new(&self.folder, &self.config, Box::new(engine), 1.0).unwrap()
    }

    /// A folder for another site's or another attempt's checkpoints.
    fn sibling(&self, name: &str) -> RunFolder {
        RunFolder::new(self.folder.root().with_file_name(name))
    }

    /// Trains one site from `state` up to step `steps_max` as `beringia train` does; gives the loss of every step.
    fn alone(&self, checkpoints: &RunFolder, state: TrainingState, steps_max: u64) -> Vec<f64> {
        std::fs::create_dir_all(checkpoints.root()).unwrap();
        let losses = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&losses);
        let log = EventLog::open(&checkpoints.events(), "test", Box::new(|| 0)).unwrap();
        let watcher = move |record: &telemetry::Record| match &record.event {
            Event::Step { loss_nats, .. } => seen.lock().unwrap().push(*loss_nats),
            Event::Warning { message, .. } => panic!("{message}"),
            _ => {}
        };
        let mut reporter = Reporter::new(log, Box::new(watcher));
        let (mut trainer, stop) = (self.trainer(&state), AtomicBool::new(false));
        train_alone(checkpoints, &self.config, &mut trainer, state, Some(steps_max), &stop, &mut reporter).unwrap();
        // Taken out, so that the guard ends before the mutex does.
        std::mem::take(&mut *losses.lock().unwrap())
    }

    fn newest(&self, checkpoints: &RunFolder) -> TrainingState {
        let (state, skipped) = checkpoints.newest(&self.config).unwrap();
        assert!(skipped.is_empty(), "{skipped:?}");
        state
    }
}

fn settings(vocab_size: usize) -> RunConfig {
    let shape = ModelShape {
        vocab_size,
        hidden_size: 32,
        intermediate_size: 48,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        max_position_embeddings: 16,
        rope_theta: 10_000.0,
        rms_norm_eps: 1e-5,
        tie_word_embeddings: true,
    };
    let mut config = RunConfig::new("golden", shape);
    config.data.sequence_length = 16;
    config.train.warmup_steps = 4;
    config.sync.sites = 3;
    config.sync.shares = vec![1.0, 2.0, 5.0];
    config.evaluate.samples_max = 4;
    config.evaluate.sample_tokens = 0;
    config
}

/// Words that follow one another by a rule with exceptions, so that there is something to learn and something to guess.
fn text(document: u64) -> String {
    const WORDS: [&str; 8] = ["the", "ice", "river", "bends", "north", "while", "geese", "call"];
    let mut random = Random::new(11, document);
    let mut word = document as usize;
    let mut next = || {
        word = if random.next_below(4) == 0 { random.next_below(8) as usize } else { (word * 3 + 1) % 8 };
        WORDS[word]
    };
    (0..200).map(|_| next()).collect::<Vec<_>>().join(" ")
}

/// Contributors with their encoded deltas, in the order of the commit.
type Deltas = Vec<(Contributor, Bytes)>;

/// What is handed to the shipped merge: the contributions as they are, or something else to see a proof fail.
type Merge = fn(Deltas) -> Deltas;

fn as_committed(deltas: Deltas) -> Deltas {
    deltas
}

/// Wrong: every site counts the same, however much it has trained.
fn equally(deltas: Deltas) -> Deltas {
    deltas.into_iter().map(|(contributor, delta)| (Contributor { tokens: 1, ..contributor }, delta)).collect()
}

/// Wrong: the mean of the first two, then of that and the third.
fn by_halving(deltas: Deltas) -> Deltas {
    let decode = |bytes: &Bytes| -> Vec<f32> {
        bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
    };
    let halve = |a: Vec<f32>, b: Vec<f32>| a.iter().zip(b).map(|(a, b)| (a + b) / 2.0).collect();
    let merged = deltas.iter().map(|(_, delta)| decode(delta)).reduce(halve).unwrap();
    let encoded: Vec<u8> = merged.iter().flat_map(|value| value.to_le_bytes()).collect();
    vec![(deltas[0].0, Bytes::from(encoded))]
}

struct Site {
    trainer: Trainer,
    merger: Merger,
    saved: SavedState,
}

impl Site {
    fn global(&self) -> GlobalState {
        self.merger.state().read().unwrap().clone()
    }
}

/// Sites and their coordinator, with function calls where the network would be.
struct World<'a> {
    run: &'a Run,
    sites: Vec<Site>,
    coordinator: Coordinator,
    records: Vec<Record>,
    merge: Merge,
    /// Indices of the sites in the order in which their reports reach the coordinator.
    arrival: Vec<usize>,
    plan: Option<RoundPlan>,
    commit: Option<Commit>,
    /// Token-weighted training loss of each round.
    losses: Vec<f64>,
    /// Whose deltas were clipped, in the order of the rounds.
    clipped: Vec<SiteId>,
}

impl<'a> World<'a> {
    fn new(run: &'a Run, merge: Merge) -> Self {
        let states = (0..run.config.sync.sites).map(|_| run.initial_state()).collect();
        Self::resume(run, merge, states, Vec::new())
    }

    /// New processes on what the old ones have saved.
    fn resume(run: &'a Run, merge: Merge, states: Vec<TrainingState>, mut records: Vec<Record>) -> Self {
        let settings = Settings::new(&run.config);
        let initial_hash = run.initial_state().global.hash();
        let (coordinator, started) = Coordinator::recover(settings, initial_hash, records.clone());
        records.push(started);
        let arrival = (0..states.len()).collect();
        let held: Vec<_> = states.iter().map(|state| (state.saved.commit.round, state.saved.state_hash)).collect();
        let site = |(index, state): (usize, TrainingState)| {
            let (trainer, saved) = (run.trainer(&state), state.saved);
            let merger = Merger::new(SiteId(index as u32), &run.config, Arc::new(RwLock::new(state.global)));
            Site { trainer, merger, saved }
        };
        let sites = states.into_iter().enumerate().map(site).collect();
        let (plan, commit, losses, clipped) = (None, None, Vec::new(), Vec::new());
        let mut world = Self { run, sites, coordinator, records, merge, arrival, plan, commit, losses, clipped };
        for (index, (round, state_hash)) in held.into_iter().enumerate() {
            let site = SiteId(index as u32);
            let (name, fingerprint) = (format!("site-{index}"), ContentHash::of(&[index as u8]));
            world.tell(rounds::Event::Connected(Peer { site, name, address: "localhost:1".to_owned(), fingerprint }));
            world.report(index, Report::Ready { round, state_hash, tokens_per_second: 1.0, recall: 0 });
        }
        world
    }

    fn report(&mut self, site: usize, report: Report) {
        self.tell(rounds::Event::Reported(SiteId(site as u32), report));
    }

    fn tell(&mut self, event: rounds::Event) {
        for command in self.coordinator.handle(event, 0.0) {
            match command {
                Command::Persist(record) => self.records.push(record),
                Command::Send(_, Directive::Begin(plan)) => self.plan = Some(Arc::unwrap_or_clone(plan)),
                Command::Send(_, Directive::Commit(commit)) => self.commit = Some(Arc::unwrap_or_clone(commit)),
                Command::Send(site, Directive::Dropped { reason }) => panic!("{site} was dropped: {reason:?}"),
                Command::Note(Note::Diverged { site, round, .. }) => panic!("I1: {site} differs after {round}"),
                Command::Send(..) | Command::Note(_) | Command::Done => {}
            }
        }
        // I2, after every event.
        self.coordinator.ledger().audit().unwrap();
    }

    /// One round: everybody trains on its lease, reports, holds the others' deltas, merges, and holds the same bits.
    fn round(&mut self) {
        let plan = self.plan.take().unwrap();
        let contributed = self.train(&plan);
        for site in self.arrival.clone() {
            let (round, attempt, contribution) = (plan.round, plan.attempt, contributed[site].0);
            self.report(site, Report::Computed { round, attempt, contribution, slice_hashes: Vec::new() });
        }
        let tokens: u64 = contributed.iter().map(|(contribution, _)| contribution.tokens).sum();
        let nats: f64 = contributed.iter().map(|(c, _)| c.loss_nats * c.tokens as f64).sum();
        self.losses.push(nats / tokens as f64);
        for holder in self.arrival.clone() {
            for from in self.arrival.clone() {
                let (round, attempt, from) = (plan.round, plan.attempt, SiteId(from as u32));
                self.report(holder, Report::Holds { round, attempt, from });
            }
        }
        let commit = self.commit.take().unwrap();
        self.apply(&commit, &contributed);
    }

    fn train(&mut self, plan: &RoundPlan) -> Vec<(Contribution, Bytes)> {
        let abandon = AtomicBool::new(false);
        let mut contributed = Vec::new();
        for (site, assignment) in self.sites.iter_mut().zip(&plan.assignments) {
            let Site { trainer, merger, .. } = site;
            let (mut progress, steps) = (Progress::default(), 0..assignment.steps);
            assert!(trainer.train((plan, assignment), steps, &mut progress, &abandon, &mut |_| {}).unwrap());
            let fragment = trainer.schema().whole();
            let local = Arc::new(trainer.snapshot(&fragment, &mut progress).unwrap());
            let delta = merger.encode(plan.round, plan.fragment, &local).unwrap();
            let contribution = Contribution {
                tokens: progress.loss.tokens,
                delta_hash: ContentHash::of(&delta),
                delta_bytes: delta.len() as u64,
                loss_nats: progress.loss_nats(),
                compute_seconds: 1.0,
            };
            contributed.push((contribution, delta));
        }
        contributed
    }

    fn apply(&mut self, commit: &Commit, contributed: &[(Contribution, Bytes)]) {
        let of_site = |contributor: &Contributor| (*contributor, contributed[contributor.site.0 as usize].1.clone());
        let handed = (self.merge)(commit.contributors.iter().map(of_site).collect());
        let (contributors, deltas): (Vec<Contributor>, Vec<Bytes>) = handed.into_iter().unzip();
        let handed = Commit { contributors, ..commit.clone() };
        for site in 0..self.sites.len() {
            let Site { trainer, merger, .. } = &mut self.sites[site];
            let merged = merger.merge(&handed, &deltas).unwrap();
            let fragment = trainer.schema().whole();
            trainer.take_over(&fragment, &merged.local).unwrap();
            if site == 0 {
                self.clipped.extend(merged.clipped.iter().map(|clipped| clipped.site));
            }
            self.report(site, Report::Applied { round: commit.round, state_hash: merged.state_hash });
        }
        let hash = self.state_hash();
        assert!(self.sites.iter().all(|site| site.global().hash() == hash), "I1 after round {}", commit.round);
        assert_eq!(self.coordinator.last().state_hash, Some(hash));
    }

    fn state_hash(&self) -> ContentHash {
        self.sites[0].global().hash()
    }

    fn parameters(&self) -> Vec<f32> {
        self.sites[0].global().parameters
    }

    /// Each site's checkpoint, through the disk and back.
    fn save_and_load(&mut self) -> Vec<TrainingState> {
        let mut loaded = Vec::new();
        for (index, site) in self.sites.iter_mut().enumerate() {
            let (inner, global) = (site.trainer.engine().save().unwrap(), site.global());
            let mut saved = site.saved.clone();
            saved.mode = Mode::Sites;
            saved.commit = global.commit.clone();
            saved.state_hash = global.hash();
            saved.optimizer_steps = inner.optimizer_steps;
            let state = TrainingState { global, inner, saved };
            let checkpoints = self.run.sibling(&format!("site-{index}"));
            let (round, schema) = (state.global.commit.round, site.trainer.schema().clone());
            state.save(&checkpoints.checkpoints(), round, &schema, 2).unwrap();
            loaded.push(self.run.newest(&checkpoints));
        }
        loaded
    }
}

fn rounds_of(run: &Run, rounds: usize, merge: Merge) -> World<'_> {
    let mut world = World::new(run, merge);
    (0..rounds).for_each(|_| world.round());
    world
}

fn norm(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|value| value * value).sum::<f64>().sqrt()
}

/// ‖found − expected‖ / ‖expected‖
fn relative_error(found: &[f32], expected: &[f32]) -> f64 {
    let difference = found.iter().zip(expected).map(|(a, b)| f64::from(*a) - f64::from(*b));
    norm(difference) / norm(expected.iter().map(|value| f64::from(*value)))
}

/// Largest |found − expected| / max(|expected|, [`ELEMENT_FLOOR`]).
fn relative_error_of_elements(found: &[f32], expected: &[f32]) -> f64 {
    let errors = found.iter().zip(expected).map(|(found, expected)| {
        let (found, expected) = (f64::from(*found), f64::from(*expected));
        (found - expected).abs() / expected.abs().max(ELEMENT_FLOOR)
    });
    errors.fold(0.0, f64::max)
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Plain gradient descent, one inner step a round, and an outer step that takes the merged delta as it is: then the mean of
/// what the sites did is the gradient step on their joint batch.
fn plain(config: &mut RunConfig) {
    config.train.optimizer = InnerOptimizer::Sgd;
    config.train.gradient_clip_norm = 0.0;
    config.train.learning_rate = SGD_LEARNING_RATE;
    config.train.steps = 10;
    config.sync.inner_steps = 1;
    config.sync.outer_learning_rate = 1.0;
    config.sync.outer_momentum = 0.0;
}

#[test]
fn three_unequal_sites_equal_one() {
    let run = Run::new(plain);
    run.alone(&run.folder, run.initial_state(), 10);
    let one = run.newest(&run.folder).global.parameters;
    let moved = relative_error(&run.initial_state().global.parameters, &one);
    assert!(moved > 1_000.0 * RELATIVE_ERROR_MAX, "ten steps moved the model by only {moved}");

    let three = rounds_of(&run, 10, as_committed);
    let samples: Vec<u64> = three.coordinator.last().commit.contributors.iter().map(|c| c.tokens / 16).collect();
    assert_eq!(samples, [1, 2, 5]);
    assert_eq!(three.coordinator.ledger().totals().committed, 80);
    let error = relative_error(&three.parameters(), &one);
    let element_error = relative_error_of_elements(&three.parameters(), &one);
    assert!(error < RELATIVE_ERROR_MAX, "{error}");
    assert!(element_error < RELATIVE_ERROR_MAX, "{element_error}");

    for (name, merge) in [("equal weights", equally as Merge), ("repeated halving", by_halving)] {
        let wrong = rounds_of(&run, 10, merge);
        let error = relative_error(&wrong.parameters(), &one);
        let element_error = relative_error_of_elements(&wrong.parameters(), &one);
        assert!(error > WRONG_MERGE_FACTOR * RELATIVE_ERROR_MAX, "{name} passes for the right merge: {error}");
        assert!(element_error > WRONG_MERGE_FACTOR * RELATIVE_ERROR_MAX, "{name}: {element_error}");
    }
}

/// AdamW with clipping, in the engine for one site, on the host for three.
fn synchronous(config: &mut RunConfig) {
    config.train.steps = 50;
    config.train.learning_rate = 3e-3;
    config.train.gradient_clip_norm = 0.5;
    config.sync.strategy = Strategy::Synchronous;
}

/// The loss of a step is that of the parameters before it: step 51 would show the fiftieth update, so the parameters are
/// compared as well.
#[test]
fn synchronous_training_has_the_loss_of_one_site_at_every_step() {
    const LOSS_ERROR_MAX: f64 = 1e-4;
    let run = Run::new(synchronous);
    let one = run.alone(&run.folder, run.initial_state(), 50);
    assert_eq!(one.len(), 50);
    assert!(one[49] < one[0] - 1.0, "50 steps should have taught something: {} to {}", one[0], one[49]);
    let largest = |world: &World<'_>| {
        assert_eq!(world.losses.len(), one.len());
        world.losses.iter().zip(&one).map(|(three, one)| (three - one).abs()).fold(0.0, f64::max)
    };
    let three = rounds_of(&run, 50, as_committed);
    let error = largest(&three);
    assert!(error < LOSS_ERROR_MAX, "{error}");
    let error = relative_error(&three.parameters(), &run.newest(&run.folder).global.parameters);
    assert!(error < LOSS_ERROR_MAX, "{error}");
    let error = largest(&rounds_of(&run, 50, equally));
    assert!(error > 10.0 * LOSS_ERROR_MAX, "equal weights pass for the right ones: {error}");
}

/// What the last of the sites sends instead of what it has learnt.
fn with_lie(mut deltas: Deltas, lie: impl Fn(f32) -> f32) -> Deltas {
    let (_, delta) = deltas.last_mut().unwrap();
    let values = delta.as_chunks().0.iter().map(|bytes| lie(f32::from_le_bytes(*bytes)));
    *delta = values.flat_map(f32::to_le_bytes).collect();
    deltas
}

fn ten_thousandfold(deltas: Deltas) -> Deltas {
    with_lie(deltas, |value| 1e4 * value)
}

fn sign_flipped(deltas: Deltas) -> Deltas {
    with_lie(deltas, |value| -value)
}

fn random(deltas: Deltas) -> Deltas {
    let random = std::cell::RefCell::new(Random::new(7, 0));
    with_lie(deltas, |_| random.borrow_mut().next_normal())
}

/// Where `cargo xtask faults` collects what tests have measured.
const FIGURES_FOLDER: &str = "BERINGIA_FIGURES";

/// Rounds of the runs with a liar.
const ROUNDS: usize = 30;

/// The loss of the first round and of the last four, of four sites whose deltas are merged in that way; and whose were clipped.
fn with_four_sites(rule: MergeRule, clip_norm: f64, merge: Merge) -> (f64, f64, Vec<SiteId>) {
    let run = Run::new(|config| {
        config.train.steps = 5 * ROUNDS as u64;
        config.train.batch_samples = 16;
        config.train.learning_rate = 3e-3;
        config.sync.inner_steps = 5;
        config.sync.sites = 4;
        config.sync.shares = vec![1.0; 4];
        config.sync.merge = rule;
        config.sync.clip_norm = clip_norm;
    });
    let world = rounds_of(&run, ROUNDS, merge);
    (world.losses[0], world.losses[ROUNDS - 4..].iter().sum::<f64>() / 4.0, world.clipped)
}

/// With plain averaging as well, to see that each lie is one, and with clipping, which bounds how much of one counts.
#[test]
fn one_liar_of_four_costs_a_trimmed_mean_at_most_a_hundredth_of_the_loss() {
    const CLIP_NORM: f64 = 5.0;
    let mut figures = Vec::new();
    let (first, honest, _) = with_four_sites(MergeRule::Mean, 0.0, as_committed);
    assert!(honest < first - 1.0, "something was learnt: {first} to {honest}");
    let (_, trimmed, _) = with_four_sites(MergeRule::TrimmedMean, CLIP_NORM, as_committed);
    assert!(trimmed < 1.01 * honest, "trimming alone: {trimmed}, {honest}");
    let (_, clipped, sites) = with_four_sites(MergeRule::Mean, CLIP_NORM, as_committed);
    assert_eq!((clipped.to_bits(), sites), (honest.to_bits(), Vec::new()), "no honest delta is clipped");
    for (name, lie, too_long) in [
        ("times 10^4", ten_thousandfold as Merge, ROUNDS),
        ("sign flipped", sign_flipped, 0),
        ("random", random, ROUNDS),
    ] {
        let (_, robust, unclipped) = with_four_sites(MergeRule::TrimmedMean, CLIP_NORM, lie);
        let (_, clipped, sites) = with_four_sites(MergeRule::Mean, CLIP_NORM, lie);
        let (_, mean, _) = with_four_sites(MergeRule::Mean, 0.0, lie);
        assert_eq!((sites, unclipped), (vec![SiteId(3); too_long], Vec::new()), "{name}");
        let losses = format!("{robust:.4} trimmed, {clipped:.4} clipped, {mean:.4} a mean, {honest:.4} without a liar");
        eprintln!("{name}: {losses}");
        figures.push(format!("{name}: {losses}"));
        assert!(robust < 1.01 * honest, "{name}: {robust}, {honest}");
        // The mildest, a flipped sign, leaves half of what is learnt: not a number is a loss too.
        assert!(mean.is_nan() || mean > 1.01 * honest, "{name} is no lie: {mean}, {honest}");
        // Clipping keeps a delta that is too long from undoing what the others learn: 7 % and 1.5 % are lost. One that is not too long it
        // leaves as it is.
        assert!(too_long == 0 || clipped < 1.2 * honest, "{name}: {clipped}, {honest}");
    }
    if let Some(folder) = std::env::var_os(FIGURES_FOLDER) {
        std::fs::write(std::path::Path::new(&folder).join("one_liar"), figures.join("; ")).unwrap();
    }
}

/// Everything that a checkpoint holds, as bits.
fn bits_of_state(state: &TrainingState) -> Vec<Vec<u32>> {
    let tensors = [&state.inner.parameters, &state.inner.first_moments, &state.inner.second_moments];
    let inner = tensors.into_iter().flat_map(|tensors| tensors.values()).map(|tensor| bits(&tensor.values));
    let outer = state.global.outer.buffers().iter().map(|buffer| bits(buffer));
    std::iter::once(bits(&state.global.parameters)).chain(outer).chain(inner).collect()
}

/// Invariant I7 for one site.
#[test]
fn stopping_and_resuming_gives_the_same_bits() {
    let run = Run::new(|config| config.train.steps = 20);
    let straight = run.alone(&run.folder, run.initial_state(), 20);
    let stopped = run.sibling("stopped");
    let mut losses = run.alone(&stopped, run.initial_state(), 10);
    let halfway = run.newest(&stopped);
    assert_eq!((halfway.saved.step, halfway.inner.optimizer_steps), (10, 10));
    losses.extend(run.alone(&stopped, halfway, 20));
    assert_eq!(losses, straight);
    let (expected, found) = (run.newest(&run.folder), run.newest(&stopped));
    assert!(!expected.inner.second_moments.is_empty());
    assert_eq!(bits_of_state(&found), bits_of_state(&expected));
    assert_eq!(found.saved, expected.saved);
}

/// Invariant I7 for three sites and their coordinator, with momentum in both optimisers.
#[test]
fn three_sites_that_stop_and_resume_hold_the_same_bits() {
    let run = Run::new(|config| {
        config.train.steps = 20;
        config.sync.inner_steps = 2;
        config.sync.outer_learning_rate = 0.7;
        config.sync.outer_momentum = 0.9;
    });
    let mut straight = rounds_of(&run, 10, as_committed);
    let mut first_half = rounds_of(&run, 5, as_committed);
    let (states, records) = (first_half.save_and_load(), first_half.records.clone());
    assert!(states[0].global.outer.buffers()[0].iter().any(|value| *value != 0.0));
    let mut resumed = World::resume(&run, as_committed, states, records);
    (0..5).for_each(|_| resumed.round());
    assert_eq!(resumed.losses, straight.losses[5..]);
    assert_eq!(resumed.coordinator.ledger().totals().committed, straight.coordinator.ledger().totals().committed);
    let (found, expected) = (resumed.save_and_load(), straight.save_and_load());
    for (found, expected) in found.iter().zip(&expected) {
        assert_eq!(found.inner.optimizer_steps, 20);
        assert_eq!(bits_of_state(found), bits_of_state(expected));
    }
}

#[test]
fn the_order_in_which_reports_arrive_changes_no_bit() {
    let run = Run::new(|config| {
        config.train.steps = 6;
        config.sync.inner_steps = 2;
    });
    let hash_of = |arrival: [usize; 3], merge: Merge| {
        let mut world = World::new(&run, merge);
        world.arrival = arrival.to_vec();
        (0..3).for_each(|_| world.round());
        world.state_hash()
    };
    let expected = hash_of([0, 1, 2], as_committed);
    for arrival in [[0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
        assert_eq!(hash_of(arrival, as_committed), expected, "{arrival:?}");
    }
    // Were contributions merged as they come, this would be another state.
    let reversed = |deltas: Deltas| deltas.into_iter().rev().collect();
    assert_ne!(hash_of([0, 1, 2], reversed), expected);
}
