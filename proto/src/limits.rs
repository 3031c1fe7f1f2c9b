//! Limits of the wire, each a constant with its unit. A peer that exceeds one breaks the protocol.

/// Lowest protocol version this code speaks.
pub const PROTOCOL_VERSION_MIN: u32 = 1;
/// Highest protocol version this code speaks.
pub const PROTOCOL_VERSION_MAX: u32 = 1;

/// Largest prost header of a frame, bytes.
pub const MAX_HEADER_BYTES: usize = 4096;
/// Largest payload of a frame, bytes: one application request.
pub const MAX_PAYLOAD_BYTES: usize = 1 << 20;
/// Largest range of one discard or write-zeroes, sectors (32 activity-log extents, SEM §1).
pub const MAX_TRIM_SECTORS: u64 = 32 * 8192;
/// Largest range of one data request, sectors.
pub const MAX_REQUEST_SECTORS: u64 = (MAX_PAYLOAD_BYTES as u64) / 512;
/// No range on the wire ends behind this sector: byte offsets in files are signed 64-bit numbers.
pub const MAX_END_SECTOR: u64 = (i64::MAX as u64) / 512;
/// Bitmap words in one `Bitmap` frame.
pub const MAX_BITMAP_WORDS: usize = 64 * 1024 / 8;

/// Feature bit: the sender can apply `WriteZeroes` and `RsDeallocated`.
pub const FEATURE_WRITE_ZEROES: u64 = 1 << 0;
/// Feature bit: the sender can apply `Discard`.
pub const FEATURE_DISCARD: u64 = 1 << 1;
/// Feature bit: the sender follows a peer that pulls ahead (`VolumeState.ahead`).
pub const FEATURE_AHEAD: u64 = 1 << 2;
/// All features this code offers.
pub const FEATURES: u64 = FEATURE_WRITE_ZEROES | FEATURE_DISCARD | FEATURE_AHEAD;

const _: () = assert!(MAX_REQUEST_SECTORS <= MAX_TRIM_SECTORS);
const _: () = assert!(MAX_BITMAP_WORDS * 8 <= MAX_PAYLOAD_BYTES);
const _: () = assert!(PROTOCOL_VERSION_MIN <= PROTOCOL_VERSION_MAX);
