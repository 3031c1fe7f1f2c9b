//! Options changed while the resource runs: protocol under load, two Primaries, refusals.
use lockstep_replicator::core::config::{NetConfig, Protocol};
use lockstep_replicator::core::event::{AdminCommand, Refusal, RequestOp};
use lockstep_replicator::core::state::ConnState;
use lockstep_tests::sim::{Options, World};

fn ok(world: &mut World, ms: u64, done: impl FnMut(&World) -> bool) {
    let held = world.run_until(ms, done);
    assert_eq!(world.broken, None);
    assert!(held, "not within {ms} ms: {:?} {:?}", world.state(0), world.state(1));
}

fn quiet(world: &mut World) {
    ok(world, 20_000, |w| w.in_sync() && w.idle());
    world.check_quiet();
    world.check_content(0);
    assert_eq!(world.broken, None);
}

fn pair(seed: u64, protocol: Protocol) -> World {
    let mut options = Options::new(seed);
    options.sectors = 4096;
    options.net.protocol = protocol;
    let mut world = World::new(options);
    world.start(0);
    world.start(1);
    ok(&mut world, 1000, |w| (0..2).all(|n| w.state(n).is_some_and(|s| s.2 == ConnState::Connected)));
    world.admin(0, "primary-force", AdminCommand::Primary { force: true });
    ok(&mut world, 10_000, |w| w.in_sync() && w.is_primary(0) && w.idle());
    world
}

fn verb(world: &mut World, node: usize, name: &'static str, command: AdminCommand) -> Result<(), Refusal> {
    let id = world.admin(node, name, command);
    ok(world, 20_000, |w| w.nodes[node].answers.contains_key(&id));
    world.nodes[node].answers[&id].clone()
}

fn configure(world: &mut World, node: usize, net: &NetConfig) -> Result<(), Refusal> {
    let volumes = vec![world.options.volume.clone()];
    verb(world, node, "adjust", AdminCommand::Configure { net: Box::new(net.clone()), volumes })
}

fn load(world: &mut World, node: usize, writes: u64) {
    for _ in 0..writes {
        let start = world.rng.below(4096 / 8 - 8) * 8;
        let len = 8 * (1 + world.rng.below(4));
        world.request(node, RequestOp::Write, start, len, false);
    }
}

#[test]
fn the_protocol_changes_under_load_in_every_direction() {
    let all = [Protocol::A, Protocol::B, Protocol::C];
    for (seed, from) in (0..).zip(all) {
        for to in all {
            for node in 0..2 {
                let mut world = pair(seed, from);
                for round in 0..6 {
                    let protocol = if round % 2 == 0 { to } else { from };
                    let net = NetConfig { protocol, ..world.options.net.clone() };
                    load(&mut world, 0, 12);
                    let pause = world.rng.below(2);
                    world.run(pause);
                    assert_eq!(configure(&mut world, node, &net), Ok(()));
                    world.options.net.protocol = protocol;
                    load(&mut world, 0, 12);
                }
                quiet(&mut world);
                assert_eq!(world.failed_requests, 0);
                // Both say the same, so they meet again without a word.
                world.cut(false);
                world.run(50);
                quiet(&mut world);
            }
        }
    }
}

#[test]
fn a_second_primary_is_allowed_and_forbidden_while_it_runs() {
    let mut world = pair(10, Protocol::C);
    let one = world.options.net.clone();
    let two = NetConfig { allow_two_primaries: true, ..one.clone() };
    let promote = || AdminCommand::Primary { force: false };
    assert_eq!(verb(&mut world, 1, "primary", promote()).map_err(|refused| refused.number), Err(-1));
    assert_eq!(configure(&mut world, 0, &two), Ok(()));
    world.run(20);
    assert_eq!(verb(&mut world, 1, "primary", promote()), Ok(()));
    load(&mut world, 0, 40);
    load(&mut world, 1, 40);
    world.run(5);
    assert_eq!(configure(&mut world, 1, &one).map_err(|refused| refused.number), Err(164));
    quiet(&mut world);
    assert_eq!(verb(&mut world, 1, "secondary", AdminCommand::Secondary), Ok(()));
    world.run(20);
    assert_eq!(configure(&mut world, 0, &one), Ok(()));
    world.run(20);
    assert_eq!(verb(&mut world, 1, "primary", promote()).map_err(|refused| refused.number), Err(-1));
    quiet(&mut world);
}

#[test]
fn options_that_do_not_fit_are_refused_with_their_number() {
    let mut world = pair(20, Protocol::C);
    let net = NetConfig { protocol: Protocol::A, allow_two_primaries: true, ..world.options.net.clone() };
    let refused = configure(&mut world, 0, &net).expect_err("two Primaries need protocol C");
    assert_eq!(refused.number, 139);
    assert!(refused.facts.iter().any(|fact| fact.contains("protocol A")) && !refused.advice.is_empty());
    quiet(&mut world);
}
