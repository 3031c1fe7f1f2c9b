//! The command's end of the control socket. Blocking: a command does one thing.
use crate::admin::control::{self, ControlError, MAX_LINE_BYTES, Reply, Request, SOCKET_NAME};
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The daemon must answer something (progress counts) within this time.
const SILENCE_LIMIT: Duration = Duration::from_secs(30);

/// Why the daemon could not be asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// Nobody listens.
    #[error("no lockstepd runs for {run_dir}", run_dir = run_dir.display())]
    NoDaemon {
        /// Where it was looked for.
        run_dir: PathBuf,
    },
    /// The socket may not be used by this user.
    #[error("{socket}: only the daemon's own user and root may talk to it", socket = socket.display())]
    Denied {
        /// The socket.
        socket: PathBuf,
    },
    /// The daemon stopped answering.
    #[error("lockstepd has not answered for {} s", SILENCE_LIMIT.as_secs())]
    Silent,
    /// Something else.
    #[error("talking to lockstepd")]
    Control(#[from] ControlError),
}

/// The daemon of one run directory.
#[derive(Clone, Debug)]
pub struct Client {
    run_dir: PathBuf,
}

impl Client {
    /// A client of the daemon in `run_dir`; does not connect yet.
    #[must_use]
    pub fn new(run_dir: &Path) -> Self {
        Self { run_dir: run_dir.into() }
    }

    /// Sends `request`; calls `on_note` for everything before the final reply; returns the final reply.
    ///
    /// # Errors
    /// When there is no daemon, it may not be asked, or it does not answer.
    pub fn ask(&self, request: &Request, mut on_note: impl FnMut(Reply)) -> Result<Reply, ClientError> {
        let socket = self.run_dir.join(SOCKET_NAME);
        let mut stream = UnixStream::connect(&socket).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                ClientError::NoDaemon { run_dir: self.run_dir.clone() }
            }
            io::ErrorKind::PermissionDenied => ClientError::Denied { socket },
            _ => ClientError::Control(error.into()),
        })?;
        let limits = stream.set_read_timeout(Some(SILENCE_LIMIT));
        limits.and_then(|()| stream.set_write_timeout(Some(SILENCE_LIMIT))).map_err(ControlError::from)?;
        stream.write_all(&control::encode(request)?).map_err(silence)?;
        let mut reader = BufReader::new(stream);
        let mut line = Vec::new();
        loop {
            line.clear();
            let limit = MAX_LINE_BYTES as u64 + 1;
            reader.by_ref().take(limit).read_until(b'\n', &mut line).map_err(silence)?;
            if line.is_empty() {
                return Err(ControlError::Closed.into());
            }
            let reply: Reply = control::decode(&line)?;
            if reply.is_final() {
                return Ok(reply);
            }
            on_note(reply);
        }
    }
}

fn silence(error: io::Error) -> ClientError {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => ClientError::Silent,
        _ => ClientError::Control(error.into()),
    }
}
