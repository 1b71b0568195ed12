//! Files of a run in fewer bytes: tokens of text shrink to a quarter, and a site on a thin link waits for them before its first step.
//!
//! zstd (RFC 8878). What comes out is checked like any other file, by its length and BLAKE3: a packed file is trusted no more
//! than a plain one.

use std::io::{self, Read, Write};

/// Larger files travel as they are: they are packed in the coordinator's memory, when it starts.
pub const PACKED_FILE_BYTES_MAX: u64 = 256 << 20;

/// zstd's own default: some hundred MB/s.
const LEVEL: i32 = 3;

/// Largest window of the packed form, as a power of two: bounds what unpacking takes of memory, 8 MiB. [`LEVEL`] uses 2 MiB.
const WINDOW_LOG_MAX: u32 = 23;

/// The packed form, where it saves a tenth of the bytes or more.
pub fn pack(bytes: &[u8]) -> Option<Vec<u8>> {
    let packed = zstd::bulk::compress(bytes, LEVEL).ok()?;
    (packed.len() + bytes.len() / 10 < bytes.len()).then_some(packed)
}

/// Writes what was packed to `to`.
///
/// # Errors
/// It is not zstd's, or what comes out is not `bytes_expected` long: no more than that is ever written. Or reading or writing fails.
pub fn unpack(packed: impl Read, to: &mut impl Write, bytes_expected: u64) -> io::Result<()> {
    let mut decoder = zstd::stream::read::Decoder::new(packed)?;
    decoder.window_log_max(WINDOW_LOG_MAX)?;
    let mut bounded = decoder.take(bytes_expected);
    let bytes = io::copy(&mut bounded, to)?;
    let is_longer = bounded.into_inner().read(&mut [0])? > 0;
    if bytes == bytes_expected && !is_longer {
        return Ok(());
    }
    let than = if is_longer { "more" } else { "fewer" };
    Err(io::Error::new(io::ErrorKind::InvalidData, format!("it unpacks to {than} than {bytes_expected} bytes")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens() -> Vec<u8> {
        (0..200_000_u32).flat_map(|i| ((i.wrapping_mul(2_654_435_761) >> 23) as u16).to_le_bytes()).collect()
    }

    fn unpacked(packed: &[u8], bytes_expected: u64) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        unpack(packed, &mut bytes, bytes_expected).map(|()| bytes)
    }

    #[test]
    fn tokens_come_back_from_fewer_bytes() {
        let tokens = tokens();
        let packed = pack(&tokens).unwrap();
        assert!(packed.len() < tokens.len() * 3 / 4, "{} of {}", packed.len(), tokens.len());
        assert_eq!(unpacked(&packed, tokens.len() as u64).unwrap(), tokens);
    }

    #[test]
    fn noise_is_not_packed() {
        let mut state = 1_u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        };
        let noise: Vec<u8> = (0..100_000).map(|_| next()).collect();
        assert!(pack(&noise).is_none());
        assert!(pack(&[]).is_none());
    }

    #[test]
    fn another_length_is_refused_and_never_exceeded() {
        let packed = pack(&vec![7; 1 << 20]).unwrap();
        for bytes_expected in [0, 1, (1 << 20) - 1, (1 << 20) + 1, u64::MAX] {
            let mut bytes = Vec::new();
            unpack(&packed[..], &mut bytes, bytes_expected).unwrap_err();
            assert!(bytes.len() as u64 <= bytes_expected);
        }
    }

    #[test]
    fn what_is_damaged_is_refused_or_differs() {
        let tokens = tokens();
        let packed = pack(&tokens).unwrap();
        for place in (0..packed.len()).step_by(997) {
            let mut damaged = packed.clone();
            damaged[place] ^= 0x55;
            // A file's BLAKE3 tells the rest apart; here nothing may panic or grow.
            if let Ok(bytes) = unpacked(&damaged, tokens.len() as u64) {
                assert_eq!(bytes.len(), tokens.len());
            }
        }
        for end in [0, 1, 10, packed.len() / 2, packed.len() - 1] {
            unpacked(&packed[..end], tokens.len() as u64).unwrap_err();
        }
    }

    #[test]
    fn a_large_window_is_refused() {
        let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
        encoder.window_log(WINDOW_LOG_MAX + 2).unwrap();
        encoder.write_all(&vec![0; 1 << 26]).unwrap();
        unpacked(&encoder.finish().unwrap(), 1 << 26).unwrap_err();
    }
}
