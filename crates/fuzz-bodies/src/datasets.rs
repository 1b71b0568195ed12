//! Text, tokenizers and token shards: files that a run begins with, of which a site gets some from the coordinator.

use crate::memory::Bound;
use crate::place::Place;
use base::ContentHash;
use data::manifest::MANIFEST_FILE;
use data::{Corpus, Dataset, Manifest, PrepareOptions, Split, TextTokenizer, TokenizerSource, prepare};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::LazyLock;

/// A manifest is the same when it is written and read again, and names no file outside its folder.
pub fn data_manifest(bytes: &[u8]) {
    let bound = Bound { base_bytes: 64 << 10, per_byte: 64 };
    let Ok(manifest) = bound.check(bytes.len(), || Manifest::parse(bytes)) else { return };
    assert_eq!(Manifest::parse(&manifest.to_json()).expect("what was written can be read"), manifest);
    for file in manifest.files() {
        assert!(!file.name.contains(['/', '\\']) && !file.name.starts_with('.'), "{:?}", file.name);
    }
}

/// The files of a data folder as `beringia init` makes it, of a few small texts.
static PREPARED: LazyLock<BTreeMap<String, Vec<u8>>> = LazyLock::new(|| {
    let place = Place::new();
    for index in 0..12 {
        let text = format!("Document {index} says:\n{}", format!("line {} of it\n", index * 7).repeat(4 + index));
        place.write(&format!("texts/{index:02}.txt"), text.as_bytes());
    }
    let corpus = Corpus::folder(&place.path().join("texts")).expect("there is text");
    let (source, folder) = (TokenizerSource::Train { vocabulary_size: 300 }, place.path().join("data"));
    prepare(&corpus, &source, &folder, &PrepareOptions::default(), &mut |_| {}).expect("the texts can be prepared");
    let read = |entry: fs::DirEntry| {
        let content = fs::read(entry.path()).expect("it was written");
        (entry.file_name().to_string_lossy().into_owned(), content)
    };
    fs::read_dir(&folder).expect("it was written").flatten().map(read).collect()
});

/// A file of the example.
pub(crate) fn prepared(name: &str) -> &'static [u8] {
    PREPARED.get(name).unwrap_or_else(|| panic!("the example has no {name}"))
}

/// The example's manifest.
pub(crate) fn prepared_manifest() -> Manifest {
    Manifest::parse(prepared(MANIFEST_FILE)).expect("it was written by us")
}

/// A shard's file under a manifest that fits its length and hash, as an enemy's would: what is accepted can be read to its end.
///
/// The first byte says whether it is the tokens or the starts of documents.
pub fn shard_file(bytes: &[u8]) {
    thread_local! {
        static PLACE: Place = {
            let place = Place::new();
            PREPARED.iter().for_each(|(name, content)| place.write(name, content));
            place
        };
    }
    let Some((first, content)) = bytes.split_first() else { return };
    PLACE.with(|place| {
        let manifest = fitted(first % 2 == 0, content);
        let shard = &manifest.train.shards[0];
        let file = if first % 2 == 0 { &shard.token_file } else { &shard.document_file };
        place.write(&file.name, content);
        place.write(MANIFEST_FILE, &manifest.to_json());
        // Files are mapped, not read.
        let bound = Bound { base_bytes: 256 << 10, per_byte: 8 };
        let opened = bound.check(content.len(), || Dataset::open(place.path(), Split::Train, true));
        if let Ok(dataset) = opened {
            reads_to_its_end(&dataset);
        }
        place.write(&file.name, prepared(&file.name));
    });
}

/// The example's manifest with another file in it, as far as its length allows.
fn fitted(is_tokens: bool, content: &[u8]) -> Manifest {
    let mut manifest = prepared_manifest();
    let (width, entries) = (u64::from(manifest.token_width_bytes), content.len().saturating_sub(32) as u64);
    let shard = &mut manifest.train.shards[0];
    let file = if is_tokens { &mut shard.token_file } else { &mut shard.document_file };
    (file.bytes, file.blake3) = (content.len() as u64, ContentHash::of(content));
    if is_tokens {
        shard.tokens = entries / width;
    } else {
        shard.documents = entries / 8;
    }
    (manifest.train.tokens, manifest.train.documents) = (shard.tokens, shard.documents);
    manifest
}

fn reads_to_its_end(dataset: &Dataset) {
    let vocabulary_size = dataset.manifest().vocabulary_size;
    let mut tokens = Vec::new();
    dataset.read(0..dataset.tokens(), &mut tokens);
    assert!(tokens.len() as u64 == dataset.tokens() && tokens.iter().all(|token| u64::from(*token) < vocabulary_size));
    let mut end = 0;
    for document in 0..dataset.documents() {
        let positions = dataset.document(document);
        assert!(positions.start == end && positions.end > end, "documents follow one another");
        end = positions.end;
    }
    assert_eq!(end, dataset.tokens());
    let mut sample = Vec::new();
    (0..dataset.samples(7)).for_each(|index| dataset.sample(7, index, &mut sample));
}

/// A `tokenizer.json`: what is accepted makes tokens of its own vocabulary out of any text, or says that it cannot.
pub fn tokenizer(bytes: &[u8]) {
    // A vocabulary's entry of a dozen bytes is held in several maps.
    let bound = Bound { base_bytes: 32 << 20, per_byte: 4_096 };
    let Ok(tokenizer) = bound.check(bytes.len(), || TextTokenizer::from_bytes(bytes.to_vec())) else { return };
    assert_eq!(tokenizer.json(), bytes);
    assert!((tokenizer.end_of_text() as usize) < tokenizer.vocabulary_size());
    for text in ["", "line 7 of it\n", "  Ü\u{0}\t日本 x", "<|endoftext|> a b c 1 2 3"] {
        let Ok(tokens) = tokenizer.encode(text) else { continue };
        assert!(tokens.iter().all(|token| (*token as usize) < tokenizer.vocabulary_size()), "{tokens:?}");
        let _ = tokenizer.decode(&tokens);
    }
    let _ = tokenizer.decode(&[0, 1, u32::MAX]);
}

/// Documents of a file of that kind.
fn documents(bytes: &[u8], name: &str, bound: Bound) {
    thread_local! {
        static PLACE: Place = Place::new();
    }
    PLACE.with(|place| {
        let folder: &Path = &place.path().join(name.replace('.', "-"));
        place.write(&format!("{}/{name}", name.replace('.', "-")), bytes);
        let Ok(corpus) = Corpus::folder(folder) else { return };
        bound.check(bytes.len(), || {
            let mut documents = corpus.documents();
            let mut text_bytes = 0;
            for text in documents.by_ref() {
                assert!(!text.is_empty() && text.len() <= data::documents::DOCUMENT_BYTES_MAX);
                text_bytes += text.len() as u64;
            }
            let report = documents.into_report();
            assert_eq!((report.document_bytes, report.files), (text_bytes, 1));
            assert!(report.warnings_kept.len() <= data::documents::WARNINGS_KEPT_MAX && !report.summary().is_empty());
        });
    });
}

/// A text file, or one that only begins like text.
pub fn text_file(bytes: &[u8]) {
    documents(bytes, "a.txt", Bound { base_bytes: 512 << 10, per_byte: 16 });
}

/// Text in lines of JSON.
pub fn json_lines(bytes: &[u8]) {
    documents(bytes, "a.jsonl", Bound { base_bytes: 1 << 20, per_byte: 128 });
}

/// Text in a column of a parquet file. A page says how long it is unpacked, and memory is taken for that.
pub fn parquet_file(bytes: &[u8]) {
    documents(bytes, "a.parquet", Bound { base_bytes: 64 << 20, per_byte: 1_024 });
}
