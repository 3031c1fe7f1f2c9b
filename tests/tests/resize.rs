//! Online resize: both backing disks grew, or the volume shall shrink; cut at every metadata write and
//! after every message.
use lockstep_proto::Message;
use lockstep_replicator::core::config::Fencing;
use lockstep_replicator::core::event::{AdminCommand, Event, HandlerName, Refusal, RequestOp};
use lockstep_replicator::core::resize::ResizeOptions;
use lockstep_replicator::core::state::{ConnState, DiskState, ReplState};
use lockstep_replicator::meta::{Layout, MetaKind};
use lockstep_replicator::units::{BlockRange, Sector, SectorCount};
use lockstep_tests::sim::meta_area::MetaFate;
use lockstep_tests::sim::node::VOLUME;
use lockstep_tests::sim::real_area::RealArea;
use lockstep_tests::sim::{Options, World};

const KIB: u64 = 1024;
const MIB: u64 = 1 << 20;

/// Sizes of data and metadata device, before and after.
#[derive(Clone, Copy, Debug)]
struct Devices {
    kind: MetaKind,
    old: (u64, u64),
    new: (u64, u64),
}

/// The metadata moves far away, next to where it was, over itself, by an odd size; or does not move.
const GROWTHS: [Devices; 5] = [
    Devices { kind: MetaKind::Internal, old: (8 * MIB, 0), new: (20 * MIB, 0) },
    Devices { kind: MetaKind::Internal, old: (8 * MIB, 0), new: (8 * MIB + 4 * KIB, 0) },
    Devices { kind: MetaKind::Internal, old: (8 * MIB, 0), new: (8 * MIB + 36 * KIB, 0) },
    Devices { kind: MetaKind::Internal, old: (8 * MIB + 1536, 0), new: (9 * MIB + 512, 0) },
    Devices { kind: MetaKind::FlexExternal, old: (8 * MIB, 128 * KIB), new: (20 * MIB, 256 * KIB) },
];

fn capacity(kind: MetaKind, (data, meta): (u64, u64)) -> u64 {
    Layout::for_device(kind, data, meta, 1, 8).expect("sizes of a disk").capacity().0
}

impl Devices {
    fn before(self) -> u64 {
        capacity(self.kind, self.old)
    }

    fn after(self) -> u64 {
        capacity(self.kind, self.new)
    }
}

/// A pair in sync on the old sizes, node 0 Primary.
fn pair(seed: u64, devices: Devices) -> World {
    pair_with(seed, devices, |_| {})
}

fn pair_with(seed: u64, devices: Devices, change: impl FnOnce(&mut Options)) -> World {
    let mut options = Options::new(seed);
    options.sectors = devices.after();
    change(&mut options);
    let mut world = World::new(options);
    for node in &mut world.nodes {
        node.disks[0].meta.real = Some(RealArea::new(devices.kind, devices.old.0, devices.old.1));
    }
    world.start(0);
    world.start(1);
    ok(&mut world, 1000, |w| (0..2).all(|n| w.state(n).is_some_and(|s| s.2 == ConnState::Connected)));
    let clear = AdminCommand::NewCurrentUuid { volume: VOLUME, clear_bitmap: true };
    assert_eq!(verb(&mut world, 0, "new-current-uuid", clear), Ok(()));
    assert_eq!(verb(&mut world, 0, "primary", AdminCommand::Primary { force: false }), Ok(()));
    quiet(&mut world);
    assert_eq!(world.nodes[0].export_size, devices.before());
    load(&mut world, 0, 10);
    world.run(60);
    world
}

/// Both devices grow, and what lies behind the old end is not the same on both.
fn grow_devices(world: &mut World, devices: Devices) {
    let tail = devices.after() - devices.before();
    if tail > 0 {
        let range = BlockRange::new(Sector(devices.before()), SectorCount(tail)).expect("not empty");
        let rubbish = vec![u32::MAX; usize::try_from(tail).expect("a small disk")];
        world.nodes[1].disks[0].write(range, rubbish, true, 0);
    }
    grow_devices_clean(world, devices);
}

fn grow_devices_clean(world: &mut World, devices: Devices) {
    for node in &mut world.nodes {
        let area = node.disks[0].meta.real.as_mut().expect("a real area");
        area.grow(devices.new.0, devices.new.1);
    }
}

fn ok(world: &mut World, ms: u64, done: impl FnMut(&World) -> bool) {
    let held = world.run_until(ms, done);
    assert_eq!(world.broken, None);
    let waits: Vec<_> = (0..2).filter_map(|node| world.status(node).map(|s| s.waiting_for)).collect();
    assert!(held, "not within {ms} ms: {:?} {:?} {waits:?}", world.state(0), world.state(1));
}

fn quiet(world: &mut World) {
    ok(world, 20_000, |w| w.in_sync() && w.idle());
}

/// In sync with this size on both nodes, every sector equal and right.
fn settled(world: &mut World, sectors: u64) {
    quiet(world);
    for node in 0..2 {
        let size_kib = world.status(node).map(|status| status.volumes[0].size_kib);
        assert_eq!(size_kib, Some(sectors / 2), "n{node}");
    }
    if let Some(primary) = (0..2).find(|node| world.is_primary(*node)) {
        assert_eq!(world.nodes[primary].export_size, sectors);
    }
    world.check_quiet();
    world.check_content(0);
    assert_eq!(world.broken, None);
}

fn verb(world: &mut World, node: usize, name: &'static str, command: AdminCommand) -> Result<(), Refusal> {
    let id = world.admin(node, name, command);
    ok(world, 20_000, |w| w.nodes[node].answers.contains_key(&id));
    world.nodes[node].answers[&id].clone()
}

fn resize(world: &mut World, node: usize, options: ResizeOptions) -> Result<(), Refusal> {
    verb(world, node, "resize", AdminCommand::Resize { volume: VOLUME, options })
}

fn load(world: &mut World, node: usize, writes: u64) {
    for _ in 0..writes {
        let size = world.nodes[node].export_size;
        let len = 8 * (1 + world.rng.below(4));
        let start = world.rng.below((size - len) / 8) * 8;
        world.request(node, RequestOp::Write, start, len, false);
    }
}

fn resynced_bits(world: &World) -> u64 {
    let done = world.log.iter().rev().find_map(|(_, _, event)| match event {
        Event::ResyncDone { bits_total, .. } => Some(*bits_total),
        _ => None,
    });
    done.unwrap_or(0)
}

#[test]
fn both_disks_grow_under_load_and_only_the_new_area_is_copied() {
    for (seed, devices) in (0..).zip(GROWTHS) {
        for asked in 0..2 {
            let mut world = pair(seed, devices);
            grow_devices(&mut world, devices);
            let id = world.admin(
                asked,
                "resize",
                AdminCommand::Resize { volume: VOLUME, options: ResizeOptions::default() },
            );
            for _ in 0..20 {
                load(&mut world, 0, 2);
                world.run(1);
            }
            ok(&mut world, 5000, |w| w.nodes[asked].answers.contains_key(&id));
            assert_eq!(world.nodes[asked].answers[&id], Ok(()), "{devices:?}");
            load(&mut world, 0, 20);
            settled(&mut world, devices.after());
            assert_eq!(world.failed_requests, 0);
            let added = devices.after().div_ceil(8) - devices.before() / 8;
            assert!(resynced_bits(&world) <= added + 300, "{} for {added}", resynced_bits(&world));
            // Everything is found again at the new place.
            for node in 0..2 {
                world.crash(node, true);
            }
            world.history.weaken(true);
            world.start(0);
            world.start(1);
            settled(&mut world, devices.after());
        }
    }
}

#[test]
fn a_node_may_stop_at_any_metadata_write_of_a_resize() {
    let mut cuts = 0;
    for (seed, devices) in (10..).zip(GROWTHS) {
        for victim in 0..2 {
            let mut n = 0;
            loop {
                // Each cut with three outcomes of what was being written.
                let mut reached = false;
                for outcome in 0..3 {
                    let mut world = pair(seed * 1000 + n * 3 + outcome, devices);
                    world.run(20);
                    grow_devices(&mut world, devices);
                    world.crash_at_meta = Some((victim, n, outcome == 1));
                    let asked = usize::try_from((n + outcome) % 2).unwrap();
                    let options = ResizeOptions::default();
                    world.admin(asked, "resize", AdminCommand::Resize { volume: VOLUME, options });
                    load(&mut world, 0, 3);
                    world.run(60);
                    reached = world.crash_at_meta.is_none();
                    world.crash_at_meta = None;
                    if world.nodes[victim].core.is_none() {
                        if outcome == 1 {
                            world.history.weaken(true);
                        }
                        world.start(victim);
                    }
                    quiet(&mut world);
                    if !world.is_primary(0) {
                        let promoted = verb(&mut world, 0, "primary", AdminCommand::Primary { force: false });
                        assert_eq!(promoted, Ok(()));
                    }
                    assert_eq!(resize(&mut world, 0, ResizeOptions::default()), Ok(()));
                    load(&mut world, 0, 10);
                    settled(&mut world, devices.after());
                    cuts += u64::from(reached);
                }
                if !reached {
                    break;
                }
                n += 1;
                assert!(n < 100, "the resize does not end");
            }
            assert!(n >= 3, "{devices:?}: only {n} metadata writes on n{victim}");
        }
    }
    assert!(cuts > 150, "only {cuts} cuts");
}

/// A node that is alone knows what its peer misses by its bitmap only, and that moves. From the new superblock on, until
/// the bitmap stands behind it, the flags say "everything", whatever lies there (SEM §26).
#[test]
fn a_move_that_is_cut_short_forgets_no_mark() {
    let devices = GROWTHS[0];
    for primary in [true, false] {
        let mut n = 0;
        loop {
            let mut world = pair(300 + n, devices);
            quiet(&mut world);
            world.crash(1, false);
            ok(&mut world, 1000, |w| w.state(0).is_some_and(|s| s.2 < ConnState::Connected));
            load(&mut world, 0, 30);
            ok(&mut world, 1000, World::idle);
            if !primary {
                assert_eq!(verb(&mut world, 0, "secondary", AdminCommand::Secondary), Ok(()));
            }
            for node in &mut world.nodes {
                node.disks[0].meta.real.as_mut().expect("a real area").grow_stale(devices.new.0);
            }
            world.meta_fate = Some(MetaFate::New);
            world.crash_at_meta = Some((0, n, false));
            let options = ResizeOptions { assume_peer_has_space: true, ..ResizeOptions::default() };
            world.admin(0, "resize", AdminCommand::Resize { volume: VOLUME, options });
            world.run(500);
            let reached = world.crash_at_meta.take().is_none();
            assert_eq!(reached, world.nodes[0].core.is_none());
            if reached {
                world.start(0);
            }
            world.start(1);
            quiet(&mut world);
            if !reached {
                settled(&mut world, devices.after());
                break;
            }
            n += 1;
        }
        assert!(n > 5, "only {n} metadata writes");
    }
}

/// A disk that fails in the middle of a resize ends it with an answer, on either node; it can be taken back, and
/// the next resize does the rest.
#[test]
fn a_disk_may_fail_at_any_metadata_write_of_a_resize() {
    let mut refused = 0;
    for (seed, devices) in [(80, GROWTHS[0]), (81, GROWTHS[4])] {
        for victim in 0..2 {
            for n in 0.. {
                let mut world = pair(seed, devices);
                if victim == 0 {
                    // Its copy of the new area comes from the other node, whatever stands there.
                    grow_devices_clean(&mut world, devices);
                } else {
                    grow_devices(&mut world, devices);
                }
                let id = world.admin(
                    n % 2,
                    "resize",
                    AdminCommand::Resize { volume: VOLUME, options: ResizeOptions::default() },
                );
                let (limit, end) = (world.nodes[victim].metas_total + n as u64, world.now + 2_000_000_000);
                while world.nodes[victim].metas_total < limit && world.step(end) {}
                let over = world.nodes[n % 2].answers.contains_key(&id);
                world.nodes[victim].disks[0].faults.metas = u32::from(!over);
                ok(&mut world, 20_000, |w| w.nodes[n % 2].answers.contains_key(&id));
                refused += u64::from(world.nodes[n % 2].answers[&id].is_err());
                world.run(500);
                world.nodes[victim].disks[0].faults.metas = 0;
                if world.state(victim).is_some_and(|state| state.1 == DiskState::Diskless) {
                    world.attach(victim);
                }
                quiet(&mut world);
                assert_eq!(
                    resize(&mut world, 0, ResizeOptions::default()),
                    Ok(()),
                    "{devices:?} n{victim} {n}"
                );
                settled(&mut world, devices.after());
                if over {
                    assert!(n > 3, "only {n} metadata writes");
                    break;
                }
                assert!(n < 100, "the resize does not end");
            }
        }
    }
    assert!(refused > 4, "only {refused} of the resizes noticed");
}

#[test]
fn a_peer_that_refuses_ends_a_resize_with_its_reason() {
    let devices = GROWTHS[4];
    for (seed, which) in [(90, 0), (91, 1)] {
        let mut world = pair(seed, devices);
        grow_devices(&mut world, devices);
        let mut answers = 0;
        world.net.tamper = Some(Box::new(move |to, message, _| {
            let Message::StateReply(reply) = message else { return false };
            answers += 1;
            if to != 0 || answers <= which {
                return false;
            }
            (reply.result, reply.text) = (170, "somebody uses what lies behind".into());
            true
        }));
        let refused = resize(&mut world, 0, ResizeOptions::default()).unwrap_err();
        assert_eq!(refused.number, 170);
        let said = |fact: &String| fact.contains("n1 says: (170) somebody uses what lies behind");
        assert!(refused.facts.iter().any(said), "{refused:?}");
        // Refused when it had to follow: the nodes meet anew, and the smaller one follows.
        quiet(&mut world);
        assert_eq!(resize(&mut world, 0, ResizeOptions::default()), Ok(()));
        settled(&mut world, devices.after());
    }
}

#[test]
fn the_connection_may_end_after_any_message_of_a_resize() {
    let devices = GROWTHS[0];
    let mut n = 0;
    loop {
        let mut world = pair(40, devices);
        world.run(20);
        grow_devices(&mut world, devices);
        world.cut_after = Some(world.delivered + n);
        let options = ResizeOptions::default();
        let asked = usize::try_from(n % 2).unwrap();
        let id = world.admin(asked, "resize", AdminCommand::Resize { volume: VOLUME, options });
        load(&mut world, 0, 2);
        world.run(300);
        let reached = world.cut_after.is_none();
        world.cut_after = None;
        ok(&mut world, 5000, |w| w.nodes[asked].answers.contains_key(&id));
        quiet(&mut world);
        assert_eq!(resize(&mut world, 0, ResizeOptions::default()), Ok(()));
        settled(&mut world, devices.after());
        if !reached {
            break;
        }
        n += 1;
        assert!(n < 500, "the script does not end");
    }
    assert!(n > 10, "only {n} messages were cut");
}

/// The new area is resynced between copies of one generation. What the source is asked to write before the target is
/// durably the older copy is not told done: the target may be all that is left. Simulator, `--features two,resize --seed 12102`.
#[test]
fn a_target_that_never_heard_of_its_resync_may_go_on_alone() {
    for seed in 0..10 {
        let devices = GROWTHS[4];
        let mut world = pair(200 + seed, devices);
        quiet_writes(&mut world);
        world.options.weather.notice_ms = 5000;
        grow_devices_clean(&mut world, devices);
        let options = ResizeOptions::default();
        world.admin(1, "resize", AdminCommand::Resize { volume: VOLUME, options });
        ok(&mut world, 5000, |w| w.state(0).is_some_and(|s| s.3 == ReplState::WFBitMapS));
        assert_eq!(world.state(1).unwrap().1, DiskState::UpToDate);
        world.crash(1, false);
        load(&mut world, 0, 3);
        world.run(60);
        assert_eq!(world.state(0).unwrap().3, ReplState::WFBitMapS, "seed {seed}: it has not noticed");
        assert_eq!(world.nodes[0].requests.len(), 3, "nothing is told done");
        let waits = world.status(0).map(|status| status.waiting_for).unwrap_or_default();
        assert!(waits.iter().any(|wait| wait.contains("older one (3 write(s) held back)")), "{waits:?}");
        if seed % 2 == 0 {
            // It learns that it is alone, and says so.
            ok(&mut world, 9000, World::idle);
            assert_eq!(world.failed_requests, 0);
        } else {
            world.crash(0, seed % 4 == 1);
            world.start(1);
            ok(&mut world, 2000, |w| w.state(1).is_some_and(|s| s.1 == DiskState::UpToDate));
            let promoted = verb(&mut world, 1, "primary", AdminCommand::Primary { force: false });
            assert_eq!(promoted, Ok(()));
            load(&mut world, 1, 3);
            ok(&mut world, 5000, World::idle);
            world.crash(1, false);
            world.start(0);
        }
        world.start(1);
        settled(&mut world, devices.after());
    }
}

/// Writes that fencing froze keep their places in the activity log, so no metadata moves; the peer that would end the
/// freeze waits for the end of the resize. It is called off. Simulator, seed 200044.
#[test]
fn a_freeze_calls_off_a_resize_that_waits_for_the_log() {
    for asked in 0..2 {
        let devices = GROWTHS[0];
        let mut world = pair_with(210 + asked as u64, devices, |options| {
            options.net.fencing = Fencing::ResourceAndStonith;
        });
        quiet_writes(&mut world);
        world.handler_answers.insert((0, HandlerName::FencePeer), Some(1));
        grow_devices_clean(&mut world, devices);
        let at_step = |w: &World, node: usize, step: &str| {
            let waits = w.status(node).map(|status| status.waiting_for).unwrap_or_default();
            waits.iter().any(|wait| wait.contains("resize, step") && wait.contains(step))
        };
        let resize_now = || AdminCommand::Resize { volume: VOLUME, options: ResizeOptions::default() };
        let mut id = 0;
        if asked == 1 {
            id = world.admin(1, "resize", resize_now());
            ok(&mut world, 200, |w| at_step(w, 1, "AskPeer"));
        }
        load(&mut world, 0, 5);
        if asked == 0 {
            id = world.admin(0, "resize", resize_now());
        }
        ok(&mut world, 100, |w| at_step(w, 0, "Drain"));
        world.cut(true);
        world.run(200);
        assert!(!world.nodes[0].requests.is_empty(), "frozen");
        let refused = world.nodes[asked].answers[&id].clone().unwrap_err();
        let why = if asked == 0 { "IO frozen by fencing" } else { "before the peer told its size" };
        assert!(refused.facts.iter().any(|fact| fact.contains(why)), "{refused:?}");
        world.heal();
        settled(&mut world, devices.before());
        assert_eq!(world.failed_requests, 0);
        assert_eq!(resize(&mut world, asked, ResizeOptions::default()), Ok(()));
        settled(&mut world, devices.after());
    }
}

#[test]
fn with_assume_clean_nothing_is_copied() {
    let devices = GROWTHS[4];
    let mut world = pair(50, devices);
    grow_devices_clean(&mut world, devices);
    let options = ResizeOptions { assume_clean: true, ..ResizeOptions::default() };
    assert_eq!(resize(&mut world, 0, options), Ok(()));
    assert_eq!(world.state(0).unwrap().3, ReplState::Established);
    settled(&mut world, devices.after());
    assert_eq!(resynced_bits(&world), 0);
}

#[test]
fn the_smaller_disk_and_the_named_size_are_limits() {
    let devices = GROWTHS[4];
    let mut world = pair(60, devices);
    // Only one grew: nothing happens.
    world.nodes[0].disks[0].meta.real.as_mut().unwrap().grow(devices.new.0, devices.new.1);
    assert_eq!(resize(&mut world, 0, ResizeOptions::default()), Ok(()));
    settled(&mut world, devices.before());
    let too_much = ResizeOptions { size: Some(SectorCount(devices.after())), ..ResizeOptions::default() };
    assert_eq!(resize(&mut world, 0, too_much).unwrap_err().number, 111);
    grow_devices_clean(&mut world, devices);
    let half = devices.before() + 4096;
    let options = ResizeOptions { size: Some(SectorCount(half)), ..ResizeOptions::default() };
    assert_eq!(resize(&mut world, 1, options), Ok(()));
    settled(&mut world, half);
}

#[test]
fn refusals_name_what_forbids_it() {
    let devices = GROWTHS[0];
    let mut world = pair(70, devices);
    let smaller = ResizeOptions { size: Some(SectorCount(4096)), ..ResizeOptions::default() };
    let refused = resize(&mut world, 0, smaller).unwrap_err();
    assert_eq!(refused.number, 170);
    assert!(refused.facts.iter().any(|fact| fact.contains("4096")) && refused.advice.contains("--force"));
    world.cut(true);
    world.run(50);
    load(&mut world, 0, 100);
    world.run(50);
    world.heal();
    ok(&mut world, 5000, |w| w.state(1).is_some_and(|s| s.3 == ReplState::SyncTarget));
    assert_eq!(resize(&mut world, 0, ResizeOptions::default()).unwrap_err().number, 130);
    quiet(&mut world);
    assert_eq!(verb(&mut world, 0, "secondary", AdminCommand::Secondary), Ok(()));
    world.run(20);
    assert_eq!(resize(&mut world, 0, ResizeOptions::default()).unwrap_err().number, 131);
    settled(&mut world, devices.before());
}

#[test]
fn a_confirmed_shrink_gives_up_what_lies_behind() {
    let devices = GROWTHS[4];
    let mut world = pair(80, devices);
    load(&mut world, 0, 30);
    let size = 4096;
    let options = ResizeOptions { size: Some(SectorCount(size)), shrink: true, ..ResizeOptions::default() };
    assert_eq!(resize(&mut world, 1, options).unwrap_err().number, 170, "not from a Secondary");
    assert_eq!(resize(&mut world, 0, options), Ok(()));
    load(&mut world, 0, 30);
    settled(&mut world, size);
    // It stays so over a restart, and grows again when told.
    for node in 0..2 {
        world.crash(node, false);
    }
    world.start(0);
    world.start(1);
    quiet(&mut world);
}

#[test]
fn a_node_that_was_away_grows_at_the_next_handshake() {
    let devices = GROWTHS[4];
    let mut world = pair(90, devices);
    quiet_writes(&mut world);
    world.crash(1, false);
    world.run(30);
    grow_devices(&mut world, devices);
    load(&mut world, 0, 10);
    // Alone it does not grow: nobody knows what the other disk holds. Unless the operator says so.
    assert_eq!(resize(&mut world, 0, ResizeOptions::default()), Ok(()));
    assert_eq!(world.nodes[0].export_size, devices.before());
    let options = ResizeOptions { assume_peer_has_space: true, ..ResizeOptions::default() };
    assert_eq!(resize(&mut world, 0, options), Ok(()));
    assert_eq!(world.nodes[0].export_size, devices.after());
    load(&mut world, 0, 10);
    world.start(1);
    settled(&mut world, devices.after());
}

#[test]
fn two_nodes_that_grew_while_off_meet_with_the_larger_size() {
    let devices = GROWTHS[4];
    let mut world = pair(95, devices);
    quiet_writes(&mut world);
    for node in 0..2 {
        world.crash(node, false);
    }
    grow_devices(&mut world, devices);
    // The area of the metadata has to be lengthened by a resize; the data device alone grows by itself.
    world.start(0);
    world.start(1);
    quiet(&mut world);
    assert_eq!(verb(&mut world, 0, "primary", AdminCommand::Primary { force: false }), Ok(()));
    assert_eq!(resize(&mut world, 0, ResizeOptions::default()), Ok(()));
    settled(&mut world, devices.after());
}

fn quiet_writes(world: &mut World) {
    ok(world, 5000, World::idle);
}

/// A pair whose node `away` has no disk attached.
fn pair_without_disk(seed: u64, devices: Devices, away: usize) -> World {
    let mut world = pair(seed, devices);
    quiet_writes(&mut world);
    let detach = AdminCommand::Detach { volume: VOLUME, force: false };
    assert_eq!(verb(&mut world, away, "detach", detach), Ok(()));
    world.run(20);
    world
}

#[test]
fn a_diskless_primary_follows_what_its_operator_vouches_for() {
    let devices = GROWTHS[0];
    let mut world = pair_without_disk(97, devices, 0);
    grow_devices_clean(&mut world, devices);
    let options = ResizeOptions { assume_peer_has_space: true, ..ResizeOptions::default() };
    assert_eq!(resize(&mut world, 1, options), Ok(()));
    ok(&mut world, 1000, |w| w.nodes[0].export_size == devices.after());
    load(&mut world, 0, 30);
    ok(&mut world, 5000, World::idle);
    // Its own disk has room for that: its metadata moves before it is taken back.
    world.attach(0);
    settled(&mut world, devices.after());
}

/// What a disk holds that is not attached is not known: the volume does not grow past it (SEM §26), or it could
/// never come back. Simulator, `--features resize --seed 1161` and 1162.
#[test]
fn a_volume_does_not_grow_past_a_disk_that_is_away() {
    for away in 0..2 {
        for asked in 0..2 {
            let devices = GROWTHS[0];
            let mut world = pair_without_disk(98, devices, away);
            world.nodes[1 - away].disks[0].meta.real.as_mut().unwrap().grow(devices.new.0, devices.new.1);
            assert_eq!(resize(&mut world, asked, ResizeOptions::default()), Ok(()), "n{away} n{asked}");
            let said = |event: &Event| matches!(event, Event::Note(_, text) if text.contains("keeps its size: no disk is attached"));
            assert!(world.log.iter().any(|(_, node, event)| *node == asked && said(event)));
            assert_eq!(world.nodes[0].export_size, devices.before());
            load(&mut world, 0, 30);
            ok(&mut world, 5000, World::idle);
            world.attach(away);
            settled(&mut world, devices.before());
            // With both there, and both larger, it grows.
            grow_devices_clean(&mut world, devices);
            assert_eq!(resize(&mut world, asked, ResizeOptions::default()), Ok(()));
            settled(&mut world, devices.after());
        }
    }
}

#[test]
fn sizes_at_the_borders_of_the_format_move_without_overlap() {
    let borders = [1_u64 << 27, 1 << 30, 8 << 40, 16 << 40, 64 << 40, 128 << 40];
    for border in borders {
        for old in [border - 4096, border - 512, border, border + 512, border + 4096] {
            for more in [4096_u64, 128 << 20, border / 2] {
                let old_place = Layout::for_device(MetaKind::Internal, old, 0, 1, 8).unwrap();
                let Ok(new_place) = Layout::for_device(MetaKind::Internal, old + more, 0, 1, 8) else {
                    continue;
                };
                // The first write at the new place destroys nothing of the old one.
                assert!(new_place.superblock_byte() >= old_place.area().end, "{old} + {more}");
                assert!(new_place.capacity() >= old_place.capacity());
                assert!(new_place.bitmap_bytes() * 8 * 4096 >= new_place.capacity().bytes());
            }
        }
    }
}
