//! What the examples and the device test share: a small ring loop around a queue, and the life of a device around that.
//!
//! The loop answers each request at once. Like a replicator it keeps more buffers than tags and hands over **another** one at every
//! commit that carries no read data, so that a mistake about who owns which buffer shows up as wrong data.

use std::collections::VecDeque;
use std::error::Error;
use std::thread::{self, JoinHandle};

use io_uring::IoUring;
use lockstep_ublk_frontend::{Device, DeviceConfig, IoFailure, IoRequest, Op, Queue, QueueEvent};

/// Buffers beyond one per tag: how far a finished write's buffer is kept away from reuse.
const SPARE_BUFFERS: usize = 8;

/// What a device does with a request. `data` is the request's part of its buffer, empty for requests without data.
pub(crate) trait Backend: Send + 'static {
    /// Does the request; a read fills `data`.
    fn handle(&mut self, request: &IoRequest, data: &mut [u8]) -> Result<(), IoFailure>;
}

/// How the example sets its ring up; the queue works in either.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RingKind {
    /// No flags.
    Plain,
    /// One submitter, completion work only when it asks for completions: what a data-path loop wants (Linux 6.1).
    Deferred,
}

/// A started device and the thread that drives its ring.
#[derive(Debug)]
pub(crate) struct Running {
    device: Device,
    ring_thread: JoinHandle<()>,
}

impl Running {
    /// Adds the device, serves it on a thread of its own, and starts it.
    pub(crate) fn start(
        config: DeviceConfig,
        kind: RingKind,
        backend: impl Backend,
    ) -> Result<Self, Box<dyn Error>> {
        let (device, queue) = Device::add(config)?;
        let ring_thread =
            thread::Builder::new().name("ring".to_owned()).spawn(move || serve(queue, kind, backend))?;
        device.start()?;
        Ok(Self { device, ring_thread })
    }

    /// The control handle.
    pub(crate) fn device(&self) -> &Device {
        &self.device
    }

    /// Stops the device, waits for its queue to drain, deletes it.
    pub(crate) fn finish(self) -> Result<(), Box<dyn Error>> {
        self.device.stop()?;
        self.ring_thread.join().map_err(|_| "the ring thread panicked")?;
        self.device.delete()?;
        Ok(())
    }
}

/// Drives the queue until it is drained.
fn serve(mut queue: Queue, kind: RingKind, mut backend: impl Backend) {
    let depth = queue.depth();
    let buffer_bytes = usize::try_from(queue.max_io_bytes()).expect("32 MiB fit");
    let mut buffers: Vec<Vec<u8>> =
        (0..usize::from(depth) + SPARE_BUFFERS).map(|_| vec![0; buffer_bytes]).collect();
    // buffer_of[tag]: the buffer named in the tag's last command. The others wait in `free`, oldest first.
    let mut buffer_of: Vec<usize> = (0..usize::from(depth)).collect();
    let mut free: VecDeque<usize> = (usize::from(depth)..buffers.len()).collect();

    let mut builder = IoUring::builder();
    if kind == RingKind::Deferred {
        builder.setup_single_issuer().setup_defer_taskrun();
    }
    let mut ring: IoUring = builder.build(u32::from(depth)).expect("a ring for the example");
    for tag in 0..depth {
        let buffer = address(&mut buffers[buffer_of[usize::from(tag)]]);
        let entry = queue.fetch_sqe(tag, buffer).user_data(u64::from(tag));
        push(&mut ring, &entry);
    }

    let mut completions = Vec::new();
    while !queue.is_drained() {
        ring.submit_and_wait(1).expect("the ring works");
        completions.extend(ring.completion().map(|cqe| (cqe.user_data(), cqe.result())));
        for (user_data, res) in completions.drain(..) {
            let tag = u16::try_from(user_data).expect("only tags are submitted");
            let (result, op) = match queue.on_cqe(tag, res) {
                QueueEvent::Request(request) => {
                    let len = if request.op.has_data() {
                        usize::try_from(request.len_bytes()).expect("fits")
                    } else {
                        0
                    };
                    let buffer = &mut buffers[buffer_of[usize::from(tag)]];
                    (backend.handle(&request, &mut buffer[..len]), Some(request.op))
                }
                QueueEvent::Unserviceable { failure, .. } => (Err(failure), None),
                QueueEvent::Aborted { .. } => continue,
                QueueEvent::Refused { tag, errno } => {
                    eprintln!("tag {tag} refused: errno {errno}");
                    continue;
                }
            };
            if op != Some(Op::Read) {
                let next =
                    free.pop_front().expect("spare buffers never run out: one comes back for each taken");
                free.push_back(std::mem::replace(&mut buffer_of[usize::from(tag)], next));
            }
            let buffer = address(&mut buffers[buffer_of[usize::from(tag)]]);
            let entry = queue.commit_sqe(tag, result, buffer).user_data(u64::from(tag));
            push(&mut ring, &entry);
        }
    }
}

fn address(buffer: &mut [u8]) -> u64 {
    buffer.as_mut_ptr().expose_provenance() as u64
}

fn push(ring: &mut IoUring, entry: &io_uring::squeue::Entry) {
    // SAFETY: the entry names a buffer of `serve`, which is long enough, lives until the queue is drained (a panic in between ends
    // the process or leaks nothing but this thread's memory after the ring is closed), and is touched only while the
    // queue says that the request is ours.
    // JUSTIFICATION: io-uring cannot know how long a command uses its memory.
    let pushed = unsafe { ring.submission().push(entry) };
    pushed.expect("the ring has an entry for each tag");
}
