//! The wire: whatever a peer sends, decoding ends in messages that can be sent again, or in an error.
//!
//! Lengths and CRCs stand in the fuzzer's way: a byte more in a header, and everything behind it is refused. So an
//! input that starts with the magic is mended first, and any other is taken as it is, behind its first byte. Each
//! input is decoded once: the fuzzer counts how often code ran, and a second look would blur what the first one found.
#![no_main]

use libfuzzer_sys::fuzz_target;
use lockstep_proto::frame::{self, Decoded, Decoder, HEAD_BYTES};
use lockstep_proto::{MessageType, PayloadKind};

/// What a frame starts with, and what makes an input one to be mended.
const MAGIC: &[u8; 4] = b"LKS1";

fuzz_target!(|input: &[u8]| {
    if input.starts_with(MAGIC) {
        drain(&mend(input));
    } else if let Some((_, stream)) = input.split_first() {
        drain(stream);
    }
});

/// Decodes frame after frame; what was decoded must encode, and decode again to the same.
fn drain(input: &[u8]) {
    let mut decoder = Decoder::new(input);
    loop {
        let before = decoder.rest().len();
        match decoder.next_frame() {
            Ok(Decoded::Frame { message, payload }) => {
                assert!(decoder.rest().len() < before, "a frame has a length");
                let mut again = Vec::new();
                let crc = frame::payload_crc(payload);
                frame::encode_head(&message, payload.len(), crc, &mut again)
                    .expect("decoded, so it is sound");
                again.extend_from_slice(payload);
                let decoded = Decoder::new(&again).next_frame();
                assert_eq!(decoded, Ok(Decoded::Frame { message, payload }));
            }
            Ok(Decoded::NeedMore { bytes }) => {
                assert!(bytes > 0, "the end of the input is not the end of the stream");
                assert_eq!(decoder.rest().len(), before, "nothing was consumed");
                return;
            }
            Err(error) => {
                assert!(!error.to_string().is_empty());
                return;
            }
        }
    }
}

/// The input as a stream of frames with right lengths and CRCs. A frame reaches up to the next magic; its payload is
/// as long as its head says, if that can be, and the header is what stands before it.
fn mend(input: &[u8]) -> Vec<u8> {
    let mut wire = Vec::with_capacity(input.len());
    let mut rest = input;
    while let Some((head, behind)) = rest.split_first_chunk::<HEAD_BYTES>() {
        let end = behind.windows(MAGIC.len()).position(|window| window == MAGIC).unwrap_or(behind.len());
        let (body, next) = behind.split_at(end);
        rest = next;
        let mut head = *head;
        let number = u16::from_be_bytes([head[6], head[7]]);
        let unit_bytes = match MessageType::from_wire(number).map(MessageType::payload_kind) {
            Some(PayloadKind::Blocks) => 512,
            Some(PayloadKind::BitmapWords) => 8,
            Some(PayloadKind::None) | None => usize::MAX,
        };
        let wanted = u32::from_be_bytes([head[12], head[13], head[14], head[15]]) as usize;
        let payload_len = wanted.min(body.len()) / unit_bytes * unit_bytes;
        let (header, payload) = body.split_at(body.len() - payload_len);
        head[4..6].copy_from_slice(&[frame::LAYOUT_VERSION, 0]);
        head[8..10].copy_from_slice(&u16::try_from(header.len()).unwrap_or(u16::MAX).to_be_bytes());
        head[10..12].fill(0);
        head[12..16].copy_from_slice(&u32::try_from(payload_len).unwrap_or(u32::MAX).to_be_bytes());
        head[16..20].copy_from_slice(&frame::payload_crc(payload).to_be_bytes());
        let crc = frame::payload_crc_append(frame::payload_crc(&head[..20]), header);
        head[20..24].copy_from_slice(&crc.to_be_bytes());
        wire.extend_from_slice(&head);
        wire.extend_from_slice(body);
    }
    wire.extend_from_slice(rest);
    wire
}
