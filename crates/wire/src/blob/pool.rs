//! Connections kept open between fetches: deltas come every round, and a TLS handshake costs two round trips.

use super::fetch::Holder;
use crate::connection::Connection;
use crate::limits::{POOL_CONNECTIONS_MAX, POOL_IDLE_SECONDS_MAX};
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// Unused connections by holder.
#[derive(Debug, Default)]
pub(super) struct Pool(Mutex<HashMap<Holder, Vec<Unused>>>);

#[derive(Debug)]
struct Unused {
    connection: Connection,
    since: Instant,
}

impl Pool {
    /// A connection that was working when it was last used.
    pub(super) fn take(&self, holder: &Holder) -> Option<Connection> {
        let mut unused = self.lock();
        let connections = unused.get_mut(holder)?;
        while let Some(mut candidate) = connections.pop() {
            if !is_old(&candidate) && candidate.connection.is_idle() {
                return Some(candidate.connection);
            }
        }
        None
    }

    /// Keeps a connection on which nothing is outstanding; beyond the bound it is dropped.
    pub(super) fn put(&self, holder: &Holder, connection: Connection) {
        let mut unused = self.lock();
        unused.retain(|_, connections| {
            connections.retain(|candidate| !is_old(candidate));
            !connections.is_empty()
        });
        if unused.values().map(Vec::len).sum::<usize>() < POOL_CONNECTIONS_MAX {
            let since = Instant::now();
            unused.entry(holder.clone()).or_default().push(Unused { connection, since });
        }
    }

    /// Number of unused connections.
    pub(super) fn len(&self) -> usize {
        self.lock().values().map(Vec::len).sum()
    }

    /// Forgets every connection.
    pub(super) fn clear(&self) {
        self.lock().clear();
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Holder, Vec<Unused>>> {
        // Nothing here can panic half-way; a poisoned map is still a map of connections.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn is_old(unused: &Unused) -> bool {
    unused.since.elapsed() > Duration::from_secs(POOL_IDLE_SECONDS_MAX)
}
