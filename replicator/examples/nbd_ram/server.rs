//! An NBD server over memory, on tokio: the smallest complete user of the codec. The daemon differs in
//! that its transmission runs on the resource's io_uring thread.
use lockstep_replicator::frontend::nbd::{
    Command, ExportDirectory, ExportInfo, ExportRefusal, ListedExport, NbdError, Negotiated, Received,
    RefusalKind, Request, Session, allocation, negotiate, wire::REQUEST_BYTES,
};
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, UnixListener};

/// Time for a negotiation.
const NEGOTIATION_LIMIT: Duration = Duration::from_secs(10);

/// One export: its facts and its bytes, or the reason why it cannot be used.
type Entry = Result<(ExportInfo, Arc<File>), ExportRefusal>;

/// The exports of the server.
#[derive(Clone, Debug, Default)]
pub(crate) struct RamExports(BTreeMap<String, Entry>);

impl RamExports {
    /// Adds an export of zeroes.
    pub(crate) fn add(&mut self, name: &str, export: ExportInfo) -> io::Result<()> {
        let memory = File::from(memfd_create(name, MFdFlags::MFD_CLOEXEC)?);
        memory.set_len(export.size_bytes)?;
        self.0.insert(name.to_owned(), Ok((export, Arc::new(memory))));
        Ok(())
    }

    /// Adds an export that is refused.
    pub(crate) fn add_refused(&mut self, name: &str, refusal: ExportRefusal) {
        self.0.insert(name.to_owned(), Err(refusal));
    }

    fn memory(&self, name: &str) -> Option<Arc<File>> {
        self.0.get(name)?.as_ref().ok().map(|(_, memory)| Arc::clone(memory))
    }
}

impl ExportDirectory for RamExports {
    fn list(&self) -> Vec<ListedExport> {
        self.0
            .iter()
            .filter_map(|(name, entry)| {
                let (export, _) = entry.as_ref().ok()?;
                Some(ListedExport { name: name.clone(), description: export.description.clone() })
            })
            .collect()
    }

    fn lookup(&self, name: &str) -> Result<ExportInfo, ExportRefusal> {
        match self.0.get(name) {
            Some(Ok((export, _))) => Ok(export.clone()),
            Some(Err(refusal)) => Err(refusal.clone()),
            None => Err(ExportRefusal::new(RefusalKind::Unknown, format!("no export is called {name}"))),
        }
    }
}

/// Serves a unix socket until the future is dropped.
pub(crate) async fn serve_unix(path: &Path, exports: Arc<RamExports>) -> io::Result<()> {
    let listener = UnixListener::bind(path)?;
    loop {
        let (stream, _) = listener.accept().await?;
        tokio::spawn(connection(stream, Arc::clone(&exports)));
    }
}

/// Serves TCP until the future is dropped.
pub(crate) async fn serve_tcp(listener: TcpListener, exports: Arc<RamExports>) -> io::Result<()> {
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        tokio::spawn(connection(stream, Arc::clone(&exports)));
    }
}

async fn connection<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S, exports: Arc<RamExports>) {
    let negotiated = match negotiate(&mut stream, &*exports, NEGOTIATION_LIMIT).await {
        Ok(negotiated) => negotiated,
        Err(error) if error.is_polite() => return,
        Err(error) => return eprintln!("nbd: {error}"),
    };
    let Some(memory) = exports.memory(&negotiated.name) else { return };
    if let Err(error) = transmission(&mut stream, &negotiated, &memory).await {
        // A client that goes away without DISC is no failure of the server.
        if !matches!(error.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset) {
            eprintln!("nbd: {}: {error}", negotiated.name);
        }
    }
}

async fn transmission<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    negotiated: &Negotiated,
    memory: &File,
) -> io::Result<()> {
    let session = negotiated.session();
    let (reader, mut writer) = tokio::io::split(stream);
    let mut reader = negotiated.leftover.as_slice().chain(reader);
    let mut data = Vec::new();
    let mut out = Vec::new();
    loop {
        let mut head = [0; REQUEST_BYTES];
        reader.read_exact(&mut head).await?;
        out.clear();
        match session.receive(&head) {
            Received::Disconnect => return Ok(()),
            Received::Breach(breach) => return Err(io::Error::other(breach)),
            Received::Rejected(rejected) => {
                data.resize(rejected.skip_bytes as usize, 0);
                reader.read_exact(&mut data).await?;
                session.push_error(rejected.cookie, rejected.error, rejected.text, &mut out);
            }
            Received::Request(request) => {
                data.resize(request.payload_bytes().max(request.reply_data_bytes()) as usize, 0);
                if request.payload_bytes() > 0 {
                    reader.read_exact(&mut data).await?;
                }
                answer(&session, &request, memory, &mut data, &mut out);
            }
        }
        writer.write_all(&out).await?;
        writer.flush().await?;
    }
}

/// Does the request and appends its answer.
fn answer(session: &Session, request: &Request, memory: &File, data: &mut [u8], out: &mut Vec<u8>) {
    if let Command::BlockStatus { one } = request.command() {
        let (offset, length) = (request.offset(), request.length());
        let extents = allocation::extents(memory.as_fd(), 0, offset, length, session.block_min, one);
        session.push_block_status(request, &extents, out);
        return;
    }
    match perform(request, memory, data) {
        Ok(()) => {
            out.extend_from_slice(session.success_head(request).as_bytes());
            if request.reply_data_bytes() > 0 {
                out.extend_from_slice(data);
            }
        }
        Err(error) => session.push_error(request.cookie(), NbdError::Io, &error.to_string(), out),
    }
}

/// Piece by piece, as the daemon does.
fn perform(request: &Request, memory: &File, data: &mut [u8]) -> io::Result<()> {
    use lockstep_replicator::core::event::RequestOp;
    for piece in request.pieces().into_iter().flatten() {
        let (offset, length) = (piece.range.start().bytes(), piece.range.len().bytes());
        let first = piece.data_offset as usize;
        let within = || first..first + usize::try_from(length).unwrap_or(usize::MAX);
        match piece.op {
            RequestOp::Read => memory.read_exact_at(&mut data[within()], offset)?,
            RequestOp::Write => memory.write_all_at(&data[within()], offset)?,
            RequestOp::Discard | RequestOp::WriteZeroes { .. } => {
                let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                let (offset, length) = (offset.cast_signed(), length.cast_signed());
                fallocate(memory, flags, offset, length)?;
                if piece.op == (RequestOp::WriteZeroes { may_unmap: false }) {
                    fallocate(memory, FallocateFlags::empty(), offset, length)?;
                }
            }
        }
    }
    Ok(())
}
