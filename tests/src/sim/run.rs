//! One run: the plan is carried out (safety under any faults), then everything is healed and both nodes
//! must be in sync, or have declared a split brain, within a bound of virtual time (liveness, I8).
use super::mixed::Feature;
use super::plan::{Act, Failing, Io, Plan, Typed, top_up};
use super::world::World;
use lockstep_replicator::core::event::{AdminCommand, Event, RequestOp};
use lockstep_replicator::core::state::{ConnState, DiskState, ReplState, Role};
use lockstep_replicator::units::{BlockRange, Sector, SectorCount, VolumeNr};

const MS: u64 = 1_000_000;
/// Requests a run completes at least.
pub const ENOUGH_IOS: u64 = 1000;
/// Faults a run has at least.
pub const ENOUGH_FAULTS: u64 = 20;
/// Everything healed, both nodes must be at rest within this, seconds. A handler that hangs takes two minutes of it.
const LIVENESS_S: u64 = 270;

/// What a run did.
#[derive(Clone, Copy, Debug, Default)]
pub struct Summary {
    /// Requests completed well.
    pub good: u64,
    /// Requests completed with an error.
    pub failed: u64,
    /// Messages delivered.
    pub messages: u64,
    /// IO of the simulated disks.
    pub disk_ios: u64,
    /// Faults that hit.
    pub faults: u64,
    /// The run ended in a split brain that both nodes declared.
    pub split: bool,
    /// Split brains that an operator resolved on the way.
    pub resolved: u64,
    /// Virtual time, ns.
    pub virtual_ns: u64,
    /// Times both copies were found equal.
    pub equal: u64,
    /// Times a copy was compared with what it must hold because its node went on from it.
    pub settlements: u64,
}

pub(super) struct Run<'a> {
    pub(super) world: World,
    pub(super) plan: &'a Plan,
    summary: Summary,
    /// IO of the application goes on in this phase.
    load: bool,
}

/// Carries out a plan.
///
/// # Errors
/// A promise was broken; the text names it, with the seed.
pub fn run(plan: &Plan) -> Result<Summary, String> {
    let mut run =
        Run { world: World::new(plan.options.clone()), plan, summary: Summary::default(), load: true };
    run.world.oracle.policies = plan.extras.contains(&Feature::Policies);
    run.go();
    let Run { world, mut summary, .. } = run;
    if let Some(why) = world.broken {
        return Err(why);
    }
    summary.good = world.good_requests;
    summary.failed = world.failed_requests;
    summary.messages = world.delivered;
    summary.disk_ios = world.disk_ios;
    summary.virtual_ns = world.now;
    summary.equal = world.oracle.equal;
    summary.settlements = world.oracle.settlements;
    Ok(summary)
}

fn nr(volume: usize) -> VolumeNr {
    VolumeNr(u16::try_from(volume).unwrap_or(0))
}

impl Run<'_> {
    fn go(&mut self) {
        self.world.start(0);
        self.world.start(1);
        let fresh = |world: &World| {
            (0..2).all(|node| {
                (0..world.volumes()).all(|volume| {
                    world.states(node, volume).is_some_and(|states| {
                        states.disk == DiskState::Inconsistent && states.connection == ConnState::Connected
                    })
                })
            })
        };
        if !self.world.run_until(60_000, fresh) {
            return self.world.fail("the fresh pair does not meet".into());
        }
        let first = self.plan.first;
        let forced = self.world.admin(first, "primary-force", AdminCommand::Primary { force: true });
        if self.plan.wait_for_sync {
            if !self.world.run_until(600_000, World::in_sync) {
                return self.world.fail("the initial sync does not end".into());
            }
        } else {
            self.world.run(300);
            // Without it nobody's data counts, and no operator would leave it at that.
            if !self.world.run_until(60_000, |world| world.nodes[first].answers.contains_key(&forced)) {
                return self.world.fail("primary --force is not answered".into());
            }
        }
        let base = self.world.now;
        let plan = self.plan;
        for step in &plan.steps {
            self.until(base + step.at);
            if self.world.broken.is_some() {
                return;
            }
            self.act(step.act);
        }
        self.enough();
        if self.world.broken.is_none() {
            self.finish();
        }
    }

    /// Time passes; what the nodes announce is watched.
    fn until(&mut self, end: u64) {
        while self.world.broken.is_none() && self.world.now < end && self.world.step(end) {
            self.watch();
        }
    }

    fn pump(&mut self, ms: u64, done: impl Fn(&World) -> bool) {
        let end = self.world.now + ms * MS;
        while self.world.broken.is_none() && !done(&self.world) && self.world.step(end) {
            self.watch();
        }
    }

    fn watch(&mut self) {
        self.world.check_quiet();
    }

    /// A run in which nobody was Primary for long gets its load at the end.
    fn enough(&mut self) {
        let mut rounds = 0;
        let few = |world: &World| world.good_requests + world.failed_requests < ENOUGH_IOS;
        while self.world.broken.is_none() && few(&self.world) && rounds < 60 {
            rounds += 1;
            self.tend(self.plan.first);
            self.pump(2000, |world| (0..2).any(|node| world.is_primary(node)));
            for _ in 0..100 {
                let act = top_up(&mut self.world.rng, &self.plan.options);
                self.act(act);
                self.pump(3, |_| false);
            }
        }
        while self.summary.faults < ENOUGH_FAULTS && self.world.broken.is_none() {
            let (before, other) = (self.summary.faults, 1 - self.plan.first);
            self.act(Act::Cut(false));
            if self.summary.faults == before {
                // Nothing to cut: two Primaries that lost each other do not meet again by themselves.
                self.act(Act::Kill(other, false));
                self.act(Act::Start(other, None));
            }
            self.pump(1500, |_| false);
        }
    }

    // ---- actions --------------------------------------------------------------------------------

    fn act(&mut self, act: Act) {
        let hit = self.carry_out(act);
        if hit && act.is_fault() {
            self.summary.faults += 1;
        }
    }

    /// Whether it had any effect.
    fn carry_out(&mut self, act: Act) -> bool {
        let world = &mut self.world;
        match act {
            Act::Io { volume, io, start, len } => {
                self.ask(volume, io, start, len);
                true
            }
            Act::Cut(down) => {
                let hit = world.nodes.iter().any(|node| node.session.is_some());
                world.cut(down);
                hit
            }
            Act::CutAfter(node, messages) => {
                world.net.cut_after_to[node] = Some(messages);
                true
            }
            Act::Silence(node) => {
                world.silence(node);
                true
            }
            Act::Duplicate(node) => {
                world.duplicate_connect(node);
                world.nodes[node].session.is_some()
            }
            Act::Heal => {
                world.heal();
                true
            }
            Act::Kill(node, power) => self.kill(node, power),
            Act::KillBoth(first, second) => {
                let hit = self.kill(0, first);
                self.kill(1, second) || hit
            }
            Act::KillAtMeta(node, n, power) => {
                world.crash_at_meta = Some((node, n, power));
                world.nodes[node].core.is_some()
            }
            Act::Start(node, al_extents) => {
                if let Some(al_extents) = al_extents {
                    let mut volume = world.options.volume.clone();
                    volume.al_extents = al_extents;
                    world.nodes[node].volume = Some(volume);
                }
                self.start(node);
                true
            }
            Act::Fail(node, volume, what, count) => {
                let faults = &mut world.nodes[node].disks[volume].faults;
                match what {
                    Failing::Reads => faults.reads = count,
                    Failing::Writes => faults.writes = count,
                    Failing::Flushes => faults.flushes = count,
                    Failing::Metas => faults.metas = count,
                }
                true
            }
            Act::BadRange(node, volume, start, len, writes) => {
                let size = world.size_of(volume);
                let len = len.min(size.saturating_sub(start));
                let range = BlockRange::new(Sector(start.min(size)), SectorCount(len));
                world.nodes[node].disks[volume].faults.bad = range.map(|range| (range, writes));
                true
            }
            Act::DeadDisk(node, volume) => {
                world.nodes[node].disks[volume].faults.dead = true;
                true
            }
            Act::Mend(node) => {
                self.mend(node);
                true
            }
            Act::Stick(node, volume, ms) => {
                let long = if ms == 0 { u64::MAX } else { ms * MS };
                world.nodes[node].disks[volume].faults.stick = Some(long);
                true
            }
            Act::RotLog(node) | Act::RotBitmap(node) | Act::RotSuperblock(node) => self.rot(node, act),
            Act::Type(node, typed) => self.type_verb(node, typed),
            Act::StepDown => match (0..2).find(|node| world.is_primary(*node)) {
                Some(node) => world.admin(node, "secondary", AdminCommand::Secondary) != 0,
                None => false,
            },
            Act::FailOver(node) => {
                self.fail_over(node);
                true
            }
            Act::Extra(extra) => self.extra(extra),
            Act::Tend(node) => {
                self.tend(node);
                true
            }
        }
    }

    fn ask(&mut self, volume: usize, io: Io, start: u64, len: u64) {
        let world = &mut self.world;
        let primaries: Vec<usize> = (0..2).filter(|node| world.is_primary(*node)).collect();
        if primaries.is_empty() || !self.load {
            return;
        }
        let node = primaries[usize::try_from(world.rng.below(primaries.len() as u64)).unwrap_or(0)];
        if world.nodes[node].requests.len() > 100 {
            return;
        }
        match io {
            Io::Flush => world.flush_on(node, volume),
            Io::Read => world.request_on(node, volume, RequestOp::Read, start, len, false),
            Io::Write(fua) => world.request_on(node, volume, RequestOp::Write, start, len, fua),
            Io::Zero(may_unmap) => {
                world.request_on(node, volume, RequestOp::WriteZeroes { may_unmap }, start, len, false)
            }
            Io::Discard => world.request_on(node, volume, RequestOp::Discard, start, len, false),
        };
    }

    fn kill(&mut self, node: usize, power: bool) -> bool {
        let hit = self.world.nodes[node].core.is_some();
        self.world.crash(node, power);
        hit
    }

    fn start(&mut self, node: usize) {
        if self.world.nodes[node].core.is_none() {
            self.mend(node);
            self.world.start(node);
        }
    }

    fn mend(&mut self, node: usize) {
        for disk in &mut self.world.nodes[node].disks {
            disk.faults = super::disk::Faults::default();
        }
    }

    /// Damage to metadata, within the fault model: one fault per disk, and for a superblock only where the
    /// other copy has everything.
    fn rot(&mut self, node: usize, act: Act) -> bool {
        let world = &mut self.world;
        let down = world.nodes[node].core.is_none();
        let whole = !world.nodes[node].disks.iter().any(|disk| disk.meta.damaged);
        // Damage is done to metadata at a made-up place only.
        let real = world.nodes[node].disks.iter().any(|disk| disk.meta.real.is_some());
        if !down || !whole || real || world.nodes[node].disks.iter().any(|disk| !disk.meta.is_usable()) {
            return false;
        }
        let rng = &mut world.rng;
        let meta = &mut world.nodes[node].disks[0].meta;
        match act {
            Act::RotLog(_) => {
                if !meta.damage_log(rng) {
                    return false;
                }
            }
            Act::RotBitmap(_) => meta.damage_bitmap(rng),
            _ => {
                let other = world.states(1 - node, 0).is_some_and(|s| s.disk == DiskState::UpToDate);
                if !other || world.oracle.went_on[node] || !world.oracle.settled {
                    return false;
                }
                world.nodes[node].disks[0].meta.damage_superblock();
            }
        }
        world.trace(|| format!("n{node}: {act:?}"));
        world.oracle.full_allowed = true;
        world.oracle.touch_all();
        true
    }

    fn type_verb(&mut self, node: usize, typed: Typed) -> bool {
        let world = &mut self.world;
        let volume = nr(0);
        let connect = |discard_my_data, tentative| AdminCommand::Connect { discard_my_data, tentative };
        let (name, command) = match typed {
            Typed::Connect => ("connect", connect(false, false)),
            Typed::ConnectDiscarding => ("connect --discard-my-data", connect(true, false)),
            Typed::ConnectTentative => ("connect --tentative", connect(false, true)),
            Typed::Disconnect(force) => ("disconnect", AdminCommand::Disconnect { force }),
            Typed::Attach => {
                self.attach(node);
                return true;
            }
            Typed::Detach(force) => ("detach", AdminCommand::Detach { volume, force }),
            Typed::Primary(force) => ("primary", AdminCommand::Primary { force }),
            Typed::Secondary => ("secondary", AdminCommand::Secondary),
            Typed::Invalidate => ("invalidate", AdminCommand::Invalidate(volume)),
            Typed::InvalidateRemote => ("invalidate-remote", AdminCommand::InvalidateRemote(volume)),
            Typed::Outdate => ("outdate", AdminCommand::Outdate(volume)),
            Typed::NewCurrentUuid => {
                ("new-current-uuid", AdminCommand::NewCurrentUuid { volume, clear_bitmap: false })
            }
            Typed::Down => {
                self.down(node);
                return true;
            }
        };
        world.admin(node, name, command) != 0
    }

    /// `down`; the daemon stops when it is done, or when the operator loses patience.
    fn down(&mut self, node: usize) {
        let id = self.world.admin(node, "down", AdminCommand::Down);
        if id == 0 {
            return;
        }
        self.pump(400, |world| world.nodes[node].answers.contains_key(&id));
        self.world.crash(node, false);
    }

    fn attach(&mut self, node: usize) {
        for volume in 0..self.world.volumes() {
            let diskless = self.world.states(node, volume).is_some_and(|s| s.disk == DiskState::Diskless);
            if !diskless || self.world.nodes[node].disk_open[volume] {
                continue;
            }
            if !self.world.nodes[node].disks[volume].meta.is_usable() {
                // Nothing usable there: created anew, for a full resync from the other copy.
                self.world.trace(|| format!("n{node} volume {volume}: create-md"));
                let size = self.world.size_of(volume);
                self.world.nodes[node].disks[volume].meta = super::meta_area::MetaArea::new(size);
                self.world.oracle.voided[node] = true;
                self.world.oracle.full_allowed = true;
                self.world.oracle.touch_all();
            }
            self.world.attach_volume(node, volume);
        }
    }

    fn fail_over(&mut self, node: usize) {
        if self.has(Feature::Two) {
            self.promote_other();
        }
        if (0..2).any(|node| self.world.is_primary(node)) {
            return;
        }
        let node = if self.world.nodes[node].core.is_some() { node } else { 1 - node };
        self.world.admin(node, "primary", AdminCommand::Primary { force: false });
    }

    /// Whether both nodes say that they went apart.
    fn split_declared(&self) -> bool {
        let apart = (0..2).all(|node| {
            self.world
                .state(node)
                .is_some_and(|(_, _, conn, repl)| conn < ConnState::Connected && repl == ReplState::Off)
        });
        let alone = (0..2).any(|node| self.world.state(node).is_some_and(|s| s.2 == ConnState::StandAlone));
        apart && alone && self.world.oracle.may_split()
    }

    /// What a good operator does.
    fn tend(&mut self, victim: usize) {
        self.world.heal();
        self.tend_extras();
        for node in 0..2 {
            self.mend(node);
            self.start(node);
            self.attach(node);
        }
        for node in 0..2 {
            if self.world.state(node).is_some_and(|s| s.2 == ConnState::StandAlone) {
                let plain = AdminCommand::Connect { discard_my_data: false, tentative: false };
                self.world.admin(node, "connect", plain);
            }
        }
        self.pump(700, |_| false);
        if self.split_declared() {
            self.resolve(victim);
        }
        self.accept_loss();
        self.fail_over(victim);
    }

    /// A Primary whose disk does not come back, and whose peer misses what it was told of, says what to do:
    /// the application is stopped, and the peer's copy counts.
    fn accept_loss(&mut self) {
        for node in 0..2 {
            let lost = |volume| {
                self.world.states(node, volume).is_some_and(|s| {
                    s.role == Role::Primary
                        && s.connection == ConnState::StandAlone
                        && matches!(
                            s.disk,
                            DiskState::Diskless | DiskState::Inconsistent | DiskState::Outdated
                        )
                })
            };
            if (0..self.world.volumes()).any(lost) {
                self.world.trace(|| format!("the operator gives up what only n{node} was told"));
                self.step_down(node, 1000);
                for node in 0..2 {
                    let plain = AdminCommand::Connect { discard_my_data: false, tentative: false };
                    self.world.admin(node, "connect", plain);
                    self.attach(node);
                }
            }
        }
    }

    /// A frozen Primary that the other one went on without does not meet it: what its status names is done.
    fn left_behind(&mut self) {
        for node in 0..2 {
            let apart =
                self.world.state(node).is_some_and(|s| s.0 == Role::Primary && s.2 != ConnState::Connected);
            let frozen = |world: &World| {
                world.status(node).is_some_and(|status| status.suspended.iter().any(|why| why == "fencing"))
            };
            if apart && frozen(&self.world) {
                self.world.trace(|| format!("the operator gives up what is frozen on n{node}"));
                self.step_down(node, 1000);
            }
        }
    }

    /// A disk that an error made Inconsistent (`on-io-error pass_on`) stays so until the nodes meet anew.
    fn meet_again(&mut self) {
        let stays = |node, volume| {
            self.world
                .states(node, volume)
                .is_some_and(|s| s.replication == ReplState::Established && s.disk == DiskState::Inconsistent)
        };
        let volumes = self.world.volumes();
        if let Some(node) = (0..2).find(|node| (0..volumes).any(|volume| stays(*node, volume))) {
            self.world.trace(|| format!("the operator lets n{node} meet its peer anew"));
            let id =
                self.world.admin(1 - node, "disconnect --force", AdminCommand::Disconnect { force: true });
            self.pump(500, |world| world.nodes[1 - node].answers.contains_key(&id));
            for node in 0..2 {
                let plain = AdminCommand::Connect { discard_my_data: false, tentative: false };
                self.world.admin(node, "connect", plain);
            }
        }
    }

    /// `secondary`; where that waits for writes that are held back, status says what lets them go.
    fn step_down(&mut self, node: usize, ms: u64) {
        let id = self.world.admin(node, "secondary", AdminCommand::Secondary);
        self.pump(ms, |world| world.nodes[node].answers.contains_key(&id));
        let waits = self.world.status(node).map_or(Vec::new(), |status| status.waiting_for);
        let named = waits.iter().any(|wait| wait.contains("drbdadm resume-io"));
        if id != 0 && named && !self.world.nodes[node].answers.contains_key(&id) {
            self.world.admin(node, "resume-io", AdminCommand::ResumeIo);
            self.pump(ms, |world| world.nodes[node].answers.contains_key(&id));
        }
    }

    /// After a split brain this node's changes go.
    fn resolve(&mut self, victim: usize) {
        self.world.trace(|| format!("the operator decides that the changes of n{victim} go"));
        self.step_down(victim, 2000);
        let id = self.world.admin(victim, "disconnect", AdminCommand::Disconnect { force: true });
        self.pump(500, |world| world.nodes[victim].answers.contains_key(&id));
        let discard = AdminCommand::Connect { discard_my_data: true, tentative: false };
        self.world.admin(victim, "connect --discard-my-data", discard);
        let plain = AdminCommand::Connect { discard_my_data: false, tentative: false };
        self.world.admin(1 - victim, "connect", plain);
        self.summary.resolved += 1;
    }

    // ---- the end --------------------------------------------------------------------------------

    /// Heals everything; then either both are in sync and right, or a real split brain stands.
    fn finish(&mut self) {
        self.load = false;
        self.world.crash_at_meta = None;
        self.tend_extras();
        self.world.trace(|| "everything is healed".into());
        let mut left = LIVENESS_S;
        let mut declared = 0;
        while left > 0 && self.world.broken.is_none() {
            self.world.heal();
            if left % 10 == 6 {
                self.move_metadata();
            }
            for node in 0..2 {
                self.mend(node);
                self.start(node);
                self.attach(node);
                if left % 10 == 3 {
                    self.let_go(node);
                }
                let alone = self.world.state(node).is_some_and(|state| state.2 == ConnState::StandAlone);
                if alone && left % 10 == 5 {
                    let plain = AdminCommand::Connect { discard_my_data: false, tentative: false };
                    self.world.admin(node, "connect", plain);
                }
            }
            if left % 20 == 10 {
                self.accept_loss();
                self.meet_again();
                if left < 80 {
                    self.left_behind();
                }
            }
            self.pump(1000, |_| false);
            left -= 1;
            if self.world.in_sync() && self.world.idle() {
                break;
            }
            // A split brain that stood for a while, tried again twice, is one.
            declared = if self.split_declared() && self.world.idle() { declared + 1 } else { 0 };
            if declared > 25 {
                break;
            }
        }
        if self.world.broken.is_some() {
            return;
        }
        self.world.check_marks();
        if self.world.in_sync() && self.world.idle() {
            self.world.check_quiet();
            return;
        }
        let told = (0..2).all(|node| {
            self.world.log.iter().any(|(_, at, event)| {
                *at == node
                    && matches!(event, Event::Note(_, text) if text.to_lowercase().contains("split-brain"))
            })
        });
        let both_primary = (0..2).all(|node| self.world.state(node).is_some_and(|s| s.0 == Role::Primary));
        if self.split_declared() && self.world.idle() && (told || both_primary) {
            // Nothing was thrown away: each node holds what its application was told it does.
            self.summary.split = true;
            for node in 0..2 {
                self.world.check_parted(node);
            }
            return;
        }
        self.world.fail(self.unwell());
    }

    fn unwell(&self) -> String {
        let world = &self.world;
        let states: Vec<_> = (0..2)
            .flat_map(|node| (0..world.volumes()).map(move |volume| (node, volume)))
            .map(|(node, volume)| (node, volume, world.states(node, volume)))
            .collect();
        let waits: Vec<_> =
            (0..2).filter_map(|node| world.status(node).map(|status| status.waiting_for)).collect();
        let bits: Vec<_> = (0..2)
            .map(|node| world.nodes[node].core.as_ref().and_then(|core| core.out_of_sync_bits(nr(0))))
            .collect();
        let open: Vec<_> =
            (0..2).map(|node| (world.nodes[node].requests.len(), world.nodes[node].verbs.clone())).collect();
        let idle: Vec<_> = (0..2)
            .map(|node| {
                world.nodes[node].core.as_ref().is_none_or(lockstep_replicator::core::Resource::is_idle)
            })
            .collect();
        format!(
            "healed, but not in sync and idle (I8): {states:?}, bits {bits:?}, open {open:?}, idle {idle:?}, waits {waits:?}, went on {:?}",
            world.oracle.went_on
        )
    }
}
