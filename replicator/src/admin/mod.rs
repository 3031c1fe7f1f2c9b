//! The operator: configuration, control socket, commands.
pub mod config;
