//! Epochs of the transfer log and flushes of the application: what makes writes stable on both copies
//! (SEM §8).
//!
//! A barrier ends an epoch; its ack says that every write of the epoch is on stable storage at the peer. A
//! flush closes the open epoch and waits for that ack and for the local disk.
use super::IoContext;
use super::Resource;
use super::config::Protocol;
use super::device::MayMiss;
use super::event::{DiskOp, Output, Payload, RequestError, RequestId};
use super::fault::Fault;
use super::request::Leg;
use super::state::{DiskState, Role};
use super::timer::Timer;
use super::transfer_log::EpochNr;
use crate::units::VolumeNr;
use lockstep_proto::{Message, v1};

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
        if !self.tl.is_empty() || self.target_untold_since().is_some() {
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

    /// A disk that was on its way out stays: flushes that came meanwhile are its business again.
    pub(super) fn flush_what_stayed(&mut self, volume: usize) {
        let open = self.flushes.iter_mut().filter(|(_, flush)| flush.volume == volume);
        let left_out = open.filter(|(_, flush)| flush.local == Leg::None);
        let keys: Vec<usize> = left_out
            .map(|(key, flush)| {
                flush.local = Leg::Pending;
                key
            })
            .collect();
        for key in keys {
            self.submit_io(volume, DiskOp::Flush, None, false, None, IoContext::Flush(key));
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
            if self.suspension.fails_frozen() {
                let id = self.flushes.remove(key).id;
                self.out.push_back(Output::Complete { id, result: Err(RequestError::Io), data: None });
            }
            return;
        }
        let device = &self.devices[flush.volume];
        // Only the peer's copy is known to be stable. If both stopped now, this disk would be believed.
        let leaving = device.disk == DiskState::Detaching && device.went_on_at_peer.is_none();
        let believed = leaving || self.degradation_unknown(flush.volume);
        if flush.local != Leg::Ok
            && believed
            && device.peer_readable()
            && !self.planted(Fault::FlushSkipsDisk)
        {
            return;
        }
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
}
