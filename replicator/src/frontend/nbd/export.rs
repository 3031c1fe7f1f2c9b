//! What the negotiation needs to know of the exports: the directory that the control plane provides.
use super::wire::{MAX_BLOCK_BYTES, TransmissionFlags, rep};

/// An export as LIST shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListedExport {
    /// The name a client asks for, for example `web-root/0`.
    pub name: String,
    /// Text for a person; may be empty.
    pub description: String,
}

/// An export that may be used now.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "each is an independent capability the protocol names")]
pub struct ExportInfo {
    /// Size of the volume, bytes. The client sees it rounded down to `block_min`.
    pub size_bytes: u64,
    /// Smallest block, bytes: 512 or 4096, the backing disk's logical block.
    pub block_min: u32,
    /// Block that performs best, bytes: 4096, what one bit of the bitmap covers.
    pub block_preferred: u32,
    /// Largest READ or WRITE, bytes: at most [`MAX_BLOCK_BYTES`].
    pub block_max: u32,
    /// TRIM is served.
    pub can_trim: bool,
    /// WRITE_ZEROES is served.
    pub can_zero: bool,
    /// The FAST_ZERO flag is honoured: the server can tell when zeroing would be slow.
    pub fast_zero: bool,
    /// All connections share one cache and one flush; see the module docs of [`super`].
    pub multi_conn: bool,
    /// Writes are refused.
    pub read_only: bool,
    /// Text for a person; may be empty.
    pub description: String,
}

impl ExportInfo {
    /// A writable volume behind the core: flush, FUA, trim, write-zeroes, several connections.
    #[must_use]
    pub fn volume(size_bytes: u64, block_min: u32) -> Self {
        Self {
            size_bytes,
            block_min,
            block_preferred: 4096,
            block_max: MAX_BLOCK_BYTES,
            can_trim: true,
            can_zero: true,
            fast_zero: false,
            multi_conn: true,
            read_only: false,
            description: String::new(),
        }
    }

    /// The size a client sees, bytes: a tail shorter than a block cannot be reached.
    #[must_use]
    pub const fn usable_bytes(&self) -> u64 {
        match self.size_bytes.checked_rem(self.block_min as u64) {
            Some(tail) => self.size_bytes - tail,
            None => self.size_bytes,
        }
    }

    /// The transmission flags of a connection with or without structured replies.
    #[must_use]
    pub const fn flags(&self, structured_replies: bool) -> TransmissionFlags {
        type F = TransmissionFlags;
        let writable = !self.read_only;
        F::HAS_FLAGS
            .with(F::SEND_FLUSH, true)
            .with(F::SEND_FUA, true)
            .with(F::READ_ONLY, self.read_only)
            .with(F::SEND_TRIM, self.can_trim && writable)
            .with(F::SEND_WRITE_ZEROES, self.can_zero && writable)
            .with(F::SEND_FAST_ZERO, self.can_zero && self.fast_zero && writable)
            .with(F::SEND_DF, structured_replies)
            .with(F::CAN_MULTI_CONN, self.multi_conn)
    }
}

/// Why an export cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefusalKind {
    /// It exists, but not here and now: the resource is Secondary, suspended or without good data.
    Policy,
    /// No such export is configured.
    Unknown,
    /// The daemon or the resource is going down.
    Shutdown,
}

impl RefusalKind {
    /// The type of the option reply that carries this refusal.
    pub(super) const fn reply_type(self) -> u32 {
        match self {
            Self::Policy => rep::ERR_POLICY,
            Self::Unknown => rep::ERR_UNKNOWN,
            Self::Shutdown => rep::ERR_SHUTDOWN,
        }
    }
}

/// A refusal, with the text the client shows to its user.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct ExportRefusal {
    /// Which answer of the protocol it is.
    pub kind: RefusalKind,
    /// Why, and what to do instead, for example
    /// `web-root/0 is Secondary on nodo2; nodo1 is Primary. To use it here: lockstep primary web-root`.
    pub text: String,
}

impl ExportRefusal {
    /// A refusal of this kind.
    #[must_use]
    pub fn new(kind: RefusalKind, text: impl Into<String>) -> Self {
        Self { kind, text: text.into() }
    }
}

/// The exports of a node. An export exists only while its resource is Primary, so each call may answer
/// differently from the one before.
pub trait ExportDirectory {
    /// The exports that may be used now.
    fn list(&self) -> Vec<ListedExport>;

    /// The export of this name. Never called with the empty name.
    ///
    /// # Errors
    /// Why it cannot be used.
    fn lookup(&self, name: &str) -> Result<ExportInfo, ExportRefusal>;

    /// Why there is no default export although the client asked for one, when `list` is empty. A
    /// directory that knows of Secondary resources says so here.
    fn nothing_exported(&self) -> ExportRefusal {
        ExportRefusal::new(
            RefusalKind::Unknown,
            "nothing is exported here: no resource is Primary on this node",
        )
    }
}

/// Finds an export; the empty name is the default export, which exists if there is exactly one.
/// Answers the name it really has.
pub(super) fn resolve<E: ExportDirectory + ?Sized>(
    exports: &E,
    name: &str,
) -> Result<(String, ExportInfo), ExportRefusal> {
    if !name.is_empty() {
        return exports.lookup(name).map(|info| (name.to_owned(), info));
    }
    let listed = exports.list();
    match listed.as_slice() {
        [] => Err(exports.nothing_exported()),
        [only] => exports.lookup(&only.name).map(|info| (only.name.clone(), info)),
        several => {
            let names: Vec<&str> = several.iter().map(|export| export.name.as_str()).collect();
            let text = format!("there is no default export; name one of: {}", names.join(", "));
            Err(ExportRefusal::new(RefusalKind::Unknown, text))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_read_only_export_offers_no_way_to_write() {
        let info = ExportInfo { read_only: true, fast_zero: true, ..ExportInfo::volume(1 << 20, 512) };
        let flags = info.flags(true);
        assert!(flags.contains(TransmissionFlags::READ_ONLY));
        assert!(flags.contains(TransmissionFlags::SEND_FLUSH));
        assert!(!flags.contains(TransmissionFlags::SEND_TRIM));
        assert!(!flags.contains(TransmissionFlags::SEND_WRITE_ZEROES));
        assert!(!flags.contains(TransmissionFlags::SEND_FAST_ZERO));
    }

    #[test]
    fn a_tail_shorter_than_a_block_is_cut_off() {
        assert_eq!(ExportInfo::volume(4096 * 3 + 512, 4096).usable_bytes(), 4096 * 3);
        assert_eq!(ExportInfo::volume(4096 * 3 + 512, 512).usable_bytes(), 4096 * 3 + 512);
        assert_eq!(ExportInfo::volume(77, 0).usable_bytes(), 77);
    }
}
