//! The `drbdmeta` command line: metadata verbs on a device that no daemon uses.
//!
//! `drbdmeta [options] MINOR|/dev/drbdN|- v08 DEVICE internal|flex-internal|flex-external|INDEX COMMAND`
//!
//! Words and exit codes follow drbd-utils 9.22 (ADM §10): 0 done, 1 cancelled or no metadata, 5 refused
//! by the state, 10 bad input or size, 20 usage or device, 40 would truncate a filesystem. Regular files
//! need no `--force` here. The minor is accepted and not used: the exclusive claim of the device protects it.
use crate::meta::layout::{DEFAULT_AL_STRIPE_SIZE_4K, DEFAULT_AL_STRIPES};
use crate::meta::{MAGIC_CLEAN, MetaError, MetaKind, Superblock, flags, restore};
use crate::runtime::backing::area::{self, Area, AreaError};
use crate::runtime::backing::create::{CreateError, CreateOptions, Operator, create};
use crate::runtime::backing::device::{Access, Device, DeviceError};
use std::ffi::OsString;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::UNIX_EPOCH;

/// Why a command ended early: what to tell the operator and the exit code.
type Refusal = (u8, String);

const USAGE: &str = "USAGE: drbdmeta [--force] MINOR|/dev/drbdN|- v08 DEVICE internal|flex-external|INDEX COMMAND\n\
    COMMANDS: create-md dump-md restore-md FILE verify-dump FILE apply-al wipe-md get-gi show-gi set-gi VALS \
    dstate outdate invalidate md-dev\n\
    OPTIONS: --force  --al-stripes N  --al-stripe-size-kB N  --peer-max-bio-size BYTES";

/// Runs the command line `args` (without the program's name) on standard output and error.
#[must_use]
pub fn run(args: &[OsString]) -> ExitCode {
    ExitCode::from(run_to(args, &mut io::stdout().lock(), &mut io::stderr().lock()))
}

/// Runs the command line `args` and returns the exit code.
pub fn run_to(args: &[OsString], out: &mut dyn Write, err: &mut dyn Write) -> u8 {
    let mut session = Session { out, err, force: false };
    match command(args, &mut session) {
        Ok(code) => code,
        Err((code, text)) => {
            session.warn(&text);
            code
        }
    }
}

/// Where the words go.
struct Session<'a> {
    out: &'a mut dyn Write,
    err: &'a mut dyn Write,
    force: bool,
}

impl Session<'_> {
    /// A result line. A closed pipe is not our problem: the exit code tells the rest.
    fn print(&mut self, text: &str) {
        if writeln!(self.out, "{text}").is_err() {
            self.warn("cannot write to standard output");
        }
    }

    fn warn(&mut self, text: &str) {
        // Nobody is left to be told when standard error fails.
        drop(writeln!(self.err, "{text}"));
    }
}

impl Operator for Session<'_> {
    fn say(&mut self, text: &str) {
        self.print(text);
    }

    fn confirm(&mut self, question: &str) -> bool {
        self.print(&format!("\n{question}"));
        if self.force {
            self.print("*** confirmation forced via --force option ***");
            return true;
        }
        if !io::stdin().is_terminal() {
            self.print("stdin not a TTY, not waiting for confirmation");
            return false;
        }
        drop(write!(self.out, "[need to type 'yes' to confirm] "));
        drop(self.out.flush());
        let mut answer = String::new();
        io::stdin().read_line(&mut answer).is_ok() && answer.trim_end() == "yes"
    }

    fn progress(&mut self, done: u64, total: u64) {
        // Small bitmaps are done before anybody looks.
        if total >= 256 << 20 && io::stderr().is_terminal() {
            let percent = done.saturating_mul(100) / total.max(1);
            drop(write!(self.err, "\r{percent:3}% of {} MiB zeroed", total >> 20));
            if done >= total {
                self.warn("");
            }
        }
    }
}

struct CommandLine {
    path: PathBuf,
    kind: MetaKind,
    verb: String,
    argument: Option<OsString>,
    al_stripes: Option<u32>,
    al_stripe_size_4k: Option<u32>,
    peer_max_bio_size: u32,
    all: Vec<String>,
}

fn parse_line(args: &[OsString], force: &mut bool) -> Result<CommandLine, Refusal> {
    let mut positional = Vec::new();
    let (mut al_stripes, mut al_stripe_size_kib, mut peer_max_bio_size) = (None, None, None);
    let mut rest = args.iter();
    while let Some(arg) = rest.next() {
        let text = arg.to_string_lossy();
        let (name, inline) = match text.split_once('=') {
            Some((name, value)) if name.starts_with("--") => (name.to_owned(), Some(value.to_owned())),
            _ => (text.to_string(), None),
        };
        let slot = match name.as_str() {
            "--force" | "-f" => {
                *force = true;
                continue;
            }
            // Nothing here depends on them.
            "--ignore-sanity-checks" | "--verbose" => continue,
            "--al-stripes" | "-s" => &mut al_stripes,
            "--al-stripe-size-kB" | "-z" => &mut al_stripe_size_kib,
            "--peer-max-bio-size" | "-p" => &mut peer_max_bio_size,
            // The node id selects a peer of v09; v08 has only one.
            "--node-id" => &mut None,
            _ if text.starts_with('-') && text != "-" => {
                return Err((20, format!("unknown option '{text}'\n{USAGE}")));
            }
            _ => {
                positional.push(arg.clone());
                continue;
            }
        };
        let value = inline.or_else(|| rest.next().map(|value| value.to_string_lossy().into_owned()));
        let value = value.as_deref().unwrap_or("");
        *slot =
            Some(value.parse::<u32>().map_err(|_| (20, format!("'{value}' is not a number for {name}")))?);
    }
    let [_minor, format, device, index, verb, argument @ ..] = positional.as_slice() else {
        return Err((20, USAGE.to_owned()));
    };
    match format.to_string_lossy().as_ref() {
        "v08" => {}
        known @ ("v06" | "v07" | "v09") => {
            return Err((
                20,
                format!("Format '{known}' is not supported; this program handles v08 (DRBD 8.4)."),
            ));
        }
        other => return Err((20, format!("Unknown format '{other}'."))),
    }
    let kind = match index.to_string_lossy().as_ref() {
        "internal" | "flex-internal" => MetaKind::Internal,
        "flex-external" => MetaKind::FlexExternal,
        text => MetaKind::Indexed(
            text.parse().map_err(|_| (20, format!("'{text}' is not a valid index number.")))?,
        ),
    };
    let al_stripe_size_4k = match al_stripe_size_kib {
        None => None,
        Some(kib) if kib % 4 == 0 => Some(kib / 4),
        Some(kib) => return Err((20, format!("--al-stripe-size-kB {kib} is no multiple of 4"))),
    };
    if argument.len() > 1 {
        return Err((20, USAGE.to_owned()));
    }
    Ok(CommandLine {
        path: PathBuf::from(device),
        kind,
        verb: verb.to_string_lossy().into_owned(),
        argument: argument.first().cloned(),
        al_stripes,
        al_stripe_size_4k,
        peer_max_bio_size: peer_max_bio_size.unwrap_or(0),
        all: args.iter().map(|arg| arg.to_string_lossy().into_owned()).collect(),
    })
}

fn command(args: &[OsString], session: &mut Session<'_>) -> Result<u8, Refusal> {
    let line = parse_line(args, &mut session.force)?;
    match line.verb.as_str() {
        "create-md" => create_md(&line, session),
        "wipe-md" => wipe_md(&line, session),
        "restore-md" => restore_md(&line, session),
        "verify-dump" => {
            read_dump(&line)?;
            session.print("input file parsed ok");
            Ok(0)
        }
        "md-dev" => {
            session.print(&line.path.display().to_string());
            Ok(0)
        }
        "dump-md" => {
            let area = open_to_look(&line, session.force)?;
            if !area.superblock.is_clean() && !session.force {
                return Err((1, "Found meta data is \"unclean\", please apply-al first".to_owned()));
            }
            let unreadable = area.dump(session.out, &dump_header(&line.all)).map_err(refusal)?;
            if unreadable > 0 {
                session.warn(&format!("{unreadable} bitmap pages cannot be read; dumped as all ones"));
            }
            Ok(0)
        }
        "apply-al" => {
            let mut area = open(&line)?;
            match area.apply_al() {
                Ok(_) => Ok(0),
                Err(AreaError::Log(damage)) if damage.is_foreign_format() => Err((1, damage.to_string())),
                Err(AreaError::Log(damage)) => {
                    Err((1, format!("No usable activity log found. Do you need to create-md?\n({damage})")))
                }
                Err(other) => Err(refusal(other)),
            }
        }
        "get-gi" => {
            let area = open_to_look(&line, session.force)?;
            session.print(&gi_line(&area.superblock));
            Ok(0)
        }
        "show-gi" => {
            let area = open_to_look(&line, session.force)?;
            session.print(&show_gi(&area.superblock));
            Ok(0)
        }
        "dstate" => {
            let area = open_to_look(&line, session.force)?;
            session.print(dstate(area.superblock.flags));
            Ok(0)
        }
        "set-gi" => set_gi(&line, session),
        "outdate" => {
            let mut area = open(&line)?;
            if area.superblock.flags & flags::CONSISTENT == 0 {
                return Err((5, "Device is inconsistent.".to_owned()));
            }
            area.superblock.flags &= !flags::WAS_UP_TO_DATE;
            area.store().map_err(refusal)?;
            Ok(0)
        }
        "invalidate" => {
            let mut area = open(&line)?;
            area.superblock.flags &= !(flags::CONSISTENT | flags::WAS_UP_TO_DATE);
            area.superblock.flags |= flags::FULL_SYNC;
            area.store().map_err(refusal)?;
            Ok(0)
        }
        other => Err((20, format!("Unknown command '{other}'."))),
    }
}

fn refusal(error: AreaError) -> Refusal {
    match error {
        AreaError::Device(error) => device_refusal(&error),
        AreaError::Meta(error @ MetaError::TooSmall { .. }) => (10, error.to_string()),
        AreaError::Meta(error @ MetaError::NotFound { .. }) => {
            (1, format!("No valid meta data found\n({error})"))
        }
        AreaError::Meta(error) => (1, format!("No valid meta data found: {error}")),
        AreaError::Log(error) => (1, error.to_string()),
        AreaError::Text(error) => (10, error.to_string()),
        error @ (AreaError::BitmapTooLong { .. } | AreaError::Output(_)) => (10, error.to_string()),
    }
}

fn device_refusal(error: &DeviceError) -> Refusal {
    (20, error.to_string())
}

fn open(line: &CommandLine) -> Result<Area, Refusal> {
    Area::open(&line.path, line.kind, Access::Exclusive).map_err(refusal)
}

/// For verbs that change nothing: under `--force` also on a device in use, where the answer may be stale.
fn open_to_look(line: &CommandLine, force: bool) -> Result<Area, Refusal> {
    match Area::open(&line.path, line.kind, Access::Exclusive) {
        Err(AreaError::Device(DeviceError::InUse { .. })) if force => {
            Area::open(&line.path, line.kind, Access::ReadShared).map_err(refusal)
        }
        other => other.map_err(refusal),
    }
}

fn create_md(line: &CommandLine, session: &mut Session<'_>) -> Result<u8, Refusal> {
    if line.argument.is_some() {
        return Err((20, "create-md of v08 takes no number of peers".to_owned()));
    }
    let options = CreateOptions {
        al_stripes: line.al_stripes.unwrap_or(DEFAULT_AL_STRIPES),
        al_stripe_size_4k: line.al_stripe_size_4k.unwrap_or(DEFAULT_AL_STRIPE_SIZE_4K),
        peer_max_bio_size: line.peer_max_bio_size,
        force: session.force,
    };
    match create(&line.path, line.kind, None, &options, session) {
        Ok(_) => {
            session.print("New drbd meta data block successfully created.");
            Ok(0)
        }
        Err(CreateError::Device(error)) => Err(device_refusal(&error)),
        Err(CreateError::Meta(error)) => Err((10, format!("{}: {error}", line.path.display()))),
        Err(error @ CreateError::WouldTruncate { .. }) => Err((40, error.to_string())),
        Err(error @ CreateError::Cancelled { .. }) => Err((1, error.to_string())),
    }
}

fn wipe_md(line: &CommandLine, session: &mut Session<'_>) -> Result<u8, Refusal> {
    let area = match Area::open(&line.path, line.kind, Access::Exclusive) {
        Ok(area) => area,
        Err(AreaError::Meta(_)) => {
            session.warn("There appears to be no drbd meta data to wipe out?");
            return Ok(0);
        }
        Err(other) => return Err(refusal(other)),
    };
    if !session.confirm("Do you really want to wipe out the DRBD meta data?") {
        return Err((1, "Operation cancelled.".to_owned()));
    }
    session.print("Wiping meta data...");
    area.wipe().map_err(refusal)?;
    session.print("DRBD meta data block successfully wiped out.");
    Ok(0)
}

fn read_dump(line: &CommandLine) -> Result<restore::RestoredMeta, Refusal> {
    let file = line.argument.as_ref().ok_or((10, "Required Argument missing".to_owned()))?;
    let file = Path::new(file);
    let text = std::fs::read_to_string(file)
        .map_err(|error| (20, format!("open({}) failed: {error}", file.display())))?;
    let mut dump = restore::parse(&text).map_err(|error| (10, format!("{}: {error}", file.display())))?;
    dump.al_stripes = line.al_stripes.unwrap_or(dump.al_stripes);
    dump.al_stripe_size_4k = line.al_stripe_size_4k.unwrap_or(dump.al_stripe_size_4k);
    Ok(dump)
}

fn restore_md(line: &CommandLine, session: &mut Session<'_>) -> Result<u8, Refusal> {
    let dump = read_dump(line)?;
    match Area::open(&line.path, line.kind, Access::Exclusive) {
        Ok(_) => {
            if !session.confirm("Valid meta-data in place, overwrite?") {
                return Err((1, "Operation cancelled.".to_owned()));
            }
            session.print("reinitializing");
        }
        Err(AreaError::Meta(_)) => {
            // Whatever else is there gets the same protection as from create-md, which also makes the place ready.
            let options = CreateOptions {
                al_stripes: dump.al_stripes,
                al_stripe_size_4k: dump.al_stripe_size_4k,
                peer_max_bio_size: dump.la_peer_max_bio_size,
                force: session.force,
            };
            create(&line.path, line.kind, None, &options, session).map_err(|error| (1, error.to_string()))?;
        }
        Err(other) => return Err(refusal(other)),
    }
    let device = Device::open(&line.path, Access::Exclusive).map_err(|error| device_refusal(&error))?;
    let area = area::restore(device, line.kind, &dump).map_err(refusal)?;
    if area.superblock.la_size < dump.la_size {
        session.warn(&format!(
            "# la-size-sect was too big ({}), truncated ({})!",
            dump.la_size.0, area.superblock.la_size.0
        ));
    }
    session.print("Successfully restored meta data");
    Ok(0)
}

/// Flag bits in the order of the get-gi line.
const GI_FLAGS: [u32; 7] = [
    flags::CONSISTENT,
    flags::WAS_UP_TO_DATE,
    flags::PRIMARY_IND,
    flags::CONNECTED_IND,
    flags::FULL_SYNC,
    flags::PEER_OUT_DATED,
    flags::CRASHED_PRIMARY,
];

/// The generation identifiers and flags as `get-gi` prints them.
#[must_use]
pub fn gi_line(superblock: &Superblock) -> String {
    let uuids = superblock.uuid.iter().map(|uuid| format!("{uuid:016X}"));
    let bits = GI_FLAGS.iter().map(|flag| u8::from(superblock.flags & flag != 0).to_string());
    uuids.chain(bits).collect::<Vec<_>>().join(":")
}

/// The disk state that flags of an unattached disk mean.
#[must_use]
pub const fn dstate(word: u32) -> &'static str {
    if word & flags::CONSISTENT == 0 {
        "Inconsistent"
    } else if word & flags::WAS_UP_TO_DATE == 0 {
        "Outdated"
    } else if word & flags::PEER_OUT_DATED == 0 {
        "Consistent"
    } else {
        "UpToDate"
    }
}

fn show_gi(superblock: &Superblock) -> String {
    let has = |flag| superblock.flags & flag != 0;
    let crashed = if has(flags::CRASHED_PRIMARY) { "crashed " } else { "" };
    let role = if has(flags::PRIMARY_IND) { "Primary" } else { "Secondary" };
    let connection = if has(flags::CONNECTED_IND) { "Connected" } else { "StandAlone" };
    let disk = match (has(flags::CONSISTENT), has(flags::WAS_UP_TO_DATE)) {
        (false, _) => "Inconsistent",
        (true, false) => "Outdated",
        (true, true) => "UpToDate",
    };
    let full = if has(flags::FULL_SYNC) { ", need full sync" } else { "" };
    let peer = if has(flags::PEER_OUT_DATED) { ", peer Outdated" } else { "" };
    let clean =
        if superblock.magic == MAGIC_CLEAN && has(flags::AL_CLEAN) { "clean" } else { "need apply-al" };
    let size = if superblock.la_size.0 == 0 {
        "zero size device -- never seen peer yet?".to_owned()
    } else {
        format!(
            "last agreed size: {} ({} sectors)\nlast agreed max bio size: {} Byte",
            human_size(superblock.la_size.0 / 2),
            superblock.la_size.0,
            superblock.la_peer_max_bio_size
        )
    };
    format!(
        "\n\
        \x20      +--<  Current data generation UUID  >-\n\
        \x20      |               +--<  Bitmap's base data generation UUID  >-\n\
        \x20      |               |                 +--<  younger history UUID  >-\n\
        \x20      |               |                 |         +-<  older history  >-\n\
        \x20      V               V                 V         V\n\
        {}\n\
        {:68}^ ^ ^ ^ ^ ^ ^\n\
        {:38}-<  Data consistency flag  >--+ | | | | | |\n\
        {:29}-<  Data was/is currently up-to-date  >--+ | | | | |\n\
        {:34}-<  Node was/is currently primary  >--+ | | | |\n\
        {:34}-<  Node was/is currently connected  >--+ | | |\n\
        {:9}-<  Node was in the progress of setting all bits in the bitmap  >--+ | |\n\
        {:24}-<  The peer's disk was out-dated or inconsistent  >--+ |\n\
        {:6}-<  This node was a crashed primary, and has not seen its peer since   >--+\n\
        \nflags: {crashed}{role}, {connection}, {disk}{full}{peer}\nmeta-data: {clean}\n{size}",
        gi_line(superblock),
        "",
        "",
        "",
        "",
        "",
        "",
        "",
        ""
    )
}

/// KiB with a unit that keeps at most four digits.
fn human_size(mut kib: u64) -> String {
    let mut units = ["KB", "MB", "GB", "TB", "PB", "EB"].into_iter();
    let mut unit = units.next().unwrap_or_default();
    while kib >= 10000 {
        let Some(next) = units.next() else { break };
        kib = (kib >> 10) + (kib >> 9 & 1);
        unit = next;
    }
    format!("{kib} {unit}")
}

/// Applies the colon list of `set-gi`; empty and missing fields leave their values.
fn apply_gi(superblock: &mut Superblock, list: &str) -> Result<(), Refusal> {
    for (index, field) in list.split(':').enumerate().filter(|(_, field)| !field.is_empty()) {
        if let Some(place) = superblock.uuid.get_mut(index) {
            *place =
                u64::from_str_radix(field, 16).map_err(|_| (10, format!("'{field}' is not a number.")))?;
            continue;
        }
        let flag = index.checked_sub(superblock.uuid.len()).and_then(|index| GI_FLAGS.get(index));
        let flag = flag.ok_or_else(|| (10, format!("'{field}' is one field too many.")))?;
        match field {
            "0" => superblock.flags &= !flag,
            "1" => superblock.flags |= flag,
            other => return Err((10, format!("'{other}' is not 0 or 1."))),
        }
    }
    Ok(())
}

fn set_gi(line: &CommandLine, session: &mut Session<'_>) -> Result<u8, Refusal> {
    let list = line.argument.as_ref().ok_or((10, "Required Argument missing".to_owned()))?;
    let mut area = open(line)?;
    let before = gi_line(&area.superblock);
    apply_gi(&mut area.superblock, &list.to_string_lossy())?;
    session.print(&format!("previously {before}\nset GI to  {}", gi_line(&area.superblock)));
    if !session.confirm("Write new GI to disk?") {
        session.print("Operation canceled.");
        return Ok(0);
    }
    area.store().map_err(refusal)?;
    Ok(0)
}

/// The comment lines at the top of a dump: when, where, by which command.
#[must_use]
pub fn dump_header(args: &[String]) -> Vec<String> {
    #[expect(clippy::disallowed_methods, reason = "the wall clock is what the header shows")]
    let seconds = std::time::SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let host =
        nix::unistd::gethostname().map_or_else(|_| String::new(), |name| name.to_string_lossy().into_owned());
    let (year, month, day) = civil_date(seconds / 86400);
    let time = seconds % 86400;
    vec![
        "DRBD meta data dump".to_owned(),
        format!(
            "{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02} +0000 [{seconds}]",
            time / 3600,
            time / 60 % 60,
            time % 60
        ),
        format!("{host}> drbdmeta {}", args.join(" ")),
        String::new(),
    ]
}

/// Gregorian date of a day counted from 1970-01-01.
const fn civil_date(days: u64) -> (u64, u64, u64) {
    // Years begin in March here, so that the leap day is the last one; eras of 400 years have 146097 days.
    let shifted = days + 719_468;
    let (era, day) = (shifted / 146_097, shifted % 146_097);
    let year = (day - day / 1460 + day / 36524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day_of_month = day - (153 * month + 2) / 5 + 1;
    let (month, carry) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    (era * 400 + year + carry, month, day_of_month)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        assert_eq!(civil_date(0), (1970, 1, 1));
        assert_eq!(civil_date(11_016), (2000, 2, 29));
        assert_eq!(civil_date(1_795_252_302 / 86400), (2026, 11, 21));
    }

    #[test]
    fn sizes_as_drbdmeta_rounds_them() {
        let sizes =
            [(0, "0 KB"), (1024, "1024 KB"), (50_000, "49 MB"), (102_360, "100 MB"), (65_496, "64 MB")];
        for (kib, text) in sizes {
            assert_eq!(human_size(kib), text);
        }
    }
}
