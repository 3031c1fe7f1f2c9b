//! Every verb in every state: it is answered, a refusal says all it must, and while one waits, `status`
//! says for what (promises 3 and 5; docs/refusals.md).
use lockstep_replicator::core::config::{Fencing, NetConfig, OnCongestion, Protocol};
use lockstep_replicator::core::event::{AdminCommand, HandlerName};
use lockstep_replicator::core::resize::ResizeOptions;
use lockstep_replicator::core::state::{ConnState, ReplState};
use lockstep_replicator::units::SectorCount;
use lockstep_tests::sim::node::VOLUME;
use lockstep_tests::sim::script::{
    deaf, detach, handler_says, load, pair_with, pass, slow, status, verb, within,
};
use lockstep_tests::sim::{Options, World};
use std::collections::BTreeSet;

/// The numbers that docs/refusals.md lists for the core.
const SAID: &[i32] = &[
    -1, -2, -4, -5, -6, -7, -8, -10, -11, -12, -14, -15, -16, -18, -19, 103, 111, 118, 123, 124, 125, 127,
    130, 131, 134, 135, 138, 139, 150, 151, 154, 155, 156, 157, 164, 170,
];

type State = (&'static str, fn(u64) -> World);

fn plain(seed: u64) -> World {
    let mut options = Options::new(seed);
    options.sectors = 16_384;
    options.net.ping_int_ms = 1000;
    pair_with(options)
}

fn apart(seed: u64) -> World {
    let mut world = plain(seed);
    world.cut(true);
    pass(&mut world, 100);
    world
}

fn alone(seed: u64) -> World {
    let mut world = plain(seed);
    for node in 0..2 {
        assert_eq!(verb(&mut world, node, "disconnect", AdminCommand::Disconnect { force: false }), Ok(()));
    }
    world
}

fn copying(seed: u64) -> World {
    let mut world = plain(seed);
    world.cut(true);
    pass(&mut world, 100);
    load(&mut world, 0, 100);
    pass(&mut world, 300);
    // The source's program never answers: both stay on their way.
    handler_says(&mut world, 0, HandlerName::BeforeResyncSource, None);
    world.heal();
    within(&mut world, 3000, |w| w.state(1).is_some_and(|s| s.3 == ReplState::WFBitMapT));
    world
}

fn paused(seed: u64) -> World {
    let mut world = plain(seed);
    world.cut(true);
    pass(&mut world, 100);
    load(&mut world, 0, 100);
    pass(&mut world, 300);
    assert_eq!(verb(&mut world, 1, "pause-sync", AdminCommand::PauseSync(VOLUME)), Ok(()));
    world.heal();
    within(&mut world, 3000, |w| w.state(0).is_some_and(|s| s.3 == ReplState::PausedSyncS));
    world
}

fn diskless(seed: u64) -> World {
    let mut world = plain(seed);
    detach(&mut world, 0);
    world
}

fn held_open(seed: u64) -> World {
    let mut world = plain(seed);
    world.feed(0, lockstep_replicator::core::event::Input::Opened(VOLUME));
    world
}

fn suspended(seed: u64) -> World {
    let mut world = plain(seed);
    assert_eq!(verb(&mut world, 0, "suspend-io", AdminCommand::SuspendIo), Ok(()));
    load(&mut world, 0, 3);
    world
}

fn silent(seed: u64) -> World {
    let mut world = plain(seed);
    load(&mut world, 0, 5);
    deaf(&mut world, 0, true);
    deaf(&mut world, 1, true);
    world
}

fn ahead(seed: u64) -> World {
    let mut options = Options::new(seed);
    options.sectors = 16_384;
    options.net.protocol = Protocol::A;
    options.net.on_congestion = OnCongestion::PullAhead;
    options.net.congestion_fill_sectors = 100;
    let mut world = pair_with(options);
    slow(&mut world, 1, 100);
    load(&mut world, 0, 40);
    within(&mut world, 3000, |w| w.state(1).is_some_and(|s| s.3 == ReplState::Behind));
    world
}

const STATES: &[State] = &[
    ("connected", plain),
    ("the link is down", apart),
    ("StandAlone", alone),
    ("a resync begins", copying),
    ("a resync is paused", paused),
    ("the Primary is diskless", diskless),
    ("held open", held_open),
    ("suspended", suspended),
    ("nothing arrives", silent),
    ("Ahead and Behind", ahead),
];

fn commands(world: &World) -> Vec<(&'static str, AdminCommand)> {
    let resize = |sectors: Option<u64>| ResizeOptions {
        size: sectors.map(SectorCount),
        assume_clean: false,
        assume_peer_has_space: false,
        shrink: false,
    };
    let configure = |net: NetConfig| AdminCommand::Configure {
        net: Box::new(net),
        volumes: vec![world.options.volume.clone()],
    };
    let net = world.options.net.clone();
    let none = lockstep_replicator::units::VolumeNr(9);
    vec![
        ("detach", AdminCommand::Detach { volume: VOLUME, force: false }),
        ("connect", AdminCommand::Connect { discard_my_data: false, tentative: false }),
        ("connect --discard-my-data", AdminCommand::Connect { discard_my_data: true, tentative: false }),
        ("disconnect", AdminCommand::Disconnect { force: false }),
        ("primary", AdminCommand::Primary { force: false }),
        ("secondary", AdminCommand::Secondary),
        ("invalidate", AdminCommand::Invalidate(VOLUME)),
        ("invalidate-remote", AdminCommand::InvalidateRemote(VOLUME)),
        ("invalidate --reset-bitmap=no", AdminCommand::InvalidateMarked(VOLUME)),
        ("invalidate-remote --reset-bitmap=no", AdminCommand::InvalidateRemoteMarked(VOLUME)),
        ("verify", AdminCommand::Verify { volume: VOLUME, start: None, stop: None }),
        ("pause-sync", AdminCommand::PauseSync(VOLUME)),
        ("resume-sync", AdminCommand::ResumeSync(VOLUME)),
        ("outdate", AdminCommand::Outdate(VOLUME)),
        ("new-current-uuid", AdminCommand::NewCurrentUuid { volume: VOLUME, clear_bitmap: false }),
        ("resize", AdminCommand::Resize { volume: VOLUME, options: resize(None) }),
        ("resize --size", AdminCommand::Resize { volume: VOLUME, options: resize(Some(8192)) }),
        ("no such volume", AdminCommand::Invalidate(none)),
        (
            "two Primaries with A",
            configure(NetConfig { protocol: Protocol::A, allow_two_primaries: true, ..net.clone() }),
        ),
        (
            "pull-ahead with C",
            configure(NetConfig {
                protocol: Protocol::C,
                on_congestion: OnCongestion::PullAhead,
                ..net.clone()
            }),
        ),
        (
            "stonith with A",
            configure(NetConfig { protocol: Protocol::A, fencing: Fencing::ResourceAndStonith, ..net }),
        ),
        ("resume-io", AdminCommand::ResumeIo),
        ("down", AdminCommand::Down),
    ]
}

#[test]
fn every_verb_in_every_state_is_answered_and_says_why_and_what_it_waits_for() {
    let mut seen = BTreeSet::new();
    let mut waited = 0;
    for (seed, (state, make)) in (0..).zip(STATES) {
        let count = commands(&plain(0)).len();
        for at in 0..count {
            for node in 0..2 {
                let mut world = make(9000 + seed);
                let (name, command) = commands(&world).swap_remove(at);
                let id = world.admin(node, name, command);
                pass(&mut world, 30);
                let mut answer = world.nodes[node].answers.get(&id).cloned();
                if answer.is_none() {
                    waited += 1;
                    let waits = status(&world, node).waiting_for;
                    assert!(!waits.is_empty(), "{state}: {name} on n{node} waits and does not say for what");
                    // What it waits for comes to its end, for better or worse.
                    pass(&mut world, 8000);
                    world.handler_answers.clear();
                    slow(&mut world, 1, 0);
                    pass(&mut world, 12_000);
                    answer = world.nodes[node].answers.get(&id).cloned();
                }
                let waits = status(&world, node).waiting_for;
                let Some(answer) = answer else {
                    // Only what a person holds up may wait longer, and says so.
                    assert!(
                        waits.iter().any(|wait| wait.contains("resume-io") || wait.contains("handler")),
                        "{state}: {name} on n{node} hangs, waiting for {waits:?}"
                    );
                    continue;
                };
                let Err(refused) = answer else { continue };
                let told = format!("{state}: {name} on n{node}: {refused:?}");
                seen.insert(refused.number);
                assert!(SAID.contains(&refused.number), "a number that is not listed: {told}");
                assert!(!refused.text.is_empty() && !refused.facts.is_empty(), "{told}");
                assert!(refused.facts.iter().all(|fact| fact.len() > 5), "{told}");
                assert!(!refused.advice.is_empty(), "{told}");
            }
        }
    }
    assert!(waited > 10, "{waited} verbs waited");
    for number in
        [-1, -2, -4, -5, -6, -8, -10, -12, -14, -15, -16, 123, 125, 127, 134, 135, 139, 151, 154, 155, 157]
    {
        assert!(seen.contains(&number), "({number}) was never met: {seen:?}");
    }
}

/// What the peer refuses comes with the facts of both nodes.
#[test]
fn a_refusal_of_the_peer_has_the_facts_of_both() {
    let mut options = Options::new(1);
    options.sectors = 16_384;
    let mut world = pair_with(options);
    // n0 is Primary: n1 may not make it a target.
    let refused = verb(&mut world, 1, "invalidate-remote", AdminCommand::InvalidateRemote(VOLUME))
        .expect_err("Primary");
    assert_eq!(refused.number, -10);
    let facts = refused.facts.join("\n");
    assert!(facts.contains("n0 says:") && facts.contains("that node is Primary"), "{facts}");
    assert!(
        facts.contains("here Secondary, disk UpToDate") && facts.contains("the peer is Primary"),
        "{facts}"
    );
    assert_eq!(world.state(0).unwrap().2, ConnState::Connected);
}
