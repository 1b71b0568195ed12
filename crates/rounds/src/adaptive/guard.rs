//! Watches what thrift costs, and says when quality may be worth a wait.
//!
//! Two signs: the residual of error feedback grows beyond what a round sends, or the validation loss rises or falls much slower than
//! before. Either starts a trial of better settings; the trial pays where the loss falls faster in time than before it, the wait
//! included. A trial that did not pay makes the next one wait twice as long.

use std::collections::VecDeque;

/// Losses whose mean counts as one: single validations are noisy.
const WINDOW: usize = 3;

/// Three windows show a trend of the trend.
const LOSSES: usize = 3 * WINDOW;

/// A rise of the mean by less than this part is noise.
const RISE_PART: f64 = 0.002;

/// A fall of less than this part of the fall before it lags. A power law keeps half or more once a run is a few windows old.
const LAG_PART: f64 = 0.25;

/// More waits in the residual than a round sends.
const RESIDUAL_RATIO_MAX: f64 = 1.0;

/// By how much the residual must have grown over [`RESIDUALS`] rounds: a large one that rests is the codec's way of working.
const RESIDUAL_GROWTH: f64 = 1.25;

/// Rounds over which growth is seen.
const RESIDUALS: usize = 8;

/// A trial without validations ends after as many rounds.
const TRIAL_ROUNDS: u32 = 32;

/// Rounds between two trials, doubled after each that did not pay.
const PAUSE_ROUNDS: (u32, u32) = (32, 1_024);

/// What is known of the training when a round closes.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Quality {
    /// Inner steps of the run so far.
    pub step: u64,
    /// Norm of what coding left over, over the norm of the delta that was to be coded.
    pub residual_ratio: Option<f64>,
    /// A new validation loss, if there is one.
    pub validation_loss: Option<f64>,
}

/// What the guard has seen, with its numbers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Sign {
    Residual { ratio: f64, before: f64 },
    Rising { loss: f64, before: f64 },
    Lagging { fall: f64, before: f64 },
}

impl std::fmt::Display for Sign {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Residual { ratio, before } => {
                write!(formatter, "coding leaves over {ratio:.2} of a delta, {RESIDUALS} rounds ago {before:.2}")
            }
            Self::Rising { loss, before } => {
                write!(formatter, "the validation loss rose from {before:.4} to {loss:.4}")
            }
            Self::Lagging { fall, before } => {
                let (fall, before) = (1e3 * fall, 1e3 * before);
                write!(formatter, "the validation loss falls by {fall:.4} in 1,000 steps, before by {before:.4}")
            }
        }
    }
}

/// How a trial ended.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Verdict {
    Paid,
    DidNotPay,
}

#[derive(Debug, Clone)]
struct Trial {
    rounds: u32,
    /// Fall of the loss a step before it, if known.
    fall_before: Option<f64>,
    residual_before: Option<f64>,
    stall: f64,
}

#[derive(Debug, Clone)]
pub(super) struct Guard {
    losses: VecDeque<(u64, f64)>,
    residuals: VecDeque<f64>,
    trial: Option<Trial>,
    rounds: u32,
    pause: u32,
}

impl Default for Guard {
    fn default() -> Self {
        let (losses, residuals) = (VecDeque::new(), VecDeque::new());
        Self { losses, residuals, trial: None, rounds: 0, pause: PAUSE_ROUNDS.0 }
    }
}

impl Guard {
    /// Takes what a round brought.
    pub(super) fn observe(&mut self, quality: &Quality) {
        self.rounds = self.rounds.saturating_add(1);
        if let Some(trial) = &mut self.trial {
            trial.rounds += 1;
        }
        if let Some(loss) = quality.validation_loss.filter(|loss| loss.is_finite())
            && self.losses.back().is_none_or(|(step, _)| *step < quality.step)
        {
            push(&mut self.losses, (quality.step, loss), LOSSES);
        }
        if let Some(ratio) = quality.residual_ratio.filter(|ratio| ratio.is_finite()) {
            push(&mut self.residuals, ratio, RESIDUALS);
        }
    }

    /// Whether a trial should begin.
    pub(super) fn sign(&self) -> Option<Sign> {
        if self.trial.is_some() || self.rounds < self.pause {
            return None;
        }
        self.residual_sign().or_else(|| self.loss_sign())
    }

    fn residual_sign(&self) -> Option<Sign> {
        let (before, ratio) = (*self.residuals.front()?, *self.residuals.back()?);
        let grows = self.residuals.len() == RESIDUALS && ratio > RESIDUAL_RATIO_MAX && ratio > RESIDUAL_GROWTH * before;
        grows.then_some(Sign::Residual { ratio, before })
    }

    fn loss_sign(&self) -> Option<Sign> {
        let (newest, middle) = (self.window(0)?, self.window(1)?);
        if newest.1 > middle.1 * (1.0 + RISE_PART) {
            return Some(Sign::Rising { loss: newest.1, before: middle.1 });
        }
        let before = fall(self.window(2)?, middle);
        let fall = fall(middle, newest);
        (before > 0.0 && fall < LAG_PART * before).then_some(Sign::Lagging { fall, before })
    }

    /// Mean step and loss of a window, 0 the newest.
    fn window(&self, index: usize) -> Option<(f64, f64)> {
        let end = self.losses.len().checked_sub(index * WINDOW)?;
        let losses = self.losses.range(end.checked_sub(WINDOW)?..end);
        let (step, loss) = losses.fold((0.0, 0.0), |(steps, sum), (step, loss)| (steps + *step as f64, sum + loss));
        Some((step / WINDOW as f64, loss / WINDOW as f64))
    }

    /// Better settings, for which sites wait `stall` of the time, have been taken.
    pub(super) fn begin(&mut self, stall: f64) {
        let fall_before = self.window(1).zip(self.window(0)).map(|(middle, newest)| fall(middle, newest));
        let residual_before = self.residuals.back().copied();
        self.trial = Some(Trial { rounds: 0, fall_before, residual_before, stall });
        self.losses.clear();
        self.residuals.clear();
    }

    /// How the trial went, once it can be told; it is over then.
    pub(super) fn verdict(&mut self) -> Option<Verdict> {
        let trial = self.trial.as_ref()?;
        let found = self.window(1).zip(self.window(0)).map(|(middle, newest)| fall(middle, newest));
        if found.is_none() && trial.rounds < TRIAL_ROUNDS {
            return None;
        }
        let paid = match (found, trial.fall_before) {
            // Where the loss rose before, no faster rise is not enough: it must fall.
            (Some(found), Some(before)) => found > 0.0 && found * (1.0 - trial.stall) > before,
            _ => self.residuals.back().zip(trial.residual_before).is_some_and(|(now, before)| *now < before),
        };
        self.end();
        self.pause = if paid { PAUSE_ROUNDS.0 } else { (2 * self.pause).min(PAUSE_ROUNDS.1) };
        Some(if paid { Verdict::Paid } else { Verdict::DidNotPay })
    }

    /// Other settings were needed for the link's sake: what was seen under the old ones says nothing any more.
    pub(super) fn end(&mut self) {
        self.trial = None;
        self.rounds = 0;
        self.losses.clear();
        self.residuals.clear();
    }
}

/// How much the loss fell a step between two windows.
fn fall(before: (f64, f64), after: (f64, f64)) -> f64 {
    (before.1 - after.1) / (after.0 - before.0).max(1.0)
}

fn push<T>(queue: &mut VecDeque<T>, value: T, length_max: usize) {
    if queue.len() == length_max {
        queue.pop_front();
    }
    queue.push_back(value);
}
