//! A real device, where the driver is there and we may use it: data, discard, life cycle.
#![expect(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a test; helpers outside of test functions fail it too"
)]

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;

use lockstep_ublk_frontend::{Device, DeviceConfig, sweep_dead_devices};
use ram_disk::RamDisk;
use support::{RingKind, Running};

#[path = "../examples/support/ram_disk.rs"]
mod ram_disk;
#[path = "../examples/support/mod.rs"]
mod support;

const SIZE_BYTES: u64 = 64 << 20;

/// Whether the tests can run; says why not.
fn driver_is_there() -> bool {
    match sweep_dead_devices() {
        Ok(_) => true,
        Err(error) => {
            println!("skipped: {error}");
            false
        }
    }
}

fn start(kind: RingKind) -> Running {
    let disk = RamDisk::new(usize::try_from(SIZE_BYTES).unwrap());
    Running::start(DeviceConfig::new(SIZE_BYTES), kind, disk).unwrap()
}

fn queue_attribute(device: &Device, name: &str) -> String {
    let path = format!("/sys/block/ublkb{}/queue/{name}", device.id());
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}")).trim().to_owned()
}

/// Bytes that differ from sector to sector and from seed to seed.
fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed | 1;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            state.to_le_bytes()[7]
        })
        .collect()
}

/// Opens the device. The last close of a block device drops its clean pages, so reads after a new open come from the disk.
fn reopen(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).open(path).unwrap()
}

#[test]
fn data_survives_and_the_device_goes_away() {
    if !driver_is_there() {
        return;
    }
    for kind in [RingKind::Plain, RingKind::Deferred] {
        check_data(kind);
    }
}

fn check_data(kind: RingKind) {
    let running = start(kind);
    let path = running.device().block_path();
    let char_path = format!("/dev/ublkc{}", running.device().id());
    assert!(std::fs::metadata(&path).unwrap().file_type().is_block_device());

    let chunks: Vec<(u64, Vec<u8>)> =
        [(0, 4096), (8192, 512 << 10), (1 << 20, 3 << 20), (SIZE_BYTES - 4096, 4096)]
            .into_iter()
            .map(|(offset, len)| (offset, pattern(offset + 7, len)))
            .collect();
    let file = reopen(&path);
    for (offset, data) in &chunks {
        file.write_all_at(data, *offset).unwrap();
    }
    file.sync_all().unwrap();
    drop(file);

    let file = reopen(&path);
    for (offset, data) in &chunks {
        let mut back = vec![0; data.len()];
        file.read_exact_at(&mut back, *offset).unwrap();
        assert!(back == *data, "data at {offset} came back different");
    }
    drop(file);

    running.finish().unwrap();
    assert!(!path.exists());
    assert!(!Path::new(&char_path).exists());
}

#[test]
fn the_kernel_sees_the_advertised_limits() {
    if !driver_is_there() {
        return;
    }
    let running = start(RingKind::Plain);
    let device = running.device();
    assert_eq!(queue_attribute(device, "write_cache"), "write back");
    assert_eq!(queue_attribute(device, "fua"), "1");
    assert_eq!(queue_attribute(device, "logical_block_size"), "512");
    assert_eq!(queue_attribute(device, "physical_block_size"), "4096");
    assert_eq!(queue_attribute(device, "max_hw_sectors_kb"), "512");
    assert_eq!(queue_attribute(device, "discard_granularity"), "4096");
    assert_eq!(queue_attribute(device, "discard_max_bytes"), "4294963200");
    assert_eq!(queue_attribute(device, "write_zeroes_max_bytes"), "4294963200");
    running.finish().unwrap();
}

#[test]
fn a_device_that_is_never_started_leaves_nothing() {
    if !driver_is_there() {
        return;
    }
    let (device, queue) = Device::add(DeviceConfig::new(SIZE_BYTES)).unwrap();
    let char_path = format!("/dev/ublkc{}", device.id());
    assert!(Path::new(&char_path).exists());
    assert!(queue.is_drained());
    drop(queue);
    device.delete().unwrap();
    assert!(!Path::new(&char_path).exists());
}

#[test]
fn a_running_device_is_not_swept() {
    if !driver_is_there() {
        return;
    }
    let running = start(RingKind::Plain);
    assert_eq!(sweep_dead_devices().unwrap(), 0);
    assert!(running.device().block_path().exists());
    running.finish().unwrap();
}

#[test]
fn an_exclusive_holder_is_seen() {
    if !driver_is_there() {
        return;
    }
    let running = start(RingKind::Plain);
    let device = running.device();
    assert!(!device.is_held().unwrap());
    let exclusive = nix::fcntl::OFlag::O_EXCL.bits();
    let holder = OpenOptions::new().read(true).custom_flags(exclusive).open(device.block_path()).unwrap();
    assert!(device.is_held().unwrap());
    drop(holder);
    assert!(!device.is_held().unwrap());
    running.finish().unwrap();
}
