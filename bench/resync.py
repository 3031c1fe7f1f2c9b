"""How long a resync takes: the whole disk of random data, of zeroes, and scattered blocks of one disk in a hundred.

Each measurement has peers of its own, started and ended in turn, so that the memory is enough for large disks. Against
lockstep stands the initial mirror of QEMU's storage daemon.
"""

import os
import shutil
import time

from lockstep import VARIANTS, Lockstep
from peers import Qemu
from procs import BenchError, Processes, wait_for

KINDS = {
    "resync-full": "resync of the whole disk, random data",
    "resync-zero": "resync of the whole disk, zeroes over random data",
    "resync-quick": "quick resync of 1 % of the blocks of 4 KiB, scattered",
}
# Below this, a poll of 20 ms is too coarse a clock.
LEAST_SECONDS = 0.2


def measure(kind, peer_name, folder, options, program):
    """One resync; gives what was out of sync and how long it took. None: this peer has no such thing."""
    size = options.resync_size << 20
    folder = os.path.join(folder, "resync")
    os.mkdir(folder)
    try:
        with Processes(folder) as processes:
            if peer_name == "lockstep":
                peer = Lockstep(processes, folder, size, program, VARIANTS["lockstep"], options.statement)
                return lockstep(kind, peer, processes)
            if kind == "resync-quick":
                return None
            return qemu(kind, Qemu(processes, folder, size, options.qemu_aio))
    finally:
        shutil.rmtree(folder)


def contents(kind):
    """What source and target hold before a resync of the whole disk."""
    return ("zero", "random") if kind == "resync-zero" else ("random", "zero")


def result(kind, moved_bytes, seconds):
    """The figures of one resync."""
    if kind == "resync-full" and seconds < LEAST_SECONDS:
        raise BenchError(f"{kind} took {seconds:.3f} s, too short to be measured: a larger --resync-size")
    return {"seconds": seconds, "moved_bytes": moved_bytes, "bytes_per_second": moved_bytes / seconds}


def lockstep(kind, peer, processes):
    """A resync of lockstep, from the command that starts it to both disks UpToDate."""
    peer.contents = contents(kind)
    if kind == "resync-quick":
        peer.contents = ("zero", "zero")
    peer.start_nodes()
    begin = time.monotonic()
    peer.verb(peer.nodes[0], "primary", "--force", "all")
    wait_for("lockstep's disks to be UpToDate", 600, peer.in_sync)
    moved, seconds = peer.size, time.monotonic() - begin
    if kind == "resync-quick":
        peer.export()
        peer.verb(peer.nodes[1], "disconnect", "all")
        blocks = peer.size // 4096 // 100
        command = ["fio", "--name=scatter", *peer.target, "--rw=randwrite", "--bs=4k", "--iodepth=32"]
        command += [f"--size={peer.size}", f"--number_ios={blocks}", "--randrepeat=0"]
        processes.run("fio", [*command, f"--output={peer.path('fio.out')}"], 120)
        moved = out_of_sync(peer)
        if not 0 < moved <= blocks * 4096:
            raise BenchError(f"{moved} bytes are out of sync after {blocks} writes of 4 KiB")
        begin = time.monotonic()
        peer.verb(peer.nodes[1], "connect", "all")
        wait_for("the quick resync", 120, peer.in_sync)
        seconds = time.monotonic() - begin
    peer.verify(zeroes=kind == "resync-zero")
    return result(kind, moved, seconds)


def out_of_sync(peer):
    """Bytes that the primary has marked."""
    return peer.links()[0]["peer_devices"][0]["out-of-sync"] << 10


def qemu(kind, peer):
    """The initial mirror of QEMU."""
    peer.contents = contents(kind)
    peer.start()
    peer.verify(zeroes=kind == "resync-zero")
    return result(kind, peer.size, peer.mirror_seconds)
