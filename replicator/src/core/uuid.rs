//! Generation identifiers: what names the data of a node, and how it changes (SEM §12).
//!
//! What two nodes conclude from theirs is in `compare.rs`.
use crate::meta::UUID_JUST_CREATED;
use serde::{Deserialize, Serialize};

/// Added to the bitmap identifier when a resync starts (SEM §12).
pub const SYNC_START_OFFSET: u64 = 0x0001_0000_0000_0000;
/// Starts of a resync that can be told apart: half the circle of what the offset counts.
const MAX_STARTS: u64 = 0x7fff;

/// Bit 0 says "was Primary" and never takes part in comparisons.
#[must_use]
pub const fn masked(uuid: u64) -> u64 {
    uuid & !1
}

/// Never written, or just created: it names no data.
#[must_use]
pub const fn is_fresh(uuid: u64) -> bool {
    masked(uuid) == UUID_JUST_CREATED || masked(uuid) == 0
}

/// `later` was made from `base` by starting a resync once or several times. The bits stay relative to
/// the base all the while, so whoever still names the base, or a start in between, lacks nothing else.
#[must_use]
pub const fn started_from(base: u64, later: u64) -> bool {
    let apart = masked(later).wrapping_sub(masked(base));
    let starts = apart / SYNC_START_OFFSET;
    !is_fresh(base)
        && later != 0
        && apart.is_multiple_of(SYNC_START_OFFSET)
        && starts >= 1
        && starts <= MAX_STARTS
}

/// The identifiers of one side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct UuidSet {
    /// Names the data on this node.
    pub current: u64,
    /// Generation the set bits are relative to; 0 = none.
    pub bitmap: u64,
    /// Earlier generations, newest first.
    pub history: [u64; 2],
}

impl UuidSet {
    /// As stored in a superblock.
    #[must_use]
    pub const fn from_array(uuid: [u64; 4]) -> Self {
        Self { current: uuid[0], bitmap: uuid[1], history: [uuid[2], uuid[3]] }
    }

    /// As stored in a superblock.
    #[must_use]
    pub const fn to_array(self) -> [u64; 4] {
        [self.current, self.bitmap, self.history[0], self.history[1]]
    }

    /// A new generation that the peer does not have: bitmap := current, current := `fresh`.
    pub const fn bump(&mut self, fresh: u64) {
        self.bitmap = self.current;
        self.current = fresh;
    }

    /// A new generation whose bits are still relative to the same older one: current goes to the history.
    pub const fn bump_keeping_base(&mut self, fresh: u64) {
        self.push_history(self.current);
        self.current = fresh;
    }

    /// The peer has everything: the bitmap identifier moves to the history.
    pub const fn clear_bitmap(&mut self) {
        if self.bitmap != 0 {
            self.push_history(self.bitmap);
            self.bitmap = 0;
        }
    }

    /// A resync from here starts (SEM §12 "SyncSource starts").
    ///
    /// Without a base the target has this very generation, so the name is made from it and not drawn
    /// (DRBD draws one): a target that never hears of it is known again by its generation.
    pub const fn start_as_source(&mut self, random: u64) {
        let old = self.bitmap;
        self.bitmap = if old == 0 && !is_fresh(self.current) {
            masked(self.current).wrapping_add(SYNC_START_OFFSET)
        } else if is_fresh(old) {
            random
        } else {
            old.wrapping_add(SYNC_START_OFFSET)
        };
        if old != 0 {
            self.push_history(old);
        }
    }

    const fn push_history(&mut self, uuid: u64) {
        self.history = [uuid, self.history[0]];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn starts_of_a_resync_are_recognised_however_often_it_was_interrupted() {
        let base = 0x1234_5678_9abc_def0;
        let mut source = UuidSet::from_array([0x200, base | 1, 0, 0]);
        for start in 1..100 {
            source.start_as_source(7);
            assert!(started_from(base, source.bitmap), "start {start}");
            assert!(!started_from(source.bitmap, base), "start {start}");
        }
        assert!(
            !started_from(base, base) && !started_from(base, base + 2) && !started_from(0, SYNC_START_OFFSET)
        );
        // The count wraps around without harm.
        assert!(started_from(0xffff_0000_0000_0100, 0x0003_0000_0000_0100));
    }
}
