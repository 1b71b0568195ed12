//! Runs of several processes over loopback: they stay identical, survive what happens to them, and refuse what they
//! must. The model is tiny; what it learns is measured elsewhere.

#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a test's helper may panic, and shows the logs of what failed"
)]

mod adaptive;
mod emulated;
mod faults;
mod identical;
mod lab_faults;
mod leaving;
mod links;
mod mixed;
#[path = "../support/moto.rs"]
mod moto;
#[path = "../support/needs.rs"]
mod needs;
mod objects;
mod refusals;
mod resuming;
mod sharded;
mod streaming;
#[path = "../support/mod.rs"]
mod support;
