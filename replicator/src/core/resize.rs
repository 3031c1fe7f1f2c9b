//! Online resize (SEM §26): the backing disks grew, or the volume shall shrink.
//!
//! ```text
//! resize: measure --(metadata lies elsewhere now)--> move it --> ask the peer, which does the same
//!         --> both sizes known --> grow here, durably --> the peer grows, durably --> both export it
//!         --> the new area is resynced
//! move:   log drained, bitmap durable --> superblock at the new place (FULL_SYNC, AL_DISABLED)
//!         --> bitmap, empty log there --> superblock --> the old superblock is wiped
//! ```
//! Invariants:
//!
//! * **One place is valid at every cut.** Whoever attaches looks at the end of the device first and at
//!   the end it had when last attached then. The superblock at the new place is written first and says
//!   "everything changed, and the log counts for nothing" until bitmap and log stand behind it.
//! * **Nothing is lost with the log.** It has no references and the whole bitmap is durable before the
//!   move; writes that need it wait until it is over.
//! * **A size is recorded only with its bits.** The bits of the new area are durable before the
//!   superblock names the larger size, and that is durable before the volume is exported with it. So a
//!   node that stops in between finds the old size, and the next handshake grows it again, marked.
//! * **No usable data is cut off** but by a Primary whose operator named the size and confirmed it.
//! * The new area is accepted by both nodes before either exports it.
//!
//! Whatever breaks between the two nodes' steps, the next handshake makes it up: it adopts the larger
//! size that either node has recorded, and more where both disks hold more.
use super::attach::DiskProcedure;
use super::device::Device;
use super::event::{MetaWrite, Output, Payload, Refusal, SessionId, Severity};
use super::metadata::{AlStep, BitmapThen, MetaContext, SuperblockThen};
use super::state::{ConnState, DiskState, ReplState, Role};
use super::verbs::refusal;
use super::{Reply, Resource};
use crate::core::activity_log::ActivityLog;
use crate::meta::{MetaPlace, flags};
use crate::units::{SECTORS_PER_AL_EXTENT, SECTORS_PER_BIT, SectorCount};
use lockstep_proto::v1::state_request::Kind;
use lockstep_proto::{Message, v1};

/// What the operator asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ResizeOptions {
    /// This size; `None` = all that both disks hold.
    pub size: Option<SectorCount>,
    /// The new area holds the same on both nodes already: do not copy it.
    pub assume_clean: bool,
    /// Grow although the peer cannot be asked, or one node has no disk to measure.
    pub assume_peer_has_space: bool,
    /// A smaller size is meant: what lies behind it is given up.
    pub shrink: bool,
}

/// Who waits for the end.
#[derive(Clone, Copy, Debug)]
enum Asker {
    Operator(Reply),
    /// The peer's question of this session.
    Peer(SessionId, u64),
}

/// A resize of one volume on its way.
#[derive(Debug)]
pub(super) struct Resizing {
    asker: Asker,
    pub(super) step: ResizeStep,
    options: ResizeOptions,
    place: Option<MetaPlace>,
}

/// What a resize waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ResizeStep {
    /// The size of the devices.
    Measure,
    /// No reference in the activity log.
    Drain,
    /// The whole bitmap at the old place.
    OldBitmap,
    /// No metadata write on its way.
    Settle,
    /// The runtime knows the new place.
    Relocate,
    /// The superblock at the new place.
    NewSuperblock,
    /// The bitmap at the new place.
    NewBitmap,
    /// The empty log at the new place.
    NewLog,
    /// The superblock that vouches for them.
    FinalSuperblock,
    /// The old superblock is wiped.
    Forget,
    /// The peer's size.
    AskPeer(u64),
    /// Requests behind the new end.
    DrainTail,
    /// The bits of the new area.
    Grow,
    /// The superblock with the new size.
    Record,
    /// The peer has the new size, too.
    CommitPeer(u64),
}

/// What a node that adopted a size says of the resync of the new area.
mod resync_from {
    pub(super) const NOBODY: u64 = 0;
    pub(super) const SENDER: u64 = 1;
    pub(super) const RECEIVER: u64 = 2;
}

impl Resource {
    // ---- the verb -----------------------------------------------------------------------------

    pub(super) fn resize(&mut self, reply: Reply, volume: usize, options: ResizeOptions) {
        if let Err(refused) = self.check_resize(volume, &options) {
            return self.reply(reply, Err(refused));
        }
        self.start_resize(volume, Asker::Operator(reply), options);
    }

    fn check_resize(&self, volume: usize, options: &ResizeOptions) -> Result<(), Refusal> {
        let device = &self.devices[volume];
        let name = &self.cfg.name;
        let facts = vec![
            format!("connection {}, replication {}", self.conn, device.repl),
            format!("disk here {}, at the peer {}", device.disk, device.peer_disk),
            format!("role here {}, at the peer {}", self.role, self.peer_role),
        ];
        let status = format!("drbdadm status {name}");
        let connected = self.conn == ConnState::Connected;
        if device.procedure.is_some() || device.disk == DiskState::Negotiating || self.role_change.is_some() {
            let text = "In transient state, retry after next state change";
            return Err(refusal(-18, text, facts, "try again in a moment"));
        }
        if device.resync.is_some() || device.repl > ReplState::Established {
            let advice = format!("wait for the resync: drbdadm wait-sync {name}");
            return Err(refusal(130, "Resize not allowed during resync.", facts, &advice));
        }
        if !device.has_metadata() && !connected {
            let text = "Device is diskless, the requested operation requires a disk";
            return Err(refusal(-11, text, facts, &format!("drbdadm attach {name}")));
        }
        if connected && self.role == Role::Secondary && self.peer_role == Role::Secondary {
            let advice = format!("drbdadm primary {name}, then resize");
            return Err(refusal(131, "Need one Primary node to resize.", facts, &advice));
        }
        let usable = |disk| matches!(disk, DiskState::UpToDate | DiskState::Diskless);
        if connected && !(usable(device.disk) && usable(device.peer_disk)) {
            return Err(refusal(130, "Resize not allowed during resync.", facts, &status));
        }
        let Some(wanted) = options.size.filter(|wanted| *wanted < device.size) else { return Ok(()) };
        let mut facts = facts;
        facts.push(format!("the volume has {} sectors, {} were asked for", device.size.0, wanted.0));
        let text = "Implicit device shrinking not allowed. See kernel log.";
        if !options.shrink {
            let advice = format!(
                "shrink the file system first; then drbdadm resize --size={}s --force {name}",
                wanted.0
            );
            return Err(refusal(170, text, facts, &advice));
        }
        if self.role != Role::Primary || self.peer_role == Role::Primary || !device.has_metadata() {
            facts.push("only a Primary with a disk can cut a volume off, and only the single one".into());
            return Err(refusal(170, text, facts, &status));
        }
        Ok(())
    }

    fn start_resize(&mut self, volume: usize, asker: Asker, options: ResizeOptions) {
        let resizing = Resizing { asker, step: ResizeStep::Measure, options, place: None };
        self.devices[volume].procedure = Some(DiskProcedure::Resize(Box::new(resizing)));
        if self.devices[volume].has_metadata() {
            let nr = self.devices[volume].nr;
            self.out.push_back(Output::Measure(nr));
        } else {
            self.resize_moved(volume);
        }
    }

    fn resizing(&mut self, volume: usize) -> Option<&mut Resizing> {
        match &mut self.devices[volume].procedure {
            Some(DiskProcedure::Resize(resizing)) => Some(resizing),
            Some(
                DiskProcedure::Attach { .. } | DiskProcedure::Detach { .. } | DiskProcedure::Failing { .. },
            )
            | None => None,
        }
    }

    fn step(&mut self, volume: usize, step: ResizeStep) {
        if let Some(resizing) = self.resizing(volume) {
            resizing.step = step;
        }
    }

    // ---- the own disk --------------------------------------------------------------------------

    /// What the devices of a volume hold now; `None`: it cannot be found out.
    pub(super) fn on_measured(&mut self, volume: usize, place: Option<MetaPlace>) {
        match self.resizing(volume) {
            Some(resizing) if resizing.step == ResizeStep::Measure => resizing.place = place,
            _ => return,
        }
        let Some(place) = place else { return self.resize_moved(volume) };
        let device = &mut self.devices[volume];
        if place.capacity < device.size {
            let facts = vec![
                format!("the volume has {} sectors of data", device.size.0),
                format!("the disk holds {} sectors beside its metadata", place.capacity.0),
            ];
            let refused = refusal(
                111,
                "Low.dev. too small.",
                facts,
                "give the backing device its former size back before anything else is written",
            );
            return self.end_resize(volume, Err(refused));
        }
        let known = device.found.as_ref().map(|found| found.md_size_sect);
        if place.moves {
            device.al_hold = true;
            self.step(volume, ResizeStep::Drain);
            self.close_epoch();
        } else if known != Some(place.md_size_sect) {
            self.step(volume, ResizeStep::Settle);
        } else {
            device.capacity = place.capacity;
            self.resize_moved(volume);
        }
    }
    /// Moves a resize on when what it waits for has happened. A step without IO of its own ends at once, and no
    /// input comes to look at the next.
    pub(super) fn progress_resize(&mut self, volume: usize) {
        while let Some(step) = self.resizing(volume).map(|resizing| resizing.step) {
            self.progress_step(volume, step);
            if self.resizing(volume).is_none_or(|resizing| resizing.step == step) {
                return;
            }
        }
    }

    fn progress_step(&mut self, volume: usize, step: ResizeStep) {
        let device = &self.devices[volume];
        match step {
            ResizeStep::Drain => {
                let referenced = device.al.as_ref().is_some_and(|al| al.references() != 0);
                let idle = matches!(device.al_step, AlStep::Idle) && device.al_committing.is_empty();
                if idle && !referenced {
                    self.step(volume, ResizeStep::OldBitmap);
                    self.write_bitmap(volume, BitmapThen::Disk);
                } else if referenced && self.suspension.is_frozen() {
                    // The writes in the log may wait for the peer, and a handshake for the end of this.
                    let facts = self.suspend_waits(self.now);
                    let advice = format!("resize again when IO goes on: drbdadm status {}", self.cfg.name);
                    let text = "In transient state, retry after next state change";
                    self.end_resize(volume, Err(refusal(-18, text, facts, &advice)));
                }
            }
            ResizeStep::Settle => {
                let writing = device.md_writing.is_some() || self.md_busy(volume);
                let (pages, jobs) = (device.bm_running.is_some(), !device.bm_jobs.is_empty());
                if !writing && !pages && !jobs {
                    self.step(volume, ResizeStep::Relocate);
                    self.meta(volume, MetaWrite::Relocate, MetaContext::Relocated(volume));
                }
            }
            ResizeStep::DrainTail => {
                let size = device.size;
                let behind = self
                    .requests
                    .iter()
                    .any(|(_, request)| request.volume == volume && !request.range.within(size));
                if !behind {
                    self.extend_bitmap(volume, size, false);
                    self.step(volume, ResizeStep::Record);
                    self.record_size(volume);
                }
            }
            ResizeStep::Measure
            | ResizeStep::OldBitmap
            | ResizeStep::Relocate
            | ResizeStep::NewSuperblock
            | ResizeStep::NewBitmap
            | ResizeStep::NewLog
            | ResizeStep::FinalSuperblock
            | ResizeStep::Forget
            | ResizeStep::AskPeer(_)
            | ResizeStep::Grow
            | ResizeStep::Record
            | ResizeStep::CommitPeer(_) => {}
        }
    }

    /// The write of the current step is durable.
    pub(super) fn resize_step_done(&mut self, volume: usize) {
        let Some(resizing) = self.resizing(volume) else { return };
        let (step, place) = (resizing.step, resizing.place);
        match step {
            ResizeStep::OldBitmap => self.step(volume, ResizeStep::Settle),
            ResizeStep::Relocate => {
                let Some(place) = place else { return };
                let device = &mut self.devices[volume];
                if let Some(found) = &mut device.found {
                    found.md_size_sect = place.md_size_sect;
                    found.al_offset = place.al_offset;
                    found.bm_offset = place.bm_offset;
                }
                device.capacity = place.capacity;
                let next = if place.moves { ResizeStep::NewSuperblock } else { ResizeStep::FinalSuperblock };
                self.step(volume, next);
                self.md_touch(volume);
                self.md_then(volume, SuperblockThen::Disk);
            }
            ResizeStep::NewSuperblock => {
                self.step(volume, ResizeStep::NewBitmap);
                self.devices[volume].bitmap.rewrite();
                self.write_bitmap(volume, BitmapThen::Disk);
            }
            ResizeStep::NewBitmap => {
                self.step(volume, ResizeStep::NewLog);
                self.meta(volume, MetaWrite::AlInit, MetaContext::AlInit(volume));
            }
            ResizeStep::NewLog => {
                let device = &mut self.devices[volume];
                if let Some(old) = device.al.take() {
                    let extents = device.size.0.div_ceil(SECTORS_PER_AL_EXTENT);
                    device.al = Some(ActivityLog::new(old.nr_slots(), extents));
                }
                self.step(volume, ResizeStep::FinalSuperblock);
                self.md_touch(volume);
                self.md_then(volume, SuperblockThen::Disk);
            }
            ResizeStep::FinalSuperblock if place.is_some_and(|place| place.moves) => {
                self.step(volume, ResizeStep::Forget);
                self.meta(volume, MetaWrite::ForgetOldPlace, MetaContext::Relocated(volume));
            }
            ResizeStep::FinalSuperblock | ResizeStep::Forget => self.resize_moved(volume),
            ResizeStep::Grow => {
                self.step(volume, ResizeStep::Record);
                self.record_size(volume);
            }
            ResizeStep::Record => self.size_recorded(volume),
            ResizeStep::Measure
            | ResizeStep::Drain
            | ResizeStep::Settle
            | ResizeStep::AskPeer(_)
            | ResizeStep::DrainTail
            | ResizeStep::CommitPeer(_) => {}
        }
    }

    /// Flags that stand in the superblock while bitmap and log are not behind it.
    pub(super) fn resize_keeps_flags(&self, volume: usize) -> u32 {
        match &self.devices[volume].procedure {
            Some(DiskProcedure::Resize(resizing)) => match resizing.step {
                ResizeStep::NewSuperblock | ResizeStep::NewBitmap | ResizeStep::NewLog => {
                    flags::FULL_SYNC | flags::AL_DISABLED
                }
                _ => 0,
            },
            _ => 0,
        }
    }

    fn release_log(&mut self, volume: usize) {
        let device = &mut self.devices[volume];
        if std::mem::take(&mut device.al_hold) && !device.al_waiters.is_empty() {
            self.al_due = true;
        }
    }

    // ---- both nodes ----------------------------------------------------------------------------

    /// The own disk is ready: what does the other one hold?
    fn resize_moved(&mut self, volume: usize) {
        self.release_log(volume);
        let connected = self.conn == ConnState::Connected && self.peer_info_known(volume);
        let Some(resizing) = self.resizing(volume) else { return };
        let options = resizing.options;
        match resizing.asker {
            Asker::Peer(..) => self.end_resize(volume, Ok(())),
            Asker::Operator(_) if connected => {
                let id = self.ask_resize(volume, Kind::ResizeAsk, SectorCount(0), &options);
                self.step(volume, ResizeStep::AskPeer(id));
            }
            Asker::Operator(_) => {
                let device = &self.devices[volume];
                let known = device.size.0 != 0 && !options.assume_peer_has_space && !options.shrink;
                let most = if known { device.size } else { device.capacity };
                self.choose_size(volume, most);
            }
        }
    }

    fn ask_resize(&mut self, volume: usize, kind: Kind, size: SectorCount, options: &ResizeOptions) -> u64 {
        self.next_state_request += 1;
        let request = v1::StateRequest {
            id: self.next_state_request,
            kind: kind.into(),
            volume: u32::from(self.devices[volume].nr.0),
            uuid_current: 0,
            size_sectors: size.0,
            assume_clean: options.assume_clean,
            start_sector: 0,
            stop_sector: 0,
        };
        self.send(Message::StateRequest(request), Payload::None);
        self.next_state_request
    }

    /// What both disks hold, as far as that is known; the peer's holds `held`, 0 when none is attached there. A disk
    /// that is away may be a smaller one, and could never come back to a volume that grew without it.
    fn most_with(&mut self, volume: usize, held: SectorCount) -> SectorCount {
        let assumed = self.resizing(volume).is_some_and(|resizing| resizing.options.assume_peer_has_space);
        let device = &self.devices[volume];
        let own = if device.has_metadata() { device.capacity } else { SectorCount(0) };
        let (both, either) = (own.min(held), own.max(held));
        match device.size {
            _ if both.0 != 0 => both,
            size if size.0 == 0 || assumed => either,
            size => {
                let (nr, away) = (device.nr.0, if own.0 == 0 { "here" } else { "at the peer" });
                if either > size {
                    let text = format!(
                        "volume {nr} keeps its size: no disk is attached {away}, and nobody knows what it holds; attach it, or resize with --assume-peer-has-space"
                    );
                    self.note(Severity::Warning, text);
                }
                size
            }
        }
    }

    /// Both sizes are known: `most` is what both disks hold.
    fn choose_size(&mut self, volume: usize, most: SectorCount) {
        let Some(resizing) = self.resizing(volume) else { return };
        let options = resizing.options;
        let device = &self.devices[volume];
        let (size, configured) = (device.size, device.cfg.user_size);
        let wanted = match options.size {
            Some(wanted) if wanted > most => {
                let facts = vec![
                    format!("{} sectors were asked for", wanted.0),
                    format!("both disks hold {} sectors beside their metadata", most.0),
                ];
                let refused = refusal(
                    111,
                    "Low.dev. too small.",
                    facts,
                    "grow the backing devices of both nodes first, then resize",
                );
                return self.end_resize(volume, Err(refused));
            }
            Some(wanted) => wanted,
            // What the configuration says never takes anything away.
            None => most.min(configured.unwrap_or(most)).max(size),
        };
        if wanted == size {
            return self.end_resize(volume, Ok(()));
        }
        if wanted < size {
            // Checked when it was asked for; the front end hears of it first.
            self.devices[volume].size = wanted;
            self.update_export(volume);
            return self.step(volume, ResizeStep::DrainTail);
        }
        self.grow(volume, wanted, !options.assume_clean);
    }

    fn grow(&mut self, volume: usize, size: SectorCount, dirty: bool) {
        self.step(volume, ResizeStep::Grow);
        self.extend_bitmap(volume, size, dirty);
        self.write_bitmap(volume, BitmapThen::Disk);
    }

    /// Adopts a size in memory. A larger one is kept out of the superblock until its bits are durable.
    pub(super) fn extend_bitmap(&mut self, volume: usize, size: SectorCount, dirty: bool) {
        let device = &mut self.devices[volume];
        let old = std::mem::replace(&mut device.size, size);
        if !device.has_metadata() {
            return;
        }
        if size > old && old.0 != 0 {
            device.recorded_size.get_or_insert(old);
        }
        // The last block may have been cut off by the old end.
        let partial = old.0 / SECTORS_PER_BIT;
        let cut_off = dirty && size > old && !old.0.is_multiple_of(SECTORS_PER_BIT);
        device.bitmap.resize(Device::nr_bits(size), dirty);
        if cut_off {
            device.bitmap.set_range(partial..partial + 1);
        }
        if let Some(al) = device.al.as_mut() {
            al.resize(size.0.div_ceil(SECTORS_PER_AL_EXTENT));
        }
    }

    fn record_size(&mut self, volume: usize) {
        self.devices[volume].recorded_size = None;
        self.md_touch(volume);
        self.md_then(volume, SuperblockThen::Disk);
    }

    /// A handshake made the volume larger, and the bits of the new area are durable.
    pub(super) fn grown_at_handshake(&mut self, volume: usize) {
        self.devices[volume].recorded_size = None;
        self.md_touch(volume);
        self.md_then(volume, SuperblockThen::Export);
    }

    /// The new size is durable here.
    fn size_recorded(&mut self, volume: usize) {
        let connected = self.conn == ConnState::Connected && self.peer_info_known(volume);
        let Some(resizing) = self.resizing(volume) else { return };
        let options = resizing.options;
        match resizing.asker {
            Asker::Operator(_) if connected => {
                let size = self.devices[volume].size;
                let id = self.ask_resize(volume, Kind::ResizeCommit, size, &options);
                self.step(volume, ResizeStep::CommitPeer(id));
            }
            Asker::Operator(_) | Asker::Peer(..) => self.end_resize(volume, Ok(())),
        }
    }

    fn end_resize(&mut self, volume: usize, result: Result<(), Refusal>) {
        let Some(DiskProcedure::Resize(resizing)) = self.devices[volume].procedure.take() else { return };
        self.release_log(volume);
        // State changes during the procedure were not recorded.
        self.md_touch(volume);
        self.update_export(volume);
        self.tell_end_of_resize(volume, &resizing, result);
        self.handshake_try_send();
    }

    fn tell_end_of_resize(&mut self, volume: usize, resizing: &Resizing, result: Result<(), Refusal>) {
        match resizing.asker {
            Asker::Operator(reply) => self.reply(reply, result),
            Asker::Peer(session, id) => {
                if self.session.as_ref().is_none_or(|now| now.id != session) {
                    return;
                }
                let adopted = resizing.step == ResizeStep::Record;
                let device = &self.devices[volume];
                let held = if device.has_metadata() { device.capacity.0 } else { 0 };
                let source = adopted.then(|| self.new_area_source(volume, resizing.options.assume_clean));
                let (code, text, value) = match (result, source) {
                    (Ok(()), Some(source)) => (1, String::new(), source),
                    (Ok(()), None) => (1, String::new(), held),
                    (Err(refused), _) => (refused.number, refused.text, 0),
                };
                let answer = v1::StateReply { id, result: code, text, value };
                self.send(Message::StateReply(answer), Payload::None);
                match source.filter(|_| code == 1) {
                    Some(resync_from::SENDER) => self.sync_new_area(volume, true),
                    Some(resync_from::RECEIVER) => self.sync_new_area(volume, false),
                    Some(_) | None => {}
                }
            }
        }
    }

    /// Who has what shall stand in the new area.
    fn new_area_source(&self, volume: usize, assume_clean: bool) -> u64 {
        let device = &self.devices[volume];
        let both = device.disk == DiskState::UpToDate && device.peer_disk == DiskState::UpToDate;
        if assume_clean || !both || device.bitmap.count() == 0 {
            return resync_from::NOBODY;
        }
        let (own, peer) = (self.role == Role::Primary, self.peer_role == Role::Primary);
        let own_is_source = if own == peer { self.cfg.node_id < self.cfg.peer_node_id } else { own };
        if own_is_source { resync_from::SENDER } else { resync_from::RECEIVER }
    }

    fn sync_new_area(&mut self, volume: usize, source: bool) {
        let peer_disk = if source { DiskState::Outdated } else { DiskState::UpToDate };
        self.begin_resync(volume, source, false, peer_disk);
    }

    // ---- the peer's part -----------------------------------------------------------------------

    /// The peer asks for our size, or tells the new one. Answered when it is done.
    pub(super) fn on_resize_request(&mut self, request: &v1::StateRequest, kind: Kind) {
        let session = self.session.as_ref().map(|session| session.id);
        let (Some(session), Some(volume)) = (session, self.wire_device(request.volume)) else {
            return self.refuse_resize(request.id, -10, "no such volume there");
        };
        let device = &self.devices[volume];
        let busy = device.procedure.is_some() || device.resync.is_some() || self.role_change.is_some();
        if busy || device.repl != ReplState::Established {
            return self.refuse_resize(
                request.id,
                130,
                "a resync, attach, detach or role change is running there",
            );
        }
        let options = ResizeOptions { assume_clean: request.assume_clean, ..ResizeOptions::default() };
        let asker = Asker::Peer(session, request.id);
        let size = SectorCount(request.size_sectors);
        if kind == Kind::ResizeAsk {
            return self.start_resize(volume, asker, options);
        }
        if size.0 == 0 || size.0 > super::handshake::MAX_SECTORS {
            return self.refuse_resize(request.id, -10, "no size at all");
        }
        if device.has_metadata() && size > device.capacity {
            return self.refuse_resize(request.id, 111, "the disk there is too small for that size");
        }
        if size < device.size && (self.role == Role::Primary || self.peer_role != Role::Primary) {
            return self.refuse_resize(request.id, 170, "nobody but the single Primary cuts a volume off");
        }
        let resizing = Resizing { asker, step: ResizeStep::Grow, options, place: None };
        self.devices[volume].procedure = Some(DiskProcedure::Resize(Box::new(resizing)));
        self.grow(volume, size, !options.assume_clean);
    }

    fn refuse_resize(&mut self, id: u64, number: i32, text: &str) {
        let answer = v1::StateReply { id, result: number, text: text.to_owned(), value: 0 };
        self.send(Message::StateReply(answer), Payload::None);
    }

    /// An answer that a resize waits for; `false` when none does.
    pub(super) fn on_resize_reply(&mut self, reply: &v1::StateReply) -> bool {
        let waits = |device: &Device| match &device.procedure {
            Some(DiskProcedure::Resize(resizing)) => matches!(
                resizing.step,
                ResizeStep::AskPeer(id) | ResizeStep::CommitPeer(id) if id == reply.id
            ),
            _ => false,
        };
        let Some(volume) = self.devices.iter().position(waits) else { return false };
        let committed = self.resizing(volume).is_some_and(|r| r.step == ResizeStep::CommitPeer(reply.id));
        if reply.result != 1 {
            let facts = vec![format!("{} says: ({}) {}", self.cfg.peer_name, reply.result, reply.text)];
            let advice = format!("drbdadm status {} on both nodes, then resize again", self.cfg.name);
            let number = if matches!(reply.result, 111 | 130 | 170) { reply.result } else { -10 };
            let text = "State change was refused by peer node";
            self.end_resize(volume, Err(refusal(number, text, facts, &advice)));
            if committed {
                // Larger here than there: a handshake brings both to the same size.
                self.drop_session(ConnState::NetworkFailure, "the peer did not adopt the new size");
            }
            return true;
        }
        if committed {
            self.end_resize(volume, Ok(()));
            match reply.value {
                resync_from::SENDER => self.sync_new_area(volume, false),
                resync_from::RECEIVER => self.sync_new_area(volume, true),
                _ => {}
            }
        } else {
            self.devices[volume].peer_capacity = SectorCount(reply.value);
            let most = self.most_with(volume, SectorCount(reply.value));
            self.choose_size(volume, most);
        }
        true
    }

    /// The connection ended: a resize that waits for the peer ends with what stands here.
    pub(super) fn resize_session_lost(&mut self) {
        for volume in 0..self.devices.len() {
            let Some(step) = self.resizing(volume).map(|resizing| resizing.step) else { continue };
            let fact = match step {
                ResizeStep::AskPeer(_) => "the connection was lost before the peer told its size",
                ResizeStep::CommitPeer(_) => {
                    "this node has the new size; the peer adopts it when it connects again"
                }
                _ => continue,
            };
            let text = "State change requires a connection";
            let advice = format!("drbdadm status {}; when connected, resize again", self.cfg.name);
            self.end_resize(volume, Err(refusal(-15, text, vec![fact.to_owned()], &advice)));
        }
    }

    /// The disk failed in the middle.
    pub(super) fn resize_failed(&mut self, volume: usize, resizing: &Resizing, why: &str) {
        self.devices[volume].al_hold = false;
        self.devices[volume].recorded_size = None;
        let text = "IO error(s) occurred during initial access to meta-data.";
        let refused =
            refusal(118, text, vec![why.to_owned()], "check the backing device (dmesg), then attach again");
        self.tell_end_of_resize(volume, resizing, Err(refused));
    }
}
