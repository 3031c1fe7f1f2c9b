//! After a power cut at any logged write of a Primary: does its metadata cover every block in which the peer's disk may
//! differ?
//!
//! The peer's disk was recorded as well, and while both ran somebody noted again and again how long the two logs were.
//! Between two such notes the peer's disk went through known states; in one of them, the one at the moment of the cut,
//! every difference must be covered by the Primary's activity log and bitmap, or by the peer's bitmap.
use super::image::{Forget, Image, Marked, Undo};
use super::{LogError, WriteLog};
use std::collections::BTreeSet;
use std::ops::Range;

/// Notes on both sides of a cut that are left as room for what was on its way into a log when it was noted.
const MARGIN: usize = 2;

/// The recording.
#[derive(Debug)]
pub struct Recording {
    /// The Primary's disk.
    pub own: WriteLog,
    /// The peer's.
    pub peer: WriteLog,
    /// Lengths of both logs at the same moment, own first; ascending.
    pub notes: Vec<(usize, usize)>,
}

/// What was found after one cut.
#[derive(Clone, Debug)]
pub struct Cut {
    /// Entries of the own log that survived.
    pub own: usize,
    /// Entries of the peer's log at that moment.
    pub peer: usize,
    /// Blocks in which the disks differed.
    pub differing: usize,
    /// Blocks that a resync would look at.
    pub covered: u64,
    /// Extents that counted as hot.
    pub hot: usize,
    /// The cut fell on a flush.
    pub at_flush: bool,
    /// Differing blocks that only the peer's bitmap covers.
    pub by_peer: usize,
}

/// Why a cut is not survived.
#[derive(Debug)]
pub enum Failure {
    /// The recording cannot be read.
    Log(LogError),
    /// The metadata would be refused.
    Metadata {
        /// Entries of the own log that survived.
        own: usize,
        /// Why.
        why: String,
    },
    /// Blocks differ and nobody knows.
    Uncovered {
        /// Entries of the own log that survived.
        own: usize,
        /// States of the peer's disk that were tried.
        peer: Range<usize>,
        /// The best of them: entries of the peer's log, and the blocks.
        best: (usize, Vec<u64>),
    },
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Log(error) => write!(f, "{error}: {:?}", std::error::Error::source(error)),
            Self::Metadata { own, why } => write!(f, "cut after entry {own}: the metadata is refused: {why}"),
            Self::Uncovered { own, peer, best: (at, blocks) } => write!(
                f,
                "cut after entry {own}: {} blocks differ from the peer and are marked nowhere (peer after {at} of \
                 {peer:?} entries), first: {:?}",
                blocks.len(),
                blocks.iter().take(8).collect::<Vec<_>>()
            ),
        }
    }
}

impl std::error::Error for Failure {}

impl From<LogError> for Failure {
    fn from(error: LogError) -> Self {
        Self::Log(error)
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Self::Log(error.into())
    }
}

impl Recording {
    /// States that the peer's disk may have been in when the own log had `n` entries.
    #[must_use]
    pub fn bracket(&self, n: usize) -> Range<usize> {
        let after = self.notes.partition_point(|(own, _)| *own <= n);
        let low = after.checked_sub(1 + MARGIN).and_then(|at| self.notes.get(at)).map_or(0, |note| note.1);
        let high = self.notes.get(after + MARGIN).map_or(self.peer.entries().len(), |note| note.1);
        low..high.max(low)
    }

    /// Looks at every one of `cuts` (ascending); `files` are where the two disks are put together, `bytes` their size.
    ///
    /// # Errors
    /// The first cut that would not be survived.
    pub fn check(
        &self,
        files: [&str; 2],
        bytes: u64,
        cuts: &[usize],
        forget: Forget,
    ) -> Result<Vec<Cut>, Failure> {
        let [own, peer] = files;
        let mut pair = Pair {
            recording: self,
            own: Image::create(own, bytes)?,
            peer: Image::create(peer, bytes)?,
            differing: BTreeSet::new(),
        };
        cuts.iter().map(|cut| pair.cut(*cut, forget)).collect()
    }
}

/// Both disks, and where they differ.
struct Pair<'a> {
    recording: &'a Recording,
    own: Image,
    peer: Image,
    differing: BTreeSet<u64>,
}

impl Pair<'_> {
    fn cut(&mut self, n: usize, forget: Forget) -> Result<Cut, Failure> {
        let recording = self.recording;
        while self.own.applied() < n {
            let (touched, _) = self.own.step(&recording.own, false)?;
            self.compare(touched)?;
        }
        let bracket = recording.bracket(n);
        while self.peer.applied() < bracket.start {
            let (touched, _) = self.peer.step(&recording.peer, false)?;
            self.compare(touched)?;
        }
        let mut marked = self.own.metadata().map_err(|why| Failure::Metadata { own: n, why })?;
        marked.forget(forget);
        let last = n.checked_sub(1).and_then(|at| recording.own.entries().get(at));
        let mut found = Cut {
            own: n,
            peer: bracket.start,
            differing: 0,
            covered: marked.covered(marked.blocks()),
            hot: marked.hot.len(),
            at_flush: last.is_some_and(super::Entry::is_flush),
            by_peer: 0,
        };
        // From the earliest possible state of the peer's disk on, until one has no unknown difference.
        let (start, mut steps, mut best) =
            (self.peer.applied(), Vec::<Undo>::new(), None::<(usize, Vec<u64>)>);
        let verdict = loop {
            let (unknown, by_peer) = self.unknown(&marked);
            if unknown.is_empty() {
                found.peer = self.peer.applied();
                found.differing = self.differing.range(..marked.blocks()).count();
                found.by_peer = by_peer;
                break true;
            }
            if best.as_ref().is_none_or(|(_, blocks)| unknown.len() < blocks.len()) {
                best = Some((self.peer.applied(), unknown));
            }
            if self.peer.applied() >= bracket.end {
                break false;
            }
            let (touched, undo) = self.peer.step(&recording.peer, true)?;
            steps.extend(undo);
            self.compare(touched)?;
        };
        // The next cut may look at earlier states again.
        let touched: Vec<Range<u64>> = recording
            .peer
            .entries()
            .iter()
            .take(self.peer.applied())
            .skip(start)
            .filter(|entry| entry.changes())
            .map(|entry| entry.offset / 4096..(entry.offset + entry.len).div_ceil(4096))
            .collect();
        self.peer.back_to(start, steps)?;
        for blocks in touched {
            self.compare(blocks)?;
        }
        match (verdict, best) {
            (false, Some(best)) => Err(Failure::Uncovered { own: n, peer: bracket, best }),
            _ => Ok(found),
        }
    }

    /// Differing blocks that are marked nowhere, and how many only the peer knows of.
    fn unknown(&self, marked: &Marked) -> (Vec<u64>, usize) {
        let open: Vec<u64> = self
            .differing
            .iter()
            .copied()
            .filter(|block| *block < marked.blocks() && !marked.covers(*block))
            .collect();
        if open.is_empty() {
            return (open, 0);
        }
        let count = open.len();
        // A peer whose metadata is not there yet knows of nothing.
        let Ok(peer) = self.peer.metadata() else { return (open, 0) };
        let unknown: Vec<u64> = open.into_iter().filter(|block| !peer.covers(*block)).collect();
        let by_peer = count - unknown.len();
        (unknown, by_peer)
    }

    fn compare(&mut self, blocks: Range<u64>) -> Result<(), Failure> {
        for block in blocks {
            if self.own.same_block(&self.peer, block)? {
                self.differing.remove(&block);
            } else {
                self.differing.insert(block);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::Kind;
    use super::super::testing::{Scratch, log_of};
    use super::*;
    use lockstep_replicator::meta::{
        AlTransaction, Layout, MAGIC_UNCLEAN, MetaKind, Superblock, al_ring, flags,
    };
    use lockstep_replicator::units::SectorCount;

    const BYTES: u64 = 32 << 20;

    fn plain() -> Kind {
        Kind::Write { flush: false, fua: false }
    }

    /// A Primary's metadata with extent 0 hot and the bit of block 2000 set.
    fn metadata() -> Vec<(Kind, u64, Vec<u8>)> {
        let layout = Layout::for_device(MetaKind::Internal, BYTES, BYTES, 1, 8).unwrap();
        let mut superblock = Superblock::created(&layout);
        superblock.magic = MAGIC_UNCLEAN;
        superblock.flags = flags::CONSISTENT | flags::WAS_UP_TO_DATE | flags::PRIMARY_IND;
        superblock.la_size = SectorCount(layout.capacity().0);
        superblock.al_nr_extents = 67;
        let mut bitmap = vec![0_u8; 4096];
        bitmap[2000 / 8] = 1 << (2000 % 8);
        let mut entries = vec![(plain(), layout.superblock_byte(), superblock.encode().to_vec())];
        entries.push((plain(), layout.bitmap_byte(), bitmap));
        for number in 0..layout.al_blocks() {
            entries.push((plain(), layout.al_block_byte(number), al_ring::initialised_block().to_vec()));
        }
        let hot = AlTransaction {
            number: 0,
            updates: vec![(0, 0)],
            context_size: 67,
            context_start_slot: 0,
            context: vec![al_ring::FREE; 67],
        };
        entries.push((plain(), layout.al_block_byte(0), hot.encode().unwrap().to_vec()));
        entries
    }

    fn recording(
        scratch: &Scratch,
        own: &[(Kind, u64, Vec<u8>)],
        peer: &[(Kind, u64, Vec<u8>)],
        notes: Vec<(usize, usize)>,
    ) -> Recording {
        let open = |name: &str, entries: &[(Kind, u64, Vec<u8>)]| {
            WriteLog::open(&scratch.file(name, &log_of(entries))).unwrap()
        };
        Recording { own: open("own.log", own), peer: open("peer.log", peer), notes }
    }

    fn check(
        scratch: &Scratch,
        recording: &Recording,
        cuts: &[usize],
        forget: Forget,
    ) -> Result<Vec<Cut>, Failure> {
        let files = ["own.img", "peer.img"].map(|name| scratch.0.join(name).to_str().unwrap().to_owned());
        recording.check([&files[0], &files[1]], BYTES, cuts, forget)
    }

    #[test]
    fn marked_differences_are_fine_and_others_are_found() {
        let scratch = Scratch::new("coverage");
        let mut own = metadata();
        let base = own.len();
        own.push((plain(), 100 * 4096, vec![1; 4096]));
        own.push((plain(), 2000 * 4096, vec![2; 512]));
        own.push((plain(), 3000 * 4096, vec![3; 4096]));
        let none = recording(&scratch, &own, &[], vec![]);
        let cuts = check(&scratch, &none, &[base, base + 1, base + 2], Forget::Nothing).unwrap();
        assert_eq!(cuts.iter().map(|cut| cut.hot).collect::<Vec<_>>(), [1, 1, 1]);
        assert_eq!(cuts[2].covered, 1025);
        for (forget, blocks) in [(Forget::Log, vec![100]), (Forget::Bitmap, vec![2000])] {
            let cut = if forget == Forget::Log { base + 1 } else { base + 2 };
            match check(&scratch, &none, &[cut], forget) {
                Err(Failure::Uncovered { own, best: (0, found), .. }) => {
                    assert_eq!((own, found), (cut, blocks));
                }
                other => panic!("{other:?}"),
            }
        }
        match check(&scratch, &none, &[base + 2, base + 3], Forget::Nothing) {
            Err(Failure::Uncovered { best: (0, found), .. }) => assert_eq!(found, [3000]),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_state_of_the_peer_at_that_moment_is_found_and_left_again() {
        let scratch = Scratch::new("coverage-peer");
        let mut own = metadata();
        let base = own.len();
        own.push((plain(), 3000 * 4096, vec![3; 4096]));
        own.push((plain(), 3001 * 4096, vec![4; 4096]));
        // The peer has both only in the middle of its story.
        let peer = [
            (plain(), 3001 * 4096, vec![4; 4096]),
            (plain(), 3000 * 4096, vec![3; 4096]),
            (Kind::Discard, 3001 * 4096, vec![0; 4096]),
        ];
        let all = recording(&scratch, &own, &peer, vec![]);
        let cuts = check(&scratch, &all, &[base + 1, base + 2, base + 2], Forget::Nothing);
        let cuts = cuts.unwrap();
        assert_eq!(cuts.iter().map(|cut| cut.peer).collect::<Vec<_>>(), [3, 2, 2]);
        // Notes that place the cut elsewhere rule that moment out.
        let notes = vec![(base + 2, 0), (base + 2, 0), (base + 2, 0), (base + 2, 0), (base + 3, 1)];
        let placed = recording(&scratch, &own, &peer, [notes, vec![(base + 4, 1); 3]].concat());
        assert_eq!(placed.bracket(base + 2), 0..1);
        assert!(matches!(
            check(&scratch, &placed, &[base + 2], Forget::Nothing),
            Err(Failure::Uncovered { peer: Range { start: 0, end: 1 }, .. })
        ));
    }

    #[test]
    fn metadata_that_would_be_refused_is_a_failure() {
        let scratch = Scratch::new("coverage-refused");
        let none = recording(&scratch, &[(plain(), 0, vec![1; 512])], &[], vec![]);
        assert!(matches!(
            check(&scratch, &none, &[1], Forget::Nothing),
            Err(Failure::Metadata { own: 1, .. })
        ));
    }
}
