//! Roles and states with DRBD's names and order (SEM §2-§5).
use serde::{Deserialize, Serialize};
use std::fmt;

macro_rules! names {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $number:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[repr(u8)]
        pub enum $name { $($(#[$vdoc])* $variant = $number,)* }

        impl $name {
            /// The state with DRBD's number, if there is one.
            #[must_use]
            pub const fn from_wire(number: u32) -> Option<Self> {
                match number { $($number => Some(Self::$variant),)* _ => None }
            }
            /// DRBD's number.
            #[must_use]
            pub const fn to_wire(self) -> u32 { self as u32 }
            /// DRBD's name.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => stringify!($variant),)* }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result { f.pad(self.name()) }
        }
    };
}

names! {
    /// Role of a node in a resource (SEM §2).
    Role {
        /// Only ever the peer's, without a connection.
        Unknown = 0,
        /// May be opened.
        Primary = 1,
        /// May not be opened.
        Secondary = 2,
    }
}

names! {
    /// Connection state (SEM §3, DRBD 9's names). The order matters.
    ConnState {
        /// No network configuration active.
        StandAlone = 0,
        /// On the way to StandAlone.
        Disconnecting = 1,
        /// About to try again.
        Unconnected = 2,
        /// A request or ping timed out.
        Timeout = 3,
        /// A send failed.
        BrokenPipe = 4,
        /// A receive failed or a ping was not answered.
        NetworkFailure = 5,
        /// The peer broke the protocol.
        ProtocolError = 6,
        /// The peer said it is leaving.
        TearDown = 7,
        /// Listening and dialling, or the handshake is running.
        Connecting = 8,
        /// Handshake done.
        Connected = 9,
    }
}

names! {
    /// Replication state of one volume (SEM §4). The order matters.
    ReplState {
        /// Not connected, or the handshake is not finished.
        Off = 0,
        /// In sync, or both agreed on no resync.
        Established = 1,
        /// Full sync as source ordered by the operator.
        StartingSyncS = 2,
        /// Full sync as target ordered by the operator.
        StartingSyncT = 3,
        /// Source, exchanging bitmaps.
        WFBitMapS = 4,
        /// Target, exchanging bitmaps.
        WFBitMapT = 5,
        /// Target, waiting for the sync identifier.
        WFSyncUUID = 6,
        /// Resync running from here.
        SyncSource = 7,
        /// Resync running to here.
        SyncTarget = 8,
        /// Online verify, asking.
        VerifyS = 9,
        /// Online verify, answering.
        VerifyT = 10,
        /// Source, paused.
        PausedSyncS = 11,
        /// Target, paused.
        PausedSyncT = 12,
        /// Congested: sends notes only.
        Ahead = 13,
        /// The peer is Ahead.
        Behind = 14,
    }
}

impl ReplState {
    /// Source of a resync that runs or is paused.
    #[must_use]
    pub const fn is_sync_source(self) -> bool {
        matches!(self, Self::SyncSource | Self::PausedSyncS)
    }

    /// Target of a resync that runs or is paused.
    #[must_use]
    pub const fn is_sync_target(self) -> bool {
        matches!(self, Self::SyncTarget | Self::PausedSyncT)
    }

    /// Either side of a resync that runs or is paused: blocks are being proven equal.
    #[must_use]
    pub const fn is_syncing(self) -> bool {
        self.is_sync_source() || self.is_sync_target()
    }

    /// Either side of an online verify.
    #[must_use]
    pub const fn is_verifying(self) -> bool {
        matches!(self, Self::VerifyS | Self::VerifyT)
    }
}

names! {
    /// State of a disk (SEM §5). The order matters.
    DiskState {
        /// No backing device.
        Diskless = 0,
        /// Reading metadata.
        Attaching = 1,
        /// Graceful detach in progress.
        Detaching = 2,
        /// IO error seen; becomes Diskless.
        Failed = 3,
        /// Attached while connected; the handshake decides.
        Negotiating = 4,
        /// Data not usable.
        Inconsistent = 5,
        /// Consistent but known to be older than the peer's.
        Outdated = 6,
        /// Only the peer's, without a connection.
        DUnknown = 7,
        /// Consistent; unknown whether newest.
        Consistent = 8,
        /// Current.
        UpToDate = 9,
    }
}
