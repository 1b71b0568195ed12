//! The global state at a site: real parameters, the outer optimiser that ships, and the hash of invariant I1.

use base::{ContentHash, RunConfig};
use rounds::plan::state_trailer;
use rounds::{Commit, OuterOptimizer};

/// Seed of the initial parameters' stream.
const INITIAL_STREAM: u64 = 11;

/// The same bits at every site after each commit.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct GlobalState {
    /// Flat, in canonical order.
    pub(crate) parameters: Vec<f32>,
    /// With its buffers.
    pub(crate) outer: OuterOptimizer,
    /// The commit that made it.
    pub(crate) commit: Commit,
}

impl GlobalState {
    /// What a run begins with.
    pub(crate) fn initial(config: &RunConfig) -> Self {
        let schema = config.schema();
        let mut random = base::random::Random::new(config.run.seed, INITIAL_STREAM);
        let parameters = (0..schema.elements()).map(|_| random.next_unit() as f32 - 0.5).collect();
        Self { parameters, outer: OuterOptimizer::new(config, &schema), commit: Commit::initial() }
    }

    /// Parameters and outer buffers as little-endian f32, then term, round and cursor: what a newcomer fetches.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = self.values();
        bytes.extend_from_slice(&state_trailer(self.commit.term, self.commit.round, self.commit.cursor));
        bytes
    }

    /// The same without term, round and cursor: what two runs of other terms have in common.
    pub(crate) fn values(&self) -> Vec<u8> {
        let buffers = self.outer.buffers().iter().flatten();
        self.parameters.iter().chain(buffers).flat_map(|value| value.to_le_bytes()).collect()
    }

    /// BLAKE3 of [`GlobalState::encode`].
    pub(crate) fn hash(&self) -> ContentHash {
        ContentHash::of(&self.encode())
    }

    /// Takes over what another site encoded; false where that is of another size.
    pub(crate) fn decode(&mut self, commit: Commit, bytes: &[u8]) -> bool {
        let buffers = 1 + self.outer.buffers().len();
        let length = self.parameters.len() * buffers * size_of::<f32>();
        if bytes.len() != length + state_trailer(commit.term, commit.round, commit.cursor).len() {
            return false;
        }
        let mut values = bytes[..length].chunks_exact(size_of::<f32>());
        let mut next = || values.next().map_or(0.0, |four| f32::from_le_bytes([four[0], four[1], four[2], four[3]]));
        self.parameters.iter_mut().for_each(|value| *value = next());
        self.outer.buffers_mut().iter_mut().flatten().for_each(|value| *value = next());
        self.commit = commit;
        true
    }
}
