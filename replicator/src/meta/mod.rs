//! The metadata area: DRBD 8.4's "v08" layout, bit for bit (DISK). Bytes in, state out; no IO.
//!
//! No decoder panics: damage is an error, and an error means more resync or a refusal, never less.
#![forbid(unsafe_code)]
#![warn(clippy::wildcard_enum_match_arm)]
use crate::units::SectorCount;

pub mod al_ring;
pub mod bitmap_area;
pub mod dump;
pub mod error;
pub mod layout;
pub mod restore;
pub mod signature;
pub mod superblock;

pub use error::MetaError;
pub use layout::{Layout, MetaKind};

/// Bytes of every unit of metadata IO: the superblock, an activity-log block, a bitmap page.
pub const BLOCK_BYTES: usize = 4096;
/// One unit of metadata IO.
pub type Block = [u8; BLOCK_BYTES];

/// The big-endian integer at `at`; positions are constants of the format, so a miss is our bug and reads 0.
fn be32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(<[u8]>::first_chunk).map_or(0, |raw| u32::from_be_bytes(*raw))
}

/// See [`be32`].
fn be16(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..).and_then(<[u8]>::first_chunk).map_or(0, |raw| u16::from_be_bytes(*raw))
}

/// See [`be32`].
fn be64(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..).and_then(<[u8]>::first_chunk).map_or(0, |raw| u64::from_be_bytes(*raw))
}

/// Stores `value` at `at`; positions are constants of the format.
fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    if let Some(place) = bytes.get_mut(at..).and_then(|rest| rest.get_mut(..value.len())) {
        place.copy_from_slice(value);
    }
}

/// DRBD 8.4 superblock flags (DISK §5.1).
pub mod flags {
    /// Disk is better than Inconsistent.
    pub const CONSISTENT: u32 = 0x001;
    /// Self is Primary (or the peer is, without a disk).
    pub const PRIMARY_IND: u32 = 0x002;
    /// Was connected.
    pub const CONNECTED_IND: u32 = 0x004;
    /// A "set all bits" is under way.
    pub const FULL_SYNC: u32 = 0x008;
    /// Disk is better than Outdated.
    pub const WAS_UP_TO_DATE: u32 = 0x010;
    /// The peer's disk is Inconsistent or Outdated.
    pub const PEER_OUT_DATED: u32 = 0x020;
    /// An earlier crash as Primary is not yet resolved.
    pub const CRASHED_PRIMARY: u32 = 0x040;
    /// The activity log was applied.
    pub const AL_CLEAN: u32 = 0x080;
    /// Running without activity log.
    pub const AL_DISABLED: u32 = 0x100;
}

/// Magic of a clean superblock (8.0-8.3, or after apply-al).
pub const MAGIC_CLEAN: u32 = 0x8374_026B;
/// Magic of a superblock in use by 8.4.
pub const MAGIC_UNCLEAN: u32 = 0x8374_026C;
/// "Just created": a current identifier that never held data.
pub const UUID_JUST_CREATED: u64 = 4;

/// The v08 superblock as values (DISK §3). Positions and sizes are those of the layout on this very device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// Last agreed size; 0 when never agreed.
    pub la_size: SectorCount,
    /// current, bitmap, history younger, history older.
    pub uuid: [u64; 4],
    /// Identity of the backing metadata; kept as found.
    pub device_uuid: u64,
    /// See [`flags`].
    pub flags: u32,
    /// [`MAGIC_CLEAN`] or [`MAGIC_UNCLEAN`].
    pub magic: u32,
    /// Size of the metadata area, sectors.
    pub md_size_sect: u32,
    /// Activity log relative to the superblock, sectors.
    pub al_offset: i32,
    /// Configured number of hot extents.
    pub al_nr_extents: u32,
    /// Bitmap relative to the superblock, sectors.
    pub bm_offset: i32,
    /// Always 4096.
    pub bm_bytes_per_bit: u32,
    /// Kept as found.
    pub la_peer_max_bio_size: u32,
    /// Activity-log stripes, at least 1.
    pub al_stripes: u32,
    /// Blocks of 4 KiB in a stripe.
    pub al_stripe_size_4k: u32,
}

/// Where metadata belongs on devices of the size they have now, in the terms of the superblock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MetaPlace {
    /// Usable sectors.
    pub capacity: SectorCount,
    /// As in the superblock.
    pub md_size_sect: u32,
    /// As in the superblock.
    pub al_offset: i32,
    /// As in the superblock.
    pub bm_offset: i32,
    /// The superblock is at another position now: metadata has to be moved.
    pub moves: bool,
}

/// One block of the activity log (DISK §7.1), before encoding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AlTransaction {
    /// Grows by one per block, wraps.
    pub number: u32,
    /// Slot changes: (slot, extent now in it); at most 64.
    pub updates: Vec<(u16, u32)>,
    /// Number of slots in the table.
    pub context_size: u16,
    /// First slot shown in `context`.
    pub context_start_slot: u16,
    /// Extents held by `context_start_slot..`, before the updates; `u32::MAX` = free; at most 919.
    pub context: Vec<u32>,
}

/// Bytes of one bitmap page.
pub const BITMAP_PAGE_BYTES: usize = 4096;
/// Bits of one bitmap page: 128 MiB of data.
pub const BITMAP_PAGE_BITS: u64 = BITMAP_PAGE_BYTES as u64 * 8;

/// One 4 KiB page of the bitmap, as 64-bit words in native integers (bit n of word w is bit `w*64+n`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapPage {
    /// Which page of the area.
    pub index: u32,
    /// Its words.
    pub words: Box<[u64; BITMAP_PAGE_BYTES / 8]>,
}

/// A backing disk whose metadata was read and validated: what `attach` gives to the core.
#[derive(Clone, Debug)]
pub struct Attached {
    /// The superblock as found.
    pub superblock: Superblock,
    /// Extents that were hot when the disk was last written, from the activity log. The core sets their
    /// bits when the superblock says Primary. Empty when the log was clean.
    pub hot_extents: Vec<u32>,
    /// The log could not be read although it may matter: every block must be taken as changed.
    pub al_unusable: bool,
    /// The bitmap as found, words as in [`BitmapPage`]; unreadable pages come as all ones.
    pub bitmap: Vec<u64>,
    /// Usable sectors of this disk (DISK §2.2).
    pub capacity: SectorCount,
    /// The backing store can discard.
    pub discard: bool,
    /// Logical block size of the backing store, bytes.
    pub logical_block_bytes: u32,
}
