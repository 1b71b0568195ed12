//! The speed that was measured when this site's engine last started, so that one that comes back takes part at once and not after another
//! measurement. A stale one costs little: after its first round the coordinator goes by what that took.

use crate::folder::RunFolder;
use base::layout::SPEED_FILE;
use engine::DeviceInfo;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::Read;
use std::time::Duration;

/// An older one is not believed: who knows what else the machine does by now.
const AGE_MAX: Duration = Duration::from_secs(24 * 3600);

/// Two names, a version and four numbers.
const FILE_BYTES_MAX: u64 = 4096;

/// What was measured on what.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct KnownSpeed {
    engine: String,
    device: String,
    driver: String,
    threads: usize,
    slowdown: f64,
    samples_per_step: u64,
    tokens_per_second: f64,
}

impl KnownSpeed {
    /// A measurement of this device.
    pub(crate) fn new(device: &DeviceInfo, slowdown: f64, samples_per_step: u64, tokens_per_second: f64) -> Self {
        let DeviceInfo { engine, name, driver, threads, .. } = device.clone();
        Self { engine, device: name, driver, threads, slowdown, samples_per_step, tokens_per_second }
    }

    /// Training tokens a second, where the same was measured here before, and lately.
    pub(crate) fn read(&self, folder: &RunFolder) -> Option<f64> {
        let file = File::open(folder.root().join(SPEED_FILE)).ok()?;
        let age = file.metadata().ok()?.modified().ok()?.elapsed().ok()?;
        let mut text = String::new();
        file.take(FILE_BYTES_MAX).read_to_string(&mut text).ok()?;
        let known: Self = serde_json::from_str(&text).ok()?;
        let same = Self { tokens_per_second: self.tokens_per_second, ..known.clone() } == *self;
        let is_speed = known.tokens_per_second.is_finite() && known.tokens_per_second > 0.0;
        (same && is_speed && age <= AGE_MAX).then_some(known.tokens_per_second)
    }

    /// Keeps it for the next start. Where that fails the next start measures again.
    pub(crate) fn keep(&self, folder: &RunFolder) {
        if let Ok(text) = serde_json::to_string(self) {
            let _ = std::fs::write(folder.root().join(SPEED_FILE), text);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine::Precision;

    fn measured(threads: usize, slowdown: f64, tokens_per_second: f64) -> KnownSpeed {
        let text = |text: &str| text.to_owned();
        let device = DeviceInfo {
            engine: text("flex"),
            name: text("a processor"),
            maker: String::new(),
            driver: String::new(),
            memory_bytes: None,
            threads,
            precision: Precision::F32,
        };
        KnownSpeed::new(&device, slowdown, 8, tokens_per_second)
    }

    #[test]
    fn a_speed_is_known_of_the_same_device_and_work_only() {
        let place = tempfile::tempdir().unwrap();
        let folder = RunFolder::new(place.path());
        assert_eq!(measured(1, 1.0, 0.0).read(&folder), None);
        measured(1, 1.0, 1234.5).keep(&folder);
        assert_eq!(measured(1, 1.0, 0.0).read(&folder), Some(1234.5));
        assert_eq!(measured(2, 1.0, 0.0).read(&folder), None, "other threads");
        assert_eq!(measured(1, 2.0, 0.0).read(&folder), None, "slowed down");
        for damaged in ["", "{", "{\"engine\":\"flex\"}", "null"] {
            std::fs::write(place.path().join(SPEED_FILE), damaged).unwrap();
            assert_eq!(measured(1, 1.0, 0.0).read(&folder), None, "{damaged}");
        }
        measured(1, 1.0, -3.0).keep(&folder);
        assert_eq!(measured(1, 1.0, 0.0).read(&folder), None, "not a speed");
        measured(1, 1.0, 1234.5).keep(&folder);
        let yesterday = std::time::SystemTime::now() - AGE_MAX - Duration::from_secs(1);
        File::options().write(true).open(place.path().join(SPEED_FILE)).unwrap().set_modified(yesterday).unwrap();
        assert_eq!(measured(1, 1.0, 0.0).read(&folder), None, "too old");
    }
}
