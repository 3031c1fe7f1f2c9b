# shellcheck shell=bash
# Two lockstep nodes in one VM, sourced after lib.sh. Every name of a program, verb or file
# that lockstep could rename is in this file and nowhere else in the scripts.
#
# Nodes are called nodo1 and nodo2 as in the example that users bring. They share the host
# name and /dev, so each has its own --run-dir and its own device name in the configuration.
# $NODES_BY chooses who serves them: `lockstep`, or `kernel` for DRBD 8.4 behind the same
# words (kernel_nodes.sh), which tells a fault of a script from one of lockstep.

LOCKSTEP_BIN_DIR=${LOCKSTEP_BIN_DIR:-$VM_KIT/../../target/release}
LOCKSTEP_CONF=$VM_RUN/drbd.conf
# How the Primary offers its device, and the port of the first node; the second has the next one.
NODES_FRONTEND=${NODES_FRONTEND:-ublk}
NODES_PORT=${NODES_PORT:-7789}
RES=web-root
declare -A NODE_PID=()

nodes_load() {
    [[ -x $LOCKSTEP_BIN_DIR/lockstep ]] || skip "no program $LOCKSTEP_BIN_DIR/lockstep"
    if [[ $NODES_FRONTEND == ublk ]]; then
        modules ublk_drv
        wait_for '[[ -c /dev/ublk-control ]]' 10
    fi
    local name
    mkdir -p "$VM_RUN/bin"
    for name in lockstep lockstepd drbdadm drbdsetup drbdmeta; do
        ln -sf "$LOCKSTEP_BIN_DIR/lockstep" "$VM_RUN/bin/$name"
    done
    NODE_DEVICE_PREFIX=/dev/drbd
}

# The device a node's Primary offers: node_device nodo1
node_device() { echo "$NODE_DEVICE_PREFIX${1#nodo}"; }

# nodes_configure DISK1 DISK2: the example's configuration, on one machine. $NODES_DISK and $NODES_NET hold further
# options of the disks and of the connection, $NODES_MORE further statements, $NODES_SYNCER another pace of resyncs,
# $NODES_PROTOCOL another protocol than C.
nodes_configure() {
    cat >"$LOCKSTEP_CONF" <<EOF
common {
    syncer { ${NODES_SYNCER-rate 40M;} }
}

resource $RES {
    protocol ${NODES_PROTOCOL:-C};
    ${NODES_DISK:+disk { $NODES_DISK \}}
    ${NODES_NET:+net { $NODES_NET \}}
    ${NODES_MORE:-}
    on nodo1 {
        device $(node_device nodo1);
        disk $1;
        address 127.0.0.1:$NODES_PORT;
        meta-disk internal;
    }
    on nodo2 {
        device $(node_device nodo2);
        disk $2;
        address 127.0.0.1:$((NODES_PORT + 1));
        meta-disk internal;
    }
}
EOF
}

# on NODE WORDS…: drbdadm as its operator types it on that node: `on nodo1 up web-root`
on() {
    LOCKSTEP_NODE=$1 LOCKSTEP_RUN_DIR=$VM_RUN/$1 within "${VERB_LIMIT_S:-120}" \
        "$VM_RUN/bin/drbdadm" -c "$LOCKSTEP_CONF" "${@:2}"
}

start_node() {
    mkdir -p "$VM_RUN/$1"
    "$VM_RUN/bin/lockstepd" --node "$1" --run-dir "$VM_RUN/$1" -c "$LOCKSTEP_CONF" --frontend "$NODES_FRONTEND" \
        </dev/null >>"$VM_DIR/$1.log" 2>&1 &
    NODE_PID[$1]=$!
    # Any verb that the daemon must answer will do; status of nothing is fine.
    wait_for "on $1 status" 30
}

# Both nodes with fresh disks, up and connected, as an operator makes them the first time: nodes_create [create-md OPTIONS]
nodes_create() {
    local node
    for node in nodo1 nodo2; do
        start_node $node
        on $node create-md "$@" "$RES"
        on $node up "$RES"
    done
    wait_for '[[ $(node_conn nodo1) =~ ^(Connected|Established)$ ]]' 60
}

# A polite end: SIGTERM, and the daemon must be gone within the limit.
stop_node() {
    local pid=${NODE_PID[$1]}
    kill -TERM "$pid"
    wait_for "! kill -0 $pid" 60
    wait "$pid" || fail "the daemon of $1 ended with status $?"
}

# The node dies: no goodbye to the peer, nothing written after this.
crash_node() {
    local pid=${NODE_PID[$1]}
    kill -KILL "$pid"
    wait "$pid" || true
}

# Removes what a dead node left in the kernel, as its reboot would.
bury_node() { wait_for "[[ ! -b $(node_device "$1") ]]" 30; }

# Brings a crashed node back as the same machine would after a reboot.
return_node() {
    start_node "$1"
    on "$1" up "$RES"
}

# First word of the answers: role Primary/Secondary, own disk UpToDate/…, connection Connected/…
node_role() { on "$1" role "$RES" | head -1 | cut -d/ -f1; }
node_disk() { on "$1" dstate "$RES" | head -1 | cut -d/ -f1; }
node_peer_disk() { on "$1" dstate "$RES" | head -1 | cut -d/ -f2; }
node_conn() { on "$1" cstate "$RES" | head -1; }

# Both sides agree that everything is mirrored.
in_sync() {
    local node
    for node in nodo1 nodo2; do
        [[ $(node_conn $node) =~ ^(Connected|Established)$ ]] || return 1
        [[ $(node_disk $node) == UpToDate && $(node_peer_disk $node) == UpToDate ]] || return 1
    done
}

# KiB that a node still owes its peer, or nothing when it does not say.
node_out_of_sync_kib() { on "$1" status "$RES" --verbose --statistics | sed -n 's/.*out-of-sync:\([0-9]*\).*/\1/p' | head -1; }

# The identifiers on a disk that no node uses: disk_gi DISK
disk_gi() { within 60 "${NODES_DRBDMETA:-$VM_RUN/bin/drbdmeta}" - v08 "$1" internal get-gi; }

# After `down` on both nodes nothing of theirs may be left in /dev.
no_device_left() {
    local node
    for node in nodo1 nodo2; do
        [[ ! -e $(node_device $node) ]] || return 1
    done
    ! compgen -G '/dev/ublkb*' >/dev/null
}

nodes_report() {
    local node
    for node in nodo1 nodo2; do
        on "$node" status || true
        tail -n 30 "$VM_DIR/$node.log" 2>/dev/null | sed "s/^/      $node| /" || true
    done
    dmesg | tail -n 15 | sed 's/^/      kernel| /'
}

if [[ ${NODES_BY:-lockstep} == kernel ]]; then
    . "$VM_KIT/kernel_nodes.sh"
fi
