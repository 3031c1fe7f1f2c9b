//! Two resources in one process, with files as disks, and an NBD client that knows just enough: what several tests drive.
#![allow(dead_code, reason = "each test program uses a part of it")]
use lockstep_replicator::core::config::{NetConfig, ResourceConfig, VolumeConfig};
use lockstep_replicator::core::event::AdminCommand;
use lockstep_replicator::core::state::{ConnState, DiskState};
use lockstep_replicator::frontend::nbd::{
    ExportDirectory, ExportInfo, ExportRefusal, ListedExport, RefusalKind, negotiate,
};
use lockstep_replicator::meta::MetaKind;
use lockstep_replicator::runtime::backing::create::{CreateOptions, Operator, create};
use lockstep_replicator::runtime::backing::{Backing, MetaDisk};
use lockstep_replicator::runtime::{ResourceHandle, RuntimeConfig};
use lockstep_replicator::units::VolumeNr;
use std::fs::File;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::net::UnixListener;

pub(crate) const VOLUME: VolumeNr = VolumeNr(0);
pub(crate) const DISK_BYTES: u64 = 32 << 20;
pub(crate) const LIMIT: Duration = Duration::from_secs(10);

/// One node and its disk.
pub(crate) struct Node {
    pub(crate) handle: ResourceHandle,
    pub(crate) disk: PathBuf,
    pub(crate) local: SocketAddr,
    pub(crate) peer: SocketAddr,
    pub(crate) id: u32,
}

/// Nobody to ask.
pub(crate) struct Silent;

impl Operator for Silent {
    fn say(&mut self, _text: &str) {}

    fn confirm(&mut self, _question: &str) -> bool {
        true
    }

    fn progress(&mut self, _done: u64, _total: u64) {}
}

pub(crate) fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

pub(crate) fn config(id: u32) -> ResourceConfig {
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
    pub(crate) fn start(dir: &Path, id: u32, addresses: [SocketAddr; 2]) -> Self {
        Self::start_with(dir, id, addresses, true)
    }

    pub(crate) fn start_with(dir: &Path, id: u32, addresses: [SocketAddr; 2], sums_blocks: bool) -> Self {
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

    pub(crate) fn launch(id: u32, local: SocketAddr, peer: SocketAddr, sums_blocks: bool) -> ResourceHandle {
        let mut runtime = RuntimeConfig::new(config(id), local, peer);
        runtime.buffer_bytes = 16 << 20;
        runtime.sums_blocks = sums_blocks;
        ResourceHandle::start(runtime, &tokio::runtime::Handle::current()).unwrap()
    }

    pub(crate) async fn attach(&self) {
        let (backing, attached) = Backing::open(&self.disk, &MetaDisk::Internal).unwrap();
        self.handle.attach(VOLUME, backing, attached).await.unwrap();
    }

    pub(crate) async fn connect(&self) {
        let command = AdminCommand::Connect { discard_my_data: false, tentative: false };
        self.handle.admin(command).await.unwrap();
    }

    pub(crate) async fn up(&self) {
        self.attach().await;
        self.connect().await;
    }

    pub(crate) async fn down(self) {
        let down = self.handle.admin(AdminCommand::Down);
        let Ok(done) = tokio::time::timeout(LIMIT, down).await else {
            panic!("node {} does not come down: {:#?}", self.id, self.handle.status().await);
        };
        done.unwrap();
        self.handle.stop().await;
    }

    pub(crate) async fn wait_for(
        &self,
        what: &str,
        condition: impl Fn(&Self, ConnState, DiskState, u64) -> bool,
    ) {
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

    pub(crate) async fn connected(&self) {
        self.wait_for("the connection", |_, conn, _, _| conn == ConnState::Connected).await;
    }

    pub(crate) async fn in_sync(&self) {
        self.wait_for("the resync", |_, conn, disk, dirty| {
            conn == ConnState::Connected && disk == DiskState::UpToDate && dirty == 0
        })
        .await;
    }

    /// What the volume holds.
    pub(crate) fn data(&self) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(DISK_BYTES - (1 << 20)).unwrap()];
        File::open(&self.disk).unwrap().read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }
}

/// The one volume as an export.
pub(crate) struct Exports(u64);

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
pub(crate) fn serve(handle: &ResourceHandle, socket: &Path) -> tokio::task::JoinHandle<()> {
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

pub(crate) async fn primary(node: &Node) {
    node.handle.admin(AdminCommand::Primary { force: true }).await.unwrap();
    let mut exports = node.handle.exports();
    tokio::time::timeout(LIMIT, exports.wait_for(|exports| exports.contains_key(&VOLUME)))
        .await
        .unwrap()
        .unwrap();
}

/// A client that knows just enough: newstyle with EXPORT_NAME, simple replies.
pub(crate) struct MiniClient {
    pub(crate) stream: std::os::unix::net::UnixStream,
}

impl MiniClient {
    pub(crate) fn connect(socket: &Path) -> Self {
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

    pub(crate) fn request(
        &mut self,
        command: u16,
        flags: u16,
        cookie: u64,
        offset: u64,
        length: u32,
        data: &[u8],
    ) {
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
    pub(crate) fn answer(&mut self) -> (u32, u64) {
        use std::io::Read;
        let mut head = [0; 16];
        self.stream.read_exact(&mut head).unwrap();
        assert_eq!(&head[..4], &0x6744_6698u32.to_be_bytes());
        (
            u32::from_be_bytes(head[4..8].try_into().unwrap()),
            u64::from_be_bytes(head[8..].try_into().unwrap()),
        )
    }

    pub(crate) fn data(&mut self, length: usize) -> Vec<u8> {
        use std::io::Read;
        let mut bytes = vec![0; length];
        self.stream.read_exact(&mut bytes).unwrap();
        bytes
    }
}
