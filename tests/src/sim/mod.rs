//! A deterministic world for two nodes: one seed, one run, the same run again for the same seed.
//!
//! | file | holds |
//! |---|---|
//! | `world.rs` | event heap, virtual clock, network, what the cores ask for |
//! | `node.rs` | one node: core, buffers, crash and restart |
//! | `disk.rs` | backing disk with a volatile cache, metadata area, replay |
//! | `real_area.rs` | metadata in its real bytes, on devices that grow |
//! | `workload.rs` | the application and the operator of a random run |
//! | `checkers.rs` | what must be true, from the simulated disks |
//!
//! Fault model: a transport may end at any moment and loses what is in flight, each side notices at
//! its own time; a node may be killed (its disk keeps all completed writes, those in flight happen or
//! not, block by block) or lose power (any subset of the unflushed writes is lost too); a data IO may
//! fail. A metadata write in flight at a crash is old or new per block. At most one node is Primary
//! unless a test makes both so on purpose.
pub mod checkers;
pub mod disk;
pub mod node;
pub mod real_area;
pub mod workload;
pub mod world;

pub use world::{Options, World};

/// One run of the random workload; `Err` says what was wrong, with the seed in it.
///
/// # Errors
/// A promise was broken; the text names it.
pub fn run_seed(seed: u64) -> Result<workload::Summary, String> {
    workload::run(seed, false)
}

/// Small generator (splitmix64): all randomness of a run comes from one of these.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// A generator for this seed.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `limit` (0 when that is 0).
    pub const fn below(&mut self, limit: u64) -> u64 {
        if limit == 0 { 0 } else { self.next() % limit }
    }

    /// True in `percent` of a hundred cases.
    pub const fn percent(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}
