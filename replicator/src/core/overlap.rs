//! Overlapping writes of one node, in flight at once.
//!
//! A write holds its range until it is done, under protocol C for a round trip. An application that overwrites a
//! block faster than that would pay one round trip for each of its writes, one after the other. So a write lets
//! the next one of this node go on beside it as soon as the order of the two is fixed on both copies:
//!
//! * **Here**: the first is on the local disk before the second goes there.
//! * **At the peer**: the first was sent before the second, the stream is FIFO, and there a write waits for every
//!   one that came before it and overlaps it (`peer_request.rs`).
//!
//! Nobody but writes of this node goes on beside them: the peer's writes, resync and verify wait for all.
//!
//! It is done between two good copies only (`Established`): in a resync an acknowledgement clears marks, and must
//! speak for the newest write of its blocks. Nor beside a second Primary, where the order of overlapping writes is
//! that of the locks on one node (`conflict.rs`); the peer is not promoted while a range is shared. A write that goes
//! to the copies once more (`send_again`) asks for its range again and stands behind those that went on beside it:
//! they were in flight at once, so either order is right, and it is the same one on both copies.
use super::Resource;
use super::conflict::Place;
use super::event::RequestOp;
use super::fault::Fault;
use super::interval::LockOwner;
use super::request::Leg;
use super::state::{ReplState, Role};
use crate::units::BlockRange;

impl Resource {
    /// A write of this node has to wait for its range: who holds a part of it, and only waits for the peer, shares it.
    pub(super) fn share_ranges(&mut self, volume: usize, range: BlockRange) {
        let holding: Vec<usize> = self.devices[volume].locks.requests_holding_alone(range).collect();
        for key in holding {
            // Sharing one may have moved others on.
            if self.requests.contains(key) {
                self.share_range(key);
            }
        }
    }

    /// Shares the range of a write that waits for nothing but the peer, if an own write wants it.
    pub(super) fn share_range(&mut self, key: usize) {
        let request = &self.requests[key];
        let owner = LockOwner::Request(key);
        let (volume, range) = (request.volume, request.range);
        let device = &self.devices[volume];
        let here = request.local == Leg::Ok && !request.rewrite && !request.again;
        let on_its_way = request.submitted && !request.completed && request.peer == Leg::Pending;
        let shares = request.op != RequestOp::Read
            && (here || self.planted(Fault::OverlapBeforeDisk))
            && on_its_way
            && request.place == Place::Own
            && device.repl == ReplState::Established
            && !self.two_primaries_allowed()
            && self.peer_role != Role::Primary
            && !self.peer_promotes
            && device.locks.request_waits(range)
            && !device.locks.shares(owner);
        if !shares || self.planted(Fault::RequestsDoNotLock) {
            return;
        }
        let mut granted = std::mem::take(&mut self.granted);
        self.devices[volume].locks.share(range, owner, &mut granted);
        self.run_granted(volume, granted);
    }

    /// Some write of this node shares its range: a second Primary has to wait.
    pub(super) fn shares_ranges(&self) -> bool {
        self.devices.iter().any(|device| device.locks.any_shared())
    }

    /// Takes back a shared range; `false` when it has to be waited for.
    pub(super) fn lock_anew(&mut self, key: usize) -> bool {
        let volume = self.requests[key].volume;
        let yielding = self.follows();
        // Ranges before extents, always: who holds the range now may wait for the log.
        if self.devices[volume].locks.shares(LockOwner::Request(key))
            && std::mem::take(&mut self.requests[key].al)
        {
            let extents = self.requests[key].range.al_extents();
            self.al_end(volume, extents);
        }
        let mut granted = std::mem::take(&mut self.granted);
        let held = self.devices[volume].locks.lock_anew(LockOwner::Request(key), yielding, &mut granted);
        self.run_granted(volume, granted);
        held
    }
}
