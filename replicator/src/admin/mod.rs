//! The operator's side.
pub mod drbdmeta;
