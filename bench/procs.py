"""Processes the benchmark starts: each is ended by its id, whatever happens, and its CPU time can be read."""

import os
import resource
import signal
import subprocess
import sys
import time

# The address of a network namespace of our own (a documentation address, RFC 5737), beside the loopback one.
ADDRESS = "192.0.2.1"
_IN_OWN_NETWORK = "LOCKSTEP_BENCH_NETWORK"
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


class BenchError(Exception):
    """Something the person at the terminal has to know, in one sentence."""


def own_network():
    """As root, starts this program once more in a network namespace of its own: its ports are free and nobody else's
    traffic is in it. Whether it is in one when it returns; without root it goes on where it is."""
    if os.environ.get(_IN_OWN_NETWORK) == str(os.getpid()):
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        subprocess.run(["ip", "address", "add", f"{ADDRESS}/32", "dev", "lo"], check=True)
        return True
    if os.geteuid() != 0:
        return False
    # unshare does not fork, so the process keeps its number.
    os.environ[_IN_OWN_NETWORK] = str(os.getpid())
    os.execvp("unshare", ["unshare", "--net", sys.executable, *sys.argv])


def wait_for(what, seconds, ready, process=None):
    """Polls `ready` until it gives something true, which is returned."""
    until = time.monotonic() + seconds
    while True:
        answer = ready()
        if answer:
            return answer
        if process is not None and process.poll() is not None:
            raise BenchError(f"waited for {what}, but the process ended with {process.returncode}")
        if time.monotonic() > until:
            raise BenchError(f"waited {seconds} s for {what}")
        time.sleep(0.02)


class Processes:
    """What was started and not yet ended. A context manager: leaving it ends everything, last started first."""

    def __init__(self, folder):
        self.folder = folder
        self.running = []
        self.endings = []

    def __enter__(self):
        return self

    def __exit__(self, *_reason):
        for ending in reversed(self.endings):
            ending()
        for process in reversed(self.running):
            self._end(process)
        self.running.clear()

    def at_end(self, ending):
        """Calls `ending` before the processes are ended, the last one told first."""
        self.endings.append(ending)

    def end(self, process):
        """Ends one of them now."""
        self._end(process)
        self.running.remove(process)

    def start(self, name, command):
        """Starts `command` with its output in NAME.log of the folder."""
        with open(os.path.join(self.folder, f"{name}.log"), "ab") as log:
            try:
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder
                )
            except FileNotFoundError as error:
                raise BenchError(f"{command[0]} is not installed") from error
        self.running.append(process)
        return process

    def run(self, name, command, seconds):
        """Runs `command` to its end within `seconds`, anything but success is an error; gives the CPU seconds it took."""
        before = reaped_cpu_seconds()
        process = self.start(name, command)
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired as error:
            raise BenchError(f"{name} did not end within {seconds} s") from error
        finally:
            self._end(process)
            self.running.remove(process)
        if status != 0:
            raise BenchError(f"`{' '.join(command)}` ended with {status}:\n{self.tail(name)}")
        return reaped_cpu_seconds() - before

    def tail(self, name, lines=15):
        """The last lines a process wrote."""
        try:
            with open(os.path.join(self.folder, f"{name}.log"), encoding="utf-8", errors="replace") as log:
                return "".join(log.readlines()[-lines:]).rstrip()
        except FileNotFoundError:
            return ""

    @staticmethod
    def _end(process):
        for number in (signal.SIGTERM, signal.SIGKILL):
            if process.poll() is not None:
                return
            process.send_signal(number)
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                continue


def reaped_cpu_seconds():
    """User and system time of all processes that have been waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def cpu_seconds(pid):
    """User and system time of a process with all its threads so far, in seconds (resolution: one tick)."""
    with open(f"/proc/{pid}/stat", encoding="utf-8") as stat:
        # The name, in parentheses, may contain spaces: fields are counted from behind it.
        fields = stat.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / CLOCK_TICKS


def resident_bytes(pid):
    """Memory of a process that is in RAM, without what it shares with files."""
    with open(f"/proc/{pid}/status", encoding="utf-8") as status:
        fields = dict(line.split(":", 1) for line in status)
    return (int(fields["RssAnon"].split()[0]) + int(fields["RssShmem"].split()[0])) << 10


class MachineCpu:
    """Share of the machine's CPU time that went to others while something of ours was measured."""

    def __init__(self):
        self.begin = self._read()

    @staticmethod
    def _read():
        with open("/proc/stat", encoding="utf-8") as stat:
            user, nice, system, idle, iowait, irq, softirq, steal = map(int, stat.readline().split()[1:9])
        # Interrupts are not counted as others': nearly all of them are this benchmark's own network traffic.
        return user + nice + system, irq + softirq, idle + iowait, steal

    def others(self, ours):
        """`ours`: CPU seconds of our processes since the beginning. Gives 0.0 (alone) to 1.0, hypervisor's included."""
        busy, interrupts, idle, steal = (now - then for now, then in zip(self._read(), self.begin))
        total = busy + interrupts + idle + steal
        return max(0.0, (busy + steal) - ours * CLOCK_TICKS) / total if total else 0.0
