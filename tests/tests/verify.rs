//! Stories of online verify: what it finds, what it must not call a difference, and how it is repaired.
use lockstep_replicator::core::config::{Protocol, RateControl, ResyncConfig};
use lockstep_replicator::core::event::{AdminCommand, Event, HandlerName, RequestOp};
use lockstep_replicator::core::state::{ConnState, DiskState, ReplState};
use lockstep_replicator::units::Sector;
use lockstep_tests::sim::node::VOLUME;
use lockstep_tests::sim::script::{open, waits_for};
use lockstep_tests::sim::{Options, World};

fn options(seed: u64) -> Options {
    let mut options = Options::new(seed);
    options.sectors = 8 * 2048;
    options.net.verify_alg = Some("sha1".into());
    options
}

fn pair(options: Options) -> World {
    let mut world = World::new(options);
    world.start(0);
    world.start(1);
    ok(&mut world, 1000, |w| w.state(0).is_some_and(|s| s.2 == ConnState::Connected));
    world.admin(0, "primary-force", AdminCommand::Primary { force: true });
    ok(&mut world, 60_000, |w| w.in_sync() && w.is_primary(0) && w.idle());
    world
}

fn ok(world: &mut World, ms: u64, done: impl FnMut(&World) -> bool) {
    let held = world.run_until(ms, done);
    assert_eq!(world.broken, None);
    assert!(held, "not within {ms} ms: {:?} {:?}", world.state(0), world.state(1));
}

fn quiet(world: &mut World) {
    ok(world, 60_000, |w| w.in_sync() && w.idle());
    world.check_quiet();
    world.check_content(0);
    world.check_content(1);
    assert_eq!(world.broken, None);
}

fn verb(world: &mut World, node: usize, name: &'static str, command: AdminCommand) -> Result<(), i32> {
    let id = world.admin(node, name, command);
    ok(world, 20_000, |w| w.nodes[node].answers.contains_key(&id));
    world.nodes[node].answers[&id].clone().map_err(|refusal| refusal.number)
}

const VERIFY: AdminCommand = AdminCommand::Verify { volume: VOLUME, start: None, stop: None };

/// Runs a verify to its end: blocks found and skipped, as both nodes say.
fn verify(world: &mut World, node: usize, command: AdminCommand) -> (u64, u64) {
    let before = world.log.len();
    assert_eq!(verb(world, node, "verify", command), Ok(()));
    ok(world, 60_000, |w| (0..2).all(|n| w.state(n).is_some_and(|s| s.3 == ReplState::Established)));
    let ends: Vec<(u64, u64)> = world.log[before..]
        .iter()
        .filter_map(|(_, _, event)| match event {
            Event::VerifyDone { bits_found, bits_skipped, .. } => Some((*bits_found, *bits_skipped)),
            _ => None,
        })
        .collect();
    assert_eq!(ends.len(), 2, "both nodes report the end: {ends:?}");
    assert_eq!(ends[0], ends[1]);
    ends[0]
}

fn marked(world: &World, node: usize) -> u64 {
    world.nodes[node].core.as_ref().and_then(|core| core.out_of_sync_bits(VOLUME)).unwrap_or(u64::MAX)
}

fn found_ranges(world: &World) -> Vec<(u64, u64)> {
    world
        .log
        .iter()
        .filter_map(|(_, _, event)| match event {
            Event::OutOfSync { range, .. } => Some((range.start().0, range.len().0)),
            _ => None,
        })
        .collect()
}

fn rot(world: &mut World, node: usize) {
    // What rots without a write has no mark: to find it is what verify is for.
    world.oracle.check_marks = false;
    for sector in [8, 9, 16, 5000, 16_383] {
        world.nodes[node].disks[0].rot(sector, 77_777);
    }
}

#[test]
fn equal_disks_are_found_equal_from_either_side() {
    for node in 0..2 {
        let mut world = pair(options(1));
        assert_eq!(verify(&mut world, node, VERIFY), (0, 0));
        quiet(&mut world);
    }
}

#[test]
fn rot_is_found_marked_reported_and_repaired() {
    for (asks, rotten) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
        let mut world = pair(options(2));
        rot(&mut world, rotten);
        assert_eq!(verify(&mut world, asks, VERIFY), (4, 0));
        assert_eq!(found_ranges(&world), [(8, 16), (5000, 8), (16_376, 8)]);
        assert_eq!((marked(&world, 0), marked(&world, 1)), (4, 4));
        assert!(
            world.handler_runs.iter().any(|(_, at, name)| (*at, *name) == (asks, HandlerName::OutOfSync))
        );
        // The good copy goes over the rotten one. A Primary must step down before its copy is replaced.
        if rotten == 0 {
            assert_eq!(verb(&mut world, 0, "invalidate", AdminCommand::InvalidateMarked(VOLUME)), Err(-2));
            assert_eq!(verb(&mut world, 0, "secondary", AdminCommand::Secondary), Ok(()));
        }
        let before = world.nodes[rotten].disks[0].written_sectors;
        let repair = if asks == rotten {
            verb(&mut world, rotten, "invalidate", AdminCommand::InvalidateMarked(VOLUME))
        } else {
            verb(&mut world, 1 - rotten, "invalidate-remote", AdminCommand::InvalidateRemoteMarked(VOLUME))
        };
        assert_eq!(repair, Ok(()));
        quiet(&mut world);
        assert_eq!(world.nodes[rotten].disks[0].written_sectors - before, 32);
        assert_eq!(verify(&mut world, asks, VERIFY), (0, 0));
    }
}

#[test]
fn reconnecting_repairs_what_verify_found() {
    let mut world = pair(options(3));
    rot(&mut world, 1);
    assert_eq!(verify(&mut world, 0, VERIFY), (4, 0));
    assert_eq!(verb(&mut world, 1, "disconnect", AdminCommand::Disconnect { force: false }), Ok(()));
    world.run(200);
    world.admin(1, "connect", AdminCommand::Connect { discard_my_data: false, tentative: false });
    quiet(&mut world);
}

#[test]
fn a_busy_application_is_no_difference() {
    // Every protocol, either node asking, a hot set of blocks (S31, S36): no false alarm, and an end.
    for protocol in [Protocol::A, Protocol::B, Protocol::C] {
        for node in 0..2 {
            let mut options = options(4);
            options.net.protocol = protocol;
            options.net.max_epoch_size = 20;
            let mut world = pair(options);
            let mut writes = 0;
            for _ in 0..10 {
                assert_eq!(verb(&mut world, node, "verify", VERIFY), Ok(()));
                while world.state(node).is_some_and(|s| s.3 >= ReplState::VerifyS) {
                    // As much as an application of depth 4 does; every fourth write is to a hot spot.
                    // A and B have no flow control: no more than the slower disk takes.
                    while world.nodes[0].requests.len() < 4 {
                        let blocks = if writes % 4 == 0 { 20 } else { 2000 };
                        let first = world.rng.below(blocks) * 8;
                        world.request(0, RequestOp::Write, first, 8, false);
                        writes += 1;
                    }
                    world.run(if protocol == Protocol::C { 1 } else { 12 });
                    assert!(world.now < 120_000_000_000, "verify does not end under load");
                }
                ok(&mut world, 1000, |w| w.state(1 - node).is_some_and(|s| s.3 == ReplState::Established));
            }
            assert_eq!(found_ranges(&world), [], "{protocol:?} from n{node}: a false alarm");
            assert!(writes > 20, "only {writes} writes");
            assert_eq!((marked(&world, 0), marked(&world, 1)), (0, 0));
            quiet(&mut world);
        }
    }
}

#[test]
fn rot_under_load_is_found() {
    let mut world = pair(options(5));
    rot(&mut world, 1);
    assert_eq!(verb(&mut world, 0, "verify", VERIFY), Ok(()));
    while world.state(0).is_some_and(|s| s.3 >= ReplState::VerifyS) {
        // Beside the rotten blocks.
        let first = 8000 + world.rng.below(200) * 8;
        world.request(0, RequestOp::Write, first, 8, false);
        world.run(1);
    }
    assert_eq!(marked(&world, 0), 4);
    ok(&mut world, 1000, |w| marked(w, 1) == 4);
}

#[test]
fn start_and_stop_bound_a_verify() {
    let mut world = pair(options(6));
    rot(&mut world, 1);
    let part = |start, stop| AdminCommand::Verify {
        volume: VOLUME,
        start: Some(Sector(start)),
        stop: Some(Sector(stop)),
    };
    assert_eq!(verify(&mut world, 0, part(24, 5000)), (0, 0));
    assert_eq!(verify(&mut world, 0, part(4999, 5001)), (1, 0), "a start is rounded down to a block");
    assert_eq!(verb(&mut world, 0, "verify", part(100_000, 200_000)), Err(162));
    assert_eq!(verb(&mut world, 0, "verify", part(100, 50)), Err(162));
}

#[test]
fn an_interrupted_verify_goes_on_where_it_was() {
    let mut options = options(7);
    options.volume.resync =
        ResyncConfig { control: RateControl::Fixed, rate_kib_s: 2000, ..ResyncConfig::default() };
    let mut world = pair(options);
    assert_eq!(verb(&mut world, 0, "verify", VERIFY), Ok(()));
    assert_eq!(verb(&mut world, 0, "verify", VERIFY), Err(-8));
    world.run(2000);
    let status = world.status(0).unwrap().connection.peer_volumes[0].resync.clone().unwrap();
    assert!(status.verify && status.bits_left > 0 && status.bits_left < status.bits_total, "{status:?}");
    assert!(status.rate_kib_s > 1000 && status.eta_s.is_some(), "{status:?}");
    world.cut(false);
    quiet(&mut world);
    assert_eq!(verb(&mut world, 0, "verify", VERIFY), Ok(()));
    let again = world.status(0).unwrap().connection.peer_volumes[0].resync.clone().unwrap();
    assert!(again.bits_total < 2048 - 500, "it starts over: {again:?}");
    ok(&mut world, 30_000, |w| w.in_sync() && w.idle());
    // A finished one starts from the beginning.
    assert_eq!(verb(&mut world, 0, "verify", VERIFY), Ok(()));
    assert_eq!(world.status(0).unwrap().connection.peer_volumes[0].resync.clone().unwrap().bits_total, 2048);
}

#[test]
fn verify_is_refused_where_it_makes_no_sense() {
    let mut without = options(8);
    without.net.verify_alg = None;
    let mut world = pair(without);
    assert_eq!(verb(&mut world, 0, "verify", VERIFY), Err(-14));
    let mut world = pair(options(8));
    world.cut(true);
    world.run(100);
    assert_eq!(verb(&mut world, 0, "verify", VERIFY), Err(-15));
    world.heal();
    quiet(&mut world);
    let detach = AdminCommand::Detach { volume: VOLUME, force: false };
    assert_eq!(verb(&mut world, 1, "detach", detach), Ok(()));
    world.run(50);
    assert_eq!(verb(&mut world, 0, "verify", VERIFY), Err(-2));
}

#[test]
fn a_disk_that_leaves_ends_a_verify() {
    for victim in 0..2 {
        let mut options = options(9);
        options.volume.resync =
            ResyncConfig { control: RateControl::Fixed, rate_kib_s: 2000, ..ResyncConfig::default() };
        let mut world = pair(options);
        assert_eq!(verb(&mut world, 1, "verify", VERIFY), Ok(()));
        world.run(500);
        let detach = AdminCommand::Detach { volume: VOLUME, force: victim == 0 };
        assert_eq!(verb(&mut world, victim, "detach", detach), Ok(()));
        world.run(100);
        assert_eq!(world.state(1 - victim).unwrap().3, ReplState::Established);
        world.attach(victim);
        quiet(&mut world);
    }
}

/// I6: under protocol A writes that came before stand behind a barrier while blocks are copied that may be newer. The
/// target is not good before it has them.
#[test]
fn a_resync_does_not_end_before_the_writes_that_came_before_it() {
    let mut options = options(9);
    options.net.protocol = Protocol::A;
    let mut world = pair(options);
    rot(&mut world, 1);
    assert_eq!(verify(&mut world, 0, VERIFY), (4, 0));
    world.nodes[1].disks[0].faults.stick = Some(4_000_000_000);
    for start in [3000, 3100] {
        world.request(0, RequestOp::Write, start, 8, false);
        ok(&mut world, 100, |w| open(w, 0) == 0);
    }
    world.run(100);
    let repair = verb(&mut world, 0, "invalidate-remote", AdminCommand::InvalidateRemoteMarked(VOLUME));
    assert_eq!(repair, Ok(()));
    world.run(2000);
    assert_eq!(
        (marked(&world, 1), world.nodes[1].disks[0].sectors()[3100]),
        (0, 0),
        "not what this test is about"
    );
    assert_ne!(
        world.state(1).map(|s| s.1),
        Some(DiskState::UpToDate),
        "a write that was answered is missing"
    );
    assert!(waits_for(&world, 1, &["writes that came before the end of the resync"]));
    quiet(&mut world);
}
