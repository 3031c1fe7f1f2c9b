//! A decision of a handshake as a record, and in words for somebody who never saw DRBD's sources.
//!
//! The record holds both sides' facts exactly as they were exchanged, so the explanation is computed
//! from the same values as the decision and cannot disagree with it.
use super::Resource;
use super::compare::{Rule, Side, Verdict};
use super::policy::{Decided, Obstacle, Outcome, Reason};
use super::state::Role;
use super::uuid::{is_fresh, masked};
use crate::meta::UUID_JUST_CREATED;
use crate::units::{Time, VolumeNr};
use serde::{Deserialize, Serialize};
use std::fmt;

/// Decisions remembered per resource.
const REMEMBERED: usize = 16;
/// KiB that a marked block stands for.
const KIB_PER_BLOCK: u64 = 4;

/// What one meeting of the nodes concluded about one volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decision {
    /// When, on the core's clock.
    pub at: Time,
    /// Which volume.
    pub volume: VolumeNr,
    /// What this node had told.
    pub mine: Side,
    /// What the peer had told.
    pub theirs: Side,
    /// Rule, what came in between, outcome.
    pub decided: Decided,
    /// Nothing was done: somebody only asked what would happen.
    pub dry_run: bool,
}

/// Who is who.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Names {
    /// The resource.
    pub resource: String,
    /// This node.
    pub me: String,
    /// The other one.
    pub peer: String,
}

impl fmt::Display for Decision {
    /// One line for the log, in DRBD's words.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Decided { comparison, reasons, outcome } = &self.decided;
        write!(
            f,
            "volume {}: uuid_compare()={} by rule {} ({:?})",
            self.volume.0,
            comparison.verdict.number(),
            comparison.rule.number(),
            comparison.rule
        )?;
        for reason in reasons {
            write!(f, ", {reason:?}")?;
        }
        write!(f, ": {outcome:?}")
    }
}

impl Resource {
    pub(super) fn remember_decision(&mut self, decision: &Decision) {
        if self.decisions.len() >= REMEMBERED {
            self.decisions.pop_front();
        }
        self.decisions.push_back(decision.clone());
    }

    /// What the last handshakes concluded, oldest first.
    pub fn decisions(&self) -> impl Iterator<Item = &Decision> {
        self.decisions.iter()
    }

    /// Who is who, for [`Decision::explain`].
    #[must_use]
    pub fn names(&self) -> Names {
        Names {
            resource: self.cfg.name.clone(),
            me: self.cfg.node_name.clone(),
            peer: self.cfg.peer_name.clone(),
        }
    }
}

impl Decision {
    /// A Primary in the way of its own resync is this node.
    pub(super) fn target_would_be_me(&self) -> bool {
        self.mine.role == Role::Primary
            && (self.theirs.role != Role::Primary
                || matches!(self.decided.comparison.verdict, Verdict::Target { .. }))
    }

    /// The outcome in a few words, for the answer to a dry run.
    #[must_use]
    pub fn what_would_happen(&self) -> String {
        match self.decided.outcome {
            Outcome::NoSync => "no resync, would become Connected immediately".into(),
            Outcome::Source { full } => {
                format!("would become SyncSource, copying {} to the peer", self.amount(full))
            }
            Outcome::Target { full } => {
                format!("would become SyncTarget, copying {} from the peer", self.amount(full))
            }
            Outcome::MustDemote { me: true } => {
                "this Primary would be demoted and its changes given up".into()
            }
            Outcome::MustDemote { me: false } => {
                "the peer, Primary, would be demoted and its changes given up".into()
            }
            Outcome::Retry(_) => "would not connect, and try again".into(),
            Outcome::Refuse(Obstacle::SplitBrain) => "split brain, would not connect".into(),
            Outcome::Refuse(Obstacle::Unrelated) => "unrelated data, would not connect".into(),
            Outcome::Refuse(Obstacle::TargetIsPrimary) => {
                "a Primary with good data would have to become SyncTarget, would not connect".into()
            }
            Outcome::Refuse(Obstacle::SourceNotUsable) => {
                "the node that should be SyncSource has no usable disk, would not connect".into()
            }
            Outcome::Refuse(Obstacle::NotTheDataLostLast) => {
                "a Primary without a good disk would be shown older data, would not connect".into()
            }
        }
    }

    fn amount(&self, full: bool) -> String {
        if full {
            return "everything".into();
        }
        match (self.mine.out_of_sync_bits, self.theirs.out_of_sync_bits) {
            (0, 0) => "nothing".into(),
            (mine, theirs) => {
                let (least, most) = (mine.max(theirs), mine.saturating_add(theirs));
                if mine == 0 || theirs == 0 {
                    format!("the {} KiB marked as changed", most * KIB_PER_BLOCK)
                } else {
                    format!(
                        "what either node marked as changed ({} to {} KiB)",
                        least * KIB_PER_BLOCK,
                        most * KIB_PER_BLOCK
                    )
                }
            }
        }
    }

    /// What each node had, which rule matched, what follows, and the safe next command.
    #[must_use]
    pub fn explain(&self, names: &Names) -> String {
        let mut text = String::new();
        let mut line = |content: &str| {
            text.push_str(content);
            text.push('\n');
        };
        line(&format!("volume {} of {}: what the nodes told each other", self.volume.0, names.resource));
        for row in self.table(names) {
            line(&row);
        }
        line("");
        line(&format!("rule {}: {}", self.decided.comparison.rule.number(), self.rule_in_words(names)));
        for reason in &self.decided.reasons {
            line(&format!("then: {}", self.reason_in_words(*reason, names)));
        }
        line(&format!(
            "{}: {}",
            if self.dry_run { "would follow" } else { "so" },
            self.outcome_in_words(names)
        ));
        line(&format!("next: {}", self.next_command(names)));
        text
    }

    fn table(&self, names: &Names) -> Vec<String> {
        let sides = [&self.mine, &self.theirs];
        let mut rows = vec![[String::new(), format!("{} (this node)", names.me), names.peer.clone()]];
        let mut row = |title: &str, of: &dyn Fn(&Side) -> String| {
            rows.push([title.to_owned(), of(sides[0]), of(sides[1])]);
        };
        row("data generation", &|side| generation(side.uuids.current));
        row("blocks marked since", &|side| generation(side.uuids.bitmap));
        row("earlier generations", &|side| match side.uuids.history {
            [0, 0] => "none".into(),
            [newest, 0] => generation(newest),
            [newest, older] => format!("{}, {}", generation(newest), generation(older)),
        });
        row("marked blocks", &|side| {
            format!("{} ({} KiB)", side.out_of_sync_bits, side.out_of_sync_bits.saturating_mul(KIB_PER_BLOCK))
        });
        row("disk", &|side| side.disk.name().into());
        row("role", &|side| side.role.name().into());
        if sides.iter().any(|side| side.crashed_primary) {
            row("crashed as Primary", &|side| if side.crashed_primary { "yes" } else { "no" }.into());
        }
        if sides.iter().any(|side| side.discard_my_data) {
            row("told to discard", &|side| if side.discard_my_data { "yes" } else { "no" }.into());
        }
        let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
        let (first, second) = (width(0), width(1));
        rows.iter()
            .map(|[title, mine, theirs]| {
                format!("  {title:first$}  {mine:second$}  {theirs}").trim_end().to_owned()
            })
            .collect()
    }

    fn rule_in_words(&self, names: &Names) -> String {
        let (me, peer) = (names.me.as_str(), names.peer.as_str());
        let went_on = |ahead: &str, behind: &str| {
            format!(
                "{ahead} went on from the generation that {behind} still has; {behind} lacks only what was marked since"
            )
        };
        let missed_finish = |source: &str, target: &str| {
            format!(
                "{source} was copying to {target}; {target} finished, but {source} did not hear of it. Copying what {source} still has marked is enough"
            )
        };
        let was_source = |source: &str, target: &str| {
            format!(
                "{source} was about to copy to {target}, and {target} did not record the start; what is marked has still to be copied"
            )
        };
        let lost_start = |source: &str, target: &str| {
            format!(
                "{source} had started to copy to {target}, and {target} did not record the last start; it still lacks what {source} has marked"
            )
        };
        let after_finish = |source: &str, target: &str| {
            format!(
                "{target} finished copying from {source}, {source} did not hear of it and went on; {target} lacks only what was marked since"
            )
        };
        let history = |ahead: &str, behind: &str| {
            format!(
                "{ahead} had the generation of {behind} long ago; what changed since then is not marked any more"
            )
        };
        match self.decided.comparison.rule {
            Rule::Diskless => "one node has no disk, so there is nothing to compare".into(),
            Rule::BothJustCreated => "both disks are newly created: neither holds data yet".into(),
            Rule::SelfJustCreated => format!("the disk of {me} is newly created, {peer} has data"),
            Rule::PeerJustCreated => format!("the disk of {peer} is newly created, {me} has data"),
            Rule::SelfMissedFinish => missed_finish(me, peer),
            Rule::PeerMissedFinish => missed_finish(peer, me),
            Rule::SelfWasSource => was_source(me, peer),
            Rule::PeerWasSource => was_source(peer, me),
            Rule::Equal if self.decided.comparison.verdict == Verdict::NoSync => {
                "both nodes have the same generation, nobody crashed, and no block is marked: the copies are equal".into()
            }
            Rule::Equal => format!(
                "both nodes have the same generation, but {} crashed as Primary: writes that were on their way may be on one node only, and those places are marked",
                self.crashed(names)
            ),
            Rule::EqualWithPrimary => format!(
                "both nodes have the same generation, {} crashed as Primary, and {} is Primary now, so what its application sees counts",
                self.crashed(names),
                self.primaries(names)
            ),
            Rule::EqualWithBits => {
                "both nodes have the same generation and nobody crashed, but blocks are marked: they may differ until it is proved that they do not".into()
            }
            Rule::CrashedPrimary => format!(
                "both nodes have the same generation, and {} crashed as Primary. Its application was told that writes are done which may never have left it (protocol A or B), so its copy counts",
                self.crashed(names)
            ),
            Rule::BitmapPeer => went_on(peer, me),
            Rule::BitmapSelf => went_on(me, peer),
            Rule::LostSyncUuidPeer | Rule::LostStartsPeer => lost_start(peer, me),
            Rule::LostSyncUuidSelf | Rule::LostStartsSelf => lost_start(me, peer),
            Rule::WentOnAfterFinishPeer => after_finish(peer, me),
            Rule::WentOnAfterFinishSelf => after_finish(me, peer),
            Rule::HistoryPeer => history(peer, me),
            Rule::HistorySelf => history(me, peer),
            Rule::BitmapBoth => {
                "split brain: both nodes were changed separately since the generation both started from; each has marked what it changed".into()
            }
            Rule::BitmapBothStarted => {
                "split brain: both nodes were changed separately, one of them in the middle of a copy from the other; what differs is marked".into()
            }
            Rule::HistoryBoth => {
                "split brain: both nodes were changed separately, and their last common generation is so old that the marks do not cover the difference".into()
            }
            Rule::NothingCommon => "the nodes have no generation in common: these are copies of different data".into(),
        }
    }

    fn crashed(&self, names: &Names) -> String {
        match (self.mine.crashed_primary, self.theirs.crashed_primary) {
            (true, false) => names.me.clone(),
            (false, true) => names.peer.clone(),
            _ => format!("{} and {}", names.me, names.peer),
        }
    }

    fn primaries(&self, names: &Names) -> String {
        match (self.mine.role == Role::Primary, self.theirs.role == Role::Primary) {
            (true, false) => names.me.clone(),
            (false, true) => names.peer.clone(),
            _ => format!("each of {} and {}", names.me, names.peer),
        }
    }

    fn reason_in_words(&self, reason: Reason, names: &Names) -> String {
        let Names { me, peer, .. } = names;
        match reason {
            Reason::DiskStates => "the disk of one node is Inconsistent, which no rule can make a source; the better disk is the source".into(),
            Reason::DiscardMyData => format!(
                "the operator of {} said --discard-my-data: its changes go",
                if self.mine.discard_my_data { me } else { peer }
            ),
            Reason::RolledBack => format!(
                "the operator of {} said --discard-my-data: its newer data is rolled back to that of the other node",
                if self.mine.discard_my_data { me } else { peer }
            ),
            Reason::DiscardIgnored => {
                "--discard-my-data is not followed: the other node's disk cannot be a source".into()
            }
            Reason::Policy0Pri(policy) => {
                format!("nobody is Primary, so after-sb-0pri counts: {}", policy.name())
            }
            Reason::Policy1Pri(policy, zero) => format!(
                "{} is Primary, so after-sb-1pri counts: {} (after-sb-0pri: {})",
                self.primaries(names),
                policy.name(),
                zero.name()
            ),
            Reason::Policy2Pri(policy, zero) => format!(
                "both nodes are Primary, so after-sb-2pri counts: {} (after-sb-0pri: {})",
                policy.name(),
                zero.name()
            ),
            Reason::RrConflict(policy) => format!(
                "the node that should be overwritten is Primary with good data, so its rr-conflict counts: {}",
                policy.name()
            ),
            Reason::NothingToCopy => {
                "the node that should be overwritten is Primary, but no block is marked: nothing changes under its application".into()
            }
            Reason::NothingTold => {
                "both nodes are Primary in one generation: what differs was told to no application, and is written again".into()
            }
        }
    }

    fn outcome_in_words(&self, names: &Names) -> String {
        let Names { me, peer, .. } = names;
        let how = if self.decided.compare_blocks() {
            ", comparing them first where checksums are configured"
        } else {
            ""
        };
        match self.decided.outcome {
            Outcome::NoSync if self.decided.comparison.rule == Rule::Diskless => {
                "they connect; the node without a disk uses the other's".into()
            }
            Outcome::NoSync if self.decided.comparison.rule == Rule::BothJustCreated => {
                "they connect; neither becomes usable until somebody says which data counts".into()
            }
            Outcome::NoSync => "they connect at once, nothing is copied".into(),
            Outcome::Source { full } => format!("{me} copies {} to {peer}{how}", self.amount(full)),
            Outcome::Target { full } => format!("{peer} copies {} to {me}{how}", self.amount(full)),
            Outcome::MustDemote { me: mine } => {
                let loser = if mine { me } else { peer };
                format!(
                    "{loser} is made Secondary if nobody uses it, gives its changes up, and the nodes meet again"
                )
            }
            Outcome::Retry(_) => "they do not connect and try again".into(),
            Outcome::Refuse(_) => {
                "they do not connect; both stay as they are (StandAlone) and nothing is overwritten".into()
            }
        }
    }

    fn next_command(&self, names: &Names) -> String {
        let Names { resource, me, peer } = names;
        let status = format!("nothing to do; to watch: drbdadm status {resource}");
        match self.decided.outcome {
            Outcome::Refuse(Obstacle::SplitBrain) => {
                format!(
                    "decide whose changes go. There: drbdadm secondary {resource}; drbdadm disconnect {resource}; drbdadm connect --discard-my-data {resource}. On the other node: drbdadm connect {resource}"
                )
            }
            Outcome::Refuse(Obstacle::Unrelated) => format!(
                "if both shall hold the same data, decide whose goes. There: drbdadm invalidate {resource}; then on both: drbdadm connect {resource}"
            ),
            Outcome::Refuse(Obstacle::TargetIsPrimary) | Outcome::Retry(_) => {
                let primary = if self.target_would_be_me() { me } else { peer };
                format!(
                    "on {primary}: stop the application, drbdadm secondary {resource}; then on both: drbdadm connect {resource}"
                )
            }
            Outcome::Refuse(Obstacle::SourceNotUsable) => format!(
                "if the data of one node shall count although its disk is not known to be good, there: drbdadm primary --force {resource}; then on both: drbdadm connect {resource}"
            ),
            Outcome::Refuse(Obstacle::NotTheDataLostLast) => format!(
                "attach the disk of the Primary again (drbdadm attach {resource}), or stop the application and drbdadm secondary {resource} there; then on both: drbdadm connect {resource}"
            ),
            Outcome::NoSync if self.decided.comparison.rule == Rule::BothJustCreated => format!(
                "on the node whose data counts: drbdadm primary --force {resource}; or, if both are empty: drbdadm new-current-uuid --clear-bitmap {resource}"
            ),
            Outcome::NoSync if self.decided.comparison.rule == Rule::Diskless => {
                format!("to have two copies again, on the node without a disk: drbdadm attach {resource}")
            }
            Outcome::NoSync
            | Outcome::Source { .. }
            | Outcome::Target { .. }
            | Outcome::MustDemote { .. }
                if self.dry_run =>
            {
                format!("to let it happen: drbdadm connect {resource}")
            }
            Outcome::NoSync
            | Outcome::Source { .. }
            | Outcome::Target { .. }
            | Outcome::MustDemote { .. } => status,
        }
    }
}

/// A generation as people can tell them apart: its first eight digits.
fn generation(uuid: u64) -> String {
    if masked(uuid) == UUID_JUST_CREATED {
        "just created".into()
    } else if is_fresh(uuid) {
        "none".into()
    } else {
        format!("{:08X}", masked(uuid) >> 32)
    }
}
