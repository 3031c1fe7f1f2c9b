//! The operator's side: configuration, verbs, metadata tools.
pub mod config;
pub mod drbdmeta;
