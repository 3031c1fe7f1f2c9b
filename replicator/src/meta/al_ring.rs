//! The activity log on disk (DISK §7): blocks in, hot extents out.
//!
//! The log answers one question after a crash: which 4 MiB extents may have been written while the mark
//! was not yet in the bitmap. Answering "too few" loses data silently, so replay accepts only a ring that
//! the writing rule can have left behind: at most the one block that was being written is damaged, numbers
//! are consecutive and at their places, and every slot of the table can be rebuilt. Everything else is
//! [`AlDamage`], which the caller turns into "every block may have changed".
use crate::meta::layout::Layout;
use crate::meta::{AlTransaction, BLOCK_BYTES, Block, MetaError, be16, be32, put};
use std::collections::BTreeSet;
use thiserror::Error;

/// Magic of an activity-log block.
pub const MAGIC_AL: u32 = 0x69CB_65A2;
/// Magic of an activity log in persistent memory (DRBD 9 only).
pub const MAGIC_AL_PMEM: u32 = 0x6AA6_67A6;
/// Magic of a sector of the activity log of DRBD 8.3 and older.
pub const MAGIC_AL_83: u32 = 0x8374_0267;
/// Most slot changes in one block.
pub const MAX_UPDATES: usize = 64;
/// Slots of the table shown in one block.
pub const MAX_CONTEXT: usize = 919;
/// Most slots of the table; higher slot numbers are ignored when read.
pub const MAX_SLOTS: u16 = 65534;
/// A free slot, and an extent number not used.
pub const FREE: u32 = u32::MAX;

const NO_SLOT: u16 = u16::MAX;
const TYPE_UPDATE: u16 = 0;
const TYPE_INITIALISED: u16 = 0xFFFF;
const UPDATE_SLOTS_AT: usize = 36;
const UPDATE_EXTENTS_AT: usize = 164;
const CONTEXT_AT: usize = 420;
const _: () = assert!(UPDATE_SLOTS_AT + 2 * MAX_UPDATES == UPDATE_EXTENTS_AT);
const _: () = assert!(UPDATE_EXTENTS_AT + 4 * MAX_UPDATES == CONTEXT_AT);
const _: () = assert!(CONTEXT_AT + 4 * MAX_CONTEXT == BLOCK_BYTES);

/// Why a log cannot be replayed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum AlDamage {
    /// The log was written by DRBD 8.3 or older.
    #[error(
        "activity log in the format of DRBD 8.3 or older; let `drbdmeta ... apply-al` of drbd-utils convert it"
    )]
    Legacy83,
    /// The log was written to persistent memory.
    #[error("activity log in the persistent-memory format of DRBD 9; let `drbdmeta ... apply-al` apply it")]
    PersistentMemory,
    /// Not one block with magic and checksum.
    #[error("no valid block in the activity log")]
    NoValidBlock,
    /// A block is damaged that no interrupted write can have damaged.
    #[error("activity-log block at ring position {position} is damaged, which no interrupted write explains")]
    Corrupt {
        /// Position in ring order.
        position: u32,
    },
    /// A block is whole but makes no sense where it is.
    #[error("activity-log block at ring position {position} is out of sequence or of unknown type")]
    OutOfSequence {
        /// Position in ring order.
        position: u32,
    },
    /// Blocks are whole, but together do not show every slot of the table.
    #[error("the activity log does not show all {slots} slots of its table")]
    Incomplete {
        /// Size of the table.
        slots: u16,
    },
    /// The area could not be read.
    #[error("the activity log cannot be read")]
    Unreadable,
}

impl AlDamage {
    /// Whether another tool must convert the log first; else the damage only means "everything may have changed".
    #[must_use]
    pub const fn is_foreign_format(&self) -> bool {
        matches!(self, Self::Legacy83 | Self::PersistentMemory)
    }
}

/// What one block of the ring holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AlBlock {
    /// Wrong magic or checksum: torn, or never written.
    Damaged,
    /// Initialised, no transaction yet.
    Initialised,
    /// A transaction.
    Update(AlTransaction),
    /// Whole, but of an unknown type or with impossible counts.
    Nonsense,
}

/// The checksum of an activity-log block: CRC-32C with initial value 0 and no final inversion, over the
/// bytes with the checksum field as zero (DISK §7.2).
#[must_use]
pub fn checksum(bytes: &[u8]) -> u32 {
    // The crate inverts on the way in and out; inverting both undoes it.
    !crc32c::crc32c_append(u32::MAX, bytes)
}

fn seal(mut block: Block) -> Block {
    put(&mut block, 8, &[0; 4]);
    let crc = checksum(&block);
    put(&mut block, 8, &crc.to_be_bytes());
    block
}

/// The block that create and apply write to every position of the ring (DISK §7.3).
#[must_use]
pub fn initialised_block() -> Block {
    let mut block = [0; BLOCK_BYTES];
    put(&mut block, 0, &MAGIC_AL.to_be_bytes());
    put(&mut block, 12, &TYPE_INITIALISED.to_be_bytes());
    seal(block)
}

impl AlTransaction {
    /// The 4096 bytes as they go to the disk.
    ///
    /// # Errors
    /// More updates or context than a block holds.
    pub fn encode(&self) -> Result<Block, MetaError> {
        let too_big =
            MetaError::AlTransactionTooBig { updates: self.updates.len(), context: self.context.len() };
        if self.updates.len() > MAX_UPDATES || self.context.len() > MAX_CONTEXT {
            return Err(too_big);
        }
        let mut block = [0; BLOCK_BYTES];
        put(&mut block, 0, &MAGIC_AL.to_be_bytes());
        put(&mut block, 4, &self.number.to_be_bytes());
        put(&mut block, 12, &TYPE_UPDATE.to_be_bytes());
        let nr_updates = u16::try_from(self.updates.len()).map_err(|_| too_big)?;
        put(&mut block, 14, &nr_updates.to_be_bytes());
        put(&mut block, 16, &self.context_size.to_be_bytes());
        put(&mut block, 18, &self.context_start_slot.to_be_bytes());
        let unused = std::iter::repeat(&(NO_SLOT, FREE));
        for (index, (slot, extent)) in self.updates.iter().chain(unused).take(MAX_UPDATES).enumerate() {
            put(&mut block, UPDATE_SLOTS_AT + 2 * index, &slot.to_be_bytes());
            put(&mut block, UPDATE_EXTENTS_AT + 4 * index, &extent.to_be_bytes());
        }
        let unused = std::iter::repeat(&FREE);
        for (index, extent) in self.context.iter().chain(unused).take(MAX_CONTEXT).enumerate() {
            put(&mut block, CONTEXT_AT + 4 * index, &extent.to_be_bytes());
        }
        Ok(seal(block))
    }
}

/// Reads one block.
#[must_use]
pub fn decode_block(block: &Block) -> AlBlock {
    let mut unsealed = *block;
    put(&mut unsealed, 8, &[0; 4]);
    if be32(block, 0) != MAGIC_AL || be32(block, 8) != checksum(&unsealed) {
        return AlBlock::Damaged;
    }
    match be16(block, 12) {
        TYPE_INITIALISED => return AlBlock::Initialised,
        TYPE_UPDATE => {}
        _ => return AlBlock::Nonsense,
    }
    let nr_updates = usize::from(be16(block, 14));
    let context_size = be16(block, 16);
    let context_start_slot = be16(block, 18);
    if nr_updates > MAX_UPDATES {
        return AlBlock::Nonsense;
    }
    let updates = (0..MAX_UPDATES)
        .map(|index| (be16(block, UPDATE_SLOTS_AT + 2 * index), be32(block, UPDATE_EXTENTS_AT + 4 * index)))
        .enumerate()
        // drbdmeta looks at entries behind the count too, as long as they name a slot.
        .filter(|(index, (slot, _))| *index < nr_updates || *slot != NO_SLOT)
        .map(|(_, update)| update)
        .collect();
    let mut context: Vec<u32> = (0..MAX_CONTEXT).map(|index| be32(block, CONTEXT_AT + 4 * index)).collect();
    // What lies behind the end of the table is padding, unless it says something.
    let in_table = usize::from(context_size.saturating_sub(context_start_slot)).min(MAX_CONTEXT);
    let said = context.iter().rposition(|extent| *extent != FREE).map_or(0, |last| last + 1);
    context.truncate(in_table.max(said));
    AlBlock::Update(AlTransaction {
        number: be32(block, 4),
        updates,
        context_size,
        context_start_slot,
        context,
    })
}

/// Replays a whole activity-log area as read from the disk (`al_blocks` blocks in area order).
///
/// Returns the extents that were hot, ascending; empty when nothing was logged.
///
/// # Errors
/// [`AlDamage`]: the set cannot be known.
pub fn replay(area: &[u8], layout: &Layout) -> Result<Vec<u32>, AlDamage> {
    let (blocks, rest) = area.as_chunks::<BLOCK_BYTES>();
    let ring_len = layout.al_blocks();
    if !rest.is_empty() || u32::try_from(blocks.len()) != Ok(ring_len) {
        return Err(AlDamage::Unreadable);
    }
    let ring: Vec<AlBlock> = (0..ring_len)
        .map(|position| {
            blocks.get(layout.al_block_index(position) as usize).map_or(AlBlock::Damaged, decode_block)
        })
        .collect();
    if ring.iter().all(|block| matches!(block, AlBlock::Damaged)) {
        return Err(match be32(area, 0) {
            MAGIC_AL_83 => AlDamage::Legacy83,
            MAGIC_AL_PMEM => AlDamage::PersistentMemory,
            _ => AlDamage::NoValidBlock,
        });
    }
    replay_ring(&ring)
}

/// Replays decoded blocks in ring order. See [`replay`].
fn replay_ring(ring: &[AlBlock]) -> Result<Vec<u32>, AlDamage> {
    let ring_len = u32::try_from(ring.len()).map_err(|_| AlDamage::Unreadable)?;
    let mut updates = Vec::new();
    let mut damaged = Vec::new();
    for (position, block) in (0u32..).zip(ring) {
        match block {
            AlBlock::Damaged => damaged.push(position),
            AlBlock::Initialised => {}
            AlBlock::Nonsense => return Err(AlDamage::OutOfSequence { position }),
            // A transaction's number says where it belongs.
            AlBlock::Update(found) if found.number % ring_len == position => updates.push((position, found)),
            AlBlock::Update(_) => return Err(AlDamage::OutOfSequence { position }),
        }
    }
    // Numbers wrap: order them by their distance from any one of them.
    let Some(base) = updates.first().map(|(_, found)| found.number) else {
        // Only the very first transaction can have been torn, and it goes to position 0.
        return match damaged.iter().find(|position| **position != 0) {
            None => Ok(Vec::new()),
            Some(position) => Err(AlDamage::Corrupt { position: *position }),
        };
    };
    updates.sort_by_key(|(_, found)| found.number.wrapping_sub(base).cast_signed());
    for pair in updates.windows(2) {
        if let [(_, before), (position, after)] = pair
            && after.number != before.number.wrapping_add(1)
        {
            return Err(AlDamage::OutOfSequence { position: *position });
        }
    }
    let newest = updates.last().map_or(base, |(_, found)| found.number);
    let next_position = newest.wrapping_add(1) % ring_len;
    if let Some(position) = damaged.iter().find(|position| **position != next_position) {
        return Err(AlDamage::Corrupt { position: *position });
    }
    if updates.len() + damaged.len() == ring.len() {
        // The ring went round: the table before the oldest block is unknown, the windows must show it all.
        check_coverage(updates.iter().map(|(_, found)| *found))?;
    }
    let mut table = vec![FREE; usize::from(MAX_SLOTS)];
    for (_, found) in &updates {
        apply(found, &mut table);
    }
    let hot: BTreeSet<u32> = table.into_iter().filter(|extent| *extent != FREE).collect();
    Ok(hot.into_iter().collect())
}

fn apply(found: &AlTransaction, table: &mut [u32]) {
    for (index, extent) in found.context.iter().enumerate() {
        let slot = usize::from(found.context_start_slot) + index;
        if *extent == FREE && slot >= usize::from(found.context_size) {
            continue;
        }
        if let Some(held) = table.get_mut(slot) {
            *held = *extent;
        }
    }
    for (slot, extent) in &found.updates {
        if let Some(held) = table.get_mut(usize::from(*slot)) {
            *held = *extent;
        }
    }
}

fn check_coverage<'a>(updates: impl DoubleEndedIterator<Item = &'a AlTransaction>) -> Result<(), AlDamage> {
    let mut shown = Vec::new();
    let mut slots = 0;
    for found in updates {
        slots = found.context_size;
        let start = u32::from(found.context_start_slot);
        // At most 919.
        shown.push((start, start + u32::try_from(found.context.len()).unwrap_or(0)));
        shown.extend(found.updates.iter().map(|(slot, _)| (u32::from(*slot), u32::from(*slot) + 1)));
    }
    shown.sort_unstable();
    let mut covered = 0;
    for (start, end) in shown {
        if start > covered {
            break;
        }
        covered = covered.max(end);
    }
    if covered < u32::from(slots) { Err(AlDamage::Incomplete { slots }) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::meta::MetaKind;
    use proptest::prelude::*;

    fn layout(stripes: u32, size: u32) -> Layout {
        Layout::for_device(MetaKind::Internal, 64 << 20, 0, stripes, size).unwrap()
    }

    /// A writer as the rule of DISK §7.5 demands: context before the change, a cursor that goes round.
    struct Writer {
        table: Vec<u32>,
        cursor: u16,
        number: u32,
        area: Vec<u8>,
        layout: Layout,
    }

    impl Writer {
        fn new(slots: u16, number: u32, layout: &Layout) -> Self {
            let area = initialised_block().repeat(layout.al_blocks() as usize);
            Self { table: vec![FREE; slots.into()], cursor: 0, number, area, layout: layout.clone() }
        }

        fn write(&mut self, updates: &[(u16, u32)]) -> usize {
            let slots = u16::try_from(self.table.len()).unwrap();
            let from = usize::from(self.cursor);
            let to = (from + MAX_CONTEXT).min(self.table.len());
            let transaction = AlTransaction {
                number: self.number,
                updates: updates.to_vec(),
                context_size: slots,
                context_start_slot: self.cursor,
                context: self.table[from..to].to_vec(),
            };
            for (slot, extent) in updates {
                self.table[usize::from(*slot)] = *extent;
            }
            self.cursor = if to == self.table.len() { 0 } else { u16::try_from(to).unwrap() };
            let at = self.layout.al_block_index(self.number) as usize * BLOCK_BYTES;
            self.area[at..at + BLOCK_BYTES].copy_from_slice(&transaction.encode().unwrap());
            self.number = self.number.wrapping_add(1);
            at
        }

        fn hot(&self) -> Vec<u32> {
            let set: BTreeSet<u32> = self.table.iter().copied().filter(|extent| *extent != FREE).collect();
            set.into_iter().collect()
        }

        fn replay(&self) -> Result<Vec<u32>, AlDamage> {
            replay(&self.area, &self.layout)
        }
    }

    #[test]
    fn check_values_of_the_checksum() {
        assert_eq!(checksum(b"123456789"), 0x58E3_FA20);
        assert_eq!(be32(&initialised_block(), 8), 0x709C_C651);
        assert_eq!(
            initialised_block()[..16],
            [0x69, 0xcb, 0x65, 0xa2, 0, 0, 0, 0, 0x70, 0x9c, 0xc6, 0x51, 0xff, 0xff, 0, 0]
        );
        let one = AlTransaction {
            number: 0,
            updates: vec![(0, 3)],
            context_size: 67,
            context_start_slot: 0,
            context: vec![],
        };
        assert_eq!(be32(&one.encode().unwrap(), 8), 0xF15E_D319);
        let two = AlTransaction {
            number: u32::MAX,
            updates: vec![(0, 4), (1, 7)],
            context_size: 1237,
            context_start_slot: 919,
            context: vec![5, 6],
        };
        assert_eq!(be32(&two.encode().unwrap(), 8), 0x4ED1_FA25);
    }

    #[test]
    fn the_replay_example_of_the_format_sheet() {
        let mut writer = Writer::new(67, 0xFFFF_FFFD, &layout(1, 8));
        for update in [(0, 3), (1, 5), (2, 9), (0, 4), (3, 15), (1, 7)] {
            writer.write(&[update]);
        }
        assert_eq!(writer.replay(), Ok(vec![4, 7, 9, 15]));
    }

    #[test]
    fn a_fresh_ring_and_a_torn_first_block_hold_nothing() {
        let mut writer = Writer::new(67, 0, &layout(1, 8));
        assert_eq!(writer.replay(), Ok(vec![]));
        let at = writer.write(&[(0, 3)]);
        writer.area[at + 100] ^= 1;
        assert_eq!(writer.replay(), Ok(vec![]));
    }

    #[test]
    fn damage_that_no_crash_explains_is_not_guessed_around() {
        let mut writer = Writer::new(67, 0, &layout(1, 8));
        writer.area[2 * BLOCK_BYTES] = 0;
        assert_eq!(writer.replay(), Err(AlDamage::Corrupt { position: 2 }));
        let mut writer = Writer::new(67, 0, &layout(1, 8));
        let first = writer.write(&[(0, 3)]);
        writer.write(&[(1, 4)]);
        writer.area[first + 8] ^= 1;
        assert_eq!(writer.replay(), Err(AlDamage::Corrupt { position: 0 }));
        writer.area.fill(0);
        assert_eq!(writer.replay(), Err(AlDamage::NoValidBlock));
        put(&mut writer.area, 0, &MAGIC_AL_83.to_be_bytes());
        assert_eq!(writer.replay(), Err(AlDamage::Legacy83));
        put(&mut writer.area, 0, &MAGIC_AL_PMEM.to_be_bytes());
        assert_eq!(writer.replay(), Err(AlDamage::PersistentMemory));
        writer.area.truncate(100);
        assert_eq!(writer.replay(), Err(AlDamage::Unreadable));
    }

    #[test]
    fn a_stale_block_of_another_life_is_noticed() {
        let mut writer = Writer::new(67, 0, &layout(1, 8));
        writer.write(&[(0, 3)]);
        writer.number = 801;
        writer.write(&[(0, 9)]);
        assert_eq!(writer.replay(), Err(AlDamage::OutOfSequence { position: 1 }));
    }

    #[test]
    fn a_full_ring_that_cannot_show_its_table_is_noticed() {
        let mut writer = Writer::new(9000, 0, &layout(1, 8));
        for round in 0..9 {
            writer.write(&[(round, 3)]);
        }
        assert_eq!(writer.replay(), Err(AlDamage::Incomplete { slots: 9000 }));
    }

    #[test]
    fn too_many_updates_are_refused() {
        let mut big = AlTransaction {
            number: 0,
            updates: vec![(0, 0); 65],
            context_size: 67,
            context_start_slot: 0,
            context: vec![],
        };
        assert!(matches!(big.encode(), Err(MetaError::AlTransactionTooBig { updates: 65, .. })));
        big.updates.truncate(64);
        assert!(big.encode().is_ok());
    }

    prop_compose! {
        fn any_transaction()(
            number: u32, updates in proptest::collection::vec((0..MAX_SLOTS, any::<u32>()), 0..=MAX_UPDATES),
            context_size in 67u16..MAX_SLOTS, start: u16, fill in any::<u32>(),
        ) -> AlTransaction {
            let context_start_slot = start % context_size;
            let len = usize::from(context_size - context_start_slot).min(MAX_CONTEXT);
            let context = (0u32..).map(|index| fill.wrapping_mul(index)).take(len).collect();
            AlTransaction { number, updates, context_size, context_start_slot, context }
        }
    }

    proptest! {
        #[test]
        fn block_round_trip(transaction in any_transaction()) {
            prop_assert_eq!(decode_block(&transaction.encode().unwrap()), AlBlock::Update(transaction));
        }

        #[test]
        fn one_flipped_bit_is_noticed(transaction in any_transaction(), at in 0..BLOCK_BYTES, bit in 0u8..8) {
            let mut block = transaction.encode().unwrap();
            block[at] ^= 1 << bit;
            prop_assert_eq!(decode_block(&block), AlBlock::Damaged);
        }

        #[test]
        fn any_bytes_decode_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let mut block = [0; BLOCK_BYTES];
            put(&mut block, 0, &bytes);
            put(&mut block, 0, &MAGIC_AL.to_be_bytes());
            put(&mut block, 12, &[0, 0]);
            let sealed = seal(block);
            let nonsense = be16(&sealed, 14) > 64;
            prop_assert_eq!(decode_block(&sealed) == AlBlock::Nonsense, nonsense);
            let area = sealed.repeat(8);
            prop_assert!(replay(&area, &layout(1, 8)).is_err(), "eight equal numbers are out of sequence");
        }

        #[test]
        fn replay_equals_the_table_of_the_writer(
            stripes in 1u32..5, size in 8u32..10, slots in 67u16..3000, first: u32,
            rounds in proptest::collection::vec(proptest::collection::vec((any::<u16>(), 0u32..5000), 1..8), 0..40),
            torn: bool,
        ) {
            let mut writer = Writer::new(slots, first, &layout(stripes, size));
            for round in &rounds {
                let updates: Vec<_> = round.iter().map(|(slot, extent)| (slot % slots, *extent)).collect();
                writer.write(&updates);
            }
            let mut expected = writer.hot();
            // The torn block never let its write go: what counts is the table before it.
            if torn && (!rounds.is_empty() || first % writer.layout.al_blocks() == 0) {
                let at = writer.write(&[(0, 77)]);
                writer.area[at + 4000..at + BLOCK_BYTES].fill(0xA5);
            } else if torn {
                expected = vec![];
            }
            prop_assert_eq!(writer.replay(), Ok(expected));
        }
    }
}
