//! IO that the own disk does not answer: `disk-timeout` (SEM §21, §25) and `detach --force`.
//!
//! The disk is given up, and whoever waits for it goes on as after an error: the application is served
//! by the peer if that has the data, the peer hears of the lost disk and gets negative answers. The IO
//! itself cannot be taken back: it stays counted, and its buffer stays the runtime's, until the disk
//! answers or the process ends. Only then is the disk let go (S33): a transfer that comes late finds
//! its own buffer, and nobody else's data on the way to another disk.
use super::event::IoError;
use super::state::DiskState;
use super::timer::Timer;
use super::{IoContext, Resource};
use crate::units::Time;

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
    }
}
