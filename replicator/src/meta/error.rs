//! What can be wrong with a metadata area. Each message says what was expected and what was found,
//! because the operator's next step (which device, which tool) depends on it.
use thiserror::Error;

/// Why a metadata area cannot be laid out or accepted.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum MetaError {
    /// No DRBD magic at the superblock's place.
    #[error("no DRBD metadata at byte {position} (magic word is {found:#010x})")]
    NotFound {
        /// Where the superblock was looked for, bytes.
        position: u64,
        /// The word at the place of the magic.
        found: u32,
    },
    /// DRBD 0.7 metadata.
    #[error(
        "found DRBD 0.7 metadata (v07); convert it with `drbdmeta ... v08 ... create-md` of DRBD 8.4 first"
    )]
    Version07,
    /// DRBD 9 metadata.
    #[error(
        "found DRBD 9 metadata (v09); this program reads v08 (DRBD 8.4): dump it with drbdmeta and create v08 metadata"
    )]
    Version09,
    /// A magic of the same family behind the last known one.
    #[error("found metadata of a newer DRBD (magic {0:#010x}); this program reads v08 (DRBD 8.4)")]
    Newer(u32),
    /// A field contradicts the device or the format.
    #[error("metadata field {field} is {found}, expected {expected}")]
    Field {
        /// Name of the field in DRBD's terms.
        field: &'static str,
        /// What the layout on this device demands.
        expected: i64,
        /// What the superblock says.
        found: i64,
    },
    /// The metadata area reaches beyond its device.
    #[error("metadata area of {md_sectors} sectors does not fit the device of {device_sectors} sectors")]
    BeyondDevice {
        /// What the superblock says, sectors.
        md_sectors: u64,
        /// Size of the metadata device, sectors.
        device_sectors: u64,
    },
    /// The bitmap cannot cover the size that the nodes agreed on.
    #[error("bitmap covers {covered_sectors} sectors, but the last agreed size is {la_size} sectors")]
    BitmapTooSmall {
        /// What the bitmap covers.
        covered_sectors: u64,
        /// `la_size_sect` of the superblock.
        la_size: u64,
    },
    /// Activity-log stripes out of range.
    #[error(
        "activity log of {stripes} stripes x {stripe_size_4k} blocks of 4 KiB is not in the range 8..=8192 blocks"
    )]
    AlGeometry {
        /// Number of stripes.
        stripes: u32,
        /// Blocks of a stripe.
        stripe_size_4k: u32,
    },
    /// Stripes other than the default on an indexed metadata device.
    #[error("an indexed metadata device allows only the default activity log of 1 stripe of 32 KiB")]
    AlStripesIndexed,
    /// The device cannot hold the metadata.
    #[error("device of {bytes} bytes is too small: at least {needed} bytes are needed")]
    TooSmall {
        /// Size of the device.
        bytes: u64,
        /// Least size for this layout.
        needed: u64,
    },
    /// Beyond what DRBD's formats and tools support.
    #[error("device of {bytes} bytes is larger than the supported 1 PiB")]
    TooLarge {
        /// Size of the device.
        bytes: u64,
    },
    /// A transaction that does not fit its block.
    #[error(
        "activity-log transaction with {updates} updates and {context} context entries does not fit a block"
    )]
    AlTransactionTooBig {
        /// Number of updates.
        updates: usize,
        /// Number of context entries.
        context: usize,
    },
}
