//! What the core needs to know of a resource's configuration: resolved values, no text. Defaults are DRBD's (ADM §2).
use crate::units::{SectorCount, VolumeNr};
use serde::{Deserialize, Serialize};

/// When the remote part of a write counts as done (SEM §7).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Protocol {
    /// Handed to the local send queue.
    A,
    /// In the peer's memory.
    B,
    /// On the peer's disk.
    C,
}

impl Protocol {
    /// Its number on the wire.
    #[must_use]
    pub const fn number(self) -> u32 {
        match self {
            Self::A => 1,
            Self::B => 2,
            Self::C => 3,
        }
    }

    /// From the number on the wire.
    #[must_use]
    pub fn from_number(number: u32) -> Option<Self> {
        [Self::A, Self::B, Self::C].into_iter().find(|protocol| protocol.number() == number)
    }
}

/// What a local IO error leads to (SEM §21).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum OnIoError {
    /// Keep the disk, mark it Inconsistent.
    PassOn,
    /// Detach and run the handler first.
    CallLocalIoError,
    /// Detach.
    Detach,
}

/// What a Primary does about a peer it has lost (SEM §16).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Fencing {
    /// Nothing.
    #[default]
    DontCare,
    /// The handler runs, IO goes on.
    ResourceOnly,
    /// The handler runs, IO is frozen until it succeeded or the peer is back.
    ResourceAndStonith,
}

/// What a Primary without any good copy does with IO (SEM §22).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum OnNoData {
    /// It fails.
    #[default]
    IoError,
    /// It waits.
    SuspendIo,
}

/// What a Primary under protocol A does when too much is on its way to the peer (SEM §24).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum OnCongestion {
    /// The application waits.
    #[default]
    Block,
    /// Stop mirroring and only keep books.
    PullAhead,
    /// End the connection.
    Disconnect,
}

/// The `options` section: what concerns the whole resource.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResourceOptions {
    /// Default io-error.
    pub on_no_data: OnNoData,
    /// `suspend-io` ends by itself after this long unless it is renewed, ms; 0 = never. Default 120 s.
    pub suspend_lease_ms: u64,
}

impl Default for ResourceOptions {
    fn default() -> Self {
        Self { on_no_data: OnNoData::IoError, suspend_lease_ms: 120_000 }
    }
}

/// How writes of different epochs are kept apart on the receiving disk (SEM §8).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum WriteOrdering {
    /// Neither.
    None,
    /// Wait for completion.
    Drain,
    /// Wait for completion, then flush.
    Flush,
}

macro_rules! policies {
    ($($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $number:literal $text:literal,)* })*) => {
        $(
            $(#[$doc])*
            #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
            #[repr(u8)]
            pub enum $name { $($(#[$vdoc])* $variant = $number,)* }

            impl $name {
                /// All values.
                pub const ALL: &[Self] = &[$(Self::$variant),*];

                /// As the configuration spells it.
                #[must_use]
                pub const fn name(self) -> &'static str {
                    match self { $(Self::$variant => $text,)* }
                }

                /// DRBD's number, part of its protocol.
                #[must_use]
                pub const fn number(self) -> u32 {
                    self as u32
                }

                /// From the word in the configuration.
                #[must_use]
                pub fn from_name(name: &str) -> Option<Self> {
                    Self::ALL.iter().copied().find(|value| value.name() == name)
                }

                /// From DRBD's number.
                #[must_use]
                pub fn from_number(number: u32) -> Option<Self> {
                    Self::ALL.iter().copied().find(|value| value.number() == number)
                }
            }
        )*
    };
}
policies! {
    /// Whose changes go after a split brain when nobody is Primary now (SEM §15).
    AfterSb0Pri {
        /// Nobody's: a person decides.
        #[default]
        Disconnect = 0 "disconnect",
        /// Of the node that became Primary last.
        DiscardYoungerPrimary = 1 "discard-younger-primary",
        /// Of the node that was Primary first.
        DiscardOlderPrimary = 2 "discard-older-primary",
        /// Of a node that has none.
        DiscardZeroChanges = 3 "discard-zero-changes",
        /// Of the node that has fewer.
        DiscardLeastChanges = 4 "discard-least-changes",
        /// This node's; the peer must say `discard-remote`.
        DiscardLocal = 5 "discard-local",
        /// The peer's; the peer must say `discard-local`.
        DiscardRemote = 6 "discard-remote",
    }
    /// The same when one node is Primary.
    AfterSb1Pri {
        /// Nobody's: a person decides.
        #[default]
        Disconnect = 0 "disconnect",
        /// As `after-sb-0pri` says, if that spares the Primary.
        Consensus = 7 "consensus",
        /// The Secondary's.
        DiscardSecondary = 8 "discard-secondary",
        /// As `after-sb-0pri` says; a Primary that loses is demoted, or its handler is run.
        CallPriLostAfterSb = 9 "call-pri-lost-after-sb",
        /// As `after-sb-0pri` says, even under a running application.
        ViolentlyAs0p = 10 "violently-as0p",
    }
    /// The same when both nodes are Primary.
    AfterSb2Pri {
        /// Nobody's: a person decides.
        #[default]
        Disconnect = 0 "disconnect",
        /// As `after-sb-0pri` says; the Primary that loses is demoted, or its handler is run.
        CallPriLostAfterSb = 9 "call-pri-lost-after-sb",
        /// As `after-sb-0pri` says, even under a running application.
        ViolentlyAs0p = 10 "violently-as0p",
    }
    /// What happens when a Primary with good data should become a resync target (SEM §15).
    RrConflict {
        /// No connection: a person decides.
        #[default]
        Disconnect = 0 "disconnect",
        /// Run the handler `pri-lost`, then as `disconnect`.
        CallPriLost = 9 "call-pri-lost",
        /// Resync under the running application.
        Violently = 10 "violently",
        /// As `disconnect`, but try again.
        RetryConnect = 11 "retry-connect",
        /// After a crashed Primary under protocol A or B: the Primary of today stays the source.
        AutoDiscard = 12 "auto-discard",
    }
}

impl AfterSb0Pri {
    /// What the peer must be configured to: `discard-local` and `discard-remote` are one setting seen
    /// from two sides.
    #[must_use]
    pub const fn mirrored(self) -> Self {
        match self {
            Self::DiscardLocal => Self::DiscardRemote,
            Self::DiscardRemote => Self::DiscardLocal,
            other => other,
        }
    }
}

/// One resource.
#[derive(Clone, Debug, PartialEq)]
pub struct ResourceConfig {
    /// Resource name.
    pub name: String,
    /// Own node id; the lower id wins ties.
    pub node_id: u32,
    /// Own node name.
    pub node_name: String,
    /// Peer's node id.
    pub peer_node_id: u32,
    /// Peer's node name.
    pub peer_name: String,
    /// Network options.
    pub net: NetConfig,
    /// Volumes, by number.
    pub volumes: Vec<VolumeConfig>,
    /// Options of the whole resource.
    pub options: ResourceOptions,
}

/// The `net` options the core acts on.
#[derive(Clone, Debug, PartialEq)]
pub struct NetConfig {
    /// Default C.
    pub protocol: Protocol,
    /// Idle time before a ping, ms. Default 10000.
    pub ping_int_ms: u64,
    /// A ping must be answered within this, ms. Default 500.
    pub ping_timeout_ms: u64,
    /// Base of `ko_count`, ms. Default 6000.
    pub timeout_ms: u64,
    /// A write unanswered for `ko_count * timeout_ms` ends the connection; 0 = never. Default 7.
    pub ko_count: u64,
    /// Between attempts to connect, ms. Default 10000.
    pub connect_int_ms: u64,
    /// Writes in an epoch at most. Default 2048.
    pub max_epoch_size: u32,
    /// Both nodes may be Primary. Default false.
    pub allow_two_primaries: bool,
    /// Compared at the handshake, like the next two. Default disconnect.
    pub after_sb_0pri: AfterSb0Pri,
    /// Default disconnect.
    pub after_sb_1pri: AfterSb1Pri,
    /// Default disconnect.
    pub after_sb_2pri: AfterSb2Pri,
    /// The policies count even when the common ancestor is known from the history only; both nodes must
    /// say so. Default false.
    pub always_asbp: bool,
    /// Default disconnect.
    pub rr_conflict: RrConflict,
    /// Default dont-care.
    pub fencing: Fencing,
    /// Default block. Anything else needs protocol A.
    pub on_congestion: OnCongestion,
    /// Sectors of one volume sent and not barrier-acked that count as congestion; 0 = never. Default 0.
    pub congestion_fill_sectors: u64,
    /// Extents with writes in flight that count as congestion. Default 1237.
    pub congestion_extents: u64,
    /// `max-buffers`, pages of 4 KiB. Default 2048.
    pub max_buffers: u64,
    /// `csums-alg`: resync by comparing digests. Default off. The digest itself is always the same.
    pub csums_alg: Option<String>,
    /// Only after a crash of this node as Primary. Default false.
    pub csums_after_crash_only: bool,
    /// `verify-alg`: online verify is allowed. Default off.
    pub verify_alg: Option<String>,
}

impl Default for NetConfig {
    fn default() -> Self {
        Self {
            protocol: Protocol::C,
            ping_int_ms: 10_000,
            ping_timeout_ms: 500,
            timeout_ms: 6_000,
            ko_count: 7,
            connect_int_ms: 10_000,
            max_epoch_size: 2048,
            allow_two_primaries: false,
            after_sb_0pri: AfterSb0Pri::Disconnect,
            after_sb_1pri: AfterSb1Pri::Disconnect,
            after_sb_2pri: AfterSb2Pri::Disconnect,
            always_asbp: false,
            rr_conflict: RrConflict::Disconnect,
            fencing: Fencing::DontCare,
            on_congestion: OnCongestion::Block,
            congestion_fill_sectors: 0,
            congestion_extents: 1237,
            max_buffers: 2048,
            csums_alg: None,
            csums_after_crash_only: false,
            verify_alg: None,
        }
    }
}

/// What decides how fast a resync goes (SEM §19.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RateControl {
    /// No knob set: the application's latency and the bandwidth-delay product.
    Adaptive,
    /// DRBD's plan-ahead controller.
    Planned,
    /// `c-plan-ahead 0`: `resync-rate` and nothing else.
    Fixed,
}

/// The `disk` options of a resync.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResyncConfig {
    /// Which of the controllers.
    pub control: RateControl,
    /// `resync-rate`, KiB/s. Default 250.
    pub rate_kib_s: u64,
    /// `c-plan-ahead`, 0.1 s. Default 20.
    pub plan_ahead_ds: u64,
    /// `c-delay-target`, 0.1 s. Default 10.
    pub delay_target_ds: u64,
    /// `c-fill-target`, sectors; 0 = use the delay target. Default 100.
    pub fill_target_sectors: u64,
    /// `c-max-rate`, KiB/s; `None` = no limit.
    pub max_rate_kib_s: Option<u64>,
    /// `c-min-rate`, KiB/s: never pushed below by the application; 0 = never pushed. Default 250.
    pub min_rate_kib_s: u64,
    /// `rs-discard-granularity`, bytes; 0 = zeroes are written, not discarded. Default 0.
    pub discard_granularity_bytes: u64,
}

impl Default for ResyncConfig {
    fn default() -> Self {
        Self {
            control: RateControl::Adaptive,
            rate_kib_s: 250,
            plan_ahead_ds: 20,
            delay_target_ds: 10,
            fill_target_sectors: 100,
            max_rate_kib_s: None,
            min_rate_kib_s: 250,
            discard_granularity_bytes: 0,
        }
    }
}

/// One volume.
#[derive(Clone, Debug, PartialEq)]
pub struct VolumeConfig {
    /// Volume number.
    pub nr: VolumeNr,
    /// `size` option; `None` = all.
    pub user_size: Option<SectorCount>,
    /// Hot extents, 67..=65534. Default 1237; capped at attach by what the log on disk holds.
    pub al_extents: u32,
    /// `al-updates`. Default true.
    pub al_updates: bool,
    /// Default detach.
    pub on_io_error: OnIoError,
    /// From `disk-flushes` and `disk-drain`. Default flush.
    pub write_ordering: WriteOrdering,
    /// A local IO older than this costs the disk, ms; 0 = never. Default 0.
    pub disk_timeout_ms: u64,
    /// How a resync or verify is paced.
    pub resync: ResyncConfig,
}

impl VolumeConfig {
    /// A volume with every option at its default.
    #[must_use]
    pub fn new(nr: VolumeNr) -> Self {
        Self {
            nr,
            user_size: None,
            al_extents: 1237,
            al_updates: true,
            on_io_error: OnIoError::Detach,
            write_ordering: WriteOrdering::Flush,
            disk_timeout_ms: 0,
            resync: ResyncConfig::default(),
        }
    }
}
