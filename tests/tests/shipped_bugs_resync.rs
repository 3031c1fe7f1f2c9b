//! Bugs that were shipped, part A: resync against live writes. The table says where each is told.
use lockstep_replicator::core::event::{AdminCommand, Event, RequestOp};
use lockstep_replicator::core::state::{DiskState, ReplState};
use lockstep_tests::catalogue::Told::By;
use lockstep_tests::catalogue::{Table, check};
use lockstep_tests::sim::node::VOLUME;
use lockstep_tests::sim::script::{pair_with, quiet, slow, verb, within};
use lockstep_tests::sim::{Options, World};

const TABLE: Table = &[
    (
        "S01",
        &[
            By("tests/tests/shipped_bugs_resync.rs::s01_a_notice_that_is_late_is_waited_for"),
            By("tests/tests/resync.rs::a_write_in_the_pipeline_is_not_forgotten"),
        ],
    ),
    (
        "S02",
        &[
            By("tests/tests/shipped_bugs_resync.rs::s02_a_paused_target_gets_data_or_a_mark"),
            By("tests/tests/resync.rs::a_target_is_not_negotiating_again_once_that_is_decided"),
            By("tests/tests/state_table.rs::every_combination_of_states_and_every_request_in_it"),
        ],
    ),
    (
        "S03",
        &[By("tests/tests/shipped_bugs_resync.rs::s03_a_second_write_to_an_announced_block_is_announced")],
    ),
    (
        "S04",
        &[
            By("tests/tests/shipped_bugs_resync.rs::s04_both_sides_clear_the_same_marks"),
            By("tests/tests/resync.rs::a_pause_holds_on_both_sides_until_both_agree"),
        ],
    ),
    ("S06", &[By("tests/tests/resync.rs::zeroes_are_discarded_by_whole_granules")]),
    (
        "S08",
        &[
            By("tests/tests/resync.rs::the_announcement_of_a_resync_may_be_lost"),
            By("tests/tests/message_cut.rs::a_quick_resync"),
        ],
    ),
    ("S09", &[By("tests/tests/resync.rs::marks_behind_the_cursor_are_found")]),
];

#[test]
fn every_scenario_of_this_part_is_told() {
    let wrong = check(&["S01", "S02", "S03", "S04", "S06", "S08", "S09"], TABLE);
    assert!(wrong.is_empty(), "{wrong:#?}");
}

fn pair(seed: u64) -> World {
    pair_with(Options { sectors: 8192, ..Options::new(seed) })
}

/// The link is down, `blocks` blocks differ, the link is up again.
fn part_and_write(world: &mut World, blocks: u64) {
    world.cut(true);
    world.run(50);
    for block in 0..blocks {
        world.request(0, RequestOp::Write, block * 8, 8, false);
    }
    world.run(100);
    world.heal();
}

fn repl(world: &World, node: usize) -> Option<ReplState> {
    world.state(node).map(|state| state.3)
}

fn bits(world: &World, node: usize) -> Option<u64> {
    world.nodes[node].core.as_ref().and_then(|core| core.out_of_sync_bits(VOLUME))
}

/// A started over resync would hide what this part is about.
fn in_one_go(world: &World) {
    let again = |event: &Event| matches!(event, Event::Note(_, text) if text.contains("starting over"));
    assert!(!world.log.iter().any(|(_, _, event)| again(event)), "a note was missing");
}

#[test]
fn s01_a_notice_that_is_late_is_waited_for() {
    for blocks in [0, 1, 20] {
        for turn in 0..12 {
            let mut world = pair(1000 + turn);
            part_and_write(&mut world, blocks);
            within(&mut world, 5000, |w| repl(w, 0) == Some(ReplState::WFBitMapS));
            // What is sent from now on takes long: the notices, and all behind them.
            slow(&mut world, 1, 40);
            for block in 0..6 {
                world.request(0, RequestOp::Write, 4000 + block * 8, 8, false);
            }
            world.run(turn);
            slow(&mut world, 1, 0);
            within(&mut world, 5000, |w| repl(w, 1) == Some(ReplState::Established));
            within(&mut world, 5000, |w| w.state(1).is_some_and(|s| s.1 == DiskState::UpToDate));
            // UpToDate there means: everything is there that was acknowledged before the resync.
            let [mine, theirs] = [0, 1].map(|node| &world.nodes[node].disks[0].sectors()[4000..4048]);
            assert_eq!(mine, theirs, "{blocks} blocks, {turn} ms");
            quiet(&mut world);
            in_one_go(&world);
        }
    }
}

#[test]
fn s02_a_paused_target_gets_data_or_a_mark() {
    for pauser in 0..2 {
        let mut world = pair(1100 + pauser as u64);
        assert_eq!(verb(&mut world, pauser, "pause-sync", AdminCommand::PauseSync(VOLUME)), Ok(()));
        part_and_write(&mut world, 10);
        // At every step of the meeting, and while it is paused.
        for block in 0..100 {
            world.request(0, RequestOp::Write, 2000 + block % 50 * 8, 8, false);
            world.run(block % 2);
        }
        within(&mut world, 5000, |w| repl(w, 1) == Some(ReplState::PausedSyncT));
        world.run(100);
        let marked = bits(&world, 1);
        assert!(marked >= Some(10), "{marked:?}: nothing is copied while it is paused");
        assert_eq!(verb(&mut world, pauser, "resume-sync", AdminCommand::ResumeSync(VOLUME)), Ok(()));
        quiet(&mut world);
        in_one_go(&world);
    }
}

#[test]
fn s03_a_second_write_to_an_announced_block_is_announced() {
    for turn in 0..20 {
        let mut world = pair(1200 + turn);
        part_and_write(&mut world, 1 + turn % 3);
        within(&mut world, 5000, |w| repl(w, 0) == Some(ReplState::WFBitMapS));
        // The same blocks again and again: announced, copied, written again.
        for _ in 0..15 {
            for block in 0..3 {
                world.request(0, RequestOp::Write, 4000 + block * 8, 8, false);
            }
            world.run(turn % 2);
        }
        quiet(&mut world);
        in_one_go(&world);
    }
}

#[test]
fn s04_both_sides_clear_the_same_marks() {
    for seed in 1300..1306 {
        let mut options = Options { sectors: 8192, ..Options::new(seed) };
        options.volume.resync.control = lockstep_replicator::core::config::RateControl::Fixed;
        options.volume.resync.rate_kib_s = 8000;
        let mut world = pair_with(options);
        part_and_write(&mut world, 400);
        within(&mut world, 5000, |w| repl(w, 1) == Some(ReplState::SyncTarget));
        let mut last = u64::MAX;
        for round in 0..6 {
            // Writes into the running resync, over marked blocks and beside them.
            for _ in 0..12 {
                let block = world.rng.below(600);
                let len = 1 + world.rng.below(20);
                world.request(0, RequestOp::Write, block * 8 + world.now % 3, len, false);
                world.run(1);
            }
            let (pause, resume) = (AdminCommand::PauseSync(VOLUME), AdminCommand::ResumeSync(VOLUME));
            assert_eq!(verb(&mut world, round % 2, "pause-sync", pause), Ok(()));
            world.run(300);
            let marked = [0, 1].map(|node| bits(&world, node).expect("both are up"));
            assert_eq!(marked[0], marked[1], "nothing is on the way, and they disagree");
            assert!(marked[0] <= last, "marks came back");
            last = marked[0];
            assert_eq!(verb(&mut world, round % 2, "resume-sync", resume), Ok(()));
        }
        assert!(last < 400, "nothing was cleared");
        quiet(&mut world);
        in_one_go(&world);
        assert_eq!((bits(&world, 0), bits(&world, 1)), (Some(0), Some(0)));
    }
}
