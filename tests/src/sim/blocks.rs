//! Sets of 4 KiB blocks of one volume: what an oracle has to look at again.
//!
//! A check of a whole disk after each event costs more than the run it judges. So whoever changes something
//! says which blocks, and a check that found a block right takes it out until it changes again.

/// Sectors of a block.
pub const SECTORS_PER_BLOCK: usize = 8;

/// Blocks of one volume, one bit each.
#[derive(Clone, Debug, Default)]
pub struct Blocks(pub Vec<u64>);

impl Blocks {
    /// No block of a volume of this size.
    #[must_use]
    pub fn none(sectors: u64) -> Self {
        Self(vec![0; usize::try_from(sectors.div_ceil(8 * 64)).unwrap_or(0)])
    }

    /// Every block of a volume of this size.
    #[must_use]
    pub fn all(sectors: u64) -> Self {
        let mut all = Self::none(sectors);
        all.0.fill(u64::MAX);
        all
    }

    /// One more; outside of the volume: nothing.
    pub fn set(&mut self, block: usize) {
        if let Some(word) = self.0.get_mut(block / 64) {
            *word |= 1 << (block % 64);
        }
    }

    /// One less.
    pub fn clear(&mut self, block: usize) {
        if let Some(word) = self.0.get_mut(block / 64) {
            *word &= !(1 << (block % 64));
        }
    }

    /// All blocks that these sectors touch.
    pub fn set_sectors(&mut self, start: usize, len: usize) {
        if len == 0 {
            return;
        }
        let (first, last) = (start / SECTORS_PER_BLOCK, (start + len - 1) / SECTORS_PER_BLOCK);
        for at in first / 64..=last / 64 {
            let from = if at == first / 64 { first % 64 } else { 0 };
            let to = if at == last / 64 { last % 64 } else { 63 };
            if let Some(word) = self.0.get_mut(at) {
                *word |= (u64::MAX >> (63 - to)) & (u64::MAX << from);
            }
        }
    }

    /// It is in the set; what is outside of the volume always is.
    #[must_use]
    pub fn has(&self, block: usize) -> bool {
        self.0.get(block / 64).is_none_or(|word| word >> (block % 64) & 1 == 1)
    }

    /// There is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|word| *word == 0)
    }

    /// The volume has this size from now on.
    pub fn grow(&mut self, sectors: u64) {
        self.0.resize(Self::none(sectors).0.len().max(self.0.len()), 0);
    }

    /// Adds what the other one has.
    pub fn add(&mut self, other: &Self) {
        if self.0.len() < other.0.len() {
            self.0.resize(other.0.len(), 0);
        }
        for (word, other) in self.0.iter_mut().zip(&other.0) {
            *word |= other;
        }
    }

    /// Asks for each, in order, whether it stays.
    pub fn retain(&mut self, mut stays: impl FnMut(usize) -> bool) {
        for (at, word) in self.0.iter_mut().enumerate() {
            let mut left = *word;
            while left != 0 {
                let bit = left.trailing_zeros() as usize;
                left &= left - 1;
                if !stays(at * 64 + bit) {
                    *word &= !(1 << bit);
                }
            }
        }
    }

    /// In order.
    pub fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        self.0.iter().enumerate().flat_map(|(at, word)| {
            let mut left = *word;
            std::iter::from_fn(move || {
                (left != 0).then(|| {
                    let bit = left.trailing_zeros() as usize;
                    left &= left - 1;
                    at * 64 + bit
                })
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_of_sectors_is_all_blocks_it_touches_and_no_more() {
        for start in (0..1200).step_by(7) {
            for len in [0, 1, 7, 8, 9, 64, 511, 512, 513, 800] {
                let mut blocks = Blocks::none(4096);
                blocks.set_sectors(start, len);
                let wanted: Vec<usize> =
                    if len == 0 { Vec::new() } else { (start / 8..=(start + len - 1) / 8).collect() };
                assert_eq!(blocks.iter().collect::<Vec<_>>(), wanted, "{start} +{len}");
                for block in wanted {
                    assert!(blocks.has(block));
                    blocks.clear(block);
                    assert!(!blocks.has(block));
                }
                assert!(blocks.is_empty());
            }
        }
    }
}
