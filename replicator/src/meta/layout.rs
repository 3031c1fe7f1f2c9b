//! Where each piece of metadata lies on a device (DISK §2), for all three placements.
//!
//! Everything is derived from the size of the devices and the activity-log geometry. What the
//! superblock says about positions is compared with this, never trusted in its place; the one
//! exception is the length of a flexible area, which may be shorter than a device that grew.
use crate::meta::{BITMAP_PAGE_BITS, BITMAP_PAGE_BYTES, MetaError, MetaPlace};
use crate::units::{SECTOR_BYTES, SECTORS_PER_BIT, SectorCount};

/// Bytes of a block as the layout counts them.
const BLOCK: u64 = 4096;
/// Sectors of the superblock.
const SUPERBLOCK_SECTORS: u64 = BLOCK / SECTOR_BYTES;
/// Bytes of the slot of one index on an indexed metadata device. Fixed by the format.
pub const INDEXED_AREA_BYTES: u64 = 128 << 20;
/// Least size of a device that carries metadata; drbdmeta's limit. (The kernel module asks for 1 MiB.)
pub const MIN_DEVICE_BYTES: u64 = 68 << 10;
/// Largest supported device: 1 PiB, the limit of drbdmeta and of DRBD 9.
pub const MAX_DEVICE_SECTORS: u64 = 1 << 41;
/// Activity-log stripes of a disk that was not told otherwise.
pub const DEFAULT_AL_STRIPES: u32 = 1;
/// Blocks of a stripe of a disk that was not told otherwise: 32 KiB.
pub const DEFAULT_AL_STRIPE_SIZE_4K: u32 = 8;
/// Fewest blocks of an activity log.
pub const MIN_AL_BLOCKS: u32 = 8;
/// Most blocks of an activity log (32 MiB; drbdmeta's limit).
pub const MAX_AL_BLOCKS: u32 = 8192;

/// Where the metadata lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetaKind {
    /// At the end of the data device (always the flexible form).
    Internal,
    /// On a device of its own, from its start.
    FlexExternal,
    /// In a slot of 128 MiB of a shared device.
    Indexed(u8),
}

impl MetaKind {
    /// As DRBD's configuration and drbdmeta spell it.
    #[must_use]
    pub fn spelling(self) -> String {
        match self {
            Self::Internal => "internal".to_owned(),
            Self::FlexExternal => "flex-external".to_owned(),
            Self::Indexed(index) => index.to_string(),
        }
    }

    /// The position of the superblock on a metadata device of `device_bytes`.
    ///
    /// # Errors
    /// [`MetaError::TooSmall`] when the device has no room for it, [`MetaError::TooLarge`] beyond 1 PiB.
    pub fn superblock_position(self, device_bytes: u64) -> Result<u64, MetaError> {
        if device_bytes < MIN_DEVICE_BYTES {
            return Err(MetaError::TooSmall { bytes: device_bytes, needed: MIN_DEVICE_BYTES });
        }
        if device_bytes / SECTOR_BYTES > MAX_DEVICE_SECTORS {
            return Err(MetaError::TooLarge { bytes: device_bytes });
        }
        match self {
            Self::Internal => Ok(device_bytes / BLOCK * BLOCK - BLOCK),
            Self::FlexExternal => Ok(0),
            Self::Indexed(index) => {
                let start = u64::from(index) * INDEXED_AREA_BYTES;
                let needed = if index == 0 { MIN_DEVICE_BYTES } else { start + INDEXED_AREA_BYTES };
                if device_bytes < needed {
                    return Err(MetaError::TooSmall { bytes: device_bytes, needed });
                }
                Ok(start)
            }
        }
    }
}

/// The positions of one metadata area; all byte positions are from the start of the metadata device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    kind: MetaKind,
    superblock_byte: u64,
    al_stripes: u32,
    al_stripe_size_4k: u32,
    md_size_sect: u32,
    al_offset: i32,
    bm_offset: i32,
    capacity: SectorCount,
}

impl Layout {
    /// The layout on devices of these sizes. For internal metadata `meta_dev_bytes` is not looked at. A
    /// caller that does not know the data device of external metadata passes `u64::MAX` for it.
    /// Sizes that are no multiple of 512 are rounded down.
    ///
    /// # Errors
    /// Too small, too large, or a bad activity-log geometry.
    pub fn for_device(
        kind: MetaKind,
        data_dev_bytes: u64,
        meta_dev_bytes: u64,
        al_stripes: u32,
        al_stripe_size_4k: u32,
    ) -> Result<Self, MetaError> {
        let bad_geometry = MetaError::AlGeometry { stripes: al_stripes, stripe_size_4k: al_stripe_size_4k };
        let al_blocks = al_stripes.checked_mul(al_stripe_size_4k).ok_or(bad_geometry.clone())?;
        if !(MIN_AL_BLOCKS..=MAX_AL_BLOCKS).contains(&al_blocks) {
            return Err(bad_geometry);
        }
        let al_sectors = u64::from(al_blocks) * (BLOCK / SECTOR_BYTES);
        match kind {
            MetaKind::Internal => {
                Self::internal(data_dev_bytes / SECTOR_BYTES, al_sectors, al_stripes, al_stripe_size_4k)
            }
            MetaKind::FlexExternal => {
                let md_sectors = meta_dev_bytes / SECTOR_BYTES;
                let position = kind.superblock_position(meta_dev_bytes)?;
                let data = data_dev_bytes / SECTOR_BYTES;
                Self::external(kind, position, md_sectors, data, al_sectors, al_stripes, al_stripe_size_4k)
            }
            MetaKind::Indexed(_) => {
                if (al_stripes, al_stripe_size_4k) != (DEFAULT_AL_STRIPES, DEFAULT_AL_STRIPE_SIZE_4K) {
                    return Err(MetaError::AlStripesIndexed);
                }
                let position = kind.superblock_position(meta_dev_bytes)?;
                let needed = position + INDEXED_AREA_BYTES;
                if meta_dev_bytes < needed {
                    return Err(MetaError::TooSmall { bytes: meta_dev_bytes, needed });
                }
                let md_sectors = INDEXED_AREA_BYTES / SECTOR_BYTES;
                let data = data_dev_bytes / SECTOR_BYTES;
                Self::external(kind, position, md_sectors, data, al_sectors, al_stripes, al_stripe_size_4k)
            }
        }
    }

    fn internal(
        device_sectors: u64,
        al_sectors: u64,
        al_stripes: u32,
        al_stripe_size_4k: u32,
    ) -> Result<Self, MetaError> {
        let device_bytes = device_sectors * SECTOR_BYTES;
        let superblock_byte = MetaKind::Internal.superblock_position(device_bytes)?;
        // The bitmap is sized for the whole device, its own area included.
        let bits = device_sectors.div_ceil(SECTORS_PER_BIT);
        let bm_sectors = bits.div_ceil(BITMAP_PAGE_BITS) * (BLOCK / SECTOR_BYTES);
        let below = al_sectors + bm_sectors;
        let Some(capacity) = (superblock_byte / SECTOR_BYTES).checked_sub(below).filter(|left| *left > 0)
        else {
            let needed = (below + 2 * SUPERBLOCK_SECTORS) * SECTOR_BYTES;
            return Err(MetaError::TooSmall { bytes: device_bytes, needed });
        };
        let too_large = MetaError::TooLarge { bytes: device_bytes };
        let md_size_sect = u32::try_from(SUPERBLOCK_SECTORS + below).map_err(|_| too_large.clone())?;
        let negative =
            |sectors: u64| i32::try_from(sectors).map(|value| -value).map_err(|_| too_large.clone());
        Ok(Self {
            kind: MetaKind::Internal,
            superblock_byte,
            al_stripes,
            al_stripe_size_4k,
            md_size_sect,
            al_offset: negative(al_sectors)?,
            bm_offset: negative(below)?,
            capacity: SectorCount(capacity),
        })
    }

    fn external(
        kind: MetaKind,
        superblock_byte: u64,
        md_sectors: u64,
        data_sectors: u64,
        al_sectors: u64,
        al_stripes: u32,
        al_stripe_size_4k: u32,
    ) -> Result<Self, MetaError> {
        let bm_offset = SUPERBLOCK_SECTORS + al_sectors;
        let Some(bm_sectors) = md_sectors.checked_sub(bm_offset).filter(|left| *left > 0) else {
            let needed = (bm_offset + 1) * SECTOR_BYTES;
            return Err(MetaError::TooSmall { bytes: md_sectors * SECTOR_BYTES, needed });
        };
        let too_large = MetaError::TooLarge { bytes: md_sectors.saturating_mul(SECTOR_BYTES) };
        // One bitmap sector is 4096 bits of 8 sectors.
        let covered = bm_sectors.saturating_mul(SECTOR_BYTES * 8 * SECTORS_PER_BIT);
        Ok(Self {
            kind,
            superblock_byte,
            al_stripes,
            al_stripe_size_4k,
            md_size_sect: u32::try_from(md_sectors).map_err(|_| too_large.clone())?,
            al_offset: 8,
            bm_offset: i32::try_from(bm_offset).map_err(|_| too_large)?,
            capacity: SectorCount(data_sectors.min(covered).min(MAX_DEVICE_SECTORS)),
        })
    }

    /// The same layout with a flexible area of `md_size_sect` sectors, as an older superblock on a device that
    /// grew may say.
    pub(super) fn with_flexible_length(
        &self,
        md_size_sect: u32,
        data_dev_bytes: u64,
    ) -> Result<Self, MetaError> {
        let al_sectors = u64::from(self.al_blocks()) * (BLOCK / SECTOR_BYTES);
        Self::external(
            self.kind,
            self.superblock_byte,
            u64::from(md_size_sect),
            data_dev_bytes / SECTOR_BYTES,
            al_sectors,
            self.al_stripes,
            self.al_stripe_size_4k,
        )
    }

    /// This layout as the place for metadata that lies where `now` says.
    #[must_use]
    pub const fn place_for(&self, now: &Self) -> MetaPlace {
        MetaPlace {
            capacity: self.capacity,
            md_size_sect: self.md_size_sect,
            al_offset: self.al_offset,
            bm_offset: self.bm_offset,
            moves: self.superblock_byte != now.superblock_byte,
        }
    }

    /// The position of the superblock of `before`, when metadata moved from there to here and nothing
    /// of it was written over that superblock.
    #[must_use]
    pub fn left_behind(&self, before: &Self) -> Option<u64> {
        let place = before.superblock_byte;
        (place != self.superblock_byte && !self.area().contains(&place)).then_some(place)
    }

    /// Which placement.
    #[must_use]
    pub const fn kind(&self) -> MetaKind {
        self.kind
    }

    /// Byte position of the superblock; a multiple of 4096.
    #[must_use]
    pub const fn superblock_byte(&self) -> u64 {
        self.superblock_byte
    }

    fn at_offset(&self, sectors: i32) -> u64 {
        let distance = u64::from(sectors.unsigned_abs()) * SECTOR_BYTES;
        // Construction made sure that a negative offset stays inside the device.
        if sectors < 0 {
            self.superblock_byte.saturating_sub(distance)
        } else {
            self.superblock_byte.saturating_add(distance)
        }
    }

    /// Byte position of the activity-log area.
    #[must_use]
    pub fn al_byte(&self) -> u64 {
        self.at_offset(self.al_offset)
    }

    /// Blocks of the activity log.
    #[must_use]
    pub const fn al_blocks(&self) -> u32 {
        // At most 8192, checked when built.
        self.al_stripes.saturating_mul(self.al_stripe_size_4k)
    }

    /// Bytes of the activity-log area.
    #[must_use]
    pub fn al_bytes(&self) -> u64 {
        u64::from(self.al_blocks()) * BLOCK
    }

    /// Stripes of the activity log.
    #[must_use]
    pub const fn al_stripes(&self) -> u32 {
        self.al_stripes
    }

    /// Blocks of one stripe.
    #[must_use]
    pub const fn al_stripe_size_4k(&self) -> u32 {
        self.al_stripe_size_4k
    }

    /// Index of the block in the activity-log area that holds transaction `number`: the ring goes
    /// round-robin over the stripes, so that neighbours land on different disks (DISK §7.4).
    #[must_use]
    pub const fn al_block_index(&self, number: u32) -> u32 {
        let ring = number % self.al_blocks();
        (ring % self.al_stripes) * self.al_stripe_size_4k + ring / self.al_stripes
    }

    /// Byte position of the block that holds transaction `number`.
    #[must_use]
    pub fn al_block_byte(&self, number: u32) -> u64 {
        self.al_byte() + u64::from(self.al_block_index(number)) * BLOCK
    }

    /// Byte position of the bitmap area.
    #[must_use]
    pub fn bitmap_byte(&self) -> u64 {
        self.at_offset(self.bm_offset)
    }

    /// Bytes of the whole bitmap area; only the external forms have one that is no multiple of 4096.
    #[must_use]
    pub fn bitmap_area_bytes(&self) -> u64 {
        match self.kind {
            MetaKind::Internal => self.al_byte() - self.bitmap_byte(),
            MetaKind::FlexExternal | MetaKind::Indexed(_) => {
                u64::from(self.md_size_sect) * SECTOR_BYTES + self.superblock_byte - self.bitmap_byte()
            }
        }
    }

    /// Bytes of the bitmap that are in use for [`Self::capacity`], in whole pages, clipped to the area.
    #[must_use]
    pub fn bitmap_bytes(&self) -> u64 {
        self.bitmap_bytes_for(self.capacity)
    }

    /// Bytes of whole bitmap pages that cover `size`, clipped to the area.
    #[must_use]
    pub fn bitmap_bytes_for(&self, size: SectorCount) -> u64 {
        let pages = size.0.div_ceil(SECTORS_PER_BIT).div_ceil(BITMAP_PAGE_BITS);
        pages.saturating_mul(BLOCK).min(self.bitmap_area_bytes())
    }

    /// Bits of the bitmap that mean something: one per 4 KiB of [`Self::capacity`].
    #[must_use]
    pub const fn bitmap_bits(&self) -> u64 {
        self.capacity.0.div_ceil(SECTORS_PER_BIT)
    }

    /// Byte position of bitmap page `index`.
    #[must_use]
    pub fn bitmap_page_byte(&self, index: u32) -> u64 {
        self.bitmap_byte() + u64::from(index) * BLOCK
    }

    /// Bytes of bitmap page `index` that lie inside the area: 4096, less for the last one of an odd area,
    /// 0 behind it.
    #[must_use]
    pub fn bitmap_page_len(&self, index: u32) -> usize {
        let left = self.bitmap_area_bytes().saturating_sub(u64::from(index) * BLOCK);
        usize::try_from(left.min(BLOCK)).unwrap_or(BITMAP_PAGE_BYTES)
    }

    /// Usable sectors: what the volume offers when nothing else limits it. Never includes metadata.
    #[must_use]
    pub const fn capacity(&self) -> SectorCount {
        self.capacity
    }

    /// Superblock field `md_size_sect`.
    #[must_use]
    pub const fn md_size_sect(&self) -> u32 {
        self.md_size_sect
    }

    /// Superblock field `al_offset`, sectors relative to the superblock.
    #[must_use]
    pub const fn al_offset(&self) -> i32 {
        self.al_offset
    }

    /// Superblock field `bm_offset`, sectors relative to the superblock.
    #[must_use]
    pub const fn bm_offset(&self) -> i32 {
        self.bm_offset
    }

    /// First byte of the whole area and the byte behind it, the gap-free union of bitmap, log and superblock.
    #[must_use]
    pub fn area(&self) -> std::ops::Range<u64> {
        match self.kind {
            MetaKind::Internal => self.bitmap_byte()..self.superblock_byte + BLOCK,
            MetaKind::FlexExternal | MetaKind::Indexed(_) => {
                self.superblock_byte..self.bitmap_byte() + self.bitmap_area_bytes()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;

    fn internal(bytes: u64) -> Layout {
        Layout::for_device(MetaKind::Internal, bytes, 0, 1, 8).unwrap()
    }

    #[test]
    fn kinds_are_spelt_as_in_the_configuration_and_kept() {
        let kinds = [(MetaKind::Internal, "internal"), (MetaKind::FlexExternal, "flex-external")];
        for (kind, spelling) in kinds.into_iter().chain([(MetaKind::Indexed(3), "3")]) {
            assert_eq!(kind.spelling(), spelling);
            let layout = Layout::for_device(kind, 64 * MIB, 1024 * MIB, 1, 8).unwrap();
            assert_eq!(layout.kind(), kind);
        }
    }

    #[test]
    fn a_metadata_device_that_is_too_small_says_what_is_needed() {
        // Four stripes of 32 KiB for the log, and not a sector for the bitmap.
        let small = Layout::for_device(MetaKind::FlexExternal, 64 * MIB, 100 * 1024, 4, 8);
        assert_eq!(small, Err(MetaError::TooSmall { bytes: 100 * 1024, needed: (4 + 128) * 1024 + 512 }));
        let small = Layout::for_device(MetaKind::Indexed(2), 64 * MIB, 200 * MIB, 1, 8);
        assert_eq!(small, Err(MetaError::TooSmall { bytes: 200 * MIB, needed: 3 * 128 * MIB }));
        // The first superblock fits on less than its whole area.
        let small = Layout::for_device(MetaKind::Indexed(0), 64 * MIB, 100 * MIB, 1, 8);
        assert_eq!(small, Err(MetaError::TooSmall { bytes: 100 * MIB, needed: 128 * MIB }));
    }

    #[test]
    fn the_area_of_external_metadata_goes_from_superblock_to_bitmap() {
        let layout = Layout::for_device(MetaKind::FlexExternal, 64 * MIB, MIB, 1, 8).unwrap();
        assert_eq!(
            layout.area(),
            layout.superblock_byte()..layout.bitmap_byte() + layout.bitmap_area_bytes()
        );
    }

    #[test]
    fn the_worked_examples_of_the_format_sheet() {
        // (size, superblock, log, bitmap, md_size)
        for (bytes, sb, al, bm, md) in [
            (64 * MIB, 0x3FF_F000, 0x3FF_7000, 0x3FF_6000, 80),
            (10 << 30, 0x2_7FFF_F000, 0x2_7FFF_7000, 0x2_7FFA_7000, 712),
            (100 * MIB + 1536, 0x63F_F000, 0x63F_7000, 0x63F_6000, 80),
            (300 * MIB, 0x12BF_F000, 0x12BF_7000, 0x12BF_4000, 96),
            (1 << 40, 0xFF_FFFF_F000, 0xFF_FFFF_7000, 0xFF_FDFF_7000, 65608),
        ] {
            let layout = internal(bytes);
            let got =
                (layout.superblock_byte(), layout.al_byte(), layout.bitmap_byte(), layout.md_size_sect());
            assert_eq!(got, (sb, al, bm, md), "device of {bytes} bytes");
            assert_eq!(layout.capacity().bytes(), bm);
            assert_eq!(layout.area(), bm..sb + 4096);
        }
        let small = internal(64 * MIB);
        assert_eq!((small.al_offset(), small.bm_offset()), (-64, -72));
        assert_eq!(small.capacity(), SectorCount(130_992));
        let large = internal(10 << 30);
        assert_eq!((large.bm_offset(), large.capacity()), (-704, SectorCount(20_970_808)));
    }

    #[test]
    fn four_stripes() {
        let layout = Layout::for_device(MetaKind::Internal, 64 * MIB, 0, 4, 8).unwrap();
        assert_eq!(layout.superblock_byte(), 0x3FF_F000);
        assert_eq!((layout.al_byte(), layout.bitmap_byte()), (0x3FD_F000, 0x3FD_E000));
        assert_eq!(layout.md_size_sect(), 272);
        assert_eq!(
            [0, 1, 2, 3, 4, 31, 32].map(|number| layout.al_block_index(number)),
            [0, 8, 16, 24, 1, 31, 0]
        );
    }

    #[test]
    fn external_forms() {
        let flexible = Layout::for_device(MetaKind::FlexExternal, u64::MAX, 8 * MIB, 1, 8).unwrap();
        assert_eq!(
            (flexible.superblock_byte(), flexible.al_byte(), flexible.bitmap_byte()),
            (0, 0x1000, 0x9000)
        );
        assert_eq!(flexible.md_size_sect(), 16384);
        assert_eq!(flexible.capacity(), SectorCount((16384 - 72) * 32768));
        let indexed = Layout::for_device(MetaKind::Indexed(1), 1 << 30, 300 * MIB, 1, 8).unwrap();
        assert_eq!((indexed.superblock_byte(), indexed.al_byte()), (0x800_0000, 0x800_1000));
        assert_eq!((indexed.bitmap_byte(), indexed.md_size_sect()), (0x800_9000, 262_144));
        assert_eq!(indexed.capacity(), SectorCount(1 << 21), "limited by the data device");
        let all = Layout::for_device(MetaKind::Indexed(0), u64::MAX, 128 * MIB, 1, 8).unwrap();
        assert_eq!(all.capacity(), SectorCount(262_072 * 32768));
    }

    #[test]
    fn refusals_name_what_is_missing() {
        let smallest = internal(MIN_DEVICE_BYTES);
        assert_eq!(smallest.bitmap_byte(), 28672);
        let below = Layout::for_device(MetaKind::Internal, MIN_DEVICE_BYTES - 1, 0, 1, 8);
        assert_eq!(below, Err(MetaError::TooSmall { bytes: 69120, needed: 69632 }));
        let index = Layout::for_device(MetaKind::Indexed(2), MIB, 383 * MIB, 1, 8);
        assert_eq!(index, Err(MetaError::TooSmall { bytes: 383 * MIB, needed: 384 * MIB }));
        for (stripes, size) in [(0, 8), (1, 7), (8193, 1), (u32::MAX, u32::MAX)] {
            let got = Layout::for_device(MetaKind::Internal, 1 << 40, 0, stripes, size);
            assert_eq!(got, Err(MetaError::AlGeometry { stripes, stripe_size_4k: size }));
        }
        assert_eq!(
            Layout::for_device(MetaKind::Indexed(0), MIB, 128 * MIB, 2, 8),
            Err(MetaError::AlStripesIndexed)
        );
        assert!(matches!(
            Layout::for_device(MetaKind::Internal, MIB, 0, 32, 8),
            Err(MetaError::TooSmall { needed: 1_060_864, .. })
        ));
        assert!(matches!(
            Layout::for_device(MetaKind::Internal, u64::MAX, 0, 1, 8),
            Err(MetaError::TooLarge { .. })
        ));
    }

    proptest! {
        #[test]
        fn pieces_lie_in_order_inside_the_device(bytes in MIN_DEVICE_BYTES..=(1u64 << 50), stripes in 1u32..20, size in 1u32..20) {
            if let Ok(layout) = Layout::for_device(MetaKind::Internal, bytes, 0, stripes, size) {
                prop_assert_eq!(layout.capacity().bytes(), layout.bitmap_byte());
                prop_assert_eq!(layout.bitmap_byte() + layout.bitmap_area_bytes(), layout.al_byte());
                prop_assert_eq!(layout.al_byte() + layout.al_bytes(), layout.superblock_byte());
                prop_assert!(layout.superblock_byte() + 4096 <= bytes && layout.superblock_byte() % 4096 == 0);
                prop_assert!(layout.bitmap_area_bytes() * 8 >= layout.bitmap_bits());
                prop_assert!(layout.bitmap_bytes() <= layout.bitmap_area_bytes());
            }
            if let Ok(layout) = Layout::for_device(MetaKind::FlexExternal, u64::MAX, bytes, stripes, size) {
                prop_assert!(layout.area().end <= bytes);
                prop_assert!(layout.bitmap_area_bytes() * 8 >= layout.bitmap_bits());
            }
        }

        #[test]
        fn the_ring_visits_every_block_once(stripes in 1u32..12, size in 8u32..12, first: u32) {
            let layout = Layout::for_device(MetaKind::Internal, 1 << 30, 0, stripes, size).unwrap();
            let mut seen: Vec<u32> = (0..layout.al_blocks())
                .map(|step| layout.al_block_index((first % 1000).wrapping_add(step)))
                .collect();
            seen.sort_unstable();
            prop_assert!(seen.iter().copied().eq(0..layout.al_blocks()));
        }
    }
}
