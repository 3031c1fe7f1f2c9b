//! NBD listeners: accept, negotiate on the control thread, hand the socket to the resource's own thread.
//!
//! A listener is there as long as its resource is up; an *export* exists only while the resource is
//! Primary, so that a client on the wrong node is told where to go instead of "connection refused". One
//! listener belongs to one resource, or to the whole node ([`Scope`]).
use crate::core::state::{ConnState, Role};
use crate::core::status::ResourceStatus;
use crate::frontend::nbd::{
    ExportDirectory, ExportInfo, ExportRefusal, ListedExport, NegotiateError, RefusalKind, negotiate,
};
use crate::runtime::ResourceHandle;
use crate::units::{SectorCount, VolumeNr};
use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::{JoinHandle, JoinSet};

/// A client must finish its negotiation within this time.
pub const NEGOTIATION_LIMIT: Duration = Duration::from_secs(10);
/// Clients of one listener that may negotiate at the same time; further ones wait in the backlog.
pub const MAX_NEGOTIATING: usize = 32;
/// After `accept` failed for want of descriptors or memory: time for some to come back.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Where an NBD listener listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NbdAddress {
    /// A TCP address.
    Tcp(SocketAddr),
    /// A unix socket; made with mode 0600.
    Unix(PathBuf),
}

impl fmt::Display for NbdAddress {
    /// As an NBD URI without the export's name.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "nbd://{address}"),
            Self::Unix(path) => write!(f, "nbd+unix:///?socket={}", path.display()),
        }
    }
}

impl NbdAddress {
    /// The URI of one export, for a person to paste.
    #[must_use]
    pub fn uri(&self, export: &str) -> String {
        match self {
            Self::Tcp(address) => format!("nbd://{address}/{export}"),
            Self::Unix(path) => format!("nbd+unix:///{export}?socket={}", path.display()),
        }
    }
}

/// A listener could not be made.
#[derive(Debug, thiserror::Error)]
#[error("NBD listener {address}: {source}")]
pub struct BindError {
    address: NbdAddress,
    #[source]
    source: io::Error,
}

/// A resource as NBD clients see it. Made on `up`, gone on `down`.
#[derive(Debug)]
pub struct ExportedResource {
    name: String,
    node_name: String,
    /// Logical block size of each volume's disk, bytes.
    volumes: Mutex<BTreeMap<VolumeNr, u32>>,
    exports: watch::Receiver<BTreeMap<VolumeNr, SectorCount>>,
    handle: ResourceHandle,
    clients: Mutex<Vec<Client>>,
}

/// A client that reached the transmission.
#[derive(Debug)]
struct Client {
    volume: VolumeNr,
    /// Inode of its socket: alive as long as this process has a descriptor of it.
    inode: u64,
    /// Who, for people.
    who: String,
}

impl ExportedResource {
    /// The exports of `handle`'s resource.
    #[must_use]
    pub fn new(name: &str, node_name: &str, volumes: &[VolumeNr], handle: &ResourceHandle) -> Self {
        Self {
            name: name.into(),
            node_name: node_name.into(),
            volumes: Mutex::new(volumes.iter().map(|volume| (*volume, DEFAULT_BLOCK_BYTES)).collect()),
            exports: handle.exports(),
            handle: handle.clone(),
            clients: Mutex::new(Vec::new()),
        }
    }

    /// Tells the logical block size of a volume's disk, bytes, once it is attached.
    pub fn set_block_bytes(&self, volume: VolumeNr, bytes: u32) {
        locked(&self.volumes).insert(volume, bytes);
    }

    /// Who uses the volumes through NBD now: `r0/0: 10.0.0.7:51234`.
    #[must_use]
    pub fn clients(&self) -> Vec<String> {
        let mut clients = locked(&self.clients);
        let open = open_socket_inodes();
        clients.retain(|client| open.contains(&client.inode));
        clients.iter().map(|client| format!("{}/{}: {}", self.name, client.volume.0, client.who)).collect()
    }

    /// The name LIST shows for a volume: `RES` when there is only one.
    #[must_use]
    pub fn export_name(&self, volume: VolumeNr) -> String {
        let single = locked(&self.volumes).len() == 1;
        if single { self.name.clone() } else { format!("{}/{}", self.name, volume.0) }
    }
}

/// Until a disk says otherwise.
const DEFAULT_BLOCK_BYTES: u32 = 512;

/// A poisoned lock here guards plain lists: what is in them is whole.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// All resources of the node that are up, by name.
#[derive(Debug, Default)]
pub struct ExportTable {
    resources: Mutex<BTreeMap<String, Arc<ExportedResource>>>,
}

impl ExportTable {
    /// Puts a resource in.
    pub fn insert(&self, resource: Arc<ExportedResource>) {
        locked(&self.resources).insert(resource.name.clone(), resource);
    }

    /// Takes a resource out.
    pub fn remove(&self, name: &str) {
        locked(&self.resources).remove(name);
    }

    fn of(&self, scope: &Scope) -> Vec<Arc<ExportedResource>> {
        let resources = locked(&self.resources);
        match scope {
            Scope::Node => resources.values().cloned().collect(),
            Scope::Resource(name) => resources.get(name).cloned().into_iter().collect(),
        }
    }
}

/// What a listener serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Every resource.
    Node,
    /// One resource.
    Resource(String),
}

/// The exports as one client finds them: roles as of its connect, sizes as of now.
struct Directory {
    resources: Vec<(Arc<ExportedResource>, Option<ResourceStatus>)>,
}

impl Directory {
    async fn of(table: &ExportTable, scope: &Scope) -> Self {
        let mut resources = Vec::new();
        for resource in table.of(scope) {
            // `None` when it has just gone down.
            let status = resource.handle.status().await;
            resources.push((resource, status));
        }
        Self { resources }
    }

    /// `RES` or `RES/VOL` as resource and volume; `RES` alone means its lowest volume.
    fn find(&self, name: &str) -> Option<(&ExportedResource, Option<&ResourceStatus>, VolumeNr)> {
        let (resource_name, volume) = match name.rsplit_once('/') {
            Some((resource, volume)) => (resource, Some(VolumeNr(volume.parse().ok()?))),
            None => (name, None),
        };
        let (resource, status) =
            self.resources.iter().find(|(resource, _)| resource.name == resource_name)?;
        let volumes = locked(&resource.volumes);
        let volume = match volume {
            Some(volume) => volumes.contains_key(&volume).then_some(volume)?,
            None => *volumes.keys().next()?,
        };
        Some((resource, status.as_ref(), volume))
    }
}

impl ExportDirectory for Directory {
    fn list(&self) -> Vec<ListedExport> {
        let mut list = Vec::new();
        for (resource, _) in &self.resources {
            for volume in resource.exports.borrow().keys() {
                let description =
                    format!("volume {} of {} on {}", volume.0, resource.name, resource.node_name);
                list.push(ListedExport { name: resource.export_name(*volume), description });
            }
        }
        list
    }

    fn lookup(&self, name: &str) -> Result<ExportInfo, ExportRefusal> {
        let Some((resource, status, volume)) = self.find(name) else {
            let text = format!("no volume '{name}' is up on this node; see `lockstep status`");
            return Err(ExportRefusal::new(RefusalKind::Unknown, text));
        };
        let size = resource.exports.borrow().get(&volume).copied();
        match size {
            Some(size) => {
                let block = locked(&resource.volumes).get(&volume).copied().unwrap_or(DEFAULT_BLOCK_BYTES);
                Ok(ExportInfo::volume(size.bytes(), block))
            }
            None => Err(not_here(&resource.name, &resource.node_name, volume, status)),
        }
    }

    fn nothing_exported(&self) -> ExportRefusal {
        match self.resources.as_slice() {
            [(resource, status)] => {
                let volume = locked(&resource.volumes).keys().next().copied().unwrap_or_default();
                not_here(&resource.name, &resource.node_name, volume, status.as_ref())
            }
            _ => ExportRefusal::new(
                RefusalKind::Policy,
                "nothing is exported here: no resource is Primary on this node; see `lockstep status`",
            ),
        }
    }
}

/// Why a volume that is up is not exported, where it is, and what to do.
fn not_here(name: &str, node: &str, volume: VolumeNr, status: Option<&ResourceStatus>) -> ExportRefusal {
    let Some(status) = status else {
        return ExportRefusal::new(RefusalKind::Shutdown, format!("{name} is going down on {node}"));
    };
    if status.role == Role::Primary {
        let disk = status.volumes.iter().find(|own| own.volume == volume);
        let disk = disk.map_or_else(|| "unknown".to_owned(), |own| own.disk.to_string());
        let text = format!(
            "{name}/{} is Primary on {node} but has no usable data here (disk {disk}); see `lockstep status {name}`",
            volume.0
        );
        return ExportRefusal::new(RefusalKind::Policy, text);
    }
    let connection = &status.connection;
    let peer = &connection.peer_name;
    let text = if connection.connection != ConnState::Connected {
        format!(
            "{name} is {} on {node}; {peer} is not connected, so its role is unknown. If {peer} is down, to use {name} here: lockstep primary {name}",
            status.role
        )
    } else if connection.peer_role == Role::Primary {
        format!(
            "{name} is {} on {node}; {peer} is Primary: connect there. To move it here: lockstep secondary {name} on {peer}, then lockstep primary {name} on {node}",
            status.role
        )
    } else {
        format!(
            "{name} is {} on {node}, and nowhere Primary. To use it here: lockstep primary {name}",
            status.role
        )
    };
    ExportRefusal::new(RefusalKind::Policy, text)
}

/// Running listeners. Stop them with [`NbdServer::stop`]; dropping aborts them.
#[derive(Debug)]
pub struct NbdServer {
    addresses: Vec<NbdAddress>,
    tasks: Vec<JoinHandle<()>>,
}

impl NbdServer {
    /// Listens on `addresses` for clients of `scope`. Call on the control runtime.
    ///
    /// # Errors
    /// The first address that cannot be used; none is left open then.
    pub fn bind(
        addresses: &[NbdAddress],
        scope: &Scope,
        table: &Arc<ExportTable>,
    ) -> Result<Self, BindError> {
        let mut server = Self { addresses: Vec::new(), tasks: Vec::new() };
        for address in addresses {
            let listener =
                Listener::bind(address).map_err(|source| BindError { address: address.clone(), source })?;
            // An address with port 0 has become a real one.
            server.addresses.push(listener.address(address));
            server.tasks.push(tokio::spawn(serve(listener, scope.clone(), Arc::clone(table))));
        }
        Ok(server)
    }

    /// Where it listens.
    #[must_use]
    pub fn addresses(&self) -> &[NbdAddress] {
        &self.addresses
    }

    /// Stops listening and drops clients that still negotiate; those in transmission are the
    /// resource's. Removes unix sockets.
    pub async fn stop(mut self) {
        for task in &self.tasks {
            task.abort();
        }
        for task in self.tasks.drain(..) {
            // An aborted task has nothing to say.
            let _aborted = task.await;
        }
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
        for address in &self.addresses {
            if let NbdAddress::Unix(path) = address {
                // Already gone is as good.
                let _gone = std::fs::remove_file(path);
            }
        }
    }
}

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Listener {
    fn bind(address: &NbdAddress) -> io::Result<Self> {
        match address {
            NbdAddress::Tcp(address) => {
                let listener = std::net::TcpListener::bind(address)?;
                listener.set_nonblocking(true)?;
                Ok(Self::Tcp(TcpListener::from_std(listener)?))
            }
            NbdAddress::Unix(path) => {
                remove_stale_socket(path)?;
                let listener = UnixListener::bind(path)?;
                std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
                Ok(Self::Unix(listener))
            }
        }
    }

    fn address(&self, asked: &NbdAddress) -> NbdAddress {
        match self {
            Self::Tcp(listener) => listener.local_addr().map_or_else(|_| asked.clone(), NbdAddress::Tcp),
            Self::Unix(_) => asked.clone(),
        }
    }

    async fn accept(&self) -> io::Result<Socket> {
        match self {
            Self::Tcp(listener) => listener.accept().await.map(|(stream, from)| Socket::Tcp(stream, from)),
            Self::Unix(listener) => listener.accept().await.map(|(stream, _)| Socket::Unix(stream)),
        }
    }
}

/// A socket file that nobody listens on any more may go; anything else stays.
fn remove_stale_socket(path: &Path) -> io::Result<()> {
    match path.symlink_metadata() {
        Ok(meta) if meta.file_type().is_socket() => {
            if std::os::unix::net::UnixStream::connect(path).is_ok() {
                return Err(io::Error::new(io::ErrorKind::AddrInUse, "another program listens there"));
            }
            std::fs::remove_file(path)
        }
        Ok(_) => Err(io::Error::new(io::ErrorKind::AlreadyExists, "a file that is not a socket is there")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

enum Socket {
    Tcp(TcpStream, SocketAddr),
    Unix(UnixStream),
}

impl Socket {
    fn who(&self) -> String {
        match self {
            Self::Tcp(_, from) => from.to_string(),
            Self::Unix(stream) => match stream.peer_cred().ok().and_then(|cred| cred.pid()) {
                Some(pid) => {
                    let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
                    format!("pid {pid} ({})", name.trim_end())
                }
                None => "a local process".into(),
            },
        }
    }

    /// The socket without the control runtime; the resource's thread sets its mode.
    fn into_fd(self) -> io::Result<OwnedFd> {
        match self {
            Self::Tcp(stream, _) => Ok(stream.into_std()?.into()),
            Self::Unix(stream) => Ok(stream.into_std()?.into()),
        }
    }
}

/// Accepts until aborted. Negotiations run beside each other, joined here: aborting this task ends them.
async fn serve(listener: Listener, scope: Scope, table: Arc<ExportTable>) {
    let places = Arc::new(Semaphore::new(MAX_NEGOTIATING));
    let mut negotiations = JoinSet::new();
    loop {
        // The semaphore is never closed.
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        while negotiations.try_join_next().is_some() {}
        match listener.accept().await {
            Ok(socket) => {
                let (scope, table) = (scope.clone(), Arc::clone(&table));
                negotiations.spawn(async move {
                    let who = socket.who();
                    if let Err(error) = client(socket, &who, &scope, &table).await {
                        tracing::info!(client = %who, %error, "NBD client did not get an export");
                    }
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "accepting an NBD client failed");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// One client from its first byte to the hand-over.
async fn client(
    mut socket: Socket,
    who: &str,
    scope: &Scope,
    table: &ExportTable,
) -> Result<(), NegotiateError> {
    let directory = Directory::of(table, scope).await;
    let result = match &mut socket {
        Socket::Tcp(stream, _) => negotiate(stream, &directory, NEGOTIATION_LIMIT).await,
        Socket::Unix(stream) => negotiate(stream, &directory, NEGOTIATION_LIMIT).await,
    };
    let negotiated = match result {
        Err(error) if error.is_polite() => {
            tracing::debug!(client = %who, %error, "NBD client left");
            return Ok(());
        }
        other => other?,
    };
    // It was found a moment ago, but the resource may have gone down since: then the socket just closes.
    let Some((resource, _, volume)) = directory.find(&negotiated.name) else { return Ok(()) };
    let fd = socket.into_fd().map_err(NegotiateError::Io)?;
    let inode = socket_inode(fd.as_raw_fd());
    match resource.handle.add_nbd_client(volume, fd, negotiated) {
        Ok(()) => {
            let who = who.to_owned();
            tracing::info!(resource = %resource.name, volume = volume.0, client = %who, "NBD client connected");
            locked(&resource.clients).extend(inode.map(|inode| Client { volume, inode, who }));
        }
        Err(refusal) => {
            tracing::info!(resource = %resource.name, client = %who, %refusal, "NBD client dropped");
        }
    }
    Ok(())
}

/// The inode of a socket of this process.
fn socket_inode(fd: RawFd) -> Option<u64> {
    let link = std::fs::read_link(format!("/proc/self/fd/{fd}")).ok()?;
    link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

/// Inodes of all sockets this process has open.
fn open_socket_inodes() -> std::collections::BTreeSet<u64> {
    let Ok(entries) = std::fs::read_dir("/proc/self/fd") else { return std::collections::BTreeSet::new() };
    let fds = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    fds.filter_map(socket_inode).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::state::DiskState;
    use crate::core::status::{ConnectionStatus, VolumeStatus};

    fn status(role: Role, connection: ConnState, peer_role: Role) -> ResourceStatus {
        let volume = VolumeStatus {
            volume: VolumeNr(0),
            disk: DiskState::Diskless,
            size_kib: 0,
            open_count: 0,
            read_kib: 0,
            written_kib: 0,
            al_writes: 0,
            bm_writes: 0,
            upper_pending: 0,
            lower_pending: 0,
            uuids: [0; 4],
            flags: 0,
        };
        ResourceStatus {
            name: "r0".into(),
            node_id: 0,
            role,
            suspended: vec![],
            write_ordering: "flush".into(),
            volumes: vec![volume],
            connection: ConnectionStatus {
                peer_name: "bravo".into(),
                peer_node_id: 1,
                connection,
                peer_role,
                congested: false,
                ap_in_flight_sectors: 0,
                rs_in_flight_sectors: 0,
                peer_volumes: vec![],
            },
            node_name: "alice".into(),
            decisions: Vec::new(),
            waiting_for: vec![],
        }
    }

    #[test]
    fn a_refusal_says_where_the_data_is_and_what_to_do() {
        let text = |status: &ResourceStatus| not_here("r0", "alpha", VolumeNr(0), Some(status)).text;
        let peer_has_it = text(&status(Role::Secondary, ConnState::Connected, Role::Primary));
        assert!(peer_has_it.contains("r0 is Secondary on alpha; bravo is Primary"), "{peer_has_it}");
        assert!(peer_has_it.contains("lockstep secondary r0 on bravo"), "{peer_has_it}");
        let nobody = text(&status(Role::Secondary, ConnState::Connected, Role::Secondary));
        assert!(nobody.contains("nowhere Primary") && nobody.ends_with("lockstep primary r0"), "{nobody}");
        let alone = text(&status(Role::Secondary, ConnState::Connecting, Role::Unknown));
        assert!(alone.contains("bravo is not connected"), "{alone}");
        let diskless = text(&status(Role::Primary, ConnState::StandAlone, Role::Unknown));
        assert!(diskless.contains("disk Diskless"), "{diskless}");
        assert_eq!(not_here("r0", "alpha", VolumeNr(0), None).kind, RefusalKind::Shutdown);
    }

    #[test]
    fn only_a_dead_socket_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nbd.sock");
        assert!(remove_stale_socket(&path).is_ok());
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        assert_eq!(remove_stale_socket(&path).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        drop(listener);
        assert!(path.exists());
        remove_stale_socket(&path).unwrap();
        assert!(!path.exists());
        std::fs::write(&path, "precious").unwrap();
        assert!(remove_stale_socket(&path).is_err());
        assert!(path.exists());
    }

    #[test]
    fn a_client_is_known_as_long_as_its_socket_is_open() {
        let (one, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        let inode = socket_inode(one.as_raw_fd()).unwrap();
        assert!(open_socket_inodes().contains(&inode));
        drop(one);
        assert!(!open_socket_inodes().contains(&inode));
    }

    #[test]
    fn addresses_are_uris() {
        let tcp = NbdAddress::Tcp("[::1]:10809".parse().unwrap());
        assert_eq!(tcp.uri("r0/1"), "nbd://[::1]:10809/r0/1");
        assert_eq!(NbdAddress::Unix("/run/r.sock".into()).uri("r0"), "nbd+unix:///r0?socket=/run/r.sock");
    }
}
