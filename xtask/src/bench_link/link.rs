//! Two ends and a router between them, as network namespaces: the link that is measured.
//!
//! ```text
//! near ---- line or veth ---- router ---- veth ---- far
//! ```
//! The router's queues are `tbf`: the rate, and a queue that drops what does not fit. They stand apart from the senders on
//! purpose: on its own device a sender feels a full queue at once, on a router it only sees loss, as in a real network.

use super::delay_line::{self, DelayLine, checked};
use crate::namespaces::{Namespaces, Tbf, ip, run};
use crate::runs::Failure;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;
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

/// Numbers of the namespaces.
const NEAR_END: usize = 0;
const ROUTER: usize = 1;
const FAR_END: usize = 2;

/// Name of the devices between the router and the far end.
const FAR_DEVICE: &str = "far0";

/// The namespaces; dropping them removes all of it.
pub(super) struct Link {
    /// Ends before the namespaces do.
    line: Option<DelayLine>,
    namespaces: Namespaces,
}

impl Link {
    /// Makes the link.
    ///
    /// # Errors
    /// Not root, or a tool or a kernel's module is missing.
    pub(super) fn make(shape: Shape) -> Result<Self, Failure> {
        let mut link = Self { line: None, namespaces: Namespaces::make("bl", &["near", "router", "far"])? };
        link.line = link.join_near(shape.delay)?;
        link.join_far()?;
        link.shape(shape)?;
        Ok(link)
    }

    /// The near end's namespace.
    pub(super) fn near(&self) -> &str {
        self.namespaces.name(NEAR_END)
    }

    /// The far end's namespace.
    pub(super) fn far(&self) -> &str {
        self.namespaces.name(FAR_END)
    }

    /// Packets the delay line itself dropped: it must be none for its delay to be all it does.
    pub(super) fn line_drops(&self) -> u64 {
        self.line.as_ref().map_or(0, DelayLine::dropped)
    }

    fn join_near(&self, delay: Duration) -> Result<Option<DelayLine>, Failure> {
        let (namespaces, device) = (&self.namespaces, delay_line::DEVICE);
        let line = match delay.is_zero() {
            true => {
                namespaces.join(NEAR_END, ROUTER, device)?;
                None
            }
            false => Some(DelayLine::between(namespaces.name(NEAR_END), namespaces.name(ROUTER), delay / 2)?),
        };
        namespaces.address(NEAR_END, device, &format!("{NEAR}/24"))?;
        namespaces.address(ROUTER, device, "10.91.1.2/24")?;
        ip(self.near(), "route add default via 10.91.1.2")?;
        Ok(line)
    }

    fn join_far(&self) -> Result<(), Failure> {
        let namespaces = &self.namespaces;
        namespaces.join(ROUTER, FAR_END, FAR_DEVICE)?;
        namespaces.address(FAR_END, FAR_DEVICE, &format!("{FAR}/24"))?;
        namespaces.address(ROUTER, FAR_DEVICE, "10.91.2.2/24")?;
        ip(self.far(), "route add default via 10.91.2.2")?;
        run(namespaces.inside(ROUTER).args(["sysctl", "-q", "-w", "net.ipv4.ip_forward=1"]))
    }

    fn shape(&self, shape: Shape) -> Result<(), Failure> {
        let bits_per_second = u64::from(shape.megabits) * 1_000_000;
        let limit_bytes = (bits_per_second as f64 / 8.0 * shape.queue.as_secs_f64()) as u64;
        let tbf = Tbf { bits_per_second, burst_bytes: BURST_BYTES, limit_bytes: limit_bytes.max(2 * BURST_BYTES) };
        [delay_line::DEVICE, FAR_DEVICE].iter().try_for_each(|device| self.namespaces.shape(ROUTER, device, tbf))
    }

    /// A command that runs in one of the namespaces.
    pub(super) fn command(namespace: &str, program: &Path) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", namespace]).arg(program);
        command
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
