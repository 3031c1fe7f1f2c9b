//! Numbers of the NBD protocol (doc/proto.md of the reference implementation) and the limits this
//! server puts on a client. All integers on the wire are big-endian.
use std::fmt;

/// First eight bytes of the greeting.
pub const NBD_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Second eight bytes of a newstyle greeting, and the start of every option.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Start of every answer to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Start of every request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Start of a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Start of a chunk of a structured reply.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

/// Handshake and client flag: fixed newstyle.
pub const FLAG_FIXED_NEWSTYLE: u16 = 1 << 0;
/// Handshake and client flag: the 124 zero bytes behind EXPORT_NAME's answer are left out.
pub const FLAG_NO_ZEROES: u16 = 1 << 1;

/// Options of a client.
pub mod option {
    /// Use this export; has no error answer.
    pub const EXPORT_NAME: u32 = 1;
    /// End the negotiation.
    pub const ABORT: u32 = 2;
    /// Name all exports.
    pub const LIST: u32 = 3;
    /// Go over to TLS.
    pub const STARTTLS: u32 = 5;
    /// Describe an export.
    pub const INFO: u32 = 6;
    /// Describe an export and use it.
    pub const GO: u32 = 7;
    /// Answers in chunks from now on.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// Name the metadata contexts of an export.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Choose metadata contexts.
    pub const SET_META_CONTEXT: u32 = 10;
    /// 64-bit lengths.
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Types of answers to an option.
pub mod rep {
    /// Done.
    pub const ACK: u32 = 1;
    /// An export's name.
    pub const SERVER: u32 = 2;
    /// A fact about an export.
    pub const INFO: u32 = 3;
    /// A metadata context.
    pub const META_CONTEXT: u32 = 4;
    /// The option is not known here.
    pub const ERR_UNSUP: u32 = (1 << 31) + 1;
    /// Known and well-formed, but not allowed now.
    pub const ERR_POLICY: u32 = (1 << 31) + 2;
    /// Malformed or out of place.
    pub const ERR_INVALID: u32 = (1 << 31) + 3;
    /// No such export.
    pub const ERR_UNKNOWN: u32 = (1 << 31) + 6;
    /// The server is going down.
    pub const ERR_SHUTDOWN: u32 = (1 << 31) + 7;
    /// The option's data is too long.
    pub const ERR_TOO_BIG: u32 = (1 << 31) + 9;
}

/// Kinds of facts about an export.
pub mod info {
    /// Size and transmission flags.
    pub const EXPORT: u16 = 0;
    /// Canonical name.
    pub const NAME: u16 = 1;
    /// Text for a person.
    pub const DESCRIPTION: u16 = 2;
    /// Smallest, preferred and largest block.
    pub const BLOCK_SIZE: u16 = 3;
}

/// Commands of the transmission phase.
pub mod cmd {
    /// Read.
    pub const READ: u16 = 0;
    /// Write; the data follows the request.
    pub const WRITE: u16 = 1;
    /// Disconnect; has no answer.
    pub const DISC: u16 = 2;
    /// Make completed writes stable.
    pub const FLUSH: u16 = 3;
    /// Discard.
    pub const TRIM: u16 = 4;
    /// Prefetch.
    pub const CACHE: u16 = 5;
    /// Zero a range.
    pub const WRITE_ZEROES: u16 = 6;
    /// Ask for metadata of a range.
    pub const BLOCK_STATUS: u16 = 7;

    /// Stable before it is answered.
    pub const FLAG_FUA: u16 = 1 << 0;
    /// Write-zeroes must not deallocate.
    pub const FLAG_NO_HOLE: u16 = 1 << 1;
    /// A read is answered in one content chunk.
    pub const FLAG_DF: u16 = 1 << 2;
    /// One extent is enough for a block status.
    pub const FLAG_REQ_ONE: u16 = 1 << 3;
    /// Write-zeroes must fail when it would not be faster than a write.
    pub const FLAG_FAST_ZERO: u16 = 1 << 4;
}

/// Types and flags of structured reply chunks.
pub mod chunk {
    /// Flag: last chunk of this reply.
    pub const FLAG_DONE: u16 = 1 << 0;
    /// Nothing (more) to say.
    pub const NONE: u16 = 0;
    /// Data at an offset.
    pub const OFFSET_DATA: u16 = 1;
    /// Zeroes at an offset.
    pub const OFFSET_HOLE: u16 = 2;
    /// Extents of a metadata context.
    pub const BLOCK_STATUS: u16 = 5;
    /// The request failed.
    pub const ERROR: u16 = (1 << 15) + 1;
}

/// Name of the one metadata context served.
pub const BASE_ALLOCATION: &str = "base:allocation";
/// The id under which `base:allocation` is answered.
pub const BASE_ALLOCATION_ID: u32 = 1;
/// State bit of `base:allocation`: not allocated.
pub const STATE_HOLE: u32 = 1 << 0;
/// State bit of `base:allocation`: reads as zeroes.
pub const STATE_ZERO: u32 = 1 << 1;

/// Length of a request on the wire, bytes.
pub const REQUEST_BYTES: usize = 28;
/// Largest block advertised, bytes: one request of the core.
pub const MAX_BLOCK_BYTES: u32 = 1 << 20;
/// Largest READ or WRITE accepted, bytes; the protocol's default for clients that did not ask.
pub const MAX_DATA_BYTES: u32 = 32 << 20;
/// Longest string of the protocol, bytes (export names, error texts).
pub const MAX_STRING_BYTES: usize = 4096;
/// Longest option data looked at, bytes. Longer ones are skipped and answered ERR_TOO_BIG.
pub const MAX_OPTION_BYTES: u32 = 16 << 10;
/// Longest option data skipped, bytes. A client that announces more is dropped.
pub const MAX_SKIPPED_OPTION_BYTES: u32 = 1 << 20;
/// Options one client may send. Tools that list send about two per export.
pub const MAX_OPTIONS: u32 = 1024;

const _: () = assert!(MAX_BLOCK_BYTES as usize == lockstep_proto::limits::MAX_PAYLOAD_BYTES);
const _: () = assert!(MAX_BLOCK_BYTES <= MAX_DATA_BYTES);
const _: () = assert!(MAX_OPTION_BYTES <= MAX_SKIPPED_OPTION_BYTES);
// A GO with the longest name and a handful of information requests must fit.
const _: () = assert!(MAX_STRING_BYTES + 256 < MAX_OPTION_BYTES as usize);

/// Transmission flags: what the client may use on this export.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct TransmissionFlags(pub u16);

impl TransmissionFlags {
    /// The flags are valid; always set.
    pub const HAS_FLAGS: Self = Self(1 << 0);
    /// Writes fail with EPERM.
    pub const READ_ONLY: Self = Self(1 << 1);
    /// FLUSH is served.
    pub const SEND_FLUSH: Self = Self(1 << 2);
    /// The FUA flag is served.
    pub const SEND_FUA: Self = Self(1 << 3);
    /// TRIM is served.
    pub const SEND_TRIM: Self = Self(1 << 5);
    /// WRITE_ZEROES is served.
    pub const SEND_WRITE_ZEROES: Self = Self(1 << 6);
    /// The DF flag is served (structured replies only).
    pub const SEND_DF: Self = Self(1 << 7);
    /// A flush on one connection covers the others.
    pub const CAN_MULTI_CONN: Self = Self(1 << 8);
    /// CACHE is served.
    pub const SEND_CACHE: Self = Self(1 << 10);
    /// The FAST_ZERO flag is served.
    pub const SEND_FAST_ZERO: Self = Self(1 << 11);

    /// Whether every flag of `other` is set.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// These flags and `other`, if `on`.
    #[must_use]
    pub const fn with(self, other: Self, on: bool) -> Self {
        if on { Self(self.0 | other.0) } else { self }
    }
}

impl fmt::Debug for TransmissionFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TransmissionFlags({:#06x})", self.0)
    }
}
