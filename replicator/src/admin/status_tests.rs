//! Golden texts of `status`: the examples of ADM §5.1 and the keys of §5.2, from values made by hand.
use super::status_json::status_json;
use super::status_text::{
    NOTHING_CONFIGURED, TextOptions, combined_conn_state, disk_pair, role_pair, status_text,
};
use super::view::{DeviceView, ResourceView};
use crate::core::state::{ConnState, DiskState, ReplState, Role};
use crate::core::status::{ConnectionStatus, PeerVolumeStatus, ResourceStatus, ResyncStatus, VolumeStatus};
use crate::units::VolumeNr;

fn volume(nr: u16) -> VolumeStatus {
    VolumeStatus {
        volume: VolumeNr(nr),
        disk: DiskState::UpToDate,
        size_kib: 1_048_508,
        open_count: 1,
        read_kib: 2088,
        written_kib: 0,
        al_writes: 0,
        bm_writes: 0,
        upper_pending: 0,
        lower_pending: 0,
        uuids: [4, 0, 0, 0],
        flags: 0,
    }
}

fn peer_volume(nr: u16) -> PeerVolumeStatus {
    PeerVolumeStatus {
        volume: VolumeNr(nr),
        replication: ReplState::Established,
        peer_disk: DiskState::UpToDate,
        received_kib: 0,
        sent_kib: 1_044_024,
        out_of_sync_kib: 0,
        pending: 0,
        unacked: 0,
        resync: None,
        suspended: "no".into(),
    }
}

fn device(nr: u16) -> DeviceView {
    DeviceView {
        volume: VolumeNr(nr),
        minor: nr.into(),
        backing_dev: Some(format!("/dev/sda{}", 7 + nr)),
        exports: vec![],
    }
}

/// `r0` as Primary, connected, everything UpToDate, with volumes `0..volumes`.
fn r0(volumes: u16) -> ResourceView {
    ResourceView {
        status: ResourceStatus {
            name: "r0".into(),
            node_id: 0,
            role: Role::Primary,
            suspended: vec![],
            write_ordering: "flush".into(),
            volumes: (0..volumes).map(volume).collect(),
            connection: ConnectionStatus {
                peer_name: "bravo".into(),
                peer_node_id: 1,
                connection: ConnState::Connected,
                peer_role: Role::Secondary,
                congested: false,
                ap_in_flight_sectors: 0,
                rs_in_flight_sectors: 0,
                peer_volumes: (0..volumes).map(peer_volume).collect(),
            },
            node_name: "alice".into(),
            decisions: Vec::new(),
            waiting_for: vec![],
        },
        devices: (0..volumes).map(device).collect(),
        local_addr: "10.1.1.31:7789".parse().unwrap(),
        peer_addr: "10.1.1.32:7789".parse().unwrap(),
        clients: vec![],
    }
}

fn resyncing() -> ResourceView {
    let mut view = r0(1);
    view.status.role = Role::Secondary;
    view.status.volumes[0].disk = DiskState::Inconsistent;
    view.status.volumes[0].open_count = 0;
    view.status.connection.peer_role = Role::Primary;
    let peer = &mut view.status.connection.peer_volumes[0];
    peer.replication = ReplState::SyncTarget;
    peer.out_of_sync_kib = 2500;
    peer.resync = Some(ResyncStatus {
        bits_total: 1000,
        bits_left: 625,
        bits_failed: 0,
        bits_same: 0,
        verify: false,
        paused_ms: 0,
        elapsed_ms: 2000,
        rate_kib_s: 1280,
        eta_s: Some(3),
    });
    view
}

fn disconnected() -> ResourceView {
    let mut view = r0(1);
    let connection = &mut view.status.connection;
    connection.connection = ConnState::Connecting;
    connection.peer_role = Role::Unknown;
    connection.peer_volumes[0].replication = ReplState::Off;
    connection.peer_volumes[0].peer_disk = DiskState::DUnknown;
    view
}

const PLAIN: TextOptions = TextOptions { verbose: false, statistics: false, width: 80, terminal: true };

#[test]
fn connected_and_quiet() {
    let expected =
        "r0 role:Primary\n  disk:UpToDate open:yes\n  bravo role:Secondary\n    peer-disk:UpToDate\n\n";
    assert_eq!(status_text(&[r0(1)], PLAIN), expected);
    assert_eq!(status_text(&[r0(1), r0(1)], PLAIN), expected.repeat(2));
}

#[test]
fn resync_shows_how_far_it_is() {
    assert_eq!(
        status_text(&[resyncing()], PLAIN),
        "r0 role:Secondary\n  disk:Inconsistent open:no\n  bravo role:Primary\n    \
         replication:SyncTarget peer-disk:UpToDate done:37.50\n\n"
    );
    let verbose = status_text(&[resyncing()], TextOptions { verbose: true, ..PLAIN });
    assert!(verbose.ends_with("done:37.50\n        resync-suspended:no dbdt1:1.25 eta:3\n\n"), "{verbose}");
}

#[test]
fn disconnected_says_so_and_nothing_of_the_peer() {
    assert_eq!(
        status_text(&[disconnected()], PLAIN),
        "r0 role:Primary\n  disk:UpToDate open:yes\n  bravo connection:Connecting\n\n"
    );
}

#[test]
fn several_volumes_are_numbered() {
    assert_eq!(
        status_text(&[r0(2)], PLAIN),
        "r0 role:Primary\n  volume:0 disk:UpToDate open:yes\n  volume:1 disk:UpToDate open:yes\n  \
         bravo role:Secondary\n    volume:0 peer-disk:UpToDate\n    volume:1 peer-disk:UpToDate\n\n"
    );
}

#[test]
fn verbose_with_statistics_is_the_sheets_example() {
    let options = TextOptions { verbose: true, statistics: true, width: 104, terminal: true };
    let expected = "\
r0 node-id:0 role:Primary suspended:no force-io-failures:no
    write-ordering:flush
  volume:0 minor:0 disk:UpToDate backing_dev:/dev/sda7 quorum:yes open:yes
      size:1048508 read:2088 written:0 al-writes:0 bm-writes:0 upper-pending:0 lower-pending:0
      al-suspended:no blocked:no
  bravo node-id:1 connection:Connected role:Secondary tls:no congested:no ap-in-flight:0 rs-in-flight:0
    volume:0 replication:Established peer-disk:UpToDate resync-suspended:no
        received:0 sent:1044024 out-of-sync:0 pending:0 unacked:0

";
    assert_eq!(status_text(&[r0(1)], options), expected);
    let narrow = status_text(&[r0(1)], TextOptions { width: 80, ..options });
    assert!(narrow.lines().all(|line| line.len() <= 80), "{narrow}");
    let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(words(&narrow), words(expected));
}

#[test]
fn what_is_wrong_shows_without_verbose() {
    let mut view = r0(1);
    view.status.suspended = vec!["user".into(), "fencing".into()];
    view.status.volumes[0].disk = DiskState::Diskless;
    view.status.connection.peer_volumes[0].replication = ReplState::PausedSyncS;
    view.status.connection.peer_volumes[0].suspended = "user".into();
    let text = status_text(&[view], TextOptions { terminal: false, ..PLAIN });
    assert_eq!(
        text,
        "r0 role:Primary suspended:user,fencing\n  disk:Diskless client:no open:yes\n  bravo role:Secondary\n    \
         replication:PausedSyncS peer-disk:UpToDate resync-suspended:user\n\n"
    );
}

#[test]
fn nothing_up_is_not_an_error() {
    assert_eq!(status_text(&[], PLAIN), NOTHING_CONFIGURED);
    assert_eq!(status_json(&[]), "[\n]\n\n");
}

#[test]
fn the_two_sided_forms() {
    assert_eq!(role_pair(&r0(1)), "Primary/Secondary");
    assert_eq!(role_pair(&disconnected()), "Primary/Unknown");
    assert_eq!(disk_pair(&r0(1), &volume(0)), "UpToDate/UpToDate");
    assert_eq!(disk_pair(&disconnected(), &volume(0)), "UpToDate/DUnknown");
    assert_eq!(combined_conn_state(&r0(1)), "Connected");
    assert_eq!(combined_conn_state(&resyncing()), "SyncTarget");
    assert_eq!(combined_conn_state(&disconnected()), "WFConnection");
}

#[test]
fn json_has_drbdsetups_keys() {
    let text = status_json(&[r0(1)]);
    let expected = r#"[
{
  "name": "r0",
  "node-id": 0,
  "role": "Primary",
  "suspended": false,
  "suspended-user": false,
  "suspended-no-data": false,
  "suspended-fencing": false,
  "suspended-quorum": false,
  "force-io-failures": false,
  "write-ordering": "flush",
  "devices": [
    {
      "volume": 0,
      "minor": 0,
      "disk-state": "UpToDate",
      "client": false,
      "open": true,
      "quorum": true,
      "size": 1048508,
      "read": 2088,
      "written": 0,
      "al-writes": 0,
      "bm-writes": 0,
      "upper-pending": 0,
      "lower-pending": 0
    }
  ],
  "connections": [
    {
      "peer-node-id": 1,
      "name": "bravo",
      "connection-state": "Connected",
      "congested": false,
      "peer-role": "Secondary",
      "tls": false,
      "ap-in-flight": 0,
      "rs-in-flight": 0,
      "paths": [
        {
          "this_host": {
            "address": "10.1.1.31",
            "port": 7789,
            "family": "ipv4"
          },
          "remote_host": {
            "address": "10.1.1.32",
            "port": 7789,
            "family": "ipv4"
          },
          "established": true
        }
      ],
      "peer_devices": [
        {
          "volume": 0,
          "replication-state": "Established",
          "peer-disk-state": "UpToDate",
          "peer-client": false,
          "resync-suspended": "no",
          "received": 0,
          "sent": 1044024,
          "out-of-sync": 0,
          "pending": 0,
          "unacked": 0,
          "has-sync-details": false,
          "has-online-verify-details": false,
          "percent-in-sync": 100.00,
          "percent-resync-done": 100.00
        }
      ]
    }
  ]
}
]

"#;
    assert_eq!(text, expected);
}

#[test]
fn json_of_a_resync_has_its_details() {
    let value: serde_json::Value = serde_json::from_str(&status_json(&[resyncing(), r0(2)])).unwrap();
    assert_eq!(value.as_array().unwrap().len(), 2);
    let peer = &value[0]["connections"][0]["peer_devices"][0];
    assert_eq!(peer["has-sync-details"], true);
    assert_eq!(peer["rs-total"], 8000);
    assert_eq!(peer["rs-db0-sectors"], 3000);
    assert_eq!(peer["percent-resync-done"], 37.5);
    assert_eq!(peer["percent-in-sync"], 99.76);
    assert_eq!(peer["db1/dt1 [MiB/s]"], 1.25);
    assert_eq!(peer["estimated-seconds-to-finish"], 3);
    assert_eq!(value[1]["devices"][1]["minor"], 1);
}

#[test]
fn names_are_escaped() {
    let mut view = r0(1);
    view.status.connection.peer_name = "a\"b\\\n".into();
    let value: serde_json::Value = serde_json::from_str(&status_json(&[view])).unwrap();
    assert_eq!(value[0]["connections"][0]["name"], "a\"b\\\n");
}
