//! Runs many seeds and prints the bad ones: `hunt FIRST COUNT`. With COUNT 1 the panic is shown.
#![allow(clippy::print_stdout, reason = "a program")]
use lockstep_tests::sim::run_seed;
use std::panic::{AssertUnwindSafe, catch_unwind};

fn main() {
    let mut args = std::env::args().skip(1).filter_map(|arg| arg.parse::<u64>().ok());
    let first = args.next().unwrap_or(1);
    let count = args.next().unwrap_or(100);
    if count > 1 {
        std::panic::set_hook(Box::new(|_| {}));
    }
    let (mut bad, mut split, mut good) = (0, 0, 0);
    for seed in first..first + count {
        match catch_unwind(AssertUnwindSafe(|| run_seed(seed))) {
            Ok(Ok(summary)) => {
                split += u64::from(summary.split);
                good += summary.good;
            }
            Ok(Err(why)) => {
                bad += 1;
                println!("{}", if count > 1 { why.chars().take(400).collect() } else { why });
            }
            Err(panic) => {
                bad += 1;
                let text = panic.downcast_ref::<String>().cloned();
                let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
                println!("seed {seed}: panic: {}", text.unwrap_or_default());
            }
        }
    }
    println!("{count} seeds: {bad} bad, {split} with a split brain, {good} requests");
}
