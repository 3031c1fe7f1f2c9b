//! A metadata area in its real bytes at its real place, on a device that can grow: for what happens when
//! metadata has to move. Found again by the very code that a daemon runs.
//!
//! A write that is cut leaves each 4 KiB block old or new; a superblock, whose content stands in its first
//! 512 bytes, is not torn. The blocks of a log are initialised in their order.
use super::Rng;
use lockstep_replicator::core::event::MetaWrite;
use lockstep_replicator::meta::superblock::locate;
use lockstep_replicator::meta::{
    Attached, BITMAP_PAGE_BITS, BLOCK_BYTES, Block, Layout, MAGIC_CLEAN, MetaError, MetaKind, MetaPlace,
    Superblock, al_ring, flags,
};
use lockstep_replicator::units::{BITS_PER_AL_EXTENT, SECTORS_PER_BIT, SectorCount};
use std::collections::BTreeMap;

/// See the module.
#[derive(Clone, Debug)]
pub struct RealArea {
    kind: MetaKind,
    data_bytes: u64,
    meta_bytes: u64,
    /// Size of the data device when it was last attached.
    known_bytes: u64,
    /// By byte position; what was never written reads as ones, so that nobody mistakes it for clean.
    blocks: BTreeMap<u64, Block>,
    layout: Layout,
    measured: Option<(Layout, u64)>,
    /// Size of the data device that the place of metadata was measured with.
    placed_for: u64,
    left_behind: Option<u64>,
}

impl RealArea {
    /// Fresh metadata on devices of these sizes.
    ///
    /// # Panics
    /// They cannot carry metadata.
    #[must_use]
    pub fn new(kind: MetaKind, data_bytes: u64, meta_bytes: u64) -> Self {
        let layout = Layout::for_device(kind, data_bytes, meta_bytes, 1, 8);
        let layout = layout.expect("devices large enough for metadata");
        let mut area = Self {
            kind,
            data_bytes,
            meta_bytes,
            known_bytes: data_bytes,
            blocks: BTreeMap::new(),
            measured: None,
            placed_for: data_bytes,
            left_behind: None,
            layout,
        };
        area.apply(&MetaWrite::AlInit);
        area.apply(&MetaWrite::Superblock(Box::new(Superblock::created(&area.layout))));
        area
    }

    /// The devices have these sizes from now on.
    pub const fn grow(&mut self, data_bytes: u64, meta_bytes: u64) {
        self.data_bytes = data_bytes;
        self.meta_bytes = meta_bytes;
    }

    /// The data device has this size from now on, if that is more than it had. What it gains was in use before: where the
    /// metadata will lie stand a log without extents and a bitmap without bits.
    ///
    /// # Panics
    /// A device of this size cannot carry metadata.
    pub fn grow_stale(&mut self, data_bytes: u64) {
        let place = Layout::for_device(self.kind, data_bytes, self.meta_bytes, 1, 8);
        let place = place.expect("devices large enough for metadata");
        let log = (0..place.al_blocks()).map(|nr| (place.al_block_byte(nr), al_ring::initialised_block()));
        let pages = place.bitmap_bytes().div_ceil(BLOCK_BYTES as u64);
        let bitmap =
            (0..pages).map(|page| (place.bitmap_byte() + page * BLOCK_BYTES as u64, [0; BLOCK_BYTES]));
        let gained = log.chain(bitmap).filter(|(at, _)| *at >= self.data_bytes);
        self.blocks.extend(gained);
        self.data_bytes = self.data_bytes.max(data_bytes);
    }

    /// Size of the data device.
    #[must_use]
    pub const fn data_bytes(&self) -> u64 {
        self.data_bytes
    }

    /// The superblock that an attach would find, and where.
    #[must_use]
    pub fn located(&self) -> Option<(Superblock, Layout)> {
        let sizes = (self.data_bytes, self.meta_bytes);
        let read = |place| Ok::<_, MetaError>(self.block(place));
        locate(self.kind, sizes, Some(self.known_bytes), read).ok()
    }

    /// What an attach would find, before the log counts.
    #[must_use]
    pub fn found(&self) -> Option<Attached> {
        self.located().map(|(superblock, layout)| self.read_at(superblock, &layout))
    }

    /// An attach would find this block marked. What lies behind the size that the superblock names counts as changed.
    #[must_use]
    pub fn is_marked(&self, block: u64) -> bool {
        let Some((superblock, layout)) = self.located() else { return true };
        let page = block / BITMAP_PAGE_BITS;
        let bytes = self.block(layout.bitmap_byte() + page * BLOCK_BYTES as u64);
        let bit = usize::try_from(block % BITMAP_PAGE_BITS).unwrap_or(0);
        block >= superblock.la_size.0 / SECTORS_PER_BIT || bytes[bit / 8] >> (bit % 8) & 1 == 1
    }

    /// Usable sectors at the place where the metadata is now.
    #[must_use]
    pub const fn capacity(&self) -> SectorCount {
        self.layout.capacity()
    }

    /// What the devices hold now.
    pub fn measure(&mut self) -> Option<MetaPlace> {
        let layout = Layout::for_device(self.kind, self.data_bytes, self.meta_bytes, 1, 8).ok()?;
        let place = layout.place_for(&self.layout);
        self.measured = Some((layout, self.data_bytes));
        Some(place)
    }

    fn pieces(&self, write: &MetaWrite) -> Vec<(u64, Block)> {
        let whole = |bytes: &[u8]| {
            let mut block = [0; BLOCK_BYTES];
            block[..bytes.len()].copy_from_slice(bytes);
            block
        };
        match write {
            MetaWrite::Superblock(superblock) => {
                vec![(self.layout.superblock_byte(), superblock.encode())]
            }
            MetaWrite::AlTransaction(transaction) => {
                let block = transaction.encode().expect("the core writes transactions that fit");
                vec![(self.layout.al_block_byte(transaction.number), block)]
            }
            MetaWrite::AlInit => (0..self.layout.al_blocks())
                .map(|number| (self.layout.al_block_byte(number), al_ring::initialised_block()))
                .collect(),
            MetaWrite::Bitmap(pages) => pages
                .iter()
                .map(|page| {
                    let len = self.layout.bitmap_page_len(page.index);
                    assert!(len > 0, "bitmap page {} lies outside the area", page.index);
                    (self.layout.bitmap_page_byte(page.index), whole(&page.to_bytes()[..len]))
                })
                .collect(),
            MetaWrite::Relocate => Vec::new(),
            MetaWrite::ForgetOldPlace => {
                self.left_behind.map(|place| (place, [0; BLOCK_BYTES])).into_iter().collect()
            }
        }
    }

    fn moves(&mut self, write: &MetaWrite) {
        match write {
            MetaWrite::Relocate => {
                if let Some((layout, bytes)) = self.measured.take() {
                    self.placed_for = bytes;
                    self.left_behind = layout.left_behind(&self.layout);
                    self.layout = layout;
                }
            }
            MetaWrite::ForgetOldPlace => self.known_bytes = self.placed_for,
            MetaWrite::Superblock(_)
            | MetaWrite::AlTransaction(_)
            | MetaWrite::AlInit
            | MetaWrite::Bitmap(_) => {}
        }
    }

    /// A write is durable.
    pub fn apply(&mut self, write: &MetaWrite) {
        self.blocks.extend(self.pieces(write));
        self.moves(write);
    }

    /// The node stopped while this was being written.
    pub fn maybe_apply(&mut self, write: &MetaWrite, rng: &mut Rng) {
        if matches!(write, MetaWrite::ForgetOldPlace) {
            // The note is durable before the old place goes.
            self.known_bytes = self.placed_for;
        }
        let keep = [0, 50, 100][usize::try_from(rng.below(3)).unwrap_or(0)];
        for (place, block) in self.pieces(write) {
            if rng.percent(keep) {
                self.blocks.insert(place, block);
            }
        }
    }

    fn block(&self, place: u64) -> Block {
        self.blocks.get(&place).copied().unwrap_or([0xff; BLOCK_BYTES])
    }

    /// What an attach reads, with the code that a daemon runs; the area goes on from there.
    ///
    /// # Panics
    /// There is no valid metadata: the promise that a resize keeps it is broken.
    pub fn attach(&mut self) -> Attached {
        let (superblock, layout) = self.located().expect("metadata at the new place or at the old one");
        let mut attached = self.read_at(superblock, &layout);
        let present = Layout::for_device(self.kind, self.data_bytes, self.meta_bytes, 1, 8);
        let present = present.expect("devices large enough for metadata");
        let moves = present.superblock_byte() != layout.superblock_byte();
        self.layout = layout;
        if moves {
            self.move_to_end(&mut attached, present);
        }
        self.known_bytes = self.data_bytes;
        self.measured = None;
        self.left_behind = None;
        attached
    }

    /// What stands at a place.
    fn read_at(&self, superblock: Superblock, layout: &Layout) -> Attached {
        let mut log = Vec::new();
        for block in 0..u64::from(layout.al_blocks()) {
            log.extend_from_slice(&self.block(layout.al_byte() + block * BLOCK_BYTES as u64));
        }
        let replayed = if superblock.is_clean() { Ok(Vec::new()) } else { al_ring::replay(&log, layout) };
        let mut words = Vec::new();
        for page in 0..layout.bitmap_bytes().div_ceil(BLOCK_BYTES as u64) {
            let block = self.block(layout.bitmap_byte() + page * BLOCK_BYTES as u64);
            let chunks = block.chunks_exact(8);
            words.extend(chunks.map(|word| u64::from_le_bytes(word.try_into().unwrap_or([0xff; 8]))));
        }
        Attached {
            al_unusable: replayed.is_err(),
            hot_extents: replayed.unwrap_or_default(),
            bitmap: words,
            capacity: layout.capacity(),
            discard: true,
            logical_block_bytes: 512,
            superblock,
        }
    }

    /// The device grew while nobody had it: its metadata goes to the new end before it is taken, and the log, which
    /// does not move, into the bitmap (`backing/grown.rs`, where the cuts of this are tested).
    fn move_to_end(&mut self, attached: &mut Attached, to: Layout) {
        let was_primary = attached.superblock.flags & flags::PRIMARY_IND != 0;
        if attached.al_unusable && was_primary {
            attached.superblock.flags |= flags::FULL_SYNC;
        }
        attached.al_unusable = false;
        for extent in std::mem::take(&mut attached.hot_extents).into_iter().filter(|_| was_primary) {
            let first = u64::from(extent) * BITS_PER_AL_EXTENT / 64;
            for word in first..first + BITS_PER_AL_EXTENT / 64 {
                if let Some(word) = attached.bitmap.get_mut(usize::try_from(word).unwrap_or(usize::MAX)) {
                    *word = u64::MAX;
                }
            }
        }
        attached.bitmap.resize(usize::try_from(to.bitmap_bytes() / 8).unwrap_or(0), u64::MAX);
        attached.capacity = to.capacity();
        let superblock = &mut attached.superblock;
        superblock.md_size_sect = to.md_size_sect();
        superblock.al_offset = to.al_offset();
        superblock.bm_offset = to.bm_offset();
        superblock.flags |= flags::AL_CLEAN;
        superblock.magic = MAGIC_CLEAN;
        let left_behind = to.left_behind(&self.layout);
        self.layout = to;
        self.apply(&MetaWrite::AlInit);
        for (page, words) in (0..).zip(attached.bitmap.chunks(BLOCK_BYTES / 8)) {
            let mut block = [0; BLOCK_BYTES];
            for (bytes, word) in block.chunks_exact_mut(8).zip(words) {
                bytes.copy_from_slice(&word.to_le_bytes());
            }
            self.blocks.insert(self.layout.bitmap_page_byte(page), block);
        }
        self.blocks.insert(self.layout.superblock_byte(), attached.superblock.encode());
        self.blocks.extend(left_behind.map(|place| (place, [0; BLOCK_BYTES])));
    }
}
