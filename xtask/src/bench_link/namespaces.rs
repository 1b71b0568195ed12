//! Two ends and a router between them, as network namespaces: the link that is measured.
//!
//! ```text
//! near ---- line or veth ---- router ---- veth ---- far
//! ```
//! The router's queues are `tbf`: the rate, and a queue that drops what does not fit. They stand apart from the senders on
//! purpose: on its own device a sender feels a full queue at once, on a router it only sees loss, as in a real network.

use super::delay_line::{self, DelayLine, checked};
use crate::runs::Failure;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// The link to be made.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    pub(super) megabits: u32,
    /// Added to each round trip.
    pub(super) delay: Duration,
    /// What the router holds at most, as time at the link's rate.
    pub(super) queue: Duration,
}

/// Bytes that leave at once: 4 packets of 64 KiB, 2 ms at 1 Gbit/s. Under one such packet, `tbf` has to cut them.
const BURST_BYTES: u64 = 256 * 1024;

/// Addresses of the two ends.
pub(super) const NEAR: &str = "10.91.1.1";
pub(super) const FAR: &str = "10.91.2.1";

/// What the shell does that outlives us: when its standard input ends, however we ended, it removes the namespaces and
/// whatever still runs in them.
const JANITOR: &str = "trap '' INT TERM HUP; read -r _; for name in \"$@\"; do \
                       ip netns pids \"$name\" 2>/dev/null | xargs -r kill; ip netns del \"$name\" 2>/dev/null; done";

/// The namespaces; dropping them removes all of it.
pub(super) struct Link {
    names: [String; 3],
    line: Option<DelayLine>,
    janitor: Child,
}

impl Link {
    /// Makes the link.
    ///
    /// # Errors
    /// Not root, or a tool or a kernel's module is missing.
    pub(super) fn make(shape: Shape) -> Result<Self, Failure> {
        let names = ["near", "router", "far"].map(|name| format!("bl{}-{name}", std::process::id()));
        let janitor = Command::new("sh").args(["-c", JANITOR, "sh"]).args(&names).stdin(Stdio::piped()).spawn()?;
        // From here on dropping cleans up, whatever fails.
        let mut link = Self { names, line: None, janitor };
        for name in &link.names {
            ip(&["netns", "add", name])?;
            ip(&["-n", name, "link", "set", "lo", "up"])?;
        }
        link.line = link.join_near(shape.delay)?;
        link.join_far()?;
        link.shape(shape)?;
        Ok(link)
    }

    /// The near end's namespace.
    pub(super) fn near(&self) -> &str {
        &self.names[0]
    }

    /// The far end's namespace.
    pub(super) fn far(&self) -> &str {
        &self.names[2]
    }

    /// Packets the delay line itself dropped: it must be none for its delay to be all it does.
    pub(super) fn line_drops(&self) -> u64 {
        self.line.as_ref().map_or(0, DelayLine::dropped)
    }

    fn join_near(&self, delay: Duration) -> Result<Option<DelayLine>, Failure> {
        let [near, router, _] = &self.names;
        let device = delay_line::DEVICE;
        let line = match delay.is_zero() {
            true => {
                ip(&["-n", near, "link", "add", device, "type", "veth", "peer", "name", device, "netns", router])?;
                None
            }
            false => Some(DelayLine::between(near, router, delay / 2)?),
        };
        address(near, device, &format!("{NEAR}/24"))?;
        address(router, device, "10.91.1.2/24")?;
        ip(&["-n", near, "route", "add", "default", "via", "10.91.1.2"])?;
        Ok(line)
    }

    fn join_far(&self) -> Result<(), Failure> {
        let [_, router, far] = &self.names;
        ip(&["-n", router, "link", "add", "far0", "type", "veth", "peer", "name", "far0", "netns", far])?;
        address(far, "far0", &format!("{FAR}/24"))?;
        address(router, "far0", "10.91.2.2/24")?;
        ip(&["-n", far, "route", "add", "default", "via", "10.91.2.2"])?;
        ip(&["netns", "exec", router, "sysctl", "-q", "-w", "net.ipv4.ip_forward=1"])
    }

    fn shape(&self, shape: Shape) -> Result<(), Failure> {
        let rate = format!("{}mbit", shape.megabits);
        let limit_bytes = (f64::from(shape.megabits) * 1e6 / 8.0 * shape.queue.as_secs_f64()) as u64;
        let (limit, burst) = (limit_bytes.max(2 * BURST_BYTES).to_string(), BURST_BYTES.to_string());
        for device in [delay_line::DEVICE, "far0"] {
            let tbf =
                ["qdisc", "replace", "dev", device, "root", "tbf", "rate", &rate, "burst", &burst, "limit", &limit];
            run(Command::new("tc").args(["-n", &self.names[1]]).args(tbf))?;
        }
        Ok(())
    }

    /// A command that runs in one of the namespaces.
    pub(super) fn command(namespace: &str, program: &std::path::Path) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", namespace]).arg(program);
        command
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.line = None;
        drop(self.janitor.stdin.take());
        // It ends by itself; what it could not remove was never made.
        let _ = self.janitor.wait();
    }
}

/// Runs `work` inside a network namespace, on a thread of its own: the caller's stays where it is.
///
/// # Errors
/// There is no such namespace, or what `work` says.
pub(super) fn inside<T: Send + 'static>(
    namespace: &str,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T, Failure> {
    let path = PathBuf::from("/run/netns").join(namespace);
    let thread = std::thread::spawn(move || -> io::Result<T> {
        let namespace = File::open(path)?;
        // SAFETY: a plain system call on an open descriptor; it changes this thread only.
        checked(unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) })?;
        work()
    });
    Ok(thread.join().map_err(|_| "a thread in a network namespace failed")??)
}

fn address(namespace: &str, device: &str, address: &str) -> Result<(), Failure> {
    ip(&["-n", namespace, "address", "add", address, "dev", device])?;
    ip(&["-n", namespace, "link", "set", device, "up"])
}

fn ip(arguments: &[&str]) -> Result<(), Failure> {
    run(Command::new("ip").args(arguments))
}

fn run(command: &mut Command) -> Result<(), Failure> {
    let output = command.output()?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(format!("{command:?}: {}\nhint: network namespaces need root, and the tools of iproute2", said.trim()).into())
}
