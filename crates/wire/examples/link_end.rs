//! One end of a link, for `cargo xtask bench link`: serves one blob, or fetches it and prints how long that took.
//!
//! `link_end serve ADDRESS MIB` prints one JSON line and serves until its standard input ends.
//! `link_end fetch ADDRESS FINGERPRINT HASH BYTES STREAMS [SMALL_HASH SMALL_BYTES SMALL_FETCHES]` prints one JSON line.

use base::{ContentHash, Round, SiteId};
use std::io::{self, Read, Write};
use std::sync::Arc;
use std::time::Instant;
use wire::{Blob, BlobClient, BlobKey, BlobRequest, BlobSource, Holder, Identity, Listener, Traffic, serve_blobs};

type Failure = Box<dyn std::error::Error>;

/// Length of the blob whose latency is measured: a coded delta of a small fragment.
const SMALL_BYTES: usize = 100_000;

struct Two {
    large: Blob,
    small: Blob,
}

impl BlobSource for Two {
    fn open(&self, _peer: ContentHash, key: &BlobKey) -> Option<Blob> {
        Some(if *key == key_of(0) { self.large.clone() } else { self.small.clone() })
    }
}

fn key_of(fragment: u32) -> BlobKey {
    BlobKey::Delta { round: Round(1), fragment, site: SiteId(0) }
}

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments.as_slice() {
        ["serve", address, mebibytes] => serve(address, mebibytes.parse()?).await,
        ["fetch", address, fingerprint, hash, bytes, streams, small_hash, small_fetches] => {
            let holder = Holder { address: (*address).to_owned(), fingerprint: fingerprint.parse()? };
            let large = (hash.parse()?, bytes.parse()?, streams.parse()?);
            fetch(holder, large, (small_hash.parse()?, small_fetches.parse()?)).await
        }
        _ => {
            Err("usage: link_end serve ADDRESS MIB | fetch ADDRESS FINGERPRINT HASH BYTES STREAMS SMALL_HASH N".into())
        }
    }
}

async fn serve(address: &str, mebibytes: usize) -> Result<(), Failure> {
    let content: Vec<u8> = (0..mebibytes << 20).map(|i| (i ^ (i >> 9)) as u8).collect();
    let source = Two { small: Blob::memory(content[..SMALL_BYTES].to_vec()), large: Blob::memory(content) };
    let identity = Identity::generate()?;
    let mut listener = Listener::bind(address.parse()?, &identity, &Traffic::new()).await?;
    writeln!(
        io::stdout(),
        r#"{{"address":"{}","fingerprint":"{}","hash":"{}","bytes":{},"small_hash":"{}"}}"#,
        listener.address(),
        identity.fingerprint(),
        source.large.hash()?,
        source.large.bytes(),
        source.small.hash()?,
    )?;
    let source: Arc<dyn BlobSource> = Arc::new(source);
    tokio::spawn(async move {
        while let Some(incoming) = listener.accept().await {
            tokio::spawn(serve_blobs(incoming.connection, source.clone()));
        }
    });
    tokio::task::spawn_blocking(|| io::stdin().read_to_end(&mut Vec::new())).await??;
    Ok(())
}

async fn fetch(
    holder: Holder,
    (hash, bytes, streams): (ContentHash, u64, usize),
    (small_hash, small_fetches): (ContentHash, usize),
) -> Result<(), Failure> {
    let client = BlobClient::new(Identity::generate()?, Traffic::new());
    let request = |fragment, bytes, hash| BlobRequest {
        key: key_of(fragment),
        bytes,
        bytes_max: bytes,
        hash,
        holders: vec![holder.clone()],
        streams,
    };
    let started = Instant::now();
    client.fetch(&request(0, bytes, hash)).await?;
    let seconds = started.elapsed().as_secs_f64();
    let mut latencies = Vec::new();
    for _ in 0..small_fetches {
        let started = Instant::now();
        client.fetch(&request(1, SMALL_BYTES as u64, small_hash)).await?;
        latencies.push(started.elapsed().as_secs_f64());
        // Idle for longer than a retransmission timeout, as between two deltas.
        tokio::time::sleep(std::time::Duration::from_millis(500)).await;
    }
    let latencies = latencies.iter().map(|seconds| format!("{seconds:.5}")).collect::<Vec<_>>().join(",");
    writeln!(io::stdout(), r#"{{"seconds":{seconds:.4},"bytes":{bytes},"small_seconds":[{latencies}]}}"#)?;
    Ok(())
}
