//! What a hot write costs the threads that carry it: no allocation, and few sleeps.
//!
//! Counts, not times: they hold on a busy machine, and a change that puts an allocation or another thread on the path of
//! every write is seen at once. Both nodes run in this process; their threads are told apart from the client's by name.
#![cfg(feature = "runtime")]
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::print_stdout,
    reason = "a test: what fails, panics, and the counts are worth seeing"
)]
mod pair;

use lockstep_replicator::frontend::nbd::wire::cmd;
use nix::unistd::gettid;
use pair::{MiniClient, Node, free_address, primary, serve};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicI32, AtomicU64, AtomicUsize, Ordering};

const BLOCK: u64 = 4096;
/// Blocks that are written: they lie in hot extents of the activity log, and the buffers of the pool cover them.
const BLOCKS: u64 = 2048;
const WARM_UP: u64 = 4000;
const MEASURED: u64 = 20_000;
/// A few blocks of memory for a resize of something that grows now and then are no allocation per write.
const MOST_ALLOCATIONS: u64 = MEASURED / 200;

const THREADS: usize = 256;
static NEXT: AtomicUsize = AtomicUsize::new(0);
static THREAD_IDS: [AtomicI32; THREADS] = [const { AtomicI32::new(0) }; THREADS];
static ALLOCATIONS: [AtomicU64; THREADS] = [const { AtomicU64::new(0) }; THREADS];

thread_local! {
    static SLOT: Cell<usize> = const { Cell::new(usize::MAX) };
}

/// The system's allocator, with a count for each thread.
struct Counting;

fn count() {
    // A thread that ends may allocate after its variables are gone.
    let slot = SLOT.try_with(|slot| {
        if slot.get() == usize::MAX {
            slot.set(NEXT.fetch_add(1, Ordering::Relaxed));
            if let Some(id) = THREAD_IDS.get(slot.get()) {
                id.store(gettid().as_raw(), Ordering::Relaxed);
            }
        }
        slot.get()
    });
    if let Some(count) = slot.ok().and_then(|slot| ALLOCATIONS.get(slot)) {
        count.fetch_add(1, Ordering::Relaxed);
    }
}

// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller keeps the contract of this very function.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(block, layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: as above.
        unsafe { System.realloc(block, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Counts of the threads that carry writes, both nodes together.
#[derive(Clone, Copy, Debug)]
struct Counts {
    allocations: u64,
    /// How often they went to sleep to wait for something.
    sleeps: u64,
}

impl Counts {
    fn now() -> Self {
        let (mut allocations, mut sleeps, mut threads) = (0, 0, 0);
        for slot in 0..NEXT.load(Ordering::Relaxed).min(THREADS) {
            let task = format!("/proc/self/task/{}", THREAD_IDS[slot].load(Ordering::Relaxed));
            // A thread that has ended is gone from there.
            let Ok(name) = fs::read_to_string(Path::new(&task).join("comm")) else { continue };
            if name.trim_end() != "res-web" {
                continue;
            }
            threads += 1;
            allocations += ALLOCATIONS[slot].load(Ordering::Relaxed);
            let status = fs::read_to_string(Path::new(&task).join("status")).unwrap();
            let line = status.lines().find(|line| line.starts_with("voluntary_ctxt_switches:")).unwrap();
            sleeps += line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap();
        }
        assert_eq!(threads, 2, "each node has one thread");
        Self { allocations, sleeps }
    }

    fn since(self, before: Self) -> Self {
        Self { allocations: self.allocations - before.allocations, sleeps: self.sleeps - before.sleeps }
    }
}

/// Keeps `depth` writes of a block in flight until `writes` are done.
fn write(client: &mut MiniClient, depth: u64, writes: u64) {
    let block = [7; BLOCK as usize];
    let send = |client: &mut MiniClient, nr: u64| {
        // Every block in an order that is not the disk's.
        let at = nr * 769 % BLOCKS;
        client.request(cmd::WRITE, 0, nr, at * BLOCK, BLOCK as u32, &block);
    };
    (0..depth).for_each(|nr| send(client, nr));
    for nr in depth..writes + depth {
        assert_eq!(client.answer().0, 0);
        if nr < writes {
            send(client, nr);
        }
    }
}

#[tokio::test]
async fn a_hot_write_allocates_nothing_and_wakes_each_thread_a_few_times() {
    // Where disks answer at once, nobody sleeps for them.
    let dir =
        if Path::new("/dev/shm").is_dir() { tempfile::tempdir_in("/dev/shm") } else { tempfile::tempdir() };
    let dir = dir.unwrap();
    let addresses = [free_address(), free_address()];
    let [left, right] = [0, 1].map(|id| Node::start(dir.path(), id, addresses));
    left.up().await;
    right.up().await;
    left.connected().await;
    primary(&left).await;
    let socket = dir.path().join("nbd");
    let server = serve(&left.handle, &socket);
    left.in_sync().await;
    let done = tokio::task::spawn_blocking(move || {
        let mut client = MiniClient::connect(&socket);
        // Sleeps per write and thread: at depth 1 the request and the acks; at depth 32 batches share them.
        for (depth, most_sleeps) in [(1, 4 * MEASURED), (32, MEASURED)] {
            write(&mut client, depth, WARM_UP);
            let before = Counts::now();
            write(&mut client, depth, MEASURED);
            let counts = Counts::now().since(before);
            println!("depth {depth}: {counts:?} for {MEASURED} writes");
            assert!(counts.allocations <= MOST_ALLOCATIONS, "depth {depth}: {counts:?}");
            assert!(counts.sleeps <= 2 * most_sleeps, "depth {depth}: {counts:?}");
        }
        client.request(cmd::DISC, 0, 0, 0, 0, &[]);
    });
    done.await.unwrap();
    server.abort();
    left.down().await;
    right.down().await;
}
