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
use super::device::Device;
use super::event::{BufferId, DiskOk, DiskOp, Event, IoError, Output, Payload, SessionId, Severity};
use super::interval::LockOwner;
use super::metadata::{BitmapThen, SuperblockThen};
use super::request::range_of;
use super::state::{ConnState, DiskState, ReplState, Role};
use super::timer::Timer;
use super::{IoContext, Resource};
use crate::units::{BlockRange, SECTORS_PER_BIT, Sector, SectorCount, Time};
use bytes::Bytes;
use lockstep_proto::{Message, limits, v1};

/// Data the target has asked for and not written yet, at most.
const WINDOW_SECTORS: u64 = 8 * 2048;
/// Between two looks at a running resync.
const TICK_MS: u64 = 100;
/// Cleared bitmap pages are written at least this often.
const LAZY_BITMAP_MS: u64 = 2000;

/// A resync of one volume, from the decision to its end.
#[derive(Debug)]
pub(super) struct Resync {
    pub(super) source: bool,
    full: bool,
    pub(super) started: Time,
    pub(super) bits_total: u64,
    pub(super) bits_failed: u64,
    /// Own bits are complete (full: set and durable) and were sent.
    sent_last: bool,
    peer_sent_last: bool,
    union_durable: bool,
    /// Target: what the source said at the start.
    sync_uuid: Option<v1::SyncUuid>,
    /// Target: next block to look at, and data asked for.
    cursor: u64,
    pub(super) in_flight_sectors: u64,
    budget_sectors: u64,
    finishing: bool,
    /// Source: the target is done.
    peer_finished: bool,
    lazy_at: Time,
}

/// A resync read on the source.
#[derive(Debug)]
pub(super) struct RsRead {
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
pub(super) struct RsWrite {
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
    Locking,
    Writing,
}

impl Resource {
    /// The decision is made: this node is source or target.
    pub(super) fn begin_resync(&mut self, volume: usize, source: bool, full: bool, peer_disk: DiskState) {
        self.settle_disk_for_resync(volume, source);
        let peer_is = match (source, peer_disk) {
            (true, DiskState::Inconsistent) => DiskState::Inconsistent,
            (true, _) => DiskState::Outdated,
            (false, _) => DiskState::UpToDate,
        };
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

    pub(super) fn full_sync_recorded(&mut self, volume: usize) {
        if self.devices[volume].resync.as_ref().is_some_and(|resync| resync.full) {
            self.devices[volume].bitmap.set_all();
            self.write_bitmap(volume, BitmapThen::FullSync);
        }
    }

    /// All bits are set on disk: the flag that stood for them may go.
    pub(super) fn full_sync_written(&mut self, volume: usize) {
        if !self.devices[volume].has_metadata() {
            return;
        }
        self.devices[volume].full_sync = false;
        self.md_touch(volume);
        if self.devices[volume].resync.as_ref().is_some_and(|resync| resync.full && !resync.sent_last) {
            self.send_bitmap(volume);
        }
    }

    /// Sends the own bits (nothing but the end mark when both know that all are set).
    fn send_bitmap(&mut self, volume: usize) {
        let number = u32::from(self.devices[volume].nr.0);
        let full = self.devices[volume].resync.as_ref().is_some_and(|resync| resync.full);
        let mut first = 0;
        while !full && first < self.devices[volume].bitmap.nr_words() {
            let words = self.devices[volume].bitmap.words(first, limits::MAX_BITMAP_WORDS);
            let count = words.len() as u64;
            // The peer ORs: what is all clear need not travel.
            if words.iter().any(|word| *word != 0) {
                let bytes: Bytes = words.iter().flat_map(|word| word.to_le_bytes()).collect();
                let header = v1::Bitmap { volume: number, first_word: first, last: false };
                self.send(Message::Bitmap(header), Payload::Bytes(bytes));
            }
            first += count.max(1);
        }
        let header = v1::Bitmap { volume: number, first_word: 0, last: true };
        self.send(Message::Bitmap(header), Payload::None);
        if let Some(resync) = &mut self.devices[volume].resync {
            resync.sent_last = true;
        }
        self.bitmaps_exchanged(volume);
    }

    pub(super) fn on_bitmap_message(&mut self, header: &v1::Bitmap, payload: Payload) {
        let Some(volume) = self.wire_device(header.volume) else {
            self.drop_payload(payload);
            return self.protocol_error("bitmap words for a volume this node does not have");
        };
        if self.devices[volume].resync.is_none() {
            return self.drop_payload(payload);
        }
        let waiting = self.devices[volume].resync.as_ref().is_some_and(|resync| !resync.peer_sent_last);
        if !waiting {
            self.drop_payload(payload);
            return self.protocol_error("bitmap words nobody waits for");
        }
        if let Payload::Bytes(bytes) = &payload {
            let words =
                bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap_or([0xff; 8])));
            if !self.devices[volume].bitmap.merge_words(header.first_word, words) {
                return self.protocol_error("bitmap words past the end of the volume");
            }
        }
        self.drop_payload(payload);
        if header.last {
            if let Some(resync) = &mut self.devices[volume].resync {
                resync.peer_sent_last = true;
            }
            self.bitmaps_exchanged(volume);
        }
    }

    /// Both bitmaps are united in memory: now on disk.
    fn bitmaps_exchanged(&mut self, volume: usize) {
        if self.devices[volume]
            .resync
            .as_ref()
            .is_some_and(|resync| resync.sent_last && resync.peer_sent_last)
        {
            self.write_bitmap(volume, BitmapThen::ResyncReady);
        }
    }

    pub(super) fn resync_bitmap_durable(&mut self, volume: usize) {
        let Some(resync) = &mut self.devices[volume].resync else { return };
        // The target starts behind the last mark announced to it: no page is left to write then.
        let target_waits = !resync.source && resync.sync_uuid.is_none();
        if resync.union_durable || target_waits || !resync.sent_last || !resync.peer_sent_last {
            return;
        }
        resync.union_durable = true;
        if resync.source {
            let random = self.random_uuid();
            self.devices[volume].uuids.start_as_source(random);
            self.md_touch(volume);
            self.md_then(volume, SuperblockThen::SourceStart);
        } else {
            self.target_try_start(volume);
        }
    }

    // ---- source -------------------------------------------------------------------------------

    /// The sync identifier is durable: the target may start.
    pub(super) fn source_started(&mut self, volume: usize) {
        let bits = self.devices[volume].bitmap.count();
        let now = self.now;
        match &mut self.devices[volume].resync {
            Some(resync) if resync.source && resync.union_durable => {
                resync.bits_total = bits;
                resync.started = now;
            }
            _ => return,
        }
        if self.devices[volume].repl != ReplState::WFBitMapS {
            return;
        }
        self.devices[volume].peer_may_have_current = true;
        let uuids = self.devices[volume].uuids;
        let header = v1::SyncUuid {
            volume: u32::from(self.devices[volume].nr.0),
            sync_uuid: uuids.bitmap,
            uuid_current: uuids.current,
            uuid_history_0: uuids.history[0],
            uuid_history_1: uuids.history[1],
        };
        self.send(Message::SyncUuid(header), Payload::None);
        self.set_repl(volume, ReplState::SyncSource);
        self.set_peer_disk_fact(volume, DiskState::Inconsistent);
        self.timers.set_if_idle(Timer::Resync, self.now.plus_ms(TICK_MS));
    }

    /// Stands behind the writes that the target, if it is Primary, sent before it.
    pub(super) fn on_rs_data_request(&mut self, header: &v1::BlockRequest) {
        let open: usize = self.devices.iter().map(|device| device.rs_reads.len()).sum();
        if open + self.nr_receive_queued() >= super::peer_request::MAX_PEER_READS {
            return self.protocol_error("more resync requests than the window allows");
        }
        if self.receive_must_queue() {
            self.queue_resync_read(header);
        } else {
            self.start_resync_read(header);
        }
    }

    pub(super) fn start_resync_read(&mut self, header: &v1::BlockRequest) {
        let place = self.wire_device(header.volume).zip(range_of(header.sector, header.nr_sectors));
        let Some((volume, range)) = place.filter(|(volume, range)| {
            range.within(self.devices[*volume].size) && range.len().0 <= limits::MAX_REQUEST_SECTORS
        }) else {
            return self.protocol_error("a resync request outside the volume");
        };
        if self.devices[volume].resync.is_none() {
            // The resync ended here and the peer has not heard of it yet.
            return;
        }
        if self.devices[volume].repl != ReplState::SyncSource {
            return self.protocol_error("a resync request, but this node is no source");
        }
        let Some(session) = self.session.as_ref().map(|session| session.id) else { return };
        let device = &mut self.devices[volume];
        let key = device.rs_reads.insert(RsRead {
            session,
            range,
            request: header.request,
            step: RsReadStep::Locking,
        });
        if device.locks.lock(range, LockOwner::ResyncSource(key)) {
            self.resync_read_locked(volume, key);
        }
    }

    pub(super) fn resync_read_waits(&self, volume: usize, key: usize) -> bool {
        self.devices[volume].rs_reads.get(key).is_some_and(|read| read.step == RsReadStep::Locking)
    }

    pub(super) fn resync_write_waits(&self, volume: usize, key: usize) -> bool {
        self.devices[volume].rs_writes.get(key).is_some_and(|write| write.step == RsWriteStep::Locking)
    }

    pub(super) fn resync_read_locked(&mut self, volume: usize, key: usize) {
        let read = &mut self.devices[volume].rs_reads[key];
        read.step = RsReadStep::Reading;
        let range = read.range;
        self.submit_io(volume, DiskOp::Read, Some(range), false, None, IoContext::ResyncRead { volume, key });
    }

    pub(super) fn on_resync_read_done(&mut self, volume: usize, key: usize, result: Result<DiskOk, IoError>) {
        self.devices[volume].ios -= 1;
        let RsRead { session, range, request, .. } = self.devices[volume].rs_reads[key];
        let current = self.session.as_ref().is_some_and(|now| now.id == session)
            && self.devices[volume].repl == ReplState::SyncSource;
        let number = u32::from(self.devices[volume].nr.0);
        let reply =
            v1::BlockReply { volume: number, sector: range.start().0, nr_sectors: range.len().0, request };
        match result {
            Ok(DiskOk { buffer, all_zero }) => {
                if current {
                    self.devices[volume].rs_reads[key].step = RsReadStep::Held;
                    match buffer {
                        Some(id) if !all_zero => {
                            self.devices[volume].counters.sent_sectors += range.len().0;
                            self.send(Message::RsDataReply(reply), Payload::Buffer { id, len: range.len() });
                        }
                        _ => self.send(Message::RsDeallocated(reply), Payload::None),
                    }
                }
                if let Some(id) = buffer {
                    self.out.push_back(Output::Release(id));
                }
                if current && self.role != Role::Primary && !self.md_primary {
                    self.devices[volume].rs_reads[key].step = RsReadStep::Sent;
                    self.unlock(volume, range, LockOwner::ResyncSource(key));
                }
            }
            Err(error) => {
                if current {
                    let ack = self.read_ack(volume, range, request);
                    self.send(Message::NegRsDReply(ack), Payload::None);
                }
                self.devices[volume].rs_reads.remove(key);
                self.unlock(volume, range, LockOwner::ResyncSource(key));
                self.on_local_io_error(volume, "a resync read from the local disk", Some(range), error);
                return;
            }
        }
        if !current {
            self.devices[volume].rs_reads.remove(key);
            self.unlock(volume, range, LockOwner::ResyncSource(key));
        }
    }

    /// The target wrote the range (or could not).
    pub(super) fn on_rs_write_ack(&mut self, header: &v1::BlockAck, written: bool) {
        let Some(volume) = self.wire_device(header.volume) else {
            return self.protocol_error("a resync answer for a volume this node does not have");
        };
        if !written && self.devices[volume].repl == ReplState::SyncTarget {
            return self.on_neg_rs_reply(volume, header);
        }
        let found = self.devices[volume]
            .rs_reads
            .iter()
            .find(|(_, read)| {
                read.request == header.request && matches!(read.step, RsReadStep::Held | RsReadStep::Sent)
            })
            .map(|(key, _)| key);
        let Some(key) = found else {
            if self.devices[volume].resync.is_none() {
                return;
            }
            return self.protocol_error("a resync answer nobody waits for");
        };
        let RsRead { range, step, .. } = self.devices[volume].rs_reads.remove(key);
        if written {
            self.devices[volume].unmark(range);
        }
        if step == RsReadStep::Held {
            self.unlock(volume, range, LockOwner::ResyncSource(key));
        }
    }

    pub(super) fn on_resync_finished(&mut self, header: &v1::ResyncFinished) {
        let Some(volume) = self.wire_device(header.volume) else { return };
        if self.devices[volume].resync.is_none() {
            return;
        }
        if self.devices[volume].repl != ReplState::SyncSource {
            return self.protocol_error("the end of a resync that is not running");
        }
        if header.failed_bits > 0 {
            if let Some(resync) = &mut self.devices[volume].resync {
                resync.bits_failed = header.failed_bits;
            }
            self.note(
                Severity::Error,
                format!(
                    "the peer could not take {} blocks of 4 KiB; its disk stays Inconsistent",
                    header.failed_bits
                ),
            );
            self.end_resync(volume);
            return;
        }
        if let Some(resync) = &mut self.devices[volume].resync {
            resync.peer_finished = true;
        }
        self.source_try_finish(volume);
    }

    /// The target is done; this side is when its own bits are gone too.
    pub(super) fn source_try_finish(&mut self, volume: usize) {
        let Some(resync) = &self.devices[volume].resync else { return };
        if !resync.source || !resync.peer_finished || resync.finishing {
            return;
        }
        if self.devices[volume].bitmap.count() != 0 {
            // A write acked as in sync whose local leg is still on the way clears its bits when it is done.
            if !self.in_sync_pending(volume) {
                let left = self.devices[volume].bitmap.count();
                self.drop_session(
                    ConnState::ProtocolError,
                    &format!("the peer says the resync is done, but {left} blocks are still marked here; starting over"),
                );
            }
            return;
        }
        if let Some(resync) = &mut self.devices[volume].resync {
            resync.finishing = true;
        }
        self.write_bitmap(volume, BitmapThen::SourceFinish);
    }

    pub(super) fn source_bitmap_durable(&mut self, volume: usize) {
        if !self.devices[volume].resync.as_ref().is_some_and(|resync| resync.source && resync.peer_finished) {
            return;
        }
        self.devices[volume].uuids.clear_bitmap();
        self.devices[volume].crashed_primary = false;
        self.md_touch(volume);
        self.set_peer_disk_fact(volume, DiskState::UpToDate);
        self.end_resync(volume);
    }

    // ---- target -------------------------------------------------------------------------------

    pub(super) fn on_sync_uuid(&mut self, header: &v1::SyncUuid) {
        let Some(volume) = self.wire_device(header.volume) else {
            return self.protocol_error("a resync of a volume this node does not have");
        };
        match &mut self.devices[volume].resync {
            Some(resync) if !resync.source && resync.sync_uuid.is_none() => resync.sync_uuid = Some(*header),
            // Ended here meanwhile.
            None => return,
            _ => return self.protocol_error("a resync nobody decided on"),
        }
        // From here on writes may come for a disk that still counts as consistent: they wait (I5).
        self.rx.hold = true;
        self.set_repl(volume, ReplState::WFSyncUUID);
        // Marks announced after the bitmaps were united are in memory only. The source forgets its own at
        // our unflushed ack, so a power loss here would leave them nowhere: on disk first (I1).
        self.write_bitmap(volume, BitmapThen::ResyncReady);
    }

    fn target_try_start(&mut self, volume: usize) {
        let Some(Resync { union_durable: true, sync_uuid: Some(start), .. }) = &self.devices[volume].resync
        else {
            return;
        };
        let sync_uuid = start.sync_uuid;
        let uuids = &mut self.devices[volume].uuids;
        uuids.current = sync_uuid;
        uuids.bitmap = 0;
        self.set_disk(volume, DiskState::Inconsistent);
        self.md_touch(volume);
        self.md_then(volume, SuperblockThen::TargetStart);
    }

    /// Durably Inconsistent: copying may begin.
    pub(super) fn target_started(&mut self, volume: usize) {
        let bits = self.devices[volume].bitmap.count();
        let now = self.now;
        match &mut self.devices[volume].resync {
            Some(resync) if !resync.source && resync.sync_uuid.is_some() => {
                resync.bits_total = bits;
                resync.started = now;
                resync.lazy_at = now.plus_ms(LAZY_BITMAP_MS);
            }
            _ => return,
        }
        self.set_repl(volume, ReplState::SyncTarget);
        self.release_hold();
        self.timers.set_if_idle(Timer::Resync, self.now.plus_ms(TICK_MS));
        self.refill_budget(volume);
        self.resync_target_go_on(volume);
    }

    fn refill_budget(&mut self, volume: usize) {
        let rate = self.devices[volume].cfg.resync_rate_kib_s;
        if let Some(resync) = &mut self.devices[volume].resync {
            resync.budget_sectors = match rate {
                Some(kib_s) => (kib_s * 2 * TICK_MS / 1000).max(SECTORS_PER_BIT),
                None => u64::MAX,
            };
        }
    }

    /// Asks for more, or ends.
    pub(super) fn resync_target_go_on(&mut self, volume: usize) {
        if self.devices[volume].repl != ReplState::SyncTarget {
            return;
        }
        let Some(session) = self.session.as_ref().map(|session| session.id) else { return };
        loop {
            let device = &mut self.devices[volume];
            let Some(resync) = &mut device.resync else { return };
            if resync.finishing {
                return;
            }
            let Some(bit) = device.bitmap.next_set(resync.cursor) else {
                if resync.in_flight_sectors != 0 {
                    return;
                }
                if device.bitmap.count() <= resync.bits_failed {
                    return self.target_finish(volume);
                }
                // Blocks were marked behind the cursor: another pass (S09).
                resync.cursor = 0;
                resync.bits_failed = 0;
                continue;
            };
            if resync.in_flight_sectors >= WINDOW_SECTORS || resync.budget_sectors == 0 {
                return;
            }
            let bits_per_request = limits::MAX_REQUEST_SECTORS / SECTORS_PER_BIT;
            // Natural alignment: a request never crosses a multiple of the largest request.
            let limit = (bit / bits_per_request + 1) * bits_per_request;
            let end = device.bitmap.run_end(bit, limit);
            let first = bit * SECTORS_PER_BIT;
            let last = (end * SECTORS_PER_BIT).min(device.size.0);
            let Some(range) = BlockRange::new(Sector(first), SectorCount(last.saturating_sub(first))) else {
                resync.cursor = end;
                continue;
            };
            resync.cursor = end;
            resync.in_flight_sectors += range.len().0;
            if resync.budget_sectors != u64::MAX {
                resync.budget_sectors = resync.budget_sectors.saturating_sub(range.len().0);
            }
            self.next_seq = self.next_seq.wrapping_add(1);
            let write = RsWrite {
                session,
                range,
                seq: self.next_seq,
                buffer: None,
                step: RsWriteStep::Requested,
                stale: false,
            };
            let key = device.rs_writes.insert(write);
            let header = v1::BlockRequest {
                volume: u32::from(device.nr.0),
                sector: range.start().0,
                nr_sectors: range.len().0,
                request: (u64::from(self.next_seq) << 32) | (key as u64 & 0xffff_ffff),
            };
            self.send(Message::RsDataRequest(header), Payload::None);
        }
    }

    fn find_rs_write(&self, volume: usize, wire: u64, range: BlockRange) -> Option<usize> {
        let key = usize::try_from(wire & 0xffff_ffff).ok()?;
        let write = self.devices[volume].rs_writes.get(key)?;
        (u64::from(write.seq) == wire >> 32 && write.range == range && write.step == RsWriteStep::Requested)
            .then_some(key)
    }

    #[expect(clippy::needless_pass_by_value, reason = "who takes a payload takes the count of its buffer")]
    pub(super) fn on_rs_data_reply(&mut self, header: &v1::BlockReply, payload: Payload) {
        let Payload::Buffer { id, len } = payload else {
            return self.protocol_error("resync data without data");
        };
        let place = self.wire_device(header.volume).zip(range_of(header.sector, len.0));
        let key = place.and_then(|(volume, range)| self.find_rs_write(volume, header.request, range));
        let (Some((volume, range)), Some(key)) = (place, key) else {
            self.out.push_back(Output::Release(id));
            return self.unexpected_resync_reply(header.volume);
        };
        self.devices[volume].counters.received_sectors += len.0;
        self.devices[volume].rs_writes[key].buffer = Some(id);
        self.lock_rs_write(volume, range, key);
    }

    pub(super) fn on_rs_deallocated(&mut self, header: &v1::BlockReply) {
        let place = self.wire_device(header.volume).zip(range_of(header.sector, header.nr_sectors));
        let key = place.and_then(|(volume, range)| self.find_rs_write(volume, header.request, range));
        let (Some((volume, range)), Some(key)) = (place, key) else {
            return self.unexpected_resync_reply(header.volume);
        };
        self.lock_rs_write(volume, range, key);
    }

    /// An answer to a request that is not open: broken protocol, unless our own resync just ended.
    fn unexpected_resync_reply(&mut self, volume: u32) {
        if self.wire_device(volume).is_none_or(|volume| self.devices[volume].resync.is_some()) {
            self.protocol_error("resync data nobody asked for");
        }
    }

    /// The application writes here, and this disk is a resync target: replies on their way for these
    /// blocks may hold what was there before.
    pub(super) fn outdate_resync_replies(&mut self, volume: usize, range: BlockRange) {
        if self.devices[volume].repl == ReplState::SyncTarget {
            for (_, write) in &mut self.devices[volume].rs_writes {
                write.stale |= write.range.overlaps(range) && write.step != RsWriteStep::Writing;
            }
        }
    }

    /// Drops a reply that may be older than what the application wrote; its blocks stay marked and are
    /// asked for again.
    fn drop_stale_reply(&mut self, volume: usize, key: usize) {
        let write = self.devices[volume].rs_writes.remove(key);
        if let Some(buffer) = write.buffer {
            self.out.push_back(Output::Release(buffer));
        }
        let request = (u64::from(write.seq) << 32) | (key as u64 & 0xffff_ffff);
        let ack = self.read_ack(volume, write.range, request);
        self.send(Message::NegRsDReply(ack), Payload::None);
        if let Some(resync) = &mut self.devices[volume].resync {
            resync.in_flight_sectors -= write.range.len().0;
            resync.cursor = resync.cursor.min(write.range.bits_touched().start);
        }
        self.resync_target_go_on(volume);
    }

    fn lock_rs_write(&mut self, volume: usize, range: BlockRange, key: usize) {
        if self.devices[volume].rs_writes[key].stale {
            return self.drop_stale_reply(volume, key);
        }
        let device = &mut self.devices[volume];
        device.rs_writes[key].step = RsWriteStep::Locking;
        if device.locks.lock(range, LockOwner::ResyncTarget(key)) {
            self.resync_write_locked(volume, key);
        }
    }

    pub(super) fn resync_write_locked(&mut self, volume: usize, key: usize) {
        if self.devices[volume].rs_writes[key].stale {
            let range = self.devices[volume].rs_writes[key].range;
            self.unlock(volume, range, LockOwner::ResyncTarget(key));
            return self.drop_stale_reply(volume, key);
        }
        let write = &mut self.devices[volume].rs_writes[key];
        write.step = RsWriteStep::Writing;
        let (range, buffer) = (write.range, write.buffer);
        let op = if buffer.is_some() { DiskOp::Write } else { DiskOp::WriteZeroes { may_unmap: true } };
        self.submit_io(volume, op, Some(range), false, buffer, IoContext::ResyncWrite { volume, key });
    }

    pub(super) fn on_resync_write_done(
        &mut self,
        volume: usize,
        key: usize,
        result: Result<DiskOk, IoError>,
    ) {
        let device = &mut self.devices[volume];
        device.ios -= 1;
        device.writes_done += 1;
        let write = device.rs_writes.remove(key);
        let range = write.range;
        if let Some(buffer) = write.buffer {
            self.out.push_back(Output::Release(buffer));
        }
        let current = self.session.as_ref().is_some_and(|now| now.id == write.session)
            && self.devices[volume].repl == ReplState::SyncTarget;
        let request = (u64::from(write.seq) << 32) | (key as u64 & 0xffff_ffff);
        let ack = self.read_ack(volume, range, request);
        match result {
            Ok(_) if current => {
                let device = &mut self.devices[volume];
                device.counters.written_sectors += range.len().0;
                device.unmark(range);
                self.send(Message::RsWriteAck(ack), Payload::None);
            }
            Ok(_) => {}
            Err(error) => {
                if current {
                    self.send(Message::NegRsDReply(ack), Payload::None);
                }
                self.on_local_io_error(volume, "a resync write to the local disk", Some(range), error);
                self.count_failed(volume, range);
            }
        }
        self.unlock(volume, range, LockOwner::ResyncTarget(key));
        if current {
            if let Some(resync) = &mut self.devices[volume].resync {
                resync.in_flight_sectors -= range.len().0;
            }
            self.resync_target_go_on(volume);
        }
    }

    /// The source could not read the range.
    fn on_neg_rs_reply(&mut self, volume: usize, header: &v1::BlockAck) {
        let range = range_of(header.sector, header.nr_sectors);
        let Some((range, key)) =
            range.and_then(|range| Some((range, self.find_rs_write(volume, header.request, range)?)))
        else {
            return self.protocol_error("a refused resync request nobody made");
        };
        self.devices[volume].rs_writes.remove(key);
        self.count_failed(volume, range);
        if let Some(resync) = &mut self.devices[volume].resync {
            resync.in_flight_sectors -= range.len().0;
        }
        self.resync_target_go_on(volume);
    }

    fn count_failed(&mut self, volume: usize, range: BlockRange) {
        if let Some(resync) = &mut self.devices[volume].resync {
            resync.bits_failed += range.bits_touched().end - range.bits_touched().start;
        }
    }

    /// No bit is left but failed ones.
    fn target_finish(&mut self, volume: usize) {
        let failed = match &mut self.devices[volume].resync {
            Some(resync) => {
                resync.finishing = true;
                resync.bits_failed
            }
            None => return,
        };
        if failed > 0 {
            let header =
                v1::ResyncFinished { volume: u32::from(self.devices[volume].nr.0), failed_bits: failed };
            self.send(Message::ResyncFinished(header), Payload::None);
            self.note(
                Severity::Error,
                format!("resync ended with {failed} blocks of 4 KiB that could not be copied"),
            );
            self.end_resync(volume);
            return;
        }
        self.write_bitmap(volume, BitmapThen::TargetFinish);
    }

    /// Data and the empty bitmap are stable: say so in the superblock.
    pub(super) fn target_bitmap_durable(&mut self, volume: usize) {
        let start = match &self.devices[volume].resync {
            Some(Resync { source: false, finishing: true, sync_uuid: Some(start), .. }) => *start,
            _ => return,
        };
        let device = &mut self.devices[volume];
        if device.bitmap.count() != 0 {
            // A block was marked meanwhile: not done after all.
            if let Some(resync) = &mut device.resync {
                resync.finishing = false;
                resync.cursor = 0;
            }
            return self.resync_target_go_on(volume);
        }
        device.uuids.current = start.uuid_current & !1;
        device.uuids.bitmap = 0;
        device.uuids.history = [start.sync_uuid, start.uuid_history_0];
        device.crashed_primary = false;
        self.set_disk(volume, DiskState::UpToDate);
        self.md_touch(volume);
        self.md_then(volume, SuperblockThen::TargetFinish);
    }

    pub(super) fn target_finished(&mut self, volume: usize) {
        if !self.devices[volume].resync.as_ref().is_some_and(|resync| !resync.source && resync.finishing) {
            return;
        }
        let header = v1::ResyncFinished { volume: u32::from(self.devices[volume].nr.0), failed_bits: 0 };
        self.send(Message::ResyncFinished(header), Payload::None);
        self.end_resync(volume);
        self.send_state();
        self.update_export(volume);
    }

    // ---- both ---------------------------------------------------------------------------------

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
    pub(super) fn on_out_of_sync(&mut self, header: &v1::OutOfSync) {
        let place = self.wire_device(header.volume).zip(range_of(header.sector, header.nr_sectors));
        match place {
            Some((volume, range)) if range.within(self.devices[volume].size) => {
                self.devices[volume].mark(range);
            }
            _ => self.protocol_error("an out-of-sync note outside the volume"),
        }
    }

    pub(super) fn on_resync_tick(&mut self) {
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
    pub(super) fn leave_resync_states(&mut self, volume: usize) {
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
    pub(super) fn abort_resync(&mut self, volume: usize) {
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
