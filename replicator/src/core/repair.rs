//! A failed IO of the own disk: what `on-io-error` says (SEM §21), and how a disk that is kept gets well.
//!
//! With `detach` and `call-local-io-error` the disk is given up (`attach.rs`). With `pass_on` it is kept:
//!
//! | failed | the peer's copy is good and connected | else |
//! |---|---|---|
//! | read | served by the peer; *repair* | nothing changed on the disk: the error reaches the application |
//! | own write | held back; *repair* | marked; the error reaches the application |
//! | mirrored write | marked, negative ack; Inconsistent; *repair* | marked, negative ack |
//!
//! The only good copy never becomes Inconsistent by an error: nobody could make it good again.
//!
//! *Repair* is a resync of the marked blocks with the peer as source, so its rules hold: the blocks are
//! locked, what the application writes meanwhile wins, a mark goes only with the ack for that very data.
//!
//! ```text
//! Draining: what the peer has not declared stable would be lost with this copy --> barrier acks -->
//! Asked: the peer must agree to be the source --> resync --> UpToDate
//! ```
//! Until then the disk counts as UpToDate, but for marked blocks. So both disks cannot become
//! Inconsistent by errors that cross on the wire, and a write that only the peer has is acknowledged
//! when this disk is durably known to be the worse one, not before (U1). A repair that is refused or
//! fails is tried again, less and less often.
use super::config::OnIoError;
use super::device::Device;
use super::event::{HandlerName, IoError, Payload, Severity};
use super::handlers::Purpose;
use super::metadata::SuperblockThen;
use super::state::{ConnState, DiskState, ReplState, Role};
use super::timer::Timer;
use super::transfer_log::EpochNr;
use super::{Reply, Resource};
use crate::units::{BlockRange, Time};
use lockstep_proto::v1::state_request::Kind;
use lockstep_proto::{Message, v1};

/// Ranges that could not be read, at most: the next repair finds the others.
const MAX_BAD_READS: usize = 64;
/// Between a repair that did not succeed and the next one, ms.
const FIRST_RETRY_MS: u64 = 1000;
const LAST_RETRY_MS: u64 = 600_000;

/// What a failed IO was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FailedIo {
    /// The disk holds what it held.
    Read,
    /// The disk may hold anything there.
    Write,
}

/// How far a repair is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Waiting for the barrier ack of everything up to here, if there is anything.
    Draining(Option<EpochNr>),
    /// Waiting until it may be tried again.
    Idle,
    /// The peer was asked.
    Asked,
}

/// A disk that is UpToDate but for some blocks.
#[derive(Debug)]
pub(super) struct Repair {
    step: Step,
    /// Ranges that could not be read. They are marked when the repair begins and not before: if the
    /// peer is lost, it is not to ask for what cannot be read here.
    unreadable: Vec<BlockRange>,
}

/// When the next try is due.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Retry {
    at: Time,
    delay_ms: u64,
}

impl Retry {
    /// A try begins now; the next one is due later each time.
    fn begin(&mut self, now: Time) {
        self.delay_ms = (self.delay_ms * 2).clamp(FIRST_RETRY_MS, LAST_RETRY_MS);
        self.at = now.plus_ms(self.delay_ms);
    }
}

impl Resource {
    /// A data IO failed: what `on-io-error` says. Blocks of a failed write are marked by the caller.
    pub(super) fn on_local_io_error(
        &mut self,
        volume: usize,
        what: &str,
        io: FailedIo,
        range: BlockRange,
        error: IoError,
    ) {
        let device = &self.devices[volume];
        if matches!(device.disk, DiskState::Failed | DiskState::Diskless) {
            return;
        }
        match device.cfg.on_io_error {
            OnIoError::PassOn => self.pass_on(volume, what, io, range, error),
            OnIoError::Detach | OnIoError::CallLocalIoError => self.fail_disk(volume, what, Some(error)),
        }
    }

    fn pass_on(&mut self, volume: usize, what: &str, io: FailedIo, range: BlockRange, error: IoError) {
        let device = &self.devices[volume];
        let nr = device.nr.0;
        let (start, len) = (range.start().0, range.len().0);
        self.note(
            Severity::Error,
            format!("volume {nr}: {what} failed ({error:?}) at sector {start}, {len} sectors; passed on as configured"),
        );
        if io == FailedIo::Write && self.handshake_running() {
            // The marks that were announced are no longer all.
            return self
                .drop_session(ConnState::NetworkFailure, "the local disk failed during the handshake");
        }
        let device = &self.devices[volume];
        if io == FailedIo::Write && self.role == Role::Primary && device.repl.is_sync_source() {
            // The target may have this write and call it in sync: it gets again what is here.
            let volume = u32::from(nr);
            let note = v1::OutOfSync { volume, sector: start, nr_sectors: len };
            self.send(Message::OutOfSync(note), Payload::None);
        }
        let device = &self.devices[volume];
        let other = device.peer_readable() && !device.repl.is_sync_source();
        let stays = device.procedure.is_some() || device.disk <= DiskState::Inconsistent;
        if stays || !other || device.repl.is_sync_target() {
            return;
        }
        if io == FailedIo::Write && self.role != Role::Primary {
            // The Primary has it, and hears of it: this copy is the worse one from here on.
            self.devices[volume].repair = None;
            return self.set_disk(volume, DiskState::Inconsistent);
        }
        if self.devices[volume].repair.is_none() {
            // Under A and B writes were acknowledged that the peer may not have yet.
            let step = Step::Draining(self.close_epoch());
            self.devices[volume].repair = Some(Repair { step, unreadable: Vec::new() });
        }
        if let Some(repair) = &mut self.devices[volume].repair
            && io == FailedIo::Read
            && repair.unreadable.len() < MAX_BAD_READS
            && !repair.unreadable.contains(&range)
        {
            repair.unreadable.push(range);
        }
    }

    /// Whether an answered write that only the peer has must wait: its node would be believed if both
    /// stopped now (U1).
    pub(super) fn degradation_unknown(&self, volume: usize) -> bool {
        let device = &self.devices[volume];
        device.untold_loss || (device.repair.is_some() && device.disk == DiskState::UpToDate)
    }

    /// Writes that waited for a fact that may have come, or will not come any more.
    pub(super) fn retry_held(&mut self, volume: usize) {
        for key in std::mem::take(&mut self.devices[volume].gated) {
            if self.requests.contains(key) {
                self.try_complete(key);
            }
        }
        self.try_complete_flushes();
    }

    // ---- the repair -------------------------------------------------------------------------------

    /// Moves a repair on. Called after each input.
    pub(super) fn progress_repair(&mut self, volume: usize) {
        let device = &self.devices[volume];
        if device.untold_loss && !device.peer_readable() {
            self.devices[volume].untold_loss = false;
            self.distrust_held(volume);
            self.retry_held(volume);
        }
        let device = &self.devices[volume];
        if device.repair.is_none() && device.disk != DiskState::Inconsistent {
            return;
        }
        if !device.writable() || device.procedure.is_some() {
            return self.cancel_repair(volume);
        }
        if !device.peer_readable() {
            // No other good copy any more: this one is the best there is.
            return self.cancel_repair(volume);
        }
        let established = self.conn == ConnState::Connected && device.repl == ReplState::Established;
        let step = device.repair.as_ref().map_or(Step::Idle, |repair| repair.step);
        match step {
            Step::Draining(through) if through.is_some_and(|nr| !self.tl.acked_through(nr)) => return,
            Step::Asked => return,
            Step::Draining(_) | Step::Idle => self.set_repair_step(volume, Step::Idle),
        }
        let now = self.now;
        let device = &mut self.devices[volume];
        if device.repair.is_none() && device.retry == Retry::default() {
            // Inconsistent for another reason, or after a write: there is no hurry.
            device.retry.begin(now);
        }
        let due = device.retry.at;
        if !established {
            return self.give_way(volume);
        }
        if now < due {
            self.timers.bring_forward(Timer::Repair, due);
            return self.give_way(volume);
        }
        self.ask_for_repair(volume);
    }

    fn set_repair_step(&mut self, volume: usize, step: Step) {
        if let Some(repair) = &mut self.devices[volume].repair {
            repair.step = step;
        }
    }

    fn ask_for_repair(&mut self, volume: usize) {
        let waits = self.role_change.is_some() || self.devices[volume].resync.is_some();
        if waits || self.asks_for_change(volume) {
            // A demotion waits for every write.
            return self.give_way(volume);
        }
        let now = self.now;
        self.devices[volume].retry.begin(now);
        self.set_repair_step(volume, Step::Asked);
        self.ask_for(Reply::Nobody, Kind::StartSyncAsTarget, volume, 0);
    }

    /// The peer agreed: what cannot be read is marked, and this copy is the worse one from here on.
    pub(super) fn repair_begins(&mut self, volume: usize) {
        let Some(repair) = self.devices[volume].repair.take() else { return };
        for range in repair.unreadable {
            self.devices[volume].mark(range);
        }
    }

    /// The worse state of this disk is on its way to its superblock: what the peer alone has may be told
    /// done when it is there.
    pub(super) fn gate_degradation(&mut self, volume: usize) {
        let device = &mut self.devices[volume];
        device.uuid_gate = Some(device.md_generation);
        self.md_then(volume, SuperblockThen::OpenGate);
    }

    /// The peer refused: a write that is held back does not wait for the next try.
    pub(super) fn repair_refused(&mut self, volume: usize) {
        self.set_repair_step(volume, Step::Idle);
        self.give_way(volume);
    }

    /// This copy cannot be repaired now, and writes wait that only the peer has: it is Inconsistent now.
    fn give_way(&mut self, volume: usize) {
        let device = &self.devices[volume];
        if device.gated.is_empty() || device.repair.is_none() || !device.peer_readable() {
            return;
        }
        self.repair_begins(volume);
        self.set_disk(volume, DiskState::Inconsistent);
        self.gate_degradation(volume);
    }

    /// Whether this node's own wish to be repaired goes before the peer's.
    pub(super) fn repair_goes_first(&self, volume: usize) -> bool {
        self.devices[volume].repair.is_some()
            && (self.role == Role::Primary
                || (self.peer_role != Role::Primary && self.cfg.node_id < self.cfg.peer_node_id))
    }

    /// There is no better copy: the disk stays what it is. What only the other one had is not done.
    pub(super) fn cancel_repair(&mut self, volume: usize) {
        if self.devices[volume].repair.take().is_some() && !self.devices[volume].untold_loss {
            self.distrust_held(volume);
            self.retry_held(volume);
        }
    }

    /// What was held back because only the peer has it is not done after all.
    pub(super) fn distrust_held(&mut self, volume: usize) {
        for at in 0..self.devices[volume].gated.len() {
            let key = self.devices[volume].gated[at];
            if let Some(request) = self.requests.get_mut(key) {
                request.distrust_peer();
            }
        }
    }

    /// What a repair, or a write that it holds back, waits for.
    pub(super) fn repair_wait(&self, device: &Device, now: Time) -> Option<String> {
        let (nr, peer) = (device.nr.0, &self.cfg.peer_name);
        if device.untold_loss {
            let held = device.gated.len();
            return Some(format!(
                "volume {nr}: {peer} to know that the disk here failed ({held} write(s) held back)"
            ));
        }
        match device.repair.as_ref().map(|repair| repair.step) {
            Some(Step::Draining(_)) => {
                Some(format!("volume {nr}: barrier acks of {peer} before the repair of the disk here"))
            }
            Some(Step::Asked) => Some(format!("volume {nr}: {peer} to agree to the repair of the disk here")),
            Some(Step::Idle) | None => {
                let waits = device.repl == ReplState::Established
                    && device.peer_readable()
                    && (device.repair.is_some() || device.disk == DiskState::Inconsistent);
                let left = device.retry.at.ms_since(now).div_ceil(1000);
                waits.then(|| format!("volume {nr}: the next repair of the disk here, again in {left} s"))
            }
        }
    }

    // ---- call-local-io-error ------------------------------------------------------------------------

    /// Runs the operator's program before anybody hears of the failure, if that is configured.
    pub(super) fn run_local_io_error(&mut self, volume: usize) {
        if self.devices[volume].cfg.on_io_error == OnIoError::CallLocalIoError {
            let nr = self.devices[volume].nr;
            let token = self.run_handler(HandlerName::LocalIoError, Some(nr), Purpose::LocalIoError(volume));
            self.devices[volume].io_error_handler = Some(token);
        }
    }

    /// A disk failed here and the peer is not told before the operator's program ends.
    pub(super) fn failure_untold(&self) -> bool {
        self.devices.iter().any(|device| device.io_error_handler.is_some())
    }

    /// The program came to its end, one way or another: now the peer is told.
    pub(super) fn local_io_error_handled(&mut self, volume: usize, token: super::event::HandlerToken) {
        if self.devices[volume].io_error_handler == Some(token) {
            self.devices[volume].io_error_handler = None;
            self.send_state();
            self.try_end_epoch();
            self.progress_disk(volume);
        }
    }
}

impl Device {
    /// The own disk's copy of `range` is the newest, as far as this node knows.
    pub(super) fn intact(&self, range: BlockRange) -> bool {
        match &self.repair {
            Some(repair) => {
                !self.bitmap.any(range.bits_touched())
                    && !repair.unreadable.iter().any(|bad| bad.overlaps(range))
            }
            None => true,
        }
    }

    /// The state of the own disk as the peer is to know it.
    pub(super) fn told_disk(&self) -> DiskState {
        if self.io_error_handler.is_some() { self.md_disk } else { self.disk }
    }
}
