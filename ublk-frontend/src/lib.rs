//! A Linux block device served from userspace: `/dev/ublkbN` through the `ublk_drv` driver.
//!
//! This crate knows block IO and nothing of replication. It is split the way the driver is:
//!
//! - **Control** ([`Device`], `device.rs`): add, start, stop and delete a device. Every control command runs on a
//!   thread that the [`Device`] owns, through the crate `libublk`, and each has a time limit.
//! - **Data** ([`Queue`], `queue.rs`): builds submission entries for, and decodes completion entries of, the **caller's**
//!   io_uring. It starts no thread, sleeps nowhere and owns no data buffer.
//! - **Names** ([`links`]): `/dev/drbdN` and `/dev/drbd/by-res/RES/VOL` as links to the disk.
//!
//! # Why the queue is not libublk's
//!
//! `lockstep` drives one ring per resource: front end, disks and peer socket complete in the same loop, because each hop
//! to another thread costs more than ublk itself. `libublk` 0.4.8 keeps its queue in a thread-local ring with its own event
//! loop and its own meaning of `user_data`; commits made after the first aborted tag are dropped; and futures that own
//! buffers in flight have to be kept alive by hand. So the queue speaks the driver's ABI directly: two commands of 16 bytes
//! (`FETCH_REQ`, `COMMIT_AND_FETCH_REQ`) and one mapped array of descriptors. Everything else, where the ABI is wide and
//! speed does not matter, stays with `libublk`.
//!
//! # Life of a device
//!
//! ```text
//!  control thread                                 owner of the ring
//!  Device::add ── ADD_DEV, SET_PARAMS ──> Queue ──> fetch_sqe for every tag, submit
//!  Device::start ── START_DEV (waits for them)     on_cqe -> Request -> commit_sqe ... (serves partition-scan reads already)
//!  Device::stop  ── STOP_DEV (drains)              on_cqe -> Aborted for every tag; is_drained(); drop the Queue
//!  Device::delete ── DEL_DEV (waits for the drop)
//! ```
//!
//! `start`, `stop` and `delete` wait for the ring owner, so they must be called from **another** thread than the one
//! that drives the ring. All entries of one queue must be submitted by one thread: the driver ties a tag to the
//! thread that fetched it.
//!
//! # What happens when the process dies
//!
//! Devices are added **without** `USER_RECOVERY`: the driver fails what was in flight with `EIO` and removes the disk at once. With
//! recovery it would hold its users in uninterruptible sleep until somebody comes back, and a replicated device may only
//! be taken over after log replay and a look at the peer, which the caller cannot do yet. What stays is the dead
//! character device `/dev/ublkcN`; only a `DEL_DEV` removes it, so [`sweep_dead_devices`] is called at the next start.
//!
//! # Copy mode
//!
//! The driver copies the data of a write into the tag's buffer before it delivers the request, and the data of a read out
//! of the buffer named at commit. The bytes therefore do not change under the caller, who may send and checksum them.
//! A **different** buffer may be named at each commit: a buffer still queued in a socket is simply not handed back yet.

mod config;
mod device;
mod error;
mod kernel;
pub mod links;
mod params;
mod queue;

pub use config::{ConfigError, DeviceConfig};
pub use device::{BRING_UP_TIMEOUT_S, CONTROL_PATH, Device, sweep_dead_devices};
pub use error::UblkError;
pub use params::{IoFailure, IoRequest, Op, SECTOR_BYTES};
pub use queue::{Queue, QueueEvent};
