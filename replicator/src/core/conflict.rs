//! Overlapping writes of two Primaries (SEM §18): both copies end with the same bytes.
//!
//! The node with the lower id **orders**, the other one **follows**. Both streams are FIFO.
//!
//! Invariants:
//!
//! * **One order.** The order of overlapping writes is the order in which they get their range on the
//!   ordering node. There a write of the peer waits for every own write that was there before it.
//! * **The follower knows that order without a message for it.** The ordering node sends a write while
//!   it holds the range, and acknowledges a write of the follower when it gives its range back. So a
//!   write that reaches the follower before the acknowledgement of an own one was ordered before it,
//!   and one that comes later was ordered behind it.
//! * **The follower's disk follows it.** A write of the peer goes ahead of every own write that has no
//!   acknowledgement yet: the own one hands its range over (when its disk is done with it), waits, and
//!   is then written again. It completes only when that is done.
//! * **Nobody waits in a circle.** On the follower a write of the peer waits only for the disk, for own
//!   writes that are acknowledged, and for resync; on the ordering node it may wait for own writes,
//!   which wait only for the follower.
//! * **A cut leaves marks.** An own write is in the transfer log and its extent is hot from before it is
//!   sent until the peer declared it stable, also while it is passed. Whatever is half-way on either
//!   side when the connection or a node is lost is marked by the node whose write it is.
//!
//! Applications of both nodes that write the same blocks at once may see, until both writes are
//! acknowledged, the one or the other. DRBD lets the ordering node supersede the follower's write; here
//! the follower's is the last word. No message and no time is spent where nothing overlaps.
use super::interval::LockOwner;
use super::request::Leg;
use super::{IoContext, Resource};
use crate::units::BlockRange;

/// Whether an own write has its place in the order of overlapping writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Place {
    /// It holds its range or waits for it, like any other.
    #[default]
    Own,
    /// A write of the peer goes first, as soon as the disk is done with this one.
    GivesWay,
    /// It handed its range over and waits to get it back.
    Passed,
}

impl Resource {
    /// This node takes over the peer's order of overlapping writes.
    pub(super) const fn follows(&self) -> bool {
        self.cfg.node_id > self.cfg.peer_node_id
    }

    /// A second Primary is allowed. Only with protocol C: the order needs every write acknowledged.
    pub(super) fn two_primaries_allowed(&self) -> bool {
        self.cfg.net.allow_two_primaries && self.cfg.net.protocol == super::config::Protocol::C
    }

    /// A write of the peer is about to take this range: own writes it goes ahead of let it pass.
    pub(super) fn make_way(&mut self, volume: usize, range: BlockRange) {
        if !self.follows() {
            return;
        }
        let holding: Vec<usize> = self.devices[volume].locks.requests_holding(range).collect();
        for key in holding {
            // Letting one pass may have ended another.
            let Some(request) = self.requests.get_mut(key) else { continue };
            if request.place != Place::Own || !request.unordered() {
                continue;
            }
            request.place = Place::GivesWay;
            if !request.on_disk() {
                self.hand_over(key);
            }
        }
    }

    /// Lets the writes of the peer pass that go first.
    pub(super) fn hand_over(&mut self, key: usize) {
        let request = &mut self.requests[key];
        debug_assert_eq!(request.place, Place::GivesWay);
        debug_assert!(
            !self.devices[request.volume].locks.shares(LockOwner::Request(key)),
            "a write that others went on beside lets none pass"
        );
        request.place = Place::Passed;
        if request.local == Leg::Ok {
            request.local = Leg::Pending;
            request.rewrite = true;
        }
        let (volume, range) = (request.volume, request.range);
        let mut granted = std::mem::take(&mut self.granted);
        self.devices[volume].locks.hand_over(range, LockOwner::Request(key), &mut granted);
        self.run_granted(volume, granted);
    }

    /// The peer answered this write, or never will: writes that come from now on go behind it.
    pub(super) fn ordered(&mut self, key: usize) {
        let request = &self.requests[key];
        if request.place != Place::Own {
            self.devices[request.volume].locks.order(LockOwner::Request(key));
        }
    }

    /// The range is held (or asked for anew, if it was shared) and the write goes to the copies again, as if it had
    /// just come: on the ordering node it stands behind what that one has sent since, which may wait for this range here.
    pub(super) fn order_anew(&mut self, key: usize) {
        let (volume, range) = (self.requests[key].volume, self.requests[key].range);
        if !self.lock_anew(key) {
            return;
        }
        if self.follows() {
            self.devices[volume].locks.unorder(LockOwner::Request(key));
        }
        self.request_locked(key);
        if self.devices[volume].locks.wanted_by_peer(range) {
            self.make_way(volume, range);
        }
    }

    /// What passed is on the disk and the range is back: the own write goes on top.
    pub(super) fn write_again(&mut self, key: usize) {
        let request = &mut self.requests[key];
        if !std::mem::take(&mut request.rewrite) {
            return self.try_complete(key);
        }
        let (volume, range) = (request.volume, request.range);
        if self.devices[volume].writable() {
            self.outdate_resync_replies(volume, range);
            self.submit_local_write(key);
        } else {
            // The disk left meanwhile, with the other write on it.
            self.requests[key].local = Leg::Failed;
            self.devices[volume].mark(range);
            self.try_complete(key);
        }
    }

    /// An own write that goes on top of this one at the peer is not on this disk: it failed here, or was
    /// sent before the disk took part. What was marked for it stays marked.
    pub(super) fn lies_under_missing_write(&self, volume: usize, range: BlockRange) -> bool {
        self.requests.iter().any(|(_, request)| {
            request.volume == volume && request.missing_here() && request.range.overlaps(range)
        })
    }

    /// The local leg of a write goes to the disk.
    pub(super) fn submit_local_write(&mut self, key: usize) {
        let (volume, op, range, fua, buffer) = self.requests[key].start_local();
        self.submit_io(volume, op, Some(range), fua, buffer, IoContext::Request(key));
    }
}
