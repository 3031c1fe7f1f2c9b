//! lockstep: network RAID-1 for block devices in userspace. See the README for the map; this page will hold the architecture.
#[cfg(feature = "runtime")]
pub mod admin;
pub mod core;
#[cfg(feature = "runtime")]
pub mod frontend;
pub mod meta;
#[cfg(feature = "runtime")]
pub mod runtime;
pub mod units;
