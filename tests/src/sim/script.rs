//! Small steps that stories are told with.
use super::node::VOLUME;
use super::options::Options;
use super::world::World;
use lockstep_replicator::core::config::Protocol;
use lockstep_replicator::core::event::{AdminCommand, HandlerName, HandlerToken, Input, Refusal, RequestOp};
use lockstep_replicator::core::state::{ConnState, DiskState};
use lockstep_replicator::core::status::ResourceStatus;
use lockstep_replicator::meta::Superblock;
use lockstep_replicator::units::{BlockRange, Sector, SectorCount};

/// A pair in sync, node 0 Primary.
///
/// # Panics
/// It does not come up.
#[must_use]
pub fn pair_with(options: Options) -> World {
    let mut world = World::new(options);
    world.start(0);
    world.start(1);
    within(&mut world, 1000, |w| w.state(0).is_some_and(|s| s.2 == ConnState::Connected));
    world.admin(0, "primary-force", AdminCommand::Primary { force: true });
    within(&mut world, 10_000, |w| w.in_sync() && w.is_primary(0) && w.idle());
    quiet(&mut world);
    world
}

/// [`pair_with`] the usual options and this protocol.
///
/// # Panics
/// It does not come up.
#[must_use]
pub fn pair_by(seed: u64, protocol: Protocol) -> World {
    let mut options = Options::new(seed);
    options.net.protocol = protocol;
    pair_with(options)
}

/// A node's disk; one that is down has none.
#[must_use]
pub fn disk(world: &World, node: usize) -> DiskState {
    world.state(node).map_or(DiskState::Diskless, |state| state.1)
}

/// Runs until `done`.
///
/// # Panics
/// It does not happen in time, or a promise is broken.
pub fn within(world: &mut World, ms: u64, done: impl FnMut(&World) -> bool) {
    let held = world.run_until(ms, done);
    assert_eq!(world.broken, None);
    assert!(held, "not within {ms} ms: {:?} {:?}", world.status(0), world.status(1));
}

/// Runs for `ms`.
///
/// # Panics
/// A promise is broken.
pub fn pass(world: &mut World, ms: u64) {
    world.run(ms);
    assert_eq!(world.broken, None);
}

/// Until both are in sync and idle; then everything is checked.
///
/// # Panics
/// It does not happen, or something is wrong then.
pub fn quiet(world: &mut World) {
    within(world, 20_000, |w| w.in_sync() && w.idle());
    world.check_quiet();
    world.check_content(0);
    world.check_content(1);
    assert_eq!(world.broken, None);
}

/// Issues that many writes.
pub fn load(world: &mut World, node: usize, writes: u64) {
    for _ in 0..writes {
        let start = world.rng.below(world.options.sectors / 8 - 8) * 8;
        let len = 8 * (1 + world.rng.below(4));
        world.request(node, RequestOp::Write, start, len, false);
    }
}

/// Orders a verb and waits for its answer.
///
/// # Errors
/// The refusal.
///
/// # Panics
/// There is no answer.
pub fn verb(
    world: &mut World,
    node: usize,
    name: &'static str,
    command: AdminCommand,
) -> Result<(), Refusal> {
    let id = world.admin(node, name, command);
    within(world, 20_000, |w| w.nodes[node].answers.contains_key(&id));
    world.nodes[node].answers[&id].clone()
}

/// `detach` of the one volume.
///
/// # Panics
/// It is refused.
pub fn detach(world: &mut World, node: usize) {
    let detached = verb(world, node, "detach", AdminCommand::Detach { volume: VOLUME, force: false });
    assert_eq!(detached, Ok(()));
}

/// What a live node says of itself.
///
/// # Panics
/// It is down.
#[must_use]
pub fn status(world: &World, node: usize) -> ResourceStatus {
    world.status(node).expect("the node is up")
}

/// Whether one of the waits of a node names all of `words`.
#[must_use]
pub fn waits_for(world: &World, node: usize, words: &[&str]) -> bool {
    status(world, node).waiting_for.iter().any(|wait| words.iter().all(|word| wait.contains(word)))
}

/// Requests of the application that have no answer.
#[must_use]
pub fn open(world: &World, node: usize) -> usize {
    world.nodes[node].requests.len()
}

/// How often a handler was run.
#[must_use]
pub fn runs(world: &World, node: usize, name: HandlerName) -> usize {
    world.handler_runs.iter().filter(|(_, at, which)| (*at, *which) == (node, name)).count()
}

/// What a handler says from now on; `None` hangs.
pub fn handler_says(world: &mut World, node: usize, name: HandlerName, answer: Option<i32>) {
    world.handler_answers.insert((node, name), answer);
}

/// The answer of the `nth` run of a handler in the first life of a node, out of turn.
///
/// # Panics
/// There was no such run.
pub fn late_answer(world: &mut World, node: usize, name: HandlerName, nth: usize, exit_code: i32) {
    let runs = world.handler_runs.iter().filter(|(_, at, _)| *at == node);
    let place = runs.enumerate().filter(|(_, (_, _, which))| *which == name).nth(nth).map(|(place, _)| place);
    // Runs are numbered from 1.
    let token = HandlerToken(place.expect("the handler was run") as u64 + 1);
    world.feed(node, Input::HandlerDone { token, exit_code: Some(exit_code) });
}

/// What stands on the disk of a node.
///
/// # Panics
/// It cannot be read.
#[must_use]
pub fn superblock(world: &World, node: usize) -> Superblock {
    world.nodes[node].disks[0].meta.superblock().expect("a superblock that can be used")
}

/// What a read of the whole disk of a node would give.
#[must_use]
pub fn sectors(world: &World, node: usize) -> &[u32] {
    world.nodes[node].disks[0].sectors()
}

/// Sectors written to the disk of a node so far.
#[must_use]
pub fn written(world: &World, node: usize) -> u64 {
    world.nodes[node].disks[0].written_sectors
}

/// The next data writes of a node fail.
pub fn fail_writes(world: &mut World, node: usize, count: u32) {
    world.nodes[node].disks[0].faults.writes = count;
}

/// The next metadata writes of a node fail.
pub fn fail_metas(world: &mut World, node: usize, count: u32) {
    world.nodes[node].disks[0].faults.metas = count;
}

/// The disk of a node has a block that cannot be read until it is written.
pub fn bad_block(world: &mut World, node: usize, start: u64, len: u64) {
    let range = BlockRange::new(Sector(start), SectorCount(len));
    world.nodes[node].disks[0].faults.bad = range.map(|range| (range, false));
}

/// Whether the bad block is still there.
#[must_use]
pub fn is_bad(world: &World, node: usize) -> bool {
    world.nodes[node].disks[0].faults.bad.is_some()
}

/// Nothing reaches a node, and nobody is told; or everything does again.
pub const fn deaf(world: &mut World, node: usize, on: bool) {
    world.net.deaf[node] = on;
}

/// Messages to a node take up to twice this long.
pub const fn slow(world: &mut World, node: usize, ms: u64) {
    world.options.weather.net_us[node] = if ms == 0 { 300 } else { ms * 2000 };
}
