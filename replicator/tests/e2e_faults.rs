//! Random stories on real processes: two daemons, a client that writes over NBD and keeps books, and nodes that are
//! killed or hang, links that are cut, silent in one direction, slow or dripping. See `e2e/story.rs`.
//!
//! `LOCKSTEP_FAULTS_SECONDS` sets how long each story is told (default 60), `LOCKSTEP_FAULTS_SEED` another schedule.
//! The schedule comes from the seed; what meets what in the middle of it is up to the machine.
#![cfg(feature = "runtime")]
#![allow(
    clippy::print_stdout,
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "tests in real time: they end where something is not as it should be, and say why they skip"
)]
#[path = "../examples/demo/cluster.rs"]
#[allow(dead_code, reason = "shared with the demo")]
mod cluster;
#[path = "e2e/link.rs"]
mod link;
#[path = "../examples/demo/load.rs"]
#[allow(dead_code, reason = "shared with the demo")]
mod load;
#[path = "../examples/demo/nbd.rs"]
#[allow(dead_code, reason = "shared with the demo")]
mod nbd;
#[path = "e2e/story.rs"]
mod story;
#[path = "../examples/demo/target.rs"]
#[allow(dead_code, reason = "shared with the demo")]
mod target;
#[path = "e2e/veth.rs"]
mod veth;

use std::path::Path;
use std::time::Duration;
use story::{Story, worth_telling};
use veth::Veth;

/// The disks are in memory where that is possible: the host's disk is not what is tested.
fn scratch() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { tempfile::tempdir_in(memory).unwrap() } else { tempfile::tempdir().unwrap() }
}

fn variable(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} is a number, got {text:?}")))
}

fn told(protocol: char, seed: u64, share: f64, veth: Option<Veth>) {
    let seconds = variable("LOCKSTEP_FAULTS_SECONDS").unwrap_or(60) as f64 * share;
    let seed = variable("LOCKSTEP_FAULTS_SEED").unwrap_or(seed);
    println!("protocol {protocol}, seed {seed}, {seconds:.0} s");
    let dir = scratch();
    let begun = cluster::now();
    let mut story = Story::begin(dir.path(), protocol, seed, veth);
    while begun.elapsed() < Duration::from_secs_f64(seconds) || !worth_telling(&story.tally) {
        story.round();
    }
    let tally = story.finish();
    println!("protocol {protocol}, seed {seed}: {tally:?}");
}

#[test]
fn faults_under_protocol_a() {
    told('A', 0xFA0A, 1.0, None);
}

#[test]
fn faults_under_protocol_b() {
    told('B', 0xFA0B, 1.0, None);
}

#[test]
fn faults_under_protocol_c() {
    told('C', 0xFA0C, 1.0, None);
}

#[test]
fn faults_between_network_namespaces() {
    match Veth::make() {
        Ok(veth) => told('C', 0xFA0D, 0.5, Some(veth)),
        Err(why) => println!("skipped: network namespaces cannot be made here: {why}"),
    }
}
