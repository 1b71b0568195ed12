//! A delay line in user space: packets that enter one TUN device leave the other a fixed time later.
//!
//! Kernels without `netem` have no other way to lengthen a path. Both devices take packets of up to 64 KiB with a
//! `virtio_net_hdr` (TCP segmentation is put off until the far end), so that 1 Gbit/s costs 2,000 reads and writes a second
//! instead of 83,000. The line has no rate and drops nothing before [`HELD_BYTES_MAX`]: rate and losses come from `tc`.

use super::link::inside;
use crate::runs::Failure;
use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Longest packet with its header, bytes: IP allows 65,535, `virtio_net_hdr` has 10.
const PACKET_BYTES_MAX: usize = 65_536 + 10;

/// Packets on their way in one direction, bytes: 1 Gbit/s for a second, twice that for bookkeeping.
const HELD_BYTES_MAX: usize = 256 << 20;

/// Longest wait before the end of the line is looked for.
const LOOK: Duration = Duration::from_millis(100);

/// Name of the device in both namespaces.
pub(super) const DEVICE: &str = "line0";

/// Two directions, each a thread; dropping it ends both, and the devices vanish with their descriptors.
pub(super) struct DelayLine {
    ended: Arc<AtomicBool>,
    dropped: Arc<AtomicU64>,
    threads: Vec<JoinHandle<io::Result<()>>>,
}

impl DelayLine {
    /// Joins two network namespaces by a line of that delay one way.
    ///
    /// # Errors
    /// A namespace cannot be entered, or there is no `/dev/net/tun`.
    pub(super) fn between(near: &str, far: &str, delay: Duration) -> Result<Self, Failure> {
        let (near, far) = (inside(near, tun_device)?, inside(far, tun_device)?);
        let (ended, dropped) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let start = |from: &File, to: &File| -> io::Result<JoinHandle<io::Result<()>>> {
            let mut way = Way { from: from.try_clone()?, to: to.try_clone()?, delay, held: VecDeque::new(), bytes: 0 };
            let (ended, dropped) = (ended.clone(), dropped.clone());
            Ok(std::thread::spawn(move || way.run(&ended, &dropped)))
        };
        let threads = vec![start(&near, &far)?, start(&far, &near)?];
        Ok(Self { ended, dropped, threads })
    }

    /// Packets that found no room.
    pub(super) fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }
}

impl Drop for DelayLine {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // A direction that failed has shown it by measurements that failed.
            let _ = thread.join();
        }
    }
}

/// One direction.
struct Way {
    from: File,
    to: File,
    delay: Duration,
    held: VecDeque<(Instant, Vec<u8>)>,
    bytes: usize,
}

impl Way {
    fn run(&mut self, ended: &AtomicBool, dropped: &AtomicU64) -> io::Result<()> {
        let mut buffer = vec![0; PACKET_BYTES_MAX];
        while !ended.load(Ordering::Relaxed) {
            self.deliver();
            let wait = self.held.front().map_or(LOOK, |(due, _)| due.saturating_duration_since(Instant::now()));
            if !readable(self.from.as_raw_fd(), wait.min(LOOK))? {
                continue;
            }
            // All that is there, but never for so long that a packet leaves late.
            for _ in 0..32 {
                let Ok(bytes) = self.from.read(&mut buffer) else { break };
                if self.bytes + bytes > HELD_BYTES_MAX {
                    dropped.fetch_add(1, Ordering::Relaxed);
                    continue;
                }
                self.bytes += bytes;
                self.held.push_back((Instant::now() + self.delay, buffer[..bytes].to_vec()));
            }
        }
        Ok(())
    }

    fn deliver(&mut self) {
        let now = Instant::now();
        while let Some((_, packet)) = self.held.pop_front_if(|(due, _)| *due <= now) {
            self.bytes -= packet.len();
            // A device that is down or gone loses packets, as a cable would.
            let _ = self.to.write(&packet);
        }
    }
}

fn readable(descriptor: RawFd, wait: Duration) -> io::Result<bool> {
    let mut polled = libc::pollfd { fd: descriptor, events: libc::POLLIN, revents: 0 };
    let wait = libc::timespec { tv_sec: wait.as_secs() as _, tv_nsec: wait.subsec_nanos() as _ };
    // SAFETY: one `pollfd` and one `timespec`, both alive during the call; no signal mask is given.
    match unsafe { libc::ppoll(&mut polled, 1, &wait, std::ptr::null()) } {
        count if count >= 0 => Ok(count > 0),
        _ => Err(io::Error::last_os_error()),
    }
}

fn tun_device() -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    let file = File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun")?;
    // SAFETY: all-zero bytes are a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(DEVICE.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as i16;
    let offloads = libc::TUN_F_CSUM | libc::TUN_F_TSO4;
    // SAFETY: both requests read their argument as the system's header defines it: an `ifreq` and an integer.
    unsafe {
        checked(libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &request))?;
        checked(libc::ioctl(file.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(offloads)))?;
    }
    Ok(file)
}

pub(super) fn checked(status: libc::c_int) -> io::Result<()> {
    match status {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}
