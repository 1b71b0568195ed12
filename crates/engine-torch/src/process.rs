//! The Python process: started, connected, asked, watched and ended.
//!
//! No wait is without an end. Until the first frame there is a deadline; after it a call may take as long as the compute
//! does, but notices within [`WATCH_PERIOD`] that the process has ended, and an interrupter breaks the connection.

use crate::arena::{Arena, Layout};
use crate::leash::{Leash, MARK_VARIABLE, describe_end};
use crate::options::{Start, TorchOptions};
use crate::package::{self, PACKAGE};
use crate::protocol::{Answer, Done, FRAME_BYTES_MAX, Hello, PROTOCOL, Request};
use crate::tail::Tail;
use engine::EngineError;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::Deserialize;
use std::ffi::OsString;
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Between two looks at whether a silent process still runs.
const WATCH_PERIOD: Duration = Duration::from_millis(250);

/// How long a process whose connection ended may take to end itself, before it is killed: `torchrun` needs its own
/// period of looking after the ranks, 0.1 s.
const END_PATIENCE: Duration = Duration::from_secs(3);

/// How long a process that was asked to close may take, before it is killed.
const CLOSE_PATIENCE: Duration = Duration::from_secs(2);

/// How long building a model may take at least: a random matrix is drawn at some 10^8 elements a second, so ten minutes are
/// enough for 60 · 10^9 parameters.
const BUILD_PATIENCE: Duration = Duration::from_secs(600);

/// How long the rest of stderr is waited for after the end of the process.
const TAIL_PATIENCE: Duration = Duration::from_millis(500);

/// Whether PyTorch imports every plug-in that is installed.
const AUTOLOAD_VARIABLE: &str = "TORCH_DEVICE_BACKEND_AUTOLOAD";

/// A Python process that has connected. Dropping it ends it.
pub struct TorchProcess {
    options: TorchOptions,
    engine: String,
    leash: Arc<Leash>,
    connection: UnixStream,
    tail: Tail,
    arena: Option<Arena>,
    versions: String,
    /// Until when the call in progress may last; `None`: until somebody interrupts it.
    deadline: Option<Instant>,
    /// Why it cannot be used any more.
    gone: Option<String>,
}

/// Why an exchange of frames failed.
enum Failure {
    /// The connection is closed, or the process has ended.
    Ended,
    /// The process lives but cannot be trusted.
    Broken(String),
    /// The deadline has passed.
    Late,
}

impl TorchProcess {
    /// Starts Python, or has it started, and waits until it has connected.
    ///
    /// # Errors
    /// [`EngineError::Missing`] where Python, PyTorch or the device's plug-in is not installed; [`EngineError::Device`]
    /// where there is no such device, or the process ends or says nothing.
    pub fn start(options: &TorchOptions) -> Result<Self, EngineError> {
        Self::start_on(options, &Arc::new(Leash::default()))
    }

    /// As [`TorchProcess::start`], on a leash that others hold already.
    pub(crate) fn start_on(options: &TorchOptions, leash: &Arc<Leash>) -> Result<Self, EngineError> {
        let engine = options.engine_name();
        let fail = |reason: String| EngineError::Device { device: engine.clone(), reason };
        if let Some(conflict) = options.conflict() {
            return Err(fail(conflict));
        }
        let deadline = Instant::now() + Duration::from_secs(options.connect_seconds);
        let folder = package::unpack().map_err(|error| fail(format!("cannot unpack the Python package: {error}")))?;
        let socket = folder.path().join("engine.sock");
        let listener = UnixListener::bind(&socket)
            .map_err(|error| fail(format!("cannot listen on {}: {error}", socket.display())))?;
        leash.reset();
        let tail = launch(options, folder.path(), &socket, leash)?;
        let connected = accept(&listener, leash, deadline).and_then(|connection| prepare(connection, leash));
        let mut process = match connected {
            Ok(connection) => Self {
                options: options.clone(),
                engine,
                leash: Arc::clone(leash),
                connection,
                tail,
                arena: None,
                versions: String::new(),
                deadline: None,
                gone: None,
            },
            Err(failure) => return Err(start_error(options, &failure, leash, &tail)),
        };
        process.greet(deadline)?;
        // Python has imported all of the package on all ranks before it says hello: nobody needs the folder any more, and an
        // agent that is killed leaves nothing behind.
        drop(folder);
        Ok(process)
    }

    /// Reads and judges the first frame.
    fn greet(&mut self, deadline: Instant) -> Result<(), EngineError> {
        let answer = self.receive(Some(deadline)).map(|frame| Answer::<Hello>::parse(&frame, &self.engine));
        let hello = match answer {
            Ok(Answer::Fine(hello)) => hello,
            Ok(Answer::Refused(error)) => return Err(error),
            Ok(Answer::Broken(reason)) => return Err(self.start_error(&Failure::Broken(reason))),
            Err(failure) => return Err(self.start_error(&failure)),
        };
        let wrong = if hello.protocol != PROTOCOL {
            format!("it speaks version {} of the protocol, this agent version {PROTOCOL}", hello.protocol)
        } else if hello.rank_count != self.options.ranks {
            format!("it has {} ranks, {} were asked for", hello.rank_count, self.options.ranks)
        } else {
            self.versions = format!("Python {}, PyTorch {}", hello.python, hello.torch);
            return Ok(());
        };
        Err(self.start_error(&Failure::Broken(wrong)))
    }

    fn start_error(&mut self, failure: &Failure) -> EngineError {
        let error = start_error(&self.options, failure, &self.leash, &self.tail);
        self.gone = Some(error.to_string());
        error
    }

    pub(crate) fn options(&self) -> &TorchOptions {
        &self.options
    }

    pub(crate) fn leash(&self) -> &Arc<Leash> {
        &self.leash
    }

    /// Whether it may be asked: it has not failed so far.
    pub fn is_alive(&self) -> bool {
        self.gone.is_none()
    }

    /// Versions of Python and PyTorch, for a person to read.
    pub fn versions(&self) -> &str {
        &self.versions
    }

    /// Asks, and waits for the answer.
    pub(crate) fn ask<T>(&mut self, request: &Request<'_>) -> Result<T, EngineError>
    where
        T: for<'de> Deserialize<'de>,
    {
        if let Some(reason) = &self.gone {
            return Err(EngineError::Lost { device: self.engine.clone(), reason: reason.clone() });
        }
        match self.exchange(request).map(|frame| Answer::parse(&frame, &self.engine)) {
            Ok(Answer::Fine(answer)) => Ok(answer),
            Ok(Answer::Refused(error)) => Err(error),
            Ok(Answer::Broken(reason)) => Err(self.lose(&Failure::Broken(reason))),
            Err(failure) => Err(self.lose(&failure)),
        }
    }

    /// As [`TorchProcess::ask`] before anybody can interrupt: the wait has an end.
    pub(crate) fn ask_in_time<T>(&mut self, request: &Request<'_>) -> Result<T, EngineError>
    where
        T: for<'de> Deserialize<'de>,
    {
        let patience = Duration::from_secs(self.options.connect_seconds).max(BUILD_PATIENCE);
        self.deadline = Some(Instant::now() + patience);
        let answer = self.ask(request);
        self.deadline = None;
        answer
    }

    /// Asks for something that answers nothing but that it was done.
    pub(crate) fn tell(&mut self, request: &Request<'_>) -> Result<(), EngineError> {
        match self.ask::<Done>(request)?.ok {
            true => Ok(()),
            false => Err(self.distrust("it answers neither that it is done nor why not")),
        }
    }

    /// Ends a process whose answer cannot be true.
    pub(crate) fn distrust(&mut self, reason: impl Into<String>) -> EngineError {
        self.lose(&Failure::Broken(reason.into()))
    }

    fn lose(&mut self, failure: &Failure) -> EngineError {
        let reason = self.gone.insert(why_gone(failure, &self.leash, &self.tail)).clone();
        self.arena = None;
        let device = self.engine.clone();
        // Only rank 0 can answer; of another rank's want of memory there is no more than what it wrote. A smaller micro-batch
        // mends it, in the process that is started for the call after this one.
        match self.out_of_memory_elsewhere(failure) {
            Some(reason) => EngineError::OutOfMemory { device, reason },
            None => EngineError::Lost { device, reason },
        }
    }

    fn out_of_memory_elsewhere(&self, failure: &Failure) -> Option<String> {
        let may_be = self.options.ranks > 1 && matches!(failure, Failure::Ended) && !self.leash.is_interrupted();
        let wrote = || self.tail.last_line(TAIL_PATIENCE, |line| line.to_lowercase().contains("out of memory"));
        may_be.then(wrote).flatten()
    }

    /// Shared memory of at least the layout's length. What an earlier arena held is lost.
    pub(crate) fn arena(&mut self, layout: &Layout) -> Result<&Arena, EngineError> {
        let bytes = layout.bytes();
        if self.arena.as_ref().is_none_or(|arena| arena.bytes() < bytes) {
            let no_memory = |error: io::Error| {
                let reason = format!("cannot reserve {bytes} bytes of shared memory: {error}");
                EngineError::Device { device: self.engine.clone(), reason }
            };
            let mut arena = Arena::create(bytes).map_err(no_memory)?;
            let path = arena.path().map(|path| path.to_string_lossy().into_owned()).unwrap_or_default();
            self.tell(&Request::Arena { path: &path, bytes: arena.bytes() })?;
            arena.unlink();
            self.arena = Some(arena);
        }
        match &self.arena {
            Some(arena) => Ok(arena),
            None => {
                Err(EngineError::Lost { device: self.engine.clone(), reason: "it has no shared memory".to_owned() })
            }
        }
    }

    /// What a read or write of the arena that failed means.
    pub(crate) fn arena_error(&mut self, error: &io::Error) -> EngineError {
        self.distrust(format!("its shared memory cannot be used: {error}"))
    }

    fn exchange(&mut self, request: &Request<'_>) -> Result<Vec<u8>, Failure> {
        self.send(request)?;
        self.receive(self.deadline)
    }

    fn send(&mut self, request: &Request<'_>) -> Result<(), Failure> {
        let text = serde_json::to_vec(request).map_err(|error| Failure::Broken(error.to_string()))?;
        if text.len() > FRAME_BYTES_MAX {
            return Err(Failure::Broken(format!("a request of {} bytes is too long", text.len())));
        }
        let mut frame = (text.len() as u32).to_le_bytes().to_vec();
        frame.extend(text);
        let mut rest = &frame[..];
        while !rest.is_empty() {
            match self.connection.write(rest) {
                Ok(0) => return Err(Failure::Ended),
                Ok(written) => rest = &rest[written..],
                Err(error) => self.judge(&error, self.deadline)?,
            }
        }
        Ok(())
    }

    fn receive(&mut self, deadline: Option<Instant>) -> Result<Vec<u8>, Failure> {
        let mut length = [0; 4];
        self.fill(&mut length, deadline)?;
        let length = u32::from_le_bytes(length) as usize;
        if length > FRAME_BYTES_MAX {
            return Err(Failure::Broken(format!("it sends a frame of {length} bytes, more than {FRAME_BYTES_MAX}")));
        }
        let mut frame = vec![0; length];
        self.fill(&mut frame, deadline)?;
        Ok(frame)
    }

    fn fill(&mut self, mut rest: &mut [u8], deadline: Option<Instant>) -> Result<(), Failure> {
        while !rest.is_empty() {
            match self.connection.read(rest) {
                Ok(0) => return Err(Failure::Ended),
                Ok(length) => rest = &mut rest[length..],
                Err(error) => self.judge(&error, deadline)?,
            }
        }
        Ok(())
    }

    /// Whether to try again after an error of the connection.
    fn judge(&self, error: &io::Error, deadline: Option<Instant>) -> Result<(), Failure> {
        match error.kind() {
            ErrorKind::Interrupted => Ok(()),
            // The period is over. A process that ended but left its connection to a child would else be waited for.
            ErrorKind::WouldBlock | ErrorKind::TimedOut => match deadline {
                _ if self.leash.ended().is_some() => Err(Failure::Ended),
                Some(deadline) if Instant::now() >= deadline => Err(Failure::Late),
                _ => Ok(()),
            },
            _ => Err(Failure::Ended),
        }
    }
}

impl Drop for TorchProcess {
    fn drop(&mut self) {
        if self.gone.is_none() && self.send(&Request::Close {}).is_ok() {
            self.leash.ended_within(CLOSE_PATIENCE);
        }
        self.leash.end(END_PATIENCE);
    }
}

/// Reads and writes look up every [`WATCH_PERIOD`].
fn prepare(connection: UnixStream, leash: &Leash) -> Result<UnixStream, Failure> {
    let set = || {
        connection.set_nonblocking(false)?;
        connection.set_read_timeout(Some(WATCH_PERIOD))?;
        connection.set_write_timeout(Some(WATCH_PERIOD))?;
        connection.try_clone()
    };
    leash.hold_connection(set().map_err(|error| Failure::Broken(error.to_string()))?);
    Ok(connection)
}

/// Waits for Python to connect.
fn accept(listener: &UnixListener, leash: &Leash, deadline: Instant) -> Result<UnixStream, Failure> {
    let period = Timespec { tv_sec: 0, tv_nsec: i64::from(WATCH_PERIOD.subsec_nanos()) };
    loop {
        let mut listening = [PollFd::new(listener, PollFlags::IN)];
        if let Ok(1..) = poll(&mut listening, Some(&period)) {
            return listener.accept().map(|(stream, _)| stream).map_err(|error| Failure::Broken(error.to_string()));
        }
        if leash.ended().is_some() || leash.is_interrupted() {
            return Err(Failure::Ended);
        }
        if Instant::now() >= deadline {
            return Err(Failure::Late);
        }
    }
}

/// A port on this host that nobody listens on now; 0, which no rank can meet at, where there is none.
fn free_port() -> u16 {
    let bound = std::net::TcpListener::bind((std::net::Ipv4Addr::LOCALHOST, 0));
    bound.and_then(|listener| listener.local_addr()).map_or(0, |address| address.port())
}

/// What a batch system or an outer `torchrun` tells its own processes, and would make ours take themselves for ranks of that
/// job: `torchrun` sets them anew for each of our ranks.
const CLUSTER_VARIABLES: [&str; 7] =
    ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"];

/// The command that makes Python connect to `socket`: program, arguments and what is added to the environment.
struct CommandLine {
    words: Vec<OsString>,
    environment: Vec<(&'static str, OsString)>,
}

impl CommandLine {
    /// `master_port` is where ranks meet.
    fn new(options: &TorchOptions, folder: &Path, socket: &Path, master_port: u16) -> Self {
        let mut words = vec![options.interpreter().into_os_string(), "-u".into(), "-m".into()];
        if options.ranks > 1 {
            let (ranks, port) = (options.ranks.to_string(), master_port.to_string());
            // Not `--standalone`: its rendezvous unpickles what it reads from a store on this host.
            let nodes = ["--nnodes", "1", "--master-addr", "127.0.0.1", "--master-port", &port];
            let launcher = [&["torch.distributed.run"], &nodes[..], &["--nproc-per-node", &ranks, "-m"]].concat();
            words.extend(launcher.into_iter().map(OsString::from));
        }
        words.extend([PACKAGE.into(), "--socket".into(), socket.into()]);
        let (precision, compile) = (options.precision.to_string(), options.compile.to_string());
        for word in ["--device", &options.device, "--precision", &precision, "--compile", &compile] {
            words.push(word.into());
        }
        if let Some(threads) = options.threads {
            words.extend(["--threads".into(), threads.to_string().into()]);
        }
        Self { words, environment: environment(folder) }
    }

    /// For a POSIX shell.
    fn line(&self) -> String {
        let removed = CLUSTER_VARIABLES.iter().map(|name| format!("-u {name}"));
        let variables = self.environment.iter().map(|(name, value)| format!("{name}={}", quoted(value)));
        let words = self.words.iter().map(|word| quoted(word));
        ["env".to_owned()].into_iter().chain(removed).chain(variables).chain(words).collect::<Vec<_>>().join(" ")
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.words[0]);
        command.args(&self.words[1..]).envs(self.environment.iter().map(|(name, value)| (name, value)));
        CLUSTER_VARIABLES.iter().for_each(|name| {
            command.env_remove(name);
        });
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        command
    }
}

/// What Python needs to find the package, and we to find Python.
pub(crate) fn environment(folder: &Path) -> Vec<(&'static str, OsString)> {
    let mut path = folder.as_os_str().to_owned();
    if let Some(inherited) = std::env::var_os("PYTHONPATH").filter(|value| !value.is_empty()) {
        path.push(":");
        path.push(inherited);
    }
    let on = || OsString::from("1");
    // Nothing is imported from the folder that the agent happens to run in.
    let switches = [("PYTHONSAFEPATH", on()), ("PYTHONDONTWRITEBYTECODE", on())];
    // `torchrun` imports PyTorch before our package can say so: a plug-in that is broken must not break other devices.
    let autoload = std::env::var_os(AUTOLOAD_VARIABLE).unwrap_or_else(|| OsString::from("0"));
    let own = [("PYTHONPATH", path), (MARK_VARIABLE, folder.into()), (AUTOLOAD_VARIABLE, autoload)];
    own.into_iter().chain(switches).collect()
}

/// `word` as a shell reads it back.
fn quoted(word: &std::ffi::OsStr) -> String {
    let text = word.to_string_lossy();
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+:=,@%".contains(c);
    match !text.is_empty() && text.chars().all(plain) {
        true => text.into_owned(),
        false => format!("'{}'", text.replace('\'', r"'\''")),
    }
}

/// Starts Python, or shows how.
fn launch(options: &TorchOptions, folder: &Path, socket: &Path, leash: &Leash) -> Result<Tail, EngineError> {
    let line = CommandLine::new(options, folder, socket, free_port());
    match &options.start {
        Start::Print(show) => {
            show(&line.line());
            Ok(Tail::default())
        }
        Start::Spawn => {
            // A process group of its own: Ctrl-C ends the agent, and the agent ends Python.
            let spawned = line.command().process_group(0).spawn();
            let mut child = spawned.map_err(|error| spawn_error(&options.engine_name(), &line.words[0], &error))?;
            let tail = child.stderr.take().map(Tail::follow).unwrap_or_default();
            leash.hold(child, folder.to_string_lossy().into_owned());
            Ok(tail)
        }
    }
}

/// Why an interpreter cannot be started.
pub(crate) fn spawn_error(engine: &str, program: &std::ffi::OsStr, error: &io::Error) -> EngineError {
    let program = program.to_string_lossy();
    match error.kind() {
        ErrorKind::NotFound => EngineError::Missing {
            engine: engine.to_owned(),
            what: "Python 3.11 or newer".to_owned(),
            reason: format!("there is no '{program}'"),
            install: "sudo apt-get install python3 python3-pip && python3 -m pip install torch".to_owned(),
        },
        _ => EngineError::Device { device: engine.to_owned(), reason: format!("cannot start '{program}': {error}") },
    }
}

/// Why Python did not come up: it is ended, and its last lines are quoted.
fn start_error(options: &TorchOptions, failure: &Failure, leash: &Leash, tail: &Tail) -> EngineError {
    let reason = why_gone(failure, leash, tail);
    let lines = tail.lines(TAIL_PATIENCE);
    let device = options.engine_name();
    // Our package says so itself; `torchrun` is part of what is missing.
    if lines.iter().any(|line| line.contains("No module named 'torch") || line.contains("No module named torch")) {
        return EngineError::Missing {
            engine: device,
            what: "PyTorch".to_owned(),
            reason: lines.last().cloned().unwrap_or_default(),
            install: format!("{} -m pip install torch", quoted(options.interpreter().as_os_str())),
        };
    }
    let said = if lines.is_empty() { String::new() } else { format!(". It said:\n{}", lines.join("\n")) };
    EngineError::Device { device, reason: format!("the PyTorch engine did not start: {reason}{said}") }
}

/// How the process ended, after it is certain that it did.
fn why_gone(failure: &Failure, leash: &Leash, tail: &Tail) -> String {
    let ended = match failure {
        Failure::Ended => leash.ended_within(END_PATIENCE),
        Failure::Broken(_) | Failure::Late => None,
    };
    let interrupted = leash.is_interrupted();
    leash.end(END_PATIENCE);
    let reason = match (failure, ended) {
        (Failure::Broken(reason), _) => return format!("{reason}; it was ended"),
        (Failure::Late, _) => return "it did not answer in time; it was ended".to_owned(),
        (Failure::Ended, _) if interrupted => "it was ended because it did not answer".to_owned(),
        (Failure::Ended, Some(status)) => describe_end(status),
        (Failure::Ended, None) => "its connection ended".to_owned(),
    };
    match tail.lines(TAIL_PATIENCE).last() {
        Some(line) => format!("{reason}; its last words: {line}"),
        None => reason,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_can_be_pasted_into_a_shell() {
        let options = TorchOptions {
            python: Some("/opt/it's here/python".into()),
            threads: Some(2),
            ranks: 4,
            ..TorchOptions::new("cuda")
        };
        let line = CommandLine::new(&options, Path::new("/f"), Path::new("/f/engine.sock"), 29_500).line();
        let autoload = std::env::var(AUTOLOAD_VARIABLE).unwrap_or_else(|_| "0".to_owned());
        let variables = format!("BERINGIA_TORCH_FOLDER=/f {AUTOLOAD_VARIABLE}={autoload} ");
        assert!(line.contains(&variables), "{line}");
        let expected = " PYTHONSAFEPATH=1 PYTHONDONTWRITEBYTECODE=1 '/opt/it'\\''s here/python' -u -m \
            torch.distributed.run --nnodes 1 --master-addr 127.0.0.1 --master-port 29500 --nproc-per-node 4 \
            -m beringia_torch --socket /f/engine.sock --device cuda --precision auto --compile auto --threads 2";
        assert!(line.starts_with("env -u RANK -u WORLD_SIZE -u LOCAL_RANK "), "{line}");
        assert!(line.contains(" -u MASTER_PORT PYTHONPATH=/f"), "{line}");
        assert!(line.ends_with(expected), "{line}");
    }

    #[test]
    fn an_outer_job_is_not_inherited() {
        let command = CommandLine::new(&TorchOptions::new("cpu"), Path::new("/f"), Path::new("/f/s"), 1).command();
        let removed: Vec<_> = command.get_envs().filter(|(_, value)| value.is_none()).map(|(name, _)| name).collect();
        assert!(CLUSTER_VARIABLES.iter().all(|name| removed.contains(&std::ffi::OsStr::new(name))), "{removed:?}");
    }

    #[test]
    fn one_rank_needs_no_torchrun() {
        let options = TorchOptions { python: Some("python3".into()), ..TorchOptions::new("cpu") };
        let line = CommandLine::new(&options, Path::new("/f"), Path::new("/f/engine.sock"), 29_500).line();
        assert!(line.contains(" python3 -u -m beringia_torch --socket /f/engine.sock --device cpu "), "{line}");
    }
}
