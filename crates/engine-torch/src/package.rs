//! The Python package, carried in this binary: a site needs PyTorch and one file.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use tempfile::TempDir;

/// Name of the package, and of its folder.
pub(crate) const PACKAGE: &str = "beringia_torch";

/// Every file of `python/beringia_torch`; a test compares the list with the folder.
const FILES: &[(&str, &str)] = &[
    ("__init__.py", include_str!("../../../python/beringia_torch/__init__.py")),
    ("__main__.py", include_str!("../../../python/beringia_torch/__main__.py")),
    ("arena.py", include_str!("../../../python/beringia_torch/arena.py")),
    ("compiler.py", include_str!("../../../python/beringia_torch/compiler.py")),
    ("devices.py", include_str!("../../../python/beringia_torch/devices.py")),
    ("distributed.py", include_str!("../../../python/beringia_torch/distributed.py")),
    ("engine.py", include_str!("../../../python/beringia_torch/engine.py")),
    ("errors.py", include_str!("../../../python/beringia_torch/errors.py")),
    ("measure.py", include_str!("../../../python/beringia_torch/measure.py")),
    ("model.py", include_str!("../../../python/beringia_torch/model.py")),
    ("operations.py", include_str!("../../../python/beringia_torch/operations.py")),
    ("optimizer.py", include_str!("../../../python/beringia_torch/optimizer.py")),
    ("parameters.py", include_str!("../../../python/beringia_torch/parameters.py")),
    ("protocol.py", include_str!("../../../python/beringia_torch/protocol.py")),
    ("server.py", include_str!("../../../python/beringia_torch/server.py")),
];

/// A folder of this engine alone, mode 0700, with the package in it. Removed when dropped.
pub(crate) fn unpack() -> io::Result<TempDir> {
    // Short, because it holds a socket: its path may have 107 bytes on Linux, 103 on macOS.
    let owner_only = fs::Permissions::from_mode(0o700);
    let folder = tempfile::Builder::new().prefix("beringia-torch-").permissions(owner_only).tempdir()?;
    write_package(folder.path())?;
    Ok(folder)
}

fn write_package(folder: &Path) -> io::Result<()> {
    let package = folder.join(PACKAGE);
    fs::create_dir(&package)?;
    FILES.iter().try_for_each(|(name, text)| fs::write(package.join(name), text))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_file_of_the_package_is_carried() {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../python").join(PACKAGE);
        let name = |entry: io::Result<fs::DirEntry>| entry.unwrap().file_name().into_string().unwrap();
        let on_disk: BTreeSet<String> = fs::read_dir(source).unwrap().map(name).collect();
        let on_disk: BTreeSet<String> = on_disk.into_iter().filter(|name| name != "__pycache__").collect();
        let carried: BTreeSet<String> = FILES.iter().map(|(name, _)| (*name).to_owned()).collect();
        assert_eq!(carried, on_disk);
    }

    #[test]
    fn the_folder_is_for_its_owner_only_and_goes() {
        let folder = unpack().unwrap();
        let path = folder.path().to_owned();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
        assert!(path.join(PACKAGE).join("__main__.py").exists());
        drop(folder);
        assert!(!path.exists());
    }
}
