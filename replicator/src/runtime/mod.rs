//! Everything that does IO for the core.
pub mod backing;
