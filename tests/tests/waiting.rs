//! Nothing waits without saying for what (promise 3): each verb, with disks and a network so slow that every step of
//! it can be seen, names in turn everything that it waits for.
use lockstep_replicator::core::config::Fencing;
use lockstep_replicator::core::event::AdminCommand;
use lockstep_replicator::core::resize::ResizeOptions;
use lockstep_replicator::core::state::ConnState;
use lockstep_tests::sim::node::VOLUME;
use lockstep_tests::sim::options::Weather;
use lockstep_tests::sim::script::{detach, load, pair_with, pass, quiet, status, verb, within};
use lockstep_tests::sim::{Options, World};
use std::collections::BTreeSet;

fn pair(seed: u64) -> World {
    let mut options = Options::new(seed);
    options.net.verify_alg = Some("sha1".into());
    pair_with(options)
}

/// Each IO and each message takes a good part of this.
const SLOW_MS: u64 = 200;

fn slowly(world: &mut World) {
    world.options.weather =
        Weather { disk_us: SLOW_MS * 1000, net_us: [SLOW_MS * 1000; 2], ..Weather::default() };
}

/// What a node says it waits for, from a verb to its answer.
fn waits(world: &mut World, node: usize, name: &'static str, command: AdminCommand) -> BTreeSet<String> {
    slowly(world);
    let mut said = BTreeSet::new();
    let id = world.admin(node, name, command);
    for _ in 0..4000 {
        said.extend(status(world, node).waiting_for);
        if world.nodes[node].answers.contains_key(&id) {
            break;
        }
        pass(world, 5);
    }
    assert!(world.nodes[node].answers.contains_key(&id), "{name} has no answer");
    world.options.weather = Weather::default();
    said
}

#[track_caller]
fn names(said: &BTreeSet<String>, wanted: &[&str]) {
    for words in wanted {
        assert!(said.iter().any(|wait| wait.contains(words)), "nobody said {words:?}: {said:#?}");
    }
}

#[test]
fn a_promotion() {
    let mut world = pair(1);
    assert_eq!(verb(&mut world, 0, "secondary", AdminCommand::Secondary), Ok(()));
    let said = waits(&mut world, 1, "primary", AdminCommand::Primary { force: false });
    names(&said, &["n0 to agree that this node becomes Primary", "the superblock to say Primary"]);
    quiet(&mut world);
}

#[test]
fn a_promotion_right_after_the_loss_of_the_other_primary() {
    let mut world = pair(2);
    slowly(&mut world);
    load(&mut world, 0, 10);
    within(&mut world, 5000, |w| w.nodes[1].ios.len() > 3);
    world.crash(0, true);
    within(&mut world, 5000, |w| w.state(1).is_some_and(|state| state.2 != ConnState::Connected));
    world.nodes[1].disks[0].faults.stick = Some(3_000_000_000);
    let said = waits(&mut world, 1, "primary", AdminCommand::Primary { force: false });
    names(&said, &["writes of the lost connection to reach the disk"]);
}

#[test]
fn a_demotion_under_load() {
    let mut world = pair(3);
    slowly(&mut world);
    load(&mut world, 0, 10);
    let said = waits(&mut world, 0, "secondary", AdminCommand::Secondary);
    names(
        &said,
        &[
            "write(s) to be acknowledged by n1",
            "writes in flight and n1 before this node becomes Secondary",
            "data and bitmap to be stable before this node becomes Secondary",
            "the superblock to say Secondary",
        ],
    );
    quiet(&mut world);
}

#[test]
fn disks_that_leave_and_come_back() {
    let mut world = pair(4);
    load(&mut world, 0, 10);
    let said = waits(&mut world, 1, "detach", AdminCommand::Detach { volume: VOLUME, force: false });
    names(&said, &["volume 0: detach, step"]);
    slowly(&mut world);
    let id = world.attach(1);
    let mut said = BTreeSet::new();
    while !world.nodes[1].answers.contains_key(&id) {
        said.extend(status(&world, 1).waiting_for);
        pass(&mut world, 5);
    }
    names(&said, &["volume 0: attach, writing"]);
    world.options.weather = Weather::default();
    quiet(&mut world);
}

#[test]
fn what_the_peer_must_agree_to() {
    let verify = || AdminCommand::Verify { volume: VOLUME, start: None, stop: None };
    let cases: [(usize, &'static str, AdminCommand, &str); 3] = [
        (1, "invalidate", AdminCommand::Invalidate(VOLUME), "n0 to agree to a resync to here"),
        (0, "invalidate-remote", AdminCommand::InvalidateRemote(VOLUME), "n1 to agree to a resync from here"),
        (0, "verify", verify(), "n1 to agree to a verify"),
    ];
    for (seed, (node, name, command, words)) in (10..).zip(cases) {
        let mut world = pair(seed);
        let said = waits(&mut world, node, name, command);
        names(&said, &[words]);
        quiet(&mut world);
    }
}

#[test]
fn a_primary_that_leaves_a_peer_which_shall_know_that_it_is_outdated() {
    let mut options = Options::new(13);
    options.net.fencing = Fencing::ResourceOnly;
    let mut world = pair_with(options);
    let said = waits(&mut world, 0, "disconnect", AdminCommand::Disconnect { force: false });
    names(&said, &["n1 to agree to being outdated"]);
    let connect = AdminCommand::Connect { discard_my_data: false, tentative: false };
    assert_eq!(verb(&mut world, 0, "connect", connect), Ok(()));
    quiet(&mut world);
}

#[test]
fn a_pair_that_is_declared_equal() {
    let mut world = World::new(Options::new(20));
    world.start(0);
    world.start(1);
    within(&mut world, 1000, |w| w.state(0).is_some_and(|state| state.2 == ConnState::Connected));
    let said = waits(
        &mut world,
        0,
        "new-current-uuid",
        AdminCommand::NewCurrentUuid { volume: VOLUME, clear_bitmap: true },
    );
    names(&said, &["n1 to agree to skipping the initial resync"]);
    quiet(&mut world);
}

#[test]
fn a_disk_declared_bad_while_nobody_listens() {
    let mut world = pair(21);
    assert_eq!(verb(&mut world, 1, "disconnect", AdminCommand::Disconnect { force: false }), Ok(()));
    let said = waits(&mut world, 1, "invalidate", AdminCommand::Invalidate(VOLUME));
    names(&said, &["volume 0: the superblock to be durable (1 verb(s))"]);
    let connect = AdminCommand::Connect { discard_my_data: false, tentative: false };
    assert_eq!(verb(&mut world, 1, "connect", connect), Ok(()));
    quiet(&mut world);
}

#[test]
fn a_verb_in_the_middle_of_a_handshake() {
    let mut world = pair(22);
    slowly(&mut world);
    world.cut(false);
    within(&mut world, 5000, |w| w.state(1).is_some_and(|state| state.2 == ConnState::Connecting));
    within(&mut world, 5000, |w| w.nodes[1].session.is_some());
    let said = waits(&mut world, 1, "invalidate", AdminCommand::Invalidate(VOLUME));
    names(&said, &["1 verb(s) for the end of the handshake with n0"]);
    quiet(&mut world);
}

#[test]
fn io_that_is_suspended() {
    let mut options = Options::new(23);
    options.resource.suspend_lease_ms = 0;
    let mut world = pair_with(options);
    slowly(&mut world);
    load(&mut world, 0, 5);
    let said = waits(&mut world, 0, "suspend-io", AdminCommand::SuspendIo);
    names(&said, &["request(s) in hand to drain"]);
    load(&mut world, 0, 2);
    pass(&mut world, 10);
    names(
        &status(&world, 0).waiting_for.into_iter().collect(),
        &["IO suspended by the operator (2 request(s) parked): drbdadm resume-io r0"],
    );
    assert_eq!(verb(&mut world, 0, "resume-io", AdminCommand::ResumeIo), Ok(()));
    quiet(&mut world);
}

#[test]
fn a_resize() {
    let mut world = pair(24);
    load(&mut world, 0, 5);
    let options = ResizeOptions::default();
    let said = waits(&mut world, 0, "resize", AdminCommand::Resize { volume: VOLUME, options });
    names(&said, &["volume 0: resize, step"]);
    quiet(&mut world);
}

#[test]
fn writes_without_a_disk_here() {
    let mut world = pair(25);
    detach(&mut world, 0);
    slowly(&mut world);
    load(&mut world, 0, 5);
    pass(&mut world, 20);
    names(&status(&world, 0).waiting_for.into_iter().collect(), &["5 write(s) to be acknowledged by n1"]);
    world.options.weather = Weather::default();
    world.attach(0);
    quiet(&mut world);
}
