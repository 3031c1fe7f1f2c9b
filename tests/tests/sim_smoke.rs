//! Random runs: a few fixed seeds, and some nobody has seen before.
use lockstep_tests::sim::run_seed;
use std::sync::atomic::{AtomicU64, Ordering};

/// Runs all of them on all processors; the bad ones, with what was wrong.
fn run_all(seeds: &[u64]) {
    let next = AtomicU64::new(0);
    let bad = std::sync::Mutex::new(Vec::new());
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                while let Some(seed) =
                    usize::try_from(next.fetch_add(1, Ordering::Relaxed)).ok().and_then(|at| seeds.get(at))
                {
                    if let Err(why) = run_seed(*seed) {
                        let text = why.chars().take(600).collect::<String>();
                        bad.lock().expect("no run panics").push(text);
                    }
                }
            });
        }
    });
    let bad = bad.into_inner().expect("no run panics");
    assert!(bad.is_empty(), "{} bad runs of {}:\n{}", bad.len(), seeds.len(), bad.join("\n"));
}

/// A few: without optimisation a run takes seconds. The kept seeds and thousands more are run by the program,
/// see `.ci/seeds`.
#[test]
fn fixed_seeds() {
    run_all(&[1, 2, 4, 6]);
}

#[test]
fn the_same_seed_is_the_same_run() {
    let twice =
        [7, 7].map(|seed| run_seed(seed).map(|run| (run.messages, run.disk_ios, run.good, run.virtual_ns)));
    assert_eq!(twice[0], twice[1]);
}

/// Seeds nobody has seen: `LOCKSTEP_FRESH_SEEDS=50 cargo test -p lockstep-tests fresh`. By the thousand the
/// program does it: `cargo run --profile sim -p lockstep-tests --bin sim -- --count 2000`.
#[test]
#[allow(clippy::print_stdout, reason = "says why it skips")]
fn fresh_seeds() {
    let wanted = std::env::var("LOCKSTEP_FRESH_SEEDS").ok();
    let Some(count) = wanted.and_then(|count| count.parse::<u64>().ok()) else {
        println!("skipped: fresh seeds are run where LOCKSTEP_FRESH_SEEDS says how many");
        return;
    };
    // The process id differs between runs; the seeds are printed on failure.
    let start = u64::from(std::process::id()) * 1_000_003;
    run_all(&(start..start + count).collect::<Vec<_>>());
}
