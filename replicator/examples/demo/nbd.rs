//! A small NBD client that keeps many writes in flight and knows which were acknowledged.
use std::io::{self, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;
const FLAG_FUA: u16 = 1;

/// A command of the transmission phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    Read = 0,
    Write = 1,
    Flush = 3,
}

/// A reply: which request, and the server's errno (0 = done).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reply {
    pub(crate) cookie: u64,
    pub(crate) errno: u32,
}

/// A connection in the transmission phase, with simple replies.
#[derive(Debug)]
pub(crate) struct NbdClient {
    socket: UnixStream,
    /// Size of the export, bytes.
    pub(crate) size: u64,
}

impl NbdClient {
    /// Connects and opens `export`. A server that hangs is an error after 30 s.
    pub(crate) fn connect(path: &Path, export: &str) -> io::Result<Self> {
        let mut socket = UnixStream::connect(path)?;
        socket.set_read_timeout(Some(Duration::from_secs(30)))?;
        let mut greeting = [0; 18];
        socket.read_exact(&mut greeting)?;
        if &greeting[..16] != b"NBDMAGICIHAVEOPT" {
            return Err(io::Error::other("no NBD server there"));
        }
        socket.write_all(&3_u32.to_be_bytes())?;
        // NBD_OPT_GO without information requests.
        let mut option = b"IHAVEOPT".to_vec();
        option.extend(7_u32.to_be_bytes());
        let name_len = u32::try_from(export.len()).map_err(io::Error::other)?;
        option.extend((name_len + 6).to_be_bytes());
        option.extend(name_len.to_be_bytes());
        option.extend(export.as_bytes());
        option.extend(0_u16.to_be_bytes());
        socket.write_all(&option)?;
        let mut size = 0;
        loop {
            let mut head = [0; 20];
            socket.read_exact(&mut head)?;
            let kind = u32::from_be_bytes([head[12], head[13], head[14], head[15]]);
            let len = u32::from_be_bytes([head[16], head[17], head[18], head[19]]);
            let mut data = vec![0; usize::try_from(len).map_err(io::Error::other)?];
            socket.read_exact(&mut data)?;
            match kind {
                1 => return Ok(Self { socket, size }),
                3 if data.len() >= 10 && data[..2] == [0, 0] => {
                    let mut bytes = [0; 8];
                    bytes.copy_from_slice(&data[2..10]);
                    size = u64::from_be_bytes(bytes);
                }
                3 => {}
                _ => return Err(io::Error::other(format!("refused: {}", String::from_utf8_lossy(&data)))),
            }
        }
    }

    /// Sends a request; the reply comes through [`NbdClient::reply`].
    pub(crate) fn send(
        &mut self,
        command: Command,
        fua: bool,
        cookie: u64,
        offset: u64,
        data: &[u8],
        len: u32,
    ) -> io::Result<()> {
        let mut head = Vec::with_capacity(28 + data.len());
        head.extend(REQUEST_MAGIC.to_be_bytes());
        head.extend(if fua { FLAG_FUA } else { 0 }.to_be_bytes());
        head.extend((command as u16).to_be_bytes());
        head.extend(cookie.to_be_bytes());
        head.extend(offset.to_be_bytes());
        head.extend(len.to_be_bytes());
        head.extend(data);
        self.socket.write_all(&head)
    }

    /// The next reply; the data of a read follows it.
    pub(crate) fn reply(&mut self) -> io::Result<Reply> {
        let mut head = [0; 16];
        self.socket.read_exact(&mut head)?;
        if head[..4] != REPLY_MAGIC.to_be_bytes() {
            return Err(io::Error::other("not a simple reply"));
        }
        let mut cookie = [0; 8];
        cookie.copy_from_slice(&head[8..]);
        Ok(Reply {
            cookie: u64::from_be_bytes(cookie),
            errno: u32::from_be_bytes([head[4], head[5], head[6], head[7]]),
        })
    }

    /// Reads a range, one request at a time.
    pub(crate) fn read_at(&mut self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let mut at = 0;
        while at < data.len() {
            let len = (data.len() - at).min(1 << 20);
            self.send(
                Command::Read,
                false,
                1,
                offset + at as u64,
                &[],
                u32::try_from(len).map_err(io::Error::other)?,
            )?;
            let reply = self.reply()?;
            if reply.errno != 0 {
                return Err(io::Error::from_raw_os_error(reply.errno.cast_signed()));
            }
            self.socket.read_exact(&mut data[at..at + len])?;
            at += len;
        }
        Ok(())
    }

    /// Writes a range, one request at a time.
    pub(crate) fn write_at(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        for (piece, chunk) in data.chunks(1 << 18).enumerate() {
            let len = u32::try_from(chunk.len()).map_err(io::Error::other)?;
            self.send(Command::Write, false, 1, offset + ((piece as u64) << 18), chunk, len)?;
            self.done()?;
        }
        Ok(())
    }

    /// Flushes.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        self.send(Command::Flush, false, 1, 0, &[], 0)?;
        self.done()
    }

    fn done(&mut self) -> io::Result<()> {
        let reply = self.reply()?;
        if reply.errno == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(reply.errno.cast_signed())) }
    }
}
