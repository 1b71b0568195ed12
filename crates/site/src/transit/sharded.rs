//! Slices and merged parts on their way. They come directly from sites: a round is sharded only where all can be dialled, and an object
//! store spares nobody the upload of what each other site needs something else of.

use super::{AGAIN, BULK_STREAMS, Fault, HINT_DIRECT, Problem, Transit};
use base::{ContentHash, Round, SiteId};
use bytes::Bytes;
use rounds::FragmentCodec;
use wire::{BlobKey, BlobRequest};

/// Something of a sharded round to be fetched.
pub(crate) struct WantedShard {
    pub(crate) key: BlobKey,
    pub(crate) round: Round,
    /// Who made it.
    pub(crate) from: SiteId,
    /// Values that it holds.
    pub(crate) values: usize,
    /// How they are coded: in f32 where they are merged.
    pub(crate) codec: ShardCodec,
    pub(crate) bytes: u64,
    pub(crate) hash: ContentHash,
}

pub(crate) enum ShardCodec {
    /// A slice of a delta: nobody but its maker has it.
    Slice(FragmentCodec),
    /// Whoever has fetched it can give it on.
    Merged,
}

impl WantedShard {
    fn check(&self, content: &[u8]) -> Result<(), formats::DecodeError> {
        match &self.codec {
            ShardCodec::Slice(codec) => codec.check_slice(content, self.values),
            ShardCodec::Merged => formats::CodecKind::F32.codec().check(content, self.values),
        }
    }
}

impl Transit {
    /// Fetches a slice or a merged part, and goes on until it is here. From its maker first; a merged part then from anybody.
    pub(crate) async fn fetch_shard(&self, wanted: &WantedShard) -> Bytes {
        let mut attempt = 1;
        loop {
            match self.try_shard(wanted, attempt).await {
                Ok(content) => return content,
                Err(problem) => {
                    let is_hopeless = problem.fault == Fault::Hopeless;
                    self.blame(&wanted.key, (wanted.round, wanted.from), problem, attempt);
                    if is_hopeless {
                        // Until its round is over, which ends this.
                        std::future::pending::<()>().await;
                    }
                }
            }
            tokio::time::sleep(AGAIN).await;
            attempt += 1;
        }
    }

    async fn try_shard(&self, wanted: &WantedShard, attempt: u32) -> Result<Bytes, Problem> {
        let holders = match wanted.codec {
            ShardCodec::Merged if attempt > 1 => self.shelf.all_holders(),
            _ => self.shelf.holders(&[wanted.from]),
        };
        if holders.is_empty() {
            return Err(Problem::new("no site that has it can be dialled", Some(HINT_DIRECT.to_owned())));
        }
        let request = BlobRequest {
            key: wanted.key.clone(),
            bytes: wanted.bytes,
            bytes_max: wanted.bytes,
            hash: wanted.hash,
            holders,
            streams: BULK_STREAMS,
        };
        let fetched = self.client.fetch(&request).await;
        let from_maker = attempt == 1 || matches!(wanted.codec, ShardCodec::Slice(_));
        let content = fetched.map_err(|error| Problem::of_fetch(&error, from_maker))?;
        wanted.check(&content).map_err(|error| Problem::hopeless(&error))?;
        Ok(Bytes::from(content))
    }
}
