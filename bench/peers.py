"""The peers of the comparison. Each serves a disk over files in RAM, and knows its processes.

Replication goes over TCP within the machine for every peer that replicates, `QemuUnix` excepted. All but GlusterFS
(`gluster.py`) serve NBD on a unix socket.
"""

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass

from procs import BenchError, wait_for

HERE = os.path.dirname(os.path.abspath(__file__))
HOST = "127.0.0.1"
CHUNK = 1 << 20


def free_port():
    """A TCP port of the loopback address that nobody uses now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def make_file(path, size, content="zero"):
    """A file whose pages are all there, so that no peer pays for their allocation while it is measured. `content`: "zero"
    or "random"."""
    with open(path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)
        if content == "random":
            noise = os.urandom(16 * CHUNK)
            for at in range(0, size, len(noise)):
                file.write(noise[: size - at])
    return path


def require_equal(name, one, other, size, zeroes=False):
    """Both files hold the same in their first `size` bytes: nothing but zeroes, or anything else."""
    written = False
    with open(one, "rb") as left, open(other, "rb") as right:
        for at in range(0, size, CHUNK):
            block = left.read(min(CHUNK, size - at))
            if block != right.read(len(block)):
                raise BenchError(f"{name}: the two disks differ in the MiB at {at}")
            written = written or block.strip(b"\0") != b""
    if written == zeroes:
        raise BenchError(f"{name}: {'not all is zero' if zeroes else 'nothing was written'}")


class Peer:
    """What all peers have in common."""

    name = ""
    about = ""

    def __init__(self, processes, folder, size):
        self.processes = processes
        self.folder = os.path.join(folder, self.name)
        self.size = size
        self.pids = {}
        # What tells fio where the disk is. Known once it runs.
        self.target = []
        # What the disks hold at the start, the first and the second one.
        self.contents = ("zero", "zero")
        os.mkdir(self.folder)

    def path(self, name):
        """A path in this peer's folder."""
        return os.path.join(self.folder, name)

    def start_process(self, role, command):
        """Starts a process that is measured as `role`."""
        process = self.processes.start(f"{self.name}-{role}", command)
        self.pids[role] = process.pid
        return process

    def wait_socket(self, role, path, process):
        """Waits until `path` accepts connections."""

        def accepts():
            with socket.socket(socket.AF_UNIX) as probe:
                try:
                    probe.connect(path)
                except OSError:
                    return False
                return True

        try:
            wait_for(f"{path} of {self.name}", 20, accepts, process)
        except BenchError as error:
            raise BenchError(f"{error}\n{self.processes.tail(f'{self.name}-{role}')}") from error

    def serves_nbd(self, export, path):
        """The disk is an NBD export on a unix socket."""
        self.target = ["--ioengine=nbd", f"--uri=nbd+unix:///{export}?socket={path}"]

    def start(self):
        """Starts it, to where `target` can be measured."""
        raise NotImplementedError

    def verify(self, zeroes=False):
        """After the last job: the promise of a mirror held. `zeroes`: it was to hold nothing else."""


class Nbdkit(Peer):
    """The ceiling: one process, one file, no replication."""

    name = "nbdkit"
    about = "nbdkit file, not replicated (the ceiling)"

    def start(self):
        disk = make_file(self.path("disk"), self.size)
        path = self.path("sock")
        command = ["nbdkit", "--foreground", "--unix", path, "file", disk]
        self.wait_socket("server", path, self.start_process("server", command))
        self.serves_nbd("", path)


class Qmp:
    """A connection to a QEMU monitor."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(20)
        self.socket.connect(path)
        self.file = self.socket.makefile("rw", encoding="utf-8")
        self.file.readline()
        self.call("qmp_capabilities")

    def call(self, command, **arguments):
        """Runs a command; gives what it returns."""
        self.file.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self.file.flush()
        while True:
            line = self.file.readline()
            if not line:
                raise BenchError(f"QEMU's monitor closed during {command}")
            message = json.loads(line)
            if "error" in message:
                raise BenchError(f"QEMU refused {command}: {message['error']['desc']}")
            if "return" in message:
                return message["return"]


class Qemu(Peer):
    """QEMU's own mirror: storage daemon A writes its disk and, over NBD, the disk of storage daemon B."""

    name = "qemu"
    about = "qemu-storage-daemon, blockdev-mirror write-blocking, NBD in and out"

    def __init__(self, processes, folder, size, aio):
        super().__init__(processes, folder, size)
        self.aio = aio
        # How long the initial mirror took.
        self.mirror_seconds = 0.0
        self.port = free_port()

    def link(self, option):
        """The options that name the address of B's server, for the side that wants them under `option`."""
        return f"{option}.type=inet,{option}.host={HOST},{option}.port={self.port}"

    def wait_link(self, process):
        """Waits until B's server accepts connections."""

        def listens():
            with socket.socket() as probe:
                return probe.connect_ex((HOST, self.port)) == 0

        wait_for("the NBD server of qemu's second daemon", 20, listens, process)

    def disk(self, name):
        """The option of a raw file in RAM."""
        make_file(self.path(name), self.size, self.contents["ab".index(name)])
        # Linux-native AIO only works without the page cache; for the others the cache of a file in RAM is the file.
        direct = "on" if self.aio == "native" else "off"
        return f"driver=file,node-name=disk,filename={self.path(name)},aio={self.aio},cache.direct={direct}"

    def start(self):
        command = ["qemu-storage-daemon", "--blockdev", self.disk("b"), "--nbd-server", self.link("addr")]
        command += ["--export", "type=nbd,id=out,node-name=disk,name=mirror,writable=on"]
        self.wait_link(self.start_process("secondary", command))

        path, monitor = self.path("sock"), self.path("qmp")
        command = ["qemu-storage-daemon", "--blockdev", self.disk("a")]
        command += ["--blockdev", f"driver=nbd,node-name=peer,export=mirror,{self.link('server')}"]
        command += ["--nbd-server", f"addr.type=unix,addr.path={path}"]
        command += ["--export", "type=nbd,id=in,node-name=disk,name=disk,writable=on"]
        command += ["--chardev", f"socket,id=qmp,path={monitor},server=on,wait=off", "--monitor", "chardev=qmp"]
        self.wait_socket("primary", path, self.start_process("primary", command))

        qmp = Qmp(monitor)
        begin = time.monotonic()
        # The job puts its filter between the export and the disk, as it does under a running machine.
        qmp.call(
            "blockdev-mirror",
            **{"job-id": "mirror", "device": "disk", "target": "peer", "sync": "full", "copy-mode": "write-blocking"},
        )
        wait_for("qemu's mirror to be ready", 600, lambda: qmp.call("query-jobs")[0]["status"] == "ready")
        self.mirror_seconds = time.monotonic() - begin
        self.qmp = qmp
        self.serves_nbd("disk", path)

    def verify(self, zeroes=False):
        jobs = self.qmp.call("query-jobs")
        if [job["status"] for job in jobs] != ["ready"]:
            raise BenchError(f"qemu: the mirror is no longer ready: {jobs}")
        require_equal(self.name, self.path("a"), self.path("b"), self.size, zeroes)


class QemuUnix(Qemu):
    """The same mirror with its daemons joined by a unix socket, which no two machines can have.

    Before 8.1, QEMU's NBD server lets TCP hold back small replies, so that several requests in flight wait for 40 ms
    timers (p50 of about 44 ms at depth 32). This peer shows what its mirror costs without that.
    """

    name = "qemu-unix"
    about = "the same, but the two daemons joined by a unix socket instead of TCP"

    def link(self, option):
        return f"{option}.type=unix,{option}.path={self.path('link')}"

    def wait_link(self, process):
        self.wait_socket("secondary", self.path("link"), process)


class Lockstep(Peer):
    """Two lockstep daemons."""

    resource = "bench"
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

    def start(self):
        self.start_nodes()
        self.verb(self.nodes[0], "primary", "--force", self.resource)
        wait_for("lockstep's disks to be UpToDate", 60, self.in_sync)
        self.export()

    def export(self):
        """Waits for the NBD server of the node that is Primary."""
        path = os.path.join(self.path(self.nodes[0]), f"{self.resource}.nbd.sock")
        wait_for("lockstep's NBD export", 20, lambda: os.path.exists(path))
        self.serves_nbd(self.resource, path)

    def start_nodes(self):
        """Both daemons with the resource up and connected, both Secondary."""
        # The metadata stands behind the data: 1 MiB is its log and superblock, the rest more than the bitmap needs.
        room = (4 << 20) + self.size // 16384
        ports = {node: free_port() for node in self.nodes}
        for node, content in zip(self.nodes, self.contents):
            os.mkdir(self.path(node))
            make_file(self.path(f"{node}.disk"), self.size + room, content)
        # What the other node has to call to reach a node.
        called = {node: self.delayed(node, port) for node, port in ports.items()}
        for node in self.nodes:
            config = self.path(f"{node}.conf")
            with open(config, "w", encoding="utf-8") as file:
                file.write(self.configuration({each: (ports if each == node else called)[each] for each in self.nodes}))
            self.must("-c", config, "--node", node, "create-md", "--force", self.resource)
            command = [self.program, "daemon", "-c", config, "--node", node, "--run-dir", self.path(node), "--no-mlock"]
            role = "primary" if node == self.nodes[0] else "secondary"
            process = self.start_process(role, command)
            try:
                wait_for(f"the daemon of {node}", 20, lambda node=node: self.answers(node), process)
            except BenchError as error:
                raise BenchError(f"{error}\n{self.processes.tail(f'{self.name}-{role}')}") from error
        for node in self.nodes:
            self.verb(node, "up", self.resource)
        wait_for("lockstep's nodes to meet", 20, lambda: self.link()["connection-state"] == "Connected")

    def delayed(self, node, port):
        """The port of a proxy in front of a node's, if the link has a delay."""
        if self.round_trip_ms is None:
            return port
        proxy = free_port()
        command = [sys.executable, os.path.join(HERE, "delay.py"), str(proxy), str(port), str(self.round_trip_ms)]
        self.processes.start(f"{self.name}-delay-{node}", command)
        return proxy

    def configuration(self, ports):
        """The resource, with these ports of the nodes."""
        hosts = ""
        for at, node in enumerate(self.nodes):
            hosts += f"    on {node} {{\n        device /dev/drbd{950 + at};\n        disk {self.path(f'{node}.disk')};\n"
            hosts += f"        address {HOST}:{ports[node]};\n        meta-disk internal;\n    }}\n"
        extra = "".join(f"    {line}\n" for line in self.statements)
        head = f"    protocol {self.variant.protocol};\n    net {{ connect-int 1; }}\n"
        front_end = f"    lockstep {{ front-end nbd; spin-us {self.variant.spin_us}; }}\n"
        return f"resource {self.resource} {{\n{head}{front_end}{extra}{hosts}}}\n"

    def link(self):
        """What the primary says of its connection."""
        return json.loads(self.verb(self.nodes[0], "status", "--json", self.resource))[0]["connections"][0]

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
        return self.command("--run-dir", self.path(node), "role", self.resource).returncode != 20

    def settle(self):
        """Waits until the peer has what was answered before it had it (protocol A and B)."""
        wait_for("lockstep's peer to have everything", 60, lambda: self.link()["ap-in-flight"] == 0)

    def in_sync(self):
        """Both disks UpToDate and nothing left to copy, as the primary sees it."""
        done = self.command("--run-dir", self.path(self.nodes[0]), "status", "--json", self.resource)
        if done.returncode != 0:
            return False
        status = json.loads(done.stdout)[0]
        device = status["devices"][0]
        links = [volume for link in status["connections"] for volume in link["peer_devices"]]
        return device["disk-state"] == "UpToDate" and any(
            volume["peer-disk-state"] == "UpToDate"
            and volume["replication-state"] == "Established"
            and volume["out-of-sync"] == 0
            for volume in links
        )

    def verify(self, zeroes=False):
        if not self.in_sync():
            raise BenchError("lockstep: no longer in sync after the last job")
        require_equal(self.name, *(self.path(f"{node}.disk") for node in self.nodes), self.size, zeroes)


@dataclass(frozen=True)
class Variant:
    """How lockstep is configured, and under which name that is measured."""

    name: str
    about: str
    protocol: str = "C"
    spin_us: int = 0


SPIN_US = 30
VARIANTS = {
    it.name: it
    for it in (
        Variant("lockstep", "two lockstep daemons, protocol C, NBD front end"),
        Variant("lockstep-spin", f"the same, spin-us {SPIN_US}", spin_us=SPIN_US),
        Variant("lockstep-b", "the same, protocol B", protocol="B"),
        Variant("lockstep-a", "the same, protocol A", protocol="A"),
        Variant("baseline", "the lockstep given with --baseline, protocol C"),
    )
}
