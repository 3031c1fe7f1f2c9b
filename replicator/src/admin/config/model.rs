//! The configuration as values: what the daemon and the commands work with. See [`super`] for how it comes to be.
use super::decl::ResourceDecl;
use super::options::OptionSet;
use super::source::Location;
use serde::Serialize;
use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;

/// All that was configured.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Config {
    /// Files that contributed, in the order they were read; the first is the one that was asked for.
    pub files: Vec<String>,
    /// `global { }`.
    pub global: OptionSet,
    /// `common { }` as written; already merged into each resource.
    pub common: Sections,
    /// In the order they were defined.
    pub resources: Vec<Resource>,
}

impl Config {
    /// The resource of that name.
    #[must_use]
    pub fn resource(&self, name: &str) -> Option<&Resource> {
        self.resources.iter().find(|r| r.name == name)
    }
}

/// The option sections of one level, as written.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Sections {
    /// `net`, with what belongs there from `syncer` and `disk`.
    pub net: OptionSet,
    /// `disk`, options of the peer device included.
    pub disk: OptionSet,
    /// `options`.
    pub options: OptionSet,
    /// `startup`.
    pub startup: OptionSet,
    /// `handlers`.
    pub handlers: OptionSet,
    /// `proxy`, ignored.
    pub proxy: OptionSet,
    /// `lockstep`.
    pub lockstep: OptionSet,
}

/// One resource; every option set is merged from all levels and holds only what somebody wrote.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Resource {
    /// Name.
    pub name: String,
    /// The nodes, in the order they were written.
    pub hosts: Vec<Host>,
    /// One per pair of nodes that replicate to each other. Two hosts have one.
    pub connections: Vec<Connection>,
    /// Net options without those of a connection.
    pub net: OptionSet,
    /// Resource options without those of a host.
    pub options: OptionSet,
    /// Startup options.
    pub startup: OptionSet,
    /// Handlers.
    pub handlers: OptionSet,
    /// lockstep's own options, without those of a host.
    pub lockstep: OptionSet,
    /// Where its name stands.
    pub defined_at: Location,
    /// As written, for `dump`.
    #[serde(skip)]
    pub(crate) decl: ResourceDecl,
}

/// One node of a resource.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Host {
    /// Names it answers to; a floating host has its address as name.
    pub names: Vec<String>,
    /// Selected by address, not by name.
    pub floating: bool,
    /// The resource below, for a stacked one.
    pub stacked_on: Option<String>,
    /// Given, or derived: see [`super`].
    pub node_id: u32,
    /// Where it listens; `None` when only connections give addresses.
    pub address: Option<Address>,
    /// By number.
    pub volumes: Vec<HostVolume>,
    /// Resource options of this node.
    pub options: OptionSet,
    /// lockstep's own options of this node.
    pub lockstep: OptionSet,
}

impl Host {
    /// The first name.
    #[must_use]
    pub fn name(&self) -> &str {
        self.names.first().map_or("", |n| n)
    }

    /// The volume of that number.
    #[must_use]
    pub fn volume(&self, nr: u16) -> Option<&HostVolume> {
        self.volumes.iter().find(|v| v.nr == nr)
    }
}

/// A volume on a node.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct HostVolume {
    /// Number.
    pub nr: u16,
    /// Path of the replicated device, such as `/dev/drbd0`.
    pub device: PathBuf,
    /// Its minor number.
    pub minor: u32,
    /// The backing disk, `None` for a node that is diskless on purpose.
    pub disk: Option<PathBuf>,
    /// Where the metadata is.
    pub meta_disk: MetaDisk,
    /// Disk and peer-device options, those of a connection excepted.
    pub disk_options: OptionSet,
}

/// Two nodes that replicate to each other.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Connection {
    /// First names of the two hosts.
    pub hosts: [String; 2],
    /// Addresses of the two, one pair per path.
    pub paths: Vec<[Address; 2]>,
    /// Net options: connection over resource over common.
    pub net: OptionSet,
    /// Peer-device options of the connection alone.
    pub peer_device: OptionSet,
    /// Peer-device options of one volume of the connection alone.
    pub volumes: Vec<(u16, OptionSet)>,
}

impl Connection {
    /// Disk and peer-device options of a volume of `host` towards the other end.
    #[must_use]
    pub fn disk_options(&self, volume: &HostVolume) -> OptionSet {
        let own =
            self.volumes.iter().find(|(nr, _)| *nr == volume.nr).map(|(_, o)| o.clone()).unwrap_or_default();
        own.or(&self.peer_device).or(&volume.disk_options)
    }
}

/// Kind of address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum Family {
    /// `ipv4`
    Ipv4,
    /// `ipv6`
    Ipv6,
    /// `ssocks`, taken for ipv4.
    Ssocks,
    /// `sci`, taken for ipv4.
    Sci,
    /// `sdp`, taken for ipv4.
    Sdp,
}

/// A TCP end point.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Address {
    /// As written, or what the address is.
    pub family: Family,
    /// The IP address.
    pub ip: IpAddr,
    /// Scope of a link-local IPv6 address: an interface.
    pub scope: Option<String>,
    /// 1..=65535.
    pub port: u16,
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let family = match self.family {
            Family::Ipv4 => "ipv4",
            Family::Ipv6 => "ipv6",
            Family::Ssocks => "ssocks",
            Family::Sci => "sci",
            Family::Sdp => "sdp",
        };
        match (self.ip, &self.scope) {
            (IpAddr::V4(ip), _) => write!(f, "{family} {ip}:{}", self.port),
            (IpAddr::V6(ip), Some(scope)) => write!(f, "{family} [{ip}%{scope}]:{}", self.port),
            (IpAddr::V6(ip), None) => write!(f, "{family} [{ip}]:{}", self.port),
        }
    }
}

/// A device statement.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Device {
    /// `/dev/drbd...` when a name was written.
    pub name: Option<String>,
    /// Minor number.
    pub minor: u32,
}

impl Device {
    /// The path of the device.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.name.as_ref().map_or_else(|| format!("/dev/drbd{}", self.minor).into(), PathBuf::from)
    }
}

/// Where metadata is (DISK).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum MetaDisk {
    /// At the end of the backing disk.
    Internal,
    /// A disk of its own, all of it.
    External {
        /// The disk.
        path: PathBuf,
    },
    /// A slot of 128 MiB on a shared disk.
    Indexed {
        /// The disk.
        path: PathBuf,
        /// Slot, from 0.
        index: u32,
    },
}
