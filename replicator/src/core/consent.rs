//! What needs the peer's part: the question, its consent, and both nodes begin (SEM §2, §6, §27).
//!
//! ```text
//! asking  StateRequest ------------------> judged there; agreed: it begins at once
//!         judged once more; begins <------ StateReply
//! ```
//! A promotion is asked for here and decided in `role.rs`, a resize in `resize.rs`. The peer has begun when its answer
//! arrives. If the change no longer fits here, the session ends, and a handshake brings both to the same state; if the
//! answer is lost, the verb is refused, and what the peer began is undone, or goes on, by the handshake as well.
use super::event::{Payload, Refusal};
use super::metadata::BitmapThen;
use super::state::{ConnState, DiskState, ReplState, Role};
use super::verbs::refusal;
use super::{Reply, Resource};
use crate::meta::UUID_JUST_CREATED;
use lockstep_proto::v1::state_request::Kind;
use lockstep_proto::{Message, v1};

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
    /// Asks, and says which number the answer will have.
    pub(super) fn ask_peer(&mut self, kind: Kind, volume: u32, uuid_current: u64) -> u64 {
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

    /// An operator's verb would overwrite this volume here as soon as the peer agrees.
    pub(super) fn asked_for_resync_to_here(&self) -> Option<usize> {
        let asked = self.asked.iter().find(|asked| {
            asked.reply != Reply::Nobody
                && matches!(asked.kind, Kind::StartFullSyncAsTarget | Kind::StartSyncAsTarget)
        });
        asked.map(|asked| asked.volume)
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
        self.peer_promotes |= kind == Kind::Promote && answer.is_ok();
        if answer.is_ok()
            && let Some(volume) = self.wire_device(request.volume)
        {
            if kind != Kind::Promote {
                // The peer's resync goes over the same blocks; a second Primary changes nothing for the repair.
                self.cancel_repair(volume);
            }
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
            return self.judge_peer_promotion();
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
        if self.promotion_is_asked(reply.id) {
            return self.promotion_answered(refused);
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

    /// What verbs that need the peer's consent wait for.
    pub(super) fn asked_waits(&self) -> Vec<String> {
        let peer = &self.cfg.peer_name;
        let mut waits = Vec::new();
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
        waits
    }

    /// The connection ended: nobody will answer.
    pub(super) fn asked_session_lost(&mut self) {
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
