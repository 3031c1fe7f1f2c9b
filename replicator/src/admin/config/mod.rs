//! The configuration language: DRBD's, legacy spellings included (ADM §1, §2).
//!
//! bytes -> `lexer` -> tokens -> `tree` -> statements with spans -> `read` -> typed declarations -> `resolve` ->
//! [`Config`], validated once. Every problem of a text is found in one go; none makes the parser panic or slow.
//!
//! Where DRBD leaves a choice: node ids of a pair that has none are given by name, 0 to the one that sorts first (DRBD
//! 9's tools hash the addresses; the ids are lockstep's own business, and an id must not change with an address).
//! The section `lockstep { nbd-listen ADDR:PORT; nbd-socket PATH; front-end auto|ublk|nbd; spin-us N; }` is an
//! extension, allowed in `common`, `resource` and host sections.
mod decl;
pub mod diagnostics;
mod dump;
mod glob;
mod lexer;
mod load;
pub mod model;
pub mod options;
mod read;
mod read_host;
mod resolve;
mod source;
pub mod table;
mod to_core;
mod tree;
mod value;

pub use diagnostics::{Diagnostic, Severity, render_all};
pub use dump::dump;
pub use load::{Filesystem, Loader, Outcome, SEARCH, load, parse_bytes, parse_with};
pub use model::{Address, Config, Connection, Host, HostVolume, MetaDisk, Resource};
pub use source::Location;
pub use to_core::{ConfigError, choices};
