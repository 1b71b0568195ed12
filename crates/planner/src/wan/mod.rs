//! What the links between sites leave of the compute rate.
//!
//! A round has H inner steps. P fragments are synchronised in it, each once; a transfer of S bytes to or from the busiest site takes
//! S / rate + delays, and stalls the site only by what is not hidden:
//! ```text
//! synchronous, diloco, streaming     round = H t + sum over syncs of stall
//! utilisation                        H t / round
//! ```
//! [`schedule`] has the stall of a snapshot, and of stacks that send layer by layer during the backward pass. Speeds of sites differ: shares follow them
//! ([`compute_seconds`]). [`loss`] says what H and the number of sites cost in loss, and so in time to the same loss.

pub mod loss;
pub mod schedule;

use crate::units::{BitsPerSecond, Bytes, BytesPerSecond, Seconds};
use schedule::{Hiding, Sync};

/// Bytes that one TCP stream keeps in flight: the window that our transport asks for.
const STREAM_WINDOW: Bytes = Bytes(2.0 * 1_048_576.0);

/// Payload of one segment on an Ethernet path.
const SEGMENT: Bytes = Bytes(1_448.0);

/// Mathis et al. 1997: a loss-based control keeps 1.22 / sqrt(p) segments in flight.
const MATHIS: f64 = 1.22;

/// Share of a link's bits that are content: headers of Ethernet, IP, TCP and TLS on full segments.
pub const CONTENT: f64 = 0.94;

/// Of a pass of the host through a delta, what a fragment waits for another one that is on its way at the same time: a merge meets the next
/// encoding, or the other way round, and half of that half pass is what one waits on average.
const MEETING_PASSES: f64 = 0.25;

/// A site's way to the others.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Link {
    /// What the site can send.
    pub up: BitsPerSecond,
    /// What it can receive.
    pub down: BitsPerSecond,
    /// Round trip.
    pub round_trip: Seconds,
    /// Share of segments lost.
    pub loss: f64,
    /// TCP streams side by side.
    pub streams: f64,
    /// Whether the congestion control takes loss for congestion (CUBIC does, BBR does not).
    pub loss_based: bool,
}

impl Link {
    /// A link of equal directions without delay or loss, as simulations take it.
    pub fn ideal(rate: BitsPerSecond) -> Self {
        Self { up: rate, down: rate, round_trip: Seconds::ZERO, loss: 0.0, streams: 1.0, loss_based: false }
    }

    /// What the streams together carry of this rate.
    pub fn throughput(&self, rate: BitsPerSecond) -> BytesPerSecond {
        let content = rate.bytes_per_second() * if self.round_trip.0 > 0.0 { CONTENT } else { 1.0 } * (1.0 - self.loss);
        if self.round_trip.0 <= 0.0 {
            return content;
        }
        let window = STREAM_WINDOW * self.streams / self.round_trip;
        let kept = SEGMENT * (MATHIS / self.loss.max(1e-12).sqrt() * self.streams) / self.round_trip;
        content.min(window).min(if self.loss_based && self.loss > 0.0 { kept } else { content })
    }
}

/// How a merge travels among n sites, S bytes being one site's coded delta.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exchange {
    /// Every site fetches every other's delta: (n-1) S each way.
    Mesh,
    /// Every site fetches its slice of every other's delta, merges it, and gives the merge M of f32 to all: (n-1)/n (S + M) each way.
    Sharded,
    /// Reduce-scatter and all-gather of stacks whose sums travel as their summands do: 2 (n-1)/n S each way.
    Ring,
    /// Each site puts its delta on storage that all reach, and the fetches are as fast as they come: S up.
    UploadBound,
}

impl Exchange {
    /// Bytes that a site sends and receives; `content` is the f32 of what the deltas code.
    pub fn bytes(self, delta: Bytes, content: Bytes, sites: f64) -> (Bytes, Bytes) {
        let others = (sites - 1.0).max(0.0);
        let slices = others / sites.max(1.0);
        let each = match self {
            Self::Mesh => delta * others,
            Self::Sharded => (delta + content) * slices,
            Self::Ring => delta * (2.0 * slices),
            Self::UploadBound => return (delta, Bytes::ZERO),
        };
        (each, each)
    }

    /// Round trips from a snapshot until its merge can begin, at most. Ours are those of the protocol, each word and each fetch half or a
    /// whole one: computed, announced, fetched, held, committed; in a sharded round also merged, announced, fetched and held.
    fn round_trips(self) -> f64 {
        match self {
            Self::Mesh => 3.0,
            Self::Sharded => 6.0,
            Self::Ring | Self::UploadBound => 1.0,
        }
    }

    /// How often a site's host goes through a delta: encoding and merging are half each, and in a sharded round what was merged from
    /// slices is merged into the parameters again.
    fn coding_passes(self) -> f64 {
        match self {
            Self::Sharded => 1.5,
            Self::Mesh | Self::Ring | Self::UploadBound => 1.0,
        }
    }
}

/// One round between sites.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RoundCase {
    /// Parameters that are synchronised.
    pub parameters: f64,
    /// Layers of the model: what a layer-by-layer schedule moves at once.
    pub layers: f64,
    /// Bits a parameter takes on the link.
    pub bits_per_parameter: f64,
    /// Sites.
    pub sites: f64,
    /// Inner steps of a round, H; 1 with one fragment is synchronous training.
    pub inner_steps: f64,
    /// Fragments, P.
    pub fragments: f64,
    /// Inner steps over which a transfer may take place, tau.
    pub overlap_steps: f64,
    /// Time of an inner step.
    pub step: Seconds,
    /// The slowest site's link.
    pub link: Link,
    /// Way of the merge.
    pub exchange: Exchange,
    /// What hides transfers beside whole overlapped steps.
    pub hiding: Hiding,
    /// Encoding and decoding of one site's delta, content bytes (f32) a second; infinite where it costs nothing.
    pub coding: BytesPerSecond,
}

/// Where a round's time goes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RoundTime {
    /// Inner steps.
    pub compute: Seconds,
    /// All transfers, hidden or not.
    pub transfer: Seconds,
    /// What of them nobody could hide.
    pub stall: Seconds,
    /// Compute over the whole.
    pub utilisation: f64,
    /// What a site sends.
    pub sent: Bytes,
    /// What a site receives.
    pub received: Bytes,
}

impl RoundTime {
    /// Length of the round.
    pub fn total(&self) -> Seconds {
        self.compute + self.stall
    }
}

/// Time of a round.
pub fn round_time(case: &RoundCase) -> RoundTime {
    round_time_at(case, case.link.throughput(case.link.up), case.link.throughput(case.link.down))
}

/// Time of a round whose busiest site sends and receives at these rates, whatever its link is made of.
pub fn round_time_at(case: &RoundCase, up: BytesPerSecond, down: BytesPerSecond) -> RoundTime {
    let (delta, content) = (Bytes(case.parameters * case.bits_per_parameter / 8.0), Bytes(4.0 * case.parameters));
    let (sent, received) = case.exchange.bytes(delta, content, case.sites);
    let transfer = (sent / up).max(received / down) / case.fragments;
    let pass = content / case.coding / case.fragments;
    let (coding, meeting) = (pass * case.exchange.coding_passes(), pass * MEETING_PASSES);
    let delay = case.link.round_trip * case.exchange.round_trips();
    let sync = Sync { transfer, coding, delay, meeting };
    let compute = case.step * case.inner_steps;
    let stall = schedule::stall(case, sync);
    RoundTime {
        compute,
        transfer: sync.total() * case.fragments,
        stall,
        utilisation: compute / (compute + stall),
        sent,
        received,
    }
}

/// Least bandwidth, both ways, at which a round is utilised so far; `None` where no bandwidth does (delay alone stalls it).
pub fn bandwidth_for(case: &RoundCase, utilisation: f64) -> Option<BitsPerSecond> {
    /// Bits a second between which is searched: 1 kbit/s to 1 Pbit/s, halved on a logarithmic scale to a part in 10^6.
    const RANGE: (f64, f64) = (1e3, 1e15);
    let reached = |rate: f64| {
        let rate = BitsPerSecond(rate);
        round_time(&RoundCase { link: Link { up: rate, down: rate, ..case.link }, ..*case }).utilisation >= utilisation
    };
    let (mut low, mut high) = (RANGE.0.ln(), RANGE.1.ln());
    if !reached(RANGE.1) {
        return None;
    }
    while high - low > 1e-6 {
        let middle = f64::midpoint(low, high);
        if reached(middle.exp()) { high = middle } else { low = middle }
    }
    Some(BitsPerSecond(high.exp()))
}

/// Time until the last of several sites has done its share of a round's samples, shares following their speeds (samples a second) in
/// whole samples by largest remainder, as leases are dealt. Even shares would wait for the slowest.
pub fn compute_seconds(samples_per_second: &[f64], samples: u64) -> Seconds {
    let speed: f64 = samples_per_second.iter().sum();
    if speed <= 0.0 {
        return Seconds(f64::INFINITY);
    }
    let ideal: Vec<f64> = samples_per_second.iter().map(|site| samples as f64 * site / speed).collect();
    let mut shares: Vec<f64> = ideal.iter().map(|share| share.floor()).collect();
    let mut order: Vec<usize> = (0..ideal.len()).collect();
    order.sort_by(|left, right| (ideal[*right] - shares[*right]).total_cmp(&(ideal[*left] - shares[*left])));
    let left = samples as f64 - shares.iter().sum::<f64>();
    for index in order.into_iter().take(left.max(0.0) as usize) {
        shares[index] += 1.0;
    }
    let slowest = shares.iter().zip(samples_per_second).filter(|(share, _)| **share > 0.0);
    Seconds(slowest.map(|(share, speed)| share / speed).fold(0.0, f64::max))
}

#[cfg(test)]
mod tests;
