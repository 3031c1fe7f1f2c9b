//! What two nodes conclude from their generation identifiers (SEM §13, and §14 where DRBD 9 knows better).
//!
//! [`compare`] is pure and symmetric: with the two sides swapped it gives the mirrored answer for every
//! input (`tests/tests/handshake_table.rs` tries them all). Every rule keeps DRBD 8.4's number, ours
//! have free ones. First match wins:
//!
//! 1. one side has no data (10-30);
//! 2. the same generation: a missed end of a resync (34-37), else who may know more (40-43);
//! 3. one side went on from what the other has (50-53, 60 and their mirrors 70-73, 80);
//! 4. both went on (90, 91, 100), or nothing is common (101).
use super::config::Protocol;
use super::state::{DiskState, Role};
use super::uuid::{UuidSet, is_fresh, masked, started_from};
use serde::{Deserialize, Serialize};

/// What one node knows of itself or of its peer when the handshake decides: exactly what was exchanged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Side {
    /// Its identifiers.
    pub uuids: UuidSet,
    /// It crashed as Primary and that is not resolved.
    pub crashed_primary: bool,
    /// Its role now.
    pub role: Role,
    /// Its disk.
    pub disk: DiskState,
    /// Its set bits.
    pub out_of_sync_bits: u64,
    /// Of these, what the peer's bitmap or a full resync brought that never began: no changes of its own.
    #[serde(default)]
    pub foreign_bits: u64,
    /// Its operator said: my changes lose.
    pub discard_my_data: bool,
    /// It is Primary without a good disk or frozen, and its application was told of writes that the other node
    /// never got, or forgot when it stopped.
    #[serde(default)]
    pub was_told_more: bool,
    /// Breaks ties: the lower node id.
    pub tie: bool,
}

impl Side {
    /// Its disk takes part in the comparison.
    #[must_use]
    pub fn has_disk(&self) -> bool {
        self.disk >= DiskState::Negotiating && self.disk != DiskState::DUnknown
    }

    /// How good its data is, as far as the disk state tells: not usable, known to be older, good.
    pub(super) fn quality(&self) -> u8 {
        match self.disk {
            DiskState::Consistent | DiskState::UpToDate => 2,
            DiskState::Outdated => 1,
            DiskState::Diskless
            | DiskState::Attaching
            | DiskState::Detaching
            | DiskState::Failed
            | DiskState::Negotiating
            | DiskState::Inconsistent
            | DiskState::DUnknown => 0,
        }
    }
}

/// DRBD 8.4's rule numbers, and ours where it has none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[repr(u8)]
pub enum Rule {
    /// A side has no disk: there is nothing to compare (ours).
    Diskless = 1,
    /// Both just created.
    BothJustCreated = 10,
    /// Self just created.
    SelfJustCreated = 20,
    /// Peer just created.
    PeerJustCreated = 30,
    /// Self was source and missed the end of the resync.
    SelfMissedFinish = 34,
    /// Peer was source and missed the end.
    PeerMissedFinish = 35,
    /// Self was source; the peer failed to record the sync identifier.
    SelfWasSource = 36,
    /// Peer was source.
    PeerWasSource = 37,
    /// Equal generation.
    Equal = 40,
    /// Equal generation after a crash, and somebody is Primary now.
    EqualWithPrimary = 41,
    /// Equal generation but blocks are marked (ours: bits are cleared only on proof).
    EqualWithBits = 42,
    /// Equal generation, protocol A or B, and one side crashed as Primary: it may hold writes that were
    /// acknowledged and never arrived (DRBD 9).
    CrashedPrimary = 43,
    /// The peer went on from our generation.
    BitmapPeer = 50,
    /// The last sync identifier got lost, peer was source.
    LostSyncUuidPeer = 51,
    /// Peer went on after a resync whose end it missed (ours).
    WentOnAfterFinishPeer = 52,
    /// The peer's resync to us was started several times since we heard of it (ours).
    LostStartsPeer = 53,
    /// Our generation is in the peer's history.
    HistoryPeer = 60,
    /// We went on from the peer's generation.
    BitmapSelf = 70,
    /// The last sync identifier got lost, self was source.
    LostSyncUuidSelf = 71,
    /// Self went on after a resync whose end it missed (ours).
    WentOnAfterFinishSelf = 72,
    /// Our resync to the peer was started several times since it heard of it (ours).
    LostStartsSelf = 73,
    /// The peer's generation is in our history.
    HistorySelf = 80,
    /// Both went on from the same generation.
    BitmapBoth = 90,
    /// Both went on, one of them in the middle of a resync from the other (ours).
    BitmapBothStarted = 91,
    /// A common generation in both histories, or each names the other as older.
    HistoryBoth = 100,
    /// Nothing in common (DRBD 8.4 leaves 100).
    NothingCommon = 101,
}

impl Rule {
    /// Every rule.
    pub const ALL: [Self; 26] = [
        Self::Diskless,
        Self::BothJustCreated,
        Self::SelfJustCreated,
        Self::PeerJustCreated,
        Self::SelfMissedFinish,
        Self::PeerMissedFinish,
        Self::SelfWasSource,
        Self::PeerWasSource,
        Self::Equal,
        Self::EqualWithPrimary,
        Self::EqualWithBits,
        Self::CrashedPrimary,
        Self::BitmapPeer,
        Self::LostSyncUuidPeer,
        Self::WentOnAfterFinishPeer,
        Self::LostStartsPeer,
        Self::HistoryPeer,
        Self::BitmapSelf,
        Self::LostSyncUuidSelf,
        Self::WentOnAfterFinishSelf,
        Self::LostStartsSelf,
        Self::HistorySelf,
        Self::BitmapBoth,
        Self::BitmapBothStarted,
        Self::HistoryBoth,
        Self::NothingCommon,
    ];

    /// As in `uuid_compare()=R by rule N`.
    #[must_use]
    pub const fn number(self) -> u8 {
        self as u8
    }

    /// The rule the peer finds in the same meeting.
    #[must_use]
    pub const fn mirrored(self) -> Self {
        match self {
            Self::SelfJustCreated => Self::PeerJustCreated,
            Self::PeerJustCreated => Self::SelfJustCreated,
            Self::SelfMissedFinish => Self::PeerMissedFinish,
            Self::PeerMissedFinish => Self::SelfMissedFinish,
            Self::SelfWasSource => Self::PeerWasSource,
            Self::PeerWasSource => Self::SelfWasSource,
            Self::BitmapPeer => Self::BitmapSelf,
            Self::BitmapSelf => Self::BitmapPeer,
            Self::LostSyncUuidPeer => Self::LostSyncUuidSelf,
            Self::LostSyncUuidSelf => Self::LostSyncUuidPeer,
            Self::WentOnAfterFinishPeer => Self::WentOnAfterFinishSelf,
            Self::WentOnAfterFinishSelf => Self::WentOnAfterFinishPeer,
            Self::LostStartsPeer => Self::LostStartsSelf,
            Self::LostStartsSelf => Self::LostStartsPeer,
            Self::HistoryPeer => Self::HistorySelf,
            Self::HistorySelf => Self::HistoryPeer,
            Self::Diskless
            | Self::BothJustCreated
            | Self::Equal
            | Self::EqualWithPrimary
            | Self::EqualWithBits
            | Self::CrashedPrimary
            | Self::BitmapBoth
            | Self::BitmapBothStarted
            | Self::HistoryBoth
            | Self::NothingCommon => self,
        }
    }
}

/// How the stored identifiers are corrected before going on (SEM §13 "fix").
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Fix {
    /// Nothing to correct.
    None,
    /// The missed end of a resync: bitmap identifier to the history.
    Finish,
    /// The start of a resync that never happened: bitmap := history 1, history shifted back.
    UndoStart,
    /// Our bits cover everything since the peer's generation: bitmap := that, so that a history of two
    /// entries is enough however often the resync is interrupted.
    Rebase,
}

/// What the identifiers say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Verdict {
    /// Nothing to copy.
    NoSync,
    /// This node is the source.
    Source {
        /// Copy everything.
        full: bool,
    },
    /// This node is the target.
    Target {
        /// Copy everything.
        full: bool,
    },
    /// Both changed data; the bitmaps describe the difference.
    SplitBrain,
    /// Both changed data; the common ancestor is too old for the bitmaps.
    SplitBrainHistory,
    /// No common history.
    Unrelated,
}

impl Verdict {
    /// The peer's view of the same verdict.
    #[must_use]
    pub const fn mirrored(self) -> Self {
        match self {
            Self::Source { full } => Self::Target { full },
            Self::Target { full } => Self::Source { full },
            Self::NoSync | Self::SplitBrain | Self::SplitBrainHistory | Self::Unrelated => self,
        }
    }

    /// DRBD's number for it, as in `uuid_compare()=R by rule N`.
    #[must_use]
    pub const fn number(self) -> i32 {
        match self {
            Self::NoSync => 0,
            Self::Source { full: false } => 1,
            Self::Source { full: true } => 2,
            Self::Target { full: false } => -1,
            Self::Target { full: true } => -2,
            Self::SplitBrain => 100,
            Self::SplitBrainHistory => -100,
            Self::Unrelated => -1000,
        }
    }

    /// Both changed data.
    #[must_use]
    pub const fn is_split_brain(self) -> bool {
        matches!(self, Self::SplitBrain | Self::SplitBrainHistory)
    }
}

/// A verdict with its rule and what to correct on this side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Comparison {
    /// What follows.
    pub verdict: Verdict,
    /// From which rule.
    pub rule: Rule,
    /// Correction of our own identifiers.
    pub fix: Fix,
    /// The peer corrects its own in the same way.
    pub peer_fix: Fix,
}

/// A comparison without corrections.
pub(super) const fn plain(verdict: Verdict, rule: Rule) -> Comparison {
    Comparison { verdict, rule, fix: Fix::None, peer_fix: Fix::None }
}

const SOURCE: Verdict = Verdict::Source { full: false };
const TARGET: Verdict = Verdict::Target { full: false };

const fn same(a: u64, b: u64) -> bool {
    masked(a) == masked(b)
}

/// Compares the identifiers only (SEM §13 table, first match wins).
#[must_use]
pub fn compare(me: &Side, peer: &Side, protocol: Protocol) -> Comparison {
    let (mine, theirs) = (&me.uuids, &peer.uuids);
    // An empty identifier is treated as just created on either side, so that the answers mirror.
    match (is_fresh(mine.current), is_fresh(theirs.current)) {
        (true, true) => return plain(Verdict::NoSync, Rule::BothJustCreated),
        (true, false) => return plain(Verdict::Target { full: true }, Rule::SelfJustCreated),
        (false, true) => return plain(Verdict::Source { full: true }, Rule::PeerJustCreated),
        (false, false) => {}
    }
    if same(mine.current, theirs.current) {
        return missed_finish(mine, theirs).unwrap_or_else(|| compare_equal(me, peer, protocol));
    }
    let peer_went_on = went_on(theirs, mine).map(|(kind, fix)| Comparison {
        peer_fix: fix,
        ..plain(
            if kind == WentOn::History { Verdict::Target { full: true } } else { TARGET },
            kind.rule().mirrored(),
        )
    });
    let i_went_on = went_on(mine, theirs).map(|(kind, fix)| Comparison {
        fix,
        ..plain(if kind == WentOn::History { Verdict::Source { full: true } } else { SOURCE }, kind.rule())
    });
    match (peer_went_on, i_went_on) {
        (Some(found), None) | (None, Some(found)) => found,
        // Each names the other as older: DRBD 8.4 would make both the target. Nobody's data may go by that.
        (Some(_), Some(_)) => plain(Verdict::SplitBrainHistory, Rule::HistoryBoth),
        (None, None) => both_went_on(mine, theirs),
    }
}

/// The same generation, but one side's bits are still relative to an older one (rules 34 to 37).
fn missed_finish(mine: &UuidSet, theirs: &UuidSet) -> Option<Comparison> {
    let finished = |source: &UuidSet, target: &UuidSet| {
        same(source.bitmap, target.history[0]) && same(source.history[0], target.history[1])
    };
    match (mine.bitmap != 0, theirs.bitmap != 0) {
        (true, false) if finished(mine, theirs) => {
            Some(Comparison { fix: Fix::Finish, ..plain(SOURCE, Rule::SelfMissedFinish) })
        }
        (true, false) => Some(plain(SOURCE, Rule::SelfWasSource)),
        (false, true) if finished(theirs, mine) => {
            Some(Comparison { peer_fix: Fix::Finish, ..plain(TARGET, Rule::PeerMissedFinish) })
        }
        (false, true) => Some(plain(TARGET, Rule::PeerWasSource)),
        (true, true) | (false, false) => None,
    }
}

/// How one side is ahead of the other.
#[derive(Clone, Copy, PartialEq, Eq)]
enum WentOn {
    Bitmap,
    LostSyncUuid,
    LostStarts,
    AfterFinish,
    History,
}

impl WentOn {
    /// Seen from the side that is ahead.
    const fn rule(self) -> Rule {
        match self {
            Self::Bitmap => Rule::BitmapSelf,
            Self::LostSyncUuid => Rule::LostSyncUuidSelf,
            Self::LostStarts => Rule::LostStartsSelf,
            Self::AfterFinish => Rule::WentOnAfterFinishSelf,
            Self::History => Rule::HistorySelf,
        }
    }
}

/// Whether `ahead` went on from the generation `behind` has, and the correction that follows for `ahead`.
fn went_on(ahead: &UuidSet, behind: &UuidSet) -> Option<(WentOn, Fix)> {
    let generation = behind.current;
    let [newest, older] = ahead.history;
    if ahead.bitmap != 0 && same(ahead.bitmap, generation) {
        Some((WentOn::Bitmap, Fix::None))
    } else if same(newest, generation) && started_from(newest, ahead.bitmap) {
        Some((WentOn::LostSyncUuid, Fix::UndoStart))
    } else if started_from(generation, ahead.bitmap) {
        // Pushed out of the history since, but the name itself tells where it comes from.
        Some((WentOn::LostStarts, Fix::Rebase))
    } else if ahead.bitmap != 0 && behind.bitmap == 0 && same(behind.history[0], ahead.bitmap) {
        // It finished the resync and has not moved since; we never heard of the end and have left that
        // generation: our bits cover all that differs.
        Some((WentOn::AfterFinish, Fix::Rebase))
    } else if same(newest, generation) || same(older, generation) {
        Some((WentOn::History, Fix::None))
    } else {
        None
    }
}

/// Neither has what the other started from.
fn both_went_on(mine: &UuidSet, theirs: &UuidSet) -> Comparison {
    let (bs, bp) = (mine.bitmap, theirs.bitmap);
    if same(bs, bp) && !is_fresh(bs) {
        return plain(Verdict::SplitBrain, Rule::BitmapBoth);
    }
    if same(bs, bp) && masked(bs) != 0 {
        // Both were forced to be good before they ever met: nothing describes what differs.
        return plain(Verdict::SplitBrainHistory, Rule::HistoryBoth);
    }
    if started_from(bs, bp) || started_from(bp, bs) {
        return plain(Verdict::SplitBrain, Rule::BitmapBothStarted);
    }
    // DRBD 8.4 lets two empty history slots match here; an empty slot proves nothing, so it does not for us.
    let older = |set: &UuidSet| [set.bitmap, set.history[0], set.history[1]];
    let common = |own: &u64| !is_fresh(*own) && older(theirs).iter().any(|other| same(*own, *other));
    if older(mine).iter().any(common) {
        plain(Verdict::SplitBrainHistory, Rule::HistoryBoth)
    } else {
        plain(Verdict::Unrelated, Rule::NothingCommon)
    }
}

/// The same generation on both, and no resync between them is half done.
fn compare_equal(me: &Side, peer: &Side, protocol: Protocol) -> Comparison {
    let crashed = (me.crashed_primary, peer.crashed_primary);
    let marked = me.out_of_sync_bits != 0 || peer.out_of_sync_bits != 0;
    if crashed == (false, false) && !marked {
        return plain(Verdict::NoSync, Rule::Equal);
    }
    let direct = |i_am_source: bool, rule| plain(if i_am_source { SOURCE } else { TARGET }, rule);
    let (my_role, peer_role) = (me.role == Role::Primary, peer.role == Role::Primary);
    let rule = match crashed {
        (false, false) => Rule::EqualWithBits,
        (true, false) | (false, true) if protocol != Protocol::C => Rule::CrashedPrimary,
        _ if my_role || peer_role => Rule::EqualWithPrimary,
        _ => Rule::Equal,
    };
    // A disk that is known to be older is no source, whatever else speaks for it (DRBD 9).
    if me.quality() != peer.quality() {
        return direct(me.quality() > peer.quality(), rule);
    }
    match rule {
        Rule::CrashedPrimary => direct(me.crashed_primary, rule),
        Rule::EqualWithPrimary if my_role && peer_role => plain(Verdict::SplitBrainHistory, rule),
        _ if my_role != peer_role => direct(my_role, rule),
        _ if me.crashed_primary != peer.crashed_primary => direct(me.crashed_primary, rule),
        // DRBD: the side with the tie flag becomes target.
        _ => direct(!me.tie, rule),
    }
}
