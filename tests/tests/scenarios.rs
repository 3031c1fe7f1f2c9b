//! Named stories, each with the same two cores and the same simulated disks.
use lockstep_replicator::core::event::{AdminCommand, Event, RequestOp};
use lockstep_replicator::core::state::{ConnState, DiskState, ReplState, Role};
use lockstep_tests::sim::net::Cut;
use lockstep_tests::sim::node::VOLUME;
use lockstep_tests::sim::{Options, World};

/// A pair in sync, node 0 Primary.
fn pair(seed: u64) -> World {
    pair_with(Options::new(seed))
}

fn pair_with(options: Options) -> World {
    let mut world = World::new(options);
    world.start(0);
    world.start(1);
    ok(&mut world, 1000, |w| w.state(0).is_some_and(|s| s.2 == ConnState::Connected));
    world.admin(0, "primary-force", AdminCommand::Primary { force: true });
    ok(&mut world, 10_000, |w| w.in_sync() && w.is_primary(0) && w.idle());
    quiet(&mut world);
    world
}

fn ok(world: &mut World, ms: u64, done: impl FnMut(&World) -> bool) {
    let held = world.run_until(ms, done);
    assert_eq!(world.broken, None);
    assert!(held, "not within {ms} ms: {:?} {:?}", world.state(0), world.state(1));
}

fn quiet(world: &mut World) {
    ok(world, 20_000, |w| w.in_sync() && w.idle());
    world.check_quiet();
    world.check_content(0);
    world.check_content(1);
    assert_eq!(world.broken, None);
}

fn load(world: &mut World, node: usize, writes: u64) {
    for _ in 0..writes {
        let start = world.rng.below(world.options.sectors / 8 - 8) * 8;
        let len = 8 * (1 + world.rng.below(4));
        world.request(node, RequestOp::Write, start, len, false);
    }
}

fn answer(world: &mut World, node: usize, name: &'static str, command: AdminCommand) -> bool {
    let id = world.admin(node, name, command);
    ok(world, 20_000, |w| w.nodes[node].answers.contains_key(&id));
    world.nodes[node].answers[&id].is_ok()
}

fn resynced_bits(world: &World) -> u64 {
    let bits = world.log.iter().rev().find_map(|(_, _, event)| match event {
        Event::ResyncDone { bits_total, .. } => Some(*bits_total),
        _ => None,
    });
    bits.unwrap_or(0)
}

#[test]
fn a_secondary_that_was_away_gets_only_what_changed() {
    let mut world = pair(1);
    world.crash(1, false);
    world.run(100);
    world.request(0, RequestOp::Write, 4096, 64, false);
    world.run(100);
    world.start(1);
    quiet(&mut world);
    assert_eq!(resynced_bits(&world), 8, "64 sectors are 8 blocks of 4 KiB");
}

#[test]
fn a_crashed_primary_comes_back_as_source_of_its_hot_extents() {
    let mut world = pair(2);
    load(&mut world, 0, 40);
    world.run(1);
    world.crash(0, false);
    world.run(50);
    world.start(0);
    quiet(&mut world);
    assert!(answer(&mut world, 0, "primary", AdminCommand::Primary { force: false }));
}

#[test]
fn after_a_fail_over_the_old_primary_becomes_target() {
    let mut world = pair(3);
    load(&mut world, 0, 40);
    world.run(2);
    world.crash(0, false);
    world.run(50);
    assert!(answer(&mut world, 1, "primary", AdminCommand::Primary { force: false }));
    world.check_content(1);
    load(&mut world, 1, 10);
    world.run(50);
    world.start(0);
    quiet(&mut world);
    assert!(world.is_primary(1));
}

#[test]
fn ten_cuts_under_load() {
    let mut world = pair(4);
    for _ in 0..10 {
        load(&mut world, 0, 30);
        let pause = world.rng.below(12);
        world.run(pause);
        world.cut(false);
        world.run(40);
    }
    quiet(&mut world);
}

#[test]
fn a_resync_survives_the_death_of_either_side() {
    for victim in 0..2 {
        for after_ms in [1, 3, 5, 8, 13, 21] {
            let mut world = pair(100 + after_ms);
            world.cut(true);
            world.run(50);
            load(&mut world, 0, 200);
            world.run(100);
            world.heal();
            world.run_until(1000, |w| w.state(1).is_some_and(|s| s.3 == ReplState::SyncTarget));
            world.run(after_ms);
            world.crash(victim, true);
            world.history.weaken(true);
            world.run(30);
            world.start(victim);
            quiet(&mut world);
        }
    }
}

#[test]
fn the_connection_may_end_after_any_message() {
    // A scripted handshake and resync under load, cut after its n-th message.
    let mut n = 0;
    loop {
        let mut world = pair(5);
        world.cut(true);
        world.run(50);
        load(&mut world, 0, 12);
        world.run(100);
        world.cut_after = Some(world.delivered + n);
        world.heal();
        for _ in 0..10 {
            load(&mut world, 0, 1);
            world.run(3);
        }
        let reached = world.cut_after.is_none();
        world.cut_after = None;
        quiet(&mut world);
        if !reached {
            break;
        }
        n += 1;
        assert!(n < 2000, "the script does not end");
    }
    assert!(n > 40, "only {n} messages were cut");
}

#[test]
fn a_node_may_die_at_any_metadata_write() {
    for victim in 0..2 {
        let mut n = 0;
        loop {
            let mut world = pair(6 + n);
            world.crash_at_meta = Some((victim, n, false));
            load(&mut world, 0, 5);
            world.run(20);
            world.cut(true);
            world.run(30);
            load(&mut world, 0, 5);
            world.run(20);
            world.heal();
            world.run(200);
            let reached = world.crash_at_meta.is_none();
            world.crash_at_meta = None;
            world.heal();
            if world.nodes[victim].core.is_none() {
                world.start(victim);
            }
            quiet(&mut world);
            if !reached {
                break;
            }
            n += 1;
        }
        assert!(n > 5, "only {n} metadata writes");
    }
}

#[test]
fn the_end_of_a_resync_may_be_lost() {
    let mut world = pair(7);
    world.cut(true);
    world.run(50);
    load(&mut world, 0, 20);
    world.run(50);
    world.drop_filter = Some(|message| matches!(message, lockstep_proto::Message::ResyncFinished(_)));
    world.heal();
    quiet(&mut world);
    assert!(world.drop_filter.is_none());
}

#[test]
fn a_finished_target_that_is_promoted_does_not_hide_what_the_source_wrote_since() {
    let mut world = pair(8);
    world.cut(true);
    world.run(50);
    load(&mut world, 0, 20);
    world.run(50);
    world.drop_filter = Some(|message| matches!(message, lockstep_proto::Message::ResyncFinished(_)));
    world.heal();
    ok(&mut world, 5000, |w| w.drop_filter.is_none());
    world.cut(true);
    world.run(50);
    world.request(0, RequestOp::Write, 0, 8, true);
    world.run(50);
    assert!(answer(&mut world, 1, "primary", AdminCommand::Primary { force: false }));
    world.crash(1, false);
    world.crash(0, false);
    world.start(0);
    world.start(1);
    world.heal();
    world.run(500);
    for node in 0..2 {
        let state = world.state(node).unwrap();
        assert_eq!(
            (state.2, state.3),
            (ConnState::StandAlone, ReplState::Off),
            "split brain not detected on n{node}"
        );
    }
}

#[test]
fn detach_and_attach_of_a_primary_under_load() {
    let mut world = pair(9);
    load(&mut world, 0, 20);
    assert!(answer(&mut world, 0, "detach", AdminCommand::Detach { volume: VOLUME, force: false }));
    load(&mut world, 0, 60);
    let id = world.attach(0);
    for _ in 0..30 {
        load(&mut world, 0, 2);
        world.run(1);
    }
    assert!(world.nodes[0].answers.contains_key(&id));
    quiet(&mut world);
    assert_eq!(world.failed_requests, 0);
}

/// The peer begins a generation for a Primary whose disk leaves; the link ends before it can say so.
#[test]
fn what_a_primary_writes_to_a_disk_it_took_back_alone_is_not_overwritten() {
    for (after, power) in (0..6).flat_map(|after| [(after, false), (after, true)]) {
        let mut world = pair(90 + after);
        load(&mut world, 0, 3);
        world.net.cut_after_to[0] = Some(after);
        world.net.cut_how = Cut::Down;
        world.admin(0, "detach", AdminCommand::Detach { volume: VOLUME, force: false });
        world.run(100);
        world.cut(true);
        world.run(100);
        world.attach(0);
        world.run(50);
        let good = world.good_requests;
        world.request(0, RequestOp::Write, 0, 8, true);
        world.run(50);
        let acked = world.good_requests > good;
        world.crash(0, power);
        world.run(50);
        world.heal();
        world.start(0);
        world.run(3000);
        assert_eq!(world.broken, None);
        if acked {
            assert_ne!(world.nodes[0].disks[0].sectors()[..8], [0; 8], "cut after {after}");
        }
    }
}

#[test]
fn a_write_error_on_either_side_is_invisible_to_the_application() {
    for node in 0..2 {
        let mut world = pair(10);
        world.nodes[node].fail_writes = 1;
        load(&mut world, 0, 30);
        world.run(200);
        assert_eq!(world.failed_requests, 0);
        assert_eq!(world.state(node).unwrap().1, DiskState::Diskless);
        world.attach(node);
        quiet(&mut world);
    }
}

#[test]
fn a_failed_flush_costs_the_disk_not_the_data() {
    let mut world = pair(11);
    load(&mut world, 0, 10);
    world.nodes[0].fail_flushes = 1;
    world.flush(0);
    world.run(200);
    assert_eq!(world.failed_requests, 0);
    assert_eq!(world.state(0).unwrap().1, DiskState::Diskless);
    world.attach(0);
    quiet(&mut world);
}

#[test]
fn a_demotion_under_load_waits_and_leaves_nothing_hot() {
    let mut world = pair(12);
    load(&mut world, 0, 50);
    assert!(answer(&mut world, 0, "secondary", AdminCommand::Secondary));
    world.crash(0, true);
    world.start(0);
    quiet(&mut world);
    assert_eq!(world.state(0).unwrap().0, Role::Secondary);
}

#[test]
fn both_want_to_be_primary_at_once() {
    let mut world = pair(13);
    assert!(answer(&mut world, 0, "secondary", AdminCommand::Secondary));
    let ids = [0, 1].map(|n| world.admin(n, "primary", AdminCommand::Primary { force: false }));
    ok(&mut world, 2000, |w| (0..2).all(|n| w.nodes[n].answers.contains_key(&ids[n])));
    world.run(100);
    assert_ne!(world.is_primary(0), world.is_primary(1), "exactly one wins");
    quiet(&mut world);
}

#[test]
fn down_and_up_of_both() {
    let mut world = pair(14);
    load(&mut world, 0, 20);
    for node in 0..2 {
        assert!(answer(&mut world, node, "down", AdminCommand::Down));
        world.crash(node, true);
    }
    world.start(0);
    world.start(1);
    quiet(&mut world);
}
