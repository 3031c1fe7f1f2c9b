//! Bugs that were shipped, part D: ordering and the data path. The table says where each is told.
use lockstep_replicator::core::event::{AdminCommand, RequestOp};
use lockstep_replicator::core::state::{ConnState, ReplState};
use lockstep_tests::catalogue::Told::{By, Never};
use lockstep_tests::catalogue::{Table, check};
use lockstep_tests::sim::script::{open, pair_with, pass, quiet, sectors, verb, within};
use lockstep_tests::sim::{Options, World};

const TABLE: Table = &[
    (
        "S29",
        &[
            By("tests/tests/shipped_bugs_data_path.rs::s29_a_flush_reaches_both_disks_in_every_form"),
            By("tests/tests/planted.rs::planted_defects_are_noticed"),
        ],
    ),
    (
        "S31",
        &[
            By("tests/tests/verify.rs::a_busy_application_is_no_difference"),
            Never(
                "both front ends hand over data that is in a buffer of the daemon: the application cannot change it",
            ),
        ],
    ),
    (
        "S32",
        &[
            By("replicator/src/runtime/ublk_dev.rs::a_write_that_is_still_being_sent_keeps_its_buffer"),
            By("replicator/src/runtime/buffers.rs::a_buffer_is_reused_only_after_its_last_count"),
        ],
    ),
    ("S33", &[By("tests/tests/hung_disk.rs::a_late_answer_hits_nobody")]),
    ("S35", &[By("tests/tests/shipped_bugs_data_path.rs::s35_a_disconnect_does_not_wait_for_a_range")]),
    ("S36", &[By("tests/tests/shipped_bugs_data_path.rs::s36_resync_and_writes_with_few_buffers_go_on")]),
    ("S38", &[By("tests/tests/suspend.rs::suspend_io_answers_when_both_copies_hold_everything")]),
    (
        "S39",
        &[
            By("tests/tests/resize.rs::both_disks_grow_under_load_and_only_the_new_area_is_copied"),
            Never(
                "one owner of all state of a resource, one input at a time: there are no two locks to take in two orders",
            ),
        ],
    ),
    (
        "S41",
        &[
            By("tests/tests/resize.rs::sizes_at_the_borders_of_the_format_move_without_overlap"),
            By("replicator/src/meta/layout.rs::pieces_lie_in_order_inside_the_device"),
            By("replicator/src/core/bitmap.rs::growth_sets_only_the_new_area"),
            By("replicator/tests/meta_drbdmeta.rs::fresh_metadata_is_the_same_on_16_tib"),
        ],
    ),
    ("S42", &[By("tests/tests/shipped_bugs_data_path.rs::s42_an_unaligned_discard_reads_as_zeroes_on_both")]),
    (
        "S43",
        &[
            By("proto/tests/properties.rs::any_flipped_bit_is_detected"),
            Never(
                "a session is one TCP stream, there is no second path; each payload has a checksum from end to end",
            ),
        ],
    ),
];

#[test]
fn every_scenario_of_this_part_is_told() {
    let part = ["S29", "S31", "S32", "S33", "S35", "S36", "S38", "S39", "S41", "S42", "S43"];
    let wrong = check(&part, TABLE);
    assert!(wrong.is_empty(), "{wrong:#?}");
}

fn options(seed: u64) -> Options {
    Options { sectors: 8192, ..Options::new(seed) }
}

fn done(world: &mut World, request: impl FnOnce(&mut World) -> u64) {
    request(world);
    within(world, 2000, |w| open(w, 0) == 0);
}

#[test]
fn s29_a_flush_reaches_both_disks_in_every_form() {
    let zeroes = RequestOp::WriteZeroes { may_unmap: false };
    for volume in 0..2 {
        let mut world = pair_with(Options { more_volumes: vec![4096], ..options(4000) });
        for (turn, (op, fua)) in [
            (RequestOp::Write, false),
            (RequestOp::Write, true),
            (zeroes, false),
            (zeroes, true),
            (RequestOp::Discard, false),
        ]
        .into_iter()
        .enumerate()
        {
            let start = 64 * turn as u64;
            // Something other than zeroes first, or zeroes would show nothing.
            done(&mut world, |w| w.request_on(0, volume, RequestOp::Write, start, 16, false));
            done(&mut world, |w| w.flush_on(0, volume));
            done(&mut world, |w| w.request_on(0, volume, op, start, 16, fua));
            if !fua {
                done(&mut world, |w| w.flush_on(0, volume));
            }
            let at = usize::try_from(start).expect("a small disk");
            for node in 0..2 {
                let disk = &world.nodes[node].disks[volume];
                let (now, stable) = (&disk.sectors()[at..at + 16], &disk.stable_sectors()[at..at + 16]);
                assert_eq!(now, stable, "{op:?} fua {fua} on n{node}: acknowledged, and not stable");
            }
        }
        // One with nothing before it, and one that a lot waits before.
        done(&mut world, |w| w.flush_on(0, volume));
        for block in 0..40 {
            world.request_on(0, volume, RequestOp::Write, 1024 + block * 8, 8, false);
        }
        within(&mut world, 2000, |w| open(w, 0) == 0);
        done(&mut world, |w| w.flush_on(0, volume));
        for node in 0..2 {
            let disk = &world.nodes[node].disks[volume];
            assert_eq!(disk.sectors()[1024..1344], disk.stable_sectors()[1024..1344], "n{node}");
        }
        quiet(&mut world);
    }
}

#[test]
fn s35_a_disconnect_does_not_wait_for_a_range() {
    for (node, power) in [(0, false), (1, false), (0, true), (1, true)] {
        let mut world = pair_with(options(4100));
        world.cut(true);
        pass(&mut world, 50);
        for block in 0..200 {
            world.request(0, RequestOp::Write, block * 8, 8, false);
        }
        pass(&mut world, 100);
        world.heal();
        within(&mut world, 5000, |w| w.state(1).is_some_and(|s| s.3 == ReplState::SyncTarget));
        // Resync data that the target's disk does not finish, and writes to the same blocks behind it.
        world.nodes[1].disks[0].faults.stick = Some(4_000_000_000);
        pass(&mut world, 1);
        for block in 0..200 {
            world.request(0, RequestOp::Write, block * 8, 8, false);
        }
        pass(&mut world, 5);
        let began = world.now;
        let left = AdminCommand::Disconnect { force: true };
        assert_eq!(verb(&mut world, node, "disconnect", left), Ok(()));
        assert!(world.now - began < 1_000_000_000, "n{node} waited for what nobody answers");
        within(&mut world, 1000, |w| w.state(node).is_some_and(|s| s.2 == ConnState::StandAlone));
        if power {
            world.crash(1, true);
            world.start(1);
        }
        let again = AdminCommand::Connect { discard_my_data: false, tentative: false };
        assert_eq!(verb(&mut world, node, "connect", again), Ok(()));
        quiet(&mut world);
        assert_eq!(world.failed_requests, 0);
    }
}

#[test]
fn s36_resync_and_writes_with_few_buffers_go_on() {
    for seed in 0..3 {
        let mut options = options(4200 + seed);
        options.net.max_buffers = 32;
        options.net.verify_alg = Some("sha1".into());
        options.net.max_epoch_size = 20;
        let mut world = pair_with(options);
        world.cut(true);
        pass(&mut world, 50);
        for block in 0..400 {
            world.request(0, RequestOp::Write, block * 8, 8, false);
        }
        pass(&mut world, 200);
        world.heal();
        for round in 0..400 {
            while world.nodes[0].requests.len() < 8 {
                let block = world.rng.below(1000);
                let op = if round % 3 == 0 { RequestOp::Read } else { RequestOp::Write };
                world.request(0, op, block * 8, 16, false);
            }
            if round == 200 {
                let all = AdminCommand::Verify {
                    volume: lockstep_tests::sim::node::VOLUME,
                    start: None,
                    stop: None,
                };
                world.admin(1, "verify", all);
            }
            pass(&mut world, 1);
        }
        within(&mut world, 20_000, |w| {
            w.state(0).is_some_and(|s| s.3 == ReplState::Established) && open(w, 0) == 0
        });
        quiet(&mut world);
    }
}

#[test]
fn s42_an_unaligned_discard_reads_as_zeroes_on_both() {
    let mut options = options(4300);
    options.volume.resync.discard_granularity_bytes = 65_536;
    let mut world = pair_with(options);
    for (start, len) in [(3, 1), (5, 30), (120, 17), (1000, 1), (1023, 2), (2048, 129)] {
        for op in [RequestOp::Discard, RequestOp::WriteZeroes { may_unmap: true }] {
            done(&mut world, |w| w.request(0, RequestOp::Write, start / 8 * 8, 160, false));
            let written = sectors(&world, 0).to_vec();
            done(&mut world, |w| w.request(0, op, start, len, false));
            for node in 0..2 {
                let now = sectors(&world, node);
                for (at, value) in now.iter().enumerate() {
                    let inside = (start..start + len).contains(&(at as u64));
                    let expected = if inside { 0 } else { written[at] };
                    assert_eq!(*value, expected, "{op:?} of {start}+{len} on n{node}, sector {at}");
                }
            }
        }
    }
    // And after a resync, which may discard by its own granularity.
    let full = AdminCommand::Invalidate(lockstep_tests::sim::node::VOLUME);
    assert_eq!(verb(&mut world, 1, "invalidate", full), Ok(()));
    quiet(&mut world);
}
