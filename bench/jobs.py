"""One fio job against one peer, and what is kept of it."""

import json
import os
from dataclasses import dataclass

from procs import BenchError, MachineCpu, cpu_seconds

KIB = 1 << 10


@dataclass(frozen=True)
class Job:
    """What fio is asked to do."""

    key: str
    title: str
    pattern: str
    block: int
    depth: int
    extra: tuple = ()
    # Only so much of the disk is used; None: all of it.
    span: int | None = None


JOBS = (
    Job("write-4k-qd1", "4 KiB random write, depth 1", "randwrite", 4 * KIB, 1),
    Job("write-4k-qd4", "4 KiB random write, depth 4", "randwrite", 4 * KIB, 4),
    Job("write-4k-qd32", "4 KiB random write, depth 32", "randwrite", 4 * KIB, 32),
    Job("write-4k-qd128", "4 KiB random write, depth 128", "randwrite", 4 * KIB, 128),
    Job("flush-4k", "4 KiB random write, a flush after each, depth 1", "randwrite", 4 * KIB, 1, ("--fsync=1",)),
    Job("write-256k-qd8", "256 KiB sequential write, depth 8", "write", 256 * KIB, 8),
    Job("write-1m-qd8", "1 MiB sequential write, depth 8", "write", 1024 * KIB, 8),
    Job("read-4k-qd32", "4 KiB random read, depth 32", "randread", 4 * KIB, 32),
    Job("mixed-4k-qd32", "4 KiB random, 70 % read, depth 32", "randrw", 4 * KIB, 32, ("--rwmixread=70",)),
)
WARM_UP = next(job for job in JOBS if job.key == "write-4k-qd32")
# Percentiles as fio names them, and as they are kept.
PERCENTILES = {"50.000000": "p50_us", "99.000000": "p99_us", "99.900000": "p999_us"}


def run_job(processes, job, peer, seconds):
    """Runs it; gives rates, latencies and the CPU time per I/O of the peer's processes."""
    result = run_jobs(processes, job, peer, [peer.target], seconds)
    del result["iops_each"]
    return result


def run_jobs(processes, job, peer, targets, seconds):
    """The same on several disks of a peer at once, in one fio. Rates are sums, latencies those of the slowest disk."""
    output = os.path.join(processes.folder, "fio.json")
    command = ["fio", f"--rw={job.pattern}", *job.extra, f"--bs={job.block}", f"--iodepth={job.depth}"]
    command += [f"--size={job.span or peer.size}", "--norandommap", "--randrepeat=0"]
    command += ["--time_based", f"--runtime={seconds}"]
    # Some engines print to standard output, so the result needs a file of its own.
    command += ["--output-format=json", f"--output={output}"]
    for number, target in enumerate(targets):
        command += [f"--name={job.key}-{number}", *target]
    machine = MachineCpu()
    before = {role: cpu_seconds(pid) for role, pid in peer.pids.items()}
    client = processes.run("fio", command, seconds + 30)
    spent = {role: cpu_seconds(pid) - before[role] for role, pid in peer.pids.items()}
    with open(output, encoding="utf-8") as file:
        results = json.load(file)["jobs"]
    os.unlink(output)
    each = []
    for result in results:
        sides = [result[side] for side in ("read", "write") if result[side]["total_ios"]]
        if result["error"] != 0 or not sides:
            raise BenchError(f"fio had error {result['error']} after {sum(it['total_ios'] for it in sides)} I/Os on {peer.name}")
        each.append(sides)
    every = [side for sides in each for side in sides]
    ios = sum(side["total_ios"] for side in every)
    # Of mixed reads and writes: what the writes see, the slower kind of a mirror.
    percentiles = [sides[-1]["clat_ns"].get("percentile", {}) for sides in each]
    return {
        "iops": sum(side["iops"] for side in every),
        "iops_each": [sum(side["iops"] for side in sides) for sides in each],
        "bytes_per_second": sum(side["bw_bytes"] for side in every),
        **{kept: max(it.get(name, 0) for it in percentiles) / 1000 for name, kept in PERCENTILES.items()},
        "cpu_us_per_io": {role: seconds * 1e6 / ios for role, seconds in spent.items()} | {"fio": client * 1e6 / ios},
        "others_cpu_share": machine.others(sum(spent.values()) + client),
    }
