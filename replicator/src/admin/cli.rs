//! Command lines of the five names, and how drbdadm's habits map onto them (ADM §3).
//!
//! Raw arguments become typed ones in two steps: [`normalise`] undoes drbdadm's own order (backend
//! options behind `--` before the verb, `-W`), then clap does the rest. Nothing here touches the world.
use crate::admin::control::ResourceVerb;
use clap::{Args, Parser, Subcommand};
use std::ffi::OsString;
use std::path::PathBuf;
use std::str::FromStr;

/// Network RAID-1 for block devices in userspace, with DRBD's commands.
#[derive(Clone, Debug, Parser)]
#[command(name = "lockstep", version, arg_required_else_help = true, disable_help_subcommand = true)]
#[command(
    after_help = "The same program answers as lockstepd, drbdadm, drbdsetup and drbdmeta: `lockstep install-links DIR` makes the links."
)]
pub struct LockstepCli {
    /// Options that stand before or after the verb.
    #[command(flatten)]
    pub global: GlobalOptions,
    /// What to do.
    #[command(subcommand)]
    pub command: LockstepCommand,
}

/// Everything `lockstep` does: drbdadm's verbs and the other programs by name.
#[derive(Clone, Debug, Subcommand)]
pub enum LockstepCommand {
    /// Run the daemon of this node, in the foreground
    Daemon(DaemonOptions),
    /// Work on metadata of a device that is not in use: `drbdmeta MINOR v08 DEVICE INDEX COMMAND`
    #[command(disable_help_flag = true)]
    Drbdmeta {
        /// As in drbdmeta.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<OsString>,
    },
    /// Low-level queries and commands on running resources, in drbdsetup's spelling
    #[command(disable_help_flag = true)]
    Drbdsetup {
        /// As in drbdsetup.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<OsString>,
    },
    /// Make the links lockstepd, drbdadm, drbdsetup and drbdmeta in DIR
    InstallLinks {
        /// Where; never replaces what is not a link to this program unless --force.
        dir: PathBuf,
        /// Replace what is there.
        #[arg(long)]
        force: bool,
    },
    /// drbdadm's verbs.
    #[command(flatten)]
    Verb(Verb),
}

/// Administer replicated disks; what drbdadm is to DRBD.
#[derive(Clone, Debug, Parser)]
#[command(
    name = "drbdadm",
    version,
    arg_required_else_help = true,
    disable_help_subcommand = true,
    disable_version_flag = true
)]
pub struct DrbdadmCli {
    /// Options that stand before or after the verb.
    #[command(flatten)]
    pub global: GlobalOptions,
    /// Print versions, to be evaluated by a shell.
    #[arg(short = 'V', long)]
    pub version: bool,
    /// What to do.
    #[command(subcommand)]
    pub verb: Option<Verb>,
}

/// Options every verb understands, before or after it.
#[derive(Clone, Debug, Default, Args)]
pub struct GlobalOptions {
    /// Configuration file ('-' = standard input); default: the daemon's, else /etc/drbd.conf
    #[arg(short = 'c', long = "config-file", alias = "config", global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Act as this node of the configuration; default: the daemon's, else the host name
    #[arg(long, global = true, env = "LOCKSTEP_NODE", value_name = "NAME")]
    pub node: Option<String>,
    /// Directory with the daemon's control socket
    #[arg(long, global = true, env = "LOCKSTEP_RUN_DIR", value_name = "DIR")]
    pub run_dir: Option<PathBuf>,
    /// Print what would be done instead of doing it
    #[arg(short = 'd', long, global = true)]
    pub dry_run: bool,
    /// Say what is done while doing it; in `status` show every field (twice: even more)
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// Give up waiting for a verb after this many seconds (0 = never)
    #[arg(long, global = true, visible_alias = "wfc-timeout", value_name = "SECONDS")]
    pub timeout: Option<u64>,
    /// For sh-*: print NAME=value
    #[arg(short = 'n', long, global = true, value_name = "NAME", value_parser = shell_name)]
    pub sh_varname: Option<String>,
    /// Accepted for drbdadm's sake; lockstep prints no colours
    #[arg(long, global = true, value_name = "WHEN", num_args = 0..=1, require_equals = true, hide = true)]
    pub color: Option<String>,
}

fn shell_name(text: &str) -> Result<String, String> {
    let good = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    if good {
        Ok(text.into())
    } else {
        Err("only letters, digits and _ can be in a shell variable's name".into())
    }
}

/// Options of the daemon.
#[derive(Clone, Debug, Default, Args)]
pub struct DaemonOptions {
    /// Bring these resources up at once (RES or all); otherwise they wait for `up`
    #[arg(long, value_name = "all|RES")]
    pub up: Vec<String>,
    /// Serve every Primary volume on this address too (export name RES or RES/VOL)
    #[arg(long, value_name = "ADDR:PORT")]
    pub nbd_listen: Option<std::net::SocketAddr>,
    /// How volumes are offered to this machine
    #[arg(long, value_enum, default_value_t = FrontendOption::Auto)]
    pub frontend: FrontendOption,
    /// What to log: error, warn, info, debug or trace, also per module (tracing's filter syntax)
    #[arg(long, env = "LOCKSTEP_LOG", default_value = "info", value_name = "FILTER")]
    pub log: String,
    /// Do not lock the daemon's memory (by default it is locked when run by root)
    #[arg(long)]
    pub no_mlock: bool,
}

/// `--frontend`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum FrontendOption {
    /// ublk when the driver is there and this program was built with it, else NBD.
    #[default]
    Auto,
    /// Block devices /dev/ublkbN; an error when it cannot be.
    Ublk,
    /// NBD exports only.
    Nbd,
}

/// The daemon under its own name.
#[derive(Clone, Debug, Parser)]
#[command(
    name = "lockstepd",
    version,
    about = "Run the daemon of this node, in the foreground",
    disable_help_subcommand = true
)]
pub struct LockstepdCli {
    /// Shared options.
    #[command(flatten)]
    pub global: GlobalOptions,
    /// The daemon's.
    #[command(flatten)]
    pub daemon: DaemonOptions,
}

/// Which objects a verb is about: `all`, `RES`, `RES/VOL`, `RES:PEER` or `RES:PEER/VOL`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Target {
    /// Every resource of this node.
    All,
    /// One resource or a part of it.
    One {
        /// Resource name.
        resource: String,
        /// Peer node name.
        peer: Option<String>,
        /// Volume number.
        volume: Option<u16>,
    },
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (head, volume) = match text.split_once('/') {
            Some((head, volume)) => {
                let number = volume.parse().map_err(|_| format!("'{volume}' is not a volume number"))?;
                (head, Some(number))
            }
            None => (text, None),
        };
        let (resource, peer) = match head.split_once(':') {
            Some((resource, peer)) => (resource, Some(peer.to_owned())),
            None => (head, None),
        };
        if resource.is_empty() || peer.as_deref() == Some("") {
            return Err("expected RES, RES/VOLUME, RES:PEER or all".into());
        }
        if resource == "all" && peer.is_none() && volume.is_none() {
            return Ok(Self::All);
        }
        Ok(Self::One { resource: resource.into(), peer, volume })
    }
}

/// At least one target.
#[derive(Clone, Debug, Args)]
pub struct Targets {
    /// Resources, or one volume of a resource
    #[arg(required = true, value_name = "all|RES[/VOL]")]
    pub targets: Vec<Target>,
}

/// Any number of targets; none = all.
#[derive(Clone, Debug, Args)]
pub struct OptionalTargets {
    /// Resources; none = all
    #[arg(value_name = "RES")]
    pub targets: Vec<Target>,
}

/// drbdadm's verbs.
#[derive(Clone, Debug, Subcommand)]
pub enum Verb {
    /// Write fresh metadata; refuses when the device holds something, unless --force
    CreateMd {
        /// Which.
        #[command(flatten)]
        targets: Targets,
        /// Write even when the device looks used
        #[arg(short, long)]
        force: bool,
        /// Activity-log stripes
        #[arg(long, default_value_t = 1)]
        al_stripes: u32,
        /// Size of one activity-log stripe, KiB
        #[arg(long = "al-stripe-size-kB", default_value_t = 32)]
        al_stripe_size_kib: u32,
        /// Accepted for drbdadm's sake: v08 metadata has one peer
        #[arg(long, hide = true)]
        max_peers: Option<u32>,
    },
    /// Bring resources up: attach the disks, connect to the peer
    Up(Targets),
    /// Take resources down: disconnect, detach, stop
    Down(Targets),
    /// Bring up what the configuration names and is not up yet
    #[command(alias = "adjust-with-progress")]
    Adjust {
        /// Which.
        #[command(flatten)]
        targets: Targets,
        /// Leave disks alone
        #[arg(long)]
        skip_disk: bool,
        /// Leave the connection alone
        #[arg(long)]
        skip_net: bool,
    },
    /// Act by the net options of the configuration as it is now
    NetOptions(Targets),
    /// Act by the disk options of the configuration as it is now
    DiskOptions(Targets),
    /// Use the backing disk
    Attach(Targets),
    /// Let go of the backing disk
    Detach {
        /// Which.
        #[command(flatten)]
        targets: Targets,
        /// Do not wait for IO in flight
        #[arg(short, long)]
        force: bool,
    },
    /// Start to connect to the peer
    Connect {
        /// Which.
        #[command(flatten)]
        targets: Targets,
        /// Once: in a split brain, this node's changes are thrown away
        #[arg(long)]
        discard_my_data: bool,
        /// Only say what would happen
        #[arg(long)]
        tentative: bool,
    },
    /// End the connection to the peer
    Disconnect {
        /// Which.
        #[command(flatten)]
        targets: Targets,
        /// Skip the graceful checks
        #[arg(short, long)]
        force: bool,
    },
    /// Make this node Primary: its users may open the volumes
    Primary {
        /// Which.
        #[command(flatten)]
        targets: Targets,
        /// Declare the local data good if need be; the peer's is overwritten
        #[arg(short, long, visible_alias = "overwrite-data-of-peer", short_alias = 'o')]
        force: bool,
    },
    /// Make this node Secondary
    Secondary(Targets),
    /// Local data is bad: copy everything from the peer
    Invalidate {
        /// Which.
        #[command(flatten)]
        targets: Targets,
        /// `no`: copy only the blocks that are marked, such as those a verify found
        #[arg(long, default_value = "yes", value_parser = ["yes", "no"])]
        reset_bitmap: String,
    },
    /// The peer's data is bad: copy everything to it
    InvalidateRemote {
        /// Which.
        #[command(flatten)]
        targets: Targets,
        /// `no`: copy only the blocks that are marked, such as those a verify found
        #[arg(long, default_value = "yes", value_parser = ["yes", "no"])]
        reset_bitmap: String,
    },
    /// Compare both copies; differences are marked on both nodes
    Verify {
        /// Which.
        #[command(flatten)]
        targets: Targets,
        /// First sector; without it an interrupted verify goes on
        #[arg(long, value_parser = parse_sector)]
        start: Option<u64>,
        /// Sector behind the last one
        #[arg(long, value_parser = parse_sector)]
        stop: Option<u64>,
    },
    /// Let a resync stand still
    PauseSync(Targets),
    /// Let a paused resync go on
    ResumeSync(Targets),
    /// Mark the local data as older than the peer's
    Outdate(Targets),
    /// Start a new generation of the data
    NewCurrentUuid {
        /// Which.
        #[command(flatten)]
        targets: Targets,
        /// Both copies are equal: skip the initial resync
        #[arg(long)]
        clear_bitmap: bool,
    },
    /// Take the size that the backing disks of both nodes have now
    Resize {
        /// Which.
        #[command(flatten)]
        targets: Targets,
        /// How.
        #[command(flatten)]
        resize: ResizeArgs,
    },
    /// Own and peer's role
    #[command(alias = "state")]
    Role(Targets),
    /// Connection state
    Cstate(Targets),
    /// Own and peer's disk state
    Dstate(Targets),
    /// State of resources
    Status {
        /// Which.
        #[command(flatten)]
        targets: OptionalTargets,
        /// As JSON
        #[arg(short, long)]
        json: bool,
        /// With counters
        #[arg(short, long)]
        statistics: bool,
    },
    /// Why the nodes are connected, resyncing or apart: what they told each other, and what follows
    Explain {
        /// Which.
        #[command(flatten)]
        targets: OptionalTargets,
        /// As JSON
        #[arg(short, long)]
        json: bool,
        /// How many of the last meetings
        #[arg(long, value_name = "N", default_value_t = 3)]
        last: usize,
    },
    /// Wait until the peer is connected
    WaitConnect(Targets),
    /// Wait until no resync to this node runs
    WaitSync(Targets),
    /// The configuration as understood
    Dump(OptionalTargets),
    /// The metadata as text
    DumpMd(Targets),
    /// Remove the metadata
    WipeMd {
        /// Which.
        #[command(flatten)]
        targets: Targets,
        /// Do not ask
        #[arg(short, long)]
        force: bool,
    },
    /// Generation identifiers and flags, one line
    GetGi(Targets),
    /// Generation identifiers and flags, explained
    ShowGi(Targets),
    /// Check the configuration, print nothing
    ShNop,
    /// Names of all resources of this node
    ShResources,
    /// The resource's name
    ShResource(Targets),
    /// Device paths
    ShDev(Targets),
    /// Minor numbers
    ShMinor(Targets),
    /// Backing devices
    ShLlDev(Targets),
    /// Metadata devices
    ShMdDev(Targets),
    /// Metadata indexes
    ShMdIdx(Targets),
    /// This node's replication addresses
    ShIp(Targets),
}

/// Query and drive running resources; what drbdsetup is to DRBD.
#[derive(Clone, Debug, Parser)]
#[command(name = "drbdsetup", version, arg_required_else_help = true, disable_help_subcommand = true)]
pub struct DrbdsetupCli {
    /// Shared options.
    #[command(flatten)]
    pub global: GlobalOptions,
    /// What to do.
    #[command(subcommand)]
    pub command: SetupCommand,
}

/// drbdsetup's commands. Volumes are named by minor, peers by node id.
#[derive(Clone, Debug, Subcommand)]
pub enum SetupCommand {
    /// State of resources
    Status {
        /// Resource; none = all
        resource: Option<String>,
        /// As JSON
        #[arg(short, long)]
        json: bool,
        /// With counters
        #[arg(short, long)]
        statistics: bool,
    },
    /// Own role
    Role {
        /// Resource
        resource: String,
    },
    /// Connection state
    Cstate {
        /// Resource
        resource: String,
        /// Peer's node id
        peer_node_id: Option<u32>,
    },
    /// Own and peer's disk state
    Dstate {
        /// Minor number
        minor: String,
    },
    /// Make this node Primary
    Primary {
        /// Resource
        resource: String,
        /// Declare the local data good if need be
        #[arg(short, long, visible_alias = "overwrite-data-of-peer", short_alias = 'o')]
        force: bool,
    },
    /// Make this node Secondary
    Secondary {
        /// Resource
        resource: String,
    },
    /// Disconnect, detach, stop
    Down {
        /// Resource
        resource: String,
    },
    /// Let go of the backing disk
    Detach {
        /// Minor number
        minor: String,
        /// Do not wait for IO in flight
        #[arg(short, long)]
        force: bool,
    },
    /// Start to connect
    Connect {
        /// Resource
        resource: String,
        /// Peer's node id
        peer_node_id: Option<u32>,
        /// Once: this node's changes are thrown away
        #[arg(long)]
        discard_my_data: bool,
        /// Only say what would happen
        #[arg(long)]
        tentative: bool,
    },
    /// End the connection
    Disconnect {
        /// Resource
        resource: String,
        /// Peer's node id
        peer_node_id: Option<u32>,
        /// Skip the graceful checks
        #[arg(short, long)]
        force: bool,
    },
    /// Local data is bad
    Invalidate {
        /// Minor number
        minor: String,
    },
    /// The peer's data is bad
    InvalidateRemote {
        /// Resource
        resource: String,
        /// Peer's node id
        peer_node_id: u32,
        /// Volume number
        volume: u16,
    },
    /// Mark the local data as older than the peer's
    Outdate {
        /// Minor number
        minor: String,
    },
    /// Take the size that the backing disks of both nodes have now
    Resize {
        /// Minor number
        minor: String,
        /// How.
        #[command(flatten)]
        resize: ResizeArgs,
    },
    /// Start a new generation
    NewCurrentUuid {
        /// Minor number
        minor: String,
        /// Both copies are equal
        #[arg(long)]
        clear_bitmap: bool,
    },
    /// Wait until the peer is connected
    WaitConnectResource {
        /// Resource
        resource: String,
    },
    /// Wait until no resync to this node runs
    WaitSyncResource {
        /// Resource
        resource: String,
    },
}

/// Options of `resize`.
#[derive(Args, Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResizeArgs {
    /// This size: KiB, or with a unit (s K M G T P)
    #[arg(long, value_parser = size_sectors)]
    size: Option<u64>,
    /// The new area holds the same on both nodes already: do not copy it
    #[arg(long)]
    assume_clean: bool,
    /// Grow although the peer cannot be asked
    #[arg(long)]
    assume_peer_has_space: bool,
    /// Make the volume smaller, as --size says: what lies behind is given up
    #[arg(long)]
    force: bool,
}

impl ResizeArgs {
    /// As asked of the daemon.
    #[must_use]
    pub const fn verb(self) -> ResourceVerb {
        let Self { size, assume_clean, assume_peer_has_space, force } = self;
        ResourceVerb::Resize { size_sectors: size, assume_clean, assume_peer_has_space, force }
    }
}

/// Sectors of a size as drbdsetup takes it.
fn size_sectors(text: &str) -> Result<u64, String> {
    let (digits, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let sectors_per_unit: u64 = match unit {
        "s" => 1,
        "" | "K" | "k" => 2,
        "M" | "m" => 2 << 10,
        "G" | "g" => 2 << 20,
        "T" | "t" => 2 << 30,
        "P" | "p" => 2 << 40,
        _ => return Err(format!("unknown unit '{unit}'; use s, K, M, G, T or P")),
    };
    let count: u64 = digits.parse().map_err(|_| "no number".to_owned())?;
    count.checked_mul(sectors_per_unit).filter(|size| *size > 0).ok_or_else(|| "no possible size".to_owned())
}

/// A sector, with or without DRBD's suffix `s`.
fn parse_sector(text: &str) -> Result<u64, String> {
    text.strip_suffix('s').unwrap_or(text).parse().map_err(|_| format!("'{text}' is not a sector number"))
}

/// Puts drbdadm's argument order into the usual one: `[-- OPT...] VERB RES...` becomes
/// `VERB RES... OPT...`, and `-W OPT` / `--backend-options OPT` become `OPT` at the end. Options of the
/// verb that stand before it move behind it; paths of DRBD's own helper programs are dropped. `args` is
/// without the program's name.
#[must_use]
pub fn normalise(args: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut plain = Vec::new();
    let mut late = Vec::new();
    let mut verb_seen = false;
    let mut behind_dashes = false;
    let mut args = args.into_iter();
    while let Some(arg) = args.next() {
        let text = arg.to_str().unwrap_or_default();
        if text == "--" {
            behind_dashes = true;
        } else if let Some(option) = text
            .strip_prefix("--backend-options=")
            .or_else(|| text.strip_prefix("-W").filter(|rest| !rest.is_empty()))
        {
            late.push(option.into());
        } else if text == "-W" || text == "--backend-options" {
            late.extend(args.next());
        } else if verb_seen || text == "-" || !text.starts_with('-') {
            verb_seen = true;
            plain.push(arg);
        } else if behind_dashes {
            late.push(arg);
        } else if ["-s", "-m", "-p", "--drbdsetup", "--drbdmeta", "--drbd-proxy-ctl"].contains(&text) {
            let _path_of_a_helper_we_do_not_need = args.next();
        } else if GLOBAL_WITH_VALUE.contains(&text) {
            plain.push(arg);
            plain.extend(args.next());
        } else if is_global(text) {
            plain.push(arg);
        } else {
            late.push(arg);
        }
    }
    plain.extend(late);
    plain
}

/// Global options whose value is the next argument.
const GLOBAL_WITH_VALUE: [&str; 9] = [
    "-c",
    "--config-file",
    "--config",
    "--node",
    "--run-dir",
    "--timeout",
    "--wfc-timeout",
    "-n",
    "--sh-varname",
];

/// Whether an option in front of the verb is one of [`GlobalOptions`] complete in itself.
fn is_global(text: &str) -> bool {
    let with_value = |option: &&str| {
        text.strip_prefix(*option).is_some_and(|rest| !option.starts_with("--") || rest.starts_with('='))
    };
    let flags = ["-d", "--dry-run", "--verbose", "-h", "--help", "-V", "--version"];
    flags.contains(&text)
        || text.starts_with("--color")
        || (text.starts_with("-v") && text.bytes().skip(1).all(|byte| byte == b'v'))
        || GLOBAL_WITH_VALUE.iter().any(with_value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    fn drbdadm(line: &str) -> DrbdadmCli {
        try_drbdadm(line).unwrap_or_else(|error| panic!("{line}: {error}"))
    }

    fn try_drbdadm(line: &str) -> Result<DrbdadmCli, clap::Error> {
        let args = normalise(line.split(' ').map(OsString::from));
        DrbdadmCli::try_parse_from(std::iter::once("drbdadm".into()).chain(args))
    }

    fn one(resource: &str, volume: Option<u16>) -> Target {
        Target::One { resource: resource.into(), peer: None, volume }
    }

    #[test]
    fn the_command_lines_are_well_formed() {
        LockstepCli::command().debug_assert();
        LockstepdCli::command().debug_assert();
        DrbdadmCli::command().debug_assert();
        DrbdsetupCli::command().debug_assert();
    }

    #[test]
    fn backend_options_before_the_verb_reach_it() {
        for line in [
            "-- --overwrite-data-of-peer primary web-root",
            "primary --overwrite-data-of-peer web-root",
            "primary web-root --force",
            "-- -o primary web-root",
            "--force primary web-root",
            "primary -- --force web-root",
            "-W--force primary web-root",
            "-W --force primary web-root",
            "--backend-options=--force primary web-root",
            "-c some.conf -- --force primary web-root",
            "-csome.conf -v -- --force primary web-root -d",
        ] {
            let cli = drbdadm(line);
            let Some(Verb::Primary { targets, force }) = cli.verb else { panic!("{line}: another verb") };
            assert!(force, "{line}");
            assert_eq!(targets.targets, [one("web-root", None)], "{line}");
        }
        assert!(matches!(
            drbdadm("-- --force create-md r").verb,
            Some(Verb::CreateMd { force: true, al_stripes: 1, .. })
        ));
        assert!(matches!(
            drbdadm("-- --al-stripes=4 --al-stripe-size-kB=64 create-md r/1").verb,
            Some(Verb::CreateMd { force: false, al_stripes: 4, al_stripe_size_kib: 64, .. })
        ));
        assert!(matches!(
            drbdadm("-- --discard-my-data connect r").verb,
            Some(Verb::Connect { discard_my_data: true, tentative: false, .. })
        ));
        assert!(matches!(
            drbdadm("-- --clear-bitmap new-current-uuid r/0").verb,
            Some(Verb::NewCurrentUuid { clear_bitmap: true, .. })
        ));
    }

    #[test]
    fn options_stand_before_or_behind_the_verb() {
        for line in ["-c a.conf --node alpha -v up r0 r1/3", "up r0 -c a.conf r1/3 --verbose --node=alpha"] {
            let cli = drbdadm(line);
            assert_eq!(cli.global.config.as_deref(), Some(std::path::Path::new("a.conf")), "{line}");
            assert_eq!(cli.global.node.as_deref(), Some("alpha"), "{line}");
            assert_eq!(cli.global.verbose, 1, "{line}");
            let Some(Verb::Up(targets)) = cli.verb else { panic!("{line}: another verb") };
            assert_eq!(targets.targets, [one("r0", None), one("r1", Some(3))], "{line}");
        }
        let cli = drbdadm("-c - sh-nop");
        assert_eq!(cli.global.config.as_deref(), Some(std::path::Path::new("-")));
        let cli = drbdadm("-s /sbin/drbdsetup -m /sbin/drbdmeta status -s r0");
        assert!(matches!(cli.verb, Some(Verb::Status { statistics: true, json: false, .. })));
        assert_eq!(drbdadm("status -vv").global.verbose, 2);
    }

    #[test]
    fn what_drbdadm_does_not_know_is_refused() {
        for line in ["frobnicate r0", "primary", "primary --frob r0", "up r0/x", "up /1", "-n a-b sh-dev r0"]
        {
            assert!(try_drbdadm(line).is_err(), "{line}");
        }
    }

    #[test]
    fn targets_name_resources_volumes_and_peers() {
        assert_eq!("all".parse(), Ok(Target::All));
        assert_eq!("r0/12".parse(), Ok(one("r0", Some(12))));
        let with_peer = Target::One { resource: "r0".into(), peer: Some("bravo".into()), volume: Some(1) };
        assert_eq!("r0:bravo/1".parse(), Ok(with_peer));
        for bad in ["", ":bravo", "r0:", "r0/", "r0/-1", "r0/70000"] {
            assert!(bad.parse::<Target>().is_err(), "{bad:?}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_arguments_are_taken_apart_without_panic(
            words in proptest::collection::vec("(--?)?[a-zA-Z0-9=/:-]{0,12}", 0..8)
        ) {
            let args = normalise(words.iter().map(OsString::from));
            proptest::prop_assert!(args.len() <= words.len());
            // Parsed or refused; both are fine.
            let parsed = DrbdadmCli::try_parse_from(std::iter::once("drbdadm".into()).chain(args));
            proptest::prop_assert!(parsed.is_ok() || parsed.is_err());
        }
    }
}
