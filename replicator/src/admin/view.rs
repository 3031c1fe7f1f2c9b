//! What the control plane shows of a resource: the core's snapshot plus what only the configuration
//! knows (minors, paths of backing devices, addresses).
use crate::core::status::{PeerVolumeStatus, ResourceStatus, VolumeStatus};
use crate::units::VolumeNr;
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;

/// One resource, ready to be printed.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ResourceView {
    /// The core's snapshot.
    pub status: ResourceStatus,
    /// What the configuration adds for each volume.
    pub devices: Vec<DeviceView>,
    /// This node's replication address.
    pub local_addr: SocketAddr,
    /// The peer's.
    pub peer_addr: SocketAddr,
    /// Users of the exported volumes, for `secondary` and `down`: "RES/VOL by WHO", one each.
    pub clients: Vec<String>,
}

/// What the configuration says of a volume.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DeviceView {
    /// Volume number.
    pub volume: VolumeNr,
    /// Minor number.
    pub minor: u32,
    /// Backing device; `None` = `disk none`.
    pub backing_dev: Option<String>,
    /// Where the volume can be reached while Primary (NBD addresses, device paths).
    pub exports: Vec<String>,
}

impl ResourceView {
    /// The configuration's side of `volume`.
    #[must_use]
    pub fn device(&self, volume: VolumeNr) -> Option<&DeviceView> {
        self.devices.iter().find(|device| device.volume == volume)
    }

    /// Own state of `volume`.
    #[must_use]
    pub fn volume(&self, volume: VolumeNr) -> Option<&VolumeStatus> {
        self.status.volumes.iter().find(|own| own.volume == volume)
    }

    /// The peer's state of `volume`.
    #[must_use]
    pub fn peer_volume(&self, volume: VolumeNr) -> Option<&PeerVolumeStatus> {
        self.status.connection.peer_volumes.iter().find(|peer| peer.volume == volume)
    }
}
