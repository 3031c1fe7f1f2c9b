//! The connection: up, alive, lost (SEM §3, §25).
//!
//! ```text
//! StandAlone --connect--> Unconnected --> Connecting --handshake--> Connected
//!     ^                        ^---- Timeout/BrokenPipe/NetworkFailure/ProtocolError/TearDown <--'
//!     '------ Disconnecting <------- disconnect verb, refused handshake
//! ```
//! There is at most one session. Whatever belonged to it dies with it; nothing of an old session is
//! believed in a new one.
use super::device::MirrorMode;
use super::event::{Event, LostReason, Output, Payload, SessionId, Severity};
use super::fault::Fault;
use super::handshake::Handshake;
use super::state::{ConnState, DiskState, ReplState, Role};
use super::timer::Timer;
use super::{Reply, Resource};
use crate::units::Time;
use lockstep_proto::{Message, v1};

/// The transport that is up.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) id: SessionId,
    pub(super) handshake: Handshake,
    /// When anything was last heard.
    pub(super) heard: Time,
    pub(super) ping_sent: Option<Time>,
    /// Which life of the peer this is: another number means that it was started anew.
    pub(super) peer_life: u64,
}

impl Resource {
    pub(super) fn on_peer_connected(&mut self, id: SessionId) {
        if self.session.is_some() {
            // The runtime reports the old one lost first; if it did not, the new one is not ours.
            self.out.push_back(Output::Disconnect { session: id, reason: "another session is up".into() });
            return;
        }
        if self.conn != ConnState::Connecting {
            let reason = format!("this node is {}", self.conn);
            self.out.push_back(Output::Disconnect { session: id, reason });
            return;
        }
        self.session = Some(Session {
            id,
            handshake: Handshake::default(),
            heard: self.now,
            ping_sent: None,
            peer_life: 0,
        });
        self.timers.set(Timer::Handshake, self.now.plus_ms(self.cfg.net.connect_int_ms));
        self.start_handshake();
    }

    pub(super) fn on_peer_message(&mut self, id: SessionId, message: Message, payload: Payload) {
        let known = match &mut self.session {
            Some(session) if session.id == id => {
                session.heard = self.now;
                true
            }
            _ => false,
        };
        if !known {
            self.drop_payload(payload);
            return;
        }
        self.route_peer_message(message, payload);
    }

    fn route_peer_message(&mut self, message: Message, payload: Payload) {
        let done = self.session.as_ref().is_some_and(|session| session.handshake.is_done());
        let early = matches!(
            message,
            Message::Hello(_)
                | Message::VolumeInfo(_)
                | Message::Ping(_)
                | Message::PingAck(_)
                | Message::TearDown(_)
        );
        if !done && !early {
            self.drop_payload(payload);
            self.protocol_error(&format!("{:?} before the handshake was done", message.message_type()));
            return;
        }
        match message {
            Message::Data(header) => return self.on_data(&header, payload),
            Message::RsDataReply(header) => return self.on_rs_data_reply(&header, payload),
            Message::DataReply(header) => return self.on_data_reply(&header, payload),
            Message::Bitmap(header) => return self.on_bitmap_message(&header, payload),
            Message::Discard(header) => self.on_trim(&header, false),
            Message::WriteZeroes(header) => self.on_trim(&header, true),
            Message::Barrier(header) => self.on_barrier(header.epoch),
            Message::BarrierAck(header) => self.on_barrier_ack(header.epoch, header.writes),
            Message::RecvAck(header) => self.on_write_answer(&header, super::request::Answer::Received),
            Message::WriteAck(header) => self.on_write_answer(&header, super::request::Answer::Written),
            Message::NegAck(header) => self.on_write_answer(&header, super::request::Answer::Failed),
            Message::DataRequest(header) => self.on_data_request(&header),
            Message::NegDReply(header) => self.on_neg_data_reply(&header),
            Message::RsDataRequest(header) => self.on_rs_data_request(&header),
            Message::RsDeallocated(header) => self.on_rs_dataless(&header, false),
            Message::RsChecksumRequest(header) => self.on_rs_checksum_request(&header),
            Message::RsIsInSync(header) => self.on_rs_dataless(&header, true),
            Message::OvRequest(header) => self.on_ov_request(&header),
            Message::OvReply(header) => self.on_ov_reply(&header),
            Message::OvResult(header) => self.on_ov_result(&header),
            Message::VerifyFinished(header) => self.on_verify_finished(&header),
            Message::RsWriteAck(header) => self.on_rs_write_ack(&header, true),
            Message::NegRsDReply(header) => self.on_rs_write_ack(&header, false),
            Message::OutOfSync(header) => self.on_out_of_sync(&header),
            Message::SyncUuid(header) => self.on_sync_uuid(&header),
            Message::ResyncFinished(header) => self.on_resync_finished(&header),
            Message::Hello(header) => self.on_hello(&header),
            Message::VolumeInfo(header) => self.on_volume_info(header),
            Message::State(header) => self.on_peer_state(&header),
            Message::StateRequest(header) => self.on_state_request(&header),
            Message::StateReply(header) => self.on_state_reply(&header),
            Message::Ping(_) => self.send(Message::PingAck(v1::PingAck {}), Payload::None),
            Message::PingAck(_) => {
                if let Some(session) = &mut self.session {
                    session.ping_sent = None;
                }
                self.timers.stop(Timer::PingTimeout);
                self.probe_answered();
            }
            Message::TearDown(header) => self.on_tear_down(&header.reason),
            Message::ProtocolUpdate(header) => self.on_protocol_update(&header),
        }
        self.drop_payload(payload);
    }

    #[expect(clippy::needless_pass_by_value, reason = "who takes a payload takes the count of its buffer")]
    pub(super) fn drop_payload(&mut self, payload: Payload) {
        if let Payload::Buffer { id, .. } = payload {
            self.out.push_back(Output::Release(id));
        }
    }

    pub(super) fn on_peer_lost(&mut self, id: SessionId, reason: LostReason) {
        if self.session.as_ref().is_none_or(|session| session.id != id) {
            return;
        }
        let (state, text) = match reason {
            LostReason::Closed(text) => (ConnState::NetworkFailure, text),
            LostReason::Protocol(text) => (ConnState::ProtocolError, text),
        };
        self.note(Severity::Warning, format!("connection lost: {text}"));
        self.end_session(state, true);
    }

    /// The peer broke the protocol: drop the connection, never the daemon.
    pub(super) fn protocol_error(&mut self, why: &str) {
        self.drop_session(ConnState::ProtocolError, why);
    }

    /// Drops the connection and tries again.
    pub(super) fn drop_session(&mut self, state: ConnState, why: &str) {
        if let Some(session) = &self.session {
            let session = session.id;
            self.note(Severity::Warning, format!("dropping the connection: {why}"));
            self.out.push_back(Output::Disconnect { session, reason: why.to_owned() });
            self.end_session(state, true);
        }
    }

    fn on_tear_down(&mut self, reason: &str) {
        self.note(Severity::Info, format!("the peer ends the connection: {reason}"));
        if let Some(session) = &self.session {
            let session = session.id;
            self.out.push_back(Output::Disconnect { session, reason: "the peer leaves".into() });
        }
        self.end_session(ConnState::TearDown, true);
    }

    /// Everything that belonged to the session ends. `retry`: go on connecting, else StandAlone.
    pub(super) fn end_session(&mut self, state: ConnState, retry: bool) {
        let Some(ended) = self.session.take() else { return };
        for timer in [
            Timer::Handshake,
            Timer::Ping,
            Timer::PingTimeout,
            Timer::Ko,
            Timer::IdleBarrier,
            Timer::Resync,
            Timer::Ahead,
        ] {
            self.timers.stop(timer);
        }
        if self.conn != ConnState::Disconnecting {
            self.set_conn(state);
        }
        let was_primary = self.md_primary;
        self.set_peer_role(Role::Unknown);
        for volume in 0..self.devices.len() {
            self.abort_resync(volume);
            self.set_repl(volume, ReplState::Off);
            self.devices[volume].negotiating = false;
            self.devices[volume].pauses.peer = false;
            if self.devices[volume].disk == DiskState::Negotiating {
                let by_flags = self.disk_state_alone(volume);
                self.set_disk(volume, by_flags);
            }
            let bad = |disk| matches!(disk, DiskState::Inconsistent | DiskState::Outdated);
            // Of a resync that had just begun here the peer may not have heard.
            let said = !ended.handshake.is_done() || bad(self.devices[volume].peer_said);
            let known = bad(self.devices[volume].peer_disk) && said;
            self.devices[volume].peer_said = DiskState::DUnknown;
            if !known {
                self.set_peer_disk_fact(volume, DiskState::DUnknown);
            }
        }
        for volume in 0..self.devices.len() {
            self.keep_last_copy(volume);
        }
        if was_primary && ended.handshake.is_done() {
            self.fence_lost_peer();
        }
        // Frozen, nothing completes: the new generation is deferred until it is needed (SEM §12).
        for volume in (0..self.devices.len()).filter(|_| was_primary) {
            if !self.suspension.is_frozen() {
                self.new_generation_if_alone(volume);
            }
        }
        for volume in 0..self.devices.len() {
            let device = &mut self.devices[volume];
            if device.repair.take().is_some() | std::mem::take(&mut device.untold_loss) {
                self.distrust_held(volume);
            }
        }
        self.fail_peer_legs(ended.peer_life);
        (0..self.devices.len()).for_each(|volume| self.retry_held(volume));
        self.abort_receive();
        self.asked_session_lost();
        self.role_session_lost();
        self.resize_session_lost();
        if retry {
            self.set_conn(ConnState::Unconnected);
            self.set_conn(ConnState::Connecting);
            self.out.push_back(Output::Connect);
        } else {
            self.set_conn(ConnState::Disconnecting);
            self.out.push_back(Output::StopConnecting);
            self.set_conn(ConnState::StandAlone);
        }
        self.run_parked();
    }

    /// A Primary that writes on without the peer starts a new generation, once (SEM §12).
    pub(super) fn new_generation_if_alone(&mut self, volume: usize) {
        let device = &self.devices[volume];
        if device.disk == DiskState::UpToDate
            && device.mirror_mode() == MirrorMode::Nothing
            && !self.planted(Fault::NoNewGeneration)
        {
            if device.uuids.bitmap == 0 {
                self.bump_uuid(volume, true);
            } else if device.peer_may_have_current {
                self.bump_uuid_keeping_base(volume, true);
            }
        }
    }

    // ---- liveness -----------------------------------------------------------------------------

    pub(super) fn start_liveness(&mut self) {
        self.timers.stop(Timer::Handshake);
        self.timers.set(Timer::Ping, self.now.plus_ms(self.cfg.net.ping_int_ms));
    }

    pub(super) fn on_handshake_timeout(&mut self) {
        if self.handshake_running() {
            self.drop_session(ConnState::Timeout, "the handshake was not finished in time");
        }
    }

    pub(super) fn on_ping_due(&mut self) {
        let interval = self.cfg.net.ping_int_ms;
        let Some(session) = &self.session else { return };
        let quiet_until = session.heard.plus_ms(interval);
        if self.now >= quiet_until {
            self.ping();
            self.timers.set(Timer::Ping, self.now.plus_ms(interval));
        } else {
            self.timers.set(Timer::Ping, quiet_until);
        }
    }

    /// Asks for a sign of life. One question at a time: a second one must not put off the end of the first.
    fn ping(&mut self) {
        let now = self.now;
        let Some(session) = &mut self.session else { return };
        if session.ping_sent.is_some_and(|sent| session.heard <= sent) {
            return;
        }
        session.ping_sent = Some(now);
        self.send(Message::Ping(v1::Ping {}), Payload::None);
        self.timers.set(Timer::PingTimeout, now.plus_ms(self.cfg.net.ping_timeout_ms));
    }

    /// A part of a frame has come: the peer is alive, however slowly it drips.
    pub(super) fn on_peer_alive(&mut self, id: SessionId) {
        if let Some(session) = self.session.as_mut().filter(|session| session.id == id) {
            session.heard = self.now;
        }
    }

    /// Asks the peer for a sign of life now; `false` without a connection.
    pub(super) fn probe_peer(&mut self) -> bool {
        self.ping();
        self.session.is_some()
    }

    pub(super) fn on_ping_timeout(&mut self) {
        let silent = self.session.as_ref().is_some_and(|s| s.ping_sent.is_some_and(|sent| s.heard <= sent));
        if silent {
            let why = format!("the peer did not answer a ping within {} ms", self.cfg.net.ping_timeout_ms);
            self.drop_session(ConnState::NetworkFailure, &why);
        }
    }

    pub(super) fn on_ko(&mut self) {
        let net = &self.cfg.net;
        let limit_ms = net.ko_count * net.timeout_ms;
        let oldest = [self.tl.oldest_opened(), self.target_untold_since()].into_iter().flatten().min();
        let (Some(opened), true) = (oldest, limit_ms != 0) else { return };
        if self.now >= opened.plus_ms(limit_ms) {
            let why = format!("the peer left a write unanswered for {limit_ms} ms (ko-count x timeout)");
            self.drop_session(ConnState::Timeout, &why);
        } else {
            self.timers.set(Timer::Ko, opened.plus_ms(limit_ms));
        }
    }

    pub(super) fn arm_ko(&mut self) {
        let limit_ms = self.cfg.net.ko_count * self.cfg.net.timeout_ms;
        if limit_ms != 0 {
            self.timers.set_if_idle(Timer::Ko, self.now.plus_ms(limit_ms));
        }
    }

    // ---- verbs --------------------------------------------------------------------------------

    pub(super) fn on_connect(&mut self, reply: Reply, discard_my_data: bool, tentative: bool) {
        if self.conn != ConnState::StandAlone {
            // Already on the way: as good as done, unless something new was asked.
            if discard_my_data || tentative {
                let facts = vec![format!("connection is {}", self.conn)];
                let advice =
                    format!("drbdadm disconnect {}, then connect again with the option", self.cfg.name);
                let refused = super::verbs::refusal(
                    125,
                    "Device has a net-config (use disconnect first)",
                    facts,
                    &advice,
                );
                return self.reply(reply, Err(refused));
            }
            return self.reply(reply, Ok(()));
        }
        if discard_my_data && self.role == Role::Primary {
            let facts =
                vec!["this node is Primary: an application uses the data that would be discarded".to_owned()];
            let advice = format!("drbdadm secondary {} first", self.cfg.name);
            let refused =
                super::verbs::refusal(123, "--discard-my-data not allowed when primary.", facts, &advice);
            return self.reply(reply, Err(refused));
        }
        self.discard_my_data = discard_my_data;
        self.tentative = tentative;
        self.set_conn(ConnState::Unconnected);
        self.set_conn(ConnState::Connecting);
        self.out.push_back(Output::Connect);
        self.reply(reply, Ok(()));
    }

    pub(super) fn on_disconnect(&mut self, reply: Reply, force: bool) {
        if self.conn == ConnState::StandAlone {
            return self.reply(reply, Ok(()));
        }
        let needs_peer = self.role == Role::Primary
            && self.devices.iter().any(|device| device.disk != DiskState::UpToDate && device.peer_readable());
        if needs_peer && !force {
            let facts = vec!["this node is Primary and only the peer has good data".to_owned()];
            let advice =
                format!("wait for the resync (drbdadm status {}), or drbdadm secondary first", self.cfg.name);
            let refused = super::verbs::refusal(-2, "Need access to UpToDate data", facts, &advice);
            return self.reply(reply, Err(refused));
        }
        if !force && let Err(refused) = self.check_peer_needs_us("disconnect") {
            return self.reply(reply, Err(refused));
        }
        if !force && self.outdate_peer_before_leaving(reply) {
            return;
        }
        self.leave(reply, force);
    }

    /// The graceful checks are done.
    pub(super) fn leave(&mut self, reply: Reply, force: bool) {
        if !force {
            self.outdate_before_leaving();
        }
        self.go_stand_alone("disconnected by the operator");
        // Done when the new generation of a Primary is durable, so that nothing is half-way afterwards.
        match (0..self.devices.len()).find(|volume| {
            self.devices[*volume].uuid_gate.is_some()
                || (self.devices[*volume].disk == DiskState::Outdated && self.md_busy(*volume))
        }) {
            Some(volume) => match reply {
                Reply::Admin(id) => self.md_then(volume, super::metadata::SuperblockThen::Done(id)),
                Reply::Internal | Reply::Nobody => {}
            },
            None => self.reply(reply, Ok(())),
        }
    }

    /// Ends the session, if any, and does not try again.
    pub(super) fn go_stand_alone(&mut self, reason: &str) {
        if self.conn == ConnState::StandAlone {
            return;
        }
        self.set_conn(ConnState::Disconnecting);
        if let Some(session) = &self.session {
            let session = session.id;
            self.send(Message::TearDown(v1::TearDown { reason: reason.to_owned() }), Payload::None);
            self.out.push_back(Output::Disconnect { session, reason: reason.to_owned() });
            self.end_session(ConnState::Disconnecting, false);
        } else {
            self.out.push_back(Output::StopConnecting);
            self.set_conn(ConnState::StandAlone);
        }
    }

    // ---- the only places where these states change ----------------------------------------------

    pub(super) fn set_conn(&mut self, new: ConnState) {
        let old = self.conn;
        if old == new {
            return;
        }
        assert!(legal_conn_edge(old, new), "connection {old} -> {new} is no legal change");
        self.conn = new;
        self.event(Event::Conn(old, new));
        if (old >= ConnState::Connected) != (new >= ConnState::Connected) {
            for volume in 0..self.devices.len() {
                if self.devices[volume].has_metadata() && self.devices[volume].procedure.is_none() {
                    self.md_touch(volume);
                }
            }
        }
    }

    pub(super) fn set_peer_role(&mut self, new: Role) {
        // Secondary may be an answer that was on its way before it heard of the consent.
        self.peer_promotes &= new == Role::Secondary;
        let old = std::mem::replace(&mut self.peer_role, new);
        if old != new {
            self.event(Event::PeerRole(old, new));
            for volume in 0..self.devices.len() {
                let leaving = self.devices[volume].disk == DiskState::Detaching;
                self.devices[volume].missed_writes |= leaving && new == Role::Primary;
                self.close_books(volume);
                // Its writes wait until PRIMARY_IND is durable here: without it our log would not count.
                if self.serves_diskless_primary(volume)
                    && self.devices[volume].has_metadata()
                    && self.devices[volume].procedure.is_none()
                {
                    self.md_touch(volume);
                }
            }
        }
    }

    pub(super) fn set_repl(&mut self, volume: usize, new: ReplState) {
        let device = &mut self.devices[volume];
        let old = std::mem::replace(&mut device.repl, new);
        let nr = device.nr;
        if new == ReplState::Established {
            device.foreign_bits = 0;
        }
        if old != new {
            self.event(Event::Repl(nr, old, new));
            if (old, new) == (ReplState::SyncSource, ReplState::Established) {
                self.unfence_after_resync();
            }
            self.note_calm(volume, old);
        }
    }

    /// Records the peer's disk state without drawing conclusions.
    pub(super) fn set_peer_disk_fact(&mut self, volume: usize, new: DiskState) {
        let device = &mut self.devices[volume];
        let old = std::mem::replace(&mut device.peer_disk, new);
        if new == DiskState::UpToDate && device.disk == DiskState::UpToDate {
            // What it missed was marked, and it has it now.
            device.peer_may_miss = None;
        }
        let nr = device.nr;
        if old != new {
            self.event(Event::PeerDisk(nr, old, new));
            if self.devices[volume].has_metadata() && self.devices[volume].procedure.is_none() {
                self.md_touch(volume);
            }
            self.close_books(volume);
        }
    }
}

/// Which changes of the connection state exist (SEM §3). The last arm is "no".
#[expect(clippy::match_like_matches_macro, reason = "a table of edges, whose last arm is \"no\"")]
const fn legal_conn_edge(old: ConnState, new: ConnState) -> bool {
    use ConnState::{
        BrokenPipe, Connected, Connecting, Disconnecting, NetworkFailure, ProtocolError, StandAlone,
        TearDown, Timeout, Unconnected,
    };
    match (old, new) {
        (StandAlone, Unconnected) | (Unconnected, Connecting) | (Connecting, Connected) => true,
        (Connecting | Connected, Timeout | BrokenPipe | NetworkFailure | ProtocolError | TearDown) => true,
        (Timeout | BrokenPipe | NetworkFailure | ProtocolError | TearDown, Unconnected) => true,
        (
            Unconnected | Connecting | Connected | Timeout | BrokenPipe | NetworkFailure | ProtocolError
            | TearDown,
            Disconnecting,
        ) => true,
        (Disconnecting, StandAlone) => true,
        _ => false,
    }
}
