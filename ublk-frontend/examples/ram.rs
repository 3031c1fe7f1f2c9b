//! A disk in memory: all operations, real data.
//!
//! `ram [SIZE_MIB [LOGICAL_BLOCK_BYTES [QUEUE_DEPTH [deferred]]]]`; runs until standard input ends. Needs root and `modprobe ublk_drv`.
//! It also makes the links `/dev/drbd99` and `/dev/drbd/by-res/ram-example/0`.
#![allow(clippy::print_stdout, reason = "an example talks to its user")]

use std::error::Error;
use std::io::{self, Read};
use std::path::Path;
use std::process::ExitCode;

use lockstep_ublk_frontend::links::DeviceLinks;
use lockstep_ublk_frontend::{DeviceConfig, sweep_dead_devices};
use ram_disk::RamDisk;
use support::{RingKind, Running};

#[path = "support/ram_disk.rs"]
mod ram_disk;
mod support;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ram: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let size_mib: u64 = args.next().map_or(Ok(512), |text| text.parse())?;
    let mut config = DeviceConfig::new(size_mib << 20);
    if let Some(text) = args.next() {
        config.logical_block_bytes = text.parse()?;
    }
    if let Some(text) = args.next() {
        config.queue_depth = text.parse()?;
    }
    let kind = if args.next().as_deref() == Some("deferred") { RingKind::Deferred } else { RingKind::Plain };
    let swept = sweep_dead_devices()?;
    println!("swept {swept}");
    let disk = RamDisk::new(usize::try_from(config.size_bytes)?);
    let running = Running::start(config, kind, disk)?;
    // A name that is taken is no reason to do without the disk.
    let links = DeviceLinks::create(Path::new("/dev"), 99, "ram-example", 0, &running.device().block_path())
        .inspect_err(|error| eprintln!("no links: {error}"))
        .ok();
    println!("ready {}", running.device().block_path().display());
    io::stdin().read_to_end(&mut Vec::new())?;
    if let Some(links) = links {
        links.remove();
    }
    running.finish()?;
    println!("deleted");
    Ok(())
}
