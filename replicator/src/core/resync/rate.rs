//! How fast a resync or a verify may go (SEM §19.2). Pure numbers: no knowledge of the rest.
//!
//! | configuration | what limits |
//! |---|---|
//! | no knob set | [`Window`]: bandwidth times delay, and [`Foreground`]: the application's latency |
//! | `c-plan-ahead` and its family | [`Planner`]: DRBD's controller, and [`Throttle`] |
//! | `c-plan-ahead 0`, `resync-rate` | a fixed amount per tick, and [`Throttle`] |
//!
//! The bound of the default: while a resync runs, the 99th percentile of the application's writes stays
//! below [`Foreground::bound_ns`], twice what it was without one and never less than 5 ms, as far as
//! shrinking the window down to 64 KiB in flight can achieve that. Below `c-min-rate` nothing shrinks
//! any more and one request is always allowed, so a resync ends whatever the application does.
use crate::core::config::{RateControl, ResyncConfig};
use crate::units::{SECTORS_PER_BIT, Time};
use std::collections::VecDeque;

/// Between two looks at a running resync.
pub(in crate::core) const TICK_MS: u64 = 100;
/// Data in flight at most, and what a window starts with, sectors.
const MAX_WINDOW: u64 = 16 * 2048;
const START_WINDOW: u64 = 2048;
/// The window the application's latency cannot push below, sectors.
const MIN_WINDOW: u64 = 128;
/// How much a window pressed by the application grows per tick, sectors.
const WINDOW_STEP: u64 = 64;
/// Largest request, sectors.
const MAX_REQUEST: u64 = lockstep_proto::limits::MAX_REQUEST_SECTORS;
/// Ticks over which the best rate is remembered, and how long the shortest delay is.
const RATE_TICKS: usize = 10;
const DELAY_EPOCH_MS: u64 = 10_000;
/// Below this a latency is nobody's concern; the bound when nothing is known yet.
const LATENCY_FLOOR_NS: u64 = 5_000_000;
const LATENCY_UNKNOWN_NS: u64 = 10_000_000;
/// Fewer samples than this say nothing about an idle baseline.
const BASELINE_SAMPLES: u64 = 100;
/// Progress marks of the throttle.
const MARK_MS: u64 = 3_000;
/// Application IO since the last look that counts as activity, sectors.
const ACTIVITY_SECTORS: u64 = 64;

const _: () = assert!(MIN_WINDOW >= SECTORS_PER_BIT && MIN_WINDOW <= START_WINDOW);

/// Sectors per tick of a rate in KiB/s.
const fn per_tick(kib_s: u64) -> u64 {
    kib_s * 2 * TICK_MS / 1000
}

// ---- DRBD's controller --------------------------------------------------------------------------

/// DRBD's plan-ahead controller, one step per tick of 100 ms. Amounts are sectors.
#[derive(Clone, Debug)]
pub(in crate::core) struct Planner {
    plan: VecDeque<i64>,
    total: i64,
    in_flight: i64,
    /// Ticks in which nothing was allowed although nothing was in flight.
    starved: u64,
}

fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX / 4).min(i64::MAX / 4)
}

impl Planner {
    /// With `c-plan-ahead` steps.
    pub(in crate::core) fn new(cfg: &ResyncConfig) -> Self {
        let steps = usize::try_from(cfg.plan_ahead_ds).unwrap_or(1).max(1);
        Self { plan: std::iter::repeat_n(0, steps).collect(), total: 0, in_flight: 0, starved: 0 }
    }

    /// `arrived` sectors came since the last tick: how many 4 KiB blocks may be asked for now.
    pub(in crate::core) fn tick(&mut self, arrived: u64, cfg: &ResyncConfig, max_buffers: u64) -> u64 {
        let arrived = signed(arrived);
        let steps = signed(self.plan.len() as u64);
        let before = self.in_flight;
        self.in_flight = (before - arrived).max(0);
        let want = if before == 0 {
            signed(per_tick(cfg.rate_kib_s)) * steps
        } else if cfg.fill_target_sectors != 0 {
            signed(cfg.fill_target_sectors)
        } else {
            arrived * signed(cfg.delay_target_ds)
        };
        let correction = want - self.in_flight - self.total;
        let per_step = correction / steps;
        for step in &mut self.plan {
            *step += per_step;
        }
        self.total += per_step * steps;
        let now = self.plan.pop_front().unwrap_or(0);
        self.plan.push_back(0);
        self.total -= now;
        let most = cfg.max_rate_kib_s.map_or(i64::MAX, |rate| signed(per_tick(rate)));
        let wanted = (arrived + now).clamp(0, most);
        let room = signed(max_buffers / 2) - self.in_flight / 8;
        let blocks = u64::try_from((wanted / 8).min(room)).unwrap_or(0);
        self.never_starve(blocks, cfg)
    }

    /// Rates below one block per tick still get one block now and then.
    fn never_starve(&mut self, blocks: u64, cfg: &ResyncConfig) -> u64 {
        if blocks > 0 || self.in_flight > 0 {
            self.starved = 0;
            return blocks;
        }
        self.starved += 1;
        let rate = cfg.max_rate_kib_s.unwrap_or(u64::MAX).min(cfg.rate_kib_s).max(1);
        if self.starved * TICK_MS * rate < 4 * 1000 {
            return 0;
        }
        self.starved = 0;
        1
    }

    /// So much was asked for.
    pub(in crate::core) fn asked(&mut self, sectors: u64) {
        self.in_flight += signed(sectors);
    }
}

/// Whether a resync steps back for the application (`c-min-rate`): the disk shows other activity and
/// the resync was faster than the minimum of late.
#[derive(Clone, Debug)]
pub(in crate::core) struct Throttle {
    /// When, and blocks left then; newest last.
    marks: VecDeque<(Time, u64)>,
    activity: u64,
}

impl Throttle {
    /// From now on.
    pub(in crate::core) fn new(now: Time, blocks_left: u64, activity: u64) -> Self {
        Self { marks: VecDeque::from([(now, blocks_left)]), activity }
    }

    /// `activity`: sectors of application IO on this disk, counted from any start.
    pub(in crate::core) fn holds(
        &mut self,
        now: Time,
        blocks_left: u64,
        activity: u64,
        min_kib_s: u64,
    ) -> bool {
        if self.marks.back().is_none_or(|(at, _)| now.ms_since(*at) >= MARK_MS) {
            self.marks.push_back((now, blocks_left));
            while self.marks.len() > 3 {
                self.marks.pop_front();
            }
        }
        let busy = activity.saturating_sub(self.activity) > ACTIVITY_SECTORS;
        self.activity = activity;
        if min_kib_s == 0 || !busy {
            return false;
        }
        let Some((since, left)) = self.marks.front() else { return false };
        let kib = left.saturating_sub(blocks_left) * 4;
        kib * 1000 / now.ms_since(*since).max(1) > min_kib_s
    }
}

// ---- the default --------------------------------------------------------------------------------

/// How much may be in flight so that the link and the disks are busy and no queue grows: twice the
/// best recent rate times the shortest recent delay.
#[derive(Clone, Debug)]
pub(in crate::core) struct Window {
    sectors: u64,
    delivered: u64,
    ticked: Time,
    /// Sectors per second of the last ticks.
    rates: VecDeque<u64>,
    /// Shortest delay of this epoch and of the one before, ns.
    delays: [Option<u64>; 2],
    epoch: Time,
}

impl Window {
    /// From now on.
    pub(in crate::core) const fn new(now: Time) -> Self {
        Self {
            sectors: START_WINDOW,
            delivered: 0,
            ticked: now,
            rates: VecDeque::new(),
            delays: [None; 2],
            epoch: now,
        }
    }

    /// A request came to its end.
    pub(in crate::core) fn done(&mut self, sectors: u64, delay_ns: u64) {
        self.delivered += sectors;
        let shortest = &mut self.delays[0];
        *shortest = Some(shortest.map_or(delay_ns, |known| known.min(delay_ns)));
    }

    /// A look at the last tick.
    pub(in crate::core) fn tick(&mut self, now: Time) {
        let elapsed = now.0.saturating_sub(self.ticked.0);
        if elapsed == 0 {
            return;
        }
        self.ticked = now;
        let delivered = std::mem::take(&mut self.delivered);
        let rate = u128::from(delivered) * 1_000_000_000 / u128::from(elapsed);
        self.rates.push_back(u64::try_from(rate).unwrap_or(u64::MAX));
        if self.rates.len() > RATE_TICKS {
            self.rates.pop_front();
        }
        if now.ms_since(self.epoch) >= DELAY_EPOCH_MS {
            self.epoch = now;
            self.delays = [None, self.delays[0].or(self.delays[1])];
        }
        let best = self.rates.iter().max().copied().unwrap_or(0);
        let Some(delay) = self.delays.iter().flatten().min() else { return };
        let product = u128::from(best) * u128::from(*delay) * 2 / 1_000_000_000;
        self.sectors = u64::try_from(product).unwrap_or(MAX_WINDOW).clamp(START_WINDOW, MAX_WINDOW);
    }

    /// Sectors that may be in flight.
    pub(in crate::core) const fn sectors(&self) -> u64 {
        self.sectors
    }
}

/// Latencies in classes a quarter of an octave wide.
#[derive(Clone, Debug)]
struct Histogram {
    counts: Vec<u32>,
    total: u64,
}

/// Latencies below 1 us and above 68 s are put into the first and last class.
const OCTAVES: u32 = 26;
const LOWEST_BIT: u32 = 10;

impl Histogram {
    fn new() -> Self {
        Self { counts: vec![0; (OCTAVES * 4) as usize], total: 0 }
    }

    fn add(&mut self, ns: u64) {
        let bit = (63 - ns.max(1).leading_zeros()).clamp(LOWEST_BIT, LOWEST_BIT + OCTAVES - 1);
        let quarter = usize::try_from(ns >> (bit - 2) & 3).unwrap_or(0);
        let class = ((bit - LOWEST_BIT) * 4) as usize + quarter;
        if let Some(count) = self.counts.get_mut(class) {
            *count += 1;
            self.total += 1;
        }
    }

    fn halve(&mut self) {
        self.total = 0;
        for count in &mut self.counts {
            *count /= 2;
            self.total += u64::from(*count);
        }
    }

    fn clear(&mut self) {
        self.counts.fill(0);
        self.total = 0;
    }

    /// Upper edge of the class that holds the 99th percentile, ns.
    fn p99(&self) -> Option<u64> {
        let rank = (self.total * 99).div_ceil(100);
        let mut seen = 0;
        for (class, count) in self.counts.iter().enumerate() {
            seen += u64::from(*count);
            if seen >= rank && *count > 0 {
                let bit = LOWEST_BIT + u32::try_from(class / 4).unwrap_or(0);
                return Some((1_u64 << bit) + ((class as u64 % 4 + 1) << (bit - 2)));
            }
        }
        None
    }
}

/// What the application's writes on this node feel: a limit on the resync in flight, grown slowly and
/// halved as soon as the latency leaves its bound (additive increase, multiplicative decrease).
#[derive(Clone, Debug)]
pub(in crate::core) struct Foreground {
    idle: Histogram,
    recent: Histogram,
    limit: u64,
}

impl Default for Foreground {
    fn default() -> Self {
        Self { idle: Histogram::new(), recent: Histogram::new(), limit: START_WINDOW }
    }
}

impl Foreground {
    /// A write of the application completed.
    pub(in crate::core) fn write_done(&mut self, latency_ns: u64, resyncing: bool) {
        if resyncing {
            self.recent.add(latency_ns);
        } else {
            self.idle.add(latency_ns);
            if self.idle.total > 4096 {
                self.idle.halve();
            }
        }
    }

    /// A resync begins: careful at first.
    pub(in crate::core) fn begin(&mut self) {
        self.recent.clear();
        self.limit = START_WINDOW;
    }

    /// What the 99th percentile may be while a resync runs, ns.
    pub(in crate::core) fn bound_ns(&self) -> u64 {
        if self.idle.total < BASELINE_SAMPLES {
            return LATENCY_UNKNOWN_NS;
        }
        self.idle.p99().map_or(LATENCY_UNKNOWN_NS, |p99| p99.saturating_mul(2)).max(LATENCY_FLOOR_NS)
    }

    /// One look per tick; `rate_kib_s` is what the resync makes now.
    pub(in crate::core) fn tick(&mut self, rate_kib_s: u64, min_kib_s: u64) {
        match self.recent.p99() {
            None => self.limit = (self.limit * 2).min(MAX_WINDOW),
            Some(p99) if p99 > self.bound_ns() => {
                if rate_kib_s > min_kib_s {
                    self.limit = (self.limit / 2).max(MIN_WINDOW);
                }
                // What was felt under the old limit says nothing about the new one.
                self.recent.clear();
            }
            Some(_) => {
                self.limit = (self.limit + WINDOW_STEP).min(MAX_WINDOW);
                self.recent.halve();
            }
        }
    }

    /// Sectors of resync that may be in flight.
    pub(in crate::core) const fn limit(&self) -> u64 {
        self.limit
    }
}

// ---- put together -------------------------------------------------------------------------------

/// The pace of one resync or verify, kept by the node that asks.
#[derive(Clone, Debug)]
pub(in crate::core) struct Pace {
    cfg: ResyncConfig,
    /// `max-buffers`, in blocks of 4 KiB.
    max_buffers: u64,
    window: Window,
    planner: Planner,
    throttle: Throttle,
    /// Sectors that may still be asked for in this tick.
    budget: u64,
    /// KiB x 1000 of a fixed rate that did not make a whole block yet.
    carry: u64,
    arrived: u64,
    in_flight: u64,
    /// Done in the last ticks, for the current rate.
    recent: VecDeque<(Time, u64)>,
    done: u64,
}

impl Pace {
    /// Starts with a first tick's worth.
    pub(in crate::core) fn new(
        cfg: &ResyncConfig,
        max_buffers: u64,
        now: Time,
        blocks_left: u64,
        activity: u64,
    ) -> Self {
        let mut pace = Self {
            cfg: cfg.clone(),
            max_buffers,
            window: Window::new(now),
            planner: Planner::new(cfg),
            throttle: Throttle::new(now, blocks_left, activity),
            budget: 0,
            carry: 0,
            arrived: 0,
            in_flight: 0,
            recent: VecDeque::from([(now, 0)]),
            done: 0,
        };
        pace.refill();
        pace
    }

    fn refill(&mut self) {
        let arrived = std::mem::take(&mut self.arrived);
        self.budget = match self.cfg.control {
            RateControl::Adaptive => self.cfg.max_rate_kib_s.map_or(u64::MAX, |rate| self.fixed(rate)),
            RateControl::Planned => self.planner.tick(arrived, &self.cfg, self.max_buffers) * SECTORS_PER_BIT,
            RateControl::Fixed => self.fixed(self.cfg.rate_kib_s),
        };
    }

    /// Whole blocks of a fixed rate; what is left over counts in the next tick.
    fn fixed(&mut self, kib_s: u64) -> u64 {
        self.carry += kib_s.saturating_mul(TICK_MS);
        let blocks = self.carry / 4000;
        self.carry -= blocks * 4000;
        blocks * SECTORS_PER_BIT
    }

    /// Every 100 ms. `activity`: sectors of application IO on this disk so far.
    pub(in crate::core) fn tick(&mut self, now: Time, blocks_left: u64, activity: u64) {
        self.window.tick(now);
        self.recent.push_back((now, self.done));
        while self.recent.len() > RATE_TICKS {
            self.recent.pop_front();
        }
        let holds = self.throttle.holds(now, blocks_left, activity, self.cfg.min_rate_kib_s);
        self.refill();
        // The default watches the latency itself.
        if holds && self.cfg.control != RateControl::Adaptive {
            self.budget = 0;
        }
    }

    /// The largest request that may be made now, `None` = wait. `limit`: what the application's latency
    /// on either node allows in flight.
    pub(in crate::core) fn next_request(&self, limit: u64) -> Option<u64> {
        let (allowed, largest) = match self.cfg.control {
            RateControl::Adaptive => {
                let window = self.window.sectors().min(limit).max(MIN_WINDOW);
                // Small windows in small pieces: several in flight, and none of them long.
                let piece = (window / 4).clamp(MIN_WINDOW, MAX_REQUEST);
                (window, 1 << piece.ilog2())
            }
            RateControl::Planned | RateControl::Fixed => {
                (self.max_buffers / 2 * SECTORS_PER_BIT, MAX_REQUEST)
            }
        };
        let free = self.budget >= SECTORS_PER_BIT && (self.in_flight < allowed || self.in_flight == 0);
        free.then_some(largest.min(self.budget) / SECTORS_PER_BIT * SECTORS_PER_BIT)
    }

    /// A request was made.
    pub(in crate::core) fn asked(&mut self, sectors: u64) {
        self.in_flight += sectors;
        self.planner.asked(sectors);
        if self.budget != u64::MAX {
            self.budget = self.budget.saturating_sub(sectors);
        }
    }

    /// The answer came.
    pub(in crate::core) fn arrived(&mut self, sectors: u64) {
        self.arrived += sectors;
    }

    /// The request is over.
    pub(in crate::core) fn done(&mut self, sectors: u64, asked_at: Time, now: Time) {
        self.in_flight = self.in_flight.saturating_sub(sectors);
        self.done += sectors;
        self.window.done(sectors, now.0.saturating_sub(asked_at.0));
    }

    /// Asked for and not over, sectors.
    pub(in crate::core) const fn in_flight(&self) -> u64 {
        self.in_flight
    }

    /// Rate of the last second, KiB/s.
    pub(in crate::core) fn rate_kib_s(&self) -> u64 {
        let (Some((first, from)), Some((last, to))) = (self.recent.front(), self.recent.back()) else {
            return 0;
        };
        (to - from) / 2 * 1000 / last.ms_since(*first).max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn planned() -> ResyncConfig {
        ResyncConfig {
            control: RateControl::Planned,
            max_rate_kib_s: Some(102_400),
            ..ResyncConfig::default()
        }
    }

    fn at(ms: u64) -> Time {
        Time(0).plus_ms(ms)
    }

    #[test]
    fn the_controller_follows_its_formula_step_by_step() {
        // Worked by hand: 20 steps, start 250 KiB/s = 50 sectors per tick, then a fill target of 100.
        let cfg = planned();
        let mut planner = Planner::new(&cfg);
        // want 1000, correction 1000, 50 per step; req 50 -> 6 blocks.
        assert_eq!(planner.tick(0, &cfg, 2048), 6);
        planner.asked(48);
        // 48 came: nothing in flight, want 100, plan 950: correction -850, -42 per step; now 8; req 56.
        assert_eq!(planner.tick(48, &cfg, 2048), 7);
        assert_eq!(planner.total, 950 - 42 * 20 - 8);
        planner.asked(56);
        // Nothing came: want 100, in flight 56, plan 102: correction -58, -2 per step; now 6; req 6.
        assert_eq!(planner.tick(0, &cfg, 2048), 0);
        assert_eq!(planner.total, 102 - 40 - 6);
    }

    #[test]
    fn without_a_fill_target_the_delay_counts() {
        let cfg = ResyncConfig { fill_target_sectors: 0, delay_target_ds: 10, plan_ahead_ds: 1, ..planned() };
        let mut planner = Planner::new(&cfg);
        planner.asked(1000);
        // want 100 * 10, in flight 900: 100 more; req 200.
        assert_eq!(planner.tick(100, &cfg, 1 << 20), 25);
    }

    #[test]
    fn the_controller_respects_rate_and_buffers() {
        let cfg = ResyncConfig { rate_kib_s: 1_000_000, plan_ahead_ds: 1, ..planned() };
        let mut planner = Planner::new(&cfg);
        assert_eq!(planner.clone().tick(0, &cfg, 1 << 20), per_tick(102_400) / 8);
        assert_eq!(planner.tick(0, &cfg, 100), 50, "half the buffers");
    }

    #[test]
    fn the_slowest_rate_still_moves() {
        for control in [RateControl::Fixed, RateControl::Planned] {
            let cfg = ResyncConfig { control, rate_kib_s: 1, ..planned() };
            let mut pace = Pace::new(&cfg, 2048, at(0), 1000, 0);
            let mut blocks = 0;
            for tick in 1..=200 {
                pace.tick(at(tick * TICK_MS), 1000, 0);
                if let Some(sectors) = pace.next_request(u64::MAX) {
                    pace.asked(sectors);
                    pace.arrived(sectors);
                    pace.done(sectors, at(tick * TICK_MS), at(tick * TICK_MS));
                    blocks += sectors / 8;
                }
            }
            assert!(blocks >= 4, "{control:?}: {blocks} blocks in 20 s");
        }
    }

    #[test]
    fn a_fixed_rate_is_exact_in_the_mean() {
        for kib_s in [7, 250, 1003, 40_000] {
            let cfg = ResyncConfig { control: RateControl::Fixed, rate_kib_s: kib_s, ..planned() };
            let mut pace = Pace::new(&cfg, 1 << 20, at(0), 1 << 30, 0);
            let mut kib = 0;
            for tick in 1..=1000 {
                while let Some(sectors) = pace.next_request(u64::MAX) {
                    pace.asked(sectors);
                    pace.done(sectors, at(0), at(1));
                    kib += sectors / 2;
                }
                pace.tick(at(tick * TICK_MS), 1 << 30, 0);
            }
            assert!(kib.abs_diff(kib_s * 100) <= 4, "{kib} KiB in 100 s at {kib_s} KiB/s");
        }
    }

    #[test]
    fn the_throttle_needs_activity_and_speed() {
        let mut throttle = Throttle::new(at(0), 100_000, 0);
        // 1 MiB/s while the application writes: above 250 KiB/s.
        assert!(throttle.holds(at(1000), 99_744, 1000, 250));
        assert!(!throttle.holds(at(1100), 99_744, 1010, 250), "no activity since");
        assert!(!throttle.holds(at(1200), 99_744, 9000, 0), "switched off");
        // Slower than the minimum: never.
        let mut throttle = Throttle::new(at(0), 100_000, 0);
        assert!(!throttle.holds(at(1000), 99_990, 1000, 250));
    }

    #[test]
    fn the_window_follows_bandwidth_times_delay() {
        // A link of 100 MiB/s (204800 sectors/s) with 20 ms: the product is 4096 sectors, the window twice that.
        let mut window = Window::new(at(0));
        for tick in 1..=20_u64 {
            let rate = (window.sectors() * 50).min(204_800);
            window.done(rate / 10, 20_000_000);
            window.tick(at(tick * 100));
        }
        assert_eq!(window.sectors(), 8192);
    }

    /// A disk that serves in order at a fixed speed, with the application and a resync in its queue.
    /// Returns the application's worst 99th percentile after a settling time and the resync's share.
    fn shared_disk(sectors_per_ms: u64, guard: bool, write_every_ms: u64) -> (u64, u64, u64) {
        let cfg = ResyncConfig::default();
        let mut foreground = Foreground::default();
        for _ in 0..1000 {
            foreground.write_done(8 * 1_000_000 / sectors_per_ms, false);
        }
        foreground.begin();
        let mut pace = Pace::new(&cfg, 2048, at(0), 1 << 30, 0);
        let mut free_at = 0_u64;
        let mut open: VecDeque<(u64, u64, u64)> = VecDeque::new();
        let (mut copied, mut latencies) = (0, Vec::new());
        for ms in 0..60_000_u64 {
            let now = ms * 1_000_000;
            while open.front().is_some_and(|(ends, ..)| *ends <= now) {
                if let Some((ends, asked, sectors)) = open.pop_front() {
                    pace.arrived(sectors);
                    pace.done(sectors, Time(asked), Time(ends));
                    copied += sectors;
                }
            }
            let limit = if guard { foreground.limit() } else { u64::MAX };
            while let Some(sectors) = pace.next_request(limit) {
                pace.asked(sectors);
                free_at = free_at.max(now) + sectors * 1_000_000 / sectors_per_ms;
                open.push_back((free_at, now, sectors));
            }
            if ms % write_every_ms == 0 {
                free_at = free_at.max(now) + 8 * 1_000_000 / sectors_per_ms;
                foreground.write_done(free_at - now, true);
                if ms > 10_000 {
                    latencies.push(free_at - now);
                }
            }
            if ms % TICK_MS == 0 {
                pace.tick(Time(now), 1 << 30, 0);
                foreground.tick(pace.rate_kib_s(), cfg.min_rate_kib_s);
            }
        }
        latencies.sort_unstable();
        (latencies[latencies.len() * 99 / 100], foreground.bound_ns(), copied / 2 / 60)
    }

    #[test]
    fn the_default_keeps_the_foreground_within_its_bound_and_moves_on() {
        // 100 MB/s, 25 MB/s: without the guard the window alone makes the application wait far longer.
        for sectors_per_ms in [200, 50] {
            let (p99, bound, kib_s) = shared_disk(sectors_per_ms, true, 5);
            assert!(p99 <= bound + bound / 2, "{sectors_per_ms}: p99 {p99} ns, bound {bound} ns");
            assert!(kib_s > 250, "{kib_s} KiB/s");
            let (unguarded, ..) = shared_disk(sectors_per_ms, false, 5);
            assert!(unguarded > p99 * 2, "{sectors_per_ms}: unguarded {unguarded} ns, guarded {p99} ns");
        }
    }

    #[test]
    fn a_disk_that_is_always_too_slow_still_gets_its_minimum() {
        // 1 MB/s: no window keeps the bound; the resync goes on at the minimum rate or above.
        let (_, _, kib_s) = shared_disk(2, true, 100);
        assert!(kib_s >= 100, "{kib_s} KiB/s");
    }

    #[test]
    fn a_percentile_is_right_within_a_class() {
        let mut histogram = Histogram::new();
        for us in 1..=1000 {
            histogram.add(us * 1000);
        }
        let p99 = histogram.p99().unwrap();
        assert!((990_000..1_300_000).contains(&p99), "{p99}");
        assert_eq!(Histogram::new().p99(), None);
    }
}
