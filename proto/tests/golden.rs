//! Byte-exact frames of every message type, kept forever: a change here breaks running pairs in the middle of an
//! upgrade. New fields give new frames beside the old ones, which must still decode.
use lockstep_proto::frame::{self, Decoded, Decoder};
use lockstep_proto::{Message, MessageType, PayloadKind, v1};

/// A frame as it stands on the wire: head and header in hex, then the payload by [`pattern`].
struct Golden {
    name: &'static str,
    message: Message,
    payload_len: usize,
    head_and_header: &'static str,
}

/// The payload of every golden frame: a byte that depends on its place.
fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|index| u8::try_from(index * 7 % 251).expect("less than 251")).collect()
}

fn golden(name: &'static str, message: Message, payload_len: usize, hex: &'static str) -> Golden {
    Golden { name, message, payload_len, head_and_header: hex }
}

fn block_ack(set_in_sync: bool) -> v1::BlockAck {
    v1::BlockAck { volume: 1, sector: 0x0102_0304_0506, nr_sectors: 2048, request: 77, set_in_sync }
}

fn trim(may_unmap: bool) -> v1::Trim {
    v1::Trim {
        volume: 3,
        sector: 8,
        nr_sectors: 32 * 8192,
        request: 9,
        epoch: 4,
        fua: true,
        want_recv_ack: false,
        want_write_ack: true,
        may_unmap,
    }
}

fn block_request() -> v1::BlockRequest {
    v1::BlockRequest { volume: 0, sector: 1 << 40, nr_sectors: 8, request: 5 }
}

fn block_reply() -> v1::BlockReply {
    v1::BlockReply { volume: 2, sector: 16, nr_sectors: 2, request: 6, window_sectors: 0 }
}

fn data() -> v1::Data {
    v1::Data {
        volume: 1,
        sector: 0x1234_5678,
        request: 0xfedc_ba98_7654_3210,
        epoch: 7,
        fua: true,
        want_recv_ack: true,
        want_write_ack: true,
    }
}

fn hello() -> v1::Hello {
    v1::Hello {
        version_min: 1,
        version_max: 1,
        features: 3,
        node_id: 1,
        node_name: "alice".into(),
        resource: "web-root".into(),
        protocol: 3,
        after_sb_0pri: 2,
        after_sb_1pri: 3,
        after_sb_2pri: 4,
        allow_two_primaries: true,
        discard_my_data: true,
        tentative: true,
        session_nonce: 0x0123_4567_89ab_cdef,
        max_payload_bytes: 1 << 20,
        always_asbp: false,
        rr_conflict: 0,
    }
}

fn volume_info() -> v1::VolumeInfo {
    v1::VolumeInfo {
        phase: v1::volume_info::Phase::Update.into(),
        volume: 1,
        capacity_sectors: 2_097_152,
        agreed_size_sectors: 2_097_144,
        user_size_sectors: 2_097_000,
        uuid_current: 0xa1a2_a3a4_a5a6_a7a8,
        uuid_bitmap: 0xb1b2_b3b4_b5b6_b7b8,
        uuid_history_0: 0xc1c2_c3c4_c5c6_c7c8,
        uuid_history_1: 0xd1d2_d3d4_d5d6_d7d8,
        uuid_flags: 6,
        disk_state: 8,
        role: 1,
        out_of_sync_bits: 300,
        foreign_bits: 0,
        discard_supported: true,
        last_of_handshake: 1,
    }
}

fn state() -> v1::State {
    v1::State {
        role: 2,
        volumes: vec![
            v1::VolumeState { volume: 0, disk_state: 8, sync_paused: false, ahead: false },
            v1::VolumeState { volume: 1, disk_state: 4, sync_paused: false, ahead: false },
        ],
    }
}

/// One frame or more of every type, in wire order.
fn all() -> Vec<Golden> {
    vec![
        golden(
            "data",
            Message::Data(data()),
            1024,
            "4c4b5331 01000001 001b0000 00000400 2744a656 ecfbb282 \
                080110f8acd191011890e4d0b287d3aeeefe012007280130013801",
        ),
        golden(
            "discard",
            Message::Discard(trim(false)),
            0,
            "4c4b5331 01000002 00100000 00000000 00000000 6eee86a0 \
                08031008188080102009280430014001",
        ),
        golden(
            "write_zeroes",
            Message::WriteZeroes(trim(true)),
            0,
            "4c4b5331 01000003 00120000 00000000 00000000 d3eadade \
                080310081880801020092804300140014801",
        ),
        golden(
            "barrier",
            Message::Barrier(v1::Barrier { epoch: u32::MAX }),
            0,
            "4c4b5331 01000004 00060000 00000000 00000000 f7c0d3c2 \
                08ffffffff0f",
        ),
        golden(
            "barrier_ack",
            Message::BarrierAck(v1::BarrierAck { epoch: 9, writes: 200 }),
            0,
            "4c4b5331 01000005 00050000 00000000 00000000 74b16b0a \
                080910c801",
        ),
        golden(
            "recv_ack",
            Message::RecvAck(block_ack(false)),
            0,
            "4c4b5331 01000006 000e0000 00000000 00000000 8117c59a \
                080110868a9098a020188010204d",
        ),
        golden(
            "write_ack",
            Message::WriteAck(block_ack(true)),
            0,
            "4c4b5331 01000007 00100000 00000000 00000000 5496b249 \
                080110868a9098a020188010204d2801",
        ),
        golden(
            "neg_ack",
            Message::NegAck(block_ack(false)),
            0,
            "4c4b5331 01000008 000e0000 00000000 00000000 ba50a449 \
                080110868a9098a020188010204d",
        ),
        golden(
            "data_request",
            Message::DataRequest(block_request()),
            0,
            "4c4b5331 01000009 000b0000 00000000 00000000 4a745279 \
                1080808080802018082005",
        ),
        golden(
            "data_reply",
            Message::DataReply(block_reply()),
            1024,
            "4c4b5331 0100000a 00080000 00000400 2744a656 1e7c3c56 \
                0802101018022006",
        ),
        golden(
            "neg_d_reply",
            Message::NegDReply(block_ack(false)),
            0,
            "4c4b5331 0100000b 000e0000 00000000 00000000 581313a9 \
                080110868a9098a020188010204d",
        ),
        golden(
            "rs_data_request",
            Message::RsDataRequest(block_request()),
            0,
            "4c4b5331 0100000c 000b0000 00000000 00000000 12dc772d \
                1080808080802018082005",
        ),
        golden(
            "rs_data_reply",
            Message::RsDataReply(block_reply()),
            1024,
            "4c4b5331 0100000d 00080000 00000400 2744a656 3d4b4dd5 \
                0802101018022006",
        ),
        golden(
            "rs_deallocated",
            Message::RsDeallocated(block_reply()),
            0,
            "4c4b5331 0100000e 00080000 00000000 00000000 bd3132df \
                0802101018022006",
        ),
        golden(
            "rs_write_ack",
            Message::RsWriteAck(block_ack(true)),
            0,
            "4c4b5331 0100000f 00100000 00000000 00000000 f3cdabb6 \
                080110868a9098a020188010204d2801",
        ),
        golden(
            "neg_rs_d_reply",
            Message::NegRsDReply(block_ack(false)),
            0,
            "4c4b5331 01000010 000e0000 00000000 00000000 b1c85b9e \
                080110868a9098a020188010204d",
        ),
        golden(
            "out_of_sync",
            Message::OutOfSync(v1::OutOfSync { volume: 1, sector: 128, nr_sectors: 256 }),
            0,
            "4c4b5331 01000011 00080000 00000000 00000000 f95c54f6 \
                0801108001188002",
        ),
        golden(
            "bitmap",
            Message::Bitmap(v1::Bitmap { volume: 1, first_word: 4096, last: false }),
            40,
            "4c4b5331 01000012 00050000 00000028 592bef5c 31b8f6d8 \
                0801108020",
        ),
        golden(
            "bitmap_empty_last",
            Message::Bitmap(v1::Bitmap { volume: 1, first_word: 4101, last: true }),
            0,
            "4c4b5331 01000012 00070000 00000000 00000000 dc518dcf \
                08011085201801",
        ),
        golden(
            "sync_uuid",
            Message::SyncUuid(v1::SyncUuid {
                volume: 1,
                sync_uuid: 0xe1e2_e3e4_e5e6_e7e8,
                uuid_current: 0xa1a2_a3a4_a5a6_a7a8,
                uuid_history_0: 0xc1c2_c3c4_c5c6_c7c8,
                uuid_history_1: 0xd1d2_d3d4_d5d6_d7d8,
            }),
            0,
            "4c4b5331 01000013 00260000 00000000 00000000 484aef7f \
                080111e8e7e6e5e4e3e2e119a8a7a6a5a4a3a2a121c8c7c6c5c4c3c2c129d8d7d6d5d4d3d2d1",
        ),
        golden(
            "resync_finished",
            Message::ResyncFinished(v1::ResyncFinished { volume: 1, failed_bits: 12 }),
            0,
            "4c4b5331 01000014 00040000 00000000 00000000 85e37582 \
                0801100c",
        ),
        golden(
            "rs_checksum_request",
            Message::RsChecksumRequest(v1::ChecksumRequest {
                volume: 1,
                sector: 128,
                nr_sectors: 64,
                request: 7,
                digest_0: 0xa1a2_a3a4_a5a6_a7a8,
                digest_1: 0xb1b2_b3b4_b5b6_b7b8,
                digest_2: 0xc1c2_c3c4_c5c6_c7c8,
                digest_3: 0xd1d2_d3d4_d5d6_d7d8,
            }),
            0,
            "4c4b5331 01000015 002d0000 00000000 00000000 87b50218 \
                08011080011840200729a8a7a6a5a4a3a2a131b8b7b6b5b4b3b2b139c8c7c6c5c4c3c2c141d8d7d6d5d4d3d2d1",
        ),
        golden(
            "rs_is_in_sync",
            Message::RsIsInSync(v1::BlockReply { window_sectors: 4096, ..block_reply() }),
            0,
            "4c4b5331 01000016 000b0000 00000000 00000000 167ba4b0 \
                0802101018022006288020",
        ),
        golden(
            "ov_request",
            Message::OvRequest(block_request()),
            0,
            "4c4b5331 01000017 000b0000 00000000 00000000 9c68fb70 \
                1080808080802018082005",
        ),
        golden(
            "ov_reply",
            Message::OvReply(v1::ChecksumReply {
                volume: 1,
                request: 7,
                readable: true,
                digest_0: 0xa1a2_a3a4_a5a6_a7a8,
                digest_1: 0xb1b2_b3b4_b5b6_b7b8,
                digest_2: 0xc1c2_c3c4_c5c6_c7c8,
                digest_3: 0xd1d2_d3d4_d5d6_d7d8,
            }),
            0,
            "4c4b5331 01000018 002a0000 00000000 00000000 956012d0 \
                08011007180121a8a7a6a5a4a3a2a129b8b7b6b5b4b3b2b131c8c7c6c5c4c3c2c139d8d7d6d5d4d3d2d1",
        ),
        golden(
            "ov_result",
            Message::OvResult(v1::OutOfSync { volume: 1, sector: 128, nr_sectors: 8 }),
            0,
            "4c4b5331 01000019 00070000 00000000 00000000 a0b677fc \
                08011080011808",
        ),
        golden(
            "verify_finished",
            Message::VerifyFinished(v1::VerifyFinished { volume: 1, found_bits: 12, skipped_bits: 3 }),
            0,
            "4c4b5331 0100001a 00060000 00000000 00000000 24eefa08 \
                0801100c1803",
        ),
        golden(
            "hello",
            Message::Hello(hello()),
            0,
            "4c4b5331 01000020 00350000 00000000 00000000 9fde641c \
                08011001180320012a05616c69636532087765622d726f6f74380340024803500458016001680170 \
                ef9bafcdf8acd1910178808040",
        ),
        golden(
            "volume_info",
            Message::VolumeInfo(volume_info()),
            0,
            "4c4b5331 01000021 00420000 00000000 00000000 abfa338b \
                08031001188080800120f8ff7f28e8fe7f31a8a7a6a5a4a3a2a139b8b7b6b5b4b3b2b141c8c7c6c5 \
                c4c3c2c149d8d7d6d5d4d3d2d150065808600168ac0270017801",
        ),
        golden(
            "state",
            Message::State(state()),
            0,
            "4c4b5331 01000022 000c0000 00000000 00000000 6f211da8 \
                080212021008120408011004",
        ),
        golden(
            "state_ahead",
            Message::State(v1::State {
                role: 1,
                volumes: vec![v1::VolumeState { volume: 3, disk_state: 9, sync_paused: true, ahead: true }],
            }),
            0,
            "4c4b5331 01000022 000c0000 00000000 00000000 ecbc1365 \
                080112080803100918012001",
        ),
        golden(
            "state_request",
            Message::StateRequest(v1::StateRequest {
                id: 31,
                kind: v1::state_request::Kind::SkipInitialSync.into(),
                volume: 1,
                uuid_current: 0xa1a2_a3a4_a5a6_a7a8,
                size_sectors: 0,
                assume_clean: false,
                start_sector: 0,
                stop_sector: 0,
            }),
            0,
            "4c4b5331 01000023 000f0000 00000000 00000000 58d46b4b \
                081f1004180121a8a7a6a5a4a3a2a1",
        ),
        golden(
            "state_reply",
            Message::StateReply(v1::StateReply { id: 31, result: -7, text: "held open".into(), value: 0 }),
            0,
            "4c4b5331 01000024 00180000 00000000 00000000 310dad2e \
                081f10f9ffffffffffffffff011a0968656c64206f70656e",
        ),
        golden(
            "ping",
            Message::Ping(v1::Ping {}),
            0,
            "4c4b5331 01000025 00000000 00000000 00000000 bc5471c3",
        ),
        golden(
            "ping_ack",
            Message::PingAck(v1::PingAck {}),
            0,
            "4c4b5331 01000026 00000000 00000000 00000000 ed22396c",
        ),
        golden(
            "tear_down",
            Message::TearDown(v1::TearDown { reason: "disconnect".into() }),
            0,
            "4c4b5331 01000027 000c0000 00000000 00000000 db1e21d6 \
                0a0a646973636f6e6e656374",
        ),
        golden(
            "protocol_update",
            Message::ProtocolUpdate(v1::ProtocolUpdate {
                protocol: 3,
                allow_two_primaries: true,
                after_sb_0pri: 3,
                after_sb_1pri: 8,
                after_sb_2pri: 0,
            }),
            0,
            "4c4b5331 01000028 00080000 00000000 00000000 e1a6fa0e \
                0803100118032008",
        ),
    ]
}

fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn from_hex(hex: &str) -> Vec<u8> {
    let digits: Vec<char> = hex.chars().filter(|c| !c.is_whitespace()).collect();
    digits
        .chunks(2)
        .map(|pair| u8::from_str_radix(&pair.iter().collect::<String>(), 16).expect("hex digits"))
        .collect()
}

#[test]
fn encoding_gives_the_golden_bytes() {
    for golden in all() {
        let payload = pattern(golden.payload_len);
        let mut out = Vec::new();
        frame::encode_head(&golden.message, payload.len(), Some(frame::payload_crc(&payload)), &mut out)
            .expect(golden.name);
        assert_eq!(to_hex(&out), to_hex(&from_hex(golden.head_and_header)), "{}", golden.name);
    }
}

#[test]
fn golden_bytes_decode_to_the_message() {
    for golden in all() {
        let payload = pattern(golden.payload_len);
        let mut wire = from_hex(golden.head_and_header);
        wire.extend_from_slice(&payload);
        let mut decoder = Decoder::new(&wire);
        let decoded = decoder.next_frame().expect(golden.name);
        assert_eq!(decoded, Decoded::Frame { message: golden.message, payload: &payload }, "{}", golden.name);
        assert_eq!(decoder.rest(), b"", "{}", golden.name);
    }
}

#[test]
fn every_message_type_has_a_golden_frame() {
    let seen: Vec<MessageType> = all().iter().map(|golden| golden.message.message_type()).collect();
    for kind in MessageType::ALL {
        assert!(seen.contains(kind), "no golden frame of {kind:?}");
        assert_eq!(MessageType::from_wire(*kind as u16), Some(*kind));
    }
}

/// The golden bytes above came from the encoder; this frame is put together by hand from the table in `frame.rs`.
#[test]
fn a_frame_built_by_hand_is_the_same() {
    /// CRC-32C bit by bit, from its definition.
    fn crc32c(bytes: &[u8]) -> u32 {
        let mut crc = u32::MAX;
        for byte in bytes {
            crc ^= u32::from(*byte);
            for _ in 0..8 {
                crc = if crc & 1 == 1 { (crc >> 1) ^ 0x82f6_3b78 } else { crc >> 1 };
            }
        }
        !crc
    }
    assert_eq!(crc32c(b"123456789"), 0xe306_9283, "the check value of CRC-32C");

    let payload = pattern(512);
    // Fields 1 and 2 as varints (volume 5, sector 300), 3 (request 1), 5 (fua).
    let header = [0x08, 5, 0x10, 0xac, 0x02, 0x18, 1, 0x28, 1];
    let mut wire = Vec::new();
    wire.extend_from_slice(b"LKS1");
    wire.extend_from_slice(&[1, 0]);
    wire.extend_from_slice(&0x0001_u16.to_be_bytes());
    wire.extend_from_slice(&9_u16.to_be_bytes());
    wire.extend_from_slice(&[0, 0]);
    wire.extend_from_slice(&512_u32.to_be_bytes());
    wire.extend_from_slice(&crc32c(&payload).to_be_bytes());
    let covered = [wire.as_slice(), &header].concat();
    wire.extend_from_slice(&crc32c(&covered).to_be_bytes());
    wire.extend_from_slice(&header);

    let message = Message::Data(v1::Data {
        volume: 5,
        sector: 300,
        request: 1,
        epoch: 0,
        fua: true,
        want_recv_ack: false,
        want_write_ack: false,
    });
    let mut encoded = Vec::new();
    frame::encode_head(&message, 512, Some(frame::payload_crc(&payload)), &mut encoded)
        .expect("sound message");
    assert_eq!(to_hex(&encoded), to_hex(&wire));

    wire.extend_from_slice(&payload);
    let decoded = Decoder::new(&wire).next_frame().expect("sound frame");
    assert_eq!(decoded, Decoded::Frame { message, payload: &payload });
}

#[test]
fn payload_kinds_of_the_golden_frames_agree_with_the_types() {
    for golden in all() {
        let carries = golden.payload_len > 0;
        match golden.message.message_type().payload_kind() {
            PayloadKind::None => assert!(!carries, "{}", golden.name),
            PayloadKind::Blocks => assert!(carries, "{}", golden.name),
            PayloadKind::BitmapWords => assert_eq!(golden.payload_len % 8, 0, "{}", golden.name),
        }
    }
}
