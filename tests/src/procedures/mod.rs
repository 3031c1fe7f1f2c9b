//! What operators and nodes go through, as scripts that may be interrupted anywhere: one list for the tests
//! that cut the link after the n-th message, stop a node at its n-th metadata write, or look at every state
//! on the way.
//!
//! A [`Procedure`] has a start that is never disturbed ([`Procedure::prepare`]), a part that is
//! ([`Procedure::act`], which therefore asserts nothing and waits for nothing for ever), and an end: a careful
//! operator brings both nodes back (`judge.rs`), and then they are equal, in sync and idle, or in the split
//! brain that the procedure is about. Generators 2 and 3 of the catalogue of scenarios.
pub mod campaign;
pub mod judge;
pub mod steps;

use crate::sim::node::VOLUME;
use crate::sim::real_area::RealArea;
use crate::sim::script::within;
use crate::sim::{Options, World};
use lockstep_replicator::core::config::{
    AfterSb0Pri, AfterSb1Pri, AfterSb2Pri, NetConfig, Protocol, RrConflict,
};
use lockstep_replicator::core::event::{AdminCommand, RequestOp};
use lockstep_replicator::core::state::ReplState;
use lockstep_replicator::meta::{Layout, MetaKind};
use lockstep_replicator::units::{BlockRange, Sector, SectorCount};
use steps::{answered, apart, ask, connected, link_up, load, met, pair, write};

/// `connect`, by a person who gives up this node's changes or not.
#[must_use]
pub const fn connect(discard_my_data: bool) -> AdminCommand {
    AdminCommand::Connect { discard_my_data, tentative: false }
}

/// How a split brain shall end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Solved {
    /// By the configured policies, for this node; `None`: they leave it to a person.
    ByPolicy(Option<usize>),
    /// By a person who gives up what node 1 has.
    ByPerson,
}

/// What is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Two new disks meet, one is declared good.
    FirstSync,
    /// A node was away for a while; with `csums-alg`, blocks are compared before they are copied.
    QuickResync,
    /// Online verify; what it finds is repaired.
    Verify {
        /// Some blocks of node 1 changed by themselves.
        rot: bool,
    },
    /// Node 1 becomes Primary.
    Promotion,
    /// Node 0 steps down under load.
    Demotion,
    /// Both nodes went on alone and meet again.
    SplitBrain {
        /// Who is Primary when they meet.
        primaries: [bool; 2],
        /// Blocks changed by each.
        changes: [u64; 2],
        /// The common ancestor is known from the history only.
        history: bool,
        /// What ends it.
        solved: Solved,
    },
    /// A Primary meets newer data.
    NewerDataMeetsPrimary,
    /// Both disks grew.
    Resize(Devices),
    /// This node's disk is let go and comes back, under load.
    Detach(usize),
    /// Two Primaries write to the same blocks.
    Conflict,
    /// This node leaves in good order and comes back.
    Reconnect(usize),
    /// From protocol C to another one, under load.
    Protocol(Protocol),
    /// A node's whole disk is declared bad: its own (`false`), or the peer's (`true`).
    Invalidate(bool),
}

/// Sizes of data and metadata device, before and after.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Devices {
    /// Where metadata is.
    pub kind: MetaKind,
    /// Bytes of the data and of the metadata device.
    pub old: (u64, u64),
    /// After they grew.
    pub new: (u64, u64),
}

impl Devices {
    /// Usable sectors of devices of these sizes.
    ///
    /// # Panics
    /// They are too small for metadata.
    #[must_use]
    pub fn sectors(self, (data, meta): (u64, u64)) -> u64 {
        Layout::for_device(self.kind, data, meta, 1, 8).expect("sizes of a disk").capacity().0
    }
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Procedure {
    /// For reports.
    pub name: String,
    /// Network options of each node.
    pub nets: [NetConfig; 2],
    /// What is done.
    pub kind: Kind,
    /// This is done in its place, from the same start.
    pub instead: Option<fn(&mut World)>,
}

/// Four extents of the activity log, most of them cold when a procedure begins.
const SECTORS: u64 = 4 * 8192;

/// Short times, so that a silent link is noticed soon; no ko-count: what hangs shall be found.
#[must_use]
pub fn net() -> NetConfig {
    NetConfig { ko_count: 0, connect_int_ms: 1000, ping_int_ms: 1000, ..NetConfig::default() }
}

/// A procedure with these options on both nodes.
#[must_use]
pub fn procedure(name: &str, net: NetConfig, kind: Kind) -> Procedure {
    Procedure { name: name.into(), nets: [net.clone(), net], kind, instead: None }
}

/// First sync, resync, verify, roles, disks, connections, options.
#[must_use]
pub fn everyday() -> Vec<Procedure> {
    let csums = NetConfig { csums_alg: Some("sha1".into()), ..net() };
    let verify = NetConfig { verify_alg: Some("sha1".into()), ..net() };
    let two = NetConfig { allow_two_primaries: true, ..net() };
    vec![
        procedure("first sync", net(), Kind::FirstSync),
        procedure("quick resync", net(), Kind::QuickResync),
        procedure("checksum resync", csums, Kind::QuickResync),
        procedure("verify, equal", verify.clone(), Kind::Verify { rot: false }),
        procedure("verify, different", verify, Kind::Verify { rot: true }),
        procedure("promotion", net(), Kind::Promotion),
        procedure("demotion", net(), Kind::Demotion),
        procedure("detach and attach of the Primary", net(), Kind::Detach(0)),
        procedure("detach and attach of the Secondary", net(), Kind::Detach(1)),
        procedure("conflict of two Primaries", two, Kind::Conflict),
        procedure("disconnect by the Primary", net(), Kind::Reconnect(0)),
        procedure("disconnect by the Secondary", net(), Kind::Reconnect(1)),
        procedure("protocol C to A", net(), Kind::Protocol(Protocol::A)),
        procedure("protocol C to B", net(), Kind::Protocol(Protocol::B)),
        procedure("invalidate", net(), Kind::Invalidate(false)),
        procedure("invalidate-remote", net(), Kind::Invalidate(true)),
    ]
}

/// Both disks grow, the metadata moves or not.
#[must_use]
pub fn resizes() -> Vec<Procedure> {
    const KIB: u64 = 1024;
    const MIB: u64 = 1 << 20;
    let internal = |new| Devices { kind: MetaKind::Internal, old: (8 * MIB, 0), new: (new, 0) };
    let external =
        Devices { kind: MetaKind::FlexExternal, old: (8 * MIB, 128 * KIB), new: (12 * MIB, 256 * KIB) };
    vec![
        procedure("resize, metadata moves far", net(), Kind::Resize(internal(12 * MIB))),
        procedure("resize, metadata moves over itself", net(), Kind::Resize(internal(8 * MIB + 36 * KIB))),
        procedure("resize, external metadata", net(), Kind::Resize(external)),
    ]
}

/// A split brain under every policy, 0, 1 and 2 Primaries (S45), and by a person (S23).
#[must_use]
pub fn split_brains() -> Vec<Procedure> {
    use AfterSb0Pri as Zero;
    use AfterSb1Pri as One;
    use AfterSb2Pri as Two;
    let mut all = Vec::new();
    let mut add = |name: String, net: NetConfig, primaries, changes, history, solved| {
        all.push(procedure(&name, net, Kind::SplitBrain { primaries, changes, history, solved }));
    };
    for (policy, changes, winner) in [
        (Zero::Disconnect, [3, 5], None),
        (Zero::DiscardYoungerPrimary, [3, 5], Some(0)),
        (Zero::DiscardOlderPrimary, [3, 5], Some(1)),
        (Zero::DiscardZeroChanges, [0, 5], Some(1)),
        (Zero::DiscardZeroChanges, [3, 5], None),
        (Zero::DiscardLeastChanges, [3, 5], Some(1)),
        (Zero::DiscardLeastChanges, [5, 3], Some(0)),
    ] {
        let net = NetConfig { after_sb_0pri: policy, ..net() };
        let name = format!("after-sb-0pri {} {changes:?}", policy.name());
        add(name, net, [false; 2], changes, false, Solved::ByPolicy(winner));
    }
    let least = NetConfig { after_sb_0pri: Zero::DiscardLeastChanges, ..net() };
    for (policy, theirs, winner) in [
        (One::Disconnect, 1, None),
        (One::Consensus, 1, Some(0)),
        (One::Consensus, 5, None),
        (One::DiscardSecondary, 5, Some(0)),
        (One::CallPriLostAfterSb, 1, Some(0)),
        (One::CallPriLostAfterSb, 5, Some(1)),
        (One::ViolentlyAs0p, 5, Some(1)),
    ] {
        let net = NetConfig { after_sb_1pri: policy, ..least.clone() };
        let name = format!("after-sb-1pri {} {theirs}", policy.name());
        add(name, net, [true, false], [3, theirs], false, Solved::ByPolicy(winner));
    }
    for (policy, two, winner) in [
        (Two::Disconnect, false, None),
        (Two::CallPriLostAfterSb, false, Some(1)),
        (Two::CallPriLostAfterSb, true, Some(1)),
        (Two::ViolentlyAs0p, true, Some(1)),
    ] {
        let net = NetConfig { after_sb_2pri: policy, allow_two_primaries: two, ..least.clone() };
        let name = format!("after-sb-2pri {} two Primaries allowed: {two}", policy.name());
        add(name, net, [true; 2], [3, 5], false, Solved::ByPolicy(winner));
    }
    for (always_asbp, winner) in [(true, Some(1)), (false, None)] {
        let net = NetConfig { always_asbp, ..least.clone() };
        let name = format!("ancestor in the history, always-asbp {always_asbp}");
        add(name, net, [false; 2], [3, 5], true, Solved::ByPolicy(winner));
    }
    add("discard-my-data".into(), net(), [true, false], [3, 5], false, Solved::ByPerson);
    add("discard-my-data, ancestor in the history".into(), net(), [false; 2], [3, 5], true, Solved::ByPerson);
    let mut local_remote = procedure(
        "after-sb-0pri discard-local and discard-remote",
        NetConfig { after_sb_0pri: Zero::DiscardLocal, ..net() },
        Kind::SplitBrain {
            primaries: [false; 2],
            changes: [3, 5],
            history: false,
            solved: Solved::ByPolicy(Some(1)),
        },
    );
    local_remote.nets[1].after_sb_0pri = Zero::DiscardRemote;
    all.push(local_remote);
    for policy in RrConflict::ALL {
        let net = NetConfig { rr_conflict: *policy, ..net() };
        all.push(procedure(&format!("rr-conflict {}", policy.name()), net, Kind::NewerDataMeetsPrimary));
    }
    all
}

impl Procedure {
    /// The world in which the procedure begins.
    ///
    /// # Panics
    /// It does not come that far.
    #[must_use]
    pub fn prepare(&self, seed: u64) -> World {
        let mut options = Options::new(seed);
        options.net = self.nets[0].clone();
        options.sectors =
            if let Kind::Resize(devices) = self.kind { devices.sectors(devices.new) } else { SECTORS };
        let mut world = World::new(options);
        if let Kind::Resize(devices) = self.kind {
            for node in &mut world.nodes {
                let area = RealArea::new(devices.kind, devices.old.0, devices.old.1);
                node.disks[0].meta.real = Some(area);
            }
        }
        world.net.down = self.kind == Kind::FirstSync;
        self.start(&mut world, 0);
        self.start(&mut world, 1);
        if self.kind == Kind::FirstSync {
            world.run(50);
            return world;
        }
        pair(&mut world);
        self.lead_up(&mut world);
        assert_eq!(world.broken, None, "{}: before it began", self.name);
        world
    }

    /// Starts a node with its own options.
    pub fn start(&self, world: &mut World, node: usize) {
        let net = NetConfig { protocol: world.options.net.protocol, ..self.nets[node].clone() };
        world.options.net = net;
        world.start(node);
    }

    /// From a pair in sync, node 0 Primary, to where it begins.
    fn lead_up(&self, world: &mut World) {
        match self.kind {
            Kind::QuickResync => {
                apart(world);
                for block in 0..24 {
                    world.request(0, RequestOp::Write, block * 40, 16, false);
                }
                within(world, 2000, World::idle);
                world.run(30);
            }
            Kind::Verify { rot: true } => {
                // What rots without a write has no mark: to find it is what verify is for.
                world.oracle.check_marks = false;
                world.oracle.check_minimal = false;
                for (start, len) in [(8, 2), (16, 1), (2000, 1), (SECTORS - 65, 1)] {
                    let Some(range) = BlockRange::new(Sector(start), SectorCount(len)) else { continue };
                    // To the oracles, a write that nobody waits for.
                    let rot = world.history.issue(1, 0, range, false, false, world.now);
                    world.history.orphan(rot);
                    for sector in start..start + len {
                        world.nodes[1].disks[0].rot(sector, rot);
                    }
                }
            }
            Kind::Promotion => answered(world, 0, "secondary", AdminCommand::Secondary),
            Kind::Invalidate(false) => answered(world, 0, "secondary", AdminCommand::Secondary),
            Kind::Conflict => answered(world, 1, "primary", AdminCommand::Primary { force: false }),
            Kind::SplitBrain { primaries, changes, history, solved } => {
                self.diverge(world, primaries, changes, history);
                if solved == Solved::ByPerson {
                    world.heal();
                    within(world, 5000, judge::split_brain);
                }
            }
            Kind::NewerDataMeetsPrimary => {
                answered(world, 0, "secondary", AdminCommand::Secondary);
                answered(world, 1, "primary", AdminCommand::Primary { force: false });
                world.crash(0, false);
                world.run(200);
                write(world, 1, 0, 8);
                world.run(100);
                // The other copy's generation follows this one's, as a copy restored from elsewhere might.
                world.check_data = false;
                world.oracle.check_marks = false;
                world.oracle.full_allowed = true;
                let shown = world.status(1).map_or(0, |s| s.volumes[0].uuids[0]);
                world.nodes[0].disks[0].meta.edit_superblock(|sb| sb.uuid = [0x7700, shown, 0, 0]);
                world.oracle.touch_all();
            }
            Kind::Resize(devices) => {
                let (before, after) = (devices.sectors(devices.old), devices.sectors(devices.new));
                if let Some(range) = BlockRange::new(Sector(before), SectorCount(after - before)) {
                    // What lies behind the old end is not the same on both.
                    // As if it had been written long ago, without an answer.
                    let old = world.history.issue(1, 0, range, false, false, world.now);
                    world.history.orphan(old);
                    let rubbish = vec![old; usize::try_from(after - before).unwrap_or(0)];
                    world.nodes[1].disks[0].write(range, rubbish, true, 0);
                }
                for node in &mut world.nodes {
                    if let Some(area) = &mut node.disks[0].meta.real {
                        area.grow(devices.new.0, devices.new.1);
                    }
                }
            }
            Kind::FirstSync
            | Kind::Verify { rot: false }
            | Kind::Demotion
            | Kind::Detach(_)
            | Kind::Reconnect(_)
            | Kind::Protocol(_)
            | Kind::Invalidate(true) => {}
        }
    }

    /// Both nodes go on alone, node 0 first, one block in common.
    fn diverge(&self, world: &mut World, primaries: [bool; 2], changes: [u64; 2], history: bool) {
        world.oracle.policies = true;
        apart(world);
        if changes[0] > 0 {
            write(world, 0, 800, changes[0] * 8);
        }
        answered(world, 1, "primary", AdminCommand::Primary { force: false });
        write(world, 1, 800 + changes[0].saturating_sub(1) * 8, changes[1] * 8);
        world.run(100);
        for node in (0..2).filter(|node| !primaries[*node]) {
            answered(world, node, "secondary", AdminCommand::Secondary);
        }
        if history {
            for node in 0..2 {
                answered(world, node, "disconnect", AdminCommand::Disconnect { force: false });
                let fresh = AdminCommand::NewCurrentUuid { volume: VOLUME, clear_bitmap: false };
                answered(world, node, "new-current-uuid", fresh);
                let again = connect(false);
                answered(world, node, "connect", again);
            }
        }
    }

    /// The part that may be interrupted anywhere.
    pub fn act(&self, world: &mut World) {
        if let Some(instead) = self.instead {
            return instead(world);
        }
        match self.kind {
            Kind::FirstSync => {
                link_up(world);
                world.run_until(3000, connected);
                ask(world, 0, "primary-force", AdminCommand::Primary { force: true });
                for _ in 0..4 {
                    load(world, 0, 1);
                    world.run(2);
                }
                world.run_until(5000, met);
            }
            Kind::QuickResync => {
                link_up(world);
                for _ in 0..6 {
                    load(world, 0, 1);
                    world.run(4);
                }
                world.run_until(5000, met);
            }
            Kind::Verify { rot } => {
                judge::verify(world, true);
                if rot {
                    ask(world, 0, "invalidate-remote", AdminCommand::InvalidateRemoteMarked(VOLUME));
                    world.run_until(5000, met);
                }
            }
            Kind::Promotion => {
                ask(world, 1, "primary", AdminCommand::Primary { force: false });
                load(world, 1, 3);
                world.flush(1);
                world.run_until(2000, met);
            }
            Kind::Demotion => {
                load(world, 0, 8);
                ask(world, 0, "secondary", AdminCommand::Secondary);
                world.run_until(2000, met);
            }
            Kind::SplitBrain { solved, .. } => {
                if solved == Solved::ByPerson {
                    ask(world, 1, "secondary", AdminCommand::Secondary);
                    ask(world, 1, "connect", connect(true));
                    ask(world, 0, "connect", connect(false));
                } else {
                    link_up(world);
                }
                world.run_until(5000, |w| met(w) || judge::split_brain(w));
            }
            Kind::NewerDataMeetsPrimary => {
                self.start(world, 0);
                world.run_until(3000, |w| met(w) || judge::split_brain(w));
            }
            Kind::Resize(_) => {
                let options = lockstep_replicator::core::resize::ResizeOptions::default();
                load(world, 0, 2);
                ask(world, 0, "resize", AdminCommand::Resize { volume: VOLUME, options });
                load(world, 0, 2);
                world.run_until(5000, met);
            }
            Kind::Detach(node) => {
                load(world, 0, 3);
                ask(world, node, "detach", AdminCommand::Detach { volume: VOLUME, force: false });
                load(world, 0, 3);
                world.run(5);
                if world.nodes[node].core.is_some() && !world.nodes[node].disk_open[0] {
                    world.attach(node);
                }
                load(world, 0, 3);
                world.run_until(5000, met);
            }
            Kind::Conflict => {
                for (node, start, len) in
                    [(0, 8, 24), (1, 16, 8), (1, 40, 16), (0, 44, 8), (0, 80, 8), (1, 80, 8)]
                {
                    world.request(node, RequestOp::Write, start, len, false);
                    world.run(u64::from(start == 40));
                }
                world.run_until(3000, met);
            }
            Kind::Reconnect(node) => {
                load(world, 0, 3);
                ask(world, node, "disconnect", AdminCommand::Disconnect { force: false });
                load(world, 0, 3);
                world.run(20);
                ask(world, node, "connect", connect(false));
                world.run_until(5000, met);
            }
            Kind::Protocol(protocol) => {
                load(world, 0, 4);
                self.adjust(world, 0, protocol);
                load(world, 0, 4);
                world.run_until(2000, met);
            }
            Kind::Invalidate(remote) => {
                let done = if remote {
                    load(world, 0, 2);
                    let done = ask(world, 0, "invalidate-remote", AdminCommand::InvalidateRemote(VOLUME));
                    load(world, 0, 2);
                    done
                } else {
                    ask(world, 1, "invalidate", AdminCommand::Invalidate(VOLUME))
                };
                if !done {
                    // "The connection was lost before the peer answered": it may have done it.
                    world.oracle.touch_all();
                    world.oracle.full_allowed = true;
                }
                world.run_until(5000, |w| {
                    met(w) && w.states(0, 0).map(|s| s.replication) == Some(ReplState::Established)
                });
            }
        }
    }

    /// `drbdadm adjust` with another protocol.
    fn adjust(&self, world: &mut World, node: usize, protocol: Protocol) {
        // Until all writes of the old one are through, the weaker one excuses more.
        world.history.set_protocol(protocol);
        world.options.net.protocol = protocol;
        let net = Box::new(NetConfig { protocol, ..self.nets[node].clone() });
        let volumes = vec![world.options.volume.clone()];
        ask(world, node, "adjust", AdminCommand::Configure { net, volumes });
    }
}
