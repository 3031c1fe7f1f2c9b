//! Resync: bitmap exchange, source and target (SEM §11, §19; style 3.6).
//!
//! ```text
//! source: WFBitMapS --own bits, peer's bits, union durable--> new sync identifier durable --> SyncSource
//! target: WFBitMapT --union durable, SyncUuid--> durably Inconsistent --> SyncTarget --bits empty-->
//!         flush, pages, UpToDate durable --> ResyncFinished --> both Established
//! ```
//! Against application I/O:
//!
//! * In WFBitMapS a write is marked, announced and written locally only. All those notes stand in the
//!   stream before SyncUuid, so the target knows them before its first request (S01).
//! * In SyncSource a write is mirrored; when both copies are done both sides clear the blocks it covers.
//! * The source holds the range from its read to the target's ack, so nothing can be sent between. A
//!   mirrored write the target receives while its request is outstanding was therefore issued before
//!   the source's read: the target writes it at once, and the reply, which holds the same or newer data,
//!   waits for it. This is why the target locks on the reply and not on the request: no deadlock.
//! * A bit is cleared in memory by the ack for that very data, on disk only behind a flush (I4).
mod exchange;
mod source;
mod target;

use super::Resource;
use super::device::Device;
use super::event::{BufferId, Event, Output, SessionId};
use super::interval::LockOwner;
use super::metadata::{BitmapThen, SuperblockThen};
use super::request::range_of;
use super::state::{DiskState, ReplState};
use super::timer::Timer;
use crate::units::{BlockRange, Time};
use lockstep_proto::v1;

/// Data the target has asked for and not written yet, at most.
const WINDOW_SECTORS: u64 = 8 * 2048;
/// Between two looks at a running resync.
const TICK_MS: u64 = 100;
/// Cleared bitmap pages are written at least this often.
const LAZY_BITMAP_MS: u64 = 2000;

/// A resync of one volume, from the decision to its end.
#[derive(Debug)]
pub(in crate::core) struct Resync {
    pub(in crate::core) source: bool,
    full: bool,
    pub(in crate::core) started: Time,
    pub(in crate::core) bits_total: u64,
    pub(in crate::core) bits_failed: u64,
    /// Own bits are complete (full: set and durable) and were sent.
    sent_last: bool,
    peer_sent_last: bool,
    union_durable: bool,
    /// Target: what the source said at the start.
    sync_uuid: Option<v1::SyncUuid>,
    /// Target: next block to look at, and data asked for.
    cursor: u64,
    pub(in crate::core) in_flight_sectors: u64,
    budget_sectors: u64,
    finishing: bool,
    /// Source: the target is done.
    peer_finished: bool,
    lazy_at: Time,
}

/// A resync read on the source.
#[derive(Debug)]
pub(in crate::core) struct RsRead {
    session: SessionId,
    range: BlockRange,
    request: u64,
    step: RsReadStep,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RsReadStep {
    Locking,
    Reading,
    /// Sent; the range is held until the target's ack.
    Held,
    /// Sent by a source that is not Primary: nothing here can write the range but the target itself,
    /// whose writes must not wait for its own ack.
    Sent,
}

/// A resync write on the target.
#[derive(Debug)]
pub(in crate::core) struct RsWrite {
    session: SessionId,
    range: BlockRange,
    seq: u32,
    buffer: Option<BufferId>,
    step: RsWriteStep,
    /// The application wrote into the range after the request was made: the reply may be older.
    stale: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RsWriteStep {
    Requested,
    /// The reply is here, behind writes that have not started.
    Queued,
    Locking,
    Writing,
}

impl Resource {
    /// The decision is made: this node is source or target.
    pub(in crate::core) fn begin_resync(
        &mut self,
        volume: usize,
        source: bool,
        full: bool,
        peer_disk: DiskState,
    ) {
        self.settle_disk_for_resync(volume, source);
        let peer_is = match (source, peer_disk) {
            (true, DiskState::Inconsistent) => DiskState::Inconsistent,
            (true, _) => DiskState::Outdated,
            (false, _) => DiskState::UpToDate,
        };
        self.devices[volume].resync_nr += 1;
        self.devices[volume].resync = Some(Resync {
            source,
            full,
            started: self.now,
            bits_total: 0,
            bits_failed: 0,
            sent_last: false,
            peer_sent_last: false,
            union_durable: false,
            sync_uuid: None,
            cursor: 0,
            in_flight_sectors: 0,
            budget_sectors: 0,
            finishing: false,
            peer_finished: false,
            lazy_at: self.now,
        });
        self.set_repl(volume, if source { ReplState::WFBitMapS } else { ReplState::WFBitMapT });
        self.set_peer_disk_fact(volume, peer_is);
        if full {
            // Recorded first: a crash in between still means "everything".
            self.devices[volume].full_sync = true;
            self.md_touch(volume);
            self.md_then(volume, SuperblockThen::FullSyncRecorded);
        } else {
            self.send_bitmap(volume);
        }
    }

    fn settle_disk_for_resync(&mut self, volume: usize, source: bool) {
        let device = &self.devices[volume];
        let wanted = if source { DiskState::UpToDate } else { device.md_disk.min(DiskState::Outdated) };
        if device.disk != wanted {
            self.set_disk(volume, wanted);
            self.update_export(volume);
        }
    }

    pub(in crate::core) fn full_sync_recorded(&mut self, volume: usize) {
        if self.devices[volume].resync.as_ref().is_some_and(|resync| resync.full) {
            self.devices[volume].bitmap.set_all();
            self.write_bitmap(volume, BitmapThen::FullSync);
        }
    }

    /// All bits are set on disk: the flag that stood for them may go.
    pub(in crate::core) fn full_sync_written(&mut self, volume: usize) {
        if !self.devices[volume].has_metadata() {
            return;
        }
        self.devices[volume].full_sync = false;
        self.md_touch(volume);
        if self.devices[volume].resync.as_ref().is_some_and(|resync| resync.full && !resync.sent_last) {
            self.send_bitmap(volume);
        }
    }

    pub(in crate::core) fn resync_read_waits(&self, volume: usize, key: usize) -> bool {
        self.devices[volume].rs_reads.get(key).is_some_and(|read| read.step == RsReadStep::Locking)
    }

    pub(in crate::core) fn resync_write_waits(&self, volume: usize, key: usize) -> bool {
        self.devices[volume].rs_writes.get(key).is_some_and(|write| write.step == RsWriteStep::Locking)
    }

    fn end_resync(&mut self, volume: usize) {
        if let Some(resync) = self.devices[volume].resync.take() {
            let event = Event::ResyncDone {
                volume: self.devices[volume].nr,
                bits_total: resync.bits_total,
                bits_failed: resync.bits_failed,
                elapsed_ms: self.now.ms_since(resync.started),
            };
            self.event(event);
        }
        self.set_repl(volume, ReplState::Established);
    }

    /// A range became out of sync on the peer, which did not send it.
    pub(in crate::core) fn on_out_of_sync(&mut self, header: &v1::OutOfSync) {
        let place = self.wire_device(header.volume).zip(range_of(header.sector, header.nr_sectors));
        match place {
            Some((volume, range)) if range.within(self.devices[volume].size) => {
                self.devices[volume].mark(range);
            }
            _ => self.protocol_error("an out-of-sync note outside the volume"),
        }
    }

    pub(in crate::core) fn on_resync_tick(&mut self) {
        let mut running = false;
        for volume in 0..self.devices.len() {
            if !matches!(self.devices[volume].repl, ReplState::SyncSource | ReplState::SyncTarget) {
                continue;
            }
            running = true;
            self.refill_budget(volume);
            let now = self.now;
            let lazy = self.devices[volume].resync.as_mut().is_some_and(|resync| {
                let due = now >= resync.lazy_at;
                if due {
                    resync.lazy_at = now.plus_ms(LAZY_BITMAP_MS);
                }
                due
            });
            if lazy && self.devices[volume].bitmap.has_changed_pages() {
                self.write_bitmap(volume, BitmapThen::Nothing);
            }
            self.resync_target_go_on(volume);
        }
        if running {
            self.timers.set(Timer::Resync, self.now.plus_ms(TICK_MS));
        }
    }

    /// The own disk ended a resync: replication goes on as far as it can, and nobody waits for a start
    /// that will not come.
    pub(in crate::core) fn leave_resync_states(&mut self, volume: usize) {
        if self.devices[volume].repl > ReplState::Established {
            self.set_repl(volume, ReplState::Established);
        }
        self.release_hold();
    }

    fn release_hold(&mut self) {
        let wanted = self.devices.iter().any(|device| device.repl == ReplState::WFSyncUUID);
        if self.rx.hold && !wanted {
            self.rx.hold = false;
            self.drain_receive_queue();
        }
    }

    /// Ends a resync from outside (connection or disk lost). Bits stay; ranges in the middle of IO are
    /// let go when that IO is done.
    pub(in crate::core) fn abort_resync(&mut self, volume: usize) {
        let device = &mut self.devices[volume];
        device.resync = None;
        let mut granted = Vec::new();
        let mut released = Vec::new();
        let Device { locks, rs_reads, rs_writes, .. } = device;
        rs_reads.retain(|key, read| match read.step {
            RsReadStep::Reading => true,
            RsReadStep::Locking => {
                // An earlier step of this loop may have granted it already.
                if !locks.cancel(LockOwner::ResyncSource(key), &mut granted) {
                    locks.unlock(read.range, LockOwner::ResyncSource(key), &mut granted);
                }
                false
            }
            RsReadStep::Sent => false,
            RsReadStep::Held => {
                locks.unlock(read.range, LockOwner::ResyncSource(key), &mut granted);
                false
            }
        });
        rs_writes.retain(|key, write| match write.step {
            RsWriteStep::Writing => true,
            RsWriteStep::Requested => false,
            RsWriteStep::Queued => {
                released.extend(write.buffer);
                false
            }
            RsWriteStep::Locking => {
                if !locks.cancel(LockOwner::ResyncTarget(key), &mut granted) {
                    locks.unlock(write.range, LockOwner::ResyncTarget(key), &mut granted);
                }
                released.extend(write.buffer);
                false
            }
        });
        // Owners granted by one step may have been cancelled by a later one.
        granted.retain(|owner| match owner {
            LockOwner::ResyncSource(key) => rs_reads.contains(*key),
            LockOwner::ResyncTarget(key) => rs_writes.contains(*key),
            LockOwner::Request(_) | LockOwner::Peer(_) => true,
        });
        for buffer in released {
            self.out.push_back(Output::Release(buffer));
        }
        self.run_granted(volume, granted);
    }
}
