//! IO that the own disk does not answer: `disk-timeout` (SEM §21, §25) and `detach --force`.
//!
//! The disk is given up, and whoever waits for it goes on as after an error: the application is served
//! by the peer if that has the data, the peer hears of the lost disk and gets negative answers. The IO
//! itself cannot be taken back: it stays counted, and its buffer stays the runtime's, until the disk
//! answers or the process ends. Only then is the disk let go (S33): a transfer that comes late finds
//! its own buffer, and nobody else's data on the way to another disk.
//!
//! After [`LET_GO_MS`] this node goes on as Diskless, so that it can meet its peer and be taken down; the
//! disk cannot be attached again before its IO has ended.
use super::attach::DiskProcedure;
use super::event::{IoError, Output, Severity};
use super::state::DiskState;
use super::timer::Timer;
use super::{IoContext, Resource};
use crate::units::Time;

/// A disk that was given up may still answer for so long before this node counts as Diskless.
const LET_GO_MS: u64 = 5000;
/// An IO that is older than this is named as something that is waited for.
const SLOW_MS: u64 = 5000;

impl Resource {
    /// An IO was handed to the disk: when it is too old.
    pub(super) fn watch_disk(&mut self, volume: usize) {
        let limit = self.devices[volume].cfg.disk_timeout_ms;
        if limit != 0 {
            self.timers.set_if_idle(Timer::Disk, self.now.plus_ms(limit));
        }
    }

    /// When the oldest IO of this volume that somebody waits for was handed to the disk.
    fn oldest_io(&self, volume: usize) -> Option<Time> {
        let data = self.ios.iter().filter(|(_, io)| io.volume == volume && !io.is_abandoned());
        let meta = self.metas.iter().filter(|(_, meta)| meta.volume() == volume);
        data.map(|(_, io)| io.since).chain(meta.map(|(_, meta)| meta.since)).min()
    }

    pub(super) fn on_disk_timer(&mut self) {
        let mut next: Option<Time> = None;
        for volume in 0..self.devices.len() {
            let device = &self.devices[volume];
            let limit = device.cfg.disk_timeout_ms;
            if limit == 0 || matches!(device.disk, DiskState::Failed | DiskState::Diskless) {
                continue;
            }
            let Some(oldest) = self.oldest_io(volume) else { continue };
            let due = oldest.plus_ms(limit);
            if self.now >= due {
                let why = format!("the local disk did not answer within {limit} ms (disk-timeout)");
                self.fail_disk(volume, &why, None);
                self.abandon_io(volume);
            } else {
                next = Some(next.map_or(due, |next| next.min(due)));
            }
        }
        if let Some(next) = next {
            self.timers.set(Timer::Disk, next);
        }
    }

    /// Nobody waits any more for what the disk of this volume was asked.
    pub(super) fn abandon_io(&mut self, volume: usize) {
        debug_assert!(matches!(self.devices[volume].disk, DiskState::Failed | DiskState::Diskless));
        let open: Vec<usize> = self
            .ios
            .iter()
            .filter(|(_, io)| io.volume == volume && !io.is_abandoned())
            .map(|(key, _)| key)
            .collect();
        for key in open {
            let context = std::mem::replace(&mut self.ios[key].context, IoContext::Abandoned);
            // Whoever is told counts it as done; the disk is still at it.
            self.devices[volume].ios += 1;
            self.io_done(context, Err(IoError::Aborted));
        }
        let (now, device) = (self.now, &mut self.devices[volume]);
        if device.ios > 0 && matches!(device.procedure, Some(DiskProcedure::Failing { .. })) {
            let since = *device.abandoned_at.get_or_insert(now);
            self.timers.bring_forward(Timer::LetGo, since.plus_ms(LET_GO_MS));
        }
    }

    /// Disks that were given up and still do not answer: this node goes on without them.
    pub(super) fn let_go_of_hung_disks(&mut self) {
        for volume in 0..self.devices.len() {
            let device = &self.devices[volume];
            let Some(since) = device.abandoned_at else { continue };
            let due = since.plus_ms(LET_GO_MS);
            if self.now < due || device.io_error_handler.is_some() {
                // The operator's program comes first; it has a limit of its own.
                let next = if self.now < due { due } else { self.now.plus_ms(LET_GO_MS) };
                self.timers.bring_forward(Timer::LetGo, next);
                continue;
            }
            let (nr, ios) = (device.nr.0, device.ios);
            self.note(
                Severity::Error,
                format!("volume {nr}: {ios} IO of the disk that was given up do not end; going on without it, and it cannot be attached before they do"),
            );
            self.end_failing(volume);
        }
    }

    /// An IO of a disk that was given up came to its end after all.
    pub(super) fn hung_io_ended(&mut self, volume: usize) {
        let device = &mut self.devices[volume];
        if device.ios == 0 && std::mem::take(&mut device.hung) {
            let nr = device.nr;
            self.note(
                Severity::Info,
                format!("volume {}: the last IO of the disk that was given up has ended", nr.0),
            );
            self.out.push_back(Output::DiskReleased(nr));
        }
    }

    /// What a disk that does not answer keeps waiting, and what may be done about it.
    pub(super) fn disk_wait(&self, volume: usize, now: Time) -> Option<String> {
        let device = &self.devices[volume];
        let (nr, ios, name) = (device.nr.0, device.ios, &self.cfg.name);
        if device.hung {
            return Some(format!(
                "volume {nr}: {ios} IO that the disk which was given up has not answered, before it can be attached again"
            ));
        }
        let age_ms = now.ms_since(self.oldest_io(volume)?);
        (age_ms >= SLOW_MS && !matches!(device.disk, DiskState::Failed | DiskState::Diskless)).then(|| {
            format!(
                "volume {nr}: the disk here, which has not answered for {} s ({ios} IO in flight); drbdadm detach --force {name}/{nr} gives it up",
                age_ms / 1000
            )
        })
    }
}
