//! The NBD protocol: how a client finds an export, and how its requests become requests of the core.
//!
//! A connection lives in two phases. *Negotiation* ([`mod@negotiate`], driven by [`driver`]) is the slow
//! path: fixed newstyle options, on tokio, under a deadline. It ends with a [`Negotiated`] value; the
//! socket then goes to the resource's own thread. *Transmission* ([`transmission`], [`reply`],
//! [`pieces`]) is a pure codec without allocation for that thread: 28 bytes in, at most 32 bytes of
//! head out, and the data stays in the buffer it was read into.
//!
//! ```text
//!   accept -> greeting -> client flags -> option* -> GO | EXPORT_NAME -> transmission -> DISC
//!                                           |                                |
//!                                           +-- ABORT, broken rule, deadline +-- broken rule
//! ```
//!
//! # What is offered
//!
//! Options GO, INFO, LIST, ABORT, EXPORT_NAME, STRUCTURED_REPLY, LIST_META_CONTEXT and
//! SET_META_CONTEXT (`base:allocation`). STARTTLS and EXTENDED_HEADERS are answered "unsupported", as
//! is everything unknown. Commands READ, WRITE, DISC, FLUSH, TRIM, WRITE_ZEROES, BLOCK_STATUS, each
//! as the export's [`ExportInfo`] allows. CACHE is understood but not offered: the backing disk is
//! opened with O_DIRECT, there is nothing to fill.
//!
//! # Several connections to one export
//!
//! CAN_MULTI_CONN promises that a flush, or a write with FUA, on one connection covers what was
//! completed on every other. That holds here: all connections of an export feed the same core, which
//! has one order of completions and one cache (the disk's), and a flush there covers every write
//! completed before it, whoever sent it. [`ExportInfo::multi_conn`] is therefore to be set for every
//! export served by a core; it exists for a server that puts something else behind this codec.
//!
//! # Block sizes
//!
//! The largest data request advertised is one request of the core ([`wire::MAX_BLOCK_BYTES`], 1 MiB).
//! Clients that never asked may send up to [`wire::MAX_DATA_BYTES`] (32 MiB), which
//! [`pieces`] cuts. A client that never asked for the smallest block gets EINVAL for an unaligned
//! request; nothing is rounded.
pub mod allocation;
pub mod driver;
pub mod export;
pub mod negotiate;
mod options;
pub mod pieces;
pub mod reply;
pub mod transmission;
pub mod wire;

pub use driver::{NegotiateError, negotiate};
pub use export::{ExportDirectory, ExportInfo, ExportRefusal, ListedExport, RefusalKind};
pub use negotiate::{CloseReason, Negotiated, Negotiation, Step};
pub use pieces::{Piece, Pieces, Progress};
pub use reply::{Extent, ExtentKind, NbdError, ReplyHead};
pub use transmission::{Breach, Command, Received, Rejected, Request, Session};
pub use wire::TransmissionFlags;
