//! Promises that only show when something ends at the wrong moment. Most of these notice a planted defect that
//! nothing else does; see `docs/planted-faults.md`.
use lockstep_replicator::core::config::{OnIoError, Protocol};
use lockstep_replicator::core::event::{AdminCommand, Event, RequestOp};
use lockstep_replicator::core::state::{ConnState, DiskState, ReplState};
use lockstep_replicator::meta::flags;
use lockstep_replicator::units::{BlockRange, Sector, SectorCount};
use lockstep_tests::sim::meta_area::MetaFate;
use lockstep_tests::sim::node::VOLUME;
use lockstep_tests::sim::script::{
    detach, fail_writes, load, open, pair_with, pass, quiet, sectors, slow, superblock, verb, within, written,
};
use lockstep_tests::sim::{Options, World};

/// Sectors that an extent of the activity log covers.
const EXTENT: u64 = 8192;
const EXTENTS: u64 = 72;
/// The smallest activity log there is.
const SLOTS: u64 = 67;

/// The log has no room for all extents of the disk.
fn small_log(seed: u64) -> World {
    let mut options = Options::new(seed);
    options.sectors = EXTENTS * EXTENT;
    options.volume.al_extents = 67;
    pair_with(options)
}

fn first_block() -> BlockRange {
    BlockRange::new(Sector(0), SectorCount(8)).expect("a range")
}

/// How often a node dropped a connection that was up.
fn dropped(world: &World) -> usize {
    let drop =
        |event: &Event| matches!(event, Event::Note(_, text) if text.contains("dropping the connection"));
    world.log.iter().filter(|(_, _, event)| drop(event)).count()
}

fn write(world: &mut World, sector: u64) {
    let done = world.good_requests + world.failed_requests + 1;
    world.request(0, RequestOp::Write, sector, 8, false);
    within(world, 2000, |w| w.good_requests + w.failed_requests >= done);
}

#[test]
fn what_an_extent_marked_is_on_disk_before_the_log_forgets_it() {
    for seed in 0..4 {
        let mut world = small_log(seed);
        world.cut(true);
        pass(&mut world, 50);
        // Back and forth, so that each is evicted with marks of its own.
        for extent in (0..EXTENTS).chain(0..EXTENTS) {
            write(&mut world, extent * EXTENT + 64 * (1 + extent) + 8 * seed);
        }
        world.crash(0, true);
        world.start(0);
        world.heal();
        quiet(&mut world);
        assert_eq!(sectors(&world, 0), sectors(&world, 1));
    }
}

#[test]
fn an_extent_stays_hot_until_the_peer_has_its_writes_on_stable_storage() {
    for seed in 0..6 {
        let mut world = small_log(100 + seed);
        // The peer's flush does not end: the first write is done, and only in its cache; every slot is in use.
        world.nodes[1].disks[0].faults.stuck_flushes = true;
        let before = world.good_requests;
        for extent in 0..SLOTS {
            world.request(0, RequestOp::Write, extent * EXTENT + 8 * seed, 8, false);
        }
        within(&mut world, 2000, |w| w.good_requests > before);
        for extent in SLOTS..EXTENTS {
            world.request(0, RequestOp::Write, extent * EXTENT, 8, false);
        }
        pass(&mut world, 50);
        let hot = world.nodes[0].disks[0].meta.hot_extents().expect("a log that can be read");
        assert!(hot.contains(&0), "the slot of a write that is in the peer's cache only was given away");
        world.crash(0, false);
        world.crash(1, true);
        world.nodes[1].disks[0].faults.stuck_flushes = false;
        world.start(0);
        world.start(1);
        quiet(&mut world);
        assert_eq!(sectors(&world, 0), sectors(&world, 1), "seed {seed}");
    }
}

/// A Primary takes its disk back and is a target then; what comes to it comes late.
fn primary_as_target(seed: u64) -> World {
    let mut world = pair_with(Options::new(seed));
    detach(&mut world, 0);
    load(&mut world, 0, 200);
    within(&mut world, 5000, |w| open(w, 0) == 0);
    slow(&mut world, 0, 10);
    world.attach(0);
    within(&mut world, 5000, |w| w.state(0).is_some_and(|s| s.3 == ReplState::SyncTarget));
    world
}

#[test]
fn a_write_that_is_refused_for_want_of_good_data_leaves_no_trace() {
    let mut world = primary_as_target(32);
    world.cut(true);
    within(&mut world, 5000, |w| w.state(0).is_some_and(|s| s.2 < ConnState::Connected));
    pass(&mut world, 100);
    let (before, failed) = (sectors(&world, 0).to_vec(), world.failed_requests);
    world.request(0, RequestOp::Write, 800, 8, false);
    within(&mut world, 2000, |w| w.failed_requests > failed);
    assert!(sectors(&world, 0) == before, "refused, and written all the same");
}

#[test]
fn what_a_primary_writes_on_its_disk_while_that_is_a_target_is_not_overwritten_by_older_replies() {
    for seed in 0..6 {
        let mut world = primary_as_target(40 + seed);
        for _ in 0..40 {
            load(&mut world, 0, 5);
            pass(&mut world, 3);
        }
        slow(&mut world, 0, 0);
        quiet(&mut world);
        assert!(sectors(&world, 0) == sectors(&world, 1), "seed {seed}");
    }
}

#[test]
fn a_block_that_failed_behind_the_cursor_is_copied_in_another_pass() {
    let mut options = Options::new(50);
    options.volume.on_io_error = OnIoError::PassOn;
    let mut world = pair_with(options);
    verb(&mut world, 1, "disconnect", AdminCommand::Disconnect { force: false }).expect("it leaves");
    load(&mut world, 0, 400);
    within(&mut world, 5000, |w| open(w, 0) == 0);
    slow(&mut world, 0, 20);
    world.admin(1, "connect", AdminCommand::Connect { discard_my_data: false, tentative: false });
    within(&mut world, 5000, |w| w.state(1).is_some_and(|s| s.3 == ReplState::SyncTarget));
    within(&mut world, 5000, |w| {
        w.nodes[1].core.as_ref().and_then(|c| c.out_of_sync_bits(VOLUME)) < Some(390)
    });
    // What was asked for ends; the cursor stands in the middle.
    verb(&mut world, 1, "pause-sync", AdminCommand::PauseSync(VOLUME)).expect("it pauses");
    pass(&mut world, 200);
    assert_eq!(world.state(1).map(|s| s.3), Some(ReplState::PausedSyncT));
    // Done at the target, and the source's disk refuses it after a while: marked on both, at the very beginning.
    world.nodes[0].disks[0].faults.stick = Some(100_000_000);
    fail_writes(&mut world, 0, 1);
    world.request(0, RequestOp::Write, 0, 8, false);
    pass(&mut world, 300);
    assert!(world.nodes[1].core.as_ref().unwrap().is_out_of_sync(VOLUME, first_block()));
    let drops = dropped(&world);
    verb(&mut world, 1, "resume-sync", AdminCommand::ResumeSync(VOLUME)).expect("it goes on");
    slow(&mut world, 0, 0);
    quiet(&mut world);
    assert!(sectors(&world, 0) == sectors(&world, 1));
    assert_eq!(dropped(&world), drops, "in the same resync");
}

#[test]
fn a_full_resync_that_was_promised_survives_any_stop() {
    for n in 0..8 {
        let mut options = Options::new(60);
        options.sectors = EXTENTS * EXTENT;
        let mut world = pair_with(options);
        world.request(0, RequestOp::Write, 8000, 8, false);
        quiet(&mut world);
        // Nobody knows of this difference; that is what the operator orders a full copy for.
        world.check_data = false;
        world.oracle.check_marks = false;
        world.nodes[1].disks[0].rot(40 * EXTENT, 77);
        world.meta_fate = Some(MetaFate::Old);
        world.crash_at_meta = Some((1, n, false));
        let id = world.admin(1, "invalidate", AdminCommand::Invalidate(VOLUME));
        pass(&mut world, 3000);
        let promised = world.nodes[1].answers.get(&id).is_some_and(Result::is_ok);
        if world.nodes[1].core.is_none() {
            world.start(1);
        }
        within(&mut world, 20_000, |w| w.in_sync() && w.idle());
        let equal = sectors(&world, 0) == sectors(&world, 1);
        assert!(equal || !promised, "stopped at metadata write {n}: the full copy was forgotten");
    }
}

#[test]
fn a_target_that_still_calls_itself_consistent_takes_no_new_write() {
    let (early, late) = (800, 40_000);
    for n in 0..10 {
        let mut world = pair_with(Options::new(70));
        world.oracle.check_minimal = false;
        verb(&mut world, 1, "disconnect", AdminCommand::Disconnect { force: false }).expect("it leaves");
        world.request(0, RequestOp::Write, early, 8, false);
        within(&mut world, 2000, |w| open(w, 0) == 0);
        world.meta_fate = Some(MetaFate::Old);
        world.crash_at_meta = Some((1, n, false));
        world.admin(1, "connect", AdminCommand::Connect { discard_my_data: false, tentative: false });
        let mut at = late;
        for _ in 0..400 {
            if world.nodes[1].core.is_none() {
                break;
            }
            world.request(0, RequestOp::Write, at, 8, false);
            at += 8;
            pass(&mut world, 1);
        }
        let place = |sector: u64| usize::try_from(sector).unwrap_or(0);
        let consistent = superblock(&world, 1).flags & flags::CONSISTENT != 0;
        let (own, good) = (sectors(&world, 1), sectors(&world, 0));
        let newer = (late..at).any(|sector| own[place(sector)] != 0);
        let whole = own[place(early)] == good[place(early)];
        assert!(
            whole || !newer || !consistent,
            "stop {n}: a newer write without an older one, and Consistent"
        );
    }
}

#[test]
fn a_write_that_failed_on_the_only_disk_of_a_diskless_primary_is_an_error() {
    let mut world = pair_with(Options::new(31));
    detach(&mut world, 0);
    fail_writes(&mut world, 1, 1);
    let before = world.good_requests;
    world.request(0, RequestOp::Write, 800, 8, false);
    pass(&mut world, 500);
    assert_eq!(world.good_requests, before, "acknowledged, and no disk has it");
}

#[test]
fn a_primary_that_loses_its_source_in_a_resync_writes_to_its_half_of_a_copy_no_more() {
    let mut world = pair_with(Options::new(32));
    detach(&mut world, 0);
    for block in 0..400 {
        world.request(0, RequestOp::Write, block * 16, 8, false);
    }
    pass(&mut world, 500);
    slow(&mut world, 0, 40);
    world.attach(0);
    within(&mut world, 5000, |w| w.state(0).is_some_and(|s| s.1 == DiskState::Inconsistent));
    world.cut(true);
    within(&mut world, 2000, |w| w.state(0).is_some_and(|s| s.2 < ConnState::Connected));
    let (good, failed) = (world.good_requests, world.failed_requests);
    world.request(0, RequestOp::Write, 40_000, 8, false);
    pass(&mut world, 200);
    assert_eq!((world.good_requests - good, world.failed_requests - failed), (0, 1));
    slow(&mut world, 0, 0);
    world.heal();
    quiet(&mut world);
}

#[test]
fn invalidate_remote_of_a_node_that_is_alone_survives_a_loss_of_power_as_soon_as_it_is_answered() {
    let mut answered = 0;
    for n in 0..40 {
        let mut world = pair_with(Options::new(33));
        let gone = AdminCommand::Disconnect { force: true };
        assert_eq!(verb(&mut world, 0, "disconnect", gone), Ok(()));
        pass(&mut world, 100);
        let id = world.admin(0, "invalidate-remote", AdminCommand::InvalidateRemote(VOLUME));
        if n > 0 {
            let last = world.now + n * 50_000;
            while world.now < last && world.step(last) {}
        }
        let promised = world.nodes[0].answers.get(&id) == Some(&Ok(()));
        answered += u64::from(promised);
        world.crash(0, true);
        world.start(0);
        let connect = || AdminCommand::Connect { discard_my_data: false, tentative: false };
        world.admin(0, "connect", connect());
        world.admin(1, "connect", connect());
        quiet(&mut world);
        let copied = world.log.iter().rev().find_map(|(_, _, event)| match event {
            Event::ResyncDone { bits_total, .. } => Some(*bits_total),
            _ => None,
        });
        if promised {
            assert_eq!(copied, Some(world.options.sectors / 8), "cut after {n} x 50 us");
        }
    }
    assert!(answered > 0, "never answered in time");
}

#[test]
fn a_target_says_that_it_is_done_when_its_superblock_says_so() {
    for seed in 0..40 {
        let mut world = pair_with(Options::new(200 + seed));
        world.cut(true);
        pass(&mut world, 50);
        write(&mut world, 4096);
        world.heal();
        within(&mut world, 5000, |w| w.state(1).is_some_and(|s| s.1 == DiskState::Inconsistent));
        within(&mut world, 5000, |w| w.states(0, 0).is_some_and(|s| s.peer_disk == DiskState::UpToDate));
        let known = superblock(&world, 1).flags;
        assert_ne!(
            known & flags::CONSISTENT,
            0,
            "seed {seed}: a loss of power now would leave the peer without a copy"
        );
        quiet(&mut world);
    }
}

#[test]
fn a_full_resync_that_was_promised_survives_a_loss_of_power_on_both_nodes() {
    let (mut answered, mut kept) = (0, 0);
    for n in 0..60 {
        for (node, command) in
            [(1, AdminCommand::Invalidate(VOLUME)), (0, AdminCommand::InvalidateRemote(VOLUME))]
        {
            let mut options = Options::new(61 + n);
            options.sectors = EXTENTS * EXTENT;
            let mut world = pair_with(options);
            // Nobody knows of this difference; that is what the operator orders a full copy for.
            world.check_data = false;
            world.oracle.check_marks = false;
            world.nodes[1].disks[0].rot(40 * EXTENT, 77);
            world.meta_fate = Some(MetaFate::Old);
            let id = world.admin(node, "invalidate", command);
            let last = world.now + n * 100_000;
            while world.now < last && world.step(last) {}
            let promised = world.nodes[node].answers.get(&id) == Some(&Ok(()));
            answered += u64::from(promised);
            (0..2).for_each(|node| world.crash(node, true));
            (0..2).for_each(|node| world.start(node));
            within(&mut world, 20_000, |w| w.in_sync() && w.idle());
            let equal = sectors(&world, 0) == sectors(&world, 1);
            kept += u64::from(equal);
            assert!(
                equal || !promised,
                "node {node}, stopped after {n} x 100 us: the full copy was forgotten"
            );
        }
    }
    assert!((10..120).contains(&answered) && kept < 120, "{answered} answered, {kept} kept");
}

/// The link is lost before the superblocks say that everything is to be copied; they say so afterwards.
#[test]
fn a_full_resync_that_was_promised_survives_the_loss_of_the_link() {
    let mut options = Options::new(130);
    options.sectors = EXTENTS * EXTENT;
    let mut world = pair_with(options);
    world.check_data = false;
    world.oracle.check_minimal = false;
    world.oracle.check_marks = false;
    world.nodes[1].disks[0].rot(40 * EXTENT, 77);
    let id = world.admin(1, "invalidate", AdminCommand::Invalidate(VOLUME));
    within(&mut world, 1000, |w| w.state(1).is_some_and(|s| s.3 == ReplState::WFBitMapT));
    for node in 0..2 {
        world.nodes[node].disks[0].faults.stick = Some(500_000_000);
    }
    pass(&mut world, 50);
    assert!(!world.nodes[1].answers.contains_key(&id), "done, and nothing is recorded");
    world.cut(true);
    within(&mut world, 2000, |w| w.nodes[1].answers.contains_key(&id));
    assert_eq!(world.nodes[1].answers[&id], Ok(()));
    world.heal();
    within(&mut world, 20_000, |w| w.in_sync() && w.idle());
    assert!(sectors(&world, 0) == sectors(&world, 1), "the full copy was forgotten");
}

/// The peer's disk takes its time over a write, the link is lost and comes back: the answer belonged to the
/// session that is gone. Whoever sent it would get a connection of somebody else into trouble.
#[test]
fn what_was_asked_in_an_earlier_session_is_not_answered_in_the_next() {
    for protocol in [Protocol::A, Protocol::B, Protocol::C] {
        let mut options = Options::new(140);
        options.net.protocol = protocol;
        let mut world = pair_with(options);
        world.nodes[1].disks[0].faults.stick = Some(1_000_000_000);
        world.request(0, RequestOp::Write, 800, 8, false);
        pass(&mut world, 50);
        assert!(!world.nodes[1].ios.is_empty(), "the peer is at it");
        world.cut(true);
        pass(&mut world, 100);
        world.heal();
        let drops = dropped(&world);
        // The new session waits for the write; then both go on in it.
        pass(&mut world, 200);
        assert!(world.state(0).is_some_and(|s| s.2 == ConnState::Connecting));
        quiet(&mut world);
        assert_eq!(dropped(&world), drops, "{protocol:?}");
    }
}

/// Node 1 missed a write and comes back.
fn comes_back(seed: u64) -> World {
    let mut world = pair_with(Options::new(seed));
    verb(&mut world, 1, "disconnect", AdminCommand::Disconnect { force: false }).expect("it leaves");
    write(&mut world, 800);
    world.admin(1, "connect", AdminCommand::Connect { discard_my_data: false, tentative: false });
    world
}

#[test]
fn no_block_is_copied_to_a_disk_that_still_calls_itself_consistent() {
    for seed in 0..6 {
        let mut world = comes_back(150 + seed);
        within(&mut world, 2000, |w| w.state(1).is_some_and(|s| s.3 == ReplState::WFSyncUUID));
        // The next thing it writes is its superblock.
        world.nodes[1].disks[0].faults.stick = Some(500_000_000);
        let before = written(&world, 1);
        within(&mut world, 2000, |w| w.state(1).is_some_and(|s| s.1 == DiskState::Inconsistent));
        pass(&mut world, 300);
        assert_ne!(superblock(&world, 1).flags & flags::CONSISTENT, 0, "the superblock is on its way");
        assert_eq!(written(&world, 1), before, "seed {seed}: copied to a disk that calls itself consistent");
        quiet(&mut world);
    }
}

/// A write during the exchange of the bitmaps is not mirrored: the target hears of it, and asks for it.
#[test]
fn what_is_written_while_bitmaps_are_exchanged_is_copied_in_the_same_resync() {
    for seed in 0..6 {
        let mut world = comes_back(160 + seed);
        within(&mut world, 2000, |w| w.state(0).is_some_and(|s| s.3 == ReplState::WFBitMapS));
        let drops = dropped(&world);
        world.request(0, RequestOp::Write, 4000 + 8 * seed, 8, false);
        within(&mut world, 2000, |w| open(w, 0) == 0);
        quiet(&mut world);
        assert_eq!(dropped(&world), drops, "seed {seed}: the target did not know of it");
    }
}
