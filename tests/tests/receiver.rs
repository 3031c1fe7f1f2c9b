//! The node that takes the peer's writes (SEM §7, §8): what becomes of them, and of their barriers, when link and disk
//! go in the middle of it.
use lockstep_replicator::core::config::{OnIoError, Protocol};
use lockstep_replicator::core::event::{AdminCommand, HandlerName, RequestOp};
use lockstep_replicator::core::state::{ConnState, DiskState, ReplState};
use lockstep_tests::sim::node::VOLUME;
use lockstep_tests::sim::script::{
    detach, disk, fail_metas, fail_writes, handler_says, open, pair_by, pair_with, pass, quiet, sectors,
    status, verb, waits_for, within,
};
use lockstep_tests::sim::{Options, World};

const MS: u64 = 1_000_000;

fn connected(world: &World) -> bool {
    (0..2).all(|node| world.state(node).is_some_and(|state| state.2 == ConnState::Connected))
}

/// Under protocol B a write in memory was promised, and outlives its link. Here its disk goes, too, before it could
/// begin: a barrier behind it must not be waited for.
#[test]
fn a_promised_write_and_its_barrier_end_with_their_disk() {
    for seed in 0..10 {
        let mut world = pair_by(100 + seed, Protocol::B);
        // Node 1 takes writes for a Primary without a disk when its superblock says so, and that takes its time.
        world.nodes[1].disks[0].faults.stick = Some(300 * MS);
        world.admin(0, "detach-force", AdminCommand::Detach { volume: VOLUME, force: true });
        world.request(0, RequestOp::Write, 800, 8, false);
        pass(&mut world, 100);
        assert_eq!(open(&world, 0), 1, "only the peer's stable copy counts, seed {seed}");
        world.cut(true);
        fail_metas(&mut world, 1, 1);
        within(&mut world, 1000, |w| disk(w, 1) == DiskState::Diskless);
        world.heal();
        // By the first handshake: none is left to run out.
        within(&mut world, 900, connected);
        world.attach(0);
        world.attach(1);
        quiet(&mut world);
    }
}

/// A lost session's write is still on its way to the disk: the nodes cannot meet before, and status says why.
#[test]
fn a_meeting_that_waits_for_writes_of_the_lost_connection_says_so() {
    let mut world = pair_by(200, Protocol::C);
    world.nodes[1].disks[0].faults.stick = Some(700 * MS);
    world.request(0, RequestOp::Write, 800, 8, false);
    pass(&mut world, 50);
    world.cut(false);
    pass(&mut world, 300);
    assert!(!connected(&world));
    assert!(
        waits_for(&world, 1, &["writes of the lost connection", "n0"]),
        "{:?}",
        status(&world, 1).waiting_for
    );
    quiet(&mut world);
}

/// A Primary that got its disk back is in sync, and loses a block again, before its source is through with the resync.
#[test]
fn a_target_that_fails_once_more_while_its_source_finishes_is_not_taken_for_good() {
    let mut failed_again = 0;
    for seed in 0..10 {
        let mut options = Options::new(300 + seed);
        options.volume.on_io_error = OnIoError::PassOn;
        let mut world = pair_with(options);
        detach(&mut world, 0);
        world.request(0, RequestOp::Write, 800, 64, false);
        within(&mut world, 2000, |w| open(w, 0) == 0);
        world.attach(0);
        let repl = |world: &World, node: usize| world.state(node).map(|state| state.3);
        within(&mut world, 2000, |w| repl(w, 0) == Some(ReplState::SyncTarget));
        within(&mut world, 2000, |w| repl(w, 0) == Some(ReplState::Established));
        assert_eq!(repl(&world, 1), Some(ReplState::SyncSource));
        // The source makes its empty bitmap durable; meanwhile it refuses a repair.
        world.nodes[1].disks[0].faults.stick = Some(300 * MS);
        fail_writes(&mut world, 0, 1);
        pass(&mut world, 5);
        world.request(0, RequestOp::Write, 800, 8, false);
        within(&mut world, 2000, |w| repl(w, 1) == Some(ReplState::Established));
        if disk(&world, 0) == DiskState::Inconsistent {
            failed_again += 1;
            let seen = world.states(1, 0).map(|states| states.peer_disk);
            assert_eq!(seen, Some(DiskState::Inconsistent), "seed {seed}");
            let leave = AdminCommand::Detach { volume: VOLUME, force: false };
            let refused = verb(&mut world, 1, "detach", leave).map_err(|refused| refused.number);
            assert_eq!(refused, Err(-2), "the only good copy of a Primary, seed {seed}");
        }
        within(&mut world, 2000, |w| open(w, 0) == 0);
        assert_eq!(world.failed_requests, 0);
        quiet(&mut world);
    }
    assert!(failed_again >= 5, "{failed_again} of 10");
}

/// A disk is given up between the peer's being told of it and its answer: the answer finds no disk.
#[test]
fn a_disk_that_is_given_up_before_the_peer_answers_its_attach() {
    let mut met = 0;
    for seed in 0..20 {
        let mut world = pair_by(400 + seed, Protocol::C);
        detach(&mut world, 1);
        world.request(0, RequestOp::Write, 800, 8, false);
        within(&mut world, 2000, |w| open(w, 0) == 0);
        world.options.weather.net_us[1] = 20_000;
        world.options.weather.disk_us = 100_000;
        world.attach(1);
        within(&mut world, 5000, |w| disk(w, 1) == DiskState::Negotiating);
        world.admin(1, "detach-force", AdminCommand::Detach { volume: VOLUME, force: true });
        pass(&mut world, 1);
        met += usize::from(disk(&world, 1) == DiskState::Failed);
        world.request(0, RequestOp::Write, 1600, 8, false);
        within(&mut world, 2000, |w| disk(w, 1) == DiskState::Diskless && open(w, 0) == 0);
        world.options.weather.disk_us = 400;
        world.options.weather.net_us[1] = 300;
        within(&mut world, 5000, connected);
        world.attach(1);
        quiet(&mut world);
    }
    assert!(met >= 10, "its superblock was being written in {met} of 20");
}

/// Under protocol B a write in memory was promised. One volume is about to begin a resync and holds everything up; what
/// waits for the other volume is written when the Primary is lost.
#[test]
fn a_promised_write_outlives_its_sender_while_another_volume_begins_a_resync() {
    for seed in 0..10 {
        let mut options = Options::new(500 + seed);
        options.net.protocol = Protocol::B;
        options.more_volumes = vec![32 * 2048];
        let mut world = pair_with(options);
        detach(&mut world, 1);
        world.request(0, RequestOp::Write, 800, 8, false);
        within(&mut world, 2000, |w| open(w, 0) == 0);
        let before = sectors(&world, 1).to_vec();
        handler_says(&mut world, 1, HandlerName::BeforeResyncTarget, None);
        world.attach(1);
        within(&mut world, 2000, |w| w.state(1).is_some_and(|state| state.3 == ReplState::WFSyncUUID));
        // Told done, and kept back there: one for each volume.
        world.request(0, RequestOp::Write, 80, 8, false);
        world.request_on(0, 1, RequestOp::Write, 80, 8, false);
        within(&mut world, 2000, |w| open(w, 0) == 0);
        assert_eq!(world.nodes[1].disks[1].sectors()[80..88], [0; 8], "seed {seed}");
        world.crash(0, true);
        within(&mut world, 2000, |w| w.state(1).is_some_and(|state| state.2 < ConnState::Connected));
        pass(&mut world, 300);
        assert_eq!(sectors(&world, 1), before, "the older copy is left as it is, seed {seed}");
        assert_ne!(world.nodes[1].disks[1].sectors()[80..88], [0; 8], "seed {seed}");
        handler_says(&mut world, 1, HandlerName::BeforeResyncTarget, Some(0));
        world.start(0);
        quiet(&mut world);
    }
}
