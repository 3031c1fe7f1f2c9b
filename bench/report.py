"""Medians, the tables, the bars."""

import json
import os
import platform
import statistics
import subprocess

from jobs import JOBS
from procs import BenchError

# What lockstep has to reach: job -> variant -> peer -> multiple of the peer's rate in the same round. `gluster` is the
# faster of the two ways to reach it.
BAR = {
    "write-4k-qd1": {
        "lockstep-nospin": {"nbdkit": 0.5, "qemu": 1.6, "gluster": 3.5},
        "lockstep": {"nbdkit": 0.75, "qemu": 2.5, "gluster": 5.0},
    },
    "write-4k-qd32": {"lockstep": {"nbdkit": 0.7, "qemu": 9.0, "gluster": 14.0}},
    "write-256k-qd8": {"lockstep": {"nbdkit": 0.5, "qemu": 2.0, "gluster": 3.0}},
    "read-4k-qd32": {"lockstep": {"nbdkit": 1.2, "qemu": 2.0}},
    "resync-full": {"lockstep": {"qemu": 2.0}},
}
GLUSTER = ("gluster-fuse", "gluster-gfapi")
# Above this share of the machine's CPU time in other hands, figures say more about the neighbours.
NOISE_LIMIT = 0.05


def build(root, *features):
    """Builds the release of lockstep; gives the program's path."""
    command = ["cargo", "build", "--release", "-p", "lockstep-replicator", "--bin", "lockstep"]
    command += [f"--features={','.join(features)}"] if features else []
    if subprocess.run(command, cwd=root, check=False).returncode != 0:
        raise BenchError("lockstep does not build")
    command = ["cargo", "metadata", "--no-deps", "--format-version", "1"]
    metadata = subprocess.run(command, cwd=root, capture_output=True, check=True)
    return os.path.join(json.loads(metadata.stdout)["target_directory"], "release", "lockstep")


def machine():
    """Where it was measured."""
    model = "unknown"
    with open("/proc/cpuinfo", encoding="utf-8") as info:
        for line in info:
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return {"cores": os.cpu_count(), "cpu": model, "kernel": platform.release(), "architecture": platform.machine()}


def scheduling():
    """How this process, and so everything it starts, is scheduled."""
    policies = {os.SCHED_OTHER: "ordinary", os.SCHED_BATCH: "batch", os.SCHED_FIFO: "FIFO", os.SCHED_RR: "round-robin"}
    return policies.get(os.sched_getscheduler(0), "other")


def commit(root):
    """What was measured, with a mark when the tree has changes."""

    def git(*arguments):
        done = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "--short=12", "HEAD")
    if head is None:
        return "unknown"
    return head + (" with changes" if git("status", "--porcelain", "--untracked-files=no") else "")


def version(*command):
    """First line of a program's --version."""
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    return (done.stdout or done.stderr).strip().partition("\n")[0]


def spread(values):
    """The median and the two ends of some samples."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summarise(samples):
    """Median, least and greatest of every figure, per job and peer. `samples`: job -> peer -> list of results."""
    summary = {}
    for job, peers in samples.items():
        summary[job] = {}
        for peer, results in peers.items():
            keys = [key for key, value in results[0].items() if isinstance(value, (int, float))]
            figures = {key: spread([result[key] for result in results]) for key in keys}
            if "cpu_us_per_io" in results[0]:
                figures["cpu_us_per_io"] = {
                    role: statistics.median(result["cpu_us_per_io"][role] for result in results)
                    for role in results[0]["cpu_us_per_io"]
                }
            summary[job][peer] = figures
    return summary


def rate(job, figures, which):
    """A rate in the unit that suits the job."""
    if job.block >= 64 << 10:
        return f"{figures['bytes_per_second'][which] / 1e6:.0f} MB/s"
    return f"{figures['iops'][which] / 1000:.1f}k"


def table(summary, peers):
    """The summary of the fio jobs as text. `peers` in the order of the rows."""
    lines = []
    head = ("", "median", "min..max", "p50/p99/p99.9 us", "CPU us per I/O")
    widths = (14, 10, 20, 20, 0)

    def row(cells):
        lines.append("  " + "".join(str(cell).ljust(width) for cell, width in zip(cells, widths)).rstrip())

    for job in JOBS:
        if job.key not in summary:
            continue
        lines.append(job.title)
        row(head)
        for peer in peers:
            figures = summary[job.key][peer]
            ends = f"{rate(job, figures, 'min')}..{rate(job, figures, 'max')}"
            latency = "/".join(f"{figures[key]['median']:.0f}" for key in ("p50_us", "p99_us", "p999_us"))
            cpu = "  ".join(f"{role} {value:.1f}" for role, value in figures["cpu_us_per_io"].items())
            row((peer, rate(job, figures, "median"), ends, latency, cpu))
        lines.append("")
    return "\n".join(lines)


def resync_table(summary, kinds):
    """The summary of the resyncs as text."""
    lines = []
    for kind, title in kinds.items():
        if kind not in summary:
            continue
        lines.append(title)
        for peer, figures in summary[kind].items():
            moved, seconds = figures["moved_bytes"]["median"] / 1e6, figures["seconds"]
            ends = f"{seconds['min']:.2f}..{seconds['max']:.2f}"
            speed = figures["bytes_per_second"]["median"] / 1e6
            lines.append(f"  {peer:<14}{seconds['median']:.2f} s ({ends}) for {moved:.0f} MB: {speed:.0f} MB/s")
        lines.append("")
    return "\n".join(lines)


def noise(samples):
    """The greatest and the median share of CPU time that others took."""
    every = [result for peers in samples.values() for results in peers.values() for result in results]
    shares = [result["others_cpu_share"] for result in every if "others_cpu_share" in result]
    return {"median": statistics.median(shares), "max": max(shares)} if shares else {"median": 0.0, "max": 0.0}


def by_round(job, peers, name):
    """What a peer did in each round: I/Os per second, or bytes. Empty: it was not measured."""
    key = "bytes_per_second" if job.startswith("resync") else "iops"
    if name == "gluster":
        both = [by_round(job, peers, each) for each in GLUSTER if peers.get(each)]
        return [max(round_) for round_ in zip(*both)]
    return [result[key] for result in peers.get(name, ())]


def ratios(samples):
    """job -> variant of lockstep -> peer -> the ratios of their rates within each round: median and ends."""
    found = {}
    for job, peers in samples.items():
        own = [name for name in peers if name.startswith("lockstep")]
        others = [name for name in peers if not name.startswith("lockstep")]
        if any(name in peers for name in GLUSTER):
            others.append("gluster")
        for variant in own:
            for name in others:
                pairs = list(zip(by_round(job, peers, variant), by_round(job, peers, name)))
                if pairs:
                    values = spread([mine / theirs for mine, theirs in pairs])
                    found.setdefault(job, {}).setdefault(variant, {})[name] = values
    return found


def judge(found):
    """The bars from the ratios: one entry for each that was measured."""
    verdict = []
    for job, variants in BAR.items():
        for variant, peers in variants.items():
            for name, wanted in peers.items():
                values = found.get(job, {}).get(variant, {}).get(name)
                if values is not None:
                    met = values["median"] >= wanted
                    verdict.append({"job": job, "variant": variant, "peer": name, "wanted": wanted, "met": met} | values)
    return verdict


def bars_of(peers, key, scale):
    """What `bench/plot` draws of one figure of every peer."""
    return [
        {"name": name} | {end: value / scale for end, value in figures[key].items()} for name, figures in peers.items()
    ]


def tables(summary, kinds):
    """The pictures of this run: rates, the 99th percentiles, resyncs."""
    groups = {"native-rates": [], "native-p99": [], "native-resync": []}
    for job in JOBS:
        if job.key in summary:
            big = job.block >= 64 << 10
            key, scale, unit = ("bytes_per_second", 1e6, "MB/s") if big else ("iops", 1e3, "1000 per second")
            peers = summary[job.key]
            groups["native-rates"].append({"title": job.title, "unit": unit, "bars": bars_of(peers, key, scale)})
            groups["native-p99"].append({"title": job.title, "unit": "us", "bars": bars_of(peers, "p99_us", 1)})
    for kind, title in kinds.items():
        if kind in summary:
            bars = bars_of(summary[kind], "bytes_per_second", 1e6)
            groups["native-resync"].append({"title": title, "unit": "MB/s", "bars": bars})
    titles = {
        "native-rates": "NBD front end: rate",
        "native-p99": "NBD front end: 99th percentile of the latency",
        "native-resync": "Resync",
    }
    return [{"name": name, "title": titles[name], "groups": groups[name]} for name in groups if groups[name]]
