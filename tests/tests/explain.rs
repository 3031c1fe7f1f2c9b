//! `lockstep explain`: ten typical histories, told by the two cores in the simulator. `docs/explain.md` is
//! what comes out here; `LOCKSTEP_WRITE_DOCS=1` writes it anew.
use lockstep_replicator::core::config::{AfterSb1Pri, NetConfig, Protocol};
use lockstep_replicator::core::event::{AdminCommand, RequestOp};
use lockstep_replicator::core::state::{ConnState, DiskState};
use lockstep_replicator::units::VolumeNr;
use lockstep_tests::sim::{Options, World};
use std::collections::BTreeMap;

const CONNECT: AdminCommand = AdminCommand::Connect { discard_my_data: false, tentative: false };

#[track_caller]
fn ok(world: &mut World, ms: u64, done: impl FnMut(&World) -> bool) {
    let held = world.run_until(ms, done);
    assert_eq!(world.broken, None);
    assert!(held, "not within {ms} ms: {:?} {:?}", world.state(0), world.state(1));
}

#[track_caller]
fn verb(world: &mut World, node: usize, name: &'static str, command: AdminCommand) {
    let id = world.admin(node, name, command);
    ok(world, 20_000, |w| w.nodes[node].answers.contains_key(&id));
    assert_eq!(world.nodes[node].answers[&id], Ok(()), "n{node} {name}");
}

fn primary(world: &mut World, node: usize) {
    verb(world, node, "primary", AdminCommand::Primary { force: false });
}

fn secondary(world: &mut World, node: usize) {
    verb(world, node, "secondary", AdminCommand::Secondary);
}

fn write(world: &mut World, node: usize, start: u64, blocks: u64) {
    let before = world.good_requests;
    world.request(node, RequestOp::Write, start, blocks * 8, false);
    ok(world, 1000, |w| w.good_requests > before);
    world.run(50);
}

/// The activity log knows of the extent, and the write is on its way.
fn in_the_middle_of_a_write(world: &mut World) {
    write(world, 0, 64, 1);
    world.request(0, RequestOp::Write, 0, 64, false);
}

fn connected(world: &World) -> bool {
    (0..2).all(|node| world.state(node).is_some_and(|s| s.2 == ConnState::Connected))
}

fn new_pair(net: &NetConfig) -> World {
    let net = NetConfig { ko_count: 0, connect_int_ms: 1000, ..net.clone() };
    let mut world = World::new(Options { net, ..Options::new(11) });
    world.start(0);
    world.start(1);
    ok(&mut world, 1000, connected);
    world
}

/// In sync, node 0 Primary.
fn pair() -> World {
    pair_with(&NetConfig::default())
}

fn pair_with(net: &NetConfig) -> World {
    let mut world = new_pair(net);
    verb(&mut world, 0, "primary-force", AdminCommand::Primary { force: true });
    ok(&mut world, 10_000, |w| w.in_sync() && w.idle());
    world
}

fn apart(world: &mut World) {
    world.cut(true);
    world.run(100);
}

fn meet(world: &mut World) {
    let before = world.log.len();
    world.heal();
    ok(world, 5000, |w| {
        w.log[before..]
            .iter()
            .any(|(_, _, event)| matches!(event, lockstep_replicator::core::event::Event::Handshake(_)))
    });
    world.run(100);
}

/// Both went on for themselves.
fn diverged(net: &NetConfig) -> World {
    let mut world = pair_with(net);
    world.check_data = false;
    apart(&mut world);
    write(&mut world, 0, 800, 3);
    primary(&mut world, 1);
    write(&mut world, 1, 8000, 5);
    world
}

/// A title, what happened, and the world after it; node 0 is asked.
type History = (&'static str, &'static str, fn() -> World);

const HISTORIES: [History; 12] = [
    ("Two new disks", "Both nodes ran `create-md` and `up`; nobody has said yet whose data counts.", || {
        new_pair(&NetConfig::default())
    }),
    ("The first copy", "On alpha, `drbdadm primary --force` declared its data good.", pair),
    (
        "The link was away for a moment",
        "Both nodes were Secondary while the link was down, so nothing could change.",
        || {
            let mut world = pair();
            secondary(&mut world, 0);
            apart(&mut world);
            meet(&mut world);
            world
        },
    ),
    (
        "The Secondary was away",
        "alpha was Primary all the time; beta was restarted, and meanwhile 20 blocks were written.",
        || {
            let mut world = pair();
            world.crash(1, false);
            world.run(100);
            write(&mut world, 0, 4096, 20);
            world.start(1);
            meet(&mut world);
            world
        },
    ),
    (
        "The Primary crashed and came back, nobody took over",
        "alpha crashed while it was writing; beta stayed Secondary and waited.",
        || {
            let mut world = pair();
            in_the_middle_of_a_write(&mut world);
            world.crash(0, false);
            world.run(100);
            world.start(0);
            meet(&mut world);
            world
        },
    ),
    (
        "The same under protocol A",
        "The application on alpha had been told that writes were done which had only been sent.",
        || {
            let net = NetConfig { protocol: Protocol::A, ..NetConfig::default() };
            let mut world = pair_with(&net);
            in_the_middle_of_a_write(&mut world);
            world.crash(0, false);
            world.run(100);
            world.start(0);
            meet(&mut world);
            world
        },
    ),
    (
        "The Primary crashed and the other node took over",
        "alpha crashed, beta became Primary and wrote; now alpha is back.",
        || {
            let mut world = pair();
            in_the_middle_of_a_write(&mut world);
            world.crash(0, false);
            world.run(100);
            primary(&mut world, 1);
            write(&mut world, 1, 4096, 7);
            world.start(0);
            meet(&mut world);
            world
        },
    ),
    (
        "The link was cut in the middle of a resync",
        "beta was being brought up to date when the link was lost, and alpha wrote on.",
        || {
            let mut world = pair();
            apart(&mut world);
            for start in 0..20 {
                write(&mut world, 0, start * 2048, 250);
            }
            world.heal();
            ok(&mut world, 5000, |w| w.state(1).is_some_and(|s| s.1 == DiskState::Inconsistent));
            apart(&mut world);
            write(&mut world, 0, 60_000, 2);
            meet(&mut world);
            world
        },
    ),
    (
        "Split brain",
        "The link was lost; on beta somebody ran `drbdadm primary` although alpha was Primary and running.",
        || {
            let mut world = diverged(&NetConfig::default());
            meet(&mut world);
            world
        },
    ),
    (
        "Split brain, resolved by hand",
        "The same, and then on beta: `drbdadm secondary`, `drbdadm connect --discard-my-data`; on alpha: `drbdadm connect`.",
        || {
            let mut world = diverged(&NetConfig::default());
            meet(&mut world);
            ok(&mut world, 5000, |w| {
                (0..2).all(|node| w.state(node).is_some_and(|s| s.2 == ConnState::StandAlone))
            });
            secondary(&mut world, 1);
            verb(&mut world, 0, "connect", CONNECT);
            verb(&mut world, 1, "connect", AdminCommand::Connect { discard_my_data: true, tentative: false });
            ok(&mut world, 5000, connected);
            world
        },
    ),
    (
        "Split brain, resolved by a policy",
        "The configuration says `after-sb-1pri discard-secondary`; beta had been made Secondary before the link came back.",
        || {
            let net = NetConfig { after_sb_1pri: AfterSb1Pri::DiscardSecondary, ..NetConfig::default() };
            let mut world = diverged(&net);
            secondary(&mut world, 1);
            meet(&mut world);
            world
        },
    ),
    (
        "Two disks that never belonged together",
        "By mistake, alpha was connected to a node that holds a copy of something else.",
        || {
            let mut world = pair();
            world.check_data = false;
            world.crash(1, false);
            world.nodes[1].disks[0]
                .meta
                .edit_superblock(|superblock| superblock.uuid = [0x51de_0000_0000_0000, 0, 0, 0]);
            world.start(1);
            meet(&mut world);
            world
        },
    ),
];

fn explained(world: &World) -> String {
    let core = world.nodes[0].core.as_ref().expect("node 0 is up");
    let mut names = core.names();
    names.me = "alpha".into();
    names.peer = "beta".into();
    let last = core.decisions().last().expect("no handshake was decided");
    assert_eq!(last.volume, VolumeNr(0));
    last.explain(&names)
}

/// Generations are drawn anew in each run of the simulator when its internals change; in the document
/// each gets a number of its own.
fn with_fixed_generations(text: &str, known: &mut BTreeMap<String, String>) -> String {
    let mut out = String::new();
    for (at, line) in text.split('\n').enumerate() {
        if at > 0 {
            out.push('\n');
        }
        for piece in line.split_inclusive(|c: char| !c.is_ascii_alphanumeric()) {
            let word = piece.trim_end_matches(|c: char| !c.is_ascii_alphanumeric());
            let generation =
                word.len() == 8 && word.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'A'..=b'F'));
            if generation {
                let number = (known.len() as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
                let fixed = known.entry(word.to_owned()).or_insert_with(|| format!("{number:08X}"));
                out.push_str(fixed);
                out.push_str(&piece[word.len()..]);
            } else {
                out.push_str(piece);
            }
        }
    }
    out
}

const HEAD: &str = "# What the nodes concluded, and why

`lockstep explain RES` (also `drbdadm explain`) shows the last meetings of the two nodes: what each had, which rule
matched, what follows and what is safe to do next; `--json` gives the same as data. `drbdadm connect --tentative RES`
asks without doing anything.

A *generation* names a state of the data. It changes whenever a node writes without the other one; from then on that
node *marks* the blocks it changes. \"blocks marked since\" is the generation that the marks count from. Generations are
random numbers of which only the beginning is shown. The rule numbers are DRBD 8.4's, with some added.

The outputs below are real: a test runs each history on two simulated nodes and compares. They are what alpha says;
beta says the same seen from its side.
";

#[test]
fn the_document_shows_what_the_program_says() {
    let mut document = HEAD.to_owned();
    let mut known = BTreeMap::new();
    for (at, (title, story, history)) in HISTORIES.iter().enumerate() {
        let text = with_fixed_generations(&explained(&history()), &mut known);
        document.push_str(&format!("\n## {}. {title}\n\n{story}\n\n```\n{text}```\n", at + 1));
    }
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/explain.md");
    if std::env::var_os("LOCKSTEP_WRITE_DOCS").is_some() {
        std::fs::write(path, &document).expect("docs/explain.md cannot be written");
    }
    let stands = std::fs::read_to_string(path).expect("docs/explain.md cannot be read");
    assert!(
        stands == document,
        "docs/explain.md is out of date; LOCKSTEP_WRITE_DOCS=1 cargo test -p lockstep-tests --test explain writes it anew"
    );
}

#[test]
fn both_nodes_tell_the_same_story_from_their_sides() {
    for (title, _, history) in &HISTORIES {
        let world = history();
        let last = |node: usize| {
            let core = world.nodes[node].core.as_ref().expect("both nodes are up");
            core.decisions().last().expect("no handshake was decided").clone()
        };
        let (mine, theirs) = (last(0), last(1));
        assert_eq!(mine.decided.outcome, theirs.decided.outcome.mirrored(), "{title}");
        assert_eq!(mine.decided.comparison.rule, theirs.decided.comparison.rule.mirrored(), "{title}");
        assert_eq!((mine.mine, mine.theirs), (theirs.theirs, theirs.mine), "{title}");
        let text = explained(&world);
        assert!(text.contains("\nrule "), "{title}: no rule in\n{text}");
        for word in ["SyncSource", "SyncTarget", "uuid_compare", "WFBitMap"] {
            assert!(!text.contains(word), "{title}: {word} is no word for people, in\n{text}");
        }
        let commands = text.lines().find(|line| line.starts_with("next: ")).expect("no next step");
        assert!(commands.contains("drbdadm "), "{title}: {commands}");
    }
}

#[test]
fn decisions_are_remembered_up_to_a_bound_and_survive_as_json() {
    let mut world = pair();
    for _ in 0..20 {
        world.cut(false);
        world.run(50);
        ok(&mut world, 5000, |w| w.in_sync() && w.idle());
    }
    let status = world.status(0).expect("node 0 is up");
    assert_eq!(status.decisions.len(), 16);
    assert!(status.decisions.windows(2).all(|pair| pair[0].ago_ms >= pair[1].ago_ms));
    let text = serde_json::to_string(&status).expect("a status is plain data");
    let back: lockstep_replicator::core::status::ResourceStatus =
        serde_json::from_str(&text).expect("what was written can be read");
    assert_eq!(back.decisions, status.decisions);
}
