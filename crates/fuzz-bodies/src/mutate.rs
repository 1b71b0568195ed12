//! Bytes that are nearly right: what a coverage-guided fuzzer would try first, from a seed.

use base::random::Random;

/// Numbers at which lengths and counts go wrong.
const ODD: [u64; 12] =
    [0, 1, 0x7f, 0x80, 0xff, 0x7fff, 0xffff, 0x7fff_ffff, 0xffff_ffff, i64::MAX as u64, u64::MAX, f64::NAN.to_bits()];

/// Longest result.
const BYTES_MAX: usize = 1 << 16;

/// `original` with one to eight changes; `other` is where spliced parts come from.
pub fn mutated(random: &mut Random, original: &[u8], other: &[u8]) -> Vec<u8> {
    let mut bytes = original.to_vec();
    for _ in 0..1 + below(random, 8) {
        change(random, &mut bytes, other);
        bytes.truncate(BYTES_MAX);
    }
    bytes
}

fn below(random: &mut Random, bound: usize) -> usize {
    (random.next_u64() % bound.max(1) as u64) as usize
}

fn change(random: &mut Random, bytes: &mut Vec<u8>, other: &[u8]) {
    let at = below(random, bytes.len() + 1);
    let length = below(random, 1 + (bytes.len() - at).min(64));
    match below(random, 9) {
        0 | 1 => bytes.iter_mut().skip(at).take(1).for_each(|byte| *byte ^= 1 << (random.next_u64() % 8)),
        2 => bytes.iter_mut().skip(at).take(1).for_each(|byte| *byte = random.next_u64() as u8),
        3 => bytes.truncate(at),
        4 => drop(bytes.drain(at..at + length)),
        5 => {
            let again = bytes[at..at + length].to_vec();
            insert(bytes, at, &again);
        }
        6 => {
            let odd = ODD[below(random, ODD.len())].to_le_bytes();
            let width = 1 << below(random, 4);
            bytes.iter_mut().skip(at).zip(&odd[..width]).for_each(|(byte, odd)| *byte = *odd);
        }
        7 => {
            let new: Vec<u8> = (0..1 + below(random, 16)).map(|_| random.next_u64() as u8).collect();
            insert(bytes, at, &new);
        }
        _ => {
            let from = below(random, other.len() + 1);
            let until = from + below(random, 1 + (other.len() - from).min(256));
            insert(bytes, at, &other[from..until]);
        }
    }
}

fn insert(bytes: &mut Vec<u8>, at: usize, new: &[u8]) {
    bytes.splice(at..at, new.iter().copied());
}
