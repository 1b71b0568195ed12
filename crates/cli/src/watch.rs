//! What a person sees while a run trains: a projection of its events, on standard error.

use crate::output::Output;
use base::RunConfig;
use std::io::IsTerminal;
use std::time::Instant;
use telemetry::terminal::Cadence;
use telemetry::{EtaModel, Event, Mode, Position, Progress, Record, RunView, Watcher};

/// Width of the bar where the terminal does not tell.
const COLUMNS_DEFAULT: u16 = 100;

/// Shows events as they come: progress with the time left, validations, samples, warnings.
pub(crate) struct Watch {
    quiet: bool,
    progress: Progress,
    eta: EtaModel,
    view: RunView,
    position: Position,
    steps_per_round: u64,
    /// The last round before the schedule in use, and the run's inner steps up to its end.
    schedule_since: (u64, u64),
    began: Instant,
    last: Instant,
}

impl Watch {
    /// Watches a run. With `--json` nothing but warnings is shown.
    pub(crate) fn new(output: &Output, config: &RunConfig) -> Self {
        let columns = std::env::var("COLUMNS").ok().and_then(|text| text.parse().ok()).unwrap_or(COLUMNS_DEFAULT);
        let mode = Mode::choose(std::io::stderr().is_terminal(), std::env::var_os("NO_COLOR").as_deref(), columns);
        let per_round = config.steps_per_round();
        let validations = Cadence { every_steps: config.evaluate.every_rounds * per_round, at_end: true };
        let saves = Cadence { every_steps: config.checkpoint.every_rounds * per_round, at_end: true };
        Self {
            quiet: output.is_json(),
            progress: Progress::new(Box::new(std::io::stderr()), mode, config.train.steps),
            eta: EtaModel::new(config.train.steps, validations, saves),
            view: RunView::default(),
            position: Position::default(),
            steps_per_round: per_round,
            schedule_since: (0, 0),
            began: Instant::now(),
            last: Instant::now(),
        }
    }

    /// The watch as a callback.
    pub(crate) fn watcher(mut self) -> Watcher {
        Box::new(move |record| self.see(record))
    }

    /// Everything seen so far.
    pub(crate) fn view(&self) -> &RunView {
        &self.view
    }

    /// Takes the bar away.
    pub(crate) fn finish(&self) {
        self.progress.finish();
    }

    /// Shows one record.
    pub(crate) fn see(&mut self, record: &Record) {
        self.view.apply(record);
        if let Some(text) = warning_text(&record.event) {
            return self.progress.say(&text);
        }
        match &record.event {
            Event::Diverged { site, round, .. } => {
                self.progress
                    .say(&format!("warning: site {site} holds another state after round {round} and is dropped"));
            }
            _ if self.quiet => {}
            Event::Step { step, loss_nats, seconds, .. } => {
                self.eta.observe_step(*seconds);
                self.position.loss_nats = *loss_nats;
                self.moved(*step);
            }
            Event::RoundComputed { loss_nats, .. } => self.position.loss_nats = *loss_nats,
            Event::RoundCommitted { round, seconds, .. } => {
                self.eta.observe_step(seconds / self.steps_per_round as f64);
                self.position.round = round.0;
                self.moved(self.step_of(round.0));
            }
            Event::SettingsChanged { round, inner_steps, fragments, reason, .. } => {
                let before = round.0.saturating_sub(1);
                self.schedule_since = (before, self.step_of(before));
                self.steps_per_round = (inner_steps / u64::from(*fragments).max(1)).max(1);
                self.progress.say(&format!("from round {round} on: {reason}"));
            }
            Event::ExchangeChosen { round, exchange, reason } => {
                self.progress.say(&format!("from round {round} on: exchange {exchange}: {reason}"));
            }
            Event::Evaluated { step, bits_per_byte, bigram_bits_per_byte, .. } => {
                self.eta.observe_validation(self.last.elapsed().as_secs_f64());
                self.position.bits_per_byte = Some(*bits_per_byte);
                self.progress.say(&format!(
                    "step {step}: validation {bits_per_byte:.4} bits/byte (bigram model {bigram_bits_per_byte:.4})"
                ));
                self.last = Instant::now();
            }
            Event::CheckpointSaved { seconds, .. } => self.eta.observe_save(*seconds),
            Event::Sample { text, .. } => {
                let text: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(160).collect();
                self.progress.say(&format!("  sample: {}", text.trim()));
            }
            Event::SiteReady { site, tokens_per_second } => {
                self.progress.say(&format!("site {site} is ready: {tokens_per_second:.0} tokens/s alone"));
            }
            Event::SiteLeft { site, reason } => self.progress.say(&format!("site {site} left: {reason}")),
            _ => {}
        }
    }

    /// Inner steps of the run up to the end of a round.
    fn step_of(&self, round: u64) -> u64 {
        let (round_before, step_before) = self.schedule_since;
        step_before + round.saturating_sub(round_before) * self.steps_per_round
    }

    fn moved(&mut self, step: u64) {
        self.last = Instant::now();
        self.position.step = step;
        let (round_before, step_before) = self.schedule_since;
        self.position.round = round_before + step.saturating_sub(step_before) / self.steps_per_round;
        self.position.tokens_per_second = self.view.tokens_per_second().unwrap_or(0.0);
        self.progress.update(&self.position, self.eta.seconds_left(step), self.began.elapsed().as_secs_f64());
    }
}

/// What is shown even where progress is not: whatever is not part of a run without trouble.
pub(crate) fn warning_text(event: &Event) -> Option<String> {
    let (message, hint) = event.warning()?;
    Some(match hint {
        Some(hint) => format!("warning: {message}\nhint: {hint}"),
        None => format!("warning: {message}"),
    })
}
