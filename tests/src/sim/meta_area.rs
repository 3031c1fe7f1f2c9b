//! The metadata area of a simulated disk, in its real bytes: what an attach concludes from damage is
//! concluded by the very code that a daemon runs.
//!
//! | fault | what the promise says | here |
//! |---|---|---|
//! | a write cut short by a crash | each 512 bytes are old or new; the superblock's content is in the first 512 | [`MetaArea::maybe_apply`] |
//! | a write fails | the disk is given up | `Node::fail_metas` |
//! | a damaged log block that is not the newest | the log counts for nothing: every block changed | [`MetaArea::damage_log`] |
//! | an unreadable bitmap page | its blocks changed | [`MetaArea::damage_bitmap`] |
//! | an unreadable superblock | attach is refused; the disk is created anew | [`MetaArea::damage_superblock`] |
//!
//! Not covered, because the format has nothing to notice it with: damage to the newest log block, which looks
//! like a write that never got through, bits of the bitmap or of the superblock
//! that changed by themselves, and a superblock or bitmap write that the disk acked but never did. At most
//! one of these faults per disk between two healthy attaches.
use super::Rng;
use lockstep_replicator::core::event::MetaWrite;
use lockstep_replicator::meta::{
    Attached, BITMAP_PAGE_BITS, BITMAP_PAGE_BYTES, BLOCK_BYTES, Block, Layout, MetaKind, MetaPlace,
    Superblock, al_ring, bitmap_area, flags,
};
use lockstep_replicator::units::{SECTORS_PER_AL_EXTENT, SectorCount};

const WORDS_PER_PAGE: usize = BITMAP_PAGE_BYTES / 8;
const SECTOR: usize = 512;

/// What becomes of a metadata write in flight when its node stops, if a test decides it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetaFate {
    /// Nothing of it is there.
    Old,
    /// All of it is there.
    New,
    /// Each piece is there or not.
    Torn,
}

/// See the module. Every write is durable when answered.
#[derive(Clone, Debug)]
pub struct MetaArea {
    data_bytes: u64,
    meta_bytes: u64,
    layout: Layout,
    superblock: Box<Block>,
    ring: Vec<u8>,
    /// The words of all pages; a page on disk is their little-endian bytes.
    bitmap: Vec<u64>,
    unreadable_superblock: bool,
    unreadable_pages: Vec<usize>,
    /// What the log says, if that was asked since the log or the superblock last changed.
    hot: std::cell::OnceCell<Option<Vec<u32>>>,
    /// Something was damaged and not written since.
    pub damaged: bool,
    /// In place of all this: on devices that can grow.
    pub real: Option<super::real_area::RealArea>,
}

/// Old and new bytes of a block whose write was cut: each 512 bytes are one or the other.
fn tear(old: &mut [u8], new: &[u8], rng: &mut Rng) {
    let outcome = rng.below(4);
    for (old, new) in old.chunks_mut(SECTOR).zip(new.chunks(SECTOR)) {
        let take = match outcome {
            0 => false,
            1 => true,
            _ => rng.percent(50),
        };
        if take {
            old.copy_from_slice(new);
        }
    }
}

impl MetaArea {
    /// Fresh metadata for a disk of this size.
    ///
    /// # Panics
    /// The size is no size of a disk.
    #[must_use]
    pub fn new(sectors: u64) -> Self {
        let pages = sectors.div_ceil(8).div_ceil(BITMAP_PAGE_BITS);
        let data_bytes = sectors * 512;
        // No disk for metadata is smaller than this.
        let meta_bytes = ((9 + pages) * 4096).max(128 << 10);
        let layout = Layout::for_device(MetaKind::FlexExternal, data_bytes, meta_bytes, 1, 8);
        let layout = layout.expect("metadata of its own size");
        let words = usize::try_from(pages).unwrap_or(0) * WORDS_PER_PAGE;
        Self {
            data_bytes,
            meta_bytes,
            superblock: Box::new(Superblock::created(&layout).encode()),
            ring: al_ring::initialised_block().repeat(layout.al_blocks() as usize),
            bitmap: vec![u64::MAX; words],
            unreadable_superblock: false,
            unreadable_pages: Vec::new(),
            hot: std::cell::OnceCell::new(),
            damaged: false,
            real: None,
            layout,
        }
    }

    fn ring_block(&mut self, number: u32) -> &mut [u8] {
        let at = self.layout.al_block_index(number) as usize * BLOCK_BYTES;
        &mut self.ring[at..at + BLOCK_BYTES]
    }

    fn forget_hot(&mut self, write: &MetaWrite) {
        if !matches!(write, MetaWrite::Bitmap(_)) {
            self.hot.take();
        }
    }

    /// A write is durable.
    ///
    /// # Panics
    /// The core writes a transaction that no block holds.
    pub fn apply(&mut self, write: &MetaWrite) {
        self.forget_hot(write);
        if let Some(area) = &mut self.real {
            return area.apply(write);
        }
        match write {
            MetaWrite::Superblock(superblock) => {
                *self.superblock = superblock.encode();
                self.unreadable_superblock = false;
            }
            MetaWrite::AlTransaction(transaction) => {
                let block = transaction.encode().expect("the core writes transactions that fit");
                self.ring_block(transaction.number).copy_from_slice(&block);
            }
            MetaWrite::Relocate | MetaWrite::ForgetOldPlace => {}
            MetaWrite::AlInit => {
                self.ring = al_ring::initialised_block().repeat(self.layout.al_blocks() as usize);
                self.damaged = false;
            }
            MetaWrite::Bitmap(pages) => {
                for page in pages {
                    let first = page.index as usize * WORDS_PER_PAGE;
                    self.bitmap[first..first + WORDS_PER_PAGE].copy_from_slice(&page.words[..]);
                    self.unreadable_pages.retain(|index| *index != page.index as usize);
                }
            }
        }
    }

    /// The node stopped, or the disk failed, while this was being written.
    ///
    /// # Panics
    /// As [`Self::apply`].
    pub fn maybe_apply(&mut self, write: &MetaWrite, rng: &mut Rng) {
        self.forget_hot(write);
        if let Some(area) = &mut self.real {
            return area.maybe_apply(write, rng);
        }
        match write {
            MetaWrite::Superblock(superblock) => {
                tear(&mut self.superblock[..], &superblock.encode(), rng);
            }
            MetaWrite::AlTransaction(transaction) => {
                let block = transaction.encode().expect("the core writes transactions that fit");
                tear(self.ring_block(transaction.number), &block, rng);
            }
            MetaWrite::Relocate | MetaWrite::ForgetOldPlace => {}
            MetaWrite::AlInit => {
                // One after the other, as the daemon writes them; the last one may be torn.
                let whole = u32::try_from(rng.below(9)).unwrap_or(0);
                for number in 0..whole.min(self.layout.al_blocks()) {
                    self.ring_block(number).copy_from_slice(&al_ring::initialised_block());
                }
            }
            MetaWrite::Bitmap(pages) => {
                for page in pages {
                    let first = page.index as usize * WORDS_PER_PAGE;
                    let outcome = rng.below(4);
                    for piece in 0..BITMAP_PAGE_BYTES / SECTOR {
                        if outcome == 1 || outcome > 1 && rng.percent(50) {
                            let words = piece * SECTOR / 8..(piece + 1) * SECTOR / 8;
                            let place = first + words.start..first + words.end;
                            self.bitmap[place].copy_from_slice(&page.words[words]);
                        }
                    }
                }
            }
        }
    }

    /// The node stopped while this was being written, with this outcome.
    pub fn end_as(&mut self, write: &MetaWrite, fate: MetaFate, rng: &mut Rng) {
        match fate {
            MetaFate::Old => {}
            MetaFate::New => self.apply(write),
            MetaFate::Torn => {
                // A generator whose first draw tears, here (of 4) and in the real area (of 3).
                let mut torn = rng.clone();
                while torn.clone().below(4) < 2 || torn.clone().below(3) != 1 {
                    torn.next();
                }
                rng.next();
                self.maybe_apply(write, &mut torn);
            }
        }
    }

    /// One block of the log rots; not the newest, whose damage looks like a write that was cut short.
    pub fn damage_log(&mut self, rng: &mut Rng) -> bool {
        self.hot.take();
        for _ in 0..8 {
            let at = usize::try_from(rng.below(self.ring.len() as u64)).unwrap_or(0);
            let bit = 1 << rng.below(8);
            self.ring[at] ^= bit;
            if al_ring::replay(&self.ring, &self.layout).is_err() {
                self.damaged = true;
                return true;
            }
            self.ring[at] ^= bit;
        }
        false
    }

    /// One page of the bitmap cannot be read.
    pub fn damage_bitmap(&mut self, rng: &mut Rng) {
        let pages = self.bitmap.len() / WORDS_PER_PAGE;
        self.unreadable_pages.push(usize::try_from(rng.below(pages as u64)).unwrap_or(0));
        self.damaged = true;
    }

    /// The superblock cannot be read.
    pub fn damage_superblock(&mut self) {
        self.hot.take();
        self.unreadable_superblock = true;
        self.damaged = true;
    }

    /// What the devices hold now.
    pub fn measure(&mut self) -> Option<MetaPlace> {
        self.real.as_mut().and_then(super::real_area::RealArea::measure)
    }

    /// An attach would find something to use.
    #[must_use]
    pub fn is_usable(&self) -> bool {
        self.real.is_some() || self.superblock().is_some()
    }

    /// The superblock, if it can be read and makes sense.
    #[must_use]
    pub fn superblock(&self) -> Option<Superblock> {
        if let Some(area) = &self.real {
            return area.located().map(|(superblock, _)| superblock);
        }
        if self.unreadable_superblock {
            return None;
        }
        let superblock = Superblock::decode(&self.superblock, 0).ok()?;
        superblock.validate(MetaKind::FlexExternal, self.data_bytes, self.meta_bytes).ok()?;
        Some(superblock)
    }

    /// Changes the superblock by hand, as an operator's tool might.
    pub fn edit_superblock(&mut self, change: impl FnOnce(&mut Superblock)) {
        if let Some(mut superblock) = self.superblock() {
            self.hot.take();
            change(&mut superblock);
            *self.superblock = superblock.encode();
        }
    }

    /// Bits set on disk.
    #[must_use]
    pub fn bits(&self) -> u64 {
        self.bitmap.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// The words of the bitmap as an attach would have them.
    pub fn words(&self) -> impl Iterator<Item = u64> {
        self.bitmap.iter().enumerate().map(|(at, word)| {
            if self.unreadable_pages.contains(&(at / WORDS_PER_PAGE)) { u64::MAX } else { *word }
        })
    }

    /// Whether a block of 4 KiB is marked on disk.
    #[must_use]
    pub fn is_marked(&self, block: usize) -> bool {
        if let Some(area) = &self.real {
            return area.is_marked(block as u64);
        }
        let unreadable = self.unreadable_pages.contains(&(block / (WORDS_PER_PAGE * 64)));
        unreadable || self.bitmap.get(block / 64).is_none_or(|word| word >> (block % 64) & 1 == 1)
    }

    /// The extents an attach would take as changed; `None` = all of them.
    #[must_use]
    pub fn hot_extents(&self) -> Option<&[u32]> {
        self.hot.get_or_init(|| self.read_hot_extents()).as_deref()
    }

    fn read_hot_extents(&self) -> Option<Vec<u32>> {
        let superblock = self.superblock()?;
        if superblock.flags & (flags::PRIMARY_IND | flags::CRASHED_PRIMARY) == 0 {
            return Some(Vec::new());
        }
        // Careful: also when the disk was let go in good order since.
        if superblock.flags & flags::AL_DISABLED != 0 {
            return None;
        }
        if superblock.is_clean() {
            return Some(Vec::new());
        }
        if superblock.flags & flags::FULL_SYNC != 0 {
            return None;
        }
        match &self.real {
            Some(area) => area.found().filter(|found| !found.al_unusable).map(|found| found.hot_extents),
            None => al_ring::replay(&self.ring, &self.layout).ok(),
        }
    }

    /// What an attach reads, as the daemon does; `None` when it would refuse.
    pub fn attach(&mut self) -> Option<Attached> {
        if let Some(area) = &mut self.real {
            self.hot.take();
            return Some(area.attach());
        }
        let superblock = self.superblock()?;
        let (mut hot_extents, al_unusable) = if superblock.is_clean() {
            (Vec::new(), false)
        } else {
            match al_ring::replay(&self.ring, &self.layout) {
                Ok(hot) => (hot, false),
                Err(_) => (Vec::new(), superblock.flags & (flags::PRIMARY_IND | flags::CRASHED_PRIMARY) != 0),
            }
        };
        let capacity = self.layout.capacity();
        hot_extents.retain(|extent| u64::from(*extent) < capacity.0.div_ceil(SECTORS_PER_AL_EXTENT));
        let mut bitmap = self.bitmap.clone();
        for page in &self.unreadable_pages {
            bitmap[page * WORDS_PER_PAGE..(page + 1) * WORDS_PER_PAGE].fill(u64::MAX);
        }
        bitmap_area::mask_beyond(&mut bitmap, capacity.0.div_ceil(8));
        Some(Attached {
            superblock,
            hot_extents,
            al_unusable,
            bitmap,
            capacity: SectorCount(capacity.0),
            discard: true,
            logical_block_bytes: 512,
        })
    }
}
