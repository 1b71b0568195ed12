//! What the system can be told about a TCP socket, and what it knows about the path.
//!
//! On Linux: BBR where the kernel has it, keep-alive, pacing, and `TCP_INFO`. Elsewhere these calls do nothing and know
//! nothing, and the link is judged by the clock alone ([`crate::link`]). Windows are not set on purpose: a fixed `SO_RCVBUF`
//! ends the kernel's own growth and is capped by `net.core.rmem_max`; docs/links.md says what takes its place.

use std::io;
use std::time::Duration;
use tokio::net::TcpStream;

/// Congestion control that is asked for: it holds its rate under random loss and after idle times, where CUBIC halves it.
/// Source: Cardwell, Cheng, Gunn, Yeganeh, Jacobson, "BBR: Congestion-Based Congestion Control", 2016.
const CONGESTION_CONTROL: &str = "bbr";

/// A connection without traffic sends a probe after this long: translators of addresses forget idle ones after minutes.
const KEEPALIVE_SECONDS: u32 = 60;

/// Without an answer, more probes follow at this distance, and after so many the connection is given up: a peer whose machine lost its
/// power keeps its places for 60 + 6 x 10 s = 2 minutes.
const KEEPALIVE_AGAIN_SECONDS: u32 = 10;
const KEEPALIVE_PROBES: u32 = 6;

/// What TCP has counted and measured on one connection since it was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TcpInfo {
    /// Smoothed round trip.
    pub round_trip: Duration,
    /// Shortest round trip of the last minutes: the path without queues. `None` before the first.
    pub round_trip_min: Option<Duration>,
    /// Bytes sent, those sent again included.
    pub bytes_sent: u64,
    /// Bytes sent again because they were lost or believed lost.
    pub bytes_retransmitted: u64,
    /// Rate at which what was sent last was delivered, bytes a second.
    pub delivery_bytes_per_second: u64,
    /// Bound on the sending rate, bytes a second; `u64::MAX` without one.
    pub pacing_bytes_per_second_max: u64,
}

/// A socket by its descriptor, for as long as somebody else keeps it open.
#[derive(Debug)]
pub(crate) struct Socket(#[cfg(unix)] std::os::fd::RawFd);

impl Socket {
    /// The socket of `stream`, which the caller keeps open for longer than the result.
    pub(crate) fn of(stream: &TcpStream) -> Self {
        #[cfg(unix)]
        return Self(std::os::fd::AsRawFd::as_raw_fd(stream));
        #[cfg(not(unix))]
        {
            let _ = stream;
            Self()
        }
    }

    /// What every connection of ours gets. Options that the system refuses stay as they were: none is needed for
    /// correctness.
    pub(crate) fn tune(&self) {
        let _ = self.set_congestion_control(CONGESTION_CONTROL);
        let _ = self.set_keepalive(KEEPALIVE_SECONDS);
    }
}

#[cfg(target_os = "linux")]
impl Socket {
    fn set_congestion_control(&self, name: &str) -> io::Result<()> {
        self.set(libc::IPPROTO_TCP, libc::TCP_CONGESTION, name.as_bytes())
    }

    fn set_keepalive(&self, seconds: u32) -> io::Result<()> {
        self.set(libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, &seconds.to_ne_bytes())?;
        self.set(libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, &KEEPALIVE_AGAIN_SECONDS.to_ne_bytes())?;
        self.set(libc::IPPROTO_TCP, libc::TCP_KEEPCNT, &KEEPALIVE_PROBES.to_ne_bytes())?;
        self.set(libc::SOL_SOCKET, libc::SO_KEEPALIVE, &1u32.to_ne_bytes())
    }

    /// Bounds the rate at which the kernel lets this connection send.
    pub(crate) fn set_pacing_rate(&self, bytes_per_second: u64) -> io::Result<()> {
        self.set(libc::SOL_SOCKET, libc::SO_MAX_PACING_RATE, &bytes_per_second.to_ne_bytes())
    }

    /// Name of the congestion control in use.
    pub(crate) fn congestion_control(&self) -> Option<String> {
        let mut name = [0; 16];
        let bytes = self.get(libc::IPPROTO_TCP, libc::TCP_CONGESTION, &mut name).ok()?;
        let name = name[..bytes].split(|byte| *byte == 0).next()?;
        Some(String::from_utf8_lossy(name).into_owned())
    }

    /// Reads `TCP_INFO`.
    pub(crate) fn info(&self) -> Option<TcpInfo> {
        let mut raw = [0; TCP_INFO_BYTES];
        let bytes = self.get(libc::IPPROTO_TCP, libc::TCP_INFO, &mut raw).ok()?;
        parse_info(&raw[..bytes])
    }

    fn set(&self, level: i32, name: i32, value: &[u8]) -> io::Result<()> {
        // SAFETY: the kernel reads `value.len()` bytes of `value`, which outlives the call.
        let status = unsafe { libc::setsockopt(self.0, level, name, value.as_ptr().cast(), value.len() as u32) };
        if status == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    fn get(&self, level: i32, name: i32, value: &mut [u8]) -> io::Result<usize> {
        let mut bytes = value.len() as u32;
        // SAFETY: the kernel writes at most `bytes` bytes to `value` and their number to `bytes`.
        let status = unsafe { libc::getsockopt(self.0, level, name, value.as_mut_ptr().cast(), &mut bytes) };
        if status == 0 { Ok(bytes as usize) } else { Err(io::Error::last_os_error()) }
    }
}

#[cfg(not(target_os = "linux"))]
impl Socket {
    fn set_congestion_control(&self, _name: &str) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn set_keepalive(&self, _seconds: u32) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    pub(crate) fn set_pacing_rate(&self, _bytes_per_second: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    pub(crate) fn congestion_control(&self) -> Option<String> {
        None
    }

    pub(crate) fn info(&self) -> Option<TcpInfo> {
        None
    }
}

/// As much of `struct tcp_info` as is read. The kernel only ever appends to it (include/uapi/linux/tcp.h).
#[cfg(target_os = "linux")]
const TCP_INFO_BYTES: usize = 216;

/// Kernels before 4.19 know no `tcpi_bytes_retrans` and give a shorter answer: nothing is believed of it then.
#[cfg(target_os = "linux")]
fn parse_info(raw: &[u8]) -> Option<TcpInfo> {
    let short = |offset: usize| Some(u32::from_ne_bytes(*raw.get(offset..)?.first_chunk()?));
    let long = |offset: usize| Some(u64::from_ne_bytes(*raw.get(offset..)?.first_chunk()?));
    let microseconds = |count: u32| Duration::from_micros(count.into());
    Some(TcpInfo {
        round_trip: microseconds(short(68)?),
        round_trip_min: Some(short(148)?).filter(|count| *count != u32::MAX).map(microseconds),
        bytes_sent: long(200)?,
        bytes_retransmitted: long(208)?,
        delivery_bytes_per_second: long(160)?,
        pacing_bytes_per_second_max: long(112)?,
    })
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    #[tokio::test]
    async fn the_kernel_takes_the_options_and_tells_what_it_counted() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (client, server) = tokio::join!(TcpStream::connect(address), listener.accept());
        let (mut client, mut server) = (client.unwrap(), server.unwrap().0);
        let socket = Socket::of(&client);
        socket.tune();
        let available =
            std::fs::read_to_string("/proc/sys/net/ipv4/tcp_allowed_congestion_control").unwrap_or_default();
        if available.split_whitespace().any(|name| name == CONGESTION_CONTROL) {
            assert_eq!(socket.congestion_control().as_deref(), Some(CONGESTION_CONTROL));
        }
        assert!(socket.congestion_control().is_some());
        assert_eq!(socket.info().unwrap().pacing_bytes_per_second_max, u64::MAX);
        socket.set_pacing_rate(123_456_789).unwrap();
        client.write_all(&[7; 5_000]).await.unwrap();
        let mut received = [0; 5_000];
        server.read_exact(&mut received).await.unwrap();
        let info = socket.info().unwrap();
        assert_eq!(
            (info.bytes_sent - info.bytes_retransmitted, info.pacing_bytes_per_second_max),
            (5_000, 123_456_789)
        );
        assert!(info.round_trip > Duration::ZERO && info.round_trip < Duration::from_secs(60), "{info:?}");
    }

    #[test]
    fn a_shorter_answer_of_an_older_kernel_is_no_answer() {
        assert_eq!(parse_info(&[0; 192]), None);
        assert_eq!(parse_info(&[]), None);
        let unmeasured = parse_info(&[0xff; TCP_INFO_BYTES]).unwrap();
        assert_eq!((unmeasured.round_trip_min, unmeasured.bytes_sent), (None, u64::MAX));
    }
}
