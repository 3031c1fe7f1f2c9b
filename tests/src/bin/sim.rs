//! The simulator as a program: one seed replayed, told, made smaller; or many seeds, and the bad ones.
#![allow(clippy::print_stdout, reason = "a program")]
use clap::Parser;
use lockstep_tests::sim::minimise::minimise;
use lockstep_tests::sim::mixed::{Feature, draw_mixed};
use lockstep_tests::sim::plan::{Plan, draw};
use lockstep_tests::sim::run::Summary;
use lockstep_tests::sim::run_plan;
use std::io::Write;
use std::path::PathBuf;
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
    #[arg(long, visible_alias = "from", default_value_t = 1, conflicts_with = "fresh")]
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
    /// Without the rarer features.
    #[arg(long, conflicts_with = "features")]
    plain: bool,
    /// With these rarer features in every run, in place of those drawn: verify,two,...
    #[arg(long, value_delimiter = ',', value_parser = feature)]
    features: Option<Vec<Feature>>,
    /// A line for each run: seed, what was drawn, what happened.
    #[arg(long)]
    each: bool,
    /// Appends a line of figures to this file after each 500 seeds; started again with it, goes on after the
    /// last of those.
    #[arg(long, conflicts_with_all = ["fresh", "kept"])]
    log: Option<PathBuf>,
}

fn feature(name: &str) -> Result<Feature, String> {
    let known: Vec<&str> = Feature::ALL.iter().map(|(_, name, _)| *name).collect();
    Feature::from_name(name).ok_or_else(|| format!("known are {}", known.join(", ")))
}

/// Seeds between two lines of a log, and how often progress is told.
const BATCH: u64 = 500;
const PROGRESS: Duration = Duration::from_secs(10);

fn plan_of(seed: u64, args: &Args) -> Plan {
    if args.plain { draw(seed) } else { draw_mixed(seed, args.features.as_deref()) }
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
    let mut plan = plan_of(seed, args);
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

/// The plans of `seeds.txt`: a number per line; behind it `mixed` for one with the rarer features as they are drawn
/// today, or `--features two,adjust` for one with these: what is drawn for later features changes nothing then.
fn kept_plans() -> Vec<Plan> {
    let lines = include_str!("../../seeds.txt").lines();
    let plan = |line: &str| {
        let mut words = line.split_whitespace();
        let seed = words.next()?.parse().ok()?;
        Some(match words.next() {
            Some("mixed") => draw_mixed(seed, None),
            Some("--features") => {
                let features: Option<Vec<_>> = words.next()?.split(',').map(Feature::from_name).collect();
                draw_mixed(seed, Some(&features?))
            }
            _ => draw(seed),
        })
    };
    lines.filter_map(plan).collect()
}

#[expect(clippy::disallowed_methods, reason = "the one thing that shall differ from run to run")]
fn fresh_seed() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    // By microseconds: two starts never share a seed.
    u64::try_from(now.as_micros()).unwrap_or(0)
}

/// Figures of many runs.
#[derive(Clone, Default)]
struct Total {
    runs: u64,
    bad: Vec<String>,
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

    fn virtual_minutes(&self) -> f64 {
        Duration::from_nanos(self.sum.virtual_ns).as_secs_f64() / 60.0
    }

    fn per_minute(&self, wall: Duration) -> f64 {
        f64::from(u32::try_from(self.runs).unwrap_or(u32::MAX)) / wall.as_secs_f64().max(0.001) * 60.0
    }
}

/// Runs plans on all threads, and tells the bad ones.
struct Runner<'a> {
    args: &'a Args,
    jobs: usize,
    begin: Instant,
    deadline: Option<Instant>,
    stop: AtomicBool,
}

impl Runner<'_> {
    /// Runs the plans with these numbers.
    #[expect(clippy::disallowed_methods, reason = "a program that says how fast it was")]
    fn run(&self, count: u64, plan: impl Fn(u64) -> Plan + Sync) -> Total {
        let next = AtomicU64::new(0);
        let total = Mutex::new((Total::default(), Instant::now()));
        std::thread::scope(|scope| {
            for _ in 0..self.jobs {
                scope.spawn(|| {
                    while !self.stop.load(Ordering::Relaxed) {
                        let at = next.fetch_add(1, Ordering::Relaxed);
                        if at >= count {
                            break;
                        }
                        let plan = plan(at);
                        let result = run_plan(&plan);
                        let Ok(mut total) = total.lock() else { return };
                        let (total, told) = &mut *total;
                        self.tell(&plan, result, total);
                        if self.args.log.is_none() && told.elapsed() >= PROGRESS {
                            *told = Instant::now();
                            let speed = total.per_minute(self.begin.elapsed());
                            eprintln!(
                                "{} runs of {count}, {} bad, {speed:.0} per minute",
                                total.runs,
                                total.bad.len()
                            );
                        }
                        if self.deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                            self.stop.store(true, Ordering::Relaxed);
                        }
                    }
                });
            }
        });
        total.into_inner().map(|(total, _)| total).unwrap_or_default()
    }

    fn tell(&self, plan: &Plan, result: Result<Summary, String>, total: &mut Total) {
        total.runs += 1;
        if self.args.each {
            header(plan.options.seed, plan);
            if let Ok(summary) = &result {
                println!("good: {summary:?}");
            }
        }
        match result {
            Ok(summary) => total.add(&summary),
            Err(why) => {
                let line: String = why.replace('\n', " ").chars().take(400).collect();
                println!("{line}");
                total.bad.push(plan.options.name());
            }
        }
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "a program that says how fast it was; the runs have their own clock"
)]
fn many(args: &Args) -> ExitCode {
    let kept = if args.kept { kept_plans() } else { Vec::new() };
    let first = if args.fresh { fresh_seed() } else { args.first };
    let jobs =
        if args.jobs > 0 { args.jobs } else { std::thread::available_parallelism().map_or(1, usize::from) };
    let count = args.count.unwrap_or(if args.minutes.is_some() { u64::MAX } else { 200 });
    let begin = Instant::now();
    let deadline = args.minutes.map(|minutes| begin + Duration::from_secs_f64(minutes * 60.0));
    let runner = Runner { args, jobs, begin, deadline, stop: AtomicBool::new(false) };
    if let Some(path) = &args.log {
        return match logged(&runner, path, first, count) {
            Ok(code) => code,
            Err(why) => {
                eprintln!("{}: {why}", path.display());
                ExitCode::FAILURE
            }
        };
    }
    let total = runner.run(count.saturating_add(kept.len() as u64), |at| {
        let kept_one = usize::try_from(at).ok().and_then(|at| kept.get(at)).cloned();
        kept_one.unwrap_or_else(|| plan_of(first.wrapping_add(at - kept.len() as u64), args))
    });
    let Total { runs, bad, split, sum, .. } = &total;
    println!(
        "{runs} seeds from {first}, {} of them kept ones: {} bad, {split} ended in a declared split brain, {} were resolved on the way",
        kept.len(),
        bad.len(),
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
        total.per_minute(begin.elapsed()),
        total.virtual_minutes() / (begin.elapsed().as_secs_f64() / 60.0)
    );
    if bad.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// The seed after the last one that a log tells of, from `first` on.
fn after_logged(text: &str, first: u64) -> u64 {
    let last = |line: &str| line.strip_prefix("seeds ")?.split_whitespace().nth(2)?.parse::<u64>().ok();
    text.lines().filter_map(last).map(|last| last + 1).max().unwrap_or(first).max(first)
}

/// Many seeds with a line in a file for each batch: may be stopped at any moment, and goes on where it was.
///
/// # Errors
/// The file cannot be read or written.
#[expect(clippy::disallowed_methods, reason = "a program that says how fast it was")]
fn logged(runner: &Runner<'_>, path: &PathBuf, first: u64, count: u64) -> std::io::Result<ExitCode> {
    let mut file = std::fs::OpenOptions::new().create(true).append(true).open(path)?;
    let end = first.saturating_add(count);
    let mut next = after_logged(&std::fs::read_to_string(path)?, first);
    let mut bad = 0;
    while next < end && !runner.stop.load(Ordering::Relaxed) {
        let batch = BATCH.min(end - next);
        let begin = Instant::now();
        let total = runner.run(batch, |at| plan_of(next + at, runner.args));
        if total.runs < batch {
            // Stopped by the clock; which of the batch were run is not worth a note.
            break;
        }
        bad += total.bad.len();
        let sum = &total.sum;
        let line = format!(
            "seeds {next} to {} bad {} {:?} requests {} failed {} faults {} messages {} disk-ios {} resolved {} split {} virtual-minutes {:.0} runs-per-minute {:.0}",
            next + batch - 1,
            total.bad.len(),
            total.bad,
            sum.good,
            sum.failed,
            sum.faults,
            sum.messages,
            sum.disk_ios,
            sum.resolved,
            total.split,
            total.virtual_minutes(),
            total.per_minute(begin.elapsed())
        );
        println!("{line}");
        writeln!(file, "{line}")?;
        next += batch;
    }
    Ok(if bad == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_is_gone_on_with_after_its_last_batch() {
        assert_eq!(after_logged("", 7), 7);
        let text = "seeds 7 to 506 bad 0 [] requests 1\nseeds 507 to 1006 bad 1 [\"seed 9\"]\nhalf a li";
        assert_eq!(after_logged(text, 7), 1007);
        assert_eq!(after_logged(text, 5000), 5000, "another range");
    }

    #[test]
    fn every_kept_seed_is_read() {
        let lines = include_str!("../../seeds.txt").lines().filter(|line| !line.trim().is_empty());
        assert_eq!(kept_plans().len(), lines.count());
    }
}
