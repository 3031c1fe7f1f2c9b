//! Two resources in one process, over loopback TCP, with files as disks and an NBD client on a unix socket.
#![cfg(feature = "runtime")]
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test: what fails, panics")]
use lockstep_replicator::core::config::{NetConfig, ResourceConfig, VolumeConfig};
use lockstep_replicator::core::event::AdminCommand;
use lockstep_replicator::core::state::{ConnState, DiskState};
use lockstep_replicator::frontend::nbd::wire::cmd;
use lockstep_replicator::frontend::nbd::{
    ExportDirectory, ExportInfo, ExportRefusal, ListedExport, RefusalKind, negotiate,
};
use lockstep_replicator::meta::MetaKind;
use lockstep_replicator::runtime::backing::create::{CreateOptions, Operator, create};
use lockstep_replicator::runtime::backing::{Backing, MetaDisk};
use lockstep_replicator::runtime::{ResourceHandle, RuntimeConfig};
use lockstep_replicator::units::VolumeNr;
use std::fs::{self, File};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use tokio::net::UnixListener;

const VOLUME: VolumeNr = VolumeNr(0);
const DISK_BYTES: u64 = 32 << 20;
const LIMIT: Duration = Duration::from_secs(10);

/// One node and its disk.
struct Node {
    handle: ResourceHandle,
    disk: PathBuf,
    local: SocketAddr,
    peer: SocketAddr,
    id: u32,
}

/// Nobody to ask.
struct Silent;

impl Operator for Silent {
    fn say(&mut self, _text: &str) {}

    fn confirm(&mut self, _question: &str) -> bool {
        true
    }

    fn progress(&mut self, _done: u64, _total: u64) {}
}

fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

fn config(id: u32) -> ResourceConfig {
    let name = |id| format!("node{id}");
    let net = NetConfig { connect_int_ms: 1000, ..NetConfig::default() };
    ResourceConfig {
        name: "web".into(),
        node_id: id,
        node_name: name(id),
        peer_node_id: 1 - id,
        peer_name: name(1 - id),
        net,
        volumes: vec![VolumeConfig::new(VOLUME)],
        options: lockstep_replicator::core::config::ResourceOptions::default(),
    }
}

impl Node {
    fn start(dir: &Path, id: u32, addresses: [SocketAddr; 2]) -> Self {
        Self::start_with(dir, id, addresses, true)
    }

    fn start_with(dir: &Path, id: u32, addresses: [SocketAddr; 2], sums_blocks: bool) -> Self {
        // Only what RUST_LOG asks for; a second test finds it set up already.
        let logging = tracing_subscriber::fmt()
            .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
            .with_test_writer()
            .try_init();
        drop(logging);
        let disk = dir.join(format!("disk{id}"));
        File::create(&disk).unwrap().set_len(DISK_BYTES).unwrap();
        let options = CreateOptions { force: true, ..CreateOptions::default() };
        create(&disk, MetaKind::Internal, None, &options, &mut Silent).unwrap();
        let [local, peer] = if id == 0 { addresses } else { [addresses[1], addresses[0]] };
        Self { handle: Self::launch(id, local, peer, sums_blocks), disk, local, peer, id }
    }

    fn launch(id: u32, local: SocketAddr, peer: SocketAddr, sums_blocks: bool) -> ResourceHandle {
        let mut runtime = RuntimeConfig::new(config(id), local, peer);
        runtime.buffer_bytes = 16 << 20;
        runtime.sums_blocks = sums_blocks;
        ResourceHandle::start(runtime, &tokio::runtime::Handle::current()).unwrap()
    }

    async fn attach(&self) {
        let (backing, attached) = Backing::open(&self.disk, &MetaDisk::Internal).unwrap();
        self.handle.attach(VOLUME, backing, attached).await.unwrap();
    }

    async fn connect(&self) {
        let command = AdminCommand::Connect { discard_my_data: false, tentative: false };
        self.handle.admin(command).await.unwrap();
    }

    async fn up(&self) {
        self.attach().await;
        self.connect().await;
    }

    async fn down(self) {
        let down = self.handle.admin(AdminCommand::Down);
        let Ok(done) = tokio::time::timeout(LIMIT, down).await else {
            panic!("node {} does not come down: {:#?}", self.id, self.handle.status().await);
        };
        done.unwrap();
        self.handle.stop().await;
    }

    async fn wait_for(&self, what: &str, condition: impl Fn(&Self, ConnState, DiskState, u64) -> bool) {
        let wait = async {
            loop {
                let status = self.handle.status().await.unwrap();
                let disk = status.volumes.first().map_or(DiskState::Diskless, |volume| volume.disk);
                let dirty = status.connection.peer_volumes.first().map_or(0, |volume| volume.out_of_sync_kib);
                if condition(self, status.connection.connection, disk, dirty) {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        if tokio::time::timeout(LIMIT, wait).await.is_err() {
            panic!("node {} waits for {what}: {:#?}", self.id, self.handle.status().await);
        }
    }

    async fn connected(&self) {
        self.wait_for("the connection", |_, conn, _, _| conn == ConnState::Connected).await;
    }

    async fn in_sync(&self) {
        self.wait_for("the resync", |_, conn, disk, dirty| {
            conn == ConnState::Connected && disk == DiskState::UpToDate && dirty == 0
        })
        .await;
    }

    /// What the volume holds.
    fn data(&self) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(DISK_BYTES - (1 << 20)).unwrap()];
        File::open(&self.disk).unwrap().read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }
}

/// The one volume as an export.
struct Exports(u64);

impl ExportDirectory for Exports {
    fn list(&self) -> Vec<ListedExport> {
        vec![ListedExport { name: "web/0".into(), description: String::new() }]
    }

    fn lookup(&self, name: &str) -> Result<ExportInfo, ExportRefusal> {
        match name {
            "web/0" => Ok(ExportInfo::volume(self.0, 512)),
            _ => Err(ExportRefusal::new(RefusalKind::Unknown, "no such export")),
        }
    }
}

/// Serves NBD on a unix socket until aborted.
fn serve(handle: &ResourceHandle, socket: &Path) -> tokio::task::JoinHandle<()> {
    let listener = UnixListener::bind(socket).unwrap();
    let handle = handle.clone();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let size = handle.exports().borrow().get(&VOLUME).map_or(0, |size| size.bytes());
            let Ok(negotiated) = negotiate(&mut stream, &Exports(size), Duration::from_secs(5)).await else {
                continue;
            };
            handle.add_nbd_client(VOLUME, stream.into_std().unwrap().into(), negotiated).unwrap();
        }
    })
}

async fn primary(node: &Node) {
    node.handle.admin(AdminCommand::Primary { force: true }).await.unwrap();
    let mut exports = node.handle.exports();
    tokio::time::timeout(LIMIT, exports.wait_for(|exports| exports.contains_key(&VOLUME)))
        .await
        .unwrap()
        .unwrap();
}

/// A client that knows just enough: newstyle with EXPORT_NAME, simple replies.
struct MiniClient {
    stream: std::os::unix::net::UnixStream,
}

impl MiniClient {
    fn connect(socket: &Path) -> Self {
        use std::io::{Read, Write};
        let mut stream = std::os::unix::net::UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting).unwrap();
        stream.write_all(&3u32.to_be_bytes()).unwrap();
        stream.write_all(b"IHAVEOPT\0\0\0\x01\0\0\0\x05web/0").unwrap();
        let mut export = [0; 10];
        stream.read_exact(&mut export).unwrap();
        Self { stream }
    }

    fn request(&mut self, command: u16, flags: u16, cookie: u64, offset: u64, length: u32, data: &[u8]) {
        use std::io::Write;
        let mut bytes = 0x2560_9513u32.to_be_bytes().to_vec();
        bytes.extend_from_slice(&flags.to_be_bytes());
        bytes.extend_from_slice(&command.to_be_bytes());
        bytes.extend_from_slice(&cookie.to_be_bytes());
        bytes.extend_from_slice(&offset.to_be_bytes());
        bytes.extend_from_slice(&length.to_be_bytes());
        bytes.extend_from_slice(data);
        self.stream.write_all(&bytes).unwrap();
    }

    /// Error number and cookie of the next answer.
    fn answer(&mut self) -> (u32, u64) {
        use std::io::Read;
        let mut head = [0; 16];
        self.stream.read_exact(&mut head).unwrap();
        assert_eq!(&head[..4], &0x6744_6698u32.to_be_bytes());
        (
            u32::from_be_bytes(head[4..8].try_into().unwrap()),
            u64::from_be_bytes(head[8..].try_into().unwrap()),
        )
    }

    fn data(&mut self, length: usize) -> Vec<u8> {
        use std::io::Read;
        let mut bytes = vec![0; length];
        self.stream.read_exact(&mut bytes).unwrap();
        bytes
    }
}

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
