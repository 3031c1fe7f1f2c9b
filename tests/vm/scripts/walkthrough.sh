#!/bin/bash
# walkthrough.sh TREE: what the users of examples do, on real block devices in one VM.
#
# Two nodes on LVM volumes; a real tree of at least 20,000 files (made by make_tree, in TREE)
# is unpacked on the Primary, the peer takes over and must have every file. Then the same with
# the Primary killed in the middle of unpacking: what was synced before must be on the peer.
# Finally the dead node returns and both disks are equal.
. "${0%/*}/../lib.sh"
. "$VM_KIT/lockstep.sh"

readonly tree=$1
# Small enough that the first full resync in an emulated machine takes seconds.
readonly disk_mib=${DISK_MIB:-640}
# Pieces of the tree that must be safe before the Primary dies.
readonly safe_parts=${SAFE_PARTS:-4}
readonly mnt=/run/vm/mnt

vm_on_fail() { nodes_report; }

unpack() { within 900 tar xpf "$1" -C "$2"; }

# verify_files WHAT DIR SUMS
verify_files() {
    check "$1: every file has its checksum" within 900 bash -c "cd '$2' && sha256sum --quiet --strict -c '$3'"
}

# verify_list WHAT DIR LIST: names, modes, sizes and link targets; nothing more, nothing less.
verify_list() {
    (cd "$2" && find . -mindepth 1 -name lost+found -prune -o -name crash -prune -o -name later -prune \
        -o -type f -printf 'f %m %s %P\n' -o -type l -printf 'l %l %P\n') | sort >/run/vm/found.list
    check "$1: names, modes, sizes and links" diff "$3" /run/vm/found.list
}

verify_tree() {
    verify_files "$1" "$mnt" "$tree/tree.sums"
    verify_list "$1" "$mnt" "$tree/tree.list"
}

mount_on() { within 120 mount "${@:2}" "$(node_device "$1")" "$mnt"; }
filesystem_clean() { check "$1: filesystem is clean" within 300 e2fsck -fn "$(node_device "$2")"; }

disks_equal() {
    check "$1: both disks are equal outside the metadata" same_bytes "$disk1" "$disk2" "$bytes"
}

# ---------------------------------------------------------------------------

files=$(wc -l <"$tree/tree.list")
check "the tree has at least 20,000 files ($files)" test "$files" -ge "${FILES_MIN:-20000}"
mkdir -p "$mnt"

step "two nodes, each with its LVM volume"
nodes_load
disk1=$(volume disk1 "$disk_mib" vg1 web-root)
disk2=$(volume disk2 "$disk_mib" vg2 web-root)
nodes_configure "$disk1" "$disk2"
nodes_create
check_equal "a fresh disk is" "Inconsistent" "$(node_disk nodo1)"
check_equal "a fresh node is" "Secondary" "$(node_role nodo2)"

step "the first becomes Primary and overwrites its peer"
on nodo1 -- --overwrite-data-of-peer primary $RES
check_equal "role" "Primary" "$(node_role nodo1)"
device=$(node_device nodo1)
wait_for '[[ -b $device ]]' 20
bytes=$(blockdev --getsize64 "$device")
check "the device ($bytes bytes) is a little smaller than its disk" \
    test "$bytes" -gt $(((disk_mib - 1) << 20)) -a "$bytes" -lt $((disk_mib << 20))

step "mkfs and untar, while the first resync runs"
check "mkfs.ext4" within 300 mkfs.ext4 -q "$device"
mount_on nodo1
unpack "$tree/tree.tar" "$mnt"
within 300 umount "$mnt"
wait_for in_sync 900
check_equal "KiB out of sync" 0 "$(node_out_of_sync_kib nodo1)"
disks_equal "after the first resync"

step "failover to the peer"
on nodo1 secondary $RES
on nodo2 primary $RES
check_equal "role of the first" "Secondary" "$(node_role nodo1)"
check_equal "role of the second" "Primary" "$(node_role nodo2)"
wait_for '[[ -b $(node_device nodo2) ]]' 20
filesystem_clean "after failover" nodo2
mount_on nodo2 -o ro
verify_tree "after failover"
within 300 umount "$mnt"

step "back again, and the Primary dies in the middle of unpacking"
on nodo2 secondary $RES
on nodo1 primary $RES
wait_for '[[ -b $(node_device nodo1) ]]' 20
mount_on nodo1
: >/run/vm/safe
(
    trap - ERR
    set +e
    # Behind each sync the files are promised; their names go to a place the crash does not reach.
    for part in "$tree"/part-??.tar; do
        name=$(basename "$part" .tar)
        mkdir -p "$mnt/crash/$name" && tar xpf "$part" -C "$mnt/crash/$name" && sync -f "$mnt/crash" || exit 1
        echo "$name" >>/run/vm/safe
    done
    echo all >>/run/vm/safe
) &>/run/vm/writer.log &
writer=$!
disown "$writer"
wait_for '(($(wc -l </run/vm/safe) >= safe_parts))' 600
sleep 0.5
check "the writer is still at it" kill -0 "$writer"
crash_node nodo1
# Taken after the crash: what was finished in between was promised too.
cp /run/vm/safe /run/vm/promised
kill -KILL "$writer" 2>/dev/null || true
log "promised at the crash: $(wc -l </run/vm/promised) parts"
within 30 umount "$mnt" 2>/dev/null || within 30 umount -l "$mnt"

step "the peer takes over"
wait_for '[[ ! $(node_conn nodo2) =~ ^(Connected|Established)$ ]]' 120
on nodo2 primary $RES
wait_for '[[ -b $(node_device nodo2) ]]' 20
check "the journal replays" mount_on nodo2
within 120 umount "$mnt"
filesystem_clean "after the crash" nodo2
mount_on nodo2
verify_tree "after the crash, the first tree"
while read -r name; do
    [[ $name != all ]] || fail "the crash came too late, everything was written"
    verify_files "after the crash, $name" "$mnt/crash/$name" "$tree/$name.sums"
done </run/vm/promised
mkdir "$mnt/later"
unpack "$tree/part-00.tar" "$mnt/later"
sync -f "$mnt"

step "the dead node returns and catches up"
return_node nodo1
wait_for in_sync 600
check_equal "role of the returned" "Secondary" "$(node_role nodo1)"
check_equal "role of the one in charge" "Primary" "$(node_role nodo2)"
check_equal "KiB out of sync" 0 "$(node_out_of_sync_kib nodo2)"
within 120 umount "$mnt"
disks_equal "after the return"

step "both go down"
on nodo2 secondary $RES
for node in nodo1 nodo2; do
    on $node down $RES
    stop_node $node
done
wait_for no_device_left 20
check "no device is left behind" no_device_left
passed
