//! The only network format of Beringia and its transport.
//!
//! One protocol over TCP with TLS 1.3: both ends prove the key that the other has pinned ([`Identity`], [`Invite`]),
//! agree on a version and a purpose, and then exchange typed, bounded messages ([`Connection`]) or chunks of bulk
//! data over several streams ([`blob`]). Deltas go from site to site as blobs; the coordinator sees messages only.
//!
//! Whatever a peer sends costs bounded memory and bounded time ([`limits`]) and ends in a typed error. What a
//! message means, who is a member, and when to try again is decided elsewhere.

pub mod blob;
pub mod connection;
pub mod frame;
#[doc(hidden)]
pub mod fuzzing;
pub mod identity;
pub mod interface;
pub mod invite;
pub mod limits;
pub mod link;
pub mod listener;
pub mod message;
pub mod packed;
pub mod peers;
pub mod preamble;
pub mod probe;
pub mod proxy;
mod socket;
#[cfg(test)]
mod tests;
mod tls;
pub mod traffic;

pub use blob::fetch::{BlobClient, BlobRequest, FetchError, Holder};
pub use blob::serve::{ServeError, serve_blobs};
pub use blob::{Blob, BlobKey, BlobSource};
pub use connection::{ConnectError, Connection, Receiver, RecvError, SendError, Sender, connect, connect_through};
pub use identity::{Identity, IdentityError};
pub use invite::{Invite, InviteError, Secret};
pub use link::{LinkEstimate, LinkPath};
pub use listener::{Incoming, ListenError, Listener, ListenerEvent, ListenerLimits, Refusal, RefusalReason};
pub use peers::{PeerLimits, Rate};
pub use preamble::{PreambleError, Purpose};
pub use proxy::{Proxy, ProxyParseError};
pub use socket::TcpInfo;
pub use traffic::Traffic;
