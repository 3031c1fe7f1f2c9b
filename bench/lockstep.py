"""Two lockstep daemons with one resource or several, as a peer of the comparison."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass

from peers import HOST, Peer, free_port, make_file, nbd_target, require_equal
from procs import BenchError, wait_for

HERE = os.path.dirname(os.path.abspath(__file__))
FIRST_MINOR = 900


@dataclass(frozen=True)
class Variant:
    """How lockstep is configured, and under which name that is measured."""

    name: str
    about: str
    protocol: str = "C"
    spin_us: int | None = None


VARIANTS = {
    it.name: it
    for it in (
        Variant("lockstep", "two lockstep daemons, protocol C, NBD front end"),
        Variant("lockstep-nospin", "the same, spin-us 0", spin_us=0),
        Variant("lockstep-b", "the same, protocol B", protocol="B"),
        Variant("lockstep-a", "the same, protocol A", protocol="A"),
        Variant("baseline", "the lockstep given with --baseline, protocol C"),
    )
}


class Lockstep(Peer):
    """A pair. What may be set before it is started: `contents`, `round_trip_ms`, `resources`."""

    nodes = ("alice", "bob")

    def __init__(self, processes, folder, size, program, variant, statements=()):
        self.name = variant.name
        self.about = variant.about
        super().__init__(processes, folder, size)
        self.program = program
        self.variant = variant
        self.statements = statements
        # Of the link between the nodes; None: as fast as it is.
        self.round_trip_ms = None
        self.resources = ["bench"]
        # What tells fio where each of them is.
        self.targets = []

    def start(self):
        self.start_nodes()
        if "sparse" in self.contents:
            # Both are empty: nothing needs to be copied, and the largest could not be.
            self.verb(self.nodes[0], "new-current-uuid", "--clear-bitmap", "all")
            self.verb(self.nodes[0], "primary", "all")
        else:
            self.verb(self.nodes[0], "primary", "--force", "all")
        wait_for("lockstep's disks to be UpToDate", 60, self.in_sync)
        self.export()

    def export(self):
        """Waits for the NBD servers of the node that is Primary."""
        for resource in self.resources:
            path = os.path.join(self.path(self.nodes[0]), f"{resource}.nbd.sock")
            wait_for("lockstep's NBD export", 20, lambda path=path: os.path.exists(path))
            self.targets.append(nbd_target(resource, path))
        self.target = self.targets[0]

    def start_nodes(self):
        """Both daemons with the resources up and connected, all Secondary."""
        # The metadata stands behind the data: 1 MiB is its log and superblock, the rest more than the bitmap needs.
        room = (4 << 20) + self.size // 16384
        ports = {node: [free_port() for _ in self.resources] for node in self.nodes}
        for node, content in zip(self.nodes, self.contents):
            os.mkdir(self.path(node))
            for resource in self.resources:
                make_file(self.path(f"{node}.{resource}.disk"), self.size + room, content)
        # What the other node has to call to reach a node.
        called = {node: [self.delayed(node, port) for port in ports[node]] for node in self.nodes}
        for node in self.nodes:
            config = self.path(f"{node}.conf")
            with open(config, "w", encoding="utf-8") as file:
                seen = {each: (ports if each == node else called)[each] for each in self.nodes}
                file.write("".join(self.configuration(at, seen) for at in range(len(self.resources))))
            for resource in self.resources:
                self.must("-c", config, "--node", node, "create-md", "--force", resource)
            command = [self.program, "daemon", "-c", config, "--node", node, "--run-dir", self.path(node), "--no-mlock"]
            role = "primary" if node == self.nodes[0] else "secondary"
            process = self.start_process(role, command)
            try:
                wait_for(f"the daemon of {node}", 20, lambda node=node: self.answers(node), process)
            except BenchError as error:
                raise BenchError(f"{error}\n{self.processes.tail(f'{self.name}-{role}')}") from error
        for node in self.nodes:
            self.verb(node, "up", "all")
        wait_for("lockstep's nodes to meet", 20, self.connected)

    def delayed(self, node, port):
        """The port of a proxy in front of a node's, if the link has a delay."""
        if self.round_trip_ms is None:
            return port
        proxy = free_port()
        command = [sys.executable, os.path.join(HERE, "delay.py"), str(proxy), str(port), str(self.round_trip_ms)]
        self.processes.start(f"{self.name}-delay-{node}", command)
        return proxy

    def configuration(self, number, ports):
        """One of the resources, with these ports of the nodes."""
        resource, hosts = self.resources[number], ""
        for at, node in enumerate(self.nodes):
            disk = self.path(f"{node}.{resource}.disk")
            minor = FIRST_MINOR + 2 * number + at
            hosts += f"    on {node} {{\n        device /dev/drbd{minor};\n        disk {disk};\n"
            hosts += f"        address {HOST}:{ports[node][number]};\n        meta-disk internal;\n    }}\n"
        extra = "".join(f"    {line}\n" for line in self.statements)
        head = f"    protocol {self.variant.protocol};\n    net {{ connect-int 1; }}\n"
        spin = "" if self.variant.spin_us is None else f" spin-us {self.variant.spin_us};"
        front_end = f"    lockstep {{ front-end nbd;{spin} }}\n"
        return f"resource {resource} {{\n{head}{front_end}{extra}{hosts}}}\n"

    def status(self):
        """What the primary says of every resource."""
        return json.loads(self.verb(self.nodes[0], "status", "--json"))

    def links(self):
        """What the primary says of its connections."""
        return [resource["connections"][0] for resource in self.status()]

    def connected(self):
        """Every connection is up."""
        return all(link["connection-state"] == "Connected" for link in self.links())

    def command(self, *arguments):
        """Runs the command to its end."""
        command = [self.program, *arguments]
        nothing = subprocess.DEVNULL
        return subprocess.run(command, stdin=nothing, capture_output=True, text=True, timeout=60, check=False)

    def must(self, *arguments):
        """Runs the command, which has to succeed."""
        done = self.command(*arguments)
        if done.returncode != 0:
            text = (done.stderr or done.stdout).strip()
            raise BenchError(f"`lockstep {' '.join(arguments)}` ended with {done.returncode}: {text}")
        return done.stdout

    def verb(self, node, *arguments):
        """Runs a verb on a node's daemon."""
        return self.must("--run-dir", self.path(node), *arguments)

    def answers(self, node):
        """A daemon that answers may say that the resource is not up; 20 says that nobody answers."""
        return self.command("--run-dir", self.path(node), "role", self.resources[0]).returncode != 20

    def settle(self):
        """Waits until the peer has what was answered before it had it (protocol A and B)."""
        done = lambda: all(link["ap-in-flight"] == 0 for link in self.links())  # noqa: E731
        wait_for("lockstep's peer to have everything", 60, done)

    def in_sync(self):
        """All disks UpToDate and nothing left to copy, as the primary sees it."""
        for resource in self.status():
            peer = resource["connections"][0]["peer_devices"][0]
            if (
                resource["devices"][0]["disk-state"] != "UpToDate"
                or peer["peer-disk-state"] != "UpToDate"
                or peer["replication-state"] != "Established"
                or peer["out-of-sync"] != 0
            ):
                return False
        return True

    def verify(self, zeroes=False):
        self.settle()
        if not self.in_sync():
            raise BenchError("lockstep: no longer in sync after the last job")
        for resource in self.resources:
            disks = [self.path(f"{node}.{resource}.disk") for node in self.nodes]
            require_equal(self.name, *disks, self.size, zeroes)
