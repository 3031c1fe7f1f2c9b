//! One volume: its disk state, identifiers, activity log, bitmap and range locks.
//!
//! A `Device` holds facts and small queries; the files named after procedures (`metadata.rs`,
//! `resync/`, `attach.rs`, …) change them as `impl Resource`.
use crate::core::activity_log::ActivityLog;
use crate::core::attach::DiskProcedure;
use crate::core::bitmap::Bitmap;
use crate::core::config::VolumeConfig;
use crate::core::congestion::Congestion;
use crate::core::event::HandlerToken;
use crate::core::interval::IntervalLocks;
use crate::core::metadata::{AlStep, BitmapJob, SuperblockThen};
use crate::core::repair::{Repair, Retry};
use crate::core::resync::{Foreground, OvCheck, OvRead, Pauses, Resync, RsRead, RsWrite, Verify};
use crate::core::state::{DiskState, ReplState};
use crate::core::uuid::UuidSet;
use crate::meta::Superblock;
use crate::units::{BlockRange, SECTORS_PER_BIT, SectorCount, Time, VolumeNr};
use std::collections::VecDeque;

/// Who waits for an activity-log transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AlUser {
    /// A write of the local application.
    Request(usize),
    /// A write of a diskless Primary peer.
    Peer(usize),
}

/// What is written to the peer for an application write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum MirrorMode {
    /// The data.
    Data,
    /// A note that the range is out of sync.
    Note,
    /// Nothing; the range is marked here.
    Nothing,
}

/// Why the peer may miss acknowledged writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum MayMiss {
    /// Some were only on their way to it (protocol A).
    Surely,
    /// Some were in its memory or cache only: another life than this one has forgotten them.
    IfNotAlive(u64),
}

/// Counters for `status`.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counters {
    pub(super) read_sectors: u64,
    pub(super) written_sectors: u64,
    pub(super) al_writes: u64,
    pub(super) bm_writes: u64,
    pub(super) sent_sectors: u64,
    pub(super) received_sectors: u64,
    /// Part of `written_sectors` that a resync wrote.
    pub(super) resync_sectors: u64,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Device {
    pub(super) cfg: VolumeConfig,
    pub(super) nr: VolumeNr,
    pub(super) disk: DiskState,
    /// The last stable disk state, which the superblock's flags describe while the disk is in transit.
    pub(super) md_disk: DiskState,
    pub(super) peer_disk: DiskState,
    /// What the peer itself said of its disk last; `peer_disk` may be our own conclusion.
    pub(super) peer_said: DiskState,
    pub(super) repl: ReplState,
    pub(super) uuids: UuidSet,
    /// Generation of the data a diskless Primary shows (SEM §9).
    pub(super) exposed_uuid: u64,
    /// The application was told of writes that only the peer's disk holds, maybe under the generation
    /// of our own: this disk alone is not what it was shown.
    pub(super) missed_writes: bool,
    /// While the own disk is being detached: the generation the peer went on to with writes that only it
    /// takes. The application is shown that one, whether the peer is there at the end or not.
    pub(super) went_on_at_peer: Option<u64>,
    /// The generation the application was shown last, while the one that follows is not durable: nothing
    /// was acknowledged under that one yet.
    pub(super) shown_before_gate: Option<u64>,
    /// The peer may miss writes that the application was told of. That counts when this disk, which has them, is
    /// gone before a new generation says so: until then the peer looks like as good a copy.
    pub(super) peer_may_miss: Option<MayMiss>,
    /// Agreed size; 0 when unknown.
    pub(super) size: SectorCount,
    /// Usable sectors of the own disk; 0 when diskless.
    pub(super) capacity: SectorCount,
    pub(super) peer_capacity: SectorCount,
    pub(super) discard: bool,
    pub(super) logical_block_bytes: u32,
    /// The superblock as found at attach: what is kept as it was. `None` when diskless.
    pub(super) found: Option<Superblock>,
    pub(super) crashed_primary: bool,
    pub(super) full_sync: bool,
    /// A resync from here was started under the current generation: the peer may have finished it,
    /// and be Primary under that generation, without our knowing.
    pub(super) peer_may_have_current: bool,
    /// Marks made here for a diskless Primary are not all durable: the log must count after a crash (I1).
    pub(super) keeps_books: bool,
    pub(super) bitmap: Bitmap,
    /// Bits that were set for a resync that has not ended: the peer's, or all. They say nothing of who
    /// changed more.
    pub(super) foreign_bits: u64,
    pub(super) al: Option<ActivityLog>,
    pub(super) al_waiters: VecDeque<AlUser>,
    pub(super) al_committing: Vec<AlUser>,
    pub(super) al_step: AlStep,
    /// The log lets nobody in: it is about to be made anew.
    pub(super) al_hold: bool,
    /// The size that the superblock still says, until the bits of a larger one are durable.
    pub(super) recorded_size: Option<SectorCount>,
    pub(super) locks: IntervalLocks,
    /// Data writes completed, and how many of them a completed flush covers.
    pub(super) writes_done: u64,
    pub(super) writes_flushed: u64,
    /// Data and metadata IO in flight on the own disk.
    pub(super) ios: u32,
    pub(super) md_generation: u64,
    pub(super) md_writing: Option<u64>,
    pub(super) md_durable: u64,
    pub(super) md_waiters: Vec<(u64, SuperblockThen)>,
    /// The next superblock write says "clean" (detach).
    pub(super) md_clean: bool,
    /// Completions wait until this superblock generation is durable (I2).
    pub(super) uuid_gate: Option<u64>,
    pub(super) gated: Vec<usize>,
    pub(super) bm_jobs: VecDeque<BitmapJob>,
    pub(super) bm_running: Option<BitmapJob>,
    /// Snapshot of the running job, until it is handed to the runtime.
    pub(super) bm_pages: Vec<crate::meta::BitmapPage>,
    pub(super) open_count: u32,
    pub(super) exported: Option<SectorCount>,
    pub(super) resync: Option<Resync>,
    /// Counts resyncs: what belongs to an earlier one proves nothing in this one.
    pub(super) resync_nr: u64,
    /// Resync reads served here, resync writes asked for here.
    pub(super) rs_reads: slab::Slab<RsRead>,
    pub(super) rs_writes: slab::Slab<RsWrite>,
    /// Who wants a resync to stand still.
    pub(super) pauses: Pauses,
    /// What the application's writes here feel of a resync.
    pub(super) foreground: Foreground,
    pub(super) verify: Option<Verify>,
    pub(super) ov_checks: slab::Slab<OvCheck>,
    pub(super) ov_reads: slab::Slab<OvRead>,
    /// A verify that the peer was asked for: from and to, sectors.
    pub(super) verify_wanted: Option<(u64, u64)>,
    /// Where an interrupted verify goes on, sectors.
    pub(super) verify_from: u64,
    pub(super) procedure: Option<DiskProcedure>,
    /// Sectors of mirrored writes without a barrier ack.
    pub(super) unacked_sectors: u64,
    pub(super) congestion: Congestion,
    /// UpToDate but for blocks that failed.
    pub(super) repair: Option<Repair>,
    /// When an Inconsistent disk asks to be repaired (again).
    pub(super) retry: Retry,
    /// Since when nobody waits for the IO that the own disk did not answer.
    pub(super) abandoned_at: Option<Time>,
    /// Diskless, but the disk that was given up still has IO of ours: it is not let go before that ends.
    pub(super) hung: bool,
    /// This Primary's disk is gone and the peer has not said that it knows.
    pub(super) untold_loss: bool,
    /// The operator's program that is run before anybody hears of the failed disk.
    pub(super) io_error_handler: Option<HandlerToken>,
    /// An ATTACH phase with the peer is running.
    pub(super) negotiating: bool,
    pub(super) counters: Counters,
}

impl Device {
    pub(super) fn new(cfg: VolumeConfig) -> Self {
        let nr = cfg.nr;
        Self {
            cfg,
            nr,
            disk: DiskState::Diskless,
            md_disk: DiskState::Diskless,
            peer_disk: DiskState::DUnknown,
            peer_said: DiskState::DUnknown,
            repl: ReplState::Off,
            uuids: UuidSet::default(),
            exposed_uuid: 0,
            missed_writes: false,
            went_on_at_peer: None,
            shown_before_gate: None,
            peer_may_miss: None,
            size: SectorCount(0),
            capacity: SectorCount(0),
            peer_capacity: SectorCount(0),
            discard: true,
            logical_block_bytes: 512,
            found: None,
            crashed_primary: false,
            full_sync: false,
            keeps_books: false,
            peer_may_have_current: false,
            bitmap: Bitmap::default(),
            foreign_bits: 0,
            al: None,
            al_waiters: VecDeque::new(),
            al_committing: Vec::new(),
            al_step: AlStep::Idle,
            al_hold: false,
            recorded_size: None,
            locks: IntervalLocks::default(),
            writes_done: 0,
            writes_flushed: 0,
            ios: 0,
            md_generation: 0,
            md_writing: None,
            md_durable: 0,
            md_waiters: Vec::new(),
            md_clean: false,
            uuid_gate: None,
            gated: Vec::new(),
            bm_jobs: VecDeque::new(),
            bm_running: None,
            bm_pages: Vec::new(),
            open_count: 0,
            exported: None,
            resync: None,
            resync_nr: 0,
            rs_reads: slab::Slab::new(),
            rs_writes: slab::Slab::new(),
            pauses: Pauses::default(),
            foreground: Foreground::default(),
            verify: None,
            ov_checks: slab::Slab::new(),
            ov_reads: slab::Slab::new(),
            verify_wanted: None,
            verify_from: 0,
            procedure: None,
            unacked_sectors: 0,
            congestion: Congestion::default(),
            repair: None,
            retry: Retry::default(),
            abandoned_at: None,
            hung: false,
            untold_loss: false,
            io_error_handler: None,
            negotiating: false,
            counters: Counters::default(),
        }
    }

    /// The own disk takes writes.
    pub(super) fn writable(&self) -> bool {
        match self.disk {
            DiskState::Inconsistent | DiskState::Outdated | DiskState::Consistent | DiskState::UpToDate => {
                true
            }
            DiskState::Diskless
            | DiskState::Attaching
            | DiskState::Detaching
            | DiskState::Failed
            | DiskState::Negotiating
            | DiskState::DUnknown => false,
        }
    }

    /// A backing disk is open and its metadata may be written.
    pub(super) fn has_metadata(&self) -> bool {
        self.found.is_some() && !matches!(self.disk, DiskState::Diskless | DiskState::Failed)
    }

    /// Whether `range` of the own disk may be shown to the application.
    pub(super) fn readable(&self, range: BlockRange) -> bool {
        match self.disk {
            DiskState::UpToDate => self.intact(range),
            // Blocks already proven equal to the peer's, while a resync runs (I7).
            DiskState::Inconsistent => {
                self.peer_disk == DiskState::UpToDate
                    && self.repl.is_sync_target()
                    && !self.bitmap.any(range.bits_touched())
            }
            DiskState::Diskless
            | DiskState::Attaching
            | DiskState::Detaching
            | DiskState::Failed
            | DiskState::Negotiating
            | DiskState::Outdated
            | DiskState::DUnknown
            | DiskState::Consistent => false,
        }
    }

    /// The peer is connected and its copy of this volume is good.
    pub(super) fn peer_readable(&self) -> bool {
        self.repl != ReplState::Off && self.peer_disk == DiskState::UpToDate
    }

    /// What an application write sends to the peer (SEM §7): for every state of a connected peer the
    /// write is either mirrored or marked, never nothing at all.
    pub(super) fn mirror_mode(&self) -> MirrorMode {
        let peer_has_disk = match self.peer_disk {
            DiskState::Inconsistent | DiskState::Outdated | DiskState::Consistent | DiskState::UpToDate => {
                true
            }
            DiskState::Diskless
            | DiskState::Attaching
            | DiskState::Detaching
            | DiskState::Failed
            | DiskState::Negotiating
            | DiskState::DUnknown => false,
        };
        if !peer_has_disk {
            return MirrorMode::Nothing;
        }
        match self.repl {
            ReplState::Off => MirrorMode::Nothing,
            ReplState::Established
            | ReplState::StartingSyncT
            | ReplState::WFBitMapT
            | ReplState::WFSyncUUID
            | ReplState::SyncSource
            | ReplState::SyncTarget
            | ReplState::VerifyS
            | ReplState::VerifyT
            | ReplState::PausedSyncS
            | ReplState::PausedSyncT
            | ReplState::Behind => MirrorMode::Data,
            ReplState::StartingSyncS | ReplState::WFBitMapS | ReplState::Ahead => MirrorMode::Note,
        }
    }

    /// Remembers why the peer may miss something; what is certain stays.
    pub(super) fn peer_missed(&mut self, missing: MayMiss) {
        if self.peer_may_miss != Some(MayMiss::Surely) {
            self.peer_may_miss = Some(missing);
        }
    }

    /// Marks a range as out of sync. A mark outlives the ack of resync data that was read or asked for
    /// before it.
    pub(super) fn mark(&mut self, range: BlockRange) {
        self.bitmap.set_range(range.bits_touched());
        for (_, read) in &mut self.rs_reads {
            read.spoil(range);
        }
        for (_, write) in &mut self.rs_writes {
            write.spoil(range);
        }
    }

    /// Sectors of application IO on this disk so far, own and mirrored.
    pub(super) const fn foreground_sectors(&self) -> u64 {
        (self.counters.read_sectors + self.counters.written_sectors)
            .saturating_sub(self.counters.resync_sectors)
    }

    /// Clears the blocks the range covers fully: both nodes hold the same data there.
    pub(super) fn unmark(&mut self, range: BlockRange) -> u64 {
        self.bitmap.clear_range(range.bits_covered(self.size))
    }

    /// Bits of the agreed size.
    pub(super) const fn nr_bits(size: SectorCount) -> u64 {
        size.0.div_ceil(SECTORS_PER_BIT)
    }
}
