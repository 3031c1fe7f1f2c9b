//! The state table: every combination of role, link, own disk and peer's disk, and every request in it. A
//! write is replicated, or marked, or refused, and never nothing of this (S02, S07, S19, S26); a read comes
//! from a good copy or is refused; a flush and FUA mean stable on every copy that counts.
//!
//! The combinations are not built by hand: two nodes are driven through procedures in which operators and
//! disks do what they like, until every combination was met that [`why_not`] does not rule out. A combination
//! that is met and ruled out is a mistake of one of them, and so is one that is neither.
use lockstep_replicator::core::config::{Fencing, NetConfig};
use lockstep_replicator::core::event::{AdminCommand, RequestOp};
use lockstep_replicator::core::state::{ConnState, DiskState, ReplState, Role};
use lockstep_replicator::units::{BITS_PER_AL_EXTENT, BlockRange, Sector, SectorCount};
use lockstep_tests::procedures::steps::{RESERVED, load};
use lockstep_tests::procedures::{Kind, Procedure, connect, everyday, net, procedure};
use lockstep_tests::sim::World;
use lockstep_tests::sim::node::VOLUME;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

/// Role, replication (Off: apart), own disk, peer's disk.
type Cell = (Role, ReplState, DiskState, DiskState);

const ROLES: [Role; 2] = [Role::Primary, Role::Secondary];

fn repls() -> impl Iterator<Item = ReplState> {
    (0..15).filter_map(ReplState::from_wire)
}

fn disks() -> impl Iterator<Item = DiskState> {
    (0..10).filter_map(DiskState::from_wire)
}

fn cell(world: &World, node: usize) -> Option<Cell> {
    let states = world.states(node, 0)?;
    Some((states.role, states.replication, states.disk, states.peer_disk))
}

/// Why a combination does not exist; `None`: it does. SEM §4 is the table of windows, §5 the disk states, §6
/// the rules for changes.
#[expect(clippy::match_same_arms, reason = "a table, each row with its own reason")]
fn why_not((role, repl, own, peer): Cell) -> Option<&'static str> {
    use DiskState::{Consistent, DUnknown, Detaching, Inconsistent, Negotiating, Outdated, UpToDate};
    match (repl, own, peer) {
        (_, DUnknown, _) => Some("§5: only ever the peer's"),
        (ReplState::StartingSyncS | ReplState::StartingSyncT, ..) => {
            Some("the bits are set within the exchange of bitmaps; the state is not used")
        }
        (ReplState::Ahead | ReplState::Behind, ..) => {
            Some("congestion needs protocol A, which answers before the peer has it: congestion.rs")
        }
        (ReplState::Off, Negotiating, _) => Some("§5: only while connected"),
        (ReplState::Off, _, peer) if !matches!(peer, Inconsistent | Outdated | DUnknown) => {
            Some("§4, last row: becomes DUnknown")
        }
        (_, Consistent, _) if role == Role::Primary => Some("§6 -2: a Primary needs good data"),
        (ReplState::Off, Consistent, Inconsistent | Outdated) => {
            Some("§5: raised to UpToDate, the peer is known to be older")
        }
        (ReplState::Off, ..) => None,
        (_, _, DUnknown) => Some("a connected peer has said what it has"),
        (ReplState::WFBitMapT | ReplState::WFSyncUUID, Inconsistent | Outdated, UpToDate) => None,
        (ReplState::SyncTarget | ReplState::PausedSyncT, Inconsistent, UpToDate) => None,
        // Everything is here, the source has not heard of it.
        (ReplState::SyncTarget | ReplState::PausedSyncT, UpToDate, UpToDate) => None,
        // §6: a graceful disconnect with fencing outdates a Secondary just before the link ends.
        (ReplState::SyncSource, Outdated, Inconsistent) if role == Role::Secondary => None,
        (ReplState::VerifyS | ReplState::VerifyT, Outdated, UpToDate) if role == Role::Secondary => None,
        (ReplState::VerifyS | ReplState::VerifyT, UpToDate, Outdated) => None,
        (ReplState::WFBitMapS, UpToDate, Inconsistent | Outdated) => None,
        (ReplState::SyncSource | ReplState::PausedSyncS, UpToDate, Inconsistent) => None,
        (ReplState::VerifyS | ReplState::VerifyT, UpToDate, UpToDate) => None,
        (ReplState::Established, Consistent, peer) if peer >= Inconsistent => {
            Some("§4: two disks that meet settle what they are")
        }
        (ReplState::Established, own, Consistent) if own == UpToDate && role == Role::Primary => {
            Some("§4: who meets a good copy in use knows that it is older or as good")
        }
        (ReplState::Established, own, Consistent) if own >= Inconsistent && own != UpToDate => {
            Some("§4: two disks that meet settle what they are")
        }
        (ReplState::Established, Consistent, Detaching) => {
            Some("§4: that disk has met this one, which is not Consistent since")
        }
        (ReplState::Established, Inconsistent, Outdated)
        | (ReplState::Established, Outdated, Inconsistent) => {
            Some("§6 -6: Outdated is refused while connected, and by itself the better copy is the source")
        }
        (ReplState::Established, Outdated, Outdated) => Some("§6 -6: no disk is outdated while connected"),
        (ReplState::Established, Outdated, Detaching)
        | (ReplState::Established, Inconsistent | Outdated, UpToDate)
            if role == Role::Primary =>
        {
            Some("a Primary's older disk is a target at once, and the good copy is not let go (§6 -2)")
        }
        (ReplState::Established, ..) => None,
        _ => Some("§4: outside the window of this replication state"),
    }
}

/// These exist, but need several accidents within a millisecond: a disk that fails or leaves in the middle of
/// a meeting, a pause or a disconnect at the very end, a Primary by force on a disk that is not good. Probed
/// when met, not waited for.
const SELDOM: [Cell; 21] = {
    use DiskState as D;
    use ReplState as R;
    use Role::{Primary as P, Secondary as S};
    [
        (P, R::Off, D::Inconsistent, D::Inconsistent),
        (P, R::Off, D::Outdated, D::Inconsistent),
        (P, R::Established, D::Detaching, D::Consistent),
        (P, R::Established, D::Failed, D::Consistent),
        (P, R::Established, D::Inconsistent, D::Attaching),
        (P, R::Established, D::Inconsistent, D::Detaching),
        (P, R::Established, D::Inconsistent, D::Failed),
        (P, R::Established, D::Inconsistent, D::Negotiating),
        (P, R::Established, D::Outdated, D::Attaching),
        (P, R::Established, D::Outdated, D::Negotiating),
        (P, R::Established, D::Negotiating, D::Consistent),
        (P, R::Established, D::Negotiating, D::Negotiating),
        (P, R::PausedSyncT, D::UpToDate, D::UpToDate),
        (S, R::Off, D::Failed, D::Inconsistent),
        (S, R::Established, D::Detaching, D::Consistent),
        (S, R::Established, D::Failed, D::Consistent),
        (S, R::Established, D::Negotiating, D::Negotiating),
        (S, R::SyncSource, D::Outdated, D::Inconsistent),
        (S, R::VerifyS, D::UpToDate, D::Outdated),
        (S, R::VerifyT, D::UpToDate, D::Outdated),
        (S, R::PausedSyncT, D::UpToDate, D::UpToDate),
    ]
};

/// What operators and disks may do, one thing after another, some of it at once.
fn anything_goes(world: &mut World) {
    world.heal();
    for _ in 0..14 {
        let node = usize::from(world.rng.percent(50));
        let (name, command) = match world.rng.below(19) {
            0 | 1 => ("detach", AdminCommand::Detach { volume: VOLUME, force: false }),
            2 => ("detach", AdminCommand::Detach { volume: VOLUME, force: true }),
            what @ 3..=6 => {
                if world.nodes[node].core.is_some() && !world.nodes[node].disk_open[0] {
                    world.nodes[node].disks[0].faults.metas = u32::from(what == 6);
                    world.attach(node);
                }
                continue;
            }
            7 => {
                world.nodes[node].disks[0].faults.writes = 1;
                load(world, 0, 2);
                load(world, 1, 2);
                continue;
            }
            8 => ("disconnect", AdminCommand::Disconnect { force: false }),
            9 | 10 => ("connect", connect(false)),
            11 => ("invalidate", AdminCommand::Invalidate(VOLUME)),
            12 => ("outdate", AdminCommand::Outdate(VOLUME)),
            13 => ("secondary", AdminCommand::Secondary),
            14 => ("primary", AdminCommand::Primary { force: world.rng.percent(50) }),
            15 => ("verify", AdminCommand::Verify { volume: VOLUME, start: None, stop: None }),
            16 => ("pause-sync", AdminCommand::PauseSync(VOLUME)),
            17 => ("resume-sync", AdminCommand::ResumeSync(VOLUME)),
            _ => {
                world.cut(false);
                load(world, 0, 3);
                load(world, 1, 3);
                continue;
            }
        };
        world.admin(node, name, command);
        let ms = [0, 0, 1, 3, 10][usize::try_from(world.rng.below(5)).unwrap_or(0)];
        world.run(ms);
    }
    world.run(100);
}

/// The way to a cell: what is done, with which seed, after how many events, on which node.
#[derive(Clone, Copy, Debug)]
struct Way {
    recipe: usize,
    seed: u64,
    step: u64,
    node: usize,
}

fn recipes() -> Vec<Procedure> {
    let verify = NetConfig { verify_alg: Some("sha1".into()), ..net() };
    let fencing = NetConfig { fencing: Fencing::ResourceOnly, ..verify.clone() };
    let two = NetConfig { allow_two_primaries: true, ..verify.clone() };
    let mut all = everyday();
    all.retain(|p| p.kind != (Kind::Verify { rot: true }));
    for (kind, net) in [
        (Kind::Demotion, &verify),
        (Kind::Demotion, &fencing),
        (Kind::Promotion, &verify),
        (Kind::Promotion, &fencing),
        (Kind::QuickResync, &verify),
        (Kind::QuickResync, &fencing),
        (Kind::FirstSync, &verify),
        (Kind::FirstSync, &fencing),
        (Kind::Conflict, &two),
    ] {
        let instead = Some(anything_goes as fn(&mut World));
        all.push(Procedure { instead, ..procedure("anything goes", net.clone(), kind) });
    }
    all
}

/// Its start; the oracles look on, but for spurious copying: the answer to an `invalidate` may be lost.
fn begin(procedure: &Procedure, seed: u64) -> World {
    let mut world = procedure.prepare(seed);
    world.oracle.check_minimal = false;
    world.results = Some(BTreeMap::new());
    world
}

/// Seeds after which a combination that was not met counts as missing.
const PATIENCE: u64 = 500;

/// How each combination is met.
fn ways(all: &[Procedure]) -> BTreeMap<Cell, Way> {
    let met: Rc<RefCell<BTreeMap<Cell, Way>>> = Rc::default();
    let sought = |cell: &Cell| why_not(*cell).is_none() && !SELDOM.contains(cell);
    let exist: BTreeSet<Cell> = cells().filter(sought).collect();
    for seed in 1..PATIENCE {
        for (recipe, procedure) in all.iter().enumerate() {
            if seed > 1 && procedure.instead.is_none() {
                continue;
            }
            let mut world = begin(procedure, seed);
            let (seen, mut step) = (Rc::clone(&met), 0);
            world.watch = Some(Box::new(move |world| {
                step += 1;
                for node in 0..2 {
                    if let Some(cell) = cell(world, node) {
                        seen.borrow_mut().entry(cell).or_insert(Way { recipe, seed, step, node });
                    }
                }
            }));
            procedure.act(&mut world);
            assert_eq!(world.broken, None, "{} with seed {seed}", procedure.name);
        }
        if exist.iter().all(|cell| met.borrow().contains_key(cell)) {
            break;
        }
    }
    met.take()
}

fn cells() -> impl Iterator<Item = Cell> {
    ROLES.into_iter().flat_map(|role| {
        repls().flat_map(move |repl| {
            disks().flat_map(move |own| disks().map(move |peer| (role, repl, own, peer)))
        })
    })
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Op {
    Write,
    FuaWrite,
    Flush,
    Discard,
    WriteZeroes,
    Read,
}

const OPS: [Op; 6] = [Op::Write, Op::FuaWrite, Op::Flush, Op::Discard, Op::WriteZeroes, Op::Read];

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Outcome {
    Replicated,
    Marked,
    /// A read or a flush.
    Served,
    Refused,
    /// And says for what.
    Waits,
}

/// One request and what is known of it.
#[derive(Debug)]
struct Probe {
    node: usize,
    op: Op,
    id: u64,
    range: BlockRange,
    /// What the range holds if it is done.
    value: u32,
    /// The node had a good disk of its own, and wanted to be Primary, all the time.
    good_here: bool,
    /// There was a good copy at some time.
    good_somewhere: bool,
    outcome: Option<Result<Outcome, String>>,
}

impl Probe {
    fn issue(world: &mut World, node: usize, op: Op) -> Self {
        let size = world.size_of(0);
        let range = BlockRange::new(Sector(size - RESERVED), SectorCount(8)).expect("not empty");
        let mut request = |op, fua| world.request(node, op, range.start().0, range.len().0, fua);
        let id = match op {
            Op::Write => request(RequestOp::Write, false),
            Op::FuaWrite => request(RequestOp::Write, true),
            Op::Flush => world.flush(node),
            Op::Discard => request(RequestOp::Discard, false),
            Op::WriteZeroes => request(RequestOp::WriteZeroes { may_unmap: false }, false),
            Op::Read => request(RequestOp::Read, false),
        };
        let written = matches!(op, Op::Write | Op::FuaWrite);
        let value = if written { newest(world) } else { 0 };
        let mut probe =
            Self { node, op, id, range, value, good_here: true, good_somewhere: false, outcome: None };
        probe.look(world);
        probe
    }

    /// After each event.
    fn look(&mut self, world: &mut World) {
        if self.outcome.is_some() {
            return;
        }
        let states = world.states(self.node, 0);
        let demoting = world.nodes[self.node].verbs.values().any(|verb| *verb == "secondary");
        self.good_here &=
            states.is_some_and(|s| s.role == Role::Primary && s.disk == DiskState::UpToDate) && !demoting;
        self.good_somewhere |= states.is_some_and(|s| {
            let there = s.connection == ConnState::Connected && s.peer_disk == DiskState::UpToDate;
            s.role == Role::Primary && (s.disk == DiskState::UpToDate || there)
        });
        let done = world.results.as_ref().and_then(|results| results.get(&self.id)).copied();
        if let Some(done) = done {
            self.outcome = Some(self.judge(world, done));
        }
    }

    fn judge(&self, world: &mut World, done: bool) -> Result<Outcome, String> {
        if !done {
            let right = !self.good_here;
            return if right { Ok(Outcome::Refused) } else { Err("refused beside a good disk".into()) };
        }
        if !self.good_somewhere {
            return Err("served without a good copy".into());
        }
        match self.op {
            Op::Read => Ok(Outcome::Served),
            Op::Flush => Ok(Outcome::Served),
            Op::Write | Op::FuaWrite | Op::Discard | Op::WriteZeroes => self.judge_write(world),
        }
    }

    fn judge_write(&self, world: &mut World) -> Result<Outcome, String> {
        let at = usize::try_from(self.range.start().0).expect("a small disk");
        let holds = |sectors: &[u32]| sectors[at..at + 8].iter().all(|value| *value == self.value);
        let has = [0, 1].map(|node| holds(world.nodes[node].disks[0].sectors()));
        let stable = [0, 1].map(|node| holds(world.nodes[node].disks[0].stable_sectors()));
        let block = at / 8;
        let extent = u32::try_from(block as u64 / BITS_PER_AL_EXTENT).expect("a small disk");
        let marked = (0..2).any(|node| {
            let disk = &world.nodes[node].disks[0];
            let core = world.nodes[node].core.as_ref();
            core.is_some_and(|core| core.is_out_of_sync(VOLUME, self.range)) || disk.meta.is_marked(block)
        });
        let hot = (0..2).any(|node| {
            let hot = world.nodes[node].disks[0].meta.hot_extents();
            hot.is_none_or(|hot| hot.contains(&extent))
        });
        if !has[0] && !has[1] {
            return Err("answered, and no disk has it".into());
        }
        if self.op == Op::FuaWrite && !stable[0] && !stable[1] {
            return Err("answered FUA, and no disk has it for good".into());
        }
        world.check_marks();
        match (has[0] && has[1], marked || hot) {
            (true, _) if !marked => Ok(Outcome::Replicated),
            (_, true) => Ok(Outcome::Marked),
            (_, false) => Err(format!("neither replicated nor marked: on the disks {has:?}")),
        }
    }
}

fn newest(world: &World) -> u32 {
    (1..).find(|number| world.history.record(*number).is_none()).map_or(0, |next| next - 1)
}

/// Carries out one request in a cell.
fn probe(all: &[Procedure], way: Way, op: Op) -> Result<Outcome, String> {
    let mut world = begin(&all[way.recipe], way.seed);
    let probe: Rc<RefCell<Option<Probe>>> = Rc::default();
    let (held, mut step) = (Rc::clone(&probe), 0);
    world.watch = Some(Box::new(move |world| {
        step += 1;
        let mut held = held.borrow_mut();
        match held.as_mut() {
            None if step == way.step => *held = Some(Probe::issue(world, way.node, op)),
            None => {}
            Some(probe) => probe.look(world),
        }
    }));
    all[way.recipe].act(&mut world);
    world.heal();
    world.run_until(20_000, |w| w.nodes[way.node].requests.is_empty());
    world.check_marks();
    if let Some(why) = world.broken {
        return Err(why);
    }
    let probe = probe.take().ok_or("the cell was not met again")?;
    match probe.outcome {
        Some(outcome) => outcome,
        None => {
            let waits = world.status(way.node).map_or(0, |status| status.waiting_for.len());
            if waits > 0 { Ok(Outcome::Waits) } else { Err("no answer, and nothing says why".into()) }
        }
    }
}

#[test]
#[expect(clippy::print_stdout, reason = "says how much was tried")]
fn every_combination_of_states_and_every_request_in_it() {
    let all = recipes();
    let ways = ways(&all);
    let mut ruled_out: BTreeMap<&str, usize> = BTreeMap::new();
    let mut wrong = Vec::new();
    let mut outcomes: BTreeMap<(Role, Op, Outcome), usize> = BTreeMap::new();
    for cell in cells() {
        match (why_not(cell), ways.get(&cell)) {
            (None, Some(way)) => {
                for op in OPS {
                    match probe(&all, *way, op) {
                        Ok(outcome) if cell.0 == Role::Secondary && outcome != Outcome::Refused => {
                            wrong.push(format!("{cell:?} {op:?}: {outcome:?} on a Secondary"));
                        }
                        Ok(outcome) => *outcomes.entry((cell.0, op, outcome)).or_default() += 1,
                        Err(why) => wrong.push(format!("{cell:?} {op:?} {way:?}: {why}")),
                    }
                }
            }
            (Some(why), None) => *ruled_out.entry(why).or_default() += 1,
            (None, None) if SELDOM.contains(&cell) => {
                *ruled_out.entry("not ruled out, but met seldom").or_default() += 1;
            }
            (None, None) => wrong.push(format!("{cell:?} is not met, and nothing rules it out")),
            (Some(why), Some(way)) => wrong.push(format!("{cell:?} is met ({way:?}), though: {why}")),
        }
    }
    println!("{} combinations met, {} requests in each", ways.len(), OPS.len());
    for ((role, op, outcome), count) in &outcomes {
        println!("{count:5}  {role} {op:?}: {outcome:?}");
    }
    for (why, count) in &ruled_out {
        println!("{count:5} combinations ruled out: {why}");
    }
    let some: Vec<_> = wrong.iter().take(40).map(String::as_str).collect();
    assert!(wrong.is_empty(), "{}:\n{}", wrong.len(), some.join("\n"));
    for outcome in [Outcome::Replicated, Outcome::Marked, Outcome::Refused] {
        let met =
            outcomes.keys().any(|(role, op, met)| (*role, *op, *met) == (Role::Primary, Op::Write, outcome));
        assert!(met, "no write was {outcome:?}");
    }
}
