//! Overlapping writes of one node, in flight at once: they pay one round trip, not one each, and both disks see them in
//! one order (`core/overlap.rs`).
use lockstep_replicator::core::config::{Fencing, NetConfig, Protocol};
use lockstep_replicator::core::event::{AdminCommand, HandlerName, Refusal, RequestOp};
use lockstep_replicator::core::state::DiskState;
use lockstep_tests::sim::script::{
    disk, fail_writes, handler_says, open, pair_by, pair_with, pass, quiet, sectors, slow, verb, within,
};
use lockstep_tests::sim::{Options, World};

/// Sectors of an extent of the activity log.
const EXTENT: u64 = 8192;

/// Messages to node 1 take up to twice as long, one by one; a stream is FIFO.
const WAY_MS: u64 = 200;

/// That many writes over one block, each a little further on, at once.
fn overwrite(world: &mut World, writes: u64) {
    for nth in 0..writes {
        world.request(0, RequestOp::Write, 800 + 4 * (nth % 3), 8, false);
    }
}

fn same_blocks(world: &World) {
    assert_eq!(sectors(world, 0)[792..832], sectors(world, 1)[792..832]);
}

fn promote(world: &mut World, node: usize) -> Result<(), Refusal> {
    verb(world, node, "primary", AdminCommand::Primary { force: false })
}

/// Orders two Primaries to be allowed, or not; gives the number of the order.
fn allow_two(world: &mut World, node: usize, allow_two_primaries: bool) -> u64 {
    let net = Box::new(NetConfig { allow_two_primaries, ..world.options.net.clone() });
    let volumes = vec![world.options.volume.clone()];
    world.admin(node, "adjust", AdminCommand::Configure { net, volumes })
}

/// How long eight writes of the same block take under a protocol, milliseconds.
fn took(protocol: Protocol, seed: u64) -> u64 {
    let mut world = pair_by(seed, protocol);
    slow(&mut world, 1, WAY_MS);
    let begun = world.now;
    overwrite(&mut world, 8);
    within(&mut world, 5000, |w| open(w, 0) == 0);
    let took = (world.now - begun) / 1_000_000;
    slow(&mut world, 1, 0);
    quiet(&mut world);
    same_blocks(&world);
    took
}

#[test]
fn eight_writes_of_one_block_take_one_way_to_the_peer_and_back() {
    for seed in 0..20 {
        for protocol in [Protocol::B, Protocol::C] {
            let ms = took(protocol, 300 + seed);
            assert!(ms < 3 * WAY_MS, "{protocol:?}, seed {seed}: {ms} ms");
        }
        let ms = took(Protocol::A, 300 + seed);
        assert!(ms < WAY_MS / 5, "A does not wait for the peer, seed {seed}: {ms} ms");
    }
}

/// A resync keeps the old rule: its acknowledgements clear marks.
#[test]
fn a_cut_between_overlapping_writes_leaves_marks_and_both_disks_get_equal() {
    for seed in 0..40 {
        let mut world = pair_with(Options::new(400 + seed));
        slow(&mut world, 1, 2);
        overwrite(&mut world, 8);
        world.run(seed % 8);
        world.cut(true);
        within(&mut world, 5000, |w| open(w, 0) == 0);
        overwrite(&mut world, 3);
        world.heal();
        world.run(seed % 5);
        overwrite(&mut world, 8);
        slow(&mut world, 1, 0);
        quiet(&mut world);
        same_blocks(&world);
    }
}

/// What was frozen goes to both copies again, one behind the other.
#[test]
fn overlapping_writes_that_froze_are_sent_again_in_one_order() {
    let mut frozen = 0;
    for seed in 0..60 {
        let mut options = Options::new(500 + seed);
        options.net.fencing = Fencing::ResourceAndStonith;
        let mut world = pair_with(options);
        handler_says(&mut world, 0, HandlerName::FencePeer, None);
        slow(&mut world, 1, 2);
        overwrite(&mut world, 6);
        world.run(seed % 6);
        world.cut(true);
        pass(&mut world, 200);
        frozen += usize::from(open(&world, 0) > 1);
        slow(&mut world, 1, 0);
        world.heal();
        within(&mut world, 60_000, |w| open(w, 0) == 0);
        quiet(&mut world);
        same_blocks(&world);
    }
    assert!(frozen >= 20, "{frozen} of 60");
}

/// The peer refuses the first, or its disk fails: whatever it has then, nothing is told done that is on no good copy.
#[test]
fn a_failed_write_on_either_disk_among_overlapping_ones() {
    for seed in 0..60 {
        let mut world = pair_with(Options::new(600 + seed));
        slow(&mut world, 1, 1);
        overwrite(&mut world, 4);
        world.run(seed % 3);
        let node = usize::from(seed % 2 == 0);
        fail_writes(&mut world, node, 1);
        overwrite(&mut world, 4);
        within(&mut world, 5000, |w| open(w, 0) == 0);
        slow(&mut world, 1, 0);
        if disk(&world, node) != DiskState::UpToDate {
            world.attach(node);
        }
        quiet(&mut world);
        same_blocks(&world);
    }
}

/// A second Primary is allowed while such writes are in flight: it is promoted when they are through.
#[test]
fn a_second_primary_waits_for_overlapping_writes_of_the_first() {
    let mut refused = 0;
    for seed in 0..60 {
        let mut world = pair_with(Options::new(700 + seed));
        slow(&mut world, 1, 5);
        overwrite(&mut world, 8);
        world.run(seed % 8);
        allow_two(&mut world, 1, true);
        if let Err(why) = promote(&mut world, 1) {
            assert_eq!(why.number, -18, "{why:?}");
            refused += 1;
            within(&mut world, 1000, |w| open(w, 0) == 0);
            assert_eq!(promote(&mut world, 1), Ok(()));
        }
        slow(&mut world, 1, 0);
        for nth in 0..8 {
            world.request(nth % 2, RequestOp::Write, 800 + 4 * (nth as u64 % 3), 8, false);
            world.run(seed % 3);
        }
        within(&mut world, 5000, |w| open(w, 0) == 0 && open(w, 1) == 0);
        quiet(&mut world);
        same_blocks(&world);
    }
    assert!(refused >= 10, "{refused} of 60");
}

/// A write that goes to the copies once more gives its extents back with its range: who has the range by now may wait for
/// the log.
#[test]
fn writes_sent_again_do_not_keep_the_log_from_those_that_passed_them() {
    let mut options = Options::new(4711);
    options.sectors = 96 * EXTENT;
    options.net.fencing = Fencing::ResourceAndStonith;
    let mut world = pair_with(options);
    handler_says(&mut world, 0, HandlerName::FencePeer, None);
    slow(&mut world, 1, 3000);
    // 64 of the 67 slots, and one that overlaps both and needs 30 more.
    world.request(0, RequestOp::Discard, 0, 32 * EXTENT, false);
    world.request(0, RequestOp::Discard, 62 * EXTENT, 32 * EXTENT, false);
    pass(&mut world, 150);
    world.request(0, RequestOp::Discard, 31 * EXTENT, 32 * EXTENT, false);
    pass(&mut world, 100);
    world.cut(true);
    pass(&mut world, 300);
    assert_eq!(open(&world, 0), 3);
    slow(&mut world, 1, 0);
    world.heal();
    within(&mut world, 60_000, |w| open(w, 0) == 0);
    quiet(&mut world);
}

/// What was agreed to holds: two Primaries are not forbidden while the second one writes that it is.
#[test]
fn two_primaries_are_not_forbidden_in_the_middle_of_a_promotion() {
    let mut refused = 0;
    for seed in 0..200 {
        let mut options = Options::new(90_000 + seed);
        options.net.allow_two_primaries = true;
        let mut world = pair_with(options);
        assert_eq!(verb(&mut world, 0, "secondary", AdminCommand::Secondary), Ok(()));
        assert_eq!(promote(&mut world, 1), Ok(()));
        pass(&mut world, 100);
        world.admin(0, "primary", AdminCommand::Primary { force: false });
        world.run(1 + seed % 2);
        // By the Primary that agreed, or by the one that is promoted.
        let node = usize::from(seed % 3 != 0);
        let change = allow_two(&mut world, node, false);
        slow(&mut world, 0, 4);
        for nth in 0..6 {
            world.request(1, RequestOp::Write, 800 + 4 * (nth % 2), 8, false);
        }
        for _ in 0..12 {
            pass(&mut world, 1);
            if world.is_primary(0) {
                world.request(0, RequestOp::Write, 800, 2, false);
            }
        }
        slow(&mut world, 0, 0);
        pass(&mut world, 500);
        let changed = world.nodes[node].answers[&change].is_ok();
        refused += usize::from(!changed);
        assert!(!changed || !world.is_primary(0), "seed {seed}: two Primaries without permission");
        quiet(&mut world);
        same_blocks(&world);
    }
    assert!(refused >= 50, "{refused} of 200");
}
