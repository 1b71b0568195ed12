//! The lab's network: a SOCKS5 relay for each site, which joins what the site dials over the links of that pair.
//!
//! Everything has a name: sites are told to advertise theirs, the coordinator is `coordinator`, and a relay connects to these
//! names on loopback and to nothing else, so that no traffic of a site goes round its links. A relay's own sockets buffer
//! little, so that a sender feels the link and not the relay's memory.

use super::matrix::Links;
use super::shaper::{Broken, Kind, Link, link_seed};
use super::socks::{self, Reply};
use socket2::SockRef;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

/// Kernel buffer of each of a relay's sockets, each way: the window of a short link.
const SOCKET_BUFFER_BYTES: u32 = 64 * 1024;

/// Segments on loopback have 64 kB, and a sender's kernel buffers grow in segments. With those of Ethernet they grow as they
/// would between sites.
const SEGMENT_BYTES: u32 = 1_448;

/// Connections of one site at the same time.
const CONNECTIONS_MAX: usize = 1_024;

/// Connections that wait to be accepted.
const BACKLOG: u32 = 128;

/// From an accepted connection to its request, on loopback.
const REQUEST_WAIT_MAX: Duration = Duration::from_secs(10);

/// Pause after the system could not accept (no file descriptors left).
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// The ends of a lab and the links between them.
#[derive(Debug)]
pub(super) struct Network {
    names: Vec<String>,
    /// By source, then destination. The diagonal is not used.
    links: Vec<Vec<Arc<Link>>>,
    /// Where the lab measures: connections to this port are not the sites'.
    meter_port: u16,
}

/// Where a request leads.
#[derive(Debug)]
struct Route {
    address: SocketAddr,
    kind: Kind,
    forward: Arc<Link>,
    backward: Arc<Link>,
}

impl Route {
    /// Waits until a connection could be opened: both ways must be there.
    async fn passable(&self) {
        self.forward.passable().await;
        self.backward.passable().await;
    }
}

impl Network {
    pub(super) fn new(links: &Links, seed: u64, meter_port: u16) -> Self {
        let names = links.names().to_vec();
        let row = |from| (0..names.len()).map(move |to| Link::new(links.spec(from, to), link_seed(seed, from, to)));
        let links = (0..names.len()).map(|from| row(from).collect()).collect();
        Self { names, links, meter_port }
    }

    pub(super) fn name(&self, end: usize) -> &str {
        &self.names[end]
    }

    pub(super) fn link(&self, from: usize, to: usize) -> &Arc<Link> {
        &self.links[from][to]
    }

    fn route(&self, from: usize, host: &str, port: u16) -> Option<Route> {
        let to = self.names.iter().position(|name| name == host).filter(|to| *to != from)?;
        let kind = if port == self.meter_port { Kind::Measurement } else { Kind::Traffic };
        let (forward, backward) = (Arc::clone(&self.links[from][to]), Arc::clone(&self.links[to][from]));
        Some(Route { address: SocketAddr::from((Ipv4Addr::LOCALHOST, port)), kind, forward, backward })
    }
}

/// Opens a relay's port. Needs a tokio runtime.
pub(super) fn listen() -> io::Result<TcpListener> {
    let socket = TcpSocket::new_v4()?;
    buffer_little(&socket)?;
    socket.bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?;
    socket.listen(BACKLOG)
}

/// Accepted sockets inherit it.
fn buffer_little(socket: &TcpSocket) -> io::Result<()> {
    socket.set_recv_buffer_size(SOCKET_BUFFER_BYTES)?;
    socket.set_send_buffer_size(SOCKET_BUFFER_BYTES)?;
    SockRef::from(socket).set_tcp_mss(SEGMENT_BYTES)
}

/// Serves one site for ever.
pub(super) async fn serve(network: Arc<Network>, site: usize, listener: TcpListener) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut connections = JoinSet::new();
    loop {
        // The semaphore is never closed.
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let accepted = loop {
            tokio::select! {
                accepted = listener.accept() => break accepted,
                Some(_ended) = connections.join_next() => {}
            }
        };
        match accepted {
            Ok((client, _)) => {
                let network = Arc::clone(&network);
                connections.spawn(async move {
                    let _place = place;
                    // Who is refused has been told; who is gone need not be.
                    let _ended = relay(&network, site, client).await;
                });
            }
            Err(_) => sleep(ACCEPT_RETRY).await,
        }
    }
}

async fn relay(network: &Network, site: usize, mut client: TcpStream) -> io::Result<()> {
    client.set_nodelay(true)?;
    let (host, port) = timeout(REQUEST_WAIT_MAX, socks::accept(&mut client)).await??;
    let Some(route) = network.route(site, &host, port) else {
        return socks::answer(&mut client, Reply::NotAllowed).await;
    };
    let mut first_byte = [0];
    tokio::select! {
        () = route.passable() => {}
        // It says nothing before it is answered: it has given up.
        _ = client.peek(&mut first_byte) => return Ok(()),
    }
    let connected = connect(route.address).await;
    // As long as a TCP handshake over these links takes.
    sleep(route.forward.one_way() + route.backward.one_way()).await;
    let Ok(target) = connected else { return socks::answer(&mut client, Reply::ConnectionRefused).await };
    socks::answer(&mut client, Reply::Succeeded).await?;
    join(client, target, &route).await
}

async fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    buffer_little(&socket)?;
    let target = socket.connect(address).await?;
    target.set_nodelay(true)?;
    Ok(target)
}

/// Carries both directions until both have ended, or breaks the connection at both ends.
async fn join(mut client: TcpStream, mut target: TcpStream, route: &Route) -> io::Result<()> {
    let carried = {
        let (from_client, to_client) = client.split();
        let (from_target, to_target) = target.split();
        let forward = route.forward.flow(route.kind).carry(from_client, to_target);
        let backward = route.backward.flow(route.kind).carry(from_target, to_client);
        tokio::try_join!(forward, backward)
    };
    if let Err(Broken) = carried {
        // Dropped sockets then send a reset, as both ends of a broken connection see one.
        client.set_zero_linger()?;
        target.set_zero_linger()?;
    }
    Ok(())
}
