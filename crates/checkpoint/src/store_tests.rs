//! Every way in which a checkpoint can be cut, changed or refused, and that a good one is always left.

use super::*;
use base::HostTensor;
use base::random::Random;
use std::cell::Cell;
use std::rc::Rc;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct State {
    cursor: u64,
    speed: f64,
}

fn state(round: u64) -> State {
    // A third has no short decimal form: the state must come back with the same bits.
    State { cursor: round * 1_000, speed: round as f64 / 3.0 }
}

fn tensors(round: u64) -> NamedTensors {
    let tensor = |shape: &[usize]| HostTensor {
        shape: shape.to_vec(),
        values: (0..shape.iter().product()).map(|index: usize| (index as u64 * 7 + round) as f32 / 3.0).collect(),
    };
    [("model.norm.weight", tensor(&[8])), ("model.embed_tokens.weight", tensor(&[10, 8]))]
        .map(|(name, tensor)| (name.to_owned(), tensor))
        .into()
}

fn save_round(disk: &dyn Disk, root: &Path, round: u64, keep: usize) -> Result<Saved, SaveError> {
    let (model, outer) = (tensors(round), tensors(round + 1_000));
    save_on(disk, root, Round(round), &[("model", &model), ("outer", &outer)], &state(round), keep)
}

fn assert_is_round(loaded: &Loaded<State>, round: u64) {
    assert_eq!(loaded.round, Round(round));
    assert_eq!(loaded.state, state(round));
    assert_eq!(loaded.state.speed.to_bits(), state(round).speed.to_bits());
    assert_eq!(loaded.tensors["model"], tensors(round));
    assert_eq!(loaded.tensors["outer"], tensors(round + 1_000));
    assert_eq!(loaded.tensors.len(), 2);
}

fn rounds(root: &Path) -> Vec<u64> {
    list(root).unwrap().iter().map(|entry| entry.round.0).collect()
}

fn names(root: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(root).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn what_is_saved_is_loaded() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path().join("a/checkpoints");
    let saved = save_round(&RealDisk, &root, 12, 3).unwrap();
    assert_eq!(saved.path, root.join("round-00000012"));
    assert!(saved.warnings.is_empty());
    let on_disk: u64 = fs::read_dir(&saved.path).unwrap().map(|file| file.unwrap().metadata().unwrap().len()).sum();
    assert_eq!(saved.bytes, on_disk);
    let loaded: Loaded<State> = load_latest(&root).unwrap();
    assert_is_round(&loaded, 12);
    assert_eq!(loaded.manifest_hash, saved.manifest_hash);
    assert!(loaded.skipped.is_empty());
    assert_is_round(&load(&saved.path).unwrap(), 12);
}

#[test]
fn equal_content_gives_equal_bytes() {
    let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let hash = |root: &Path| save_round(&RealDisk, root, 5, 2).unwrap().manifest_hash;
    assert_eq!(hash(a.path()), hash(b.path()));
}

/// Flips one bit of, or cuts, one random file of the checkpoint. Returns what was done.
fn damage(folder: &Path, random: &mut Random) -> String {
    let files = names(folder);
    let name = &files[random.next_below(files.len() as u64) as usize];
    let path = folder.join(name);
    let mut bytes = fs::read(&path).unwrap();
    let at = random.next_below(bytes.len() as u64) as usize;
    let flips = random.next_below(2) == 0;
    if flips {
        bytes[at] ^= 1 << random.next_below(8);
    } else {
        bytes.truncate(at);
    }
    fs::write(&path, bytes).unwrap();
    format!("{name}: {} at byte {at}", if flips { "bit flip" } else { "cut" })
}

fn copy_folder(from: &Path, to: &Path) {
    let _ = fs::remove_dir_all(to);
    fs::create_dir_all(to).unwrap();
    for name in names(from) {
        fs::copy(from.join(&name), to.join(&name)).unwrap();
    }
}

/// 500 truncations and bit flips of any file: each is refused, and the checkpoint before is taken.
#[test]
fn damage_anywhere_is_refused_and_the_one_before_is_taken() {
    let seed = 20_251;
    println!("seed {seed}");
    let mut random = Random::new(seed, 0);
    let root = tempfile::tempdir().unwrap();
    save_round(&RealDisk, root.path(), 1, 2).unwrap();
    let newest = save_round(&RealDisk, root.path(), 2, 2).unwrap().path;
    let pristine = root.path().join("pristine");
    copy_folder(&newest, &pristine);
    for case in 0..500 {
        copy_folder(&pristine, &newest);
        let done = damage(&newest, &mut random);
        let refused = load::<State>(&newest);
        assert!(refused.is_err(), "case {case}: {done} was not noticed");
        let loaded: Loaded<State> = load_latest(root.path()).unwrap();
        assert_is_round(&loaded, 1);
        assert_eq!(loaded.skipped.len(), 1, "case {case}: {done}");
        assert_eq!(loaded.skipped[0].path, newest);
    }
    copy_folder(&pristine, &newest);
    assert_is_round(&load_latest(root.path()).unwrap(), 2);
}

#[test]
fn every_missing_file_is_noticed() {
    let root = tempfile::tempdir().unwrap();
    let folder = save_round(&RealDisk, root.path(), 1, 2).unwrap().path;
    for name in names(&folder) {
        let aside = root.path().join("aside");
        fs::rename(folder.join(&name), &aside).unwrap();
        let error = load::<State>(&folder).unwrap_err();
        assert!(matches!(&error, LoadError::Damaged { path, .. } if path.ends_with(&name)), "{name}: {error}");
        fs::rename(&aside, folder.join(&name)).unwrap();
    }
    assert_is_round(&load(&folder).unwrap(), 1);
}

/// A disk on which the call number `fails_at` fails; after a crash, so does every later one.
#[derive(Clone)]
struct FaultyDisk {
    calls: Rc<Cell<u64>>,
    fails_at: u64,
    kind: ErrorKind,
    crashes: bool,
    /// Bytes that still fit; writing more gives a short write, then `StorageFull`.
    bytes_left: Rc<Cell<u64>>,
}

impl FaultyDisk {
    fn new(fails_at: u64, kind: ErrorKind, crashes: bool) -> Self {
        Self { calls: Rc::default(), fails_at, kind, crashes, bytes_left: Rc::new(Cell::new(u64::MAX)) }
    }

    fn with_room_for(bytes: u64) -> Self {
        let disk = Self::new(u64::MAX, ErrorKind::Other, false);
        disk.bytes_left.set(bytes);
        disk
    }

    fn call<T>(&self, call: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let number = self.calls.get();
        self.calls.set(number + 1);
        let fails = number == self.fails_at || (self.crashes && number > self.fails_at);
        if fails { Err(io::Error::from(self.kind)) } else { call() }
    }
}

struct FaultyFile<'a> {
    file: Box<dyn DurableFile + 'a>,
    disk: &'a FaultyDisk,
}

impl Write for FaultyFile<'_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let fits = self.disk.bytes_left.get().min(buffer.len() as u64);
        if fits == 0 && !buffer.is_empty() {
            return Err(io::Error::from(ErrorKind::StorageFull));
        }
        self.disk.bytes_left.set(self.disk.bytes_left.get() - fits);
        self.disk.call(|| self.file.write(&buffer[..fits as usize]))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl DurableFile for FaultyFile<'_> {
    fn sync(&mut self) -> io::Result<()> {
        self.disk.call(|| self.file.sync())
    }
}

impl Disk for FaultyDisk {
    fn create_folder(&self, path: &Path) -> io::Result<()> {
        self.call(|| RealDisk.create_folder(path))
    }

    fn create_file<'a>(&'a self, path: &Path) -> io::Result<Box<dyn DurableFile + 'a>> {
        let file = self.call(|| RealDisk.create_file(path))?;
        Ok(Box::new(FaultyFile { file, disk: self }))
    }

    fn sync_folder(&self, path: &Path) -> io::Result<()> {
        self.call(|| RealDisk.sync_folder(path))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.call(|| RealDisk.rename(from, to))
    }

    /// A crash in the middle of a removal leaves a part of the folder.
    fn remove_folder(&self, path: &Path) -> io::Result<()> {
        let removed = self.call(|| RealDisk.remove_folder(path));
        if removed.is_err() && self.crashes && self.calls.get() == self.fails_at + 1 {
            let _ = fs::remove_file(path.join(MANIFEST_FILE));
        }
        removed
    }
}

/// Calls of an undisturbed save of `round` in a root prepared by `prepare`.
fn calls_of_save(prepare: impl Fn(&Path), round: u64) -> u64 {
    let root = tempfile::tempdir().unwrap();
    prepare(root.path());
    let disk = FaultyDisk::new(u64::MAX, ErrorKind::Other, false);
    save_round(&disk, root.path(), round, 2).unwrap();
    disk.calls.get()
}

fn three_rounds(root: &Path) {
    for round in [1, 2, 3] {
        save_round(&RealDisk, root, round, 2).unwrap();
    }
    // Leftovers of earlier crashes, so that removing them is one of the steps that can fail.
    fs::create_dir(root.join(".saving-round-00000004")).unwrap();
    fs::write(root.join(".saving-round-00000004/model.safetensors"), b"half").unwrap();
}

/// The process dies at every single call of a save, of a new round and of one that is there already. What loads
/// afterwards is the old or the new checkpoint, whole; and the next save succeeds and leaves no leftovers.
#[test]
fn a_crash_at_any_step_leaves_a_checkpoint_that_loads() {
    for (round, old) in [(4, 3), (3, 3)] {
        let calls = calls_of_save(three_rounds, round);
        assert!(calls > 20, "{calls} calls: the fault hook does not see the save");
        for fails_at in 0..calls {
            let root = tempfile::tempdir().unwrap();
            three_rounds(root.path());
            let disk = FaultyDisk::new(fails_at, ErrorKind::Other, true);
            let outcome = save_round(&disk, root.path(), round, 2);
            let loaded: Loaded<State> = load_latest(root.path()).unwrap();
            assert!(loaded.skipped.is_empty(), "call {fails_at}: {:?}", loaded.skipped);
            let expected = if outcome.is_ok() { round } else { loaded.round.0 };
            assert!(loaded.round.0 == old || loaded.round.0 == round, "call {fails_at}: {}", loaded.round);
            assert_is_round(&loaded, expected);
            let saved = save_round(&RealDisk, root.path(), 5, 2).unwrap();
            assert_eq!(saved.warnings, Vec::<String>::new());
            assert_eq!(names(root.path()).iter().filter(|name| name.starts_with('.')).count(), 0);
            assert_eq!(rounds(root.path())[0], 5);
        }
    }
}

/// The same calls fail, but the program goes on: it reports the error, cleans up, and keeps what was there.
#[test]
fn an_error_at_any_step_is_reported_and_cleaned_up() {
    for round in [4, 3] {
        for fails_at in 0..calls_of_save(three_rounds, round) {
            let root = tempfile::tempdir().unwrap();
            three_rounds(root.path());
            let disk = FaultyDisk::new(fails_at, ErrorKind::PermissionDenied, false);
            match save_round(&disk, root.path(), round, 2) {
                Ok(saved) => assert!(!saved.warnings.is_empty(), "call {fails_at} failed and nobody was told"),
                Err(error) => {
                    assert!(matches!(error, SaveError::NotWritable { .. }), "call {fails_at}: {error}");
                    let left = names(root.path());
                    assert!(!left.contains(&".saving-round-00000004".to_owned()) || fails_at <= 1, "{left:?}");
                }
            }
            load_latest::<State>(root.path()).unwrap();
        }
    }
}

#[test]
fn a_full_disk_keeps_the_old_checkpoint_and_says_how_much_was_needed() {
    let bytes = save_round(&RealDisk, tempfile::tempdir().unwrap().path(), 2, 2).unwrap().bytes;
    for room in [0, 1, bytes / 2, bytes - 1] {
        let root = tempfile::tempdir().unwrap();
        save_round(&RealDisk, root.path(), 1, 2).unwrap();
        let error = save_round(&FaultyDisk::with_room_for(room), root.path(), 2, 2).unwrap_err();
        let SaveError::DiskFull { bytes_needed, .. } = &error else { panic!("{error}") };
        assert!(*bytes_needed > 0 && *bytes_needed <= bytes);
        assert!(error.to_string().contains(&bytes_needed.to_string()), "{error}");
        assert!(error.hint().unwrap().contains("df -h"), "{error:?}");
        assert_eq!(names(root.path()), ["round-00000001"], "the temporary folder is gone");
        assert_is_round(&load_latest(root.path()).unwrap(), 1);
    }
    let root = tempfile::tempdir().unwrap();
    save_round(&FaultyDisk::with_room_for(bytes), root.path(), 2, 2).unwrap();
}

/// Set for the child process of the test below: where it saves.
const CHILD_ROOT: &str = "CHECKPOINT_TEST_ROOT";

/// The real thing: the kernel refuses to let a file grow (RLIMIT_FSIZE, which a child process can set for itself
/// without rights), and the save fails like on a full disk.
#[cfg(unix)]
#[test]
fn a_limit_of_the_kernel_keeps_the_old_checkpoint() {
    let large = NamedTensors::from([("x".to_owned(), HostTensor { shape: vec![50_000], values: vec![1.0; 50_000] })]);
    if let Some(root) = std::env::var_os(CHILD_ROOT) {
        let error = save(Path::new(&root), Round(2), &[("model", &large)], &state(2), 2).unwrap_err();
        assert!(matches!(error, SaveError::DiskFull { bytes_needed, .. } if bytes_needed > 200_000), "{error}");
        return;
    }
    let root = tempfile::tempdir().unwrap();
    save_round(&RealDisk, root.path(), 1, 2).unwrap();
    let test = "store::store_tests::a_limit_of_the_kernel_keeps_the_old_checkpoint";
    // `ulimit -f 64` allows 64 blocks of 512 bytes; ignoring the signal turns it into an error of `write`.
    let child = std::process::Command::new("sh")
        .args(["-c", "trap '' XFSZ; ulimit -f 64; exec \"$0\" --exact \"$1\""])
        .arg(std::env::current_exe().unwrap())
        .arg(test)
        .env(CHILD_ROOT, root.path())
        .output()
        .unwrap();
    let output = String::from_utf8_lossy(&child.stdout);
    assert!(child.status.success() && output.contains("1 passed"), "{output}");
    assert_eq!(names(root.path()), ["round-00000001"]);
    assert_is_round(&load_latest(root.path()).unwrap(), 1);
}

#[test]
fn old_checkpoints_go_and_at_least_two_stay() {
    let root = tempfile::tempdir().unwrap();
    for round in 1..=6 {
        save_round(&RealDisk, root.path(), round, 4).unwrap();
    }
    assert_eq!(rounds(root.path()), [6, 5, 4, 3]);
    save_round(&RealDisk, root.path(), 7, 0).unwrap();
    assert_eq!(rounds(root.path()), [7, 6]);
}

/// After a fallback, training passes the damaged round again: what it saves on the way must not be crowded out.
#[test]
fn a_damaged_newer_checkpoint_is_neither_counted_nor_in_the_way() {
    let root = tempfile::tempdir().unwrap();
    for round in [10, 15, 20] {
        save_round(&RealDisk, root.path(), round, 3).unwrap();
    }
    fs::remove_file(root.path().join("round-00000020/outer.safetensors")).unwrap();
    assert_is_round(&load_latest(root.path()).unwrap(), 15);
    save_round(&RealDisk, root.path(), 16, 2).unwrap();
    assert_eq!(rounds(root.path()), [20, 16, 15]);
    let loaded: Loaded<State> = load_latest(root.path()).unwrap();
    assert_is_round(&loaded, 16);
    assert!(loaded.skipped[0].reason.contains("outer.safetensors"), "{:?}", loaded.skipped);
    save_round(&RealDisk, root.path(), 20, 2).unwrap();
    assert_eq!(names(root.path()), ["round-00000016", "round-00000020"]);
    assert!(load_latest::<State>(root.path()).unwrap().skipped.is_empty());
}

#[test]
fn errors_tell_apart_nothing_damage_another_state_and_a_newer_version() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    for missing in [root.to_owned(), root.join("nowhere")] {
        assert!(matches!(load_latest::<State>(&missing), Err(LoadError::NotFound { .. })));
    }
    assert!(matches!(load::<State>(&root.join("round-00000001")), Err(LoadError::NotFound { .. })));
    let folder = save_round(&RealDisk, root, 1, 2).unwrap().path;
    assert!(matches!(load_latest::<Vec<u64>>(root), Err(LoadError::State { .. })));

    let reseal = |manifest: String| {
        fs::write(folder.join(MANIFEST_FILE), &manifest).unwrap();
        fs::write(folder.join(MANIFEST_HASH_FILE), seal_text(ContentHash::of(manifest.as_bytes()))).unwrap();
    };
    let manifest = fs::read_to_string(folder.join(MANIFEST_FILE)).unwrap();
    reseal(manifest.replace("\"version\": 1", "\"version\": 2"));
    assert!(matches!(load_latest::<State>(root), Err(LoadError::Version { found: 2, .. })));
    for (from, to) in [
        ("model.safetensors", "../../model.safetensors"),
        ("state.json", "notes.txt"),
        ("\"round\": 1", "\"round\": 7"),
        ("beringia-checkpoint", "something-else"),
    ] {
        assert!(manifest.contains(from));
        reseal(manifest.replace(from, to));
        assert!(matches!(load_latest::<State>(root), Err(LoadError::NoneIntact { .. })), "{from} -> {to}");
    }
    reseal(manifest);
    assert_is_round(&load_latest(root).unwrap(), 1);
}

#[test]
fn a_reader_refuses_what_is_beyond_its_bounds() {
    let root = tempfile::tempdir().unwrap();
    let folder = save_round(&RealDisk, root.path(), 1, 2).unwrap().path;
    let default = ReaderBounds::default;
    let cases = [
        ("manifest.json", ReaderBounds { json_bytes_max: 10, ..default() }),
        ("manifest.json", ReaderBounds { files_max: 2, ..default() }),
        ("model.safetensors", ReaderBounds { header_bytes_max: 16, ..default() }),
        ("model.safetensors", ReaderBounds { file_bytes_max: 100, ..default() }),
    ];
    for (name, bounds) in cases {
        let error = load_within::<State>(&folder, &bounds).unwrap_err();
        assert!(matches!(&error, LoadError::Damaged { path, .. } if path.ends_with(name)), "{error}");
    }
}

#[test]
fn names_that_are_not_file_names_are_not_written() {
    let root = tempfile::tempdir().unwrap();
    let named = tensors(1);
    for stem in ["", "..", "a/b", "a.b", "ünter", &"x".repeat(STEM_BYTES_MAX + 1)] {
        let saved = save(root.path(), Round(1), &[(stem, &named)], &state(1), 2);
        assert!(matches!(saved, Err(SaveError::Stem { .. })), "{stem:?}");
    }
    let twice = save(root.path(), Round(1), &[("a", &named), ("a", &named)], &state(1), 2);
    assert!(matches!(twice, Err(SaveError::Stem { .. })));
    assert_eq!(names(root.path()), Vec::<String>::new(), "nothing was touched");
}

#[test]
fn only_folders_with_exactly_our_names_are_listed() {
    let root = tempfile::tempdir().unwrap();
    for name in ["round-1", "round-000000001", "round-+0000001", "round-", "other", ".saving-round-00000001"] {
        fs::create_dir(root.path().join(name)).unwrap();
    }
    assert_eq!(list(root.path()).unwrap(), []);
    for name in ["round-00000009", "round-123456789", "round-00000009.replaced"] {
        fs::create_dir(root.path().join(name)).unwrap();
    }
    assert_eq!(rounds(root.path()), [123_456_789, 9, 9]);
    assert!(list(root.path()).unwrap()[1].path.ends_with("round-00000009"));
}
