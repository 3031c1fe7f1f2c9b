//! Procedures in which a node stops at its n-th metadata write, for every n: killed or without power, and the
//! metadata writes in flight are there, not there, or torn. Generator 3 of the catalogue of scenarios
//! (S11-S18 and whatever else depends on the order of metadata writes).
use lockstep_tests::procedures::campaign::{Campaign, of, one};
use lockstep_tests::procedures::judge::Interruption;
use lockstep_tests::procedures::{Kind, Procedure, everyday, resizes, split_brains};
use lockstep_tests::sim::meta_area::MetaFate;

const FATES: [MetaFate; 3] = [MetaFate::Old, MetaFate::New, MetaFate::Torn];

/// Every stop of these procedures.
#[allow(clippy::print_stdout, reason = "says how much was tried")]
fn stop_everywhere(procedures: &[Procedure]) {
    let mut campaign = Campaign::default();
    for procedure in procedures {
        let metas = campaign.whole(procedure).metas;
        for (node, writes) in metas.into_iter().enumerate() {
            for power in [false, true] {
                for fate in FATES {
                    for nth in 0..writes {
                        campaign.interrupt(procedure, Interruption::Metadata { node, nth, power, fate });
                    }
                }
            }
        }
        println!("{}: {metas:?} metadata writes", procedure.name);
    }
    campaign.judge(10);
}

/// One stop: `STOP="name,node,nth,power,fate" cargo test ... one_stop`.
#[test]
fn one_stop() {
    one("STOP", "name,node,nth,power,fate", |[node, nth, power, fate]| Interruption::Metadata {
        node: node.parse().expect("a node"),
        nth: nth.parse().expect("a number"),
        power: power == "true",
        fate: FATES.into_iter().find(|known| format!("{known:?}") == fate).expect("Old, New or Torn"),
    });
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
