//! The model to what the core works with: one node's view of one resource.
use super::model::{Connection, Host, Resource};
use super::options::{Kind, OptionSet, OptionSpec};
use super::resolve::is_number;
use super::table as t;
use crate::core::config::{
    AfterSb0Pri, AfterSb1Pri, AfterSb2Pri, Fencing, NetConfig, OnCongestion, OnIoError, OnNoData, Protocol,
    RateControl, ResourceConfig, ResourceOptions, ResyncConfig, RrConflict, VolumeConfig, WriteOrdering,
};
use crate::units::{SectorCount, VolumeNr};

/// Why a resource cannot run on a node.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// No section for this node.
    #[error("'{resource}' not defined in your config (for this host).")]
    NotOnThisHost {
        /// Resource.
        resource: String,
    },
    /// This version replicates between two nodes.
    #[error("resource '{resource}' has {peers} peers on this host, one is supported")]
    PeerCount {
        /// Resource.
        resource: String,
        /// How many.
        peers: usize,
    },
    /// A stacked resource.
    #[error("resource '{resource}' is stacked on another one, which is not supported")]
    Stacked {
        /// Resource.
        resource: String,
    },
}

impl Resource {
    /// The section that is for the node `node_name`; `_this_host` is for every node.
    #[must_use]
    pub fn host(&self, node_name: &str) -> Option<&Host> {
        let by = |wanted: &str| self.hosts.iter().find(|h| h.names.iter().any(|n| n == wanted));
        by(node_name).or_else(|| by("_this_host"))
    }

    /// The connections of a node, with the host at the other end.
    pub fn peers_of(&self, node_name: &str) -> impl Iterator<Item = (&Connection, &Host)> {
        let own = self.host(node_name).map(|h| h.name().to_owned());
        self.connections.iter().filter_map(move |c| {
            let own = own.as_deref()?;
            let other = match &c.hosts {
                [a, b] if a == own => b,
                [a, b] if b == own => a,
                _ => return None,
            };
            Some((c, self.host(other)?))
        })
    }

    /// The only peer of a node, `None` when it has none or several.
    #[must_use]
    pub fn peer_of(&self, node_name: &str) -> Option<&Host> {
        let mut peers = self.peers_of(node_name);
        match (peers.next(), peers.next()) {
            (Some((_, host)), None) => Some(host),
            _ => None,
        }
    }

    /// What the core of `node_name` needs.
    ///
    /// # Errors
    /// The node is not part of the resource, or the resource is of a kind that is not supported.
    pub fn to_core(&self, node_name: &str) -> Result<ResourceConfig, ConfigError> {
        let resource = || self.name.clone();
        let own = self.host(node_name).ok_or_else(|| ConfigError::NotOnThisHost { resource: resource() })?;
        if self.hosts.iter().any(|h| h.stacked_on.is_some()) {
            return Err(ConfigError::Stacked { resource: resource() });
        }
        let peers: Vec<_> = self.peers_of(node_name).collect();
        let [(connection, peer)] = peers.as_slice() else {
            return Err(ConfigError::PeerCount { resource: resource(), peers: peers.len() });
        };
        let volumes = own.volumes.iter().map(|v| volume(v.nr, &connection.disk_options(v))).collect();
        Ok(ResourceConfig {
            name: resource(),
            node_id: own.node_id,
            node_name: own.name().to_owned(),
            peer_node_id: peer.node_id,
            peer_name: peer.name().to_owned(),
            net: net(&connection.net),
            volumes,
            options: self.core_options(own),
        })
    }
}

impl Resource {
    fn core_options(&self, own: &Host) -> ResourceOptions {
        let lockstep = own.lockstep.get(&t::SUSPEND_LEASE).map_or(&self.lockstep, |_| &own.lockstep);
        ResourceOptions {
            on_no_data: match self.options.text(&t::ON_NO_DATA_ACCESSIBLE) {
                "suspend-io" => OnNoData::SuspendIo,
                _ => OnNoData::IoError,
            },
            suspend_lease_ms: lockstep.number(&t::SUSPEND_LEASE) * 1000,
        }
    }
}

fn net(o: &OptionSet) -> NetConfig {
    NetConfig {
        protocol: match o.text(&t::PROTOCOL) {
            "A" => Protocol::A,
            "B" => Protocol::B,
            _ => Protocol::C,
        },
        ping_int_ms: o.number(&t::PING_INT) * 1000,
        ping_timeout_ms: o.number(&t::PING_TIMEOUT) * 100,
        timeout_ms: o.number(&t::TIMEOUT) * 100,
        ko_count: o.number(&t::KO_COUNT),
        connect_int_ms: o.number(&t::CONNECT_INT) * 1000,
        max_epoch_size: u32::try_from(o.number(&t::MAX_EPOCH_SIZE)).unwrap_or(u32::MAX),
        allow_two_primaries: o.flag(&t::ALLOW_TWO_PRIMARIES),
        after_sb_0pri: AfterSb0Pri::from_name(o.text(&t::AFTER_SB_0PRI)).unwrap_or_default(),
        after_sb_1pri: AfterSb1Pri::from_name(o.text(&t::AFTER_SB_1PRI)).unwrap_or_default(),
        after_sb_2pri: AfterSb2Pri::from_name(o.text(&t::AFTER_SB_2PRI)).unwrap_or_default(),
        always_asbp: o.flag(&t::ALWAYS_ASBP),
        rr_conflict: RrConflict::from_name(o.text(&t::RR_CONFLICT)).unwrap_or_default(),
        fencing: match o.text(&t::FENCING) {
            "resource-only" => Fencing::ResourceOnly,
            "resource-and-stonith" => Fencing::ResourceAndStonith,
            _ => Fencing::DontCare,
        },
        on_congestion: match o.text(&t::ON_CONGESTION) {
            "pull-ahead" => OnCongestion::PullAhead,
            "disconnect" => OnCongestion::Disconnect,
            _ => OnCongestion::Block,
        },
        congestion_fill_sectors: o.number(&t::CONGESTION_FILL),
        congestion_extents: o.number(&t::CONGESTION_EXTENTS),
        max_buffers: o.number(&t::MAX_BUFFERS),
        csums_alg: name(o, &t::CSUMS_ALG),
        csums_after_crash_only: o.flag(&t::CSUMS_AFTER_CRASH_ONLY),
        verify_alg: name(o, &t::VERIFY_ALG),
    }
}

/// A text option that may be empty.
fn name(o: &OptionSet, spec: &OptionSpec) -> Option<String> {
    Some(o.text(spec)).filter(|text| !text.is_empty()).map(str::to_owned)
}

fn volume(nr: u16, o: &OptionSet) -> VolumeConfig {
    let size = o.number(&t::SIZE);
    VolumeConfig {
        nr: VolumeNr(nr),
        user_size: (size > 0).then_some(SectorCount(size)),
        al_extents: u32::try_from(o.number(&t::AL_EXTENTS)).unwrap_or(u32::MAX),
        al_updates: o.flag(&t::AL_UPDATES),
        on_io_error: match o.text(&t::ON_IO_ERROR) {
            "pass_on" => OnIoError::PassOn,
            "call-local-io-error" => OnIoError::CallLocalIoError,
            _ => OnIoError::Detach,
        },
        write_ordering: match (o.flag(&t::DISK_FLUSHES), o.flag(&t::DISK_DRAIN)) {
            (true, _) => WriteOrdering::Flush,
            (false, true) => WriteOrdering::Drain,
            (false, false) => WriteOrdering::None,
        },
        disk_timeout_ms: o.number(&t::DISK_TIMEOUT) * 100,
        resync: resync(o),
    }
}

/// Without a knob our own controller; one of DRBD's knobs brings DRBD's, and `c-plan-ahead 0` none.
fn resync(o: &OptionSet) -> ResyncConfig {
    let planned = [&t::RESYNC_RATE, &t::C_PLAN_AHEAD, &t::C_DELAY_TARGET, &t::C_FILL_TARGET];
    let control = if is_number(o, &t::C_PLAN_AHEAD, 0) {
        RateControl::Fixed
    } else if planned.into_iter().any(|option| o.get(option).is_some()) {
        RateControl::Planned
    } else {
        RateControl::Adaptive
    };
    let max_rate = o.number(&t::C_MAX_RATE);
    let limited = control == RateControl::Planned || o.get(&t::C_MAX_RATE).is_some();
    ResyncConfig {
        control,
        rate_kib_s: o.number(&t::RESYNC_RATE),
        plan_ahead_ds: o.number(&t::C_PLAN_AHEAD),
        delay_target_ds: o.number(&t::C_DELAY_TARGET),
        fill_target_sectors: o.number(&t::C_FILL_TARGET),
        max_rate_kib_s: (limited && max_rate > 0).then_some(max_rate),
        min_rate_kib_s: o.number(&t::C_MIN_RATE),
        discard_granularity_bytes: o.number(&t::RS_DISCARD_GRANULARITY),
    }
}

/// Whether an option's values are one of a list (used by the commands that complete words).
#[must_use]
pub fn choices(spec: &OptionSpec) -> &'static [&'static str] {
    match spec.kind {
        Kind::Choice { values, .. } => values,
        Kind::Bool { .. } => &["yes", "no"],
        Kind::Quorum => &["off", "majority", "all"],
        Kind::Number { .. } | Kind::Text { .. } | Kind::ResourceRef | Kind::Words => &[],
    }
}
