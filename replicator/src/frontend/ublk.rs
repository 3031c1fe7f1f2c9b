//! ublk disks of a resource: there while the volume is exported, gone before its resource is.
//!
//! ```text
//!   exports of the core ──> task ──Some(size)──> add, serve on the resource's ring, start, link
//!                            ^  └──None────────> unlink, stop, delete
//!   primary, secondary, down ┘   (they wait for the task's work, so that a script finds what it was promised)
//! ```
//!
//! **Users.** The kernel does not tell a ublk server who opens its disk, so the core cannot count them. Before a demotion the
//! daemon looks itself: an exclusive open tells mounts, swap and stacked devices, `/proc` tells programs. What opens the disk
//! after that look finds errors, never data of another generation: the core refuses requests from the moment of the demotion.
//! A demotion without a verb (the end of the daemon) takes the disk away under its users, as the loss of a cable would.
//!
//! Work is done in tasks of its own: a verb that gives up waiting does not leave half a disk.
use crate::core::event::Refusal;
use crate::runtime::{self, ResourceHandle};
use crate::units::{SectorCount, VolumeNr};
use lockstep_ublk_frontend::links::{self, DeviceLinks};
use lockstep_ublk_frontend::{Device, DeviceConfig, UblkError, sweep_dead_devices};
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::watch;

/// Where the kernel makes device nodes, and links go.
const DEV_DIR: &str = "/dev";
/// A disk is written in units of at least this size, bytes: pages, and the bits of the bitmap.
const PHYSICAL_BLOCK_BYTES: u32 = 4096;
/// Programs that look at a new disk (udev, blkid) have it open for a moment: so many looks before it counts as used.
const USER_LOOKS: u32 = 10;
/// Between two looks.
const USER_LOOK_EVERY: Duration = Duration::from_millis(100);

/// What the configuration says of a volume.
#[derive(Clone, Debug)]
pub struct VolumePlan {
    /// Number.
    pub nr: VolumeNr,
    /// The N of `/dev/drbdN`.
    pub minor: u32,
    /// Backing disk, which decides whether discards are worth offering.
    pub disk: Option<PathBuf>,
}

/// A volume has no disk although it should.
#[derive(Debug, thiserror::Error)]
#[error("volume {}: {why}", volume.0)]
pub struct NoDisk {
    /// Which.
    pub volume: VolumeNr,
    /// Whether this machine cannot do ublk at all.
    pub unavailable: bool,
    why: String,
}

/// The disks of one resource.
#[derive(Debug)]
pub struct UblkDisks {
    resource: String,
    handle: ResourceHandle,
    buffer_bytes: usize,
    volumes: Vec<VolumePlan>,
    /// Logical block sizes as the attached disks have them, bytes.
    block_bytes: Mutex<BTreeMap<VolumeNr, u32>>,
    /// Held over all work on disks, so that one piece of it follows the other.
    started: tokio::sync::Mutex<BTreeMap<VolumeNr, Started>>,
    /// The same disks for who only wants their names.
    names: Mutex<BTreeMap<VolumeNr, Vec<PathBuf>>>,
}

/// A disk that users see.
#[derive(Debug)]
struct Started {
    device: Arc<Device>,
    links: Option<DeviceLinks>,
    size: SectorCount,
}

/// Which disks there are to be.
#[derive(Clone, Copy, Debug)]
enum Goal {
    /// One for each exported volume.
    AsExported,
    /// None, whoever uses them.
    None,
}

impl UblkDisks {
    /// No disks yet; they follow the exports of `handle` until its thread ends. `buffer_bytes` is the bound on the resource's
    /// buffers. Call on the control runtime.
    #[must_use]
    pub fn follow(
        resource: &str,
        handle: &ResourceHandle,
        buffer_bytes: usize,
        volumes: Vec<VolumePlan>,
    ) -> Arc<Self> {
        for volume in &volumes {
            links::remove_stale(Path::new(DEV_DIR), volume.minor, resource, u32::from(volume.nr.0));
        }
        let disks = Arc::new(Self {
            resource: resource.into(),
            handle: handle.clone(),
            buffer_bytes,
            volumes,
            block_bytes: Mutex::default(),
            started: tokio::sync::Mutex::default(),
            names: Mutex::default(),
        });
        let task = tokio::spawn(Arc::clone(&disks).watch(handle.exports()));
        // It ends with the resource's thread.
        drop(task);
        disks
    }

    /// Tells the logical block size of a volume's disk, bytes, once it is attached.
    pub fn set_block_bytes(&self, volume: VolumeNr, bytes: u32) {
        self.block_bytes.lock().unwrap_or_else(PoisonError::into_inner).insert(volume, bytes);
    }

    /// Device nodes and links of a volume; empty while it has no disk.
    #[must_use]
    pub fn names(&self, volume: VolumeNr) -> Vec<PathBuf> {
        let names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        names.get(&volume).cloned().unwrap_or_default()
    }

    /// Returns when the disks are what the exports say.
    ///
    /// # Errors
    /// One entry for each exported volume that has no disk.
    pub async fn settle(self: &Arc<Self>) -> Result<(), Vec<NoDisk>> {
        let disks = Arc::clone(self);
        let work = tokio::spawn(async move { disks.reconcile(Goal::AsExported).await });
        match work.await {
            Ok(failed) if failed.is_empty() => Ok(()),
            Ok(failed) => Err(failed),
            Err(error) => {
                tracing::error!(resource = self.resource, %error, "work on ublk disks has failed");
                Ok(())
            }
        }
    }

    /// Stops and deletes every disk, whoever uses it.
    pub async fn close(self: &Arc<Self>) {
        let disks = Arc::clone(self);
        let work = tokio::spawn(async move { disks.reconcile(Goal::None).await });
        if let Err(error) = work.await {
            tracing::error!(resource = self.resource, %error, "work on ublk disks has failed");
        }
    }

    /// Whoever uses one of the disks, one line each. Users that are gone within a second do not count.
    pub async fn users(&self) -> Vec<String> {
        let mut users = Vec::new();
        for look in 0..USER_LOOKS {
            if look > 0 {
                tokio::time::sleep(USER_LOOK_EVERY).await;
            }
            users = self.users_now().await;
            if users.is_empty() {
                break;
            }
        }
        users
    }

    /// Refuses while a disk is used, as DRBD does while its device is open.
    ///
    /// # Errors
    /// Who uses what.
    pub async fn check_unused(&self) -> Result<(), Refusal> {
        let users = self.users().await;
        if users.is_empty() {
            return Ok(());
        }
        Err(Refusal {
            number: -12,
            text: "Device is held open by someone".into(),
            facts: users,
            advice: "unmount it and end its users first".into(),
        })
    }

    async fn users_now(&self) -> Vec<String> {
        let started = self.started.lock().await;
        let mut users = Vec::new();
        for (volume, disk) in &*started {
            let device = Arc::clone(&disk.device);
            let found = tokio::task::spawn_blocking(move || users_of(&device)).await.unwrap_or_default();
            users.extend(found.into_iter().map(|user| format!("{}/{}: {user}", self.resource, volume.0)));
        }
        users
    }

    async fn watch(self: Arc<Self>, mut exports: watch::Receiver<BTreeMap<VolumeNr, SectorCount>>) {
        while exports.changed().await.is_ok() {
            exports.mark_unchanged();
            // Said in the log; a verb that waits hears it as well.
            let _said = self.reconcile(Goal::AsExported).await;
        }
        let _said = self.reconcile(Goal::None).await;
    }

    /// Which volumes remain without a disk, and why.
    async fn reconcile(&self, goal: Goal) -> Vec<NoDisk> {
        let mut started = self.started.lock().await;
        // Looked at under the lock: work that waited for it must not bring back what has ended meanwhile.
        let wanted = match goal {
            Goal::AsExported => self.handle.exports().borrow().clone(),
            Goal::None => BTreeMap::new(),
        };
        let ended: Vec<VolumeNr> =
            started.keys().filter(|volume| !wanted.contains_key(volume)).copied().collect();
        for volume in ended {
            if let Some(disk) = started.remove(&volume) {
                self.set_names(volume, Vec::new());
                self.remove(volume, disk).await;
            }
        }
        let mut failed = Vec::new();
        for (volume, size) in wanted {
            if let Some(disk) = started.get(&volume) {
                if disk.size != size {
                    // The kernel cannot resize it before Linux 6.16, and a new one would take it from its users.
                    tracing::warn!(
                        resource = self.resource,
                        volume = volume.0,
                        old_sectors = disk.size.0,
                        new_sectors = size.0,
                        "the volume's size has changed; its block device has the new one from the next `primary`"
                    );
                }
                continue;
            }
            match self.make(volume, size).await {
                Ok(disk) => {
                    let mut names = vec![disk.device.block_path()];
                    names.extend(disk.links.iter().flat_map(|links| links.paths().iter().cloned()));
                    tracing::info!(
                        resource = self.resource,
                        volume = volume.0,
                        ?names,
                        "block device is ready"
                    );
                    self.set_names(volume, names);
                    started.insert(volume, disk);
                }
                Err(error) => {
                    tracing::error!(resource = self.resource, %error, "no block device; the volume is served over NBD");
                    failed.push(error);
                }
            }
        }
        failed
    }

    fn set_names(&self, volume: VolumeNr, names: Vec<PathBuf>) {
        self.names.lock().unwrap_or_else(PoisonError::into_inner).insert(volume, names);
    }

    async fn make(&self, volume: VolumeNr, size: SectorCount) -> Result<Started, NoDisk> {
        let failed = |unavailable: bool, why: String| NoDisk { volume, unavailable, why };
        let from_driver = |error: UblkError| failed(error.is_unavailable(), with_causes(&error));
        let plan = self.volumes.iter().find(|plan| plan.nr == volume);
        let plan = plan.ok_or_else(|| failed(false, "not in the configuration".into()))?.clone();
        let config = self.device_config(&plan, size);
        let added = blocking(move || Device::add(config)).await.map_err(|why| failed(false, why))?;
        let (device, queue) = added.map_err(from_driver)?;
        if let Err(refusal) = self.handle.add_ublk(volume, queue).await {
            // Dropping the device deletes it.
            return Err(failed(false, format!("{refusal}: {}", refusal.facts.join("; "))));
        }
        let device = Arc::new(device);
        let starting = Arc::clone(&device);
        let begun = blocking(move || starting.start()).await.map_err(|why| failed(false, why))?;
        if let Err(error) = begun {
            self.remove(volume, Started { device, links: None, size }).await;
            return Err(from_driver(error));
        }
        let made = DeviceLinks::create(
            Path::new(DEV_DIR),
            plan.minor,
            &self.resource,
            u32::from(volume.0),
            &device.block_path(),
        );
        let links = made
            .inspect_err(|error| {
                let path = device.block_path();
                tracing::warn!(
                    resource = self.resource,
                    volume = volume.0,
                    "{}; the device has no name but {}",
                    with_causes(error),
                    path.display()
                );
            })
            .ok();
        Ok(Started { device, links, size })
    }

    fn device_config(&self, plan: &VolumePlan, size: SectorCount) -> DeviceConfig {
        let known = self.block_bytes.lock().unwrap_or_else(PoisonError::into_inner).get(&plan.nr).copied();
        let mut config = DeviceConfig::new(size.bytes());
        if let Some(bytes) = known {
            config.logical_block_bytes = bytes;
        }
        config.physical_block_bytes = PHYSICAL_BLOCK_BYTES.max(config.logical_block_bytes);
        config.queue_depth = runtime::queue_depth(self.buffer_bytes, self.volumes.len());
        config.max_io_bytes = runtime::MAX_IO_BYTES;
        config.max_discard_bytes = runtime::MAX_DISCARD_BYTES;
        config.discard_granularity_bytes = config.physical_block_bytes;
        // Without it a discard would be carried out as a write of zeroes: mkfs would fill both disks.
        config.discard = plan.disk.as_deref().is_some_and(takes_discards);
        config
    }

    /// Takes the names away first, then the disk.
    async fn remove(&self, volume: VolumeNr, disk: Started) {
        if let Some(links) = disk.links {
            links.remove();
        }
        let device = disk.device;
        let done = blocking(move || {
            // Timeouts included: the deletion is tried all the same, and goes on in the background.
            let stopped = device.stop();
            match Arc::try_unwrap(device) {
                Ok(device) => stopped.and(device.delete()),
                // A look for users is under way; the last owner deletes it.
                Err(_still_shared) => stopped,
            }
        });
        match done.await {
            Ok(Ok(())) => tracing::info!(resource = self.resource, volume = volume.0, "block device is gone"),
            Ok(Err(error)) => tracing::error!(
                resource = self.resource,
                volume = volume.0,
                error = with_causes(&error),
                "the block device does not end"
            ),
            Err(why) => tracing::error!(
                resource = self.resource,
                volume = volume.0,
                why,
                "the block device does not end"
            ),
        }
    }
}

/// Deletes what daemons that died left behind: dead devices, and links to them. At the start, before any disk is made.
pub fn sweep() {
    match sweep_dead_devices() {
        Ok(0) => {}
        Ok(count) => tracing::info!(count, "ublk devices of a daemon that died deleted"),
        Err(error) if error.is_unavailable() => tracing::debug!(%error, "no ublk"),
        Err(error) => tracing::warn!(
            error = with_causes(&error),
            "ublk devices left behind by a crash may still be there"
        ),
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, String> {
    tokio::task::spawn_blocking(work).await.map_err(|error| format!("a helper thread has failed: {error}"))
}

/// Whether the disk (a file counts as one that does) can deallocate blocks.
fn takes_discards(disk: &Path) -> bool {
    let Ok(metadata) = fs::metadata(disk) else { return false };
    if !metadata.file_type().is_block_device() {
        return true;
    }
    let device = metadata.rdev();
    let (major, minor) = (nix::sys::stat::major(device), nix::sys::stat::minor(device));
    let sysfs = PathBuf::from(format!("/sys/dev/block/{major}:{minor}"));
    // A partition's queue is its disk's.
    ["queue/discard_max_bytes", "../queue/discard_max_bytes"]
        .iter()
        .filter_map(|name| fs::read_to_string(sysfs.join(name)).ok())
        .any(|text| text.trim().parse::<u64>().is_ok_and(|bytes| bytes > 0))
}

/// Whoever uses the disk now.
fn users_of(device: &Device) -> Vec<String> {
    let path = device.block_path();
    let mut users = programs_with(Path::new("/proc"), &path);
    if device.is_held().unwrap_or(false) {
        // The daemon has a mount namespace of its own; the first process sees the machine's.
        let mounts = fs::read_to_string("/proc/1/mounts").unwrap_or_default();
        let places = mount_points(&mounts, &path);
        if places.is_empty() {
            users.push(format!(
                "{} is held by the kernel (a mount, swap, LVM, RAID or the like)",
                path.display()
            ));
        }
        users.extend(places.into_iter().map(|place| format!("{} is mounted on {place}", path.display())));
    }
    users
}

/// Processes below `proc_dir` that have `path` open.
fn programs_with(proc_dir: &Path, path: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(proc_dir) else { return Vec::new() };
    let mut users = Vec::new();
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Some(pid) = name.to_str().filter(|name| name.bytes().all(|byte| byte.is_ascii_digit())) else {
            continue;
        };
        // Links are read and not followed: looking at what they lead to could block.
        let Ok(fds) = fs::read_dir(entry.path().join("fd")) else { continue };
        if fds.flatten().any(|fd| fs::read_link(fd.path()).is_ok_and(|target| target == path)) {
            let command = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
            users.push(format!("{} is open in {} (pid {pid})", path.display(), command.trim_end()));
        }
    }
    users
}

/// Where `device` is mounted, from the text of a `mounts` file. A link to it counts: mount writes what it was given.
fn mount_points(mounts: &str, device: &Path) -> Vec<String> {
    let is_device = |source: &str| {
        source.starts_with('/')
            && (Path::new(source) == device || fs::canonicalize(source).is_ok_and(|found| found == device))
    };
    let fields = mounts.lines().filter_map(|line| {
        let mut fields = line.split(' ');
        Some((fields.next()?, fields.next()?))
    });
    fields.filter(|(source, _)| is_device(source)).map(|(_, place)| place.to_owned()).collect()
}

/// `error: cause: cause`.
fn with_causes(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn mounts_are_found_by_device_and_by_link() {
        let dir = tempfile::tempdir().unwrap();
        let device = dir.path().join("ublkb0");
        fs::write(&device, "").unwrap();
        let device = device.canonicalize().unwrap();
        let link = dir.path().join("drbd1");
        symlink(&device, &link).unwrap();
        let mounts = format!(
            "{} /mnt/a ext4 rw 0 0\n{} /mnt/b xfs rw 0 0\nproc /proc proc rw 0 0\n/dev/other /mnt/c ext4 rw 0 0\n\n",
            device.display(),
            link.display()
        );
        assert_eq!(mount_points(&mounts, &device), ["/mnt/a", "/mnt/b"]);
        assert!(mount_points("", &device).is_empty());
    }

    #[test]
    fn programs_are_found_by_what_they_have_open() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("disk");
        let open = fs::File::create(&file).unwrap();
        let file = file.canonicalize().unwrap();
        let users = programs_with(Path::new("/proc"), &file);
        let own = format!("(pid {})", std::process::id());
        assert!(matches!(users.as_slice(), [user] if user.ends_with(&own)), "{users:?}");
        drop(open);
        assert!(programs_with(Path::new("/proc"), &file).is_empty());
    }

    #[test]
    fn files_take_discards_and_what_is_not_there_does_not() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(takes_discards(file.path()));
        assert!(!takes_discards(Path::new("/nonexistent/disk")));
    }
}
