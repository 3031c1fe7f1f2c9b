//! What must be true of the two copies, judged from the simulated disks and from what the application was
//! told, never from what the product says of itself. Numbers are those of the invariants every scenario is
//! checked against: durability (1), equality (2), no invention (3), read determinism (4), order (5), single
//! history (6), direction (7), liveness (8), minimality (9), no lost mark (10).
//!
//! | when | what is checked |
//! |---|---|
//! | a read is answered | 1, 3, 4, 5 for its sectors |
//! | a node is promoted without its peer | 1, 3, 5 for its disk: what is missing must be excused |
//! | a resync begins | 7: the source has what the target was told to keep; then the target's view is the source's |
//! | a resync ends | nothing is marked on the node that says so |
//! | resync data arrives | 9: somebody wrote the block, or it was hot at a crash, since both were last equal |
//! | now and then, and at each crash | 10: `marks.rs` |
//! | in sync and idle | 2: equal disks, no mark; 1 and 3 for both; no buffer left; 6: nobody's writes went away |
use super::blocks::Blocks;
use super::history::{Arrived, NEVER, Past, SavedView};
use super::world::World;
use lockstep_proto::Message;
use lockstep_replicator::core::config::Protocol;
use lockstep_replicator::core::event::{AdminCommand, Event, Payload, SessionId};
use lockstep_replicator::core::explain::Decision;
use lockstep_replicator::core::policy::Outcome;
use lockstep_replicator::core::state::{ConnState, DiskState, ReplState, Role};
use lockstep_replicator::core::status::States;
use lockstep_replicator::meta::flags;
use lockstep_replicator::units::{BITS_PER_AL_EXTENT, BlockRange, VolumeNr};
use std::collections::{BTreeMap, BTreeSet};

/// Numbers of a verb refused because the connection is gone, before it or before the peer's answer, because this node
/// changed while the peer was asked, or because its metadata cannot say what the peer agreed to: the peer may have begun.
const PERHAPS_DONE: [i32; 3] = [-15, -18, 118];

/// See the module.
#[derive(Debug)]
pub struct Oracle {
    /// By volume: blocks that a resync may copy.
    touched: Vec<Blocks>,
    /// By volume: blocks in which the copies may differ, now or after a power cut.
    pub(super) differing: Vec<Blocks>,
    /// By volume: what could not be read since a resync ended, and may be copied by the next one.
    unread: Vec<Vec<BlockRange>>,
    /// By volume: how many of these the resync that runs covers. What cannot be read after its bitmap was sent waits
    /// for the next.
    covered: Vec<usize>,
    /// By volume: blocks that could not be read for themselves, or written. A verify may say that they differ.
    unverifiable: Vec<Blocks>,
    /// A full resync may come.
    pub full_allowed: bool,
    /// Somebody decided that this node's changes go.
    pub voided: [bool; 2],
    /// The node went on without the other since both were last equal.
    pub went_on: [bool; 2],
    /// By node.
    pub past: [Past; 2],
    /// By node and volume: when the disk was attached last.
    attached: [Vec<u64>; 2],
    /// Policies may throw changes away after a split brain.
    pub policies: bool,
    /// The node has announced that it is connected, and not that it is not any more. What it says when it is
    /// asked may be newer than the event that is judged.
    connected: [bool; 2],
    /// When it announced last that it is not connected any more, or stopped.
    parted: [u64; 2],
    /// Writes that failed on a disk.
    failed: BTreeSet<u32>,
    /// By node and volume: it goes on from the other's copy without a disk of its own, and has not been in
    /// sync since. What bound its own disk before.
    borrows: [Vec<Option<SavedView>>; 2],
    /// Its application was told something since it became Primary.
    served: [bool; 2],
    /// A resync to this node began and has not ended: what the volume holds is a mixture.
    was_target: [Vec<bool>; 2],
    /// By node and volume: when it was last decided that its changes go.
    given_up: [Vec<u64>; 2],
    /// Verbs that change what is allowed, on which node, and what was before.
    verbs: BTreeMap<u64, (usize, Verb)>,
    /// Checked since anything happened.
    quiet: bool,
    /// When the nodes met last.
    met: u64,
    /// Both were in sync once.
    pub settled: bool,
    /// Check that differing blocks are marked.
    pub check_marks: bool,
    /// Check that a resync copies no more than it must.
    pub check_minimal: bool,
    /// Events since the marks were looked at.
    pub(super) unlooked: u64,
    /// Times both were found equal.
    pub equal: u64,
    /// Times a node went on alone and its disk was found good.
    pub settlements: u64,
}

#[derive(Clone, Copy, Debug)]
enum Verb {
    Voids { node: usize, before: bool },
    Forces { data_good: bool },
    Promotes,
    Other,
}

impl Oracle {
    /// Nothing is known yet: everything may be copied.
    #[must_use]
    pub fn new(sizes: &[u64]) -> Self {
        Self {
            touched: sizes.iter().map(|size| Blocks::all(*size)).collect(),
            differing: sizes.iter().map(|size| Blocks::none(*size)).collect(),
            unread: vec![Vec::new(); sizes.len()],
            covered: vec![0; sizes.len()],
            unverifiable: sizes.iter().map(|size| Blocks::none(*size)).collect(),
            full_allowed: true,
            voided: [false; 2],
            went_on: [false; 2],
            past: [Past::default(); 2],
            attached: [vec![0; sizes.len()], vec![0; sizes.len()]],
            policies: false,
            connected: [false; 2],
            parted: [0; 2],
            failed: BTreeSet::new(),
            borrows: [vec![None; sizes.len()], vec![None; sizes.len()]],
            served: [false; 2],
            was_target: [vec![false; sizes.len()], vec![false; sizes.len()]],
            given_up: [vec![0; sizes.len()], vec![0; sizes.len()]],
            verbs: BTreeMap::new(),
            quiet: false,
            met: 0,
            settled: false,
            check_marks: true,
            check_minimal: true,
            unlooked: 0,
            equal: 0,
            settlements: 0,
        }
    }

    /// The application writes here.
    pub fn touch(&mut self, volume: usize, range: BlockRange) {
        self.quiet = false;
        let (start, len) = (range.start().0, range.len().0);
        let as_index = |value| usize::try_from(value).unwrap_or(usize::MAX);
        self.touched[volume].set_sectors(as_index(start), as_index(len));
    }

    /// A disk did not take this write, and its node knows.
    pub fn write_failed(&mut self, record: u32) {
        self.failed.insert(record);
    }

    /// What cannot be read may be copied from the other node, also when both are at rest before that.
    pub fn unreadable(&mut self, volume: usize, range: BlockRange) {
        self.touch(volume, range);
        self.unread[volume].push(range);
        // One block: a longer read that fails is split, and tells nothing of each of its blocks.
        let mut blocks = range.bits_touched();
        if let (Some(block), None) = (blocks.next(), blocks.next()) {
            self.unverifiable[volume].set(usize::try_from(block).unwrap_or(usize::MAX));
        }
    }

    /// A write of this failed on one disk.
    pub fn unwritten(&mut self, volume: usize, range: BlockRange) {
        for block in range.bits_touched() {
            self.unverifiable[volume].set(usize::try_from(block).unwrap_or(usize::MAX));
        }
    }

    /// Everything may be copied.
    pub fn touch_all(&mut self) {
        for blocks in &mut self.touched {
            blocks.0.fill(u64::MAX);
        }
    }

    /// Both went on from the same data: a split brain may be declared.
    #[must_use]
    pub const fn may_split(&self) -> bool {
        self.went_on[0] && self.went_on[1]
    }
}

fn nr(volume: usize) -> VolumeNr {
    VolumeNr(u16::try_from(volume).unwrap_or(0))
}

impl World {
    // ---- the application ------------------------------------------------------------------------

    pub(super) fn check_read(
        &mut self,
        node: usize,
        volume: usize,
        range: BlockRange,
        data: &[u32],
        issued: u64,
        own: bool,
    ) {
        if !self.check_data {
            return;
        }
        if data.len() as u64 != range.len().0 {
            return self.fail(format!("n{node}: a read of the wrong length"));
        }
        if issued < self.oracle.given_up[node][volume] {
            // Asked for while the node's own changes counted, it may show them, or what replaces them.
            return;
        }
        self.oracle.served[node] |= own;
        let first = usize::try_from(range.start().0).unwrap_or(usize::MAX);
        let wrong = self.history.wrong(node, volume, first, data, issued);
        let other = wrong.is_some() && !own;
        if let Some(wrong) = wrong
            && (own || self.history.wrong(1 - node, volume, first, data, issued).is_some())
        {
            return self.fail(format!("n{node}: a read shows what it must not: {wrong}"));
        }
        let both = self.in_sync();
        let mut views = [both; 2];
        views[if other { 1 - node } else { node }] = own || both || other;
        let beside = self.options.net.allow_two_primaries && self.nodes[node].session.is_some();
        self.history.seen(views, volume, first, data, beside.then_some(1 - node), self.now);
    }

    pub(super) fn write_acked(&mut self, node: usize, record: u32) {
        self.oracle.served[node] = true;
        // A session that is still at its handshake carries no writes.
        let connected = self.nodes[node].session.is_some() && self.oracle.connected[node];
        self.history.acked(record, connected, self.now);
        let Some(fate) = self.history.record(record).map(|r| r.fate) else { return };
        let has = fate.map(|fate| fate.replaces != NEVER);
        if has != [true, true] && self.both_take(node, record) {
            return self
                .fail(format!("n{node}: write #{record} was acked, but only one of two good disks has it"));
        }
        match has {
            [true, true] => {}
            [true, false] => self.oracle.went_on[0] = true,
            [false, true] => self.oracle.went_on[1] = true,
            [false, false] => self.fail(format!("n{node}: write #{record} was acked, but no disk has it")),
        }
    }

    /// A write acked on `node` now must be on both disks: they are in step, and were when it was issued.
    fn both_take(&self, node: usize, record: u32) -> bool {
        let in_step = |node: usize, volume: usize| {
            self.states(node, volume).is_some_and(|s| {
                s.disk == DiskState::UpToDate
                    && s.peer_disk == DiskState::UpToDate
                    && s.replication == ReplState::Established
            })
        };
        self.history.protocol_of(record) == Some(Protocol::C)
            && !self.oracle.failed.contains(&record)
            && self.nodes.iter().all(|node| node.session.is_some())
            && self.history.record(record).is_some_and(|r| {
                r.issued > self.oracle.met
                    && r.issued > self.oracle.attached[0][r.volume].max(self.oracle.attached[1][r.volume])
                    && in_step(node, r.volume)
                    && in_step(1 - node, r.volume)
            })
    }

    /// The copies that a flush on `node` reaches, as far as can be seen now: not one that is about to be
    /// overwritten from the other, however long its handlers think.
    pub(super) fn flush_nodes(&self, node: usize, volume: usize) -> [bool; 2] {
        let chosen = |repl| matches!(repl, ReplState::WFBitMapT | ReplState::WFSyncUUID);
        let keeps = |s: States| s.disk >= DiskState::Inconsistent && !chosen(s.replication);
        let mut nodes = [0, 1].map(|node| self.states(node, volume).is_some_and(keeps));
        // What this node knows of the other one counts: that may have taken a disk in a new life, while this
        // node still believes in the session with the old one, which had none.
        let mirrors = |s: States| {
            s.connection == ConnState::Connected
                && s.peer_disk >= DiskState::Inconsistent
                && s.peer_disk != DiskState::DUnknown
        };
        nodes[1 - node] &= self.protocols[node] == Protocol::C
            && self.nodes[node].session.is_some()
            && self.states(node, volume).is_some_and(mirrors);
        nodes
    }

    /// `asked`: the copies it reached when it was issued. A copy that came later, or whose disk is gone,
    /// perhaps because of this very flush, has promised nothing.
    pub(super) fn flush_acked(
        &mut self,
        node: usize,
        volume: usize,
        issued: u64,
        asked: [bool; 2],
        only: Option<usize>,
    ) {
        let mut now = self.flush_nodes(node, volume);
        // One that a lost session held up is answered without the peer, though a new session may be there already.
        now[1 - node] &= self.oracle.connected[node] && self.oracle.met <= issued;
        self.history.flushed(volume, issued, [0, 1].map(|node| asked[node] && now[node]), only, node);
    }

    /// A write leaves for the other node: it is known there by its transport and its id. `lost`: its sender
    /// thinks that it leaves.
    pub(super) fn oracle_sent(&mut self, node: usize, session: SessionId, message: &Message, lost: bool) {
        let wire = match message {
            Message::Data(header) => header.request,
            Message::Discard(header) | Message::WriteZeroes(header) => header.request,
            _ => return,
        };
        let sent = self.nodes[node].core.as_ref().and_then(|core| core.request_of_wire(wire));
        let Some((request, protocol)) = sent else { return };
        if let Some(record) = self.record_of_request(request) {
            self.wired.insert((session, node, wire), record);
            self.history.sent(record, protocol, lost);
        }
    }

    // ---- operators and crashes ------------------------------------------------------------------

    pub(super) fn oracle_verb(&mut self, node: usize, id: u64, command: &AdminCommand) {
        self.oracle.quiet = false;
        let mut voids = |node: usize| {
            let before = std::mem::replace(&mut self.oracle.voided[node], true);
            Verb::Voids { node, before }
        };
        let verb = match command {
            AdminCommand::Invalidate(_) | AdminCommand::Connect { discard_my_data: true, .. } => voids(node),
            AdminCommand::InvalidateRemote(_) => voids(1 - node),
            AdminCommand::Primary { force: true } => {
                let good = |volume| self.states(node, volume).is_some_and(|s| s.disk == DiskState::UpToDate);
                Verb::Forces { data_good: (0..self.volumes()).all(good) }
            }
            AdminCommand::Primary { force: false } => Verb::Promotes,
            AdminCommand::NewCurrentUuid { .. } => {
                self.oracle.full_allowed = true;
                // Alone it begins a generation of its own.
                let alone = self.states(node, 0).is_none_or(|s| s.connection != ConnState::Connected);
                self.oracle.went_on[node] |= alone;
                Verb::Other
            }
            _ => return,
        };
        self.oracle.verbs.insert(id, (node, verb));
    }

    pub(super) fn oracle_reply(&mut self, node: usize, id: u64, answer: Result<(), i32>) {
        let ok = answer.is_ok();
        match self.oracle.verbs.remove(&id).map(|(_, verb)| verb) {
            Some(Verb::Voids { node, before }) if !ok => {
                self.oracle.voided[node] = before;
                if answer.is_err_and(|number| PERHAPS_DONE.contains(&number)) {
                    // Perhaps only the answer was lost, and the peer marked everything: a full resync was
                    // what the operator asked for. Nothing is thrown away by it, so nothing else is excused.
                    self.oracle.full_allowed = true;
                    self.oracle.touch_all();
                }
            }
            Some(Verb::Voids { .. }) => {
                self.oracle.full_allowed = true;
                self.oracle.touch_all();
            }
            Some(Verb::Forces { data_good: false }) if ok => {
                // Whatever was there is good now, by decree.
                self.oracle.full_allowed = true;
                self.history.weaken_view(node, false);
            }
            Some(Verb::Forces { .. } | Verb::Promotes | Verb::Other) | None => {}
        }
    }

    /// `in_use`: the disks that the node had taken. What another one holds is older than what the application
    /// saw of the peer's copy since, and is judged when it is taken again.
    pub(super) fn oracle_crash(&mut self, node: usize, power: bool, was_primary: bool, in_use: &[bool]) {
        self.oracle.quiet = false;
        // It stopped within its promotion: the generation that it began is on its disk, and nobody who
        // reads that can tell whether a write of it completed (I2).
        let began = |disk: &super::disk::Disk| {
            let superblock = disk.meta.superblock();
            superblock.is_some_and(|sb| sb.flags & flags::PRIMARY_IND != 0 && sb.uuid[1] != 0)
        };
        self.oracle.went_on[node] |= !was_primary && self.nodes[node].disks.iter().any(began);
        if std::mem::replace(&mut self.oracle.connected[node], false) {
            self.oracle.parted[node] = self.now;
        }
        for volume in 0..self.volumes() {
            if let Some(before) = self.oracle.borrows[node][volume].take() {
                // What it went on from is the other's; its own disk is as it was before.
                self.history.restore_view(node, volume, &before);
            }
        }
        let past = &mut self.oracle.past[node];
        past.crashed = self.now;
        if power {
            past.lost_power = self.now;
            for (volume, taken) in in_use.iter().enumerate() {
                let mixture = self.oracle.was_target[node][volume] || self.known_bad(node, volume);
                if *taken && !mixture {
                    self.settle(node, node, volume, "loses power");
                }
            }
        }
        if self.oracle.verbs.values().any(|(_, verb)| matches!(verb, Verb::Voids { .. })) {
            // Nobody will answer, and it may be done.
            self.oracle.full_allowed = true;
            self.oracle.touch_all();
        }
        // A promotion that the end of the node cut short may have begun a generation.
        let promoting =
            |(at, verb): &(usize, Verb)| *at == node && matches!(verb, Verb::Promotes | Verb::Forces { .. });
        self.oracle.went_on[node] |= self.oracle.verbs.values().any(promoting);
        self.oracle.verbs.retain(|_, (at, _)| *at != node);
        self.check_marks();
    }

    /// The disk's own metadata says that its data is not usable: it misses what it could not write, in the
    /// middle of what came later, and is good again only after a resync (SEM §21, pass_on).
    fn known_bad(&self, node: usize, volume: usize) -> bool {
        let superblock = self.nodes[node].disks[volume].meta.superblock();
        superblock.is_some_and(|sb| sb.flags & flags::CONSISTENT == 0)
    }

    /// A disk is attached: what its log and bitmap say may be copied.
    pub(super) fn oracle_attach(&mut self, node: usize, volume: usize) {
        self.oracle.attached[node][volume] = self.now;
        let meta = &self.nodes[node].disks[volume].meta;
        let touched = &mut self.oracle.touched[volume];
        // Devices that grow: what is added is copied though nobody wrote it.
        match meta.hot_extents().filter(|_| meta.real.is_none()) {
            Some(extents) => {
                for extent in extents {
                    let first = u64::from(*extent) * BITS_PER_AL_EXTENT;
                    for block in first..first + BITS_PER_AL_EXTENT {
                        touched.set(usize::try_from(block).unwrap_or(usize::MAX));
                    }
                }
            }
            None => touched.0.fill(u64::MAX),
        }
        for (word, on_disk) in touched.0.iter_mut().zip(meta.words()) {
            *word |= on_disk;
        }
    }

    // ---- what the nodes announce ----------------------------------------------------------------

    pub(super) fn oracle_event(&mut self, node: usize, event: &Event) {
        self.oracle.quiet = false;
        if let Event::Conn(_, new) = event {
            let connected = *new == ConnState::Connected;
            if std::mem::replace(&mut self.oracle.connected[node], connected) && !connected {
                self.oracle.parted[node] = self.now;
            }
            // It lost its disk before it told anybody anything, also before its generation was durable.
            if connected && self.is_primary(node) && !self.oracle.served[node] {
                for volume in 0..self.volumes() {
                    if self.goes_without_disk(node, volume) {
                        // What that one lacks, with excuse, does not bind the own disk either when it is back.
                        self.settle(1 - node, node, volume, "is what a diskless Primary goes on from");
                        self.borrow(node, volume);
                    }
                }
            }
        }
        match event {
            Event::Role(_, Role::Primary) => self.reign(node),
            // From the first of them on the other one may be sent to.
            Event::Conn(_, ConnState::Connected)
                if self.states(1 - node, 0).is_none_or(|s| s.connection < ConnState::Connected) =>
            {
                self.oracle.met = self.now;
            }
            Event::Conn(old, new) if *old >= ConnState::Connected && *new < ConnState::Connected => {
                self.oracle.went_on[node] |= self.is_primary(node);
                if self.is_primary(node) {
                    self.history.new_reign(node, self.now);
                }
            }
            Event::PeerDisk(_, _, new) if *new < DiskState::Inconsistent => {
                self.oracle.went_on[node] |= self.is_primary(node) || self.is_primary(1 - node);
            }
            Event::Repl(volume, _, ReplState::WFBitMapT) => {
                let volume = usize::from(volume.0);
                self.oracle.covered[volume] = self.oracle.unread[volume].len();
            }
            // Somebody decided that what it borrowed goes: its own disk counts, also for who had asked before.
            Event::Disk(volume, DiskState::Outdated | DiskState::Consistent, DiskState::UpToDate)
                if self.oracle.voided[1 - node] =>
            {
                let volume = usize::from(volume.0);
                if self.oracle.borrows[node][volume].take().is_some() {
                    self.history.forget_view(node, volume);
                    self.oracle.given_up[node][volume] = self.now;
                }
            }
            Event::Repl(volume, old, ReplState::SyncTarget) if *old != ReplState::PausedSyncT => {
                self.resync_begins(node, usize::from(volume.0));
            }
            Event::Repl(volume, _, ReplState::SyncSource) => {
                self.oracle.was_target[node][usize::from(volume.0)] = false;
            }
            // It has everything from here on, even if the source never hears of it.
            Event::Disk(volume, DiskState::Inconsistent, DiskState::UpToDate)
                if self.oracle.was_target[node][usize::from(volume.0)] =>
            {
                self.target_complete(node, usize::from(volume.0));
            }
            Event::ResyncDone { volume, bits_failed: 0, .. } => {
                self.resync_ends(node, usize::from(volume.0));
            }
            Event::Handshake(decision) => self.handshake(node, decision),
            // What cannot be read under `pass_on` is not known to be equal, and what could not be written is not
            // until it is repaired: marked both, and told by a verify that comes by (I1).
            Event::OutOfSync { volume, range } if self.oracle.check_marks => {
                let unverifiable = &self.oracle.unverifiable[usize::from(volume.0)];
                let known = |block: u64| unverifiable.has(usize::try_from(block).unwrap_or(usize::MAX));
                if range.bits_touched().all(known) {
                    return;
                }
                self.fail(format!("n{node}: verify finds {range:?} of volume {} different (I2)", volume.0));
            }
            _ => {}
        }
    }

    fn handshake(&mut self, node: usize, decision: &Decision) {
        let decided = &decision.decided;
        // Started from equal generations, a resync has no older base to return to: if it is cut and the
        // source goes on alone, only everything is safe.
        let from_equal = (40..50).contains(&decided.comparison.rule.number());
        self.oracle.full_allowed |= from_equal && decided.outcome != Outcome::NoSync;
        if matches!(decided.outcome, Outcome::Source { full: true } | Outcome::Target { full: true }) {
            if !self.oracle.full_allowed && !self.oracle.may_split() {
                self.fail(format!("n{node}: a full sync without need (I9): {decision}"));
            }
            self.oracle.touch_all();
        }
    }

    /// A node became Primary.
    fn reign(&mut self, node: usize) {
        self.oracle.served[node] = false;
        // What a dead Primary sent may still land from the wire of a connection that counts as up (`Event::Conn`).
        let may_land = self.oracle.connected[node] && !self.oracle.connected[1 - node];
        if !may_land {
            self.history.new_reign(node, self.now);
        }
        for volume in 0..self.volumes() {
            let Some(states) = self.states(node, volume) else { continue };
            let with_peer = self.oracle.connected[node]
                && states.peer_disk >= DiskState::Inconsistent
                && states.peer_disk != DiskState::DUnknown;
            // As the source of a resync it goes on from its own disk, too.
            let source = states.disk == DiskState::UpToDate && states.peer_disk != DiskState::UpToDate;
            if with_peer && source {
                self.settle(node, node, volume, "goes on as source");
            }
            if with_peer {
                self.history.new_reign(1 - node, self.now);
                if self.goes_without_disk(node, volume) {
                    self.borrow(node, volume);
                }
                continue;
            }
            self.oracle.went_on[node] = true;
            let forced = self
                .oracle
                .verbs
                .values()
                .any(|(at, verb)| *at == node && matches!(verb, Verb::Forces { data_good: false }));
            // A Primary whose promotion ends without the peer it counted on, and whose own disk is Inconsistent
            // or Outdated, serves nobody from it (I7): its disk is judged when it is made good.
            if forced || states.disk >= DiskState::Consistent {
                if forced {
                    self.history.weaken_view(node, false);
                }
                self.settle(node, node, volume, "goes on alone");
            }
        }
    }

    /// Without a disk of its own a node has the other one's to go on from.
    fn goes_without_disk(&self, node: usize, volume: usize) -> bool {
        let borrows = |s: States| s.disk == DiskState::Diskless && s.peer_disk == DiskState::UpToDate;
        self.states(node, volume).is_some_and(borrows)
    }

    /// It goes on from that.
    fn borrow(&mut self, node: usize, volume: usize) {
        let peer = 1 - node;
        self.settle(peer, peer, volume, "is what a diskless node goes on from");
        let before = self.history.save_view(node, volume);
        self.history.adopt_view(peer, node, volume, None);
        self.oracle.borrows[node][volume].get_or_insert(before);
    }

    /// What is on the node's disk replaces what the view knows; what is missing must be excused.
    fn settle(&mut self, node: usize, view: usize, volume: usize, what: &str) {
        self.settle_since(node, view, volume, what, 0);
    }

    /// The same by a decision of the nodes when they met: what was written since has no part in it.
    fn settle_since(&mut self, node: usize, view: usize, volume: usize, what: &str, met: u64) {
        if !self.check_data {
            return;
        }
        self.oracle.settlements += 1;
        self.note_changes(node, volume);
        let disk = self.nodes[node].disks[volume].sectors();
        let past = Past {
            attached: self.oracle.attached[node][volume],
            viewer_crashed: self.oracle.past[view].crashed,
            met,
            ..self.oracle.past[node]
        };
        let settled = self.history.settle(node, view, volume, disk, &past, self.now);
        if let Err(why) = settled {
            self.fail(format!("n{node} {what}: {why}"));
        }
    }

    /// Tells the history where a disk has changed since the last time.
    fn note_changes(&mut self, node: usize, volume: usize) {
        let changed = &mut self.nodes[node].disks[volume].changed;
        self.history.disk_changed(node, volume, changed);
    }

    fn resync_begins(&mut self, target: usize, volume: usize) {
        let source = 1 - target;
        self.oracle.was_target[target][volume] = true;
        if self.oracle.borrows[source][volume].is_some() && self.oracle.voided[target] {
            // Somebody decided that what it borrowed goes: its own disk counts, which it got back since.
            self.history.forget_view(source, volume);
        }
        let met = self.oracle.met;
        self.settle_since(source, source, volume, "becomes source", met);
        let decided = self.oracle.voided[target] || (self.oracle.policies && self.oracle.may_split());
        if !decided {
            let what = format!("becomes source and overwrites n{target} (I7)");
            self.settle_since(source, target, volume, &what, met);
        } else {
            self.oracle.given_up[target][volume] = self.now;
        }
        self.history.adopt_view(source, target, volume, None);
    }

    fn resync_ends(&mut self, node: usize, volume: usize) {
        if let Some(core) = &self.nodes[node].core
            && self.states(node, volume).is_some_and(|s| s.replication == ReplState::Established)
            && let Some(bits) = core.out_of_sync_bits(nr(volume)).filter(|bits| *bits != 0)
        {
            self.fail(format!("n{node}: the resync of volume {volume} ended with {bits} blocks marked"));
        }
    }

    fn target_complete(&mut self, node: usize, volume: usize) {
        let disks = [node, 1 - node].map(|node| self.nodes[node].disks[volume].sectors());
        let source = 1 - node;
        let parted = if self.oracle.connected[source] { u64::MAX } else { self.oracle.parted[source] };
        let arrived = Arrived { disks, met: self.oracle.met, parted };
        self.history.adopt_view(source, node, volume, Some(arrived));
        self.oracle.was_target[node][volume] = false;
        self.oracle.borrows[node][volume] = None;
        // A decision is made for each volume, and may choose another side. Some may still be at their resync, or have
        // no disk to hear it.
        let awaits = |(node, volume): (usize, usize)| {
            let chosen = |s: States| {
                matches!(s.replication, ReplState::WFBitMapT | ReplState::WFSyncUUID)
                    || s.disk < DiskState::Inconsistent
            };
            self.oracle.was_target[node][volume] || self.states(node, volume).is_some_and(chosen)
        };
        if !(0..2).flat_map(|node| (0..self.volumes()).map(move |volume| (node, volume))).any(awaits) {
            self.oracle.went_on[node] = false;
            // The source may have lost the connection before the target was done, and have gone on since.
            self.oracle.went_on[1 - node] &= !self.oracle.connected[1 - node];
        }
        let covered = std::mem::take(&mut self.oracle.covered[volume]);
        self.oracle.unread[volume].drain(..covered);
        self.oracle.unverifiable[volume].0.fill(0);
        let good = |volume| self.states(node, volume).is_some_and(|s| s.disk == DiskState::UpToDate);
        if (0..self.volumes()).all(good) {
            self.oracle.voided[node] = false;
        }
    }

    pub(super) fn oracle_delivered(&mut self, to: usize, message: &Message, payload: &Payload) {
        let (header, sectors) = match (message, payload) {
            (Message::RsDataReply(header), Payload::Buffer { len, .. }) => (header, len.0),
            (Message::RsDeallocated(header), _) => (header, header.nr_sectors),
            _ => return,
        };
        let volume = usize::try_from(header.volume).unwrap_or(usize::MAX);
        let Some(touched) = self.oracle.touched.get(volume).filter(|_| self.oracle.check_minimal) else {
            return;
        };
        let index = |sector: u64| usize::try_from(sector).unwrap_or(usize::MAX);
        let blocks = index(header.sector / 8)..index((header.sector + sectors).div_ceil(8));
        if let Some(block) = blocks.into_iter().find(|block| !touched.has(*block)) {
            self.fail(format!(
                "n{to}: resync copies block {block} of volume {volume}, which nobody wrote (I9)"
            ));
        }
    }

    // ---- at rest --------------------------------------------------------------------------------

    /// In sync and idle: then the disks are equal, hold what they may, and no buffer is left.
    pub fn check_quiet(&mut self) {
        if self.oracle.quiet || !self.in_sync() || !self.idle() {
            return;
        }
        self.oracle.quiet = true;
        self.oracle.equal += 1;
        for volume in 0..self.volumes() {
            self.note_differences(volume);
            if let Some((sector, a, b)) = self.first_difference(volume) {
                let text = format!(
                    "both in sync, but sector {sector} of volume {volume} is {a} on n0 and {b} on n1 (I2)"
                );
                return self.fail(text);
            }
        }
        for node in 0..2 {
            self.check_content(node);
            if !self.nodes[node].buffers.is_empty() {
                let left: Vec<_> = self.nodes[node].buffers.keys().collect();
                self.fail(format!("n{node} is idle but holds buffers {left:?}"));
            }
        }
        self.history.join_views();
        for volume in 0..self.volumes() {
            let disks = [0, 1].map(|node| &self.nodes[node].disks[volume]);
            let mut volatile = disks[0].volatile();
            volatile.add(&disks[1].volatile());
            self.history.prune(volume, disks.map(super::disk::Disk::stable_sectors), &volatile);
        }
        for volume in 0..self.volumes() {
            self.oracle.touched[volume].0.fill(0);
            for range in self.oracle.unread[volume].clone() {
                self.oracle.touch(volume, range);
            }
        }
        self.oracle.quiet = true;
        self.oracle.settled = true;
        self.oracle.full_allowed = false;
        self.oracle.went_on = [false; 2];
        self.oracle.voided = [false; 2];
        self.oracle.borrows.iter_mut().for_each(|volumes| volumes.fill(None));
    }

    /// Every sector of one node's disks is allowed in its own view.
    pub fn check_content(&mut self, node: usize) {
        if !self.check_data {
            return;
        }
        for volume in 0..self.volumes() {
            self.note_changes(node, volume);
            let disk = self.nodes[node].disks[volume].sectors();
            if let Some(wrong) = self.history.wrong_now(node, volume, disk, self.now) {
                return self.fail(format!("disk of n{node}: {wrong}"));
            }
        }
    }

    /// The nodes parted in a split brain: each holds what its application was told it does. A volume that is not split may
    /// be the older one on a node, so what is missing there must be excused; what a resync left half-way is judged nowhere.
    pub(super) fn check_parted(&mut self, node: usize) {
        for volume in 0..self.volumes() {
            if !self.oracle.was_target[node][volume] && !self.known_bad(node, volume) {
                self.settle(node, node, volume, "ends in a split brain");
            }
        }
    }
}
