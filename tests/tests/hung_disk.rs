//! A disk that does not answer: `disk-timeout` (SEM §21, §25), and whose buffers are whose then (S33).
use lockstep_replicator::core::config::{OnNoData, Protocol};
use lockstep_replicator::core::event::{AdminCommand, RequestOp};
use lockstep_replicator::core::state::{ConnState, DiskState, ReplState};
use lockstep_tests::sim::node::VOLUME;
use lockstep_tests::sim::script::{load, open, pair_with, pass, quiet, status, verb, waits_for, within};
use lockstep_tests::sim::{Options, World};

const FOREVER: u64 = u64::MAX;
const MS: u64 = 1_000_000;

fn patient(seed: u64) -> Options {
    let mut options = Options::new(seed);
    options.volume.disk_timeout_ms = 1000;
    options
}

fn stick(world: &mut World, node: usize, ns: u64) {
    world.nodes[node].disks[0].faults.stick = Some(ns);
}

fn disk(world: &World, node: usize) -> DiskState {
    world.state(node).expect("the node is up").1
}

/// Buffers of a node that the disk has and nobody else.
fn with_the_disk(world: &World, node: usize) -> usize {
    world.nodes[node].buffers.values().filter(|buffer| buffer.disk > 0 && !buffer.core).count()
}

#[test]
fn the_application_goes_on_with_the_peer() {
    for (seed, protocol) in (1..).zip([Protocol::A, Protocol::B, Protocol::C]) {
        for op in [RequestOp::Write, RequestOp::Read] {
            let mut options = patient(seed);
            options.net.protocol = protocol;
            let mut world = pair_with(options);
            world.request(0, RequestOp::Write, 800, 8, false);
            quiet(&mut world);
            // The extent is hot: the next IO is the application's own.
            stick(&mut world, 0, FOREVER);
            world.request(0, op, 800, 8, false);
            pass(&mut world, 900);
            assert_eq!((open(&world, 0), disk(&world, 0)), (1, DiskState::UpToDate));
            within(&mut world, 500, |w| open(w, 0) == 0);
            assert_eq!((world.failed_requests, disk(&world, 0)), (0, DiskState::Failed));
            assert_eq!(with_the_disk(&world, 0), 1, "given away while the disk is at it");
            assert!(waits_for(&world, 0, &["1 IO in flight on the failed disk"]));
            load(&mut world, 0, 20);
            world.flush(0);
            within(&mut world, 2000, |w| open(w, 0) == 0);
            assert_eq!(world.failed_requests, 0);
            world.crash(0, false);
            world.start(0);
            quiet(&mut world);
        }
    }
}

/// S33: the answer comes when the request is long told done, and its number belongs to another one.
#[test]
fn a_late_answer_hits_nobody() {
    for seed in 0..30 {
        let mut world = pair_with(patient(100 + seed));
        load(&mut world, 0, 10);
        within(&mut world, 2000, |w| open(w, 0) == 0);
        let late = 1500 + world.rng.below(1500);
        for _ in 0..3 {
            stick(&mut world, 0, late * MS);
            let op = if world.rng.percent(50) { RequestOp::Read } else { RequestOp::Write };
            let start = world.rng.below(100) * 8;
            world.request(0, op, start, 16, false);
        }
        pass(&mut world, 1100);
        for _ in 0..30 {
            load(&mut world, 0, 4);
            world.request(0, RequestOp::Read, 0, 64, false);
            world.run(70);
        }
        within(&mut world, 4000, |w| disk(w, 0) == DiskState::Diskless && open(w, 0) == 0);
        assert_eq!((world.failed_requests, with_the_disk(&world, 0)), (0, 0));
        world.nodes[0].disks[0].faults.stick = None;
        world.attach(0);
        quiet(&mut world);
    }
}

/// Mirrored writes, flushes at the end of an epoch, metadata: a Secondary that hangs does not stop the Primary.
#[test]
fn a_secondary_whose_disk_hangs_says_so_in_time() {
    for seed in 0..40 {
        let mut options = patient(200 + seed);
        options.net.protocol = if seed % 2 == 0 { Protocol::C } else { Protocol::B };
        let mut world = pair_with(options);
        load(&mut world, 0, 5);
        pass(&mut world, seed % 6);
        stick(&mut world, 1, if seed % 3 == 0 { FOREVER } else { 2500 * MS });
        load(&mut world, 0, 10);
        world.flush(0);
        within(&mut world, 3000, |w| open(w, 0) == 0 && disk(w, 1) < DiskState::Inconsistent);
        assert_eq!(world.failed_requests, 0);
        if seed % 3 == 0 {
            world.crash(1, false);
            world.start(1);
        } else {
            within(&mut world, 4000, |w| disk(w, 1) == DiskState::Diskless);
            world.attach(1);
        }
        quiet(&mut world);
    }
}

/// A metadata write that hangs holds up writes that wait for the activity log.
#[test]
fn a_metadata_write_that_hangs_counts_too() {
    let mut world = pair_with(patient(300));
    // A cold extent: the first IO is the transaction of the log.
    stick(&mut world, 0, FOREVER);
    world.request(0, RequestOp::Write, 30_000, 8, false);
    within(&mut world, 1500, |w| open(w, 0) == 0);
    assert_eq!((world.failed_requests, disk(&world, 0)), (0, DiskState::Failed));
    world.crash(0, false);
    world.start(0);
    quiet(&mut world);
}

#[test]
fn without_another_copy_the_error_comes_in_time_or_io_waits() {
    for on_no_data in [OnNoData::IoError, OnNoData::SuspendIo] {
        let mut options = patient(400);
        options.resource.on_no_data = on_no_data;
        let mut world = pair_with(options);
        world.request(0, RequestOp::Write, 800, 8, false);
        quiet(&mut world);
        world.cut(true);
        pass(&mut world, 100);
        stick(&mut world, 0, 1500 * MS);
        world.request(0, RequestOp::Read, 800, 8, false);
        pass(&mut world, 1200);
        if on_no_data == OnNoData::IoError {
            assert_eq!((open(&world, 0), world.failed_requests), (0, 1));
        } else {
            assert_eq!((open(&world, 0), world.failed_requests), (1, 0));
            assert_eq!(status(&world, 0).suspended, ["no-data"]);
        }
        within(&mut world, 2000, |w| disk(w, 0) == DiskState::Diskless);
        world.attach(0);
        within(&mut world, 2000, |w| disk(w, 0) == DiskState::UpToDate && open(w, 0) == 0);
        world.heal();
        quiet(&mut world);
    }
}

#[test]
fn without_the_option_nothing_is_given_up() {
    let mut world = pair_with(Options::new(500));
    stick(&mut world, 0, 60_000 * MS);
    world.request(0, RequestOp::Write, 800, 8, false);
    pass(&mut world, 50_000);
    assert_eq!((open(&world, 0), disk(&world, 0)), (1, DiskState::UpToDate));
    quiet(&mut world);
    assert_eq!(world.failed_requests, 0);
}

/// The option counts from when it is set, and an operator may do the same by hand.
#[test]
fn it_may_be_switched_on_or_done_by_hand_while_a_disk_hangs() {
    for by_hand in [false, true] {
        let mut world = pair_with(Options::new(510));
        load(&mut world, 0, 5);
        quiet(&mut world);
        stick(&mut world, 0, 8000 * MS);
        load(&mut world, 0, 5);
        pass(&mut world, 5000);
        assert!(open(&world, 0) > 0);
        if by_hand {
            world.admin(0, "detach --force", AdminCommand::Detach { volume: VOLUME, force: true });
        } else {
            let mut volume = world.options.volume.clone();
            volume.disk_timeout_ms = 1000;
            let net = Box::new(world.options.net.clone());
            let change = AdminCommand::Configure { net, volumes: vec![volume] };
            assert_eq!(verb(&mut world, 0, "adjust", change), Ok(()));
        }
        within(&mut world, 500, |w| open(w, 0) == 0);
        assert_eq!((world.failed_requests, disk(&world, 0)), (0, DiskState::Failed));
        within(&mut world, 5000, |w| disk(w, 0) == DiskState::Diskless && w.idle());
        assert_eq!(world.state(0).unwrap().2, ConnState::Connected);
        world.attach(0);
        quiet(&mut world);
    }
}

/// A disk that hangs for ever: `detach --force` gives it up and is answered, the node goes on without it, meets
/// its peer again, and can be taken down. What the disk has stays with the disk.
#[test]
fn a_node_whose_disk_hangs_for_ever_can_be_taken_down() {
    for (node, op) in [(0, RequestOp::Write), (0, RequestOp::Read), (1, RequestOp::Write)] {
        let mut world = pair_with(Options::new(600));
        world.request(0, RequestOp::Write, 800, 8, false);
        quiet(&mut world);
        stick(&mut world, node, FOREVER);
        world.request(0, op, 800, 8, false);
        pass(&mut world, 6000);
        assert!(waits_for(&world, node, &["volume 0", "not answered", "detach --force"]));
        assert!(open(&world, 0) > 0);
        let forced = verb(&mut world, node, "detach", AdminCommand::Detach { volume: VOLUME, force: true });
        assert_eq!((forced, disk(&world, node), open(&world, 0)), (Ok(()), DiskState::Diskless, 0));
        assert_eq!(
            (world.failed_requests, with_the_disk(&world, node)),
            (0, usize::from(op == RequestOp::Write || node == 0))
        );
        assert!(waits_for(&world, node, &["1 IO", "given up", "attached again"]));
        // Never back under IO that is still on its way to it.
        let id = world.attach(node);
        within(&mut world, 1000, |w| w.nodes[node].answers.contains_key(&id));
        assert_eq!(world.nodes[node].answers[&id].as_ref().unwrap_err().number, 124);
        world.cut(true);
        pass(&mut world, 200);
        world.heal();
        within(&mut world, 5000, |w| w.state(node).is_some_and(|s| s.2 == ConnState::Connected));
        load(&mut world, 0, 10);
        within(&mut world, 2000, |w| open(w, 0) == 0);
        assert_eq!(world.failed_requests, 0);
        assert_eq!(verb(&mut world, node, "down", AdminCommand::Down), Ok(()));
        assert_eq!(disk(&world, node), DiskState::Diskless);
        world.crash(node, false);
        world.start(node);
        quiet(&mut world);
    }
}

/// `down` that waits for the disk says so, and ends when the disk is given up; a late answer lets it go.
#[test]
fn down_ends_when_the_disk_it_waits_for_is_given_up() {
    for late in [false, true] {
        let mut world = pair_with(Options::new(610));
        world.request(0, RequestOp::Write, 800, 8, false);
        quiet(&mut world);
        stick(&mut world, 0, if late { 20_000 * MS } else { FOREVER });
        world.request(0, RequestOp::Write, 800, 8, false);
        let down = world.admin(0, "down", AdminCommand::Down);
        pass(&mut world, 6000);
        assert!(!world.nodes[0].answers.contains_key(&down));
        assert!(
            waits_for(&world, 0, &["not answered", "detach --force"]),
            "{:?}",
            status(&world, 0).waiting_for
        );
        world.admin(0, "detach", AdminCommand::Detach { volume: VOLUME, force: true });
        within(&mut world, 10_000, |w| w.nodes[0].answers.contains_key(&down));
        assert_eq!(world.nodes[0].answers[&down], Ok(()));
        assert_eq!(world.failed_requests, 0);
        if late {
            pass(&mut world, 15_000);
            assert_eq!(with_the_disk(&world, 0), 0);
            assert!(!world.nodes[0].disk_open[0], "let go at last");
        } else {
            assert_eq!(with_the_disk(&world, 0), 1);
            assert!(world.nodes[0].disk_open[0], "let go while IO is on its way");
        }
    }
}

/// A target whose metadata write hangs never says that it is the older copy: what its source holds back for that
/// word is ended by `ko-count`, as a mirrored write is.
#[test]
fn a_target_that_cannot_say_that_it_is_older_is_given_up() {
    let mut options = Options::new(950);
    (options.net.ko_count, options.net.timeout_ms) = (2, 1000);
    let mut world = pair_with(options);
    stick(&mut world, 1, FOREVER);
    world.admin(0, "invalidate-remote", AdminCommand::InvalidateRemote(VOLUME));
    within(&mut world, 1000, |w| w.state(0).is_some_and(|s| s.3 == ReplState::WFBitMapS));
    world.request(0, RequestOp::Write, 800, 8, false);
    pass(&mut world, 1500);
    assert_eq!(open(&world, 0), 1);
    assert!(waits_for(&world, 0, &["n1 to note that its copy is the older one (1 write(s) held back)"]));
    within(&mut world, 1000, |w| open(w, 0) == 0);
    assert_eq!(world.failed_requests, 0);
    assert!(world.state(0).unwrap().2 < ConnState::Connected);
    world.crash(1, false);
    world.nodes[1].disks[0].faults.stick = None;
    world.start(1);
    quiet(&mut world);
}

/// The same on a Secondary: there it is the detach of `down` that waits, and a disk that is given up is what it wanted.
#[test]
fn down_of_a_secondary_ends_when_the_disk_that_it_detaches_is_given_up() {
    for late in [false, true] {
        let mut world = pair_with(Options::new(620));
        stick(&mut world, 1, if late { 20_000 * MS } else { FOREVER });
        world.request(0, RequestOp::Write, 800, 8, false);
        pass(&mut world, 100);
        let down = world.admin(1, "down", AdminCommand::Down);
        pass(&mut world, 6000);
        assert_eq!((disk(&world, 1), open(&world, 0)), (DiskState::Detaching, 0));
        assert!(
            waits_for(&world, 1, &["not answered", "detach --force"]),
            "{:?}",
            status(&world, 1).waiting_for
        );
        let force = verb(&mut world, 1, "detach", AdminCommand::Detach { volume: VOLUME, force: true });
        assert_eq!(force, Ok(()));
        within(&mut world, 1000, |w| w.nodes[1].answers.contains_key(&down));
        assert_eq!(world.nodes[1].answers[&down], Ok(()), "late {late}");
        assert_eq!((disk(&world, 1), world.nodes[1].disk_open[0]), (DiskState::Diskless, true));
        world.crash(1, false);
        world.start(1);
        quiet(&mut world);
    }
}
