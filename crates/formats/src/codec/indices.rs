//! Two ways to write which entries of a block are kept, each of a size that follows from how many.
//!
//! **Plain**: 12 bits an index, two indices in three bytes, the first in the lowest bits.
//!
//! **Elias-Fano** (Elias 1974; Fano 1971), for k ascending indices below n: the low 5 bits of each, and the high parts h in unary:
//! of k + ceil(n / 32) bits, bit `h_j + j` is set for the j-th index. A full block with 96 entries: 96 + 128 bits of high
//! parts are 28 bytes, 96 * 5 bits are 60: 7.33 bits an index, where log2 of the number of choices is 6.66.

use super::select::KEPT_MAX;

/// Low bits that Elias-Fano writes as they are.
const LOW_BITS: usize = 5;
const LOW_MASK: u16 = (1 << LOW_BITS) - 1;

/// Bytes of the high parts of a full block of 4,096 with 96 entries, rounded up to words.
const HIGH_WORDS_MAX: usize = 4;

#[inline(always)]
pub(super) const fn plain_bytes(kept: usize) -> usize {
    (kept * 12).div_ceil(8)
}

/// Writes `indices`, of which those behind the last kept one are 0; `bytes` are [`plain_bytes`] long.
#[inline(always)]
pub(super) fn write_plain(indices: &[u16; KEPT_MAX], bytes: &mut [u8]) {
    for (bytes, pair) in bytes.chunks_mut(3).zip(indices.as_chunks::<2>().0) {
        let word = u32::from(pair[0]) | u32::from(pair[1]) << 12;
        bytes.copy_from_slice(&word.to_le_bytes()[..bytes.len()]);
    }
}

/// Reads what [`write_plain`] wrote, from any bytes: an index may be anything up to 2^16.
#[inline(always)]
pub(super) fn read_plain(bytes: &[u8], indices: &mut [u16; KEPT_MAX]) {
    let (triples, last) = bytes.as_chunks::<3>();
    let pairs = indices.as_chunks_mut::<2>().0;
    for (pair, bytes) in pairs.iter_mut().zip(triples) {
        let word = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], 0]);
        *pair = [(word & 0xfff) as u16, (word >> 12) as u16];
    }
    if let (Some(pair), &[low, high]) = (pairs.get_mut(triples.len()), last) {
        pair[0] = u16::from_le_bytes([low, high]);
    }
}

#[inline(always)]
const fn high_bytes(kept: usize, values: usize) -> usize {
    (kept + values.div_ceil(1 << LOW_BITS)).div_ceil(8)
}

#[inline(always)]
pub(super) const fn elias_fano_bytes(kept: usize, values: usize) -> usize {
    high_bytes(kept, values) + (kept * LOW_BITS).div_ceil(8)
}

/// Writes the first `kept` of `indices` into a block of `values`; `bytes` are [`elias_fano_bytes`] long.
#[inline(always)]
pub(super) fn write_elias_fano(indices: &[u16; KEPT_MAX], kept: usize, values: usize, bytes: &mut [u8]) {
    let (high, low) = bytes.split_at_mut(high_bytes(kept, values));
    let mut words = [0_u64; HIGH_WORDS_MAX];
    for (place, index) in indices.iter().take(kept).enumerate() {
        let bit = usize::from(index >> LOW_BITS) + place;
        words[bit / 64 % HIGH_WORDS_MAX] |= 1 << (bit % 64);
    }
    for (bytes, word) in high.chunks_mut(8).zip(words) {
        bytes.copy_from_slice(&word.to_le_bytes()[..bytes.len()]);
    }
    for (bytes, eight) in low.chunks_mut(LOW_BITS).zip(indices.as_chunks::<8>().0) {
        let parts = eight.iter().enumerate();
        let word = parts.fold(0, |word, (place, index)| word | u64::from(index & LOW_MASK) << (LOW_BITS * place));
        bytes.copy_from_slice(&word.to_le_bytes()[..bytes.len()]);
    }
}

/// Reads what [`write_elias_fano`] wrote, from any bytes. False where there are not exactly `kept` indices, or bits set
/// behind the last one; an index may still be any up to 2^16.
#[inline(always)]
pub(super) fn read_elias_fano(bytes: &[u8], kept: usize, values: usize, indices: &mut [u16; KEPT_MAX]) -> bool {
    let (high, low) = bytes.split_at(high_bytes(kept, values));
    let mut spare_bits = 0;
    for (bytes, eight) in low.chunks(LOW_BITS).zip(indices.as_chunks_mut::<8>().0) {
        let mut word = [0; 8];
        word[..bytes.len()].copy_from_slice(bytes);
        let word = u64::from_le_bytes(word);
        for (place, index) in eight.iter_mut().enumerate() {
            *index = (word >> (LOW_BITS * place)) as u16 & LOW_MASK;
        }
    }
    for spare in &mut indices[kept..] {
        spare_bits |= std::mem::take(spare);
    }
    let mut place = 0;
    for (number, bytes) in high.chunks(8).enumerate() {
        let mut word = [0; 8];
        word[..bytes.len()].copy_from_slice(bytes);
        let mut word = u64::from_le_bytes(word);
        while word != 0 {
            let bit = number * 64 + word.trailing_zeros() as usize;
            if let Some(index) = indices[..kept].get_mut(place) {
                // The j-th set bit is the j-th or a later one.
                *index |= ((bit - place) as u16) << LOW_BITS;
            }
            place += 1;
            word &= word - 1;
        }
    }
    place == kept && spare_bits == 0
}
