"""A store that is lived in by many programs at once while everything that can break does, for as long as is asked.

``soak.py [--minutes N] [--seed N] [--disk ext4|tmpfs|none] [--keep FOLDER]``; ``make soak MINUTES=30``.

Programs save, replace, write, map, cut, rename, copy and delete models through a real mount, and others hash what they
read from it all the while; the worker dehydrates what it finds at once; commands come and go. Meanwhile the daemon,
its worker and the commands are killed and stopped, the disk is filled, and calls of theirs fail (``strace``). What a
program was told is done must be so, and what it was not told may be done or not; nothing else. Prints what was done
every minute; exit code 1 where a byte was wrong, a model was lost, or somebody hung.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import hashlib
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from small import model

HANG_SECONDS = 120.0
DELETION_SECONDS = 2.0
"""How long after it was told a deletion of an open file may be made; twenty milliseconds where a processor is free."""
LOOKS = 4
"""How often a program opens a file that it is told to look up again."""
GRACE_SECONDS = 3.0
"""How long after a fault a call may still fail of it."""
MOUNT = ("--dehydrate", "auto", "--settle", "0", "--min-size", "1k")
ABSENT = b""
ENDED = ("EIO", "ENOSPC", "EACCES", "EMFILE", "ENOMEM", "ESTALE", "EDQUOT", "EROFS", "EAGAIN", "ENOLCK")
CALLS = ("openat", "newfstatat", "statx", "rename", "unlink", "link", "fsync", "getdents64", "pread64", "pwrite64",
         "ftruncate", "flock", "mkdir", "fcntl", "copy_file_range", "linkat", "unlinkat", "utimensat")  # fmt: skip


BREAKS = [
    *["kill"] * 6, *["kill worker"] * 3, *["kill command"] * 3, *["stop"] * 2, *["stop worker"] * 2, *["fill"] * 2,
    *["call"] * 6, *["call worker"] * 6,
]  # fmt: skip


_MAPPING = """
import mmap, os, sys
written = sys.argv[2:]
with open(sys.argv[1], "r+b" if written else "rb") as file:
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_WRITE if written else mmap.ACCESS_READ) as mapped:
        if written:
            offset, data = int(written[0]), bytes.fromhex(written[1])
            mapped[offset : offset + len(data)] = data
            mapped.flush()
            os.fsync(file.fileno())
        else:
            sys.stdout.buffer.write(mapped[:])
"""


def write_all(fd: int, data: bytes) -> None:
    """A write(2) to a disk that is getting full writes less than it was given."""
    done = 0
    while done < len(data):
        done += os.write(fd, memoryview(data)[done:])


def digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def short(content: bytes | None) -> str:
    return "anything" if content is None else content.hex()[:12] or "absent"


class PageError(OSError):
    """A program was killed by a page that it could not have."""


# What may be read


@dataclasses.dataclass
class Version:
    """A content that a name may have, from when until when; ``ABSENT``: there is no such file; None: anything."""

    content: bytes | None
    since: float
    until: float = float("inf")


class Ledger:
    """Which contents each name may have. Thread safety: any."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._versions: dict[str, list[Version]] = {}
        self.told: dict[str, list[str]] = {}
        """What was said of each name, and when."""

    def may_become(self, name: str, content: bytes | None) -> None:
        with self._lock:
            self._versions.setdefault(name, [Version(ABSENT, 0.0)]).append(Version(content, time.monotonic()))
            self.told.setdefault(name, []).append(f"{time.monotonic():.3f} may become {short(content)}")

    def became(self, name: str, content: bytes) -> None:
        """It was told as done: it is that, and nothing else."""
        now = time.monotonic()
        with self._lock:
            for version in self._versions[name]:
                version.until = min(version.until, now)
            self._versions[name] = [v for v in self._versions[name] if v.until > now - 300]
            self._versions[name].append(Version(content, now))
            self.told[name].append(f"{now:.3f} became {short(content)}")

    def undone(self, since: float) -> None:
        """A daemon was killed: a deletion of a file that somebody had open, told since then, may not have been made."""
        with self._lock:
            for name, versions in self._versions.items():
                if versions[-1].content == ABSENT and versions[-1].since >= since:
                    for version in [v for v in versions[:-1] if v.content != ABSENT and v.until >= since]:
                        version.until = float("inf")
                    self.told[name].append("maybe undone")

    def between(self, name: str, begin: float, end: float) -> set[bytes | None]:
        with self._lock:
            return {v.content for v in self._versions[name] if v.since <= end and v.until >= begin}

    def now(self, name: str) -> set[bytes | None]:
        return self.between(name, time.monotonic(), time.monotonic())

    def names(self) -> list[str]:
        with self._lock:
            return sorted(self._versions)


# The soak


class Soak:
    """See the top of this file."""

    def __init__(self, work: Path, disk: str, seed: int, seconds: float) -> None:
        self.seed, self.seconds = seed, seconds
        self.work, self.disk, self.store, self.point = work, work / "disk", work / "disk" / "store", work / "at" / "m"
        self.kind = disk
        self.ledger, self.counts = Ledger(), Counter[str]()
        self.wrong: list[str] = []
        self.ended = threading.Event()
        self.faults: list[tuple[float, float, str]] = []
        self.explained: set[tuple[str, bytes]] = set()
        self.busy: dict[str, tuple[float, str]] = {}
        self._lock = threading.Lock()
        self.daemon: subprocess.Popen[bytes] | None = None

    def say(self, what: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {what}", flush=True)

    def count(self, what: str, number: int = 1) -> None:
        with self._lock:
            self.counts[what] += number

    def fault(self, what: str) -> None:
        """Something that must never be."""
        with self._lock:
            self.wrong.append(what)
        self.say(f"WRONG: {what}")

    @contextlib.contextmanager
    def breaking(self, what: str) -> Iterator[None]:
        """While this lasts, and for a while after, calls may fail."""
        window = [time.monotonic(), float("inf"), what]
        with self._lock:
            self.faults.append(window)  # type: ignore[arg-type]
        try:
            yield
        finally:
            window[1] = time.monotonic() + GRACE_SECONDS

    def explain(self, name: str, found: bytes, begin: float, end: float) -> None:
        """Whatever helps to find out why; once for each content."""
        with self._lock:
            if (name, found) in self.explained:
                return
            self.explained.add((name, found))
        self.say(f"  read from {begin:.3f} to {end:.3f}; " + "; ".join(self.ledger.told[name][-12:]))
        with self._lock:
            self.say("  broken: " + "; ".join(f"{a:.3f} to {b:.3f} {what}" for a, b, what in self.faults[-4:]))

    def was_broken(self, begin: float, end: float) -> bool:
        with self._lock:
            return any(a <= end and b >= begin for a, b, _ in self.faults)

    @contextlib.contextmanager
    def doing(self, who: str, what: str) -> Iterator[float]:
        begin = time.monotonic()
        self.busy[who] = (begin, what)
        try:
            yield begin
        finally:
            self.busy.pop(who, None)

    # The disk and the mount

    def make_disk(self) -> None:
        self.disk.mkdir(parents=True)
        self.point.parent.mkdir()
        if self.kind == "ext4":
            image = self.work / "image"
            with open(image, "wb") as file:
                file.truncate(96 << 20)
            subprocess.run(["mkfs.ext4", "-q", "-m", "0", image], check=True)
            subprocess.run(["mount", "-o", "loop", image, self.disk], check=True)
        elif self.kind == "tmpfs":
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "none", self.disk], check=True)
        self.store.mkdir()
        if self.kind != "none":
            # What is written while nothing is mounted must not land beside the mount.
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", self.point.parent], check=True)
        self.point.mkdir()
        if self.kind != "none":
            subprocess.run(["mount", "-o", "remount,ro", self.point.parent], check=True)

    def drop_disk(self) -> None:
        if self.kind != "none":
            for folder in (self.point.parent, self.disk):
                subprocess.run(["umount", "-l", folder], check=False, stderr=subprocess.DEVNULL)

    def command(self, *arguments: object, seconds: float = HANG_SECONDS) -> subprocess.CompletedProcess[str]:
        who = f"hydrafs {arguments[0]} {threading.get_ident()}"
        with self.doing(who, " ".join(map(str, arguments))):
            process = subprocess.Popen(
                [sys.executable, "-m", "hydrafs", *map(str, arguments)],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
            with self._lock:
                self.commands[process.pid] = str(arguments[0])
            try:
                out, errors = process.communicate(timeout=seconds)
            except subprocess.TimeoutExpired:
                self.fault(f"hydrafs {' '.join(map(str, arguments))} hangs")
                process.kill()
                out, errors = process.communicate()
            finally:
                with self._lock:
                    self.commands.pop(process.pid, None)
        return subprocess.CompletedProcess(process.args, process.returncode, out, errors)

    commands: dict[int, str] = {}  # noqa: RUF012

    def mount(self) -> None:
        log = open(self.work / "daemon.log", "ab")  # noqa: SIM115
        for _ in range(5):
            self.daemon = subprocess.Popen(
                [sys.executable, "-m", "hydrafs", "mount", self.store, self.point, "--foreground", *MOUNT],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline and self.daemon.poll() is None:
                with contextlib.suppress(OSError):
                    if self.point.stat().st_dev != self.point.parent.stat().st_dev:
                        log.close()
                        return
                time.sleep(0.02)
            self.count("mounts that did not come up")
            if self.daemon.poll() is None:
                self.fault("a mount does not come up in a minute")
                self.daemon.kill()
            self.daemon.wait()
        self.fault("a mount does not come up in five tries")
        self.ended.set()

    def worker_pids(self) -> list[int]:
        assert self.daemon is not None
        found = []
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{self.daemon.pid}/task").iterdir():
                found += [int(p) for p in (task / "children").read_text().split()]
        return found

    # Who uses it

    def run_thread(self, name: str, step: Callable[[random.Random], None]) -> threading.Thread:
        def work() -> None:
            chance = random.Random(f"{self.seed} {name}")
            while not self.ended.is_set():
                try:
                    step(chance)
                except Exception as error:
                    self.fault(f"{name}: {type(error).__name__}: {error}")
                    time.sleep(1)

        thread = threading.Thread(target=work, name=name, daemon=True)
        thread.start()
        return thread

    def reader(self, chance: random.Random) -> None:
        name = chance.choice(self.ledger.names())
        who = threading.current_thread().name
        with self.doing(who, f"reads {name}") as begin:
            try:
                with self.opened(name) as file:
                    if chance.random() < 0.3:
                        size = os.fstat(file.fileno()).st_size
                        data = b"".join(os.pread(file.fileno(), 30_000, o) for o in range(0, size, 30_000))
                    elif chance.random() < 0.2:
                        data = self.mapped(name)
                    else:
                        data = file.readall()
                found = digest(data)
            except FileNotFoundError:
                found = ABSENT
            except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
                end = time.monotonic()
                self.count("reads that failed")
                # A page of a file that is being cut is not to be had.
                changes = isinstance(error, PageError) and len(self.ledger.between(name, begin, end)) > 1
                if isinstance(error, OSError) and not changes and not self.was_broken(begin, end):
                    self.fault(f"{name}: {error}, though nothing was broken")
                    self.explain(name, str(error).encode(), begin, end)
                time.sleep(0.05)
                return
        end = time.monotonic()
        allowed = self.ledger.between(name, begin, end)
        if found == ABSENT and self.was_broken(begin, end):
            return  # the mount may have been down
        if None not in allowed and found not in allowed:
            self.fault(f"{name} read as {short(found)}, not {self._said(allowed)}")
            self.explain(name, found, begin, end)
        self.count("reads checked")
        time.sleep(chance.random() * 0.02)

    def opened(self, name: str) -> io.FileIO:
        """A file, opened to be read; again where the kernel's names were of another file (docs/SEMANTICS.md)."""
        for _ in range(LOOKS - 1):
            try:
                return io.FileIO(self.point / name)
            except OSError as error:
                if error.errno != errno.ESTALE:
                    raise
                self.count("opens that were to be repeated")
                time.sleep(1.2)
        return io.FileIO(self.point / name)

    def mapped(self, name: str, *written: str) -> bytes:
        """Read a file by its pages, or write to them: in another process, since a page that is not to be had kills."""
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _MAPPING, self.point / name, *written], capture_output=True, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        if b"cannot mmap an empty file" in done.stderr:
            return b""
        if b"No such file" in done.stderr:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        if done.returncode == -signal.SIGBUS:
            raise PageError(errno.EIO, "a program that maps got SIGBUS")
        if done.returncode:
            raise OSError(errno.EIO, f"a program that maps ended with {done.returncode}, {done.stderr[-80:]!r}")
        return done.stdout

    @staticmethod
    def _said(allowed: set[bytes | None]) -> list[str]:
        return sorted(map(short, allowed))

    def writer(self, own: list[str]) -> Callable[[random.Random], None]:
        kept: dict[str, bytes | None] = {}

        def step(chance: random.Random) -> None:
            name = chance.choice(own)
            path = self.point / name
            what = chance.choices(
                ["save", "save base", "delete", "write", "map", "rewrite", "rename", "copy", "touch", "cut", "folder"],
                [10, 2, 3, 4, 2, 2, 3, 2, 2, 1, 1],
            )[0]
            who = threading.current_thread().name
            with self.doing(who, f"{what} {name}") as begin:
                try:
                    self.ledger.told.setdefault(name, []).append(f"{time.monotonic():.3f} {what}")
                    self._change(chance, what, name, path, own, kept)
                    self.count("changes done")
                except OSError as error:
                    self.count("changes that failed")
                    for changed in own:
                        kept.setdefault(changed, None)
                    quiet = isinstance(error, FileNotFoundError) or what in ("touch",)
                    if not quiet and not self.was_broken(begin, time.monotonic()):
                        self.fault(f"{what} {name}: {error}, though nothing was broken")
            time.sleep(chance.random() * 0.1)

        return step

    def _change(
        self, chance: random.Random, what: str, name: str, path: Path, own: list[str], kept: dict[str, bytes | None]
    ) -> None:
        """One change of a file that nobody else changes. ``kept``: its bytes, where they are known."""
        family = chance.randrange(2)
        if what in ("save", "save base"):
            delta = 0.0 if what == "save base" and chance.random() < 0.5 else 2e-4
            data = model(chance.randrange(1 << 30), delta, family)
            aside = path.with_name(f"{path.name}.{chance.randrange(1000)}.part")
            with open(aside, "wb", buffering=0) as file:
                write_all(file.fileno(), data)
                os.fsync(file.fileno())
            self.ledger.may_become(name, digest(data))
            kept.pop(name, None)
            os.replace(aside, path)
            self.ledger.became(name, digest(data))
            kept[name] = data
        elif what == "delete":
            self.ledger.may_become(name, ABSENT)
            kept.pop(name, None)
            os.unlink(path)
            self.ledger.became(name, ABSENT)
        elif what in ("write", "map"):
            data = kept.get(name)
            if data is None:
                return
            changed, offset = bytearray(data), 4096 * chance.randrange(len(data) // 4096)
            changed[offset : offset + 8] = os.urandom(8)
            self.ledger.may_become(name, digest(changed))
            kept.pop(name, None)
            if what == "map":
                self.mapped(name, str(offset), changed[offset : offset + 8].hex())
            else:
                with open(path, "r+b", buffering=0) as file:
                    os.pwrite(file.fileno(), changed[offset : offset + 8], offset)
                    os.fsync(file.fileno())
            self.ledger.became(name, digest(changed))
            kept[name] = bytes(changed)
        elif what == "rewrite":
            data = model(chance.randrange(1 << 30), 2e-4, family)
            self.ledger.may_become(name, None)
            kept.pop(name, None)
            with open(path, "wb", buffering=0) as file:
                write_all(file.fileno(), data)
                os.fsync(file.fileno())
            self.ledger.became(name, digest(data))
            kept[name] = data
        elif what == "cut":
            self.ledger.may_become(name, None)
            kept.pop(name, None)
            os.truncate(path, 5000)
            data = path.read_bytes()
            if len(data) != 5000 and not self.was_broken(time.monotonic() - 5, time.monotonic()):
                self.fault(f"{name} was cut to 5000 bytes and has {len(data)}")
            os.unlink(path)
            self.ledger.became(name, ABSENT)
        elif what == "rename":
            other = chance.choice([n for n in own if n != name])
            data = kept.get(name)
            if data is None:
                return
            self.ledger.may_become(name, ABSENT)
            self.ledger.may_become(other, digest(data))
            kept.pop(name, None)
            kept.pop(other, None)
            os.rename(path, self.point / other)
            self.ledger.became(other, digest(data))
            self.ledger.became(name, ABSENT)
            kept[other] = data
        elif what == "copy":
            source = chance.choice([n for n in own if n != name])
            data = kept.get(source)
            if data is None:
                return
            self.ledger.may_become(name, None)
            kept.pop(name, None)
            shutil.copyfile(self.point / source, path)
            self.ledger.became(name, digest(data))
            kept[name] = data
        elif what == "touch":
            if kept.get(name) is not None:
                with open(path, "r+b"):
                    pass
                os.utime(path)
        elif what == "folder":
            folder = self.point / f"folder-{threading.current_thread().name.replace(' ', '-')}"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(exist_ok=True)
            (folder / "x.safetensors").write_bytes(model(chance.randrange(1 << 30)))
            shutil.rmtree(folder)

    def commander(self, chance: random.Random) -> None:
        what = chance.choice(["gc", "gc", "rehome", "status", "ls", "verify", "dehydrate", "rehydrate", "dry"])
        name = chance.choice(self.ledger.names())
        given: dict[str, list[object]] = {
            "gc": ["gc", self.store], "rehome": ["gc", "--rehome", "--jobs", 1, self.store],
            "dry": ["gc", "--dry-run", self.store], "status": ["status", self.point], "ls": ["ls", self.store],
            "verify": ["verify", self.store], "dehydrate": ["dehydrate", "--jobs", 1, self.store / name],
            "rehydrate": ["rehydrate", "--jobs", 1, self.store / name],
        }  # fmt: skip
        if what == "rehydrate":
            return  # what it leaves beside the mount's own changes is for other tests
        begin = time.monotonic()
        done = self.command(*given[what])
        self.count("commands")
        if done.returncode not in (0, -9) and "Traceback" in done.stderr:
            self.fault(f"hydrafs {what}: {done.stderr[-2500:]}")
        if what == "verify" and done.returncode == 1 and not self.was_broken(begin, time.monotonic()):
            self.say(f"verify: {done.stdout[-300:]}")
        time.sleep(chance.random() * 2)

    # What breaks

    def breaker(self, chance: random.Random) -> None:
        if self.ended.wait(0.5 + chance.random() * 4):
            return
        what = chance.choice(BREAKS)
        assert self.daemon is not None
        with self.breaking(what):
            if what == "kill":
                self.kill_daemon()
                time.sleep(chance.random() * 0.3)
                self.mount()
            elif what == "kill worker":
                for pid in self.worker_pids()[:1]:
                    self.count("kills of the worker")
                    with contextlib.suppress(OSError):
                        os.kill(pid, signal.SIGKILL)
                if chance.random() < 0.5:  # it is started again after a minute, or by the next mount
                    self.kill_daemon()
                    self.mount()
            elif what == "kill command":
                with self._lock:
                    running = list(self.commands)
                for pid in running[:1]:
                    self.count("kills of a command")
                    with contextlib.suppress(OSError):
                        os.kill(pid, signal.SIGKILL)
            elif what.startswith("stop"):
                pids = [self.daemon.pid] if what == "stop" else self.worker_pids()[:1]
                for pid in pids:
                    self.count("stops")
                    with contextlib.suppress(OSError):
                        os.kill(pid, signal.SIGSTOP)
                        time.sleep(chance.random() * 2)
                        os.kill(pid, signal.SIGCONT)
            elif what == "fill":
                self.fill(chance.random() * 3)
            else:
                pids = [self.daemon.pid] if what == "call" else [*self.worker_pids()[:1], *list(self.commands)][:1]
                for pid in pids:
                    self.inject(pid, chance)

    def kill_daemon(self) -> None:
        assert self.daemon is not None
        self.count("kills of the daemon")
        self.daemon.kill()
        self.daemon.wait()
        # docs/SEMANTICS.md, the moment of a deletion; programs are told within that of what was done before.
        self.ledger.undone(time.monotonic() - DELETION_SECONDS)

    def fill(self, seconds: float) -> None:
        """The disk is full for a while."""
        if self.kind == "none":
            return
        self.count("full disks")
        try:
            with open(self.disk / "fill", "wb", buffering=0) as file:
                for size in (1 << 20, 4096):
                    with contextlib.suppress(OSError):
                        while True:
                            file.write(bytes(size))
            self.ended.wait(seconds)
        finally:
            os.unlink(self.disk / "fill")

    def inject(self, pid: int, chance: random.Random) -> None:
        """Some calls of a process fail for a second or two."""
        call, error = ",".join(chance.sample(CALLS, 4)), chance.choice(ENDED)
        when = f"{chance.randrange(1, 20)}+{chance.randrange(1, 12)}"
        paths = [os.path.join(f, n) for f, _, names in os.walk(self.store) for n in ("", *names) if ".sqlite" not in n]
        about = [argument for path in paths[:400] for argument in ("-P", path.rstrip("/"))]
        log = self.work / "strace.log"
        strace = subprocess.Popen(
            ["strace", "-f", "-p", str(pid), "-e", f"trace={call}", "-e", f"inject={call}:error={error}:when={when}",
             *about, "-o", log], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        time.sleep(0.5 + chance.random() * 2)
        strace.terminate()
        try:
            strace.wait(20)
        except subprocess.TimeoutExpired:
            strace.kill()
            strace.wait()
        with contextlib.suppress(OSError):
            self.count("calls that failed", log.read_text(errors="replace").count("(INJECTED)"))
            log.unlink()

    # All of it

    def run(self) -> int:
        self.make_disk()
        try:
            return self._run()
        finally:
            self.ended.set()
            if self.daemon is not None and self.daemon.poll() is None:
                self.daemon.kill()
            subprocess.run(["fusermount3", "-u", "-z", self.point], check=False, stderr=subprocess.DEVNULL)
            self.drop_disk()

    def _run(self) -> int:
        steady = [f"steady{n}.safetensors" for n in range(6)]
        for number, name in enumerate(steady):
            data = model(number, 0.0 if number < 2 else 2e-4, number % 2)
            (self.store / name).write_bytes(data)
            self.ledger.may_become(name, digest(data))
            self.ledger.became(name, digest(data))
        self.mount()
        threads = []
        for writer in range(3):
            own = [f"w{writer}-{n}.safetensors" for n in range(5)]
            for name in own:
                self.ledger.may_become(name, ABSENT)
            threads.append(self.run_thread(f"writer {writer}", self.writer(own)))
        threads += [self.run_thread(f"reader {n}", self.reader) for n in range(3)]
        threads.append(self.run_thread("commander", self.commander))
        threads.append(self.run_thread("breaker", self.breaker))
        begun = told = time.monotonic()
        while time.monotonic() - begun < self.seconds and not self.ended.wait(0.5):
            now = time.monotonic()
            for who, (since, what) in list(self.busy.items()):
                if now - since > HANG_SECONDS:
                    self.fault(f"{who} hangs: {what}")
                    self.count("hangs")
                    self.ended.set()
            if now - told > 60:
                told = now
                self.say(self.line())
        self.ended.set()
        deadline = time.monotonic() + HANG_SECONDS
        for thread in threads:
            thread.join(max(0.1, deadline - time.monotonic()))
            if thread.is_alive():
                self.fault(f"{thread.name} does not end: {self.busy.get(thread.name)}")
                self.count("hangs")
        if self.daemon is not None and self.daemon.poll() is None:
            self.daemon.kill()
            self.daemon.wait()
        self.last_look()
        self.say(self.line())
        return int(bool(self.wrong))

    def last_look(self) -> None:
        """After a start with nothing broken: every model, through a mount and by the store's own command."""
        self.ended.clear()
        self.mount()
        self.check_all("at the end")
        for arguments in (["gc", "--rehome", "--jobs", 1, self.store], ["gc", self.store]):
            done = self.command(*arguments)
            if done.returncode:
                self.fault(f"{arguments[0]} at the end: {done.stderr or done.stdout}")
        self.check_all("after gc")
        subprocess.run([sys.executable, "-m", "hydrafs", "umount", self.point], check=False)
        done = self.command("verify", self.store)
        if done.returncode:
            self.fault(f"verify at the end: {done.stdout[-800:]}{done.stderr[-800:]}")

    def check_all(self, when: str) -> None:
        for name in self.ledger.names():
            try:
                found = digest((self.point / name).read_bytes())
            except FileNotFoundError:
                found = ABSENT
            except OSError as error:
                self.fault(f"{when}: {name}: {error}")
                continue
            allowed = self.ledger.now(name)
            if None not in allowed and found not in allowed:
                self.fault(f"{when}: {name} is {short(found)}, not {self._said(allowed)}")
            self.count("reads checked")

    def line(self) -> str:
        told = ", ".join(f"{value} {what}" for what, value in sorted(self.counts.items()))
        return f"{told}; {len(self.wrong)} wrong"


def main() -> int:
    """See the top of this file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--disk", choices=["ext4", "tmpfs", "none"], default="ext4" if os.geteuid() == 0 else "none")
    parser.add_argument("--keep", help="where to leave the store when something was wrong")
    given = parser.parse_args()
    seed = random.SystemRandom().randrange(1 << 31) if given.seed is None else given.seed
    work = Path(tempfile.mkdtemp(prefix="hydrafs-soak-"))
    print(f"seed {seed}, {given.minutes:g} minutes, {given.disk}, {work}", flush=True)
    soak = Soak(work, given.disk, seed, given.minutes * 60)
    code = 1
    try:
        code = soak.run()
    finally:
        if code and given.keep:
            shutil.copytree(work, given.keep, dirs_exist_ok=True, symlinks=True)
        print(("nothing was lost, no byte was wrong" if not code else "\n".join(["WRONG:", *soak.wrong])), flush=True)
        if not os.path.ismount(soak.disk):
            shutil.rmtree(work, ignore_errors=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
