//! Backing disks: opened, validated, and read into what the core attaches.
//!
//! Blocking; called from control threads. The owner thread of a resource takes the descriptors over
//! ([`Backing::into_parts`]) and does its own IO at the offsets of the [`Layout`].
//!
//! Promises: the device is claimed as long as a descriptor lives; the usable region never includes
//! metadata; a disk whose metadata cannot be trusted is refused, a damaged bitmap page or activity log
//! becomes "everything may have changed".
pub mod area;
pub mod create;
pub mod device;
pub mod grown;
mod io;

use crate::meta::al_ring::{self, AlDamage};
use crate::meta::{
    AlTransaction, Attached, BitmapPage, Layout, MetaError, MetaKind, Superblock, bitmap_area, flags,
};
use crate::units::{SECTORS_PER_AL_EXTENT, SectorCount};
use device::{Access, Device, DeviceError};
use grown::KnownSize;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Where the metadata of a disk is, as the configuration says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MetaDisk {
    /// At the end of the data device.
    Internal,
    /// On a device of its own.
    Flexible(PathBuf),
    /// In one slot of a shared device.
    Indexed(PathBuf, u8),
}

impl MetaDisk {
    /// The placement without the path.
    #[must_use]
    pub const fn kind(&self) -> MetaKind {
        match self {
            Self::Internal => MetaKind::Internal,
            Self::Flexible(_) => MetaKind::FlexExternal,
            Self::Indexed(_, index) => MetaKind::Indexed(*index),
        }
    }

    /// The device that carries the metadata of the data device `data`.
    #[must_use]
    pub fn path<'a>(&'a self, data: &'a Path) -> &'a Path {
        match self {
            Self::Internal => data,
            Self::Flexible(path) | Self::Indexed(path, _) => path,
        }
    }
}

/// Why a disk cannot be attached.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum AttachError {
    /// The data device.
    #[error("backing device: {0}")]
    Data(#[source] DeviceError),
    /// The metadata device.
    #[error("metadata device: {0}")]
    Meta(#[source] DeviceError),
    /// External metadata on the data device itself.
    #[error("{} is both backing device and metadata device; use internal metadata", .0.display())]
    SameDevice(PathBuf),
    /// The metadata is missing, foreign or does not fit.
    #[error("{}: {source}", .path.display())]
    Invalid {
        /// The metadata device.
        path: PathBuf,
        /// What is wrong.
        source: MetaError,
    },
    /// The metadata of a device that grew cannot be moved to its new end.
    #[error("cannot move the metadata to the new end of the device: {0}")]
    Move(#[source] area::AreaError),
    /// The activity log needs another tool.
    #[error("{}: {source}", .path.display())]
    ForeignLog {
        /// The metadata device.
        path: PathBuf,
        /// Which format.
        source: AlDamage,
    },
}

impl AttachError {
    /// DRBD's number for this refusal (ADM §4.2).
    #[must_use]
    pub const fn number(&self) -> u16 {
        match self {
            Self::Data(DeviceError::Open { .. }) => 104,
            Self::Meta(DeviceError::Open { .. }) => 105,
            Self::Data(DeviceError::NotADisk { .. }) => 107,
            Self::Meta(DeviceError::NotADisk { .. }) => 108,
            Self::Data(DeviceError::InUse { .. }) => 114,
            Self::Meta(DeviceError::InUse { .. }) | Self::SameDevice(_) => 115,
            Self::Data(DeviceError::Io { .. }) | Self::Meta(DeviceError::Io { .. }) | Self::Move(_) => 118,
            Self::Invalid { source: MetaError::TooSmall { .. }, .. } => 112,
            Self::Invalid { .. } => 119,
            Self::ForeignLog { .. } => 165,
        }
    }
}

/// An open backing disk.
#[derive(Debug)]
pub struct Backing {
    data: Device,
    meta: Option<Device>,
    layout: Layout,
    notes: Vec<String>,
    known: Option<KnownSize>,
}

impl Backing {
    /// Claims the devices, checks the metadata and reads superblock, activity log and bitmap.
    ///
    /// An unclean disk is normal: what its activity log says is in the [`Attached`].
    ///
    /// # Errors
    /// See [`AttachError`].
    pub fn open(data: &Path, meta: &MetaDisk) -> Result<(Self, Attached), AttachError> {
        Self::open_known(data, meta, None)
    }

    /// The same for a device whose size was noted down: internal metadata is moved to its end first when
    /// it grew since.
    ///
    /// # Errors
    /// See [`AttachError`].
    pub fn open_known(
        data: &Path,
        meta: &MetaDisk,
        known: Option<KnownSize>,
    ) -> Result<(Self, Attached), AttachError> {
        let mut data_device = Device::open(data, Access::Exclusive).map_err(AttachError::Data)?;
        let known = known.filter(|_| *meta == MetaDisk::Internal);
        let before = known.as_ref().and_then(KnownSize::read).filter(|bytes| *bytes < data_device.bytes);
        let mut moved = None;
        if let Some(bytes) = before
            && !grown::is_at(&data_device, data_device.bytes)
            && grown::is_at(&data_device, bytes)
        {
            let (device, note) = grown::move_to_end(data_device, bytes).map_err(AttachError::Move)?;
            data_device = device;
            moved = Some(note);
        }
        let meta_access = if matches!(meta, MetaDisk::Indexed(..)) {
            Access::ExclusiveInProcess
        } else {
            Access::Exclusive
        };
        let meta_device = match meta {
            MetaDisk::Internal => None,
            MetaDisk::Flexible(path) | MetaDisk::Indexed(path, _) => {
                if same_path(data, path) {
                    return Err(AttachError::SameDevice(path.clone()));
                }
                Some(Device::open(path, meta_access).map_err(AttachError::Meta)?)
            }
        };
        let mut notes: Vec<String> = Vec::new();
        notes.extend(moved);
        notes.extend(data_device.note.clone());
        notes.extend(meta_device.as_ref().and_then(|device| device.note.clone()));

        let holder = meta_device.as_ref().unwrap_or(&data_device);
        let path = holder.path.clone();
        let invalid = |source| AttachError::Invalid { path: path.clone(), source };
        let kind = meta.kind();
        let position = kind.superblock_position(holder.bytes).map_err(invalid)?;
        let block = io::read_block(&holder.file, position)
            .map_err(holder.failed("read the superblock of"))
            .map_err(AttachError::Meta)?;
        let superblock = Superblock::decode(&block, position).map_err(invalid)?;
        let layout = superblock.validate(kind, data_device.bytes, holder.bytes).map_err(invalid)?;

        let (mut hot_extents, al_unusable) = match hot_extents(holder, &layout, &superblock) {
            Ok(hot) => (hot, false),
            Err(damage) if damage.is_foreign_format() => {
                return Err(AttachError::ForeignLog { path, source: damage });
            }
            Err(damage) => {
                // Without a Primary's writes in flight the log has nothing to say.
                let matters = superblock.flags & (flags::PRIMARY_IND | flags::CRASHED_PRIMARY) != 0;
                let effect = if matters { "; every block counts as changed" } else { "" };
                notes.push(format!("{}: {damage}{effect}", path.display()));
                (Vec::new(), matters)
            }
        };
        let extents = layout.capacity().0.div_ceil(SECTORS_PER_AL_EXTENT);
        hot_extents.retain(|extent| u64::from(*extent) < extents);
        let (bitmap, unreadable) = io::load_bitmap(holder, &layout)
            .map_err(holder.failed("read the bitmap of"))
            .map_err(AttachError::Meta)?;
        if unreadable > 0 {
            notes.push(format!(
                "{}: {unreadable} bitmap pages cannot be read; their blocks count as changed",
                path.display()
            ));
        }
        let attached = Attached {
            superblock,
            hot_extents,
            al_unusable,
            bitmap,
            capacity: layout.capacity(),
            discard: data_device.can_discard,
            logical_block_bytes: data_device.logical_block_bytes,
        };
        if let Some(known) = &known {
            known.write(data_device.bytes);
        }
        Ok((Self { data: data_device, meta: meta_device, layout, notes, known }, attached))
    }

    /// Where the size of the data device is noted down.
    pub(super) const fn take_known(&mut self) -> Option<KnownSize> {
        self.known.take()
    }

    fn holder(&self) -> &Device {
        self.meta.as_ref().unwrap_or(&self.data)
    }

    /// Where the pieces of the metadata lie.
    #[must_use]
    pub const fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Usable sectors of the data device; never includes metadata.
    #[must_use]
    pub const fn capacity(&self) -> SectorCount {
        self.layout.capacity()
    }

    /// Smallest unit and alignment of IO on the data device, bytes.
    #[must_use]
    pub const fn logical_block_bytes(&self) -> u32 {
        self.data.logical_block_bytes
    }

    /// The data device is a block device, else a regular file.
    #[must_use]
    pub const fn is_block(&self) -> bool {
        self.data.is_block
    }

    /// The data device can deallocate ranges.
    #[must_use]
    pub const fn can_discard(&self) -> bool {
        self.data.can_discard
    }

    /// Punching a hole into the data device makes it read as zeroes.
    #[must_use]
    pub const fn discard_zeroes(&self) -> bool {
        self.data.discard_zeroes
    }

    /// What an operator should know: indirect IO, damage that was worked around.
    #[must_use]
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Gives up the descriptors: data, metadata if it is another device, and the layout.
    #[must_use]
    pub fn into_parts(self) -> (OwnedFd, Option<OwnedFd>, Layout) {
        (self.data.file.into(), self.meta.map(|device| device.file.into()), self.layout)
    }

    /// Writes the superblock; stable when it returns.
    ///
    /// # Errors
    /// The write or the flush failed; a failed flush must not be tried again.
    pub fn write_superblock(&self, superblock: &Superblock) -> Result<(), DeviceError> {
        let holder = self.holder();
        io::write_bytes(&holder.file, self.layout.superblock_byte(), &superblock.encode())
            .map_err(holder.failed("write the superblock of"))?;
        self.flush_meta()
    }

    /// Writes one transaction to its place in the ring; stable when it returns.
    ///
    /// # Errors
    /// As [`Self::write_superblock`]; a transaction too large for a block is an invalid-input error.
    pub fn write_al_block(&self, transaction: &AlTransaction) -> Result<(), DeviceError> {
        let holder = self.holder();
        let block = transaction
            .encode()
            .map_err(|source| std::io::Error::new(std::io::ErrorKind::InvalidInput, source))
            .map_err(holder.failed("write the activity log of"))?;
        io::write_bytes(&holder.file, self.layout.al_block_byte(transaction.number), &block)
            .map_err(holder.failed("write the activity log of"))?;
        self.flush_meta()
    }

    /// Re-initialises every block of the activity log; stable when it returns.
    ///
    /// # Errors
    /// As [`Self::write_superblock`].
    pub fn init_al(&self) -> Result<(), DeviceError> {
        let holder = self.holder();
        io::write_initial_al(&holder.file, &self.layout)
            .map_err(holder.failed("write the activity log of"))?;
        self.flush_meta()
    }

    /// Writes bitmap pages, clipped to the area; stable when it returns.
    ///
    /// # Errors
    /// As [`Self::write_superblock`].
    pub fn write_bitmap_pages(&self, pages: &[BitmapPage]) -> Result<(), DeviceError> {
        let holder = self.holder();
        for page in pages {
            let bytes = page.to_bytes();
            let inside = bytes.get(..self.layout.bitmap_page_len(page.index)).unwrap_or_default();
            io::write_bytes(&holder.file, self.layout.bitmap_page_byte(page.index), inside)
                .map_err(holder.failed("write the bitmap of"))?;
        }
        self.flush_meta()
    }

    fn flush_meta(&self) -> Result<(), DeviceError> {
        let holder = self.holder();
        holder.file.sync_data().map_err(holder.failed("flush"))
    }

    /// Makes all finished writes to data and metadata stable. A failure is final: do not call it again.
    ///
    /// # Errors
    /// The device's.
    pub fn flush(&self) -> Result<(), DeviceError> {
        self.data.file.sync_data().map_err(self.data.failed("flush"))?;
        if self.meta.is_some() { self.flush_meta() } else { Ok(()) }
    }
}

/// Whether two names lead to the same device or file, as far as can be told without opening them.
fn same_path(one: &Path, two: &Path) -> bool {
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    let identity = |path: &Path| {
        let found = std::fs::metadata(path).ok()?;
        Some(if found.file_type().is_block_device() { (0, found.rdev()) } else { (found.dev(), found.ino()) })
    };
    identity(one).is_some() && identity(one) == identity(two)
}

/// Extents that the activity log marks as possibly written; none when the disk was left clean.
fn hot_extents(holder: &Device, layout: &Layout, superblock: &Superblock) -> Result<Vec<u32>, AlDamage> {
    if superblock.is_clean() {
        return Ok(Vec::new());
    }
    let area = io::read_al(&holder.file, layout).map_err(|_| AlDamage::Unreadable)?;
    al_ring::replay(&area, layout)
}

/// Sets the bits of whole activity-log extents in words that start at bit `first_bit`.
fn mark_extent(words: &mut [u64], first_bit: u64, extent: u32) {
    let bits = crate::units::BITS_PER_AL_EXTENT;
    bitmap_area::set_bits(words, (u64::from(extent) * bits).saturating_sub(first_bit), bits);
}
