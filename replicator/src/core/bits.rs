//! A plain vector of bits in 64-bit words, with the word-at-a-time operations the bitmap needs.
//!
//! `bitvec` cannot store `u64` words on 32-bit targets such as wasm32, and the words themselves are what
//! goes to the disk and to the peer.
use std::ops::Range;

/// See the module. Bits past the end are always clear.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Bits {
    words: Vec<u64>,
    len: usize,
}

/// The bits of word `word` that lie in `range`.
const fn mask(word: usize, range: &Range<usize>) -> u64 {
    let (first, end) = (word * 64, word * 64 + 64);
    let low = if range.start > first { u64::MAX << (range.start - first) } else { u64::MAX };
    let high = if range.end < end { !(u64::MAX << (range.end - first)) } else { u64::MAX };
    low & high
}

impl Bits {
    /// Takes words over; missing ones count as clear, bits past `len` are dropped.
    pub(super) fn from_words(mut words: Vec<u64>, len: usize) -> Self {
        words.resize(len.div_ceil(64), 0);
        let mut bits = Self { words, len };
        bits.clear_tail();
        bits
    }

    fn clear_tail(&mut self) {
        let tail = self.len % 64;
        if tail != 0
            && let Some(last) = self.words.last_mut()
        {
            *last &= !(u64::MAX << tail);
        }
    }

    pub(super) const fn len(&self) -> usize {
        self.len
    }

    pub(super) fn words(&self) -> &[u64] {
        &self.words
    }

    pub(super) fn get(&self, bit: usize) -> bool {
        bit < self.len && self.words[bit / 64] >> (bit % 64) & 1 == 1
    }

    /// Grows with clear bits, or shrinks.
    pub(super) fn resize(&mut self, len: usize) {
        self.words.resize(len.div_ceil(64), 0);
        self.len = len;
        self.clear_tail();
    }

    fn touched(range: &Range<usize>) -> Range<usize> {
        if range.is_empty() { 0..0 } else { range.start / 64..range.end.div_ceil(64) }
    }

    /// Set bits in the range, which lies inside.
    pub(super) fn count(&self, range: Range<usize>) -> u64 {
        Self::touched(&range).map(|at| u64::from((self.words[at] & mask(at, &range)).count_ones())).sum()
    }

    /// Whether any bit of the range is set.
    pub(super) fn any(&self, range: Range<usize>) -> bool {
        Self::touched(&range).any(|at| self.words[at] & mask(at, &range) != 0)
    }

    /// Sets the range, which lies inside; how many bits were clear.
    pub(super) fn set(&mut self, range: Range<usize>) -> u64 {
        let mut fresh = 0;
        for at in Self::touched(&range) {
            let wanted = mask(at, &range);
            fresh += u64::from((wanted & !self.words[at]).count_ones());
            self.words[at] |= wanted;
        }
        fresh
    }

    /// Clears the range, which lies inside; how many bits were set.
    pub(super) fn clear(&mut self, range: Range<usize>) -> u64 {
        let mut cleared = 0;
        for at in Self::touched(&range) {
            let wanted = mask(at, &range);
            cleared += u64::from((wanted & self.words[at]).count_ones());
            self.words[at] &= !wanted;
        }
        cleared
    }

    /// First set bit at or after `from`.
    pub(super) fn next_set(&self, from: usize) -> Option<usize> {
        self.find(from, self.len, |word| word)
    }

    /// First clear bit in `from..limit`.
    pub(super) fn next_clear(&self, from: usize, limit: usize) -> Option<usize> {
        self.find(from, limit.min(self.len), |word| !word)
    }

    fn find(&self, from: usize, limit: usize, view: impl Fn(u64) -> u64) -> Option<usize> {
        let range = from..limit;
        for at in Self::touched(&range) {
            let found = view(self.words[at]) & mask(at, &range);
            if found != 0 {
                return Some(at * 64 + found.trailing_zeros() as usize);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn words_at_a_time_equals_bit_by_bit(len in 1_usize..400, ops in proptest::collection::vec((any::<bool>(), 0_usize..400, 0_usize..200), 0..30), from in 0_usize..400) {
            let mut bits = Bits::default();
            bits.resize(len);
            let mut model = vec![false; len];
            for (on, start, count) in ops {
                let range = start.min(len)..(start + count).min(len);
                let differ = model[range.clone()].iter().filter(|bit| **bit != on).count() as u64;
                prop_assert_eq!(if on { bits.set(range.clone()) } else { bits.clear(range.clone()) }, differ);
                prop_assert_eq!(bits.any(range.clone()), on && !range.is_empty());
                model[range].fill(on);
            }
            let from = from.min(len);
            prop_assert_eq!(bits.next_set(from), (from..len).find(|at| model[*at]));
            prop_assert_eq!(bits.next_clear(from, len), (from..len).find(|at| !model[*at]));
            prop_assert_eq!(bits.count(from..len), model[from..].iter().filter(|bit| **bit).count() as u64);
            bits.resize(len / 2);
            bits.resize(len);
            prop_assert!(!bits.any(len / 2..len));
        }
    }
}
