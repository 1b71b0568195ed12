//! Codes of 4 and 6 bits packed into bytes, the first code in the lowest bits.

/// Two 4-bit codes a byte: `codes[2i]` low, `codes[2i + 1]` high. An odd last code has zeros above it.
///
/// # Panics
/// When `packed` is not ceil(codes / 2) long.
#[inline(always)]
pub fn pack4(codes: &[u8], packed: &mut [u8]) {
    assert_eq!(packed.len(), codes.len().div_ceil(2), "two codes a byte");
    let (pairs, rest) = codes.as_chunks::<2>();
    for (byte, pair) in packed.iter_mut().zip(pairs) {
        let pair = u16::from_le_bytes(*pair) & 0x0f0f;
        *byte = (pair | pair >> 4) as u8;
    }
    if let (Some(byte), [code]) = (packed.last_mut(), rest) {
        *byte = code & 0x0f;
    }
}

/// The inverse of [`pack4`].
///
/// # Panics
/// When `packed` is not ceil(codes / 2) long.
#[inline(always)]
pub fn unpack4(packed: &[u8], codes: &mut [u8]) {
    assert_eq!(packed.len(), codes.len().div_ceil(2), "two codes a byte");
    let (pairs, rest) = codes.as_chunks_mut::<2>();
    for (pair, byte) in pairs.iter_mut().zip(packed) {
        let byte = u16::from(*byte);
        *pair = ((byte | byte << 4) & 0x0f0f).to_le_bytes();
    }
    if let ([code], Some(byte)) = (rest, packed.last()) {
        *code = byte & 0x0f;
    }
}

/// Four 6-bit codes in three bytes, little endian.
///
/// # Panics
/// When `codes` are not a multiple of 4, or `packed` is not 3/4 as long.
#[inline(always)]
pub fn pack6(codes: &[u8], packed: &mut [u8]) {
    assert_eq!(packed.len() * 4, codes.len() * 3, "four codes in three bytes");
    for (bytes, codes) in packed.as_chunks_mut::<3>().0.iter_mut().zip(codes.as_chunks::<4>().0) {
        let four = u32::from_le_bytes(*codes) & 0x3f3f_3f3f;
        let word = four & 0x3f | (four & 0x3f00) >> 2 | (four & 0x3f_0000) >> 4 | (four & 0x3f00_0000) >> 6;
        let [first, second, third, _] = word.to_le_bytes();
        *bytes = [first, second, third];
    }
}

/// The inverse of [`pack6`].
///
/// # Panics
/// When `codes` are not a multiple of 4, or `packed` is not 3/4 as long.
#[inline(always)]
pub fn unpack6(packed: &[u8], codes: &mut [u8]) {
    assert_eq!(packed.len() * 4, codes.len() * 3, "four codes in three bytes");
    for (bytes, codes) in packed.as_chunks::<3>().0.iter().zip(codes.as_chunks_mut::<4>().0) {
        let word = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], 0]);
        let four = word & 0x3f | (word << 2) & 0x3f00 | (word << 4) & 0x3f_0000 | (word << 6) & 0x3f00_0000;
        *codes = four.to_le_bytes();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_first_code_lies_in_the_lowest_bits() {
        let mut bytes = [0; 3];
        pack4(&[1, 2, 3, 4, 5], &mut bytes);
        assert_eq!(bytes, [0x21, 0x43, 0x05]);
        pack6(&[1, 2, 3, 4], &mut bytes);
        assert_eq!(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], 0]), 1 | 2 << 6 | 3 << 12 | 4 << 18);
    }

    proptest! {
        #[test]
        fn unpacking_gives_back_what_was_packed(codes in prop::collection::vec(0_u8..64, 0..100)) {
            let nibbles: Vec<u8> = codes.iter().map(|code| code & 0x0f).collect();
            let mut packed = vec![0; nibbles.len().div_ceil(2)];
            let mut unpacked = vec![0; nibbles.len()];
            pack4(&nibbles, &mut packed);
            unpack4(&packed, &mut unpacked);
            prop_assert_eq!(&unpacked, &nibbles);

            let fours = &codes[..codes.len() / 4 * 4];
            let mut packed = vec![0; fours.len() / 4 * 3];
            let mut unpacked = vec![0; fours.len()];
            pack6(fours, &mut packed);
            unpack6(&packed, &mut unpacked);
            prop_assert_eq!(&unpacked, fours);
        }
    }
}
