//! What one peer may take of a listener once it has proven its key: connections, and messages and bytes a second over all of them.
//!
//! Any key can be proven, for anybody can make one; whether it is a member's is decided by the application, a message later. So these
//! bounds hold for strangers with a key and for members alike. A peer with too many connections gets no more; one that says too much is
//! read more slowly, and what it has not been read waits in its own socket, not in our memory.
//!
//! Two buckets ([`Bucket`]) leak at a constant rate: a message may be read while neither is full. Content of blobs and probes is not
//! counted: it travels only when it was asked for, and has its own bounds.

use crate::limits::{
    GREETING_BYTES_MAX, PEER_BYTES_BURST, PEER_BYTES_PER_SECOND_MAX, PEER_CONNECTIONS_MAX, PEER_MESSAGES_BURST,
    PEER_MESSAGES_PER_SECOND_MAX, REQUEST_BYTES_MAX, SITE_MESSAGE_BYTES_MAX,
};
use crate::preamble::Purpose;
use base::ContentHash;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// What one peer may take. The default is right for use; tests take less.
#[derive(Debug, Clone, Copy)]
pub struct PeerLimits {
    /// Open connections.
    pub connections_max: usize,
    /// Body of the first frame of a control connection or a probe.
    pub greeting_bytes_max: usize,
    /// Body of a later frame of a control connection.
    pub message_bytes_max: usize,
    /// Messages: how many at once, and how many a second after that.
    pub messages: Rate,
    /// Bytes of messages, the same.
    pub bytes: Rate,
}

/// A rate that holds on average, and what may come at once.
#[derive(Debug, Clone, Copy)]
pub struct Rate {
    /// At once.
    pub burst: f64,
    /// Each second.
    pub per_second: f64,
}

impl Default for PeerLimits {
    fn default() -> Self {
        Self {
            connections_max: PEER_CONNECTIONS_MAX,
            greeting_bytes_max: GREETING_BYTES_MAX,
            message_bytes_max: SITE_MESSAGE_BYTES_MAX,
            messages: Rate { burst: PEER_MESSAGES_BURST, per_second: PEER_MESSAGES_PER_SECOND_MAX },
            bytes: Rate { burst: PEER_BYTES_BURST, per_second: PEER_BYTES_PER_SECOND_MAX },
        }
    }
}

/// What has come and not leaked yet.
#[derive(Debug, Clone, Copy)]
struct Bucket {
    rate: Rate,
    level: f64,
    /// When that was the level.
    at: Instant,
}

impl Bucket {
    fn new(rate: Rate, now: Instant) -> Self {
        Self { rate, level: 0.0, at: now }
    }

    /// Adds what has come.
    fn fill(&mut self, amount: f64, now: Instant) {
        let leaked = now.saturating_duration_since(self.at).as_secs_f64() * self.rate.per_second;
        (self.level, self.at) = ((self.level - leaked).max(0.0) + amount, now);
    }

    /// Until it is no fuller than it may be.
    fn wait(&self, now: Instant) -> Duration {
        let leaked = now.saturating_duration_since(self.at).as_secs_f64() * self.rate.per_second;
        let excess = self.level - leaked - self.rate.burst;
        Duration::from_secs_f64((excess / self.rate.per_second).clamp(0.0, WAIT_SECONDS_MAX))
    }
}

/// No message is waited for longer, whatever a clock does; a full frame over a full bucket leaks in a second.
const WAIT_SECONDS_MAX: f64 = 5.0;

const _: () = assert!(SITE_MESSAGE_BYTES_MAX as f64 / PEER_BYTES_PER_SECOND_MAX <= WAIT_SECONDS_MAX);

/// The peers that have a connection to one listener. Cheap to clone; all clones are one.
#[derive(Debug, Clone, Default)]
pub(crate) struct Peers {
    limits: PeerLimits,
    known: Arc<Mutex<HashMap<ContentHash, Known>>>,
    throttled: Arc<AtomicU64>,
}

#[derive(Debug)]
struct Known {
    connections: usize,
    messages: Bucket,
    bytes: Bucket,
}

/// A connection's place among those of its peer; dropping it gives it back.
#[derive(Debug)]
pub(crate) struct Place {
    peers: Peers,
    peer: ContentHash,
    purpose: Purpose,
}

impl Peers {
    pub(crate) fn new(limits: PeerLimits) -> Self {
        Self { limits, ..Self::default() }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<ContentHash, Known>> {
        // Nothing here can panic half-way; a poisoned map is still a map of counts.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a place for another connection of that peer, if it may have one.
    pub(crate) fn place(&self, peer: ContentHash, purpose: Purpose) -> Option<Place> {
        let (limits, now) = (self.limits, Instant::now());
        let mut known = self.lock();
        let of_peer = known.entry(peer).or_insert_with(|| Known {
            connections: 0,
            messages: Bucket::new(limits.messages, now),
            bytes: Bucket::new(limits.bytes, now),
        });
        if of_peer.connections >= limits.connections_max {
            return None;
        }
        of_peer.connections += 1;
        Some(Place { peers: self.clone(), peer, purpose })
    }

    pub(crate) fn connections_max(&self) -> usize {
        self.limits.connections_max
    }

    /// How often a message was waited for because its peer had said too much.
    pub(crate) fn throttled(&self) -> u64 {
        self.throttled.load(Ordering::Relaxed)
    }
}

impl Place {
    /// Longest frame that may come over this connection now: who has not said what it wants has little to say.
    pub(crate) fn frame_bytes_max(&self, is_first: bool) -> usize {
        let PeerLimits { greeting_bytes_max, message_bytes_max, .. } = self.peers.limits;
        match self.purpose {
            Purpose::Blob => REQUEST_BYTES_MAX,
            Purpose::Control | Purpose::Probe if is_first => greeting_bytes_max,
            Purpose::Control => message_bytes_max,
            // Its questions are counted, and an upload consists of headers.
            Purpose::Probe => REQUEST_BYTES_MAX,
        }
    }

    /// Whether messages count: a probe's are few, but for the headers of its transfers.
    fn is_counted(&self) -> bool {
        self.purpose != Purpose::Probe
    }

    /// A message of that length was read.
    pub(crate) fn said(&self, bytes: usize) {
        if self.is_counted()
            && let Some(known) = self.peers.lock().get_mut(&self.peer)
        {
            let now = Instant::now();
            known.messages.fill(1.0, now);
            known.bytes.fill(bytes as f64, now);
        }
    }

    /// How long the next message is to be waited for; counted where that is not at once.
    pub(crate) fn wait(&self) -> Option<Duration> {
        if !self.is_counted() {
            return None;
        }
        let now = Instant::now();
        let wait = self.peers.lock().get(&self.peer).map(|known| known.messages.wait(now).max(known.bytes.wait(now)));
        let wait = wait.filter(|wait| !wait.is_zero())?;
        self.peers.throttled.fetch_add(1, Ordering::Relaxed);
        Some(wait)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let now = Instant::now();
        let mut known = self.peers.lock();
        let Some(of_peer) = known.get_mut(&self.peer) else { return };
        of_peer.connections = of_peer.connections.saturating_sub(1);
        // Who hangs up and comes back at once begins no new account: what it has said is forgotten once it has leaked.
        known.retain(|_, of_peer| of_peer.connections > 0 || !of_peer.is_settled(now));
    }
}

impl Known {
    fn is_settled(&self, now: Instant) -> bool {
        [self.messages, self.bytes].iter_mut().all(|bucket| {
            bucket.fill(0.0, now);
            bucket.level == 0.0
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: PeerLimits = PeerLimits {
        connections_max: 2,
        greeting_bytes_max: 10,
        message_bytes_max: 20,
        messages: Rate { burst: 3.0, per_second: 2.0 },
        bytes: Rate { burst: 1_000.0, per_second: 100.0 },
    };

    #[test]
    fn a_bucket_lets_a_burst_through_and_then_its_rate() {
        let start = Instant::now();
        let mut bucket = Bucket::new(LIMITS.messages, start);
        (0..3).for_each(|_| bucket.fill(1.0, start));
        assert_eq!(bucket.wait(start), Duration::ZERO);
        bucket.fill(1.0, start);
        assert_eq!(bucket.wait(start), Duration::from_millis(500));
        let later = start + Duration::from_millis(500);
        assert_eq!(bucket.wait(later), Duration::ZERO);
        bucket.fill(1.0, later);
        assert_eq!(bucket.wait(later), Duration::from_millis(500));
        assert_eq!(bucket.wait(later + Duration::from_secs(3)), Duration::ZERO);
        bucket.fill(f64::MAX, later);
        assert_eq!(bucket.wait(later), Duration::from_secs_f64(WAIT_SECONDS_MAX));
        assert_eq!(bucket.wait(start), Duration::from_secs_f64(WAIT_SECONDS_MAX), "a clock that goes back is no panic");
    }

    #[test]
    fn a_peer_has_so_many_places_and_gives_them_back() {
        let peers = Peers::new(LIMITS);
        let (one, other) = (ContentHash::of(b"one"), ContentHash::of(b"other"));
        let places: Vec<_> = (0..2).map(|_| peers.place(one, Purpose::Blob).unwrap()).collect();
        assert!(peers.place(one, Purpose::Control).is_none());
        assert!(peers.place(other, Purpose::Control).is_some(), "nobody pays for another one");
        drop(places);
        assert!(peers.lock().is_empty(), "who is gone is forgotten");
        assert!(peers.place(one, Purpose::Control).is_some());
    }

    #[test]
    fn what_a_peer_says_counts_over_all_its_connections_and_the_next() {
        let peers = Peers::new(LIMITS);
        let one = ContentHash::of(b"one");
        let places = [Purpose::Blob, Purpose::Control].map(|purpose| peers.place(one, purpose).unwrap());
        places.iter().for_each(|place| (0..2).for_each(|_| place.said(10)));
        assert!(places.iter().all(|place| place.wait().is_some()));
        let waits = peers.throttled();
        drop(places);
        let probe = peers.place(one, Purpose::Probe).unwrap();
        probe.said(1 << 20);
        assert_eq!((probe.wait(), peers.throttled()), (None, waits), "a probe has its own bounds");
        let again = peers.place(one, Purpose::Control).unwrap();
        assert!(again.wait().is_some() && peers.throttled() == waits + 1);
        assert!(peers.place(ContentHash::of(b"other"), Purpose::Control).unwrap().wait().is_none());
    }

    #[test]
    fn who_has_not_said_what_it_wants_has_little_to_say() {
        let peers = Peers::new(LIMITS);
        let place = |purpose| peers.place(ContentHash::default(), purpose).unwrap();
        let control = place(Purpose::Control);
        assert_eq!((control.frame_bytes_max(true), control.frame_bytes_max(false)), (10, 20));
        assert_eq!(place(Purpose::Blob).frame_bytes_max(false), REQUEST_BYTES_MAX);
    }
}
