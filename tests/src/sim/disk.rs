//! A backing disk: data with a volatile cache, and the metadata area in its real terms.
//!
//! The content of a sector is one number: which write put it there (0 = zeroes).
use super::Rng;
use lockstep_replicator::core::event::MetaWrite;
use lockstep_replicator::meta::{
    AlTransaction, Attached, BITMAP_PAGE_BITS, BITMAP_PAGE_BYTES, MAGIC_UNCLEAN, MetaPlace, Superblock,
    UUID_JUST_CREATED,
};
use lockstep_replicator::units::{BlockRange, SectorCount};
use std::collections::BTreeSet;

/// Blocks in the activity-log ring.
const RING: usize = 8;
const WORDS_PER_PAGE: usize = BITMAP_PAGE_BYTES / 8;

#[derive(Clone, Debug)]
struct Unflushed {
    seq: u64,
    start: usize,
    content: Vec<u32>,
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Disk {
    /// What a read sees.
    now: Vec<u32>,
    stable: Vec<u32>,
    stable_seq: Vec<u64>,
    unflushed: Vec<Unflushed>,
    seq: u64,
    /// The metadata area.
    pub meta: MetaArea,
    /// Sectors written, for the minimality check.
    pub written_sectors: u64,
}

fn at(sector: u64) -> usize {
    usize::try_from(sector).unwrap_or(usize::MAX)
}

impl Disk {
    /// A zeroed disk with fresh metadata.
    #[must_use]
    pub fn new(sectors: u64) -> Self {
        Self {
            now: vec![0; at(sectors)],
            stable: vec![0; at(sectors)],
            stable_seq: vec![0; at(sectors)],
            unflushed: Vec::new(),
            seq: 0,
            meta: MetaArea::new(sectors),
            written_sectors: 0,
        }
    }

    /// All sectors as a read sees them.
    #[must_use]
    pub fn sectors(&self) -> &[u32] {
        &self.now
    }

    /// The device has this size from now on; new sectors hold zeroes.
    pub fn grow(&mut self, sectors: u64) {
        self.now.resize(at(sectors), 0);
        self.stable.resize(at(sectors), 0);
        self.stable_seq.resize(at(sectors), 0);
    }

    /// Sectors of a range as a read sees them.
    #[must_use]
    pub fn read(&self, range: BlockRange) -> Vec<u32> {
        self.now[at(range.start().0)..at(range.end().0)].to_vec()
    }

    /// A write completes; `durable` for FUA.
    pub fn write(&mut self, range: BlockRange, content: Vec<u32>, durable: bool) {
        self.seq += 1;
        let start = at(range.start().0);
        self.now[start..start + content.len()].copy_from_slice(&content);
        self.written_sectors += content.len() as u64;
        let write = Unflushed { seq: self.seq, start, content };
        if durable { self.settle(&write) } else { self.unflushed.push(write) }
    }

    /// What a flush submitted now will cover.
    #[must_use]
    pub const fn mark(&self) -> u64 {
        self.seq
    }

    /// A flush completes that was submitted at `mark`.
    pub fn flush(&mut self, mark: u64) {
        let all = std::mem::take(&mut self.unflushed);
        for write in all {
            if write.seq <= mark { self.settle(&write) } else { self.unflushed.push(write) }
        }
    }

    fn settle(&mut self, write: &Unflushed) {
        for (offset, value) in write.content.iter().enumerate() {
            let sector = write.start + offset;
            if self.stable_seq[sector] <= write.seq {
                self.stable[sector] = *value;
                self.stable_seq[sector] = write.seq;
            }
        }
    }

    /// A write in flight when the node stops: each block of it happened or not.
    pub fn maybe_write(&mut self, range: BlockRange, content: &[u32], rng: &mut Rng) {
        let start = at(range.start().0);
        self.seq += 1;
        let mut offset = 0;
        while offset < content.len() {
            let end = (offset + 8 - (start + offset) % 8).min(content.len());
            if rng.percent(50) {
                let piece = content[offset..end].to_vec();
                self.now[start + offset..start + end].copy_from_slice(&piece);
                self.unflushed.push(Unflushed { seq: self.seq, start: start + offset, content: piece });
            }
            offset = end;
        }
    }

    /// Power is cut: any part of what was not flushed is lost.
    pub fn lose_cache(&mut self, rng: &mut Rng) {
        let keep = [0, 30, 70, 100][at(rng.below(4))];
        for write in std::mem::take(&mut self.unflushed) {
            if rng.percent(keep) {
                self.settle(&write);
            }
        }
        self.now.clone_from(&self.stable);
    }
}

/// The metadata area; every write of it is durable when answered.
#[derive(Clone, Debug)]
pub struct MetaArea {
    /// The superblock.
    pub superblock: Superblock,
    ring: Vec<Option<AlTransaction>>,
    bitmap: Vec<u64>,
    capacity: u64,
    /// In its real bytes, on devices that can grow.
    pub real: Option<super::real_area::RealArea>,
}

impl MetaArea {
    fn new(sectors: u64) -> Self {
        let superblock = Superblock {
            la_size: SectorCount(0),
            uuid: [UUID_JUST_CREATED, 0, 0, 0],
            device_uuid: 0,
            flags: 0,
            magic: MAGIC_UNCLEAN,
            md_size_sect: 0,
            al_offset: 8,
            al_nr_extents: 67,
            bm_offset: 72,
            bm_bytes_per_bit: 4096,
            la_peer_max_bio_size: 0,
            al_stripes: 1,
            al_stripe_size_4k: 8,
        };
        let pages = at(sectors.div_ceil(8).div_ceil(BITMAP_PAGE_BITS));
        Self {
            superblock,
            ring: vec![None; RING],
            bitmap: vec![u64::MAX; pages * WORDS_PER_PAGE],
            capacity: sectors,
            real: None,
        }
    }

    /// A write is durable.
    pub fn apply(&mut self, write: &MetaWrite) {
        if let Some(area) = &mut self.real {
            return area.apply(write);
        }
        match write {
            MetaWrite::Superblock(superblock) => self.superblock = (**superblock).clone(),
            MetaWrite::AlTransaction(transaction) => {
                self.ring[transaction.number as usize % RING] = Some((**transaction).clone());
            }
            MetaWrite::AlInit => self.ring.fill(None),
            MetaWrite::Relocate | MetaWrite::ForgetOldPlace => {}
            MetaWrite::Bitmap(pages) => {
                for page in pages {
                    let first = page.index as usize * WORDS_PER_PAGE;
                    self.bitmap[first..first + WORDS_PER_PAGE].copy_from_slice(&page.words[..]);
                }
            }
        }
    }

    /// The node stopped while this was being written: old or new, per block.
    pub fn maybe_apply(&mut self, write: &MetaWrite, rng: &mut Rng) {
        if let Some(area) = &mut self.real {
            return area.maybe_apply(write, rng);
        }
        match write {
            MetaWrite::Relocate | MetaWrite::ForgetOldPlace => {}
            MetaWrite::Superblock(_) | MetaWrite::AlTransaction(_) => {
                if rng.percent(50) {
                    self.apply(write);
                }
            }
            MetaWrite::AlInit => {
                for block in &mut self.ring {
                    if rng.percent(50) {
                        *block = None;
                    }
                }
            }
            MetaWrite::Bitmap(pages) => {
                for page in pages {
                    if rng.percent(50) {
                        self.apply(&MetaWrite::Bitmap(vec![page.clone()]));
                    }
                }
            }
        }
    }

    /// What the devices hold now.
    pub fn measure(&mut self) -> Option<MetaPlace> {
        self.real.as_mut().and_then(super::real_area::RealArea::measure)
    }

    /// Bits set on disk.
    #[must_use]
    pub fn bits(&self) -> u64 {
        self.bitmap.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// What an attach reads (DISK 7.7).
    pub fn attach(&mut self) -> Attached {
        if let Some(area) = &mut self.real {
            return area.attach();
        }
        let mut blocks: Vec<&AlTransaction> = self.ring.iter().flatten().collect();
        blocks.sort_by_key(|block| block.number);
        let mut table = vec![u32::MAX; 65_534];
        for block in blocks {
            for (offset, extent) in block.context.iter().enumerate() {
                table[block.context_start_slot as usize + offset] = *extent;
            }
            for (slot, extent) in &block.updates {
                table[*slot as usize] = *extent;
            }
        }
        let hot: BTreeSet<u32> = table.into_iter().filter(|extent| *extent != u32::MAX).collect();
        Attached {
            superblock: self.superblock.clone(),
            hot_extents: hot.into_iter().collect(),
            al_unusable: false,
            bitmap: self.bitmap.clone(),
            capacity: SectorCount(self.capacity),
            discard: true,
            logical_block_bytes: 512,
        }
    }
}
