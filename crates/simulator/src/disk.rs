//! The disk under the coordinator's log: what was not synced may be lost or torn, and what is full takes nothing.
//!
//! It is what the database that ships writes to. Writes go to a cache; a sync makes them durable. A process that is killed loses
//! nothing of the cache, a machine that loses power does: of each write that was not synced, sector by sector, the new bytes or the old
//! ones are there afterwards.

use base::random::Random;
use redb::StorageBackend;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What a disk writes at once.
const SECTOR_BYTES: usize = 512;

/// A disk.
#[derive(Debug, Default)]
struct Content {
    durable: Vec<u8>,
    cached: Vec<u8>,
    /// Parts of the cache that are not durable: offset and length.
    unsynced: Vec<(usize, usize)>,
    is_full: bool,
    /// Fails for good after so many more writes and syncs: the process dies in mid-write.
    operations_left: Option<u32>,
    /// Who may write: a process that was replaced may not.
    owner: u64,
}

/// A disk that several processes may have open, one after the other.
#[derive(Debug, Clone, Default)]
pub(crate) struct Disk(Arc<Mutex<Content>>);

impl Disk {
    fn content(&self) -> MutexGuard<'_, Content> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The disk as a new process sees it. No older one can write any more.
    pub(crate) fn open(&self) -> DiskFile {
        let mut content = self.content();
        content.owner += 1;
        content.operations_left = None;
        DiskFile { disk: self.clone(), owner: content.owner }
    }

    /// Whoever has it open cannot write any more.
    pub(crate) fn fence(&self) {
        self.content().owner += 1;
    }

    pub(crate) fn set_full(&self, is_full: bool) {
        self.content().is_full = is_full;
    }

    /// The process dies at the write or sync after so many.
    pub(crate) fn fail_after(&self, operations: u32) {
        self.content().operations_left = Some(operations);
    }

    /// Nothing breaks from now on.
    pub(crate) fn calm(&self) {
        let mut content = self.content();
        content.is_full = false;
        content.operations_left = content.operations_left.filter(|left| *left == 0);
    }

    /// Whether that has happened.
    pub(crate) fn has_failed(&self) -> bool {
        self.content().operations_left == Some(0)
    }

    /// The machine loses power.
    pub(crate) fn lose_power(&self, random: &mut Random) {
        let mut content = self.content();
        content.owner += 1;
        let Content { durable, cached, unsynced, .. } = &mut *content;
        durable.resize(cached.len().max(durable.len()), 0);
        for (offset, length) in unsynced.drain(..) {
            for start in (offset..offset + length).step_by(SECTOR_BYTES) {
                let end = (start + SECTOR_BYTES).min(offset + length).min(cached.len());
                if start < end && random.next_below(2) == 0 {
                    durable[start..end].copy_from_slice(&cached[start..end]);
                }
            }
        }
        *cached = durable.clone();
    }
}

/// A disk as one process sees it.
#[derive(Debug)]
pub(crate) struct DiskFile {
    disk: Disk,
    owner: u64,
}

impl DiskFile {
    /// The content, for a change of it.
    fn changing(&self) -> io::Result<MutexGuard<'_, Content>> {
        let mut content = self.disk.content();
        if content.owner != self.owner {
            return Err(io::Error::other("another process has the disk"));
        }
        match &mut content.operations_left {
            Some(0) => return Err(io::Error::other("the process was killed")),
            Some(left) => *left -= 1,
            None => {}
        }
        Ok(content)
    }
}

impl StorageBackend for DiskFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.disk.content().cached.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let content = self.disk.content();
        let place = offset as usize..offset as usize + out.len();
        let bytes = content.cached.get(place).ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))?;
        out.copy_from_slice(bytes);
        Ok(())
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        let mut content = self.changing()?;
        let (before, length) = (content.cached.len(), length as usize);
        if content.is_full && length > before {
            return Err(io::ErrorKind::StorageFull.into());
        }
        content.cached.resize(length, 0);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut content = self.changing()?;
        let Content { durable, cached, unsynced, .. } = &mut *content;
        durable.resize(cached.len(), 0);
        for (offset, length) in unsynced.drain(..) {
            let place = offset..(offset + length).min(cached.len());
            if place.start < place.end {
                durable[place.clone()].copy_from_slice(&cached[place]);
            }
        }
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut content = self.changing()?;
        if content.is_full {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let place = offset as usize..offset as usize + data.len();
        let bytes = content.cached.get_mut(place.clone());
        bytes.ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))?.copy_from_slice(data);
        content.unsynced.push((place.start, place.len()));
        Ok(())
    }
}
