//! Becoming Primary, becoming Secondary (SEM §2), and what is asked of the peer first (SEM §6).
//!
//! ```text
//! Secondary --checks--> ask peer --> "Primary" durable in every superblock --> Primary
//! Primary --not open--> drain, all epochs acked --> data and bitmap durable --> superblock --> Secondary
//! ```
//! The demotion waits for the barrier acks: without PRIMARY_IND nobody looks at the activity log again,
//! so everything it stood for must be stable on both nodes first (I1).
use super::event::{AdminId, Event, Output, Payload, Refusal, Severity};
use super::fault::Fault;
use super::metadata::{BitmapThen, SuperblockThen};
use super::state::{ConnState, DiskState, ReplState, Role};
use super::verbs::refusal;
use super::{Reply, Resource};
use crate::meta::UUID_JUST_CREATED;
use crate::units::VolumeNr;
use lockstep_proto::v1::state_request::Kind;
use lockstep_proto::v1::volume_info::Phase;
use lockstep_proto::{Message, v1};

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

/// A cluster-wide change other than a promotion, waiting for the peer's answer.
#[derive(Debug)]
pub(super) struct Asked {
    id: u64,
    reply: Reply,
    volume: usize,
    kind: Kind,
    uuid: u64,
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
        if let Some(asked) = self.asked.iter().find(|asked| {
            asked.reply != Reply::Nobody
                && matches!(asked.kind, Kind::StartFullSyncAsTarget | Kind::StartSyncAsTarget)
        }) {
            // Once agreed to, what is here is overwritten: the peer marks it before its answer arrives.
            let nr = self.devices[asked.volume].nr.0;
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

    // ---- asking the peer ------------------------------------------------------------------------

    fn ask_peer(&mut self, kind: Kind, volume: u32, uuid_current: u64) -> u64 {
        let (start_sector, stop_sector) = self
            .wire_device(volume)
            .filter(|_| kind == Kind::StartVerify)
            .and_then(|at| self.devices[at].verify_wanted)
            .unwrap_or_default();
        self.next_state_request += 1;
        let id = self.next_state_request;
        self.send(
            Message::StateRequest(v1::StateRequest {
                id,
                kind: kind.into(),
                volume,
                uuid_current,
                size_sectors: 0,
                assume_clean: false,
                start_sector,
                stop_sector,
            }),
            Payload::None,
        );
        id
    }

    /// Asks for a change of one volume that needs the peer's part.
    pub(super) fn ask_for(&mut self, reply: Reply, kind: Kind, volume: usize, uuid: u64) {
        let number = u32::from(self.devices[volume].nr.0);
        let id = self.ask_peer(kind, number, uuid);
        self.asked.push(Asked { id, reply, volume, kind, uuid });
    }

    /// The peer was asked for a change of this volume and has not answered.
    pub(super) fn asks_for_change(&self, volume: usize) -> bool {
        self.asked.iter().any(|asked| asked.volume == volume)
    }

    pub(super) fn on_state_request(&mut self, request: &v1::StateRequest) {
        let kind = request.kind();
        if matches!(kind, Kind::ResizeAsk | Kind::ResizeCommit) {
            return self.on_resize_request(request, kind);
        }
        if kind == Kind::Outdate && self.role != Role::Primary && self.role_change.is_none() {
            return self.outdate_for_peer(request.id);
        }
        let answer = self.judge_state_request(request);
        let (result, text) = match &answer {
            Ok(()) => (1, String::new()),
            // The peer's operator sees these words only.
            Err(refused) => (refused.number, words_for_peer(refused)),
        };
        let answer_message = v1::StateReply { id: request.id, result, text, value: 0 };
        self.send(Message::StateReply(answer_message), Payload::None);
        if answer.is_ok()
            && let Some(volume) = self.wire_device(request.volume)
        {
            self.cancel_repair(volume);
            match request.kind() {
                Kind::Promote | Kind::Detach | Kind::ResizeAsk | Kind::ResizeCommit | Kind::Outdate => {}
                Kind::StartFullSyncAsTarget => self.begin_resync(volume, true, true, DiskState::Inconsistent),
                Kind::StartFullSyncAsSource => self.begin_resync(volume, false, true, DiskState::UpToDate),
                Kind::StartSyncAsTarget => self.begin_resync(volume, true, false, DiskState::Inconsistent),
                Kind::StartSyncAsSource => self.begin_resync(volume, false, false, DiskState::UpToDate),
                Kind::StartVerify => {
                    self.begin_verify(volume, false, request.start_sector, request.stop_sector);
                }
                Kind::SkipInitialSync => self.skip_initial_sync(volume, request.uuid_current),
            }
        }
    }

    fn judge_state_request(&self, request: &v1::StateRequest) -> Result<(), Refusal> {
        let kind = request.kind();
        if kind == Kind::Promote {
            let promoting = self.role_change.as_ref().map(|change| change.step);
            let lower = self.cfg.node_id < self.cfg.peer_node_id;
            let mine_first = match promoting {
                Some(RoleStep::AskPeer(_)) => lower,
                Some(RoleStep::Receive | RoleStep::Promote) => true,
                Some(
                    RoleStep::Probe
                    | RoleStep::Fence(_)
                    | RoleStep::Drain
                    | RoleStep::Settle
                    | RoleStep::Demote,
                )
                | None => self.role == Role::Primary,
            };
            if mine_first && !self.two_primaries_allowed() && !self.planted(Fault::SecondPrimaryAllowed) {
                let facts = vec![format!("{} is {} or becoming Primary", self.cfg.node_name, self.role)];
                return Err(refusal(-1, "Multiple primaries not allowed by config", facts, ""));
            }
            // Both about to call their own copy the good one: that would be two histories (S28).
            let both = matches!(promoting, Some(RoleStep::AskPeer(_))) && lower;
            if both && self.declares_data() {
                let facts = vec![format!("{} is becoming Primary by force as well", self.cfg.node_name)];
                return Err(refusal(-19, "Concurrent state changes detected and aborted", facts, ""));
            }
            return Ok(());
        }
        if kind == Kind::Outdate {
            let facts = vec![format!("{} is {} or changing", self.cfg.node_name, self.role)];
            return Err(refusal(-6, "Refusing to be Outdated while Connected", facts, ""));
        }
        let Some(volume) = self.wire_device(request.volume) else {
            return Err(refusal(
                -10,
                "State change was refused by peer node",
                vec!["no such volume there".into()],
                "",
            ));
        };
        let device = &self.devices[volume];
        if device.repl != ReplState::Established || device.resync.is_some() || device.procedure.is_some() {
            return Err(refusal(-8, "Can not start OV/resync since it is already active", Vec::new(), ""));
        }
        if device.negotiating || self.repair_goes_first(volume) {
            let facts = vec!["another change of this volume is on its way there".into()];
            return Err(refusal(-18, "In transient state, retry after next state change", facts, ""));
        }
        match kind {
            Kind::StartFullSyncAsTarget | Kind::StartSyncAsTarget | Kind::StartVerify
                if device.disk != DiskState::UpToDate =>
            {
                Err(refusal(-2, "Need access to UpToDate data", Vec::new(), ""))
            }
            Kind::StartFullSyncAsSource | Kind::StartSyncAsSource if !device.writable() => {
                Err(refusal(-5, "Can not resync without remote disk", Vec::new(), ""))
            }
            Kind::StartFullSyncAsSource | Kind::StartSyncAsSource if self.role == Role::Primary => {
                let facts = vec!["that node is Primary".into()];
                Err(refusal(-10, "State change was refused by peer node", facts, ""))
            }
            Kind::SkipInitialSync if device.uuids.current & !1 != UUID_JUST_CREATED || !device.writable() => {
                Err(refusal(151, "The peer's disk holds data", Vec::new(), ""))
            }
            Kind::Promote
            | Kind::Detach
            | Kind::ResizeAsk
            | Kind::ResizeCommit
            | Kind::Outdate
            | Kind::StartFullSyncAsTarget
            | Kind::StartFullSyncAsSource
            | Kind::StartSyncAsTarget
            | Kind::StartSyncAsSource
            | Kind::StartVerify
            | Kind::SkipInitialSync => Ok(()),
        }
    }

    pub(super) fn on_state_reply(&mut self, reply: &v1::StateReply) {
        if self.on_resize_reply(reply) {
            return;
        }
        let refused = (reply.result < 1).then(|| {
            let mut facts = vec![format!("{} says: {}", self.cfg.peer_name, reply.text)];
            facts.extend(self.devices.iter().map(|device| {
                format!(
                    "volume {}: here {}, disk {}, replication {}; the peer is {}, its disk {}",
                    device.nr.0, self.role, device.disk, device.repl, self.peer_role, device.peer_disk
                )
            }));
            let advice = format!("drbdadm status {} on both nodes", self.cfg.name);
            refusal(reply.result, "State change was refused by peer node", facts, &advice)
        });
        if let Some(change) = &mut self.role_change
            && change.step == RoleStep::AskPeer(reply.id)
        {
            let (to, force) = (change.reply, change.force);
            self.role_change = None;
            // While the peer was asked, the good copy may have gone.
            match refused.map_or_else(|| self.check_promote(force), Err) {
                Err(refused) => self.reply(to, Err(refused)),
                Ok(()) => {
                    self.role_change =
                        Some(RoleChange { reply: to, force, step: RoleStep::Promote, left: 0 });
                    self.promote_write();
                }
            }
            return;
        }
        let Some(at) = self.asked.iter().position(|asked| asked.id == reply.id) else {
            return self.protocol_error("an answer to a question nobody asked");
        };
        let asked = self.asked.remove(at);
        let repair = asked.reply == Reply::Nobody;
        if let Some(refused) = refused {
            if repair {
                self.repair_refused(asked.volume);
            }
            return self.reply(asked.reply, Err(refused));
        }
        if asked.kind == Kind::Outdate {
            return self.leave(asked.reply, false);
        }
        let device = &self.devices[asked.volume];
        let fits = match asked.kind {
            // An application on this node is served by the peer meanwhile.
            Kind::StartSyncAsTarget if repair => true,
            Kind::StartFullSyncAsTarget | Kind::StartSyncAsTarget => {
                self.role != Role::Primary && self.role_change.is_none()
            }
            Kind::StartFullSyncAsSource | Kind::StartSyncAsSource => device.disk == DiskState::UpToDate,
            Kind::StartVerify => device.verify_wanted.is_some(),
            Kind::SkipInitialSync => device.uuids.current & !1 == UUID_JUST_CREATED,
            Kind::Promote | Kind::Detach | Kind::ResizeAsk | Kind::ResizeCommit | Kind::Outdate => true,
        };
        let ready = device.writable()
            && device.repl == ReplState::Established
            && device.resync.is_none()
            && device.procedure.is_none();
        if !fits || !ready {
            // The peer has begun already: a new handshake brings both to the same state.
            let facts = vec!["this node changed while the peer was asked".to_owned()];
            self.reply(
                asked.reply,
                Err(refusal(-18, "In transient state, retry after next state change", facts, "try again")),
            );
            return self
                .drop_session(ConnState::NetworkFailure, "the peer agreed to a change that no longer fits");
        }
        match asked.kind {
            Kind::StartFullSyncAsTarget => self.begin_resync(asked.volume, false, true, DiskState::UpToDate),
            Kind::StartSyncAsTarget => {
                self.repair_begins(asked.volume);
                self.begin_resync(asked.volume, false, false, DiskState::UpToDate);
                self.gate_degradation(asked.volume);
            }
            Kind::StartSyncAsSource => {
                self.begin_resync(asked.volume, true, false, DiskState::Inconsistent);
            }
            Kind::StartVerify => {
                if let Some((start, stop)) = self.take_verify_wanted(asked.volume) {
                    self.begin_verify(asked.volume, true, start, stop);
                }
            }
            Kind::StartFullSyncAsSource => {
                self.begin_resync(asked.volume, true, true, DiskState::Inconsistent);
            }
            Kind::SkipInitialSync => self.skip_initial_sync(asked.volume, asked.uuid),
            Kind::Promote | Kind::Detach | Kind::ResizeAsk | Kind::ResizeCommit | Kind::Outdate => {}
        }
        match asked.kind {
            // FULL_SYNC is recorded then: a stop does not lose what was ordered.
            Kind::StartFullSyncAsTarget | Kind::StartFullSyncAsSource => {
                self.reply_when_durable(asked.reply, asked.volume);
            }
            _ => self.reply(asked.reply, Ok(())),
        }
    }

    /// Both nodes declare their fresh disks equal (SEM §27).
    fn skip_initial_sync(&mut self, volume: usize, uuid: u64) {
        let device = &mut self.devices[volume];
        device.uuids.current = uuid & !1;
        device.uuids.bitmap = 0;
        device.bitmap.clear_all();
        self.peer_got_our_generation(volume);
        self.set_disk(volume, DiskState::UpToDate);
        self.set_peer_disk_fact(volume, DiskState::UpToDate);
        self.md_touch(volume);
        self.write_bitmap(volume, BitmapThen::Nothing);
        self.send_state();
    }

    /// What verbs about roles, and those that need the peer's consent, wait for.
    pub(super) fn role_waits(&self) -> Vec<String> {
        let peer = &self.cfg.peer_name;
        let mut waits = Vec::new();
        if let Some(change) = &self.role_change {
            waits.push(match change.step {
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
            });
        }
        for asked in self.asked.iter().filter(|asked| asked.reply != Reply::Nobody) {
            let nr = self.devices[asked.volume].nr.0;
            let what = match asked.kind {
                Kind::StartFullSyncAsTarget | Kind::StartSyncAsTarget => "a resync to here",
                Kind::StartFullSyncAsSource | Kind::StartSyncAsSource => "a resync from here",
                Kind::SkipInitialSync => "skipping the initial resync",
                Kind::StartVerify => "a verify",
                Kind::Outdate => "being outdated",
                Kind::Promote | Kind::Detach | Kind::ResizeAsk | Kind::ResizeCommit => "a change",
            };
            waits.push(format!("volume {nr}: {peer} to agree to {what}"));
        }
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

    /// The connection ended while the peer was asked.
    pub(super) fn role_session_lost(&mut self) {
        for asked in std::mem::take(&mut self.asked) {
            let facts = vec!["the connection was lost before the peer answered".to_owned()];
            let refused = refusal(
                -15,
                "Need a connection to start verify or resync",
                facts,
                &format!("drbdadm status {}", self.cfg.name),
            );
            self.reply(asked.reply, Err(refused));
        }
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

/// A refusal as one line for the other node.
fn words_for_peer(refused: &Refusal) -> String {
    let mut words = refused.text.clone();
    if !refused.facts.is_empty() {
        words.push_str(&format!(" ({})", refused.facts.join("; ")));
    }
    words
}
