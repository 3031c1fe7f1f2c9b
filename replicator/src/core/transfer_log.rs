//! Mirrored writes the peer has not yet declared stable, by epoch (SEM §8). One log per resource: all
//! volumes share one order.
//!
//! Promises I6: a write submitted after another completed is in a later epoch, and the barrier of the
//! earlier epoch goes out before it. An entry stays until the barrier ack of its epoch.
use crate::units::Time;
use std::collections::VecDeque;

/// Number of an epoch; the wire carries the low 32 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct EpochNr(pub u64);

impl EpochNr {
    /// As on the wire.
    #[must_use]
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the wire carries the low half; epochs in flight are few"
    )]
    pub const fn to_wire(self) -> u32 {
        self.0 as u32
    }
}

#[derive(Debug)]
struct Epoch {
    nr: EpochNr,
    requests: Vec<usize>,
    opened: Time,
    closed: bool,
    barrier_sent: bool,
}

/// A barrier ack that does not fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AckError {
    /// No epoch waits for an ack, or another one is the oldest.
    #[error("barrier ack for epoch {got}, but the oldest unacknowledged epoch is {expected:?}")]
    WrongEpoch {
        /// What came.
        got: u32,
        /// What is due.
        expected: Option<u32>,
    },
    /// The number of writes differs.
    #[error("barrier ack counts {got} writes, the epoch has {expected}")]
    WrongCount {
        /// What came.
        got: u32,
        /// What was sent.
        expected: usize,
    },
}

/// See the module.
#[derive(Debug, Default)]
pub struct TransferLog {
    epochs: VecDeque<Epoch>,
    next: u64,
    spare: Vec<Vec<usize>>,
}

impl TransferLog {
    /// The epoch for a new write, opening one if needed. Closes the current one at `max_writes`.
    pub fn epoch_for_write(&mut self, now: Time, max_writes: u32) -> EpochNr {
        if let Some(current) = self.epochs.back_mut() {
            if current.requests.len() >= max_writes as usize {
                current.closed = true;
            }
            if !current.closed {
                return current.nr;
            }
        }
        let nr = EpochNr(self.next);
        self.next += 1;
        let requests = self.spare.pop().unwrap_or_default();
        self.epochs.push_back(Epoch { nr, requests, opened: now, closed: false, barrier_sent: false });
        nr
    }

    /// Adds a request to the epoch just given by [`TransferLog::epoch_for_write`].
    pub fn push(&mut self, request: usize) {
        if let Some(current) = self.epochs.back_mut() {
            debug_assert!(!current.closed, "a write joins a closed epoch");
            current.requests.push(request);
        }
    }

    /// A write of this epoch completed to the application: later writes may depend on it.
    pub fn close(&mut self, nr: EpochNr) -> bool {
        match self.epochs.back_mut() {
            Some(current) if current.nr == nr && !current.closed => {
                current.closed = true;
                true
            }
            _ => false,
        }
    }

    /// Closes the current epoch if it has writes; the number of the newest epoch not yet acked.
    pub fn close_current(&mut self) -> Option<EpochNr> {
        let current = self.epochs.back_mut()?;
        current.closed = true;
        Some(current.nr)
    }

    /// The next closed epoch whose barrier was not sent; it counts as sent now.
    pub fn take_barrier(&mut self) -> Option<EpochNr> {
        // Barriers go out in order, so only the last two epochs can lack theirs.
        let skip = self.epochs.len().saturating_sub(2);
        let epoch = self.epochs.iter_mut().skip(skip).find(|epoch| epoch.closed && !epoch.barrier_sent)?;
        epoch.barrier_sent = true;
        Some(epoch.nr)
    }

    /// The peer declared the oldest epoch stable: its requests, to be given back by [`TransferLog::recycle`].
    ///
    /// # Errors
    /// The ack does not fit: the peer broke the protocol.
    pub fn ack(&mut self, nr: u32, writes: u32) -> Result<Vec<usize>, AckError> {
        let expected = self.epochs.front().map(|epoch| epoch.nr.to_wire());
        match self.epochs.front() {
            Some(epoch) if epoch.nr.to_wire() == nr && epoch.barrier_sent => {
                if epoch.requests.len() != writes as usize {
                    return Err(AckError::WrongCount { got: writes, expected: epoch.requests.len() });
                }
            }
            _ => return Err(AckError::WrongEpoch { got: nr, expected }),
        }
        Ok(self.epochs.pop_front().map(|epoch| epoch.requests).unwrap_or_default())
    }

    /// Takes an emptied list back for reuse.
    pub fn recycle(&mut self, mut requests: Vec<usize>) {
        requests.clear();
        if self.spare.len() < 16 {
            self.spare.push(requests);
        }
    }

    /// The connection is gone: every request that no barrier ack covered, oldest first.
    pub fn take_all(&mut self) -> Vec<usize> {
        self.epochs.drain(..).flat_map(|epoch| epoch.requests).collect()
    }

    /// Every request that no barrier ack covered yet.
    pub fn requests(&self) -> impl Iterator<Item = usize> + '_ {
        self.epochs.iter().flat_map(|epoch| epoch.requests.iter().copied())
    }

    /// The requests of the oldest epoch.
    #[must_use]
    pub fn oldest(&self) -> &[usize] {
        self.epochs.front().map_or(&[], |epoch| &epoch.requests)
    }

    /// The oldest epoch that was not acked.
    #[must_use]
    pub fn oldest_nr(&self) -> Option<EpochNr> {
        self.epochs.front().map(|epoch| epoch.nr)
    }

    /// Whether everything up to `nr` was acked.
    #[must_use]
    pub fn acked_through(&self, nr: EpochNr) -> bool {
        self.epochs.front().is_none_or(|epoch| epoch.nr > nr)
    }

    /// No write waits for a barrier ack.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.epochs.is_empty()
    }

    /// When the oldest unacknowledged epoch was opened.
    #[must_use]
    pub fn oldest_opened(&self) -> Option<Time> {
        self.epochs.front().map(|epoch| epoch.opened)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_completed_write_ends_its_epoch_and_acks_must_fit() {
        let mut log = TransferLog::default();
        let first = log.epoch_for_write(Time(0), 10);
        log.push(1);
        log.push(2);
        assert_eq!(log.epoch_for_write(Time(0), 10), first);
        assert!(log.close(first));
        assert!(!log.close(first));
        let second = log.epoch_for_write(Time(0), 10);
        assert!(second > first);
        log.push(3);
        assert_eq!(log.take_barrier(), Some(first));
        assert_eq!(log.take_barrier(), None, "the second epoch is still open");
        assert!(log.ack(first.to_wire(), 3).is_err());
        assert!(log.ack(second.to_wire(), 1).is_err());
        assert_eq!(log.ack(first.to_wire(), 2).unwrap(), [1, 2]);
        assert!(log.acked_through(first) && !log.acked_through(second));
        assert_eq!(log.take_all(), [3]);
        assert!(log.is_empty());
    }

    #[test]
    fn an_epoch_has_a_largest_size() {
        let mut log = TransferLog::default();
        let first = log.epoch_for_write(Time(0), 1);
        log.push(1);
        assert_ne!(log.epoch_for_write(Time(0), 1), first);
    }
}
