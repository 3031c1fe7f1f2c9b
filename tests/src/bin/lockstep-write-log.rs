//! Reads what dm-log-writes recorded below two nodes (`tests/vm/scripts/log_writes.sh`).
//!
//! ```text
//! lockstep-write-log list   LOG                          counts, and the marks with their places
//! lockstep-write-log replay LOG ENTRIES IMAGE BYTES      a fresh disk with the first entries; says the last checkpoint
//! lockstep-write-log check  OWN PEER NOTES BYTES DIR --cuts N --pairs N --seed N [--forget log|bitmap]
//! ```
//! `check` cuts the power of the Primary after random entries of its log OWN, half of them flushes, and wants its
//! metadata to cover every difference to the peer's disk of that moment. NOTES holds "OWN PEER" lengths of both logs at
//! the same moments. Each of `--pairs` is a line `pair OWN PEER flush|write CHECKPOINT` for further tests.
//! A mark `start` in OWN says where the story begins; a mark `checkpoint-N` that file N was made stable.
#![expect(clippy::print_stdout, reason = "a program whose output is its result")]

use lockstep_tests::write_log::coverage::{Cut, Recording};
use lockstep_tests::write_log::image::{Forget, Image};
use lockstep_tests::write_log::{Entry, Kind, WriteLog};
use std::error::Error;
use std::process::ExitCode;

type Outcome = Result<(), Box<dyn Error>>;

const USAGE: &str = "usage: lockstep-write-log list LOG | replay LOG ENTRIES IMAGE BYTES | \
                     check OWN PEER NOTES BYTES DIR --cuts N --pairs N --seed N [--forget log|bitmap]";
const CHECKPOINT: &str = "checkpoint-";

fn list(path: &str) -> Outcome {
    let log = WriteLog::open(path)?;
    let count = |wanted: &dyn Fn(&Entry) -> bool| log.entries().iter().filter(|entry| wanted(entry)).count();
    println!("entries={}", log.entries().len());
    println!("writes={}", count(&|entry| entry.changes() && entry.kind != Kind::Discard));
    println!("flushes={}", count(&Entry::is_flush));
    println!("fua={}", count(&|entry| matches!(entry.kind, Kind::Write { fua: true, .. })));
    println!("discards={}", count(&|entry| entry.kind == Kind::Discard));
    for (at, entry) in log.entries().iter().enumerate() {
        if let Kind::Mark(text) = &entry.kind {
            println!("mark {} {text}", at + 1);
        }
    }
    Ok(())
}

fn replay(path: &str, entries: usize, image: &str, bytes: u64) -> Outcome {
    let log = WriteLog::open(path)?;
    if entries > log.entries().len() {
        return Err(format!("the log has only {} entries", log.entries().len()).into());
    }
    Image::create(image, bytes)?.advance(&log, entries)?;
    println!("checkpoint={}", log.last_mark(entries, CHECKPOINT).unwrap_or("-"));
    Ok(())
}

/// The options of `check`.
struct Wanted {
    cuts: usize,
    pairs: usize,
    seed: u64,
    forget: Forget,
}

impl Wanted {
    fn parse(args: &[String]) -> Result<Self, Box<dyn Error>> {
        let mut wanted = Self { cuts: 200, pairs: 0, seed: 1, forget: Forget::Nothing };
        for option in args.chunks(2) {
            let [name, value] = option else { return Err(USAGE.into()) };
            match (name.as_str(), value.as_str()) {
                ("--cuts", value) => wanted.cuts = value.parse()?,
                ("--pairs", value) => wanted.pairs = value.parse()?,
                ("--seed", value) => wanted.seed = value.parse()?,
                ("--forget", "log") => wanted.forget = Forget::Log,
                ("--forget", "bitmap") => wanted.forget = Forget::Bitmap,
                _ => return Err(USAGE.into()),
            }
        }
        Ok(wanted)
    }
}

/// Random numbers from a seed (xorshift64*).
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let drawn = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16;
        usize::try_from(drawn).unwrap_or(0) % limit.max(1)
    }
}

/// `count` of them, in their order.
fn some(dice: &mut Dice, mut all: Vec<usize>, count: usize) -> Vec<usize> {
    while all.len() > count {
        all.swap_remove(dice.below(all.len()));
    }
    all.sort_unstable();
    all
}

/// Where the power is cut: half after flushes, half after other writes.
fn cuts(log: &WriteLog, wanted: &Wanted, dice: &mut Dice) -> Vec<usize> {
    let start = log.after_mark("start").unwrap_or(0);
    let behind = |flush: bool| -> Vec<usize> {
        let told = log.entries().iter().enumerate().skip(start);
        let chosen = told.filter(|(_, entry)| entry.is_flush() == flush && (flush || entry.changes()));
        chosen.map(|(at, _)| at + 1).collect()
    };
    let flushes = some(dice, behind(true), wanted.cuts / 2);
    let mut all = some(dice, behind(false), wanted.cuts - flushes.len());
    all.extend(flushes);
    all.sort_unstable();
    all
}

fn notes(path: &str) -> Result<Vec<(usize, usize)>, Box<dyn Error>> {
    let mut notes = Vec::new();
    for line in std::fs::read_to_string(path)?.lines() {
        let mut words = line.split_whitespace().map(str::parse);
        let (Some(own), Some(peer), None) = (words.next(), words.next(), words.next()) else {
            return Err(format!("'{line}' is not a note").into());
        };
        let note = (own?, peer?);
        if notes.last().is_some_and(|(own, peer)| *own > note.0 || *peer > note.1) {
            return Err(format!("a log got shorter: '{line}'").into());
        }
        notes.push(note);
    }
    Ok(notes)
}

fn check(own: &str, peer: &str, notes_file: &str, bytes: u64, dir: &str, wanted: &Wanted) -> Outcome {
    let recording =
        Recording { own: WriteLog::open(own)?, peer: WriteLog::open(peer)?, notes: notes(notes_file)? };
    let mut dice = Dice(wanted.seed | 1);
    let cuts = cuts(&recording.own, wanted, &mut dice);
    let images = [format!("{dir}/own.img"), format!("{dir}/peer.img")];
    let found = recording.check([&images[0], &images[1]], bytes, &cuts, wanted.forget)?;
    let most = |value: fn(&Cut) -> usize| found.iter().map(value).max().unwrap_or(0);
    println!("cuts={}", found.len());
    println!("cuts_at_flush={}", found.iter().filter(|cut| cut.at_flush).count());
    println!("cuts_with_differences={}", found.iter().filter(|cut| cut.differing > 0).count());
    println!("most_differing_blocks={}", most(|cut| cut.differing));
    println!("most_hot_extents={}", most(|cut| cut.hot));
    println!("cuts_covered_by_peer_too={}", found.iter().filter(|cut| cut.by_peer > 0).count());
    let covered: u64 = found.iter().map(|cut| cut.covered).sum();
    println!("mean_covered_blocks={}", covered / (found.len() as u64).max(1));
    for at in some(&mut dice, (0..found.len()).collect(), wanted.pairs) {
        let Some(cut) = found.get(at) else { continue };
        let kind = if cut.at_flush { "flush" } else { "write" };
        let checkpoint = recording.own.last_mark(cut.own, CHECKPOINT).unwrap_or("-");
        println!("pair {} {} {kind} {checkpoint}", cut.own, cut.peer);
    }
    Ok(())
}

fn run(args: &[String]) -> Outcome {
    match args {
        [verb, log] if verb == "list" => list(log),
        [verb, log, entries, image, bytes] if verb == "replay" => {
            replay(log, entries.parse()?, image, bytes.parse()?)
        }
        [verb, own, peer, notes, bytes, dir, options @ ..] if verb == "check" => {
            check(own, peer, notes, bytes.parse()?, dir, &Wanted::parse(options)?)
        }
        _ => Err(USAGE.into()),
    }
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("lockstep-write-log: {failure}");
            ExitCode::FAILURE
        }
    }
}
