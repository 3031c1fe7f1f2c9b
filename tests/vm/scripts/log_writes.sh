#!/bin/bash
# Every write that two nodes make to their disks is recorded (dm-log-writes) while ext4 on the Primary's device writes
# and fsyncs, with the peer there, away, catching up, killed. Then the power is cut after random logged writes, between
# flushes too: the Primary's metadata must cover every block in which the peer's disk of that moment differs. For some
# of the cuts both disks are made anew, started, and become equal; the filesystem survives, with every file whose fsync
# had returned; and Debian's drbdmeta reads the same metadata.
. "${0%/*}/../lib.sh"
. "$VM_KIT/lockstep.sh"
. "$VM_KIT/mapper.sh"

# More extents of 4 MiB than the activity log has slots, so that extents are evicted all the time.
readonly disk_mib=600 nr_cuts=${CUTS:-300} nr_pairs=${PAIRS:-15} nr_resyncs=${RESYNCS:-3}
export NODES_DISK="al-extents 67;"
readonly mnt=/run/vm/mnt notes=/run/vm/notes seed=${SEED:-$RANDOM}
write_log=$LOCKSTEP_BIN_DIR/lockstep-write-log
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

# Journal and orphans are in order afterwards; anything else would be damage.
repaired() {
    local status=0
    within 120 e2fsck -p "$1" &>/run/vm/fsck.log || status=$?
    ((status <= 1)) || fail "$2: e2fsck -p ended with $status: $(cat /run/vm/fsck.log)"
}
facts() { grep -v '^#' | sed 's/flags 0x[0-9A-Fa-f]*;//' | tr -s ' \t\n' ' '; }
field() { sed -n "s/^$1=//p" /run/vm/found; }

[[ -x $write_log ]] || skip "no program $write_log"
mapper_load dm-log-writes
nodes_load
mkdir -p "$mnt"
log "seed $seed"

step "two nodes whose disks are recorded from the first write on"
for side in 1 2; do
    disk=$(loop_disk disk$side $disk_mib)
    record=$(loop_disk record$side 4000)
    mapped rec$side "0 $(sectors_of "$disk") log-writes $disk $record" >/dev/null
done
nodes_configure /dev/mapper/rec1 /dev/mapper/rec2
for node in nodo1 nodo2; do
    start_node $node
    on $node create-md $RES
    on $node up $RES
done
wait_for '[[ $(node_conn nodo1) == Connected ]]' 60
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
awk '$1 == "rec1:" { own = $5 } $1 == "rec2:" { if (own != "") print own, $5; own = "" }' $notes.raw >$notes
fresh "$(losetup -j /run/vm/record1.img | cut -d: -f1)" "$(losetup -j /run/vm/record2.img | cut -d: -f1)"
sync
"$write_log" list /run/vm/record1.img >/run/vm/list
log "recorded on the Primary: $(grep -v ^mark /run/vm/list | tr '\n' ' '), $checkpoint checkpoints, $(wc -l <$notes) notes"

step "the power is cut after random writes"
cut_power() {
    within 300 "$write_log" check /run/vm/record1.img /run/vm/record2.img $notes $((disk_mib << 20)) /run/vm \
        --cuts "$nr_cuts" --seed "$seed" "$@"
}
cut_power --pairs "$nr_pairs" >/run/vm/found || fail "seed $seed: $(cat /run/vm/found)"
log "$(grep = /run/vm/found | tr '\n' ' ')"
check "at least 200 cuts, $(field cuts_at_flush) of them at flushes" test "$(field cuts)" -ge 200
check "the disks differed after $(field cuts_with_differences) of them" test "$(field cuts_with_differences)" -ge 20
check "most of the disk was not covered" test "$(field mean_covered_blocks)" -lt $((disk_mib * 256 * 2 / 3))
for part in log bitmap; do
    if cut_power --forget $part &>/run/vm/forgotten; then
        fail "the check is blind: without the $part it finds nothing missing"
    fi
    check "it is missed when the $part is forgotten" grep -q "marked nowhere" /run/vm/forgotten
done

step "the filesystem after a cut, and the file whose fsync had returned"
resyncs=0 number=0
while read -r _ own peer kind last; do
    "$write_log" replay /run/vm/record1.img "$own" /run/vm/own.img $((disk_mib << 20)) >/dev/null
    cp --sparse=always own.img whole.img
    repaired whole.img "cut after $own ($kind)"
    check "cut after $own ($kind): ext4 is whole after the replay of its journal" within 120 e2fsck -fn whole.img
    if [[ $last != - ]]; then
        check_equal "cut after $own: checkpoint" "$last" "$(debugfs -R "cat /checkpoints/$last" whole.img 2>/dev/null)"
    fi
    # Early, in the middle and late in the story.
    number=$((number + 1))
    ((number * nr_resyncs / nr_pairs > resyncs)) || continue
    resyncs=$((resyncs + 1))

    cp --sparse=always own.img ours.img
    cp --sparse=always own.img theirs.img
    for tool in ours theirs; do
        loop=$(loop_attach /run/vm/$tool.img)
        program=drbdmeta
        [[ $tool == theirs ]] || program=/run/vm/bin/drbdmeta
        check "cut after $own: apply-al, $tool" within 60 $program 9 v08 "$loop" internal apply-al </dev/null
        fresh "$loop"
        within 60 $program 9 v08 "$loop" internal dump-md </dev/null | facts >$tool.dump
        losetup -d "$loop"
    done
    check "cut after $own: dump-md, ours and Debian's" cmp ours.dump theirs.dump

    "$write_log" replay /run/vm/record2.img "$peer" /run/vm/peer.img $((disk_mib << 20)) >/dev/null
    loop1=$(loop_attach /run/vm/own.img)
    loop2=$(loop_attach /run/vm/peer.img)
    nodes_configure "$loop1" "$loop2"
    for node in nodo1 nodo2; do
        start_node $node
        on $node up $RES
    done
    wait_for in_sync 120
    on nodo1 primary $RES
    repaired "$(node_device nodo1)" "cut after $own, on the device"
    on nodo1 secondary $RES
    for node in nodo1 nodo2; do
        on $node down $RES
        stop_node $node
    done
    check "cut after $own, peer after $peer: both nodes became equal" same_bytes "$loop1" "$loop2" "$bytes"
    losetup -d "$loop1" "$loop2"
done < <(grep ^pair /run/vm/found)
check_equal "resyncs" "$nr_resyncs" "$resyncs"
passed
