//! Internal metadata of a device that grew: it lies where the device ended before (DISK §11).
//!
//! A note per minor keeps the size a device had when its metadata was last found or moved, in the file
//! and form of DRBD's tools: `drbd-minor-N.lkbd`, `<bytes>\t<device>\n`. With it the metadata is found
//! again, and moved to the new end before the disk is attached. The order of `move_to_end` is that of
//! the core's online resize: at every cut one of the two places is valid.
use super::area::{Area, AreaError};
use super::device::Device;
use super::io;
use crate::meta::{BLOCK_BYTES, Layout, MAGIC_UNCLEAN, MetaKind, Superblock, flags};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

/// The note of one backing device.
#[derive(Clone, Debug)]
pub struct KnownSize {
    file: PathBuf,
    device: PathBuf,
}

impl KnownSize {
    /// The note for this minor number and device.
    #[must_use]
    pub fn new(state_dir: &Path, minor: u32, device: &Path) -> Self {
        Self { file: state_dir.join(format!("drbd-minor-{minor}.lkbd")), device: device.into() }
    }

    /// The size noted down for this device, bytes.
    #[must_use]
    pub fn read(&self) -> Option<u64> {
        let text = std::fs::read_to_string(&self.file).ok()?;
        let (bytes, device) = text.lines().next()?.split_once('\t')?;
        if Path::new(device) == self.device { bytes.parse().ok() } else { None }
    }

    /// Notes a size down, durably: the old place of metadata is cleared behind it. Nothing depends on it until the
    /// device grows, so a failure is only told.
    pub fn write(&self, bytes: u64) {
        if self.read() == Some(bytes) {
            return;
        }
        let text = format!("{bytes}\t{}\n", self.device.display());
        let fresh = self.file.with_extension("lkbd.new");
        let written = self
            .file
            .parent()
            .map_or(Ok(()), std::fs::create_dir_all)
            .and_then(|()| write_durably(&fresh, text.as_bytes()))
            .and_then(|()| std::fs::rename(&fresh, &self.file))
            .and_then(|()| self.file.parent().map_or(Ok(()), |dir| File::open(dir)?.sync_all()));
        if let Err(error) = written {
            tracing::warn!(file = %self.file.display(), %error, "the size of the backing device is not noted down; grow it only together with a resize while it is attached");
        }
    }
}

fn write_durably(file: &Path, text: &[u8]) -> std::io::Result<()> {
    let mut file = File::create(file)?;
    file.write_all(text)?;
    file.sync_all()
}

/// Whether there is valid internal metadata where a device of `bytes` has it.
pub(super) fn is_at(device: &Device, bytes: u64) -> bool {
    let Ok(position) = MetaKind::Internal.superblock_position(bytes) else { return false };
    io::read_block(&device.file, position).is_ok_and(|block| {
        let found = Superblock::decode(&block, position);
        found.is_ok_and(|found| found.validate(MetaKind::Internal, bytes, bytes).is_ok())
    })
}

/// Moves the metadata of a device that had `known_bytes` before to its end; what the operator should
/// know of it.
///
/// # Errors
/// The activity log cannot be applied, or IO. The old place stays valid until the new one is.
pub(super) fn move_to_end(device: Device, known_bytes: u64) -> Result<(Device, String), AreaError> {
    let grown_bytes = device.bytes;
    let mut area = Area::on(Device { bytes: known_bytes, ..device }, MetaKind::Internal)?;
    // What the log says goes into the bitmap: the log itself does not move. If it cannot be read,
    // everything counts as changed.
    let everything = match area.apply_al() {
        Ok(_) => 0,
        Err(AreaError::Log(damage)) if !damage.is_foreign_format() => flags::FULL_SYNC,
        Err(error) => return Err(error),
    };
    let (device, old, mut superblock) = area.into_parts();
    let new = Layout::for_device(
        MetaKind::Internal,
        grown_bytes,
        grown_bytes,
        old.al_stripes(),
        old.al_stripe_size_4k(),
    )?;
    let failed = || device.failed("move the metadata of");
    let flush = || device.file.sync_data().map_err(failed());
    let mut bitmap = vec![0; usize::try_from(old.bitmap_bytes()).unwrap_or(usize::MAX)];
    io::read_bytes(&device.file, old.bitmap_byte(), &mut bitmap).map_err(failed())?;
    bitmap.resize(usize::try_from(new.bitmap_bytes()).unwrap_or(usize::MAX), 0xff);
    let (vouched_flags, vouched_magic) = (superblock.flags | everything, superblock.magic);
    superblock.md_size_sect = new.md_size_sect();
    superblock.al_offset = new.al_offset();
    superblock.bm_offset = new.bm_offset();
    superblock.flags = (vouched_flags | flags::FULL_SYNC | flags::AL_DISABLED) & !flags::AL_CLEAN;
    superblock.magic = MAGIC_UNCLEAN;
    io::write_bytes(&device.file, new.superblock_byte(), &superblock.encode()).map_err(failed())?;
    flush()?;
    io::write_bytes(&device.file, new.bitmap_byte(), &bitmap).map_err(failed())?;
    io::write_initial_al(&device.file, &new).map_err(failed())?;
    flush()?;
    superblock.flags = vouched_flags;
    superblock.magic = vouched_magic;
    io::write_bytes(&device.file, new.superblock_byte(), &superblock.encode()).map_err(failed())?;
    flush()?;
    if let Some(place) = new.left_behind(&old) {
        io::write_bytes(&device.file, place, &[0; BLOCK_BYTES]).map_err(failed())?;
        flush()?;
    }
    let note = format!(
        "{}: grew from {known_bytes} to {grown_bytes} bytes; its metadata was moved to the new end",
        device.path.display()
    );
    Ok((Device { bytes: grown_bytes, ..device }, note))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::backing::create::{CreateOptions, Operator, create};
    use crate::runtime::backing::{AttachError, Backing, MetaDisk};
    use crate::units::SectorCount;
    use std::fs::File;

    const MIB: u64 = 1 << 20;

    struct Silent;

    impl Operator for Silent {
        fn say(&mut self, _text: &str) {}

        fn confirm(&mut self, _question: &str) -> bool {
            true
        }

        fn progress(&mut self, _done: u64, _total: u64) {}
    }

    #[test]
    fn metadata_of_a_device_that_grew_while_off_is_found_and_moved() {
        // Far away, next to the old place, over it.
        for grown in [200 * MIB, 16 * MIB + 4096, 16 * MIB + 20 * 4096] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("disk");
            File::create(&path).unwrap().set_len(16 * MIB).unwrap();
            let options = CreateOptions { force: true, ..CreateOptions::default() };
            create(&path, MetaKind::Internal, None, &options, &mut Silent).unwrap();
            let known = KnownSize::new(dir.path(), 0, &path);
            let (backing, mut attached) =
                Backing::open_known(&path, &MetaDisk::Internal, Some(known.clone())).unwrap();
            assert_eq!(known.read(), Some(16 * MIB));
            attached.superblock.la_size = SectorCount(10_000);
            attached.superblock.uuid[0] = 0x1234;
            backing.write_superblock(&attached.superblock).unwrap();
            let mut page = crate::meta::BitmapPage { index: 0, words: Box::new([0; 512]) };
            page.words[3] = 0x55;
            backing.write_bitmap_pages(&[page]).unwrap();
            drop(backing);
            File::options().write(true).open(&path).unwrap().set_len(grown).unwrap();
            let lost = Backing::open(&path, &MetaDisk::Internal).unwrap_err();
            assert!(matches!(lost, AttachError::Invalid { .. }), "{lost}");
            let (backing, moved) =
                Backing::open_known(&path, &MetaDisk::Internal, Some(known.clone())).unwrap();
            assert!(backing.notes().iter().any(|note| note.contains("moved")), "{:?}", backing.notes());
            assert_eq!(moved.superblock.la_size, SectorCount(10_000));
            assert_eq!(moved.superblock.uuid, attached.superblock.uuid);
            assert_eq!(moved.superblock.flags & flags::FULL_SYNC, 0);
            assert!(moved.capacity > attached.capacity || grown < 17 * MIB);
            assert_eq!((moved.bitmap[2], moved.bitmap[3]), (0, 0x55));
            drop(backing);
            // From now on it is where it belongs, also without the note.
            Backing::open(&path, &MetaDisk::Internal).unwrap();
            assert_eq!(known.read(), Some(grown));
        }
    }

    #[test]
    fn the_note_is_for_one_device() {
        let dir = tempfile::tempdir().unwrap();
        let note = KnownSize::new(dir.path(), 3, Path::new("/dev/a"));
        assert_eq!(note.read(), None);
        note.write(4096);
        note.write(8192);
        assert_eq!(note.read(), Some(8192));
        assert_eq!(KnownSize::new(dir.path(), 3, Path::new("/dev/b")).read(), None);
    }
}
