//! What is written to the metadata area, and in which order (I1-I5, DISK §14).
//!
//! Three writers per volume, each with one write in flight:
//!
//! * the **superblock**: a change raises `md_generation`; writes coalesce; whoever depends on a
//!   generation waits in `md_waiters` until it is durable;
//! * **bitmap pages**: jobs in a queue. A job snapshots its pages, *then* flushes the data disk, then
//!   writes them, so a cleared bit reaches the disk only behind the data that cleared it (I4). One job
//!   at a time, so an older snapshot never overwrites a newer one;
//! * the **activity log**: collect waiters → bitmap job for the victims → transaction (I3).
//!
//! A failed metadata write fails the disk, whatever `on-io-error` says (SEM §21).
use super::device::AlUser;
use super::event::{DiskOp, IoError, MetaId, MetaWrite};
use super::fault::Fault;
use super::state::{ConnState, DiskState, Role};
use super::{IoContext, Resource};
use crate::core::activity_log::Collected;
use crate::meta::{
    AlTransaction, BITMAP_PAGE_BITS, BitmapPage, MAGIC_CLEAN, MAGIC_UNCLEAN, Superblock, flags,
};
use crate::units::BITS_PER_AL_EXTENT;

/// Bitmap pages written by one metadata write at most.
const PAGES_PER_WRITE: usize = 64;

/// What a metadata write was for.
#[derive(Clone, Copy, Debug)]
pub(super) enum MetaContext {
    /// The superblock of this generation.
    Superblock(usize, u64),
    /// An activity-log transaction.
    AlTransaction(usize),
    /// The ring is being initialised, as a step of attach or detach.
    AlInit(usize),
    /// Pages of the running bitmap job.
    Bitmap(usize),
    /// A step of a resize that concerns the place.
    Relocated(usize),
}

impl MetaContext {
    /// Of which volume.
    pub(super) const fn volume(self) -> usize {
        let (Self::Superblock(volume, _)
        | Self::AlTransaction(volume)
        | Self::AlInit(volume)
        | Self::Bitmap(volume)
        | Self::Relocated(volume)) = self;
        volume
    }
}

/// What goes on once a superblock generation is durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SuperblockThen {
    /// Completions may go (I2).
    OpenGate,
    /// A step of the volume's attach, detach or resize.
    Disk,
    /// The volume may be exported with its new size.
    Export,
    /// A step of a role change.
    Role,
    /// The resync may start here: tell the target.
    SourceStart,
    /// The target is durably Inconsistent (I5).
    TargetStart,
    /// The target is durably UpToDate.
    TargetFinish,
    /// FULL_SYNC is recorded: set all bits.
    FullSyncRecorded,
    /// The target of a resync is recorded as the older copy: tell its bits.
    SendBitmap,
    /// Answer this verb: done if this disk says so.
    Reply(super::event::AdminId),
    /// Answer this verb: done whatever became of the disk.
    Done(super::event::AdminId),
    /// Answer this question of the peer.
    AnswerPeer(u64),
    /// Tell the peer the identifiers.
    TellPeer,
}

/// What goes on once a bitmap job is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BitmapThen {
    /// Nothing.
    Nothing,
    /// The marks made for a diskless Primary are durable.
    BooksClosed,
    /// The bits of an area that a handshake added are durable.
    Grown,
    /// The activity-log transaction may be written.
    AlTransaction,
    /// A step of the volume's attach or detach.
    Disk,
    /// A step of a role change.
    Role,
    /// The full bitmap is on disk.
    FullSync,
    /// The bitmap is ready for a resync.
    ResyncReady,
    /// Resync is at its end on the target.
    TargetFinish,
    /// Resync is at its end on the source.
    SourceFinish,
    /// The identifiers may change now (new-current-uuid).
    NewUuid(super::event::AdminId, u64),
}

/// A bitmap write on its way.
#[derive(Clone, Debug)]
pub(super) struct BitmapJob {
    /// Bits whose pages are wanted; empty = every changed page.
    pub(super) extents: Vec<u32>,
    /// Data writes that must be stable even if no page changed.
    pub(super) flush_up_to: u64,
    pub(super) then: BitmapThen,
}

/// Where the activity log of a volume is.
#[derive(Debug, Default)]
pub(super) enum AlStep {
    /// No transaction on the way.
    #[default]
    Idle,
    /// Victims' pages and data are being made durable.
    Preparing(Box<AlTransaction>),
    /// The transaction is being written.
    Writing,
}

impl Resource {
    /// The superblock as it should be now.
    fn superblock(&self, volume: usize) -> Option<Superblock> {
        let device = &self.devices[volume];
        let found = device.found.as_ref()?;
        let mut word = 0;
        let mut set = |flag: u32, on: bool| {
            if on {
                word |= flag;
            }
        };
        set(flags::CONSISTENT, device.md_disk >= DiskState::Outdated);
        set(flags::WAS_UP_TO_DATE, device.md_disk > DiskState::Outdated);
        let for_peer = self.serves_diskless_primary(volume) || device.keeps_books;
        let primary = (self.md_primary || for_peer) && !self.planted(Fault::NoPrimaryFlag);
        set(flags::PRIMARY_IND, primary && !device.md_clean);
        set(flags::CONNECTED_IND, self.conn >= ConnState::Connected);
        set(flags::PEER_OUT_DATED, matches!(device.peer_disk, DiskState::Inconsistent | DiskState::Outdated));
        set(flags::CRASHED_PRIMARY, device.crashed_primary);
        set(flags::FULL_SYNC, device.full_sync && !self.planted(Fault::FullSyncNotRecorded));
        set(flags::AL_DISABLED, !device.cfg.al_updates);
        set(flags::AL_CLEAN, device.md_clean);
        // During attach the flags found stay until the log was applied and made durable.
        word |= self.attach_keeps_flags(volume) | self.resize_keeps_flags(volume);
        Some(Superblock {
            la_size: device.recorded_size.unwrap_or(device.size),
            uuid: device.uuids.to_array(),
            flags: word,
            magic: if device.md_clean { MAGIC_CLEAN } else { MAGIC_UNCLEAN },
            al_nr_extents: device.cfg.al_extents,
            ..found.clone()
        })
    }

    /// The peer is Primary without a disk: this copy takes its writes and keeps the books (SEM §9).
    pub(super) fn serves_diskless_primary(&self, volume: usize) -> bool {
        self.peer_role == Role::Primary && self.devices[volume].peer_disk < DiskState::Inconsistent
    }

    /// The peer no longer relies on our books: PRIMARY_IND stays until every mark is on disk.
    pub(super) fn close_books(&mut self, volume: usize) {
        let device = &self.devices[volume];
        // A detach writes the whole bitmap anyway, a failed disk nothing.
        if device.keeps_books && device.procedure.is_none() && !self.serves_diskless_primary(volume) {
            self.write_bitmap(volume, BitmapThen::BooksClosed);
        }
    }

    fn books_closed(&mut self, volume: usize) {
        if self.devices[volume].keeps_books && !self.serves_diskless_primary(volume) {
            self.devices[volume].keeps_books = false;
            self.md_touch(volume);
        }
    }

    /// The flags word as it would be written now.
    pub(super) fn superblock_flags(&self, volume: usize) -> u32 {
        self.superblock(volume).map_or(0, |superblock| superblock.flags)
    }

    /// The superblock changed: it is written as soon as the one on the way is done.
    pub(super) fn md_touch(&mut self, volume: usize) {
        let device = &mut self.devices[volume];
        device.md_generation += 1;
        if device.md_writing.is_none() {
            self.md_write(volume);
        }
    }

    /// Goes on with `then` once everything changed so far is durable; at once without a disk.
    pub(super) fn md_then(&mut self, volume: usize, then: SuperblockThen) {
        let device = &mut self.devices[volume];
        if !device.has_metadata() || device.md_durable >= device.md_generation {
            self.superblock_then(volume, then);
        } else {
            let generation = device.md_generation;
            device.md_waiters.push((generation, then));
        }
    }

    /// Whether a superblock change is not durable yet.
    pub(super) fn md_busy(&self, volume: usize) -> bool {
        let device = &self.devices[volume];
        device.has_metadata() && device.md_durable < device.md_generation
    }

    fn md_write(&mut self, volume: usize) {
        if !self.devices[volume].has_metadata() {
            let device = &mut self.devices[volume];
            device.md_durable = device.md_generation;
            return;
        }
        let Some(superblock) = self.superblock(volume) else { return };
        let generation = self.devices[volume].md_generation;
        self.devices[volume].md_writing = Some(generation);
        self.meta(
            volume,
            MetaWrite::Superblock(Box::new(superblock)),
            MetaContext::Superblock(volume, generation),
        );
    }

    pub(super) fn on_meta_done(&mut self, id: MetaId, result: Result<(), IoError>) {
        let key = usize::try_from(id.0).unwrap_or(usize::MAX);
        assert!(
            self.metas.contains(key),
            "the runtime answered metadata write {} twice or never got it",
            id.0
        );
        let context = self.metas.remove(key).context;
        let volume = context.volume();
        self.devices[volume].ios -= 1;
        if let Err(error) = result {
            self.devices[volume].md_writing = None;
            self.fail_disk(volume, "a metadata write failed", Some(error));
            return self.hung_io_ended(volume);
        }
        if !self.devices[volume].has_metadata() {
            // The disk failed meanwhile; its waiters were served then.
            self.devices[volume].md_writing = None;
            return self.hung_io_ended(volume);
        }
        match context {
            MetaContext::Superblock(_, generation) => self.on_superblock_done(volume, generation),
            MetaContext::AlTransaction(_) => self.on_al_written(volume),
            MetaContext::AlInit(_) => self.on_al_initialised(volume),
            MetaContext::Bitmap(_) => self.on_bitmap_written(volume),
            MetaContext::Relocated(_) => self.resize_step_done(volume),
        }
    }

    fn on_superblock_done(&mut self, volume: usize, generation: u64) {
        let device = &mut self.devices[volume];
        device.md_writing = None;
        device.md_durable = generation;
        if device.md_generation > generation {
            self.md_write(volume);
        }
        let device = &mut self.devices[volume];
        let mut ready = Vec::new();
        device.md_waiters.retain(|(wanted, then)| {
            let done = *wanted <= generation;
            if done {
                ready.push(*then);
            }
            !done
        });
        for then in ready {
            self.superblock_then(volume, then);
        }
        self.drain_receive_queue();
        self.handshake_try_send();
    }

    pub(super) fn superblock_then(&mut self, volume: usize, then: SuperblockThen) {
        match then {
            SuperblockThen::OpenGate => self.open_uuid_gate(volume),
            SuperblockThen::Disk => self.disk_step_done(volume),
            SuperblockThen::Export => self.update_export(volume),
            SuperblockThen::Role => self.role_step_done(),
            SuperblockThen::SourceStart => self.source_started(volume),
            SuperblockThen::TargetStart => self.target_started(volume),
            SuperblockThen::TargetFinish => self.target_finished(volume),
            SuperblockThen::FullSyncRecorded => self.full_sync_recorded(volume),
            SuperblockThen::SendBitmap => self.target_recorded(volume),
            SuperblockThen::Done(id) => self.reply(super::Reply::Admin(id), Ok(())),
            SuperblockThen::Reply(id) => {
                let done = self.recorded(volume);
                self.reply(super::Reply::Admin(id), done);
            }
            SuperblockThen::AnswerPeer(id) => self.answer_peer(id),
            SuperblockThen::TellPeer => self.send_volume_update(volume),
        }
    }

    /// Whether this disk holds what was to be recorded: one that failed meanwhile does not.
    fn recorded(&self, volume: usize) -> Result<(), super::event::Refusal> {
        let device = &self.devices[volume];
        if device.has_metadata() {
            return Ok(());
        }
        let name = format!("{}/{}", self.cfg.name, device.nr.0);
        Err(super::verbs::refusal(
            118,
            "IO error(s) occurred during initial access to meta-data.",
            vec![format!(
                "the disk of {name} is {}: its superblock may not say what was ordered",
                device.disk
            )],
            &format!("check the backing device (dmesg), then drbdadm attach {name} and order it again"),
        ))
    }

    /// The current generation is new: nothing completes before it is durable (I2).
    pub(super) fn bump_uuid(&mut self, volume: usize, primary: bool) {
        let fresh = self.random_uuid() | u64::from(primary);
        let device = &mut self.devices[volume];
        device.shown_before_gate.get_or_insert(device.uuids.current);
        device.uuids.bump(fresh);
        device.peer_may_have_current = false;
        self.md_touch(volume);
        let device = &mut self.devices[volume];
        device.uuid_gate = Some(device.md_generation);
        self.md_then(volume, SuperblockThen::OpenGate);
    }

    /// A new generation while the bits stay relative to the old base (SEM §12, DRBD 9): a target that
    /// finished its resync unnoticed holds the former current one, and must not look newer than us
    /// when it goes on from there.
    pub(super) fn bump_uuid_keeping_base(&mut self, volume: usize, primary: bool) {
        let fresh = self.random_uuid() | u64::from(primary);
        let device = &mut self.devices[volume];
        device.peer_may_have_current = false;
        device.shown_before_gate.get_or_insert(device.uuids.current);
        device.uuids.bump_keeping_base(fresh);
        self.md_touch(volume);
        let device = &mut self.devices[volume];
        device.uuid_gate = Some(device.md_generation);
        self.md_then(volume, SuperblockThen::OpenGate);
    }

    fn open_uuid_gate(&mut self, volume: usize) {
        let device = &mut self.devices[volume];
        if device.uuid_gate.is_some_and(|gate| gate > device.md_durable) && device.has_metadata() {
            return;
        }
        device.uuid_gate = None;
        if device.has_metadata() && device.shown_before_gate.take().is_some() {
            // Whoever misses something is told by its generation from here on.
            device.peer_may_miss = None;
        }
        for key in std::mem::take(&mut device.gated) {
            if self.requests.contains(key) {
                self.try_complete(key);
            }
        }
        self.try_complete_flushes();
        if self.conn >= ConnState::Connected {
            self.send_volume_update(volume);
        }
    }

    // ---- bitmap pages -------------------------------------------------------------------------

    /// Every changed page, behind a flush of the data; then `then`.
    pub(super) fn write_bitmap(&mut self, volume: usize, then: BitmapThen) {
        let flush_up_to = self.devices[volume].writes_done;
        self.queue_bitmap_job(volume, BitmapJob { extents: Vec::new(), flush_up_to, then });
    }

    fn queue_bitmap_job(&mut self, volume: usize, job: BitmapJob) {
        if !self.devices[volume].has_metadata() {
            self.bitmap_then(volume, job.then);
            return;
        }
        self.devices[volume].bm_jobs.push_back(job);
        self.run_bitmap_jobs(volume);
    }

    fn run_bitmap_jobs(&mut self, volume: usize) {
        let careless = self.planted(Fault::PagesBeforeData);
        let device = &mut self.devices[volume];
        if device.bm_running.is_some() {
            return;
        }
        let Some(job) = device.bm_jobs.pop_front() else { return };
        // Snapshot first, flush second: a bit cleared after this point is not in the snapshot.
        let pages = if job.extents.is_empty() {
            device.bitmap.take_changed_pages(PAGES_PER_WRITE)
        } else {
            victims_pages(device, &job.extents)
        };
        let writes = device.writes_done;
        let flush =
            device.writes_flushed < job.flush_up_to || (!pages.is_empty() && device.writes_flushed < writes);
        device.counters.bm_writes += pages.len() as u64;
        device.bm_running = Some(job);
        device.bm_pages = pages;
        if flush && !careless {
            self.submit_io(
                volume,
                DiskOp::Flush,
                None,
                false,
                None,
                IoContext::BitmapFlush { volume, writes },
            );
        } else {
            self.write_snapshot(volume);
        }
    }

    pub(super) fn on_bitmap_flushed(&mut self, volume: usize, writes: u64, ok: bool) {
        self.devices[volume].ios -= 1;
        if !ok {
            self.fail_disk(volume, "a flush of the data disk failed", None);
            return;
        }
        let device = &mut self.devices[volume];
        device.writes_flushed = device.writes_flushed.max(writes);
        if device.bm_running.is_some() {
            self.write_snapshot(volume);
        }
    }

    fn write_snapshot(&mut self, volume: usize) {
        let pages = std::mem::take(&mut self.devices[volume].bm_pages);
        if pages.is_empty() {
            self.on_bitmap_written(volume);
        } else {
            self.meta(volume, MetaWrite::Bitmap(pages), MetaContext::Bitmap(volume));
        }
    }

    fn on_bitmap_written(&mut self, volume: usize) {
        let device = &mut self.devices[volume];
        let Some(job) = device.bm_running.take() else { return };
        if job.extents.is_empty() && device.bitmap.has_changed_pages() && job.then != BitmapThen::Nothing {
            // More than one write's worth: let others in between, then go on.
            device.bm_jobs.push_back(job);
        } else {
            self.bitmap_then(volume, job.then);
        }
        self.run_bitmap_jobs(volume);
    }

    pub(super) fn bitmap_then(&mut self, volume: usize, then: BitmapThen) {
        match then {
            BitmapThen::Nothing => {}
            BitmapThen::BooksClosed => self.books_closed(volume),
            BitmapThen::Grown => self.grown_at_handshake(volume),
            BitmapThen::AlTransaction => self.write_al_transaction(volume),
            BitmapThen::Disk => self.disk_step_done(volume),
            BitmapThen::Role => self.role_step_done(),
            BitmapThen::FullSync => self.full_sync_written(volume),
            BitmapThen::ResyncReady => self.resync_bitmap_durable(volume),
            BitmapThen::TargetFinish => self.target_bitmap_durable(volume),
            BitmapThen::SourceFinish => self.source_bitmap_durable(volume),
            BitmapThen::NewUuid(id, uuid) => self.new_uuid_bitmap_durable(volume, id, uuid),
        }
    }

    // ---- activity log -------------------------------------------------------------------------

    /// Makes the extents of `range` hot for `user`. `true`: they are; go on now.
    pub(super) fn al_begin(&mut self, volume: usize, user: AlUser, extents: std::ops::Range<u64>) -> bool {
        let device = &mut self.devices[volume];
        let Some(al) = device.al.as_mut() else { return true };
        // While somebody waits for a free slot, hot writes queue up behind, or he would starve (SEM §10).
        if device.al_waiters.is_empty() && !device.al_hold && al.acquire(extents) {
            return true;
        }
        device.al_waiters.push_back(user);
        self.al_due = true;
        false
    }

    /// Whether writes to this volume go through the activity log.
    pub(super) fn al_in_use(&self, volume: usize) -> bool {
        let device = &self.devices[volume];
        device.cfg.al_updates && device.al.is_some() && device.writable()
    }

    /// Puts waiting requests into one transaction, as many as fit.
    pub(super) fn al_collect(&mut self, volume: usize) {
        loop {
            if !matches!(self.devices[volume].al_step, AlStep::Idle) || self.devices[volume].al_hold {
                return;
            }
            let Some(user) = self.devices[volume].al_waiters.front().copied() else { break };
            let extents = self.al_user_extents(user);
            let device = &mut self.devices[volume];
            let Some(al) = device.al.as_mut() else { return };
            if !al.is_open() && al.acquire(extents.clone()) {
                // Became hot meanwhile, and nothing is collected yet that it would overtake.
                device.al_waiters.pop_front();
                self.al_granted(volume, user);
                continue;
            }
            if !al.collect(extents) {
                break;
            }
            device.al_waiters.pop_front();
            device.al_committing.push(user);
        }
        let device = &mut self.devices[volume];
        let Some(Collected { transaction, evicted, flush_up_to }) =
            device.al.as_mut().and_then(|al| al.seal())
        else {
            return;
        };
        device.al_step = AlStep::Preparing(Box::new(transaction));
        if evicted.is_empty() || self.planted(Fault::EvictWithoutPage) {
            self.write_al_transaction(volume);
        } else {
            let job = BitmapJob { extents: evicted, flush_up_to, then: BitmapThen::AlTransaction };
            self.queue_bitmap_job(volume, job);
        }
    }

    fn write_al_transaction(&mut self, volume: usize) {
        let device = &mut self.devices[volume];
        match std::mem::replace(&mut device.al_step, AlStep::Writing) {
            AlStep::Preparing(transaction) => {
                device.counters.al_writes += 1;
                self.meta(volume, MetaWrite::AlTransaction(transaction), MetaContext::AlTransaction(volume));
                if self.planted(Fault::AlNotAwaited) {
                    for user in std::mem::take(&mut self.devices[volume].al_committing) {
                        self.al_granted(volume, user);
                    }
                }
            }
            other @ (AlStep::Idle | AlStep::Writing) => device.al_step = other,
        }
    }

    fn on_al_written(&mut self, volume: usize) {
        let device = &mut self.devices[volume];
        device.al_step = AlStep::Idle;
        if let Some(al) = device.al.as_mut() {
            al.commit();
        }
        for user in std::mem::take(&mut device.al_committing) {
            self.al_granted(volume, user);
        }
        if !self.devices[volume].al_waiters.is_empty() {
            self.al_due = true;
        }
    }

    /// The extents of `user` are hot and referenced by it.
    fn al_granted(&mut self, volume: usize, user: AlUser) {
        match user {
            AlUser::Request(key) => self.request_logged(key, true),
            AlUser::Peer(key) => {
                self.peer_requests[key].al = true;
                self.submit_peer_write(volume, key);
            }
        }
    }

    fn al_user_extents(&self, user: AlUser) -> std::ops::Range<u64> {
        match user {
            AlUser::Request(key) => self.requests[key].range.al_extents(),
            AlUser::Peer(key) => self.peer_requests[key].range.al_extents(),
        }
    }

    /// Gives the references of a finished write back.
    pub(super) fn al_end(&mut self, volume: usize, extents: std::ops::Range<u64>) {
        let device = &mut self.devices[volume];
        let writes = device.writes_done;
        if let Some(al) = device.al.as_mut() {
            al.release(extents, writes);
            if !device.al_waiters.is_empty() {
                self.al_due = true;
            }
        }
    }

    /// The disk is gone: nobody waits for its log any more; writes go on without the local leg.
    pub(super) fn al_abandon(&mut self, volume: usize) {
        let device = &mut self.devices[volume];
        device.al = None;
        device.al_step = AlStep::Idle;
        let users: Vec<AlUser> = std::mem::take(&mut device.al_committing)
            .into_iter()
            .chain(device.al_waiters.drain(..))
            .collect();
        for request in self.requests.iter_mut().filter(|(_, request)| request.volume == volume) {
            request.1.al = false;
        }
        for request in self.peer_requests.iter_mut().filter(|(_, request)| request.volume() == volume) {
            request.1.al = false;
        }
        for user in users {
            match user {
                AlUser::Request(key) => self.request_logged(key, false),
                AlUser::Peer(key) => self.submit_peer_write(volume, key),
            }
        }
    }
}

/// Snapshots of the changed pages that cover the extents leaving the log.
fn victims_pages(device: &mut super::device::Device, extents: &[u32]) -> Vec<BitmapPage> {
    let mut pages = Vec::new();
    for extent in extents {
        let first_bit = u64::from(*extent) * BITS_PER_AL_EXTENT;
        // An extent's 1024 bits lie inside one page of 32768.
        if let Ok(page) = u32::try_from(first_bit / BITMAP_PAGE_BITS) {
            pages.extend(device.bitmap.take_changed_page(page));
        }
    }
    pages
}
