#!/bin/bash
# A running lockstep leaves its disk to the kernel's DRBD and gets it back: after a clean stop,
# and after kill -9 of a Primary. The kernel must see the same identifiers, every block that the
# peer has not got, and the data; and lockstep goes on with what the kernel leaves.
. "${0%/*}/../lib.sh"
. "$VM_KIT/lockstep.sh"
. "$VM_KIT/kernel_drbd.sh"

vm_on_fail() {
    nodes_report
    cat /proc/drbd
}
# A minor that is nobody's device name here.
readonly visitor_minor=5

write_blocks() { within 60 dd if="$1" of="$(node_device nodo1)" bs=4k seek="$2" oflag=direct conv=fsync status=none; }
disk_has() { check "$1" bash -c "dd if='$disk1' bs=4k skip=$3 count=\$((\$(stat -c %s '$2') / 4096)) iflag=direct status=none | cmp - '$2'"; }

# kernel_agrees WHAT KIB-AT-LEAST KIB-AT-MOST
kernel_agrees() {
    local before after kib
    before=$(without_primary_mark "$(disk_gi "$disk1")")
    kernel_attach visitor $visitor_minor "$disk1"
    after=$(without_primary_mark "$(kernel_gi $visitor_minor)")
    kib=$(kernel_field $visitor_minor oos)
    check_equal "$1: identifiers in the kernel" "$before" "$after"
    check "$1: $kib KiB out of sync in the kernel, $2 to $3 expected" test "$kib" -ge "$2" -a "$kib" -le "$3"
    kernel_down visitor
}

step "a pair in sync, then the peer leaves"
nodes_load
kernel_drbd_load
disk1=$(loop_disk nodo1 128)
disk2=$(loop_disk nodo2 128)
nodes_configure "$disk1" "$disk2"
nodes_create
on nodo1 -- --overwrite-data-of-peer primary $RES
wait_for in_sync 120
wait_for '[[ -b $(node_device nodo1) ]]' 20
bytes=$(blockdev --getsize64 "$(node_device nodo1)")
on nodo2 down $RES
wait_for '[[ ! $(node_conn nodo1) =~ ^(Connected|Established)$ ]]' 60
head -c $((40 * 4096)) /dev/urandom >first
head -c $((3 * 4096)) /dev/urandom >second
write_blocks first 100
check_equal "KiB out of sync" 160 "$(node_out_of_sync_kib nodo1)"

step "a clean stop"
on nodo1 secondary $RES
on nodo1 down $RES
stop_node nodo1
kernel_agrees "after a clean stop" 160 160
disk_has "after a clean stop: the data is on the disk" first 100

step "lockstep takes it back, and is killed as Primary"
start_node nodo1
on nodo1 up $RES
on nodo1 primary $RES
wait_for '[[ -b $(node_device nodo1) ]]' 20
check_equal "KiB out of sync" 160 "$(node_out_of_sync_kib nodo1)"
write_blocks second 20000
crash_node nodo1
bury_node nodo1
# Extents of 4 MiB that were hot count whole: the second write's, and perhaps the first's.
kernel_agrees "after the crash" 172 $((4 * 4096))
disk_has "after the crash: the first data is on the disk" first 100
disk_has "after the crash: the acknowledged write is on the disk" second 20000

step "both nodes meet again"
start_node nodo1
on nodo1 up $RES
on nodo2 up $RES
wait_for in_sync 120
for node in nodo1 nodo2; do
    on $node down $RES
    stop_node $node
done
check "both disks are equal outside the metadata" same_bytes "$disk1" "$disk2" "$bytes"
passed
