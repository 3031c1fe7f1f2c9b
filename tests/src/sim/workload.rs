//! The application and the operator of a random run, and what must hold at its end.
use super::node::VOLUME;
use super::world::{Options, World};
use lockstep_replicator::core::config::Protocol;
use lockstep_replicator::core::event::{AdminCommand, Event, RequestOp};
use lockstep_replicator::core::policy::Outcome;
use lockstep_replicator::core::state::{ConnState, DiskState, ReplState, Role};

const MS: u64 = 1_000_000;

/// What a run did.
#[derive(Clone, Copy, Debug, Default)]
pub struct Summary {
    /// Requests completed well.
    pub good: u64,
    /// Requests completed with an error.
    pub failed: u64,
    /// Messages delivered.
    pub messages: u64,
    /// The run produced a split brain, which was detected.
    pub split: bool,
}

struct Run {
    world: World,
    /// Node the application runs on.
    writer: Option<usize>,
    /// Both nodes went on from the same generation; possible, and certain.
    may_split: bool,
    must_split: bool,
    /// The operator ordered a full resync.
    full_allowed: bool,
    settled: bool,
    seen_log: usize,
    operators: bool,
    errors: bool,
}

fn options(seed: u64, verbose: bool) -> (Options, World) {
    let mut options = Options::new(seed);
    options.verbose |= verbose;
    let mut world = World::new(options);
    let rng = &mut world.rng;
    world.options.net.protocol = match rng.below(6) {
        0 => Protocol::A,
        1 => Protocol::B,
        _ => Protocol::C,
    };
    world.options.net.max_epoch_size = [1, 3, 20, 2048][usize::try_from(rng.below(4)).unwrap_or(0)];
    let sectors = match rng.below(8) {
        0 => 72 * 8192,
        1 => 3 * 8192 + 5,
        2 => 16 * 8192,
        _ => 4 * 8192,
    };
    if rng.percent(15) && sectors < 20 * 8192 {
        world.options.volume.resync_rate_kib_s = Some(2000 + rng.below(20_000));
    }
    let mut options = world.options.clone();
    options.sectors = sectors;
    (options, world)
}

/// One run.
///
/// # Errors
/// A promise was broken.
pub fn run(seed: u64, verbose: bool) -> Result<Summary, String> {
    let (options, before) = options(seed, verbose);
    let mut world = World::new(options);
    world.rng = before.rng;
    let mut run = Run {
        world,
        writer: None,
        may_split: false,
        must_split: false,
        full_allowed: true,
        settled: false,
        seen_log: 0,
        operators: false,
        errors: false,
    };
    run.operators = run.world.rng.percent(70);
    run.errors = run.world.rng.percent(25);
    run.go();
    match run.world.broken {
        Some(why) => Err(why),
        None => Ok(Summary {
            good: run.world.good_requests,
            failed: run.world.failed_requests,
            messages: run.world.delivered,
            split: run.must_split,
        }),
    }
}

impl Run {
    fn go(&mut self) {
        self.world.start(0);
        self.world.start(1);
        let first = usize::try_from(self.world.rng.below(2)).unwrap_or(0);
        let fresh = |world: &World| {
            (0..2).all(|node| {
                world.state(node).is_some_and(|state| {
                    state.1 == DiskState::Inconsistent && state.2 == ConnState::Connected
                })
            })
        };
        if !self.world.run_until(5000, fresh) {
            return self.world.fail("the fresh pair does not meet".into());
        }
        self.world.admin(first, "primary-force", AdminCommand::Primary { force: true });
        // Sometimes the load starts in the middle of the initial sync.
        if self.world.rng.percent(80) {
            if !self.world.run_until(60_000, World::in_sync) {
                return self.world.fail("the initial sync does not end".into());
            }
        } else {
            self.world.run(300);
        }
        self.writer = Some(first);
        let load_ms = 500 + self.world.rng.below(4000);
        let end = self.world.now + load_ms * MS;
        self.world.alarm(MS, 0);
        self.world.alarm(20 * MS, 1);
        while self.world.now < end && self.world.broken.is_none() {
            self.world.step(end);
            self.watch();
            for alarm in std::mem::take(&mut self.world.alarms) {
                if alarm == 0 {
                    self.application();
                    let next = self.world.rng.below(6 * MS);
                    self.world.alarm(next, 0);
                } else if alarm == 1 {
                    self.operator();
                    let next = self.world.rng.below(160 * MS);
                    self.world.alarm(next, 1);
                } else {
                    let node = usize::try_from(alarm % 2).unwrap_or(0);
                    self.restart(node);
                }
            }
        }
        if self.world.broken.is_none() {
            self.finish();
        }
    }

    /// Looks at what the nodes announced.
    fn watch(&mut self) {
        while self.seen_log < self.world.log.len() {
            let (_, node, event) = self.world.log[self.seen_log].clone();
            self.seen_log += 1;
            if let Event::Role(_, Role::Primary) = &event {
                self.reign(node);
            }
            // Started from equal generations, a resync has no older base to return to: if it is cut and
            // the source goes on alone, only everything is safe.
            if let Event::Handshake(decision) = &event {
                let from_equal = (40..50).contains(&decision.decided.comparison.rule.number());
                self.full_allowed |= from_equal && decision.decided.outcome != Outcome::NoSync;
                let full = matches!(
                    decision.decided.outcome,
                    Outcome::Source { full: true } | Outcome::Target { full: true }
                );
                if full && !self.full_allowed {
                    self.world.fail(format!("n{node}: a full sync without need: {decision}"));
                }
            }
        }
        if self.world.in_sync() {
            if self.must_split {
                self.world.fail("a split brain was resolved without anybody deciding".into());
            }
            self.world.ahead = [false; 2];
            self.settled = true;
            self.may_split = false;
            self.full_allowed = false;
            self.world.check_quiet();
        }
    }

    // ---- application ----------------------------------------------------------------------------

    fn application(&mut self) {
        let Some(node) = self.writer else { return };
        if !self.world.is_primary(node) || self.world.nodes[node].requests.len() > 60 {
            return;
        }
        let burst = 1 + self.world.rng.below(6);
        for _ in 0..burst {
            let sectors = self.world.options.sectors;
            let rng = &mut self.world.rng;
            let hot = rng.percent(60);
            let mut len = match rng.below(10) {
                0 => 1 + rng.below(40),
                1 => 64 + rng.below(400),
                _ => 8 * (1 + rng.below(6)),
            };
            let mut start = if hot { 8192 - 128 + rng.below(256) } else { rng.below(sectors) };
            if rng.percent(70) {
                start &= !7;
            }
            let kind = rng.below(100);
            if kind >= 97 {
                len = rng.below(9000);
            }
            let len = len.min(sectors - start).max(1);
            let fua = rng.percent(8);
            match kind {
                0..=29 => self.world.request(node, RequestOp::Read, start, len, false),
                30..=84 => self.world.request(node, RequestOp::Write, start, len, fua),
                85..=91 => self.world.flush(node),
                92..=95 => {
                    let op = RequestOp::WriteZeroes { may_unmap: start % 2 == 0 };
                    self.world.request(node, op, start, len, fua)
                }
                96..=97 => self.world.request(node, RequestOp::Discard, start, len, false),
                _ => self.world.request(node, RequestOp::WriteZeroes { may_unmap: true }, start, len, false),
            };
        }
    }

    // ---- operator -------------------------------------------------------------------------------

    fn operator(&mut self) {
        let node = usize::try_from(self.world.rng.below(2)).unwrap_or(0);
        match self.world.rng.below(100) {
            0..=24 => {
                let down = self.world.rng.percent(50);
                self.world.cut(down);
            }
            25..=44 => self.world.heal(),
            45..=54 => {
                let power = self.world.rng.percent(50);
                self.crash(node, power);
            }
            55..=57 => {
                let power = self.world.rng.percent(70);
                self.crash(0, power);
                self.crash(1, power);
            }
            58..=63 if self.operators => {
                let command = AdminCommand::Disconnect { force: self.world.rng.percent(20) };
                self.world.admin(node, "disconnect", command);
            }
            64..=74 => self.connect(node),
            75..=79 if self.operators => {
                self.world.admin(node, "detach", AdminCommand::Detach { volume: VOLUME, force: false });
            }
            80..=86 => self.attach(node),
            87..=89 if self.operators && self.settled => self.full_resync(node),
            90..=93 if self.operators => self.switch_over(),
            94..=95 if self.operators => self.down(node),
            96..=97 if self.errors && self.world.in_sync() => {
                if self.world.rng.percent(70) {
                    self.world.nodes[node].fail_writes = 1;
                } else {
                    self.world.nodes[node].fail_flushes = 1;
                }
            }
            _ => {}
        }
        self.fail_over();
    }

    fn connect(&mut self, node: usize) {
        let command = AdminCommand::Connect { discard_my_data: false, tentative: false };
        self.world.admin(node, "connect", command);
    }

    fn attach(&mut self, node: usize) {
        let diskless = self.world.state(node).is_some_and(|state| state.1 == DiskState::Diskless);
        if diskless && !self.world.nodes[node].disk_open {
            self.world.attach(node);
        }
    }

    fn full_resync(&mut self, node: usize) {
        // A diverged pair must not be healed by throwing data away on our own order.
        if !self.world.in_sync() {
            return;
        }
        self.full_allowed = true;
        let command = if self.world.rng.percent(50) {
            AdminCommand::Invalidate(VOLUME)
        } else {
            AdminCommand::InvalidateRemote(VOLUME)
        };
        self.world.admin(node, "invalidate", command);
    }

    fn down(&mut self, node: usize) {
        if self.world.nodes[node].core.is_none() {
            return;
        }
        self.world.admin(node, "down", AdminCommand::Down);
        self.pump(400, |_| false);
        if self.world.nodes[node].verbs.values().any(|verb| *verb == "down") {
            // It waits for a peer that does not answer; the operator loses patience.
            self.crash(node, false);
        } else if self.world.nodes[node].core.is_some() {
            let at_rest = self.world.state(node).is_some_and(|s| s.1 == DiskState::Diskless);
            if at_rest {
                self.world.crash(node, false);
                self.schedule_restart(node);
            }
        }
    }

    fn crash(&mut self, node: usize, power: bool) {
        if self.world.nodes[node].core.is_some() {
            // Under protocol A the peer may not have what was acked, and a Primary that dies while its
            // disk is being detached leaves the peer with the newer generation.
            let leaving = self.world.state(node).is_some_and(|state| state.1 < DiskState::Inconsistent);
            if leaving && self.world.options.net.protocol == Protocol::A {
                self.world.history.weaken(false);
            }
            self.world.crash(node, power);
            self.schedule_restart(node);
        }
    }

    fn schedule_restart(&mut self, node: usize) {
        let delay = 5 * MS + self.world.rng.below(400 * MS);
        self.world.alarm(delay, 2 + node as u64);
    }

    fn restart(&mut self, node: usize) {
        if self.world.nodes[node].core.is_some() {
            return;
        }
        // A Primary without a disk had its only copy in the cache that is lost.
        let other_holds = self.world.is_primary(1 - node)
            && self.world.state(1 - node).is_some_and(|state| state.1 >= DiskState::Inconsistent);
        if self.world.nodes[node].lost_power && !other_holds {
            self.world.history.weaken(true);
        }
        self.world.start(node);
    }

    /// Secondary on the writer, Primary on the other: planned.
    fn switch_over(&mut self) {
        let Some(node) = self.writer else { return };
        if !self.world.in_sync() || !self.world.is_primary(node) {
            return;
        }
        let id = self.world.admin(node, "secondary", AdminCommand::Secondary);
        self.writer = None;
        self.pump(300, |world| {
            world.nodes[node].answers.contains_key(&id) || world.nodes[node].core.is_none()
        });
        let demoted = matches!(self.world.nodes[node].answers.get(&id), Some(Ok(())));
        if demoted && self.world.in_sync() {
            self.promote(1 - node);
        }
    }

    /// The writer is not Primary any more: somebody becomes it.
    fn fail_over(&mut self) {
        if (0..2).any(|node| self.world.is_primary(node)) {
            for node in 0..2 {
                if self.world.is_primary(node) {
                    self.writer = Some(node);
                }
            }
            return;
        }
        let node = usize::try_from(self.world.rng.below(2)).unwrap_or(0);
        if self.world.nodes[node].core.is_some() && self.world.rng.percent(60) {
            self.promote(node);
        }
    }

    fn promote(&mut self, node: usize) {
        let id = self.world.admin(node, "primary", AdminCommand::Primary { force: false });
        if id == 0 {
            return;
        }
        self.pump(200, |world| {
            world.nodes[node].answers.contains_key(&id) || world.nodes[node].core.is_none()
        });
    }

    /// Runs for `ms` or until `done`, watching.
    fn pump(&mut self, ms: u64, done: impl Fn(&World) -> bool) {
        let end = self.world.now + ms * MS;
        while self.world.broken.is_none() && !done(&self.world) && self.world.step(end) {
            self.watch();
        }
        self.watch();
    }

    /// A node became Primary: may both have gone on from the same data?
    fn reign(&mut self, node: usize) {
        let other = 1 - node;
        self.writer = Some(node);
        // A peer without a disk says nothing about what that disk holds.
        let with_peer = self.world.status(node).is_some_and(|status| {
            let disk = status.connection.peer_volumes[0].peer_disk;
            status.connection.connection == ConnState::Connected
                && disk >= DiskState::Inconsistent
                && disk != DiskState::DUnknown
        });
        // A node without a disk goes on with the peer's data, and its own disk may hold newer.
        let no_data = self.world.state(node).is_some_and(|state| state.1 < DiskState::Inconsistent);
        if no_data && self.world.ahead[node] {
            self.may_split = true;
            self.must_split = true;
            self.world.check_data = false;
        }
        if with_peer || no_data {
            return;
        }
        self.may_split = true;
        if self.world.ahead[other] {
            self.must_split = true;
            self.world.check_data = false;
        }
        match self.world.options.net.protocol {
            Protocol::A => self.world.history.weaken(false),
            Protocol::B => self.world.history.weaken(false),
            Protocol::C if self.world.nodes[node].lost_power => self.world.history.weaken(true),
            Protocol::C => {}
        }
    }

    // ---- the end --------------------------------------------------------------------------------

    /// Heals everything; then either both are in sync and right, or a real split brain stands.
    fn finish(&mut self) {
        self.writer = None;
        for node in 0..2 {
            self.world.nodes[node].fail_writes = 0;
            self.world.nodes[node].fail_flushes = 0;
            self.restart(node);
        }
        self.world.heal();
        let mut left = 60;
        while left > 0 && self.world.broken.is_none() {
            left -= 1;
            for node in 0..2 {
                self.restart(node);
                self.attach(node);
                let alone = self.world.state(node).is_some_and(|state| state.2 == ConnState::StandAlone);
                if alone && left % 10 == 5 {
                    self.connect(node);
                }
            }
            self.pump(500, |_| false);
            if self.world.in_sync() && self.world.idle() {
                break;
            }
        }
        if self.world.broken.is_some() {
            return;
        }
        if self.world.in_sync() && self.world.idle() {
            self.world.check_quiet();
            self.world.check_content(0);
            return;
        }
        let states: Vec<_> = (0..2).map(|node| self.world.state(node)).collect();
        let told = (0..2).all(|node| {
            self.world.log.iter().any(|(_, at, event)| {
                *at == node && matches!(event, Event::Note(_, text) if text.contains("Split-Brain"))
            })
        });
        let refused = (0..2).all(|node| {
            self.world
                .state(node)
                .is_some_and(|(_, _, conn, repl)| conn < ConnState::Connected && repl == ReplState::Off)
        });
        let both_primary = (0..2).all(|node| self.world.state(node).is_some_and(|s| s.0 == Role::Primary));
        if self.may_split && refused && (told || both_primary) {
            self.must_split = true;
            return;
        }
        let waits: Vec<_> =
            (0..2).filter_map(|node| self.world.status(node).map(|status| status.waiting_for)).collect();
        let bits: Vec<_> = (0..2)
            .map(|node| self.world.nodes[node].core.as_ref().and_then(|core| core.out_of_sync_bits(VOLUME)))
            .collect();
        let open: Vec<_> = (0..2)
            .map(|node| (self.world.nodes[node].requests.len(), self.world.nodes[node].verbs.clone()))
            .collect();
        self.world.fail(format!(
            "healed, but not in sync and idle: {states:?}, bits {bits:?}, open {open:?}, waits {waits:?}, may split {}",
            self.may_split
        ));
    }
}
