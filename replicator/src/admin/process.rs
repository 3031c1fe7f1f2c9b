//! What the daemon does to its own process before any thread exists, and the run directory it owns.
//!
//! Everything here but the lock is best effort: a refused privilege is a warning that says what to
//! grant, because a daemon that runs without it still replicates correctly.
use nix::fcntl::{Flock, FlockArg};
use nix::sys::mman::{MlockAllFlags, mlockall};
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

/// Where the daemon of this user lives when nothing else is said: `/run/lockstep` for root, else
/// `$XDG_RUNTIME_DIR/lockstep`, else a directory of this user's own under the temporary directory.
#[must_use]
pub fn default_run_dir() -> PathBuf {
    let uid = nix::unistd::geteuid();
    if uid.is_root() {
        return "/run/lockstep".into();
    }
    std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| !dir.is_empty()).map_or_else(
        || std::env::temp_dir().join(format!("lockstep-{uid}")),
        |dir| PathBuf::from(dir).join("lockstep"),
    )
}

/// Where notes are kept that outlive a restart of the machine: DRBD's own place for a daemon in the usual
/// place, else the run directory.
#[must_use]
pub fn state_dir(run_dir: &Path) -> PathBuf {
    let usual = nix::unistd::geteuid().is_root() && run_dir == default_run_dir();
    if usual { "/var/lib/drbd".into() } else { run_dir.into() }
}

/// Prepares the process: no memory reclaim through our own device, no paging of the daemon, mounts of
/// our own so that the daemon never holds a mount of the device it serves. Call before any thread is
/// started. Answers what was refused, in words.
#[must_use]
pub fn prepare(lock_memory: bool) -> Vec<String> {
    let root = nix::unistd::geteuid().is_root();
    let mut warnings = Vec::new();
    if let Err(errno) = rustix::process::configure_io_flusher_behavior(true) {
        // Without root there is no ublk device and thus no reclaim through this process: not worth a word.
        if root {
            warnings.push(format!(
                "PR_SET_IO_FLUSHER was refused ({errno}): under memory pressure a local ublk user may block this daemon; grant CAP_SYS_RESOURCE"
            ));
        }
    }
    if root && lock_memory {
        if let Err(errno) = mlockall(MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE) {
            warnings.push(format!(
                "the daemon's memory could not be locked ({errno}): grant CAP_IPC_LOCK or raise RLIMIT_MEMLOCK, or say --no-mlock"
            ));
        }
    } else {
        tracing::debug!(root, lock_memory, "memory is not locked");
    }
    if root && let Err(errno) = own_mounts() {
        warnings.push(format!(
            "no mount namespace of its own ({errno}): do not mount a device of this daemon where the daemon sees it; grant CAP_SYS_ADMIN"
        ));
    }
    warnings
}

/// A mount namespace that still receives mounts (so /dev and backing disks stay right) but gives none.
///
/// Only where mounts are shared, as systemd has them: without that an unmount would not reach us either, and we would
/// keep alive what was mounted when we started, our own device and the peer's included.
fn own_mounts() -> nix::Result<()> {
    use nix::mount::{MsFlags, mount};
    if !root_is_shared(&std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default()) {
        tracing::debug!("mounts are not shared here: no mount namespace of our own");
        return Ok(());
    }
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS)?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_SLAVE, None::<&str>)
}

/// Whether the root mount of a `mountinfo` text passes mounts and unmounts on.
fn root_is_shared(mountinfo: &str) -> bool {
    // id, parent, device, root, mount point, options, then optional fields up to a dash. What was mounted last is on top.
    let root = mountinfo.lines().rfind(|line| line.split(' ').nth(4) == Some("/"));
    root.is_some_and(|line| {
        line.split(' ').skip(6).take_while(|field| *field != "-").any(|field| field.starts_with("shared:"))
    })
}

/// The run directory is taken, or cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunDirError {
    /// Another daemon lives here.
    #[error("{dir}: another lockstepd (pid {pid}) uses this run directory; stop it, or give this one its own --run-dir", dir = dir.display())]
    Taken {
        /// The directory.
        dir: PathBuf,
        /// Who has it; empty when it could not be read.
        pid: String,
    },
    /// It cannot be made or written.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// What failed.
        path: PathBuf,
        /// How.
        #[source]
        source: io::Error,
    },
}

/// The run directory, held by this process until dropped.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    _lock: Flock<File>,
}

impl RunDir {
    /// Makes the directory (mode 0700) when needed and takes its lock.
    ///
    /// # Errors
    /// Another daemon has it, or it cannot be made.
    pub fn take(path: &Path) -> Result<Self, RunDirError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| RunDirError::Io { path, source }
        };
        DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(failed(path))?;
        // Sockets have short names only when their path is absolute and known.
        let path = path.canonicalize().map_err(failed(path))?;
        let lock_path = path.join("lockstepd.pid");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&lock_path);
        let file = file.map_err(failed(&lock_path))?;
        let mut lock = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => lock,
            Err((mut file, nix::errno::Errno::EWOULDBLOCK)) => {
                let mut pid = String::new();
                let _unreadable_is_empty = file.read_to_string(&mut pid);
                return Err(RunDirError::Taken { dir: path, pid: pid.trim().into() });
            }
            Err((_, errno)) => return Err(failed(&lock_path)(errno.into())),
        };
        let written = lock
            .set_len(0)
            .and_then(|()| lock.rewind())
            .and_then(|()| writeln!(lock, "{}", std::process::id()));
        written.map_err(failed(&lock_path))?;
        Ok(Self { path, _lock: lock })
    }

    /// The directory, absolute.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shared_root_is_told_from_a_private_one() {
        let shared = "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n30 22 0:5 / /dev rw master:3 - devtmpfs d rw";
        assert!(root_is_shared(shared));
        assert!(!root_is_shared(
            "22 1 0:2 / / rw - 9p shared:1 rw\n30 22 0:5 / /dev rw shared:3 - devtmpfs d rw"
        ));
        assert!(!root_is_shared(&format!("{shared}\n40 22 0:9 / / rw master:1 - overlay o rw")));
        assert!(!root_is_shared(""));
    }

    #[test]
    fn a_run_directory_has_one_daemon() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deep/run");
        let first = RunDir::take(&path).unwrap();
        match RunDir::take(&path) {
            Err(RunDirError::Taken { pid, .. }) => assert_eq!(pid, std::process::id().to_string()),
            other => panic!("{other:?}"),
        }
        drop(first);
        assert!(RunDir::take(&path).is_ok());
    }
}
