//! Two network namespaces with a link between them that has a rate and a delay. Needs root.
//!
//! Without a delay the link is a veth pair, each end shaped by `tc tbf` (netem is not in every kernel); with one it is a TUN pair
//! joined by `tunlink` of the peers' folder, which shapes and delays in user space.

use crate::namespaces::{Namespaces, Tbf, run};
use crate::runs::Failure;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::str::FromStr;
use std::time::Duration;

/// Name of the interface in both namespaces, as the peers' scripts expect it.
const INTERFACE: &str = "w0";
/// Addresses of the two sites, as the peers' scripts expect them.
pub(crate) const ADDRESSES: [&str; 2] = ["10.77.0.1", "10.77.0.2"];
/// Bucket of `tbf`: at 100 Mbit/s 5 ms.
const BURST_BYTES: u64 = 64 * 1024;
/// Longest queue of `tbf` and of `tunlink`, milliseconds.
const QUEUE_MS: u32 = 100;
/// Rate of a delayed link without a limit, Mbit/s: more than `tunlink` passes on one core.
const UNLIMITED_MBIT: u32 = 10_000;
/// Longest life of `tunlink`, seconds: a day.
const TUNLINK_SECONDS_MAX: u32 = 86_400;
/// Time for `tunlink` to make its interfaces, in pieces of [`POLL`].
const TUNLINK_POLLS_MAX: u32 = 100;
const POLL: Duration = Duration::from_millis(50);
/// Length of each check by iperf3, seconds.
const IPERF_SECONDS: u32 = 4;
/// Start of it that does not count, seconds: the bucket is full at first.
const IPERF_OMIT_SECONDS: u32 = 1;

/// Time between two readings of an interface's counter, seconds.
const READING_SECONDS: &str = "0.2";

/// A link's rate and round trip; written `20`, `20+50ms`, `none`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct LinkKind {
    /// None is no limit.
    pub(crate) mbit: Option<u32>,
    /// Added round trip; 0 is none.
    pub(crate) round_trip_ms: u32,
}

impl FromStr for LinkKind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (rate, delay) = text.split_once('+').unwrap_or((text, "0ms"));
        let mbit = if rate == "none" { Some(None) } else { rate.parse().ok().filter(|rate| *rate > 0).map(Some) };
        let round_trip_ms = delay.strip_suffix("ms").and_then(|ms| ms.parse().ok());
        let link = mbit.zip(round_trip_ms).map(|(mbit, round_trip_ms)| Self { mbit, round_trip_ms });
        link.ok_or_else(|| format!("no link '{text}'\nhint: Mbit/s and round trip, as in none, 100 or 20+50ms"))
    }
}

impl TryFrom<String> for LinkKind {
    type Error = String;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<LinkKind> for String {
    fn from(link: LinkKind) -> Self {
        link.to_string()
    }
}

impl fmt::Display for LinkKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.mbit {
            Some(mbit) => write!(f, "{mbit}")?,
            None => f.write_str("none")?,
        }
        if self.round_trip_ms > 0 { write!(f, "+{}ms", self.round_trip_ms) } else { Ok(()) }
    }
}

/// What iperf3 saw on a link.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(crate) struct LinkMeasured {
    /// From the first site to the second, and back, bits a second.
    pub(crate) bits_per_second: [f64; 2],
    /// Least round trip of the first way, milliseconds.
    pub(crate) round_trip_ms: f64,
}

impl fmt::Display for LinkMeasured {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [there, back] = self.bits_per_second.map(|rate| rate / 1e6);
        write!(f, "{there:.1} and {back:.1} Mbit/s, round trip {:.1} ms", self.round_trip_ms)
    }
}

/// Compiles `tunlink` of the peers' folder.
///
/// # Errors
/// There is none, or no C compiler.
pub(crate) fn compile_tunlink(peers: &Path, folder: &Path) -> Result<PathBuf, Failure> {
    let program = folder.join("tunlink");
    let mut compile = Command::new("cc");
    compile.arg("-O2").arg(peers.join("tunlink.c")).arg("-o").arg(&program);
    run(&mut compile).map_err(|error| format!("{error}\nhint: a link with a delay needs cc, and --peers FOLDER"))?;
    Ok(program)
}

/// Two joined namespaces, until dropped.
pub(crate) struct Link {
    namespaces: Namespaces,
    tunlink: Option<Child>,
}

impl Link {
    /// Makes the namespaces and the link. `serial` tells those of one process apart.
    ///
    /// # Errors
    /// Not root, or no `ip` or `tc`.
    pub(crate) fn up(kind: LinkKind, tunlink: Option<&Path>, serial: u64) -> Result<Self, Failure> {
        let mut link = Self { namespaces: Namespaces::make(&format!("wan{serial}n"), &["a", "b"])?, tunlink: None };
        let namespaces = &link.namespaces;
        if kind.round_trip_ms == 0 {
            namespaces.join(0, 1, INTERFACE)?;
        } else {
            let program = tunlink.ok_or("a link with a delay needs --peers FOLDER")?;
            link.tunlink = Some(start_tunlink(program, kind, namespaces.name(0), namespaces.name(1))?);
        }
        for (site, address) in ADDRESSES.iter().enumerate() {
            namespaces.address(site, INTERFACE, &format!("{address}/24"))?;
            if let (Some(mbit), 0) = (kind.mbit, kind.round_trip_ms) {
                namespaces.shape(site, INTERFACE, tbf(mbit))?;
            }
        }
        Ok(link)
    }

    /// A command in a site's namespace, held to the site's core.
    pub(crate) fn command(&self, site: usize, program: &Path) -> Command {
        let mut command = self.inside(site);
        command.args(["taskset", "-c", &site.to_string()]).arg(program);
        command
    }

    /// As [`Link::command`], under the host name and with the hosts file that the peers' scripts need.
    pub(crate) fn named_command(&self, site: usize, program: &Path, hosts: &Path) -> Command {
        let mut command = self.inside(site);
        let name = HOSTS[site].0;
        let enter = "hostname \"$1\"; mount --bind \"$2\" /etc/hosts; shift 2; exec \"$@\"";
        command.args(["unshare", "-u", "-m", "sh", "-c", enter, "sh", name]).arg(hosts);
        command.args(["taskset", "-c", &site.to_string()]).arg(program);
        command
    }

    fn inside(&self, site: usize) -> Command {
        self.namespaces.inside(site)
    }

    /// Writes a line `unix-seconds bytes-sent` into `file` every [`READING_SECONDS`], until the link goes.
    ///
    /// # Errors
    /// No bash.
    pub(crate) fn count_sent(&self, site: usize, file: &Path) -> Result<Readings, Failure> {
        // `read -t` on a pipe that nobody writes to waits without starting a process.
        let script = format!(
            "exec 3<> <(:); while :; do read -r n < /sys/class/net/{INTERFACE}/statistics/tx_bytes; \
             echo \"$EPOCHREALTIME $n\"; read -rt {READING_SECONDS} -u 3; done"
        );
        let mut command = self.inside(site);
        command.args(["bash", "-c", &script]).env("LC_ALL", "C");
        Ok(Readings(command.stdin(Stdio::null()).stdout(File::create(file)?).stderr(Stdio::null()).spawn()?))
    }

    /// Measures both ways with iperf3.
    ///
    /// # Errors
    /// No iperf3, or a link that carries nothing.
    pub(crate) fn measure(&self) -> Result<LinkMeasured, Failure> {
        let (there, round_trip_ms) = self.iperf(&[])?;
        let (back, _) = self.iperf(&["-R"])?;
        Ok(LinkMeasured { bits_per_second: [there, back], round_trip_ms })
    }

    fn iperf(&self, arguments: &[&str]) -> Result<(f64, f64), Failure> {
        let mut serve = self.inside(1);
        serve.args(["iperf3", "-s", "-1", "-B", ADDRESSES[1]]).stdin(Stdio::null()).stdout(Stdio::null());
        let mut server = serve.stderr(Stdio::null()).spawn()?;
        let mut last = String::new();
        for _ in 0..TUNLINK_POLLS_MAX {
            std::thread::sleep(POLL);
            let mut client = self.inside(0);
            client.args(["iperf3", "-J", "-c", ADDRESSES[1], "-t", &IPERF_SECONDS.to_string()]);
            let output = client.args(["-O", &IPERF_OMIT_SECONDS.to_string()]).args(arguments).output()?;
            let report: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
            if let Some(found) = iperf_result(&report) {
                server.wait()?;
                return Ok(found);
            }
            last = format!("{} {}", report["error"], String::from_utf8_lossy(&output.stderr).trim());
        }
        let _ = server.kill();
        let _ = server.wait();
        Err(format!("iperf3: {last}\nhint: apt-get install iperf3").into())
    }

    /// Ends all that runs in the namespaces.
    pub(crate) fn kill_all(&self) {
        self.namespaces.kill_all();
    }
}

/// A queue of [`QUEUE_MS`] beside the bucket.
fn tbf(mbit: u32) -> Tbf {
    let bits_per_second = u64::from(mbit) * 1_000_000;
    let limit_bytes = bits_per_second / 8 * u64::from(QUEUE_MS) / 1_000 + BURST_BYTES;
    Tbf { bits_per_second, burst_bytes: BURST_BYTES, limit_bytes }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.kill_all();
        if let Some(tunlink) = &mut self.tunlink {
            let _ = tunlink.kill();
            let _ = tunlink.wait();
        }
    }
}

/// Host names of the sites, as the peers' `site.sh` gives them, and their addresses.
const HOSTS: [(&str, &str); 2] = [("siteA", ADDRESSES[0]), ("siteB", ADDRESSES[1])];

/// What stands in the hosts file of [`Link::named_command`].
pub(crate) fn hosts() -> String {
    HOSTS.iter().fold("127.0.0.1 localhost\n".to_owned(), |text, (name, address)| format!("{text}{address} {name}\n"))
}

/// A process that reads a counter, until dropped.
pub(crate) struct Readings(Child);

impl Drop for Readings {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start_tunlink(program: &Path, kind: LinkKind, first: &str, second: &str) -> Result<Child, Failure> {
    let mbit = kind.mbit.unwrap_or(UNLIMITED_MBIT).to_string();
    let one_way_ms = (f64::from(kind.round_trip_ms) / 2.0).to_string();
    let (queue, life) = (QUEUE_MS.to_string(), TUNLINK_SECONDS_MAX.to_string());
    let mut command = Command::new(program);
    command.args([first, second, &mbit, &one_way_ms, &queue, &life]).stdin(Stdio::null()).stdout(Stdio::null());
    let child = command.stderr(Stdio::null()).spawn()?;
    for _ in 0..TUNLINK_POLLS_MAX {
        std::thread::sleep(POLL);
        let is_there = |name: &str| run(Command::new("ip").args(["-n", name, "link", "show", INTERFACE])).is_ok();
        if is_there(first) && is_there(second) {
            return Ok(child);
        }
    }
    Err("tunlink made no interface\nhint: it needs /dev/net/tun".into())
}

/// Received bits a second, and the least round trip in milliseconds.
fn iperf_result(report: &Value) -> Option<(f64, f64)> {
    let rate = report["end"]["sum_received"]["bits_per_second"].as_f64()?;
    let round_trip_us = report["end"]["streams"][0]["sender"]["min_rtt"].as_f64()?;
    Some((rate, round_trip_us / 1e3))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn links_are_written_as_they_are_read() {
        for text in ["none", "100", "20", "20+50ms", "none+100ms"] {
            assert_eq!(text.parse::<LinkKind>().unwrap().to_string(), text);
        }
        for text in ["", "0", "20+50", "fast", "-3", "20+ms"] {
            assert!(text.parse::<LinkKind>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_report_of_iperf3_is_read() {
        let report = json!({ "end": {
            "sum_received": { "bits_per_second": 19.5e6 }, "streams": [{ "sender": { "min_rtt": 50_300 } }],
        } });
        assert_eq!(iperf_result(&report), Some((19.5e6, 50.3)));
        assert_eq!(iperf_result(&json!({ "error": "no server" })), None);
    }
}
