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
use super::Resource;
use super::config::{OnNoData, Protocol};
use super::conflict::Place;
use super::device::{AlUser, MayMiss, MirrorMode};
use super::event::{self, BufferId, DiskOp, Output, Payload, RequestError, RequestId, RequestOp};
use super::fault::Fault;
use super::interval::LockOwner;
use super::state::{DiskState, Role};
use super::transfer_log::EpochNr;
use crate::units::{BlockRange, SectorCount, Time};
use lockstep_proto::{Message, limits, v1};

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
    pub(super) seq: u32,
    pub(super) id: RequestId,
    /// When it came.
    pub(super) issued: Time,
    pub(super) volume: usize,
    pub(super) op: RequestOp,
    pub(super) range: BlockRange,
    pub(super) fua: bool,
    pub(super) buffer: Option<BufferId>,
    pub(super) local: Leg,
    pub(super) peer: Leg,
    /// Its place among overlapping writes of the peer.
    pub(super) place: Place,
    /// Written before, and once more when it has its range back.
    pub(super) rewrite: bool,
    /// The local disk is at it.
    pub(super) on_disk: bool,
    /// By which it was sent.
    pub(super) protocol: Protocol,
    /// Waits for the activity log.
    pub(super) al_waits: bool,
    pub(super) epoch: Option<EpochNr>,
    /// In the transfer log: no barrier ack yet.
    pub(super) in_log: bool,
    /// Holds references in the activity log.
    pub(super) al: bool,
    /// Handed to disk and peer.
    pub(super) submitted: bool,
    pub(super) completed: bool,
    /// The peer cleared its bits for this version of the blocks.
    pub(super) in_sync_at_peer: bool,
    /// A read that was already retried at the other copy.
    pub(super) retried: bool,
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
        } else {
            self.share_ranges(volume, range);
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
                // It got its range while nothing completes: this copy may be the older one when the peer is back.
                self.requests[key].again = self.suspension.is_frozen();
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
            if request.completed {
                let missing = match request.peer {
                    Leg::Sent if request.protocol == Protocol::A => MayMiss::Surely,
                    _ => MayMiss::IfNotAlive(peer_life),
                };
                self.devices[volume].peer_missed(missing);
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
        let keys: Vec<usize> =
            self.tl.requests().filter(|key| self.requests[*key].volume == volume).collect();
        let peer_life = self.session.as_ref().map_or(0, |session| session.peer_life);
        for key in keys {
            let request = &self.requests[key];
            let range = request.range;
            if request.completed {
                // What was on its way to that disk, or in the peer's memory (A, B), will not come to it.
                let missing = match request.peer {
                    Leg::Sent => MayMiss::Surely,
                    Leg::None | Leg::Pending | Leg::Ok | Leg::Failed => MayMiss::IfNotAlive(peer_life),
                };
                self.devices[volume].peer_missed(missing);
            }
            self.devices[volume].mark(range);
        }
    }

    /// The request a wire id names, if it still waits.
    pub(super) fn find_request(&self, wire: u64) -> Option<usize> {
        let key = usize::try_from(wire & 0xffff_ffff).ok()?;
        let believe = self.planted(Fault::AnswersOfOldSession);
        self.requests.get(key).filter(|request| believe || u64::from(request.seq) == wire >> 32).map(|_| key)
    }

    /// Nothing of the application is in flight.
    pub(super) fn requests_drained(&self) -> bool {
        self.requests.is_empty() && self.flushes.is_empty() && self.tl.is_empty()
    }
}

pub(super) fn wire_id(key: usize, seq: u32) -> u64 {
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
