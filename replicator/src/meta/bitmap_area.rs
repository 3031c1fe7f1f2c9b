//! The bitmap on disk (DISK §8): a plain little-endian bit stream, one bit per 4 KiB of user data.
use crate::meta::{BITMAP_PAGE_BYTES, BitmapPage, Block};

impl BitmapPage {
    /// The 4096 bytes as they go to the disk.
    #[must_use]
    pub fn to_bytes(&self) -> Block {
        let mut bytes = [0; BITMAP_PAGE_BYTES];
        words_to_bytes(&*self.words, &mut bytes);
        bytes
    }

    /// The page in these bytes.
    #[must_use]
    pub fn from_bytes(index: u32, bytes: &Block) -> Self {
        let mut words = Box::new([0; BITMAP_PAGE_BYTES / 8]);
        bytes_to_words(bytes, &mut *words);
        Self { index, words }
    }
}

/// Stores words as bytes; the shorter of both ends the copy.
pub fn words_to_bytes(words: &[u64], bytes: &mut [u8]) {
    for (word, place) in words.iter().zip(bytes.as_chunks_mut::<8>().0) {
        *place = word.to_le_bytes();
    }
}

/// Reads words from bytes; the shorter of both ends the copy.
pub fn bytes_to_words(bytes: &[u8], words: &mut [u64]) {
    for (place, raw) in words.iter_mut().zip(bytes.as_chunks::<8>().0) {
        *place = u64::from_le_bytes(*raw);
    }
}

/// Clears what lies behind the first `bits` bits: other writers leave anything there.
pub fn mask_beyond(words: &mut [u64], bits: u64) {
    let whole = usize::try_from(bits / 64).unwrap_or(usize::MAX);
    let Some(tail) = words.get_mut(whole..) else { return };
    if let Some((edge, behind)) = tail.split_first_mut() {
        *edge &= (1u64 << (bits % 64)) - 1;
        behind.fill(0);
    }
}

/// Sets bits `first..first + count`, as far as there are words.
pub fn set_bits(words: &mut [u64], first: u64, count: u64) {
    let end = first.saturating_add(count).min((words.len() as u64).saturating_mul(64));
    let mut bit = first;
    while bit < end {
        let in_word = (64 - bit % 64).min(end - bit);
        let mask = (u64::MAX >> (64 - in_word)) << (bit % 64);
        if let Some(word) = usize::try_from(bit / 64).ok().and_then(|index| words.get_mut(index)) {
            *word |= mask;
        }
        bit += in_word;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn bit_order_of_the_format_sheet() {
        let mut bytes = [0; BITMAP_PAGE_BYTES];
        bytes[..8].copy_from_slice(&[1, 0, 0, 0, 0x20, 0, 0, 0x80]);
        let page = BitmapPage::from_bytes(3, &bytes);
        assert_eq!(page.words[0], 0x8000_0020_0000_0001);
        assert_eq!([0, 37, 63].map(|bit| page.words[0] >> bit & 1), [1; 3]);
        assert_eq!(page.to_bytes(), bytes);
    }

    #[test]
    fn bits_behind_the_end_are_cleared() {
        let mut words = [u64::MAX; 3];
        mask_beyond(&mut words, 65);
        assert_eq!(words, [u64::MAX, 1, 0]);
        mask_beyond(&mut words, 64);
        assert_eq!(words, [u64::MAX, 0, 0]);
        mask_beyond(&mut words, 192);
        mask_beyond(&mut words, u64::MAX);
        assert_eq!(words, [u64::MAX, 0, 0]);
    }

    proptest! {
        #[test]
        fn set_bits_sets_exactly_the_range(first in 0u64..300, count in 0u64..300) {
            let mut words = [0u64; 4];
            set_bits(&mut words, first, count);
            for bit in 0..256u64 {
                let is_set = words[usize::try_from(bit / 64).unwrap()] >> (bit % 64) & 1 == 1;
                prop_assert_eq!(is_set, bit >= first && bit < first + count);
            }
        }

        #[test]
        fn page_round_trip(seed: [u64; 8]) {
            let mut words = Box::new([0; BITMAP_PAGE_BYTES / 8]);
            for (index, word) in words.iter_mut().enumerate() {
                *word = seed[index % 8].rotate_left(u32::try_from(index).unwrap());
            }
            let page = BitmapPage { index: 9, words };
            prop_assert_eq!(BitmapPage::from_bytes(9, &page.to_bytes()), page);
        }
    }
}
