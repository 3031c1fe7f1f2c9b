//! The NBD codec against programs written by others: libnbd's tools, QEMU's tools, fio. Each test starts
//! the example's server on its own thread. A client that is not installed is skipped with a line.
#![cfg(feature = "runtime")]
#![expect(clippy::unwrap_used, reason = "the helpers of a test fail it by a panic")]
#[path = "../examples/nbd_ram/server.rs"]
mod server;

use lockstep_replicator::frontend::nbd::transmission::WireRequest;
use lockstep_replicator::frontend::nbd::wire::{MAX_DATA_BYTES, cmd};
use lockstep_replicator::frontend::nbd::{ExportInfo, ExportRefusal, RefusalKind};
use server::RamExports;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::JoinHandle;
use tempfile::TempDir;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 64 * MIB;
const REFUSAL: &str = "mail/0 is Secondary on nodo2; nodo1 is Primary. To use it here: lockstep primary mail";

/// A running server with `web-root/0` (512-byte blocks), `big-blocks/0` (4096), `frozen/0`
/// (read-only) and the Secondary `mail/0`, on a unix socket and on TCP.
struct Server {
    dir: TempDir,
    tcp: SocketAddr,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    fn start() -> Self {
        let mut exports = RamExports::default();
        let described = |block| ExportInfo { description: "files".into(), ..ExportInfo::volume(SIZE, block) };
        exports.add("web-root/0", described(512)).unwrap();
        exports.add("big-blocks/0", described(4096)).unwrap();
        exports.add("frozen/0", ExportInfo { read_only: true, ..described(512) }).unwrap();
        exports.add_refused("mail/0", ExportRefusal::new(RefusalKind::Policy, REFUSAL));
        let exports = Arc::new(exports);

        let dir = TempDir::new().unwrap();
        let socket = dir.path().join("nbd.sock");
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let (ready, is_ready) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let tcp = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
                let address = tcp.local_addr().unwrap();
                let announce = async {
                    // The unix listener is polled, and so bound, before this branch.
                    ready.send(address).unwrap();
                    std::future::pending::<()>().await;
                };
                tokio::select! {
                    biased;
                    _ = stopped => {}
                    result = server::serve_unix(&socket, Arc::clone(&exports)) => panic!("{result:?}"),
                    result = server::serve_tcp(tcp, exports) => panic!("{result:?}"),
                    () = announce => {}
                }
            });
        });
        let tcp = is_ready.recv().unwrap();
        Self { dir, tcp, stop: Some(stop), thread: Some(thread) }
    }

    fn unix(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.dir.path().join("nbd.sock").display())
    }

    fn tcp(&self, export: &str) -> String {
        format!("nbd://{}/{export}", self.tcp)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.stop.take());
        let joined = self.thread.take().map(JoinHandle::join);
        assert!(std::thread::panicking() || matches!(joined, Some(Ok(()))), "the server panicked");
    }
}

/// Whether every one of these programs can be started; says which cannot.
fn installed(programs: &[&str]) -> bool {
    programs.iter().all(|program| {
        let found = Command::new(program).arg("--version").output().is_ok();
        if !found {
            eprintln!("skipped: {program} is not installed");
        }
        found
    })
}

fn output(program: &str, arguments: &[&str]) -> Output {
    Command::new(program).args(arguments).output().unwrap()
}

/// Runs a program that must succeed; answers what it printed.
#[track_caller]
fn run(program: &str, arguments: &[&str]) -> String {
    let output = output(program, arguments);
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{program} {arguments:?}: {}\n{stdout}{stderr}", output.status);
    stdout.into_owned()
}

/// qemu-io answers 0 even when a pattern does not match: its text tells.
#[track_caller]
fn qemu_io(uri: &str, commands: &[&str]) -> String {
    qemu_io_as("raw", uri, commands)
}

#[track_caller]
fn qemu_io_as(format: &str, uri: &str, commands: &[&str]) -> String {
    let mut arguments = vec!["-f", format, uri];
    for command in commands {
        arguments.extend(["-c", command]);
    }
    let text = run("qemu-io", &arguments);
    for bad in ["failed", "Pattern verification", "error"] {
        assert!(!text.contains(bad), "qemu-io {commands:?}: {text}");
    }
    text
}

/// 24 MiB that compress badly, with 8 MiB of hole in the middle, as long as the export.
fn image(path: &Path) {
    use std::os::unix::fs::FileExt;
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut block = Vec::new();
    for _ in 0..(12 * MIB / 8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        block.extend_from_slice(&state.to_le_bytes());
    }
    let file = fs::File::create(path).unwrap();
    file.set_len(SIZE).unwrap();
    file.write_all_at(&block, 0).unwrap();
    file.write_all_at(&block, 20 * MIB).unwrap();
}

/// A client that negotiates the least: the old option, no structured replies, no block sizes.
struct PlainClient(UnixStream);

impl PlainClient {
    fn connect(server: &Server, export: &str) -> Self {
        let mut stream = UnixStream::connect(server.path("nbd.sock")).unwrap();
        stream.read_exact(&mut [0; 18]).unwrap();
        stream.write_all(&3u32.to_be_bytes()).unwrap();
        stream.write_all(b"IHAVEOPT\0\0\0\x01").unwrap();
        stream.write_all(&u32::try_from(export.len()).unwrap().to_be_bytes()).unwrap();
        stream.write_all(export.as_bytes()).unwrap();
        let mut described = [0; 10];
        stream.read_exact(&mut described).unwrap();
        assert_eq!(described[..8], SIZE.to_be_bytes());
        Self(stream)
    }

    fn send(&mut self, command: u16, offset: u64, length: u32, payload: &[u8]) {
        let request = WireRequest { flags: 0, command, cookie: offset ^ 0x55, offset, length };
        self.0.write_all(&request.encode()).unwrap();
        self.0.write_all(payload).unwrap();
    }

    /// The error number of the next answer, which must belong to the request at `offset`.
    fn answer(&mut self, offset: u64) -> u32 {
        let mut head = [0; 16];
        self.0.read_exact(&mut head).unwrap();
        assert_eq!(head[..4], [0x67, 0x44, 0x66, 0x98]);
        assert_eq!(head[8..], (offset ^ 0x55).to_be_bytes());
        u32::from_be_bytes(head[4..8].try_into().unwrap())
    }
}

#[test]
fn a_plain_client_may_send_long_requests_and_survives_its_mistakes() {
    let server = Server::start();
    let mut client = PlainClient::connect(&server, "web-root/0");
    let long: Vec<u8> = (0..MAX_DATA_BYTES).map(|at| (at / 4096 % 251) as u8).collect();
    client.send(cmd::WRITE, 512, MAX_DATA_BYTES, &long);
    assert_eq!(client.answer(512), 0);
    // Refused writes: their data is skipped and the next request is understood.
    client.send(cmd::WRITE, SIZE - 512, 1024, &[1; 1024]);
    client.send(cmd::WRITE, 100, 512, &[1; 512]);
    client.send(cmd::BLOCK_STATUS, 0, 512, &[]);
    client.send(99, 1024, 512, &[]);
    client.send(cmd::READ, 512, MAX_DATA_BYTES, &[]);
    assert_eq!(client.answer(SIZE - 512), 28);
    assert_eq!(client.answer(100), 22);
    assert_eq!(client.answer(0), 22);
    assert_eq!(client.answer(1024), 22);
    assert_eq!(client.answer(512), 0);
    let mut back = vec![0; long.len()];
    client.0.read_exact(&mut back).unwrap();
    assert!(back == long);
    // More than 32 MiB at once is not worth reading: the server hangs up.
    client.send(cmd::WRITE, 0, MAX_DATA_BYTES + 512, &[]);
    assert_eq!(client.0.read(&mut [0; 1]).unwrap(), 0);
}

#[test]
fn nbdinfo_sees_what_is_offered() {
    if !installed(&["nbdinfo"]) {
        return;
    }
    let server = Server::start();
    for uri in [server.unix("web-root/0"), server.tcp("web-root/0")] {
        assert_eq!(run("nbdinfo", &["--size", &uri]).trim(), SIZE.to_string());
        let json: serde_json::Value = serde_json::from_str(&run("nbdinfo", &["--json", &uri])).unwrap();
        assert_eq!(json["protocol"], "newstyle-fixed");
        assert_eq!(json["structured"], true);
        let export = &json["exports"][0];
        assert_eq!(export["export-name"], "web-root/0");
        assert_eq!(export["description"], "files");
        assert_eq!(export["contexts"], serde_json::json!(["base:allocation"]));
        for can in ["can_df", "can_flush", "can_fua", "can_multi_conn", "can_trim", "can_zero"] {
            assert_eq!(export[can], true, "{can}");
        }
        for cannot in ["is_read_only", "can_cache", "can_fast_zero", "is_rotational"] {
            assert_eq!(export[cannot], false, "{cannot}");
        }
        let sizes = ["minimum", "preferred", "maximum"].map(|which| &export[format!("block_size_{which}")]);
        assert_eq!(sizes, [512, 4096, 1 << 20]);
    }
    let frozen = server.unix("frozen/0");
    run("nbdinfo", &["--is", "read-only", &frozen]);
    assert!(!output("nbdinfo", &["--can", "trim", &frozen]).status.success());
}

#[test]
fn nbdinfo_lists_what_is_primary_and_no_more() {
    if !installed(&["nbdinfo"]) {
        return;
    }
    let server = Server::start();
    let text = run("nbdinfo", &["--list", "--json", &server.unix("")]);
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let names: Vec<&str> =
        json["exports"].as_array().unwrap().iter().map(|e| e["export-name"].as_str().unwrap()).collect();
    assert_eq!(names, ["big-blocks/0", "frozen/0", "web-root/0"]);
}

#[test]
fn a_secondary_tells_the_clients_user_why() {
    let server = Server::start();
    if installed(&["qemu-img"]) {
        let refused = output("qemu-img", &["info", &server.unix("mail/0")]);
        let text = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(!refused.status.success() && text.contains(REFUSAL), "{text}");
    }
    if installed(&["nbdinfo"]) {
        // libnbd shows the server's text in its debug output only.
        let uri = server.tcp("mail/0");
        let refused = Command::new("nbdinfo").env("LIBNBD_DEBUG", "1").arg(uri).output().unwrap();
        let text = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(!refused.status.success() && text.contains(REFUSAL), "{text}");
        assert!(!output("nbdinfo", &[&server.tcp("nope/0")]).status.success());
        // Three exports: there is no default one.
        assert!(!output("nbdinfo", &[&server.tcp("")]).status.success());
    }
}

#[test]
fn nbdcopy_there_and_back() {
    if !installed(&["nbdcopy", "nbdinfo"]) {
        return;
    }
    let server = Server::start();
    let (source, back) = (server.path("source"), server.path("back"));
    image(&source);
    for uri in [server.unix("web-root/0"), server.tcp("big-blocks/0")] {
        run("nbdcopy", &["--flush", "--connections=4", source.to_str().unwrap(), &uri]);
        run("nbdcopy", &["--connections=4", &uri, back.to_str().unwrap()]);
        assert!(fs::read(&source).unwrap() == fs::read(&back).unwrap(), "{uri} gave back something else");
        let map: serde_json::Value =
            serde_json::from_str(&run("nbdinfo", &["--map", "--json", &uri])).unwrap();
        let extents: Vec<(u64, u64, u64)> = map
            .as_array()
            .unwrap()
            .iter()
            .map(|extent| {
                let field = |name: &str| extent[name].as_u64().unwrap();
                (field("offset") / MIB, field("length") / MIB, field("type"))
            })
            .collect();
        assert_eq!(extents, [(0, 12, 0), (12, 8, 3), (20, 12, 0), (32, 32, 3)]);
    }
    // From one export to another, both ends being this server.
    let (from, to) = (server.unix("web-root/0"), server.tcp("big-blocks/0"));
    run("nbdcopy", &["--allocated", &from, &to]);
    run("nbdcopy", &[&to, back.to_str().unwrap()]);
    assert!(fs::read(&source).unwrap() == fs::read(&back).unwrap());
}

#[test]
fn qemu_img_converts_compares_and_checks() {
    if !installed(&["qemu-img", "qemu-io"]) {
        return;
    }
    let server = Server::start();
    let source = server.path("source");
    image(&source);
    let source = source.to_str().unwrap();
    for uri in [server.unix("web-root/0"), server.tcp("big-blocks/0")] {
        let info = run("qemu-img", &["info", "--output=json", "-f", "raw", &uri]);
        let json: serde_json::Value = serde_json::from_str(&info).unwrap();
        assert_eq!(json["virtual-size"], SIZE);
        run("qemu-img", &["convert", "-n", "-W", "-m", "8", "-f", "raw", "-O", "raw", source, &uri]);
        run("qemu-img", &["compare", "-f", "raw", "-F", "raw", source, &uri]);
        let back = server.path("back.qcow2");
        let back = back.to_str().unwrap();
        run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &uri, back]);
        run("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", back, &uri]);
        // A qcow2 image on the export itself, so that the check has something to check.
        run("qemu-img", &["create", "-f", "qcow2", &uri, "32M"]);
        qemu_io_as("qcow2", &uri, &["write -P 0x5a 1M 3M", "read -P 0x5a 1M 3M", "flush"]);
        assert!(run("qemu-img", &["check", "-f", "qcow2", &uri]).contains("No errors were found"));
    }
}

#[test]
fn qemu_io_patterns_discards_and_zeroes() {
    if !installed(&["qemu-io"]) {
        return;
    }
    let server = Server::start();
    for uri in [server.unix("web-root/0"), server.tcp("big-blocks/0")] {
        qemu_io(
            &uri,
            &[
                "write -P 0xaa 0 1M",
                "write -P 0xbb 1M 20M",
                "write -f -P 0xcc 4096 4096",
                "flush",
                "read -P 0xaa 0 4096",
                "read -P 0xcc 4096 4096",
                "read -P 0xaa 8192 1040384",
                "read -P 0xbb 1M 20M",
                "aio_write -P 0x11 32M 8M",
                "aio_write -P 0x22 40M 8M",
                "aio_flush",
                "read -P 0x11 32M 8M",
                "read -P 0x22 40M 8M",
            ],
        );
        qemu_io(
            &uri,
            &[
                "write -z 4M 4M",
                "read -P 0 4M 4M",
                "write -z -u 8M 64k",
                "read -P 0 8M 64k",
                "discard 12M 4M",
                "flush",
                "read -P 0xbb 16M 1M",
            ],
        );
        let map = qemu_io(&uri, &["map"]);
        assert!(map.contains("bytes") && map.contains("allocated"), "{map}");
        // Unaligned: QEMU does it by read-modify-write with the block size it was told.
        qemu_io(&uri, &["write -P 0x77 700 100", "read -P 0x77 700 100", "read -P 0xaa 0 700"]);
    }
    let refused = output("qemu-io", &["-f", "raw", "-c", "write 0 4096", &server.unix("frozen/0")]);
    let text = [refused.stdout, refused.stderr].concat();
    assert!(String::from_utf8_lossy(&text).contains("read-only") || !refused.status.success());
}

#[test]
fn fio_verifies_over_four_connections() {
    if !installed(&["fio"]) {
        return;
    }
    if !run("fio", &["--enghelp"]).lines().any(|line| line.trim() == "nbd") {
        eprintln!("skipped: this fio has no nbd engine");
        return;
    }
    let server = Server::start();
    for (name, uri) in [("unix", server.unix("web-root/0")), ("tcp", server.tcp("big-blocks/0"))] {
        let report = server.path(name);
        let job = server.path("job.fio");
        // Four jobs are four connections; each has its own quarter.
        let text = format!(
            "[global]\nioengine=nbd\nuri={uri}\nrw=randwrite\nbsrange=4k-256k\nblockalign=4k\niodepth=16\n\
             size=16M\noffset_increment=16M\nverify=crc32c\nverify_fatal=1\nverify_state_save=0\nfsync=64\ngroup_reporting=1\n\
             [quarter]\nnumjobs=4\n"
        );
        fs::File::create(&job).unwrap().write_all(text.as_bytes()).unwrap();
        let (report, job) = (report.to_str().unwrap(), job.to_str().unwrap());
        run("fio", &["--output-format=json", &format!("--output={report}"), job]);
        let text = fs::read_to_string(report).unwrap();
        let json: serde_json::Value =
            serde_json::from_str(text.get(text.find('{').unwrap()..).unwrap()).unwrap();
        let job = &json["jobs"][0];
        assert_eq!(job["error"], 0, "{text}");
        assert_eq!(job["write"]["io_bytes"], SIZE);
        assert_eq!(job["read"]["io_bytes"], SIZE, "everything was verified");
    }
}
