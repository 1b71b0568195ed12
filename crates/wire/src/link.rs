//! What is known about the way to each peer, measured on the traffic itself: no probe is ever sent for it.
//!
//! - **Bandwidth** is bytes of content over the time in which answers were arriving. The clock starts with the first
//!   bytes of an answer, so that the round trip is not part of it, and stops when nothing is outstanding. All streams and
//!   all fetches from one peer are one link: two fetches at once do not each see half of it. The sums forget by a factor of
//!   [`MEMORY`] a sample, and a long transfer gives a sample every [`SAMPLE_SECONDS_MAX`].
//! - **Round trip** is the shortest that TCP has seen of late; without `TCP_INFO`, the time from a request on an idle
//!   stream to the first byte of its answer.
//! - **Loss** is the part of the bytes that the peer's TCP had to send again, which the peer tells with each answer.
//!
//! It decides nothing. A goodput that the sender's application limits is still reported as what it is: what came.

use crate::blob::fetch::Holder;
use crate::blob::protocol::Sent;
use crate::interface;
use crate::limits::CHUNK_BYTES_MAX;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// What stays of the older samples when one is added: the last four make up two thirds of the estimate.
const MEMORY: f64 = 0.75;

/// A transfer is cut into samples of this length.
const SAMPLE_SECONDS_MAX: f64 = 1.0;

/// Less than this says more about buffers on the way than about the link: two TLS records.
const SAMPLE_BYTES_MIN: u64 = 32 * 1024;

/// Shorter than this is no time to divide by.
const SAMPLE_SECONDS_MIN: f64 = 1e-4;

/// By how much a longer round trip moves the shortest one seen: a new route is believed after some dozens of answers.
const ROUND_TRIP_RISE: f64 = 1.0 / 16.0;

/// A short answer is asked for at this times the link's rate: a queue on the way then holds a fifth of it at most, and a link that
/// has become faster is found out.
const PACE_GAIN: f64 = 1.25;

/// One short answer in so many is asked for at any rate: the pace may have been measured on a bad day.
const PACE_EVERY: u64 = 8;

/// An answer that takes less at the link's rate fills no queue that anybody would wait for.
const PACE_SECONDS_MIN: f64 = 0.02;

/// Peers whose links are remembered: four times the sites of a large run.
pub const LINKS_MAX: usize = 1_024;

/// What is known of one link, towards this side. Unknown parts are `None`.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct LinkEstimate {
    /// Goodput: content, without TLS and headers.
    pub bytes_per_second: Option<f64>,
    /// Round trip without queues.
    pub round_trip_seconds: Option<f64>,
    /// Part of the peer's bytes that had to be sent again, 0 to 1.
    pub loss: Option<f64>,
    /// Samples in `bytes_per_second`.
    pub samples: u64,
    /// Content received in all.
    pub bytes: u64,
    /// Time in all in which it was arriving.
    pub seconds: f64,
    /// Connections opened.
    pub connections: u64,
    /// Streams that broke in the middle of an answer and were replaced.
    pub reconnects: u64,
}

impl LinkEstimate {
    /// Bandwidth times delay, bytes: what has to be on its way for the link to be full.
    pub fn bandwidth_delay_bytes(&self) -> Option<f64> {
        Some(self.bytes_per_second? * self.round_trip_seconds?)
    }
}

/// Which way a connection takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkPath {
    /// The socket address of this side.
    pub local: SocketAddr,
    /// The socket address of the peer.
    pub peer: SocketAddr,
    /// Network card that has the local address; `None` where the system does not say.
    pub interface: Option<String>,
    /// Congestion control of what this side sends, where the system says.
    pub congestion_control: Option<String>,
}

impl LinkPath {
    /// Looks up the card.
    pub(crate) fn new(local: SocketAddr, peer: SocketAddr, congestion_control: Option<String>) -> Self {
        Self { local, peer, interface: interface::name_of(local.ip()), congestion_control }
    }
}

/// The links of one client, by peer. Cheap to clone; all clones are one.
#[derive(Debug, Clone, Default)]
pub(crate) struct Links(Arc<Mutex<HashMap<Holder, Arc<Link>>>>);

impl Links {
    /// The link to `holder`; a new one takes the place of any unused one when there are too many.
    pub(crate) fn of(&self, holder: &Holder) -> Arc<Link> {
        let mut links = lock(&self.0);
        if links.len() >= LINKS_MAX && !links.contains_key(holder) {
            links.retain(|_, link| Arc::strong_count(link) > 1);
        }
        links.entry(holder.clone()).or_default().clone()
    }

    /// What is known of the link to `holder`.
    pub(crate) fn estimate(&self, holder: &Holder) -> Option<LinkEstimate> {
        Some(lock(&self.0).get(holder)?.estimate())
    }

    /// All links, in the order of their addresses.
    pub(crate) fn all(&self) -> Vec<(Holder, LinkEstimate, Option<LinkPath>)> {
        let links: Vec<_> = lock(&self.0).iter().map(|(holder, link)| (holder.clone(), link.clone())).collect();
        let mut all: Vec<_> =
            links.iter().map(|(holder, link)| (holder.clone(), link.estimate(), link.path())).collect();
        all.sort_by(|one, other| one.0.address.cmp(&other.0.address));
        all
    }
}

/// One link: its meter behind a lock, and the clock that the meter is read with.
#[derive(Debug)]
pub(crate) struct Link {
    meter: Mutex<Meter>,
    path: Mutex<Option<LinkPath>>,
    epoch: Instant,
}

impl Default for Link {
    fn default() -> Self {
        Self { meter: Mutex::default(), path: Mutex::default(), epoch: Instant::now() }
    }
}

impl Link {
    /// Notes a new connection.
    pub(crate) fn connected(&self, path: LinkPath) {
        lock(&self.meter).connections += 1;
        *lock(&self.path) = Some(path);
    }

    /// Notes that a stream broke in the middle of an answer.
    pub(crate) fn broke(&self) {
        lock(&self.meter).reconnects += 1;
    }

    /// Notes a request; what is returned stands for it until it is dropped.
    pub(crate) fn asked(self: &Arc<Self>) -> Outstanding {
        lock(&self.meter).asked();
        Outstanding(self.clone())
    }

    /// Notes a measured round trip.
    pub(crate) fn round_trip(&self, seconds: f64) {
        lock(&self.meter).round_trip(seconds);
    }

    /// Notes what the peer's TCP sent, and sent again, since it last told.
    pub(crate) fn sent(&self, bytes: u64, again: u64) {
        lock(&self.meter).sent(bytes, again);
    }

    /// Rate at which a short answer is asked for, bytes a second; 0 where the holder is to send as its congestion control sees
    /// fit.
    ///
    /// An answer of one chunk is over before any congestion control has found the rate of the way, and lies in the queue
    /// before its narrowest place. What the holder itself asks for meanwhile would have to wait behind it: of two sites that
    /// fetch from each other over a slow line, the second would begin when the first is done.
    pub(crate) fn pace(&self, bytes: u64) -> u64 {
        let mut meter = lock(&self.meter);
        let Some(rate) = meter.goodput.value() else { return 0 };
        if bytes > CHUNK_BYTES_MAX as u64 || bytes as f64 / rate < PACE_SECONDS_MIN {
            return 0;
        }
        meter.short_answers += 1;
        if meter.short_answers.is_multiple_of(PACE_EVERY) { 0 } else { (rate * PACE_GAIN) as u64 }
    }

    /// What is known now.
    pub(crate) fn estimate(&self) -> LinkEstimate {
        lock(&self.meter).estimate()
    }

    fn path(&self) -> Option<LinkPath> {
        lock(&self.path).clone()
    }

    fn now(&self) -> f64 {
        self.epoch.elapsed().as_secs_f64()
    }
}

/// A request that is not answered yet.
#[derive(Debug)]
pub(crate) struct Outstanding(Arc<Link>);

impl Outstanding {
    /// Notes a part of the answer.
    pub(crate) fn received(&self, bytes: usize) {
        let now = self.0.now();
        lock(&self.0.meter).received(now, bytes as u64);
    }
}

impl Drop for Outstanding {
    fn drop(&mut self) {
        lock(&self.0.meter).answered();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing here can panic half-way; poisoned sums are still sums.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What was sent, and sent again, between two answers on one connection. A peer that counts backwards, or resends more than
/// it sends, tells nothing.
pub(crate) fn sent_between(before: Sent, now: Sent) -> Option<(u64, u64)> {
    let (bytes, again) = (now.bytes.checked_sub(before.bytes)?, now.again.checked_sub(before.again)?);
    (again <= bytes).then_some((bytes, again))
}

/// Two sums that forget together; their quotient is the estimate.
#[derive(Debug, Clone, Copy, Default)]
struct Quotient {
    over: f64,
    under: f64,
}

impl Quotient {
    fn add(&mut self, over: f64, under: f64) {
        self.over = MEMORY * self.over + over;
        self.under = MEMORY * self.under + under;
    }

    fn value(&self) -> Option<f64> {
        (self.under > 0.0).then(|| self.over / self.under)
    }
}

/// The arithmetic, with time as an argument.
#[derive(Debug, Default)]
struct Meter {
    outstanding: u64,
    /// Start of the running sample, its last byte, and its bytes after the first ones.
    running: Option<(f64, f64, u64)>,
    goodput: Quotient,
    lost: Quotient,
    round_trip_seconds: Option<f64>,
    samples: u64,
    bytes: u64,
    seconds: f64,
    connections: u64,
    reconnects: u64,
    /// Asked for since the link's rate is known.
    short_answers: u64,
}

impl Meter {
    fn asked(&mut self) {
        self.outstanding += 1;
    }

    fn received(&mut self, now: f64, bytes: u64) {
        self.bytes += bytes;
        let Some((began, last, sum)) = &mut self.running else {
            // These bytes came before the clock ran.
            self.running = Some((now, now, 0));
            return;
        };
        (*last, *sum) = (now, *sum + bytes);
        if now - *began >= SAMPLE_SECONDS_MAX {
            self.close();
            self.running = Some((now, now, 0));
        }
    }

    fn answered(&mut self) {
        self.outstanding -= 1;
        if self.outstanding == 0 {
            self.close();
        }
    }

    fn close(&mut self) {
        let Some((began, last, bytes)) = self.running.take() else { return };
        let seconds = last - began;
        self.seconds += seconds;
        if bytes >= SAMPLE_BYTES_MIN && seconds >= SAMPLE_SECONDS_MIN {
            self.goodput.add(bytes as f64, seconds);
            self.samples += 1;
        }
    }

    fn round_trip(&mut self, seconds: f64) {
        let shortest = self.round_trip_seconds.get_or_insert(seconds);
        *shortest = seconds.min(*shortest + ROUND_TRIP_RISE * (seconds - *shortest));
    }

    fn sent(&mut self, bytes: u64, again: u64) {
        if bytes >= SAMPLE_BYTES_MIN {
            self.lost.add(again as f64, bytes as f64);
        }
    }

    fn estimate(&self) -> LinkEstimate {
        LinkEstimate {
            bytes_per_second: self.goodput.value(),
            round_trip_seconds: self.round_trip_seconds,
            loss: self.lost.value(),
            samples: self.samples,
            bytes: self.bytes,
            seconds: self.seconds,
            connections: self.connections,
            reconnects: self.reconnects,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One answer of `bytes` in 10 pieces, at that rate, after a round trip of a second; returns its end.
    fn answer(meter: &mut Meter, start: f64, bytes: u64, bytes_per_second: f64) -> f64 {
        meter.asked();
        let piece = bytes / 10;
        let at = |index: u64| start + 1.0 + (index * piece) as f64 / bytes_per_second;
        (0..10).for_each(|index| meter.received(at(index), piece));
        meter.answered();
        at(9)
    }

    fn close(found: Option<f64>, expected: f64) -> bool {
        found.is_some_and(|found| (found / expected - 1.0).abs() < 1e-9)
    }

    #[test]
    fn bandwidth_is_without_the_round_trip_and_follows_a_change() {
        let mut meter = Meter::default();
        let mut now = 0.0;
        for _ in 0..5 {
            now = answer(&mut meter, now, 100_000, 2.5e6);
        }
        let estimate = meter.estimate();
        assert!(close(estimate.bytes_per_second, 2.5e6), "{estimate:?}");
        assert_eq!((estimate.samples, estimate.bytes), (5, 500_000));
        for _ in 0..16 {
            now = answer(&mut meter, now, 100_000, 2.5e5);
        }
        let found = meter.estimate().bytes_per_second.unwrap();
        assert!((2.4e5..2.7e5).contains(&found), "{found}");
    }

    #[test]
    fn two_fetches_at_once_are_one_link() {
        let mut meter = Meter::default();
        meter.asked();
        meter.asked();
        for index in 0..20 {
            meter.received(f64::from(index) * 0.01, 50_000);
        }
        meter.answered();
        assert_eq!(meter.estimate().samples, 0, "the other one is still under way");
        meter.answered();
        assert!(close(meter.estimate().bytes_per_second, 5e6));
    }

    #[test]
    fn a_long_transfer_is_judged_before_it_ends_and_a_tiny_one_never() {
        let mut meter = Meter::default();
        meter.asked();
        for index in 0..35 {
            meter.received(f64::from(index) * 0.1, 1_000_000);
        }
        assert_eq!(meter.estimate().samples, 3);
        assert!(close(meter.estimate().bytes_per_second, 1e7));
        let mut meter = Meter::default();
        answer(&mut meter, 0.0, 1_000, 1e6);
        assert_eq!((meter.estimate().bytes_per_second, meter.estimate().bytes), (None, 1_000));
    }

    #[test]
    fn the_shortest_round_trip_holds_until_the_route_changes() {
        let mut meter = Meter::default();
        for seconds in [0.3, 0.05, 0.4, 0.05] {
            meter.round_trip(seconds);
        }
        assert_eq!(meter.estimate().round_trip_seconds, Some(0.05));
        (0..100).for_each(|_| meter.round_trip(0.2));
        assert!((0.19..=0.2).contains(&meter.estimate().round_trip_seconds.unwrap()));
        meter.goodput.add(1e6, 0.5);
        let product = meter.estimate().bandwidth_delay_bytes().unwrap();
        assert!((380_000.0..=400_000.0).contains(&product), "{product}");
    }

    #[test]
    fn loss_is_what_was_sent_again_and_nonsense_is_ignored() {
        let mut meter = Meter::default();
        meter.sent(1_000_000, 10_000);
        assert!(close(meter.estimate().loss, 0.01));
        let sent = |(bytes, again)| Sent { bytes, again };
        assert_eq!(sent_between(sent((10, 5)), sent((50, 5))), Some((40, 0)));
        for (now, before) in [((10, 0), (11, 0)), ((10, 0), (0, 1)), ((10, 11), (0, 0)), ((u64::MAX, 3), (u64::MAX, 0))]
        {
            assert_eq!(sent_between(sent(before), sent(now)), None);
        }
    }

    #[test]
    fn short_answers_are_asked_for_at_the_rate_of_the_link_once_it_is_known() {
        let link = Link::default();
        assert_eq!(link.pace(50_000), 0, "nothing is known yet");
        answer(&mut lock(&link.meter), 0.0, 200_000, 100_000.0);
        let rate = link.estimate().bytes_per_second.unwrap();
        let paces: Vec<u64> = (0..2 * PACE_EVERY).map(|_| link.pace(50_000)).collect();
        let (paced, free): (Vec<u64>, Vec<u64>) = paces.iter().partition(|pace| **pace > 0);
        assert!(paced.iter().all(|pace| *pace == (rate * PACE_GAIN) as u64), "{paces:?}");
        assert_eq!((paced.len(), free.len()), (14, 2), "one in eight finds out whether the link has become faster");
        assert_eq!(link.pace(1_000), 0, "it takes no time that anybody would wait for");
        assert_eq!(link.pace(CHUNK_BYTES_MAX as u64 + 1), 0, "it is long enough for the congestion control");
    }

    #[test]
    fn links_are_bounded_and_those_in_use_stay() {
        let links = Links::default();
        let holder = |index: usize| Holder { address: format!("site-{index}:1"), fingerprint: Default::default() };
        let used = links.of(&holder(0));
        used.round_trip(0.5);
        for index in 1..LINKS_MAX + 5 {
            links.of(&holder(index));
        }
        assert!(links.all().len() <= LINKS_MAX);
        assert_eq!(links.estimate(&holder(0)).unwrap().round_trip_seconds, Some(0.5));
        assert_eq!(links.estimate(&holder(1)), None);
    }
}
