//! Memory and disk of this machine.

use super::check::Check;
use crate::format::bytes;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Below this much free memory a site is likely to be killed in its first round: the smallest useful model with its optimiser
/// and the program itself take some hundred megabytes.
const MEMORY_BYTES_MIN: u64 = 1 << 30;

/// Below this much free disk the first checkpoints may not fit: three are kept, each 12 bytes a parameter.
const DISK_BYTES_MIN: u64 = 2 << 30;

/// What is written to see that it can be synced.
const SYNC_BYTES: usize = 1 << 20;

/// A cgroup without a limit says `max`, or (version 1) a number near 2^63.
const CGROUP_BYTES_MAX: u64 = 1 << 60;

/// Where Linux mounts control groups.
const CGROUP_ROOT: &str = "/sys/fs/cgroup";

/// Memory in all and free, and what a container may take of it.
pub(super) fn memory() -> Check {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let (Some(total), Some(available)) = (meminfo(&text, "MemTotal"), meminfo(&text, "MemAvailable")) else {
        let hint = "see with the system's own tools that a few gigabytes are free";
        return Check::warning("memory", "this system does not tell how much memory is free", hint);
    };
    judge_memory(total, available, cgroup_memory())
}

/// A line of `/proc/meminfo`, in bytes.
fn meminfo(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// Limit and use of the control group with the least room, of those that this process is in.
fn cgroup_memory() -> Option<(u64, u64)> {
    let text = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let number = |path: PathBuf| std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let limits = cgroup_folders(&text).into_iter().filter_map(|(folder, limit, used)| {
        let limit = number(folder.join(limit)).filter(|limit| *limit < CGROUP_BYTES_MAX)?;
        Some((limit, number(folder.join(used)).unwrap_or(0)))
    });
    limits.min_by_key(|(limit, used)| limit.saturating_sub(*used))
}

/// Folders that may hold a limit, with the names of limit and use: version 2 (`0::/a/b`: /a/b, /a and the root) and
/// version 1 (`4:memory:/a`).
fn cgroup_folders(text: &str) -> Vec<(PathBuf, &'static str, &'static str)> {
    let mut folders = Vec::new();
    for line in text.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(group)) = (parts.next(), parts.next()) else { continue };
        let (base, limit, used) = match controllers {
            "" => (Path::new(CGROUP_ROOT).to_owned(), "memory.max", "memory.current"),
            _ if controllers.split(',').any(|name| name == "memory") => {
                (Path::new(CGROUP_ROOT).join("memory"), "memory.limit_in_bytes", "memory.usage_in_bytes")
            }
            _ => continue,
        };
        let group = Path::new(group.trim_start_matches('/'));
        folders.extend(group.ancestors().map(|part| (base.join(part), limit, used)));
    }
    folders
}

fn judge_memory(total: u64, available: u64, cgroup: Option<(u64, u64)>) -> Check {
    let limit = cgroup.map(|(limit, _)| limit).filter(|limit| *limit < total);
    let left = cgroup.map_or(available, |(limit, used)| available.min(limit.saturating_sub(used)));
    let of = limit.map_or_else(
        || bytes(total),
        |limit| format!("{} (the limit of this container; the machine has {})", bytes(limit), bytes(total)),
    );
    let fact = format!("{} free of {of}", bytes(left));
    let check = match left < MEMORY_BYTES_MIN {
        true => Check::warning("memory", fact, "end other programs, or give the container more memory"),
        false => Check::ok("memory", fact),
    };
    check.with("total_bytes", total).with("available_bytes", left).with("cgroup_limit_bytes", limit)
}

/// Room in `folder`, and whether what is written there can be made durable.
pub(super) fn disk(folder: &Path) -> Check {
    let shown = folder.display();
    let free = match rustix::fs::statvfs(folder) {
        Ok(status) => status.f_bavail.saturating_mul(status.f_frsize),
        Err(error) => return Check::failed("disk", format!("{shown}: {error}"), format!("see `df -h {shown}`")),
    };
    match sync_seconds(folder) {
        Ok(seconds) => judge_disk(free, seconds).with("folder", shown.to_string()),
        Err(error) => {
            let hint =
                "run it in a folder on a local disk that you may write to; checkpoints and the log are synced there";
            Check::failed("disk", format!("{shown}: a file cannot be written and synced: {error}"), hint)
                .with("free_bytes", free)
        }
    }
}

/// Writes a file, syncs it and its folder, and removes it.
fn sync_seconds(folder: &Path) -> std::io::Result<f64> {
    let began = Instant::now();
    let mut file = tempfile::Builder::new().prefix(".beringia-doctor-").tempfile_in(folder)?;
    file.write_all(&vec![0x5A; SYNC_BYTES])?;
    file.as_file().sync_all()?;
    std::fs::File::open(folder)?.sync_all()?;
    Ok(began.elapsed().as_secs_f64())
}

fn judge_disk(free: u64, sync_seconds: f64) -> Check {
    let fact = format!("{} free here; 1 MiB is written and synced in {:.1} ms", bytes(free), sync_seconds * 1e3);
    let check = match free < DISK_BYTES_MIN {
        true => Check::warning("disk", fact, "make room, or run it where there is some: `df -h`"),
        false => Check::ok("disk", fact),
    };
    check.with("free_bytes", free).with("sync_seconds", sync_seconds)
}

#[cfg(test)]
mod tests {
    use super::super::check::Status;
    use super::*;

    #[test]
    fn the_tightest_limit_counts() {
        let text = "MemTotal:       16384 kB\nMemFree:  1 kB\nMemAvailable:    8192 kB\n";
        assert_eq!(meminfo(text, "MemTotal"), Some(16 << 20));
        assert_eq!(meminfo(text, "MemAvailable"), Some(8 << 20));
        assert_eq!(meminfo("MemTotal: many kB", "MemTotal"), None);
        let (total, available) = (64 << 30, 32 << 30);
        assert_eq!(judge_memory(total, available, None).status, Status::Ok);
        let tight = judge_memory(total, available, Some((4 << 30, (4 << 30) - (100 << 20))));
        assert_eq!(tight.status, Status::Warning);
        assert_eq!(tight.fields["available_bytes"], 100 << 20);
        assert!(tight.fact.contains("limit of this container"), "{}", tight.fact);
    }

    #[test]
    fn limits_are_looked_for_in_every_group_above() {
        let version_2: Vec<_> = cgroup_folders("0::/a/b\n").into_iter().map(|(folder, ..)| folder).collect();
        let root = Path::new(CGROUP_ROOT);
        assert_eq!(version_2, [root.join("a/b"), root.join("a"), root.join("")]);
        let version_1 = cgroup_folders("5:cpu,cpuacct:/x\n4:memory:/x\nnonsense\n");
        assert_eq!(version_1[0], (root.join("memory/x"), "memory.limit_in_bytes", "memory.usage_in_bytes"));
        assert_eq!(version_1.len(), 2);
    }

    #[test]
    fn a_folder_that_is_not_there_fails_and_one_that_is_stays_clean() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(disk(&folder.path().join("none")).status, Status::Failed);
        let check = disk(folder.path());
        assert!(check.status != Status::Failed && check.fields["sync_seconds"].as_f64().unwrap() > 0.0, "{check:?}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        assert_eq!(judge_disk(1 << 20, 0.1).status, Status::Warning);
    }
}
