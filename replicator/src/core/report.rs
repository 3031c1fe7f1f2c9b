//! The status snapshot: everything `status` shows, and in words what open waits are for (promise 3).
use super::Resource;
use super::attach::DiskProcedure;
use super::config::WriteOrdering;
use super::resync::Verify;
use super::state::{ConnState, ReplState, Role};
use super::status::{
    ConnectionStatus, PastDecision, PeerVolumeStatus, ResourceStatus, ResyncStatus, States, VolumeStatus,
};
use crate::units::{Time, VolumeNr};

impl Resource {
    /// The states of one volume alone, for whoever asks after every event.
    #[must_use]
    pub fn states(&self, volume: VolumeNr) -> Option<States> {
        let device = &self.devices[self.device_index(volume)?];
        Some(States {
            role: self.role,
            disk: device.disk,
            connection: self.conn,
            replication: device.repl,
            peer_disk: device.peer_disk,
        })
    }

    /// A snapshot for `status`, at time `now`.
    #[must_use]
    pub fn status(&self, now: Time) -> ResourceStatus {
        let ordering = self.cfg.volumes.iter().map(|volume| volume.write_ordering).max();
        ResourceStatus {
            name: self.cfg.name.clone(),
            node_id: self.cfg.node_id,
            role: self.role,
            suspended: self.suspend_reasons(),
            write_ordering: match ordering {
                Some(WriteOrdering::Flush) => "flush",
                Some(WriteOrdering::Drain) => "drain",
                Some(WriteOrdering::None) | None => "none",
            }
            .to_owned(),
            volumes: (0..self.devices.len()).map(|at| self.volume_status(at)).collect(),
            connection: ConnectionStatus {
                peer_name: self.cfg.peer_name.clone(),
                peer_node_id: self.cfg.peer_node_id,
                connection: self.conn,
                peer_role: if self.conn == ConnState::Connected { self.peer_role } else { Role::Unknown },
                congested: self.is_congested(),
                ap_in_flight_sectors: self.tl.requests().map(|key| self.requests[key].range.len().0).sum(),
                rs_in_flight_sectors: self
                    .devices
                    .iter()
                    .map(|d| {
                        d.resync.as_ref().map_or(0, |resync| resync.pace.in_flight())
                            + d.verify.as_ref().map_or(0, Verify::in_flight_sectors)
                    })
                    .sum(),
                peer_volumes: (0..self.devices.len()).map(|at| self.peer_volume_status(at, now)).collect(),
            },
            node_name: self.cfg.node_name.clone(),
            decisions: self
                .decisions()
                .map(|decision| PastDecision {
                    ago_ms: now.ms_since(decision.at),
                    decision: decision.clone(),
                })
                .collect(),
            waiting_for: self.waits(now),
        }
    }

    fn volume_status(&self, at: usize) -> VolumeStatus {
        let device = &self.devices[at];
        VolumeStatus {
            volume: device.nr,
            disk: device.disk,
            size_kib: device.size.0 / 2,
            open_count: device.open_count,
            read_kib: device.counters.read_sectors / 2,
            written_kib: device.counters.written_sectors / 2,
            al_writes: device.counters.al_writes,
            bm_writes: device.counters.bm_writes,
            upper_pending: self.requests.iter().filter(|(_, request)| request.volume == at).count() as u64,
            lower_pending: u64::from(device.ios),
            uuids: device.uuids.to_array(),
            flags: self.superblock_flags(at),
        }
    }

    fn peer_volume_status(&self, at: usize, now: Time) -> PeerVolumeStatus {
        let device = &self.devices[at];
        let resync = self.resync_status(at, now).or_else(|| self.verify_status(at, now));
        PeerVolumeStatus {
            volume: device.nr,
            replication: device.repl,
            peer_disk: device.peer_disk,
            received_kib: device.counters.received_sectors / 2,
            sent_kib: device.counters.sent_sectors / 2,
            out_of_sync_kib: device.bitmap.count() * 4,
            pending: self
                .requests
                .iter()
                .filter(|(_, request)| request.volume == at && request.waits_for_peer())
                .count() as u64,
            unacked: self.peer_requests.iter().filter(|(_, request)| request.volume() == at).count() as u64,
            resync,
            suspended: device.pauses.reasons(),
        }
    }

    fn resync_status(&self, at: usize, now: Time) -> Option<ResyncStatus> {
        let device = &self.devices[at];
        let resync = device.resync.as_ref().filter(|_| device.repl.is_syncing())?;
        let paused_ms = resync.paused_ms + resync.paused_since.map_or(0, |since| now.ms_since(since));
        let bits_left = device.bitmap.count();
        let elapsed_ms = now.ms_since(resync.started);
        let done_kib = resync.bits_total.saturating_sub(bits_left) * 4;
        let rate_kib_s = (done_kib * 1000).checked_div(elapsed_ms.saturating_sub(paused_ms)).unwrap_or(0);
        let standing = resync.paused_since.is_some();
        Some(ResyncStatus {
            verify: false,
            bits_total: resync.bits_total,
            bits_left,
            bits_failed: resync.bits_failed,
            bits_same: resync.bits_same,
            elapsed_ms,
            paused_ms,
            rate_kib_s,
            eta_s: if standing { None } else { (bits_left * 4).checked_div(rate_kib_s) },
        })
    }

    fn verify_status(&self, at: usize, now: Time) -> Option<ResyncStatus> {
        let device = &self.devices[at];
        let verify = device.verify.as_ref().filter(|_| device.repl.is_verifying())?;
        let bits_left = verify.bits_left();
        let elapsed_ms = now.ms_since(verify.started);
        let done_kib = verify.bits_total().saturating_sub(bits_left) * 4;
        let rate_kib_s = (done_kib * 1000).checked_div(elapsed_ms).unwrap_or(0);
        Some(ResyncStatus {
            verify: true,
            bits_total: verify.bits_total(),
            bits_left,
            bits_failed: 0,
            bits_same: 0,
            elapsed_ms,
            paused_ms: 0,
            rate_kib_s,
            eta_s: (bits_left * 4).checked_div(rate_kib_s),
        })
    }

    /// What keeps something from going on, in words an operator can act on.
    fn waits(&self, now: Time) -> Vec<String> {
        let mut waits = self.suspend_waits(now);
        let peer = &self.cfg.peer_name;
        if self.conn == ConnState::Connecting {
            waits.push(if self.session.is_some() {
                format!("the handshake with {peer}")
            } else {
                format!("a connection to {peer}")
            });
        }
        if self.rx.is_orphaned() && self.session.is_some() {
            waits.push(format!("writes of the lost connection to reach the disk, before {peer} hears of it"));
        }
        let for_peer = self.requests.iter().filter(|(_, request)| request.waits_for_peer()).count();
        if for_peer > 0 {
            waits.push(format!("{for_peer} write(s) to be acknowledged by {peer}"));
        }
        if self.demoting() && !self.requests_drained() {
            waits.push(format!(
                "{} request(s) in flight and the barrier acks of {peer} before this node can become Secondary",
                self.requests.len() + self.flushes.len()
            ));
        }
        waits.extend(self.role_waits());
        waits.extend(self.handlers_running().map(|name| format!("the handler {} to end", name.name())));
        waits.extend((0..self.devices.len()).filter_map(|volume| self.disk_wait(volume, now)));
        waits.extend((0..self.devices.len()).filter_map(|volume| self.target_finish_wait(volume)));
        for (at, device) in self.devices.iter().enumerate() {
            let nr = device.nr.0;
            match &device.procedure {
                Some(DiskProcedure::Attach { step, .. }) => {
                    waits.push(format!("volume {nr}: attach, writing {step:?}"));
                }
                Some(DiskProcedure::Detach { step, .. }) => {
                    waits.push(format!("volume {nr}: detach, step {step:?}, {} IO in flight", device.ios));
                }
                Some(DiskProcedure::Resize(resizing)) => {
                    waits.push(format!("volume {nr}: resize, step {:?}", resizing.step));
                }
                Some(DiskProcedure::Failing { .. }) => {
                    let advice = if device.abandoned_at.is_none() && device.ios > 0 {
                        format!("; drbdadm detach --force {}/{nr} gives them up", self.cfg.name)
                    } else {
                        String::new()
                    };
                    let ios = device.ios;
                    waits.push(format!("volume {nr}: {ios} IO in flight on the failed disk{advice}"));
                }
                None => {}
            }
            waits.extend(self.repair_wait(device, now));
            waits.extend(self.congestion_wait(device, now));
            if device.uuid_gate.is_some() {
                waits.push(format!("volume {nr}: the new generation identifier to be durable"));
            }
            if !device.al_waiters.is_empty() {
                waits.push(format!(
                    "volume {nr}: {} write(s) for a place in the activity log",
                    device.al_waiters.len()
                ));
            }
            if device.locks.nr_waiting() > 0 {
                waits.push(format!(
                    "volume {nr}: {} request(s) for an overlapping one",
                    device.locks.nr_waiting()
                ));
            }
            if matches!(device.repl, ReplState::PausedSyncS | ReplState::PausedSyncT) {
                waits.push(format!("volume {nr}: a paused resync, paused by {}", device.pauses.reasons()));
            }
            if matches!(device.repl, ReplState::WFBitMapS | ReplState::WFBitMapT | ReplState::WFSyncUUID) {
                waits.push(format!("volume {nr}: the bitmap exchange with {peer}"));
            }
            if device.uuid_gate.is_none() && self.target_untold(at) && !device.gated.is_empty() {
                let held = device.gated.len();
                waits.push(format!(
                    "volume {nr}: {peer} to note that its copy is the older one ({held} write(s) held back)"
                ));
            }
        }
        if !self.parked.is_empty() {
            waits.push(format!("{} verb(s) for the end of the handshake with {peer}", self.parked.len()));
        }
        waits
    }
}
