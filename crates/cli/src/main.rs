//! The `beringia` binary.
fn main() {}
