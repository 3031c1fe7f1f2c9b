//! Rarer features, each with a chance of its own, laid over a plan: most runs stay simple, and no feature
//! hides another one (swarm testing). A seed without them is the same plan as before there were any.
//!
//! | feature | drawn | judged by |
//! |---|---|---|
//! | verify | `verify-alg`, verifies at any moment | nothing rots here, so a verify finds nothing |
//! | csums | `csums-alg` | a resync by digests leaves equal copies |
//! | pause | `pause-sync`, `resume-sync` | as any resync |
//! | suspend | `suspend-io`, `resume-io`, leases | while it holds, nothing completes that was asked after its answer |
//! | no-data | `on-no-data-accessible suspend-io` | as any run: what waits completes or fails, once |
//! | fencing | both policies; a handler that does its work, is late, hangs, fails or lies | as any run; a lie may split |
//! | policies | `after-sb-*`, `rr-conflict`, `always-asbp` | data goes only where both nodes went on |
//! | two | two Primaries with overlapping writes | an acknowledged write is on both disks; a flush covers what its own node wrote |
//! | adjust | other options at run time | as any run |
//! | al | `al-updates` off and on, from one start to the next | as any run |
//! | resize | disks that grow, `resize` from either node | as any run; both nodes agree on the size |
//! | protocol | another protocol at run time | each write by the protocol it was sent by |
use super::Rng;
use super::plan::{Act, Io, LENGTH, Plan, Step, draw, pick};
use lockstep_replicator::core::config::{
    AfterSb0Pri, AfterSb1Pri, AfterSb2Pri, Fencing, OnNoData, Protocol, RrConflict,
};

const MS: u64 = 1_000_000;

/// See the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Feature {
    /// Online verify.
    Verify,
    /// Resync by digests.
    Csums,
    /// Resyncs that are told to stand still.
    Pause,
    /// Suspended IO.
    Suspend,
    /// IO waits for a good copy.
    NoData,
    /// Fencing.
    Fencing,
    /// Split-brain policies.
    Policies,
    /// Two Primaries.
    Two,
    /// Options at run time.
    Adjust,
    /// The activity log off and on.
    Al,
    /// Another protocol at run time.
    Protocol,
    /// Disks that grow, and `resize`.
    Resize,
}

impl Feature {
    /// All of them, with their names and how many seeds of a hundred have them.
    pub const ALL: &[(Self, &str, u64)] = &[
        (Self::Verify, "verify", 15),
        (Self::Csums, "csums", 15),
        (Self::Pause, "pause", 15),
        (Self::Suspend, "suspend", 15),
        (Self::NoData, "no-data", 12),
        (Self::Fencing, "fencing", 15),
        (Self::Policies, "policies", 15),
        (Self::Two, "two", 12),
        (Self::Adjust, "adjust", 15),
        (Self::Al, "al", 10),
        (Self::Protocol, "protocol", 8),
        (Self::Resize, "resize", 8),
    ];

    /// Drawn from a generator of its own: what was added later changes nothing for seeds that do not have it.
    fn own_generator(self, seed: u64) -> Option<Rng> {
        match self {
            Self::Protocol => Some(Rng::new(seed ^ 0x7072_6f74_6f63_6f6c)),
            Self::Resize => Some(Rng::new(seed ^ 0x72_6573_697a_6500)),
            _ => None,
        }
    }

    /// From the name on a command line.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|(_, known, _)| *known == name).map(|(feature, ..)| *feature)
    }

    /// As on a command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(feature, ..)| *feature == self).map_or("", |(_, name, _)| name)
    }
}

/// What a `fence-peer` handler does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FenceHandler {
    /// It outdates a peer it reaches, and says what it found: 4, 5 or 6.
    Honest,
    /// It says this, whatever is true.
    Says(i32),
    /// It does not end.
    Hangs,
}

/// An action of one of the features.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extra {
    /// `verify` of a volume, from this node.
    Verify(usize, usize),
    /// `pause-sync`.
    PauseSync(usize),
    /// `resume-sync`.
    ResumeSync(usize),
    /// `suspend-io`.
    SuspendIo(usize),
    /// `resume-io`.
    ResumeIo(usize),
    /// `fence-peer` at this node does that from now on, after so many ms.
    FenceHandler(usize, FenceHandler, u64),
    /// The other node becomes Primary too, while they are connected.
    PromoteOther,
    /// `adjust` on both nodes: these options, drawn from this number.
    Adjust(u64),
    /// The node has `al-updates` so from its next start.
    AlUpdates(usize, bool),
    /// `adjust` on both nodes, or on this one alone, whose peer adopts it: this protocol.
    Protocol(Option<usize>, Protocol),
    /// The disk of volume 0 has this many bytes, if that is more than it had.
    GrowDisk(usize, u64),
    /// `resize` of volume 0 to all that both disks hold.
    Resize(usize),
}

/// The plan of a seed with the features that it has, or with these.
#[must_use]
pub fn draw_mixed(seed: u64, forced: Option<&[Feature]>) -> Plan {
    let mut plan = draw(seed);
    let mut rng = Rng::new(seed ^ 0x6d_6978_6564);
    let mut features = Vec::new();
    for (feature, _, percent) in Feature::ALL {
        let drawn = feature.own_generator(seed).as_mut().unwrap_or(&mut rng).percent(*percent);
        if forced.map_or(drawn, |forced| forced.contains(feature)) {
            features.push(*feature);
        }
    }
    for feature in &features {
        let number = feature.own_generator(!seed).as_mut().unwrap_or(&mut rng).next();
        lay_over(*feature, &mut plan, &mut Rng::new(number));
    }
    plan.steps.sort_by_key(|step| step.at);
    let names: Vec<&str> = features.iter().map(|feature| feature.name()).collect();
    plan.features = format!("{}, with [{}]", plan.features, names.join(" "));
    plan.options.mixed = true;
    if forced.is_some() {
        plan.options.ordered = format!(" --features {}", names.join(","));
    }
    plan.extras = features;
    plan
}

/// Times at which an application is at work, or soon after.
fn times(plan: &Plan, rng: &mut Rng, count: u64) -> Vec<u64> {
    let busy: Vec<u64> =
        plan.steps.iter().filter(|step| matches!(step.act, Act::Io { .. })).map(|step| step.at).collect();
    let late = |rng: &mut Rng| pick(rng, &[0, 0, 5, 300, 3000]) * MS + rng.below(20 * MS);
    (0..count)
        .map(|_| match busy.get(usize::try_from(rng.below(busy.len() as u64)).unwrap_or(0)) {
            Some(at) => (at + late(rng)).min(LENGTH),
            None => rng.below(LENGTH),
        })
        .collect()
}

fn lay_over(feature: Feature, plan: &mut Plan, rng: &mut Rng) {
    let count = 4 + rng.below(20);
    let at = times(plan, rng, count);
    let volumes = 1 + plan.options.more_volumes.len() as u64;
    let mut steps = Vec::new();
    let mut push = |at: u64, extra: Extra| steps.push(Step { at, act: Act::Extra(extra) });
    let node = |rng: &mut Rng| usize::from(rng.percent(50));
    let net = &mut plan.options.net;
    match feature {
        Feature::Verify => {
            net.verify_alg = Some("sha1".into());
            for at in at {
                let volume = usize::try_from(rng.below(volumes)).unwrap_or(0);
                push(at, Extra::Verify(node(rng), volume));
            }
        }
        Feature::Csums => {
            net.csums_alg = Some("sha1".into());
            net.csums_after_crash_only = rng.percent(30);
        }
        Feature::Pause => {
            for at in at {
                let node = node(rng);
                push(at, Extra::PauseSync(node));
                if rng.percent(70) {
                    push(at + rng.below(8000) * MS, Extra::ResumeSync(node));
                }
            }
        }
        Feature::Suspend => {
            plan.options.resource.suspend_lease_ms = pick(rng, &[100, 2000, 20_000]);
            for at in at {
                let node = node(rng);
                push(at, Extra::SuspendIo(node));
                if rng.percent(70) {
                    push(at + rng.below(3000) * MS, Extra::ResumeIo(node));
                }
            }
        }
        Feature::NoData => {
            plan.options.resource.on_no_data = OnNoData::SuspendIo;
            for at in at {
                push(at + rng.below(3000) * MS, Extra::ResumeIo(node(rng)));
            }
        }
        Feature::Fencing => {
            net.fencing = pick(rng, &[Fencing::ResourceOnly, Fencing::ResourceAndStonith]);
            let honest = rng.percent(50);
            for node in 0..2 {
                push(0, Extra::FenceHandler(node, FenceHandler::Honest, pick(rng, &[1, 300])));
            }
            for at in at {
                let says = [3, 4, 5, 6, 7, 1].map(FenceHandler::Says);
                let handler = match rng.below(6) {
                    0..=2 => FenceHandler::Honest,
                    3 => FenceHandler::Hangs,
                    _ if honest => FenceHandler::Says(1),
                    _ => pick(rng, &says),
                };
                push(at, Extra::FenceHandler(node(rng), handler, pick(rng, &[1, 1, 300, 5000])));
            }
        }
        Feature::Policies => {
            net.after_sb_0pri = pick(rng, AfterSb0Pri::ALL);
            net.after_sb_1pri = pick(rng, AfterSb1Pri::ALL);
            net.after_sb_2pri = pick(rng, AfterSb2Pri::ALL);
            net.rr_conflict = pick(rng, RrConflict::ALL);
            net.always_asbp = rng.percent(50);
        }
        Feature::Two => {
            net.protocol = Protocol::C;
            net.allow_two_primaries = true;
            push(0, Extra::PromoteOther);
            for at in at {
                push(at, Extra::PromoteOther);
            }
            // Both nodes are asked by the same bursts; some of what they ask meets on the same blocks.
            for step in plan.steps.clone() {
                let Act::Io { volume, io: Io::Write(_), start, len } = step.act else { continue };
                if rng.percent(20) {
                    let shift = rng.below(len);
                    let act =
                        Act::Io { volume, io: Io::Write(false), start: start + shift, len: len - shift };
                    plan.steps.push(Step { at: step.at + rng.below(2) * rng.below(400_000), act });
                }
            }
        }
        Feature::Adjust => {
            for at in at {
                push(at, Extra::Adjust(rng.next()));
            }
        }
        Feature::Resize => {
            let full = plan.options.sectors * 512;
            let mut percent = 40 + rng.below(30);
            plan.options.grows_from_bytes = Some(full * percent / 100);
            let mut at = at;
            at.sort_unstable();
            for at in at {
                percent = (percent + pick(rng, &[0, 0, 1, 5, 10])).min(100);
                let bytes = full * percent / 100;
                for node in 0..2 {
                    if rng.percent(80) {
                        push(at + rng.below(40) * MS, Extra::GrowDisk(node, bytes));
                    }
                }
                push(at + rng.below(80) * MS, Extra::Resize(node(rng)));
                // At a bad moment: while metadata moves, or between the two nodes' steps.
                let bad = at + rng.below(100) * MS;
                let (victim, power) = (node(rng), rng.percent(50));
                let act = match rng.below(6) {
                    0 => Act::KillAtMeta(victim, rng.below(12), power),
                    1 => Act::CutAfter(victim, rng.below(12)),
                    2 => Act::KillBoth(power, rng.percent(50)),
                    _ => continue,
                };
                plan.steps.push(Step { at: bad, act });
            }
        }
        Feature::Protocol => {
            for at in at {
                let one = rng.percent(30).then(|| node(rng));
                push(at, Extra::Protocol(one, pick(rng, &[Protocol::A, Protocol::B, Protocol::C])));
            }
        }
        Feature::Al => {
            for at in at {
                push(at, Extra::AlUpdates(node(rng), rng.percent(50)));
            }
        }
    }
    plan.steps.extend(steps);
}
