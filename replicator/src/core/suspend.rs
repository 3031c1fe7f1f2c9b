//! Suspended IO: requests wait instead of being served or failed (SEM §22).
//!
//! | reason | begins | ends |
//! |---|---|---|
//! | user | `suspend-io` | `resume-io`, or the lease that it is |
//! | no-data | a Primary without any good copy, `on-no-data-accessible suspend-io` | data is back; `resume-io` fails the requests |
//! | fencing | a Primary lost its peer, `fencing resource-and-stonith` | the peer is fenced or back; `resume-io` |
//!
//! What is frozen fails when a split-brain policy demotes this Primary: its changes go.
//!
//! New requests are *parked* for every reason. Requests in hand go on under `user` (the verb answers
//! when they are through); under `fencing` none completes; under `no-data` those wait that would fail.
//!
//! What had its peer's answer outstanding when the connection ended is sent *again* as soon as the
//! peer takes data again. Its blocks are marked meanwhile, so a peer that was restarted and forgot
//! what it had acknowledged gets the older writes by the resync, which makes its disk Inconsistent
//! before it takes the first repeated write (I5). Only without a good copy here is there nothing to
//! resync from: then repeated writes must not follow forgotten ones, and a restarted peer gets none.
use super::config::OnNoData;
use super::device::MirrorMode;
use super::event::{AdminId, HandlerName, Output, RequestError, RequestId, Severity};
use super::handlers::Purpose;
use super::state::{ConnState, DiskState, Role};
use super::timer::Timer;
use super::{Reply, Resource};
use crate::units::{Time, VolumeNr};
use std::collections::VecDeque;

/// Something of the application that was not begun.
#[derive(Clone, Copy, Debug)]
enum Parked {
    Request(usize),
    Flush(RequestId, VolumeNr),
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Suspension {
    /// `suspend-io` holds, until then; `None` inside = until `resume-io`.
    user: Option<Option<Time>>,
    no_data: bool,
    /// `resume-io` said not to wait for data.
    given_up: bool,
    /// This Primary has no good copy: it was told.
    told_no_data: bool,
    /// Frozen until the lost peer's fate is known.
    fencing: bool,
    /// What is frozen fails: a policy decided that the changes of this node go.
    fails_frozen: bool,
    parked: VecDeque<Parked>,
    /// `suspend-io` that wait for requests in hand.
    draining: Vec<AdminId>,
    /// The life of the peer that had unfinished writes when the connection ended.
    held_against: Option<u64>,
}

impl Suspension {
    /// Frozen by fencing: nothing completes.
    pub(super) const fn is_frozen(&self) -> bool {
        self.fencing
    }

    /// What is frozen fails as soon as no disk is at it.
    pub(super) const fn fails_frozen(&self) -> bool {
        self.fails_frozen
    }

    /// Flushes that were not begun.
    pub(super) fn is_idle(&self) -> bool {
        self.parked.is_empty()
    }
}

impl Resource {
    /// New requests wait.
    pub(super) const fn io_suspended(&self) -> bool {
        self.suspension.user.is_some() || self.suspension.no_data || self.suspension.fencing
    }

    /// The reasons, with DRBD's words.
    pub(super) fn suspend_reasons(&self) -> Vec<String> {
        let suspension = &self.suspension;
        [
            ("user", suspension.user.is_some()),
            ("no-data", suspension.no_data),
            ("fencing", suspension.fencing),
        ]
        .into_iter()
        .filter(|(_, on)| *on)
        .map(|(why, _)| why.to_owned())
        .collect()
    }

    /// What suspended IO waits for, in words.
    pub(super) fn suspend_waits(&self, now: Time) -> Vec<String> {
        let name = &self.cfg.name;
        let parked = self.suspension.parked.len();
        let mut waits = Vec::new();
        if let Some(ends) = self.suspension.user {
            let lease = match ends {
                Some(ends) => {
                    let left = ends.ms_since(now).div_ceil(1000);
                    format!("the end of its lease in {left} s or drbdadm resume-io {name}")
                }
                None => format!("drbdadm resume-io {name}"),
            };
            waits.push(format!("IO suspended by the operator ({parked} request(s) parked): {lease}"));
        }
        if !self.suspension.draining.is_empty() {
            waits.push(format!("suspend-io: {} request(s) in hand to drain", self.requests_in_hand()));
        }
        if self.suspension.no_data {
            waits.push(format!(
                "IO suspended without a good copy ({parked} request(s) parked): a disk or {} with the data, or drbdadm resume-io {name} to fail it",
                self.cfg.peer_name
            ));
        }
        if self.suspension.fencing {
            waits.push(format!(
                "IO frozen by fencing ({parked} request(s) parked): {}, or {} to come back, or drbdadm resume-io {name}",
                self.fence_wait(),
                self.cfg.peer_name
            ));
        }
        waits
    }

    // ---- requests -------------------------------------------------------------------------------

    /// Keeps a request for later; its legs start over then.
    pub(super) fn park_request(&mut self, key: usize) {
        self.suspension.parked.push_back(Parked::Request(key));
    }

    pub(super) fn park_flush(&mut self, id: RequestId, volume: VolumeNr) {
        self.suspension.parked.push_back(Parked::Flush(id, volume));
    }

    /// Requests that were begun and are not through, barrier acks included.
    fn requests_in_hand(&self) -> usize {
        let parked = self.suspension.parked.iter().filter(|item| matches!(item, Parked::Request(_))).count();
        self.requests.len() - parked + self.flushes.len()
    }

    /// A good copy of the volume can be reached.
    pub(super) fn data_accessible(&self, volume: usize) -> bool {
        let device = &self.devices[volume];
        device.disk == DiskState::UpToDate || device.peer_readable()
    }

    /// A request of this volume that nobody can serve waits instead of failing.
    pub(super) fn waits_for_data(&self, volume: usize) -> bool {
        self.cfg.options.on_no_data == OnNoData::SuspendIo
            && !self.suspension.given_up
            && !self.data_accessible(volume)
    }

    /// Whether a write that the end of a connection interrupted goes to the peer again now.
    pub(super) fn sends_again(&self, volume: usize) -> bool {
        self.conn == ConnState::Connected && self.devices[volume].mirror_mode() == MirrorMode::Data
    }

    /// The connected peer is not the one that had the interrupted writes, and nothing here could
    /// bring it what it forgot: it must not get them.
    pub(super) fn peer_forgot(&self, volume: usize) -> bool {
        let life = self.session.as_ref().map(|session| session.peer_life);
        self.devices[volume].disk != DiskState::UpToDate
            && self.suspension.held_against.is_some_and(|against| Some(against) != life)
    }

    /// The connection ends: remembers whose answers are outstanding.
    pub(super) fn remember_peer_life(&mut self, life: u64) {
        self.suspension.held_against.get_or_insert(life);
    }

    /// Freezes IO until the fate of the lost peer is known.
    pub(super) fn freeze(&mut self) {
        if !std::mem::replace(&mut self.suspension.fencing, true) {
            self.note(Severity::Warning, "IO is frozen until the peer is fenced or back");
        }
    }

    /// The peer's fate is known.
    pub(super) fn unfreeze(&mut self, why: &str) {
        if std::mem::replace(&mut self.suspension.fencing, false) {
            self.suspension.fails_frozen = false;
            self.note(Severity::Info, format!("IO goes on: {why}"));
            self.thaw();
        }
    }

    /// The changes of this Primary go, by a policy, and it is being demoted. What is frozen was told to nobody: told
    /// done now, it would be gone at once. It fails, and its blocks are marked.
    pub(super) fn fail_frozen(&mut self) {
        if !self.suspension.fencing {
            return;
        }
        self.suspension.fails_frozen = true;
        self.note(Severity::Error, "what was frozen fails: the changes of this node go");
        for item in std::mem::take(&mut self.suspension.parked) {
            let id = match item {
                Parked::Request(key) => self.requests.remove(key).id,
                Parked::Flush(id, _) => id,
            };
            self.out.push_back(Output::Complete { id, result: Err(RequestError::Io), data: None });
        }
        self.complete_held();
    }

    // ---- verbs ----------------------------------------------------------------------------------

    pub(super) fn suspend_io(&mut self, id: AdminId) {
        let lease = self.cfg.options.suspend_lease_ms;
        let ends = (lease != 0).then(|| self.now.plus_ms(lease));
        match ends {
            Some(at) => self.timers.set(Timer::SuspendLease, at),
            None => self.timers.stop(Timer::SuspendLease),
        }
        if self.suspension.user.replace(ends).is_none() {
            self.note(Severity::Info, "IO is suspended by the operator");
        }
        // The end of the open epoch goes out now: both copies hold everything when this answers (S38).
        self.close_epoch();
        self.suspension.draining.push(id);
    }

    pub(super) fn on_suspend_lease(&mut self) {
        if self.suspension.user.take().is_some() {
            self.note(Severity::Warning, "the lease of suspend-io ended without resume-io: IO goes on");
            self.thaw();
        }
    }

    pub(super) fn resume_io(&mut self, reply: Reply) {
        self.timers.stop(Timer::SuspendLease);
        self.suspension.user = None;
        if self.suspension.no_data {
            self.note(
                Severity::Error,
                "IO goes on without a good copy, by order: what waited for data fails",
            );
            self.suspension.no_data = false;
            self.suspension.given_up = true;
            for volume in 0..self.devices.len() {
                if !self.data_accessible(volume) && !self.devices[volume].has_metadata() {
                    // The application saw writes fail: no copy that looks like the last one may come back
                    // under it (SEM §22).
                    self.devices[volume].exposed_uuid = self.random_uuid();
                }
            }
        }
        if self.suspension.fencing {
            self.suspension.fencing = false;
            self.suspension.fails_frozen = false;
            self.note(Severity::Warning, "IO goes on by order, although the peer was not fenced");
        }
        self.thaw();
        self.reply(reply, Ok(()));
    }

    // ---- the end --------------------------------------------------------------------------------

    /// Everything that was held back or parked goes on, unless another reason still holds.
    fn thaw(&mut self) {
        if self.suspension.fencing {
            return;
        }
        if self.md_primary {
            for volume in 0..self.devices.len() {
                // Deferred while nothing could complete anyway (I2 holds by its gate).
                self.new_generation_if_alone(volume);
            }
        }
        self.complete_held();
        if self.io_suspended() {
            return;
        }
        for item in std::mem::take(&mut self.suspension.parked) {
            match item {
                Parked::Request(key) => self.begin_request(key),
                Parked::Flush(id, volume) => self.on_flush(id, volume),
            }
        }
    }

    fn complete_held(&mut self) {
        let held: Vec<usize> = self.requests.iter().map(|(key, _)| key).collect();
        for key in held {
            if self.requests.contains(key) && self.requests[key].is_begun_write() {
                self.try_complete(key);
            }
        }
        self.try_complete_flushes();
    }

    /// After each input: did a reason begin or end, is a drain through?
    pub(super) fn progress_suspension(&mut self) {
        let primary = self.role == Role::Primary;
        let lost = primary && (0..self.devices.len()).any(|volume| !self.data_accessible(volume));
        if lost && !std::mem::replace(&mut self.suspension.told_no_data, true) {
            self.note(Severity::Error, "this Primary has no good copy of its data any more");
            self.run_handler(HandlerName::PriOnInconDegr, None, Purpose::Notice);
        }
        if !lost {
            self.suspension.told_no_data = false;
            self.suspension.given_up = false;
        }
        let waits = lost && self.cfg.options.on_no_data == OnNoData::SuspendIo && !self.suspension.given_up;
        if waits && !self.suspension.no_data {
            self.suspension.no_data = true;
            self.note(Severity::Warning, "IO is suspended until a good copy is back");
        } else if !waits && self.suspension.no_data {
            self.suspension.no_data = false;
            self.note(Severity::Info, "a good copy is back: IO goes on");
            self.thaw();
        }
        if self.suspension.held_against.is_some() && !self.requests.iter().any(|(_, request)| request.again) {
            self.suspension.held_against = None;
        }
        if !self.suspension.draining.is_empty() && self.requests_in_hand() == 0 && self.tl.is_empty() {
            for id in std::mem::take(&mut self.suspension.draining) {
                self.reply(Reply::Admin(id), Ok(()));
            }
        }
        // Nobody waits for a node that is not Primary.
        if !primary && self.role_change.is_none() && self.suspension.fencing {
            self.unfreeze("this node is no longer Primary");
        }
    }

    /// A write that can never be told done: no copy that holds it is good.
    pub(super) fn fail_forgotten(&mut self, key: usize) {
        self.note(
            Severity::Error,
            format!(
                "{} was restarted and may have lost writes it acknowledged: a write that waited for it fails",
                self.cfg.peer_name
            ),
        );
        self.finish_request(key, Err(RequestError::Io));
    }
}
