//! One ublk queue inside a ring that belongs to somebody else.
//!
//! The queue keeps one state per tag and checks each step:
//!
//! ```text
//!            fetch_sqe                 on_cqe: request
//!   Unused ────────────> InKernel ───────────────────────> Owned
//!                           ^  │                             │
//!                           │  │ on_cqe: aborted, refused    │
//!                           │  └───────────> Gone            │
//!                           └────────────────────────────────┘
//!                                      commit_sqe
//! ```
//!
//! A step that is not in the picture is a bug of the caller and panics with the tag and its state: going on would hand a
//! buffer to two owners, or lose a request for ever.
//!
//! Invariants: a tag in `InKernel` has exactly one command in the ring; the caller's buffer of that tag may be touched by the kernel
//! only then; the queue is drained when no tag is `InKernel` or `Owned`.
//!
//! The only `unsafe` of the crate is here: borrowing the file that `libublk` opened (the driver lets the character device be
//! opened once), mapping the descriptor array, and reading from it.

use std::ffi::c_void;
use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::ptr::NonNull;
use std::{fmt, io};

use io_uring::{opcode, squeue, types};
use libublk::sys;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use crate::params::{self, Geometry, IoFailure, IoRequest, RawDescriptor};

/// Number of the only queue of the device: one ring, one queue.
const QUEUE_ID: u16 = 0;

/// What the completion of a tag's command means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QueueEvent {
    /// The block layer wants something. Answer with [`Queue::commit_sqe`], whenever, in any order.
    Request(IoRequest),
    /// A request this device never offered or that breaks its limits. Answer it at once with the failure.
    Unserviceable {
        /// The slot to commit.
        tag: u16,
        /// What to commit.
        failure: IoFailure,
    },
    /// The device is being stopped (or the ring torn down); the tag takes no more commands and its buffer is free.
    Aborted {
        /// The slot that ended.
        tag: u16,
    },
    /// The driver did not take the command: our bug or its own. The tag takes no more commands and its buffer is free.
    Refused {
        /// The slot that ended.
        tag: u16,
        /// The driver's answer, a positive errno.
        errno: i32,
    },
}

/// Where a tag is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TagState {
    /// No command was ever made for it.
    Unused,
    /// A fetch or commit is in the ring or on its way there.
    InKernel,
    /// A request waits for its answer. `None`: one that could not be decoded.
    Owned(Option<IoRequest>),
    /// Ended for good.
    Gone,
}

/// The data side of a device: makes commands for the caller's ring and reads what their completions mean.
///
/// # Use
///
/// 1. For each tag in `0..depth()`: [`Self::fetch_sqe`], set `user_data`, push, submit. All from the thread that will go on
///    driving the ring: the driver ties each tag to the thread that fetched it.
/// 2. For each completion of such an entry: [`Self::on_cqe`] with the tag and the `res` of the completion.
/// 3. Answer each request with [`Self::commit_sqe`], which at the same time asks for the tag's next one.
/// 4. After `Device::stop` every tag ends. When [`Self::is_drained`], drop the queue, so that `Device::delete` can finish.
///
/// The ring needs room for [`Self::depth`] entries in flight besides the caller's own. Any ring will do: plain 64-byte
/// entries, with or without task-run flags, but without kernel-side submission polling (its thread would become the tag's owner).
///
/// # Buffers
///
/// Each command names a buffer of at least [`Self::max_io_bytes`] bytes, and a different one may be named every time:
/// - at [`Self::fetch_sqe`]: the buffer that will hold the data if the tag's next request is a write;
/// - at [`Self::commit_sqe`] of a read: the buffer **with the data just read**, which is then also the buffer for the next request;
/// - at [`Self::commit_sqe`] of anything else: the buffer for the next request. The buffer of the finished write stays the
///   caller's, who may still be sending it.
///
/// From the submission of an entry to its completion the kernel may read and write that buffer. The entries are
/// therefore only safe to push (an `unsafe` call of the `io-uring` crate) if the buffer stays mapped and is not accessed by
/// anything else until [`Self::on_cqe`] was called for the tag, or until the ring itself is gone.
pub struct Queue {
    // Declared before the file: unmapped first, then closed.
    descriptors: Mapping,
    file: OwnedFd,
    tags: Box<[TagState]>,
    geometry: Geometry,
    nr_in_kernel: u16,
    nr_owned: u16,
}

impl Queue {
    /// Maps the descriptor array of an added device. `char_fd` is the open character device.
    pub(crate) fn map(char_fd: RawFd, depth: u16, geometry: Geometry, page_bytes: usize) -> io::Result<Self> {
        // SAFETY: the caller holds the UblkDev that owns this descriptor for the whole call, so it is open.
        // JUSTIFICATION: libublk shows the file only as a number, and the driver refuses to open it a second time.
        let borrowed = unsafe { BorrowedFd::borrow_raw(char_fd) };
        let file = borrowed.try_clone_to_owned()?;
        let descriptors = Mapping::new(&file, depth, page_bytes)?;
        Ok(Self {
            descriptors,
            file,
            tags: vec![TagState::Unused; usize::from(depth)].into_boxed_slice(),
            geometry,
            nr_in_kernel: 0,
            nr_owned: 0,
        })
    }

    /// Number of tags: requests the device holds at once.
    #[must_use]
    pub fn depth(&self) -> u16 {
        self.descriptors.depth
    }

    /// Bytes that every buffer given to this queue must have.
    #[must_use]
    pub fn max_io_bytes(&self) -> u32 {
        self.geometry.max_io_bytes
    }

    /// Size of the disk in sectors of 512 bytes.
    #[must_use]
    pub fn nr_sectors(&self) -> u64 {
        self.geometry.nr_sectors
    }

    /// Requests delivered and not yet answered.
    #[must_use]
    pub fn nr_owned(&self) -> u16 {
        self.nr_owned
    }

    /// Whether no command is in the ring and no request unanswered: before the first fetch, and after the last abort.
    #[must_use]
    pub fn is_drained(&self) -> bool {
        self.nr_in_kernel == 0 && self.nr_owned == 0
    }

    /// The first command of a tag: asks for its first request. `buffer_addr`: see the type's section on buffers.
    ///
    /// # Panics
    ///
    /// If the tag is out of range or was fetched before, or the address is zero.
    #[must_use = "an entry that is not submitted keeps the device from starting"]
    pub fn fetch_sqe(&mut self, tag: u16, buffer_addr: u64) -> squeue::Entry {
        let state = self.state(tag);
        assert!(state == TagState::Unused, "tag {tag} is fetched twice: it is {state:?}");
        self.enter_kernel(tag);
        self.command(sys::UBLK_U_IO_FETCH_REQ, tag, -1, buffer_addr)
    }

    /// Answers the tag's request and asks for its next one. `buffer_addr`: see the type's section on buffers.
    ///
    /// The answer is for the whole request; the length the driver wants to see is filled in here.
    ///
    /// # Panics
    ///
    /// If the tag is out of range or holds no request, if a request that was [`QueueEvent::Unserviceable`] is answered
    /// with success, or the address is zero.
    #[must_use = "an entry that is not submitted leaves the request hanging"]
    pub fn commit_sqe(&mut self, tag: u16, result: Result<(), IoFailure>, buffer_addr: u64) -> squeue::Entry {
        let state = self.state(tag);
        let TagState::Owned(request) = state else {
            panic!("tag {tag} is answered without a request: it is {state:?}");
        };
        let code = match (request, result) {
            (Some(request), result) => params::result_code(&request, result),
            (None, Err(failure)) => -failure.errno(),
            (None, Ok(())) => panic!("tag {tag} holds an unserviceable request and is answered with success"),
        };
        self.nr_owned -= 1;
        self.enter_kernel(tag);
        self.command(sys::UBLK_U_IO_COMMIT_AND_FETCH_REQ, tag, code, buffer_addr)
    }

    /// Reads the completion of the tag's command. `res` is the result field of the completion entry.
    ///
    /// # Panics
    ///
    /// If the tag is out of range or has no command in the ring.
    pub fn on_cqe(&mut self, tag: u16, res: i32) -> QueueEvent {
        let state = self.state(tag);
        assert!(state == TagState::InKernel, "tag {tag} completes without a command: it is {state:?}");
        self.nr_in_kernel -= 1;
        let (next, event) = self.interpret(tag, res);
        if matches!(next, TagState::Owned(_)) {
            self.nr_owned += 1;
        }
        self.tags[usize::from(tag)] = next;
        event
    }

    /// New state and event for a completed command.
    fn interpret(&self, tag: u16, res: i32) -> (TagState, QueueEvent) {
        if res == sys::UBLK_IO_RES_OK.cast_signed() {
            return match params::decode(tag, self.descriptors.read(tag), self.geometry) {
                Ok(request) => (TagState::Owned(Some(request)), QueueEvent::Request(request)),
                Err(failure) => (TagState::Owned(None), QueueEvent::Unserviceable { tag, failure }),
            };
        }
        let event = match res {
            // Stopped by the driver; or cancelled because the ring goes away.
            sys::UBLK_IO_RES_ABORT | ECANCELED => QueueEvent::Aborted { tag },
            // A positive result is "give me the data now", a mode that is never asked for.
            res => QueueEvent::Refused {
                tag,
                errno: if res < 0 { -res } else { nix::errno::Errno::EPROTO as i32 },
            },
        };
        (TagState::Gone, event)
    }

    /// The tag's state; panics on a tag that does not exist.
    fn state(&self, tag: u16) -> TagState {
        assert!(tag < self.depth(), "tag {tag} does not exist: the queue has {} tags", self.depth());
        self.tags[usize::from(tag)]
    }

    fn enter_kernel(&mut self, tag: u16) {
        self.tags[usize::from(tag)] = TagState::InKernel;
        self.nr_in_kernel += 1;
    }

    fn command(&self, op: u32, tag: u16, result: i32, buffer_addr: u64) -> squeue::Entry {
        assert!(buffer_addr != 0, "tag {tag} is given no buffer");
        opcode::UringCmd16::new(types::Fd(self.file.as_raw_fd()), op)
            .cmd(encode_command(QUEUE_ID, tag, result, buffer_addr))
            .build()
    }
}

impl fmt::Debug for Queue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Queue")
            .field("depth", &self.depth())
            .field("nr_in_kernel", &self.nr_in_kernel)
            .field("nr_owned", &self.nr_owned)
            .field("geometry", &self.geometry)
            .finish_non_exhaustive()
    }
}

/// `-ECANCELED`, as a pattern.
const ECANCELED: i32 = -(nix::errno::Errno::ECANCELED as i32);

/// The 16 bytes of an IO command: queue, tag, result, buffer address, in native order.
fn encode_command(queue: u16, tag: u16, result: i32, buffer_addr: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[0..2].copy_from_slice(&queue.to_ne_bytes());
    bytes[2..4].copy_from_slice(&tag.to_ne_bytes());
    bytes[4..8].copy_from_slice(&result.to_ne_bytes());
    bytes[8..16].copy_from_slice(&buffer_addr.to_ne_bytes());
    bytes
}

const _: () = assert!(size_of::<sys::ublksrv_io_cmd>() == 16);

/// The descriptor array that the driver shares with us, read-only.
struct Mapping {
    base: NonNull<c_void>,
    len_bytes: NonZeroUsize,
    depth: u16,
}

// SAFETY: the mapping belongs to the process, not to a thread, and is only read through `&self` and unmapped by drop.
// JUSTIFICATION: the queue is made on the control thread and then moves to the thread that drives the ring.
unsafe impl Send for Mapping {}

impl Mapping {
    fn new(file: &OwnedFd, depth: u16, page_bytes: usize) -> io::Result<Self> {
        let len = (usize::from(depth) * size_of::<RawDescriptor>()).next_multiple_of(page_bytes);
        let len_bytes = NonZeroUsize::new(len).ok_or(io::ErrorKind::InvalidInput)?;
        // The driver finds the queue by the offset; queue 0 begins at 0.
        let offset = i64::from(sys::UBLKSRV_CMD_BUF_OFFSET);
        // SAFETY: a new mapping at an address of the kernel's choice overlaps nothing of ours.
        // JUSTIFICATION: the driver hands out descriptors only through this mapping.
        let base = unsafe {
            mmap(
                None,
                len_bytes,
                ProtFlags::PROT_READ,
                MapFlags::MAP_SHARED | MapFlags::MAP_POPULATE,
                file,
                offset,
            )
        }?;
        Ok(Self { base, len_bytes, depth })
    }

    /// The descriptor of a tag. Meaningful between the completion of its command and the commit.
    fn read(&self, tag: u16) -> RawDescriptor {
        assert!(tag < self.depth, "tag {tag} is outside the descriptor array");
        let array = self.base.cast::<RawDescriptor>();
        // SAFETY: tag < depth, and `new` mapped at least depth descriptors.
        // JUSTIFICATION: the array lives in the kernel's memory, no slice of ours covers it.
        let descriptor = unsafe { array.add(usize::from(tag)) };
        // SAFETY: in bounds (above), aligned because the base is page-aligned, and any bit pattern is a valid RawDescriptor. The
        // driver wrote it before the completion that we have seen, and does not write it again before our commit.
        // JUSTIFICATION: memory shared with the kernel; volatile, because the compiler cannot see its writes.
        unsafe { descriptor.read_volatile() }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: exactly what `new` mapped; no reference into it outlives `read`, which returns a copy.
        // JUSTIFICATION: the driver frees the device only when the mapping is gone.
        let result = unsafe { munmap(self.base, self.len_bytes.get()) };
        debug_assert!(result.is_ok(), "unmapping our own mapping failed: {result:?}");
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Seek, Write};

    use super::*;

    const DEPTH: u16 = 4;
    const BUFFER: u64 = 0x1000;

    /// A queue over a plain file in place of the character device, holding the given descriptors.
    fn queue(descriptors: &[RawDescriptor]) -> Queue {
        let mut file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        file.rewind().unwrap();
        for raw in descriptors {
            file.write_all(&raw.op_flags.to_ne_bytes()).unwrap();
            file.write_all(&raw.nr_sectors.to_ne_bytes()).unwrap();
            file.write_all(&raw.start_sector.to_ne_bytes()).unwrap();
            file.write_all(&raw.addr.to_ne_bytes()).unwrap();
        }
        let geometry = Geometry { nr_sectors: 2048, max_io_bytes: 65536 };
        Queue::map(file.as_raw_fd(), DEPTH, geometry, 4096).unwrap()
    }

    fn raw(op_flags: u32, start_sector: u64, nr_sectors: u32) -> RawDescriptor {
        RawDescriptor { op_flags, nr_sectors, start_sector, addr: 0 }
    }

    #[test]
    fn commands_have_the_bytes_of_the_abi() {
        let bytes = encode_command(0, 0x0102, -5, 0x1122_3344_5566_7788);
        assert_eq!(bytes[2..4], 0x0102_u16.to_ne_bytes());
        assert_eq!(bytes[4..8], (-5_i32).to_ne_bytes());
        assert_eq!(bytes[8..16], 0x1122_3344_5566_7788_u64.to_ne_bytes());
        // _IOWR('u', 0x20 / 0x21, 16 bytes)
        assert_eq!(sys::UBLK_U_IO_FETCH_REQ, 0xc010_7520);
        assert_eq!(sys::UBLK_U_IO_COMMIT_AND_FETCH_REQ, 0xc010_7521);
    }

    #[test]
    fn a_tag_lives_from_fetch_to_abort() {
        let mut queue = queue(&[raw(0, 0, 8), raw(1 | 1 << 13, 8, 16)]);
        assert!(queue.is_drained());
        let _entry = queue.fetch_sqe(1, BUFFER);
        assert!(!queue.is_drained());
        let expected = IoRequest { tag: 1, op: crate::Op::Write, start_sector: 8, nr_sectors: 16, fua: true };
        assert_eq!(queue.on_cqe(1, 0), QueueEvent::Request(expected));
        assert_eq!(queue.nr_owned(), 1);
        assert!(!queue.is_drained());
        let _entry = queue.commit_sqe(1, Ok(()), BUFFER * 2);
        assert_eq!(queue.nr_owned(), 0);
        assert_eq!(queue.on_cqe(1, -19), QueueEvent::Aborted { tag: 1 });
        assert!(queue.is_drained());
    }

    #[test]
    fn an_unserviceable_request_is_answered_with_its_failure() {
        let mut queue = queue(&[raw(12, 0, 8)]);
        let _entry = queue.fetch_sqe(0, BUFFER);
        let failure = IoFailure::Unsupported;
        assert_eq!(queue.on_cqe(0, 0), QueueEvent::Unserviceable { tag: 0, failure });
        let _entry = queue.commit_sqe(0, Err(failure), BUFFER);
        assert_eq!(queue.on_cqe(0, -125), QueueEvent::Aborted { tag: 0 });
    }

    #[test]
    fn refused_commands_end_the_tag() {
        let mut queue = queue(&[]);
        for (tag, res, errno) in [(0, -22, 22), (1, -16, 16), (2, 1, 71)] {
            let _entry = queue.fetch_sqe(tag, BUFFER);
            assert_eq!(queue.on_cqe(tag, res), QueueEvent::Refused { tag, errno });
        }
        assert!(queue.is_drained());
    }

    #[test]
    #[should_panic(expected = "tag 0 is fetched twice")]
    fn fetching_twice_is_a_bug() {
        let mut queue = queue(&[]);
        let _entry = queue.fetch_sqe(0, BUFFER);
        let _entry = queue.fetch_sqe(0, BUFFER);
    }

    #[test]
    #[should_panic(expected = "answered without a request")]
    fn committing_what_the_kernel_holds_is_a_bug() {
        let mut queue = queue(&[]);
        let _entry = queue.fetch_sqe(0, BUFFER);
        let _entry = queue.commit_sqe(0, Ok(()), BUFFER);
    }

    #[test]
    #[should_panic(expected = "tag 4 does not exist")]
    fn a_tag_beyond_the_depth_is_a_bug() {
        let _entry = queue(&[]).fetch_sqe(4, BUFFER);
    }

    #[test]
    fn a_queue_can_move_to_another_thread() {
        fn is_send<T: Send>() {}
        is_send::<Queue>();
    }
}
