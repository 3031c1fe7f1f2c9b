//! Becoming Primary at bad moments: on both nodes at once, during a handshake, an attach, a metadata write.
use lockstep_replicator::core::event::{AdminCommand, RequestOp};
use lockstep_replicator::core::state::{ConnState, DiskState, ReplState, Role};
use lockstep_tests::sim::node::VOLUME;
use lockstep_tests::sim::{Options, World};

const CONNECT: AdminCommand = AdminCommand::Connect { discard_my_data: false, tentative: false };

const fn primary(force: bool) -> AdminCommand {
    AdminCommand::Primary { force }
}

#[track_caller]
fn ok(world: &mut World, ms: u64, done: impl FnMut(&World) -> bool) {
    let held = world.run_until(ms, done);
    assert_eq!(world.broken, None);
    assert!(held, "not within {ms} ms: {:?} {:?}", world.state(0), world.state(1));
}

#[track_caller]
fn quiet(world: &mut World) {
    ok(world, 20_000, |w| w.in_sync() && w.idle());
    world.check_quiet();
    world.check_content(0);
    world.check_content(1);
    assert_eq!(world.broken, None);
}

fn met(seed: u64) -> World {
    let mut world = World::new(Options::new(seed));
    world.start(0);
    world.start(1);
    ok(&mut world, 1000, |w| (0..2).all(|n| w.state(n).is_some_and(|s| s.2 == ConnState::Connected)));
    world
}

/// In sync; node 0 is Primary if `primary_here`.
fn pair(seed: u64, primary_here: bool) -> World {
    let mut world = met(seed);
    world.admin(0, "primary-force", primary(true));
    ok(&mut world, 10_000, |w| w.in_sync() && w.is_primary(0) && w.idle());
    if !primary_here {
        world.admin(0, "secondary", AdminCommand::Secondary);
        ok(&mut world, 1000, |w| !w.is_primary(0) && w.idle());
    }
    world
}

/// Waits for both answers; who won.
#[track_caller]
fn answers(world: &mut World, ids: [u64; 2]) -> Vec<usize> {
    ok(world, 30_000, |w| (0..2).all(|node| w.nodes[node].answers.contains_key(&ids[node])));
    let mut winners = Vec::new();
    for (node, id) in ids.iter().enumerate() {
        match &world.nodes[node].answers[id] {
            Ok(()) => winners.push(node),
            Err(refusal) => {
                assert!([-1, -2].contains(&refusal.number), "n{node}: {refusal:?}");
                assert!(!refusal.facts.is_empty() && !refusal.advice.is_empty(), "n{node}: {refusal:?}");
            }
        }
    }
    winners
}

#[track_caller]
fn one_primary(world: &mut World, winners: &[usize]) {
    // Word of it is on its way to the other node.
    world.run(50);
    assert_eq!(winners.len(), 1, "{:?} {:?}", world.state(0), world.state(1));
    for node in 0..2 {
        assert_eq!(world.is_primary(node), winners == [node]);
    }
    let seen = world.status(1 - winners[0]).map(|status| status.connection.peer_role);
    assert_eq!(seen, Some(Role::Primary), "the loser knows who won");
}

#[test]
fn forced_on_both_nodes_of_a_fresh_pair_at_once() {
    for delay in 0..40 {
        let mut world = met(300 + delay);
        let first = usize::try_from(delay % 2).unwrap();
        let a = world.admin(first, "primary-force", primary(true));
        let end = world.now + delay * 25_000;
        while world.step(end) {}
        let b = world.admin(1 - first, "primary-force", primary(true));
        let ids = if first == 0 { [a, b] } else { [b, a] };
        let winners = answers(&mut world, ids);
        one_primary(&mut world, &winners);
        quiet(&mut world);
    }
}

#[test]
fn on_both_nodes_in_sync_at_once() {
    for delay in 0..40 {
        let mut world = pair(400 + delay, false);
        let first = usize::try_from(delay % 2).unwrap();
        let a = world.admin(first, "primary", primary(false));
        let end = world.now + delay * 25_000;
        while world.step(end) {}
        let b = world.admin(1 - first, "primary", primary(false));
        let ids = if first == 0 { [a, b] } else { [b, a] };
        let winners = answers(&mut world, ids);
        one_primary(&mut world, &winners);
        world.request(winners[0], RequestOp::Write, 0, 64, false);
        quiet(&mut world);
    }
}

#[test]
fn at_any_moment_of_a_handshake_on_either_or_both_nodes() {
    for who in [vec![0], vec![1], vec![0, 1]] {
        for steps in 0..24 {
            let mut world = pair(500 + steps, false);
            world.cut(false);
            ok(&mut world, 5000, |w| {
                (0..2).all(|n| w.state(n).is_some_and(|s| s.2 == ConnState::Connecting))
            });
            ok(&mut world, 5000, |w| (0..2).all(|n| w.nodes[n].session.is_some()));
            for _ in 0..steps {
                world.step(u64::MAX / 2);
            }
            let ids: Vec<_> = who.iter().map(|node| world.admin(*node, "primary", primary(false))).collect();
            ok(&mut world, 30_000, |w| {
                who.iter().zip(&ids).all(|(node, id)| w.nodes[*node].answers.contains_key(id))
            });
            let winners: Vec<_> = (0..2).filter(|node| world.is_primary(*node)).collect();
            assert_eq!(winners.len(), 1, "{who:?} after {steps} steps");
            quiet(&mut world);
            one_primary(&mut world, &winners);
        }
    }
}

#[test]
fn while_a_disk_is_being_attached_at_any_of_its_metadata_writes() {
    // `attacher` gets its disk back while connected; `promoted` becomes Primary meanwhile and writes.
    for attacher in 0..2 {
        for promoted in 0..2 {
            for steps in 0..30 {
                let mut world = pair(600 + steps, false);
                world.admin(attacher, "detach", AdminCommand::Detach { volume: VOLUME, force: false });
                ok(&mut world, 1000, |w| {
                    w.idle() && w.state(attacher).is_some_and(|s| s.1 == DiskState::Diskless)
                });
                world.attach(attacher);
                for _ in 0..steps {
                    world.step(u64::MAX / 2);
                }
                let id = world.admin(promoted, "primary", primary(false));
                ok(&mut world, 30_000, |w| w.nodes[promoted].answers.contains_key(&id));
                assert_eq!(world.nodes[promoted].answers[&id], Ok(()), "{attacher} {promoted} {steps}");
                for start in 0..4 {
                    world.request(promoted, RequestOp::Write, start * 4096, 24, false);
                }
                quiet(&mut world);
                assert!(world.is_primary(promoted));
            }
        }
    }
}

#[test]
fn what_a_primary_wrote_while_the_peer_attached_is_newer_than_that_disk() {
    // The peer's disk comes back while this node becomes Primary and writes; then the peer goes on alone.
    for steps in 0..30 {
        let mut world = pair(700 + steps, false);
        world.admin(1, "detach", AdminCommand::Detach { volume: VOLUME, force: false });
        ok(&mut world, 1000, |w| w.idle() && w.state(1).is_some_and(|s| s.1 == DiskState::Diskless));
        let id = world.admin(1, "primary", primary(false));
        ok(&mut world, 1000, |w| w.nodes[1].answers.contains_key(&id));
        world.attach(1);
        for _ in 0..steps {
            world.step(u64::MAX / 2);
        }
        world.request(1, RequestOp::Write, 8192, 64, false);
        let end = world.now + steps * 100_000;
        while world.step(end) {}
        world.crash(1, true);
        world.history.weaken(true);
        world.run(50);
        world.start(1);
        quiet(&mut world);
    }
}

#[test]
fn while_a_metadata_write_is_on_its_way() {
    for steps in 0..12 {
        let mut world = pair(800 + steps, true);
        world.request(0, RequestOp::Write, 0, 64, false);
        world.cut(true);
        for _ in 0..steps {
            world.step(u64::MAX / 2);
        }
        // The old Primary dies with its new generation on the way to the disk; the other takes over.
        world.crash(0, steps % 2 == 0);
        let id = world.admin(1, "primary", primary(false));
        ok(&mut world, 10_000, |w| w.nodes[1].answers.contains_key(&id));
        assert_eq!(world.nodes[1].answers[&id], Ok(()));
        world.request(1, RequestOp::Write, 64, 64, false);
        world.run(50);
        world.heal();
        world.start(0);
        world.run_until(5000, |w| w.in_sync() && w.idle());
        // Either the new generation had reached the disk, then both went on, or it is as if it never was.
        let apart = (0..2).all(|n| world.state(n).is_some_and(|s| s.2 == ConnState::StandAlone));
        if apart {
            assert_ne!(
                world.nodes[0].disks[0].meta.superblock().map_or(0, |found| found.uuid[1]),
                0,
                "refused without a generation of its own"
            );
            world.check_data = false;
            world.admin(0, "connect", AdminCommand::Connect { discard_my_data: true, tentative: false });
            world.admin(1, "connect", CONNECT);
        }
        ok(&mut world, 20_000, |w| w.in_sync() && w.idle());
        world.check_quiet();
        assert_eq!(world.broken, None);
    }
}

#[test]
fn a_target_that_loses_power_still_knows_what_was_only_announced() {
    // Writes in the middle of the bitmap exchange are announced, not sent. The target makes the marks
    // durable before it starts, so a power loss at any of its metadata writes forgets none.
    for cut_at in 0..8 {
        let mut world = pair(900 + cut_at, true);
        world.cut(true);
        world.run(50);
        world.request(0, RequestOp::Write, 0, 64, false);
        world.run(50);
        world.heal();
        ok(&mut world, 5000, |w| w.state(0).is_some_and(|s| s.3 == ReplState::WFBitMapS));
        for start in 1..9 {
            world.request(0, RequestOp::Write, start * 4096, 16, false);
        }
        world.crash_at_meta = Some((1, cut_at, true));
        world.run(100);
        world.crash_at_meta = None;
        world.crash(1, true);
        world.run(20);
        // The source forgets, too, what it was told is done.
        world.crash(0, true);
        world.history.weaken(true);
        world.run(20);
        world.start(0);
        world.start(1);
        quiet(&mut world);
    }
}
