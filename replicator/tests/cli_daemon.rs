//! The programs as an operator uses them: one binary under its names, real daemons in their own run
//! directories, sparse files as disks, the loopback as network.
#![cfg(feature = "runtime")]
#![expect(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]
#![expect(clippy::print_stdout, reason = "a skipped test says why")]
use std::net::TcpListener;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

const LOCKSTEP: &str = env!("CARGO_BIN_EXE_lockstep");

/// Two nodes, alpha and bravo, with one resource `r0` of 16 MiB.
struct Cluster {
    dir: tempfile::TempDir,
}

/// A running daemon; killed when a test fails before it has ended it.
struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        // Already reaped is fine.
        let _ended = self.0.kill();
        let _reaped = self.0.wait();
    }
}

impl Daemon {
    fn terminate(&mut self) -> Option<i32> {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.0.id()).unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        self.0.wait().unwrap().code()
    }
}

impl Cluster {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        // Two ports nobody has at this moment.
        let ports: Vec<TcpListener> = (0..2).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
        let port = |nr: usize| ports[nr].local_addr().unwrap().port();
        for disk in ["alpha.img", "bravo.img"] {
            let file = std::fs::File::create(dir.path().join(disk)).unwrap();
            file.set_len(16 << 20).unwrap();
        }
        let base = dir.path().display();
        let text = format!(
            "resource r0 {{\n  device /dev/drbd7;\n  meta-disk internal;\n  net {{ connect-int 1; }}\n  \
             on alpha {{ disk {base}/alpha.img; address 127.0.0.1:{}; }}\n  \
             on bravo {{ disk {base}/bravo.img; address 127.0.0.1:{}; }}\n}}\n",
            port(0),
            port(1)
        );
        std::fs::write(dir.path().join("r.conf"), text).unwrap();
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn run_dir(&self, node: &str) -> PathBuf {
        self.path(&format!("run-{node}"))
    }

    /// A command of `program` for `node`, words split at blanks.
    fn command(&self, program: &str, node: &str, words: &str) -> Command {
        let mut command = Command::new(LOCKSTEP);
        command.arg0(program).env("LOCKSTEP_RUN_DIR", self.run_dir(node)).env_remove("LOCKSTEP_NODE");
        command.args(words.split_whitespace());
        command
    }

    fn run(&self, program: &str, node: &str, words: &str) -> Output {
        self.command(program, node, words).output().unwrap()
    }

    /// drbdadm on a node whose daemon runs; must exit with `code`. Answers stdout, or stderr when it fails.
    fn drbdadm(&self, node: &str, words: &str, code: i32) -> String {
        let output = self.run("drbdadm", node, words);
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        assert_eq!(output.status.code(), Some(code), "{node}: drbdadm {words}\n{out}{err}");
        if code == 0 { out } else { err }
    }

    /// drbdadm without a daemon.
    fn offline(&self, node: &str, words: &str, code: i32) -> String {
        let conf = self.path("r.conf");
        self.drbdadm(node, &format!("-c {} --node {node} {words}", conf.display()), code)
    }

    fn daemon(&self, node: &str) -> Daemon {
        let conf = self.path("r.conf");
        let log = std::fs::File::create(self.path(&format!("{node}.log"))).unwrap();
        let words = format!("-c {} --node {node}", conf.display());
        let child =
            self.command("lockstepd", node, &words).stderr(log).stdout(Stdio::null()).spawn().unwrap();
        let mut daemon = Daemon(child);
        // Ready when it answers; a daemon that ended never will.
        while self.run("drbdadm", node, "status").status.code() != Some(0) {
            assert!(daemon.0.try_wait().unwrap().is_none(), "{}", self.log(node));
        }
        daemon
    }

    fn log(&self, node: &str) -> String {
        std::fs::read_to_string(self.path(&format!("{node}.log"))).unwrap_or_default()
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn has_uring() -> bool {
    match io_uring::IoUring::new(2) {
        Ok(_) => true,
        Err(error) => {
            println!("skipped: io_uring is not available here: {error}");
            false
        }
    }
}

#[test]
fn names_and_usage_errors() {
    let cluster = Cluster::new();
    let code = |program, words| cluster.run(program, "alpha", words).status.code();
    assert_eq!(code("drbdadm", "--version"), Some(0));
    assert_eq!(code("lockstepd", "--help"), Some(0));
    assert_eq!(code("drbdsetup", "--help"), Some(0));
    assert_eq!(code("drbdadm", "frobnicate all"), Some(1));
    assert_eq!(code("drbdadm", "up --frobnicate r0"), Some(1));
    assert_eq!(code("drbdadm", "primary"), Some(1));
    let version = text(&cluster.run("drbdadm", "alpha", "--version").stdout);
    assert!(version.lines().any(|line| line == "DRBD_KERNEL_VERSION_CODE=0x090200"), "{version}");

    let bin = cluster.path("bin");
    std::fs::create_dir(&bin).unwrap();
    let words = format!("install-links {}", bin.display());
    assert_eq!(cluster.run("lockstep", "alpha", &words).status.code(), Some(0));
    let by_link = Command::new(bin.join("drbdadm")).arg("-V").output().unwrap();
    assert_eq!(text(&by_link.stdout), version);
}

#[test]
fn questions_about_the_configuration_need_no_daemon() {
    let cluster = Cluster::new();
    assert_eq!(cluster.offline("alpha", "sh-nop", 0), "");
    assert_eq!(cluster.offline("alpha", "sh-resources", 0), "r0\n");
    assert_eq!(cluster.offline("alpha", "sh-resource r0/0", 0), "r0\n");
    assert_eq!(cluster.offline("alpha", "sh-dev all", 0), "/dev/drbd7\n");
    assert_eq!(cluster.offline("bravo", "-n M sh-minor r0", 0), "M=7\n");
    assert_eq!(cluster.offline("alpha", "sh-ip r0", 0), "127.0.0.1\n");
    assert_eq!(cluster.offline("alpha", "sh-md-idx r0", 0), "internal\n");
    let disk = format!("{}\n", cluster.path("bravo.img").display());
    assert_eq!(cluster.offline("bravo", "sh-ll-dev r0", 0), disk);
    assert_eq!(cluster.offline("bravo", "sh-md-dev r0", 0), disk);
    assert!(cluster.offline("alpha", "dump r0", 0).contains("resource r0 {"));

    let missing = cluster.offline("alpha", "sh-dev r1", 1);
    assert!(missing.starts_with("'r1' not defined in your config (for this host)."), "{missing}");
    let stranger = cluster.offline("charlie", "sh-dev r0", 1);
    assert!(stranger.contains("r0 is for alpha, bravo"), "{stranger}");
    let unreadable = cluster.drbdadm("alpha", "-c /nonexistent/r.conf sh-nop", 20);
    assert!(unreadable.contains("Can not open '/nonexistent/r.conf'"), "{unreadable}");
    std::fs::write(cluster.path("bad.conf"), "resource r0 {\n  protocl C;\n}\n").unwrap();
    let bad = cluster.drbdadm("alpha", &format!("-c {} sh-nop", cluster.path("bad.conf").display()), 10);
    assert!(bad.contains("bad.conf:2:3: error"), "{bad}");
}

#[test]
fn without_a_daemon_the_way_to_start_one_is_shown() {
    let cluster = Cluster::new();
    let said = cluster.drbdadm("alpha", "status", 20);
    assert!(said.contains("no lockstepd runs") && said.contains("start it: lockstepd"), "{said}");
    let said = cluster.offline("alpha", "primary r0", 20);
    assert!(said.contains(&format!("--run-dir {}", cluster.run_dir("alpha").display())), "{said}");
}

#[test]
fn metadata_is_made_and_read_offline_and_left_alone_while_attached() {
    if !has_uring() {
        return;
    }
    let cluster = Cluster::new();
    cluster.offline("alpha", "-- --force create-md r0", 0);
    let gi = cluster.offline("alpha", "get-gi r0", 0);
    assert!(gi.starts_with("0000000000000004:0000000000000000:"), "{gi}");
    assert!(cluster.offline("alpha", "dump-md r0", 0).contains("version \"v08\";"));
    let mut daemon = cluster.daemon("alpha");
    cluster.drbdadm("alpha", "up r0", 0);
    let refused = cluster.drbdadm("alpha", "create-md --force r0", 20);
    assert!(refused.contains("has this disk attached"), "{refused}");
    assert_eq!(cluster.drbdadm("alpha", "get-gi r0", 0).split(':').count(), 11);
    cluster.drbdadm("alpha", "down r0", 0);
    cluster.drbdadm("alpha", "down r0", 0);
    cluster.drbdadm("alpha", "dump-md r0", 0);
    assert_eq!(daemon.terminate(), Some(0), "{}", cluster.log("alpha"));
}

#[test]
fn a_run_directory_has_one_daemon_and_is_left_clean() {
    if !has_uring() {
        return;
    }
    let cluster = Cluster::new();
    let mut daemon = cluster.daemon("alpha");
    let words = format!("-c {} --node alpha", cluster.path("r.conf").display());
    let second = cluster.run("lockstepd", "alpha", &words);
    assert_eq!(second.status.code(), Some(20));
    let said = text(&second.stderr);
    assert!(said.contains(&format!("another lockstepd (pid {})", daemon.0.id())), "{said}");

    // Up without metadata: refused with the number and the next command; what was begun can be ended.
    let refused = cluster.drbdadm("alpha", "up r0", 10);
    assert!(
        refused.contains("r0: Failure: (119)") && refused.contains("drbdadm create-md r0/0"),
        "{refused}"
    );
    assert!(cluster.drbdadm("alpha", "status r0", 0).contains("disk:Diskless"));
    assert_eq!(daemon.terminate(), Some(0), "{}", cluster.log("alpha"));
    let left: Vec<_> = entries(&cluster.run_dir("alpha"));
    assert_eq!(left, ["lockstepd.pid"]);
}

fn entries(dir: &Path) -> Vec<String> {
    let names = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name());
    names.map(|name| name.to_string_lossy().into_owned()).collect()
}

#[test]
fn nonsense_on_the_control_socket_is_answered_and_the_daemon_lives() {
    use std::io::{Read as _, Write as _};
    if !has_uring() {
        return;
    }
    let cluster = Cluster::new();
    let mut daemon = cluster.daemon("alpha");
    let socket = cluster.run_dir("alpha").join("control.sock");
    for nonsense in [&b"\n"[..], b"{\"v\":9,\"body\":1}\n", &[0xff; 5000], b"{\"v\":1,\"body\":\"info\""] {
        let mut stream = std::os::unix::net::UnixStream::connect(&socket).unwrap();
        stream.write_all(nonsense).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.contains("control version 1"), "{answer}");
    }
    // More than a message may have: cut off, not kept in memory.
    let mut stream = std::os::unix::net::UnixStream::connect(&socket).unwrap();
    let piece = vec![b'x'; 1 << 16];
    while stream.write_all(&piece).is_ok() {}
    cluster.drbdadm("alpha", "status", 0);
    assert_eq!(daemon.terminate(), Some(0), "{}", cluster.log("alpha"));
}

#[test]
fn two_nodes_from_fresh_disks_to_failover() {
    if !has_uring() {
        return;
    }
    let cluster = Cluster::new();
    for node in ["alpha", "bravo"] {
        cluster.offline(node, "create-md r0", 0);
    }
    let (mut alpha, mut bravo) = (cluster.daemon("alpha"), cluster.daemon("bravo"));
    for node in ["alpha", "bravo"] {
        cluster.drbdadm(node, "up all", 0);
        cluster.drbdadm(node, "up r0", 0);
    }
    for node in ["alpha", "bravo"] {
        cluster.drbdadm(node, "wait-connect r0 --timeout 20", 0);
    }
    let refused = cluster.drbdadm("alpha", "primary r0", 17);
    assert!(refused.starts_with("r0: State change failed: (-2) Need access to UpToDate data\n"), "{refused}");
    assert!(refused.contains("\nnext: "), "{refused}");

    cluster.drbdadm("alpha", "-- --overwrite-data-of-peer primary r0", 0);
    cluster.drbdadm("alpha", "primary r0", 0);
    while cluster.drbdadm("bravo", "dstate r0", 0) != "UpToDate/UpToDate\n" {
        cluster.drbdadm("bravo", "wait-sync r0 --timeout 20", 0);
    }
    assert_eq!(cluster.drbdadm("alpha", "role r0", 0), "Primary/Secondary\n");
    // The source hears of the end a moment after the target.
    while cluster.drbdadm("alpha", "cstate r0", 0) == "SyncSource\n" {
        cluster.drbdadm("alpha", "wait-sync r0 --timeout 20", 0);
    }
    assert_eq!(cluster.drbdadm("alpha", "cstate r0", 0), "Connected\n");
    assert_eq!(
        cluster.drbdadm("alpha", "status r0", 0),
        "r0 role:Primary\n  disk:UpToDate open:no\n  bravo role:Secondary\n    peer-disk:UpToDate\n\n"
    );
    assert!(cluster.drbdadm("alpha", "status --json r0", 0).contains("\"peer-disk-state\": \"UpToDate\""));
    let setup = cluster.run("drbdsetup", "alpha", "role r0");
    assert_eq!(text(&setup.stdout), "Primary\n");
    let setup = cluster.run("drbdsetup", "alpha", "dstate 7");
    assert_eq!(text(&setup.stdout), "UpToDate/UpToDate\n");

    cluster.drbdadm("alpha", "secondary r0", 0);
    cluster.drbdadm("bravo", "primary r0", 0);
    cluster.drbdadm("bravo", "primary r0", 0);
    cluster.drbdadm("alpha", "disconnect r0", 0);
    let never = cluster.drbdadm("alpha", "wait-connect r0", 5);
    assert!(never.contains("next: drbdadm connect r0"), "{never}");
    cluster.drbdadm("alpha", "connect r0", 0);
    cluster.drbdadm("alpha", "wait-connect r0 --timeout 20", 0);

    cluster.drbdadm("alpha", "down r0", 0);
    assert_eq!(cluster.drbdadm("alpha", "status", 0), "# No currently configured DRBD found.\n");
    cluster.drbdadm("alpha", "role r0", 10);
    assert_eq!(bravo.terminate(), Some(0), "{}", cluster.log("bravo"));
    assert_eq!(alpha.terminate(), Some(0), "{}", cluster.log("alpha"));
}

/// Adds `r1`, whose resync comes after that of `r0`, and says after what that of `r0` comes.
fn add_second(cluster: &Cluster, r0_after: &str) {
    let ports: Vec<TcpListener> = (0..2).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
    let port = |nr: usize| ports[nr].local_addr().unwrap().port();
    let base = cluster.dir.path().display().to_string();
    for disk in ["alpha1.img", "bravo1.img"] {
        std::fs::File::create(cluster.path(disk)).unwrap().set_len(16 << 20).unwrap();
    }
    let first = std::fs::read_to_string(cluster.path("r.conf")).unwrap();
    let first = first.replacen("resource r0 {\n", &format!("resource r0 {{\n  disk {{ {r0_after} }}\n"), 1);
    let second = format!(
        "resource r1 {{\n  device /dev/drbd8;\n  meta-disk internal;\n  net {{ connect-int 1; }}\n  \
         disk {{ resync-after r0/0; }}\n  \
         on alpha {{ disk {base}/alpha1.img; address 127.0.0.1:{}; }}\n  \
         on bravo {{ disk {base}/bravo1.img; address 127.0.0.1:{}; }}\n}}\n",
        port(0),
        port(1)
    );
    std::fs::write(cluster.path("r.conf"), format!("{first}{second}")).unwrap();
}

#[test]
fn a_resync_comes_after_another_one_and_says_so() {
    if !has_uring() {
        return;
    }
    let cluster = Cluster::new();
    add_second(&cluster, "");
    for node in ["alpha", "bravo"] {
        cluster.offline(node, "create-md all", 0);
    }
    let (mut alpha, mut bravo) = (cluster.daemon("alpha"), cluster.daemon("bravo"));
    for node in ["alpha", "bravo"] {
        cluster.drbdadm(node, "up all", 0);
    }
    for resource in ["r0", "r1"] {
        cluster.drbdadm("alpha", &format!("wait-connect {resource} --timeout 20"), 0);
    }
    // The first one stands still as long as the operator likes.
    cluster.drbdadm("alpha", "pause-sync r0", 0);
    cluster.drbdadm("alpha", "primary --force r0", 0);
    while cluster.drbdadm("alpha", "cstate r0", 0) != "PausedSyncS\n" {}
    // The second one too, until the daemons have looked.
    cluster.drbdadm("alpha", "pause-sync r1", 0);
    cluster.drbdadm("alpha", "primary --force r1", 0);
    for node in ["alpha", "bravo"] {
        while !cluster.drbdadm(node, "status r1", 0).contains("dependency") {}
    }
    cluster.drbdadm("alpha", "resume-sync r1", 0);
    assert_eq!(cluster.drbdadm("alpha", "cstate r1", 0), "PausedSyncS\n");
    let status = cluster.drbdadm("alpha", "status r1", 0);
    assert!(status.contains("resync-suspended:") && status.contains("dependency"), "{status}");
    let said = cluster.drbdadm("alpha", "wait-sync r1 --timeout 2", 0);
    assert_eq!(said, "", "the source waits for nobody");
    let said = cluster.drbdadm("bravo", "wait-sync r1 --timeout 2", 5);
    assert!(said.contains("resync-after r0/0"), "{said}");
    let refused = cluster.drbdadm("alpha", "resume-sync r1", 10);
    assert!(refused.contains("(156)"), "{refused}");
    cluster.drbdadm("alpha", "resume-sync r0", 0);
    while cluster.drbdadm("bravo", "dstate r1", 0) != "UpToDate/UpToDate\n" {}
    assert_eq!(cluster.drbdadm("bravo", "dstate r0", 0), "UpToDate/UpToDate\n");

    // A loop cannot be brought in while it runs, nor with `up`.
    let text = std::fs::read_to_string(cluster.path("r.conf")).unwrap();
    std::fs::write(cluster.path("r.conf"), text.replacen("disk {  }", "disk { resync-after r1; }", 1))
        .unwrap();
    for verb in ["adjust r0", "up r1"] {
        let refused = cluster.drbdadm("alpha", verb, 10);
        assert!(refused.contains("(133)") && refused.contains("after r0/0"), "{refused}");
        assert!(refused.contains("\nnext: leave out `resync-after`"), "{refused}");
    }
    assert_eq!(bravo.terminate(), Some(0), "{}", cluster.log("bravo"));
    assert_eq!(alpha.terminate(), Some(0), "{}", cluster.log("alpha"));
}
