//! A metadata write of the core as writes of the disk: one or more pieces, each where the layout says, then a flush.
//!
//! Promise: an answer says that all of it is stable.
use super::buffers::{Account, BufferPool, BufferRef, MAX_BUFFER_BYTES};
use super::disk::{Answer, Call, Disk, DiskJob, MAX_IDLE_RESULTS, Progress};
use super::ring::FileSpan;
use crate::core::event::{IoError, MetaId, MetaWrite};
use crate::meta::{BLOCK_BYTES, al_ring};
use nix::errno::Errno;
use nix::libc;
use std::cell::Cell;
use std::rc::Rc;

/// A metadata write of one or more pieces.
#[derive(Debug)]
pub(super) struct MetaState {
    id: MetaId,
    pub(super) disk: Rc<Disk>,
    pieces_left: Cell<usize>,
    /// A flush follows the pieces; a single piece is stable by itself.
    flush: bool,
    error: Cell<Option<IoError>>,
}

/// A piece of one.
#[derive(Debug)]
pub(super) struct MetaJob {
    pub(super) write: Rc<MetaState>,
    /// `None`: the flush.
    piece: Option<MetaPiece>,
    idle_results: u8,
}

#[derive(Debug)]
struct MetaPiece {
    buffer: BufferRef,
    offset: u64,
    done: usize,
}

impl MetaJob {
    /// The jobs for a metadata write, or why there are none.
    pub(super) fn make(
        id: MetaId,
        write: &MetaWrite,
        disk: &Rc<Disk>,
        pool: &BufferPool,
        mut each: impl FnMut(DiskJob),
    ) -> Result<(), IoError> {
        let pieces = disk.meta_pieces(write, pool).ok_or(IoError::Errno(libc::ENOMEM))?;
        let state = Rc::new(MetaState {
            id,
            disk: Rc::clone(disk),
            pieces_left: Cell::new(pieces.len()),
            flush: pieces.len() != 1,
            error: Cell::new(None),
        });
        if pieces.is_empty() {
            each(DiskJob::Meta(Self { write: state, piece: None, idle_results: 0 }));
            return Ok(());
        }
        for piece in pieces {
            each(DiskJob::Meta(Self { write: Rc::clone(&state), piece: Some(piece), idle_results: 0 }));
        }
        Ok(())
    }

    /// What is left to write, bytes.
    pub(super) fn len_bytes(&self) -> u64 {
        self.piece.as_ref().map_or(0, |piece| (piece.buffer.len() - piece.done) as u64)
    }

    pub(super) fn call(&self) -> Call {
        let Some(piece) = &self.piece else { return Call::Datasync };
        let len = piece.buffer.len() - piece.done;
        let span = FileSpan { buffer_offset: piece.done, len, file_offset: piece.offset + piece.done as u64 };
        Call::Write { buffer: piece.buffer.clone(), span, dsync: !self.write.flush }
    }

    pub(super) fn on_result(&mut self, result: i32) -> Progress {
        let write = &self.write;
        let Some(piece) = &mut self.piece else {
            let done = if result < 0 { Err(IoError::Errno(-result)) } else { Ok(()) };
            return Progress::Done(Answer::Meta(write.id, done));
        };
        match usize::try_from(result) {
            Ok(moved) if moved >= 512 => piece.done += moved - moved % 512,
            _ => {
                let again = matches!(Errno::from_raw(-result), Errno::EAGAIN | Errno::EINTR);
                self.idle_results += 1;
                if again && self.idle_results < MAX_IDLE_RESULTS {
                    return Progress::Again;
                }
                let errno = if result >= 0 { libc::EIO } else { -result };
                write.error.set(Some(IoError::Errno(errno)));
                piece.done = piece.buffer.len();
            }
        }
        if piece.done < piece.buffer.len() {
            return Progress::Again;
        }
        write.pieces_left.set(write.pieces_left.get() - 1);
        if write.pieces_left.get() > 0 {
            return Progress::Quiet;
        }
        match write.error.get() {
            Some(error) => Progress::Done(Answer::Meta(write.id, Err(error))),
            None if write.flush => {
                self.piece = None;
                Progress::Again
            }
            None => Progress::Done(Answer::Meta(write.id, Ok(()))),
        }
    }
}

impl Disk {
    /// What a metadata write puts where; neighbouring bitmap pages become one piece. `None`: no memory.
    fn meta_pieces(&self, write: &MetaWrite, pool: &BufferPool) -> Option<Vec<MetaPiece>> {
        let block = |bytes: &[u8], offset| {
            let buffer = pool.take(bytes.len(), Account::Meta)?;
            buffer.copy_in(0, bytes);
            Some(MetaPiece { buffer, offset, done: 0 })
        };
        let layout = self.layout.borrow();
        match write {
            MetaWrite::Superblock(superblock) => {
                Some(vec![block(&superblock.encode(), layout.superblock_byte())?])
            }
            MetaWrite::AlTransaction(transaction) => {
                Some(vec![block(&transaction.encode().ok()?, layout.al_block_byte(transaction.number))?])
            }
            MetaWrite::AlInit => {
                let blocks = layout.al_blocks();
                let bytes = al_ring::initialised_block();
                (0..blocks)
                    .map(|index| block(&bytes, layout.al_byte() + u64::from(index) * BLOCK_BYTES as u64))
                    .collect()
            }
            MetaWrite::Bitmap(pages) => {
                let mut pieces: Vec<MetaPiece> = Vec::new();
                let mut run = Vec::new();
                let mut run_start = 0;
                for page in pages {
                    let offset = layout.bitmap_page_byte(page.index);
                    let len = layout.bitmap_page_len(page.index);
                    let joins = run_start + run.len() as u64 == offset && run.len() + len <= MAX_BUFFER_BYTES;
                    if !run.is_empty() && !joins {
                        pieces.push(block(&run, run_start)?);
                        run.clear();
                    }
                    if run.is_empty() {
                        run_start = offset;
                    }
                    run.extend_from_slice(&page.to_bytes()[..len]);
                }
                if !run.is_empty() {
                    pieces.push(block(&run, run_start)?);
                }
                Some(pieces)
            }
            MetaWrite::Relocate => {
                drop(layout);
                self.relocate();
                Some(Vec::new())
            }
            MetaWrite::ForgetOldPlace => {
                self.note_size();
                match self.left_behind.take() {
                    Some(place) => Some(vec![block(&[0; BLOCK_BYTES], place)?]),
                    None => Some(Vec::new()),
                }
            }
        }
    }
}
