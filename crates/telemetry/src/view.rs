//! The status of a run as a fold over its events.
//!
//! [`RunView::apply`] is pure: the same records give the same view, however they were cut into polls, and a view of
//! an old log is the status of then. `beringia status`, the progress bar and every `--json` read from here. Memory
//! is bounded whatever the log holds.

use crate::event::{Event, LedgerCounts, Record};
use base::{ContentHash, Round, SiteId, Term};
use serde::Serialize;
use std::collections::{BTreeMap, VecDeque};
use std::fmt::Write as _;

/// Warnings kept; the newest stay.
pub const WARNINGS_MAX: usize = 20;
/// Sites shown; `run.toml` allows no more.
pub const SITES_MAX: usize = 10_000;
/// Spans over which speed is averaged: enough to smooth one slow round, few enough to follow a site that leaves.
const SPEED_SPANS: usize = 8;
/// Rounds of which a site's compute time is kept: a commit is logged when all sites have applied it, and by then a quick
/// one may have finished the next round.
const COMPUTED_ROUNDS_MAX: usize = 2;
/// Characters of a warning or sample that are kept.
const TEXT_CHARS_MAX: usize = 2_000;

/// What a site is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SiteState {
    /// Admitted, fetching the state or measuring its speed.
    Joining,
    /// Waiting for a round.
    Ready,
    /// Has a lease.
    Training,
    /// Made its steps; the round is open.
    Computed,
    /// No longer a member.
    Left,
}

/// One site, as the log shows it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SiteView {
    /// Its id.
    pub site: SiteId,
    /// Its name.
    pub name: String,
    /// Engine and device.
    pub engine: String,
    /// What the maker calls the device.
    pub device: Option<String>,
    /// Who made it.
    pub maker: Option<String>,
    /// Driver or software stack with its version.
    pub driver: Option<String>,
    /// Memory of the device.
    pub memory_bytes: Option<u64>,
    /// What matrix products are computed in: `f32` or `bf16`.
    pub precision: Option<String>,
    /// What it is doing.
    pub state: SiteState,
    /// Training tokens a second while computing: measured alone at first, then in its last round.
    pub tokens_per_second: Option<f64>,
    /// Part of the joint batch, 0 to 1.
    pub share: Option<f64>,
    /// Tokens it trained.
    pub tokens: u64,
    /// Time in inner steps, over the committed rounds to which it contributed.
    pub compute_seconds: f64,
    /// The rest of those rounds' time: exchange, outer step, and waiting for others.
    pub idle_seconds: f64,
    /// Bytes of its deltas that the writers of this log fetched.
    pub bytes_sent: u64,
    /// Of its deltas and merged parts, those that the writers of this log refused.
    pub deltas_refused: u64,
    /// Of its deltas and their slices, those that the writers of this log clipped.
    pub deltas_clipped: u64,
    /// The way that they come, where a choice was logged: `direct` or `object store`.
    pub route: Option<String>,
    /// Mean training loss of its last round, nats a token.
    pub loss_nats: Option<f64>,
    /// Its global state after the last outer step.
    pub state_hash: Option<ContentHash>,
    /// Why it left.
    pub left_reason: Option<String>,
    /// Its time in inner steps of rounds whose commit was not logged yet.
    #[serde(skip)]
    computed: VecDeque<(Round, f64)>,
}

impl SiteView {
    /// Part of the time of its rounds in which it did not compute, 0 to 1; `None` before its first commit.
    pub fn idle_fraction(&self) -> Option<f64> {
        let seconds = self.compute_seconds + self.idle_seconds;
        (seconds > 0.0).then(|| self.idle_seconds / seconds)
    }

    /// A round of `seconds` was committed with `tokens` of this site.
    fn contributed(&mut self, round: Round, seconds: f64, tokens: u64) {
        self.tokens = self.tokens.saturating_add(tokens);
        if let Some((_, compute_seconds)) = self.computed.iter().rev().find(|(computed, _)| *computed == round) {
            self.compute_seconds += compute_seconds;
            self.idle_seconds += (seconds - compute_seconds).max(0.0);
        }
    }
}

/// Text of a field that is empty where nothing is known.
fn known(text: &str) -> Option<String> {
    (!text.is_empty()).then(|| clipped(text))
}

/// Where the run is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum RunState {
    /// Nothing was logged yet.
    #[default]
    Empty,
    /// Waiting for sites.
    Waiting,
    /// Rounds are being made.
    Training,
    /// The run ended.
    Finished,
}

/// The last validation, and the first for comparison.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ValidationView {
    /// After this round.
    pub round: Round,
    /// Nats a token.
    pub nats_per_token: f64,
    /// Bits a byte of text.
    pub bits_per_byte: f64,
    /// At the first validation in the log.
    pub bits_per_byte_start: f64,
    /// Of a bigram model of the training tokens.
    pub bigram_bits_per_byte: f64,
}

/// The last change of settings that follow the links.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SettingsView {
    /// From this round on.
    pub round: Round,
    /// H
    pub inner_steps: u64,
    /// P
    pub fragments: u32,
    /// tau
    pub overlap_steps: u64,
    /// How deltas are coded.
    pub codec: String,
    /// Its rank where it has one; else 0.
    pub rank: u32,
    /// Why, in words.
    pub reason: String,
}

/// The last checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CheckpointView {
    /// After this round.
    pub round: Round,
    /// Its folder.
    pub path: String,
    /// Bytes.
    pub bytes: u64,
}

/// A warning, a refused peer, a skipped checkpoint or a divergence.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct WarningView {
    /// When, milliseconds since 1970-01-01 UTC.
    pub unix_ms: u64,
    /// What.
    pub message: String,
    /// What mends it.
    pub hint: Option<String>,
}

/// Work over a time, for the speed.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Span {
    tokens: u64,
    seconds: f64,
}

/// The status of a run.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct RunView {
    /// Name of the run.
    pub run: String,
    /// `synchronous` or `diloco`.
    pub strategy: String,
    /// Where it is.
    pub state: RunState,
    /// Last committed round.
    pub round: Round,
    /// Rounds of the whole run.
    pub rounds_planned: u64,
    /// The coordinator's term.
    pub term: Term,
    /// Inner steps made.
    pub step: u64,
    /// Parameters of the model.
    pub parameters: u64,
    /// Tokens of committed rounds.
    pub tokens_committed: u64,
    /// Tokens of steps since then, in a log that has steps.
    pub tokens_open: u64,
    /// Tokens of the whole run.
    pub tokens_planned: u64,
    /// Training loss of the last step or round, nats a token.
    pub loss_nats: Option<f64>,
    /// The last validation.
    pub validation: Option<ValidationView>,
    /// Text of the last sample.
    pub sample: Option<String>,
    /// BLAKE3 of the global state after the last committed round.
    pub state_hash: Option<ContentHash>,
    /// Where the samples stand.
    pub ledger: LedgerCounts,
    /// Settings that followed the links, where they did: the last change.
    pub settings: Option<SettingsView>,
    /// How deltas travel: `mesh` or `sharded`.
    pub exchange: Option<String>,
    /// The last checkpoint.
    pub checkpoint: Option<CheckpointView>,
    /// Times that a site's state was not the run's.
    pub divergences: u64,
    /// Inner steps that were made again.
    pub steps_recomputed: u64,
    /// Those of them that came out otherwise.
    pub step_mismatches: u64,
    /// How the run ended, in words.
    pub verdict: Option<String>,
    /// Sites by id, those that left included.
    pub sites: BTreeMap<SiteId, SiteView>,
    /// The newest warnings, oldest first.
    pub warnings: VecDeque<WarningView>,
    /// Warnings in all, those no longer kept included.
    pub warnings_total: u64,
    /// Time of the newest record, milliseconds since 1970-01-01 UTC.
    pub unix_ms: u64,
    round_spans: VecDeque<Span>,
    step_spans: VecDeque<Span>,
}

fn push_bounded<T>(queue: &mut VecDeque<T>, item: T, maximum: usize) {
    if queue.len() == maximum {
        queue.pop_front();
    }
    queue.push_back(item);
}

fn clipped(text: &str) -> String {
    text.chars().take(TEXT_CHARS_MAX).collect()
}

/// Tokens a second over spans; `None` before any time was measured.
fn speed(spans: &VecDeque<Span>) -> Option<f64> {
    let seconds: f64 = spans.iter().map(|span| span.seconds).sum();
    (seconds > 0.0).then(|| spans.iter().map(|span| span.tokens as f64).sum::<f64>() / seconds)
}

impl RunView {
    /// The view of a whole log.
    pub fn of<'a>(records: impl IntoIterator<Item = &'a Record>) -> Self {
        let mut view = Self::default();
        records.into_iter().for_each(|record| view.apply(record));
        view
    }

    /// Takes one more record into account.
    pub fn apply(&mut self, record: &Record) {
        self.unix_ms = self.unix_ms.max(record.unix_ms);
        self.apply_to_run(&record.event);
        self.apply_to_sites(&record.event);
        self.apply_warnings(record.unix_ms, &record.event);
    }

    fn apply_to_run(&mut self, event: &Event) {
        match event {
            Event::RunStarted { run, strategy, parameters, tokens_planned, rounds_planned, resumed_round, .. } => {
                self.start(run, strategy, *parameters, *tokens_planned, *rounds_planned, *resumed_round);
            }
            Event::RoundStarted { term, .. } => (self.state, self.term) = (RunState::Training, *term),
            Event::Step { step, loss_nats, tokens, seconds, .. } => {
                self.apply_step(*step, *loss_nats, Span { tokens: *tokens, seconds: *seconds });
            }
            Event::RoundComputed { loss_nats, .. } => self.loss_nats = Some(*loss_nats),
            Event::RoundClosed { round, term, .. } => {
                (self.state, self.round, self.term) = (RunState::Training, *round, *term);
            }
            Event::RolledBack { to, .. } => self.round = *to,
            Event::RoundCommitted { round, term, contributors, state_hash, seconds, tokens_total, .. } => {
                let tokens = contributors.iter().map(|contributor| contributor.tokens).sum();
                push_bounded(&mut self.round_spans, Span { tokens, seconds: *seconds }, SPEED_SPANS);
                (self.state, self.round, self.term) = (RunState::Training, *round, *term);
                (self.tokens_committed, self.tokens_open) = (*tokens_total, 0);
                self.state_hash = Some(*state_hash);
            }
            Event::Evaluated { round, nats_per_token, bits_per_byte, bigram_bits_per_byte, .. } => {
                let start = self.validation.as_ref().map_or(*bits_per_byte, |first| first.bits_per_byte_start);
                self.validation = Some(ValidationView {
                    round: *round,
                    nats_per_token: *nats_per_token,
                    bits_per_byte: *bits_per_byte,
                    bits_per_byte_start: start,
                    bigram_bits_per_byte: *bigram_bits_per_byte,
                });
            }
            Event::ExchangeChosen { exchange, .. } => self.exchange = Some(clipped(exchange)),
            Event::SettingsChanged { round, inner_steps, fragments, overlap_steps, codec, rank, reason } => {
                self.settings = Some(SettingsView {
                    round: *round,
                    inner_steps: *inner_steps,
                    fragments: *fragments,
                    overlap_steps: *overlap_steps,
                    codec: clipped(codec),
                    rank: *rank,
                    reason: clipped(reason),
                });
            }
            Event::Sample { text, .. } => self.sample = Some(clipped(text)),
            Event::CheckpointSaved { round, path, bytes, .. } => {
                self.checkpoint = Some(CheckpointView { round: *round, path: path.clone(), bytes: *bytes });
            }
            Event::Ledger { leased, committed, returned, lost } => {
                self.ledger = LedgerCounts { leased: *leased, committed: *committed, returned: *returned, lost: *lost };
            }
            Event::RunFinished { verdict, state_hash, rounds, tokens } => {
                (self.state, self.verdict) = (RunState::Finished, Some(clipped(verdict)));
                (self.state_hash, self.round) = (Some(*state_hash), Round(*rounds));
                (self.tokens_committed, self.tokens_open) = (*tokens, 0);
            }
            _ => {}
        }
    }

    /// A start, also one that resumes: members and speeds are those of a new process, what was reached stays.
    fn start(&mut self, run: &str, strategy: &str, parameters: u64, tokens: u64, rounds: u64, resumed: Option<Round>) {
        (self.run, self.strategy) = (run.to_owned(), strategy.to_owned());
        (self.parameters, self.tokens_planned, self.rounds_planned) = (parameters, tokens, rounds);
        (self.state, self.verdict) = (RunState::Waiting, None);
        self.round = resumed.unwrap_or_default();
        self.tokens_open = 0;
        if resumed.is_none() {
            self.tokens_committed = 0;
        }
        self.sites.clear();
        self.round_spans.clear();
        self.step_spans.clear();
    }

    fn apply_step(&mut self, step: u64, loss_nats: f64, span: Span) {
        (self.state, self.step, self.loss_nats) = (RunState::Training, step, Some(loss_nats));
        push_bounded(&mut self.step_spans, span, SPEED_SPANS);
        self.tokens_open = self.tokens_open.saturating_add(span.tokens);
    }

    /// The site's entry; `None` beyond [`SITES_MAX`]. A log may name a site that it never saw join.
    fn site(&mut self, site: SiteId) -> Option<&mut SiteView> {
        if self.sites.len() >= SITES_MAX && !self.sites.contains_key(&site) {
            return None;
        }
        Some(self.sites.entry(site).or_insert_with(|| SiteView {
            site,
            name: format!("site {site}"),
            engine: String::new(),
            device: None,
            maker: None,
            driver: None,
            memory_bytes: None,
            precision: None,
            state: SiteState::Joining,
            tokens_per_second: None,
            share: None,
            tokens: 0,
            compute_seconds: 0.0,
            idle_seconds: 0.0,
            bytes_sent: 0,
            deltas_refused: 0,
            deltas_clipped: 0,
            route: None,
            loss_nats: None,
            state_hash: None,
            left_reason: None,
            computed: VecDeque::new(),
        }))
    }

    fn change_site(&mut self, site: SiteId, change: impl FnOnce(&mut SiteView)) {
        if let Some(view) = self.site(site) {
            change(view);
        }
    }

    fn apply_to_sites(&mut self, event: &Event) {
        match event {
            Event::SiteJoined { site, name, engine, .. } => self.change_site(*site, |view| {
                (view.name, view.engine) = (clipped(name), clipped(engine));
                (view.state, view.left_reason) = (SiteState::Joining, None);
            }),
            Event::SiteDevice { site, engine, name, maker, driver, memory_bytes, precision } => {
                self.change_site(*site, |view| {
                    view.engine = clipped(engine);
                    (view.device, view.maker, view.driver) = (known(name), known(maker), known(driver));
                    (view.memory_bytes, view.precision) = (*memory_bytes, known(precision));
                });
            }
            Event::SiteReady { site, tokens_per_second } => self.change_site(*site, |view| {
                (view.state, view.tokens_per_second) = (SiteState::Ready, Some(*tokens_per_second));
            }),
            Event::SiteLeft { site, reason } => self.change_site(*site, |view| {
                (view.state, view.left_reason) = (SiteState::Left, Some(clipped(reason)));
            }),
            Event::RoundStarted { leases, .. } => {
                for lease in leases {
                    self.change_site(lease.site, |view| {
                        (view.state, view.share) = (SiteState::Training, Some(lease.share));
                    });
                }
            }
            Event::RoundComputed { round, site, tokens, compute_seconds, loss_nats } => {
                self.change_site(*site, |view| {
                    push_bounded(&mut view.computed, (*round, *compute_seconds), COMPUTED_ROUNDS_MAX);
                    (view.state, view.loss_nats) = (SiteState::Computed, Some(*loss_nats));
                    if *compute_seconds > 0.0 {
                        view.tokens_per_second = Some(*tokens as f64 / compute_seconds);
                    }
                });
            }
            Event::DeltaFetched { from_site, bytes, .. } => {
                self.change_site(*from_site, |view| view.bytes_sent = view.bytes_sent.saturating_add(*bytes));
            }
            Event::DeltaRefused { from_site, .. } => self.change_site(*from_site, |view| view.deltas_refused += 1),
            Event::DeltaClipped { site, .. } => self.change_site(*site, |view| view.deltas_clipped += 1),
            Event::RouteChosen { from_site, route, .. } => {
                self.change_site(*from_site, |view| view.route = Some(clipped(route)));
            }
            Event::RoundCommitted { round, contributors, seconds, .. } => {
                for contributor in contributors {
                    self.change_site(contributor.site, |view| view.contributed(*round, *seconds, contributor.tokens));
                }
                for view in self.sites.values_mut().filter(|view| view.state == SiteState::Computed) {
                    view.state = SiteState::Ready;
                }
            }
            Event::RoundApplied { site, state_hash, .. } => {
                self.change_site(*site, |view| view.state_hash = Some(*state_hash));
            }
            Event::SharesChanged { shares, .. } => {
                for share in shares {
                    self.change_site(share.site, |view| view.share = Some(share.share));
                }
            }
            _ => {}
        }
    }

    fn apply_warnings(&mut self, unix_ms: u64, event: &Event) {
        let is_wrong = matches!(event, Event::StepMismatch { .. });
        self.steps_recomputed += u64::from(is_wrong || matches!(event, Event::StepRecomputed { .. }));
        self.step_mismatches += u64::from(is_wrong);
        let Some((message, hint)) = event.warning() else { return };
        self.divergences += u64::from(matches!(event, Event::Diverged { .. }));
        self.warnings_total += 1;
        let warning = WarningView { unix_ms, message: clipped(&message), hint: hint.as_deref().map(clipped) };
        push_bounded(&mut self.warnings, warning, WARNINGS_MAX);
    }

    /// Tokens trained so far.
    pub fn tokens(&self) -> u64 {
        self.tokens_committed.saturating_add(self.tokens_open)
    }

    /// Tokens a second of the run over its last rounds, synchronisation included; before the first commit over the
    /// last inner steps.
    pub fn tokens_per_second(&self) -> Option<f64> {
        speed(&self.round_spans).or_else(|| speed(&self.step_spans))
    }

    /// Time left at the present speed. `None` before a speed is known and after the end.
    pub fn eta_seconds(&self) -> Option<f64> {
        let speed = self.tokens_per_second().filter(|speed| *speed > 0.0 && self.state == RunState::Training)?;
        Some(self.tokens_planned.saturating_sub(self.tokens()) as f64 / speed)
    }

    /// Sites that are members now.
    pub fn members(&self) -> impl Iterator<Item = &SiteView> {
        self.sites.values().filter(|site| site.state != SiteState::Left)
    }

    /// The status as one JSON object; `docs/events.md` describes each key. Unknown values are null.
    pub fn to_json(&self) -> serde_json::Value {
        serde_json::json!({
            "run": self.run,
            "strategy": self.strategy,
            "state": self.state,
            "round": self.round,
            "rounds_planned": self.rounds_planned,
            "term": self.term,
            "step": self.step,
            "parameters": self.parameters,
            "tokens": self.tokens(),
            "tokens_planned": self.tokens_planned,
            "tokens_per_second": self.tokens_per_second(),
            "eta_seconds": self.eta_seconds(),
            "loss_nats": self.loss_nats,
            "validation": self.validation,
            "sample": self.sample,
            "state_hash": self.state_hash,
            "ledger": self.ledger,
            "checkpoint": self.checkpoint,
            "divergences": self.divergences,
            "steps_recomputed": self.steps_recomputed,
            "step_mismatches": self.step_mismatches,
            "verdict": self.verdict,
            "sites": self.sites.values().collect::<Vec<_>>(),
            "warnings": self.warnings,
            "warnings_total": self.warnings_total,
            "unix_ms": self.unix_ms,
        })
    }

    /// The status as plain text, no line longer than `width` characters.
    pub fn render_table(&self, width: usize) -> String {
        let mut text = String::new();
        for line in self.summary_lines().into_iter().chain(self.site_lines()).chain(self.warning_lines()) {
            let line: String = line.chars().map(|c| if c.is_control() { ' ' } else { c }).take(width).collect();
            let _ = writeln!(text, "{}", line.trim_end());
        }
        text
    }

    fn summary_lines(&self) -> Vec<String> {
        let state = match self.state {
            RunState::Empty => "nothing logged yet",
            RunState::Waiting => "waiting for sites",
            RunState::Training => "training",
            RunState::Finished => "finished",
        };
        let mut lines = vec![format!("run {}  {}  {state}", self.run, self.strategy)];
        let mut progress = format!(
            "round {} of {}  {} of {} tokens",
            self.round,
            self.rounds_planned,
            counted(self.tokens() as f64),
            counted(self.tokens_planned as f64)
        );
        if let Some(speed) = self.tokens_per_second() {
            let _ = write!(progress, "  {} tokens/s", counted(speed));
        }
        if let Some(eta) = self.eta_seconds() {
            let _ = write!(progress, "  {} left", duration(eta));
        }
        lines.push(progress);
        let mut quality = Vec::new();
        quality.extend(self.loss_nats.map(|loss| format!("loss {loss:.4} nats/token")));
        if let Some(validation) = &self.validation {
            quality.push(format!(
                "validation {:.4} bits/byte (start {:.4}, bigram {:.4})",
                validation.bits_per_byte, validation.bits_per_byte_start, validation.bigram_bits_per_byte
            ));
        }
        lines.extend((!quality.is_empty()).then(|| quality.join("  ")));
        lines.extend(self.state_hash.map(|hash| format!("state {}", hash.short())));
        lines.extend(self.exchange.as_ref().map(|exchange| format!("exchange {exchange}")));
        let LedgerCounts { leased, committed, returned, lost } = self.ledger;
        lines.push(format!("samples  leased {leased}  committed {committed}  returned {returned}  lost {lost}"));
        lines.extend(self.verdict.as_ref().map(|verdict| format!("verdict: {verdict}")));
        lines
    }

    fn site_lines(&self) -> Vec<String> {
        if self.sites.is_empty() {
            return Vec::new();
        }
        // 80 columns with the hash.
        let row = |cells: [&str; 9]| {
            let [site, name, state, speed, share, idle, sent, loss, hash] = cells;
            format!("{site:>4} {name:<12} {state:<8} {speed:>8} {share:>6} {idle:>6} {sent:>8} {loss:>7}  {hash:<12}")
        };
        let mut lines = vec![row(["site", "name", "state", "tokens/s", "share", "idle", "sent", "loss", "hash"])];
        let percent = |part: f64| format!("{:.1}%", part * 100.0);
        for site in self.sites.values() {
            let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
            lines.push(row([
                &site.site.to_string(),
                &site.name.chars().take(12).collect::<String>(),
                state_word(site.state),
                &or_dash(site.tokens_per_second.map(counted)),
                &or_dash(site.share.map(percent)),
                &or_dash(site.idle_fraction().map(percent)),
                &format!("{}B", counted(site.bytes_sent as f64)),
                &or_dash(site.loss_nats.map(|loss| format!("{loss:.4}"))),
                &or_dash(site.state_hash.map(|hash| hash.short())),
            ]));
        }
        lines
    }

    fn warning_lines(&self) -> Vec<String> {
        let hidden = self.warnings_total - self.warnings.len() as u64;
        let mut lines = Vec::new();
        lines.extend((hidden > 0).then(|| format!("{hidden} earlier warnings are in the log")));
        for warning in &self.warnings {
            lines.push(format!("warning: {}", warning.message));
            lines.extend(warning.hint.as_ref().map(|hint| format!("hint: {hint}")));
        }
        lines
    }
}

fn state_word(state: SiteState) -> &'static str {
    match state {
        SiteState::Joining => "joining",
        SiteState::Ready => "ready",
        SiteState::Training => "training",
        SiteState::Computed => "computed",
        SiteState::Left => "left",
    }
}

/// A quantity with at most four significant digits and a decimal prefix: `950`, `12.4 k`, `3.41 M`.
pub fn counted(value: f64) -> String {
    const PREFIXES: [&str; 5] = ["", " k", " M", " G", " T"];
    let mut scaled = value;
    let mut prefix = 0;
    while scaled >= 999.5 && prefix + 1 < PREFIXES.len() {
        scaled /= 1_000.0;
        prefix += 1;
    }
    match (prefix, scaled) {
        (0, _) => format!("{scaled:.0}"),
        (_, small) if small < 10.0 => format!("{small:.2}{}", PREFIXES[prefix]),
        (_, middle) if middle < 100.0 => format!("{middle:.1}{}", PREFIXES[prefix]),
        _ => format!("{scaled:.0}{}", PREFIXES[prefix]),
    }
}

/// A span of time for a person: `42s`, `3m 07s`, `2h 05m`, `3d 4h`.
pub fn duration(seconds: f64) -> String {
    let total = seconds.max(0.0).round() as u64;
    let (days, hours, minutes) = (total / 86_400, total / 3_600 % 24, total / 60 % 60);
    match total {
        0..60 => format!("{total}s"),
        60..3_600 => format!("{minutes}m {:02}s", total % 60),
        3_600..86_400 => format!("{hours}h {minutes:02}m"),
        _ => format!("{days}d {hours}h"),
    }
}

#[cfg(test)]
#[path = "view_tests.rs"]
mod view_tests;
