//! A wide-area network for the lab, in user space and without privileges: `--link 20Mbit/s,50ms,0.1%`.
//!
//! Each site dials through a SOCKS5 relay of its own (`beringia join --proxy`), which this process runs on one thread. The
//! relay knows who dials whom and gives every directed pair its rate, delay, jitter and loss. The links are measured
//! through the relays before the sites come, and what they carry is counted while they work. docs/lab-links.md says what
//! is emulated and what is not.

mod link;
mod matrix;
mod measure;
mod relay;
mod shaper;
mod socks;

pub(crate) use self::matrix::Links;

use self::measure::Measured;
use self::relay::Network;
use crate::failure::Failure;
use serde::Serialize;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use tokio::runtime::Runtime;

/// Name under which the sites know the coordinator.
pub(super) const COORDINATOR: &str = matrix::COORDINATOR;

/// What mends a `--link` that makes no sense.
const LINK_HINT: &str = "try `--link 20Mbit/s,50ms,0.1%`, or a file as docs/lab-links.md shows it";

/// Longest file of links that is read: 16 sites have 272 directions of 60 bytes.
pub(crate) const LINKS_FILE_BYTES_MAX: u64 = 1 << 20;

/// The argument of `--link`: a link, or a file of them.
pub(super) fn read_links(argument: &str, sites: &[String]) -> Result<Links, Failure> {
    let path = Path::new(argument);
    if !path.is_file() {
        let failed = |problem| Failure::new(format!("--link {argument}: {problem}, or a file that exists"), LINK_HINT);
        return Links::uniform(argument, sites).map_err(failed);
    }
    let failed = |problem: String| Failure::new(format!("{argument}: {problem}"), LINK_HINT);
    let bytes = path.metadata().map_err(|error| failed(error.to_string()))?.len();
    if bytes > LINKS_FILE_BYTES_MAX {
        return Err(failed(format!("{bytes} bytes are too long for a file of links")));
    }
    let text = std::fs::read_to_string(path).map_err(|error| failed(error.to_string()))?;
    Links::from_toml(&text, sites).map_err(failed)
}

/// The network of one lab. Dropping it ends all connections through it.
pub(super) struct Wan {
    runtime: Option<Runtime>,
    network: Arc<Network>,
    relays: Vec<SocketAddr>,
    /// By pair of ends, the first before the second.
    measured: Vec<((usize, usize), Measured)>,
}

/// One direction of a link: what was asked for, what it gave, and what it carried.
#[derive(Debug, Clone, Serialize)]
pub(super) struct LinkReport {
    from: String,
    to: String,
    wanted_bits_per_second: u64,
    measured_bits_per_second: f64,
    /// Half of what is wanted each way.
    wanted_round_trip_seconds: f64,
    measured_round_trip_seconds: f64,
    jitter_seconds: f64,
    /// Probability that a connection breaks within 64 KiB in this direction.
    loss: f64,
    connections: u64,
    connections_broken: u64,
    /// Bytes of TCP payload that were delivered.
    bytes: u64,
    /// Time in which bytes were leaving.
    busy_seconds: f64,
}

impl Wan {
    /// Starts the relays and measures every link.
    pub(super) fn start(links: &Links, seed: u64) -> Result<Self, Failure> {
        let failed = |error: io::Error| {
            Failure::new(format!("the lab's network: {error}"), "allow more threads and open files: `ulimit -u -n`")
        };
        let mut runtime = tokio::runtime::Builder::new_multi_thread();
        let runtime = runtime.worker_threads(1).thread_name("wan").enable_all().build().map_err(failed)?;
        let entered = runtime.enter();
        let meter = relay::listen().map_err(failed)?;
        let meter_port = meter.local_addr().map_err(failed)?.port();
        let network = Arc::new(Network::new(links, seed, meter_port));
        runtime.spawn(measure::serve(meter));
        let mut relays = Vec::new();
        for site in 0..links.names().len() - 1 {
            let listener = relay::listen().map_err(failed)?;
            relays.push(listener.local_addr().map_err(failed)?);
            runtime.spawn(relay::serve(Arc::clone(&network), site, listener));
        }
        drop(entered);
        let measured = runtime.block_on(measure::all(&network, &relays, meter_port));
        let measured = measured.map_err(|problem| {
            Failure::new(format!("the link {problem}"), "try again on a machine that does less, or with a slower link")
        })?;
        Ok(Self { runtime: Some(runtime), network, relays, measured })
    }

    /// What `join --proxy` of that site is told.
    pub(super) fn proxy(&self, site: usize) -> String {
        format!("socks5://{}", self.relays[site])
    }

    /// Cuts the link from one end to another, by their places, or mends it.
    pub(super) fn set_cut(&self, from: usize, to: usize, is_cut: bool) {
        self.network.link(from, to).set_cut(is_cut);
    }

    /// Every direction, by pair.
    pub(super) fn report(&self) -> Vec<LinkReport> {
        let directions = self.measured.iter().flat_map(|((first, second), measured)| {
            [
                self.direction(*first, *second, measured.forward_bits_per_second, measured),
                self.direction(*second, *first, measured.backward_bits_per_second, measured),
            ]
        });
        directions.collect()
    }

    fn direction(&self, from: usize, to: usize, bits_per_second: f64, measured: &Measured) -> LinkReport {
        let (link, back) = (self.network.link(from, to), self.network.link(to, from));
        let (spec, carried) = (link.spec(), link.carried());
        LinkReport {
            from: self.network.name(from).to_owned(),
            to: self.network.name(to).to_owned(),
            wanted_bits_per_second: spec.bits_per_second,
            measured_bits_per_second: bits_per_second,
            wanted_round_trip_seconds: (link.one_way() + back.one_way()).as_secs_f64(),
            measured_round_trip_seconds: measured.round_trip.as_secs_f64(),
            jitter_seconds: spec.jitter.as_secs_f64(),
            loss: spec.loss(),
            connections: carried.connections,
            connections_broken: carried.broken,
            bytes: carried.bytes,
            busy_seconds: carried.busy.as_secs_f64(),
        }
    }
}

impl Drop for Wan {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl LinkReport {
    /// Seconds that so many bytes take on it alone.
    pub(super) fn seconds_of(&self, bytes: u64) -> f64 {
        bytes as f64 * 8.0 / self.measured_bits_per_second + self.measured_round_trip_seconds / 2.0
    }

    /// For people.
    pub(super) fn line(&self) -> String {
        let broken = match self.connections_broken {
            0 => String::new(),
            1 => "1 connection broken; ".to_owned(),
            broken => format!("{broken} connections broken; "),
        };
        format!(
            "link       {} -> {}: {} Mbit/s wanted, {} measured; {:.1} ms; {broken}{:.1} MB carried",
            self.from,
            self.to,
            significant(self.wanted_bits_per_second as f64 / 1e6),
            significant(self.measured_bits_per_second / 1e6),
            self.measured_round_trip_seconds * 1e3,
            self.bytes as f64 / 1e6
        )
    }
}

/// Three significant digits, or all before the point.
fn significant(value: f64) -> String {
    let digits_before = value.abs().max(1e-9).log10().floor() as i32 + 1;
    let text = format!("{value:.*}", (3 - digits_before).clamp(0, 6) as usize);
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
