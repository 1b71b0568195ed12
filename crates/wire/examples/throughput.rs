//! How fast bulk transfer fills loopback, beside a plain TCP copy of the same bytes in the same run.
//!
//! `cargo run --release -p wire --example throughput [MiB] [repetitions]`. Both ends share this machine's cores, so that
//! encryption, decryption and two hashes compete with each other: the ratio is a lower bound for two machines.

use base::{ContentHash, Round, SiteId};
use std::io::{self, Write};
use std::sync::Arc;
use std::time::Instant;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use wire::{Blob, BlobClient, BlobKey, BlobRequest, BlobSource, Holder, Identity, Listener, Traffic, serve_blobs};

type Failure = Box<dyn std::error::Error>;

struct One(Blob);

impl BlobSource for One {
    fn open(&self, _peer: ContentHash, _key: &BlobKey) -> Option<Blob> {
        Some(self.0.clone())
    }
}

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let mut arguments = std::env::args().skip(1);
    let mebibytes: usize = arguments.next().map_or(Ok(256), |text| text.parse())?;
    let repetitions: usize = arguments.next().map_or(Ok(5), |text| text.parse())?;
    let content: Vec<u8> = (0..mebibytes << 20).map(|i| (i ^ (i >> 9)) as u8).collect();
    let bench = Bench::start(content).await?;
    let mut gigabits = [Vec::new(), Vec::new(), Vec::new()];
    for _ in 0..repetitions.max(1) {
        gigabits[0].push(bench.plain().await?);
        gigabits[1].push(bench.fetch(1).await?);
        gigabits[2].push(bench.fetch(4).await?);
    }
    let [plain, one, four] = gigabits.map(median);
    let cores = std::thread::available_parallelism()?;
    let started = Instant::now();
    let _ = ContentHash::of(&bench.content);
    let hashing = bench.gigabits_per_second(started.elapsed().as_secs_f64());
    let mut out = io::stdout();
    writeln!(out, "{mebibytes} MiB over loopback, both ends on {cores} cores, median of {repetitions}")?;
    writeln!(out, "BLAKE3, one core    {hashing:6.2} Gbit/s")?;
    writeln!(out, "plain TCP copy      {plain:6.2} Gbit/s")?;
    writeln!(out, "fetch, 1 stream     {one:6.2} Gbit/s   {:.2} of plain", one / plain)?;
    writeln!(out, "fetch, 4 streams    {four:6.2} Gbit/s   {:.2} of plain", four / plain)?;
    Ok(())
}

struct Bench {
    content: bytes::Bytes,
    hash: ContentHash,
    holder: Holder,
    client: BlobClient,
}

impl Bench {
    async fn start(content: Vec<u8>) -> Result<Self, Failure> {
        let content = bytes::Bytes::from(content);
        let blob = Blob::memory(content.clone());
        let hash = blob.hash()?;
        let identity = Identity::generate()?;
        let mut listener = Listener::bind(([127, 0, 0, 1], 0).into(), &identity, &Traffic::new()).await?;
        let holder = Holder { address: listener.address().to_string(), fingerprint: identity.fingerprint() };
        let source: Arc<dyn BlobSource> = Arc::new(One(blob));
        tokio::spawn(async move {
            while let Some(incoming) = listener.accept().await {
                tokio::spawn(serve_blobs(incoming.connection, source.clone()));
            }
        });
        Ok(Self { content, hash, holder, client: BlobClient::new(Identity::generate()?, Traffic::new()) })
    }

    /// One TCP connection, no encryption, no hash.
    async fn plain(&self) -> Result<f64, Failure> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let content = self.content.clone();
        let sending = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await?;
            stream.write_all(&content).await
        });
        let mut received = vec![0; self.content.len()];
        let started = Instant::now();
        TcpStream::connect(address).await?.read_exact(&mut received).await?;
        let seconds = started.elapsed().as_secs_f64();
        sending.await??;
        Ok(self.gigabits_per_second(seconds))
    }

    async fn fetch(&self, streams: usize) -> Result<f64, Failure> {
        let bytes = self.content.len() as u64;
        let request = BlobRequest {
            key: BlobKey::Delta { round: Round(1), fragment: 0, site: SiteId(0) },
            bytes,
            bytes_max: bytes,
            hash: self.hash,
            holders: vec![self.holder.clone()],
            streams,
        };
        let started = Instant::now();
        self.client.fetch(&request).await?;
        Ok(self.gigabits_per_second(started.elapsed().as_secs_f64()))
    }

    fn gigabits_per_second(&self, seconds: f64) -> f64 {
        8.0 * self.content.len() as f64 / seconds / 1e9
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
