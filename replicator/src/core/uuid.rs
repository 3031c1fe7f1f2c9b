//! Generation identifiers and what two nodes conclude from them (SEM §12, §13).
//!
//! [`decide`] is pure and symmetric: with the two sides swapped it gives the mirrored answer for every
//! input. Every rule keeps DRBD's number, so that an operator can look up why.
use crate::core::state::{DiskState, Role};
use crate::meta::UUID_JUST_CREATED;

/// Added to the bitmap identifier when a resync starts (SEM §12).
pub const SYNC_START_OFFSET: u64 = 0x0001_0000_0000_0000;

/// Bit 0 says "was Primary" and never takes part in comparisons.
#[must_use]
pub const fn masked(uuid: u64) -> u64 {
    uuid & !1
}

/// The identifiers of one side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct UuidSet {
    /// Names the data on this node.
    pub current: u64,
    /// Generation the set bits are relative to; 0 = none.
    pub bitmap: u64,
    /// Earlier generations, newest first.
    pub history: [u64; 2],
}

impl UuidSet {
    /// As stored in a superblock.
    #[must_use]
    pub const fn from_array(uuid: [u64; 4]) -> Self {
        Self { current: uuid[0], bitmap: uuid[1], history: [uuid[2], uuid[3]] }
    }

    /// As stored in a superblock.
    #[must_use]
    pub const fn to_array(self) -> [u64; 4] {
        [self.current, self.bitmap, self.history[0], self.history[1]]
    }

    /// A new generation that the peer does not have: bitmap := current, current := `fresh`.
    pub const fn bump(&mut self, fresh: u64) {
        self.bitmap = self.current;
        self.current = fresh;
    }

    /// A new generation whose bits are still relative to the same older one: current goes to the history.
    pub const fn bump_keeping_base(&mut self, fresh: u64) {
        self.push_history(self.current);
        self.current = fresh;
    }

    /// The peer has everything: the bitmap identifier moves to the history.
    pub const fn clear_bitmap(&mut self) {
        if self.bitmap != 0 {
            self.push_history(self.bitmap);
            self.bitmap = 0;
        }
    }

    /// A resync from here starts (SEM §12 "SyncSource starts").
    pub const fn start_as_source(&mut self, random: u64) {
        let old = self.bitmap;
        self.bitmap = if old == 0 || masked(old) == UUID_JUST_CREATED {
            random
        } else {
            old.wrapping_add(SYNC_START_OFFSET)
        };
        if old != 0 {
            self.push_history(old);
        }
    }

    const fn push_history(&mut self, uuid: u64) {
        self.history = [uuid, self.history[0]];
    }
}

/// What one node knows of itself or of its peer when the handshake decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
    /// Its operator said: my changes lose.
    pub discard_my_data: bool,
    /// It wins ties: the lower node id.
    pub tie: bool,
}

/// DRBD 8.4's rule numbers, and ours where it has none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Rule {
    /// A side has no disk: there is nothing to compare.
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
    /// The peer went on from our generation.
    BitmapPeer = 50,
    /// The last sync identifier got lost, peer was source.
    LostSyncUuidPeer = 51,
    /// Our generation is in the peer's history.
    HistoryPeer = 60,
    /// We went on from the peer's generation.
    BitmapSelf = 70,
    /// The last sync identifier got lost, self was source.
    LostSyncUuidSelf = 71,
    /// The peer's generation is in our history.
    HistorySelf = 80,
    /// Self went on after a resync whose end it missed (ours).
    WentOnAfterFinishSelf = 72,
    /// Peer went on after a resync whose end it missed (ours).
    WentOnAfterFinishPeer = 52,
    /// Both went on from the same generation.
    BitmapBoth = 90,
    /// A common generation in both histories, or none at all.
    HistoryBoth = 100,
}

/// How the stored identifiers are corrected before going on (SEM §13 "fix").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
}

/// A verdict with its rule and what to correct on this side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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

const fn plain(verdict: Verdict, rule: Rule) -> Comparison {
    Comparison { verdict, rule, fix: Fix::None, peer_fix: Fix::None }
}

/// Compares the identifiers only (SEM §13 table, first match wins).
#[must_use]
pub fn compare(me: &Side, peer: &Side) -> Comparison {
    let same = |a: u64, b: u64| masked(a) == masked(b);
    let just_created = |uuid: u64| masked(uuid) == UUID_JUST_CREATED;
    let (cs, bs, hs) = (me.uuids.current, me.uuids.bitmap, me.uuids.history);
    let (cp, bp, hp) = (peer.uuids.current, peer.uuids.bitmap, peer.uuids.history);
    let source = Verdict::Source { full: false };
    let target = Verdict::Target { full: false };

    // An empty identifier is treated as just created on either side, so that the answers mirror.
    let fresh = |uuid: u64| just_created(uuid) || masked(uuid) == 0;
    match (fresh(cs), fresh(cp)) {
        (true, true) => return plain(Verdict::NoSync, Rule::BothJustCreated),
        (true, false) => return plain(Verdict::Target { full: true }, Rule::SelfJustCreated),
        (false, true) => return plain(Verdict::Source { full: true }, Rule::PeerJustCreated),
        (false, false) => {}
    }

    if same(cs, cp) {
        if bp == 0 && bs != 0 {
            return if same(bs, hp[0]) && same(hs[0], hp[1]) {
                Comparison { fix: Fix::Finish, ..plain(source, Rule::SelfMissedFinish) }
            } else {
                plain(source, Rule::SelfWasSource)
            };
        }
        if bs == 0 && bp != 0 {
            return if same(hs[0], bp) && same(hs[1], hp[0]) {
                Comparison { peer_fix: Fix::Finish, ..plain(target, Rule::PeerMissedFinish) }
            } else {
                plain(target, Rule::PeerWasSource)
            };
        }
        return compare_equal(me, peer);
    }
    let started = |history: u64, bitmap: u64| {
        history != 0 && bitmap != 0 && masked(history.wrapping_add(SYNC_START_OFFSET)) == masked(bitmap)
    };
    let known = |uuid: u64, history: [u64; 2]| history.iter().any(|h| masked(*h) != 0 && same(uuid, *h));
    let behind = if bp != 0 && same(cs, bp) {
        Some(plain(target, Rule::BitmapPeer))
    } else if same(cs, hp[0]) && started(hp[0], bp) {
        Some(Comparison { peer_fix: Fix::UndoStart, ..plain(target, Rule::LostSyncUuidPeer) })
    } else if bp != 0 && known(cs, hp) && (same(hs[0], bp) || (same(cs, hp[1]) && started(hp[1], bp))) {
        // Our resync ended under a generation the peer has left since, or never began here: either way
        // the peer's bits cover all that differs.
        Some(Comparison { peer_fix: Fix::Rebase, ..plain(target, Rule::WentOnAfterFinishPeer) })
    } else if known(cs, hp) {
        Some(plain(Verdict::Target { full: true }, Rule::HistoryPeer))
    } else {
        None
    };
    let ahead = if bs != 0 && same(bs, cp) {
        Some(plain(source, Rule::BitmapSelf))
    } else if same(cp, hs[0]) && started(hs[0], bs) {
        Some(Comparison { fix: Fix::UndoStart, ..plain(source, Rule::LostSyncUuidSelf) })
    } else if bs != 0 && known(cp, hs) && (same(hp[0], bs) || (same(cp, hs[1]) && started(hs[1], bs))) {
        Some(Comparison { fix: Fix::Rebase, ..plain(source, Rule::WentOnAfterFinishSelf) })
    } else if known(cp, hs) {
        Some(plain(Verdict::Source { full: true }, Rule::HistorySelf))
    } else {
        None
    };
    match (behind, ahead) {
        (Some(found), None) | (None, Some(found)) => return found,
        // Each names the other as older: DRBD 8.4 would make both the target. Nobody's data may go by that.
        (Some(_), Some(_)) => return plain(Verdict::SplitBrainHistory, Rule::HistoryBoth),
        (None, None) => {}
    }
    if same(bs, bp) && masked(bs) != 0 {
        return plain(Verdict::SplitBrain, Rule::BitmapBoth);
    }
    // DRBD 8.4 lets two empty history slots match here; an empty slot proves nothing, so it does not for us.
    let mine = [bs, hs[0], hs[1]];
    let theirs = [bp, hp[0], hp[1]];
    if mine
        .iter()
        .any(|own| masked(*own) != 0 && !just_created(*own) && theirs.iter().any(|other| same(*own, *other)))
    {
        return plain(Verdict::SplitBrainHistory, Rule::HistoryBoth);
    }
    plain(Verdict::Unrelated, Rule::HistoryBoth)
}

fn compare_equal(me: &Side, peer: &Side) -> Comparison {
    let source = Verdict::Source { full: false };
    let target = Verdict::Target { full: false };
    let (my_role, peer_role) = (me.role == Role::Primary, peer.role == Role::Primary);
    if !me.crashed_primary && !peer.crashed_primary {
        if me.out_of_sync_bits == 0 && peer.out_of_sync_bits == 0 {
            return plain(Verdict::NoSync, Rule::Equal);
        }
        let i_am_source = if my_role == peer_role { me.tie } else { my_role };
        return plain(if i_am_source { source } else { target }, Rule::EqualWithBits);
    }
    match (my_role, peer_role) {
        (true, true) => plain(Verdict::SplitBrainHistory, Rule::EqualWithPrimary),
        (true, false) => plain(source, Rule::EqualWithPrimary),
        (false, true) => plain(target, Rule::EqualWithPrimary),
        (false, false) => {
            let i_am_source = match (me.crashed_primary, peer.crashed_primary) {
                (true, false) => true,
                (false, true) => false,
                // DRBD: the side with the tie flag becomes target.
                (true, true) | (false, false) => !me.tie,
            };
            plain(if i_am_source { source } else { target }, Rule::Equal)
        }
    }
}

/// Why a handshake ends in StandAlone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Obstacle {
    /// No common history.
    Unrelated,
    /// Both changed data and nobody said whose changes lose.
    SplitBrain,
    /// The source's disk is not good enough.
    SourceNotUsable,
    /// The target is Primary with good data.
    TargetIsPrimary,
    /// A diskless Primary meets other data than its application was shown.
    NotTheDataLostLast,
}

/// What the handshake of one volume leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Go on without resync.
    NoSync,
    /// Resync from here.
    Source {
        /// Everything.
        full: bool,
    },
    /// Resync to here.
    Target {
        /// Everything.
        full: bool,
    },
    /// Both nodes go StandAlone.
    Refuse(Obstacle),
}

/// The whole decision for one volume (SEM §13, "After the comparison").
#[must_use]
pub fn decide(me: &Side, peer: &Side) -> (Comparison, Outcome) {
    let has_disk = |side: &Side| side.disk >= DiskState::Negotiating && side.disk != DiskState::DUnknown;
    if !has_disk(me) || !has_disk(peer) {
        if lost_track(me, peer) || lost_track(peer, me) {
            return (plain(Verdict::NoSync, Rule::Diskless), Outcome::Refuse(Obstacle::NotTheDataLostLast));
        }
        return (plain(Verdict::NoSync, Rule::Diskless), Outcome::NoSync);
    }
    let comparison = compare(me, peer);
    let mut verdict = comparison.verdict;
    if verdict == Verdict::Unrelated {
        return (comparison, Outcome::Refuse(Obstacle::Unrelated));
    }
    let bad = |side: &Side| side.disk == DiskState::Inconsistent;
    if bad(me) != bad(peer) {
        let full = matches!(
            verdict,
            Verdict::SplitBrainHistory | Verdict::Source { full: true } | Verdict::Target { full: true }
        );
        verdict = if bad(me) { Verdict::Target { full } } else { Verdict::Source { full } };
    }
    if matches!(verdict, Verdict::SplitBrain | Verdict::SplitBrainHistory) {
        // From a common ancestor that only the history knows, no bitmap describes the difference: copy all.
        let full = verdict == Verdict::SplitBrainHistory;
        verdict = match (me.discard_my_data, peer.discard_my_data) {
            (true, false) => Verdict::Target { full },
            (false, true) => Verdict::Source { full },
            (true, true) | (false, false) => return (comparison, Outcome::Refuse(Obstacle::SplitBrain)),
        };
    }
    let outcome = match verdict {
        Verdict::NoSync => Outcome::NoSync,
        Verdict::Source { full } => check_roles(me, peer).map_or(Outcome::Source { full }, Outcome::Refuse),
        Verdict::Target { full } => check_roles(peer, me).map_or(Outcome::Target { full }, Outcome::Refuse),
        Verdict::SplitBrain | Verdict::SplitBrainHistory => Outcome::Refuse(Obstacle::SplitBrain),
        Verdict::Unrelated => Outcome::Refuse(Obstacle::Unrelated),
    };
    (comparison, outcome)
}

/// A diskless Primary may only go on with the generation its application was shown, or one that
/// follows it: anything else would take acknowledged writes back under a running application.
fn lost_track(diskless: &Side, other: &Side) -> bool {
    let shown = masked(diskless.uuids.current);
    let UuidSet { current, bitmap, history } = other.uuids;
    diskless.disk < DiskState::Negotiating
        && diskless.role == Role::Primary
        && shown != 0
        && other.disk >= DiskState::Outdated
        && other.disk != DiskState::DUnknown
        && ![current, bitmap, history[0], history[1]].iter().any(|uuid| masked(*uuid) == shown)
}

fn check_roles(source: &Side, target: &Side) -> Option<Obstacle> {
    if source.disk <= DiskState::Inconsistent {
        Some(Obstacle::SourceNotUsable)
    } else if target.role == Role::Primary && target.disk >= DiskState::Consistent {
        Some(Obstacle::TargetIsPrimary)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn side(uuid: [u64; 4]) -> Side {
        Side {
            uuids: UuidSet::from_array(uuid),
            crashed_primary: false,
            role: Role::Secondary,
            disk: DiskState::UpToDate,
            out_of_sync_bits: 0,
            discard_my_data: false,
            tie: false,
        }
    }

    #[test]
    fn the_simple_histories() {
        let old = side([0x100, 0, 0, 0]);
        let went_on = side([0x200, 0x100, 0, 0]);
        assert_eq!(compare(&went_on, &old).verdict, Verdict::Source { full: false });
        assert_eq!(compare(&went_on, &old).rule, Rule::BitmapSelf);
        assert_eq!(compare(&old, &went_on).rule, Rule::BitmapPeer);
        let other = side([0x300, 0x100, 0, 0]);
        assert_eq!(compare(&went_on, &other).verdict, Verdict::SplitBrain);
        let crashed = Side { crashed_primary: true, ..old };
        assert_eq!(decide(&crashed, &Side { tie: true, ..old }).1, Outcome::Source { full: false });
        assert_eq!(compare(&side([4, 0, 0, 0]), &old).verdict, Verdict::Target { full: true });
        assert_eq!(compare(&side([0x900, 0, 0, 0]), &old).verdict, Verdict::Unrelated);
    }

    #[test]
    fn an_interrupted_resync_goes_on_by_bitmap() {
        let mut source = UuidSet::from_array([0x200, 0x100, 0, 0]);
        source.start_as_source(7);
        let target = side([source.bitmap, 0, 0, 0]);
        let me = side(source.to_array());
        assert_eq!(compare(&me, &target).verdict, Verdict::Source { full: false });
        // The target never heard of the start: it still names the old generation.
        let lost = compare(&me, &side([0x100, 0, 0, 0]));
        assert_eq!((lost.rule, lost.fix), (Rule::LostSyncUuidSelf, Fix::UndoStart));
    }

    #[test]
    fn marked_blocks_of_equal_generations_are_never_ignored() {
        let me = Side { out_of_sync_bits: 3, tie: true, ..side([0x100, 0, 0, 0]) };
        assert_eq!(decide(&me, &side([0x100, 0, 0, 0])).1, Outcome::Source { full: false });
    }

    fn any_side() -> impl Strategy<Value = Side> {
        // Few distinct values, so that every rule is met.
        let uuid = prop_oneof![
            Just(0_u64),
            Just(4),
            Just(0x100),
            Just(0x101),
            Just(0x200),
            Just(0x300),
            Just(0x100 + SYNC_START_OFFSET),
            Just(0x200 + SYNC_START_OFFSET)
        ];
        let disk = prop_oneof![
            Just(DiskState::Diskless),
            Just(DiskState::Inconsistent),
            Just(DiskState::Outdated),
            Just(DiskState::Consistent),
            Just(DiskState::UpToDate)
        ];
        (proptest::array::uniform4(uuid), any::<[bool; 3]>(), disk, 0_u64..2).prop_map(
            |(uuids, flags, disk, bits)| Side {
                uuids: UuidSet::from_array(uuids),
                crashed_primary: flags[0],
                role: if flags[1] { Role::Primary } else { Role::Secondary },
                disk,
                out_of_sync_bits: bits,
                discard_my_data: flags[2],
                tie: false,
            },
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(20_000))]
        #[test]
        fn both_sides_come_to_mirrored_answers(me in any_side(), peer in any_side()) {
            let me = Side { tie: true, ..me };
            let (mine, my_outcome) = decide(&me, &peer);
            let (theirs, their_outcome) = decide(&peer, &me);
            prop_assert_eq!(mine.verdict, theirs.verdict.mirrored());
            prop_assert_eq!(mine.fix, theirs.peer_fix);
            let mirrored = match their_outcome {
                Outcome::Source { full } => Outcome::Target { full },
                Outcome::Target { full } => Outcome::Source { full },
                Outcome::NoSync => Outcome::NoSync,
                Outcome::Refuse(why) => Outcome::Refuse(why),
            };
            prop_assert_eq!(my_outcome, mirrored);
        }
    }
}
