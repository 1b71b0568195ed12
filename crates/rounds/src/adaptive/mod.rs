//! Chooses H, the number of fragments, tau and the codec from what was measured, so that the link is never waited for, with the least
//! loss that fits ([`ladder`]); and steps back to better settings where quality pays ([`guard`]).
//!
//! Pure decisions: once a round somebody calls [`Adaptive::decide`], and a [`Change`] says what the next plans should hold, and why in
//! words. Settings stay until they no longer fit for [`LATE_ROUNDS`] rounds, or better ones have fitted with a margin for
//! [`BETTER_ROUNDS`]: a new choice uses 80 % of the limits and is kept up to 100 %, so that measurements must be off by a quarter to
//! undo it. It does not know how P is changed in a running schedule: all open rounds must have been committed first.

mod guard;
mod ladder;
mod measured;
#[cfg(test)]
mod tests;

pub use guard::Quality;
pub use ladder::{Choice, FIT_LOAD_MAX, Limits, residual_part};
pub use measured::{Exchange, LinkMeasure, Measured, Sharing};

use crate::stall::{Conditions, RoundTime};
use base::ParameterSchema;
use guard::{Guard, Sign, Verdict};
use ladder::{Allowed, Sizes, best, bytes_of, least_stall, time_of};
use measured::{Bottleneck, Smoothed};

/// Rounds in a row in which the settings in use do not fit before others are taken: one slow round is a hiccup.
pub const LATE_ROUNDS: u32 = 2;

/// Rounds in a row in which better settings fit before they are taken.
pub const BETTER_ROUNDS: u32 = 8;

/// By how many doublings of the age they must be better: half a codec's step, 0.2 % of loss.
pub const BETTER_DOUBLINGS: f64 = 0.25;

/// Where nothing fits: of the wait so far, what other settings may leave; less of a gain is not worth a change.
pub const WAIT_PART_MAX: f64 = 0.8;

/// Part of the time that sites may wait for a link where the guard asks for quality.
pub const GUARD_STALL_MAX: f64 = 0.1;

/// A decision to go on with other settings.
#[derive(Debug, Clone, PartialEq)]
pub struct Change {
    /// Those in use until now.
    pub from: Choice,
    /// Those to take.
    pub to: Choice,
    /// Why, for people.
    pub reason: String,
}

/// The settings in use, and what decides when others are taken.
#[derive(Debug, Clone)]
pub struct Adaptive {
    limits: Limits,
    sizes: Sizes,
    choice: Choice,
    smoothed: Smoothed,
    guard: Guard,
    /// The choice in use is the guard's: sites may wait a little.
    guarded: bool,
    late: u32,
    better: u32,
}

impl Adaptive {
    /// Begins with `choice`, as the configuration has it.
    pub fn new(limits: Limits, schema: &ParameterSchema, choice: Choice) -> Self {
        let sizes = Sizes::of(schema, &limits, &choice);
        let (smoothed, guard) = (Smoothed::default(), Guard::default());
        Self { limits, sizes, choice, smoothed, guard, guarded: false, late: 0, better: 0 }
    }

    /// The settings in use.
    pub fn choice(&self) -> Choice {
        self.choice
    }

    /// Takes what a round brought. A change is already in use when it is returned.
    pub fn decide(&mut self, measured: &Measured, quality: &Quality) -> Option<Change> {
        self.guard.observe(quality);
        if measured.sites < 2 {
            return None;
        }
        let (newest, bottleneck) = measured.conditions()?;
        let conditions = self.smoothed.add(newest, measured.sites);
        let view = View { conditions, bottleneck, sites: measured.sites };
        self.for_the_link(&view).or_else(|| self.for_quality(&view)).or_else(|| self.for_the_better(&view))
    }

    fn time(&self, choice: &Choice, view: &View) -> RoundTime {
        time_of(choice, &self.sizes, &view.conditions)
    }

    /// The best that fits; where nothing does, what waits least.
    fn target(&self, view: &View) -> Option<Choice> {
        best(&self.limits, &self.sizes, &view.conditions, Allowed::Margin)
            .or_else(|| least_stall(&self.limits, &self.sizes, &view.conditions))
    }

    fn for_the_link(&mut self, view: &View) -> Option<Change> {
        let time = self.time(&self.choice, view);
        let fits = match self.guarded {
            true => 1.0 - time.utilisation() <= GUARD_STALL_MAX,
            false => time.load() <= 1.0,
        };
        self.late = if fits { 0 } else { self.late.saturating_add(1) };
        if self.late < LATE_ROUNDS {
            return None;
        }
        let to = self.target(view)?;
        let after = self.time(&to, view);
        // Where nothing fits, only what waits clearly less is worth a change.
        let waits = |time: &RoundTime| time.stall_seconds / time.compute_seconds;
        if to == self.choice || (after.load() > 1.0 && waits(&after) > WAIT_PART_MAX * waits(&time)) {
            return None;
        }
        let reason = format!("{view}: {}; {}", self.shortage(&time), self.use_of(&to, &after));
        self.guard.end();
        self.guarded = false;
        Some(self.change(to, reason))
    }

    fn for_quality(&mut self, view: &View) -> Option<Change> {
        if let Some(verdict) = self.guard.verdict() {
            return self.after_trial(verdict, view);
        }
        let sign = self.guard.sign()?;
        let to = best(&self.limits, &self.sizes, &view.conditions, Allowed::Stall(GUARD_STALL_MAX))?;
        if to.cost_doublings() + BETTER_DOUBLINGS > self.choice.cost_doublings() {
            return None;
        }
        let reason = self.trial_reason(&sign, &to, view);
        self.guard.begin(1.0 - self.time(&to, view).utilisation());
        self.guarded = true;
        Some(self.change(to, reason))
    }

    fn trial_reason(&self, sign: &Sign, to: &Choice, view: &View) -> String {
        let stall = 100.0 * (1.0 - self.time(to, view).utilisation());
        format!("{sign}: better settings are tried, although sites wait for the link {stall:.0} % of the time")
    }

    fn after_trial(&mut self, verdict: Verdict, view: &View) -> Option<Change> {
        if verdict == Verdict::Paid {
            return None;
        }
        self.guarded = false;
        let to = self.target(view).filter(|to| *to != self.choice)?;
        let reason = "better settings did not lower the loss faster: back to those that the link carries".to_owned();
        Some(self.change(to, reason))
    }

    fn for_the_better(&mut self, view: &View) -> Option<Change> {
        let to = best(&self.limits, &self.sizes, &view.conditions, Allowed::Margin);
        let gained = to.map_or(0.0, |to| self.choice.cost_doublings() - to.cost_doublings());
        self.better = if gained >= BETTER_DOUBLINGS { self.better.saturating_add(1) } else { 0 };
        let to = to.filter(|_| self.better >= BETTER_ROUNDS)?;
        let time = self.time(&to, view);
        let reason =
            format!("{view}: for {BETTER_ROUNDS} rounds better settings have fitted; {}", self.use_of(&to, &time));
        self.guard.end();
        self.guarded = false;
        Some(self.change(to, reason))
    }

    /// Why the settings in use do not fit.
    fn shortage(&self, time: &RoundTime) -> String {
        let (choice, kilobytes) = (&self.choice, kilobytes(&self.choice, &self.sizes));
        let transfer = time.link_seconds.max(time.host_seconds);
        if transfer > time.compute_seconds {
            let (round, steps) = (time.compute_seconds, choice.inner_steps / u64::from(choice.fragments.max(1)));
            return format!(
                "{choice} sends {kilobytes:.1} kB in {transfer:.3} s, and the {steps} steps of a round take {round:.3} s"
            );
        }
        let (merge, overlap, steps) = (time.merge_seconds, time.overlap_seconds, choice.overlap_steps);
        format!(
            "{choice} sends {kilobytes:.1} kB and merges after {merge:.3} s, and {steps} steps of overlap take {overlap:.3} s"
        )
    }

    /// How a choice fits.
    fn use_of(&self, choice: &Choice, time: &RoundTime) -> String {
        let kilobytes = kilobytes(choice, &self.sizes);
        let RoundTime { link_seconds, compute_seconds, merge_seconds, overlap_seconds, .. } = time;
        let fits = format!(
            "{choice} sends {kilobytes:.1} kB in {link_seconds:.3} of the {compute_seconds:.3} s that a round computes, \
             and merges after {merge_seconds:.3} of {overlap_seconds:.3} s"
        );
        let stall = 100.0 * (1.0 - time.utilisation());
        if stall > 0.0 { format!("{fits}; sites wait {stall:.0} % of the time, nothing waits less") } else { fits }
    }

    fn change(&mut self, to: Choice, reason: String) -> Change {
        let from = std::mem::replace(&mut self.choice, to);
        (self.late, self.better) = (0, 0);
        Change { from, to, reason }
    }
}

fn kilobytes(choice: &Choice, sizes: &Sizes) -> f64 {
    1e-3 * bytes_of(choice, sizes) as f64
}

/// What a decision is made on.
struct View {
    conditions: Conditions,
    bottleneck: Bottleneck,
    sites: usize,
}

impl std::fmt::Display for View {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Bottleneck { from, to, bytes_per_second } = &self.bottleneck;
        let megabits = 8e-6 * bytes_per_second;
        write!(formatter, "{megabits:.1} Mbit/s from {from} to {to}, {} sites", self.sites)
    }
}
