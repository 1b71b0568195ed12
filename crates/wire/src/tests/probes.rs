//! Probes against a side that answers as it should, and against sides that lie.

use super::{LOOPBACK, bounded, connected, identity, listen};
use crate::limits::{PROBE_CHUNK_BYTES, PROBE_REQUESTS_MAX, PROBE_STREAMS, PROBE_VECTOR_VALUES_MAX};
use crate::preamble;
use crate::probe::{
    AnswerError, ChunkHeader, Direction, ProbeError, ProbeGreeting, ProbeKind, ProbeReply, ProbeRequest, ProbeWelcome,
    Prober, Reference, ReferenceVector, Transfer, TransferError, drain, serve_probe, welcome_probe,
};
use crate::{ConnectError, Connection, Identity, Invite, PreambleError, Secret};
use base::Hint;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

fn reference() -> Reference {
    let vector = |name: &str, values: Vec<f32>| ReferenceVector { name: name.to_owned(), values };
    let vectors = vec![vector("add", vec![1.0, 2.0]), vector("loss", vec![3.5])];
    Reference { engine: "flex".to_owned(), device: "a processor".to_owned(), precision: "f32".to_owned(), vectors }
}

const EXPECTED: [(&str, usize); 2] = [("add", 2), ("loss", 1)];

fn prober(server: &Identity, address: SocketAddr) -> Prober {
    let invite = Invite::new(&address.to_string(), "run", server.fingerprint(), Secret::generate().unwrap()).unwrap();
    Prober::new(identity(), invite, "1.2.3")
}

/// A side that answers every connection as it should.
async fn answering(reference: Result<Reference, String>) -> (Prober, JoinHandle<()>) {
    let server = identity();
    let mut listener = listen(&server).await;
    let prober = prober(&server, listener.address());
    let reference = reference.map(Arc::new);
    let task = tokio::spawn(async move {
        while let Some(incoming) = listener.accept().await {
            assert_eq!(incoming.purpose, crate::Purpose::Probe);
            let (mut connection, reference) = (incoming.connection, reference.clone());
            tokio::spawn(async move {
                let greeting: ProbeGreeting = connection.recv().await.unwrap();
                assert!(greeting.is_acceptable() && greeting.version == "1.2.3", "{greeting:?}");
                welcome_probe(&mut connection, "4.5.6", None).await.unwrap();
                // How the peer leaves is not what is tested.
                let _left = serve_probe(&mut connection, &greeting, || async { reference.clone() }).await;
            });
        }
    });
    (prober, task)
}

/// A side that welcomes one probe and then does what the test says.
async fn lying<F>(lie: impl FnOnce(Connection) -> F + Send + 'static) -> (Prober, JoinHandle<()>)
where
    F: Future<Output = ()> + Send,
{
    let server = identity();
    let mut listener = listen(&server).await;
    let prober = prober(&server, listener.address());
    let task = tokio::spawn(async move {
        let mut connection = listener.accept().await.unwrap().connection;
        let _greeting: ProbeGreeting = connection.recv().await.unwrap();
        welcome_probe(&mut connection, "4.5.6", None).await.unwrap();
        lie(connection).await;
    });
    (prober, task)
}

#[tokio::test]
async fn pings_results_and_transfers_come_back() {
    bounded(async {
        let (prober, task) = answering(Ok(reference())).await;
        let mut asked = prober.connect().await.unwrap();
        assert_eq!(
            *asked.welcome(),
            ProbeWelcome { version: "4.5.6".into(), seen_as: asked.local_address().to_string() }
        );
        let ping = asked.ping().await.unwrap();
        // One clock for both ends: they differ by what a scheduler does, not by a minute.
        assert!(ping.round_trip.as_nanos() > 0 && ping.clock_difference_seconds.abs() < 60.0, "{ping:?}");
        assert_eq!(asked.reference(&EXPECTED).await.unwrap(), reference());
        assert!(asked.ping().await.is_ok(), "further questions are answered");
        for direction in [Direction::Download, Direction::Upload] {
            let bandwidth = prober.transfer(direction).await.unwrap();
            assert_eq!(bandwidth.streams, PROBE_STREAMS);
            assert!(bandwidth.bytes > 0 && bandwidth.bits_per_second() > 0.0, "{bandwidth:?}");
        }
        asked.close().await.unwrap();
        task.abort();
    })
    .await;
}

#[tokio::test]
async fn a_refusal_is_told_with_its_hint() {
    bounded(async {
        let (prober, task) = answering(Err("no engine here".to_owned())).await;
        let error = prober.connect().await.unwrap().reference(&EXPECTED).await.unwrap_err();
        assert!(matches!(error, ProbeError::Refused { .. }), "{error:?}");
        assert_eq!(error.to_string(), "no engine here");
        task.abort();
        let server = identity();
        let mut listener = listen(&server).await;
        let prober = self::prober(&server, listener.address());
        let refusing = async {
            let mut connection = listener.accept().await.unwrap().connection;
            let _greeting: ProbeGreeting = connection.recv().await.unwrap();
            welcome_probe(&mut connection, "4.5.6", Some(("not invited", "ask again"))).await.unwrap();
        };
        let (refused, ()) = tokio::join!(prober.connect(), refusing);
        let refused = refused.unwrap_err();
        assert_eq!((refused.to_string(), refused.hint()), ("not invited".to_owned(), Some("ask again".to_owned())));
    })
    .await;
}

/// What the side that asks makes of these replies to its question for reference results.
async fn lied_to(replies: Vec<ProbeReply>) -> ProbeError {
    let lie = |mut connection: Connection| async move {
        assert_eq!(connection.recv::<ProbeRequest>().await.unwrap(), ProbeRequest::Reference);
        for reply in replies {
            connection.send(&reply).await.unwrap();
        }
        // Until the other side has read it all.
        let _left = connection.recv::<ProbeRequest>().await;
    };
    let (prober, task) = lying(lie).await;
    let error = prober.connect().await.unwrap().reference(&EXPECTED).await.unwrap_err();
    task.await.unwrap();
    error
}

#[tokio::test]
async fn lies_about_counts_names_and_lengths_are_refused() {
    bounded(async {
        let announce = |vectors| {
            let (engine, device, precision) = ("flex".to_owned(), String::new(), "f32".to_owned());
            ProbeReply::Reference { engine, device, precision, vectors }
        };
        let vector = |name: &str, length| {
            ProbeReply::Vector(ReferenceVector { name: name.to_owned(), values: vec![0.0; length] })
        };
        for (replies, said) in [
            (vec![announce(u32::MAX)], "4294967295 reference results where 2 were asked"),
            (vec![announce(1)], "1 reference results where 2 were asked"),
            (vec![announce(2), vector("add", 3)], "3 numbers of 'add' where 2 of 'add' were asked"),
            (vec![announce(2), vector("add", PROBE_VECTOR_VALUES_MAX)], "131072 numbers of 'add'"),
            (vec![announce(2), vector("add", 2), vector("rm", 1)], "1 numbers of 'rm' where 1 of 'loss' were asked"),
            (vec![announce(2), ProbeReply::Pong { unix_ns: 1 }], "with something else"),
        ] {
            let error = lied_to(replies).await;
            assert!(matches!(error, ProbeError::Answer(_)), "{error:?}");
            assert!(error.to_string().contains(said), "{error}");
        }
    })
    .await;
}

#[tokio::test]
async fn chunks_over_their_bounds_are_refused_by_both_sides() {
    bounded(async {
        let announced = |bytes: u32, chunks: u32| async move {
            let (mut client, mut server) = connected().await;
            let sending = tokio::spawn(async move {
                for _ in 0..chunks {
                    client.send(&ChunkHeader { bytes }).await.unwrap();
                    client.halves().0.send_raw(vec![7; bytes.min(1024) as usize].into()).await.unwrap();
                }
                client.send(&ChunkHeader { bytes: 0 }).await.unwrap();
                client
            });
            let drained = drain(server.halves().1, 2_048).await;
            let _client = sending.await.unwrap();
            drained
        };
        let huge = announced(u32::MAX, 1).await;
        assert!(matches!(huge, Err(TransferError::Chunk { bytes: u32::MAX })), "{huge:?}");
        let above = announced(PROBE_CHUNK_BYTES as u32 + 1, 1).await;
        assert!(matches!(above, Err(TransferError::Chunk { .. })), "{above:?}");
        let too_many = announced(1024, 3).await;
        assert!(matches!(too_many, Err(TransferError::Budget { bytes_max: 2_048 })), "{too_many:?}");
        assert!(announced(1024, 2).await.is_ok());
    })
    .await;
}

#[tokio::test]
async fn an_impossible_rate_is_not_believed() {
    bounded(async {
        let server = identity();
        let mut listener = listen(&server).await;
        let prober = prober(&server, listener.address());
        let task = tokio::spawn(async move {
            while let Some(incoming) = listener.accept().await {
                let mut connection = incoming.connection;
                tokio::spawn(async move {
                    let _greeting: ProbeGreeting = connection.recv().await.unwrap();
                    welcome_probe(&mut connection, "4.5.6", None).await.unwrap();
                    let _request: ProbeRequest = connection.recv().await.unwrap();
                    let received = Transfer { bytes: u64::MAX, seconds: f64::NAN };
                    connection.send(&ProbeReply::Received(received)).await.unwrap();
                    while connection.halves().1.recv_raw(1024).await.is_ok() {}
                });
            }
        });
        let error = prober.transfer(Direction::Upload).await.unwrap_err();
        assert!(matches!(error, ProbeError::Answer(_)), "{error:?}");
        task.abort();
    })
    .await;
}

#[tokio::test]
async fn a_probe_that_asks_too_much_is_ended() {
    bounded(async {
        let (mut client, mut server) = connected().await;
        let asking = tokio::spawn(async move {
            for _ in 0..PROBE_REQUESTS_MAX {
                client.send(&ProbeRequest::Ping).await.unwrap();
                assert!(matches!(client.recv().await.unwrap(), ProbeReply::Pong { .. }));
            }
            client
        });
        let greeting =
            ProbeGreeting { run: "run".into(), secret: None, kind: ProbeKind::Questions, version: "1".into() };
        let ended = serve_probe(&mut server, &greeting, || async { Err(String::new()) }).await;
        assert!(matches!(ended, Err(AnswerError::Questions)), "{ended:?}");
        let _client = asking.await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_build_without_probes_is_named() {
    bounded(async {
        let server = identity();
        let socket = TcpListener::bind(LOOPBACK).await.unwrap();
        let prober = prober(&server, socket.local_addr().unwrap());
        let config = server.server_config();
        let serving = tokio::spawn(async move {
            let (stream, _) = socket.accept().await.unwrap();
            let mut stream = tokio_rustls::TlsAcceptor::from(config).accept(stream).await.unwrap();
            // What a build of the same protocol answers to a purpose that it does not have.
            stream.write_all(&preamble::encode(crate::limits::PROTOCOL_VERSION, 0)).await.unwrap();
            stream.flush().await.unwrap();
            let _left = stream.read(&mut [0; 64]).await;
        });
        let error = prober.connect().await.unwrap_err();
        let named =
            matches!(&error, ProbeError::Connect(ConnectError::Preamble { source: PreambleError::Purpose(0), .. }));
        assert!(named, "{error:?}");
        assert!(error.hint().unwrap().contains("same build"), "{error}");
        serving.await.unwrap();
    })
    .await;
}
