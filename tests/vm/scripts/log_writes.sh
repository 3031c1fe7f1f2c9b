#!/bin/bash
# Every write that two nodes make to their disks is recorded (dm-log-writes) while ext4 on the Primary's device writes
# and fsyncs, with the peer there, away, catching up, killed. The records are the VM's disks /dev/vda and /dev/vdb, for
# power_cuts.sh, which cuts the power after any of those writes: it needs no kernel of its own, and emulation would
# make it ten times slower.
. "${0%/*}/../lib.sh"
. "$VM_KIT/lockstep.sh"
. "$VM_KIT/mapper.sh"

# More extents of 4 MiB than the activity log has slots, so that extents are evicted all the time.
readonly disk_mib=600
export NODES_DISK="al-extents 67;"
readonly mnt=/run/vm/mnt notes=/run/vm/notes seed=${SEED:-$RANDOM}
sampler='' checkpoint=0

vm_on_fail() {
    log "seed $seed"
    dm status || true
    nodes_report
}

# checkpoint: a file is stable, and the log says from where on.
checkpoint() {
    checkpoint=$((checkpoint + 1))
    echo $checkpoint >"$mnt/checkpoints/$checkpoint"
    within 60 sync "$mnt/checkpoints/$checkpoint" "$mnt/checkpoints"
    dm message rec1 0 mark checkpoint-$checkpoint
}

# busy SECONDS: fio writes all over its file while checkpoints are made.
busy() {
    local end=$((SECONDS + $1)) fio
    within $(($1 + 60)) fio --name=spread --filename="$mnt/spread" --size=420M --fallocate=none --rw=randwrite \
        --bs=4k --ioengine=libaio --direct=1 --iodepth=4 --fsync=6 --rate_iops=200 --randrepeat=0 --norandommap \
        --randseed=$((seed + SECONDS)) --time_based --runtime="$1" --minimal &>/run/vm/fio.log &
    fio=$!
    while ((SECONDS < end)); do
        checkpoint
        sleep 0.5
    done
    wait $fio || fail "fio: $(tail -3 /run/vm/fio.log)"
}

mapper_load dm-log-writes
modules virtio_blk
wait_for '[[ -b /dev/vdb ]]' 10
nodes_load
mkdir -p "$mnt"
log "seed $seed"

step "two nodes whose disks are recorded from the first write on"
records=(- /dev/vda /dev/vdb)
for side in 1 2; do
    disk=$(loop_disk disk$side $disk_mib)
    record=${records[side]}
    mapped rec$side "0 $(sectors_of "$disk") log-writes $disk $record" >/dev/null
done
nodes_configure /dev/mapper/rec1 /dev/mapper/rec2
nodes_create
# Both disks are zeroes: there is nothing to copy, and a recorded full resync would be most of the record.
on nodo1 new-current-uuid --clear-bitmap $RES
wait_for in_sync 60
on nodo1 primary $RES
bytes=$(blockdev --getsize64 /dev/drbd1)
within 120 mkfs.ext4 -q -N 2000 -E nodiscard,lazy_itable_init=1 /dev/drbd1
within 60 mount -o noinit_itable /dev/drbd1 "$mnt"
mkdir "$mnt/checkpoints"
within 60 fallocate -l 420M "$mnt/spread"
sync -f "$mnt"
# How long both records are, as often as this machine can say it; see lockstep-write-log for what becomes of it.
(
    trap - ERR
    set +e
    export DM_DISABLE_UDEV=1
    while dmsetup status --target log-writes; do read -rt 0.05 <> <(:); done
) >$notes.raw &
sampler=$!
dm message rec1 0 mark start

step "ext4 writes and fsyncs"
busy "${BUSY_S:-15}"
step "the peer is away"
on nodo2 disconnect $RES
busy 8
step "the peer catches up meanwhile"
on nodo2 connect $RES
busy 8
wait_for in_sync 120
step "the peer is killed and returns"
crash_node nodo2
busy 4
return_node nodo2
busy 8
wait_for in_sync 120
kill $sampler
wait $sampler 2>/dev/null || true
within 60 umount "$mnt"
on nodo1 secondary $RES
for node in nodo1 nodo2; do
    on $node down $RES
    stop_node $node
done
for side in 1 2; do dm remove rec$side; done
awk '$1 == "rec1:" { own = $5 } $1 == "rec2:" { if (own != "") print own, $5; own = "" }' $notes.raw >"$VM_DIR/notes"
fresh /dev/vda /dev/vdb
sync
echo "seed=$seed device_bytes=$bytes disk_bytes=$((disk_mib << 20)) checkpoints=$checkpoint" >"$VM_DIR/story"
check "lengths of both records were noted" test "$(wc -l <"$VM_DIR/notes")" -ge 50
log "$(cat "$VM_DIR/story"), $(wc -l <"$VM_DIR/notes") notes"
passed
