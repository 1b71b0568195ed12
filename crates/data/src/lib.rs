//! Text to tokens, once, and tokens to samples, in an order that needs no memory.
//!
//! [`Corpus`] finds files, [`documents`] reads them, [`TextTokenizer`] turns text into tokens, [`prepare()`] writes
//! them as memory-mapped shards with a hashed [`Manifest`], [`Dataset`] gives samples of them, [`SampleOrder`]
//! says which sample comes when, and [`BigramModel`] is the simple model that a trained one must beat on the
//! same [`ValidationSet`].
//!
//! Nothing here knows of models, sites or rounds. Input is never trusted: what cannot be read is named and
//! counted, lengths are checked before memory is taken, and a shard that is not what its manifest says is
//! refused.

pub mod bigram;
pub mod corpus;
pub mod dataset;
pub mod documents;
pub mod manifest;
pub mod order;
mod parquet_text;
pub mod prepare;
mod shard_writer;
pub mod tokenizer;
pub mod validation;

pub use bigram::BigramModel;
pub use corpus::{Corpus, CorpusError};
pub use dataset::{Dataset, DatasetError};
pub use documents::CorpusReport;
pub use manifest::{Manifest, Split};
pub use order::SampleOrder;
pub use prepare::{PrepareError, PrepareOptions, PrepareProgress, prepare};
pub use tokenizer::{TextTokenizer, TokenizerError, TokenizerSource};
pub use validation::{ValidationSet, bits_per_byte};
