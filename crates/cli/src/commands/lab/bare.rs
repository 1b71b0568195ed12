//! The least time in which a state can come from one process to another: what recovery times are compared with.

use super::wan::LinkReport;
use base::RunConfig;
use base::config::Strategy;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::time::Instant;

/// Written at once.
const PIECE_BYTES: usize = 256 * 1024;

/// What a newcomer fetches: parameters and what the outer step keeps of them, in f32.
pub(super) fn state_bytes(config: &RunConfig) -> u64 {
    let copies = match config.sync.strategy {
        // AdamW's two moments.
        Strategy::Synchronous => 3,
        _ if config.sync.outer_momentum > 0.0 => 2,
        _ => 1,
    };
    copies * config.schema().elements() as u64 * size_of::<f32>() as u64
}

/// Seconds for so many bytes over the slowest of the links, or over loopback where there are none; `None` where it could not be measured.
pub(super) fn transfer_seconds(bytes: u64, links: &[LinkReport]) -> Option<f64> {
    match links.iter().map(|link| link.seconds_of(bytes)).reduce(f64::max) {
        Some(seconds) => Some(seconds),
        None => over_loopback(bytes).ok(),
    }
}

fn over_loopback(bytes: u64) -> io::Result<f64> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let address = listener.local_addr()?;
    let sending = std::thread::spawn(move || -> io::Result<()> {
        let mut stream = TcpStream::connect(address)?;
        let piece = vec![0; PIECE_BYTES];
        let mut left = bytes;
        while left > 0 {
            let now = left.min(PIECE_BYTES as u64) as usize;
            stream.write_all(&piece[..now])?;
            left -= now as u64;
        }
        Ok(())
    });
    let (mut stream, _) = listener.accept()?;
    let began = Instant::now();
    let mut piece = vec![0; PIECE_BYTES];
    while stream.read(&mut piece)? > 0 {}
    let seconds = began.elapsed().as_secs_f64();
    let sent = sending.join().map_err(|_| io::Error::other("the sender ended"))?;
    sent.map(|()| seconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_take_time() {
        assert!(transfer_seconds(1 << 20, &[]).unwrap() > 0.0);
        let mut config = crate::commands::init::Size::Million1.config("lab", 1_024);
        let parameters = config.schema().elements() as u64;
        config.sync.outer_momentum = 0.9;
        assert_eq!(state_bytes(&config), 8 * parameters);
        config.sync.outer_momentum = 0.0;
        assert_eq!(state_bytes(&config), 4 * parameters);
    }
}
