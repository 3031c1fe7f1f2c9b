#!/bin/bash
# The kernel's own DRBD pair comes up in one VM, mirrors, resyncs after a cut and goes away.
# Nothing of lockstep is in it: this shows that the kit and the yardstick work.
. "${0%/*}/../lib.sh"
. "$VM_KIT/kernel_drbd.sh"

vm_on_fail() { cat /proc/drbd; dmesg | tail -20; }

step "disks"
kernel_drbd_load
a=$(loop_disk a 64)
b=$(loop_disk b 64)

step "pair comes up"
kernel_pair "$a" "$b"
check_equal "state" "Connected" "$(kernel_field 1 cs)"
# A Secondary's device cannot even be opened.
within 30 drbdsetup primary 1
bytes=$(blockdev --getsize64 /dev/drbd1)
check "device is smaller than its disk, by the metadata" test "$bytes" -lt $((64 << 20))

step "writes are mirrored"
within 60 mkfs.ext4 -q /dev/drbd1
mkdir mnt
mount /dev/drbd1 mnt
cp -r /etc/init.d mnt/
umount mnt
check "both disks are equal outside the metadata" same_bytes "$a" "$b" "$bytes"
fresh "$b"
check "the peer's data is a clean filesystem" e2fsck -fn "$b"

step "a cut and a resync"
within 30 drbdsetup disconnect ipv4:127.0.0.1:7001 ipv4:127.0.0.1:7002
wait_for '[[ $(kernel_field 1 cs) == StandAlone ]]' 30
within 60 dd if=/dev/urandom of=/dev/drbd1 bs=4k count=10 seek=100 oflag=direct status=none
check_equal "KiB out of sync" 40 "$(kernel_field 1 oos)"
check "the disks differ now" differ_bytes "$a" "$b" "$bytes"
wait_for '[[ $(kernel_field 2 cs) == WFConnection ]]' 30
kernel_connect r1 7001 7002
wait_for '[[ $(kernel_field 1 cs) == Connected && $(kernel_field 2 ds) == UpToDate/UpToDate ]]' 30
check_equal "KiB out of sync" 0 "$(kernel_field 1 oos)"
check "both disks are equal again" same_bytes "$a" "$b" "$bytes"

step "pair goes away"
within 30 drbdsetup secondary 1
kernel_down r1
kernel_down r2
check "no device is left" bash -c '! grep -q cs: /proc/drbd'
# 8.4 leaves its metadata marked unclean even after a clean stop; drbdadm runs apply-al each time.
check "the activity log applies" drbdmeta 1 v08 "$a" internal apply-al
check "Debian's drbdmeta reads what is left" drbdmeta 1 v08 "$a" internal dump-md
passed
