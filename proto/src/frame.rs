//! Frames: a fixed head, a prost header, a raw payload.
//!
//! ```text
//! offset  size  field           (all integers big-endian)
//!      0     4  magic           "LKS1"
//!      4     1  version         of this layout, 1
//!      5     1  flags           bit 0: the payload has no CRC (`data-integrity-alg none`)
//!      6     2  type            `MessageType`
//!      8     2  header_len      bytes, at most MAX_HEADER_BYTES
//!     10     2  reserved        0
//!     12     4  payload_len     bytes, as the type's `PayloadKind` allows
//!     16     4  payload_crc32c  over the payload; 0 when there is none, or with bit 0 of the flags
//!     20     4  head_crc32c     over bytes 0..20 and the header
//!     24        header          prost message of the type, `header_len` bytes
//!               payload         `payload_len` bytes
//! ```
//!
//! A receiver works in three steps and allocates nothing that a peer could inflate: [`Head::decode`] bounds both
//! lengths from 24 bytes alone; [`Head::decode_message`] proves head and header by their CRC and gives a [`Message`]
//! whose ranges are sound; the payload then goes straight into a buffer of the caller, who proves it with
//! [`Head::check_payload`]. Until that last check has passed the payload must not be used.
//!
//! What a frame cannot know (is the volume there, does the range end on the disk, does the message fit the state of
//! the session) stays with the core. Unknown prost fields are skipped, so a later version may add some; unknown
//! message types are refused, since both sides negotiate the protocol version first.
#![warn(clippy::indexing_slicing, clippy::arithmetic_side_effects, clippy::wildcard_enum_match_arm)]

use crate::limits::{
    MAX_BITMAP_WORDS, MAX_END_SECTOR, MAX_HEADER_BYTES, MAX_PAYLOAD_BYTES, MAX_REQUEST_SECTORS,
    MAX_TRIM_SECTORS,
};
use crate::{Message, MessageType, PayloadKind};

/// Length of the fixed head of a frame, bytes.
pub const HEAD_BYTES: usize = 24;
/// First four bytes of a frame, "LKS1".
pub const MAGIC: u32 = u32::from_be_bytes(*b"LKS1");
/// Version of the frame layout. Not the protocol version, which `Hello` negotiates.
pub const LAYOUT_VERSION: u8 = 1;

/// Bit of the flags: the sender did not sum the payload. Only blocks may travel so.
const FLAG_UNCHECKED: u8 = 1;

/// Bytes of a sector on the wire, whatever the disks have.
const SECTOR_BYTES: usize = 512;
/// Bytes of a bitmap word on the wire.
const WORD_BYTES: usize = 8;
/// Sectors that one bitmap word describes: 64 bits of 4 KiB.
const SECTORS_PER_WORD: u64 = 64 * 8;
/// Bytes of the head that its own CRC covers.
const HEAD_PREFIX_BYTES: usize = HEAD_BYTES - 4;

const _: () = assert!(MAX_HEADER_BYTES <= u16::MAX as usize);
const _: () = assert!(MAX_PAYLOAD_BYTES <= u32::MAX as usize);
const _: () = assert!(MAX_PAYLOAD_BYTES.is_multiple_of(SECTOR_BYTES));

/// CRC-32C of a payload as it stands in the head. An empty payload has 0.
#[must_use]
pub fn payload_crc(payload: &[u8]) -> u32 {
    crc32c::crc32c(payload)
}

/// CRC-32C of a payload that lies in several pieces: start with 0, pass the result on to the next piece.
#[must_use]
pub fn payload_crc_append(crc: u32, piece: &[u8]) -> u32 {
    crc32c::crc32c_append(crc, piece)
}

/// Appends head and header of one frame to `out`; the payload follows it on the wire by itself.
///
/// `payload_len` is in bytes, `payload_crc` comes from [`payload_crc()`]; `None` sends blocks without one, at the wish
/// of an operator who has other means against damage on the way. With enough spare capacity in `out`
/// (at most [`HEAD_BYTES`] + [`MAX_HEADER_BYTES`]) nothing is allocated.
///
/// # Errors
/// The frame would break the rules that [`Head::decode_message`] checks; `out` is as before. Our own side made a
/// message that no peer may accept, so the caller has a bug or a text longer than a header holds.
pub fn encode_head(
    message: &Message,
    payload_len: usize,
    payload_crc: Option<u32>,
    out: &mut Vec<u8>,
) -> Result<(), FrameError> {
    let kind = message.message_type();
    let header_len = message.header_len();
    let header_len_wire = u16::try_from(header_len)
        .ok()
        .filter(|_| header_len <= MAX_HEADER_BYTES)
        .ok_or(FrameError::HeaderTooLong { kind, got_bytes: header_len })?;
    check_payload_len(kind, payload_len)?;
    check_message(message, payload_len)?;
    let payload_len_wire = u32::try_from(payload_len)
        .map_err(|_| FrameError::PayloadTooLong { kind, got_bytes: payload_len })?;
    let flags = match payload_crc {
        Some(got) if payload_len == 0 && got != 0 => return Err(FrameError::CrcOfNothing { kind, got }),
        None if payload_len > 0 && kind.payload_kind() != PayloadKind::Blocks => {
            return Err(FrameError::Unchecked { kind });
        }
        None if payload_len > 0 => FLAG_UNCHECKED,
        Some(_) | None => 0,
    };

    let start = out.len();
    out.reserve(HEAD_BYTES.saturating_add(header_len));
    out.extend_from_slice(&MAGIC.to_be_bytes());
    out.extend_from_slice(&[LAYOUT_VERSION, flags]);
    out.extend_from_slice(&(kind as u16).to_be_bytes());
    out.extend_from_slice(&header_len_wire.to_be_bytes());
    out.extend_from_slice(&[0, 0]);
    out.extend_from_slice(&payload_len_wire.to_be_bytes());
    out.extend_from_slice(&payload_crc.unwrap_or(0).to_be_bytes());
    let prefix_crc = crc32c::crc32c(out.split_at(start).1);
    out.extend_from_slice(&[0; 4]); // the CRC, once the header stands behind it
    message.encode_header(out);

    let frame = out.split_at_mut(start).1;
    if let Some((head, header)) = frame.split_at_mut_checked(HEAD_BYTES)
        && let Some(crc) = head.last_chunk_mut::<4>()
    {
        debug_assert_eq!(header.len(), header_len, "prost announced another length than it wrote");
        *crc = crc32c::crc32c_append(prefix_crc, header).to_be_bytes();
    }
    Ok(())
}

/// The fixed head of a frame: lengths that are within the limits, and a known type. Its CRC is proven later, by
/// [`decode_message`](Self::decode_message), because it covers the header too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    kind: MessageType,
    header_len: u16,
    payload_len: u32,
    /// `None`: the sender did not sum it.
    payload_crc: Option<u32>,
    /// CRC over bytes 0..20 as received.
    prefix_crc: u32,
    /// What the sender says that CRC is, once carried on over the header.
    head_crc: u32,
}

impl Head {
    /// Decodes the first [`HEAD_BYTES`] of a frame.
    ///
    /// # Errors
    /// The bytes are not the head of a frame that this side may receive.
    pub fn decode(bytes: &[u8; HEAD_BYTES]) -> Result<Self, FrameError> {
        #[rustfmt::skip]
        let [m0, m1, m2, m3, version, flags, t0, t1, h0, h1, r0, r1, l0, l1, l2, l3, p0, p1, p2, p3, c0, c1, c2, c3] =
            *bytes;
        let magic = u32::from_be_bytes([m0, m1, m2, m3]);
        if magic != MAGIC {
            return Err(FrameError::Magic { got: magic });
        }
        if version != LAYOUT_VERSION {
            return Err(FrameError::Version { got: version });
        }
        if flags & !FLAG_UNCHECKED != 0 {
            return Err(FrameError::Flags { got: flags });
        }
        let reserved = u16::from_be_bytes([r0, r1]);
        if reserved != 0 {
            return Err(FrameError::Reserved { got: reserved });
        }
        let number = u16::from_be_bytes([t0, t1]);
        let kind = MessageType::from_wire(number).ok_or(FrameError::UnknownType { got: number })?;

        let header_len = u16::from_be_bytes([h0, h1]);
        if usize::from(header_len) > MAX_HEADER_BYTES {
            return Err(FrameError::HeaderTooLong { kind, got_bytes: header_len.into() });
        }
        let payload_len = u32::from_be_bytes([l0, l1, l2, l3]);
        // On a 16-bit machine the length would not fit; it is over the limit there as well.
        check_payload_len(kind, usize::try_from(payload_len).unwrap_or(usize::MAX))?;
        let crc = u32::from_be_bytes([p0, p1, p2, p3]);
        let unchecked = flags & FLAG_UNCHECKED != 0;
        if unchecked && (payload_len == 0 || kind.payload_kind() != PayloadKind::Blocks) {
            return Err(FrameError::Unchecked { kind });
        }
        if (unchecked || payload_len == 0) && crc != 0 {
            return Err(FrameError::CrcOfNothing { kind, got: crc });
        }
        let payload_crc = (!unchecked).then_some(crc);
        let (prefix, _) = bytes.split_at(HEAD_PREFIX_BYTES);
        let head_crc = u32::from_be_bytes([c0, c1, c2, c3]);
        Ok(Self { kind, header_len, payload_len, payload_crc, prefix_crc: crc32c::crc32c(prefix), head_crc })
    }

    /// Type of the message.
    #[must_use]
    pub const fn kind(&self) -> MessageType {
        self.kind
    }

    /// Length of the header that follows, bytes; at most [`MAX_HEADER_BYTES`].
    #[must_use]
    pub const fn header_len(&self) -> usize {
        self.header_len as usize
    }

    /// Length of the payload behind the header, bytes; at most [`MAX_PAYLOAD_BYTES`], and as the type allows.
    #[must_use]
    pub const fn payload_len(&self) -> usize {
        self.payload_len as usize
    }

    /// Length of the payload, sectors. This is the length of a `Data`, whose header does not repeat it.
    #[must_use]
    pub const fn payload_sectors(&self) -> u64 {
        sectors_of(self.payload_len as usize)
    }

    /// What the sender computed over the payload; `None`: nothing, and nothing is there to be compared. Proven only
    /// together with the head, by `decode_message`.
    #[must_use]
    pub const fn payload_crc(&self) -> Option<u32> {
        self.payload_crc
    }

    /// Proves head and header by their CRC, then decodes the header and checks what it says.
    ///
    /// `header` is exactly the [`header_len`](Self::header_len) bytes behind the head.
    ///
    /// # Errors
    /// The bytes were damaged, are no header of this type, or name a range that cannot be.
    pub fn decode_message(&self, header: &[u8]) -> Result<Message, FrameError> {
        let kind = self.kind;
        if header.len() != self.header_len() {
            return Err(FrameError::HeaderLength {
                kind,
                expected_bytes: self.header_len(),
                got_bytes: header.len(),
            });
        }
        let computed = crc32c::crc32c_append(self.prefix_crc, header);
        if computed != self.head_crc {
            return Err(FrameError::HeadCrc { kind, expected: self.head_crc, got: computed });
        }
        let message = Message::decode_header(kind, header)
            .map_err(|source| FrameError::Header { kind, source: Box::new(source) })?;
        check_message(&message, self.payload_len())?;
        Ok(message)
    }

    /// Compares the CRC over the received payload, which `compute` gives, with the one in the head. It is not computed
    /// where the sender sent none.
    ///
    /// # Errors
    /// They differ: the payload must not be used.
    pub fn check_payload(&self, compute: impl FnOnce() -> u32) -> Result<(), FrameError> {
        let Some(expected) = self.payload_crc else { return Ok(()) };
        let got = compute();
        if got == expected { Ok(()) } else { Err(FrameError::PayloadCrc { kind: self.kind, expected, got }) }
    }
}

/// Whether a payload of this length may follow a message of type `kind`.
fn check_payload_len(kind: MessageType, payload_len: usize) -> Result<(), FrameError> {
    let (unit_bytes, max_bytes) = match kind.payload_kind() {
        PayloadKind::None if payload_len == 0 => return Ok(()),
        PayloadKind::None => return Err(FrameError::PayloadUnexpected { kind, got_bytes: payload_len }),
        PayloadKind::Blocks if payload_len == 0 => return Err(FrameError::PayloadMissing { kind }),
        PayloadKind::Blocks => (SECTOR_BYTES, MAX_PAYLOAD_BYTES),
        // Zero words are legal: the last piece of a bitmap may find nothing left to carry.
        PayloadKind::BitmapWords => (WORD_BYTES, MAX_BITMAP_WORDS.saturating_mul(WORD_BYTES)),
    };
    if payload_len > max_bytes {
        return Err(FrameError::PayloadTooLong { kind, got_bytes: payload_len });
    }
    if !payload_len.is_multiple_of(unit_bytes) {
        return Err(FrameError::PayloadUneven { kind, got_bytes: payload_len, unit_bytes });
    }
    Ok(())
}

/// Whether the ranges of a message are sound, and its payload as long as it says. The same on both sides.
fn check_message(message: &Message, payload_len: usize) -> Result<(), FrameError> {
    let kind = message.message_type();
    match message {
        Message::Data(data) => check_range(kind, data.sector, sectors_of(payload_len), MAX_REQUEST_SECTORS),
        Message::Discard(trim) | Message::WriteZeroes(trim) => {
            check_range(kind, trim.sector, trim.nr_sectors, MAX_TRIM_SECTORS)
        }
        // These answer writes and trims alike.
        Message::RecvAck(ack) | Message::WriteAck(ack) | Message::NegAck(ack) => {
            check_range(kind, ack.sector, ack.nr_sectors, MAX_TRIM_SECTORS)
        }
        Message::OutOfSync(range) | Message::OvResult(range) => {
            check_range(kind, range.sector, range.nr_sectors, MAX_TRIM_SECTORS)
        }
        // These answer requests for data.
        Message::NegDReply(ack) | Message::RsWriteAck(ack) | Message::NegRsDReply(ack) => {
            check_range(kind, ack.sector, ack.nr_sectors, MAX_REQUEST_SECTORS)
        }
        Message::DataRequest(request) | Message::RsDataRequest(request) | Message::OvRequest(request) => {
            check_range(kind, request.sector, request.nr_sectors, MAX_REQUEST_SECTORS)
        }
        Message::RsChecksumRequest(request) => {
            check_range(kind, request.sector, request.nr_sectors, MAX_REQUEST_SECTORS)
        }
        Message::RsDeallocated(reply) | Message::RsIsInSync(reply) => {
            check_range(kind, reply.sector, reply.nr_sectors, MAX_REQUEST_SECTORS)
        }
        Message::DataReply(reply) | Message::RsDataReply(reply) => {
            check_range(kind, reply.sector, reply.nr_sectors, MAX_REQUEST_SECTORS)?;
            if reply.nr_sectors == sectors_of(payload_len) {
                Ok(())
            } else {
                Err(FrameError::PayloadMismatch {
                    kind,
                    nr_sectors: reply.nr_sectors,
                    payload_sectors: sectors_of(payload_len),
                })
            }
        }
        Message::Bitmap(piece) => {
            let words = payload_len.checked_div(WORD_BYTES).map_or(u64::MAX, |words| words as u64);
            let end = piece.first_word.checked_add(words);
            if end.is_some_and(|end| end <= MAX_END_SECTOR.div_ceil(SECTORS_PER_WORD)) {
                Ok(())
            } else {
                Err(FrameError::BitmapOverflow { first_word: piece.first_word, words })
            }
        }
        Message::Barrier(_)
        | Message::BarrierAck(_)
        | Message::SyncUuid(_)
        | Message::ResyncFinished(_)
        | Message::OvReply(_)
        | Message::VerifyFinished(_)
        | Message::Hello(_)
        | Message::VolumeInfo(_)
        | Message::State(_)
        | Message::StateRequest(_)
        | Message::StateReply(_)
        | Message::Ping(_)
        | Message::PingAck(_)
        | Message::TearDown(_)
        | Message::ProtocolUpdate(_) => Ok(()),
    }
}

/// Whether a range is non-empty, at most `max_sectors` long, and ends where a disk can end.
fn check_range(kind: MessageType, sector: u64, nr_sectors: u64, max_sectors: u64) -> Result<(), FrameError> {
    if nr_sectors == 0 {
        return Err(FrameError::RangeEmpty { kind, sector });
    }
    if nr_sectors > max_sectors {
        return Err(FrameError::RangeTooLong { kind, got_sectors: nr_sectors, max_sectors });
    }
    match sector.checked_add(nr_sectors) {
        Some(end) if end <= MAX_END_SECTOR => Ok(()),
        Some(_) | None => Err(FrameError::RangeOverflow { kind, sector, nr_sectors }),
    }
}

/// Sectors in so many payload bytes.
const fn sectors_of(payload_len: usize) -> u64 {
    (payload_len / SECTOR_BYTES) as u64
}

/// One frame, or how much is missing to the next step of it.
#[derive(Clone, Debug, PartialEq)]
pub enum Decoded<'a> {
    /// A whole frame, proven by both CRCs.
    Frame {
        /// The message.
        message: Message,
        /// The payload, borrowed from the input.
        payload: &'a [u8],
    },
    /// The input ends inside a frame. Nothing was consumed.
    NeedMore {
        /// At least so many bytes must follow, never 0. It may be a step only: a head must be there before the
        /// length of its payload is known.
        bytes: usize,
    },
}

/// Takes frames off the front of a byte slice. For tests, fuzzers and tools; the data path reads payloads into
/// their final buffers and uses [`Head`] directly.
#[derive(Clone, Debug)]
pub struct Decoder<'a> {
    rest: &'a [u8],
}

impl<'a> Decoder<'a> {
    /// A decoder at the first byte of `input`, which must be the first of a frame.
    #[must_use]
    pub const fn new(input: &'a [u8]) -> Self {
        Self { rest: input }
    }

    /// What was not consumed yet.
    #[must_use]
    pub const fn rest(&self) -> &'a [u8] {
        self.rest
    }

    /// Takes the next frame. At the end of the input it asks for [`HEAD_BYTES`] more.
    ///
    /// # Errors
    /// The input breaks the rules of the wire. There is no way to find the next frame: drop the connection.
    pub fn next_frame(&mut self) -> Result<Decoded<'a>, FrameError> {
        let Some((head, behind)) = self.rest.split_first_chunk::<HEAD_BYTES>() else {
            return Ok(Decoded::NeedMore { bytes: HEAD_BYTES.saturating_sub(self.rest.len()) });
        };
        let head = Head::decode(head)?;
        let Some((header, behind)) = behind.split_at_checked(head.header_len()) else {
            return Ok(Decoded::NeedMore { bytes: head.header_len().saturating_sub(behind.len()) });
        };
        let message = head.decode_message(header)?;
        let Some((payload, behind)) = behind.split_at_checked(head.payload_len()) else {
            return Ok(Decoded::NeedMore { bytes: head.payload_len().saturating_sub(behind.len()) });
        };
        head.check_payload(|| payload_crc(payload))?;
        self.rest = behind;
        Ok(Decoded::Frame { message, payload })
    }
}

/// Who has to act on a [`FrameError`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameErrorKind {
    /// The other end is no lockstep node, or one of another age: the operator mends addresses or versions.
    Incompatible,
    /// Bytes changed on the way: the network or a machine's memory is at fault. Reconnecting may help.
    Damaged,
    /// The peer sent what no correct peer sends: a bug there.
    PeerBrokeProtocol,
    /// This side misused the codec: a bug here.
    CallerMistake,
}

/// Why bytes are no frame, or a message cannot become one.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// Another service listens there, a plain-text probe connected to us, or the stream lost its step.
    #[error(
        "expected frame magic {MAGIC:#010x}, got {got:#010x}: the other end is no lockstep node; check address and port on both nodes"
    )]
    Magic {
        /// The four bytes received.
        got: u32,
    },
    /// The frame layout of a later lockstep.
    #[error("expected frame layout {LAYOUT_VERSION}, got {got}: run the same lockstep release on both nodes")]
    Version {
        /// The version received.
        got: u8,
    },
    /// No flag is defined yet.
    #[error("expected frame flags 0 or 1, got {got:#04x}: run the same lockstep release on both nodes")]
    Flags {
        /// The flags received.
        got: u8,
    },
    /// The reserved field is not zero.
    #[error("expected 0 in the reserved field, got {got:#06x}: run the same lockstep release on both nodes")]
    Reserved {
        /// The value received.
        got: u16,
    },
    /// A message that this version does not have; the negotiated protocol version excludes it.
    #[error("message type {got:#06x} is unknown here: run the same lockstep release on both nodes")]
    UnknownType {
        /// The number received.
        got: u16,
    },
    /// The header is longer than any header may be. When encoding: shorten the text in the message.
    #[error("{kind:?} has a header of {got_bytes} bytes, at most {MAX_HEADER_BYTES} are allowed")]
    HeaderTooLong {
        /// Type of the message.
        kind: MessageType,
        /// Length found.
        got_bytes: usize,
    },
    /// The payload is longer than this type of message may carry.
    #[error("{kind:?} has a payload of {got_bytes} bytes, more than its limit; split the request")]
    PayloadTooLong {
        /// Type of the message.
        kind: MessageType,
        /// Length found.
        got_bytes: usize,
    },
    /// A message without payload announces one.
    #[error("{kind:?} carries no payload, but {got_bytes} bytes are announced")]
    PayloadUnexpected {
        /// Type of the message.
        kind: MessageType,
        /// Length found.
        got_bytes: usize,
    },
    /// A message that lives by its payload has none.
    #[error("{kind:?} must carry at least one sector, but its payload is empty")]
    PayloadMissing {
        /// Type of the message.
        kind: MessageType,
    },
    /// The payload is not made of whole sectors or words.
    #[error("{kind:?} has a payload of {got_bytes} bytes, expected a multiple of {unit_bytes}")]
    PayloadUneven {
        /// Type of the message.
        kind: MessageType,
        /// Length found.
        got_bytes: usize,
        /// What it must be a multiple of.
        unit_bytes: usize,
    },
    /// The header names another length than the payload has.
    #[error("{kind:?} names {nr_sectors} sectors, but its payload has {payload_sectors}")]
    PayloadMismatch {
        /// Type of the message.
        kind: MessageType,
        /// What the header says.
        nr_sectors: u64,
        /// What the payload holds.
        payload_sectors: u64,
    },
    /// A CRC other than 0 stands beside an empty payload.
    #[error("{kind:?} has no payload, so its payload CRC must be 0, got {got:#010x}")]
    CrcOfNothing {
        /// Type of the message.
        kind: MessageType,
        /// The CRC found.
        got: u32,
    },
    /// A payload without a CRC where there must be one, or the word for that beside an empty payload.
    #[error("{kind:?} says that its payload has no CRC, which only blocks may do")]
    Unchecked {
        /// Type of the message.
        kind: MessageType,
    },
    /// Head or header changed on the way.
    #[error(
        "head of {kind:?} is damaged: its CRC-32C is {got:#010x}, the sender computed {expected:#010x}; suspect the network card, its offloads, or memory"
    )]
    HeadCrc {
        /// Type of the message, if that field is still right.
        kind: MessageType,
        /// What the sender wrote.
        expected: u32,
        /// What the bytes give.
        got: u32,
    },
    /// The payload changed on the way.
    #[error(
        "payload of {kind:?} is damaged: its CRC-32C is {got:#010x}, the sender computed {expected:#010x}; suspect the network card, its offloads, or memory"
    )]
    PayloadCrc {
        /// Type of the message.
        kind: MessageType,
        /// What the sender wrote.
        expected: u32,
        /// What the bytes give.
        got: u32,
    },
    /// The header is intact but no message of its type.
    #[error("header of {kind:?} cannot be decoded")]
    Header {
        /// Type of the message.
        kind: MessageType,
        /// Where prost stopped.
        #[source]
        source: Box<prost::DecodeError>,
    },
    /// The caller passed another number of header bytes than the head asks for.
    #[error("header of {kind:?} has {expected_bytes} bytes, the caller passed {got_bytes}")]
    HeaderLength {
        /// Type of the message.
        kind: MessageType,
        /// What the head says.
        expected_bytes: usize,
        /// What was passed.
        got_bytes: usize,
    },
    /// A range of no sectors.
    #[error("{kind:?} names an empty range at sector {sector}")]
    RangeEmpty {
        /// Type of the message.
        kind: MessageType,
        /// Where it starts.
        sector: u64,
    },
    /// A range longer than one request may be.
    #[error("{kind:?} names {got_sectors} sectors, at most {max_sectors} are allowed")]
    RangeTooLong {
        /// Type of the message.
        kind: MessageType,
        /// Length found.
        got_sectors: u64,
        /// The limit for this type.
        max_sectors: u64,
    },
    /// A range that ends behind the end of any disk.
    #[error("{kind:?} names {nr_sectors} sectors at {sector}, no disk reaches beyond {MAX_END_SECTOR}")]
    RangeOverflow {
        /// Type of the message.
        kind: MessageType,
        /// Where it starts.
        sector: u64,
        /// Its length.
        nr_sectors: u64,
    },
    /// A piece of a bitmap behind the end of any bitmap.
    #[error("Bitmap names {words} words at {first_word}, no disk reaches so far")]
    BitmapOverflow {
        /// Where the piece starts, 64-bit words.
        first_word: u64,
        /// Its length, 64-bit words.
        words: u64,
    },
}

impl FrameError {
    /// Who has to act.
    #[must_use]
    pub const fn kind(&self) -> FrameErrorKind {
        match self {
            Self::Magic { .. }
            | Self::Version { .. }
            | Self::Flags { .. }
            | Self::Reserved { .. }
            | Self::UnknownType { .. } => FrameErrorKind::Incompatible,
            Self::HeadCrc { .. } | Self::PayloadCrc { .. } => FrameErrorKind::Damaged,
            Self::HeaderTooLong { .. }
            | Self::PayloadTooLong { .. }
            | Self::PayloadUnexpected { .. }
            | Self::PayloadMissing { .. }
            | Self::PayloadUneven { .. }
            | Self::PayloadMismatch { .. }
            | Self::CrcOfNothing { .. }
            | Self::Unchecked { .. }
            | Self::Header { .. }
            | Self::RangeEmpty { .. }
            | Self::RangeTooLong { .. }
            | Self::RangeOverflow { .. }
            | Self::BitmapOverflow { .. } => FrameErrorKind::PeerBrokeProtocol,
            Self::HeaderLength { .. } => FrameErrorKind::CallerMistake,
        }
    }
}
