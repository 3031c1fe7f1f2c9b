//! The target: walks its bitmap, asks, writes what comes, and ends the resync (SEM §19).
use super::{Resync, RsWrite, RsWriteStep};
use crate::core::config::ResyncConfig;
use crate::core::event::{Digest, DiskOk, DiskOp, IoError, Output, Payload, Severity};
use crate::core::fault::Fault;
use crate::core::interval::LockOwner;
use crate::core::metadata::{BitmapThen, SuperblockThen};
use crate::core::repair::FailedIo;
use crate::core::request::range_of;
use crate::core::state::{DiskState, ReplState};
use crate::core::uuid::masked;
use crate::core::{IoContext, Resource};
use crate::units::{BlockRange, SECTORS_PER_BIT, Sector, SectorCount};
use lockstep_proto::{Message, limits, v1};

/// Digests are compared over so much at most: one changed block costs no more than this.
const CSUM_SECTORS: u64 = 128;

const fn wire_id(seq: u32, key: usize) -> u64 {
    ((seq as u64) << 32) | (key as u64 & 0xffff_ffff)
}

/// `rs-discard-granularity` as it acts, sectors: whole blocks, at most one request, a power of two, and
/// nothing on a disk that cannot discard.
fn discard_granularity(cfg: &ResyncConfig, can_discard: bool) -> Option<u64> {
    let sectors = (cfg.discard_granularity_bytes / 512).min(limits::MAX_REQUEST_SECTORS);
    (can_discard && sectors > 0).then(|| sectors.max(SECTORS_PER_BIT).next_power_of_two())
}

impl Resource {
    pub(in crate::core) fn on_sync_uuid(&mut self, header: &v1::SyncUuid) {
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
        self.rx.hold = !self.planted(Fault::ResyncHoldForgotten);
        self.set_repl(volume, ReplState::WFSyncUUID);
        // Marks announced after the bitmaps were united are in memory only. The source forgets its own at
        // our unflushed ack, so a power loss here would leave them nowhere: on disk first (I1).
        self.write_bitmap(volume, BitmapThen::ResyncReady);
    }

    pub(super) fn target_try_start(&mut self, volume: usize) {
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
        if self.planted(Fault::TargetStartsEarly) {
            return self.target_started(volume);
        }
        self.md_then(volume, SuperblockThen::TargetStart);
    }

    /// Durably Inconsistent: copying may begin.
    pub(in crate::core) fn target_started(&mut self, volume: usize) {
        let ready = self.devices[volume]
            .resync
            .as_ref()
            .is_some_and(|resync| !resync.source && resync.sync_uuid.is_some());
        if !ready {
            return;
        }
        self.start_pace(volume);
        self.set_repl(volume, ReplState::SyncTarget);
        self.release_hold();
        self.apply_pause(volume);
        self.resync_target_go_on(volume);
    }

    /// Asks for more, or ends.
    pub(in crate::core) fn resync_target_go_on(&mut self, volume: usize) {
        if self.devices[volume].repl != ReplState::SyncTarget {
            return;
        }
        let Some(session) = self.session.as_ref().map(|session| session.id) else { return };
        let ends_early = self.planted(Fault::TargetEndsEarly);
        let forgets = self.planted(Fault::FailedBlocksForgotten);
        let one_pass = self.planted(Fault::CursorDoesNotWrap);
        let clears = self.planted(Fault::ClearedOnRequest);
        let early = self.planted(Fault::DigestBeforeOwnWrite);
        let mut passed_over = false;
        loop {
            let device = &mut self.devices[volume];
            let Some(resync) = &mut device.resync else { return };
            if resync.finishing {
                return;
            }
            let Some(bit) = device.bitmap.next_set(resync.cursor) else {
                if ends_early {
                    return self.target_finish(volume);
                }
                if resync.pace.in_flight() != 0 {
                    return;
                }
                if forgets {
                    resync.bits_failed = 0;
                    device.bitmap.clear_all();
                }
                if device.bitmap.count() <= resync.bits_failed {
                    return self.target_finish(volume);
                }
                // What own writes hold is looked at when they are done, at the latest at the next tick.
                if one_pass || passed_over {
                    return;
                }
                // Blocks were marked behind the cursor: another pass (S09).
                resync.cursor = 0;
                resync.bits_failed = 0;
                continue;
            };
            let theirs = if resync.source_window == 0 { u64::MAX } else { resync.source_window };
            let Some(most) = resync.pace.next_request(device.foreground.limit().min(theirs)) else { return };
            let granularity = discard_granularity(&device.cfg.resync, device.discard);
            let most = if resync.csums { most.min(CSUM_SECTORS) } else { most };
            let most = granularity.map_or(most, |sectors| most.min(sectors));
            // Natural alignment: a request never crosses a multiple of its largest power of two.
            let chunk = 1 << (most / SECTORS_PER_BIT).max(1).ilog2();
            let chunk = if resync.fine.contains(&bit) { 1 } else { chunk };
            let limit = ((bit / chunk + 1) * chunk).min(bit + most / SECTORS_PER_BIT);
            let mut end = device.bitmap.run_end(bit, limit.max(bit + 1));
            let first = bit * SECTORS_PER_BIT;
            let whole = |end: u64| {
                let last = (end * SECTORS_PER_BIT).min(device.size.0);
                BlockRange::new(Sector(first), SectorCount(last.saturating_sub(first)))
            };
            // Where an own write is on its way, a reply would be dropped (`reply_gives_way`), and a digest made now says
            // nothing of what that write leaves: it may be one of an earlier session, which the source never gets.
            if !early && let Some(write) = whole(end).and_then(|range| device.locks.first_request(range)) {
                let blocks = write.bits_touched();
                if blocks.start <= bit {
                    resync.cursor = blocks.end;
                    passed_over = true;
                    continue;
                }
                end = blocks.start;
            }
            resync.cursor = end;
            let Some(range) = whole(end) else { continue };
            let compared = resync.csums;
            resync.pace.asked(range.len().0);
            self.next_seq = self.next_seq.wrapping_add(1);
            let key = device.rs_writes.insert(RsWrite {
                session,
                range,
                seq: self.next_seq,
                buffer: None,
                step: if compared { RsWriteStep::Digesting } else { RsWriteStep::Requested },
                asked_at: self.now,
                compared,
                spoiled: false,
                stale: false,
            });
            if clears {
                device.unmark(range);
            }
            if compared {
                let context = IoContext::ResyncDigest { volume, key };
                self.submit_io(volume, DiskOp::ReadDigest, Some(range), false, None, context);
            } else {
                self.send_data_request(volume, key);
            }
        }
    }

    fn send_data_request(&mut self, volume: usize, key: usize) {
        let write = &self.devices[volume].rs_writes[key];
        let header = v1::BlockRequest {
            volume: u32::from(self.devices[volume].nr.0),
            sector: write.range.start().0,
            nr_sectors: write.range.len().0,
            request: wire_id(write.seq, key),
        };
        self.send(Message::RsDataRequest(header), Payload::None);
    }

    /// The own data was read to be compared.
    pub(in crate::core) fn on_resync_digest(
        &mut self,
        volume: usize,
        key: usize,
        result: Result<DiskOk, IoError>,
    ) {
        self.devices[volume].ios -= 1;
        let write = &mut self.devices[volume].rs_writes[key];
        let (range, session, request) = (write.range, write.session, wire_id(write.seq, key));
        let mut digest = None;
        match result {
            Ok(ok) => {
                digest = ok.digest;
                if let Some(buffer) = ok.buffer {
                    self.out.push_back(Output::Release(buffer));
                }
            }
            Err(error) => {
                let io = FailedIo::Read;
                self.on_local_io_error(volume, "a resync read from the local disk", io, range, error);
            }
        }
        let current = self.session.as_ref().is_some_and(|now| now.id == session)
            && self.devices[volume].repl.is_sync_target();
        if !current {
            self.devices[volume].rs_writes.remove(key);
            return;
        }
        let write = &mut self.devices[volume].rs_writes[key];
        write.step = RsWriteStep::Requested;
        // What cannot be read is not compared but replaced.
        write.compared = digest.is_some();
        write.spoiled = false;
        let Some(Digest([digest_0, digest_1, digest_2, digest_3])) = digest else {
            return self.send_data_request(volume, key);
        };
        let header = v1::ChecksumRequest {
            volume: u32::from(self.devices[volume].nr.0),
            sector: range.start().0,
            nr_sectors: range.len().0,
            request,
            digest_0,
            digest_1,
            digest_2,
            digest_3,
        };
        self.send(Message::RsChecksumRequest(header), Payload::None);
    }

    fn find_rs_write(&self, volume: usize, wire: u64, range: BlockRange) -> Option<usize> {
        let key = usize::try_from(wire & 0xffff_ffff).ok()?;
        let write = self.devices[volume].rs_writes.get(key)?;
        (u64::from(write.seq) == wire >> 32 && write.range == range && write.step == RsWriteStep::Requested)
            .then_some(key)
    }

    #[expect(clippy::needless_pass_by_value, reason = "who takes a payload takes the count of its buffer")]
    pub(in crate::core) fn on_rs_data_reply(&mut self, header: &v1::BlockReply, payload: Payload) {
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
        self.note_resync_reply(volume, range, header);
        self.lock_rs_write(volume, range, key);
    }

    fn note_resync_reply(&mut self, volume: usize, range: BlockRange, header: &v1::BlockReply) {
        if let Some(resync) = &mut self.devices[volume].resync {
            resync.pace.arrived(range.len().0);
            resync.source_window = header.window_sectors;
        }
    }

    /// An answer without data: all zeroes, or `equal` to what is here.
    pub(in crate::core) fn on_rs_dataless(&mut self, header: &v1::BlockReply, equal: bool) {
        let place = self.wire_device(header.volume).zip(range_of(header.sector, header.nr_sectors));
        let key = place.and_then(|(volume, range)| self.find_rs_write(volume, header.request, range));
        let (Some((volume, range)), Some(key)) = (place, key) else {
            return self.unexpected_resync_reply(header.volume);
        };
        if equal && !self.devices[volume].rs_writes[key].compared {
            return self.protocol_error("a comparison nobody asked for");
        }
        self.note_resync_reply(volume, range, header);
        if !equal {
            return self.lock_rs_write(volume, range, key);
        }
        if self.devices[volume].rs_writes[key].stale {
            return self.drop_stale_reply(volume, key);
        }
        let write = self.devices[volume].rs_writes.remove(key);
        let bits = range.bits_touched();
        if let Some(resync) = &mut self.devices[volume].resync {
            resync.bits_same += bits.end - bits.start;
        }
        self.resync_block_good(volume, &write, key);
        self.resync_target_go_on(volume);
    }

    /// Both nodes hold the same data here: the one place where a resync clears the target's bits, and
    /// by its ack the source's (S04, S06).
    fn resync_block_good(&mut self, volume: usize, write: &RsWrite, key: usize) {
        let ack = self.read_ack(volume, write.range, wire_id(write.seq, key));
        if !write.spoiled {
            self.devices[volume].unmark(write.range);
        }
        self.send(Message::RsWriteAck(ack), Payload::None);
        self.resync_request_over(volume, write);
    }

    fn resync_request_over(&mut self, volume: usize, write: &RsWrite) {
        let now = self.now;
        if let Some(resync) = &mut self.devices[volume].resync {
            resync.pace.done(write.range.len().0, write.asked_at, now);
        }
    }

    /// An answer to a request that is not open: broken protocol, unless our own resync just ended.
    fn unexpected_resync_reply(&mut self, volume: u32) {
        if self.wire_device(volume).is_none_or(|volume| self.devices[volume].resync.is_some()) {
            self.protocol_error("resync data nobody asked for");
        }
    }

    /// The application writes here, and this disk is a resync target: replies on their way for these
    /// blocks may hold what was there before.
    pub(in crate::core) fn outdate_resync_replies(&mut self, volume: usize, range: BlockRange) {
        if self.devices[volume].repl.is_sync_target() && !self.planted(Fault::StaleReplyWritten) {
            for (_, write) in &mut self.devices[volume].rs_writes {
                write.stale |= write.range.overlaps(range) && write.step != RsWriteStep::Writing;
            }
        }
    }

    /// An own write is newer than this reply. One that still holds or wants the range says so itself; one that
    /// is done was answered by the source, and that answer stands behind the reply in the stream, so the
    /// mark of `outdate_resync_replies` is a second cover.
    fn reply_gives_way(&self, volume: usize, range: BlockRange, key: usize) -> bool {
        let device = &self.devices[volume];
        (device.rs_writes[key].stale || device.locks.wanted_by_request(range))
            && !self.planted(Fault::StaleReplyWritten)
    }

    /// Drops a reply that may be older than what the application wrote; its blocks stay marked and are
    /// asked for again.
    fn drop_stale_reply(&mut self, volume: usize, key: usize) {
        let write = self.devices[volume].rs_writes.remove(key);
        if let Some(buffer) = write.buffer {
            self.out.push_back(Output::Release(buffer));
        }
        let ack = self.read_ack(volume, write.range, wire_id(write.seq, key));
        self.send(Message::NegRsDReply(ack), Payload::None);
        self.resync_request_over(volume, &write);
        if let Some(resync) = &mut self.devices[volume].resync {
            resync.cursor = resync.cursor.min(write.range.bits_touched().start);
        }
        self.resync_target_go_on(volume);
    }

    fn lock_rs_write(&mut self, volume: usize, range: BlockRange, key: usize) {
        // An own write under it may wait for the source, which holds the range until this is answered.
        if self.reply_gives_way(volume, range, key) {
            return self.drop_stale_reply(volume, key);
        }
        let device = &mut self.devices[volume];
        let seq = device.rs_writes[key].seq;
        if self.queue_behind_writes(volume, range, key, seq) {
            self.devices[volume].rs_writes[key].step = RsWriteStep::Queued;
            return;
        }
        self.claim_rs_write(volume, range, key);
    }

    fn claim_rs_write(&mut self, volume: usize, range: BlockRange, key: usize) {
        let device = &mut self.devices[volume];
        device.rs_writes[key].step = RsWriteStep::Locking;
        if device.locks.lock(range, LockOwner::ResyncTarget(key)) {
            self.resync_write_locked(volume, key);
        }
    }

    /// The writes that came before this reply have started; they hold their ranges.
    pub(in crate::core) fn resync_reply_turn(&mut self, volume: usize, key: usize, seq: u32) {
        let waits = self.devices[volume].rs_writes.get(key);
        // The resync may have ended meanwhile.
        let Some(range) =
            waits.filter(|w| w.seq == seq && w.step == RsWriteStep::Queued).map(|write| write.range)
        else {
            return;
        };
        if self.reply_gives_way(volume, range, key) {
            return self.drop_stale_reply(volume, key);
        }
        // Not behind the queue once more: what waits there now was sent after this data and is newer.
        self.claim_rs_write(volume, range, key);
    }

    pub(in crate::core) fn resync_write_locked(&mut self, volume: usize, key: usize) {
        if self.devices[volume].rs_writes[key].stale {
            let range = self.devices[volume].rs_writes[key].range;
            self.unlock(volume, range, LockOwner::ResyncTarget(key));
            return self.drop_stale_reply(volume, key);
        }
        let write = &mut self.devices[volume].rs_writes[key];
        write.step = RsWriteStep::Writing;
        let (range, buffer) = (write.range, write.buffer);
        let op = if buffer.is_some() { DiskOp::Write } else { self.resync_zero_op(volume, range) };
        self.submit_io(volume, op, Some(range), false, buffer, IoContext::ResyncWrite { volume, key });
    }

    /// How zeroes get to the disk: discarded where `rs-discard-granularity` and the disk allow it.
    fn resync_zero_op(&self, volume: usize, range: BlockRange) -> DiskOp {
        let device = &self.devices[volume];
        let whole = |sectors: u64| {
            range.start().0.is_multiple_of(sectors)
                && (range.len().0.is_multiple_of(sectors) || range.end().0 >= device.size.0)
        };
        match discard_granularity(&device.cfg.resync, device.discard) {
            Some(sectors) if whole(sectors) => DiskOp::Discard,
            Some(_) => DiskOp::WriteZeroes { may_unmap: false },
            None => DiskOp::WriteZeroes { may_unmap: true },
        }
    }

    pub(in crate::core) fn on_resync_write_done(
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
            && self.devices[volume].repl.is_sync_target();
        match result {
            Ok(_) if current => {
                let device = &mut self.devices[volume];
                device.counters.written_sectors += range.len().0;
                device.counters.resync_sectors += range.len().0;
                self.resync_block_good(volume, &write, key);
            }
            Ok(_) => {}
            Err(error) => {
                if current {
                    let ack = self.read_ack(volume, range, wire_id(write.seq, key));
                    self.send(Message::NegRsDReply(ack), Payload::None);
                    self.resync_request_over(volume, &write);
                }
                self.devices[volume].mark(range);
                let io = FailedIo::Write;
                self.on_local_io_error(volume, "a resync write to the local disk", io, range, error);
                self.count_failed(volume, range);
            }
        }
        self.unlock(volume, range, LockOwner::ResyncTarget(key));
        if current {
            self.resync_target_go_on(volume);
        }
    }

    /// The source could not read the range.
    pub(super) fn on_neg_rs_reply(&mut self, volume: usize, header: &v1::BlockAck) {
        let range = range_of(header.sector, header.nr_sectors);
        let Some((range, key)) =
            range.and_then(|range| Some((range, self.find_rs_write(volume, header.request, range)?)))
        else {
            return self.protocol_error("a refused resync request nobody made");
        };
        let write = self.devices[volume].rs_writes.remove(key);
        self.count_failed(volume, range);
        self.resync_request_over(volume, &write);
        self.resync_target_go_on(volume);
    }

    /// One bad block fails a whole request: its blocks are tried one by one, and counted then.
    fn count_failed(&mut self, volume: usize, range: BlockRange) {
        let bits = range.bits_touched();
        let Some(resync) = &mut self.devices[volume].resync else { return };
        if bits.end - bits.start <= 1 {
            resync.bits_failed += 1;
            return;
        }
        resync.cursor = resync.cursor.min(bits.start);
        resync.fine = if resync.fine.is_empty() {
            bits
        } else {
            resync.fine.start.min(bits.start)..resync.fine.end.max(bits.end)
        };
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
        let arrived = self.rx.arrived();
        if let Some(resync) = &mut self.devices[volume].resync {
            resync.after_writes = Some(arrived);
        }
        self.target_try_finish(volume);
    }

    /// A write that came before the last copied block may still stand behind a barrier: the copies are equal where
    /// nothing is marked only when it is done.
    pub(in crate::core) fn target_try_finish(&mut self, volume: usize) {
        let Some(resync) = self.devices[volume].resync.as_mut().filter(|resync| resync.finishing) else {
            return;
        };
        let Some(arrived) = resync.after_writes else { return };
        if self.rx_open_before(arrived) && !self.planted(Fault::FinishBeforeWrites) {
            return;
        }
        if let Some(resync) = &mut self.devices[volume].resync {
            resync.after_writes = None;
        }
        self.write_bitmap(volume, BitmapThen::TargetFinish);
    }

    /// What the end of the resync waits for.
    pub(in crate::core) fn target_finish_wait(&self, volume: usize) -> Option<String> {
        let device = &self.devices[volume];
        device.resync.as_ref()?.after_writes?;
        Some(format!(
            "volume {}: writes that came before the end of the resync to reach the disk",
            device.nr.0
        ))
    }

    /// Data and the empty bitmap are stable: say so in the superblock.
    pub(in crate::core) fn target_bitmap_durable(&mut self, volume: usize) {
        let start = match &self.devices[volume].resync {
            Some(Resync { source: false, finishing: true, sync_uuid: Some(start), .. }) => *start,
            _ => return,
        };
        let (anyway, primary) = (self.planted(Fault::TargetEndsEarly), self.md_primary);
        let device = &mut self.devices[volume];
        if device.bitmap.count() != 0 && !anyway {
            // A block was marked meanwhile: not done after all.
            if let Some(resync) = &mut device.resync {
                resync.finishing = false;
                resync.cursor = 0;
            }
            return self.resync_target_go_on(volume);
        }
        device.uuids.current = masked(start.uuid_current) | u64::from(primary);
        device.uuids.bitmap = 0;
        device.uuids.history = [start.sync_uuid, start.uuid_history_0];
        device.crashed_primary = false;
        self.set_disk(volume, DiskState::UpToDate);
        self.md_touch(volume);
        if self.planted(Fault::FinishNotAwaited) {
            return self.target_finished(volume);
        }
        self.md_then(volume, SuperblockThen::TargetFinish);
    }

    pub(in crate::core) fn target_finished(&mut self, volume: usize) {
        if !self.devices[volume].resync.as_ref().is_some_and(|resync| !resync.source && resync.finishing) {
            return;
        }
        // A mirrored write may have failed since, on a disk that is kept: not done after all.
        let failed_bits = if self.planted(Fault::FinishNotAwaited) || self.planted(Fault::TargetEndsEarly) {
            0
        } else {
            self.devices[volume].bitmap.count()
        };
        if failed_bits > 0 {
            self.set_disk(volume, DiskState::Inconsistent);
            if let Some(resync) = &mut self.devices[volume].resync {
                resync.bits_failed = failed_bits;
            }
        }
        let header = v1::ResyncFinished { volume: u32::from(self.devices[volume].nr.0), failed_bits };
        self.send(Message::ResyncFinished(header), Payload::None);
        self.end_resync(volume);
        self.send_state();
        self.update_export(volume);
    }
}
