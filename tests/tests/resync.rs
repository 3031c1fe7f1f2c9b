//! Stories of the resync engine: what is copied, what is only compared, what stands still, and what a
//! write in the middle does to it. Both cores run; the simulated disks are compared at the end.
use lockstep_proto::Message;
use lockstep_replicator::core::config::{RateControl, ResyncConfig};
use lockstep_replicator::core::event::{AdminCommand, Event, HandlerName, Input, RequestOp};
use lockstep_replicator::core::state::{ConnState, DiskState, ReplState};
use lockstep_replicator::core::status::ResyncStatus;
use lockstep_tests::sim::node::VOLUME;
use lockstep_tests::sim::{Options, World};

fn pair(seed: u64) -> World {
    pair_with(Options::new(seed))
}

/// A pair in sync, node 0 Primary.
fn pair_with(options: Options) -> World {
    let mut world = World::new(options);
    world.start(0);
    world.start(1);
    ok(&mut world, 1000, |w| w.state(0).is_some_and(|s| s.2 == ConnState::Connected));
    world.admin(0, "primary-force", AdminCommand::Primary { force: true });
    ok(&mut world, 120_000, |w| w.in_sync() && w.is_primary(0) && w.idle());
    quiet(&mut world);
    world
}

fn ok(world: &mut World, ms: u64, done: impl FnMut(&World) -> bool) {
    let held = world.run_until(ms, done);
    assert_eq!(world.broken, None);
    assert!(held, "not within {ms} ms: {:?} {:?}", world.state(0), world.state(1));
}

fn quiet(world: &mut World) {
    ok(world, 60_000, |w| w.in_sync() && w.idle());
    world.check_quiet();
    world.check_content(0);
    world.check_content(1);
    assert_eq!(world.broken, None);
}

fn write(world: &mut World, first: u64, len: u64) {
    world.request(0, RequestOp::Write, first, len, false);
}

fn verb(world: &mut World, node: usize, name: &'static str, command: AdminCommand) -> Result<(), i32> {
    let id = world.admin(node, name, command);
    ok(world, 20_000, |w| w.nodes[node].answers.contains_key(&id));
    world.nodes[node].answers[&id].clone().map_err(|refusal| refusal.number)
}

/// The link is down, `blocks` blocks of 4 KiB differ, the link is up again.
fn part_and_write(world: &mut World, blocks: u64) {
    world.cut(true);
    world.run(50);
    for block in 0..blocks {
        write(world, block * 8, 8);
        if block % 64 == 63 {
            world.run(20);
        }
    }
    world.run(200);
    world.heal();
}

fn repl(world: &World, node: usize) -> Option<ReplState> {
    world.state(node).map(|state| state.3)
}

fn progress(world: &World, node: usize) -> Option<ResyncStatus> {
    world.status(node)?.connection.peer_volumes[0].resync.clone()
}

fn slow(seed: u64, kib_s: u64) -> Options {
    let mut options = Options::new(seed);
    options.sectors = 4 * 2048;
    options.volume.resync =
        ResyncConfig { control: RateControl::Fixed, rate_kib_s: kib_s, ..ResyncConfig::default() };
    options
}

#[test]
fn a_fixed_rate_is_kept() {
    let mut world = pair_with(slow(1, 2000));
    part_and_write(&mut world, 500);
    ok(&mut world, 5000, |w| repl(w, 1) == Some(ReplState::SyncTarget));
    let began = world.now;
    ok(&mut world, 20_000, |w| repl(w, 1) == Some(ReplState::Established));
    // 500 blocks of 4 KiB at 2000 KiB/s.
    let ms = (world.now - began) / 1_000_000;
    assert!((800..1500).contains(&ms), "{ms} ms");
    quiet(&mut world);
}

#[test]
fn drbds_controller_ends_a_resync_too() {
    let mut options = Options::new(2);
    options.sectors = 8 * 2048;
    options.volume.resync = ResyncConfig {
        control: RateControl::Planned,
        rate_kib_s: 2000,
        fill_target_sectors: 2000,
        ..ResyncConfig::default()
    };
    let mut world = pair_with(options);
    part_and_write(&mut world, 800);
    quiet(&mut world);
}

#[test]
fn only_what_changed_is_copied() {
    // I9: no more is written on the target than was marked.
    let mut world = pair(3);
    let before = world.nodes[1].disks[0].written_sectors;
    part_and_write(&mut world, 100);
    quiet(&mut world);
    assert_eq!(world.nodes[1].disks[0].written_sectors - before, 800);
}

#[test]
fn equal_blocks_are_not_copied_again() {
    // Protocol C and a full resync of equal disks: with csums-alg nothing but digests moves.
    let mut options = Options::new(4);
    options.net.csums_alg = Some("sha1".into());
    let mut world = pair_with(options);
    for block in 0..64 {
        write(&mut world, block * 8, 8);
    }
    quiet(&mut world);
    let before = world.nodes[1].disks[0].written_sectors;
    assert_eq!(verb(&mut world, 1, "invalidate", AdminCommand::Invalidate(VOLUME)), Ok(()));
    quiet(&mut world);
    assert_eq!(world.nodes[1].disks[0].written_sectors, before);
    let told = world.log.iter().any(
        |(_, node, event)| matches!(event, Event::Note(_, text) if *node == 1 && text.contains("100 % had equal checksums")),
    );
    assert!(told, "the saving is reported");
}

#[test]
fn a_checksum_resync_copies_what_differs() {
    let mut options = Options::new(5);
    options.net.csums_alg = Some("sha1".into());
    let mut world = pair_with(options);
    part_and_write(&mut world, 40);
    quiet(&mut world);
    // Under load as well, and with the target dying in the middle.
    for round in 0..6 {
        part_and_write(&mut world, 200);
        ok(&mut world, 5000, |w| repl(w, 1) == Some(ReplState::SyncTarget));
        for _ in 0..20 {
            let first = world.rng.below(1600) / 8 * 8;
            write(&mut world, first, 16);
            world.run(1);
        }
        if round % 2 == 0 {
            world.crash(1, true);
            world.history.weaken(true);
            world.run(30);
            world.start(1);
        }
        quiet(&mut world);
    }
}

#[test]
fn checksums_only_after_a_crash_if_so_configured() {
    let mut options = Options::new(6);
    options.net.csums_alg = Some("sha1".into());
    options.net.csums_after_crash_only = true;
    let mut world = pair_with(options);
    let before = world.nodes[1].disks[0].written_sectors;
    assert_eq!(verb(&mut world, 1, "invalidate", AdminCommand::Invalidate(VOLUME)), Ok(()));
    quiet(&mut world);
    assert_eq!(world.nodes[1].disks[0].written_sectors - before, world.options.sectors);
}

#[test]
fn zeroes_are_discarded_by_whole_granules() {
    let mut options = Options::new(7);
    options.volume.resync.discard_granularity_bytes = 65_536;
    let mut world = pair_with(options);
    write(&mut world, 0, 64);
    write(&mut world, 1024, 8);
    quiet(&mut world);
    assert_eq!(verb(&mut world, 1, "invalidate", AdminCommand::Invalidate(VOLUME)), Ok(()));
    // Cut in the middle, right behind the discards (S06).
    ok(&mut world, 5000, |w| progress(w, 1).is_some_and(|p| p.bits_left < p.bits_total));
    world.cut(false);
    quiet(&mut world);
}

#[test]
fn a_pause_holds_on_both_sides_until_both_agree() {
    let mut world = pair_with(slow(8, 1000));
    part_and_write(&mut world, 400);
    ok(&mut world, 5000, |w| repl(w, 1) == Some(ReplState::SyncTarget));
    assert_eq!(verb(&mut world, 0, "pause-sync", AdminCommand::PauseSync(VOLUME)), Ok(()));
    assert_eq!(verb(&mut world, 0, "pause-sync", AdminCommand::PauseSync(VOLUME)), Err(134));
    ok(&mut world, 100, |w| repl(w, 1) == Some(ReplState::PausedSyncT));
    assert_eq!(repl(&world, 0), Some(ReplState::PausedSyncS));
    assert_eq!(verb(&mut world, 1, "resume-sync", AdminCommand::ResumeSync(VOLUME)), Err(157));
    world.run(500);
    let left = progress(&world, 1).unwrap().bits_left;
    assert!(left > 100, "{left}");
    // Writes go to both copies meanwhile, and clear their blocks on both sides (S02, S04).
    for block in 390..400 {
        write(&mut world, block * 8, 8);
    }
    world.run(3000);
    let after = progress(&world, 1).unwrap();
    assert_eq!(after.bits_left, left - 10);
    assert_eq!(progress(&world, 0).unwrap().bits_left, left - 10);
    assert_eq!(after.eta_s, None);
    assert_eq!(world.status(1).unwrap().connection.peer_volumes[0].suspended, "peer");
    // Both sides pause: one resume is not enough.
    assert_eq!(verb(&mut world, 1, "pause-sync", AdminCommand::PauseSync(VOLUME)), Ok(()));
    assert_eq!(verb(&mut world, 0, "resume-sync", AdminCommand::ResumeSync(VOLUME)), Ok(()));
    world.run(500);
    assert_eq!(repl(&world, 0), Some(ReplState::PausedSyncS));
    assert_eq!(verb(&mut world, 1, "resume-sync", AdminCommand::ResumeSync(VOLUME)), Ok(()));
    quiet(&mut world);
    assert_eq!(verb(&mut world, 1, "resume-sync", AdminCommand::ResumeSync(VOLUME)), Err(135));
}

#[test]
fn a_pause_survives_a_new_connection_and_progress_a_restart() {
    let mut world = pair_with(slow(9, 1000));
    part_and_write(&mut world, 400);
    ok(&mut world, 5000, |w| repl(w, 1) == Some(ReplState::SyncTarget));
    world.run(800);
    assert_eq!(verb(&mut world, 0, "pause-sync", AdminCommand::PauseSync(VOLUME)), Ok(()));
    world.run(3000);
    let left = progress(&world, 1).unwrap().bits_left;
    assert!((1..350).contains(&left), "{left}");
    // Killed, not cut from power: what was cleared lazily is on its disk.
    world.crash(1, false);
    world.run(100);
    world.start(1);
    ok(&mut world, 5000, |w| repl(w, 1) == Some(ReplState::PausedSyncT));
    assert!(progress(&world, 1).unwrap().bits_total <= left);
    assert_eq!(verb(&mut world, 0, "resume-sync", AdminCommand::ResumeSync(VOLUME)), Ok(()));
    quiet(&mut world);
}

#[test]
fn a_resync_waits_for_the_one_it_comes_after() {
    let mut world = pair_with(slow(10, 1000));
    world.feed(1, Input::ResyncDependency { volume: VOLUME, waits: true });
    part_and_write(&mut world, 100);
    ok(&mut world, 5000, |w| repl(w, 1) == Some(ReplState::PausedSyncT));
    ok(&mut world, 100, |w| repl(w, 0) == Some(ReplState::PausedSyncS));
    assert_eq!(verb(&mut world, 1, "resume-sync", AdminCommand::ResumeSync(VOLUME)), Err(156));
    world.run(5000);
    assert_eq!(repl(&world, 1), Some(ReplState::PausedSyncT));
    world.feed(1, Input::ResyncDependency { volume: VOLUME, waits: false });
    quiet(&mut world);
}

#[test]
fn marks_behind_the_cursor_are_found() {
    // S09: the application of the source writes low addresses while the target is near the end.
    let mut world = pair_with(slow(11, 4000));
    part_and_write(&mut world, 500);
    ok(&mut world, 5000, |w| progress(w, 1).is_some_and(|p| p.bits_left < 100 && p.bits_total > 400));
    for block in 0..50 {
        write(&mut world, block * 8, 8);
    }
    quiet(&mut world);
}

#[test]
fn the_announcement_of_a_resync_may_be_lost() {
    // S08: cut where the target would have learnt the new sync generation; what follows stays partial.
    for (n, filter) in [
        |m: &Message| matches!(m, Message::SyncUuid(_)),
        |m: &Message| matches!(m, Message::Bitmap(h) if h.last),
    ]
    .into_iter()
    .enumerate()
    {
        for blocks in [0, 20] {
            let mut world = pair(20 + n as u64);
            world.drop_filter = Some(filter);
            if blocks == 0 {
                // An empty resync: the Primary only made a new generation.
                world.cut(true);
                world.run(100);
                world.heal();
            } else {
                part_and_write(&mut world, blocks);
            }
            let before = world.nodes[1].disks[0].written_sectors;
            quiet(&mut world);
            assert!(world.drop_filter.is_none(), "the message never came");
            assert_eq!(world.nodes[1].disks[0].written_sectors - before, blocks * 8);
        }
    }
}

#[test]
fn a_write_in_the_pipeline_is_not_forgotten() {
    // S01: in the bitmap exchange only a note is sent; the target must not be done without it.
    for delay in 0..40 {
        let mut world = pair(100 + delay);
        part_and_write(&mut world, delay % 3);
        ok(&mut world, 5000, |w| repl(w, 0) == Some(ReplState::WFBitMapS));
        world.run(0);
        for block in 0..8 {
            write(&mut world, 4000 + block * 8, 8);
            if delay % 4 == 0 {
                world.run(1);
            }
        }
        quiet(&mut world);
    }
}

/// S02: a state that the peer sent before it heard what its disk is says nothing any more. Believed, writes
/// would be marked without a note to a target that has our bitmap already.
#[test]
fn a_target_is_not_negotiating_again_once_that_is_decided() {
    for seed in 200..230 {
        let mut world = pair(seed);
        assert_eq!(
            verb(&mut world, 1, "detach", AdminCommand::Detach { volume: VOLUME, force: false }),
            Ok(())
        );
        write(&mut world, 0, 64);
        world.run(20);
        world.attach(1);
        ok(&mut world, 1000, |w| w.state(1).is_some_and(|s| s.1 == DiskState::Negotiating));
        // Who pauses says so together with the state of the disk.
        world.admin(1, "pause-sync", AdminCommand::PauseSync(VOLUME));
        ok(&mut world, 1000, |w| repl(w, 0) == Some(ReplState::WFBitMapS));
        for block in 0..20 {
            write(&mut world, 8000 + block * 8, 8);
            world.run(seed % 2);
            let states = world.states(0, 0).expect("node 0 is up");
            assert_ne!(states.peer_disk, DiskState::Negotiating, "{states:?}");
        }
        world.admin(1, "resume-sync", AdminCommand::ResumeSync(VOLUME));
        quiet(&mut world);
        let again = |event: &Event| matches!(event, Event::Note(_, text) if text.contains("starting over"));
        assert!(!world.log.iter().any(|(_, _, event)| again(event)), "a note was missing");
    }
}

#[test]
fn the_source_writes_while_its_answer_is_on_the_way() {
    // The range is free as soon as the answer is in the stream: the same blocks are written again and again.
    let mut world = pair_with(slow(12, 20_000));
    for _ in 0..5 {
        part_and_write(&mut world, 300);
        ok(&mut world, 5000, |w| repl(w, 1) == Some(ReplState::SyncTarget));
        while repl(&world, 1) == Some(ReplState::SyncTarget) {
            for _ in 0..4 {
                let first = world.rng.below(300) * 8;
                write(&mut world, first, 8);
            }
            world.run(1);
        }
        quiet(&mut world);
    }
}

#[test]
fn a_handler_may_forbid_a_resync() {
    for (node, name, exit, starts) in [
        (1, HandlerName::BeforeResyncTarget, 1, false),
        (0, HandlerName::BeforeResyncSource, 1, false),
        (0, HandlerName::BeforeResyncSource, 3, true),
        (1, HandlerName::BeforeResyncTarget, 3, false),
    ] {
        let mut world = pair(13);
        world.handler_answers.insert((node, name), Some(exit));
        part_and_write(&mut world, 20);
        if starts {
            quiet(&mut world);
            continue;
        }
        ok(&mut world, 5000, |w| w.state(node).is_some_and(|state| state.2 == ConnState::StandAlone));
        world.run(1000);
        assert_ne!(world.state(1).unwrap().1, DiskState::Inconsistent, "nothing was begun");
        world.handler_answers.remove(&(node, name));
        world.admin(node, "connect", AdminCommand::Connect { discard_my_data: false, tentative: false });
        quiet(&mut world);
        assert!(
            world
                .handler_runs
                .iter()
                .any(|(_, at, name)| (*at, *name) == (1, HandlerName::AfterResyncTarget))
        );
    }
}

#[test]
fn invalidate_in_every_state() {
    let full = AdminCommand::Invalidate;
    let remote = AdminCommand::InvalidateRemote;
    let mut world = pair(14);
    // Connected: the Primary may not lose its data, its peer may.
    assert_eq!(verb(&mut world, 0, "invalidate", full(VOLUME)), Err(-2));
    assert_eq!(verb(&mut world, 1, "invalidate-remote", remote(VOLUME)), Err(-10));
    assert_eq!(verb(&mut world, 0, "invalidate-remote", remote(VOLUME)), Ok(()));
    assert_eq!(verb(&mut world, 0, "invalidate-remote", remote(VOLUME)), Err(-8));
    quiet(&mut world);
    // Nothing is marked: the resync of the marked blocks copies nothing.
    let before = world.nodes[1].disks[0].written_sectors;
    assert_eq!(verb(&mut world, 1, "invalidate", AdminCommand::InvalidateMarked(VOLUME)), Ok(()));
    quiet(&mut world);
    assert_eq!(world.nodes[1].disks[0].written_sectors, before);
    // Between two connections: refused; alone: full resync at the next meeting.
    world.cut(true);
    world.run(100);
    assert_eq!(verb(&mut world, 1, "invalidate", full(VOLUME)), Err(-15));
    assert_eq!(verb(&mut world, 1, "invalidate", AdminCommand::InvalidateMarked(VOLUME)), Err(-15));
    assert_eq!(verb(&mut world, 1, "disconnect", AdminCommand::Disconnect { force: false }), Ok(()));
    assert_eq!(verb(&mut world, 1, "invalidate", full(VOLUME)), Ok(()));
    assert_eq!(world.state(1).unwrap().1, DiskState::Inconsistent);
    world.heal();
    world.admin(1, "connect", AdminCommand::Connect { discard_my_data: false, tentative: false });
    quiet(&mut world);
    assert_eq!(world.nodes[1].disks[0].written_sectors - before, world.options.sectors);
}

#[test]
fn truck_based_seeding_copies_only_later_changes() {
    let mut world = pair(15);
    for node in 0..2 {
        assert_eq!(verb(&mut world, node, "disconnect", AdminCommand::Disconnect { force: true }), Ok(()));
    }
    let clear = |clear_bitmap| AdminCommand::NewCurrentUuid { volume: VOLUME, clear_bitmap };
    assert_eq!(verb(&mut world, 1, "new-current-uuid", clear(false)), Ok(()));
    assert_eq!(verb(&mut world, 0, "new-current-uuid", clear(true)), Ok(()));
    // The disk travels: data and metadata as they are now.
    world.crash(1, false);
    world.nodes[1].disks[0] = world.nodes[0].disks[0].clone();
    assert_eq!(verb(&mut world, 0, "new-current-uuid", clear(false)), Ok(()));
    for block in 0..10 {
        write(&mut world, 8000 + block * 8, 8);
    }
    world.run(200);
    let before = world.nodes[1].disks[0].written_sectors;
    world.admin(0, "connect", AdminCommand::Connect { discard_my_data: false, tentative: false });
    world.start(1);
    quiet(&mut world);
    assert_eq!(world.nodes[1].disks[0].written_sectors - before, 80);
}

/// What an own write is about to replace cannot be copied: it is not asked for again and again, and what stands
/// around it is copied meanwhile.
#[test]
fn blocks_under_an_own_write_are_passed_over_until_it_is_done() {
    let mut world = pair(31);
    assert_eq!(verb(&mut world, 0, "secondary", AdminCommand::Secondary), Ok(()));
    assert_eq!(verb(&mut world, 1, "pause-sync", AdminCommand::PauseSync(VOLUME)), Ok(()));
    assert_eq!(verb(&mut world, 1, "invalidate", AdminCommand::Invalidate(VOLUME)), Ok(()));
    assert_eq!(verb(&mut world, 1, "primary", AdminCommand::Primary { force: false }), Ok(()));
    ok(&mut world, 1000, |w| repl(w, 1) == Some(ReplState::PausedSyncT));
    let received = |w: &World| w.status(1).unwrap().connection.peer_volumes[0].received_kib;
    let before = received(&world);
    world.nodes[1].disks[0].faults.stick = Some(3_000_000_000);
    world.request(1, RequestOp::Write, 1000, 8, false);
    world.run(100);
    assert_eq!(verb(&mut world, 1, "resume-sync", AdminCommand::ResumeSync(VOLUME)), Ok(()));
    world.run(2000);
    assert_eq!(progress(&world, 1).unwrap().bits_left, 1, "only the block of the write that is stuck");
    let copied = received(&world) - before;
    assert!(copied <= world.options.sectors / 2, "{copied} KiB of {}", world.options.sectors / 2);
    quiet(&mut world);
}
