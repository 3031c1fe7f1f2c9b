//! Defects planted on purpose, so that the tests can be seen to notice them.
//!
//! A check that was never seen failing is no check. Each [`Fault`] names one way this core could be
//! wrong; the place that would be wrong asks `Resource::planted`. Without the feature
//! `planted-faults`, which only the tests package switches on, the answer is a constant `false` and
//! the compiler leaves nothing of it. `docs/planted-faults.md` says what catches each.
use super::Resource;

macro_rules! faults {
    ($($(#[doc = $text:literal])+ $name:ident,)+) => {
        /// One planted defect.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Fault { $($(#[doc = $text])+ $name,)+ }

        impl Fault {
            /// Every defect there is.
            pub const ALL: &'static [Self] = &[$(Self::$name,)+];

            /// Its name, as on a command line.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$name => stringify!($name),)+ }
            }

            /// What goes wrong, in one line.
            #[must_use]
            pub const fn what(self) -> &'static str {
                match self { $(Self::$name => concat!($($text),+),)+ }
            }
        }
    };
}

faults! {
    // ---- epochs and barriers
    /// The receiving disk is not flushed at the end of an epoch.
    SkipEpochFlush,
    /// A barrier is acknowledged when it arrives, not when the writes before it are done.
    BarrierAckEarly,
    /// A write that completes leaves its epoch open: later writes join it.
    EpochStaysOpen,
    /// The receiving side lets writes behind a barrier start at once.
    WritesPassBarrier,
    /// The receiving side drops what it acknowledged as received (protocol B) when the connection ends.
    ReceivedForgotten,
    /// The activity-log reference of a write is given back when it completes, not at the barrier ack.
    AlReleasedAtCompletion,
    /// A demotion does not wait for the barrier acks.
    DemoteWithoutBarriers,
    // ---- legs of a write
    /// The peer writes FUA writes like any other.
    PeerForgetsFua,
    /// Protocol C completes when the peer has received the write.
    CompleteAtReceive,
    /// Answers of an earlier session are sent and believed in the next one.
    AnswersOfOldSession,
    /// A negative acknowledgement counts as a good one.
    NegAckIsAck,
    /// A write fails on the local disk and nothing marks the blocks.
    LocalErrorNotMarked,
    /// Writes are accepted although no good copy would get them.
    WriteToBadCopyAlone,
    /// A discard is not sent to the peer.
    DiscardNotMirrored,
    /// Application writes take no range lock.
    RequestsDoNotLock,
    /// An own write goes on beside one that the local disk has not written yet.
    OverlapBeforeDisk,
    /// Writes of the peer take no range lock.
    PeerWritesDoNotLock,
    // ---- flushes
    /// A flush under protocol C does not wait for the peer.
    FlushWithoutPeer,
    /// A failed flush is tried again as if nothing had happened.
    FailedFlushRetried,
    /// A flush of the application does not reach the local disk.
    FlushSkipsDisk,
    // ---- marks
    /// A write without a peer is not marked.
    NoMarkWithoutPeer,
    /// The writes in flight when the connection ends are not marked.
    NoMarkAtLoss,
    /// Only writes that lack their acknowledgement are marked when the connection ends.
    LastEpochForgotten,
    /// Writes during the bitmap exchange are announced, but not marked here.
    NoteWithoutMark,
    /// Writes during the bitmap exchange are marked, but not announced.
    MarkWithoutNote,
    /// Announced marks are ignored.
    NoteIgnored,
    /// Writes of a diskless Primary are not marked by the node that takes them.
    NoBooksForDiskless,
    /// The peer's disk goes away and what it had not declared stable is not marked.
    NoMarkAtPeerDetach,
    /// The bitmap that arrives replaces the own one.
    BitmapReplaced,
    // ---- metadata
    /// Bitmap pages are written without flushing the data first.
    PagesBeforeData,
    /// An extent leaves the activity log without its bitmap page being written.
    EvictWithoutPage,
    /// A write goes to the disk when its activity-log transaction is submitted, not when it is durable.
    AlNotAwaited,
    /// Writes do not go through the activity log at all.
    NoActivityLog,
    /// Writes complete before the new generation is durable.
    GenerationNotAwaited,
    /// A Primary that goes on alone keeps its generation.
    NoNewGeneration,
    /// The superblock does not say that this node is Primary.
    NoPrimaryFlag,
    /// A node is Primary before its superblock says so durably.
    PromotionNotAwaited,
    /// The extents of the activity log are not marked at attach.
    HotExtentsIgnored,
    /// FULL_SYNC in the superblock is not looked at.
    FullSyncIgnored,
    /// A full resync is not recorded before it starts.
    FullSyncNotRecorded,
    /// Detach does not write the bitmap.
    DetachWithoutBitmap,
    // ---- resync
    /// The target starts before it is durably Inconsistent.
    TargetStartsEarly,
    /// The source tells the sync identifier before it is durable.
    SourceStartsEarly,
    /// The target ends when it has asked for the last block.
    TargetEndsEarly,
    /// The target calls itself UpToDate although blocks could not be copied.
    FailedBlocksForgotten,
    /// The target says it is done before its superblock says so.
    FinishNotAwaited,
    /// The target clears a block's bit when it asks for it.
    ClearedOnRequest,
    /// The target looks for marks behind its cursor no more.
    CursorDoesNotWrap,
    /// Digests are compared where an own write is still on its way to the disk.
    DigestBeforeOwnWrite,
    /// The end of a resync does not wait for writes that came before it and stand behind a barrier.
    FinishBeforeWrites,
    /// A reply may overwrite what the application wrote meanwhile.
    StaleReplyWritten,
    /// The source reads without holding the range.
    ResyncReadUnlocked,
    /// Writes during a resync do not wait for the start of the target.
    ResyncHoldForgotten,
    // ---- decisions
    /// A block that is not in sync is read from an Inconsistent disk.
    ReadInconsistent,
    /// A split brain is taken for equal data.
    SplitBrainIgnored,
    /// Of equal generations after a crash, the wrong side becomes the source.
    WrongSideAfterCrash,
    /// Marked blocks of equal generations are not copied.
    EqualBitsIgnored,
    /// A second Primary is let in.
    SecondPrimaryAllowed,
}

impl Resource {
    /// Makes this resource wrong in one way, or right again.
    #[cfg(feature = "planted-faults")]
    pub fn plant(&mut self, fault: Option<Fault>) {
        self.planted = fault;
    }

    /// Whether this place is to be wrong.
    #[cfg(feature = "planted-faults")]
    pub(super) fn planted(&self, fault: Fault) -> bool {
        self.planted == Some(fault)
    }

    /// Whether this place is to be wrong: never in a build that is used.
    #[cfg(not(feature = "planted-faults"))]
    #[inline(always)]
    pub(super) const fn planted(&self, _fault: Fault) -> bool {
        false
    }
}
