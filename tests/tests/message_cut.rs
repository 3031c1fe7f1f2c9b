//! Procedures cut after the n-th message in either direction, for every n: the link blinks, stays down while
//! the application goes on, or falls silent in one direction only. Generator 2 of the catalogue of scenarios
//! (S01, S02, S04, S08, S22, S28, S45 and whatever else a lost message may do).
use lockstep_tests::procedures::judge::{Interruption, Tally};
use lockstep_tests::procedures::{Kind, Procedure, everyday, resizes, split_brains};
use lockstep_tests::sim::net::Cut;

/// Where a procedure repeats itself, once more around is enough.
const MOST: u64 = 100;

/// Every cut of these (with the seed `LOCKSTEP_CUT_SEED`, default 1) procedures; what went wrong, all of it.
#[allow(clippy::print_stdout, reason = "says how much was tried")]
fn cut_everywhere(procedures: &[Procedure]) {
    assert!(!procedures.is_empty());
    let (mut cuts, mut splits) = (0, 0);
    let mut wrong = Vec::new();
    let seed = std::env::var("LOCKSTEP_CUT_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    for procedure in procedures {
        let whole = procedure.run(seed, Interruption::None).unwrap_or_else(|why| {
            wrong.push(why);
            Tally::default()
        });
        for to in 0..2 {
            for how in [Cut::Blink, Cut::Down, Cut::Silence] {
                let mut hits = 0;
                let last = whole.messages[to].min(MOST);
                for after in 0..last {
                    match procedure.run(seed, Interruption::Message { to, after, how }) {
                        Ok(tally) => {
                            hits += u64::from(tally.hit);
                            splits += u64::from(tally.split);
                        }
                        Err(why) => wrong.push(why),
                    }
                }
                // Nothing random happens before the cut: the same messages come until then.
                let met = hits == last || !wrong.is_empty();
                assert!(met, "{}: {hits} of {whole:?} to n{to}", procedure.name);
                cuts += hits;
            }
        }
        println!("{}: {:?} messages", procedure.name, whole.messages);
    }
    println!("{cuts} cuts, {splits} split brains");
    let some: Vec<_> = wrong.iter().take(12).map(String::as_str).collect();
    assert!(wrong.is_empty(), "{} of {cuts}:\n{}", wrong.len(), some.join("\n"));
    assert!(cuts > 50, "only {cuts} cuts");
}

fn of(procedures: Vec<Procedure>, wanted: impl Fn(&Procedure) -> bool) -> Vec<Procedure> {
    procedures.into_iter().filter(wanted).collect()
}

/// One cut, told in full with `SIM_VERBOSE=1`: `CUT="name,to,after,how" cargo test ... one_cut`.
#[test]
#[allow(clippy::print_stdout, reason = "says why it skips")]
fn one_cut() {
    let Ok(wanted) = std::env::var("CUT") else {
        println!("skipped: CUT names no cut");
        return;
    };
    let mut parts = wanted.rsplitn(4, ',');
    let mut next = || parts.next().expect("name,to,after,how").to_owned();
    let (how, after, to, name) = (next(), next(), next(), next());
    let how = match how.as_str() {
        "Blink" => Cut::Blink,
        "Down" => Cut::Down,
        _ => Cut::Silence,
    };
    let all = [everyday(), resizes(), split_brains()].concat();
    let procedure = all.iter().find(|procedure| procedure.name == name).expect("a procedure of this name");
    let (to, after) = (to.parse().expect("a node"), after.parse().expect("a number"));
    let seed = std::env::var("LOCKSTEP_CUT_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    println!("{:?}", procedure.run(seed, Interruption::Message { to, after, how }));
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
