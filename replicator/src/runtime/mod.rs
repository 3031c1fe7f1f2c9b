//! Everything with IO: one thread and one io_uring per resource, and the control plane's way to it.
//!
//! | file | owns |
//! |---|---|
//! | `handle.rs` | start, command, watch, stop: what the daemon sees |
//! | `inbox.rs` | the queue into the thread |
//! | `driver.rs` | the thread's turn: completions, core, outputs |
//! | `ring.rs`, `memory.rs` | io_uring; memory that belongs to it while it works |
//! | `spin.rs` | whether to look for a completion before going to sleep |
//! | `buffers.rs` | payload buffers, counted |
//! | `stream.rs` | receiving and sending on one socket |
//! | `peer.rs` | frames of the peer |
//! | `nbd_conn.rs` | requests of NBD clients |
//! | `ublk_dev.rs` | requests of ublk disks |
//! | `disk.rs`, `backing.rs` | backing disks |
//! | `net.rs`, `preamble.rs` | finding the peer, on tokio |
//! | `handlers.rs` | the operator's handlers, on tokio |
//! | `story.rs` | events for the log |
//!
//! Unsafe code is in `ring.rs`, `disk.rs` and `buffers.rs` only.
pub mod backing;
pub mod buffers;
mod disk;
mod driver;
mod handle;
pub mod handlers;
mod inbox;
mod memory;
mod meta_job;
mod nbd_conn;
mod net;
mod peer;
mod preamble;
mod ring;
mod spin;
mod story;
mod stream;
#[cfg(feature = "ublk")]
mod ublk_dev;

pub use handle::{ResourceHandle, RuntimeConfig, StartError};
pub use ring::RingError;
#[cfg(feature = "ublk")]
pub use ublk_dev::{MAX_DISCARD_BYTES, MAX_IO_BYTES, queue_depth};
