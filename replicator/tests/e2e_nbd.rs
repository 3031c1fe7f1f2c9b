//! Two real daemons on the loopback address, their disks in files, driven by the command, loaded through NBD.
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
#[path = "e2e/link.rs"]
#[allow(dead_code, reason = "shared with the stories of faults")]
mod link;
#[path = "../examples/demo/load.rs"]
#[allow(dead_code, reason = "shared with the demo")]
mod load;
#[path = "../examples/demo/nbd.rs"]
#[allow(dead_code, reason = "shared with the demo")]
mod nbd;
#[path = "../examples/demo/target.rs"]
#[allow(dead_code, reason = "shared with the demo")]
mod target;

use cluster::{Cluster, Options, RESOURCE, disk, number, peer};
use link::Link;
use load::{BLOCK, Load, Running, pause};
use nbd::NbdClient;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const PROGRAM: &str = env!("CARGO_BIN_EXE_lockstep");

fn pair(dir: &Path, protocol: char, disk_bytes: u64, ports: Option<[u16; 4]>) -> Cluster {
    let options = Options { protocol, disk_bytes, extra: String::new(), ports, ublk: false };
    let mut cluster = Cluster::new(dir, Path::new(PROGRAM), &options).unwrap();
    for node in 0..2 {
        cluster.create_md(node).unwrap();
        cluster.start(node).unwrap();
        cluster.must(node, ["up", RESOURCE]).unwrap();
    }
    connected(&cluster, 0, 30);
    cluster
}

fn connected(cluster: &Cluster, node: usize, seconds: u64) {
    cluster
        .wait(node, "the connection", seconds, |status| {
            status["connections"][0]["connection-state"] == "Connected"
        })
        .unwrap();
}

fn usable(cluster: &Cluster, node: usize) -> u64 {
    cluster.status(node).unwrap()["devices"][0]["size"].as_u64().unwrap() * 1024
}

/// The disks a test uses are in memory where that is possible: the host's disk is not what is tested.
fn scratch() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { tempfile::tempdir_in(memory).unwrap() } else { tempfile::tempdir().unwrap() }
}

/// A small deterministic generator for "when" and "who".
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % sides
    }
}

#[test]
fn a_secondary_refuses_clients_and_says_why() {
    let dir = scratch();
    let cluster = pair(dir.path(), 'C', 64 << 20, None);
    cluster.must(0, ["primary", "--force", RESOURCE]).unwrap();
    cluster.wait_in_sync(0, 60).unwrap();
    let refused = NbdClient::connect(&cluster.nbd_socket(1), RESOURCE).unwrap_err().to_string();
    assert!(refused.contains("Secondary") && refused.contains("alice"), "{refused}");
    // Nobody becomes Primary beside a Primary; the answer has DRBD's number, the facts and a way out.
    let output = cluster.run(1, ["primary", RESOURCE]).unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(11), "{text}");
    assert!(text.contains("(-1)") && text.contains("alice") && text.contains("secondary"), "{text}");
    // A Primary in use does not step down.
    let client = NbdClient::connect(&cluster.nbd_socket(0), RESOURCE).unwrap();
    let output = cluster.run(0, ["secondary", RESOURCE]).unwrap();
    assert!(String::from_utf8_lossy(&output.stderr).contains("(-12)"), "{output:?}");
    drop(client);
    let begun = Instant::now();
    while !cluster.run(0, ["secondary", RESOURCE]).unwrap().status.success() {
        assert!(
            begun.elapsed() < Duration::from_secs(10),
            "the device stays open after its only client left"
        );
        pause(Duration::from_millis(50));
    }
    cluster.must(1, ["primary", RESOURCE]).unwrap();
    for node in [1, 0] {
        cluster.must(node, ["down", RESOURCE]).unwrap();
    }
}

#[test]
fn a_full_resync_makes_both_disks_equal_whatever_was_on_them() {
    let dir = scratch();
    let options =
        Options { protocol: 'C', disk_bytes: 96 << 20, extra: String::new(), ports: None, ublk: false };
    let mut cluster = Cluster::new(dir.path(), Path::new(PROGRAM), &options).unwrap();
    for node in 0..2 {
        // Different bytes everywhere on the two disks.
        let data: Vec<u8> = (0..96_u64 << 20).map(|at| (at / 4096 * (node as u64 + 3) % 251) as u8).collect();
        std::fs::write(&cluster.nodes[node].disk, data).unwrap();
        cluster.create_md(node).unwrap();
        cluster.start(node).unwrap();
        cluster.must(node, ["up", RESOURCE]).unwrap();
    }
    connected(&cluster, 0, 30);
    cluster.must(0, ["primary", "--force", RESOURCE]).unwrap();
    cluster.wait_in_sync(0, 60).unwrap();
    cluster.wait_in_sync(1, 60).unwrap();
    assert_eq!(cluster.first_difference(usable(&cluster, 0)).unwrap(), None);
    // The other way round, by the operator's word.
    cluster.must(0, ["secondary", RESOURCE]).unwrap();
    cluster.must(0, ["invalidate", RESOURCE]).unwrap();
    cluster.wait_in_sync(0, 60).unwrap();
    assert_eq!(cluster.first_difference(usable(&cluster, 0)).unwrap(), None);
}

/// Bar 4: kill -9 of either daemon at random points under verified load.
fn killed_again_and_again(protocol: char, kills: usize, seed: u64) {
    println!("protocol {protocol}, {kills} kills, seed {seed}");
    let dir = scratch();
    let mut dice = Dice(seed);
    // 512 MiB, of which the load touches 48: a resync that copies much more did not use what it knew.
    let (area, first_block) = (48_u64 << 20, 1000);
    let mut cluster = pair(dir.path(), protocol, 512 << 20, None);
    cluster.must(0, ["primary", "--force", RESOURCE]).unwrap();
    cluster.wait_in_sync(0, 60).unwrap();
    let size = usable(&cluster, 0);
    let mut books = Load::new(first_block, usize::try_from(area).unwrap() / BLOCK, seed);
    let mut primary = 0;
    for kill in 0..kills {
        let running = Running::start(books, cluster.target(primary), 32);
        pause(Duration::from_millis(50 + dice.roll(400)));
        let secondary = 1 - primary;
        let victim_is_primary = dice.roll(2) == 0;
        let resynced_node;
        let mut failed_over = false;
        if victim_is_primary {
            cluster.kill(primary).unwrap();
            books = running.finish(false).0;
            let fail_over = dice.roll(3) != 0;
            if fail_over {
                cluster.must(secondary, ["primary", RESOURCE]).unwrap();
                books = checked(books, &cluster, secondary, protocol == 'A', kill);
                cluster.start(primary).unwrap();
                cluster.must(primary, ["up", RESOURCE]).unwrap();
                resynced_node = primary;
                primary = secondary;
                failed_over = true;
            } else {
                cluster.start(primary).unwrap();
                cluster.must(primary, ["up", RESOURCE]).unwrap();
                connected(&cluster, primary, 30);
                cluster.must(primary, ["primary", RESOURCE]).unwrap();
                // The process died, the machine did not: nothing acknowledged may be missing, whatever the protocol.
                books = checked(books, &cluster, primary, false, kill);
                resynced_node = secondary;
            }
        } else {
            cluster.kill(secondary).unwrap();
            pause(Duration::from_millis(dice.roll(300)));
            cluster.start(secondary).unwrap();
            cluster.must(secondary, ["up", RESOURCE]).unwrap();
            pause(Duration::from_millis(dice.roll(300)));
            let (back, result) = running.finish(true);
            result.unwrap_or_else(|error| {
                panic!("kill {kill}: the Primary's client saw the Secondary die: {error}")
            });
            books = back;
            resynced_node = secondary;
        }
        let status = cluster.wait_in_sync(resynced_node, 60).unwrap();
        cluster.wait_in_sync(1 - resynced_node, 60).unwrap();
        if failed_over {
            // It started anew in this round and no load ran since: what it received is what was resynced,
            // and that is at most what was dirty or hot: the load's area and the extents at its edges.
            let received = number(&status, "received") * 1024;
            let bound = area + (8 << 20);
            assert!(
                received <= bound,
                "kill {kill}: {received} bytes resynced, at most {bound} were dirty or hot"
            );
        }
        cluster.wait_arrived(primary, 20).unwrap();
        assert_eq!(cluster.first_difference(size).unwrap(), None, "kill {kill}: the disks differ");
        books = checked(books, &cluster, primary, false, kill);
    }
    println!("protocol {protocol}: {} writes acknowledged over {kills} kills", books.acked);
    assert!(books.acked > 1000, "the load did not run");
}

fn checked(mut books: Load, cluster: &Cluster, node: usize, acked_may_be_lost: bool, kill: usize) -> Load {
    let begun = Instant::now();
    let wrong = loop {
        match books.check(&cluster.target(node), acked_may_be_lost) {
            Ok(wrong) => break wrong,
            // The export appears a moment after the verb returned.
            Err(error) if begun.elapsed() > Duration::from_secs(10) => panic!("kill {kill}: {error}"),
            Err(_) => pause(Duration::from_millis(10)),
        }
    };
    assert!(wrong.is_empty(), "kill {kill}: {} wrong blocks, first: {}", wrong.len(), wrong[0]);
    books
}

#[test]
fn killed_twenty_times_protocol_a() {
    killed_again_and_again('A', 20, 0xA11CE);
}

#[test]
fn killed_twenty_times_protocol_b() {
    killed_again_and_again('B', 20, 0xB0B);
}

#[test]
fn killed_twenty_times_protocol_c() {
    killed_again_and_again('C', 20, 0xC0FFEE);
}

/// Bar 3: fio with verify while the link is cut and mended ten times.
#[test]
fn fio_verifies_while_the_link_is_cut_ten_times() {
    if Command::new("fio").arg("--version").stdout(Stdio::null()).status().is_err() {
        println!("skipped: fio is not installed");
        return;
    }
    let dir = scratch();
    let free = || std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let (a, b) = (free(), free());
    let link = Link::start([a, b]).unwrap();
    let cluster = pair(dir.path(), 'C', 256 << 20, Some([a, b, link.ports[0], link.ports[1]]));
    cluster.must(0, ["primary", "--force", RESOURCE]).unwrap();
    cluster.wait_in_sync(0, 60).unwrap();
    let report = dir.path().join("fio.json");
    let uri = format!("nbd+unix:///{RESOURCE}?socket={}", cluster.nbd_socket(0).display());
    let mut fio = Command::new("fio")
        .args([
            "--name=cut",
            "--ioengine=nbd",
            "--rw=randwrite",
            "--bsrange=4k-128k",
            "--iodepth=32",
            "--size=200M",
        ])
        .args([
            "--time_based",
            "--runtime=30",
            "--verify=crc32c",
            "--verify_backlog=512",
            "--verify_fatal=1",
            "--verify_state_save=0",
        ])
        .args(["--randrepeat=0", "--output-format=json"])
        .arg(format!("--uri={uri}"))
        .arg(format!("--output={}", report.display()))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let mut dice = Dice(77);
    for cut in 0..10 {
        pause(Duration::from_millis(700 + dice.roll(1200)));
        assert!(
            fio.try_wait().unwrap().is_none(),
            "fio ended before cut {cut}: {}",
            std::fs::read_to_string(&report).unwrap_or_default()
        );
        link.cut();
        pause(Duration::from_millis(dice.roll(900)));
        link.mend();
        connected(&cluster, 0, 30);
    }
    let status = fio.wait().unwrap();
    let text = std::fs::read_to_string(&report).unwrap();
    assert!(status.success(), "{status}: {text}");
    let json: serde_json::Value = serde_json::from_str(&text[text.find('{').unwrap()..]).unwrap();
    let job = &json["jobs"][0];
    assert_eq!(job["error"], 0, "{text}");
    println!(
        "fio: {} writes, {} reads verified, 10 cuts",
        job["write"]["total_ios"], job["read"]["total_ios"]
    );
    assert!(job["write"]["total_ios"].as_u64().unwrap() > 500);
    let status = cluster.wait_in_sync(1, 60).unwrap();
    assert_eq!((disk(&status), peer(&status, "replication-state")), ("UpToDate", "Established"));
    cluster.wait_in_sync(0, 60).unwrap();
    assert_eq!(cluster.first_difference(usable(&cluster, 0)).unwrap(), None);
}
