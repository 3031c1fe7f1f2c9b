//! What goes into the core and what comes out: the whole boundary between decisions and the world.
//!
//! Rules (style 3.3): one [`Input`], then drain [`Output`]s. Payload never enters the core; it moves
//! [`BufferId`]s. Every `Disk`, `Meta` and `Request` gets exactly one answer. Buffers are counted by
//! the runtime: it holds one count for the core from the moment an id is handed in until the core
//! lets go (`Complete` for a request's buffer, [`Output::Release`] for any other), one for each
//! `Disk` in flight and one for each `Send` not yet given to the socket.
use crate::core::config::{NetConfig, VolumeConfig};
use crate::core::explain::Decision;
use crate::core::resize::ResizeOptions;
use crate::core::state::{ConnState, DiskState, ReplState, Role};
use crate::core::status::ResourceStatus;
use crate::meta::{AlTransaction, Attached, BitmapPage, MetaPlace, Superblock};
use crate::units::{BlockRange, Sector, SectorCount, VolumeNr};
use bytes::Bytes;
use lockstep_proto::Message;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($int:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub $int);
    };
}
id!(/// A request of the front end; chosen by the runtime, unique while in flight.
    RequestId(u64));
id!(/// A data IO the core asked for; chosen by the core.
    IoId(u64));
id!(/// A metadata write the core asked for; chosen by the core.
    MetaId(u64));
id!(/// A transport to the peer; grows with each one, chosen by the runtime.
    SessionId(u64));
id!(/// An operator's command, chosen by the runtime.
    AdminId(u64));
id!(/// A payload buffer of the runtime.
    BufferId(u32));
id!(/// One run of a handler; chosen by the core, never used twice.
    HandlerToken(u64));

/// Which write a data IO carries out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteId {
    /// A request of the front end.
    Own(RequestId),
    /// A write of the peer: the transport it came by, and its id in the header of the message.
    Peer {
        /// The transport.
        session: SessionId,
        /// The id.
        request: u64,
    },
}

macro_rules! handlers {
    ($($(#[$doc:meta])* $variant:ident = $name:literal,)*) => {
        /// A program of the operator, from the `handlers` section, with DRBD's name (ADM §8.2).
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum HandlerName { $($(#[$doc])* $variant,)* }

        impl HandlerName {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$variant),*];

            /// As the configuration spells it.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }
        }
    };
}
handlers! {
    /// A Primary lost the last good copy.
    PriOnInconDegr = "pri-on-incon-degr",
    /// A split-brain policy decided against a Primary that could not be demoted.
    PriLostAfterSb = "pri-lost-after-sb",
    /// A Primary should become a resync target.
    PriLost = "pri-lost",
    /// A peer that cannot be reached shall be fenced.
    FencePeer = "fence-peer",
    /// The peer is in sync again.
    UnfencePeer = "unfence-peer",
    /// The local disk failed.
    LocalIoError = "local-io-error",
    /// Split brain, before the policies are asked.
    InitialSplitBrain = "initial-split-brain",
    /// Split brain that no policy resolved.
    SplitBrain = "split-brain",
    /// Before this node becomes a resync target.
    BeforeResyncTarget = "before-resync-target",
    /// This node was a resync target.
    AfterResyncTarget = "after-resync-target",
    /// Before this node becomes a resync source.
    BeforeResyncSource = "before-resync-source",
    /// A verify found differences.
    OutOfSync = "out-of-sync",
    /// A connection ended.
    Disconnected = "disconnected",
}

/// What the front end asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestOp {
    /// Fill the buffer.
    Read,
    /// Store the buffer.
    Write,
    /// Make the range read as zeroes; `may_unmap` allows deallocation.
    WriteZeroes {
        /// Deallocation allowed.
        may_unmap: bool,
    },
    /// Hint that the range is unused; it reads as zeroes afterwards.
    Discard,
}

/// A request of the front end.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// Echoed in [`Output::Complete`].
    pub id: RequestId,
    /// Which volume.
    pub volume: VolumeNr,
    /// What to do.
    pub op: RequestOp,
    /// Where. At most `MAX_REQUEST_SECTORS` for reads and writes, `MAX_TRIM_SECTORS` otherwise.
    pub range: BlockRange,
    /// Stable before it completes (protocol C: on both nodes).
    pub fua: bool,
    /// The data of a write, the place for a read's data.
    pub buffer: Option<BufferId>,
}

/// Why a request failed, as the front end reports it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestError {
    /// No good copy could be read or written (EIO).
    Io,
    /// The backing store is full (ENOSPC).
    NoSpace,
    /// The range is outside the volume or not aligned (EINVAL).
    Invalid,
    /// The backing store cannot do this (EOPNOTSUPP).
    Unsupported,
    /// The resource is not Primary (EPERM).
    NotPrimary,
    /// The resource is going down (ESHUTDOWN).
    Shutdown,
}

/// Data IO on the backing disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskOp {
    /// Read into `buffer`; without a buffer the runtime takes one and hands it over in [`DiskOk`].
    Read,
    /// As `Read`, and a digest of what was read, by which the data of two nodes is compared.
    ReadDigest,
    /// Write the buffer.
    Write,
    /// Zero the range.
    WriteZeroes {
        /// Deallocation allowed.
        may_unmap: bool,
    },
    /// Discard the range; it must read as zeroes afterwards.
    Discard,
    /// Make all completed writes stable (fdatasync). A failed flush is final: the core fails the disk.
    Flush,
}

/// A data IO.
#[derive(Clone, Copy, Debug)]
pub struct DiskIo {
    /// Echoed in [`Input::DiskDone`].
    pub id: IoId,
    /// Which volume.
    pub volume: VolumeNr,
    /// What to do.
    pub op: DiskOp,
    /// Where; `None` for a flush.
    pub range: Option<BlockRange>,
    /// Stable when it completes.
    pub fua: bool,
    /// Data of a write or place for a read.
    pub buffer: Option<BufferId>,
}

/// A successful data IO.
#[derive(Clone, Copy, Debug, Default)]
pub struct DiskOk {
    /// The buffer the runtime took for a read that came without one; the core owns a count of it.
    pub buffer: Option<BufferId>,
    /// The data read is all zeroes (only looked at for reads that came without a buffer).
    pub all_zero: bool,
    /// What [`DiskOp::ReadDigest`] found.
    pub digest: Option<Digest>,
}

/// A digest of block data: equal digests stand for equal data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Digest(pub [u64; 4]);

/// A failed IO on the backing disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoError {
    /// The device answered with this errno.
    Errno(i32),
    /// The IO was given up because of detach or shutdown.
    Aborted,
}

/// A write to the metadata area. Durable when answered: the runtime flushes.
#[derive(Clone, Debug)]
pub enum MetaWrite {
    /// The superblock.
    Superblock(Box<Superblock>),
    /// One activity-log block.
    AlTransaction(Box<AlTransaction>),
    /// Re-initialise every block of the activity log.
    AlInit,
    /// Bitmap pages of 4 KiB.
    Bitmap(Vec<BitmapPage>),
    /// From now on everything goes to the place that was measured last. Writes nothing.
    Relocate,
    /// Make the superblock at the place before [`MetaWrite::Relocate`] unreadable, unless it is overwritten.
    ForgetOldPlace,
}

/// What a frame carries behind its header.
#[derive(Clone, Debug, PartialEq)]
pub enum Payload {
    /// Nothing.
    None,
    /// Block data in a buffer of the pool.
    Buffer {
        /// Which buffer.
        id: BufferId,
        /// How much of it, from its start.
        len: SectorCount,
    },
    /// Bitmap words.
    Bytes(Bytes),
}

/// Why a transport went away.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LostReason {
    /// Connection reset, closed or refused: `NetworkFailure`/`BrokenPipe`.
    Closed(String),
    /// The peer broke the protocol (bad frame): `ProtocolError`.
    Protocol(String),
}

/// Something the world reports or asks.
#[derive(Debug)]
pub enum Input {
    /// The front end wants IO.
    Request(Request),
    /// The front end wants everything completed so far to be stable (protocol C: on both nodes).
    Flush {
        /// Echoed in [`Output::Complete`].
        id: RequestId,
        /// Which volume.
        volume: VolumeNr,
    },
    /// A user opened the volume through a front end.
    Opened(VolumeNr),
    /// A user closed it.
    Closed(VolumeNr),
    /// One [`Output::Disk`] finished.
    DiskDone {
        /// Which.
        id: IoId,
        /// How.
        result: Result<DiskOk, IoError>,
    },
    /// One [`Output::Meta`] is durable or failed.
    MetaDone {
        /// Which.
        id: MetaId,
        /// How.
        result: Result<(), IoError>,
    },
    /// A transport to the peer is up; its preamble named the right resource and node.
    PeerConnected(SessionId),
    /// A frame came in.
    PeerMessage {
        /// On which transport.
        session: SessionId,
        /// The decoded message.
        message: Message,
        /// What followed it; the core owns a count of a buffer.
        payload: Payload,
    },
    /// A part of a frame has come in; it is not complete yet.
    PeerAlive(SessionId),
    /// The transport is gone.
    PeerLost {
        /// Which.
        session: SessionId,
        /// Why.
        reason: LostReason,
    },
    /// An operator's verb.
    Admin {
        /// Echoed in [`Output::AdminReply`].
        id: AdminId,
        /// What to do.
        command: AdminCommand,
    },
    /// A handler ended. Late answers are ignored by their token.
    HandlerDone {
        /// Which run.
        token: HandlerToken,
        /// Its exit code; `None` when it could not be started, was killed, or took too long. A handler
        /// that is not configured answers 0, as DRBD's helper does.
        exit_code: Option<i32>,
    },
    /// What the devices of a volume hold now; answers [`Output::Measure`].
    Measured {
        /// Which volume.
        volume: VolumeNr,
        /// Where metadata belongs on devices of this size; `None` = cannot be told.
        place: Option<MetaPlace>,
    },
    /// `resync-after`: whether a volume that comes first is resyncing or paused.
    ResyncDependency {
        /// The volume that waits.
        volume: VolumeNr,
        /// It shall wait.
        waits: bool,
    },
    /// The deadline of `poll_timeout` has passed.
    Timeout,
}

/// An operator's verb as the core sees it.
#[derive(Debug)]
pub enum AdminCommand {
    /// Use this backing disk, whose metadata was read.
    Attach {
        /// Which volume.
        volume: VolumeNr,
        /// Its metadata, as read.
        attached: Box<Attached>,
    },
    /// Let go of the backing disk; writes metadata clean.
    Detach {
        /// Which volume.
        volume: VolumeNr,
        /// Give up IO in flight and the graceful checks.
        force: bool,
    },
    /// Start to connect.
    Connect {
        /// One-shot: my changes lose.
        discard_my_data: bool,
        /// Only say what would happen.
        tentative: bool,
    },
    /// End the connection and do not retry.
    Disconnect {
        /// Skip the graceful checks.
        force: bool,
    },
    /// Become Primary.
    Primary {
        /// Declare local data UpToDate if need be.
        force: bool,
    },
    /// Become Secondary.
    Secondary,
    /// Local data is bad: full resync from the peer.
    Invalidate(VolumeNr),
    /// The peer's data is bad: full resync to the peer.
    InvalidateRemote(VolumeNr),
    /// Local data is bad where it is marked: resync of the marked blocks from the peer.
    InvalidateMarked(VolumeNr),
    /// The peer's data is bad where it is marked: resync of the marked blocks to the peer.
    InvalidateRemoteMarked(VolumeNr),
    /// Compare both copies (SEM §20).
    Verify {
        /// Which volume.
        volume: VolumeNr,
        /// From here; `None` = where an interrupted verify stopped, else from the start.
        start: Option<Sector>,
        /// To here; `None` = the end.
        stop: Option<Sector>,
    },
    /// Let a resync of the volume stand still.
    PauseSync(VolumeNr),
    /// End `PauseSync`.
    ResumeSync(VolumeNr),
    /// Mark the local data outdated.
    Outdate(VolumeNr),
    /// Start a new generation (SEM §27).
    NewCurrentUuid {
        /// Which volume.
        volume: VolumeNr,
        /// Clear all bits: skip the initial sync, or truck-based seeding.
        clear_bitmap: bool,
    },
    /// Act by these options from now on.
    Configure {
        /// Network options.
        net: Box<NetConfig>,
        /// Options of every volume.
        volumes: Vec<VolumeConfig>,
    },
    /// Take the size that the backing disks have now, or another one.
    Resize {
        /// Which volume.
        volume: VolumeNr,
        /// How.
        options: ResizeOptions,
    },
    /// Let no request of the application through; replies when those in hand are through. A lease.
    SuspendIo,
    /// Let requests through again, whatever held them back.
    ResumeIo,
    /// Disconnect, demote, detach everything; replies when all metadata is clean.
    Down,
}

/// A refusal with DRBD's number and everything a person needs to go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, serde::Serialize, serde::Deserialize)]
#[error("({number}) {text}")]
pub struct Refusal {
    /// DRBD's number: negative = state change, 102..=176 = configuration (ADM §4.2).
    pub number: i32,
    /// DRBD's text for it, then the facts on both nodes.
    pub text: String,
    /// The facts that forbid it, one per line.
    pub facts: Vec<String>,
    /// The safe next command.
    pub advice: String,
}

/// What the core wants the world to do.
#[derive(Debug)]
pub enum Output {
    /// Answer the front end, exactly once. The request's buffer is let go.
    Complete {
        /// Which request.
        id: RequestId,
        /// How it went.
        result: Result<(), RequestError>,
        /// The data of a read that the peer served, when it is not in the request's own buffer; the
        /// core's count of it passes to the front end.
        data: Option<BufferId>,
    },
    /// Do data IO.
    Disk(DiskIo),
    /// Write metadata.
    Meta {
        /// Echoed in [`Input::MetaDone`].
        id: MetaId,
        /// Which volume.
        volume: VolumeNr,
        /// What.
        write: MetaWrite,
    },
    /// Try to reach the peer, and accept it, until connected or told otherwise.
    Connect,
    /// Stop trying to reach the peer.
    StopConnecting,
    /// Drop this transport (after what was sent before has left, as far as it goes).
    Disconnect {
        /// Which.
        session: SessionId,
        /// Why, for the log.
        reason: String,
    },
    /// Send a frame, ordered per session.
    Send {
        /// Which transport.
        session: SessionId,
        /// The message.
        message: Message,
        /// What follows it.
        payload: Payload,
    },
    /// The core no longer needs this buffer.
    Release(BufferId),
    /// Something an operator may want to know.
    Event(Event),
    /// Answer to an operator's verb, exactly once.
    AdminReply {
        /// Which.
        id: AdminId,
        /// Done, or refused.
        result: Result<(), Refusal>,
    },
    /// The volume may be exported with this size from now on (Primary), or no longer (`None`).
    Export {
        /// Which volume.
        volume: VolumeNr,
        /// Its size while Primary.
        size: Option<SectorCount>,
    },
    /// The backing disk of the volume is no longer used; close it.
    DiskReleased(VolumeNr),
    /// Look at the size of the devices of this volume; answer with [`Input::Measured`].
    Measure(VolumeNr),
    /// Run this program of the operator, if there is one, and answer with [`Input::HandlerDone`].
    RunHandler {
        /// Echoed in the answer.
        token: HandlerToken,
        /// Which program.
        name: HandlerName,
        /// The volume it is about; `None`: the connection.
        volume: Option<VolumeNr>,
    },
}

/// What an operator sees: state changes and decisions, in the order they happened.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// Own role.
    Role(Role, Role),
    /// Peer's role.
    PeerRole(Role, Role),
    /// Connection state.
    Conn(ConnState, ConnState),
    /// Replication state of a volume.
    Repl(VolumeNr, ReplState, ReplState),
    /// Own disk state of a volume.
    Disk(VolumeNr, DiskState, DiskState),
    /// Peer's disk state of a volume.
    PeerDisk(VolumeNr, DiskState, DiskState),
    /// A handshake decided something: the facts, the rule, what follows.
    Handshake(Box<Decision>),
    /// Resync ended: blocks copied, of how many, and how long it took.
    ResyncDone {
        /// Which volume.
        volume: VolumeNr,
        /// Bits that were set at the start.
        bits_total: u64,
        /// Bits left because their block could not be copied.
        bits_failed: u64,
        /// Milliseconds from start to end.
        elapsed_ms: u64,
    },
    /// A verify found a range that differs.
    OutOfSync {
        /// Which volume.
        volume: VolumeNr,
        /// Where.
        range: BlockRange,
    },
    /// A verify ended.
    VerifyDone {
        /// Which volume.
        volume: VolumeNr,
        /// Blocks of 4 KiB it covered.
        bits_total: u64,
        /// Blocks that differ.
        bits_found: u64,
        /// Blocks that were written too often to be compared.
        bits_skipped: u64,
        /// Milliseconds from start to end.
        elapsed_ms: u64,
    },
    /// Anything else worth a line: severity and text.
    Note(Severity, String),
}

/// How bad a [`Event::Note`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// Data at risk or a device lost.
    Error,
    /// Degraded or retried.
    Warning,
    /// Worth knowing.
    Info,
}

/// Keeps the status type next to the boundary: the one getter the control plane uses.
pub type Status = ResourceStatus;
