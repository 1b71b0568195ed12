//! What a link really gives, measured by the lab through its own relays before the sites use them.
//!
//! A source and a sink in the lab's process talk through the same relays, links and sockets as the sites. The rate is that of
//! bytes at the sink, from the first that arrive to the last; the round trip is the median of some echoes of one byte.

use super::relay::Network;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};
use tokio_socks::tcp::Socks5Stream;

/// A transfer takes this long on a link that gives what it should.
const TRANSFER_SECONDS: f64 = 0.4;

/// Bytes of a transfer, so that a slow link shows a rate too (64 kbit/s: 4 s) and a fast one ends.
const TRANSFER_BYTES: std::ops::RangeInclusive<u64> = 32 * 1024..=256 << 20;

/// Links are measured at the same time as long as their rates add up to this: one core carries it several times over.
const MEGABITS_PER_SECOND_AT_ONCE: u32 = 1_000;

/// Echoes of which the median counts.
const ECHOES: usize = 5;

/// A pair that is not measured by then has a link that does not work.
const WAIT_MAX: Duration = Duration::from_secs(120);

/// Bytes read or written at once.
const BUFFER_BYTES: usize = 64 * 1024;

/// What a source asks of the sink.
const ECHO: u8 = b'e';
const UPLOAD: u8 = b'u';
const DOWNLOAD: u8 = b'd';

/// What two ends have between them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Measured {
    /// From the first end to the second.
    pub(super) forward_bits_per_second: f64,
    /// From the second to the first.
    pub(super) backward_bits_per_second: f64,
    pub(super) round_trip: Duration,
}

/// Answers measurements for ever.
pub(super) async fn serve(listener: TcpListener) {
    let mut tasks = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => if let Ok((source, _)) = accepted {
                // What goes wrong shows at the source.
                tasks.spawn(async move { answer(source).await });
            },
            Some(_ended) = tasks.join_next() => {}
        }
    }
}

async fn answer(mut source: TcpStream) -> io::Result<()> {
    source.set_nodelay(true)?;
    loop {
        match source.read_u8().await {
            Ok(ECHO) => source.write_u8(ECHO).await?,
            Ok(UPLOAD) => {
                let bytes = source.read_u64().await?;
                let rate = drain(&mut source, bytes).await?;
                source.write_f64(rate).await?;
            }
            Ok(DOWNLOAD) => {
                let bytes = source.read_u64().await?;
                pour(&mut source, bytes).await?;
            }
            _ => return Ok(()),
        }
    }
}

async fn pour(to: &mut (impl AsyncWrite + Unpin), mut bytes: u64) -> io::Result<()> {
    let zeros = vec![0; BUFFER_BYTES];
    while bytes > 0 {
        let piece = bytes.min(BUFFER_BYTES as u64);
        to.write_all(&zeros[..piece as usize]).await?;
        bytes -= piece;
    }
    to.flush().await
}

/// Reads that many bytes; their rate in bits a second, without those of the first read, whose beginning nobody saw.
async fn drain(from: &mut (impl AsyncRead + Unpin), bytes: u64) -> io::Result<f64> {
    let mut buffer = vec![0; BUFFER_BYTES];
    let (mut left, mut first) = (bytes, None);
    while left > 0 {
        let room = left.min(BUFFER_BYTES as u64) as usize;
        let read = from.read(&mut buffer[..room]).await?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        left -= read as u64;
        first.get_or_insert((Instant::now(), left));
    }
    let rate = first.map(|(began, counted)| counted as f64 * 8.0 / began.elapsed().as_secs_f64().max(1e-9));
    Ok(rate.unwrap_or_default())
}

/// Measures all pairs of ends; the relays are those of the sites, the sink is at `meter_port`. By pair, in order.
///
/// # Errors
/// A link does not carry what it should; the message names it.
pub(super) async fn all(
    network: &Arc<Network>,
    relays: &[SocketAddr],
    meter_port: u16,
) -> Result<Vec<((usize, usize), Measured)>, String> {
    let budget = Arc::new(Semaphore::new(MEGABITS_PER_SECOND_AT_ONCE as usize));
    let mut tasks = JoinSet::new();
    let pairs = (0..relays.len()).flat_map(|from| (from + 1..=relays.len()).map(move |to| (from, to)));
    for (from, to) in pairs {
        let (network, relay, budget) = (Arc::clone(network), relays[from], Arc::clone(&budget));
        tasks.spawn(async move {
            let fastest =
                network.link(from, to).spec().bits_per_second.max(network.link(to, from).spec().bits_per_second);
            let share = u32::try_from(fastest / 1_000_000).unwrap_or(u32::MAX).clamp(1, MEGABITS_PER_SECOND_AT_ONCE);
            // The semaphore is never closed.
            let _turn = budget.acquire_many(share).await;
            let measured = timeout(WAIT_MAX, pair(&network, relay, (from, to), meter_port)).await;
            let problem = |what: String| format!("{} to {}: {what}", network.name(from), network.name(to));
            match measured {
                Ok(Ok(measured)) => Ok(((from, to), measured)),
                Ok(Err(error)) => Err(problem(error.to_string())),
                Err(_) => Err(problem(format!("not measured within {WAIT_MAX:?}"))),
            }
        });
    }
    let mut all = Vec::new();
    while let Some(measured) = tasks.join_next().await {
        all.push(measured.map_err(|error| error.to_string())??);
    }
    all.sort_by_key(|(pair, _)| *pair);
    Ok(all)
}

async fn pair(
    network: &Network,
    relay: SocketAddr,
    (from, to): (usize, usize),
    meter_port: u16,
) -> io::Result<Measured> {
    let target = (network.name(to), meter_port);
    let mut sink = Socks5Stream::connect(relay, target).await.map_err(io::Error::other)?.into_inner();
    sink.set_nodelay(true)?;
    let mut echoes = Vec::with_capacity(ECHOES);
    for _ in 0..ECHOES {
        let asked = Instant::now();
        sink.write_u8(ECHO).await?;
        sink.read_u8().await?;
        echoes.push(asked.elapsed());
    }
    echoes.sort_unstable();
    ask(&mut sink, UPLOAD, transfer_bytes(network, from, to)).await?;
    pour(&mut sink, transfer_bytes(network, from, to)).await?;
    let forward_bits_per_second = sink.read_f64().await?;
    let download_bytes = transfer_bytes(network, to, from);
    ask(&mut sink, DOWNLOAD, download_bytes).await?;
    let backward_bits_per_second = drain(&mut sink, download_bytes).await?;
    Ok(Measured { forward_bits_per_second, backward_bits_per_second, round_trip: echoes[ECHOES / 2] })
}

async fn ask(sink: &mut TcpStream, what: u8, bytes: u64) -> io::Result<()> {
    let mut request = vec![what];
    request.extend(bytes.to_be_bytes());
    sink.write_all(&request).await
}

fn transfer_bytes(network: &Network, from: usize, to: usize) -> u64 {
    let bytes_per_second = network.link(from, to).spec().bits_per_second as f64 / 8.0;
    ((bytes_per_second * TRANSFER_SECONDS) as u64).clamp(*TRANSFER_BYTES.start(), *TRANSFER_BYTES.end())
}
