//! Bugs of replicators in userspace, and properties of ublk. The table says where each is told.
use lockstep_replicator::core::event::{AdminCommand, RequestOp};
use lockstep_tests::catalogue::Told::{By, Never};
use lockstep_tests::catalogue::{Table, check};
use lockstep_tests::sim::Options;
use lockstep_tests::sim::script::{open, pair_with, pass, quiet, verb, within};

const TABLE: Table = &[
    ("U1", &[By("tests/tests/local_errors.rs::nothing_is_done_before_the_degradation_is_known")]),
    (
        "U2",
        &[
            By("tests/tests/dual_primary.rs::every_order_of_two_overlapping_writes_ends_with_equal_copies"),
            Never(
                "all queues hand their requests to one owner of the state, which takes one input at a time",
            ),
        ],
    ),
    ("U3", &[By("tests/tests/shipped_bugs_userspace.rs::u3_reads_after_an_unclean_stop_do_not_alternate")]),
    (
        "U4",
        &[
            By("tests/tests/local_errors.rs::a_target_is_not_done_while_a_mirrored_write_failed"),
            By("tests/tests/resync.rs::marks_behind_the_cursor_are_found"),
        ],
    ),
    ("U5", &[By("tests/tests/dual_primary.rs::writes_issued_again_after_a_crash_hide_nothing_acknowledged")]),
    (
        "U6",
        &[
            By("tests/vm/scripts/ublk_disk.sh::fails instead of hanging"),
            Never(
                "devices are added without recovery: what was in flight fails at once, see the crate ublk-frontend",
            ),
        ],
    ),
    (
        "U7",
        &[
            By("tests/vm/scripts/ublk_disk.sh::refuses to go while it is used"),
            Never(
                "without recovery no later daemon takes requests over; a device in use is not stopped gracefully",
            ),
        ],
    ),
    (
        "U8",
        &[
            By("replicator/src/admin/process.rs::a_shared_root_is_told_from_a_private_one"),
            By("tests/vm/scripts/walkthrough.sh::the writer is still at it"),
        ],
    ),
    (
        "U9",
        &[
            By("replicator/src/runtime/buffers.rs::an_empty_account_does_not_starve_the_others"),
            Never(
                "memory is locked and the pool allocated at start; swap on a device of ours is a non-goal (README)",
            ),
        ],
    ),
    (
        "U10",
        &[
            By("replicator/src/runtime/ring.rs::more_operations_than_the_queue_holds_are_all_done"),
            By("replicator/src/runtime/ring.rs::a_dropped_ring_takes_its_operations_back"),
            By("replicator/src/runtime/disk.rs::an_error_of_the_disk_is_an_answer"),
        ],
    ),
    (
        "U11",
        &[
            By("replicator/src/meta/superblock.rs::other_versions_are_refused_by_name"),
            By("replicator/tests/meta_backing.rs::disks_without_valid_metadata_are_refused_with_a_number"),
        ],
    ),
];

#[test]
fn every_scenario_of_this_part_is_told() {
    let part = ["U1", "U2", "U3", "U4", "U5", "U6", "U7", "U8", "U9", "U10", "U11"];
    let wrong = check(&part, TABLE);
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn u3_reads_after_an_unclean_stop_do_not_alternate() {
    for seed in 0..20 {
        let mut world = pair_with(Options { sectors: 8192, ..Options::new(5000 + seed) });
        // Writes that are on one copy only, or on neither, when both lose power; the history remembers what
        // each read has shown, and no later one may show something else.
        for block in 0..20 {
            world.request(0, RequestOp::Write, block * 8, 8, false);
        }
        world.run(seed % 3);
        world.crash(0, true);
        world.crash(1, seed % 2 == 0);
        world.start(0);
        world.start(1);
        for _ in 0..3 {
            for reader in [0, 1] {
                within(&mut world, 20_000, |w| w.in_sync() && w.idle());
                let promoted = verb(&mut world, reader, "primary", AdminCommand::Primary { force: false });
                assert_eq!(promoted, Ok(()));
                for block in 0..20 {
                    world.request(reader, RequestOp::Read, block * 8, 8, false);
                }
                within(&mut world, 2000, |w| open(w, reader) == 0);
                assert_eq!(verb(&mut world, reader, "secondary", AdminCommand::Secondary), Ok(()));
            }
        }
        pass(&mut world, 100);
        quiet(&mut world);
        assert_eq!(world.failed_requests, 0);
    }
}
