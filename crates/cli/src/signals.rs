//! Ctrl-C and SIGTERM: both ask a command to save and leave.
//!
//! A machine that is shut down, and a scheduler that takes a node away, send SIGTERM and kill 30 s later. So whoever is asked has left
//! after [`LEAVE_SECONDS_MAX`], whatever it was doing: what is on disk is whole at any time, and the rest is done again.

use crate::failure::Failure;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::runtime::Runtime;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Threads for sockets and timers; the engine has its own.
const NETWORK_THREADS: usize = 2;

/// From SIGTERM to the end of the process.
pub(crate) const LEAVE_SECONDS_MAX: f64 = 25.0;

/// Of those, for ending a process that has not left by itself.
const END_SECONDS: f64 = 3.0;

/// What is left for saving.
pub(crate) const SAVE_SECONDS_MAX: f64 = LEAVE_SECONDS_MAX - END_SECONDS;

/// The runtime of a command that talks over the network or waits for signals.
pub(crate) fn runtime() -> Result<Runtime, Failure> {
    tokio::runtime::Builder::new_multi_thread().worker_threads(NETWORK_THREADS).enable_all().build().map_err(|error| {
        Failure::new(format!("no runtime could be started: {error}"), "allow more threads: `ulimit -u`")
    })
}

/// SIGINT and SIGTERM.
struct Requests {
    interrupt: Signal,
    terminate: Signal,
}

impl Requests {
    /// From now on they do not end the process. `None` where the system does not give handlers: then they do, which is all that
    /// can be done.
    fn listen() -> Option<Self> {
        let (interrupt, terminate) = (signal(SignalKind::interrupt()), signal(SignalKind::terminate()));
        Some(Self { interrupt: interrupt.ok()?, terminate: terminate.ok()? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

/// Completes at the first SIGINT or SIGTERM.
pub(crate) async fn stop_requested() {
    match Requests::listen() {
        Some(mut requests) => requests.next().await,
        None => std::future::pending().await,
    }
}

/// Completes when a process that was asked to stop is still there after `patience`, or is asked once more.
pub(crate) async fn stop_overdue(patience: Duration) {
    let Some(mut requests) = Requests::listen() else { return std::future::pending().await };
    requests.next().await;
    tokio::select! {
        () = tokio::time::sleep(patience) => {}
        () = requests.next() => {}
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
