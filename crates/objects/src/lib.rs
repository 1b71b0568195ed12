//! Deltas and states left in an object store, for sites that can dial out but cannot be dialled: behind NAT, or in a
//! centre whose firewall lets only HTTPS through.
//!
//! A site puts what it has to say once; each other site that was told its length and BLAKE3 (by the coordinator, as in
//! every exchange) waits until the object is there and takes it. The bytes, and so the merge, are those of the direct
//! exchange: nothing is summed or converted here.
//!
//! An object's name ends with the hash of its content. A site that repeats a round after a fault writes another object
//! instead of replacing one that somebody is reading, and a reader never takes yesterday's delta for today's.
//!
//! The store is not trusted: what it says about lengths is compared with what the coordinator announced before memory
//! is taken, what it sends is hashed, and no text of its answers is repeated but its error code.
//!
//! What this is not: a place for checkpoints, a list of members, or a way to learn what a round consists of. An object
//! counts only when the coordinator has named it.

mod error;
mod key;
mod open;
mod store;
#[cfg(test)]
mod tests;

pub use error::{ForgetError, GetError, OpenError, PutError};
pub use key::ObjectKey;
pub use store::{Fetched, ObjectStore, Transfer};
