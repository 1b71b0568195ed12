//! What will happen when: an order that depends on the seed alone.

use crate::coordinator_node::CoordinatorEvent;
use crate::faults::Fault;
use crate::site::{Key, SiteEvent, Try};
use std::cmp::Ordering;
use std::collections::BinaryHeap;

/// Nanoseconds in a second: times are compared as whole numbers.
const NANOSECONDS: f64 = 1e9;

/// A process that can be stopped: of the coordinator, or a site's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Sleeper {
    Coordinator(u64),
    Site(usize),
}

/// Something that happens at a time.
#[derive(Debug)]
pub(crate) enum Happening {
    /// To that process of the coordinator.
    Coordinator(u64, CoordinatorEvent),
    /// To a site, in its that many-th process.
    Site(usize, u64, SiteEvent),
    /// A site's process dials the coordinator, for the that many-th time.
    Dials(usize, u64, u64),
    /// A site's process asks another site.
    Asked { holder: usize, asker: (usize, u64), tried: Try, key: Key },
    /// A supervisor starts the coordinator, if it does not run.
    StartCoordinator,
    /// The same with a site.
    StartSite(usize),
    /// Something breaks.
    Fault(Fault),
    /// What broke is mended.
    Mended(Fault),
    /// A process that was stopped goes on.
    Wakes(Sleeper),
    /// Nothing breaks from now on.
    FaultsStop,
}

struct Entry {
    time: u64,
    sequence: u64,
    happening: Happening,
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        (self.time, self.sequence) == (other.time, other.sequence)
    }
}

impl Eq for Entry {}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Entry {
    /// The heap gives the greatest first: that is the earliest, and among equals the one that was put in first.
    fn cmp(&self, other: &Self) -> Ordering {
        (other.time, other.sequence).cmp(&(self.time, self.sequence))
    }
}

/// The events that are to come.
#[derive(Default)]
pub(crate) struct Queue {
    heap: BinaryHeap<Entry>,
    pushed: u64,
}

impl Queue {
    /// Puts in what happens at `seconds`.
    pub(crate) fn push(&mut self, seconds: f64, happening: Happening) {
        self.pushed += 1;
        let time = (seconds.max(0.0) * NANOSECONDS) as u64;
        self.heap.push(Entry { time, sequence: self.pushed, happening });
    }

    /// Takes out what happens next, and when.
    pub(crate) fn pop(&mut self) -> Option<(f64, Happening)> {
        let Entry { time, happening, .. } = self.heap.pop()?;
        Some((time as f64 / NANOSECONDS, happening))
    }

    pub(crate) fn len(&self) -> usize {
        self.heap.len()
    }
}
