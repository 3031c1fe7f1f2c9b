//! A disk that fails: served by the peer, kept and repaired, or given up (SEM §9, §21).
use lockstep_replicator::core::config::{OnIoError, OnNoData, Protocol};
use lockstep_replicator::core::event::{AdminCommand, Event, HandlerName, RequestOp};
use lockstep_replicator::core::state::{ConnState, DiskState, ReplState};
use lockstep_tests::sim::node::VOLUME;
use lockstep_tests::sim::script::{
    bad_block, detach, fail_metas, fail_writes, handler_says, is_bad, late_answer, load, open, pair_with,
    pass, quiet, runs, sectors, slow, status, verb, waits_for, within,
};
use lockstep_tests::sim::{Options, World};

fn kept(seed: u64) -> Options {
    let mut options = Options::new(seed);
    options.volume.on_io_error = OnIoError::PassOn;
    options
}

const fn protocol(seed: u64) -> Protocol {
    match seed % 3 {
        0 => Protocol::A,
        1 => Protocol::B,
        _ => Protocol::C,
    }
}

fn disk(world: &World, node: usize) -> DiskState {
    world.state(node).expect("the node is up").1
}

fn read(world: &mut World, node: usize, start: u64, len: u64) {
    world.request(node, RequestOp::Read, start, len, false);
}

fn write(world: &mut World, node: usize, start: u64, len: u64) {
    world.request(node, RequestOp::Write, start, len, false);
}

fn resyncs(world: &World, node: usize) -> usize {
    let done = |event: &Event| matches!(event, Event::ResyncDone { .. });
    world.log.iter().filter(|(_, at, event)| *at == node && done(event)).count()
}

/// Read repair: the application gets the peer's data, and the block is rewritten with it.
#[test]
fn a_block_that_cannot_be_read_is_served_and_repaired_by_the_peer() {
    for (seed, protocol) in [Protocol::A, Protocol::B, Protocol::C].into_iter().enumerate() {
        let mut options = kept(1 + seed as u64);
        options.net.protocol = protocol;
        let mut world = pair_with(options);
        load(&mut world, 0, 50);
        write(&mut world, 0, 800, 16);
        within(&mut world, 2000, |w| open(w, 0) == 0);
        bad_block(&mut world, 0, 800, 8);
        read(&mut world, 0, 792, 24);
        within(&mut world, 2000, |w| open(w, 0) == 0);
        assert_eq!(world.failed_requests, 0);
        within(&mut world, 5000, |w| !is_bad(w, 0) && w.in_sync());
        quiet(&mut world);
        // Node 1 was the source: one block was written here, and nothing there.
        assert_eq!(resyncs(&world, 0), 2, "the first one was of the fresh pair");
    }
}

/// The lock of the block: what the application writes during the repair is never overwritten with what
/// the peer had before.
#[test]
fn writes_during_a_repair_win() {
    for seed in 0..40 {
        let mut options = kept(100 + seed);
        options.net.protocol = protocol(seed);
        let mut world = pair_with(options);
        write(&mut world, 0, 80, 32);
        pass(&mut world, 50);
        bad_block(&mut world, 0, 88, 8);
        read(&mut world, 0, 80, 32);
        for _ in 0..30 {
            let start = 80 + world.rng.below(4) * 8;
            write(&mut world, 0, start, 8);
            read(&mut world, 0, start, 8);
            world.run(1);
        }
        within(&mut world, 5000, |w| w.in_sync() && open(w, 0) == 0);
        quiet(&mut world);
        assert_eq!(world.failed_requests, 0);
    }
}

/// The peer becomes a second Primary while a block that could not be written here waits to be repaired: it still is, and
/// the write is told done when this disk is known to be the worse one, not before.
#[test]
fn a_second_primary_does_not_call_a_repair_off() {
    let mut at_work = 0;
    for seed in 0..80 {
        let mut options = kept(150 + seed);
        options.net.allow_two_primaries = true;
        let mut world = pair_with(options);
        fail_writes(&mut world, 0, 1);
        slow(&mut world, 0, 2);
        write(&mut world, 0, 800, 16);
        world.run(seed % 4);
        world.admin(1, "primary", AdminCommand::Primary { force: false });
        at_work += usize::from(open(&world, 0) == 1);
        within(&mut world, 5000, |w| open(w, 0) == 0 && w.is_primary(1));
        if seed % 2 == 0 {
            // What only the other node has was told done: this one does not go on as the good copy.
            world.crash(1, true);
            pass(&mut world, 3000);
            world.start(1);
        }
        slow(&mut world, 0, 0);
        quiet(&mut world);
        assert_eq!(sectors(&world, 0)[800..816], sectors(&world, 1)[800..816], "seed {seed}");
        assert_eq!(world.failed_requests, 0);
    }
    assert!(at_work >= 40, "{at_work} of 80");
}

/// Of a node without a good peer nothing is taken away by an error: it stays UpToDate, the error is the
/// application's, and the block is repaired when the peer is back.
#[test]
fn the_only_good_copy_stays_so() {
    let mut world = pair_with(kept(200));
    write(&mut world, 0, 800, 8);
    quiet(&mut world);
    world.cut(true);
    pass(&mut world, 100);
    bad_block(&mut world, 0, 800, 8);
    read(&mut world, 0, 800, 8);
    pass(&mut world, 100);
    assert_eq!((world.failed_requests, disk(&world, 0)), (1, DiskState::UpToDate));
    load(&mut world, 0, 5);
    pass(&mut world, 100);
    assert_eq!(world.failed_requests, 1);
    world.heal();
    within(&mut world, 5000, |w| w.in_sync());
    read(&mut world, 0, 800, 8);
    within(&mut world, 5000, |w| !is_bad(w, 0) && w.in_sync());
    assert_eq!(world.failed_requests, 1, "the peer had kept the block");
    quiet(&mut world);
}

/// U1: a write that only the peer has is not told done while a crash would let this disk be believed.
#[test]
fn nothing_is_done_before_the_degradation_is_known() {
    for policy in [OnIoError::PassOn, OnIoError::Detach, OnIoError::CallLocalIoError] {
        for seed in 0..60 {
            let mut options = kept(300 + seed);
            options.volume.on_io_error = policy;
            options.net.protocol = protocol(seed);
            let mut world = pair_with(options);
            write(&mut world, 0, 800, 8);
            quiet(&mut world);
            fail_writes(&mut world, 0, 1);
            write(&mut world, 0, 800, 8);
            within(&mut world, 2000, |w| open(w, 0) == 0);
            assert_eq!(world.failed_requests, 0, "{policy:?}");
            world.crash(0, seed % 2 == 0);
            world.start(0);
            quiet(&mut world);
        }
    }
}

/// The peer is lost in the middle of it: nothing that was told done is gone.
#[test]
fn the_peer_is_lost_while_a_disk_fails() {
    for policy in [OnIoError::PassOn, OnIoError::Detach] {
        for seed in 0..40 {
            let mut options = kept(400 + seed);
            options.volume.on_io_error = policy;
            options.resource.on_no_data = if seed % 4 < 2 { OnNoData::IoError } else { OnNoData::SuspendIo };
            options.net.protocol = protocol(seed);
            let mut world = pair_with(options);
            load(&mut world, 0, 10);
            fail_writes(&mut world, 0, 1 + u32::try_from(seed % 3).unwrap());
            load(&mut world, 0, 10);
            world.cut_after = Some(world.delivered + seed);
            pass(&mut world, 40);
            world.cut(true);
            pass(&mut world, 200);
            world.heal();
            within(&mut world, 5000, |w| w.state(0).is_some_and(|s| s.2 == ConnState::Connected));
            within(&mut world, 10_000, |w| open(w, 0) == 0);
            if disk(&world, 0) == DiskState::Diskless {
                fail_writes(&mut world, 0, 0);
                let id = world.attach(0);
                within(&mut world, 5000, |w| w.nodes[0].answers.contains_key(&id));
                assert_eq!(world.nodes[0].answers[&id], Ok(()), "seed {seed}");
            }
            quiet(&mut world);
        }
    }
}

/// S20: the negative ack comes under every protocol, the block is marked and repaired.
#[test]
fn a_mirrored_write_that_fails_is_repaired_under_every_protocol() {
    for (seed, protocol) in [Protocol::A, Protocol::B, Protocol::C].into_iter().enumerate() {
        let mut options = kept(500 + seed as u64);
        options.net.protocol = protocol;
        let mut world = pair_with(options);
        load(&mut world, 0, 20);
        fail_writes(&mut world, 1, 2);
        load(&mut world, 0, 20);
        within(&mut world, 2000, |w| disk(w, 1) == DiskState::Inconsistent);
        within(&mut world, 1000, |w| {
            status(w, 0).connection.peer_volumes[0].peer_disk == DiskState::Inconsistent
        });
        within(&mut world, 1000, |w| open(w, 0) == 0);
        assert_eq!(world.failed_requests, 0);
        within(&mut world, 5000, World::in_sync);
        quiet(&mut world);
    }
}

/// Seed 324: a source that cannot read a block keeps its state; the target stays Inconsistent and asks again.
#[test]
fn a_source_with_a_bad_block_stays_the_good_copy() {
    let mut world = pair_with(kept(600));
    world.cut(true);
    pass(&mut world, 100);
    for block in 0..40 {
        write(&mut world, 0, block * 8, 8);
    }
    pass(&mut world, 200);
    bad_block(&mut world, 0, 80, 8);
    world.heal();
    within(&mut world, 5000, |w| resyncs(w, 1) == 2);
    assert_eq!((disk(&world, 0), disk(&world, 1)), (DiskState::UpToDate, DiskState::Inconsistent));
    assert_eq!(world.nodes[1].core.as_ref().unwrap().out_of_sync_bits(VOLUME), Some(1));
    world.nodes[0].disks[0].faults.bad = None;
    within(&mut world, 10_000, World::in_sync);
    quiet(&mut world);
}

/// What cannot be mended is tried less and less often, and says so.
#[test]
fn a_block_that_stays_bad_does_not_make_resyncs_flap() {
    let mut world = pair_with(kept(610));
    world.cut(true);
    pass(&mut world, 100);
    write(&mut world, 0, 80, 8);
    pass(&mut world, 100);
    bad_block(&mut world, 0, 80, 8);
    world.heal();
    pass(&mut world, 600_000);
    let tries = resyncs(&world, 1);
    assert!((5..15).contains(&tries), "{tries} in ten minutes");
    assert!(waits_for(&world, 1, &["volume 0", "repair", "again in"]), "{:?}", status(&world, 1).waiting_for);
    world.nodes[0].disks[0].faults.bad = None;
    // Whoever mended it need not wait for the next try.
    world.cut(false);
    within(&mut world, 5000, World::in_sync);
    quiet(&mut world);
}

/// The errors of both disks cross on the wire: neither is left without a good copy.
#[test]
fn errors_of_both_disks_at_once() {
    for seed in 0..60 {
        let mut options = kept(700 + seed);
        options.net.protocol = protocol(seed);
        let mut world = pair_with(options);
        load(&mut world, 0, 10);
        pass(&mut world, seed % 5);
        fail_writes(&mut world, 0, 1);
        fail_writes(&mut world, 1, 1);
        load(&mut world, 0, 10);
        read(&mut world, 0, 0, 64);
        pass(&mut world, 200);
        assert!((0..2).any(|node| disk(&world, node) == DiskState::UpToDate));
        within(&mut world, 5000, |w| open(w, 0) == 0);
        within(&mut world, 10_000, World::in_sync);
        quiet(&mut world);
    }
}

/// A target is not done while a mirrored write failed, whenever it fails.
#[test]
fn a_target_is_not_done_while_a_mirrored_write_failed() {
    for seed in 0..60 {
        let mut world = pair_with(kept(800 + seed));
        world.cut(true);
        pass(&mut world, 100);
        for block in 0..20 {
            write(&mut world, 0, block * 8, 8);
        }
        pass(&mut world, 200);
        world.heal();
        within(&mut world, 5000, |w| w.state(1).is_some_and(|s| s.3 == ReplState::SyncTarget));
        world.run_until(1000, |w| {
            w.nodes[1].core.as_ref().and_then(|c| c.out_of_sync_bits(VOLUME)) <= Some(seed % 7)
        });
        fail_writes(&mut world, 1, 1);
        load(&mut world, 0, 3);
        within(&mut world, 10_000, World::in_sync);
        quiet(&mut world);
    }
}

/// `call-local-io-error`: the program first, then the peer hears of it.
#[test]
fn the_handler_runs_before_the_peer_is_told() {
    let mut options = kept(900);
    options.volume.on_io_error = OnIoError::CallLocalIoError;
    let mut world = pair_with(options);
    handler_says(&mut world, 0, HandlerName::LocalIoError, None);
    fail_writes(&mut world, 0, 1);
    load(&mut world, 0, 1);
    pass(&mut world, 500);
    assert_eq!(runs(&world, 0, HandlerName::LocalIoError), 1);
    assert_eq!(disk(&world, 0), DiskState::Failed);
    assert_eq!(status(&world, 1).connection.peer_volumes[0].peer_disk, DiskState::UpToDate);
    assert_eq!(open(&world, 0), 1, "done although nobody knows that this disk does not have it");
    assert!(waits_for(&world, 0, &["local-io-error"]));
    late_answer(&mut world, 0, HandlerName::LocalIoError, 0, 1);
    within(&mut world, 1000, |w| disk(w, 0) == DiskState::Diskless && open(w, 0) == 0);
    assert_eq!(status(&world, 1).connection.peer_volumes[0].peer_disk, DiskState::Diskless);
    assert_eq!(world.failed_requests, 0);
    world.attach(0);
    quiet(&mut world);
}

/// Metadata is never passed on.
#[test]
fn a_metadata_error_costs_the_disk_whatever_the_policy() {
    let mut world = pair_with(kept(910));
    fail_metas(&mut world, 0, 1);
    load(&mut world, 0, 5);
    within(&mut world, 2000, |w| disk(w, 0) == DiskState::Diskless && open(w, 0) == 0);
    assert_eq!(world.failed_requests, 0);
    world.attach(0);
    quiet(&mut world);
}

/// A diskless Primary reads a block that the only copy cannot read: that copy stays what it is.
#[test]
fn the_only_copy_of_a_diskless_primary_has_a_bad_block() {
    let mut world = pair_with(kept(920));
    write(&mut world, 0, 80, 8);
    quiet(&mut world);
    detach(&mut world, 0);
    bad_block(&mut world, 1, 80, 8);
    read(&mut world, 0, 80, 8);
    read(&mut world, 0, 160, 8);
    pass(&mut world, 100);
    assert_eq!(
        (world.failed_requests, world.good_requests > 1, disk(&world, 1)),
        (1, true, DiskState::UpToDate)
    );
    write(&mut world, 0, 80, 8);
    pass(&mut world, 100);
    read(&mut world, 0, 80, 8);
    pass(&mut world, 100);
    assert_eq!((world.failed_requests, open(&world, 0)), (1, 0));
    world.attach(0);
    quiet(&mut world);
    assert_eq!(sectors(&world, 0), sectors(&world, 1));
}

/// The repair of a disk is cut after every message.
#[test]
fn a_repair_is_cut_after_any_message() {
    let mut n = 0;
    loop {
        let mut world = pair_with(kept(930));
        write(&mut world, 0, 80, 32);
        pass(&mut world, 50);
        bad_block(&mut world, 0, 88, 8);
        world.cut_after = Some(world.delivered + n);
        read(&mut world, 0, 80, 32);
        write(&mut world, 0, 96, 8);
        pass(&mut world, 300);
        let through = world.cut_after.is_some();
        world.cut_after = None;
        within(&mut world, 5000, |w| w.state(0).is_some_and(|s| s.2 == ConnState::Connected));
        within(&mut world, 5000, World::in_sync);
        read(&mut world, 0, 80, 32);
        within(&mut world, 5000, |w| !is_bad(w, 0) && w.in_sync());
        quiet(&mut world);
        if through {
            break;
        }
        n += 1;
    }
    assert!(n > 10, "{n} messages only");
}

/// The peer refuses a write, and its superblock does not say so when both lose power. Alone it would be taken
/// for the newest copy: what was told done is not overwritten by it without a word.
#[test]
fn a_write_that_the_peer_refused_makes_a_new_generation() {
    for policy in [OnIoError::PassOn, OnIoError::Detach, OnIoError::CallLocalIoError] {
        let mut splits = 0;
        for seed in 0..12 {
            let mut options = kept(1000 + seed);
            options.volume.on_io_error = policy;
            let mut world = pair_with(options);
            handler_says(&mut world, 1, HandlerName::LocalIoError, None);
            write(&mut world, 0, 64, 8);
            quiet(&mut world);
            fail_writes(&mut world, 1, 1);
            world.request(0, RequestOp::Write, 64, 8, true);
            within(&mut world, 1000, |w| !w.nodes[1].ios.is_empty());
            // What it writes behind the failed write, its superblock, comes too late.
            world.nodes[1].disks[0].faults.stick = Some(1_000_000_000);
            within(&mut world, 2000, |w| open(w, 0) == 0);
            assert_eq!(world.failed_requests, 0);
            let held = sectors(&world, 0)[64..72].to_vec();
            world.crash(0, true);
            world.crash(1, true);
            world.nodes[1].disks[0].faults.stick = None;
            world.start(1);
            pass(&mut world, 100);
            let id = world.admin(1, "primary", AdminCommand::Primary { force: false });
            within(&mut world, 2000, |w| w.nodes[1].answers.contains_key(&id));
            world.start(0);
            pass(&mut world, 3000);
            assert_eq!(
                sectors(&world, 0)[64..72],
                held,
                "{policy:?} seed {seed}: FUA, acknowledged, and gone"
            );
            if world.nodes[1].answers[&id].is_ok() {
                splits += 1;
                let alone = |n| world.state(n).is_some_and(|s| s.2 == ConnState::StandAlone);
                assert!((0..2).all(alone), "a person decides");
            }
        }
        assert!(splits > 3, "{policy:?}: {splits}");
    }
}

/// `call-local-io-error` on the peer, whose flush failed: it does not call stable what its disk lost.
#[test]
fn no_barrier_is_acknowledged_while_the_peer_does_not_know_that_the_disk_failed() {
    for told in [true, false] {
        for seed in 0..20 {
            let mut options = kept(1100 + seed);
            options.volume.on_io_error = OnIoError::CallLocalIoError;
            options.net.protocol = protocol(seed);
            let mut world = pair_with(options);
            handler_says(&mut world, 1, HandlerName::LocalIoError, None);
            world.nodes[1].disks[0].faults.flushes = 1;
            write(&mut world, 0, 64, 8);
            pass(&mut world, 100);
            assert_eq!(runs(&world, 1, HandlerName::LocalIoError), 1);
            if told {
                late_answer(&mut world, 1, HandlerName::LocalIoError, 0, 0);
                within(&mut world, 1000, |w| disk(w, 1) == DiskState::Diskless && w.idle());
            }
            world.crash(1, true);
            world.start(1);
            quiet(&mut world);
        }
    }
}

/// `outdate` is done when the superblock says so, not when the disk failed to take it.
#[test]
fn a_verb_whose_record_failed_is_refused() {
    let mut world = pair_with(kept(1200));
    verb(&mut world, 1, "disconnect", AdminCommand::Disconnect { force: false }).expect("it leaves");
    pass(&mut world, 50);
    fail_metas(&mut world, 1, 1);
    let refused = verb(&mut world, 1, "outdate", AdminCommand::Outdate(VOLUME)).unwrap_err();
    assert_eq!(refused.number, 118, "{refused:?}");
    assert!(!refused.facts.is_empty() && !refused.advice.is_empty());
    within(&mut world, 2000, |w| disk(w, 1) == DiskState::Diskless);
}
