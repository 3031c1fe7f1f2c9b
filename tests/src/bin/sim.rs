//! The simulator as a program: one seed replayed, told, made smaller; or many seeds, and the bad ones.
#![allow(clippy::print_stdout, reason = "a program")]
use clap::Parser;
use lockstep_tests::sim::minimise::minimise;
use lockstep_tests::sim::plan::{Plan, draw};
use lockstep_tests::sim::run::Summary;
use lockstep_tests::sim::{run_plan, run_seed};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Random runs of two replication cores on simulated disks and a simulated network.
///
/// One seed and one commit are one run.
#[derive(Debug, Parser)]
#[command(name = "sim")]
struct Args {
    /// Replay this seed.
    #[arg(long, conflicts_with_all = ["count", "minutes"])]
    seed: Option<u64>,
    /// Tell the story: time, node, verbs, messages, disk IO, states.
    #[arg(long, requires = "seed")]
    trace: bool,
    /// Leave out actions for as long as the seed fails in the same way, then tell what is left.
    #[arg(long, requires = "seed")]
    minimise: bool,
    /// Runs that --minimise may take.
    #[arg(long, default_value_t = 2000)]
    tries: usize,
    /// Run so many seeds.
    #[arg(long)]
    count: Option<u64>,
    /// The first of them.
    #[arg(long, default_value_t = 1, conflicts_with = "fresh")]
    first: u64,
    /// Seeds nobody has seen: the first comes from the clock, and is printed.
    #[arg(long)]
    fresh: bool,
    /// First the kept seeds: every one that ever failed (tests/seeds.txt).
    #[arg(long)]
    kept: bool,
    /// Threads.
    #[arg(long, default_value_t = 0)]
    jobs: usize,
    /// Stop after so many minutes.
    #[arg(long)]
    minutes: Option<f64>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    match args.seed {
        Some(seed) => one(seed, &args),
        None => many(&args),
    }
}

fn header(seed: u64, plan: &Plan) {
    println!("seed {seed}");
    println!("options {:?}", plan.options);
    println!("mix {}, first Primary n{}, {} actions", plan.features, plan.first, plan.steps.len());
}

fn one(seed: u64, args: &Args) -> ExitCode {
    let mut plan = draw(seed);
    header(seed, &plan);
    plan.options.verbose = args.trace && !args.minimise;
    if args.minimise {
        let Some((mut small, why)) = minimise(&plan, args.tries, |_| ()) else {
            println!("nothing to make smaller: the seed is good");
            return ExitCode::SUCCESS;
        };
        println!("{} of {} actions are enough:", small.steps.len(), plan.steps.len());
        for step in &small.steps {
            println!("  {:>11.6} s {:?}", Duration::from_nanos(step.at).as_secs_f64(), step.act);
        }
        if args.trace {
            small.options.verbose = true;
            // Fails as it just did; the story is what is wanted.
            drop(run_plan(&small));
        }
        println!("{why}");
        return ExitCode::FAILURE;
    }
    match run_plan(&plan) {
        Ok(summary) => {
            println!("good: {summary:?}");
            ExitCode::SUCCESS
        }
        Err(why) => {
            println!("{why}");
            ExitCode::FAILURE
        }
    }
}

/// Numbers of `seeds.txt`, one per line; the rest of a line is a comment.
fn kept_seeds() -> Vec<u64> {
    let lines = include_str!("../../seeds.txt").lines();
    lines.filter_map(|line| line.split_whitespace().next()?.parse().ok()).collect()
}

#[expect(clippy::disallowed_methods, reason = "the one thing that shall differ from run to run")]
fn fresh_seed() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    // By microseconds: two starts never share a seed.
    u64::try_from(now.as_micros()).unwrap_or(0)
}

#[derive(Default)]
struct Total {
    runs: u64,
    bad: u64,
    split: u64,
    least: Option<(u64, u64, u64)>,
    sum: Summary,
}

impl Total {
    fn add(&mut self, run: &Summary) {
        self.split += u64::from(run.split);
        self.sum.good += run.good;
        self.sum.failed += run.failed;
        self.sum.messages += run.messages;
        self.sum.disk_ios += run.disk_ios;
        self.sum.faults += run.faults;
        self.sum.resolved += run.resolved;
        self.sum.virtual_ns += run.virtual_ns;
        self.sum.equal += run.equal;
        self.sum.settlements += run.settlements;
        let this = (run.virtual_ns, run.good + run.failed, run.faults);
        let least = self.least.get_or_insert(this);
        *least = (least.0.min(this.0), least.1.min(this.1), least.2.min(this.2));
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "a program that says how fast it was; the runs have their own clock"
)]
fn many(args: &Args) -> ExitCode {
    let kept = if args.kept { kept_seeds() } else { Vec::new() };
    let first = if args.fresh { fresh_seed() } else { args.first };
    let jobs =
        if args.jobs > 0 { args.jobs } else { std::thread::available_parallelism().map_or(1, usize::from) };
    let count = args.count.unwrap_or(if args.minutes.is_some() { u64::MAX } else { 200 });
    let total_count = count.saturating_add(kept.len() as u64);
    let begin = Instant::now();
    let deadline = args.minutes.map(|minutes| begin + Duration::from_secs_f64(minutes * 60.0));
    let next = AtomicU64::new(0);
    let stop = AtomicBool::new(false);
    let total = Mutex::new(Total::default());
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    if at >= total_count {
                        break;
                    }
                    let kept_seed = usize::try_from(at).ok().and_then(|at| kept.get(at)).copied();
                    let seed = kept_seed.unwrap_or_else(|| first.wrapping_add(at - kept.len() as u64));
                    let result = run_seed(seed);
                    let Ok(mut total) = total.lock() else { return };
                    total.runs += 1;
                    match result {
                        Ok(summary) => total.add(&summary),
                        Err(why) => {
                            total.bad += 1;
                            let line: String = why.replace('\n', " ").chars().take(400).collect();
                            println!("{line}");
                        }
                    }
                    if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                        stop.store(true, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    let Ok(total) = total.into_inner() else { return ExitCode::FAILURE };
    let wall_minutes = begin.elapsed().as_secs_f64() / 60.0;
    let Total { runs, bad, split, sum, .. } = total;
    let virtual_minutes = Duration::from_nanos(sum.virtual_ns).as_secs_f64() / 60.0;
    println!(
        "{runs} seeds from {first}, {} of them kept ones: {bad} bad, {split} ended in a declared split brain, {} were resolved on the way",
        kept.len(),
        sum.resolved
    );
    println!(
        "{} requests good, {} failed, {} disk IOs, {} messages, {} faults, copies found equal {} times, settled {} times",
        sum.good, sum.failed, sum.disk_ios, sum.messages, sum.faults, sum.equal, sum.settlements
    );
    if let Some((time, ios, faults)) = total.least {
        let minutes = Duration::from_nanos(time).as_secs_f64() / 60.0;
        println!("the least of a run: {minutes:.1} virtual minutes, {ios} requests, {faults} faults");
    }
    println!(
        "{:.1} runs per minute on {jobs} threads, {:.0} virtual minutes per wall minute",
        f64::from(u32::try_from(runs).unwrap_or(u32::MAX)) / wall_minutes,
        virtual_minutes / wall_minutes
    );
    if bad == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
