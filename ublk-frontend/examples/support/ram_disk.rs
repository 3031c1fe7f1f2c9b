//! A disk in memory that also checks what it is asked.

use lockstep_ublk_frontend::{IoFailure, IoRequest, Op};

use crate::support::Backend;

/// The bytes of the disk. Untouched pages cost nothing.
#[derive(Debug)]
pub(crate) struct RamDisk {
    bytes: Vec<u8>,
}

impl RamDisk {
    /// An empty disk.
    pub(crate) fn new(size_bytes: usize) -> Self {
        Self { bytes: vec![0; size_bytes] }
    }
}

impl Backend for RamDisk {
    fn handle(&mut self, request: &IoRequest, data: &mut [u8]) -> Result<(), IoFailure> {
        let start = usize::try_from(request.offset_bytes()).map_err(|_| IoFailure::Io)?;
        let len = usize::try_from(request.len_bytes()).map_err(|_| IoFailure::Io)?;
        let end = start.checked_add(len).ok_or(IoFailure::Io)?;
        let range = self.bytes.get_mut(start..end).ok_or(IoFailure::Io)?;
        match request.op {
            Op::Read => data.copy_from_slice(range),
            Op::Write => {
                range.copy_from_slice(data);
                // The kernel does not need these bytes any more; a later use of them would be a mistake about ownership.
                data.fill(0xa5);
            }
            Op::Flush => {}
            Op::Discard | Op::WriteZeroes { .. } => range.fill(0),
        }
        Ok(())
    }
}
