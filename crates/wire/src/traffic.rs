//! Bytes that really went through sockets: TLS records and handshakes included, TCP/IP headers not.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// A shared pair of counters. What a child counts, its parent counts too, so that one `Traffic` for a site holds the
/// sum over all its connections.
#[derive(Debug, Clone, Default)]
pub struct Traffic(Arc<Counters>);

#[derive(Debug, Default)]
struct Counters {
    sent: AtomicU64,
    received: AtomicU64,
    parent: Option<Traffic>,
}

impl Traffic {
    /// Counters at zero.
    pub fn new() -> Self {
        Self::default()
    }

    /// Counters at zero whose bytes count here as well.
    pub fn child(&self) -> Self {
        Self(Arc::new(Counters { parent: Some(self.clone()), ..Counters::default() }))
    }

    /// Bytes given to TCP.
    pub fn bytes_sent(&self) -> u64 {
        self.0.sent.load(Ordering::Relaxed)
    }

    /// Bytes taken from TCP.
    pub fn bytes_received(&self) -> u64 {
        self.0.received.load(Ordering::Relaxed)
    }

    /// Counts what went through the sockets of others, an object store's client for one.
    pub fn add(&self, sent: u64, received: u64) {
        let mut counted = Some(self);
        while let Some(Self(counters)) = counted {
            counters.sent.fetch_add(sent, Ordering::Relaxed);
            counters.received.fetch_add(received, Ordering::Relaxed);
            counted = counters.parent.as_ref();
        }
    }
}

/// A byte stream that counts.
#[derive(Debug)]
pub(crate) struct Counted<S> {
    stream: S,
    traffic: Traffic,
}

impl<S> Counted<S> {
    pub(crate) fn new(stream: S, traffic: Traffic) -> Self {
        Self { stream, traffic }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Counted<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(context, buffer))?;
        self.traffic.add(0, (buffer.filled().len() - before) as u64);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Counted<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.stream).poll_write(context, bytes))?;
        self.traffic.add(written as u64, 0);
        Poll::Ready(Ok(written))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.stream).poll_write_vectored(context, slices))?;
        self.traffic.add(written as u64, 0);
        Poll::Ready(Ok(written))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn children_add_up_in_their_parent() {
        let site = Traffic::new();
        let (first, second) = (site.child(), site.child());
        first.add(3, 0);
        second.add(4, 5);
        assert_eq!((first.bytes_sent(), first.bytes_received()), (3, 0));
        assert_eq!((site.bytes_sent(), site.bytes_received()), (7, 5));
    }
}
