//! Writes, barriers and reads received from the peer (SEM §7, §8).
//!
//! Epochs on the receiving side: writes of one epoch may reach the disk in any order; at its barrier
//! no later write starts until all of them are done and, with the method "flush", stable. Only then
//! goes the barrier ack. So no write is ever stable here without all the writes its sender had seen
//! completed before issuing it (I6).
use super::config::WriteOrdering;
use super::device::AlUser;
use super::event::{BufferId, Digest, DiskOk, DiskOp, IoError, Output, Payload, SessionId, WriteId};
use super::fault::Fault;
use super::interval::LockOwner;
use super::repair::FailedIo;
use super::request::range_of;
use super::state::{DiskState, ReplState};
use super::{IoContext, Resource};
use crate::units::BlockRange;
use lockstep_proto::{Message, limits, v1};
use std::collections::VecDeque;

/// A write of the peer.
#[derive(Debug)]
pub(super) struct PeerRequest {
    session: SessionId,
    volume: usize,
    op: DiskOp,
    pub(super) range: BlockRange,
    buffer: Option<BufferId>,
    fua: bool,
    wire_request: u64,
    want_write_ack: bool,
    /// Acknowledged as received (protocol B): it survives the loss of its sender.
    received_acked: bool,
    pub(super) al: bool,
    /// The resync it was sent in: only then both nodes hold this data when it is done, and nothing newer.
    resync: Option<u64>,
    /// Its sender has no disk: marked here on arrival, and written under our activity log.
    books: bool,
    /// Handed to the disk.
    on_disk: bool,
    /// How many came before it in this session.
    arrival: u64,
}

impl PeerRequest {
    /// Where it came from, and its id in the header of its message.
    pub(super) const fn id(&self) -> WriteId {
        WriteId::Peer { session: self.session, request: self.wire_request }
    }

    /// Which volume it writes.
    pub(super) const fn volume(&self) -> usize {
        self.volume
    }
}

#[derive(Debug)]
enum Queued {
    Write(usize),
    Barrier(u32),
    /// Reads wait for the writes that came before them.
    Read(v1::BlockRequest),
    ResyncRead(v1::BlockRequest, Option<Digest>),
    VerifyRead(v1::BlockRequest),
    /// Resync data for blocks that a write before it in the stream covers, too.
    ResyncReply {
        volume: usize,
        key: usize,
        seq: u32,
    },
}

/// Writes of the peer in hand at most: beyond what its front end and largest epoch allow.
const MAX_PEER_REQUESTS: usize = 1 << 16;
/// Reads for the peer in flight at most.
pub(super) const MAX_PEER_READS: usize = 1 << 13;

/// The receiving side of the peer's epochs.
#[derive(Debug, Default)]
pub(super) struct ReceiveEpochs {
    /// Writes of the current epoch, and how many of them are not done.
    writes: u32,
    active: u32,
    /// Writes that have come.
    arrived: u64,
    /// Its barrier has come.
    barrier: Option<u32>,
    /// Flushes of that barrier on the way.
    flushing: u32,
    /// What came behind the barrier, or while a hold is on.
    queue: VecDeque<Queued>,
    /// How many of them are resync or verify reads.
    queued_reads: usize,
    /// Reads of blocks that a write, sent before them, has not written yet.
    reads_behind: Vec<v1::BlockRequest>,
    /// No write may start: the disk is not yet durably Inconsistent (I5).
    pub(super) hold: bool,
    /// The session of these epochs is gone: what was started, or was acknowledged as received, is
    /// finished before a new session announces anything and before this node becomes Primary.
    orphaned: bool,
    /// Of a lost session: the flush behind its last write was begun. The first writes of the next session come
    /// after what was answered in this one (I6), and no barrier stands between them.
    last_flush: bool,
}

impl ReceiveEpochs {
    /// Writes of a lost session are still on their way to the disk.
    pub(super) const fn is_orphaned(&self) -> bool {
        self.orphaned
    }

    /// How many writes have come in this session.
    pub(super) const fn arrived(&self) -> u64 {
        self.arrived
    }

    fn is_drained(&self) -> bool {
        self.active == 0 && self.flushing == 0 && self.queue.is_empty()
    }
}

impl Resource {
    #[expect(clippy::needless_pass_by_value, reason = "who takes a payload takes the count of its buffer")]
    pub(super) fn on_data(&mut self, header: &v1::Data, payload: Payload) {
        let Payload::Buffer { id, len } = payload else {
            return self.protocol_error("a write without data");
        };
        let write = IncomingWrite {
            volume: header.volume,
            range: range_of(header.sector, len.0),
            op: DiskOp::Write,
            buffer: Some(id),
            fua: header.fua,
            request: header.request,
            want_recv_ack: header.want_recv_ack,
            want_write_ack: header.want_write_ack,
            most: limits::MAX_REQUEST_SECTORS,
        };
        if let Err(why) = self.accept_write(&write) {
            self.out.push_back(Output::Release(id));
            self.protocol_error(why);
        }
    }

    pub(super) fn on_trim(&mut self, header: &v1::Trim, zeroes: bool) {
        let op = if zeroes { DiskOp::WriteZeroes { may_unmap: header.may_unmap } } else { DiskOp::Discard };
        let write = IncomingWrite {
            volume: header.volume,
            range: range_of(header.sector, header.nr_sectors),
            op,
            buffer: None,
            fua: header.fua,
            request: header.request,
            want_recv_ack: header.want_recv_ack,
            want_write_ack: header.want_write_ack,
            most: limits::MAX_TRIM_SECTORS,
        };
        if let Err(why) = self.accept_write(&write) {
            self.protocol_error(why);
        }
    }

    fn accept_write(&mut self, write: &IncomingWrite) -> Result<(), &'static str> {
        let volume = self.wire_device(write.volume).ok_or("a write to a volume this node does not have")?;
        let range = write.range.ok_or("a write to an impossible range")?;
        if !range.within(self.devices[volume].size) || range.len().0 > write.most {
            return Err("a write outside the volume");
        }
        let Some(session) = self.session.as_ref().map(|session| session.id) else {
            return Err("a write without a session");
        };
        if write.buffer.is_some() {
            self.devices[volume].counters.received_sectors += range.len().0;
        }
        if self.peer_requests.len() >= MAX_PEER_REQUESTS {
            return Err("more writes in flight than any node sends");
        }
        // Marked on arrival, not at its turn: what this node knows of the peer may change until then.
        let forget = self.planted(Fault::NoBooksForDiskless);
        let device = &mut self.devices[volume];
        let diskless = device.peer_disk < DiskState::Inconsistent && !forget;
        let writable = device.writable();
        // Sent before its Primary knew that its disk takes part again: written here only, and our bits
        // have left already. Announced, and in our books until the mark is durable here (I1).
        let noted = matches!(device.repl, ReplState::WFBitMapS | ReplState::Ahead);
        let books = (diskless || noted) && writable;
        if books {
            device.mark(range);
            if !std::mem::replace(&mut device.keeps_books, true) && !diskless {
                self.md_touch(volume);
            }
        }
        if writable && noted {
            let note =
                v1::OutOfSync { volume: write.volume, sector: range.start().0, nr_sectors: range.len().0 };
            self.send(Message::OutOfSync(note), Payload::None);
        }
        self.verify_touched(volume, range);
        let key = self.peer_requests.insert(PeerRequest {
            session,
            volume,
            op: write.op,
            range,
            buffer: write.buffer,
            fua: write.fua,
            wire_request: write.request,
            want_write_ack: write.want_write_ack,
            received_acked: write.want_recv_ack,
            al: false,
            resync: (self.devices[volume].repl == ReplState::WFSyncUUID
                || self.devices[volume].repl.is_syncing())
            .then_some(self.devices[volume].resync_nr),
            books,
            on_disk: false,
            arrival: self.rx.arrived,
        });
        self.rx.arrived += 1;
        if write.want_recv_ack {
            let ack = self.block_ack(key, false);
            self.send(Message::RecvAck(ack), Payload::None);
        }
        if self.receive_must_queue() {
            self.rx.queue.push_back(Queued::Write(key));
        } else {
            self.start_peer_write(key);
        }
        Ok(())
    }

    /// No write may start now: the disk is not yet durably Inconsistent (I5), or the generation a
    /// diskless Primary writes under, and the flag that makes our log count, are not durable (I1, I2).
    fn receive_held(&self) -> bool {
        self.rx.hold
            || (0..self.devices.len()).any(|volume| {
                self.devices[volume].writable()
                    && (self.serves_diskless_primary(volume) || self.devices[volume].keeps_books)
                    && self.md_busy(volume)
            })
    }

    pub(super) fn queue_resync_read(&mut self, header: &v1::BlockRequest, digest: Option<Digest>) {
        self.rx.queued_reads += 1;
        self.rx.queue.push_back(Queued::ResyncRead(*header, digest));
    }

    /// A write that came before and has not started covers some of the same blocks: resync data, which is
    /// newer, waits for its turn.
    pub(super) fn queue_behind_writes(
        &mut self,
        volume: usize,
        range: BlockRange,
        key: usize,
        seq: u32,
    ) -> bool {
        let covered = self.write_is_queued(volume, range);
        if covered {
            self.rx.queue.push_back(Queued::ResyncReply { volume, key, seq });
        }
        covered
    }

    pub(super) fn queue_verify_read(&mut self, header: &v1::BlockRequest) {
        self.rx.queued_reads += 1;
        self.rx.queue.push_back(Queued::VerifyRead(*header));
    }

    /// A write of the peer into the range has come and not begun.
    pub(super) fn write_is_queued(&self, volume: usize, range: BlockRange) -> bool {
        self.rx.queue.iter().any(|queued| match queued {
            Queued::Write(key) => self
                .peer_requests
                .get(*key)
                .is_some_and(|write| write.volume == volume && write.range.overlaps(range)),
            Queued::Barrier(_)
            | Queued::Read(_)
            | Queued::ResyncRead(..)
            | Queued::VerifyRead(_)
            | Queued::ResyncReply { .. } => false,
        })
    }

    /// Resync and verify reads that wait behind writes.
    pub(super) fn nr_queued_reads(&self) -> usize {
        self.rx.queued_reads
    }

    pub(super) fn receive_must_queue(&self) -> bool {
        if self.planted(Fault::WritesPassBarrier) {
            return self.receive_held();
        }
        self.rx.barrier.is_some() || !self.rx.queue.is_empty() || self.receive_held()
    }

    fn start_peer_write(&mut self, key: usize) {
        self.rx.writes += 1;
        self.rx.active += 1;
        let (volume, range) = (self.peer_requests[key].volume, self.peer_requests[key].range);
        if self.planted(Fault::PeerWritesDoNotLock)
            || self.devices[volume].locks.lock(range, LockOwner::Peer(key))
        {
            self.peer_write_locked(volume, key);
        } else {
            self.make_way(volume, range);
        }
    }

    pub(super) fn peer_write_locked(&mut self, volume: usize, key: usize) {
        let range = self.peer_requests[key].range;
        // The Primary has no disk: this copy is the only one, so this node keeps the books (SEM §9).
        if self.peer_requests[key].books && self.al_in_use(volume) {
            if !self.al_begin(volume, AlUser::Peer(key), range.al_extents()) {
                return;
            }
            self.peer_requests[key].al = true;
        }
        self.submit_peer_write(volume, key);
    }

    pub(super) fn submit_peer_write(&mut self, volume: usize, key: usize) {
        self.peer_requests[key].on_disk = true;
        if !self.devices[volume].writable() {
            self.devices[volume].ios += 1;
            self.on_peer_write_done(key, Err(IoError::Aborted));
            return;
        }
        let request = &self.peer_requests[key];
        let (op, range, buffer) = (request.op, request.range, request.buffer);
        let fua = request.fua && !self.planted(Fault::PeerForgetsFua);
        self.submit_io(volume, op, Some(range), fua, buffer, IoContext::Peer(key));
    }

    pub(super) fn on_peer_write_done(&mut self, key: usize, result: Result<DiskOk, IoError>) {
        let volume = self.peer_requests[key].volume;
        let range = self.peer_requests[key].range;
        let current =
            self.session.as_ref().is_some_and(|session| session.id == self.peer_requests[key].session)
                || self.planted(Fault::AnswersOfOldSession);
        let device = &mut self.devices[volume];
        device.ios -= 1;
        device.writes_done += 1;
        match result {
            Ok(_) => {
                device.counters.written_sectors += range.len().0;
                // Either side of a resync: the sender clears the same blocks when its own leg is done.
                // A write from before the resync proves nothing: a newer one may be noted only.
                let syncing =
                    device.repl.is_syncing() && self.peer_requests[key].resync == Some(device.resync_nr);
                let mut ack = self.block_ack(key, false);
                if current && syncing && !self.lies_under_missing_write(volume, range) {
                    self.devices[volume].unmark(range);
                    ack.set_in_sync = true;
                }
                if current && (self.peer_requests[key].want_write_ack) {
                    self.send(Message::WriteAck(ack), Payload::None);
                }
            }
            Err(error) => {
                if error != IoError::Aborted {
                    self.devices[volume].mark(range);
                    let io = FailedIo::Write;
                    self.on_local_io_error(volume, "a mirrored write to the local disk", io, range, error);
                    // Told its sender that it is safe here, who is gone: this copy is not good without it.
                    let promised = !current && self.peer_requests[key].received_acked;
                    if promised && self.devices[volume].writable() {
                        self.set_disk(volume, DiskState::Inconsistent);
                    }
                }
                if current {
                    let ack = self.block_ack(key, false);
                    self.send(Message::NegAck(ack), Payload::None);
                }
            }
        }
        let request = self.peer_requests.remove(key);
        if let Some(buffer) = request.buffer {
            self.out.push_back(Output::Release(buffer));
        }
        if request.al {
            self.al_end(volume, range.al_extents());
        }
        self.unlock(volume, range, LockOwner::Peer(key));
        for read in std::mem::take(&mut self.rx.reads_behind) {
            self.start_remote_read(&read);
        }
        self.rx.active -= 1;
        self.try_end_epoch();
        self.forget_orphaned_epochs();
        self.resync_target_go_on(volume);
        for volume in 0..self.devices.len() {
            self.target_try_finish(volume);
        }
    }

    /// One of the first `arrived` writes of this session is not done.
    pub(super) fn rx_open_before(&self, arrived: u64) -> bool {
        self.peer_requests.iter().any(|(_, write)| write.arrival < arrived)
    }

    fn block_ack(&self, key: usize, set_in_sync: bool) -> v1::BlockAck {
        let request = &self.peer_requests[key];
        v1::BlockAck {
            volume: u32::from(self.devices[request.volume].nr.0),
            sector: request.range.start().0,
            nr_sectors: request.range.len().0,
            request: request.wire_request,
            set_in_sync,
        }
    }

    // ---- epochs -------------------------------------------------------------------------------

    pub(super) fn on_barrier(&mut self, epoch: u32) {
        if self.receive_must_queue() {
            if self.rx.queue.len() >= MAX_PEER_REQUESTS {
                return self.protocol_error("more barriers than any node sends");
            }
            self.rx.queue.push_back(Queued::Barrier(epoch));
        } else {
            self.rx.barrier = Some(epoch);
            self.try_end_epoch();
        }
    }

    pub(super) fn try_end_epoch(&mut self) {
        let early = self.planted(Fault::BarrierAckEarly);
        if self.rx.barrier.is_none() || (self.rx.active != 0 && !early) || self.rx.flushing != 0 {
            return;
        }
        if self.failure_untold() {
            // The peer must not take for stable what a disk lost that it takes for good.
            return;
        }
        self.flush_epoch();
        if self.rx.flushing == 0 {
            self.end_epoch();
        }
    }

    /// Makes stable what the disks were told, with the method "flush".
    fn flush_epoch(&mut self) {
        for volume in 0..self.devices.len() {
            let device = &self.devices[volume];
            let dirty = device.writes_flushed < device.writes_done && !self.planted(Fault::SkipEpochFlush);
            if device.writable() && dirty && device.cfg.write_ordering == WriteOrdering::Flush {
                let writes = device.writes_done;
                self.rx.flushing += 1;
                let context = IoContext::EpochFlush { volume, writes };
                self.submit_io(volume, DiskOp::Flush, None, false, None, context);
            }
        }
    }

    pub(super) fn on_epoch_flushed(&mut self, volume: usize, writes: u64, ok: bool) {
        let device = &mut self.devices[volume];
        device.ios -= 1;
        if ok {
            device.writes_flushed = device.writes_flushed.max(writes);
        } else {
            // The peer hears of the lost disk before the ack and marks everything it had not proven.
            self.fail_disk(volume, "a flush of the local disk failed", None);
        }
        self.rx.flushing -= 1;
        if self.rx.flushing == 0 && self.rx.barrier.is_some() && !self.failure_untold() {
            self.end_epoch();
        }
        self.forget_orphaned_epochs();
    }

    fn end_epoch(&mut self) {
        if let Some(epoch) = self.rx.barrier.take() {
            let writes = std::mem::take(&mut self.rx.writes);
            if !self.rx.orphaned {
                self.send(Message::BarrierAck(v1::BarrierAck { epoch, writes }), Payload::None);
            }
        }
        self.drain_receive_queue();
    }

    /// Starts what waited behind a barrier or a hold, up to the next barrier.
    pub(super) fn drain_receive_queue(&mut self) {
        while self.rx.barrier.is_none() && !self.receive_held() {
            match self.rx.queue.pop_front() {
                Some(Queued::ResyncRead(header, digest)) => {
                    self.rx.queued_reads -= 1;
                    self.start_resync_read(&header, digest);
                }
                Some(Queued::VerifyRead(header)) => {
                    self.rx.queued_reads -= 1;
                    self.start_verify_read(&header);
                }
                Some(Queued::Read(header)) => self.start_remote_read(&header),
                Some(Queued::Write(key)) => self.start_peer_write(key),
                Some(Queued::ResyncReply { volume, key, seq }) => self.resync_reply_turn(volume, key, seq),
                Some(Queued::Barrier(epoch)) => {
                    self.rx.barrier = Some(epoch);
                    self.try_end_epoch();
                }
                // A barrier may have been the last of a lost session.
                None => return self.forget_orphaned_epochs(),
            }
        }
    }

    /// The connection is gone. What the disk was told finishes without an answer; the rest is dropped, as if
    /// it had been lost on the way (`docs/invariants.md`, "A write that never came"), except under protocol
    /// B, where it was acknowledged as safe from the loss of its sender: that is written, epoch by epoch.
    ///
    /// While a resync is about to begin, a disk that is not good takes none of them: it is the older copy anyway, and
    /// must not change before it says that it is Inconsistent (I5).
    pub(super) fn abort_receive(&mut self) {
        self.rx.orphaned = true;
        let held = std::mem::take(&mut self.rx.hold);
        let devices = &self.devices;
        let lands = |write: &PeerRequest| !held || devices[write.volume].disk == DiskState::UpToDate;
        let waits = |write: &PeerRequest| write.received_acked && !write.on_disk && lands(write);
        let promised = self.peer_requests.iter().any(|(_, write)| waits(write));
        let keep = promised && !self.planted(Fault::ReceivedForgotten);
        let unwanted: Vec<usize> =
            self.peer_requests.iter().filter(|(_, write)| !lands(write)).map(|(key, _)| key).collect();
        let queue = std::mem::take(&mut self.rx.queue);
        self.rx.queued_reads = 0;
        self.rx.reads_behind.clear();
        if keep {
            // What came before it as well: a later write is nowhere without the earlier ones (I6).
            for item in queue {
                match item {
                    Queued::Write(key) if unwanted.contains(&key) => self.drop_peer_write(key),
                    Queued::Write(_) | Queued::Barrier(_) => self.rx.queue.push_back(item),
                    Queued::Read(_)
                    | Queued::ResyncRead(..)
                    | Queued::VerifyRead(_)
                    | Queued::ResyncReply { .. } => {}
                }
            }
            self.try_end_epoch();
            self.drain_receive_queue();
        } else {
            self.rx.barrier = None;
            for item in queue {
                if let Queued::Write(key) = item {
                    self.drop_peer_write(key);
                }
            }
            (0..self.devices.len()).for_each(|volume| self.drop_waiting_writes(volume));
        }
        self.forget_orphaned_epochs();
    }

    /// Writes of a lost session that wait for their range, or for a slot in the activity log: what they wait
    /// for may be a write of this node that is frozen until the peer is back, and it would wait for them.
    fn drop_waiting_writes(&mut self, volume: usize) {
        let forget = self.planted(Fault::ReceivedForgotten);
        let device = &mut self.devices[volume];
        let mut dropped = Vec::new();
        let mut granted = Vec::new();
        for (key, write) in self.peer_requests.iter() {
            let user = AlUser::Peer(key);
            let begun = write.on_disk || device.al_committing.contains(&user);
            let promised = write.received_acked && !forget;
            if write.volume != volume || begun || promised {
                continue;
            }
            if !device.locks.cancel(LockOwner::Peer(key), &mut granted) {
                device.al_waiters.retain(|waiter| *waiter != user);
                device.locks.unlock(write.range, LockOwner::Peer(key), &mut granted);
            }
            dropped.push(key);
        }
        for key in &dropped {
            self.rx.active -= 1;
            self.drop_peer_write(*key);
        }
        // One that was dropped may have got its range from another.
        granted.retain(|owner| !matches!(owner, LockOwner::Peer(key) if dropped.contains(key)));
        self.run_granted(volume, granted);
    }

    fn drop_peer_write(&mut self, key: usize) {
        if let Some(buffer) = self.peer_requests.remove(key).buffer {
            self.out.push_back(Output::Release(buffer));
        }
    }

    /// Writes of a lost session are still on their way to the disk.
    fn forget_orphaned_epochs(&mut self) {
        if self.rx.orphaned && self.rx.is_drained() && !self.rx.last_flush {
            self.rx.last_flush = true;
            self.flush_epoch();
        }
        if self.rx.orphaned && self.rx.is_drained() {
            self.rx = ReceiveEpochs::default();
            self.handshake_try_send();
        }
    }

    // ---- reads --------------------------------------------------------------------------------

    /// A read of the peer's application sees every write the peer sent before it: those wait in the
    /// queue or hold their range, and the read waits for them. Under A and B they may be acknowledged.
    pub(super) fn on_data_request(&mut self, header: &v1::BlockRequest) {
        let open = self.remote_reads.len() + self.rx.queue.len() + self.rx.reads_behind.len();
        if open >= MAX_PEER_READS + MAX_PEER_REQUESTS {
            return self.protocol_error("more reads in flight than any node sends");
        }
        if self.receive_must_queue() {
            self.rx.queue.push_back(Queued::Read(*header));
        } else {
            self.start_remote_read(header);
        }
    }

    fn start_remote_read(&mut self, header: &v1::BlockRequest) {
        let place = self.wire_device(header.volume).zip(range_of(header.sector, header.nr_sectors));
        let Some((volume, range)) = place.filter(|(volume, range)| {
            range.within(self.devices[*volume].size) && range.len().0 <= limits::MAX_REQUEST_SECTORS
        }) else {
            return self.protocol_error("a read outside the volume");
        };
        let Some(session) = self.session.as_ref().map(|session| session.id) else { return };
        let device = &self.devices[volume];
        if device.locks.wanted_by_peer(range) {
            self.rx.reads_behind.push(*header);
        } else if device.disk == DiskState::UpToDate && device.intact(range) {
            let context = IoContext::RemoteRead { volume, session, request: header.request, range };
            self.submit_io(volume, DiskOp::Read, Some(range), false, None, context);
            self.remote_reads.push((header.request, range));
        } else {
            let ack = self.read_ack(volume, range, header.request);
            self.send(Message::NegDReply(ack), Payload::None);
        }
    }

    pub(super) fn on_remote_read_done(
        &mut self,
        volume: usize,
        session: SessionId,
        request: u64,
        range: BlockRange,
        result: Result<DiskOk, IoError>,
    ) {
        self.devices[volume].ios -= 1;
        // A peer may use one id for two reads: each is answered with its own range.
        let at = self.remote_reads.iter().position(|open| *open == (request, range));
        let open = at.map(|at| self.remote_reads.swap_remove(at)).is_some();
        let current = self.session.as_ref().is_some_and(|now| now.id == session);
        if !open || !current {
            if let Ok(DiskOk { buffer: Some(buffer), .. }) = result {
                self.out.push_back(Output::Release(buffer));
            }
            return;
        }
        match result {
            Ok(DiskOk { buffer: Some(id), .. }) => {
                let reply = v1::BlockReply {
                    volume: u32::from(self.devices[volume].nr.0),
                    sector: range.start().0,
                    nr_sectors: range.len().0,
                    request,
                    window_sectors: 0,
                };
                self.devices[volume].counters.read_sectors += range.len().0;
                self.devices[volume].counters.sent_sectors += range.len().0;
                self.send(Message::DataReply(reply), Payload::Buffer { id, len: range.len() });
                self.out.push_back(Output::Release(id));
            }
            Ok(DiskOk { buffer: None, .. }) => {
                let ack = self.read_ack(volume, range, request);
                self.send(Message::NegDReply(ack), Payload::None);
            }
            Err(error) => {
                self.on_local_io_error(volume, "a read for the peer", FailedIo::Read, range, error);
                let ack = self.read_ack(volume, range, request);
                self.send(Message::NegDReply(ack), Payload::None);
            }
        }
    }

    pub(super) fn read_ack(&self, volume: usize, range: BlockRange, request: u64) -> v1::BlockAck {
        v1::BlockAck {
            volume: u32::from(self.devices[volume].nr.0),
            sector: range.start().0,
            nr_sectors: range.len().0,
            request,
            set_in_sync: false,
        }
    }
}

/// What `Data`, `Discard` and `WriteZeroes` have in common.
struct IncomingWrite {
    volume: u32,
    range: Option<BlockRange>,
    op: DiskOp,
    buffer: Option<BufferId>,
    fua: bool,
    request: u64,
    want_recv_ack: bool,
    want_write_ack: bool,
    most: u64,
}
