//! Runs of several processes, as a user starts them, bounded in time and with nothing left behind.
//!
//! A test waits for what a process says or logs, never for time to pass; a wait that takes longer than
//! [`PATIENCE`] fails the test and shows what the processes said.

use base::ContentHash;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use telemetry::{Circumstances, Event, Finding, LedgerCounts, ProcessLog, Record, RunLogs, audit};
use tempfile::TempDir;

/// Longest wait for anything: a busy machine may need half a minute for what takes a second.
pub(crate) const PATIENCE: Duration = Duration::from_secs(150);

/// Between two looks at a log.
const POLL: Duration = Duration::from_millis(20);

/// A model of some 20 thousand parameters, and batches of 8 samples.
pub(crate) const TINY_MODEL: [&str; 9] = [
    "model.hidden_size=32",
    "model.intermediate_size=48",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=4",
    "model.num_key_value_heads=2",
    "model.max_position_embeddings=32",
    "data.sequence_length=32",
    "train.batch_samples=8",
    "train.micro_batch_samples=8",
];

/// A run of it in rounds of 4 steps.
const TINY_RUN: [&str; 7] = [
    "train.warmup_steps=2",
    "train.steps=40",
    "sync.inner_steps=4",
    "evaluate.samples_max=8",
    "evaluate.sample_tokens=0",
    "evaluate.every_rounds=5",
    "checkpoint.every_rounds=5",
];

/// Looks again until there is something.
pub(crate) fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(began.elapsed() < PATIENCE, "waited {PATIENCE:?} for {what}");
        std::thread::sleep(POLL); // tidy: the interval of a poll that ends with its event or its deadline
    }
}

/// Where `cargo xtask faults` collects what tests have measured.
const FIGURES_FOLDER: &str = "BERINGIA_FIGURES";

/// Leaves a figure of that name for `cargo xtask faults`, where it asks for figures.
pub(crate) fn figure(name: &str, text: &str) {
    if let Some(folder) = std::env::var_os(FIGURES_FOLDER) {
        fs::write(Path::new(&folder).join(name), text).unwrap();
    }
}

/// A process of the binary under test. It does not outlive this value.
pub(crate) struct Process {
    name: String,
    child: Child,
    stdout: PathBuf,
    stderr: PathBuf,
}

/// What a process that ended has left.
#[derive(Debug)]
pub(crate) struct Ended {
    /// Exit status; none after a signal.
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ended {
    /// The last line of standard output.
    pub(crate) fn object(&self) -> Value {
        let object = self.stdout.lines().last().and_then(|line| serde_json::from_str(line).ok());
        object.unwrap_or_else(|| panic!("no object: {self:?}"))
    }

    /// The lines of a failure, without the warnings before it.
    pub(crate) fn failure(&self) -> &str {
        assert_eq!(self.code, Some(1), "{self:?}");
        let start = self.stderr.find("error: ").unwrap_or_else(|| panic!("no error: {self:?}"));
        &self.stderr[start..]
    }
}

impl Process {
    pub(crate) fn start(place: &Place, name: &str, command: &mut Command) -> Self {
        let number = fs::read_dir(place.path()).unwrap().count();
        let path = |stream: &str| place.join(&format!("{number}-{name}.{stream}"));
        let (stdout, stderr) = (path("stdout"), path("stderr"));
        command.stdin(Stdio::null()).stdout(File::create(&stdout).unwrap()).stderr(File::create(&stderr).unwrap());
        Self { name: name.to_owned(), child: command.spawn().unwrap(), stdout, stderr }
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn stdout(&self) -> String {
        fs::read_to_string(&self.stdout).unwrap()
    }

    fn stderr(&self) -> String {
        fs::read_to_string(&self.stderr).unwrap()
    }

    pub(crate) fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// Waits for its end.
    pub(crate) fn end(mut self) -> Ended {
        let name = self.name.clone();
        let status = wait_for(&format!("the end of {name}"), || self.child.try_wait().unwrap());
        Ended { code: status.code(), stdout: self.stdout(), stderr: self.stderr() }
    }

    /// Waits for an end that must be good, and gives its object.
    pub(crate) fn object(self) -> Value {
        let ended = self.end();
        assert_eq!(ended.code, Some(0), "{ended:?}");
        ended.object()
    }

    /// SIGTERM.
    pub(crate) fn terminate(&self) {
        self.signal("TERM");
    }

    /// Sends a signal by its name.
    pub(crate) fn signal(&self, name: &str) {
        let sent = Command::new("kill").args([&format!("-{name}"), &self.id().to_string()]).status();
        assert!(sent.unwrap().success());
    }

    /// SIGKILL, and waits until it is gone.
    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// The most memory it has had, in bytes.
    pub(crate) fn memory_bytes_max(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _gone = self.child.kill();
            let _gone = self.child.wait();
        }
        if std::thread::panicking() {
            eprintln!("--- {} said:\n{}{}", self.name, self.stdout(), self.stderr());
        }
    }
}

/// A folder for one test, with texts in it.
pub(crate) struct Place(TempDir);

impl Place {
    pub(crate) fn new() -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        fs::create_dir(place.join("texts")).unwrap();
        for (index, lines) in [300, 500].into_iter().enumerate() {
            fs::write(place.join(&format!("texts/{index}.txt")), sentences(lines)).unwrap();
        }
        place
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn join(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    /// The binary under test, in this folder.
    pub(crate) fn beringia(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_beringia"));
        command.args(arguments).current_dir(self.path());
        command
    }

    /// Runs a command to its end.
    pub(crate) fn ended(&self, arguments: &[&str]) -> Ended {
        Process::start(self, arguments[0], &mut self.beringia(arguments)).end()
    }

    /// The object of a command that must succeed.
    pub(crate) fn object(&self, arguments: &[&str]) -> Value {
        Process::start(self, arguments[0], &mut self.beringia(&[&["--json"], arguments].concat())).object()
    }

    /// A new tiny run with these settings.
    pub(crate) fn init(&self, run: &str, settings: &[&str]) {
        let mut arguments = vec!["init", run, "--data", "texts", "--vocabulary", "300"];
        for setting in TINY_MODEL.iter().chain(&TINY_RUN).chain(settings) {
            arguments.extend(["--set", setting]);
        }
        self.object(&arguments);
    }

    pub(crate) fn copy(&self, from: &str, to: &str) {
        assert!(Command::new("cp").arg("-r").arg(self.join(from)).arg(self.join(to)).status().unwrap().success());
    }

    /// Events logged in a folder so far.
    pub(crate) fn events(&self, folder: &str) -> Vec<Record> {
        let path = self.join(folder).join("events.jsonl");
        match path.exists() {
            true => telemetry::read(&path).unwrap().map(Result::unwrap).collect(),
            false => Vec::new(),
        }
    }

    /// Waits for an event in a folder's log.
    pub(crate) fn wait_for_event<T>(&self, folder: &str, what: &str, mut is: impl FnMut(&Event) -> Option<T>) -> T {
        let look = || self.events(folder).iter().find_map(|record| is(&record.event));
        wait_for(&format!("{what} in {folder}"), look)
    }

    /// Waits until a site is in the middle of that round.
    pub(crate) fn wait_for_step(&self, site: &str, wanted: u64) {
        self.wait_for_event(site, &format!("a step of round {wanted}"), |event| match event {
            Event::Step { round, .. } if round.0 == wanted => Some(()),
            _ => None,
        });
    }

    /// Waits for that round's commit at the coordinator.
    pub(crate) fn wait_for_commit(&self, run: &str, wanted: u64) {
        self.wait_for_event(run, &format!("the commit of round {wanted}"), |event| match event {
            Event::RoundCommitted { round, .. } if round.0 >= wanted => Some(()),
            _ => None,
        });
    }
}

/// Sentences of 8 words that follow one another without a plan but always alike.
fn sentences(count: usize) -> String {
    const WORDS: [&str; 12] =
        ["sea", "land", "bridge", "ice", "north", "wind", "herd", "walks", "over", "naïve", "under", "the"];
    let word = |at: usize| WORDS[(at * at + at / 7) % WORDS.len()];
    (0..count).map(|line| (0..8).map(|at| word(line * 8 + at)).collect::<Vec<_>>().join(" ") + ".\n").collect()
}

/// A coordinator and the invite that it has printed.
pub(crate) struct Coordinator {
    pub(crate) process: Process,
    pub(crate) invite: String,
}

impl Coordinator {
    pub(crate) fn start(place: &Place, run: &str, arguments: &[&str]) -> Self {
        let listen: &[&str] = if arguments.contains(&"--listen") { &[] } else { &["--listen", "127.0.0.1:0"] };
        let mut command = place.beringia(&[&["serve", run], listen, arguments].concat());
        let mut process = Process::start(place, &format!("serve-{run}"), &mut command);
        let invite = wait_for("the invite", || {
            // With `--json`, standard output is for the summary alone.
            let said = process.stdout() + &process.stderr();
            let invite = said.lines().find_map(|line| {
                line.trim().strip_prefix("beringia join ").filter(|invite| !invite.is_empty()).map(str::to_owned)
            });
            assert!(invite.is_some() || !process.has_ended(), "the coordinator ended: {}", process.stderr());
            invite
        });
        Self { process, invite }
    }

    /// Where it listens.
    pub(crate) fn address(&self) -> String {
        self.invite.parse::<wire::Invite>().unwrap().address().to_owned()
    }

    /// A site in the folder of its name.
    pub(crate) fn join(&self, place: &Place, site: &str, arguments: &[&str]) -> Process {
        join(place, &self.invite, site, arguments)
    }

    pub(crate) fn join_all(&self, place: &Place, sites: &[&str]) -> Vec<Process> {
        sites.iter().map(|site| self.join(place, site, &[])).collect()
    }
}

pub(crate) fn join(place: &Place, invite: &str, site: &str, arguments: &[&str]) -> Process {
    join_with(place, invite, site, arguments, &[])
}

/// With an environment.
pub(crate) fn join_with(
    place: &Place,
    invite: &str,
    site: &str,
    arguments: &[&str],
    environment: &[(&str, String)],
) -> Process {
    let fixed = ["--json", "join", invite, "--name", site, "--folder", site, "--listen", "127.0.0.1:0"];
    // One thread: bits do not depend on how many processors the machine has.
    let speed = ["--threads", "1", "--measure-seconds", "0"];
    let mut command = place.beringia(&[&fixed[..], &speed, arguments].concat());
    Process::start(place, site, command.envs(environment.iter().map(|(name, value)| (name, value))))
}

/// Hash of the state after each round, as one log has it. A round that was made anew counts as it was made last.
pub(crate) fn hashes(records: &[Record]) -> BTreeMap<u64, ContentHash> {
    let of = |record: &Record| match &record.event {
        Event::RoundCommitted { round, state_hash, .. } | Event::RoundApplied { round, state_hash, .. } => {
            Some((round.0, *state_hash))
        }
        _ => None,
    };
    records.iter().filter_map(of).collect()
}

/// No invariant is violated in the logs of the coordinator and these sites, of all their lives; their states were compared.
pub(crate) fn assert_invariants(place: &Place, run: &str, sites: &[&str]) {
    let log = |name: &str, folder: &str| ProcessLog::read(name, &place.join(folder).join("events.jsonl")).unwrap();
    let sites = sites.iter().map(|site| log(site, site)).collect();
    let findings = audit(&RunLogs { coordinator: log("coordinator", run), sites }, &Circumstances::default());
    assert!(findings.iter().all(Finding::is_held), "{findings:#?}");
    assert!(findings[0].checked > 0, "no state was compared");
}

/// I1: after every commit, everybody who logged the state held the same one; and the other invariants, as far as logs show them.
pub(crate) fn assert_identical_after_every_commit(place: &Place, run: &str, sites: &[&str]) {
    assert_invariants(place, run, sites);
    let mut agreed = hashes(&place.events(run));
    assert!(!agreed.is_empty(), "no commit was logged");
    for site in sites {
        for (round, hash) in hashes(&place.events(site)) {
            // The coordinator has no line for a commit at which it was killed; the sites must agree all the same.
            assert_eq!(*agreed.entry(round).or_insert(hash), hash, "{site} after round {round}");
        }
    }
}

/// I2: what was leased is committed, returned or lost.
pub(crate) fn assert_ledger_adds_up(ledger: &Value) -> LedgerCounts {
    let counts: LedgerCounts = serde_json::from_value(ledger.clone()).unwrap();
    assert_eq!(counts.leased, counts.committed + counts.returned + counts.lost, "{counts:?}");
    counts
}
