//! Aligned, blocking IO on a metadata area.
use super::device::{Device, DeviceError};
use crate::meta::bitmap_area::{bytes_to_words, mask_beyond};
use crate::meta::{BLOCK_BYTES, Block, Layout, al_ring};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::unistd::{Whence, lseek};
use std::fs::File;
use std::io;
use std::ops::{Deref, DerefMut, Range};
use std::os::unix::fs::FileExt;

/// Alignment of every buffer; enough for any logical block size in use.
const ALIGNMENT: usize = 4096;
/// Bytes read or written at a time. Large enough that seeks do not count, small enough for a progress line.
pub(super) const CHUNK_BYTES: usize = 4 << 20;

/// Bytes whose address is a multiple of 4096, as direct IO demands.
#[derive(Debug)]
pub(super) struct AlignedBuf {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl AlignedBuf {
    /// `len` zero bytes.
    pub(super) fn zeroed(len: usize) -> Self {
        let memory = vec![0u8; len + ALIGNMENT];
        let start = memory.as_ptr().align_offset(ALIGNMENT);
        assert!(start <= ALIGNMENT, "a byte pointer can be aligned within one unit");
        Self { memory, start, len }
    }

    fn copy_of(bytes: &[u8]) -> Self {
        let mut buffer = Self::zeroed(bytes.len());
        buffer.copy_from_slice(bytes);
        buffer
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.len]
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }
}

/// Reads one block of 4 KiB.
pub(super) fn read_block(file: &File, at: u64) -> io::Result<Block> {
    let mut buffer = AlignedBuf::zeroed(BLOCK_BYTES);
    file.read_exact_at(&mut buffer, at)?;
    let mut block = [0; BLOCK_BYTES];
    block.copy_from_slice(&buffer);
    Ok(block)
}

/// Reads any bytes, from the aligned blocks around them.
pub(super) fn read_bytes(file: &File, at: u64, place: &mut [u8]) -> io::Result<()> {
    let from = at / ALIGNMENT as u64 * ALIGNMENT as u64;
    let skip = usize::try_from(at - from).unwrap_or(0);
    let mut buffer = AlignedBuf::zeroed((skip + place.len()).next_multiple_of(ALIGNMENT));
    let mut filled = 0;
    // The last block of an odd file is short.
    while filled < skip + place.len() {
        match file.read_at(&mut buffer[filled..], from + filled as u64)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            count => filled += count,
        }
    }
    place.copy_from_slice(&buffer[skip..skip + place.len()]);
    Ok(())
}

/// Writes bytes; their number and place must be multiples of the logical block size. Not yet stable.
pub(super) fn write_bytes(file: &File, at: u64, bytes: &[u8]) -> io::Result<()> {
    file.write_all_at(&AlignedBuf::copy_of(bytes), at)
}

/// Reads the activity-log area.
pub(super) fn read_al(file: &File, layout: &Layout) -> io::Result<Vec<u8>> {
    // At most 32 MiB, by the limit of the layout.
    let mut buffer = AlignedBuf::zeroed(usize::try_from(layout.al_bytes()).unwrap_or(0));
    file.read_exact_at(&mut buffer, layout.al_byte())?;
    Ok(buffer.to_vec())
}

/// Writes an initialised block to every place of the activity log. Not yet stable.
pub(super) fn write_initial_al(file: &File, layout: &Layout) -> io::Result<()> {
    let blocks = usize::try_from(layout.al_blocks()).unwrap_or(0);
    write_bytes(file, layout.al_byte(), &al_ring::initialised_block().repeat(blocks))
}

/// The parts of `range` that may hold something else than zeroes; holes of a sparse file are left out.
pub(super) fn data_ranges(device: &Device, range: Range<u64>) -> Vec<Range<u64>> {
    if device.is_block {
        return vec![range];
    }
    let mut found = Vec::new();
    let mut at = range.start;
    while at < range.end {
        let Ok(from) = i64::try_from(at) else { break };
        let data = match lseek(&device.file, from, Whence::SeekData) {
            Ok(data) => u64::try_from(data).unwrap_or(at),
            Err(Errno::ENXIO) => break,
            // A filesystem without this call: everything is data.
            Err(_) => at,
        };
        if data >= range.end {
            break;
        }
        let hole = i64::try_from(data).ok().and_then(|data| lseek(&device.file, data, Whence::SeekHole).ok());
        let end = hole.and_then(|hole| u64::try_from(hole).ok()).unwrap_or(range.end).min(range.end);
        let block = BLOCK_BYTES as u64;
        let start = (range.start + (data - range.start) / block * block).max(at);
        let end = (range.start + (end - range.start).next_multiple_of(block)).min(range.end);
        found.push(start..end);
        at = end;
    }
    found
}

/// Reads the first `bytes` of the bitmap area and hands non-hole chunks to `take` with their word index.
/// Pages that cannot be read come as all ones; returns how many.
pub(super) fn read_bitmap(
    device: &Device,
    layout: &Layout,
    bytes: u64,
    mut take: impl FnMut(u64, &[u64]) -> io::Result<()>,
) -> io::Result<u64> {
    let start = layout.bitmap_byte();
    let mut unreadable = 0;
    let mut buffer = AlignedBuf::zeroed(CHUNK_BYTES);
    let mut words = vec![0u64; CHUNK_BYTES / 8];
    for range in data_ranges(device, start..start + bytes) {
        let mut at = range.start;
        while at < range.end {
            let len = usize::try_from((range.end - at).min(CHUNK_BYTES as u64)).unwrap_or(CHUNK_BYTES);
            if device.file.read_exact_at(&mut buffer[..len], at).is_err() {
                for page in (0..len).step_by(BLOCK_BYTES) {
                    let place = &mut buffer[page..len.min(page + BLOCK_BYTES)];
                    if device.file.read_exact_at(place, at + page as u64).is_err() {
                        place.fill(0xFF);
                        unreadable += 1;
                    }
                }
            }
            let count = len / 8;
            bytes_to_words(&buffer[..len], &mut words[..count]);
            take((at - start) / 8, &words[..count])?;
            at += len as u64;
        }
    }
    Ok(unreadable)
}

/// The whole bitmap as the core wants it: one bit per 4 KiB of capacity, nothing behind the end.
/// Also returns the number of unreadable pages.
pub(super) fn load_bitmap(device: &Device, layout: &Layout) -> io::Result<(Vec<u64>, u64)> {
    let too_big = |_| io::Error::from(io::ErrorKind::OutOfMemory);
    let mut bitmap = vec![0u64; usize::try_from(layout.bitmap_bits().div_ceil(64)).map_err(too_big)?];
    let unreadable = read_bitmap(device, layout, layout.bitmap_bytes(), |first, words| {
        let first = usize::try_from(first).map_err(too_big)?;
        for (place, word) in bitmap.iter_mut().skip(first).zip(words) {
            *place = *word;
        }
        Ok(())
    })?;
    mask_beyond(&mut bitmap, layout.bitmap_bits());
    Ok((bitmap, unreadable))
}

/// Zeroes a range of whole sectors by the cheapest way that gives zeroes; holes stay holes. Not yet stable.
pub(super) fn zero_range(
    device: &Device,
    range: Range<u64>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(), DeviceError> {
    let total = range.end - range.start;
    // One call zeroes a slice; slices keep the progress line moving.
    let slice: u64 = if device.is_block { 64 << 20 } else { 1 << 40 };
    let mode = if device.is_block {
        FallocateFlags::FALLOC_FL_ZERO_RANGE | FallocateFlags::FALLOC_FL_KEEP_SIZE
    } else {
        FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE
    };
    let zeroes = AlignedBuf::zeroed(CHUNK_BYTES);
    let mut by_call = true;
    let mut at = range.start;
    while at < range.end {
        if by_call {
            let len = (range.end - at).min(slice);
            let zeroed = match (i64::try_from(at), i64::try_from(len)) {
                (Ok(from), Ok(count)) => fallocate(&device.file, mode, from, count).is_ok(),
                _ => false,
            };
            if zeroed {
                at += len;
            } else {
                by_call = false;
            }
        } else {
            let len = usize::try_from(range.end - at).unwrap_or(CHUNK_BYTES).min(CHUNK_BYTES);
            device.file.write_all_at(&zeroes[..len], at).map_err(device.failed("zero the bitmap on"))?;
            at += len as u64;
        }
        progress(at - range.start, total);
    }
    Ok(())
}
