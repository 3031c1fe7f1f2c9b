#!/bin/bash
# Disks that fail below the nodes while ext4 works on the Primary's device: writes (data and metadata) that err on the
# Secondary, on the Primary, on and off; and power cuts that swallow what was on its way to a disk. A disk that erred is
# given up, IO goes on over the other, it is attached again and catches up; every file whose fsync returned is there.
. "${0%/*}/../lib.sh"
. "$VM_KIT/lockstep.sh"
. "$VM_KIT/mapper.sh"

readonly disk_mib=${DISK_MIB:-160}
readonly mnt=/run/vm/mnt acked=/run/vm/acked
export NODES_DISK="on-io-error detach;"
# One thing fails at a time: a machine under emulation that is slow to answer must not lose the peer while its own disk
# is away, since then nobody has the data and the filesystem gets an error, rightly.
export NODES_NET="ping-timeout 100;"
writer='' seconds_before=0

vm_on_fail() {
    dm status || true
    nodes_report
}

# Small files, each made stable before it counts as written. Ends when a write fails or at its word.
start_writer() {
    rm -f /run/vm/stop
    (
        trap - ERR
        set +e
        while [[ ! -e /run/vm/stop ]]; do
            number=$(($(wc -l <$acked) + 1))
            file=$mnt/files/$number
            { head -c $((RANDOM * 3 + 100)) /dev/urandom >"$file" && sync "$file" "$mnt/files"; } 2>/dev/null || break
            # From the stable file, not from what was meant to be in it.
            sum=$(sha256sum <"$file") || break
            echo "${sum%% *}  files/$number" >>$acked
        done
        touch /run/vm/writer.ended
    ) &
    writer=$!
}

stop_writer() {
    touch /run/vm/stop
    wait_for '[[ -e /run/vm/writer.ended ]]' 90
    wait "$writer" || true
    rm -f /run/vm/writer.ended
}

writer_goes_on() {
    local before
    before=$(wc -l <$acked)
    wait_for "(( \$(wc -l <$acked) > $before + 4 ))" 120
    check "$1: the writer goes on" kill -0 "$writer"
}

files_are_there() {
    check "$1: all $(wc -l <$acked) acknowledged files are there" \
        bash -c "cd $mnt && sha256sum --quiet --strict -c $acked"
}

# Nothing moves while the two are compared.
disks_equal() {
    within 60 fsfreeze -f "$mnt"
    wait_for in_sync 60
    check "$1: both disks are equal outside the metadata" same_bytes "$loop1" "$loop2" "$bytes"
    within 60 fsfreeze -u "$mnt"
}

# attached_again NODE: as an operator would try again until it works.
attached_again() { wait_for "on $1 attach $RES || [[ \$(node_disk $1) =~ ^(UpToDate|Inconsistent)$ ]]" 60; }

step "two nodes on disks that can be made to fail"
mapper_load dm-flakey
nodes_load
mkdir -p "$mnt"
: >$acked
loop1=$(loop_disk disk1 "$disk_mib")
loop2=$(loop_disk disk2 "$disk_mib")
nodes_configure "$(mapped flaky1 "$(healthy_on "$loop1")")" "$(mapped flaky2 "$(healthy_on "$loop2")")"
nodes_create
on nodo1 primary --force $RES
wait_for in_sync 120
bytes=$(blockdev --getsize64 /dev/drbd1)
within 120 mkfs.ext4 -q -E lazy_itable_init=0 /dev/drbd1
within 60 mount /dev/drbd1 "$mnt"
mkdir "$mnt/files"
sync -f "$mnt"
start_writer
writer_goes_on "at first"

step "writes err on the Secondary's disk"
remapped flaky2 "$(erring_on "$loop2")"
wait_for '[[ $(node_disk nodo2) == Diskless ]]' 30
check_equal "the Primary's view" Diskless "$(node_peer_disk nodo1)"
writer_goes_on "without the Secondary's disk"
remapped flaky2 "$(healthy_on "$loop2")"
attached_again nodo2
wait_for in_sync 120
disks_equal "after the Secondary's errors"

step "writes err on the Primary's disk"
remapped flaky1 "$(erring_on "$loop1")"
wait_for '[[ $(node_disk nodo1) == Diskless ]]' 30
check_equal "role" Primary "$(node_role nodo1)"
writer_goes_on "without a local disk"
remapped flaky1 "$(healthy_on "$loop1")"
attached_again nodo1
wait_for in_sync 120
disks_equal "after the Primary's errors"
files_are_there "after the Primary's errors"

for side in 2 1; do
    node=nodo$side loop=loop$side
    step "the disk of $node errs 1 s in 3, and is attached again and again"
    remapped flaky$side "$(erring_now_and_then_on "${!loop}" 2 1)"
    for ((end = SECONDS + ${FLAKY_S:-15}; SECONDS < end;)); do
        on $node attach $RES &>/dev/null || true
        sleep 0.3
    done
    check "the writer is still at it" kill -0 "$writer"
    remapped flaky$side "$(healthy_on "${!loop}")"
    attached_again $node
    wait_for in_sync 120
    writer_goes_on "after the errors on and off of $node"
    disks_equal "after the errors on and off of $node"
done

# power_cut NODE: what is on its way to the disk when it happens never gets there.
power_cut() {
    local name=flaky${1#nodo} loop=loop${1#nodo} pid=${NODE_PID[$1]}
    dm suspend --nolockfs "$name"
    sleep 1
    kill -KILL "$pid"
    dm load "$name" --table "$(losing_on "${!loop}")"
    dm resume "$name"
    wait "$pid" || true
    remapped "$name" "$(healthy_on "${!loop}")"
}

step "the Secondary loses power"
power_cut nodo2
wait_for '[[ $(node_conn nodo1) != Connected ]]' 60
writer_goes_on "alone"
return_node nodo2
wait_for in_sync 120
disks_equal "after the Secondary's power cut"

step "the Primary loses power, the other takes over"
writer_goes_on "before the power cut"
power_cut nodo1
stop_writer
within 60 umount "$mnt" || within 60 umount -l "$mnt"
bury_node nodo1
seconds_before=$SECONDS
wait_for "on nodo2 primary $RES" 60
wait_for '[[ -b /dev/drbd2 ]]' 20
within 60 mount /dev/drbd2 "$mnt"
log "mounted on the other node after $((SECONDS - seconds_before)) s"
files_are_there "after the failover"
start_writer
writer_goes_on "on the other node"
return_node nodo1
wait_for in_sync 120
disks_equal "after the Primary's power cut"
stop_writer
files_are_there "in the end"
within 60 umount "$mnt"
check "the filesystem is clean" within 120 e2fsck -fn /dev/drbd2
on nodo2 secondary $RES
for node in nodo1 nodo2; do
    on $node down $RES
    stop_node $node
done
check "both disks are equal in the end" same_bytes "$loop1" "$loop2" "$bytes"
log "$(wc -l <$acked) files were written"
passed
