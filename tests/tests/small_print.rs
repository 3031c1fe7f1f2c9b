//! Promises that only show when something ends at the wrong moment. Two of these noticed a planted defect that
//! nothing else did; see `docs/planted-faults.md`.
use lockstep_replicator::core::event::{AdminCommand, Event, RequestOp};
use lockstep_replicator::core::state::{ConnState, DiskState};
use lockstep_replicator::meta::flags;
use lockstep_tests::sim::node::VOLUME;
use lockstep_tests::sim::script::{
    detach, fail_writes, pair_with, pass, quiet, sectors, slow, superblock, verb, within,
};
use lockstep_tests::sim::{Options, World};

/// Sectors that an extent of the activity log covers.
const EXTENT: u64 = 8192;
const EXTENTS: u64 = 16;

/// The log has room for 7 of the 16 extents of the disk.
fn small_log(seed: u64) -> World {
    let mut options = Options::new(seed);
    options.sectors = EXTENTS * EXTENT;
    options.volume.al_extents = 7;
    pair_with(options)
}

fn write(world: &mut World, sector: u64) {
    let done = world.good_requests + world.failed_requests + 1;
    world.request(0, RequestOp::Write, sector, 8, false);
    within(world, 2000, |w| w.good_requests + w.failed_requests >= done);
}

#[test]
fn what_an_extent_marked_is_on_disk_before_the_log_forgets_it() {
    for seed in 0..4 {
        let mut world = small_log(seed);
        world.cut(true);
        pass(&mut world, 50);
        // Back and forth, so that each is evicted with marks of its own.
        for extent in (0..EXTENTS).chain(0..EXTENTS) {
            write(&mut world, extent * EXTENT + 64 * (1 + extent) + 8 * seed);
        }
        world.crash(0, true);
        world.start(0);
        world.heal();
        quiet(&mut world);
        assert_eq!(sectors(&world, 0), sectors(&world, 1));
    }
}

#[test]
fn an_extent_stays_hot_until_the_peer_has_its_writes_on_stable_storage() {
    for seed in 0..24 {
        let mut world = small_log(100 + seed);
        for extent in 0..7 {
            world.request(0, RequestOp::Write, extent * EXTENT + 8 * seed, 8, false);
        }
        within(&mut world, 2000, |w| w.good_requests >= 7);
        // The next one needs a slot. Both nodes lose power around that time.
        world.request(0, RequestOp::Write, 9 * EXTENT, 8, false);
        let before = world.nodes[0].metas_total;
        world.run_until(20, |w| w.nodes[0].metas_total > before);
        pass(&mut world, seed % 4);
        world.crash(0, true);
        world.crash(1, true);
        world.start(0);
        world.start(1);
        quiet(&mut world);
        assert_eq!(sectors(&world, 0), sectors(&world, 1), "seed {seed}");
    }
}

#[test]
fn a_write_that_failed_on_the_only_disk_of_a_diskless_primary_is_an_error() {
    let mut world = pair_with(Options::new(31));
    detach(&mut world, 0);
    fail_writes(&mut world, 1, 1);
    let before = world.good_requests;
    world.request(0, RequestOp::Write, 800, 8, false);
    pass(&mut world, 500);
    assert_eq!(world.good_requests, before, "acknowledged, and no disk has it");
}

#[test]
fn a_primary_that_loses_its_source_in_a_resync_writes_to_its_half_of_a_copy_no_more() {
    let mut world = pair_with(Options::new(32));
    detach(&mut world, 0);
    for block in 0..400 {
        world.request(0, RequestOp::Write, block * 16, 8, false);
    }
    pass(&mut world, 500);
    slow(&mut world, 0, 40);
    world.attach(0);
    within(&mut world, 5000, |w| w.state(0).is_some_and(|s| s.1 == DiskState::Inconsistent));
    world.cut(true);
    within(&mut world, 2000, |w| w.state(0).is_some_and(|s| s.2 < ConnState::Connected));
    let (good, failed) = (world.good_requests, world.failed_requests);
    world.request(0, RequestOp::Write, 40_000, 8, false);
    pass(&mut world, 200);
    assert_eq!((world.good_requests - good, world.failed_requests - failed), (0, 1));
    slow(&mut world, 0, 0);
    world.heal();
    quiet(&mut world);
}

#[test]
fn invalidate_remote_of_a_node_that_is_alone_survives_a_loss_of_power_as_soon_as_it_is_answered() {
    let mut answered = 0;
    for n in 0..40 {
        let mut world = pair_with(Options::new(33));
        let gone = AdminCommand::Disconnect { force: true };
        assert_eq!(verb(&mut world, 0, "disconnect", gone), Ok(()));
        pass(&mut world, 100);
        let id = world.admin(0, "invalidate-remote", AdminCommand::InvalidateRemote(VOLUME));
        if n > 0 {
            let last = world.now + n * 50_000;
            while world.now < last && world.step(last) {}
        }
        let promised = world.nodes[0].answers.get(&id) == Some(&Ok(()));
        answered += u64::from(promised);
        world.crash(0, true);
        world.start(0);
        let connect = || AdminCommand::Connect { discard_my_data: false, tentative: false };
        world.admin(0, "connect", connect());
        world.admin(1, "connect", connect());
        quiet(&mut world);
        let copied = world.log.iter().rev().find_map(|(_, _, event)| match event {
            Event::ResyncDone { bits_total, .. } => Some(*bits_total),
            _ => None,
        });
        if promised {
            assert_eq!(copied, Some(world.options.sectors / 8), "cut after {n} x 50 us");
        }
    }
    assert!(answered > 0, "never answered in time");
}

#[test]
fn a_target_says_that_it_is_done_when_its_superblock_says_so() {
    for seed in 0..40 {
        let mut world = pair_with(Options::new(200 + seed));
        world.cut(true);
        pass(&mut world, 50);
        write(&mut world, 4096);
        world.heal();
        within(&mut world, 5000, |w| w.state(1).is_some_and(|s| s.1 == DiskState::Inconsistent));
        within(&mut world, 5000, |w| w.states(0, 0).is_some_and(|s| s.peer_disk == DiskState::UpToDate));
        let known = superblock(&world, 1).flags;
        assert_ne!(
            known & flags::CONSISTENT,
            0,
            "seed {seed}: a loss of power now would leave the peer without a copy"
        );
        quiet(&mut world);
    }
}
