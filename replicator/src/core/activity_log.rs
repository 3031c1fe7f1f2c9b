//! Which 4 MiB extents are hot, durably (SEM §10, DISK §7).
//!
//! Promises I3: an extent is hot only after its transaction is durable; it leaves the table only when
//! nothing in it is in flight, and the caller has made its bitmap pages and data durable before the
//! transaction that evicts it. Changes are collected: one transaction carries up to 64.
//!
//! ```text
//! cold --collect()--> pending --commit()--> hot (refs > 0) --release()--> hot (refs 0, LRU)
//!                                              ^--- acquire() ----------------'    |
//! cold <--------------------------- victim of another collect() -------------------'
//! ```
use crate::meta::AlTransaction;
use std::ops::Range;

/// Changes in one transaction at most (DISK §7.1).
pub const MAX_UPDATES: usize = 64;
/// Slots shown in the context of one transaction (DISK §7.1).
pub const CONTEXT_SLOTS: usize = 919;
/// Fewest slots (SEM §10).
pub const MIN_SLOTS: u32 = 67;
/// Most slots (SEM §10).
pub const MAX_SLOTS: u32 = 65_534;

const FREE: u32 = u32::MAX;
const NO_SLOT: u16 = u16::MAX;

#[derive(Clone, Copy, Debug)]
struct Slot {
    extent: u32,
    refs: u32,
    /// In the open transaction: not hot yet.
    pending: bool,
    /// Data writes completed when the extent was last released; decides whether eviction needs a flush.
    last_write: u64,
    prev: u16,
    next: u16,
}

/// See the module.
#[derive(Debug)]
pub struct ActivityLog {
    slots: Vec<Slot>,
    /// Slot of each extent, [`NO_SLOT`] = cold.
    index: Vec<u16>,
    /// Least and most recently used of the slots without references.
    head: u16,
    tail: u16,
    /// What the disk says each slot holds: the labels before the open transaction.
    on_disk: Vec<u32>,
    open: Vec<u16>,
    next_number: u32,
    cursor: u16,
}

/// What must be durable before a collected transaction may be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Collected {
    /// The block to write.
    pub transaction: AlTransaction,
    /// Extents that leave the log: their bitmap pages must be durable first.
    pub evicted: Vec<u32>,
    /// The highest write count at release of those: data written up to then must be flushed first.
    pub flush_up_to: u64,
}

impl ActivityLog {
    /// An empty log of `nr_slots` over `nr_extents`, its ring on disk freshly initialised.
    #[must_use]
    pub fn new(nr_slots: u32, nr_extents: u64) -> Self {
        let nr_slots = nr_slots.clamp(MIN_SLOTS, MAX_SLOTS) as usize;
        let mut log = Self {
            slots: vec![
                Slot {
                    extent: FREE,
                    refs: 0,
                    pending: false,
                    last_write: 0,
                    prev: NO_SLOT,
                    next: NO_SLOT
                };
                nr_slots
            ],
            index: Vec::new(),
            head: NO_SLOT,
            tail: NO_SLOT,
            on_disk: vec![FREE; nr_slots],
            open: Vec::new(),
            next_number: 0,
            cursor: 0,
        };
        log.resize(nr_extents);
        for slot in 0..log.slots.len() {
            log.lru_push(slot_number(slot));
        }
        log
    }

    /// Covers `nr_extents` from now on.
    pub fn resize(&mut self, nr_extents: u64) {
        self.index.resize(usize::try_from(nr_extents).unwrap_or(usize::MAX), NO_SLOT);
    }

    /// Takes a reference on every extent of the range if all are hot.
    pub fn acquire(&mut self, extents: Range<u64>) -> bool {
        let hot =
            extents.clone().all(|extent| self.slot_of(extent).is_some_and(|slot| !self.slot(slot).pending));
        if hot {
            self.reference(extents);
        }
        hot
    }

    /// Whether a transaction is being written.
    #[must_use]
    pub fn is_open(&self) -> bool {
        !self.open.is_empty()
    }

    /// Puts the extents of one request into the transaction being collected and references them.
    /// `false`: they do not fit (64 changes, or every slot is in use) and nothing was changed.
    pub fn collect(&mut self, extents: Range<u64>) -> bool {
        let cold = extents.clone().filter(|extent| self.slot_of(*extent).is_none()).count();
        // Extents of this very range that are in the LRU must not be chosen as victims: reference them first.
        let warm: Vec<u64> = extents.clone().filter(|extent| self.slot_of(*extent).is_some()).collect();
        for extent in &warm {
            self.reference(*extent..*extent + 1);
        }
        if self.open.len() + cold > MAX_UPDATES || self.lru_len_at_least(cold) < cold {
            for extent in warm {
                self.release(extent..extent + 1, 0);
            }
            return false;
        }
        for extent in extents {
            if self.slot_of(extent).is_some() {
                continue;
            }
            let victim = self.head;
            self.lru_remove(victim);
            let old = self.slots[victim as usize].extent;
            if old != FREE {
                self.index[old as usize] = NO_SLOT;
            }
            let number = extent_number(extent);
            let slot = &mut self.slots[victim as usize];
            slot.extent = number;
            slot.refs = 1;
            slot.pending = true;
            self.index[number as usize] = victim;
            self.open.push(victim);
        }
        true
    }

    /// Ends collecting: the transaction to write and what must be durable before it.
    /// `None` when nothing needs to be written.
    pub fn seal(&mut self) -> Option<Collected> {
        if self.open.is_empty() {
            return None;
        }
        let start = self.cursor as usize;
        let end = (start + CONTEXT_SLOTS).min(self.on_disk.len());
        let mut evicted = Vec::new();
        let mut flush_up_to = 0;
        let mut updates = Vec::with_capacity(self.open.len());
        for slot in &self.open {
            let was = self.on_disk[*slot as usize];
            if was != FREE {
                evicted.push(was);
                flush_up_to = flush_up_to.max(self.slots[*slot as usize].last_write);
            }
            updates.push((*slot, self.slots[*slot as usize].extent));
        }
        let transaction = AlTransaction {
            number: self.next_number,
            updates,
            context_size: slot_number(self.slots.len()),
            context_start_slot: self.cursor,
            context: self.on_disk[start..end].to_vec(),
        };
        self.next_number = self.next_number.wrapping_add(1);
        self.cursor = if end == self.on_disk.len() { 0 } else { slot_number(end) };
        Some(Collected { transaction, evicted, flush_up_to })
    }

    /// The sealed transaction is durable: its extents are hot.
    pub fn commit(&mut self) {
        for slot in std::mem::take(&mut self.open) {
            let entry = &mut self.slots[slot as usize];
            entry.pending = false;
            self.on_disk[slot as usize] = entry.extent;
        }
    }

    /// Gives one reference on every extent of the range back. `writes_done` is the count of data writes
    /// completed on the disk so far.
    ///
    /// # Panics
    /// An extent of the range is not referenced: our own broken bookkeeping.
    pub fn release(&mut self, extents: Range<u64>, writes_done: u64) {
        for extent in extents {
            let slot = self.slot_of(extent);
            assert!(slot.is_some(), "activity-log extent {extent} released but not in the log");
            let Some(slot) = slot else { continue };
            let entry = &mut self.slots[slot as usize];
            assert!(entry.refs > 0, "activity-log extent {extent} released more often than referenced");
            entry.refs -= 1;
            entry.last_write = entry.last_write.max(writes_done);
            if entry.refs == 0 {
                self.lru_push(slot);
            }
        }
    }

    /// Slots of the table.
    #[must_use]
    pub fn nr_slots(&self) -> u32 {
        u32::try_from(self.slots.len()).unwrap_or(MAX_SLOTS)
    }

    /// References held by requests in flight.
    #[must_use]
    pub fn references(&self) -> u64 {
        self.slots.iter().map(|slot| u64::from(slot.refs)).sum()
    }

    /// Extents with writes in flight.
    #[must_use]
    pub fn extents_in_use(&self) -> u64 {
        self.slots.iter().filter(|slot| slot.refs > 0).count() as u64
    }

    fn slot_of(&self, extent: u64) -> Option<u16> {
        let slot = self.index.get(usize::try_from(extent).ok()?).copied()?;
        (slot != NO_SLOT).then_some(slot)
    }

    fn slot(&self, slot: u16) -> &Slot {
        &self.slots[slot as usize]
    }

    fn reference(&mut self, extents: Range<u64>) {
        for extent in extents {
            let Some(slot) = self.slot_of(extent) else { continue };
            if self.slots[slot as usize].refs == 0 {
                self.lru_remove(slot);
            }
            self.slots[slot as usize].refs += 1;
        }
    }

    /// Length of the LRU list, counted no further than `enough`.
    fn lru_len_at_least(&self, enough: usize) -> usize {
        let mut seen = 0;
        let mut at = self.head;
        while at != NO_SLOT && seen < enough {
            seen += 1;
            at = self.slots[at as usize].next;
        }
        seen
    }

    fn lru_push(&mut self, slot: u16) {
        let tail = self.tail;
        let entry = &mut self.slots[slot as usize];
        entry.prev = tail;
        entry.next = NO_SLOT;
        if tail == NO_SLOT {
            self.head = slot;
        } else {
            self.slots[tail as usize].next = slot;
        }
        self.tail = slot;
    }

    fn lru_remove(&mut self, slot: u16) {
        let Slot { prev, next, .. } = self.slots[slot as usize];
        if prev == NO_SLOT {
            self.head = next;
        } else {
            self.slots[prev as usize].next = next;
        }
        if next == NO_SLOT {
            self.tail = prev;
        } else {
            self.slots[next as usize].prev = prev;
        }
    }
}

/// Slot numbers fit: at most [`MAX_SLOTS`].
#[expect(clippy::cast_possible_truncation, reason = "at most MAX_SLOTS = 65534 slots")]
const fn slot_number(slot: usize) -> u16 {
    slot as u16
}

/// Extent numbers fit: 2^32 extents of 4 MiB are 16 EiB.
#[expect(clippy::cast_possible_truncation, reason = "the index has an entry for it, so it is below 2^32")]
const fn extent_number(extent: u64) -> u32 {
    extent as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[test]
    fn an_extent_is_hot_only_after_its_commit() {
        let mut log = ActivityLog::new(67, 1000);
        assert!(!log.acquire(3..4));
        assert!(log.collect(3..5));
        assert!(!log.acquire(3..4), "the transaction is not durable yet");
        let sealed = log.seal().unwrap();
        assert_eq!(sealed.transaction.updates, [(0, 3), (1, 4)]);
        assert!(sealed.evicted.is_empty());
        assert!(sealed.transaction.context.iter().all(|extent| *extent == FREE));
        log.commit();
        assert!(log.acquire(3..4));
        log.release(3..4, 1);
        log.release(3..5, 2);
        assert_eq!(log.references(), 0);
    }

    #[test]
    fn a_full_log_waits_and_then_evicts_the_least_recently_used() {
        let mut log = ActivityLog::new(67, 1000);
        for extent in 0..67 {
            if !log.collect(extent..extent + 1) {
                log.seal().unwrap();
                log.commit();
                assert!(log.collect(extent..extent + 1));
            }
        }
        log.seal().unwrap();
        log.commit();
        assert!(!log.collect(100..101), "every slot is in use");
        log.release(5..6, 9);
        log.release(4..5, 11);
        assert!(log.collect(100..101));
        let sealed = log.seal().unwrap();
        assert_eq!(sealed.evicted, [5]);
        assert_eq!(sealed.flush_up_to, 9);
        assert!(!log.acquire(5..6), "the victim is cold from now on");
    }

    proptest! {
        /// Replaying all transactions gives at least the extents that are hot or pending.
        #[test]
        fn the_disk_always_knows_every_hot_extent(ops in proptest::collection::vec((0_u64..300, 1_u64..4, 0_u8..4), 1..400)) {
            let mut log = ActivityLog::new(67, 303);
            let mut table = vec![FREE; 67];
            let mut held: Vec<Range<u64>> = Vec::new();
            for (start, len, action) in ops {
                let range = start..start + len;
                if action == 0 && !held.is_empty() {
                    log.release(held.remove(0), 1);
                } else if log.acquire(range.clone()) {
                    held.push(range);
                } else if log.collect(range.clone()) {
                    let sealed = log.seal();
                    if let Some(sealed) = sealed {
                        let t = sealed.transaction;
                        for (offset, extent) in t.context.iter().enumerate() {
                            prop_assert_eq!(table[t.context_start_slot as usize + offset], *extent);
                        }
                        for (slot, extent) in t.updates { table[slot as usize] = extent; }
                    }
                    log.commit();
                    held.push(range);
                }
                let on_disk: BTreeSet<u32> = table.iter().copied().collect();
                for range in &held {
                    for extent in range.clone() { prop_assert!(on_disk.contains(&extent_number(extent))); }
                }
            }
            for range in held { log.release(range, 2); }
            prop_assert_eq!(log.references(), 0);
        }
    }
}
