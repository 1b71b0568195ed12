//! This machine and the coordinator of an invite: is it reached, is it the one, does it let us in, how far away is it, and
//! which way do the bytes really go.

use super::cards;
use super::check::{Check, bit_rate};
use serde_json::Value;
use std::future::Future;
use std::io::ErrorKind;
use std::time::{Duration, Instant};
use wire::limits::{PROBE_PINGS_MAX, PROTOCOL_VERSION};
use wire::probe::{Asked, Direction, Ping, ProbeError, Prober, Reference};
use wire::{ConnectError, Identity, Invite, PreambleError};

/// TCP connect, handshake and greeting have bounds of their own that add up to more than there is time for.
const CONNECT_SECONDS: f64 = 9.0;

/// Pings, the first not counted: it also wakes both sides up.
const PINGS: usize = 20;

/// They end when this is over: at 300 ms a round trip there are six of them.
const PING_SECONDS: f64 = 2.0;

/// A transfer of 2 s, its streams' handshakes, and room.
const TRANSFER_SECONDS: f64 = 5.0;

/// The reference may have to be computed first.
const REFERENCE_SECONDS: f64 = 8.0;

/// Beyond this, lines of several event logs that belong together are hard to find.
const CLOCK_DIFFERENCE_SECONDS_MAX: f64 = 1.0;

const _: () = assert!(PINGS < PROBE_PINGS_MAX);

/// When the whole command must have ended.
#[derive(Debug, Clone, Copy)]
pub(super) struct Budget {
    until: Instant,
}

impl Budget {
    /// From now on.
    pub(super) fn of(seconds: f64) -> Self {
        Self { until: Instant::now() + Duration::from_secs_f64(seconds) }
    }

    /// What is left, at most that much.
    pub(super) fn left(&self, seconds_max: f64) -> Duration {
        self.until.saturating_duration_since(Instant::now()).min(Duration::from_secs_f64(seconds_max))
    }

    async fn bound<T>(&self, seconds_max: f64, work: impl Future<Output = T>) -> Option<T> {
        tokio::time::timeout(self.left(seconds_max), work).await.ok()
    }
}

/// What came out.
#[derive(Debug, Default)]
pub(super) struct Pair {
    /// In the order in which they were made; the first that fails ends them.
    pub(super) checks: Vec<Check>,
    /// The coordinator's numbers.
    pub(super) reference: Option<Reference>,
}

/// Examines the way to the coordinator of `invite`; `say` tells what is being done. `expected` names the numbers to ask for.
pub(super) async fn examine(invite: Invite, expected: &[(&str, usize)], budget: Budget, say: &dyn Fn(&str)) -> Pair {
    let mut pair = Pair::default();
    let address = invite.address().to_owned();
    let identity = match Identity::generate() {
        Ok(identity) => identity,
        Err(error) => {
            pair.checks.push(Check::of_failure("reachable", error));
            return pair;
        }
    };
    let prober = Prober::new(identity, invite, env!("CARGO_PKG_VERSION"));
    say(&format!("connecting to {address}"));
    let mut asked = match budget.bound(CONNECT_SECONDS, prober.connect()).await {
        Some(Ok(asked)) => asked,
        Some(Err(error)) => {
            pair.checks = unreached(&address, error);
            return pair;
        }
        None => {
            pair.checks.push(late("reachable", CONNECT_SECONDS));
            return pair;
        }
    };
    pair.checks = vec![reachable(&asked), identified(), admitted(), version(&asked.welcome().version), route(&asked)];
    say("measuring round trips");
    pair.checks.extend(round_trips(&mut asked, budget).await);
    for (name, direction) in [("bandwidth_from", Direction::Download), ("bandwidth_to", Direction::Upload)] {
        say(if direction == Direction::Download { "receiving for 2 s" } else { "sending for 2 s" });
        pair.checks.push(bandwidth(name, direction, &prober, budget).await);
    }
    say("comparing numbers");
    match budget.bound(REFERENCE_SECONDS, asked.reference(expected)).await {
        Some(Ok(reference)) => pair.reference = Some(reference),
        Some(Err(error)) => pair.checks.push(Check::of_failure("operations", error)),
        None => pair.checks.push(late("operations", REFERENCE_SECONDS)),
    }
    let _gone = asked.close().await;
    pair
}

fn late(name: &'static str, seconds: f64) -> Check {
    let hint = "run it again when both machines and the link are less busy";
    Check::failed(name, format!("not done within {seconds:.0} s, or within the 20 s of the whole command"), hint)
}

fn reachable(asked: &Asked) -> Check {
    Check::ok("reachable", format!("TCP connection to {}", asked.address()))
        .with("address", asked.address().to_string())
}

fn identified() -> Check {
    Check::ok("identity", "TLS 1.3, with the certificate that the invite names")
}

fn admitted() -> Check {
    Check::ok("admitted", "the coordinator takes the invite")
}

fn version(theirs: &str) -> Check {
    let ours = env!("CARGO_PKG_VERSION");
    let check = match ours == theirs {
        true => Check::ok("version", format!("protocol {PROTOCOL_VERSION}, beringia {ours} on both sides")),
        false => Check::warning(
            "version",
            format!("protocol {PROTOCOL_VERSION} on both sides, but beringia {ours} here and {theirs} there"),
            "install the same version on all sites; `beringia --version` shows what each runs",
        ),
    };
    check.with("protocol", PROTOCOL_VERSION).with("here", ours).with("there", theirs)
}

/// What a failed connection tells: everything before the step that failed is well.
fn unreached(address: &str, error: ProbeError) -> Vec<Check> {
    let reached = || Check::ok("reachable", format!("TCP connection to {address}"));
    match error {
        ProbeError::Connect(ConnectError::Unreachable { source, address }) => {
            let hint = unreachable_hint(source.kind(), &address);
            vec![Check::failed("reachable", format!("cannot reach {address}: {source}"), hint)]
        }
        ProbeError::Connect(ConnectError::Timeout { step: "TCP connect", waited, address }) => {
            let hint = format!("a firewall drops packets, or nobody has this address: {}", opened(&address));
            vec![Check::failed("reachable", format!("{address} did not answer within {waited:?}"), hint)]
        }
        ProbeError::Connect(ConnectError::Timeout { waited, address, .. }) => {
            let fact = format!("{address} took the connection, but said nothing for {waited:?}");
            let hint = "another program listens there, or the machine is stuck: check host and port of the invite";
            vec![reached(), Check::failed("identity", fact, hint)]
        }
        ProbeError::Connect(ConnectError::Preamble { source: source @ PreambleError::NotBeringia, .. }) => {
            vec![reached(), Check::of_failure("identity", source)]
        }
        ProbeError::Connect(ConnectError::Preamble { source, .. }) => {
            vec![reached(), identified(), Check::of_failure("version", source).with("protocol", PROTOCOL_VERSION)]
        }
        ProbeError::Connect(error) => vec![reached(), Check::of_failure("identity", error)],
        error => vec![reached(), identified(), Check::of_failure("admitted", error)],
    }
}

fn unreachable_hint(kind: ErrorKind, address: &str) -> String {
    let is_loopback = ["127.", "localhost", "[::1]"].iter().any(|start| address.starts_with(start));
    match kind {
        _ if is_loopback => {
            "the invite names the coordinator's own machine: start it with `beringia serve RUN --advertise HOST`"
                .to_owned()
        }
        ErrorKind::ConnectionRefused => {
            format!("nobody listens there: start `beringia serve`, and {}", opened(address))
        }
        ErrorKind::NetworkUnreachable | ErrorKind::HostUnreachable => {
            "there is no way to that address from here: `ip route`; a VPN may be down".to_owned()
        }
        ErrorKind::TimedOut => format!("a firewall drops packets, or nobody has this address: {}", opened(address)),
        // Names that do not resolve have no kind of their own.
        _ => "see that the name resolves here, or start the coordinator with `--advertise ADDRESS`".to_owned(),
    }
}

fn opened(address: &str) -> String {
    let (host, port) = address.rsplit_once(':').unwrap_or((address, ""));
    format!("see that the port is open: `nc -vz {host} {port}`")
}

/// Which card the connection uses, and what the other side sees of it.
fn route(asked: &Asked) -> Check {
    let (local, seen_as) = (asked.local_address().ip().to_canonical(), asked.welcome().seen_as.as_str());
    let seen = seen_as.parse::<std::net::SocketAddr>().ok().map(|address| address.ip().to_canonical());
    let cards = cards::cards().unwrap_or_default();
    let card = cards::card_of(local, &cards);
    let on = card.map_or_else(|| "a card that is not listed".to_owned(), cards::Card::describe);
    let fact = format!("from {local} on {on}; the coordinator sees {seen_as}");
    let check = if seen.is_some_and(|seen| seen != local) {
        let hint = "addresses are translated between you: other sites reach this one only if a port is forwarded; then \
                    `beringia join INVITE --advertise HOST --listen 0.0.0.0:PORT`";
        Check::warning("route", fact, hint)
    } else if local.is_loopback() {
        Check::ok("route", format!("{fact}: both ends are on this machine"))
    } else {
        Check::ok("route", fact)
    };
    check
        .with("local_address", local.to_string())
        .with("seen_as", seen_as)
        .with("card", card.map_or(Value::Null, cards::Card::to_json))
}

async fn round_trips(asked: &mut Asked, budget: Budget) -> Vec<Check> {
    let mut pings: Vec<Ping> = Vec::with_capacity(PINGS);
    let until = Budget::of(budget.left(PING_SECONDS).as_secs_f64());
    for index in 0..=PINGS {
        match until.bound(PING_SECONDS, asked.ping()).await {
            Some(Ok(_)) if index == 0 => {}
            Some(Ok(ping)) => pings.push(ping),
            Some(Err(error)) => return vec![Check::of_failure("round_trip", error)],
            None => break,
        }
    }
    pings.sort_by_key(|ping| ping.round_trip);
    match pings.first().copied() {
        None => vec![late("round_trip", PING_SECONDS)],
        Some(fastest) => vec![round_trip(&pings), clock_difference(fastest)],
    }
}

/// Of pings in order of their time; there is at least one.
fn round_trip(pings: &[Ping]) -> Check {
    let seconds = |index: usize| pings[index].round_trip.as_secs_f64();
    let (min, median, max) = (seconds(0), seconds(pings.len() / 2), seconds(pings.len() - 1));
    let ms = |seconds: f64| format!("{:.2} ms", seconds * 1e3);
    let fact = format!("{} (median; {} to {}, {} pings)", ms(median), ms(min), ms(max), pings.len());
    Check::ok("round_trip", fact)
        .with("median_seconds", median)
        .with("min_seconds", min)
        .with("max_seconds", max)
        .with("pings", pings.len())
}

/// By the fastest ping: its answer was under way for half of its time, give or take that half.
fn clock_difference(fastest: Ping) -> Check {
    let (difference, error) = (fastest.clock_difference_seconds, fastest.round_trip.as_secs_f64() / 2.0);
    let fact = format!("the coordinator's clock is {difference:+.3} s from this one, give or take {error:.4} s");
    let check = match difference.abs() - error > CLOCK_DIFFERENCE_SECONDS_MAX {
        true => {
            let hint = "event logs will not line up: start a time service on both machines, `timedatectl set-ntp true`";
            Check::warning("clock_difference", fact, hint)
        }
        false => Check::ok("clock_difference", fact),
    };
    check.with("seconds", difference).with("error_seconds_max", error)
}

async fn bandwidth(name: &'static str, direction: Direction, prober: &Prober, budget: Budget) -> Check {
    let measured = match budget.bound(TRANSFER_SECONDS, prober.transfer(direction)).await {
        Some(Ok(measured)) => measured,
        Some(Err(error)) => return Check::of_failure(name, error),
        None => return late(name, TRANSFER_SECONDS),
    };
    let rate = measured.bits_per_second();
    let way = if direction == Direction::Download { "from" } else { "to" };
    let fact = format!(
        "{} {way} the coordinator, at least ({} streams, {} in {:.2} s)",
        bit_rate(rate),
        measured.streams,
        crate::format::bytes(measured.bytes),
        measured.seconds
    );
    Check::ok(name, fact)
        .with("bits_per_second", rate)
        .with("streams", measured.streams)
        .with("bytes", measured.bytes)
        .with("seconds", measured.seconds)
}

#[cfg(test)]
mod tests {
    use super::super::check::Status;
    use super::*;

    /// Names of the checks, the last of which failed, and what the last one says.
    fn told(error: ProbeError) -> (Vec<&'static str>, String, String) {
        let checks = unreached("a.example:7447", error);
        let (last, before) = checks.split_last().unwrap();
        assert!(before.iter().all(|check| check.status == Status::Ok), "{before:?}");
        assert_eq!(last.status, Status::Failed);
        let hint = last.hint.clone().unwrap();
        (checks.iter().map(|check| check.name).collect(), last.fact.clone(), hint)
    }

    fn connect_error(error: ConnectError) -> (Vec<&'static str>, String, String) {
        told(ProbeError::Connect(error))
    }

    #[test]
    fn versions_that_differ_are_told_with_both() {
        let ours = PROTOCOL_VERSION;
        for (source, side) in [
            (PreambleError::PeerOlder { theirs: ours - 1, ours }, "on the other side"),
            (PreambleError::PeerNewer { theirs: ours + 1, ours }, "on this side"),
            (PreambleError::Purpose(0), "same build"),
        ] {
            let address = "a.example:7447".to_owned();
            let (names, fact, hint) = connect_error(ConnectError::Preamble { address, source });
            assert_eq!(names, ["reachable", "identity", "version"]);
            assert!(fact.contains(&ours.to_string()) && hint.contains(side), "{fact} {hint}");
        }
        assert_eq!(version(env!("CARGO_PKG_VERSION")).status, Status::Ok);
        let other = version("9.9.9");
        assert!(other.status == Status::Warning && other.fact.contains("9.9.9 there"), "{other:?}");
    }

    #[test]
    fn each_way_not_to_be_reached_has_its_hint() {
        let address = || "a.example:7447".to_owned();
        let unreachable =
            |kind: ErrorKind| connect_error(ConnectError::Unreachable { address: address(), source: kind.into() });
        let mut hints = std::collections::BTreeSet::new();
        for kind in [ErrorKind::ConnectionRefused, ErrorKind::HostUnreachable, ErrorKind::TimedOut, ErrorKind::Other] {
            let (names, _, hint) = unreachable(kind);
            assert_eq!(names, ["reachable"]);
            assert!(hints.insert(hint), "{kind}: {hints:?}");
        }
        assert!(unreachable_hint(ErrorKind::ConnectionRefused, "127.0.0.1:7447").contains("--advertise HOST"));
        for (step, last) in [("TCP connect", "reachable"), ("handshake", "identity")] {
            let waited = Duration::from_secs(4);
            let (names, ..) = connect_error(ConnectError::Timeout { address: address(), waited, step });
            assert_eq!(names.last(), Some(&last));
        }
        let other_program = ConnectError::Preamble { address: address(), source: PreambleError::NotBeringia };
        assert_eq!(connect_error(other_program).0, ["reachable", "identity"]);
        let refused = ProbeError::Refused { reason: "not valid".to_owned(), hint: "ask again".to_owned() };
        assert_eq!(told(refused).0, ["reachable", "identity", "admitted"]);
    }

    #[test]
    fn clocks_and_round_trips_are_judged() {
        let ping = |ms: u64, difference: f64| Ping {
            round_trip: Duration::from_millis(ms),
            clock_difference_seconds: difference,
        };
        let check = round_trip(&[ping(1, 0.0), ping(2, 0.0), ping(9, 0.0)]);
        assert_eq!(check.fact, "2.00 ms (median; 1.00 ms to 9.00 ms, 3 pings)");
        assert_eq!(clock_difference(ping(1, 0.5)).status, Status::Ok);
        assert_eq!(clock_difference(ping(1, -7.0)).status, Status::Warning);
        assert_eq!(clock_difference(ping(8_000, 3.0)).status, Status::Ok, "within what the round trip leaves open");
    }
}
