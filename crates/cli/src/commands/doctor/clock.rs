//! The system clock: plausible, steady, set by somebody. No decision of a run reads it; event logs of several sites are
//! put in order by it.
//!
//! # Unsafe code
//! One call of `adjtimex(2)` that reads: the only way to learn from Linux whether its clock is being set, whoever sets it.

use super::check::Check;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// 2026-01-01: this program is younger.
const PLAUSIBLE_UNIX_SECONDS_MIN: u64 = 1_767_225_600;

/// 2100-01-01.
const PLAUSIBLE_UNIX_SECONDS_MAX: u64 = 4_102_444_800;

/// The mean year of the Gregorian calendar: 365.2425 days.
const YEAR_SECONDS: u64 = 31_556_952;

/// How far the system clock may move against the monotonic one within the seconds that the command takes. A clock that is
/// slewed moves by 0.05 % at most; more is a step.
const STEP_SECONDS_MAX: f64 = 0.1;

/// Both clocks at the start of the command.
#[derive(Debug, Clone, Copy)]
pub(super) struct Clocks {
    system: SystemTime,
    monotonic: Instant,
}

impl Clocks {
    /// Now.
    pub(super) fn read() -> Self {
        Self { system: SystemTime::now(), monotonic: Instant::now() }
    }

    /// Whether the clock is plausible, has run evenly since, and is synchronised.
    pub(super) fn check(&self) -> Check {
        let now = Self::read();
        let elapsed = now.monotonic.duration_since(self.monotonic).as_secs_f64();
        let moved = match now.system.duration_since(self.system) {
            Ok(forward) => forward.as_secs_f64(),
            Err(backward) => -backward.duration().as_secs_f64(),
        };
        let unix = now.system.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs();
        judge(unix, moved - elapsed, synchronisation())
    }
}

/// What the kernel knows of its clock.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Synchronisation {
    /// A time service keeps it, within this many seconds by the kernel's own bound.
    Kept { error_seconds: f64 },
    /// Nobody keeps it.
    Free,
    /// This system does not tell.
    Unknown,
}

#[cfg(target_os = "linux")]
fn synchronisation() -> Synchronisation {
    // SAFETY: `timex` is a plain C struct for which zeros are valid; with `modes` 0 the call only fills it in.
    let (state, clock) = unsafe {
        let mut clock: libc::timex = std::mem::zeroed();
        let state = libc::adjtimex(&raw mut clock);
        (state, clock)
    };
    match state {
        ..0 => Synchronisation::Unknown,
        _ if clock.status & libc::STA_UNSYNC != 0 => Synchronisation::Free,
        _ => Synchronisation::Kept { error_seconds: clock.maxerror as f64 / 1e6 },
    }
}

#[cfg(not(target_os = "linux"))]
fn synchronisation() -> Synchronisation {
    Synchronisation::Unknown
}

fn judge(unix: u64, stepped_seconds: f64, synchronisation: Synchronisation) -> Check {
    let plausible = (PLAUSIBLE_UNIX_SECONDS_MIN..PLAUSIBLE_UNIX_SECONDS_MAX).contains(&unix);
    let (synchronised, how) = match synchronisation {
        Synchronisation::Kept { error_seconds } => {
            (Some(true), format!("the kernel says synchronised, within {error_seconds:.3} s"))
        }
        Synchronisation::Free => (Some(false), "the kernel says that no time service keeps it".to_owned()),
        Synchronisation::Unknown => (None, "the system does not tell whether a time service keeps it".to_owned()),
    };
    let set = "start a time service: `timedatectl set-ntp true`, or install chrony";
    let check = if !plausible {
        Check::warning("clock", format!("the system clock stands in the year {}", 1970 + unix / YEAR_SECONDS), set)
    } else if stepped_seconds.abs() > STEP_SECONDS_MAX {
        let fact = format!("the system clock jumped by {stepped_seconds:+.3} s while this command ran; {how}");
        Check::warning("clock", fact, "have one time service only, one that slews: chrony or systemd-timesyncd")
    } else if synchronised == Some(false) {
        Check::warning("clock", how, set)
    } else {
        Check::ok("clock", format!("plausible and steady; {how}"))
    };
    let error = match synchronisation {
        Synchronisation::Kept { error_seconds } => Some(error_seconds),
        _ => None,
    };
    check
        .with("unix_seconds", unix)
        .with("stepped_seconds", stepped_seconds)
        .with("synchronised", synchronised)
        .with("error_seconds_max", error)
}

#[cfg(test)]
mod tests {
    use super::super::check::Status;
    use super::*;

    #[test]
    fn old_jumping_and_free_clocks_are_told_apart() {
        let kept = Synchronisation::Kept { error_seconds: 0.01 };
        let good = PLAUSIBLE_UNIX_SECONDS_MIN + 1;
        assert_eq!(judge(good, 0.0, kept).status, Status::Ok);
        assert_eq!(judge(good, 0.0, Synchronisation::Unknown).fields["synchronised"], serde_json::Value::Null);
        let old = judge(86_400, 0.0, kept);
        assert!(old.status == Status::Warning && old.fact.contains("year 1970"), "{old:?}");
        let jumped = judge(good, -3.0, kept);
        assert!(jumped.status == Status::Warning && jumped.fact.contains("-3.000 s"), "{jumped:?}");
        let free = judge(good, 0.0, Synchronisation::Free);
        assert!(free.status == Status::Warning && free.hint.is_some(), "{free:?}");
    }
}
