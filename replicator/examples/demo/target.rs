//! Where a client of the demo does its IO: an NBD export, or the ublk disk where there is one.
use crate::nbd::NbdClient;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

const PAGE: usize = 4096;

/// See the module.
#[derive(Clone, Debug)]
pub(crate) enum Target {
    /// A unix socket and the export's name.
    Nbd { socket: PathBuf, export: String },
    /// A block device.
    Device(PathBuf),
}

/// An open [`Target`].
#[derive(Debug)]
pub(crate) enum Open {
    Nbd(NbdClient),
    Device(File),
}

impl Target {
    /// Opens it.
    pub(crate) fn open(&self) -> io::Result<Open> {
        Ok(match self {
            Self::Nbd { socket, export } => Open::Nbd(NbdClient::connect(socket, export)?),
            Self::Device(path) => Open::Device(open_direct(path)?),
        })
    }
}

impl Open {
    /// Size, bytes.
    pub(crate) fn size(&mut self) -> io::Result<u64> {
        match self {
            Self::Nbd(client) => Ok(client.size),
            Self::Device(file) => io::Seek::seek(file, io::SeekFrom::End(0)),
        }
    }

    /// Reads a range of whole pages.
    pub(crate) fn read_at(&mut self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        match self {
            Self::Nbd(client) => client.read_at(offset, data),
            Self::Device(file) => {
                let mut memory = Aligned::new(1 << 20);
                for (piece, chunk) in data.chunks_mut(1 << 20).enumerate() {
                    let part = &mut memory.bytes()[..chunk.len()];
                    file.read_exact_at(part, offset + ((piece as u64) << 20))?;
                    chunk.copy_from_slice(part);
                }
                Ok(())
            }
        }
    }

    /// Writes whole pages and makes them stable.
    pub(crate) fn write_and_flush(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        match self {
            Self::Nbd(client) => {
                client.write_at(offset, data)?;
                client.flush()
            }
            Self::Device(file) => {
                let mut memory = Aligned::new(1 << 18);
                for (piece, chunk) in data.chunks(1 << 18).enumerate() {
                    let part = &mut memory.bytes()[..chunk.len()];
                    part.copy_from_slice(chunk);
                    file.write_all_at(part, offset + ((piece as u64) << 18))?;
                }
                file.sync_data()
            }
        }
    }
}

/// Opens a device past the page cache: what was acknowledged was acknowledged by the daemon.
pub(crate) fn open_direct(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).custom_flags(nix::fcntl::OFlag::O_DIRECT.bits()).open(path)
}

/// Memory aligned as direct IO wants it.
#[derive(Debug)]
pub(crate) struct Aligned {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl Aligned {
    /// `len` bytes, zeroed.
    pub(crate) fn new(len: usize) -> Self {
        let memory = vec![0; len + PAGE];
        let start = memory.as_ptr().align_offset(PAGE);
        Self { memory, start, len }
    }

    /// The bytes.
    pub(crate) fn bytes(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }
}
