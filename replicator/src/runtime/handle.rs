//! The control plane's view of a resource: start its thread, command it, watch it, end it.
use super::backing::Backing;
use super::buffers::DEFAULT_POOL_BYTES;
use super::driver::{Context, Driver, Outside, Parts};
use super::handlers::HandlerPlan;
use super::inbox::{Inbox, Item};
use super::net::{self, NetConfig, Wish};
use super::ring::{Ring, RingError};
use crate::core::config::ResourceConfig;
use crate::core::event::{AdminCommand, Event, Refusal};
use crate::core::status::ResourceStatus;
use crate::frontend::nbd::Negotiated;
use crate::meta::Attached;
use crate::units::{SectorCount, VolumeNr};
use nix::sys::socket::{setsockopt, sockopt};
use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::sync::{broadcast, oneshot, watch};

/// Events kept for a subscriber that is slow.
const EVENTS_KEPT: usize = 1024;

/// What a resource needs to run.
#[derive(Clone, Debug)]
pub struct RuntimeConfig {
    /// What the core needs to know.
    pub core: ResourceConfig,
    /// Where this node listens for the peer, and from where it dials.
    pub local_addr: SocketAddr,
    /// Where the peer listens.
    pub peer_addr: SocketAddr,
    /// How long the thread looks for more work before it sleeps, microseconds; 0: not at all. It does so only while that
    /// finds something most of the time (`spin.rs`). Default 50.
    pub spin_us: u32,
    /// Whether blocks are sent to the peer with a CRC-32C. Default: yes. Heads, headers and bitmaps always have one; without
    /// it, damage to data on the way is found by a verify only.
    pub sums_blocks: bool,
    /// Bound on payload buffers, bytes. Default 256 MiB, at least 16 MiB.
    pub buffer_bytes: usize,
    /// The operator's handlers. Default: none.
    pub handlers: HandlerPlan,
}

impl RuntimeConfig {
    /// With defaults for what is not given.
    #[must_use]
    pub fn new(core: ResourceConfig, local_addr: SocketAddr, peer_addr: SocketAddr) -> Self {
        Self {
            core,
            local_addr,
            peer_addr,
            spin_us: 50,
            sums_blocks: true,
            buffer_bytes: DEFAULT_POOL_BYTES,
            handlers: HandlerPlan::default(),
        }
    }
}

/// Why a resource does not run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The address of the resource cannot be listened on.
    #[error("resource {resource} cannot listen on {address}: {}", explain_bind(source))]
    Listen {
        /// Which resource.
        resource: String,
        /// Where.
        address: SocketAddr,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// No io_uring.
    #[error("resource {resource} cannot do IO")]
    Ring {
        /// Which resource.
        resource: String,
        /// Why not.
        #[source]
        source: RingError,
    },
    /// No thread, or no descriptor.
    #[error("resource {resource} cannot start")]
    System {
        /// Which resource.
        resource: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

fn explain_bind(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrInUse => {
            "another process or resource listens there; give each resource its own port"
        }
        io::ErrorKind::AddrNotAvailable => {
            "no interface of this host has that address; check `on <host>` and the network"
        }
        io::ErrorKind::PermissionDenied => "no permission; ports below 1024 need CAP_NET_BIND_SERVICE",
        _ => "the system refuses",
    }
}

/// A running resource; clones stand for the same one. It ends with [`stop`](Self::stop), or with the last clone.
#[derive(Clone, Debug)]
pub struct ResourceHandle {
    running: Arc<Running>,
}

#[derive(Debug)]
struct Running {
    name: String,
    inbox: Arc<Inbox>,
    events: broadcast::Sender<Event>,
    exports: watch::Receiver<BTreeMap<VolumeNr, SectorCount>>,
    thread: Mutex<Option<JoinHandle<()>>>,
    connector: Mutex<Option<tokio::task::JoinHandle<()>>>,
}

impl ResourceHandle {
    /// Opens the resource's address and starts its thread. The resource is Secondary, without disks, StandAlone.
    ///
    /// # Errors
    /// What is missing, in words for the operator.
    pub fn start(config: RuntimeConfig, tokio: &tokio::runtime::Handle) -> Result<Self, StartError> {
        let name = config.core.name.clone();
        let listener = net::listen(config.local_addr).map_err(|source| StartError::Listen {
            resource: name.clone(),
            address: config.local_addr,
            source,
        })?;
        let system = |source: io::Error| StartError::System { resource: name.clone(), source };
        let inbox = Arc::new(Inbox::new().map_err(|errno| system(errno.into()))?);
        let inbox_fd = inbox.event_fd().map_err(system)?;
        let (events, _) = broadcast::channel(EVENTS_KEPT);
        let (exports_sender, exports) = watch::channel(BTreeMap::new());
        let (wish, wishes) = watch::channel(Wish::default());
        // The hasher's keys come from the system's random numbers.
        let seed = RandomState::new().hash_one((&name, config.local_addr));
        let net_config = NetConfig {
            resource: name.clone(),
            node_id: config.core.node_id,
            node_name: config.core.node_name.clone(),
            peer_node_id: config.core.peer_node_id,
            peer_name: config.core.peer_name.clone(),
            local_addr: config.local_addr,
            peer_addr: config.peer_addr,
            connect_int: Duration::from_millis(config.core.net.connect_int_ms),
            seed,
        };
        let parts = Parts {
            config: config.core,
            seed,
            spin_us: config.spin_us,
            sums_blocks: config.sums_blocks,
            buffer_bytes: config.buffer_bytes,
            inbox: Arc::clone(&inbox),
            handlers: config.handlers,
            inbox_fd,
            outside: Outside { events: events.clone(), exports: exports_sender, wish, tokio: tokio.clone() },
        };
        let (ready, is_ready) = mpsc::sync_channel(1);
        let thread = std::thread::Builder::new()
            .name(format!("res-{name}"))
            .spawn(move || run_thread(parts, &ready))
            .map_err(system)?;
        match is_ready.recv() {
            Ok(Ok(())) => {}
            Ok(Err(source)) => return Err(StartError::Ring { resource: name, source }),
            Err(_) => return Err(system(io::Error::other("its thread ended"))),
        }
        let connector = tokio.spawn(net::run(net_config, listener, wishes, Arc::clone(&inbox)));
        Ok(Self {
            running: Arc::new(Running {
                name,
                inbox,
                events,
                exports,
                thread: Mutex::new(Some(thread)),
                connector: Mutex::new(Some(connector)),
            }),
        })
    }

    /// Resource name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.running.name
    }

    /// Carries out an operator's verb; answers when it is done or refused.
    ///
    /// # Errors
    /// The refusal.
    pub async fn admin(&self, command: AdminCommand) -> Result<(), Refusal> {
        let (reply, answer) = oneshot::channel();
        self.push(Item::Admin { command, reply })?;
        answer.await.unwrap_or_else(|_| Err(self.ended()))
    }

    /// Gives a volume its backing disk.
    ///
    /// # Errors
    /// The refusal; the disk is closed then.
    pub async fn attach(
        &self,
        volume: VolumeNr,
        backing: Backing,
        attached: Attached,
    ) -> Result<(), Refusal> {
        let (reply, answer) = oneshot::channel();
        self.push(Item::Attach { volume, backing: Box::new(backing), attached: Box::new(attached), reply })?;
        answer.await.unwrap_or_else(|_| Err(self.ended()))
    }

    /// A snapshot; `None` once the resource has ended.
    pub async fn status(&self) -> Option<ResourceStatus> {
        let (reply, answer) = oneshot::channel();
        self.push(Item::Status(reply)).ok()?;
        answer.await.ok()
    }

    /// Operators' events from now on. (They are in the log as well.)
    #[must_use]
    pub fn subscribe(&self) -> broadcast::Receiver<Event> {
        self.running.events.subscribe()
    }

    /// What may be exported, with its size.
    #[must_use]
    pub fn exports(&self) -> watch::Receiver<BTreeMap<VolumeNr, SectorCount>> {
        self.running.exports.clone()
    }

    /// Takes over a client whose negotiation is finished. The socket may be in either blocking mode.
    ///
    /// # Errors
    /// The resource has ended or is choked; the socket is closed.
    pub fn add_nbd_client(
        &self,
        volume: VolumeNr,
        socket: OwnedFd,
        negotiated: Negotiated,
    ) -> Result<(), Refusal> {
        let flags = nix::fcntl::fcntl(&socket, nix::fcntl::FcntlArg::F_GETFL)
            .map(nix::fcntl::OFlag::from_bits_retain)
            .and_then(|flags| {
                let flags = flags - nix::fcntl::OFlag::O_NONBLOCK;
                nix::fcntl::fcntl(&socket, nix::fcntl::FcntlArg::F_SETFL(flags))
            });
        if let Err(errno) = flags {
            return Err(self.refuse(&format!("the socket cannot be used: {}", errno.desc())));
        }
        // Refused by unix sockets, which have no such delay.
        if let Err(errno) = setsockopt(&socket.as_fd(), sockopt::TcpNoDelay, &true) {
            tracing::trace!(%errno, "TCP_NODELAY");
        }
        self.push(Item::NbdClient { volume, socket, negotiated: Box::new(negotiated) })
    }

    /// Serves the queue of an added ublk device from now on, so that the device can be started. That ends when the device
    /// is stopped, and not by itself when the volume is no longer exported.
    ///
    /// # Errors
    /// The volume has a ublk disk already, no buffers are left, or the resource has ended; the queue is dropped.
    #[cfg(feature = "ublk")]
    pub async fn add_ublk(
        &self,
        volume: VolumeNr,
        queue: lockstep_ublk_frontend::Queue,
    ) -> Result<(), Refusal> {
        let (reply, answer) = oneshot::channel();
        self.push(Item::AddUblk { volume, queue: Box::new(queue), reply })?;
        answer.await.unwrap_or_else(|_| Err(self.ended()))
    }

    /// `resync-after`: whether this volume waits for another one; `false` when that could not be told.
    pub fn resync_dependency(&self, volume: VolumeNr, waits: bool) -> bool {
        self.push(Item::ResyncDependency { volume, waits }).is_ok()
    }

    /// Ends the NBD clients of a volume.
    pub fn kick_clients(&self, volume: VolumeNr) {
        if let Err(refusal) = self.push(Item::KickClients(volume)) {
            tracing::warn!(resource = self.name(), %refusal, "clients not kicked");
        }
    }

    /// Ends the thread: clients and the peer are dropped, what is in flight comes to its end. `Down` comes before it, if
    /// metadata is to be left clean.
    pub async fn stop(self) {
        if let Err(refusal) = self.push(Item::Stop) {
            tracing::warn!(resource = self.name(), %refusal, "cannot be told to stop");
        }
        let thread = self.running.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            let joined = tokio::task::spawn_blocking(move || thread.join()).await;
            if !matches!(joined, Ok(Ok(()))) {
                tracing::error!(resource = self.name(), "the resource's thread has failed");
            }
        }
        // The connector ends by itself: the thread held the other end of its channel.
        let connector = self.running.connector.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(connector) = connector
            && connector.await.is_err()
        {
            tracing::error!(resource = self.name(), "the connector has failed");
        }
    }

    fn push(&self, item: Item) -> Result<(), Refusal> {
        let has_ended = self
            .running
            .thread
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .as_ref()
            .is_none_or(JoinHandle::is_finished);
        if has_ended {
            return Err(self.ended());
        }
        self.running.inbox.push(item).map_err(|_| self.refuse("its inbox is full"))
    }

    fn ended(&self) -> Refusal {
        self.refuse("its thread has ended")
    }

    fn refuse(&self, why: &str) -> Refusal {
        Refusal {
            // "Resource unknown or not configured" comes nearest.
            number: 158,
            text: format!("resource {} does not take commands: {why}", self.name()),
            facts: Vec::new(),
            advice: "see the log of the daemon".into(),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // After `stop` nobody reads it any more; without it the thread ends on its own time.
        if self.inbox.push(Item::Stop).is_err() {
            tracing::warn!(resource = self.name, "cannot be told to stop");
        }
    }
}

fn run_thread(parts: Parts, ready: &mpsc::SyncSender<Result<(), RingError>>) {
    let name = parts.config.name.clone();
    let ring = match Ring::<Context>::new() {
        Ok(ring) => ring,
        Err(error) => {
            drop(ready.send(Err(error)));
            return;
        }
    };
    let driver = Driver::new(ring, parts);
    if ready.send(Ok(())).is_err() {
        return;
    }
    if let Err(error) = driver.run() {
        tracing::error!(resource = name, %error, "io_uring has failed; the resource stops");
    }
}
