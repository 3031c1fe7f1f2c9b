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
//!   stream before SyncUuid, so the target knows them before its first request (S01). Where both nodes have one
//!   generation, it completes when the target's bits came: those it sends when it is durably the older copy.
//! * In SyncSource a write is mirrored; when both copies are done both sides clear the blocks it covers.
//! * The source holds the range from before its read until the answer is in the stream, and no longer:
//!   what the application writes there afterwards is sent behind the answer. A mirrored write the target
//!   receives while its request is outstanding was therefore issued before the source's read: the target
//!   writes it at once, and the answer, which holds the same or newer data, waits for it. This is why the
//!   target locks on the answer and not on the request: no deadlock, and the application never waits for
//!   the network on behalf of a resync.
//! * A bit is cleared in memory by the ack for that very data, on disk only behind a flush (I4). A mark
//!   made after the data was read outlives its ack (`spoil`).
//!
//! Every kind of answer (data, "all zeroes", "same digest") ends the same way: the target clears its bits
//! and acks, the source clears its own by the ack.
mod exchange;
mod pause;
mod rate;
mod source;
mod target;
mod verify;

pub(super) use pause::Pauses;
pub(super) use rate::Foreground;
pub(super) use verify::{OvCheck, OvRead, Verify};

use super::Resource;
use super::device::Device;
use super::event::{BufferId, Digest, Event, HandlerName, HandlerToken, Output, SessionId, Severity};
use super::fault::Fault;
use super::handlers::Purpose;
use super::interval::LockOwner;
use super::metadata::{BitmapThen, SuperblockThen};
use super::request::range_of;
use super::state::{DiskState, ReplState};
use super::timer::Timer;
use crate::units::{BlockRange, Time};
use lockstep_proto::v1;

use rate::{Pace, TICK_MS};

/// Cleared bitmap pages are written at least this often.
const LAZY_BITMAP_MS: u64 = 2000;

/// A resync of one volume, from the decision to its end.
#[derive(Debug)]
pub(in crate::core) struct Resync {
    pub(in crate::core) source: bool,
    full: bool,
    /// Target: digests are compared before data is asked for.
    csums: bool,
    pub(in crate::core) started: Time,
    pub(in crate::core) bits_total: u64,
    pub(in crate::core) bits_failed: u64,
    /// Target: blocks of requests that failed as a whole; each is tried by itself.
    fine: std::ops::Range<u64>,
    /// Own bits are complete (full: set and durable) and were sent.
    sent_last: bool,
    peer_sent_last: bool,
    union_durable: bool,
    /// Target: what the source said at the start.
    sync_uuid: Option<v1::SyncUuid>,
    /// Target: next block to look at, and data asked for.
    cursor: u64,
    pub(in crate::core) pace: Pace,
    /// Target: what the source's application leaves to be in flight, 0 = no limit.
    source_window: u64,
    /// The operator's program that has to agree to the start.
    handler: Option<HandlerToken>,
    /// Blocks that turned out to be equal.
    pub(in crate::core) bits_same: u64,
    pub(in crate::core) paused_since: Option<Time>,
    pub(in crate::core) paused_ms: u64,
    finishing: bool,
    /// Target: nothing is left to copy, and these writes of the peer, counted by arrival, have to be done before this copy
    /// is good: what was copied may be newer than they are (I6).
    after_writes: Option<u64>,
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
    /// The digest of the target's data.
    digest: Option<Digest>,
    /// Marked since it was read: its ack clears nothing.
    spoiled: bool,
}

impl RsRead {
    /// A mark was made.
    pub(in crate::core) fn spoil(&mut self, range: BlockRange) {
        self.spoiled |= self.step != RsReadStep::Locking && self.range.overlaps(range);
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RsReadStep {
    Locking,
    Reading,
    /// Answered; the target's ack clears the bits.
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
    asked_at: Time,
    /// The digest of the own data was sent along.
    compared: bool,
    /// Marked since it was asked for: its end clears nothing.
    spoiled: bool,
    /// The application wrote into the range after the request was made: the reply may be older.
    stale: bool,
}

impl RsWrite {
    /// A mark was made.
    pub(in crate::core) fn spoil(&mut self, range: BlockRange) {
        self.spoiled |= self.range.overlaps(range);
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RsWriteStep {
    /// Reading the own data to compare it.
    Digesting,
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
        self.begin(volume, source, full, false, peer_disk);
    }

    /// Nothing should differ, but blocks are marked: their digests are compared, whatever `csums-alg`
    /// says, and what differs is copied from the source.
    pub(in crate::core) fn begin_compare(&mut self, volume: usize, source: bool, peer_disk: DiskState) {
        self.begin(volume, source, false, true, peer_disk);
    }

    fn begin(&mut self, volume: usize, source: bool, full: bool, compare: bool, peer_disk: DiskState) {
        self.settle_disk_for_resync(volume, source);
        let peer_is = match (source, peer_disk) {
            (true, DiskState::Inconsistent) => DiskState::Inconsistent,
            (true, _) => DiskState::Outdated,
            (false, _) => DiskState::UpToDate,
        };
        self.devices[volume].resync_nr += 1;
        let device = &self.devices[volume];
        let net = &self.cfg.net;
        let wanted = net.csums_alg.is_some() && (device.crashed_primary || !net.csums_after_crash_only);
        let csums = compare || wanted;
        let activity = device.foreground_sectors();
        let pace = Pace::new(&device.cfg.resync, net.max_buffers, self.now, 0, activity);
        self.devices[volume].resync = Some(Resync {
            source,
            full,
            csums,
            started: self.now,
            bits_total: 0,
            bits_failed: 0,
            fine: 0..0,
            sent_last: false,
            peer_sent_last: false,
            union_durable: false,
            sync_uuid: None,
            cursor: 0,
            pace,
            source_window: 0,
            handler: None,
            bits_same: 0,
            paused_since: None,
            paused_ms: 0,
            finishing: false,
            after_writes: None,
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
        } else if source {
            self.send_bitmap(volume);
        } else {
            // That this copy is the older one is durable before anybody's bits hold the other's (policy.rs).
            self.md_then(volume, SuperblockThen::SendBitmap);
        }
    }

    /// The target says that it is the older copy: its bits may be united with the source's.
    pub(in crate::core) fn target_recorded(&mut self, volume: usize) {
        let waits = |resync: &Resync| !resync.source && !resync.full && !resync.sent_last;
        if self.devices[volume].resync.as_ref().is_some_and(waits) {
            self.send_bitmap(volume);
        }
    }

    /// Both nodes have one generation, and the target has not said yet that its copy is the older one: were this node
    /// gone, that copy would be believed. What is noted and not sent is not told done before (I13).
    pub(in crate::core) fn target_untold(&self, volume: usize) -> bool {
        let device = &self.devices[volume];
        let untold = |resync: &Resync| resync.source && !resync.peer_sent_last;
        device.uuids.bitmap == 0 && device.resync.as_ref().is_some_and(untold)
    }

    /// Since when a target owes the word that writes are held back for.
    pub(in crate::core) fn target_untold_since(&self) -> Option<Time> {
        let holds = |volume: &usize| !self.devices[*volume].gated.is_empty() && self.target_untold(*volume);
        let since = |volume: usize| self.devices[volume].resync.as_ref().map(|resync| resync.started);
        (0..self.devices.len()).filter(holds).filter_map(since).min()
    }

    /// A fresh pace: blocks move from now on.
    fn start_pace(&mut self, volume: usize) {
        let device = &mut self.devices[volume];
        let (bits, activity) = (device.bitmap.count(), device.foreground_sectors());
        device.foreground.begin();
        if let Some(resync) = &mut device.resync {
            resync.bits_total = bits;
            resync.started = self.now;
            resync.lazy_at = self.now.plus_ms(LAZY_BITMAP_MS);
            resync.pace = Pace::new(&device.cfg.resync, self.cfg.net.max_buffers, self.now, bits, activity);
        }
        self.timers.set_if_idle(Timer::Resync, self.now.plus_ms(TICK_MS));
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
        // Also when the resync ended meanwhile: what was ordered or decided still holds.
        let device = &mut self.devices[volume];
        if device.full_sync && device.has_metadata() {
            let before = device.bitmap.count();
            device.bitmap.set_all();
            device.foreign_bits += device.bitmap.count() - before;
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
        let nr = self.devices[volume].nr;
        if let Some(resync) = self.devices[volume].resync.take() {
            let event = Event::ResyncDone {
                volume: nr,
                bits_total: resync.bits_total,
                bits_failed: resync.bits_failed,
                elapsed_ms: self.now.ms_since(resync.started),
            };
            self.event(event);
            if resync.bits_same > 0 {
                let (same, total) = (resync.bits_same, resync.bits_total.max(resync.bits_same));
                let text = format!(
                    "volume {}: {} % had equal checksums, eliminated: {}K; transferred {}K total {}K",
                    nr.0,
                    same * 100 / total,
                    same * 4,
                    (total - same) * 4,
                    total * 4
                );
                self.note(Severity::Info, text);
            }
            if !resync.source {
                self.run_handler(HandlerName::AfterResyncTarget, Some(nr), Purpose::Notice);
            }
        }
        self.set_repl(volume, ReplState::Established);
    }

    // ---- the operator's program before it ---------------------------------------------------------

    /// Asks the operator's program whether the resync may start.
    fn ask_before_resync(&mut self, volume: usize) {
        let nr = self.devices[volume].nr;
        let source = self.devices[volume].resync.as_ref().is_some_and(|resync| resync.source);
        let name = if source { HandlerName::BeforeResyncSource } else { HandlerName::BeforeResyncTarget };
        let token = self.run_handler(name, Some(nr), Purpose::BeforeResync(volume));
        if let Some(resync) = &mut self.devices[volume].resync {
            resync.handler = Some(token);
        }
    }

    /// It answered. Anything but 0 (3 is ignored on the source) ends the connection (SEM §19).
    pub(in crate::core) fn before_resync_answered(
        &mut self,
        volume: usize,
        token: HandlerToken,
        exit_code: Option<i32>,
    ) {
        let Some(resync) =
            self.devices[volume].resync.as_mut().filter(|resync| resync.handler == Some(token))
        else {
            return;
        };
        resync.handler = None;
        let source = resync.source;
        if exit_code == Some(0) || (source && exit_code == Some(3)) {
            return if source { self.source_begin(volume) } else { self.target_try_start(volume) };
        }
        let name = if source { "before-resync-source" } else { "before-resync-target" };
        let nr = self.devices[volume].nr;
        let text = format!(
            "volume {}: handler {name} did not agree to the resync; next: repair what it complains about, then drbdadm connect {}",
            nr.0, self.cfg.name
        );
        self.note(Severity::Error, text);
        self.go_stand_alone(&format!("handler {name} did not agree to the resync"));
    }

    /// A range became out of sync on the peer, which did not send it.
    pub(in crate::core) fn on_out_of_sync(&mut self, header: &v1::OutOfSync) {
        let place = self.wire_device(header.volume).zip(range_of(header.sector, header.nr_sectors));
        match place {
            Some((_, _)) if self.planted(Fault::NoteIgnored) => {}
            Some((volume, range)) if range.within(self.devices[volume].size) => {
                self.devices[volume].mark(range);
            }
            _ => self.protocol_error("an out-of-sync note outside the volume"),
        }
    }

    pub(in crate::core) fn on_resync_tick(&mut self) {
        let mut running = false;
        for volume in 0..self.devices.len() {
            let repl = self.devices[volume].repl;
            running |= repl.is_syncing() || repl.is_verifying();
            if repl.is_syncing() {
                self.resync_tick(volume);
                self.resync_target_go_on(volume);
            } else if repl.is_verifying() {
                self.verify_tick(volume);
            }
        }
        if running {
            self.timers.set(Timer::Resync, self.now.plus_ms(TICK_MS));
        }
    }

    fn resync_tick(&mut self, volume: usize) {
        let now = self.now;
        let device = &mut self.devices[volume];
        let (left, activity) = (device.bitmap.count(), device.foreground_sectors());
        let min_rate = device.cfg.resync.min_rate_kib_s;
        let Some(resync) = &mut device.resync else { return };
        resync.pace.tick(now, left, activity);
        device.foreground.tick(resync.pace.rate_kib_s(), min_rate);
        if now >= resync.lazy_at {
            resync.lazy_at = now.plus_ms(LAZY_BITMAP_MS);
            if device.bitmap.has_changed_pages() {
                self.write_bitmap(volume, BitmapThen::Nothing);
            }
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
        self.abort_verify(volume);
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
        });
        rs_writes.retain(|key, write| match write.step {
            RsWriteStep::Writing | RsWriteStep::Digesting => true,
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
            LockOwner::Request(_)
            | LockOwner::Peer(_)
            | LockOwner::VerifyAsk(_)
            | LockOwner::VerifyAnswer(_) => true,
        });
        for buffer in released {
            self.out.push_back(Output::Release(buffer));
        }
        self.run_granted(volume, granted);
    }
}
