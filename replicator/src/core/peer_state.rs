//! What the nodes tell each other of their states while they are connected, and what a change of the peer's disk
//! means here (SEM §5, §6).
use super::Resource;
use super::event::Payload;
use super::metadata::SuperblockThen;
use super::state::{ConnState, DiskState, ReplState, Role};
use lockstep_proto::{Message, v1};

impl Resource {
    /// Own role and disk states to the peer.
    pub(super) fn send_state(&mut self) {
        if !self.session.as_ref().is_some_and(|session| session.handshake.done) {
            return;
        }
        let volumes = self
            .devices
            .iter()
            .map(|device| v1::VolumeState {
                volume: u32::from(device.nr.0),
                disk_state: device.told_disk().to_wire(),
                sync_paused: device.pauses.own(),
                ahead: device.repl == ReplState::Ahead,
            })
            .collect();
        let state = v1::State { role: self.role.to_wire(), volumes };
        self.send(Message::State(state), Payload::None);
    }

    pub(super) fn on_peer_state(&mut self, state: &v1::State) {
        let Some(role) = Role::from_wire(state.role) else { return self.protocol_error("an unknown role") };
        self.set_peer_role(role);
        for entry in &state.volumes {
            let Some(volume) = self.wire_device(entry.volume) else { continue };
            let Some(disk) = DiskState::from_wire(entry.disk_state) else {
                return self.protocol_error("an unknown disk state");
            };
            self.devices[volume].peer_said = disk;
            self.on_peer_pause(volume, entry.sync_paused);
            // During a resync the end is told by ResyncFinished, not by a state alone.
            let resyncing = self.devices[volume].resync.is_some();
            if resyncing && entry.ahead {
                // A target that is in sync already, before this source has made that durable. Passed over, the
                // news would be lost, and this copy would count as good while it is only sent notes.
                return self.drop_session(
                    ConnState::NetworkFailure,
                    "the peer pulled ahead before the end of the resync was heard; starting over",
                );
            }
            if resyncing && disk > DiskState::Inconsistent {
                continue;
            }
            // It may not have heard yet that this node is Ahead.
            if self.devices[volume].repl == ReplState::Ahead && disk > DiskState::Outdated {
                continue;
            }
            // Old news: it was sent before the peer heard what its disk is now. To believe it would leave
            // writes without a note to a target whose bitmap was sent (S02).
            if disk == DiskState::Negotiating && self.devices[volume].peer_disk > DiskState::Negotiating {
                continue;
            }
            self.set_peer_disk_fact(volume, disk);
            self.peer_disk_consequences(volume);
            self.on_peer_ahead(volume, entry.ahead);
        }
    }

    /// What follows from the peer's disk being gone, or there, on this node.
    pub(super) fn peer_disk_consequences(&mut self, volume: usize) {
        let device = &self.devices[volume];
        let gone = device.peer_disk < DiskState::Inconsistent
            && device.peer_disk != DiskState::Negotiating
            && device.peer_disk != DiskState::Attaching;
        if gone && self.devices[volume].repl == ReplState::WFSyncUUID {
            // Writes that wait for this disk to be durably Inconsistent must not land on it now (I5).
            return self
                .drop_session(ConnState::NetworkFailure, "the source lost its disk before the resync began");
        }
        if gone {
            self.keep_last_copy(volume);
            self.mark_unacked(volume);
            self.abort_resync(volume);
            if self.devices[volume].repl > ReplState::Established {
                self.set_repl(volume, ReplState::Established);
            }
        }
        // This copy goes on alone: as Primary, or for a Primary without a disk (SEM §12). A peer promoted
        // while its disk is being attached writes here only, too: its disk must come back as the older.
        let for_peer = self.peer_role == Role::Primary;
        let alone = gone && (self.md_primary || for_peer);
        let device = &self.devices[volume];
        let serves = for_peer && device.peer_disk == DiskState::Attaching;
        let begins = (alone || serves) && device.disk == DiskState::UpToDate;
        if begins && device.uuids.bitmap == 0 {
            // Bit 0 is of this node's role: it may become the base by which "who was Primary first" is judged.
            self.bump_uuid(volume, self.md_primary);
        } else if begins && device.peer_may_have_current {
            // The disk that left may have finished its resync unheard.
            self.bump_uuid_keeping_base(volume, self.md_primary);
        } else if gone && for_peer && device.disk == DiskState::UpToDate {
            // It holds answers back until it hears that this copy counts alone.
            self.md_then(volume, SuperblockThen::TellPeer);
        }
        self.try_complete_flushes();
    }
}
