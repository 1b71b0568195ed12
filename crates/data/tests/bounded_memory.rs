//! A corpus several times larger than the memory that preparing it may take. A process of its own, so that the
//! high-water mark is this test's.
#![cfg(target_os = "linux")]

use data::{Corpus, PrepareOptions, TokenizerSource, prepare};
use std::fs::{self, File};
use std::io::{BufWriter, Write};

/// Largest resident size of this process so far, bytes.
fn resident_bytes_max() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

/// 512 MiB of jsonl: words that the tokenizer below maps one to one, in lines of 64 KiB.
fn write_corpus(path: &std::path::Path) -> u64 {
    let mut file = BufWriter::new(File::create(path).unwrap());
    let line = format!("{{\"text\": \"{}\"}}\n", "a\\n".repeat(21_840));
    for _ in 0..8_192 {
        file.write_all(line.as_bytes()).unwrap();
    }
    file.into_inner().unwrap().metadata().unwrap().len()
}

#[test]
fn reading_a_corpus_larger_than_its_memory() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = write_corpus(&folder.path().join("large.jsonl"));
    let corpus = Corpus::folder(folder.path()).unwrap();
    let before = resident_bytes_max();
    let mut documents = corpus.documents();
    assert_eq!(documents.by_ref().count(), 8_192);
    let grown = resident_bytes_max() - before;
    assert!(grown < 32 << 20 && grown * 10 < bytes, "reading {bytes} bytes took {grown}");
    fs::remove_file(folder.path().join("large.jsonl")).unwrap();
}
