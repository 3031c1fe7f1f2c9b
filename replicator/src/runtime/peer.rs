//! One transport to the peer on the ring: frames in, frames out.
//!
//! A frame that breaks the protocol ends the transport with its reason; nothing of it reaches the core. Payloads are
//! received into pool buffers and proven by their CRC, if they have one, once; a payload that is sent on or sent twice is not summed
//! again (`BufferRef::crc`).
//!
//! ```text
//!   Open --Disconnect--> Closing (what was queued leaves, then the peer's end or the deadline) --> Dead
//!     \------ end of stream, error, bad frame ------------------------------------------------> Dead
//! ```
use super::buffers::{Account, BufferPool};
use super::memory::SendPayload;
use super::ring::Ring;
use super::stream::{Received, Receiver, Sender, Sent};
use crate::core::event::{LostReason, Payload, SessionId};
use crate::units::{SECTOR_BYTES, Time};
use lockstep_proto::frame::{self, FrameError, HEAD_BYTES, Head};
use lockstep_proto::{Message, PayloadKind};
use nix::sys::socket::{Shutdown, shutdown};
use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;

/// How long a transport may take to send its last frames.
const CLOSE_LIMIT_MS: u64 = 1000;

/// A transport.
#[derive(Debug)]
pub(super) struct Peer {
    pub(super) session: SessionId,
    /// Blocks are sent with a CRC (`data-integrity-alg`); what comes is checked if it has one.
    sums_blocks: bool,
    fd: Rc<OwnedFd>,
    receiver: Receiver,
    sender: Sender,
    state: State,
    /// A frame whose payload is on its way, or waits for a buffer.
    frame: Option<(Head, Message)>,
    /// Why the next receive has to wait: no buffer.
    stalled: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Open,
    Closing { deadline: Time, said_end: bool },
    Dead,
}

impl Peer {
    /// A transport over a connected, blocking-mode socket.
    pub(super) fn new(session: SessionId, socket: OwnedFd, sums_blocks: bool) -> Self {
        Self {
            session,
            sums_blocks,
            fd: Rc::new(socket),
            receiver: Receiver::new(),
            sender: Sender::new(),
            state: State::Open,
            frame: None,
            stalled: false,
        }
    }

    /// Whether nothing of it is left in the ring.
    pub(super) fn is_gone(&self) -> bool {
        self.state == State::Dead && !self.receiver.is_armed() && !self.sender.is_armed()
    }

    /// When [`tick`](Self::tick) is due.
    pub(super) fn deadline(&self) -> Option<Time> {
        match self.state {
            State::Closing { deadline, .. } => Some(deadline),
            State::Open | State::Dead => None,
        }
    }

    /// Queues a frame.
    ///
    /// # Errors
    /// The core made a message no peer may accept: our bug, and the transport cannot go on.
    pub(super) fn send(
        &mut self,
        message: &Message,
        payload: Payload,
        pool: &BufferPool,
    ) -> Result<(), FrameError> {
        if self.state != State::Open {
            return Ok(());
        }
        let (len, crc, payload) = match payload {
            Payload::None => (0, Some(0), SendPayload::None),
            Payload::Buffer { id, len } => {
                let buffer = pool.get(id);
                let len = usize::try_from(len.0 * SECTOR_BYTES).unwrap_or(usize::MAX);
                (len, self.sums_blocks.then(|| buffer.crc(len)), SendPayload::Buffer(buffer, len))
            }
            Payload::Bytes(bytes) => {
                (bytes.len(), Some(frame::payload_crc(&bytes)), SendPayload::Bytes(bytes))
            }
        };
        self.sender.push_with(|out| frame::encode_head(message, len, crc, out), payload)
    }

    /// The next complete frame among what was received.
    ///
    /// # Errors
    /// The peer broke the protocol.
    pub(super) fn next_frame(&mut self, pool: &BufferPool) -> Result<Option<(Message, Payload)>, LostReason> {
        self.stalled = false;
        if self.state != State::Open || self.receiver.is_armed() {
            return Ok(None);
        }
        if self.frame.is_none() {
            self.frame = self.next_head().map_err(|error| LostReason::Protocol(error.to_string()))?;
        }
        let Some((head, _)) = &self.frame else { return Ok(None) };
        let len = head.payload_len();
        let head = *head;
        let payload = if len == 0 {
            match head.kind().payload_kind() {
                PayloadKind::BitmapWords => Payload::Bytes(bytes::Bytes::new()),
                PayloadKind::None | PayloadKind::Blocks => Payload::None,
            }
        } else {
            if !self.receiver.in_payload() {
                let Some(buffer) = pool.take(len, Account::Peer) else {
                    self.stalled = true;
                    return Ok(None);
                };
                self.receiver.begin_payload(buffer);
            }
            let Some(buffer) = self.receiver.take_payload() else { return Ok(None) };
            let checked = head.check_payload(|| buffer.crc(len));
            checked.map_err(|error| LostReason::Protocol(error.to_string()))?;
            match head.kind().payload_kind() {
                PayloadKind::BitmapWords => Payload::Bytes(buffer.to_bytes()),
                PayloadKind::None | PayloadKind::Blocks => {
                    let len = crate::units::SectorCount(head.payload_sectors());
                    Payload::Buffer { id: pool.hand_to_core(buffer), len }
                }
            }
        };
        Ok(self.frame.take().map(|(_, message)| (message, payload)))
    }

    fn next_head(&mut self) -> Result<Option<(Head, Message)>, FrameError> {
        let staged = self.receiver.staged();
        let Some(bytes) = staged.first_chunk::<HEAD_BYTES>() else { return Ok(None) };
        let head = Head::decode(bytes)?;
        let end = HEAD_BYTES + head.header_len();
        let Some(header) = staged.get(HEAD_BYTES..end) else { return Ok(None) };
        let message = head.decode_message(header)?;
        self.receiver.consume(end);
        Ok(Some((head, message)))
    }

    /// Whether a frame has come in part.
    pub(super) fn is_amid_frame(&self) -> bool {
        self.frame.is_some() || self.receiver.in_payload()
    }

    /// Whether it waits for a buffer.
    pub(super) fn is_stalled(&self) -> bool {
        self.stalled
    }

    /// Starts the next receive, once every complete frame was taken.
    pub(super) fn arm_receive<C>(&mut self, ring: &mut Ring<C>, context: C) {
        if self.state == State::Dead || self.stalled || self.receiver.is_armed() {
            return;
        }
        if self.state != State::Open {
            self.receiver.discard();
        }
        self.receiver.arm(ring, &self.fd, context);
    }

    /// A receive came back. `Some`: the transport is lost.
    pub(super) fn on_received(
        &mut self,
        memory: Box<super::memory::RecvMemory>,
        result: i32,
        more_waiting: bool,
    ) -> Option<LostReason> {
        let reason = match self.receiver.on_completion(memory, result, more_waiting) {
            Received::Some => return None,
            Received::End => "the peer closed the connection".to_owned(),
            Received::Failed(errno) => format!("receive: {}", errno.desc()),
        };
        self.lose(reason)
    }

    /// Sends what is queued. `Some`: the transport is lost.
    pub(super) fn arm_send<C>(&mut self, ring: &mut Ring<C>, context: C) -> Option<LostReason> {
        if self.state == State::Dead {
            return None;
        }
        let sent = self.sender.arm(ring, &self.fd, context);
        self.after_send(sent)
    }

    /// Whether blocks wait to be sent: the peer works on them while this node does.
    pub(super) fn has_blocks_to_send(&self) -> bool {
        self.sender.has_payload()
    }

    /// A send came back from the ring. `Some`: the transport is lost.
    pub(super) fn on_sent<C>(
        &mut self,
        ring: &mut Ring<C>,
        memory: Box<super::memory::SendMemory>,
        result: i32,
        context: C,
    ) -> Option<LostReason> {
        let sent = self.sender.on_completion(ring, &self.fd, memory, result, context);
        self.after_send(sent)
    }

    fn after_send(&mut self, sent: Sent) -> Option<LostReason> {
        match sent {
            Sent::All | Sent::Part => {
                if let State::Closing { said_end: false, deadline } = self.state
                    && self.sender.is_idle()
                {
                    // Half-closed, so that the peer can read all of it; closing at once could reset the connection.
                    self.shut(Shutdown::Write);
                    self.state = State::Closing { said_end: true, deadline };
                }
                None
            }
            Sent::Failed(errno) => self.lose(format!("send: {}", errno.desc())),
        }
    }

    fn lose(&mut self, reason: String) -> Option<LostReason> {
        let was_open = self.state == State::Open;
        self.kill();
        was_open.then_some(LostReason::Closed(reason))
    }

    /// Lets what is queued leave, then closes.
    pub(super) fn close(&mut self, now: Time) {
        if self.state == State::Open {
            self.state = State::Closing { deadline: now.plus_ms(CLOSE_LIMIT_MS), said_end: false };
            self.frame = None;
            self.stalled = false;
        }
    }

    /// Ends it here and now; what is in the ring comes back with errors.
    pub(super) fn kill(&mut self) {
        if self.state != State::Dead {
            self.state = State::Dead;
            self.frame = None;
            self.stalled = false;
            self.sender.discard();
            self.receiver.discard();
            self.shut(Shutdown::Both);
        }
    }

    /// Time has passed.
    pub(super) fn tick(&mut self, now: Time) {
        if self.deadline().is_some_and(|deadline| deadline <= now) {
            self.kill();
        }
    }

    fn shut(&self, how: Shutdown) {
        if let Err(errno) = shutdown(self.fd.as_raw_fd(), how) {
            tracing::debug!(session = self.session.0, %errno, "shutdown");
        }
    }
}
