//! A disk put together again from the entries of a log, and what lockstep's metadata on it says.
use super::{LogError, WriteLog};
use lockstep_replicator::meta::{
    BITMAP_PAGE_BYTES, BLOCK_BYTES, Block, Layout, MetaKind, Superblock, al_ring, bitmap_area, flags,
};
use lockstep_replicator::units::BITS_PER_AL_EXTENT;
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;

/// Bytes that one bit of the bitmap stands for.
pub const BIT_BYTES: u64 = 4096;

/// A sparse file that holds the first `applied` entries of a log.
#[derive(Debug)]
pub struct Image {
    file: File,
    bytes: u64,
    applied: usize,
}

/// What an entry overwrote.
#[derive(Debug)]
pub struct Undo {
    offset: u64,
    data: Vec<u8>,
}

impl Image {
    /// A fresh disk of zeroes.
    ///
    /// # Errors
    /// The file.
    pub fn create(path: &str, bytes: u64) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path)?;
        file.set_len(bytes)?;
        Ok(Self { file, bytes, applied: 0 })
    }

    /// How many entries it holds.
    #[must_use]
    pub const fn applied(&self) -> usize {
        self.applied
    }

    /// Applies the next entry; answers which 4 KiB blocks it touched, and how to undo it if `undo`.
    ///
    /// # Errors
    /// Image or log.
    pub fn step(&mut self, log: &WriteLog, undo: bool) -> Result<(Range<u64>, Option<Undo>), LogError> {
        let Some(entry) = log.entries().get(self.applied) else { return Ok((0..0, None)) };
        self.applied += 1;
        if !entry.changes() {
            return Ok((0..0, None));
        }
        let data = log.data(entry)?;
        let mut before = None;
        if undo {
            let mut old = vec![0; data.len()];
            self.file.read_exact_at(&mut old, entry.offset)?;
            before = Some(Undo { offset: entry.offset, data: old });
        }
        self.file.write_all_at(&data, entry.offset)?;
        Ok((entry.offset / BIT_BYTES..(entry.offset + entry.len).div_ceil(BIT_BYTES), before))
    }

    /// Applies entries until it holds `n`.
    ///
    /// # Errors
    /// Image or log.
    pub fn advance(&mut self, log: &WriteLog, n: usize) -> Result<(), LogError> {
        while self.applied < n.min(log.entries().len()) {
            self.step(log, false)?;
        }
        Ok(())
    }

    /// Takes steps back: what [`Self::step`] answered since it held `applied` entries, in that order.
    ///
    /// # Errors
    /// The file.
    pub fn back_to(&mut self, applied: usize, steps: Vec<Undo>) -> io::Result<()> {
        for undo in steps.into_iter().rev() {
            self.file.write_all_at(&undo.data, undo.offset)?;
        }
        self.applied = applied;
        Ok(())
    }

    /// Whether a 4 KiB block is the same here and there.
    ///
    /// # Errors
    /// A file.
    pub fn same_block(&self, other: &Self, block: u64) -> io::Result<bool> {
        let (mut a, mut b) = ([0; BLOCK_BYTES], [0; BLOCK_BYTES]);
        self.file.read_exact_at(&mut a, block * BIT_BYTES)?;
        other.file.read_exact_at(&mut b, block * BIT_BYTES)?;
        Ok(a == b)
    }

    /// What an attach would find.
    ///
    /// # Errors
    /// Metadata that it would refuse.
    pub fn metadata(&self) -> Result<Marked, String> {
        let failed = |what: &str, error: &dyn std::fmt::Display| format!("{what}: {error}");
        let position =
            MetaKind::Internal.superblock_position(self.bytes).map_err(|e| failed("superblock", &e))?;
        let mut block: Block = [0; BLOCK_BYTES];
        self.file.read_exact_at(&mut block, position).map_err(|e| failed("superblock", &e))?;
        let superblock = Superblock::decode(&block, position).map_err(|e| failed("superblock", &e))?;
        let layout = superblock
            .validate(MetaKind::Internal, self.bytes, self.bytes)
            .map_err(|e| failed("superblock", &e))?;
        let words = self.bitmap(&layout).map_err(|e| failed("bitmap", &e))?;
        let was_primary = superblock.flags & flags::PRIMARY_IND != 0;
        let mut all = superblock.flags & flags::FULL_SYNC != 0
            || (superblock.flags & flags::AL_DISABLED != 0 && was_primary);
        let mut hot = Vec::new();
        // The log speaks of a Primary's writes in flight; after a clean end it has nothing to say.
        if was_primary {
            match self.hot_extents(&layout) {
                Ok(found) => hot = found,
                Err(_) => all = true,
            }
        }
        Ok(Marked { superblock, words, hot, all })
    }

    fn bitmap(&self, layout: &Layout) -> io::Result<Vec<u64>> {
        let mut bytes = vec![0; usize::try_from(layout.bitmap_bytes()).map_err(io::Error::other)?];
        self.file.read_exact_at(&mut bytes, layout.bitmap_byte())?;
        let mut words = vec![0; bytes.len().div_ceil(BITMAP_PAGE_BYTES) * BITMAP_PAGE_BYTES / 8];
        bitmap_area::bytes_to_words(&bytes, &mut words);
        bitmap_area::mask_beyond(&mut words, layout.bitmap_bits());
        Ok(words)
    }

    fn hot_extents(&self, layout: &Layout) -> Result<Vec<u32>, String> {
        let mut area = vec![0; usize::try_from(layout.al_bytes()).map_err(|error| error.to_string())?];
        self.file.read_exact_at(&mut area, layout.al_byte()).map_err(|error| error.to_string())?;
        al_ring::replay(&area, layout).map_err(|damage| damage.to_string())
    }
}

/// What the metadata on a disk says of its blocks.
#[derive(Clone, Debug)]
pub struct Marked {
    /// As found.
    pub superblock: Superblock,
    words: Vec<u64>,
    /// Extents that count as changed.
    pub hot: Vec<u32>,
    /// Every block counts as changed.
    pub all: bool,
}

impl Marked {
    /// Whether a resync would copy or compare the block.
    #[must_use]
    pub fn covers(&self, block: u64) -> bool {
        self.all || self.has_bit(block) || self.is_hot(block)
    }

    /// Whether the block's bit is set.
    #[must_use]
    pub fn has_bit(&self, block: u64) -> bool {
        let word = usize::try_from(block / 64).ok().and_then(|index| self.words.get(index));
        word.is_some_and(|word| word >> (block % 64) & 1 == 1)
    }

    /// Whether the block is in a hot extent.
    #[must_use]
    pub fn is_hot(&self, block: u64) -> bool {
        u32::try_from(block / BITS_PER_AL_EXTENT).is_ok_and(|extent| self.hot.binary_search(&extent).is_ok())
    }

    /// Blocks that a resync would look at, of `blocks`.
    #[must_use]
    pub fn covered(&self, blocks: u64) -> u64 {
        (0..blocks).filter(|block| self.covers(*block)).count() as u64
    }

    /// Blocks of user data.
    #[must_use]
    pub const fn blocks(&self) -> u64 {
        self.superblock.la_size.0.div_ceil(8)
    }

    /// Forgets a part of what it says, to see that somebody misses it.
    pub fn forget(&mut self, what: Forget) {
        match what {
            Forget::Nothing => {}
            Forget::Log => self.hot.clear(),
            Forget::Bitmap => self.words.fill(0),
        }
    }
}

/// What a check leaves out on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forget {
    /// Nothing.
    Nothing,
    /// The activity log.
    Log,
    /// The bitmap.
    Bitmap,
}
