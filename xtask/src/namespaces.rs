//! Network namespaces of one bench, and what is made in them with `ip` and `tc`. Needs root.
//!
//! Namespaces have names of this process. A guard process removes them, with all that runs in them, when they are dropped
//! or this process ends, however it ends: it waits for its standard input to close.

use crate::runs::Failure;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// What the guard does.
const GUARD: &str = "trap '' INT TERM HUP; read -r _; for n in \"$@\"; do \
                     for p in $(ip netns pids \"$n\"); do kill -9 \"$p\"; done; ip netns del \"$n\"; done";

/// Namespaces with their loopback devices up, until dropped.
pub(crate) struct Namespaces {
    names: Vec<String>,
    guard: Child,
}

impl Namespaces {
    /// Makes one for each of `ends`; `bench` tells those of one process apart. What is made before a failure is removed, too.
    ///
    /// # Errors
    /// Not root, or no `ip`.
    pub(crate) fn make(bench: &str, ends: &[&str]) -> Result<Self, Failure> {
        let names: Vec<String> = ends.iter().map(|end| format!("{bench}{}-{end}", std::process::id())).collect();
        let mut guard = Command::new("sh");
        guard.args(["-c", GUARD, "sh"]).args(&names).stdin(Stdio::piped());
        let guard = guard.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        // From here on dropping cleans up, whatever fails.
        let namespaces = Self { names, guard };
        for name in &namespaces.names {
            run(Command::new("ip").args(["netns", "add", name])).map_err(|error| {
                format!("{error}\nhint: network namespaces need root, and the packages iproute2 and iperf3")
            })?;
            ip(name, "link set lo up")?;
        }
        Ok(namespaces)
    }

    /// The name of the namespace of that number.
    pub(crate) fn name(&self, index: usize) -> &str {
        &self.names[index]
    }

    /// A command in a namespace, still without the program.
    pub(crate) fn inside(&self, index: usize) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", self.name(index)]);
        command
    }

    /// A program in a namespace.
    pub(crate) fn command(&self, index: usize, program: &Path) -> Command {
        let mut command = self.inside(index);
        command.arg(program);
        command
    }

    /// Joins two namespaces by a pair of devices of that name.
    ///
    /// # Errors
    /// What `ip` says.
    pub(crate) fn join(&self, first: usize, second: usize, device: &str) -> Result<(), Failure> {
        let pair = ["link", "add", device, "netns", self.name(first), "type", "veth", "peer", "name", device];
        run(Command::new("ip").args(pair).args(["netns", self.name(second)]))
    }

    /// Gives a device an address, as `10.0.0.1/24`, and brings it up.
    ///
    /// # Errors
    /// What `ip` says.
    pub(crate) fn address(&self, index: usize, device: &str, address: &str) -> Result<(), Failure> {
        ip(self.name(index), &format!("address add {address} dev {device}"))?;
        ip(self.name(index), &format!("link set {device} up"))
    }

    /// Shapes what leaves by a device, instead of what shaped it before.
    ///
    /// # Errors
    /// What `tc` says.
    pub(crate) fn shape(&self, index: usize, device: &str, tbf: Tbf) -> Result<(), Failure> {
        let Tbf { bits_per_second, burst_bytes, limit_bytes } = tbf;
        // Not `replace`: a packet that waits and is longer than a new, smaller burst would never leave, nor what is behind it. That there
        // was nothing to delete is no error.
        let _ = self.tc(index, &format!("qdisc delete dev {device} root"));
        let bucket = format!("rate {bits_per_second}bit burst {burst_bytes} limit {limit_bytes}");
        self.tc(index, &format!("qdisc add dev {device} root tbf {bucket}"))
    }

    /// `tc` in a namespace.
    fn tc(&self, index: usize, words: &str) -> Result<(), Failure> {
        run(Command::new("tc").args(["-n", self.name(index)]).args(words.split(' ')))
    }

    /// Ends all that runs in the namespaces.
    pub(crate) fn kill_all(&self) {
        for name in &self.names {
            let script = format!("for p in $(ip netns pids {name}); do kill -9 $p; done");
            // What has just ended by itself cannot be killed, which is as well.
            let _ = Command::new("sh").args(["-c", &script]).stderr(Stdio::null()).status();
        }
    }
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        drop(self.guard.stdin.take());
        // It ends by itself; what it could not remove was never made.
        let _ = self.guard.wait();
    }
}

/// A token bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tbf {
    /// Of packets with their Ethernet headers.
    pub(crate) bits_per_second: u64,
    /// What may leave at once.
    pub(crate) burst_bytes: u64,
    /// What waits at most; more is dropped.
    pub(crate) limit_bytes: u64,
}

/// `ip -n NAMESPACE` with these words.
///
/// # Errors
/// As [`run`].
pub(crate) fn ip(namespace: &str, words: &str) -> Result<(), Failure> {
    run(Command::new("ip").args(["-n", namespace]).args(words.split(' ')))
}

/// Runs a command to its end.
///
/// # Errors
/// The program, and what it said.
pub(crate) fn run(command: &mut Command) -> Result<(), Failure> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.stdin(Stdio::null()).output().map_err(|error| format!("{program}: {error}"))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(format!("{program}: {}", String::from_utf8_lossy(&output.stderr).trim()).into()),
    }
}
