//! The part of a SOCKS5 server (RFC 1928) that the lab's relays need: no password, CONNECT.

use std::io::{self, ErrorKind};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Protocol version, in every message.
const VERSION: u8 = 5;

/// "No authentication required" (section 3), and the answer where the client does not offer it.
const NO_PASSWORD: u8 = 0;
const NO_METHOD: u8 = 0xff;

/// The only command (section 4).
const CONNECT: u8 = 1;

/// Kinds of addresses (section 5).
const IPV4: u8 = 1;
const NAME: u8 = 3;
const IPV6: u8 = 4;

/// How a request is answered (section 6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reply {
    Succeeded = 0,
    NotAllowed = 2,
    ConnectionRefused = 5,
    CommandNotSupported = 7,
    AddressNotSupported = 8,
}

/// Reads a greeting and a request, and gives host and port of the request. What is refused has been answered.
///
/// # Errors
/// The connection ends, or what comes is no such request.
pub(super) async fn accept(client: &mut (impl AsyncRead + AsyncWrite + Unpin)) -> io::Result<(String, u16)> {
    let [version, methods] = read(client).await?;
    expect_version(version)?;
    let mut offered = vec![0; usize::from(methods)];
    client.read_exact(&mut offered).await?;
    if !offered.contains(&NO_PASSWORD) {
        client.write_all(&[VERSION, NO_METHOD]).await?;
        return Err(invalid("a client that insists on a password"));
    }
    client.write_all(&[VERSION, NO_PASSWORD]).await?;
    let [version, command, _reserved, kind] = read(client).await?;
    expect_version(version)?;
    let host = host(client, kind).await?;
    let port = client.read_u16().await?;
    if command != CONNECT {
        answer(client, Reply::CommandNotSupported).await?;
        return Err(invalid("another command than CONNECT"));
    }
    Ok((host, port))
}

/// Answers a request. The address in the answer is of no use to anybody and left empty.
///
/// # Errors
/// The connection is gone.
pub(super) async fn answer(client: &mut (impl AsyncWrite + Unpin), reply: Reply) -> io::Result<()> {
    client.write_all(&[VERSION, reply as u8, 0, IPV4, 0, 0, 0, 0, 0, 0]).await
}

async fn host(client: &mut (impl AsyncRead + AsyncWrite + Unpin), kind: u8) -> io::Result<String> {
    match kind {
        IPV4 => Ok(std::net::Ipv4Addr::from(read::<4>(client).await?).to_string()),
        IPV6 => Ok(std::net::Ipv6Addr::from(read::<16>(client).await?).to_string()),
        NAME => {
            let mut name = vec![0; usize::from(client.read_u8().await?)];
            client.read_exact(&mut name).await?;
            String::from_utf8(name).map_err(|_| invalid("a name that is no text"))
        }
        _ => {
            answer(client, Reply::AddressNotSupported).await?;
            Err(invalid("an unknown kind of address"))
        }
    }
}

async fn read<const N: usize>(client: &mut (impl AsyncRead + Unpin)) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    client.read_exact(&mut bytes).await?;
    Ok(bytes)
}

fn expect_version(version: u8) -> io::Result<()> {
    match version {
        VERSION => Ok(()),
        _ => Err(invalid("another version than 5")),
    }
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a client that says `said` is taken for, and what it is answered.
    async fn conversation(said: &[u8]) -> (io::Result<(String, u16)>, Vec<u8>) {
        let (mut client, mut server) = tokio::io::duplex(1024);
        client.write_all(said).await.unwrap();
        client.shutdown().await.unwrap();
        let accepted = accept(&mut server).await;
        drop(server);
        let mut answered = Vec::new();
        client.read_to_end(&mut answered).await.unwrap();
        (accepted, answered)
    }

    #[tokio::test]
    async fn names_and_addresses_are_understood() {
        let name = [&[5, 2, 1, 0, 5, 1, 0, 3, 6][..], b"site-b", &[0x1d, 0x17]].concat();
        let ipv4 = [5, 1, 0, 5, 1, 0, 1, 127, 0, 0, 1, 0, 80];
        let mut ipv6 = vec![5, 1, 0, 5, 1, 0, 4];
        ipv6.extend([[0; 15].as_slice(), &[1, 1, 0]].concat());
        for (said, expected) in [(&name[..], ("site-b", 7447)), (&ipv4, ("127.0.0.1", 80)), (&ipv6, ("::1", 256))] {
            let (accepted, answered) = conversation(said).await;
            assert_eq!(accepted.unwrap(), (expected.0.to_owned(), expected.1));
            assert_eq!(answered, [5, 0]);
        }
    }

    #[tokio::test]
    async fn what_is_no_request_is_refused() {
        let refused: [(&[u8], &[u8]); 8] = [
            (b"", b""),
            (b"GET / HTTP/1.1\r\n\r\n", b""),
            (&[4, 1, 0, 80, 127, 0, 0, 1, 0], b""),
            (&[5, 1, 2], &[5, 0xff]),
            (&[5, 0], &[5, 0xff]),
            (&[5, 1, 0, 5, 2, 0, 1, 127, 0, 0, 1, 0, 80], &[5, 0, 5, 7, 0, 1, 0, 0, 0, 0, 0, 0]),
            (&[5, 1, 0, 5, 1, 0, 9, 127, 0, 0, 1, 0, 80], &[5, 0, 5, 8, 0, 1, 0, 0, 0, 0, 0, 0]),
            (&[5, 1, 0, 5, 1, 0, 3, 200, 1], &[5, 0]),
        ];
        for (said, expected) in refused {
            let (accepted, answered) = conversation(said).await;
            assert!(accepted.is_err(), "{said:?}");
            assert_eq!(answered, expected, "{said:?}");
        }
    }
}
