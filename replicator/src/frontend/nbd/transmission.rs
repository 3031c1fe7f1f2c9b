//! Requests of the transmission phase: 28 bytes in, a checked [`Request`] or the way to refuse it out.
//!
//! Pure and without allocation; runs on the resource's own thread for every request. A [`Request`] that
//! exists is inside the export, aligned to its smallest block, not empty (but for FLUSH), not longer
//! than the limits, and uses only what was negotiated. What cannot be one is [`Rejected`] with the
//! protocol's error, or, when the stream can no longer be trusted, a [`Breach`].
use super::reply::NbdError;
use super::wire::{MAX_BLOCK_BYTES, MAX_DATA_BYTES, REQUEST_BYTES, REQUEST_MAGIC, TransmissionFlags, cmd};

/// What was agreed on for one connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Session {
    /// Size of the export as the client was told, bytes.
    pub size_bytes: u64,
    /// Smallest block, bytes.
    pub block_min: u32,
    /// What the client may use.
    pub flags: TransmissionFlags,
    /// Reads and errors are answered in chunks.
    pub structured_replies: bool,
    /// BLOCK_STATUS is served.
    pub meta_base_allocation: bool,
}

/// A command with the flags that make sense for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Read. The don't-fragment flag needs no care: such a read is at most [`MAX_BLOCK_BYTES`] long
    /// and may be answered in one chunk; the value tells not to cut it.
    Read {
        /// One content chunk only.
        dont_fragment: bool,
    },
    /// Write; [`Request::payload_bytes`] of data follow.
    Write {
        /// Stable before it is answered.
        fua: bool,
    },
    /// Make completed writes stable.
    Flush,
    /// Discard.
    Trim {
        /// Stable before it is answered.
        fua: bool,
    },
    /// Zero a range.
    WriteZeroes {
        /// Stable before it is answered.
        fua: bool,
        /// The range may be deallocated.
        may_unmap: bool,
        /// Fail with `NotSupported` rather than write zeroes the slow way.
        fast_only: bool,
    },
    /// Extents of a range.
    BlockStatus {
        /// One extent is enough.
        one: bool,
    },
    /// Prefetch; only if `SEND_CACHE` was offered, which [`super::ExportInfo`] never does.
    Cache,
}

/// A checked request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    cookie: u64,
    offset: u64,
    length: u32,
    command: Command,
}

impl Request {
    /// The client's own mark, echoed in the answer.
    #[must_use]
    pub const fn cookie(&self) -> u64 {
        self.cookie
    }

    /// Where it starts, bytes; 0 for FLUSH.
    #[must_use]
    pub const fn offset(&self) -> u64 {
        self.offset
    }

    /// Length, bytes; 0 for FLUSH.
    #[must_use]
    pub const fn length(&self) -> u32 {
        self.length
    }

    /// What to do.
    #[must_use]
    pub const fn command(&self) -> Command {
        self.command
    }

    /// Bytes that follow the request on the wire: the data of a WRITE.
    #[must_use]
    pub const fn payload_bytes(&self) -> u32 {
        match self.command {
            Command::Write { .. } => self.length,
            Command::Read { .. }
            | Command::Flush
            | Command::Trim { .. }
            | Command::WriteZeroes { .. }
            | Command::BlockStatus { .. }
            | Command::Cache => 0,
        }
    }

    /// Bytes that follow the head of a successful answer: the data of a READ.
    #[must_use]
    pub const fn reply_data_bytes(&self) -> u32 {
        if matches!(self.command, Command::Read { .. }) { self.length } else { 0 }
    }
}

/// What came from the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// Do it.
    Request(Request),
    /// Refuse it and go on.
    Rejected(Rejected),
    /// The client is leaving: read no more, answer what is in flight, close.
    Disconnect,
    /// Close now: what follows cannot be understood or is too much.
    Breach(Breach),
}

/// A request to be refused: skip its payload, then answer with [`Session::push_error`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rejected {
    /// The request's cookie.
    pub cookie: u64,
    /// The error to answer.
    pub error: NbdError,
    /// Text for the client's user.
    pub text: &'static str,
    /// Bytes of payload that follow and are to be thrown away, at most [`MAX_DATA_BYTES`].
    pub skip_bytes: u32,
}

/// A broken rule after which the connection cannot go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Breach {
    /// A request did not start with its magic number: client and server are out of step.
    #[error("a request starts with {0:#010x} instead of its magic number")]
    BadMagic(u32),
    /// A WRITE announced more data than it is worth to read and throw away.
    #[error("a write of {0} bytes; the limit is {MAX_DATA_BYTES}")]
    PayloadTooLong(u32),
}

/// The fields of a request as they stand on the wire, unchecked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WireRequest {
    /// Command flags.
    pub flags: u16,
    /// Command.
    pub command: u16,
    /// The client's mark.
    pub cookie: u64,
    /// Offset, bytes.
    pub offset: u64,
    /// Length, bytes.
    pub length: u32,
}

impl WireRequest {
    /// Takes the fields apart.
    ///
    /// # Errors
    /// The magic number is wrong.
    pub const fn decode(bytes: &[u8; REQUEST_BYTES]) -> Result<Self, Breach> {
        let [
            m0,
            m1,
            m2,
            m3,
            f0,
            f1,
            t0,
            t1,
            c0,
            c1,
            c2,
            c3,
            c4,
            c5,
            c6,
            c7,
            o0,
            o1,
            o2,
            o3,
            o4,
            o5,
            o6,
            o7,
            l0,
            l1,
            l2,
            l3,
        ] = *bytes;
        let magic = u32::from_be_bytes([m0, m1, m2, m3]);
        if magic != REQUEST_MAGIC {
            return Err(Breach::BadMagic(magic));
        }
        Ok(Self {
            flags: u16::from_be_bytes([f0, f1]),
            command: u16::from_be_bytes([t0, t1]),
            cookie: u64::from_be_bytes([c0, c1, c2, c3, c4, c5, c6, c7]),
            offset: u64::from_be_bytes([o0, o1, o2, o3, o4, o5, o6, o7]),
            length: u32::from_be_bytes([l0, l1, l2, l3]),
        })
    }

    /// Puts the fields together, as a client does.
    #[must_use]
    pub fn encode(&self) -> [u8; REQUEST_BYTES] {
        let mut bytes = [0; REQUEST_BYTES];
        let fields = REQUEST_MAGIC
            .to_be_bytes()
            .into_iter()
            .chain(self.flags.to_be_bytes())
            .chain(self.command.to_be_bytes())
            .chain(self.cookie.to_be_bytes())
            .chain(self.offset.to_be_bytes())
            .chain(self.length.to_be_bytes());
        for (to, from) in bytes.iter_mut().zip(fields) {
            *to = from;
        }
        bytes
    }
}

/// An error and its text.
type Refused = (NbdError, &'static str);

impl Session {
    /// Looks at the next 28 bytes of the client.
    #[must_use]
    pub fn receive(&self, bytes: &[u8; REQUEST_BYTES]) -> Received {
        let wire = match WireRequest::decode(bytes) {
            Ok(wire) => wire,
            Err(breach) => return Received::Breach(breach),
        };
        if wire.command == cmd::DISC {
            return Received::Disconnect;
        }
        let payload = if wire.command == cmd::WRITE { wire.length } else { 0 };
        if payload > MAX_DATA_BYTES {
            return Received::Breach(Breach::PayloadTooLong(payload));
        }
        match self.check(&wire) {
            Ok(request) => Received::Request(request),
            Err((error, text)) => {
                Received::Rejected(Rejected { cookie: wire.cookie, error, text, skip_bytes: payload })
            }
        }
    }

    fn check(&self, wire: &WireRequest) -> Result<Request, Refused> {
        let command = self.command(wire)?;
        self.check_range(wire, command)?;
        Ok(Request { cookie: wire.cookie, offset: wire.offset, length: wire.length, command })
    }

    /// The command, if it and its flags were negotiated. FUA is allowed on every command, as clients are
    /// known to set it; it means something on those that write.
    fn command(&self, wire: &WireRequest) -> Result<Command, Refused> {
        type F = TransmissionFlags;
        let has = |flag| wire.flags & flag != 0;
        let fua = has(cmd::FLAG_FUA);
        let (command, offered, known_flags) = match wire.command {
            cmd::READ => (Command::Read { dont_fragment: has(cmd::FLAG_DF) }, F::HAS_FLAGS, cmd::FLAG_DF),
            cmd::WRITE => (Command::Write { fua }, F::HAS_FLAGS, 0),
            cmd::FLUSH => (Command::Flush, F::SEND_FLUSH, 0),
            cmd::TRIM => (Command::Trim { fua }, F::SEND_TRIM, 0),
            cmd::CACHE => (Command::Cache, F::SEND_CACHE, 0),
            cmd::WRITE_ZEROES => {
                let may_unmap = !has(cmd::FLAG_NO_HOLE);
                let fast_only = has(cmd::FLAG_FAST_ZERO);
                let known = cmd::FLAG_NO_HOLE | cmd::FLAG_FAST_ZERO;
                (Command::WriteZeroes { fua, may_unmap, fast_only }, F::SEND_WRITE_ZEROES, known)
            }
            cmd::BLOCK_STATUS => {
                let one = has(cmd::FLAG_REQ_ONE);
                (Command::BlockStatus { one }, F::HAS_FLAGS, cmd::FLAG_REQ_ONE)
            }
            _ => return Err((NbdError::Invalid, "unknown command")),
        };
        let writes = matches!(wire.command, cmd::WRITE | cmd::TRIM | cmd::WRITE_ZEROES);
        if writes && self.flags.contains(F::READ_ONLY) {
            return Err((NbdError::Perm, "the export is read-only"));
        }
        if !self.flags.contains(offered) {
            return Err((NbdError::Invalid, "this command was not offered"));
        }
        if matches!(command, Command::BlockStatus { .. }) && !self.meta_base_allocation {
            return Err((NbdError::Invalid, "no metadata context was chosen"));
        }
        if wire.flags & !(known_flags | cmd::FLAG_FUA) != 0 {
            return Err((NbdError::Invalid, "a flag that does not belong to this command"));
        }
        for (flag, needs) in [
            (cmd::FLAG_FUA, F::SEND_FUA),
            (cmd::FLAG_DF, F::SEND_DF),
            (cmd::FLAG_FAST_ZERO, F::SEND_FAST_ZERO),
        ] {
            if has(flag) && !self.flags.contains(needs) {
                return Err((NbdError::Invalid, "a flag that was not offered"));
            }
        }
        Ok(command)
    }

    fn check_range(&self, wire: &WireRequest, command: Command) -> Result<(), Refused> {
        let length = u64::from(wire.length);
        let beyond_the_end = match command {
            Command::Flush if wire.offset == 0 && wire.length == 0 => return Ok(()),
            Command::Flush => return Err((NbdError::Invalid, "a flush has no range")),
            Command::Write { .. } | Command::WriteZeroes { .. } => NbdError::NoSpace,
            Command::Read { .. } | Command::Trim { .. } | Command::BlockStatus { .. } | Command::Cache => {
                NbdError::Invalid
            }
        };
        if length == 0 {
            return Err((NbdError::Invalid, "the range is empty"));
        }
        match command {
            Command::Read { dont_fragment: true } if wire.length > MAX_BLOCK_BYTES => {
                return Err((NbdError::Overflow, "too long for one chunk; the limit is 1 MiB"));
            }
            Command::Read { .. } if wire.length > MAX_DATA_BYTES => {
                return Err((NbdError::Invalid, "a read is limited to 32 MiB"));
            }
            _ => {}
        }
        if wire.offset.checked_add(length).is_none_or(|end| end > self.size_bytes) {
            return Err((beyond_the_end, "the range ends behind the export"));
        }
        let block = u64::from(self.block_min.max(1));
        if !wire.offset.is_multiple_of(block) || !length.is_multiple_of(block) {
            return Err((NbdError::Invalid, "the range is not aligned to the smallest block"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::ExportInfo;
    use super::*;
    use proptest::prelude::*;

    const SIZE: u64 = 64 << 20;

    fn session(export: &ExportInfo) -> Session {
        Session {
            size_bytes: export.usable_bytes(),
            block_min: export.block_min,
            flags: export.flags(true),
            structured_replies: true,
            meta_base_allocation: true,
        }
    }

    fn receive(session: &Session, command: u16, flags: u16, offset: u64, length: u32) -> Received {
        session.receive(&WireRequest { flags, command, cookie: 99, offset, length }.encode())
    }

    #[track_caller]
    fn refused(received: Received, error: NbdError, skip_bytes: u32) {
        match received {
            Received::Rejected(rejected) => {
                assert_eq!((rejected.error, rejected.skip_bytes, rejected.cookie), (error, skip_bytes, 99));
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_good_request_keeps_its_fields() {
        let session = session(&ExportInfo::volume(SIZE, 4096));
        let Received::Request(request) = receive(&session, cmd::WRITE, cmd::FLAG_FUA, SIZE - 8192, 8192)
        else {
            panic!("refused");
        };
        assert_eq!(request.command(), Command::Write { fua: true });
        assert_eq!((request.cookie(), request.offset(), request.length()), (99, SIZE - 8192, 8192));
        assert_eq!((request.payload_bytes(), request.reply_data_bytes()), (8192, 0));
    }

    #[test]
    fn the_end_of_the_export_is_the_end() {
        let session = session(&ExportInfo::volume(SIZE, 512));
        refused(receive(&session, cmd::WRITE, 0, SIZE - 512, 1024), NbdError::NoSpace, 1024);
        refused(receive(&session, cmd::WRITE_ZEROES, 0, SIZE, 512), NbdError::NoSpace, 0);
        refused(receive(&session, cmd::READ, 0, SIZE - 512, 1024), NbdError::Invalid, 0);
        refused(receive(&session, cmd::TRIM, 0, SIZE - 512, 1024), NbdError::Invalid, 0);
        refused(receive(&session, cmd::BLOCK_STATUS, 0, SIZE, 512), NbdError::Invalid, 0);
        refused(receive(&session, cmd::READ, 0, u64::MAX - 511, 512), NbdError::Invalid, 0);
    }

    #[test]
    fn blocks_are_never_rounded() {
        let session = session(&ExportInfo::volume(SIZE, 4096));
        refused(receive(&session, cmd::WRITE, 0, 512, 4096), NbdError::Invalid, 4096);
        refused(receive(&session, cmd::WRITE, 0, 4096, 512), NbdError::Invalid, 512);
        refused(receive(&session, cmd::READ, 0, 0, 0), NbdError::Invalid, 0);
    }

    #[test]
    fn too_much_data_ends_the_connection_or_is_skipped() {
        let session = session(&ExportInfo::volume(SIZE, 512));
        let breach = receive(&session, cmd::WRITE, 0, 0, MAX_DATA_BYTES + 512);
        assert_eq!(breach, Received::Breach(Breach::PayloadTooLong(MAX_DATA_BYTES + 512)));
        refused(receive(&session, cmd::READ, 0, 0, MAX_DATA_BYTES + 512), NbdError::Invalid, 0);
        refused(receive(&session, cmd::READ, cmd::FLAG_DF, 0, MAX_BLOCK_BYTES + 512), NbdError::Overflow, 0);
        assert!(matches!(
            receive(&session, cmd::READ, cmd::FLAG_DF, 0, MAX_BLOCK_BYTES),
            Received::Request(_)
        ));
        assert!(matches!(receive(&session, cmd::WRITE, 0, 0, MAX_DATA_BYTES), Received::Request(_)));
    }

    #[test]
    fn flags_belong_to_their_command_and_to_what_was_offered() {
        let mut session = session(&ExportInfo::volume(SIZE, 512));
        refused(receive(&session, cmd::WRITE, cmd::FLAG_DF, 0, 512), NbdError::Invalid, 512);
        refused(receive(&session, cmd::READ, cmd::FLAG_NO_HOLE, 0, 512), NbdError::Invalid, 0);
        refused(receive(&session, cmd::READ, 1 << 9, 0, 512), NbdError::Invalid, 0);
        refused(receive(&session, cmd::WRITE_ZEROES, cmd::FLAG_FAST_ZERO, 0, 512), NbdError::Invalid, 0);
        refused(receive(&session, cmd::CACHE, 0, 0, 512), NbdError::Invalid, 0);
        refused(receive(&session, 77, 0, 0, 512), NbdError::Invalid, 0);
        // Known clients set FUA on anything.
        assert!(matches!(receive(&session, cmd::READ, cmd::FLAG_FUA, 0, 512), Received::Request(_)));
        assert!(matches!(receive(&session, cmd::FLUSH, cmd::FLAG_FUA, 0, 0), Received::Request(_)));
        refused(receive(&session, cmd::FLUSH, 0, 0, 512), NbdError::Invalid, 0);
        session.meta_base_allocation = false;
        refused(receive(&session, cmd::BLOCK_STATUS, 0, 0, 512), NbdError::Invalid, 0);
    }

    #[test]
    fn a_read_only_export_refuses_with_eperm() {
        let session = session(&ExportInfo { read_only: true, ..ExportInfo::volume(SIZE, 512) });
        refused(receive(&session, cmd::WRITE, 0, 0, 512), NbdError::Perm, 512);
        refused(receive(&session, cmd::TRIM, 0, 0, 512), NbdError::Perm, 0);
        refused(receive(&session, cmd::WRITE_ZEROES, 0, 0, 512), NbdError::Perm, 0);
        assert!(matches!(receive(&session, cmd::READ, 0, 0, 512), Received::Request(_)));
    }

    #[test]
    fn disconnect_is_taken_whatever_its_fields_say() {
        let session = session(&ExportInfo::volume(SIZE, 512));
        assert_eq!(receive(&session, cmd::DISC, 0xffff, 1, 1), Received::Disconnect);
    }

    #[test]
    fn a_wrong_magic_number_is_the_end() {
        let session = session(&ExportInfo::volume(SIZE, 512));
        assert_eq!(session.receive(&[0; REQUEST_BYTES]), Received::Breach(Breach::BadMagic(0)));
    }

    proptest! {
        #[test]
        fn fields_survive_the_wire(flags: u16, command: u16, cookie: u64, offset: u64, length: u32) {
            let wire = WireRequest { flags, command, cookie, offset, length };
            prop_assert_eq!(WireRequest::decode(&wire.encode()), Ok(wire));
        }

        #[test]
        fn what_is_accepted_lies_inside_the_export(
            flags in 0u16..32,
            command in 0u16..9,
            offset in prop_oneof![any::<u64>(), (0..SIZE / 512 + 2).prop_map(|sector| sector * 512)],
            length in prop_oneof![any::<u32>(), (0u32..70_000).prop_map(|sectors| sectors * 512)],
            read_only: bool,
        ) {
            let session = session(&ExportInfo { read_only, ..ExportInfo::volume(SIZE, 512) });
            match receive(&session, command, flags, offset, length) {
                Received::Request(request) => {
                    prop_assert!(request.offset() + u64::from(request.length()) <= SIZE);
                    prop_assert!(request.payload_bytes() <= MAX_DATA_BYTES);
                    prop_assert!(request.pieces().is_none_or(|pieces| pieces.len() > 0));
                }
                Received::Rejected(rejected) => {
                    prop_assert_eq!(rejected.cookie, 99);
                    prop_assert_eq!(rejected.skip_bytes, if command == cmd::WRITE { length } else { 0 });
                }
                Received::Disconnect => prop_assert_eq!(command, cmd::DISC),
                Received::Breach(breach) => prop_assert_eq!(breach, Breach::PayloadTooLong(length)),
            }
        }
    }
}
