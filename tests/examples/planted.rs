//! Which planted defect is caught by which seed: `cargo run --profile sim -p lockstep-tests --features planted-faults
//! --example planted -- SEEDS [NAME...]`.
#![allow(clippy::print_stdout, clippy::disallowed_methods, reason = "a program that reports and measures")]
use lockstep_replicator::core::fault::Fault;
use lockstep_tests::planted::by_seeds;
use std::time::Instant;

fn main() {
    let mut arguments = std::env::args().skip(1);
    let seeds = arguments.next().and_then(|count| count.parse().ok()).unwrap_or(300);
    let only: Vec<String> = arguments.collect();
    // An assertion of the core is one way to be caught; its text is in the table.
    std::panic::set_hook(Box::new(|_| {}));
    for fault in Fault::ALL.iter().filter(|fault| only.is_empty() || only.iter().any(|o| o == fault.name())) {
        let start = Instant::now();
        match by_seeds(*fault, 1..=seeds) {
            Some(caught) => println!(
                "{:24} seed {:4} {:6} ms  {}",
                fault.name(),
                caught.seed,
                start.elapsed().as_millis(),
                caught.how
            ),
            None => println!("{:24} MISSED    {:6} ms", fault.name(), start.elapsed().as_millis()),
        }
    }
}
