//! The end of a resync (SEM §19): its target may have written down that it is as good as its source before that one has
//! heard of it. What only the source has from then on must not be lost when the other copy goes on alone.
use lockstep_replicator::core::config::OnIoError;
use lockstep_replicator::core::event::{AdminCommand, RequestOp};
use lockstep_replicator::core::state::{ConnState, DiskState, ReplState};
use lockstep_tests::sim::script::{detach, fail_writes, open, pair_with, pass, superblock, verb, within};
use lockstep_tests::sim::{Options, World};

const MS: u64 = 1_000_000;

fn repl(world: &World, node: usize) -> Option<ReplState> {
    world.state(node).map(|state| state.3)
}

fn disk(world: &World, node: usize) -> Option<DiskState> {
    world.state(node).map(|state| state.1)
}

/// Node 1 missed writes and is about to get them.
fn resync_begins(options: Options) -> World {
    let mut world = pair_with(options);
    world.cut(true);
    pass(&mut world, 100);
    world.request(0, RequestOp::Write, 800, 64, false);
    within(&mut world, 2000, |w| open(w, 0) == 0);
    world.heal();
    within(&mut world, 2000, |w| repl(w, 1) == Some(ReplState::SyncTarget));
    world
}

/// Node 0 stays away, node 1 goes on alone, and node 0 comes back: both changed data, and neither is overwritten.
fn is_a_split_brain(world: &mut World, seed: u64) {
    let promoted = verb(world, 1, "primary", AdminCommand::Primary { force: false });
    assert_eq!(promoted, Ok(()), "seed {seed}");
    world.request(1, RequestOp::Write, 2400, 8, false);
    within(world, 2000, |w| open(w, 1) == 0);
    world.start(0);
    within(world, 5000, |w| w.state(1).is_some_and(|state| state.2 == ConnState::StandAlone));
    pass(world, 1000);
}

/// The source makes its empty bitmap durable while the target, which is through, lets its disk go. What is written
/// then is on the source only, and the target's superblock says that its disk is as good.
#[test]
fn a_target_that_leaves_while_its_source_finishes_is_the_older_copy() {
    for seed in 0..10 {
        let mut world = resync_begins(Options::new(900 + seed));
        within(&mut world, 2000, |w| repl(w, 1) == Some(ReplState::Established));
        assert_eq!(repl(&world, 0), Some(ReplState::SyncSource), "seed {seed}");
        world.nodes[0].disks[0].faults.stick = Some(300 * MS);
        pass(&mut world, 3);
        let base = superblock(&world, 1).uuid[0] & !1;
        detach(&mut world, 1);
        world.request(0, RequestOp::Write, 1600, 8, false);
        within(&mut world, 2000, |w| open(w, 0) == 0);
        assert_ne!(superblock(&world, 0).uuid[0] & !1, base, "told done under a new generation, seed {seed}");
        world.crash(0, true);
        world.attach(1);
        within(&mut world, 2000, |w| disk(w, 1) == Some(DiskState::UpToDate));
        is_a_split_brain(&mut world, seed);
    }
}

/// The target refuses a write while the superblock is on its way that says that it is as good as its source, and the
/// source dies when it has told the write done.
#[test]
fn a_write_refused_at_the_very_end_of_a_resync_is_told_done_under_a_new_generation() {
    let mut refused = 0;
    for seed in 0..60 {
        let mut options = Options::new(1000 + seed);
        options.volume.on_io_error = OnIoError::PassOn;
        let mut world = resync_begins(options);
        let usual = std::mem::replace(&mut world.options.weather.disk_us, 30_000);
        let finishes =
            |w: &World| repl(w, 1) == Some(ReplState::SyncTarget) && disk(w, 1) == Some(DiskState::UpToDate);
        within(&mut world, 5000, finishes);
        fail_writes(&mut world, 1, 1);
        world.request(0, RequestOp::Write, 1600, 8, false);
        within(&mut world, 5000, |w| open(w, 0) == 0);
        world.crash(0, true);
        pass(&mut world, 1000);
        world.options.weather.disk_us = usual;
        if disk(&world, 1) == Some(DiskState::UpToDate) {
            refused += 1;
            is_a_split_brain(&mut world, seed);
        }
    }
    assert!(refused >= 5, "{refused} of 60");
}
