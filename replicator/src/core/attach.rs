//! Taking and leaving a backing disk, and losing one.
//!
//! ```text
//! Diskless --attach--> Attaching: bitmap (with hot extents set) -> superblock -> empty log -> superblock --> state by flags
//! any --detach--> Detaching: drain, flush, bitmap -> empty log -> clean superblock --> Diskless
//! any --error--> Failed: wait for IO in flight --> Diskless
//! ```
//! Each arrow is durable before the next step, so a crash anywhere replays to the same or more bits.
use super::activity_log::{ActivityLog, CONTEXT_SLOTS, MAX_SLOTS, MIN_SLOTS};
use super::bitmap::Bitmap;
use super::device::Device;
use super::event::{AdminCommand, Event, IoError, MetaWrite, Output, Refusal, Severity};
use super::fault::Fault;
use super::metadata::{BitmapThen, MetaContext, SuperblockThen};
use super::state::{ConnState, DiskState, ReplState, Role};
use super::transfer_log::EpochNr;
use super::uuid::{UuidSet, masked};
use super::verbs::refusal;
use super::{Reply, Resource};
use crate::meta::{Attached, flags};
use crate::units::{BITS_PER_AL_EXTENT, SECTORS_PER_AL_EXTENT, SECTORS_PER_BIT, SectorCount};

/// A procedure on the backing disk of one volume.
#[derive(Debug)]
pub(super) enum DiskProcedure {
    /// Applying what was found.
    Attach {
        reply: Reply,
        step: AttachStep,
        /// Superblock flags that stay as found until the log was applied.
        keep: u32,
    },
    /// Leaving cleanly.
    Detach { reply: Reply, step: DetachStep, drain_through: Option<EpochNr> },
    /// Another size, or metadata at another place.
    Resize(Box<super::resize::Resizing>),
    /// Waiting for IO in flight on a failed disk.
    Failing { reply: Option<Reply> },
}

/// Which write of an attach is on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AttachStep {
    Bitmap,
    Superblock,
    AlInit,
    FinalSuperblock,
    /// Ready, but a role change is on its way: the peer has to hear of it before it hears of this disk,
    /// or writes that only the peer takes would belong to no newer generation (S28).
    Meet,
}

/// Which step of a detach is on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DetachStep {
    Drain,
    Bitmap,
    AlInit,
    Superblock,
    Close,
}

impl Resource {
    pub(super) fn on_attach(&mut self, reply: Reply, volume: usize, attached: Attached) {
        match self.check_attach(volume, &attached) {
            Ok(()) => self.start_attach(reply, volume, attached),
            Err(refused) => {
                let nr = self.devices[volume].nr;
                if self.devices[volume].disk == DiskState::Diskless && !self.devices[volume].hung {
                    self.out.push_back(Output::DiskReleased(nr));
                }
                self.reply(reply, Err(refused));
            }
        }
    }

    fn check_attach(&self, volume: usize, attached: &Attached) -> Result<(), Refusal> {
        let device = &self.devices[volume];
        let name = format!("{}/{}", self.cfg.name, device.nr.0);
        if device.disk != DiskState::Diskless {
            return Err(refusal(
                124,
                "Device is attached to a disk (use detach first)",
                vec![format!("the disk of {name} is {}", device.disk)],
                &format!("drbdadm detach {name}"),
            ));
        }
        if device.hung {
            return Err(refusal(
                124,
                "Device is attached to a disk (use detach first)",
                vec![format!(
                    "the disk of {name} was given up, and {} IO are still on their way to it",
                    device.ios
                )],
                "repair what keeps the disk from answering (dmesg); it can be attached when that IO has ended",
            ));
        }
        let superblock = &attached.superblock;
        let needed = if device.size.0 != 0 { device.size } else { superblock.la_size };
        if needed > attached.capacity {
            return Err(refusal(
                if superblock.flags & flags::CONSISTENT == 0 { 111 } else { 170 },
                "Low.dev. too small.",
                vec![
                    format!("the volume has {} sectors of data", needed.0),
                    format!("the disk holds {} sectors beside its metadata", attached.capacity.0),
                ],
                "give the backing device its former size back, or shrink the volume with resize --size first",
            ));
        }
        let exposed = masked(device.exposed_uuid);
        if self.role == Role::Primary && device.repl == ReplState::Off && exposed != 0 {
            let found = masked(superblock.uuid[0]);
            if !shows(exposed, superblock.uuid[0], superblock.uuid[1]) || device.missed_writes {
                let mut facts = vec![
                    format!("the application was shown generation {exposed:016X}"),
                    format!("the disk holds generation {found:016X}"),
                ];
                if device.missed_writes {
                    facts.push("writes were acknowledged that only the peer's disk holds".into());
                }
                return Err(refusal(
                    150,
                    "Can only attach to the data we lost last (see kernel log).",
                    facts,
                    &format!("connect to the peer first: drbdadm connect {}", self.cfg.name),
                ));
            }
        }
        Ok(())
    }

    fn start_attach(&mut self, reply: Reply, volume: usize, attached: Attached) {
        let primary = self.role == Role::Primary;
        let cold = self.planted(Fault::HotExtentsIgnored);
        let partial = self.planted(Fault::FullSyncIgnored);
        let device = &mut self.devices[volume];
        let Attached { superblock, hot_extents, al_unusable, bitmap, capacity, discard, logical_block_bytes } =
            attached;
        let found = superblock.flags;
        let was_primary = found & flags::PRIMARY_IND != 0;
        let crashed = found & flags::CRASHED_PRIMARY != 0 || (was_primary && !primary);
        device.capacity = capacity;
        device.discard = discard;
        device.logical_block_bytes = logical_block_bytes;
        if device.size.0 == 0 {
            device.size = if superblock.la_size.0 != 0 {
                superblock.la_size
            } else {
                SectorCount(device.cfg.user_size.map_or(capacity.0, |user| user.0.min(capacity.0)))
            };
        }
        device.uuids = UuidSet::from_array(superblock.uuid);
        if !primary {
            device.uuids.current = masked(device.uuids.current);
        }
        device.crashed_primary = crashed;
        // Not recorded: a bitmap identifier may come from the start of a resync.
        device.peer_may_have_current = device.uuids.bitmap != 0;
        device.full_sync = false;
        device.keeps_books = false;
        // What an earlier life of this node wrote may still be in the disk's cache: the first bitmap
        // write flushes it, before anything is concluded from it.
        device.writes_done += 1;
        device.md_clean = false;
        device.md_disk = if found & flags::CONSISTENT == 0 {
            DiskState::Inconsistent
        } else if found & flags::WAS_UP_TO_DATE == 0 {
            DiskState::Outdated
        } else {
            DiskState::Consistent
        };
        if found & flags::PEER_OUT_DATED != 0 && device.repl == ReplState::Off {
            device.peer_disk = DiskState::Outdated;
        }

        let covered_by_disk = bitmap.len() as u64 * 64;
        let nr_bits = Device::nr_bits(device.size);
        // Behind the size it was last used with, the disk's bits mean nothing: that area was added since (S16).
        let la_size = superblock.la_size;
        let old_bits = if la_size.0 == 0 { nr_bits } else { Device::nr_bits(la_size).min(nr_bits) };
        device.bitmap = Bitmap::from_words(bitmap, old_bits);
        // Bits the disk does not hold are unknown: take them as set.
        device.bitmap.set_range(covered_by_disk.min(old_bits)..old_bits);
        device.bitmap.resize(nr_bits, true);
        if la_size.0 != 0 && la_size < device.size {
            let partial = la_size.0 / SECTORS_PER_BIT;
            device.bitmap.set_range(partial..partial + 1);
        }
        let disabled = found & flags::AL_DISABLED != 0 && (was_primary || crashed);
        let all = (found & flags::FULL_SYNC != 0 && !partial) || disabled || (al_unusable && was_primary);
        if all {
            device.bitmap.set_all();
        } else if was_primary && !cold {
            for extent in hot_extents {
                let first = u64::from(extent) * BITS_PER_AL_EXTENT;
                device.bitmap.set_range(first..first + BITS_PER_AL_EXTENT);
            }
        }
        let bits = device.bitmap.count();
        device.found = Some(superblock);
        // Not `all` alone: the flags that made us set all bits stay on disk until the bits are there.
        let keep = found & (flags::PRIMARY_IND | flags::FULL_SYNC | flags::AL_DISABLED);
        device.procedure = Some(DiskProcedure::Attach { reply, step: AttachStep::Bitmap, keep });
        let nr = device.nr;
        self.set_disk(volume, DiskState::Attaching);
        if was_primary {
            let what = if all { "every block".to_owned() } else { format!("{bits} blocks of 4 KiB") };
            self.note(
                Severity::Info,
                format!("volume {}: this node was Primary when it stopped; {what} marked from the activity log and the bitmap", nr.0),
            );
        }
        if al_unusable && was_primary {
            self.note(
                Severity::Warning,
                format!(
                    "volume {}: the activity log is not readable, so every block counts as changed",
                    nr.0
                ),
            );
        }
        self.write_bitmap(volume, BitmapThen::Disk);
    }

    /// Flags that a running attach keeps in the superblock.
    pub(super) fn attach_keeps_flags(&self, volume: usize) -> u32 {
        match &self.devices[volume].procedure {
            Some(DiskProcedure::Attach {
                step: AttachStep::Bitmap | AttachStep::Superblock | AttachStep::AlInit,
                keep,
                ..
            }) => *keep,
            _ => 0,
        }
    }

    /// The write of the current step is durable.
    pub(super) fn disk_step_done(&mut self, volume: usize) {
        match &mut self.devices[volume].procedure {
            Some(DiskProcedure::Attach { step, .. }) => match step {
                AttachStep::Bitmap => {
                    *step = AttachStep::Superblock;
                    self.md_touch(volume);
                    self.md_then(volume, SuperblockThen::Disk);
                }
                AttachStep::Superblock => {
                    *step = AttachStep::AlInit;
                    self.meta(volume, MetaWrite::AlInit, MetaContext::AlInit(volume));
                }
                AttachStep::AlInit | AttachStep::Meet => {}
                AttachStep::FinalSuperblock => {
                    *step = AttachStep::Meet;
                    self.progress_disk(volume);
                }
            },
            Some(DiskProcedure::Detach { step, .. }) => match step {
                DetachStep::Drain | DetachStep::AlInit => {}
                DetachStep::Bitmap => {
                    *step = DetachStep::AlInit;
                    self.meta(volume, MetaWrite::AlInit, MetaContext::AlInit(volume));
                }
                // Another procedure may have a write of its own on the way.
                DetachStep::Superblock => *step = DetachStep::Close,
                DetachStep::Close => {}
            },
            Some(DiskProcedure::Resize(_)) => self.resize_step_done(volume),
            Some(DiskProcedure::Failing { .. }) | None => {}
        }
    }

    pub(super) fn on_al_initialised(&mut self, volume: usize) {
        match &mut self.devices[volume].procedure {
            Some(DiskProcedure::Attach { step, .. }) => *step = AttachStep::FinalSuperblock,
            Some(DiskProcedure::Detach { step, .. }) => {
                *step = DetachStep::Superblock;
                self.devices[volume].md_clean = true;
            }
            Some(DiskProcedure::Resize(_)) => return self.resize_step_done(volume),
            Some(DiskProcedure::Failing { .. }) | None => return,
        }
        self.md_touch(volume);
        self.md_then(volume, SuperblockThen::Disk);
    }

    fn finish_attach(&mut self, volume: usize) {
        let Some(DiskProcedure::Attach { reply, .. }) = self.devices[volume].procedure.take() else { return };
        let connected = self.conn == ConnState::Connected && self.peer_info_known(volume);
        let device = &mut self.devices[volume];
        let ring = device.found.as_ref().map_or(8, |sb| sb.al_stripes.saturating_mul(sb.al_stripe_size_4k));
        let held = u32::try_from(CONTEXT_SLOTS).unwrap_or(0).saturating_mul(ring.saturating_sub(1));
        let slots = device.cfg.al_extents.min(held).clamp(MIN_SLOTS, MAX_SLOTS);
        device.al = Some(ActivityLog::new(slots, device.size.0.div_ceil(SECTORS_PER_AL_EXTENT)));
        if connected {
            device.negotiating = true;
            self.set_disk(volume, DiskState::Negotiating);
            self.send_volume_info(volume, lockstep_proto::v1::volume_info::Phase::Attach);
        } else {
            let alone = self.disk_state_alone(volume);
            self.set_disk(volume, alone);
            if self.role == Role::Primary {
                self.update_export(volume);
                // Of what the peer does meanwhile this copy knows nothing: what is written here from now on
                // must not look like an older state of what is there.
                if !self.suspension.is_frozen() {
                    self.new_generation_if_alone(volume);
                }
            }
        }
        self.reply(reply, Ok(()));
        self.handshake_try_send();
    }

    /// What the metadata makes of a disk without the peer's word. Without fencing, Consistent counts as
    /// UpToDate at once (SEM §5), but a Primary that went on elsewhere must not show its application
    /// older data than before: that disk waits as Outdated for a resync.
    pub(super) fn disk_state_alone(&self, volume: usize) -> DiskState {
        let device = &self.devices[volume];
        let shown = masked(device.exposed_uuid);
        let UuidSet { current, bitmap, .. } = device.uuids;
        let older = self.role == Role::Primary
            && ((shown != 0 && !shows(shown, current, bitmap)) || device.missed_writes);
        match device.md_disk {
            DiskState::Consistent | DiskState::UpToDate if older => DiskState::Outdated,
            DiskState::Consistent if self.stays_consistent(volume) => DiskState::Consistent,
            DiskState::Consistent => DiskState::UpToDate,
            other => other,
        }
    }

    pub(super) fn on_detach(&mut self, reply: Reply, volume: usize, force: bool) {
        let device = &self.devices[volume];
        let name = format!("{}/{}", self.cfg.name, device.nr.0);
        if matches!(device.procedure, Some(DiskProcedure::Resize(_))) && !force {
            let facts = vec![format!("a resize of {name} is running")];
            let text = "In transient state, retry after next state change";
            return self.reply(reply, Err(refusal(-18, text, facts, "wait for it, or detach --force")));
        }
        match device.disk {
            DiskState::Diskless => return self.reply(reply, Ok(())),
            DiskState::Attaching | DiskState::Detaching | DiskState::Negotiating if !force => {
                let facts = vec![format!("the disk of {name} is {}", device.disk)];
                let refused = refusal(
                    -18,
                    "In transient state, retry after next state change",
                    facts,
                    "try again in a moment",
                );
                return self.reply(reply, Err(refused));
            }
            DiskState::Failed => {
                if force {
                    self.abandon_io(volume);
                }
                if let Some(DiskProcedure::Failing { reply: slot @ None }) =
                    &mut self.devices[volume].procedure
                {
                    *slot = Some(reply);
                } else {
                    self.reply(reply, Ok(()));
                }
                return;
            }
            DiskState::Inconsistent
            | DiskState::Outdated
            | DiskState::Consistent
            | DiskState::UpToDate
            | DiskState::Attaching
            | DiskState::Detaching
            | DiskState::Negotiating
            | DiskState::DUnknown => {}
        }
        if self.role == Role::Primary
            && !device.peer_readable()
            && device.disk == DiskState::UpToDate
            && !force
        {
            let facts = vec![
                format!("{name} is Primary here and this disk is the last good copy"),
                format!("the peer's disk is {}, connection {}", device.peer_disk, self.conn),
            ];
            let refused = refusal(
                -2,
                "Need access to UpToDate data",
                facts,
                &format!("drbdadm secondary {}, then detach", self.cfg.name),
            );
            return self.reply(reply, Err(refused));
        }
        if !force && let Err(refused) = self.check_peer_needs_us("detach") {
            return self.reply(reply, Err(refused));
        }
        if force {
            self.give_up_disk(volume, "detach --force", None);
            self.abandon_io(volume);
            match &mut self.devices[volume].procedure {
                Some(DiskProcedure::Failing { reply: slot }) => *slot = Some(reply),
                _ => self.reply(reply, Ok(())),
            }
            return;
        }
        self.devices[volume].went_on_at_peer = None;
        self.devices[volume].untold_loss |= self.devices[volume].repair.is_some();
        let drain_through = self.close_epoch();
        self.devices[volume].procedure =
            Some(DiskProcedure::Detach { reply, step: DetachStep::Drain, drain_through });
        self.abort_resync(volume);
        self.set_disk(volume, DiskState::Detaching);
        self.leave_resync_states(volume);
    }

    /// Moves a detach or failure on when what it waits for has happened.
    pub(super) fn progress_disk(&mut self, volume: usize) {
        let idle = self.devices[volume].ios == 0;
        match &self.devices[volume].procedure {
            Some(DiskProcedure::Detach { step: DetachStep::Drain, drain_through, .. }) => {
                let acked = drain_through.is_none_or(|nr| self.tl.acked_through(nr));
                let locally_done = idle && self.devices[volume].al_waiters.is_empty();
                if acked && locally_done {
                    if let Some(DiskProcedure::Detach { step, .. }) = &mut self.devices[volume].procedure {
                        *step = DetachStep::Bitmap;
                    }
                    self.al_abandon(volume);
                    if self.planted(Fault::DetachWithoutBitmap) {
                        return self.disk_step_done(volume);
                    }
                    self.write_bitmap(volume, BitmapThen::Disk);
                }
            }
            Some(DiskProcedure::Attach { step: AttachStep::Meet, .. }) if self.role_lets_disks_meet() => {
                self.finish_attach(volume);
            }
            Some(DiskProcedure::Detach { step: DetachStep::Close, .. }) if idle => self.finish_detach(volume),
            Some(DiskProcedure::Failing { .. })
                if idle && self.devices[volume].io_error_handler.is_none() =>
            {
                self.end_failing(volume);
            }
            Some(DiskProcedure::Resize(_)) => self.progress_resize(volume),
            Some(
                DiskProcedure::Attach { .. } | DiskProcedure::Detach { .. } | DiskProcedure::Failing { .. },
            )
            | None => {}
        }
    }

    /// The peer is gone, or its disk, while the last good copy of a Primary was on its way out: it stays,
    /// if it still has all that the application was told of (SEM §6, -2).
    pub(super) fn keep_last_copy(&mut self, volume: usize) {
        let device = &mut self.devices[volume];
        let whole =
            device.md_disk == DiskState::UpToDate && !device.missed_writes && device.uuids.bitmap == 0;
        let draining =
            matches!(device.procedure, Some(DiskProcedure::Detach { step: DetachStep::Drain, .. }));
        if !self.md_primary || !whole || !draining || device.peer_readable() {
            return;
        }
        // The peer started a generation when it heard of the detach, and nothing was acknowledged under it
        // that is not here, too. Without knowing its name both would go on from the old one.
        let Some(at_peer) = device.went_on_at_peer.take() else { return };
        let Some(DiskProcedure::Detach { reply, .. }) = device.procedure.take() else { return };
        device.uuids.bump_keeping_base(masked(at_peer) | 1);
        self.set_disk(volume, DiskState::UpToDate);
        self.flush_what_stayed(volume);
        let name = format!("{}/{}", self.cfg.name, self.devices[volume].nr.0);
        let facts = vec![
            format!(
                "{name} is Primary here and this disk became the last good copy while it was being detached"
            ),
            format!("the peer's disk is {}, connection {}", self.devices[volume].peer_disk, self.conn),
        ];
        let advice = format!("drbdadm secondary {}, then detach", self.cfg.name);
        self.reply(reply, Err(refusal(-2, "Need access to UpToDate data", facts, &advice)));
    }

    /// A failed disk is left: its IO has ended, or nobody waits for it any more.
    pub(super) fn end_failing(&mut self, volume: usize) {
        if let Some(DiskProcedure::Failing { reply }) = self.devices[volume].procedure.take() {
            self.release_disk(volume);
            if let Some(reply) = reply {
                self.reply(reply, Ok(()));
            }
        }
    }

    fn finish_detach(&mut self, volume: usize) {
        let Some(DiskProcedure::Detach { reply, .. }) = self.devices[volume].procedure.take() else { return };
        self.release_disk(volume);
        self.reply(reply, Ok(()));
    }

    fn release_disk(&mut self, volume: usize) {
        self.forget_local_legs(volume);
        // What the application goes on with: the peer's generation, which may have changed since our
        // disk left; only that data may be attached again (SEM §9).
        let nr = u32::from(self.devices[volume].nr.0);
        let at_peer = self
            .session
            .as_ref()
            .filter(|_| self.devices[volume].peer_readable())
            .and_then(|session| session.handshake.peer_generation(nr));
        let device = &mut self.devices[volume];
        let went_on = device.went_on_at_peer.take();
        // A generation that never became durable was shown to nobody, and no copy may have it.
        let own = device.shown_before_gate.take().unwrap_or(device.uuids.current);
        device.exposed_uuid = at_peer.or(went_on).unwrap_or(own);
        device.found = None;
        device.md_clean = false;
        device.md_disk = DiskState::Diskless;
        device.bitmap = Bitmap::default();
        device.capacity = SectorCount(0);
        device.crashed_primary = false;
        device.full_sync = false;
        device.keeps_books = false;
        device.negotiating = false;
        if self.role != Role::Primary && self.conn < ConnState::Connected {
            device.size = SectorCount(0);
        }
        let nr = device.nr;
        device.abandoned_at = None;
        device.hung = device.ios > 0;
        let hung = device.hung;
        self.set_disk(volume, DiskState::Diskless);
        if !hung {
            self.out.push_back(Output::DiskReleased(nr));
        }
        self.try_complete_flushes();
        self.handshake_try_send();
    }

    /// The own disk failed: with `call-local-io-error` the operator's program is run first (SEM §21).
    pub(super) fn fail_disk(&mut self, volume: usize, why: &str, error: Option<IoError>) {
        if !matches!(self.devices[volume].disk, DiskState::Failed | DiskState::Diskless) {
            self.run_local_io_error(volume);
            self.give_up_disk(volume, why, error);
        }
    }

    /// The own disk cannot be used any more.
    fn give_up_disk(&mut self, volume: usize, why: &str, error: Option<IoError>) {
        if matches!(self.devices[volume].disk, DiskState::Failed | DiskState::Diskless) {
            return;
        }
        self.devices[volume].repair = None;
        self.devices[volume].untold_loss |= self.md_primary
            && self.devices[volume].disk == DiskState::UpToDate
            && self.devices[volume].peer_readable();
        let nr = self.devices[volume].nr;
        let detail = error.map(|error| format!(" ({error:?})")).unwrap_or_default();
        self.note(Severity::Error, format!("volume {}: {why}{detail}; the disk is detached", nr.0));
        let pending = match self.devices[volume].procedure.take() {
            Some(DiskProcedure::Attach { reply, .. } | DiskProcedure::Detach { reply, .. }) => Some(reply),
            Some(DiskProcedure::Failing { reply }) => reply,
            Some(DiskProcedure::Resize(resizing)) => {
                self.resize_failed(volume, &resizing, &format!("{why}{detail}"));
                None
            }
            None => None,
        };
        self.devices[volume].procedure = Some(DiskProcedure::Failing { reply: None });
        // `down` wanted the disk away: that is what happens, and it goes on when it has.
        if let Some(reply) = pending.filter(|reply| *reply != Reply::Internal) {
            let refused = refusal(
                118,
                "IO error(s) occurred during initial access to meta-data.",
                vec![format!("{why}{detail}")],
                "check the backing device (dmesg), then attach again",
            );
            self.reply(reply, Err(refused));
        }
        self.abort_resync(volume);
        self.set_disk(volume, DiskState::Failed);
        self.leave_resync_states(volume);
        let device = &mut self.devices[volume];
        device.md_durable = device.md_generation;
        device.md_writing = None;
        let waiters = std::mem::take(&mut device.md_waiters);
        let jobs: Vec<_> = device.bm_running.take().into_iter().chain(device.bm_jobs.drain(..)).collect();
        device.bm_pages.clear();
        self.al_abandon(volume);
        for (_, then) in waiters {
            self.superblock_then(volume, then);
        }
        for job in jobs {
            self.bitmap_then(volume, job.then);
        }
        self.open_gate_without_disk(volume);
        self.drain_receive_queue();
        if self.handshake_running() {
            self.drop_session(ConnState::NetworkFailure, "the local disk failed during the handshake");
        }
    }

    fn open_gate_without_disk(&mut self, volume: usize) {
        let device = &mut self.devices[volume];
        device.uuid_gate = None;
        for key in std::mem::take(&mut device.gated) {
            if self.requests.contains(key) {
                self.try_complete(key);
            }
        }
        self.try_complete_flushes();
    }

    /// The only place where the own disk state changes; each edge is announced.
    pub(super) fn set_disk(&mut self, volume: usize, new: DiskState) {
        let device = &mut self.devices[volume];
        let old = device.disk;
        if old == new {
            return;
        }
        assert!(legal_disk_edge(old, new), "disk {old} -> {new} is no legal change");
        device.disk = new;
        if device.writable() {
            device.md_disk = new;
        }
        if new == DiskState::UpToDate {
            device.missed_writes = false;
            device.untold_loss = false;
            device.retry = super::repair::Retry::default();
            device.peer_may_miss = None;
        }
        let nr = device.nr;
        self.event(Event::Disk(nr, old, new));
        if self.devices[volume].has_metadata() && self.devices[volume].procedure.is_none() {
            self.md_touch(volume);
        }
        self.send_state();
    }

    /// Whether a verb must wait because a disk is between two states.
    pub(super) fn disk_in_transit(&self) -> bool {
        self.devices.iter().any(|device| device.procedure.is_some())
    }

    /// Turns an attach verb over; kept here so that `verbs.rs` needs no knowledge of metadata.
    pub(super) fn attach_command(&mut self, reply: Reply, command: AdminCommand) {
        if let AdminCommand::Attach { volume, attached } = command {
            match self.device_index(volume) {
                Some(at) => self.on_attach(reply, at, *attached),
                None => self.reply_no_such_volume(reply, volume),
            }
        }
    }
}

/// Whether a disk of these identifiers holds what the application was shown: that generation, or the one
/// that this node was about to go on to from it, under which nothing was acknowledged.
fn shows(shown: u64, current: u64, bitmap: u64) -> bool {
    [current, bitmap].iter().any(|uuid| masked(*uuid) == masked(shown))
}

/// Which changes of the own disk state exist (SEM §5), and Detaching to UpToDate: a detach is called off
/// when this turns out to be the last good copy. The last arm is "no".
#[expect(clippy::match_like_matches_macro, reason = "a table of edges, whose last arm is \"no\"")]
const fn legal_disk_edge(old: DiskState, new: DiskState) -> bool {
    use DiskState::{
        Attaching, Consistent, Detaching, Diskless, Failed, Inconsistent, Negotiating, Outdated, UpToDate,
    };
    match (old, new) {
        (Diskless, Attaching) | (Failed | Detaching, Diskless) => true,
        (Attaching, Negotiating | Inconsistent | Outdated | Consistent | UpToDate | Failed) => true,
        (Negotiating, Inconsistent | Outdated | Consistent | UpToDate | Failed) => true,
        (Inconsistent | Outdated | Consistent | UpToDate, Detaching | Failed) => true,
        (
            Inconsistent | Outdated | Consistent | UpToDate,
            Inconsistent | Outdated | Consistent | UpToDate,
        ) => true,
        (Detaching, Failed | UpToDate) => true,
        _ => false,
    }
}
