//! The network between the two nodes.
//!
//! Fault model:
//! * messages of one transport arrive in order, whole and unchanged (the transport is TCP with checksums in
//!   the frames), each after a delay of its own; the two directions may differ, and a link may drip: so much
//!   for each sector of payload;
//! * a transport may end at any moment ([`World::cut`], also after the n-th message in one direction): what
//!   is in flight is lost, each side learns of it at its own time. The link may stay down;
//! * a direction may go silent ([`Network::deaf`]): nobody is told, messages and the news of an end wait.
//!   Only pings find it. When it clears, a transport that both still have goes on, as TCP would;
//! * a node that loses power may tell nobody; one that is killed closes its sockets;
//! * a second transport may come up while the old one is believed alive; the runtime refuses it before the
//!   core sees it, and a core that does see it must refuse it ([`World::duplicate_connect`]).
use super::Rng;
use super::options::Weather;
use super::world::{Ev, MS, US, World};
use lockstep_proto::Message;
use lockstep_replicator::core::config::Protocol;
use lockstep_replicator::core::event::{Input, LostReason, Payload, SessionId};
use lockstep_replicator::units::SectorCount;
use std::collections::BTreeSet;

/// What a frame carries.
#[derive(Debug)]
pub enum Wire {
    /// Nothing.
    None,
    /// Sectors.
    Blocks(Vec<u32>),
    /// Bitmap words.
    Bytes(bytes::Bytes),
}

/// Changes one message on its way to a node, as no network does but a peer with a defect may; whether it did.
pub type Tamper = Box<dyn FnMut(usize, &mut Message, &mut Wire) -> bool>;

/// How [`Network::cut_after_to`] ends a link.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Cut {
    /// It comes back at once.
    #[default]
    Blink,
    /// It stays down.
    Down,
    /// Half-open: nothing reaches that node any more, and nobody is told.
    Silence,
}

/// See the module.
#[derive(Default)]
pub struct Network {
    /// The link is down.
    pub down: bool,
    /// Nothing reaches this node, and nobody is told.
    pub deaf: [bool; 2],
    /// The link is cut when this many more messages reached the node.
    pub cut_after_to: [Option<u64>; 2],
    /// How.
    pub cut_how: Cut,
    /// Asked for each message until it has changed one.
    pub tamper: Option<Tamper>,
    dead: BTreeSet<SessionId>,
    last_delivery: [u64; 2],
    connecting: bool,
    /// What waits for a silent direction.
    held: Vec<Ev>,
}

impl std::fmt::Debug for Network {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Network").field("down", &self.down).field("deaf", &self.deaf).finish_non_exhaustive()
    }
}

impl Network {
    /// The transport is gone, though nobody may know it yet.
    pub(super) fn is_dead(&self, session: SessionId) -> bool {
        self.dead.contains(&session)
    }
}

impl World {
    /// Cuts the transport; `stay_down`: and keeps the link down.
    pub fn cut(&mut self, stay_down: bool) {
        self.trace(|| format!("link cut{}", if stay_down { " and down" } else { "" }));
        self.net.down = stay_down;
        for node in 0..2 {
            if let Some(session) = self.nodes[node].session {
                self.net.dead.insert(session);
                let delay = 1 + self.rng.below(self.options.weather.notice_ms * MS);
                self.schedule(self.now + delay, Ev::Lost { session, to: node });
            }
        }
        self.try_connect();
    }

    /// The link is up again, in both directions.
    pub fn heal(&mut self) {
        if self.net.down || self.net.deaf != [false; 2] {
            self.trace(|| "link healed".into());
        }
        self.net.down = false;
        self.net.deaf = [false; 2];
        self.net.cut_after_to = [None; 2];
        for event in std::mem::take(&mut self.net.held) {
            match event {
                Ev::Deliver { session, to, message, payload } => self.deliver(session, to, message, payload),
                Ev::Lost { session, to } => self.lost(session, to),
                _ => {}
            }
        }
        self.try_connect();
    }

    /// Nothing reaches `node` any more, and nobody is told.
    pub fn silence(&mut self, node: usize) {
        self.trace(|| format!("nothing reaches n{node} any more"));
        self.net.deaf[node] = true;
    }

    /// Another transport comes up at a node that has one. It must refuse it.
    pub fn duplicate_connect(&mut self, node: usize) {
        if self.nodes[node].core.is_some() && self.nodes[node].session.is_some() {
            let session = self.ids.session();
            self.net.dead.insert(session);
            self.feed(node, Input::PeerConnected(session));
        }
    }

    /// A node stopped: its sockets close, unless it lost power, which tells nobody.
    pub(super) fn net_node_gone(&mut self, node: usize, power: bool) {
        if let Some(session) = self.nodes[node].session {
            self.net.dead.insert(session);
            let quiet = power && self.options.weather.quiet_power && self.rng.percent(50);
            let notice = if quiet { 12_000 } else { self.options.weather.notice_ms };
            let delay = 1 + self.rng.below(notice * MS);
            self.schedule(self.now + delay, Ev::Lost { session, to: 1 - node });
        }
    }

    /// The core of a node let go of a transport.
    pub(super) fn net_drop(&mut self, node: usize, session: SessionId) {
        if self.nodes[node].session == Some(session) {
            self.nodes[node].session = None;
            let to = 1 - node;
            let at = self.net.last_delivery[to].max(self.now + 100 * US) + 1;
            self.net.last_delivery[to] = at;
            self.schedule(at, Ev::Lost { session, to });
            self.try_connect();
        }
    }

    fn may_connect(&self) -> bool {
        !self.net.down
            && self.net.deaf == [false; 2]
            && self.nodes.iter().all(|node| node.core.is_some() && node.wants_peer && node.session.is_none())
    }

    pub(super) fn try_connect(&mut self) {
        if !self.net.connecting && self.may_connect() {
            self.net.connecting = true;
            let delay = 100 * US + self.rng.below(20 * MS);
            self.schedule(self.now + delay, Ev::Connect);
        }
    }

    pub(super) fn transport_up(&mut self) {
        self.net.connecting = false;
        if self.may_connect() {
            let session = self.ids.session();
            for node in &mut self.nodes {
                node.session = Some(session);
                node.wants_peer = false;
            }
            self.trace(|| format!("transport {session:?} is up"));
            self.feed(0, Input::PeerConnected(session));
            self.feed(1, Input::PeerConnected(session));
        }
    }

    pub(super) fn lost(&mut self, session: SessionId, to: usize) {
        if self.nodes[to].core.is_none() || self.nodes[to].session != Some(session) {
            return;
        }
        if self.net.deaf[to] {
            return self.net.held.push(Ev::Lost { session, to });
        }
        self.nodes[to].session = None;
        self.trace(|| format!("n{to} notices the loss of {session:?}"));
        self.feed(to, Input::PeerLost { session, reason: LostReason::Closed("cut".into()) });
        self.try_connect();
    }

    pub(super) fn send(&mut self, node: usize, session: SessionId, message: Message, payload: Payload) {
        let wire = match payload {
            Payload::None => Wire::None,
            Payload::Bytes(bytes) => Wire::Bytes(bytes),
            Payload::Buffer { id, len } => {
                let length = usize::try_from(len.0).unwrap_or(0);
                Wire::Blocks(self.nodes[node].data(id)[..length].to_vec())
            }
        };
        let lost = self.nodes[node].session != Some(session) || self.net.dead.contains(&session);
        self.oracle_sent(node, session, &message, lost);
        if lost {
            return;
        }
        let to = 1 - node;
        let sectors = if let Wire::Blocks(data) = &wire { data.len() as u64 } else { 1 };
        let delay = delay(&self.options.weather, &mut self.rng, to) + sectors * self.options.weather.drip_ns;
        let at = self.net.last_delivery[to].max(self.now + delay) + 1;
        self.net.last_delivery[to] = at;
        self.schedule(at, Ev::Deliver { session, to, message: Box::new(message), payload: wire });
    }

    pub(super) fn deliver(
        &mut self,
        session: SessionId,
        to: usize,
        mut message: Box<Message>,
        mut payload: Wire,
    ) {
        if self.net.dead.contains(&session)
            || self.nodes[to].core.is_none()
            || self.nodes[to].session != Some(session)
        {
            return;
        }
        if self.net.deaf[to] {
            return self.net.held.push(Ev::Deliver { session, to, message, payload });
        }
        if self.drop_filter.is_some_and(|filter| filter(&message)) {
            self.drop_filter = None;
            return self.cut(false);
        }
        self.delivered += 1;
        if self.cut_after.is_some_and(|limit| self.delivered > limit) {
            self.cut_after = None;
            return self.cut(false);
        }
        if let Some(left) = &mut self.net.cut_after_to[to] {
            if *left == 0 {
                self.net.cut_after_to[to] = None;
                if self.net.cut_how == Cut::Silence {
                    self.silence(to);
                    return self.net.held.push(Ev::Deliver { session, to, message, payload });
                }
                return self.cut(self.net.cut_how == Cut::Down);
            }
            *left -= 1;
        }
        if let Message::ProtocolUpdate(update) = &*message
            && let Some(protocol) = Protocol::from_number(update.protocol)
        {
            self.protocols[to] = protocol;
        }
        if let Some(mut tamper) = self.net.tamper.take()
            && !tamper(to, &mut message, &mut payload)
        {
            self.net.tamper = Some(tamper);
        }
        let payload = match payload {
            Wire::None => Payload::None,
            Wire::Bytes(bytes) => Payload::Bytes(bytes),
            Wire::Blocks(data) => {
                let len = SectorCount(data.len() as u64);
                Payload::Buffer { id: self.nodes[to].new_buffer(data), len }
            }
        };
        self.trace(|| format!("n{to} <- {message:?}"));
        self.oracle_delivered(to, &message, &payload);
        self.feed(to, Input::PeerMessage { session, message: *message, payload });
    }
}

fn delay(weather: &Weather, rng: &mut Rng, to: usize) -> u64 {
    match rng.below(100) {
        0 => rng.below(weather.net_slow_ms * MS),
        _ => 30 * US + rng.below(weather.net_us[to] * US),
    }
}
