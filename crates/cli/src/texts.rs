//! Reads text files of a user: bounded, and a failure says which file and what would do.

use crate::failure::Failure;
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// Reads a UTF-8 file of at most `bytes_max` bytes.
///
/// # Errors
/// It cannot be read, is longer, or is no UTF-8.
pub(crate) fn read(path: &Path, bytes_max: u64) -> Result<String, Failure> {
    let place = path.display();
    let unreadable = |error: std::io::Error| {
        Failure::new(
            format!("{place} cannot be read: {error}"),
            format!("see that {place} is a file that you may read"),
        )
    };
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(unreadable)?;
    // One byte more than allowed tells a file that is too long, whatever its metadata say.
    file.take(bytes_max + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    if bytes.len() as u64 > bytes_max {
        return Err(Failure::new(format!("{place} is longer than {bytes_max} bytes"), "split it"));
    }
    String::from_utf8(bytes)
        .map_err(|error| Failure::new(format!("{place} is not UTF-8: {error}"), "save it as UTF-8 text"))
}
