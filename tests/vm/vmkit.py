"""Boots test VMs, runs one script in each, and tells apart how that ended.

Owns: one directory per VM that both sides see (the exchange directory), the QEMU
process, and every deadline on this side. Promises: a run ends at its deadline whatever
the guest does; only processes that this run started are killed; two runs at the same
time share nothing. What happens inside the guest is `guest_entry.sh`.

Files in the exchange directory: `env` and `job` (written here), `booted`, `log`,
`status` (written inside), `console` (the guest's serial line), `qemu.pid`.
"""

import argparse
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field

HERE = os.path.dirname(os.path.abspath(__file__))

# Exit codes of a run that did not get as far as the script's own status.
TIMEOUT = 124
NO_BOOT = 125
DIED = 126

# Seconds. A quiet machine needs 6 from start to end; a busy one several times that.
BOOT_TIMEOUT_S = 120
POWER_OFF_TIMEOUT_S = 20

# Emulation is slow, and nothing in these tests is about side channels or fresh pages.
KERNEL_ARGS = ["mitigations=off", "init_on_alloc=0", "audit=0"]

# Variables handed to the guest without being named, so that a caller sets them once.
ENV_PREFIX = "LOCKSTEP_"

LISTEN_TIMEOUT_S = 60

POLL_S = 0.1


@dataclass
class Vm:
    """One virtual machine and the script it runs."""

    script: str
    args: list = field(default_factory=list)
    name: str = "vm"
    cpus: int = 2
    memory: str = "3G"
    disks: list = field(default_factory=list)
    append: list = field(default_factory=list)
    env: dict = field(default_factory=dict)
    qemu: list = field(default_factory=list)
    # Port of 127.0.0.1 on which this VM's QEMU waits for the next VM's; None: for nobody.
    listens: int = None
    # Directory holding this VM's files; `share` is what the guest may write to.
    dir: str = ""
    share: str = ""
    # Set while it runs.
    process: subprocess.Popen = None
    log_offset: int = 0
    log_line: bytes = b""
    started_s: float = 0.0
    booted_s: float = 0.0
    status: int = -1

    def path(self, name):
        return os.path.join(self.dir, name)


def prepared():
    """Returns {KERNEL, VNG, QEMU}, installing what is missing."""
    done = subprocess.run([os.path.join(HERE, "prepare"), "--env"], stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(NO_BOOT)
    return dict(line.split("=", 1) for line in done.stdout.splitlines())


def start(vm, tools, timeout_s):
    """Writes the job down and starts the VM; returns at once."""
    os.makedirs(vm.dir, exist_ok=True)
    env = {k: v for k, v in os.environ.items() if k.startswith(ENV_PREFIX)}
    env.update(vm.env)
    env.update(VM_DIR=vm.dir, VM_SHARE=vm.share, VM_NAME=vm.name, VM_KIT=HERE)
    # The guest's own deadline is the later one: it only matters when this side is gone.
    env.update(VM_TIMEOUT_S=str(int(timeout_s) + 60))
    with open(vm.path("env"), "w") as out:
        out.writelines(f"export {k}={shlex.quote(v)}\n" for k, v in env.items())
    with open(vm.path("job"), "w") as out:
        out.write(shlex.join([os.path.abspath(vm.script), *vm.args]) + "\n")

    qemu = ["-pidfile", vm.path("qemu.pid"), *vm.qemu]
    for disk in vm.disks:
        # file.locking=off: several VMs, or the host, may look at the same image.
        drive = f"file={os.path.abspath(disk)},format=raw,if=virtio,cache=none,file.locking=off"
        qemu += ["-drive", drive]
    command = [
        tools["VNG"], "--run", tools["KERNEL"], "--force-9p", "--verbose",
        "--name", vm.name, "--cpus", str(vm.cpus), "--memory", vm.memory,
        "--cwd", "/", "--rwdir", vm.share, "--qemu-opts=" + shlex.join(qemu),
        "--append", " ".join(KERNEL_ARGS + vm.append),
        "--exec", shlex.join(["bash", os.path.join(HERE, "guest_entry.sh"), vm.dir]),
    ]
    # Emulation is the default even where KVM exists: nested KVM is often broken.
    if not os.environ.get("LOCKSTEP_VM_KVM"):
        command.append("--disable-kvm")
    vm.started_s = time.monotonic()
    with open(vm.path("console"), "wb") as console:
        vm.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=console, stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def wait_until_listening(vm):
    """Returns when the VM's QEMU takes connections, or has ended, or has not come to it.

    A QEMU whose `connect=` is refused goes on without a word, and its guest has a network
    card on which nothing ever arrives: so the next VM must not start before.
    """
    give_up_s = time.monotonic() + LISTEN_TIMEOUT_S
    while vm.listens and not is_listening(vm.listens) and vm.process.poll() is None:
        if time.monotonic() > give_up_s:
            print(f"{vm.name}: does not listen on port {vm.listens} after {LISTEN_TIMEOUT_S} s", file=sys.stderr)
            return
        time.sleep(0.02)


def is_listening(port):
    """Asks the kernel's table: a connection tried would be the one that QEMU waits for."""
    with open("/proc/net/tcp") as table:
        next(table)
        for line in table:
            _, local, _, state = line.split()[:4]
            if state == "0A" and local == f"0100007F:{port:04X}":
                return True
    return False


def stop(vm):
    """Kills the VM's processes: its session, and its QEMU should that have left it."""
    if vm.process is None:
        return
    # The session's leader is reaped only here, so its id cannot belong to anyone else yet.
    try:
        os.killpg(vm.process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    vm.process.wait()
    try:
        with open(vm.path("qemu.pid")) as pidfile:
            pid = int(pidfile.read())
        with open(f"/proc/{pid}/cmdline", "rb") as cmdline:
            if vm.path("qemu.pid").encode() in cmdline.read().split(b"\0"):
                os.kill(pid, signal.SIGKILL)
    except (OSError, ValueError):
        pass


def follow(vm, prefix, last=False):
    """Prints what the script has logged since the last call, whole lines only."""
    try:
        with open(vm.path("log"), "rb") as log:
            log.seek(vm.log_offset)
            data = log.read()
    except FileNotFoundError:
        return
    vm.log_offset += len(data)
    lines = (vm.log_line + data).split(b"\n")
    vm.log_line = lines.pop()
    if last and vm.log_line:
        lines.append(vm.log_line)
        vm.log_line = b""
    for line in lines:
        print(prefix + line.decode(errors="replace"))
    sys.stdout.flush()


def read_status(vm):
    try:
        with open(vm.path("status")) as status:
            return int(status.read())
    except (FileNotFoundError, ValueError):
        return None


def console_tail(vm, lines=15):
    with open(vm.path("console"), errors="replace") as console:
        tail = console.read().splitlines()[-lines:]
    for line in tail:
        print(f"{vm.name} console: {line}", file=sys.stderr)


def finished(vm, deadline_s):
    """True once the run is over; sets `vm.status`."""
    now = time.monotonic()
    if not vm.booted_s and os.path.exists(vm.path("booted")):
        vm.booted_s = now
        print(f"{vm.name}: booted in {now - vm.started_s:.1f} s", file=sys.stderr)
    ended = vm.process.poll() is not None
    status = read_status(vm)
    if status is not None:
        vm.status = status
    elif ended and vm.booted_s:
        vm.status = DIED
        print(f"{vm.name}: the VM died before the script ended", file=sys.stderr)
    elif ended:
        vm.status = NO_BOOT
        print(f"{vm.name}: the VM did not boot", file=sys.stderr)
    elif now > deadline_s:
        vm.status = TIMEOUT
        print(f"{vm.name}: timeout, the script was still running", file=sys.stderr)
    elif not vm.booted_s and now - vm.started_s > BOOT_TIMEOUT_S:
        vm.status = NO_BOOT
        print(f"{vm.name}: the VM did not boot in {BOOT_TIMEOUT_S} s", file=sys.stderr)
    else:
        return False
    if vm.status in (TIMEOUT, NO_BOOT, DIED) and status is None:
        console_tail(vm)
    return True


def run(vms, timeout_s):
    """Runs the VMs to their end; returns the first status that is not 0, or 0."""
    tools = prepared()
    deadline_s = time.monotonic() + timeout_s
    running = list(vms)
    try:
        for vm in vms:
            start(vm, tools, timeout_s)
            wait_until_listening(vm)
        while running:
            time.sleep(POLL_S)
            for vm in list(running):
                done = finished(vm, deadline_s)
                follow(vm, f"{vm.name}: " if len(vms) > 1 else "", last=done)
                if not done:
                    continue
                running.remove(vm)
                seconds = time.monotonic() - vm.started_s
                print(f"{vm.name}: status {vm.status} after {seconds:.1f} s", file=sys.stderr)
                # A peer that waits for a dead one would only sit out its deadline.
                if vm.status not in (0, 77):
                    for other in running:
                        print(f"{other.name}: stopped, because {vm.name} failed", file=sys.stderr)
                        follow(other, f"{other.name}: ", last=True)
                        other.status = vm.status
                    running.clear()
                    break
        power_off_s = time.monotonic() + POWER_OFF_TIMEOUT_S
        for vm in vms:
            while vm.process.poll() is None and vm.status in (0, 77) and time.monotonic() < power_off_s:
                time.sleep(0.02)
    finally:
        for vm in vms:
            stop(vm)
    return next((vm.status for vm in vms if vm.status != 0), 0)


def parser(about):
    """The options that one VM and two VMs share."""
    options = argparse.ArgumentParser(
        description=about,
        epilog=f"Exit status: the script's own; {TIMEOUT} timeout, {NO_BOOT} the VM did not boot, "
        f"{DIED} the VM died (a panic, say) before the script ended; 77 the script skipped itself.",
    )
    options.add_argument("--cpus", type=int, help="per VM")
    options.add_argument("--memory", help="per VM, as QEMU spells it: 1500M, 3G")
    options.add_argument("--timeout", type=float, default=600, metavar="S", help="seconds from start to end (600)")
    options.add_argument("--append", action="append", default=[], metavar="KERNELARG")
    options.add_argument("--env", action="append", default=[], metavar="NAME=VALUE",
                         help=f"set in the guest; variables {ENV_PREFIX}* are passed on by themselves")
    options.add_argument("--out", metavar="DIR",
                         help="exchange directory, kept afterwards (default: a temporary one, kept on failure)")
    return options


def named_values(options):
    return dict(pair.split("=", 1) for pair in options.env)


class Exchange:
    """The directory both sides see. It survives a failure, since it holds the console."""

    def __init__(self, wanted):
        self.kept = wanted is not None
        if self.kept:
            os.makedirs(wanted, exist_ok=True)
            self.path = os.path.realpath(wanted)
        else:
            self.path = tempfile.mkdtemp(prefix="lockstep-vm-")

    def end(self, status):
        if self.kept:
            return
        if status in (0, 77):
            shutil.rmtree(self.path, ignore_errors=True)
        else:
            print(f"console and log are in {self.path}", file=sys.stderr)


def free_port():
    """A port nobody listens on. Taken late, so the window for a clash is small."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def stop_on_signals():
    """A polite kill of the runner takes its VMs along."""
    def leave(number, _frame):
        sys.exit(128 + number)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, leave)
