//! What PyTorch sees on this machine: a list that the package prints.

use crate::leash::{Leash, describe_end};
use crate::options::interpreter;
use crate::package::{self, PACKAGE};
use crate::process::{environment, spawn_error};
use crate::tail::{Tail, printable};
use engine::{DeviceInfo, DeviceRates, DeviceReport, EngineError, Precision};
use serde::Deserialize;
use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

/// Longest answer: 1,000 devices of 1 KiB.
const LIST_BYTES_MAX: u64 = 1 << 20;

/// Longest wait for the list, beside the time for measuring: PyTorch may come from a cold network file system.
const LIST_SECONDS_MAX: u64 = 60;

/// Devices that are measured one after the other, at most: the bound of the wait.
const MEASURED_DEVICES_MAX: f64 = 16.0;

/// What a device whose list cannot be had is called in errors.
const ENGINE: &str = "torch";

/// How long the rest of stderr is waited for.
const TAIL_PATIENCE: Duration = Duration::from_millis(500);

/// One entry of the list.
#[derive(Debug, Deserialize)]
struct Listed {
    device: String,
    name: String,
    maker: String,
    driver: String,
    memory_bytes: Option<u64>,
    threads: usize,
    bf16: bool,
    #[serde(flatten)]
    rates: Rates,
}

/// Absent where nothing was measured.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Rates {
    matrix_f32_tflops: Option<f64>,
    matrix_bf16_tflops: Option<f64>,
    copy_gigabytes_per_second: Option<f64>,
}

/// Devices that the PyTorch of `python` (`None`: `BERINGIA_PYTHON`, else `python3`) sees, not measured.
///
/// # Errors
/// [`EngineError::Missing`] where Python or PyTorch is not installed; [`EngineError::Device`] where the list cannot be read.
pub fn devices(python: Option<&Path>) -> Result<Vec<DeviceReport>, EngineError> {
    list(python, None)
}

/// As [`devices`], each measured for about `seconds`.
///
/// # Errors
/// As [`devices`].
pub fn measured_devices(python: Option<&Path>, seconds: f64) -> Result<Vec<DeviceReport>, EngineError> {
    list(python, Some(seconds))
}

fn list(python: Option<&Path>, measure_seconds: Option<f64>) -> Result<Vec<DeviceReport>, EngineError> {
    let fail = |reason: String| EngineError::Device { device: ENGINE.to_owned(), reason };
    let python = interpreter(python.map(Path::to_owned));
    let folder = package::unpack().map_err(|error| fail(format!("cannot unpack the Python package: {error}")))?;
    let mut command = Command::new(&python);
    command.args(["-u", "-m", PACKAGE, "devices"]).envs(environment(folder.path()));
    if let Some(seconds) = measure_seconds {
        command.arg("--measure").arg(seconds.to_string());
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let spawned = std::os::unix::process::CommandExt::process_group(&mut command, 0).spawn();
    let child = spawned.map_err(|error| spawn_error(ENGINE, python.as_os_str(), &error))?;
    let measuring = measure_seconds.unwrap_or_default().clamp(0.0, 3600.0) * MEASURED_DEVICES_MAX;
    let patience = Duration::from_secs(LIST_SECONDS_MAX) + Duration::from_secs_f64(measuring);
    parse(&output_of(child, folder.path(), patience)?).map_err(fail)
}

/// What `child` prints, if it ends well in time.
fn output_of(mut child: Child, folder: &Path, patience: Duration) -> Result<Vec<u8>, EngineError> {
    let fail = |reason: String| EngineError::Device { device: ENGINE.to_owned(), reason };
    let stderr = child.stderr.take().map(Tail::follow).unwrap_or_default();
    let reader = child.stdout.take().map(|stdout| {
        thread::spawn(move || {
            let mut text = Vec::new();
            // One byte more than allowed shows that there was more.
            stdout.take(LIST_BYTES_MAX + 1).read_to_end(&mut text).map(|_| text)
        })
    });
    let leash = Leash::default();
    leash.hold(child, folder.to_string_lossy().into_owned());
    let ended = leash.ended_within(patience);
    // Also what it may have started: the reader then comes to the end.
    leash.end(TAIL_PATIENCE);
    let lines = stderr.lines(TAIL_PATIENCE);
    let text = reader.and_then(|reader| reader.join().ok()).and_then(Result::ok).unwrap_or_default();
    match ended {
        Some(status) if status.success() && text.len() as u64 <= LIST_BYTES_MAX => Ok(text),
        Some(status) if status.success() => Err(fail(format!("it lists more than {LIST_BYTES_MAX} bytes"))),
        Some(status) => Err(refusal(&lines, &describe_end(status))),
        None => Err(fail(format!("listing its devices took more than {} s", patience.as_secs()))),
    }
}

/// The package says what is missing and, after `hint: `, how to install it.
fn refusal(lines: &[String], ended: &str) -> EngineError {
    let last = |skip: usize| lines.iter().rev().nth(skip).cloned().unwrap_or_default();
    match last(0).strip_prefix("hint: ") {
        Some(install) => EngineError::Missing {
            engine: ENGINE.to_owned(),
            what: "PyTorch".to_owned(),
            reason: last(1),
            install: install.to_owned(),
        },
        None => EngineError::Device { device: ENGINE.to_owned(), reason: format!("{ended}: {}", lines.join("\n")) },
    }
}

fn parse(text: &[u8]) -> Result<Vec<DeviceReport>, String> {
    let listed: Vec<Listed> =
        serde_json::from_slice(text).map_err(|error| format!("its list of devices cannot be read: {error}"))?;
    Ok(listed.into_iter().map(report).collect())
}

fn report(listed: Listed) -> DeviceReport {
    const CHARACTERS_MAX: usize = 200;
    let text = |text: String| printable(&text, CHARACTERS_MAX);
    let Listed { device, name, maker, driver, memory_bytes, threads, bf16, rates } = listed;
    let precision = if bf16 { Precision::Bf16 } else { Precision::F32 };
    let engine = text(format!("torch:{device}"));
    let (name, maker, driver) = (text(name), text(maker), text(driver));
    let Rates { matrix_f32_tflops, matrix_bf16_tflops, copy_gigabytes_per_second } = rates;
    DeviceReport {
        info: DeviceInfo { engine, name, maker, driver, memory_bytes, threads, precision },
        rates: DeviceRates { matrix_f32_tflops, matrix_bf16_tflops, copy_gigabytes_per_second },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_read_and_made_printable() {
        let text =
            br#"[{"device":"npu:1","name":"910B\u001b","maker":"Huawei","driver":"torch_npu 2.6","memory_bytes":64,
            "threads":4,"bf16":true,"matrix_bf16_tflops":280.5,"unknown":1}]"#;
        let reports = parse(text).unwrap();
        assert_eq!(reports[0].info.engine, "torch:npu:1");
        assert_eq!(reports[0].info.name, "910B");
        assert_eq!(reports[0].info.precision, Precision::Bf16);
        assert_eq!(reports[0].rates.matrix_bf16_tflops, Some(280.5));
        assert_eq!(reports[0].rates.matrix_f32_tflops, None);
        assert!(parse(b"Traceback").is_err());
        assert!(parse(br#"[{"device":"cpu","threads":-1}]"#).is_err());
    }

    #[test]
    fn what_is_missing_is_told_from_a_failure() {
        let lines = |lines: &[&str]| lines.iter().map(|line| (*line).to_owned()).collect::<Vec<_>>();
        let missing = refusal(&lines(&["torch: it cannot be imported", "hint: pip install torch"]), "exit code 1");
        assert!(matches!(missing, EngineError::Missing { install, .. } if install == "pip install torch"));
        assert!(matches!(refusal(&lines(&["Segmentation fault"]), "signal 11"), EngineError::Device { .. }));
        assert!(matches!(refusal(&[], "signal 11"), EngineError::Device { .. }));
    }
}
