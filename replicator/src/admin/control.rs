//! The control socket's language: one JSON value per line, bounded, versioned.
//!
//! A client connects, sends one [`Request`] and reads [`Reply`]s until a final one. Progress and
//! warnings come before it, and so does one reply per resource of a status. The daemon carries a verb to its end even when the client goes away, so an
//! interrupted command leaves a defined state: the verb is done or was refused, `status` tells which.
use crate::admin::view::ResourceView;
use crate::core::event::Refusal;
use crate::units::VolumeNr;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Version of this language. Another version is refused with both numbers.
pub const CONTROL_VERSION: u32 = 1;
/// Longest line in either direction, bytes, without its newline.
pub const MAX_LINE_BYTES: usize = 1024 * 1024;
/// Name of the socket in the run directory.
pub const SOCKET_NAME: &str = "control.sock";

/// A line of either direction: a version and a body.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Versioned<T> {
    v: u32,
    body: T,
}

/// What a client asks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// Who are you?
    Info,
    /// State of one resource or of all that are up.
    Status {
        /// Resource name.
        resource: Option<String>,
    },
    /// Do something with one resource.
    Verb(VerbRequest),
}

/// One verb on one resource.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct VerbRequest {
    /// Resource name.
    pub resource: String,
    /// Only this volume; `None` = every volume of the resource.
    pub volume: Option<VolumeNr>,
    /// What to do.
    pub verb: ResourceVerb,
    /// Give up after this many milliseconds; `None` = never.
    pub timeout_ms: Option<u64>,
    /// Configuration to take the resource from when it is not up; `None` = the daemon's own.
    pub config: Option<PathBuf>,
}

/// Verbs the daemon carries out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum ResourceVerb {
    /// Start, attach, connect: whatever is missing.
    Up {
        /// Attach disks that are not.
        attach: bool,
        /// Connect when StandAlone.
        connect: bool,
    },
    /// Disconnect, demote, detach, stop.
    Down,
    /// Use the backing disk.
    Attach,
    /// Let go of the backing disk.
    Detach {
        /// Do not wait for IO in flight.
        force: bool,
    },
    /// Start to connect.
    Connect {
        /// One-shot: my changes lose.
        discard_my_data: bool,
        /// Only say what would happen.
        tentative: bool,
    },
    /// End the connection.
    Disconnect {
        /// Skip the graceful checks.
        force: bool,
    },
    /// Become Primary.
    Primary {
        /// Declare local data UpToDate if need be.
        force: bool,
    },
    /// Become Secondary.
    Secondary,
    /// Full resync from the peer.
    Invalidate,
    /// Full resync to the peer.
    InvalidateRemote,
    /// Resync of the marked blocks from the peer.
    InvalidateMarked,
    /// Resync of the marked blocks to the peer.
    InvalidateRemoteMarked,
    /// Compare both copies.
    Verify {
        /// From this sector; `None` = where an interrupted one stopped, else from the start.
        start: Option<u64>,
        /// To this sector; `None` = the end.
        stop: Option<u64>,
    },
    /// Let a resync stand still.
    PauseSync,
    /// End `PauseSync`.
    ResumeSync,
    /// Mark local data outdated.
    Outdate,
    /// New generation.
    NewCurrentUuid {
        /// Skip the initial sync.
        clear_bitmap: bool,
    },
    /// Take the size the backing disks have now, or another one.
    Resize {
        /// Sectors; all that both disks hold when not given.
        size_sectors: Option<u64>,
        /// The new area is the same on both nodes.
        assume_clean: bool,
        /// Grow without asking the peer.
        assume_peer_has_space: bool,
        /// A smaller size is meant.
        force: bool,
    },
    /// Until Connected.
    WaitConnect,
    /// Until no resync to this node runs.
    WaitSync,
}

/// What the daemon says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct DaemonInfo {
    /// Its process id.
    pub pid: u32,
    /// Program version.
    pub version: String,
    /// The node it acts as.
    pub node: String,
    /// Its configuration file, absolute.
    pub config: PathBuf,
}

/// What the daemon answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reply {
    /// Not the end: what the verb waits for, in words.
    Progress(String),
    /// Not the end: worth a line on stderr.
    Warning(String),
    /// Answer to [`Request::Info`].
    Info(DaemonInfo),
    /// Not the end: one resource of the answer to [`Request::Status`].
    Resource(Box<ResourceView>),
    /// The verb is done, or the list of resources is complete.
    Done,
    /// The core, or a disk, said no.
    Refused(Refusal),
    /// It could not be carried out: exit code and text.
    Failed {
        /// Exit code.
        exit: u8,
        /// For stderr.
        text: String,
    },
}

impl Reply {
    /// Whether nothing follows.
    #[must_use]
    pub const fn is_final(&self) -> bool {
        !matches!(self, Self::Progress(_) | Self::Warning(_) | Self::Resource(_))
    }
}

/// A line that is not ours.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ControlError {
    /// Longer than [`MAX_LINE_BYTES`].
    #[error("a control message of more than {MAX_LINE_BYTES} bytes")]
    TooLong,
    /// Not JSON, or not a message we know.
    #[error("a control message that cannot be understood")]
    Malformed(#[source] serde_json::Error),
    /// Another version of the language.
    #[error(
        "the other side speaks control version {theirs}, this program {CONTROL_VERSION}: use the same release of both"
    )]
    Version {
        /// Theirs.
        theirs: u32,
    },
    /// The socket failed.
    #[error("the control connection failed")]
    Io(#[from] std::io::Error),
    /// The other side closed the connection where a message was due.
    #[error("the other side closed the control connection without an answer")]
    Closed,
}

/// `message` as one line with its newline.
///
/// # Errors
/// [`ControlError::TooLong`].
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, ControlError> {
    let mut line = serde_json::to_vec(&Versioned { v: CONTROL_VERSION, body: message })
        .map_err(ControlError::Malformed)?;
    if line.len() > MAX_LINE_BYTES {
        return Err(ControlError::TooLong);
    }
    line.push(b'\n');
    Ok(line)
}

/// The message in a line, with or without its newline. Never panics.
///
/// # Errors
/// Everything that is not exactly a message of this version.
pub fn decode<T: DeserializeOwned>(line: &[u8]) -> Result<T, ControlError> {
    if line.len() > MAX_LINE_BYTES + 1 {
        return Err(ControlError::TooLong);
    }
    // The version is looked at first: the body of another version may be anything.
    let version: Versioned<serde::de::IgnoredAny> =
        serde_json::from_slice(line).map_err(ControlError::Malformed)?;
    if version.v != CONTROL_VERSION {
        return Err(ControlError::Version { theirs: version.v });
    }
    let message: Versioned<T> = serde_json::from_slice(line).map_err(ControlError::Malformed)?;
    Ok(message.body)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn verbs() -> impl Strategy<Value = ResourceVerb> {
        prop_oneof![
            (any::<bool>(), any::<bool>()).prop_map(|(attach, connect)| ResourceVerb::Up { attach, connect }),
            Just(ResourceVerb::Down),
            Just(ResourceVerb::Attach),
            any::<bool>().prop_map(|force| ResourceVerb::Detach { force }),
            (any::<bool>(), any::<bool>()).prop_map(|(discard_my_data, tentative)| ResourceVerb::Connect {
                discard_my_data,
                tentative
            }),
            any::<bool>().prop_map(|force| ResourceVerb::Disconnect { force }),
            any::<bool>().prop_map(|force| ResourceVerb::Primary { force }),
            Just(ResourceVerb::Secondary),
            Just(ResourceVerb::InvalidateRemote),
            Just(ResourceVerb::InvalidateMarked),
            Just(ResourceVerb::PauseSync),
            any::<(Option<u64>, Option<u64>)>()
                .prop_map(|(start, stop)| ResourceVerb::Verify { start, stop }),
            any::<bool>().prop_map(|clear_bitmap| ResourceVerb::NewCurrentUuid { clear_bitmap }),
            (any::<Option<u64>>(), any::<bool>(), any::<bool>(), any::<bool>()).prop_map(
                |(size_sectors, assume_clean, assume_peer_has_space, force)| ResourceVerb::Resize {
                    size_sectors,
                    assume_clean,
                    assume_peer_has_space,
                    force,
                }
            ),
            Just(ResourceVerb::WaitSync),
        ]
    }

    fn requests() -> impl Strategy<Value = Request> {
        let verb =
            (any::<String>(), any::<Option<u16>>(), verbs(), any::<Option<u64>>(), any::<Option<String>>());
        prop_oneof![
            Just(Request::Info),
            any::<Option<String>>().prop_map(|resource| Request::Status { resource }),
            verb.prop_map(|(resource, volume, verb, timeout_ms, config)| {
                Request::Verb(VerbRequest {
                    resource,
                    volume: volume.map(VolumeNr),
                    verb,
                    timeout_ms,
                    config: config.map(PathBuf::from),
                })
            }),
        ]
    }

    proptest! {
        #[test]
        fn requests_survive_the_trip(request in requests()) {
            let line = encode(&request).unwrap();
            prop_assert_eq!(line.iter().filter(|byte| **byte == b'\n').count(), 1);
            prop_assert_eq!(decode::<Request>(&line).unwrap(), request);
        }

        #[test]
        fn any_bytes_are_refused_or_understood(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            if let Ok(request) = decode::<Request>(&bytes) {
                prop_assert!(encode(&request).is_ok());
            }
            prop_assert!(!matches!(decode::<Reply>(&bytes), Err(ControlError::Io(_))));
        }

        #[test]
        fn a_damaged_request_never_panics(request in requests(), at in any::<prop::sample::Index>(), byte in any::<u8>()) {
            let mut line = encode(&request).unwrap();
            let at = at.index(line.len());
            line[at] = byte;
            if let Ok(other) = decode::<Request>(&line) {
                prop_assert!(encode(&other).is_ok());
            }
        }
    }

    #[test]
    fn deep_nesting_and_long_lines_are_refused() {
        let deep = format!("{{\"v\":1,\"body\":{}", "[".repeat(100_000));
        assert!(matches!(decode::<Request>(deep.as_bytes()), Err(ControlError::Malformed(_))));
        assert!(matches!(decode::<Request>(&vec![b' '; MAX_LINE_BYTES + 2]), Err(ControlError::TooLong)));
        assert!(matches!(encode(&"x".repeat(MAX_LINE_BYTES)), Err(ControlError::TooLong)));
    }

    #[test]
    fn another_version_is_named() {
        let error = decode::<Request>(br#"{"v":7,"body":{"from the future":[]}}"#).unwrap_err();
        assert!(matches!(error, ControlError::Version { theirs: 7 }), "{error}");
    }
}
