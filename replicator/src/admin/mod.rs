//! The operator's side: configuration, control socket, the daemon, and the commands that talk to it.
//!
//! | file | owns |
//! |---|---|
//! | `entry.rs`, `cli.rs`, `links.rs` | the five program names and their command lines |
//! | `config/`, `plan.rs` | the configuration, and this node's part of it |
//! | `verbs.rs`, `setup.rs`, `drbdmeta.rs` | what drbdadm, drbdsetup and drbdmeta do |
//! | `control.rs`, `client.rs` | the control socket's language and the command's end of it |
//! | `daemon.rs`, `process.rs`, `node.rs` | lockstepd: its life, its process, its resources |
//! | `dependency.rs` | `resync-after` between resources |
//! | `view.rs`, `status_text.rs`, `status_json.rs` | what `status` shows |
//! | `explain.rs` | what `explain` shows |
//! | `outcome.rs` | exit codes and refusals |
pub mod cli;
pub mod client;
pub mod config;
pub mod control;
pub mod daemon;
pub mod dependency;
pub mod drbdmeta;
pub mod entry;
mod explain;
pub mod links;
pub mod node;
pub mod outcome;
pub mod plan;
pub mod process;
pub mod setup;
pub mod status_json;
pub mod status_text;
pub mod verbs;
pub mod view;

#[cfg(test)]
mod status_tests;
