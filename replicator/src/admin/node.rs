//! The daemon's resources and the verbs on them.
//!
//! A resource is either not here (never `up`, or `down`) or `Running`: an owner thread behind its
//! handle, and its NBD listeners. Verbs that make or unmake this hold the
//! resource's gate, one at a time; all others go straight to the core, so that `disconnect` works
//! while a `primary` waits. A verb whose deadline passes is dropped at an await between two steps, each
//! of which the core does whole; `up` and `down` can be repeated from any point.
use crate::admin::control::{ResourceVerb, VerbRequest};
use crate::admin::dependency::{self, Order, Place};
use crate::admin::outcome::{self, Failure, SS_DEVICE_IN_USE};
use crate::admin::plan::{self, LocalResource, LocalVolume, Source};
use crate::admin::process;
use crate::admin::view::{DeviceView, ResourceView};
use crate::core::config::ResourceConfig;
use crate::core::event::{AdminCommand, Refusal};
use crate::core::resize::ResizeOptions;
use crate::core::state::{ConnState, DiskState, ReplState};
use crate::core::status::ResourceStatus;
use crate::frontend::choice;
use crate::frontend::server::{ExportTable, ExportedResource, NbdServer, Scope};
#[cfg(feature = "ublk")]
use crate::frontend::ublk::{UblkDisks, VolumePlan};
use crate::runtime::ResourceHandle;
use crate::runtime::backing::grown::KnownSize;
use crate::runtime::backing::{AttachError, Backing};
use crate::units::{Sector, SectorCount, VolumeNr};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::broadcast;

/// Between two looks at something that has no event of its own.
const POLL: Duration = Duration::from_millis(20);
/// Between two looks at resyncs that others come after.
const DEPENDENCY_POLL: Duration = Duration::from_millis(300);
/// A resource that was told to go down must let go of its thread within this time.
const STOP_LIMIT: Duration = Duration::from_secs(15);

/// How a verb ends when it does not end well.
#[derive(Debug)]
pub enum VerbError {
    /// DRBD's number, facts, advice.
    Refused(Refusal),
    /// Exit code and text.
    Failed(Failure),
}

impl From<Refusal> for VerbError {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl From<Failure> for VerbError {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

/// One node: what the daemon knows.
#[derive(Debug)]
pub struct Node {
    source: Source,
    run_dir: PathBuf,
    frontend: choice::Preference,
    table: Arc<ExportTable>,
    resources: Mutex<BTreeMap<String, Arc<Running>>>,
    gates: Mutex<BTreeMap<String, Arc<tokio::sync::Mutex<()>>>>,
}

/// A resource that is up.
#[derive(Debug)]
struct Running {
    resource: LocalResource,
    /// What it acts by now.
    options: Mutex<ResourceConfig>,
    /// `resync-after` of the node's volumes, as the file had it when this was last configured.
    order: Mutex<Order>,
    /// Volumes that were told to wait, and for what.
    waiting: Mutex<BTreeMap<VolumeNr, Place>>,
    /// For notes that outlive a restart of the machine.
    state_dir: PathBuf,
    handle: ResourceHandle,
    exported: Arc<ExportedResource>,
    server: Mutex<Option<NbdServer>>,
    /// `None`: not the front end of this resource.
    #[cfg(feature = "ublk")]
    ublk: Option<Ublk>,
}

/// Block devices, and whether the operator insists on them.
#[cfg(feature = "ublk")]
#[derive(Debug)]
struct Ublk {
    disks: Arc<UblkDisks>,
    demanded: bool,
}

/// A poisoned lock here guards plain tables: what is in them is whole.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Running {
    fn name(&self) -> &str {
        self.handle.name()
    }

    /// Resyncs that wait for one of another resource.
    fn dependency_waits(&self) -> Vec<String> {
        let waiting = locked(&self.waiting);
        let line = |(nr, (name, first)): (&VolumeNr, &Place)| {
            format!("volume {}: resync-after {name}/{}, which resyncs or is paused", nr.0, first.0)
        };
        waiting.iter().map(line).collect()
    }

    async fn status(&self) -> Result<ResourceStatus, VerbError> {
        self.handle.status().await.ok_or_else(|| unknown_resource(self.name()).into())
    }

    #[cfg(feature = "ublk")]
    fn device_names(&self, volume: VolumeNr) -> impl Iterator<Item = String> + use<> {
        let names = self.ublk.as_ref().map(|ublk| ublk.disks.names(volume)).unwrap_or_default();
        names.into_iter().map(|name| name.display().to_string())
    }

    #[cfg(not(feature = "ublk"))]
    #[expect(clippy::unused_self, reason = "as with the feature")]
    fn device_names(&self, _volume: VolumeNr) -> std::iter::Empty<String> {
        std::iter::empty()
    }

    /// A volume with users is not demoted. (NBD clients are counted by the core.)
    #[cfg_attr(not(feature = "ublk"), expect(clippy::unused_async, reason = "as with the feature"))]
    async fn check_unused(&self) -> Result<(), Refusal> {
        #[cfg(feature = "ublk")]
        if let Some(ublk) = &self.ublk {
            ublk.disks.check_unused().await?;
        }
        Ok(())
    }

    /// Returns when block devices are there, or gone, as the role says.
    #[cfg_attr(not(feature = "ublk"), expect(clippy::unused_async, reason = "as with the feature"))]
    async fn settle_devices(&self) -> Result<(), VerbError> {
        #[cfg(feature = "ublk")]
        if let Some(ublk) = &self.ublk
            && let Err(missing) = ublk.disks.settle().await
        {
            let addresses: Vec<String> = locked(&self.server)
                .as_ref()
                .map(|server| server.addresses().iter().map(ToString::to_string).collect())
                .unwrap_or_default();
            let missing: Vec<String> = missing
                .iter()
                // Where ublk cannot be had, NBD is what was chosen; the log says so.
                .filter(|missing| ublk.demanded || !missing.unavailable)
                .map(|missing| format!("{}: Primary, but without a block device: {missing}\n", self.name()))
                .collect();
            if !missing.is_empty() {
                let text = format!(
                    "{}it is served over NBD: {}\nto try again: drbdadm primary {}\n",
                    missing.concat(),
                    addresses.join(" "),
                    self.name()
                );
                return Err(Failure::new(outcome::EXEC, text).into());
            }
        }
        Ok(())
    }

    /// Takes block devices away, whoever uses them.
    #[cfg_attr(not(feature = "ublk"), expect(clippy::unused_async, reason = "as with the feature"))]
    async fn close_devices(&self) {
        #[cfg(feature = "ublk")]
        if let Some(ublk) = &self.ublk {
            ublk.disks.close().await;
        }
    }

    async fn view(&self) -> Option<ResourceView> {
        let mut status = self.handle.status().await?;
        status.waiting_for.extend(self.dependency_waits());
        let addresses: Vec<_> =
            locked(&self.server).as_ref().map(|server| server.addresses().to_vec()).unwrap_or_default();
        let devices = self.resource.volumes.iter().map(|volume| {
            let name = self.exported.export_name(volume.nr);
            DeviceView {
                volume: volume.nr,
                minor: volume.minor,
                backing_dev: volume.disk.as_ref().map(|disk| disk.display().to_string()),
                exports: self
                    .device_names(volume.nr)
                    .chain(addresses.iter().map(|address| address.uri(&name)))
                    .collect(),
            }
        });
        Some(ResourceView {
            status,
            devices: devices.collect(),
            local_addr: self.resource.runtime.local_addr,
            peer_addr: self.resource.runtime.peer_addr,
            clients: self.exported.clients(),
        })
    }
}

impl Node {
    /// A node without running resources. `source` says where its configuration is, `run_dir` where its
    /// sockets go.
    #[must_use]
    pub fn new(source: Source, run_dir: &Path, frontend: choice::Preference) -> Self {
        Self {
            source,
            run_dir: run_dir.into(),
            frontend,
            table: Arc::default(),
            resources: Mutex::default(),
            gates: Mutex::default(),
        }
    }

    /// Where its configuration comes from.
    #[must_use]
    pub fn source(&self) -> &Source {
        &self.source
    }

    /// Its exports, for a listener of the whole node.
    #[must_use]
    pub fn exports(&self) -> &Arc<ExportTable> {
        &self.table
    }

    /// Names of the resources that are up.
    #[must_use]
    pub fn running(&self) -> Vec<String> {
        locked(&self.resources).keys().cloned().collect()
    }

    fn get(&self, name: &str) -> Option<Arc<Running>> {
        locked(&self.resources).get(name).cloned()
    }

    /// State of one resource, or of all that are up.
    ///
    /// # Errors
    /// The named one is not up.
    pub async fn status(&self, resource: Option<&str>) -> Result<Vec<ResourceView>, Failure> {
        let wanted: Vec<Arc<Running>> = match resource {
            None => locked(&self.resources).values().cloned().collect(),
            Some(name) => match self.get(name) {
                Some(running) => vec![running],
                None => return Err(Failure::new(outcome::CONFIG, format!("{name}: No such resource\n"))),
            },
        };
        let mut views = Vec::new();
        for running in wanted {
            views.extend(running.view().await);
        }
        Ok(views)
    }

    /// What the open waits of a resource are for.
    pub async fn waiting_for(&self, resource: &str) -> Vec<String> {
        match self.get(resource) {
            Some(running) => {
                let core = running.handle.status().await.map(|status| status.waiting_for);
                let mut waits = core.unwrap_or_default();
                waits.extend(running.dependency_waits());
                waits
            }
            None => Vec::new(),
        }
    }

    /// Keeps resyncs in the order of `resync-after`, for as long as the daemon lives.
    pub async fn keep_order(self: Arc<Self>) {
        let mut look = tokio::time::interval(DEPENDENCY_POLL);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            look.tick().await;
            self.settle_order().await;
        }
    }

    /// Tells every volume whether it waits for another one.
    async fn settle_order(&self) {
        let running: Vec<Arc<Running>> = locked(&self.resources).values().cloned().collect();
        if running.iter().all(|running| locked(&running.order).is_empty()) {
            return;
        }
        let mut busy = BTreeSet::new();
        for running in &running {
            let Some(status) = running.handle.status().await else { continue };
            let volumes = &status.connection.peer_volumes;
            let resyncing = volumes.iter().filter(|volume| dependency::is_busy(volume.replication));
            busy.extend(resyncing.map(|volume| (running.name().to_owned(), volume.volume)));
        }
        for running in &running {
            let order = locked(&running.order).clone();
            for volume in &running.resource.volumes {
                let place = (running.name().to_owned(), volume.nr);
                let first = order.waits_for(&place, |first| busy.contains(first)).cloned();
                let mut waiting = locked(&running.waiting);
                let waited = waiting.contains_key(&volume.nr);
                if first.is_some() == waited || running.handle.resync_dependency(volume.nr, first.is_some()) {
                    match first {
                        Some(first) => waiting.insert(volume.nr, first),
                        None => waiting.remove(&volume.nr),
                    };
                }
            }
        }
    }

    /// Carries out one verb. The deadline is the caller's.
    ///
    /// # Errors
    /// The core's refusal, or why it could not be asked.
    pub async fn verb(&self, request: &VerbRequest) -> Result<(), VerbError> {
        let name = &request.resource;
        tracing::info!(resource = %name, volume = request.volume.map(|volume| volume.0), verb = ?request.verb, "verb");
        match request.verb {
            ResourceVerb::Up { attach, connect } => {
                self.up(name, request.config.as_deref(), attach, connect).await
            }
            ResourceVerb::Down => self.down(name, false).await,
            ResourceVerb::Attach => {
                let _gate = self.gate(name).await;
                let running = self.known(name)?;
                for volume in running.chosen(request.volume)? {
                    attach(&running, volume).await?;
                }
                Ok(())
            }
            ResourceVerb::Detach { force } => {
                self.each_volume(request, |volume| AdminCommand::Detach { volume, force }).await
            }
            ResourceVerb::Connect { discard_my_data, tentative } => {
                self.admin(name, AdminCommand::Connect { discard_my_data, tentative }).await
            }
            ResourceVerb::Disconnect { force } => self.admin(name, AdminCommand::Disconnect { force }).await,
            ResourceVerb::Primary { force } => {
                self.admin(name, AdminCommand::Primary { force }).await?;
                // A script goes on to mount it.
                self.known(name)?.settle_devices().await
            }
            ResourceVerb::Secondary => {
                let running = self.known(name)?;
                running.check_unused().await?;
                self.admin(name, AdminCommand::Secondary).await?;
                running.settle_devices().await
            }
            ResourceVerb::Invalidate => self.each_volume(request, AdminCommand::Invalidate).await,
            ResourceVerb::InvalidateRemote => self.each_volume(request, AdminCommand::InvalidateRemote).await,
            ResourceVerb::InvalidateMarked => self.each_volume(request, AdminCommand::InvalidateMarked).await,
            ResourceVerb::InvalidateRemoteMarked => {
                self.each_volume(request, AdminCommand::InvalidateRemoteMarked).await
            }
            ResourceVerb::Verify { start, stop } => {
                self.each_volume(request, |volume| AdminCommand::Verify {
                    volume,
                    start: start.map(Sector),
                    stop: stop.map(Sector),
                })
                .await
            }
            ResourceVerb::PauseSync => self.each_volume(request, AdminCommand::PauseSync).await,
            ResourceVerb::ResumeSync => self.each_volume(request, AdminCommand::ResumeSync).await,
            ResourceVerb::Outdate => self.each_volume(request, AdminCommand::Outdate).await,
            ResourceVerb::NewCurrentUuid { clear_bitmap } => {
                self.each_volume(request, |volume| AdminCommand::NewCurrentUuid { volume, clear_bitmap })
                    .await
            }
            ResourceVerb::Resize { size_sectors, assume_clean, assume_peer_has_space, force } => {
                let options = ResizeOptions {
                    size: size_sectors.map(SectorCount),
                    assume_clean,
                    assume_peer_has_space,
                    shrink: force,
                };
                self.each_volume(request, |volume| AdminCommand::Resize { volume, options }).await
            }
            ResourceVerb::WaitConnect => self.wait(name, connected_or_never).await,
            ResourceVerb::WaitSync => self.wait(name, no_resync_to_here).await,
        }
    }

    fn known(&self, name: &str) -> Result<Arc<Running>, VerbError> {
        self.get(name).ok_or_else(|| unknown_resource(name).into())
    }

    /// Only one verb at a time makes or unmakes a resource.
    async fn gate(&self, name: &str) -> tokio::sync::OwnedMutexGuard<()> {
        let gate = Arc::clone(locked(&self.gates).entry(name.into()).or_default());
        gate.lock_owned().await
    }

    async fn admin(&self, name: &str, command: AdminCommand) -> Result<(), VerbError> {
        let running = self.known(name)?;
        let answer = running.handle.admin(command).await;
        answer.map_err(|refusal| with_users(refusal, &running).into())
    }

    async fn each_volume(
        &self,
        request: &VerbRequest,
        command: impl Fn(VolumeNr) -> AdminCommand,
    ) -> Result<(), VerbError> {
        let running = self.known(&request.resource)?;
        for volume in running.chosen(request.volume)? {
            let answer = running.handle.admin(command(volume.nr)).await;
            answer.map_err(|refusal| with_users(refusal, &running))?;
        }
        Ok(())
    }

    /// Brings up whatever is missing. Success when nothing is.
    async fn up(
        &self,
        name: &str,
        config: Option<&Path>,
        attach_disks: bool,
        connect: bool,
    ) -> Result<(), VerbError> {
        let _gate = self.gate(name).await;
        let running = match self.get(name) {
            Some(running) => {
                self.configure(&running, config).await?;
                running
            }
            None => self.start(name, config)?,
        };
        if attach_disks {
            let status = running.status().await?;
            for volume in running.resource.volumes.iter().filter(|volume| volume.disk.is_some()) {
                let diskless = status
                    .volumes
                    .iter()
                    .any(|own| own.volume == volume.nr && own.disk == DiskState::Diskless);
                if diskless {
                    attach(&running, volume).await?;
                }
            }
        }
        // Before the peer is met, or a resync would begin before it is told to wait.
        self.settle_order().await;
        if connect && running.status().await?.connection.connection == ConnState::StandAlone {
            running.handle.admin(AdminCommand::Connect { discard_my_data: false, tentative: false }).await?;
        }
        Ok(())
    }

    /// Reads the configuration anew and lets a running resource act by it, as far as it can while it runs.
    async fn configure(&self, running: &Running, config: Option<&Path>) -> Result<(), VerbError> {
        let name = running.name();
        let source = match config {
            Some(path) => Source { config: path.into(), ..self.source.clone() },
            None => self.source.clone(),
        };
        let loaded = plan::load(&source)?;
        if !loaded.names(&source.node).iter().any(|known| known == name) {
            // Gone from the file: it goes on as it is until it is taken down.
            return Ok(());
        }
        let LocalResource { order, runtime, .. } = plan::local(&loaded, name, &source.node, &self.run_dir)?;
        let core = runtime.core;
        order.check(name)?;
        *locked(&running.order) = order;
        if *locked(&running.options) == core {
            return Ok(());
        }
        let (net, volumes) = (Box::new(core.net.clone()), core.volumes.clone());
        let answer = running.handle.admin(AdminCommand::Configure { net, volumes }).await;
        answer.map_err(|refusal| with_users(refusal, running))?;
        *locked(&running.options) = core;
        Ok(())
    }

    /// Starts the owner thread and the listeners of a resource that is not here yet. The
    /// configuration is read anew, as drbdadm does: an edited file counts from the next `up`.
    fn start(&self, name: &str, config: Option<&Path>) -> Result<Arc<Running>, VerbError> {
        let source = match config {
            Some(path) => Source { config: path.into(), ..self.source.clone() },
            None => self.source.clone(),
        };
        let loaded = plan::load(&source)?;
        let mut resource = plan::local(&loaded, name, &source.node, &self.run_dir)?;
        resource.order.check(name)?;
        let config_path = source.config.display().to_string();
        resource.runtime.handlers.environment.push(("DRBD_CONF".into(), config_path));
        let preference = match resource.front_end {
            choice::Preference::Auto => self.frontend,
            own => own,
        };
        let (kind, why) = choice::choose(preference)
            .map_err(|error| Failure::new(outcome::EXEC, format!("{name}: {error}\n")))?;
        let handle = ResourceHandle::start(resource.runtime.clone(), &tokio::runtime::Handle::current())
            .map_err(|error| Failure::new(outcome::EXEC, format!("{name}: {}\n", with_causes(&error))))?;
        let volumes: Vec<VolumeNr> = resource.volumes.iter().map(|volume| volume.nr).collect();
        let exported = Arc::new(ExportedResource::new(name, &source.node, &volumes, &handle));
        // From here on the resource is in the table, so that a failure leaves something `down` can remove.
        #[cfg(feature = "ublk")]
        let ublk = (kind == choice::FrontendKind::Ublk).then(|| {
            let plan = |volume: &LocalVolume| VolumePlan {
                nr: volume.nr,
                minor: volume.minor,
                disk: volume.disk.clone(),
            };
            let volumes = resource.volumes.iter().map(plan).collect();
            let disks = UblkDisks::follow(name, &handle, resource.runtime.buffer_bytes, volumes);
            Ublk { disks, demanded: preference == choice::Preference::Ublk }
        });
        #[cfg(not(feature = "ublk"))]
        debug_assert_eq!(kind, choice::FrontendKind::Nbd, "ublk is not built in");
        let running = Arc::new(Running {
            options: Mutex::new(resource.runtime.core.clone()),
            order: Mutex::new(resource.order.clone()),
            waiting: Mutex::default(),
            resource,
            state_dir: process::state_dir(&self.run_dir),
            handle,
            exported: Arc::clone(&exported),
            server: Mutex::new(None),
            #[cfg(feature = "ublk")]
            ublk,
        });
        locked(&self.resources).insert(name.into(), Arc::clone(&running));
        self.table.insert(exported);
        let server = NbdServer::bind(&running.resource.nbd, &Scope::Resource(name.into()), &self.table)
            .map_err(|error| Failure::new(outcome::EXEC, format!("{name}: {error}\n")))?;
        let listens: Vec<String> = server.addresses().iter().map(ToString::to_string).collect();
        *locked(&running.server) = Some(server);
        tracing::info!(resource = name, front_end = %why, listens = %listens.join(" "), "resource is up");
        Ok(running)
    }

    /// Takes a resource down; success when it is not up. `evict` drops its users first.
    ///
    /// # Errors
    /// The core refuses (users, unless evicted), or the owner thread does not end.
    pub async fn down(&self, name: &str, evict: bool) -> Result<(), VerbError> {
        let _gate = self.gate(name).await;
        let Some(running) = self.get(name) else { return Ok(()) };
        if evict {
            for volume in &running.resource.volumes {
                running.handle.kick_clients(volume.nr);
            }
        } else {
            running.check_unused().await?;
        }
        loop {
            match running.handle.admin(AdminCommand::Down).await {
                Ok(()) => break,
                // Evicted users need a moment to be gone; the caller's deadline bounds this.
                Err(refusal) if evict && refusal.number == SS_DEVICE_IN_USE => tokio::time::sleep(POLL).await,
                Err(refusal) => return Err(with_users(refusal, &running).into()),
            }
        }
        // Before the thread that serves them ends.
        running.close_devices().await;
        self.table.remove(name);
        let server = locked(&running.server).take();
        if let Some(server) = server {
            server.stop().await;
        }
        let stopped = tokio::time::timeout(STOP_LIMIT, running.handle.clone().stop()).await;
        locked(&self.resources).remove(name);
        tracing::info!(resource = name, "resource is down");
        stopped.map_err(|_elapsed| {
            let text = format!("{name}: its thread did not end within {} s\n", STOP_LIMIT.as_secs());
            VerbError::Failed(Failure::new(outcome::EXEC, text))
        })
    }

    /// Waits until `done` says yes or "never".
    async fn wait(
        &self,
        name: &str,
        done: impl Fn(&ResourceStatus) -> Result<bool, Failure>,
    ) -> Result<(), VerbError> {
        let mut events = self.known(name)?.handle.subscribe();
        loop {
            // Looked up anew each time: waiting must not keep a resource from going down.
            let status = self.known(name)?.status().await?;
            if done(&status)? {
                return Ok(());
            }
            match events.recv().await {
                // Missed events only mean that it is time to look again.
                Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => {}
                Err(broadcast::error::RecvError::Closed) => return Err(unknown_resource(name).into()),
            }
        }
    }
}

impl Running {
    fn chosen(&self, volume: Option<VolumeNr>) -> Result<Vec<&LocalVolume>, VerbError> {
        let chosen: Vec<&LocalVolume> =
            self.resource.volumes.iter().filter(|own| volume.is_none_or(|nr| own.nr == nr)).collect();
        match (chosen.is_empty(), volume) {
            (true, Some(nr)) => {
                let text = format!("{}/{}: No such device\n", self.name(), nr.0);
                Err(Failure::new(outcome::CONFIG, text).into())
            }
            _ => Ok(chosen),
        }
    }
}

/// Opens the disk, reads its metadata and gives both to the core.
async fn attach(running: &Running, volume: &LocalVolume) -> Result<(), VerbError> {
    let object = format!("{}/{}", running.name(), volume.nr.0);
    let failed = |text: String| VerbError::Failed(Failure::new(outcome::CONFIG, text));
    let Some(disk) = volume.disk.clone() else {
        return Err(failed(format!("{object}: the configuration says `disk none` for this node\n")));
    };
    let status = running.status().await?;
    if status.volumes.iter().any(|own| own.volume == volume.nr && own.disk != DiskState::Diskless) {
        return Err(already_attached(&object).into());
    }
    let place = volume.backing_place().map_err(|text| failed(format!("{object}: {text}\n")))?;
    // Reading a bitmap takes a while: not on the control thread.
    let known = KnownSize::new(&running.state_dir, volume.minor, &disk);
    let opened = tokio::task::spawn_blocking(move || Backing::open_known(&disk, &place, Some(known))).await;
    let (backing, attached) = match opened {
        Ok(result) => result.map_err(|error| attach_refusal(&error, &object))?,
        Err(_panicked) => return Err(failed(format!("{object}: opening the disk failed\n"))),
    };
    for note in backing.notes() {
        tracing::warn!(resource = running.name(), volume = volume.nr.0, "{note}");
    }
    let block_bytes = attached.logical_block_bytes;
    running.handle.attach(volume.nr, backing, attached).await?;
    running.exported.set_block_bytes(volume.nr, block_bytes);
    #[cfg(feature = "ublk")]
    if let Some(ublk) = &running.ublk {
        ublk.disks.set_block_bytes(volume.nr, block_bytes);
    }
    Ok(())
}

fn already_attached(object: &str) -> Refusal {
    Refusal {
        number: outcome::ERR_DISK_CONFIGURED,
        text: "Device is attached to a disk (use detach first)".into(),
        facts: Vec::new(),
        advice: format!("drbdadm dstate {object}"),
    }
}

/// Why a disk cannot be used, with DRBD's number, and what to do about it.
fn attach_refusal(error: &AttachError, object: &str) -> Refusal {
    let number = i32::from(error.number());
    let (text, advice) = match number {
        104 => ("Can not open backing device", "check `disk` in the configuration"),
        105 => ("Can not open meta device", "check `meta-disk` in the configuration"),
        107 => {
            ("The backing device is neither a block device nor a file", "check `disk` in the configuration")
        }
        108 => {
            ("The meta device is neither a block device nor a file", "check `meta-disk` in the configuration")
        }
        111 | 112 => ("Device too small", "use a larger device"),
        114 => (
            "Can not claim the backing device: it is in use",
            "end its other use first; nothing overrides this",
        ),
        115 => {
            ("Can not claim the meta device: it is in use", "end its other use first; nothing overrides this")
        }
        118 => ("I/O error while reading meta-data", "look at the kernel log; replace the disk if it fails"),
        119 => ("No valid meta-data signature found", ""),
        165 => ("Unclean meta-data of another version", "apply it with the tool of that version"),
        _ => ("The disk cannot be used", ""),
    };
    let advice = if number == outcome::ERR_NO_META {
        format!("if this disk was never used for {object}: drbdadm create-md {object}")
    } else {
        advice.into()
    };
    Refusal { number, text: text.into(), facts: vec![with_causes(error)], advice }
}

fn unknown_resource(name: &str) -> Refusal {
    Refusal {
        number: outcome::ERR_RES_NOT_KNOWN,
        text: "Unknown resource".into(),
        facts: vec![format!("{name} is not up on this node")],
        advice: format!("drbdadm up {name}"),
    }
}

/// The core knows that the device is open; who has it open is known here.
fn with_users(mut refusal: Refusal, running: &Running) -> Refusal {
    if refusal.number == SS_DEVICE_IN_USE {
        refusal.facts.extend(running.exported.clients().into_iter().map(|user| format!("used by {user}")));
    }
    refusal
}

fn connected_or_never(status: &ResourceStatus) -> Result<bool, Failure> {
    match status.connection.connection {
        ConnState::Connected => Ok(true),
        ConnState::StandAlone => Err(Failure::new(
            outcome::WAIT_TIMED_OUT,
            format!(
                "{0}: is StandAlone and will not connect by itself\nnext: drbdadm connect {0}\n",
                status.name
            ),
        )),
        ConnState::Disconnecting
        | ConnState::Unconnected
        | ConnState::Timeout
        | ConnState::BrokenPipe
        | ConnState::NetworkFailure
        | ConnState::ProtocolError
        | ConnState::TearDown
        | ConnState::Connecting => Ok(false),
    }
}

#[expect(clippy::unnecessary_wraps, reason = "one signature for all waits")]
fn no_resync_to_here(status: &ResourceStatus) -> Result<bool, Failure> {
    let busy = |replication: ReplState| match replication {
        ReplState::StartingSyncT
        | ReplState::WFBitMapT
        | ReplState::WFSyncUUID
        | ReplState::SyncTarget
        | ReplState::PausedSyncT => true,
        ReplState::Off
        | ReplState::Established
        | ReplState::StartingSyncS
        | ReplState::WFBitMapS
        | ReplState::SyncSource
        | ReplState::VerifyS
        | ReplState::VerifyT
        | ReplState::PausedSyncS
        | ReplState::Ahead
        | ReplState::Behind => false,
    };
    Ok(!status.connection.peer_volumes.iter().any(|volume| busy(volume.replication)))
}

/// `error: cause: cause`.
pub(super) fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        // Some messages already end in their cause.
        if !text.ends_with(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}
