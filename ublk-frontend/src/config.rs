//! What the caller asks for, and the rules the driver has for it.
//!
//! The driver answers a wrong parameter with a bare `EINVAL`; the check here says which one it was.

use thiserror::Error;

use crate::params::SECTOR_BYTES;

/// Greatest queue depth the driver takes.
pub(crate) const QUEUE_DEPTH_MAX: u16 = 4096;
/// Greatest IO buffer the driver takes, in bytes.
pub(crate) const IO_BYTES_MAX: u32 = 32 << 20;

/// Geometry and features of a device, fixed when it is added.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceConfig {
    /// Size of the disk in bytes: a multiple of [`Self::logical_block_bytes`], not zero.
    pub size_bytes: u64,
    /// Smallest addressable unit in bytes: power of two from 512 to the page size. Default 512.
    pub logical_block_bytes: u32,
    /// Unit that is written without a read-modify-write, in bytes: power of two, not below the logical block. Default 4096.
    pub physical_block_bytes: u32,
    /// Requests the device holds at once, 1 to 4096. Default 128. Each costs one buffer of [`Self::max_io_bytes`] at the caller.
    pub queue_depth: u16,
    /// Greatest read or write in bytes: multiple of the page, up to 32 MiB. Default 512 KiB.
    pub max_io_bytes: u32,
    /// Advertise discard (TRIM). Default true.
    pub discard: bool,
    /// Advertise write-zeroes. Default true.
    pub write_zeroes: bool,
    /// Unit of a useful discard in bytes: multiple of the logical block. Default 4096.
    pub discard_granularity_bytes: u32,
    /// Greatest discard or write-zeroes in bytes; rounded down to the granularity. Default and hard limit: just below 4 GiB.
    pub max_discard_bytes: u32,
    /// Name of the target kind, for logs only. Default `lockstep`.
    pub name: String,
}

impl DeviceConfig {
    /// Defaults for a disk of `size_bytes`.
    #[must_use]
    pub fn new(size_bytes: u64) -> Self {
        Self {
            size_bytes,
            logical_block_bytes: 512,
            physical_block_bytes: 4096,
            queue_depth: 128,
            max_io_bytes: 512 << 10,
            discard: true,
            write_zeroes: true,
            discard_granularity_bytes: 4096,
            max_discard_bytes: u32::MAX,
            name: "lockstep".to_owned(),
        }
    }

    /// Checks every rule of the driver that depends on the configuration alone.
    pub(crate) fn check(&self, page_bytes: u32) -> Result<(), ConfigError> {
        let logical = self.logical_block_bytes;
        if !logical.is_power_of_two() || !(512..=page_bytes).contains(&logical) {
            return Err(ConfigError::LogicalBlock { got_bytes: logical, page_bytes });
        }
        let physical = self.physical_block_bytes;
        if !physical.is_power_of_two() || physical < logical {
            return Err(ConfigError::PhysicalBlock { got_bytes: physical, logical_bytes: logical });
        }
        if self.size_bytes == 0 || !self.size_bytes.is_multiple_of(u64::from(logical)) {
            return Err(ConfigError::Size { got_bytes: self.size_bytes, logical_bytes: logical });
        }
        if !(1..=QUEUE_DEPTH_MAX).contains(&self.queue_depth) {
            return Err(ConfigError::QueueDepth { got: self.queue_depth });
        }
        let io = self.max_io_bytes;
        if io == 0 || io > IO_BYTES_MAX || !io.is_multiple_of(page_bytes) {
            return Err(ConfigError::IoSize { got_bytes: io, page_bytes });
        }
        if self.discard || self.write_zeroes {
            let granularity = self.discard_granularity_bytes;
            if granularity == 0
                || !granularity.is_multiple_of(logical)
                || granularity > self.max_discard_bytes
            {
                return Err(ConfigError::DiscardGranularity {
                    got_bytes: granularity,
                    logical_bytes: logical,
                });
            }
        }
        Ok(())
    }

    /// Size of the disk in sectors of 512 bytes.
    pub(crate) fn nr_sectors(&self) -> u64 {
        self.size_bytes / SECTOR_BYTES
    }
}

/// A [`DeviceConfig`] that no driver would take.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The logical block is no power of two in range.
    #[error(
        "logical block of {got_bytes} bytes is not a power of two from 512 to the page size {page_bytes}"
    )]
    LogicalBlock {
        /// What was asked for.
        got_bytes: u32,
        /// Upper limit on this machine.
        page_bytes: u32,
    },
    /// The physical block is no power of two, or smaller than the logical one.
    #[error(
        "physical block of {got_bytes} bytes is not a power of two of at least the logical block {logical_bytes}"
    )]
    PhysicalBlock {
        /// What was asked for.
        got_bytes: u32,
        /// The logical block it must cover.
        logical_bytes: u32,
    },
    /// The size is zero or ends inside a logical block.
    #[error("size of {got_bytes} bytes is zero or not a multiple of the logical block {logical_bytes}")]
    Size {
        /// What was asked for.
        got_bytes: u64,
        /// The unit it must be a multiple of.
        logical_bytes: u32,
    },
    /// The queue depth is out of range.
    #[error("queue depth {got} is not in 1..=4096")]
    QueueDepth {
        /// What was asked for.
        got: u16,
    },
    /// The greatest IO is out of range or no multiple of the page.
    #[error("max IO of {got_bytes} bytes is not a multiple of the page size {page_bytes} up to 32 MiB")]
    IoSize {
        /// What was asked for.
        got_bytes: u32,
        /// The unit it must be a multiple of.
        page_bytes: u32,
    },
    /// The discard granularity is zero, no multiple of the block, or above the greatest discard.
    #[error(
        "discard granularity of {got_bytes} bytes is not a multiple of the logical block {logical_bytes} within the discard limit"
    )]
    DiscardGranularity {
        /// What was asked for.
        got_bytes: u32,
        /// The unit it must be a multiple of.
        logical_bytes: u32,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: u32 = 4096;

    #[test]
    fn defaults_are_valid() {
        assert_eq!(DeviceConfig::new(1 << 20).check(PAGE), Ok(()));
    }

    #[test]
    fn each_rule_names_its_field() {
        let good = DeviceConfig::new(1 << 20);
        let with = |change: fn(&mut DeviceConfig)| {
            let mut config = good.clone();
            change(&mut config);
            config.check(PAGE)
        };
        assert!(matches!(with(|c| c.logical_block_bytes = 256), Err(ConfigError::LogicalBlock { .. })));
        assert!(matches!(with(|c| c.logical_block_bytes = 8192), Err(ConfigError::LogicalBlock { .. })));
        assert!(matches!(with(|c| c.logical_block_bytes = 1000), Err(ConfigError::LogicalBlock { .. })));
        assert!(matches!(with(|c| c.physical_block_bytes = 256), Err(ConfigError::PhysicalBlock { .. })));
        assert!(matches!(with(|c| c.size_bytes = 0), Err(ConfigError::Size { .. })));
        assert!(matches!(with(|c| c.size_bytes = 513), Err(ConfigError::Size { .. })));
        assert!(matches!(with(|c| c.queue_depth = 0), Err(ConfigError::QueueDepth { got: 0 })));
        assert!(matches!(with(|c| c.queue_depth = 4097), Err(ConfigError::QueueDepth { got: 4097 })));
        assert!(matches!(with(|c| c.max_io_bytes = 0), Err(ConfigError::IoSize { .. })));
        assert!(matches!(with(|c| c.max_io_bytes = 4097), Err(ConfigError::IoSize { .. })));
        assert!(matches!(with(|c| c.max_io_bytes = (32 << 20) + 4096), Err(ConfigError::IoSize { .. })));
        assert!(matches!(
            with(|c| c.discard_granularity_bytes = 0),
            Err(ConfigError::DiscardGranularity { .. })
        ));
        assert!(matches!(
            with(|c| c.discard_granularity_bytes = 700),
            Err(ConfigError::DiscardGranularity { .. })
        ));
        assert!(matches!(with(|c| c.max_discard_bytes = 512), Err(ConfigError::DiscardGranularity { .. })));
    }

    #[test]
    fn granularity_does_not_matter_without_discard() {
        let config = DeviceConfig {
            discard: false,
            write_zeroes: false,
            discard_granularity_bytes: 0,
            ..DeviceConfig::new(512)
        };
        assert_eq!(config.check(PAGE), Ok(()));
    }
}
