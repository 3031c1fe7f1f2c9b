//! A Primary whose own disk is not good, or is about to go: what was acknowledged is on the other copy,
//! stable, or the application is not shown that copy without a word.
use lockstep_replicator::core::config::Protocol;
use lockstep_replicator::core::event::{AdminCommand, Event, RequestOp};
use lockstep_replicator::core::policy::{Obstacle, Outcome};
use lockstep_replicator::core::state::{ConnState, DiskState};
use lockstep_tests::sim::node::VOLUME;
use lockstep_tests::sim::script::{
    deaf, detach, disk, fail_metas, load, open, pair_by, pair_with, pass, quiet, slow, verb, within,
};
use lockstep_tests::sim::{Options, World};

const CONNECT: AdminCommand = AdminCommand::Connect { discard_my_data: false, tentative: false };

/// Writes and waits for the answer; the number that the sectors hold then.
fn write(world: &mut World, start: u64) -> u32 {
    let failed = world.failed_requests;
    world.request(0, RequestOp::Write, start, 8, false);
    within(world, 2000, |w| open(w, 0) == 0);
    assert_eq!(world.failed_requests, failed, "the write is good");
    (1..).take_while(|number| world.history.record(*number).is_some()).last().unwrap_or(0)
}

/// What the application reads there; the oracle judges it as well.
fn read(world: &mut World, start: u64) {
    let failed = world.failed_requests;
    world.request(0, RequestOp::Read, start, 8, false);
    within(world, 2000, |w| open(w, 0) == 0);
    assert_eq!(world.failed_requests, failed, "the read is good");
}

fn refusals(world: &World) -> usize {
    let lost = |event: &Event| {
        matches!(event, Event::Handshake(decision)
            if decision.decided.outcome == Outcome::Refuse(Obstacle::NotTheDataLostLast))
    };
    world.log.iter().filter(|(_, _, event)| lost(event)).count()
}

#[test]
fn what_only_the_peer_has_is_stable_there_when_it_is_acknowledged() {
    for protocol in [Protocol::A, Protocol::B, Protocol::C] {
        for seed in 0..10 {
            let mut world = pair_by(7000 + seed, protocol);
            detach(&mut world, 0);
            let at = usize::try_from(8 * seed).unwrap();
            for round in 0..5 {
                let number = write(&mut world, 8 * seed);
                let stable = &world.nodes[1].disks[0].stable_sectors()[at..at + 8];
                assert_eq!(stable, [number; 8], "{protocol:?} seed {seed} round {round}");
            }
            // So a loss of power there takes nothing from a Primary that lives on.
            world.crash(1, true);
            pass(&mut world, 100);
            world.start(1);
            within(&mut world, 15_000, |w| w.state(0).is_some_and(|s| s.2 == ConnState::Connected));
            read(&mut world, 8 * seed);
            world.attach(0);
            quiet(&mut world);
        }
    }
}

#[test]
fn many_writes_share_a_barrier_when_only_the_peer_has_them() {
    let mut world = pair_by(7100, Protocol::C);
    detach(&mut world, 0);
    let before = world.delivered;
    load(&mut world, 0, 64);
    within(&mut world, 2000, |w| open(w, 0) == 0);
    // Data and its answer each; a barrier and its ack for each would be as much again.
    let messages = world.delivered - before;
    assert!(messages < 64 * 3, "{messages} messages for 64 writes");
}

#[test]
fn a_detach_is_called_off_when_the_peer_goes_meanwhile() {
    for protocol in [Protocol::A, Protocol::C] {
        for seed in 0..10 {
            let mut world = pair_by(7200 + seed, protocol);
            // A write that takes its time keeps the detach waiting.
            world.nodes[0].disks[0].faults.stick = Some(500_000_000);
            world.request(0, RequestOp::Write, 800, 8, false);
            let id = world.admin(0, "detach", AdminCommand::Detach { volume: VOLUME, force: false });
            pass(&mut world, 100);
            assert_eq!(disk(&world, 0), DiskState::Detaching);
            world.cut(true);
            within(&mut world, 1000, |w| w.nodes[0].answers.contains_key(&id));
            let refused = world.nodes[0].answers[&id].clone().unwrap_err();
            assert_eq!(refused.number, -2, "{refused:?}");
            assert!(!refused.facts.is_empty() && !refused.advice.is_empty());
            assert_eq!(disk(&world, 0), DiskState::UpToDate, "{protocol:?} seed {seed}");
            within(&mut world, 2000, |w| open(w, 0) == 0);
            write(&mut world, 0);
            read(&mut world, 0);
            assert_eq!(world.failed_requests, 0, "nothing failed");
            // And no split brain: the peer's generation of the detach is known.
            world.heal();
            quiet(&mut world);
        }
    }
}

/// A second Primary goes on without the disk that leaves: what it writes is told done and is nowhere else. If it dies then,
/// the disk does not stay as the last good copy, and the second one's is taken when it is back.
#[test]
fn a_detach_is_not_called_off_beside_a_second_primary() {
    for seed in 0..10 {
        let mut options = Options::new(7250 + seed);
        options.net.allow_two_primaries = true;
        let mut world = pair_with(options);
        assert_eq!(verb(&mut world, 1, "primary", AdminCommand::Primary { force: false }), Ok(()));
        // A write that takes its time keeps the detach waiting.
        world.nodes[0].disks[0].faults.stick = Some(500_000_000);
        world.request(0, RequestOp::Write, 800, 8, false);
        world.admin(0, "detach", AdminCommand::Detach { volume: VOLUME, force: false });
        pass(&mut world, 100);
        assert_eq!(disk(&world, 0), DiskState::Detaching);
        world.request(1, RequestOp::Write, 1600, 8, false);
        within(&mut world, 100, |w| open(w, 1) == 0);
        world.crash(1, false);
        pass(&mut world, 2000);
        assert_ne!(disk(&world, 0), DiskState::UpToDate, "an answered write is missing in it");
        world.start(1);
        within(&mut world, 5000, |w| w.state(0).is_some_and(|s| s.2 == ConnState::Connected));
        world.attach(0);
        quiet(&mut world);
    }
}

#[test]
fn a_primary_without_its_disk_refuses_a_peer_that_never_got_what_was_acknowledged() {
    let mut world = pair_by(7300, Protocol::A);
    deaf(&mut world, 1, true);
    write(&mut world, 64);
    let forced = verb(&mut world, 0, "detach", AdminCommand::Detach { volume: VOLUME, force: true });
    assert_eq!(forced, Ok(()));
    world.cut(true);
    deaf(&mut world, 1, false);
    pass(&mut world, 1000);
    world.heal();
    within(&mut world, 5000, |w| (0..2).all(|n| w.state(n).is_some_and(|s| s.2 == ConnState::StandAlone)));
    assert!(refusals(&world) >= 2, "both nodes say why");
    // Its own disk has it.
    world.attach(0);
    within(&mut world, 2000, |w| disk(w, 0) == DiskState::UpToDate);
    read(&mut world, 64);
    for node in 0..2 {
        assert_eq!(verb(&mut world, node, "connect", CONNECT), Ok(()));
    }
    quiet(&mut world);
}

#[test]
fn a_generation_that_never_became_durable_was_shown_to_nobody() {
    for seed in 0..10 {
        let mut world = pair_by(7400 + seed, Protocol::C);
        write(&mut world, 64);
        fail_metas(&mut world, 0, 1);
        world.cut(false);
        within(&mut world, 2000, |w| disk(w, 0) == DiskState::Diskless);
        within(&mut world, 5000, |w| w.state(0).is_some_and(|s| s.2 == ConnState::Connected));
        assert_eq!(refusals(&world), 0);
        read(&mut world, 64);
        world.attach(0);
        quiet(&mut world);
    }
}

/// Under A and B a write is acknowledged before the peer has it on its disk. When the own disk goes then, a
/// read goes there, and waits for it.
#[test]
fn a_read_from_the_peer_waits_for_the_writes_sent_before_it() {
    for protocol in [Protocol::A, Protocol::B] {
        for force in [true, false] {
            let mut world = pair_by(7500, protocol);
            write(&mut world, 64);
            pass(&mut world, 50);
            world.nodes[1].disks[0].faults.stick = Some(500_000_000);
            write(&mut world, 64);
            world.admin(0, "detach", AdminCommand::Detach { volume: VOLUME, force });
            pass(&mut world, 1);
            assert_ne!(disk(&world, 0), DiskState::UpToDate);
            read(&mut world, 64);
            within(&mut world, 2000, |w| disk(w, 0) == DiskState::Diskless);
            world.attach(0);
            quiet(&mut world);
        }
    }
}

/// Only the peer has it on stable storage, and does not know yet that it counts: if both stopped, the disk
/// that lost it would be believed.
#[test]
fn a_flush_that_failed_here_is_done_when_the_peer_knows_that_its_copy_counts() {
    for seed in 0..30 {
        let mut world = pair_by(7600 + seed, Protocol::C);
        write(&mut world, 64);
        pass(&mut world, 50);
        world.nodes[0].disks[0].faults.flushes = 1;
        world.flush(0);
        within(&mut world, 2000, |w| open(w, 0) == 0);
        assert_eq!(world.failed_requests, 0);
        (0..2).for_each(|node| world.crash(node, true));
        (0..2).for_each(|node| world.start(node));
        quiet(&mut world);
    }
}

#[test]
fn a_flush_that_comes_while_the_disk_leaves_is_done_when_the_peer_knows_that_its_copy_counts() {
    for seed in 0..30 {
        let mut world = pair_by(7700 + seed, Protocol::C);
        write(&mut world, 64);
        pass(&mut world, 50);
        slow(&mut world, 1, 50);
        world.admin(0, "detach", AdminCommand::Detach { volume: VOLUME, force: false });
        world.flush(0);
        within(&mut world, 2000, |w| open(w, 0) == 0);
        assert_eq!(world.failed_requests, 0);
        (0..2).for_each(|node| world.crash(node, true));
        slow(&mut world, 1, 0);
        (0..2).for_each(|node| world.start(node));
        quiet(&mut world);
    }
}

/// The disk stays: the flush is its business again.
#[test]
fn a_flush_outlives_a_detach_that_is_called_off() {
    for seed in 0..20 {
        let mut world = pair_by(7800 + seed, Protocol::C);
        write(&mut world, 64);
        world.nodes[0].disks[0].faults.stick = Some(500_000_000);
        world.request(0, RequestOp::Write, 800, 8, false);
        let id = world.admin(0, "detach", AdminCommand::Detach { volume: VOLUME, force: false });
        within(&mut world, 1000, |w| {
            w.state(1).is_some_and(|s| s.1 == DiskState::UpToDate) && disk(w, 0) == DiskState::Detaching
        });
        pass(&mut world, 20);
        // The barrier of a write that only the peer gets keeps the flush waiting.
        world.nodes[1].disks[0].faults.stuck_flushes = true;
        world.request(0, RequestOp::Write, 1600, 8, false);
        world.flush(0);
        pass(&mut world, 20);
        assert_eq!(open(&world, 0), 3, "seed {seed}");
        world.crash(1, true);
        world.nodes[1].disks[0].faults.stuck_flushes = false;
        within(&mut world, 2000, |w| w.nodes[0].answers.contains_key(&id) && open(w, 0) == 0);
        assert_eq!((world.failed_requests, disk(&world, 0)), (0, DiskState::UpToDate), "seed {seed}");
        world.crash(0, true);
        (0..2).for_each(|node| world.start(node));
        quiet(&mut world);
    }
}

/// The last copy loses its cache after this Primary gave its own disk up: it is not shown as if nothing were.
#[test]
fn a_last_copy_whose_flush_failed_is_not_taken_back() {
    for seed in 0..20 {
        let mut world = pair_by(7900 + seed, Protocol::C);
        world.nodes[1].disks[0].faults.flushes = 1;
        write(&mut world, 64);
        let forced = verb(&mut world, 0, "detach", AdminCommand::Detach { volume: VOLUME, force: true });
        assert_eq!(forced, Ok(()));
        within(&mut world, 2000, |w| disk(w, 1) == DiskState::Diskless);
        world.crash(1, true);
        pass(&mut world, 100);
        world.start(1);
        within(&mut world, 5000, |w| {
            (0..2).all(|n| w.state(n).is_some_and(|s| s.2 == ConnState::StandAlone))
        });
        assert!(refusals(&world) >= 2, "both nodes say why");
    }
}

/// The own disk lost what a failed flush should have kept, and the peer went on with it.
#[test]
fn a_disk_whose_flush_failed_is_not_shown_to_the_application_again() {
    let mut world = pair_by(8000, Protocol::C);
    write(&mut world, 64);
    world.nodes[0].disks[0].faults.flushes = 1;
    world.flush(0);
    within(&mut world, 2000, |w| open(w, 0) == 0 && disk(w, 0) == DiskState::Diskless);
    assert_eq!(world.failed_requests, 0);
    world.cut(true);
    pass(&mut world, 100);
    let id = world.attach(0);
    within(&mut world, 2000, |w| w.nodes[0].answers.contains_key(&id));
    assert_eq!(world.nodes[0].answers[&id].as_ref().unwrap_err().number, 150);
    world.heal();
    within(&mut world, 5000, |w| w.state(0).is_some_and(|s| s.2 == ConnState::Connected));
    world.attach(0);
    quiet(&mut world);
}

#[test]
fn a_disk_lost_before_the_new_generation_was_durable_may_have_had_more_than_the_peer() {
    for protocol in [Protocol::A, Protocol::C] {
        for seed in 0..10 {
            let mut world = pair_by(7900 + seed, protocol);
            let told;
            if protocol == Protocol::A {
                // On its way when the peer stops.
                deaf(&mut world, 1, true);
                told = write(&mut world, 64);
                deaf(&mut world, 1, false);
                world.crash(1, false);
            } else {
                // In the peer's cache when its power goes.
                world.nodes[1].disks[0].faults.stuck_flushes = true;
                told = write(&mut world, 64);
                world.crash(1, true);
                world.nodes[1].disks[0].faults.stuck_flushes = false;
            }
            // The first thing this node would have said under another name, if its disk had taken it.
            fail_metas(&mut world, 0, 1);
            within(&mut world, 60_000, |w| disk(w, 0) == DiskState::Diskless);
            world.start(1);
            let apart = |w: &World| (0..2).all(|n| w.state(n).is_some_and(|s| s.2 == ConnState::StandAlone));
            within(&mut world, 20_000, apart);
            assert!(refusals(&world) >= 2, "{protocol:?} seed {seed}: both nodes say why");
            world.attach(0);
            within(&mut world, 2000, |w| disk(w, 0) == DiskState::UpToDate);
            read(&mut world, 64);
            assert_eq!(world.nodes[0].disks[0].sectors()[64], told, "{protocol:?} seed {seed}");
            for node in 0..2 {
                assert_eq!(verb(&mut world, node, "connect", CONNECT), Ok(()));
            }
            quiet(&mut world);
        }
    }
}

/// A Primary without a disk goes on from its peer's copy; when it stops, its own disk is what it was before, and
/// may be taken back alone. It is the older one, which the other copy's marks say, and owes nothing of what was written
/// meanwhile. Simulator, `--features resize --seed 1161`.
#[test]
fn a_disk_that_was_away_is_the_older_copy_after_its_node_served_the_other_one() {
    for seed in 0..10 {
        let mut world = pair_by(8100 + seed, Protocol::C);
        let before = write(&mut world, 64);
        quiet(&mut world);
        detach(&mut world, 1);
        let after = write(&mut world, 64);
        world.flush(0);
        within(&mut world, 2000, |w| open(w, 0) == 0);
        assert_eq!(verb(&mut world, 0, "secondary", AdminCommand::Secondary), Ok(()));
        assert_eq!(verb(&mut world, 1, "primary", AdminCommand::Primary { force: false }), Ok(()));
        world.crash(0, seed % 2 == 0);
        world.crash(1, true);
        world.start(1);
        within(&mut world, 2000, |w| disk(w, 1) == DiskState::UpToDate);
        assert_eq!(world.nodes[1].disks[0].sectors()[64], before);
        world.crash(1, true);
        assert_eq!(world.broken, None, "seed {seed}");
        world.start(0);
        world.start(1);
        quiet(&mut world);
        assert_eq!(world.nodes[1].disks[0].sectors()[64], after, "seed {seed}");
    }
}
