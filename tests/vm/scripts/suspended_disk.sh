#!/bin/bash
# A disk that does not answer and does not err either: a suspended dm device under a running node. `down` waits for it and
# says so, `detach --force` ends that, and the daemon stops within its limit while the disk still hangs. The
# Primary's own disk: IO stands still, status says why, and goes on over the peer once the disk is given up. When it
# answers again it is attached again, and both are equal.
. "${0%/*}/../lib.sh"
. "$VM_KIT/lockstep.sh"
. "$VM_KIT/mapper.sh"

readonly disk_mib=${DISK_MIB:-64}
# A daemon may take so long for its end: 15 s for the threads of its resources, and what the emulation costs.
readonly stop_limit=${STOP_LIMIT:-40}
# Nothing but the disk shall end the waiting: no ko-count, and an emulated machine is slow to answer a ping.
export NODES_NET="ping-timeout 100; ko-count 0;"

vm_on_fail() {
    dm status || true
    nodes_report
}

# hang NAME: what comes from now on waits in the mapper.
hang() { dm suspend --nolockfs --noflush "$1"; }
answer_again() { dm resume "$1"; }

# write_blocks FROM COUNT: stable blocks through the Primary's device.
write_blocks() {
    within "${WRITE_LIMIT_S:-200}" dd if=/dev/urandom of=/dev/drbd1 bs=4k seek="$1" count="$2" oflag=direct,dsync status=none
}

not() { ! "$@"; }

# ends_well WHAT PID SECONDS: this job of ours ends in time and well.
ends_well() {
    wait_for "! kill -0 $2" "$3"
    wait "$2" || fail "$1: status $?"
    VM_CHECKS=$((VM_CHECKS + 1))
    log "ok: $1"
}

# says NODE WORDS: it names this among what it waits for.
says() { on "$1" explain "$RES" | grep "waiting for" | grep -q "$2"; }

step "two nodes on disks that can be suspended"
mapper_load
nodes_load
loop1=$(loop_disk disk1 "$disk_mib")
loop2=$(loop_disk disk2 "$disk_mib")
nodes_configure "$(mapped slow1 "$(healthy_on "$loop1")")" "$(mapped slow2 "$(healthy_on "$loop2")")"
nodes_create
on nodo1 primary --force $RES
wait_for in_sync 120
bytes=$(blockdev --getsize64 /dev/drbd1)
check "the application writes" write_blocks 0 16

step "down waits for a suspended disk and says so"
hang slow2
write_blocks 16 4 &
writer=$!
wait_for 'says nodo2 "which has not answered for"' 60
check "the write of the application waits" kill -0 "$writer"
VERB_LIMIT_S=200 on nodo2 down $RES &>/run/vm/down.log &
downer=$!
wait_for 'grep -q "has not answered for" /run/vm/down.log' 60
check "and names what helps" grep -q "detach --force" /run/vm/down.log
sleep 10
check "it goes on waiting" kill -0 "$downer"
on nodo2 detach --force $RES
ends_well "down ends" "$downer" 60
ends_well "the write is good" "$writer" 60
check "the Primary goes on" write_blocks 20 4

step "the daemon ends while the disk hangs"
pid=${NODE_PID[nodo2]}
before=$SECONDS
kill -TERM "$pid"
wait_for "! kill -0 $pid" "$stop_limit"
log "the daemon ended after $((SECONDS - before)) s"
wait "$pid" || log "its status: $?"
answer_again slow2
return_node nodo2
wait_for in_sync 120

step "a daemon is told to end while its resource is up on a suspended disk"
hang slow2
write_blocks 24 4 &
writer=$!
wait_for 'says nodo2 "which has not answered for"' 60
pid=${NODE_PID[nodo2]}
before=$SECONDS
kill -TERM "$pid"
wait_for "! kill -0 $pid" $((stop_limit * 3))
log "the daemon ended after $((SECONDS - before)) s"
wait "$pid" || log "its status: $?"
check "it has said why" grep -q "still not down.*has not answered" "$VM_DIR/nodo2.log"
ends_well "the write is good" "$writer" 60
answer_again slow2
return_node nodo2
wait_for in_sync 120

step "the Primary's own disk hangs"
hang slow1
write_blocks 32 4 &
writer=$!
wait_for 'says nodo1 "which has not answered for"' 60
check "the write of the application waits" kill -0 "$writer"
on nodo1 detach --force $RES
ends_well "it is good over the peer" "$writer" 60
check "and the next one" write_blocks 36 4
wait_for '[[ $(node_disk nodo1) == Diskless ]]' 60
check "it is not attached before its IO has ended" not on nodo1 attach $RES
answer_again slow1
wait_for "on nodo1 attach $RES || [[ \$(node_disk nodo1) =~ ^(UpToDate|Inconsistent)$ ]]" 60
wait_for in_sync 120

step "the end"
on nodo1 secondary $RES
for node in nodo1 nodo2; do
    on $node down $RES
    stop_node $node
done
check "both disks are equal in the end" same_bytes "$loop1" "$loop2" "$bytes"
passed
