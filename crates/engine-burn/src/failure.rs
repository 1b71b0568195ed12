//! Failures of a device as typed errors.
//!
//! A full or lost device shows in three ways: as an error of the next read, because CubeCL marks what a failed kernel should
//! have written; as a panic in the calling thread; and as a panic in CubeCL's own thread for the device, which that
//! thread catches, so that the read which follows only says that a buffer is missing. [`guarded`] makes one
//! [`EngineError`] of each and keeps the panics' reports off the terminal. It is not for our own bugs: calls on `flex` run
//! without it.

use engine::EngineError;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, PanicHookInfo, catch_unwind};
use std::sync::{Mutex, Once, PoisonError};
use std::time::Instant;

/// CubeCL names its threads `DSU-…` and `DSD-…`: device service, upstream and downstream.
const DEVICE_THREAD_NAMES: [&str; 2] = ["DSU-", "DSD-"];

/// Longest reason in an error: a compiler's log can have megabytes.
const REASON_CHARS_MAX: usize = 300;

/// How CubeCL, wgpu, Vulkan and CUDA call it when memory is short, in lower case.
const OUT_OF_MEMORY_PHRASES: [&str; 6] =
    ["out of memory", "out-of-memory", "out of device memory", "can't allocate", "not enough memory", "outofmemory"];

/// What a device's thread last said in a panic, and when. Of several devices in one process the last one is heard: then a failure may
/// be explained by another's words.
static DEVICE_PANIC: Mutex<Option<(Instant, String)>> = Mutex::new(None);

thread_local! {
    static QUIET: Cell<bool> = const { Cell::new(false) };
}

/// Runs `call` on `device`; a panic becomes an error.
pub(crate) fn guarded<T>(device: &str, call: impl FnOnce() -> Result<T, EngineError>) -> Result<T, EngineError> {
    install_hook();
    let start = Instant::now();
    let outer = QUIET.replace(true);
    let outcome = catch_unwind(AssertUnwindSafe(call));
    QUIET.set(outer);
    match outcome {
        Ok(Err(EngineError::Device { reason, .. })) => {
            // The device's own thread knows better why a buffer is missing.
            Err(classify(device, &device_panic_since(start).unwrap_or(reason)))
        }
        Ok(result) => result,
        Err(payload) => {
            let text = payload.downcast_ref::<String>().map(String::as_str);
            let message = text.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("it panicked");
            Err(classify(device, &device_panic_since(start).unwrap_or_else(|| message.to_owned())))
        }
    }
}

/// The error that a device's text stands for.
pub(crate) fn classify(device: &str, text: &str) -> EngineError {
    let (device, lower) = (device.to_owned(), text.to_lowercase());
    let reason = summary(text);
    match OUT_OF_MEMORY_PHRASES.iter().any(|phrase| lower.contains(phrase)) {
        true => EngineError::OutOfMemory { device, reason },
        false => EngineError::Device { device, reason },
    }
}

/// One line without backtraces.
fn summary(text: &str) -> String {
    let is_frame = |line: &str| line.starts_with("at ") || line.split(':').next().is_some_and(is_number);
    let told = text.split("Backtrace").next().unwrap_or_default().lines().map(str::trim);
    let words: Vec<&str> = told.filter(|line| !is_frame(line)).flat_map(str::split_whitespace).collect();
    words.join(" ").chars().take(REASON_CHARS_MAX).collect()
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

fn device_panic_since(start: Instant) -> Option<String> {
    // A panic while it was held leaves a time and a string: nothing can be half done.
    let last = DEVICE_PANIC.lock().unwrap_or_else(PoisonError::into_inner);
    last.as_ref().filter(|(when, _)| *when >= start).map(|(_, text)| text.clone())
}

/// Puts a panic hook before the present one that keeps silent about panics which [`guarded`] reports.
fn install_hook() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        let previous = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            let thread = std::thread::current();
            let name = thread.name().unwrap_or_default();
            if DEVICE_THREAD_NAMES.iter().any(|prefix| name.starts_with(prefix)) {
                keep(info);
            } else if !QUIET.get() {
                previous(info);
            }
        }));
    });
}

fn keep(info: &PanicHookInfo<'_>) {
    let text = info.payload_as_str().unwrap_or("it panicked").to_owned();
    *DEVICE_PANIC.lock().unwrap_or_else(PoisonError::into_inner) = Some((Instant::now(), text));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panics_become_errors_that_say_what_happened() {
        // One test: what a device's thread said is kept for the whole process.
        let panics = |message: &'static str| guarded::<()>("wgpu:0", || panic!("{message}"));
        let full = panics("wgpu error: Out of Memory\n  0: frame\n     at file.rs:3").unwrap_err();
        assert!(matches!(&full, EngineError::OutOfMemory { device, .. } if device == "wgpu:0"), "{full:?}");
        assert_eq!(full.to_string(), "device wgpu:0 is out of memory: wgpu error: Out of Memory");
        let lost = panics("Parent device is lost").unwrap_err();
        assert!(matches!(&lost, EngineError::Device { .. }), "{lost:?}");
        assert_eq!(guarded("flex", || Ok(7)).ok(), Some(7));
        // A panic of the device's thread explains the read that follows.
        let read = || {
            let task = || panic!("wgpu error: Out of Memory");
            let thread = std::thread::Builder::new().name("DSD-0-0".to_owned()).spawn(task).unwrap();
            assert!(thread.join().is_err());
            Err::<(), _>(EngineError::Device { device: String::new(), reason: "no such buffer".to_owned() })
        };
        assert!(matches!(guarded("wgpu", read), Err(EngineError::OutOfMemory { .. })));
    }

    #[test]
    fn reasons_are_short() {
        let text = format!("can't allocate buffer of size: 99\nBacktrace\n{}", "frame\n".repeat(10_000));
        assert_eq!(summary(&text), "can't allocate buffer of size: 99");
        assert_eq!(summary(&"long ".repeat(1000)).chars().count(), REASON_CHARS_MAX);
    }
}
