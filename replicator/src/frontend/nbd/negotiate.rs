//! The negotiation as a state machine without IO: bytes in, bytes and a [`Step`] out.
//!
//! ```text
//!   ClientFlags -> OptionHead <-> OptionBody -> (GO, EXPORT_NAME) Over
//!        |             |  ^           |
//!        |             v  |           |
//!        |          SkipBody          |
//!        +-> Over <----+--------------+  broken rule, ABORT, EXPORT_NAME refused
//! ```
//!
//! Promises: the outcome does not depend on how the client's bytes are cut into pieces; no input makes
//! it panic; memory stays below one option plus one piece; every option but EXPORT_NAME gets exactly
//! one final answer. A client that breaks a rule the protocol calls mandatory is dropped with a reason.
//!
//! Clients that did not set the fixed-newstyle flag are served like the others: the flag only says that
//! the client understands answers, and one that does not sends EXPORT_NAME alone.
use super::export::{ExportDirectory, ExportInfo, ExportRefusal, resolve};
use super::options::{Malformed, info_request, meta_request, string};
use super::transmission::Session;
use super::wire::{
    BASE_ALLOCATION, BASE_ALLOCATION_ID, FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES, MAX_OPTION_BYTES, MAX_OPTIONS,
    MAX_SKIPPED_OPTION_BYTES, MAX_STRING_BYTES, NBD_MAGIC, OPTION_MAGIC, OPTION_REPLY_MAGIC,
    TransmissionFlags, info, option, rep,
};

/// What the caller does after [`Negotiation::handle`]. In every case it first writes out what was
/// appended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Read more from the client and hand it in.
    NeedInput,
    /// Call again without input: more of what was read is to be looked at.
    Again,
    /// The client uses an export; go on with the transmission.
    Done(Box<Negotiated>),
    /// Close the connection.
    Closed(CloseReason),
}

/// A finished negotiation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Negotiated {
    /// Canonical name of the export, never empty.
    pub name: String,
    /// The export as it was looked up.
    pub export: ExportInfo,
    /// Reads and block status are answered in chunks.
    pub structured_replies: bool,
    /// BLOCK_STATUS answers `base:allocation`.
    pub meta_base_allocation: bool,
    /// The transmission flags the client was told.
    pub flags: TransmissionFlags,
    /// Bytes read behind the last option: the start of the transmission. Usually empty.
    pub leftover: Vec<u8>,
}

impl Negotiated {
    /// What the transmission needs to know.
    #[must_use]
    pub const fn session(&self) -> Session {
        Session {
            size_bytes: self.export.usable_bytes(),
            block_min: self.export.block_min,
            flags: self.flags,
            structured_replies: self.structured_replies,
            meta_base_allocation: self.meta_base_allocation,
        }
    }
}

/// Why the connection ends without a transmission.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CloseReason {
    /// The client said ABORT: the polite end, also of a tool that only lists.
    #[error("the client ended the negotiation")]
    Aborted,
    /// EXPORT_NAME asked for an export that cannot be used; that option has no error answer.
    #[error("the client asked in the old way, which has no room for a reason: {0}")]
    ExportRefused(#[source] ExportRefusal),
    /// Flags this server did not offer.
    #[error("unknown client flags {0:#010x}")]
    UnknownClientFlags(u32),
    /// An option did not start with its magic number: not an NBD client, or out of step.
    #[error("an option starts with {0:#018x} instead of its magic number")]
    BadOptionMagic(u64),
    /// More options than [`MAX_OPTIONS`].
    #[error("more than {MAX_OPTIONS} options")]
    TooManyOptions,
    /// An option announced more data than [`MAX_SKIPPED_OPTION_BYTES`].
    #[error("option {option} announces {length} bytes of data")]
    OptionTooLong {
        /// Which option.
        option: u32,
        /// Announced length, bytes.
        length: u32,
    },
    /// EXPORT_NAME with a name that is no string of the protocol.
    #[error("malformed export name")]
    MalformedName,
    /// [`Negotiation::handle`] was called after its end.
    #[error("the negotiation is over")]
    AlreadyOver,
}

/// The negotiation of one connection. Start it, write out the greeting, then [`handle`](Self::handle)
/// whatever the client sends until it answers `Done` or `Closed`.
#[derive(Debug)]
pub struct Negotiation {
    state: State,
    /// Received and not yet consumed.
    buffer: Vec<u8>,
    no_zeroes: bool,
    structured: bool,
    /// Canonical name of the export for which `base:allocation` was chosen.
    allocation_of: Option<String>,
    options_seen: u32,
}

#[derive(Clone, Copy, Debug)]
enum State {
    ClientFlags,
    OptionHead,
    OptionBody { option: u32, length: usize },
    SkipBody { option: u32, left: usize },
    Over,
}

/// What handling one option led to.
enum Outcome {
    Next,
    Use(String, ExportInfo),
    Close(CloseReason),
}

impl Negotiation {
    /// Starts, and appends the server's greeting.
    #[must_use]
    pub fn start(out: &mut Vec<u8>) -> Self {
        out.extend_from_slice(&NBD_MAGIC.to_be_bytes());
        out.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
        out.extend_from_slice(&(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES).to_be_bytes());
        Self {
            state: State::ClientFlags,
            buffer: Vec::new(),
            no_zeroes: false,
            structured: false,
            allocation_of: None,
            options_seen: 0,
        }
    }

    /// Takes what the client sent, answers at most one option into `out`, and says what to do next.
    /// Pieces should be small (a few KiB): unconsumed input is kept.
    pub fn handle<E: ExportDirectory + ?Sized>(
        &mut self,
        input: &[u8],
        exports: &E,
        out: &mut Vec<u8>,
    ) -> Step {
        self.buffer.extend_from_slice(input);
        loop {
            match self.state {
                State::ClientFlags => {
                    let Some(bytes) = self.take_array() else { return Step::NeedInput };
                    let flags = u32::from_be_bytes(bytes);
                    if flags & !u32::from(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES) != 0 {
                        return self.close(CloseReason::UnknownClientFlags(flags));
                    }
                    self.no_zeroes = flags & u32::from(FLAG_NO_ZEROES) != 0;
                    self.state = State::OptionHead;
                }
                State::OptionHead => {
                    let Some(head) = self.take_array::<16>() else { return Step::NeedInput };
                    if let Err(reason) = self.on_head(head) {
                        return self.close(reason);
                    }
                }
                State::SkipBody { option, left } => {
                    let skipped = left.min(self.buffer.len());
                    self.buffer.drain(..skipped);
                    let left = left - skipped;
                    if left > 0 {
                        self.state = State::SkipBody { option, left };
                        return Step::NeedInput;
                    }
                    let text = format!("option data is limited to {MAX_OPTION_BYTES} bytes");
                    refuse(out, option, rep::ERR_TOO_BIG, &text);
                    self.state = State::OptionHead;
                    return Step::Again;
                }
                State::OptionBody { option, length } => {
                    if self.buffer.len() < length {
                        return Step::NeedInput;
                    }
                    let data: Vec<u8> = self.buffer.drain(..length).collect();
                    self.state = State::OptionHead;
                    return match self.on_option(option, &data, exports, out) {
                        Outcome::Next => Step::Again,
                        Outcome::Use(name, export) => self.finish(name, export),
                        Outcome::Close(reason) => self.close(reason),
                    };
                }
                State::Over => return Step::Closed(CloseReason::AlreadyOver),
            }
        }
    }

    fn take_array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let head = *self.buffer.first_chunk::<N>()?;
        self.buffer.drain(..N);
        Some(head)
    }

    fn on_head(&mut self, head: [u8; 16]) -> Result<(), CloseReason> {
        let [m0, m1, m2, m3, m4, m5, m6, m7, o0, o1, o2, o3, l0, l1, l2, l3] = head;
        let magic = u64::from_be_bytes([m0, m1, m2, m3, m4, m5, m6, m7]);
        let option = u32::from_be_bytes([o0, o1, o2, o3]);
        let length = u32::from_be_bytes([l0, l1, l2, l3]);
        if magic != OPTION_MAGIC {
            return Err(CloseReason::BadOptionMagic(magic));
        }
        self.options_seen += 1;
        if self.options_seen > MAX_OPTIONS {
            return Err(CloseReason::TooManyOptions);
        }
        // EXPORT_NAME cannot be answered with "too big"; a name that long is a broken rule.
        let limit =
            if option == option::EXPORT_NAME { MAX_STRING_BYTES } else { MAX_SKIPPED_OPTION_BYTES as usize };
        if length as usize > limit {
            return Err(CloseReason::OptionTooLong { option, length });
        }
        self.state = if length > MAX_OPTION_BYTES {
            State::SkipBody { option, left: length as usize }
        } else {
            State::OptionBody { option, length: length as usize }
        };
        Ok(())
    }

    fn on_option<E: ExportDirectory + ?Sized>(
        &mut self,
        option: u32,
        data: &[u8],
        exports: &E,
        out: &mut Vec<u8>,
    ) -> Outcome {
        match option {
            option::EXPORT_NAME => return self.on_export_name(data, exports, out),
            option::ABORT => {
                ack(out, option);
                return Outcome::Close(CloseReason::Aborted);
            }
            option::INFO | option::GO => return self.on_info(option, data, exports, out),
            option::LIST if data.is_empty() => list(out, exports),
            option::STRUCTURED_REPLY if data.is_empty() => {
                self.structured = true;
                ack(out, option);
            }
            option::LIST | option::STRUCTURED_REPLY => {
                refuse(out, option, rep::ERR_INVALID, "this option takes no data");
            }
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => {
                self.on_meta_context(option, data, exports, out);
            }
            option::STARTTLS => {
                refuse(out, option, rep::ERR_UNSUP, "TLS is not offered; use a unix socket or a tunnel");
            }
            option::EXTENDED_HEADERS => {
                refuse(out, option, rep::ERR_UNSUP, "extended headers are not offered");
            }
            unknown => refuse(out, unknown, rep::ERR_UNSUP, "unknown option"),
        }
        Outcome::Next
    }

    fn on_export_name<E: ExportDirectory + ?Sized>(
        &mut self,
        data: &[u8],
        exports: &E,
        out: &mut Vec<u8>,
    ) -> Outcome {
        let Ok(name) = string(data, "export name") else {
            return Outcome::Close(CloseReason::MalformedName);
        };
        let (name, export) = match resolve(exports, name) {
            Ok(found) => found,
            Err(refusal) => return Outcome::Close(CloseReason::ExportRefused(refusal)),
        };
        out.extend_from_slice(&export.usable_bytes().to_be_bytes());
        out.extend_from_slice(&export.flags(self.structured).0.to_be_bytes());
        if !self.no_zeroes {
            out.extend_from_slice(&[0; 124]);
        }
        Outcome::Use(name, export)
    }

    fn on_info<E: ExportDirectory + ?Sized>(
        &mut self,
        option: u32,
        data: &[u8],
        exports: &E,
        out: &mut Vec<u8>,
    ) -> Outcome {
        let request = match info_request(data) {
            Ok(request) => request,
            Err(Malformed(what)) => {
                refuse(out, option, rep::ERR_INVALID, &format!("malformed {what}"));
                return Outcome::Next;
            }
        };
        let (name, export) = match resolve(exports, request.name) {
            Ok(found) => found,
            Err(refusal) => {
                refuse(out, option, refusal.kind.reply_type(), &refusal.text);
                return Outcome::Next;
            }
        };
        let mut fact = info::EXPORT.to_be_bytes().to_vec();
        fact.extend_from_slice(&export.usable_bytes().to_be_bytes());
        fact.extend_from_slice(&export.flags(self.structured).0.to_be_bytes());
        reply(out, option, rep::INFO, &fact);
        // Also for clients that did not ask: they may ignore it, and those that look at it behave better.
        let mut fact = info::BLOCK_SIZE.to_be_bytes().to_vec();
        for bytes in [export.block_min, export.block_preferred, export.block_max] {
            fact.extend_from_slice(&bytes.to_be_bytes());
        }
        reply(out, option, rep::INFO, &fact);
        if request.wants_name {
            text_fact(out, option, info::NAME, &name);
        }
        if request.wants_description && !export.description.is_empty() {
            text_fact(out, option, info::DESCRIPTION, &export.description);
        }
        ack(out, option);
        if option == option::GO { Outcome::Use(name, export) } else { Outcome::Next }
    }

    fn on_meta_context<E: ExportDirectory + ?Sized>(
        &mut self,
        option: u32,
        data: &[u8],
        exports: &E,
        out: &mut Vec<u8>,
    ) {
        let set = option == option::SET_META_CONTEXT;
        if set {
            // Whatever becomes of this one, it replaces the choice made before.
            self.allocation_of = None;
        }
        if !self.structured {
            refuse(out, option, rep::ERR_INVALID, "metadata contexts need structured replies first");
            return;
        }
        let request = match meta_request(data) {
            Ok(request) => request,
            Err(Malformed(what)) => {
                refuse(out, option, rep::ERR_INVALID, &format!("malformed {what}"));
                return;
            }
        };
        let name = match resolve(exports, request.name) {
            Ok((name, _)) => name,
            Err(refusal) => {
                refuse(out, option, refusal.kind.reply_type(), &refusal.text);
                return;
            }
        };
        // Listing without a query means all; a bare namespace matches when listing only.
        let chosen = if set {
            request.queries.contains(&BASE_ALLOCATION)
        } else {
            request.queries.is_empty()
                || request.queries.iter().any(|query| matches!(*query, BASE_ALLOCATION | "base:"))
        };
        if chosen {
            let id = if set { BASE_ALLOCATION_ID } else { 0 };
            let mut context = id.to_be_bytes().to_vec();
            context.extend_from_slice(BASE_ALLOCATION.as_bytes());
            reply(out, option, rep::META_CONTEXT, &context);
            if set {
                self.allocation_of = Some(name);
            }
        }
        ack(out, option);
    }

    fn finish(&mut self, name: String, export: ExportInfo) -> Step {
        self.state = State::Over;
        Step::Done(Box::new(Negotiated {
            // Contexts belong to the export they were chosen for.
            meta_base_allocation: self.allocation_of.as_deref() == Some(name.as_str()),
            flags: export.flags(self.structured),
            structured_replies: self.structured,
            name,
            export,
            leftover: std::mem::take(&mut self.buffer),
        }))
    }

    fn close(&mut self, reason: CloseReason) -> Step {
        self.state = State::Over;
        self.buffer = Vec::new();
        Step::Closed(reason)
    }
}

fn list<E: ExportDirectory + ?Sized>(out: &mut Vec<u8>, exports: &E) {
    for export in exports.list() {
        let mut data = length_of(export.name.as_bytes()).to_be_bytes().to_vec();
        data.extend_from_slice(export.name.as_bytes());
        data.extend_from_slice(limited(&export.description).as_bytes());
        reply(out, option::LIST, rep::SERVER, &data);
    }
    ack(out, option::LIST);
}

fn ack(out: &mut Vec<u8>, option: u32) {
    reply(out, option, rep::ACK, &[]);
}

fn refuse(out: &mut Vec<u8>, option: u32, reply_type: u32, text: &str) {
    reply(out, option, reply_type, limited(text).as_bytes());
}

fn text_fact(out: &mut Vec<u8>, option: u32, kind: u16, text: &str) {
    let mut fact = kind.to_be_bytes().to_vec();
    fact.extend_from_slice(limited(text).as_bytes());
    reply(out, option, rep::INFO, &fact);
}

fn reply(out: &mut Vec<u8>, option: u32, reply_type: u32, data: &[u8]) {
    out.extend_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
    out.extend_from_slice(&option.to_be_bytes());
    out.extend_from_slice(&reply_type.to_be_bytes());
    out.extend_from_slice(&length_of(data).to_be_bytes());
    out.extend_from_slice(data);
}

/// Length of a piece of our own answers: names come from the configuration, texts are [`limited`].
fn length_of(data: &[u8]) -> u32 {
    debug_assert!(data.len() <= 3 * MAX_STRING_BYTES, "an answer of {} bytes", data.len());
    u32::try_from(data.len()).unwrap_or(u32::MAX)
}

/// The text, cut to the longest string of the protocol.
fn limited(text: &str) -> &str {
    let mut end = text.len().min(MAX_STRING_BYTES);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.get(..end).unwrap_or_default()
}
