//! A corpus several times larger than the memory that preparing it may take. A process of its own, so that the
//! high-water mark is this test's.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test's helper may panic")]

use data::{Corpus, Dataset, PrepareOptions, Split, TokenizerSource, prepare};
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;

/// Documents of the corpus; at 64 KiB each, 192 MiB.
const DOCUMENTS: u64 = 3 * 1024;

/// What reading, encoding and writing may hold beyond what the process held before: two batches of 8 MiB, their
/// tokens, the encoders' copies of one document per thread, and the allocator's slack.
const RESIDENT_GROWTH_BYTES_MAX: u64 = 64 << 20;

/// Largest resident size of this process so far, bytes.
fn resident_bytes_max() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

/// Long words, so that the time goes into moving text and not into looking words up.
fn write_corpus(path: &Path) -> u64 {
    let mut file = BufWriter::new(File::create(path).unwrap());
    let words = format!("{}\\n", "w".repeat(1_022)).repeat(64);
    for document in 0..DOCUMENTS {
        writeln!(file, "{{\"text\": \"{document} {words}\"}}").unwrap();
    }
    file.into_inner().unwrap().metadata().unwrap().len()
}

fn write_tokenizer(path: &Path) {
    let end = serde_json::json!({ "id": 1, "content": "</s>", "single_word": false, "lstrip": false,
                                  "rstrip": false, "normalized": false, "special": true });
    let json = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
        "added_tokens": [end], "pre_tokenizer": { "type": "WhitespaceSplit" }, "decoder": null,
        "model": { "type": "WordLevel", "vocab": { "other": 0 }, "unk_token": "other" },
    });
    fs::write(path, json.to_string()).unwrap();
}

#[test]
fn preparing_a_corpus_larger_than_its_memory() {
    let folder = tempfile::tempdir().unwrap();
    let texts = folder.path().join("texts");
    fs::create_dir(&texts).unwrap();
    let bytes = write_corpus(&texts.join("large.jsonl"));
    let tokenizer = folder.path().join("tokenizer.json");
    write_tokenizer(&tokenizer);
    let corpus = Corpus::folder(&texts).unwrap();
    let out = folder.path().join("data");
    let before = resident_bytes_max();
    let options = PrepareOptions::default();
    let prepared = prepare(&corpus, &TokenizerSource::Load(tokenizer), &out, &options, &mut |_| {}).unwrap();
    let grown = resident_bytes_max() - before;
    assert_eq!(prepared.report.documents, DOCUMENTS);
    assert!(grown < RESIDENT_GROWTH_BYTES_MAX && 3 * grown <= bytes, "preparing {bytes} bytes took {grown}");
    let dataset = Dataset::open(&out, Split::Train, true).unwrap();
    // A number, 64 words and the end of text.
    assert_eq!(dataset.tokens(), dataset.documents() * 66);
}
