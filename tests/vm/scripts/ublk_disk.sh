#!/bin/bash
# The block device of a Primary: it is there when `primary` returns and gone when `secondary` does,
# refuses to go while it is used, carries what fio writes to both disks, fails instead of hanging
# when its daemon dies, and leaves nothing in /dev.
. "${0%/*}/../lib.sh"
. "$VM_KIT/lockstep.sh"

readonly disk_mib=${DISK_MIB:-200}
readonly mnt=/run/vm/mnt
readonly by_res=/dev/drbd/by-res/$RES/0

vm_on_fail() { nodes_report; }

disks_equal() { check "$1: both disks are equal outside the metadata" same_bytes "$disk1" "$disk2" "$bytes"; }

# Random writes of mixed sizes, read back and checked; discards between them.
fio_verify() {
    within 300 fio --name=verify --filename="$1" --direct=1 --ioengine="$2" --iodepth="$3" \
        --rw=randwrite --bsrange=4k-256k --size=64M --verify=crc32c --verify_fatal=1 --do_verify=1 \
        --fsync=32 --randseed="$4" --minimal
}

# refused WHAT NODE VERB: exit code 11, and the words that help.
refused() {
    local output status=0
    output=$(on "$2" "$3" $RES 2>&1) || status=$?
    check_equal "$1: exit code" 11 "$status"
    grep -q "$4" <<<"$output" || fail "$1: '$4' is not in: $output"
    log "ok: $1: $(grep "$4" <<<"$output" | head -1)"
    check_equal "$1: role" Primary "$(node_role "$2")"
}

step "two nodes"
nodes_load
mkdir -p "$mnt"
disk1=$(loop_disk disk1 "$disk_mib")
disk2=$(loop_disk disk2 "$disk_mib")
nodes_configure "$disk1" "$disk2"
nodes_create
check "no device while Secondary" no_device_left

step "primary answers when the device is there"
on nodo1 primary --force $RES
check "the device is there" test -b /dev/drbd1 -a -b "$by_res"
check_equal "both names lead to" "$(realpath /dev/drbd1)" "$(realpath "$by_res")"
bytes=$(blockdev --getsize64 /dev/drbd1)
check_equal "logical block" 512 "$(blockdev --getss /dev/drbd1)"
check_equal "physical block" 4096 "$(blockdev --getpbsz /dev/drbd1)"
queue=/sys/block/$(basename "$(realpath /dev/drbd1)")/queue
check_equal "write cache" "write back" "$(<"$queue/write_cache")"
check_equal "fua" 1 "$(<"$queue/fua")"
check_equal "largest request, KiB" 256 "$(<"$queue/max_hw_sectors_kb")"
begin=$SECONDS
wait_for in_sync 300
log "first resync: $((SECONDS - begin)) s"

step "a filesystem"
check "mkfs.ext4" within 300 mkfs.ext4 -q /dev/drbd1
check "mount" within 60 mount /dev/drbd1 "$mnt"
mkdir "$mnt/etc"
cp -a /etc/. "$mnt/etc" 2>/dev/null || true
head -c 20M /dev/urandom >"$mnt/random"
sync -f "$mnt"
(cd "$mnt" && find . -type f -print0 | sort -z | xargs -0 sha256sum) >/run/vm/sums
log "$(wc -l </run/vm/sums) files"
refused "secondary while it is mounted" nodo1 secondary "mounted on $mnt"
refused "down while it is mounted" nodo1 down "mounted on $mnt"
check "it still works" touch "$mnt/after"
within 120 umount "$mnt"
sleep 1000 </dev/drbd1 &
holder=$!
refused "secondary while a program has it open" nodo1 secondary "(pid $holder)"
kill $holder
wait $holder 2>/dev/null || true
on nodo1 secondary $RES
check "the device is gone when secondary returns" no_device_left
disks_equal "after the filesystem"

step "the peer has every file"
on nodo2 primary $RES
check "the device is there" test -b /dev/drbd2 -a -b "$by_res"
check "filesystem is clean" within 120 e2fsck -fn /dev/drbd2
check "mount" within 60 mount -o ro /dev/drbd2 "$mnt"
check "every file has its checksum" bash -c "cd $mnt && sha256sum --quiet --strict -c /run/vm/sums"
within 60 umount "$mnt"

step "fio writes, reads back, and both disks agree"
begin=$SECONDS
check "fio, one at a time" fio_verify /dev/drbd2 psync 1 1
check "fio, 32 at a time" fio_verify "$(realpath /dev/drbd2)" libaio 32 2
log "fio: $((SECONDS - begin)) s"
check "discard" within 60 blkdiscard --offset 16MiB --length 100MiB /dev/drbd2
check "a discarded range reads as zeroes" cmp -n $((100 << 20)) -i $((16 << 20)):0 /dev/drbd2 /dev/zero
check "write zeroes" within 60 blkdiscard --zeroout --offset 4MiB --length 8MiB /dev/drbd2
check "a zeroed range reads as zeroes" cmp -n $((8 << 20)) -i $((4 << 20)):0 /dev/drbd2 /dev/zero
check "fio after the discards" fio_verify /dev/drbd2 libaio 8 3
on nodo2 secondary $RES
disks_equal "after fio"

step "the daemon dies under IO"
on nodo2 primary $RES
device=$(realpath /dev/drbd2)
status=0
(
    trap - ERR
    set +e
    within 120 fio --name=load --filename="$device" --direct=1 --ioengine=libaio --iodepth=16 --rw=randwrite --bs=4k \
        --time_based --runtime=100 --minimal
    echo $? >/run/vm/fio.status
) &>/run/vm/fio.log &
writer=$!
sleep 3
check "fio is at it" kill -0 $writer
begin=$SECONDS
crash_node nodo2
wait_for '[[ -s /run/vm/fio.status ]]' 30
check "fio has got an error ($(</run/vm/fio.status)) and does not hang" test "$(</run/vm/fio.status)" -ne 0
wait_for "[[ ! -b $device ]]" 30
log "users were free after $((SECONDS - begin)) s"

step "it returns, and the disks become equal"
wait_for '[[ $(node_conn nodo1) != Connected ]]' 60
begin=$SECONDS
start_node nodo2
check "the dead device was swept" bash -c '! compgen -G "/dev/ublkc*"'
on nodo2 up $RES
check "no stale name is left" test ! -L /dev/drbd2 -a ! -L "$by_res"
wait_for in_sync 300
log "back in sync after $((SECONDS - begin)) s"
disks_equal "after the crash"

step "reads without a local disk come from the peer"
on nodo1 primary $RES
check "fio" fio_verify /dev/drbd1 libaio 16 4
sum=$(device_sum /dev/drbd1 $((64 << 20)))
on nodo1 detach $RES
check_equal "disk" Diskless "$(node_disk nodo1)"
check_equal "the device as read from the peer" "$sum" "$(device_sum /dev/drbd1 $((64 << 20)))"
check "fio without a local disk" fio_verify /dev/drbd1 libaio 16 5
on nodo1 secondary $RES
on nodo1 attach $RES
wait_for in_sync 300
disks_equal "after the detour"

step "a daemon that starts while the disk is mounted does not keep it"
on nodo1 primary $RES
within 60 mount /dev/drbd1 "$mnt" 2>/dev/null || { within 60 mkfs.ext4 -q /dev/drbd1 && within 60 mount /dev/drbd1 "$mnt"; }
on nodo2 down $RES
stop_node nodo2
start_node nodo2
on nodo2 up $RES
wait_for in_sync 300
within 60 umount "$mnt"
on nodo1 secondary $RES
check "the device is gone" no_device_left

step "the end of a daemon takes its device along"
on nodo1 primary $RES
check "the device is there" test -b /dev/drbd1
stop_node nodo1
check "nothing of it is left" bash -c '[[ ! -L /dev/drbd1 ]] && ! compgen -G "/dev/ublk[bc]*"'
on nodo2 primary $RES
on nodo2 secondary $RES
on nodo2 down $RES
stop_node nodo2
check "no device is left behind" bash -c '! compgen -G "/dev/ublk[bc]*" && ! compgen -G "/dev/drbd*"'
passed
