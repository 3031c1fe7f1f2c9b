//! A snapshot of everything `status` shows. Plain data: the control plane turns it into text or JSON.
use crate::core::explain::Decision;
use crate::core::state::{ConnState, DiskState, ReplState, Role};
use crate::units::VolumeNr;
use serde::{Deserialize, Serialize};

/// One resource at one moment.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ResourceStatus {
    /// Resource name.
    pub name: String,
    /// Own node id.
    pub node_id: u32,
    /// Own role.
    pub role: Role,
    /// IO is suspended, and why: `user`, `no-data`, `fencing`, `quorum`.
    pub suspended: Vec<String>,
    /// `flush`, `drain` or `none` (SEM §8).
    pub write_ordering: String,
    /// Own volumes.
    pub volumes: Vec<VolumeStatus>,
    /// The one peer.
    pub connection: ConnectionStatus,
    /// Own node's name.
    #[serde(default)]
    pub node_name: String,
    /// What the last handshakes concluded, oldest first.
    #[serde(default)]
    pub decisions: Vec<PastDecision>,
    /// What open waits are for, in words; empty when nothing waits.
    pub waiting_for: Vec<String>,
}

/// The states of one volume, without the rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct States {
    /// Own role.
    pub role: Role,
    /// Own disk.
    pub disk: DiskState,
    /// Connection.
    pub connection: ConnState,
    /// Replication.
    pub replication: ReplState,
    /// Peer's disk, as known here.
    pub peer_disk: DiskState,
}

/// A decision of a handshake and its age.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PastDecision {
    /// Milliseconds since.
    pub ago_ms: u64,
    /// What was decided, from what.
    pub decision: Decision,
}

/// One own volume.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VolumeStatus {
    /// Volume number.
    pub volume: VolumeNr,
    /// Own disk.
    pub disk: DiskState,
    /// Exported size, KiB; 0 when unknown.
    pub size_kib: u64,
    /// Front ends that hold it open.
    pub open_count: u32,
    /// Application reads, KiB.
    pub read_kib: u64,
    /// Application and peer writes, KiB.
    pub written_kib: u64,
    /// Activity-log transactions written.
    pub al_writes: u64,
    /// Bitmap pages written.
    pub bm_writes: u64,
    /// Application requests in flight.
    pub upper_pending: u64,
    /// Disk IO in flight.
    pub lower_pending: u64,
    /// Identifiers: current, bitmap, two history.
    pub uuids: [u64; 4],
    /// Metadata flags as in the superblock.
    pub flags: u32,
}

/// The connection and what is known of the peer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ConnectionStatus {
    /// Peer's node name.
    pub peer_name: String,
    /// Peer's node id.
    pub peer_node_id: u32,
    /// Connection state.
    pub connection: ConnState,
    /// Peer's role.
    pub peer_role: Role,
    /// More is on its way to the peer than `congestion-fill` allows, or nothing is mirrored for that reason.
    #[serde(default)]
    pub congested: bool,
    /// Application bytes sent and not yet acknowledged, sectors.
    pub ap_in_flight_sectors: u64,
    /// Resync bytes in flight, sectors.
    pub rs_in_flight_sectors: u64,
    /// Per volume.
    pub peer_volumes: Vec<PeerVolumeStatus>,
}

/// The peer's side of one volume.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PeerVolumeStatus {
    /// Volume number.
    pub volume: VolumeNr,
    /// Replication state.
    pub replication: ReplState,
    /// Peer's disk.
    pub peer_disk: DiskState,
    /// Received from the peer, KiB of block data.
    pub received_kib: u64,
    /// Sent to the peer, KiB of block data.
    pub sent_kib: u64,
    /// Blocks not proven equal, KiB.
    pub out_of_sync_kib: u64,
    /// Requests sent to the peer and unanswered.
    pub pending: u64,
    /// Requests from the peer and unanswered.
    pub unacked: u64,
    /// A resync or verify that is running or paused.
    pub resync: Option<ResyncStatus>,
    /// Who pauses a resync: `no`, or `user`, `peer`, `dependency` with commas.
    pub suspended: String,
}

/// Progress of a resync or verify.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ResyncStatus {
    /// A verify.
    pub verify: bool,
    /// Bits set when it started (4 KiB each).
    pub bits_total: u64,
    /// Bits still set.
    pub bits_left: u64,
    /// Bits given up on.
    pub bits_failed: u64,
    /// Bits whose digests were equal.
    pub bits_same: u64,
    /// Milliseconds since the start.
    pub elapsed_ms: u64,
    /// Milliseconds of them that it was paused.
    pub paused_ms: u64,
    /// Mean rate since the start, KiB/s.
    pub rate_kib_s: u64,
    /// Seconds to the end at that rate; `None` when it stands still.
    pub eta_s: Option<u64>,
}
