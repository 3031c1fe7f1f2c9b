//! The comparison of a disk that a node goes on from with what the application was told: which writes are missing, and
//! what excuses them (the table of `mod.rs`).
use super::{Excuse, History, NEVER, Past, Record, sectors_of};
use crate::sim::blocks::{Blocks, SECTORS_PER_BLOCK};
use lockstep_replicator::core::config::Protocol;

/// What is missing on a disk, with excuse: when the first of it from elsewhere was acked, and all of it.
#[derive(Debug, PartialEq, Eq)]
struct Missing {
    first: u64,
    lost: Vec<u32>,
}

impl History {
    /// Node `node` goes on from what its disk holds, in place of `view`.
    ///
    /// # Errors
    /// An acked write is missing without excuse, or a later one is there without it.
    ///
    /// # Panics
    /// As [`Self::wrong_now`].
    pub fn settle(
        &mut self,
        node: usize,
        view: usize,
        volume: usize,
        disk: &[u32],
        past: &Past,
        now: u64,
    ) -> Result<(), String> {
        let mut unsure = std::mem::take(&mut self.unsure[node][view][volume]);
        let asked = unsure.clone();
        let found = self.find_missing(node, view, volume, disk, past, now, asked.iter(), &mut unsure);
        self.unsure[node][view][volume] = unsure;
        if self.compare {
            let mut ignored = Blocks::default();
            let blocks = 0..disk.len().div_ceil(SECTORS_PER_BLOCK);
            let full = self.find_missing(node, view, volume, disk, past, now, blocks, &mut ignored);
            assert_eq!(found, full, "what changed, and the whole disk of n{node} in the view of n{view}");
        }
        let Missing { first, lost } = found?;
        if first != NEVER {
            // What was lost before the nodes met is not out of order with what was written since.
            let until = if first < past.met { past.met } else { NEVER };
            let newest = self.newest_foreign(node, volume, disk, until);
            if newest.0 > first {
                return Err(format!(
                    "write #{} is there, but not one that was acked before it was issued (order): volume {volume}, acked {} us, issued {} us, missing {lost:?}",
                    newest.1,
                    first / 1000,
                    newest.0 / 1000
                ));
            }
        }
        for number in lost {
            let fate = &mut self.records[number as usize].fate[view];
            fate.replaces = NEVER;
            fate.stable = false;
            self.ask_again(number, view);
        }
        Ok(())
    }

    /// When the newest write of the other node was issued, before `until`, that is on this disk, and its number.
    fn newest_foreign(&self, node: usize, volume: usize, disk: &[u32], until: u64) -> (u64, u32) {
        let mut newest = (0, 0);
        for value in disk.iter().filter(|value| **value != 0) {
            if let Some(there) = self.record(*value)
                && there.volume == volume
                && there.node != node
                && there.issued > newest.0
                && there.issued < until
            {
                newest = (there.issued, *value);
            }
        }
        newest
    }

    /// Looks for writes that are missing in these blocks, and takes those out of `unsure` where none is.
    #[expect(clippy::too_many_arguments, reason = "a question about two nodes, twice in one function")]
    fn find_missing(
        &self,
        node: usize,
        view: usize,
        volume: usize,
        disk: &[u32],
        past: &Past,
        now: u64,
        blocks: impl Iterator<Item = usize>,
        unsure: &mut Blocks,
    ) -> Result<Missing, String> {
        let mut found = Missing { first: NEVER, lost: Vec::new() };
        for block in blocks {
            let (from, to) = sectors_of(block, disk.len());
            let mut sure = true;
            for (sector, value) in (from..to).zip(&disk[from..to]) {
                if self.sectors[volume][sector].is_empty() {
                    // Nobody wrote here; what else may be there is for those who look at all sectors.
                    sure &= *value == 0;
                    continue;
                }
                if sector > from && disk[sector - 1] == *value && self.is_like_before(volume, sector) {
                    continue;
                }
                match self.candidate(view, volume, sector, *value, now) {
                    Ok(_) => sure &= self.is_old(view, volume, sector, now),
                    Err(None) => {
                        return Err(format!(
                            "something nobody wrote: {}",
                            self.explain(view, volume, sector, *value, now)
                        ));
                    }
                    Err(Some(best)) => {
                        sure = false;
                        self.judge_missing(
                            node,
                            view,
                            volume,
                            (sector, *value),
                            best,
                            past,
                            now,
                            &mut found,
                        )?;
                    }
                }
            }
            if sure {
                unsure.clear(block);
            }
        }
        found.lost.sort_unstable();
        found.lost.dedup();
        Ok(found)
    }

    /// A sector holds something that acked writes replace: each of those has an excuse, or that is an error.
    #[expect(clippy::too_many_arguments, reason = "one step of a loop")]
    fn judge_missing(
        &self,
        node: usize,
        view: usize,
        volume: usize,
        (sector, value): (usize, u32),
        best: u32,
        past: &Past,
        now: u64,
        found: &mut Missing,
    ) -> Result<(), String> {
        let end = self.records[best as usize].fate[view].end;
        for number in &self.sectors[volume][sector] {
            let other = &self.records[*number as usize];
            if other.issued <= end || other.fate[view].replaces >= now {
                continue;
            }
            match self.excuse(other, node, view, past) {
                Excuse::None => {
                    return Err(format!(
                        "acked write #{number} is missing: {}",
                        self.explain(view, volume, sector, value, now)
                    ));
                }
                Excuse::OnItsWay => {}
                Excuse::Lost => {
                    if other.node != node {
                        found.first = found.first.min(other.fate[view].replaces);
                    }
                    found.lost.push(*number);
                }
            }
        }
        Ok(())
    }

    fn excuse(&self, missing: &Record, node: usize, view: usize, past: &Past) -> Excuse {
        let fate = &missing.fate[node];
        if fate.landed {
            return Excuse::None;
        }
        let foreign = missing.node != node;
        if past.lost_power >= missing.issued && !missing.fate[view].stable {
            return Excuse::Lost;
        }
        // Both stopped before anybody knew what became of it, and the other copy counts.
        let shown = missing.fate[view].replaces;
        if missing.shown_early && view != node && past.viewer_crashed >= shown {
            return Excuse::Lost;
        }
        match missing.protocol {
            Protocol::A if foreign => Excuse::Lost,
            Protocol::B if foreign && past.crashed.max(past.attached) >= missing.issued => Excuse::Lost,
            Protocol::B if foreign => Excuse::OnItsWay,
            Protocol::A | Protocol::B | Protocol::C => Excuse::None,
        }
    }
}
