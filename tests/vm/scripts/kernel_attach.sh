#!/bin/bash
# The kernel's DRBD 8.4 attaches disks that lockstep wrote, sees the same identifiers and the
# same blocks out of sync, works on them, and lockstep reads what it left.
#
# The metadata comes from lockstep's create-md and from lockstep-vm-disk (the library's own
# encoders), and is brought into the states a node leaves behind. LOCKSTEP_DRBDMETA may name
# another drbdmeta, for example Debian's, to try the script itself.
. "${0%/*}/../lib.sh"
. "$VM_KIT/kernel_drbd.sh"

LOCKSTEP_BIN_DIR=${LOCKSTEP_BIN_DIR:-$VM_KIT/../../target/release}
vm_disk=$LOCKSTEP_BIN_DIR/lockstep-vm-disk
vm_on_fail() {
    cat /proc/drbd
    dmesg | tail -n 25
}

[[ -x $vm_disk ]] || skip "no program $vm_disk"
if [[ -z ${LOCKSTEP_DRBDMETA:-} ]]; then
    [[ -x $LOCKSTEP_BIN_DIR/lockstep ]] || skip "no program $LOCKSTEP_BIN_DIR/lockstep"
    mkdir -p /run/vm/bin
    ln -s "$LOCKSTEP_BIN_DIR/lockstep" /run/vm/bin/drbdmeta
    LOCKSTEP_DRBDMETA=/run/vm/bin/drbdmeta
fi
DRBDMETA=$LOCKSTEP_DRBDMETA
kernel_drbd_load

# One line of what the library reads from a disk: shown DISK uuids|bits|hot|out_of_sync_kib
shown() {
    fresh "$1"
    "$vm_disk" show "$1" | sed -n "s/^$2=//p"
}
ours() { within 60 "$LOCKSTEP_DRBDMETA" "$1" v08 "$2" internal "${@:3}" </dev/null; }
debians() { within 60 drbdmeta "$1" v08 "$2" internal "${@:3}" </dev/null; }

# dump-md of both programs without the comments, in which they name themselves and the time, and
# without the flags: Debian's prints 0 there, whatever they are (mended in drbd-utils 9.33). The
# flags are in get-gi.
dump_facts() { grep -v '^#' | sed 's/flags 0x[0-9A-Fa-f]*;//' | tr -s ' \t\n' ' '; }

# new_disk NAME: 1 GiB, so that the bitmap has more than one page; sets $disk and $kib.
new_disk() {
    disk=$(loop_disk "$1" 1024)
    kernel_create_md 1 "$disk"
    check_equal "$1: kernel-side tools read our create-md" "$(ours 1 "$disk" get-gi)" "$(debians 1 "$disk" get-gi)"
    kib=$(($(shown "$disk" sectors) / 2))
}

# attached WHAT UUIDS KIB: the kernel takes the disk and agrees.
attached() {
    kernel_attach r1 1 "$disk"
    check_equal "$1: UUIDs in the kernel" "$2" "$(uuids_of "$(kernel_gi 1)")"
    check_equal "$1: KiB out of sync in the kernel" "$3" "$(kernel_field 1 oos)"
    check_equal "$1: size in the kernel, KiB" "$kib" "$(awk '$4 == "drbd1" { print $3 }' /proc/partitions)"
}

# written WHAT BLOCK COUNT: the kernel, as Primary without its peer, changes blocks of 4 KiB.
written() {
    within 60 dd if=/dev/urandom of=/dev/drbd1 bs=4k seek="$2" count="$3" oflag=direct conv=fsync status=none
    log "$1: the kernel wrote $3 blocks at $2"
}

# handed_back WHAT BITS: the kernel let go; both programs and the library read the same.
handed_back() {
    local gi=$kernel_gi
    fresh "$disk"
    check_equal "$1: UUIDs read by the library" "$(without_primary_mark "$gi")" "$(without_primary_mark "$(shown "$disk" uuids)")"
    check_equal "$1: bits read by the library" "$2" "$(shown "$disk" bits)"
    check_equal "$1: get-gi, ours and Debian's" "$(debians 1 "$disk" get-gi)" "$(ours 1 "$disk" get-gi)"
    check "$1: our apply-al accepts the kernel's log" ours 1 "$disk" apply-al
    fresh "$disk"
    check_equal "$1: bits after apply-al" "$2" "$(shown "$disk" bits)"
    ours 1 "$disk" dump-md | dump_facts >ours.dump
    debians 1 "$disk" dump-md | dump_facts >debians.dump
    check "$1: dump-md, ours and Debian's" diff debians.dump ours.dump
}

# The kernel is Secondary again and detached; its last word on the identifiers is kept.
let_go() {
    within 30 drbdsetup secondary 1
    kernel_gi=$(kernel_gi 1)
    kernel_down r1
}

readonly ids=1122334455667788:99AABBCCDDEEFF00:0123456789ABCDEE:FEDCBA9876543210
readonly in_sync=1122334455667788:0000000000000000:0123456789ABCDEE:FEDCBA9876543210

step "a disk that was stopped clean while it was ahead of its peer"
new_disk ahead
"$vm_disk" clean "$disk" "$ids" 0,5-20,32767-32769,100000
attached ahead "$ids" $((4 * (1 + 16 + 3 + 1)))
within 30 drbdsetup primary 1 --force
written ahead 200 8
written ahead 5 2
check_equal "ahead: UUIDs stay while the peer is away" "${ids#*:}" "$(uuids_of "$(kernel_gi 1)" | cut -d: -f2-)"
check_equal "ahead: KiB out of sync grew by the new blocks only" $((4 * (21 + 8))) "$(kernel_field 1 oos)"
let_go
handed_back ahead 0,5-20,200-207,32767-32769,100000

step "a disk that was stopped clean and in sync"
new_disk even
"$vm_disk" clean "$disk" "$in_sync" -
attached even "$in_sync" 0
within 30 drbdsetup primary 1 --force
written even 7 1
let_go
check_equal "even: the old current UUID is now the bitmap's" "1122334455667788" "$(cut -d: -f2 <<<"$kernel_gi")"
handed_back even 7

step "a disk whose node crashed as Primary"
new_disk crashed
# Bit 5 lies in hot extent 0; the disk's last extent is not whole.
last_extent=$(((kib / 4 - 1) / 1024))
"$vm_disk" crashed "$disk" "$ids" 5,4000 "0,2,77,$last_extent"
check_equal "crashed: hot extents read back" "0,2,77,$last_extent" "$(shown "$disk" hot)"
# A second copy goes through our own apply-al, without any other program.
cp --sparse=always crashed.img ours.img
own_disk=$(loop_attach /run/vm/ours.img)
check "crashed: our apply-al" ours 9 "$own_disk" apply-al
tail_bits=$((kib / 4 - last_extent * 1024))
attached crashed "$ids" $((4 * (1024 * 3 + tail_bits + 1)))
check_equal "crashed: our apply-al marks the same blocks as the kernel" \
    "$(kernel_field 1 oos)" "$(shown "$own_disk" out_of_sync_kib)"
within 30 drbdsetup primary 1 --force
written crashed 50000 3
let_go
last_bit=$((kib / 4 - 1))
handed_back crashed "0-1023,2048-3071,4000,50000-50002,78848-79871,$((last_extent * 1024))-$last_bit"

step "the kernel itself crashes as Primary"
new_disk kernel
"$vm_disk" clean "$disk" "$ids" 9
attached kernel "$ids" 4
within 30 drbdsetup primary 1 --force
written kernel 3000 1
written kernel 60000 1
# The disk as it is at this moment is what a power failure would leave.
fresh "$disk"
cp --sparse=always kernel.img a.img
cp --sparse=always kernel.img b.img
let_go
a=$(loop_attach /run/vm/a.img)
b=$(loop_attach /run/vm/b.img)
check_equal "kernel crash: hot extents of the kernel's log" "2,58" "$(shown "$a" hot)"
check "kernel crash: our apply-al" ours 1 "$a" apply-al
check "kernel crash: Debian's apply-al" debians 2 "$b" apply-al
check_equal "kernel crash: bits after our apply-al" "9,2048-3071,59392-60415" "$(shown "$a" bits)"
check_equal "kernel crash: bits after Debian's" "$(shown "$b" bits)" "$(shown "$a" bits)"
check_equal "kernel crash: identifiers and flags" "$(debians 2 "$b" get-gi)" "$(ours 1 "$a" get-gi)"
passed
