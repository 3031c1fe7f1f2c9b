//! Two nodes meet: Hello, then the facts of every volume, then each decides for itself (SEM §13, §26).
//!
//! ```text
//! both: Hello --> (check) --> VolumeInfo per volume --> both have sent and received all --> decide
//! ```
//! The decision uses exactly what was sent and received, so both nodes compute mirrored answers. An
//! identifier is announced only when it is durable, and nothing that was announced changes before the
//! decision: verbs wait, a failing disk drops the session.
use super::Resource;
use super::compare::{Fix, Rule, Side};
use super::config::RrConflict;
use super::device::MayMiss;
use super::event::{Event, HandlerName, Payload, Severity};
use super::explain::Decision;
use super::fault::Fault;
use super::handlers::Purpose;
use super::metadata::BitmapThen;
use super::policy::{Decided, Obstacle, Outcome, Policies, Reason, decide};
use super::state::{ConnState, DiskState, ReplState, Role};
use super::uuid::{UuidSet, masked};
use crate::units::SectorCount;
use lockstep_proto::v1::volume_info::Phase;
use lockstep_proto::{Message, v1};

/// Flag bits of `VolumeInfo.uuid_flags` (SEM §12).
mod uuid_flags {
    pub(super) const DISCARD_MY_DATA: u32 = 1;
    pub(super) const CRASHED_PRIMARY: u32 = 2;
    pub(super) const INCONSISTENT: u32 = 4;
    pub(super) const WAS_TOLD_MORE: u32 = 16;
}

const MARKED_SINCE: &str = "a write was marked here after the peer was told that nothing is";

/// Volumes of a resource at most.
const MAX_VOLUMES: usize = 1 << 16;
/// 16 PiB; more is no size but an attack on our arithmetic.
pub(super) const MAX_SECTORS: u64 = 1 << 45;

/// How far the meeting is.
#[derive(Debug, Default)]
pub(super) struct Handshake {
    pub(super) hello_seen: bool,
    sent: Vec<v1::VolumeInfo>,
    received: Vec<v1::VolumeInfo>,
    received_all: bool,
    pub(super) done: bool,
    /// What the peer's configuration says that is not compared, but decided by.
    pub(super) peer_always_asbp: bool,
    pub(super) peer_rr_conflict: RrConflict,
    /// What it understands.
    pub(super) peer_features: u64,
    /// The peer only wants to know what would happen.
    pub(super) peer_tentative: bool,
}

impl Handshake {
    /// The generation the peer told of last.
    pub(super) fn peer_generation(&self, volume: u32) -> Option<u64> {
        self.received.iter().find(|info| info.volume == volume).map(|info| info.uuid_current)
    }

    /// What the peer was told of a volume.
    fn told(&self, volume: u32) -> Option<&v1::VolumeInfo> {
        self.sent.iter().find(|info| info.volume == volume)
    }

    pub(super) const fn peer_features(&self) -> u64 {
        self.peer_features
    }

    pub(super) const fn is_done(&self) -> bool {
        self.done
    }
}

impl Resource {
    /// A session is up and its handshake is not finished.
    pub(super) fn handshake_running(&self) -> bool {
        self.session.as_ref().is_some_and(|session| !session.handshake.done)
    }

    /// The facts of this node were sent, and nothing is decided from them yet.
    pub(super) fn handshake_announced(&self) -> bool {
        self.session
            .as_ref()
            .is_some_and(|session| !session.handshake.done && !session.handshake.sent.is_empty())
    }

    /// Sends the facts of every volume as soon as they are all durable.
    pub(super) fn handshake_try_send(&mut self) {
        let ready = self.session.as_ref().is_some_and(|session| {
            session.handshake.hello_seen && session.handshake.sent.is_empty() && !session.handshake.done
        });
        // Decided before: the nodes meet again when this one is no longer Primary.
        let gives_way = self.discard_my_data && self.demoting();
        if !ready || gives_way || self.disk_in_transit() || self.role_change_writes() || self.rx.is_orphaned()
        {
            return;
        }
        if (0..self.devices.len()).any(|volume| self.md_busy(volume)) {
            return;
        }
        let last = self.devices.len().saturating_sub(1);
        let infos: Vec<v1::VolumeInfo> = (0..self.devices.len())
            .map(|volume| {
                let mut info = self.volume_info(volume, Phase::Handshake);
                info.last_of_handshake = u32::from(volume == last);
                info
            })
            .collect();
        for info in &infos {
            self.send(Message::VolumeInfo(*info), Payload::None);
        }
        if let Some(session) = &mut self.session {
            session.handshake.sent = infos;
        }
        self.handshake_try_finish();
    }

    fn volume_info(&self, volume: usize, phase: Phase) -> v1::VolumeInfo {
        let device = &self.devices[volume];
        let [uuid_current, uuid_bitmap, uuid_history_0, uuid_history_1] = device.uuids.to_array();
        let has_disk = device.has_metadata();
        // A disk that negotiates stands for what its metadata says.
        let disk = match device.disk {
            // A Primary that gets a disk back has used the peer's since: its own is no newer, and may be
            // a target although the node is Primary.
            DiskState::Negotiating if self.role == Role::Primary => device.md_disk.min(DiskState::Outdated),
            DiskState::Negotiating => device.md_disk,
            other => other,
        };
        let mut flags = 0;
        if self.discard_my_data {
            flags |= uuid_flags::DISCARD_MY_DATA;
        }
        if device.crashed_primary {
            flags |= uuid_flags::CRASHED_PRIMARY;
        }
        if disk == DiskState::Inconsistent {
            flags |= uuid_flags::INCONSISTENT;
        }
        if self.was_told_more(volume) {
            flags |= uuid_flags::WAS_TOLD_MORE;
        }
        v1::VolumeInfo {
            phase: phase.into(),
            volume: u32::from(device.nr.0),
            capacity_sectors: if has_disk { device.capacity.0 } else { 0 },
            agreed_size_sectors: device.size.0,
            user_size_sectors: device.cfg.user_size.map_or(0, |size| size.0),
            uuid_current: if has_disk { uuid_current } else { device.exposed_uuid },
            uuid_bitmap: if has_disk { uuid_bitmap } else { 0 },
            uuid_history_0: if has_disk { uuid_history_0 } else { 0 },
            uuid_history_1: if has_disk { uuid_history_1 } else { 0 },
            uuid_flags: flags,
            disk_state: disk.to_wire(),
            role: self.role.to_wire(),
            out_of_sync_bits: device.bitmap.count(),
            foreign_bits: device.foreign_bits,
            discard_supported: device.discard,
            last_of_handshake: 0,
        }
    }

    /// The application here knows of writes that this peer may miss, and no good disk here has them, or its
    /// generation does not say so: a frozen Primary keeps the one that it has.
    fn was_told_more(&self, volume: usize) -> bool {
        let life = self.session.as_ref().map(|session| session.peer_life);
        self.role == Role::Primary
            && (self.devices[volume].disk != DiskState::UpToDate || self.suspension.is_frozen())
            && match self.devices[volume].peer_may_miss {
                None => false,
                Some(MayMiss::Surely) => true,
                Some(MayMiss::IfNotAlive(then)) => life != Some(then),
            }
    }

    pub(super) fn send_volume_info(&mut self, volume: usize, phase: Phase) {
        let info = self.volume_info(volume, phase);
        if let Some(session) = &mut self.session {
            session.handshake.sent.retain(|sent| sent.volume != info.volume);
            session.handshake.sent.push(info);
        }
        self.send(Message::VolumeInfo(info), Payload::None);
    }

    /// Tells the peer about changed identifiers, once they are durable.
    pub(super) fn send_volume_update(&mut self, volume: usize) {
        if self.session.as_ref().is_some_and(|session| session.handshake.done) {
            let info = self.volume_info(volume, Phase::Update);
            self.send(Message::VolumeInfo(info), Payload::None);
        }
    }

    pub(super) fn on_volume_info(&mut self, info: v1::VolumeInfo) {
        let Some(session) = &mut self.session else { return };
        let phase = info.phase();
        if info.capacity_sectors.max(info.agreed_size_sectors).max(info.user_size_sectors) > MAX_SECTORS {
            return self.protocol_error("a volume of impossible size");
        }
        if DiskState::from_wire(info.disk_state).is_none() || Role::from_wire(info.role).is_none() {
            return self.protocol_error("a volume with an unknown state");
        }
        if phase == Phase::Handshake {
            if session.handshake.done || !session.handshake.hello_seen || session.handshake.received_all {
                return self.protocol_error("the facts of a volume at the wrong time");
            }
            if session.handshake.received.iter().any(|other| other.volume == info.volume) {
                return self.protocol_error("the facts of a volume twice");
            }
            if session.handshake.received.len() >= MAX_VOLUMES {
                return self.protocol_error("more volumes than a resource can have");
            }
            session.handshake.received.push(info);
            session.handshake.received_all = info.last_of_handshake != 0;
            return self.handshake_try_finish();
        }
        if !session.handshake.done {
            return self.protocol_error("an attach or update before the handshake was done");
        }
        let number = info.volume;
        let Some(volume) = self.wire_device(number) else { return };
        let Some(session) = &mut self.session else { return };
        session.handshake.received.retain(|other| other.volume != number);
        session.handshake.received.push(info);
        match phase {
            Phase::Handshake => {}
            Phase::Update => {
                self.devices[volume].peer_capacity = SectorCount(info.capacity_sectors);
                if !self.devices[volume].has_metadata() {
                    self.devices[volume].exposed_uuid = info.uuid_current;
                    if info.agreed_size_sectors > self.devices[volume].size.0 {
                        // Without a disk this node shows what the peer has.
                        self.devices[volume].size = SectorCount(info.agreed_size_sectors);
                        self.update_export(volume);
                    }
                } else if self.devices[volume].disk == DiskState::Detaching {
                    self.devices[volume].went_on_at_peer = Some(info.uuid_current);
                    // A second Primary goes on without this disk: what it writes now is nowhere else.
                    self.devices[volume].missed_writes |= self.peer_role == Role::Primary;
                    self.try_complete_flushes();
                }
                let newer = masked(info.uuid_current) != masked(self.devices[volume].uuids.current);
                if self.devices[volume].untold_loss && (newer || info.uuid_bitmap != 0) {
                    // It goes on under a generation that this disk does not have.
                    self.devices[volume].untold_loss = false;
                    self.retry_held(volume);
                }
            }
            Phase::Attach => {
                if self.disk_in_transit() || self.devices[volume].resync.is_some() {
                    // Between two states here: start over from a handshake, which waits for it.
                    return self.drop_session(
                        ConnState::NetworkFailure,
                        "both nodes change this volume at the same time",
                    );
                }
                self.send_volume_info(volume, Phase::AttachReply);
                self.decide_volume(volume);
            }
            Phase::AttachReply => {
                let device = &mut self.devices[volume];
                let asked = std::mem::replace(&mut device.negotiating, false);
                if device.has_metadata() {
                    if !asked {
                        return self.protocol_error("an answer to an attach that nobody asked");
                    }
                    self.decide_volume(volume);
                }
                // Else the disk was given up meanwhile, and the peer is told that it is gone.
                self.run_parked();
            }
        }
    }

    /// The peer's copy is at this node's generation from now on, whatever it said when the nodes met.
    pub(super) fn peer_got_our_generation(&mut self, volume: usize) {
        let nr = u32::from(self.devices[volume].nr.0);
        let current = self.devices[volume].uuids.current;
        if let Some(session) = &mut self.session {
            for info in session.handshake.received.iter_mut().filter(|info| info.volume == nr) {
                info.uuid_current = current;
            }
        }
    }

    /// Whether the peer's facts of this volume are known.
    pub(super) fn peer_info_known(&self, volume: usize) -> bool {
        let nr = u32::from(self.devices[volume].nr.0);
        self.session
            .as_ref()
            .is_some_and(|session| session.handshake.received.iter().any(|info| info.volume == nr))
    }

    fn handshake_try_finish(&mut self) {
        let Some(session) = &mut self.session else { return };
        if session.handshake.done || session.handshake.sent.is_empty() || !session.handshake.received_all {
            return;
        }
        let peer_role = session
            .handshake
            .received
            .iter()
            .find_map(|info| Role::from_wire(info.role))
            .unwrap_or(Role::Secondary);
        if (0..self.devices.len()).any(|volume| self.marked_since_told(volume)) {
            return self.drop_session(ConnState::NetworkFailure, MARKED_SINCE);
        }
        // All or nothing: one volume that cannot go on keeps the whole connection down.
        let mut decided = Vec::new();
        for volume in 0..self.devices.len() {
            if let Some(decision) = self.decide_and_tell(volume) {
                decided.push((volume, decision));
                if let Err(why) = self.agree_on_size(volume, false) {
                    return self.refuse_peer(&why, "give both nodes backing devices of the same size");
                }
            }
        }
        if !self.may_go_on(&decided) {
            return;
        }
        if self.role == Role::Primary && peer_role == Role::Primary && !self.two_primaries_allowed() {
            return self.refuse_peer(
                "both nodes are Primary and allow-two-primaries is no",
                "make one of them Secondary",
            );
        }
        if let Some(session) = &mut self.session {
            session.handshake.done = true;
        }
        self.discard_my_data = false;
        self.set_conn(ConnState::Connected);
        self.set_peer_role(peer_role);
        self.start_liveness();
        for volume in 0..self.devices.len() {
            if let Some((_, decision)) = decided.iter().find(|(at, _)| *at == volume) {
                self.act_on(volume, decision);
            } else {
                let nr = self.devices[volume].nr;
                self.note(
                    Severity::Warning,
                    format!("volume {}: the peer does not have it; it is not mirrored", nr.0),
                );
            }
        }
        self.send_state();
        self.run_parked();
    }

    /// The peer was told that nothing is marked here, and a write that only this copy has was marked since. One that
    /// waited for the activity log when the link went comes so late, and a frozen Primary keeps its generation: both
    /// nodes would find equal data. Only the first mark matters; with some, equal generations compare the blocks.
    fn marked_since_told(&self, volume: usize) -> bool {
        let device = &self.devices[volume];
        let nr = u32::from(device.nr.0);
        let told = self.session.as_ref().and_then(|session| session.handshake.told(nr));
        told.is_some_and(|told| told.out_of_sync_bits == 0) && device.bitmap.count() != 0
    }

    /// Both sides as the decision sees them, from what was sent and received.
    fn sides(&self, volume: usize) -> Option<(Side, Side)> {
        let nr = u32::from(self.devices[volume].nr.0);
        let session = self.session.as_ref()?;
        let sent = session.handshake.told(nr)?;
        let received = session.handshake.received.iter().find(|info| info.volume == nr)?;
        let tie = self.cfg.node_id < self.cfg.peer_node_id;
        let (mut me, mut peer) = (side(sent, tie), side(received, !tie));
        let disks = sent.capacity_sectors != 0 && received.capacity_sectors != 0;
        let used = size_in_use(sent, received);
        if disks && used != 0 && size_wanted(sent, received) > used {
            // The area that this handshake adds is marked on both nodes.
            me.out_of_sync_bits = me.out_of_sync_bits.max(1);
            peer.out_of_sync_bits = peer.out_of_sync_bits.max(1);
        }
        Some((me, peer))
    }

    /// What both configurations say, as this node sees it.
    fn policies(&self) -> Policies {
        let net = &self.cfg.net;
        let peer = self.session.as_ref().map(|session| &session.handshake);
        Policies {
            protocol: net.protocol,
            after_sb_0pri: net.after_sb_0pri,
            after_sb_1pri: net.after_sb_1pri,
            after_sb_2pri: net.after_sb_2pri,
            always_asbp: net.always_asbp && peer.is_some_and(|peer| peer.peer_always_asbp),
            rr_conflict: net.rr_conflict,
            peer_rr_conflict: peer.map_or(RrConflict::Disconnect, |peer| peer.peer_rr_conflict),
        }
    }

    /// The outcome as it is, unless a test wants to see that a wrong one is noticed.
    fn spoilt(&self, rule: Rule, outcome: Outcome) -> Outcome {
        match outcome {
            Outcome::Refuse(Obstacle::SplitBrain) if self.planted(Fault::SplitBrainIgnored) => {
                Outcome::NoSync
            }
            Outcome::Source { full } if rule == Rule::Equal && self.planted(Fault::WrongSideAfterCrash) => {
                Outcome::Target { full }
            }
            Outcome::Target { full } if rule == Rule::Equal && self.planted(Fault::WrongSideAfterCrash) => {
                Outcome::Source { full }
            }
            Outcome::Source { .. } | Outcome::Target { .. }
                if rule == Rule::EqualWithBits && self.planted(Fault::EqualBitsIgnored) =>
            {
                Outcome::NoSync
            }
            right => right,
        }
    }

    /// Decides for one volume; the decision is announced and remembered.
    fn decide_and_tell(&mut self, volume: usize) -> Option<Decision> {
        let (mine, theirs) = self.sides(volume)?;
        let mut decided = decide(&mine, &theirs, &self.policies());
        decided.outcome = self.spoilt(decided.comparison.rule, decided.outcome);
        let peer_asks = self.session.as_ref().is_some_and(|session| session.handshake.peer_tentative);
        let decision = Decision {
            at: self.now,
            volume: self.devices[volume].nr,
            mine,
            theirs,
            decided,
            dry_run: !self.session.as_ref().is_some_and(|session| session.handshake.done)
                && (self.tentative || peer_asks),
        };
        self.remember_decision(&decision);
        self.event(Event::Handshake(Box::new(decision.clone())));
        Some(decision)
    }

    /// What stands between the decisions of a handshake and a connection: `false` when it ends here.
    fn may_go_on(&mut self, decided: &[(usize, Decision)]) -> bool {
        if let Some((_, split)) = decided.iter().find(|(_, d)| d.decided.comparison.verdict.is_split_brain())
        {
            self.run_handler(HandlerName::InitialSplitBrain, Some(split.volume), Purpose::Notice);
        }
        let peer_asks = self.session.as_ref().is_some_and(|session| session.handshake.peer_tentative);
        if self.tentative || peer_asks {
            for (_, decision) in decided {
                self.note(Severity::Info, format!("dry-run connect: {}", decision.what_would_happen()));
            }
            if std::mem::take(&mut self.tentative) {
                self.refuse_peer("dry-run connect: nothing was changed", "connect without --tentative");
            } else {
                // Who only waited for the peer goes on waiting.
                self.drop_session(ConnState::TearDown, "dry-run connect of the peer: nothing was changed");
            }
            return false;
        }
        let refused = decided.iter().find_map(|(_, d)| match d.decided.outcome {
            Outcome::Refuse(obstacle) => Some((d, obstacle)),
            _ => None,
        });
        if let Some((decision, obstacle)) = refused {
            self.refuse_by(decision, obstacle);
            return false;
        }
        let must_demote = decided.iter().find_map(|(_, d)| match d.decided.outcome {
            Outcome::MustDemote { me } => Some((d.volume, me)),
            _ => None,
        });
        if let Some((volume, me)) = must_demote {
            self.demote_loser(volume, me);
            return false;
        }
        if let Some((_, retry)) = decided.iter().find(|(_, d)| matches!(d.decided.outcome, Outcome::Retry(_)))
        {
            let primary = if retry.target_would_be_me() { &self.cfg.node_name } else { &self.cfg.peer_name };
            let why = format!(
                "a Primary with good data would become the target (rr-conflict retry-connect); next: drbdadm secondary {} on {primary}",
                self.cfg.name
            );
            self.drop_session(ConnState::NetworkFailure, &why);
            return false;
        }
        true
    }

    /// The connection is refused by a decision: handlers, words, StandAlone.
    fn refuse_by(&mut self, decision: &Decision, obstacle: Obstacle) {
        let reasons = &decision.decided.reasons;
        if obstacle == Obstacle::SplitBrain {
            self.run_handler(HandlerName::SplitBrain, Some(decision.volume), Purpose::Notice);
        }
        let i_lose = decision.mine.role == Role::Primary && decision.target_would_be_me();
        if i_lose && reasons.contains(&Reason::RrConflict(RrConflict::CallPriLost)) {
            self.run_handler(HandlerName::PriLost, Some(decision.volume), Purpose::Notice);
        }
        let (why, advice) = obstacle_text(obstacle, &self.cfg.name);
        self.refuse_peer(&format!("volume {}: {why}", decision.volume.0), &advice);
    }

    /// A policy decided against a Primary: it is demoted if nobody uses it, and the nodes meet anew with
    /// its changes given up; else its handler is told, and a person decides (SEM §15).
    fn demote_loser(&mut self, volume: crate::units::VolumeNr, me: bool) {
        if !me {
            return self.drop_session(
                ConnState::NetworkFailure,
                "the split-brain policy decided against the peer, which is Primary: it has to be demoted first",
            );
        }
        if let Err(refused) = self.check_not_open() {
            self.run_handler(HandlerName::PriLostAfterSb, Some(volume), Purpose::Notice);
            self.run_handler(HandlerName::SplitBrain, Some(volume), Purpose::Notice);
            let (_, advice) = obstacle_text(Obstacle::SplitBrain, &self.cfg.name);
            let why = format!(
                "volume {}: the split-brain policy decided against this node, which is Primary and in use ({})",
                volume.0,
                refused.facts.join(", ")
            );
            return self.refuse_peer(&why, &advice);
        }
        self.note(
            Severity::Warning,
            "the split-brain policy decided against this node: it becomes Secondary and gives its changes up",
        );
        self.discard_my_data = true;
        self.drop_session(ConnState::NetworkFailure, "becoming Secondary before the nodes meet again");
        self.demote(super::Reply::Internal);
        self.fail_frozen();
    }

    /// Decides and acts for one volume of a session whose handshake is done.
    fn decide_volume(&mut self, volume: usize) {
        if self.marked_since_told(volume) {
            return self.drop_session(ConnState::NetworkFailure, MARKED_SINCE);
        }
        if let Some(decision) = self.decide_and_tell(volume) {
            self.act_on(volume, &decision);
        }
    }

    fn act_on(&mut self, volume: usize, decision: &Decision) {
        self.devices[volume].peer_said = decision.theirs.disk;
        if let Err(why) = self.agree_on_size(volume, true) {
            return self.refuse_peer(&why, "give both nodes backing devices of the same size");
        }
        let Decision { theirs: peer, decided: Decided { comparison, outcome, .. }, .. } = decision;
        if let Outcome::Refuse(obstacle) = *outcome {
            return self.refuse_by(decision, obstacle);
        }
        if comparison.rule == Rule::Diskless {
            self.set_peer_disk_fact(volume, peer.disk);
            self.set_repl(volume, ReplState::Established);
            self.settle_negotiating(volume);
            if !self.devices[volume].has_metadata() {
                self.devices[volume].exposed_uuid = peer.uuids.current;
            }
            self.peer_disk_consequences(volume);
            return;
        }
        match comparison.fix {
            Fix::None => {}
            Fix::Finish => {
                self.devices[volume].uuids.clear_bitmap();
                self.md_touch(volume);
            }
            Fix::Rebase => {
                self.devices[volume].uuids.bitmap = peer.uuids.current;
                self.md_touch(volume);
            }
            Fix::UndoStart => {
                let uuids = &mut self.devices[volume].uuids;
                uuids.bitmap = uuids.history[0];
                uuids.history = [uuids.history[1], 0];
                self.md_touch(volume);
            }
        }
        match *outcome {
            Outcome::NoSync => {
                self.set_repl(volume, ReplState::Established);
                self.settle_negotiating(volume);
                self.adopt_equal(volume, peer);
            }
            // Nothing should differ: what is marked is compared before it is copied.
            Outcome::Source { full: false } if comparison.rule == Rule::EqualWithBits => {
                self.begin_compare(volume, true, peer.disk);
            }
            Outcome::Target { full: false } if comparison.rule == Rule::EqualWithBits => {
                self.begin_compare(volume, false, peer.disk);
            }
            Outcome::Source { full } => self.begin_resync(volume, true, full, peer.disk),
            Outcome::Target { full } => {
                if self.role == Role::Primary {
                    // The application is shown the peer's data from now on.
                    self.devices[volume].exposed_uuid = peer.uuids.current;
                }
                self.begin_resync(volume, false, full, peer.disk);
            }
            // These want a handshake of their own; refused was above.
            Outcome::MustDemote { .. } | Outcome::Retry(_) | Outcome::Refuse(_) => self.drop_session(
                ConnState::NetworkFailure,
                "the attached disk and the peer's do not go together while this node is Primary",
            ),
        }
    }

    /// Equal data on both nodes: Consistent and Outdated become UpToDate (SEM §4).
    fn adopt_equal(&mut self, volume: usize, peer: &Side) {
        let good = |disk: DiskState| {
            matches!(disk, DiskState::Outdated | DiskState::Consistent | DiskState::UpToDate)
        };
        let own = self.devices[volume].disk;
        if good(own) && good(peer.disk) {
            self.set_peer_disk_fact(volume, DiskState::UpToDate);
            if self.devices[volume].crashed_primary {
                self.devices[volume].crashed_primary = false;
                self.md_touch(volume);
            }
            if own != DiskState::UpToDate {
                self.set_disk(volume, DiskState::UpToDate);
            }
        } else {
            self.set_peer_disk_fact(volume, peer.disk);
        }
    }

    /// A disk that waited for the handshake stands on its own from now on.
    fn settle_negotiating(&mut self, volume: usize) {
        if self.devices[volume].disk == DiskState::Negotiating {
            let state = self.disk_state_alone(volume);
            self.set_disk(volume, state);
            self.update_export(volume);
        }
    }

    /// The size both disks can hold (SEM §26). A disk with usable data is never shrunk by meeting a smaller one.
    fn agree_on_size(&mut self, volume: usize, adopt: bool) -> Result<(), String> {
        let nr = u32::from(self.devices[volume].nr.0);
        let Some(session) = &self.session else { return Ok(()) };
        let find = |infos: &[v1::VolumeInfo]| infos.iter().find(|info| info.volume == nr).copied();
        let (Some(sent), Some(received)) = (find(&session.handshake.sent), find(&session.handshake.received))
        else {
            return Ok(());
        };
        let size = match (sent.capacity_sectors, received.capacity_sectors) {
            (0, 0) => sent.agreed_size_sectors.max(received.agreed_size_sectors),
            (0, _) => received.agreed_size_sectors,
            (_, 0) => sent.agreed_size_sectors,
            (own, other) => {
                let (most, used) = (own.min(other), size_in_use(&sent, &received));
                if used > most {
                    return Err(format!(
                        "volume {nr}: the peer's disk size is too small! ({most} sectors on the smaller disk, {used} in use)"
                    ));
                }
                // Fresh disks take what both hold. Where both grew while they were apart or off, the
                // volume grows with them; what is in use stays.
                used.max(size_wanted(&sent, &received))
            }
        };
        if adopt {
            let device = &mut self.devices[volume];
            device.peer_capacity = SectorCount(received.capacity_sectors);
            let mut changed = false;
            if device.size.0 != size && size != 0 {
                changed = true;
                self.extend_bitmap(volume, SectorCount(size), true);
            }
            if changed && self.devices[volume].recorded_size.is_some() {
                // Its bits first, then the size, then the users.
                self.write_bitmap(volume, BitmapThen::Grown);
            } else if changed {
                self.md_touch(volume);
                self.update_export(volume);
            }
        }
        Ok(())
    }
}

/// The size that one of the nodes has given to an application.
fn size_in_use(one: &v1::VolumeInfo, two: &v1::VolumeInfo) -> u64 {
    let of = |info: &v1::VolumeInfo| {
        let never_used = info.uuid_current & !1 == crate::meta::UUID_JUST_CREATED;
        if never_used { 0 } else { info.agreed_size_sectors }
    };
    of(one).max(of(two))
}

/// What both disks hold, and both configurations want.
fn size_wanted(one: &v1::VolumeInfo, two: &v1::VolumeInfo) -> u64 {
    let of = |info: &v1::VolumeInfo| match info.user_size_sectors {
        0 => info.capacity_sectors,
        user => info.capacity_sectors.min(user),
    };
    of(one).min(of(two))
}

fn side(info: &v1::VolumeInfo, tie: bool) -> Side {
    Side {
        uuids: UuidSet {
            current: info.uuid_current,
            bitmap: info.uuid_bitmap,
            history: [info.uuid_history_0, info.uuid_history_1],
        },
        crashed_primary: info.uuid_flags & uuid_flags::CRASHED_PRIMARY != 0,
        role: Role::from_wire(info.role).unwrap_or(Role::Secondary),
        disk: DiskState::from_wire(info.disk_state).unwrap_or(DiskState::Diskless),
        out_of_sync_bits: info.out_of_sync_bits,
        foreign_bits: info.foreign_bits,
        discard_my_data: info.uuid_flags & uuid_flags::DISCARD_MY_DATA != 0,
        was_told_more: info.uuid_flags & uuid_flags::WAS_TOLD_MORE != 0,
        tie,
    }
}

fn obstacle_text(obstacle: Obstacle, name: &str) -> (String, String) {
    match obstacle {
        Obstacle::Unrelated => (
            "Unrelated data, aborting!".into(),
            format!("if one side's data may go, run create-md on it, or drbdadm invalidate {name} there"),
        ),
        Obstacle::SplitBrain => (
            "Split-Brain detected but unresolved, dropping connection! Both nodes changed data while they were apart".into(),
            format!("decide whose changes go; there: drbdadm secondary {name} and drbdadm connect --discard-my-data {name}"),
        ),
        Obstacle::SourceNotUsable => {
            ("I shall become SyncSource, but my disk is not usable".into(), format!("drbdadm status {name} on both nodes"))
        }
        Obstacle::NotTheDataLostLast => (
            "Can only connect to the data the Primary lost last: this copy misses writes that were acknowledged".into(),
            format!("attach the disk of the Primary again, or drbdadm secondary {name} there and accept this copy"),
        ),
        Obstacle::TargetIsPrimary => (
            "I shall become SyncTarget, but I am primary!".into(),
            format!("drbdadm secondary {name} on the node with the older data"),
        ),
    }
}
