//! The thread of a resource: one turn of the ring after the other.
//!
//! A turn takes what the kernel has finished and what the inbox holds, feeds the core, carries out what the core
//! wants, and enters the kernel once. Nothing is handed to another thread, nothing is locked, and in the steady state
//! nothing is allocated.
//!
//! ```text
//!   completions, inbox, time --Input--> core --Output--> disk jobs, frames, answers --> ring
//!            ^                                                                           |
//!            +--------------------------------- one io_uring_enter ----------------------+
//! ```
//!
//! Order inside a turn: blocks leave before disk IO that runs on this thread (disks in memory), so that the peer works at
//! the same time. Acknowledgements and answers gather until the end of the turn, or of some IO: each send that wakes a
//! sleeper costs more than a short write.
use super::buffers::BufferPool;
use super::disk::{Answer, DataJob, Disk, DiskJob};
use super::handlers::{self, HandlerPlan};
use super::inbox::{Inbox, Item};
use super::meta_job::MetaJob;
use super::nbd_conn::{Client, Demand, FrontRequest, Origin, Shared};
use super::net::Wish;
use super::peer::Peer;
use super::ring::{Completion, Memory, Ring};
use super::spin::Spinner;
use super::story;
#[cfg(feature = "ublk")]
use super::ublk_dev::UblkDisk;
use crate::core::Resource;
use crate::core::event::{
    AdminCommand, AdminId, BufferId, DiskIo, Event, HandlerName, HandlerToken, Input, IoError, LostReason,
    Output, Refusal, RequestError, SessionId,
};
use crate::core::state::DiskState;
use crate::frontend::nbd::{Extent, ExtentKind, Request as NbdRequest, allocation};
use crate::units::{SectorCount, Time, VolumeNr};
use slab::Slab;
use std::collections::{BTreeMap, VecDeque};
use std::num::NonZero;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{broadcast, oneshot, watch};

/// Disk IO done on this thread before the core and the sockets are looked at: enough to fill a frame train, not so much
/// that the peer waits. Jobs, and bytes.
const INLINE_BATCH: usize = 32;
const INLINE_BATCH_BYTES: u64 = 128 << 10;
/// Rounds of core and inline disk IO in one turn before the sockets are looked at again.
const MAX_ROUNDS: usize = 16;
/// Spinning is for few requests in flight: with many, a completion is never far. A write is two frames, with the barrier.
const SPIN_MAX_REQUESTS: usize = 2;
const SPIN_MAX_FRAMES: usize = 2 * SPIN_MAX_REQUESTS;
/// Timers that stand at once. Each is earlier than those before it, so there are hardly ever three.
const MAX_TIMERS: usize = 16;
/// How long a stopping thread waits for what is in flight.
const STOP_LIMIT_MS: u64 = 3000;

/// What an operation in the ring was for.
#[derive(Debug)]
pub(super) enum Context {
    /// The inbox has something.
    Inbox,
    /// A deadline, which may have moved.
    Timer(Time),
    PeerReceive(usize),
    PeerSend(usize),
    ClientReceive(usize),
    ClientSend(usize),
    Disk(DiskJob),
    #[cfg(feature = "ublk")]
    Ublk {
        disk: usize,
        tag: u16,
    },
}

impl From<DiskJob> for Context {
    fn from(job: DiskJob) -> Self {
        Self::Disk(job)
    }
}

/// Ends of channels to the control plane.
#[derive(Debug)]
pub(super) struct Outside {
    pub(super) events: broadcast::Sender<Event>,
    pub(super) exports: watch::Sender<BTreeMap<VolumeNr, SectorCount>>,
    pub(super) wish: watch::Sender<Wish>,
    /// For system calls that may block and are not worth a place in the ring.
    pub(super) tokio: tokio::runtime::Handle,
}

/// Everything a resource's thread owns.
#[derive(Debug)]
pub(super) struct Driver {
    name: String,
    core: Resource,
    ring: Ring<Context>,
    /// When the timers in the ring fire.
    timers: Vec<Time>,
    pool: BufferPool,
    started: Instant,
    now: Time,
    disks: BTreeMap<VolumeNr, Rc<Disk>>,
    /// As last told by the core.
    disk_states: BTreeMap<VolumeNr, DiskState>,
    /// Disk IO that runs on this thread.
    inline: VecDeque<DiskJob>,
    /// Reads that wait for a buffer.
    starved: VecDeque<DiskIo>,
    peers: Slab<Peer>,
    /// The transport the core knows of.
    session: Option<usize>,
    last_session: u64,
    clients: Slab<Client>,
    #[cfg(feature = "ublk")]
    ublks: Slab<UblkDisk>,
    fronts: Slab<FrontRequest>,
    large_read: Option<usize>,
    admins: BTreeMap<AdminId, Pending>,
    last_admin: u64,
    inbox: Arc<Inbox>,
    handlers: HandlerPlan,
    inbox_fd: Rc<OwnedFd>,
    outside: Outside,
    spinner: Spinner,
    /// `data-integrity-alg` is not `none`.
    sums_blocks: bool,
    /// Something came in over a socket in this turn.
    busy: bool,
    /// Frames of the peer in this turn.
    frames: usize,
    stop_deadline: Option<Time>,
}

/// An operator's verb under way.
#[derive(Debug)]
struct Pending {
    reply: oneshot::Sender<Result<(), Refusal>>,
    /// The volume that loses its new disk again if the verb is refused.
    attaching: Option<VolumeNr>,
}

/// What a driver is made of.
#[derive(Debug)]
pub(super) struct Parts {
    pub(super) config: crate::core::config::ResourceConfig,
    pub(super) seed: u64,
    pub(super) spin_us: u32,
    pub(super) sums_blocks: bool,
    pub(super) buffer_bytes: usize,
    pub(super) inbox: Arc<Inbox>,
    pub(super) handlers: HandlerPlan,
    pub(super) inbox_fd: OwnedFd,
    pub(super) outside: Outside,
}

impl Driver {
    /// On the thread that will run it.
    pub(super) fn new(ring: Ring<Context>, parts: Parts) -> Self {
        Self {
            name: parts.config.name.clone(),
            core: Resource::new(parts.config, parts.seed, Time(0)),
            ring,
            timers: Vec::with_capacity(MAX_TIMERS),
            pool: BufferPool::new(parts.buffer_bytes),
            started: clock(),
            now: Time(0),
            disks: BTreeMap::new(),
            disk_states: BTreeMap::new(),
            inline: VecDeque::new(),
            starved: VecDeque::new(),
            peers: Slab::new(),
            session: None,
            last_session: 0,
            clients: Slab::new(),
            #[cfg(feature = "ublk")]
            ublks: Slab::new(),
            fronts: Slab::with_capacity(1024),
            large_read: None,
            admins: BTreeMap::new(),
            last_admin: 0,
            inbox: parts.inbox,
            handlers: parts.handlers,
            inbox_fd: Rc::new(parts.inbox_fd),
            outside: parts.outside,
            spinner: Spinner::new(
                Duration::from_micros(parts.spin_us.into()),
                std::thread::available_parallelism().map_or(1, NonZero::get),
            ),
            sums_blocks: parts.sums_blocks,
            busy: false,
            frames: 0,
            stop_deadline: None,
        }
    }

    /// Runs until told to stop.
    ///
    /// # Errors
    /// The ring is broken; nothing can be done any more.
    pub(super) fn run(mut self) -> std::io::Result<()> {
        self.ring.poll_readable(&self.inbox_fd, Context::Inbox);
        loop {
            self.now = self.time();
            self.busy = false;
            self.frames = 0;
            self.ring.reap();
            while let Some(completion) = self.ring.next_completion() {
                self.on_completion(completion);
            }
            if self.core.poll_timeout().is_some_and(|due| due <= self.now) {
                self.core.handle(self.now, Input::Timeout);
            }
            let mut settled = self.settle();
            if self.pool.take_returned() && self.feed_the_starved() {
                settled &= self.settle();
            }
            self.send_all();
            self.receive_all();
            self.sweep();
            if self.is_finished() {
                return Ok(());
            }
            // `sweep` tells the core of clients that have gone.
            settled &= self.settle();
            let timeout = if settled { self.arm_timer() } else { Some(Duration::ZERO) };
            let few = self.fronts.len() <= SPIN_MAX_REQUESTS && self.frames <= SPIN_MAX_FRAMES;
            if self.busy && settled && few && self.spinner.is_used() {
                self.spin_and_wait(timeout)?;
            } else {
                self.ring.submit_and_wait(timeout)?;
            }
        }
    }

    fn time(&self) -> Time {
        let elapsed = clock().duration_since(self.started);
        // 584 years.
        Time(u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX))
    }

    /// Sees to it that the thread wakes at the next deadline. A timer that stands is not moved: a deadline that comes
    /// with every write and goes with the next one would cost two reprogrammed timers for each sleep. It fires once too
    /// often instead. Gives how long to wait when no timer can say it.
    fn arm_timer(&mut self) -> Option<Duration> {
        let closing = self.peers.iter().filter_map(|(_, peer)| peer.deadline());
        let next = closing.chain(self.core.poll_timeout()).chain(self.stop_deadline).min()?;
        let after = Duration::from_nanos(next.0.saturating_sub(self.now.0));
        if self.timers.iter().any(|at| *at <= next) {
            return None;
        }
        if after.is_zero() || self.timers.len() == MAX_TIMERS {
            return Some(after);
        }
        self.timers.push(next);
        self.ring.timer(after, Context::Timer(next));
        None
    }

    /// Looks for completions for a while before the thread goes to sleep: waking up costs more than a short write.
    fn spin_and_wait(&mut self, timeout: Option<Duration>) -> std::io::Result<()> {
        let start = clock();
        let mut hit = None;
        if let Some((limit, _turn)) = self.spinner.begin() {
            self.ring.submit()?;
            loop {
                let found = self.ring.has_completions() || self.ring.has_deferred_work();
                if found || clock().duration_since(start) >= limit {
                    hit = Some(found);
                    break;
                }
                std::hint::spin_loop();
            }
        }
        self.ring.submit_and_wait(timeout)?;
        self.spinner.waited(clock().duration_since(start), hit);
        Ok(())
    }

    // ---- what comes in -------------------------------------------------------------------------------------------

    fn on_completion(&mut self, completion: Completion<Context>) {
        let Completion { context, memory, result, more_waiting } = completion;
        match (context, memory) {
            (Context::Disk(job), _) => {
                if let Some(answer) = job.on_completion(&mut self.ring, result) {
                    self.on_answer(answer);
                }
            }
            (Context::PeerReceive(key), Memory::Recv(memory)) => {
                self.busy = true;
                if let Some(reason) = self.peers[key].on_received(memory, result, more_waiting) {
                    self.lose(key, reason);
                } else {
                    self.take_frames(key);
                    // A frame of 1 MiB may take longer than a ping is waited for.
                    if self.peers[key].is_amid_frame() {
                        let session = self.peers[key].session;
                        self.core.handle(self.now, Input::PeerAlive(session));
                    }
                }
            }
            (Context::PeerSend(key), Memory::Send(memory)) => {
                let lost = self.peers[key].on_sent(&mut self.ring, memory, result, Context::PeerSend(key));
                if let Some(reason) = lost {
                    self.lose(key, reason);
                }
            }
            (Context::ClientReceive(key), Memory::Recv(memory)) => {
                self.busy = true;
                self.clients[key].on_received(memory, result, more_waiting);
                self.take_requests(key);
            }
            (Context::ClientSend(key), Memory::Send(memory)) => {
                self.clients[key].on_sent(&mut self.ring, memory, result, Context::ClientSend(key));
            }
            #[cfg(feature = "ublk")]
            (Context::Ublk { disk, tag }, Memory::Buffer(buffer)) => {
                self.busy = true;
                let input = self.ublks[disk].on_completion(disk, tag, buffer, result, &mut self.fronts);
                if let Some(input) = input {
                    self.core.handle(self.now, input);
                }
            }
            (Context::Timer(at), _) => self.timers.retain(|timer| *timer != at),
            (Context::Inbox, _) => {
                for item in self.inbox.take() {
                    self.on_item(item);
                }
                self.ring.poll_readable(&self.inbox_fd, Context::Inbox);
            }
            (context, memory) => unreachable!("{context:?} came back with {memory:?}"),
        }
    }

    fn on_answer(&mut self, answer: Answer) {
        let input = match answer {
            Answer::Data(id, result) => Input::DiskDone { id, result },
            Answer::Meta(id, result) => Input::MetaDone { id, result },
        };
        self.core.handle(self.now, input);
    }

    fn take_frames(&mut self, key: usize) {
        let peer = &mut self.peers[key];
        let session = peer.session;
        loop {
            match peer.next_frame(&self.pool) {
                Ok(Some((message, payload))) => {
                    self.frames += 1;
                    self.core.handle(self.now, Input::PeerMessage { session, message, payload });
                }
                Ok(None) => return,
                Err(reason) => {
                    peer.kill();
                    self.lose(key, reason);
                    return;
                }
            }
        }
    }

    fn take_requests(&mut self, key: usize) {
        let mut lookups = Vec::new();
        let client = &mut self.clients[key];
        let (core, now) = (&mut self.core, self.now);
        let mut shared =
            Shared { pool: &self.pool, fronts: &mut self.fronts, large_read: &mut self.large_read };
        client.take_input(key, &mut shared, &mut |_, demand| match demand {
            Demand::Core(input) => core.handle(now, input),
            Demand::BlockStatus { command, request, block_min, one } => {
                lookups.push((command, request, block_min, one));
            }
        });
        for (command, request, block_min, one) in lookups {
            self.look_up_extents(key, command, request, block_min, one);
        }
    }

    /// Block status from the backing file, on a helper thread: the filesystem may have to read for it. Only an UpToDate
    /// local disk says something about the volume; else everything counts as allocated.
    fn look_up_extents(
        &mut self,
        client: usize,
        command: usize,
        request: NbdRequest,
        block_min: u32,
        one: bool,
    ) {
        let volume = self.clients[client].volume;
        let is_good = self.disk_states.get(&volume) == Some(&DiskState::UpToDate);
        let disk = self.disks.get(&volume).filter(|_| is_good);
        let fd = disk.and_then(|disk| disk.data_fd().try_clone_to_owned().ok());
        let Some(fd) = fd else {
            let all = [Extent { length: request.length(), kind: ExtentKind::Data }];
            self.clients[client].on_extents(command, &all);
            return;
        };
        let inbox = Arc::clone(&self.inbox);
        let resource = self.name.clone();
        let lookup = self.outside.tokio.spawn_blocking(move || {
            let extents =
                allocation::extents(fd.as_fd(), 0, request.offset(), request.length(), block_min, one);
            if inbox.push(Item::Extents { client, command, extents }).is_err() {
                tracing::warn!(resource, "the inbox is full; a block status stays without an answer");
            }
        });
        // Joined through the inbox: the client's slot stays until the answer is here.
        drop(lookup);
    }

    fn on_item(&mut self, item: Item) {
        match item {
            Item::Admin { command, reply } => self.admin(command, reply, None),
            Item::Attach { volume, backing, attached, reply } => {
                if self.disks.contains_key(&volume) {
                    let refusal = already_attached(volume);
                    answer(reply, Err(refusal));
                    return;
                }
                self.disks.insert(volume, Rc::new(Disk::new(volume, *backing)));
                self.admin(AdminCommand::Attach { volume, attached }, reply, Some(volume));
            }
            Item::Status(reply) => {
                if reply.send(self.core.status(self.now)).is_err() {
                    tracing::debug!(resource = self.name, "nobody waits for the status any more");
                }
            }
            Item::PeerConnected(socket) => self.on_peer_connected(socket),
            Item::PeerReplaced => {
                if let Some(key) = self.session {
                    self.peers[key].kill();
                    self.lose(key, LostReason::Closed("the peer has connected anew".into()));
                }
            }
            Item::NbdClient { volume, socket, negotiated } => {
                let key = self.clients.insert(Client::new(volume, socket, &negotiated));
                self.core.handle(self.now, Input::Opened(volume));
                self.take_requests(key);
            }
            #[cfg(feature = "ublk")]
            Item::AddUblk { volume, queue, reply } => answer(reply, self.add_ublk(volume, *queue)),
            Item::ResyncDependency { volume, waits } => {
                self.core.handle(self.now, Input::ResyncDependency { volume, waits });
            }
            Item::KickClients(volume) => self.kick_clients(volume),
            Item::Extents { client, command, extents } => {
                if let Some(client) = self.clients.get_mut(client) {
                    client.on_extents(command, &extents);
                }
            }
            Item::HandlerDone { token, exit_code } => {
                self.core.handle(self.now, Input::HandlerDone { token, exit_code });
            }
            Item::Stop => {
                self.stop_deadline = Some(self.now.plus_ms(STOP_LIMIT_MS));
                self.outside.wish.send_modify(|wish| wish.connect = false);
                for (_, client) in &mut self.clients {
                    client.kill();
                }
                for (_, peer) in &mut self.peers {
                    peer.close(self.now);
                }
            }
        }
    }

    fn admin(
        &mut self,
        command: AdminCommand,
        reply: oneshot::Sender<Result<(), Refusal>>,
        attaching: Option<VolumeNr>,
    ) {
        self.last_admin += 1;
        let id = AdminId(self.last_admin);
        self.admins.insert(id, Pending { reply, attaching });
        self.core.handle(self.now, Input::Admin { id, command });
    }

    #[cfg(feature = "ublk")]
    fn add_ublk(&mut self, volume: VolumeNr, queue: lockstep_ublk_frontend::Queue) -> Result<(), Refusal> {
        if self.ublks.iter().any(|(_, disk)| disk.volume == volume) {
            return Err(Refusal {
                number: 124,
                text: "Device has a ublk disk already".into(),
                facts: vec![format!("the ublk disk of volume {} is not gone yet", volume.0)],
                advice: "try again in a moment".into(),
            });
        }
        let entry = self.ublks.vacant_entry();
        let mut disk = UblkDisk::new(volume, queue, &self.pool)?;
        disk.fetch_all(&mut self.ring, |tag| Context::Ublk { disk: entry.key(), tag });
        entry.insert(disk);
        Ok(())
    }

    fn on_peer_connected(&mut self, socket: OwnedFd) {
        let is_wanted = self.outside.wish.borrow().connect && self.session.is_none();
        if !is_wanted {
            // The wish was taken back while the connection came up; dropping the socket tells the peer.
            drop(socket);
            self.outside.wish.send_modify(|wish| wish.sessions_ended += 1);
            return;
        }
        self.last_session += 1;
        let session = SessionId(self.last_session);
        self.session = Some(self.peers.insert(Peer::new(session, socket, self.sums_blocks)));
        self.outside.wish.send_modify(|wish| wish.connect = false);
        self.core.handle(self.now, Input::PeerConnected(session));
    }

    /// A transport has ended by itself. If it was the core's, the core is told.
    fn lose(&mut self, key: usize, reason: LostReason) {
        if self.session == Some(key) {
            self.session = None;
            self.outside.wish.send_modify(|wish| wish.sessions_ended += 1);
        }
        let session = self.peers[key].session;
        self.core.handle(self.now, Input::PeerLost { session, reason });
    }

    fn kick_clients(&mut self, volume: VolumeNr) {
        for (_, client) in &mut self.clients {
            if client.volume == volume {
                client.kill();
            }
        }
    }

    // ---- what goes out -------------------------------------------------------------------------------------------

    /// Carries out everything the core wants until it wants nothing more. Whether that point was reached.
    fn settle(&mut self) -> bool {
        let mut unsent_bytes = 0;
        for _ in 0..MAX_ROUNDS {
            while let Some(output) = self.core.poll_output() {
                self.on_output(output);
            }
            if self.inline.is_empty() {
                return true;
            }
            let blocks_wait = self.peers.iter().any(|(_, peer)| peer.has_blocks_to_send());
            if blocks_wait || unsent_bytes >= INLINE_BATCH_BYTES {
                self.send_all();
                unsent_bytes = 0;
            }
            for _ in 0..INLINE_BATCH {
                if unsent_bytes >= INLINE_BATCH_BYTES {
                    break;
                }
                let Some(job) = self.inline.pop_front() else { break };
                unsent_bytes += job.len_bytes();
                if let Some(answer) = job.run_inline() {
                    self.on_answer(answer);
                }
            }
        }
        false
    }

    fn on_output(&mut self, output: Output) {
        match output {
            Output::Complete { id, result, data } => self.complete(id.0, result, data),
            Output::Disk(io) => self.disk_io(io),
            Output::Meta { id, volume, write } => {
                let Some(disk) = self.disks.get(&volume) else {
                    self.core.handle(self.now, Input::MetaDone { id, result: Err(IoError::Aborted) });
                    return;
                };
                let (ring, inline) = (&mut self.ring, &mut self.inline);
                let made = MetaJob::make(id, &write, disk, &self.pool, |job| start(job, ring, inline));
                if let Err(error) = made {
                    self.core.handle(self.now, Input::MetaDone { id, result: Err(error) });
                }
            }
            Output::Send { session, message, payload } => {
                let Some(key) = self.session.filter(|&key| self.peers[key].session == session) else {
                    return;
                };
                if let Err(error) = self.peers[key].send(&message, payload, &self.pool) {
                    tracing::error!(resource = self.name, %error, "the core made a message that cannot be sent");
                    self.peers[key].kill();
                    self.lose(key, LostReason::Protocol(error.to_string()));
                }
            }
            Output::Release(buffer) => self.pool.release_from_core(buffer),
            Output::Connect => self.outside.wish.send_modify(|wish| wish.connect = true),
            Output::StopConnecting => self.outside.wish.send_modify(|wish| wish.connect = false),
            Output::Disconnect { session, reason } => {
                let Some(key) = self.session.filter(|&key| self.peers[key].session == session) else {
                    return;
                };
                tracing::debug!(resource = self.name, session = session.0, reason, "disconnect");
                self.session = None;
                self.outside.wish.send_modify(|wish| wish.sessions_ended += 1);
                self.peers[key].close(self.now);
            }
            Output::Event(event) => {
                story::tell(&self.name, &event);
                if let Event::Disk(volume, _, state) = event {
                    self.disk_states.insert(volume, state);
                }
                // Nobody may be listening.
                drop(self.outside.events.send(event));
            }
            Output::AdminReply { id, result } => {
                let Some(pending) = self.admins.remove(&id) else { return };
                if let (Some(volume), Err(_)) = (pending.attaching, &result) {
                    self.disks.remove(&volume);
                }
                answer(pending.reply, result);
            }
            Output::Export { volume, size } => {
                if size.is_none() {
                    self.kick_clients(volume);
                }
                self.outside.exports.send_modify(|exports| match size {
                    Some(size) => {
                        exports.insert(volume, size);
                    }
                    None => {
                        exports.remove(&volume);
                    }
                });
            }
            // Jobs under way keep it open until they are done.
            Output::DiskReleased(volume) => drop(self.disks.remove(&volume)),
            Output::Measure(volume) => {
                let place = self.disks.get(&volume).and_then(|disk| disk.measure());
                self.core.handle(self.now, Input::Measured { volume, place });
            }
            Output::RunHandler { token, name, volume } => self.run_handler(token, name, volume),
        }
    }

    fn run_handler(&mut self, token: HandlerToken, name: HandlerName, volume: Option<VolumeNr>) {
        let Some(command) = self.handlers.command(name, volume) else {
            self.core.handle(self.now, Input::HandlerDone { token, exit_code: Some(0) });
            return;
        };
        let (inbox, resource, limit) = (Arc::clone(&self.inbox), self.name.clone(), self.handlers.limit);
        let task = self.outside.tokio.spawn(async move {
            let exit_code = handlers::run(&resource, name, command, limit).await;
            if inbox.push(Item::HandlerDone { token, exit_code }).is_err() {
                tracing::warn!(resource, "the inbox is full; the end of a handler is not noticed");
            }
        });
        // Joined through the inbox.
        drop(task);
    }

    fn complete(&mut self, key: u64, result: Result<(), RequestError>, data: Option<BufferId>) {
        let data = data.map(|id| self.pool.take_from_core(id));
        let front = usize::try_from(key).ok().and_then(|key| self.fronts.try_remove(key));
        let Some(front) = front else { panic!("the core completed request {key}, which is not in flight") };
        let origin = front.origin;
        // With the core's count of the buffer: whoever asked may be its only owner now.
        drop(front);
        match origin {
            Origin::Nbd { client, command, piece } => {
                self.clients[client].on_piece(command, piece, result, data);
            }
            #[cfg(feature = "ublk")]
            Origin::Ublk { disk, tag } => self.ublks[disk].on_answer(tag, result, data),
        }
    }

    fn disk_io(&mut self, io: DiskIo) {
        let Some(disk) = self.disks.get(&io.volume) else {
            self.core.handle(self.now, Input::DiskDone { id: io.id, result: Err(IoError::Aborted) });
            return;
        };
        match DataJob::new(&io, disk, &self.pool) {
            Some(job) => start(DiskJob::Data(job), &mut self.ring, &mut self.inline),
            None => self.starved.push_back(io),
        }
    }

    /// Buffers came back: whoever waits for one tries again. Whether anybody did.
    fn feed_the_starved(&mut self) -> bool {
        let mut fed = false;
        for _ in 0..self.starved.len() {
            if let Some(io) = self.starved.pop_front() {
                fed = true;
                self.disk_io(io);
            }
        }
        for key in 0..self.peers.capacity() {
            if self.peers.get(key).is_some_and(Peer::is_stalled) {
                fed = true;
                self.take_frames(key);
            }
        }
        for key in 0..self.clients.capacity() {
            if self.clients.get(key).is_some_and(Client::is_stalled) {
                fed = true;
                self.take_requests(key);
            }
        }
        fed
    }

    fn send_all(&mut self) {
        let mut lost = Vec::new();
        for (key, peer) in &mut self.peers {
            if let Some(reason) = peer.arm_send(&mut self.ring, Context::PeerSend(key)) {
                lost.push((key, reason));
            }
        }
        for (key, reason) in lost {
            self.lose(key, reason);
        }
        for (key, client) in &mut self.clients {
            client.arm_send(&mut self.ring, Context::ClientSend(key));
        }
        // Last: sockets that took their bytes have given buffers back.
        #[cfg(feature = "ublk")]
        for (disk, ublk) in &mut self.ublks {
            ublk.commit_all(&mut self.ring, &self.pool, |tag| Context::Ublk { disk, tag });
        }
    }

    fn receive_all(&mut self) {
        for (key, peer) in &mut self.peers {
            peer.tick(self.now);
            peer.arm_receive(&mut self.ring, Context::PeerReceive(key));
        }
        for (key, client) in &mut self.clients {
            client.arm_receive(&mut self.ring, Context::ClientReceive(key));
        }
    }

    /// Forgets transports and clients of which nothing is left.
    fn sweep(&mut self) {
        self.peers.retain(|_, peer| !peer.is_gone());
        // Its queue goes with it, which lets the deletion of the device come to its end.
        #[cfg(feature = "ublk")]
        self.ublks.retain(|_, ublk| !ublk.is_gone());
        let (core, now, large_read) = (&mut self.core, self.now, &mut self.large_read);
        self.clients.retain(|key, client| {
            let is_gone = client.is_gone();
            if is_gone {
                if *large_read == Some(key) {
                    *large_read = None;
                }
                core.handle(now, Input::Closed(client.volume));
            }
            !is_gone
        });
    }

    fn is_finished(&self) -> bool {
        let Some(deadline) = self.stop_deadline else { return false };
        let served = self.peers.is_empty() && self.clients.is_empty();
        #[cfg(feature = "ublk")]
        let served = served && self.ublks.is_empty();
        // Only the inbox and timers are left in the ring.
        deadline <= self.now || (served && self.ring.in_flight() <= 1 + self.timers.len())
    }
}

fn start(job: DiskJob, ring: &mut Ring<Context>, inline: &mut VecDeque<DiskJob>) {
    if job.is_inline() {
        inline.push_back(job);
    } else {
        job.start(ring);
    }
}

fn answer(reply: oneshot::Sender<Result<(), Refusal>>, result: Result<(), Refusal>) {
    if reply.send(result).is_err() {
        tracing::debug!("nobody waits for the answer of a command any more");
    }
}

fn already_attached(volume: VolumeNr) -> Refusal {
    Refusal {
        number: 124,
        text: "Device is attached to a disk (use detach first)".into(),
        facts: vec![format!("volume {} has a backing disk", volume.0)],
        advice: "detach it first".into(),
    }
}

fn clock() -> Instant {
    #[expect(clippy::disallowed_methods, reason = "this is where the core's time comes from")]
    Instant::now()
}
