//! Which network card an address belongs to: on machines with several, the one that is really used is often not the one
//! that was meant.

use std::net::IpAddr;

/// Name of the card that has `address`, if the system tells. Reads the system's list: not for every message.
pub fn name_of(address: IpAddr) -> Option<String> {
    let wanted = address.to_canonical();
    let interfaces = if_addrs::get_if_addrs().ok()?;
    interfaces.into_iter().find(|interface| interface.ip() == wanted).map(|interface| interface.name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{Ipv4Addr, Ipv6Addr};

    #[test]
    fn loopback_has_a_card_and_a_foreign_address_has_none() {
        let loopback = name_of(Ipv4Addr::LOCALHOST.into()).unwrap();
        assert!(loopback.starts_with("lo"), "{loopback}");
        assert_eq!(name_of(Ipv4Addr::LOCALHOST.to_ipv6_mapped().into()), Some(loopback));
        // Addresses for documentation: RFC 5737 and RFC 3849.
        assert_eq!(name_of(Ipv4Addr::new(192, 0, 2, 1).into()), None);
        assert_eq!(name_of(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).into()), None);
    }
}
