# shellcheck shell=bash
# The words of lockstep.sh, spoken to the kernel's DRBD 8.4: the same scripts then show what
# DRBD itself does. Sourced by lockstep.sh when NODES_BY=kernel.
. "$VM_KIT/kernel_drbd.sh"

declare -A KERNEL_DISK=()

nodes_load() {
    kernel_drbd_load
    NODE_DEVICE_PREFIX=/dev/drbd
}
nodes_configure() { KERNEL_DISK=([nodo1]=$1 [nodo2]=$2); }
start_node() { :; }
stop_node() { :; }

kernel_node_up() {
    local minor=${1#nodo} own peer
    read -r own peer < <(kernel_ports "$minor")
    kernel_attach "r$minor" "$minor" "${KERNEL_DISK[$1]}"
    kernel_connect "r$minor" "$own" "$peer"
}

on() {
    local minor=${1#nodo}
    case ${*:2} in
    "create-md $RES") kernel_create_md "$minor" "${KERNEL_DISK[$1]}" ;;
    "up $RES") kernel_node_up "$1" ;;
    "-- --overwrite-data-of-peer primary $RES") within 60 drbdsetup primary "$minor" --force ;;
    "primary $RES") within 60 drbdsetup primary "$minor" ;;
    "secondary $RES") within 60 drbdsetup secondary "$minor" ;;
    "down $RES") kernel_down "r$minor" ;;
    "role $RES") kernel_field "$minor" ro ;;
    "dstate $RES") kernel_field "$minor" ds ;;
    "cstate $RES") kernel_field "$minor" cs ;;
    "disconnect $RES") kernel_disconnect "$minor" ;;
    status*) kernel_state "$minor" ;;
    *) fail "kernel_nodes.sh does not know '${*:2}'" ;;
    esac
}

# Ports of the replication link, own and peer's, by minor.
kernel_ports() { if (($1 == 1)); then echo 7789 7790; else echo 7790 7789; fi; }

kernel_disconnect() {
    local own peer
    read -r own peer < <(kernel_ports "$1")
    within 60 drbdsetup disconnect "ipv4:127.0.0.1:$own" "ipv4:127.0.0.1:$peer" --force
}

# A kernel cannot be killed alone, so the node loses its disk and then its peer: its users see
# IO errors, and its metadata stays as a crash would leave it. The peer listens again only when
# the node returns, or the diskless Primary would find it.
crash_node() {
    local minor=${1#nodo}
    within 60 drbdsetup detach "$minor" --force
    [[ -z $(kernel_state $((3 - minor))) ]] || kernel_disconnect $((3 - minor))
}
bury_node() { kernel_down "r${1#nodo}"; }

return_node() {
    local minor=${1#nodo} own peer
    within 60 drbdsetup secondary "$minor"
    kernel_down "r$minor"
    kernel_node_up "$1"
    read -r own peer < <(kernel_ports $((3 - minor)))
    kernel_connect "r$((3 - minor))" "$own" "$peer"
}

node_out_of_sync_kib() { kernel_field "${1#nodo}" oos; }
no_device_left() { ! grep -q cs: /proc/drbd; }
nodes_report() {
    cat /proc/drbd
    dmesg | tail -n 30
}
