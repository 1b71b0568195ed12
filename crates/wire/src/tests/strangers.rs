//! Peers that are not who they should be, other programs, other versions, silence and floods.

use super::{LOOPBACK, bounded, connected, identity, listen, listen_with};
use crate::limits::{PROTOCOL_VERSION, REFUSALS_REPORTED_PER_MINUTE_MAX};
use crate::preamble::{self, PREAMBLE_BYTES};
use crate::{
    ConnectError, Identity, ListenError, Listener, ListenerEvent, PreambleError, Purpose, Refusal, RefusalReason,
    Traffic, connect,
};
use base::Hint;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

const LONG: Duration = Duration::from_secs(60);

async fn refusal(listener: &mut Listener) -> Refusal {
    match listener.next().await.unwrap() {
        ListenerEvent::Refused(refusal) => refusal,
        ListenerEvent::Incoming(incoming) => panic!("accepted: {incoming:?}"),
    }
}

async fn dial(listener: &SocketAddr, server: &Identity) -> Result<crate::Connection, ConnectError> {
    let address = listener.to_string();
    connect(&identity(), &Traffic::new(), &address, server.fingerprint(), Purpose::Control).await
}

/// A real peer is served.
async fn assert_serves(listener: &mut Listener, server: &Identity) {
    let address = listener.address();
    let (dialled, accepted) = tokio::join!(dial(&address, server), listener.accept());
    let (mut client, mut server) = (dialled.unwrap(), accepted.unwrap().connection);
    client.send("hello").await.unwrap();
    assert_eq!(server.recv::<String>().await.unwrap(), "hello");
}

#[tokio::test]
async fn a_wrong_fingerprint_is_refused_with_both_named() {
    bounded(async {
        let (server, other) = (identity(), identity());
        let mut listener = listen(&server).await;
        let address = listener.address();
        let (dialled, refused) = tokio::join!(dial(&address, &other), refusal(&mut listener));
        let error = dialled.unwrap_err();
        for fingerprint in [server.fingerprint(), other.fingerprint()] {
            assert!(error.to_string().contains(&fingerprint.to_string()), "{error}");
        }
        assert!(error.hint().unwrap().contains("beringia serve"));
        assert!(matches!(refused.reason, RefusalReason::Handshake(_)), "{:?}", refused.reason);
        assert_serves(&mut listener, &server).await;
    })
    .await;
}

/// Connects with a preamble of our choice; what the client and what the listener make of it.
async fn greet_with(greeting: [u8; PREAMBLE_BYTES]) -> (PreambleError, RefusalReason) {
    let server = identity();
    let mut listener = listen(&server).await;
    let socket = TcpStream::connect(listener.address()).await.unwrap();
    let client = identity();
    let traffic = Traffic::new();
    let greeting = crate::connection::greet(&client, &traffic, socket, server.fingerprint(), greeting);
    let (greeted, refused) = tokio::join!(greeting, refusal(&mut listener));
    match greeted.unwrap_err() {
        crate::connection::HandshakeProblem::Preamble(error) => (error, refused.reason),
        problem => panic!("{problem:?}"),
    }
}

#[tokio::test]
async fn the_listener_names_older_newer_and_foreign_peers() {
    bounded(async {
        let ours = PROTOCOL_VERSION;
        let preamble_of = |reason| match reason {
            RefusalReason::Preamble(error) => error,
            reason => panic!("{reason}"),
        };
        let (_, reason) = greet_with(preamble::encode(ours - 1, 1)).await;
        assert_eq!(preamble_of(reason), PreambleError::PeerOlder { theirs: ours - 1, ours });
        let (_, reason) = greet_with(preamble::encode(ours + 1, 1)).await;
        assert_eq!(preamble_of(reason), PreambleError::PeerNewer { theirs: ours + 1, ours });
        let (_, reason) = greet_with(*b"GET / HTTP/1").await;
        assert_eq!(preamble_of(reason), PreambleError::NotBeringia);
        let (answer, reason) = greet_with(preamble::encode(ours, 77)).await;
        assert_eq!(preamble_of(reason), PreambleError::Purpose(77));
        assert_eq!(answer, PreambleError::Purpose(0), "the server's answer grants no purpose");
    })
    .await;
}

/// A server that speaks another version.
async fn serve_version(version: u16) -> PreambleError {
    let server = identity();
    let socket = TcpListener::bind(LOOPBACK).await.unwrap();
    let address = socket.local_addr().unwrap();
    let config = server.server_config();
    let serving = tokio::spawn(async move {
        let (stream, _) = socket.accept().await.unwrap();
        let mut stream = tokio_rustls::TlsAcceptor::from(config).accept(stream).await.unwrap();
        stream.write_all(&preamble::encode(version, 1)).await.unwrap();
        stream.flush().await.unwrap();
        let _ = stream.read(&mut [0; 64]).await;
    });
    let error = dial(&address, &server).await.unwrap_err();
    serving.await.unwrap();
    match error {
        ConnectError::Preamble { source, .. } => source,
        error => panic!("{error}"),
    }
}

#[tokio::test]
async fn the_client_names_older_and_newer_servers() {
    bounded(async {
        let ours = PROTOCOL_VERSION;
        assert_eq!(serve_version(ours - 1).await, PreambleError::PeerOlder { theirs: ours - 1, ours });
        assert_eq!(serve_version(ours + 1).await, PreambleError::PeerNewer { theirs: ours + 1, ours });
    })
    .await;
}

#[tokio::test]
async fn the_client_names_another_program_and_nobody() {
    bounded(async {
        let socket = TcpListener::bind(LOOPBACK).await.unwrap();
        let address = socket.local_addr().unwrap();
        let other_program = tokio::spawn(async move {
            let (mut stream, _) = socket.accept().await.unwrap();
            stream.write_all(b"SSH-2.0-OpenSSH_9.9\r\n").await.unwrap();
            let _ = stream.read(&mut [0; 64]).await;
        });
        let error = dial(&address, &identity()).await.unwrap_err();
        assert!(matches!(error, ConnectError::Preamble { source: PreambleError::NotBeringia, .. }), "{error}");
        other_program.await.unwrap();
        let error = dial(&address, &identity()).await.unwrap_err();
        assert!(matches!(error, ConnectError::Unreachable { .. }), "{error}");
        assert!(error.to_string().contains(&address.to_string()) && error.hint().is_some());
    })
    .await;
}

#[tokio::test]
async fn garbage_is_refused_and_others_are_served() {
    bounded(async {
        let server = identity();
        let mut listener = listen(&server).await;
        let mut stranger = TcpStream::connect(listener.address()).await.unwrap();
        stranger.write_all(&[0xff; 4096]).await.unwrap();
        let refused = refusal(&mut listener).await;
        assert!(matches!(refused.reason, RefusalReason::Preamble(PreambleError::NotBeringia)), "{:?}", refused.reason);
        assert_eq!(refused.address, stranger.local_addr().unwrap());
        assert_serves(&mut listener, &server).await;
    })
    .await;
}

#[tokio::test]
async fn silence_and_half_a_handshake_end_with_the_deadline() {
    bounded(async {
        let server = identity();
        let mut listener = listen_with(&server, 8, Duration::from_millis(50)).await;
        let _silent = TcpStream::connect(listener.address()).await.unwrap();
        // The header of a TLS record of 16 KiB that never comes.
        let mut half = TcpStream::connect(listener.address()).await.unwrap();
        half.write_all(&[0x16, 3, 1, 0x40, 0]).await.unwrap();
        for _ in 0..2 {
            let refused = refusal(&mut listener).await;
            assert!(matches!(refused.reason, RefusalReason::Timeout(_)), "{:?}", refused.reason);
        }
        assert_eq!(half.read(&mut [0; 16]).await.unwrap_or(0), 0, "the socket was closed");
    })
    .await;
}

#[tokio::test]
async fn silent_strangers_are_displaced_by_newer_connections() {
    bounded(async {
        let server = identity();
        let mut listener = listen_with(&server, 4, LONG).await;
        let mut silent = Vec::new();
        for _ in 0..4 {
            silent.push(TcpStream::connect(listener.address()).await.unwrap());
        }
        assert_serves(&mut listener, &server).await;
        let refused = refusal(&mut listener).await;
        assert!(matches!(refused.reason, RefusalReason::Displaced(4)), "{:?}", refused.reason);
        assert_eq!(refused.address, silent[0].local_addr().unwrap(), "the oldest goes first");
    })
    .await;
}

#[tokio::test]
async fn a_flood_is_counted_but_not_told_one_by_one() {
    bounded(async {
        let server = identity();
        let mut listener = listen(&server).await;
        let flood = u64::from(REFUSALS_REPORTED_PER_MINUTE_MAX) + 20;
        for _ in 0..flood {
            let mut stranger = TcpStream::connect(listener.address()).await.unwrap();
            stranger.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
            while let Ok(1..) = stranger.read(&mut [0; 64]).await {}
        }
        while listener.stats().refused < flood {
            tokio::task::yield_now().await;
        }
        assert_serves(&mut listener, &server).await;
        assert_eq!(listener.stats().accepted, 1);
        let mut told = 0;
        while let Ok(Some(_)) = tokio::time::timeout(Duration::ZERO, listener.next()).await {
            told += 1;
        }
        assert_eq!(told, REFUSALS_REPORTED_PER_MINUTE_MAX);
    })
    .await;
}

#[tokio::test]
async fn a_port_in_use_is_named_with_a_way_out() {
    bounded(async {
        let server = identity();
        let listener = listen(&server).await;
        let error = Listener::bind(listener.address(), &server, &Traffic::new()).await.unwrap_err();
        assert!(matches!(error, ListenError::PortInUse { .. }), "{error}");
        assert!(error.to_string().contains(&listener.address().port().to_string()));
        assert!(error.hint().unwrap().contains("--listen "), "{:?}", error.hint());
    })
    .await;
}

#[tokio::test]
async fn a_dropped_listener_frees_its_port_and_keeps_its_peers() {
    bounded(async {
        let server = identity();
        let listener = listen(&server).await;
        let address = listener.address();
        drop(listener);
        let rebound = loop {
            match Listener::bind(address, &server, &Traffic::new()).await {
                Ok(listener) => break listener,
                Err(ListenError::PortInUse { .. }) => tokio::task::yield_now().await,
                Err(error) => panic!("{error}"),
            }
        };
        assert_eq!(rebound.address(), address);
        // `connected` drops its listener before it returns.
        let (mut client, mut server) = connected().await;
        client.send(&7u8).await.unwrap();
        assert_eq!(server.recv::<u8>().await.unwrap(), 7);
    })
    .await;
}
