//! One metadata area by itself, as the drbdmeta verbs need it: the data device may not even be here.
use super::device::{Access, Device, DeviceError};
use super::io;
use crate::meta::al_ring::{self, AlDamage};
use crate::meta::bitmap_area::{bytes_to_words, words_to_bytes};
use crate::meta::dump::{self, BitmapDump};
use crate::meta::restore::{RestoreError, RestoredMeta};
use crate::meta::{BLOCK_BYTES, Layout, MAGIC_CLEAN, MetaError, MetaKind, Superblock, flags};
use std::io::Write;
use std::path::Path;
use thiserror::Error;

/// Why a verb on a metadata area failed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum AreaError {
    /// The device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The metadata.
    #[error(transparent)]
    Meta(#[from] MetaError),
    /// The activity log.
    #[error(transparent)]
    Log(#[from] AlDamage),
    /// The dump text.
    #[error(transparent)]
    Text(#[from] RestoreError),
    /// A dump with a bitmap longer than the area.
    #[error("the dump has {found} bitmap words, the area on this device has room for {room}")]
    BitmapTooLong {
        /// Words of the dump.
        found: u64,
        /// Words of the area.
        room: u64,
    },
    /// The output.
    #[error("cannot write the dump: {0}")]
    Output(#[source] std::io::Error),
}

/// A metadata area with valid metadata.
#[derive(Debug)]
pub struct Area {
    device: Device,
    layout: Layout,
    /// The superblock; written by [`Self::store`].
    pub superblock: Superblock,
}

impl Area {
    /// Opens and validates.
    ///
    /// # Errors
    /// The device cannot be opened or claimed, or has no valid metadata.
    pub fn open(path: &Path, kind: MetaKind, access: Access) -> Result<Self, AreaError> {
        Self::on(Device::open(path, access)?, kind)
    }

    /// The area on an open device.
    ///
    /// # Errors
    /// No valid metadata.
    pub fn on(device: Device, kind: MetaKind) -> Result<Self, AreaError> {
        let position = kind.superblock_position(device.bytes)?;
        let block =
            io::read_block(&device.file, position).map_err(device.failed("read the superblock of"))?;
        let superblock = Superblock::decode(&block, position)?;
        let data_bytes = if kind == MetaKind::Internal { device.bytes } else { u64::MAX };
        let layout = superblock.validate(kind, data_bytes, device.bytes)?;
        Ok(Self { device, layout, superblock })
    }

    /// Device, layout and superblock.
    pub(super) fn into_parts(self) -> (Device, Layout, Superblock) {
        (self.device, self.layout, self.superblock)
    }

    /// Where the pieces lie. The capacity is that of the area when the metadata is external.
    #[must_use]
    pub const fn layout(&self) -> &Layout {
        &self.layout
    }

    fn flush(&self) -> Result<(), AreaError> {
        Ok(self.device.file.sync_data().map_err(self.device.failed("flush"))?)
    }

    /// Writes the superblock; stable when it returns.
    ///
    /// # Errors
    /// The device's.
    pub fn store(&self) -> Result<(), AreaError> {
        io::write_bytes(&self.device.file, self.layout.superblock_byte(), &self.superblock.encode())
            .map_err(self.device.failed("write the superblock of"))?;
        self.flush()
    }

    /// Overwrites the superblock with zeroes, so that no tool finds metadata here.
    ///
    /// # Errors
    /// The device's.
    pub fn wipe(self) -> Result<(), AreaError> {
        io::write_bytes(&self.device.file, self.layout.superblock_byte(), &[0; BLOCK_BYTES])
            .map_err(self.device.failed("write the superblock of"))?;
        self.flush()
    }

    /// The extents the activity log marks; empty on a clean disk.
    ///
    /// # Errors
    /// The log cannot be replayed.
    pub fn hot_extents(&self) -> Result<Vec<u32>, AlDamage> {
        super::hot_extents(&self.device, &self.layout, &self.superblock)
    }

    /// Transfers the activity log into the bitmap and leaves the disk clean (DISK §7.7). Returns the extents
    /// that were marked. Order: bitmap, log, superblock; an interruption leaves an unclean disk to repeat it on.
    ///
    /// # Errors
    /// The log cannot be replayed although the disk was Primary, or IO.
    pub fn apply_al(&mut self) -> Result<Vec<u32>, AreaError> {
        if self.superblock.is_clean() {
            // Nothing to apply, but the next writer expects an initialised ring.
            let area = io::read_al(&self.device.file, &self.layout);
            let pristine = area.is_ok_and(|area| al_ring::replay(&area, &self.layout) == Ok(Vec::new()));
            if !pristine {
                io::write_initial_al(&self.device.file, &self.layout)
                    .map_err(self.device.failed("write the activity log of"))?;
                self.flush()?;
            }
            return Ok(Vec::new());
        }
        let was_primary = self.superblock.flags & flags::PRIMARY_IND != 0;
        let hot = match self.hot_extents() {
            Ok(hot) if was_primary => hot,
            Ok(_) => Vec::new(),
            Err(damage) if was_primary || damage.is_foreign_format() => return Err(damage.into()),
            Err(_) => Vec::new(),
        };
        for extent in &hot {
            self.mark(*extent)?;
        }
        self.flush()?;
        io::write_initial_al(&self.device.file, &self.layout)
            .map_err(self.device.failed("write the activity log of"))?;
        self.flush()?;
        self.superblock.flags |= flags::AL_CLEAN;
        self.superblock.magic = MAGIC_CLEAN;
        self.store()?;
        Ok(hot)
    }

    fn mark(&self, extent: u32) -> Result<(), AreaError> {
        let page = extent / 32;
        let len = self.layout.bitmap_page_len(page);
        if len == 0 {
            // Behind the area: an extent of a larger past.
            return Ok(());
        }
        let mut bytes = vec![0; len];
        let at = self.layout.bitmap_page_byte(page);
        io::read_bytes(&self.device.file, at, &mut bytes)
            .map_err(self.device.failed("read the bitmap of"))?;
        let mut words = vec![0; len / 8];
        bytes_to_words(&bytes, &mut words);
        super::mark_extent(&mut words, u64::from(page) * crate::meta::BITMAP_PAGE_BITS, extent);
        words_to_bytes(&words, &mut bytes);
        Ok(io::write_bytes(&self.device.file, at, &bytes)
            .map_err(self.device.failed("write the bitmap of"))?)
    }

    /// Writes the dump text. Returns the number of unreadable bitmap pages, which are dumped as all ones.
    ///
    /// # Errors
    /// The device's or the output's.
    pub fn dump(&self, out: &mut dyn Write, header: &[String]) -> Result<u64, AreaError> {
        dump::write_head(out, header, &self.superblock, &self.layout).map_err(AreaError::Output)?;
        let words = dump::dumped_words(&self.superblock, &self.layout);
        let mut body = BitmapDump::default();
        let mut next = 0;
        let unreadable = io::read_bitmap(&self.device, &self.layout, words * 8, |first, found| {
            body.push_run(out, 0, first - next)?;
            body.push(out, found)?;
            next = first + found.len() as u64;
            Ok(())
        })
        .map_err(AreaError::Output)?;
        body.push_run(out, 0, words - next).map_err(AreaError::Output)?;
        body.finish(out).map_err(AreaError::Output)?;
        Ok(unreadable)
    }
}

/// Writes the metadata of a dump to a device: bitmap, initialised log, superblock last.
///
/// # Errors
/// The values do not fit the device, or IO.
pub fn restore(device: Device, kind: MetaKind, dump: &RestoredMeta) -> Result<Area, AreaError> {
    let data_bytes = if kind == MetaKind::Internal { device.bytes } else { u64::MAX };
    let layout = Layout::for_device(kind, data_bytes, device.bytes, dump.al_stripes, dump.al_stripe_size_4k)?;
    let mut superblock = Superblock::created(&layout);
    // A dump of a larger device: what does not exist here cannot be agreed on.
    superblock.la_size = dump.la_size.min(layout.capacity());
    superblock.uuid = dump.uuid;
    superblock.flags = dump.flags;
    superblock.device_uuid = dump.device_uuid;
    superblock.la_peer_max_bio_size = dump.la_peer_max_bio_size;
    // Says whether the bitmap can hold the agreed size, before anything is overwritten.
    superblock.validate(kind, data_bytes, device.bytes)?;
    let room = layout.bitmap_area_bytes() / 8;
    if dump.words() > room {
        return Err(AreaError::BitmapTooLong { found: dump.words(), room });
    }
    // The old superblock must not vouch for a half-written bitmap.
    io::write_bytes(&device.file, layout.superblock_byte(), &[0; BLOCK_BYTES])
        .map_err(device.failed("write the superblock of"))?;
    device.file.sync_data().map_err(device.failed("flush"))?;
    let start = layout.bitmap_byte();
    let used = layout.bitmap_bytes().max(layout.bitmap_bytes_for(dump.la_size)).max(dump.words() * 8);
    io::zero_range(&device, start..start + used, &mut |_, _| {})?;
    write_words(&device, &layout, &dump.bitmap)?;
    io::write_initial_al(&device.file, &layout).map_err(device.failed("write the activity log of"))?;
    device.file.sync_data().map_err(device.failed("flush"))?;
    let area = Area { device, layout, superblock };
    area.store()?;
    Ok(area)
}

/// Writes runs of words from the start of the bitmap area; runs of zeroes are there already.
fn write_words(device: &Device, layout: &Layout, runs: &[(u64, u64)]) -> Result<(), AreaError> {
    let mut chunk = Vec::with_capacity(io::CHUNK_BYTES);
    let mut at = layout.bitmap_byte();
    let end = at + layout.bitmap_area_bytes();
    let mut put = |chunk: &mut Vec<u8>| -> Result<(), AreaError> {
        // The tail of the last page is zero; an odd area clips it.
        let room = usize::try_from(end - at).unwrap_or(usize::MAX);
        chunk.resize(chunk.len().next_multiple_of(BLOCK_BYTES).min(room), 0);
        if chunk.iter().any(|byte| *byte != 0) {
            io::write_bytes(&device.file, at, chunk).map_err(device.failed("write the bitmap of"))?;
        }
        at += chunk.len() as u64;
        chunk.clear();
        Ok(())
    };
    for (count, word) in runs {
        for _ in 0..*count {
            chunk.extend_from_slice(&word.to_le_bytes());
            if chunk.len() >= io::CHUNK_BYTES {
                put(&mut chunk)?;
            }
        }
    }
    put(&mut chunk)
}
