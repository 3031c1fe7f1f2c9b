# shellcheck shell=bash
# Sourced by every script that runs in a test VM:  . "${0%/*}/../lib.sh"
#
# A failing command ends the script, and the line is shown. Nothing waits without a limit:
# use `wait_for`, `within`. Disks live in memory under $VM_RUN (/run/vm) and go with the VM.
# Status 77 (`skip`) means that the script cannot run here.

set -Eeuo pipefail

VM_KIT=${VM_KIT:-$(cd "${BASH_SOURCE[0]%/*}" && pwd)}
# Scratch of a script. A script that needs no VM (power_cuts.sh) is given another place.
VM_RUN=${VM_RUN:-/run/vm}
VM_STEP=start
VM_CHECKS=0
SECONDS=0

# --- what the log says ------------------------------------------------------

# Seconds since the script began stand in front of each line.
log() { printf '%4d  %s\n' "$SECONDS" "$*"; }

# Names what follows; a failure is reported under this name.
step() {
    VM_STEP=$*
    printf '%4d  == %s\n' "$SECONDS" "$*"
}

fail() {
    trap - ERR
    log "FAILED in step '$VM_STEP': $*"
    vm_on_fail || true
    exit 1
}

skip() {
    trap - ERR
    log "skipped: $*"
    exit 77
}

# A script may define this to show more (logs, states) when it fails.
vm_on_fail() { :; }

vm_error() {
    local status=$1 command=$2 line=$3 file=$4 frame
    # Within $(...) the shell that holds the script reports it too, with the line that matters.
    ((BASH_SUBSHELL == 0)) || exit "$status"
    trap - ERR
    log "FAILED in step '$VM_STEP': ${file##*/}:$line: status $status: $command"
    for ((frame = 1; frame < ${#FUNCNAME[@]} - 1; frame++)); do
        log "    called from ${BASH_SOURCE[frame + 1]##*/}:${BASH_LINENO[frame]}"
    done
    vm_on_fail || true
    exit "$((status == 77 ? 1 : status))"
}
trap 'vm_error $? "$BASH_COMMAND" "$LINENO" "${BASH_SOURCE[0]}"' ERR

# check WHAT COMMAND…: the command must succeed; its output is shown when it does not.
check() {
    local what=$1 output
    shift
    if output=$("$@" 2>&1); then
        VM_CHECKS=$((VM_CHECKS + 1))
        log "ok: $what"
    else
        printf '%s\n' "$output" | sed 's/^/      | /'
        fail "$what ($*)"
    fi
}

# check_equal WHAT WANTED GOT
check_equal() {
    [[ $2 == "$3" ]] || fail "$1: wanted '$2', got '$3'"
    VM_CHECKS=$((VM_CHECKS + 1))
    log "ok: $1: $3"
}

# A script that ends without having checked anything proves nothing, so that is an error.
passed() {
    ((VM_CHECKS > 0)) || fail "nothing was checked"
    log "passed, $VM_CHECKS checks"
}

# --- waiting ----------------------------------------------------------------

# wait_for 'CONDITION' SECONDS: evaluates until true; the condition's errors are not shown.
wait_for() {
    local condition=$1 limit=$2 end
    end=$((SECONDS + limit))
    until (trap - ERR; eval "$condition") &>/dev/null; do
        ((SECONDS < end)) || fail "not within $limit s: $condition"
        sleep 0.2
    done
}

# within SECONDS COMMAND…: for programs that might hang; status 124 when they do.
within() { timeout --kill-after=5 "$@"; }

# --- two VMs ----------------------------------------------------------------

# The VMs of one run2 meet at named points. `signal NAME [TEXT]` once, `wait_signal NAME SECONDS`
# prints the text.
signal() {
    printf '%s' "${2:-}" >"$VM_SHARE/signals/$1.new.$VM_NODE"
    mv "$VM_SHARE/signals/$1.new.$VM_NODE" "$VM_SHARE/signals/$1"
}
wait_signal() {
    # Listing the directory makes 9p look again.
    wait_for "ls '$VM_SHARE/signals' | grep -qx '$1'" "$2"
    cat "$VM_SHARE/signals/$1"
}

# --- modules and disks ------------------------------------------------------

modules() {
    local module
    for module in "$@"; do
        within 60 modprobe "$module" || fail "modprobe $module"
    done
}

# loop_disk NAME MIB: a zeroed sparse disk in memory; prints its device. The same NAME gives
# the same file $VM_RUN/NAME.img.
loop_disk() {
    truncate -s "$2M" "$VM_RUN/$1.img"
    loop_attach "$VM_RUN/$1.img"
}

loop_attach() {
    [[ -e /dev/loop-control ]] || modules loop
    losetup --find --show "$1"
}

# volume NAME MIB VG LV: an LVM volume on a loop disk of its own; prints /dev/VG/LV.
# There is no udev here, so LVM makes the device nodes itself.
volume() {
    local disk
    modules dm-mod
    disk=$(loop_disk "$1" "$(($2 + 8))")
    {
        lvm_quiet pvcreate "$disk"
        lvm_quiet vgcreate "$3" "$disk"
        lvm_quiet lvcreate -n "$4" -L "$2M" "$3"
    } >&2
    [[ -b /dev/$3/$4 ]] || fail "LVM made no /dev/$3/$4"
    echo "/dev/$3/$4"
}

lvm_quiet() {
    within 60 lvm "$@" --yes --config \
        'activation { udev_sync=0 udev_rules=0 } devices { obtain_device_list_from_udev=0 }'
}

# --- trees and checksums ----------------------------------------------------

# tree_sums DIR: one line per file, link and directory, sorted: kind, mode, size or target, path, sha256.
tree_sums() {
    (
        cd "$1"
        find . -mindepth 1 -path ./lost+found -prune -o -type f -print0 | sort -z | xargs -0 -r -n 500 sha256sum
        find . -mindepth 1 -path ./lost+found -prune -o -type l -printf 'l %p -> %l\n' | sort
        find . -mindepth 1 -path ./lost+found -prune -o -printf '%y %m %p\n' | sort
    )
}

# DRBD and lockstep write below the page cache of a disk's own device node, so whoever reads
# that node must drop what an earlier reader left there.
fresh() {
    local device
    for device in "$@"; do
        [[ ! -b $device ]] || blockdev --flushbufs "$device"
    done
}

# device_sum DEVICE BYTES: sha256 of the first BYTES.
device_sum() {
    fresh "$1"
    head -c "$2" "$1" | sha256sum | cut -d' ' -f1
}

# same_bytes A B BYTES: compares the first BYTES of two devices or files.
same_bytes() {
    fresh "$1" "$2"
    cmp -n "$3" "$1" "$2"
}
differ_bytes() { ! same_bytes "$@" >/dev/null; }
