//! Dialling through SOCKS5 proxies that work, refuse, and are something else. The proxy here is written from RFC 1928.

use super::{LOOPBACK, bounded, identity, listen};
use crate::{ConnectError, Connection, Identity, Listener, Proxy, Purpose, Traffic, connect_through};
use base::Hint;
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

/// A name that no resolver knows: who is asked to connect to it is the proxy.
const NAME: &str = "site-b.invalid";

/// Version 5, one method, "no authentication required" (section 3).
const GREETING: [u8; 3] = [5, 1, 0];

/// Version 5, CONNECT, reserved, a domain name follows (section 4).
const CONNECT_NAME: [u8; 4] = [5, 1, 0, 3];

/// A proxy for one connection, which `serve` makes of it.
async fn proxy<F: Future<Output = T> + Send + 'static, T: Send + 'static>(
    serve: impl FnOnce(TcpStream) -> F + Send + 'static,
) -> (Proxy, JoinHandle<T>) {
    let listener = TcpListener::bind(LOOPBACK).await.unwrap();
    let proxy = format!("socks5://{}", listener.local_addr().unwrap()).parse().unwrap();
    (proxy, tokio::spawn(async move { serve(listener.accept().await.unwrap().0).await }))
}

/// Reads a greeting and a request for a name; gives the name and the port.
async fn request(client: &mut TcpStream) -> (String, u16) {
    let mut greeting = [0; 3];
    client.read_exact(&mut greeting).await.unwrap();
    assert_eq!(greeting, GREETING);
    client.write_all(&[5, 0]).await.unwrap();
    let mut start = [0; 5];
    client.read_exact(&mut start).await.unwrap();
    assert_eq!(start[..4], CONNECT_NAME);
    let mut name = vec![0; usize::from(start[4])];
    client.read_exact(&mut name).await.unwrap();
    (String::from_utf8(name).unwrap(), client.read_u16().await.unwrap())
}

/// The answer with this code (section 6: 0 is success) and an address that nobody needs.
async fn reply(client: &mut TcpStream, code: u8) {
    client.write_all(&[5, code, 0, 1, 0, 0, 0, 0, 0, 0]).await.unwrap();
}

async fn dial(proxy: &Proxy, port: u16, server: &Identity) -> Result<Connection, ConnectError> {
    let (address, traffic) = (format!("{NAME}:{port}"), Traffic::new());
    connect_through(Some(proxy), &identity(), &traffic, &address, server.fingerprint(), Purpose::Control).await
}

async fn listening() -> (Identity, Listener, u16) {
    let server = identity();
    let listener = listen(&server).await;
    let port = listener.address().port();
    (server, listener, port)
}

#[tokio::test]
async fn a_proxy_is_given_the_name_and_carries_the_connection() {
    bounded(async {
        let (server, mut listener, port) = listening().await;
        let (proxy, carrying) = proxy(async |mut client| {
            let asked = request(&mut client).await;
            let mut target = TcpStream::connect((LOOPBACK.ip(), asked.1)).await.unwrap();
            reply(&mut client, 0).await;
            copy_bidirectional(&mut client, &mut target).await.unwrap();
            asked
        })
        .await;
        let (dialled, accepted) = tokio::join!(dial(&proxy, port, &server), listener.accept());
        let (mut dialled, mut accepted) = (dialled.unwrap(), accepted.unwrap().connection);
        assert_eq!(dialled.peer(), server.fingerprint(), "TLS is with the far end");
        assert_eq!(format!("socks5://{}", dialled.address()), proxy.to_string());
        dialled.send("through").await.unwrap();
        assert_eq!(accepted.recv::<String>().await.unwrap(), "through");
        drop((dialled, accepted));
        assert_eq!(carrying.await.unwrap(), (NAME.to_owned(), port));
    })
    .await;
}

#[tokio::test]
async fn what_a_proxy_refuses_is_named_with_the_proxy() {
    bounded(async {
        let (server, _listener, port) = listening().await;
        for (code, words) in [(2, "not allowed"), (4, "Host unreachable"), (5, "Connection refused")] {
            let (proxy, refusing) = proxy(async move |mut client| {
                request(&mut client).await;
                reply(&mut client, code).await;
            })
            .await;
            let error = dial(&proxy, port, &server).await.unwrap_err();
            assert!(matches!(error, ConnectError::ProxyRefused { .. }), "{error:?}");
            let text = error.to_string();
            for part in [words, &proxy.to_string(), &format!("{NAME}:{port}")] {
                assert!(text.contains(part), "'{part}' is not in: {text}");
            }
            assert!(error.hint().unwrap().contains("SOCKS5"));
            refusing.await.unwrap();
        }
    })
    .await;
}

#[tokio::test]
async fn a_proxy_that_wants_a_password_or_is_none_is_refused() {
    bounded(async {
        let (server, _listener, port) = listening().await;
        for answer in [&[5, 0xff][..], b"HTTP/1.1 400 Bad Request\r\n\r\n", &[]] {
            let (proxy, answering) = proxy(async move |mut client| {
                client.read_exact(&mut [0; 3]).await.unwrap();
                client.write_all(answer).await.unwrap();
            })
            .await;
            let error = dial(&proxy, port, &server).await.unwrap_err();
            assert!(matches!(error, ConnectError::ProxyRefused { .. }), "{error:?}");
            answering.await.unwrap();
        }
    })
    .await;
}

#[tokio::test]
async fn a_proxy_that_is_not_there_is_named() {
    bounded(async {
        let (server, _listener, port) = listening().await;
        let gone = TcpListener::bind(LOOPBACK).await.unwrap().local_addr().unwrap();
        let proxy: Proxy = format!("socks5://{gone}").parse().unwrap();
        let error = dial(&proxy, port, &server).await.unwrap_err();
        assert!(matches!(error, ConnectError::ProxyUnreachable { .. }), "{error:?}");
        assert!(error.to_string().contains(&gone.to_string()) && error.hint().unwrap().contains("--proxy"));
    })
    .await;
}
