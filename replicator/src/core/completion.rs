//! When a write of the application is done (SEM §7).
//!
//! Each copy has a leg. A write completes when every leg has finished and one succeeded, and no gate is closed.
//! A Primary without a good disk of its own has one copy only, at the peer: there the leg is done at the barrier
//! ack, when that copy is on stable storage.
use super::Resource;
use super::config::Protocol;
use super::conflict::Place;
use super::event::{DiskOk, IoError, Output, RequestError, RequestOp};
use super::fault::Fault;
use super::interval::LockOwner;
use super::repair::FailedIo;
use super::request::{Answer, Leg};
use super::state::{ConnState, DiskState, ReplState, Role};
use super::timer::Timer;
use super::transfer_log::EpochNr;
use lockstep_proto::v1;

/// An epoch that is complete waits this long for a reason to send its barrier.
const IDLE_BARRIER_MS: u64 = 5;

impl Resource {
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
        if self.requests.contains(key) {
            self.share_range(key);
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
                self.go_on_without(volume);
                if !self.requests.contains(key) {
                    return;
                }
            }
        }
        if answer != Answer::Received {
            self.ordered(key);
        }
        self.settle_in_sync(key);
        self.try_complete(key);
    }

    /// The peer does not have a write that this copy has. If both stopped now, the peer might come back
    /// alone and call its copy good: a new generation before the write is told done (SEM §12).
    fn go_on_without(&mut self, volume: usize) {
        let device = &self.devices[volume];
        let alone = self.md_primary && device.disk == DiskState::UpToDate && device.uuids.bitmap == 0;
        // At the end of a resync its target has this very generation, maybe durably, and its source still the base.
        // A generation begun in the middle of it would be unknown to the target: the connection goes first.
        let ends = device.resync.as_ref().is_some_and(|resync| resync.source)
            && device.peer_may_have_current
            && device.peer_said == DiskState::UpToDate;
        if alone {
            self.bump_uuid(volume, true);
        } else if ends && self.md_primary && device.disk == DiskState::UpToDate {
            self.drop_session(
                ConnState::NetworkFailure,
                "the peer refused a write at the end of the resync; starting over",
            );
        }
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
                if self.suspension.fails_frozen() {
                    self.finish_request(key, Err(RequestError::Io));
                }
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
            let noted_only = good && request.peer == Leg::None && request.op != RequestOp::Read;
            let untold = noted_only && self.target_untold(volume);
            if untold {
                self.arm_ko();
            }
            if untold || (at_peer_only && self.degradation_unknown(volume)) {
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

    /// What held writes back may have ended without a word of its own. Called after each input.
    pub(super) fn progress_held(&mut self, volume: usize) {
        let device = &self.devices[volume];
        let held =
            device.uuid_gate.is_some() || self.degradation_unknown(volume) || self.target_untold(volume);
        if !device.gated.is_empty() && !held {
            self.retry_held(volume);
        }
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
        self.order_anew(key);
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
}
