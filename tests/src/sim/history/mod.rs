//! What the application wrote, and what each node may therefore hold.
//!
//! Each sector of a simulated disk holds the number of the write that put it there (0 = zeroes). A write
//! has an interval from its issue to its end. Each node has its own *view* of it: a write acked while the
//! other node took no part replaces older ones only in the view of the node that has it. When a node goes
//! on from what its disk holds (promoted alone, or source of a resync), [`History::settle`] compares the
//! disk with a view: acked writes that are missing must have an `Excuse`, and then they bind no longer.
//!
//! | acked under | may be missing on a node that goes on |
//! |---|---|
//! | A | what never reached its disk, if nothing issued after its ack is there |
//! | B | what never reached its disk, if the node has crashed or given the disk up since |
//! | C | what a power cut took from its cache, unless a flush was acked since |
//!
//! A read that shows a write nobody will ever answer makes it as good as acked: no later read may go back.
//!
//! A disk is compared with a view again and again. Only blocks that are `unsure` are looked at: a block is
//! sure when all its sectors were allowed in the view and nothing binding is as new as the question, and it
//! becomes unsure when the disk changes there ([`History::disk_changed`]) or when the end or the binding
//! of one of its writes does. Nothing else has a say, so what was right stays right. [`History::compare`]
//! asks the whole disk too, and says where the answers differ.
mod missing;

use super::blocks::{Blocks, SECTORS_PER_BLOCK};
use lockstep_replicator::core::config::Protocol;
use lockstep_replicator::units::BlockRange;

/// The time of "never".
pub const NEVER: u64 = u64::MAX;

/// What became of a write in the view of one node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fate {
    /// From when on it can no longer happen.
    pub end: u64,
    /// From when on it replaces what was before.
    pub replaces: u64,
    /// Covered by an acked flush, or FUA, that this node took part in.
    pub stable: bool,
    /// Nobody will answer it.
    pub dead: bool,
    /// It was on the node's disk as a whole, and no power cut took it away.
    pub landed: bool,
    /// It is in a resync's past: what this node's disk went through before cannot say anything about it.
    pub sent: bool,
}

/// By record: from when on it replaced what was before in a view, and whether it was stable there.
pub type SavedView = Vec<(u64, bool)>;

const OPEN: Fate =
    Fate { end: NEVER, replaces: NEVER, stable: false, dead: false, landed: false, sent: false };

/// A write of the application.
#[derive(Clone, Debug)]
pub struct Record {
    /// What its sectors hold: its own number, or 0 for zeroes.
    pub value: u32,
    /// When it was issued.
    pub issued: u64,
    /// By which node.
    pub node: usize,
    /// To which volume.
    pub volume: usize,
    /// First sector.
    pub start: usize,
    /// Sectors.
    pub len: usize,
    /// FUA.
    pub fua: bool,
    /// The one it was sent by last.
    protocol: Protocol,
    /// By node.
    pub fate: [Fate; 2],
    /// What a read beside another Primary showed of that one's write, before it was answered.
    shown_early: bool,
    /// Both views say the same of it.
    joined: bool,
}

/// What happened to a node, as far as it excuses missing writes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Past {
    /// When it last stopped without warning.
    pub crashed: u64,
    /// When the disk in question was attached last: nothing of before is on its way to it any more.
    pub attached: u64,
    /// When it last lost its cache.
    pub lost_power: u64,
    /// When the node in whose view this is asked stopped last.
    pub viewer_crashed: u64,
    /// Since then, some write of its own disk failed.
    pub write_errors: u64,
    /// When the nodes met that decided this; 0: nobody did.
    pub met: u64,
}

/// Why a write is missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Excuse {
    /// A permitted loss.
    Lost,
    /// It is still on its way to this disk.
    OnItsWay,
    /// No reason: a broken promise.
    None,
}

/// What a target has at the end of a resync.
#[derive(Clone, Copy, Debug)]
pub struct Arrived<'a> {
    /// Its disk and the source's.
    pub disks: [&'a [u32]; 2],
    /// When the nodes met.
    pub met: u64,
    /// When the source noticed that they are apart again; `u64::MAX`: it has not.
    pub parted: u64,
}

/// All writes of a run.
#[derive(Clone, Debug)]
pub struct History {
    records: Vec<Record>,
    /// Records by volume and sector, oldest first.
    sectors: Vec<Vec<Vec<u32>>>,
    /// By volume: blocks with records.
    touched: Vec<Blocks>,
    /// By disk, view and volume: blocks of that disk that may not be allowed in that view.
    unsure: [[Vec<Blocks>; 2]; 2],
    /// By volume: blocks in which a sector may have more than one record.
    crowded: Vec<Blocks>,
    /// Records that may differ between the views.
    unjoined: Vec<u32>,
    /// Look at every block too, and compare.
    pub compare: bool,
    /// Acked and not stable, by view.
    unsettled: [Vec<u32>; 2],
    dead: [Vec<u32>; 2],
    protocol: Protocol,
}

fn at(sector: u64) -> usize {
    usize::try_from(sector).unwrap_or(usize::MAX)
}

impl History {
    /// Of zeroed volumes of these sizes.
    #[must_use]
    pub fn new(sizes: &[u64], protocol: Protocol) -> Self {
        let done = Fate { end: 0, replaces: 0, stable: true, landed: true, sent: true, ..OPEN };
        let zero = Record {
            value: 0,
            issued: 0,
            node: 0,
            volume: 0,
            start: 0,
            len: 0,
            fua: false,
            protocol,
            fate: [done; 2],
            shown_early: false,
            joined: true,
        };
        let none: Vec<Blocks> = sizes.iter().map(|size| Blocks::none(*size)).collect();
        Self {
            records: vec![zero],
            sectors: sizes.iter().map(|size| vec![Vec::new(); at(*size)]).collect(),
            touched: none.clone(),
            unsure: [[none.clone(), none.clone()], [none.clone(), none.clone()]],
            crowded: none,
            unjoined: Vec::new(),
            compare: false,
            unsettled: [Vec::new(), Vec::new()],
            dead: [Vec::new(), Vec::new()],
            protocol,
        }
    }

    /// The protocol of the writes from now on that are not sent.
    pub const fn set_protocol(&mut self, protocol: Protocol) {
        self.protocol = protocol;
    }

    /// A volume has this size from now on.
    pub fn grow(&mut self, volume: usize, sectors: u64) {
        self.sectors[volume].resize(at(sectors), Vec::new());
        let unsure = self.unsure.iter_mut().flatten().map(|volumes| &mut volumes[volume]);
        for blocks in unsure.chain([&mut self.touched[volume], &mut self.crowded[volume]]) {
            blocks.grow(sectors);
        }
    }

    /// A node's disk holds something else in these blocks since the last time; they are taken over.
    pub fn disk_changed(&mut self, node: usize, volume: usize, changed: &mut Blocks) {
        if !changed.is_empty() {
            for view in &mut self.unsure[node] {
                view[volume].add(changed);
            }
            changed.0.fill(0);
        }
    }

    /// The two views may differ about a record.
    fn unjoin(&mut self, number: u32) {
        let record = &mut self.records[number as usize];
        if std::mem::replace(&mut record.joined, false) {
            self.unjoined.push(number);
        }
    }

    /// What a view allows has changed where a record is.
    fn ask_again(&mut self, number: u32, view: usize) {
        self.unjoin(number);
        let record = &self.records[number as usize];
        for disk in &mut self.unsure {
            if let Some(blocks) = disk[view].get_mut(record.volume) {
                blocks.set_sectors(record.start, record.len);
            }
        }
    }

    /// A new record, in the lists of its sectors.
    fn enlist(&mut self, mut record: Record) -> u32 {
        let number = u32::try_from(self.records.len()).unwrap_or(u32::MAX);
        let (volume, start, len) = (record.volume, record.start, record.len);
        if let Some(lists) = self.sectors.get_mut(volume) {
            let mut crowded = false;
            for list in lists.iter_mut().skip(start).take(len) {
                list.push(number);
                crowded |= list.len() > 1;
            }
            self.touched[volume].set_sectors(start, len);
            if crowded {
                self.crowded[volume].set_sectors(start, len);
            }
        }
        record.joined = true;
        let binds = record.fate.map(|fate| fate.replaces != NEVER);
        self.records.push(record);
        self.unjoin(number);
        for view in (0..2).filter(|view| binds[*view]) {
            self.ask_again(number, view);
        }
        number
    }

    /// A record by its number.
    #[must_use]
    pub fn record(&self, number: u32) -> Option<&Record> {
        self.records.get(number as usize)
    }

    /// A write is issued; its number.
    pub fn issue(
        &mut self,
        node: usize,
        volume: usize,
        range: BlockRange,
        zeroes: bool,
        fua: bool,
        now: u64,
    ) -> u32 {
        let (start, len) = (at(range.start().0), at(range.len().0));
        let fate = [OPEN; 2];
        let number = self.enlist(Record {
            value: 0,
            issued: now,
            node,
            volume,
            start,
            len,
            fua,
            protocol: self.protocol,
            fate,
            shown_early: false,
            joined: true,
        });
        if !zeroes {
            self.records[number as usize].value = number;
        }
        number
    }

    /// A node's disk holds this now: a whole write of the application, if that is known, or what a resync
    /// copied. Which record it was, 0 if none as a whole.
    pub fn land(
        &mut self,
        node: usize,
        volume: usize,
        start: usize,
        content: &[u32],
        known: Option<u32>,
    ) -> u32 {
        if let Some(number) = known {
            self.records[number as usize].fate[node].landed = true;
            self.unjoin(number);
            return number;
        }
        let mut tag = 0;
        let mut from = 0;
        while from < content.len() {
            let value = content[from];
            let mut to = from + 1;
            while to < content.len() && content[to] == value {
                to += 1;
            }
            let found = if value == 0 {
                self.open_zeroes(node, volume, start + from, to - from)
            } else {
                let whole = self.record(value).is_some_and(|r| {
                    r.volume == volume && r.start >= start + from && r.start + r.len <= start + to
                });
                whole.then_some(value)
            };
            if let Some(number) = found {
                self.records[number as usize].fate[node].landed = true;
                self.unjoin(number);
                tag = number;
            }
            from = to;
        }
        tag
    }

    /// The oldest write of zeroes to just this range that this node does not have yet; one that is still
    /// waited for, if there is one. A resync copied it, which does not know whose it was.
    fn open_zeroes(&self, node: usize, volume: usize, start: usize, len: usize) -> Option<u32> {
        let list = self.sectors.get(volume)?.get(start)?;
        let open = || {
            list.iter().copied().filter(|number| {
                let r = &self.records[*number as usize];
                r.value == 0 && r.start == start && r.len == len && !r.fate[node].landed
            })
        };
        let waited_for = |number: &u32| {
            let fate = &self.records[*number as usize].fate[node];
            // One with an end was answered before, and lost since.
            !fate.dead && fate.replaces == NEVER && fate.end == NEVER
        };
        open().find(waited_for).or_else(|| open().next())
    }

    /// A power cut took these writes, or parts of them, from a node's cache.
    pub fn unland(&mut self, node: usize, tags: &[u32]) {
        for tag in tags {
            if let Some(record) = self.records.get_mut(*tag as usize).filter(|_| *tag != 0) {
                record.fate[node].landed = false;
                self.unjoin(*tag);
            }
        }
    }

    /// A frame with this write left for the other node, by this protocol; or into a transport that is no more.
    pub fn sent(&mut self, number: u32, protocol: Protocol, lost: bool) {
        if let Some(record) = self.records.get_mut(number as usize) {
            record.protocol = protocol;
            record.fate[1 - record.node].sent |= !lost;
            self.unjoin(number);
        }
    }

    /// Which one a write was sent by.
    #[must_use]
    pub fn protocol_of(&self, number: u32) -> Option<Protocol> {
        self.record(number).map(|record| record.protocol)
    }

    /// It was answered well. `connected`: the issuer still believes in its peer.
    pub fn acked(&mut self, number: u32, connected: bool, now: u64) {
        let record = &mut self.records[number as usize];
        let (issuer, protocol) = (record.node, record.protocol);
        for node in 0..2 {
            let fate = &mut record.fate[node];
            let mirrored = node != issuer && protocol != Protocol::C && connected && fate.sent;
            fate.end = fate.end.min(now);
            if fate.landed || mirrored {
                fate.replaces = fate.replaces.min(now);
                fate.stable |= record.fua && (node == issuer || (protocol == Protocol::C && connected));
                if !fate.stable {
                    self.unsettled[node].push(number);
                }
            } else {
                // It may be there or come there; nobody relies on it.
                fate.end = NEVER;
                fate.dead = true;
                self.dead[node].push(number);
            }
        }
        self.ask_again(number, 0);
        self.ask_again(number, 1);
    }

    /// Nobody will answer it, or the answer was an error.
    pub fn orphan(&mut self, number: u32) {
        for node in 0..2 {
            self.records[number as usize].fate[node].dead = true;
            self.dead[node].push(number);
        }
        self.unjoin(number);
    }

    /// A node became Primary: in its view, what never was answered cannot happen after this.
    pub fn new_reign(&mut self, node: usize, now: u64) {
        for number in std::mem::take(&mut self.dead[node]) {
            let fate = &mut self.records[number as usize].fate[node];
            if fate.end > now {
                fate.end = now;
                self.ask_again(number, node);
            }
        }
    }

    /// A flush issued at `issued` was acked; these nodes took part. `only`: it speaks for this node's writes.
    pub fn flushed(&mut self, volume: usize, issued: u64, nodes: [bool; 2], only: Option<usize>, by: usize) {
        let (records, unjoined) = (&mut self.records, &mut self.unjoined);
        for (node, unsettled) in self.unsettled.iter_mut().enumerate().filter(|(node, _)| nodes[*node]) {
            unsettled.retain(|number| {
                let record = &mut records[*number as usize];
                if std::mem::replace(&mut record.joined, false) {
                    unjoined.push(*number);
                }
                let fate = record.fate[node];
                let covered =
                    record.volume == volume && fate.end <= issued && fate.replaces != NEVER && fate.landed;
                let covered = covered && only.is_none_or(|only| record.node == only);
                // What the node that asks has gone on without is no business of its flush.
                let covered = covered && record.fate[by].replaces != NEVER;
                let fate = &mut record.fate[node];
                fate.stable |= covered;
                !fate.stable && fate.replaces != NEVER
            });
        }
    }

    /// Nothing binds any longer in a node's view, except flushed writes if `keep_stable`.
    pub fn weaken_view(&mut self, node: usize, keep_stable: bool) {
        for number in 1..u32::try_from(self.records.len()).unwrap_or(u32::MAX) {
            let fate = &mut self.records[number as usize].fate[node];
            if !(keep_stable && fate.stable) {
                fate.replaces = NEVER;
                fate.stable = false;
                self.ask_again(number, node);
            }
        }
    }

    /// What binds in a node's view of a volume, by record: for [`Self::restore_view`].
    #[must_use]
    pub fn save_view(&self, node: usize, volume: usize) -> SavedView {
        let of = |record: &Record| (record.fate[node].replaces, record.fate[node].stable);
        self.records.iter().map(|r| if r.volume == volume { of(r) } else { (NEVER, false) }).collect()
    }

    /// A node's view of a volume binds as it did when it was saved.
    pub fn restore_view(&mut self, node: usize, volume: usize, saved: &SavedView) {
        for number in 1..u32::try_from(self.records.len()).unwrap_or(u32::MAX) {
            let record = &mut self.records[number as usize];
            if record.volume == volume {
                let (replaces, stable) = saved.get(number as usize).copied().unwrap_or((NEVER, false));
                (record.fate[node].replaces, record.fate[node].stable) = (replaces, stable);
                if replaces != NEVER && !stable {
                    self.unsettled[node].push(number);
                }
                self.ask_again(number, node);
            }
        }
        self.unsettled[node].sort_unstable();
        self.unsettled[node].dedup();
    }

    /// Nothing binds any longer in a node's view of a volume.
    pub fn forget_view(&mut self, node: usize, volume: usize) {
        for number in 1..u32::try_from(self.records.len()).unwrap_or(u32::MAX) {
            let record = &mut self.records[number as usize];
            if record.volume == volume {
                (record.fate[node].replaces, record.fate[node].stable) = (NEVER, false);
                self.ask_again(number, node);
            }
        }
    }

    /// See [`Self::weaken_view`], for both: a double fault that a test permits.
    pub fn weaken(&mut self, keep_stable: bool) {
        for node in 0..2 {
            self.weaken_view(node, keep_stable);
        }
    }

    /// Node `to` takes over what node `from` knows of a volume (resync). `arrived`: it has the data, too,
    /// as `arrived` says; what was written at `from` since they met comes by a frame of its own, and may be on its way.
    /// What `from` told when it was alone again is its own business.
    pub fn adopt_view(&mut self, from: usize, to: usize, volume: usize, arrived: Option<Arrived<'_>>) {
        let alone_since = arrived.as_ref().map_or(NEVER, |arrived| arrived.parted);
        let came = |record: &Record, number: u32| {
            let Some(Arrived { disks: [own, source], met, .. }) = arrived else { return false };
            if record.fate[to].sent && record.issued >= met {
                return false;
            }
            let there = |at: usize| own[at] == source[at] || own[at] == record.value || own[at] >= number;
            record.fate[from].landed && (record.start..record.start + record.len).all(there)
        };
        for number in 1..u32::try_from(self.records.len()).unwrap_or(u32::MAX) {
            let record = &mut self.records[number as usize];
            if record.volume != volume {
                continue;
            }
            let before = record.fate[to];
            let landed = before.landed || came(record, number);
            let told = record.fate[from].replaces;
            if record.node == from && !landed && told != NEVER && told >= alone_since {
                continue;
            }
            record.fate[to] = Fate { landed, sent: before.sent, ..record.fate[from] };
            let fate = record.fate[to];
            if fate.dead && fate.end == NEVER {
                self.dead[to].push(number);
            }
            if fate.replaces != NEVER && !fate.stable {
                self.unsettled[to].push(number);
            }
            if before.end != fate.end || before.replaces != fate.replaces {
                self.ask_again(number, to);
            } else if before != fate {
                self.unjoin(number);
            }
        }
        for list in [&mut self.dead[to], &mut self.unsettled[to]] {
            list.sort_unstable();
            list.dedup();
        }
    }

    /// Both nodes have the same data and nothing is in flight: what binds one binds both.
    pub fn join_views(&mut self) {
        for number in std::mem::take(&mut self.unjoined) {
            let record = &mut self.records[number as usize];
            let [a, b] = record.fate;
            // What one has seen acked is on both disks now, if it was not overwritten since.
            let landed = a.replaces.min(b.replaces) != NEVER;
            let joined = Fate {
                end: a.end.min(b.end),
                replaces: a.replaces.min(b.replaces),
                stable: a.stable && b.stable,
                dead: a.dead && b.dead,
                landed: a.landed || landed,
                sent: true,
            };
            record.fate = [joined, Fate { landed: b.landed || landed, ..joined }];
            for (view, before) in [a, b].iter().enumerate() {
                if before.end != joined.end || before.replaces != joined.replaces {
                    self.ask_again(number, view);
                }
            }
            // Joining once more would change nothing.
            self.records[number as usize].joined = true;
        }
    }

    /// Forgets what can never be seen again: both disks hold the same, stable, and nothing is in flight.
    /// `volatile`: blocks in which a power cut may bring back something older.
    pub fn prune(&mut self, volume: usize, stable: [&[u32]; 2], volatile: &Blocks) {
        let mut crowded = std::mem::take(&mut self.crowded[volume]);
        crowded.retain(|block| {
            let (from, to) = sectors_of(block, self.sectors[volume].len());
            let mut left = false;
            for sector in from..to {
                self.prune_sector(volume, sector, stable, !volatile.has(block));
                left |= self.sectors[volume][sector].len() > 1;
            }
            left
        });
        self.crowded[volume] = crowded;
    }

    fn prune_sector(&mut self, volume: usize, sector: usize, stable: [&[u32]; 2], settled: bool) {
        let list = &mut self.sectors[volume][sector];
        let value = stable[0][sector];
        if list.len() < 2 || stable[1][sector] != value || (value == 0 && !settled) {
            return;
        }
        let records = &self.records;
        let known = list.iter().map(|number| &records[*number as usize]);
        let issued = if value != 0 {
            known.filter(|r| r.value == value).map(|r| r.issued).next()
        } else {
            // Of several writes of zeroes nobody knows which one is there: the oldest that may be.
            let replaced = |end: u64, view: usize| {
                list.iter().any(|number| {
                    let r = &records[*number as usize];
                    r.issued > end && r.fate[view].replaces != NEVER
                })
            };
            let possible = |r: &Record| (0..2).any(|view| !replaced(r.fate[view].end, view));
            if possible(&records[0]) {
                None
            } else {
                known.filter(|r| r.value == 0 && possible(r)).map(|r| r.issued).min()
            }
        };
        if let Some(issued) = issued {
            list.retain(|number| {
                let r = &records[*number as usize];
                (value != 0 && r.value == value) || r.fate.iter().any(|fate| fate.end >= issued)
            });
        }
    }

    /// The record by which a sector may hold `value` for a question asked at `asked`; `Err` has the newest
    /// candidate, if any, which some other record replaces.
    fn candidate(
        &self,
        view: usize,
        volume: usize,
        sector: usize,
        value: u32,
        asked: u64,
    ) -> Result<u32, Option<u32>> {
        let list = &self.sectors[volume][sector];
        let mut best: Option<u32> = None;
        let zero = (value == 0).then_some(0);
        let own = if value == 0 { None } else { list.binary_search(&value).ok().map(|_| value) };
        let zeroes =
            list.iter().copied().filter(|number| value == 0 && self.records[*number as usize].value == 0);
        for number in zero.into_iter().chain(own).chain(zeroes) {
            let end = self.records[number as usize].fate[view].end;
            let replaced = list.iter().any(|other| {
                let other = &self.records[*other as usize];
                other.issued > end && other.fate[view].replaces < asked
            });
            if !replaced {
                return Ok(number);
            }
            if best.is_none_or(|best| self.records[best as usize].fate[view].end <= end) {
                best = Some(number);
            }
        }
        Err(best)
    }

    /// Why the content of a range is wrong in a node's view, if it is.
    #[must_use]
    pub fn wrong(
        &self,
        view: usize,
        volume: usize,
        first: usize,
        data: &[u32],
        asked: u64,
    ) -> Option<String> {
        data.iter().enumerate().find_map(|(offset, value)| {
            let sector = first + offset;
            if *value == 0 && self.sectors[volume][sector].is_empty() {
                return None;
            }
            if offset > 0 && data[offset - 1] == *value && self.is_like_before(volume, sector) {
                return None;
            }
            self.candidate(view, volume, sector, *value, asked).err()?;
            Some(self.explain(view, volume, sector, *value, asked))
        })
    }

    /// The same of a whole disk as it is now, where anything has changed since the last time.
    ///
    /// # Panics
    /// [`Self::compare`] is set, and the whole disk gives another answer.
    pub fn wrong_now(&mut self, view: usize, volume: usize, disk: &[u32], now: u64) -> Option<String> {
        let mut unsure = std::mem::take(&mut self.unsure[view][view][volume]);
        let mut wrong = None;
        // What was acked at this very moment binds, too: the disk is looked at after it.
        let asked = now + 1;
        unsure.retain(|block| {
            let (from, to) = sectors_of(block, disk.len());
            if wrong.is_none() {
                wrong = self.wrong(view, volume, from, &disk[from..to], asked);
            }
            wrong.is_some()
        });
        self.unsure[view][view][volume] = unsure;
        if self.compare {
            let full = self.wrong(view, volume, 0, disk, asked);
            assert_eq!(wrong, full, "what changed, and the whole disk of n{view}, volume {volume}");
        }
        wrong
    }

    /// No write of a sector began to bind as late as `asked`, so that a later question has no other answer.
    fn is_old(&self, view: usize, volume: usize, sector: usize, asked: u64) -> bool {
        self.sectors[volume][sector].iter().all(|number| {
            let replaces = self.records[*number as usize].fate[view].replaces;
            replaces < asked || replaces == NEVER
        })
    }

    /// The sector before has the same records: of the same content there is nothing else to say.
    fn is_like_before(&self, volume: usize, sector: usize) -> bool {
        self.sectors[volume][sector] == self.sectors[volume][sector - 1]
    }

    fn explain(&self, view: usize, volume: usize, sector: usize, value: u32, asked: u64) -> String {
        let mut text = format!(
            "sector {sector} of volume {volume} holds {value} at {} us, not allowed for n{view} by",
            asked / 1000
        );
        let us = |time: u64| if time == NEVER { "-".to_owned() } else { (time / 1000).to_string() };
        for number in &self.sectors[volume][sector] {
            let r = &self.records[*number as usize];
            let fate = &r.fate[view];
            text += &format!(
                "\n  #{number} (value {}) of n{} issued {} end {} acked {}{}{}{}",
                r.value,
                r.node,
                us(r.issued),
                us(fate.end),
                us(fate.replaces),
                if fate.stable { " stable" } else { "" },
                if fate.landed { " landed" } else { "" },
                if fate.dead { " unanswered" } else { "" },
            );
        }
        text
    }

    /// A read from `first` on showed these values to the application. Where one is of a write that nobody
    /// will answer, it binds from now on, in these views and for these sectors, as an acked one does. `beside`:
    /// the reader takes the other node for a Primary that is there.
    pub fn seen(
        &mut self,
        views: [bool; 2],
        volume: usize,
        first: usize,
        data: &[u32],
        beside: Option<usize>,
        now: u64,
    ) {
        let mut from = 0;
        while from < data.len() {
            let value = data[from];
            let mut to = from + 1;
            while to < data.len() && data[to] == value {
                to += 1;
            }
            if value != 0
                && let Some(record) = self.record(value)
                && (0..2)
                    .any(|node| views[node] && record.fate[node].dead && record.fate[node].replaces == NEVER)
            {
                let shown_early = beside == Some(record.node);
                let mut seen = Record { start: first + from, len: to - from, shown_early, ..record.clone() };
                let known = self.sectors[volume][seen.start].iter().any(|number| {
                    let r = &self.records[*number as usize];
                    r.value == value && *number != value && r.start == seen.start && r.len == seen.len
                });
                for (fate, view) in seen.fate.iter_mut().zip(views) {
                    // A power cut that takes the write away says so of the write alone.
                    fate.landed = false;
                    if view && fate.dead && fate.replaces == NEVER {
                        *fate = Fate { end: now, replaces: now, dead: false, ..*fate };
                    }
                }
                if !known {
                    self.enlist(seen);
                }
            }
            from = to;
        }
    }
}

fn sectors_of(block: usize, size: usize) -> (usize, usize) {
    let from = (block * SECTORS_PER_BLOCK).min(size);
    (from, (from + SECTORS_PER_BLOCK).min(size))
}
