//! A deterministic world for two nodes: one seed, one run, the same run again for the same seed.
//!
//! | file | holds |
//! |---|---|
//! | `world.rs` | event heap, virtual clock, the runtime's part of the boundary |
//! | `options.rs` | what a world is made of |
//! | `device_io.rs` | how long an IO takes, whether it fails, what it leaves |
//! | `net.rs` | the network, and how it fails |
//! | `node.rs` | one node: core, buffers, crash and restart |
//! | `disk.rs`, `meta_area.rs` | backing disk with a volatile cache, metadata in real bytes, and how they fail |
//! | `real_area.rs` | metadata at its real place, on devices that grow |
//! | `blocks.rs` | sets of blocks: what has changed since it was last looked at |
//! | `history/` | what each node may hold, from what the application was told |
//! | `oracle.rs` | what must be true, and when it is looked at |
//! | `marks.rs` | where the copies differ, and whether it is marked |
//! | `plan.rs`, `run.rs` | random runs: options and actions from the seed, the two phases |
//! | `mixed.rs`, `extra.rs` | rarer features laid over a plan, and how they are carried out |
//! | `orders.rs` | a test picks what happens next |
//! | `minimise.rs` | makes a failing plan smaller |
//!
//! Processes: a node may be killed (its disk keeps all completed writes, those in flight happen or not,
//! piece by piece) or lose power (any subset of the unflushed writes is lost too), alone or both at once,
//! also at its n-th metadata write, and come back with other options. Operators type verbs at any moment.
//! At most one node is Primary unless an operator of the run makes it so on purpose.
pub mod blocks;
mod device_io;
pub mod disk;
mod extra;
pub mod history;
mod marks;
pub mod meta_area;
pub mod minimise;
pub mod mixed;
pub mod net;
pub mod node;
pub mod options;
pub mod oracle;
pub mod orders;
pub mod plan;
pub mod real_area;
pub mod run;
pub mod script;
pub mod world;

pub use options::Options;
pub use world::World;

/// One random run without the features of `mixed.rs`; `Err` says what was wrong, with the seed in it. A panic
/// counts, too.
///
/// # Errors
/// A promise was broken; the text names it.
pub fn run_seed(seed: u64) -> Result<run::Summary, String> {
    run_plan(&plan::draw(seed))
}

/// Carries out a plan; a panic is a broken promise like any other.
///
/// # Errors
/// A promise was broken; the text names it.
pub fn run_plan(plan: &plan::Plan) -> Result<run::Summary, String> {
    static QUIET: std::sync::Once = std::sync::Once::new();
    thread_local! {
        /// What the last panic of this thread said, while a run is on.
        static PANIC: std::cell::RefCell<Option<String>> = const { std::cell::RefCell::new(None) };
    }
    QUIET.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            let caught = PANIC.with_borrow_mut(|slot| {
                if let Some(text) = slot {
                    *text = info.to_string();
                }
                slot.is_some()
            });
            if !caught {
                before(info);
            }
        }));
    });
    PANIC.set(Some(String::new()));
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run::run(plan)));
    let text = PANIC.take().unwrap_or_default();
    result.unwrap_or_else(|_| Err(format!("{}: {text}", plan.options.name())))
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
