//! The activity log: a block decodes to what encodes to the same meaning, and no ring makes the replay panic or
//! name an extent that stands nowhere in it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use lockstep_replicator::meta::al_ring::{AlBlock, checksum, decode_block, initialised_block, replay};
use lockstep_replicator::meta::{BLOCK_BYTES, Block, Layout, MetaKind};

/// Smallest ring that a layout may have, and small enough to go round in one input.
const AL_BLOCKS: u32 = 8;

fuzz_target!(|input: &[u8]| {
    let layout = Layout::for_device(MetaKind::Internal, 64 << 20, 0, 1, AL_BLOCKS).expect("a plain disk");
    let mut area = Vec::new();
    let mut pieces = input.split(|byte| *byte == b'|');
    for position in 0..AL_BLOCKS {
        let block = match pieces.next() {
            None | Some([]) => initialised_block(),
            Some(piece) => make_block(piece, position),
        };
        check_block(&block);
        area.extend_from_slice(&block);
    }
    if let Ok(hot) = replay(&area, &layout) {
        assert!(hot.is_sorted(), "ascending");
        for extent in hot {
            assert_ne!(extent, u32::MAX, "free slots are not hot");
            let bytes = extent.to_be_bytes();
            assert!(area.windows(4).any(|window| window == bytes), "extent {extent} came from nowhere");
        }
    }
});

/// A block of the ring from a few bytes: `piece` is laid over a block with sound magic, and mostly sealed.
fn make_block(piece: &[u8], position: u32) -> Block {
    let mut block = initialised_block();
    let (choice, body) = piece.split_first().map_or((0, piece), |(choice, body)| (*choice, body));
    if choice % 8 != 0 {
        block[4..8].copy_from_slice(&position.to_be_bytes());
        block[12..14].fill(0); // an update
    }
    let at = if choice % 2 == 0 { 4 } else { 14 };
    let len = body.len().min(BLOCK_BYTES - at);
    block[at..at + len].copy_from_slice(&body[..len]);
    if choice % 16 != 1 {
        block[8..12].fill(0);
        let crc = checksum(&block);
        block[8..12].copy_from_slice(&crc.to_be_bytes());
    }
    block
}

fn check_block(block: &Block) {
    if let AlBlock::Update(found) = decode_block(block)
        && let Ok(again) = found.encode()
    {
        let AlBlock::Update(decoded) = decode_block(&again) else { panic!("what we write we can read") };
        assert_eq!(decoded, found);
    }
}
