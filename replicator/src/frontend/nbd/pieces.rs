//! One request of a client as requests of the core.
//!
//! The core takes at most 1 MiB of data and 128 MiB of discard or write-zeroes at once (32 activity-log
//! extents); a client may ask for more. The rule: all [`Pieces`] are handed to the core, in any order
//! and at the same time; one answer is sent when all are done, and the first error is the answer.
//! A failed WRITE may have been done in part, as on any disk. FUA goes with every piece.
use super::reply::NbdError;
use super::transmission::{Command, Request};
use crate::core::event::{RequestError, RequestOp};
use crate::units::{BlockRange, SECTOR_BYTES, Sector, SectorCount};
use lockstep_proto::limits::{MAX_REQUEST_SECTORS, MAX_TRIM_SECTORS};

/// A part of a client's request that the core takes in one go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// What the core is asked.
    pub op: RequestOp,
    /// Where.
    pub range: BlockRange,
    /// Stable before it completes.
    pub fua: bool,
    /// Where its data lies in the data of the whole request, bytes.
    pub data_offset: u32,
}

/// The pieces of a request, in order of their position.
#[derive(Clone, Debug)]
pub struct Pieces {
    op: RequestOp,
    fua: bool,
    start: u64,
    next: u64,
    end: u64,
    /// Longest piece, sectors.
    limit: u64,
    /// Pieces end on multiples of `limit`, so that one touches no more activity-log extents than the
    /// limit says. Not for data, where it would cut ordinary requests in two.
    aligned: bool,
}

impl Request {
    /// The pieces of a request for the core: one, for whoever kept to the advertised block size.
    /// `None` for what the core is not asked piece by piece: FLUSH, BLOCK_STATUS and CACHE.
    #[must_use]
    pub const fn pieces(&self) -> Option<Pieces> {
        let (op, fua, limit, aligned) = match self.command() {
            Command::Read { .. } => (RequestOp::Read, false, MAX_REQUEST_SECTORS, false),
            Command::Write { fua } => (RequestOp::Write, fua, MAX_REQUEST_SECTORS, false),
            Command::Trim { fua } => (RequestOp::Discard, fua, MAX_TRIM_SECTORS, true),
            Command::WriteZeroes { fua, may_unmap, fast_only: _ } => {
                (RequestOp::WriteZeroes { may_unmap }, fua, MAX_TRIM_SECTORS, true)
            }
            Command::Flush | Command::BlockStatus { .. } | Command::Cache => return None,
        };
        let start = self.offset() / SECTOR_BYTES;
        let end = start + self.length() as u64 / SECTOR_BYTES;
        Some(Pieces { op, fua, start, next: start, end, limit, aligned })
    }
}

impl Iterator for Pieces {
    type Item = Piece;

    fn next(&mut self) -> Option<Piece> {
        let full = if self.aligned { self.limit - self.next % self.limit } else { self.limit };
        let count = full.min(self.end - self.next);
        // Empty at the end.
        let range = BlockRange::new(Sector(self.next), SectorCount(count))?;
        // Below the request's length, which is 32 bits.
        let data_offset = u32::try_from((self.next - self.start) * SECTOR_BYTES).unwrap_or(u32::MAX);
        self.next += count;
        Some(Piece { op: self.op, range, fua: self.fua, data_offset })
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let behind = if self.aligned { self.next % self.limit } else { 0 };
        let left = self.end - self.next;
        let count = if left == 0 { 0 } else { (behind + left).div_ceil(self.limit) };
        // At most 4 GiB / 1 MiB.
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        (count, Some(count))
    }
}

impl ExactSizeIterator for Pieces {}

/// How far the pieces of a request are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    left: usize,
    error: Option<NbdError>,
}

impl Progress {
    /// Of these pieces, none of which is done.
    #[must_use]
    pub fn new(pieces: &Pieces) -> Self {
        Self { left: pieces.len(), error: None }
    }

    /// One piece is done. Answers the result of the request when it was the last one.
    ///
    /// # Panics
    /// When more pieces are done than there were: a request was completed twice.
    pub fn piece_done(&mut self, result: Result<(), RequestError>) -> Option<Result<(), NbdError>> {
        assert!(self.left > 0, "a piece of an NBD request completed twice");
        self.left -= 1;
        if let Err(error) = result {
            self.error.get_or_insert(NbdError::from(error));
        }
        if self.left > 0 {
            return None;
        }
        Some(self.error.map_or(Ok(()), Err))
    }
}

#[cfg(test)]
mod tests {
    use super::super::transmission::{Received, Session, WireRequest};
    use super::super::wire::cmd;
    use super::super::{ExportInfo, wire::MAX_DATA_BYTES};
    use super::*;
    use proptest::prelude::*;

    const SIZE: u64 = 1 << 40;

    fn request(command: u16, flags: u16, offset: u64, length: u32) -> Request {
        let export = ExportInfo::volume(SIZE, 512);
        let session = Session {
            size_bytes: SIZE,
            block_min: 512,
            flags: export.flags(true),
            structured_replies: true,
            meta_base_allocation: true,
        };
        match session.receive(&WireRequest { flags, command, cookie: 7, offset, length }.encode()) {
            Received::Request(request) => request,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn an_ordinary_request_is_one_piece_wherever_it_lies() {
        let pieces: Vec<Piece> =
            request(cmd::WRITE, cmd::FLAG_FUA, (1 << 20) - 512, 1 << 20).pieces().unwrap().collect();
        let range = BlockRange::new(Sector(2047), SectorCount(2048)).unwrap();
        assert_eq!(pieces, [Piece { op: RequestOp::Write, range, fua: true, data_offset: 0 }]);
    }

    #[test]
    fn a_discard_is_cut_where_the_activity_log_wants_it() {
        let pieces: Vec<Piece> = request(cmd::TRIM, 0, 4096, 300 << 20).pieces().unwrap().collect();
        let mib: Vec<u64> = pieces.iter().map(|piece| piece.range.end().bytes() >> 20).collect();
        assert_eq!(mib, [128, 256, 300]);
        assert!(pieces.iter().all(|piece| piece.range.al_extents().count() <= 32));
    }

    #[test]
    fn flush_has_no_pieces() {
        assert!(request(cmd::FLUSH, 0, 0, 0).pieces().is_none());
    }

    #[test]
    fn the_first_error_wins_and_is_told_once_all_are_done() {
        let pieces = request(cmd::READ, 0, 0, 3 << 20).pieces().unwrap();
        let mut progress = Progress::new(&pieces);
        assert_eq!(progress.piece_done(Ok(())), None);
        assert_eq!(progress.piece_done(Err(RequestError::NotPrimary)), None);
        assert_eq!(progress.piece_done(Err(RequestError::Io)), Some(Err(NbdError::Perm)));
    }

    #[test]
    #[should_panic(expected = "completed twice")]
    fn a_request_cannot_complete_twice() {
        let mut progress = Progress::new(&request(cmd::READ, 0, 0, 512).pieces().unwrap());
        assert_eq!(progress.piece_done(Ok(())), Some(Ok(())));
        progress.piece_done(Ok(()));
    }

    proptest! {
        #[test]
        fn pieces_follow_each_other_and_cover_the_request(
            start in 0u64..1 << 30,
            sectors in 1u32..(MAX_DATA_BYTES / 512),
            which in 0usize..4,
        ) {
            let command = [cmd::READ, cmd::WRITE, cmd::TRIM, cmd::WRITE_ZEROES][which];
            // Discards may be far longer than data.
            let length = if which < 2 { sectors * 512 } else { sectors.saturating_mul(512 * 100) / 512 * 512 };
            let request = request(command, 0, start * 512, length);
            let pieces = request.pieces().unwrap();
            let limit = if which < 2 { MAX_REQUEST_SECTORS } else { MAX_TRIM_SECTORS };
            let promised = pieces.len();
            let mut at = start;
            let mut count = 0;
            for piece in pieces {
                prop_assert_eq!(piece.range.start(), Sector(at));
                prop_assert_eq!(u64::from(piece.data_offset), (at - start) * 512);
                prop_assert!(piece.range.len().0 <= limit);
                at = piece.range.end().0;
                count += 1;
            }
            prop_assert_eq!(at, start + u64::from(length) / 512);
            prop_assert_eq!(count, promised);
        }
    }
}
