//! Becoming Primary, becoming Secondary (SEM §2), once the peer agrees (`consent.rs`).
//!
//! ```text
//! Secondary --checks--> ask peer --> "Primary" durable in every superblock --> Primary
//! Primary --not open--> drain, all epochs acked --> data and bitmap durable --> superblock --> Secondary
//! ```
//! The demotion waits for the barrier acks: without PRIMARY_IND nobody looks at the activity log again,
//! so everything it stood for must be stable on both nodes first (I1).
use super::event::{AdminId, Event, Output, Refusal, Severity};
use super::fault::Fault;
use super::metadata::{BitmapThen, SuperblockThen};
use super::state::{ConnState, DiskState, ReplState, Role};
use super::verbs::refusal;
use super::{Reply, Resource};
use crate::meta::UUID_JUST_CREATED;
use crate::units::VolumeNr;
use lockstep_proto::v1::state_request::Kind;
use lockstep_proto::v1::volume_info::Phase;

/// DRBD's number for a second Primary where only one is allowed.
const MULTIPLE_PRIMARIES: i32 = -1;

/// A role change on its way.
#[derive(Debug)]
pub(super) struct RoleChange {
    reply: Reply,
    force: bool,
    step: RoleStep,
    /// Volumes whose write of this step is not durable yet.
    left: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RoleStep {
    /// Waiting for writes of a lost session to reach the disk: a Primary's data stands still otherwise.
    Receive,
    /// A Primary peer stands in the way; is it still alive?
    Probe,
    /// Waiting for the peer's consent.
    AskPeer(u64),
    /// Waiting for this run of fence-peer.
    Fence(super::event::HandlerToken),
    /// The superblocks say Primary as soon as they are durable.
    Promote,
    /// Waiting for requests and barrier acks.
    Drain,
    /// Data and bitmaps become durable.
    Settle,
    /// The superblocks no longer say Primary as soon as they are durable.
    Demote,
}

/// `down`: disconnect, demote, detach.
#[derive(Debug)]
pub(super) struct Down {
    pub(super) reply: AdminId,
    pub(super) detaching: bool,
}

impl Resource {
    /// No new request is taken: the role is about to end.
    pub(super) fn demoting(&self) -> bool {
        self.role_change.as_ref().is_some_and(|change| {
            matches!(change.step, RoleStep::Drain | RoleStep::Settle | RoleStep::Demote)
        })
    }

    /// Facts that a handshake announces are about to change. A demotion that drains changes none yet, and what
    /// it drains may wait for this very peer: IO frozen by fencing, or without a good copy.
    pub(super) fn role_change_writes(&self) -> bool {
        self.role_change.as_ref().is_some_and(|change| {
            !matches!(
                change.step,
                RoleStep::Probe | RoleStep::AskPeer(_) | RoleStep::Fence(_) | RoleStep::Drain
            )
        })
    }

    /// A disk may meet the peer: no role change is running, or one that goes on only after the meeting. What a
    /// fence-peer handler is asked for is judged anew when it answers, and it may never answer.
    pub(super) fn role_lets_disks_meet(&self) -> bool {
        self.role_change
            .as_ref()
            .is_none_or(|change| matches!(change.step, RoleStep::Drain | RoleStep::Fence(_)))
    }

    // ---- promotion ----------------------------------------------------------------------------

    pub(super) fn promote(&mut self, reply: Reply, force: bool) {
        if self.role == Role::Primary && self.role_change.is_none() {
            return self.reply(reply, Ok(()));
        }
        if let Err(refused) = self.check_promote(force) {
            // The Primary in the way may be a corpse nobody has noticed yet (SEM §2 #1).
            if refused.number == MULTIPLE_PRIMARIES && self.probe_peer() {
                self.role_change = Some(RoleChange { reply, force, step: RoleStep::Probe, left: 0 });
                return;
            }
            if self.role_change.is_none() && self.handler_may_help(&refused) {
                let step = RoleStep::Fence(self.fence_for_promotion());
                self.role_change = Some(RoleChange { reply, force, step, left: 0 });
                return;
            }
            return self.reply(reply, Err(refused));
        }
        self.promote_checked(reply, force);
    }

    /// Nothing forbids it here.
    fn promote_checked(&mut self, reply: Reply, force: bool) {
        if self.conn == ConnState::Connected {
            let id = self.ask_peer(Kind::Promote, 0, 0);
            self.role_change = Some(RoleChange { reply, force, step: RoleStep::AskPeer(id), left: 0 });
        } else {
            self.role_change = Some(RoleChange { reply, force, step: RoleStep::Receive, left: 0 });
            self.progress_role();
        }
    }

    /// The peer answered the probe: it is alive, and what it says about itself counts.
    pub(super) fn probe_answered(&mut self) {
        if self.role_change.as_ref().is_some_and(|change| change.step == RoleStep::Probe)
            && let Some(change) = self.role_change.take()
        {
            match self.check_promote(change.force) {
                Ok(()) => self.promote(change.reply, change.force),
                Err(refused) => self.reply(change.reply, Err(refused)),
            }
        }
    }

    /// The handler of a promotion answered, and what it said about the peer is recorded.
    pub(super) fn promotion_fence_done(&mut self, token: super::event::HandlerToken) {
        if self.role_change.as_ref().is_none_or(|change| change.step != RoleStep::Fence(token)) {
            return;
        }
        let Some(change) = self.role_change.take() else { return };
        match self.check_promote(change.force) {
            Err(refused) if refused.number == super::fencing::PEER_NOT_OUTDATED && change.force => {
                self.assume_peer_outdated();
                self.promote_checked(change.reply, change.force);
            }
            Err(refused) => self.reply(change.reply, Err(refused)),
            Ok(()) => self.promote_checked(change.reply, change.force),
        }
    }

    /// A promotion that waits for a handler, with the peer back: there is nothing left to ask it.
    pub(super) fn promotion_needs_no_fence(&mut self) {
        if let Some(RoleStep::Fence(token)) = self.role_change.as_ref().map(|change| change.step) {
            self.promotion_fence_done(token);
        }
    }

    fn check_promote(&self, force: bool) -> Result<(), Refusal> {
        let name = &self.cfg.name;
        if self.role_change.is_some() {
            let facts = vec!["another role change is running".to_owned()];
            return Err(refusal(
                -18,
                "In transient state, retry after next state change",
                facts,
                "try again in a moment",
            ));
        }
        if let Some(volume) = self.asked_for_resync_to_here() {
            // Once agreed to, what is here is overwritten: the peer marks it before its answer arrives.
            let nr = self.devices[volume].nr.0;
            return Err(refusal(
                -18,
                "In transient state, retry after next state change",
                vec![format!("volume {nr}: {} was asked for a resync to here", self.cfg.peer_name)],
                "try again in a moment",
            ));
        }
        if self.peer_role == Role::Primary
            && !self.two_primaries_allowed()
            && !self.planted(Fault::SecondPrimaryAllowed)
        {
            return Err(refusal(
                MULTIPLE_PRIMARIES,
                "Multiple primaries not allowed by config",
                vec![format!("{} is Primary and connected", self.cfg.peer_name)],
                &format!("on {}: drbdadm secondary {name}", self.cfg.peer_name),
            ));
        }
        for device in &self.devices {
            if device.disk == DiskState::UpToDate || device.peer_readable() {
                continue;
            }
            let usable =
                matches!(device.disk, DiskState::Inconsistent | DiskState::Outdated | DiskState::Consistent);
            if force && usable {
                continue;
            }
            let mut facts = vec![
                format!("volume {}: the disk here is {}", device.nr.0, device.disk),
                format!(
                    "volume {}: the peer's disk is {}, connection {}",
                    device.nr.0, device.peer_disk, self.conn
                ),
            ];
            if device.uuids.current & !1 == UUID_JUST_CREATED && device.disk == DiskState::Inconsistent {
                facts.push("this is a fresh pair: no node's data was declared good yet".into());
            }
            let advice = if usable {
                format!(
                    "connect to a node with good data; or, if the data here shall count: drbdadm primary --force {name}"
                )
            } else {
                format!("drbdadm attach {name}, or connect to a node with good data")
            };
            return Err(refusal(-2, "Need access to UpToDate data", facts, &advice));
        }
        self.check_fenced()
    }

    /// The promotion on its way will declare data good that nobody knows to be good.
    fn declares_data(&self) -> bool {
        self.role_change.as_ref().is_some_and(|change| change.force)
            && self.devices.iter().any(|device| device.disk != DiskState::UpToDate && !device.peer_readable())
    }

    /// This question to the peer is about the promotion on its way.
    pub(super) fn promotion_is_asked(&self, id: u64) -> bool {
        self.role_change.as_ref().is_some_and(|change| change.step == RoleStep::AskPeer(id))
    }

    /// The peer agreed to the promotion, or refused it.
    pub(super) fn promotion_answered(&mut self, refused: Option<Refusal>) {
        let Some(change) = self.role_change.take() else { return };
        let (to, force) = (change.reply, change.force);
        // While the peer was asked, the good copy may have gone.
        match refused.map_or_else(|| self.check_promote(force), Err) {
            Err(refused) => self.reply(to, Err(refused)),
            Ok(()) => {
                self.role_change = Some(RoleChange { reply: to, force, step: RoleStep::Promote, left: 0 });
                self.promote_write();
            }
        }
    }

    /// This node and the other one are Primary, or about to be with the consent of the other.
    pub(super) fn two_primaries(&self) -> bool {
        let becomes = |change: &RoleChange| {
            matches!(change.step, RoleStep::AskPeer(_) | RoleStep::Receive | RoleStep::Promote)
        };
        let here = self.role == Role::Primary || self.role_change.as_ref().is_some_and(becomes);
        here && (self.peer_role == Role::Primary || self.peer_promotes)
    }

    /// The peer asks to become Primary.
    pub(super) fn judge_peer_promotion(&self) -> Result<(), Refusal> {
        let promoting = self.role_change.as_ref().map(|change| change.step);
        let lower = self.cfg.node_id < self.cfg.peer_node_id;
        let mine_first = match promoting {
            Some(RoleStep::AskPeer(_)) => lower,
            Some(RoleStep::Receive | RoleStep::Promote) => true,
            Some(
                RoleStep::Probe | RoleStep::Fence(_) | RoleStep::Drain | RoleStep::Settle | RoleStep::Demote,
            )
            | None => self.role == Role::Primary,
        };
        if mine_first && !self.two_primaries_allowed() && !self.planted(Fault::SecondPrimaryAllowed) {
            let facts = vec![format!("{} is {} or becoming Primary", self.cfg.node_name, self.role)];
            return Err(refusal(-1, "Multiple primaries not allowed by config", facts, ""));
        }
        if self.shares_ranges() {
            let facts = vec![format!("{} has overlapping writes of its own in flight", self.cfg.node_name)];
            return Err(refusal(
                -18,
                "In transient state, retry after next state change",
                facts,
                "try again",
            ));
        }
        // Both about to call their own copy the good one: that would be two histories (S28).
        let both = matches!(promoting, Some(RoleStep::AskPeer(_))) && lower;
        if both && self.declares_data() {
            let facts = vec![format!("{} is becoming Primary by force as well", self.cfg.node_name)];
            return Err(refusal(-19, "Concurrent state changes detected and aborted", facts, ""));
        }
        Ok(())
    }

    fn promote_write(&mut self) {
        let force = self.role_change.as_ref().is_some_and(|change| change.force);
        self.md_primary = true;
        self.discard_my_data = false;
        let mut with_metadata = Vec::new();
        for volume in 0..self.devices.len() {
            let device = &self.devices[volume];
            let bad =
                matches!(device.disk, DiskState::Inconsistent | DiskState::Outdated | DiskState::Consistent);
            if force && bad && !device.peer_readable() {
                let nr = device.nr;
                self.note(
                    Severity::Warning,
                    format!("volume {}: Forced to consider local data as UpToDate!", nr.0),
                );
                self.set_disk(volume, DiskState::UpToDate);
                self.bump_uuid(volume, true);
            }
            // First: bit 0 of the identifier that becomes the base says who was Primary at the split (SEM §15).
            self.new_generation_if_alone(volume);
            let device = &mut self.devices[volume];
            if device.has_metadata() {
                device.uuids.current |= 1;
                with_metadata.push(volume);
            }
        }
        if let Some(change) = &mut self.role_change {
            change.left = with_metadata.len();
        }
        if with_metadata.is_empty() {
            return self.finish_promote();
        }
        if self.planted(Fault::PromotionNotAwaited) {
            with_metadata.iter().for_each(|volume| self.md_touch(*volume));
            return self.finish_promote();
        }
        for volume in with_metadata {
            self.md_touch(volume);
            self.md_then(volume, SuperblockThen::Role);
        }
    }

    fn finish_promote(&mut self) {
        let Some(change) = self.role_change.take() else { return };
        self.set_role(Role::Primary);
        for volume in 0..self.devices.len() {
            let device = &mut self.devices[volume];
            if device.has_metadata() {
                device.exposed_uuid = device.uuids.current;
            }
            self.update_export(volume);
            // Forced on a connected pair: the other copy is not good, so it becomes a target now (SEM §2 #3).
            let device = &self.devices[volume];
            if change.force
                && self.conn == ConnState::Connected
                && device.repl == ReplState::Established
                && device.peer_disk == DiskState::Inconsistent
                && device.disk == DiskState::UpToDate
            {
                self.devices[volume].negotiating = true;
                self.send_volume_info(volume, Phase::Attach);
            }
        }
        self.send_state();
        self.reply(change.reply, Ok(()));
        self.handshake_try_send();
    }

    // ---- demotion -----------------------------------------------------------------------------

    pub(super) fn demote(&mut self, reply: Reply) {
        if self.role != Role::Primary && self.role_change.is_none() {
            return self.reply(reply, Ok(()));
        }
        if self.role_change.is_some() {
            let facts = vec!["another role change is running".to_owned()];
            let refused = refusal(
                -18,
                "In transient state, retry after next state change",
                facts,
                "try again in a moment",
            );
            return self.reply(reply, Err(refused));
        }
        if let Err(refused) = self.check_not_open() {
            return self.reply(reply, Err(refused));
        }
        self.close_epoch();
        self.role_change = Some(RoleChange { reply, force: false, step: RoleStep::Drain, left: 0 });
        self.progress_role();
    }

    pub(super) fn check_not_open(&self) -> Result<(), Refusal> {
        let open: Vec<String> = self
            .devices
            .iter()
            .filter(|device| device.open_count > 0)
            .map(|device| format!("volume {} is held open by {} client(s)", device.nr.0, device.open_count))
            .collect();
        if open.is_empty() {
            return Ok(());
        }
        Err(refusal(
            -12,
            "Device is held open by someone",
            open,
            "unmount it or disconnect its clients first",
        ))
    }

    pub(super) fn progress_role(&mut self) {
        if let Some(change) = &mut self.role_change
            && change.step == RoleStep::Receive
            && !self.rx.is_orphaned()
        {
            change.step = RoleStep::Promote;
            self.promote_write();
        }
        let drained = self.role_change.as_ref().is_some_and(|change| change.step == RoleStep::Drain)
            && (self.requests_drained() || self.planted(Fault::DemoteWithoutBarriers));
        // What was announced as a Primary holds until it is decided, as for a verb that comes meanwhile.
        if !drained || self.announced_and_undecided() {
            return;
        }
        let volumes: Vec<usize> =
            (0..self.devices.len()).filter(|at| self.devices[*at].has_metadata()).collect();
        if let Some(change) = &mut self.role_change {
            change.step = RoleStep::Settle;
            change.left = volumes.len();
        }
        if volumes.is_empty() {
            self.demote_write();
        }
        for volume in volumes {
            self.write_bitmap(volume, BitmapThen::Role);
        }
    }

    fn demote_write(&mut self) {
        self.md_primary = false;
        let volumes: Vec<usize> =
            (0..self.devices.len()).filter(|at| self.devices[*at].has_metadata()).collect();
        if let Some(change) = &mut self.role_change {
            change.step = RoleStep::Demote;
            change.left = volumes.len();
        }
        if volumes.is_empty() {
            return self.finish_demote();
        }
        for volume in volumes {
            self.devices[volume].uuids.current &= !1;
            self.md_touch(volume);
            self.md_then(volume, SuperblockThen::Role);
        }
    }

    fn finish_demote(&mut self) {
        let Some(change) = self.role_change.take() else { return };
        self.set_role(Role::Secondary);
        for volume in 0..self.devices.len() {
            // Nobody is left who was told of anything.
            self.devices[volume].peer_may_miss = None;
            self.update_export(volume);
        }
        self.send_state();
        self.reply(change.reply, Ok(()));
        self.handshake_try_send();
    }

    /// One volume's write of the current step is durable (or its disk is gone).
    pub(super) fn role_step_done(&mut self) {
        let Some(change) = &mut self.role_change else { return };
        change.left = change.left.saturating_sub(1);
        if change.left > 0 {
            return;
        }
        match change.step {
            RoleStep::Promote => self.finish_promote(),
            RoleStep::Settle => self.demote_write(),
            RoleStep::Demote => self.finish_demote(),
            RoleStep::Receive
            | RoleStep::Probe
            | RoleStep::AskPeer(_)
            | RoleStep::Fence(_)
            | RoleStep::Drain => {}
        }
    }

    fn set_role(&mut self, new: Role) {
        let old = std::mem::replace(&mut self.role, new);
        if old != new {
            self.event(Event::Role(old, new));
        }
    }

    /// Exports a volume while Primary and its size is known.
    pub(super) fn update_export(&mut self, volume: usize) {
        let primary = self.role == Role::Primary;
        let device = &mut self.devices[volume];
        let size = (primary && device.size.0 != 0).then_some(device.size);
        if device.exported != size {
            device.exported = size;
            let volume = device.nr;
            self.out.push_back(Output::Export { volume, size });
        }
    }

    pub(super) fn on_opened(&mut self, volume: VolumeNr, change: i32) {
        if let Some(at) = self.device_index(volume) {
            let device = &mut self.devices[at];
            device.open_count = device.open_count.saturating_add_signed(change);
        }
    }

    /// The peer is Primary and this node holds the only good copy: leaving would stop its application.
    pub(super) fn check_peer_needs_us(&self, leave: &str) -> Result<(), Refusal> {
        if self.peer_role != Role::Primary || self.conn != ConnState::Connected {
            return Ok(());
        }
        let facts: Vec<String> = self
            .devices
            .iter()
            .filter(|device| device.disk == DiskState::UpToDate && device.peer_disk != DiskState::UpToDate)
            .map(|device| {
                format!(
                    "volume {}: {} is Primary, its disk is {}; the disk here is the only good copy",
                    device.nr.0, self.cfg.peer_name, device.peer_disk
                )
            })
            .collect();
        if facts.is_empty() {
            return Ok(());
        }
        let advice = format!(
            "wait for the resync, or on {}: drbdadm secondary {}; then {leave} again",
            self.cfg.peer_name, self.cfg.name
        );
        Err(refusal(-2, "Need access to UpToDate data", facts, &advice))
    }

    /// What verbs about roles, and those that need the peer's consent, wait for.
    pub(super) fn role_waits(&self) -> Vec<String> {
        let mut waits = Vec::from_iter(self.role_change_waits());
        waits.extend(self.asked_waits());
        for device in &self.devices {
            let replies = device
                .md_waiters
                .iter()
                .filter(|(_, then)| matches!(then, SuperblockThen::Reply(_) | SuperblockThen::Done(_)));
            let replies = replies.count();
            if replies > 0 {
                waits.push(format!(
                    "volume {}: the superblock to be durable ({replies} verb(s))",
                    device.nr.0
                ));
            }
        }
        if self.down.is_some() {
            waits.push("demotion and detach of everything (down)".into());
        }
        waits
    }

    fn role_change_waits(&self) -> Option<String> {
        let peer = &self.cfg.peer_name;
        self.role_change.as_ref().map(|change| match change.step {
            RoleStep::Receive => {
                "writes of the lost connection to reach the disk before this node becomes Primary".into()
            }
            RoleStep::Probe => format!("{peer}, which is Primary, to show that it is alive"),
            RoleStep::AskPeer(_) => format!("{peer} to agree that this node becomes Primary"),
            RoleStep::Fence(_) => {
                format!("the handler fence-peer to say that {peer} cannot be Primary")
            }
            RoleStep::Promote => "the superblock to say Primary".into(),
            RoleStep::Drain => format!("writes in flight and {peer} before this node becomes Secondary"),
            RoleStep::Settle => "data and bitmap to be stable before this node becomes Secondary".into(),
            RoleStep::Demote => "the superblock to say Secondary".into(),
        })
    }

    /// The connection ended while the peer was asked about a promotion, or whether it is alive.
    pub(super) fn role_session_lost(&mut self) {
        if self
            .role_change
            .as_ref()
            .is_some_and(|change| matches!(change.step, RoleStep::Probe | RoleStep::AskPeer(_)))
            && let Some(change) = self.role_change.take()
        {
            // Nobody left to object: judged anew, as a node on its own.
            self.promote(change.reply, change.force);
        }
    }
}
