//! Runs of several processes over loopback: they stay identical, survive what happens to them, and refuse what they
//! must. The model is tiny; what it learns is measured elsewhere.

mod faults;
mod identical;
mod refusals;
mod resuming;
#[path = "../support/mod.rs"]
mod support;
