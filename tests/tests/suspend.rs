//! IO that waits instead of being served: by order, and for want of a good copy (SEM §22).
use lockstep_replicator::core::config::{OnNoData, Protocol, RateControl};
use lockstep_replicator::core::event::{AdminCommand, Event, HandlerName, RequestOp};
use lockstep_replicator::core::state::{ConnState, DiskState, ReplState};
use lockstep_tests::sim::script::{
    detach, fail_writes, handler_says, load, open, pair_with, pass, quiet, runs, sectors, slow, status, verb,
    waits_for, within, written,
};
use lockstep_tests::sim::{Options, World};

fn waiting(seed: u64) -> Options {
    let mut options = Options::new(seed);
    options.resource.on_no_data = OnNoData::SuspendIo;
    options
}

/// S38: the verb answers when both copies hold everything, and nothing follows.
#[test]
fn suspend_io_answers_when_both_copies_hold_everything() {
    for (seed, protocol) in [Protocol::A, Protocol::B, Protocol::C].into_iter().enumerate() {
        let mut options = Options::new(7000 + seed as u64);
        options.net.protocol = protocol;
        let mut world = pair_with(options);
        load(&mut world, 0, 60);
        assert_eq!(verb(&mut world, 0, "suspend-io", AdminCommand::SuspendIo), Ok(()));
        assert_eq!(open(&world, 0), 0, "answered before the writes in hand were through");
        assert_eq!(sectors(&world, 0), sectors(&world, 1));
        let before = sectors(&world, 0).to_vec();
        load(&mut world, 0, 5);
        world.request(0, RequestOp::Read, 0, 8, false);
        world.flush(0);
        pass(&mut world, 1000);
        assert_eq!(open(&world, 0), 7, "a request got through");
        assert_eq!(sectors(&world, 0), before);
        assert_eq!(status(&world, 0).suspended, ["user"]);
        assert!(waits_for(&world, 0, &["suspended by the operator", "7 request(s)", "lease", "resume-io"]));
        assert_eq!(verb(&mut world, 0, "resume-io", AdminCommand::ResumeIo), Ok(()));
        quiet(&mut world);
        assert_eq!((world.failed_requests, status(&world, 0).suspended.len()), (0, 0));
    }
}

#[test]
fn a_suspension_ends_by_itself_unless_it_is_renewed() {
    let mut options = Options::new(7010);
    options.resource.suspend_lease_ms = 500;
    let mut world = pair_with(options);
    assert_eq!(verb(&mut world, 0, "suspend-io", AdminCommand::SuspendIo), Ok(()));
    load(&mut world, 0, 3);
    pass(&mut world, 400);
    assert_eq!(verb(&mut world, 0, "suspend-io", AdminCommand::SuspendIo), Ok(()));
    pass(&mut world, 400);
    assert_eq!(open(&world, 0), 3, "renewed, and yet it ended");
    pass(&mut world, 200);
    assert_eq!(open(&world, 0), 0, "not renewed, and yet it holds");
    assert!(
        world.log.iter().any(|(_, _, event)| matches!(event, Event::Note(_, text) if text.contains("lease")))
    );
    quiet(&mut world);
}

#[test]
fn a_suspended_node_loses_and_finds_its_peer() {
    let mut world = pair_with(Options::new(7020));
    load(&mut world, 0, 20);
    assert_eq!(verb(&mut world, 0, "suspend-io", AdminCommand::SuspendIo), Ok(()));
    world.cut(true);
    pass(&mut world, 100);
    load(&mut world, 0, 5);
    world.heal();
    within(&mut world, 5000, |w| w.state(0).is_some_and(|s| s.2 == ConnState::Connected));
    assert_eq!(verb(&mut world, 0, "resume-io", AdminCommand::ResumeIo), Ok(()));
    quiet(&mut world);
    assert_eq!(world.failed_requests, 0);
}

fn diskless_primary(options: Options) -> World {
    let mut world = pair_with(options);
    load(&mut world, 0, 10);
    within(&mut world, 1000, |w| open(w, 0) == 0);
    detach(&mut world, 0);
    world
}

#[test]
fn a_diskless_primary_waits_for_its_peer_and_sends_again() {
    for (seed, protocol) in [Protocol::A, Protocol::B, Protocol::C].into_iter().enumerate() {
        for cut_after in 0..12 {
            let mut options = waiting(7100 + seed as u64 * 100 + cut_after);
            options.net.protocol = protocol;
            let mut world = diskless_primary(options);
            world.cut_after = Some(world.delivered + cut_after);
            load(&mut world, 0, 4);
            world.request(0, RequestOp::Read, 64, 16, false);
            world.flush(0);
            pass(&mut world, 60);
            world.cut(true);
            world.cut_after = None;
            load(&mut world, 0, 2);
            pass(&mut world, 100);
            world.request(0, RequestOp::Read, 0, 16, false);
            pass(&mut world, 2000);
            assert!(open(&world, 0) > 0);
            assert_eq!(status(&world, 0).suspended, ["no-data"]);
            assert!(waits_for(&world, 0, &["without a good copy", "resume-io r0"]));
            world.heal();
            within(&mut world, 5000, |w| open(w, 0) == 0);
            assert_eq!(world.failed_requests, 0);
            world.attach(0);
            quiet(&mut world);
        }
    }
}

/// A demotion waits for what waits for data; the peer, or the own disk, is met all the same.
#[test]
fn a_demotion_does_not_keep_away_the_copy_that_it_waits_for() {
    for disk in [false, true] {
        let mut world = pair_with(waiting(7190 + u64::from(disk)));
        if disk {
            world.cut(true);
            pass(&mut world, 100);
            fail_writes(&mut world, 0, 1);
            load(&mut world, 0, 3);
        } else {
            detach(&mut world, 0);
            world.cut(true);
        }
        pass(&mut world, 200);
        load(&mut world, 0, 2);
        pass(&mut world, 100);
        assert_eq!(status(&world, 0).suspended, ["no-data"]);
        let id = world.admin(0, "secondary", AdminCommand::Secondary);
        pass(&mut world, 1000);
        assert!(!world.nodes[0].answers.contains_key(&id), "demoted with writes that wait");
        if disk {
            world.attach(0);
        } else {
            world.heal();
        }
        within(&mut world, 5000, |w| w.nodes[0].answers.contains_key(&id));
        assert_eq!(
            (world.nodes[0].answers[&id].is_ok(), world.failed_requests, open(&world, 0)),
            (true, 0, 0)
        );
        world.heal();
        within(&mut world, 5000, |w| w.state(0).is_some_and(|s| s.2 == ConnState::Connected));
        if !disk {
            world.attach(0);
        }
        quiet(&mut world);
    }
}

#[test]
fn io_error_is_the_default_without_a_good_copy() {
    let mut world = diskless_primary(Options::new(7200));
    handler_says(&mut world, 0, HandlerName::PriOnInconDegr, Some(0));
    world.cut(true);
    pass(&mut world, 100);
    load(&mut world, 0, 2);
    world.request(0, RequestOp::Read, 0, 16, false);
    pass(&mut world, 100);
    assert_eq!((open(&world, 0), world.failed_requests), (0, 3));
    assert_eq!(runs(&world, 0, HandlerName::PriOnInconDegr), 1);
    world.heal();
    within(&mut world, 5000, |w| w.state(0).is_some_and(|s| s.2 == ConnState::Connected));
    world.attach(0);
    quiet(&mut world);
}

/// The own disk comes back with the very data that was lost last.
#[test]
fn a_lone_primary_waits_for_its_own_disk() {
    let mut world = pair_with(waiting(7210));
    world.cut(true);
    pass(&mut world, 100);
    load(&mut world, 0, 10);
    pass(&mut world, 100);
    fail_writes(&mut world, 0, 1);
    load(&mut world, 0, 6);
    pass(&mut world, 500);
    assert_eq!(world.state(0).unwrap().1, DiskState::Diskless);
    assert!(open(&world, 0) > 0);
    assert_eq!((world.failed_requests, status(&world, 0).suspended), (0, vec!["no-data".to_owned()]));
    world.attach(0);
    within(&mut world, 2000, |w| open(w, 0) == 0);
    assert_eq!(world.failed_requests, 0);
    world.heal();
    quiet(&mut world);
}

/// `resume-io` with neither disk nor peer: what waited fails, and no copy that knows nothing of that
/// comes back under the application.
#[test]
fn resume_io_without_data_fails_what_waits() {
    let mut world = diskless_primary(waiting(7220));
    world.cut(true);
    pass(&mut world, 100);
    load(&mut world, 0, 3);
    pass(&mut world, 100);
    assert_eq!(open(&world, 0), 3);
    assert_eq!(verb(&mut world, 0, "resume-io", AdminCommand::ResumeIo), Ok(()));
    pass(&mut world, 10);
    assert_eq!((open(&world, 0), world.failed_requests), (0, 3));
    load(&mut world, 0, 1);
    pass(&mut world, 10);
    assert_eq!(world.failed_requests, 4, "fails at once from then on");
    world.heal();
    pass(&mut world, 2000);
    assert_ne!(world.state(0).unwrap().2, ConnState::Connected, "an old copy was taken");
}

/// Resend rule (SEM §7): what waited is not sent on top of a copy that forgot what it had acknowledged.
#[test]
fn a_restarted_peer_is_never_fed_replayed_writes() {
    let mut options = waiting(7230);
    options.net.protocol = Protocol::B;
    let mut world = diskless_primary(options);
    load(&mut world, 0, 10);
    world.run(0);
    let writes = written(&world, 1);
    world.crash(1, true);
    world.history.weaken(true);
    pass(&mut world, 300);
    let held = open(&world, 0);
    assert!(held > 0 && world.failed_requests == 0);
    world.start(1);
    within(&mut world, 5000, |w| open(w, 0) == 0);
    assert_eq!(usize::try_from(world.failed_requests), Ok(held));
    assert_eq!(written(&world, 1), writes);
}

/// S26: a Primary that is a resync target loses its source.
#[test]
fn no_write_lands_on_a_lone_copy_that_is_not_good() {
    for on_no_data in [OnNoData::IoError, OnNoData::SuspendIo] {
        let mut options = Options::new(7240);
        options.resource.on_no_data = on_no_data;
        options.volume.resync.control = RateControl::Fixed;
        options.volume.resync.rate_kib_s = 8000;
        let mut world = pair_with(options);
        detach(&mut world, 0);
        load(&mut world, 0, 300);
        pass(&mut world, 500);
        world.attach(0);
        within(&mut world, 2000, |w| w.state(0).is_some_and(|s| s.3 == ReplState::SyncTarget));
        load(&mut world, 0, 10);
        pass(&mut world, 2);
        world.cut(true);
        pass(&mut world, 100);
        let good = world.good_requests;
        load(&mut world, 0, 10);
        world.request(0, RequestOp::Read, 0, 8, false);
        pass(&mut world, 1000);
        assert_eq!(world.good_requests, good, "served by a copy that is not good");
        if on_no_data == OnNoData::SuspendIo {
            assert_eq!((world.failed_requests, status(&world, 0).suspended.len()), (0, 1));
        } else {
            assert_eq!(open(&world, 0), 0);
        }
        world.options.volume.resync.control = RateControl::Adaptive;
        world.heal();
        quiet(&mut world);
    }
}

/// `resume-io` waits for the end of a handshake, `suspend-io` does not: the one that was typed last counts.
#[test]
fn a_resume_that_waits_does_not_undo_a_later_suspend() {
    let mut world = pair_with(Options::new(91));
    world.cut(true);
    pass(&mut world, 100);
    slow(&mut world, 0, 900);
    world.heal();
    within(&mut world, 3000, |w| waits_for(w, 0, &["the handshake"]));
    let resume = world.admin(0, "resume-io", AdminCommand::ResumeIo);
    world.run(1);
    assert!(!world.nodes[0].answers.contains_key(&resume), "it does not wait: nothing to be seen here");
    assert_eq!(verb(&mut world, 0, "suspend-io", AdminCommand::SuspendIo), Ok(()));
    assert_eq!(world.nodes[0].answers[&resume].clone().unwrap_err().number, -18);
    load(&mut world, 0, 3);
    pass(&mut world, 5000);
    assert_eq!(open(&world, 0), 3, "a request got through");
    slow(&mut world, 0, 0);
    within(&mut world, 20_000, |w| w.state(0).is_some_and(|s| s.2 == ConnState::Connected));
    assert_eq!(verb(&mut world, 0, "resume-io", AdminCommand::ResumeIo), Ok(()));
    quiet(&mut world);
}
