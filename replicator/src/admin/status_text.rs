//! `status` as text, in DRBD 9's form (ADM §5.1).
//!
//! Fields are written one by one; a field that does not fit the terminal starts a new line at the
//! indentation of its level. Statistics and `write-ordering` always start one.
use crate::admin::view::ResourceView;
use crate::core::state::{ConnState, DiskState, ReplState, Role};
use crate::core::status::{PeerVolumeStatus, ResyncStatus, VolumeStatus};

/// Printed when nothing is up.
pub const NOTHING_CONFIGURED: &str = "# No currently configured DRBD found.\n";

/// How much to show and how.
#[derive(Clone, Copy, Debug)]
pub struct TextOptions {
    /// `--verbose`: every field.
    pub verbose: bool,
    /// `--statistics`: counters.
    pub statistics: bool,
    /// Columns of the terminal; 80 when there is none.
    pub width: usize,
    /// Whether the output goes to a terminal (`client:` is shown to programs only, or when verbose).
    pub terminal: bool,
}

impl Default for TextOptions {
    fn default() -> Self {
        Self { verbose: false, statistics: false, width: 80, terminal: false }
    }
}

/// All `views`, each followed by a blank line.
#[must_use]
pub fn status_text(views: &[ResourceView], options: TextOptions) -> String {
    if views.is_empty() {
        return NOTHING_CONFIGURED.into();
    }
    let mut out = Wrapper { text: String::new(), column: 0, width: options.width };
    for view in views {
        resource(&mut out, view, options);
        out.text.push('\n');
    }
    out.text
}

/// Collects fields into lines no longer than `width`, as far as single fields allow.
struct Wrapper {
    text: String,
    column: usize,
    width: usize,
}

impl Wrapper {
    /// Appends `name:value`, after a blank when not first in its line.
    fn field(&mut self, indent: usize, field: &str) {
        let len = field.chars().count();
        if self.column > 0 && self.column + 1 + len > self.width {
            self.end_line();
        }
        if self.column == 0 {
            self.text.extend(std::iter::repeat_n(' ', indent));
            self.column = indent;
        } else {
            self.text.push(' ');
            self.column += 1;
        }
        self.text.push_str(field);
        self.column += len;
    }

    /// Ends the line if one was begun.
    fn end_line(&mut self) {
        if self.column > 0 {
            self.text.push('\n');
            self.column = 0;
        }
    }
}

fn resource(out: &mut Wrapper, view: &ResourceView, options: TextOptions) {
    let status = &view.status;
    let verbose = options.verbose;
    out.field(0, &status.name);
    if verbose {
        out.field(4, &format!("node-id:{}", status.node_id));
    }
    out.field(4, &format!("role:{}", status.role));
    if verbose || !status.suspended.is_empty() {
        out.field(4, &format!("suspended:{}", list_or_no(&status.suspended)));
    }
    if verbose {
        out.field(4, "force-io-failures:no");
    }
    if verbose && options.statistics {
        out.end_line();
        out.field(4, &format!("write-ordering:{}", status.write_ordering));
    }
    out.end_line();

    let single = single_volume_zero(view);
    for volume in &status.volumes {
        device(out, view, volume, single, options);
    }
    connection(out, view, single, options);
}

/// With volume 0 alone its number says nothing and is left out.
fn single_volume_zero(view: &ResourceView) -> bool {
    matches!(view.status.volumes.as_slice(), [only] if only.volume.0 == 0)
}

fn device(out: &mut Wrapper, view: &ResourceView, volume: &VolumeStatus, single: bool, options: TextOptions) {
    let verbose = options.verbose;
    let config = view.device(volume.volume);
    let mut indent = 2;
    if verbose || !single {
        out.field(indent, &format!("volume:{}", volume.volume.0));
        indent = 6;
    }
    if verbose && let Some(config) = config {
        out.field(indent, &format!("minor:{}", config.minor));
    }
    out.field(indent, &format!("disk:{}", volume.disk));
    let indent = 6;
    let wanted_client = config.is_some_and(|config| config.backing_dev.is_none());
    if volume.disk == DiskState::Diskless && (verbose || !options.terminal) {
        out.field(indent, &format!("client:{}", yes_no(wanted_client)));
    }
    if verbose {
        let backing = config.and_then(|config| config.backing_dev.as_deref());
        // The path is only true while the disk is attached.
        let backing = if volume.disk == DiskState::Diskless { None } else { backing };
        out.field(indent, &format!("backing_dev:{}", backing.unwrap_or("none")));
        out.field(indent, "quorum:yes");
    }
    out.field(indent, &format!("open:{}", yes_no(volume.open_count > 0)));
    if options.statistics {
        out.end_line();
        if verbose {
            out.field(indent, &format!("size:{}", volume.size_kib));
        }
        out.field(indent, &format!("read:{}", volume.read_kib));
        out.field(indent, &format!("written:{}", volume.written_kib));
        if verbose {
            out.field(indent, &format!("al-writes:{}", volume.al_writes));
            out.field(indent, &format!("bm-writes:{}", volume.bm_writes));
            out.field(indent, &format!("upper-pending:{}", volume.upper_pending));
            out.field(indent, &format!("lower-pending:{}", volume.lower_pending));
            out.field(indent, "al-suspended:no");
        }
    }
    if verbose && options.statistics {
        out.field(indent, "blocked:no");
    }
    out.end_line();
}

fn connection(out: &mut Wrapper, view: &ResourceView, single: bool, options: TextOptions) {
    let connection = &view.status.connection;
    let verbose = options.verbose;
    let connected = connection.connection == ConnState::Connected;
    let indent = 6;
    out.field(2, &connection.peer_name);
    if verbose {
        out.field(indent, &format!("node-id:{}", connection.peer_node_id));
    }
    if verbose || !connected {
        out.field(indent, &format!("connection:{}", connection.connection));
    }
    if verbose || connected {
        out.field(indent, &format!("role:{}", connection.peer_role));
    }
    if verbose {
        out.field(indent, "tls:no");
        out.field(indent, if connection.congested { "congested:yes" } else { "congested:no" });
        out.field(indent, &format!("ap-in-flight:{}", connection.ap_in_flight_sectors));
        out.field(indent, &format!("rs-in-flight:{}", connection.rs_in_flight_sectors));
    }
    out.end_line();
    if connected || verbose || options.statistics {
        for volume in &connection.peer_volumes {
            peer_device(out, volume, single, options);
        }
    }
}

fn peer_device(out: &mut Wrapper, volume: &PeerVolumeStatus, single: bool, options: TextOptions) {
    let verbose = options.verbose;
    let mut indent = 4;
    if verbose || !single {
        out.field(indent, &format!("volume:{}", volume.volume.0));
        indent = 8;
    }
    if verbose || volume.replication > ReplState::Established {
        out.field(indent, &format!("replication:{}", volume.replication));
        indent = 8;
    }
    out.field(indent, &format!("peer-disk:{}", volume.peer_disk));
    let indent = 8;
    if volume.peer_disk == DiskState::Diskless && (verbose || !options.terminal) {
        out.field(indent, "peer-client:no");
    }
    if let Some(resync) = &volume.resync {
        out.field(indent, &format!("done:{}", percent(done_ratio(resync))));
    }
    let paused = volume.suspended != "no";
    if verbose || paused {
        out.field(indent, &format!("resync-suspended:{}", volume.suspended));
    }
    if options.statistics {
        out.end_line();
        out.field(indent, &format!("received:{}", volume.received_kib));
        out.field(indent, &format!("sent:{}", volume.sent_kib));
        if verbose || volume.out_of_sync_kib > 0 {
            out.field(indent, &format!("out-of-sync:{}", volume.out_of_sync_kib));
        }
        if verbose {
            out.field(indent, &format!("pending:{}", volume.pending));
            out.field(indent, &format!("unacked:{}", volume.unacked));
        }
    }
    if verbose && let Some(resync) = &volume.resync {
        out.field(indent, &format!("dbdt1:{}", percent(mib_per_s(resync))));
        let eta = resync.eta_s.map_or_else(|| "nan".to_owned(), |seconds| seconds.to_string());
        out.field(indent, &format!("eta:{eta}"));
    }
    out.end_line();
}

/// Percent of a resync that is done, in hundredths of a percent. Blocks given up on count as done.
pub(super) fn done_ratio(resync: &ResyncStatus) -> u64 {
    let to_go = resync.bits_left.saturating_sub(resync.bits_failed);
    ratio_hundredths(resync.bits_total.saturating_sub(to_go), resync.bits_total)
}

/// `part / whole` in hundredths of a percent; 0 of nothing is 0.
pub(super) fn ratio_hundredths(part: u64, whole: u64) -> u64 {
    if whole == 0 {
        return 0;
    }
    // The quotient is at most 10000 when part <= whole, and is capped otherwise.
    u64::try_from(u128::from(part) * 10_000 / u128::from(whole)).unwrap_or(u64::MAX)
}

/// The mean rate in hundredths of a MiB/s.
pub(super) const fn mib_per_s(resync: &ResyncStatus) -> u64 {
    resync.rate_kib_s.saturating_mul(100) / 1024
}

/// A number of hundredths with two decimals.
pub(super) fn percent(hundredths: u64) -> String {
    format!("{}.{:02}", hundredths / 100, hundredths % 100)
}

pub(super) const fn yes_no(value: bool) -> &'static str {
    if value { "yes" } else { "no" }
}

fn list_or_no(words: &[String]) -> String {
    if words.is_empty() { "no".into() } else { words.join(",") }
}

/// `Own/Peer` roles, the form DRBD 8.4 prints (ADM §4.1).
#[must_use]
pub fn role_pair(view: &ResourceView) -> String {
    let connection = &view.status.connection;
    let peer =
        if connection.connection == ConnState::Connected { connection.peer_role } else { Role::Unknown };
    format!("{}/{peer}", view.status.role)
}

/// `Own/Peer` disks of one volume (ADM §4.1).
#[must_use]
pub fn disk_pair(view: &ResourceView, volume: &VolumeStatus) -> String {
    let peer = view.peer_volume(volume.volume).map_or(DiskState::DUnknown, |peer| peer.peer_disk);
    format!("{}/{peer}", volume.disk)
}

/// 8.4's combined connection state: the replication state while connected, and `WFConnection` for
/// DRBD 9's `Connecting` (ADM §4.1).
#[must_use]
pub fn combined_conn_state(view: &ResourceView) -> String {
    let connection = &view.status.connection;
    match connection.connection {
        ConnState::Connected => connection
            .peer_volumes
            .iter()
            .map(|volume| volume.replication)
            .filter(|replication| *replication > ReplState::Established)
            .max()
            .map_or_else(|| ConnState::Connected.to_string(), |replication| replication.to_string()),
        ConnState::Connecting => "WFConnection".into(),
        ConnState::StandAlone
        | ConnState::Disconnecting
        | ConnState::Unconnected
        | ConnState::Timeout
        | ConnState::BrokenPipe
        | ConnState::NetworkFailure
        | ConnState::ProtocolError
        | ConnState::TearDown => connection.connection.to_string(),
    }
}
