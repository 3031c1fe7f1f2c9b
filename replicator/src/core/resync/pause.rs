//! Pausing a resync (SEM §19.4): by an operator here or at the peer, or because it comes after another.
//!
//! A pause lets what was asked for come to its end and asks for nothing more. Both sides know: each tells
//! the other in its `State` whether it wants a pause, so both are Paused or none is.
use crate::core::event::Refusal;
use crate::core::state::ReplState;
use crate::core::timer::Timer;
use crate::core::verbs::refusal;
use crate::core::{Reply, Resource};
use crate::units::VolumeNr;

/// Who wants a resync of this volume to stand still.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::core) struct Pauses {
    /// `pause-sync` on this node.
    pub(in crate::core) user: bool,
    /// The peer's operator, or what its volume comes after.
    pub(in crate::core) peer: bool,
    /// `resync-after`: another volume of this node comes first.
    pub(in crate::core) dependency: bool,
}

impl Pauses {
    /// This node wants it.
    pub(in crate::core) const fn own(self) -> bool {
        self.user || self.dependency
    }

    /// Anybody wants it.
    pub(in crate::core) const fn any(self) -> bool {
        self.own() || self.peer
    }

    /// DRBD's words for `status`.
    pub(in crate::core) fn reasons(self) -> String {
        let words = [(self.user, "user"), (self.peer, "peer"), (self.dependency, "dependency")];
        let words: Vec<&str> = words.into_iter().filter(|(on, _)| *on).map(|(_, word)| word).collect();
        if words.is_empty() { "no".to_owned() } else { words.join(",") }
    }
}

impl Resource {
    pub(in crate::core) fn pause_sync(&mut self, reply: Reply, volume: usize) {
        if self.devices[volume].pauses.user {
            let refused = self.pause_refusal(
                volume,
                134,
                "Sync-pause flag is already set",
                "nothing to do; drbdadm resume-sync ends the pause",
            );
            return self.reply(reply, Err(refused));
        }
        self.devices[volume].pauses.user = true;
        self.pauses_changed(volume);
        self.reply(reply, Ok(()));
    }

    pub(in crate::core) fn resume_sync(&mut self, reply: Reply, volume: usize) {
        let pauses = self.devices[volume].pauses;
        if !pauses.user {
            let paused = matches!(self.devices[volume].repl, ReplState::PausedSyncS | ReplState::PausedSyncT);
            let peer = self.cfg.peer_name.clone();
            let refused = if paused && pauses.dependency {
                self.pause_refusal(
                    volume,
                    156,
                    "Sync-pause flag is cleared, but the resync waits for another one (resync-after)",
                    "wait for the resync it comes after, or change resync-after",
                )
            } else if paused && pauses.peer {
                let advice = format!("on {peer}: drbdadm resume-sync {}", self.cfg.name);
                self.pause_refusal(
                    volume,
                    157,
                    "Sync-pause flag is cleared, but the peer pauses the resync",
                    &advice,
                )
            } else {
                self.pause_refusal(volume, 135, "Sync-pause flag is already cleared", "nothing to do")
            };
            return self.reply(reply, Err(refused));
        }
        self.devices[volume].pauses.user = false;
        self.pauses_changed(volume);
        self.reply(reply, Ok(()));
    }

    fn pause_refusal(&self, volume: usize, number: i32, text: &str, advice: &str) -> Refusal {
        let device = &self.devices[volume];
        let facts = vec![
            format!("volume {}: replication {}", device.nr.0, device.repl),
            format!("paused by: {}", device.pauses.reasons()),
        ];
        refusal(number, text, facts, advice)
    }

    /// `resync-after`: whether what this volume comes after is still resyncing or paused.
    pub(in crate::core) fn on_resync_dependency(&mut self, volume: VolumeNr, waits: bool) {
        let Some(volume) = self.device_index(volume) else { return };
        if std::mem::replace(&mut self.devices[volume].pauses.dependency, waits) != waits {
            self.pauses_changed(volume);
        }
    }

    /// The peer says whether it wants a pause.
    pub(in crate::core) fn on_peer_pause(&mut self, volume: usize, paused: bool) {
        if std::mem::replace(&mut self.devices[volume].pauses.peer, paused) != paused {
            self.apply_pause(volume);
        }
    }

    fn pauses_changed(&mut self, volume: usize) {
        self.send_state();
        self.apply_pause(volume);
    }

    /// Brings the replication state in line with who wants a pause.
    pub(in crate::core) fn apply_pause(&mut self, volume: usize) {
        let device = &self.devices[volume];
        let now = self.now;
        let (next, paused) = match (device.repl, device.pauses.any()) {
            (ReplState::SyncSource, true) => (ReplState::PausedSyncS, true),
            (ReplState::SyncTarget, true) => (ReplState::PausedSyncT, true),
            (ReplState::PausedSyncS, false) => (ReplState::SyncSource, false),
            (ReplState::PausedSyncT, false) => (ReplState::SyncTarget, false),
            _ => return,
        };
        self.set_repl(volume, next);
        if let Some(resync) = &mut self.devices[volume].resync {
            if paused {
                resync.paused_since = Some(now);
            } else if let Some(since) = resync.paused_since.take() {
                resync.paused_ms += now.ms_since(since);
            }
        }
        self.timers.set_if_idle(Timer::Resync, self.now.plus_ms(super::rate::TICK_MS));
        self.resync_target_go_on(volume);
    }
}
