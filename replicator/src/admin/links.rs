//! `install-links`: the names this program answers to.
use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};

/// The program's own name.
const OWN_NAME: &str = "lockstep";

/// The other names of `lockstep`.
pub const LINK_NAMES: [&str; 4] = ["lockstepd", "drbdadm", "drbdsetup", "drbdmeta"];

/// A link that could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LinkError {
    /// Something else has the name, for example DRBD's own tools.
    #[error("{path} exists and is not a link to lockstep; remove it or say --force", path = path.display())]
    Exists {
        /// What is in the way.
        path: PathBuf,
    },
    /// The file system said no.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// What failed.
        path: PathBuf,
        /// How.
        #[source]
        source: io::Error,
    },
}

/// Makes the links in `dir`, to `program`, its own name among them where it does not lie there itself; a
/// link beside the program is relative, so the directory can be moved. Looks at all names before it
/// touches one. Answers the links made.
///
/// # Errors
/// A name is taken by something else and `force` is not given, or the file system refuses.
pub fn install(program: &Path, dir: &Path, force: bool) -> Result<Vec<PathBuf>, LinkError> {
    let at = |path: &Path| {
        let path = path.to_owned();
        move |source| LinkError::Io { path, source }
    };
    let beside = program.parent().and_then(|parent| parent.canonicalize().ok()) == dir.canonicalize().ok();
    let target = match program.file_name() {
        Some(name) if beside => Path::new(name),
        _ => program,
    };
    let own = (!beside).then_some(OWN_NAME);
    let links: Vec<PathBuf> = own.iter().chain(&LINK_NAMES).map(|name| dir.join(name)).collect();
    for link in &links {
        let ours = || link.read_link().is_ok_and(|old| old.file_name() == Some(OsStr::new(OWN_NAME)));
        if link.symlink_metadata().is_ok() && !force && !ours() {
            return Err(LinkError::Exists { path: link.clone() });
        }
    }
    for link in &links {
        match std::fs::remove_file(link) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(at(link)(error)),
            Ok(()) | Err(_) => std::os::unix::fs::symlink(target, link).map_err(at(link))?,
        }
    }
    Ok(links)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_made_again_but_nothing_else_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("lockstep");
        std::fs::write(&program, "").unwrap();
        install(&program, dir.path(), false).unwrap();
        install(&program, dir.path(), false).unwrap();
        assert_eq!(dir.path().join("drbdadm").read_link().unwrap(), Path::new("lockstep"));

        let other = tempfile::tempdir().unwrap();
        std::fs::write(other.path().join("drbdmeta"), "DRBD's own").unwrap();
        let refused = install(&program, other.path(), false).unwrap_err();
        assert!(matches!(&refused, LinkError::Exists { path } if path.ends_with("drbdmeta")), "{refused}");
        assert!(!other.path().join("drbdadm").exists());
        install(&program, other.path(), true).unwrap();
        assert_eq!(other.path().join("drbdmeta").read_link().unwrap(), program);
        assert_eq!(other.path().join("lockstep").read_link().unwrap(), program);
        assert!(program.symlink_metadata().unwrap().is_file(), "the program itself was not touched");
    }
}
