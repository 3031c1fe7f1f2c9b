//! Units and ids. A bare integer never crosses a function boundary when it has a unit.
//!
//! A sector is 512 bytes, whatever the disk's logical block size. A bitmap bit covers 4 KiB, an
//! activity-log extent 4 MiB (SEM §1).
use serde::{Deserialize, Serialize};
use std::fmt;
use std::ops::Range;

/// Bytes in a sector.
pub const SECTOR_BYTES: u64 = 512;
/// Sectors covered by one bitmap bit (4 KiB).
pub const SECTORS_PER_BIT: u64 = 8;
/// Sectors in one activity-log extent (4 MiB).
pub const SECTORS_PER_AL_EXTENT: u64 = 8192;
/// Bitmap bits in one activity-log extent.
pub const BITS_PER_AL_EXTENT: u64 = SECTORS_PER_AL_EXTENT / SECTORS_PER_BIT;

/// A position in 512-byte sectors from the start of a volume.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Sector(pub u64);

/// A length in 512-byte sectors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SectorCount(pub u64);

impl SectorCount {
    /// The length in bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        self.0 * SECTOR_BYTES
    }
}

impl Sector {
    /// The position in bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        self.0 * SECTOR_BYTES
    }
}

/// A non-empty range of sectors that does not overflow. Whether it lies inside a volume is checked at
/// the door of the core ([`BlockRange::within`]).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockRange {
    start: Sector,
    len: SectorCount,
}

impl BlockRange {
    /// The range, or `None` when it is empty or its end does not fit.
    #[must_use]
    pub const fn new(start: Sector, len: SectorCount) -> Option<Self> {
        if len.0 == 0 || start.0.checked_add(len.0).is_none() { None } else { Some(Self { start, len }) }
    }

    /// First sector.
    #[must_use]
    pub const fn start(self) -> Sector {
        self.start
    }

    /// Length.
    #[must_use]
    pub const fn len(self) -> SectorCount {
        self.len
    }

    /// First sector behind the range.
    #[must_use]
    pub const fn end(self) -> Sector {
        Sector(self.start.0 + self.len.0)
    }

    /// Whether the range ends at or before `size`.
    #[must_use]
    pub const fn within(self, size: SectorCount) -> bool {
        self.start.0 + self.len.0 <= size.0
    }

    /// Whether the two ranges share a sector.
    #[must_use]
    pub const fn overlaps(self, other: Self) -> bool {
        self.start.0 < other.end().0 && other.start.0 < self.end().0
    }

    /// Every bit the range touches (for setting: rounded outward, SEM §11).
    #[must_use]
    pub const fn bits_touched(self) -> Range<u64> {
        self.start.0 / SECTORS_PER_BIT..self.end().0.div_ceil(SECTORS_PER_BIT)
    }

    /// Every bit the range covers fully (for clearing: rounded inward; the last partial block of a
    /// device of `size` counts as full, SEM §11). May be empty.
    #[must_use]
    pub const fn bits_covered(self, size: SectorCount) -> Range<u64> {
        let first = self.start.0.div_ceil(SECTORS_PER_BIT);
        let end = if self.end().0 >= size.0 {
            size.0.div_ceil(SECTORS_PER_BIT)
        } else {
            self.end().0 / SECTORS_PER_BIT
        };
        if end > first { first..end } else { first..first }
    }

    /// The activity-log extents the range touches.
    #[must_use]
    pub const fn al_extents(self) -> Range<u64> {
        self.start.0 / SECTORS_PER_AL_EXTENT..self.end().0.div_ceil(SECTORS_PER_AL_EXTENT)
    }
}

impl fmt::Debug for BlockRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sectors {}+{}", self.start.0, self.len.0)
    }
}

/// Number of a volume inside its resource.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct VolumeNr(pub u16);

/// Monotonic time since the start of the node, nanoseconds. The core has no clock: the caller says what time it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Time(pub u64);

impl Time {
    /// This time plus `ms` milliseconds.
    #[must_use]
    pub const fn plus_ms(self, ms: u64) -> Self {
        Self(self.0 + ms * 1_000_000)
    }

    /// Milliseconds since `earlier`, 0 when that is later.
    #[must_use]
    pub const fn ms_since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0) / 1_000_000
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, len: u64) -> BlockRange {
        BlockRange::new(Sector(start), SectorCount(len)).unwrap()
    }

    #[test]
    fn bits_round_outward_to_set_and_inward_to_clear() {
        let size = SectorCount(100);
        assert_eq!(range(7, 2).bits_touched(), 0..2);
        assert!(range(7, 2).bits_covered(size).is_empty());
        assert_eq!(range(8, 8).bits_covered(size), 1..2);
        assert_eq!(range(1, 23).bits_covered(size), 1..3);
        // The device ends inside bit 12: a write up to the end covers it.
        assert_eq!(range(96, 4).bits_covered(size), 12..13);
        assert_eq!(range(96, 3).bits_covered(size), 12..12);
    }

    #[test]
    fn a_range_is_never_empty_and_never_overflows() {
        assert!(BlockRange::new(Sector(3), SectorCount(0)).is_none());
        assert!(BlockRange::new(Sector(u64::MAX), SectorCount(1)).is_none());
        assert!(range(8191, 2).al_extents().eq(0..2));
    }
}
