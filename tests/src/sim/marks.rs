//! Where the two copies differ, and the rule that every such block is marked, or in a hot extent, durably, on at least
//! one node (number 10 of `oracle.rs`; I1). It is what a resync after any crash lives by.
//!
//! A block counts as different when the disks hold different data now, or would after a power cut of both. Comparing whole
//! disks each time would be too slow: the disks note which blocks changed, and only those are compared again
//! (`history.compare` checks that none was forgotten).
//!
//! Looked at once in so many events, and at each crash. Nothing needs a mark that the next handshake copies as a
//! whole: FULL_SYNC, a fresh disk, generations that no bitmap describes.
use super::blocks::SECTORS_PER_BLOCK;
use super::world::World;
use lockstep_replicator::core::uuid::masked;
use lockstep_replicator::meta::{UUID_JUST_CREATED, flags};
use lockstep_replicator::units::BITS_PER_AL_EXTENT;

impl World {
    /// Looks at the marks once in so many events: often enough to find a lost one, seldom enough to be cheap.
    pub(super) fn check_marks_now_and_then(&mut self) {
        self.oracle.unlooked += 1;
        if self.oracle.unlooked * 32_768 > 64 * self.options.sectors.max(32_768) {
            self.check_marks();
        }
    }

    /// A block that differs is marked or hot, durably, on at least one node (I10).
    pub fn check_marks(&mut self) {
        self.oracle.unlooked = 0;
        if !self.oracle.check_marks || self.broken.is_some() {
            return;
        }
        for volume in 0..self.volumes() {
            if let Some(block) = self.unmarked_difference(volume) {
                let [a, b] = [0, 1].map(|node| {
                    let disk = &self.nodes[node].disks[volume];
                    let at = block * SECTORS_PER_BLOCK;
                    let end = (at + SECTORS_PER_BLOCK).min(disk.sectors().len());
                    (disk.sectors()[at..end].to_vec(), disk.stable_sectors()[at..end].to_vec())
                });
                self.fail(format!(
                    "block {block} of volume {volume} differs and neither node has a durable mark (I10): n0 {a:?}, n1 {b:?}"
                ));
            }
        }
    }

    /// Takes over what changed on both disks, and keeps the blocks that differ, now or after a power cut.
    pub(super) fn note_differences(&mut self, volume: usize) {
        let mut differing = std::mem::take(&mut self.oracle.differing[volume]);
        let mut uncompared = std::mem::take(&mut self.nodes[0].disks[volume].uncompared);
        let other = &mut self.nodes[1].disks[volume].uncompared;
        uncompared.add(other);
        other.0.fill(0);
        let disks = [0, 1].map(|node| &self.nodes[node].disks[volume]);
        let [now, later] = [disks.map(|disk| disk.sectors()), disks.map(|disk| disk.stable_sectors())];
        let size = now[0].len().min(now[1].len());
        let same = |block: usize| {
            let from = (block * SECTORS_PER_BLOCK).min(size);
            let to = (from + SECTORS_PER_BLOCK).min(size);
            now[0][from..to] == now[1][from..to] && later[0][from..to] == later[1][from..to]
        };
        uncompared.retain(|block| {
            if same(block) {
                differing.clear(block);
            } else {
                differing.set(block);
            }
            false
        });
        if self.history.compare && now[0].len() == now[1].len() {
            for block in 0..size.div_ceil(SECTORS_PER_BLOCK) {
                assert_eq!(
                    same(block),
                    !differing.has(block),
                    "block {block} of volume {volume} was not looked at"
                );
            }
        }
        self.oracle.differing[volume] = differing;
        self.nodes[0].disks[volume].uncompared = uncompared;
    }

    /// First sector that differs now, and what both hold.
    pub(super) fn first_difference(&self, volume: usize) -> Option<(usize, u32, u32)> {
        let [a, b] = [0, 1].map(|node| self.nodes[node].disks[volume].sectors());
        self.oracle.differing[volume].iter().find_map(|block| {
            let from = (block * SECTORS_PER_BLOCK).min(a.len());
            let sectors = from..(from + SECTORS_PER_BLOCK).min(a.len());
            let sector = sectors.into_iter().find(|sector| a.get(*sector) != b.get(*sector))?;
            Some((sector, a[sector], b.get(sector).copied().unwrap_or(0)))
        })
    }

    fn unmarked_difference(&mut self, volume: usize) -> Option<usize> {
        self.note_differences(volume);
        if self.oracle.differing[volume].is_empty() {
            return None;
        }
        let disks = [0, 1].map(|node| &self.nodes[node].disks[volume]);
        if disks[0].sectors().len() != disks[1].sectors().len() {
            return None;
        }
        let superblocks = [disks[0].meta.superblock()?, disks[1].meta.superblock()?];
        // What the next handshake copies as a whole needs no marks.
        let current = superblocks.each_ref().map(|superblock| masked(superblock.uuid[0]));
        let bitmap = superblocks.each_ref().map(|superblock| masked(superblock.uuid[1]));
        let fresh = |uuid: u64| uuid == 0 || uuid == UUID_JUST_CREATED;
        let described = current[0] == current[1]
            || bitmap[0] == current[1]
            || bitmap[1] == current[0]
            || (bitmap[0] == bitmap[1] && bitmap[0] != 0);
        let everything = superblocks.iter().any(|superblock| superblock.flags & flags::FULL_SYNC != 0);
        if fresh(current[0]) || fresh(current[1]) || !described || everything {
            return None;
        }
        let mut hot: Option<[Option<&[u32]>; 2]> = None;
        self.oracle.differing[volume].iter().find(|block| {
            if disks.iter().any(|disk| disk.meta.is_marked(*block)) {
                return false;
            }
            let hot = hot.get_or_insert_with(|| disks.map(|disk| disk.meta.hot_extents()));
            let extent = u32::try_from(*block as u64 / BITS_PER_AL_EXTENT).unwrap_or(u32::MAX);
            !hot.iter().any(|hot| hot.as_ref().is_none_or(|hot| hot.contains(&extent)))
        })
    }
}
