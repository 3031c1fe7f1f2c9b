//! Properties of the frame codec over arbitrary messages and arbitrary bytes.
use lockstep_proto::frame::{self, Decoded, Decoder, FrameError, FrameErrorKind, HEAD_BYTES, Head};
use lockstep_proto::limits::{
    MAX_BITMAP_WORDS, MAX_END_SECTOR, MAX_HEADER_BYTES, MAX_PAYLOAD_BYTES, MAX_REQUEST_SECTORS,
    MAX_TRIM_SECTORS,
};
use lockstep_proto::{Message, MessageType, v1};
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;

/// A sound range of at most `max_sectors`, near zero, in the middle or at the very end of what the wire can name.
fn range(max_sectors: u64) -> impl Strategy<Value = (u64, u64)> {
    (1..=max_sectors).prop_flat_map(|nr_sectors| {
        let last = MAX_END_SECTOR - nr_sectors;
        (prop_oneof![0..=64.min(last), 0..=last, Just(last)], Just(nr_sectors))
    })
}

fn block_ack(max_sectors: u64) -> impl Strategy<Value = v1::BlockAck> {
    (any::<u32>(), range(max_sectors), any::<u64>(), any::<bool>()).prop_map(
        |(volume, (sector, nr_sectors), request, set_in_sync)| v1::BlockAck {
            volume,
            sector,
            nr_sectors,
            request,
            set_in_sync,
        },
    )
}

fn block_request() -> impl Strategy<Value = v1::BlockRequest> {
    (any::<u32>(), range(MAX_REQUEST_SECTORS), any::<u64>()).prop_map(
        |(volume, (sector, nr_sectors), request)| v1::BlockRequest { volume, sector, nr_sectors, request },
    )
}

/// `max_sectors` bounds the payload that the test has to carry.
fn block_reply(max_sectors: u64) -> impl Strategy<Value = v1::BlockReply> {
    (any::<u32>(), range(max_sectors), any::<u64>()).prop_map(|(volume, (sector, nr_sectors), request)| {
        v1::BlockReply { volume, sector, nr_sectors, request, window_sectors: 0 }
    })
}

fn trim() -> impl Strategy<Value = v1::Trim> {
    (any::<u32>(), range(MAX_TRIM_SECTORS), any::<u64>(), any::<u32>(), any::<[bool; 4]>()).prop_map(
        |(volume, (sector, nr_sectors), request, epoch, [fua, want_recv_ack, want_write_ack, may_unmap])| {
            v1::Trim {
                volume,
                sector,
                nr_sectors,
                request,
                epoch,
                fua,
                want_recv_ack,
                want_write_ack,
                may_unmap,
            }
        },
    )
}

fn hello() -> impl Strategy<Value = v1::Hello> {
    let numbers = any::<[u32; 8]>();
    (numbers, any::<[u64; 2]>(), any::<[bool; 4]>(), "\\PC{0,40}", "\\PC{0,40}", any::<u32>()).prop_map(
        |(numbers, [features, session_nonce], flags, node_name, resource, max_payload_bytes)| {
            let [version_min, version_max, node_id, protocol, zero, one, two, rr_conflict] = numbers;
            let [allow_two_primaries, discard_my_data, tentative, always_asbp] = flags;
            v1::Hello {
                version_min,
                version_max,
                features,
                node_id,
                node_name,
                resource,
                protocol,
                after_sb_0pri: zero,
                after_sb_1pri: one,
                after_sb_2pri: two,
                allow_two_primaries,
                discard_my_data,
                tentative,
                session_nonce,
                max_payload_bytes,
                always_asbp,
                rr_conflict,
            }
        },
    )
}

fn volume_info() -> impl Strategy<Value = v1::VolumeInfo> {
    (any::<i32>(), any::<[u32; 5]>(), any::<[u64; 8]>(), any::<bool>()).prop_map(
        |(phase, numbers, sizes, discard_supported)| {
            let [volume, uuid_flags, disk_state, role, last_of_handshake] = numbers;
            let [capacity, agreed, user, current, bitmap, history_0, history_1, out_of_sync_bits] = sizes;
            v1::VolumeInfo {
                phase,
                volume,
                capacity_sectors: capacity,
                agreed_size_sectors: agreed,
                user_size_sectors: user,
                uuid_current: current,
                uuid_bitmap: bitmap,
                uuid_history_0: history_0,
                uuid_history_1: history_1,
                uuid_flags,
                disk_state,
                role,
                out_of_sync_bits,
                foreign_bits: history_1,
                discard_supported,
                last_of_handshake,
            }
        },
    )
}

fn state() -> impl Strategy<Value = v1::State> {
    let volume = (any::<u32>(), any::<u32>(), any::<bool>(), any::<bool>()).prop_map(
        |(volume, disk_state, sync_paused, ahead)| v1::VolumeState { volume, disk_state, sync_paused, ahead },
    );
    (any::<u32>(), prop::collection::vec(volume, 0..16))
        .prop_map(|(role, volumes)| v1::State { role, volumes })
}

fn control() -> impl Strategy<Value = Message> {
    prop_oneof![
        hello().prop_map(Message::Hello),
        volume_info().prop_map(Message::VolumeInfo),
        state().prop_map(Message::State),
        (any::<i32>(), any::<u32>(), any::<[u64; 5]>(), any::<bool>()).prop_map(
            |(kind, volume, [id, uuid_current, size_sectors, start_sector, stop_sector], assume_clean)| {
                Message::StateRequest(v1::StateRequest {
                    id,
                    kind,
                    volume,
                    uuid_current,
                    size_sectors,
                    assume_clean,
                    start_sector,
                    stop_sector,
                })
            }
        ),
        (any::<u64>(), any::<i32>(), "\\PC{0,80}", any::<u64>()).prop_map(|(id, result, text, value)| {
            Message::StateReply(v1::StateReply { id, result, text, value })
        }),
        Just(Message::Ping(v1::Ping {})),
        Just(Message::PingAck(v1::PingAck {})),
        "\\PC{0,80}".prop_map(|reason| Message::TearDown(v1::TearDown { reason })),
        (any::<u32>(), any::<bool>(), any::<[u32; 3]>()).prop_map(
            |(protocol, allow_two_primaries, after_sb)| {
                Message::ProtocolUpdate(v1::ProtocolUpdate {
                    protocol,
                    allow_two_primaries,
                    after_sb_0pri: after_sb[0],
                    after_sb_1pri: after_sb[1],
                    after_sb_2pri: after_sb[2],
                })
            }
        ),
        any::<u32>().prop_map(|epoch| Message::Barrier(v1::Barrier { epoch })),
        any::<[u32; 2]>().prop_map(|[epoch, writes]| Message::BarrierAck(v1::BarrierAck { epoch, writes })),
        (any::<u32>(), any::<[u64; 4]>()).prop_map(
            |(volume, [sync_uuid, uuid_current, uuid_history_0, uuid_history_1])| Message::SyncUuid(
                v1::SyncUuid { volume, sync_uuid, uuid_current, uuid_history_0, uuid_history_1 }
            )
        ),
        (any::<u32>(), any::<u64>()).prop_map(|(volume, failed_bits)| Message::ResyncFinished(
            v1::ResyncFinished { volume, failed_bits }
        )),
    ]
}

fn without_payload() -> impl Strategy<Value = Message> {
    prop_oneof![
        trim().prop_map(Message::Discard),
        trim().prop_map(Message::WriteZeroes),
        block_ack(MAX_TRIM_SECTORS).prop_map(Message::RecvAck),
        block_ack(MAX_TRIM_SECTORS).prop_map(Message::WriteAck),
        block_ack(MAX_TRIM_SECTORS).prop_map(Message::NegAck),
        block_ack(MAX_REQUEST_SECTORS).prop_map(Message::NegDReply),
        block_ack(MAX_REQUEST_SECTORS).prop_map(Message::RsWriteAck),
        block_ack(MAX_REQUEST_SECTORS).prop_map(Message::NegRsDReply),
        block_request().prop_map(Message::DataRequest),
        block_request().prop_map(Message::RsDataRequest),
        block_reply(MAX_REQUEST_SECTORS).prop_map(Message::RsDeallocated),
        (any::<u32>(), range(MAX_TRIM_SECTORS)).prop_map(|(volume, (sector, nr_sectors))| {
            Message::OutOfSync(v1::OutOfSync { volume, sector, nr_sectors })
        }),
        control(),
    ]
}

/// Any sound message with a payload that fits it. Payloads stay small; the limits have tests of their own below.
fn message_and_payload() -> impl Strategy<Value = (Message, Vec<u8>)> {
    let blocks = |nr_sectors: u64| {
        prop::collection::vec(any::<u8>(), usize::try_from(nr_sectors * 512).expect("a few sectors"))
    };
    prop_oneof![
        8 => without_payload().prop_map(|message| (message, Vec::new())),
        1 => (any::<u32>(), range(9), any::<u64>(), any::<u32>(), any::<[bool; 3]>()).prop_flat_map(
            move |(volume, (sector, nr_sectors), request, epoch, [fua, want_recv_ack, want_write_ack])| {
                let data = v1::Data { volume, sector, request, epoch, fua, want_recv_ack, want_write_ack };
                (Just(Message::Data(data)), blocks(nr_sectors))
            }
        ),
        1 => block_reply(9).prop_flat_map(move |reply| {
            let nr_sectors = reply.nr_sectors;
            (prop_oneof![Just(Message::DataReply(reply)), Just(Message::RsDataReply(reply))], blocks(nr_sectors))
        }),
        1 => (any::<u32>(), 0..1_u64 << 40, any::<bool>(), prop::collection::vec(any::<u64>(), 0..64)).prop_map(
            |(volume, first_word, last, words)| {
                let payload = words.iter().flat_map(|word| word.to_le_bytes()).collect();
                (Message::Bitmap(v1::Bitmap { volume, first_word, last }), payload)
            }
        ),
    ]
}

fn encode(message: &Message, payload: &[u8]) -> Vec<u8> {
    let mut wire = Vec::new();
    frame::encode_head(message, payload.len(), Some(frame::payload_crc(payload)), &mut wire)
        .expect("the strategies make sound messages");
    wire.extend_from_slice(payload);
    wire
}

/// Head and header that are correct in form, whatever they say: how a broken peer would send them.
fn forge(kind: MessageType, header: &[u8], payload: &[u8]) -> Vec<u8> {
    let mut wire = Vec::new();
    wire.extend_from_slice(b"LKS1");
    wire.extend_from_slice(&[1, 0]);
    wire.extend_from_slice(&(kind as u16).to_be_bytes());
    wire.extend_from_slice(&u16::try_from(header.len()).expect("short header").to_be_bytes());
    wire.extend_from_slice(&[0, 0]);
    wire.extend_from_slice(&u32::try_from(payload.len()).expect("short payload").to_be_bytes());
    wire.extend_from_slice(&frame::payload_crc(payload).to_be_bytes());
    let crc = crc32c::crc32c_append(crc32c::crc32c(&wire), header);
    wire.extend_from_slice(&crc.to_be_bytes());
    wire.extend_from_slice(header);
    wire.extend_from_slice(payload);
    wire
}

fn forge_message(message: &Message, payload: &[u8]) -> Vec<u8> {
    let mut header = Vec::new();
    message.encode_header(&mut header);
    forge(message.message_type(), &header, payload)
}

/// The error that both sides must agree on: refused by the encoder, and by the decoder if a peer sends it anyway.
fn refused(message: &Message, payload: &[u8]) -> FrameError {
    let mut out = b"before".to_vec();
    let encoding = frame::encode_head(message, payload.len(), Some(frame::payload_crc(payload)), &mut out)
        .expect_err("the encoder must refuse");
    assert_eq!(out, b"before", "a refused message leaves no bytes behind");
    let decoding = Decoder::new(&forge_message(message, payload)).next_frame().expect_err("and the decoder");
    assert_eq!(encoding, decoding);
    assert_eq!(decoding.kind(), FrameErrorKind::PeerBrokeProtocol);
    decoding
}

/// Frames of `wire` up to its end, a request for more, or an error.
fn decode_all(wire: &[u8]) -> Result<Vec<(Message, Vec<u8>)>, FrameError> {
    let mut decoder = Decoder::new(wire);
    let mut frames = Vec::new();
    while let Decoded::Frame { message, payload } = decoder.next_frame()? {
        frames.push((message, payload.to_vec()));
    }
    Ok(frames)
}

/// Inputs that once failed are kept beside this file and tried first.
fn config() -> ProptestConfig {
    let kept = FileFailurePersistence::WithSource("proptest-regressions");
    ProptestConfig { failure_persistence: Some(Box::new(kept)), ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn round_trip(frames in prop::collection::vec(message_and_payload(), 1..6)) {
        let wire: Vec<u8> = frames.iter().flat_map(|(message, payload)| encode(message, payload)).collect();
        prop_assert_eq!(decode_all(&wire)?, frames);
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..512)) {
        // 2^-32 of all inputs start with the magic, so nothing here can be a frame.
        let decoded = Decoder::new(&bytes).next_frame();
        if bytes.len() < HEAD_BYTES {
            prop_assert_eq!(decoded, Ok(Decoded::NeedMore { bytes: HEAD_BYTES - bytes.len() }));
        } else {
            prop_assert!(decoded.is_err());
        }
    }

    #[test]
    fn arbitrary_headers_behind_a_sound_head_never_panic(
        kind in prop::sample::select(MessageType::ALL),
        header in prop::collection::vec(any::<u8>(), 0..200),
        sectors in 0_usize..3,
    ) {
        let payload = vec![0xa5; sectors * 512];
        let wire = forge(kind, &header, &payload);
        // Whatever it is, it may only be refused for what it says, or be a message that can be sent back.
        match Decoder::new(&wire).next_frame() {
            Ok(Decoded::Frame { message, payload }) => {
                prop_assert_eq!(message.message_type(), kind);
                let mut again = Vec::new();
                frame::encode_head(&message, payload.len(), Some(frame::payload_crc(payload)), &mut again)?;
            }
            Ok(Decoded::NeedMore { .. }) => prop_assert!(false, "the frame is whole"),
            Err(error) => prop_assert_eq!(error.kind(), FrameErrorKind::PeerBrokeProtocol),
        }
    }

    #[test]
    fn any_flipped_bit_is_detected((message, payload) in message_and_payload(), place in any::<prop::sample::Index>()) {
        let mut wire = encode(&message, &payload);
        let bit = place.index(wire.len() * 8);
        wire[bit / 8] ^= 1 << (bit % 8);
        // Enough bytes behind it that no damaged length can end in a mere request for more.
        wire.resize(wire.len() + MAX_HEADER_BYTES + 1, 0);
        prop_assert!(Decoder::new(&wire).next_frame().is_err(), "bit {} of the frame", bit);
    }

    #[test]
    fn truncated_input_asks_for_more((message, payload) in message_and_payload(), place in any::<prop::sample::Index>()) {
        let wire = encode(&message, &payload);
        let cut = place.index(wire.len());
        let mut have = cut;
        // Following what the decoder asks for leads to the whole frame, and never past it.
        for _ in 0..4 {
            let mut decoder = Decoder::new(&wire[..have]);
            match decoder.next_frame()? {
                Decoded::NeedMore { bytes } => {
                    prop_assert!(bytes > 0);
                    prop_assert_eq!(decoder.rest().len(), have, "nothing was consumed");
                    have += bytes;
                    prop_assert!(have <= wire.len());
                }
                Decoded::Frame { .. } => break,
            }
        }
        prop_assert_eq!(have, wire.len());
    }

    #[test]
    fn unknown_fields_are_skipped(message in control()) {
        let mut header = Vec::new();
        message.encode_header(&mut header);
        header.extend_from_slice(&[0xfa, 0x3f, 3, b'n', b'e', b'w']); // field 1023, length-delimited
        let wire = forge(message.message_type(), &header, &[]);
        prop_assert_eq!(decode_all(&wire)?, vec![(message, Vec::new())]);
    }
}

/// Every bit of one frame of each kind of payload, not only a sample of them.
#[test]
fn every_single_bit_of_a_write_is_guarded() {
    let message =
        Message::Data(v1::Data { volume: 1, sector: 99, request: 12, epoch: 3, ..v1::Data::default() });
    let wire = encode(&message, &[0x5a; 512]);
    for bit in 0..wire.len() * 8 {
        let mut damaged = wire.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        damaged.resize(wire.len() + MAX_HEADER_BYTES + 1, 0);
        assert!(Decoder::new(&damaged).next_frame().is_err(), "bit {bit}");
    }
}

#[test]
fn lengths_are_refused_from_the_head_alone() {
    let sound = encode(&Message::Data(v1::Data { sector: 1, ..v1::Data::default() }), &[0; 512]);
    let head = |change: &dyn Fn(&mut [u8; HEAD_BYTES])| {
        let mut head: [u8; HEAD_BYTES] = sound[..HEAD_BYTES].try_into().expect("a head");
        change(&mut head);
        Head::decode(&head)
    };
    assert!(head(&|_| ()).is_ok());
    assert_eq!(
        head(&|h| h[8..10].copy_from_slice(&4097_u16.to_be_bytes())),
        Err(FrameError::HeaderTooLong { kind: MessageType::Data, got_bytes: 4097 })
    );
    assert_eq!(
        head(&|h| h[12..16].copy_from_slice(&u32::MAX.to_be_bytes())),
        Err(FrameError::PayloadTooLong { kind: MessageType::Data, got_bytes: u32::MAX as usize })
    );
    let over = u32::try_from(MAX_PAYLOAD_BYTES + 512).expect("a megabyte");
    assert_eq!(
        head(&|h| h[12..16].copy_from_slice(&over.to_be_bytes())),
        Err(FrameError::PayloadTooLong { kind: MessageType::Data, got_bytes: MAX_PAYLOAD_BYTES + 512 })
    );
    assert_eq!(
        head(&|h| h[12..16].copy_from_slice(&513_u32.to_be_bytes())),
        Err(FrameError::PayloadUneven { kind: MessageType::Data, got_bytes: 513, unit_bytes: 512 })
    );
    assert_eq!(
        head(&|h| h[12..16].copy_from_slice(&0_u32.to_be_bytes())),
        Err(FrameError::PayloadMissing { kind: MessageType::Data })
    );
    assert_eq!(
        head(&|h| h[6..8].copy_from_slice(&(MessageType::Ping as u16).to_be_bytes())),
        Err(FrameError::PayloadUnexpected { kind: MessageType::Ping, got_bytes: 512 })
    );
    let bitmap_over = u32::try_from(MAX_BITMAP_WORDS * 8 + 8).expect("64 KiB");
    assert_eq!(
        head(&|h| {
            h[6..8].copy_from_slice(&(MessageType::Bitmap as u16).to_be_bytes());
            h[12..16].copy_from_slice(&bitmap_over.to_be_bytes());
        }),
        Err(FrameError::PayloadTooLong { kind: MessageType::Bitmap, got_bytes: MAX_BITMAP_WORDS * 8 + 8 })
    );
    assert_eq!(
        head(&|h| h[6..8].copy_from_slice(&[0xff, 0xff])),
        Err(FrameError::UnknownType { got: 0xffff })
    );
    assert_eq!(head(&|h| h[4] = 2), Err(FrameError::Version { got: 2 }));
    assert_eq!(head(&|h| h[5] = 2), Err(FrameError::Flags { got: 2 }));
    assert_eq!(head(&|h| h[11] = 1), Err(FrameError::Reserved { got: 1 }));
    let http = head(&|h| h[..4].copy_from_slice(b"GET "));
    assert_eq!(http, Err(FrameError::Magic { got: 0x4745_5420 }));
    assert_eq!(http.expect_err("no magic").kind(), FrameErrorKind::Incompatible);
}

#[test]
fn a_head_without_payload_must_have_crc_zero() {
    let mut out = Vec::new();
    let refused = frame::encode_head(&Message::Ping(v1::Ping {}), 0, Some(1), &mut out);
    assert_eq!(refused, Err(FrameError::CrcOfNothing { kind: MessageType::Ping, got: 1 }));
    assert_eq!(frame::payload_crc(&[]), 0);
}

#[test]
fn blocks_may_travel_without_a_crc_and_nothing_else_may() {
    let payload = vec![7; 1024];
    let message = Message::Data(v1::Data::default());
    let mut wire = Vec::new();
    frame::encode_head(&message, payload.len(), None, &mut wire).expect("blocks");
    wire.extend_from_slice(&payload);
    assert_eq!(decode_all(&wire), Ok(vec![(message, payload)]));
    let head = Head::decode(wire.first_chunk().expect("a head")).expect("sound head");
    assert_eq!(head.payload_crc(), None);
    assert_eq!(head.check_payload(|| unreachable!("nobody sums it")), Ok(()));
    // Its head is proven as ever.
    wire[22] ^= 1;
    assert_eq!(decode_all(&wire).expect_err("damaged").kind(), FrameErrorKind::Damaged);

    let bitmap = Message::Bitmap(v1::Bitmap::default());
    let unchecked = FrameError::Unchecked { kind: MessageType::Bitmap };
    assert_eq!(frame::encode_head(&bitmap, 8, None, &mut Vec::new()), Err(unchecked.clone()));
    let mut forged = encode(&bitmap, &[1; 8]);
    forged[5] = 1;
    assert_eq!(decode_all(&forged), Err(unchecked));
    let mut forged = encode(&Message::Ping(v1::Ping {}), &[]);
    forged[5] = 1;
    assert_eq!(decode_all(&forged), Err(FrameError::Unchecked { kind: MessageType::Ping }));
    let mut forged = encode(&Message::Data(v1::Data::default()), &[7; 512]);
    forged[5] = 1;
    assert!(
        matches!(decode_all(&forged), Err(FrameError::CrcOfNothing { .. })),
        "a CRC that nobody is to look at"
    );
}

#[test]
fn a_full_payload_passes() {
    let payload = vec![7; MAX_PAYLOAD_BYTES];
    let sector = MAX_END_SECTOR - MAX_REQUEST_SECTORS;
    let message = Message::Data(v1::Data { sector, ..v1::Data::default() });
    let wire = encode(&message, &payload);
    let head = Head::decode(wire.first_chunk().expect("a head")).expect("sound head");
    assert_eq!((head.payload_len(), head.payload_sectors()), (MAX_PAYLOAD_BYTES, MAX_REQUEST_SECTORS));
    assert_eq!(decode_all(&wire), Ok(vec![(message, payload)]));
}

#[test]
fn unsound_ranges_are_refused_on_both_sides() {
    let request = |sector, nr_sectors| {
        Message::RsDataRequest(v1::BlockRequest { volume: 0, sector, nr_sectors, request: 1 })
    };
    let kind = MessageType::RsDataRequest;
    assert_eq!(refused(&request(5, 0), &[]), FrameError::RangeEmpty { kind, sector: 5 });
    let (got_sectors, max_sectors) = (MAX_REQUEST_SECTORS + 1, MAX_REQUEST_SECTORS);
    assert_eq!(
        refused(&request(5, got_sectors), &[]),
        FrameError::RangeTooLong { kind, got_sectors, max_sectors }
    );
    for sector in [MAX_END_SECTOR, u64::MAX, u64::MAX - 8] {
        let nr_sectors = 8;
        assert_eq!(refused(&request(sector, 8), &[]), FrameError::RangeOverflow { kind, sector, nr_sectors });
    }

    let discard =
        |nr_sectors| Message::Discard(v1::Trim { sector: 0, nr_sectors, request: 1, ..v1::Trim::default() });
    let (got_sectors, max_sectors) = (MAX_TRIM_SECTORS + 1, MAX_TRIM_SECTORS);
    assert_eq!(
        refused(&discard(got_sectors), &[]),
        FrameError::RangeTooLong { kind: MessageType::Discard, got_sectors, max_sectors }
    );

    let data = Message::Data(v1::Data { sector: MAX_END_SECTOR - 1, ..v1::Data::default() });
    assert_eq!(
        refused(&data, &[0; 1024]),
        FrameError::RangeOverflow { kind: MessageType::Data, sector: MAX_END_SECTOR - 1, nr_sectors: 2 }
    );

    let bitmap = Message::Bitmap(v1::Bitmap { volume: 0, first_word: u64::MAX, last: true });
    assert_eq!(refused(&bitmap, &[0; 8]), FrameError::BitmapOverflow { first_word: u64::MAX, words: 1 });
}

#[test]
fn a_reply_must_be_as_long_as_it_says() {
    let reply = v1::BlockReply { volume: 0, sector: 0, nr_sectors: 2, request: 1, window_sectors: 0 };
    for message in [Message::DataReply(reply), Message::RsDataReply(reply)] {
        let kind = message.message_type();
        assert_eq!(
            refused(&message, &[0; 512]),
            FrameError::PayloadMismatch { kind, nr_sectors: 2, payload_sectors: 1 }
        );
    }
}

#[test]
fn a_text_longer_than_a_header_is_refused_before_it_is_sent() {
    let message = Message::TearDown(v1::TearDown { reason: "x".repeat(MAX_HEADER_BYTES) });
    let mut out = Vec::new();
    let refused = frame::encode_head(&message, 0, Some(0), &mut out).expect_err("too long");
    assert_eq!(
        refused,
        FrameError::HeaderTooLong { kind: MessageType::TearDown, got_bytes: MAX_HEADER_BYTES + 3 }
    );
    assert_eq!(out, b"");
}

#[test]
fn a_header_of_another_length_is_the_callers_mistake() {
    let wire = encode(&Message::Ping(v1::Ping {}), &[]);
    let head = Head::decode(wire.first_chunk().expect("a head")).expect("sound head");
    let error = head.decode_message(&[0]).expect_err("a ping has no header bytes");
    assert_eq!(error.kind(), FrameErrorKind::CallerMistake);
}

#[test]
fn a_damaged_payload_is_told_apart_from_a_damaged_head() {
    let mut wire = encode(&Message::Data(v1::Data::default()), &[1; 512]);
    let last = wire.len() - 1;
    wire[last] ^= 1;
    let error = Decoder::new(&wire).next_frame().expect_err("damaged");
    assert!(matches!(error, FrameError::PayloadCrc { kind: MessageType::Data, .. }), "{error}");
    assert_eq!(error.kind(), FrameErrorKind::Damaged);
}

#[test]
fn pieces_of_a_payload_give_the_crc_of_the_whole() {
    let payload: Vec<u8> = (0..=255).collect();
    for cut in [0, 1, 100, 256] {
        let (front, back) = payload.split_at(cut);
        let crc = frame::payload_crc_append(frame::payload_crc_append(0, front), back);
        assert_eq!(crc, frame::payload_crc(&payload));
    }
}
