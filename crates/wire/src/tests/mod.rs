//! The crate as its users see it, over loopback sockets, with peers that behave and peers that do not.

mod blobs;
mod budgets;
mod flips;
mod links;
mod messages;
mod probes;
mod proxies;
mod strangers;

use crate::limits::FRAME_BYTES_MAX;
use crate::{Connection, Identity, Listener, ListenerLimits, PeerLimits, Purpose, Traffic, connect};
use std::future::Future;
use std::net::SocketAddr;
use std::time::Duration;

/// A free port of this machine.
const LOOPBACK: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);

/// Ends a test that would hang. Nothing is measured with it.
async fn bounded<T>(test: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(60), test).await.expect("the test hangs")
}

fn identity() -> Identity {
    Identity::generate().unwrap()
}

async fn listen(identity: &Identity) -> Listener {
    Listener::bind(LOOPBACK, identity, &Traffic::new()).await.unwrap()
}

async fn listen_with(identity: &Identity, handshakes_max: usize, handshake: Duration) -> Listener {
    let limits = ListenerLimits { handshakes_max, handshake, ..ListenerLimits::default() };
    Listener::bind_with(LOOPBACK, identity, &Traffic::new(), limits).await.unwrap()
}

/// Both ends of one connection: the client's, the server's. Either may say what fits a frame.
async fn connected() -> (Connection, Connection) {
    let (server, client) = (identity(), identity());
    let (greeting_bytes_max, message_bytes_max) = (FRAME_BYTES_MAX, FRAME_BYTES_MAX);
    let peer = PeerLimits { greeting_bytes_max, message_bytes_max, ..PeerLimits::default() };
    let limits = ListenerLimits { peer, ..ListenerLimits::default() };
    let mut listener = Listener::bind_with(LOOPBACK, &server, &Traffic::new(), limits).await.unwrap();
    let address = listener.address().to_string();
    let (traffic, fingerprint) = (Traffic::new(), server.fingerprint());
    let dialled = connect(&client, &traffic, &address, fingerprint, Purpose::Control);
    let (dialled, accepted) = tokio::join!(dialled, listener.accept());
    let (dialled, accepted) = (dialled.unwrap(), accepted.unwrap());
    assert_eq!(accepted.purpose, Purpose::Control);
    assert_eq!((dialled.peer(), accepted.connection.peer()), (server.fingerprint(), client.fingerprint()));
    (dialled, accepted.connection)
}
