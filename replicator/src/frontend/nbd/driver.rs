//! Runs a [`Negotiation`] over an async stream, under a deadline.
use super::export::ExportDirectory;
use super::negotiate::{CloseReason, Negotiated, Negotiation, Step};
use std::io;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Bytes read at once; bounds what may be left over behind the last option.
const READ_BYTES: usize = 4096;

/// Why a connection did not reach the transmission.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NegotiateError {
    /// The client ended it or broke a rule.
    #[error("{0}")]
    Closed(CloseReason),
    /// The client did not finish in time.
    #[error("the negotiation took longer than {} ms", limit.as_millis())]
    Deadline {
        /// The time it had.
        limit: Duration,
    },
    /// The client went away in the middle.
    #[error("the client closed the connection in the middle of the negotiation")]
    Disconnected,
    /// The socket failed.
    #[error("socket error during the negotiation")]
    Io(#[source] io::Error),
}

impl NegotiateError {
    /// Whether this is a normal end, not worth a line in the log: a tool that listed the exports, or a
    /// port scanner's connect and close.
    #[must_use]
    pub const fn is_polite(&self) -> bool {
        matches!(self, Self::Closed(CloseReason::Aborted) | Self::Disconnected)
    }
}

/// Negotiates with the client on `stream`; the socket is then ready for the transmission. `limit` is the
/// time for the whole negotiation, so a client that sends a byte now and then does not hold on.
///
/// # Errors
/// Why there is no transmission; the caller closes the socket. On
/// [`NegotiateError::is_polite`] the client already has its last answer.
///
/// # Cancel safety
/// Not cancel safe: drop the stream with the future.
pub async fn negotiate<S, E>(
    stream: &mut S,
    exports: &E,
    limit: Duration,
) -> Result<Negotiated, NegotiateError>
where
    S: AsyncRead + AsyncWrite + Unpin,
    E: ExportDirectory + ?Sized,
{
    match tokio::time::timeout(limit, exchange(stream, exports)).await {
        Ok(result) => result,
        Err(_elapsed) => Err(NegotiateError::Deadline { limit }),
    }
}

async fn exchange<S, E>(stream: &mut S, exports: &E) -> Result<Negotiated, NegotiateError>
where
    S: AsyncRead + AsyncWrite + Unpin,
    E: ExportDirectory + ?Sized,
{
    let mut out = Vec::new();
    let mut negotiation = Negotiation::start(&mut out);
    send(stream, &out).await?;
    let mut piece = vec![0; READ_BYTES];
    let mut filled = 0;
    loop {
        out.clear();
        let step = negotiation.handle(piece.get(..filled).unwrap_or_default(), exports, &mut out);
        let sent = send(stream, &out).await;
        match step {
            // The client's own end counts whether or not it waited for the last answer; QEMU does not.
            Step::Closed(reason) => return Err(NegotiateError::Closed(reason)),
            Step::Done(negotiated) => return sent.map(|()| *negotiated),
            Step::Again => {
                sent?;
                filled = 0;
            }
            Step::NeedInput => {
                sent?;
                filled = stream.read(&mut piece).await.map_err(socket_error)?;
                if filled == 0 {
                    return Err(NegotiateError::Disconnected);
                }
            }
        }
    }
}

async fn send<S: AsyncWrite + Unpin>(stream: &mut S, bytes: &[u8]) -> Result<(), NegotiateError> {
    stream.write_all(bytes).await.map_err(socket_error)?;
    stream.flush().await.map_err(socket_error)
}

fn socket_error(error: io::Error) -> NegotiateError {
    match error.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => NegotiateError::Disconnected,
        _ => NegotiateError::Io(error),
    }
}
