//! The decision of a handshake: both sides come to mirrored answers for every input, and every rule of
//! the table is there for the history it is named after.
use lockstep_replicator::core::compare::{Comparison, Fix, Rule, Side, Verdict, compare};
use lockstep_replicator::core::config::{AfterSb0Pri, AfterSb1Pri, AfterSb2Pri, Protocol, RrConflict};
use lockstep_replicator::core::explain::{Decision, Names};
use lockstep_replicator::core::policy::{Decided, Obstacle, Outcome, Policies, Reason, decide};
use lockstep_replicator::core::state::{DiskState, Role};
use lockstep_replicator::core::uuid::{SYNC_START_OFFSET, UuidSet};
use lockstep_replicator::units::{Time, VolumeNr};
use std::collections::BTreeSet;

const OFF: u64 = SYNC_START_OFFSET;

fn side(uuids: [u64; 4]) -> Side {
    Side {
        uuids: UuidSet::from_array(uuids),
        crashed_primary: false,
        role: Role::Secondary,
        disk: DiskState::UpToDate,
        out_of_sync_bits: 0,
        foreign_bits: 0,
        discard_my_data: false,
        was_told_more: false,
        tie: false,
    }
}

fn policies() -> Policies {
    Policies {
        protocol: Protocol::C,
        after_sb_0pri: AfterSb0Pri::Disconnect,
        after_sb_1pri: AfterSb1Pri::Disconnect,
        after_sb_2pri: AfterSb2Pri::Disconnect,
        always_asbp: false,
        rr_conflict: RrConflict::Disconnect,
        peer_rr_conflict: RrConflict::Disconnect,
    }
}

#[track_caller]
fn check_comparison(me: &Side, peer: &Side, protocol: Protocol) -> Comparison {
    let mine = compare(me, peer, protocol);
    let theirs = compare(peer, me, protocol);
    assert_eq!(mine.verdict, theirs.verdict.mirrored(), "{me:?} {peer:?}");
    assert_eq!(mine.rule, theirs.rule.mirrored(), "{me:?} {peer:?}");
    assert_eq!((mine.fix, mine.peer_fix), (theirs.peer_fix, theirs.fix), "{me:?} {peer:?}");
    mine
}

#[track_caller]
fn check_decision(me: &Side, peer: &Side, policies: &Policies) -> Decided {
    let mine = decide(me, peer, policies);
    let theirs = decide(peer, me, &policies.mirrored());
    assert_eq!(mine.outcome, theirs.outcome.mirrored(), "{me:?} {peer:?} {policies:?}");
    let said_so = mine.reasons.iter().any(|reason| {
        matches!(
            reason,
            Reason::DiscardMyData | Reason::Policy0Pri(_) | Reason::Policy1Pri(..) | Reason::Policy2Pri(..)
        )
    });
    let resync = matches!(mine.outcome, Outcome::Source { .. } | Outcome::Target { .. });
    if mine.comparison.verdict.is_split_brain() && resync {
        assert!(said_so, "a split brain was resolved without anybody's word: {me:?} {peer:?} {policies:?}");
    }
    assert!(
        mine.comparison.verdict != Verdict::Unrelated || mine.outcome == Outcome::Refuse(Obstacle::Unrelated),
        "{me:?} {peer:?}"
    );
    let (source, target) = match mine.outcome {
        Outcome::Source { .. } => (me, peer),
        Outcome::Target { .. } => (peer, me),
        Outcome::NoSync | Outcome::MustDemote { .. } | Outcome::Retry(_) | Outcome::Refuse(_) => return mine,
    };
    assert!(source.disk > DiskState::Inconsistent, "an unusable source: {me:?} {peer:?} {policies:?}");
    let by_force = [policies.rr_conflict, policies.peer_rr_conflict].contains(&RrConflict::Violently)
        || policies.after_sb_1pri == AfterSb1Pri::ViolentlyAs0p
        || policies.after_sb_2pri == AfterSb2Pri::ViolentlyAs0p;
    if target.role == Role::Primary && target.disk >= DiskState::Consistent && !by_force {
        let nothing = me.out_of_sync_bits == 0 && peer.out_of_sync_bits == 0;
        // Two Primaries in one generation, none of which told its application of more than the other has.
        let rules = [Rule::EqualWithBits, Rule::SelfMissedFinish, Rule::PeerMissedFinish];
        let untold = rules.contains(&mine.comparison.rule)
            && source.role == Role::Primary
            && source.disk >= DiskState::Consistent
            && (source.crashed_primary, target.crashed_primary) == (false, false)
            && !target.was_told_more;
        assert!(nothing || untold, "data changes under an application: {me:?} {peer:?} {policies:?}");
    }
    mine
}

/// Our identifiers, the peer's, the rule they lead to, its verdict, our fix.
type Example = ([u64; 4], [u64; 4], Rule, Verdict, Fix);

/// Every rule with identifiers that lead to it.
fn examples() -> Vec<Example> {
    let source = Verdict::Source { full: false };
    let all = Verdict::Source { full: true };
    vec![
        ([4, 0, 0, 0], [4, 0, 0, 0], Rule::BothJustCreated, Verdict::NoSync, Fix::None),
        ([4, 0, 0, 0], [0, 0, 0, 0], Rule::BothJustCreated, Verdict::NoSync, Fix::None),
        ([0x100, 0, 0, 0], [4, 0, 0, 0], Rule::PeerJustCreated, all, Fix::None),
        ([0x200, 0x300, 0x100, 0x50], [0x200, 0, 0x300, 0x100], Rule::SelfMissedFinish, source, Fix::Finish),
        ([0x200, 0x300, 0x100, 0], [0x201, 0, 0x400, 0x100], Rule::SelfWasSource, source, Fix::None),
        ([0x200, 0, 0x100, 0], [0x201, 0, 0x100, 0], Rule::Equal, Verdict::NoSync, Fix::None),
        ([0x200, 0x101, 0, 0], [0x100, 0, 0, 0], Rule::BitmapSelf, source, Fix::None),
        ([0x200, 0x100 + OFF, 0x100, 0], [0x100, 0, 0, 0], Rule::LostSyncUuidSelf, source, Fix::UndoStart),
        (
            [0x200, 0x100 + 5 * OFF, 0x600, 0x500],
            [0x101 + 2 * OFF, 0, 0, 0],
            Rule::LostStartsSelf,
            source,
            Fix::Rebase,
        ),
        ([0x300, 0x700, 0x200, 0], [0x200, 0, 0x700, 0], Rule::WentOnAfterFinishSelf, source, Fix::Rebase),
        (
            [0x300, 0x700, 0x600, 0x500],
            [0x200, 0, 0x700, 0],
            Rule::WentOnAfterFinishSelf,
            source,
            Fix::Rebase,
        ),
        ([0x300, 0x250, 0x200, 0x100], [0x100, 0, 0, 0], Rule::HistorySelf, all, Fix::None),
        ([0x300, 0x100, 0, 0], [0x400, 0x101, 0, 0], Rule::BitmapBoth, Verdict::SplitBrain, Fix::None),
        (
            [0x300, 0x100 + 3 * OFF, 0, 0],
            [0x400, 0x100 + OFF, 0, 0],
            Rule::BitmapBothStarted,
            Verdict::SplitBrain,
            Fix::None,
        ),
        (
            [0x300, 0x250, 0x100, 0],
            [0x400, 0x350, 0x100, 0],
            Rule::HistoryBoth,
            Verdict::SplitBrainHistory,
            Fix::None,
        ),
        // Each names the other as older: nobody's data goes by that.
        (
            [0x300, 0x400, 0, 0],
            [0x400, 0x300, 0, 0],
            Rule::HistoryBoth,
            Verdict::SplitBrainHistory,
            Fix::None,
        ),
        ([0x300, 0, 0, 0], [0x400, 0, 0, 0], Rule::NothingCommon, Verdict::Unrelated, Fix::None),
        // Both were forced to be good before they ever met.
        ([0x300, 4, 0, 0], [0x400, 4, 0, 0], Rule::HistoryBoth, Verdict::SplitBrainHistory, Fix::None),
        // Two empty or fresh slots are no common history.
        ([0x300, 0, 4, 0], [0x400, 0, 4, 0], Rule::NothingCommon, Verdict::Unrelated, Fix::None),
    ]
}

#[test]
fn every_rule_by_its_history() {
    let mut seen = BTreeSet::new();
    for (mine, theirs, rule, verdict, fix) in examples() {
        let found = check_comparison(&side(mine), &side(theirs), Protocol::C);
        assert_eq!((found.rule, found.verdict, found.fix), (rule, verdict, fix), "{mine:x?} {theirs:x?}");
        seen.insert(rule);
        seen.insert(rule.mirrored());
    }
    let equal = side([0x200, 0, 0, 0]);
    let primary = Side { role: Role::Primary, ..equal };
    let crashed = Side { crashed_primary: true, ..equal };
    let marked = Side { out_of_sync_bits: 7, ..equal };
    let tie = Side { tie: true, ..equal };
    let outdated = Side { disk: DiskState::Outdated, ..equal };
    let source = Verdict::Source { full: false };
    for (me, peer, protocol, rule, verdict) in [
        (crashed, tie, Protocol::C, Rule::Equal, source),
        (crashed, Side { crashed_primary: true, ..tie }, Protocol::C, Rule::Equal, source),
        (primary, crashed, Protocol::C, Rule::EqualWithPrimary, source),
        (
            Side { crashed_primary: true, ..primary },
            primary,
            Protocol::C,
            Rule::EqualWithPrimary,
            Verdict::SplitBrainHistory,
        ),
        (marked, tie, Protocol::C, Rule::EqualWithBits, source),
        (primary, marked, Protocol::C, Rule::EqualWithBits, source),
        // The crashed one may have acknowledged what never arrived.
        (crashed, primary, Protocol::A, Rule::CrashedPrimary, source),
        (crashed, tie, Protocol::B, Rule::CrashedPrimary, source),
        (Side { crashed_primary: true, ..primary }, crashed, Protocol::A, Rule::EqualWithPrimary, source),
        // Known to be older: no source, whoever is Primary or crashed.
        (marked, Side { role: Role::Primary, ..outdated }, Protocol::C, Rule::EqualWithBits, source),
        (equal, Side { crashed_primary: true, ..outdated }, Protocol::A, Rule::CrashedPrimary, source),
    ] {
        let found = check_comparison(&me, &peer, protocol);
        assert_eq!((found.rule, found.verdict), (rule, verdict), "{me:?} {peer:?} {protocol:?}");
        seen.insert(rule);
    }
    let diskless = Side { disk: DiskState::Diskless, ..equal };
    let found = check_decision(&diskless, &equal, &policies());
    assert_eq!((found.comparison.rule, found.outcome), (Rule::Diskless, Outcome::NoSync));
    seen.insert(Rule::Diskless);
    let missing: Vec<_> = Rule::ALL.iter().filter(|rule| !seen.contains(rule)).collect();
    assert!(missing.is_empty(), "rules without an example: {missing:?}");
}

#[test]
fn all_identifiers_over_a_small_alphabet_are_judged_alike_on_both_sides() {
    // Empty, fresh, two generations (one with its Primary bit), and a start from one of them.
    let ids = [0, 4, 0x100, 0x201, 0x100 + OFF];
    let sets: Vec<Side> = (0..ids.len().pow(4))
        .map(|n| side([n, n / 5, n / 25, n / 125].map(|digit| ids[digit % 5])))
        .collect();
    let mut seen = BTreeSet::new();
    for me in &sets {
        for peer in &sets {
            let me = Side { tie: true, ..*me };
            let found = check_comparison(&me, peer, Protocol::C);
            seen.insert(found.rule);
            if found.verdict == Verdict::NoSync {
                let alike = me.uuids.current & !1 == peer.uuids.current & !1;
                assert!(alike || found.rule == Rule::BothJustCreated, "{me:?} {peer:?}");
            }
        }
    }
    assert!(seen.len() >= 16, "{seen:?}");
}

fn all_states(uuids: [u64; 4], tie: bool) -> Vec<Side> {
    let disks = [DiskState::Inconsistent, DiskState::Outdated, DiskState::UpToDate];
    let mut sides = Vec::new();
    for disk in disks {
        for role in [Role::Secondary, Role::Primary] {
            for n in 0..12 {
                sides.push(Side {
                    disk,
                    role,
                    crashed_primary: n & 1 != 0,
                    discard_my_data: n & 2 != 0,
                    out_of_sync_bits: n / 4,
                    tie,
                    ..side(uuids)
                });
            }
        }
    }
    sides.push(Side { disk: DiskState::Diskless, tie, ..side(uuids) });
    sides.push(Side { disk: DiskState::Diskless, role: Role::Primary, tie, ..side(uuids) });
    sides.push(Side { disk: DiskState::Consistent, tie, ..side(uuids) });
    sides
}

#[test]
fn all_roles_disks_flags_and_bits_lead_to_mirrored_outcomes_for_every_rule() {
    let rr = [
        (RrConflict::Disconnect, RrConflict::Violently),
        (RrConflict::CallPriLost, RrConflict::RetryConnect),
        (RrConflict::AutoDiscard, RrConflict::AutoDiscard),
        (RrConflict::RetryConnect, RrConflict::Disconnect),
    ];
    for (mine, theirs, ..) in examples() {
        for (me, peer) in [(mine, theirs), (theirs, mine)] {
            let (us, them) = (all_states(me, true), all_states(peer, false));
            for me in &us {
                for peer in &them {
                    for (rr_conflict, peer_rr_conflict) in rr {
                        for protocol in [Protocol::A, Protocol::C] {
                            let policies = Policies { protocol, rr_conflict, peer_rr_conflict, ..policies() };
                            check_decision(me, peer, &policies);
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn all_split_brain_policies_lead_to_mirrored_outcomes() {
    let splits = examples().into_iter().filter(|example| example.3.is_split_brain());
    for (mine, theirs, ..) in splits {
        let (us, them) = (all_states(mine, true), all_states(theirs, false));
        for me in us.iter().filter(|side| !side.crashed_primary) {
            for peer in them.iter().filter(|side| !side.crashed_primary) {
                for &after_sb_0pri in AfterSb0Pri::ALL {
                    for &after_sb_1pri in AfterSb1Pri::ALL {
                        for &after_sb_2pri in AfterSb2Pri::ALL {
                            for always_asbp in [false, true] {
                                let policies = Policies {
                                    after_sb_0pri,
                                    after_sb_1pri,
                                    after_sb_2pri,
                                    always_asbp,
                                    ..policies()
                                };
                                check_decision(me, peer, &policies);
                            }
                        }
                    }
                }
            }
        }
    }
}

/// What is said about a decision names both nodes and a command of the resource, on both sides; what both are told
/// to do is possible: only one of them is asked to give way.
#[test]
fn every_decision_can_be_told_in_words() {
    let names = Names { resource: "r0".into(), me: "alpha".into(), peer: "beta".into() };
    let (mut rules, mut outcomes, mut reasons) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    let mut told = |me: &Side, peer: &Side, policies: &Policies, dry_run: bool| {
        let decided = check_decision(me, peer, policies);
        rules.insert(decided.comparison.rule);
        outcomes.insert(format!("{:?}", decided.outcome));
        reasons.extend(decided.reasons.iter().map(|reason| format!("{reason:?}")));
        let number = format!("rule {}: ", decided.comparison.rule.number());
        let line = format!("uuid_compare()={} by rule", decided.comparison.verdict.number());
        let decision =
            Decision { at: Time(0), volume: VolumeNr(0), mine: *me, theirs: *peer, decided, dry_run };
        let text = decision.explain(&names);
        assert!(text.contains("alpha (this node)") && text.contains("beta"), "{text}");
        assert!(text.contains(&number), "{text}");
        let so = if dry_run { "\nwould follow: " } else { "\nso: " };
        assert_eq!(text.matches(so).count(), 1, "{text}");
        let next = text.lines().last().unwrap_or_default();
        assert!(next.starts_with("next: ") && next.contains("drbdadm ") && next.contains("r0"), "{text}");
        assert!(decision.to_string().contains(&line), "{decision}");
        assert!(!decision.what_would_happen().is_empty());
        let gives_way = next.contains("secondary r0; then");
        assert!(!gives_way || next.contains("on alpha") != next.contains("on beta"), "{text}");
    };
    let rr = [
        (RrConflict::Disconnect, RrConflict::Violently),
        (RrConflict::CallPriLost, RrConflict::RetryConnect),
        (RrConflict::AutoDiscard, RrConflict::AutoDiscard),
        (RrConflict::RetryConnect, RrConflict::RetryConnect),
        (RrConflict::Disconnect, RrConflict::Disconnect),
    ];
    let histories = examples().into_iter().map(|(mine, theirs, ..)| (mine, theirs));
    for (mine, theirs) in histories.chain([([0x200, 0, 0, 0], [0x200, 0, 0, 0])]) {
        for (mine, theirs) in [(mine, theirs), (theirs, mine)] {
            for (n, me) in all_states(mine, true).iter().enumerate() {
                for (m, peer) in all_states(theirs, false).iter().enumerate() {
                    let (rr_conflict, peer_rr_conflict) = rr[(n + m) % rr.len()];
                    let policies = Policies {
                        protocol: [Protocol::A, Protocol::C][n % 2],
                        after_sb_0pri: AfterSb0Pri::ALL[(n + m) % AfterSb0Pri::ALL.len()],
                        after_sb_1pri: AfterSb1Pri::ALL[(n + 2 * m) % AfterSb1Pri::ALL.len()],
                        after_sb_2pri: AfterSb2Pri::ALL[(n + 3 * m) % AfterSb2Pri::ALL.len()],
                        always_asbp: m % 2 == 0,
                        rr_conflict,
                        peer_rr_conflict,
                    };
                    told(me, peer, &policies, m % 3 == 0);
                }
            }
        }
    }
    let missing: Vec<_> = Rule::ALL.iter().filter(|rule| !rules.contains(rule)).collect();
    assert!(missing.is_empty(), "rules never told: {missing:?}");
    assert!(outcomes.len() >= 13, "{outcomes:?}");
    assert!(reasons.len() >= 20, "{reasons:?}");
}

/// A split brain in which we were Primary first and changed `mine` blocks.
fn split(mine: u64, theirs: u64) -> (Side, Side) {
    let me = Side { out_of_sync_bits: mine, tie: true, ..side([0x300, 0x101, 0, 0]) };
    (me, Side { out_of_sync_bits: theirs, ..side([0x400, 0x100, 0, 0]) })
}

#[test]
fn after_sb_0pri_value_by_value() {
    let i_lose = Outcome::Target { full: false };
    let i_win = Outcome::Source { full: false };
    let open = Outcome::Refuse(Obstacle::SplitBrain);
    for (policy, mine, theirs, expected) in [
        (AfterSb0Pri::Disconnect, 0, 5, open),
        (AfterSb0Pri::DiscardYoungerPrimary, 1, 5, i_win),
        (AfterSb0Pri::DiscardOlderPrimary, 9, 5, i_lose),
        (AfterSb0Pri::DiscardZeroChanges, 0, 5, i_lose),
        (AfterSb0Pri::DiscardZeroChanges, 5, 0, i_win),
        (AfterSb0Pri::DiscardZeroChanges, 0, 0, i_lose),
        (AfterSb0Pri::DiscardZeroChanges, 5, 1, open),
        (AfterSb0Pri::DiscardLeastChanges, 4, 5, i_lose),
        (AfterSb0Pri::DiscardLeastChanges, 6, 5, i_win),
        (AfterSb0Pri::DiscardLeastChanges, 5, 5, i_lose),
        (AfterSb0Pri::DiscardLocal, 5, 5, i_lose),
        (AfterSb0Pri::DiscardRemote, 5, 5, i_win),
    ] {
        let (me, peer) = split(mine, theirs);
        let found = check_decision(&me, &peer, &Policies { after_sb_0pri: policy, ..policies() });
        assert_eq!(found.outcome, expected, "{policy:?} {mine} {theirs}");
    }
    // Both were Primary at the split: the changes decide.
    let (mut me, mut peer) = split(3, 2);
    peer.uuids.bitmap |= 1;
    let younger = Policies { after_sb_0pri: AfterSb0Pri::DiscardYoungerPrimary, ..policies() };
    assert_eq!(check_decision(&me, &peer, &younger).outcome, i_win);
    me.out_of_sync_bits = 0;
    assert_eq!(check_decision(&me, &peer, &younger).outcome, i_lose);
}

#[test]
fn after_sb_1pri_and_2pri_value_by_value() {
    let (me, peer) = split(1, 5);
    let me = Side { role: Role::Primary, ..me };
    let i_lose = Outcome::Target { full: false };
    let i_win = Outcome::Source { full: false };
    let open = Outcome::Refuse(Obstacle::SplitBrain);
    let least = AfterSb0Pri::DiscardLeastChanges;
    let most = AfterSb0Pri::DiscardYoungerPrimary;
    for (policy, zero, expected) in [
        (AfterSb1Pri::Disconnect, least, open),
        // Would discard the Primary's: no consensus.
        (AfterSb1Pri::Consensus, least, open),
        (AfterSb1Pri::Consensus, most, i_win),
        (AfterSb1Pri::DiscardSecondary, least, i_win),
        (AfterSb1Pri::CallPriLostAfterSb, least, Outcome::MustDemote { me: true }),
        (AfterSb1Pri::CallPriLostAfterSb, most, i_win),
        (AfterSb1Pri::ViolentlyAs0p, least, i_lose),
        (AfterSb1Pri::ViolentlyAs0p, most, i_win),
        (AfterSb1Pri::ViolentlyAs0p, AfterSb0Pri::Disconnect, open),
    ] {
        let policies = Policies { after_sb_0pri: zero, after_sb_1pri: policy, ..policies() };
        assert_eq!(check_decision(&me, &peer, &policies).outcome, expected, "{policy:?} {zero:?}");
    }
    let peer = Side { role: Role::Primary, ..peer };
    for (policy, zero, expected) in [
        (AfterSb2Pri::Disconnect, least, open),
        (AfterSb2Pri::CallPriLostAfterSb, least, Outcome::MustDemote { me: true }),
        (AfterSb2Pri::CallPriLostAfterSb, most, Outcome::MustDemote { me: false }),
        (AfterSb2Pri::ViolentlyAs0p, least, i_lose),
        (AfterSb2Pri::ViolentlyAs0p, most, i_win),
    ] {
        let policies = Policies { after_sb_0pri: zero, after_sb_2pri: policy, ..policies() };
        assert_eq!(check_decision(&me, &peer, &policies).outcome, expected, "{policy:?} {zero:?}");
    }
}

#[test]
fn an_ancestor_in_the_history_only_needs_both_to_say_always_asbp_and_copies_everything() {
    let me = Side { out_of_sync_bits: 5, ..side([0x300, 0x250, 0x100, 0]) };
    let peer = Side { out_of_sync_bits: 1, ..side([0x400, 0x350, 0x100, 0]) };
    let least = Policies { after_sb_0pri: AfterSb0Pri::DiscardLeastChanges, ..policies() };
    assert_eq!(check_decision(&me, &peer, &least).outcome, Outcome::Refuse(Obstacle::SplitBrain));
    let always = Policies { always_asbp: true, ..least };
    assert_eq!(check_decision(&me, &peer, &always).outcome, Outcome::Source { full: true });
    let given_up = Side { discard_my_data: true, ..me };
    assert_eq!(check_decision(&given_up, &peer, &policies()).outcome, Outcome::Target { full: true });
}

#[test]
fn a_person_comes_before_any_policy_and_may_roll_newer_data_back() {
    let (me, peer) = split(1, 5);
    let least = Policies { after_sb_0pri: AfterSb0Pri::DiscardLeastChanges, ..policies() };
    let peer_gives_up = Side { discard_my_data: true, ..peer };
    assert_eq!(check_decision(&me, &peer_gives_up, &least).outcome, Outcome::Source { full: false });
    let newer = Side { discard_my_data: true, out_of_sync_bits: 9, ..side([0x200, 0x100, 0, 0]) };
    let older = side([0x100, 0, 0, 0]);
    let found = check_decision(&newer, &older, &policies());
    assert_eq!((found.outcome, found.reasons), (Outcome::Target { full: false }, vec![Reason::RolledBack]));
    let unusable = Side { disk: DiskState::Inconsistent, ..older };
    let found = check_decision(&newer, &unusable, &policies());
    assert_eq!(
        (found.outcome, found.reasons),
        (Outcome::Source { full: false }, vec![Reason::DiscardIgnored])
    );
}

#[test]
fn a_disk_state_decides_between_related_data_but_never_a_split_brain() {
    let newer = Side { disk: DiskState::Inconsistent, out_of_sync_bits: 2, ..side([0x200, 0x100, 0, 0]) };
    let older = side([0x100, 0, 0, 0]);
    let found = check_decision(&newer, &older, &policies());
    assert_eq!((found.outcome, found.reasons), (Outcome::Target { full: false }, vec![Reason::DiskStates]));
    let (me, peer) = split(3, 3);
    let broken = Side { disk: DiskState::Inconsistent, ..me };
    assert_eq!(check_decision(&broken, &peer, &policies()).outcome, Outcome::Refuse(Obstacle::SplitBrain));
    let local = Policies { after_sb_0pri: AfterSb0Pri::DiscardRemote, ..policies() };
    assert_eq!(check_decision(&broken, &peer, &local).outcome, Outcome::Refuse(Obstacle::SourceNotUsable));
}

#[test]
fn rr_conflict_value_by_value() {
    let me = Side { role: Role::Primary, ..side([0x100, 0, 0, 0]) };
    let peer = Side { out_of_sync_bits: 4, ..side([0x200, 0x100, 0, 0]) };
    let refused = Outcome::Refuse(Obstacle::TargetIsPrimary);
    for (policy, expected) in [
        (RrConflict::Disconnect, refused),
        (RrConflict::CallPriLost, refused),
        (RrConflict::AutoDiscard, refused),
        (RrConflict::RetryConnect, Outcome::Retry(Obstacle::TargetIsPrimary)),
        (RrConflict::Violently, Outcome::Target { full: false }),
    ] {
        let mine = Policies { rr_conflict: policy, ..policies() };
        assert_eq!(check_decision(&me, &peer, &mine).outcome, expected, "{policy:?}");
        // The peer's own setting is about the peer only.
        let theirs = Policies { peer_rr_conflict: policy, ..policies() };
        assert_eq!(check_decision(&me, &peer, &theirs).outcome, refused, "{policy:?}");
    }
    let empty = Side { out_of_sync_bits: 0, ..peer };
    assert_eq!(check_decision(&me, &empty, &policies()).outcome, Outcome::Target { full: false });
    // After a crashed Primary under protocol A the application of today may stay with what it sees.
    let crashed = Side { crashed_primary: true, out_of_sync_bits: 4, ..side([0x100, 0, 0, 0]) };
    let async_pair = Policies { protocol: Protocol::A, ..policies() };
    assert_eq!(check_decision(&me, &crashed, &async_pair).outcome, refused);
    let auto = Policies { rr_conflict: RrConflict::AutoDiscard, ..async_pair };
    assert_eq!(check_decision(&me, &crashed, &auto).outcome, Outcome::Source { full: false });
}

#[test]
fn a_diskless_primary_meets_only_data_that_follows_what_it_was_shown() {
    let shown = Side { disk: DiskState::Diskless, role: Role::Primary, ..side([0x200, 0, 0, 0]) };
    for (peer, fits) in [
        ([0x200, 0, 0, 0], true),
        ([0x300, 0x200, 0, 0], true),
        ([0x400, 0x300, 0x100, 0x200], true),
        ([0x100, 0, 0, 0], false),
    ] {
        let expected = if fits { Outcome::NoSync } else { Outcome::Refuse(Obstacle::NotTheDataLostLast) };
        assert_eq!(check_decision(&shown, &side(peer), &policies()).outcome, expected, "{peer:x?}");
    }
}

#[test]
fn a_primary_without_a_good_disk_does_not_go_back_to_what_misses_acknowledged_writes() {
    let refused = Outcome::Refuse(Obstacle::NotTheDataLostLast);
    let peer = side([0x200, 0, 0, 0]);
    for disk in [DiskState::Diskless, DiskState::Inconsistent, DiskState::Outdated] {
        let primary = Side { disk, role: Role::Primary, out_of_sync_bits: 3, ..peer };
        assert_ne!(check_decision(&primary, &peer, &policies()).outcome, refused, "{disk}");
        let told = Side { was_told_more: true, ..primary };
        assert_eq!(check_decision(&told, &peer, &policies()).outcome, refused, "{disk}");
        // Who holds nothing good is read by nobody, and gets what this node has.
        let bad = Side { disk: DiskState::Inconsistent, ..peer };
        if disk != DiskState::Inconsistent {
            assert_ne!(check_decision(&told, &bad, &policies()).outcome, refused, "{disk}");
        }
    }
}

#[test]
fn two_frozen_primaries_of_one_generation_compare_what_they_marked_unless_one_told_of_more() {
    let one = Side { role: Role::Primary, out_of_sync_bits: 3, tie: true, ..side([0x201, 0, 0x100, 0]) };
    let two = Side { tie: false, ..one };
    let found = check_decision(&one, &two, &policies());
    assert_eq!((found.outcome, found.compare_blocks()), (Outcome::Target { full: false }, true));
    assert_eq!(found.reasons, [Reason::NothingTold]);
    // The target holds what its application was told of and the other one never got: nobody overwrites that.
    let told = Side { was_told_more: true, ..one };
    let refused = Outcome::Refuse(Obstacle::TargetIsPrimary);
    assert_eq!(check_decision(&told, &two, &policies()).outcome, refused);
    let by_force = Policies {
        rr_conflict: RrConflict::Violently,
        peer_rr_conflict: RrConflict::Violently,
        ..policies()
    };
    let lost = Outcome::Refuse(Obstacle::NotTheDataLostLast);
    assert_eq!(check_decision(&told, &two, &by_force).outcome, lost);
    // With the source it stays.
    let source = Side { was_told_more: true, ..two };
    assert_eq!(check_decision(&one, &source, &policies()).outcome, Outcome::Target { full: false });
    // Nor does a resync between them matter of which one has not heard the end.
    let finished = Side { uuids: UuidSet::from_array([0x200, 0, 0x300, 0x100]), out_of_sync_bits: 0, ..one };
    let unheard = Side { uuids: UuidSet::from_array([0x201, 0x300, 0x100, 0x50]), ..two };
    let found = check_decision(&finished, &unheard, &policies());
    assert_eq!(
        (found.comparison.rule, found.outcome),
        (Rule::PeerMissedFinish, Outcome::Target { full: false })
    );
    // Another generation is another matter.
    let ahead = Side { uuids: UuidSet::from_array([0x301, 0x200, 0, 0]), ..two };
    assert_eq!(check_decision(&one, &ahead, &policies()).outcome, refused);
    // After a crash the generation does not say who was told what.
    let crashed = Side { crashed_primary: true, ..two };
    assert_eq!(check_decision(&one, &crashed, &policies()).outcome, Outcome::Refuse(Obstacle::SplitBrain));
}

#[test]
fn an_interrupted_resync_goes_on_by_bitmap_however_often_it_is_started() {
    let mut source = UuidSet::from_array([0x200, 0x100, 0, 0]);
    let mut heard = 0x100;
    for start in 0..50 {
        source.start_as_source(7);
        if start % 3 == 0 {
            heard = source.bitmap;
        }
        let found = check_comparison(&side(source.to_array()), &side([heard, 0, 0, 0]), Protocol::C);
        assert_eq!(found.verdict, Verdict::Source { full: false }, "start {start}");
    }
}
