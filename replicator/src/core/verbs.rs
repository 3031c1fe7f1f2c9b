//! Operators' verbs: where each goes, and how a refusal is put (ADM §4.2; promise 5).
use super::event::{AdminCommand, AdminId, Output, Refusal};
use super::metadata::{BitmapThen, SuperblockThen};
use super::role::Down;
use super::state::{ConnState, DiskState, ReplState, Role};
use super::{Reply, Resource};
use crate::meta::UUID_JUST_CREATED;
use crate::units::VolumeNr;
use lockstep_proto::v1::state_request::Kind;

/// Builds a refusal: DRBD's number and text, the facts, the safe next command.
pub(super) fn refusal(number: i32, text: &str, facts: Vec<String>, advice: &str) -> Refusal {
    Refusal { number, text: text.to_owned(), facts, advice: advice.to_owned() }
}

impl Resource {
    pub(super) fn on_admin(&mut self, id: AdminId, command: AdminCommand) {
        let waits = match &command {
            AdminCommand::Connect { .. }
            | AdminCommand::Disconnect { .. }
            | AdminCommand::SuspendIo
            | AdminCommand::Down => false,
            // Going on without the peer begins a generation.
            AdminCommand::ResumeIo
            | AdminCommand::Attach { .. }
            | AdminCommand::Detach { .. }
            | AdminCommand::Primary { .. }
            | AdminCommand::Secondary
            | AdminCommand::Invalidate(_)
            | AdminCommand::InvalidateRemote(_)
            | AdminCommand::InvalidateMarked(_)
            | AdminCommand::InvalidateRemoteMarked(_)
            | AdminCommand::Verify { .. }
            | AdminCommand::PauseSync(_)
            | AdminCommand::ResumeSync(_)
            | AdminCommand::Outdate(_)
            | AdminCommand::NewCurrentUuid { .. }
            | AdminCommand::Resize { .. }
            | AdminCommand::Configure { .. } => true,
        };
        if matches!(command, AdminCommand::SuspendIo) {
            self.refuse_parked_resumes();
        }
        let role = matches!(command, AdminCommand::Primary { .. } | AdminCommand::Secondary);
        // Facts announced in a handshake, or with a disk that was attached, must hold until it is decided.
        if waits && (self.handshake_running() || (role && self.disk_negotiates())) {
            self.parked.push_back((id, command));
            return;
        }
        self.run_command(id, command);
    }

    /// `suspend-io` acts at once: a `resume-io` that was typed before it, and waits for the end of a handshake, must not
    /// undo it later.
    fn refuse_parked_resumes(&mut self) {
        let parked = std::mem::take(&mut self.parked);
        let (outrun, kept): (Vec<_>, Vec<_>) =
            parked.into_iter().partition(|(_, command)| matches!(command, AdminCommand::ResumeIo));
        self.parked = kept.into();
        for (id, _) in outrun {
            let facts = vec!["suspend-io was ordered after this, before the nodes had met".into()];
            let advice = format!("drbdadm resume-io {}", self.cfg.name);
            let text = "In transient state, retry after next state change";
            self.reply(Reply::Admin(id), Err(refusal(-18, text, facts, &advice)));
        }
    }

    /// Verbs that waited for the end of a handshake.
    pub(super) fn run_parked(&mut self) {
        while !self.handshake_running()
            && !self.disk_negotiates()
            && let Some((id, command)) = self.parked.pop_front()
        {
            self.run_command(id, command);
        }
    }

    /// Facts of this node are on their way to a decision: in a handshake, or with an attached disk.
    pub(super) fn announced_and_undecided(&self) -> bool {
        self.handshake_announced() || self.disk_negotiates()
    }

    /// The peer was told of an attached disk and has not answered.
    fn disk_negotiates(&self) -> bool {
        self.conn == ConnState::Connected && self.devices.iter().any(|device| device.negotiating)
    }

    fn run_command(&mut self, id: AdminId, command: AdminCommand) {
        let reply = Reply::Admin(id);
        match command {
            AdminCommand::Attach { .. } => self.attach_command(reply, command),
            AdminCommand::Detach { volume, force } => {
                self.on_volume(reply, volume, |core, at| core.on_detach(reply, at, force));
            }
            AdminCommand::Connect { discard_my_data, tentative } => {
                self.on_connect(reply, discard_my_data, tentative);
            }
            AdminCommand::Disconnect { force } => self.on_disconnect(reply, force),
            AdminCommand::Primary { force } => self.promote(reply, force),
            AdminCommand::Secondary => self.demote(reply),
            AdminCommand::Invalidate(volume) => {
                self.on_volume(reply, volume, |core, at| {
                    core.full_resync(reply, at, Kind::StartFullSyncAsTarget);
                });
            }
            AdminCommand::InvalidateRemote(volume) => {
                self.on_volume(reply, volume, |core, at| {
                    core.full_resync(reply, at, Kind::StartFullSyncAsSource);
                });
            }
            AdminCommand::InvalidateMarked(volume) => {
                self.on_volume(reply, volume, |core, at| {
                    core.full_resync(reply, at, Kind::StartSyncAsTarget);
                });
            }
            AdminCommand::InvalidateRemoteMarked(volume) => {
                self.on_volume(reply, volume, |core, at| {
                    core.full_resync(reply, at, Kind::StartSyncAsSource);
                });
            }
            AdminCommand::Verify { volume, start, stop } => {
                self.on_volume(reply, volume, |core, at| core.on_verify(id, at, start, stop));
            }
            AdminCommand::PauseSync(volume) => {
                self.on_volume(reply, volume, |core, at| core.pause_sync(reply, at));
            }
            AdminCommand::ResumeSync(volume) => {
                self.on_volume(reply, volume, |core, at| core.resume_sync(reply, at));
            }
            AdminCommand::Outdate(volume) => {
                self.on_volume(reply, volume, |core, at| core.outdate(reply, at));
            }
            AdminCommand::NewCurrentUuid { volume, clear_bitmap } => {
                self.on_volume(reply, volume, |core, at| core.new_current_uuid(id, at, clear_bitmap));
            }
            AdminCommand::Configure { net, volumes } => self.configure(reply, *net, &volumes),
            AdminCommand::Resize { volume, options } => {
                self.on_volume(reply, volume, |core, at| core.resize(reply, at, options));
            }
            AdminCommand::SuspendIo => self.suspend_io(id),
            AdminCommand::ResumeIo => self.resume_io(reply),
            AdminCommand::Down => self.start_down(id),
        }
    }

    fn on_volume(&mut self, reply: Reply, volume: VolumeNr, then: impl FnOnce(&mut Self, usize)) {
        match self.device_index(volume) {
            Some(at) => then(self, at),
            None => self.reply_no_such_volume(reply, volume),
        }
    }

    pub(super) fn reply_no_such_volume(&mut self, reply: Reply, volume: VolumeNr) {
        let have: Vec<String> = self.devices.iter().map(|device| device.nr.0.to_string()).collect();
        let facts = vec![format!("{} has volume(s) {}", self.cfg.name, have.join(", "))];
        let refused = refusal(
            127,
            &format!("no volume {}", volume.0),
            facts,
            &format!("drbdadm status {}", self.cfg.name),
        );
        self.reply(reply, Err(refused));
    }

    pub(super) fn reply(&mut self, reply: Reply, result: Result<(), Refusal>) {
        match reply {
            Reply::Admin(id) => self.out.push_back(Output::AdminReply { id, result }),
            Reply::Internal => {
                // Only a refusal ends the verb; after a success its next step follows.
                if let Err(refused) = result
                    && let Some(down) = self.down.take()
                {
                    self.out.push_back(Output::AdminReply { id: down.reply, result: Err(refused) });
                }
            }
            Reply::Nobody => {}
        }
    }

    /// `invalidate` and `invalidate-remote`, of everything or of what is marked (SEM §17).
    fn full_resync(&mut self, reply: Reply, volume: usize, kind: Kind) {
        let target_here = matches!(kind, Kind::StartFullSyncAsTarget | Kind::StartSyncAsTarget);
        let full = matches!(kind, Kind::StartFullSyncAsTarget | Kind::StartFullSyncAsSource);
        let device = &self.devices[volume];
        let name = self.cfg.name.clone();
        let mut facts = vec![
            format!("connection {}, replication {}", self.conn, device.repl),
            format!("disk here {}, at the peer {}", device.disk, device.peer_disk),
        ];
        let refused = if !device.writable() {
            Some((-4, "Can not resync without local disk", format!("drbdadm attach {name}")))
        } else if self.conn == ConnState::StandAlone && self.role == Role::Secondary && target_here && full {
            return self.invalidate_alone(reply, volume);
        } else if self.conn == ConnState::StandAlone && self.role == Role::Primary && !target_here && full {
            return self.invalidate_remote_alone(reply, volume);
        } else if self.conn != ConnState::Connected {
            Some((-15, "Need a connection to start verify or resync", format!("drbdadm connect {name}")))
        } else if device.repl != ReplState::Established || device.resync.is_some() {
            Some((-8, "Can not start OV/resync since it is already active", format!("drbdadm status {name}")))
        } else if target_here && device.peer_disk != DiskState::UpToDate {
            Some((-2, "Need access to UpToDate data", format!("drbdadm status {name}")))
        } else if target_here && self.role == Role::Primary {
            facts.push("this node is Primary: an application uses the data that would be overwritten".into());
            Some((-2, "Need access to UpToDate data", format!("drbdadm secondary {name} first")))
        } else if target_here && self.role_change.is_some() {
            // The peer would mark everything for a resync that does not fit a Primary when its answer comes.
            facts.push("a role change is running here".into());
            Some((-18, "In transient state, retry after next state change", "try again in a moment".into()))
        } else if !target_here && device.disk != DiskState::UpToDate {
            Some((-2, "Need access to UpToDate data", format!("drbdadm status {name}")))
        } else if !target_here && device.peer_disk < DiskState::Inconsistent {
            Some((-5, "Can not resync without remote disk", format!("on the peer: drbdadm attach {name}")))
        } else {
            None
        };
        match refused {
            Some((number, text, advice)) => self.reply(reply, Err(refusal(number, text, facts, &advice))),
            None => self.ask_for(reply, kind, volume, 0),
        }
    }

    fn invalidate_alone(&mut self, reply: Reply, volume: usize) {
        self.devices[volume].bitmap.set_all();
        self.devices[volume].full_sync = true;
        // Said to be bad by a person: it has no generation any more, so it takes whatever the peer has,
        // related or not.
        self.devices[volume].uuids =
            super::uuid::UuidSet { current: UUID_JUST_CREATED, ..super::uuid::UuidSet::default() };
        self.set_disk(volume, DiskState::Inconsistent);
        self.finish_alone(reply, volume);
    }

    fn invalidate_remote_alone(&mut self, reply: Reply, volume: usize) {
        self.devices[volume].bitmap.set_all();
        self.devices[volume].full_sync = true;
        self.set_peer_disk_fact(volume, DiskState::Inconsistent);
        self.finish_alone(reply, volume);
    }

    /// FULL_SYNC goes to disk at once and stands for the bits until their pages are there.
    fn finish_alone(&mut self, reply: Reply, volume: usize) {
        self.md_touch(volume);
        self.write_bitmap(volume, BitmapThen::FullSync);
        self.reply_when_durable(reply, volume);
    }

    /// `outdate` (SEM §17).
    fn outdate(&mut self, reply: Reply, volume: usize) {
        let device = &self.devices[volume];
        let facts = vec![format!("disk {}, role {}, connection {}", device.disk, self.role, self.conn)];
        let name = self.cfg.name.clone();
        if device.disk == DiskState::Outdated {
            return self.reply_when_durable(reply, volume);
        }
        let refused = if device.disk < DiskState::Outdated {
            Some((-16, "Disk state is lower than outdated", format!("drbdadm status {name}")))
        } else if self.role == Role::Primary {
            Some((-2, "Need access to UpToDate data", format!("drbdadm secondary {name} first")))
        } else if self.conn == ConnState::Connected {
            Some((-6, "Refusing to be Outdated while Connected", format!("drbdadm disconnect {name} first")))
        } else {
            None
        };
        if let Some((number, text, advice)) = refused {
            return self.reply(reply, Err(refusal(number, text, facts, &advice)));
        }
        self.set_disk(volume, DiskState::Outdated);
        self.md_touch(volume);
        self.reply_when_durable(reply, volume);
    }

    /// Done when the superblock says so; refused if its disk fails before.
    pub(super) fn reply_when_durable(&mut self, reply: Reply, volume: usize) {
        if let Reply::Admin(id) = reply {
            self.md_then(volume, SuperblockThen::Reply(id));
        }
    }

    /// `new-current-uuid` (SEM §27).
    fn new_current_uuid(&mut self, id: AdminId, volume: usize, clear_bitmap: bool) {
        let reply = Reply::Admin(id);
        let device = &self.devices[volume];
        let fresh_here = device.uuids.current & !1 == UUID_JUST_CREATED;
        let facts = vec![
            format!("connection {}, replication {}", self.conn, device.repl),
            format!("current identifier {:016X}", device.uuids.current),
        ];
        if !device.writable() {
            let advice = format!("drbdadm attach {}", self.cfg.name);
            return self
                .reply(reply, Err(refusal(138, "Device does not have a disk-config", facts, &advice)));
        }
        if self.conn == ConnState::Connected
            && clear_bitmap
            && fresh_here
            && device.repl == ReplState::Established
        {
            let uuid = self.random_uuid();
            return self.ask_for(reply, Kind::SkipInitialSync, volume, uuid);
        }
        if self.conn != ConnState::StandAlone {
            let advice = format!("drbdadm disconnect {} first", self.cfg.name);
            return self.reply(reply, Err(refusal(151, "Connected: not allowed", facts, &advice)));
        }
        let uuid = self.random_uuid();
        if clear_bitmap {
            self.devices[volume].bitmap.clear_all();
        }
        self.write_bitmap(volume, BitmapThen::NewUuid(id, uuid));
    }

    pub(super) fn new_uuid_bitmap_durable(&mut self, volume: usize, id: AdminId, uuid: u64) {
        let primary = u64::from(self.role == Role::Primary);
        let device = &mut self.devices[volume];
        device.uuids.clear_bitmap();
        device.uuids.bump(uuid | primary);
        if device.disk == DiskState::Inconsistent && device.bitmap.count() == 0 {
            // Truck-based seeding of a fresh disk: its owner declares the data good.
            self.set_disk(volume, DiskState::UpToDate);
        }
        self.md_touch(volume);
        self.md_then(volume, SuperblockThen::Reply(id));
    }

    // ---- down ---------------------------------------------------------------------------------

    fn start_down(&mut self, id: AdminId) {
        if self.down.is_some() {
            let refused = refusal(
                -18,
                "In transient state, retry after next state change",
                vec!["another down is running".into()],
                "wait for it",
            );
            return self.reply(Reply::Admin(id), Err(refused));
        }
        if let Err(refused) = self.check_not_open().and_then(|()| self.check_peer_needs_us("down")) {
            return self.reply(Reply::Admin(id), Err(refused));
        }
        self.down = Some(Down { reply: id, detaching: false });
        self.progress_down();
    }

    /// `down` goes on as soon as the step before is done: demote while the peer still acknowledges,
    /// then leave it, then the disks.
    pub(super) fn progress_down(&mut self) {
        let Some(down) = &self.down else { return };
        if self.role_change.is_some() {
            return;
        }
        if self.role == Role::Primary {
            return self.demote(Reply::Internal);
        }
        if down.detaching {
            if self
                .devices
                .iter()
                .all(|device| device.disk == DiskState::Diskless && device.procedure.is_none())
                && let Some(down) = self.down.take()
            {
                self.reply(Reply::Admin(down.reply), Ok(()));
            }
            return;
        }
        self.outdate_before_leaving();
        self.go_stand_alone("down");
        if self.disk_in_transit() || self.devices.iter().any(|device| device.disk == DiskState::Negotiating) {
            return;
        }
        if let Some(down) = &mut self.down {
            down.detaching = true;
        }
        for volume in 0..self.devices.len() {
            self.on_detach(Reply::Internal, volume, false);
            // With nothing in flight no further input comes that would move it.
            self.progress_disk(volume);
        }
        self.progress_down();
    }
}
