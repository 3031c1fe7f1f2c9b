//! One io_uring per resource thread, behind an interface that cannot dangle.
//!
//! Every operation given to the kernel sits in a slab together with all it points at: the descriptor, the pool buffer
//! or socket memory, and the caller's context. The slab gives them back with the completion and not before; dropping
//! the ring cancels what is in flight and waits for it, because closing a ring does not stop started IO. An operation
//! that hangs even then keeps its memory for ever (leaked, with an error in the log) rather than have it reused.
//!
//! A full submission queue is submitted and tried again here; no caller sees it. The ring belongs to one thread
//! (`SINGLE_ISSUER`, `DEFER_TASKRUN` where the kernel has them).
use super::buffers::BufferRef;
use super::memory::{RecvMemory, RecvPlan, SendMemory};
use io_uring::types::{CancelBuilder, Fd, FsyncFlags, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode, squeue};
use nix::libc;
use slab::Slab;
use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

/// Entries of the submission queue.
const SUBMISSION_ENTRIES: u32 = 512;
/// Entries of the completion queue; the kernel keeps what does not fit.
const COMPLETION_ENTRIES: u32 = 4096;
/// How long a dropped ring waits for its operations.
const DRAIN_LIMIT: Duration = Duration::from_secs(10);
/// `io_uring_setup(2)`: try the receive only once the socket is readable.
const RECV_POLL_FIRST: u16 = 1;
/// User data of a cancellation, which has no slot.
const NO_SLOT: u64 = u64::MAX;

/// Why no ring could be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RingError {
    /// The system forbids io_uring.
    #[error(
        "io_uring is not allowed here ({errno}): `sysctl kernel.io_uring_disabled` must be 0 (or 1 with this process \
         privileged or in `kernel.io_uring_group`), and no seccomp filter, as of a container, may block io_uring_setup"
    )]
    Forbidden {
        /// What the kernel said.
        errno: nix::errno::Errno,
    },
    /// The kernel is older than 5.11.
    #[error("the io_uring of this kernel is too old: Linux 5.11 or newer is needed")]
    TooOld,
    /// No memory for the ring.
    #[error("no memory for an io_uring: raise RLIMIT_MEMLOCK")]
    Memory(#[source] io::Error),
    /// Anything else.
    #[error("io_uring_setup failed")]
    Setup(#[source] io::Error),
}

/// The ring; `C` is what the caller wants back with a completion.
pub(super) struct Ring<C> {
    uring: IoUring,
    /// Everything the kernel may point at. Taken out by hand: see `Drop`.
    slots: ManuallyDrop<Slab<Slot<C>>>,
    /// Completions taken from the kernel and not yet from us.
    reaped: VecDeque<(u64, i32, u32)>,
    /// Of timers that have fired.
    #[expect(clippy::vec_box, reason = "a timer in the ring points at its box, which must not move")]
    timespecs: Vec<Box<Timespec>>,
}

struct Slot<C> {
    context: C,
    memory: Memory,
    /// Keeps the descriptor number from being reused. `None`: whoever gave the operation sees to that.
    _fd: Option<Rc<OwnedFd>>,
}

/// What an operation points at.
#[derive(Debug)]
pub(super) enum Memory {
    /// Nothing.
    None,
    /// A pool buffer.
    Buffer(
        #[cfg_attr(not(feature = "ublk"), expect(dead_code, reason = "held for its count, not looked at"))]
        BufferRef,
    ),
    /// Memory of a receiving socket.
    Recv(Box<RecvMemory>),
    /// Memory of a sending socket.
    Send(Box<SendMemory>),
    /// How long a timer runs.
    Timer(Box<Timespec>),
}

/// A finished operation.
#[derive(Debug)]
pub(super) struct Completion<C> {
    /// As given.
    pub(super) context: C,
    /// What it pointed at.
    pub(super) memory: Memory,
    /// Bytes or 0; negative errno.
    pub(super) result: i32,
    /// More bytes wait in the socket (receives only).
    pub(super) more_waiting: bool,
}

/// Where in a file, and how, one block operation goes.
#[derive(Clone, Copy, Debug)]
pub(super) struct FileSpan {
    /// First byte inside the buffer.
    pub(super) buffer_offset: usize,
    /// Bytes.
    pub(super) len: usize,
    /// First byte inside the file.
    pub(super) file_offset: u64,
}

impl<C> Ring<C> {
    /// Sets up a ring for the calling thread.
    ///
    /// # Errors
    /// The kernel refuses; the error says what to change.
    pub(super) fn new() -> Result<Self, RingError> {
        let uring = build()?;
        if !uring.params().is_feature_ext_arg() || !uring.params().is_feature_nodrop() {
            return Err(RingError::TooOld);
        }
        Ok(Self {
            uring,
            slots: ManuallyDrop::new(Slab::with_capacity(1024)),
            reaped: VecDeque::with_capacity(1024),
            timespecs: Vec::new(),
        })
    }

    /// Operations in flight.
    pub(super) fn in_flight(&self) -> usize {
        self.slots.len()
    }

    /// Completes once `fd` is readable.
    pub(super) fn poll_readable(&mut self, fd: &Rc<OwnedFd>, context: C) {
        let entry = opcode::PollAdd::new(Fd(fd.as_raw_fd()), libc::POLLIN.cast_unsigned().into()).build();
        self.start(entry, fd, Memory::None, context);
    }

    /// Completes after a while.
    pub(super) fn timer(&mut self, after: Duration, context: C) {
        let mut memory = self.timespecs.pop().unwrap_or_else(|| Box::new(Timespec::new()));
        *memory = Timespec::from(after);
        let entry = opcode::Timeout::new(&raw const *memory).build();
        let key = self.slots.insert(Slot { context, memory: Memory::Timer(memory), _fd: None });
        self.push(&entry.user_data(key as u64));
    }

    /// Reads from a file into a pool buffer.
    pub(super) fn read(&mut self, fd: &Rc<OwnedFd>, buffer: BufferRef, span: FileSpan, context: C) {
        let address = buffer.address(span.buffer_offset, span.len);
        buffer.forget_crc();
        let entry =
            opcode::Read::new(Fd(fd.as_raw_fd()), address, length(span.len)).offset(span.file_offset).build();
        self.start(entry, fd, Memory::Buffer(buffer), context);
    }

    /// Writes a pool buffer to a file; stable when it completes if `dsync`.
    pub(super) fn write(
        &mut self,
        fd: &Rc<OwnedFd>,
        buffer: BufferRef,
        span: FileSpan,
        dsync: bool,
        context: C,
    ) {
        let address = buffer.address(span.buffer_offset, span.len);
        let flags = if dsync { libc::RWF_DSYNC } else { 0 };
        let entry = opcode::Write::new(Fd(fd.as_raw_fd()), address, length(span.len))
            .offset(span.file_offset)
            .rw_flags(flags)
            .build();
        self.start(entry, fd, Memory::Buffer(buffer), context);
    }

    /// `fdatasync`.
    pub(super) fn datasync(&mut self, fd: &Rc<OwnedFd>, context: C) {
        let entry = opcode::Fsync::new(Fd(fd.as_raw_fd())).flags(FsyncFlags::DATASYNC).build();
        self.start(entry, fd, Memory::None, context);
    }

    /// `fallocate` with `mode`, range in bytes.
    pub(super) fn fallocate(&mut self, fd: &Rc<OwnedFd>, mode: i32, offset: u64, len: u64, context: C) {
        let entry = opcode::Fallocate::new(Fd(fd.as_raw_fd()), len).offset(offset).mode(mode).build();
        self.start(entry, fd, Memory::None, context);
    }

    /// Receives from a socket as `plan` says.
    pub(super) fn recv(
        &mut self,
        fd: &Rc<OwnedFd>,
        mut memory: Box<RecvMemory>,
        plan: &RecvPlan,
        context: C,
    ) {
        let message = memory.prepare(plan);
        let flags = if plan.wait_all { libc::MSG_WAITALL } else { 0 };
        let poll_first = if plan.poll_first { RECV_POLL_FIRST } else { 0 };
        let entry = opcode::RecvMsg::new(Fd(fd.as_raw_fd()), message)
            .flags(flags.cast_unsigned())
            .ioprio(poll_first)
            .build();
        self.start(entry, fd, Memory::Recv(memory), context);
    }

    /// Sends what is left of `memory`, all of it if the socket goes along.
    pub(super) fn send(&mut self, fd: &Rc<OwnedFd>, mut memory: Box<SendMemory>, context: C) {
        let message = memory.prepare();
        let flags = libc::MSG_NOSIGNAL | libc::MSG_WAITALL;
        let entry = opcode::SendMsg::new(Fd(fd.as_raw_fd()), message).flags(flags.cast_unsigned()).build();
        self.start(entry, fd, Memory::Send(memory), context);
    }

    /// Sends at once what the socket takes without waiting.
    ///
    /// # Errors
    /// `EAGAIN` when that is nothing; anything else: the connection is broken.
    pub(super) fn send_now(fd: &OwnedFd, memory: &mut SendMemory) -> Result<usize, nix::errno::Errno> {
        let message = memory.prepare();
        // SAFETY: `prepare` built the message from memory that `memory` owns, and nothing changes it during the call.
        // JUSTIFICATION: the pieces are pool memory and known only as addresses; the safe wrapper wants slices.
        let sent = unsafe { libc::sendmsg(fd.as_raw_fd(), message, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) };
        nix::errno::Errno::result(sent).map(isize::unsigned_abs)
    }

    /// Takes every completion the kernel has posted, without entering it.
    pub(super) fn reap(&mut self) {
        for entry in self.uring.completion() {
            self.reaped.push_back((entry.user_data(), entry.result(), entry.flags()));
        }
    }

    /// The next reaped completion.
    pub(super) fn next_completion(&mut self) -> Option<Completion<C>> {
        loop {
            let (key, result, flags) = self.reaped.pop_front()?;
            // A cancellation has no slot. Every other key is a slot's, taken exactly once: no operation is multishot.
            let slot = usize::try_from(key).ok().and_then(|key| self.slots.try_remove(key));
            if let Some(slot) = slot {
                let more_waiting = cqueue::sock_nonempty(flags);
                let memory = match slot.memory {
                    Memory::Timer(memory) => {
                        self.timespecs.push(memory);
                        Memory::None
                    }
                    memory => memory,
                };
                return Some(Completion { context: slot.context, memory, result, more_waiting });
            }
            debug_assert_eq!(key, NO_SLOT, "a completion without its slot");
        }
    }

    /// Whether a completion can be had without sleeping.
    pub(super) fn has_completions(&mut self) -> bool {
        !self.reaped.is_empty() || !self.uring.completion().is_empty()
    }

    /// Whether the kernel has finished something that only entering it will post.
    pub(super) fn has_deferred_work(&mut self) -> bool {
        self.uring.submission().taskrun()
    }

    /// Hands new operations to the kernel without waiting.
    ///
    /// # Errors
    /// The ring is broken.
    pub(super) fn submit(&mut self) -> io::Result<()> {
        forgive(self.uring.submit().map(drop))
    }

    /// Hands new operations to the kernel and sleeps until a completion or the timeout (`None`: no limit). Does not
    /// sleep when completions are waiting already.
    ///
    /// # Errors
    /// The ring is broken.
    pub(super) fn submit_and_wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        if self.has_completions() && self.uring.submission().is_empty() {
            return Ok(());
        }
        if self.has_completions() || timeout == Some(Duration::ZERO) {
            return self.submit();
        }
        let result = match timeout {
            None => self.uring.submit_and_wait(1),
            Some(timeout) => {
                let timespec = Timespec::from(timeout);
                self.uring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&timespec))
            }
        };
        forgive(result.map(drop))
    }

    /// A command of the ublk driver that names the whole of `buffer`. Its queue stays open until the command has come
    /// back: that is when the queue counts as drained.
    #[cfg(feature = "ublk")]
    pub(super) fn ublk(&mut self, entry: squeue::Entry, buffer: BufferRef, context: C) {
        buffer.forget_crc();
        let key = self.slots.insert(Slot { context, memory: Memory::Buffer(buffer), _fd: None });
        self.push(&entry.user_data(key as u64));
    }

    fn start(&mut self, entry: squeue::Entry, fd: &Rc<OwnedFd>, memory: Memory, context: C) {
        let key = self.slots.insert(Slot { context, memory, _fd: Some(Rc::clone(fd)) });
        self.push(&entry.user_data(key as u64));
    }

    fn push(&mut self, entry: &squeue::Entry) {
        loop {
            // SAFETY: everything the entry points at is owned by its slot (`start`) and stays where it is until
            // `next_completion` takes the slot: pool memory and the boxes do not move, and nobody else may change them.
            // JUSTIFICATION: the interface of io_uring is raw pointers; this is the one place where they are handed in.
            let pushed = unsafe { self.uring.submission().push(entry) };
            if pushed.is_ok() {
                return;
            }
            // Full: the kernel takes them all, unless its completion queue has run over; then make room there.
            if self.submit().is_err() {
                tracing::error!("io_uring does not take submissions");
            }
            self.reap();
        }
    }
}

impl<C> Drop for Ring<C> {
    fn drop(&mut self) {
        if !self.slots.is_empty() {
            let cancel = opcode::AsyncCancel2::new(CancelBuilder::any()).build().user_data(NO_SLOT);
            self.push(&cancel);
        }
        let wait = Duration::from_millis(100);
        let mut rounds_left = DRAIN_LIMIT.as_millis() / wait.as_millis();
        while !self.slots.is_empty() && rounds_left > 0 {
            rounds_left -= 1;
            if self.submit_and_wait(Some(wait)).is_err() {
                break;
            }
            self.reap();
            while self.next_completion().is_some() {}
        }
        if self.slots.is_empty() {
            // SAFETY: dropped once, here, and not used afterwards.
            // JUSTIFICATION: the other arm must be able to leak; `ManuallyDrop` is how `std` spells that.
            unsafe { ManuallyDrop::drop(&mut self.slots) };
        } else {
            tracing::error!(operations = self.slots.len(), "IO does not end; its memory is given up");
        }
    }
}

impl<C> fmt::Debug for Ring<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ring").field("in_flight", &self.slots.len()).finish_non_exhaustive()
    }
}

/// Best flags first, then what older kernels have.
fn build() -> Result<IoUring, RingError> {
    let mut builders = [IoUring::builder(), IoUring::builder(), IoUring::builder()];
    let [best, middle, plain] = &mut builders;
    // 6.1: completions are posted only when we ask, on our own thread, in batches.
    best.setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag().setup_submit_all();
    // 5.19.
    middle.setup_coop_taskrun().setup_taskrun_flag().setup_submit_all();
    plain.setup_clamp();
    let mut last = None;
    for builder in &mut builders {
        match builder.setup_cqsize(COMPLETION_ENTRIES).build(SUBMISSION_ENTRIES) {
            Ok(uring) => return Ok(uring),
            Err(error) => match error.raw_os_error() {
                Some(libc::EINVAL) => last = Some(error),
                Some(errno @ (libc::EPERM | libc::ENOSYS)) => {
                    return Err(RingError::Forbidden { errno: nix::errno::Errno::from_raw(errno) });
                }
                Some(libc::ENOMEM) => return Err(RingError::Memory(error)),
                _ => return Err(RingError::Setup(error)),
            },
        }
    }
    Err(last.map_or(RingError::TooOld, RingError::Setup))
}

/// Errors of `io_uring_enter` that only mean "look at the completions".
fn forgive(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN)
            ) =>
        {
            Ok(())
        }
        other => other,
    }
}

fn length(bytes: usize) -> u32 {
    // Buffers end at `MAX_BUFFER_BYTES`, and `BufferRef::address` has checked the bounds.
    u32::try_from(bytes).expect("a buffer is far smaller than 4 GiB")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::buffers::{Account, BufferPool, MIN_POOL_BYTES};
    use std::os::unix::net::UnixStream;

    fn wait<C>(ring: &mut Ring<C>) -> Completion<C> {
        loop {
            ring.reap();
            if let Some(completion) = ring.next_completion() {
                return completion;
            }
            ring.submit_and_wait(Some(Duration::from_secs(10))).unwrap();
        }
    }

    #[test]
    fn files_are_written_read_and_synced() {
        let pool = BufferPool::new(MIN_POOL_BYTES);
        let mut ring = Ring::new().unwrap();
        let fd = Rc::new(OwnedFd::from(tempfile::tempfile().unwrap()));
        let buffer = pool.take(4096, Account::FrontEnd).unwrap();
        buffer.copy_in(0, &[7; 4096]);
        let span = FileSpan { buffer_offset: 0, len: 4096, file_offset: 8192 };
        ring.write(&fd, buffer.clone(), span, true, "write");
        assert_eq!(wait(&mut ring).result, 4096);
        ring.datasync(&fd, "sync");
        assert_eq!(wait(&mut ring).result, 0);
        buffer.fill_zero();
        ring.read(&fd, buffer.clone(), span, "read");
        let read = wait(&mut ring);
        assert_eq!((read.context, read.result), ("read", 4096));
        assert_eq!(buffer.to_bytes(), vec![7; 4096]);
        ring.fallocate(&fd, libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, 8192, 4096, "punch");
        assert_eq!(wait(&mut ring).result, 0);
        ring.read(&fd, buffer.clone(), span, "read");
        wait(&mut ring);
        assert!(buffer.is_zero());
        assert_eq!(ring.in_flight(), 0);
    }

    #[test]
    fn more_operations_than_the_queue_holds_are_all_done() {
        let pool = BufferPool::new(MIN_POOL_BYTES);
        let mut ring = Ring::new().unwrap();
        let fd = Rc::new(OwnedFd::from(tempfile::tempfile().unwrap()));
        let buffer = pool.take(4096, Account::FrontEnd).unwrap();
        let count = 3 * SUBMISSION_ENTRIES as usize;
        for nr in 0..count {
            let span = FileSpan { buffer_offset: 0, len: 4096, file_offset: nr as u64 * 4096 };
            ring.write(&fd, buffer.clone(), span, false, nr);
        }
        let mut seen: Vec<_> = (0..count)
            .map(|_| {
                let done = wait(&mut ring);
                assert_eq!(done.result, 4096);
                done.context
            })
            .collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..count).collect::<Vec<_>>());
    }

    #[test]
    fn a_dropped_ring_takes_its_operations_back() {
        let (near, far) = UnixStream::pair().unwrap();
        let fd = Rc::new(OwnedFd::from(near));
        let mut ring = Ring::new().unwrap();
        let memory = RecvMemory::new(4096);
        let plan = RecvPlan { payload: 0..0, staging: 0..4096, wait_all: false, poll_first: true };
        ring.recv(&fd, memory, &plan, ());
        ring.submit().unwrap();
        assert_eq!(Rc::strong_count(&fd), 2);
        drop(ring);
        assert_eq!(Rc::strong_count(&fd), 1, "the receive was cancelled and its slot given back");
        drop(far);
    }

    #[test]
    fn a_timeout_is_no_error() {
        let mut ring: Ring<()> = Ring::new().unwrap();
        ring.submit_and_wait(Some(Duration::from_millis(1))).unwrap();
        ring.reap();
        assert!(ring.next_completion().is_none());
    }
}
