//! Text to tokens and back.
//!
//! Either a byte-level BPE (Sennrich, Haddow, Birch 2016, arXiv 1508.07909, over bytes as in GPT-2) trained on
//! the corpus, or any Hugging Face `tokenizer.json`. The merging itself is the `tokenizers` crate's; this file
//! fixes what a run depends on: which sample it is trained on, which token ends a text, how many bytes a token
//! stands for, and the content hash by which two sites know that they hold the same tokenizer.

use crate::corpus::{Corpus, CorpusError};
use crate::documents::cut_at_line;
use base::{ContentHash, Hint};
use std::collections::HashMap;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use tokenizers::decoders::byte_level::ByteLevel as ByteLevelDecoder;
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer};

/// The token between documents in a tokenizer trained here.
pub const END_OF_TEXT: &str = "<|endoftext|>";

/// Names of the end-of-text token in other tokenizers, the likeliest first.
const END_OF_TEXT_NAMES: [&str; 6] =
    [END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<｜end▁of▁sentence｜>"];

/// Text that a tokenizer is trained on, bytes. Merges are ranked by pair counts, which settle long before; pair
/// counting holds each distinct word once, so 16 MiB of text stay within a few hundred MB.
pub const TRAINING_SAMPLE_BYTES_MAX: u64 = 16 << 20;

/// Smallest vocabulary that can be trained: 256 bytes and the end-of-text token.
pub const VOCABULARY_SIZE_MIN: usize = 257;

/// Largest vocabulary, the bound of `base::ModelShape`.
pub const VOCABULARY_SIZE_MAX: usize = 1 << 24;

/// Largest `tokenizer.json` read: the vocabularies in use (256,000 tokens with merges) take some 35 MB.
pub const TOKENIZER_JSON_BYTES_MAX: u64 = 256 << 20;

/// Text that training looks at in one piece, bytes: the pre-tokenizer takes some 50 times that.
const SEGMENT_BYTES: usize = 32 * 1024;

/// Longest piece of text whose tokens are remembered, bytes: nearly all words with what follows them are shorter.
const WORD_BYTES_MAX: usize = 64;

/// Pieces remembered by one encoding thread: at some 150 bytes each, 10 MB. Then it forgets all and begins anew.
const WORDS_REMEMBERED_MAX: usize = 1 << 16;

/// A tokenizer and its content hash.
pub struct TextTokenizer {
    tokenizer: Tokenizer,
    json: Vec<u8>,
    hash: ContentHash,
    end_of_text: u32,
    /// UTF-8 bytes by token id.
    token_bytes: Vec<u32>,
    cuts_at_spaces: bool,
    /// Remembered words that no thread is using: at most as many as there have been encoding threads at once.
    words: Mutex<Vec<Words>>,
}

/// Tokens of short pieces of text. A piece between two cuts always has the same tokens, and text repeats its words.
type Words = HashMap<Box<str>, Box<[u32]>>;

/// Where the tokenizer of a new run comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TokenizerSource {
    /// Trained on the corpus, with at most so many tokens.
    Train {
        /// Tokens, the 256 bytes and the end-of-text token among them.
        vocabulary_size: usize,
    },
    /// A `tokenizer.json`.
    Load(PathBuf),
}

/// Why there is no tokenizer, or it failed on a text.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TokenizerError {
    /// The file cannot be read or written.
    #[error("tokenizer {}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The content is not a tokenizer that can be used.
    #[error("tokenizer: {0}")]
    Format(String),
    /// No token that ends a text.
    #[error("tokenizer: none of its {vocabulary_size} tokens is a known end of text ({})", END_OF_TEXT_NAMES.join(", "))]
    NoEndOfText {
        /// Its number of tokens.
        vocabulary_size: usize,
    },
    /// A vocabulary that cannot be trained.
    #[error("a vocabulary of {0} tokens is outside {VOCABULARY_SIZE_MIN}..={VOCABULARY_SIZE_MAX}")]
    VocabularySize(usize),
    /// There is nothing to train on.
    #[error(transparent)]
    Corpus(#[from] CorpusError),
    /// A text that cannot be encoded, or tokens that cannot be decoded.
    #[error("tokenizer: {0}")]
    Text(String),
}

impl Hint for TokenizerError {
    fn hint(&self) -> Option<String> {
        Some(match self {
            Self::File { .. } | Self::Format(_) | Self::Text(_) => {
                "give a whole Hugging Face tokenizer.json, or leave it out and one is trained on the data".to_owned()
            }
            Self::NoEndOfText { .. } => {
                format!("add a special token named {END_OF_TEXT} to the added_tokens of tokenizer.json")
            }
            Self::VocabularySize(_) => format!("choose a vocabulary of {VOCABULARY_SIZE_MIN} tokens or more"),
            Self::Corpus(error) => return error.hint(),
        })
    }
}

impl TextTokenizer {
    /// Trains a byte-level BPE on an evenly spread sample of `corpus`. Equal corpora give equal bytes. A small
    /// corpus may give fewer than `vocabulary_size` tokens.
    ///
    /// # Errors
    /// A vocabulary size out of range; a corpus without text.
    pub fn train(corpus: &Corpus, vocabulary_size: usize) -> Result<Self, TokenizerError> {
        if !(VOCABULARY_SIZE_MIN..=VOCABULARY_SIZE_MAX).contains(&vocabulary_size) {
            return Err(TokenizerError::VocabularySize(vocabulary_size));
        }
        let sample = training_sample(corpus, TRAINING_SAMPLE_BYTES_MAX)?;
        let trainer = BpeTrainer::builder()
            .vocab_size(vocabulary_size)
            .min_frequency(2)
            .show_progress(false)
            .special_tokens(vec![AddedToken::from(END_OF_TEXT, true)])
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .build();
        let mut tokenizer = Tokenizer::new(BPE::default());
        tokenizer.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
        tokenizer.with_decoder(Some(ByteLevelDecoder::new(false, true, true)));
        let segments = sample.iter().flat_map(|text| segments(text, SEGMENT_BYTES));
        tokenizer.train(&mut TrainerWrapper::BpeTrainer(trainer), segments).map_err(|e| format_error(&e))?;
        let json = tokenizer.to_string(false).map_err(|e| format_error(&e))?;
        Self::from_bytes(json.into_bytes())
    }

    /// Reads a `tokenizer.json`.
    ///
    /// # Errors
    /// A file that cannot be read or is not a tokenizer with an end-of-text token.
    pub fn load(path: &Path) -> Result<Self, TokenizerError> {
        let read = || {
            let mut json = Vec::new();
            fs::File::open(path)?.take(TOKENIZER_JSON_BYTES_MAX + 1).read_to_end(&mut json)?;
            Ok(json)
        };
        Self::from_bytes(read().map_err(|source| TokenizerError::File { path: path.to_owned(), source })?)
    }

    /// The content of a `tokenizer.json`.
    ///
    /// # Errors
    /// As [`TextTokenizer::load`].
    pub fn from_bytes(json: Vec<u8>) -> Result<Self, TokenizerError> {
        if json.len() as u64 > TOKENIZER_JSON_BYTES_MAX {
            return Err(TokenizerError::Format(format!("longer than {TOKENIZER_JSON_BYTES_MAX} bytes")));
        }
        let settings: serde_json::Value =
            serde_json::from_slice(&json).map_err(|error| TokenizerError::Format(error.to_string()))?;
        let mut tokenizer = Tokenizer::from_bytes(&json).map_err(|e| format_error(&e))?;
        // Text is text: a document that spells out a special token must not end itself, and a length setting
        // left in the file must not drop or pad its tokens.
        tokenizer.set_encode_special_tokens(true);
        tokenizer.with_truncation(None).map_err(|e| format_error(&e))?;
        tokenizer.with_padding(None);
        let token_bytes = token_bytes(&tokenizer, &settings)?;
        let end_of_text = END_OF_TEXT_NAMES
            .iter()
            .find_map(|name| tokenizer.token_to_id(name))
            .ok_or(TokenizerError::NoEndOfText { vocabulary_size: token_bytes.len() })?;
        let hash = ContentHash::of(&json);
        let (cuts_at_spaces, words) = (cuts_at_spaces(&settings), Mutex::default());
        Ok(Self { tokenizer, json, hash, end_of_text, token_bytes, cuts_at_spaces, words })
    }

    /// The bytes of its `tokenizer.json`; their hash is [`TextTokenizer::hash`].
    pub fn json(&self) -> &[u8] {
        &self.json
    }

    /// BLAKE3 of the `tokenizer.json`.
    pub fn hash(&self) -> ContentHash {
        self.hash
    }

    /// One more than the largest token id: what a model's `vocab_size` must reach.
    pub fn vocabulary_size(&self) -> usize {
        self.token_bytes.len()
    }

    /// The token that follows every document.
    pub fn end_of_text(&self) -> u32 {
        self.end_of_text
    }

    /// UTF-8 bytes that a token stands for; 0 for special tokens and ids that are not in the vocabulary. For
    /// byte-level tokenizers the sum over a document's tokens is exactly its length.
    pub fn token_bytes(&self, token: u32) -> usize {
        self.token_bytes.get(token as usize).map_or(0, |bytes| *bytes as usize)
    }

    /// Tokens of a text, without beginning- or end-of-text tokens.
    ///
    /// # Errors
    /// The tokenizer has no token for some of the text (byte-level ones always have).
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        if !self.cuts_at_spaces {
            return self.encode_piece(text);
        }
        let pool = || self.words.lock().unwrap_or_else(PoisonError::into_inner);
        let mut words = pool().pop().unwrap_or_default();
        let mut tokens = Vec::with_capacity(text.len() / 3);
        for piece in segments(text, 1) {
            self.append_piece(piece, &mut words, &mut tokens)?;
        }
        pool().push(words);
        Ok(tokens)
    }

    fn append_piece(&self, piece: &str, words: &mut Words, tokens: &mut Vec<u32>) -> Result<(), TokenizerError> {
        if let Some(known) = words.get(piece) {
            tokens.extend_from_slice(known);
            return Ok(());
        }
        let encoded = self.encode_piece(piece)?;
        tokens.extend_from_slice(&encoded);
        if piece.len() <= WORD_BYTES_MAX {
            if words.len() == WORDS_REMEMBERED_MAX {
                words.clear();
            }
            words.insert(piece.into(), encoded.into());
        }
        Ok(())
    }

    fn encode_piece(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let encoding = self.tokenizer.encode_fast(text, false).map_err(|e| TokenizerError::Text(e.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Text of some tokens; special tokens are left out, and bytes that are not UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// The tokenizer's decoder refused.
    pub fn decode(&self, tokens: &[u32]) -> Result<String, TokenizerError> {
        self.tokenizer.decode(tokens, true).map_err(|e| TokenizerError::Text(e.to_string()))
    }
}

fn format_error(error: &tokenizers::Error) -> TokenizerError {
    TokenizerError::Format(error.to_string())
}

/// Text of at most `bytes_max`, taken from every file in proportion to its length on disk: as files are passed,
/// the sample grows to the same fraction of its bound. From a document that is too long for what is due, the
/// middle is taken: beginnings are licences and headings.
fn training_sample(corpus: &Corpus, bytes_max: u64) -> Result<Vec<String>, TokenizerError> {
    let (mut sample, mut taken, mut passed) = (Vec::new(), 0, 0);
    let file_bytes = corpus.file_bytes().max(1);
    let mut report = Default::default();
    for file in corpus.files() {
        passed += file.bytes;
        let due = (u128::from(bytes_max) * u128::from(passed) / u128::from(file_bytes)) as u64;
        let mut documents = crate::documents::Documents::new(std::slice::from_ref(file));
        while taken < due {
            let Some(text) = documents.next() else { break };
            let piece = middle(&text, (due - taken) as usize);
            taken += piece.len() as u64;
            sample.push(piece.to_owned());
            if piece.len() < text.len() {
                break;
            }
        }
        add_report(&mut report, documents.into_report());
    }
    if sample.iter().all(String::is_empty) { Err(corpus.no_text(report).into()) } else { Ok(sample) }
}

/// Adds what one file met, for the message when there was no text at all.
fn add_report(sum: &mut crate::documents::CorpusReport, of_file: crate::documents::CorpusReport) {
    sum.files += of_file.files;
    sum.file_bytes += of_file.file_bytes;
    sum.documents += of_file.documents;
    sum.document_bytes += of_file.document_bytes;
    sum.binary_files += of_file.binary_files;
    sum.warnings += of_file.warnings;
    let room = |kept: usize| crate::documents::WARNINGS_KEPT_MAX.saturating_sub(kept);
    sum.binary_names.extend(of_file.binary_names.into_iter().take(room(sum.binary_names.len())));
    sum.warnings_kept.extend(of_file.warnings_kept.into_iter().take(room(sum.warnings_kept.len())));
}

/// At most `bytes_max` bytes from the middle of `text`.
fn middle(text: &str, bytes_max: usize) -> &str {
    let start = text.ceil_char_boundary(text.len().saturating_sub(bytes_max) / 2);
    let rest = &text[start..];
    &rest[..if rest.len() > bytes_max { cut_at_line(rest, bytes_max) } else { rest.len() }]
}

/// Cuts a text into pieces of at least `bytes_min`, only before a single space between two ASCII words.
fn segments(text: &str, bytes_min: usize) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let (segment, after) = rest.split_at(segment_end(rest, bytes_min));
        rest = after;
        (!segment.is_empty()).then_some(segment)
    })
}

/// `bytes_min` is at least 1.
fn segment_end(text: &str, bytes_min: usize) -> usize {
    let bytes = text.as_bytes();
    let is_cut =
        |at: &usize| bytes[*at] == b' ' && bytes[at - 1].is_ascii_alphanumeric() && bytes[at + 1].is_ascii_alphabetic();
    (bytes_min..bytes.len().saturating_sub(1)).find(is_cut).unwrap_or(bytes.len())
}

/// Whether cutting before a space between two words leaves every token as it is: there is no normaliser, no
/// added token spans such a cut, and a word takes at most the one space before it. So it is with the patterns of GPT-2, GPT-4, Llama 3 and Qwen
/// (all of which contain the look-ahead below); not with SentencePiece's models, whose tokens may span spaces.
fn cuts_at_spaces(settings: &serde_json::Value) -> bool {
    let is_word_split = |step: &serde_json::Value| match step["type"].as_str() {
        Some("ByteLevel") => step["use_regex"].as_bool() != Some(false),
        Some("Split") => step["pattern"]["Regex"].as_str().is_some_and(|regex| regex.contains(r"\s+(?!\S)")),
        _ => false,
    };
    let added = settings["added_tokens"].as_array();
    let is_cut_in_two = |token: &serde_json::Value| segments(token["content"].as_str().unwrap_or(""), 1).count() > 1;
    let pre_tokenizer = &settings["pre_tokenizer"];
    let steps = pre_tokenizer["pretokenizers"].as_array();
    settings["normalizer"].is_null()
        && !added.is_some_and(|tokens| tokens.iter().any(is_cut_in_two))
        && (is_word_split(pre_tokenizer) || steps.is_some_and(|steps| steps.iter().any(is_word_split)))
}

/// UTF-8 bytes of every token, by id.
fn token_bytes(tokenizer: &Tokenizer, settings: &serde_json::Value) -> Result<Vec<u32>, TokenizerError> {
    let vocabulary = tokenizer.get_vocab(true);
    let size = vocabulary.values().max().map_or(0, |id| *id as usize + 1);
    if !(2..=VOCABULARY_SIZE_MAX).contains(&size) {
        return Err(TokenizerError::Format(format!(
            "a vocabulary of {size} tokens is outside 2..={VOCABULARY_SIZE_MAX}"
        )));
    }
    let byte_level = is_byte_level(&settings["decoder"]);
    let added = tokenizer.get_added_tokens_decoder();
    let mut bytes = vec![0; size];
    for (token, id) in vocabulary {
        bytes[id as usize] = match added.get(&id) {
            Some(token) if token.special => 0,
            Some(token) => token.content.len() as u32,
            None if byte_level => token.chars().count() as u32,
            None => plain_token_bytes(&token),
        };
    }
    Ok(bytes)
}

/// Whether one character of a token stands for one byte of text (GPT-2's alphabet).
fn is_byte_level(decoder: &serde_json::Value) -> bool {
    let steps = decoder["decoders"].as_array();
    decoder["type"] == "ByteLevel" || steps.is_some_and(|steps| steps.iter().any(is_byte_level))
}

/// SentencePiece's spelling: `<0x0A>` is one byte, `▁` a space, anything else itself.
fn plain_token_bytes(token: &str) -> u32 {
    if token.len() == 6 && token.starts_with("<0x") && token.ends_with('>') {
        return 1;
    }
    token.replace('▁', " ").len() as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn corpus_of(texts: &[&str]) -> (tempfile::TempDir, Corpus) {
        let folder = tempfile::tempdir().unwrap();
        for (index, text) in texts.iter().enumerate() {
            fs::write(folder.path().join(format!("{index:03}.txt")), text).unwrap();
        }
        let corpus = Corpus::folder(folder.path()).unwrap();
        (folder, corpus)
    }

    const TEXT: &str =
        "To be, or not to be, that is the question:\n\n\tWhether 'tis nobler  in the mind — naïve 日本語\r\n";

    fn trained() -> TextTokenizer {
        let text = TEXT.repeat(50);
        let (_folder, corpus) = corpus_of(&[&text, include_str!("tokenizer.rs")]);
        TextTokenizer::train(&corpus, 500).unwrap()
    }

    #[test]
    fn training_repeats_and_every_text_comes_back() {
        let tokenizer = trained();
        assert_eq!(tokenizer.vocabulary_size(), 500);
        assert_eq!(tokenizer.hash(), trained().hash());
        for text in [TEXT, "unseen: \u{1f600} \u{7} \u{0301}", " ", "<|endoftext|> is only text"] {
            let tokens = tokenizer.encode(text).unwrap();
            assert_eq!(tokenizer.decode(&tokens).unwrap(), text);
            assert_eq!(tokens.iter().map(|t| tokenizer.token_bytes(*t)).sum::<usize>(), text.len());
            assert!(!tokens.contains(&tokenizer.end_of_text()), "{text}");
        }
        assert_eq!(tokenizer.token_bytes(tokenizer.end_of_text()), 0);
        assert_eq!(tokenizer.token_bytes(u32::MAX), 0);
        assert!(tokenizer.encode(TEXT).unwrap().len() * 2 < TEXT.len());
    }

    #[test]
    fn segments_change_no_token() {
        let tokenizer = trained();
        assert!(tokenizer.cuts_at_spaces);
        let numbered: String = (0..WORDS_REMEMBERED_MAX + 1_000).map(|i| format!("word {i} w{i} ")).collect();
        let text = format!("{}{}{numbered}", TEXT.repeat(100), include_str!("tokenizer.rs"));
        assert!(segments(&text, SEGMENT_BYTES).count() > 2 && segments(&text, 1).count() > WORDS_REMEMBERED_MAX);
        assert_eq!(segments(&text, 1).collect::<String>(), text);
        let whole = tokenizer.tokenizer.encode_fast(text.as_str(), false).unwrap();
        for _ in 0..2 {
            assert!(tokenizer.encode(&text).unwrap() == whole.get_ids(), "also with what the first time remembered");
        }
    }

    #[test]
    fn only_patterns_that_split_words_are_cut() {
        let gpt4 = serde_json::json!({ "type": "Split", "pattern": { "Regex": r"\p{L}+|\s+(?!\S)|\s+" } });
        let bytes = serde_json::json!({ "type": "ByteLevel", "use_regex": false });
        let cuts = |value: serde_json::Value| cuts_at_spaces(&value);
        let sequence = serde_json::json!({ "type": "Sequence", "pretokenizers": [gpt4, bytes] });
        assert!(cuts(serde_json::json!({ "pre_tokenizer": sequence })));
        assert!(!cuts(serde_json::json!({ "pre_tokenizer": sequence, "normalizer": { "type": "Lowercase" } })));
        assert!(!cuts(serde_json::json!({ "pre_tokenizer": sequence, "added_tokens": [{ "content": "New York" }] })));
        assert!(!cuts(serde_json::json!({ "pre_tokenizer": bytes })));
        assert!(!cuts(serde_json::json!({ "pre_tokenizer": { "type": "Metaspace" } })));
        assert!(!cuts(serde_json::json!({ "pre_tokenizer": null })));
    }

    #[test]
    fn saved_and_loaded_is_the_same() {
        let tokenizer = trained();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        fs::write(&path, tokenizer.json()).unwrap();
        let loaded = TextTokenizer::load(&path).unwrap();
        assert_eq!(loaded.hash(), tokenizer.hash());
        assert_eq!(loaded.encode(TEXT).unwrap(), tokenizer.encode(TEXT).unwrap());
        fs::write(&path, &tokenizer.json()[..1000]).unwrap();
        let error = TextTokenizer::load(&path).err().unwrap();
        assert!(matches!(error, TokenizerError::Format(_)) && error.hint().is_some(), "{error}");
    }

    fn word_level(end_of_text: &str) -> Vec<u8> {
        let json = serde_json::json!({
            "version": "1.0", "truncation": { "direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0 },
            "padding": null, "normalizer": null, "post_processor": null,
            "added_tokens": [{ "id": 3, "content": end_of_text, "single_word": false, "lstrip": false,
                               "rstrip": false, "normalized": false, "special": true }],
            "pre_tokenizer": { "type": "Whitespace" }, "decoder": null,
            "model": { "type": "WordLevel", "vocab": { "be": 0, "▁to": 1, "<0x0A>": 2, end_of_text: 3 }, "unk_token": "be" },
        });
        serde_json::to_vec(&json).unwrap()
    }

    #[test]
    fn foreign_tokenizers_by_their_own_rules() {
        let tokenizer = TextTokenizer::from_bytes(word_level("</s>")).unwrap();
        assert_eq!(tokenizer.end_of_text(), 3);
        let bytes: Vec<_> = (0..4).map(|id| tokenizer.token_bytes(id)).collect();
        assert_eq!(bytes, [2, 3, 1, 0]);
        assert!(!tokenizer.cuts_at_spaces);
        assert_eq!(tokenizer.encode("be be be").unwrap(), [0, 0, 0], "the file's truncation is turned off");
        let error = TextTokenizer::from_bytes(word_level("[SEP]")).err().unwrap();
        assert!(matches!(error, TokenizerError::NoEndOfText { vocabulary_size: 4 }), "{error}");
        assert!(error.hint().unwrap().contains(END_OF_TEXT));
    }

    #[test]
    fn sizes_and_empty_corpora_are_refused() {
        let (_folder, corpus) = corpus_of(&["a \0 b"]);
        assert!(matches!(TextTokenizer::train(&corpus, 256), Err(TokenizerError::VocabularySize(256))));
        let error = TextTokenizer::train(&corpus, 300).err().unwrap();
        assert!(error.to_string().contains("000.txt") && error.hint().unwrap().contains("UTF-8"), "{error}");
    }

    #[test]
    fn the_sample_is_spread_over_all_files() {
        let texts: Vec<String> = (0..10).map(|i| format!("{i}").repeat(1_000)).collect();
        let (_folder, corpus) = corpus_of(&texts.iter().map(String::as_str).collect::<Vec<_>>());
        let sample = training_sample(&corpus, 2_000).unwrap();
        assert_eq!(sample.iter().map(String::len).collect::<Vec<_>>(), [200; 10]);
        assert_eq!(training_sample(&corpus, 1 << 20).unwrap().concat(), texts.concat());
    }
}
