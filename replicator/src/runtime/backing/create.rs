//! Creating metadata, and refusing to where it would destroy something.
//!
//! In use is final. Everything else an operator may override: with `--force`, or by typing "yes" when
//! asked. The words are those of drbdmeta, which scripts and people know.
use super::device::{Access, Device, DeviceError};
use super::io;
use crate::meta::signature::{Signature, detect, drbd_version};
use crate::meta::{BLOCK_BYTES, Layout, MetaError, MetaKind, Superblock};
use crate::units::SECTOR_BYTES;
use std::path::Path;
use thiserror::Error;

/// What to create.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// Activity-log stripes.
    pub al_stripes: u32,
    /// Blocks of 4 KiB in a stripe.
    pub al_stripe_size_4k: u32,
    /// `la_peer_max_bio_size`, bytes.
    pub peer_max_bio_size: u32,
    /// Overwrite whatever is there.
    pub force: bool,
}

impl Default for CreateOptions {
    fn default() -> Self {
        Self {
            al_stripes: crate::meta::layout::DEFAULT_AL_STRIPES,
            al_stripe_size_4k: crate::meta::layout::DEFAULT_AL_STRIPE_SIZE_4K,
            peer_max_bio_size: 0,
            force: false,
        }
    }
}

/// The person or program behind the command.
pub trait Operator {
    /// A line or paragraph to read.
    fn say(&mut self, text: &str);
    /// A question that only "yes" answers. Not asked under `--force`.
    fn confirm(&mut self, question: &str) -> bool;
    /// How much of the bitmap is zeroed, bytes.
    fn progress(&mut self, done: u64, total: u64);
}

/// Why nothing was created.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CreateError {
    /// The device cannot be used.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The metadata does not fit.
    #[error(transparent)]
    Meta(#[from] MetaError),
    /// Internal metadata would cut off the end of what is there.
    #[error(
        "found {found}: internal metadata would cut off its end; use external metadata, shrink it, or force"
    )]
    WouldTruncate {
        /// What.
        found: Signature,
    },
    /// Something is there, and nobody said "yes".
    #[error("operation cancelled: {found}")]
    Cancelled {
        /// What is there.
        found: String,
    },
}

/// Creates metadata on `path`, the metadata device (for internal metadata the data device).
/// `data_bytes` is the size of the data device of external metadata, if known; it limits what must be zeroed.
///
/// # Errors
/// See [`CreateError`]; nothing was written then, except after an IO error.
pub fn create(
    path: &Path,
    kind: MetaKind,
    data_bytes: Option<u64>,
    options: &CreateOptions,
    operator: &mut dyn Operator,
) -> Result<Layout, CreateError> {
    let indexed = matches!(kind, MetaKind::Indexed(_));
    let access = if indexed { Access::ExclusiveInProcess } else { Access::Exclusive };
    let device = Device::open(path, access)?;
    if let Some(note) = &device.note {
        operator.say(note);
    }
    let odd = device.bytes % SECTOR_BYTES;
    if odd != 0 {
        operator.say(&format!(
            "{} has {} bytes, no multiple of 512: the last {odd} bytes stay unused.",
            path.display(),
            device.bytes
        ));
    }
    let data_size = match kind {
        MetaKind::Internal => device.bytes,
        MetaKind::FlexExternal | MetaKind::Indexed(_) => data_bytes.unwrap_or(u64::MAX),
    };
    let layout =
        Layout::for_device(kind, data_size, device.bytes, options.al_stripes, options.al_stripe_size_4k)?;
    check_existing(&device, &layout, options.force, operator)?;

    let mut superblock = Superblock::created(&layout);
    superblock.la_peer_max_bio_size = options.peer_max_bio_size;
    // From here on the old content is gone; a crash in between must not leave a superblock that vouches for it.
    io::write_bytes(&device.file, layout.superblock_byte(), &[0; BLOCK_BYTES])
        .map_err(device.failed("write the superblock of"))?;
    let start = layout.bitmap_byte();
    let bytes = layout.bitmap_bytes();
    operator.say(&format!("initializing bitmap ({} KB) to all zero", bytes >> 10));
    io::zero_range(&device, start..start + bytes, &mut |done, total| operator.progress(done, total))?;
    operator.say("initializing activity log");
    io::write_initial_al(&device.file, &layout).map_err(device.failed("write the activity log of"))?;
    device.file.sync_data().map_err(device.failed("flush"))?;
    operator.say("Writing meta data...");
    io::write_bytes(&device.file, layout.superblock_byte(), &superblock.encode())
        .map_err(device.failed("write the superblock of"))?;
    // The size of a regular file may have to become stable too.
    device.file.sync_all().map_err(device.failed("flush"))?;
    Ok(layout)
}

/// Says what is on the place and asks whether to go on.
fn check_existing(
    device: &Device,
    layout: &Layout,
    force: bool,
    operator: &mut dyn Operator,
) -> Result<(), CreateError> {
    let block = io::read_block(&device.file, layout.superblock_byte())
        .map_err(device.failed("read the metadata place of"))?;
    if let Some(version) = drbd_version(&block) {
        operator.say(&format!(
            "You want me to create a v08 style {} meta data block.\nThere appears to be a {version} {} meta data \
             block\nalready in place on {} at byte offset {}\n",
            style(layout.kind()),
            style(layout.kind()),
            device.path.display(),
            layout.superblock_byte(),
        ));
        let found = format!("there is {version} metadata already");
        return ask(force, operator, "Do you really want to overwrite the existing meta-data?", found);
    }
    let mut read = |at: u64, place: &mut [u8]| io::read_bytes(&device.file, at, place).is_ok();
    let mut found = detect(&mut read, 0, device.bytes);
    if layout.superblock_byte() != 0 && layout.kind() != MetaKind::Internal {
        found.extend(detect(&mut read, layout.superblock_byte(), device.bytes - layout.superblock_byte()));
    }
    let elsewhere = [MetaKind::Internal, MetaKind::FlexExternal].into_iter().find_map(|kind| {
        let at = kind.superblock_position(device.bytes).ok().filter(|at| *at != layout.superblock_byte())?;
        let block = io::read_block(&device.file, at).ok()?;
        // The slots of an indexed device are each other's neighbours.
        let neighbour = matches!(layout.kind(), MetaKind::Indexed(_))
            && Superblock::decode(&block, at).is_ok_and(|found| found.md_size_sect == layout.md_size_sect());
        if neighbour { None } else { Some((drbd_version(&block)?, kind)) }
    });
    let usable_kib = layout.area().start >> 10;
    for signature in &found {
        operator.say(&format!(
            "md_offset {}\nal_offset {}\nbm_offset {}\n",
            layout.superblock_byte(),
            layout.al_byte(),
            layout.bitmap_byte()
        ));
        operator.say(&format!("Found {signature}"));
        if let Some(used) = signature.used_bytes {
            operator.say(&format!("    {:8} kB data area apparently used", used >> 10));
        }
        if layout.kind() == MetaKind::Internal {
            operator.say(&format!("    {usable_kib:8} kB left usable by current configuration\n"));
        }
    }
    if let Some(first) = found.first() {
        let fits =
            |signature: &Signature| signature.used_bytes.is_some_and(|used| used <= layout.area().start);
        if layout.kind() == MetaKind::Internal && found.iter().all(fits) {
            operator.say(
                "Even though it looks like this would place the new meta data into\nunused space, you still need to \
                 confirm, as this is only a guess.",
            );
        } else if layout.kind() == MetaKind::Internal && !force {
            operator.say(
                "Device size would be truncated, which\nwould corrupt data and result in\n'access beyond end of \
                 device' errors.\nYou need to either\n   * use external meta data (recommended)\n   * shrink that \
                 filesystem first\n   * zero out the device (destroy the filesystem)\n   * or force it, and lose the content\n\
                 Operation refused.\n",
            );
            return Err(CreateError::WouldTruncate { found: first.clone() });
        } else {
            operator.say(" ==> This might destroy existing data! <==");
        }
        return ask(force, operator, "Do you want to proceed?", format!("found {first}"));
    }
    if let Some((version, kind)) = elsewhere {
        operator.say(&format!("Found {version} {} meta data on the same device.", style(kind)));
        return ask(
            force,
            operator,
            "Do you want to proceed?",
            format!("there is {version} metadata for another placement"),
        );
    }
    if !is_blank(device, layout) {
        operator.say("Found some data\n\n ==> This might destroy existing data! <==");
        return ask(
            force,
            operator,
            "Do you want to proceed?",
            "found some data where the metadata would go".into(),
        );
    }
    Ok(())
}

/// Whether the places of superblock, activity log and the first bitmap page hold only zeroes.
fn is_blank(device: &Device, layout: &Layout) -> bool {
    let log = (0..u64::from(layout.al_blocks())).map(|block| layout.al_byte() + block * BLOCK_BYTES as u64);
    let mut places = log.chain([layout.superblock_byte(), layout.bitmap_byte()]);
    places.all(|at| match io::read_block(&device.file, at) {
        Ok(block) => block == [0; BLOCK_BYTES],
        // The only bitmap page of a very small area may end before it is full.
        Err(_) => at == layout.bitmap_byte(),
    })
}

fn ask(force: bool, operator: &mut dyn Operator, question: &str, found: String) -> Result<(), CreateError> {
    if force || operator.confirm(question) { Ok(()) } else { Err(CreateError::Cancelled { found }) }
}

fn style(kind: MetaKind) -> &'static str {
    match kind {
        MetaKind::Internal => "flexible-size internal",
        MetaKind::FlexExternal => "flexible-size external",
        MetaKind::Indexed(_) => "fixed-size external",
    }
}
