//! The replication core: all decisions, no IO, no clock, no threads, no randomness of its own.
#![forbid(unsafe_code)]
pub mod activity_log;
pub mod bitmap;
pub mod config;
pub mod event;
pub mod interval;
pub mod state;
pub mod status;
pub mod timer;
pub mod uuid;
