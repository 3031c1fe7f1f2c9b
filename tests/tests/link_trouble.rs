//! A link that half works, or hardly (SEM §25): who notices, when, and what it costs.
use lockstep_replicator::core::config::Protocol;
use lockstep_replicator::core::event::{AdminCommand, Event, Input, RequestOp};
use lockstep_replicator::core::state::{ConnState, DiskState};
use lockstep_tests::sim::script::{
    deaf, load, open, pair_with, pass, quiet, status, verb, waits_for, within,
};
use lockstep_tests::sim::{Options, World};

const MS: u64 = 1_000_000;

fn conn(world: &World, node: usize) -> ConnState {
    world.state(node).expect("the node is up").2
}

fn lossy(seed: u64, ping_int_ms: u64, ping_timeout_ms: u64) -> Options {
    let mut options = Options::new(seed);
    options.net.ping_int_ms = ping_int_ms;
    options.net.ping_timeout_ms = ping_timeout_ms;
    options
}

/// Milliseconds until the node says that it is not connected.
fn ms_until_noticed(world: &mut World, node: usize) -> u64 {
    let began = world.now;
    within(world, 120_000, |w| conn(w, node) != ConnState::Connected);
    (world.now - began) / MS
}

/// One direction is dead, or both: both nodes notice within `ping-int` and `ping-timeout`, and the
/// application's writes go on by then.
#[test]
fn a_half_open_link_is_noticed_in_time() {
    for (ping_int, timeout) in [(1000, 500), (3000, 100), (1000, 5000), (2000, 30_000)] {
        for silent in [&[0][..], &[1], &[0, 1]] {
            for under_load in [false, true] {
                let mut world = pair_with(lossy(1, ping_int, timeout));
                load(&mut world, 0, 5);
                quiet(&mut world);
                silent.iter().for_each(|node| deaf(&mut world, *node, true));
                if under_load {
                    load(&mut world, 0, 10);
                }
                let first = silent[0];
                let ms = ms_until_noticed(&mut world, first);
                assert!(ms <= ping_int + timeout + 50, "n{first} noticed after {ms} ms");
                // The other one hears of it, or asks in vain itself.
                let more = ms_until_noticed(&mut world, 1 - first);
                assert!(more <= ping_int + timeout + 50, "n{} noticed {more} ms later", 1 - first);
                within(&mut world, 1000, |w| open(w, 0) == 0);
                assert_eq!(world.failed_requests, 0);
                world.heal();
                quiet(&mut world);
            }
        }
    }
}

/// A ping that is not answered is not put off by the next one.
#[test]
fn a_ping_timeout_longer_than_the_interval_still_comes() {
    let mut world = pair_with(lossy(20, 1000, 30_000));
    deaf(&mut world, 0, true);
    deaf(&mut world, 1, true);
    let ms = ms_until_noticed(&mut world, 0);
    assert!((30_000..31_100).contains(&ms), "{ms} ms");
    // An operator who asks meanwhile does not put it off either.
    world.heal();
    quiet(&mut world);
    deaf(&mut world, 0, true);
    deaf(&mut world, 1, true);
    pass(&mut world, 2000);
    let began = world.now;
    let promoted = world.admin(1, "primary", AdminCommand::Primary { force: false });
    pass(&mut world, 20_000);
    world.admin(1, "primary", AdminCommand::Primary { force: false });
    within(&mut world, 12_000, |w| conn(w, 1) != ConnState::Connected);
    assert!((world.now - began) / MS < 31_100);
    pass(&mut world, 200);
    assert!(world.nodes[1].answers.contains_key(&promoted), "the verb has its answer");
}

/// `ko-count`: the peer answers pings, but its disk does not.
#[test]
fn a_peer_that_answers_pings_but_no_writes_is_dropped() {
    let mut options = Options::new(40);
    options.net.ko_count = 2;
    options.net.timeout_ms = 1500;
    options.net.ping_int_ms = 1000;
    let mut world = pair_with(options);
    load(&mut world, 0, 5);
    quiet(&mut world);
    world.nodes[1].disks[0].faults.stick = Some(20_000 * MS);
    world.request(0, RequestOp::Write, 800, 8, false);
    pass(&mut world, 2500);
    assert_eq!((open(&world, 0), conn(&world, 0)), (1, ConnState::Connected));
    assert!(waits_for(&world, 0, &["1 write(s) to be acknowledged by n1"]));
    within(&mut world, 700, |w| open(w, 0) == 0);
    let told = |event: &Event| matches!(event, Event::Note(_, text) if text.contains("ko-count x timeout"));
    assert!(world.log.iter().any(|(_, node, event)| *node == 0 && told(event)));
    assert_ne!(conn(&world, 0), ConnState::StandAlone, "it is tried again");
    load(&mut world, 0, 20);
    within(&mut world, 10_000, |w| open(w, 0) == 0);
    quiet(&mut world);
    assert_eq!(world.failed_requests, 0);
}

/// `ko-count 0`: never.
#[test]
fn without_ko_count_a_slow_disk_is_waited_for() {
    let mut world = pair_with(Options::new(41));
    load(&mut world, 0, 5);
    quiet(&mut world);
    world.nodes[1].disks[0].faults.stick = Some(100_000 * MS);
    world.request(0, RequestOp::Write, 800, 8, false);
    pass(&mut world, 90_000);
    assert_eq!((open(&world, 0), conn(&world, 0)), (1, ConnState::Connected));
    quiet(&mut world);
}

/// A handshake that is not answered ends after `connect-int` and begins anew.
#[test]
fn a_handshake_into_silence_is_tried_again() {
    let mut options = Options::new(50);
    options.net.connect_int_ms = 2000;
    let mut world = pair_with(options);
    world.cut(true);
    pass(&mut world, 200);
    world.net.down = false;
    world.drop_filter = None;
    world.cut(false);
    within(&mut world, 1000, |w| w.nodes[0].session.is_some());
    deaf(&mut world, 0, true);
    deaf(&mut world, 1, true);
    pass(&mut world, 1500);
    assert!(waits_for(&world, 0, &["n1"]), "{:?}", status(&world, 0).waiting_for);
    let handshaking = conn(&world, 0) == ConnState::Connecting;
    pass(&mut world, 15_000);
    assert_ne!(conn(&world, 0), ConnState::Connected);
    assert_ne!(conn(&world, 0), ConnState::StandAlone);
    world.heal();
    quiet(&mut world);
    assert!(handshaking, "the link went silent too late for this story");
}

/// A link that drips: everything arrives, slowly. Nobody is dropped for that, under any protocol.
#[test]
fn a_link_that_drips_is_not_a_dead_one() {
    for (seed, protocol) in (60..).zip([Protocol::A, Protocol::B, Protocol::C]) {
        let mut options = lossy(seed, 1000, 500);
        options.net.protocol = protocol;
        let mut world = pair_with(options);
        // 4 ms for a sector: 128 KiB/s. The largest frame takes eight seconds.
        world.options.weather.drip_ns = 4 * MS;
        world.request(0, RequestOp::Write, 0, 2048, false);
        load(&mut world, 0, 10);
        let began = world.now;
        while open(&world, 0) > 0 && world.now - began < 60_000 * MS {
            // What the runtime says when a part of a frame has come.
            world.run(100);
            if let Some(session) = world.nodes[1].session {
                world.feed(1, Input::PeerAlive(session));
            }
        }
        assert_eq!((open(&world, 0), world.broken.clone()), (0, None));
        let lost =
            |event: &Event| matches!(event, Event::Note(_, text) if text.contains("dropping the connection"));
        // The node that only waits for the answers of the slow one may ask; it hears them.
        let dropped_by_1 = world.log.iter().any(|(_, node, event)| *node == 1 && lost(event));
        assert!(!dropped_by_1, "dropped in the middle of a frame");
        world.options.weather.drip_ns = 0;
        quiet(&mut world);
    }
}

/// What an old transport still says, or a second one that comes up beside it, changes nothing.
#[test]
fn signs_of_life_of_another_transport_do_not_count() {
    let mut world = pair_with(lossy(70, 1000, 500));
    deaf(&mut world, 0, true);
    deaf(&mut world, 1, true);
    let began = world.now;
    let stranger = world.ids.session();
    while conn(&world, 0) == ConnState::Connected && world.now - began < 10_000 * MS {
        world.run(100);
        world.feed(0, Input::PeerAlive(stranger));
        world.duplicate_connect(0);
    }
    assert!((world.now - began) / MS <= 1700);
    world.heal();
    quiet(&mut world);
    assert_eq!(world.state(0).unwrap().1, DiskState::UpToDate);
    assert_eq!(verb(&mut world, 0, "primary", AdminCommand::Primary { force: false }), Ok(()));
}

/// I6 across sessions: no barrier stands between the last write of a lost session and the first of the next one, so
/// the receiving disk is flushed before its node is met again. Otherwise a loss of power could keep the later
/// one and forget the earlier one, which was answered before the later one was issued.
#[test]
fn what_a_lost_session_wrote_is_stable_before_the_nodes_meet_again() {
    let mut world = pair_with(Options::new(77));
    quiet(&mut world);
    world.request(0, RequestOp::Write, 800, 8, false);
    within(&mut world, 1000, |w| open(w, 0) == 0);
    world.cut(false);
    let volatile = |w: &World| w.nodes[1].disks[0].volatile().has(100);
    assert!(volatile(&world), "nothing was at stake");
    within(&mut world, 10_000, |w| w.state(1).is_some_and(|s| s.2 < ConnState::Connected));
    within(&mut world, 10_000, |w| w.state(1).is_some_and(|s| s.2 == ConnState::Connected));
    assert!(!volatile(&world), "the nodes have met, and a write of the time before is in the cache only");
    quiet(&mut world);
}
