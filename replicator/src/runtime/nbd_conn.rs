//! One NBD client in its transmission phase, on the ring.
//!
//! A request becomes pieces the core takes (`frontend::nbd::pieces`); the data of a write is received straight into
//! the buffers of its pieces, the data of a read leaves from the buffers it was read into. Requests of one client run
//! at the same time, up to [`MAX_COMMANDS`] including answers that have not left; then its socket is not read.
//!
//! A client that goes away leaves its requests to finish; its slot stays until the last one has (the driver sees to
//! that), so an answer never meets another client.
use super::buffers::{Account, BufferPool, BufferRef};
use super::memory::{RecvMemory, SendMemory, SendPayload};
use super::ring::Ring;
use super::stream::{Received, Receiver, Sender, Sent};
use crate::core::event::{Input, Request as CoreRequest, RequestError, RequestId, RequestOp};
use crate::frontend::nbd::transmission::Received as NbdReceived;
use crate::frontend::nbd::wire::{MAX_BLOCK_BYTES, REQUEST_BYTES};
use crate::frontend::nbd::{
    Command, Extent, NbdError, Negotiated, Piece, Pieces, Progress, Request, Session,
};
use crate::units::VolumeNr;
use nix::sys::socket::{Shutdown, shutdown};
use slab::Slab;
use std::convert::Infallible;
use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;

/// Most requests of one client that are unanswered, or whose answer has not left.
const MAX_COMMANDS: usize = 512;

/// Who asked for a request of the core; the key of the slab it lies in is its [`RequestId`].
#[derive(Debug)]
pub(super) struct FrontRequest {
    pub(super) origin: Origin,
    /// The core's count of the request's buffer.
    pub(super) _buffer: Option<BufferRef>,
}

/// A front end and its own name for a request. Another front end on this ring adds its variant.
#[derive(Clone, Copy, Debug)]
pub(super) enum Origin {
    /// A piece of a command of an NBD client.
    Nbd { client: usize, command: usize, piece: usize },
    /// A tag of a ublk disk.
    #[cfg(feature = "ublk")]
    Ublk { disk: usize, tag: u16 },
}

/// A client.
#[derive(Debug)]
pub(super) struct Client {
    pub(super) volume: VolumeNr,
    session: Session,
    fd: Rc<OwnedFd>,
    receiver: Receiver,
    sender: Sender,
    state: State,
    commands: Slab<Running>,
    /// Requests at the core, and lookups at a helper thread.
    outstanding: usize,
    /// The command whose pieces are being handed out.
    intake: Option<Intake>,
    /// A refused request whose data is being thrown away.
    refused: Option<Refused>,
    /// Not read, because a buffer is missing or there is too much to do.
    stalled: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Open,
    /// Said goodbye: answers what runs, reads no more.
    Draining,
    Dead,
}

#[derive(Debug)]
struct Refused {
    cookie: u64,
    error: NbdError,
    text: &'static str,
    skip_bytes: usize,
}

/// A command under way.
#[derive(Debug)]
struct Running {
    request: Request,
    progress: Option<Progress>,
    data: ReadData,
}

/// Buffers of a read, in order.
#[derive(Debug)]
enum ReadData {
    None,
    One(BufferRef),
    Many(Vec<BufferRef>),
}

/// A command whose pieces are not all at the core.
#[derive(Debug)]
struct Intake {
    command: usize,
    pieces: Pieces,
    piece: Option<Piece>,
    nr: usize,
}

/// What a client's command needs beside requests of the core.
#[derive(Debug)]
pub(super) enum Demand {
    /// Feed this to the core.
    Core(Input),
    /// Answer with [`Client::on_extents`].
    BlockStatus { command: usize, request: Request, block_min: u32, one: bool },
}

/// What clients share while their input is taken.
#[derive(Debug)]
pub(super) struct Shared<'a> {
    pub(super) pool: &'a BufferPool,
    pub(super) fronts: &'a mut Slab<FrontRequest>,
    /// The one client that may be collecting the buffers of a read larger than a piece. Two at a time could each hold
    /// half of what both need.
    pub(super) large_read: &'a mut Option<usize>,
}

impl Client {
    /// A client whose negotiation is finished, over a blocking-mode socket.
    pub(super) fn new(volume: VolumeNr, socket: OwnedFd, negotiated: &Negotiated) -> Self {
        let mut receiver = Receiver::new();
        receiver.preload(&negotiated.leftover);
        Self {
            volume,
            session: negotiated.session(),
            fd: Rc::new(socket),
            receiver,
            sender: Sender::new(),
            state: State::Open,
            commands: Slab::new(),
            outstanding: 0,
            intake: None,
            refused: None,
            stalled: false,
        }
    }

    /// Whether it waits for a buffer or for its own answers to leave.
    pub(super) fn is_stalled(&self) -> bool {
        self.stalled
    }

    /// Whether nothing of it is left anywhere.
    pub(super) fn is_gone(&self) -> bool {
        self.state == State::Dead
            && self.outstanding == 0
            && !self.receiver.is_armed()
            && !self.sender.is_armed()
    }

    /// Hands out everything that was received; `index` is the client's own key.
    pub(super) fn take_input(
        &mut self,
        index: usize,
        shared: &mut Shared<'_>,
        demand: &mut impl FnMut(&mut Slab<FrontRequest>, Demand),
    ) {
        self.stalled = false;
        while self.state == State::Open && !self.receiver.is_armed() {
            let goes_on = if self.refused.is_some() {
                self.skip_refused()
            } else if self.intake.is_some() {
                self.hand_out_pieces(index, shared, demand)
            } else {
                self.next_request(index, shared, demand)
            };
            if !goes_on {
                return;
            }
        }
    }

    /// Parses one request. Whether there may be more.
    fn next_request(
        &mut self,
        index: usize,
        shared: &mut Shared<'_>,
        demand: &mut impl FnMut(&mut Slab<FrontRequest>, Demand),
    ) -> bool {
        if self.commands.len() + self.sender.pending() >= MAX_COMMANDS {
            self.stalled = true;
            return false;
        }
        let Some(bytes) = self.receiver.staged().first_chunk::<{ REQUEST_BYTES }>() else { return false };
        let received = self.session.receive(bytes);
        self.receiver.consume(REQUEST_BYTES);
        let request = match received {
            NbdReceived::Request(request) => request,
            NbdReceived::Rejected(refused) => {
                self.refused = Some(Refused {
                    cookie: refused.cookie,
                    error: refused.error,
                    text: refused.text,
                    skip_bytes: usize::try_from(refused.skip_bytes).unwrap_or(usize::MAX),
                });
                return true;
            }
            NbdReceived::Disconnect => {
                self.state = State::Draining;
                self.end_if_drained();
                return false;
            }
            NbdReceived::Breach(breach) => {
                tracing::info!(volume = self.volume.0, %breach, "an NBD client broke the protocol");
                self.kill();
                return false;
            }
        };
        if let Some(pieces) = request.pieces() {
            if matches!(request.command(), Command::Read { .. }) && !shared.pool.could_hold(request.length())
            {
                self.answer_error(
                    request.cookie(),
                    NbdError::Invalid,
                    "larger than the buffers of the server",
                );
                return true;
            }
            let progress = Some(Progress::new(&pieces));
            let command = self.commands.insert(Running { request, progress, data: ReadData::None });
            self.intake = Some(Intake { command, pieces, piece: None, nr: 0 });
            return true;
        }
        let command = self.commands.insert(Running { request, progress: None, data: ReadData::None });
        match request.command() {
            Command::Flush => {
                self.outstanding += 1;
                let origin = Origin::Nbd { client: index, command, piece: 0 };
                let key = shared.fronts.insert(FrontRequest { origin, _buffer: None });
                let flush = Input::Flush { id: RequestId(key as u64), volume: self.volume };
                demand(shared.fronts, Demand::Core(flush));
            }
            Command::BlockStatus { one } => {
                self.outstanding += 1;
                let block_min = self.session.block_min;
                demand(shared.fronts, Demand::BlockStatus { command, request, block_min, one });
            }
            // Nothing is cached here that could be filled.
            Command::Cache
            | Command::Read { .. }
            | Command::Write { .. }
            | Command::Trim { .. }
            | Command::WriteZeroes { .. } => self.finish(command, Ok(())),
        }
        true
    }

    /// Throws away the data of a refused request, then answers. Whether that is done.
    fn skip_refused(&mut self) -> bool {
        let Some(refused) = &mut self.refused else { return true };
        let staged = self.receiver.staged().len().min(refused.skip_bytes);
        refused.skip_bytes -= staged;
        let done = refused.skip_bytes == 0;
        self.receiver.consume(staged);
        if done && let Some(refused) = self.refused.take() {
            self.answer_error(refused.cookie, refused.error, refused.text);
        }
        done
    }

    /// Brings pieces of the current command to the core. Whether it has brought all.
    fn hand_out_pieces(
        &mut self,
        index: usize,
        shared: &mut Shared<'_>,
        demand: &mut impl FnMut(&mut Slab<FrontRequest>, Demand),
    ) -> bool {
        let Some(mut intake) = self.intake.take() else { return true };
        while let Some(piece) = intake.piece.take().or_else(|| intake.pieces.next()) {
            let len = usize::try_from(piece.range.len().bytes()).unwrap_or(usize::MAX);
            let buffer = match piece.op {
                RequestOp::Write => {
                    if !self.receiver.in_payload() {
                        let Some(buffer) = shared.pool.take(len, Account::FrontEnd) else {
                            return self.wait_for_buffer(intake, piece);
                        };
                        self.receiver.begin_payload(buffer);
                    }
                    let Some(buffer) = self.receiver.take_payload() else {
                        intake.piece = Some(piece);
                        self.intake = Some(intake);
                        return false;
                    };
                    Some(buffer)
                }
                RequestOp::Read => {
                    let running = &mut self.commands[intake.command];
                    let is_large = running.request.length() > MAX_BLOCK_BYTES;
                    if is_large && shared.large_read.is_some_and(|owner| owner != index) {
                        return self.wait_for_buffer(intake, piece);
                    }
                    if is_large {
                        *shared.large_read = Some(index);
                    }
                    let Some(buffer) = shared.pool.take(len, Account::FrontEnd) else {
                        return self.wait_for_buffer(intake, piece);
                    };
                    running.data.push(buffer.clone(), is_large);
                    Some(buffer)
                }
                RequestOp::WriteZeroes { .. } | RequestOp::Discard => None,
            };
            self.outstanding += 1;
            let origin = Origin::Nbd { client: index, command: intake.command, piece: intake.nr };
            intake.nr += 1;
            let id = buffer.as_ref().map(BufferRef::id);
            let key = shared.fronts.insert(FrontRequest { origin, _buffer: buffer });
            let request = CoreRequest {
                id: RequestId(key as u64),
                volume: self.volume,
                op: piece.op,
                range: piece.range,
                fua: piece.fua,
                buffer: id,
            };
            demand(shared.fronts, Demand::Core(Input::Request(request)));
        }
        if *shared.large_read == Some(index) {
            *shared.large_read = None;
        }
        true
    }

    fn wait_for_buffer(&mut self, mut intake: Intake, piece: Piece) -> bool {
        intake.piece = Some(piece);
        self.intake = Some(intake);
        self.stalled = true;
        false
    }

    /// The core has answered a piece; `data` is there when a read came from elsewhere than its own buffer.
    pub(super) fn on_piece(
        &mut self,
        command: usize,
        piece: usize,
        result: Result<(), RequestError>,
        data: Option<BufferRef>,
    ) {
        self.outstanding -= 1;
        if self.state == State::Dead {
            return;
        }
        let Some(running) = self.commands.get_mut(command) else {
            debug_assert!(false, "a command is there until its last piece is");
            return;
        };
        if let Some(data) = data {
            running.data.replace(piece, data);
        }
        let done = match &mut running.progress {
            Some(progress) => progress.piece_done(result),
            None => Some(result.map_err(NbdError::from)),
        };
        if let Some(result) = done {
            self.finish(command, result);
        }
    }

    /// A helper thread has looked up a block status.
    pub(super) fn on_extents(&mut self, command: usize, extents: &[Extent]) {
        self.outstanding -= 1;
        if self.state == State::Dead || !self.commands.contains(command) {
            return;
        }
        let request = self.commands.remove(command).request;
        let session = self.session;
        self.push(|out| session.push_block_status(&request, extents, out), SendPayload::None);
        self.end_if_drained();
    }

    /// Queues the answer of a command.
    fn finish(&mut self, command: usize, result: Result<(), NbdError>) {
        let running = self.commands.remove(command);
        let request = running.request;
        match result {
            Err(error) => self.answer_error(request.cookie(), error, ""),
            Ok(()) => {
                let head = self.session.success_head(&request);
                let head = |out: &mut Vec<u8>| out.extend_from_slice(head.as_bytes());
                match running.data {
                    ReadData::None => self.push(head, SendPayload::None),
                    ReadData::One(buffer) => {
                        let len = buffer.len();
                        self.push(head, SendPayload::Buffer(buffer, len));
                    }
                    ReadData::Many(buffers) => {
                        self.push(head, SendPayload::None);
                        for buffer in buffers {
                            let len = buffer.len();
                            self.push(|_| {}, SendPayload::Buffer(buffer, len));
                        }
                    }
                }
            }
        }
        self.end_if_drained();
    }

    fn answer_error(&mut self, cookie: u64, error: NbdError, text: &str) {
        let text = if text.is_empty() { error.to_string() } else { text.to_owned() };
        let session = self.session;
        self.push(|out| session.push_error(cookie, error, &text, out), SendPayload::None);
    }

    fn push(&mut self, head: impl FnOnce(&mut Vec<u8>), payload: SendPayload) {
        let head = |out: &mut Vec<u8>| -> Result<(), Infallible> {
            head(out);
            Ok(())
        };
        match self.sender.push_with(head, payload) {
            Ok(()) => {}
            Err(never) => match never {},
        }
    }

    /// Starts the next receive, once everything received was taken.
    pub(super) fn arm_receive<C>(&mut self, ring: &mut Ring<C>, context: C) {
        if self.state == State::Open && !self.stalled && !self.receiver.is_armed() {
            self.receiver.arm(ring, &self.fd, context);
        }
    }

    /// A receive came back.
    pub(super) fn on_received(&mut self, memory: Box<RecvMemory>, result: i32, more_waiting: bool) {
        match self.receiver.on_completion(memory, result, more_waiting) {
            Received::Some => {}
            // Without a goodbye nobody reads answers any more.
            Received::End => self.kill(),
            Received::Failed(errno) => {
                tracing::debug!(volume = self.volume.0, %errno, "NBD receive");
                self.kill();
            }
        }
    }

    /// Sends the answers that are queued.
    pub(super) fn arm_send<C>(&mut self, ring: &mut Ring<C>, context: C) {
        if self.state != State::Dead {
            let sent = self.sender.arm(ring, &self.fd, context);
            self.after_send(sent);
        }
    }

    /// A send came back from the ring.
    pub(super) fn on_sent<C>(
        &mut self,
        ring: &mut Ring<C>,
        memory: Box<SendMemory>,
        result: i32,
        context: C,
    ) {
        let sent = self.sender.on_completion(ring, &self.fd, memory, result, context);
        self.after_send(sent);
    }

    fn after_send(&mut self, sent: Sent) {
        match sent {
            Sent::All => self.end_if_drained(),
            Sent::Part => {}
            Sent::Failed(errno) => {
                tracing::debug!(volume = self.volume.0, %errno, "NBD send");
                self.kill();
            }
        }
    }

    fn end_if_drained(&mut self) {
        if self.state == State::Draining && self.commands.is_empty() && self.sender.is_idle() {
            self.kill();
        }
    }

    /// Ends it; requests at the core finish for nobody.
    pub(super) fn kill(&mut self) {
        if self.state == State::Dead {
            return;
        }
        self.state = State::Dead;
        self.stalled = false;
        self.intake = None;
        self.refused = None;
        self.commands.clear();
        self.sender.discard();
        self.receiver.discard();
        if let Err(errno) = shutdown(self.fd.as_raw_fd(), Shutdown::Both) {
            tracing::debug!(volume = self.volume.0, %errno, "shutdown");
        }
    }
}

impl ReadData {
    fn push(&mut self, buffer: BufferRef, is_large: bool) {
        match self {
            Self::None if !is_large => *self = Self::One(buffer),
            Self::None | Self::One(_) => *self = Self::Many(vec![buffer]),
            Self::Many(buffers) => buffers.push(buffer),
        }
    }

    fn replace(&mut self, piece: usize, buffer: BufferRef) {
        match self {
            Self::None => debug_assert!(false, "data for a command without data"),
            Self::One(own) => *own = buffer,
            Self::Many(buffers) => {
                if let Some(own) = buffers.get_mut(piece) {
                    *own = buffer;
                }
            }
        }
    }
}
