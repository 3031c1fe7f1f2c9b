//! One stream socket on the ring: what both the peer's connection and a client's are made of.
//!
//! Receiving: heads are parsed in a staging area; once a head has announced a payload, its rest goes straight into the
//! pool buffer, together with the heads behind it. While payloads are small the staging area is large, so that one
//! receive brings many frames (copying 4 KiB costs less than a system call); once payloads are large it shrinks to a
//! head, so that hardly any payload lands in it.
//!
//! Sending: frames gather in one [`SendMemory`] while another one is in the kernel; one send is in flight, so order is
//! that of [`Sender::push_with`].
use super::buffers::BufferRef;
use super::memory::{RecvMemory, RecvPlan, SendMemory, SendPayload};
use super::ring::Ring;
use nix::errno::Errno;
use std::os::fd::OwnedFd;
use std::rc::Rc;

/// Size of the staging area, bytes: holds the largest head of either protocol many times over.
pub(super) const STAGING_BYTES: usize = 64 << 10;
/// Part of it in use while payloads are large, bytes: a few heads.
const STAGING_SMALL_BYTES: usize = 256;
/// Payloads from here on count as large, bytes.
const LARGE_PAYLOAD_BYTES: usize = 32 << 10;
/// A rest of payload from here on is waited for as a whole, bytes: one wake-up instead of one per segment.
const WAIT_ALL_BYTES: usize = 64 << 10;

/// The receiving half.
#[derive(Debug)]
pub(super) struct Receiver {
    /// `None` while a receive is in the ring.
    memory: Option<Box<RecvMemory>>,
    /// Bytes of the staging area not yet parsed.
    start: usize,
    end: usize,
    /// Bytes of the payload that are there, and that there will be.
    filled: usize,
    wanted: usize,
    /// Where the receive in the ring puts its bytes.
    plan: Option<RecvPlan>,
    large: bool,
    more_waiting: bool,
}

/// What a finished receive brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Received {
    /// Bytes.
    Some,
    /// The other side has closed.
    End,
    /// Failed.
    Failed(Errno),
}

impl Receiver {
    /// With nothing received.
    pub(super) fn new() -> Self {
        Self {
            memory: Some(RecvMemory::new(STAGING_BYTES)),
            start: 0,
            end: 0,
            filled: 0,
            wanted: 0,
            plan: None,
            large: false,
            more_waiting: true,
        }
    }

    /// Whether a receive is in the ring.
    pub(super) fn is_armed(&self) -> bool {
        self.memory.is_none()
    }

    /// Bytes not yet consumed; empty while a receive is in the ring.
    pub(super) fn staged(&self) -> &[u8] {
        self.memory.as_ref().map_or(&[], |memory| &memory.staged()[self.start..self.end])
    }

    /// Drops `len` bytes from the front of [`staged`](Self::staged).
    pub(super) fn consume(&mut self, len: usize) {
        assert!(self.start + len <= self.end, "consumed more than was staged");
        self.start += len;
    }

    /// The bytes that follow are the contents of `buffer`.
    pub(super) fn begin_payload(&mut self, buffer: BufferRef) {
        let memory = self.memory.as_mut().expect("heads are parsed only between receives");
        assert!(memory.payload().is_none(), "one payload at a time");
        self.wanted = buffer.len();
        let staged = (self.end - self.start).min(self.wanted);
        buffer.copy_in(0, &memory.staged()[self.start..self.start + staged]);
        self.start += staged;
        self.filled = staged;
        self.large = self.wanted >= LARGE_PAYLOAD_BYTES;
        *memory.payload() = Some(buffer);
    }

    /// Whether a payload has begun and was not taken.
    pub(super) fn in_payload(&self) -> bool {
        self.wanted > 0
    }

    /// The payload, once it is complete.
    pub(super) fn take_payload(&mut self) -> Option<BufferRef> {
        if self.wanted == 0 || self.filled < self.wanted {
            return None;
        }
        self.wanted = 0;
        self.filled = 0;
        self.memory.as_mut()?.payload().take()
    }

    /// Starts a receive unless one is in the ring.
    pub(super) fn arm<C>(&mut self, ring: &mut Ring<C>, fd: &Rc<OwnedFd>, context: C) {
        let Some(mut memory) = self.memory.take() else { return };
        // What is left in the staging area is a piece of a head: move it to the front.
        if self.start > 0 {
            memory.staging().copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        let rest = self.filled..self.wanted;
        let wait_all = rest.len() >= WAIT_ALL_BYTES;
        let limit =
            if self.large { (self.end + STAGING_SMALL_BYTES).min(STAGING_BYTES) } else { STAGING_BYTES };
        let plan = RecvPlan {
            payload: rest,
            staging: if wait_all { self.end..self.end } else { self.end..limit },
            wait_all,
            poll_first: !self.more_waiting,
        };
        ring.recv(fd, memory, &plan, context);
        self.plan = Some(plan);
    }

    /// Forgets what was received, unless a receive is in the ring.
    pub(super) fn discard(&mut self) {
        if let Some(memory) = &mut self.memory {
            *memory.payload() = None;
            self.start = 0;
            self.end = 0;
            self.filled = 0;
            self.wanted = 0;
        }
    }

    /// Puts bytes in front that were read before the ring had the socket.
    ///
    /// # Panics
    /// Something was received already, or they do not fit: our bug.
    pub(super) fn preload(&mut self, bytes: &[u8]) {
        let memory = self.memory.as_mut().expect("nothing is in the ring yet");
        assert_eq!(self.end, 0, "nothing was received yet");
        memory.staging()[..bytes.len()].copy_from_slice(bytes);
        self.end = bytes.len();
    }

    /// A receive came back.
    pub(super) fn on_completion(
        &mut self,
        memory: Box<RecvMemory>,
        result: i32,
        more_waiting: bool,
    ) -> Received {
        self.memory = Some(memory);
        let plan = self.plan.take();
        let Ok(received) = usize::try_from(result) else {
            let errno = Errno::from_raw(-result);
            self.more_waiting = true;
            return if matches!(errno, Errno::EAGAIN | Errno::EINTR) {
                Received::Some
            } else {
                Received::Failed(errno)
            };
        };
        if received == 0 {
            return Received::End;
        }
        self.more_waiting = more_waiting;
        let to_payload = plan.map_or(0, |plan| plan.payload.len()).min(received);
        self.filled += to_payload;
        self.end += received - to_payload;
        Received::Some
    }
}

/// The sending half.
#[derive(Debug)]
pub(super) struct Sender {
    /// Frames for the next send.
    gathering: Box<SendMemory>,
    /// The other memory; `None` while it is in the ring.
    spare: Option<Box<SendMemory>>,
    /// Frames that have not left.
    pending: usize,
}

/// What a finished send means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sent {
    /// All of them have left.
    All,
    /// A part has left; the rest is in the ring again.
    Part,
    /// Failed.
    Failed(Errno),
}

impl Sender {
    /// With nothing to send.
    pub(super) fn new() -> Self {
        Self { gathering: SendMemory::new(), spare: Some(SendMemory::new()), pending: 0 }
    }

    /// Queues one frame; it leaves with the next [`arm`](Self::arm) that finds the socket free.
    ///
    /// # Errors
    /// That of `head`; then nothing is queued.
    pub(super) fn push_with<E>(
        &mut self,
        head: impl FnOnce(&mut Vec<u8>) -> Result<(), E>,
        payload: SendPayload,
    ) -> Result<(), E> {
        self.gathering.push_with(head, payload)?;
        self.pending += 1;
        Ok(())
    }

    /// Frames that have not left.
    pub(super) fn pending(&self) -> usize {
        self.pending
    }

    /// Whether a send is in the ring.
    pub(super) fn is_armed(&self) -> bool {
        self.spare.is_none()
    }

    /// Whether a frame with a payload waits.
    pub(super) fn has_payload(&self) -> bool {
        self.gathering.has_payload
    }

    /// Whether nothing waits and nothing is in the ring.
    pub(super) fn is_idle(&self) -> bool {
        self.gathering.is_empty() && !self.is_armed()
    }

    /// Sends what was gathered, unless a send is in the ring. What the socket takes at once leaves here and now, which
    /// spares a completion; the rest goes to the ring.
    pub(super) fn arm<C>(&mut self, ring: &mut Ring<C>, fd: &Rc<OwnedFd>, context: C) -> Sent {
        if self.gathering.is_empty() {
            return Sent::All;
        }
        let Some(spare) = self.spare.take() else { return Sent::Part };
        let mut full = std::mem::replace(&mut self.gathering, spare);
        let sent = Ring::<C>::send_now(fd, &mut full);
        self.on_sent(ring, fd, full, sent, context)
    }

    /// A send came back from the ring.
    pub(super) fn on_completion<C>(
        &mut self,
        ring: &mut Ring<C>,
        fd: &Rc<OwnedFd>,
        memory: Box<SendMemory>,
        result: i32,
        context: C,
    ) -> Sent {
        let sent = usize::try_from(result).map_err(|_| Errno::from_raw(-result));
        self.on_sent(ring, fd, memory, sent, context)
    }

    fn on_sent<C>(
        &mut self,
        ring: &mut Ring<C>,
        fd: &Rc<OwnedFd>,
        mut memory: Box<SendMemory>,
        sent: Result<usize, Errno>,
        context: C,
    ) -> Sent {
        let done = match sent {
            Ok(sent) => memory.advance(sent),
            Err(Errno::EAGAIN | Errno::EINTR) => false,
            Err(errno) => {
                self.recycle(memory);
                return Sent::Failed(errno);
            }
        };
        if done {
            self.recycle(memory);
            Sent::All
        } else {
            ring.send(fd, memory, context);
            Sent::Part
        }
    }

    fn recycle(&mut self, mut memory: Box<SendMemory>) {
        self.pending -= memory.frames;
        memory.clear();
        self.spare = Some(memory);
    }

    /// Forgets what was gathered.
    pub(super) fn discard(&mut self) {
        self.pending -= self.gathering.frames;
        self.gathering.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::buffers::{Account, BufferPool, MIN_POOL_BYTES};
    use crate::runtime::ring::{Completion, Memory};
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    fn wait(ring: &mut Ring<()>) -> Completion<()> {
        loop {
            ring.reap();
            if let Some(completion) = ring.next_completion() {
                return completion;
            }
            ring.submit_and_wait(Some(Duration::from_secs(10))).unwrap();
        }
    }

    fn receive(receiver: &mut Receiver, ring: &mut Ring<()>, fd: &Rc<OwnedFd>) -> Received {
        receiver.arm(ring, fd, ());
        let done = wait(ring);
        let Memory::Recv(memory) = done.memory else { panic!("{:?}", done.memory) };
        receiver.on_completion(memory, done.result, done.more_waiting)
    }

    /// A stream of `[length: u32][payload]` arrives whole whatever the sizes: payloads that fit the staging area, that
    /// do not, and that switch between the two ways to receive.
    #[test]
    fn heads_and_payloads_are_told_apart_whatever_their_sizes() {
        let (near, mut far) = UnixStream::pair().unwrap();
        let fd = Rc::new(OwnedFd::from(near));
        let sizes =
            [1, 512, 4096, 70_000, 4096, 1 << 20, 1 << 20, 300, 40_000, 65_536, 5, 1 << 19, 4096, 4096];
        let writer = std::thread::spawn(move || {
            for (nr, &size) in sizes.iter().enumerate() {
                far.write_all(&u32::try_from(size).unwrap().to_be_bytes()).unwrap();
                far.write_all(&vec![u8::try_from(nr + 1).unwrap(); size]).unwrap();
            }
        });
        let pool = BufferPool::new(MIN_POOL_BYTES);
        let mut ring = Ring::new().unwrap();
        let mut receiver = Receiver::new();
        let mut got = Vec::new();
        let mut end = Received::Some;
        while end == Received::Some {
            loop {
                if let Some(payload) = receiver.take_payload() {
                    let bytes = payload.to_bytes();
                    assert!(
                        bytes.iter().all(|&byte| usize::from(byte) == got.len() + 1),
                        "payload {}",
                        got.len()
                    );
                    got.push(bytes.len());
                } else if receiver.in_payload() {
                    break;
                } else if let Some(head) = receiver.staged().first_chunk::<4>() {
                    let len = u32::from_be_bytes(*head) as usize;
                    receiver.consume(4);
                    receiver.begin_payload(pool.take(len, Account::Peer).unwrap());
                } else {
                    break;
                }
            }
            end = receive(&mut receiver, &mut ring, &fd);
        }
        assert_eq!(end, Received::End);
        assert_eq!(got, sizes);
        writer.join().unwrap();
    }

    #[test]
    fn frames_leave_in_order_when_the_socket_is_slow() {
        let (near, mut far) = UnixStream::pair().unwrap();
        let fd = Rc::new(OwnedFd::from(near));
        let pool = BufferPool::new(MIN_POOL_BYTES);
        let mut ring = Ring::new().unwrap();
        let mut sender = Sender::new();
        let mut expected = Vec::new();
        for nr in 0..1500u32 {
            let payload = if nr % 100 == 7 {
                let buffer = pool.take(200_000, Account::FrontEnd).unwrap();
                buffer.copy_in(0, &vec![u8::try_from(nr / 100).unwrap(); 200_000]);
                SendPayload::Buffer(buffer, 100_000)
            } else if nr % 2 == 0 {
                SendPayload::Bytes(bytes::Bytes::from(vec![9; 3]))
            } else {
                SendPayload::None
            };
            expected.extend_from_slice(&nr.to_be_bytes());
            match &payload {
                SendPayload::Buffer(..) => expected.extend(vec![u8::try_from(nr / 100).unwrap(); 100_000]),
                SendPayload::Bytes(bytes) => expected.extend_from_slice(bytes),
                SendPayload::None => {}
            }
            let head = |out: &mut Vec<u8>| -> Result<(), ()> {
                out.extend_from_slice(&nr.to_be_bytes());
                Ok(())
            };
            sender.push_with(head, payload).unwrap();
            if nr == 700 {
                // The socket is full at some point: the rest goes through the ring.
                assert_eq!(sender.arm(&mut ring, &fd, ()), Sent::Part);
            }
        }
        assert!(sender.is_armed());
        assert_eq!(sender.pending(), 1500);
        let len = expected.len();
        let reader = std::thread::spawn(move || {
            let mut bytes = vec![0; len];
            far.read_exact(&mut bytes).unwrap();
            bytes
        });
        while !sender.is_idle() {
            if sender.is_armed() {
                let done = wait(&mut ring);
                let Memory::Send(memory) = done.memory else { panic!("{:?}", done.memory) };
                assert!(!matches!(
                    sender.on_completion(&mut ring, &fd, memory, done.result, ()),
                    Sent::Failed(_)
                ));
            }
            sender.arm(&mut ring, &fd, ());
        }
        assert_eq!(sender.pending(), 0);
        assert!(reader.join().unwrap() == expected);
        assert_eq!(pool.used_bytes(Account::FrontEnd), 0);
    }
}
