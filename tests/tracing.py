"""Real processes whose system calls fail, or that are killed at one, by ``strace --inject``; and what is left then.

``tracing.py [--scratch FOLDER] [--sample N] [--seed N] [SCENARIO...]``: the command line (``hydrafs.cli.main``), the
daemon of a real mount and the worker, each call that touches the store with an error that it can give, and each with
SIGKILL; or ``N`` of them for each scenario, chosen by the seed. Prints counts; exit code 1 where anything was lost.

Each injection is a process forked from one that has everything imported; strace attaches before it does anything.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib
import logging
import os
import pkgutil
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import failing
import scenarios
from failing import HEADER, Copies, Count, Judge, doubles_of, make_template
from scenarios import contents
from watched import errors_of

import hydrafs
from hydrafs import cli, tending
from hydrafs.store import Store

HANG_SECONDS = 20.0
KINDS = {
    "openat": "create", "newfstatat": "stat", "statx": "stat", "fstat": "fstat", "getdents64": "readdir",
    "pread64": "read", "pwrite64": "write", "write": "write", "fsync": "fsync", "fdatasync": "fsync",
    "rename": "rename", "renameat": "rename", "renameat2": "rename", "link": "link", "linkat": "link",
    "unlink": "unlink", "unlinkat": "unlink", "mkdir": "mkdir", "rmdir": "unlink", "ftruncate": "truncate",
    "fchmod": "chmod", "fchown": "chmod", "utimensat": "utime", "flock": "flock", "fcntl": "fcntl",
    "copy_file_range": "copy", "listxattr": "getxattr", "getxattr": "getxattr", "lgetxattr": "getxattr",
    "fsetxattr": "setxattr", "setxattr": "setxattr", "statfs": "statvfs", "readlink": "readlink",
    "symlink": "link", "ioctl": "ioctl",
}  # fmt: skip
"""System calls, and which errors they give (``watched.ERRORS``)."""


@dataclass(frozen=True)
class Scenario:
    """What is run and traced, and what is done meanwhile.

    Args:
        prepare: scenario whose ``scenarios.prepare`` comes before.
        arguments: of the command line; ``@`` is the store, ``%`` the mountpoint.
        client: what a program does to the mount, where that is what is run.
        killed: a change that was killed before, where a journal had been written.
        waits_for: a file of the store; when it is there, what runs is ended.
        trashes: whether a diff was removed through a mount before.
    """

    arguments: tuple[str, ...]
    prepare: str = ""
    client: Callable[[Path], None] | None = None
    killed: str = ""
    waits_for: str = ""
    trashes: bool = False


MOUNT = ("mount", "@", "%", "--foreground", "--dehydrate", "off")


def _write(path: Path, data: bytes, flags: int = os.O_RDWR) -> None:
    fd = os.open(path, flags)
    os.write(fd, data)
    os.fsync(fd)
    os.close(fd)


def _read_all(point: Path) -> None:
    for name in sorted(os.listdir(point)):
        with contextlib.suppress(OSError):
            (point / name).read_bytes()


SCENARIOS = {
    "dehydrate": Scenario(("dehydrate", "--jobs", "1", "@/fresh.safetensors")),
    "remove a base": Scenario(("rm", "@/base.safetensors")),
    "collect": Scenario(("gc", "@"), prepare="collect with dependents of a retired diff"),
    "rehome": Scenario(("gc", "--rehome", "--jobs", "1", "@"), prepare="rehome"),
    "undelete": Scenario(("undelete", "@", "tuned0.safetensors"), trashes=True),
    "rehydrate": Scenario(("rehydrate", "--jobs", "1", "@/tuned0.safetensors")),
    "start after a kill: dehydrate": Scenario(("gc", "@"), killed="dehydrate"),
    "start after a kill: write into a diff": Scenario(("gc", "@"), killed="write into a diff"),
    "start after a kill: diff over base": Scenario(("gc", "@"), killed="diff over base"),
    "watch": Scenario(
        ("watch", "@", "--settle", "0", "--min-size", "1k"),
        prepare="a worker's step",
        waits_for="fresh.safetensors.hydra",
    ),
    "mount: read": Scenario(MOUNT, client=_read_all),
    "mount: delete a base": Scenario(MOUNT, client=lambda point: os.unlink(point / "base.safetensors")),
    "mount: delete a diff": Scenario(MOUNT, client=lambda point: os.unlink(point / "tuned0.safetensors")),
    "mount: rename over a base": Scenario(
        MOUNT, client=lambda point: os.rename(point / "fresh.safetensors", point / "base.safetensors")
    ),
    "mount: overwrite a base": Scenario(
        MOUNT, client=lambda point: _write(point / "base.safetensors", b"new", os.O_WRONLY | os.O_TRUNC)
    ),
    "mount: write into a diff": Scenario(MOUNT, client=lambda point: _write(point / "tuned0.safetensors", b"x")),
    "mount: write into a base": Scenario(MOUNT, client=lambda point: _write(point / "base.safetensors", b"x")),
}  # fmt: skip


_libc = ctypes.CDLL(None, use_errno=True)


def is_mounted(point: Path) -> bool:
    """Without a question to the mount itself: its daemon may be one that hangs, and who asks it then, too."""
    return f" {point} " in Path("/proc/self/mountinfo").read_text()


def take_down(point: Path) -> None:
    """End a mount, and every call that waits for it."""
    while is_mounted(point) and _libc.umount2(os.fsencode(point), 3) == 0:  # MNT_FORCE, MNT_DETACH
        pass


class Run:
    """A process that does what a scenario says, with strace attached to it from its first call on."""

    def __init__(self, copies: Copies, scenario: Scenario, inject: str) -> None:
        self.copies, self.scenario, self.inject = copies, scenario, inject
        self.point = copies.scratch / "mount"
        self.log, self.said = copies.scratch / "strace.log", copies.scratch / "said"
        self.hangs = False
        self.code = 1
        """0: it was told as done."""

    def run(self) -> None:
        self.point.mkdir(exist_ok=True)
        self.log.unlink(missing_ok=True)
        gate, opens = os.pipe()
        child = os.fork()
        if not child:
            os.close(opens)
            self._act(gate)
        os.close(gate)
        strace = self._attach(child)
        os.write(opens, b".")
        os.close(opens)
        try:
            if self.scenario.client is not None:
                self._be_client(child)
            elif self.scenario.waits_for:
                self._wait_for(child)
            else:
                self.code = int(self._end(child) != 0)
        finally:
            take_down(self.point)
            self._end(child)
            try:
                strace.wait(10)
            except subprocess.TimeoutExpired:
                strace.kill()
                strace.wait()

    def _act(self, gate: int) -> None:
        said = os.open(self.said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(said, 1)
        os.dup2(said, 2)
        os.read(gate, 1)
        code = 99
        try:
            arguments = [a.replace("@", str(self.copies.root)).replace("%", str(self.point))
                         for a in self.scenario.arguments]  # fmt: skip
            code = cli.main(arguments)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _attach(self, child: int) -> subprocess.Popen[str]:
        inject = ["-e", self.inject] if self.inject else ["-y"]
        calls = self.inject.removeprefix("inject=").partition(":")[0] if self.inject else ",".join(KINDS)
        strace = subprocess.Popen(
            ["strace", "-f", "-p", str(child), "-e", f"trace={calls}", "-e", "signal=none", *inject, "-o", self.log],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert strace.stderr is not None
        assert select.select([strace.stderr], [], [], 20)[0]
        line = strace.stderr.readline()
        assert "attached" in line, line
        return strace

    def _end(self, child: int) -> int:
        """Wait for it; its exit code, as far as it was not known."""
        if child == getattr(self, "ended", None):
            return self.exit_code
        deadline = time.monotonic() + HANG_SECONDS
        while not (found := os.waitpid(child, os.WNOHANG))[0]:
            if time.monotonic() > deadline:
                self.hangs = True
                os.kill(child, signal.SIGKILL)
                take_down(self.point)
                found = os.waitpid(child, 0)
                break
            time.sleep(0.005)
        self.ended, self.exit_code = child, os.waitstatus_to_exitcode(found[1])
        return self.exit_code

    def _has_ended(self, child: int) -> bool:
        stat = Path(f"/proc/{child}/stat").read_text()
        return stat.rpartition(")")[2].split()[0] == "Z"

    def _wait_for(self, child: int) -> None:
        deadline = time.monotonic() + 6
        name = self.copies.root / self.scenario.waits_for
        while time.monotonic() < deadline and not self._has_ended(child) and not name.exists():
            time.sleep(0.02)
        time.sleep(0.1)
        if not self._has_ended(child):
            os.kill(child, signal.SIGTERM)

    def _be_client(self, child: int) -> None:
        deadline = time.monotonic() + HANG_SECONDS
        while not is_mounted(self.point):
            if self._has_ended(child):
                return
            if time.monotonic() > deadline:
                self.hangs = True
                return
            time.sleep(0.01)
        client = os.fork()
        if not client:
            code = 1
            try:
                assert self.scenario.client is not None
                self.scenario.client(self.point)
                code = 0
            except OSError:
                pass
            finally:
                os._exit(code)
        while not (found := os.waitpid(client, os.WNOHANG))[0]:
            if time.monotonic() > deadline:
                self.hangs = True
                for pid in (child, client):
                    os.kill(pid, signal.SIGKILL)
                take_down(self.point)
                found = os.waitpid(client, 0)
                break
            time.sleep(0.005)
        self.code = int(found[1] != 0)

    def calls(self) -> dict[str, list[int]]:
        """The numbers of each call that touch the store, in any thread; strace counts those of each thread."""
        root = os.fspath(self.copies.root)
        made: Counter[tuple[str, str]] = Counter()
        found: dict[str, set[int]] = {}
        for line in self.log.read_text(errors="replace").splitlines():
            if match := re.match(r"(\d+) +(\w+)\(", line):
                thread, call = match.groups()
                made[thread, call] += 1
                if root in line:
                    found.setdefault(call, set()).add(made[thread, call])
        return {call: sorted(numbers) for call, numbers in found.items() if call in KINDS}


def try_all(copies: Copies, name: str, sample: int, chance: random.Random) -> Count:
    count, begun, scenario = Count(), time.monotonic(), SCENARIOS[name]
    copies.template, copies.earlier = copies.scratch / "template", None
    copies.fresh()
    with contextlib.closing(Store(copies.root)) as store:
        scenarios.prepare(store, scenario.killed or scenario.prepare)
        copies.trashed = contents(store)
        if scenario.trashes:
            with scenarios.mounted(store) as tree:
                tree.unlink("/base.safetensors")
                tree.unlink("/tuned0.safetensors")
        contents(store)
    copies.keep("prepared")
    if scenario.killed:
        stages = failing.stages(copies, failing.AT_START + scenario.killed)
        for number, _ in enumerate(stages):
            if number == 2:
                break  # well within what was killed
    copies.fresh()
    with contextlib.closing(Store(copies.root)) as store:
        before, doubles = contents(store), doubles_of(store)
    copies.fresh()
    run = Run(copies, scenario, "")
    run.run()
    loose = bool(scenario.waits_for or scenario.killed)
    assert run.code == 0 or loose, f"{name}: without any fault: {run.said.read_text()}"
    calls = run.calls()
    with contextlib.closing(Store(copies.root)) as store:
        tending.start(store)
        after, doubles_after = contents(store), doubles_of(store)
    if "read" in name or "write into" in name or "overwrite" in name:
        loose = True
    judge = Judge(copies, "a worker's step" if loose else name, before, after, doubles | doubles_after, copies.earlier)
    count.calls = sum(map(len, calls.values()))
    every = [
        f"inject={call}:{what}:when={number}"
        for call, numbers in calls.items()
        for number in numbers
        for what in [*(f"error={error}" for error in errors_of(KINDS[call])), "signal=KILL"]
    ]
    if sample and sample < len(every):
        every = sorted(chance.sample(every, sample))
    for inject in every:
        copies.fresh()
        run = Run(copies, scenario, inject)
        run.run()
        log = run.log.read_text(errors="replace") if run.log.exists() else ""
        if "(INJECTED)" not in log and "killed by SIGKILL" not in log:
            continue
        count.injections += 1
        count.failed += run.code
        said = []
        text = run.said.read_text(errors="replace")
        if run.hangs:
            count.other += 1
            said.append("it hangs")
        # A worker of a mount that cannot begin says so and is started again; that Python finds itself is not ours.
        if "Traceback" in text and not re.search(
            r"^\s*(hydrafs\.errors\.|\w*ImportError|ModuleNotFound|Fatal)", text, re.M
        ):
            count.other += 1
            said.append(text[-1500:])
        if found := judge.look(1 if "KILL" in inject else run.code):
            if found[0].startswith("left behind"):
                count.left += 1
            else:
                count.lost += 1
            said += found
        if said:
            where = [line[:300] for line in log.splitlines() if "INJECTED" in line][:2]
            count.faults.append(f"{name}: {inject}\n    " + "\n    ".join([*where, text.strip()[-300:], *said]))
    count.seconds = time.monotonic() - begun
    return count


def main() -> int:
    """See the top of this file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--scratch")
    parser.add_argument("--sample", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--faults", type=int, default=20, help="how many are printed")
    parser.add_argument("scenarios", nargs="*")
    given = parser.parse_args()
    if given.scratch is None and os.access("/dev/shm", os.W_OK):
        given.scratch = "/dev/shm"
    logging.getLogger("hydrafs").addHandler(logging.NullHandler())
    logging.getLogger("hydrafs").propagate = False
    for module in pkgutil.walk_packages(hydrafs.__path__, "hydrafs."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    total, begun = Count(), time.monotonic()
    print(HEADER, flush=True)
    names = given.scenarios or list(SCENARIOS)
    scratch = Path(tempfile.mkdtemp(prefix="hydrafs-tracing-", dir=given.scratch))
    try:
        copies = Copies(scratch)
        make_template(copies.root)
        copies.keep("template")
        for name in names:
            done = try_all(copies, name, given.sample, random.Random(f"{given.seed} {name}"))
            total.add(done)
            print(done.row(name), flush=True)
            for fault in done.faults[: given.faults]:
                print(f"  ! {fault}", flush=True)
    finally:
        take_down(scratch / "mount")
        shutil.rmtree(scratch, ignore_errors=True)
    total.seconds = time.monotonic() - begun
    print(total.row(f"all {len(names)} by strace, seed {given.seed}"))
    return int(bool(total.faults))


if __name__ == "__main__":
    sys.exit(main())
