//! Backing disks as the daemon opens them: claims, refusals, and what the core is given.
#![cfg(feature = "runtime")]
#![expect(clippy::print_stdout, reason = "a skipped test says so")]
#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test by panicking")]
use lockstep_replicator::meta::{BitmapPage, Layout, MetaError, MetaKind, Superblock};
use lockstep_replicator::runtime::backing::create::{CreateError, CreateOptions, Operator, create};
use lockstep_replicator::runtime::backing::device::DeviceError;
use lockstep_replicator::runtime::backing::{AttachError, Backing, MetaDisk};
use lockstep_replicator::units::SectorCount;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const MIB: u64 = 1 << 20;

/// Answers every question the same way and remembers what was said.
struct Answer(bool, String);
impl Operator for Answer {
    fn say(&mut self, text: &str) {
        self.1.push_str(text);
        self.1.push('\n');
    }
    fn confirm(&mut self, question: &str) -> bool {
        self.say(question);
        self.0
    }
    fn progress(&mut self, _done: u64, _total: u64) {}
}

fn make(path: &Path, kind: MetaKind, yes: bool, force: bool) -> (Result<Layout, CreateError>, String) {
    let mut operator = Answer(yes, String::new());
    let options = CreateOptions { force, ..CreateOptions::default() };
    let made = create(path, kind, None, &options, &mut operator);
    (made, operator.1)
}

fn sparse(dir: &tempfile::TempDir, name: &str, bytes: u64) -> PathBuf {
    let path = dir.path().join(name);
    File::create(&path).unwrap().set_len(bytes).unwrap();
    path
}

fn put(path: &Path, at: u64, bytes: &[u8]) {
    File::options().write(true).open(path).unwrap().write_all_at(bytes, at).unwrap();
}

#[test]
fn a_second_opener_is_refused_until_the_first_lets_go() {
    let dir = tempfile::tempdir().unwrap();
    let disk = sparse(&dir, "disk", 64 * MIB);
    make(&disk, MetaKind::Internal, false, false).0.unwrap();
    let (backing, attached) = Backing::open(&disk, &MetaDisk::Internal).unwrap();
    assert_eq!(attached.capacity, SectorCount(130_992));
    assert_eq!(attached.bitmap, vec![0; 256]);
    let second = Backing::open(&disk, &MetaDisk::Internal).unwrap_err();
    assert!(matches!(second, AttachError::Data(DeviceError::InUse { .. })), "{second}");
    assert_eq!(second.number(), 114);
    assert!(matches!(
        make(&disk, MetaKind::Internal, true, true).0,
        Err(CreateError::Device(DeviceError::InUse { .. }))
    ));
    let parts = backing.into_parts();
    assert!(Backing::open(&disk, &MetaDisk::Internal).is_err(), "the descriptors carry the claim");
    drop(parts);
    assert!(Backing::open(&disk, &MetaDisk::Internal).is_ok());
}

#[test]
fn volumes_of_one_process_share_an_indexed_device() {
    let dir = tempfile::tempdir().unwrap();
    let meta = sparse(&dir, "meta", 256 * MIB);
    let disks = [sparse(&dir, "one", 64 * MIB), sparse(&dir, "two", 64 * MIB)];
    let mut held = Vec::new();
    for (index, disk) in (0u8..).zip(&disks) {
        make(&meta, MetaKind::Indexed(index), false, false).0.unwrap();
        let (backing, attached) = Backing::open(disk, &MetaDisk::Indexed(meta.clone(), index)).unwrap();
        assert_eq!(attached.capacity, SectorCount(131_072), "external metadata leaves the whole disk");
        held.push(backing.into_parts());
    }
    held.remove(0);
    assert!(
        Backing::open(&disks[0], &MetaDisk::Flexible(meta.clone())).is_err(),
        "the second still holds it"
    );
    held.clear();
    // Slot 0 is also a flexible area that is shorter than its device.
    let (backing, _) = Backing::open(&disks[0], &MetaDisk::Flexible(meta.clone())).unwrap();
    assert!(Backing::open(&disks[1], &MetaDisk::Indexed(meta, 1)).is_err(), "claimed for one volume alone");
    drop(backing);
}

#[test]
fn what_was_written_is_read_back() {
    let dir = tempfile::tempdir().unwrap();
    let (disk, meta) = (sparse(&dir, "disk", 300 * MIB), sparse(&dir, "meta", MIB + 512));
    make(&meta, MetaKind::FlexExternal, false, false).0.unwrap();
    let place = MetaDisk::Flexible(meta.clone());
    let (backing, attached) = Backing::open(&disk, &place).unwrap();
    assert!(attached.discard, "files can be punched");
    let mut page = BitmapPage { index: 2, words: Box::new([0; 512]) };
    page.words[7] = 0xF0;
    backing.write_bitmap_pages(&[page]).unwrap();
    let mut changed: Superblock = attached.superblock.clone();
    changed.uuid[0] = 42;
    backing.write_superblock(&changed).unwrap();
    backing.init_al().unwrap();
    backing.flush().unwrap();
    drop(backing);
    let (_, again) = Backing::open(&disk, &place).unwrap();
    assert_eq!(again.superblock, changed);
    assert_eq!(again.bitmap.len(), 1200);
    assert_eq!(again.bitmap[1031], 0xF0);
    // Bits behind the end of the disk mean nothing.
    put(&meta, 36864, &[0xFF; 12288]);
    let (_, masked) = Backing::open(&disk, &place).unwrap();
    assert_eq!(masked.bitmap.iter().map(|word| u64::from(word.count_ones())).sum::<u64>(), 300 * MIB / 4096);
    let same = Backing::open(&meta, &place).unwrap_err();
    assert!(matches!(same, AttachError::SameDevice(_)));
}

#[test]
fn disks_without_valid_metadata_are_refused_with_a_number() {
    let dir = tempfile::tempdir().unwrap();
    let disk = sparse(&dir, "disk", 64 * MIB);
    let number = |path: &Path| Backing::open(path, &MetaDisk::Internal).unwrap_err().number();
    assert_eq!(number(&disk), 119);
    assert_eq!(number(&dir.path().join("nowhere")), 104);
    assert_eq!(number(dir.path()), 107);
    assert_eq!(number(&sparse(&dir, "small", 4096)), 112);
    make(&disk, MetaKind::Internal, false, false).0.unwrap();
    put(&disk, 64 * MIB - 4096 + 0x3c, &[0x83, 0x74, 0x02, 0x6d]);
    let found = Backing::open(&disk, &MetaDisk::Internal).unwrap_err();
    assert!(found.to_string().contains("DRBD 9 metadata (v09)"), "{found}");
}

#[test]
fn create_protects_what_is_there() {
    let dir = tempfile::tempdir().unwrap();
    // An ext superblock that claims the whole device, then one that leaves room.
    let disk = sparse(&dir, "disk", 64 * MIB);
    put(&disk, 1024 + 56, &[0x53, 0xEF]);
    put(&disk, 1024 + 24, &[2]);
    put(&disk, 1024 + 4, &16384u32.to_le_bytes());
    let (refused, said) = make(&disk, MetaKind::Internal, true, false);
    assert!(matches!(refused, Err(CreateError::WouldTruncate { .. })), "yes is not enough");
    assert!(
        said.contains("Found ext2 filesystem") && said.contains("65536 kB data area apparently used"),
        "{said}"
    );
    put(&disk, 1024 + 4, &4096u32.to_le_bytes());
    assert!(matches!(make(&disk, MetaKind::Internal, false, false).0, Err(CreateError::Cancelled { .. })));
    assert!(Backing::open(&disk, &MetaDisk::Internal).is_err(), "nothing was written");
    assert!(make(&disk, MetaKind::Internal, true, false).0.is_ok());
    let (again, said) = make(&disk, MetaKind::Internal, false, false);
    assert!(matches!(again, Err(CreateError::Cancelled { .. })));
    assert!(said.contains("already in place on"), "{said}");
    assert!(make(&disk, MetaKind::Internal, false, true).0.is_ok());
    // Metadata for another placement, and unknown data where the metadata would go.
    let meta = sparse(&dir, "meta", 64 * MIB);
    make(&meta, MetaKind::FlexExternal, false, false).0.unwrap();
    assert!(matches!(make(&meta, MetaKind::Internal, false, false).0, Err(CreateError::Cancelled { .. })));
    let data = sparse(&dir, "data", 64 * MIB);
    put(&data, 64 * MIB - 4096 - 20, b"something");
    let (refused, said) = make(&data, MetaKind::Internal, false, false);
    assert!(matches!(refused, Err(CreateError::Cancelled { .. })));
    assert!(said.contains("Found some data"), "{said}");
}

#[test]
fn odd_and_small_sizes() {
    let dir = tempfile::tempdir().unwrap();
    let odd = sparse(&dir, "odd", 64 * MIB + 700);
    let (made, said) = make(&odd, MetaKind::Internal, false, false);
    assert_eq!(made.unwrap().superblock_byte(), 0x3FF_F000);
    assert!(said.contains("no multiple of 512: the last 188 bytes stay unused"), "{said}");
    assert!(Backing::open(&odd, &MetaDisk::Internal).is_ok());
    let small = sparse(&dir, "small", (68 << 10) - 1);
    let refused = make(&small, MetaKind::Internal, true, true).0;
    assert!(matches!(refused, Err(CreateError::Meta(MetaError::TooSmall { needed: 69632, .. }))));
}

/// A loop device on `file`, detached when dropped; `None` with a reason where there are none.
struct Loop(PathBuf);
impl Loop {
    fn on(file: &Path) -> Option<Self> {
        let output = std::process::Command::new("losetup").args(["-f", "--show"]).arg(file).output();
        match output {
            Ok(output) if output.status.success() => {
                Some(Self(String::from_utf8(output.stdout).unwrap().trim_end().into()))
            }
            _ => {
                println!("skipped: cannot set up a loop device (not root?)");
                None
            }
        }
    }
}
impl Drop for Loop {
    fn drop(&mut self) {
        drop(std::process::Command::new("losetup").arg("-d").arg(&self.0).status());
    }
}

#[test]
fn a_block_device_is_claimed_and_created_on() {
    let dir = tempfile::tempdir().unwrap();
    let file = sparse(&dir, "file", 64 * MIB);
    let Some(device) = Loop::on(&file) else { return };
    make(&device.0, MetaKind::Internal, false, false).0.unwrap();
    let under = make(&file, MetaKind::Internal, true, true).0.unwrap_err();
    assert!(under.to_string().contains("loop device /dev/loop"), "{under}");
    let (backing, attached) = Backing::open(&device.0, &MetaDisk::Internal).unwrap();
    assert!(backing.is_block() && backing.logical_block_bytes() >= 512);
    assert_eq!(attached.capacity, SectorCount(130_992));
    let mut changed = attached.superblock.clone();
    changed.uuid[0] = 6;
    backing.write_superblock(&changed).unwrap();
    let second = Backing::open(&device.0, &MetaDisk::Internal).unwrap_err();
    assert_eq!(second.number(), 114, "{second}");
    drop(backing);
    assert_eq!(Backing::open(&device.0, &MetaDisk::Internal).unwrap().1.superblock, changed);
}

#[test]
fn real_filesystems_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let mut seen = 0;
    for (program, args, name) in [
        ("mke2fs", &["-q", "-F", "-t", "ext4"][..], "ext4 filesystem"),
        ("mke2fs", &["-q", "-F", "-t", "ext3"], "ext3 filesystem"),
        ("mkfs.xfs", &["-q", "-f"], "xfs filesystem"),
        ("mkfs.btrfs", &["-q", "-f"], "btrfs filesystem"),
        ("mkfs.vfat", &[], "FAT filesystem"),
        ("mkswap", &[], "swap space"),
    ] {
        let disk = sparse(&dir, name, 512 * MIB);
        let made = std::process::Command::new(program).args(args).arg(&disk).output();
        if !made.is_ok_and(|output| output.status.success()) {
            println!("skipped: {program} is not installed or refused");
            continue;
        }
        let (refused, said) = make(&disk, MetaKind::Internal, true, false);
        assert!(matches!(refused, Err(CreateError::WouldTruncate { .. })), "{name}: {refused:?}");
        assert!(said.contains(&format!("Found {name}")), "{said}");
        seen += 1;
    }
    println!("{seen} kinds of filesystem made and recognised");
}
