//! The replication core: all decisions, no IO, no clock, no threads, no randomness of its own.
//!
//! [`Resource`] is one resource on one node. Feed it one [`Input`], then drain its [`Output`]s, then
//! ask [`Resource::poll_timeout`] when to come back. This file routes; the files below decide:
//!
//! | file | decides |
//! |---|---|
//! | `request.rs`, `completion.rs` | application writes: their way, and when they are done |
//! | `flush.rs`, `read.rs` | epochs and application flushes; application reads |
//! | `peer_request.rs` | writes, reads, barriers received from the peer |
//! | `overlap.rs`, `conflict.rs` | overlapping writes of one node, and of two Primaries |
//! | `congestion.rs` | a peer that does not keep up |
//! | `transfer_log.rs` | epochs and what is still unacknowledged |
//! | `metadata.rs` | what is written to the metadata area, in which order |
//! | `attach.rs` | taking and leaving a backing disk, disk failure |
//! | `repair.rs` | a failed IO of a disk that is kept, and how it gets well |
//! | `abandon.rs` | a disk that does not answer |
//! | `link.rs` | the connection: up, alive, lost |
//! | `options.rs` | options changed while it runs |
//! | `resize.rs` | another size, metadata at another place |
//! | `hello.rs`, `handshake.rs`, `peer_state.rs` | two nodes meet, exchange facts, act on what follows |
//! | `uuid.rs`, `compare.rs`, `policy.rs` | what follows: identifiers, the table, policies and persons |
//! | `explain.rs` | the same in words |
//! | `resync/` | bitmap exchange, source, target |
//! | `role.rs`, `verbs.rs` | operators' verbs and refusals |
//! | `consent.rs` | changes that need the peer's part |
//! | `handlers.rs` | operators' programs that are run at certain events |
//! | `suspend.rs`, `fencing.rs` | IO that waits, and the fate of a peer that is away |
//! | `bitmap.rs`, `activity_log.rs`, `interval.rs`, `timer.rs` | leaves without knowledge of the rest |
//! | `fault.rs` | defects planted for the tests; nothing of it is in a normal build |
//!
//! Invariants I1-I8 (`docs/invariants.md`) are kept here and asserted where they are cheap to see.
#![forbid(unsafe_code)]
mod abandon;
pub mod activity_log;
mod attach;
pub mod bitmap;
mod bits;
pub mod compare;
mod completion;
pub mod config;
mod conflict;
mod congestion;
mod consent;
mod device;
pub mod event;
pub mod explain;
pub mod fault;
mod fencing;
mod flush;
mod handlers;
mod handshake;
mod hello;
pub mod interval;
mod link;
mod metadata;
mod options;
mod overlap;
mod peer_request;
mod peer_state;
pub mod policy;
mod read;
mod repair;
mod report;
mod request;
pub mod resize;
mod resync;
mod role;
pub mod state;
pub mod status;
mod suspend;
pub mod timer;
pub mod transfer_log;
pub mod uuid;
mod verbs;

use crate::units::{BlockRange, Time, VolumeNr};
use config::ResourceConfig;
use consent::Asked;
use device::Device;
use event::{AdminCommand, AdminId, Event, Input, IoId, MetaId, Output, Severity};
use fault::Fault;
use flush::Flush;
use interval::LockOwner;
use link::Session;
use lockstep_proto::Message;
use metadata::MetaContext;
use peer_request::{PeerRequest, ReceiveEpochs};
use request::Request;
use role::{Down, RoleChange};
use slab::Slab;
use state::{ConnState, Role};
use std::collections::VecDeque;
use timer::{Timer, Timers};
use transfer_log::TransferLog;

/// A data IO in flight.
#[derive(Clone, Copy, Debug)]
struct Io {
    context: IoContext,
    volume: usize,
    /// When it was handed out.
    since: Time,
}

impl Io {
    const fn is_abandoned(&self) -> bool {
        matches!(self.context, IoContext::Abandoned)
    }
}

/// A metadata write in flight.
#[derive(Clone, Copy, Debug)]
struct MetaIo {
    context: MetaContext,
    /// When it was handed out.
    since: Time,
}

impl MetaIo {
    const fn volume(&self) -> usize {
        self.context.volume()
    }
}

/// What a data IO was for.
#[derive(Clone, Copy, Debug)]
enum IoContext {
    /// Nobody waits for it any more.
    Abandoned,
    /// The local leg of an application request.
    Request(usize),
    /// The local leg of an application flush.
    Flush(usize),
    /// A write of the peer.
    Peer(usize),
    /// A read for the peer's application.
    RemoteRead { volume: usize, session: event::SessionId, request: u64, range: BlockRange },
    /// Makes writes stable before bitmap pages are written, counted up to this many.
    BitmapFlush { volume: usize, writes: u64 },
    /// The flush at the end of an epoch.
    EpochFlush { volume: usize, writes: u64 },
    /// Resync read on the source.
    ResyncRead { volume: usize, key: usize },
    /// Resync write on the target.
    ResyncWrite { volume: usize, key: usize },
    /// The target reads its own block to compare it.
    ResyncDigest { volume: usize, key: usize },
    /// Verify read on the node that asks, and on the one that answers.
    VerifyAsk { volume: usize, key: usize },
    /// See `VerifyAsk`.
    VerifyAnswer { volume: usize, key: usize },
}

/// Who is told how an operator's verb went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reply {
    /// An operator.
    Admin(AdminId),
    /// A step of a larger verb.
    Internal,
    /// The core itself wanted it.
    Nobody,
}

/// One resource on one node. Methods come in four kinds: [`Resource::status`] and other getters,
/// [`Resource::handle`] for everything that comes in, [`Resource::poll_output`] for everything that
/// goes out, [`Resource::poll_timeout`] for time.
#[derive(Debug)]
pub struct Resource {
    cfg: ResourceConfig,
    now: Time,
    random: u64,
    /// Number of this life, for the peer.
    life: u64,
    role: Role,
    /// The superblock says Primary: from the first step of a promotion to the last of a demotion.
    md_primary: bool,
    peer_role: Role,
    /// Its promotion was agreed to in this session, and it has not said that it is Primary.
    peer_promotes: bool,
    conn: ConnState,
    session: Option<Session>,
    /// `connect --discard-my-data`: for one handshake.
    discard_my_data: bool,
    tentative: bool,
    devices: Vec<Device>,
    requests: Slab<Request>,
    next_seq: u32,
    flushes: Slab<Flush>,
    tl: TransferLog,
    rx: ReceiveEpochs,
    peer_requests: Slab<PeerRequest>,
    /// Reads served for the peer: wire id and range.
    remote_reads: Vec<(u64, BlockRange)>,
    ios: Slab<Io>,
    metas: Slab<MetaIo>,
    timers: Timers,
    out: VecDeque<Output>,
    /// The last decisions of handshakes, oldest first.
    decisions: VecDeque<explain::Decision>,
    /// Volumes whose activity log has collected waiters and no transaction on the way.
    al_due: bool,
    role_change: Option<RoleChange>,
    down: Option<Down>,
    /// Questions the peer has not answered.
    asked: Vec<Asked>,
    /// Verbs that wait for the end of a handshake.
    parked: VecDeque<(AdminId, AdminCommand)>,
    next_state_request: u64,
    handlers: handlers::Handlers,
    suspension: suspend::Suspension,
    fence: fencing::Fence,
    /// Scratch list of lock owners, kept for its memory.
    granted: Vec<LockOwner>,
    /// A defect the tests must notice.
    #[cfg(feature = "planted-faults")]
    planted: Option<Fault>,
}

impl Resource {
    /// A resource that is Secondary, diskless and StandAlone. `seed` feeds the generation identifiers.
    #[must_use]
    pub fn new(config: ResourceConfig, seed: u64, now: Time) -> Self {
        let devices = config.volumes.iter().cloned().map(Device::new).collect();
        Self {
            cfg: config,
            now,
            random: seed,
            life: seed.rotate_left(23) ^ now.0 ^ 0x5bd1_e995_7b93_1a2d,
            role: Role::Secondary,
            md_primary: false,
            peer_role: Role::Unknown,
            peer_promotes: false,
            conn: ConnState::StandAlone,
            session: None,
            discard_my_data: false,
            tentative: false,
            devices,
            requests: Slab::new(),
            next_seq: 0,
            flushes: Slab::new(),
            tl: TransferLog::default(),
            rx: ReceiveEpochs::default(),
            peer_requests: Slab::new(),
            remote_reads: Vec::new(),
            ios: Slab::new(),
            metas: Slab::new(),
            timers: Timers::default(),
            out: VecDeque::new(),
            decisions: VecDeque::new(),
            al_due: false,
            role_change: None,
            down: None,
            asked: Vec::new(),
            parked: VecDeque::new(),
            next_state_request: 0,
            handlers: handlers::Handlers::default(),
            suspension: suspend::Suspension::default(),
            fence: fencing::Fence::default(),
            granted: Vec::new(),
            #[cfg(feature = "planted-faults")]
            planted: None,
        }
    }

    /// Takes one input. Never blocks, never fails, never panics on what a peer or operator sent.
    pub fn handle(&mut self, now: Time, input: Input) {
        self.now = now;
        match input {
            Input::Request(request) => self.on_request(request),
            Input::Flush { id, volume } => self.on_flush(id, volume),
            Input::DiskDone { id, result } => self.on_disk_done(id, result),
            Input::MetaDone { id, result } => self.on_meta_done(id, result),
            Input::PeerMessage { session, message, payload } => {
                self.on_peer_message(session, message, payload);
            }
            Input::PeerConnected(session) => self.on_peer_connected(session),
            Input::PeerAlive(session) => self.on_peer_alive(session),
            Input::PeerLost { session, reason } => self.on_peer_lost(session, reason),
            Input::Admin { id, command } => self.on_admin(id, command),
            Input::Opened(volume) => self.on_opened(volume, 1),
            Input::Closed(volume) => self.on_opened(volume, -1),
            Input::ResyncDependency { volume, waits } => self.on_resync_dependency(volume, waits),
            Input::HandlerDone { token, exit_code } => self.on_handler_done(token, exit_code),
            Input::Measured { volume, place } => {
                if let Some(at) = self.device_index(volume) {
                    self.on_measured(at, place);
                }
            }
            Input::Timeout => {
                while let Some(timer) = self.timers.take_due(now) {
                    self.on_timer(timer);
                }
            }
        }
        self.progress();
    }

    /// The next thing to do, in order. Drain it after each input or batch of inputs; what can be
    /// batched (activity-log changes) is put together when everything else was drained.
    pub fn poll_output(&mut self) -> Option<Output> {
        if self.out.is_empty() && self.al_due {
            self.al_due = false;
            for volume in 0..self.devices.len() {
                self.al_collect(volume);
            }
            self.progress();
        }
        self.out.pop_front()
    }

    /// When to call [`Resource::handle`] with [`Input::Timeout`].
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Time> {
        self.timers.next()
    }

    /// No request, peer request, lock, activity-log reference or IO is outstanding (I8).
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.requests.is_empty()
            && self.flushes.is_empty()
            && self.peer_requests.is_empty()
            && self.ios.is_empty()
            && self.metas.is_empty()
            && self.tl.is_empty()
            && self.suspension.is_idle()
            && self.devices.iter().all(|device| {
                device.locks.is_idle() && device.al.as_ref().is_none_or(|al| al.references() == 0)
            })
    }

    /// Blocks marked on this node, for tests and tools that compare the two sides.
    #[must_use]
    pub fn out_of_sync_bits(&self, volume: VolumeNr) -> Option<u64> {
        self.device_index(volume).map(|at| self.devices[at].bitmap.count())
    }

    /// Whether any block of a range is marked on this node, for tests that compare the two sides.
    #[must_use]
    pub fn is_out_of_sync(&self, volume: VolumeNr, range: BlockRange) -> bool {
        self.device_index(volume).is_some_and(|at| self.devices[at].bitmap.any(range.bits_touched()))
    }

    /// Which write a data IO in hand is, for tests that follow each write to both disks.
    #[must_use]
    pub fn write_of_io(&self, io: IoId) -> Option<event::WriteId> {
        let key = usize::try_from(io.0).ok()?;
        match self.ios.get(key)?.context {
            IoContext::Request(key) => self.requests.get(key).map(|r| event::WriteId::Own(r.id)),
            IoContext::Peer(key) => self.peer_requests.get(key).map(PeerRequest::id),
            _ => None,
        }
    }

    /// Which request of the application a write to the peer is, for the same tests, by the id in its header; and
    /// the protocol it was sent by.
    #[must_use]
    pub fn request_of_wire(&self, wire: u64) -> Option<(event::RequestId, config::Protocol)> {
        self.find_request(wire).map(|key| (self.requests[key].id, self.requests[key].protocol))
    }

    fn on_timer(&mut self, timer: Timer) {
        match timer {
            Timer::Handshake => self.on_handshake_timeout(),
            Timer::Ping => self.on_ping_due(),
            Timer::PingTimeout => self.on_ping_timeout(),
            Timer::Ko => self.on_ko(),
            Timer::IdleBarrier if self.planted(Fault::EpochStaysOpen) => {
                self.close_epoch();
            }
            Timer::IdleBarrier => self.send_barriers(),
            Timer::Resync => self.on_resync_tick(),
            Timer::SuspendLease => self.on_suspend_lease(),
            // `progress` looks at every volume.
            Timer::Repair | Timer::Ahead => {}
            Timer::Disk => self.on_disk_timer(),
            Timer::LetGo => self.let_go_of_hung_disks(),
        }
    }

    /// Moves every procedure that waits for a condition. Cheap when none is running.
    fn progress(&mut self) {
        self.progress_role();
        for volume in 0..self.devices.len() {
            if self.devices[volume].procedure.is_some() {
                self.progress_disk(volume);
            }
            self.progress_repair(volume);
            self.progress_congestion(volume);
            self.progress_held(volume);
        }
        self.progress_down();
        self.progress_fencing();
        self.progress_suspension();
    }

    fn on_disk_done(&mut self, id: IoId, result: Result<event::DiskOk, event::IoError>) {
        let key = usize::try_from(id.0).unwrap_or(usize::MAX);
        assert!(self.ios.contains(key), "the runtime answered disk IO {} twice or never got it", id.0);
        let Io { context, volume, .. } = self.ios.remove(key);
        if let (IoContext::Abandoned, Ok(event::DiskOk { buffer: Some(buffer), .. })) = (context, &result) {
            self.out.push_back(Output::Release(*buffer));
        }
        if matches!(context, IoContext::Abandoned) {
            self.devices[volume].ios -= 1;
            return self.hung_io_ended(volume);
        }
        self.io_done(context, result);
    }

    fn io_done(&mut self, context: IoContext, result: Result<event::DiskOk, event::IoError>) {
        match context {
            IoContext::Abandoned => {}
            IoContext::Request(key) => self.on_local_done(key, result),
            IoContext::Flush(key) => self.on_flush_local_done(key, result.is_ok()),
            IoContext::Peer(key) => self.on_peer_write_done(key, result),
            IoContext::RemoteRead { volume, session, request, range } => {
                self.on_remote_read_done(volume, session, request, range, result);
            }
            IoContext::BitmapFlush { volume, writes } => {
                self.on_bitmap_flushed(volume, writes, result.is_ok());
            }
            IoContext::EpochFlush { volume, writes } => {
                self.on_epoch_flushed(volume, writes, result.is_ok());
            }
            IoContext::ResyncRead { volume, key } => self.on_resync_read_done(volume, key, result),
            IoContext::ResyncWrite { volume, key } => self.on_resync_write_done(volume, key, result),
            IoContext::ResyncDigest { volume, key } => self.on_resync_digest(volume, key, result),
            IoContext::VerifyAsk { volume, key } => self.on_ov_check_read(volume, key, result),
            IoContext::VerifyAnswer { volume, key } => self.on_ov_answer_read(volume, key, result),
        }
    }

    /// Emits a data IO and remembers what it is for.
    fn submit_io(
        &mut self,
        volume: usize,
        op: event::DiskOp,
        range: Option<BlockRange>,
        fua: bool,
        buffer: Option<event::BufferId>,
        context: IoContext,
    ) {
        let io = Io { context, volume, since: self.now };
        let id = IoId(self.ios.insert(io) as u64);
        self.watch_disk(volume);
        let device = &mut self.devices[volume];
        device.ios += 1;
        let nr = device.nr;
        self.out.push_back(Output::Disk(event::DiskIo { id, volume: nr, op, range, fua, buffer }));
    }

    fn device_index(&self, volume: VolumeNr) -> Option<usize> {
        self.devices.iter().position(|device| device.nr == volume)
    }

    fn wire_device(&self, volume: u32) -> Option<usize> {
        u16::try_from(volume).ok().and_then(|nr| self.device_index(VolumeNr(nr)))
    }

    fn event(&mut self, event: Event) {
        self.out.push_back(Output::Event(event));
    }

    fn note(&mut self, severity: Severity, text: impl Into<String>) {
        self.event(Event::Note(severity, text.into()));
    }

    /// Sends on the current session, if there is one.
    fn send(&mut self, message: Message, payload: event::Payload) {
        if let Some(session) = &self.session {
            let session = session.id;
            self.out.push_back(Output::Send { session, message, payload });
        }
    }

    /// A number that is never 0, 1, 4 or 5 and whose bit 0 is clear (splitmix64).
    fn random_uuid(&mut self) -> u64 {
        loop {
            self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = self.random;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            let uuid = uuid::masked(z ^ (z >> 31));
            if uuid > 15 {
                return uuid;
            }
        }
    }

    fn meta(&mut self, volume: usize, write: event::MetaWrite, context: MetaContext) {
        let id = MetaId(self.metas.insert(MetaIo { context, since: self.now }) as u64);
        self.watch_disk(volume);
        let device = &mut self.devices[volume];
        device.ios += 1;
        let volume = device.nr;
        self.out.push_back(Output::Meta { id, volume, write });
    }
}
