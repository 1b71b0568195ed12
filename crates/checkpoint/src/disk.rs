//! The file system calls of a save, behind a trait so that tests can cut the sequence at every one of them.
//!
//! Not an abstraction over storage services: durability here means POSIX `fsync` and an atomic `rename`
//! inside one file system.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

/// A file that is being written and can be forced to stable storage.
pub(crate) trait DurableFile: Write {
    /// Returns when the content is on stable storage.
    fn sync(&mut self) -> io::Result<()>;
}

/// Every call by which a save changes the file system.
pub(crate) trait Disk {
    /// Creates a folder and those above it; an existing one is kept.
    fn create_folder(&self, path: &Path) -> io::Result<()>;
    /// Creates a file that must not exist yet.
    fn create_file<'a>(&'a self, path: &Path) -> io::Result<Box<dyn DurableFile + 'a>>;
    /// Makes creations and renames inside a folder durable.
    fn sync_folder(&self, path: &Path) -> io::Result<()>;
    /// Atomically gives a folder another name; the new name must be free.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Removes a folder with everything in it.
    fn remove_folder(&self, path: &Path) -> io::Result<()>;
}

/// The operating system's file system.
pub(crate) struct RealDisk;

impl DurableFile for File {
    fn sync(&mut self) -> io::Result<()> {
        self.sync_all()
    }
}

impl Disk for RealDisk {
    fn create_folder(&self, path: &Path) -> io::Result<()> {
        fs::create_dir_all(path)
    }

    fn create_file<'a>(&'a self, path: &Path) -> io::Result<Box<dyn DurableFile + 'a>> {
        Ok(Box::new(File::create_new(path)?))
    }

    fn sync_folder(&self, path: &Path) -> io::Result<()> {
        // Only POSIX systems let a folder be opened and synced; elsewhere renames are journalled.
        if cfg!(unix) { File::open(path)?.sync_all() } else { Ok(()) }
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove_folder(&self, path: &Path) -> io::Result<()> {
        fs::remove_dir_all(path)
    }
}
