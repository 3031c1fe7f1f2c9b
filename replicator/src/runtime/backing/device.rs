//! Opening a block device or file for exclusive use, and what must be known about it.
//!
//! Exclusive means `O_EXCL` for block devices (the kernel refuses when a filesystem, a volume manager or
//! another daemon holds it) and an advisory lock for regular files. Neither can be overridden.
use nix::fcntl::{FallocateFlags, fallocate};
use nix::libc;
use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use thiserror::Error;

use super::io::AlignedBuf;

/// Why a device cannot be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// It cannot be opened.
    #[error("cannot open {}: {source}", .path.display())]
    Open {
        /// The device.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// Somebody holds it.
    #[error("{} is in use: {holder}", .path.display())]
    InUse {
        /// The device.
        path: PathBuf,
        /// Who, as far as known.
        holder: String,
    },
    /// Neither block device nor regular file.
    #[error("{} is neither a block device nor a regular file", .path.display())]
    NotADisk {
        /// The path.
        path: PathBuf,
    },
    /// IO failed.
    #[error("cannot {what} {}: {source}", .path.display())]
    Io {
        /// The device.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// The reason.
        source: io::Error,
    },
}

/// How a device is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Look only, whoever holds it.
    ReadShared,
    /// Read and write, nobody else.
    Exclusive,
    /// Read and write an indexed metadata device: other volumes of this process may hold it too.
    ExclusiveInProcess,
}

/// An open device.
#[derive(Debug)]
pub struct Device {
    /// Open with direct IO where possible; see [`Self::note`].
    pub file: File,
    /// As it was named.
    pub path: PathBuf,
    /// Block device, else regular file.
    pub is_block: bool,
    /// Size as it is; may be odd for a regular file.
    pub bytes: u64,
    /// Smallest unit and alignment of IO.
    pub logical_block_bytes: u32,
    /// Can deallocate ranges.
    pub can_discard: bool,
    /// Deallocated ranges read as zeroes.
    pub discard_zeroes: bool,
    /// Why IO is not direct, if it is not.
    pub note: Option<String>,
}

/// A claim is tried this often: a process just being started by another thread still has our closed
/// descriptors for a moment, and with them the claim, until it executes its program.
const CLAIM_ATTEMPTS: u32 = 10;
/// Time between two attempts; together they stay below a third of a second.
const CLAIM_PAUSE: Duration = Duration::from_millis(25);

/// Devices (device number, inode) that this process opened as indexed metadata. A device stays listed
/// after it was closed; opening it exclusively for something else strikes it off.
static INDEXED: Mutex<BTreeSet<(u64, u64)>> = Mutex::new(BTreeSet::new());

impl Device {
    /// Opens the device.
    ///
    /// # Errors
    /// See [`DeviceError`]; a device in use is reported with its holder.
    pub fn open(path: &Path, access: Access) -> Result<Self, DeviceError> {
        let failed = |source| DeviceError::Open { path: path.to_owned(), source };
        let found = fs::metadata(path).map_err(failed)?;
        let is_block = found.file_type().is_block_device();
        if !is_block && !found.is_file() {
            return Err(DeviceError::NotADisk { path: path.to_owned() });
        }
        let identity = if is_block { (0, found.rdev()) } else { (found.dev(), found.ino()) };
        let mut attempts = 1;
        let (file, note) = loop {
            match open_file(path, access, is_block, identity) {
                Err(DeviceError::InUse { .. }) if attempts < CLAIM_ATTEMPTS => attempts += 1,
                other => break other?,
            }
            #[expect(clippy::disallowed_methods, reason = "control threads may block")]
            std::thread::sleep(CLAIM_PAUSE);
        };
        let bytes = (&file).seek(SeekFrom::End(0)).map_err(|source| DeviceError::Io {
            path: path.to_owned(),
            what: "find the size of",
            source,
        })?;
        let mut device = Self {
            file,
            path: path.to_owned(),
            is_block,
            bytes,
            logical_block_bytes: 512,
            can_discard: false,
            discard_zeroes: false,
            note,
        };
        if is_block {
            let queue = Queue::of(found.rdev());
            device.logical_block_bytes = queue.number("logical_block_size").unwrap_or(512).max(512);
            device.can_discard = queue.number("discard_max_bytes").is_some_and(|max| max > 0);
            device.discard_zeroes = queue.number("write_zeroes_max_bytes").is_some_and(|max| max > 0);
        } else {
            device.logical_block_bytes = direct_alignment(&device.file);
            if access != Access::ReadShared {
                // A hole behind the end changes nothing, and tells whether holes can be punched at all.
                let behind = i64::try_from(bytes.next_multiple_of(4096)).unwrap_or(i64::MAX - 4096);
                let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                device.can_discard = fallocate(&device.file, punch, behind, 4096).is_ok();
                device.discard_zeroes = device.can_discard;
            }
        }
        Ok(device)
    }

    /// An IO error on this device.
    pub(super) fn failed(&self, what: &'static str) -> impl FnOnce(io::Error) -> DeviceError + '_ {
        move |source| DeviceError::Io { path: self.path.clone(), what, source }
    }

    /// Whether both are the same device or file.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        match (self.file.metadata(), other.file.metadata()) {
            (Ok(one), Ok(two)) if self.is_block && other.is_block => one.rdev() == two.rdev(),
            (Ok(one), Ok(two)) => (one.dev(), one.ino()) == (two.dev(), two.ino()),
            _ => false,
        }
    }
}

/// Opens and, unless only looked at, claims the device. Returns why IO is not direct, if it is not.
fn open_file(
    path: &Path,
    access: Access,
    is_block: bool,
    identity: (u64, u64),
) -> Result<(File, Option<String>), DeviceError> {
    let claims = access != Access::ReadShared;
    let exclusive = if is_block && claims { libc::O_EXCL } else { 0 };
    let open = |flags| OpenOptions::new().read(true).write(claims).custom_flags(flags | exclusive).open(path);
    let mut note = None;
    let opened = open(libc::O_DIRECT).or_else(|error| {
        if is_block || error.raw_os_error() != Some(libc::EINVAL) {
            return Err(error);
        }
        note = Some(format!(
            "{}: the filesystem refuses direct IO; using synchronous buffered IO",
            path.display()
        ));
        open(libc::O_DSYNC)
    });
    let in_use = || DeviceError::InUse { path: path.to_owned(), holder: holder_of(path, is_block, identity) };
    let mut registry = INDEXED.lock().unwrap_or_else(PoisonError::into_inner);
    let shares = access == Access::ExclusiveInProcess && registry.contains(&identity);
    let file = match opened {
        Ok(file) => file,
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
            let held = if shares { held_by_this_process(identity) } else { None };
            return held.map(|file| (file, None)).ok_or_else(in_use);
        }
        Err(source) => return Err(DeviceError::Open { path: path.to_owned(), source }),
    };
    if claims && !is_block {
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let held = if shares { held_by_this_process(identity) } else { None };
                return held.map(|file| (file, note)).ok_or_else(in_use);
            }
            Err(TryLockError::Error(source)) => {
                return Err(DeviceError::Io { path: path.to_owned(), what: "lock", source });
            }
        }
        if let Some(holder) = loop_or_swap_on(path) {
            return Err(DeviceError::InUse { path: path.to_owned(), holder });
        }
    }
    match access {
        Access::ReadShared => {}
        Access::Exclusive => {
            registry.remove(&identity);
        }
        Access::ExclusiveInProcess => {
            registry.insert(identity);
        }
    }
    Ok((file, note))
}

/// Another handle to a device that this process has open: shares its claim, which ends with the last one.
fn held_by_this_process(identity: (u64, u64)) -> Option<File> {
    let is_it = |found: &fs::Metadata| {
        let block = found.file_type().is_block_device() && identity == (0, found.rdev());
        block || identity == (found.dev(), found.ino())
    };
    for entry in fs::read_dir("/proc/self/fd").ok()?.flatten() {
        let Some(fd) = entry.file_name().to_str().and_then(|name| name.parse::<RawFd>().ok()) else {
            continue;
        };
        if !fs::metadata(entry.path()).is_ok_and(|found| is_it(&found)) {
            continue;
        }
        // SAFETY: takes and returns plain numbers; a descriptor closed meanwhile only gives an error.
        let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) };
        if copy < 0 {
            continue;
        }
        // SAFETY: the call above just made this descriptor, nobody else knows it.
        let copy = File::from(unsafe { OwnedFd::from_raw_fd(copy) });
        // The number may have been reused between the look and the copy. Only a writable handle is a claim.
        let flags = fs::read_to_string(format!("/proc/self/fdinfo/{}", copy.as_raw_fd())).ok()?;
        let writable = flags
            .lines()
            .find_map(|line| line.strip_prefix("flags:"))
            .and_then(|text| i32::from_str_radix(text.trim(), 8).ok())
            .is_some_and(|flags| flags & libc::O_ACCMODE == libc::O_RDWR);
        if writable && copy.metadata().is_ok_and(|found| is_it(&found)) {
            return Some(copy);
        }
    }
    None
}

/// The request-queue limits of a block device in sysfs.
struct Queue(PathBuf);

impl Queue {
    fn of(rdev: u64) -> Self {
        let device = sysfs_of(rdev);
        // A partition has none of its own.
        let own = device.join("queue");
        Self(if own.exists() { own } else { device.join("..").join("queue") })
    }

    fn number(&self, name: &str) -> Option<u32> {
        let text = fs::read_to_string(self.0.join(name)).ok()?;
        text.trim().parse::<u64>().ok().map(|value| u32::try_from(value).unwrap_or(u32::MAX))
    }
}

fn sysfs_of(rdev: u64) -> PathBuf {
    PathBuf::from(format!("/sys/dev/block/{}:{}", libc::major(rdev), libc::minor(rdev)))
}

/// The alignment that direct IO on a file needs: the smallest that works.
fn direct_alignment(file: &File) -> u32 {
    let mut buffer = AlignedBuf::zeroed(4096);
    let small = buffer.get_mut(..512).is_some_and(|place| file.read_at(place, 512).is_ok());
    if small { 512 } else { 4096 }
}

/// Who holds a device that refused to be claimed.
fn holder_of(path: &Path, is_block: bool, identity: (u64, u64)) -> String {
    if !is_block {
        return "another process has locked the file (a second daemon?)".to_owned();
    }
    let rdev = identity.1;
    let mut holders = block_holders(rdev);
    // A whole disk is also held through its partitions.
    for entry in fs::read_dir(sysfs_of(rdev)).into_iter().flatten().flatten() {
        if entry.path().join("partition").exists()
            && let Some(part) = device_number(&entry.path().join("dev"))
        {
            let name = entry.file_name().to_string_lossy().into_owned();
            holders
                .extend(block_holders(part).into_iter().map(|holder| format!("partition {name} {holder}")));
        }
    }
    holders.extend(swap_on(path));
    if holders.is_empty() { "another program holds it exclusively".to_owned() } else { holders.join(", ") }
}

fn device_number(path: &Path) -> Option<u64> {
    let text = fs::read_to_string(path).ok()?;
    let (major, minor) = text.trim().split_once(':')?;
    Some(libc::makedev(major.parse().ok()?, minor.parse().ok()?))
}

fn block_holders(rdev: u64) -> Vec<String> {
    let number = format!("{}:{}", libc::major(rdev), libc::minor(rdev));
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mut holders: Vec<String> = mounts
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ').skip(2);
            let (device, _root, place) = (fields.next()?, fields.next()?, fields.next()?);
            (device == number).then(|| format!("mounted on {place}"))
        })
        .collect();
    for entry in fs::read_dir(sysfs_of(rdev).join("holders")).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let mapped = fs::read_to_string(entry.path().join("dm/name")).unwrap_or_default();
        let mapped = if mapped.is_empty() { String::new() } else { format!(" ({})", mapped.trim()) };
        holders.push(format!("held by {name}{mapped}"));
    }
    holders
}

fn swap_on(path: &Path) -> Option<String> {
    let real = fs::canonicalize(path).ok()?;
    let swaps = fs::read_to_string("/proc/swaps").ok()?;
    let used = swaps
        .lines()
        .skip(1)
        .any(|line| line.split_whitespace().next().is_some_and(|first| Path::new(first) == real));
    used.then(|| "used as swap space".to_owned())
}

/// A loop device or swap space on a regular file: neither takes a lock.
fn loop_or_swap_on(path: &Path) -> Option<String> {
    let real = fs::canonicalize(path).ok()?;
    for entry in fs::read_dir("/sys/block").into_iter().flatten().flatten() {
        let backing = fs::read_to_string(entry.path().join("loop/backing_file")).unwrap_or_default();
        if Path::new(backing.trim_end_matches('\n')) == real {
            return Some(format!("loop device /dev/{} uses it", entry.file_name().to_string_lossy()));
        }
    }
    swap_on(path)
}
