//! Interrupts a procedure once, lets a careful operator bring the nodes back, and judges what is there then.
//!
//! The oracles of the world look at every event on the way (I1, I3-I7, I9, I10). At the end: both nodes in
//! sync and idle with equal disks (I2, I8), every verb answered, the application served; or a split brain
//! that both nodes know of, with nothing overwritten, which a person then ends.
use super::steps::{ask, load, met};
use super::{Kind, Procedure, Solved, connect};
use crate::sim::World;
use crate::sim::disk::Faults;
use crate::sim::meta_area::MetaFate;
use crate::sim::net::Cut;
use crate::sim::node::VOLUME;
use crate::sim::world::Watch;
use lockstep_replicator::core::config::AfterSb0Pri;
use lockstep_replicator::core::event::{AdminCommand, Event, RequestOp};
use lockstep_replicator::core::resize::ResizeOptions;
use lockstep_replicator::core::state::{ConnState, DiskState, ReplState, Role};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// What interrupts a procedure.
#[derive(Clone, Copy, Debug)]
pub enum Interruption {
    /// None: messages and metadata writes are counted.
    None,
    /// The link ends when this many messages reached the node.
    Message {
        /// Whose messages are counted.
        to: usize,
        /// How many get through.
        after: u64,
        /// How the link ends.
        how: Cut,
    },
    /// The node stops at this metadata write.
    Metadata {
        /// Which node.
        node: usize,
        /// Metadata writes before it.
        nth: u64,
        /// It loses its cache.
        power: bool,
        /// What becomes of the metadata writes in flight.
        fate: MetaFate,
    },
}

/// What a run came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Messages that reached each node during the procedure.
    pub messages: [u64; 2],
    /// Metadata writes of each node during the procedure.
    pub metas: [u64; 2],
    /// The interruption happened.
    pub hit: bool,
    /// It ended in a split brain, which a person resolved.
    pub split: bool,
}

/// Both nodes are StandAlone and know why.
#[must_use]
pub fn split_brain(world: &World) -> bool {
    (0..2).all(|node| world.state(node).is_some_and(|s| s.2 == ConnState::StandAlone) && knows(world, node))
}

fn knows(world: &World, node: usize) -> bool {
    world.log.iter().any(|(_, at, event)| {
        *at == node && matches!(event, Event::Note(_, text) if text.contains("Split-Brain"))
    })
}

/// Runs a verify from node 0 to its end, under load if asked for; whether it started.
pub fn verify(world: &mut World, busy: bool) -> bool {
    let command = AdminCommand::Verify { volume: VOLUME, start: None, stop: None };
    let started = ask(world, 0, "verify", command);
    if busy {
        for _ in 0..4 {
            load(world, 0, 1);
            world.run(2);
        }
    }
    world.run_until(5000, |w| (0..2).all(|node| w.state(node).is_none_or(|s| !s.3.is_verifying())));
    started
}

fn disks(world: &World) -> [Vec<u32>; 2] {
    [0, 1].map(|node| world.nodes[node].disks[0].sectors().to_vec())
}

impl Procedure {
    /// Carries it out with one interruption.
    ///
    /// # Errors
    /// What was wrong: a broken promise, an assertion of the core, an end that is none.
    pub fn run(&self, seed: u64, interruption: Interruption) -> Result<Tally, String> {
        self.run_watched(seed, interruption, None)
    }

    /// As [`Self::run`], with somebody who looks on while it is carried out.
    ///
    /// # Errors
    /// As there.
    pub fn run_watched(
        &self,
        seed: u64,
        interruption: Interruption,
        watch: Option<Watch>,
    ) -> Result<Tally, String> {
        let outcome = catch_unwind(AssertUnwindSafe(|| self.run_once(seed, interruption, watch)));
        let result = outcome.unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<String>().cloned();
            Err(text.or_else(|| panic.downcast_ref::<&str>().map(|t| (*t).to_owned())).unwrap_or_default())
        });
        result.map_err(|why| format!("{}, seed {seed}, {interruption:?}: {why}", self.name))
    }

    fn run_once(&self, seed: u64, interruption: Interruption, watch: Option<Watch>) -> Result<Tally, String> {
        let mut world = self.prepare(seed);
        world.watch = watch;
        let before = disks(&world);
        let metas = [0, 1].map(|node| world.nodes[node].metas_total);
        world.net.cut_after_to = [Some(u64::MAX); 2];
        match interruption {
            Interruption::None => {}
            Interruption::Message { to, after, how } => {
                world.net.cut_after_to[to] = Some(after);
                world.net.cut_how = how;
            }
            Interruption::Metadata { node, nth, power, fate } => {
                world.crash_at_meta = Some((node, nth, power));
                world.meta_fate = Some(fate);
            }
        }
        self.act(&mut world);
        let mut tally = Tally {
            messages: world.net.cut_after_to.map(|left| left.map_or(0, |left| u64::MAX - left)),
            metas: [0, 1].map(|node| world.nodes[node].metas_total - metas[node]),
            ..Tally::default()
        };
        tally.hit = match interruption {
            Interruption::None => false,
            Interruption::Message { to, .. } => world.net.cut_after_to[to].is_none(),
            Interruption::Metadata { .. } => world.crash_at_meta.is_none(),
        };
        world.crash_at_meta = None;
        world.meta_fate = None;
        // Long enough that a cut is noticed, and a silent link before it speaks again.
        world.run(if world.net.deaf == [false; 2] { 50 } else { 3000 });
        world.watch = None;
        self.bring_back(&mut world)?;
        if split_brain(&world) {
            tally.split = true;
            self.check_untouched(&world, &before, interruption)?;
            self.resolve(&mut world)?;
        } else {
            self.check_winner(&world, &before, interruption)?;
        }
        self.prove(&mut world)?;
        Ok(tally)
    }

    /// What a careful operator does until both nodes are in sync, or in the split brain it is about.
    fn bring_back(&self, world: &mut World) -> Result<(), String> {
        world.heal();
        for node in 0..2 {
            world.nodes[node].disks[0].faults = Faults::default();
            if world.nodes[node].core.is_none() {
                self.start(world, node);
            }
        }
        let may_split =
            |world: &World| self.may_split() || (self.instead.is_some() && world.oracle.may_split());
        let done = |world: &World| met(world) || (may_split(world) && split_brain(world));
        for round in 0..10 {
            world.run_until(2000, done);
            if let Some(why) = &world.broken {
                return Err(why.clone());
            }
            if done(world) {
                return Ok(());
            }
            self.tend(world, round);
        }
        let waits: Vec<_> = (0..2).map(|n| world.status(n).map(|s| s.waiting_for)).collect();
        let open: Vec<_> = (0..2).map(|n| (&world.nodes[n].verbs, world.nodes[n].requests.len())).collect();
        Err(format!(
            "does not come back (I8): {:?} {:?}, waits {waits:?}, open {open:?}",
            world.states(0, 0),
            world.states(1, 0)
        ))
    }

    /// One look of the operator at both nodes.
    fn tend(&self, world: &mut World, round: u32) {
        for node in 0..2 {
            let Some((role, disk, connection, _)) = world.state(node) else { continue };
            if disk == DiskState::Diskless && !world.nodes[node].disk_open[0] {
                world.attach(node);
            }
            // A Primary without a disk meets no older data than it has shown: its application has to end.
            let lost = round > 3 && disk < DiskState::Inconsistent;
            let refused = self.kind == Kind::NewerDataMeetsPrimary || lost;
            if refused && role == Role::Primary {
                ask(world, node, "secondary", AdminCommand::Secondary);
            }
            if connection == ConnState::StandAlone {
                ask(world, node, "connect", connect(false));
            }
            if let Kind::Protocol(protocol) = self.kind {
                self.adjust(world, node, protocol);
            }
        }
        let good = (0..2).any(|node| world.state(node).is_some_and(|s| s.1 > DiskState::Inconsistent));
        if self.kind == Kind::FirstSync && !good {
            ask(world, 0, "primary-force", AdminCommand::Primary { force: true });
        }
    }

    const fn may_split(&self) -> bool {
        // Of a Primary whose disk is on its way out nobody knows what it shows while the link is down: the
        // peer has begun a generation for it, and so does it, when it goes on with its own disk.
        matches!(self.kind, Kind::SplitBrain { .. } | Kind::Conflict | Kind::Detach(0))
    }

    /// A split brain: nothing was discarded.
    fn check_untouched(
        &self,
        world: &World,
        before: &[Vec<u32>; 2],
        interruption: Interruption,
    ) -> Result<(), String> {
        // A power cut takes what was never flushed; the world's oracles know what.
        let kept = !matches!(interruption, Interruption::Metadata { power: true, .. });
        let Kind::SplitBrain { solved, .. } = self.kind else { return Ok(()) };
        let now = disks(world);
        // Two Primaries that lose each other are split anew, also behind a resync that a policy ordered.
        let twice =
            matches!(solved, Solved::ByPolicy(Some(winner)) if now == [0, 1].map(|_| before[winner].clone()));
        if kept && now != *before && !(twice && (0..2).all(|node| world.is_primary(node))) {
            return Err("a split brain that nobody decided, and yet a disk was overwritten (I6)".into());
        }
        Ok(())
    }

    /// In sync: for the side that the policy names.
    fn check_winner(
        &self,
        world: &World,
        before: &[Vec<u32>; 2],
        interruption: Interruption,
    ) -> Result<(), String> {
        let Kind::SplitBrain { solved, .. } = self.kind else { return Ok(()) };
        let now = &disks(world)[0];
        let winners: &[usize] = match (interruption, solved) {
            (Interruption::Metadata { power: true, .. }, _) => return Ok(()),
            // A node that comes back is Secondary: the policy for so many Primaries less decides.
            (Interruption::Metadata { .. }, Solved::ByPolicy(_))
                if self.nets[0].after_sb_0pri != AfterSb0Pri::Disconnect =>
            {
                &[0, 1]
            }
            (_, Solved::ByPolicy(Some(0)) | Solved::ByPerson) => &[0],
            (_, Solved::ByPolicy(Some(_))) => &[1],
            (_, Solved::ByPolicy(None)) => return Err("resolved without anybody's word (I6)".into()),
        };
        if !winners.iter().any(|winner| *now == before[*winner]) {
            return Err(format!("not what one of {winners:?} had, who should win (I6)"));
        }
        Ok(())
    }

    /// A person gives up what node 1 has.
    fn resolve(&self, world: &mut World) -> Result<(), String> {
        let winner = disks(world)[0].clone();
        ask(world, 1, "secondary", AdminCommand::Secondary);
        ask(world, 1, "connect", connect(true));
        ask(world, 0, "connect", connect(false));
        world.run_until(10_000, met);
        if !met(world) && world.broken.is_none() {
            return Err(format!("stays split: {:?} {:?}", world.states(0, 0), world.states(1, 0)));
        }
        if disks(world)[1] != winner {
            return Err("node 0 was chosen, but its data is not there (I7)".into());
        }
        Ok(())
    }

    /// Equal, idle, and of use.
    fn prove(&self, world: &mut World) -> Result<(), String> {
        if self.kind == (Kind::Verify { rot: true }) {
            // Whatever the interrupted one found: a whole one, and a repair.
            verify(world, false);
            ask(world, 0, "invalidate-remote", AdminCommand::InvalidateRemoteMarked(VOLUME));
            world.run_until(5000, met);
        }
        if !matches!(self.kind, Kind::Resize(_)) {
            check(world)?;
        }
        let node = usize::from(world.is_primary(1) && !world.is_primary(0));
        if !world.is_primary(node) && !ask(world, node, "primary", AdminCommand::Primary { force: false }) {
            return Err(format!("n{node} cannot be promoted: {:?}", world.states(node, 0)));
        }
        if let Kind::Resize(devices) = self.kind {
            let options = ResizeOptions::default();
            let id = world.admin(node, "resize", AdminCommand::Resize { volume: VOLUME, options });
            world.run_until(10_000, |w| met(w) && w.nodes[node].answers.contains_key(&id));
            let size = devices.sectors(devices.new);
            let answer = world.nodes[node].answers.get(&id);
            if answer != Some(&Ok(())) || world.nodes[node].export_size != size {
                let now = world.nodes[node].export_size;
                return Err(format!("n{node} is not resized to {size}: {now}, {answer:?}"));
            }
        }
        let failed = world.failed_requests;
        load(world, node, 6);
        world.flush(node);
        let size = world.nodes[node].export_size;
        for start in (0..size).step_by(2048) {
            world.request(node, RequestOp::Read, start, 2048.min(size - start), false);
        }
        world.run_until(5000, |w| met(w) && w.state(0).is_some_and(|s| s.3 == ReplState::Established));
        if world.failed_requests > failed {
            return Err("the application is not served".into());
        }
        check(world)
    }
}

/// In sync, idle, equal and right.
fn check(world: &mut World) -> Result<(), String> {
    if !met(world) && world.broken.is_none() {
        return Err(format!("not at rest: {:?} {:?}", world.states(0, 0), world.states(1, 0)));
    }
    world.check_quiet();
    world.check_content(0);
    world.check_content(1);
    world.broken.take().map_or(Ok(()), Err)
}
