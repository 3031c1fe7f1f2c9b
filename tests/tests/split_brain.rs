//! Split brain from end to end: found by both nodes, resolved only by a policy or a person, and then
//! both disks hold what the winner had.
use lockstep_replicator::core::compare::Rule;
use lockstep_replicator::core::config::{AfterSb0Pri, AfterSb1Pri, AfterSb2Pri, NetConfig, RrConflict};
use lockstep_replicator::core::event::{AdminCommand, Event, HandlerName, Input, RequestOp};
use lockstep_replicator::core::explain::Decision;
use lockstep_replicator::core::policy::{Obstacle, Outcome, Reason};
use lockstep_replicator::core::state::{ConnState, DiskState, ReplState, Role};
use lockstep_tests::sim::node::VOLUME;
use lockstep_tests::sim::{Options, World};

const CONNECT: AdminCommand = AdminCommand::Connect { discard_my_data: false, tentative: false };
const GIVE_UP: AdminCommand = AdminCommand::Connect { discard_my_data: true, tentative: false };
const PRIMARY: AdminCommand = AdminCommand::Primary { force: false };

#[track_caller]
fn ok(world: &mut World, ms: u64, done: impl FnMut(&World) -> bool) {
    let held = world.run_until(ms, done);
    assert_eq!(world.broken, None);
    assert!(held, "not within {ms} ms: {:?} {:?}", world.state(0), world.state(1));
}

#[track_caller]
fn answer(world: &mut World, node: usize, name: &'static str, command: AdminCommand) -> Result<(), i32> {
    let id = world.admin(node, name, command);
    ok(world, 20_000, |w| w.nodes[node].answers.contains_key(&id));
    world.nodes[node].answers[&id].as_ref().map(|_| ()).map_err(|refusal| refusal.number)
}

fn write(world: &mut World, node: usize, start: u64, len: u64) {
    let before = world.good_requests;
    world.request(node, RequestOp::Write, start, len, false);
    ok(world, 1000, |w| w.good_requests > before);
}

/// Both nodes went on for themselves, node 0 first: it changed `mine` blocks at the front, node 1
/// `theirs` blocks a little further, one of them the same. Both are Primary and cannot see each other.
fn diverged(net: &NetConfig, mine: u64, theirs: u64) -> World {
    diverged_after(net, mine, theirs, |_| {})
}

/// The same with something that happened to the pair before.
fn diverged_after(net: &NetConfig, mine: u64, theirs: u64, before: impl FnOnce(&mut World)) -> World {
    let options =
        Options { net: NetConfig { connect_int_ms: 1000, ko_count: 0, ..net.clone() }, ..Options::new(7) };
    let mut world = World::new(options);
    world.start(0);
    world.start(1);
    ok(&mut world, 1000, |w| w.state(0).is_some_and(|s| s.2 == ConnState::Connected));
    assert_eq!(answer(&mut world, 0, "primary-force", AdminCommand::Primary { force: true }), Ok(()));
    ok(&mut world, 10_000, |w| w.in_sync() && w.idle());
    before(&mut world);
    ok(&mut world, 10_000, |w| w.in_sync() && w.idle());
    // What both know of the application stays theirs alone from here on.
    world.check_data = false;
    world.cut(true);
    world.run(100);
    if mine > 0 {
        write(&mut world, 0, 800, mine * 8);
    }
    assert_eq!(answer(&mut world, 1, "primary", PRIMARY), Ok(()));
    if theirs > 0 {
        write(&mut world, 1, 800 + mine.saturating_sub(1) * 8, theirs * 8);
    }
    world.run(100);
    world
}

fn secondary(world: &mut World, node: usize) {
    assert_eq!(answer(world, node, "secondary", AdminCommand::Secondary), Ok(()));
}

fn disks(world: &World) -> [Vec<u32>; 2] {
    [world.nodes[0].disks[0].sectors().to_vec(), world.nodes[1].disks[0].sectors().to_vec()]
}

fn last(world: &World, node: usize) -> Decision {
    let found = world.log.iter().rev().find_map(|(_, at, event)| match event {
        Event::Handshake(decision) if *at == node => Some((**decision).clone()),
        _ => None,
    });
    found.expect("no handshake was decided")
}

fn ran(world: &World, node: usize, name: HandlerName) -> usize {
    world.handler_runs.iter().filter(|run| run.1 == node && run.2 == name).count()
}

#[track_caller]
fn stays_apart(world: &mut World, before: &[Vec<u32>; 2]) {
    ok(world, 5000, |w| (0..2).all(|node| w.state(node).is_some_and(|s| s.2 == ConnState::StandAlone)));
    world.run(3000);
    assert_eq!(&disks(world), before, "something was overwritten");
    for node in 0..2 {
        assert_eq!(world.state(node).map(|s| s.1), Some(DiskState::UpToDate));
    }
}

#[track_caller]
fn resolved_for(world: &mut World, winner: usize, before: &[Vec<u32>; 2]) {
    ok(world, 30_000, |w| w.in_sync() && w.idle());
    world.check_quiet();
    assert_eq!(world.broken, None);
    let now = disks(world);
    assert_eq!(now[0], now[1]);
    assert_eq!(now[winner], before[winner], "the winner's data changed");
    assert_ne!(now[1 - winner], before[1 - winner], "nothing was undone");
}

#[test]
fn it_is_found_by_both_nodes_and_nothing_is_touched() {
    let mut world = diverged(&NetConfig::default(), 3, 5);
    let before = disks(&world);
    world.heal();
    stays_apart(&mut world, &before);
    for node in 0..2 {
        let decision = last(&world, node);
        assert_eq!(decision.decided.comparison.rule, Rule::BitmapBoth);
        assert_eq!(decision.decided.outcome, Outcome::Refuse(Obstacle::SplitBrain));
        assert_eq!(ran(&world, node, HandlerName::InitialSplitBrain), 1);
        assert_eq!(ran(&world, node, HandlerName::SplitBrain), 1);
        assert!(world.is_primary(node), "both applications go on");
    }
    // Asked again, the answer is the same.
    assert_eq!(answer(&mut world, 0, "connect", CONNECT), Ok(()));
    assert_eq!(answer(&mut world, 1, "connect", CONNECT), Ok(()));
    stays_apart(&mut world, &before);
}

#[test]
fn a_person_gives_one_sides_changes_up_for_one_handshake() {
    let mut world = diverged(&NetConfig::default(), 3, 5);
    let before = disks(&world);
    world.heal();
    stays_apart(&mut world, &before);
    assert_eq!(answer(&mut world, 1, "connect", GIVE_UP), Err(123), "not under a running application");
    secondary(&mut world, 1);
    assert_eq!(answer(&mut world, 1, "connect", GIVE_UP), Ok(()));
    assert_eq!(answer(&mut world, 0, "connect", CONNECT), Ok(()));
    resolved_for(&mut world, 0, &before);
    assert!(last(&world, 1).mine.discard_my_data);
    let copied = world.log.iter().rev().find_map(|(_, _, event)| match event {
        Event::ResyncDone { bits_total, .. } => Some(*bits_total),
        _ => None,
    });
    assert_eq!(copied, Some(7), "the union of both sides' changes, and no more");
    // One-shot: the next meeting is without it.
    world.cut(false);
    world.run(100);
    ok(&mut world, 5000, |w| w.in_sync() && w.idle());
    assert!(!last(&world, 1).mine.discard_my_data);
}

#[test]
fn both_giving_up_is_refused() {
    let mut world = diverged(&NetConfig::default(), 3, 5);
    let before = disks(&world);
    world.heal();
    stays_apart(&mut world, &before);
    for node in 0..2 {
        secondary(&mut world, node);
        assert_eq!(answer(&mut world, node, "connect", GIVE_UP), Ok(()));
    }
    stays_apart(&mut world, &before);
}

#[test]
fn an_ancestor_known_from_the_history_only_costs_a_full_resync() {
    for always_asbp in [false, true] {
        let net = NetConfig {
            always_asbp,
            after_sb_0pri: AfterSb0Pri::DiscardLeastChanges,
            ..NetConfig::default()
        };
        let mut world = diverged(&net, 3, 5);
        for node in 0..2 {
            secondary(&mut world, node);
            assert_eq!(
                answer(&mut world, node, "disconnect", AdminCommand::Disconnect { force: false }),
                Ok(())
            );
            let fresh = AdminCommand::NewCurrentUuid { volume: VOLUME, clear_bitmap: false };
            assert_eq!(answer(&mut world, node, "new-current-uuid", fresh), Ok(()));
        }
        let before = disks(&world);
        world.heal();
        assert_eq!(answer(&mut world, 0, "connect", CONNECT), Ok(()));
        assert_eq!(answer(&mut world, 1, "connect", CONNECT), Ok(()));
        if !always_asbp {
            stays_apart(&mut world, &before);
            assert_eq!(last(&world, 0).decided.comparison.rule, Rule::HistoryBoth);
            assert_eq!(answer(&mut world, 0, "connect", GIVE_UP), Ok(()));
            assert_eq!(answer(&mut world, 1, "connect", CONNECT), Ok(()));
        }
        resolved_for(&mut world, 1, &before);
        assert_eq!(last(&world, 0).decided.outcome, Outcome::Target { full: true });
    }
}

#[test]
fn after_sb_0pri_every_value() {
    // The policy, what both changed, and who wins; `None`: nobody.
    for (policy, mine, theirs, winner) in [
        (AfterSb0Pri::Disconnect, 3, 0, None),
        (AfterSb0Pri::DiscardYoungerPrimary, 3, 5, Some(0)),
        (AfterSb0Pri::DiscardOlderPrimary, 3, 5, Some(1)),
        (AfterSb0Pri::DiscardZeroChanges, 0, 5, Some(1)),
        (AfterSb0Pri::DiscardZeroChanges, 3, 5, None),
        (AfterSb0Pri::DiscardLeastChanges, 3, 5, Some(1)),
        (AfterSb0Pri::DiscardLeastChanges, 5, 3, Some(0)),
    ] {
        let net = NetConfig { after_sb_0pri: policy, ..NetConfig::default() };
        let mut world = diverged(&net, mine, theirs);
        secondary(&mut world, 0);
        secondary(&mut world, 1);
        let before = disks(&world);
        world.heal();
        match winner {
            None => stays_apart(&mut world, &before),
            Some(winner) if mine == 0 => {
                ok(&mut world, 30_000, |w| w.in_sync() && w.idle());
                assert_eq!(disks(&world)[0], before[winner], "{policy:?}");
            }
            Some(winner) => resolved_for(&mut world, winner, &before),
        }
        let expected = usize::from(winner.is_none());
        for node in 0..2 {
            assert_eq!(ran(&world, node, HandlerName::InitialSplitBrain), 1, "{policy:?}");
            assert_eq!(ran(&world, node, HandlerName::SplitBrain), expected, "{policy:?}");
        }
    }
}

/// Two Secondaries in a split brain that the fewer changes lose, on their way to meet, cut after so many messages; and
/// what stands on their disks.
fn least_changes_cut(mine: u64, theirs: u64, to: usize, after: u64) -> (World, [Vec<u32>; 2]) {
    let net = NetConfig { after_sb_0pri: AfterSb0Pri::DiscardLeastChanges, ..NetConfig::default() };
    let mut world = diverged(&net, mine, theirs);
    secondary(&mut world, 0);
    secondary(&mut world, 1);
    let before = disks(&world);
    world.heal();
    world.net.cut_after_to[to] = Some(after);
    (world, before)
}

/// The bitmaps are united before a resync begins; if it never does, that changes nobody's share.
/// The peer began a generation for a Primary without a disk, and gave it back as the source of a resync. Who was
/// Primary when the link went is written in both disks all the same.
#[test]
fn who_was_primary_first_is_known_after_its_disk_was_away() {
    for (policy, winner) in [(AfterSb0Pri::DiscardYoungerPrimary, 0), (AfterSb0Pri::DiscardOlderPrimary, 1)] {
        let net = NetConfig { after_sb_0pri: policy, ..NetConfig::default() };
        let mut world = diverged_after(&net, 3, 5, |world| {
            let away = AdminCommand::Detach { volume: VOLUME, force: false };
            assert_eq!(answer(world, 0, "detach", away), Ok(()));
            write(world, 0, 80, 8);
            world.attach(0);
        });
        secondary(&mut world, 0);
        secondary(&mut world, 1);
        let before = disks(&world);
        world.heal();
        resolved_for(&mut world, winner, &before);
    }
}

#[test]
fn a_split_brain_that_is_found_twice_has_the_same_loser() {
    for (mine, theirs, winner) in [(5, 3, 0), (3, 5, 1)] {
        for (to, after) in (0..2).flat_map(|to| (2..7).map(move |after| (to, after))) {
            let (mut world, before) = least_changes_cut(mine, theirs, to, after);
            resolved_for(&mut world, winner, &before);
        }
    }
}

/// What stood in the bitmaps of one node and what in the other's is forgotten with the nodes. Who lost is not.
#[test]
fn a_split_brain_that_is_found_again_after_a_restart_has_the_same_loser() {
    let cuts = || (0..2).flat_map(|to| (2..9).map(move |after| (to, after)));
    for (mine, theirs, winner) in [(5, 3, 0), (3, 5, 1), (8, 1, 0), (1, 8, 1)] {
        for ((to, after), (stops, late_ms)) in
            cuts().flat_map(|cut| (1..4_usize).flat_map(move |stops| [0, 2].map(|late| (cut, (stops, late)))))
        {
            let (mut world, before) = least_changes_cut(mine, theirs, to, after);
            world.run_until(2000, |w| w.net.cut_after_to[to].is_none());
            world.run(late_ms);
            let stopped: Vec<usize> = (0..2).filter(|node| stops >> node & 1 == 1).collect();
            stopped.iter().for_each(|node| world.crash(*node, false));
            stopped.iter().for_each(|node| world.start(*node));
            resolved_for(&mut world, winner, &before);
        }
    }
}

#[test]
fn discard_local_and_discard_remote_are_one_setting_seen_from_two_sides() {
    for (second, fits) in [(AfterSb0Pri::DiscardRemote, true), (AfterSb0Pri::DiscardLocal, false)] {
        let mut world = diverged(&NetConfig::default(), 3, 5);
        for (node, policy) in [(0, AfterSb0Pri::DiscardLocal), (1, second)] {
            secondary(&mut world, node);
            world.crash(node, false);
            world.options.net.after_sb_0pri = policy;
            world.start(node);
            world.run(200);
        }
        let before = disks(&world);
        world.heal();
        if fits {
            resolved_for(&mut world, 1, &before);
        } else {
            stays_apart(&mut world, &before);
            let told = world.log.iter().any(|(_, _, event)| {
                matches!(event, Event::Note(_, text) if text.contains("incompatible after-sb-0pri settings"))
            });
            assert!(told);
        }
    }
}

#[test]
fn after_sb_1pri_every_value() {
    let least = AfterSb0Pri::DiscardLeastChanges;
    // Node 0 is Primary and changed 3 blocks; node 1 changed `theirs`.
    for (policy, theirs, winner) in [
        (AfterSb1Pri::Disconnect, 1, None),
        (AfterSb1Pri::Consensus, 1, Some(0)),
        (AfterSb1Pri::Consensus, 5, None),
        (AfterSb1Pri::DiscardSecondary, 5, Some(0)),
        (AfterSb1Pri::CallPriLostAfterSb, 1, Some(0)),
        (AfterSb1Pri::CallPriLostAfterSb, 5, Some(1)),
        (AfterSb1Pri::ViolentlyAs0p, 1, Some(0)),
        (AfterSb1Pri::ViolentlyAs0p, 5, Some(1)),
    ] {
        let net = NetConfig { after_sb_0pri: least, after_sb_1pri: policy, ..NetConfig::default() };
        let mut world = diverged(&net, 3, theirs);
        secondary(&mut world, 1);
        let before = disks(&world);
        world.heal();
        match winner {
            None => stays_apart(&mut world, &before),
            Some(winner) => resolved_for(&mut world, winner, &before),
        }
        let demoted = policy == AfterSb1Pri::CallPriLostAfterSb && winner == Some(1);
        assert_eq!(world.is_primary(0), !demoted, "{policy:?}");
        assert_eq!(ran(&world, 0, HandlerName::PriLostAfterSb), 0, "nobody used it: {policy:?}");
    }
}

#[test]
fn a_primary_in_use_that_loses_keeps_its_data_and_its_handler_is_called() {
    for both in [false, true] {
        let net = NetConfig {
            after_sb_0pri: AfterSb0Pri::DiscardLeastChanges,
            after_sb_1pri: AfterSb1Pri::CallPriLostAfterSb,
            after_sb_2pri: AfterSb2Pri::CallPriLostAfterSb,
            ..NetConfig::default()
        };
        let mut world = diverged(&net, 3, 5);
        if !both {
            secondary(&mut world, 1);
        }
        world.feed(0, Input::Opened(VOLUME));
        let before = disks(&world);
        world.heal();
        ok(&mut world, 5000, |w| w.state(0).is_some_and(|s| s.2 == ConnState::StandAlone));
        world.run(3000);
        assert_eq!(disks(&world), before);
        assert!(world.is_primary(0));
        assert_eq!(ran(&world, 0, HandlerName::PriLostAfterSb), 1);
        assert_eq!(ran(&world, 1, HandlerName::PriLostAfterSb), 0);
        // The handler may stop the application; then the policy can be followed.
        world.feed(0, Input::Closed(VOLUME));
        assert_eq!(answer(&mut world, 0, "connect", CONNECT), Ok(()));
        resolved_for(&mut world, 1, &before);
        assert_eq!(world.state(0).map(|s| s.0), Some(Role::Secondary));
        assert_eq!(world.is_primary(1), both);
    }
}

#[test]
fn after_sb_2pri_every_value() {
    let least = AfterSb0Pri::DiscardLeastChanges;
    for two in [false, true] {
        for (policy, winner) in [
            (AfterSb2Pri::Disconnect, None),
            (AfterSb2Pri::CallPriLostAfterSb, Some(1)),
            (AfterSb2Pri::ViolentlyAs0p, Some(1).filter(|_| two)),
        ] {
            let net = NetConfig {
                after_sb_0pri: least,
                after_sb_2pri: policy,
                allow_two_primaries: two,
                ..NetConfig::default()
            };
            let mut world = diverged(&net, 3, 5);
            let before = disks(&world);
            world.heal();
            match winner {
                None => stays_apart(&mut world, &before),
                Some(winner) => resolved_for(&mut world, winner, &before),
            }
            assert!(world.is_primary(1));
            let demoted = policy == AfterSb2Pri::CallPriLostAfterSb;
            assert_eq!(world.is_primary(0), !demoted, "{policy:?}");
        }
    }
}

#[test]
fn a_dry_run_says_what_would_happen_and_changes_nothing() {
    let mut world = diverged(&NetConfig::default(), 3, 5);
    world.heal();
    let before = disks(&world);
    stays_apart(&mut world, &before);
    secondary(&mut world, 1);
    assert_eq!(answer(&mut world, 0, "connect", CONNECT), Ok(()));
    let uuids: Vec<_> = (0..2).map(|node| world.status(node).map(|s| s.volumes[0].uuids)).collect();
    let dry = AdminCommand::Connect { discard_my_data: true, tentative: true };
    assert_eq!(answer(&mut world, 1, "connect", dry), Ok(()));
    ok(&mut world, 5000, |w| w.state(1).is_some_and(|s| s.2 == ConnState::StandAlone));
    world.run(2000);
    assert_eq!(disks(&world), before);
    assert_eq!((0..2).map(|node| world.status(node).map(|s| s.volumes[0].uuids)).collect::<Vec<_>>(), uuids);
    assert_eq!(world.state(0).map(|s| s.2), Some(ConnState::Connecting), "who waits goes on waiting");
    for (node, text) in [(0, "would become SyncSource"), (1, "would become SyncTarget")] {
        assert!(last(&world, node).dry_run);
        let told = world.log.iter().any(|(_, at, event)| {
            *at == node && matches!(event, Event::Note(_, note) if note.contains("dry-run connect: ") && note.contains(text))
        });
        assert!(told, "n{node} does not say {text}");
    }
    assert_eq!(answer(&mut world, 1, "connect", GIVE_UP), Ok(()));
    resolved_for(&mut world, 0, &before);
}

/// Node 1 is Primary with good data; node 0 comes with a generation that follows node 1's, as a copy
/// restored from elsewhere might.
fn conflict(rr_conflict: RrConflict) -> World {
    let net = NetConfig { rr_conflict, connect_int_ms: 1000, ko_count: 0, ..NetConfig::default() };
    let mut world = World::new(Options { net, ..Options::new(8) });
    world.start(0);
    world.start(1);
    ok(&mut world, 1000, |w| w.state(0).is_some_and(|s| s.2 == ConnState::Connected));
    assert_eq!(answer(&mut world, 1, "primary-force", AdminCommand::Primary { force: true }), Ok(()));
    ok(&mut world, 10_000, |w| w.in_sync() && w.idle());
    world.check_data = false;
    world.crash(0, false);
    world.run(200);
    write(&mut world, 1, 0, 8);
    world.run(100);
    let shown = world.status(1).map(|s| s.volumes[0].uuids[0]).expect("node 1 is up");
    world.nodes[0].disks[0].meta.edit_superblock(|superblock| superblock.uuid = [0x7700, shown, 0, 0]);
    world
}

#[test]
fn rr_conflict_every_value() {
    for policy in [RrConflict::Disconnect, RrConflict::CallPriLost, RrConflict::AutoDiscard] {
        let mut world = conflict(policy);
        let before = disks(&world);
        world.start(0);
        stays_apart(&mut world, &before);
        assert_eq!(last(&world, 1).decided.outcome, Outcome::Refuse(Obstacle::TargetIsPrimary));
        assert_eq!(last(&world, 1).decided.reasons, [Reason::RrConflict(policy)]);
        let calls = usize::from(policy == RrConflict::CallPriLost);
        assert_eq!((ran(&world, 1, HandlerName::PriLost), ran(&world, 0, HandlerName::PriLost)), (calls, 0));
    }
    let mut world = conflict(RrConflict::RetryConnect);
    let before = disks(&world);
    world.start(0);
    world.run(300);
    assert_eq!(disks(&world), before);
    assert_eq!(last(&world, 1).decided.outcome, Outcome::Retry(Obstacle::TargetIsPrimary));
    // Once the application is stopped, the next attempt succeeds.
    secondary(&mut world, 1);
    ok(&mut world, 30_000, |w| w.in_sync() && w.idle());
    assert_eq!(disks(&world)[1], before[0]);

    let mut world = conflict(RrConflict::Violently);
    let before = disks(&world);
    world.start(0);
    ok(&mut world, 30_000, |w| w.in_sync() && w.idle());
    assert!(world.is_primary(1));
    assert_eq!(disks(&world)[1], before[0], "under the running application, as ordered");
}

#[test]
fn newer_data_is_rolled_back_when_a_person_says_so() {
    let mut world = World::new(Options::new(9));
    world.start(0);
    world.start(1);
    ok(&mut world, 1000, |w| w.state(0).is_some_and(|s| s.2 == ConnState::Connected));
    assert_eq!(answer(&mut world, 0, "primary-force", AdminCommand::Primary { force: true }), Ok(()));
    ok(&mut world, 10_000, |w| w.in_sync() && w.idle());
    world.check_data = false;
    assert_eq!(answer(&mut world, 1, "disconnect", AdminCommand::Disconnect { force: false }), Ok(()));
    world.run(100);
    write(&mut world, 0, 800, 24);
    secondary(&mut world, 0);
    let before = disks(&world);
    assert_eq!(answer(&mut world, 0, "disconnect", AdminCommand::Disconnect { force: false }), Ok(()));
    assert_eq!(answer(&mut world, 0, "connect", GIVE_UP), Ok(()));
    assert_eq!(answer(&mut world, 1, "connect", CONNECT), Ok(()));
    resolved_for(&mut world, 1, &before);
    assert_eq!(last(&world, 0).decided.reasons, [Reason::RolledBack]);
}

/// The loser stays Primary (`violently-as0p`), and its disk is slow: what its application wrote before the nodes met
/// lands in the middle of the resync. A digest made before that says nothing of it.
#[test]
fn a_digest_made_before_an_own_write_landed_clears_nothing() {
    let net = NetConfig {
        allow_two_primaries: true,
        after_sb_0pri: AfterSb0Pri::DiscardYoungerPrimary,
        after_sb_2pri: AfterSb2Pri::ViolentlyAs0p,
        csums_alg: Some("sha1".into()),
        ..NetConfig::default()
    };
    let mut world = diverged(&net, 3, 5);
    let before = disks(&world);
    world.nodes[1].disks[0].faults.stick = Some(4_000_000_000);
    world.request(1, RequestOp::Write, 2000, 8, false);
    world.heal();
    ok(&mut world, 3500, |w| w.state(1).is_some_and(|s| s.3 == ReplState::SyncTarget));
    assert_eq!(disks(&world)[1][2000], before[1][2000], "landed too early for this test");
    resolved_for(&mut world, 0, &before);
}
