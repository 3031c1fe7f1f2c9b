//! Event heap, virtual clock, network, and the runtime's part of the boundary.
use super::Rng;
use super::checkers::{History, first_difference};
use super::node::{Ids, InFlight, Node, VOLUME, io_key, meta_key};
use lockstep_proto::Message;
use lockstep_replicator::core::Resource;
use lockstep_replicator::core::config::{NetConfig, Protocol, VolumeConfig};
use lockstep_replicator::core::event::{
    AdminCommand, DiskIo, DiskOk, DiskOp, Event, HandlerName, HandlerToken, Input, IoError, IoId, LostReason,
    MetaId, Output, Payload, Request, RequestId, RequestOp, SessionId,
};
use lockstep_replicator::core::state::{ConnState, DiskState, ReplState, Role};
use lockstep_replicator::core::status::ResourceStatus;
use lockstep_replicator::units::{BlockRange, Sector, SectorCount, Time};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};

const US: u64 = 1000;
const MS: u64 = 1_000_000;

/// What a world is made of.
#[derive(Clone, Debug)]
pub struct Options {
    /// Everything random comes from it.
    pub seed: u64,
    /// Size of both disks.
    pub sectors: u64,
    /// Network options of both nodes.
    pub net: NetConfig,
    /// Volume options of both nodes.
    pub volume: VolumeConfig,
    /// Print every event.
    pub verbose: bool,
}

impl Options {
    /// Small disks, protocol C, no ko-count: a write that hangs shall be found, not timed out.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let net = NetConfig { ko_count: 0, connect_int_ms: 1000, ..NetConfig::default() };
        let volume = VolumeConfig { al_extents: 67, ..VolumeConfig::new(VOLUME) };
        let verbose = std::env::var_os("SIM_VERBOSE").is_some();
        Self { seed, sectors: 32 * 2048, net, volume, verbose }
    }
}

enum Ev {
    Disk { node: usize, life: u64, id: u64 },
    Meta { node: usize, life: u64, id: u64 },
    Deliver { session: SessionId, to: usize, message: Box<Message>, payload: Wire },
    Lost { session: SessionId, to: usize },
    Connect,
    Timer { node: usize, life: u64, at: Time },
    Alarm(u64),
    Handler { node: usize, life: u64, token: HandlerToken, code: i32 },
}

/// Something that could happen next; two on different nodes may happen in either order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    /// Where it happens.
    pub node: usize,
    seq: u64,
}

enum Wire {
    None,
    Blocks(Vec<u32>),
    Bytes(bytes::Bytes),
}

#[derive(Clone, Debug)]
enum Asked {
    Read { range: BlockRange, buffer: u32, issued: u64 },
    Write { record: u32, fua: bool },
    Flush { issued: u64 },
}

/// See the module.
pub struct World {
    /// As given.
    pub options: Options,
    /// Virtual time, ns.
    pub now: u64,
    /// The one generator.
    pub rng: Rng,
    /// Both nodes.
    pub nodes: [Node; 2],
    /// What the application asked and got.
    pub history: History,
    /// Ids handed out.
    pub ids: Ids,
    heap: BinaryHeap<Reverse<(u64, u64)>>,
    events: BTreeMap<u64, Ev>,
    seq: u64,
    /// The link is up.
    pub link: bool,
    dead: BTreeSet<SessionId>,
    last_delivery: [u64; 2],
    connecting: bool,
    asked: BTreeMap<u64, Asked>,
    /// Check reads and acks against the history.
    pub check_data: bool,
    /// Writes acked by a node while the other did not take part.
    pub ahead: [bool; 2],
    /// When it last acked such a write, and when it last became the source of a resync.
    lone_ack: [u64; 2],
    source_since: [u64; 2],
    /// The last resync a node took part in had it as the target.
    was_target: [bool; 2],
    /// Handlers that were run: when, where, which.
    pub handler_runs: Vec<(u64, usize, HandlerName)>,
    /// What handlers answer; `None` hangs. Default 0.
    pub handler_answers: BTreeMap<(usize, HandlerName), Option<i32>>,
    /// Alarms that rang, for the workload.
    pub alarms: Vec<u64>,
    /// Messages delivered so far.
    pub delivered: u64,
    /// Cut the link after this many.
    pub cut_after: Option<u64>,
    /// Kill this node at its n-th metadata write (from now): node, writes left, power.
    pub crash_at_meta: Option<(usize, u64, bool)>,
    /// Handshake decisions and notes, per node.
    pub log: Vec<(u64, usize, Event)>,
    /// Requests completed with an error.
    pub failed_requests: u64,
    /// Requests completed well.
    pub good_requests: u64,
    /// Delivery of messages to this node waits (one direction stalls).
    pub broken: Option<String>,
    /// Hold messages of this kind to this node.
    pub drop_filter: Option<fn(&Message) -> bool>,
}

impl std::fmt::Debug for World {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("World")
            .field("seed", &self.options.seed)
            .field("now", &self.now)
            .finish_non_exhaustive()
    }
}

impl World {
    /// Two nodes that are down, connected by a link that is up.
    #[must_use]
    pub fn new(options: Options) -> Self {
        let sectors = options.sectors;
        Self {
            now: 0,
            rng: Rng::new(options.seed),
            nodes: [Node::new(0, sectors), Node::new(1, sectors)],
            history: History::new(sectors, options.net.protocol == Protocol::C),
            ids: Ids::default(),
            heap: BinaryHeap::new(),
            events: BTreeMap::new(),
            seq: 0,
            link: true,
            dead: BTreeSet::new(),
            last_delivery: [0; 2],
            connecting: false,
            asked: BTreeMap::new(),
            check_data: true,
            ahead: [false; 2],
            lone_ack: [0; 2],
            source_since: [0; 2],
            was_target: [false; 2],
            handler_runs: Vec::new(),
            handler_answers: BTreeMap::new(),
            alarms: Vec::new(),
            delivered: 0,
            cut_after: None,
            crash_at_meta: None,
            log: Vec::new(),
            failed_requests: 0,
            good_requests: 0,
            broken: None,
            drop_filter: None,
            options,
        }
    }

    fn schedule(&mut self, at: u64, ev: Ev) {
        self.seq += 1;
        self.heap.push(Reverse((at, self.seq)));
        self.events.insert(self.seq, ev);
    }

    /// Rings after `ns`.
    pub fn alarm(&mut self, ns: u64, tag: u64) {
        self.schedule(self.now + ns, Ev::Alarm(tag));
    }

    /// Records a broken promise; the first one counts.
    pub fn fail(&mut self, mut why: String) {
        if self.broken.is_none() {
            why.insert_str(0, &format!("seed {} at {} us: ", self.options.seed, self.now / US));
            self.broken = Some(why);
        }
    }

    #[expect(clippy::print_stdout, reason = "asked for by SIM_VERBOSE")]
    fn trace(&self, text: impl FnOnce() -> String) {
        if self.options.verbose {
            println!("{:>9} us {}", self.now / US, text());
        }
    }

    // ---- nodes ----------------------------------------------------------------------------------

    /// Starts a node as its daemon would: attach, connect.
    pub fn start(&mut self, node: usize) {
        self.boot(node);
        self.attach(node);
        self.admin(node, "connect", AdminCommand::Connect { discard_my_data: false, tentative: false });
    }

    /// Starts a node without configuration verbs.
    pub fn boot(&mut self, node: usize) {
        let config = self.nodes[node].config(&self.options.net, &self.options.volume);
        let seed = self.rng.next();
        self.trace(|| format!("n{node} starts"));
        self.nodes[node].core = Some(Resource::new(config, seed, Time(self.now)));
    }

    /// Orders an attach with what is on the simulated disk.
    pub fn attach(&mut self, node: usize) -> u64 {
        let attached = Box::new(self.nodes[node].disk.meta.attach());
        self.nodes[node].disk_open = true;
        self.admin(node, "attach", AdminCommand::Attach { volume: VOLUME, attached })
    }

    /// An operator's verb; 0 when the node is down.
    pub fn admin(&mut self, node: usize, name: &'static str, command: AdminCommand) -> u64 {
        if self.nodes[node].core.is_none() {
            return 0;
        }
        let id = self.ids.admin();
        self.nodes[node].verbs.insert(id.0, name);
        self.trace(|| format!("n{node} verb {name}"));
        self.feed(node, Input::Admin { id, command });
        id.0
    }

    /// The node stops at once.
    pub fn crash(&mut self, node: usize, power: bool) {
        if self.nodes[node].core.is_none() {
            return;
        }
        self.trace(|| format!("n{node} {}", if power { "loses power" } else { "is killed" }));
        if let Some(session) = self.nodes[node].session {
            self.dead.insert(session);
            let delay = 1 + self.rng.below(20 * MS);
            self.schedule(self.now + delay, Ev::Lost { session, to: 1 - node });
        }
        let lost = self.nodes[node].stop(power, &mut self.rng);
        for request in lost.keys() {
            if let Some(Asked::Write { record, .. }) = self.asked.remove(request) {
                self.history.orphan(record);
            }
        }
    }

    /// Cuts the transport; `stay_down`: and keeps the link down.
    pub fn cut(&mut self, stay_down: bool) {
        self.trace(|| "link cut".into());
        self.link = !stay_down;
        for node in 0..2 {
            if let Some(session) = self.nodes[node].session {
                self.dead.insert(session);
                let delay = 1 + self.rng.below(20 * MS);
                self.schedule(self.now + delay, Ev::Lost { session, to: node });
            }
        }
        self.try_connect();
    }

    /// The link is up again.
    pub fn heal(&mut self) {
        self.link = true;
        self.try_connect();
    }

    fn try_connect(&mut self) {
        let ready = self.link
            && !self.connecting
            && self.nodes.iter().all(|node| node.core.is_some() && node.wants_peer && node.session.is_none());
        if ready {
            self.connecting = true;
            let delay = 100 * US + self.rng.below(20 * MS);
            self.schedule(self.now + delay, Ev::Connect);
        }
    }

    // ---- application ----------------------------------------------------------------------------

    /// A request of the application on `node`; its id.
    pub fn request(&mut self, node: usize, op: RequestOp, start: u64, len: u64, fua: bool) -> u64 {
        let Some(range) = BlockRange::new(Sector(start), SectorCount(len)) else { return 0 };
        if self.nodes[node].core.is_none() || !range.within(SectorCount(self.options.sectors)) {
            return 0;
        }
        let id = self.ids.request();
        let length = usize::try_from(len).unwrap_or(0);
        let buffer = match op {
            RequestOp::Read => {
                let buffer = self.nodes[node].new_buffer(vec![u32::MAX; length]);
                self.asked.insert(id.0, Asked::Read { range, buffer: buffer.0, issued: self.now });
                Some(buffer)
            }
            RequestOp::Write => {
                let record = self.history.issue(range, false, self.now);
                self.asked.insert(id.0, Asked::Write { record, fua });
                Some(self.nodes[node].new_buffer(vec![record; length]))
            }
            RequestOp::WriteZeroes { .. } | RequestOp::Discard => {
                let record = self.history.issue(range, true, self.now);
                self.asked.insert(id.0, Asked::Write { record, fua });
                None
            }
        };
        self.nodes[node].requests.insert(id.0, buffer.map_or(0, |buffer| buffer.0));
        self.trace(|| format!("n{node} request {} {op:?} {range:?} fua {fua}", id.0));
        self.feed(node, Input::Request(Request { id, volume: VOLUME, op, range, fua, buffer }));
        id.0
    }

    /// A flush of the application.
    pub fn flush(&mut self, node: usize) -> u64 {
        if self.nodes[node].core.is_none() {
            return 0;
        }
        let id = self.ids.request();
        self.asked.insert(id.0, Asked::Flush { issued: self.now });
        self.nodes[node].requests.insert(id.0, 0);
        self.trace(|| format!("n{node} flush {}", id.0));
        self.feed(node, Input::Flush { id, volume: VOLUME });
        id.0
    }

    fn complete(&mut self, node: usize, id: RequestId, ok: bool, data: Option<u32>) {
        let Some(buffer) = self.nodes[node].requests.remove(&id.0) else {
            return self.fail(format!("n{node}: request {} answered twice or never asked", id.0));
        };
        self.trace(|| format!("n{node} request {} done: {ok}", id.0));
        *(if ok { &mut self.good_requests } else { &mut self.failed_requests }) += 1;
        match self.asked.remove(&id.0) {
            Some(Asked::Read { range, buffer, issued }) if ok => {
                let from = data.unwrap_or(buffer);
                let data = self.nodes[node].buffers.get(&from).map(|buffer| buffer.data.clone());
                if let (Some(data), true) = (data, self.check_data) {
                    let wrong = if data.len() as u64 == range.len().0 {
                        self.history.wrong(range.start().0, &data, issued)
                    } else {
                        Some("a read of the wrong length".into())
                    };
                    if let Some(wrong) = wrong {
                        self.fail(format!("n{node}: read {}: {wrong}", id.0));
                    }
                }
            }
            Some(Asked::Write { record, fua }) => {
                let both = self.options.net.protocol == Protocol::C;
                self.history.answer(record, ok, fua && both, self.now);
                // A node without good data of its own cannot be ahead itself, even if the other's disk is on
                // its way out: what it acks is what the other has acked to it.
                let holds = self.state(node).is_some_and(|state| {
                    matches!(state.1, DiskState::UpToDate | DiskState::Detaching | DiskState::Failed)
                });
                if ok && holds && !self.mirrors(node) {
                    self.ahead[node] = true;
                    self.lone_ack[node] = self.now;
                }
                // Without a disk of its own it is the other's copy that goes on.
                if ok && self.state(node).is_some_and(|state| state.1 < DiskState::Inconsistent) {
                    self.ahead[1 - node] = true;
                    self.lone_ack[1 - node] = self.now;
                }
            }
            Some(Asked::Flush { issued }) if ok => self.history.flushed(issued),
            Some(Asked::Read { .. } | Asked::Flush { .. }) | None => {}
        }
        for id in [Some(buffer), data].into_iter().flatten().filter(|id| *id != 0) {
            self.nodes[node].release(lockstep_replicator::core::event::BufferId(id));
        }
    }

    /// A write of this node reaches the other one's disk.
    fn mirrors(&self, node: usize) -> bool {
        self.status(node).is_some_and(|status| {
            let peer = &status.connection.peer_volumes[0];
            status.connection.connection == ConnState::Connected
                && peer.replication != ReplState::WFBitMapS
                && peer.peer_disk >= DiskState::Inconsistent
        })
    }

    // ---- getters --------------------------------------------------------------------------------

    /// What the node says of itself.
    #[must_use]
    pub fn status(&self, node: usize) -> Option<ResourceStatus> {
        self.nodes[node].core.as_ref().map(|core| core.status(Time(self.now)))
    }

    /// Role, disk, connection and replication state.
    #[must_use]
    pub fn state(&self, node: usize) -> Option<(Role, DiskState, ConnState, ReplState)> {
        self.status(node).map(|status| {
            (
                status.role,
                status.volumes[0].disk,
                status.connection.connection,
                status.connection.peer_volumes[0].replication,
            )
        })
    }

    /// The node is up and Primary.
    #[must_use]
    pub fn is_primary(&self, node: usize) -> bool {
        self.state(node).is_some_and(|state| state.0 == Role::Primary)
    }

    /// Both up, connected, UpToDate, nothing marked, nothing in flight.
    #[must_use]
    pub fn in_sync(&self) -> bool {
        (0..2).all(|node| {
            self.state(node).is_some_and(|(_, disk, conn, repl)| {
                disk == DiskState::UpToDate && conn == ConnState::Connected && repl == ReplState::Established
            }) && self.nodes[node].core.as_ref().is_some_and(|core| core.out_of_sync_bits(VOLUME) == Some(0))
        })
    }

    /// Nothing of the application or an operator is open on a live node.
    #[must_use]
    pub fn idle(&self) -> bool {
        self.nodes.iter().all(|node| {
            node.core
                .as_ref()
                .is_none_or(|core| core.is_idle() && node.requests.is_empty() && node.verbs.is_empty())
        })
    }

    /// In sync and idle: then the disks are equal, hold what they may, and no buffer is left.
    pub fn check_quiet(&mut self) {
        if !self.in_sync() || !self.idle() {
            return;
        }
        if let Some((sector, a, b)) =
            first_difference(self.nodes[0].disk.sectors(), self.nodes[1].disk.sectors())
        {
            self.fail(format!("both in sync, but sector {sector} is {a} on n0 and {b} on n1"));
        }
        for node in 0..2 {
            if !self.nodes[node].buffers.is_empty() {
                let left: Vec<_> = self.nodes[node].buffers.keys().collect();
                self.fail(format!("n{node} is idle but holds buffers {left:?}"));
            }
        }
        self.ahead = [false; 2];
        for node in &mut self.nodes {
            node.lost_power = false;
        }
    }

    /// Every sector of one node's disk is allowed.
    pub fn check_content(&mut self, node: usize) {
        if let (Some(wrong), true) =
            (self.history.wrong(0, self.nodes[node].disk.sectors(), self.now), self.check_data)
        {
            self.fail(format!("disk of n{node}: {wrong}"));
        }
    }

    // ---- time -----------------------------------------------------------------------------------

    /// Runs until `done` holds or `ms` have passed; whether it holds.
    pub fn run_until(&mut self, ms: u64, mut done: impl FnMut(&Self) -> bool) -> bool {
        let end = self.now + ms * MS;
        while self.broken.is_none() {
            if done(self) {
                return true;
            }
            if !self.step(end) {
                return done(self);
            }
        }
        false
    }

    /// Runs for `ms`.
    pub fn run(&mut self, ms: u64) {
        self.run_until(ms, |_| false);
    }

    /// One event; `false` when there is none before `end`.
    pub fn step(&mut self, end: u64) -> bool {
        match self.heap.peek() {
            Some(Reverse((at, _))) if *at <= end => {}
            _ => {
                self.now = end;
                return false;
            }
        }
        let Some(Reverse((at, seq))) = self.heap.pop() else { return false };
        self.now = self.now.max(at);
        if let Some(ev) = self.events.remove(&seq) {
            self.happen(ev);
        }
        true
    }

    // ---- every order ----------------------------------------------------------------------------

    /// What could happen next, whatever its time: each disk or metadata answer, the first message of
    /// each direction, each loss notice. Timers and new transports are left to [`World::step`].
    #[must_use]
    pub fn choices(&self) -> Vec<Choice> {
        let mut first = [true; 2];
        let mut choices = Vec::new();
        for (seq, ev) in &self.events {
            let node = match ev {
                Ev::Disk { node, life, .. } | Ev::Meta { node, life, .. }
                    if self.nodes[*node].life == *life =>
                {
                    *node
                }
                Ev::Deliver { session, to, .. }
                    if self.nodes[*to].session == Some(*session)
                        && !self.dead.contains(session)
                        && std::mem::take(&mut first[*to]) =>
                {
                    *to
                }
                Ev::Lost { to, .. } => *to,
                _ => continue,
            };
            choices.push(Choice { node, seq: *seq });
        }
        choices
    }

    /// Lets one of [`World::choices`] happen now.
    pub fn choose(&mut self, choice: Choice) {
        self.now += US;
        if let Some(ev) = self.events.remove(&choice.seq) {
            self.happen(ev);
        }
    }

    fn happen(&mut self, ev: Ev) {
        match ev {
            Ev::Disk { node, life, id } if self.nodes[node].life == life => self.disk_done(node, id),
            Ev::Meta { node, life, id } if self.nodes[node].life == life => {
                if let Some(write) = self.nodes[node].metas.remove(&id) {
                    self.nodes[node].disk.meta.apply(&write);
                    self.feed(node, Input::MetaDone { id: MetaId(id), result: Ok(()) });
                }
            }
            Ev::Deliver { session, to, message, payload } => self.deliver(session, to, *message, payload),
            Ev::Lost { session, to } => {
                if self.nodes[to].core.is_some() && self.nodes[to].session == Some(session) {
                    self.nodes[to].session = None;
                    self.trace(|| format!("n{to} notices the loss of {session:?}"));
                    self.feed(to, Input::PeerLost { session, reason: LostReason::Closed("cut".into()) });
                    self.try_connect();
                }
            }
            Ev::Connect => {
                self.connecting = false;
                let ready = self.link
                    && self.nodes.iter().all(|n| n.core.is_some() && n.wants_peer && n.session.is_none());
                if ready {
                    let session = self.ids.session();
                    for node in 0..2 {
                        self.nodes[node].session = Some(session);
                        self.nodes[node].wants_peer = false;
                    }
                    self.trace(|| format!("transport {session:?} is up"));
                    self.feed(0, Input::PeerConnected(session));
                    self.feed(1, Input::PeerConnected(session));
                }
            }
            Ev::Timer { node, life, at } if self.nodes[node].life == life => {
                if self.nodes[node].timer_at == Some(at) {
                    self.nodes[node].timer_at = None;
                    self.feed(node, Input::Timeout);
                }
            }
            Ev::Alarm(tag) => self.alarms.push(tag),
            Ev::Handler { node, life, token, code } if self.nodes[node].life == life => {
                self.feed(node, Input::HandlerDone { token, exit_code: Some(code) });
            }
            Ev::Disk { .. } | Ev::Meta { .. } | Ev::Timer { .. } | Ev::Handler { .. } => {}
        }
    }

    fn disk_done(&mut self, node: usize, id: u64) {
        let Some(InFlight { io, content, mark }) = self.nodes[node].ios.remove(&id) else { return };
        let this = &mut self.nodes[node];
        let write = !matches!(io.op, DiskOp::Read | DiskOp::Flush);
        let unlucky = this.eio_per_mille > 0 && self.rng.below(1000) < this.eio_per_mille;
        let ordered = if write { &mut this.fail_writes } else { &mut this.fail_flushes };
        let ordered = (write || io.op == DiskOp::Flush) && *ordered > 0 && {
            *ordered -= 1;
            true
        };
        let mut result = Ok(DiskOk::default());
        if unlucky || ordered {
            if let (Some(range), true) = (io.range, write) {
                this.disk.maybe_write(range, &content, &mut self.rng);
            }
            result = Err(IoError::Errno(5));
        } else {
            match (io.op, io.range) {
                (DiskOp::Read, Some(range)) => {
                    let data = this.disk.read(range);
                    if let Some(buffer) = io.buffer {
                        if let Some(buffer) = this.buffers.get_mut(&buffer.0) {
                            buffer.data = data;
                        }
                    } else {
                        let all_zero = data.iter().all(|value| *value == 0);
                        let buffer = this.new_buffer(data);
                        result = Ok(DiskOk { buffer: Some(buffer), all_zero });
                    }
                }
                (DiskOp::Flush, _) => this.disk.flush(mark),
                (_, Some(range)) => this.disk.write(range, content, io.fua),
                (_, None) => {}
            }
        }
        if let Some(id) = io.buffer {
            if let Some(buffer) = this.buffers.get_mut(&id.0) {
                buffer.disk -= 1;
            }
            this.collect(id);
        }
        self.feed(node, Input::DiskDone { id: IoId(id), result });
    }

    fn deliver(&mut self, session: SessionId, to: usize, message: Message, payload: Wire) {
        if self.dead.contains(&session)
            || self.nodes[to].core.is_none()
            || self.nodes[to].session != Some(session)
        {
            return;
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
        let payload = match payload {
            Wire::None => Payload::None,
            Wire::Bytes(bytes) => Payload::Bytes(bytes),
            Wire::Blocks(data) => {
                let len = SectorCount(data.len() as u64);
                Payload::Buffer { id: self.nodes[to].new_buffer(data), len }
            }
        };
        self.trace(|| format!("n{to} <- {message:?}"));
        self.feed(to, Input::PeerMessage { session, message, payload });
    }

    /// Gives an input to a core and does all it asks for.
    pub fn feed(&mut self, node: usize, input: Input) {
        let now = Time(self.now);
        let Some(mut core) = self.nodes[node].core.take() else { return };
        core.handle(now, input);
        let life = self.nodes[node].life;
        let mut outputs = Vec::new();
        while let Some(output) = core.poll_output() {
            outputs.push(output);
        }
        let next = core.poll_timeout();
        self.nodes[node].core = Some(core);
        for output in outputs {
            if self.nodes[node].life == life {
                self.obey(node, output);
            }
        }
        if let (Some(at), true) = (next, self.nodes[node].life == life)
            && self.nodes[node].timer_at.is_none_or(|set| set != at)
        {
            self.nodes[node].timer_at = Some(at);
            self.schedule(at.0.max(self.now), Ev::Timer { node, life, at });
        }
    }

    fn io_delay(&mut self) -> u64 {
        match self.rng.below(100) {
            0..=1 => self.rng.below(30 * MS),
            2..=20 => 500 * US + self.rng.below(3 * MS),
            _ => 20 * US + self.rng.below(400 * US),
        }
    }

    fn obey(&mut self, node: usize, output: Output) {
        match output {
            Output::Complete { id, result, data } => {
                self.complete(node, id, result.is_ok(), data.map(|id| id.0));
            }
            Output::Disk(io) => self.start_io(node, io),
            Output::Meta { id, write, .. } => {
                let life = self.nodes[node].life;
                self.trace(|| format!("n{node} meta {} {}", id.0, meta_text(&write)));
                if !self.nodes[node].disk_open {
                    self.fail(format!("n{node}: metadata write on a disk that was let go"));
                }
                self.nodes[node].metas.insert(meta_key(id), write);
                self.nodes[node].metas_total += 1;
                let delay = self.io_delay();
                self.schedule(self.now + delay, Ev::Meta { node, life, id: meta_key(id) });
                if let Some((victim, left, power)) = self.crash_at_meta
                    && victim == node
                {
                    self.crash_at_meta = if left == 0 { None } else { Some((victim, left - 1, power)) };
                    if left == 0 {
                        self.crash(node, power);
                    }
                }
            }
            Output::Connect => {
                self.nodes[node].wants_peer = true;
                self.try_connect();
            }
            Output::StopConnecting => self.nodes[node].wants_peer = false,
            Output::Disconnect { session, reason } => {
                self.trace(|| format!("n{node} drops {session:?}: {reason}"));
                if self.nodes[node].session == Some(session) {
                    self.nodes[node].session = None;
                    let to = 1 - node;
                    let at = self.last_delivery[to].max(self.now + 100 * US) + 1;
                    self.last_delivery[to] = at;
                    self.schedule(at, Ev::Lost { session, to });
                    self.try_connect();
                }
            }
            Output::Send { session, message, payload } => self.send(node, session, message, payload),
            Output::Release(id) => self.nodes[node].release(id),
            Output::Event(event) => {
                self.trace(|| format!("n{node} event {event:?}"));
                self.follow_resync(node, &event);
                if matches!(
                    event,
                    Event::Role(..) | Event::Handshake(_) | Event::ResyncDone { .. } | Event::Note(..)
                ) {
                    self.log.push((self.now, node, event));
                }
            }
            Output::AdminReply { id, result } => {
                self.trace(|| format!("n{node} reply {result:?}"));
                match self.nodes[node].verbs.remove(&id.0) {
                    Some("primary" | "primary-force") if result.is_ok() => self.history.new_reign(self.now),
                    Some(_) => {}
                    None => self.fail(format!("n{node}: verb {} answered twice", id.0)),
                }
                self.nodes[node].answers.insert(id.0, result);
            }
            Output::Export { size, .. } => {
                self.nodes[node].exported = size.is_some();
                self.nodes[node].export_size = size.map_or(0, |size| size.0);
            }
            Output::RunHandler { token, name, .. } => {
                self.trace(|| format!("n{node} runs handler {}", name.name()));
                self.handler_runs.push((self.now, node, name));
                let answer = self.handler_answers.get(&(node, name)).copied().unwrap_or(Some(0));
                let life = self.nodes[node].life;
                if let Some(code) = answer {
                    self.schedule(self.now + MS, Ev::Handler { node, life, token, code });
                }
            }
            Output::Measure(volume) => {
                let place = self.nodes[node].disk.meta.measure();
                self.feed(node, Input::Measured { volume, place });
            }
            Output::DiskReleased(_) => {
                if !self.nodes[node].ios.is_empty() || !self.nodes[node].metas.is_empty() {
                    self.fail(format!("n{node}: disk let go with IO in flight"));
                }
                self.nodes[node].disk_open = false;
            }
        }
    }

    /// A target that is done has all its source had when the resync began, even if the source dies
    /// before it hears of the end.
    fn follow_resync(&mut self, node: usize, event: &Event) {
        match event {
            Event::Repl(_, _, ReplState::SyncSource) => {
                self.source_since[node] = self.now;
                self.was_target[node] = false;
            }
            Event::Repl(_, _, ReplState::SyncTarget) => self.was_target[node] = true,
            // It has everything from here on, even if the source never hears of it.
            Event::Disk(_, DiskState::Inconsistent, DiskState::UpToDate) if self.was_target[node] => {
                let source = 1 - node;
                if self.lone_ack[source] <= self.source_since[source] {
                    self.ahead[source] = false;
                }
            }
            Event::ResyncDone { bits_failed: 0, .. } if self.was_target[node] => {
                let source = 1 - node;
                if self.lone_ack[source] <= self.source_since[source] {
                    self.ahead[source] = false;
                }
            }
            _ => {}
        }
    }

    fn start_io(&mut self, node: usize, io: DiskIo) {
        let life = self.nodes[node].life;
        if !self.nodes[node].disk_open {
            self.fail(format!("n{node}: IO on a disk that was let go"));
        }
        let this = &mut self.nodes[node];
        let length = io.range.map_or(0, |range| usize::try_from(range.len().0).unwrap_or(0));
        let content = match io.op {
            DiskOp::Write => io.buffer.map(|id| this.data(id)[..length].to_vec()).unwrap_or_default(),
            DiskOp::WriteZeroes { .. } | DiskOp::Discard => vec![0; length],
            DiskOp::Read | DiskOp::Flush => Vec::new(),
        };
        if let Some(buffer) = io.buffer.and_then(|id| this.buffers.get_mut(&id.0)) {
            buffer.disk += 1;
        }
        if io.op != DiskOp::Read && io.op != DiskOp::Flush && io.range.is_some() {
            let range = io.range;
            let overlap = this.ios.values().any(|other| {
                other.io.op != DiskOp::Read
                    && other.io.range.is_some_and(|other| range.is_some_and(|range| range.overlaps(other)))
            });
            if overlap {
                self.fail(format!("n{node}: two writes of {range:?} in flight at once"));
            }
        }
        let mark = self.nodes[node].disk.mark();
        let id = io_key(io.id);
        self.trace(|| format!("n{node} disk {:?} {:?} io {id}", io.op, io.range));
        self.nodes[node].ios.insert(id, InFlight { io, content, mark });
        let delay = self.io_delay();
        self.schedule(self.now + delay, Ev::Disk { node, life, id });
    }

    fn send(&mut self, node: usize, session: SessionId, message: Message, payload: Payload) {
        let wire = match payload {
            Payload::None => Wire::None,
            Payload::Bytes(bytes) => Wire::Bytes(bytes),
            Payload::Buffer { id, len } => {
                let length = usize::try_from(len.0).unwrap_or(0);
                Wire::Blocks(self.nodes[node].data(id)[..length].to_vec())
            }
        };
        if self.nodes[node].session != Some(session) || self.dead.contains(&session) {
            return;
        }
        let to = 1 - node;
        let delay = match self.rng.below(100) {
            0 => self.rng.below(40 * MS),
            _ => 30 * US + self.rng.below(300 * US),
        };
        let at = self.last_delivery[to].max(self.now + delay) + 1;
        self.last_delivery[to] = at;
        self.schedule(at, Ev::Deliver { session, to, message: Box::new(message), payload: wire });
    }
}

fn meta_text(write: &lockstep_replicator::core::event::MetaWrite) -> String {
    use lockstep_replicator::core::event::MetaWrite;
    match write {
        MetaWrite::Superblock(sb) => format!("superblock uuid {:x?} flags {:x}", sb.uuid, sb.flags),
        MetaWrite::AlTransaction(t) => format!("al {:?}", t.updates),
        MetaWrite::AlInit => "al init".into(),
        MetaWrite::Relocate => "relocate".into(),
        MetaWrite::ForgetOldPlace => "forget the old place".into(),
        MetaWrite::Bitmap(pages) => format!("{} bitmap pages", pages.len()),
    }
}
