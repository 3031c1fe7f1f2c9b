//! The target: walks its bitmap, asks, writes what comes, and ends the resync (SEM §19).
use super::{LAZY_BITMAP_MS, Resync, RsWrite, RsWriteStep, TICK_MS, WINDOW_SECTORS};
use crate::core::event::{DiskOk, DiskOp, IoError, Output, Payload, Severity};
use crate::core::interval::LockOwner;
use crate::core::metadata::{BitmapThen, SuperblockThen};
use crate::core::request::range_of;
use crate::core::state::{DiskState, ReplState};
use crate::core::timer::Timer;
use crate::core::{IoContext, Resource};
use crate::units::{BlockRange, SECTORS_PER_BIT, Sector, SectorCount};
use lockstep_proto::{Message, limits, v1};

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
        self.rx.hold = true;
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
        self.md_then(volume, SuperblockThen::TargetStart);
    }

    /// Durably Inconsistent: copying may begin.
    pub(in crate::core) fn target_started(&mut self, volume: usize) {
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

    pub(super) fn refill_budget(&mut self, volume: usize) {
        let rate = self.devices[volume].cfg.resync_rate_kib_s;
        if let Some(resync) = &mut self.devices[volume].resync {
            resync.budget_sectors = match rate {
                Some(kib_s) => (kib_s * 2 * TICK_MS / 1000).max(SECTORS_PER_BIT),
                None => u64::MAX,
            };
        }
    }

    /// Asks for more, or ends.
    pub(in crate::core) fn resync_target_go_on(&mut self, volume: usize) {
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
        self.lock_rs_write(volume, range, key);
    }

    pub(in crate::core) fn on_rs_deallocated(&mut self, header: &v1::BlockReply) {
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
    pub(in crate::core) fn outdate_resync_replies(&mut self, volume: usize, range: BlockRange) {
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
        // An own write under it may wait for the source, which holds the range until this is answered.
        let device = &mut self.devices[volume];
        if device.rs_writes[key].stale || device.locks.wanted_by_request(range) {
            return self.drop_stale_reply(volume, key);
        }
        let seq = device.rs_writes[key].seq;
        if self.queue_behind_writes(volume, range, key, seq) {
            self.devices[volume].rs_writes[key].step = RsWriteStep::Queued;
            return;
        }
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
        if let Some(range) =
            waits.filter(|w| w.seq == seq && w.step == RsWriteStep::Queued).map(|write| write.range)
        {
            self.lock_rs_write(volume, range, key);
        }
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
        let op = if buffer.is_some() { DiskOp::Write } else { DiskOp::WriteZeroes { may_unmap: true } };
        self.submit_io(volume, op, Some(range), false, buffer, IoContext::ResyncWrite { volume, key });
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
    pub(super) fn on_neg_rs_reply(&mut self, volume: usize, header: &v1::BlockAck) {
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
    pub(in crate::core) fn target_bitmap_durable(&mut self, volume: usize) {
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

    pub(in crate::core) fn target_finished(&mut self, volume: usize) {
        if !self.devices[volume].resync.as_ref().is_some_and(|resync| !resync.source && resync.finishing) {
            return;
        }
        let header = v1::ResyncFinished { volume: u32::from(self.devices[volume].nr.0), failed_bits: 0 };
        self.send(Message::ResyncFinished(header), Payload::None);
        self.end_resync(volume);
        self.send_state();
        self.update_export(volume);
    }
}
