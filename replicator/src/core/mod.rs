//! The replication core: all decisions, no IO, no clock, no threads, no randomness of its own.
#![forbid(unsafe_code)]
pub mod config;
pub mod event;
pub mod state;
pub mod status;
