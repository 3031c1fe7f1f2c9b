//! Online verify (SEM §20): compares both copies by digest while the application goes on.
//!
//! ```text
//! VerifyS: OvRequest --> VerifyT: short lock, read, OvReply(digest) --> VerifyS: short lock, read, compare
//! ```
//! No lock is held across the network, so verify can neither deadlock nor make the application wait for
//! more than one local read (S36). In its place VerifyS watches each check from its request to its own
//! read: a write into the range in that time makes a difference mean nothing, and the check is made
//! again later. A difference without such a write is looked at a second time, block by block; only then
//! it counts. It is marked on both nodes, reported, and left to a resync.
//!
//! VerifyT answers in stream order and behind the range lock, so its digest covers every write that
//! VerifyS sent before its request; what VerifyT sent before its answer has arrived with VerifyS by then.
use super::rate::{Pace, TICK_MS};
use crate::core::device::Device;
use crate::core::event::{
    AdminId, Digest, DiskOk, DiskOp, Event, HandlerName, IoError, Output, Payload, SessionId, Severity,
};
use crate::core::handlers::Purpose;
use crate::core::interval::LockOwner;
use crate::core::metadata::BitmapThen;
use crate::core::repair::FailedIo;
use crate::core::request::range_of;
use crate::core::state::{ConnState, DiskState, ReplState};
use crate::core::timer::Timer;
use crate::core::verbs::refusal;
use crate::core::{IoContext, Reply, Resource};
use crate::units::{BlockRange, SECTORS_PER_BIT, Sector, SectorCount, Time};
use lockstep_proto::v1::state_request::Kind;
use lockstep_proto::{Message, limits, v1};
use std::collections::{BTreeMap, VecDeque};

/// A first look covers so much at most: what it finds is looked at again block by block.
const CHECK_SECTORS: u64 = 256;
/// A range that was written during so many checks is left out.
const MAX_TRIES: u8 = 20;
/// Ranges kept to be joined with neighbours before they are reported.
const MAX_FOUND: usize = 4096;

/// A verify of one volume.
#[derive(Debug)]
pub(in crate::core) struct Verify {
    /// This node asks.
    asks: bool,
    /// Tells the checks of this run from those of an aborted one.
    run: u32,
    pub(in crate::core) started: Time,
    first: u64,
    cursor: u64,
    end: u64,
    pace: Option<Pace>,
    again: VecDeque<Again>,
    pub(in crate::core) bits_found: u64,
    bits_skipped: u64,
    /// Differences not reported yet: first sector and end of each, neighbours joined.
    found: BTreeMap<u64, u64>,
}

impl Verify {
    pub(in crate::core) const fn bits_total(&self) -> u64 {
        self.end - self.first
    }

    /// Blocks not looked at for the first time yet.
    pub(in crate::core) const fn bits_left(&self) -> u64 {
        self.end.saturating_sub(self.cursor)
    }

    pub(in crate::core) fn in_flight_sectors(&self) -> u64 {
        self.pace.as_ref().map_or(0, Pace::in_flight)
    }
}

/// A range to be compared once more.
#[derive(Clone, Copy, Debug)]
struct Again {
    range: BlockRange,
    confirm: bool,
    tries: u8,
    not_before: Time,
}

/// A comparison on its way, on the node that asks.
#[derive(Debug)]
pub(in crate::core) struct OvCheck {
    range: BlockRange,
    run: u32,
    seq: u32,
    step: OvStep,
    /// The peer's digest; `None`: it could not read.
    theirs: Option<Digest>,
    /// Written meanwhile: a difference means nothing.
    touched: bool,
    confirm: bool,
    tries: u8,
    asked_at: Time,
}

/// A digest on its way, on the node that answers.
#[derive(Debug)]
pub(in crate::core) struct OvRead {
    session: SessionId,
    range: BlockRange,
    request: u64,
    step: OvStep,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum OvStep {
    Asked,
    Locking,
    Reading,
}

fn wire_id(seq: u32, key: usize) -> u64 {
    (u64::from(seq) << 32) | (key as u64 & 0xffff_ffff)
}

impl Resource {
    // ---- the verb -------------------------------------------------------------------------------

    /// `verify` (SEM §20). `start` and `stop` are sectors; without `start` it goes on where an
    /// interrupted run stopped.
    pub(in crate::core) fn on_verify(
        &mut self,
        id: AdminId,
        volume: usize,
        start: Option<Sector>,
        stop: Option<Sector>,
    ) {
        let reply = Reply::Admin(id);
        let device = &self.devices[volume];
        let name = &self.cfg.name;
        let start = start.map_or(device.verify_from, |start| start.0 / SECTORS_PER_BIT * SECTORS_PER_BIT);
        let stop = stop.map_or(device.size.0, |stop| stop.0.min(device.size.0));
        let mut facts = vec![
            format!("connection {}, replication {}", self.conn, device.repl),
            format!("disk here {}, at the peer {}", device.disk, device.peer_disk),
        ];
        let status = format!("drbdadm status {name}");
        let refused = if self.cfg.net.verify_alg.is_none() {
            facts.push("verify-alg is not set".into());
            Some((
                -14,
                "Need a verify algorithm to start online verify",
                format!("set verify-alg in the net section of {name}, then drbdadm adjust {name}"),
            ))
        } else if self.conn != ConnState::Connected {
            Some((-15, "Need a connection to start verify or resync", format!("drbdadm connect {name}")))
        } else if device.repl != ReplState::Established || device.resync.is_some() {
            Some((-8, "Can not start OV/resync since it is already active", status))
        } else if device.disk != DiskState::UpToDate || device.peer_disk != DiskState::UpToDate {
            Some((-2, "Need access to UpToDate data", status))
        } else if start >= stop {
            facts.push(format!("asked for sectors {start} to {stop} of {}", device.size.0));
            Some((162, "Invalid request", "give a start before the stop, both inside the volume".to_owned()))
        } else {
            None
        };
        if let Some((number, text, advice)) = refused {
            return self.reply(reply, Err(refusal(number, text, facts, &advice)));
        }
        self.devices[volume].verify_wanted = Some((start, stop));
        self.ask_for(reply, Kind::StartVerify, volume, 0);
    }

    /// Both agreed: this node asks or answers.
    pub(in crate::core) fn begin_verify(&mut self, volume: usize, asks: bool, start: u64, stop: u64) {
        let (now, max_buffers) = (self.now, self.cfg.net.max_buffers);
        self.next_seq = self.next_seq.wrapping_add(1);
        let run = self.next_seq;
        let device = &mut self.devices[volume];
        let end = stop.min(device.size.0).div_ceil(SECTORS_PER_BIT);
        let first = (start / SECTORS_PER_BIT).min(end);
        let pace = asks.then(|| {
            device.foreground.begin();
            Pace::new(&device.cfg.resync, max_buffers, now, end - first, device.foreground_sectors())
        });
        device.verify_wanted = None;
        device.verify = Some(Verify {
            asks,
            run,
            started: now,
            first,
            cursor: first,
            end,
            pace,
            again: VecDeque::new(),
            bits_found: 0,
            bits_skipped: 0,
            found: BTreeMap::new(),
        });
        self.set_repl(volume, if asks { ReplState::VerifyS } else { ReplState::VerifyT });
        self.timers.set_if_idle(Timer::Resync, now.plus_ms(TICK_MS));
        self.verify_go_on(volume);
    }

    pub(in crate::core) fn take_verify_wanted(&mut self, volume: usize) -> Option<(u64, u64)> {
        self.devices[volume].verify_wanted.take()
    }

    // ---- the node that asks ---------------------------------------------------------------------

    /// Once per tick.
    pub(super) fn verify_tick(&mut self, volume: usize) {
        let now = self.now;
        let device = &mut self.devices[volume];
        let activity = device.foreground_sectors();
        let min_rate = device.cfg.resync.min_rate_kib_s;
        let Some(verify) = &mut device.verify else { return };
        let left = verify.bits_left();
        if let Some(pace) = &mut verify.pace {
            pace.tick(now, left, activity);
            device.foreground.tick(pace.rate_kib_s(), min_rate);
        }
        self.verify_go_on(volume);
    }

    /// Asks for more, or ends.
    fn verify_go_on(&mut self, volume: usize) {
        let now = self.now;
        while self.devices[volume].repl == ReplState::VerifyS {
            let device = &mut self.devices[volume];
            let Some(verify) = &mut device.verify else { return };
            let Some(pace) = &mut verify.pace else { return };
            let next = if verify.again.front().is_some_and(|again| again.not_before <= now) {
                verify.again.pop_front()
            } else {
                None
            };
            if next.is_none() && verify.cursor >= verify.end {
                if device.ov_checks.is_empty() && verify.again.is_empty() {
                    self.finish_verify(volume);
                }
                return;
            }
            let Some(most) = pace.next_request(device.foreground.limit()) else {
                verify.again.extend(next);
                return;
            };
            let again = if let Some(again) = next {
                again
            } else {
                let bits = (most.min(CHECK_SECTORS) / SECTORS_PER_BIT).max(1);
                let end = ((verify.cursor / bits + 1) * bits).min(verify.end);
                let first = verify.cursor * SECTORS_PER_BIT;
                verify.cursor = end;
                let last = (end * SECTORS_PER_BIT).min(device.size.0);
                let Some(range) = BlockRange::new(Sector(first), SectorCount(last.saturating_sub(first)))
                else {
                    continue;
                };
                Again { range, confirm: false, tries: 0, not_before: now }
            };
            pace.asked(again.range.len().0);
            let run = verify.run;
            self.next_seq = self.next_seq.wrapping_add(1);
            let seq = self.next_seq;
            let key = device.ov_checks.insert(OvCheck {
                range: again.range,
                run,
                seq,
                step: OvStep::Asked,
                theirs: None,
                touched: false,
                confirm: again.confirm,
                tries: again.tries,
                asked_at: now,
            });
            let header = v1::BlockRequest {
                volume: u32::from(device.nr.0),
                sector: again.range.start().0,
                nr_sectors: again.range.len().0,
                request: wire_id(seq, key),
            };
            self.send(Message::OvRequest(header), Payload::None);
        }
    }

    pub(in crate::core) fn on_ov_reply(&mut self, header: &v1::ChecksumReply) {
        let Some(volume) = self.wire_device(header.volume) else {
            return self.protocol_error("a digest for a volume this node does not have");
        };
        let key = usize::try_from(header.request & 0xffff_ffff).unwrap_or(usize::MAX);
        // An answer that an ended verify no longer waits for is no fault of the peer.
        let Some(check) = self.devices[volume].ov_checks.get_mut(key) else { return };
        if u64::from(check.seq) != header.request >> 32 || check.step != OvStep::Asked {
            return;
        }
        check.theirs = header.readable.then_some(Digest([
            header.digest_0,
            header.digest_1,
            header.digest_2,
            header.digest_3,
        ]));
        check.step = OvStep::Locking;
        let range = check.range;
        // Writes that came before this answer but have not begun are in the peer's digest, not in ours.
        if self.write_is_queued(volume, range)
            && let Some(check) = self.devices[volume].ov_checks.get_mut(key)
        {
            check.touched = true;
        }
        let device = &mut self.devices[volume];
        if let Some(pace) = device.verify.as_mut().and_then(|verify| verify.pace.as_mut()) {
            pace.arrived(range.len().0);
        }
        if self.lock_for_verify(volume, range, LockOwner::VerifyAsk(key)) {
            self.ov_check_locked(volume, key);
        }
    }

    pub(in crate::core) fn ov_check_waits(&self, volume: usize, key: usize) -> bool {
        self.devices[volume].ov_checks.get(key).is_some_and(|check| check.step == OvStep::Locking)
    }

    pub(in crate::core) fn ov_check_locked(&mut self, volume: usize, key: usize) {
        let check = &mut self.devices[volume].ov_checks[key];
        check.step = OvStep::Reading;
        let range = check.range;
        let context = IoContext::VerifyAsk { volume, key };
        self.submit_io(volume, DiskOp::ReadDigest, Some(range), false, None, context);
    }

    pub(in crate::core) fn on_ov_check_read(
        &mut self,
        volume: usize,
        key: usize,
        result: Result<DiskOk, IoError>,
    ) {
        self.devices[volume].ios -= 1;
        let check = self.devices[volume].ov_checks.remove(key);
        let mut ours = None;
        match result {
            Ok(ok) => {
                ours = ok.digest;
                if let Some(buffer) = ok.buffer {
                    self.out.push_back(Output::Release(buffer));
                }
            }
            Err(error) => {
                let io = FailedIo::Read;
                self.on_local_io_error(volume, "a verify read from the local disk", io, check.range, error);
            }
        }
        self.unlock(volume, check.range, LockOwner::VerifyAsk(key));
        let now = self.now;
        let device = &mut self.devices[volume];
        let Some(verify) = device.verify.as_mut().filter(|verify| verify.run == check.run) else { return };
        if let Some(pace) = &mut verify.pace {
            pace.done(check.range.len().0, check.asked_at, now);
        }
        let bits = check.range.bits_touched();
        let equal = ours.is_some() && ours == check.theirs;
        if equal {
            // Nothing to do.
        } else if check.touched && check.tries >= MAX_TRIES {
            verify.bits_skipped += bits.end - bits.start;
        } else if check.touched {
            verify.again.push_back(Again {
                range: check.range,
                confirm: check.confirm,
                tries: check.tries + 1,
                not_before: now.plus_ms(TICK_MS),
            });
        } else if check.confirm {
            self.verify_found(volume, check.range);
        } else {
            for bit in bits {
                let first = bit * SECTORS_PER_BIT;
                let len = SECTORS_PER_BIT.min(check.range.end().0.saturating_sub(first));
                if let Some(range) = BlockRange::new(Sector(first), SectorCount(len)) {
                    verify.again.push_back(Again { range, confirm: true, tries: 0, not_before: now });
                }
            }
        }
        self.verify_go_on(volume);
    }

    /// The same difference twice, with nobody writing: marked on both nodes.
    fn verify_found(&mut self, volume: usize, range: BlockRange) {
        let device = &mut self.devices[volume];
        device.mark(range);
        let nr = device.nr;
        let bits = range.bits_touched();
        let Some(verify) = &mut device.verify else { return };
        verify.bits_found += bits.end - bits.start;
        let (mut start, mut end) = (range.start().0, range.end().0);
        if let Some((before, until)) = verify.found.range(..start).next_back().map(|(a, b)| (*a, *b))
            && until == start
        {
            start = before;
        }
        if let Some(until) = verify.found.remove(&end) {
            end = until;
        }
        verify.found.insert(start, end);
        let report =
            if verify.found.len() > MAX_FOUND { std::mem::take(&mut verify.found) } else { BTreeMap::new() };
        self.report_found(volume, &report);
        let note =
            v1::OutOfSync { volume: u32::from(nr.0), sector: range.start().0, nr_sectors: range.len().0 };
        self.send(Message::OvResult(note), Payload::None);
    }

    fn report_found(&mut self, volume: usize, found: &BTreeMap<u64, u64>) {
        let nr = self.devices[volume].nr;
        for (start, end) in found {
            if let Some(range) = BlockRange::new(Sector(*start), SectorCount(end - start)) {
                self.event(Event::OutOfSync { volume: nr, range });
            }
        }
    }

    /// Everything was compared.
    fn finish_verify(&mut self, volume: usize) {
        let Some(verify) = self.devices[volume].verify.take() else { return };
        let nr = self.devices[volume].nr;
        self.devices[volume].verify_from = 0;
        let header = v1::VerifyFinished {
            volume: u32::from(nr.0),
            found_bits: verify.bits_found,
            skipped_bits: verify.bits_skipped,
        };
        self.send(Message::VerifyFinished(header), Payload::None);
        self.report_found(volume, &verify.found);
        self.end_verify(volume, &verify, verify.bits_found, verify.bits_skipped);
        if verify.bits_found > 0 {
            self.run_handler(HandlerName::OutOfSync, Some(nr), Purpose::Notice);
        }
    }

    fn end_verify(&mut self, volume: usize, verify: &Verify, found: u64, skipped: u64) {
        let nr = self.devices[volume].nr;
        self.event(Event::VerifyDone {
            volume: nr,
            bits_total: verify.bits_total(),
            bits_found: found,
            bits_skipped: skipped,
            elapsed_ms: self.now.ms_since(verify.started),
        });
        if found > 0 {
            let name = &self.cfg.name;
            let text = format!(
                "volume {}: Online verify found {found} 4k block out of sync! Next: on the node whose data shall be replaced, drbdadm invalidate --reset-bitmap=no {name}/{}",
                nr.0, nr.0
            );
            self.note(Severity::Error, text);
        }
        if skipped > 0 {
            let text = format!(
                "volume {}: {skipped} blocks of 4 KiB were written all the time and could not be compared",
                nr.0
            );
            self.note(Severity::Warning, text);
        }
        self.set_repl(volume, ReplState::Established);
        self.write_bitmap(volume, BitmapThen::Nothing);
    }

    /// Somebody writes here: a comparison in between means nothing.
    pub(in crate::core) fn verify_touched(&mut self, volume: usize, range: BlockRange) {
        let device = &mut self.devices[volume];
        if device.verify.is_some() {
            for (_, check) in &mut device.ov_checks {
                check.touched |= check.range.overlaps(range);
            }
        }
    }

    /// Among two Primaries writes of the peer go ahead of it (`interval.rs`).
    fn lock_for_verify(&mut self, volume: usize, range: BlockRange, owner: LockOwner) -> bool {
        let two = self.two_primaries_allowed();
        let locks = &mut self.devices[volume].locks;
        if two { locks.lock_yielding(range, owner) } else { locks.lock(range, owner) }
    }

    // ---- the node that answers ------------------------------------------------------------------

    /// Stands behind the writes that came before it.
    pub(in crate::core) fn on_ov_request(&mut self, header: &v1::BlockRequest) {
        let open: usize = self.devices.iter().map(|device| device.ov_reads.len()).sum();
        if open + self.nr_queued_reads() >= crate::core::peer_request::MAX_PEER_READS {
            return self.protocol_error("more verify requests than the window allows");
        }
        if self.receive_must_queue() {
            self.queue_verify_read(header);
        } else {
            self.start_verify_read(header);
        }
    }

    pub(in crate::core) fn start_verify_read(&mut self, header: &v1::BlockRequest) {
        let place = self.wire_device(header.volume).zip(range_of(header.sector, header.nr_sectors));
        let Some((volume, range)) = place.filter(|(volume, range)| {
            range.within(self.devices[*volume].size) && range.len().0 <= limits::MAX_REQUEST_SECTORS
        }) else {
            return self.protocol_error("a verify request outside the volume");
        };
        let Some(session) = self.session.as_ref().map(|session| session.id) else { return };
        let device = &mut self.devices[volume];
        // The verify may have ended here already.
        let Some(verify) = device.verify.as_mut().filter(|verify| !verify.asks) else { return };
        verify.cursor = verify.cursor.max(range.bits_touched().end.min(verify.end));
        let key =
            device.ov_reads.insert(OvRead { session, range, request: header.request, step: OvStep::Locking });
        if self.lock_for_verify(volume, range, LockOwner::VerifyAnswer(key)) {
            self.ov_read_locked(volume, key);
        }
    }

    pub(in crate::core) fn ov_read_waits(&self, volume: usize, key: usize) -> bool {
        self.devices[volume].ov_reads.get(key).is_some_and(|read| read.step == OvStep::Locking)
    }

    pub(in crate::core) fn ov_read_locked(&mut self, volume: usize, key: usize) {
        let read = &mut self.devices[volume].ov_reads[key];
        read.step = OvStep::Reading;
        let range = read.range;
        let context = IoContext::VerifyAnswer { volume, key };
        self.submit_io(volume, DiskOp::ReadDigest, Some(range), false, None, context);
    }

    pub(in crate::core) fn on_ov_answer_read(
        &mut self,
        volume: usize,
        key: usize,
        result: Result<DiskOk, IoError>,
    ) {
        self.devices[volume].ios -= 1;
        let read = self.devices[volume].ov_reads.remove(key);
        let mut digest = None;
        match result {
            Ok(ok) => {
                digest = ok.digest;
                if let Some(buffer) = ok.buffer {
                    self.out.push_back(Output::Release(buffer));
                }
            }
            Err(error) => {
                let io = FailedIo::Read;
                self.on_local_io_error(volume, "a verify read from the local disk", io, read.range, error);
            }
        }
        let current = self.session.as_ref().is_some_and(|now| now.id == read.session);
        if current {
            let Digest([digest_0, digest_1, digest_2, digest_3]) = digest.unwrap_or_default();
            let reply = v1::ChecksumReply {
                volume: u32::from(self.devices[volume].nr.0),
                request: read.request,
                readable: digest.is_some(),
                digest_0,
                digest_1,
                digest_2,
                digest_3,
            };
            self.send(Message::OvReply(reply), Payload::None);
        }
        self.unlock(volume, read.range, LockOwner::VerifyAnswer(key));
    }

    /// The asking node found a difference.
    pub(in crate::core) fn on_ov_result(&mut self, header: &v1::OutOfSync) {
        let place = self.wire_device(header.volume).zip(range_of(header.sector, header.nr_sectors));
        let Some((volume, range)) = place.filter(|(volume, range)| range.within(self.devices[*volume].size))
        else {
            return self.protocol_error("a verify result outside the volume");
        };
        let device = &mut self.devices[volume];
        device.mark(range);
        if let Some(verify) = &mut device.verify {
            let bits = range.bits_touched();
            verify.bits_found += bits.end - bits.start;
        }
    }

    pub(in crate::core) fn on_verify_finished(&mut self, header: &v1::VerifyFinished) {
        let Some(volume) = self.wire_device(header.volume) else { return };
        if self.devices[volume].repl != ReplState::VerifyT {
            return;
        }
        if let Some(verify) = self.devices[volume].verify.take() {
            self.end_verify(volume, &verify, header.found_bits, header.skipped_bits);
        }
    }

    // ---- the end from outside -------------------------------------------------------------------

    /// Ends a verify because the connection or a disk is gone. Where it was is kept.
    pub(super) fn abort_verify(&mut self, volume: usize) {
        let device = &mut self.devices[volume];
        device.verify_wanted = None;
        let Some(verify) = device.verify.take() else { return };
        let mut granted = Vec::new();
        let Device { locks, ov_checks, ov_reads, .. } = device;
        // Up to here every block was compared.
        let reached = verify
            .again
            .iter()
            .map(|again| again.range.start().0)
            .chain(ov_checks.iter().map(|(_, check)| check.range.start().0))
            .min()
            .unwrap_or(u64::MAX)
            .min(verify.cursor * SECTORS_PER_BIT);
        let mut leave = |step: OvStep, range: BlockRange, owner: LockOwner| match step {
            OvStep::Reading => true,
            OvStep::Asked => false,
            OvStep::Locking => {
                // An earlier step of this loop may have granted it already.
                if !locks.cancel(owner, &mut granted) {
                    locks.unlock(range, owner, &mut granted);
                }
                false
            }
        };
        ov_checks.retain(|key, check| leave(check.step, check.range, LockOwner::VerifyAsk(key)));
        ov_reads.retain(|key, read| leave(read.step, read.range, LockOwner::VerifyAnswer(key)));
        granted.retain(|owner| match owner {
            LockOwner::VerifyAsk(key) => ov_checks.contains(*key),
            LockOwner::VerifyAnswer(key) => ov_reads.contains(*key),
            LockOwner::Request(_)
            | LockOwner::Peer(_)
            | LockOwner::ResyncSource(_)
            | LockOwner::ResyncTarget(_) => true,
        });
        let nr = device.nr;
        if verify.asks {
            device.verify_from = reached;
            self.report_found(volume, &verify.found);
            self.note(
                Severity::Warning,
                format!("volume {}: Online Verify reached sector {reached} and was interrupted; the next one goes on there", nr.0),
            );
        }
        self.run_granted(volume, granted);
    }
}
