//! From a corpus to a data folder, in one pass and bounded memory.
//!
//! Documents are read by one thread, encoded a batch at a time on all cores, and written in their order. Which
//! split a document belongs to follows from its content and a seed alone, so that it stays where it is when
//! other documents come or go. Everything is written to a folder beside the wanted one, which takes its name
//! when it is complete and on disk: an interrupted run leaves nothing that could be taken for a data set.

use crate::corpus::{Corpus, CorpusError};
use crate::documents::{CorpusReport, Documents, cut_at_line};
use crate::manifest::{FORMAT_VERSION, FileEntry, MANIFEST_FILE, Manifest, Split, TOKENIZER_FILE, token_width_bytes};
use crate::shard_writer::SplitWriter;
use crate::tokenizer::{TextTokenizer, TokenizerError, TokenizerSource};
use base::{ContentHash, Hint};
use rayon::prelude::*;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// Text encoded at once, bytes, plus at most one document. Its tokens take at most four times that (one a byte,
/// four bytes each), so a batch holds 8 + 32 MiB beside what the encoders work on; the first two batches are held
/// together, to know whether there is more than one.
pub const BATCH_BYTES: usize = 8 << 20;

/// Tokens in a shard unless chosen otherwise: 200 MB of two-byte tokens, a comfortable size to fetch and hash.
pub const SHARD_TOKENS_DEFAULT: u64 = 100_000_000;

/// How a corpus is split and stored.
#[derive(Debug, Clone, PartialEq)]
pub struct PrepareOptions {
    /// Fraction of the text held out for validation, above 0 and at most 0.5.
    pub validation_fraction: f64,
    /// Decides which documents are held out.
    pub split_seed: u64,
    /// Most tokens in a shard; a single longer document still stays whole.
    pub shard_tokens_max: u64,
}

impl Default for PrepareOptions {
    fn default() -> Self {
        Self { validation_fraction: 0.05, split_seed: 1, shard_tokens_max: SHARD_TOKENS_DEFAULT }
    }
}

/// How far [`prepare`] has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PrepareProgress {
    /// The tokenizer is being trained on a sample.
    Tokenizer,
    /// Documents are being encoded.
    Encoding {
        /// Bytes of the files opened so far.
        file_bytes: u64,
        /// Bytes of all files.
        file_bytes_total: u64,
        /// Documents written.
        documents: u64,
        /// Tokens written.
        tokens: u64,
    },
}

/// A finished data folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prepared {
    /// What it holds.
    pub manifest: Manifest,
    /// What reading the corpus met: binary files, bad lines.
    pub report: CorpusReport,
}

/// Why there is no data folder.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PrepareError {
    /// There is no text.
    #[error(transparent)]
    Corpus(#[from] CorpusError),
    /// There is no tokenizer, or it failed on the text.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The folder is already there.
    #[error("data folder {} is already there", .0.display())]
    Exists(PathBuf),
    /// A file could not be written.
    #[error("writing {}: {source}", path.display())]
    Write {
        /// The folder or file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Less text than can be split in two.
    #[error("{0} bytes of text cannot be split into training and validation")]
    TooLittle(u64),
    /// An option out of its range.
    #[error("{field}: {reason}")]
    Option {
        /// The field of [`PrepareOptions`].
        field: &'static str,
        /// What is wrong with it.
        reason: String,
    },
}

impl Hint for PrepareError {
    fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Corpus(error) => return error.hint(),
            Self::Tokenizer(error) => return error.hint(),
            Self::Exists(path) => format!("choose another name, or remove it: rm -r {}", path.display()),
            Self::Write { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
                "free some space and run the same command again; nothing half done is left".to_owned()
            }
            Self::Write { path, .. } => format!("make {} writable and run the same command again", path.display()),
            Self::TooLittle(_) => "add text to the data folder".to_owned(),
            Self::Option { field, .. } => format!("set {field} to a value in that range"),
        })
    }
}

/// Encodes `corpus` into the new folder `out`: tokenizer, shards, manifest. Equal input gives equal bytes.
///
/// # Errors
/// No text, no tokenizer, `out` is there and not empty, or a file that cannot be written; then `out` is as it was.
pub fn prepare(
    corpus: &Corpus,
    tokenizer: &TokenizerSource,
    out: &Path,
    options: &PrepareOptions,
    progress: &mut dyn FnMut(PrepareProgress),
) -> Result<Prepared, PrepareError> {
    check_options(options)?;
    if fs::read_dir(out).is_ok_and(|mut entries| entries.next().is_some()) || out.is_file() {
        return Err(PrepareError::Exists(out.to_owned()));
    }
    progress(PrepareProgress::Tokenizer);
    let tokenizer = match tokenizer {
        TokenizerSource::Train { vocabulary_size } => TextTokenizer::train(corpus, *vocabulary_size)?,
        TokenizerSource::Load(path) => TextTokenizer::load(path)?,
    };
    let folder = PartialFolder::create(out)?;
    let mut encoder = Encoder::new(corpus, &tokenizer, &folder.path, options, progress);
    let document_was_cut = encoder.run()?;
    let (train, validation, report) = encoder.finish()?;
    let manifest = Manifest {
        format: FORMAT_VERSION,
        vocabulary_size: tokenizer.vocabulary_size() as u64,
        end_of_text: tokenizer.end_of_text(),
        token_width_bytes: token_width_bytes(tokenizer.vocabulary_size() as u64),
        split_seed: options.split_seed,
        document_was_cut,
        tokenizer: folder.write(TOKENIZER_FILE, tokenizer.json())?,
        train,
        validation,
    };
    folder.write(MANIFEST_FILE, &manifest.to_json())?;
    folder.complete(out)?;
    Ok(Prepared { manifest, report })
}

fn check_options(options: &PrepareOptions) -> Result<(), PrepareError> {
    let fraction = options.validation_fraction;
    if !(fraction > 0.0 && fraction <= 0.5) {
        let reason = format!("{fraction} is not above 0 and at most 0.5");
        return Err(PrepareError::Option { field: "validation_fraction", reason });
    }
    if options.shard_tokens_max == 0 {
        return Err(PrepareError::Option { field: "shard_tokens_max", reason: "0 is not above 0".to_owned() });
    }
    Ok(())
}

/// A folder beside `out` that is removed unless it is completed.
struct PartialFolder {
    path: PathBuf,
}

impl PartialFolder {
    fn create(out: &Path) -> Result<Self, PrepareError> {
        let name = out.file_name().unwrap_or_default().to_string_lossy();
        let path = out.with_file_name(format!(".{name}.partial"));
        let remove = if path.exists() { fs::remove_dir_all(&path) } else { Ok(()) };
        remove.and_then(|()| fs::create_dir_all(&path)).map_err(|source| write_error(&path, source))?;
        Ok(Self { path })
    }

    /// Writes and syncs one small file.
    fn write(&self, name: &str, content: &[u8]) -> Result<FileEntry, PrepareError> {
        let path = self.path.join(name);
        let write = || {
            let mut file = File::create_new(&path)?;
            file.write_all(content)?;
            file.sync_all()
        };
        write().map_err(|source| write_error(&path, source))?;
        Ok(FileEntry { name: name.to_owned(), bytes: content.len() as u64, blake3: ContentHash::of(content) })
    }

    /// Gives the folder its name. The names must be on disk before and after.
    fn complete(self, out: &Path) -> Result<(), PrepareError> {
        let parent = out.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let complete = || {
            sync_folder(&self.path)?;
            if out.exists() {
                fs::remove_dir(out)?;
            }
            fs::rename(&self.path, out)?;
            sync_folder(parent)
        };
        complete().map_err(|source| write_error(out, source))
    }
}

impl Drop for PartialFolder {
    fn drop(&mut self) {
        // After `complete` it has another name and this finds nothing; a failure leaves what the next run removes.
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// Makes a folder's entries durable, where the system can (a folder cannot be opened as a file on Windows).
fn sync_folder(folder: &Path) -> io::Result<()> {
    if cfg!(unix) { File::open(folder)?.sync_all() } else { Ok(()) }
}

fn write_error(path: &Path, source: io::Error) -> PrepareError {
    PrepareError::Write { path: path.to_owned(), source }
}

/// The pass over the documents.
struct Encoder<'a> {
    corpus: &'a Corpus,
    documents: Documents<'a>,
    tokenizer: &'a TextTokenizer,
    folder: &'a Path,
    options: &'a PrepareOptions,
    train: SplitWriter,
    validation: SplitWriter,
    progress: &'a mut dyn FnMut(PrepareProgress),
}

impl<'a> Encoder<'a> {
    fn new(
        corpus: &'a Corpus,
        tokenizer: &'a TextTokenizer,
        folder: &'a Path,
        options: &'a PrepareOptions,
        progress: &'a mut dyn FnMut(PrepareProgress),
    ) -> Self {
        let width = token_width_bytes(tokenizer.vocabulary_size() as u64);
        let writer = |split: Split| SplitWriter::new(folder, split.to_string(), width, options.shard_tokens_max);
        let (train, validation) = (writer(Split::Train), writer(Split::Validation));
        Self { corpus, documents: corpus.documents(), tokenizer, folder, options, train, validation, progress }
    }

    /// Encodes every document; whether one had to be cut for validation.
    fn run(&mut self) -> Result<bool, PrepareError> {
        let first = self.read_batch();
        let next = self.read_batch();
        let (batch, document_was_cut) =
            if next.is_empty() { split_all(first, self.options)? } else { (split_head(first, self.options), false) };
        self.write_batch(&batch)?;
        drop(batch);
        let mut texts = next;
        while !texts.is_empty() {
            let batch: Vec<_> = texts.into_iter().map(|text| (split_of(&text, self.options), text)).collect();
            self.write_batch(&batch)?;
            texts = self.read_batch();
        }
        Ok(document_was_cut)
    }

    fn finish(self) -> Result<(crate::manifest::SplitEntry, crate::manifest::SplitEntry, CorpusReport), PrepareError> {
        let report = self.documents.into_report();
        if report.documents == 0 {
            return Err(self.corpus.no_text(report).into());
        }
        let failed = |source| write_error(self.folder, source);
        Ok((self.train.finish().map_err(failed)?, self.validation.finish().map_err(failed)?, report))
    }

    fn read_batch(&mut self) -> Vec<String> {
        let (mut texts, mut bytes) = (Vec::new(), 0);
        while bytes < BATCH_BYTES {
            let Some(text) = self.documents.next() else { break };
            bytes += text.len();
            texts.push(text);
        }
        texts
    }

    fn write_batch(&mut self, batch: &[(Split, String)]) -> Result<(), PrepareError> {
        let encode = |(_, text): &(Split, String)| {
            let mut tokens = self.tokenizer.encode(text)?;
            tokens.push(self.tokenizer.end_of_text());
            Ok(tokens)
        };
        let encoded: Vec<Vec<u32>> = batch.par_iter().map(encode).collect::<Result<_, TokenizerError>>()?;
        for ((split, text), tokens) in batch.iter().zip(&encoded) {
            let writer = match split {
                Split::Train => &mut self.train,
                Split::Validation => &mut self.validation,
            };
            writer.write_document(tokens, text.len() as u64).map_err(|source| write_error(self.folder, source))?;
        }
        (self.progress)(PrepareProgress::Encoding {
            file_bytes: self.documents.report().file_bytes,
            file_bytes_total: self.corpus.file_bytes(),
            documents: self.documents.report().documents,
            tokens: self.train.tokens() + self.validation.tokens(),
        });
        Ok(())
    }
}

/// A uniform number that belongs to a document's content and the seed.
fn split_rank(text: &str, seed: u64) -> u64 {
    let hash = ContentHash::of(text.as_bytes()).0;
    let mut low = [0; 8];
    low.copy_from_slice(&hash[..8]);
    base::random::mix64(u64::from_le_bytes(low) ^ base::random::mix64(seed))
}

/// The split of a document in a corpus of many.
fn split_of(text: &str, options: &PrepareOptions) -> Split {
    let threshold = options.validation_fraction * 2f64.powi(64);
    if (split_rank(text, options.split_seed) as f64) < threshold { Split::Validation } else { Split::Train }
}

/// Splits the first batch of a longer corpus, so that each side has a document whatever follows.
fn split_head(texts: Vec<String>, options: &PrepareOptions) -> Vec<(Split, String)> {
    let mut batch: Vec<_> = texts.into_iter().map(|text| (split_of(&text, options), text)).collect();
    let rank = |(_, text): &(Split, String)| split_rank(text, options.split_seed);
    if batch.iter().all(|(split, _)| *split == Split::Train) {
        batch.iter_mut().min_by_key(|item| rank(item)).into_iter().for_each(|item| item.0 = Split::Validation);
    } else if batch.iter().all(|(split, _)| *split == Split::Validation) {
        batch.iter_mut().max_by_key(|item| rank(item)).into_iter().for_each(|item| item.0 = Split::Train);
    }
    batch
}

/// Splits a corpus that fits in one batch. Documents are held out in the order of their ranks until the fraction
/// is reached; where there are too few for that, the end of the longest one is held out instead.
fn split_all(texts: Vec<String>, options: &PrepareOptions) -> Result<(Vec<(Split, String)>, bool), PrepareError> {
    let total: usize = texts.iter().map(String::len).sum();
    let wanted = ((total as f64 * options.validation_fraction) as usize).max(1);
    if (texts.len() as f64) * options.validation_fraction < 1.0 {
        return split_few(texts, wanted).map(|batch| (batch, true));
    }
    let mut ranks: Vec<_> = (0..texts.len()).map(|at| (split_rank(&texts[at], options.split_seed), at)).collect();
    ranks.sort_unstable();
    let mut batch: Vec<_> = texts.into_iter().map(|text| (Split::Train, text)).collect();
    let (mut held_out, train_documents_min) = (0, 1);
    for (_, at) in ranks.iter().take(batch.len() - train_documents_min) {
        if held_out >= wanted {
            break;
        }
        batch[*at].0 = Split::Validation;
        held_out += batch[*at].1.len();
    }
    Ok((batch, false))
}

/// Cuts about `wanted` bytes (at most half) off the end of the longest document, at a line where there is one.
fn split_few(texts: Vec<String>, wanted: usize) -> Result<Vec<(Split, String)>, PrepareError> {
    let total: usize = texts.iter().map(String::len).sum();
    let Some(longest) = (0..texts.len()).max_by_key(|at| texts[*at].len()) else { return Ok(Vec::new()) };
    let mut batch: Vec<_> = texts.into_iter().map(|text| (Split::Train, text)).collect();
    let text = &mut batch[longest].1;
    let keep = text.len() - wanted.min(text.len() / 2);
    let cut = cut_at_line(text, keep);
    // A line as long as the rest leaves nothing in front of it: cut within the line then.
    let cut = if cut == text.len() || cut == 0 { text.floor_char_boundary(text.len() - 1) } else { cut };
    if cut == 0 {
        return Err(PrepareError::TooLittle(total as u64));
    }
    let tail = text.split_off(cut);
    batch.insert(longest + 1, (Split::Validation, tail));
    Ok(batch)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(count: usize) -> Vec<String> {
        (0..count).map(|i| format!("document number {i}\n")).collect()
    }

    fn held_out(batch: &[(Split, String)]) -> usize {
        batch.iter().filter(|(split, _)| *split == Split::Validation).count()
    }

    #[test]
    fn the_split_follows_content_and_seed() {
        let options = PrepareOptions::default();
        let splits = |seed| {
            let options = PrepareOptions { split_seed: seed, ..options.clone() };
            texts(10_000).iter().map(|text| split_of(text, &options)).collect::<Vec<_>>()
        };
        let validation = splits(1).iter().filter(|split| **split == Split::Validation).count();
        // 500 expected with a standard deviation of 22; five of them.
        assert!((390..=610).contains(&validation), "{validation}");
        assert_eq!(splits(1), splits(1));
        assert_ne!(splits(1), splits(2));
    }

    #[test]
    fn the_first_batch_of_many_has_both_splits() {
        for fraction in [1e-12, 0.5] {
            let options = PrepareOptions { validation_fraction: fraction, ..PrepareOptions::default() };
            for count in [2, 3, 10] {
                let validation = held_out(&split_head(texts(count), &options));
                assert!(validation > 0 && validation < count, "{fraction}: {validation} of {count}");
            }
        }
    }

    #[test]
    fn small_corpora_hold_out_close_to_the_fraction() {
        let options = PrepareOptions { validation_fraction: 0.1, ..PrepareOptions::default() };
        let (batch, cut) = split_all(texts(200), &options).unwrap();
        assert!((20..=21).contains(&held_out(&batch)) && !cut);
        let (batch, cut) = split_all(texts(9), &options).unwrap();
        assert_eq!((batch.len(), held_out(&batch), cut), (10, 1, true));
        assert_eq!(split_all(Vec::new(), &options).unwrap().0, []);
    }
}
