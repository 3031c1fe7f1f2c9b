//! Two resources in one process, over loopback TCP, with files as disks and an NBD client on a unix socket.
#![cfg(feature = "runtime")]
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test: what fails, panics")]
mod pair;

use lockstep_replicator::core::state::ConnState;
use lockstep_replicator::frontend::nbd::wire::cmd;
use lockstep_replicator::runtime::{ResourceHandle, RuntimeConfig};
use pair::{LIMIT, MiniClient, Node, VOLUME, config, free_address, primary, serve};
use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

fn pattern(seed: u64, length: usize) -> Vec<u8> {
    (0..length as u64).map(|at| (seed.wrapping_mul(31).wrapping_add(at / 7 + at) % 251) as u8).collect()
}

/// `sums_blocks`: for each node, whether it sends blocks with a CRC.
async fn mirrored(dir: &Path, sums_blocks: [bool; 2]) {
    let addresses = [free_address(), free_address()];
    let [left, right] = [(0, sums_blocks[0]), (1, sums_blocks[1])]
        .map(|(id, sums)| Node::start_with(dir, id, addresses, sums));
    left.up().await;
    right.up().await;
    left.connected().await;
    right.connected().await;
    primary(&left).await;
    let socket = dir.join("nbd");
    let server = serve(&left.handle, &socket);
    left.in_sync().await;

    let path = socket.clone();
    tokio::task::spawn_blocking(move || {
        let mut client = MiniClient::connect(&path);
        // Many at once, small and large, out of order.
        for nr in 0..64u64 {
            client.request(cmd::WRITE, 0, nr, nr * 8192, 4096, &pattern(nr, 4096));
        }
        client.request(cmd::WRITE, 1, 64, 1 << 20, 1 << 20, &pattern(64, 1 << 20));
        client.request(cmd::WRITE, 0, 65, 4 << 20, 5 << 20, &pattern(65, 5 << 20));
        client.request(cmd::WRITE, 0, 66, 512, 512, &pattern(66, 512));
        let mut seen: Vec<u64> = (0..67)
            .map(|_| {
                let (errno, cookie) = client.answer();
                assert_eq!(errno, 0, "request {cookie}");
                cookie
            })
            .collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..67).collect::<Vec<_>>());
        client.request(cmd::WRITE_ZEROES, 0, 70, 1 << 20, 65536, &[]);
        assert_eq!(client.answer(), (0, 70));
        client.request(cmd::TRIM, 0, 71, 5 << 20, 1 << 20, &[]);
        assert_eq!(client.answer(), (0, 71));
        client.request(cmd::FLUSH, 0, 72, 0, 0, &[]);
        assert_eq!(client.answer(), (0, 72));
        client.request(cmd::READ, 0, 73, 1 << 20, 1 << 20, &[]);
        assert_eq!(client.answer(), (0, 73));
        let mut expected = pattern(64, 1 << 20);
        expected[..65536].fill(0);
        assert!(client.data(1 << 20) == expected);
        // Larger than a piece: cut, and put together again.
        client.request(cmd::READ, 0, 74, 4 << 20, 3 << 20, &[]);
        assert_eq!(client.answer(), (0, 74));
        let mut expected = pattern(65, 5 << 20);
        expected[1 << 20..2 << 20].fill(0);
        assert!(client.data(3 << 20) == expected[..3 << 20]);
        // Refused, and the stream stays in step: unaligned with data to skip, then behind the end.
        client.request(cmd::WRITE, 0, 75, 100, 1000, &[1; 1000]);
        assert_eq!(client.answer(), (22, 75));
        client.request(cmd::READ, 0, 76, 1 << 40, 512, &[]);
        assert_eq!(client.answer(), (22, 76));
        client.request(cmd::READ, 0, 77, 512, 512, &[]);
        assert_eq!(client.answer(), (0, 77));
        assert!(client.data(512) == pattern(66, 512));
        client.request(cmd::DISC, 0, 78, 0, 0, &[]);
    })
    .await
    .unwrap();
    left.in_sync().await;
    let (mine, theirs) = (left.data(), right.data());
    assert!(mine[8192..12288] == pattern(1, 4096)[..]);
    assert!(mine == theirs, "the two disks differ");
    server.abort();
    left.down().await;
    right.down().await;
}

#[tokio::test]
async fn writes_reach_both_disks_through_the_ring() {
    mirrored(tempfile::tempdir().unwrap().path(), [true; 2]).await;
}

/// `data-integrity-alg none` on both nodes, and on one: each says for itself what it sends.
#[tokio::test]
async fn writes_reach_both_disks_without_a_crc() {
    for sums_blocks in [[false, false], [false, true]] {
        mirrored(tempfile::tempdir().unwrap().path(), sums_blocks).await;
    }
}

#[tokio::test]
async fn writes_reach_both_disks_in_memory() {
    if !Path::new("/dev/shm").is_dir() {
        eprintln!("skipped: no tmpfs at /dev/shm");
        return;
    }
    mirrored(tempfile::tempdir_in("/dev/shm").unwrap().path(), [true; 2]).await;
}

#[tokio::test]
async fn a_peer_that_comes_back_is_taken_again() {
    let dir = tempfile::tempdir().unwrap();
    let addresses = [free_address(), free_address()];
    let [left, mut right] = [Node::start(dir.path(), 0, addresses), Node::start(dir.path(), 1, addresses)];
    left.up().await;
    right.up().await;
    left.connected().await;
    for _ in 0..2 {
        // Gone without a word, as after a crash of the process.
        right.handle.clone().stop().await;
        left.wait_for("the loss", |_, conn, _, _| conn != ConnState::Connected).await;
        right.handle = Node::launch(right.id, right.local, right.peer, true);
        right.up().await;
        left.connected().await;
        right.connected().await;
    }
    left.down().await;
    right.down().await;
}

#[tokio::test]
async fn clients_that_vanish_leave_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let addresses = [free_address(), free_address()];
    let left = Node::start(dir.path(), 0, addresses);
    left.up().await;
    primary(&left).await;
    let socket = dir.path().join("nbd");
    let server = serve(&left.handle, &socket);
    let path = socket.clone();
    tokio::task::spawn_blocking(move || {
        for round in 0..20u64 {
            let mut client = MiniClient::connect(&path);
            for nr in 0..8 {
                client.request(cmd::WRITE, 0, nr, nr << 16, 65536, &pattern(round, 65536));
                client.request(cmd::READ, 0, 100 + nr, nr << 16, 65536, &[]);
            }
            // In the middle of a write.
            client.request(cmd::WRITE, 0, 9, 0, 65536, &pattern(round, 10000));
        }
        let mut client = MiniClient::connect(&path);
        client.request(cmd::WRITE, 0, 1, 0, 65536, &pattern(5, 65536));
        assert_eq!(client.answer(), (0, 1));
        client.request(cmd::READ, 0, 2, 0, 65536, &[]);
        assert_eq!(client.answer(), (0, 2));
        assert!(client.data(65536) == pattern(5, 65536));
    })
    .await
    .unwrap();
    left.handle.kick_clients(VOLUME);
    let wait = async {
        while left.handle.status().await.unwrap().volumes[0].open_count > 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(LIMIT, wait).await.unwrap();
    server.abort();
    left.down().await;
}

#[tokio::test]
async fn an_address_in_use_is_named() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let runtime = RuntimeConfig::new(config(0), address, free_address());
    let error = ResourceHandle::start(runtime, &tokio::runtime::Handle::current()).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("resource web cannot listen on") && text.contains(&address.to_string()), "{text}");
}

/// What real clients do, where they are installed.
#[tokio::test]
async fn nbdcopy_in_and_out() {
    if Command::new("nbdcopy").arg("--version").output().is_err() {
        eprintln!("skipped: nbdcopy is not installed");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let addresses = [free_address(), free_address()];
    let [left, right] = [Node::start(dir.path(), 0, addresses), Node::start(dir.path(), 1, addresses)];
    left.up().await;
    right.up().await;
    left.connected().await;
    primary(&left).await;
    left.in_sync().await;
    let socket = dir.path().join("nbd");
    let server = serve(&left.handle, &socket);
    let (input, output) = (dir.path().join("in"), dir.path().join("out"));
    let size = left.handle.exports().borrow()[&VOLUME].bytes();
    let mut image = pattern(3, usize::try_from(size).unwrap());
    image[10 << 20..20 << 20].fill(0);
    fs::write(&input, &image).unwrap();
    let uri = format!("nbd+unix:///web/0?socket={}", socket.display());
    let (from, to) = (input.display().to_string(), output.display().to_string());
    tokio::task::spawn_blocking(move || {
        for arguments in [["--flush", from.as_str(), uri.as_str()], ["--flush", uri.as_str(), to.as_str()]] {
            let done = Command::new("nbdcopy").args(arguments).output().unwrap();
            assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        }
    })
    .await
    .unwrap();
    assert!(fs::read(&output).unwrap() == image);
    assert!(left.data() == right.data());
    server.abort();
    left.down().await;
    right.down().await;
}
