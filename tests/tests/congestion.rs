//! A peer that does not keep up (SEM §24): Ahead and Behind, the way back, and what may go wrong on it.
use lockstep_proto::Message;
use lockstep_replicator::core::config::{NetConfig, OnCongestion, Protocol};
use lockstep_replicator::core::event::{AdminCommand, Event, RequestOp};
use lockstep_replicator::core::state::{ConnState, DiskState, ReplState};
use lockstep_tests::sim::script::{
    detach, fail_writes, load, open, pair_with, pass, quiet, slow, status, superblock, verb, waits_for,
    within,
};
use lockstep_tests::sim::{Options, World};
use std::cell::Cell;
use std::rc::Rc;

fn narrow(seed: u64) -> Options {
    let mut options = Options::new(seed);
    options.net.protocol = Protocol::A;
    options.net.on_congestion = OnCongestion::PullAhead;
    options.net.congestion_fill_sectors = 400;
    options
}

fn repl(world: &World, node: usize) -> Option<ReplState> {
    world.state(node).map(|state| state.3)
}

/// So much load on so slow a link that node 0 pulls ahead.
fn pulled_ahead(options: Options) -> World {
    let mut world = pair_with(options);
    slow(&mut world, 1, 100);
    for _ in 0..20 {
        load(&mut world, 0, 5);
        world.run(1);
    }
    within(&mut world, 1000, |w| repl(w, 0) == Some(ReplState::Ahead));
    world
}

fn times_ahead(world: &World) -> usize {
    let ahead = |event: &Event| matches!(event, Event::Note(_, text) if text.contains("pulling ahead"));
    world.log.iter().filter(|(_, _, event)| ahead(event)).count()
}

#[test]
fn the_application_goes_on_and_the_peer_catches_up() {
    let mut world = pulled_ahead(narrow(1));
    load(&mut world, 0, 100);
    within(&mut world, 150, |w| open(w, 0) == 0);
    assert_eq!(repl(&world, 0), Some(ReplState::Ahead), "all that without the peer");
    assert!(status(&world, 0).connection.congested);
    assert!(waits_for(&world, 0, &["volume 0", "Behind"]), "{:?}", status(&world, 0).waiting_for);
    within(&mut world, 2000, |w| repl(w, 1) == Some(ReplState::Behind));
    assert_eq!(world.state(1).unwrap().1, DiskState::Outdated);
    let peer = || AdminCommand::Primary { force: false };
    assert!(verb(&mut world, 1, "primary", peer()).is_err(), "an old copy");
    slow(&mut world, 1, 0);
    within(&mut world, 20_000, World::in_sync);
    quiet(&mut world);
    assert_eq!((world.failed_requests, times_ahead(&world)), (0, 1));
    assert!(!status(&world, 0).connection.congested);
}

/// A peer that is Behind is old, and knows it when it is alone.
#[test]
fn a_peer_that_is_behind_is_not_promoted_alone() {
    let mut world = pulled_ahead(narrow(10));
    within(&mut world, 2000, |w| repl(w, 1) == Some(ReplState::Behind));
    pass(&mut world, 300);
    world.crash(0, false);
    pass(&mut world, 500);
    let refused = verb(&mut world, 1, "primary", AdminCommand::Primary { force: false });
    assert_eq!(refused.map_err(|refused| refused.number), Err(-2));
    world.start(0);
    slow(&mut world, 1, 0);
    quiet(&mut world);
}

/// Both nodes stop, or one does, or the link ends, at any moment of the way there and back.
#[test]
fn any_end_at_any_moment() {
    for (victim, seed) in (0..90).map(|seed| (seed % 3, 100 + seed)) {
        let mut world = pair_with(narrow(seed));
        slow(&mut world, 1, 60);
        for _ in 0..15 {
            load(&mut world, 0, 5);
            world.run(1);
        }
        let until = world.rng.below(2500);
        pass(&mut world, until);
        load(&mut world, 0, 5);
        slow(&mut world, 1, 0);
        match victim {
            0 | 1 => {
                let power = seed % 2 == 0;
                world.crash(usize::try_from(victim).unwrap(), power);
                if power {
                    world.history.weaken(true);
                }
                pass(&mut world, 100);
                world.start(usize::try_from(victim).unwrap());
            }
            _ => {
                world.cut(true);
                pass(&mut world, 50);
                load(&mut world, 0, 5);
                world.heal();
            }
        }
        quiet(&mut world);
    }
}

#[test]
fn the_connection_may_end_after_any_message_of_the_way_back() {
    let mut n = 0;
    loop {
        let mut world = pulled_ahead(narrow(300));
        slow(&mut world, 1, 5);
        within(&mut world, 2000, |w| repl(w, 1) == Some(ReplState::Behind));
        world.cut_after = Some(world.delivered + n);
        load(&mut world, 0, 2);
        pass(&mut world, 4000);
        let through = world.cut_after.is_some();
        world.cut_after = None;
        quiet(&mut world);
        if through {
            break;
        }
        n += 3;
    }
    assert!(n > 30, "{n}");
}

/// Days of flapping: a link that is always too slow is left alone longer and longer.
#[test]
fn a_link_that_is_too_slow_does_not_flap() {
    let mut world = pair_with(narrow(400));
    slow(&mut world, 1, 60);
    for _ in 0..6000 {
        load(&mut world, 0, 12);
        world.run(100);
        assert_eq!(world.broken, None);
    }
    let times = times_ahead(&world);
    assert!((2..13).contains(&times), "{times} times in ten minutes");
    // The application rests: the pause is over, however long it was to be.
    within(&mut world, 60_000, World::in_sync);
    quiet(&mut world);
}

#[test]
fn extents_in_use_count_too() {
    let mut options = narrow(500);
    options.net.congestion_fill_sectors = 0;
    options.net.congestion_extents = 5;
    let mut world = pair_with(options);
    slow(&mut world, 1, 100);
    for extent in 0..8 {
        world.request(0, RequestOp::Write, extent * 8192, 8, false);
        world.run(1);
    }
    within(&mut world, 500, |w| repl(w, 0) == Some(ReplState::Ahead));
    slow(&mut world, 1, 0);
    quiet(&mut world);
}

#[test]
fn disconnect_ends_the_connection_until_a_person_comes() {
    let mut options = narrow(510);
    options.net.on_congestion = OnCongestion::Disconnect;
    let mut world = pair_with(options);
    slow(&mut world, 1, 100);
    load(&mut world, 0, 60);
    within(&mut world, 1000, |w| w.state(0).is_some_and(|s| s.2 == ConnState::StandAlone));
    within(&mut world, 1000, |w| open(w, 0) == 0);
    assert_eq!(world.failed_requests, 0);
    slow(&mut world, 1, 0);
    pass(&mut world, 500);
    let connect = AdminCommand::Connect { discard_my_data: false, tentative: false };
    assert_eq!(verb(&mut world, 0, "connect", connect), Ok(()));
    quiet(&mut world);
}

/// With `block`, or another protocol, nothing is ever left out.
#[test]
fn nothing_is_pulled_ahead_unless_asked_for() {
    for (policy, protocol) in [
        (OnCongestion::Block, Protocol::A),
        (OnCongestion::PullAhead, Protocol::C),
        (OnCongestion::Disconnect, Protocol::B),
    ] {
        let mut options = narrow(520);
        options.net.on_congestion = policy;
        options.net.protocol = protocol;
        let mut world = pair_with(options);
        slow(&mut world, 1, 100);
        load(&mut world, 0, 80);
        within(&mut world, 60_000, |w| open(w, 0) == 0);
        assert_eq!(repl(&world, 0), Some(ReplState::Established));
        slow(&mut world, 1, 0);
        quiet(&mut world);
    }
}

/// The only copy with the newest writes fails: the peer's older data is not shown.
#[test]
fn the_disk_fails_while_it_is_ahead() {
    let mut world = pulled_ahead(narrow(530));
    within(&mut world, 2000, |w| repl(w, 1) == Some(ReplState::Behind));
    load(&mut world, 0, 10);
    pass(&mut world, 100);
    fail_writes(&mut world, 0, 1);
    world.request(0, RequestOp::Write, 0, 8, false);
    pass(&mut world, 200);
    let good = world.good_requests;
    world.request(0, RequestOp::Read, 0, 64, false);
    pass(&mut world, 300);
    assert_eq!(world.good_requests, good, "read from a copy that is Behind");
    slow(&mut world, 1, 0);
    world.attach(0);
    quiet(&mut world);
}

/// A new generation, so that a peer promoted by force while it is Behind is not taken for the newer one.
#[test]
fn a_peer_promoted_by_force_is_a_split_brain() {
    let mut world = pair_with(narrow(540));
    let before = superblock(&world, 0).uuid[0];
    slow(&mut world, 1, 100);
    load(&mut world, 0, 60);
    within(&mut world, 2000, |w| repl(w, 1) == Some(ReplState::Behind));
    assert_ne!(superblock(&world, 0).uuid[0], before);
    world.crash(0, false);
    pass(&mut world, 500);
    assert_eq!(verb(&mut world, 1, "primary --force", AdminCommand::Primary { force: true }), Ok(()));
    load(&mut world, 1, 5);
    pass(&mut world, 100);
    world.start(0);
    pass(&mut world, 3000);
    assert!((0..2).any(|node| world.state(node).is_some_and(|s| s.2 == ConnState::StandAlone)));
    assert_eq!(world.broken, None);
}

#[test]
fn the_policy_needs_protocol_a() {
    let mut world = pair_with(Options::new(550));
    let net = NetConfig { on_congestion: OnCongestion::PullAhead, ..world.options.net.clone() };
    let volumes = vec![world.options.volume.clone()];
    let change = AdminCommand::Configure { net: Box::new(net), volumes };
    let refused = verb(&mut world, 0, "adjust", change).expect_err("protocol C");
    assert_eq!(refused.number, 155);
    assert!(refused.facts[0].contains("protocol C") && refused.advice.contains("protocol A"));
    quiet(&mut world);
}

/// The disk of a node that is Ahead fails, and an IO keeps it from leaving: what it says meanwhile does not
/// make its peer think that the disk is good.
#[test]
fn a_node_that_is_ahead_loses_its_disk() {
    let mut world = pulled_ahead(narrow(30));
    within(&mut world, 2000, |w| repl(w, 1) == Some(ReplState::Behind) && open(w, 0) == 0);
    world.nodes[0].disks[0].faults.stick = Some(1_000_000_000);
    world.request(0, RequestOp::Write, 0, 8, false);
    fail_writes(&mut world, 0, 2);
    world.request(0, RequestOp::Write, 80, 8, false);
    pass(&mut world, 300);
    assert_eq!(world.state(0).unwrap().1, DiskState::Failed);
    let peer_disk = status(&world, 1).connection.peer_volumes[0].peer_disk;
    assert_eq!((repl(&world, 1), peer_disk), (Some(ReplState::Established), DiskState::Failed));
    slow(&mut world, 1, 0);
    within(&mut world, 5000, |w| w.state(0).unwrap().1 == DiskState::Diskless && open(w, 0) == 0);
    fail_writes(&mut world, 0, 0);
    world.attach(0);
    quiet(&mut world);
}

/// A Primary that got its disk back is in sync before its source has heard of it, and pulls ahead in that moment.
#[test]
fn a_source_that_has_not_finished_hears_that_it_is_behind() {
    for seed in 0..10 {
        let mut world = pair_with(narrow(500 + seed));
        detach(&mut world, 0);
        load(&mut world, 0, 20);
        within(&mut world, 2000, |w| open(w, 0) == 0);
        world.attach(0);
        within(&mut world, 2000, |w| repl(w, 0) == Some(ReplState::SyncTarget));
        within(&mut world, 2000, |w| repl(w, 0) == Some(ReplState::Established));
        assert_eq!(repl(&world, 1), Some(ReplState::SyncSource), "seed {seed}");
        // The source makes its empty bitmap durable.
        world.nodes[1].disks[0].faults.stick = Some(200_000_000);
        load(&mut world, 0, 100);
        let told = Rc::new(Cell::new(false));
        let hears = Rc::clone(&told);
        world.net.tamper = Some(Box::new(move |to, message, _| {
            let ahead = matches!(message, Message::State(state) if state.volumes[0].ahead);
            hears.set(hears.get() || to == 1 && ahead);
            false
        }));
        within(&mut world, 1000, |_| told.get());
        // It is done with that before the first note comes.
        while repl(&world, 1) == Some(ReplState::SyncSource) {
            let disk = world.choices().into_iter().find(|choice| choice.node == 1 && !choice.message);
            world.choose(disk.expect("its disk answers"));
        }
        within(&mut world, 20_000, World::in_sync);
        quiet(&mut world);
    }
}
