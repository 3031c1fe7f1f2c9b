//! Programs that we did not write, on a mirrored disk served by a real daemon over NBD.
#![cfg(feature = "runtime")]
#![allow(
    clippy::print_stdout,
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::cast_possible_truncation,
    reason = "tests in real time: they end where something is not as it should be, and say why they skip"
)]
#[path = "../examples/demo/cluster.rs"]
#[allow(dead_code, reason = "shared with the demo")]
mod cluster;
#[path = "../examples/demo/load.rs"]
#[allow(dead_code, reason = "shared with the demo")]
mod load;
#[path = "../examples/demo/nbd.rs"]
#[allow(dead_code, reason = "shared with the demo")]
mod nbd;
#[path = "../examples/demo/target.rs"]
#[allow(dead_code, reason = "shared with the demo")]
mod target;

use cluster::{Cluster, Options, RESOURCE};
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};

/// Whether the program is here; says so when it is not.
fn have(program: &str) -> bool {
    let found =
        Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok();
    if !found {
        println!("skipped: {program} is not installed");
    }
    found
}

fn run(program: &str, args: &[&str]) -> Output {
    let output = Command::new(program).args(args).stdin(Stdio::null()).output().unwrap();
    assert!(
        output.status.success(),
        "{program} {args:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

/// A connected pair in sync, alice Primary.
fn pair(dir: &Path) -> Cluster {
    let options =
        Options { protocol: 'C', disk_bytes: 128 << 20, extra: String::new(), ports: None, ublk: false };
    let mut cluster = Cluster::new(dir, Path::new(env!("CARGO_BIN_EXE_lockstep")), &options).unwrap();
    for node in 0..2 {
        cluster.create_md(node).unwrap();
        cluster.start(node).unwrap();
        cluster.must(node, ["up", RESOURCE]).unwrap();
    }
    cluster
        .wait(0, "the connection", 30, |s| s["connections"][0]["connection-state"] == "Connected")
        .unwrap();
    cluster.must(0, ["primary", "--force", RESOURCE]).unwrap();
    cluster.wait_in_sync(0, 60).unwrap();
    cluster
}

fn uri(cluster: &Cluster, node: usize) -> String {
    format!("nbd+unix:///{RESOURCE}?socket={}", cluster.nbd_socket(node).display())
}

fn both_equal(cluster: &Cluster) {
    cluster.wait_in_sync(0, 60).unwrap();
    let size = cluster.status(0).unwrap()["devices"][0]["size"].as_u64().unwrap() * 1024;
    assert_eq!(cluster.first_difference(size).unwrap(), None);
}

#[test]
fn libnbd_programs_inform_and_copy() {
    if !have("nbdinfo") || !have("nbdcopy") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let cluster = pair(dir.path());
    let size = cluster.status(0).unwrap()["devices"][0]["size"].as_u64().unwrap() * 1024;
    let info = run("nbdinfo", &["--json", &uri(&cluster, 0)]);
    let info: serde_json::Value = serde_json::from_slice(&info.stdout).unwrap();
    let export = &info["exports"][0];
    assert_eq!(export["export-size"], size);
    for ability in ["can_flush", "can_fua", "can_trim", "can_zero", "can_multi_conn"] {
        assert_eq!(export[ability], true, "{ability}: {export:#}");
    }
    assert_eq!(export["block_size_minimum"], 512, "{export:#}");
    run("nbdinfo", &["--map", &uri(&cluster, 0)]);
    // In and out again, over several connections.
    let image = dir.path().join("image");
    let bytes: Vec<u8> = (0..size).map(|at| (at / 512 * 7 % 253) as u8).collect();
    std::fs::write(&image, &bytes).unwrap();
    run("nbdcopy", &["--connections=4", "--flush", image.to_str().unwrap(), &uri(&cluster, 0)]);
    let copy = dir.path().join("copy");
    run("nbdcopy", &[&uri(&cluster, 0), copy.to_str().unwrap()]);
    assert!(std::fs::read(&copy).unwrap() == bytes, "nbdcopy got other bytes back");
    both_equal(&cluster);
}

#[test]
fn qemu_programs_convert_compare_and_check() {
    if !have("qemu-img") || !have("qemu-io") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let cluster = pair(dir.path());
    let to = uri(&cluster, 0);
    // A qcow2 image stored on the mirrored disk, filled from a raw one, checked and compared there.
    let raw = dir.path().join("raw");
    let bytes: Vec<u8> = (0..32_u32 << 20).map(|at| (at / 4096 % 3 * (at / 997)) as u8).collect();
    std::fs::write(&raw, &bytes).unwrap();
    let raw = raw.to_str().unwrap();
    run("qemu-img", &["create", "-q", "-f", "qcow2", &to, "64M"]);
    run("qemu-img", &["convert", "-n", "-f", "raw", "-O", "qcow2", raw, &to]);
    run("qemu-img", &["check", "-f", "qcow2", &to]);
    run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", raw, &to]);
    // Patterns, zeroes, discards.
    let script = "write -P 0x5a 100M 1M; write -f -P 0xa5 101M 64k; write -z -u 100M 256k; discard 100M 64k; flush; \
                  read -P 0 100M 256k; read -P 0x5a 102656k 700k; read -P 0xa5 101M 64k";
    let mut args = vec!["-f", "raw"];
    for command in script.split("; ") {
        args.extend(["-c", command.trim()]);
    }
    args.push(&to);
    let output = run("qemu-io", &args);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(!text.contains("Pattern verification failed") && !text.contains("error"), "{text}");
    both_equal(&cluster);
    // Afterwards the same image is on the other node.
    cluster.must(0, ["secondary", RESOURCE]).unwrap();
    cluster.must(1, ["primary", RESOURCE]).unwrap();
    run("qemu-img", &["check", "-f", "qcow2", &uri(&cluster, 1)]);
    run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", raw, &uri(&cluster, 1)]);
}

#[test]
fn a_virtual_machine_reads_its_disk_from_it() {
    if !have("qemu-system-x86_64") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let cluster = pair(dir.path());
    // A boot sector that prints one letter on the serial line and turns the machine off through the debug exit port.
    let mut sector = vec![0_u8; 512];
    let code = [0xba, 0xf8, 0x03, 0xb0, b'L', 0xee, 0xba, 0x01, 0x05, 0xb0, 0x10, 0xee, 0xf4];
    sector[..code.len()].copy_from_slice(&code);
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    target::Target::Nbd { socket: cluster.nbd_socket(0), export: RESOURCE.into() }
        .open()
        .unwrap()
        .write_and_flush(0, &sector)
        .unwrap();
    let serial = dir.path().join("serial");
    let mut machine = Command::new("qemu-system-x86_64")
        .args(["-display", "none", "-m", "32", "-no-reboot", "-net", "none", "-monitor", "stdio"])
        .args(["-device", "isa-debug-exit,iobase=0x501,iosize=1"])
        .args(["-serial", &format!("file:{}", serial.display())])
        .args(["-drive", &format!("file={},format=raw,if=ide", uri(&cluster, 0))])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let begun = cluster::now();
    let status = loop {
        if let Some(status) = machine.try_wait().unwrap() {
            break status;
        }
        if begun.elapsed().as_secs() > 90 {
            let _quit = machine.stdin.as_mut().unwrap().write_all(b"quit\n");
            machine.kill().unwrap();
            panic!("the machine did not boot from the mirrored disk");
        }
        load::pause(std::time::Duration::from_millis(50));
    };
    // isa-debug-exit: (value << 1) | 1.
    assert_eq!(status.code(), Some(0x21), "{status}");
    assert_eq!(std::fs::read(&serial).unwrap(), b"L");
}
