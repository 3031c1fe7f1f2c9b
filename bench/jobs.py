"""One fio job against one peer, and what is kept of it."""

import json
import os
from dataclasses import dataclass

from procs import BenchError, MachineCpu, cpu_seconds


@dataclass(frozen=True)
class Job:
    """What fio is asked to do."""

    key: str
    title: str
    pattern: str
    block: int
    depth: int


JOBS = (
    Job("write-4k-qd1", "4 KiB random write, depth 1", "randwrite", 4096, 1),
    Job("write-4k-qd32", "4 KiB random write, depth 32", "randwrite", 4096, 32),
    Job("write-256k-qd8", "256 KiB sequential write, depth 8", "write", 256 << 10, 8),
    Job("read-4k-qd32", "4 KiB random read, depth 32", "randread", 4096, 32),
)


def run_job(processes, job, peer, uri, seconds, size):
    """Runs it; gives rates, latencies and the CPU time per I/O of the peer's processes."""
    output = os.path.join(processes.folder, "fio.json")
    command = ["fio", f"--name={job.key}", "--ioengine=nbd", f"--uri={uri}", f"--rw={job.pattern}"]
    command += [f"--bs={job.block}", f"--iodepth={job.depth}", f"--size={size}", "--norandommap", "--randrepeat=0"]
    command += ["--time_based", f"--runtime={seconds}"]
    # The engine prints to standard output, so the result needs a file of its own.
    command += ["--output-format=json", f"--output={output}"]
    machine = MachineCpu()
    before = {role: cpu_seconds(pid) for role, pid in peer.pids.items()}
    processes.run("fio", command, seconds + 30)
    spent = {role: cpu_seconds(pid) - before[role] for role, pid in peer.pids.items()}
    with open(output, encoding="utf-8") as file:
        result = json.load(file)["jobs"][0]
    os.unlink(output)
    side = result["read" if "read" in job.pattern else "write"]
    if result["error"] != 0 or side["total_ios"] == 0:
        raise BenchError(f"fio had error {result['error']} after {side['total_ios']} I/Os on {peer.name}")
    client = (result["usr_cpu"] + result["sys_cpu"]) / 100 * side["runtime"] / 1000
    percentiles = side["clat_ns"].get("percentile", {})
    per_io = 1e6 / side["total_ios"]
    return {
        "iops": side["iops"],
        "bytes_per_second": side["bw_bytes"],
        "latency_p50_us": percentiles.get("50.000000", 0) / 1000,
        "latency_p99_us": percentiles.get("99.000000", 0) / 1000,
        "cpu_us_per_io": {role: seconds * per_io for role, seconds in spent.items()} | {"fio": client * per_io},
        "others_cpu_share": machine.others(sum(spent.values()) + client),
    }
