//! Both translations between our words and the driver's: configuration to device parameters, descriptor to request.
//!
//! Pure functions. What the parameters promise to the kernel:
//!
//! - volatile write cache **and** FUA: a flush makes every write completed before it durable, and a write with FUA is durable
//!   when it is committed. FUA without the cache attribute would have no effect.
//! - discard and write-zeroes limits are below 4 GiB, because kernels before 6.11 silently cut longer write-zeroes short.

use libublk::sys;
use nix::errno::Errno;

use crate::config::DeviceConfig;

/// Bytes in a sector, everywhere in the block layer, whatever the logical block size.
pub const SECTOR_BYTES: u64 = 512;

/// Sectors of a discard or write-zeroes that every kernel handles in full.
const DISCARD_SECTORS_MAX: u32 = u32::MAX >> 9;

/// What a request wants done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// Fill the buffer from the disk.
    Read,
    /// Write the buffer to the disk.
    Write,
    /// Make every write that completed before this request was issued durable.
    Flush,
    /// The range is no longer needed. A hint: doing nothing is allowed. No data.
    Discard,
    /// The range must read as zeros afterwards. No data.
    WriteZeroes {
        /// Keep the range allocated: do not turn the request into a discard.
        no_unmap: bool,
    },
}

impl Op {
    /// Whether the tag's buffer carries data of this request.
    #[must_use]
    pub fn has_data(self) -> bool {
        match self {
            Self::Read | Self::Write => true,
            Self::Flush | Self::Discard | Self::WriteZeroes { .. } => false,
        }
    }
}

/// One request of the block layer, delivered on a tag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IoRequest {
    /// The slot it came on; its answer goes to the same tag.
    pub tag: u16,
    /// What to do.
    pub op: Op,
    /// First sector (512 bytes each). Zero for [`Op::Flush`].
    pub start_sector: u64,
    /// Length in sectors (512 bytes each). Zero for [`Op::Flush`]; may exceed the IO buffer for operations without data.
    pub nr_sectors: u32,
    /// The write must be durable before it is answered.
    pub fua: bool,
}

impl IoRequest {
    /// Length of the range in bytes.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        u64::from(self.nr_sectors) * SECTOR_BYTES
    }

    /// Position of the range on the disk in bytes.
    #[must_use]
    pub fn offset_bytes(&self) -> u64 {
        self.start_sector * SECTOR_BYTES
    }
}

/// Why a request failed, in the classes that the block layer tells apart. Anything else is [`IoFailure::Io`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum IoFailure {
    /// The disk or the device under it failed (`EIO`).
    Io,
    /// No space left to write (`ENOSPC`).
    NoSpace,
    /// Not done by this device (`EOPNOTSUPP`); the block layer falls back where it can.
    Unsupported,
    /// Gave up waiting (`ETIMEDOUT`).
    TimedOut,
    /// No way to the data: path or peer lost (`ENOLINK`).
    Transport,
    /// The medium lost the data (`ENODATA`).
    Medium,
    /// The data failed its checksum (`EILSEQ`).
    Integrity,
    /// The far device refused (`EREMOTEIO`).
    Target,
}

impl IoFailure {
    /// The positive errno that the driver maps to a block status.
    #[must_use]
    pub fn errno(self) -> i32 {
        let errno = match self {
            Self::Io => Errno::EIO,
            Self::NoSpace => Errno::ENOSPC,
            Self::Unsupported => Errno::EOPNOTSUPP,
            Self::TimedOut => Errno::ETIMEDOUT,
            Self::Transport => Errno::ENOLINK,
            Self::Medium => Errno::ENODATA,
            Self::Integrity => Errno::EILSEQ,
            Self::Target => Errno::EREMOTEIO,
        };
        errno as i32
    }
}

/// The result field of a commit: full length in bytes for data, 0 for the rest, a negative errno for failures.
///
/// The length of a discard is never echoed: from 2 GiB on it would be read as an error.
pub(crate) fn result_code(request: &IoRequest, result: Result<(), IoFailure>) -> i32 {
    match result {
        Err(failure) => -failure.errno(),
        Ok(()) if request.op.has_data() => {
            // Invariant: `decode` refuses data longer than the IO buffer, which is at most 32 MiB.
            i32::try_from(request.len_bytes()).expect("data requests fit the IO buffer")
        }
        Ok(()) => 0,
    }
}

/// One entry of the mapped descriptor array. Layout of the driver, native byte order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub(crate) struct RawDescriptor {
    /// Operation in bits 0..8, flags above.
    pub(crate) op_flags: u32,
    /// Length in sectors.
    pub(crate) nr_sectors: u32,
    /// First sector.
    pub(crate) start_sector: u64,
    /// Buffer address given at the last fetch; we keep our own record.
    pub(crate) addr: u64,
}

const _: () = assert!(size_of::<RawDescriptor>() == 24);
const _: () = assert!(size_of::<RawDescriptor>() == size_of::<sys::ublksrv_io_desc>());
const _: () = assert!(align_of::<RawDescriptor>() == align_of::<sys::ublksrv_io_desc>());

/// The limits a descriptor is checked against.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Geometry {
    /// Size of the disk in sectors.
    pub(crate) nr_sectors: u64,
    /// Size of an IO buffer in bytes, as granted by the driver.
    pub(crate) max_io_bytes: u32,
}

/// Turns a descriptor into a request, or tells how to refuse it.
///
/// The kernel checks ranges before it sends them; the second look costs nothing and keeps a driver bug from becoming
/// an access outside a buffer.
pub(crate) fn decode(tag: u16, raw: RawDescriptor, geometry: Geometry) -> Result<IoRequest, IoFailure> {
    let op = match raw.op_flags & 0xff {
        sys::UBLK_IO_OP_READ => Op::Read,
        sys::UBLK_IO_OP_WRITE => Op::Write,
        sys::UBLK_IO_OP_FLUSH => {
            return Ok(IoRequest { tag, op: Op::Flush, start_sector: 0, nr_sectors: 0, fua: false });
        }
        sys::UBLK_IO_OP_DISCARD => Op::Discard,
        sys::UBLK_IO_OP_WRITE_ZEROES => {
            Op::WriteZeroes { no_unmap: raw.op_flags & sys::UBLK_IO_F_NOUNMAP != 0 }
        }
        // Zone operations, write-same and what is still to come: not advertised, so not ours to do.
        _ => return Err(IoFailure::Unsupported),
    };
    let request = IoRequest {
        tag,
        op,
        start_sector: raw.start_sector,
        nr_sectors: raw.nr_sectors,
        fua: raw.op_flags & sys::UBLK_IO_F_FUA != 0,
    };
    let end = raw.start_sector.checked_add(u64::from(raw.nr_sectors));
    if end.is_none_or(|end| end > geometry.nr_sectors) {
        return Err(IoFailure::Io);
    }
    if op.has_data() && request.len_bytes() > u64::from(geometry.max_io_bytes) {
        return Err(IoFailure::Io);
    }
    Ok(request)
}

/// Parameters for SET_PARAMS. `granted_io_bytes` is the buffer size that ADD_DEV returned, which may be below what was asked.
pub(crate) fn device_params(config: &DeviceConfig, granted_io_bytes: u32) -> sys::ublk_params {
    let physical_shift = shift(config.physical_block_bytes);
    let mut params = sys::ublk_params {
        types: sys::UBLK_PARAM_TYPE_BASIC,
        basic: sys::ublk_param_basic {
            attrs: sys::UBLK_ATTR_VOLATILE_CACHE | sys::UBLK_ATTR_FUA,
            logical_bs_shift: shift(config.logical_block_bytes),
            physical_bs_shift: physical_shift,
            io_opt_shift: physical_shift,
            io_min_shift: physical_shift,
            max_sectors: granted_io_bytes >> 9,
            dev_sectors: config.nr_sectors(),
            ..Default::default()
        },
        ..Default::default()
    };
    if config.discard || config.write_zeroes {
        let limit = discard_limit_sectors(config);
        params.types |= sys::UBLK_PARAM_TYPE_DISCARD;
        params.discard = sys::ublk_param_discard {
            discard_alignment: 0,
            // In bytes, unlike every other length here; the driver refuses zero.
            discard_granularity: config.discard_granularity_bytes,
            max_discard_sectors: if config.discard { limit } else { 0 },
            max_write_zeroes_sectors: if config.write_zeroes { limit } else { 0 },
            max_discard_segments: 1,
            reserved0: 0,
        };
    }
    params
}

/// Whether the driver kept what we rely on. It drops parameter kinds it does not know without an error.
pub(crate) fn kept(asked: &sys::ublk_params, got: &sys::ublk_params) -> bool {
    got.types & asked.types == asked.types
        && got.basic.attrs == asked.basic.attrs
        && got.basic.logical_bs_shift == asked.basic.logical_bs_shift
        && got.basic.dev_sectors == asked.basic.dev_sectors
        && got.basic.max_sectors == asked.basic.max_sectors
        && (asked.types & sys::UBLK_PARAM_TYPE_DISCARD == 0
            || (got.discard.max_discard_sectors == asked.discard.max_discard_sectors
                && got.discard.max_write_zeroes_sectors == asked.discard.max_write_zeroes_sectors
                && got.discard.discard_granularity == asked.discard.discard_granularity))
}

/// The greatest discard, rounded down to the granularity (which is a multiple of the logical block).
fn discard_limit_sectors(config: &DeviceConfig) -> u32 {
    let granularity_sectors = config.discard_granularity_bytes >> 9;
    let limit = (config.max_discard_bytes >> 9).min(DISCARD_SECTORS_MAX);
    limit - limit % granularity_sectors
}

/// Exponent of a power of two.
fn shift(bytes: u32) -> u8 {
    // Invariant: at most 31 for any u32.
    u8::try_from(bytes.trailing_zeros()).expect("bit positions of a u32 fit")
}

#[cfg(test)]
mod tests {
    use super::*;

    const GEOMETRY: Geometry = Geometry { nr_sectors: 2048, max_io_bytes: 512 << 10 };

    fn raw(op_flags: u32, start_sector: u64, nr_sectors: u32) -> RawDescriptor {
        RawDescriptor { op_flags, nr_sectors, start_sector, addr: 0xdead_0000 }
    }

    #[test]
    fn every_operation_is_decoded() {
        let op = |op_flags| decode(7, raw(op_flags, 8, 16), GEOMETRY).unwrap().op;
        assert_eq!(op(0), Op::Read);
        assert_eq!(op(1), Op::Write);
        assert_eq!(op(2), Op::Flush);
        assert_eq!(op(3), Op::Discard);
        assert_eq!(op(5), Op::WriteZeroes { no_unmap: false });
        assert_eq!(op(5 | 1 << 15), Op::WriteZeroes { no_unmap: true });
    }

    #[test]
    fn flags_are_kept_apart_from_the_operation() {
        // FAILFAST, META, FUA and SWAP all set: still a write.
        let request = decode(3, raw(1 | 7 << 8 | 1 << 11 | 1 << 13 | 1 << 16, 8, 16), GEOMETRY).unwrap();
        assert_eq!(request, IoRequest { tag: 3, op: Op::Write, start_sector: 8, nr_sectors: 16, fua: true });
        assert_eq!(request.offset_bytes(), 4096);
        assert_eq!(request.len_bytes(), 8192);
        assert!(!decode(3, raw(1, 8, 16), GEOMETRY).unwrap().fua);
    }

    #[test]
    fn a_flush_has_no_range() {
        let request = decode(0, raw(2, u64::MAX, u32::MAX), GEOMETRY).unwrap();
        assert_eq!((request.start_sector, request.nr_sectors), (0, 0));
    }

    #[test]
    fn unknown_operations_are_refused_not_guessed() {
        for op in [4, 6, 10, 13, 15, 18, 255] {
            assert_eq!(decode(0, raw(op, 0, 8), GEOMETRY), Err(IoFailure::Unsupported), "operation {op}");
        }
    }

    #[test]
    fn ranges_end_at_the_end_of_the_disk() {
        assert!(decode(0, raw(0, 2040, 8), GEOMETRY).is_ok());
        assert_eq!(decode(0, raw(0, 2041, 8), GEOMETRY), Err(IoFailure::Io));
        assert_eq!(decode(0, raw(1, u64::MAX, 8), GEOMETRY), Err(IoFailure::Io));
        assert_eq!(decode(0, raw(3, 0, 2049), GEOMETRY), Err(IoFailure::Io));
    }

    #[test]
    fn only_data_must_fit_the_buffer() {
        let geometry = Geometry { nr_sectors: 1 << 24, max_io_bytes: 4096 };
        assert!(decode(0, raw(1, 0, 8), geometry).is_ok());
        assert_eq!(decode(0, raw(1, 0, 9), geometry), Err(IoFailure::Io));
        assert!(decode(0, raw(3, 0, 1 << 23), geometry).is_ok());
    }

    #[test]
    fn results_follow_the_kind_of_request() {
        let request = |op_flags, n| {
            decode(0, raw(op_flags, 0, n), Geometry { nr_sectors: 1 << 24, ..GEOMETRY }).unwrap()
        };
        assert_eq!(result_code(&request(0, 8), Ok(())), 4096);
        assert_eq!(result_code(&request(1, 1024), Ok(())), 512 << 10);
        assert_eq!(result_code(&request(2, 0), Ok(())), 0);
        // 4 GiB: the length in bytes must not leak into the result.
        assert_eq!(result_code(&request(3, 1 << 23), Ok(())), 0);
        assert_eq!(result_code(&request(5, 1 << 23), Ok(())), 0);
        assert_eq!(result_code(&request(1, 8), Err(IoFailure::Io)), -5);
        assert_eq!(result_code(&request(0, 8), Err(IoFailure::NoSpace)), -28);
    }

    #[test]
    fn cache_and_fua_are_always_advertised_together() {
        let params = device_params(&DeviceConfig::new(1 << 30), 512 << 10);
        assert_eq!(params.basic.attrs, sys::UBLK_ATTR_VOLATILE_CACHE | sys::UBLK_ATTR_FUA);
        assert_eq!((params.basic.logical_bs_shift, params.basic.physical_bs_shift), (9, 12));
        assert_eq!((params.basic.dev_sectors, params.basic.max_sectors), (1 << 21, 1024));
        assert_eq!(params.types, sys::UBLK_PARAM_TYPE_BASIC | sys::UBLK_PARAM_TYPE_DISCARD);
    }

    #[test]
    fn max_io_follows_what_the_driver_granted() {
        assert_eq!(device_params(&DeviceConfig::new(1 << 30), 4096).basic.max_sectors, 8);
    }

    #[test]
    fn discard_limits_are_capped_and_aligned() {
        let config = DeviceConfig { logical_block_bytes: 4096, ..DeviceConfig::new(1 << 40) };
        let discard = device_params(&config, 512 << 10).discard;
        assert_eq!(discard.discard_granularity, 4096);
        assert_eq!(discard.max_discard_segments, 1);
        assert_eq!(discard.max_discard_sectors, (u32::MAX >> 9) & !7);
        assert_eq!(discard.max_write_zeroes_sectors, discard.max_discard_sectors);
        let small = DeviceConfig { max_discard_bytes: 10_000, ..config };
        assert_eq!(device_params(&small, 512 << 10).discard.max_discard_sectors, 16);
    }

    #[test]
    fn discard_and_write_zeroes_are_switched_separately() {
        let only = |discard, write_zeroes| {
            let config = DeviceConfig { discard, write_zeroes, ..DeviceConfig::new(1 << 30) };
            let params = device_params(&config, 512 << 10);
            (
                params.types,
                params.discard.max_discard_sectors > 0,
                params.discard.max_write_zeroes_sectors > 0,
            )
        };
        assert_eq!(only(true, false), (3, true, false));
        assert_eq!(only(false, true), (3, false, true));
        assert_eq!(only(false, false), (1, false, false));
    }

    #[test]
    fn a_masked_parameter_is_noticed() {
        let asked = device_params(&DeviceConfig::new(1 << 30), 512 << 10);
        assert!(kept(&asked, &asked));
        let mut got = asked;
        got.types &= !sys::UBLK_PARAM_TYPE_DISCARD;
        assert!(!kept(&asked, &got));
        let mut got = asked;
        got.basic.attrs &= !sys::UBLK_ATTR_FUA;
        assert!(!kept(&asked, &got));
    }
}
