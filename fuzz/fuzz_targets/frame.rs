//! The wire: whatever a peer sends, decoding ends in messages that can be sent again, or in an error.
//!
//! A CRC stands in the fuzzer's way, so each input is used three times: as the stream itself; with the CRCs made
//! right, so that what lies behind them is reached; and the same cut short.
#![no_main]

use libfuzzer_sys::fuzz_target;
use lockstep_proto::frame::{self, Decoded, Decoder, HEAD_BYTES, Head};

fuzz_target!(|input: &[u8]| {
    drain(input);
    let mended = mend_checksums(input);
    drain(&mended);
    drain(&mended[..mended.len() / 2]);
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

/// The input with the right magic and the right CRCs in each head that can be found.
fn mend_checksums(input: &[u8]) -> Vec<u8> {
    let mut wire = input.to_vec();
    let mut start = 0;
    while let Some(bytes) = wire.get(start..).and_then(<[u8]>::first_chunk::<HEAD_BYTES>) {
        let mut bytes = *bytes;
        bytes[..6].copy_from_slice(b"LKS1\x01\0");
        bytes[10..12].fill(0);
        bytes[16..20].fill(0);
        let Ok(head) = Head::decode(&bytes) else { break };
        let header_at = start + HEAD_BYTES;
        let payload_at = header_at + head.header_len();
        let end = payload_at + head.payload_len();
        if let Some(payload) = wire.get(payload_at..end) {
            bytes[16..20].copy_from_slice(&frame::payload_crc(payload).to_be_bytes());
        }
        if let Some(header) = wire.get(header_at..payload_at) {
            let covered = [&bytes[..20], header].concat();
            bytes[20..24].copy_from_slice(&frame::payload_crc(&covered).to_be_bytes());
        }
        wire[start..header_at].copy_from_slice(&bytes);
        start = end;
    }
    wire
}
