//! From what the identifiers say to what is done: disk states, split-brain policies, a person's word,
//! roles (SEM §13 "After the comparison", §15).
//!
//! [`decide`] is pure and symmetric like the comparison: both nodes come to mirrored outcomes, whatever
//! their configurations say about things that are not compared.
//!
//! Nothing is ever discarded unless a policy or a person said so. In two points this is stricter than
//! DRBD 8.4: a disk state does not resolve a split brain (a disk that only became Inconsistent by an
//! error still holds changes nobody else has), and a person's `--discard-my-data` comes before any
//! policy (as in DRBD 9).
use super::compare::{Comparison, Rule, Side, Verdict, compare, plain};
use super::config::{AfterSb0Pri, AfterSb1Pri, AfterSb2Pri, Protocol, RrConflict};
use super::state::{DiskState, Role};
use super::uuid::{UuidSet, masked};
use serde::{Deserialize, Serialize};

/// What both nodes' configurations say, seen from one of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policies {
    /// Agreed.
    pub protocol: Protocol,
    /// Agreed; `discard-local` here is `discard-remote` there.
    pub after_sb_0pri: AfterSb0Pri,
    /// Agreed.
    pub after_sb_1pri: AfterSb1Pri,
    /// Agreed.
    pub after_sb_2pri: AfterSb2Pri,
    /// Both nodes say `always-asbp`.
    pub always_asbp: bool,
    /// This node's.
    pub rr_conflict: RrConflict,
    /// The peer's.
    pub peer_rr_conflict: RrConflict,
}

impl Policies {
    /// As the peer sees them.
    #[must_use]
    pub const fn mirrored(self) -> Self {
        Self {
            after_sb_0pri: self.after_sb_0pri.mirrored(),
            rr_conflict: self.peer_rr_conflict,
            peer_rr_conflict: self.rr_conflict,
            ..self
        }
    }
}

/// Why a handshake ends in StandAlone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Obstacle {
    /// No common history.
    Unrelated,
    /// Both changed data and nobody said whose changes lose.
    SplitBrain,
    /// The source's disk is not good enough.
    SourceNotUsable,
    /// The target is Primary with good data.
    TargetIsPrimary,
    /// A Primary without a good disk meets other data than its application was shown.
    NotTheDataLostLast,
}

/// What the handshake of one volume leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
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
    /// The policy decided against a Primary, which has to be demoted first; then the nodes meet anew.
    MustDemote {
        /// It is this node.
        me: bool,
    },
    /// Not now: the connection is dropped and tried again.
    Retry(Obstacle),
    /// Both nodes go StandAlone.
    Refuse(Obstacle),
}

impl Outcome {
    /// The peer's view of the same outcome.
    #[must_use]
    pub const fn mirrored(self) -> Self {
        match self {
            Self::Source { full } => Self::Target { full },
            Self::Target { full } => Self::Source { full },
            Self::MustDemote { me } => Self::MustDemote { me: !me },
            Self::NoSync | Self::Retry(_) | Self::Refuse(_) => self,
        }
    }
}

/// What came between the verdict of the identifiers and the outcome.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reason {
    /// One disk is Inconsistent, the other one is better.
    DiskStates,
    /// `--discard-my-data` here or at the peer.
    DiscardMyData,
    /// The same against the direction the identifiers gave: newer data is rolled back.
    RolledBack,
    /// `--discard-my-data` was given in vain: the other disk cannot be a source.
    DiscardIgnored,
    /// Neither node is Primary.
    Policy0Pri(AfterSb0Pri),
    /// One node is Primary.
    Policy1Pri(AfterSb1Pri, AfterSb0Pri),
    /// Both nodes are Primary.
    Policy2Pri(AfterSb2Pri, AfterSb0Pri),
    /// The target is Primary with good data, and this is its `rr-conflict`.
    RrConflict(RrConflict),
    /// The same, but no block is marked on either side.
    NothingToCopy,
    /// Both are Primary in one generation: what differs was told to no application.
    NothingTold,
}

/// The whole decision for one volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decided {
    /// What the identifiers say.
    pub comparison: Comparison,
    /// What came in between, in order.
    pub reasons: Vec<Reason>,
    /// What follows.
    pub outcome: Outcome,
}

impl Decided {
    /// The generations are equal and only the bits say that blocks may differ: a comparison of hashes
    /// is enough to clear most of them.
    #[must_use]
    pub const fn compare_blocks(&self) -> bool {
        matches!(self.comparison.rule, Rule::EqualWithBits)
    }
}

/// Decides for one volume.
#[must_use]
pub fn decide(me: &Side, peer: &Side, policies: &Policies) -> Decided {
    if !me.has_disk() || !peer.has_disk() {
        let misses = |one: &Side, other: &Side| {
            one.was_told_more && other.disk >= DiskState::Outdated && other.disk != DiskState::DUnknown
        };
        let lost = lost_track(me, peer) || lost_track(peer, me) || misses(me, peer) || misses(peer, me);
        let outcome = if lost { Outcome::Refuse(Obstacle::NotTheDataLostLast) } else { Outcome::NoSync };
        return Decided { comparison: plain(Verdict::NoSync, Rule::Diskless), reasons: Vec::new(), outcome };
    }
    let comparison = compare(me, peer, policies.protocol);
    let mut reasons = Vec::new();
    let mut outcome = conclude(me, peer, policies, &comparison, &mut reasons);
    let behind = match outcome {
        Outcome::Target { .. } => me.was_told_more,
        Outcome::Source { .. } => peer.was_told_more,
        Outcome::NoSync => me.was_told_more || peer.was_told_more,
        Outcome::MustDemote { .. } | Outcome::Retry(_) | Outcome::Refuse(_) => false,
    };
    if behind {
        outcome = Outcome::Refuse(Obstacle::NotTheDataLostLast);
    }
    Decided { comparison, reasons, outcome }
}

fn conclude(
    me: &Side,
    peer: &Side,
    policies: &Policies,
    comparison: &Comparison,
    reasons: &mut Vec<Reason>,
) -> Outcome {
    let mut verdict = comparison.verdict;
    if verdict == Verdict::Unrelated {
        return Outcome::Refuse(Obstacle::Unrelated);
    }
    if verdict.is_split_brain() {
        match after_split_brain(me, peer, policies, verdict, reasons) {
            Ok(decided) => verdict = decided,
            Err(outcome) => return outcome,
        }
    } else {
        let bad = |side: &Side| side.disk == DiskState::Inconsistent;
        if bad(me) != bad(peer) {
            let full = matches!(verdict, Verdict::Source { full: true } | Verdict::Target { full: true });
            let better = if bad(me) { Verdict::Target { full } } else { Verdict::Source { full } };
            if better != verdict {
                reasons.push(Reason::DiskStates);
            }
            verdict = better;
        }
        verdict = roll_back(me, peer, verdict, reasons);
    }
    match verdict {
        Verdict::NoSync => Outcome::NoSync,
        Verdict::Source { full } => {
            check_roles(me, peer, policies.peer_rr_conflict, comparison.rule, full, reasons)
        }
        Verdict::Target { full } => {
            check_roles(peer, me, policies.rr_conflict, comparison.rule, full, reasons).mirrored()
        }
        Verdict::SplitBrain | Verdict::SplitBrainHistory => Outcome::Refuse(Obstacle::SplitBrain),
        Verdict::Unrelated => Outcome::Refuse(Obstacle::Unrelated),
    }
}

/// A person, else a policy, says whose changes go; `Err` is an outcome that is no resync.
fn after_split_brain(
    me: &Side,
    peer: &Side,
    policies: &Policies,
    verdict: Verdict,
    reasons: &mut Vec<Reason>,
) -> Result<Verdict, Outcome> {
    // From a common ancestor that only the history knows, no bitmap describes the difference: copy all.
    let full = verdict == Verdict::SplitBrainHistory;
    let loser = |me_loses| if me_loses { Verdict::Target { full } } else { Verdict::Source { full } };
    if me.discard_my_data != peer.discard_my_data {
        reasons.push(Reason::DiscardMyData);
        return Ok(loser(me.discard_my_data));
    }
    if full && !policies.always_asbp {
        return Err(Outcome::Refuse(Obstacle::SplitBrain));
    }
    let (my_role, peer_role) = (me.role == Role::Primary, peer.role == Role::Primary);
    let zero = policies.after_sb_0pri;
    let as_0pri = after_sb_0pri(me, peer, zero);
    let (reason, me_loses) = match (my_role, peer_role) {
        (false, false) => (Reason::Policy0Pri(zero), as_0pri),
        (true, true) => {
            let policy = policies.after_sb_2pri;
            let me_loses = match policy {
                AfterSb2Pri::Disconnect => None,
                AfterSb2Pri::ViolentlyAs0p | AfterSb2Pri::CallPriLostAfterSb => as_0pri,
            };
            (Reason::Policy2Pri(policy, zero), me_loses)
        }
        (true, false) | (false, true) => {
            let policy = policies.after_sb_1pri;
            let me_loses = match policy {
                AfterSb1Pri::Disconnect => None,
                AfterSb1Pri::DiscardSecondary => Some(!my_role),
                AfterSb1Pri::Consensus => as_0pri.filter(|me_loses| *me_loses != my_role),
                AfterSb1Pri::ViolentlyAs0p | AfterSb1Pri::CallPriLostAfterSb => as_0pri,
            };
            (Reason::Policy1Pri(policy, zero), me_loses)
        }
    };
    reasons.push(reason);
    let Some(me_loses) = me_loses else { return Err(Outcome::Refuse(Obstacle::SplitBrain)) };
    let (source, target) = if me_loses { (peer, me) } else { (me, peer) };
    if source.disk <= DiskState::Inconsistent {
        return Err(Outcome::Refuse(Obstacle::SourceNotUsable));
    }
    if target.role == Role::Primary {
        match reason {
            Reason::Policy1Pri(AfterSb1Pri::CallPriLostAfterSb, _)
            | Reason::Policy2Pri(AfterSb2Pri::CallPriLostAfterSb, _) => {
                return Err(Outcome::MustDemote { me: me_loses });
            }
            // "Violently": under the running application, by order.
            _ if me_loses => return Err(Outcome::Target { full }),
            _ => return Err(Outcome::Source { full }),
        }
    }
    Ok(loser(me_loses))
}

/// `after-sb-0pri`: whether this node's changes go; `None`: not resolved (SEM §15).
fn after_sb_0pri(me: &Side, peer: &Side, policy: AfterSb0Pri) -> Option<bool> {
    let was_primary = |side: &Side| side.uuids.bitmap & 1 != 0;
    // A resync that was decided and never began has united the bitmaps: that must not change the winner.
    let changes = |side: &Side| side.out_of_sync_bits.saturating_sub(side.foreign_bits);
    let (mine, theirs) = (changes(me), changes(peer));
    let zero_changes = match (mine == 0, theirs == 0) {
        (true, true) => Some(me.tie),
        (true, false) => Some(true),
        (false, true) => Some(false),
        (false, false) => None,
    };
    // Both may have been started anew since, with united bitmaps. But a loser writes down that its disk is
    // Outdated before any bitmap is united: one that is, against a good one, has lost before.
    let lost_before = match (me.quality(), peer.quality()) {
        (1, 2) => Some(true),
        (2, 1) => Some(false),
        _ => None,
    };
    let least_changes = || lost_before.unwrap_or(if mine == theirs { me.tie } else { mine < theirs });
    // Who became Primary second is younger. When both or none were, the changes decide, as in DRBD.
    let younger = if was_primary(me) == was_primary(peer) { None } else { Some(was_primary(peer)) };
    match policy {
        AfterSb0Pri::Disconnect => None,
        AfterSb0Pri::DiscardLocal => Some(true),
        AfterSb0Pri::DiscardRemote => Some(false),
        AfterSb0Pri::DiscardZeroChanges => zero_changes,
        AfterSb0Pri::DiscardLeastChanges => Some(least_changes()),
        AfterSb0Pri::DiscardYoungerPrimary => Some(younger.or(zero_changes).unwrap_or_else(least_changes)),
        AfterSb0Pri::DiscardOlderPrimary => {
            Some(younger.map(|me_younger| !me_younger).or(zero_changes).unwrap_or_else(least_changes))
        }
    }
}

/// `--discard-my-data` on the side that has the newer data: a person wants it rolled back (DRBD 9).
fn roll_back(me: &Side, peer: &Side, verdict: Verdict, reasons: &mut Vec<Reason>) -> Verdict {
    let asked_against = match verdict {
        Verdict::Source { .. } => me.discard_my_data && !peer.discard_my_data,
        Verdict::Target { .. } => peer.discard_my_data && !me.discard_my_data,
        Verdict::NoSync | Verdict::SplitBrain | Verdict::SplitBrainHistory | Verdict::Unrelated => false,
    };
    let new_source = if me.discard_my_data { peer } else { me };
    if !asked_against {
        verdict
    } else if new_source.disk > DiskState::Inconsistent {
        reasons.push(Reason::RolledBack);
        verdict.mirrored()
    } else {
        reasons.push(Reason::DiscardIgnored);
        verdict
    }
}

/// The outcome seen from the source.
fn check_roles(
    source: &Side,
    target: &Side,
    rr_conflict: RrConflict,
    rule: Rule,
    full: bool,
    reasons: &mut Vec<Reason>,
) -> Outcome {
    if source.disk <= DiskState::Inconsistent {
        return Outcome::Refuse(Obstacle::SourceNotUsable);
    }
    if target.role != Role::Primary || target.disk < DiskState::Consistent {
        return Outcome::Source { full };
    }
    if !full && source.out_of_sync_bits == 0 && target.out_of_sync_bits == 0 {
        reasons.push(Reason::NothingToCopy);
        return Outcome::Source { full };
    }
    if frozen_in_one_generation(source, target, rule) && !target.was_told_more {
        reasons.push(Reason::NothingTold);
        return Outcome::Source { full };
    }
    reasons.push(Reason::RrConflict(rr_conflict));
    match rr_conflict {
        RrConflict::Violently => Outcome::Source { full },
        RrConflict::RetryConnect => Outcome::Retry(Obstacle::TargetIsPrimary),
        RrConflict::AutoDiscard if rule == Rule::CrashedPrimary && source.role != Role::Primary => {
            Outcome::Target { full }
        }
        RrConflict::AutoDiscard | RrConflict::Disconnect | RrConflict::CallPriLost => {
            Outcome::Refuse(Obstacle::TargetIsPrimary)
        }
    }
}

/// Two Primaries that were frozen and meet again. Whoever told its application of a write that the other one
/// misses began a generation before, or knows it (`docs/invariants.md`, "Two frozen Primaries").
fn frozen_in_one_generation(source: &Side, target: &Side, rule: Rule) -> bool {
    matches!(rule, Rule::EqualWithBits | Rule::SelfMissedFinish | Rule::PeerMissedFinish)
        && source.role == Role::Primary
        && target.role == Role::Primary
        && source.quality() == target.quality()
        && !source.crashed_primary
        && !target.crashed_primary
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
