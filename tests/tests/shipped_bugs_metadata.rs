//! Bugs that were shipped, part B: metadata, activity log, crash recovery. The table says where each is told.
use lockstep_replicator::core::event::{AdminCommand, Event, RequestOp};
use lockstep_replicator::core::state::{ConnState, DiskState};
use lockstep_tests::catalogue::Told::{By, Never};
use lockstep_tests::catalogue::{Table, check};
use lockstep_tests::sim::script::{fail_metas, pair_with, quiet, sectors, verb, within};
use lockstep_tests::sim::{Options, World};

const TABLE: Table = &[
    (
        "S11",
        &[By("tests/tests/shipped_bugs_metadata.rs::s11_no_data_goes_where_the_log_could_not_be_written")],
    ),
    (
        "S12",
        &[
            By("replicator/src/meta/al_ring.rs::replay_equals_the_table_of_the_writer"),
            By("replicator/src/meta/al_ring.rs::a_fresh_ring_and_a_torn_first_block_hold_nothing"),
            By("replicator/src/meta/al_ring.rs::a_stale_block_of_another_life_is_noticed"),
            By("replicator/src/meta/al_ring.rs::a_full_ring_that_cannot_show_its_table_is_noticed"),
            By(
                "tests/tests/crash_recovery.rs::a_crashed_primary_that_nobody_replaced_is_the_source_under_every_protocol",
            ),
        ],
    ),
    (
        "S14",
        &[
            By(
                "tests/tests/crash_recovery.rs::without_an_activity_log_every_block_is_compared_after_a_crash",
            ),
            Never(
                "the mode cannot change while a disk is attached: al-updates counts from the next attach (options.rs)",
            ),
        ],
    ),
    (
        "S15",
        &[
            By("tests/tests/resize.rs::a_node_may_stop_at_any_metadata_write_of_a_resize"),
            By("tests/tests/metadata_cut.rs::a_resize"),
        ],
    ),
    ("S16", &[By("tests/tests/resize.rs::a_node_that_was_away_grows_at_the_next_handshake")]),
    ("S18", &[By("tests/tests/shipped_bugs_metadata.rs::s18_a_peer_that_reboots_at_once_is_no_split_brain")]),
    (
        "S20",
        &[By("tests/tests/local_errors.rs::a_mirrored_write_that_fails_is_repaired_under_every_protocol")],
    ),
];

#[test]
fn every_scenario_of_this_part_is_told() {
    let wrong = check(&["S11", "S12", "S14", "S15", "S16", "S18", "S20"], TABLE);
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Four extents of the activity log, of which the last are cold.
fn pair(seed: u64) -> World {
    pair_with(Options { sectors: 4 * 8192, ..Options::new(seed) })
}

#[test]
fn s11_no_data_goes_where_the_log_could_not_be_written() {
    const COLD: u64 = 3 * 8192;
    for alone in [false, true] {
        let mut world = pair(2000);
        if alone {
            world.crash(1, false);
            world.run(50);
        }
        // The extents of the first sync may still be hot: a demotion leaves none.
        assert_eq!(verb(&mut world, 0, "secondary", AdminCommand::Secondary), Ok(()));
        assert_eq!(verb(&mut world, 0, "primary", AdminCommand::Primary { force: false }), Ok(()));
        world.run(50);
        let (failed, good) = (world.failed_requests, world.good_requests);
        fail_metas(&mut world, 0, 1);
        for block in 0..4 {
            world.request(0, RequestOp::Write, COLD + block * 8, 8, false);
        }
        world.run(500);
        assert_eq!(world.broken, None);
        assert_eq!(world.state(0).map(|s| s.1), Some(DiskState::Diskless), "a log that cannot be written");
        let start = usize::try_from(COLD).expect("a small disk");
        assert_eq!(sectors(&world, 0)[start..start + 32], [0; 32], "written without a mark");
        let (failed, good) = (world.failed_requests - failed, world.good_requests - good);
        assert_eq!((failed, good), if alone { (4, 0) } else { (0, 4) });
        if alone {
            world.start(1);
        }
        world.attach(0);
        quiet(&mut world);
    }
}

#[test]
fn s18_a_peer_that_reboots_at_once_is_no_split_brain() {
    for (power, reboot_ms) in [false, true].into_iter().flat_map(|p| [0, 1, 3, 8, 20].map(|ms| (p, ms))) {
        let mut world = pair(2100 + reboot_ms);
        // Two losses in quick succession, each with a write in between.
        for _ in 0..3 {
            for block in 0..4 {
                world.request(0, RequestOp::Write, 4096 + block * 8, 8, false);
            }
            world.run(reboot_ms % 3);
            world.crash(1, power);
            world.run(reboot_ms);
            world.start(1);
            world.run(reboot_ms);
        }
        quiet(&mut world);
        for (_, node, event) in &world.log {
            let split = matches!(event, Event::Note(_, text) if text.contains("Split-Brain"));
            assert!(!split, "n{node}: {event:?}");
        }
        assert_eq!(world.failed_requests, 0);
        // The generation that the peer missed is known after a crash of both.
        world.crash(0, power);
        world.crash(1, power);
        world.start(1);
        world.start(0);
        within(&mut world, 5000, |w| w.state(0).is_some_and(|s| s.2 == ConnState::Connected));
        quiet(&mut world);
    }
}
