//! The superblock: whatever a disk holds, it decodes to values that encode to the same fields, or is refused; and
//! a layout that passes validation lies inside the devices.
#![no_main]

use libfuzzer_sys::fuzz_target;
use lockstep_replicator::meta::{BLOCK_BYTES, MAGIC_CLEAN, MAGIC_UNCLEAN, MetaKind, Superblock};

/// Where the magic stands (DISK §3).
const MAGIC_AT: usize = 0x3c;

// Two sizes, in units of 512 bytes, and the kind lead the input; the rest is the start of the block.
fuzz_target!(|input: (u32, u32, u8, &[u8])| {
    let (data_sectors, meta_sectors, choice, bytes) = input;
    let (data_bytes, meta_bytes) = (u64::from(data_sectors) * 512, u64::from(meta_sectors) * 512);
    let mut block = [0; BLOCK_BYTES];
    let len = bytes.len().min(BLOCK_BYTES);
    block[..len].copy_from_slice(&bytes[..len]);
    // Mostly with a magic that lets the fuzzer in; else as it came.
    match choice % 4 {
        0 => {}
        1 => block[MAGIC_AT..MAGIC_AT + 4].copy_from_slice(&MAGIC_CLEAN.to_be_bytes()),
        _ => block[MAGIC_AT..MAGIC_AT + 4].copy_from_slice(&MAGIC_UNCLEAN.to_be_bytes()),
    }
    let Ok(superblock) = Superblock::decode(&block, 0) else { return };
    assert_eq!(Superblock::decode(&superblock.encode(), 0).as_ref(), Ok(&superblock));

    let kind = match choice / 4 % 3 {
        0 => MetaKind::Internal,
        1 => MetaKind::FlexExternal,
        _ => MetaKind::Indexed(choice / 12),
    };
    let Ok(layout) = superblock.validate(kind, data_bytes, meta_bytes) else { return };
    let device_bytes = if kind == MetaKind::Internal { data_bytes } else { meta_bytes };
    for (what, start, len) in [
        ("superblock", layout.superblock_byte(), BLOCK_BYTES as u64),
        ("activity log", layout.al_byte(), layout.al_bytes()),
        ("bitmap", layout.bitmap_byte(), layout.bitmap_bytes()),
    ] {
        let end = start.checked_add(len).expect("an area has an end");
        assert!(end <= device_bytes, "{what} {start}..{end} of {device_bytes} bytes, {kind:?}");
    }
});
