//! From the configuration to what this node does: which file, which node, which resources, and for each
//! of them everything the runtime and the front ends need.
use crate::admin::cli::GlobalOptions;
use crate::admin::config::{self, Address, Config, Connection, Host, HostVolume, MetaDisk, Resource, table};
use crate::admin::dependency::Order;
use crate::admin::outcome::{self, Failure};
use crate::admin::process;
use crate::core::event::HandlerName;
use crate::frontend::choice::Preference;
use crate::frontend::server::NbdAddress;
use crate::runtime::handlers::HandlerPlan;
use crate::runtime::{RuntimeConfig, backing};
use crate::units::VolumeNr;
use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::path::{Path, PathBuf};

/// Where a node's configuration comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// The file; absolute, or `-`.
    pub config: PathBuf,
    /// The node to be.
    pub node: String,
}

/// A configuration that was read without error.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// The configuration.
    pub config: Config,
    /// What was odd about it, rendered.
    pub warnings: Vec<String>,
}

/// A resource as this node runs it.
#[derive(Clone, Debug)]
pub struct LocalResource {
    /// For the owner thread.
    pub runtime: RuntimeConfig,
    /// Own volumes, by number.
    pub volumes: Vec<LocalVolume>,
    /// Where NBD clients are served.
    pub nbd: Vec<NbdAddress>,
    /// Wanted front end.
    pub front_end: Preference,
    /// `resync-after` of all volumes of this node, as the file has it now.
    pub order: Order,
}

/// A volume of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalVolume {
    /// Number.
    pub nr: VolumeNr,
    /// Minor number.
    pub minor: u32,
    /// Path users know, such as `/dev/drbd0`.
    pub device: PathBuf,
    /// Backing disk; `None` = `disk none`.
    pub disk: Option<PathBuf>,
    /// Where its metadata is.
    pub meta_disk: MetaDisk,
}

impl From<&HostVolume> for LocalVolume {
    fn from(volume: &HostVolume) -> Self {
        Self {
            nr: VolumeNr(volume.nr),
            minor: volume.minor,
            device: volume.device.clone(),
            disk: volume.disk.clone(),
            meta_disk: volume.meta_disk.clone(),
        }
    }
}

impl LocalVolume {
    /// The device that holds the metadata, and how drbdmeta spells its place.
    #[must_use]
    pub fn meta_place(&self) -> Option<(&Path, String)> {
        match &self.meta_disk {
            MetaDisk::Internal => Some((self.disk.as_deref()?, "internal".into())),
            MetaDisk::External { path } => Some((path, "flex-external".into())),
            MetaDisk::Indexed { path, index } => Some((path, index.to_string())),
        }
    }
}

impl LocalVolume {
    /// The place of the metadata as the runtime takes it.
    ///
    /// # Errors
    /// An index that no 8.x metadata device has.
    pub fn backing_place(&self) -> Result<backing::MetaDisk, String> {
        match &self.meta_disk {
            MetaDisk::Internal => Ok(backing::MetaDisk::Internal),
            MetaDisk::External { path } => Ok(backing::MetaDisk::Flexible(path.clone())),
            MetaDisk::Indexed { path, index } => match u8::try_from(*index) {
                Ok(index) => Ok(backing::MetaDisk::Indexed(path.clone(), index)),
                Err(_) => Err(format!("meta-disk index {index} is larger than 255")),
            },
        }
    }
}

/// The run directory of these options.
#[must_use]
pub fn run_dir(global: &GlobalOptions) -> PathBuf {
    global.run_dir.clone().unwrap_or_else(process::default_run_dir)
}

/// This machine's name, as `uname -n` says it.
///
/// # Errors
/// It has none that is text.
pub fn host_name() -> Result<String, Failure> {
    let name = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok());
    name.ok_or_else(|| Failure::new(outcome::CONFIG, "the host name is not text; say --node NAME\n"))
}

/// Where the configuration is when there is no daemon to ask: `-c`, else the first file of DRBD's
/// search list that exists.
///
/// # Errors
/// The named file is not there.
pub fn source(global: &GlobalOptions) -> Result<Source, Failure> {
    let node = match &global.node {
        Some(node) => node.clone(),
        None => host_name()?,
    };
    let config = match &global.config {
        Some(path) => path.clone(),
        None => {
            let found = config::SEARCH.iter().map(PathBuf::from).find(|path| path.exists());
            found.unwrap_or_else(|| "/etc/drbd.conf".into())
        }
    };
    Ok(Source { config: absolute(&config)?, node })
}

fn absolute(path: &Path) -> Result<PathBuf, Failure> {
    if path == Path::new("-") {
        return Ok(path.into());
    }
    std::path::absolute(path)
        .map_err(|error| Failure::new(outcome::EXEC, format!("Can not open '{}': {error}\n", path.display())))
}

/// Reads the configuration.
///
/// # Errors
/// Exit code 20 when a file cannot be opened, 10 with every problem, compiler-like, when it is invalid.
pub fn load(source: &Source) -> Result<Loaded, Failure> {
    match config::load(Some(&source.config)) {
        Ok((config, warnings)) => {
            Ok(Loaded { config, warnings: warnings.iter().map(config::Diagnostic::render).collect() })
        }
        Err(problems) => {
            // A problem without a place is about the file itself.
            let unreadable = problems.iter().all(|problem| problem.location.is_none());
            let exit = if unreadable { outcome::EXEC } else { outcome::CONFIG };
            Err(Failure::new(exit, config::render_all(&problems)))
        }
    }
}

impl Loaded {
    /// Names of the resources that `node` is part of, in the order of the file.
    #[must_use]
    pub fn names(&self, node: &str) -> Vec<String> {
        let here = self.config.resources.iter().filter(|resource| resource.host(node).is_some());
        here.map(|resource| resource.name.clone()).collect()
    }

    /// A resource and this node's part in it.
    ///
    /// # Errors
    /// Exit code 1 when there is none.
    pub fn find(&self, name: &str, node: &str) -> Result<(&Resource, &Host), Failure> {
        let Some(resource) = self.config.resource(name) else { return Err(not_defined(name)) };
        resource.host(node).map(|host| (resource, host)).ok_or_else(|| {
            let hosts: Vec<&str> = resource.hosts.iter().map(Host::name).collect();
            let mut failure = not_defined(name);
            failure.text.push_str(&format!(
                "  this node is '{node}'; {name} is for {}\nnext: say which node this is: --node NAME\n",
                hosts.join(", ")
            ));
            failure
        })
    }
}

/// drbdadm's words for a resource that this host has no part in.
#[must_use]
pub fn not_defined(name: &str) -> Failure {
    Failure::new(outcome::USAGE, format!("'{name}' not defined in your config (for this host).\n"))
}

/// Everything needed to run resource `name` on `node`.
///
/// # Errors
/// The resource is not for this node, or of a kind that cannot run.
pub fn local(loaded: &Loaded, name: &str, node: &str, run_dir: &Path) -> Result<LocalResource, Failure> {
    let invalid = |text: String| Failure::new(outcome::CONFIG, text);
    let (resource, host) = loaded.find(name, node)?;
    let core = resource.to_core(node).map_err(|error| invalid(format!("{error}\n")))?;
    let Some((connection, _)) = resource.peers_of(node).next() else {
        return Err(invalid(format!("{name}: has no peer\n")));
    };
    let (local_addr, peer_addr) = addresses(connection, host)
        .ok_or_else(|| invalid(format!("{name}: no usable address of this host and its peer\n")))?;
    let option = |spec| host.lockstep.get(spec).map_or(&resource.lockstep, |_| &host.lockstep);
    let socket = option(&table::NBD_SOCKET).text(&table::NBD_SOCKET);
    let socket = if socket.is_empty() { run_dir.join(format!("{name}.nbd.sock")) } else { socket.into() };
    let mut nbd = vec![NbdAddress::Unix(socket)];
    let listen = option(&table::NBD_LISTEN).text(&table::NBD_LISTEN);
    if !listen.is_empty() {
        let address = listen
            .parse()
            .map_err(|_| invalid(format!("{name}: nbd-listen '{listen}' is not ADDRESS:PORT\n")))?;
        nbd.push(NbdAddress::Tcp(address));
    }
    let front_end = match option(&table::FRONT_END).text(&table::FRONT_END) {
        "ublk" => Preference::Ublk,
        "nbd" => Preference::Nbd,
        _ => Preference::Auto,
    };
    let spin_us = option(&table::SPIN_US).number(&table::SPIN_US);
    // Unset, or the name of any digest: CRC-32C, which is our default.
    let sums_blocks = connection.net.text(&table::DATA_INTEGRITY_ALG) != "none";
    Ok(LocalResource {
        runtime: RuntimeConfig {
            spin_us: u32::try_from(spin_us).unwrap_or(u32::MAX),
            sums_blocks,
            handlers: handlers(resource, host, (local_addr, peer_addr)),
            ..RuntimeConfig::new(core, local_addr, peer_addr)
        },
        volumes: host.volumes.iter().map(LocalVolume::from).collect(),
        nbd,
        front_end,
        order: Order::of(&loaded.config, node),
    })
}

/// The configured handlers and what DRBD tells them (ADM §8.1).
fn handlers(resource: &Resource, own: &Host, (local, remote): (SocketAddr, SocketAddr)) -> HandlerPlan {
    let commands = HandlerName::ALL.iter().filter_map(|name| {
        let found = resource.handlers.iter().find(|setting| setting.spec.name == name.name())?;
        Some((*name, resource.handlers.text(found.spec).to_owned()))
    });
    let family = |address: SocketAddr| if address.is_ipv4() { "ipv4" } else { "ipv6" }.to_owned();
    let disk = |volume: &HostVolume| {
        volume.disk.as_ref().map_or_else(|| "none".to_owned(), |disk| disk.display().to_string())
    };
    let joined = |values: Vec<String>| values.join(" ");
    let text = |name: &str, value: String| (name.to_owned(), value);
    let mut environment = vec![
        text("DRBD_RESOURCE", resource.name.clone()),
        text("DRBD_MINOR", joined(own.volumes.iter().map(|v| v.minor.to_string()).collect())),
        text("DRBD_VOLUME", joined(own.volumes.iter().map(|v| v.nr.to_string()).collect())),
        text("DRBD_LL_DISK", joined(own.volumes.iter().map(disk).collect())),
        text("DRBD_MY_NODE_ID", own.node_id.to_string()),
        text("DRBD_MY_AF", family(local)),
        text("DRBD_MY_ADDRESS", local.ip().to_string()),
        text("DRBD_PEER_AF", family(remote)),
        text("DRBD_PEER_ADDRESS", remote.ip().to_string()),
        // Only a node with good data has a reason to fence.
        text("UP_TO_DATE_NODES", format!("0x{:08x}", 1_u64.checked_shl(own.node_id).unwrap_or(0))),
    ];
    if let Some(peer) = resource.peer_of(own.name()) {
        environment.push(text("DRBD_PEER", peer.name().to_owned()));
        environment.push(text("DRBD_PEERS", peer.name().to_owned()));
        environment.push(text("DRBD_PEER_NODE_ID", peer.node_id.to_string()));
    }
    for host in &resource.hosts {
        environment.push((format!("DRBD_NODE_ID_{}", host.node_id), host.name().to_owned()));
    }
    for volume in &own.volumes {
        environment.push((format!("DRBD_MINOR_{}", volume.nr), volume.minor.to_string()));
        environment.push((format!("DRBD_BACKING_DEV_{}", volume.nr), disk(volume)));
    }
    let volume_environment = own.volumes.iter().map(|volume| {
        let own = vec![
            text("DRBD_MINOR", volume.minor.to_string()),
            text("DRBD_VOLUME", volume.nr.to_string()),
            text("DRBD_LL_DISK", disk(volume)),
            text("DRBD_BACKING_DEV", disk(volume)),
        ];
        (VolumeNr(volume.nr), own)
    });
    HandlerPlan {
        commands: commands.collect(),
        environment,
        volume_environment: volume_environment.collect(),
        ..HandlerPlan::default()
    }
}

/// Own and peer's address of the first path.
#[must_use]
pub fn addresses(connection: &Connection, host: &Host) -> Option<(SocketAddr, SocketAddr)> {
    let [first, second] = connection.paths.first()?;
    let own_is_first = connection.hosts.first().is_some_and(|name| name == host.name());
    let (own, peer) = if own_is_first { (first, second) } else { (second, first) };
    Some((socket_addr(own)?, socket_addr(peer)?))
}

fn socket_addr(address: &Address) -> Option<SocketAddr> {
    match (address.ip, &address.scope) {
        (IpAddr::V6(ip), Some(scope)) => {
            let index = nix::net::if_::if_nametoindex(scope.as_str()).ok()?;
            Some(SocketAddrV6::new(ip, address.port, 0, index).into())
        }
        (ip, _) => Some(SocketAddr::new(ip, address.port)),
    }
}
