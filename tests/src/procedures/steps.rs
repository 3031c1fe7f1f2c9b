//! Steps of procedures. Those before the interesting part assert; those within it may fail in any way.
use crate::sim::World;
use crate::sim::node::VOLUME;
use crate::sim::script::{quiet, verb, within};
use lockstep_replicator::core::event::{AdminCommand, RequestOp};
use lockstep_replicator::core::state::ConnState;

/// Sectors at the end of a volume that only [`pair`] writes: for a test's own requests.
pub const RESERVED: u64 = 64;

/// Both say so.
#[must_use]
pub fn connected(world: &World) -> bool {
    (0..2).all(|node| world.state(node).is_some_and(|state| state.2 == ConnState::Connected))
}

/// In sync and idle.
#[must_use]
pub fn met(world: &World) -> bool {
    world.in_sync() && world.idle()
}

/// Two new nodes: in sync without a copy of what is zero on both, node 0 Primary, some data on them.
///
/// # Panics
/// They do not come up.
pub fn pair(world: &mut World) {
    within(world, 1000, connected);
    let clear = AdminCommand::NewCurrentUuid { volume: VOLUME, clear_bitmap: true };
    answered(world, 0, "new-current-uuid", clear);
    answered(world, 0, "primary", AdminCommand::Primary { force: false });
    quiet(world);
    for start in [0, 512, 840, 2048] {
        world.request(0, RequestOp::Write, start, 24, false);
    }
    let end = world.nodes[0].export_size;
    world.request(0, RequestOp::Write, end - RESERVED, RESERVED, false);
    quiet(world);
}

/// The link goes down, and both know.
///
/// # Panics
/// They do not notice.
pub fn apart(world: &mut World) {
    world.cut(true);
    within(world, 1000, |w| {
        (0..2).all(|node| w.state(node).is_some_and(|state| state.2 < ConnState::Connected))
    });
}

/// The link is up again; what shall cut it stays ordered.
pub fn link_up(world: &mut World) {
    let ordered = world.net.cut_after_to;
    world.heal();
    world.net.cut_after_to = ordered;
}

/// A verb that must succeed.
///
/// # Panics
/// It does not.
pub fn answered(world: &mut World, node: usize, name: &'static str, command: AdminCommand) {
    let answer = verb(world, node, name, command);
    assert_eq!(answer, Ok(()), "n{node} {name}");
}

/// A write that must succeed.
///
/// # Panics
/// It does not.
pub fn write(world: &mut World, node: usize, start: u64, len: u64) {
    let before = world.good_requests;
    world.request(node, RequestOp::Write, start, len, false);
    within(world, 1000, |w| w.good_requests > before);
}

/// A verb that may fail, or be asked of a node that is down or stops meanwhile; whether it succeeded.
pub fn ask(world: &mut World, node: usize, name: &'static str, command: AdminCommand) -> bool {
    let id = world.admin(node, name, command);
    let life = world.nodes[node].life;
    world.run_until(3000, |w| w.nodes[node].life != life || w.nodes[node].answers.contains_key(&id));
    world.nodes[node].answers.get(&id).is_some_and(Result::is_ok)
}

/// Writes of an application, if it runs there; also a discard, zeroes and FUA now and then.
pub fn load(world: &mut World, node: usize, writes: u64) {
    for _ in 0..writes {
        if !world.is_primary(node) {
            return;
        }
        let size = world.nodes[node].export_size.saturating_sub(RESERVED);
        let len = 8 * (1 + world.rng.below(4));
        if size <= len {
            return;
        }
        let start = world.rng.below((size - len) / 8) * 8;
        let op = match world.rng.below(8) {
            0 => RequestOp::Discard,
            1 => RequestOp::WriteZeroes { may_unmap: false },
            _ => RequestOp::Write,
        };
        let fua = world.rng.percent(20);
        world.request(node, op, start, len, fua);
    }
}
