//! What the core needs to know of a resource's configuration: resolved values, no text. Defaults are DRBD's (ADM §2).
use crate::units::{SectorCount, VolumeNr};
use serde::{Deserialize, Serialize};

/// When the remote part of a write counts as done (SEM §7).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Protocol {
    /// Handed to the local send queue.
    A,
    /// In the peer's memory.
    B,
    /// On the peer's disk.
    C,
}

/// What a local IO error leads to (SEM §21).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum OnIoError {
    /// Keep the disk, mark it Inconsistent.
    PassOn,
    /// Detach and run the handler first.
    CallLocalIoError,
    /// Detach.
    Detach,
}

/// How writes of different epochs are kept apart on the receiving disk (SEM §8).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum WriteOrdering {
    /// Neither.
    None,
    /// Wait for completion.
    Drain,
    /// Wait for completion, then flush.
    Flush,
}

/// One resource.
#[derive(Clone, Debug, PartialEq)]
pub struct ResourceConfig {
    /// Resource name.
    pub name: String,
    /// Own node id; the lower id wins ties.
    pub node_id: u32,
    /// Own node name.
    pub node_name: String,
    /// Peer's node id.
    pub peer_node_id: u32,
    /// Peer's node name.
    pub peer_name: String,
    /// Network options.
    pub net: NetConfig,
    /// Volumes, by number.
    pub volumes: Vec<VolumeConfig>,
}

/// The `net` options the core acts on.
#[derive(Clone, Debug, PartialEq)]
pub struct NetConfig {
    /// Default C.
    pub protocol: Protocol,
    /// Idle time before a ping, ms. Default 10000.
    pub ping_int_ms: u64,
    /// A ping must be answered within this, ms. Default 500.
    pub ping_timeout_ms: u64,
    /// Base of `ko_count`, ms. Default 6000.
    pub timeout_ms: u64,
    /// A write unanswered for `ko_count * timeout_ms` ends the connection; 0 = never. Default 7.
    pub ko_count: u64,
    /// Between attempts to connect, ms. Default 10000.
    pub connect_int_ms: u64,
    /// Writes in an epoch at most. Default 2048.
    pub max_epoch_size: u32,
    /// Both nodes may be Primary. Default false.
    pub allow_two_primaries: bool,
    /// DRBD's number of the after-sb-0pri policy; compared at the handshake. Default 0 = disconnect.
    pub after_sb_0pri: u32,
    /// Same for 1pri.
    pub after_sb_1pri: u32,
    /// Same for 2pri.
    pub after_sb_2pri: u32,
}

impl Default for NetConfig {
    fn default() -> Self {
        Self {
            protocol: Protocol::C,
            ping_int_ms: 10_000,
            ping_timeout_ms: 500,
            timeout_ms: 6_000,
            ko_count: 7,
            connect_int_ms: 10_000,
            max_epoch_size: 2048,
            allow_two_primaries: false,
            after_sb_0pri: 0,
            after_sb_1pri: 0,
            after_sb_2pri: 0,
        }
    }
}

/// One volume.
#[derive(Clone, Debug, PartialEq)]
pub struct VolumeConfig {
    /// Volume number.
    pub nr: VolumeNr,
    /// `size` option; `None` = all.
    pub user_size: Option<SectorCount>,
    /// Hot extents, 67..=65534. Default 1237; capped at attach by what the log on disk holds.
    pub al_extents: u32,
    /// `al-updates`. Default true.
    pub al_updates: bool,
    /// Default detach.
    pub on_io_error: OnIoError,
    /// From `disk-flushes` and `disk-drain`. Default flush.
    pub write_ordering: WriteOrdering,
    /// Fixed resync rate, KiB/s; `None` = as fast as the window allows.
    pub resync_rate_kib_s: Option<u64>,
}

impl VolumeConfig {
    /// A volume with every option at its default.
    #[must_use]
    pub fn new(nr: VolumeNr) -> Self {
        Self {
            nr,
            user_size: None,
            al_extents: 1237,
            al_updates: true,
            on_io_error: OnIoError::Detach,
            write_ordering: WriteOrdering::Flush,
            resync_rate_kib_s: None,
        }
    }
}
