"""GlusterFS with replica 2: two bricks in RAM, measured through its library (gfapi) and through a FUSE mount.

glusterd refuses loopback addresses, so it needs a network namespace with an address of its own (`procs.own_network`),
and root for the bricks' extended attributes. Nothing of it outlives the run: the bricks and the self-heal daemon, which
glusterd starts by itself and leaves running, are ended through `volume stop`.
"""

import os
import subprocess

from peers import Peer, make_file, require_equal
from procs import ADDRESS, BenchError, wait_for

VOLUME = "bench"
# glusterd's own port: its bricks look for it there, whatever it is told.
PORT = 24007


class GlusterServer:
    """glusterd, the volume and its bricks; shared by both ways to reach it."""

    def __init__(self, processes, folder):
        self.processes = processes
        self.folder = os.path.join(folder, "gluster")
        self.process = None
        self.pids = {}

    def path(self, name):
        """A path in this server's folder."""
        return os.path.join(self.folder, name)

    def start(self):
        """Once: the volume is started and has both bricks."""
        if self.process:
            return
        for name in ("work", "run", "brick-a", "brick-b"):
            os.makedirs(self.path(name))
        options = {
            "working-directory": self.path("work"),
            "run-directory": self.path("run"),
            "glusterd-sockfile": self.path("run/glusterd.socket"),
            "transport-type": "socket",
            "transport.socket.bind-address": ADDRESS,
            "transport.address-family": "inet",
        }
        with open(self.path("glusterd.vol"), "w", encoding="utf-8") as file:
            lines = "".join(f"    option {key} {value}\n" for key, value in options.items())
            file.write(f"volume management\n    type mgmt/glusterd\n{lines}end-volume\n")
        command = ["glusterd", "-N", "-f", self.path("glusterd.vol"), "-l", self.path("glusterd.log")]
        self.process = self.processes.start("glusterd", [*command, "-p", self.path("run/glusterd.pid")])
        wait_for("glusterd", 30, lambda: self.tell("pool", "list").returncode == 0, self.process)
        bricks = [f"{ADDRESS}:{self.path(name)}/brick" for name in ("brick-a", "brick-b")]
        self.must("volume", "create", VOLUME, "replica", "2", *bricks, "force")
        # Else its client tells a write done before any brick has it: less than protocol A promises.
        self.must("volume", "set", VOLUME, "performance.write-behind", "off")
        self.processes.at_end(lambda: self.tell("volume", "stop", VOLUME, "force"))
        self.must("volume", "start", VOLUME)
        for role, name in (("brick-a", "brick-a"), ("brick-b", "brick-b")):
            self.pids[role] = wait_for(f"the pid of {name}", 20, lambda name=name: self.pid_of(name))

    def pid_of(self, brick):
        """The process of a brick, from the file that glusterd asked it to write."""
        folder = self.path(f"run/vols/{VOLUME}")
        for name in os.listdir(folder) if os.path.isdir(folder) else ():
            if name.endswith(".pid") and brick in name:
                with open(os.path.join(folder, name), encoding="utf-8") as file:
                    return int(file.read().strip() or 0)
        return 0

    def tell(self, *arguments):
        """Runs the command line of GlusterFS."""
        command = ["gluster", "--mode=script", f"--glusterd-sock={self.path('run/glusterd.socket')}", *arguments]
        nothing = subprocess.DEVNULL
        try:
            return subprocess.run(command, stdin=nothing, capture_output=True, text=True, timeout=60, check=False)
        except subprocess.TimeoutExpired as error:
            raise BenchError(f"`{' '.join(command)}` did not end within 60 s") from error

    def must(self, *arguments):
        """The same, which has to succeed."""
        done = self.tell(*arguments)
        if done.returncode != 0:
            raise BenchError(f"gluster {' '.join(arguments)}: {(done.stderr or done.stdout).strip()}")


class Gluster(Peer):
    """What both ways share: a file on the volume, whose two copies are compared at the end."""

    disk = ""

    def __init__(self, processes, folder, size, server):
        super().__init__(processes, folder, size)
        self.server = server

    def mount(self, where):
        """Mounts the volume at `where`; gives the client's process."""
        os.makedirs(where, exist_ok=True)
        command = ["glusterfs", "--no-daemon", f"--volfile-server={ADDRESS}", f"--volfile-id={VOLUME}"]
        process = self.processes.start(f"{self.name}-fuse", [*command, f"--log-file={self.path('fuse.log')}", where])
        self.processes.at_end(lambda: subprocess.run(["umount", "--lazy", where], check=False, capture_output=True))
        wait_for(f"the mount of {self.name}", 20, lambda: os.path.ismount(where), process)
        return process

    def verify(self, zeroes=False):
        copies = [self.server.path(f"{brick}/brick/{self.disk}") for brick in ("brick-a", "brick-b")]
        require_equal(self.name, *copies, self.size, zeroes)


class GlusterFuse(Gluster):
    """Through the kernel: what a user of the file system has."""

    name = "gluster-fuse"
    about = "GlusterFS replica 2, FUSE mount"
    disk = "fuse.disk"

    def start(self):
        self.server.start()
        process = self.mount(self.path("mount"))
        disk = make_file(self.path(f"mount/{self.disk}"), self.size)
        self.pids = self.server.pids | {"client": process.pid}
        self.target = ["--ioengine=libaio", "--direct=1", f"--filename={disk}"]


class GlusterApi(Gluster):
    """Through the library, in fio's own process: what QEMU uses."""

    name = "gluster-gfapi"
    about = "GlusterFS replica 2, gfapi"
    disk = "gfapi.disk"

    def start(self):
        self.server.start()
        self.mount(self.path("mount"))
        make_file(self.path(f"mount/{self.disk}"), self.size)
        self.pids = dict(self.server.pids)
        engine = ["--ioengine=gfapi_async", f"--volume={VOLUME}", f"--brick={ADDRESS}"]
        self.target = [*engine, f"--filename={self.disk}"]
