//! Which files make up a corpus, and in which order.
//!
//! A corpus is a list of files, found once and sorted by name, so that two runs over the same folder read the
//! same documents in the same order. Nothing is read here but directories (and, for the built-in corpus, the
//! files that it hashes to leave out copies); [`crate::documents`] reads the text.

use crate::documents::{CorpusReport, Documents};
use base::{ContentHash, Hint};
use std::collections::{BTreeMap, HashSet};
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Most files in one corpus: at some 200 bytes of names for each, 800 MB of list. Larger corpora belong in
/// parquet or jsonl, which hold many documents in a file.
pub const CORPUS_FILES_MAX: usize = 4_000_000;

/// Deepest folder below the corpus root.
pub const FOLDER_DEPTH_MAX: usize = 64;

/// Largest source file of the built-in corpus, bytes: what is larger is generated (bindings, tables).
pub const CARGO_FILE_BYTES_MAX: u64 = 512 * 1024;

/// Largest share of the built-in corpus that one crate may take: 1 / 8, so that no single author dominates.
const CARGO_CRATE_SHARE: u64 = 8;

/// How a file's bytes become documents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileKind {
    /// One document, UTF-8.
    Text,
    /// One JSON object a line, its text in `text` or `content`.
    JsonLines,
    /// One document a row, in the string column `text` or `content`.
    Parquet,
}

impl FileKind {
    /// By the extension; anything that is not jsonl or parquet is tried as text.
    fn of(path: &Path) -> Self {
        let extension = path.extension().and_then(OsStr::to_str).unwrap_or_default().to_ascii_lowercase();
        match extension.as_str() {
            "jsonl" | "ndjson" => Self::JsonLines,
            "parquet" => Self::Parquet,
            _ => Self::Text,
        }
    }
}

/// One file of a corpus.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CorpusFile {
    /// Where it lies.
    pub path: PathBuf,
    /// Its name below the corpus root, with `/` between folders: what messages say.
    pub name: String,
    /// How it is read.
    pub kind: FileKind,
    /// Its length when it was found, bytes.
    pub bytes: u64,
}

/// A fixed list of files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Corpus {
    root: PathBuf,
    files: Vec<CorpusFile>,
}

/// Why there is no text to train on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CorpusError {
    /// The folder does not exist, or cannot be listed.
    #[error("data folder {}: {source}", path.display())]
    Folder {
        /// The folder or subfolder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// There is no file at all.
    #[error("data folder {} has no files", path.display())]
    Empty {
        /// The folder.
        path: PathBuf,
    },
    /// There are files, but none gives a document.
    #[error("data folder {} has no usable text: {}", path.display(), report.summary())]
    NoText {
        /// The folder.
        path: PathBuf,
        /// What was found instead.
        report: Box<CorpusReport>,
    },
    /// More files or deeper folders than are listed.
    #[error("data folder {}: {reason}", path.display())]
    TooLarge {
        /// The folder.
        path: PathBuf,
        /// Which bound was met.
        reason: String,
    },
    /// Cargo has not unpacked any sources here.
    #[error("there are no unpacked Rust sources below {}", path.display())]
    NoCargoSources {
        /// Where they were looked for.
        path: PathBuf,
    },
}

impl Hint for CorpusError {
    fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Folder { .. } | Self::NoCargoSources { .. } => {
                "name a folder of .txt, .md, .jsonl or .parquet files with `--data FOLDER`".to_owned()
            }
            Self::Empty { path } => {
                format!("put .txt, .md, .jsonl or .parquet files into {}, or name another folder", path.display())
            }
            Self::NoText { .. } => "text must be UTF-8 in text files, or a string field or column named `text` or \
                                    `content` in .jsonl and .parquet; name such a folder with `--data FOLDER`"
                .to_owned(),
            Self::TooLarge { .. } => "pack the documents into .jsonl or .parquet files".to_owned(),
        })
    }
}

impl Corpus {
    /// Every file below `root`, sorted by name. Names that begin with a dot are left out; symbolic links are
    /// followed, each folder and each linked file once. `root` may also be a single file.
    ///
    /// # Errors
    /// A folder that cannot be listed, holds no file, or exceeds [`CORPUS_FILES_MAX`] or [`FOLDER_DEPTH_MAX`].
    pub fn folder(root: &Path) -> Result<Self, CorpusError> {
        let mut walk = Walk { root, files: Vec::new(), seen: HashSet::new() };
        let metadata = fs::metadata(root).map_err(|source| folder_error(root, source))?;
        if metadata.is_file() {
            walk.files.push(corpus_file(root.to_owned(), file_name(root), metadata.len()));
        } else {
            walk.descend(root, "", 0)?;
        }
        if walk.files.is_empty() {
            return Err(CorpusError::Empty { path: root.to_owned() });
        }
        Ok(Self { root: root.to_owned(), files: walk.files })
    }

    /// Rust sources that cargo has unpacked on this machine, at most `bytes_max` of them: a real corpus without
    /// a download. `CARGO_HOME`, or `.cargo` in the home directory, says where they are.
    ///
    /// # Errors
    /// There are none.
    pub fn cargo_sources(bytes_max: u64) -> Result<Self, CorpusError> {
        let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
        let home = home.or_else(|| std::env::home_dir().map(|home| home.join(".cargo")));
        Self::cargo_sources_in(&home.unwrap_or_else(|| PathBuf::from(".cargo")), bytes_max)
    }

    /// As [`Corpus::cargo_sources`], with an explicit cargo home.
    ///
    /// Whole crates are taken in the order of their names' hashes, the newest version of each, until the budget
    /// is full; copies of a file, files over [`CARGO_FILE_BYTES_MAX`] and crates over an eighth of the budget
    /// are left out. The choice depends only on what is unpacked.
    ///
    /// # Errors
    /// There are none.
    pub fn cargo_sources_in(cargo_home: &Path, bytes_max: u64) -> Result<Self, CorpusError> {
        let root = cargo_home.join("registry").join("src");
        let mut crates: Vec<_> = newest_crates(&root).into_iter().collect();
        crates.sort_by_key(|(name, _)| ContentHash::of(name.as_bytes()));
        let mut contents = HashSet::new();
        let mut files = Vec::new();
        let mut bytes = 0;
        for (_, folder) in crates {
            let sources = rust_sources(&folder, bytes_max / CARGO_CRATE_SHARE);
            let crate_bytes: u64 = sources.iter().map(|file| file.bytes).sum();
            if bytes + crate_bytes <= bytes_max {
                let unseen =
                    |file: &CorpusFile| fs::read(&file.path).is_ok_and(|b| contents.insert(ContentHash::of(&b)));
                let before = files.len();
                files.extend(sources.into_iter().filter(unseen));
                bytes += files[before..].iter().map(|file| file.bytes).sum::<u64>();
            }
        }
        if files.is_empty() {
            return Err(CorpusError::NoCargoSources { path: root });
        }
        files.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Self { root, files })
    }

    /// The folder (or single file) this corpus was found in.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Its files, sorted by name.
    pub fn files(&self) -> &[CorpusFile] {
        &self.files
    }

    /// Bytes of all files together, compressed files as they lie on disk.
    pub fn file_bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes).sum()
    }

    /// Reads every document, in order; memory stays bounded by [`crate::documents::DOCUMENT_BYTES_MAX`].
    pub fn documents(&self) -> Documents<'_> {
        Documents::new(&self.files)
    }

    /// The error for a corpus that gave no document, with what it gave instead.
    pub(crate) fn no_text(&self, report: CorpusReport) -> CorpusError {
        CorpusError::NoText { path: self.root.clone(), report: Box::new(report) }
    }
}

fn folder_error(path: &Path, source: io::Error) -> CorpusError {
    CorpusError::Folder { path: path.to_owned(), source }
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

fn corpus_file(path: PathBuf, name: String, bytes: u64) -> CorpusFile {
    let kind = FileKind::of(&path);
    CorpusFile { path, name, kind, bytes }
}

/// Entries of one folder, sorted by name; hidden ones left out.
fn sorted_entries(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let mut paths = fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()?;
    paths.retain(|path| !file_name(path).starts_with('.'));
    paths.sort();
    Ok(paths)
}

/// One walk below a root.
struct Walk<'a> {
    root: &'a Path,
    files: Vec<CorpusFile>,
    /// Canonical paths of what was already taken: a link cannot lead round in a circle or bring a file twice.
    seen: HashSet<PathBuf>,
}

impl Walk<'_> {
    fn descend(&mut self, folder: &Path, prefix: &str, depth: usize) -> Result<(), CorpusError> {
        if depth > FOLDER_DEPTH_MAX {
            return Err(self.too_large(format!("{prefix} is more than {FOLDER_DEPTH_MAX} folders deep")));
        }
        for path in sorted_entries(folder).map_err(|source| folder_error(folder, source))? {
            let name = format!("{prefix}{}", file_name(&path));
            // A link to nowhere is no text; anything else that cannot be read is reported when it is read.
            let Ok(canonical) = fs::canonicalize(&path) else { continue };
            let Ok(metadata) = fs::metadata(&canonical) else { continue };
            if !self.seen.insert(canonical) {
                continue;
            }
            if metadata.is_dir() {
                self.descend(&path, &format!("{name}/"), depth + 1)?;
            } else if metadata.is_file() {
                self.files.push(corpus_file(path, name, metadata.len()));
            }
            if self.files.len() > CORPUS_FILES_MAX {
                return Err(self.too_large(format!("more than {CORPUS_FILES_MAX} files")));
            }
        }
        Ok(())
    }

    fn too_large(&self, reason: String) -> CorpusError {
        CorpusError::TooLarge { path: self.root.to_owned(), reason }
    }
}

/// The newest version of every unpacked crate: two versions of one crate would put near copies on both sides of
/// the train/validation split.
fn newest_crates(root: &Path) -> BTreeMap<String, PathBuf> {
    let mut newest: BTreeMap<String, (Vec<u64>, PathBuf)> = BTreeMap::new();
    for registry in sorted_entries(root).unwrap_or_default() {
        for folder in sorted_entries(&registry).unwrap_or_default() {
            let full = file_name(&folder);
            let (name, version) = split_version(&full);
            let known = newest.get(name);
            if known.is_none_or(|(newest_version, _)| version > *newest_version) {
                newest.insert(name.to_owned(), (version, folder));
            }
        }
    }
    newest.into_iter().map(|(name, (_, folder))| (name, folder)).collect()
}

/// `serde-1.0.228` as `serde` and `[1, 0, 228]`; what follows the numbers is not compared.
fn split_version(full: &str) -> (&str, Vec<u64>) {
    let starts_with_digit = |rest: &str| rest.starts_with(|c: char| c.is_ascii_digit());
    let dash = full.match_indices('-').map(|(at, _)| at).find(|at| starts_with_digit(&full[at + 1..]));
    let Some(dash) = dash else { return (full, Vec::new()) };
    let numbers = full[dash + 1..].split(['.', '-', '+']).map_while(|part| part.parse().ok());
    (&full[..dash], numbers.take(3).collect())
}

/// The `.rs` files of one unpacked crate, without oversized ones; none where together they exceed `bytes_max`.
fn rust_sources(folder: &Path, bytes_max: u64) -> Vec<CorpusFile> {
    let mut walk = Walk { root: folder, files: Vec::new(), seen: HashSet::new() };
    if walk.descend(folder, &format!("{}/", file_name(folder)), 0).is_err() {
        return Vec::new();
    }
    let is_source = |file: &CorpusFile| file.name.ends_with(".rs") && (1..=CARGO_FILE_BYTES_MAX).contains(&file.bytes);
    walk.files.retain(is_source);
    let bytes: u64 = walk.files.iter().map(|file| file.bytes).sum();
    if bytes > bytes_max { Vec::new() } else { walk.files }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crate_folders_split_into_name_and_version() {
        assert_eq!(split_version("serde-1.0.228"), ("serde", vec![1, 0, 228]));
        assert_eq!(split_version("zstd-sys-2.0.16+zstd.1.5.7"), ("zstd-sys", vec![2, 0, 16]));
        assert_eq!(split_version("rand-0.10.0-rc.1"), ("rand", vec![0, 10, 0]));
        assert_eq!(split_version("nothing"), ("nothing", vec![]));
    }

    #[test]
    fn folders_are_sorted_and_hidden_files_left_out() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["b.txt", "a/z.md", "a/y.jsonl", ".git/config", "c.parquet"] {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "text").unwrap();
        }
        let corpus = Corpus::folder(folder.path()).unwrap();
        let names: Vec<_> = corpus.files().iter().map(|file| file.name.as_str()).collect();
        assert_eq!(names, ["a/y.jsonl", "a/z.md", "b.txt", "c.parquet"]);
        assert_eq!(corpus.file_bytes(), 16);
    }

    #[cfg(unix)]
    #[test]
    fn links_neither_loop_nor_repeat() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("sub")).unwrap();
        fs::write(folder.path().join("sub/text.txt"), "text").unwrap();
        std::os::unix::fs::symlink(folder.path(), folder.path().join("sub/up")).unwrap();
        std::os::unix::fs::symlink(folder.path().join("sub/text.txt"), folder.path().join("again.txt")).unwrap();
        std::os::unix::fs::symlink("/nowhere/at/all", folder.path().join("broken.txt")).unwrap();
        assert_eq!(Corpus::folder(folder.path()).unwrap().files().len(), 1);
    }

    #[test]
    fn empty_and_missing_folders_say_what_to_do() {
        let folder = tempfile::tempdir().unwrap();
        let empty = Corpus::folder(folder.path()).unwrap_err();
        assert!(matches!(empty, CorpusError::Empty { .. }), "{empty}");
        assert!(empty.hint().unwrap().contains(".jsonl"));
        let missing = Corpus::folder(&folder.path().join("gone")).unwrap_err();
        assert!(missing.to_string().contains("gone") && missing.hint().unwrap().contains("--data"), "{missing}");
    }

    fn unpacked(home: &Path, crate_folder: &str, file: &str, text: &str) {
        let path = home.join("registry/src/index-1").join(crate_folder).join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    #[test]
    fn cargo_sources_take_whole_crates_once() {
        let home = tempfile::tempdir().unwrap();
        let missing = Corpus::cargo_sources_in(home.path(), 1 << 20).unwrap_err();
        assert!(missing.hint().unwrap().contains("--data FOLDER"), "{missing}");
        unpacked(home.path(), "one-1.9.0", "src/lib.rs", "old");
        unpacked(home.path(), "one-1.10.0", "src/lib.rs", "fn one() {}");
        unpacked(home.path(), "one-1.10.0", "README.md", "not source");
        unpacked(home.path(), "two-0.1.0", "src/copy.rs", "fn one() {}");
        unpacked(home.path(), "two-0.1.0", "src/lib.rs", "fn two() {}");
        unpacked(home.path(), "huge-0.1.0", "src/lib.rs", &"x".repeat(200));
        let corpus = Corpus::cargo_sources_in(home.path(), 1_000).unwrap();
        let names: Vec<_> = corpus.files().iter().map(|file| file.name.as_str()).collect();
        // `huge` exceeds an eighth of the budget; one of the two equal files is left out.
        assert_eq!(names.len(), 2, "{names:?}");
        assert!(names.contains(&"two-0.1.0/src/lib.rs"), "{names:?}");
        assert!(!names.contains(&"one-1.9.0/src/lib.rs"), "{names:?}");
        assert_eq!(corpus, Corpus::cargo_sources_in(home.path(), 1_000).unwrap());
    }
}
