"""What is measured: a disk over files in RAM and the processes behind it. Here are the plain file and QEMU; lockstep is in
`lockstep.py`, GlusterFS in `gluster.py`.

Replication goes over TCP within the machine for every peer that replicates, `QemuUnix` excepted. All but GlusterFS serve
NBD on a unix socket.
"""

import json
import os
import socket
import time

from procs import BenchError, wait_for

HOST = "127.0.0.1"
CHUNK = 1 << 20


def free_port():
    """A TCP port of the loopback address that nobody uses now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def make_file(path, size, content="zero"):
    """A file whose pages are all there, so that no peer pays for their allocation while it is measured. `content`: "zero",
    "random", or "sparse" for one without any pages."""
    with open(path, "wb") as file:
        if content == "sparse":
            file.truncate(size)
        else:
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


def nbd_target(export, path):
    """What tells fio of an NBD export on a unix socket."""
    return ["--ioengine=nbd", f"--uri=nbd+unix:///{export}?socket={path}"]


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
        self.target = nbd_target(export, path)

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
