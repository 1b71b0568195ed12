//! Documents, one after the other, in bounded memory.
//!
//! A reader holds at most one document of [`DOCUMENT_BYTES_MAX`] (plus one jsonl line or one parquet page), so
//! a corpus may be larger than the machine's memory. What cannot be read is skipped, counted and named, with
//! its file and line: one bad line must not cost a run its terabyte.

use crate::corpus::{CorpusFile, FileKind};
use crate::parquet_text::ParquetText;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};

/// Longest document, bytes; longer text is cut at line boundaries into several. A tokenizer needs some 50 to
/// 100 bytes for each byte that it is working on, so this keeps a thread under 100 MiB.
pub const DOCUMENT_BYTES_MAX: usize = 1 << 20;

/// Longest jsonl line, bytes: 16 documents' worth, for JSON's escapes (6 bytes for one) and other fields.
pub const JSON_LINE_BYTES_MAX: usize = 16 * DOCUMENT_BYTES_MAX;

/// Warnings and names of binary files kept for the report; all are counted.
pub const WARNINGS_KEPT_MAX: usize = 32;

/// Something that was skipped.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CorpusWarning {
    /// The file's name below the corpus root.
    pub file: String,
    /// The line (jsonl) or row (parquet), the first being 1, where it concerns one.
    pub line: Option<u64>,
    /// What is wrong.
    pub reason: String,
}

impl std::fmt::Display for CorpusWarning {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.line {
            Some(line) => write!(formatter, "{}:{line}: {}", self.file, self.reason),
            None => write!(formatter, "{}: {}", self.file, self.reason),
        }
    }
}

/// What reading a corpus met.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct CorpusReport {
    /// Files opened so far.
    pub files: u64,
    /// Bytes of those files, as they lie on disk.
    pub file_bytes: u64,
    /// Documents given out.
    pub documents: u64,
    /// UTF-8 bytes of them.
    pub document_bytes: u64,
    /// Files skipped because they are not UTF-8 text.
    pub binary_files: u64,
    /// The first [`WARNINGS_KEPT_MAX`] of their names.
    pub binary_names: Vec<String>,
    /// Lines, rows and files that could not be read.
    pub warnings: u64,
    /// The first [`WARNINGS_KEPT_MAX`] of them.
    pub warnings_kept: Vec<CorpusWarning>,
}

impl CorpusReport {
    /// One sentence: what was skipped, and the first of the names.
    pub fn summary(&self) -> String {
        let mut parts = vec![format!("{} documents in {} files", self.documents, self.files)];
        if self.binary_files > 0 {
            let shown = self.binary_names.iter().take(3).cloned().collect::<Vec<_>>().join(", ");
            let more = if self.binary_files > 3 { ", ..." } else { "" };
            parts.push(format!("{} not UTF-8 text ({shown}{more})", self.binary_files));
        }
        if let Some(first) = self.warnings_kept.first() {
            parts.push(format!("{} warnings, the first: {first}", self.warnings));
        }
        parts.join("; ")
    }

    pub(crate) fn warn(&mut self, file: &str, line: Option<u64>, reason: String) {
        self.warnings += 1;
        if self.warnings_kept.len() < WARNINGS_KEPT_MAX {
            self.warnings_kept.push(CorpusWarning { file: file.to_owned(), line, reason });
        }
    }

    fn binary(&mut self, file: &str) {
        self.binary_files += 1;
        if self.binary_names.len() < WARNINGS_KEPT_MAX {
            self.binary_names.push(file.to_owned());
        }
    }
}

/// Iterator over the documents of a corpus; each item is non-empty text of at most [`DOCUMENT_BYTES_MAX`].
pub struct Documents<'a> {
    files: std::slice::Iter<'a, CorpusFile>,
    current: Option<(&'a CorpusFile, Reader)>,
    /// The rest of a text that was longer than a document.
    rest: String,
    report: CorpusReport,
}

impl<'a> Documents<'a> {
    pub(crate) fn new(files: &'a [CorpusFile]) -> Self {
        Self { files: files.iter(), current: None, rest: String::new(), report: CorpusReport::default() }
    }

    /// What was met so far.
    pub fn report(&self) -> &CorpusReport {
        &self.report
    }

    /// The report, when the documents have been read.
    pub fn into_report(self) -> CorpusReport {
        self.report
    }

    /// The next whole text, of any length up to a jsonl line, or the next piece of a text file.
    fn next_text(&mut self) -> Option<String> {
        loop {
            if let Some((file, reader)) = &mut self.current {
                if let Some(text) = reader.next(file, &mut self.report) {
                    return Some(text);
                }
                self.current = None;
            }
            let file = self.files.next()?;
            self.report.files += 1;
            self.report.file_bytes += file.bytes;
            self.current = Reader::open(file, &mut self.report).map(|reader| (file, reader));
        }
    }
}

impl Iterator for Documents<'_> {
    type Item = String;

    fn next(&mut self) -> Option<String> {
        loop {
            let mut text = std::mem::take(&mut self.rest);
            if text.is_empty() {
                text = self.next_text()?;
            }
            if text.len() > DOCUMENT_BYTES_MAX {
                self.rest = text.split_off(cut_at_line(&text, DOCUMENT_BYTES_MAX));
            }
            if !text.trim().is_empty() {
                self.report.documents += 1;
                self.report.document_bytes += text.len() as u64;
                return Some(text);
            }
        }
    }
}

/// Where to cut `text` so that the first part has at most `bytes_max` bytes: after the last line end before,
/// or, where a line is longer than that, at the last character boundary. Never 0 for `bytes_max` of 4 or more.
pub(crate) fn cut_at_line(text: &str, bytes_max: usize) -> usize {
    if text.len() <= bytes_max {
        return text.len();
    }
    let boundary = text.floor_char_boundary(bytes_max);
    text[..boundary].rfind('\n').map_or(boundary, |newline| newline + 1)
}

/// The open file.
enum Reader {
    Text(TextReader),
    JsonLines(JsonLinesReader),
    Parquet(Box<ParquetText>),
}

impl Reader {
    /// Opens a file; one that cannot be opened is a warning.
    fn open(file: &CorpusFile, report: &mut CorpusReport) -> Option<Self> {
        let opened = match file.kind {
            FileKind::Text => TextReader::open(file).map(|reader| reader.map(Self::Text)).map_err(|e| e.to_string()),
            FileKind::JsonLines => File::open(&file.path)
                .map(|f| Some(Self::JsonLines(JsonLinesReader::new(f))))
                .map_err(|e| e.to_string()),
            FileKind::Parquet => ParquetText::open(&file.path).map(|reader| Some(Self::Parquet(Box::new(reader)))),
        };
        match opened {
            Ok(Some(reader)) => Some(reader),
            Ok(None) => {
                report.binary(&file.name);
                None
            }
            Err(reason) => {
                report.warn(&file.name, None, reason);
                None
            }
        }
    }

    fn next(&mut self, file: &CorpusFile, report: &mut CorpusReport) -> Option<String> {
        match self {
            Self::Text(reader) => reader.next().unwrap_or_else(|error| {
                report.warn(&file.name, None, error.to_string());
                None
            }),
            Self::JsonLines(reader) => reader.next(file, report),
            Self::Parquet(reader) => reader.next(file, report),
        }
    }
}

/// A text file, a document's length at a time.
struct TextReader {
    file: File,
    /// What was read and not given out; ends within a character only in mid-file.
    pending: Vec<u8>,
    at_end: bool,
}

impl TextReader {
    /// `None` where the file is not UTF-8 text. A file longer than a document is read twice, so that a binary
    /// file that begins like text is refused as a whole.
    fn open(file: &CorpusFile) -> io::Result<Option<Self>> {
        let mut reader = Self { file: File::open(&file.path)?, pending: Vec::new(), at_end: false };
        reader.fill()?;
        if !reader.at_end {
            if !is_text(File::open(&file.path)?)? {
                return Ok(None);
            }
        } else if text_so_far(&reader.pending) != Some(reader.pending.len()) {
            return Ok(None);
        }
        if reader.pending.starts_with(BYTE_ORDER_MARK) {
            reader.pending.drain(..BYTE_ORDER_MARK.len());
        }
        Ok(Some(reader))
    }

    /// Reads until more than one document is pending (four bytes more: the last may begin a character), or the
    /// file ends.
    fn fill(&mut self) -> io::Result<()> {
        let wanted = (DOCUMENT_BYTES_MAX + 4).saturating_sub(self.pending.len());
        let read = (&mut self.file).take(wanted as u64).read_to_end(&mut self.pending)?;
        self.at_end = read < wanted;
        Ok(())
    }

    fn next(&mut self) -> io::Result<Option<String>> {
        if !self.at_end {
            self.fill()?;
        }
        // The file may have changed since it was checked: what is not text any more ends it.
        let valid = text_so_far(&self.pending).ok_or_else(|| io::Error::other("changed while it was read"))?;
        let text = std::str::from_utf8(&self.pending[..valid]).map_err(io::Error::other)?;
        let piece = text[..cut_at_line(text, DOCUMENT_BYTES_MAX)].to_owned();
        self.pending.drain(..piece.len());
        Ok((!piece.is_empty()).then_some(piece))
    }
}

const BYTE_ORDER_MARK: &[u8] = "\u{feff}".as_bytes();

/// Length of the valid UTF-8 at the start of `bytes`, all of it or all but a character cut off at the end;
/// `None` where it is not text. A zero byte makes a file binary, as it does for git and grep.
fn text_so_far(bytes: &[u8]) -> Option<usize> {
    if bytes.contains(&0) {
        return None;
    }
    match std::str::from_utf8(bytes) {
        Ok(_) => Some(bytes.len()),
        Err(error) if error.error_len().is_none() => Some(error.valid_up_to()),
        Err(_) => None,
    }
}

/// Whether the whole of a file is UTF-8 text, read in 64 KiB pieces.
fn is_text(mut file: impl Read) -> io::Result<bool> {
    let mut pending = Vec::new();
    loop {
        let read = (&mut file).take(64 * 1024).read_to_end(&mut pending)?;
        let Some(valid) = text_so_far(&pending) else { return Ok(false) };
        pending.drain(..valid);
        if read == 0 {
            return Ok(pending.is_empty());
        }
    }
}

/// The fields of a line that matter; others are skipped.
#[derive(Deserialize)]
struct JsonDocument {
    text: Option<serde_json::Value>,
    content: Option<serde_json::Value>,
}

struct JsonLinesReader {
    input: BufReader<File>,
    line: Vec<u8>,
    number: u64,
}

impl JsonLinesReader {
    fn new(file: File) -> Self {
        Self { input: BufReader::with_capacity(256 * 1024, file), line: Vec::new(), number: 0 }
    }

    fn next(&mut self, file: &CorpusFile, report: &mut CorpusReport) -> Option<String> {
        loop {
            self.number += 1;
            match self.read_line() {
                Ok(Line::End) => return None,
                Ok(Line::Whole) if self.line.trim_ascii().is_empty() => {}
                Ok(Line::Whole) => match json_text(&self.line) {
                    Ok(text) => return Some(text),
                    Err(reason) => report.warn(&file.name, Some(self.number), reason),
                },
                Ok(Line::TooLong) => {
                    let reason = format!("the line is longer than {JSON_LINE_BYTES_MAX} bytes");
                    report.warn(&file.name, Some(self.number), reason);
                }
                Err(error) => {
                    report.warn(&file.name, Some(self.number), error.to_string());
                    return None;
                }
            }
        }
    }

    /// Reads one line into `self.line`; of one that is too long only the bound is kept.
    fn read_line(&mut self) -> io::Result<Line> {
        self.line.clear();
        let limit = JSON_LINE_BYTES_MAX as u64 + 1;
        if (&mut self.input).take(limit).read_until(b'\n', &mut self.line)? == 0 {
            return Ok(Line::End);
        }
        if self.line.len() as u64 == limit && self.line.last() != Some(&b'\n') {
            self.line = Vec::new();
            self.input.skip_until(b'\n')?;
            return Ok(Line::TooLong);
        }
        Ok(Line::Whole)
    }
}

enum Line {
    Whole,
    TooLong,
    End,
}

/// The text of one jsonl line.
fn json_text(line: &[u8]) -> Result<String, String> {
    let document: JsonDocument = serde_json::from_slice(line).map_err(|error| {
        // serde_json counts lines within what it is given, which is always one.
        let message = error.to_string();
        message
            .split(" at line 1 column ")
            .next()
            .map_or(message.clone(), |what| format!("{what} at column {}", error.column()))
    })?;
    match (document.text, document.content) {
        (Some(serde_json::Value::String(text)), _) | (None, Some(serde_json::Value::String(text))) => Ok(text),
        (None, None) => Err("has neither `text` nor `content`".to_owned()),
        _ => Err("`text` (or `content`) is not a string".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::corpus::Corpus;
    use std::fs;

    fn read(files: &[(&str, &[u8])]) -> (Vec<String>, CorpusReport) {
        let folder = tempfile::tempdir().unwrap();
        for (name, bytes) in files {
            fs::write(folder.path().join(name), bytes).unwrap();
        }
        let corpus = Corpus::folder(folder.path()).unwrap();
        let mut documents = corpus.documents();
        let texts = documents.by_ref().collect();
        (texts, documents.into_report())
    }

    #[test]
    fn a_text_file_is_a_document_and_binary_files_are_named() {
        let (texts, report) = read(&[
            ("a.txt", "\u{feff}naïve".as_bytes()),
            ("b.rs", b"fn b() {}\n"),
            ("c.bin", &[0xff, 0xfe, 0x00]),
            ("d.txt", b"zero \0 byte"),
            ("e.txt", b"cut in a character \xc3"),
            ("f.txt", b" \n\n "),
        ]);
        assert_eq!(texts, ["naïve", "fn b() {}\n"]);
        assert_eq!(report.binary_names, ["c.bin", "d.txt", "e.txt"]);
        assert!(report.summary().contains("c.bin"), "{}", report.summary());
        assert_eq!((report.documents, report.document_bytes, report.files), (2, 16, 6));
    }

    #[test]
    fn long_text_is_cut_at_lines_and_nothing_is_lost() {
        let line = "ein schöner Satz mit Umlauten\n";
        let text = line.repeat(2 * DOCUMENT_BYTES_MAX / line.len() + 10);
        let unbroken = "ü".repeat(DOCUMENT_BYTES_MAX);
        let json = format!("{}\n", serde_json::json!({ "text": text }));
        let (texts, report) =
            read(&[("a.txt", text.as_bytes()), ("b.txt", unbroken.as_bytes()), ("c.jsonl", json.as_bytes())]);
        assert_eq!(texts.len(), 3 + 2 + 3);
        assert!(texts.iter().all(|piece| piece.len() <= DOCUMENT_BYTES_MAX));
        assert!(texts[..3].iter().all(|piece| piece.ends_with('\n')));
        assert_eq!(texts.concat(), format!("{text}{unbroken}{text}"));
        assert_eq!(report.documents, 8);
    }

    #[test]
    fn a_long_binary_file_that_begins_like_text_is_refused_whole() {
        let mut bytes = vec![b'x'; 2 * DOCUMENT_BYTES_MAX];
        bytes.push(0xff);
        let (texts, report) = read(&[("a.txt", &bytes)]);
        assert_eq!((texts.len(), report.binary_files), (0, 1));
    }

    #[test]
    fn bad_json_lines_are_warnings_with_their_line() {
        let lines = concat!(
            "{\"text\": \"one\"}\n",
            "{\"text\": \"cut\n",
            "\n",
            "{\"content\": \"two\", \"text\": null, \"id\": [1]}\n",
            "{\"id\": 3}\n",
            "{\"text\": 4, \"content\": \"x\"}\n",
            "[]\n",
            "{\"text\": \"last\"}",
        );
        let (texts, report) = read(&[("a.jsonl", lines.as_bytes()), ("b.jsonl", b"{\"text\": \"\xff\"}\n")]);
        assert_eq!(texts, ["one", "two", "last"]);
        let lines: Vec<_> = report.warnings_kept.iter().map(|w| (w.file.as_str(), w.line)).collect();
        let a = |line| ("a.jsonl", Some(line));
        assert_eq!(lines, [a(2), a(5), a(6), a(7), ("b.jsonl", Some(1))]);
        assert_eq!(report.warnings, 5);
        assert!(report.warnings_kept[1].to_string().starts_with("a.jsonl:5: has neither"));
    }

    #[test]
    fn a_json_line_beyond_the_bound_is_skipped() {
        let mut bytes = b"{\"text\": \"".to_vec();
        bytes.resize(JSON_LINE_BYTES_MAX + 100, b'x');
        bytes.extend(b"\"}\n{\"text\": \"after\"}\n");
        let (texts, report) = read(&[("a.jsonl", &bytes)]);
        assert_eq!(texts, ["after"]);
        assert_eq!(report.warnings_kept[0].line, Some(1));
    }

    #[test]
    fn kept_warnings_are_bounded() {
        let (_, report) = read(&[("a.jsonl", "x\n".repeat(1000).as_bytes())]);
        assert_eq!((report.warnings, report.warnings_kept.len()), (1000, WARNINGS_KEPT_MAX));
    }
}
