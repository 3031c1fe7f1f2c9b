//! Whether a thread that has nothing to do looks for the next completion for a while before it sleeps.
//!
//! At depth 1 half of a mirrored write is threads waking up. A short look saves that, for CPU time that a sleep and a
//! wake-up would cost as well; but only where what is waited for comes soon. So the thread learns: it spins while that
//! finds something most of the time, stops when it does not, and tries again after a number of waits that were short
//! although both sides slept, twice as many after each try in vain. Long waits, of a disk or a link that is slow or of
//! an application that does little, never make it spin.
//!
//! As many threads of a process spin at once as it has CPUs left: half of them.
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// Where spinning without use ends: each miss counts two, each hit takes one back.
const MOST_MISSES: u8 = 8;
/// Short waits before the first try, and before the last ones.
const FIRST_TRY: u32 = 8;
const LAST_TRY: u32 = 4096;
/// A wait up to this many times the limit is short: with both sides asleep it includes their waking up.
const SHORT_WAIT: u32 = 3;

/// Threads of this process that spin now.
static SPINNING: AtomicUsize = AtomicUsize::new(0);

/// What a thread has learned.
#[derive(Debug)]
pub(super) struct Spinner {
    limit: Duration,
    state: State,
    /// Short waits before the next try.
    next_try: u32,
    most_threads: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    On { misses: u8 },
    Off { waits_left: u32 },
}

/// The right to spin, until it is dropped.
#[derive(Debug)]
pub(super) struct Turn(());

impl Spinner {
    /// Spins for `limit` at most; for zero never. `cpus` is how many there are.
    pub(super) fn new(limit: Duration, cpus: usize) -> Self {
        Self {
            limit,
            state: State::Off { waits_left: FIRST_TRY },
            next_try: FIRST_TRY,
            most_threads: cpus / 2,
        }
    }

    /// Whether waits are to be reported at all.
    pub(super) fn is_used(&self) -> bool {
        !self.limit.is_zero() && self.most_threads > 0
    }

    /// How long to spin, and the right to.
    pub(super) fn begin(&self) -> Option<(Duration, Turn)> {
        let State::On { .. } = self.state else { return None };
        // Only a number of turns: nothing else is ordered by it.
        let others = SPINNING.fetch_add(1, Ordering::Relaxed);
        let turn = Turn(());
        (others < self.most_threads).then_some((self.limit, turn))
    }

    /// A wait is over that took this long; `hit`: it was spun for, and that found something or did not.
    pub(super) fn waited(&mut self, took: Duration, hit: Option<bool>) {
        match (&mut self.state, hit) {
            (State::On { misses }, Some(true)) => {
                *misses = misses.saturating_sub(1);
                if *misses == 0 {
                    self.next_try = FIRST_TRY;
                }
            }
            (State::On { misses }, Some(false)) => {
                *misses += 2;
                if *misses >= MOST_MISSES {
                    self.next_try = (self.next_try * 2).min(LAST_TRY);
                    self.state = State::Off { waits_left: self.next_try };
                }
            }
            (State::Off { waits_left }, _) if took <= self.limit * SHORT_WAIT => {
                *waits_left -= 1;
                if *waits_left == 0 {
                    // On trial.
                    self.state = State::On { misses: MOST_MISSES / 2 };
                }
            }
            // No turn was left, or the wait was long.
            (State::On { .. }, None) | (State::Off { .. }, _) => {}
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        SPINNING.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_micros(30);
    const SHORT: Duration = Duration::from_micros(60);
    const LONG: Duration = Duration::from_millis(3);

    /// What one wait does when the other side answers after `answer`.
    fn wait(spinner: &mut Spinner, answer: Duration) -> Option<bool> {
        let hit = matches!(spinner.state, State::On { .. }).then_some(answer <= spinner.limit);
        spinner.waited(answer, hit);
        hit
    }

    fn spins(spinner: &mut Spinner, waits: u32, answer: Duration) -> u32 {
        (0..waits).map(|_| u32::from(wait(spinner, answer).is_some())).sum()
    }

    #[test]
    fn it_spins_where_answers_come_soon() {
        let mut spinner = Spinner::new(LIMIT, 2);
        assert_eq!(spins(&mut spinner, FIRST_TRY, SHORT), 0);
        assert_eq!(spins(&mut spinner, 1000, Duration::from_micros(20)), 1000);
        // A few that come late do not matter.
        for _ in 0..100 {
            assert_eq!(wait(&mut spinner, LONG), Some(false));
            assert_eq!(spins(&mut spinner, 5, Duration::from_micros(20)), 5);
        }
    }

    #[test]
    fn it_never_spins_for_long_waits() {
        let mut spinner = Spinner::new(LIMIT, 2);
        assert_eq!(spins(&mut spinner, 100_000, LONG), 0);
    }

    #[test]
    fn tries_in_vain_get_rare() {
        let mut spinner = Spinner::new(LIMIT, 2);
        let early = spins(&mut spinner, 1000, SHORT);
        let late = spins(&mut spinner, 100_000, SHORT);
        assert!((4..40).contains(&early), "{early}");
        assert!((10..120).contains(&late), "{late} of 100000");
        // And it still learns.
        assert!(spins(&mut spinner, 3 * LAST_TRY, SHORT) < 10);
        while wait(&mut spinner, SHORT).is_none() {}
        assert_eq!(spins(&mut spinner, 1000, Duration::from_micros(10)), 1000);
    }

    #[test]
    fn half_of_the_cpus_may_spin() {
        let on = |cpus| {
            let mut spinner = Spinner::new(LIMIT, cpus);
            spinner.state = State::On { misses: 0 };
            spinner
        };
        assert!(!Spinner::new(LIMIT, 1).is_used());
        assert!(!Spinner::new(Duration::ZERO, 8).is_used());
        let (first, second) = (on(2), on(2));
        let turn = first.begin();
        assert!(turn.is_some());
        assert!(second.begin().is_none());
        drop(turn);
        assert!(second.begin().is_some());
        assert!(on(1).begin().is_none());
    }
}
