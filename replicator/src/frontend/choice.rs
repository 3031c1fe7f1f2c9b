//! Which front end a node uses: ublk when it can, NBD otherwise, and one clear line saying why.
use std::path::Path;

/// Device node through which the ublk driver is controlled.
pub const UBLK_CONTROL: &str = "/dev/ublk-control";

/// What the operator wants (`front-end`, `--frontend`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preference {
    /// ublk if possible.
    #[default]
    Auto,
    /// ublk or nothing.
    Ublk,
    /// NBD only.
    Nbd,
}

/// What it gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrontendKind {
    /// Block devices `/dev/ublkbN`; NBD listeners too.
    Ublk,
    /// NBD listeners.
    Nbd,
}

/// ublk was asked for and cannot be had.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the ublk front end was asked for, but {reason}")]
pub struct NoUblk {
    reason: String,
}

/// The front end and, for the log, why. Looks for the driver's control device, and whether it may be used.
///
/// # Errors
/// `Ublk` was demanded and is not available.
pub fn choose(preference: Preference) -> Result<(FrontendKind, String), NoUblk> {
    decide(preference, cfg!(feature = "ublk"), driver(Path::new(UBLK_CONTROL)))
}

/// What is there of the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Driver {
    Usable,
    Forbidden,
    Missing,
}

fn driver(control: &Path) -> Driver {
    let opened = std::fs::OpenOptions::new().read(true).write(true).open(control);
    match opened {
        Ok(_) => Driver::Usable,
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => Driver::Forbidden,
        Err(_) => Driver::Missing,
    }
}

fn decide(preference: Preference, built: bool, driver: Driver) -> Result<(FrontendKind, String), NoUblk> {
    let missing = match (built, driver) {
        (true, Driver::Usable) => None,
        (false, _) => Some("this program was built without the feature `ublk`".to_owned()),
        (true, Driver::Forbidden) => Some(format!("{UBLK_CONTROL} may not be opened: run as root")),
        (true, Driver::Missing) => {
            Some(format!("{UBLK_CONTROL} is missing: load the driver with `modprobe ublk_drv`"))
        }
    };
    match (preference, missing) {
        (Preference::Nbd, _) => Ok((FrontendKind::Nbd, "NBD, as configured".into())),
        (Preference::Auto | Preference::Ublk, None) => Ok((FrontendKind::Ublk, "ublk block devices".into())),
        (Preference::Auto, Some(reason)) => Ok((FrontendKind::Nbd, format!("NBD: {reason}"))),
        (Preference::Ublk, Some(reason)) => Err(NoUblk { reason }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auto_falls_back_and_says_why_but_a_demand_is_refused() {
        assert_eq!(decide(Preference::Auto, true, Driver::Usable).unwrap().0, FrontendKind::Ublk);
        let (kind, why) = decide(Preference::Auto, true, Driver::Missing).unwrap();
        assert_eq!(kind, FrontendKind::Nbd);
        assert!(why.contains("modprobe ublk_drv"), "{why}");
        assert!(decide(Preference::Auto, false, Driver::Usable).unwrap().1.contains("feature `ublk`"));
        assert!(decide(Preference::Auto, true, Driver::Forbidden).unwrap().1.contains("root"));
        assert!(decide(Preference::Ublk, true, Driver::Missing).is_err());
        assert!(decide(Preference::Ublk, false, Driver::Usable).is_err());
        assert_eq!(decide(Preference::Nbd, true, Driver::Usable).unwrap().0, FrontendKind::Nbd);
    }
}
