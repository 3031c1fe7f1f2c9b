//! The operator's side: configuration, control socket, the daemon, and the commands that talk to it.
pub mod cli;
pub mod client;
pub mod config;
pub mod control;
pub mod drbdmeta;
pub mod links;
pub mod outcome;
pub mod process;
pub mod status_json;
pub mod status_text;
pub mod view;

#[cfg(test)]
mod status_tests;
