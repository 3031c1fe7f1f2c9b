//! Front ends: the doors through which a user reaches a volume.
pub mod choice;
pub mod nbd;
pub mod server;
#[cfg(feature = "ublk")]
pub mod ublk;
