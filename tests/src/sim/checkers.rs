//! What the application may see, and what must be equal: computed from what was asked and acked, and
//! from the simulated disks.
//!
//! A write has an interval from its issue to its ack. A value of a sector is *allowed* unless a later
//! write, issued after the value's own write had ended, was acked before the question was asked. A
//! write that a permitted failure may take back (not flushed before a power loss) is *weak*: it is
//! allowed but replaces nothing.
use lockstep_replicator::units::BlockRange;

/// A write of the application.
#[derive(Clone, Debug)]
pub struct Record {
    /// What its sectors hold: its own number, or 0 for zeroes.
    pub value: u32,
    /// When it was issued.
    pub issued: u64,
    /// From when on it can no longer happen.
    pub end: u64,
    /// From when on it replaces what was before.
    pub replaces: u64,
    /// Covered by an acked flush, or FUA.
    pub stable: bool,
    /// Acked.
    pub acked: bool,
}

/// All writes of a run, by sector.
#[derive(Clone, Debug)]
pub struct History {
    records: Vec<Record>,
    sectors: Vec<Vec<u32>>,
    unsettled: Vec<u32>,
    dead: Vec<u32>,
    /// Flushed writes stay for good: what they replaced can be forgotten (protocol C).
    forget: bool,
}

impl History {
    /// Of zeroed disks.
    #[must_use]
    pub fn new(sectors: u64, forget: bool) -> Self {
        let zero = Record { value: 0, issued: 0, end: 0, replaces: 0, stable: true, acked: true };
        let sectors = usize::try_from(sectors).unwrap_or(0);
        Self {
            records: vec![zero],
            sectors: vec![Vec::new(); sectors],
            unsettled: Vec::new(),
            dead: Vec::new(),
            forget,
        }
    }

    /// A write is issued; its number.
    pub fn issue(&mut self, range: BlockRange, zeroes: bool, now: u64) -> u32 {
        let number = u32::try_from(self.records.len()).unwrap_or(u32::MAX);
        let value = if zeroes { 0 } else { number };
        self.records.push(Record {
            value,
            issued: now,
            end: u64::MAX,
            replaces: u64::MAX,
            stable: false,
            acked: false,
        });
        self.unsettled.push(number);
        for sector in range.start().0..range.end().0 {
            if let Some(list) = self.sectors.get_mut(usize::try_from(sector).unwrap_or(usize::MAX)) {
                if list.len() > 8 && self.forget {
                    let records = &self.records;
                    let newest = list
                        .iter()
                        .map(|at| &records[*at as usize])
                        .filter(|record| record.stable && record.replaces != u64::MAX)
                        .map(|record| record.issued)
                        .max();
                    if let Some(newest) = newest {
                        list.retain(|at| records[*at as usize].end >= newest);
                    }
                }
                list.push(number);
            }
        }
        number
    }

    /// It was answered.
    pub fn answer(&mut self, number: u32, ok: bool, fua_stable: bool, now: u64) {
        let record = &mut self.records[number as usize];
        if ok {
            record.end = now;
            record.replaces = now;
            record.acked = true;
            record.stable = fua_stable;
        } else {
            self.dead.push(number);
        }
    }

    /// The node that issued it is gone; nobody will answer.
    pub fn orphan(&mut self, number: u32) {
        self.dead.push(number);
    }

    /// A node became Primary: what never was answered cannot happen after this.
    pub fn new_reign(&mut self, now: u64) {
        for number in std::mem::take(&mut self.dead) {
            let record = &mut self.records[number as usize];
            record.end = record.end.min(now);
        }
    }

    /// A flush issued at `issued` was acked.
    pub fn flushed(&mut self, issued: u64) {
        let records = &mut self.records;
        self.unsettled.retain(|at| {
            let record = &mut records[*at as usize];
            let covered = record.acked && record.end <= issued && record.replaces != u64::MAX;
            if covered {
                record.stable = true;
            }
            !record.stable
        });
    }

    /// A permitted loss: acked writes may be gone, except flushed ones if `keep_stable`.
    pub fn weaken(&mut self, keep_stable: bool) {
        for record in &mut self.records[1..] {
            if !(keep_stable && record.stable) {
                record.replaces = u64::MAX;
                record.stable = false;
            }
        }
    }

    /// Whether a sector may hold `value` when asked at `asked`.
    #[must_use]
    pub fn allowed(&self, sector: usize, value: u32, asked: u64) -> bool {
        let list = &self.sectors[sector];
        let records = || list.iter().map(|at| &self.records[*at as usize]);
        let zero = &self.records[0];
        records().chain(std::iter::once(zero)).any(|candidate| {
            candidate.value == value
                && !records().any(|other| other.issued > candidate.end && other.replaces < asked)
        })
    }

    /// Why the content of a range is wrong, if it is.
    #[must_use]
    pub fn wrong(&self, first: u64, data: &[u32], asked: u64) -> Option<String> {
        let first = usize::try_from(first).unwrap_or(usize::MAX);
        data.iter().enumerate().find(|(at, value)| !self.allowed(first + at, **value, asked)).map(
            |(at, value)| {
                let list = &self.sectors[first + at];
                let writes: Vec<String> = list
                    .iter()
                    .map(|at| {
                        let r = &self.records[*at as usize];
                        format!(
                            "#{at} value {} issued {} end {} replaces {}",
                            r.value, r.issued, r.end, r.replaces
                        )
                    })
                    .collect();
                format!("sector {} holds {value} at {asked}, not allowed by {writes:#?}", first + at)
            },
        )
    }
}

/// First sector that differs, and what both hold.
#[must_use]
pub fn first_difference(a: &[u32], b: &[u32]) -> Option<(usize, u32, u32)> {
    if a == b {
        return None;
    }
    a.iter().zip(b).enumerate().find(|(_, (a, b))| a != b).map(|(at, (a, b))| (at, *a, *b))
}
