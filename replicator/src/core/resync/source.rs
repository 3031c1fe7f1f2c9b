//! The source: reads what the target asks for and answers it (SEM §19).
use super::{RsRead, RsReadStep};
use crate::core::config::RateControl;
use crate::core::event::{Digest, DiskOk, DiskOp, IoError, Output, Payload, Severity};
use crate::core::fault::Fault;
use crate::core::interval::LockOwner;
use crate::core::metadata::{BitmapThen, SuperblockThen};
use crate::core::repair::FailedIo;
use crate::core::request::range_of;
use crate::core::state::{ConnState, DiskState, ReplState};
use crate::core::{IoContext, Resource};
use lockstep_proto::{Message, limits, v1};

impl Resource {
    /// The union of the bitmaps is durable and nobody objects: a new sync identifier.
    pub(super) fn source_begin(&mut self, volume: usize) {
        let random = self.random_uuid();
        self.devices[volume].uuids.start_as_source(random);
        self.md_touch(volume);
        if self.planted(Fault::SourceStartsEarly) {
            return self.source_started(volume);
        }
        self.md_then(volume, SuperblockThen::SourceStart);
    }

    /// The sync identifier is durable: the target may start.
    pub(in crate::core) fn source_started(&mut self, volume: usize) {
        let ready =
            self.devices[volume].resync.as_ref().is_some_and(|resync| resync.source && resync.union_durable);
        if !ready || self.devices[volume].repl != ReplState::WFBitMapS {
            return;
        }
        self.start_pace(volume);
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
        self.apply_pause(volume);
    }

    pub(in crate::core) fn on_rs_data_request(&mut self, header: &v1::BlockRequest) {
        self.take_resync_request(header, None);
    }

    pub(in crate::core) fn on_rs_checksum_request(&mut self, header: &v1::ChecksumRequest) {
        let digest = Digest([header.digest_0, header.digest_1, header.digest_2, header.digest_3]);
        let request = v1::BlockRequest {
            volume: header.volume,
            sector: header.sector,
            nr_sectors: header.nr_sectors,
            request: header.request,
        };
        self.take_resync_request(&request, Some(digest));
    }

    /// Stands behind the writes that the target, if it is Primary, sent before it.
    fn take_resync_request(&mut self, header: &v1::BlockRequest, digest: Option<Digest>) {
        let open: usize = self.devices.iter().map(|device| device.rs_reads.len()).sum();
        if open + self.nr_queued_reads() >= crate::core::peer_request::MAX_PEER_READS {
            return self.protocol_error("more resync requests than the window allows");
        }
        if self.receive_must_queue() {
            self.queue_resync_read(header, digest);
        } else {
            self.start_resync_read(header, digest);
        }
    }

    pub(in crate::core) fn start_resync_read(&mut self, header: &v1::BlockRequest, digest: Option<Digest>) {
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
        if !self.devices[volume].repl.is_sync_source() {
            return self.protocol_error("a resync request, but this node is no source");
        }
        let Some(session) = self.session.as_ref().map(|session| session.id) else { return };
        let unlocked = self.planted(Fault::ResyncReadUnlocked);
        let device = &mut self.devices[volume];
        let key = device.rs_reads.insert(RsRead {
            session,
            range,
            request: header.request,
            step: RsReadStep::Locking,
            digest,
            spoiled: false,
        });
        if let Some(resync) = &mut device.resync {
            resync.pace.asked(range.len().0);
        }
        if unlocked || device.locks.lock(range, LockOwner::ResyncSource(key)) {
            self.resync_read_locked(volume, key);
        }
    }

    pub(in crate::core) fn resync_read_locked(&mut self, volume: usize, key: usize) {
        let read = &mut self.devices[volume].rs_reads[key];
        read.step = RsReadStep::Reading;
        let range = read.range;
        let op = if read.digest.is_some() { DiskOp::ReadDigest } else { DiskOp::Read };
        self.submit_io(volume, op, Some(range), false, None, IoContext::ResyncRead { volume, key });
    }

    pub(in crate::core) fn on_resync_read_done(
        &mut self,
        volume: usize,
        key: usize,
        result: Result<DiskOk, IoError>,
    ) {
        self.devices[volume].ios -= 1;
        let RsRead { session, range, request, digest, .. } = self.devices[volume].rs_reads[key];
        let current = self.session.as_ref().is_some_and(|now| now.id == session)
            && self.devices[volume].repl.is_sync_source();
        match result {
            Ok(ok) => {
                if current {
                    self.devices[volume].rs_reads[key].step = RsReadStep::Sent;
                    let reply = v1::BlockReply {
                        volume: u32::from(self.devices[volume].nr.0),
                        sector: range.start().0,
                        nr_sectors: range.len().0,
                        request,
                        window_sectors: self.source_window(volume),
                    };
                    let equal = digest.is_some() && digest == ok.digest;
                    match ok.buffer {
                        _ if equal => self.send(Message::RsIsInSync(reply), Payload::None),
                        Some(id) if !ok.all_zero => {
                            self.devices[volume].counters.sent_sectors += range.len().0;
                            self.send(Message::RsDataReply(reply), Payload::Buffer { id, len: range.len() });
                        }
                        _ => self.send(Message::RsDeallocated(reply), Payload::None),
                    }
                } else {
                    self.devices[volume].rs_reads.remove(key);
                }
                if let Some(id) = ok.buffer {
                    self.out.push_back(Output::Release(id));
                }
            }
            Err(error) => {
                if current {
                    let ack = self.read_ack(volume, range, request);
                    self.send(Message::NegRsDReply(ack), Payload::None);
                    if let Some(resync) = &mut self.devices[volume].resync {
                        resync.pace.done(range.len().0, self.now, self.now);
                    }
                }
                self.devices[volume].rs_reads.remove(key);
                self.unlock(volume, range, LockOwner::ResyncSource(key));
                self.on_local_io_error(
                    volume,
                    "a resync read from the local disk",
                    FailedIo::Read,
                    range,
                    error,
                );
                return;
            }
        }
        // The answer is in the stream: what is written here from now on stands behind it.
        self.unlock(volume, range, LockOwner::ResyncSource(key));
    }

    /// What the application on this node leaves to be in flight; 0 = no limit.
    fn source_window(&self, volume: usize) -> u64 {
        let device = &self.devices[volume];
        match device.cfg.resync.control {
            RateControl::Adaptive => device.foreground.limit(),
            RateControl::Planned | RateControl::Fixed => 0,
        }
    }

    /// The target wrote the range (or could not).
    pub(in crate::core) fn on_rs_write_ack(&mut self, header: &v1::BlockAck, written: bool) {
        let Some(volume) = self.wire_device(header.volume) else {
            return self.protocol_error("a resync answer for a volume this node does not have");
        };
        if !written && self.devices[volume].repl.is_sync_target() {
            return self.on_neg_rs_reply(volume, header);
        }
        let found = self.devices[volume]
            .rs_reads
            .iter()
            .find(|(_, read)| read.request == header.request && read.step == RsReadStep::Sent)
            .map(|(key, _)| key);
        let Some(key) = found else {
            if self.devices[volume].resync.is_none() {
                return;
            }
            return self.protocol_error("a resync answer nobody waits for");
        };
        let now = self.now;
        let device = &mut self.devices[volume];
        let RsRead { range, spoiled, .. } = device.rs_reads.remove(key);
        if written && !spoiled {
            device.unmark(range);
        }
        if let Some(resync) = &mut device.resync {
            resync.pace.done(range.len().0, now, now);
        }
        self.source_try_finish(volume);
    }

    pub(in crate::core) fn on_resync_finished(&mut self, header: &v1::ResyncFinished) {
        let Some(volume) = self.wire_device(header.volume) else { return };
        if self.devices[volume].resync.is_none() {
            return;
        }
        if !self.devices[volume].repl.is_sync_source() {
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
    pub(in crate::core) fn source_try_finish(&mut self, volume: usize) {
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

    pub(in crate::core) fn source_bitmap_durable(&mut self, volume: usize) {
        if !self.devices[volume].resync.as_ref().is_some_and(|resync| resync.source && resync.peer_finished) {
            return;
        }
        if self.devices[volume].bitmap.count() != 0 {
            // A write failed since on a disk that is kept: the copies are not equal.
            return self.drop_session(
                ConnState::NetworkFailure,
                "a write failed at the end of the resync; starting over",
            );
        }
        self.devices[volume].uuids.clear_bitmap();
        self.peer_got_our_generation(volume);
        self.devices[volume].crashed_primary = false;
        self.md_touch(volume);
        // The target said that it is good before it said that it is done; what it says since counts.
        let failed_since = self.devices[volume].peer_said == DiskState::Inconsistent;
        let peer_is = if failed_since { DiskState::Inconsistent } else { DiskState::UpToDate };
        self.set_peer_disk_fact(volume, peer_is);
        self.end_resync(volume);
    }
}
