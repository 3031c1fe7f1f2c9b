//! Fencing: before a node goes on without its peer, the peer must be known not to (SEM §16).
//!
//! The handler `fence-peer` runs once for each loss of the peer by a Primary, and within a promotion
//! without a connection. Its answer is believed only while nothing has changed since it was asked:
//! a connection that came up meanwhile makes the token worthless (S46). Anything but a clear answer
//! means "not fenced".
use super::config::Fencing;
use super::event::{HandlerName, HandlerToken, Payload, Refusal, Severity};
use super::handlers::Purpose;
use super::metadata::SuperblockThen;
use super::state::{ConnState, DiskState, ReplState, Role};
use super::verbs::refusal;
use super::{Reply, Resource};
use lockstep_proto::v1::state_request::Kind;
use lockstep_proto::{Message, v1};

/// DRBD's number for a promotion that fencing forbids.
pub(super) const PEER_NOT_OUTDATED: i32 = -7;

/// What is known of the fate of a peer that is away.
#[derive(Debug, Default)]
pub(super) struct Fence {
    /// The run whose answer counts.
    asked: Option<HandlerToken>,
    /// What the last one said, when it settled nothing.
    failed: Option<String>,
    /// Run since the peer was last in sync: to be undone.
    undo: bool,
}

impl Resource {
    fn fences(&self) -> bool {
        self.cfg.net.fencing != Fencing::DontCare
    }

    /// The peer cannot become Primary with its data of this volume.
    fn peer_is_outdated(&self, volume: usize) -> bool {
        matches!(self.devices[volume].peer_disk, DiskState::Inconsistent | DiskState::Outdated)
    }

    fn peer_is_outdated_everywhere(&self) -> bool {
        (0..self.devices.len()).all(|volume| self.peer_is_outdated(volume))
    }

    /// What frozen IO waits for.
    pub(super) fn fence_wait(&self) -> String {
        match (&self.fence.asked, &self.fence.failed) {
            (Some(_), _) => "the handler fence-peer to answer".to_owned(),
            (None, Some(why)) => format!("{why}; somebody to fence {}", self.cfg.peer_name),
            (None, None) => "the peer to be fenced".to_owned(),
        }
    }

    /// A metadata disk found Consistent may not count as UpToDate before the peer was heard or fenced (SEM §5).
    pub(super) fn stays_consistent(&self, volume: usize) -> bool {
        self.fences() && self.role != Role::Primary && !self.peer_is_outdated(volume)
    }

    // ---- loss of the peer -----------------------------------------------------------------------

    /// A connection that was up is gone, and this node is Primary. Called before any request is told.
    pub(super) fn fence_lost_peer(&mut self) {
        self.fence.asked = None;
        self.fence.failed = None;
        let usable = self.devices.iter().any(|device| device.disk >= DiskState::Consistent);
        if !self.fences() || self.peer_is_outdated_everywhere() {
            return;
        }
        if !usable {
            // Nothing here that could go on without the peer (SEM §16).
            return;
        }
        if self.cfg.net.fencing == Fencing::ResourceAndStonith {
            self.freeze();
        }
        self.ask_fence_handler();
    }

    fn ask_fence_handler(&mut self) -> HandlerToken {
        let token = self.run_handler(HandlerName::FencePeer, None, Purpose::Fence);
        self.fence.asked = Some(token);
        self.fence.undo = true;
        token
    }

    /// The handler's answer.
    pub(super) fn on_fence_answer(&mut self, token: HandlerToken, exit_code: Option<i32>) {
        if self.fence.asked != Some(token) || self.conn == ConnState::Connected {
            self.note(Severity::Info, "a late answer of fence-peer is ignored: the connection came back");
            self.promotion_fence_done(token);
            return;
        }
        self.fence.asked = None;
        let stonith = self.cfg.net.fencing == Fencing::ResourceAndStonith;
        let peer = self.cfg.peer_name.clone();
        match exit_code {
            Some(3) => self.peer_is_now(DiskState::Inconsistent),
            Some(4) => self.peer_is_now(DiskState::Outdated),
            Some(5) if self.devices.iter().all(|device| device.disk == DiskState::UpToDate) => {
                self.peer_is_now(DiskState::Outdated);
            }
            Some(5) => self.fence_failed(
                "fence-peer says the peer is unreachable, and the disk here is not known to be UpToDate",
            ),
            Some(6) => {
                self.fence_failed(&format!("fence-peer says {peer} is Primary"));
                if self.role == Role::Secondary {
                    self.outdate_own_disks();
                }
            }
            Some(7) => {
                if !stonith {
                    self.note(
                        Severity::Error,
                        "fence-peer reset the peer although fencing is not resource-and-stonith",
                    );
                }
                self.peer_is_now(DiskState::Outdated);
            }
            Some(code) => self.fence_failed(&format!("fence-peer ended with {code}, which settles nothing")),
            None => self.fence_failed("fence-peer did not end, which settles nothing"),
        }
        self.promotion_fence_done(token);
    }

    fn fence_failed(&mut self, why: &str) {
        self.note(Severity::Warning, format!("{why}: the peer is not fenced"));
        self.fence.failed = Some(why.to_owned());
    }

    /// Known from outside: recorded in the superblock, so that it still holds after a restart.
    fn peer_is_now(&mut self, disk: DiskState) {
        for volume in 0..self.devices.len() {
            if !self.peer_is_outdated(volume) {
                self.set_peer_disk_fact(volume, disk);
            }
            if self.devices[volume].disk == DiskState::Consistent {
                self.set_disk(volume, DiskState::UpToDate);
                self.update_export(volume);
            }
        }
    }

    /// After each input: is the fate of the peer settled?
    pub(super) fn progress_fencing(&mut self) {
        if self.conn == ConnState::Connected {
            self.fence.asked = None;
            self.fence.failed = None;
            self.promotion_needs_no_fence();
        }
        // What a decision gave up stays frozen until this node is Secondary.
        if self.suspension.is_frozen() && !self.suspension.fails_frozen() {
            let taking = |device: &super::device::Device| {
                !matches!(
                    device.repl,
                    ReplState::Off | ReplState::WFBitMapS | ReplState::WFBitMapT | ReplState::WFSyncUUID
                )
            };
            if self.conn == ConnState::Connected {
                // Not before it takes data: a repeated write is then held by both, or its disk is a target.
                if self.devices.iter().all(taking) {
                    self.unfreeze("the peer is back");
                }
            } else if self.peer_is_outdated_everywhere() && !self.handshake_announced() {
                // Going on alone begins a generation, and a peer that was just told of this one would not hear
                // of it: what was announced holds until it is decided, and then the peer is back or away again.
                self.unfreeze("the peer is fenced");
            } else if !self.devices.iter().any(|device| device.disk >= DiskState::Consistent) {
                self.unfreeze("this node has no data to go on with");
            }
        }
        if self.fence.undo && self.conn == ConnState::Connected && self.all_in_sync() {
            self.fence.undo = false;
            self.run_handler(HandlerName::UnfencePeer, None, Purpose::Notice);
        }
    }

    fn all_in_sync(&self) -> bool {
        self.devices.iter().all(|device| {
            device.repl == ReplState::Established
                && device.disk == DiskState::UpToDate
                && device.peer_disk == DiskState::UpToDate
        })
    }

    /// This node was the source of a resync that is done: a constraint on the peer may go.
    pub(super) fn unfence_after_resync(&mut self) {
        self.fence.undo |= self.fences();
    }

    // ---- promotion ------------------------------------------------------------------------------

    /// Reason 5 of SEM §2: a peer that is away might be Primary itself.
    pub(super) fn check_fenced(&self) -> Result<(), Refusal> {
        if !self.fences() || self.conn == ConnState::Connected {
            return Ok(());
        }
        let Some(volume) = (0..self.devices.len()).find(|volume| !self.peer_is_outdated(*volume)) else {
            return Ok(());
        };
        let name = &self.cfg.name;
        let device = &self.devices[volume];
        let mut facts = vec![
            format!("fencing is on, connection {}", self.conn),
            format!(
                "volume {}: the disk here is {}, at {} {}",
                device.nr.0, device.disk, self.cfg.peer_name, device.peer_disk
            ),
        ];
        facts.extend(self.fence.failed.clone());
        Err(refusal(
            PEER_NOT_OUTDATED,
            "Refusing to be Primary while peer is not outdated",
            facts,
            &format!(
                "on {}: drbdadm outdate {name}; or connect; or, if it is certainly off: drbdadm primary --force {name}",
                self.cfg.peer_name
            ),
        ))
    }

    /// Whether the handler could remove what forbids this promotion (SEM §2 #4, #5).
    pub(super) fn handler_may_help(&self, refused: &Refusal) -> bool {
        let only_consistent = self
            .devices
            .iter()
            .all(|device| matches!(device.disk, DiskState::Consistent | DiskState::UpToDate));
        self.fences()
            && self.conn != ConnState::Connected
            && (refused.number == PEER_NOT_OUTDATED || (refused.number == -2 && only_consistent))
    }

    /// Asks the handler for a promotion. One that is running for the loss of the peer serves as well.
    pub(super) fn fence_for_promotion(&mut self) -> HandlerToken {
        match self.fence.asked {
            Some(token) => token,
            None => self.ask_fence_handler(),
        }
    }

    /// `primary --force` after the handler failed.
    pub(super) fn assume_peer_outdated(&mut self) {
        self.note(Severity::Warning, "Forced into split brain situation! The peer is assumed to be outdated");
        for volume in 0..self.devices.len() {
            if !self.peer_is_outdated(volume) {
                self.set_peer_disk_fact(volume, DiskState::Outdated);
            }
        }
    }

    // ---- leaving in order -----------------------------------------------------------------------

    /// A Secondary that leaves a Primary says first that its data will be old, so that the Primary may
    /// go on (SEM §6).
    pub(super) fn outdate_before_leaving(&mut self) {
        if self.fences() && self.conn == ConnState::Connected && self.peer_role == Role::Primary {
            self.outdate_own_disks();
        }
    }

    fn outdate_own_disks(&mut self) {
        for volume in 0..self.devices.len() {
            if matches!(self.devices[volume].disk, DiskState::Consistent | DiskState::UpToDate) {
                self.set_disk(volume, DiskState::Outdated);
            }
        }
    }

    /// A Primary that leaves has the peer outdate itself first. `true`: the answer is awaited.
    pub(super) fn outdate_peer_before_leaving(&mut self, reply: Reply) -> bool {
        let wanted = self.fences()
            && self.conn == ConnState::Connected
            && self.role == Role::Primary
            && self.devices.iter().any(|device| device.peer_disk > DiskState::Outdated);
        if wanted {
            self.ask_for(reply, Kind::Outdate, 0, 0);
        }
        wanted
    }

    /// The peer, a Primary, leaves: `true` when its question is answered as soon as that is durable.
    pub(super) fn outdate_for_peer(&mut self, id: u64) {
        self.outdate_own_disks();
        self.answer_peer(id);
    }

    /// A change that the peer asked for is durable.
    pub(super) fn answer_peer(&mut self, id: u64) {
        if let Some(volume) = (0..self.devices.len()).find(|volume| self.md_busy(*volume)) {
            return self.md_then(volume, SuperblockThen::AnswerPeer(id));
        }
        let reply = v1::StateReply { id, result: 1, ..v1::StateReply::default() };
        self.send(Message::StateReply(reply), Payload::None);
    }
}
