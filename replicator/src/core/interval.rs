//! Range locks of one volume: application writes, mirrored writes, resync reads and writes.
//!
//! Promises: no two held ranges overlap; a range waits only for ranges that were asked for earlier
//! (first come, first served per overlap), so nobody starves. Reads of the application take no lock.
use crate::units::BlockRange;
use std::collections::VecDeque;

/// Who holds or wants a range: a key into the owner's table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockOwner {
    /// A write of the local application.
    Request(usize),
    /// A write of the peer.
    Peer(usize),
    /// A resync read on the source, held until the target wrote it.
    ResyncSource(usize),
    /// A resync write on the target.
    ResyncTarget(usize),
}

/// See the module.
#[derive(Debug, Default)]
pub struct IntervalLocks {
    /// Sorted by start; never overlapping.
    held: Vec<(BlockRange, LockOwner)>,
    waiting: VecDeque<(BlockRange, LockOwner)>,
}

impl IntervalLocks {
    /// Takes the range at once, or queues the owner: [`IntervalLocks::unlock`] will name it later.
    pub fn lock(&mut self, range: BlockRange, owner: LockOwner) -> bool {
        if self.overlaps_held(range) || self.waiting.iter().any(|(other, _)| other.overlaps(range)) {
            self.waiting.push_back((range, owner));
            return false;
        }
        self.insert(range, owner);
        true
    }

    /// Lets a held range go; appends the owners that hold theirs now.
    ///
    /// # Panics
    /// `owner` does not hold `range`: our own broken bookkeeping.
    pub fn unlock(&mut self, range: BlockRange, owner: LockOwner, granted: &mut Vec<LockOwner>) {
        let at = self.held.partition_point(|(held, _)| held.start() < range.start());
        assert!(
            self.held.get(at).is_some_and(|held| *held == (range, owner)),
            "{owner:?} unlocks {range:?} it does not hold"
        );
        self.held.remove(at);
        self.grant(granted);
    }

    /// Takes back a request that still waits; `false` when it does not wait.
    pub fn cancel(&mut self, owner: LockOwner, granted: &mut Vec<LockOwner>) -> bool {
        let Some(at) = self.waiting.iter().position(|(_, other)| *other == owner) else { return false };
        self.waiting.remove(at);
        self.grant(granted);
        true
    }

    /// Nothing held, nothing waiting.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.held.is_empty() && self.waiting.is_empty()
    }

    /// How many wait.
    #[must_use]
    pub fn nr_waiting(&self) -> usize {
        self.waiting.len()
    }

    fn grant(&mut self, granted: &mut Vec<LockOwner>) {
        let mut at = 0;
        while at < self.waiting.len() {
            let (range, owner) = self.waiting[at];
            let blocked = self.overlaps_held(range)
                || self.waiting.iter().take(at).any(|(earlier, _)| earlier.overlaps(range));
            if blocked {
                at += 1;
            } else {
                self.waiting.remove(at);
                self.insert(range, owner);
                granted.push(owner);
            }
        }
    }

    fn overlaps_held(&self, range: BlockRange) -> bool {
        // Held ranges do not overlap each other, so only the neighbours can overlap this one.
        let at = self.held.partition_point(|(held, _)| held.start() < range.start());
        self.held.get(at).is_some_and(|(held, _)| held.overlaps(range))
            || at.checked_sub(1).is_some_and(|before| self.held[before].0.overlaps(range))
    }

    fn insert(&mut self, range: BlockRange, owner: LockOwner) {
        let at = self.held.partition_point(|(held, _)| held.start() < range.start());
        self.held.insert(at, (range, owner));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{Sector, SectorCount};
    use proptest::prelude::*;

    fn range(start: u64, len: u64) -> BlockRange {
        BlockRange::new(Sector(start), SectorCount(len)).unwrap()
    }

    #[test]
    fn a_later_overlap_waits_for_an_earlier_waiter() {
        let mut locks = IntervalLocks::default();
        let mut granted = Vec::new();
        assert!(locks.lock(range(0, 10), LockOwner::Request(0)));
        assert!(!locks.lock(range(5, 10), LockOwner::Request(1)));
        // Free of the held range, but it overlaps the waiter.
        assert!(!locks.lock(range(12, 4), LockOwner::Request(2)));
        assert!(locks.lock(range(20, 1), LockOwner::Request(3)));
        locks.unlock(range(0, 10), LockOwner::Request(0), &mut granted);
        assert_eq!(granted, [LockOwner::Request(1)]);
        granted.clear();
        locks.unlock(range(5, 10), LockOwner::Request(1), &mut granted);
        assert_eq!(granted, [LockOwner::Request(2)]);
    }

    proptest! {
        #[test]
        fn held_ranges_never_overlap_and_everybody_gets_a_turn(ops in proptest::collection::vec((0_u64..64, 1_u64..16, any::<bool>()), 1..120)) {
            let mut locks = IntervalLocks::default();
            let mut holding: Vec<(BlockRange, LockOwner)> = Vec::new();
            let mut all: Vec<BlockRange> = Vec::new();
            let mut served = 0;
            for (start, len, release) in ops {
                let owner = LockOwner::Request(all.len());
                let wanted = range(start, len);
                all.push(wanted);
                if locks.lock(wanted, owner) { holding.push((wanted, owner)); }
                if release && !holding.is_empty() {
                    let (held, owner) = holding.remove(0);
                    served += 1;
                    let mut granted = Vec::new();
                    locks.unlock(held, owner, &mut granted);
                    for owner in granted {
                        let LockOwner::Request(key) = owner else { unreachable!() };
                        holding.push((all[key], owner));
                    }
                }
                for (at, (one, _)) in holding.iter().enumerate() {
                    for (other, _) in &holding[at + 1..] { prop_assert!(!one.overlaps(*other)); }
                }
            }
            while !holding.is_empty() {
                let (held, owner) = holding.remove(0);
                served += 1;
                let mut granted = Vec::new();
                locks.unlock(held, owner, &mut granted);
                for owner in granted {
                    let LockOwner::Request(key) = owner else { unreachable!() };
                    holding.push((all[key], owner));
                }
            }
            prop_assert_eq!(served, all.len());
            prop_assert!(locks.is_idle());
        }
    }
}
