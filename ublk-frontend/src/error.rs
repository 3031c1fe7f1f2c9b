//! What can go wrong with a device, worded for the operator who has to act.

use std::io;

use thiserror::Error;

use crate::config::ConfigError;

/// A device could not be added, started, stopped or deleted.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum UblkError {
    /// `/dev/ublk-control` is missing: the driver is not loaded, or the kernel has none.
    #[error(
        "the ublk driver is not there (no {path}): load it with `modprobe ublk_drv` (Linux 6.5 or later with \
         CONFIG_BLK_DEV_UBLK; some distributions keep it in an extra modules package); until then NBD is used instead"
    )]
    NoDriver {
        /// The device node that was looked for.
        path: &'static str,
    },
    /// The control device may not be opened by this user, or io_uring is forbidden.
    #[error("no permission for {path}: ublk needs CAP_SYS_ADMIN, and kernel.io_uring_disabled must be 0")]
    Permission {
        /// The device node that was opened.
        path: &'static str,
        /// The refusal.
        #[source]
        source: io::Error,
    },
    /// The driver is older than the commands this crate speaks.
    #[error(
        "the ublk driver of this kernel is too old (features {features:#x}): Linux 6.5 or later is needed"
    )]
    TooOld {
        /// Feature mask that the driver reported, 0 if it could not even be asked.
        features: u64,
    },
    /// This very kernel build is known to crash.
    #[error("kernel {release} is refused for ublk: {reason}; update the kernel, or use NBD")]
    BadKernel {
        /// `uname -r`.
        release: String,
        /// What it does.
        reason: &'static str,
    },
    /// The configuration breaks a rule of the driver.
    #[error("device configuration is not possible")]
    Config(#[from] ConfigError),
    /// A control command failed.
    #[error("ublk control command {command} failed")]
    Control {
        /// The driver's name of the command.
        command: &'static str,
        /// What the driver said.
        #[source]
        source: io::Error,
    },
    /// The driver took the parameters but did not keep all of them.
    #[error("the ublk driver dropped a device parameter without an error (asked and kept differ)")]
    ParamsDropped,
    /// The descriptor array of the queue could not be mapped.
    #[error("the descriptor array of {path} could not be mapped")]
    Map {
        /// The character device.
        path: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A command did not finish in time. It is still running; its thread ends when it does.
    #[error("{command} did not finish within {seconds} s: {hint}")]
    Timeout {
        /// What was being done.
        command: &'static str,
        /// The limit.
        seconds: u64,
        /// What it waits for.
        hint: &'static str,
    },
    /// The control thread could not be started.
    #[error("the ublk control thread could not be started")]
    Thread(#[source] io::Error),
    /// The control thread has ended, so the device is already gone.
    #[error("the ublk control thread has ended")]
    ThreadGone,
}

impl UblkError {
    /// Whether the machine has no usable driver at all, so that the caller should offer NBD.
    #[must_use]
    pub fn is_unavailable(&self) -> bool {
        matches!(
            self,
            Self::NoDriver { .. } | Self::Permission { .. } | Self::TooOld { .. } | Self::BadKernel { .. }
        )
    }
}

/// The system error inside an error of `libublk`.
pub(crate) fn to_io_error(error: libublk::UblkError) -> io::Error {
    use libublk::UblkError as Lib;
    match error {
        Lib::UringIOError(code) | Lib::OtherError(code) if code < 0 => io::Error::from_raw_os_error(-code),
        Lib::IOError(source) => source,
        other => io::Error::other(other.to_string()),
    }
}

/// Result of a control command; `libublk` passes `-EBUSY` as success.
pub(crate) fn control(
    command: &'static str,
    result: Result<i32, libublk::UblkError>,
) -> Result<(), UblkError> {
    match result {
        Ok(code) if code < 0 => {
            Err(UblkError::Control { command, source: io::Error::from_raw_os_error(-code) })
        }
        Ok(_) => Ok(()),
        Err(error) => Err(UblkError::Control { command, source: to_io_error(error) }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn busy_is_not_success() {
        let error = control("DEL_DEV", Ok(-16)).unwrap_err();
        assert!(matches!(&error, UblkError::Control { source, .. } if source.raw_os_error() == Some(16)));
        assert!(control("DEL_DEV", Ok(0)).is_ok());
    }

    #[test]
    fn the_system_error_is_found_in_every_form() {
        assert_eq!(to_io_error(libublk::UblkError::UringIOError(-22)).raw_os_error(), Some(22));
        assert_eq!(to_io_error(libublk::UblkError::OtherError(-2)).raw_os_error(), Some(2));
        assert_eq!(to_io_error(libublk::UblkError::QueueIsDown).kind(), io::ErrorKind::Other);
    }

    #[test]
    fn a_missing_driver_says_what_to_do() {
        let error = UblkError::NoDriver { path: crate::CONTROL_PATH };
        let text = error.to_string();
        for part in ["/dev/ublk-control", "modprobe ublk_drv", "CONFIG_BLK_DEV_UBLK", "NBD"] {
            assert!(text.contains(part), "{text}");
        }
        assert!(error.is_unavailable());
    }
}
