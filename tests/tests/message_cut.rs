//! Procedures cut after the n-th message in either direction, for every n: the link blinks, stays down while
//! the application goes on, or falls silent in one direction only. Generator 2 of the catalogue of scenarios
//! (S01, S02, S04, S08, S22, S28, S45 and whatever else a lost message may do).
use lockstep_tests::procedures::campaign::{Campaign, of, one};
use lockstep_tests::procedures::judge::Interruption;
use lockstep_tests::procedures::{Kind, Procedure, everyday, resizes, split_brains};
use lockstep_tests::sim::net::Cut;

const CUTS: [Cut; 3] = [Cut::Blink, Cut::Down, Cut::Silence];

/// Every cut of these procedures.
#[allow(clippy::print_stdout, reason = "says how much was tried")]
fn cut_everywhere(procedures: &[Procedure]) {
    let mut campaign = Campaign::default();
    for procedure in procedures {
        let messages = campaign.whole(procedure).messages;
        for (to, arrived) in messages.into_iter().enumerate() {
            for how in CUTS {
                for after in 0..arrived {
                    campaign.interrupt(procedure, Interruption::Message { to, after, how });
                }
            }
        }
        println!("{}: {messages:?} messages", procedure.name);
    }
    campaign.judge(50);
}

/// One cut: `CUT="name,to,after,how" cargo test ... one_cut`.
#[test]
fn one_cut() {
    one("CUT", "name,to,after,how", |[to, after, how]| Interruption::Message {
        to: to.parse().expect("a node"),
        after: after.parse().expect("a number"),
        how: CUTS.into_iter().find(|known| format!("{known:?}") == how).expect("Blink, Down or Silence"),
    });
}

#[test]
fn the_first_sync() {
    cut_everywhere(&of(everyday(), |p| p.kind == Kind::FirstSync));
}

#[test]
fn a_quick_resync() {
    cut_everywhere(&of(everyday(), |p| p.kind == Kind::QuickResync));
}

#[test]
fn online_verify() {
    cut_everywhere(&of(everyday(), |p| matches!(p.kind, Kind::Verify { .. })));
}

#[test]
fn role_changes() {
    cut_everywhere(&of(everyday(), |p| matches!(p.kind, Kind::Promotion | Kind::Demotion)));
}

#[test]
fn disks_let_go_and_taken_back() {
    cut_everywhere(&of(everyday(), |p| matches!(p.kind, Kind::Detach(_))));
}

#[test]
fn connections_ended_and_begun() {
    cut_everywhere(&of(everyday(), |p| matches!(p.kind, Kind::Reconnect(_))));
}

#[test]
fn two_primaries_in_conflict() {
    cut_everywhere(&of(everyday(), |p| p.kind == Kind::Conflict));
}

#[test]
fn a_change_of_the_protocol() {
    cut_everywhere(&of(everyday(), |p| matches!(p.kind, Kind::Protocol(_))));
}

#[test]
fn a_disk_declared_bad() {
    cut_everywhere(&of(everyday(), |p| matches!(p.kind, Kind::Invalidate(_))));
}

#[test]
fn a_resize() {
    cut_everywhere(&resizes());
}

#[test]
fn a_split_brain_with_no_primary() {
    cut_everywhere(&of(split_brains(), |p| {
        matches!(p.kind, Kind::SplitBrain { primaries: [false, false], history: false, .. })
    }));
}

#[test]
fn a_split_brain_with_primaries() {
    cut_everywhere(&of(split_brains(), |p| {
        matches!(p.kind, Kind::SplitBrain { primaries: [true, _], history: false, .. })
    }));
}

#[test]
fn a_split_brain_with_an_old_ancestor() {
    cut_everywhere(&of(split_brains(), |p| matches!(p.kind, Kind::SplitBrain { history: true, .. })));
}

#[test]
fn newer_data_that_meets_a_primary() {
    cut_everywhere(&of(split_brains(), |p| p.kind == Kind::NewerDataMeetsPrimary));
}
