#!/bin/bash
# What a power cut leaves: `power_cuts.sh DIR`, on this machine, not in a VM. DIR holds what log_writes.sh recorded:
# record1.img, record2.img, notes, story. The power is cut after random logged writes, between flushes too: the
# Primary's metadata must cover every block in which the peer's disk of that moment differs. For some of the cuts both
# disks are made anew, started, and become equal; the filesystem survives, with every file whose fsync had returned; and
# Debian's drbdmeta reads the same metadata.
dir=$(realpath "$1")
export VM_RUN=$dir/cuts VM_DIR=$dir
mkdir -p "$VM_RUN"
. "${0%/*}/../lib.sh"
NODES_FRONTEND=nbd NODES_PORT=$((20000 + $$ % 5000 * 2))
. "$VM_KIT/lockstep.sh"
export NODES_DISK="al-extents 67;"
readonly nr_cuts=${CUTS:-2000} nr_pairs=${PAIRS:-20} nr_resyncs=${RESYNCS:-6}
write_log=$LOCKSTEP_BIN_DIR/lockstep-write-log
declare -A loops=()

story() { tr ' ' '\n' <"$dir/story" | sed -n "s/^$1=//p"; }
seed=$(story seed) bytes=$(story device_bytes) disk_bytes=$(story disk_bytes)

vm_on_fail() {
    log "seed $seed"
    nodes_report
}
# Whatever happens, no process and no loop device stays.
end() {
    local pid loop
    for pid in "${NODE_PID[@]}"; do kill -KILL "$pid" && wait "$pid"; done
    for loop in "${!loops[@]}"; do losetup -d "$loop"; done
}
trap end EXIT

attach() { loop=$(loop_attach "$1") && loops[$loop]=1; }
detach() { losetup -d "$1" && unset "loops[$1]"; }

# Journal and orphans are in order afterwards; anything else would be damage.
repaired() {
    local status=0
    within 120 e2fsck -p "$1" &>"$VM_RUN/fsck.log" || status=$?
    ((status <= 1)) || fail "$2: e2fsck -p ended with $status: $(cat "$VM_RUN/fsck.log")"
}
facts() { grep -v '^#' | sed 's/flags 0x[0-9A-Fa-f]*;//' | tr -s ' \t\n' ' '; }
field() { sed -n "s/^$1=//p" "$VM_RUN/found"; }

[[ -x $write_log ]] || skip "no program $write_log"
((EUID == 0)) || skip "loop devices need root"
nodes_load
cd "$VM_RUN"

step "the power is cut after random writes"
"$write_log" list "$dir/record1.img" >list
log "recorded on the Primary: $(grep -v ^mark list | tr '\n' ' '), $(story checkpoints) checkpoints, $(wc -l <"$dir/notes") notes"
cut_power() {
    within 600 "$write_log" check "$dir/record1.img" "$dir/record2.img" "$dir/notes" "$disk_bytes" "$VM_RUN" \
        --cuts "$nr_cuts" --seed "$seed" "$@"
}
cut_power --pairs "$nr_pairs" >found || fail "seed $seed: $(cat found)"
log "$(grep = found | tr '\n' ' ')"
check "at least 1000 cuts, $(field cuts_at_flush) of them at flushes" test "$(field cuts)" -ge 1000
check "the disks differed after $(field cuts_with_differences) of them" test "$(field cuts_with_differences)" -ge 20
check "most of the disk was not covered" test "$(field mean_covered_blocks)" -lt $((disk_bytes / 4096 * 2 / 3))
for part in log bitmap; do
    if cut_power --forget $part &>forgotten; then
        fail "the check is blind: without the $part it finds nothing missing"
    fi
    check "it is missed when the $part is forgotten" grep -q "marked nowhere" forgotten
done

step "the filesystem after a cut, and the file whose fsync had returned"
resyncs=0 number=0
while read -r _ own peer kind last; do
    "$write_log" replay "$dir/record1.img" "$own" own.img "$disk_bytes" >/dev/null
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
        attach $tool.img
        program=drbdmeta
        [[ $tool == theirs ]] || program=$VM_RUN/bin/drbdmeta
        check "cut after $own: apply-al, $tool" within 60 $program 9 v08 "$loop" internal apply-al </dev/null
        fresh "$loop"
        within 60 $program 9 v08 "$loop" internal dump-md </dev/null | facts >$tool.dump
        detach "$loop"
    done
    check "cut after $own: dump-md, ours and Debian's" cmp ours.dump theirs.dump

    "$write_log" replay "$dir/record2.img" "$peer" peer.img "$disk_bytes" >/dev/null
    attach own.img
    loop1=$loop
    attach peer.img
    loop2=$loop
    nodes_configure "$loop1" "$loop2"
    for node in nodo1 nodo2; do
        start_node $node
        on $node up $RES
    done
    wait_for in_sync 120
    for node in nodo1 nodo2; do
        on $node down $RES
        stop_node $node
        unset "NODE_PID[$node]"
    done
    check "cut after $own, peer after $peer: both nodes became equal" same_bytes "$loop1" "$loop2" "$bytes"
    detach "$loop1"
    detach "$loop2"
    repaired peer.img "cut after $own, the peer's copy"
done < <(grep ^pair found)
check_equal "resyncs" "$nr_resyncs" "$resyncs"
passed
