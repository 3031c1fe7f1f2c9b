//! Every option of the language, once: type, unit, default, range, age, and what lockstep makes of it (ADM §2).
use super::options::{Kind, OptionSpec, Section, Since, Treatment, Unit};
use Section::{Disk, Global, Handlers, Lockstep, Net, Options, PeerDevice, Proxy, Startup};
use Since::{V8, V8Only, V9};
use Treatment::{AcceptedWithoutMeaning, Known, Used};

const fn number(unit: Unit, default: u64, min: u64, max: u64) -> Kind {
    Kind::Number { unit, default, min, max }
}

const fn boolean(default: bool) -> Kind {
    Kind::Bool { default }
}

/// `CONSTANT: section, name, type, since, treatment;` makes one constant each and the table of all.
macro_rules! options {
    ($($id:ident: $section:expr, $name:literal, $kind:expr, $since:expr, $treatment:expr;)*) => {
        $(
            #[doc = concat!("`", $name, "`")]
            pub static $id: OptionSpec =
                OptionSpec { name: $name, section: $section, kind: $kind, since: $since, treatment: $treatment };
        )*
        /// All options.
        pub static ALL: &[&OptionSpec] = &[$(&$id),*];
    };
}

options! {
    USAGE_COUNT: Global, "usage-count",
        Kind::Choice { values: &["yes", "no", "ask"], default: "ask" },
        V8, Known;
    DIALOG_REFRESH: Global, "dialog-refresh", number(Unit::Seconds, 1, 0, 600), V8, Known;
    MINOR_COUNT: Global, "minor-count",
        number(Unit::Count, 32, 1, 255),
        V8, AcceptedWithoutMeaning("there is no kernel module to size");
    DISABLE_IP_VERIFICATION: Global, "disable-ip-verification", boolean(false), V8, Known;
    UDEV_ALWAYS_USE_VNR: Global, "udev-always-use-vnr", boolean(false), V8, Known;
    CMD_TIMEOUT_SHORT: Global, "cmd-timeout-short", number(Unit::Seconds, 5, 0, 900), V8, Known;
    CMD_TIMEOUT_MEDIUM: Global, "cmd-timeout-medium", number(Unit::Seconds, 121, 0, 900), V8, Known;
    CMD_TIMEOUT_LONG: Global, "cmd-timeout-long", number(Unit::Seconds, 600, 0, 900), V8, Known;
    PROTOCOL: Net, "protocol", Kind::Choice { values: &["A", "B", "C"], default: "C" }, V8, Used;
    TIMEOUT: Net, "timeout", number(Unit::Deciseconds, 60, 1, 600), V8, Used;
    MAX_EPOCH_SIZE: Net, "max-epoch-size", number(Unit::Count, 2048, 1, 20000), V8, Used;
    MAX_BUFFERS: Net, "max-buffers",
        number(Unit::Count, 2048, 32, 131072),
        V8, Used;
    CONNECT_INT: Net, "connect-int", number(Unit::Seconds, 10, 1, 120), V8, Used;
    PING_INT: Net, "ping-int", number(Unit::Seconds, 10, 1, 120), V8, Used;
    PING_TIMEOUT: Net, "ping-timeout", number(Unit::Deciseconds, 5, 1, 300), V8, Used;
    SNDBUF_SIZE: Net, "sndbuf-size", number(Unit::Bytes, 0, 0, 134217728), V8, Known;
    RCVBUF_SIZE: Net, "rcvbuf-size", number(Unit::Bytes, 0, 0, 134217728), V8, Known;
    KO_COUNT: Net, "ko-count", number(Unit::Count, 7, 0, 200), V8, Used;
    ALLOW_TWO_PRIMARIES: Net, "allow-two-primaries", boolean(false), V8, Used;
    CRAM_HMAC_ALG: Net, "cram-hmac-alg", Kind::Text { max_len: 63 }, V8, Known;
    SHARED_SECRET: Net, "shared-secret", Kind::Text { max_len: 63 }, V8, Known;
    AFTER_SB_0PRI: Net, "after-sb-0pri",
        Kind::Choice { values: &["disconnect", "discard-younger-primary", "discard-older-primary",
            "discard-zero-changes", "discard-least-changes", "discard-local", "discard-remote"],
            default: "disconnect" },
        V8, Used;
    AFTER_SB_1PRI: Net, "after-sb-1pri",
        Kind::Choice { values: &["disconnect", "consensus", "discard-secondary",
            "call-pri-lost-after-sb", "violently-as0p"], default: "disconnect" },
        V8, Used;
    AFTER_SB_2PRI: Net, "after-sb-2pri",
        Kind::Choice { values: &["disconnect", "call-pri-lost-after-sb", "violently-as0p"],
            default: "disconnect" },
        V8, Used;
    ALWAYS_ASBP: Net, "always-asbp", boolean(false), V8, Used;
    RR_CONFLICT: Net, "rr-conflict",
        Kind::Choice { values: &["disconnect", "call-pri-lost", "violently", "retry-connect",
            "auto-discard"], default: "disconnect" },
        V8, Used;
    DATA_INTEGRITY_ALG: Net, "data-integrity-alg",
        Kind::Text { max_len: 63 },
        V8, Used;
    TCP_CORK: Net, "tcp-cork", boolean(true), V8, Known;
    ON_CONGESTION: Net, "on-congestion",
        Kind::Choice { values: &["block", "pull-ahead", "disconnect"], default: "block" },
        V8, Used;
    CONGESTION_FILL: Net, "congestion-fill", number(Unit::Sectors, 0, 0, 20971520), V8, Used;
    CONGESTION_EXTENTS: Net, "congestion-extents", number(Unit::Count, 1237, 67, 65534), V8, Used;
    CSUMS_ALG: Net, "csums-alg", Kind::Text { max_len: 63 }, V8, Used;
    CSUMS_AFTER_CRASH_ONLY: Net, "csums-after-crash-only", boolean(false), V8, Used;
    VERIFY_ALG: Net, "verify-alg", Kind::Text { max_len: 63 }, V8, Used;
    USE_RLE: Net, "use-rle", boolean(true), V8, AcceptedWithoutMeaning("bitmaps travel as whole pages");
    SOCKET_CHECK_TIMEOUT: Net, "socket-check-timeout", number(Unit::Deciseconds, 0, 0, 300), V8, Known;
    FENCING: Net, "fencing",
        Kind::Choice { values: &["dont-care", "resource-only", "resource-and-stonith"],
            default: "dont-care" },
        V8, Used;
    ALLOW_REMOTE_READ: Net, "allow-remote-read", boolean(true), V9, Known;
    TLS: Net, "tls", boolean(false), V9, Known;
    TLS_KEYRING: Net, "tls-keyring",
        number(Unit::Count, 0, 0, 2147483647),
        V9, AcceptedWithoutMeaning("TLS keys do not come from the kernel keyring here");
    TLS_PRIVKEY: Net, "tls-privkey",
        number(Unit::Count, 0, 0, 2147483647),
        V9, AcceptedWithoutMeaning("TLS keys do not come from the kernel keyring here");
    TLS_CERTIFICATE: Net, "tls-certificate",
        number(Unit::Count, 0, 0, 2147483647),
        V9, AcceptedWithoutMeaning("TLS keys do not come from the kernel keyring here");
    TRANSPORT: Net, "transport",
        Kind::Text { max_len: 63 },
        V9, AcceptedWithoutMeaning("the transport is always TCP");
    LOAD_BALANCE_PATHS: Net, "load-balance-paths",
        boolean(false),
        V9, AcceptedWithoutMeaning("the transport is always TCP");
    RDMA_CTRL_RCVBUF_SIZE: Net, "rdma-ctrl-rcvbuf-size",
        number(Unit::Bytes, 0, 0, 10485760),
        V9, AcceptedWithoutMeaning("the transport is always TCP");
    RDMA_CTRL_SNDBUF_SIZE: Net, "rdma-ctrl-sndbuf-size",
        number(Unit::Bytes, 0, 0, 10485760),
        V9, AcceptedWithoutMeaning("the transport is always TCP");
    DISCARD_MY_DATA: Net, "discard-my-data",
        boolean(false),
        V8, AcceptedWithoutMeaning("it is an option of the connect command");
    TENTATIVE: Net, "tentative",
        boolean(false),
        V8, AcceptedWithoutMeaning("it is an option of the connect command");
    UNPLUG_WATERMARK: Net, "unplug-watermark",
        number(Unit::Count, 128, 1, 131072),
        V8Only, AcceptedWithoutMeaning("later versions ignore it too");
    SIZE: Disk, "size", number(Unit::Sectors, 0, 0, 2199023255552), V8, Used;
    ON_IO_ERROR: Disk, "on-io-error",
        Kind::Choice { values: &["pass_on", "call-local-io-error", "detach"], default: "detach" },
        V8, Used;
    DISK_BARRIER: Disk, "disk-barrier",
        boolean(false),
        V8, AcceptedWithoutMeaning("the kernel has no barrier requests any more; flushes are used");
    DISK_FLUSHES: Disk, "disk-flushes", boolean(true), V8, Used;
    DISK_DRAIN: Disk, "disk-drain", boolean(true), V8, Used;
    MD_FLUSHES: Disk, "md-flushes", boolean(true), V8, Known;
    RESYNC_AFTER: Disk, "resync-after", Kind::ResourceRef, V8, Used;
    AL_EXTENTS: Disk, "al-extents", number(Unit::Count, 1237, 67, 65534), V8, Used;
    AL_UPDATES: Disk, "al-updates", boolean(true), V8, Used;
    DISCARD_ZEROES_IF_ALIGNED: Disk, "discard-zeroes-if-aligned", boolean(true), V8, Known;
    DISABLE_WRITE_SAME: Disk, "disable-write-same",
        boolean(false),
        V8, AcceptedWithoutMeaning("there is no write-same request");
    DISK_TIMEOUT: Disk, "disk-timeout", number(Unit::Deciseconds, 0, 0, 6000), V8, Used;
    READ_BALANCING: Disk, "read-balancing",
        Kind::Choice { values: &["prefer-local", "prefer-remote", "round-robin", "least-pending",
            "when-congested-remote", "32K-striping", "64K-striping", "128K-striping", "256K-striping",
            "512K-striping", "1M-striping"], default: "prefer-local" },
        V8, Known;
    RS_DISCARD_GRANULARITY: Disk, "rs-discard-granularity", number(Unit::Bytes, 0, 0, 1048576), V8, Used;
    MAX_BIO_BVECS: Disk, "max-bio-bvecs",
        number(Unit::Count, 0, 0, 128),
        V8Only, AcceptedWithoutMeaning("there are no kernel requests to limit");
    MAX_BIO_SIZE: Disk, "max-bio-size", number(Unit::Bytes, 1048576, 512, 1048576), V9, Known;
    BLOCK_SIZE: Disk, "block-size", number(Unit::Bytes, 512, 512, 4096), V9, Known;
    DISCARD_GRANULARITY: Disk, "discard-granularity", number(Unit::Bytes, 0, 0, 134217728), V9, Known;
    DISKLESS: Disk, "diskless", boolean(false), V9, Known;
    RESYNC_RATE: PeerDevice, "resync-rate", number(Unit::KibPerSecond, 250, 1, 8388608), V8, Used;
    C_PLAN_AHEAD: PeerDevice, "c-plan-ahead", number(Unit::Deciseconds, 20, 0, 300), V8, Used;
    C_DELAY_TARGET: PeerDevice, "c-delay-target", number(Unit::Deciseconds, 10, 1, 100), V8, Used;
    C_FILL_TARGET: PeerDevice, "c-fill-target", number(Unit::Sectors, 100, 0, 1048576), V8, Used;
    C_MAX_RATE: PeerDevice, "c-max-rate", number(Unit::KibPerSecond, 102400, 0, 4194304), V8, Used;
    C_MIN_RATE: PeerDevice, "c-min-rate", number(Unit::KibPerSecond, 250, 0, 4194304), V8, Used;
    BITMAP: PeerDevice, "bitmap", boolean(true), V9, Known;
    RESYNC_WITHOUT_REPLICATION: PeerDevice, "resync-without-replication", boolean(true), V9, Known;
    PEER_TIEBREAKER: PeerDevice, "peer-tiebreaker", boolean(true), V9, Known;
    CPU_MASK: Options, "cpu-mask", Kind::Text { max_len: 255 }, V8, Known;
    ON_NO_DATA_ACCESSIBLE: Options, "on-no-data-accessible",
        Kind::Choice { values: &["io-error", "suspend-io"], default: "io-error" },
        V8, Used;
    AUTO_PROMOTE: Options, "auto-promote", boolean(true), V9, Known;
    AUTO_PROMOTE_TIMEOUT: Options, "auto-promote-timeout", number(Unit::Deciseconds, 20, 0, 600), V9, Known;
    PEER_ACK_WINDOW: Options, "peer-ack-window",
        number(Unit::Sectors, 4096, 2048, 204800),
        V9, AcceptedWithoutMeaning("acknowledgements between peers are a matter of three and more nodes");
    PEER_ACK_DELAY: Options, "peer-ack-delay",
        number(Unit::Milliseconds, 100, 1, 10000),
        V9, AcceptedWithoutMeaning("acknowledgements between peers are a matter of three and more nodes");
    TWOPC_TIMEOUT: Options, "twopc-timeout", number(Unit::Deciseconds, 300, 50, 600), V9, Known;
    TWOPC_RETRY_TIMEOUT: Options, "twopc-retry-timeout", number(Unit::Deciseconds, 1, 1, 50), V9, Known;
    MAX_IO_DEPTH: Options, "max-io-depth", number(Unit::Count, 8000, 4, 4294967295), V9, Known;
    QUORUM: Options, "quorum", Kind::Quorum, V9, Known;
    ON_NO_QUORUM: Options, "on-no-quorum",
        Kind::Choice { values: &["io-error", "suspend-io"], default: "suspend-io" },
        V9, Known;
    QUORUM_MINIMUM_REDUNDANCY: Options, "quorum-minimum-redundancy", Kind::Quorum, V9, Known;
    ON_SUSPENDED_PRIMARY_OUTDATED: Options, "on-suspended-primary-outdated",
        Kind::Choice { values: &["disconnect", "force-secondary"], default: "disconnect" },
        V9, Known;
    DRBD8_API_COMPATIBILITY: Options, "drbd8-api-compatibility",
        boolean(false),
        V9, AcceptedWithoutMeaning("there is no kernel interface");
    WFC_TIMEOUT: Startup, "wfc-timeout", number(Unit::Seconds, 0, 0, 300000), V8, Known;
    DEGR_WFC_TIMEOUT: Startup, "degr-wfc-timeout", number(Unit::Seconds, 0, 0, 300000), V8, Known;
    OUTDATED_WFC_TIMEOUT: Startup, "outdated-wfc-timeout", number(Unit::Seconds, 0, 0, 300000), V8, Known;
    WAIT_AFTER_SB: Startup, "wait-after-sb", boolean(false), V8, Known;
    BECOME_PRIMARY_ON: Startup, "become-primary-on",
        Kind::Words,
        V8Only, AcceptedWithoutMeaning("the cluster manager or the operator promotes");
    STACKED_TIMEOUTS: Startup, "stacked-timeouts",
        boolean(false),
        V8Only, AcceptedWithoutMeaning("stacked resources have no timeouts of their own");
    PRI_ON_INCON_DEGR: Handlers, "pri-on-incon-degr", Kind::Text { max_len: 255 }, V8, Known;
    PRI_LOST_AFTER_SB: Handlers, "pri-lost-after-sb", Kind::Text { max_len: 255 }, V8, Known;
    PRI_LOST: Handlers, "pri-lost", Kind::Text { max_len: 255 }, V8, Known;
    INITIAL_SPLIT_BRAIN: Handlers, "initial-split-brain", Kind::Text { max_len: 255 }, V8, Known;
    SPLIT_BRAIN: Handlers, "split-brain", Kind::Text { max_len: 255 }, V8, Known;
    FENCE_PEER: Handlers, "fence-peer", Kind::Text { max_len: 255 }, V8, Known;
    UNFENCE_PEER: Handlers, "unfence-peer", Kind::Text { max_len: 255 }, V9, Known;
    LOCAL_IO_ERROR: Handlers, "local-io-error", Kind::Text { max_len: 255 }, V8, Known;
    BEFORE_RESYNC_TARGET: Handlers, "before-resync-target", Kind::Text { max_len: 255 }, V8, Used;
    AFTER_RESYNC_TARGET: Handlers, "after-resync-target", Kind::Text { max_len: 255 }, V8, Used;
    BEFORE_RESYNC_SOURCE: Handlers, "before-resync-source", Kind::Text { max_len: 255 }, V8, Used;
    OUT_OF_SYNC: Handlers, "out-of-sync", Kind::Text { max_len: 255 }, V8, Used;
    QUORUM_LOST: Handlers, "quorum-lost", Kind::Text { max_len: 255 }, V9, Known;
    DISCONNECTED: Handlers, "disconnected", Kind::Text { max_len: 255 }, V9, Known;
    PROXY_MEMLIMIT: Proxy, "memlimit",
        Kind::Words,
        V8, AcceptedWithoutMeaning("the WAN proxy is not part of lockstep");
    PROXY_READ_LOOPS: Proxy, "read-loops",
        Kind::Words,
        V8, AcceptedWithoutMeaning("the WAN proxy is not part of lockstep");
    PROXY_COMPRESSION: Proxy, "compression",
        Kind::Words,
        V8, AcceptedWithoutMeaning("the WAN proxy is not part of lockstep");
    PROXY_BWLIMIT: Proxy, "bwlimit",
        Kind::Words,
        V8, AcceptedWithoutMeaning("the WAN proxy is not part of lockstep");
    PROXY_SNDBUF_SIZE: Proxy, "sndbuf-size",
        Kind::Words,
        V8, AcceptedWithoutMeaning("the WAN proxy is not part of lockstep");
    PROXY_RCVBUF_SIZE: Proxy, "rcvbuf-size",
        Kind::Words,
        V8, AcceptedWithoutMeaning("the WAN proxy is not part of lockstep");
    PROXY_PING_TIMEOUT: Proxy, "ping-timeout",
        Kind::Words,
        V8, AcceptedWithoutMeaning("the WAN proxy is not part of lockstep");
    NBD_LISTEN: Lockstep, "nbd-listen", Kind::Text { max_len: 128 }, Since::Lockstep, Used;
    NBD_SOCKET: Lockstep, "nbd-socket", Kind::Text { max_len: 107 }, Since::Lockstep, Used;
    FRONT_END: Lockstep, "front-end",
        Kind::Choice { values: &["auto", "ublk", "nbd"], default: "auto" },
        Since::Lockstep, Used;
    SPIN_US: Lockstep, "spin-us", number(Unit::Microseconds, 50, 0, 1000), Since::Lockstep, Used;
    SUSPEND_LEASE: Lockstep, "suspend-lease", number(Unit::Seconds, 120, 0, 86400), Since::Lockstep, Used;
}

/// Names that older versions used, and what they are called now.
pub const ALIASES: &[(&str, &str)] =
    &[("rate", "resync-rate"), ("after", "resync-after"), ("outdate-peer", "fence-peer")];

/// The option of that name in one of the sections.
#[must_use]
pub fn find(sections: &[Section], name: &str) -> Option<&'static OptionSpec> {
    ALL.iter().copied().find(|o| o.name == name && sections.contains(&o.section))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_default_is_in_range_and_every_name_is_unique_in_its_section() {
        for (i, o) in ALL.iter().enumerate() {
            assert!(ALL[..i].iter().all(|p| p.name != o.name || p.section != o.section), "{} twice", o.name);
            match o.kind {
                Kind::Number { default, min, max, .. } => {
                    assert!(min <= max && (min..=max).contains(&default), "{}", o.name);
                }
                Kind::Choice { values, default } => assert!(values.contains(&default), "{}", o.name),
                _ => {}
            }
        }
    }
}
