//! Bugs that were shipped, part C: who has the truth. The table says where each is told.
use lockstep_replicator::core::event::{AdminCommand, Event, HandlerName, RequestOp};
use lockstep_replicator::core::state::ConnState;
use lockstep_tests::catalogue::Told::{By, Never};
use lockstep_tests::catalogue::{Table, check};
use lockstep_tests::sim::node::VOLUME;
use lockstep_tests::sim::script::{pair_with, pass, quiet, runs, sectors, slow, verb, within};
use lockstep_tests::sim::{Options, World};

const TABLE: Table = &[
    (
        "S22",
        &[
            By("tests/tests/shipped_bugs_truth.rs::s22_a_slow_direction_does_not_hide_a_split_brain"),
            By("tests/tests/split_brain.rs::it_is_found_by_both_nodes_and_nothing_is_touched"),
            By("tests/tests/message_cut.rs::a_split_brain_with_primaries"),
        ],
    ),
    (
        "S23",
        &[
            By("tests/tests/split_brain.rs::an_ancestor_known_from_the_history_only_costs_a_full_resync"),
            By("tests/tests/message_cut.rs::a_split_brain_with_an_old_ancestor"),
        ],
    ),
    (
        "S24",
        &[
            By("tests/tests/shipped_bugs_truth.rs::s24_no_rule_throws_marks_away"),
            By("tests/tests/handshake_table.rs::every_rule_by_its_history"),
            Never(
                "quorum is kept by the configuration, the core does not act on it: no flag of it decides anything",
            ),
        ],
    ),
    ("S26", &[By("tests/tests/suspend.rs::no_write_lands_on_a_lone_copy_that_is_not_good")]),
    (
        "S28",
        &[
            By("tests/tests/promotion.rs::forced_on_both_nodes_of_a_fresh_pair_at_once"),
            By("tests/tests/promotion.rs::at_any_moment_of_a_handshake_on_either_or_both_nodes"),
            By("tests/tests/dual_primary.rs::of_two_forced_promotions_at_once_one_wins"),
            By(
                "tests/tests/scenarios.rs::what_a_primary_writes_to_a_disk_it_took_back_alone_is_not_overwritten",
            ),
        ],
    ),
    (
        "S45",
        &[
            By("tests/tests/split_brain.rs::after_sb_0pri_every_value"),
            By("tests/tests/split_brain.rs::after_sb_1pri_every_value"),
            By("tests/tests/split_brain.rs::after_sb_2pri_every_value"),
            By("tests/tests/split_brain.rs::a_split_brain_that_is_found_twice_has_the_same_loser"),
            By("tests/tests/message_cut.rs::a_split_brain_with_no_primary"),
        ],
    ),
    (
        "S46",
        &[
            By("tests/tests/fencing.rs::what_each_answer_of_the_handler_means"),
            By("tests/tests/fencing.rs::a_peer_that_comes_back_thaws_and_late_answers_are_ignored"),
            By("tests/tests/fencing.rs::a_frozen_primary_completes_nothing_until_the_peer_is_fenced"),
        ],
    ),
];

#[test]
fn every_scenario_of_this_part_is_told() {
    let wrong = check(&["S22", "S23", "S24", "S26", "S28", "S45", "S46"], TABLE);
    assert!(wrong.is_empty(), "{wrong:#?}");
}

fn pair(seed: u64) -> World {
    pair_with(Options { sectors: 8192, ..Options::new(seed) })
}

#[test]
fn s22_a_slow_direction_does_not_hide_a_split_brain() {
    for (late, ms) in [(0, 200), (1, 200), (0, 1500), (1, 1500)] {
        // Time for a handshake of two slow messages: one that is given up in the middle may tell one node and not the other.
        let mut options = Options { sectors: 8192, ..Options::new(3000 + ms) };
        options.net.connect_int_ms = 5000;
        let mut world = pair_with(options);
        world.cut(true);
        pass(&mut world, 100);
        world.request(0, RequestOp::Write, 80, 8, false);
        assert_eq!(verb(&mut world, 1, "primary", AdminCommand::Primary { force: false }), Ok(()));
        world.request(1, RequestOp::Write, 160, 8, false);
        pass(&mut world, 100);
        let before = [0, 1].map(|node| sectors(&world, node).to_vec());
        slow(&mut world, late, ms);
        world.heal();
        within(&mut world, 40_000, |w| {
            (0..2).all(|node| w.state(node).is_some_and(|s| s.2 == ConnState::StandAlone))
        });
        pass(&mut world, 5000);
        for (node, before) in before.iter().enumerate() {
            let told = |event: &Event| matches!(event, Event::Note(_, text) if text.contains("Split-Brain"));
            let knows = world.log.iter().any(|(_, at, event)| *at == node && told(event));
            assert!(knows, "n{node} saw a lost connection only");
            assert_eq!(runs(&world, node, HandlerName::SplitBrain), 1, "n{node}");
            assert_eq!(world.state(node).map(|s| s.2), Some(ConnState::StandAlone), "n{node} tries again");
            assert_eq!(sectors(&world, node), before, "n{node} was overwritten");
        }
    }
}

#[test]
fn s24_no_rule_throws_marks_away() {
    // Who leaves, in which way, and whether the Primary's node stops before they meet again.
    for (graceful, restart) in [(true, false), (true, true), (false, false), (false, true)] {
        let mut world = pair(3100);
        if graceful {
            assert_eq!(verb(&mut world, 1, "down", AdminCommand::Down), Ok(()));
        }
        world.crash(1, false);
        pass(&mut world, 50);
        for block in 0..16 {
            world.request(0, RequestOp::Write, block * 16, 8, false);
        }
        pass(&mut world, 100);
        if restart {
            assert_eq!(verb(&mut world, 0, "secondary", AdminCommand::Secondary), Ok(()));
            assert_eq!(verb(&mut world, 0, "down", AdminCommand::Down), Ok(()));
            world.crash(0, true);
            world.start(0);
        }
        let before = world.nodes[1].disks[0].written_sectors;
        world.start(1);
        quiet(&mut world);
        assert_eq!(world.nodes[1].disks[0].written_sectors - before, 16 * 8, "what was marked, and no more");
        if world.is_primary(0) {
            assert_eq!(verb(&mut world, 0, "secondary", AdminCommand::Secondary), Ok(()));
        }
        assert_eq!(verb(&mut world, 1, "primary", AdminCommand::Primary { force: false }), Ok(()));
        world.check_content(1);
        let bits = world.nodes[1].core.as_ref().and_then(|core| core.out_of_sync_bits(VOLUME));
        assert_eq!((world.broken.as_deref(), bits), (None, Some(0)));
    }
}
