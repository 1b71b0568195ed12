//! Ctrl-C and SIGTERM: both ask a command to save and leave.

use crate::failure::Failure;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};

/// Threads for sockets and timers; the engine has its own.
const NETWORK_THREADS: usize = 2;

/// The runtime of a command that talks over the network or waits for signals.
pub(crate) fn runtime() -> Result<Runtime, Failure> {
    tokio::runtime::Builder::new_multi_thread().worker_threads(NETWORK_THREADS).enable_all().build().map_err(|error| {
        Failure::new(format!("no runtime could be started: {error}"), "allow more threads: `ulimit -u`")
    })
}

/// Completes at the first SIGINT or SIGTERM.
pub(crate) async fn stop_requested() {
    let (Ok(mut interrupt), Ok(mut terminate)) = (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
    else {
        // Without handlers the signals end the process, which is all that can be done then.
        return std::future::pending().await;
    };
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
}

/// A flag that a signal sets.
pub(crate) fn stop_flag(runtime: &Runtime) -> Arc<AtomicBool> {
    let flag = Arc::new(AtomicBool::new(false));
    let set = Arc::clone(&flag);
    runtime.spawn(async move {
        stop_requested().await;
        set.store(true, Ordering::Relaxed);
    });
    flag
}
