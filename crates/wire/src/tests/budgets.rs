//! Peers with a key that take more than one may: connections, long words, many words.

use super::{LOOPBACK, bounded, identity};
use crate::frame::FrameError;
use crate::limits::{GREETING_BYTES_MAX, REQUEST_BYTES_MAX, SITE_MESSAGE_BYTES_MAX};
use crate::{
    Connection, Identity, Incoming, Listener, ListenerEvent, ListenerLimits, PeerLimits, Purpose, Rate, RecvError,
    RefusalReason, Traffic, connect,
};

async fn listen_for(peer: PeerLimits, server: &Identity) -> Listener {
    let limits = ListenerLimits { peer, ..ListenerLimits::default() };
    Listener::bind_with(LOOPBACK, server, &Traffic::new(), limits).await.unwrap()
}

async fn dial(listener: &Listener, server: &Identity, client: &Identity, purpose: Purpose) -> Connection {
    let address = listener.address().to_string();
    connect(client, &Traffic::new(), &address, server.fingerprint(), purpose).await.unwrap()
}

/// Both ends of another connection.
async fn meet(
    listener: &mut Listener,
    server: &Identity,
    client: &Identity,
    purpose: Purpose,
) -> (Connection, Connection) {
    let dialled = dial(listener, server, client, purpose).await;
    let Incoming { connection, .. } = listener.accept().await.unwrap();
    (dialled, connection)
}

#[tokio::test]
async fn a_peer_with_too_many_connections_gets_no_more_and_others_do() {
    bounded(async {
        let (server, greedy, modest) = (identity(), identity(), identity());
        let limits = PeerLimits { connections_max: 3, ..PeerLimits::default() };
        let mut listener = listen_for(limits, &server).await;
        let mut held = Vec::new();
        for _ in 0..3 {
            held.push(meet(&mut listener, &server, &greedy, Purpose::Blob).await);
        }
        let mut fourth = dial(&listener, &server, &greedy, Purpose::Blob).await;
        let ListenerEvent::Refused(refusal) = listener.next().await.unwrap() else { panic!("a fourth was accepted") };
        let RefusalReason::Connections { peer, connections } = refusal.reason else { panic!("{}", refusal.reason) };
        assert_eq!((peer, connections, listener.stats().refused), (greedy.fingerprint(), 3, 1));
        assert!(fourth.recv::<String>().await.is_err());
        let _other = meet(&mut listener, &server, &modest, Purpose::Control).await;
        let (client, server_end) = held.pop().unwrap();
        drop((client, server_end));
        let _again = meet(&mut listener, &server, &greedy, Purpose::Blob).await;
        assert_eq!((listener.stats().accepted, listener.stats().refused), (5, 1));
    })
    .await;
}

#[tokio::test]
async fn a_word_is_as_long_as_its_place_allows() {
    bounded(async {
        let (server, client) = (identity(), identity());
        let mut listener = listen_for(PeerLimits::default(), &server).await;
        let cases = [
            (Purpose::Control, false, GREETING_BYTES_MAX),
            (Purpose::Control, true, SITE_MESSAGE_BYTES_MAX),
            (Purpose::Probe, false, GREETING_BYTES_MAX),
            (Purpose::Blob, true, REQUEST_BYTES_MAX),
        ];
        for (purpose, has_greeted, bytes_max) in cases {
            let (mut client, mut server) = meet(&mut listener, &server, &client, purpose).await;
            if has_greeted {
                client.send("hello").await.unwrap();
                assert_eq!(server.recv::<String>().await.unwrap(), "hello");
            }
            client.send(&"x".repeat(bytes_max)).await.unwrap();
            let error = server.recv::<String>().await.unwrap_err();
            let is_right = |error: &RecvError| matches!(error, RecvError::Frame(FrameError::TooLong { bytes_max: most, .. }) if *most == bytes_max);
            assert!(is_right(&error), "{purpose:?}: {error}");
        }
    })
    .await;
}

#[tokio::test]
async fn a_peer_that_says_too_much_is_read_more_slowly_and_loses_nothing() {
    bounded(async {
        let (server, client) = (identity(), identity());
        let rate = |burst, per_second| Rate { burst, per_second };
        for limits in [
            PeerLimits { messages: rate(10.0, 2_000.0), ..PeerLimits::default() },
            PeerLimits { bytes: rate(100.0, 20_000.0), ..PeerLimits::default() },
        ] {
            let mut listener = listen_for(limits, &server).await;
            let (mut flooding, mut read) = meet(&mut listener, &server, &client, Purpose::Control).await;
            for number in 0..100_u32 {
                flooding.send(&(number, "ten bytes.")).await.unwrap();
            }
            for number in 0..100_u32 {
                assert_eq!(read.recv::<(u32, String)>().await.unwrap().0, number);
            }
            assert!(listener.stats().throttled > 0);
        }
        let mut listener = listen_for(PeerLimits::default(), &server).await;
        let (mut honest, mut read) = meet(&mut listener, &server, &client, Purpose::Control).await;
        for number in 0..100_u32 {
            honest.send(&number).await.unwrap();
            assert_eq!(read.recv::<u32>().await.unwrap(), number);
        }
        assert_eq!(listener.stats().throttled, 0);
    })
    .await;
}
