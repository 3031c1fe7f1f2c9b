//! Event heap, virtual clock, and the runtime's part of the boundary. The network is in `net.rs`, what is
//! concluded from all this in `oracle.rs`.
use super::Rng;
use super::device_io::meta_text;
use super::history::History;
use super::meta_area::MetaFate;
use super::net::{Network, Wire};
use super::node::{Ids, Node, meta_key};
use super::options::Options;
use super::oracle::Oracle;
pub use super::orders::Choice;
use super::real_area::RealArea;
use lockstep_proto::Message;
use lockstep_replicator::core::Resource;
use lockstep_replicator::core::config::{NetConfig, Protocol, VolumeConfig};
use lockstep_replicator::core::event::{
    AdminCommand, Event, HandlerName, HandlerToken, Input, Output, Request, RequestId, RequestOp, SessionId,
};
use lockstep_replicator::core::state::{ConnState, DiskState, ReplState, Role};
use lockstep_replicator::core::status::{ResourceStatus, States};
use lockstep_replicator::meta::MetaKind;
use lockstep_replicator::units::{BlockRange, Sector, SectorCount, Time, VolumeNr};
use std::cmp::Ordering;
use std::collections::{BTreeMap, BinaryHeap};

pub(super) const US: u64 = 1000;
pub(super) const MS: u64 = 1_000_000;

pub(super) enum Ev {
    Disk { node: usize, life: u64, id: u64 },
    Meta { node: usize, life: u64, id: u64 },
    Deliver { session: SessionId, to: usize, message: Box<Message>, payload: Wire },
    Lost { session: SessionId, to: usize },
    Connect,
    Alarm(u64),
    Handler { node: usize, life: u64, token: HandlerToken, code: Option<i32>, asked: u64 },
}

/// The daemon kills a handler that has not ended by then (`runtime/handlers.rs`), ms.
const HANDLER_LIMIT_MS: u64 = 120_000;

/// An event and its time; the heap gives the earliest, and of equal ones the first scheduled.
pub(super) struct Due {
    at: u64,
    pub(super) seq: u64,
    pub(super) ev: Ev,
}

impl PartialEq for Due {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}
impl Eq for Due {}
impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Due {
    fn cmp(&self, other: &Self) -> Ordering {
        (other.at, other.seq).cmp(&(self.at, self.seq))
    }
}

#[derive(Clone, Debug)]
pub(super) enum Asked {
    Read { volume: usize, range: BlockRange, buffer: u32, issued: u64, own: bool },
    Write { record: u32 },
    Flush { volume: usize, issued: u64, nodes: [bool; 2], only: Option<usize> },
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
    pub(super) heap: BinaryHeap<Due>,
    seq: u64,
    /// The link and what is on it.
    pub net: Network,
    pub(super) asked: BTreeMap<u64, Asked>,
    /// The protocol by which each node sends, as far as its operators and its peer told it.
    pub(super) protocols: [Protocol; 2],
    /// Which record a write to the peer is: by transport, sender and its id there.
    pub(super) wired: BTreeMap<(SessionId, usize, u64), u32>,
    /// Check reads and acks against the history.
    pub check_data: bool,
    /// What is known about the two copies.
    pub oracle: Oracle,
    /// Handlers that were run: when, where, which.
    pub handler_runs: Vec<(u64, usize, HandlerName)>,
    /// What handlers answer; `None` hangs until it is killed. Default 0.
    pub handler_answers: BTreeMap<(usize, HandlerName), Option<i32>>,
    /// They answer after this, ms. Default 1.
    pub handler_delay_ms: [u64; 2],
    /// Nodes whose `fence-peer` does what it should: see `extra.rs`.
    pub(super) honest: [bool; 2],
    /// `suspend-io` was typed and not `resume-io` since.
    pub(super) suspending: [bool; 2],
    /// Since when `suspend-io` holds on a node, as far as its operator knows.
    pub(super) suspended: [Option<u64>; 2],
    /// When its lease ends.
    pub(super) lease_ends: [u64; 2],
    /// Alarms that rang, for the workload.
    pub alarms: Vec<u64>,
    /// Messages delivered so far.
    pub delivered: u64,
    /// Cut the link after this many.
    pub cut_after: Option<u64>,
    /// Data and metadata IO of both disks so far.
    pub disk_ios: u64,
    /// Kill this node at its n-th metadata write (from now): node, writes left, power.
    pub crash_at_meta: Option<(usize, u64, bool)>,
    /// What becomes of metadata writes in flight at a crash; `None`: the generator decides.
    pub meta_fate: Option<MetaFate>,
    /// Handshake decisions and notes, per node.
    pub log: Vec<(u64, usize, Event)>,
    /// Requests completed with an error.
    pub failed_requests: u64,
    /// Requests completed well.
    pub good_requests: u64,
    /// The first broken promise.
    pub broken: Option<String>,
    /// Hold messages of this kind to this node.
    pub drop_filter: Option<fn(&Message) -> bool>,
    /// Called after each event.
    pub watch: Option<Watch>,
    /// How requests ended, if anybody wants to know.
    pub results: Option<BTreeMap<u64, bool>>,
}

/// Looks on, or takes part.
pub type Watch = Box<dyn FnMut(&mut World)>;

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
        let mut sizes = vec![options.sectors];
        sizes.extend(&options.more_volumes);
        let mut history = History::new(&sizes, options.net.protocol);
        history.compare = options.compare;
        let mut nodes = [Node::new(0, &sizes), Node::new(1, &sizes)];
        if let Some(bytes) = options.grows_from_bytes {
            for node in &mut nodes {
                node.disks[0].meta.real = Some(RealArea::new(MetaKind::Internal, bytes, 0));
            }
        }
        Self {
            now: 0,
            rng: Rng::new(options.seed),
            nodes,
            history,
            ids: Ids::default(),
            heap: BinaryHeap::new(),
            seq: 0,
            net: Network::default(),
            asked: BTreeMap::new(),
            protocols: [options.net.protocol; 2],
            wired: BTreeMap::new(),
            check_data: true,
            oracle: Oracle::new(&sizes),
            disk_ios: 0,
            handler_runs: Vec::new(),
            handler_answers: BTreeMap::new(),
            handler_delay_ms: [1; 2],
            honest: [false; 2],
            suspending: [false; 2],
            suspended: [None; 2],
            lease_ends: [0; 2],
            alarms: Vec::new(),
            delivered: 0,
            cut_after: None,
            crash_at_meta: None,
            meta_fate: None,
            log: Vec::new(),
            failed_requests: 0,
            good_requests: 0,
            broken: None,
            drop_filter: None,
            watch: None,
            results: None,
            options,
        }
    }

    pub(super) fn schedule(&mut self, at: u64, ev: Ev) {
        self.seq += 1;
        self.heap.push(Due { at, seq: self.seq, ev });
    }

    /// Rings after `ns`.
    pub fn alarm(&mut self, ns: u64, tag: u64) {
        self.schedule(self.now + ns, Ev::Alarm(tag));
    }

    /// Records a broken promise; the first one counts.
    pub fn fail(&mut self, mut why: String) {
        if self.broken.is_none() {
            why.insert_str(0, &format!("{} at {} us: ", self.options.name(), self.now / US));
            self.broken = Some(why);
        }
    }

    #[expect(clippy::print_stdout, reason = "asked for by SIM_VERBOSE")]
    pub(super) fn trace(&self, text: impl FnOnce() -> String) {
        if self.options.verbose {
            println!("{:>4}.{:06} s {}", self.now / 1_000_000_000, self.now / US % 1_000_000, text());
        }
    }

    // ---- nodes ----------------------------------------------------------------------------------

    /// Volumes of the resource.
    #[must_use]
    pub const fn volumes(&self) -> usize {
        1 + self.options.more_volumes.len()
    }

    /// Sectors of a volume.
    #[must_use]
    pub fn size_of(&self, volume: usize) -> u64 {
        let more = volume.checked_sub(1).and_then(|at| self.options.more_volumes.get(at));
        more.copied().unwrap_or(self.options.sectors)
    }

    /// Starts a node as its daemon would: attach, connect.
    pub fn start(&mut self, node: usize) {
        self.boot(node);
        for volume in 0..self.volumes() {
            self.attach_volume(node, volume);
        }
        self.admin(node, "connect", AdminCommand::Connect { discard_my_data: false, tentative: false });
    }

    /// The network options of a node: those of the world, seen from its side.
    #[must_use]
    pub fn net_of(&self, node: usize) -> NetConfig {
        let mut net = self.options.net.clone();
        if node == 1 && self.options.mixed {
            net.after_sb_0pri = net.after_sb_0pri.mirrored();
        }
        net
    }

    /// Starts a node without configuration verbs.
    pub fn boot(&mut self, node: usize) {
        let volume = self.nodes[node].volume.as_ref().unwrap_or(&self.options.volume);
        let mut config = self.nodes[node].config(&self.net_of(node), volume, &self.options.resource);
        for nr in 1..self.volumes() {
            let nr = VolumeNr(u16::try_from(nr).unwrap_or(0));
            config.volumes.push(VolumeConfig { nr, ..config.volumes[0].clone() });
        }
        let seed = self.rng.next();
        self.protocols[node] = self.options.net.protocol;
        self.trace(|| format!("n{node} starts"));
        #[cfg_attr(
            not(feature = "planted-faults"),
            expect(unused_mut, reason = "only a planted defect changes it")
        )]
        let mut core = Resource::new(config, seed, Time(self.now));
        #[cfg(feature = "planted-faults")]
        core.plant(self.options.planted);
        self.nodes[node].core = Some(core);
    }

    /// Orders an attach of volume 0 with what is on the simulated disk.
    pub fn attach(&mut self, node: usize) -> u64 {
        self.attach_volume(node, 0)
    }

    /// Orders an attach with what is on the simulated disk; 0 when the metadata allows none.
    pub fn attach_volume(&mut self, node: usize, volume: usize) -> u64 {
        let Some(attached) = self.nodes[node].disks[volume].meta.attach() else {
            self.trace(|| format!("n{node} volume {volume}: the superblock cannot be used"));
            return 0;
        };
        self.oracle_attach(node, volume);
        let attached = Box::new(attached);
        self.nodes[node].disk_open[volume] = true;
        let volume = VolumeNr(u16::try_from(volume).unwrap_or(0));
        self.admin(node, "attach", AdminCommand::Attach { volume, attached })
    }

    /// An operator's verb; 0 when the node is down.
    pub fn admin(&mut self, node: usize, name: &'static str, command: AdminCommand) -> u64 {
        if self.nodes[node].core.is_none() {
            return 0;
        }
        let id = self.ids.admin();
        self.nodes[node].verbs.insert(id.0, name);
        self.trace(|| format!("n{node} verb {name}"));
        self.oracle_verb(node, id.0, &command);
        self.note_suspension(node, &command);
        let protocol = match &command {
            AdminCommand::Configure { net, .. } => Some(net.protocol),
            _ => None,
        };
        self.feed(node, Input::Admin { id, command });
        if let Some(protocol) = protocol.filter(|_| self.nodes[node].answers.get(&id.0) == Some(&Ok(()))) {
            self.protocols[node] = protocol;
        }
        id.0
    }

    /// The node stops at once.
    pub fn crash(&mut self, node: usize, power: bool) {
        if self.nodes[node].core.is_none() {
            return;
        }
        self.suspended[node] = None;
        self.trace(|| format!("n{node} {}", if power { "loses power" } else { "is killed" }));
        let was_primary = self.is_primary(node);
        // Not one that is just being attached, or known to be older: a Primary may have used the peer's since.
        let has = |s: States| {
            matches!(
                s.disk,
                DiskState::Inconsistent | DiskState::Consistent | DiskState::UpToDate | DiskState::Detaching
            )
        };
        let in_use: Vec<bool> =
            (0..self.volumes()).map(|volume| self.states(node, volume).is_some_and(has)).collect();
        self.net_node_gone(node, power);
        if let Some(fate) = self.meta_fate {
            for (_, (volume, write)) in std::mem::take(&mut self.nodes[node].metas) {
                self.nodes[node].disks[volume].meta.end_as(&write, fate, &mut self.rng);
            }
        }
        let (requests, lost) = self.nodes[node].stop(power, &mut self.rng);
        for request in requests.keys() {
            if let Some(Asked::Write { record }) = self.asked.remove(request) {
                self.history.orphan(record);
            }
        }
        self.history.unland(node, &lost);
        self.oracle_crash(node, power, was_primary, &in_use);
    }

    // ---- application ----------------------------------------------------------------------------

    /// A request of the application on `node`; its id.
    pub fn request(&mut self, node: usize, op: RequestOp, start: u64, len: u64, fua: bool) -> u64 {
        self.request_on(node, 0, op, start, len, fua)
    }

    /// A request for any volume; 0 when the node is down or the range is outside.
    pub fn request_on(
        &mut self,
        node: usize,
        volume: usize,
        op: RequestOp,
        start: u64,
        len: u64,
        fua: bool,
    ) -> u64 {
        let Some(range) = BlockRange::new(Sector(start), SectorCount(len)) else { return 0 };
        if self.nodes[node].core.is_none() || !range.within(SectorCount(self.size_of(volume))) {
            return 0;
        }
        let id = self.ids.request();
        let length = usize::try_from(len).unwrap_or(0);
        let buffer = match op {
            RequestOp::Read => {
                let buffer = self.nodes[node].new_buffer(vec![u32::MAX; length]);
                let own = self.reads_own_disk(node, volume);
                let asked = Asked::Read { volume, range, buffer: buffer.0, issued: self.now, own };
                self.asked.insert(id.0, asked);
                Some(buffer)
            }
            RequestOp::Write | RequestOp::WriteZeroes { .. } | RequestOp::Discard => {
                let zeroes = op != RequestOp::Write;
                let record = self.history.issue(node, volume, range, zeroes, fua, self.now);
                self.oracle.touch(volume, range);
                self.asked.insert(id.0, Asked::Write { record });
                (!zeroes).then(|| self.nodes[node].new_buffer(vec![record; length]))
            }
        };
        self.nodes[node].requests.insert(id.0, buffer.map_or(0, |buffer| buffer.0));
        self.trace(|| format!("n{node} request {} {op:?} {volume}/{range:?} fua {fua}", id.0));
        let volume = VolumeNr(u16::try_from(volume).unwrap_or(0));
        self.feed(node, Input::Request(Request { id, volume, op, range, fua, buffer }));
        id.0
    }

    /// A flush of the application.
    pub fn flush(&mut self, node: usize) -> u64 {
        self.flush_on(node, 0)
    }

    /// A flush of any volume.
    pub fn flush_on(&mut self, node: usize, volume: usize) -> u64 {
        if self.nodes[node].core.is_none() {
            return 0;
        }
        let id = self.ids.request();
        let nodes = self.flush_nodes(node, volume);
        // Beside another Primary it speaks for the writes of this node: the other's may still be in the
        // cache there, and after a crash of both that copy may be the one that counts.
        let peer_role = || self.status(node).map(|status| status.connection.peer_role);
        let beside = self.options.net.allow_two_primaries && peer_role() == Some(Role::Primary);
        let only = beside.then_some(node);
        self.asked.insert(id.0, Asked::Flush { volume, issued: self.now, nodes, only });
        self.nodes[node].requests.insert(id.0, 0);
        self.trace(|| format!("n{node} flush {} of volume {volume}", id.0));
        let volume = VolumeNr(u16::try_from(volume).unwrap_or(0));
        self.feed(node, Input::Flush { id, volume });
        id.0
    }

    /// Reads of the application there come from its own disk.
    fn reads_own_disk(&self, node: usize, volume: usize) -> bool {
        self.states(node, volume).is_some_and(|states| states.disk == DiskState::UpToDate)
    }

    fn complete(&mut self, node: usize, id: RequestId, ok: bool, data: Option<u32>) {
        let Some(buffer) = self.nodes[node].requests.remove(&id.0) else {
            return self.fail(format!("n{node}: request {} answered twice or never asked", id.0));
        };
        self.trace(|| format!("n{node} request {} done: {ok}", id.0));
        self.check_suspended(node, id.0, ok);
        *(if ok { &mut self.good_requests } else { &mut self.failed_requests }) += 1;
        if let Some(results) = &mut self.results {
            results.insert(id.0, ok);
        }
        match self.asked.remove(&id.0) {
            Some(Asked::Read { volume, range, buffer, issued, own }) if ok => {
                let from = data.unwrap_or(buffer);
                let data = self.nodes[node].buffers.get(&from).map(|buffer| buffer.data.clone());
                if let Some(data) = data {
                    let own = own && self.reads_own_disk(node, volume);
                    self.check_read(node, volume, range, &data, issued, own);
                }
            }
            Some(Asked::Write { record }) if ok => self.write_acked(node, record),
            Some(Asked::Write { record }) => self.history.orphan(record),
            Some(Asked::Flush { volume, issued, nodes, only }) if ok => {
                self.flush_acked(node, volume, issued, nodes, only);
            }
            Some(Asked::Read { .. } | Asked::Flush { .. }) | None => {}
        }
        for id in [Some(buffer), data].into_iter().flatten().filter(|id| *id != 0) {
            self.nodes[node].release(lockstep_replicator::core::event::BufferId(id));
        }
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
        let states = self.states(node, 0)?;
        Some((states.role, states.disk, states.connection, states.replication))
    }

    /// The same of any volume.
    #[must_use]
    pub fn states(&self, node: usize, volume: usize) -> Option<States> {
        let volume = VolumeNr(u16::try_from(volume).unwrap_or(0));
        self.nodes[node].core.as_ref()?.states(volume)
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
            (0..self.volumes()).all(|volume| {
                let nr = VolumeNr(u16::try_from(volume).unwrap_or(0));
                self.states(node, volume).is_some_and(|states| {
                    states.disk == DiskState::UpToDate
                        && states.connection == ConnState::Connected
                        && states.replication == ReplState::Established
                }) && self.nodes[node].core.as_ref().is_some_and(|core| core.out_of_sync_bits(nr) == Some(0))
            })
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
        let stepped = self.step_unwatched(end);
        if stepped && let Some(mut watch) = self.watch.take() {
            watch(self);
            self.watch = Some(watch);
        }
        stepped
    }

    fn step_unwatched(&mut self, end: u64) -> bool {
        let event = self.heap.peek().map(|due| (due.at, due.seq));
        let timer = (0..2).filter_map(|node| self.nodes[node].timer_at.map(|due| (due, node))).min();
        if let Some((due, node)) = timer
            && due.0 <= end
            && event.is_none_or(|event| due < event)
        {
            self.now = self.now.max(due.0);
            self.nodes[node].timer_at = None;
            self.feed(node, Input::Timeout);
            return true;
        }
        if event.is_none_or(|(at, _)| at > end) {
            self.now = end;
            return false;
        }
        if let Some(due) = self.heap.pop() {
            self.now = self.now.max(due.at);
            self.happen(due.ev);
        }
        self.check_marks_now_and_then();
        true
    }

    pub(super) fn happen(&mut self, ev: Ev) {
        match ev {
            Ev::Disk { node, life, id } if self.nodes[node].life == life => self.disk_done(node, id),
            Ev::Meta { node, life, id } if self.nodes[node].life == life => {
                self.meta_done(node, id);
            }
            Ev::Deliver { session, to, message, payload } => self.deliver(session, to, message, payload),
            Ev::Lost { session, to } => self.lost(session, to),
            Ev::Connect => self.transport_up(),
            Ev::Alarm(tag) => self.alarms.push(tag),
            Ev::Handler { node, life, token, code, asked } if self.nodes[node].life == life => {
                let exit_code = code.map(|code| self.fence_answer(node, code, asked));
                self.feed(node, Input::HandlerDone { token, exit_code });
            }
            Ev::Disk { .. } | Ev::Meta { .. } | Ev::Handler { .. } => {}
        }
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
        if let (Some(at), true) = (next, self.nodes[node].life == life) {
            let at = at.0.max(self.now);
            if self.nodes[node].timer_at.is_none_or(|(set, _)| set != at) {
                self.seq += 1;
                self.nodes[node].timer_at = Some((at, self.seq));
            }
        }
    }

    fn obey(&mut self, node: usize, output: Output) {
        match output {
            Output::Complete { id, result, data } => {
                self.complete(node, id, result.is_ok(), data.map(|id| id.0));
            }
            Output::Disk(io) => self.start_io(node, io),
            Output::Meta { id, volume, write } => {
                let volume = usize::from(volume.0);
                let life = self.nodes[node].life;
                self.trace(|| format!("n{node} meta {} {}", id.0, meta_text(&write)));
                if !self.nodes[node].disk_open[volume] {
                    self.fail(format!("n{node}: metadata write on a disk that was let go"));
                }
                self.nodes[node].metas.insert(meta_key(id), (volume, write));
                self.nodes[node].metas_total += 1;
                if let Some(delay) = self.io_delay(node, volume) {
                    self.schedule(self.now + delay, Ev::Meta { node, life, id: meta_key(id) });
                }
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
                self.net_drop(node, session);
            }
            Output::Send { session, message, payload } => self.send(node, session, message, payload),
            Output::Release(id) => self.nodes[node].release(id),
            Output::Event(event) => {
                self.trace(|| format!("n{node} event {event:?}"));
                self.oracle_event(node, &event);
                if matches!(
                    event,
                    Event::Role(..)
                        | Event::Handshake(_)
                        | Event::ResyncDone { .. }
                        | Event::VerifyDone { .. }
                        | Event::OutOfSync { .. }
                        | Event::Note(..)
                ) {
                    self.log.push((self.now, node, event));
                }
            }
            Output::AdminReply { id, result } => {
                self.trace(|| format!("n{node} reply {result:?}"));
                let Some(verb) = self.nodes[node].verbs.remove(&id.0) else {
                    return self.fail(format!("n{node}: verb {} answered twice", id.0));
                };
                self.oracle_reply(node, id.0, result.as_ref().map_err(|refused| refused.number).copied());
                if verb == "suspend-io" && result.is_ok() && self.suspending[node] {
                    self.suspended[node].get_or_insert(self.now);
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
                let mut answer = self.handler_answers.get(&(node, name)).copied().unwrap_or(Some(0));
                let life = self.nodes[node].life;
                let mut asked = 0;
                if self.honest[node] && name == HandlerName::FencePeer {
                    let (code, verb) = self.fence_honestly(node);
                    (answer, asked) = (Some(code), verb);
                }
                let ms = if answer.is_some() { self.handler_delay_ms[node] } else { HANDLER_LIMIT_MS };
                self.schedule(self.now + ms * MS, Ev::Handler { node, life, token, code: answer, asked });
            }
            Output::Measure(volume) => {
                // What a volume grows by is copied though nobody wrote it.
                self.oracle.check_minimal = false;
                let place = self.nodes[node].disks[usize::from(volume.0)].meta.measure();
                self.feed(node, Input::Measured { volume, place });
            }
            Output::DiskReleased(volume) => {
                let volume = usize::from(volume.0);
                let ios =
                    self.nodes[node].ios.values().any(|flying| usize::from(flying.io.volume.0) == volume);
                if ios || self.nodes[node].metas.values().any(|(at, _)| *at == volume) {
                    self.fail(format!("n{node}: disk let go with IO in flight"));
                }
                self.nodes[node].disk_open[volume] = false;
            }
        }
    }
}
