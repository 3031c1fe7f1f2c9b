//! One ublk disk on the ring: from the driver's tags to requests of the core and back.
//!
//! ```text
//!   in the ring ──completion──> at the core ──answer──> answered ──commit──> in the ring
//!                     └── refused at once ─────────────────^
//! ```
//!
//! The kernel copies the data of a write into a tag's buffer before the tag completes, and the data of a read out of the buffer
//! that the commit names; the buffer of the commit is also the one of the tag's next request. So a commit names the buffer
//! the tag had, if nobody else counts on it any more. If somebody does (the bytes of a write that is done may still wait in
//! the peer's socket), it names a fresh one, and the old one returns to the pool when the last count is dropped. When the
//! pool has no fresh one, the answer waits; the old buffer is let go, so that what is waited for can come back.
//!
//! One request is one request of the core: the limits told to the driver ([`MAX_IO_BYTES`], [`MAX_DISCARD_BYTES`]) are
//! within the core's.
//!
//! Such a disk does not count as a user of the volume: the kernel does not tell the server who opens it. Whoever demotes
//! looks for users first (`frontend/ublk.rs`).
use super::buffers::{Account, BufferPool, BufferRef};
use super::nbd_conn::{FrontRequest, Origin};
use super::ring::Ring;
use crate::core::event::{Input, Refusal, Request, RequestError, RequestId, RequestOp};
use crate::units::{BlockRange, Sector, SectorCount, VolumeNr};
use lockstep_proto::limits::{MAX_REQUEST_SECTORS, MAX_TRIM_SECTORS};
use lockstep_ublk_frontend::{IoFailure, IoRequest, Op, Queue, QueueEvent};
use slab::Slab;
use std::collections::VecDeque;

/// Largest read or write to ask the driver for, bytes: a size class of the pool, since each tag holds one buffer of it.
pub const MAX_IO_BYTES: u32 = 256 << 10;
/// Largest discard or write-zeroes to ask the driver for, bytes: what the core takes.
pub const MAX_DISCARD_BYTES: u32 = 128 << 20;
/// Most tags of a queue: 32 MiB of buffers.
const MAX_DEPTH: usize = 128;

const _: () = assert!(MAX_IO_BYTES as u64 <= MAX_REQUEST_SECTORS * 512);
const _: () = assert!(MAX_DISCARD_BYTES as u64 <= MAX_TRIM_SECTORS * 512);

/// Tags for each queue of a resource with `nr_volumes` volumes and `buffer_bytes` of buffers, such that all tags together
/// hold at most a quarter of the buffers; the rest of what front ends may hold is for buffers on their way out.
#[must_use]
pub fn queue_depth(buffer_bytes: usize, nr_volumes: usize) -> u16 {
    let tags = buffer_bytes / 4 / MAX_IO_BYTES as usize / nr_volumes.max(1);
    // Invariant: at most 128.
    u16::try_from(tags.clamp(1, MAX_DEPTH)).unwrap_or(1)
}

/// A disk and where each of its tags is.
#[derive(Debug)]
pub(super) struct UblkDisk {
    pub(super) volume: VolumeNr,
    queue: Queue,
    tags: Box<[Tag]>,
    /// Tags whose answer is not yet in the ring.
    answered: VecDeque<u16>,
}

/// What a tag needs between a request and its commit. In the ring it needs nothing: the ring has its buffer.
#[derive(Debug, Default)]
struct Tag {
    request: Option<IoRequest>,
    buffer: Option<BufferRef>,
    /// Data of a read that is not in `buffer`.
    data: Option<BufferRef>,
    result: Option<Result<(), IoFailure>>,
}

impl UblkDisk {
    /// Takes a buffer for each tag.
    ///
    /// # Errors
    /// The pool has too few; the queue is dropped.
    pub(super) fn new(volume: VolumeNr, queue: Queue, pool: &BufferPool) -> Result<Self, Refusal> {
        let bytes = buffer_bytes(&queue);
        let buffers: Option<Vec<_>> =
            (0..queue.depth()).map(|_| pool.take(bytes, Account::FrontEnd)).collect();
        let Some(buffers) = buffers else {
            return Err(Refusal {
                number: 122,
                text: "Out of memory".into(),
                facts: vec![format!(
                    "{} buffers of {bytes} bytes for the ublk disk of volume {} are not to be had",
                    queue.depth(),
                    volume.0
                )],
                advice: "give the resource more buffers, or disconnect its NBD clients".into(),
            });
        };
        let tags = buffers.into_iter().map(|buffer| Tag { buffer: Some(buffer), ..Tag::default() }).collect();
        Ok(Self { volume, queue, tags, answered: VecDeque::new() })
    }

    /// Asks for the first request of every tag.
    pub(super) fn fetch_all<C>(&mut self, ring: &mut Ring<C>, context: impl Fn(u16) -> C) {
        for tag in 0..self.queue.depth() {
            if let Some(buffer) = self.tags[usize::from(tag)].buffer.take() {
                let entry = self.queue.fetch_sqe(tag, address(&buffer));
                ring.ublk(entry, buffer, context(tag));
            }
        }
    }

    /// A command has come back; `index` is the disk's own key. What the core has to do, if anything.
    pub(super) fn on_completion(
        &mut self,
        index: usize,
        tag: u16,
        buffer: BufferRef,
        result: i32,
        fronts: &mut Slab<FrontRequest>,
    ) -> Option<Input> {
        let request = match self.queue.on_cqe(tag, result) {
            QueueEvent::Request(request) => request,
            QueueEvent::Unserviceable { tag, failure } => {
                self.tags[usize::from(tag)].buffer = Some(buffer);
                self.answer_now(tag, Err(failure));
                return None;
            }
            QueueEvent::Aborted { .. } => return None,
            QueueEvent::Refused { tag, errno } => {
                tracing::error!(volume = self.volume.0, tag, errno, "the ublk driver has refused a command");
                return None;
            }
        };
        let slot = &mut self.tags[usize::from(tag)];
        slot.request = Some(request);
        let core_buffer = request.op.has_data().then(|| buffer.clone());
        slot.buffer = Some(buffer);
        let origin = Origin::Ublk { disk: index, tag };
        if request.op == Op::Flush {
            let key = fronts.insert(FrontRequest { origin, _buffer: None });
            return Some(Input::Flush { id: RequestId(key as u64), volume: self.volume });
        }
        let range = BlockRange::new(Sector(request.start_sector), SectorCount(request.nr_sectors.into()));
        let Some(range) = range else {
            self.answer_now(tag, Err(IoFailure::Io));
            return None;
        };
        if let Some(buffer) = &core_buffer {
            // The queue has checked that it fits.
            buffer.set_len(usize::try_from(range.len().bytes()).unwrap_or(usize::MAX));
        }
        let id = core_buffer.as_ref().map(BufferRef::id);
        let key = fronts.insert(FrontRequest { origin, _buffer: core_buffer });
        Some(Input::Request(Request {
            id: RequestId(key as u64),
            volume: self.volume,
            op: core_op(request.op),
            range,
            fua: request.fua,
            buffer: id,
        }))
    }

    /// The core has answered; `data` is there when a read came from elsewhere than its own buffer. The core's own count of
    /// the request's buffer is gone already.
    pub(super) fn on_answer(&mut self, tag: u16, result: Result<(), RequestError>, data: Option<BufferRef>) {
        self.tags[usize::from(tag)].data = data;
        self.answer_now(tag, result.map_err(failure));
    }

    fn answer_now(&mut self, tag: u16, result: Result<(), IoFailure>) {
        self.tags[usize::from(tag)].result = Some(result);
        self.answered.push_back(tag);
    }

    /// Commits what is answered, as far as there are buffers.
    pub(super) fn commit_all<C>(
        &mut self,
        ring: &mut Ring<C>,
        pool: &BufferPool,
        context: impl Fn(u16) -> C,
    ) {
        let bytes = buffer_bytes(&self.queue);
        while let Some(&tag) = self.answered.front() {
            let slot = &mut self.tags[usize::from(tag)];
            let Some(buffer) = slot.buffer_for_commit(|| pool.take(bytes, Account::FrontEnd)) else { return };
            self.answered.pop_front();
            let Tag { result, .. } = std::mem::take(slot);
            let result = result.expect("a tag is listed as answered when its result is set");
            let entry = self.queue.commit_sqe(tag, result, address(&buffer));
            ring.ublk(entry, buffer, context(tag));
        }
    }

    /// Whether the device was stopped and nothing of it is left.
    pub(super) fn is_gone(&self) -> bool {
        self.queue.is_drained()
    }
}

impl Tag {
    /// The buffer to name in the commit, with the data of a read in it; `None` while there is none to be had.
    fn buffer_for_commit(&mut self, fresh: impl FnOnce() -> Option<BufferRef>) -> Option<BufferRef> {
        let read_bytes = match (self.request, self.result) {
            (Some(request), Some(Ok(()))) if request.op == Op::Read => {
                usize::try_from(request.len_bytes()).unwrap_or(usize::MAX)
            }
            _ => 0,
        };
        let own = match self.buffer.take() {
            Some(own) if !own.is_shared() => own,
            Some(shared) => {
                if read_bytes > 0 && self.data.is_none() {
                    self.data = Some(shared);
                }
                fresh()?
            }
            None => fresh()?,
        };
        if let Some(data) = self.data.take().filter(|_| read_bytes > 0) {
            own.copy_from(&data, read_bytes);
        }
        Some(own)
    }
}

/// Bytes of every buffer of this queue.
fn buffer_bytes(queue: &Queue) -> usize {
    // At most 32 MiB.
    usize::try_from(queue.max_io_bytes()).unwrap_or(usize::MAX)
}

/// Address of the whole buffer, as the driver wants it.
fn address(buffer: &BufferRef) -> u64 {
    buffer.address(0, buffer.capacity()).expose_provenance() as u64
}

fn core_op(op: Op) -> RequestOp {
    match op {
        Op::Read => RequestOp::Read,
        Op::Write => RequestOp::Write,
        Op::WriteZeroes { no_unmap } => RequestOp::WriteZeroes { may_unmap: !no_unmap },
        Op::Discard => RequestOp::Discard,
        Op::Flush => unreachable!("a flush has no range and was handed on before"),
    }
}

fn failure(error: RequestError) -> IoFailure {
    match error {
        RequestError::NoSpace => IoFailure::NoSpace,
        RequestError::Unsupported => IoFailure::Unsupported,
        // The block layer has no words for the rest.
        RequestError::Io | RequestError::Invalid | RequestError::NotPrimary | RequestError::Shutdown => {
            IoFailure::Io
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::buffers::{BUFFER_ALIGN, MIN_POOL_BYTES};

    const BYTES: usize = MAX_IO_BYTES as usize;

    fn pool() -> BufferPool {
        BufferPool::new(MIN_POOL_BYTES)
    }

    fn take(pool: &BufferPool) -> BufferRef {
        pool.take(BYTES, Account::FrontEnd).unwrap()
    }

    fn answered(op: Op, buffer: &BufferRef) -> Tag {
        let request = IoRequest { tag: 0, op, start_sector: 8, nr_sectors: 8, fua: false };
        Tag { request: Some(request), buffer: Some(buffer.clone()), data: None, result: Some(Ok(())) }
    }

    #[test]
    fn tags_of_all_volumes_hold_a_quarter_of_the_buffers() {
        assert_eq!(queue_depth(256 << 20, 1), 128);
        assert_eq!(queue_depth(256 << 20, 4), 64);
        assert_eq!(queue_depth(MIN_POOL_BYTES, 1), 16);
        assert_eq!(queue_depth(MIN_POOL_BYTES, 1000), 1);
        assert_eq!(queue_depth(0, 0), 1);
    }

    #[test]
    fn a_buffer_nobody_else_holds_is_used_again() {
        let pool = pool();
        let buffer = take(&pool);
        let id = buffer.id();
        let mut tag = answered(Op::Write, &buffer);
        drop(buffer);
        let named = tag.buffer_for_commit(|| panic!("none is needed")).unwrap();
        assert_eq!(named.id(), id);
        assert_eq!(address(&named) % BUFFER_ALIGN as u64, 0);
    }

    #[test]
    fn a_write_that_is_still_being_sent_keeps_its_buffer() {
        let pool = pool();
        let in_the_socket = take(&pool);
        in_the_socket.copy_in(0, &[7; 4096]);
        let mut tag = answered(Op::Write, &in_the_socket);
        let named = tag.buffer_for_commit(|| pool.take(BYTES, Account::FrontEnd)).unwrap();
        assert_ne!(named.id(), in_the_socket.id());
        assert!(!in_the_socket.is_shared(), "the tag has let go of it");
    }

    #[test]
    fn an_answer_without_a_buffer_waits_and_lets_go_of_the_old_one() {
        let pool = pool();
        let in_the_socket = take(&pool);
        let mut tag = answered(Op::Write, &in_the_socket);
        assert!(tag.buffer_for_commit(|| None).is_none());
        assert!(!in_the_socket.is_shared());
        drop(in_the_socket);
        assert!(pool.take_returned(), "it is to be had again");
        assert!(tag.buffer_for_commit(|| pool.take(BYTES, Account::FrontEnd)).is_some());
    }

    #[test]
    fn data_that_the_peer_served_is_copied_into_the_own_buffer() {
        let pool = pool();
        let own = take(&pool);
        let id = own.id();
        let mut tag = answered(Op::Read, &own);
        drop(own);
        let served = pool.take(4096, Account::Peer).unwrap();
        served.copy_in(0, &[9; 4096]);
        tag.data = Some(served);
        let named = tag.buffer_for_commit(|| panic!("none is needed")).unwrap();
        named.set_len(4096);
        assert_eq!((named.id(), named.to_bytes().as_ref()), (id, [9; 4096].as_slice()));
    }

    #[test]
    fn a_read_into_a_buffer_that_somebody_holds_is_moved_even_after_a_wait() {
        let pool = pool();
        let own = take(&pool);
        own.copy_in(0, &[5; 4096]);
        let mut tag = answered(Op::Read, &own);
        assert!(tag.buffer_for_commit(|| None).is_none());
        let named = tag.buffer_for_commit(|| pool.take(BYTES, Account::FrontEnd)).unwrap();
        named.set_len(4096);
        assert_ne!(named.id(), own.id());
        assert_eq!(named.to_bytes().as_ref(), [5; 4096]);
    }

    #[test]
    fn what_the_core_says_reaches_the_block_layer() {
        assert_eq!(failure(RequestError::NoSpace), IoFailure::NoSpace);
        assert_eq!(failure(RequestError::NotPrimary), IoFailure::Io);
        assert_eq!(core_op(Op::WriteZeroes { no_unmap: true }), RequestOp::WriteZeroes { may_unmap: false });
    }
}
