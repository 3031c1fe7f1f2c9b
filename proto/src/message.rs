//! Every message of the protocol as one enum, with its number on the wire and the kind of payload it carries.
use crate::v1;

/// What follows the header of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PayloadKind {
    /// Nothing.
    None,
    /// Block data: a multiple of 512 bytes, at most [`MAX_PAYLOAD_BYTES`](crate::limits::MAX_PAYLOAD_BYTES).
    Blocks,
    /// Bitmap words: a multiple of 8 bytes, at most [`MAX_BITMAP_WORDS`](crate::limits::MAX_BITMAP_WORDS) words.
    BitmapWords,
}

macro_rules! messages {
    ($($(#[$doc:meta])* $name:ident($header:ident) = $number:literal, $payload:ident;)*) => {
        /// One message between two nodes; the payload travels beside it.
        #[derive(Clone, Debug, PartialEq)]
        pub enum Message { $($(#[$doc])* $name(v1::$header),)* }

        /// The number of a message on the wire.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u16)]
        pub enum MessageType { $($(#[$doc])* $name = $number,)* }

        impl MessageType {
            /// Every message type, in wire order.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// The type with this number, if there is one.
            #[must_use]
            pub const fn from_wire(number: u16) -> Option<Self> {
                match number { $($number => Some(Self::$name),)* _ => None }
            }

            /// What follows the header.
            #[must_use]
            pub const fn payload_kind(self) -> PayloadKind {
                match self { $(Self::$name => PayloadKind::$payload,)* }
            }
        }

        impl Message {
            /// The number of this message on the wire.
            #[must_use]
            pub const fn message_type(&self) -> MessageType {
                match self { $(Self::$name(_) => MessageType::$name,)* }
            }

            /// Length of the encoded header, bytes.
            #[must_use]
            pub fn header_len(&self) -> usize {
                match self { $(Self::$name(header) => prost::Message::encoded_len(header),)* }
            }

            /// Appends the encoded header to `out`.
            pub fn encode_header(&self, out: &mut Vec<u8>) {
                match self { $(Self::$name(header) => prost::Message::encode_raw(header, out),)* }
            }

            /// Decodes the header of a message of type `kind`.
            ///
            /// # Errors
            /// The bytes are not a header of that type.
            pub fn decode_header(kind: MessageType, header: &[u8]) -> Result<Self, prost::DecodeError> {
                Ok(match kind {
                    $(MessageType::$name => Self::$name(prost::Message::decode(header)?),)*
                })
            }
        }
    };
}

messages! {
    /// A mirrored write.
    Data(Data) = 0x01, Blocks;
    /// A mirrored discard.
    Discard(Trim) = 0x02, None;
    /// A mirrored write-zeroes.
    WriteZeroes(Trim) = 0x03, None;
    /// End of an epoch.
    Barrier(Barrier) = 0x04, None;
    /// All writes of the epoch are stable.
    BarrierAck(BarrierAck) = 0x05, None;
    /// Write received (protocol B).
    RecvAck(BlockAck) = 0x06, None;
    /// Write done (protocol C, and any write during resync).
    WriteAck(BlockAck) = 0x07, None;
    /// Write failed.
    NegAck(BlockAck) = 0x08, None;
    /// Read this for the application.
    DataRequest(BlockRequest) = 0x09, None;
    /// Answer to `DataRequest`.
    DataReply(BlockReply) = 0x0a, Blocks;
    /// Read failed.
    NegDReply(BlockAck) = 0x0b, None;
    /// Resync: send this range.
    RsDataRequest(BlockRequest) = 0x0c, None;
    /// Resync data.
    RsDataReply(BlockReply) = 0x0d, Blocks;
    /// Resync: the range is all zeroes.
    RsDeallocated(BlockReply) = 0x0e, None;
    /// Resync block written; the source clears its bits.
    RsWriteAck(BlockAck) = 0x0f, None;
    /// Resync read or write failed.
    NegRsDReply(BlockAck) = 0x10, None;
    /// A range became out of sync on the sender, which did not send the data.
    OutOfSync(OutOfSync) = 0x11, None;
    /// Bitmap words.
    Bitmap(Bitmap) = 0x12, BitmapWords;
    /// Resync starts.
    SyncUuid(SyncUuid) = 0x13, None;
    /// Resync ended on the target.
    ResyncFinished(ResyncFinished) = 0x14, None;
    /// Resync: send this range unless it has this digest.
    RsChecksumRequest(ChecksumRequest) = 0x15, None;
    /// Resync: the digests are equal.
    RsIsInSync(BlockReply) = 0x16, None;
    /// Verify: what is the digest of this range?
    OvRequest(BlockRequest) = 0x17, None;
    /// Answer to `OvRequest`.
    OvReply(ChecksumReply) = 0x18, None;
    /// Verify: this range differs.
    OvResult(OutOfSync) = 0x19, None;
    /// Verify ended.
    VerifyFinished(VerifyFinished) = 0x1a, None;
    /// First message of a session.
    Hello(Hello) = 0x20, None;
    /// Facts about one volume.
    VolumeInfo(VolumeInfo) = 0x21, None;
    /// Role and disk states.
    State(State) = 0x22, None;
    /// Ask for a cluster-wide change.
    StateRequest(StateRequest) = 0x23, None;
    /// Answer to `StateRequest`.
    StateReply(StateReply) = 0x24, None;
    /// Are you alive?
    Ping(Ping) = 0x25, None;
    /// Yes.
    PingAck(PingAck) = 0x26, None;
    /// Leaving on purpose.
    TearDown(TearDown) = 0x27, None;
    /// Options that both nodes share have changed.
    ProtocolUpdate(ProtocolUpdate) = 0x28, None;
}
