//! One direction of a link as bytes see it: a rate that all connections share, a delay, jitter, and an early end.
//!
//! A link is a virtual clock. Bytes that could have left at time r leave, whole, at
//!   d = max(r, d of the bytes before them on this link) + 8 n / rate
//! and arrive at d + round trip / 2 + jitter, never before what left earlier on the same connection. A connection reads its
//! next piece when its last one has left, so that connections take turns and nothing is read ahead of the rate. What is
//! between source and destination is bounded by a window; a destination that does not read fills it, and then the source waits.
//!
//! A link may be cut: then what has left waits, and arrives when the cut is mended, as TCP sends it again. So a cut is silence at both
//! ends and no reset, and a connection that both ends keep goes on after it.
//!
//! Not a model of TCP: there is no slow start and no congestion window, connections share a rate evenly, and what is lost is
//! a connection and not a packet.

use super::link::LinkSpec;
use base::random::{Random, mix64};
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::sync::{AcquireError, Semaphore, SemaphorePermit, mpsc, watch};
use tokio::time::{Instant, sleep_until};

/// Link time of one piece: at 20 Mbit/s 10 kB, 250 pieces a second. Over 100 ms a link's rate is right within 4 %.
const PIECE_SECONDS: f64 = 0.004;

/// A piece is a segment at least, and what one system call carries well at most.
const PIECE_BYTES: std::ops::RangeInclusive<usize> = 1_448..=64 * 1024;

/// Bytes on their way that a connection may always have in a direction, however short and slow the link.
const WINDOW_BYTES_MIN: usize = 64 * 1024;

/// The most, whatever the link: 10 Gbit/s at 50 ms are 62.5 MB.
const WINDOW_BYTES_MAX: usize = 64 << 20;

/// Timers tick every millisecond and a busy machine wakes late: what a window holds beyond the link's own delay.
const WINDOW_SLACK: Duration = Duration::from_millis(5);

/// Pieces on their way, a direction of a connection. Small messages make small pieces: 64 of them a millisecond at 50 ms.
const PIECES_QUEUED_MAX: usize = 4_096;

/// Loss is a probability per so many bytes.
pub(super) const LOSS_BLOCK_BYTES: u64 = 64 * 1024;

/// Bytes until a break that never comes.
const UNBROKEN: u64 = u64::MAX;

const _: () = assert!(*PIECE_BYTES.end() <= WINDOW_BYTES_MIN);

/// One direction between two ends; all connections between them share it.
#[derive(Debug)]
pub(super) struct Link {
    spec: LinkSpec,
    seed: u64,
    /// When the last bytes leave that have been taken.
    free_at: Mutex<Instant>,
    is_cut: watch::Sender<bool>,
    counts: Counts,
}

#[derive(Debug, Default)]
struct Counts {
    connections: AtomicU64,
    broken: AtomicU64,
    bytes: AtomicU64,
    busy_nanoseconds: AtomicU64,
}

/// What a link has carried.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Carried {
    /// Connections that could use it.
    pub(super) connections: u64,
    /// Those that it broke.
    pub(super) broken: u64,
    /// Bytes of TCP payload that were delivered.
    pub(super) bytes: u64,
    /// Time in which bytes were leaving.
    pub(super) busy: Duration,
}

/// Whether a connection takes part in what happens on a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// It counts, and may break.
    Traffic,
    /// It measures the link: it is neither broken nor counted.
    Measurement,
}

/// A connection ended early: by the link's loss, or because an end went away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Broken;

impl Link {
    pub(super) fn new(spec: LinkSpec, seed: u64) -> Arc<Self> {
        let free_at = Mutex::new(Instant::now());
        let (is_cut, _) = watch::channel(false);
        Arc::new(Self { spec, seed, free_at, is_cut, counts: Counts::default() })
    }

    /// From now on nothing arrives, or everything again.
    pub(super) fn set_cut(&self, is_cut: bool) {
        self.is_cut.send_replace(is_cut);
    }

    /// Waits until the link is not cut.
    pub(super) async fn passable(&self) {
        let mut is_cut = self.is_cut.subscribe();
        // The sender lives as long as the link.
        let _passable = is_cut.wait_for(|is_cut| !is_cut).await.is_ok();
    }

    pub(super) fn spec(&self) -> LinkSpec {
        self.spec
    }

    pub(super) fn carried(&self) -> Carried {
        let Counts { connections, broken, bytes, busy_nanoseconds } = &self.counts;
        Carried {
            connections: connections.load(Ordering::Relaxed),
            broken: broken.load(Ordering::Relaxed),
            bytes: bytes.load(Ordering::Relaxed),
            busy: Duration::from_nanos(busy_nanoseconds.load(Ordering::Relaxed)),
        }
    }

    /// Time from one end to the other for what has left, without jitter.
    pub(super) fn one_way(&self) -> Duration {
        self.spec.round_trip / 2
    }

    /// This direction of a new connection. The n-th connection of a link breaks after the same number of bytes in every
    /// run with the same seed.
    pub(super) fn flow(self: &Arc<Self>, kind: Kind) -> Flow {
        let number = match kind {
            Kind::Traffic => self.counts.connections.fetch_add(1, Ordering::Relaxed),
            Kind::Measurement => u64::MAX,
        };
        let mut random = Random::new(self.seed, number);
        let breaks_after = match kind {
            Kind::Traffic => bytes_until_break(self.spec.loss(), &mut random),
            Kind::Measurement => UNBROKEN,
        };
        Flow { link: Arc::clone(self), kind, random, left_until_break: breaks_after, last_due: Instant::now() }
    }

    /// Lets bytes leave that could have left at `ready_at`; tells when the last of them does.
    fn depart(&self, ready_at: Instant, bytes: usize) -> Instant {
        let takes = Duration::from_secs_f64(bytes as f64 * 8.0 / self.spec.bits_per_second as f64);
        let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
        *free_at = (*free_at).max(ready_at) + takes;
        *free_at
    }

    fn piece_bytes(&self) -> usize {
        let bytes = self.spec.bits_per_second as f64 / 8.0 * PIECE_SECONDS;
        (bytes as usize).clamp(*PIECE_BYTES.start(), *PIECE_BYTES.end())
    }

    /// Bytes of one connection that may be between its ends: rate times the longest round trip.
    fn window_bytes(&self) -> usize {
        let seconds = (self.spec.round_trip + self.spec.jitter + WINDOW_SLACK).as_secs_f64();
        let bytes = self.spec.bits_per_second as f64 / 8.0 * seconds;
        (bytes as usize).clamp(WINDOW_BYTES_MIN, WINDOW_BYTES_MAX)
    }
}

/// How many bytes a connection carries before it breaks, where each block of [`LOSS_BLOCK_BYTES`] breaks it with
/// probability `loss`: a geometric number of whole blocks, and a uniform part of the one that breaks it.
fn bytes_until_break(loss: f64, random: &mut Random) -> u64 {
    if loss <= 0.0 {
        return UNBROKEN;
    }
    let blocks = ((1.0 - random.next_unit()).ln() / (1.0 - loss).ln()).floor();
    (blocks as u64).saturating_mul(LOSS_BLOCK_BYTES).saturating_add(random.next_below(LOSS_BLOCK_BYTES))
}

/// One direction of one connection.
#[derive(Debug)]
pub(super) struct Flow {
    link: Arc<Link>,
    kind: Kind,
    random: Random,
    left_until_break: u64,
    last_due: Instant,
}

/// Something on its way, and when it arrives.
struct Piece<'a> {
    due: Instant,
    content: Content<'a>,
}

enum Content<'a> {
    Bytes(Vec<u8>, SemaphorePermit<'a>),
    End,
    Break,
}

impl Flow {
    /// Carries everything from `from` to `to`, and then the end of it.
    ///
    /// # Errors
    /// The link breaks the connection, or one of its ends does.
    pub(super) async fn carry(self, from: impl AsyncRead + Unpin, to: impl AsyncWrite + Unpin) -> Result<(), Broken> {
        let link = Arc::clone(&self.link);
        let counts = (self.kind == Kind::Traffic).then_some(&link.counts);
        let way = (&*link, counts);
        let window = Semaphore::new(link.window_bytes());
        let (on_its_way, arriving) = mpsc::channel(PIECES_QUEUED_MAX);
        let taken = async {
            // A queue that nobody reads belongs to a connection that is gone, which the other half reports.
            self.take(from, &window, on_its_way).await;
            Ok(())
        };
        tokio::try_join!(taken, deliver(arriving, to, way)).map(|_| ())
    }

    /// Reads at the link's rate, and stamps what was read with the time of its arrival.
    async fn take<'a>(
        mut self,
        mut from: impl AsyncRead + Unpin,
        window: &'a Semaphore,
        on_its_way: mpsc::Sender<Piece<'a>>,
    ) {
        let mut buffer = vec![0; self.link.piece_bytes()];
        let mut departed = Instant::now();
        loop {
            let Ok((mut room, has_room)) = acquire(window, buffer.len() as u32, departed).await else { return };
            if departed > Instant::now() {
                sleep_until(departed).await;
            }
            let (read, had_waited) = read_some(&mut from, &mut buffer).await;
            // Bytes that were there already could have left when link and window allowed it, however late we look.
            let ready_at = if had_waited { has_room } else { Instant::now() };
            let (bytes, ending) = self.judge(&read);
            departed = self.link.depart(ready_at, bytes);
            let due = self.due(departed);
            if bytes > 0 {
                self.count_departed(bytes);
                let Some(kept) = room.split(bytes) else { unreachable!("no more is read than there is room for") };
                let content = Content::Bytes(buffer[..bytes].to_vec(), kept);
                if on_its_way.send(Piece { due, content }).await.is_err() {
                    return;
                }
            }
            if let Some(content) = ending {
                // As above: whoever is gone is reported by the other half.
                let _gone = on_its_way.send(Piece { due, content }).await;
                return;
            }
        }
    }

    /// How many of the bytes that were read go on, and what follows them if they are the last.
    fn judge<'a>(&self, read: &std::io::Result<usize>) -> (usize, Option<Content<'a>>) {
        match *read {
            Err(_) => (0, Some(Content::Break)),
            Ok(0) => (0, Some(Content::End)),
            Ok(read) if read as u64 > self.left_until_break => {
                self.link.counts.broken.fetch_add(1, Ordering::Relaxed);
                (self.left_until_break as usize, Some(Content::Break))
            }
            Ok(read) => (read, None),
        }
    }

    fn due(&mut self, departed: Instant) -> Instant {
        let jitter = self.link.spec.jitter.mul_f64(0.5 * self.random.next_unit());
        self.last_due = self.last_due.max(departed + self.link.one_way() + jitter);
        self.last_due
    }

    fn count_departed(&mut self, bytes: usize) {
        if self.left_until_break != UNBROKEN {
            self.left_until_break -= bytes as u64;
        }
        if self.kind == Kind::Traffic {
            let nanoseconds = bytes as u128 * 8 * 1_000_000_000 / u128::from(self.link.spec.bits_per_second);
            self.link.counts.busy_nanoseconds.fetch_add(nanoseconds as u64, Ordering::Relaxed);
        }
    }
}

/// Room in the window, and since when the sender may have used it: since its last bytes have left, or since somebody took
/// some of them. An error only when the connection is gone.
async fn acquire(
    window: &Semaphore,
    bytes: u32,
    departed: Instant,
) -> Result<(SemaphorePermit<'_>, Instant), AcquireError> {
    match window.try_acquire_many(bytes) {
        Ok(room) => Ok((room, departed)),
        Err(_) => window.acquire_many(bytes).await.map(|room| (room, departed.max(Instant::now()))),
    }
}

/// Reads once; tells whether bytes were there before anybody looked.
async fn read_some(from: &mut (impl AsyncRead + Unpin), buffer: &mut [u8]) -> (std::io::Result<usize>, bool) {
    let mut had_waited = true;
    let read = poll_fn(|context| {
        let mut filling = ReadBuf::new(buffer);
        let polled = Pin::new(&mut *from).poll_read(context, &mut filling);
        had_waited &= polled.is_ready();
        match polled {
            Poll::Ready(result) => Poll::Ready(result.map(|()| filling.filled().len())),
            Poll::Pending => Poll::Pending,
        }
    })
    .await;
    (read, had_waited)
}

/// Writes what arrives, when it arrives.
async fn deliver(
    mut arriving: mpsc::Receiver<Piece<'_>>,
    mut to: impl AsyncWrite + Unpin,
    (link, counts): (&Link, Option<&Counts>),
) -> Result<(), Broken> {
    while let Some(Piece { due, content }) = arriving.recv().await {
        if due > Instant::now() {
            sleep_until(due).await;
        }
        link.passable().await;
        match content {
            Content::Bytes(bytes, _room) => {
                to.write_all(&bytes).await.map_err(|_| Broken)?;
                if let Some(counts) = counts {
                    counts.bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                }
            }
            Content::End => return to.shutdown().await.map_err(|_| Broken),
            Content::Break => return Err(Broken),
        }
    }
    Err(Broken)
}

/// Seed of a link, from the run's and the link's ends.
pub(super) fn link_seed(run_seed: u64, from: usize, to: usize) -> u64 {
    mix64(run_seed ^ mix64(((from as u64) << 32) | to as u64))
}

#[cfg(test)]
#[path = "shaper_tests.rs"]
mod tests;
