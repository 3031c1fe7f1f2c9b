//! Every verb that cannot be done is refused with DRBD's number, the facts and the next command, and changes nothing.
use lockstep_replicator::core::config::VolumeConfig;
use lockstep_replicator::core::event::{AdminCommand, Event, Input, Refusal, RequestOp};
use lockstep_replicator::core::resize::ResizeOptions;
use lockstep_replicator::core::state::{ConnState, DiskState};
use lockstep_replicator::units::VolumeNr;
use lockstep_tests::sim::node::VOLUME;
use lockstep_tests::sim::script::{detach, pair_with, pass, quiet, status, superblock, verb, within};
use lockstep_tests::sim::{Options, World};

fn pair(seed: u64) -> World {
    pair_with(Options::new(seed))
}

/// Refused with this number; the facts hold `fact`, and there is a next step.
#[track_caller]
fn refused(answer: Result<(), Refusal>, number: i32, fact: &str) {
    let refusal = answer.expect_err("it has to be refused");
    assert_eq!(refusal.number, number, "{refusal:?}");
    assert!(refusal.facts.iter().any(|known| known.contains(fact)), "{refusal:?}");
    assert!(!refusal.advice.is_empty(), "no next step: {refusal:?}");
}

fn outdate(world: &mut World, node: usize) -> Result<(), Refusal> {
    verb(world, node, "outdate", AdminCommand::Outdate(VOLUME))
}

fn new_uuid(world: &mut World, node: usize, clear_bitmap: bool) -> Result<(), Refusal> {
    verb(world, node, "new-current-uuid", AdminCommand::NewCurrentUuid { volume: VOLUME, clear_bitmap })
}

fn disconnect(world: &mut World, node: usize) -> Result<(), Refusal> {
    verb(world, node, "disconnect", AdminCommand::Disconnect { force: false })
}

fn resize(world: &mut World, node: usize) -> Result<(), Refusal> {
    let command = AdminCommand::Resize { volume: VOLUME, options: ResizeOptions::default() };
    verb(world, node, "resize", command)
}

#[test]
fn a_volume_that_is_not_there_is_named_and_so_are_those_that_are() {
    let mut world = pair(1);
    let other = VolumeNr(7);
    for command in [
        AdminCommand::Detach { volume: other, force: false },
        AdminCommand::InvalidateRemote(other),
        AdminCommand::PauseSync(other),
        AdminCommand::Outdate(other),
    ] {
        refused(verb(&mut world, 0, "a verb", command), 127, "volume(s) 0");
    }
    quiet(&mut world);
}

#[test]
fn outdate_is_for_a_secondary_that_is_alone() {
    let mut world = pair(2);
    refused(outdate(&mut world, 0), -2, "role Primary");
    refused(outdate(&mut world, 1), -6, "connection Connected");
    assert_eq!(disconnect(&mut world, 1), Ok(()));
    // The Primary had it outdated while it left; a second time is no error.
    within(&mut world, 1000, |w| w.state(1).is_some_and(|s| s.2 == ConnState::StandAlone));
    assert_eq!(outdate(&mut world, 1), Ok(()));
    assert_eq!(outdate(&mut world, 1), Ok(()));
    assert_eq!(world.state(1).map(|state| state.1), Some(DiskState::Outdated));
    // It is durable: the node still knows after a loss of power.
    world.crash(1, true);
    world.cut(true);
    world.start(1);
    pass(&mut world, 200);
    assert_eq!(world.state(1).map(|state| state.1), Some(DiskState::Outdated));
    detach(&mut world, 1);
    refused(outdate(&mut world, 1), -16, "disk Diskless");
    world.attach(1);
    world.heal();
    quiet(&mut world);
}

/// One of them only: the peer would mark everything for a resync that no longer fits when its answer comes.
#[test]
fn a_promotion_and_an_invalidate_of_one_node_exclude_each_other() {
    for promote_first in [true, false] {
        let mut world = pair(20 + u64::from(promote_first));
        assert_eq!(verb(&mut world, 0, "secondary", AdminCommand::Secondary), Ok(()));
        quiet(&mut world);
        let promote = AdminCommand::Primary { force: false };
        let invalidate = AdminCommand::Invalidate(VOLUME);
        let (first, second) = if promote_first { (promote, invalidate) } else { (invalidate, promote) };
        let id = world.admin(1, "the first", first);
        let fact = if promote_first { "a role change" } else { "a resync to here" };
        refused(verb(&mut world, 1, "the second", second), -18, fact);
        within(&mut world, 1000, |w| w.nodes[1].answers.contains_key(&id));
        assert_eq!(world.nodes[1].answers[&id], Ok(()));
        assert_eq!(world.is_primary(1), promote_first);
        quiet(&mut world);
    }
}

#[test]
fn a_new_generation_is_not_started_under_a_connection_nor_without_a_disk() {
    let mut world = pair(3);
    refused(new_uuid(&mut world, 0, false), 151, "connection Connected");
    detach(&mut world, 1);
    refused(new_uuid(&mut world, 1, false), 138, "connection Connected");
    world.attach(1);
    quiet(&mut world);
}

#[test]
fn a_fresh_disk_that_is_declared_good_is_up_to_date_at_once_and_after_a_restart() {
    let mut world = World::new(Options::new(4));
    world.cut(true);
    world.start(0);
    pass(&mut world, 100);
    assert_eq!(disconnect(&mut world, 0), Ok(()));
    assert_eq!(world.state(0).map(|state| state.1), Some(DiskState::Inconsistent));
    let before = superblock(&world, 0).uuid[0];
    assert_eq!(new_uuid(&mut world, 0, true), Ok(()));
    assert_eq!(world.state(0).map(|state| state.1), Some(DiskState::UpToDate));
    assert_ne!(superblock(&world, 0).uuid[0], before);
    world.crash(0, true);
    world.start(0);
    pass(&mut world, 100);
    assert!(world.state(0).is_some_and(|state| state.1 >= DiskState::Consistent));
}

#[test]
fn nobody_leaves_who_holds_the_only_good_copy_of_an_application() {
    let mut world = pair(5);
    detach(&mut world, 0);
    refused(disconnect(&mut world, 0), -2, "only the peer has good data");
    refused(disconnect(&mut world, 1), -2, "is the only good copy");
    let gone = AdminCommand::Detach { volume: VOLUME, force: false };
    refused(verb(&mut world, 1, "detach", gone), -2, "is the only good copy");
    refused(verb(&mut world, 1, "down", AdminCommand::Down), -2, "is the only good copy");
    world.request(0, RequestOp::Write, 800, 8, false);
    pass(&mut world, 100);
    assert_eq!(world.failed_requests, 0);
    world.attach(0);
    quiet(&mut world);
}

#[test]
fn a_device_in_use_is_neither_demoted_nor_taken_down() {
    let mut world = pair(6);
    world.feed(0, Input::Opened(VOLUME));
    let open = "is held open by 1 client(s)";
    refused(verb(&mut world, 0, "secondary", AdminCommand::Secondary), -12, open);
    refused(verb(&mut world, 0, "down", AdminCommand::Down), -12, open);
    assert!(world.is_primary(0));
    world.feed(0, Input::Closed(VOLUME));
    assert_eq!(verb(&mut world, 0, "secondary", AdminCommand::Secondary), Ok(()));
    quiet(&mut world);
}

#[test]
fn a_second_down_waits_for_nobody() {
    let mut world = pair(7);
    let ids = [0, 1].map(|_| world.admin(1, "down", AdminCommand::Down));
    within(&mut world, 5000, |w| ids.iter().all(|id| w.nodes[1].answers.contains_key(id)));
    refused(world.nodes[1].answers[&ids[1]].clone(), -18, "another down is running");
    assert_eq!(world.nodes[1].answers[&ids[0]], Ok(()));
}

#[test]
fn a_disk_is_attached_once() {
    let mut world = pair(8);
    let id = world.attach(1);
    within(&mut world, 1000, |w| w.nodes[1].answers.contains_key(&id));
    refused(world.nodes[1].answers[&id].clone(), 124, "UpToDate");
    quiet(&mut world);
}

#[test]
fn resize_wants_a_disk_and_excludes_other_procedures() {
    let mut world = pair(9);
    let options = ResizeOptions::default();
    let asked = [0, 1].map(|_| world.admin(0, "resize", AdminCommand::Resize { volume: VOLUME, options }));
    let gone = world.admin(0, "detach", AdminCommand::Detach { volume: VOLUME, force: false });
    within(&mut world, 5000, |w| {
        [asked[0], asked[1], gone].iter().all(|id| w.nodes[0].answers.contains_key(id))
    });
    refused(world.nodes[0].answers[&asked[1]].clone(), -18, "disk here UpToDate");
    refused(world.nodes[0].answers[&gone].clone(), -18, "a resize of");
    assert_eq!(world.nodes[0].answers[&asked[0]], Ok(()));
    quiet(&mut world);
    assert_eq!(disconnect(&mut world, 1), Ok(()));
    detach(&mut world, 1);
    refused(resize(&mut world, 1), -11, "disk here Diskless");
    assert_eq!(status(&world, 1).volumes[0].disk, DiskState::Diskless);
}

#[test]
fn options_of_other_volumes_are_refused_and_those_of_the_log_wait_for_the_next_attach() {
    let mut world = pair(10);
    let net = world.options.net.clone();
    let configure = |volumes| AdminCommand::Configure { net: Box::new(net.clone()), volumes };
    let other = VolumeConfig { nr: VolumeNr(3), ..world.options.volume.clone() };
    refused(verb(&mut world, 0, "adjust", configure(vec![other])), 103, "1 volume(s)");
    refused(verb(&mut world, 0, "adjust", configure(Vec::new())), 103, "1 volume(s)");
    let larger = VolumeConfig { al_extents: 257, ..world.options.volume.clone() };
    assert_eq!(verb(&mut world, 0, "adjust", configure(vec![larger])), Ok(()));
    let told = world.log.iter().any(|(_, node, event)| {
        *node == 0 && matches!(event, Event::Note(_, text) if text.contains("count from the next attach"))
    });
    assert!(told, "the operator is not told that al-extents wait");
    quiet(&mut world);
}

#[test]
fn a_secondary_serves_no_application() {
    let mut world = pair(11);
    let before = world.failed_requests;
    world.flush(1);
    world.request(1, RequestOp::Read, 0, 8, false);
    world.request(1, RequestOp::Write, 0, 8, false);
    world.flush_on(0, 5);
    pass(&mut world, 10);
    assert_eq!(world.failed_requests - before, 4);
    quiet(&mut world);
}
