//! Messages between two peers that know each other.

use super::{bounded, connected};
use crate::frame::FrameError;
use crate::limits::FRAME_BYTES_MAX;
use crate::{RecvError, SendError};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::time::Duration;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
enum Message {
    Hello { name: String },
    Numbers(Vec<u64>),
    Bye,
}

fn messages() -> Vec<Message> {
    let numbers = |count| Message::Numbers((0..count).collect());
    vec![Message::Hello { name: "site-a".to_owned() }, numbers(0), numbers(100_000), Message::Bye]
}

#[tokio::test]
async fn messages_come_back_and_are_counted() {
    bounded(async {
        let (mut client, server) = connected().await;
        let (mut sender, mut receiver) = server.split();
        let echo = tokio::spawn(async move {
            while let Ok(message) = receiver.recv::<Message>().await {
                sender.send(&message).await.unwrap();
            }
            sender.close().await.unwrap();
            receiver.traffic().clone()
        });
        for message in messages() {
            client.send(&message).await.unwrap();
            assert_eq!(client.recv::<Message>().await.unwrap(), message);
        }
        client.close().await.unwrap();
        assert!(matches!(client.recv::<Message>().await, Err(RecvError::Closed)));
        let (ours, theirs) = (client.traffic(), echo.await.unwrap());
        assert_eq!((ours.bytes_sent(), ours.bytes_received()), (theirs.bytes_received(), theirs.bytes_sent()));
        assert!(ours.bytes_sent() > 200_000, "{ours:?}");
    })
    .await;
}

#[tokio::test]
async fn a_receive_that_is_dropped_loses_nothing() {
    bounded(async {
        let (mut client, mut server) = connected().await;
        let frame = crate::frame::encode(&messages()[2]).unwrap();
        for piece in frame.chunks(frame.len() / 7) {
            client.halves().0.send_raw(Bytes::copy_from_slice(piece)).await.unwrap();
            if piece.len() == frame.len() / 7 {
                // Polled until it waits for more, then dropped in mid-frame.
                let early = server.recv_timeout::<Message>(Duration::from_millis(1)).await;
                if let Ok(message) = early {
                    assert_eq!(message, messages()[2]);
                    return;
                }
                assert!(matches!(early, Err(RecvError::Timeout(_))), "{early:?}");
            }
        }
        assert_eq!(server.recv::<Message>().await.unwrap(), messages()[2]);
    })
    .await;
}

#[tokio::test]
async fn a_send_that_is_dropped_is_completed_by_the_next() {
    bounded(async {
        let (mut client, mut server) = connected().await;
        let large = Message::Numbers(vec![u64::MAX; FRAME_BYTES_MAX / 11]);
        // Nobody reads: sooner or later the sockets are full and a send is dropped half-way.
        let mut sent = 0u32;
        while client.send_timeout(&large, Duration::from_millis(20)).await.is_ok() {
            sent += 1;
            assert!(sent < 1000, "sockets are never full");
        }
        let finish = tokio::spawn(async move {
            client.send(&Message::Bye).await.unwrap();
            client
        });
        let mut received = 0;
        while server.recv::<Message>().await.unwrap() == large {
            received += 1;
        }
        assert_eq!(received, sent + 1, "every message arrived whole, the dropped one included");
        finish.await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_frame_that_ends_early_is_named() {
    bounded(async {
        let (mut client, mut server) = connected().await;
        client.halves().0.send_raw(Bytes::from_static(&[200, 0, 0, 0, 1, 2, 3])).await.unwrap();
        client.close().await.unwrap();
        let error = server.recv::<Message>().await.unwrap_err();
        assert!(matches!(error, RecvError::Truncated { received: 7, expected: 204 }), "{error}");
    })
    .await;
}

#[tokio::test]
async fn a_peer_that_vanishes_did_not_close() {
    bounded(async {
        let (client, mut server) = connected().await;
        drop(client);
        let error = server.recv::<Message>().await.unwrap_err();
        assert!(matches!(error, RecvError::Lost(_)), "{error}");
    })
    .await;
}

#[tokio::test]
async fn huge_lengths_trailing_bytes_and_nonsense_are_refused() {
    bounded(async {
        let (mut client, mut server) = connected().await;
        client.send(&(1u8, 2u8, 3u8)).await.unwrap();
        let trailing = server.recv::<u8>().await.unwrap_err();
        assert!(matches!(trailing, RecvError::Frame(FrameError::Trailing { bytes: 3, trailing: 2 })), "{trailing}");
        client.send(&[0xffu8; 5]).await.unwrap();
        let malformed = server.recv::<Message>().await.unwrap_err();
        assert!(matches!(malformed, RecvError::Frame(FrameError::Malformed { bytes: 5, .. })), "{malformed}");
        client.halves().0.send_raw(Bytes::from_static(&[0xff; 4])).await.unwrap();
        let huge = server.recv::<Message>().await.unwrap_err();
        assert!(matches!(huge, RecvError::Frame(FrameError::TooLong { bytes: 0xffff_ffff, .. })), "{huge}");
        let refused = client.send(&vec![7u8; FRAME_BYTES_MAX + 1]).await.unwrap_err();
        assert!(matches!(refused, SendError::Frame(FrameError::TooLong { .. })), "{refused}");
    })
    .await;
}
