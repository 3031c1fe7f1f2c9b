//! Memory a socket operation points at while it is in the ring: the scatter list of a receive, the gather list of a send.
//!
//! Both are boxed and move into the ring's slab with the operation (`ring.rs`), so that no pointer in them can dangle.
//! Nothing here is unsafe: pointers are made here and followed only by the kernel.
use super::buffers::BufferRef;
use bytes::Bytes;
use nix::libc::{iovec, msghdr};
use std::fmt;
use std::ops::Range;

/// Most pieces the kernel takes in one send (`UIO_MAXIOV`).
const MAX_PIECES: usize = 1024;

/// Bytes that arrive: `[rest of a payload -> its pool buffer][staging area for the heads that follow]`.
pub(super) struct RecvMemory {
    staging: Box<[u8]>,
    payload: Option<BufferRef>,
    pieces: [iovec; 2],
    header: msghdr,
}

/// Where the next bytes go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RecvPlan {
    /// Part of the payload buffer that is still missing; empty without one.
    pub(super) payload: Range<usize>,
    /// Free part of the staging area; may be empty.
    pub(super) staging: Range<usize>,
    /// Do not complete before everything is there.
    pub(super) wait_all: bool,
    /// Nothing was waiting a moment ago: do not try before the socket is readable.
    pub(super) poll_first: bool,
}

impl RecvMemory {
    /// With a staging area of `staging_bytes`.
    pub(super) fn new(staging_bytes: usize) -> Box<Self> {
        Box::new(Self {
            staging: vec![0; staging_bytes].into_boxed_slice(),
            payload: None,
            pieces: [EMPTY_PIECE; 2],
            header: empty_header(),
        })
    }

    /// The staging area.
    pub(super) fn staging(&mut self) -> &mut [u8] {
        &mut self.staging
    }

    /// The staging area, to look at.
    pub(super) fn staged(&self) -> &[u8] {
        &self.staging
    }

    /// The payload buffer being filled.
    pub(super) fn payload(&mut self) -> &mut Option<BufferRef> {
        &mut self.payload
    }

    /// Builds the scatter list of `plan` and returns its header for the kernel.
    ///
    /// # Panics
    /// The plan is outside the memory: our bug.
    pub(super) fn prepare(&mut self, plan: &RecvPlan) -> *mut msghdr {
        let mut used = 0;
        if !plan.payload.is_empty() {
            let payload = self.payload.as_ref().expect("a plan with payload has its buffer");
            payload.forget_crc();
            let address = payload.address(plan.payload.start, plan.payload.len());
            self.pieces[used] = iovec { iov_base: address.cast(), iov_len: plan.payload.len() };
            used += 1;
        }
        if !plan.staging.is_empty() {
            let free = &mut self.staging[plan.staging.clone()];
            self.pieces[used] = iovec { iov_base: free.as_mut_ptr().cast(), iov_len: free.len() };
            used += 1;
        }
        assert!(used > 0, "a receive needs a place to put bytes");
        self.header.msg_iov = self.pieces.as_mut_ptr();
        self.header.msg_iovlen = used as _;
        &raw mut self.header
    }
}

impl fmt::Debug for RecvMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RecvMemory").field("payload", &self.payload).finish_non_exhaustive()
    }
}

/// Bytes that leave: heads one after the other in one vector, payloads where they are.
pub(super) struct SendMemory {
    heads: Vec<u8>,
    parts: Vec<Part>,
    pieces: Vec<iovec>,
    /// Pieces before this one have left.
    done: usize,
    header: msghdr,
    /// Frames in here; the owner counts with it.
    pub(super) frames: usize,
    /// One of them has a payload.
    pub(super) has_payload: bool,
}

/// One piece of a send.
enum Part {
    Heads(Range<usize>),
    Buffer(BufferRef, usize),
    Bytes(Bytes),
}

impl SendMemory {
    /// Empty.
    pub(super) fn new() -> Box<Self> {
        Box::new(Self {
            heads: Vec::with_capacity(16 << 10),
            parts: Vec::with_capacity(128),
            pieces: Vec::with_capacity(128),
            done: 0,
            header: empty_header(),
            frames: 0,
            has_payload: false,
        })
    }

    /// Adds one frame: `head` appends its head to the vector it is given; the payload follows.
    pub(super) fn push_with<E>(
        &mut self,
        head: impl FnOnce(&mut Vec<u8>) -> Result<(), E>,
        payload: SendPayload,
    ) -> Result<(), E> {
        debug_assert!(self.pieces.is_empty(), "a send under way takes no more frames");
        let start = self.heads.len();
        head(&mut self.heads)?;
        let end = self.heads.len();
        self.frames += 1;
        if let Some(Part::Heads(range)) = self.parts.last_mut() {
            // Frames without payload lie next to each other and go as one piece.
            range.end = end;
        } else if start < end {
            self.parts.push(Part::Heads(start..end));
        }
        self.has_payload |= !matches!(payload, SendPayload::None);
        match payload {
            SendPayload::None => {}
            SendPayload::Buffer(buffer, len) => self.parts.push(Part::Buffer(buffer, len)),
            SendPayload::Bytes(bytes) if bytes.is_empty() => {}
            SendPayload::Bytes(bytes) => self.parts.push(Part::Bytes(bytes)),
        }
        Ok(())
    }

    /// Whether no frame is in here.
    pub(super) fn is_empty(&self) -> bool {
        self.frames == 0
    }

    /// Builds the gather list and returns its header for the kernel.
    pub(super) fn prepare(&mut self) -> *const msghdr {
        if self.pieces.is_empty() {
            for part in &self.parts {
                let (address, len) = match part {
                    Part::Heads(range) => (self.heads[range.clone()].as_ptr().cast_mut(), range.len()),
                    Part::Buffer(buffer, len) => (buffer.address(0, *len), *len),
                    Part::Bytes(bytes) => (bytes.as_ptr().cast_mut(), bytes.len()),
                };
                self.pieces.push(iovec { iov_base: address.cast(), iov_len: len });
            }
        }
        let end = self.pieces.len().min(self.done + MAX_PIECES);
        let left = &mut self.pieces[self.done..end];
        self.header.msg_iov = left.as_mut_ptr();
        self.header.msg_iovlen = left.len() as _;
        &raw const self.header
    }

    /// `sent` bytes have left. Whether that was all.
    pub(super) fn advance(&mut self, mut sent: usize) -> bool {
        while let Some(piece) = self.pieces.get_mut(self.done) {
            if sent < piece.iov_len {
                piece.iov_base = piece.iov_base.cast::<u8>().wrapping_add(sent).cast();
                piece.iov_len -= sent;
                return false;
            }
            sent -= piece.iov_len;
            self.done += 1;
        }
        true
    }

    /// Lets go of everything and keeps the room.
    pub(super) fn clear(&mut self) {
        self.heads.clear();
        self.parts.clear();
        self.pieces.clear();
        self.done = 0;
        self.frames = 0;
        self.has_payload = false;
    }
}

impl fmt::Debug for SendMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SendMemory").field("frames", &self.frames).finish_non_exhaustive()
    }
}

/// What follows a head.
#[derive(Debug)]
pub(super) enum SendPayload {
    /// Nothing.
    None,
    /// This many bytes from the start of a pool buffer.
    Buffer(BufferRef, usize),
    /// These bytes.
    Bytes(Bytes),
}

const EMPTY_PIECE: iovec = iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };

fn empty_header() -> msghdr {
    msghdr {
        msg_name: std::ptr::null_mut(),
        msg_namelen: 0,
        msg_iov: std::ptr::null_mut(),
        msg_iovlen: 0,
        msg_control: std::ptr::null_mut(),
        msg_controllen: 0,
        msg_flags: 0,
    }
}
