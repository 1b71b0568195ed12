//! Network cards: which one an address belongs to, and whether others can reach it there.
//!
//! An address of the wrong card is the costliest small mistake there is: a run over it works, at a hundredth of the speed, or
//! waits for minutes for machines that cannot be reached (torchft's issue 329: 948 s).

use super::check::{Check, bit_rate};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs, UdpSocket};
use std::path::Path;

/// Where Linux describes its cards.
const CARDS_FOLDER: &str = "/sys/class/net";

/// Addresses for documentation (RFC 5737, RFC 3849): routed like any other of the world, and nobody's.
const SOMEWHERE: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(198, 51, 100, 1)), IpAddr::V6(Ipv6Addr::new(0x2001, 0xDB8, 0, 0, 0, 0, 0, 1))];

/// Names that container and machine managers give to bridges and to one end of a virtual cable.
const PRIVATE_NAMES: [&str; 11] =
    ["docker", "br-", "virbr", "cni", "lxcbr", "lxdbr", "podman", "veth", "cali", "flannel", "vnet"];

/// What a card is, as far as it matters here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Loopback,
    /// A bridge or virtual cable of this machine's own.
    Private,
    Other,
}

/// A card with at least one address.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Card {
    name: String,
    kind: Kind,
    addresses: Vec<IpAddr>,
    /// As the driver says; `None` for virtual cards.
    speed_megabits: Option<u64>,
    mtu_bytes: Option<u64>,
}

impl Card {
    /// `eth0 (10 Gbit/s, MTU 1500)`
    pub(super) fn describe(&self) -> String {
        let speed = self.speed_megabits.map_or("speed not told".to_owned(), |megabits| bit_rate(megabits as f64 * 1e6));
        let mtu = self.mtu_bytes.map_or(String::new(), |mtu| format!(", MTU {mtu}"));
        format!("{} ({speed}{mtu})", self.name)
    }

    /// For programs.
    pub(super) fn to_json(&self) -> Value {
        json!({
            "name": self.name,
            "addresses": self.addresses,
            "speed_megabits_per_second": self.speed_megabits,
            "mtu_bytes": self.mtu_bytes,
        })
    }

    /// An address that other machines may reach.
    fn outside_address(&self) -> Option<IpAddr> {
        let outside = |address: &&IpAddr| self.kind == Kind::Other && !is_link_local(address);
        // One a card: IPv4 where there is one, because it is what people advertise.
        let mut candidates: Vec<&IpAddr> = self.addresses.iter().filter(outside).collect();
        candidates.sort_by_key(|address| address.is_ipv6());
        candidates.first().copied().copied()
    }
}

/// Every card that is up and has an address.
///
/// # Errors
/// What the system said.
pub(super) fn cards() -> std::io::Result<Vec<Card>> {
    let mut addresses: BTreeMap<String, (bool, Vec<IpAddr>)> = BTreeMap::new();
    for interface in if_addrs::get_if_addrs()? {
        let entry = addresses.entry(interface.name.clone()).or_default();
        entry.0 |= interface.is_loopback();
        entry.1.push(interface.ip());
    }
    Ok(addresses.into_iter().map(|(name, (loopback, addresses))| card(name, loopback, addresses)).collect())
}

fn card(name: String, is_loopback: bool, addresses: Vec<IpAddr>) -> Card {
    let folder = Path::new(CARDS_FOLDER).join(&name);
    let number = |file: &str| std::fs::read_to_string(folder.join(file)).ok()?.trim().parse::<u64>().ok();
    let kind = match is_loopback {
        true => Kind::Loopback,
        false if folder.join("bridge").exists() || PRIVATE_NAMES.iter().any(|start| name.starts_with(start)) => {
            Kind::Private
        }
        false => Kind::Other,
    };
    // Virtual cards say -1, which is no u64, or 0.
    let speed_megabits = number("speed").filter(|megabits| *megabits > 0);
    Card { kind, addresses, speed_megabits, mtu_bytes: number("mtu"), name }
}

/// The card that has `address`.
pub(super) fn card_of(address: IpAddr, cards: &[Card]) -> Option<&Card> {
    cards.iter().find(|card| card.addresses.contains(&address.to_canonical()))
}

/// The address from which packets to the rest of the world leave. Nothing is sent.
fn routed_address() -> Option<IpAddr> {
    SOMEWHERE.into_iter().find_map(|somewhere| {
        let any: IpAddr = if somewhere.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let socket = UdpSocket::bind(SocketAddr::new(any, 0)).ok()?;
        socket.connect(SocketAddr::new(somewhere, 9)).ok()?;
        Some(socket.local_addr().ok()?.ip()).filter(|address| !address.is_unspecified())
    })
}

/// The address that others would be told, on which card it is, and whether it is one that they can reach.
pub(super) fn address(advertised: Option<&str>) -> Check {
    let cards = match cards() {
        Ok(cards) => cards,
        Err(error) => {
            let hint = "see that `ip address` lists the cards; then name yours with --advertise";
            return Check::warning("address", format!("the network cards cannot be listed: {error}"), hint);
        }
    };
    let Some(host) = advertised else {
        return judge(routed_address(), false, &cards);
    };
    let resolved = (host, 1).to_socket_addrs().ok().and_then(|mut found| found.next());
    match resolved {
        Some(address) => judge(Some(address.ip()), true, &cards),
        None => Check::failed(
            "address",
            format!("'{host}' is no address and does not resolve here"),
            "advertise an address instead of a name, or see that the name resolves on all sites",
        ),
    }
}

fn is_link_local(address: &IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    }
}

/// Docker's default network: in a container it looks like a card of its own.
fn is_docker_default(address: &IpAddr) -> bool {
    matches!(address, IpAddr::V4(address) if address.octets()[..2] == [172, 17])
}

fn judge(address: Option<IpAddr>, was_named: bool, cards: &[Card]) -> Check {
    let outside: Vec<String> =
        cards.iter().filter_map(|card| Some(format!("{} on {}", card.outside_address()?, card.describe()))).collect();
    let all = cards.iter().map(Card::to_json).collect::<Vec<_>>();
    let name_one = match cards.iter().find_map(Card::outside_address) {
        Some(address) => format!("advertise one that the other sites reach: `--advertise {address}`"),
        None => "connect this machine to the network of the other sites; `ip address` lists its cards".to_owned(),
    };
    let Some(address) = address.map(|address| address.to_canonical()) else {
        return Check::warning("address", "no network card leads out of this machine", name_one).with("cards", all);
    };
    let card = card_of(address, cards);
    let on = card.map_or_else(|| "no card of this machine".to_owned(), Card::describe);
    let fact = format!("{address} on {on}");
    let check = match card.map(|card| card.kind) {
        _ if address.is_loopback() => {
            Check::warning("address", format!("{fact}: only this machine reaches it"), name_one)
        }
        Some(Kind::Private) => {
            Check::warning("address", format!("{fact}: a bridge inside this machine, others do not reach it"), name_one)
        }
        _ if is_docker_default(&address) => {
            let hint =
                "run the container with `--network host`, or publish the port and advertise the machine's address";
            Check::warning("address", format!("{fact}: Docker's default network, others do not reach it"), hint)
        }
        _ if is_link_local(&address) => {
            Check::warning("address", format!("{fact}: a link-local address, of no use beyond one cable"), name_one)
        }
        None => {
            let hint = "right only behind address translation; the port must then be forwarded to this machine";
            Check::warning("address", fact, hint)
        }
        Some(_) if outside.len() > 1 && !was_named => {
            let hint = format!(
                "see that it is the one meant for the run, and say so with `--advertise`; there are: {}",
                outside.join("; ")
            );
            Check::warning("address", format!("{fact}, one of {}", outside.len()), hint)
        }
        Some(_) => Check::ok("address", fact),
    };
    check.with("address", address.to_string()).with("card", card.map_or(Value::Null, Card::to_json)).with("cards", all)
}

#[cfg(test)]
mod tests {
    use super::super::check::Status;
    use super::*;

    fn fake(name: &str, kind: Kind, address: &str) -> Card {
        let addresses = vec![address.parse().unwrap()];
        Card { name: name.to_owned(), kind, addresses, speed_megabits: Some(10_000), mtu_bytes: Some(1500) }
    }

    fn machine() -> Vec<Card> {
        vec![
            fake("lo", Kind::Loopback, "127.0.0.1"),
            fake("docker0", Kind::Private, "172.18.0.1"),
            fake("eth0", Kind::Other, "10.0.0.5"),
        ]
    }

    fn judged(address: &str, cards: &[Card]) -> Check {
        judge(Some(address.parse().unwrap()), false, cards)
    }

    #[test]
    fn the_card_of_the_address_is_named() {
        let check = judged("10.0.0.5", &machine());
        assert_eq!((check.status, check.fact.as_str()), (Status::Ok, "10.0.0.5 on eth0 (10.0 Gbit/s, MTU 1500)"));
        assert_eq!(check.fields["card"]["name"], "eth0");
        assert_eq!(check.fields["cards"].as_array().unwrap().len(), 3);
    }

    #[test]
    fn addresses_that_others_do_not_reach_are_warned_of() {
        for (address, said) in [
            ("127.0.0.1", "only this machine"),
            ("172.18.0.1", "a bridge inside this machine"),
            ("203.0.113.7", "no card of this machine"),
            ("169.254.3.4", "link-local"),
            ("172.17.0.2", "Docker's default network"),
        ] {
            let check = judged(address, &machine());
            assert!(check.status == Status::Warning && check.fact.contains(said), "{check:?}");
        }
        let hint = judged("127.0.0.1", &machine()).hint.unwrap();
        assert!(hint.contains("--advertise 10.0.0.5"), "{hint}");
        let nowhere = judge(None, false, &machine()[..1]);
        assert!(nowhere.status == Status::Warning && nowhere.hint.unwrap().contains("ip address"));
    }

    #[test]
    fn several_cards_are_warned_of_until_one_is_named() {
        let mut cards = machine();
        cards.push(fake("eth1", Kind::Other, "192.168.7.2"));
        let check = judged("192.168.7.2", &cards);
        assert!(check.status == Status::Warning && check.fact.ends_with("one of 2"), "{check:?}");
        assert!(check.hint.unwrap().contains("10.0.0.5 on eth0"));
        assert_eq!(judge(Some("192.168.7.2".parse().unwrap()), true, &cards).status, Status::Ok);
    }

    #[test]
    fn this_machine_has_a_loopback_card() {
        let cards = cards().unwrap();
        let loopback = card_of(IpAddr::V4(Ipv4Addr::LOCALHOST), &cards).unwrap();
        assert_eq!(loopback.kind, Kind::Loopback);
        assert!(address(Some("127.0.0.1")).status == Status::Warning);
    }
}
