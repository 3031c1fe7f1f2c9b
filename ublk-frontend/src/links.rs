//! The names DRBD users look for: `/dev/drbdN` and `/dev/drbd/by-res/RES/VOL`, as links to the ublk disk.
//!
//! A machine may run the kernel's DRBD too, and several daemons. So a name is only taken when it is free, when it already is
//! our link, or when it is a link to a ublk disk that no longer exists (left by a crash). Anything else at that place — a
//! device node, a file, a link elsewhere, a link to a ublk disk that is alive — is left alone and reported. A name is
//! given back only if it still leads to our disk.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, symlink};
use std::path::{Component, Path, PathBuf};

use nix::sys::stat::{major, minor};
use thiserror::Error;
use tracing::warn;

/// Major number of the kernel's DRBD devices.
const DRBD_MAJOR: u64 = 147;

/// A name could not be linked to the disk.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum LinkError {
    /// The kernel's DRBD owns the name.
    #[error(
        "{path} is a device of the kernel's DRBD (minor {minor}); it is left alone, use {target} or another minor"
    )]
    RealDrbd {
        /// The name.
        path: PathBuf,
        /// Its minor number.
        minor: u64,
        /// The disk that was to be linked.
        target: PathBuf,
    },
    /// Something that is no link is in the way.
    #[error("{path} is there and not a link; it is left alone")]
    NotALink {
        /// The name.
        path: PathBuf,
    },
    /// A link that we did not make is in the way.
    #[error("{path} is a link to {found}, which is not a ublk disk; it is left alone")]
    Foreign {
        /// The name.
        path: PathBuf,
        /// Where it leads.
        found: PathBuf,
    },
    /// Another ublk disk, alive, has the name.
    #[error(
        "{path} is a link to {found}, which is in use; another daemon has a device with this minor or resource name"
    )]
    InUse {
        /// The name.
        path: PathBuf,
        /// Where it leads.
        found: PathBuf,
    },
    /// The resource name cannot be a file name.
    #[error("resource name {name:?} cannot be a file name")]
    BadName {
        /// The name.
        name: String,
    },
    /// A system call failed.
    #[error("{path} could not be {what}")]
    Io {
        /// The name.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// The links of one volume. Removing them is explicit ([`DeviceLinks::remove`]): a handle that is dropped leaves them, as a
/// crash would, and the next [`DeviceLinks::create`] replaces them.
#[derive(Debug)]
pub struct DeviceLinks {
    target: PathBuf,
    paths: Vec<PathBuf>,
    /// Upper end of the directories that are ours to tidy up.
    by_res: PathBuf,
}

impl DeviceLinks {
    /// Links `drbdMINOR` and `drbd/by-res/RESOURCE/VOLUME` below `dev_dir` (normally `/dev`) to `target` (`/dev/ublkbN`).
    ///
    /// Either both links are made or none.
    ///
    /// # Errors
    ///
    /// [`LinkError`]: a name is taken, or the directory cannot be written. The disk itself is not affected.
    pub fn create(
        dev_dir: &Path,
        minor: u32,
        resource: &str,
        volume: u32,
        target: &Path,
    ) -> Result<Self, LinkError> {
        // A path of exactly one plain component: no separator, not empty, not "." or "..".
        let mut components = Path::new(resource).components();
        let plain = matches!(components.next(), Some(Component::Normal(name)) if name == resource);
        if !plain || components.next().is_some() || resource.contains('\0') {
            return Err(LinkError::BadName { name: resource.to_owned() });
        }
        let by_res = dev_dir.join("drbd").join("by-res");
        let names = [dev_dir.join(format!("drbd{minor}")), by_res.join(resource).join(volume.to_string())];
        let mut links = Self { target: target.to_owned(), paths: Vec::new(), by_res };
        for path in names {
            if let Err(error) = links.create_one(&path) {
                links.remove();
                return Err(error);
            }
            links.paths.push(path);
        }
        Ok(links)
    }

    /// The links, in the order they were made: the minor's, then the resource's.
    #[must_use]
    pub fn paths(&self) -> &[PathBuf] {
        &self.paths
    }

    /// Removes the links that still lead to our disk, and the directories that became empty. Failures are logged only: a stale
    /// link is replaced by the next one.
    pub fn remove(self) {
        for path in &self.paths {
            if fs::read_link(path).is_ok_and(|found| found == self.target)
                && let Err(error) = fs::remove_file(path)
            {
                warn!(path = %path.display(), %error, "device link could not be removed");
            }
        }
        // RES, by-res, drbd: innermost first; one that is not empty, or not there, ends the climb.
        let Some(resource_dir) = self.paths.get(1).and_then(|path| path.parent()) else { return };
        let drbd_dir = self.by_res.parent();
        for dir in [Some(resource_dir), Some(self.by_res.as_path()), drbd_dir].into_iter().flatten() {
            if fs::remove_dir(dir).is_err() {
                return;
            }
        }
    }

    fn create_one(&self, path: &Path) -> Result<(), LinkError> {
        let failed = |what| move |source| LinkError::Io { path: path.to_owned(), what, source };
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir).map_err(failed("given a directory"))?;
        }
        // Creating a link fails if the name exists, whatever it is: nothing can be overwritten in between.
        match symlink(&self.target, path) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(failed("made a link")(error)),
        }
        let metadata = fs::symlink_metadata(path).map_err(failed("looked at"))?;
        if !metadata.is_symlink() {
            return Err(self.occupied(path, &metadata));
        }
        let found = fs::read_link(path).map_err(failed("read as a link"))?;
        if found == self.target {
            return Ok(());
        }
        if !is_ublk_disk(&found) {
            return Err(LinkError::Foreign { path: path.to_owned(), found });
        }
        // Relative links are resolved from the link's own directory, as the kernel does.
        if path.parent().is_some_and(|dir| dir.join(&found).exists()) {
            return Err(LinkError::InUse { path: path.to_owned(), found });
        }
        // Stale and ours. A rename replaces it in one step, so a reader sees the old link or the new one.
        let mut temporary = path.as_os_str().to_owned();
        temporary.push(format!(".lockstep-{}", std::process::id()));
        let temporary = PathBuf::from(temporary);
        symlink(&self.target, &temporary).map_err(failed("made a link"))?;
        fs::rename(&temporary, path).map_err(|source| {
            // Best effort: what is left has a name that nobody looks up.
            let _leftover = fs::remove_file(&temporary);
            failed("replaced")(source)
        })
    }

    /// The error for a name that is taken by something else than a link.
    fn occupied(&self, path: &Path, metadata: &fs::Metadata) -> LinkError {
        let device = metadata.rdev();
        if metadata.file_type().is_block_device() && major(device) == DRBD_MAJOR {
            LinkError::RealDrbd { path: path.to_owned(), minor: minor(device), target: self.target.clone() }
        } else {
            LinkError::NotALink { path: path.to_owned() }
        }
    }
}

/// Removes the links of one volume that a crash left behind: those to a ublk disk that no longer exists. Everything else is
/// left alone. To be called when the volume is brought up: the number of the dead disk may be given to another volume, to which
/// the old name must not lead.
pub fn remove_stale(dev_dir: &Path, minor: u32, resource: &str, volume: u32) {
    let by_res = dev_dir.join("drbd").join("by-res").join(resource).join(volume.to_string());
    for path in [dev_dir.join(format!("drbd{minor}")), by_res] {
        let Ok(found) = fs::read_link(&path) else { continue };
        let is_dead = is_ublk_disk(&found) && path.parent().is_some_and(|dir| !dir.join(&found).exists());
        if is_dead && let Err(error) = fs::remove_file(&path) {
            warn!(path = %path.display(), %error, "stale device link could not be removed");
        }
    }
}

/// Whether a link's target has the name of a ublk disk: `ublkbN` as its last component.
fn is_ublk_disk(target: &Path) -> bool {
    target
        .file_name()
        .and_then(|name| name.to_str())
        .and_then(|name| name.strip_prefix("ublkb"))
        .is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory in place of `/dev`, with a live disk 0 and a live disk 1 in it.
    fn dev() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for disk in ["ublkb0", "ublkb1"] {
            fs::write(dir.path().join(disk), "").unwrap();
        }
        dir
    }

    fn create(dev: &Path, disk: &str) -> Result<DeviceLinks, LinkError> {
        DeviceLinks::create(dev, 1, "web-root", 0, &dev.join(disk))
    }

    #[test]
    fn links_come_and_go_with_their_directories() {
        let dev = dev();
        let links = create(dev.path(), "ublkb0").unwrap();
        let by_res = dev.path().join("drbd/by-res/web-root/0");
        assert_eq!(links.paths(), [dev.path().join("drbd1"), by_res.clone()]);
        assert_eq!(fs::read_link(dev.path().join("drbd1")).unwrap(), dev.path().join("ublkb0"));
        assert_eq!(fs::read_link(&by_res).unwrap(), dev.path().join("ublkb0"));
        links.remove();
        assert!(!dev.path().join("drbd1").is_symlink());
        assert!(!dev.path().join("drbd").exists());
    }

    #[test]
    fn directories_of_other_resources_stay() {
        let dev = dev();
        let first = create(dev.path(), "ublkb0").unwrap();
        let second = DeviceLinks::create(dev.path(), 2, "mail", 0, &dev.path().join("ublkb1")).unwrap();
        first.remove();
        assert!(!dev.path().join("drbd/by-res/web-root").exists());
        assert!(dev.path().join("drbd/by-res/mail/0").exists());
        second.remove();
        assert!(!dev.path().join("drbd").exists());
    }

    #[test]
    fn two_volumes_share_a_directory() {
        let dev = dev();
        let first = create(dev.path(), "ublkb0").unwrap();
        let second = DeviceLinks::create(dev.path(), 2, "web-root", 1, &dev.path().join("ublkb1")).unwrap();
        first.remove();
        assert!(dev.path().join("drbd/by-res/web-root/1").exists());
        second.remove();
    }

    #[test]
    fn making_the_same_link_again_is_no_error() {
        let dev = dev();
        let _first = create(dev.path(), "ublkb0").unwrap();
        create(dev.path(), "ublkb0").unwrap().remove();
        assert!(!dev.path().join("drbd1").is_symlink());
    }

    #[test]
    fn a_link_left_by_a_crash_is_replaced() {
        let dev = dev();
        let _crashed = create(dev.path(), "ublkb0").unwrap();
        fs::remove_file(dev.path().join("ublkb0")).unwrap();
        let links = create(dev.path(), "ublkb1").unwrap();
        assert_eq!(fs::read_link(&links.paths()[0]).unwrap(), dev.path().join("ublkb1"));
        assert_eq!(fs::read_link(&links.paths()[1]).unwrap(), dev.path().join("ublkb1"));
        let names: Vec<_> =
            fs::read_dir(dev.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert!(names.iter().all(|name| !name.to_string_lossy().contains("lockstep")), "{names:?}");
    }

    #[test]
    fn stale_links_are_removed_and_no_others() {
        let dev = dev();
        let links = create(dev.path(), "ublkb0").unwrap();
        remove_stale(dev.path(), 1, "web-root", 0);
        assert!(links.paths().iter().all(|path| path.is_symlink()), "the disk is alive");
        fs::remove_file(dev.path().join("ublkb0")).unwrap();
        remove_stale(dev.path(), 2, "mail", 0);
        assert!(links.paths().iter().all(|path| path.is_symlink()), "of another volume");
        remove_stale(dev.path(), 1, "web-root", 0);
        assert!(!links.paths().iter().any(|path| path.is_symlink()));
        symlink("loop7", dev.path().join("drbd1")).unwrap();
        remove_stale(dev.path(), 1, "web-root", 0);
        assert!(dev.path().join("drbd1").is_symlink(), "not one of ours");
    }

    #[test]
    fn a_link_to_a_live_disk_is_left_alone() {
        let dev = dev();
        let _other = create(dev.path(), "ublkb0").unwrap();
        assert!(matches!(create(dev.path(), "ublkb1"), Err(LinkError::InUse { .. })));
        assert_eq!(fs::read_link(dev.path().join("drbd1")).unwrap(), dev.path().join("ublkb0"));
    }

    #[test]
    fn a_link_elsewhere_is_left_alone() {
        let dev = dev();
        for elsewhere in ["loop0", "ublkb", "ublkbx", "../../drbd7"] {
            symlink(elsewhere, dev.path().join("drbd1")).unwrap();
            assert!(matches!(create(dev.path(), "ublkb0"), Err(LinkError::Foreign { .. })), "{elsewhere}");
            assert_eq!(fs::read_link(dev.path().join("drbd1")).unwrap(), Path::new(elsewhere));
            fs::remove_file(dev.path().join("drbd1")).unwrap();
        }
    }

    #[test]
    fn a_file_is_left_alone() {
        let dev = dev();
        fs::write(dev.path().join("drbd1"), "precious").unwrap();
        assert!(matches!(create(dev.path(), "ublkb0"), Err(LinkError::NotALink { .. })));
        assert_eq!(fs::read_to_string(dev.path().join("drbd1")).unwrap(), "precious");
    }

    #[test]
    #[expect(clippy::print_stdout, reason = "a skipped test says why")]
    fn a_real_drbd_device_is_left_alone() {
        use nix::sys::stat::{Mode, SFlag, makedev, mknod};
        let dev = dev();
        let path = dev.path().join("drbd1");
        if let Err(errno) = mknod(&path, SFlag::S_IFBLK, Mode::S_IRUSR, makedev(DRBD_MAJOR, 1)) {
            println!("skipped: cannot make a device node: {errno}");
            return;
        }
        let error = create(dev.path(), "ublkb0").unwrap_err();
        assert!(matches!(error, LinkError::RealDrbd { minor: 1, .. }), "{error}");
        assert!(fs::symlink_metadata(&path).unwrap().file_type().is_block_device());
    }

    #[test]
    fn the_second_name_failing_takes_back_the_first() {
        let dev = dev();
        fs::create_dir_all(dev.path().join("drbd/by-res/web-root")).unwrap();
        fs::write(dev.path().join("drbd/by-res/web-root/0"), "").unwrap();
        assert!(matches!(create(dev.path(), "ublkb0"), Err(LinkError::NotALink { .. })));
        assert!(!dev.path().join("drbd1").is_symlink());
    }

    #[test]
    fn a_link_taken_over_by_somebody_else_is_not_removed() {
        let dev = dev();
        let links = create(dev.path(), "ublkb0").unwrap();
        fs::remove_file(dev.path().join("drbd1")).unwrap();
        symlink("elsewhere", dev.path().join("drbd1")).unwrap();
        links.remove();
        assert_eq!(fs::read_link(dev.path().join("drbd1")).unwrap(), Path::new("elsewhere"));
    }

    #[test]
    fn names_cannot_leave_the_directory() {
        let dev = dev();
        for name in ["", ".", "..", "a/b", "/etc", "../x", "a/", "a\0b"] {
            let result = DeviceLinks::create(dev.path(), 1, name, 0, &dev.path().join("ublkb0"));
            assert!(matches!(result, Err(LinkError::BadName { .. })), "{name:?}");
        }
    }
}
