//! Negative controls: every planted defect must be noticed by a random run or a scenario.
//!
//! All suites of scenarios are part of this program, which runs itself, one scenario at a time, with the
//! defect planted in every world. `.ci/planted check` and `.ci/planted find` start it.
#![allow(
    clippy::disallowed_methods,
    clippy::print_stdout,
    reason = "a program that reports, and bounds its time"
)]
use lockstep_replicator::core::fault::Fault;
use lockstep_tests::planted::{By, Caught, VARIABLE, by_seed, by_seeds, known, nothing_notices, report};
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

// Every suite of scenarios as a module.
include!(concat!(env!("OUT_DIR"), "/suites.rs"));

/// Seeds that are tried when what the report names notices nothing any more.
const SPARE_SEEDS: u64 = 120;
/// So many defects are noticed at least: the report may not lose one.
const DEMANDED: usize = 56;

fn report_path() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../docs/planted-faults.md")
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// Does the work for every defect on two threads; what came out, in the order of the defects.
fn each<T: Send>(faults: &[Fault], work: impl Fn(Fault) -> T + Sync) -> Vec<(Fault, T)> {
    let next = AtomicUsize::new(0);
    let done = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some(fault) = faults.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let result = work(*fault);
                    done.lock().expect("no work panics").push((*fault, result));
                }
            });
        }
    });
    let mut done = done.into_inner().expect("no work panics");
    done.sort_by_key(|(fault, _)| *fault);
    done
}

/// Runs scenarios of this program with a defect: what it printed, and how it ended.
fn scenarios(fault: Fault, arguments: &[&str], limit: Duration) -> (String, Option<i32>) {
    let log = log_path(fault);
    let out = std::fs::File::create(&log).expect("a file for what the scenarios print");
    let mut child = Command::new(std::env::current_exe().expect("this program"))
        .args(arguments)
        .env(VARIABLE, fault.name())
        .stdin(Stdio::null())
        .stdout(out.try_clone().expect("one file twice"))
        .stderr(out)
        .spawn()
        .expect("this program starts");
    let end = Instant::now() + limit;
    let status = loop {
        match child.try_wait().expect("a child that was started") {
            Some(status) => break status.code(),
            None if Instant::now() > end => {
                child.kill().expect("a child that runs");
                child.wait().expect("a child that was killed");
                break None;
            }
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    };
    let text = std::fs::read(&log).expect("what the scenarios printed");
    std::fs::remove_file(&log).expect("the file that was made");
    (String::from_utf8_lossy(&text).into_owned(), status)
}

fn log_path(fault: Fault) -> PathBuf {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    let nr = COUNT.fetch_add(1, Ordering::Relaxed);
    std::env::temp_dir().join(format!("lockstep-planted-{}-{}-{nr}", std::process::id(), fault.name()))
}

/// One scenario alone: what it said, if it failed. One that hangs or does not exist has noticed nothing.
fn by_scenario(fault: Fault, name: &str) -> Option<Caught> {
    let (text, status) = scenarios(fault, &["--exact", name, "--nocapture"], Duration::from_secs(60));
    let failed = status == Some(101) && text.contains("test result: FAILED. 0 passed; 1 failed");
    let said = text.lines().skip_while(|line| !line.contains("panicked at")).nth(1).unwrap_or_default();
    let how = said.chars().take(150).collect();
    failed.then(|| Caught { by: By::Scenario(name.to_owned()), runs: 0, how })
}

/// What noticed a defect once, asked again.
fn again(fault: Fault, by: &By) -> Option<Caught> {
    match by {
        By::Seed(seed) => by_seed(fault, *seed),
        By::Scenario(name) => by_scenario(fault, name),
    }
}

/// The quickest of the scenarios that notice a defect.
fn by_any_scenario(fault: Fault) -> Option<Caught> {
    let suite = std::env::var("LOCKSTEP_PLANTED_SUITE").unwrap_or_default();
    let some = [&*suite, "--skip", "planted_defects", "--test-threads", "2"];
    let (text, _) = scenarios(fault, &some, Duration::from_secs(600));
    let failed: BTreeSet<&str> =
        text.lines().filter_map(|line| line.strip_prefix("test ")?.strip_suffix(" ... FAILED")).collect();
    println!("{}: {} scenarios fail: {failed:?}", fault.name(), failed.len());
    let tried = failed.into_iter().take(6).filter_map(|name| {
        let begin = Instant::now();
        let caught = by_scenario(fault, name)?;
        Some((begin.elapsed(), caught))
    });
    Some(tried.min_by_key(|(time, _)| *time)?.1)
}

/// `.ci/planted check`: what noticed each defect once still does, or a few seeds more do.
#[test]
#[ignore = "needs the build that plants defects: .ci/planted check"]
fn planted_defects_are_noticed() {
    let text = std::fs::read_to_string(report_path()).expect("docs/planted-faults.md");
    let known = known(&text);
    let names: BTreeSet<&str> = known.keys().map(String::as_str).chain(nothing_notices(&text)).collect();
    let all: BTreeSet<&str> = Fault::ALL.iter().map(|fault| fault.name()).collect();
    assert_eq!(names, all, "docs/planted-faults.md tells of other defects: .ci/planted find");
    let demanded: Vec<Fault> =
        Fault::ALL.iter().copied().filter(|fault| known.contains_key(fault.name())).collect();
    assert!(demanded.len() >= DEMANDED, "only {} planted defects are noticed", demanded.len());
    let result = each(&demanded, |fault| {
        let (by, _) = &known[fault.name()];
        again(fault, by).or_else(|| {
            let caught = by_seeds(fault, 1..=SPARE_SEEDS)?;
            println!(
                "{}: {by:?} does not notice it any more, {:?} does: .ci/planted find",
                fault.name(),
                caught.by
            );
            Some(caught)
        })
    });
    let missed: Vec<&str> =
        result.iter().filter(|(_, caught)| caught.is_none()).map(|(fault, _)| fault.name()).collect();
    assert!(missed.is_empty(), "nothing notices {missed:?}");
    println!(
        "{} planted defects are noticed, {} are not yet: {:?}",
        result.len(),
        Fault::ALL.len() - result.len(),
        nothing_notices(&text)
    );
}

/// `.ci/planted find`: writes the report anew.
#[test]
#[ignore = "takes long; .ci/planted find"]
fn planted_defects_find() {
    let seeds = number("LOCKSTEP_PLANTED_SEEDS", 300);
    let only = std::env::var("LOCKSTEP_PLANTED_ONLY").unwrap_or_default();
    let asked: Vec<Fault> = (Fault::ALL.iter().copied())
        .filter(|fault| only.is_empty() || only.split_whitespace().any(|name| name == fault.name()))
        .collect();
    // What noticed a defect before is asked first, if only what is lost shall be found again.
    let old = std::fs::read_to_string(report_path()).unwrap_or_default();
    let old = if number("LOCKSTEP_PLANTED_UPDATE", 0) == 1 { known(&old) } else { known("") };
    let found = each(&asked, |fault| {
        let begin = Instant::now();
        let kept = old.get(fault.name());
        let caught = kept
            .and_then(|(by, runs)| Some(Caught { runs: *runs, ..again(fault, by)? }))
            .or_else(|| by_seeds(fault, 1..=seeds))
            .or_else(|| by_any_scenario(fault).map(|caught| Caught { runs: seeds, ..caught }));
        let seconds = begin.elapsed().as_secs();
        match &caught {
            Some(Caught { by, runs, how }) => {
                println!("{:24} {by:?}, {runs} runs, {seconds} s: {how}", fault.name());
            }
            None => println!("{:24} MISSED, {seconds} s", fault.name()),
        }
        caught
    });
    if only.is_empty() {
        std::fs::write(report_path(), report(&found, seeds)).expect("docs/planted-faults.md");
    }
}
