#!/bin/bash
# Runs in the VM that bench/vm boots: a pair of the kernel's DRBD and a pair of lockstep with ublk, on the same kind of
# loop devices, measured in turn. What comes out is $VM_SHARE/CASE.json, one for each case.
#
# Arguments: rounds, seconds per job, further statements for lockstep, then cases: PROTOCOL,INTEGRITY,LINK with INTEGRITY
# none or crc32c and LINK up or down.
kit=$VM_KIT
here=$(cd "${0%/*}" && pwd)
. "$kit/lib.sh"
. "$kit/kernel_drbd.sh"
. "$kit/lockstep.sh"

# More extents of 4 MiB than the activity log holds, and memory for the disks of both pairs.
readonly disk_mib=1024 al_extents=67
readonly resync_mib=256
readonly rounds=$1 seconds=$2 NODES_MORE=$3
# No limit: the kernel's pair has none either.
readonly NODES_SYNCER=
shift 3
# The nodes of lockstep share the machine with the kernel's minors 1 and 2.
readonly kernel_device=/dev/drbd1 our_prefix=/dev/drbd10

vm_on_fail() { nodes_report; cat /proc/drbd; }

now_ms() { echo $(($(date +%s%N) / 1000000)); }

declare -a loops=()
make_disks() {
    local name
    for name in kernel1 kernel2 ours1 ours2; do
        loops+=("$(loop_disk "$name" "$disk_mib")")
    done
}
free_disks() {
    local loop
    for loop in "${loops[@]}"; do losetup -d "$loop"; done
    loops=()
    rm -f "$VM_RUN"/{kernel,ours}?.img
}

kernel_up() {
    local integrity=() minor
    [[ $2 == none ]] || integrity=(--data-integrity-alg="$2")
    export KERNEL_PROTOCOL=$1
    for minor in 1 2; do
        kernel_create_md $minor "${loops[minor - 1]}"
        kernel_attach "r$minor" $minor "${loops[minor - 1]}" --al-extents=$al_extents \
            --c-plan-ahead=0 --resync-rate=4194304 --c-min-rate=0
    done
    kernel_link=("${integrity[@]}")
    kernel_connect r1 7001 7002 "${kernel_link[@]}"
    kernel_connect r2 7002 7001 "${kernel_link[@]}"
    wait_for '[[ $(kernel_field 1 cs) == Connected && $(kernel_field 2 cs) == Connected ]]' 30
    within 30 drbdsetup new-current-uuid --clear-bitmap 1
    wait_for '[[ $(kernel_field 1 ds) == UpToDate/UpToDate && $(kernel_field 2 ds) == UpToDate/UpToDate ]]' 30
    within 30 drbdsetup primary 1
}
kernel_cut() { within 30 drbdsetup disconnect ipv4:127.0.0.1:7001 ipv4:127.0.0.1:7002; }
kernel_in_sync() { [[ $(kernel_field 1 cs) == Connected && $(kernel_field 1 oos) == 0 && $(kernel_field 2 oos) == 0 ]]; }
kernel_gone() {
    within 30 drbdsetup secondary 1
    kernel_down r1
    kernel_down r2
}

ours_up() {
    NODES_PROTOCOL=$1 NODES_DISK="al-extents $al_extents;" NODES_NET="data-integrity-alg $2; connect-int 1;" \
        nodes_configure "${loops[2]}" "${loops[3]}"
    nodes_create --force
    on nodo1 new-current-uuid --clear-bitmap "$RES"
    on nodo1 primary "$RES"
    wait_for in_sync 60
}
ours_cut() { on nodo1 disconnect "$RES"; }
ours_gone() {
    local node
    for node in nodo1 nodo2; do
        on $node down "$RES"
        stop_node $node
    done
}

# resync_ms PAIR: writes random data while the link is cut; prints how long it takes from the connect to equal disks.
resync_ms() {
    local begin
    case $1 in
    kernel)
        kernel_cut
        wait_for '[[ $(kernel_field 1 cs) == StandAlone ]]' 30
        within 120 dd if="$VM_RUN/noise" of=$kernel_device bs=1M oflag=direct status=none
        wait_for '[[ $(kernel_field 2 cs) == WFConnection ]]' 30
        begin=$(now_ms)
        kernel_connect r1 7001 7002 "${kernel_link[@]}"
        until kernel_in_sync; do sleep 0.02; done
        ;;
    ours)
        ours_cut
        within 120 dd if="$VM_RUN/noise" of="$(node_device nodo1)" bs=1M oflag=direct status=none
        begin=$(now_ms)
        on nodo1 connect "$RES"
        # One question that is answered when it is done: a poll of ours would be a process each time.
        on nodo2 wait-connect "$RES"
        on nodo2 wait-sync "$RES"
        ;;
    esac >&2
    echo $(($(now_ms) - begin))
    [[ $1 == kernel ]] || wait_for in_sync 60 >&2
}

step "modules"
kernel_drbd_load
nodes_load
NODE_DEVICE_PREFIX=$our_prefix
head -c $((resync_mib << 20)) /dev/urandom >"$VM_RUN/noise"
for case in "$@"; do
    IFS=, read -r protocol integrity link <<<"$case"
    step "protocol $protocol, integrity $integrity, link $link"
    make_disks
    kernel_up "$protocol" "$integrity"
    ours_up "$protocol" "$integrity"
    if [[ $link == down ]]; then
        kernel_cut
        ours_cut
    fi
    resync=()
    if [[ $link == up && $protocol == C && $integrity == none ]]; then
        for ((round = 0; round < rounds; round++)); do
            resync+=(--resync "$(resync_ms kernel),$(resync_ms ours)")
        done
    fi
    PYTHONDONTWRITEBYTECODE=1 within $((rounds * seconds * 40 + 300)) python3 "$here/vm_jobs.py" --rounds "$rounds" \
        --seconds "$seconds" --size "$disk_mib" --resync-mib $resync_mib --kernel $kernel_device \
        --ours "$(node_device nodo1)" --pids "primary:${NODE_PID[nodo1]},secondary:${NODE_PID[nodo2]}" \
        --case "$case" "${resync[@]}" "$VM_SHARE/${case//,/-}.json"
    if [[ $link == up ]]; then
        wait_for kernel_in_sync 30
        wait_for in_sync 60
        fresh "${loops[@]}"
        check "the kernel's disks are equal" same_bytes "${loops[0]}" "${loops[1]}" $((128 << 20))
        check "lockstep's disks are equal" same_bytes "${loops[2]}" "${loops[3]}" $((128 << 20))
    else
        check "measured" test -s "$VM_SHARE/${case//,/-}.json"
    fi
    kernel_gone
    ours_gone
    free_disks
done
passed
