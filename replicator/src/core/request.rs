//! Application requests on this node: legs, epochs, the completion rule (SEM §7-§9).
//!
//! A write: range lock → activity log → transfer log and peer, local disk → completion. It completes
//! when every leg has finished and one succeeded, and no gate is closed. After that a mirrored write
//! stays, holding its activity-log extent, until the barrier ack of its epoch.
//!
//! | protocol | the peer's leg is done when |
//! |---|---|
//! | A | the frame was handed to the send queue (but if the local leg failed: at the barrier ack) |
//! | B | `RecvAck` |
//! | C | `WriteAck` |
//!
//! A flush, and FUA, under protocol C completes only when both copies are stable.
use super::config::{OnNoData, Protocol};
use super::conflict::Place;
use super::device::{AlUser, MayMiss, MirrorMode};
use super::event::{
    self, BufferId, DiskOk, DiskOp, IoError, Output, Payload, RequestError, RequestId, RequestOp,
};
use super::fault::Fault;
use super::interval::LockOwner;
use super::repair::FailedIo;
use super::state::{DiskState, ReplState, Role};
use super::timer::Timer;
use super::transfer_log::EpochNr;
use super::{IoContext, Resource};
use crate::units::{BlockRange, SectorCount, Time, VolumeNr};
use lockstep_proto::{Message, limits, v1};

/// An epoch that is complete waits this long for a reason to send its barrier.
const IDLE_BARRIER_MS: u64 = 5;

/// One copy's part of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Leg {
    /// This copy takes no part.
    None,
    /// Waiting for its answer.
    Pending,
    /// Protocol A: in the send queue; B: in the peer's memory. Counts as done beside a good local copy,
    /// but proves nothing.
    Sent,
    /// Done.
    Ok,
    /// Failed.
    Failed,
}

/// What the peer said about a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// In its memory.
    Received,
    /// On its disk.
    Written,
    /// It failed there.
    Failed,
}

/// A request of the local application.
#[derive(Debug)]
pub(super) struct Request {
    seq: u32,
    id: RequestId,
    /// When it came.
    issued: Time,
    pub(super) volume: usize,
    op: RequestOp,
    pub(super) range: BlockRange,
    fua: bool,
    buffer: Option<BufferId>,
    pub(super) local: Leg,
    peer: Leg,
    /// Its place among overlapping writes of the peer.
    pub(super) place: Place,
    /// Written before, and once more when it has its range back.
    pub(super) rewrite: bool,
    /// The local disk is at it.
    on_disk: bool,
    /// By which it was sent.
    protocol: Protocol,
    /// Waits for the activity log.
    pub(super) al_waits: bool,
    epoch: Option<EpochNr>,
    /// In the transfer log: no barrier ack yet.
    in_log: bool,
    /// Holds references in the activity log.
    pub(super) al: bool,
    /// Handed to disk and peer.
    submitted: bool,
    completed: bool,
    /// The peer cleared its bits for this version of the blocks.
    in_sync_at_peer: bool,
    /// A read that was already retried at the other copy.
    retried: bool,
    /// A write that the end of a connection interrupted while IO was held back: it goes to the copies
    /// again when one takes it (`suspend.rs`).
    pub(super) again: bool,
}

impl Request {
    /// A write that was handed out and is not through.
    pub(super) fn is_begun_write(&self) -> bool {
        self.op != RequestOp::Read && self.submitted && !self.completed
    }

    /// What only the peer has of it does not count.
    pub(super) fn distrust_peer(&mut self) {
        if self.local != Leg::Ok && self.peer == Leg::Ok {
            self.peer = Leg::Failed;
        }
    }

    /// Something of it is at the peer and unanswered.
    pub(super) fn waits_for_peer(&self) -> bool {
        self.peer == Leg::Pending
    }

    /// The peer has not said, or cannot have said, where it stands among overlapping writes.
    pub(super) fn unordered(&self) -> bool {
        !self.submitted || self.peer == Leg::Pending
    }

    /// A write under way whose data this disk does not get.
    pub(super) fn missing_here(&self) -> bool {
        let missing = matches!(self.local, Leg::None | Leg::Failed);
        missing && self.submitted && !self.completed && self.op != RequestOp::Read
    }

    /// The local disk is at it.
    pub(super) const fn on_disk(&self) -> bool {
        self.on_disk
    }

    /// The local leg starts: what the disk is told.
    pub(super) const fn start_local(&mut self) -> (usize, DiskOp, BlockRange, bool, Option<BufferId>) {
        self.local = Leg::Pending;
        self.on_disk = true;
        (self.volume, disk_op(self.op), self.range, self.fua, self.buffer)
    }
}

/// A flush of the local application.
#[derive(Debug)]
pub(super) struct Flush {
    id: RequestId,
    volume: usize,
    local: Leg,
    /// Everything up to here must be acked by barrier.
    peer_through: Option<EpochNr>,
}

impl Resource {
    pub(super) fn on_request(&mut self, request: event::Request) {
        let volume = match self.admit(&request) {
            Ok(volume) => volume,
            Err(error) => {
                self.out.push_back(Output::Complete { id: request.id, result: Err(error), data: None });
                return;
            }
        };
        self.next_seq = self.next_seq.wrapping_add(1);
        let key = self.requests.insert(Request {
            seq: self.next_seq,
            id: request.id,
            issued: self.now,
            volume,
            op: request.op,
            range: request.range,
            fua: request.fua,
            buffer: request.buffer,
            local: Leg::None,
            peer: Leg::None,
            place: Place::Own,
            rewrite: false,
            on_disk: false,
            protocol: self.cfg.net.protocol,
            al_waits: false,
            epoch: None,
            in_log: false,
            al: false,
            submitted: false,
            completed: false,
            in_sync_at_peer: false,
            retried: false,
            again: false,
        });
        if self.io_suspended() {
            self.park_request(key);
        } else {
            self.begin_request(key);
        }
    }

    /// A request that was let in, now or when suspended IO goes on.
    pub(super) fn begin_request(&mut self, key: usize) {
        let Request { volume, range, op, .. } = self.requests[key];
        if op == RequestOp::Read {
            self.submit_read(key);
            return;
        }
        let follows = self.follows();
        let owner = LockOwner::Request(key);
        let locked = if self.planted(Fault::RequestsDoNotLock) {
            true
        } else if follows {
            self.devices[volume].locks.lock_yielding(range, owner)
        } else {
            self.devices[volume].locks.lock(range, owner)
        };
        if locked {
            self.request_locked(key);
        }
    }

    fn admit(&self, request: &event::Request) -> Result<usize, RequestError> {
        let volume = self.device_index(request.volume).ok_or(RequestError::Invalid)?;
        if self.role != Role::Primary || self.demoting() {
            return Err(RequestError::NotPrimary);
        }
        let device = &self.devices[volume];
        let sectors_per_block = u64::from(device.logical_block_bytes / 512).max(1);
        let most = match request.op {
            RequestOp::Read | RequestOp::Write => limits::MAX_REQUEST_SECTORS,
            RequestOp::WriteZeroes { .. } | RequestOp::Discard => limits::MAX_TRIM_SECTORS,
        };
        let aligned = request.range.start().0.is_multiple_of(sectors_per_block)
            && request.range.len().0.is_multiple_of(sectors_per_block);
        if !request.range.within(device.size) || request.range.len().0 > most || !aligned {
            return Err(RequestError::Invalid);
        }
        if matches!(request.op, RequestOp::Read | RequestOp::Write) && request.buffer.is_none() {
            return Err(RequestError::Invalid);
        }
        Ok(volume)
    }

    // ---- writes -------------------------------------------------------------------------------

    /// The range is ours: on to the activity log.
    pub(super) fn request_locked(&mut self, key: usize) {
        let request = &mut self.requests[key];
        request.place = Place::Own;
        let (volume, extents) = (request.volume, request.range.al_extents());
        if request.submitted {
            return self.write_again(key);
        }
        if request.al_waits {
            return;
        }
        if !self.requests[key].al && self.al_in_use(volume) && !self.planted(Fault::NoActivityLog) {
            if !self.al_begin(volume, AlUser::Request(key), extents) {
                self.requests[key].al_waits = true;
                return;
            }
            self.requests[key].al = true;
        }
        self.submit_write(key);
    }

    /// The activity log lets it go on (`hot`), or there is none any more.
    pub(super) fn request_logged(&mut self, key: usize, hot: bool) {
        let request = &mut self.requests[key];
        request.al = hot;
        request.al_waits = false;
        // A write that let others pass goes on when it has its range back.
        if request.place != Place::Passed {
            self.submit_write(key);
        }
    }

    /// Sends the write to every copy that takes it.
    fn submit_write(&mut self, key: usize) {
        let volume = self.requests[key].volume;
        self.test_congestion(volume);
        let device = &self.devices[volume];
        let local = device.writable();
        let mode = device.mirror_mode();
        let good_local =
            local && (device.disk == DiskState::UpToDate || self.planted(Fault::WriteToBadCopyAlone));
        let good_remote = mode == MirrorMode::Data && device.peer_disk == DiskState::UpToDate;
        self.requests[key].submitted = true;
        self.verify_touched(volume, self.requests[key].range);
        if !good_local && !good_remote && self.waits_for_data(volume) {
            self.requests[key].again = true;
            return;
        }
        if !good_local && !good_remote {
            // Never write to a lone copy that is not good (S26).
            self.finish_request(key, Err(RequestError::Io));
            return;
        }
        match mode {
            MirrorMode::Data
                if self.planted(Fault::DiscardNotMirrored) && self.requests[key].op == RequestOp::Discard => {
            }
            MirrorMode::Data => self.mirror_write(key),
            MirrorMode::Note => {
                // Mark first, then announce (S03).
                self.note_write_ahead(volume);
                let range = self.requests[key].range;
                if !self.planted(Fault::NoteWithoutMark) {
                    self.devices[volume].mark(range);
                }
                let volume_nr = u32::from(self.devices[volume].nr.0);
                let note =
                    v1::OutOfSync { volume: volume_nr, sector: range.start().0, nr_sectors: range.len().0 };
                if !self.planted(Fault::MarkWithoutNote) {
                    self.send(Message::OutOfSync(note), Payload::None);
                }
            }
            MirrorMode::Nothing => {
                let range = self.requests[key].range;
                if !self.planted(Fault::NoMarkWithoutPeer) {
                    self.devices[volume].mark(range);
                }
            }
        }
        if local {
            self.outdate_resync_replies(volume, self.requests[key].range);
            self.submit_local_write(key);
        } else {
            self.try_complete(key);
        }
    }

    fn mirror_write(&mut self, key: usize) {
        let epoch = self.tl.epoch_for_write(self.now, self.cfg.net.max_epoch_size);
        self.tl.push(key);
        self.send_barriers();
        let protocol = self.cfg.net.protocol;
        let volume = self.requests[key].volume;
        let resyncing = self.devices[volume].repl.is_syncing();
        let number = u32::from(self.devices[volume].nr.0);
        let at_receive = self.planted(Fault::CompleteAtReceive);
        let request = &mut self.requests[key];
        request.epoch = Some(epoch);
        request.in_log = true;
        request.protocol = protocol;
        request.peer = if protocol == Protocol::A { Leg::Sent } else { Leg::Pending };
        let wire = wire_id(key, request.seq);
        let want_recv_ack = protocol == Protocol::B || at_receive;
        // During a resync the ack also says that the blocks are in sync now (SEM §7).
        let want_write_ack = protocol == Protocol::C || resyncing;
        let (sector, nr_sectors, fua) = (request.range.start().0, request.range.len().0, request.fua);
        let epoch = epoch.to_wire();
        let (message, payload) = match (request.op, request.buffer) {
            (RequestOp::Write, Some(id)) => {
                let header = v1::Data {
                    volume: number,
                    sector,
                    request: wire,
                    epoch,
                    fua,
                    want_recv_ack,
                    want_write_ack,
                };
                (Message::Data(header), Payload::Buffer { id, len: request.range.len() })
            }
            (op, _) => {
                let may_unmap = op != RequestOp::WriteZeroes { may_unmap: false };
                let header = v1::Trim {
                    volume: number,
                    sector,
                    nr_sectors,
                    request: wire,
                    epoch,
                    fua,
                    want_recv_ack,
                    want_write_ack,
                    may_unmap,
                };
                let message = if op == RequestOp::Discard {
                    Message::Discard(header)
                } else {
                    Message::WriteZeroes(header)
                };
                (message, Payload::None)
            }
        };
        self.devices[volume].unacked_sectors += nr_sectors;
        if matches!(payload, Payload::Buffer { .. }) {
            self.devices[volume].counters.sent_sectors += nr_sectors;
        }
        self.arm_ko();
        self.send(message, payload);
    }

    /// The local disk answered.
    pub(super) fn on_local_done(&mut self, key: usize, result: Result<DiskOk, IoError>) {
        let volume = self.requests[key].volume;
        self.devices[volume].ios -= 1;
        if self.requests[key].op == RequestOp::Read {
            return self.on_local_read_done(key, result);
        }
        let device = &mut self.devices[volume];
        device.writes_done += 1;
        let request = &mut self.requests[key];
        request.on_disk = false;
        match result {
            Ok(_) => {
                request.local = Leg::Ok;
                device.counters.written_sectors += request.range.len().0;
            }
            Err(error) => {
                request.local = Leg::Failed;
                let range = request.range;
                if !self.planted(Fault::LocalErrorNotMarked) {
                    self.devices[volume].mark(range);
                }
                let io = FailedIo::Write;
                self.on_local_io_error(volume, "a write to the local disk", io, range, error);
            }
        }
        // Failing the disk may have finished it already.
        if self.requests.contains(key) {
            if self.requests[key].place == Place::GivesWay {
                self.hand_over(key);
                return;
            }
            self.settle_in_sync(key);
            self.try_complete(key);
        }
    }

    /// `RecvAck`, `WriteAck` or `NegAck` for a write.
    pub(super) fn on_write_answer(&mut self, header: &v1::BlockAck, answer: Answer) {
        let Some(key) = self.find_request(header.request) else {
            return self.protocol_error("an acknowledgement for a write that is not waiting for one");
        };
        let answer = match answer {
            Answer::Failed if self.planted(Fault::NegAckIsAck) => Answer::Written,
            Answer::Received if self.planted(Fault::CompleteAtReceive) => Answer::Written,
            other => other,
        };
        let believe = self.planted(Fault::AnswersOfOldSession);
        let request = &mut self.requests[key];
        if !request.in_log || (request.range.start().0 != header.sector && !believe) {
            return self.protocol_error("an acknowledgement that does not fit the write it names");
        }
        match answer {
            Answer::Received if request.peer == Leg::Pending && request.protocol == Protocol::B => {
                request.peer = Leg::Sent;
            }
            Answer::Received => {}
            Answer::Written => {
                request.peer = Leg::Ok;
                request.in_sync_at_peer = header.set_in_sync;
            }
            Answer::Failed => {
                request.peer = Leg::Failed;
                let (volume, range) = (request.volume, request.range);
                self.devices[volume].mark(range);
                // Sent to the peer alone while this disk was leaving, which stayed.
                let stayed = request.local == Leg::None && self.devices[volume].disk == DiskState::UpToDate;
                request.again |= stayed && !request.completed;
            }
        }
        if answer != Answer::Received {
            self.ordered(key);
        }
        self.settle_in_sync(key);
        self.try_complete(key);
    }

    /// Both copies hold this version: the source clears its bits as the target did.
    fn settle_in_sync(&mut self, key: usize) {
        let request = &mut self.requests[key];
        if request.in_sync_at_peer && request.local == Leg::Ok {
            request.in_sync_at_peer = false;
            let (volume, range) = (request.volume, request.range);
            match self.devices[volume].repl {
                ReplState::SyncSource | ReplState::PausedSyncS => {
                    self.devices[volume].unmark(range);
                    self.source_try_finish(volume);
                }
                ReplState::SyncTarget | ReplState::PausedSyncT => {
                    self.devices[volume].unmark(range);
                    self.resync_target_go_on(volume);
                }
                _ => {}
            }
        }
    }

    /// A write the peer called in sync still waits for its local leg.
    pub(super) fn in_sync_pending(&self, volume: usize) -> bool {
        self.requests.iter().any(|(_, request)| {
            request.volume == volume && request.in_sync_at_peer && request.local == Leg::Pending
        })
    }

    /// The completion rule. Safe to call at any time after submission.
    pub(super) fn try_complete(&mut self, key: usize) {
        let request = &self.requests[key];
        if !request.submitted || request.local == Leg::Pending || request.place == Place::Passed {
            return;
        }
        if !request.completed {
            let peer_done = match request.peer {
                Leg::Pending => false,
                // "Sent" proves nothing. Without a good local copy wait for the barrier ack: the next read
                // goes to the peer.
                Leg::Sent => {
                    let device = &self.devices[request.volume];
                    let vouches = device.disk == DiskState::UpToDate && device.repair.is_none();
                    request.local == Leg::Ok && vouches
                }
                Leg::None | Leg::Ok | Leg::Failed => true,
            };
            if !peer_done {
                if let (Leg::Sent, Some(epoch)) = (request.peer, request.epoch) {
                    self.want_barrier_ack(epoch);
                }
                return;
            }
            let volume = request.volume;
            if self.suspension.is_frozen() {
                return;
            }
            if request.again {
                if request.in_log || self.waits_for_data(volume) {
                    return;
                }
                let local = self.requests[key].local;
                self.requests[key].again = false;
                if local != Leg::Ok && self.devices[volume].disk == DiskState::UpToDate {
                    return self.send_again(key);
                }
                if self.sends_again(volume) {
                    return if self.peer_forgot(volume) {
                        self.fail_forgotten(key);
                    } else {
                        self.send_again(key);
                    };
                }
            }
            if self.devices[volume].uuid_gate.is_some() && !self.planted(Fault::GenerationNotAwaited) {
                if !self.devices[volume].gated.contains(&key) {
                    self.devices[volume].gated.push(key);
                }
                return;
            }
            let device = &self.devices[volume];
            // A copy that is not good vouches for nothing, least of all alone (S26).
            // Nor one that is on its way out: newer writes may be at the peer only, and both would differ.
            let good_local = device.disk == DiskState::UpToDate;
            let request = &self.requests[key];
            let here = request.local == Leg::Ok && good_local;
            let there = matches!(request.peer, Leg::Ok | Leg::Sent) && device.peer_readable();
            let good = here || there;
            // The peer's is the only copy: its cache is not enough. Two Primaries would wait for each other.
            if good && !here && request.in_log && self.peer_role != Role::Primary {
                if let Some(epoch) = request.epoch {
                    self.want_barrier_ack(epoch);
                }
                return;
            }
            if !good && self.waits_for_data(volume) {
                self.requests[key].again = true;
                return;
            }
            let at_peer_only = good && request.local != Leg::Ok && request.op != RequestOp::Read;
            if at_peer_only && self.degradation_unknown(volume) {
                if !self.devices[volume].gated.contains(&key) {
                    self.devices[volume].gated.push(key);
                }
                return;
            }
            self.devices[volume].missed_writes |= at_peer_only;
            self.complete_request(key, if good { Ok(()) } else { Err(RequestError::Io) });
        }
        self.forget_if_done(key);
    }

    /// The disk of these writes is let go: what it took before it is used again is not relied on.
    pub(super) fn forget_local_legs(&mut self, volume: usize) {
        for (_, request) in self.requests.iter_mut() {
            if request.volume == volume && !request.completed && request.local == Leg::Ok {
                request.local = Leg::Failed;
            }
        }
    }

    /// Both legs start over: the range is still ours, and so are the extents unless their log is gone.
    fn send_again(&mut self, key: usize) {
        let request = &mut self.requests[key];
        (request.local, request.peer, request.epoch) = (Leg::None, Leg::None, None);
        request.submitted = false;
        request.rewrite = false;
        request.in_sync_at_peer = false;
        self.request_locked(key);
    }

    fn complete_request(&mut self, key: usize, result: Result<(), RequestError>) {
        let (early, open) =
            (self.planted(Fault::AlReleasedAtCompletion), self.planted(Fault::EpochStaysOpen));
        let request = &mut self.requests[key];
        debug_assert!(!request.completed, "request {:?} completes twice", request.id);
        request.completed = true;
        let (id, volume, range) = (request.id, request.volume, request.range);
        let epoch = request.epoch.filter(|_| !open);
        let early_end = early && std::mem::take(&mut request.al);
        let latency_ns = self.now.0.saturating_sub(request.issued.0);
        let device = &mut self.devices[volume];
        let beside = device.repl.is_syncing() || device.repl.is_verifying();
        device.foreground.write_done(latency_ns, beside);
        if early_end {
            self.al_end(volume, range.al_extents());
        }
        if open {
            self.timers.set_if_idle(Timer::IdleBarrier, self.now.plus_ms(IDLE_BARRIER_MS));
        }
        self.out.push_back(Output::Complete { id, result, data: None });
        if let Some(epoch) = epoch {
            self.end_epoch_soon(epoch);
        }
        self.unlock(volume, range, LockOwner::Request(key));
    }

    /// A write waits for the barrier ack of its epoch: the barrier goes out at once, unless another one is
    /// on its way; the writes that come until then share the next.
    fn want_barrier_ack(&mut self, epoch: EpochNr) {
        if self.tl.oldest_nr() == Some(epoch) {
            self.tl.close(epoch);
            self.send_barriers();
        } else {
            self.end_epoch_soon(epoch);
        }
    }

    fn end_epoch_soon(&mut self, epoch: EpochNr) {
        if self.tl.close(epoch) {
            self.timers.set_if_idle(Timer::IdleBarrier, self.now.plus_ms(IDLE_BARRIER_MS));
        }
    }

    /// Fails or finishes a write that was never handed to any copy.
    pub(super) fn finish_request(&mut self, key: usize, result: Result<(), RequestError>) {
        self.complete_request(key, result);
        self.forget_if_done(key);
    }

    fn forget_if_done(&mut self, key: usize) {
        let request = &self.requests[key];
        if request.completed && !request.in_log {
            let request = self.requests.remove(key);
            if request.al {
                self.al_end(request.volume, request.range.al_extents());
            }
        }
    }

    /// Lets a range go and moves on whoever waited for it.
    pub(super) fn unlock(&mut self, volume: usize, range: BlockRange, owner: LockOwner) {
        let unlocked = match owner {
            LockOwner::Request(_) => self.planted(Fault::RequestsDoNotLock),
            LockOwner::Peer(_) => self.planted(Fault::PeerWritesDoNotLock),
            LockOwner::ResyncSource(_) => self.planted(Fault::ResyncReadUnlocked),
            LockOwner::ResyncTarget(_) | LockOwner::VerifyAsk(_) | LockOwner::VerifyAnswer(_) => false,
        };
        if unlocked {
            return;
        }
        let mut granted = std::mem::take(&mut self.granted);
        self.devices[volume].locks.unlock(range, owner, &mut granted);
        self.run_granted(volume, granted);
    }

    pub(super) fn run_granted(&mut self, volume: usize, mut granted: Vec<LockOwner>) {
        for owner in granted.drain(..) {
            match owner {
                LockOwner::Request(key) => self.request_locked(key),
                LockOwner::Peer(key) => self.peer_write_locked(volume, key),
                // What an earlier owner did may have ended the resync.
                LockOwner::ResyncSource(key) if self.resync_read_waits(volume, key) => {
                    self.resync_read_locked(volume, key);
                }
                LockOwner::ResyncTarget(key) if self.resync_write_waits(volume, key) => {
                    self.resync_write_locked(volume, key);
                }
                LockOwner::VerifyAsk(key) if self.ov_check_waits(volume, key) => {
                    self.ov_check_locked(volume, key);
                }
                LockOwner::VerifyAnswer(key) if self.ov_read_waits(volume, key) => {
                    self.ov_read_locked(volume, key);
                }
                LockOwner::ResyncSource(_)
                | LockOwner::ResyncTarget(_)
                | LockOwner::VerifyAsk(_)
                | LockOwner::VerifyAnswer(_) => {}
            }
        }
        self.granted = granted;
    }

    /// The connection is gone, or the peer's disk of one volume: what it did not declare stable may be
    /// missing there, so it is marked; then the legs end (SEM §7 "connection loss").
    pub(super) fn fail_peer_legs(&mut self, peer_life: u64) {
        let unacked = self.tl.take_all();
        let frozen = self.suspension.is_frozen();
        let wait = self.cfg.options.on_no_data == OnNoData::SuspendIo;
        let mut again = false;
        for key in &unacked {
            let request = &mut self.requests[*key];
            request.in_log = false;
            request.in_sync_at_peer = false;
            let (volume, range) = (request.volume, request.range);
            self.devices[volume].unacked_sectors -= range.len().0;
            let good_local = self.devices[volume].disk == DiskState::UpToDate;
            if request.completed && !good_local {
                let missing = match request.peer {
                    Leg::Sent if request.protocol == Protocol::A => MayMiss::Surely,
                    _ => MayMiss::IfNotAlive(peer_life),
                };
                let known = &mut self.devices[volume].peer_may_miss;
                if *known != Some(MayMiss::Surely) {
                    *known = Some(missing);
                }
            }
            // "Sent" (protocol A) and "pending" never got their proof; nor did what is in the cache of a
            // peer that cannot be asked again: such a write is not told done for its sake any more.
            let unproven = request.peer != Leg::Ok || !request.completed;
            if unproven {
                request.peer = Leg::Failed;
            }
            let stayed = request.local == Leg::None && good_local;
            request.again = !request.completed && (frozen || stayed || request.peer != Leg::Ok && wait);
            again |= request.again;
            let forget =
                self.planted(Fault::NoMarkAtLoss) || (self.planted(Fault::LastEpochForgotten) && !unproven);
            if !forget {
                self.devices[volume].mark(range);
            }
            self.ordered(*key);
        }
        if again {
            self.remember_peer_life(peer_life);
        }
        for key in unacked {
            if self.requests.contains(key) {
                self.try_complete(key);
            }
        }
        let reads: Vec<usize> = self
            .requests
            .iter()
            .filter(|(_, request)| request.op == RequestOp::Read && request.peer == Leg::Pending)
            .map(|(key, _)| key)
            .collect();
        for key in reads {
            self.requests[key].peer = Leg::Failed;
            if frozen {
                self.park_read(key);
            } else {
                self.retry_read(key);
            }
        }
        self.try_complete_flushes();
    }

    /// The peer's disk of this volume went away while the connection stands: mark what it had not declared stable.
    pub(super) fn mark_unacked(&mut self, volume: usize) {
        if self.planted(Fault::NoMarkAtPeerDetach) {
            return;
        }
        let ranges: Vec<BlockRange> = self
            .tl
            .requests()
            .filter(|key| self.requests[*key].volume == volume)
            .map(|key| self.requests[key].range)
            .collect();
        for range in ranges {
            self.devices[volume].mark(range);
        }
    }

    // ---- epochs -------------------------------------------------------------------------------

    /// Ends the open epoch and sends what is due; the newest epoch that is not acked yet.
    pub(super) fn close_epoch(&mut self) -> Option<EpochNr> {
        let newest = self.tl.close_current();
        self.send_barriers();
        newest
    }

    pub(super) fn send_barriers(&mut self) {
        while let Some(epoch) = self.tl.take_barrier() {
            self.send(Message::Barrier(v1::Barrier { epoch: epoch.to_wire() }), Payload::None);
        }
    }

    pub(super) fn on_barrier_ack(&mut self, epoch: u32, writes: u32) {
        if self.tl.oldest().iter().any(|key| self.requests[*key].peer == Leg::Pending) {
            return self.protocol_error("a barrier ack before the acknowledgement of one of its writes");
        }
        let acked = match self.tl.ack(epoch, writes) {
            Ok(acked) => acked,
            Err(error) => return self.protocol_error(&error.to_string()),
        };
        for key in &acked {
            let request = &mut self.requests[*key];
            if request.peer == Leg::Sent {
                request.peer = Leg::Ok;
            }
            request.in_log = false;
            self.devices[request.volume].unacked_sectors -= request.range.len().0;
        }
        for key in &acked {
            self.try_complete(*key);
        }
        self.tl.recycle(acked);
        // The flush behind it covered all that came before.
        for device in &mut self.devices {
            if matches!(device.peer_may_miss, Some(MayMiss::IfNotAlive(_))) {
                device.peer_may_miss = None;
            }
        }
        // Who waits for the next one could not ask for it before.
        if self.devices.iter().any(|device| device.disk != DiskState::UpToDate) {
            for key in self.tl.oldest().to_vec() {
                if self.requests.contains(key) {
                    self.try_complete(key);
                }
            }
        }
        self.timers.stop(Timer::Ko);
        if !self.tl.is_empty() {
            self.arm_ko();
        }
        self.try_complete_flushes();
    }

    // ---- flushes ------------------------------------------------------------------------------

    pub(super) fn on_flush(&mut self, id: RequestId, volume: VolumeNr) {
        let at = match self.device_index(volume) {
            Some(at) if self.role == Role::Primary => at,
            Some(_) => {
                self.out.push_back(Output::Complete {
                    id,
                    result: Err(RequestError::NotPrimary),
                    data: None,
                });
                return;
            }
            None => {
                self.out.push_back(Output::Complete { id, result: Err(RequestError::Invalid), data: None });
                return;
            }
        };
        if self.io_suspended() {
            return self.park_flush(id, volume);
        }
        let newest = self.close_epoch();
        let local = self.devices[at].writable() && !self.planted(Fault::FlushSkipsDisk);
        let good = self.devices[at].disk == DiskState::UpToDate;
        // A and B promise the local copy only; without a good one, the peer's is the one.
        let mirrored = self.cfg.net.protocol == Protocol::C && !self.planted(Fault::FlushWithoutPeer);
        let peer_through = if mirrored || !good { newest } else { None };
        let leg = if local { Leg::Pending } else { Leg::None };
        let key = self.flushes.insert(Flush { id, volume: at, local: leg, peer_through });
        if local {
            self.submit_io(at, DiskOp::Flush, None, false, None, IoContext::Flush(key));
        }
        self.try_complete_flush(key);
    }

    pub(super) fn on_flush_local_done(&mut self, key: usize, ok: bool) {
        let volume = self.flushes[key].volume;
        self.devices[volume].ios -= 1;
        if ok {
            self.flushes[key].local = Leg::Ok;
        } else if self.planted(Fault::FailedFlushRetried) {
            return self.submit_io(volume, DiskOp::Flush, None, false, None, IoContext::Flush(key));
        } else {
            // What earlier writes left in the cache may be gone; the kernel would report success next
            // time. The disk is done for, and only the peer can still vouch for them.
            self.flushes[key].local = Leg::Failed;
            self.flushes[key].peer_through = self.close_epoch();
            self.fail_disk(volume, "a flush of the local disk failed", None);
        }
        if self.flushes.contains(key) {
            self.try_complete_flush(key);
        }
    }

    pub(super) fn try_complete_flushes(&mut self) {
        if self.flushes.is_empty() {
            return;
        }
        let keys: Vec<usize> = self.flushes.iter().map(|(key, _)| key).collect();
        for key in keys {
            if self.flushes.contains(key) {
                self.try_complete_flush(key);
            }
        }
    }

    fn try_complete_flush(&mut self, key: usize) {
        let flush = &self.flushes[key];
        let acked = flush.peer_through.is_none_or(|nr| self.tl.acked_through(nr));
        if flush.local == Leg::Pending || !acked || self.devices[flush.volume].uuid_gate.is_some() {
            return;
        }
        if self.suspension.is_frozen() {
            return;
        }
        let device = &self.devices[flush.volume];
        let good = match flush.local {
            Leg::Ok if device.md_disk == DiskState::UpToDate => true,
            // Nothing but the peer's stable copy counts then.
            Leg::None if self.planted(Fault::FlushSkipsDisk) => true,
            Leg::Ok | Leg::None | Leg::Failed => device.peer_readable(),
            Leg::Pending | Leg::Sent => false,
        };
        if !good && self.waits_for_data(flush.volume) {
            return;
        }
        let flush = self.flushes.remove(key);
        let result = if good { Ok(()) } else { Err(RequestError::Io) };
        self.out.push_back(Output::Complete { id: flush.id, result, data: None });
    }

    // ---- reads --------------------------------------------------------------------------------

    fn submit_read(&mut self, key: usize) {
        let request = &self.requests[key];
        let (volume, range, buffer) = (request.volume, request.range, request.buffer);
        let device = &self.devices[volume];
        let careless = self.planted(Fault::ReadInconsistent) && device.writable();
        if (device.readable(range) || careless) && request.local != Leg::Failed {
            self.requests[key].local = Leg::Pending;
            self.submit_io(volume, DiskOp::Read, Some(range), false, buffer, IoContext::Request(key));
        } else if device.peer_readable() && request.peer != Leg::Failed {
            let header = v1::BlockRequest {
                volume: u32::from(device.nr.0),
                sector: range.start().0,
                nr_sectors: range.len().0,
                request: wire_id(key, request.seq),
            };
            self.requests[key].peer = Leg::Pending;
            self.send(Message::DataRequest(header), Payload::None);
        } else if self.waits_for_data(volume) {
            self.park_read(key);
        } else {
            self.complete_read(key, Err(RequestError::Io), None);
        }
    }

    /// No copy can be read now: from the start again when IO goes on.
    fn park_read(&mut self, key: usize) {
        let request = &mut self.requests[key];
        (request.local, request.peer, request.retried) = (Leg::None, Leg::None, false);
        self.park_request(key);
    }

    fn on_local_read_done(&mut self, key: usize, result: Result<DiskOk, IoError>) {
        let (volume, range) = (self.requests[key].volume, self.requests[key].range);
        match result {
            Ok(_) => {
                self.devices[volume].counters.read_sectors += range.len().0;
                self.requests[key].local = Leg::Ok;
                self.complete_read(key, Ok(()), None);
            }
            Err(error) => {
                self.requests[key].local = Leg::Failed;
                let io = FailedIo::Read;
                self.on_local_io_error(volume, "a read from the local disk", io, range, error);
                self.retry_read(key);
            }
        }
    }

    /// One copy failed: the other one, once.
    fn retry_read(&mut self, key: usize) {
        let volume = self.requests[key].volume;
        if self.waits_for_data(volume) {
            self.park_read(key);
        } else if std::mem::replace(&mut self.requests[key].retried, true) {
            self.complete_read(key, Err(RequestError::Io), None);
        } else {
            self.submit_read(key);
        }
    }

    pub(super) fn on_data_reply(&mut self, header: &v1::BlockReply, payload: Payload) {
        let waiting = self.find_request(header.request).filter(|key| {
            self.requests[*key].op == RequestOp::Read && self.requests[*key].peer == Leg::Pending
        });
        let (Some(key), Payload::Buffer { id, len }) = (waiting, payload.clone()) else {
            self.drop_payload(payload);
            return self.protocol_error("data for a read that is not waiting");
        };
        let range = self.requests[key].range;
        if range.start().0 != header.sector || range.len() != len {
            self.drop_payload(payload);
            return self.protocol_error("data that does not fit the read it answers");
        }
        let volume = self.requests[key].volume;
        self.devices[volume].counters.received_sectors += len.0;
        self.requests[key].peer = Leg::Ok;
        self.complete_read(key, Ok(()), Some(id));
    }

    pub(super) fn on_neg_data_reply(&mut self, header: &v1::BlockAck) {
        let Some(key) =
            self.find_request(header.request).filter(|key| self.requests[*key].peer == Leg::Pending)
        else {
            return self.protocol_error("a refused read that is not waiting");
        };
        self.requests[key].peer = Leg::Failed;
        self.retry_read(key);
    }

    fn complete_read(&mut self, key: usize, result: Result<(), RequestError>, data: Option<BufferId>) {
        let request = self.requests.remove(key);
        self.out.push_back(Output::Complete { id: request.id, result, data });
    }

    /// The request a wire id names, if it still waits.
    fn find_request(&self, wire: u64) -> Option<usize> {
        let key = usize::try_from(wire & 0xffff_ffff).ok()?;
        let believe = self.planted(Fault::AnswersOfOldSession);
        self.requests.get(key).filter(|request| believe || u64::from(request.seq) == wire >> 32).map(|_| key)
    }

    /// Nothing of the application is in flight.
    pub(super) fn requests_drained(&self) -> bool {
        self.requests.is_empty() && self.flushes.is_empty() && self.tl.is_empty()
    }
}

fn wire_id(key: usize, seq: u32) -> u64 {
    (u64::from(seq) << 32) | (key as u64 & 0xffff_ffff)
}

const fn disk_op(op: RequestOp) -> DiskOp {
    match op {
        RequestOp::Read => DiskOp::Read,
        RequestOp::Write => DiskOp::Write,
        RequestOp::WriteZeroes { may_unmap } => DiskOp::WriteZeroes { may_unmap },
        RequestOp::Discard => DiskOp::Discard,
    }
}

/// Length of a range, for messages that carry it beside their payload.
pub(super) const fn range_of(sector: u64, nr_sectors: u64) -> Option<BlockRange> {
    BlockRange::new(crate::units::Sector(sector), SectorCount(nr_sectors))
}
