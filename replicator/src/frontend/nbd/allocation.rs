//! What BLOCK_STATUS says of a backing file: SEEK_DATA and SEEK_HOLE turned into extents.
//!
//! The caller asks this only while the local disk is UpToDate; otherwise the local file says nothing
//! about the volume, and the answer is one [`ExtentKind::Data`] extent ("allocated or not known"),
//! which is always allowed. Races with writes are harmless in the same way a read's are.
//!
//! These are system calls that may touch the disk's own metadata: fit for a helper thread, not for the
//! turn of a ring.
use super::reply::{Extent, ExtentKind};
use nix::errno::Errno;
use nix::libc;
use nix::sys::stat::{SFlag, fstat};
use nix::unistd::{Whence, lseek};
use std::ops::Range;
use std::os::fd::BorrowedFd;

/// Most extents in an answer: 4 KiB on the wire. Clients ask again for the rest.
pub const MAX_EXTENTS: usize = 512;

/// Extents of `length` bytes from `offset` on, both multiples of `block_min`. `data_start` is where the
/// volume's first byte lies in the file (0 unless metadata comes first). `one` stops after the first
/// extent. Never empty unless `length` is 0; covers less than `length` when there are more than
/// [`MAX_EXTENTS`]. A hole is rounded inward to `block_min`. Block devices, and files whose
/// filesystem does not tell, are allocated.
///
/// Moves the file's own offset, which is shared with every duplicate of the descriptor; all data IO has
/// explicit offsets.
#[must_use]
pub fn extents(
    fd: BorrowedFd<'_>,
    data_start: u64,
    offset: u64,
    length: u32,
    block_min: u32,
    one: bool,
) -> Vec<Extent> {
    let block = u64::from(block_min.max(1));
    let limit = if one { 1 } else { MAX_EXTENTS };
    let is_file =
        fstat(fd).is_ok_and(|stat| SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT == SFlag::S_IFREG);
    let end = offset.saturating_add(u64::from(length));
    let mut list = ExtentList { extents: Vec::new(), limit };
    let mut at = offset;
    while at < end {
        let (kind, next) =
            if is_file { next_extent(fd, data_start, at..end, block) } else { (ExtentKind::Data, end) };
        debug_assert!(next > at && next <= end, "an extent from {at} to {next}");
        if !list.push(kind, next - at) {
            break;
        }
        at = next;
    }
    list.extents
}

/// The first extent of a range and where it ends.
fn next_extent(fd: BorrowedFd<'_>, data_start: u64, range: Range<u64>, block: u64) -> (ExtentKind, u64) {
    let Range { start, end } = range;
    let data = match seek(fd, data_start, start, Whence::SeekData) {
        Ok(data) => data,
        // No data from here to the end of the file.
        Err(Errno::ENXIO) => return (ExtentKind::Hole, end),
        Err(_) => return (ExtentKind::Data, end),
    };
    // Only whole blocks are holes; `start` is aligned.
    let hole_end = if data >= end { end } else { data - data % block };
    if hole_end > start {
        return (ExtentKind::Hole, hole_end);
    }
    let data_end = match seek(fd, data_start, data.max(start), Whence::SeekHole) {
        Ok(hole) => hole.div_ceil(block).saturating_mul(block),
        Err(_) => end,
    };
    // A file being punched meanwhile may give an answer that is not ahead; never stand still.
    (ExtentKind::Data, data_end.clamp(start.saturating_add(block).min(end), end))
}

fn seek(fd: BorrowedFd<'_>, data_start: u64, at: u64, whence: Whence) -> Result<u64, Errno> {
    let position = data_start.checked_add(at).ok_or(Errno::EOVERFLOW)?;
    let position = libc::off_t::try_from(position).map_err(|_| Errno::EOVERFLOW)?;
    let found = lseek(fd, position, whence)?;
    Ok(u64::try_from(found).map_err(|_| Errno::EOVERFLOW)?.saturating_sub(data_start))
}

/// Collects extents; neighbours of one kind become one.
struct ExtentList {
    extents: Vec<Extent>,
    limit: usize,
}

impl ExtentList {
    /// Whether there was room.
    fn push(&mut self, kind: ExtentKind, length: u64) -> bool {
        // No longer than the request, whose length is 32 bits.
        let length = u32::try_from(length).unwrap_or(u32::MAX);
        let full = self.extents.len() == self.limit;
        match self.extents.last_mut() {
            Some(last) if last.kind == kind => last.length = last.length.saturating_add(length),
            _ if full => return false,
            _ => self.extents.push(Extent { length, kind }),
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;

    const KIB64: u64 = 64 << 10;

    /// 1 MiB with data in the second and the fourth 64 KiB.
    fn sparse() -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        file.write_all_at(&vec![1; 64 << 10], KIB64).unwrap();
        file.write_all_at(&vec![1; 64 << 10], 3 * KIB64).unwrap();
        file
    }

    fn kinds(extents: &[Extent]) -> Vec<(ExtentKind, u32)> {
        extents.iter().map(|extent| (extent.kind, extent.length >> 10)).collect()
    }

    #[test]
    fn holes_and_data_alternate_and_cover_the_range() {
        use ExtentKind::{Data, Hole};
        let file = sparse();
        let all = extents(file.as_fd(), 0, 0, 1 << 20, 4096, false);
        assert_eq!(kinds(&all), [(Hole, 64), (Data, 64), (Hole, 64), (Data, 64), (Hole, 768)]);
        let inside = extents(file.as_fd(), 0, KIB64 + 4096, 64 << 10, 4096, false);
        assert_eq!(kinds(&inside), [(Data, 60), (Hole, 4)]);
    }

    #[test]
    fn one_extent_when_one_was_asked_for() {
        let file = sparse();
        let first = extents(file.as_fd(), 0, KIB64, 1 << 19, 512, true);
        assert_eq!(kinds(&first), [(ExtentKind::Data, 64)]);
    }

    #[test]
    fn the_volume_may_start_inside_the_file() {
        let file = sparse();
        let shifted = extents(file.as_fd(), KIB64, 0, 128 << 10, 4096, false);
        assert_eq!(kinds(&shifted), [(ExtentKind::Data, 64), (ExtentKind::Hole, 64)]);
    }

    #[test]
    fn a_hole_shrinks_to_whole_blocks() {
        let file = sparse();
        // With blocks of 128 KiB every block has data in it up to 256 KiB.
        let coarse = extents(file.as_fd(), 0, 0, 1 << 20, 128 << 10, false);
        assert_eq!(kinds(&coarse), [(ExtentKind::Data, 256), (ExtentKind::Hole, 768)]);
    }

    #[test]
    fn what_is_no_regular_file_is_allocated() {
        let device = File::open("/dev/zero").unwrap();
        let whole = extents(device.as_fd(), 0, 4096, 1 << 30, 512, false);
        assert_eq!(whole, [Extent { length: 1 << 30, kind: ExtentKind::Data }]);
    }

    #[test]
    fn the_list_is_bounded() {
        let file = tempfile::tempfile().unwrap();
        let pieces = MAX_EXTENTS as u64;
        file.set_len(pieces * 2 * KIB64).unwrap();
        for piece in 0..pieces {
            file.write_all_at(&[1; 4096], piece * 2 * KIB64).unwrap();
        }
        let length = u32::try_from(pieces * 2 * KIB64).unwrap();
        let extents = extents(file.as_fd(), 0, 0, length, 4096, false);
        assert_eq!(extents.len(), MAX_EXTENTS);
        assert!(extents.iter().map(|extent| u64::from(extent.length)).sum::<u64>() < u64::from(length));
    }
}
