//! A node that comes back: crashed Primary under each protocol, with and without activity log, with
//! metadata that is unreadable in part or older than its data. Bad metadata means more resync or a
//! refusal, never less.
use lockstep_replicator::core::compare::Rule;
use lockstep_replicator::core::config::{NetConfig, Protocol, VolumeConfig};
use lockstep_replicator::core::event::{AdminCommand, Event, RequestOp};
use lockstep_replicator::core::explain::Decision;
use lockstep_replicator::core::policy::{Obstacle, Outcome};
use lockstep_replicator::core::state::ConnState;
use lockstep_replicator::meta::flags;
use lockstep_tests::sim::node::VOLUME;
use lockstep_tests::sim::{Options, World};

const CONNECT: AdminCommand = AdminCommand::Connect { discard_my_data: false, tentative: false };
const PROTOCOLS: [Protocol; 3] = [Protocol::A, Protocol::B, Protocol::C];

#[track_caller]
fn ok(world: &mut World, ms: u64, done: impl FnMut(&World) -> bool) {
    let held = world.run_until(ms, done);
    assert_eq!(world.broken, None);
    assert!(held, "not within {ms} ms: {:?} {:?}", world.state(0), world.state(1));
}

#[track_caller]
fn quiet(world: &mut World) {
    ok(world, 30_000, |w| w.in_sync() && w.idle());
    world.check_quiet();
    world.check_content(0);
    world.check_content(1);
    assert_eq!(world.broken, None);
}

fn pair(net: &NetConfig, volume: &VolumeConfig, seed: u64) -> World {
    let net = NetConfig { ko_count: 0, connect_int_ms: 1000, ..net.clone() };
    let volume = VolumeConfig { al_extents: 67, ..volume.clone() };
    let mut world = World::new(Options { net, volume, ..Options::new(seed) });
    world.start(0);
    world.start(1);
    ok(&mut world, 1000, |w| (0..2).all(|n| w.state(n).is_some_and(|s| s.2 == ConnState::Connected)));
    world.admin(0, "primary-force", AdminCommand::Primary { force: true });
    ok(&mut world, 20_000, |w| w.in_sync() && w.is_primary(0) && w.idle());
    world
}

fn plain_pair(seed: u64) -> World {
    pair(&NetConfig::default(), &VolumeConfig::new(VOLUME), seed)
}

fn load(world: &mut World, node: usize, writes: u64) {
    for _ in 0..writes {
        // A quarter of the extents.
        let start = world.rng.below(world.options.sectors / 32 - 8) * 8;
        world.request(node, RequestOp::Write, start, 24, false);
    }
}

fn last(world: &World, node: usize) -> Decision {
    let found = world.log.iter().rev().find_map(|(_, at, event)| match event {
        Event::Handshake(decision) if *at == node => Some((**decision).clone()),
        _ => None,
    });
    found.expect("no handshake was decided")
}

fn bits_copied(world: &World) -> u64 {
    let found = world.log.iter().rev().find_map(|(_, _, event)| match event {
        Event::ResyncDone { bits_total, .. } => Some(*bits_total),
        _ => None,
    });
    found.expect("no resync ended")
}

fn all_bits(world: &World) -> u64 {
    world.options.sectors / 8
}

#[test]
fn a_crashed_primary_that_nobody_replaced_is_the_source_under_every_protocol() {
    for protocol in PROTOCOLS {
        for power in [false, true] {
            for pause_ms in [0, 1, 3, 10] {
                let net = NetConfig { protocol, ..NetConfig::default() };
                let mut world = pair(&net, &VolumeConfig::new(VOLUME), 20 + pause_ms);
                load(&mut world, 0, 30);
                world.run(pause_ms);
                world.crash(0, power);
                if power {
                    // Its cache is gone; what it had acknowledged without a flush may be.
                    world.history.weaken(true);
                }
                world.run(100);
                world.start(0);
                quiet(&mut world);
                let decision = last(&world, 0);
                assert_eq!(decision.decided.outcome, Outcome::Source { full: false });
                let rule = if protocol == Protocol::C { Rule::Equal } else { Rule::CrashedPrimary };
                assert_eq!(decision.decided.comparison.rule, rule);
                assert!(bits_copied(&world) < all_bits(&world), "only what may differ is copied");
            }
        }
    }
}

#[test]
fn a_crashed_primary_that_was_replaced_is_the_target_under_every_protocol() {
    for protocol in PROTOCOLS {
        for pause_ms in [0, 1, 3, 10] {
            let net = NetConfig { protocol, ..NetConfig::default() };
            let mut world = pair(&net, &VolumeConfig::new(VOLUME), 40 + pause_ms);
            load(&mut world, 0, 30);
            world.run(pause_ms);
            world.crash(0, false);
            if protocol != Protocol::C {
                // Acknowledged and never arrived: given up by the operator who promotes.
                world.history.weaken(false);
            }
            world.run(100);
            let id = world.admin(1, "primary", AdminCommand::Primary { force: false });
            ok(&mut world, 1000, |w| w.nodes[1].answers.contains_key(&id));
            load(&mut world, 1, 5);
            world.run(100);
            world.start(0);
            quiet(&mut world);
            assert_eq!(last(&world, 0).decided.comparison.rule, Rule::BitmapPeer);
            assert_eq!(last(&world, 0).decided.outcome, Outcome::Target { full: false });
            assert!(world.is_primary(1));
        }
    }
}

#[test]
fn without_an_activity_log_every_block_is_compared_after_a_crash() {
    for (before, after) in [(false, false), (false, true), (true, false)] {
        let volume = VolumeConfig { al_updates: before, ..VolumeConfig::new(VOLUME) };
        let mut world = pair(&NetConfig::default(), &volume, 60);
        load(&mut world, 0, 30);
        world.run(2);
        world.crash(0, false);
        world.run(50);
        // The option may be another one in the next life: what counts is how the log was kept in the last.
        world.options.volume.al_updates = after;
        world.start(0);
        quiet(&mut world);
        assert_eq!(bits_copied(&world) == all_bits(&world), !before, "{before} {after}");
        load(&mut world, 0, 5);
        quiet(&mut world);
    }
}

#[test]
fn an_activity_log_that_cannot_be_read_stands_for_every_block() {
    let mut world = plain_pair(61);
    load(&mut world, 0, 30);
    world.run(2);
    world.crash(0, false);
    world.run(50);
    world.boot(0);
    let mut attached = Box::new(world.nodes[0].disks[0].meta.attach().expect("readable"));
    attached.al_unusable = true;
    attached.hot_extents = Vec::new();
    world.nodes[0].disk_open[0] = true;
    world.admin(0, "attach", AdminCommand::Attach { volume: VOLUME, attached });
    world.admin(0, "connect", CONNECT);
    quiet(&mut world);
    assert_eq!(bits_copied(&world), all_bits(&world));
}

#[test]
fn bitmap_pages_that_cannot_be_read_count_as_set() {
    let mut world = plain_pair(62);
    world.crash(1, false);
    world.run(50);
    world.request(0, RequestOp::Write, 8 * 8, 8, false);
    world.run(50);
    world.boot(1);
    let mut attached = Box::new(world.nodes[1].disks[0].meta.attach().expect("readable"));
    attached.bitmap.truncate(1);
    world.nodes[1].disk_open[0] = true;
    world.admin(1, "attach", AdminCommand::Attach { volume: VOLUME, attached });
    world.admin(1, "connect", CONNECT);
    quiet(&mut world);
    assert_eq!(bits_copied(&world), all_bits(&world) - 64 + 1, "what is known, and everything unknown");
}

#[test]
fn metadata_of_an_earlier_time_costs_a_full_resync_or_is_refused() {
    // How often the pair went on since the metadata was copied away.
    for generations in 1..5 {
        for victim in 0..2 {
            let mut world = plain_pair(63);
            let old = world.nodes[victim].disks[0].meta.clone();
            for _ in 0..generations {
                world.cut(true);
                world.run(50);
                load(&mut world, 0, 10);
                world.run(50);
                world.heal();
                quiet(&mut world);
            }
            load(&mut world, 0, 5);
            quiet(&mut world);
            world.crash(victim, false);
            world.run(50);
            if victim == 0 {
                let id = world.admin(1, "primary", AdminCommand::Primary { force: false });
                ok(&mut world, 1000, |w| w.nodes[1].answers.contains_key(&id));
            }
            load(&mut world, 1 - victim, 5);
            world.run(50);
            // Put there by hand: the marks are not to be looked at until the nodes have met.
            world.oracle.check_marks = false;
            world.oracle.full_allowed = true;
            world.nodes[victim].disks[0].meta = old;
            world.start(victim);
            world.run_until(30_000, |w| w.in_sync() && w.idle());
            assert_eq!(world.broken, None);
            match last(&world, victim).decided.outcome {
                Outcome::Target { full: true } => quiet(&mut world),
                Outcome::Refuse(obstacle) => {
                    assert!(matches!(obstacle, Obstacle::Unrelated | Obstacle::SplitBrain), "{obstacle:?}");
                    // A person says that it is bad; then it takes everything.
                    ok(&mut world, 5000, |w| {
                        (0..2).all(|n| w.state(n).is_some_and(|s| s.2 == ConnState::StandAlone))
                    });
                    world.admin(victim, "invalidate", AdminCommand::Invalidate(VOLUME));
                    world.run(50);
                    world.admin(victim, "connect", CONNECT);
                    world.admin(1 - victim, "connect", CONNECT);
                    quiet(&mut world);
                }
                other => panic!("{generations} generations, n{victim}: {other:?}"),
            }
        }
    }
}

#[test]
fn a_superblock_that_says_a_full_resync_was_running_means_everything() {
    let mut world = plain_pair(64);
    world.crash(1, false);
    world.run(50);
    world.nodes[1].disks[0].meta.edit_superblock(|superblock| {
        superblock.flags |= flags::FULL_SYNC;
        superblock.flags &= !flags::CONSISTENT;
    });
    load(&mut world, 0, 3);
    world.run(50);
    world.start(1);
    quiet(&mut world);
    assert_eq!(bits_copied(&world), all_bits(&world));
}

#[test]
fn both_nodes_lose_power_at_once_and_one_is_promoted_again() {
    for protocol in PROTOCOLS {
        for pause_ms in [0, 1, 3, 10] {
            let net = NetConfig { protocol, ..NetConfig::default() };
            let mut world = pair(&net, &VolumeConfig::new(VOLUME), 80 + pause_ms);
            load(&mut world, 0, 30);
            world.run(pause_ms);
            world.crash(0, true);
            world.crash(1, true);
            world.history.weaken(true);
            world.run(10);
            world.start(1);
            world.run(10);
            world.start(0);
            quiet(&mut world);
            assert_eq!(last(&world, 0).decided.outcome, Outcome::Source { full: false }, "{protocol:?}");
            let id = world.admin(0, "primary", AdminCommand::Primary { force: false });
            ok(&mut world, 1000, |w| w.nodes[0].answers.contains_key(&id));
            load(&mut world, 0, 3);
            quiet(&mut world);
        }
    }
}
