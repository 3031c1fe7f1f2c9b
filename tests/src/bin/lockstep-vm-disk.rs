//! Leaves a backing disk as a running node would have left it: after a clean stop, or after a crash as
//! Primary. And says what it finds on one. The kernel's DRBD then has to agree (`tests/vm/`).
//!
//! Works on internal metadata that `create-md` wrote before, through the library's own encoders only, so
//! that what the kernel accepts is what lockstep writes. Numbers of bits and extents count from 0: a bit
//! stands for 4 KiB, an extent for 4 MiB.
//!
//! ```text
//! lockstep-vm-disk clean   DISK CURRENT:BITMAP:YOUNGER:OLDER [BITS]
//! lockstep-vm-disk crashed DISK CURRENT:BITMAP:YOUNGER:OLDER [BITS [HOT-EXTENTS]]
//! lockstep-vm-disk show    DISK
//! ```
//! BITS and HOT-EXTENTS are like `5,7-20`, or `-` for none.
#![expect(clippy::print_stdout, reason = "a program whose output is its result")]

use lockstep_replicator::meta::{
    AlTransaction, BITMAP_PAGE_BITS, BITMAP_PAGE_BYTES, BLOCK_BYTES, Block, Layout, MAGIC_CLEAN,
    MAGIC_UNCLEAN, MetaKind, Superblock, al_ring, bitmap_area, flags,
};
use std::error::Error;
use std::fs::{File, OpenOptions};
use std::io::{Seek as _, SeekFrom};
use std::os::unix::fs::FileExt as _;
use std::process::ExitCode;

type Failure = Box<dyn Error>;

/// Slots of the activity log, as DRBD 8.4 has them when nothing else is configured.
const AL_SLOTS: u16 = 1237;

/// A disk whose metadata was found and makes sense.
struct Disk {
    file: File,
    layout: Layout,
    superblock: Superblock,
}

impl Disk {
    fn open(path: &str) -> Result<Self, Failure> {
        let mut file = OpenOptions::new().read(true).write(true).open(path)?;
        let bytes = file.seek(SeekFrom::End(0))?;
        let position = MetaKind::Internal.superblock_position(bytes)?;
        let mut block: Block = [0; BLOCK_BYTES];
        file.read_exact_at(&mut block, position)?;
        let superblock = Superblock::decode(&block, position)?;
        let layout = superblock.validate(MetaKind::Internal, bytes, bytes)?;
        Ok(Self { file, layout, superblock })
    }

    /// All words of the bitmap; what lies behind the disk's end is cleared.
    fn bitmap(&self) -> Result<Vec<u64>, Failure> {
        let mut bytes = vec![0; usize::try_from(self.layout.bitmap_bytes())?];
        self.file.read_exact_at(&mut bytes, self.layout.bitmap_byte())?;
        let mut words = vec![0; bytes.len() / 8];
        bitmap_area::bytes_to_words(&bytes, &mut words);
        bitmap_area::mask_beyond(&mut words, self.layout.bitmap_bits());
        Ok(words)
    }

    fn write_bitmap(&self, words: &[u64]) -> Result<(), Failure> {
        for (index, page) in (0u32..).zip(words.chunks(BITMAP_PAGE_BYTES / 8)) {
            let mut bytes = vec![0; page.len() * 8];
            bitmap_area::words_to_bytes(page, &mut bytes);
            bytes.truncate(self.layout.bitmap_page_len(index));
            self.file.write_all_at(&bytes, self.layout.bitmap_page_byte(index))?;
        }
        Ok(())
    }

    /// Writes the log of a node that made these extents hot one after the other.
    fn write_log(&self, hot_extents: &[u64]) -> Result<(), Failure> {
        for number in 0..self.layout.al_blocks() {
            self.file.write_all_at(&al_ring::initialised_block(), self.layout.al_block_byte(number))?;
        }
        let mut table = vec![al_ring::FREE; usize::from(AL_SLOTS)];
        let mut cursor = 0u16;
        for ((number, slot), extent) in (0u32..).zip(0u16..AL_SLOTS).zip(hot_extents) {
            let extent = u32::try_from(*extent)?;
            let window = table.iter().copied().skip(usize::from(cursor)).take(al_ring::MAX_CONTEXT);
            let transaction = AlTransaction {
                number,
                updates: vec![(slot, extent)],
                context_size: AL_SLOTS,
                context_start_slot: cursor,
                context: window.collect(),
            };
            self.file.write_all_at(&transaction.encode()?, self.layout.al_block_byte(number))?;
            if let Some(place) = table.get_mut(usize::from(slot)) {
                *place = extent;
            }
            cursor += u16::try_from(al_ring::MAX_CONTEXT)?;
            if cursor >= AL_SLOTS {
                cursor = 0;
            }
        }
        Ok(())
    }

    fn write_superblock(&self) -> Result<(), Failure> {
        self.file.write_all_at(&self.superblock.encode(), self.layout.superblock_byte())?;
        Ok(self.file.sync_all()?)
    }

    /// Extents that were hot, from the log as it is.
    fn hot_extents(&self) -> Result<Vec<u32>, Failure> {
        let mut area = vec![0; usize::try_from(self.layout.al_bytes())?];
        self.file.read_exact_at(&mut area, self.layout.al_byte())?;
        Ok(al_ring::replay(&area, &self.layout)?)
    }
}

/// The numbers in `5,7-20`, ascending as given; `-` is none.
fn numbers(text: Option<&String>, limit: u64) -> Result<Vec<u64>, Failure> {
    let mut found = Vec::new();
    let Some(text) = text.filter(|text| *text != "-") else { return Ok(found) };
    for range in text.split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (u64, u64) = (first.parse()?, last.parse()?);
        if first > last || last >= limit {
            return Err(format!("'{range}' is not within 0-{}", limit - 1).into());
        }
        found.extend(first..=last);
    }
    Ok(found)
}

/// The inverse of [`numbers`].
fn ranges(sorted: impl IntoIterator<Item = u64>) -> String {
    let mut found: Vec<(u64, u64)> = Vec::new();
    for number in sorted {
        match found.last_mut() {
            Some((_, last)) if *last + 1 == number => *last = number,
            _ => found.push((number, number)),
        }
    }
    if found.is_empty() {
        return "-".into();
    }
    let texts = found.iter().map(|(first, last)| match first == last {
        true => first.to_string(),
        false => format!("{first}-{last}"),
    });
    texts.collect::<Vec<_>>().join(",")
}

fn uuids(text: &str) -> Result<[u64; 4], Failure> {
    let parsed: Result<Vec<u64>, _> = text.split(':').map(|uuid| u64::from_str_radix(uuid, 16)).collect();
    parsed?.try_into().map_err(|_| "four UUIDs are wanted, as CURRENT:BITMAP:YOUNGER:OLDER".into())
}

/// What both kinds of end have in common, then what tells them apart.
fn leave(disk: &mut Disk, crashed: bool, args: &[String]) -> Result<(), Failure> {
    let bits = disk.layout.bitmap_bits();
    disk.superblock.uuid = uuids(args.first().ok_or("no UUIDs given")?)?;
    disk.superblock.la_size = disk.layout.capacity();
    disk.superblock.al_nr_extents = u32::from(AL_SLOTS);
    disk.superblock.flags = flags::CONSISTENT | flags::WAS_UP_TO_DATE;
    let mut hot_extents = Vec::new();
    if crashed {
        disk.superblock.magic = MAGIC_UNCLEAN;
        disk.superblock.flags |= flags::PRIMARY_IND;
        hot_extents = numbers(args.get(2), bits.div_ceil(1024))?;
    } else {
        disk.superblock.magic = MAGIC_CLEAN;
        disk.superblock.flags |= flags::AL_CLEAN;
    }
    let pages = bits.div_ceil(BITMAP_PAGE_BITS);
    let mut words = vec![0; usize::try_from(pages)? * BITMAP_PAGE_BYTES / 8];
    for bit in numbers(args.get(1), bits)? {
        bitmap_area::set_bits(&mut words, bit, 1);
    }
    disk.write_bitmap(&words)?;
    disk.write_log(&hot_extents)?;
    disk.write_superblock()
}

fn show(disk: &Disk) -> Result<(), Failure> {
    let [current, bitmap, younger, older] = disk.superblock.uuid;
    println!("uuids={current:016X}:{bitmap:016X}:{younger:016X}:{older:016X}");
    println!("flags={:#05x}", disk.superblock.flags);
    println!("clean={}", if disk.superblock.is_clean() { "yes" } else { "no" });
    println!("sectors={}", disk.layout.capacity().0);
    let words = disk.bitmap()?;
    let nr_bits: u64 = words.iter().map(|word| u64::from(word.count_ones())).sum();
    println!("out_of_sync_kib={}", nr_bits * 4);
    let set = (0u64..).zip(&words).flat_map(|(index, word)| {
        (0..64).filter(move |bit| *word >> bit & 1 == 1).map(move |bit| index * 64 + bit)
    });
    println!("bits={}", ranges(set));
    println!("hot={}", ranges(disk.hot_extents()?.into_iter().map(u64::from)));
    Ok(())
}

fn run(args: &[String]) -> Result<(), Failure> {
    match args {
        [verb, path] if verb == "show" => show(&Disk::open(path)?),
        [verb, path, rest @ ..] if verb == "clean" && rest.len() <= 2 => {
            leave(&mut Disk::open(path)?, false, rest)
        }
        [verb, path, rest @ ..] if verb == "crashed" && rest.len() <= 3 => {
            leave(&mut Disk::open(path)?, true, rest)
        }
        _ => Err("usage: lockstep-vm-disk clean|crashed DISK UUIDS [BITS [HOT-EXTENTS]] | show DISK".into()),
    }
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("lockstep-vm-disk: {failure}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_and_back() {
        let text = "0,5-7,9,1000-1023".to_owned();
        assert_eq!(ranges(numbers(Some(&text), 1024).unwrap()), text);
        assert_eq!(ranges(numbers(None, 10).unwrap()), "-");
        for bad in ["10", "7-5", "x", ""] {
            assert!(numbers(Some(&bad.to_owned()), 10).is_err(), "{bad}");
        }
    }

    #[test]
    fn uuids_are_four() {
        assert_eq!(uuids("A:0:1:ffffffffffffffff").unwrap(), [10, 0, 1, u64::MAX]);
        assert!(uuids("1:2:3").is_err());
    }
}
