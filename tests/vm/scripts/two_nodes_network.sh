#!/bin/bash
# For run2, in both VMs: the link between two VMs carries traffic and the meeting points work.
. "${0%/*}/../lib.sh"

step "the network"
check_equal "host name" "$VM_NAME" "$(hostname)"
signal "up-$VM_NODE" "$VM_ADDRESS"
check_equal "the peer is up with the address" "$VM_PEER_ADDRESS" "$(wait_signal "up-$((3 - VM_NODE))" 120)"
check "the peer answers" busybox ping -c 3 -w 20 "$VM_PEER_ADDRESS"

step "a stream"
head -c 4000000 /dev/zero | tr '\0' x >sent
if ((VM_NODE == 1)); then
    python3 - "$VM_ADDRESS" <<'PY' >received &
import socket, sys
server = socket.create_server((sys.argv[1], 7000))
peer = server.accept()[0]
while data := peer.recv(65536):
    sys.stdout.buffer.write(data)
PY
    server=$!
    wait_for "ss -ltn | grep -q :7000" 30
    signal listening
    wait "$server"
    check "it arrived whole" cmp sent received
else
    wait_signal listening 60
    within 60 bash -c "cat sent >/dev/tcp/$VM_PEER_ADDRESS/7000"
fi
signal "done-$VM_NODE"
wait_signal "done-$((3 - VM_NODE))" 60
passed
