//! Every deadline of a resource, in one table. No other place computes "when".
use crate::units::Time;

macro_rules! timers {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// The deadlines of a resource.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Timer { $($(#[$doc])* $name,)* }
        impl Timer {
            /// Every timer, in the order they fire when due together.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];
        }
    };
}

timers! {
    /// A step of the handshake was not answered.
    Handshake,
    /// Nothing was heard for `ping-int`: ask.
    Ping,
    /// The ping was not answered within `ping-timeout`.
    PingTimeout,
    /// A mirrored write was not answered within `ko-count` x `timeout`.
    Ko,
    /// The open epoch has a completed write and nothing else is coming: end it, so that extents cool down.
    IdleBarrier,
    /// Resync: ask for more, or write cleared bitmap pages lazily.
    Resync,
    /// `suspend-io` was not renewed.
    SuspendLease,
    /// A repair may be tried again.
    Repair,
    /// The pause after congestion is over.
    Ahead,
    /// An IO of the own disk may be too old.
    Disk,
    /// A disk that was given up has had its time to answer.
    LetGo,
}

/// When each timer fires.
#[derive(Debug, Default)]
pub struct Timers {
    due: [Option<Time>; Timer::ALL.len()],
}

impl Timers {
    /// Fires at `at`, whatever was set before.
    pub fn set(&mut self, timer: Timer, at: Time) {
        self.due[timer as usize] = Some(at);
    }

    /// Fires at `at` unless it is already set.
    pub fn set_if_idle(&mut self, timer: Timer, at: Time) {
        self.due[timer as usize].get_or_insert(at);
    }

    /// Fires at `at`, or before if it was to.
    pub fn bring_forward(&mut self, timer: Timer, at: Time) {
        let due = &mut self.due[timer as usize];
        *due = Some(due.map_or(at, |set| set.min(at)));
    }

    /// Does not fire.
    pub fn stop(&mut self, timer: Timer) {
        self.due[timer as usize] = None;
    }

    /// When the next one fires.
    #[must_use]
    pub fn next(&self) -> Option<Time> {
        self.due.iter().flatten().min().copied()
    }

    /// Takes one timer that is due.
    pub fn take_due(&mut self, now: Time) -> Option<Timer> {
        let timer =
            *Timer::ALL.iter().find(|timer| self.due[**timer as usize].is_some_and(|at| at <= now))?;
        self.due[timer as usize] = None;
        Some(timer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn due_timers_fire_once_and_in_order() {
        let mut timers = Timers::default();
        timers.set(Timer::Resync, Time(5));
        timers.set(Timer::Ping, Time(5));
        timers.set_if_idle(Timer::Ping, Time(1));
        assert_eq!(timers.next(), Some(Time(5)));
        assert_eq!(timers.take_due(Time(4)), None);
        assert_eq!(timers.take_due(Time(5)), Some(Timer::Ping));
        assert_eq!(timers.take_due(Time(5)), Some(Timer::Resync));
        assert_eq!(timers.take_due(Time(5)), None);
        assert_eq!(timers.next(), None);
    }
}
