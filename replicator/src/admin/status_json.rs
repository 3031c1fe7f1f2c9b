//! `status --json`, with drbdsetup's keys in drbdsetup's order (ADM §5.2).
//!
//! Written by hand: the order of the keys and the number of decimals are part of what programs read.
use crate::admin::status_text::{done_ratio, mib_per_s, percent, ratio_hundredths};
use crate::admin::view::ResourceView;
use crate::core::state::DiskState;
use crate::core::status::{PeerVolumeStatus, VolumeStatus};
use std::net::SocketAddr;

/// What DRBD reports as the time left of a resync that stands still, seconds.
const NEVER_SECONDS: u64 = 987_654_321;

/// An array with one object per resource.
#[must_use]
pub fn status_json(views: &[ResourceView]) -> String {
    let objects: Vec<String> = views.iter().map(|view| resource(view).render(0)).collect();
    format!("[\n{}{}]\n\n", objects.join(",\n"), if objects.is_empty() { "" } else { "\n" })
}

/// A value that keeps the order of its keys and the digits of its numbers.
enum Json {
    /// Digits, `true`, `false`: as they are.
    Raw(String),
    Text(String),
    List(Vec<Self>),
    Object(Vec<(&'static str, Self)>),
}

impl Json {
    #[expect(
        clippy::needless_pass_by_value,
        reason = "numbers are copied, and callers read better without &"
    )]
    fn number(value: impl ToString) -> Self {
        Self::Raw(value.to_string())
    }

    #[expect(clippy::needless_pass_by_value, reason = "states are copied, and callers read better without &")]
    fn text(value: impl ToString) -> Self {
        Self::Text(value.to_string())
    }

    const fn hundredths(value: u64) -> Hundredths {
        Hundredths(value)
    }

    fn render(&self, depth: usize) -> String {
        let pad = "  ".repeat(depth);
        match self {
            Self::Raw(digits) => digits.clone(),
            Self::Text(text) => serde_json::Value::from(text.as_str()).to_string(),
            Self::List(items) if items.is_empty() => "[]".into(),
            Self::List(items) => {
                let items: Vec<String> =
                    items.iter().map(|item| format!("{pad}  {}", item.render(depth + 1))).collect();
                format!("[\n{}\n{pad}]", items.join(",\n"))
            }
            Self::Object(fields) => {
                let fields: Vec<String> = fields
                    .iter()
                    .map(|(key, value)| format!("{pad}  \"{key}\": {}", value.render(depth + 1)))
                    .collect();
                format!("{{\n{}\n{pad}}}", fields.join(",\n"))
            }
        }
    }
}

/// A number with two decimals.
struct Hundredths(u64);

impl From<Hundredths> for Json {
    fn from(value: Hundredths) -> Self {
        Self::Raw(percent(value.0))
    }
}

fn resource(view: &ResourceView) -> Json {
    let status = &view.status;
    let suspended = |why: &str| Json::number(status.suspended.iter().any(|word| word == why));
    let devices = status.volumes.iter().map(|volume| device(view, volume)).collect();
    Json::Object(vec![
        ("name", Json::text(&status.name)),
        ("node-id", Json::number(status.node_id)),
        ("role", Json::text(status.role)),
        ("suspended", Json::number(!status.suspended.is_empty())),
        ("suspended-user", suspended("user")),
        ("suspended-no-data", suspended("no-data")),
        ("suspended-fencing", suspended("fencing")),
        ("suspended-quorum", suspended("quorum")),
        ("force-io-failures", Json::number(false)),
        ("write-ordering", Json::text(&status.write_ordering)),
        ("devices", Json::List(devices)),
        ("connections", Json::List(vec![connection(view)])),
    ])
}

fn device(view: &ResourceView, volume: &VolumeStatus) -> Json {
    let config = view.device(volume.volume);
    let client =
        volume.disk == DiskState::Diskless && config.is_some_and(|config| config.backing_dev.is_none());
    Json::Object(vec![
        ("volume", Json::number(volume.volume.0)),
        ("minor", config.map_or_else(|| Json::number(-1), |config| Json::number(config.minor))),
        ("disk-state", Json::text(volume.disk)),
        ("client", Json::number(client)),
        ("open", Json::number(volume.open_count > 0)),
        ("quorum", Json::number(true)),
        ("size", Json::number(volume.size_kib)),
        ("read", Json::number(volume.read_kib)),
        ("written", Json::number(volume.written_kib)),
        ("al-writes", Json::number(volume.al_writes)),
        ("bm-writes", Json::number(volume.bm_writes)),
        ("upper-pending", Json::number(volume.upper_pending)),
        ("lower-pending", Json::number(volume.lower_pending)),
    ])
}

fn connection(view: &ResourceView) -> Json {
    let connection = &view.status.connection;
    let established = connection.connection == crate::core::state::ConnState::Connected;
    let path = Json::Object(vec![
        ("this_host", address(view.local_addr)),
        ("remote_host", address(view.peer_addr)),
        ("established", Json::number(established)),
    ]);
    let peers = connection.peer_volumes.iter().map(|volume| peer_device(view, volume)).collect();
    Json::Object(vec![
        ("peer-node-id", Json::number(connection.peer_node_id)),
        ("name", Json::text(&connection.peer_name)),
        ("connection-state", Json::text(connection.connection)),
        ("congested", Json::number(connection.congested)),
        ("peer-role", Json::text(connection.peer_role)),
        ("tls", Json::number(false)),
        ("ap-in-flight", Json::number(connection.ap_in_flight_sectors)),
        ("rs-in-flight", Json::number(connection.rs_in_flight_sectors)),
        ("paths", Json::List(vec![path])),
        ("peer_devices", Json::List(peers)),
    ])
}

fn address(address: SocketAddr) -> Json {
    Json::Object(vec![
        ("address", Json::text(address.ip())),
        ("port", Json::number(address.port())),
        ("family", Json::text(if address.is_ipv4() { "ipv4" } else { "ipv6" })),
    ])
}

fn peer_device(view: &ResourceView, volume: &PeerVolumeStatus) -> Json {
    let size_kib = view.volume(volume.volume).map_or(0, |own| own.size_kib);
    let in_sync = ratio_hundredths(size_kib.saturating_sub(volume.out_of_sync_kib), size_kib);
    let mut fields = vec![
        ("volume", Json::number(volume.volume.0)),
        ("replication-state", Json::text(volume.replication)),
        ("peer-disk-state", Json::text(volume.peer_disk)),
        ("peer-client", Json::number(false)),
        ("resync-suspended", Json::text(&volume.suspended)),
        ("received", Json::number(volume.received_kib)),
        ("sent", Json::number(volume.sent_kib)),
        ("out-of-sync", Json::number(volume.out_of_sync_kib)),
        ("pending", Json::number(volume.pending)),
        ("unacked", Json::number(volume.unacked)),
        ("has-sync-details", Json::number(volume.resync.as_ref().is_some_and(|resync| !resync.verify))),
        (
            "has-online-verify-details",
            Json::number(volume.resync.as_ref().is_some_and(|resync| resync.verify)),
        ),
        ("percent-in-sync", Json::hundredths(in_sync).into()),
    ];
    let done = volume.resync.as_ref().map(|resync| {
        let sectors = |bits: u64| bits.saturating_mul(crate::units::SECTORS_PER_BIT);
        let done_bits = resync.bits_total.saturating_sub(resync.bits_left.saturating_sub(resync.bits_failed));
        // One interval, from the start until now: the mean rate is what the core keeps.
        fields.extend([
            ("rs-total", Json::number(sectors(resync.bits_total))),
            ("rs-dt-start-ms", Json::number(resync.elapsed_ms)),
            ("rs-paused-ms", Json::number(resync.paused_ms)),
            ("rs-dt0-ms", Json::number(resync.elapsed_ms)),
            ("rs-db0-sectors", Json::number(sectors(done_bits))),
            ("rs-dt1-ms", Json::number(resync.elapsed_ms)),
            ("rs-db1-sectors", Json::number(sectors(done_bits))),
            ("rs-failed", Json::number(sectors(resync.bits_failed))),
            ("rs-same-csum", Json::number(sectors(resync.bits_same))),
            ("want", Json::hundredths(0).into()),
            ("db0/dt0 [MiB/s]", Json::hundredths(mib_per_s(resync)).into()),
            ("db1/dt1 [MiB/s]", Json::hundredths(mib_per_s(resync)).into()),
            ("db/dt [MiB/s]", Json::hundredths(mib_per_s(resync)).into()),
            ("estimated-seconds-to-finish", Json::number(resync.eta_s.unwrap_or(NEVER_SECONDS))),
        ]);
        done_ratio(resync)
    });
    fields.push(("percent-resync-done", Json::hundredths(done.unwrap_or(in_sync)).into()));
    Json::Object(fields)
}
