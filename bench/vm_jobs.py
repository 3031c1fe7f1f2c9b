"""In the VM: the jobs of one case, on the kernel's DRBD and on lockstep in turn, into a JSON file (see `vm_guest.sh`)."""

import argparse
import json
import os
import sys
from types import SimpleNamespace

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from jobs import Job, run_job  # noqa: E402
from procs import Processes  # noqa: E402

MIB = 1 << 20
# Fits into the activity log of both.
HOT = 128 * MIB
EXTENT = 4 * MIB
JOBS = (
    Job("write-4k-qd1", "4 KiB random write, depth 1", "randwrite", 4096, 1, span=HOT),
    Job("write-4k-qd32", "4 KiB random write, depth 32", "randwrite", 4096, 32, span=HOT),
    Job("cold-4k-qd32", "one 4 KiB write per extent of 4 MiB, depth 32", f"write:{EXTENT - 4096}", 4096, 32),
    Job("write-256k-qd8", "256 KiB sequential write, depth 8", "write", 256 << 10, 8, span=HOT),
    Job("read-4k-qd32", "4 KiB random read, depth 32", "randread", 4096, 32, span=HOT),
)


def main():
    """Runs the case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--seconds", type=int, required=True)
    parser.add_argument("--size", type=int, required=True, metavar="MIB")
    parser.add_argument("--resync-mib", type=int, required=True)
    parser.add_argument("--kernel", required=True, metavar="DEVICE")
    parser.add_argument("--ours", required=True, metavar="DEVICE")
    parser.add_argument("--pids", required=True, metavar="ROLE:PID,...", help="lockstep's daemons")
    parser.add_argument("--case", required=True)
    parser.add_argument("--resync", action="append", default=[], metavar="KERNEL,OURS", help="ms of one round")
    parser.add_argument("output")
    options = parser.parse_args()
    pids = {role: int(pid) for role, pid in (pair.split(":") for pair in options.pids.split(","))}
    peers = []
    for name, device, of in (("kernel", options.kernel, {}), ("lockstep", options.ours, pids)):
        target = ["--ioengine=io_uring", "--direct=1", f"--filename={device}"]
        # Behind the data is the metadata, so the device is smaller than its disk.
        size = options.size * MIB - EXTENT
        peers.append(SimpleNamespace(name=name, target=target, pids=of, size=size))
    samples = {job.key: {peer.name: [] for peer in peers} for job in JOBS}
    with Processes(os.getcwd()) as processes:
        for turn in range(-1, options.rounds):
            for job in JOBS:
                for at in range(len(peers)):
                    peer = peers[(turn + at) % len(peers)]
                    # The first round is the warm-up: pages of the files, extents of the logs.
                    result = run_job(processes, job, peer, options.seconds if turn >= 0 else 1)
                    if turn >= 0:
                        samples[job.key][peer.name].append(result)
                        print(f"round {turn + 1}: {job.key:<15} {peer.name:<9} {result['iops']:>8.0f} IOPS", flush=True)
    if options.resync:
        samples["resync"] = {"kernel": [], "lockstep": []}
        for pair in options.resync:
            for name, ms in zip(("kernel", "lockstep"), pair.split(",")):
                rate = options.resync_mib * MIB / (int(ms) / 1000)
                samples["resync"][name].append({"seconds": int(ms) / 1000, "bytes_per_second": rate})
    with open(options.output, "w", encoding="utf-8") as file:
        json.dump({"case": options.case, "samples": samples}, file)


if __name__ == "__main__":
    main()
