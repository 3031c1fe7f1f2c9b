#!/bin/bash
# First thing that runs in the guest: `guest_entry.sh DIR`. Makes the place tidy, runs the
# job that DIR/job names with its output in DIR/log, and writes its status to DIR/status.
# The VM powers off when this ends.
dir=$1
. "$dir/env"
exec 3>&- # the init leaves its console open there
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8

finish() {
    # Written under another name first: the host must never read half a status.
    echo "$1" >"$dir/status.new" && mv "$dir/status.new" "$dir/status"
    sync -f "$dir/status"
    # Not a clean shutdown on purpose: a stuck device must not keep the VM alive.
    echo o >/proc/sysrq-trigger
    sleep 60
}

: >"$dir/booted"
# The runner normally ends an overlong run. This is for the case that it is gone.
(sleep "$VM_TIMEOUT_S" && echo o >/proc/sysrq-trigger) </dev/null &>/dev/null &

hostname "$VM_NAME"
mkdir -p /run/vm
mount -t tmpfs -o size=100% vm /run/vm || finish 125

if [[ -n ${VM_ADDRESS:-} ]]; then
    modprobe virtio_net && ip link set eth0 up && ip addr add "$VM_ADDRESS/24" dev eth0 || finish 125
fi

eval "set -- $(cat "$dir/job")"
cd /run/vm || finish 125
if [[ -x $1 ]]; then "$@"; else bash "$@"; fi </dev/null &>"$dir/log"
finish $?
