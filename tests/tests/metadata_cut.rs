//! Procedures in which a node stops at its n-th metadata write, for every n: killed or without power, and the
//! metadata writes in flight are there, not there, or torn. Generator 3 of the catalogue of scenarios
//! (S11-S18 and whatever else depends on the order of metadata writes).
use lockstep_tests::procedures::judge::{Interruption, Tally};
use lockstep_tests::procedures::{Kind, Procedure, everyday, resizes, split_brains};
use lockstep_tests::sim::meta_area::MetaFate;

const FATES: [MetaFate; 3] = [MetaFate::Old, MetaFate::New, MetaFate::Torn];

/// Every stop of these (with the seed `LOCKSTEP_CUT_SEED`, default 1) procedures; what went wrong, all of it.
#[allow(clippy::print_stdout, reason = "says how much was tried")]
fn stop_everywhere(procedures: &[Procedure]) {
    assert!(!procedures.is_empty());
    let (mut stops, mut splits) = (0, 0);
    let mut wrong = Vec::new();
    let seed = std::env::var("LOCKSTEP_CUT_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    for procedure in procedures {
        let whole = procedure.run(seed, Interruption::None).unwrap_or_else(|why| {
            wrong.push(why);
            Tally::default()
        });
        for (node, (power, fate)) in
            (0..2).flat_map(|node| [false, true].into_iter().flat_map(move |p| FATES.map(|f| (node, (p, f)))))
        {
            for nth in 0..whole.metas[node] {
                match procedure.run(seed, Interruption::Metadata { node, nth, power, fate }) {
                    Ok(tally) => {
                        assert!(tally.hit, "{}: n{node} never came to write {nth}", procedure.name);
                        stops += 1;
                        splits += u64::from(tally.split);
                    }
                    Err(why) => wrong.push(why),
                }
            }
        }
        println!("{}: {:?} metadata writes", procedure.name, whole.metas);
    }
    println!("{stops} stops, {splits} split brains");
    let some: Vec<_> = wrong.iter().take(12).map(String::as_str).collect();
    assert!(wrong.is_empty(), "{} of {stops}:\n{}", wrong.len(), some.join("\n"));
    assert!(stops > 10, "only {stops} stops");
}

fn of(procedures: Vec<Procedure>, wanted: impl Fn(&Procedure) -> bool) -> Vec<Procedure> {
    procedures.into_iter().filter(wanted).collect()
}

/// One stop, told in full with `SIM_VERBOSE=1`: `STOP="name,node,nth,power,fate" cargo test ... one_stop`.
#[test]
#[allow(clippy::print_stdout, reason = "says why it skips")]
fn one_stop() {
    let Ok(wanted) = std::env::var("STOP") else {
        println!("skipped: STOP names no stop");
        return;
    };
    let mut parts = wanted.rsplitn(5, ',');
    let mut next = || parts.next().expect("name,node,nth,power,fate").to_owned();
    let (fate, power, nth, node, name) = (next(), next(), next(), next(), next());
    let fate = FATES.into_iter().find(|known| format!("{known:?}") == fate).expect("Old, New or Torn");
    let all = [everyday(), resizes(), split_brains()].concat();
    let procedure = all.iter().find(|procedure| procedure.name == name).expect("a procedure of this name");
    let (node, nth) = (node.parse().expect("a node"), nth.parse().expect("a number"));
    let seed = std::env::var("LOCKSTEP_CUT_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    println!("{:?}", procedure.run(seed, Interruption::Metadata { node, nth, power: power == "true", fate }));
}

#[test]
fn the_first_sync() {
    stop_everywhere(&of(everyday(), |p| p.kind == Kind::FirstSync));
}

#[test]
fn a_quick_resync() {
    stop_everywhere(&of(everyday(), |p| p.kind == Kind::QuickResync));
}

#[test]
fn online_verify() {
    stop_everywhere(&of(everyday(), |p| matches!(p.kind, Kind::Verify { .. })));
}

#[test]
fn role_changes() {
    stop_everywhere(&of(everyday(), |p| matches!(p.kind, Kind::Promotion | Kind::Demotion)));
}

#[test]
fn disks_let_go_and_taken_back() {
    stop_everywhere(&of(everyday(), |p| matches!(p.kind, Kind::Detach(_))));
}

#[test]
fn connections_and_options() {
    stop_everywhere(&of(everyday(), |p| {
        matches!(p.kind, Kind::Reconnect(_) | Kind::Protocol(_) | Kind::Conflict)
    }));
}

#[test]
fn a_disk_declared_bad() {
    stop_everywhere(&of(everyday(), |p| matches!(p.kind, Kind::Invalidate(_))));
}

#[test]
fn a_resize() {
    stop_everywhere(&resizes());
}

#[test]
fn a_split_brain() {
    stop_everywhere(&of(split_brains(), |p| matches!(p.kind, Kind::SplitBrain { history: false, .. })));
}

#[test]
fn a_split_brain_with_an_old_ancestor() {
    stop_everywhere(&of(split_brains(), |p| matches!(p.kind, Kind::SplitBrain { history: true, .. })));
}

#[test]
fn newer_data_that_meets_a_primary() {
    stop_everywhere(&of(split_brains(), |p| p.kind == Kind::NewerDataMeetsPrimary));
}
