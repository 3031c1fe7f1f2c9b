//! The wire: whatever a peer sends, decoding ends in messages that can be sent again, or in an error.
//!
//! Lengths and CRCs stand in the fuzzer's way: a byte more in a header, and everything behind it is refused. So an
//! input that starts with the magic is mended first, and any other is taken as it is, behind its first byte. Each
//! input is decoded once: the fuzzer counts how often code ran, and a second look would blur what the first one found.
#![no_main]

use libfuzzer_sys::{fuzz_mutator, fuzz_target};
use lockstep_proto::frame::{self, Decoded, Decoder, HEAD_BYTES};
use lockstep_proto::{MessageType, PayloadKind};
use std::ops::Range;

/// What a frame starts with, and what makes an input one to be mended.
const MAGIC: &[u8; 4] = b"LKS1";

fuzz_target!(|input: &[u8]| {
    if input.starts_with(MAGIC) {
        drain(&mend(input));
    } else if let Some((_, stream)) = input.split_first() {
        drain(stream);
    }
});

// Half of the changes are libFuzzer's own; the other half change one field of one header, which bytes hardly ever do.
fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    let mut random = Random(u64::from(seed) << 1 | 1);
    if random.below(2) == 1
        && let Some(changed) = change_field(&data[..size], &mut random)
        && changed.len() <= max_size
    {
        data[..changed.len()].copy_from_slice(&changed);
        return changed.len();
    }
    libfuzzer_sys::fuzzer_mutate(data, size, max_size)
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
                frame::encode_head(&message, payload.len(), Some(crc), &mut again)
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
        let (body, next) = behind.split_at(frame_end(behind));
        rest = next;
        let mut head = *head;
        let payload_len = payload_len(&head, body);
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

/// Where the frame ends whose head stands before `behind`: at the next magic.
fn frame_end(behind: &[u8]) -> usize {
    behind.windows(MAGIC.len()).position(|window| window == MAGIC).unwrap_or(behind.len())
}

/// Length of the payload at the end of `body`: what the head says, if that can be.
fn payload_len(head: &[u8; HEAD_BYTES], body: &[u8]) -> usize {
    let number = u16::from_be_bytes([head[6], head[7]]);
    let unit_bytes = match MessageType::from_wire(number).map(MessageType::payload_kind) {
        Some(PayloadKind::Blocks) => 512,
        Some(PayloadKind::BitmapWords) => 8,
        Some(PayloadKind::None) | None => usize::MAX,
    };
    let wanted = u32::from_be_bytes([head[12], head[13], head[14], head[15]]) as usize;
    wanted.min(body.len()) / unit_bytes * unit_bytes
}

/// Numbers that depend on libFuzzer's seed only (xorshift64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 >> 11
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % limit.max(1) as u64).unwrap_or(0)
    }

    /// Small, near a power of two, or anything.
    fn number(&mut self) -> u64 {
        match self.below(4) {
            0 | 1 => self.next() % 16,
            2 => (1 << self.below(64)) - u64::from(self.below(2) == 1),
            _ => self.next() >> self.below(48),
        }
    }
}

/// The input with one field of one header set, added or taken away.
fn change_field(input: &[u8], random: &mut Random) -> Option<Vec<u8>> {
    let starts: Vec<usize> =
        input.windows(MAGIC.len()).enumerate().filter(|(_, w)| w == MAGIC).map(|(at, _)| at).collect();
    let start = *starts.get(random.below(starts.len()))?;
    let (head, behind) = input[start..].split_first_chunk::<HEAD_BYTES>()?;
    let body = &behind[..frame_end(behind)];
    let header = &body[..body.len() - payload_len(head, body)];
    let fields = fields(header);
    let at = start + HEAD_BYTES;
    let (place, new) = match random.below(4) {
        // A field that the header does not show has its default; most fields are varints.
        0 => {
            let mut new = vec![u8::try_from(random.below(15) + 1).ok()? << 3];
            put_varint(random.number(), &mut new);
            (header.len()..header.len(), new)
        }
        1 => (fields.get(random.below(fields.len()))?.clone(), Vec::new()),
        _ => {
            let place = fields.get(random.below(fields.len()))?.clone();
            let mut new = vec![header[place.start]];
            match header[place.start] & 7 {
                0 => put_varint(random.number(), &mut new),
                1 => new.extend_from_slice(&random.number().to_le_bytes()),
                _ => return None,
            }
            (place, new)
        }
    };
    Some([&input[..at + place.start], &new, &input[at + place.end..]].concat())
}

/// Where the fields of a header stand, as far as they can be told.
fn fields(header: &[u8]) -> Vec<Range<usize>> {
    let mut found = Vec::new();
    let mut at = 0;
    while at < header.len() {
        let value = at + 1; // every tag of ours is one byte
        let varint = || header[value..].iter().position(|byte| byte & 0x80 == 0).map(|last| value + last + 1);
        let end = match header[at] & 7 {
            0 => varint(),
            1 => Some(value + 8),
            2 => header.get(value).map(|len| value + 1 + usize::from(*len)),
            5 => Some(value + 4),
            _ => None,
        };
        let Some(end) = end.filter(|end| *end <= header.len()) else { break };
        found.push(at..end);
        at = end;
    }
    found
}

fn put_varint(mut number: u64, out: &mut Vec<u8>) {
    while number >= 0x80 {
        out.push(number.to_le_bytes()[0] | 0x80);
        number >>= 7;
    }
    out.push(number.to_le_bytes()[0]);
}
