//! A peer that does not keep up under protocol A: `on-congestion` (SEM §24).
//!
//! ```text
//! Primary:   Established --too much in flight--> Ahead --all of it stable, pause--> WFBitMapS --> resync
//! Secondary: Established ---------State--------> Behind -----------State----------> WFBitMapT --> resync
//! ```
//! Ahead, a write is local, marked, and announced by a note; the peer's disk is Outdated, and a new
//! generation begins, so a peer promoted by force meanwhile is found to be a split brain and not taken
//! for the newer copy. The way back is an ordinary resync; nothing is pulled ahead while it runs, so it
//! ends. What pulls ahead again soon after waits twice as long each time before it goes back: a peer
//! that is too slow for its application must not make both flap for days. An application at rest
//! ends the pause.
//!
//! `block` needs no code: the send queue and the buffers are bounded.
use super::Resource;
use super::config::{OnCongestion, Protocol};
use super::device::{Device, MirrorMode};
use super::event::Severity;
use super::state::{ConnState, DiskState, ReplState};
use super::timer::Timer;
use super::transfer_log::EpochNr;
use crate::units::Time;
use lockstep_proto::limits;

/// From the last barrier ack to the way back, ms: at first, and at most.
const FIRST_PAUSE_MS: u64 = 1000;
const LAST_PAUSE_MS: u64 = 300_000;
/// An application that wrote nothing for so long ends the pause: there is nothing to be too slow for.
const CALM_MS: u64 = 5000;
/// In sync for so many pauses: the next congestion is a new one.
const FORGIVEN_AFTER: u64 = 10;

/// Being Ahead, and what is remembered of it.
#[derive(Debug, Default)]
pub(super) struct Congestion {
    /// What was in flight when this node went Ahead.
    through: Option<EpochNr>,
    /// When the way back begins, once all of that is stable on the peer.
    back_at: Option<Time>,
    /// The last write that was only noted.
    noted_at: Time,
    /// How long the next pause is.
    pause_ms: u64,
    /// When the last way back ended.
    in_sync_since: Option<Time>,
}

impl Resource {
    /// What the configuration calls too much is on its way to the peer.
    fn congested(&self, volume: usize) -> bool {
        let net = &self.cfg.net;
        let device = &self.devices[volume];
        let fill = net.congestion_fill_sectors;
        let extents = device.al.as_ref().map_or(0, |al| al.extents_in_use());
        (fill != 0 && device.unacked_sectors >= fill) || extents >= net.congestion_extents
    }

    /// For `status`: nothing is mirrored because the peer does not keep up, or it is about to be so.
    pub(super) fn is_congested(&self) -> bool {
        let net = &self.cfg.net;
        (0..self.devices.len()).any(|volume| {
            let device = &self.devices[volume];
            device.repl == ReplState::Ahead
                || (net.congestion_fill_sectors != 0 && device.unacked_sectors >= net.congestion_fill_sectors)
        })
    }

    /// Before a write is handed to the copies: does the peer keep up?
    pub(super) fn test_congestion(&mut self, volume: usize) {
        let net = &self.cfg.net;
        let device = &self.devices[volume];
        if net.on_congestion == OnCongestion::Block
            || net.protocol != Protocol::A
            || device.repl != ReplState::Established
            || device.mirror_mode() != MirrorMode::Data
            || device.disk != DiskState::UpToDate
            || device.peer_disk != DiskState::UpToDate
            || device.repair.is_some()
            || device.resync.is_some()
            || !self.congested(volume)
        {
            return;
        }
        match net.on_congestion {
            OnCongestion::Block => {}
            OnCongestion::Disconnect => {
                let (nr, sectors, name) = (device.nr.0, device.unacked_sectors, self.cfg.name.clone());
                self.note(
                    Severity::Error,
                    format!("volume {nr}: congested, {sectors} sectors unacknowledged; disconnecting as configured (on-congestion disconnect); next: drbdadm connect {name}"),
                );
                self.go_stand_alone("congestion (on-congestion disconnect)");
            }
            OnCongestion::PullAhead if !self.peer_knows_ahead() => {}
            OnCongestion::PullAhead => self.pull_ahead(volume),
        }
    }

    fn peer_knows_ahead(&self) -> bool {
        let features = self.session.as_ref().map_or(0, |session| session.handshake.peer_features());
        features & limits::FEATURE_AHEAD != 0
    }

    fn pull_ahead(&mut self, volume: usize) {
        let through = self.close_epoch();
        let now = self.now;
        let device = &mut self.devices[volume];
        let (nr, sectors) = (device.nr.0, device.unacked_sectors);
        let congestion = &mut device.congestion;
        let calm_ms = congestion.in_sync_since.map_or(u64::MAX, |since| now.ms_since(since));
        congestion.pause_ms = if calm_ms >= congestion.pause_ms.saturating_mul(FORGIVEN_AFTER) {
            FIRST_PAUSE_MS
        } else {
            (congestion.pause_ms * 2).clamp(FIRST_PAUSE_MS, LAST_PAUSE_MS)
        };
        (congestion.through, congestion.back_at) = (through, None);
        congestion.noted_at = now;
        self.note(
            Severity::Warning,
            format!(
                "volume {nr}: congested, {sectors} sectors unacknowledged; pulling ahead of {}",
                self.cfg.peer_name
            ),
        );
        self.set_repl(volume, ReplState::Ahead);
        self.set_peer_disk_fact(volume, DiskState::Outdated);
        self.send_state();
        if self.devices[volume].uuids.bitmap == 0 {
            self.bump_uuid(volume, true);
        }
    }

    /// Moves the way back on. Called after each input.
    pub(super) fn progress_congestion(&mut self, volume: usize) {
        if self.devices[volume].repl != ReplState::Ahead {
            return;
        }
        let now = self.now;
        let device = &self.devices[volume];
        let stable = device.congestion.through.is_none_or(|nr| self.tl.acked_through(nr));
        let device = &mut self.devices[volume];
        match device.congestion.back_at {
            None if stable => {
                let at = now.plus_ms(device.congestion.pause_ms);
                device.congestion.back_at = Some(at);
                self.timers.bring_forward(Timer::Ahead, at);
            }
            Some(at) => {
                let due = at.min(device.congestion.noted_at.plus_ms(CALM_MS));
                if now >= due {
                    self.go_back(volume);
                } else {
                    self.timers.bring_forward(Timer::Ahead, due);
                }
            }
            None => {}
        }
    }

    /// A write was noted and not mirrored.
    pub(super) fn note_write_ahead(&mut self, volume: usize) {
        self.devices[volume].congestion.noted_at = self.now;
    }

    fn go_back(&mut self, volume: usize) {
        // A new generation that is not durable may not be told yet; a verb may wait for the peer.
        if self.devices[volume].uuid_gate.is_some()
            || self.devices[volume].procedure.is_some()
            || self.asks_for_change(volume)
        {
            let at = self.now.plus_ms(FIRST_PAUSE_MS);
            self.devices[volume].congestion.back_at = Some(at);
            return self.timers.bring_forward(Timer::Ahead, at);
        }
        let peer_disk = self.devices[volume].peer_disk;
        // Told before the bitmap: the peer takes none while it is Behind.
        self.set_repl(volume, ReplState::WFBitMapS);
        self.send_state();
        self.begin_resync(volume, true, false, peer_disk);
    }

    /// The replication state changed: is a way back at its end?
    pub(super) fn note_calm(&mut self, volume: usize, old: ReplState) {
        if old == ReplState::SyncSource {
            self.devices[volume].congestion.in_sync_since = Some(self.now);
        }
    }

    /// The peer says whether it is Ahead of this node.
    pub(super) fn on_peer_ahead(&mut self, volume: usize, ahead: bool) {
        let device = &self.devices[volume];
        match (device.repl, ahead) {
            // Said once more by a node whose disk is gone: there is nothing to be behind of.
            (ReplState::Established, true) if device.writable() && device.peer_disk > DiskState::Outdated => {
                self.set_repl(volume, ReplState::Behind);
                self.set_peer_disk_fact(volume, DiskState::UpToDate);
                if self.devices[volume].disk > DiskState::Outdated && self.devices[volume].procedure.is_none()
                {
                    self.set_disk(volume, DiskState::Outdated);
                }
            }
            (ReplState::Behind, false) => {
                self.begin_resync(volume, false, false, DiskState::UpToDate);
            }
            _ => {}
        }
    }

    /// What being Ahead waits for.
    pub(super) fn congestion_wait(&self, device: &Device, now: Time) -> Option<String> {
        let (nr, peer) = (device.nr.0, &self.cfg.peer_name);
        match device.repl {
            ReplState::Ahead => Some(match device.congestion.back_at {
                Some(at) => format!(
                    "volume {nr}: a pause of {} s after congestion, or writes to rest, then the resync of {peer}",
                    at.ms_since(now).div_ceil(1000)
                ),
                None => format!(
                    "volume {nr}: {} sectors in flight to be stable on {peer}, which is Behind",
                    device.unacked_sectors
                ),
            }),
            ReplState::Behind if self.conn == ConnState::Connected => {
                Some(format!("volume {nr}: {peer}, which is Ahead, to begin the resync"))
            }
            _ => None,
        }
    }
}
