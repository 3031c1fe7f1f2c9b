//! The quick-sync bitmap: one bit per 4 KiB block, 1 = not proven equal on both nodes (SEM §11).
//!
//! Owns the bits in memory and which 4 KiB pages of them differ from the disk. Setting rounds outward,
//! clearing inward (`BlockRange::bits_touched`, `BlockRange::bits_covered`). A page counts as
//! changed until its snapshot was handed out; the caller reports a failed write by failing the disk.
use crate::core::bits::Bits;
use crate::meta::{BITMAP_PAGE_BITS, BITMAP_PAGE_BYTES, BitmapPage};
use std::ops::Range;

const WORDS_PER_PAGE: usize = BITMAP_PAGE_BYTES / 8;

/// See the module.
#[derive(Debug, Default)]
pub struct Bitmap {
    bits: Bits,
    set: u64,
    /// A bit per page.
    changed: Bits,
    nr_changed: usize,
}

impl Bitmap {
    /// A bitmap of `nr_bits`, all clear, taken as equal to the disk.
    #[must_use]
    pub fn new(nr_bits: u64) -> Self {
        let mut bitmap = Self::default();
        bitmap.resize(nr_bits, false);
        bitmap.nr_changed = 0;
        bitmap.changed = Bits::from_words(Vec::new(), bitmap.changed.len());
        bitmap
    }

    /// A bitmap of `nr_bits` as read from disk; missing words count as clear, bits past the end are ignored.
    #[must_use]
    pub fn from_words(words: Vec<u64>, nr_bits: u64) -> Self {
        let bits = Bits::from_words(words, index(nr_bits));
        let set = bits.count(0..bits.len());
        let changed = Bits::from_words(Vec::new(), page_count(bits.len()));
        Self { bits, set, changed, nr_changed: 0 }
    }

    /// Number of bits.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.bits.len() as u64
    }

    /// Whether it has no bits at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bits.len() == 0
    }

    /// Bits that are set.
    #[must_use]
    pub const fn count(&self) -> u64 {
        self.set
    }

    /// Whether any bit of the range is set.
    #[must_use]
    pub fn any(&self, range: Range<u64>) -> bool {
        self.set != 0 && self.bits.any(self.clip(range))
    }

    /// Sets the range (clipped to the end); says how many bits were clear before.
    pub fn set_range(&mut self, range: Range<u64>) -> u64 {
        let range = self.clip(range);
        let fresh = self.bits.set(range.clone());
        if fresh != 0 {
            self.set += fresh;
            self.mark_changed(range);
        }
        fresh
    }

    /// Clears the range (clipped to the end); says how many bits were set before.
    pub fn clear_range(&mut self, range: Range<u64>) -> u64 {
        if self.set == 0 {
            return 0;
        }
        let range = self.clip(range);
        let cleared = self.bits.clear(range.clone());
        if cleared != 0 {
            self.set -= cleared;
            self.mark_changed(range);
        }
        cleared
    }

    /// Sets every bit.
    pub fn set_all(&mut self) {
        self.set_range(0..self.len());
    }

    /// Clears every bit.
    pub fn clear_all(&mut self) {
        self.clear_range(0..self.len());
    }

    /// First set bit at or after `from`.
    #[must_use]
    pub fn next_set(&self, from: u64) -> Option<u64> {
        if self.set == 0 || from >= self.len() {
            return None;
        }
        self.bits.next_set(index(from)).map(|found| found as u64)
    }

    /// End of the run of set bits that starts at `from`, at most `limit`.
    #[must_use]
    pub fn run_end(&self, from: u64, limit: u64) -> u64 {
        let limit = limit.min(self.len());
        if from >= limit {
            return from;
        }
        self.bits.next_clear(index(from), index(limit)).map_or(limit, |clear| clear as u64)
    }

    /// Grows or shrinks; new bits are set if `set_new`.
    pub fn resize(&mut self, nr_bits: u64, set_new: bool) {
        let old = self.bits.len();
        let new = index(nr_bits);
        if new < old {
            self.set -= self.bits.count(new..old);
        }
        self.bits.resize(new);
        self.changed.resize(page_count(new));
        if new > old {
            if set_new {
                self.set += self.bits.set(old..new);
            }
            self.mark_changed(old..new);
        }
        self.nr_changed = index(self.changed.count(0..self.changed.len()));
    }

    /// The words from `first` on, at most `max`; for the bitmap exchange.
    #[must_use]
    pub fn words(&self, first: u64, max: usize) -> &[u64] {
        let raw = self.bits.words();
        let first = index(first).min(raw.len());
        let end = (first + max).min(raw.len());
        &raw[first..end]
    }

    /// Number of 64-bit words.
    #[must_use]
    pub fn nr_words(&self) -> u64 {
        self.bits.words().len() as u64
    }

    /// ORs words of the peer in; bits past the end are ignored. Says whether all words were inside.
    pub fn merge_words(&mut self, first: u64, words: impl Iterator<Item = u64>) -> bool {
        for (offset, word) in words.enumerate() {
            let Some(start) = first.checked_add(offset as u64).and_then(|w| w.checked_mul(64)) else {
                return false;
            };
            if start >= self.len() {
                return false;
            }
            let mut rest = word;
            while rest != 0 {
                let bit = u64::from(rest.trailing_zeros());
                let run = u64::from((!(rest >> bit)).trailing_zeros());
                self.set_range(start + bit..start + bit + run);
                rest = if bit + run >= 64 { 0 } else { rest >> (bit + run) << (bit + run) };
            }
        }
        true
    }

    /// Whether any page differs from the disk.
    #[must_use]
    pub const fn has_changed_pages(&self) -> bool {
        self.nr_changed != 0
    }

    /// Whether the page differs from the disk.
    #[must_use]
    pub fn page_changed(&self, page: u32) -> bool {
        self.changed.get(page as usize)
    }

    /// Snapshots of at most `max` changed pages, which from now on count as equal to the disk.
    pub fn take_changed_pages(&mut self, max: usize) -> Vec<BitmapPage> {
        let mut pages = Vec::new();
        while pages.len() < max && self.nr_changed != 0 {
            let Some(page) = self.changed.next_set(0) else { break };
            pages.extend(self.take_page(page));
        }
        pages
    }

    /// Snapshot of a page if it changed; it counts as equal to the disk from now on.
    pub fn take_changed_page(&mut self, page: u32) -> Option<BitmapPage> {
        if self.page_changed(page) { self.take_page(page as usize) } else { None }
    }

    fn take_page(&mut self, page: usize) -> Option<BitmapPage> {
        self.changed.clear(page..page + 1);
        self.nr_changed -= 1;
        let mut words = Box::new([0_u64; WORDS_PER_PAGE]);
        let raw = self.bits.words();
        let first = page * WORDS_PER_PAGE;
        let last = (first + WORDS_PER_PAGE).min(raw.len());
        words[..last - first].copy_from_slice(&raw[first..last]);
        Some(BitmapPage { index: u32::try_from(page).ok()?, words })
    }

    /// The disk holds none of it: every page counts as changed.
    pub fn rewrite(&mut self) {
        self.mark_changed(0..self.bits.len());
    }

    fn mark_changed(&mut self, bits: Range<usize>) {
        let page_bits = index(BITMAP_PAGE_BITS);
        for page in bits.start / page_bits..bits.end.div_ceil(page_bits) {
            self.nr_changed += index(self.changed.set(page..page + 1));
        }
    }

    fn clip(&self, range: Range<u64>) -> Range<usize> {
        let end = range.end.min(self.len());
        index(range.start.min(end))..index(end)
    }
}

fn page_count(nr_bits: usize) -> usize {
    nr_bits.div_ceil(index(BITMAP_PAGE_BITS))
}

/// Bit numbers stay far below 2^48 (1 PiB of data is 2^38 bits), so they fit wherever a bitmap can exist.
#[expect(
    clippy::cast_possible_truncation,
    reason = "a bitmap that large cannot be in memory on a 32-bit host"
)]
const fn index(bit: u64) -> usize {
    bit as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn counts_follow_sets_and_clears() {
        let mut map = Bitmap::new(100_000);
        assert_eq!(map.set_range(10..20), 10);
        assert_eq!(map.set_range(15..25), 5);
        assert_eq!(map.count(), 15);
        assert_eq!(map.clear_range(0..12), 2);
        assert_eq!(map.next_set(0), Some(12));
        assert_eq!(map.run_end(12, 1000), 25);
        assert_eq!(map.take_changed_pages(8).len(), 1);
        assert!(!map.has_changed_pages());
        map.set_range(BITMAP_PAGE_BITS - 1..BITMAP_PAGE_BITS + 1);
        assert!(map.page_changed(0) && map.page_changed(1));
        map.set_range(99_999..200_000);
        assert_eq!(map.next_set(99_000), Some(99_999));
    }

    #[test]
    fn growth_sets_only_the_new_area() {
        let mut map = Bitmap::new(10);
        map.resize(30, true);
        assert_eq!(map.count(), 20);
        assert_eq!(map.next_set(0), Some(10));
        map.resize(12, false);
        assert_eq!(map.count(), 2);
    }

    proptest! {
        #[test]
        fn merging_words_is_or(own in proptest::collection::vec(any::<u64>(), 1..40), peer in proptest::collection::vec(any::<u64>(), 1..40), cut in 0_u64..64) {
            let nr_bits = own.len() as u64 * 64 - cut;
            let mut map = Bitmap::from_words(own.clone(), nr_bits);
            let inside = map.merge_words(0, peer.iter().copied());
            prop_assert_eq!(inside, peer.len() <= own.len());
            let mut expected = 0_u64;
            for bit in 0..nr_bits {
                let word = (bit / 64) as usize;
                let of = |words: &[u64]| words.get(word).is_some_and(|w| w >> (bit % 64) & 1 == 1);
                let want = of(&own) || of(&peer);
                prop_assert_eq!(map.any(bit..bit + 1), want);
                expected += u64::from(want);
            }
            prop_assert_eq!(map.count(), expected);
        }

        #[test]
        fn a_reloaded_page_is_the_same(ranges in proptest::collection::vec((0_u64..70_000, 1_u64..500), 1..20)) {
            let mut map = Bitmap::new(70_001);
            for (start, len) in ranges { map.set_range(start..start + len); }
            let mut words = vec![0; 3 * WORDS_PER_PAGE];
            for page in map.take_changed_pages(usize::MAX) {
                let at = page.index as usize * WORDS_PER_PAGE;
                words[at..at + WORDS_PER_PAGE].copy_from_slice(&page.words[..]);
            }
            let again = Bitmap::from_words(words, 70_001);
            prop_assert_eq!(again.count(), map.count());
            prop_assert_eq!(again.words(0, usize::MAX), map.words(0, usize::MAX));
        }
    }
}
