//! What else may live on a device: the magics of filesystems, volume managers and partition tables.
//!
//! Used before new metadata overwrites a place. It errs on the side of seeing something: a stale magic
//! costs the operator one `--force`, a missed one costs a filesystem.
use crate::meta::{MAGIC_CLEAN, MAGIC_UNCLEAN, be32, be64};
use std::fmt;

/// Something recognised on a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signature {
    /// What it is, as an operator calls it.
    pub name: &'static str,
    /// How many bytes of the device it uses, where its header says so.
    pub used_bytes: Option<u64>,
}

impl fmt::Display for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

/// Reads bytes of the device into the slice; false when they cannot be read (behind the end, error).
pub type ReadAt<'a> = dyn FnMut(u64, &mut [u8]) -> bool + 'a;

/// A magic at a fixed place.
struct Magic {
    at: u64,
    bytes: &'static [u8],
    name: &'static str,
}

const fn magic(at: u64, bytes: &'static [u8], name: &'static str) -> Magic {
    Magic { at, bytes, name }
}

/// Magics that need no second look.
const MAGICS: &[Magic] = &[
    magic(0, b"XFSB", "xfs filesystem"),
    magic(0, b"LUKS\xba\xbe", "LUKS encrypted volume"),
    magic(0, b"hsqs", "squashfs filesystem"),
    magic(0, b"bluestore block device", "Ceph BlueStore device"),
    magic(0, b"QFI\xfb", "qcow2 image"),
    magic(3, b"NTFS    ", "NTFS filesystem"),
    magic(3, b"EXFAT   ", "exFAT filesystem"),
    magic(3, b"-FVE-FS-", "BitLocker volume"),
    magic(54, b"FAT12   ", "FAT filesystem"),
    magic(54, b"FAT16   ", "FAT filesystem"),
    magic(82, b"FAT32   ", "FAT filesystem"),
    magic(512, b"EFI PART", "GPT partition table"),
    magic(4096, b"EFI PART", "GPT partition table"),
    magic(1024, b"\x10\x20\xf5\xf2", "f2fs filesystem"),
    magic(1024, b"\xe2\xe1\xf5\xe0", "erofs filesystem"),
    magic(0, b"\xfc\x4e\x2b\xa9", "md RAID member (metadata 1.1)"),
    magic(4096, b"\xfc\x4e\x2b\xa9", "md RAID member (metadata 1.2)"),
    magic(4086, b"SWAPSPACE2", "swap space"),
    magic(4086, b"SWAP-SPACE", "swap space"),
    magic(4096 + 24, b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81", "bcache device"),
    magic(32768, b"JFS1", "jfs filesystem"),
    magic(32769, b"CD001", "ISO 9660 filesystem"),
    magic(65536 + 52, b"ReIsEr", "reiserfs filesystem"),
    magic(65536, b"\x01\x16\x19\x70", "gfs2 filesystem"),
];

/// Bytes of `at..` or `None`.
fn bytes_at<const N: usize>(read: &mut ReadAt<'_>, at: u64) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    read(at, &mut bytes).then_some(bytes)
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    be32(bytes, at).swap_bytes()
}

/// Everything recognised on the `len` bytes that start at `base` of a device.
pub fn detect(read: &mut ReadAt<'_>, base: u64, len: u64) -> Vec<Signature> {
    let mut at_base = |at: u64, place: &mut [u8]| {
        at.checked_add(place.len() as u64).is_some_and(|end| end <= len)
            && read(base.saturating_add(at), place)
    };
    let read: &mut ReadAt<'_> = &mut at_base;
    let mut found = Vec::new();
    found.extend(ext(read));
    found.extend(xfs(read));
    found.extend(btrfs(read));
    for candidate in MAGICS {
        let mut bytes = [0; 32];
        let Some(place) = bytes.get_mut(..candidate.bytes.len()) else { continue };
        if read(candidate.at, place) && place == candidate.bytes {
            found.push(Signature { name: candidate.name, used_bytes: None });
        }
    }
    found.extend(lvm(read, len));
    found.extend(md_at_end(read, len));
    found.extend(zfs(read));
    if found.is_empty() {
        found.extend(mbr(read));
    }
    // xfs is in both lists, once with its size.
    let mut seen: Vec<&'static str> = Vec::new();
    found.retain(|signature| {
        !seen.contains(&signature.name) && {
            seen.push(signature.name);
            true
        }
    });
    found
}

fn ext(read: &mut ReadAt<'_>) -> Option<Signature> {
    let block: [u8; 1024] = bytes_at(read, 1024)?;
    if block.get(56..58) != Some(&[0x53, 0xEF]) {
        return None;
    }
    let (has_journal, extents, is_64bit) =
        (le32(&block, 92) & 0x4 != 0, le32(&block, 96) & 0x40 != 0, le32(&block, 96) & 0x80 != 0);
    let high = if is_64bit { u64::from(le32(&block, 0x150)) << 32 } else { 0 };
    let block_bytes = 1024u64.checked_shl(le32(&block, 24)).filter(|bytes| *bytes <= 65536);
    let blocks = high | u64::from(le32(&block, 4));
    let name = match (extents, has_journal) {
        (true, _) => "ext4 filesystem",
        (false, true) => "ext3 filesystem",
        (false, false) => "ext2 filesystem",
    };
    Some(Signature { name, used_bytes: block_bytes.and_then(|bytes| blocks.checked_mul(bytes)) })
}

fn xfs(read: &mut ReadAt<'_>) -> Option<Signature> {
    let block: [u8; 64] = bytes_at(read, 0)?;
    let used_bytes = be64(&block, 8).checked_mul(u64::from(be32(&block, 4)));
    block.starts_with(b"XFSB").then_some(Signature { name: "xfs filesystem", used_bytes })
}

fn btrfs(read: &mut ReadAt<'_>) -> Option<Signature> {
    let magic: [u8; 8] = bytes_at(read, 65536 + 64)?;
    (magic == *b"_BHRfS_M").then_some(Signature { name: "btrfs filesystem", used_bytes: None })
}

fn lvm(read: &mut ReadAt<'_>, len: u64) -> Option<Signature> {
    (0..4).find_map(|sector| {
        let label: [u8; 32] = bytes_at(read, sector * 512)?;
        let is_lvm = label.starts_with(b"LABELONE") && label.get(24..) == Some(b"LVM2 001".as_slice());
        // A physical volume takes the whole device.
        is_lvm.then_some(Signature { name: "LVM2 physical volume", used_bytes: Some(len) })
    })
}

fn md_at_end(read: &mut ReadAt<'_>, len: u64) -> Option<Signature> {
    const MAGIC: [u8; 4] = [0xfc, 0x4e, 0x2b, 0xa9];
    let version_1_0 = (len / 512).checked_sub(16).map(|sector| sector / 8 * 8 * 512);
    let version_0_90 = (len / 65536 * 65536).checked_sub(65536);
    for (at, name) in
        [(version_1_0, "md RAID member (metadata 1.0)"), (version_0_90, "md RAID member (metadata 0.90)")]
    {
        if at.and_then(|at| bytes_at(read, at)) == Some(MAGIC) {
            return Some(Signature { name, used_bytes: Some(len) });
        }
    }
    None
}

fn zfs(read: &mut ReadAt<'_>) -> Option<Signature> {
    // The uberblock ring of the first label.
    (0..128).find_map(|slot| {
        let magic: [u8; 8] = bytes_at(read, (128 + slot) * 1024)?;
        let is_zfs = [magic, {
            let mut swapped = magic;
            swapped.reverse();
            swapped
        }]
        .contains(&0x00ba_b10c_u64.to_be_bytes());
        is_zfs.then_some(Signature { name: "ZFS pool member", used_bytes: None })
    })
}

fn mbr(read: &mut ReadAt<'_>) -> Option<Signature> {
    let sector: [u8; 512] = bytes_at(read, 0)?;
    let marked = sector.get(510..) == Some(&[0x55, 0xAA]);
    let used = (0..4).any(|entry| {
        let at = 446 + 16 * entry;
        let flag_ok = sector.get(at).is_some_and(|flag| flag & 0x7f == 0);
        flag_ok && sector.get(at + 4).is_some_and(|kind| *kind != 0) && le32(&sector, at + 12) != 0
    });
    (marked && used).then_some(Signature { name: "MBR partition table", used_bytes: None })
}

/// Which version of DRBD metadata a superblock belongs to, if any.
#[must_use]
pub fn drbd_version(superblock: &[u8]) -> Option<&'static str> {
    match be32(superblock, crate::meta::superblock::MAGIC_AT) {
        MAGIC_CLEAN | MAGIC_UNCLEAN => Some("v08"),
        crate::meta::superblock::MAGIC_V07 => Some("v07"),
        crate::meta::superblock::MAGIC_V09 => Some("v09"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn detect_in(image: &[u8]) -> Vec<Signature> {
        let mut read = |at: u64, place: &mut [u8]| {
            let at = usize::try_from(at).unwrap();
            image.get(at..at + place.len()).is_some_and(|bytes| {
                place.copy_from_slice(bytes);
                true
            })
        };
        detect(&mut read, 0, image.len() as u64)
    }

    #[test]
    fn each_magic_of_the_table_is_named() {
        for candidate in MAGICS {
            let mut image = vec![0u8; 1 << 20];
            let at = usize::try_from(candidate.at).unwrap();
            image[at..at + candidate.bytes.len()].copy_from_slice(candidate.bytes);
            assert_eq!(detect_in(&image).first().map(|found| found.name), Some(candidate.name));
        }
        assert_eq!(detect_in(&vec![0u8; 1 << 20]), []);
        assert_eq!(detect_in(&[]), []);
    }

    #[test]
    fn the_versions_of_ext_and_of_drbd_are_told_apart() {
        let mut image = vec![0u8; 1 << 20];
        image[1024 + 56..1024 + 58].copy_from_slice(&[0x53, 0xEF]);
        for (journal, extents, name) in
            [(0, 0, "ext2 filesystem"), (4, 0, "ext3 filesystem"), (4, 0x40, "ext4 filesystem")]
        {
            (image[1024 + 92], image[1024 + 96]) = (journal, extents);
            assert_eq!(detect_in(&image).first().map(ToString::to_string).as_deref(), Some(name));
        }
        let mut block = [0; 4096];
        assert_eq!(drbd_version(&block), None);
        for (magic, version) in [
            (MAGIC_CLEAN, "v08"),
            (MAGIC_UNCLEAN, "v08"),
            (crate::meta::superblock::MAGIC_V07, "v07"),
            (crate::meta::superblock::MAGIC_V09, "v09"),
        ] {
            let at = crate::meta::superblock::MAGIC_AT;
            block[at..at + 4].copy_from_slice(&magic.to_be_bytes());
            assert_eq!(drbd_version(&block), Some(version));
        }
    }

    #[test]
    fn sizes_are_read_where_the_header_has_them() {
        let mut image = vec![0u8; 1 << 20];
        image[1024 + 56..1024 + 58].copy_from_slice(&[0x53, 0xEF]);
        image[1024 + 4..1024 + 8].copy_from_slice(&[0, 1, 0, 0]);
        image[1024 + 24] = 2;
        image[1024 + 96] = 0x40;
        assert_eq!(detect_in(&image), [Signature { name: "ext4 filesystem", used_bytes: Some(1 << 20) }]);
        image[1024 + 24..1024 + 28].fill(0xff);
        assert_eq!(detect_in(&image)[0].used_bytes, None, "nonsense is not believed");
    }

    #[test]
    fn members_marked_at_the_end_and_partition_tables() {
        let mut image = vec![0u8; 1 << 20];
        image[(1 << 20) - 8192..][..4].copy_from_slice(&[0xfc, 0x4e, 0x2b, 0xa9]);
        assert_eq!(detect_in(&image)[0].name, "md RAID member (metadata 1.0)");
        let mut image = vec![0u8; 1 << 20];
        image[510..512].copy_from_slice(&[0x55, 0xAA]);
        assert_eq!(detect_in(&image), [], "an empty table is no table");
        image[446 + 4] = 0x83;
        image[446 + 12] = 9;
        assert_eq!(detect_in(&image)[0].name, "MBR partition table");
        let mut image = vec![0u8; 1 << 20];
        image[512..520].copy_from_slice(b"LABELONE");
        image[512 + 24..512 + 32].copy_from_slice(b"LVM2 001");
        assert_eq!(detect_in(&image)[0].used_bytes, Some(1 << 20));
        let mut image = vec![0u8; 1 << 20];
        image[130 * 1024..][..8].copy_from_slice(&0x00ba_b10c_u64.to_le_bytes());
        assert_eq!(detect_in(&image)[0].name, "ZFS pool member");
    }
}
