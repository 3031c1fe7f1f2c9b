//! The pool of payload buffers of one resource: aligned for `O_DIRECT`, counted, bounded.
//!
//! A `BufferRef` is one count on a buffer. Whoever needs the bytes holds one: the core (through
//! `BufferPool::hand_to_core`), every disk IO and every frame in the ring. The memory goes back to the free list of
//! its size class when the last count is dropped, so it is never reused under an IO; and an operation in the ring
//! owns its count until the kernel is done with it (see `ring.rs`).
//!
//! The pool belongs to one thread. Its total is bounded, and three accounts share that total: what front ends hold,
//! what comes in from the peer, and what the disk reads on its own for the peer. An empty account stops only the
//! source that fills it, so that two sources cannot starve each other. Metadata blocks are never refused: the core
//! bounds them.
use crate::core::event::{BufferId, Digest};
use bytes::Bytes;
use nix::libc;
use std::alloc::{Layout, alloc, dealloc};
use std::cell::{Cell, RefCell};
use std::fmt;
use std::ptr::NonNull;
use std::rc::{Rc, Weak};

/// Alignment of every buffer, bytes: a page, which satisfies `O_DIRECT` on every disk.
pub const BUFFER_ALIGN: usize = 4096;
/// Size classes, bytes.
pub const CLASS_BYTES: [usize; 5] = [4 << 10, 16 << 10, 64 << 10, 256 << 10, MAX_BUFFER_BYTES];
/// Largest buffer, bytes: one application request.
pub const MAX_BUFFER_BYTES: usize = 1 << 20;
/// Default bound on all payload buffers of a resource, bytes.
pub const DEFAULT_POOL_BYTES: usize = 256 << 20;
/// Smallest accepted bound, bytes: every account holds a few requests of the largest size.
pub const MIN_POOL_BYTES: usize = 16 << 20;

const _: () = assert!(MAX_BUFFER_BYTES >= lockstep_proto::limits::MAX_PAYLOAD_BYTES);

/// Who pays for a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Account {
    /// Requests of front ends: three eighths of the total.
    FrontEnd,
    /// Payload received from the peer: three eighths.
    Peer,
    /// Reads of the own disk on behalf of the peer: the rest.
    Disk,
    /// Metadata blocks: not limited here.
    Meta,
}

const NR_ACCOUNTS: usize = 4;

/// The pool; clones share it.
#[derive(Clone)]
pub(super) struct BufferPool {
    shared: Rc<Shared>,
}

struct Shared {
    /// Every buffer ever made; the position is its [`BufferId`].
    buffers: RefCell<Vec<Rc<Inner>>>,
    /// Ids of unused buffers, per class.
    free: [RefCell<Vec<u32>>; CLASS_BYTES.len()],
    /// Ids whose memory was given back.
    vacant: RefCell<Vec<u32>>,
    allocated_bytes: Cell<usize>,
    limit_bytes: usize,
    used_bytes: [Cell<usize>; NR_ACCOUNTS],
    account_limit_bytes: [usize; NR_ACCOUNTS],
    /// A buffer came back since the flag was last taken.
    returned: Cell<bool>,
}

struct Inner {
    index: u32,
    /// Dangling while the id is vacant.
    memory: Cell<NonNull<u8>>,
    class: Cell<usize>,
    vacant: Cell<bool>,
    /// Counts held by anybody, the core included.
    users: Cell<u32>,
    /// Counts of these held by the core.
    core_users: Cell<u32>,
    account: Cell<Account>,
    /// Bytes of contents.
    len: Cell<usize>,
    /// Length of a piece from the start, and its CRC-32C, once somebody computed it.
    crc: Cell<Option<(usize, u32)>>,
    pool: Weak<Shared>,
}

/// One count on a buffer.
pub(super) struct BufferRef {
    inner: Rc<Inner>,
}

impl BufferPool {
    /// An empty pool that grows to `limit_bytes` (at least [`MIN_POOL_BYTES`]).
    pub(super) fn new(limit_bytes: usize) -> Self {
        let limit_bytes = limit_bytes.max(MIN_POOL_BYTES);
        let eighth = limit_bytes / 8;
        Self {
            shared: Rc::new(Shared {
                buffers: RefCell::default(),
                free: std::array::from_fn(|_| RefCell::default()),
                vacant: RefCell::default(),
                allocated_bytes: Cell::new(0),
                limit_bytes,
                used_bytes: std::array::from_fn(|_| Cell::new(0)),
                account_limit_bytes: [3 * eighth, 3 * eighth, 2 * eighth, usize::MAX],
                returned: Cell::new(false),
            }),
        }
    }

    /// A buffer whose contents are `len_bytes` long (1..=[`MAX_BUFFER_BYTES`]) and undefined; `None` when the account
    /// is empty or the system has no memory: try again when [`take_returned`](Self::take_returned) says so.
    pub(super) fn take(&self, len_bytes: usize, account: Account) -> Option<BufferRef> {
        assert!(len_bytes > 0, "a buffer holds at least a byte");
        let class = CLASS_BYTES.iter().position(|&bytes| bytes >= len_bytes)?;
        let bytes = CLASS_BYTES[class];
        let used = &self.shared.used_bytes[account as usize];
        if used.get() + bytes > self.shared.account_limit_bytes[account as usize] {
            return None;
        }
        let recycled = self.shared.free[class].borrow_mut().pop();
        let index = match recycled {
            Some(index) => index,
            None => self.grow(class)?,
        };
        let inner = Rc::clone(&self.shared.buffers.borrow()[index as usize]);
        debug_assert_eq!(inner.users.get(), 0, "buffer {index} was on the free list");
        used.set(used.get() + bytes);
        inner.users.set(1);
        inner.account.set(account);
        inner.len.set(len_bytes);
        inner.crc.set(None);
        Some(BufferRef { inner })
    }

    /// Another count on a buffer the core names.
    ///
    /// # Panics
    /// The core named a buffer that nobody holds: our bug.
    pub(super) fn get(&self, id: BufferId) -> BufferRef {
        let buffers = self.shared.buffers.borrow();
        let inner = buffers.get(id.0 as usize).filter(|inner| inner.users.get() > 0);
        let Some(inner) = inner else { panic!("the core named {id:?}, which nobody holds") };
        inner.users.set(inner.users.get() + 1);
        BufferRef { inner: Rc::clone(inner) }
    }

    /// Turns a count into one of the core's; it ends with [`release_from_core`](Self::release_from_core).
    #[expect(clippy::needless_pass_by_value, reason = "the count moves to the core")]
    pub(super) fn hand_to_core(&self, buffer: BufferRef) -> BufferId {
        let inner = &buffer.inner;
        inner.core_users.set(inner.core_users.get() + 1);
        // The core's count stays in `users` after `buffer` drops its own.
        inner.users.set(inner.users.get() + 1);
        buffer.id()
    }

    /// The core passes one of its counts on.
    ///
    /// # Panics
    /// The core passed on a buffer it does not hold: our bug.
    pub(super) fn take_from_core(&self, id: BufferId) -> BufferRef {
        let inner = self.shared.buffers.borrow().get(id.0 as usize).map(Rc::clone);
        let Some(inner) = inner.filter(|inner| inner.core_users.get() > 0) else {
            panic!("the core let go of {id:?}, which it does not hold")
        };
        inner.core_users.set(inner.core_users.get() - 1);
        BufferRef { inner }
    }

    /// The core lets go of one of its counts.
    ///
    /// # Panics
    /// The core let go of a buffer it does not hold: our bug.
    pub(super) fn release_from_core(&self, id: BufferId) {
        drop(self.take_from_core(id));
    }

    /// Whether a buffer came back since the last call: a stalled source may try again.
    pub(super) fn take_returned(&self) -> bool {
        self.shared.returned.replace(false)
    }

    /// Whether front ends can ever hold this many bytes for one request, with half of their account left to others.
    pub(super) fn could_hold(&self, len_bytes: u32) -> bool {
        let half = self.shared.account_limit_bytes[Account::FrontEnd as usize] / 2;
        usize::try_from(len_bytes).is_ok_and(|len| len <= half.max(MAX_BUFFER_BYTES))
    }

    /// Bytes held by an account.
    #[cfg(test)]
    pub(super) fn used_bytes(&self, account: Account) -> usize {
        self.shared.used_bytes[account as usize].get()
    }

    /// Makes one more buffer of `class`, at the cost of unused buffers of other classes when the pool is full.
    fn grow(&self, class: usize) -> Option<u32> {
        let bytes = CLASS_BYTES[class];
        let shared = &self.shared;
        for victim in (0..CLASS_BYTES.len()).rev() {
            while shared.allocated_bytes.get() + bytes > shared.limit_bytes {
                let unused = shared.free[victim].borrow_mut().pop();
                let Some(index) = unused else { break };
                let inner = Rc::clone(&shared.buffers.borrow()[index as usize]);
                inner.free_memory();
                shared.allocated_bytes.set(shared.allocated_bytes.get() - CLASS_BYTES[victim]);
                shared.vacant.borrow_mut().push(index);
            }
        }
        let memory = allocate(bytes)?;
        shared.allocated_bytes.set(shared.allocated_bytes.get() + bytes);
        let vacant = shared.vacant.borrow_mut().pop();
        let mut buffers = shared.buffers.borrow_mut();
        if let Some(index) = vacant {
            let inner = &buffers[index as usize];
            inner.memory.set(memory);
            inner.class.set(class);
            inner.vacant.set(false);
            return Some(index);
        }
        let index = u32::try_from(buffers.len()).ok()?;
        buffers.push(Rc::new(Inner {
            index,
            memory: Cell::new(memory),
            class: Cell::new(class),
            vacant: Cell::new(false),
            users: Cell::new(0),
            core_users: Cell::new(0),
            account: Cell::new(Account::Meta),
            len: Cell::new(0),
            crc: Cell::new(None),
            pool: Rc::downgrade(shared),
        }));
        Some(index)
    }
}

impl fmt::Debug for BufferPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BufferPool")
            .field("allocated_bytes", &self.shared.allocated_bytes.get())
            .finish_non_exhaustive()
    }
}

impl BufferRef {
    /// What the core calls it.
    pub(super) fn id(&self) -> BufferId {
        BufferId(self.inner.index)
    }

    /// Bytes of contents.
    pub(super) fn len(&self) -> usize {
        self.inner.len.get()
    }

    /// Bytes of memory.
    pub(super) fn capacity(&self) -> usize {
        CLASS_BYTES[self.inner.class.get()]
    }

    /// Whether anybody else counts on it.
    #[cfg(feature = "ublk")]
    pub(super) fn is_shared(&self) -> bool {
        self.inner.users.get() > 1
    }

    /// Says how long the contents are, after the kernel has filled it.
    ///
    /// # Panics
    /// Longer than the memory, or empty: our bug.
    #[cfg(feature = "ublk")]
    pub(super) fn set_len(&self, len_bytes: usize) {
        assert!(
            (1..=self.capacity()).contains(&len_bytes),
            "{len_bytes} bytes in a buffer of {}",
            self.capacity()
        );
        self.inner.len.set(len_bytes);
        self.forget_crc();
    }

    /// Copies the first `len` bytes of another buffer in.
    ///
    /// # Panics
    /// They do not fit, or both are the same buffer: our bug.
    #[cfg(feature = "ublk")]
    pub(super) fn copy_from(&self, other: &Self, len: usize) {
        assert_ne!(self.id(), other.id(), "a buffer is copied into itself");
        let from = other.address(0, len);
        let to = self.address(0, len);
        self.forget_crc();
        // SAFETY: `address` checked the bounds of both, which are different memory; see `copy_in`.
        // JUSTIFICATION: as in `copy_in`.
        unsafe { std::ptr::copy_nonoverlapping(from, to, len) };
    }

    /// Address of the byte at `offset`, for the kernel. The memory lives as long as this count.
    ///
    /// # Panics
    /// `offset + len` is beyond the memory: our bug.
    pub(super) fn address(&self, offset: usize, len: usize) -> *mut u8 {
        assert!(offset + len <= self.capacity(), "{offset}+{len} in a buffer of {}", self.capacity());
        self.inner.memory.get().as_ptr().wrapping_add(offset)
    }

    /// Forgets the cached CRC: the kernel is about to write into the buffer.
    pub(super) fn forget_crc(&self) {
        self.inner.crc.set(None);
    }

    /// CRC-32C of the first `len` bytes of contents; computed once, then remembered until they change.
    ///
    /// # Panics
    /// The contents are shorter: our bug.
    pub(super) fn crc(&self, len: usize) -> u32 {
        if let Some((known_len, crc)) = self.inner.crc.get()
            && known_len == len
        {
            return crc;
        }
        let crc = lockstep_proto::frame::payload_crc(&self.contents()[..len]);
        self.inner.crc.set(Some((len, crc)));
        crc
    }

    /// Whether the contents are all zeroes.
    pub(super) fn is_zero(&self) -> bool {
        // A buffer whose ends are zero is worth the whole look; most data fails in the first words.
        // SAFETY: any bytes are valid as integers.
        // JUSTIFICATION: the aligned middle is compared 16 bytes at a time; `align_to` is the standard way to get it.
        let (head, middle, tail) = unsafe { self.contents().align_to::<u128>() };
        middle.iter().all(|&word| word == 0) && head.iter().chain(tail).all(|&byte| byte == 0)
    }

    /// A digest of the first `len` bytes, strong enough to stand for them.
    pub(super) fn digest(&self, len: usize) -> Digest {
        let contents = self.contents();
        let hash = blake3::hash(&contents[..len.min(contents.len())]);
        let mut words = [0; 4];
        for (word, bytes) in words.iter_mut().zip(hash.as_bytes().chunks_exact(8)) {
            *word = bytes.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
        }
        Digest(words)
    }

    /// Copies bytes in.
    ///
    /// # Panics
    /// They do not fit: our bug.
    pub(super) fn copy_in(&self, offset: usize, bytes: &[u8]) {
        let to = self.address(offset, bytes.len());
        self.forget_crc();
        // SAFETY: `address` checked the bounds; the memory is ours while `self` lives, and no other slice of it exists
        // on this thread because none leaves this file.
        // JUSTIFICATION: pool memory is shared by counts, so there is no exclusive reference to write through.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
    }

    /// Fills the contents with zeroes.
    pub(super) fn fill_zero(&self) {
        let to = self.address(0, self.len());
        self.forget_crc();
        // SAFETY: as in `copy_in`.
        // JUSTIFICATION: as in `copy_in`.
        unsafe { std::ptr::write_bytes(to, 0, self.len()) };
    }

    /// The contents as shared bytes (a copy).
    pub(super) fn to_bytes(&self) -> Bytes {
        Bytes::copy_from_slice(self.contents())
    }

    /// The contents. Private: no slice leaves this file, so no write of this thread can happen under it.
    fn contents(&self) -> &[u8] {
        let from = self.address(0, self.len());
        // SAFETY: the memory was zeroed when it was allocated, so it is initialised; it lives as long as `self`; every
        // caller in this file drops the slice before anything can write. The kernel writes only while an operation of
        // the ring says so, and nobody looks at the contents before that operation has completed.
        // JUSTIFICATION: a checksum needs to see the bytes.
        unsafe { std::slice::from_raw_parts(from, self.len()) }
    }
}

impl Clone for BufferRef {
    fn clone(&self) -> Self {
        self.inner.users.set(self.inner.users.get() + 1);
        Self { inner: Rc::clone(&self.inner) }
    }
}

impl Drop for BufferRef {
    fn drop(&mut self) {
        let inner = &self.inner;
        let users = inner.users.get() - 1;
        inner.users.set(users);
        if users > 0 {
            return;
        }
        debug_assert_eq!(inner.core_users.get(), 0, "the core's counts are among the users");
        // Without a pool the memory goes with the last `Rc`.
        if let Some(pool) = inner.pool.upgrade() {
            let used = &pool.used_bytes[inner.account.get() as usize];
            used.set(used.get() - CLASS_BYTES[inner.class.get()]);
            pool.free[inner.class.get()].borrow_mut().push(inner.index);
            pool.returned.set(true);
        }
    }
}

impl fmt::Debug for BufferRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "buffer {} of {} bytes", self.inner.index, self.len())
    }
}

impl Inner {
    fn free_memory(&self) {
        assert_eq!(self.users.get(), 0, "buffer {} is in use", self.index);
        if self.vacant.replace(true) {
            return;
        }
        let layout = layout(CLASS_BYTES[self.class.get()]);
        let memory = self.memory.replace(NonNull::dangling());
        // SAFETY: the memory came from `allocate` with this layout, and `vacant` says it was not given back before.
        // JUSTIFICATION: `std` has no safe owner of memory with a chosen alignment.
        unsafe { dealloc(memory.as_ptr(), layout) };
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.users.set(0);
        self.free_memory();
    }
}

fn layout(bytes: usize) -> Layout {
    // Sizes are the constants of `CLASS_BYTES`, far from overflow; the alignment is a power of two.
    Layout::from_size_align(bytes, BUFFER_ALIGN).expect("constant sizes and alignment make a layout")
}

fn allocate(bytes: usize) -> Option<NonNull<u8>> {
    // SAFETY: the size is one of `CLASS_BYTES`, none of which is zero.
    // JUSTIFICATION: `std` has no safe owner of memory with a chosen alignment.
    let memory = NonNull::new(unsafe { alloc(layout(bytes)) })?;
    // SAFETY: just allocated with that size.
    // JUSTIFICATION: the memory must be initialised before a slice of it is made; it also faults the pages in here
    // and not on the data path.
    unsafe { libc::memset(memory.as_ptr().cast(), 0, bytes) };
    Some(memory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_is_reused_only_after_its_last_count() {
        let pool = BufferPool::new(MIN_POOL_BYTES);
        let first = pool.take(4096, Account::FrontEnd).unwrap();
        let id = pool.hand_to_core(first.clone());
        let second = pool.take(4096, Account::FrontEnd).unwrap();
        assert_ne!(second.id(), id);
        drop(first);
        assert!(!pool.take_returned());
        let io = pool.get(id);
        pool.release_from_core(id);
        let third = pool.take(4096, Account::FrontEnd).unwrap();
        assert_ne!(third.id(), id, "an IO still holds it");
        drop(io);
        assert!(pool.take_returned());
        assert_eq!(pool.take(100, Account::FrontEnd).unwrap().id(), id);
    }

    #[test]
    fn an_empty_account_does_not_starve_the_others() {
        let pool = BufferPool::new(MIN_POOL_BYTES);
        let mut held = Vec::new();
        while let Some(buffer) = pool.take(1 << 20, Account::FrontEnd) {
            held.push(buffer);
        }
        assert_eq!(held.len(), 6);
        assert!(pool.take(4096, Account::Peer).is_some());
        assert!(pool.take(4096, Account::Disk).is_some());
        held.pop();
        assert_eq!(pool.used_bytes(Account::FrontEnd), 5 << 20);
        assert!(pool.take(4096, Account::FrontEnd).is_some());
    }

    #[test]
    fn classes_give_memory_to_each_other() {
        let pool = BufferPool::new(MIN_POOL_BYTES);
        let small: Vec<_> = std::iter::from_fn(|| pool.take(4096, Account::FrontEnd)).collect();
        assert_eq!(small.len() * 4096, 6 << 20);
        drop(small);
        for account in [Account::FrontEnd, Account::Peer, Account::Disk] {
            let large: Vec<_> = std::iter::from_fn(|| pool.take(1 << 20, account)).collect();
            assert!(large.len() >= 4);
            assert!(pool.shared.allocated_bytes.get() <= MIN_POOL_BYTES);
        }
        assert_eq!(pool.used_bytes(Account::Peer), 0);
        // Vacant ids come back to life.
        let small: Vec<_> = std::iter::from_fn(|| pool.take(4096, Account::FrontEnd)).collect();
        assert_eq!(small.len() * 4096, 6 << 20);
    }

    #[test]
    fn the_crc_follows_the_contents() {
        let pool = BufferPool::new(MIN_POOL_BYTES);
        let buffer = pool.take(9, Account::Peer).unwrap();
        buffer.copy_in(0, b"123456789");
        assert_eq!(buffer.crc(9), 0xe306_9283);
        assert_eq!(buffer.crc(9), 0xe306_9283);
        assert_ne!(buffer.crc(8), 0xe306_9283);
        buffer.copy_in(0, b"2");
        assert_ne!(buffer.crc(9), 0xe306_9283);
        assert_eq!(&buffer.to_bytes()[..3], b"223");
        assert_ne!(buffer.digest(9), buffer.digest(8));
        assert_eq!(buffer.digest(9), buffer.digest(9));
        assert!(!buffer.is_zero());
        buffer.fill_zero();
        assert!(buffer.is_zero());
        assert_eq!(buffer.to_bytes().len(), 9);
    }

    #[test]
    fn buffers_outlive_their_pool() {
        let pool = BufferPool::new(MIN_POOL_BYTES);
        let buffer = pool.take(5000, Account::Disk).unwrap();
        drop(pool);
        buffer.copy_in(4999, &[1]);
        assert!(!buffer.is_zero());
        assert_eq!(buffer.capacity(), 16 << 10);
    }
}
