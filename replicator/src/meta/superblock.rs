//! The superblock of 4096 bytes (DISK §3): encode, decode, and what a disk must satisfy (DISK §10).
//!
//! It has no checksum, so the positions it states are compared with those computed from the device:
//! that is the only protection against a stale superblock of another size or placement.
use crate::meta::layout::{DEFAULT_AL_STRIPE_SIZE_4K, DEFAULT_AL_STRIPES, Layout, MetaKind};
use crate::meta::{
    BLOCK_BYTES, Block, MAGIC_CLEAN, MAGIC_UNCLEAN, MetaError, Superblock, UUID_JUST_CREATED, be32, be64,
    flags, put,
};
use crate::units::SectorCount;

/// Magic of DRBD 0.7 metadata.
pub const MAGIC_V07: u32 = 0x8374_026A;
/// Magic of DRBD 9 metadata.
pub const MAGIC_V09: u32 = 0x8374_026D;
/// Byte position of the magic in the superblock of every version.
pub const MAGIC_AT: usize = 0x3c;
/// Bytes of user data covered by one bit of the bitmap; v08 knows no other value.
pub const BYTES_PER_BIT: u32 = 4096;
/// `al_nr_extents` of freshly created metadata (drbdmeta's value; the running node stores its own).
pub const CREATED_AL_EXTENTS: u32 = 257;

impl Superblock {
    /// The superblock of freshly created metadata: never held data, clean, size not agreed.
    #[must_use]
    pub fn created(layout: &Layout) -> Self {
        Self {
            la_size: SectorCount(0),
            uuid: [UUID_JUST_CREATED, 0, 0, 0],
            device_uuid: 0,
            flags: flags::AL_CLEAN,
            magic: MAGIC_CLEAN,
            md_size_sect: layout.md_size_sect(),
            al_offset: layout.al_offset(),
            al_nr_extents: CREATED_AL_EXTENTS,
            bm_offset: layout.bm_offset(),
            bm_bytes_per_bit: BYTES_PER_BIT,
            la_peer_max_bio_size: 0,
            al_stripes: layout.al_stripes(),
            al_stripe_size_4k: layout.al_stripe_size_4k(),
        }
    }

    /// Whether the disk was left so that a kernel module would attach it without apply-al.
    #[must_use]
    pub const fn is_clean(&self) -> bool {
        self.magic == MAGIC_CLEAN && self.flags & flags::AL_CLEAN != 0
    }

    /// The 4096 bytes as they go to the disk.
    #[must_use]
    pub fn encode(&self) -> Block {
        let mut block = [0; BLOCK_BYTES];
        put(&mut block, 0x00, &self.la_size.0.to_be_bytes());
        for (at, uuid) in [0x08, 0x10, 0x18, 0x20].into_iter().zip(self.uuid) {
            put(&mut block, at, &uuid.to_be_bytes());
        }
        put(&mut block, 0x28, &self.device_uuid.to_be_bytes());
        put(&mut block, 0x38, &self.flags.to_be_bytes());
        put(&mut block, MAGIC_AT, &self.magic.to_be_bytes());
        put(&mut block, 0x40, &self.md_size_sect.to_be_bytes());
        put(&mut block, 0x44, &self.al_offset.to_be_bytes());
        put(&mut block, 0x48, &self.al_nr_extents.to_be_bytes());
        put(&mut block, 0x4c, &self.bm_offset.to_be_bytes());
        put(&mut block, 0x50, &self.bm_bytes_per_bit.to_be_bytes());
        put(&mut block, 0x54, &self.la_peer_max_bio_size.to_be_bytes());
        put(&mut block, 0x58, &self.al_stripes.to_be_bytes());
        put(&mut block, 0x5c, &self.al_stripe_size_4k.to_be_bytes());
        block
    }

    /// Reads the fields of the block found at byte `position`. Only the magic is judged here; see
    /// [`Self::validate`].
    ///
    /// # Errors
    /// Anything but a v08 magic, by name.
    pub fn decode(block: &Block, position: u64) -> Result<Self, MetaError> {
        let magic = be32(block, MAGIC_AT);
        match magic {
            MAGIC_CLEAN | MAGIC_UNCLEAN => {}
            MAGIC_V07 => return Err(MetaError::Version07),
            MAGIC_V09 => return Err(MetaError::Version09),
            0x8374_026E..=0x8374_027F => return Err(MetaError::Newer(magic)),
            found => return Err(MetaError::NotFound { position, found }),
        }
        let (mut al_stripes, mut al_stripe_size_4k) = (be32(block, 0x58), be32(block, 0x5c));
        if (al_stripes, al_stripe_size_4k) == (0, 0) {
            // Written in the days of 8.3, before there were stripes.
            (al_stripes, al_stripe_size_4k) = (DEFAULT_AL_STRIPES, DEFAULT_AL_STRIPE_SIZE_4K);
        }
        Ok(Self {
            la_size: SectorCount(be64(block, 0x00)),
            uuid: [0x08, 0x10, 0x18, 0x20].map(|at| be64(block, at)),
            device_uuid: be64(block, 0x28),
            flags: be32(block, 0x38),
            magic,
            md_size_sect: be32(block, 0x40),
            al_offset: be32(block, 0x44).cast_signed(),
            al_nr_extents: be32(block, 0x48),
            bm_offset: be32(block, 0x4c).cast_signed(),
            bm_bytes_per_bit: be32(block, 0x50),
            la_peer_max_bio_size: be32(block, 0x54),
            al_stripes,
            al_stripe_size_4k,
        })
    }

    /// Checks every position against devices of these sizes (as for [`Layout::for_device`]) and returns the
    /// layout that the superblock describes.
    ///
    /// # Errors
    /// The first field that contradicts the devices or the format.
    pub fn validate(
        &self,
        kind: MetaKind,
        data_dev_bytes: u64,
        meta_dev_bytes: u64,
    ) -> Result<Layout, MetaError> {
        equal("bm_bytes_per_bit", BYTES_PER_BIT, self.bm_bytes_per_bit)?;
        let expected = Layout::for_device(
            kind,
            data_dev_bytes,
            meta_dev_bytes,
            self.al_stripes,
            self.al_stripe_size_4k,
        )?;
        equal("al_offset", expected.al_offset(), self.al_offset)?;
        equal("bm_offset", expected.bm_offset(), self.bm_offset)?;
        let layout = match kind {
            MetaKind::Internal | MetaKind::Indexed(_) => {
                equal("md_size_sect", expected.md_size_sect(), self.md_size_sect)?;
                expected
            }
            MetaKind::FlexExternal => {
                if self.md_size_sect > expected.md_size_sect() {
                    return Err(MetaError::BeyondDevice {
                        md_sectors: u64::from(self.md_size_sect),
                        device_sectors: u64::from(expected.md_size_sect()),
                    });
                }
                expected.with_flexible_length(self.md_size_sect, data_dev_bytes)?
            }
        };
        // Compared with the area, not with the usable size: a smaller data device is a question of policy
        // (implicit shrink), which is not decided here.
        let covered_sectors = layout.bitmap_area_bytes().saturating_mul(64);
        if self.la_size.0 > covered_sectors {
            return Err(MetaError::BitmapTooSmall { covered_sectors, la_size: self.la_size.0 });
        }
        Ok(layout)
    }
}

/// Finds the metadata of a device: where it belongs on a device of this size, else where it belonged
/// when the device had `known_bytes`, its size when it was last attached. (Internal metadata does not
/// move by itself when the device grows.) The layout is that of the size it was found for.
///
/// # Errors
/// As [`Superblock::decode`] and [`Superblock::validate`] for the present size; those of `read`.
pub fn locate<E: From<MetaError>>(
    kind: MetaKind,
    (data_dev_bytes, meta_dev_bytes): (u64, u64),
    known_bytes: Option<u64>,
    mut read: impl FnMut(u64) -> Result<Block, E>,
) -> Result<(Superblock, Layout), E> {
    let mut at = |data_bytes: u64, meta_bytes: u64| -> Result<(Superblock, Layout), E> {
        let holder = if kind == MetaKind::Internal { data_bytes } else { meta_bytes };
        let position = kind.superblock_position(holder)?;
        let superblock = Superblock::decode(&read(position)?, position)?;
        let layout = superblock.validate(kind, data_bytes, meta_bytes)?;
        Ok((superblock, layout))
    };
    let found = at(data_dev_bytes, meta_dev_bytes);
    match known_bytes.filter(|known| kind == MetaKind::Internal && *known < data_dev_bytes) {
        Some(known) if found.is_err() => at(known, meta_dev_bytes).or(found),
        _ => found,
    }
}

fn equal<T: Copy + PartialEq + Into<i64>>(
    field: &'static str,
    expected: T,
    found: T,
) -> Result<(), MetaError> {
    if expected == found {
        Ok(())
    } else {
        Err(MetaError::Field { field, expected: expected.into(), found: found.into() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;

    fn fresh(bytes: u64) -> Superblock {
        Superblock::created(&Layout::for_device(MetaKind::Internal, bytes, 0, 1, 8).unwrap())
    }

    #[test]
    fn fresh_bytes_are_those_of_drbdmeta() {
        let block = fresh(64 * MIB).encode();
        let mut expected = [0u8; BLOCK_BYTES];
        expected[0x0f] = 4;
        expected[0x38..0x60].copy_from_slice(&[
            0, 0, 0, 0x80, 0x83, 0x74, 0x02, 0x6b, 0, 0, 0, 0x50, 0xff, 0xff, 0xff, 0xc0, 0, 0, 1, 1, 0xff,
            0xff, 0xff, 0xb8, 0, 0, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 8,
        ]);
        assert_eq!(block, expected);
    }

    #[test]
    fn flexible_bytes_are_those_of_drbdmeta() {
        let layout = Layout::for_device(MetaKind::FlexExternal, u64::MAX, 8 * MIB, 1, 8).unwrap();
        let block = Superblock::created(&layout).encode();
        let expected = [0, 0, 0x40, 0, 0, 0, 0, 8, 0, 0, 1, 1, 0, 0, 0, 0x48, 0, 0, 0x10, 0];
        assert_eq!(block[0x40..0x54], expected);
    }

    #[test]
    fn other_versions_are_refused_by_name() {
        let with_magic = |magic: u32| {
            let mut block = fresh(64 * MIB).encode();
            put(&mut block, MAGIC_AT, &magic.to_be_bytes());
            Superblock::decode(&block, 7)
        };
        assert_eq!(with_magic(MAGIC_V07), Err(MetaError::Version07));
        assert_eq!(with_magic(MAGIC_V09), Err(MetaError::Version09));
        assert_eq!(with_magic(0x8374_026E), Err(MetaError::Newer(0x8374_026E)));
        assert_eq!(with_magic(0), Err(MetaError::NotFound { position: 7, found: 0 }));
        assert!(with_magic(MAGIC_UNCLEAN).is_ok());
    }

    #[test]
    fn stripes_of_the_days_before_stripes_mean_the_default() {
        let mut block = fresh(64 * MIB).encode();
        put(&mut block, 0x58, &[0; 8]);
        let found = Superblock::decode(&block, 0).unwrap();
        assert_eq!((found.al_stripes, found.al_stripe_size_4k), (1, 8));
        assert!(found.validate(MetaKind::Internal, 64 * MIB, 0).is_ok());
    }

    #[test]
    fn a_superblock_of_another_device_size_is_refused() {
        let foreign = fresh(300 * MIB);
        assert_eq!(
            foreign.validate(MetaKind::Internal, 64 * MIB, 0),
            Err(MetaError::Field { field: "bm_offset", expected: -72, found: -88 })
        );
        let mut wrong = fresh(64 * MIB);
        wrong.md_size_sect += 8;
        assert!(matches!(
            wrong.validate(MetaKind::Internal, 64 * MIB, 0),
            Err(MetaError::Field { field: "md_size_sect", .. })
        ));
        let mut wrong = fresh(64 * MIB);
        wrong.bm_bytes_per_bit = 8192;
        assert!(matches!(
            wrong.validate(MetaKind::Internal, 64 * MIB, 0),
            Err(MetaError::Field { field: "bm_bytes_per_bit", .. })
        ));
        let mut wrong = fresh(64 * MIB);
        wrong.la_size = SectorCount(262_145);
        assert_eq!(
            wrong.validate(MetaKind::Internal, 64 * MIB, 0),
            Err(MetaError::BitmapTooSmall { covered_sectors: 262_144, la_size: 262_145 })
        );
    }

    #[test]
    fn a_flexible_area_may_be_shorter_than_its_device_but_not_longer() {
        let layout = Layout::for_device(MetaKind::FlexExternal, u64::MAX, 8 * MIB, 1, 8).unwrap();
        let found = Superblock::created(&layout);
        assert_eq!(found.validate(MetaKind::FlexExternal, u64::MAX, 16 * MIB), Ok(layout));
        assert!(matches!(
            found.validate(MetaKind::FlexExternal, u64::MAX, 4 * MIB),
            Err(MetaError::BeyondDevice { .. })
        ));
    }

    prop_compose! {
        fn any_superblock()(
            la_size: u64, uuid: [u64; 4], device_uuid: u64, flags: u32, clean: bool, md_size_sect: u32,
            al_offset: i32, al_nr_extents: u32, bm_offset: i32, bm_bytes_per_bit: u32, la_peer_max_bio_size: u32,
            al_stripes in 1u32.., al_stripe_size_4k: u32,
        ) -> Superblock {
            let magic = if clean { MAGIC_CLEAN } else { MAGIC_UNCLEAN };
            Superblock {
                la_size: SectorCount(la_size), uuid, device_uuid, flags, magic, md_size_sect, al_offset,
                al_nr_extents, bm_offset, bm_bytes_per_bit, la_peer_max_bio_size, al_stripes, al_stripe_size_4k,
            }
        }
    }

    proptest! {
        #[test]
        fn round_trip(superblock in any_superblock()) {
            prop_assert_eq!(Superblock::decode(&superblock.encode(), 0), Ok(superblock));
        }

        #[test]
        fn any_bytes_decode_and_validate_without_panic(
            bytes in proptest::collection::vec(any::<u8>(), 0x60), version in 0x68u8..0x70, data: u64, meta: u64, index: u8,
        ) {
            let mut block = [0; BLOCK_BYTES];
            put(&mut block, 0, &bytes);
            put(&mut block, MAGIC_AT, &[0x83, 0x74, 0x02, version]);
            if let Ok(found) = Superblock::decode(&block, 0) {
                for kind in [MetaKind::Internal, MetaKind::FlexExternal, MetaKind::Indexed(index)] {
                    prop_assert!(found.validate(kind, data, meta).is_err());
                }
            }
        }
    }
}
