//! IO on one backing disk: data of the volume at its own offsets, metadata where the layout says.
//!
//! An IO of the core becomes a job that knows its next system call and what a result means; the call goes through the
//! ring, or, on a disk in memory (tmpfs), straight from the owner thread: such files refuse non-blocking IO, so the
//! ring would hand each one to a worker thread and pay two wake-ups for a copy of 4 KiB.
//!
//! Promises: a short transfer is continued; `fua` and metadata are stable when answered (`RWF_DSYNC`, or writes and
//! one `fdatasync`); a failed flush is an error and is never tried again; a discarded or zeroed range reads as zeroes,
//! by the best of punching a hole, zeroing a range, and writing zeroes.
use super::backing::Backing;
use super::backing::grown::KnownSize;
use super::buffers::{Account, BufferPool, BufferRef, MAX_BUFFER_BYTES};
use super::meta_job::MetaJob;
use super::ring::{FileSpan, Ring};
use crate::core::event::{DiskIo, DiskOk, DiskOp, IoError, IoId, MetaId};
use crate::meta::{Layout, MetaPlace};
use crate::units::VolumeNr;
use nix::errno::Errno;
use nix::libc;
use nix::sys::stat::fstat;
use nix::sys::statfs::{FsType, TMPFS_MAGIC, fstatfs};
use std::cell::{Cell, OnceCell, RefCell};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

/// Results that made no progress before an IO counts as failed.
pub(super) const MAX_IDLE_RESULTS: u8 = 100;
/// `RAMFS_MAGIC` of `statfs(2)`.
const RAMFS_MAGIC: FsType = FsType(0x8584_58f6);
/// Deallocate, keep the size.
const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
/// Zero without deallocating, keep the size.
const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;

/// An open backing disk.
#[derive(Debug)]
pub(super) struct Disk {
    volume: VolumeNr,
    data: Rc<OwnedFd>,
    meta: Rc<OwnedFd>,
    pub(super) layout: RefCell<Layout>,
    /// Where metadata belongs on the devices as they are now.
    measured: RefCell<Option<(Layout, u64)>>,
    /// How long the data device was, bytes, when the place of metadata was last measured and taken.
    placed_for: Cell<Option<u64>>,
    /// A superblock that was left behind.
    pub(super) left_behind: Cell<Option<u64>>,
    /// Where the size of the data device is noted down.
    known: Option<KnownSize>,
    data_inline: bool,
    meta_inline: bool,
    /// What the disk has not refused yet.
    can_punch: Cell<bool>,
    can_zero: Cell<bool>,
    /// A buffer of zeroes, once one was needed.
    zeroes: OnceCell<BufferRef>,
}

impl Disk {
    /// Takes over an opened backing disk.
    pub(super) fn new(volume: VolumeNr, mut backing: Backing) -> Self {
        let known = backing.take_known();
        let (data, meta, layout) = backing.into_parts();
        let data = Rc::new(data);
        let meta = meta.map_or_else(|| Rc::clone(&data), Rc::new);
        Self {
            volume,
            data_inline: is_in_memory(data.as_fd()),
            meta_inline: is_in_memory(meta.as_fd()),
            data,
            meta,
            layout: RefCell::new(layout),
            measured: RefCell::new(None),
            placed_for: Cell::new(None),
            left_behind: Cell::new(None),
            known,
            can_punch: Cell::new(true),
            can_zero: Cell::new(true),
            zeroes: OnceCell::new(),
        }
    }

    /// The data descriptor.
    pub(super) fn data_fd(&self) -> BorrowedFd<'_> {
        self.data.as_fd()
    }

    /// Looks at the size of the devices; `None` when they do not say, or are too small for metadata.
    pub(super) fn measure(&self) -> Option<MetaPlace> {
        let bytes = |fd: BorrowedFd<'_>| {
            let end = nix::unistd::lseek(fd, 0, nix::unistd::Whence::SeekEnd).ok()?;
            u64::try_from(end).ok()
        };
        let now = self.layout.borrow();
        let (data, meta) = (bytes(self.data.as_fd())?, bytes(self.meta.as_fd())?);
        let (stripes, blocks) = (now.al_stripes(), now.al_stripe_size_4k());
        let layout = Layout::for_device(now.kind(), data, meta, stripes, blocks).ok()?;
        let place = layout.place_for(&now);
        self.measured.replace(Some((layout, data)));
        Some(place)
    }

    /// The metadata is where it belongs on a device of the size it was measured with. The device may have grown again
    /// since: a note of that size would look for it where it is not.
    pub(super) fn note_size(&self) {
        if let (Some(known), Some(bytes)) = (&self.known, self.placed_for.get()) {
            known.write(bytes);
        }
    }

    /// From now on metadata goes where it was measured to belong.
    pub(super) fn relocate(&self) {
        if let Some((layout, bytes)) = self.measured.take() {
            self.placed_for.set(Some(bytes));
            let before = self.layout.replace(layout);
            self.left_behind.set(self.layout.borrow().left_behind(&before));
        }
    }

    fn zeroes(&self, pool: &BufferPool) -> Option<BufferRef> {
        if let Some(zeroes) = self.zeroes.get() {
            return Some(zeroes.clone());
        }
        let zeroes = pool.take(MAX_BUFFER_BYTES, Account::Meta)?;
        zeroes.fill_zero();
        Some(self.zeroes.get_or_init(|| zeroes).clone())
    }
}

/// Whether IO on `fd` is a copy in memory, which never waits. Files only: the filesystem of a block device is that of
/// its node, and `/dev` is in memory too, whatever the disk is.
fn is_in_memory(fd: BorrowedFd<'_>) -> bool {
    let is_file = fstat(fd).is_ok_and(|stat| stat.st_mode & libc::S_IFMT == libc::S_IFREG);
    is_file && fstatfs(fd).is_ok_and(|fs| matches!(fs.filesystem_type(), TMPFS_MAGIC | RAMFS_MAGIC))
}

/// One system call on a disk.
#[derive(Debug)]
pub(super) enum Call {
    Read(BufferRef, FileSpan),
    Write { buffer: BufferRef, span: FileSpan, dsync: bool },
    Allocate { mode: i32, offset: u64, len: u64 },
    Datasync,
}

/// An answer for the core.
#[derive(Clone, Copy, Debug)]
pub(super) enum Answer {
    /// Of a data IO.
    Data(IoId, Result<DiskOk, IoError>),
    /// Of a metadata write.
    Meta(MetaId, Result<(), IoError>),
}

/// An IO under way.
#[derive(Debug)]
pub(super) enum DiskJob {
    /// Data.
    Data(DataJob),
    /// A piece of a metadata write, or the flush at its end.
    Meta(MetaJob),
}

impl DiskJob {
    /// Whether it runs on the owner thread.
    pub(super) fn is_inline(&self) -> bool {
        match self {
            Self::Data(job) => job.disk.data_inline,
            Self::Meta(job) => job.write.disk.meta_inline,
        }
    }

    /// What it moves, bytes.
    pub(super) fn len_bytes(&self) -> u64 {
        match self {
            Self::Data(job) => job.len,
            Self::Meta(job) => job.len_bytes(),
        }
    }

    /// Makes the next system call through the ring; it comes back with [`on_completion`](Self::on_completion).
    pub(super) fn start<C: From<Self>>(self, ring: &mut Ring<C>) {
        let fd = Rc::clone(self.fd());
        match self.call() {
            Call::Read(buffer, span) => ring.read(&fd, buffer, span, self.into()),
            Call::Write { buffer, span, dsync } => ring.write(&fd, buffer, span, dsync, self.into()),
            Call::Allocate { mode, offset, len } => ring.fallocate(&fd, mode, offset, len, self.into()),
            Call::Datasync => ring.datasync(&fd, self.into()),
        }
    }

    /// A system call came back through the ring: the answer, or the next call was started.
    pub(super) fn on_completion<C: From<Self>>(mut self, ring: &mut Ring<C>, result: i32) -> Option<Answer> {
        match self.on_result(result) {
            Progress::Again => self.start(ring),
            Progress::Done(answer) => return Some(answer),
            Progress::Quiet => {}
        }
        None
    }

    /// Does all of it here and now. `None` when it was not the last piece of a metadata write.
    pub(super) fn run_inline(mut self) -> Option<Answer> {
        loop {
            let result = execute(self.fd().as_fd(), &self.call());
            match self.on_result(result) {
                Progress::Again => {}
                Progress::Done(answer) => return Some(answer),
                Progress::Quiet => return None,
            }
        }
    }

    fn fd(&self) -> &Rc<OwnedFd> {
        match self {
            Self::Data(job) => &job.disk.data,
            Self::Meta(job) => &job.write.disk.meta,
        }
    }

    fn call(&self) -> Call {
        match self {
            Self::Data(job) => job.call(),
            Self::Meta(job) => job.call(),
        }
    }

    fn on_result(&mut self, result: i32) -> Progress {
        match self {
            Self::Data(job) => job
                .on_result(result)
                .map_or(Progress::Again, |done| Progress::Done(Answer::Data(job.id, done))),
            Self::Meta(job) => job.on_result(result),
        }
    }
}

pub(super) enum Progress {
    Again,
    Done(Answer),
    Quiet,
}

/// A data IO.
#[derive(Debug)]
pub(super) struct DataJob {
    id: IoId,
    disk: Rc<Disk>,
    stage: Stage,
    /// Data of a read or write, or zeroes.
    buffer: Option<BufferRef>,
    /// The buffer was taken for the core, which gets it with the answer.
    taken: bool,
    /// A digest of the data goes with the answer.
    digest: bool,
    fua: bool,
    offset: u64,
    len: u64,
    done: u64,
    idle_results: u8,
    pool: BufferPool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Read,
    Write,
    Punch,
    Zero,
    WriteZeroes,
    Datasync,
}

impl DataJob {
    /// The job for an IO of the core; gives the IO back when no buffer is free for it.
    ///
    /// # Panics
    /// The core asked for an IO without its range or data: our bug.
    pub(super) fn new(io: &DiskIo, disk: &Rc<Disk>, pool: &BufferPool) -> Option<Self> {
        debug_assert_eq!(io.volume, disk.volume, "an IO goes to the disk of its volume");
        let (offset, len) = io.range.map_or((0, 0), |range| (range.start().bytes(), range.len().bytes()));
        let mut buffer = io.buffer.map(|id| pool.get(id));
        let mut taken = false;
        let stage = match io.op {
            DiskOp::Read | DiskOp::ReadDigest => {
                if buffer.is_none() {
                    let bytes = usize::try_from(len).unwrap_or(usize::MAX);
                    assert!(bytes <= MAX_BUFFER_BYTES, "a read of {bytes} bytes");
                    buffer = Some(pool.take(bytes, Account::Disk)?);
                    taken = true;
                }
                Stage::Read
            }
            DiskOp::Write => Stage::Write,
            DiskOp::Discard | DiskOp::WriteZeroes { may_unmap: true } if disk.can_punch.get() => Stage::Punch,
            DiskOp::Discard | DiskOp::WriteZeroes { .. } if disk.can_zero.get() => Stage::Zero,
            DiskOp::Discard | DiskOp::WriteZeroes { .. } => Stage::WriteZeroes,
            DiskOp::Flush => Stage::Datasync,
        };
        if stage == Stage::WriteZeroes {
            buffer = Some(disk.zeroes(pool)?);
        }
        if matches!(stage, Stage::Read | Stage::Write) {
            let data = buffer.as_ref().expect("the core gives every write its data");
            assert!(data.len() as u64 >= len, "{:?}: {data:?} for {len} bytes", io.id);
        }
        assert!(stage == Stage::Datasync || len > 0, "{:?} has no range", io.id);
        let pool = pool.clone();
        let disk = Rc::clone(disk);
        Some(Self {
            id: io.id,
            disk,
            stage,
            buffer,
            taken,
            digest: io.op == DiskOp::ReadDigest,
            fua: io.fua,
            offset,
            len,
            done: 0,
            idle_results: 0,
            pool,
        })
    }

    fn call(&self) -> Call {
        let buffer = || self.buffer.clone().expect("stages with data have a buffer");
        let offset = self.offset + self.done;
        let left = self.len - self.done;
        // Pieces of zeroes are cut to the buffer of zeroes; all else fits its buffer whole.
        let len = usize::try_from(left).map_or(MAX_BUFFER_BYTES, |left| left.min(MAX_BUFFER_BYTES));
        match self.stage {
            Stage::Read | Stage::Write => {
                let buffer_offset = usize::try_from(self.done).expect("less than the buffer's length");
                let span = FileSpan { buffer_offset, len, file_offset: offset };
                if self.stage == Stage::Read {
                    Call::Read(buffer(), span)
                } else {
                    Call::Write { buffer: buffer(), span, dsync: self.fua }
                }
            }
            Stage::WriteZeroes => {
                let span = FileSpan { buffer_offset: 0, len, file_offset: offset };
                Call::Write { buffer: buffer(), span, dsync: false }
            }
            Stage::Punch => Call::Allocate { mode: PUNCH, offset, len: left },
            Stage::Zero => Call::Allocate { mode: ZERO, offset, len: left },
            Stage::Datasync => Call::Datasync,
        }
    }

    fn on_result(&mut self, result: i32) -> Option<Result<DiskOk, IoError>> {
        let Ok(moved) = u64::try_from(result) else {
            return self.on_errno(Errno::from_raw(-result));
        };
        match self.stage {
            Stage::Read | Stage::Write | Stage::WriteZeroes => {
                if moved == 0 {
                    // The end of the device inside the volume, or a write that does not go on.
                    return Some(Err(IoError::Errno(libc::EIO)));
                }
                // Direct IO goes on at a whole sector; what lies behind it is moved once more.
                let done = self.done + moved;
                let done = if done < self.len { done - done % 512 } else { done };
                if done == self.done && self.is_stuck() {
                    return Some(Err(IoError::Errno(libc::EIO)));
                }
                self.done = done;
                if done < self.len {
                    return None;
                }
                if self.stage == Stage::WriteZeroes && self.fua {
                    self.stage = Stage::Datasync;
                    return None;
                }
            }
            Stage::Punch | Stage::Zero if self.fua => {
                self.stage = Stage::Datasync;
                return None;
            }
            Stage::Punch | Stage::Zero | Stage::Datasync => {}
        }
        Some(Ok(self.ok()))
    }

    fn ok(&mut self) -> DiskOk {
        let len = usize::try_from(self.len).unwrap_or(usize::MAX);
        let digest = self.buffer.as_ref().filter(|_| self.digest).map(|buffer| buffer.digest(len));
        if !self.taken {
            return DiskOk { digest, ..DiskOk::default() };
        }
        let all_zero = self.buffer.as_ref().is_some_and(BufferRef::is_zero);
        let buffer = self.buffer.take().map(|buffer| self.pool.hand_to_core(buffer));
        DiskOk { buffer, all_zero, digest }
    }

    fn on_errno(&mut self, errno: Errno) -> Option<Result<DiskOk, IoError>> {
        match (errno, self.stage) {
            (Errno::EAGAIN | Errno::EINTR, Stage::Read | Stage::Write | Stage::WriteZeroes)
            | (Errno::EINTR, Stage::Punch | Stage::Zero)
                if !self.is_stuck() =>
            {
                return None;
            }
            (Errno::EOPNOTSUPP | Errno::ENOSYS, Stage::Punch) => {
                self.disk.can_punch.set(false);
                self.stage = Stage::Zero;
                return None;
            }
            (Errno::EOPNOTSUPP | Errno::ENOSYS, Stage::Zero) => {
                self.disk.can_zero.set(false);
                if let Some(zeroes) = self.disk.zeroes(&self.pool) {
                    self.buffer = Some(zeroes);
                    self.stage = Stage::WriteZeroes;
                    return None;
                }
            }
            _ => {}
        }
        Some(Err(IoError::Errno(errno as i32)))
    }

    fn is_stuck(&mut self) -> bool {
        self.idle_results += 1;
        self.idle_results >= MAX_IDLE_RESULTS
    }
}

/// Makes the call on this thread; the result as the ring would give it.
fn execute(fd: BorrowedFd<'_>, call: &Call) -> i32 {
    let raw = fd.as_raw_fd();
    let result = match call {
        Call::Read(buffer, span) => {
            let address = buffer.address(span.buffer_offset, span.len);
            buffer.forget_crc();
            // SAFETY: `address` checked that the range is inside memory that `buffer` keeps alive over the call.
            // JUSTIFICATION: pool memory has no exclusive reference, which the safe wrappers want.
            unsafe { libc::pread(raw, address.cast(), span.len, file_offset(span.file_offset)) }
        }
        Call::Write { buffer, span, dsync } => {
            let address = buffer.address(span.buffer_offset, span.len);
            // SAFETY: as above.
            // JUSTIFICATION: as above.
            let written =
                unsafe { libc::pwrite(raw, address.cast(), span.len, file_offset(span.file_offset)) };
            if written < 0 || !*dsync {
                written
            } else {
                // Memory has nothing to flush; the call is here so that the promise does not rest on that.
                match nix::unistd::fdatasync(fd) {
                    Ok(()) => written,
                    Err(errno) => return -(errno as i32),
                }
            }
        }
        Call::Allocate { mode, offset, len } => {
            let mode = nix::fcntl::FallocateFlags::from_bits_retain(*mode);
            match nix::fcntl::fallocate(fd, mode, file_offset(*offset), file_offset(*len)) {
                Ok(()) => 0,
                Err(errno) => return -(errno as i32),
            }
        }
        Call::Datasync => match nix::unistd::fdatasync(fd) {
            Ok(()) => 0,
            Err(errno) => return -(errno as i32),
        },
    };
    // At most `MAX_BUFFER_BYTES`, or -1.
    if result < 0 { -Errno::last_raw() } else { i32::try_from(result).unwrap_or(i32::MAX) }
}

fn file_offset(bytes: u64) -> libc::off_t {
    // Ranges are inside the device, whose size is an `off_t` of the kernel.
    libc::off_t::try_from(bytes).unwrap_or(libc::off_t::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::event::MetaWrite;
    use crate::meta::{BLOCK_BYTES, BitmapPage, MetaKind, Superblock, al_ring};
    use crate::runtime::backing::MetaDisk;
    use crate::runtime::backing::create::{CreateOptions, Operator, create};
    use crate::runtime::buffers::MIN_POOL_BYTES;
    use crate::runtime::ring::Completion;
    use crate::units::{BlockRange, Sector, SectorCount};
    use std::fs::File;
    use std::os::unix::fs::FileExt;
    use std::path::Path;
    use std::time::Duration;

    struct Silent;

    impl Operator for Silent {
        fn say(&mut self, _text: &str) {}

        fn confirm(&mut self, _question: &str) -> bool {
            true
        }

        fn progress(&mut self, _done: u64, _total: u64) {}
    }

    struct Bench {
        disk: Rc<Disk>,
        pool: BufferPool,
        ring: Ring<DiskJob>,
    }

    impl Bench {
        fn new(path: &Path) -> Self {
            File::create(path).unwrap().set_len(16 << 20).unwrap();
            let options = CreateOptions { force: true, ..CreateOptions::default() };
            create(path, MetaKind::Internal, None, &options, &mut Silent).unwrap();
            let known = KnownSize::new(path.parent().unwrap(), 5, path);
            let (backing, _) = Backing::open_known(path, &MetaDisk::Internal, Some(known)).unwrap();
            let disk = Rc::new(Disk::new(VolumeNr(0), backing));
            Self { disk, pool: BufferPool::new(MIN_POOL_BYTES), ring: Ring::new().unwrap() }
        }

        fn finish(&mut self, jobs: Vec<DiskJob>) -> Answer {
            let mut answer = None;
            for job in jobs {
                if job.is_inline() {
                    answer = answer.or(job.run_inline());
                } else {
                    job.start(&mut self.ring);
                }
            }
            while answer.is_none() {
                self.ring.submit_and_wait(Some(Duration::from_secs(10))).unwrap();
                self.ring.reap();
                while let Some(Completion { context, result, .. }) = self.ring.next_completion() {
                    answer = answer.or(context.on_completion(&mut self.ring, result));
                }
            }
            answer.unwrap()
        }

        fn io(&mut self, op: DiskOp, start: u64, len: u64, fua: bool, data: Option<&[u8]>) -> DiskOk {
            let buffer = data.map(|data| {
                let buffer = self.pool.take(data.len(), Account::FrontEnd).unwrap();
                buffer.copy_in(0, data);
                self.pool.hand_to_core(buffer)
            });
            let range = BlockRange::new(Sector(start), SectorCount(len));
            let io = DiskIo { id: IoId(7), volume: VolumeNr(0), op, range, fua, buffer };
            let job = DataJob::new(&io, &self.disk, &self.pool).unwrap();
            let Answer::Data(IoId(7), result) = self.finish(vec![DiskJob::Data(job)]) else { panic!() };
            if let Some(buffer) = buffer {
                self.pool.release_from_core(buffer);
            }
            result.unwrap()
        }

        fn read(&mut self, start: u64, len: u64) -> (Vec<u8>, bool) {
            let ok = self.io(DiskOp::Read, start, len, false, None);
            let buffer = self.pool.take_from_core(ok.buffer.unwrap());
            (buffer.to_bytes().to_vec(), ok.all_zero)
        }

        fn meta(&mut self, write: &MetaWrite) {
            let mut jobs = Vec::new();
            MetaJob::make(MetaId(3), write, &self.disk, &self.pool, |job| jobs.push(job)).unwrap();
            let Answer::Meta(MetaId(3), result) = self.finish(jobs) else { panic!() };
            result.unwrap();
        }
    }

    fn everything(dir: &Path) {
        let path = dir.join("disk");
        let mut bench = Bench::new(&path);
        let data: Vec<u8> = (0..65536).map(|at: u32| (at % 249) as u8).collect();
        bench.io(DiskOp::Write, 8, 128, true, Some(&data));
        assert!(bench.read(8, 128) == (data.clone(), false));
        assert!(bench.read(0, 8) == (vec![0; 4096], true));
        for (op, fua) in [
            (DiskOp::Discard, false),
            (DiskOp::WriteZeroes { may_unmap: true }, true),
            (DiskOp::WriteZeroes { may_unmap: false }, true),
        ] {
            bench.io(DiskOp::Write, 8, 128, false, Some(&data));
            bench.io(op, 16, 64, fua, None);
            let (bytes, _) = bench.read(8, 128);
            assert!(bytes[..4096] == data[..4096] && bytes[36864..] == data[36864..], "{op:?}");
            assert!(bytes[4096..36864].iter().all(|&byte| byte == 0), "{op:?}");
        }
        bench.io(DiskOp::Flush, 0, 0, false, None);
        // With everything refused, zeroes are written; more than one buffer of them.
        bench.disk.can_punch.set(false);
        bench.disk.can_zero.set(false);
        bench.io(DiskOp::Write, 0, 2048, false, Some(&vec![5; 1 << 20]));
        bench.io(DiskOp::Discard, 8, 6000, true, None);
        assert!(bench.read(0, 8).0 == vec![5; 4096]);
        assert!(bench.read(8, 2040).1);

        let layout = bench.disk.layout.borrow().clone();
        let mut superblock = Superblock::created(&layout);
        superblock.uuid[0] = 0x1234_5678;
        bench.meta(&MetaWrite::Superblock(Box::new(superblock.clone())));
        let page = |index: u32| BitmapPage { index, words: Box::new([u64::from(index) + 1; 512]) };
        bench.meta(&MetaWrite::Bitmap(vec![page(0)]));
        bench.meta(&MetaWrite::AlInit);
        let file = File::options().read(true).write(true).open(&path).unwrap();
        assert_eq!(bench.disk.measure().map(|place| place.moves), Some(false));
        let mut block = [0; BLOCK_BYTES];
        file.read_exact_at(&mut block, layout.superblock_byte()).unwrap();
        assert_eq!(Superblock::decode(&block, layout.superblock_byte()).unwrap(), superblock);
        file.read_exact_at(&mut block, layout.bitmap_page_byte(0)).unwrap();
        assert_eq!(block, page(0).to_bytes());
        file.read_exact_at(&mut block, layout.al_byte() + 7 * BLOCK_BYTES as u64).unwrap();
        assert_eq!(block, al_ring::initialised_block());

        // The device grows: its metadata belongs elsewhere, and is written there when told.
        file.set_len(24 << 20).unwrap();
        let place = bench.disk.measure().unwrap();
        assert!(place.moves && place.capacity > layout.capacity());
        // It grows once more on the way: the note is of the size that the metadata was placed for.
        file.set_len(32 << 20).unwrap();
        bench.meta(&MetaWrite::Relocate);
        let moved = bench.disk.layout.borrow().clone();
        bench.meta(&MetaWrite::Superblock(Box::new(superblock.clone())));
        file.read_exact_at(&mut block, moved.superblock_byte()).unwrap();
        assert_eq!(Superblock::decode(&block, moved.superblock_byte()).unwrap(), superblock);
        bench.meta(&MetaWrite::ForgetOldPlace);
        file.read_exact_at(&mut block, layout.superblock_byte()).unwrap();
        assert_eq!(block, [0; BLOCK_BYTES]);
        let known = KnownSize::new(dir, 5, &path);
        assert_eq!(known.read(), Some(24 << 20));
        drop(bench);
        let (backing, _) = Backing::open_known(&path, &MetaDisk::Internal, Some(known)).unwrap();
        assert!(!backing.notes().is_empty(), "found at the noted size, and moved to the end");
    }

    #[test]
    fn a_disk_behind_the_ring_keeps_its_promises() {
        everything(tempfile::tempdir().unwrap().path());
    }

    #[test]
    fn a_disk_in_memory_keeps_its_promises() {
        if !Path::new("/dev/shm").is_dir() {
            eprintln!("skipped: no tmpfs at /dev/shm");
            return;
        }
        everything(tempfile::tempdir_in("/dev/shm").unwrap().path());
    }

    #[test]
    fn a_device_is_not_in_memory_because_its_node_is() {
        let device = File::open("/dev/null").unwrap();
        assert!(!is_in_memory(device.as_fd()));
        if Path::new("/dev/shm").is_dir() {
            let dir = tempfile::tempdir_in("/dev/shm").unwrap();
            let file = File::create(dir.path().join("disk")).unwrap();
            let in_memory = fstatfs(&file).is_ok_and(|fs| fs.filesystem_type() == TMPFS_MAGIC);
            assert_eq!(is_in_memory(file.as_fd()), in_memory);
        }
    }

    #[test]
    fn an_error_of_the_disk_is_an_answer() {
        let dir = tempfile::tempdir().unwrap();
        let mut bench = Bench::new(&dir.path().join("disk"));
        // Behind the end of the file.
        let range = BlockRange::new(Sector(1 << 20), SectorCount(8));
        let io =
            DiskIo { id: IoId(1), volume: VolumeNr(0), op: DiskOp::Read, range, fua: false, buffer: None };
        let job = DataJob::new(&io, &bench.disk, &bench.pool).unwrap();
        let answer = bench.finish(vec![DiskJob::Data(job)]);
        assert!(matches!(answer, Answer::Data(IoId(1), Err(IoError::Errno(libc::EIO)))), "{answer:?}");
        assert_eq!(bench.pool.used_bytes(Account::Disk), 0);
    }
}
