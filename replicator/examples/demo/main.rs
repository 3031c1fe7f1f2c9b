//! The main job, told line by line with figures: a disk mirrored to a peer, its node killed in the middle
//! of verified writes, the peer taking over with every acknowledged byte, the dead node coming back by
//! quick-sync, both disks equal in the end.
//!
//! Run by `make demo`. Needs no root; two daemons on the loopback address, disks in sparse files.
#![expect(clippy::print_stdout, reason = "a program for a person at a terminal")]
mod cluster;
mod load;
mod nbd;
mod target;
mod tree;

use cluster::{Cluster, Options, RESOURCE, now, number};
use load::{BLOCK, Load, Running, pause};
use std::error::Error;
use std::path::{Path, PathBuf};
use std::time::Duration;
use target::{Open, Target};

/// Size of each backing file.
const DISK_BYTES: u64 = 1 << 30;
/// The filesystem takes the first part of the volume, the load the part behind it.
const FILESYSTEM_BYTES: u64 = 64 << 20;
const LOAD_BYTES: u64 = 96 << 20;
/// Writes in flight.
const DEPTH: usize = 32;

type Outcome<T> = Result<T, Box<dyn Error>>;

struct Args {
    keep: bool,
    program: PathBuf,
    protocol: char,
}

fn main() {
    let args = match parse_args() {
        Ok(args) => args,
        Err(why) => {
            eprintln!("demo: {why}\nusage: demo [--keep] [--protocol A|B|C] [--program PATH-OF-LOCKSTEP]");
            std::process::exit(1);
        }
    };
    let begun = now();
    if let Err(error) = run(&args) {
        eprintln!("\ndemo FAILED: {error}");
        std::process::exit(1);
    }
    println!("\nDone in {:.1} s.", begun.elapsed().as_secs_f64());
}

fn parse_args() -> Result<Args, String> {
    // The example stands in target/PROFILE/examples, the program one folder up.
    let beside = std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.parent()?.join("lockstep")));
    let mut args = Args { keep: false, program: beside.unwrap_or_else(|| "lockstep".into()), protocol: 'C' };
    let mut given = std::env::args().skip(1);
    while let Some(arg) = given.next() {
        match arg.as_str() {
            "--keep" => args.keep = true,
            "--program" => args.program = given.next().ok_or("--program needs a path")?.into(),
            "--protocol" => match given.next().as_deref() {
                Some(letter @ ("A" | "B" | "C")) => args.protocol = letter.chars().next().unwrap_or('C'),
                _ => return Err("--protocol is A, B or C".into()),
            },
            other => return Err(format!("unknown argument {other:?}")),
        }
    }
    Ok(args)
}

fn say(text: &str) {
    println!("{text}");
}

fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

fn run(args: &Args) -> Outcome<()> {
    let dir = std::env::temp_dir().join(format!("lockstep-demo-{}", std::process::id()));
    std::fs::create_dir(&dir)?;
    let told = story(args, &dir);
    match (&told, args.keep) {
        (Ok(Some(cluster)), true) => {
            keep_hint(args, cluster);
            wait_for_enter();
        }
        (Err(_), _) => {
            say("--- last lines of the daemons' logs");
            for name in ["alice", "bob"] {
                let text = std::fs::read_to_string(dir.join(format!("{name}.log"))).unwrap_or_default();
                for line in text.lines().rev().take(15).collect::<Vec<_>>().into_iter().rev() {
                    say(&format!("{name}: {line}"));
                }
            }
        }
        _ => {}
    }
    let result = told.map(drop);
    std::fs::remove_dir_all(&dir)?;
    result
}

fn story(args: &Args, dir: &Path) -> Outcome<Option<Cluster>> {
    let options = Options {
        protocol: args.protocol,
        disk_bytes: DISK_BYTES,
        extra: String::new(),
        ports: None,
        ublk: ublk_usable(),
    };
    say(&format!(
        "Two nodes, alice and bob, on this machine; a sparse file of {} each; protocol {}.",
        mib(DISK_BYTES),
        args.protocol
    ));
    let mut cluster = Cluster::new(dir, &args.program, &options)?;
    for node in 0..2 {
        cluster.create_md(node)?;
        cluster.start(node)?;
        cluster.must(node, ["up", RESOURCE])?;
    }
    say("create-md and up on both: DRBD 8.4 metadata written, daemons connected, nobody's data good yet.");
    cluster.wait(0, "the connection", 20, |status| {
        status["connections"][0]["connection-state"] == "Connected"
    })?;

    let begun = now();
    cluster.must(0, ["primary", "--force", RESOURCE])?;
    let status = cluster.wait_in_sync(0, 60)?;
    let usable = status["devices"][0]["size"].as_u64().unwrap_or(0) * 1024;
    say(&format!(
        "primary --force on alice: her data counts. First full sync of {} took {:.2} s (holes travel as notes, not as data).",
        mib(usable),
        begun.elapsed().as_secs_f64()
    ));

    if let Target::Device(path) = cluster.target(0) {
        say(&format!("The disk on alice is {}, a ublk device.", path.display()));
    }
    let image = filesystem(&cluster, dir)?;

    let first = FILESYSTEM_BYTES / BLOCK as u64;
    let blocks = usize::try_from(LOAD_BYTES / BLOCK as u64)?;
    let load = Running::start(Load::new(first, blocks, 42), cluster.target(0), DEPTH);
    say(&format!(
        "Verified load on alice: random 4 KiB writes, {DEPTH} in flight, each block says its number and version."
    ));
    pause(Duration::from_secs(3));
    let pid = cluster.pid(0).unwrap_or(0);
    cluster.kill(0)?;
    let died = now();
    let (mut load, broke) = load.finish(false);
    let ended = broke.err().map_or_else(|| "ended".into(), |error| error.to_string());
    say(&format!(
        "kill -9 of alice (pid {pid}) in the middle of it: {} writes were acknowledged to {} blocks; the client sees \"{ended}\".",
        load.acked,
        load.blocks_written()
    ));

    cluster.must(1, ["primary", RESOURCE])?;
    let mut client = open_soon(&cluster, 1)?;
    let mut block = vec![0; BLOCK];
    client.read_at(0, &mut block)?;
    drop(client);
    say(&format!(
        "primary on bob: he serves the disk {:.0} ms after the kill.",
        died.elapsed().as_secs_f64() * 1e3
    ));

    let wrong = load.check(&cluster.target(1), args.protocol == 'A')?;
    if let Some(first) = wrong.first() {
        return Err(format!("{} blocks are wrong on bob, first: {first}", wrong.len()).into());
    }
    let promised = if args.protocol == 'A' {
        "no block is torn or foreign"
    } else {
        "every acknowledged write is there"
    };
    say(&format!("All {blocks} blocks read back from bob and compared: {promised}."));
    if let Some(image) = &image {
        compare_filesystem(&cluster, dir, image)?;
    }

    let running = Running::start(load, cluster.target(1), DEPTH);
    pause(Duration::from_secs(1));
    let (mut load, result) = running.finish(true);
    let alone = result?;
    let marked = cluster.status(1).map_or(0, |status| number(&status, "out-of-sync")) * 1024;
    say(&format!("bob goes on alone: {alone} more writes. Marked as not on alice: {}.", mib(marked)));

    cluster.start(0)?;
    let begun = now();
    cluster.must(0, ["up", RESOURCE])?;
    cluster.wait_in_sync(1, 60)?;
    let status = cluster.wait_in_sync(0, 60)?;
    let received = number(&status, "received") * 1024;
    say(&format!(
        "alice comes back: quick-sync copied {} of {} ({:.1} %) in {:.2} s: what was marked, and the extents hot when she died.",
        mib(received),
        mib(usable),
        received as f64 * 100.0 / usable as f64,
        begun.elapsed().as_secs_f64()
    ));
    let wrong = load.check(&cluster.target(1), false)?;
    if let Some(first) = wrong.first() {
        return Err(format!("{} blocks are wrong after the resync, first: {first}", wrong.len()).into());
    }
    match cluster.first_difference(usable)? {
        None => say(&format!("Both backing files compared byte by byte: {} equal.", mib(usable))),
        Some(at) => return Err(format!("the disks differ at byte {at}").into()),
    }
    if args.keep {
        return Ok(Some(cluster));
    }
    for node in [1, 0] {
        cluster.must(node, ["down", RESOURCE])?;
    }
    say("down on both: metadata clean, nothing left behind.");
    Ok(None)
}

/// Puts an ext4 filesystem with real files on the disk; `None` when mke2fs is not there.
fn filesystem(cluster: &Cluster, dir: &Path) -> Outcome<Option<PathBuf>> {
    let image = dir.join("filesystem.img");
    let Some((files, bytes)) = tree::make_image(dir, &image, FILESYSTEM_BYTES)? else {
        say("(no mke2fs on this machine: the filesystem part is left out)");
        return Ok(None);
    };
    let data = std::fs::read(&image)?;
    let mut client = open_soon(cluster, 0)?;
    let size = client.size()?;
    if size < bytes_needed(&data) {
        return Err(format!("the disk has only {}", mib(size)).into());
    }
    client.write_and_flush(0, &data)?;
    say(&format!(
        "An ext4 filesystem with {files} real files ({}) copied in through alice's disk, flushed.",
        mib(bytes)
    ));
    Ok(Some(image))
}

const fn bytes_needed(data: &[u8]) -> u64 {
    data.len() as u64 + LOAD_BYTES
}

fn compare_filesystem(cluster: &Cluster, dir: &Path, image: &Path) -> Outcome<()> {
    let expected = std::fs::read(image)?;
    let mut found = vec![0; expected.len()];
    cluster.target(1).open()?.read_at(0, &mut found)?;
    if let Some(at) = expected.iter().zip(&found).position(|(a, b)| a != b) {
        return Err(format!("the filesystem differs at byte {at}").into());
    }
    let copy = dir.join("from-bob.img");
    std::fs::write(&copy, &found)?;
    let verdict = tree::check_image(&copy)?;
    say(&format!("The filesystem on bob is the same, byte by byte; {verdict}."));
    Ok(())
}

/// The disk appears a moment after the promotion.
fn open_soon(cluster: &Cluster, node: usize) -> Outcome<Open> {
    let begun = now();
    loop {
        match cluster.target(node).open() {
            Ok(open) => return Ok(open),
            Err(error) if begun.elapsed() > Duration::from_secs(10) => return Err(Box::new(error)),
            Err(_) => pause(Duration::from_millis(5)),
        }
    }
}

/// Root, a kernel with the driver loaded, and a program built for it.
fn ublk_usable() -> bool {
    cfg!(feature = "ublk") && nix::unistd::geteuid().is_root() && Path::new("/dev/ublk-control").exists()
}

fn keep_hint(args: &Args, cluster: &Cluster) {
    let program = args.program.display();
    say("\nStill up. In another terminal:");
    for node in &cluster.nodes {
        say(&format!("  {program} --run-dir {} status", node.run_dir.display()));
    }
    say(&format!("  nbdinfo 'nbd+unix:///{RESOURCE}?socket={}'", cluster.nbd_socket(1).display()));
    say(&format!(
        "  kill -9 {}    # bob, who is Primary; then: {program} --run-dir {} primary {RESOURCE}",
        cluster.pid(1).unwrap_or(0),
        cluster.nodes[0].run_dir.display()
    ));
    say("Enter ends it.");
}

fn wait_for_enter() {
    let mut line = String::new();
    // End of input ends it as well.
    let _read = std::io::stdin().read_line(&mut line);
}
