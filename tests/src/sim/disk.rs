//! A backing disk: data with a volatile cache. Its metadata area is in `meta_area.rs`.
//!
//! The content of a sector is one number: which write put it there (0 = zeroes).
//!
//! Fault model of the data area:
//! * a write that was answered is in a volatile cache until a flush that was submitted later is answered,
//!   or at once with FUA. A power cut loses any subset of what is there, whole writes or pieces of 512
//!   bytes or 4 KiB, in any order: nothing is ordered between two flushes;
//! * a write in flight when its node stops happened or not, piece by piece;
//! * reads, writes and flushes fail ([`Faults`]): the next so many, all of them until mended, or those that
//!   touch a bad range. A failed write may have happened in part. A failed flush promises nothing;
//! * an IO may take much longer than others, or stay open until the node dies.
//!
//! Not covered: data that changes by itself, data writes that were acked and never done or done elsewhere.
//! The two copies are then different without any of them knowing; that is what verify is for.
use super::Rng;
use super::blocks::Blocks;
use super::meta_area::MetaArea;
use lockstep_replicator::units::BlockRange;

/// A write in the cache.
#[derive(Clone, Debug)]
struct Unflushed {
    seq: u64,
    start: usize,
    content: Vec<u32>,
    /// The application write it is, 0 if none as a whole.
    tag: u32,
}

/// What goes wrong with the IO of a disk from now on.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    /// The next this many reads fail.
    pub reads: u32,
    /// See `reads`.
    pub writes: u32,
    /// See `reads`.
    pub flushes: u32,
    /// See `reads`.
    pub metas: u32,
    /// Everything fails until mended.
    pub dead: bool,
    /// Reads that touch this fail until mended or overwritten; writes too if the flag is set.
    pub bad: Option<(BlockRange, bool)>,
    /// The next IO takes this long, ns; `u64::MAX`: until the node stops.
    pub stick: Option<u64>,
    /// Flushes stay open until the node stops.
    pub stuck_flushes: bool,
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Disk {
    /// What a read sees.
    now: Vec<u32>,
    stable: Vec<u32>,
    stable_seq: Vec<u32>,
    unflushed: Vec<Unflushed>,
    seq: u64,
    /// The metadata area.
    pub meta: MetaArea,
    /// Faults to come.
    pub faults: Faults,
    /// Sectors written.
    pub written_sectors: u64,
    /// Blocks in which a read may see something else since these were last looked at.
    pub changed: Blocks,
    /// Blocks with other content, here or in `stable_sectors`, since the copies were last compared.
    pub uncompared: Blocks,
}

fn at(sector: u64) -> usize {
    usize::try_from(sector).unwrap_or(usize::MAX)
}

/// Ends of the pieces of `size` sectors that a range from `start` breaks into.
fn pieces(start: usize, len: usize, size: usize) -> impl Iterator<Item = (usize, usize)> {
    let mut offset = 0;
    std::iter::from_fn(move || {
        let from = offset;
        (from < len).then(|| {
            offset = (from + size - (start + from) % size).min(len);
            (from, offset)
        })
    })
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
            faults: Faults::default(),
            written_sectors: 0,
            changed: Blocks::none(sectors),
            uncompared: Blocks::none(sectors),
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
        self.changed.grow(sectors);
        self.uncompared.grow(sectors);
    }

    fn touch(&mut self, start: usize, len: usize) {
        self.changed.set_sectors(start, len);
        self.uncompared.set_sectors(start, len);
    }

    /// All sectors as they would be after a power cut that takes the whole cache.
    #[must_use]
    pub fn stable_sectors(&self) -> &[u32] {
        &self.stable
    }

    /// Blocks with something in the cache.
    #[must_use]
    pub fn volatile(&self) -> Blocks {
        let mut blocks = Blocks::none(self.now.len() as u64);
        for write in &self.unflushed {
            blocks.set_sectors(write.start, write.content.len());
        }
        blocks
    }

    /// Sectors of a range as a read sees them.
    #[must_use]
    pub fn read(&self, range: BlockRange) -> Vec<u32> {
        self.now[at(range.start().0)..at(range.end().0)].to_vec()
    }

    /// A write completes; `durable` for FUA. `tag`: the application write it is.
    pub fn write(&mut self, range: BlockRange, content: Vec<u32>, durable: bool, tag: u32) {
        self.seq += 1;
        let start = at(range.start().0);
        self.touch(start, content.len());
        self.now[start..start + content.len()].copy_from_slice(&content);
        self.written_sectors += content.len() as u64;
        let write = Unflushed { seq: self.seq, start, content, tag };
        if durable {
            settle(&mut self.stable, &mut self.stable_seq, &write);
        } else {
            self.unflushed.push(write);
        }
    }

    /// A sector changes without anybody writing it; a read finds `value` from now on.
    pub fn rot(&mut self, sector: u64, value: u32) {
        self.touch(at(sector), 1);
        self.now[at(sector)] = value;
        self.stable[at(sector)] = value;
    }

    /// What a flush submitted now will cover.
    #[must_use]
    pub const fn mark(&self) -> u64 {
        self.seq
    }

    /// A flush completes that was submitted at `mark`.
    pub fn flush(&mut self, mark: u64) {
        let (stable, seqs) = (&mut self.stable, &mut self.stable_seq);
        let uncompared = &mut self.uncompared;
        self.unflushed.retain(|write| {
            if write.seq <= mark {
                uncompared.set_sectors(write.start, write.content.len());
                settle(stable, seqs, write);
            }
            write.seq > mark
        });
    }

    /// A write in flight when the node stops, or one that failed: each piece of it happened or not.
    pub fn maybe_write(&mut self, range: BlockRange, content: &[u32], rng: &mut Rng) {
        let start = at(range.start().0);
        self.touch(start, content.len());
        self.seq += 1;
        let size = if rng.percent(30) { 1 } else { 8 };
        for (from, to) in pieces(start, content.len(), size) {
            if rng.percent(50) {
                let piece = content[from..to].to_vec();
                self.now[start + from..start + to].copy_from_slice(&piece);
                self.unflushed.push(Unflushed { seq: self.seq, start: start + from, content: piece, tag: 0 });
            }
        }
    }

    /// Power is cut: any part of what was not flushed is lost. The application writes that lost something.
    pub fn lose_cache(&mut self, rng: &mut Rng) -> Vec<u32> {
        let keep = [0, 30, 70, 100][at(rng.below(4))];
        let torn = rng.percent(40);
        let size = if rng.percent(30) { 1 } else { 8 };
        let mut lost = Vec::new();
        let writes = std::mem::take(&mut self.unflushed);
        for write in &writes {
            if torn && rng.percent(30) {
                for (from, to) in pieces(write.start, write.content.len(), size) {
                    if rng.percent(keep) {
                        let content = write.content[from..to].to_vec();
                        let piece = Unflushed { seq: write.seq, start: write.start + from, content, tag: 0 };
                        settle(&mut self.stable, &mut self.stable_seq, &piece);
                    }
                }
                lost.push(write.tag);
            } else if rng.percent(keep) {
                settle(&mut self.stable, &mut self.stable_seq, write);
            } else {
                lost.push(write.tag);
            }
        }
        for write in &writes {
            self.touch(write.start, write.content.len());
            let range = write.start..write.start + write.content.len();
            self.now[range.clone()].copy_from_slice(&self.stable[range]);
        }
        lost.retain(|tag| *tag != 0);
        lost
    }
}

fn settle(stable: &mut [u32], seqs: &mut [u32], write: &Unflushed) {
    let seq = u32::try_from(write.seq).unwrap_or(u32::MAX);
    for (offset, value) in write.content.iter().enumerate() {
        let sector = write.start + offset;
        if seqs[sector] <= seq {
            stable[sector] = *value;
            seqs[sector] = seq;
        }
    }
}
