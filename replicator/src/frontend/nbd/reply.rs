//! Answers of the transmission phase. The answers of every write and read are a [`ReplyHead`], a value
//! of 32 bytes at most that the caller keeps beside the data buffer and sends with it; errors and
//! block status, which carry a text or a list, are appended to a buffer of the caller.
use super::transmission::{Command, Request, Session};
use super::wire::{
    BASE_ALLOCATION_ID, MAX_DATA_BYTES, SIMPLE_REPLY_MAGIC, STATE_HOLE, STATE_ZERO, STRUCTURED_REPLY_MAGIC,
    chunk,
};
use crate::core::event::RequestError;

/// Longest head of a reply, bytes.
pub const MAX_HEAD_BYTES: usize = 32;
/// Longest text sent with an error, bytes. Reserve this and [`MAX_HEAD_BYTES`] to append errors
/// without allocation.
pub const MAX_ERROR_TEXT_BYTES: usize = 256;

/// The errors NBD knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NbdError {
    /// EPERM: the export is read-only, or the resource is no longer Primary.
    #[error("operation not permitted")]
    Perm,
    /// EIO: no good copy could be read or written.
    #[error("input/output error")]
    Io,
    /// EINVAL: malformed, unaligned, or not negotiated.
    #[error("invalid argument")]
    Invalid,
    /// ENOSPC: the backing store is full, or a write goes beyond the end.
    #[error("no space left on device")]
    NoSpace,
    /// EOVERFLOW: too long to be answered in one chunk.
    #[error("value too large")]
    Overflow,
    /// ENOTSUP: the export cannot do this, or not fast.
    #[error("operation not supported")]
    NotSupported,
    /// ESHUTDOWN: the resource is going down.
    #[error("the server is going down")]
    Shutdown,
}

impl NbdError {
    /// The number on the wire. These are the protocol's own, whatever the platform's errno are.
    #[must_use]
    pub const fn errno(self) -> u32 {
        match self {
            Self::Perm => 1,
            Self::Io => 5,
            Self::Invalid => 22,
            Self::NoSpace => 28,
            Self::Overflow => 75,
            Self::NotSupported => 95,
            Self::Shutdown => 108,
        }
    }
}

impl From<RequestError> for NbdError {
    fn from(error: RequestError) -> Self {
        match error {
            RequestError::Io => Self::Io,
            RequestError::NoSpace => Self::NoSpace,
            RequestError::Invalid => Self::Invalid,
            RequestError::Unsupported => Self::NotSupported,
            RequestError::NotPrimary => Self::Perm,
            RequestError::Shutdown => Self::Shutdown,
        }
    }
}

/// The bytes of an answer that come before the data, if any.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplyHead {
    bytes: [u8; MAX_HEAD_BYTES],
    length: u8,
}

impl ReplyHead {
    const EMPTY: Self = Self { bytes: [0; MAX_HEAD_BYTES], length: 0 };

    /// The bytes to send.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        self.bytes.get(..usize::from(self.length)).unwrap_or_default()
    }

    /// A simple reply; on success of a READ the data follows.
    #[must_use]
    pub fn simple(cookie: u64, result: Result<(), NbdError>) -> Self {
        let errno = result.err().map_or(0, NbdError::errno);
        Self::EMPTY
            .push(&SIMPLE_REPLY_MAGIC.to_be_bytes())
            .push(&errno.to_be_bytes())
            .push(&cookie.to_be_bytes())
    }

    /// A chunk that says "done" without content.
    #[must_use]
    pub fn none(cookie: u64) -> Self {
        Self::chunk(chunk::FLAG_DONE, chunk::NONE, cookie, 0)
    }

    /// The head of a content chunk; `length` bytes of data follow. `done` marks the last chunk of the
    /// request. `length` is at least 1 and at most [`MAX_DATA_BYTES`].
    #[must_use]
    pub fn offset_data(cookie: u64, offset: u64, length: u32, done: bool) -> Self {
        debug_assert!(length > 0 && length <= MAX_DATA_BYTES, "a content chunk of {length} bytes");
        let flags = if done { chunk::FLAG_DONE } else { 0 };
        Self::chunk(flags, chunk::OFFSET_DATA, cookie, length.saturating_add(8)).push(&offset.to_be_bytes())
    }

    /// A content chunk that stands for `length` zeroes (at least 1); nothing follows.
    #[must_use]
    pub fn offset_hole(cookie: u64, offset: u64, length: u32, done: bool) -> Self {
        debug_assert!(length > 0, "an empty hole");
        let flags = if done { chunk::FLAG_DONE } else { 0 };
        Self::chunk(flags, chunk::OFFSET_HOLE, cookie, 12)
            .push(&offset.to_be_bytes())
            .push(&length.to_be_bytes())
    }

    fn chunk(flags: u16, kind: u16, cookie: u64, length: u32) -> Self {
        Self::EMPTY
            .push(&STRUCTURED_REPLY_MAGIC.to_be_bytes())
            .push(&flags.to_be_bytes())
            .push(&kind.to_be_bytes())
            .push(&cookie.to_be_bytes())
            .push(&length.to_be_bytes())
    }

    fn push(mut self, field: &[u8]) -> Self {
        let start = usize::from(self.length);
        for (to, from) in self.bytes.iter_mut().skip(start).zip(field) {
            *to = *from;
            self.length += 1;
        }
        debug_assert!(usize::from(self.length) == start + field.len(), "a reply head is too long");
        self
    }
}

/// What `base:allocation` says of an extent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentKind {
    /// Allocated, or not known.
    Data,
    /// Not allocated, reads as zeroes.
    Hole,
}

impl ExtentKind {
    const fn state(self) -> u32 {
        match self {
            Self::Data => 0,
            Self::Hole => STATE_HOLE | STATE_ZERO,
        }
    }
}

/// A stretch of an export. Extents of an answer follow each other from the request's offset on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Length, bytes, not 0.
    pub length: u32,
    /// What is there.
    pub kind: ExtentKind,
}

impl Session {
    /// The head of a successful answer. After the head of a READ the data of the whole request follows,
    /// from one buffer or several; all of it must have been read, since an error cannot be told any more.
    /// Not for BLOCK_STATUS, which answers with [`Session::push_block_status`].
    #[must_use]
    pub fn success_head(&self, request: &Request) -> ReplyHead {
        match request.command() {
            Command::Read { .. } if self.structured_replies => {
                ReplyHead::offset_data(request.cookie(), request.offset(), request.length(), true)
            }
            Command::BlockStatus { .. } => {
                debug_assert!(false, "block status is answered with extents");
                ReplyHead::none(request.cookie())
            }
            // A simple reply is allowed, and shorter, for everything that carries no data.
            Command::Read { .. }
            | Command::Write { .. }
            | Command::Flush
            | Command::Trim { .. }
            | Command::WriteZeroes { .. }
            | Command::Cache => ReplyHead::simple(request.cookie(), Ok(())),
        }
    }

    /// Appends the complete answer of a failed request: with structured replies a chunk that carries
    /// `text` for the user, else the number alone.
    pub fn push_error(&self, cookie: u64, error: NbdError, text: &str, out: &mut Vec<u8>) {
        if !self.structured_replies {
            out.extend_from_slice(ReplyHead::simple(cookie, Err(error)).as_bytes());
            return;
        }
        let mut end = text.len().min(MAX_ERROR_TEXT_BYTES);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        let text = text.get(..end).unwrap_or_default().as_bytes();
        // Fits: at most MAX_ERROR_TEXT_BYTES.
        let text_bytes = u16::try_from(text.len()).unwrap_or_default();
        let head = ReplyHead::chunk(chunk::FLAG_DONE, chunk::ERROR, cookie, 6 + u32::from(text_bytes))
            .push(&error.errno().to_be_bytes())
            .push(&text_bytes.to_be_bytes());
        out.extend_from_slice(head.as_bytes());
        out.extend_from_slice(text);
    }

    /// Appends the complete answer of a successful BLOCK_STATUS. `extents` must not be empty, and their
    /// lengths must not sum up to more than the request's; an empty list is answered as "all allocated".
    pub fn push_block_status(&self, request: &Request, extents: &[Extent], out: &mut Vec<u8>) {
        let unknown = [Extent { length: request.length(), kind: ExtentKind::Data }];
        let extents = if extents.is_empty() { &unknown } else { extents };
        debug_assert!(
            extents.iter().map(|extent| u64::from(extent.length)).sum::<u64>() <= u64::from(request.length()),
            "extents reach beyond the request"
        );
        let length = u32::try_from(4 + 8 * extents.len()).unwrap_or(u32::MAX);
        let head = ReplyHead::chunk(chunk::FLAG_DONE, chunk::BLOCK_STATUS, request.cookie(), length)
            .push(&BASE_ALLOCATION_ID.to_be_bytes());
        out.extend_from_slice(head.as_bytes());
        for extent in extents {
            out.extend_from_slice(&extent.length.to_be_bytes());
            out.extend_from_slice(&extent.kind.state().to_be_bytes());
        }
    }
}

const _: () = assert!(MAX_ERROR_TEXT_BYTES <= u16::MAX as usize);
const _: () = assert!(MAX_DATA_BYTES < u32::MAX - 8);

#[cfg(test)]
mod tests {
    use super::super::ExportInfo;
    use super::super::transmission::{Received, WireRequest};
    use super::super::wire::cmd;
    use super::*;

    const COOKIE: u64 = 0x0102_0304_0506_0708;

    fn session(structured_replies: bool) -> Session {
        let export = ExportInfo::volume(1 << 30, 512);
        Session {
            size_bytes: export.size_bytes,
            block_min: 512,
            flags: export.flags(structured_replies),
            structured_replies,
            meta_base_allocation: structured_replies,
        }
    }

    fn request(session: &Session, command: u16, offset: u64, length: u32) -> Request {
        match session.receive(&WireRequest { flags: 0, command, cookie: COOKIE, offset, length }.encode()) {
            Received::Request(request) => request,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn simple_replies_as_the_protocol_draws_them() {
        let session = session(false);
        let head = session.success_head(&request(&session, cmd::READ, 0, 512));
        assert_eq!(head.as_bytes(), b"\x67\x44\x66\x98\0\0\0\0\x01\x02\x03\x04\x05\x06\x07\x08");
        let mut out = Vec::new();
        session.push_error(COOKIE, NbdError::NoSpace, "no room for this text", &mut out);
        assert_eq!(out, b"\x67\x44\x66\x98\0\0\0\x1c\x01\x02\x03\x04\x05\x06\x07\x08");
    }

    #[test]
    fn chunks_as_the_protocol_draws_them() {
        let session = session(true);
        let head = session.success_head(&request(&session, cmd::READ, 0x1000, 0x200));
        assert_eq!(
            head.as_bytes(),
            b"\x66\x8e\x33\xef\0\x01\0\x01\x01\x02\x03\x04\x05\x06\x07\x08\0\0\x02\x08\0\0\0\0\0\0\x10\0"
        );
        let hole = ReplyHead::offset_hole(COOKIE, 0x1000, 0x200, false);
        assert_eq!(
            hole.as_bytes(),
            b"\x66\x8e\x33\xef\0\0\0\x02\x01\x02\x03\x04\x05\x06\x07\x08\0\0\0\x0c\0\0\0\0\0\0\x10\0\0\0\x02\0"
        );
        assert_eq!(hole.as_bytes().len(), MAX_HEAD_BYTES);
        assert_eq!(
            ReplyHead::none(COOKIE).as_bytes(),
            b"\x66\x8e\x33\xef\0\x01\0\0\x01\x02\x03\x04\x05\x06\x07\x08\0\0\0\0"
        );
        let mut out = Vec::new();
        session.push_error(COOKIE, NbdError::Shutdown, "bye", &mut out);
        assert_eq!(
            out,
            b"\x66\x8e\x33\xef\0\x01\x80\x01\x01\x02\x03\x04\x05\x06\x07\x08\0\0\0\x09\0\0\0\x6c\0\x03bye"
        );
    }

    #[test]
    fn a_long_error_text_is_cut_between_characters() {
        let mut out = Vec::new();
        session(true).push_error(COOKIE, NbdError::Io, &"ä".repeat(MAX_ERROR_TEXT_BYTES), &mut out);
        assert_eq!(out.len(), 26 + MAX_ERROR_TEXT_BYTES);
        let mut out = Vec::new();
        session(true).push_error(COOKIE, NbdError::Io, &format!("x{}", "ä".repeat(200)), &mut out);
        assert_eq!(out.len(), 26 + MAX_ERROR_TEXT_BYTES - 1);
        assert!(std::str::from_utf8(&out[26..]).is_ok());
    }

    #[test]
    fn block_status_lists_extents_and_an_empty_list_means_allocated() {
        let session = session(true);
        let request = request(&session, cmd::BLOCK_STATUS, 0, 0x3000);
        let extents = [
            Extent { length: 0x1000, kind: ExtentKind::Hole },
            Extent { length: 0x2000, kind: ExtentKind::Data },
        ];
        let mut out = Vec::new();
        session.push_block_status(&request, &extents, &mut out);
        assert_eq!(
            out,
            b"\x66\x8e\x33\xef\0\x01\0\x05\x01\x02\x03\x04\x05\x06\x07\x08\0\0\0\x14\0\0\0\x01\
              \0\0\x10\0\0\0\0\x03\0\0\x20\0\0\0\0\0"
        );
        let mut out = Vec::new();
        session.push_block_status(&request, &[], &mut out);
        assert!(out.ends_with(b"\0\0\x30\0\0\0\0\0"));
    }

    #[test]
    fn every_error_of_the_core_has_its_number() {
        let numbers = [
            (RequestError::NotPrimary, 1),
            (RequestError::Io, 5),
            (RequestError::Invalid, 22),
            (RequestError::NoSpace, 28),
            (RequestError::Unsupported, 95),
            (RequestError::Shutdown, 108),
        ];
        for (error, number) in numbers {
            assert_eq!(NbdError::from(error).errno(), number);
        }
    }
}
