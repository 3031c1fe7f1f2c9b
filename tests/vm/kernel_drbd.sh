# shellcheck shell=bash
# The kernel's DRBD 8.4 as a yardstick, sourced after lib.sh: single devices, and a pair of
# nodes within one VM.
#
# Debian's drbdsetup serves both generations of the module. Names of resources are free,
# minors are ours to choose; 8.4 takes a minor where 9 takes a resource.

# The program that writes metadata; a test of lockstep's own sets this to lockstep's.
DRBDMETA=${DRBDMETA:-drbdmeta}

kernel_drbd_load() {
    # Its helper would be drbdadm, which knows nothing of our resources, and whose failure ends a resync.
    [[ -e /proc/drbd ]] || modprobe drbd usermode_helper=/bin/true &>/dev/null || skip "this kernel has no drbd module"
    # Where the tools keep their locks.
    mkdir -p /var/lib/drbd /run/lock /run/drbd
}

# kernel_create_md MINOR DISK
kernel_create_md() { within 60 "$DRBDMETA" --force "$1" v08 "$2" internal create-md </dev/null >/dev/null; }

# kernel_attach RES MINOR DISK [OPTIONS…]: what `drbdadm up` does before it connects.
kernel_attach() {
    [[ -n $(drbdsetup show "$1" 2>/dev/null) ]] || within 30 drbdsetup new-resource "$1"
    within 30 drbdsetup new-minor "$1" "$2" 0
    within 30 drbdmeta "$2" v08 "$3" internal apply-al
    within 30 drbdsetup attach "$2" "$3" "$3" internal "${@:4}"
}

# kernel_connect RES LOCAL_PORT PEER_PORT [OPTIONS…]
kernel_connect() {
    within 30 drbdsetup connect "$1" "ipv4:127.0.0.1:$2" "ipv4:127.0.0.1:$3" "--protocol=${KERNEL_PROTOCOL:-C}" "${@:4}"
}

# The line of /proc/drbd for a minor, and single values of it: cs, ro, ds; oos is in KiB.
kernel_state() { grep -A1 "^ *$1: cs:" /proc/drbd | tr '\n' ' '; }
kernel_field() { kernel_state "$1" | sed -n "s/.* $2:\([^ ]*\).*/\1/p"; }

# The UUIDs of an attached minor, from the kernel: current:bitmap:history:history:flags
kernel_gi() { within 30 drbdsetup get-gi "$1" | tail -1; }

# The first four fields of an identifier line. Bit 0 of the current UUID only says "is Primary just
# now", and is shown differently before and after an attach.
uuids_of() { cut -d: -f1-4 <<<"$1"; }
without_primary_mark() {
    printf '%016X:%s\n' $((0x$(cut -d: -f1 <<<"$1") & ~1)) "$(cut -d: -f2-4 <<<"$1")"
}

# kernel_pair DISK_A DISK_B: resources r1 and r2, minors 1 and 2, connected and clean.
kernel_pair() {
    kernel_create_md 1 "$1"
    kernel_create_md 2 "$2"
    kernel_attach r1 1 "$1"
    kernel_attach r2 2 "$2"
    kernel_connect r1 7001 7002
    kernel_connect r2 7002 7001
    wait_for '[[ $(kernel_field 1 cs) == Connected && $(kernel_field 2 cs) == Connected ]]' 30
    # Both disks are zero, so the first resync has nothing to copy.
    within 30 drbdsetup new-current-uuid --clear-bitmap 1
    wait_for '[[ $(kernel_field 1 ds) == UpToDate/UpToDate && $(kernel_field 2 ds) == UpToDate/UpToDate ]]' 30
}

kernel_down() { within 60 drbdsetup down "$1"; }
