//! A disk that throws writes away and reads zeros: the cost of the front end alone.
//!
//! `null [SIZE_MIB [deferred]]`; runs until standard input ends. Needs root and `modprobe ublk_drv`.
#![allow(clippy::print_stdout, reason = "an example talks to its user")]

use std::error::Error;
use std::io::{self, Read};
use std::process::ExitCode;

use lockstep_ublk_frontend::{DeviceConfig, IoFailure, IoRequest, Op, sweep_dead_devices};
use support::{Backend, RingKind, Running};

mod support;

#[derive(Debug)]
struct Null;

impl Backend for Null {
    fn handle(&mut self, request: &IoRequest, data: &mut [u8]) -> Result<(), IoFailure> {
        if request.op == Op::Read {
            data.fill(0);
        }
        Ok(())
    }
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("null: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let size_mib: u64 = args.next().map_or(Ok(1024), |text| text.parse())?;
    let kind = if args.next().as_deref() == Some("deferred") { RingKind::Deferred } else { RingKind::Plain };
    sweep_dead_devices()?;
    let running = Running::start(DeviceConfig::new(size_mib << 20), kind, Null)?;
    println!("ready {}", running.device().block_path().display());
    io::stdin().read_to_end(&mut Vec::new())?;
    running.finish()?;
    println!("deleted");
    Ok(())
}
