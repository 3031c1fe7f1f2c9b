//! Range locks of one volume: application writes, mirrored writes, resync reads and writes.
//!
//! Promises: no two held ranges overlap; of two that overlap, the one that goes first (`before`) is
//! fixed when the later one arrives, so nobody starves. Reads of the application take no lock.
//!
//! A write whose data is on the local disk may *share* its range: other writes of this node go on
//! beside it, everybody else still waits for it (`core/overlap.rs` says when).
//!
//! With one Primary that is first come, first served. With two, a write of this node that the other
//! one has not ordered yet *yields*: writes of the peer go ahead of it, and it can be asked to hand
//! back a range it holds (`core/conflict.rs` says when and why). A verify yields then, too: the write it
//! waits for may itself wait, on the other node, for a write of the peer that would stand behind it here.
use crate::units::BlockRange;

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
    /// A verify read on the node that asks.
    VerifyAsk(usize),
    /// A verify read on the node that answers.
    VerifyAnswer(usize),
}

impl LockOwner {
    /// The key of a write of the local application.
    const fn request(self) -> Option<usize> {
        match self {
            Self::Request(key) => Some(key),
            Self::Peer(_)
            | Self::ResyncSource(_)
            | Self::ResyncTarget(_)
            | Self::VerifyAsk(_)
            | Self::VerifyAnswer(_) => None,
        }
    }
}

/// A range that is held or wanted.
#[derive(Clone, Copy, Debug)]
struct Claim {
    range: BlockRange,
    owner: LockOwner,
    /// When it was asked for.
    ticket: u64,
    /// From which ticket on writes of the peer go behind it: its own ticket, or when it was ordered.
    turn: u64,
}

/// Whether `first` goes before `second`, which it overlaps.
const fn before(first: &Claim, second: &Claim) -> bool {
    match (first.owner, second.owner) {
        (
            LockOwner::Request(_) | LockOwner::VerifyAsk(_) | LockOwner::VerifyAnswer(_),
            LockOwner::Peer(_),
        ) => first.turn < second.ticket,
        (
            LockOwner::Peer(_),
            LockOwner::Request(_) | LockOwner::VerifyAsk(_) | LockOwner::VerifyAnswer(_),
        ) => second.turn >= first.ticket,
        // The peer may be waiting for this very write before it lets the resync go on.
        (LockOwner::ResyncSource(_), LockOwner::Peer(_)) => false,
        _ => first.ticket < second.ticket,
    }
}

/// See the module.
#[derive(Debug, Default)]
pub struct IntervalLocks {
    /// Sorted by start; never overlapping.
    held: Vec<Claim>,
    /// Held, and no obstacle for other writes of this node. Nearly always empty.
    shared: Vec<Claim>,
    waiting: Vec<Claim>,
    tickets: u64,
}

impl IntervalLocks {
    /// Takes the range at once, or queues the owner: [`IntervalLocks::unlock`] will name it later.
    pub fn lock(&mut self, range: BlockRange, owner: LockOwner) -> bool {
        let ticket = self.next_ticket();
        self.claim(Claim { range, owner, ticket, turn: ticket })
    }

    /// The same for a write that writes of the peer go ahead of, until [`IntervalLocks::order`].
    pub fn lock_yielding(&mut self, range: BlockRange, owner: LockOwner) -> bool {
        let ticket = self.next_ticket();
        self.claim(Claim { range, owner, ticket, turn: u64::MAX })
    }

    fn claim(&mut self, claim: Claim) -> bool {
        if self.blocked(&claim) {
            self.waiting.push(claim);
            return false;
        }
        self.insert(claim);
        true
    }

    const fn next_ticket(&mut self) -> u64 {
        self.tickets += 1;
        self.tickets
    }

    /// A yielding owner has its place now: writes of the peer that come later go behind it.
    pub fn order(&mut self, owner: LockOwner) {
        let ticket = self.next_ticket();
        let claims = self.held.iter_mut().chain(&mut self.shared).chain(&mut self.waiting);
        for claim in claims.filter(|claim| claim.owner == owner && claim.turn == u64::MAX) {
            claim.turn = ticket;
        }
    }

    /// It is to be ordered anew: writes of the peer go ahead of it, also those that wait for it already.
    pub fn unorder(&mut self, owner: LockOwner) {
        let claims = self.held.iter_mut().chain(&mut self.shared).chain(&mut self.waiting);
        claims.filter(|claim| claim.owner == owner).for_each(|claim| claim.turn = u64::MAX);
    }

    fn holding_alone(&self, range: BlockRange) -> impl Iterator<Item = &Claim> + '_ {
        let first = self.held.partition_point(|claim| claim.range.end() <= range.start());
        self.held.iter().skip(first).take_while(move |claim| claim.range.overlaps(range))
    }

    fn holding(&self, range: BlockRange) -> impl Iterator<Item = &Claim> + '_ {
        self.holding_alone(range).chain(self.shared.iter().filter(move |claim| claim.range.overlaps(range)))
    }

    fn holding_or_waiting(&self, range: BlockRange) -> impl Iterator<Item = &Claim> + '_ {
        self.holding(range).chain(self.waiting.iter().filter(move |claim| claim.range.overlaps(range)))
    }

    /// Writes of the local application that hold a part of `range`.
    pub fn requests_holding(&self, range: BlockRange) -> impl Iterator<Item = usize> + '_ {
        self.holding(range).filter_map(|claim| claim.owner.request())
    }

    /// The same without those that share theirs.
    pub fn requests_holding_alone(&self, range: BlockRange) -> impl Iterator<Item = usize> + '_ {
        self.holding_alone(range).filter_map(|claim| claim.owner.request())
    }

    /// A write of the peer holds or wants a part of `range`.
    #[must_use]
    pub fn wanted_by_peer(&self, range: BlockRange) -> bool {
        self.holding_or_waiting(range).any(|claim| matches!(claim.owner, LockOwner::Peer(_)))
    }

    /// A write of the local application holds or wants a part of `range`.
    #[must_use]
    pub fn wanted_by_request(&self, range: BlockRange) -> bool {
        self.holding_or_waiting(range).any(|claim| matches!(claim.owner, LockOwner::Request(_)))
    }

    /// The first range within `range`, by its start, that a write of the local application holds or wants.
    #[must_use]
    pub fn first_request(&self, range: BlockRange) -> Option<BlockRange> {
        self.holding_or_waiting(range)
            .filter(|claim| matches!(claim.owner, LockOwner::Request(_)))
            .map(|claim| claim.range)
            .min_by_key(|claimed| claimed.start())
    }

    /// Lets a held range go; appends the owners that hold theirs now.
    ///
    /// # Panics
    /// `owner` does not hold `range`: our own broken bookkeeping.
    pub fn unlock(&mut self, range: BlockRange, owner: LockOwner, granted: &mut Vec<LockOwner>) {
        self.take_held(range, owner);
        self.grant(range, granted);
    }

    /// Hands a held range to whoever goes first and waits for it again, at its old place.
    ///
    /// # Panics
    /// `owner` does not hold `range`: our own broken bookkeeping.
    pub fn hand_over(&mut self, range: BlockRange, owner: LockOwner, granted: &mut Vec<LockOwner>) {
        let claim = self.take_held(range, owner);
        let place = self.waiting.partition_point(|other| other.ticket < claim.ticket);
        self.waiting.insert(place, claim);
        self.grant(range, granted);
    }

    /// Lets other writes of this node go on beside a held one.
    ///
    /// # Panics
    /// `owner` does not hold `range`: our own broken bookkeeping.
    pub fn share(&mut self, range: BlockRange, owner: LockOwner, granted: &mut Vec<LockOwner>) {
        let claim = self.take_held(range, owner);
        self.shared.push(claim);
        self.grant(range, granted);
    }

    /// Gives a shared range back and asks for it anew, behind everybody who holds it or waits for it: `true`
    /// when it is held at once. What did not share its range keeps it.
    pub fn lock_anew(&mut self, owner: LockOwner, yielding: bool, granted: &mut Vec<LockOwner>) -> bool {
        let Some(at) = self.shared.iter().position(|claim| claim.owner == owner) else { return true };
        let range = self.shared.swap_remove(at).range;
        let held = if yielding { self.lock_yielding(range, owner) } else { self.lock(range, owner) };
        self.grant(range, granted);
        held
    }

    /// It shares its range with other writes of this node.
    #[must_use]
    pub fn shares(&self, owner: LockOwner) -> bool {
        self.shared.iter().any(|claim| claim.owner == owner)
    }

    /// Some write shares its range.
    #[must_use]
    pub fn any_shared(&self) -> bool {
        !self.shared.is_empty()
    }

    /// A write of the local application waits for a part of `range`.
    #[must_use]
    pub fn request_waits(&self, range: BlockRange) -> bool {
        let wants =
            |claim: &Claim| matches!(claim.owner, LockOwner::Request(_)) && claim.range.overlaps(range);
        self.waiting.iter().any(wants)
    }

    fn take_held(&mut self, range: BlockRange, owner: LockOwner) -> Claim {
        if let Some(at) = self.shared.iter().position(|claim| claim.owner == owner) {
            return self.shared.swap_remove(at);
        }
        let at = self.held.partition_point(|held| held.range.start() < range.start());
        assert!(
            self.held.get(at).is_some_and(|held| held.range == range && held.owner == owner),
            "{owner:?} unlocks {range:?} it does not hold"
        );
        self.held.remove(at)
    }

    /// Takes back a request that still waits; `false` when it does not wait.
    pub fn cancel(&mut self, owner: LockOwner, granted: &mut Vec<LockOwner>) -> bool {
        let Some(at) = self.waiting.iter().position(|claim| claim.owner == owner) else { return false };
        let range = self.waiting.remove(at).range;
        self.grant(range, granted);
        true
    }

    /// Nothing held, nothing waiting.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.held.is_empty() && self.shared.is_empty() && self.waiting.is_empty()
    }

    /// How many wait.
    #[must_use]
    pub fn nr_waiting(&self) -> usize {
        self.waiting.len()
    }

    /// `freed` is no longer in the way: only who overlaps it can go on now.
    fn grant(&mut self, freed: BlockRange, granted: &mut Vec<LockOwner>) {
        let mut at = 0;
        while at < self.waiting.len() {
            let claim = self.waiting[at];
            if !claim.range.overlaps(freed) || self.blocked(&claim) {
                at += 1;
            } else {
                self.waiting.remove(at);
                self.insert(claim);
                granted.push(claim.owner);
            }
        }
    }

    fn blocked(&self, claim: &Claim) -> bool {
        let goes_first = |other: &Claim| {
            other.ticket != claim.ticket && other.range.overlaps(claim.range) && before(other, claim)
        };
        let own = matches!(claim.owner, LockOwner::Request(_));
        self.overlaps_held(claim.range)
            || (!own && self.shared.iter().any(|shared| shared.range.overlaps(claim.range)))
            || self.waiting.iter().any(goes_first)
    }

    fn overlaps_held(&self, range: BlockRange) -> bool {
        // Held ranges do not overlap each other, so only the neighbours can overlap this one.
        let at = self.held.partition_point(|held| held.range.start() < range.start());
        self.held.get(at).is_some_and(|held| held.range.overlaps(range))
            || at.checked_sub(1).is_some_and(|before| self.held[before].range.overlaps(range))
    }

    fn insert(&mut self, claim: Claim) {
        let at = self.held.partition_point(|held| held.range.start() < claim.range.start());
        self.held.insert(at, claim);
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

    #[test]
    fn a_yielding_write_lets_the_peer_pass_until_it_is_ordered() {
        let mut locks = IntervalLocks::default();
        let mut granted = Vec::new();
        let mine = LockOwner::Request(0);
        assert!(locks.lock_yielding(range(0, 10), mine));
        assert!(!locks.lock(range(5, 10), LockOwner::Peer(0)), "held ranges never overlap");
        assert_eq!(locks.requests_holding(range(9, 1)).collect::<Vec<_>>(), [0]);
        locks.hand_over(range(0, 10), mine, &mut granted);
        assert_eq!(granted, [LockOwner::Peer(0)], "the write that came later goes first");
        // A second one passes it as well; one that comes after the decision does not.
        assert!(!locks.lock(range(6, 2), LockOwner::Peer(1)));
        locks.order(mine);
        assert!(!locks.lock(range(0, 1), LockOwner::Peer(2)));
        granted.clear();
        locks.unlock(range(5, 10), LockOwner::Peer(0), &mut granted);
        locks.unlock(range(6, 2), LockOwner::Peer(1), &mut granted);
        locks.unlock(range(0, 10), mine, &mut granted);
        assert_eq!(granted, [LockOwner::Peer(1), mine, LockOwner::Peer(2)]);
    }

    #[test]
    fn a_write_that_is_to_be_ordered_anew_lets_pass_what_waits_behind_it() {
        let mut locks = IntervalLocks::default();
        let mut granted = Vec::new();
        let mine = LockOwner::Request(0);
        assert!(locks.lock_yielding(range(0, 10), mine));
        locks.order(mine);
        assert!(!locks.lock(range(2, 2), LockOwner::Peer(0)));
        locks.unorder(mine);
        locks.hand_over(range(0, 10), mine, &mut granted);
        assert_eq!(granted, [LockOwner::Peer(0)]);
        granted.clear();
        locks.unlock(range(2, 2), LockOwner::Peer(0), &mut granted);
        assert_eq!(granted, [mine]);
    }

    #[test]
    fn a_write_of_the_peer_passes_a_resync_read_that_waits_but_not_one_that_holds() {
        let mut locks = IntervalLocks::default();
        let mut granted = Vec::new();
        assert!(locks.lock_yielding(range(0, 10), LockOwner::Request(0)));
        assert!(!locks.lock(range(0, 20), LockOwner::ResyncSource(0)));
        assert!(locks.lock(range(12, 2), LockOwner::Peer(0)));
        locks.unlock(range(0, 10), LockOwner::Request(0), &mut granted);
        assert!(granted.is_empty());
        locks.unlock(range(12, 2), LockOwner::Peer(0), &mut granted);
        assert_eq!(granted, [LockOwner::ResyncSource(0)]);
        assert!(!locks.lock(range(12, 2), LockOwner::Peer(1)));
    }

    #[test]
    fn a_shared_range_is_free_for_own_writes_only() {
        let mut locks = IntervalLocks::default();
        let mut granted = Vec::new();
        let (first, second, third) = (LockOwner::Request(0), LockOwner::Request(1), LockOwner::Request(2));
        assert!(locks.lock(range(0, 10), first));
        assert!(!locks.lock(range(5, 10), second));
        assert!(locks.request_waits(range(0, 10)));
        locks.share(range(0, 10), first, &mut granted);
        assert_eq!(granted, [second]);
        assert!(locks.any_shared() && locks.shares(first) && !locks.shares(second));
        assert_eq!(locks.requests_holding(range(6, 1)).collect::<Vec<_>>(), [1, 0]);
        // The one behind holds its range alone, until it shares it, too.
        assert!(!locks.lock(range(8, 1), third));
        granted.clear();
        locks.share(range(5, 10), second, &mut granted);
        assert_eq!(granted, [third]);
        // Everybody else waits for all of them, and whoever comes then stands behind.
        assert!(!locks.lock(range(0, 20), LockOwner::ResyncSource(0)));
        assert!(!locks.lock(range(1, 1), LockOwner::Request(3)));
        granted.clear();
        locks.unlock(range(8, 1), third, &mut granted);
        locks.unlock(range(0, 10), first, &mut granted);
        assert!(granted.is_empty());
        locks.unlock(range(5, 10), second, &mut granted);
        assert_eq!(granted, [LockOwner::ResyncSource(0)]);
        granted.clear();
        locks.unlock(range(0, 20), LockOwner::ResyncSource(0), &mut granted);
        assert_eq!(granted, [LockOwner::Request(3)]);
        locks.unlock(range(1, 1), LockOwner::Request(3), &mut granted);
        assert!(locks.is_idle());
    }

    #[test]
    fn a_range_locked_anew_stands_behind_what_went_on_beside_it() {
        let mut locks = IntervalLocks::default();
        let mut granted = Vec::new();
        let (first, second) = (LockOwner::Request(0), LockOwner::Request(1));
        assert!(locks.lock(range(0, 10), first));
        assert!(locks.lock_anew(first, false, &mut granted), "it never shared its range");
        locks.share(range(0, 10), first, &mut granted);
        assert!(locks.lock(range(0, 10), second));
        assert!(!locks.lock(range(4, 1), LockOwner::Peer(0)));
        assert!(!locks.lock_anew(first, false, &mut granted));
        locks.unlock(range(0, 10), second, &mut granted);
        assert_eq!(granted, [LockOwner::Peer(0)]);
        granted.clear();
        locks.unlock(range(4, 1), LockOwner::Peer(0), &mut granted);
        assert_eq!(granted, [first]);
        // Alone it has it at once, and the peer's goes on meanwhile if it yields.
        locks.share(range(0, 10), first, &mut granted);
        granted.clear();
        assert!(!locks.lock(range(4, 1), LockOwner::Peer(1)));
        assert!(!locks.lock_anew(first, true, &mut granted));
        assert_eq!(granted, [LockOwner::Peer(1)]);
        granted.clear();
        locks.unlock(range(4, 1), LockOwner::Peer(1), &mut granted);
        assert_eq!(granted, [first]);
        locks.unlock(range(0, 10), first, &mut granted);
        assert!(locks.is_idle());
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
