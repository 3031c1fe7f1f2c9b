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

/// The front end and, for the log, why. Looks for the driver's control device.
///
/// # Errors
/// `Ublk` was demanded and is not available.
pub fn choose(preference: Preference) -> Result<(FrontendKind, String), NoUblk> {
    decide(preference, cfg!(feature = "ublk"), Path::new(UBLK_CONTROL).exists())
}

fn decide(preference: Preference, built: bool, driver: bool) -> Result<(FrontendKind, String), NoUblk> {
    let missing = match (built, driver) {
        (true, true) => None,
        (false, _) => Some("this program was built without the feature `ublk`".to_owned()),
        (true, false) => Some(format!("{UBLK_CONTROL} is missing: load the driver with `modprobe ublk_drv`")),
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
        assert_eq!(decide(Preference::Auto, true, true).unwrap().0, FrontendKind::Ublk);
        let (kind, why) = decide(Preference::Auto, true, false).unwrap();
        assert_eq!(kind, FrontendKind::Nbd);
        assert!(why.contains("modprobe ublk_drv"), "{why}");
        assert!(decide(Preference::Auto, false, true).unwrap().1.contains("feature `ublk`"));
        assert!(decide(Preference::Ublk, true, false).is_err());
        assert!(decide(Preference::Ublk, false, true).is_err());
        assert_eq!(decide(Preference::Nbd, true, true).unwrap().0, FrontendKind::Nbd);
    }
}
