//! Bits that flip on their way, below TLS as well as above it: none of them gets into a delta.

use crate::Blob;
use crate::fuzzing::{answered_chunk, fetched};
use crate::limits::CHUNK_BYTES_MAX;
use base::ContentHash;
use base::random::Random;

/// Flips over whole chunks, as the goal of the project names them.
const FLIPS: usize = 1_000_000;

/// Bytes of each delta: one piece of BLAKE3's tree and a bit.
const DELTA_BYTES: usize = 1_100;

/// The hash at the end of a reply's frame, before the option of the holder's counters.
const HASH_BYTES: usize = 32;

fn noise(random: &mut Random, bytes: usize) -> Vec<u8> {
    let mut noise: Vec<u8> = (0..bytes.div_ceil(8)).flat_map(|_| random.next_u64().to_le_bytes()).collect();
    noise.truncate(bytes);
    noise
}

fn flip(bytes: &mut [u8], bit: usize) {
    bytes[bit / 8] ^= 1 << (bit % 8);
}

/// A chunk as its holder sends it: a reply's body and the content that follows.
fn answer(content: &[u8], index: u64) -> (Vec<u8>, Vec<u8>) {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(answered_chunk(&Blob::memory(content.to_vec()), index)).unwrap()
}

#[test]
fn none_of_a_million_flipped_bits_is_accepted() {
    let (mut random, mut flips, mut of_frames) = (Random::new(5, 0), 0, 0);
    while flips < FLIPS {
        let delta = noise(&mut random, DELTA_BYTES);
        let hash = ContentHash::of(&delta);
        let (mut reply, mut content) = answer(&delta, 0);
        let bytes = delta.len() as u64;
        assert_eq!(fetched(bytes, hash, &[(&reply, &content)]).unwrap(), delta);
        for bit in 0..8 * content.len() {
            flip(&mut content, bit);
            fetched(bytes, hash, &[(&reply, &content)]).unwrap_err();
            flip(&mut content, bit);
            flips += 1;
        }
        let hash_start = 8 * (reply.len() - 1 - HASH_BYTES);
        for bit in 0..8 * reply.len() {
            flip(&mut reply, bit);
            let taken = fetched(bytes, hash, &[(&reply, &content)]);
            // Counters of the holder's TCP mean nothing for the content.
            assert!(taken.as_ref().is_err() || taken.as_ref().is_ok_and(|taken| *taken == delta), "bit {bit}");
            let is_hash = (hash_start..hash_start + 8 * HASH_BYTES).contains(&bit);
            assert!(!is_hash || taken.is_err(), "bit {bit} of the announced hash");
            flip(&mut reply, bit);
            of_frames += 1;
        }
    }
    assert!(flips >= FLIPS && of_frames > 0);
}

#[test]
fn a_flip_in_any_chunk_of_several_is_refused() {
    let mut random = Random::new(6, 0);
    let delta = noise(&mut random, CHUNK_BYTES_MAX + DELTA_BYTES);
    let hash = ContentHash::of(&delta);
    let mut answers = [answer(&delta, 0), answer(&delta, 1)];
    let bytes = delta.len() as u64;
    for index in [0, 1] {
        for _ in 0..100 {
            let bit = random.next_below(8 * answers[index].1.len() as u64) as usize;
            flip(&mut answers[index].1, bit);
            let parts: Vec<_> = answers.iter().map(|(reply, content)| (&reply[..], &content[..])).collect();
            fetched(bytes, hash, &parts).unwrap_err();
            flip(&mut answers[index].1, bit);
        }
    }
    // Chunks that are each right, in the wrong places.
    let swapped: Vec<_> = answers.iter().rev().map(|(reply, content)| (&reply[..], &content[..])).collect();
    fetched(bytes, hash, &swapped).unwrap_err();
    let parts: Vec<_> = answers.iter().map(|(reply, content)| (&reply[..], &content[..])).collect();
    assert!(fetched(bytes, hash, &parts).unwrap() == delta);
}
