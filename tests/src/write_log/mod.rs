//! What the kernel's dm-log-writes recorded below a node, taken apart: every write a backing disk got, in the order in
//! which a power cut may have let it survive.
//!
//! The log holds a write once it is stable: what has FUA at once, the rest with the flush that covers it. So the first
//! `n` entries, for any `n`, are what a disk with a write cache may hold after a power cut.
//!
//! On the log device, little-endian, in units of its sector size:
//! ```text
//! super: magic u64, version u64 = 1, entries u64, sector size u32
//! then per entry: {sector u64, sectors u64, flags u64, length of a mark's text u64, text} in one sector, then the data
//! ```
//! A discard has no data behind it. Everything here works on plain files, so that it runs anywhere.
pub mod coverage;
pub mod image;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

const MAGIC: u64 = 0x006a_7366_7773_6872;
const VERSION: u64 = 1;
/// Bytes of an entry before a mark's text.
const ENTRY_BYTES: usize = 32;
const FLUSH: u64 = 1;
const FUA: u64 = 2;
const DISCARD: u64 = 4;
const MARK: u64 = 8;

/// A log that cannot be read.
#[derive(Debug)]
pub enum LogError {
    /// The file.
    Io(io::Error),
    /// What it says.
    Format(String),
}

impl std::fmt::Display for LogError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Io(_) => f.write_str("cannot read the log"),
            Self::Format(text) => write!(f, "not a log of dm-log-writes: {text}"),
        }
    }
}

impl std::error::Error for LogError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Io(source) => Some(source),
            Self::Format(_) => None,
        }
    }
}

impl From<io::Error> for LogError {
    fn from(source: io::Error) -> Self {
        Self::Io(source)
    }
}

/// What an entry did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Data; none for a bare flush.
    Write {
        /// Everything before it was made stable first.
        flush: bool,
        /// It was stable itself when it was answered.
        fua: bool,
    },
    /// The range reads as zeroes from now on.
    Discard,
    /// A word from who recorded.
    Mark(String),
}

/// One entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// What.
    pub kind: Kind,
    /// Where on the disk, bytes.
    pub offset: u64,
    /// How much, bytes.
    pub len: u64,
    /// Where its data is in the log, bytes.
    data_at: u64,
}

impl Entry {
    /// Whether it changes the disk.
    #[must_use]
    pub const fn changes(&self) -> bool {
        match self.kind {
            Kind::Write { .. } | Kind::Discard => self.len > 0,
            Kind::Mark(_) => false,
        }
    }

    /// Whether a flush ended with it.
    #[must_use]
    pub const fn is_flush(&self) -> bool {
        matches!(self.kind, Kind::Write { flush: true, .. })
    }
}

/// A log and the index of its entries.
#[derive(Debug)]
pub struct WriteLog {
    file: File,
    entries: Vec<Entry>,
}

impl WriteLog {
    /// Reads the index of all entries.
    ///
    /// # Errors
    /// The file, or what it says.
    pub fn open(path: &str) -> Result<Self, LogError> {
        let file = File::open(path)?;
        let mut head = [0; ENTRY_BYTES];
        file.read_exact_at(&mut head, 0)?;
        let (magic, version, count) = (le64(&head, 0), le64(&head, 8), le64(&head, 16));
        let sector_bytes = le64(&head, 24) & 0xffff_ffff;
        if magic != MAGIC || version != VERSION || !matches!(sector_bytes, 512 | 4096) {
            return Err(LogError::Format(format!(
                "magic {magic:#x}, version {version}, sectors of {sector_bytes} bytes"
            )));
        }
        let mut entries = Vec::new();
        let mut at = sector_bytes;
        for number in 0..count {
            file.read_exact_at(&mut head, at)?;
            let (flags, text_len) = (le64(&head, 16), le64(&head, 24));
            let scaled = |value: u64| {
                value
                    .checked_mul(sector_bytes)
                    .ok_or_else(|| LogError::Format(format!("entry {number} is out of range")))
            };
            let (offset, len) = (scaled(le64(&head, 0))?, scaled(le64(&head, 8))?);
            let data_at = at + sector_bytes;
            let kind = if flags & MARK != 0 {
                let room = sector_bytes - ENTRY_BYTES as u64;
                let mut text = vec![0; usize::try_from(text_len.min(room)).unwrap_or(0)];
                file.read_exact_at(&mut text, at + ENTRY_BYTES as u64)?;
                let text = String::from_utf8_lossy(&text);
                Kind::Mark(text.trim_end_matches('\0').to_owned())
            } else if flags & DISCARD != 0 {
                Kind::Discard
            } else {
                Kind::Write { flush: flags & FLUSH != 0, fua: flags & FUA != 0 }
            };
            at = if kind == Kind::Discard { data_at } else { data_at + len };
            entries.push(Entry { kind, offset, len, data_at });
        }
        Ok(Self { file, entries })
    }

    /// All entries, in the order of the log.
    #[must_use]
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Number of entries up to and with the mark.
    #[must_use]
    pub fn after_mark(&self, name: &str) -> Option<usize> {
        let wanted = |entry: &Entry| matches!(&entry.kind, Kind::Mark(text) if text == name);
        self.entries.iter().position(wanted).map(|at| at + 1)
    }

    /// The last mark among the first `n` entries that begins with `prefix`, without it.
    #[must_use]
    pub fn last_mark(&self, n: usize, prefix: &str) -> Option<&str> {
        self.entries.iter().take(n).rev().find_map(|entry| match &entry.kind {
            Kind::Mark(text) => text.strip_prefix(prefix),
            Kind::Write { .. } | Kind::Discard => None,
        })
    }

    /// The bytes an entry leaves on the disk: those written, or zeroes.
    ///
    /// # Errors
    /// The file.
    pub fn data(&self, entry: &Entry) -> Result<Vec<u8>, LogError> {
        let len = usize::try_from(entry.len).map_err(|_| LogError::Format("a huge entry".into()))?;
        let mut data = vec![0; len];
        if matches!(entry.kind, Kind::Write { .. }) {
            self.file.read_exact_at(&mut data, entry.data_at)?;
        }
        Ok(data)
    }
}

fn le64(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..).and_then(<[u8]>::first_chunk).map_or(0, |raw| u64::from_le_bytes(*raw))
}

#[cfg(test)]
pub(crate) mod testing {
    //! A log as the kernel would have written it.
    use super::*;

    /// Bytes of a log with these entries: kind, byte offset, data (for a discard only its length counts).
    pub(crate) fn log_of(entries: &[(Kind, u64, Vec<u8>)]) -> Vec<u8> {
        let mut log = vec![0; 512];
        log[..8].copy_from_slice(&MAGIC.to_le_bytes());
        log[8..16].copy_from_slice(&VERSION.to_le_bytes());
        log[16..24].copy_from_slice(&(entries.len() as u64).to_le_bytes());
        log[24..28].copy_from_slice(&512_u32.to_le_bytes());
        for (kind, offset, data) in entries {
            let mut head = vec![0; 512];
            let (flags, text) = match kind {
                Kind::Write { flush, fua } => (u64::from(*flush) | u64::from(*fua) << 1, ""),
                Kind::Discard => (DISCARD, ""),
                Kind::Mark(text) => (MARK, text.as_str()),
            };
            let words = [offset / 512, data.len() as u64 / 512, flags, text.len() as u64];
            for (at, word) in words.into_iter().enumerate() {
                head[at * 8..at * 8 + 8].copy_from_slice(&word.to_le_bytes());
            }
            head[32..32 + text.len()].copy_from_slice(text.as_bytes());
            log.extend(head);
            if matches!(kind, Kind::Write { .. }) {
                log.extend(data);
            }
        }
        log
    }

    /// A directory that goes with the value.
    pub(crate) struct Scratch(pub(crate) std::path::PathBuf);

    impl Scratch {
        pub(crate) fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("lockstep-{name}-{}", std::process::id()));
            std::fs::create_dir_all(&path).unwrap();
            Self(path)
        }

        pub(crate) fn file(&self, name: &str, bytes: &[u8]) -> String {
            let path = self.0.join(name);
            std::fs::write(&path, bytes).unwrap();
            path.to_str().unwrap().to_owned()
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            // Gone already is as good.
            let _gone = std::fs::remove_dir_all(&self.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::testing::{Scratch, log_of};
    use super::*;

    #[test]
    fn entries_are_found_whatever_stands_between_them() {
        let scratch = Scratch::new("write-log");
        let plain = Kind::Write { flush: false, fua: false };
        let entries = [
            (plain.clone(), 4096, vec![7; 1024]),
            (Kind::Mark("start".into()), 0, Vec::new()),
            (Kind::Discard, 8192, vec![0; 4096]),
            (Kind::Write { flush: true, fua: false }, 0, Vec::new()),
            (Kind::Write { flush: true, fua: true }, 512, vec![9; 512]),
        ];
        let log = WriteLog::open(&scratch.file("log", &log_of(&entries))).unwrap();
        let found = log.entries();
        assert_eq!(found.len(), 5);
        for (entry, (kind, offset, data)) in found.iter().zip(&entries) {
            assert_eq!((&entry.kind, entry.offset, entry.len), (kind, *offset, data.len() as u64));
            assert_eq!(&log.data(entry).unwrap(), data);
        }
        assert!(found[0].changes() && found[2].changes() && !found[1].changes() && !found[3].changes());
        assert!(found[3].is_flush() && !found[0].is_flush());
        assert_eq!(log.after_mark("start"), Some(2));
        assert_eq!(log.after_mark("end"), None);
        assert_eq!(log.last_mark(5, "st"), Some("art"));
        assert_eq!(log.last_mark(1, "st"), None);
    }

    #[test]
    fn anything_else_is_refused() {
        let scratch = Scratch::new("write-log-bad");
        let error = WriteLog::open(&scratch.file("log", &[0; 4096])).unwrap_err();
        assert!(error.to_string().contains("not a log"), "{error}");
        let cut = &log_of(&[(Kind::Mark("m".into()), 0, Vec::new())])[..520];
        assert!(matches!(WriteLog::open(&scratch.file("cut", cut)), Err(LogError::Io(_))));
    }
}
