//! Debian's own drbdmeta against ours: each must accept, byte for byte and word for word, what the other wrote.
#![cfg(feature = "runtime")]
#![expect(clippy::print_stdout, reason = "a skipped test says so")]
#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test by panicking")]
use lockstep_replicator::admin::drbdmeta::run_to;
use lockstep_replicator::meta::al_ring::initialised_block;
use lockstep_replicator::meta::{AlTransaction, Block, Layout, MAGIC_UNCLEAN, MetaKind, Superblock, flags};
use lockstep_replicator::runtime::backing::{Backing, MetaDisk};
use lockstep_replicator::units::SectorCount;
use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

const MIB: u64 = 1 << 20;
const TIB: u64 = 1 << 40;
const KINDS: [(MetaKind, &str); 3] = [
    (MetaKind::Internal, "internal"),
    (MetaKind::FlexExternal, "flex-external"),
    (MetaKind::Indexed(1), "1"),
];

/// drbdmeta keeps a note on the last device in a file of the machine.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn drbdmeta_missing() -> bool {
    let missing = Command::new("drbdmeta").arg("--help").output().is_err();
    if missing {
        println!("skipped: drbdmeta is not installed");
    }
    missing
}

/// Runs Debian's drbdmeta; returns exit code, standard output, standard error.
fn theirs(options: &[&str], path: &Path, place: &str, command: &[&str]) -> (i32, String, String) {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    // Its note would make it look for metadata to move.
    drop(fs::remove_file("/var/lib/drbd/drbd-minor--1.lkbd"));
    let output = Command::new("drbdmeta")
        .arg("--force")
        .args(options)
        .args(["-", "v08"])
        .arg(path)
        .arg(place)
        .args(command)
        .output()
        .unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

/// Runs our drbdmeta with the same arguments.
fn ours(options: &[&str], path: &Path, place: &str, command: &[&str]) -> (i32, String, String) {
    let mut args: Vec<OsString> = options.iter().chain(&["-", "v08"]).map(OsString::from).collect();
    args.push(path.into());
    args.extend([place].iter().chain(command).map(OsString::from));
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let code = run_to(&args, &mut out, &mut err);
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (code.into(), text(out), text(err))
}

/// A directory whose filesystem takes a sparse file of `bytes`; `None` with a printed reason if there is none.
fn scratch(bytes: u64) -> Option<tempfile::TempDir> {
    for parent in [std::env::temp_dir(), PathBuf::from("/dev/shm")] {
        let Ok(dir) = tempfile::tempdir_in(parent) else { continue };
        if File::create(dir.path().join("probe")).and_then(|file| file.set_len(bytes)).is_ok() {
            fs::remove_file(dir.path().join("probe")).unwrap();
            return Some(dir);
        }
    }
    println!("skipped: no filesystem here takes a sparse file of {bytes} bytes");
    None
}

fn sparse(dir: &Path, name: &str, bytes: u64) -> PathBuf {
    let path = dir.join(name);
    File::create(&path).unwrap().set_len(bytes).unwrap();
    path
}

fn layout_of(kind: MetaKind, bytes: u64, stripes: u32, size: u32) -> Layout {
    let data = if kind == MetaKind::Internal { bytes } else { u64::MAX };
    Layout::for_device(kind, data, bytes, stripes, size).unwrap()
}

fn read(path: &Path, at: u64, len: u64) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(len).unwrap()];
    File::open(path).unwrap().read_exact_at(&mut bytes, at).unwrap();
    bytes
}

fn superblock_of(path: &Path, layout: &Layout) -> Superblock {
    let block: Block = read(path, layout.superblock_byte(), 4096).try_into().unwrap();
    Superblock::decode(&block, layout.superblock_byte()).unwrap()
}

fn edit(path: &Path, layout: &Layout, change: impl FnOnce(&mut Superblock)) {
    let mut superblock = superblock_of(path, layout);
    change(&mut superblock);
    let file = File::options().write(true).open(path).unwrap();
    file.write_all_at(&superblock.encode(), layout.superblock_byte()).unwrap();
}

/// The text without the lines that name time, host and command, and with the flags drbdmeta 9.22 prints wrongly
/// made equal.
fn comparable(dump: &str) -> String {
    dump.lines()
        .skip(4)
        .map(|line| if line.trim_start().starts_with("flags 0x") { "    flags;" } else { line })
        .collect::<Vec<_>>()
        .join("\n")
}

fn same_metadata(one: &Path, two: &Path, layout: &Layout, bitmap_bytes: u64) {
    assert_eq!(
        read(one, layout.superblock_byte(), 4096),
        read(two, layout.superblock_byte(), 4096),
        "superblock"
    );
    assert_eq!(
        read(one, layout.al_byte(), layout.al_bytes()),
        read(two, layout.al_byte(), layout.al_bytes()),
        "log"
    );
    let at = layout.bitmap_byte();
    assert!(read(one, at, bitmap_bytes) == read(two, at, bitmap_bytes), "bitmap");
}

/// A sequence that is the same in every run.
struct Dice(u64);
impl Dice {
    fn roll(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % below
    }
}

fn random_bitmap(dice: &mut Dice, bytes: u64) -> Vec<u8> {
    let mut bitmap: Vec<u8> = Vec::new();
    while (bitmap.len() as u64) < bytes {
        let word = match dice.roll(5) {
            0 => u64::MAX,
            1 => 0x5555_5555_5555_5555,
            2 => dice.roll(1 << 30) << 20,
            _ => 0,
        };
        let count = [1, 2, 3, 4, 5, 7, 8, 9, 13, 64, 65, 130][usize::try_from(dice.roll(12)).unwrap()];
        bitmap.extend(word.to_le_bytes().repeat(count));
    }
    bitmap.truncate(usize::try_from(bytes).unwrap());
    bitmap
}

/// Fresh metadata made by both on equal devices: equal bytes, and each reads the other's.
fn compare_fresh(bytes: u64, kind: MetaKind, place: &str, options: &[&str], stripes: u32, size: u32) {
    let Some(dir) = scratch(bytes) else { return };
    let (mine, other) = (sparse(dir.path(), "mine", bytes), sparse(dir.path(), "other", bytes));
    let made = ours(options, &mine, place, &["create-md"]);
    assert_eq!(made.0, 0, "{bytes} {place}: {made:?}");
    assert!(made.1.ends_with("New drbd meta data block successfully created.\n"));
    assert_eq!(theirs(options, &other, place, &["create-md"]).0, 0);
    let layout = layout_of(kind, bytes, stripes, size);
    same_metadata(&mine, &other, &layout, layout.bitmap_bytes().min(64 * MIB));
    for (path, verb) in [(&mine, "ours"), (&other, "theirs")] {
        for command in [["dump-md"].as_slice(), &["apply-al"]] {
            let (code, text, error) = theirs(&[], path, place, command);
            assert_eq!(code, 0, "{bytes} {place} {verb}: {error}");
            let (code, same, error) = ours(&[], path, place, command);
            assert_eq!((code, error.as_str()), (0, ""), "{bytes} {place} {verb}");
            assert_eq!(comparable(&same), comparable(&text));
        }
        assert_eq!(ours(&[], path, place, &["get-gi"]).1, theirs_gi(path, place));
    }
    if !layout.bitmap_area_bytes().is_multiple_of(4096) {
        // drbdmeta rounds the bitmap of the largest size up beyond the device and stops in the middle of the dump.
        return;
    }
    // A dump of the largest size shows the whole bitmap.
    let capacity = layout.capacity();
    edit(&mine, &layout, |superblock| superblock.la_size = capacity);
    let (_, text, _) = theirs(&[], &mine, place, &["dump-md"]);
    assert_eq!(comparable(&ours(&[], &mine, place, &["dump-md"]).1), comparable(&text));
}

/// The identifiers as drbdmeta prints them.
fn theirs_gi(path: &Path, place: &str) -> String {
    let (_, text, error) = theirs(&[], path, place, &["get-gi"]);
    assert!(!text.is_empty(), "{error}");
    text
}

#[test]
fn fresh_metadata_is_the_same_on_all_sizes() {
    if drbdmeta_missing() {
        return;
    }
    for bytes in [68 << 10, 70_144, MIB, MIB + 1, 64 * MIB, 100 * MIB + 1536, 300 * MIB, 10 << 30, TIB] {
        compare_fresh(bytes, MetaKind::Internal, "internal", &[], 1, 8);
    }
    for bytes in [MIB, 8 * MIB, 64 * MIB + 512] {
        compare_fresh(bytes, MetaKind::FlexExternal, "flex-external", &[], 1, 8);
    }
    for (index, bytes) in [(0, 128 * MIB), (1, 300 * MIB), (7, 1 << 30)] {
        compare_fresh(bytes, MetaKind::Indexed(index), &index.to_string(), &[], 1, 8);
    }
}

#[test]
fn fresh_metadata_is_the_same_on_16_tib() {
    if !drbdmeta_missing() {
        compare_fresh(16 * TIB, MetaKind::Internal, "internal", &[], 1, 8);
    }
}

#[test]
fn striped_logs_are_the_same() {
    if drbdmeta_missing() {
        return;
    }
    for (kind, place) in [KINDS[0], KINDS[1]] {
        compare_fresh(64 * MIB, kind, place, &["--al-stripes", "4", "--al-stripe-size-kB", "32"], 4, 8);
        compare_fresh(64 * MIB, kind, place, &["--al-stripes", "3", "--al-stripe-size-kB", "64"], 3, 16);
    }
}

#[test]
fn random_bitmaps_dump_and_restore_both_ways() {
    if drbdmeta_missing() {
        return;
    }
    let mut dice = Dice(8);
    for (bytes, (kind, place)) in
        [(300 * MIB, KINDS[0]), (10 << 30, KINDS[0]), (64 * MIB, KINDS[1]), (300 * MIB, KINDS[2])]
    {
        let Some(dir) = scratch(bytes) else { return };
        let disk = sparse(dir.path(), "disk", bytes);
        assert_eq!(ours(&[], &disk, place, &["create-md"]).0, 0);
        let layout = layout_of(kind, bytes, 1, 8);
        let agreed = SectorCount(layout.capacity().0.min(20_970_808) - dice.roll(9));
        edit(&disk, &layout, |superblock| {
            superblock.la_size = agreed;
            superblock.uuid = [0x1234_5678_9ABC_DEF1, 0xA5A5, 0x77, u64::MAX];
            superblock.device_uuid = 99;
            superblock.la_peer_max_bio_size = 1 << 20;
            superblock.flags = flags::AL_CLEAN | flags::CONSISTENT | flags::WAS_UP_TO_DATE;
        });
        let used = layout.bitmap_bytes_for(agreed);
        let file = File::options().write(true).open(&disk).unwrap();
        file.write_all_at(&random_bitmap(&mut dice, used), layout.bitmap_byte()).unwrap();

        let (_, text, _) = theirs(&[], &disk, place, &["dump-md"]);
        let (code, mine, _) = ours(&[], &disk, place, &["dump-md"]);
        assert_eq!(code, 0);
        assert!(comparable(&mine) == comparable(&text), "dumps of {bytes} {place} differ");
        assert!(mine.contains("flags 0x00000091;"), "the flags are printed as they are");

        // Our text restored by both gives the disk we dumped.
        let dump = dir.path().join("dump.txt");
        fs::write(&dump, &mine).unwrap();
        let dump_name = dump.to_str().unwrap();
        let (by_us, by_them) = (sparse(dir.path(), "by-us", bytes), sparse(dir.path(), "by-them", bytes));
        let restored = ours(&[], &by_us, place, &["restore-md", dump_name]);
        assert_eq!(restored.0, 0, "{restored:?}");
        assert_eq!(theirs(&[], &by_them, place, &["create-md"]).0, 0);
        let restored = theirs(&[], &by_them, place, &["restore-md", dump_name]);
        assert_eq!(restored.0, 0, "{restored:?}");
        same_metadata(&by_us, &by_them, &layout, used);
        edit(&by_us, &layout, |superblock| {
            superblock.al_nr_extents = superblock_of(&disk, &layout).al_nr_extents;
        });
        same_metadata(&by_us, &disk, &layout, used);

        // Their text restored by us.
        fs::write(&dump, text).unwrap();
        assert_eq!(ours(&[], &by_us, place, &["verify-dump", dump_name]).0, 0);
        assert_eq!(ours(&["--force"], &by_us, place, &["restore-md", dump_name]).0, 0);
        assert!(read(&by_us, layout.bitmap_byte(), used) == read(&disk, layout.bitmap_byte(), used));
    }
}

/// Writes transactions as a node does.
fn write_log(
    path: &Path,
    layout: &Layout,
    dice: &mut Dice,
    slots: u16,
    first: u32,
    count: u64,
    extents: u64,
) {
    let file = File::options().write(true).open(path).unwrap();
    for block in 0..layout.al_blocks() {
        file.write_all_at(&initialised_block(), layout.al_byte() + u64::from(block) * 4096).unwrap();
    }
    let mut table = vec![u32::MAX; slots.into()];
    let (mut cursor, mut number) = (0usize, first);
    for _ in 0..count {
        let updates: Vec<(u16, u32)> = (0..=dice.roll(6))
            .map(|_| {
                (u16::try_from(dice.roll(slots.into())).unwrap(), u32::try_from(dice.roll(extents)).unwrap())
            })
            .collect();
        let end = (cursor + 919).min(table.len());
        let transaction = AlTransaction {
            number,
            updates: updates.clone(),
            context_size: slots,
            context_start_slot: u16::try_from(cursor).unwrap(),
            context: table[cursor..end].to_vec(),
        };
        file.write_all_at(&transaction.encode().unwrap(), layout.al_block_byte(number)).unwrap();
        for (slot, extent) in updates {
            table[usize::from(slot)] = extent;
        }
        cursor = if end == table.len() { 0 } else { end };
        number = number.wrapping_add(1);
    }
}

#[test]
fn both_apply_the_same_log() {
    if drbdmeta_missing() {
        return;
    }
    let mut dice = Dice(3);
    let cases = [
        (1, 8, 67, 0, 3),
        (1, 8, 67, u32::MAX - 2, 6),
        (1, 8, 1237, 5, 40),
        (1, 8, 6433, 100, 30),
        (4, 8, 1237, u32::MAX - 10, 20),
        (3, 16, 2000, 7, 100),
        (1, 8, 67, 0, 0),
    ];
    for (stripes, size, slots, first, count) in cases {
        for primary in [true, false] {
            let bytes = (3 << 30) + dice.roll(1000) * 4096;
            let dir = scratch(bytes).unwrap();
            let options =
                ["--al-stripes", &stripes.to_string(), "--al-stripe-size-kB", &(size * 4).to_string()];
            let (mine, other) = (sparse(dir.path(), "mine", bytes), sparse(dir.path(), "other", bytes));
            let layout = layout_of(MetaKind::Internal, bytes, stripes, size);
            let seed = dice.roll(1 << 30);
            for path in [&mine, &other] {
                assert_eq!(ours(&options, path, "internal", &["create-md"]).0, 0);
                write_log(path, &layout, &mut Dice(seed), slots, first, count, bytes >> 22);
                edit(path, &layout, |superblock| {
                    superblock.la_size = layout.capacity();
                    superblock.magic = MAGIC_UNCLEAN;
                    superblock.flags = flags::CONSISTENT | flags::WAS_UP_TO_DATE;
                    superblock.flags |= if primary { flags::PRIMARY_IND } else { 0 };
                });
            }
            let attached = Backing::open(&mine, &MetaDisk::Internal).unwrap().1;
            assert!(!attached.al_unusable);
            let applied = theirs(&[], &other, "internal", &["apply-al"]);
            assert_eq!(applied.0, 0, "{applied:?}");
            assert_eq!(ours(&[], &mine, "internal", &["apply-al"]).0, 0);
            same_metadata(&mine, &other, &layout, layout.bitmap_area_bytes());
            assert!(superblock_of(&mine, &layout).is_clean());

            // What attach reports as hot is what apply-al marked.
            let words = Backing::open(&other, &MetaDisk::Internal).unwrap().1.bitmap;
            let marked: Vec<u32> = (0u32..)
                .zip(words.chunks(16))
                .filter_map(|(extent, words)| words.iter().any(|word| *word != 0).then_some(extent))
                .collect();
            assert_eq!(marked, if primary { attached.hot_extents } else { vec![] });
        }
    }
}

#[test]
fn the_replay_example_of_the_format_sheet_on_a_disk() {
    let dir = scratch(64 * MIB).unwrap();
    let disk = sparse(dir.path(), "disk", 64 * MIB);
    assert_eq!(ours(&[], &disk, "internal", &["create-md"]).0, 0);
    let layout = layout_of(MetaKind::Internal, 64 * MIB, 1, 8);
    let file = File::options().write(true).open(&disk).unwrap();
    let mut table = vec![u32::MAX; 67];
    let mut number = 0xFFFF_FFFDu32;
    for (slot, extent) in [(0u16, 3), (1, 5), (2, 9), (0, 4), (3, 15), (1, 7)] {
        let transaction = AlTransaction {
            number,
            updates: vec![(slot, extent)],
            context_size: 67,
            context_start_slot: 0,
            context: table.clone(),
        };
        file.write_all_at(&transaction.encode().unwrap(), layout.al_block_byte(number)).unwrap();
        table[usize::from(slot)] = extent;
        number = number.wrapping_add(1);
    }
    drop(file);
    edit(&disk, &layout, |superblock| {
        (superblock.flags, superblock.magic, superblock.la_size) =
            (0x13, MAGIC_UNCLEAN, SectorCount(130_992));
    });
    assert_eq!(ours(&[], &disk, "internal", &["dump-md"]).0, 1, "unclean");
    assert_eq!(Backing::open(&disk, &MetaDisk::Internal).unwrap().1.hot_extents, [4, 7, 9, 15]);
    assert_eq!(ours(&[], &disk, "internal", &["apply-al"]).0, 0);
    assert!(ours(&[], &disk, "internal", &["dump-md"]).1.contains("# bits-set 4096;"));
    assert_eq!(superblock_of(&disk, &layout).flags, 0x93);

    // The same with an empty log area: nothing is known, and nobody may guess.
    File::options().write(true).open(&disk).unwrap().write_all_at(&[0; 32768], layout.al_byte()).unwrap();
    edit(&disk, &layout, |superblock| (superblock.flags, superblock.magic) = (0x13, MAGIC_UNCLEAN));
    assert!(Backing::open(&disk, &MetaDisk::Internal).unwrap().1.al_unusable);
    assert_eq!(ours(&[], &disk, "internal", &["apply-al"]).0, 1);
    edit(&disk, &layout, |superblock| superblock.flags = 0x11);
    assert!(!Backing::open(&disk, &MetaDisk::Internal).unwrap().1.al_unusable);
    assert_eq!(ours(&[], &disk, "internal", &["apply-al"]).0, 0);
}

#[test]
fn identifiers_and_states_are_told_in_the_same_words() {
    if drbdmeta_missing() {
        return;
    }
    let dir = scratch(64 * MIB).unwrap();
    let (mine, other) = (sparse(dir.path(), "mine", 64 * MIB), sparse(dir.path(), "other", 64 * MIB));
    let layout = layout_of(MetaKind::Internal, 64 * MIB, 1, 8);
    assert_eq!(ours(&[], &mine, "internal", &["create-md"]).0, 0);
    assert_eq!(theirs(&[], &other, "internal", &["create-md"]).0, 0);
    let mut steps: Vec<Vec<String>> = [
        &["outdate"][..],
        &["set-gi", "1234567890ABCDEE:00:00:00:1:1:1:1:0:0:1"],
        &["outdate"],
        &["invalidate"],
    ]
    .iter()
    .map(|words| words.iter().map(ToString::to_string).collect())
    .collect();
    for bits in 0..128u32 {
        let list: Vec<String> = (0..7).map(|bit| (bits >> bit & 1).to_string()).collect();
        steps.push(vec!["set-gi".into(), format!("{:X}::{bits:X}::{}", bits + 7, list.join(":"))]);
    }
    steps.push(vec!["set-gi".into(), ":::::2".into()]);
    for step in &steps {
        let step: Vec<&str> = step.iter().map(String::as_str).collect();
        let (code, _, error) = theirs(&[], &other, "internal", &step);
        assert_eq!(ours(&["--force"], &mine, "internal", &step).0, code, "{step:?}: {error}");
        for question in ["get-gi", "show-gi", "dstate"] {
            let answer = ours(&[], &mine, "internal", &[question]).1;
            assert_eq!(answer, theirs(&[], &other, "internal", &[question]).1, "{step:?} {question}");
        }
        same_metadata(&mine, &other, &layout, 4096);
    }
    for sectors in [1, 2047, 20_000, 20_001, 130_992] {
        for path in [&mine, &other] {
            edit(path, &layout, |superblock| superblock.la_size = SectorCount(sectors));
        }
        let answer = ours(&[], &mine, "internal", &["show-gi"]).1;
        assert_eq!(answer, theirs(&[], &other, "internal", &["show-gi"]).1);
    }
    for (code, args) in [
        (20, ["internal", "nothing"]),
        (20, ["inter", "dstate"]),
        (20, ["256", "dstate"]),
        (0, ["internal", "wipe-md"]),
        (0, ["internal", "wipe-md"]),
        (1, ["internal", "get-gi"]),
        (1, ["internal", "outdate"]),
        (1, ["internal", "apply-al"]),
    ] {
        assert_eq!(theirs(&[], &other, args[0], &args[1..]).0, code, "{args:?}");
        let answer = ours(&["--force"], &mine, args[0], &args[1..]);
        assert_eq!(answer.0, code, "{args:?} {answer:?}");
    }
}
