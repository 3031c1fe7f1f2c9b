//! One random story of two real daemons: a client writes, and things go wrong, several at a time. Then everything is
//! mended, and the two disks and the client's books must agree.
//!
//! Whether the peer may take over from a dead Primary is decided as an operator with a look at both disks would: when
//! they hold the same generation, so that the dead node acknowledged nothing alone. A node that was ahead comes back.
use crate::cluster::{Cluster, Options, RESOURCE, disk, now, number, peer};
use crate::link::Link;
use crate::load::{BLOCK, Load, Running, pause};
use crate::veth::Veth;
use lockstep_replicator::admin::drbdmeta;
use lockstep_replicator::meta::{BLOCK_BYTES, MetaKind, Superblock, restore};
use nix::sys::signal::{Signal, kill};
use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

/// Size of each backing file; the load touches a part of it.
const DISK_BYTES: u64 = 128 << 20;
const FIRST_BLOCK: u64 = 700;
const LOAD_BLOCKS: usize = 24 << 20 >> 12;
/// Writes in flight.
const DEPTH: usize = 24;
/// Everything must be in order again this long after the last fault was mended, seconds.
const HEAL_S: u64 = 60;
/// A dead peer is noticed within this: ping-int, ping-timeout, ko-count and a busy machine.
const NOTICE_S: u64 = 20;
/// So that a story does not wait for minutes: what is silent for 2 s is gone.
const NET: &str = "net { connect-int 1; ping-int 1; ping-timeout 5; timeout 9; ko-count 3; }";

/// A small deterministic generator.
#[derive(Debug)]
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 8) % sides
    }

    fn node(&mut self) -> usize {
        usize::from(self.roll(2) == 1)
    }

    fn one_in(&mut self, sides: u64) -> bool {
        self.roll(sides) == 0
    }
}

/// What is between the nodes.
#[derive(Debug)]
pub(crate) enum Net {
    Proxy(Link),
    Veth(Veth),
}

impl Net {
    fn cut(&self, node: usize) {
        match self {
            Self::Proxy(link) => link.cut(),
            Self::Veth(veth) => veth.cut(node),
        }
    }

    fn silence(&self, node: usize) {
        match self {
            Self::Proxy(link) => link.silence(node),
            Self::Veth(veth) => veth.silence(node),
        }
    }

    fn delay(&self, node: usize, millis: u64) {
        match self {
            Self::Proxy(link) => link.delay(node, millis),
            Self::Veth(veth) => veth.disturb(node, millis),
        }
    }

    fn drip(&self, node: usize, bytes: usize) {
        match self {
            Self::Proxy(link) => link.drip(node, bytes),
            Self::Veth(veth) => veth.drip(node),
        }
    }

    fn clear(&self) {
        match self {
            Self::Proxy(link) => link.clear(),
            Self::Veth(veth) => veth.clear(),
        }
    }
}

/// A daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Life {
    Up,
    /// Stopped by SIGSTOP: it holds everything and does nothing.
    Hung,
    Dead,
}

/// What a story came to.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tally {
    pub(crate) rounds: u64,
    pub(crate) acked: u64,
    pub(crate) faults: u64,
    pub(crate) kills: u64,
    pub(crate) hangs: u64,
    pub(crate) link_faults: u64,
    pub(crate) failovers: u64,
    pub(crate) switches: u64,
    pub(crate) dumps: u64,
    /// Detached or disconnected by the operator.
    pub(crate) verbs: u64,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Story {
    cluster: Cluster,
    net: Net,
    dice: Dice,
    protocol: char,
    primary: usize,
    lives: [Life; 2],
    /// Bytes of the volume.
    size: u64,
    books: Option<Load>,
    running: Option<Running>,
    begun: Instant,
    diary: String,
    pub(crate) tally: Tally,
}

impl Story {
    /// A pair in sync with the first node Primary.
    pub(crate) fn begin(dir: &Path, protocol: char, seed: u64, veth: Option<Veth>) -> Self {
        let program = Path::new(env!("CARGO_BIN_EXE_lockstep"));
        let (net, program, ports) = match veth {
            Some(veth) => {
                let program = veth.wrap(dir, program);
                (Net::Veth(veth), program, [7789, 7790, 7789, 7790])
            }
            None => {
                let own = [quiet_port(), quiet_port()];
                let link = Link::start(own).unwrap();
                let ports = [own[0], own[1], link.ports[0], link.ports[1]];
                (Net::Proxy(link), program.to_owned(), ports)
            }
        };
        let options = Options {
            protocol,
            disk_bytes: DISK_BYTES,
            extra: String::new(),
            ports: Some(ports),
            ublk: false,
        };
        let cluster = Cluster::new(dir, &program, &options).unwrap();
        adapt_configuration(dir, matches!(net, Net::Veth(_)));
        let mut story = Self {
            cluster,
            net,
            dice: Dice::new(seed),
            protocol,
            primary: 0,
            lives: [Life::Dead; 2],
            size: 0,
            books: Some(Load::new(FIRST_BLOCK, LOAD_BLOCKS, seed)),
            running: None,
            begun: now(),
            diary: String::new(),
            tally: Tally::default(),
        };
        story.note(&format!("protocol {protocol}, seed {seed}"));
        for node in 0..2 {
            story.cluster.create_md(node).unwrap();
            story.revive(node);
        }
        story.wait_connected(0);
        story.cluster.must(0, ["primary", "--force", RESOURCE]).unwrap();
        let status = story.cluster.wait_in_sync(0, HEAL_S).unwrap();
        story.size = status["devices"][0]["size"].as_u64().unwrap() * 1024;
        story
    }

    /// One round: faults under load, everything mended, everything compared.
    pub(crate) fn round(&mut self) {
        self.tally.rounds += 1;
        self.note(&format!("--- round {}", self.tally.rounds));
        self.load();
        for _ in 0..2 + self.dice.roll(4) {
            self.pause(20, 500);
            self.fault();
            if self.lives[self.primary] == Life::Up {
                self.load();
            }
        }
        self.heal();
        self.compare();
        if self.dice.one_in(3) {
            self.switch_over();
        }
        if self.dice.one_in(4) {
            self.dump();
        }
    }

    /// The end: a last look into the metadata.
    pub(crate) fn finish(mut self) -> Tally {
        self.dump();
        for node in 0..2 {
            self.cluster.must(node, ["down", RESOURCE]).unwrap();
        }
        self.tally
    }

    // ---- what goes wrong ----------------------------------------------------------------------

    fn fault(&mut self) {
        self.tally.faults += 1;
        let (node, secondary) = (self.dice.node(), 1 - self.primary);
        match self.dice.roll(17) {
            0 | 1 => {
                self.link(&format!("link cut ({})", name(node)), |net| net.cut(node));
                if self.dice.one_in(2) {
                    self.pause(0, 1500);
                    self.link("link mended", Net::clear);
                }
            }
            2 => self.link(&format!("nothing reaches {} any more", name(node)), |net| net.silence(node)),
            3 => {
                self.link("silence in both directions", |net| {
                    net.silence(0);
                    net.silence(1);
                });
                if self.dice.one_in(2) {
                    self.pause(100, 3000);
                    self.link("and no more", Net::clear);
                }
            }
            4 => {
                let millis = 1 + self.dice.roll(40);
                self.link(&format!("{millis} ms late towards {}", name(node)), |net| net.delay(node, millis));
            }
            5 => {
                let bytes = 20 + usize::try_from(self.dice.roll(2000)).unwrap();
                self.link(&format!("{bytes} B/ms towards {}", name(node)), |net| net.drip(node, bytes));
            }
            6 => self.link("fair weather", Net::clear),
            7 => {
                self.hang(secondary);
                if !self.dice.one_in(3) {
                    self.pause(100, 3500);
                    self.resume(secondary);
                }
            }
            8 => {
                let primary = self.primary;
                self.hang(primary);
                self.pause(100, 3500);
                if self.dice.one_in(3) {
                    self.primary_dies();
                } else {
                    self.resume(primary);
                }
            }
            9 | 10 => {
                self.kill(secondary);
                if !self.dice.one_in(3) {
                    self.pause(0, 1000);
                    self.revive(secondary);
                }
            }
            11 => {
                // Out of the blue: the other has everything.
                self.mend();
                self.pause(0, 300);
                self.primary_dies();
            }
            12 => {
                self.note("the Primary will die in the middle of a resync");
                self.net.clear();
                self.kill(secondary);
                self.pause(50, 400);
                self.revive(secondary);
                self.pause(0, 150);
                self.primary_dies();
            }
            13 => self.operator(secondary, "detach"),
            14 => self.operator(secondary, "disconnect"),
            _ => self.primary_dies(),
        }
    }

    /// Somebody takes the Secondary's disk or connection away in good order; `adjust` brings it back later.
    fn operator(&mut self, secondary: usize, verb: &str) {
        self.mend();
        self.note(&format!("{verb} on {}", name(secondary)));
        self.tally.verbs += 1;
        self.cluster.must(secondary, [verb, RESOURCE]).unwrap();
        if self.dice.one_in(2) {
            self.pause(0, 1000);
            self.note("adjust");
            self.cluster.must(secondary, ["adjust", RESOURCE]).unwrap();
        }
    }

    fn link(&mut self, what: &str, act: impl Fn(&Net)) {
        self.note(what);
        self.tally.link_faults += 1;
        act(&self.net);
    }

    fn hang(&mut self, node: usize) {
        if self.lives[node] == Life::Up {
            self.note(&format!("SIGSTOP {}", name(node)));
            self.tally.hangs += 1;
            self.signal(node, Signal::SIGSTOP);
            self.lives[node] = Life::Hung;
        }
    }

    fn resume(&mut self, node: usize) {
        if self.lives[node] == Life::Hung {
            self.note(&format!("SIGCONT {}", name(node)));
            self.signal(node, Signal::SIGCONT);
            self.lives[node] = Life::Up;
        }
    }

    fn signal(&self, node: usize, signal: Signal) {
        let pid = self.cluster.pid(node).expect("it is not dead");
        kill(nix::unistd::Pid::from_raw(pid.try_into().unwrap()), signal).unwrap();
    }

    fn kill(&mut self, node: usize) {
        if self.lives[node] != Life::Dead {
            self.note(&format!("SIGKILL {}", name(node)));
            self.tally.kills += 1;
            self.cluster.kill(node).unwrap();
            self.lives[node] = Life::Dead;
        }
    }

    /// A dead node comes back, a hung one goes on.
    fn revive(&mut self, node: usize) {
        match self.lives[node] {
            Life::Up => {}
            Life::Hung => self.resume(node),
            Life::Dead => {
                self.note(&format!("{} starts", name(node)));
                self.cluster.start(node).unwrap();
                self.lives[node] = Life::Up;
                self.cluster.must(node, ["up", RESOURCE]).unwrap();
            }
        }
    }

    /// The Primary dies, perhaps the other as well; one of them goes on as Primary.
    fn primary_dies(&mut self) {
        let (dead, other) = (self.primary, 1 - self.primary);
        self.kill(dead);
        if let Some(running) = self.running.take() {
            let (books, broke) = running.finish(false);
            assert!(broke.is_err(), "the client of a dead Primary was served to the end");
            self.books = Some(books);
        }
        if self.dice.one_in(4) {
            self.pause(0, 300);
            self.kill(other);
        }
        if self.dice.one_in(3) || !self.other_may_take_over() {
            self.revive(dead);
            self.promote(dead);
            // The process died, the machine did not: nothing acknowledged may be missing, whatever the protocol.
            self.check_books(false);
        } else {
            self.tally.failovers += 1;
            self.promote(other);
            self.check_books(self.protocol == 'A');
        }
    }

    /// Whether the other node has all that the dead Primary acknowledged. A node that cannot must refuse.
    fn other_may_take_over(&mut self) -> bool {
        let (dead, other) = (self.primary, 1 - self.primary);
        self.revive(other);
        let noticed = |status: &serde_json::Value| {
            let conn = status["connections"][0]["connection-state"].as_str().unwrap_or_default();
            let disk = disk(status);
            conn != "Connected" && !matches!(disk, "Attaching" | "Negotiating")
        };
        let status = self.cluster.wait(other, "the loss of the dead Primary", NOTICE_S, noticed).unwrap();
        let state = disk(&status).to_owned();
        let generations = [0, 1].map(|node| self.superblock(node).uuid[0] & !1);
        self.note(&format!(
            "{} is {state}, generations {:016X} and {:016X}",
            name(other),
            generations[dead],
            generations[other]
        ));
        if state == "Inconsistent" {
            let output = self.cluster.run(other, ["primary", RESOURCE]).unwrap();
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(!output.status.success(), "{} became Primary with an Inconsistent disk", name(other));
            assert!(text.contains("next:"), "the refusal names no way out: {text}");
        }
        state == "UpToDate" && generations[0] == generations[1]
    }

    fn promote(&mut self, node: usize) {
        let begun = now();
        loop {
            let output = self.cluster.run(node, ["primary", RESOURCE]).unwrap();
            if output.status.success() {
                break;
            }
            assert!(
                begun.elapsed() < Duration::from_secs(NOTICE_S),
                "{} does not become Primary: {}",
                name(node),
                String::from_utf8_lossy(&output.stderr)
            );
            pause(Duration::from_millis(100));
        }
        self.note(&format!("{} is Primary", name(node)));
        self.primary = node;
    }

    // ---- load and books -----------------------------------------------------------------------

    fn load(&mut self) {
        if let Some(books) = self.books.take() {
            self.running = Some(Running::start(books, self.cluster.target(self.primary), DEPTH));
        }
    }

    fn stop_load(&mut self) {
        if let Some(running) = self.running.take() {
            let (books, result) = running.finish(true);
            self.tally.acked = books.acked;
            self.books = Some(books);
            if let Err(error) = result {
                panic!("the client of {}, who lives, got an error: {error}", name(self.primary));
            }
        }
    }

    fn check_books(&mut self, acked_may_be_lost: bool) {
        let target = self.cluster.target(self.primary);
        let books = self.books.as_mut().expect("the load is not running");
        let begun = now();
        let wrong = loop {
            match books.check(&target, acked_may_be_lost) {
                Ok(wrong) => break wrong,
                // The export appears a moment after the verb returned; a resync target's reads may break off with
                // the connection that serves them.
                Err(error) if begun.elapsed() > Duration::from_secs(NOTICE_S) => {
                    panic!("reading back: {error}")
                }
                Err(_) => pause(Duration::from_millis(50)),
            }
        };
        assert!(
            wrong.is_empty(),
            "{} blocks are wrong on {}, first: {}",
            wrong.len(),
            name(self.primary),
            wrong[0]
        );
    }

    // ---- in order again -----------------------------------------------------------------------

    fn heal(&mut self) {
        self.mend();
        self.stop_load();
    }

    /// Nothing is wrong any more, and both disks are good, under load.
    fn mend(&mut self) {
        self.note("heal");
        self.net.clear();
        for node in [self.primary, 1 - self.primary] {
            self.revive(node);
            self.cluster.must(node, ["adjust", RESOURCE]).unwrap();
        }
        // The resync has to make its way against the load.
        self.load();
        for node in 0..2 {
            self.wait_connected(node);
            self.cluster.wait_in_sync(node, HEAL_S).unwrap();
        }
        self.note("in sync");
    }

    fn wait_connected(&self, node: usize) {
        self.cluster
            .wait(node, "the connection", HEAL_S, |status| {
                status["connections"][0]["connection-state"] == "Connected"
            })
            .unwrap();
    }

    /// Both disks, and the client's books.
    fn compare(&mut self) {
        // A and B acknowledge before the peer's disk has it.
        let begun = now();
        while let Some(at) = self.cluster.first_difference(self.size).unwrap() {
            assert!(begun.elapsed() < Duration::from_secs(10), "the disks differ at byte {at}");
            pause(Duration::from_millis(50));
        }
        self.check_books(false);
        for node in 0..2 {
            let status = self.cluster.status(node).expect("it is up");
            assert_eq!(number(&status, "out-of-sync"), 0, "{status:#}");
            assert_eq!(peer(&status, "replication-state"), "Established", "{status:#}");
        }
    }

    /// The operator swaps the roles.
    fn switch_over(&mut self) {
        let (from, to) = (self.primary, 1 - self.primary);
        self.note(&format!("{} hands over to {}", name(from), name(to)));
        // The client that read the books back is gone, but its end may not have been seen yet.
        let begun = now();
        loop {
            let output = self.cluster.run(from, ["secondary", RESOURCE]).unwrap();
            if output.status.success() {
                break;
            }
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(begun.elapsed() < Duration::from_secs(10), "{} stays Primary: {text}", name(from));
            pause(Duration::from_millis(50));
        }
        self.tally.switches += 1;
        self.promote(to);
        self.check_books(false);
    }

    /// Both nodes stop cleanly. Their metadata can be read, by DRBD's own tool too, and has no bit.
    fn dump(&mut self) {
        self.note("down on both, dump, up again");
        self.tally.dumps += 1;
        let order = [1 - self.primary, self.primary];
        for node in order {
            self.down(node);
        }
        for node in 0..2 {
            let path = &self.cluster.nodes[node].disk;
            let text = our_dump(path);
            let dump =
                restore::parse(&text).unwrap_or_else(|error| panic!("dump of {}: {error}", name(node)));
            let set: u64 = dump.bitmap.iter().map(|(times, word)| times * u64::from(word.count_ones())).sum();
            assert_eq!(set, 0, "{} has {set} bits after a clean stop in sync", name(node));
            assert!(self.superblock(node).is_clean(), "{} was not left clean", name(node));
            if let Some(theirs) = debians_dump(path) {
                let theirs =
                    restore::parse(&theirs).unwrap_or_else(|error| panic!("{}: {error}", name(node)));
                assert_eq!(
                    (theirs.uuid, theirs.bitmap),
                    (dump.uuid, dump.bitmap),
                    "drbdmeta reads it differently"
                );
            }
        }
        for node in order {
            self.cluster.must(node, ["up", RESOURCE]).unwrap();
        }
        self.wait_connected(self.primary);
        self.promote(self.primary);
        for node in 0..2 {
            self.cluster.wait_in_sync(node, HEAL_S).unwrap();
        }
    }

    fn down(&self, node: usize) {
        let begun = now();
        loop {
            let output = self.cluster.run(node, ["down", RESOURCE]).unwrap();
            if output.status.success() {
                return;
            }
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(begun.elapsed() < Duration::from_secs(10), "{} stays up: {text}", name(node));
            pause(Duration::from_millis(50));
        }
    }

    /// The superblock as it is on the disk.
    fn superblock(&self, node: usize) -> Superblock {
        let file = File::open(&self.cluster.nodes[node].disk).unwrap();
        let position = MetaKind::Internal.superblock_position(DISK_BYTES).unwrap();
        let mut block = [0; BLOCK_BYTES];
        file.read_exact_at(&mut block, position).unwrap();
        Superblock::decode(&block, position).unwrap()
    }

    // ---- telling ------------------------------------------------------------------------------

    fn pause(&mut self, least: u64, most: u64) {
        pause(Duration::from_millis(least + self.dice.roll(most - least)));
    }

    fn note(&mut self, what: &str) {
        writeln!(self.diary, "{:8.3}  {what}", self.begun.elapsed().as_secs_f64()).unwrap();
    }
}

impl Drop for Story {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        println!("--- what happened\n{}", self.diary);
        for node in 0..2 {
            // A hung daemon answers nobody.
            if self.lives[node] == Life::Up
                && let Some(status) = self.cluster.status(node)
            {
                println!("--- status of {}\n{status:#}", name(node));
            }
            let log = self.cluster.dir.join(format!("{}.log", name(node)));
            let text = std::fs::read_to_string(log).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            println!("--- last lines of {}'s log", name(node));
            for line in &lines[lines.len().saturating_sub(120)..] {
                println!("{line}");
            }
        }
    }
}

/// A port that nobody takes while its node is dead: below those that the kernel gives out by itself, and no other
/// story's in this process.
fn quiet_port() -> u16 {
    static TAKEN: AtomicU16 = AtomicU16::new(0);
    loop {
        let start = u16::try_from(std::process::id() % 8000).unwrap_or(0);
        let port = 20_000 + (start + TAKEN.fetch_add(1, Ordering::Relaxed)) % 12_000;
        if std::net::TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

fn name(node: usize) -> &'static str {
    ["alice", "bob"][node]
}

/// The demo's configuration with short timeouts, and on a veth pair with its addresses.
fn adapt_configuration(dir: &Path, veth: bool) {
    for file in ["demo.conf", "demo-alice.conf", "demo-bob.conf"].map(|file| dir.join(file)) {
        let Ok(mut text) = std::fs::read_to_string(&file) else { continue };
        let plain = "net { connect-int 1; }";
        assert!(text.contains(plain), "{text}");
        text = text.replace(plain, NET);
        if veth {
            for (node, port) in [7789, 7790].into_iter().enumerate() {
                let wanted = format!("{}:{port}", Veth::address(node));
                text = text.replace(&format!("127.0.0.1:{port}"), &wanted);
            }
        }
        std::fs::write(&file, text).unwrap();
    }
}

fn our_dump(disk: &Path) -> String {
    let mut args: Vec<OsString> = ["-", "v08"].map(Into::into).into();
    args.push(disk.into());
    args.extend(["internal", "dump-md"].map(Into::into));
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let code = drbdmeta::run_to(&args, &mut out, &mut err);
    assert_eq!(code, 0, "dump-md: {}", String::from_utf8_lossy(&err));
    String::from_utf8(out).unwrap()
}

/// What Debian's drbdmeta reads; `None` without it.
fn debians_dump(disk: &Path) -> Option<String> {
    let output = Command::new("drbdmeta")
        .args(["--force", "-", "v08"])
        .arg(disk)
        .args(["internal", "dump-md"])
        .stdin(Stdio::null())
        .output()
        .ok()?;
    assert!(output.status.success(), "drbdmeta dump-md: {}", String::from_utf8_lossy(&output.stderr));
    Some(String::from_utf8(output.stdout).unwrap())
}

/// Bytes that a story needs to have written to have told anything.
pub(crate) const fn worth_telling(tally: &Tally) -> bool {
    tally.acked > 500 && tally.rounds >= 2 && tally.faults >= 4
}

const _: () = assert!((FIRST_BLOCK + LOAD_BLOCKS as u64) * (BLOCK as u64) < DISK_BYTES);
