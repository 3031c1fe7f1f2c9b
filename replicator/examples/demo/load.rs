//! Verified load: every 4 KiB block written says which block and which version it is, and the books know
//! which versions were acknowledged. Afterwards each block must hold its last acknowledged version, or
//! one written later whose answer never came.
use crate::nbd::{Command, NbdClient};
use crate::target::{Aligned, Target, open_direct};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Bytes of a block.
pub(crate) const BLOCK: usize = 4096;
/// The same, as NBD counts.
const BLOCK_LEN: u32 = 4096;
const _: () = assert!(BLOCK_LEN as usize == BLOCK);

/// The books of one block.
#[derive(Clone, Copy, Debug, Default)]
struct Entry {
    /// Newest version that was acknowledged.
    acked: u32,
    /// Newest version that was sent.
    sent: u32,
    /// A write of this block is in flight (one at a time, so that the order is known).
    busy: bool,
}

/// See the module. Covers the blocks of `[first_block, first_block + entries)`.
#[derive(Debug)]
pub(crate) struct Load {
    first_block: u64,
    entries: Vec<Entry>,
    random: u64,
    /// Writes acknowledged.
    pub(crate) acked: u64,
}

/// How a block differs from its books.
#[derive(Debug)]
pub(crate) struct Mismatch {
    /// Its number.
    pub(crate) block: u64,
    /// What was found.
    pub(crate) found: String,
    /// What was acknowledged, and sent.
    pub(crate) expected: String,
}

impl std::fmt::Display for Mismatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "block {}: {} found, {}", self.block, self.found, self.expected)
    }
}

impl Load {
    /// Books for `blocks` blocks from `first_block` on, all still zero. `seed` decides the order of writes.
    pub(crate) fn new(first_block: u64, blocks: usize, seed: u64) -> Self {
        Self { first_block, entries: vec![Entry::default(); blocks], random: seed | 1, acked: 0 }
    }

    /// Writes at random until `stop` is set or the disk fails; says how many writes were
    /// acknowledged in this run. With `depth` in flight.
    pub(crate) fn run(&mut self, target: &Target, depth: usize, stop: &AtomicBool) -> io::Result<u64> {
        match target {
            Target::Nbd { socket, export } => self.run_nbd(socket, export, depth, stop),
            Target::Device(path) => self.run_device(path, depth, stop),
        }
    }

    /// A thread per write in flight, as an application with blocking IO would.
    fn run_device(&mut self, path: &Path, depth: usize, stop: &AtomicBool) -> io::Result<u64> {
        let before = self.acked;
        let broken = Mutex::new(None);
        let failed = AtomicBool::new(false);
        let first_block = self.first_block;
        let books = Mutex::new(&mut *self);
        std::thread::scope(|scope| {
            for _ in 0..depth {
                scope.spawn(|| {
                    let work = || -> io::Result<()> {
                        let disk = open_direct(path)?;
                        let mut memory = Aligned::new(BLOCK);
                        while !stop.load(Ordering::Relaxed) && !failed.load(Ordering::Relaxed) {
                            let mut locked = books.lock().unwrap_or_else(PoisonError::into_inner);
                            let Some(at) = locked.pick() else { continue };
                            let entry = &mut locked.entries[at];
                            let version = entry.sent + 1;
                            entry.sent = version;
                            entry.busy = true;
                            drop(locked);
                            let block = first_block + at as u64;
                            fill(memory.bytes(), block, version);
                            disk.write_all_at(memory.bytes(), block * BLOCK as u64)?;
                            let mut locked = books.lock().unwrap_or_else(PoisonError::into_inner);
                            locked.entries[at].acked = version;
                            locked.entries[at].busy = false;
                            locked.acked += 1;
                        }
                        Ok(())
                    };
                    if let Err(error) = work() {
                        failed.store(true, Ordering::Relaxed);
                        broken.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                    }
                });
            }
        });
        for entry in &mut self.entries {
            entry.busy = false;
        }
        match broken.into_inner().unwrap_or_else(PoisonError::into_inner) {
            Some(error) if !stop.load(Ordering::Relaxed) => Err(error),
            _ => Ok(self.acked - before),
        }
    }

    fn run_nbd(&mut self, socket: &Path, export: &str, depth: usize, stop: &AtomicBool) -> io::Result<u64> {
        let mut client = NbdClient::connect(socket, export)?;
        let before = self.acked;
        let mut in_flight: Vec<Option<(usize, u32)>> = vec![None; depth];
        let mut outstanding = 0;
        let mut block = vec![0; BLOCK];
        let mut broken = None;
        'run: while broken.is_none() {
            let stopping = stop.load(Ordering::Relaxed);
            while !stopping && outstanding < depth {
                let (Some(slot), Some(at)) = (in_flight.iter().position(Option::is_none), self.pick()) else {
                    break;
                };
                let version = self.entries[at].sent + 1;
                fill(&mut block, self.first_block + at as u64, version);
                self.entries[at].sent = version;
                self.entries[at].busy = true;
                in_flight[slot] = Some((at, version));
                outstanding += 1;
                let offset = (self.first_block + at as u64) * BLOCK as u64;
                // One in 64 must be stable when it is acknowledged.
                let fua = self.next().is_multiple_of(64);
                let sent = client.send(Command::Write, fua, slot as u64, offset, &block, BLOCK_LEN);
                if let Err(error) = sent {
                    broken = Some(error);
                    break 'run;
                }
            }
            if outstanding == 0 {
                break;
            }
            match client.reply() {
                Ok(reply) => {
                    let slot = usize::try_from(reply.cookie).unwrap_or(usize::MAX);
                    let Some((at, version)) = in_flight.get_mut(slot).and_then(Option::take) else {
                        broken = Some(io::Error::other("a reply to a request that was not made"));
                        break;
                    };
                    outstanding -= 1;
                    if reply.errno == 0 {
                        self.entries[at].acked = version;
                        self.entries[at].busy = false;
                        self.acked += 1;
                    } else {
                        // It may have reached a disk all the same.
                        broken = Some(io::Error::from_raw_os_error(reply.errno.cast_signed()));
                    }
                }
                Err(error) => broken = Some(error),
            }
        }
        for entry in &mut self.entries {
            entry.busy = false;
        }
        let done = self.acked - before;
        match broken {
            Some(error) if !stop.load(Ordering::Relaxed) => Err(error),
            _ => Ok(done),
        }
    }

    /// Compares every block with the books. `acked_may_be_lost`: protocol A after the Primary died.
    /// A block that holds an older version than acknowledged is taken as it is from now on.
    pub(crate) fn check(&mut self, target: &Target, acked_may_be_lost: bool) -> io::Result<Vec<Mismatch>> {
        let mut reader = target.open()?;
        let mut data = vec![0; 256 * BLOCK];
        let mut wrong = Vec::new();
        for start in (0..self.entries.len()).step_by(256) {
            let count = (self.entries.len() - start).min(256);
            reader.read_at((self.first_block + start as u64) * BLOCK as u64, &mut data[..count * BLOCK])?;
            for at in 0..count {
                let block = self.first_block + (start + at) as u64;
                let entry = &mut self.entries[start + at];
                let lowest = if acked_may_be_lost { 0 } else { entry.acked };
                match version_of(&data[at * BLOCK..][..BLOCK], block) {
                    Ok(version) if version >= lowest && version <= entry.sent => {
                        entry.acked = version;
                        entry.sent = version;
                    }
                    Ok(version) => wrong.push(Mismatch {
                        block,
                        found: format!("version {version}"),
                        expected: format!("acknowledged {}, sent {}", entry.acked, entry.sent),
                    }),
                    Err(found) => wrong.push(Mismatch {
                        block,
                        found,
                        expected: format!("acknowledged {}, sent {}", entry.acked, entry.sent),
                    }),
                }
            }
        }
        Ok(wrong)
    }

    /// How many blocks were ever written.
    pub(crate) fn blocks_written(&self) -> usize {
        self.entries.iter().filter(|entry| entry.sent > 0).count()
    }

    fn pick(&mut self) -> Option<usize> {
        for _ in 0..64 {
            let at = usize::try_from(self.next() % self.entries.len() as u64).unwrap_or(0);
            if !self.entries[at].busy {
                return Some(at);
            }
        }
        None
    }

    fn next(&mut self) -> u64 {
        // xorshift64*: which blocks, nothing more.
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        self.random.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 8
    }
}

fn fill(block: &mut [u8], number: u64, version: u32) {
    for (at, word) in block.chunks_exact_mut(16).enumerate() {
        word[..8].copy_from_slice(&(number ^ (at as u64) << 48).to_le_bytes());
        word[8..12].copy_from_slice(&version.to_le_bytes());
        word[12..].copy_from_slice(&(!version).to_le_bytes());
    }
}

/// The version a block holds, 0 for all zeroes; or what is wrong with it.
fn version_of(block: &[u8], number: u64) -> Result<u32, String> {
    if block.iter().all(|byte| *byte == 0) {
        return Ok(0);
    }
    let version = u32::from_le_bytes([block[8], block[9], block[10], block[11]]);
    let mut expected = vec![0; block.len()];
    fill(&mut expected, number, version);
    if expected == block {
        Ok(version)
    } else {
        let at = expected.iter().zip(block).position(|(a, b)| a != b).unwrap_or(0);
        Err(format!("no whole version (differs at byte {at})"))
    }
}

/// Runs the load on a thread of its own until told to stop.
#[derive(Debug)]
pub(crate) struct Running {
    stop: std::sync::Arc<AtomicBool>,
    thread: std::thread::JoinHandle<(Load, io::Result<u64>)>,
}

impl Running {
    /// Starts.
    pub(crate) fn start(mut load: Load, target: Target, depth: usize) -> Self {
        let stop = std::sync::Arc::new(AtomicBool::new(false));
        let flag = stop.clone();
        let thread = std::thread::spawn(move || {
            let result = load.run(&target, depth, &flag);
            (load, result)
        });
        Self { stop, thread }
    }

    /// Ends it and gives the books back, with the number of writes acknowledged or what broke it.
    pub(crate) fn finish(self, stop: bool) -> (Load, io::Result<u64>) {
        if stop {
            self.stop.store(true, Ordering::Relaxed);
        }
        match self.thread.join() {
            Ok(ended) => ended,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

/// A pause, where a story needs one.
#[expect(
    clippy::disallowed_methods,
    reason = "a story told in real time; tests of the core move a clock instead"
)]
pub(crate) fn pause(time: Duration) {
    std::thread::sleep(time);
}
