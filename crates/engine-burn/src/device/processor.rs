//! The CPU and its memory, as the system tells them.

use super::OpenDevice;
use burn::tensor::Device;
use engine::{DeviceInfo, Precision};
use std::fs::read_to_string;
use std::path::Path;

/// The mount point of control groups.
const CONTROL_GROUPS: &str = "/sys/fs/cgroup";

/// Opens `flex`.
pub(super) fn open() -> OpenDevice {
    let information = read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        let value = information.lines().find_map(|line| line.strip_prefix(name)?.split_once(':'));
        value.map(|(_, value)| value.trim().to_owned())
    };
    let info = DeviceInfo {
        engine: "flex".to_owned(),
        name: field("model name").unwrap_or_else(|| std::env::consts::ARCH.to_owned()),
        maker: field("vendor_id").map(|id| maker(&id)).unwrap_or_default(),
        driver: String::new(),
        memory_bytes: memory_total_bytes(),
        threads: rayon::current_num_threads(),
        precision: Precision::F32,
    };
    OpenDevice { device: Device::flex(), info, is_on_host: true, buffer_bytes_max: None, multiplies_bf16: true }
}

/// The maker behind CPUID's vendor string (Intel SDM volume 2A and AMD's manual 3, CPUID function 0).
fn maker(vendor_id: &str) -> String {
    match vendor_id {
        "GenuineIntel" => "Intel",
        "AuthenticAMD" => "AMD",
        "HygonGenuine" => "Hygon",
        "CentaurHauls" | "Shanghai" => "Zhaoxin",
        other => other,
    }
    .to_owned()
}

/// Memory of the machine, or of the control group that this process may not leave.
pub(super) fn memory_total_bytes() -> Option<u64> {
    let total = memory_information("MemTotal")?;
    Some(control_group_limits().into_iter().map(|(limit, _)| limit).fold(total, u64::min))
}

/// Bytes that can be taken now without swapping or being ended for it; `None` where the system does not tell.
pub(crate) fn memory_available_bytes() -> Option<u64> {
    let available = memory_information("MemAvailable")?;
    Some(control_group_limits().into_iter().map(|(limit, used)| limit.saturating_sub(used)).fold(available, u64::min))
}

/// A line of `/proc/meminfo`, which counts in KiB.
fn memory_information(field: &str) -> Option<u64> {
    let text = read_to_string("/proc/meminfo").ok()?;
    let rest = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
    rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// `(limit, used)` in bytes of this process's control group and of those it lies in (version 2).
fn control_group_limits() -> Vec<(u64, u64)> {
    let text = read_to_string("/proc/self/cgroup").unwrap_or_default();
    let Some(path) = text.lines().find_map(|line| line.strip_prefix("0::/")) else {
        return Vec::new();
    };
    let root = Path::new(CONTROL_GROUPS);
    root.join(path).ancestors().take_while(|folder| folder.starts_with(root)).filter_map(control_group).collect()
}

fn control_group(folder: &Path) -> Option<(u64, u64)> {
    let number = |file: &str| read_to_string(folder.join(file)).ok()?.trim().parse::<u64>().ok();
    let (limit, used) = (number("memory.max")?, number("memory.current")?);
    // Pages of files can be dropped: they are counted, but not in the way.
    let statistics = read_to_string(folder.join("memory.stat")).unwrap_or_default();
    let files = statistics.lines().find_map(|line| line.strip_prefix("inactive_file ")?.parse::<u64>().ok());
    Some((limit, used.saturating_sub(files.unwrap_or(0))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_told_where_the_system_tells_it() {
        let (total, available) = (memory_total_bytes(), memory_available_bytes());
        assert_eq!(total.is_some(), cfg!(target_os = "linux"));
        assert!(available <= total, "{available:?} of {total:?}");
    }
}
