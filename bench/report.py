"""Medians, the table, the bar."""

import os
import platform
import statistics
import subprocess

from jobs import JOBS

# What lockstep has to reach, as a multiple of QEMU's mirror in the same run.
BAR = {"write-4k-qd32": 4.0, "write-4k-qd1": 1.0}
# Above this share of the machine's CPU time in other hands, figures say more about the neighbours.
NOISE_LIMIT = 0.05


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


def summarise(samples):
    """Median, least and greatest of every figure, per job and peer. `samples`: job -> peer -> list of results."""
    summary = {}
    for job, peers in samples.items():
        summary[job] = {}
        for peer, results in peers.items():
            figures = {}
            for key in ("iops", "bytes_per_second", "latency_p50_us", "latency_p99_us"):
                values = [result[key] for result in results]
                figures[key] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
            roles = results[0]["cpu_us_per_io"]
            figures["cpu_us_per_io"] = {
                role: statistics.median(result["cpu_us_per_io"][role] for result in results) for role in roles
            }
            summary[job][peer] = figures
    return summary


def rate(job, figures, which):
    """A rate in the unit that suits the job."""
    if job.block >= 64 << 10:
        return f"{figures['bytes_per_second'][which] / 1e6:.0f} MB/s"
    return f"{figures['iops'][which] / 1000:.1f}k"


def table(summary, peers):
    """The summary as text. `peers` in the order of the columns' rows."""
    lines = []
    head = ("", "median", "min..max", "p50/p99 us", "CPU us per I/O")
    widths = (10, 10, 22, 14, 0)

    def row(cells):
        lines.append("  " + "".join(str(cell).ljust(width) for cell, width in zip(cells, widths)).rstrip())

    for job in JOBS:
        if job.key not in summary:
            continue
        lines.append(job.title)
        row(head)
        for peer in peers:
            figures = summary[job.key][peer]
            spread = f"{rate(job, figures, 'min')}..{rate(job, figures, 'max')}"
            latency = f"{figures['latency_p50_us']['median']:.0f}/{figures['latency_p99_us']['median']:.0f}"
            cpu = "  ".join(f"{role} {value:.1f}" for role, value in figures["cpu_us_per_io"].items())
            row((peer, rate(job, figures, "median"), spread, latency, cpu))
        lines.append("")
    return "\n".join(lines)


def noise(samples):
    """The greatest and the median share of CPU time that others took."""
    every = [result for peers in samples.values() for results in peers.values() for result in results]
    shares = [result["others_cpu_share"] for result in every]
    return {"median": statistics.median(shares), "max": max(shares)}


def ratios(summary):
    """job -> peer -> lockstep's median rate as a multiple of the peer's."""
    found = {}
    for job, peers in summary.items():
        if "lockstep" in peers:
            own = peers["lockstep"]["iops"]["median"]
            found[job] = {name: own / it["iops"]["median"] for name, it in peers.items() if name != "lockstep"}
    return found


def judge(found):
    """The bar from the ratios: job -> ratio, wanted, whether met. Empty when a side is missing."""
    verdict = {}
    for job, wanted in BAR.items():
        ratio = found.get(job, {}).get("qemu")
        if ratio is not None:
            verdict[job] = {"ratio": ratio, "wanted": wanted, "met": ratio >= wanted}
    return verdict
