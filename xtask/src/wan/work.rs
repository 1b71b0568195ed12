//! The work that all systems do: the same model, text, tokens and held-out windows.
//!
//! The peers take the texts as one string of bytes, train on the first 95 % and predict windows of the rest. Beringia cuts a
//! corpus at documents, so it is given the same bytes as documents of such lengths that its own rule holds out the same
//! end: too few for holding out whole ones, the last one the longest, so that its end is cut off. Its tokenizer has a token
//! for each byte with the byte's number, and as many unused ones as the peers' model has rows. The loss of every system
//! is measured on one file, the windows that the peers' own `evaluate` predicts.

use crate::runs::Failure;
use serde_json::{Map, Value, json};
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Samples in an inner step over both sites: 4 each, as the peers' `--bs 4`.
pub(crate) const BATCH_SAMPLES: u64 = 8;
/// Sites of every run.
pub(crate) const SITES: usize = 2;
/// T of the peers' `model.py`.
pub(crate) const SEQUENCE_LENGTH: usize = 256;
/// V of the peers' `model.py`.
const VOCABULARY: usize = 512;
/// Of AdamW, constant.
const LEARNING_RATE: &str = "1e-3";

/// Longest document, bytes: Beringia cuts longer ones (1 MiB).
const DOCUMENT_BYTES_MAX: usize = 1 << 20;
/// Longest corpus, bytes: above 8 MiB Beringia holds out whole documents, and the end of one cannot hold 5 % of it.
const TEXT_BYTES_MAX: usize = 8 << 20;
/// Shortest text, bytes: 5 % of it hold 64 windows.
const TEXT_BYTES_MIN: usize = 400_000;
/// The cut falls at a line's end before 95 %: by how many tokens the two may differ, ends of documents included.
const CUT_TOKENS_MAX: u64 = 4_096;
/// Windows of the peers' `evaluate`.
const VALIDATION_WINDOWS: usize = 64;

/// End of the names of texts that the peers read.
const TEXT_SUFFIX: &str = "_gut.txt";

/// A model of the peers' `model.py`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Size {
    /// As the peers' `--size` takes it.
    pub(crate) name: &'static str,
    hidden_size: usize,
    layers: usize,
    heads: usize,
}

/// CFG of the peers' `model.py`.
pub(crate) const SIZES: [Size; 2] = [
    Size { name: "5M", hidden_size: 256, layers: 6, heads: 8 },
    Size { name: "20M", hidden_size: 512, layers: 6, heads: 8 },
];

impl Size {
    /// The one of that name.
    pub(crate) fn named(name: &str) -> Result<Self, String> {
        let names = SIZES.map(|size| size.name).join(", ");
        SIZES
            .into_iter()
            .find(|size| size.name == name)
            .ok_or_else(|| format!("no size '{name}'\nhint: one of {names}"))
    }

    /// ⌊8d/3⌋ down to a multiple of 32, as the peers compute it.
    fn intermediate_size(self) -> usize {
        self.hidden_size * 8 / 3 / 32 * 32
    }

    /// Parameters by the formula of the model: embedding and head apart, four square matrices and three of the feed-forward
    /// layer a block, two norms a block and one at the end.
    pub(crate) fn parameters(self) -> usize {
        let (d, f) = (self.hidden_size, self.intermediate_size());
        2 * VOCABULARY * d + self.layers * (4 * d * d + 3 * d * f + 2 * d) + d
    }

    /// Settings of a run with the peers' model, optimiser and batch. `tokens` bounds nothing but the schedule, which is flat.
    pub(crate) fn settings(self, seed: u64, steps: u64) -> Vec<String> {
        let model = [
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size()),
            ("num_hidden_layers", self.layers),
            ("num_attention_heads", self.heads),
            ("num_key_value_heads", self.heads),
            ("max_position_embeddings", SEQUENCE_LENGTH),
        ];
        let mut settings: Vec<String> = model.iter().map(|(key, value)| format!("model.{key}={value}")).collect();
        let micro_batch = BATCH_SAMPLES / SITES as u64;
        settings.extend([
            "model.tie_word_embeddings=false".to_owned(),
            "model.rope_theta=10000.0".to_owned(),
            "model.rms_norm_eps=1e-5".to_owned(),
            format!("run.seed={seed}"),
            format!("data.sequence_length={SEQUENCE_LENGTH}"),
            format!("train.batch_samples={BATCH_SAMPLES}"),
            format!("train.micro_batch_samples={micro_batch}"),
            format!("train.steps={steps}"),
            format!("train.learning_rate={LEARNING_RATE}"),
            "train.warmup_steps=0".to_owned(),
            "train.learning_rate_final_fraction=1.0".to_owned(),
            "train.beta1=0.9".to_owned(),
            "train.beta2=0.95".to_owned(),
            "train.epsilon=1e-8".to_owned(),
            "train.weight_decay=0.1".to_owned(),
            "train.gradient_clip_norm=0.0".to_owned(),
            format!("sync.sites={SITES}"),
            "sync.shares=[1.0, 1.0]".to_owned(),
            "sync.deadline_seconds=600.0".to_owned(),
            // Neither validates nor saves while it trains, as the peers do not; the end is measured by `beringia eval`.
            "evaluate.every_rounds=1000000000".to_owned(),
            "evaluate.samples_max=1".to_owned(),
            "evaluate.sample_tokens=0".to_owned(),
            "checkpoint.every_rounds=1000000000".to_owned(),
        ]);
        settings
    }
}

/// Files of the work, in one folder.
#[derive(Debug, Clone)]
pub(crate) struct Work {
    /// One text that the peers read: their `PEERS_TEXTS`.
    pub(crate) peer_texts: PathBuf,
    /// The same bytes as documents for `beringia init --data`.
    pub(crate) documents: PathBuf,
    /// For `beringia init --tokenizer`.
    pub(crate) tokenizer: PathBuf,
    /// What every system is measured on.
    pub(crate) validation: PathBuf,
    /// Bytes to train on.
    pub(crate) train_bytes: u64,
}

impl Work {
    /// Writes everything from the texts in `texts`.
    ///
    /// # Errors
    /// Too little or too much text, or a folder that cannot be written.
    pub(crate) fn prepare(texts: &Path, folder: &Path) -> Result<Self, Failure> {
        let text = read_texts(texts)?;
        if !(TEXT_BYTES_MIN..=TEXT_BYTES_MAX).contains(&text.len()) {
            let (place, bytes) = (texts.display(), text.len());
            return Err(format!(
                "{place} has {bytes} bytes of text, {TEXT_BYTES_MIN} to {TEXT_BYTES_MAX} are compared\nhint: --texts FOLDER"
            )
            .into());
        }
        let work = Self {
            peer_texts: folder.join("peer-texts"),
            documents: folder.join("documents"),
            tokenizer: folder.join("tokenizer.json"),
            validation: folder.join("validation.txt"),
            train_bytes: train_bytes(text.len()) as u64,
        };
        fs::create_dir_all(&work.peer_texts)?;
        fs::create_dir_all(&work.documents)?;
        fs::write(work.peer_texts.join(format!("all{TEXT_SUFFIX}")), &text)?;
        for (number, range) in documents(text.len()).into_iter().enumerate() {
            fs::write(work.documents.join(format!("{number:02}.txt")), &text[range])?;
        }
        fs::write(&work.tokenizer, tokenizer().to_string())?;
        fs::write(&work.validation, validation_text(&text[train_bytes(text.len())..]))?;
        Ok(work)
    }

    /// Whether `beringia init` made the peers' model and held out what they hold out.
    ///
    /// # Errors
    /// What differs.
    pub(crate) fn check(&self, size: Size, init: &Value) -> Result<(), String> {
        let count = |key: &str| init[key].as_u64().ok_or_else(|| format!("init names no {key}"));
        let (parameters, tokens) = (count("parameters")?, count("train_tokens")?);
        if parameters != size.parameters() as u64 {
            return Err(format!("beringia's model has {parameters} parameters, the peers' {}", size.parameters()));
        }
        if tokens.abs_diff(self.train_bytes) > CUT_TOKENS_MAX {
            return Err(format!("beringia trains on {tokens} tokens, the peers on {}", self.train_bytes));
        }
        Ok(())
    }
}

/// All texts of a folder in the order of their names, as the peers read them. What is not ASCII becomes `?`, so that windows may be
/// cut anywhere.
fn read_texts(folder: &Path) -> Result<Vec<u8>, Failure> {
    let listed = fs::read_dir(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let mut paths: Vec<PathBuf> = listed.map(|entry| entry.map(|entry| entry.path())).collect::<Result<_, _>>()?;
    paths.retain(|path| path.file_name().is_some_and(|name| name.to_string_lossy().ends_with(TEXT_SUFFIX)));
    paths.sort();
    let mut text = Vec::new();
    for path in paths {
        text.extend(fs::read(&path)?.into_iter().map(|byte| if byte.is_ascii() && byte != 0 { byte } else { b'?' }));
    }
    Ok(text)
}

/// Bytes that are not held out: `int(len * .95)`.
fn train_bytes(length: usize) -> usize {
    (length as f64 * 0.95) as usize
}

/// Cuts a text into documents, the last one the longest.
fn documents(length: usize) -> Vec<Range<usize>> {
    // Six tenths of a short text; of a long one as much as a document holds.
    let last = (length * 6 / 10).min(DOCUMENT_BYTES_MAX - 1);
    let rest = length - last;
    // Each at most 15/16 of the last one.
    let count = rest.div_ceil(last / 16 * 15).max(1);
    let start = |number: usize| rest * number / count;
    (0..count).map(|number| start(number)..start(number + 1)).chain(std::iter::once(rest..length)).collect()
}

/// The windows that the peers' `evaluate` predicts: of k = ⌊(n - 1) / T⌋ windows those with the numbers
/// `linspace(0, k - 1, 64)`, one after the other, behind one byte of context. Each window's first byte is then predicted from
/// the last byte of the window before; the file is the same for all systems.
fn validation_text(held_out: &[u8]) -> Vec<u8> {
    let available = (held_out.len() - 1) / SEQUENCE_LENGTH;
    let mut text = vec![held_out[0]];
    for window in 0..VALIDATION_WINDOWS {
        let number = window * (available - 1) / (VALIDATION_WINDOWS - 1);
        let start = number * SEQUENCE_LENGTH;
        text.extend_from_slice(&held_out[start + 1..=start + SEQUENCE_LENGTH]);
    }
    text
}

/// A byte-level tokenizer without merges, whose token ids are the bytes.
fn tokenizer() -> Value {
    let mut vocabulary = Map::new();
    for byte in 0..=u8::MAX {
        vocabulary.insert(byte_character(byte).to_string(), json!(byte));
    }
    for unused in 257..VOCABULARY {
        vocabulary.insert(format!("<unused{unused}>"), json!(unused));
    }
    let end_of_text = "<|endoftext|>";
    vocabulary.insert(end_of_text.to_owned(), json!(256));
    let bytes = json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true });
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
        "added_tokens": [{
            "id": 256, "content": end_of_text, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true,
        }],
        "pre_tokenizer": bytes, "decoder": bytes,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocabulary, "merges": [],
        },
    })
}

/// The character that stands for a byte in GPT-2's byte-level vocabularies: itself where it is printable, else the next free
/// one from U+0100 on.
fn byte_character(byte: u8) -> char {
    let is_printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    if is_printable(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|other| !is_printable(*other)).count() as u32;
    char::from_u32(0x100 + before).unwrap_or_else(|| unreachable!("at most 68 bytes are not printable"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_models_have_the_peers_counts() {
        // As the peers' `solo.py` prints them.
        assert_eq!(SIZES.map(Size::parameters), [4_934_912, 19_208_704]);
        assert!(Size::named("5M").is_ok() && Size::named("5m").is_err());
    }

    #[test]
    fn documents_cover_the_text_and_the_last_is_the_longest() {
        for length in [TEXT_BYTES_MIN, 1_000_000, 1_747_626, 5_057_198, TEXT_BYTES_MAX] {
            let ranges = documents(length);
            assert_eq!((ranges[0].start, ranges[ranges.len() - 1].end), (0, length));
            assert!(ranges.windows(2).all(|pair| pair[0].end == pair[1].start));
            let (last, rest) = ranges.split_last().unwrap();
            assert!(last.len() < DOCUMENT_BYTES_MAX && rest.iter().all(|range| range.len() < last.len()), "{ranges:?}");
            // Fewer than 20 documents: Beringia holds out no whole one. Half of the last holds 5 % of all.
            assert!(ranges.len() < 20 && (length - train_bytes(length)) * 2 < last.len(), "{length}: {ranges:?}");
        }
    }

    #[test]
    fn validation_is_what_the_peers_predict() {
        let held_out: Vec<u8> = (0..1000 * SEQUENCE_LENGTH + 1).map(|at| (at / SEQUENCE_LENGTH) as u8).collect();
        let text = validation_text(&held_out);
        assert_eq!(text.len(), VALIDATION_WINDOWS * SEQUENCE_LENGTH + 1);
        // Windows 0, 15, 31 (of 15.857 a piece, rounded down) and the last one.
        let first_of = |window: usize| usize::from(text[1 + window * SEQUENCE_LENGTH]);
        assert_eq!([0, 1, 2, 63].map(first_of), [0, 15, 31, 999 % 256]);
    }

    #[test]
    fn tokens_are_bytes() {
        let tokenizer = tokenizer();
        let vocabulary = tokenizer["model"]["vocab"].as_object().unwrap();
        assert_eq!(vocabulary.len(), VOCABULARY);
        // As in GPT-2's table: a space is U+0120, a line feed U+010A, the byte 0xAD U+0143.
        for (character, byte) in [("a", 97), ("\u{120}", 32), ("\u{10a}", 10), ("\u{143}", 0xad), ("ÿ", 255)] {
            assert_eq!(vocabulary[character], byte);
        }
    }

    #[test]
    fn a_model_or_split_that_differs_is_refused() {
        let work = Work {
            peer_texts: PathBuf::new(),
            documents: PathBuf::new(),
            tokenizer: PathBuf::new(),
            validation: PathBuf::new(),
            train_bytes: 1_000_000,
        };
        let check = |parameters: u64, tokens: u64| {
            work.check(SIZES[0], &json!({ "parameters": parameters, "train_tokens": tokens }))
        };
        assert_eq!(check(4_934_912, 999_900), Ok(()));
        assert!(check(4_934_913, 1_000_000).is_err() && check(4_934_912, 1_010_000).is_err());
    }
}
