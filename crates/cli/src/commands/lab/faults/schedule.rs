//! When each fault begins and is mended: from a list, or drawn from a seed. No clock, no process.

use super::spec::{Fault, Names, What};
use base::random::Random;

/// Stream of the seed that chaos is drawn from.
const CHAOS_STREAM: u64 = 0xC4A0;

/// Chaos is drawn for a day: no lab is longer.
const CHAOS_SECONDS: f64 = 86_400.0;

/// A killed process is back, and has been at work for a while, before the next one dies: one at a time is what is measured.
const PERIOD_PER_PAUSE_MIN: f64 = 4.0;

/// Shortest period: a day of it is 17,280 kills.
const PERIOD_SECONDS_MIN: f64 = 5.0;

/// The middle part of each period in which its kill comes, so that two are at least half a period apart.
const KILL_WITHIN: (f64, f64) = (0.25, 0.75);

/// What is to be done next.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(in super::super) enum Action {
    /// This fault begins; its number in the order of beginnings.
    Begin(usize),
    /// It is mended.
    Mend(usize),
}

/// Faults in the order in which they begin, and all that is to be done in the order in which it is.
#[derive(Debug, Clone, Default)]
pub(in super::super) struct Schedule {
    faults: Vec<Fault>,
    texts: Vec<String>,
    /// Seconds, ascending.
    actions: Vec<(f64, Action)>,
    done: usize,
}

/// One kill in each period, at a time within its middle half. All processes are killed equally often: they come in rows, each row in an
/// order of its own.
#[derive(Debug, Clone, Copy)]
pub(super) struct Chaos {
    pub(super) seed: u64,
    pub(super) period_seconds: f64,
    pub(super) pause_seconds: f64,
    pub(super) processes: usize,
}

/// The kills of a day.
pub(super) fn chaos(chaos: &Chaos) -> Result<Vec<Fault>, String> {
    let Chaos { seed, period_seconds: period, pause_seconds: pause, processes } = *chaos;
    let least = (PERIOD_PER_PAUSE_MIN * pause).max(PERIOD_SECONDS_MIN);
    if !(least..=CHAOS_SECONDS).contains(&period) {
        return Err(format!(
            "--chaos {period}: {least} s to a day are expected, at least {PERIOD_PER_PAUSE_MIN} times --restart-after"
        ));
    }
    let mut random = Random::new(seed, CHAOS_STREAM);
    let mut row: Vec<usize> = Vec::new();
    let mut faults = Vec::new();
    for number in 0..(CHAOS_SECONDS / period) as u64 {
        if row.is_empty() {
            row = shuffled(processes, &mut random);
        }
        let Some(victim) = row.pop() else { break };
        let within = KILL_WITHIN.0 + (KILL_WITHIN.1 - KILL_WITHIN.0) * random.next_unit();
        // Whole milliseconds read well.
        let from = ((number as f64 + within) * period * 1e3).round() / 1e3;
        faults.push(Fault { what: What::Kill(victim), from, to: from + pause });
    }
    Ok(faults)
}

/// Fisher and Yates.
fn shuffled(count: usize, random: &mut Random) -> Vec<usize> {
    let mut row: Vec<usize> = (0..count).collect();
    for last in (1..count).rev() {
        row.swap(last, random.next_below(last as u64 + 1) as usize);
    }
    row
}

impl Schedule {
    /// Refuses faults that are in each other's way: of one process, or of one direction of a link, at the same time.
    pub(super) fn new(mut faults: Vec<Fault>, names: &Names) -> Result<Self, String> {
        faults.sort_by(|one, other| one.from.total_cmp(&other.from));
        for (index, fault) in faults.iter().enumerate() {
            let collides = |other: &&Fault| other.from <= fault.to && concern_the_same(fault.what, other.what);
            if let Some(other) = faults[index + 1..].iter().find(collides) {
                let (one, other) = (names.describe(fault), names.describe(other));
                return Err(format!("'{other}' comes before '{one}' is over, at {} s", fault.to));
            }
        }
        let texts = faults.iter().map(|fault| names.describe(fault)).collect();
        let both =
            |(index, fault): (usize, &Fault)| [(fault.from, Action::Begin(index)), (fault.to, Action::Mend(index))];
        let mut actions: Vec<(f64, Action)> = faults.iter().enumerate().flat_map(both).collect();
        // Stable: what begins is mended after it.
        actions.sort_by(|(one, _), (other, _)| one.total_cmp(other));
        Ok(Self { faults, texts, actions, done: 0 })
    }

    pub(in super::super) fn is_empty(&self) -> bool {
        self.faults.is_empty()
    }

    pub(in super::super) fn fault(&self, index: usize) -> Fault {
        self.faults[index]
    }

    pub(in super::super) fn text(&self, index: usize) -> &str {
        &self.texts[index]
    }

    /// What is due at that time and was not taken before.
    pub(in super::super) fn next(&mut self, seconds: f64) -> Option<Action> {
        let (at, action) = *self.actions.get(self.done)?;
        (at <= seconds).then(|| {
            self.done += 1;
            action
        })
    }
}

/// Whether two faults touch one process, or one direction.
fn concern_the_same(one: What, other: What) -> bool {
    let process = |what: What| match what {
        What::Kill(place) | What::Stop(place) => Some(place),
        What::Cut { .. } => None,
    };
    let directions = |what: What| match what {
        What::Cut { from, to, both: true } => vec![(from, to), (to, from)],
        What::Cut { from, to, both: false } => vec![(from, to)],
        _ => Vec::new(),
    };
    let same_process = process(one).is_some() && process(one) == process(other);
    same_process || directions(one).iter().any(|direction| directions(other).contains(direction))
}
