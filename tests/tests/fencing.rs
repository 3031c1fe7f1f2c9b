//! Fencing: nothing goes on alone before the peer is known not to (SEM §16, §29.9; S46).
use lockstep_replicator::core::config::{AfterSb0Pri, AfterSb1Pri, Fencing};
use lockstep_replicator::core::event::{AdminCommand, HandlerName, RequestOp};
use lockstep_replicator::core::state::{ConnState, DiskState, ReplState, Role};
use lockstep_replicator::meta::flags;
use lockstep_tests::sim::script::{
    detach, handler_says, late_answer, load, open, pair_with, pass, quiet, runs, sectors, slow, status,
    superblock, verb, waits_for, within,
};
use lockstep_tests::sim::{Options, World};

const FENCE: HandlerName = HandlerName::FencePeer;
const PRIMARY: AdminCommand = AdminCommand::Primary { force: false };

fn fenced_pair(seed: u64, fencing: Fencing) -> World {
    let mut options = Options::new(seed);
    options.net.fencing = fencing;
    pair_with(options)
}

/// Node 0 has lost its peer, which is not fenced yet, with writes in the middle.
fn frozen(seed: u64) -> World {
    let mut world = fenced_pair(seed, Fencing::ResourceAndStonith);
    handler_says(&mut world, 0, FENCE, None);
    load(&mut world, 0, 20);
    let pause = seed % 4;
    world.run(pause);
    world.cut(true);
    within(&mut world, 1000, |w| w.state(0).is_some_and(|s| s.2 == ConnState::Connecting));
    load(&mut world, 0, 5);
    world.request(0, RequestOp::Read, 0, 8, false);
    world.flush(0);
    world
}

#[test]
fn without_fencing_nobody_is_asked() {
    let mut world = fenced_pair(8000, Fencing::DontCare);
    world.cut(true);
    pass(&mut world, 100);
    load(&mut world, 0, 5);
    pass(&mut world, 100);
    assert_eq!((open(&world, 0), runs(&world, 0, FENCE)), (0, 0));
    world.heal();
    quiet(&mut world);
}

#[test]
fn resource_only_asks_once_per_loss_and_goes_on() {
    let mut world = fenced_pair(8010, Fencing::ResourceOnly);
    handler_says(&mut world, 0, FENCE, Some(4));
    let undone = runs(&world, 0, HandlerName::UnfencePeer);
    for loss in 1..4 {
        load(&mut world, 0, 10);
        world.cut(true);
        pass(&mut world, 200);
        load(&mut world, 0, 5);
        pass(&mut world, 200);
        assert_eq!(open(&world, 0), 0);
        assert_eq!((runs(&world, 0, FENCE), runs(&world, 1, FENCE)), (loss, 0));
        assert_eq!(status(&world, 0).connection.peer_volumes[0].peer_disk, DiskState::Outdated);
        assert_ne!(superblock(&world, 0).flags & flags::PEER_OUT_DATED, 0, "recorded");
        world.heal();
        quiet(&mut world);
        let now = runs(&world, 0, HandlerName::UnfencePeer) - undone;
        assert_eq!(now, loss, "undone when both are in sync");
    }
}

/// The peer that comes back ends the freeze, and with it the demotion that waits for frozen writes.
#[test]
fn a_frozen_primary_that_is_to_become_secondary_meets_its_peer() {
    for seed in 8200..8220 {
        let mut world = frozen(seed);
        let id = world.admin(0, "secondary", AdminCommand::Secondary);
        pass(&mut world, 1000);
        assert!(!world.nodes[0].answers.contains_key(&id), "demoted with frozen writes");
        world.heal();
        within(&mut world, 5000, |w| w.nodes[0].answers.contains_key(&id));
        assert_eq!((world.nodes[0].answers[&id].is_ok(), world.failed_requests), (true, 0));
        assert!(!world.is_primary(0));
        quiet(&mut world);
    }
}

/// A promotion that waits for a handler, for ever perhaps, keeps no disk from the peer that comes back.
#[test]
fn a_disk_attached_while_the_handler_hangs_meets_the_peer() {
    let mut world = fenced_pair(8230, Fencing::ResourceOnly);
    handler_says(&mut world, 1, FENCE, None);
    world.crash(0, false);
    within(&mut world, 20_000, |w| w.state(1).is_some_and(|s| s.2 == ConnState::Connecting));
    let id = world.admin(1, "primary", PRIMARY);
    pass(&mut world, 100);
    assert!(waits_for(&world, 1, &["fence-peer to say"]));
    detach(&mut world, 1);
    world.attach(1);
    world.start(0);
    within(&mut world, 20_000, |w| w.nodes[1].answers.contains_key(&id));
    assert_eq!(world.nodes[1].answers[&id], Ok(()));
    quiet(&mut world);
    assert!(world.is_primary(1));
}

/// Whenever in the meeting the freeze ends: both nodes end with one generation, which a fail-over goes on from.
#[test]
fn fenced_or_resumed_in_the_middle_of_a_handshake_leaves_one_generation() {
    for after in 0..40 {
        for by_order in [false, true] {
            // Nothing is written: no resync would bring one generation to the other.
            let mut world = fenced_pair(8300 + after, Fencing::ResourceAndStonith);
            handler_says(&mut world, 0, FENCE, None);
            world.cut(true);
            within(&mut world, 1000, |w| w.state(0).is_some_and(|s| s.2 == ConnState::Connecting));
            slow(&mut world, 0, 20);
            slow(&mut world, 1, 20);
            world.heal();
            pass(&mut world, after * 5);
            if by_order {
                world.admin(0, "resume-io", AdminCommand::ResumeIo);
            } else {
                late_answer(&mut world, 0, FENCE, 0, 4);
            }
            quiet(&mut world);
            let [one, two] = [0, 1].map(|node| superblock(&world, node).uuid[0] & !1);
            assert_eq!(one, two, "ended after {after}, by order {by_order}");
            assert_eq!(world.failed_requests, 0);
        }
    }
}

/// SEM 29.9, and S46: a handler that hangs is not a fenced peer.
#[test]
fn a_frozen_primary_completes_nothing_until_the_peer_is_fenced() {
    for seed in 8020..8040 {
        let mut world = frozen(seed);
        let good = world.good_requests;
        let generation = superblock(&world, 0).uuid[0];
        pass(&mut world, 5000);
        assert_eq!(world.good_requests, good, "a request completed before the peer was fenced");
        assert_eq!(status(&world, 0).suspended, ["fencing"]);
        assert!(waits_for(&world, 0, &["frozen by fencing", "fence-peer to answer", "resume-io r0"]));
        assert_eq!(superblock(&world, 0).uuid[0], generation, "the new generation is deferred");
        late_answer(&mut world, 0, FENCE, 0, 7);
        within(&mut world, 1000, |w| open(w, 0) == 0);
        assert_ne!(superblock(&world, 0).uuid[0], generation);
        assert_eq!(world.failed_requests, 0);
        load(&mut world, 0, 3);
        within(&mut world, 1000, |w| open(w, 0) == 0);
        world.heal();
        quiet(&mut world);
    }
}

#[test]
fn a_peer_that_comes_back_thaws_and_late_answers_are_ignored() {
    for seed in 8040..8060 {
        let mut world = frozen(seed);
        pass(&mut world, 300);
        let generation = superblock(&world, 0).uuid[0];
        world.heal();
        quiet(&mut world);
        assert_eq!(world.failed_requests, 0);
        assert_eq!(superblock(&world, 0).uuid[0] & !1, generation & !1, "no new generation");
        late_answer(&mut world, 0, FENCE, 0, 4);
        pass(&mut world, 100);
        assert_eq!(status(&world, 0).connection.peer_volumes[0].peer_disk, DiskState::UpToDate);
        // Of the run before the one that counts now.
        world.cut(true);
        within(&mut world, 1000, |w| runs(w, 0, FENCE) == 2);
        late_answer(&mut world, 0, FENCE, 0, 4);
        pass(&mut world, 100);
        assert_eq!(status(&world, 0).suspended, ["fencing"]);
        world.heal();
        quiet(&mut world);
    }
}

#[test]
fn a_link_that_flaps_keeps_io_frozen_and_asks_anew() {
    let mut world = frozen(8061);
    let good = world.good_requests;
    for messages in 0..30 {
        world.cut_after = Some(world.delivered + messages);
        world.heal();
        world.run_until(3000, |w| w.cut_after.is_none());
        world.cut(true);
        world.cut_after = None;
        within(&mut world, 1000, |w| w.state(0).is_some_and(|s| s.2 != ConnState::Connected));
        // A peer that said that its data is no good needs no fencing: then IO may go on.
        let peer = status(&world, 0).connection.peer_volumes[0].peer_disk;
        if world.good_requests == good && peer == DiskState::DUnknown {
            assert_eq!(status(&world, 0).suspended, ["fencing"], "after {messages} messages");
        }
    }
    world.heal();
    quiet(&mut world);
    assert_eq!(world.failed_requests, 0);
}

/// A write that waits for its place in the activity log when the link goes is written here alone while the nodes meet
/// again, after they told each other what is marked: it must not be told done for a peer that has not got it.
#[test]
fn a_write_held_up_by_the_activity_log_while_the_nodes_meet_reaches_both() {
    for step in 0..100 {
        let mut world = fenced_pair(8062, Fencing::ResourceAndStonith);
        handler_says(&mut world, 0, FENCE, None);
        world.nodes[0].disks[0].faults.stick = Some((2 + 2 * step) * 1_000_000);
        for extent in 0..3 {
            world.request(0, RequestOp::Write, 8192 * (extent + 2), 8, false);
        }
        pass(&mut world, 1);
        slow(&mut world, 0, 20);
        slow(&mut world, 1, 20);
        world.cut(false);
        within(&mut world, 5000, |w| open(w, 0) == 0);
        quiet(&mut world);
        assert_eq!(sectors(&world, 0), sectors(&world, 1), "held up for {} ms", 2 + 2 * step);
    }
}

#[test]
fn what_each_answer_of_the_handler_means() {
    // Answer, what is recorded of the peer, whether IO goes on.
    let table = [
        (Some(3), DiskState::Inconsistent, true),
        (Some(4), DiskState::Outdated, true),
        (Some(5), DiskState::Outdated, true),
        (Some(6), DiskState::DUnknown, false),
        (Some(7), DiskState::Outdated, true),
        (Some(0), DiskState::DUnknown, false),
        (Some(1), DiskState::DUnknown, false),
        (Some(10), DiskState::DUnknown, false),
    ];
    for (seed, (answer, peer, goes_on)) in table.into_iter().enumerate() {
        let mut world = fenced_pair(8070 + seed as u64, Fencing::ResourceAndStonith);
        handler_says(&mut world, 0, FENCE, answer);
        world.cut(true);
        pass(&mut world, 100);
        load(&mut world, 0, 4);
        pass(&mut world, 500);
        assert_eq!(status(&world, 0).connection.peer_volumes[0].peer_disk, peer, "answer {answer:?}");
        assert_eq!(open(&world, 0) == 0, goes_on, "answer {answer:?}");
        if !goes_on {
            assert!(waits_for(&world, 0, &["settles nothing"]) || waits_for(&world, 0, &["is Primary"]));
            assert_eq!(verb(&mut world, 0, "resume-io", AdminCommand::ResumeIo), Ok(()));
            within(&mut world, 1000, |w| open(w, 0) == 0);
        }
        world.heal();
        quiet(&mut world);
        assert_eq!(world.failed_requests, 0);
    }
}

/// A fenced peer stays fenced over a restart of the survivor; an unknown one does not count.
#[test]
fn the_recorded_fate_of_the_peer_decides_after_a_restart() {
    for fenced in [true, false] {
        let mut world = fenced_pair(8090 + u64::from(fenced), Fencing::ResourceOnly);
        handler_says(&mut world, 0, FENCE, fenced.then_some(4));
        world.cut(true);
        pass(&mut world, 200);
        load(&mut world, 0, 5);
        pass(&mut world, 200);
        world.crash(0, false);
        world.start(0);
        pass(&mut world, 200);
        let expected = if fenced { DiskState::UpToDate } else { DiskState::Consistent };
        assert_eq!(world.state(0).unwrap().1, expected);
        let asked = runs(&world, 0, FENCE);
        handler_says(&mut world, 0, FENCE, Some(5));
        let answer = verb(&mut world, 0, "primary", PRIMARY);
        if fenced {
            assert_eq!((answer, runs(&world, 0, FENCE)), (Ok(()), asked), "nobody had to be asked");
        } else {
            // "Unreachable" proves nothing for a disk that is only Consistent.
            let refused = answer.unwrap_err();
            assert_eq!((refused.number, runs(&world, 0, FENCE)), (-2, asked + 1));
            handler_says(&mut world, 0, FENCE, Some(7));
            assert_eq!(verb(&mut world, 0, "primary", PRIMARY), Ok(()));
        }
        assert_eq!(world.state(0).unwrap().1, DiskState::UpToDate);
        world.heal();
        quiet(&mut world);
    }
}

#[test]
fn a_promotion_without_the_peer_needs_it_fenced() {
    let mut world = fenced_pair(8100, Fencing::ResourceOnly);
    assert_eq!(verb(&mut world, 0, "secondary", AdminCommand::Secondary), Ok(()));
    world.cut(true);
    pass(&mut world, 200);
    let refused = verb(&mut world, 0, "primary", PRIMARY).unwrap_err();
    assert_eq!(refused.number, -7);
    assert!(refused.facts.iter().any(|fact| fact.contains("fence-peer ended with 0")), "{refused:?}");
    assert!(refused.facts.iter().any(|fact| fact.contains("DUnknown")), "{refused:?}");
    assert!(refused.advice.contains("drbdadm"), "{refused:?}");
    assert_eq!((runs(&world, 0, FENCE), world.is_primary(0)), (1, false));
    // While the handler runs the verb waits and says for what; a connection that comes back decides anew.
    handler_says(&mut world, 0, FENCE, None);
    let id = world.admin(0, "primary", PRIMARY);
    pass(&mut world, 300);
    assert!(waits_for(&world, 0, &["fence-peer"]));
    assert!(!world.nodes[0].answers.contains_key(&id));
    late_answer(&mut world, 0, FENCE, 1, 4);
    within(&mut world, 1000, |w| w.is_primary(0));
    world.heal();
    quiet(&mut world);
}

/// A handler that hangs holds nothing up once the peer itself can be asked (`sim --seed 70 --features fencing`).
#[test]
fn a_promotion_does_not_wait_for_a_hanging_handler_once_the_peer_is_back() {
    for force in [false, true] {
        let mut world = fenced_pair(8105, Fencing::ResourceOnly);
        assert_eq!(verb(&mut world, 0, "secondary", AdminCommand::Secondary), Ok(()));
        world.cut(true);
        pass(&mut world, 200);
        handler_says(&mut world, 0, FENCE, None);
        let id = world.admin(0, "primary", AdminCommand::Primary { force });
        pass(&mut world, 5000);
        assert!(!world.nodes[0].answers.contains_key(&id));
        world.heal();
        within(&mut world, 2000, |w| w.nodes[0].answers.contains_key(&id));
        assert_eq!((&world.nodes[0].answers[&id], world.is_primary(0)), (&Ok(()), true));
        // What it says now counts no longer.
        late_answer(&mut world, 0, FENCE, 0, 6);
        load(&mut world, 0, 3);
        quiet(&mut world);
        assert!(world.is_primary(0));
    }
}

#[test]
fn force_goes_past_a_handler_that_fails() {
    let mut world = fenced_pair(8110, Fencing::ResourceAndStonith);
    assert_eq!(verb(&mut world, 0, "secondary", AdminCommand::Secondary), Ok(()));
    world.cut(true);
    pass(&mut world, 200);
    assert_eq!(verb(&mut world, 0, "primary-force", AdminCommand::Primary { force: true }), Ok(()));
    assert_eq!(runs(&world, 0, FENCE), 1);
    load(&mut world, 0, 3);
    within(&mut world, 1000, |w| open(w, 0) == 0);
    world.heal();
    quiet(&mut world);
}

/// Who leaves in order leaves nobody in doubt (SEM §6).
#[test]
fn a_graceful_disconnect_outdates() {
    for node in 0..2 {
        for down in [false, true] {
            if down && node == 0 {
                continue;
            }
            let mut world = fenced_pair(8120 + node as u64, Fencing::ResourceAndStonith);
            load(&mut world, 0, 10);
            let command = if down { AdminCommand::Down } else { AdminCommand::Disconnect { force: false } };
            assert_eq!(verb(&mut world, node, "disconnect", command), Ok(()));
            pass(&mut world, 200);
            assert_eq!(superblock(&world, 1).flags & flags::WAS_UP_TO_DATE, 0, "durably Outdated");
            assert_eq!((runs(&world, 0, FENCE), status(&world, 0).suspended.len()), (0, 0));
            load(&mut world, 0, 5);
            within(&mut world, 1000, |w| open(w, 0) == 0);
            assert_eq!(world.failed_requests, 0);
            let refused = verb(&mut world, 1, "primary", PRIMARY).unwrap_err();
            assert_eq!(refused.number, -2, "{refused:?}");
            if down {
                world.crash(1, false);
                world.start(1);
            } else {
                let connect = || AdminCommand::Connect { discard_my_data: false, tentative: false };
                world.admin(0, "connect", connect());
                world.admin(1, "connect", connect());
            }
            quiet(&mut world);
        }
    }
}

#[test]
fn a_frozen_primary_may_die_and_lose_nothing() {
    for seed in 8140..8160 {
        let mut world = frozen(seed);
        pass(&mut world, seed % 50);
        world.crash(0, false);
        pass(&mut world, 50);
        if seed % 2 == 0 {
            // The cluster fences the dead one and goes on with the other copy.
            handler_says(&mut world, 1, FENCE, Some(7));
            assert_eq!(verb(&mut world, 1, "primary", PRIMARY), Ok(()));
            world.check_content(1);
            load(&mut world, 1, 5);
            pass(&mut world, 100);
        }
        world.start(0);
        world.heal();
        quiet(&mut world);
        assert_eq!(world.state(0).unwrap().0, Role::Secondary);
    }
}

/// `call-pri-lost-after-sb` decides against a Primary that is frozen, which is in a split brain because a handler lied
/// and the link went again when the nodes had just met. What waits there was told to nobody and is given up.
#[test]
fn a_frozen_primary_that_a_policy_decides_against_gives_up_what_it_held() {
    let mut decided = 0;
    for seed in 8400..8430 {
        let mut options = Options::new(seed);
        options.net.fencing = Fencing::ResourceAndStonith;
        options.net.after_sb_0pri = AfterSb0Pri::DiscardLeastChanges;
        options.net.after_sb_1pri = AfterSb1Pri::CallPriLostAfterSb;
        let mut world = pair_with(options);
        world.oracle.policies = true;
        handler_says(&mut world, 0, FENCE, Some(4));
        world.cut(true);
        within(&mut world, 1000, |w| w.state(0).is_some_and(|s| s.2 == ConnState::Connecting));
        world.request(0, RequestOp::Write, 64, 8, false);
        within(&mut world, 1000, |w| open(w, 0) == 0);
        handler_says(&mut world, 0, FENCE, None);
        // Node 1 shall not hear of the meeting.
        slow(&mut world, 1, 50);
        world.heal();
        within(&mut world, 5000, |w| w.state(0).is_some_and(|s| s.3 == ReplState::WFBitMapS));
        world.cut(true);
        slow(&mut world, 1, 0);
        within(&mut world, 1000, |w| w.state(0).is_some_and(|s| s.2 == ConnState::Connecting));
        if status(&world, 1).volumes[0].disk != DiskState::UpToDate {
            continue;
        }
        decided += 1;
        assert_eq!(status(&world, 0).suspended, ["fencing"], "seed {seed}");
        load(&mut world, 0, 5);
        world.request(0, RequestOp::Read, 0, 8, false);
        world.flush(0);
        handler_says(&mut world, 1, FENCE, Some(7));
        within(&mut world, 1000, |w| w.state(1).is_some_and(|s| s.2 == ConnState::Connecting));
        assert_eq!(verb(&mut world, 1, "primary", PRIMARY), Ok(()), "seed {seed}");
        load(&mut world, 1, 30);
        within(&mut world, 1000, |w| open(w, 1) == 0);
        assert_eq!(verb(&mut world, 1, "secondary", AdminCommand::Secondary), Ok(()));
        world.heal();
        quiet(&mut world);
        assert!(!world.is_primary(0) && open(&world, 0) == 0);
        assert_eq!((world.failed_requests, status(&world, 0).suspended.len()), (7, 0), "seed {seed}");
    }
    assert!(decided > 5, "only {decided} times");
}
