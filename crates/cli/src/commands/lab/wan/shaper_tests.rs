//! Links on a clock that stands still until everybody waits: rates and delays are exact, and no test takes real time.

use super::*;
use std::io;
use std::task::Context;
use tokio::io::{AsyncReadExt, duplex, repeat};
use tokio::time::timeout;

/// Timers fire at whole milliseconds.
const TICK: Duration = Duration::from_millis(1);

fn link(text: &str, seed: u64) -> Arc<Link> {
    Link::new(text.parse().unwrap(), seed)
}

/// Notes what arrives, and when.
#[derive(Debug, Default, Clone)]
struct Sink(Arc<Mutex<Vec<(Instant, usize)>>>);

impl Sink {
    fn arrivals(&self) -> Vec<(Instant, usize)> {
        self.0.lock().unwrap().clone()
    }

    fn bytes(&self) -> usize {
        self.arrivals().iter().map(|(_, bytes)| bytes).sum()
    }
}

impl AsyncWrite for Sink {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.0.lock().unwrap().push((Instant::now(), bytes.len()));
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// Takes nothing, ever.
struct Wall;

impl AsyncWrite for Wall {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, _: &[u8]) -> Poll<io::Result<usize>> {
        Poll::Pending
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Pending
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Pending
    }
}

/// Gives without end and counts.
#[derive(Debug, Default, Clone)]
struct Spring(Arc<AtomicU64>);

impl AsyncRead for Spring {
    fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.0.fetch_add(buffer.remaining() as u64, Ordering::Relaxed);
        let end = buffer.remaining();
        buffer.put_slice(&vec![1; end]);
        Poll::Ready(Ok(()))
    }
}

#[tokio::test(start_paused = true)]
async fn a_link_carries_its_rate_and_no_more() {
    for (text, bytes_per_second) in [("1Mbit/s", 125_000), ("20Mbit/s,50ms", 2_500_000), ("1Gbit/s,10ms", 125_000_000)]
    {
        let (link, sink, began) = (link(text, 1), Sink::default(), Instant::now());
        let seconds = 2;
        let carrying = link.flow(Kind::Traffic).carry(repeat(1), sink.clone());
        assert!(timeout(Duration::from_secs(seconds), carrying).await.is_err(), "it would go on");
        let piece = link.piece_bytes();
        let most = bytes_per_second * seconds as usize;
        // What is on its way at the end, and the last piece, have not arrived.
        let least = most - bytes_per_second * (link.one_way() + TICK * 2).as_millis() as usize / 1_000 - piece;
        assert!((least..=most).contains(&sink.bytes()), "{text}: {} of {least} to {most}", sink.bytes());
        for window in (0..seconds * 10).map(|tenth| began + Duration::from_millis(tenth * 100)) {
            let inside = |at: &Instant| (window..window + Duration::from_millis(100)).contains(at);
            let bytes: usize = sink.arrivals().iter().filter(|(at, _)| inside(at)).map(|(_, bytes)| bytes).sum();
            let most = bytes_per_second / 10 + bytes_per_second / 1_000 + piece;
            assert!(bytes <= most, "{text}: {bytes} bytes within 100 ms, at most {most}");
        }
        let carried = link.carried();
        assert_eq!((carried.bytes as usize, carried.connections, carried.broken), (sink.bytes(), 1, 0));
        let last_piece = Duration::from_secs_f64(piece as f64 / bytes_per_second as f64);
        assert!(carried.busy <= Duration::from_secs(seconds) + last_piece, "{carried:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn connections_share_one_rate() {
    let link = link("20Mbit/s,20ms", 1);
    let sinks = [(); 3].map(|()| Sink::default());
    let carry = |sink: &Sink| link.flow(Kind::Traffic).carry(repeat(1), sink.clone());
    let all = async { tokio::join!(carry(&sinks[0]), carry(&sinks[1]), carry(&sinks[2])) };
    assert!(timeout(Duration::from_secs(4), all).await.is_err());
    let bytes = sinks.each_ref().map(Sink::bytes);
    let (total, most) = (bytes.iter().sum::<usize>(), 10_000_000);
    assert!(total <= most && total > most * 98 / 100, "{total} of {most}");
    assert!(bytes.iter().all(|bytes| *bytes > total * 30 / 100), "they take turns: {bytes:?}");
}

#[tokio::test(start_paused = true)]
async fn bytes_arrive_after_half_a_round_trip() {
    let (mut source, from) = duplex(1024);
    let (to, mut target) = duplex(1024);
    let carrying = tokio::spawn(link("20Mbit/s,50ms", 1).flow(Kind::Traffic).carry(from, to));
    for pause_ms in [0, 1_000] {
        tokio::time::advance(Duration::from_millis(pause_ms)).await;
        let began = Instant::now();
        source.write_all(b"x").await.unwrap();
        assert_eq!(target.read_u8().await.unwrap(), b'x');
        let (took, expected) = (began.elapsed(), Duration::from_millis(25));
        assert!((expected..=expected + TICK * 2).contains(&took), "{took:?}");
    }
    drop(source);
    assert_eq!(target.read(&mut [0]).await.unwrap(), 0, "the end arrives too");
    assert_eq!(carrying.await.unwrap(), Ok(()));
}

#[tokio::test(start_paused = true)]
async fn an_idle_link_saves_nothing_up() {
    let (mut source, from) = duplex(2 << 20);
    let sink = Sink::default();
    let _carrying = tokio::spawn(link("8Mbit/s", 1).flow(Kind::Traffic).carry(from, sink.clone()));
    tokio::time::advance(Duration::from_secs(60)).await;
    let began = Instant::now();
    source.write_all(&vec![1; 1_000_000]).await.unwrap();
    drop(source);
    while sink.bytes() < 1_000_000 {
        tokio::task::yield_now().await;
        tokio::time::advance(TICK).await;
    }
    // 1 MB at 8 Mbit/s.
    assert!(began.elapsed() >= Duration::from_secs(1), "{:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn jitter_keeps_every_byte_and_their_order() {
    let mut random = Random::new(3, 0);
    let content: Vec<u8> = (0..300_000).map(|_| random.next_u64() as u8).collect();
    let link = link("50Mbit/s,20ms,30ms", 7);
    let (mut source, from) = duplex(10_000);
    let (to, mut target) = duplex(10_000);
    let carrying = tokio::spawn(link.flow(Kind::Traffic).carry(from, to));
    let sent = content.clone();
    let sending = tokio::spawn(async move {
        let mut rest = &sent[..];
        while !rest.is_empty() {
            let (piece, left) = rest.split_at((1 + random.next_below(9_000) as usize).min(rest.len()));
            source.write_all(piece).await.unwrap();
            rest = left;
        }
    });
    let mut received = Vec::new();
    target.read_to_end(&mut received).await.unwrap();
    sending.await.unwrap();
    assert_eq!(carrying.await.unwrap(), Ok(()));
    assert!(received == content, "{} of {} bytes", received.len(), content.len());
}

#[tokio::test(start_paused = true)]
async fn jitter_varies_the_delay_within_its_bounds() {
    let link = link("100Mbit/s,40ms,20ms", 5);
    let (mut source, from) = duplex(1024);
    let (to, mut target) = duplex(1024);
    let _carrying = tokio::spawn(link.flow(Kind::Traffic).carry(from, to));
    let mut delays = Vec::new();
    for _ in 0..50 {
        let began = Instant::now();
        source.write_all(b"x").await.unwrap();
        target.read_u8().await.unwrap();
        delays.push(began.elapsed());
    }
    let (least, most) = (delays.iter().min().unwrap(), delays.iter().max().unwrap());
    assert!(*least >= Duration::from_millis(20) && *most <= Duration::from_millis(30) + TICK * 2, "{delays:?}");
    assert!(*most - *least >= Duration::from_millis(5), "{delays:?}");
}

/// Bytes that arrive on each of so many connections, one after the other, until each breaks.
async fn bytes_before_breaks(seed: u64, connections: usize) -> Vec<usize> {
    let link = link("100Mbit/s,10ms,20%", seed);
    let mut bytes = Vec::new();
    for _ in 0..connections {
        let sink = Sink::default();
        assert_eq!(link.flow(Kind::Traffic).carry(repeat(1), sink.clone()).await, Err(Broken));
        bytes.push(sink.bytes());
    }
    let carried = link.carried();
    assert_eq!((carried.broken, carried.bytes as usize), (connections as u64, bytes.iter().sum()));
    bytes
}

#[tokio::test(start_paused = true)]
async fn connections_break_at_the_same_bytes_whenever_the_seed_is_the_same() {
    let first = bytes_before_breaks(1, 20).await;
    assert_eq!(first, bytes_before_breaks(1, 20).await);
    assert_ne!(first, bytes_before_breaks(2, 20).await);
}

#[test]
fn breaks_come_as_often_as_the_loss_says() {
    for loss in [0.001, 0.05, 0.5] {
        let mut random = Random::new(9, 0);
        let draws = 20_000;
        let blocks = |random: &mut Random| bytes_until_break(loss, random) as f64 / LOSS_BLOCK_BYTES as f64;
        let mean = (0..draws).map(|_| blocks(&mut random)).sum::<f64>() / f64::from(draws);
        // Whole blocks before the break have mean (1 - p) / p and about that deviation; five errors of the mean.
        let expected = (1.0 - loss) / loss + 0.5;
        let tolerance = 5.0 * (expected + 1.0) / f64::from(draws).sqrt();
        assert!((mean - expected).abs() < tolerance, "{loss}: {mean} blocks, expected {expected}");
    }
    assert_eq!(bytes_until_break(0.0, &mut Random::new(1, 0)), UNBROKEN);
}

#[tokio::test(start_paused = true)]
async fn measurements_are_neither_broken_nor_counted() {
    let (link, sink) = (link("100Mbit/s,50%", 1), Sink::default());
    let carried = link.flow(Kind::Measurement).carry(repeat(1).take(5_000_000), sink.clone()).await;
    assert_eq!((carried, sink.bytes()), (Ok(()), 5_000_000));
    assert_eq!(link.carried(), Carried::default());
}

#[tokio::test(start_paused = true)]
async fn a_destination_that_does_not_read_stops_the_source() {
    // Half a window at least, and the window at most: rate times round trip, or 64 KiB.
    for (text, window_bytes) in [("1Mbit/s,10ms", 65_536), ("100Mbit/s,95ms", 1_250_000), ("100Gbit/s,2s", 64 << 20)] {
        let (link, spring) = (link(text, 1), Spring::default());
        let carrying = link.flow(Kind::Traffic).carry(spring.clone(), Wall);
        assert!(timeout(Duration::from_secs(600), carrying).await.is_err());
        let taken = spring.0.load(Ordering::Relaxed) as usize;
        assert_eq!(link.window_bytes(), window_bytes, "{text}");
        assert!((window_bytes / 2..=window_bytes).contains(&taken), "{text}: {taken} of {window_bytes}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_source_is_not_read_ahead_of_the_rate() {
    let (link, spring, sink) = (link("20Mbit/s,100ms", 1), Spring::default(), Sink::default());
    let carrying = link.flow(Kind::Traffic).carry(spring.clone(), sink);
    assert!(timeout(Duration::from_millis(40), carrying).await.is_err());
    // 40 ms at 20 Mbit/s are 100 kB; the piece after them may have been read.
    let (taken, most) = (spring.0.load(Ordering::Relaxed) as usize, 100_000 + link.piece_bytes());
    assert!(taken <= most, "{taken} of {most}");
}
