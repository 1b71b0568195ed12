//! What a test needs and a machine may lack: PyTorch, a GPU. What is missing is named, and the test left out; in CI it must
//! be there.

use std::path::PathBuf;
use std::process::{Command, Stdio};

/// What is missing is named; in CI it must be there. True.
pub(crate) fn left_out(what: &str) -> bool {
    assert!(std::env::var_os("CI").is_none(), "{what}: CI must have it");
    eprintln!("left out: {what}");
    true
}

/// The interpreter of the tests.
pub(crate) fn python() -> PathBuf {
    std::env::var_os("BERINGIA_PYTHON").map_or_else(|| PathBuf::from("python3"), PathBuf::from)
}

/// Whether PyTorch is missing.
pub(crate) fn no_torch() -> bool {
    let find = "import sys, importlib.util as u; sys.exit(u.find_spec('torch') is None)";
    let found = Command::new(python()).args(["-c", find]).stdin(Stdio::null()).stderr(Stdio::null()).status();
    !found.is_ok_and(|status| status.success()) && left_out(&format!("{} has no torch", python().display()))
}

/// Whether there is no GPU, not even one in software.
pub(crate) fn no_wgpu() -> bool {
    let devices = engine_burn::devices();
    !devices.iter().any(|device| device.engine.starts_with("wgpu")) && left_out("no wgpu adapter")
}
