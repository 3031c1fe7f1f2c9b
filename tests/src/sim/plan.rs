//! What a run will do, drawn from its seed before it begins: options (swarm: each run has its own mix of
//! features) and a list of timed actions. A plan is data, so that a failing one can be made smaller.
use super::Rng;
use super::mixed::{Extra, Feature};
use super::options::{Options, Weather};
use lockstep_replicator::core::config::{OnIoError, Protocol, RateControl};

const MS: u64 = 1_000_000;
const SECOND: u64 = 1000 * MS;
/// Virtual time that a run lasts at least.
pub const LENGTH: u64 = 600 * SECOND;

/// What an application asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Io {
    /// Read.
    Read,
    /// Write; the flag is FUA.
    Write(bool),
    /// Write zeroes: may unmap.
    Zero(bool),
    /// Discard.
    Discard,
    /// Flush.
    Flush,
}

/// IO of a disk that fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failing {
    /// Reads.
    Reads,
    /// Writes.
    Writes,
    /// Flushes.
    Flushes,
    /// Metadata writes.
    Metas,
}

/// What an operator types, rightly or wrongly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Typed {
    /// `connect`.
    Connect,
    /// `connect --discard-my-data`.
    ConnectDiscarding,
    /// `connect --tentative`.
    ConnectTentative,
    /// `disconnect`, with `--force`.
    Disconnect(bool),
    /// `attach`.
    Attach,
    /// `detach`, with `--force`.
    Detach(bool),
    /// `primary`, with `--force`.
    Primary(bool),
    /// `secondary`.
    Secondary,
    /// `invalidate`.
    Invalidate,
    /// `invalidate-remote`.
    InvalidateRemote,
    /// `outdate`.
    Outdate,
    /// `new-current-uuid`.
    NewCurrentUuid,
    /// `down`; the daemon then stops.
    Down,
}

/// One action.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// The application asks.
    Io {
        /// Of this volume.
        volume: usize,
        /// This.
        io: Io,
        /// From this sector.
        start: u64,
        /// So many sectors.
        len: u64,
    },
    /// The transport ends; the link stays down.
    Cut(bool),
    /// The transport ends after so many more messages to a node.
    CutAfter(usize, u64),
    /// Nothing reaches the node.
    Silence(usize),
    /// A second transport at the node.
    Duplicate(usize),
    /// The link works again.
    Heal,
    /// The node stops; with its power.
    Kill(usize, bool),
    /// Both stop at once.
    KillBoth(bool, bool),
    /// The node stops at its n-th metadata write from now.
    KillAtMeta(usize, u64, bool),
    /// The node starts if it is down, perhaps with other options of its own.
    Start(usize, Option<u32>),
    /// The next so many IO of this kind fail.
    Fail(usize, usize, Failing, u32),
    /// These sectors cannot be read, nor written if the flag is set.
    BadRange(usize, usize, u64, u64, bool),
    /// Every IO of the disk fails.
    DeadDisk(usize, usize),
    /// The disks of the node work again.
    Mend(usize),
    /// The next IO of the disk takes this long, ms; 0 = until the node stops.
    Stick(usize, usize, u64),
    /// A block of the activity log rots, while the node is down.
    RotLog(usize),
    /// A bitmap page becomes unreadable, while the node is down.
    RotBitmap(usize),
    /// The superblock becomes unreadable, while the node is down and the other has all data.
    RotSuperblock(usize),
    /// An operator's verb.
    Type(usize, Typed),
    /// A planned change of the Primary: here the first half.
    StepDown,
    /// Somebody becomes Primary, this node if it can, where none is.
    FailOver(usize),
    /// Something of a rarer feature.
    Extra(Extra),
    /// A good operator looks after everything; after a split brain this node's changes go.
    Tend(usize),
}

impl Act {
    /// It is a fault, not work.
    #[must_use]
    pub const fn is_fault(self) -> bool {
        !matches!(
            self,
            Self::Io { .. }
                | Self::Heal
                | Self::Start(..)
                | Self::Mend(_)
                | Self::StepDown
                | Self::FailOver(_)
                | Self::Tend(_)
                | Self::Extra(_)
        )
    }
}

/// An action and its time, ns after the start of the load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// When.
    pub at: u64,
    /// What.
    pub act: Act,
}

/// Everything a run will do.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Options of the world.
    pub options: Options,
    /// Which node is made Primary first.
    pub first: usize,
    /// The load starts when the initial resync is done.
    pub wait_for_sync: bool,
    /// In order of time.
    pub steps: Vec<Step>,
    /// The mix of features, for people.
    pub features: String,
    /// Rarer features that it has.
    pub extras: Vec<Feature>,
}

/// Which kinds of trouble a run has.
#[derive(Clone, Copy, Debug)]
struct Mix {
    verbs: bool,
    wild_verbs: bool,
    errors: bool,
    dead_disks: bool,
    stuck: bool,
    silence: bool,
    power: bool,
    rot: bool,
    link_weight: u64,
    crash_weight: u64,
    reads: u64,
    flushes: u64,
    hot: u64,
    tend: u64,
}

pub(super) fn pick<T: Copy>(rng: &mut Rng, from: &[T]) -> T {
    from[usize::try_from(rng.below(from.len() as u64)).unwrap_or(0)]
}

fn options(seed: u64, rng: &mut Rng) -> Options {
    let mut options = Options::new(seed);
    let net = &mut options.net;
    net.protocol = pick(rng, &[Protocol::A, Protocol::B, Protocol::C, Protocol::C, Protocol::C, Protocol::C]);
    net.max_epoch_size = pick(rng, &[1, 3, 20, 2048]);
    net.connect_int_ms = pick(rng, &[1000, 1000, 3000, 10_000]);
    net.ping_int_ms = pick(rng, &[1000, 10_000, 10_000]);
    net.ping_timeout_ms = pick(rng, &[500, 500, 3000]);
    (net.ko_count, net.timeout_ms) = pick(rng, &[(0, 6000), (0, 6000), (7, 6000), (2, 3000)]);
    options.sectors = pick(rng, &[4 * 8192, 4 * 8192, 2 * 8192, 2 * 8192, 8192, 3 * 8192 + 5, 16 * 8192]);
    if rng.percent(5) {
        options.sectors = 72 * 8192;
    }
    let more = pick(rng, &[0, 0, 0, 0, 0, 1, 1, 2]);
    options.more_volumes = (0..more).map(|_| pick(rng, &[8192, 2 * 8192, 8192 + 24])).collect();
    let volume = &mut options.volume;
    volume.al_extents = pick(rng, &[67, 67, 127, 1237]);
    volume.al_updates = !rng.percent(4);
    volume.on_io_error = if rng.percent(20) { OnIoError::PassOn } else { OnIoError::Detach };
    if rng.percent(15) && options.sectors < 20 * 8192 {
        volume.resync.control = RateControl::Fixed;
        volume.resync.rate_kib_s = 2000 + rng.below(20_000);
    }
    options.weather = Weather {
        disk_us: pick(rng, &[50, 400, 400, 3000]),
        disk_slow_ms: pick(rng, &[5, 30, 400]),
        net_us: [pick(rng, &[100, 300, 5000]), pick(rng, &[100, 300, 5000])],
        net_slow_ms: pick(rng, &[10, 40, 300]),
        drip_ns: pick(rng, &[0, 0, 0, 2000, 20_000]),
        notice_ms: pick(rng, &[1, 20, 20, 500, 3000]),
        quiet_power: rng.percent(50),
    };
    options
}

/// The plan of a seed.
#[must_use]
pub fn draw(seed: u64) -> Plan {
    let mut rng = Rng::new(seed ^ 0x70_6c61_6e00);
    let rng = &mut rng;
    let options = options(seed, rng);
    let mix = Mix {
        verbs: rng.percent(60),
        wild_verbs: rng.percent(30),
        errors: rng.percent(40),
        dead_disks: rng.percent(15),
        stuck: rng.percent(25),
        silence: rng.percent(40),
        power: rng.percent(70),
        rot: rng.percent(25),
        link_weight: rng.below(60),
        crash_weight: rng.below(40),
        reads: 10 + rng.below(50),
        flushes: rng.below(20),
        hot: rng.below(100),
        tend: 40 + rng.below(60),
    };
    let first = usize::from(rng.percent(50));
    let wait_for_sync = rng.percent(80);
    let episodes = 25 + rng.below(25);
    let mut steps = Vec::new();
    let mut clock = 0;
    for episode in 0..episodes {
        let begin = clock;
        let length = pick(rng, &[50, 300, 300, 1000, 4000]) * MS;
        burst(rng, &options, &mix, begin, length, &mut steps);
        for _ in 0..rng.below(4) {
            let at = (begin + rng.below(length + 500 * MS)).saturating_sub(20 * MS);
            trouble(rng, &options, &mix, at, &mut steps);
        }
        let node = usize::from(rng.percent(50));
        if rng.percent(50) {
            steps.push(Step { at: begin + rng.below(length + SECOND), act: Act::FailOver(node) });
        }
        if rng.percent(mix.tend) {
            steps.push(Step { at: begin + length + rng.below(3 * SECOND), act: Act::Tend(node) });
        }
        // Idle time costs nothing; the last episode ends after ten minutes.
        let rest = LENGTH.saturating_sub(clock) / (episodes - episode);
        clock = (begin + length).max(clock + rest / 2 + rng.below(rest + 1));
        if rng.percent(60) {
            steps.push(Step { at: clock.saturating_sub(rng.below(2 * SECOND)), act: Act::Tend(1 - node) });
        }
    }
    steps.push(Step { at: LENGTH.max(clock), act: Act::Tend(first) });
    steps.sort_by_key(|step| step.at);
    let features = format!("{mix:?}, {episodes} episodes");
    Plan { options, first, wait_for_sync, steps, features, extras: Vec::new() }
}

fn burst(rng: &mut Rng, options: &Options, mix: &Mix, begin: u64, length: u64, steps: &mut Vec<Step>) {
    let count = 30 + rng.below(70);
    let volumes = 1 + options.more_volumes.len();
    for _ in 0..count {
        let volume = usize::try_from(rng.below(volumes as u64)).unwrap_or(0);
        let at = begin + rng.below(length);
        steps.push(Step { at, act: io(rng, options, mix, volume) });
    }
}

/// One request; some of its neighbours in the burst overlap it.
pub fn top_up(rng: &mut Rng, options: &Options) -> Act {
    let mix = Mix {
        verbs: false,
        wild_verbs: false,
        errors: false,
        dead_disks: false,
        stuck: false,
        silence: false,
        power: false,
        rot: false,
        link_weight: 0,
        crash_weight: 0,
        reads: 30,
        flushes: 5,
        hot: 50,
        tend: 0,
    };
    io(rng, options, &mix, 0)
}

fn io(rng: &mut Rng, options: &Options, mix: &Mix, volume: usize) -> Act {
    let more = volume.checked_sub(1).and_then(|at| options.more_volumes.get(at));
    let sectors = more.copied().unwrap_or(options.sectors);
    let mut len = match rng.below(10) {
        0 => 1 + rng.below(40),
        1 => 64 + rng.below(400),
        _ => 8 * (1 + rng.below(6)),
    };
    let edge = 8192.min(sectors) - 128;
    let mut start =
        if rng.percent(mix.hot) { (edge + rng.below(256)).min(sectors - 1) } else { rng.below(sectors) };
    if rng.percent(70) {
        start &= !7;
    }
    let io = if rng.percent(mix.reads) {
        Io::Read
    } else if rng.percent(mix.flushes) {
        Io::Flush
    } else {
        match rng.below(100) {
            0..=3 => Io::Zero(start % 2 == 0),
            4..=5 => Io::Discard,
            6..=7 => {
                len = rng.below(9000);
                Io::Zero(true)
            }
            _ => Io::Write(rng.percent(10)),
        }
    };
    Act::Io { volume, io, start, len: len.min(sectors - start).max(1) }
}

/// A fault, and often what ends it.
fn trouble(rng: &mut Rng, options: &Options, mix: &Mix, at: u64, steps: &mut Vec<Step>) {
    let node = usize::from(rng.percent(50));
    let volume = usize::try_from(rng.below(1 + options.more_volumes.len() as u64)).unwrap_or(0);
    let power = mix.power && rng.percent(50);
    let soon = |rng: &mut Rng| at + pick(rng, &[5, 50, 400, 3000, 20_000]) * MS + rng.below(50 * MS);
    let mut push = |at: u64, act: Act| steps.push(Step { at, act });
    let total = 20 + mix.link_weight + mix.crash_weight;
    let roll = rng.below(total);
    if roll < 10 + mix.link_weight {
        match rng.below(10) {
            0..=2 => push(at, Act::Cut(false)),
            3..=5 => {
                push(at, Act::Cut(true));
                push(soon(rng), Act::Heal);
            }
            6..=7 => push(at, Act::CutAfter(node, rng.below(60))),
            8 if mix.silence => {
                push(at, Act::Silence(node));
                if rng.percent(30) {
                    push(at, Act::Silence(1 - node));
                }
                push(soon(rng), Act::Heal);
            }
            _ => push(at, Act::Duplicate(node)),
        }
        return;
    }
    if roll < 15 + mix.link_weight + mix.crash_weight {
        match rng.below(10) {
            0..=5 => push(at, Act::Kill(node, power)),
            6..=7 => push(at, Act::KillAtMeta(node, rng.below(12), power)),
            _ => push(at, Act::KillBoth(power, mix.power && rng.percent(50))),
        }
        if mix.rot && rng.percent(40) {
            let act = match rng.below(5) {
                0..=1 => Act::RotLog(node),
                2..=3 => Act::RotBitmap(node),
                _ => Act::RotSuperblock(node),
            };
            push(at + 1, act);
        }
        for node in 0..2 {
            if rng.percent(80) {
                let other = rng.percent(15).then(|| pick(rng, &[67, 127, 1237]));
                push(soon(rng), Act::Start(node, other));
            }
        }
        return;
    }
    match rng.below(10) {
        0..=2 if mix.errors => {
            let what = pick(
                rng,
                &[Failing::Reads, Failing::Writes, Failing::Writes, Failing::Flushes, Failing::Metas],
            );
            push(at, Act::Fail(node, volume, what, pick(rng, &[1, 1, 1, 3])));
            push(soon(rng), Act::Mend(node));
        }
        3 if mix.errors => {
            push(
                at,
                Act::BadRange(node, volume, 8192 - 64 + rng.below(64), 1 + rng.below(32), rng.percent(30)),
            );
            push(soon(rng), Act::Mend(node));
        }
        4 if mix.dead_disks => {
            push(at, Act::DeadDisk(node, volume));
            push(soon(rng), Act::Mend(node));
        }
        5 if mix.stuck => {
            let ms = pick(rng, &[100, 2000, 20_000, 0]);
            push(at, Act::Stick(node, volume, ms));
            if ms == 0 {
                push(soon(rng), Act::Kill(node, power));
            }
        }
        6..=7 if mix.verbs => push(at, Act::StepDown),
        _ if mix.verbs => {
            let tame = [
                Typed::Connect,
                Typed::Connect,
                Typed::Disconnect(false),
                Typed::Disconnect(false),
                Typed::Disconnect(true),
                Typed::Attach,
                Typed::Detach(false),
                Typed::Detach(false),
                Typed::Secondary,
                Typed::Down,
            ];
            let wild = [
                Typed::Primary(false),
                Typed::Primary(true),
                Typed::ConnectDiscarding,
                Typed::ConnectTentative,
                Typed::Detach(true),
                Typed::Invalidate,
                Typed::InvalidateRemote,
                Typed::Outdate,
                Typed::NewCurrentUuid,
            ];
            let typed = if mix.wild_verbs && rng.percent(50) { pick(rng, &wild) } else { pick(rng, &tame) };
            push(at, Act::Type(node, typed));
        }
        _ => push(at, Act::Cut(false)),
    }
}
