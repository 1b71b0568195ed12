//! The shared memory that tensors travel in: a file on a memory file system which both sides map.
//!
//! Its pages are reserved when it is made: a file system that is too small (Docker gives `/dev/shm` 64 MiB) then says so
//! at once, where a sparse file would kill whichever process touches the page too many. The name is removed as
//! soon as Python has mapped it, so the memory goes when the two processes go, however they end.
//!
//! Why it is mapped, where reading and writing by position would need no `unsafe`: measured on one core, a mapping copies
//! 20 MB at 14.7 GB/s and 400 MB at 9 to 11 GB/s, `pread` and `pwrite` at 9 and 3 GB/s. A model of 400M parameters moves
//! 6.4 GB at the end of a round.

use memmap2::{MmapOptions, MmapRaw};
use std::fs::File;
use std::io;
use std::path::Path;
use std::ptr;
use tempfile::TempPath;

/// Every tensor starts on a cache line.
const ALIGNMENT: u64 = 64;

/// Arenas are made in multiples of this, bytes: a longer batch then rarely needs a new one.
const GRANULE_BYTES: u64 = 1 << 20;

/// Bytes of an f32, an i32 and a u32.
pub(crate) const ELEMENT_BYTES: u64 = 4;

/// Where memory files live on Linux.
const SHARED_MEMORY_FOLDER: &str = "/dev/shm";

/// A mapped file of fixed length.
#[derive(Debug)]
pub(crate) struct Arena {
    file: File,
    /// Removes the file when it is dropped.
    path: Option<TempPath>,
    mapped: MmapRaw,
    bytes: u64,
}

impl Arena {
    /// A file of at least `bytes`, in shared memory where there is enough, otherwise among the temporary files.
    pub(crate) fn create(bytes: u64) -> io::Result<Self> {
        let bytes = bytes
            .max(1)
            .checked_next_multiple_of(GRANULE_BYTES)
            .ok_or_else(|| io::Error::other(format!("{bytes} bytes are more than any file holds")))?;
        Self::create_in(Path::new(SHARED_MEMORY_FOLDER), bytes)
            .or_else(|_| Self::create_in(&std::env::temp_dir(), bytes))
    }

    fn create_in(folder: &Path, bytes: u64) -> io::Result<Self> {
        // Mode 0600, and a name that nobody can guess.
        let (file, path) = tempfile::Builder::new().prefix("beringia-").tempfile_in(folder)?.into_parts();
        reserve(&file, bytes)?;
        let length = usize::try_from(bytes).map_err(io::Error::other)?;
        // The pages are there: entering them now saves a fault for each.
        let mapped = MmapOptions::new().len(length).populate().map_raw(&file)?;
        Ok(Self { file, path: Some(path), mapped, bytes })
    }

    /// Where Python finds it, until [`Arena::unlink`].
    pub(crate) fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Removes the name; the memory stays until both sides have let go.
    pub(crate) fn unlink(&mut self) {
        self.path = None;
    }

    /// Copies `values` to `offset`.
    pub(crate) fn write<T: bytemuck::NoUninit>(&self, offset: u64, values: &[T]) -> io::Result<()> {
        let source: &[u8] = bytemuck::cast_slice(values);
        let start = self.place(offset, source.len())?;
        // SAFETY: `place` has checked that the bytes lie within the mapping, which lives as long as `self` and belongs to nobody
        // else in this process; the slice is elsewhere. No reference to the mapping is made, so what the other process does to
        // it meanwhile can only be a wrong number.
        unsafe { ptr::copy_nonoverlapping(source.as_ptr(), self.mapped.as_mut_ptr().add(start), source.len()) };
        Ok(())
    }

    /// Copies what is at `offset` to `values`.
    pub(crate) fn read(&self, offset: u64, values: &mut [f32]) -> io::Result<()> {
        let target: &mut [u8] = bytemuck::cast_slice_mut(values);
        let start = self.place(offset, target.len())?;
        // SAFETY: as in `write`; every pattern of bits is an f32.
        unsafe { ptr::copy_nonoverlapping(self.mapped.as_ptr().add(start), target.as_mut_ptr(), target.len()) };
        Ok(())
    }

    /// `offset` in the mapping, if `length` bytes follow and the file still has them: touching a page that the other side
    /// has cut off would end this process.
    fn place(&self, offset: u64, length: usize) -> io::Result<usize> {
        let end = offset.checked_add(length as u64).filter(|end| *end <= self.bytes);
        match (end, usize::try_from(offset)) {
            (Some(_), Ok(start)) if self.file.metadata()?.len() >= self.bytes => Ok(start),
            _ => Err(io::Error::other(format!("{length} bytes at {offset} are not in a file of {}", self.bytes))),
        }
    }
}

/// Gives the file its length, with memory behind every page.
#[cfg(target_os = "linux")]
fn reserve(file: &File, bytes: u64) -> io::Result<()> {
    Ok(rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), 0, bytes)?)
}

/// Gives the file its length, with blocks behind every page.
#[cfg(not(target_os = "linux"))]
fn reserve(file: &File, bytes: u64) -> io::Result<()> {
    let zeros = vec![0; GRANULE_BYTES as usize];
    (0..bytes / GRANULE_BYTES)
        .try_for_each(|index| std::os::unix::fs::FileExt::write_all_at(file, &zeros, index * GRANULE_BYTES))
}

/// Lays tensors one after the other.
#[derive(Debug, Default)]
pub(crate) struct Layout {
    end: u64,
}

impl Layout {
    /// Offset of a tensor of `elements` four-byte elements.
    pub(crate) fn place(&mut self, elements: usize) -> u64 {
        let offset = self.end.next_multiple_of(ALIGNMENT);
        // Saturates where no arena can follow: making it fails.
        self.end = offset.saturating_add((elements as u64).saturating_mul(ELEMENT_BYTES)).min(u64::MAX - ALIGNMENT);
        offset
    }

    /// Bytes that the arena must have.
    pub(crate) fn bytes(&self) -> u64 {
        self.end
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, OpenOptions};

    #[test]
    fn what_is_written_is_read_and_the_name_goes() {
        let mut arena = Arena::create(5000).unwrap();
        assert_eq!(arena.bytes(), GRANULE_BYTES);
        let path = arena.path().unwrap().to_owned();
        let mode = std::os::unix::fs::PermissionsExt::mode(&fs::metadata(&path).unwrap().permissions());
        assert_eq!(mode & 0o777, 0o600);
        arena.write(64, &[1.5f32, -2.0]).unwrap();
        arena.write(128, &[7u32]).unwrap();
        arena.unlink();
        assert!(!path.exists());
        let mut read = [0.0; 2];
        arena.read(64, &mut read).unwrap();
        assert_eq!(read, [1.5, -2.0]);
        assert!(arena.read(GRANULE_BYTES - 4, &mut read).is_err(), "past the end");
    }

    #[test]
    fn a_file_that_was_cut_short_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let arena = Arena::create_in(folder.path(), GRANULE_BYTES).unwrap();
        OpenOptions::new().write(true).open(arena.path().unwrap()).unwrap().set_len(10).unwrap();
        assert!(arena.read(64, &mut [0.0; 4]).is_err());
    }

    #[test]
    fn more_than_there_is_leaves_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        // 2^62 bytes: no disk has them. The second overflows while it is rounded up.
        assert!(Arena::create_in(folder.path(), 1 << 62).is_err());
        assert!(Arena::create(u64::MAX).is_err());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn tensors_start_on_cache_lines() {
        let mut layout = Layout::default();
        assert_eq!([layout.place(3), layout.place(16), layout.place(1)], [0, 64, 128]);
        assert_eq!(layout.bytes(), 132);
        layout.place(usize::MAX);
        layout.place(usize::MAX);
        assert!(layout.bytes() >= u64::MAX - 2 * ALIGNMENT);
    }
}
