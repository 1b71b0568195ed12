//! One stream of a fetch: a connection to one holder that is asked for chunk after chunk, and the tasks that do so.
//!
//! Requests go out while answers come in, so that the link is never empty between two chunks. A stream that breaks leaves
//! what it had received of its chunk in [`Buffers`]; its successor asks for the rest. Each answer is measured as it
//! arrives ([`crate::link`]).

use super::BlobKey;
use super::fetch::{BlobRequest, Client, Holder};
use super::protocol::{self, ChunkReply, ChunkRequest, Sent};
use super::torn::Buffers;
use super::transfer::{Assignment, Blame};
use super::tree::{self, ChunkHash};
use crate::connection::{ConnectError, Connection, Receiver, RecvError, SendError, Sender, connect_through};
use crate::limits::{CHUNKS_IN_FLIGHT_MAX, HOLDERS_MAX, POOL_RETURN_WAIT, PROGRESS_BYTES_MIN, RETRY_PAUSE};
use crate::link::{Link, Outstanding, sent_between};
use crate::preamble::Purpose;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

/// A verified chunk.
#[derive(Debug)]
pub(super) struct Arrival {
    pub(super) stream: u64,
    pub(super) index: u64,
    pub(super) content: Vec<u8>,
    pub(super) hash: ChunkHash,
}

/// The tasks of one fetch. Dropping it aborts them.
pub(super) struct Streams<'a> {
    client: Arc<Client>,
    request: &'a BlobRequest,
    /// By holder.
    links: Vec<Arc<Link>>,
    arrivals: mpsc::Sender<Arrival>,
    pub(super) buffers: Arc<Buffers>,
    pub(super) tasks: JoinSet<StreamEnd>,
    pub(super) running: HashMap<u64, Running>,
    started: u64,
}

pub(super) struct Running {
    pub(super) assignment: Assignment,
    pub(super) asks: mpsc::Sender<u64>,
}

#[derive(Debug)]
pub(super) struct StreamEnd {
    pub(super) stream: u64,
    pub(super) result: Result<(), StreamError>,
}

impl<'a> Streams<'a> {
    pub(super) fn new(client: Arc<Client>, request: &'a BlobRequest, arrivals: mpsc::Sender<Arrival>) -> Self {
        let links = request.holders.iter().take(HOLDERS_MAX).map(|holder| client.links.of(holder)).collect();
        Self {
            client,
            request,
            links,
            arrivals,
            buffers: Arc::default(),
            tasks: JoinSet::new(),
            running: HashMap::new(),
            started: 0,
        }
    }

    /// The largest product of bandwidth and delay among the holders, as far as measured.
    pub(super) fn bandwidth_delay_bytes(&self) -> Option<f64> {
        let products = self.links.iter().filter_map(|link| link.estimate().bandwidth_delay_bytes());
        products.reduce(f64::max)
    }

    pub(super) fn start(&mut self, assignment: Assignment) {
        let stream = self.started;
        self.started += 1;
        let (asks, asked) = mpsc::channel(CHUNKS_IN_FLIGHT_MAX);
        let task = StreamTask {
            stream,
            client: self.client.clone(),
            holder: self.request.holders[assignment.holder].clone(),
            holder_index: assignment.holder,
            link: self.links[assignment.holder].clone(),
            buffers: self.buffers.clone(),
            key: self.request.key.clone(),
            blob_bytes: self.request.bytes,
            arrivals: self.arrivals.clone(),
        };
        let pause = match assignment.failures_in_row {
            0 => Duration::ZERO,
            failures => RETRY_PAUSE * 2u32.saturating_pow(failures - 1),
        };
        self.tasks.spawn(async move {
            sleep(pause).await;
            StreamEnd { stream, result: task.run(asked).await }
        });
        self.running.insert(stream, Running { assignment, asks });
    }

    /// Lets the streams put their connections back, which takes no network. Those that are still connecting or receiving
    /// a chunk that came from elsewhere are not waited for.
    pub(super) async fn finish(mut self) {
        self.running.clear();
        let all_back = async { while self.tasks.join_next().await.is_some() {} };
        let _ = timeout(POOL_RETURN_WAIT, all_back).await;
    }
}

/// Why a stream ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StreamError {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error(transparent)]
    Send(#[from] SendError),
    #[error(transparent)]
    Recv(#[from] RecvError),
    #[error("no chunk for {0:?}")]
    Stalled(Duration),
    #[error("it does not have it, or not for us")]
    NotFound,
    #[error("it cannot read its copy")]
    Unreadable,
    #[error("its copy has {found} bytes, expected were {expected}")]
    Length { expected: u64, found: u64 },
    #[error("chunk {index} was damaged")]
    Damaged { index: u64 },
    #[error("its reply does not fit the request")]
    Protocol,
    #[error("a kept connection had gone stale: {0}")]
    Stale(Box<StreamError>),
    #[error("the stream broke: {0}")]
    Torn(Box<StreamError>),
}

impl StreamError {
    pub(super) fn blame(&self) -> Blame {
        match self {
            Self::Stale(_) => Blame::Nobody,
            Self::Torn(_) => Blame::Torn,
            Self::NotFound | Self::Length { .. } => Blame::Lasting,
            Self::Connect(ConnectError::Fingerprint { .. } | ConnectError::Preamble { .. }) => Blame::Lasting,
            _ => Blame::Passing,
        }
    }

    /// Whether it is the connection that failed, and not what came over it.
    fn is_broken_connection(&self) -> bool {
        matches!(self, Self::Send(_) | Self::Recv(_))
    }
}

/// One stream: a connection to one holder that is asked for chunk after chunk.
struct StreamTask {
    stream: u64,
    client: Arc<Client>,
    holder: Holder,
    holder_index: usize,
    link: Arc<Link>,
    buffers: Arc<Buffers>,
    key: BlobKey,
    blob_bytes: u64,
    arrivals: mpsc::Sender<Arrival>,
}

/// A request that was sent.
struct Asked {
    index: u64,
    offset: u32,
    outstanding: Outstanding,
    /// When it was sent, if nothing else was under way on the stream.
    alone_since: Option<Instant>,
}

impl StreamTask {
    async fn run(self, asked: mpsc::Receiver<u64>) -> Result<(), StreamError> {
        let (mut connection, kept) = match self.client.pool.take(&self.holder) {
            Some(connection) => (connection, true),
            None => (self.connect().await?, false),
        };
        let mut received_bytes = 0;
        let Err(error) = self.exchange(&mut connection, asked, &mut received_bytes).await else {
            self.client.pool.put(&self.holder, connection);
            return Ok(());
        };
        let broken = error.is_broken_connection();
        match received_bytes {
            0 if kept && (broken || matches!(error, StreamError::Stalled(_))) => {
                return Err(StreamError::Stale(Box::new(error)));
            }
            0 => {}
            _ => self.link.broke(),
        }
        Err(if broken && received_bytes >= PROGRESS_BYTES_MIN { StreamError::Torn(Box::new(error)) } else { error })
    }

    async fn connect(&self) -> Result<Connection, ConnectError> {
        let Holder { address, fingerprint } = &self.holder;
        let Client { identity, traffic, proxy, .. } = &*self.client;
        let connection =
            connect_through(proxy.as_ref(), identity, traffic, address, *fingerprint, Purpose::Blob).await?;
        self.link.connected(connection.path());
        Ok(connection)
    }

    /// Requests go out while answers come in.
    async fn exchange(
        &self,
        connection: &mut Connection,
        asked: mpsc::Receiver<u64>,
        received_bytes: &mut usize,
    ) -> Result<(), StreamError> {
        let (sender, receiver) = connection.halves();
        let (sent, awaited) = mpsc::channel(CHUNKS_IN_FLIGHT_MAX);
        tokio::try_join!(self.ask(sender, asked, sent), self.take(receiver, awaited, received_bytes))?;
        Ok(())
    }

    async fn ask(
        &self,
        sender: &mut Sender,
        mut asked: mpsc::Receiver<u64>,
        sent: mpsc::Sender<Asked>,
    ) -> Result<(), StreamError> {
        let mut alone_since = Some(Instant::now());
        while let Some(index) = asked.recv().await {
            let offset = self.buffers.offset(index, self.holder_index);
            let outstanding = self.link.asked();
            alone_since = alone_since.map(|_| Instant::now());
            let pace_bytes_per_second = self.link.pace(self.blob_bytes);
            let request = ChunkRequest { key: self.key.clone(), index, offset, pace_bytes_per_second };
            sender.send_timeout(&request, self.client.stall).await?;
            if sent.send(Asked { index, offset, outstanding, alone_since: alone_since.take() }).await.is_err() {
                break;
            }
        }
        Ok(())
    }

    async fn take(
        &self,
        receiver: &mut Receiver,
        mut awaited: mpsc::Receiver<Asked>,
        received_bytes: &mut usize,
    ) -> Result<(), StreamError> {
        let (stall, mut counters) = (self.client.stall, None);
        while let Some(asked) = awaited.recv().await {
            let chunk = self.chunk(receiver, &asked, received_bytes, &mut counters);
            let (content, hash) = timeout(stall, chunk).await.map_err(|_| StreamError::Stalled(stall))??;
            let arrival = Arrival { stream: self.stream, index: asked.index, content, hash };
            // The link is idle as far as this request goes, however long the receiver takes.
            drop(asked);
            // The fetch is over when nobody receives.
            let _ = self.arrivals.send(arrival).await;
        }
        Ok(())
    }

    /// One reply, verified.
    async fn chunk(
        &self,
        receiver: &mut Receiver,
        asked: &Asked,
        received_bytes: &mut usize,
        counters: &mut Option<Sent>,
    ) -> Result<(Vec<u8>, ChunkHash), StreamError> {
        let reply = receiver.recv().await?;
        let (rest_bytes, announced, sent) = accept(reply, self.blob_bytes)?;
        self.measure(receiver, asked, sent, counters);
        let chunk_bytes = protocol::chunk_bytes(self.blob_bytes, asked.index);
        if rest_bytes != chunk_bytes - asked.offset as usize {
            return Err(StreamError::Protocol);
        }
        let buffer = self.buffers.take(asked.index, asked.offset, chunk_bytes).ok_or(StreamError::Protocol)?;
        let mut part = Part { task: self, index: asked.index, received: asked.offset as usize, buffer };
        while part.received < chunk_bytes {
            let bytes = receiver.recv_some(&mut part.buffer[part.received..]).await?;
            if bytes == 0 {
                return Err(RecvError::Truncated { received: part.received, expected: chunk_bytes }.into());
            }
            part.received += bytes;
            *received_bytes += bytes;
            asked.outstanding.received(bytes);
        }
        let content = part.complete();
        let hash = verified(asked.index, &content, self.blob_bytes, announced)?;
        Ok((content, hash))
    }

    /// Learns from the beginning of an answer.
    fn measure(&self, receiver: &Receiver, asked: &Asked, sent: Option<Sent>, counters: &mut Option<Sent>) {
        let of_kernel = receiver.tcp_info().and_then(|info| info.round_trip_min);
        if let Some(round_trip) = of_kernel.or_else(|| asked.alone_since.map(|since| since.elapsed())) {
            self.link.round_trip(round_trip.as_secs_f64());
        }
        let before = std::mem::replace(counters, sent);
        if let Some((bytes, again)) = before.zip(sent).and_then(|(before, now)| sent_between(before, now)) {
            self.link.sent(bytes, again);
        }
    }
}

/// What the reply for a chunk of a blob of `expected` bytes announces: bytes that follow, hash of the chunk, and the holder's counters.
pub(crate) fn accept(reply: ChunkReply, expected: u64) -> Result<(usize, ChunkHash, Option<Sent>), StreamError> {
    match reply {
        ChunkReply::Chunk { blob_bytes: found, .. } | ChunkReply::OutOfRange { blob_bytes: found }
            if found != expected =>
        {
            Err(StreamError::Length { expected, found })
        }
        ChunkReply::Chunk { chunk_bytes, hash, sent, .. } => Ok((chunk_bytes as usize, hash, sent)),
        ChunkReply::NotFound => Err(StreamError::NotFound),
        ChunkReply::Unreadable => Err(StreamError::Unreadable),
        ChunkReply::OutOfRange { .. } => Err(StreamError::Protocol),
    }
}

/// The hash of a whole chunk, if it is what was announced.
pub(crate) fn verified(
    index: u64,
    chunk: &[u8],
    blob_bytes: u64,
    announced: ChunkHash,
) -> Result<ChunkHash, StreamError> {
    let hash = tree::chunk_hash(index, chunk, protocol::chunks(blob_bytes) == 1);
    if hash == announced { Ok(hash) } else { Err(StreamError::Damaged { index }) }
}

/// A chunk that is arriving. Dropped before it is complete, it leaves what came for the next stream.
struct Part<'a> {
    task: &'a StreamTask,
    index: u64,
    received: usize,
    buffer: Vec<u8>,
}

impl Part<'_> {
    fn complete(mut self) -> Vec<u8> {
        self.received = 0;
        std::mem::take(&mut self.buffer)
    }
}

impl Drop for Part<'_> {
    fn drop(&mut self) {
        self.buffer.truncate(self.received);
        self.task.buffers.keep(self.index, self.task.holder_index, std::mem::take(&mut self.buffer));
    }
}
