"""What ``hydrafs doctor`` looks at: the machine, what hydrafs is made of, its mounts, and a store.

Every function gives findings and changes nothing. What may hang (a mount whose daemon does not answer) is asked with a
limit.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from hydrafs import apparmor
from hydrafs.child import ask_filesystems
from hydrafs.cli.common import daemon_at, human, kept_line, leftovers
from hydrafs.codecs import rans
from hydrafs.digests import twins_available
from hydrafs.errors import HydraError, NoLocks
from hydrafs.libfuse import MAX_READ_NBYTES, load_binding
from hydrafs.mountpoints import READAHEAD_KIB, all_mounts, our_mounts, wait_until_answers
from hydrafs.needs import census
from hydrafs.retained import kept, unheld
from hydrafs.service.control import does_not_answer
from hydrafs.service.memory import fitting_cache, limit_nbytes
from hydrafs.store import Store, trailer_of

_PACKAGES = (
    "numpy", "zstandard", "xxhash", "blake3", "msgspec", "cachetools", "click", "rich", "tomli-w", "safetensors",
    "watchdog",
)  # fmt: skip
_OPTIONAL = {
    "prometheus_client": ("prometheus-client", "hydrafs mount --metrics-address needs it"),
    "diskcache": ("diskcache", "hydrafs hashes --webui needs it for A1111 and Forge"),
    "matplotlib": ("matplotlib", "hydrafs report needs it"),
    "torch": ("torch", "only hydrafs import needs it"),
}
_SYS_ADMIN = 21  # linux/capability.h
_OPEN_FILES = 1024
_ANSWER_SECONDS = 2.0
_FUTURE_SECONDS = 5.0
_OLDEST_CLOCK = 1_700_000_000  # this program is younger
_SLOW_FILESYSTEMS = {
    "9p": "Windows' disk, seen from WSL: copy the store to the Linux filesystem",
    "drvfs": "Windows' disk, seen from WSL: copy the store to the Linux filesystem",
    "vfat": "it takes no file of 4 GiB, no modes and no extended attributes",
    "nfs": "times and locks of other machines may lag; mount from one machine only",
    "nfs4": "times and locks of other machines may lag; mount from one machine only",
    "cifs": "times and locks of other machines may lag; mount from one machine only",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. ``state``: ``ok``, ``note`` (it works, and could be better), ``bad``."""

    what: str
    state: str
    found: str
    remedy: str = ""


def system() -> Iterator[Finding]:
    """The kernel, the processor, and what this machine really is."""
    release = platform.release()
    version = tuple(int(p) if p.isdigit() else 0 for p in release.split("-")[0].split(".")[:2])
    if version < (4, 20):
        yield Finding("kernel", "note", release, "from 4.20 on, reads are of 1 MiB instead of 128 KiB")
    else:
        yield Finding("kernel", "ok", release)
    yield Finding("processor", "ok", f"{os.cpu_count()} cores, {platform.machine()}{_simd()}")
    if "microsoft" in release.lower():
        if "Microsoft" in release and "WSL2" not in release:
            yield Finding("WSL", "bad", "version 1", "it has no FUSE: wsl --set-version DISTRIBUTION 2")
        else:
            yield Finding("WSL", "note", "version 2", "keep the store on the Linux filesystem, not under /mnt/c")
    container = _container()
    if container:
        remedy = "" if _has_capability(_SYS_ADMIN) else "run it with --device /dev/fuse --cap-add SYS_ADMIN"
        if remedy and os.geteuid() != 0:
            remedy += ", or install fuse3 in it"
        where = "to show the mount outside: a volume with rshared propagation"
        yield Finding("container", "note", container, f"{remedy}; {where}" if remedy else where)
    else:
        yield Finding("container", "ok", "none")


def _simd() -> str:
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(errors="replace")
        flags = next((line.split(":", 1)[1].split() for line in text.splitlines() if line.startswith("flags")), [])
        names = [
            label for flag, label in (("avx2", "AVX2"), ("avx512bw", "AVX-512"), ("sha_ni", "SHA")) if flag in flags
        ]
        return f", {', '.join(names)}" if names else ""
    return ""


def _container() -> str:
    for sign, name in (("/.dockerenv", "Docker"), ("/run/.containerenv", "Podman")):
        if os.path.exists(sign):
            return name
    with contextlib.suppress(OSError):
        return Path("/run/systemd/container").read_text().strip()
    with contextlib.suppress(OSError):
        for line in Path("/proc/1/environ").read_bytes().split(b"\0"):
            if line.startswith(b"container="):
                return os.fsdecode(line[10:])
    return ""


def _has_capability(number: int) -> bool:
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("CapEff:"):
                return bool(int(line.split()[1], 16) >> number & 1)
    return False


def fuse() -> Iterator[Finding]:
    """The device, the libraries, the binding, and who may mount."""
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
        yield Finding("/dev/fuse", "ok", "opens")
    except FileNotFoundError:
        yield Finding("/dev/fuse", "bad", "missing", "modprobe fuse; in a container add --device /dev/fuse")
    except OSError as error:
        yield Finding("/dev/fuse", "bad", error.strerror or "", "ask for permission to open it, or run as root")
    yield from _libraries()
    forced = os.environ.get("HYDRAFS_FUSE") or None
    try:
        binding = load_binding(forced)
    except HydraError as error:
        yield Finding("binding", "bad", error.what + (f": {error.detail}" if error.detail else ""), error.remedy)
    else:
        found = f"{binding.name}, libfuse {binding.major}.{binding.minor}"
        yield Finding("binding", "ok", found + (" (forced by HYDRAFS_FUSE)" if forced else ""))
        yield from _requests(binding.max_read_nbytes)
    yield from _helpers()


def _libraries() -> Iterator[Finding]:
    for label, names in (("libfuse3", ("libfuse3.so.4", "libfuse3.so.3")), ("libfuse2", ("libfuse.so.2",))):
        loaded = ""
        for name in names:
            with contextlib.suppress(OSError):
                version = ctypes.CDLL(name).fuse_version()
                base = 10 if version < 100 else 100
                loaded = f"{name}, {version // base}.{version % base}"
                break
        if loaded:
            yield Finding(label, "ok", loaded)
        elif label == "libfuse3":
            yield Finding(label, "note", "missing", "apt-get install fuse3: requests are eight times larger with it")
        else:
            yield Finding(label, "ok", "missing, and only needed by fusepy")


def _requests(nbytes: int) -> Iterator[Finding]:
    """How large one read request gets, and what else the kernel limits."""
    knob = Path("/proc/sys/fs/fuse/max_pages_limit")
    limit = _number(knob)
    allowed = nbytes if limit is None else min(nbytes, limit * resource.getpagesize())
    if allowed < MAX_READ_NBYTES[3] and limit is not None and limit * resource.getpagesize() < nbytes:
        remedy = f"as root: echo {nbytes // resource.getpagesize()} > {knob}"
        yield Finding("request size", "note", f"{allowed >> 10} KiB, by {knob.name}", remedy)
    elif allowed < MAX_READ_NBYTES[3]:
        yield Finding("request size", "note", f"{allowed >> 10} KiB", "with libfuse3 and mfusepy it is 1024 KiB")
    else:
        yield Finding("request size", "ok", f"{allowed >> 10} KiB")
    seconds = _number(Path("/proc/sys/fs/fuse/max_request_timeout"))
    if seconds:
        remedy = "a slow disk may end the mount; as root: echo 0 > /proc/sys/fs/fuse/max_request_timeout"
        yield Finding("request timeout", "note", f"{seconds} s", remedy)
    yield Finding("FUSE passthrough", "ok", "not needed: what is decoded is kept in the kernel's page cache")


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _helpers() -> Iterator[Finding]:
    if os.geteuid() == 0:
        helper = shutil.which("fusermount3")
        yield Finding("fusermount3", "ok", helper or "missing, and only needed by users who are not root")
        if _has_capability(_SYS_ADMIN):
            yield Finding("privileges", "ok", "root mounts directly")
        else:
            remedy = "give this root CAP_SYS_ADMIN (containers: --cap-add SYS_ADMIN)"
            yield Finding("privileges", "bad", "root without CAP_SYS_ADMIN", remedy)
    else:
        helper = shutil.which("fusermount3") or shutil.which("fusermount")
        if not helper:
            yield Finding("fusermount3", "bad", "missing", "apt-get install fuse3")
        elif not os.stat(helper).st_mode & 0o4000:
            yield Finding("fusermount3", "bad", f"{helper} is not setuid root", f"as root: chmod u+s {helper}")
        else:
            yield Finding("fusermount3", "ok", helper)
        allowed = False
        with contextlib.suppress(OSError):
            lines = Path("/etc/fuse.conf").read_text().splitlines()
            allowed = any(line.strip() == "user_allow_other" for line in lines)
        if allowed:
            yield Finding("user_allow_other", "ok", "in /etc/fuse.conf")
        else:
            remedy = "for -o allow_other write user_allow_other into /etc/fuse.conf"
            yield Finding("user_allow_other", "note", "not in /etc/fuse.conf", remedy)
    script = next((p for p in ("/sbin/mount.hydrafs", "/usr/sbin/mount.hydrafs") if os.access(p, os.X_OK)), None)
    if script:
        yield Finding("mount -t hydrafs", "ok", script)
    else:
        remedy = "only lines of fstab need it: ln -s $(command -v mount.hydrafs) /sbin/"
        yield Finding("mount -t hydrafs", "ok", "no /sbin/mount.hydrafs", remedy)


def confined(mountpoint: Path | None) -> Iterator[Finding]:
    """What AppArmor lets a user's mount be; of ``mountpoint`` (resolved), where one is meant."""
    if not apparmor.is_confined():
        return
    where = f"{apparmor.PROFILE} lets users mount in some folders only"
    if mountpoint is None:
        yield Finding("AppArmor", "ok", where, apparmor.REMEDY)
    elif apparmor.is_allowed(mountpoint):
        yield Finding("AppArmor", "ok", f"{apparmor.PROFILE} lets users mount at {mountpoint}")
    elif os.geteuid() == 0:
        yield Finding("AppArmor", "note", f"{where}: not at {mountpoint}, where root can", apparmor.REMEDY)
    else:
        yield Finding("AppArmor", "bad", f"{where}: not at {mountpoint}", apparmor.REMEDY)


def limits() -> Iterator[Finding]:
    """Open files and memory."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < _OPEN_FILES:
        yield Finding("open files", "note", str(soft), f"ulimit -n {4 * _OPEN_FILES}: each open model takes a few")
    else:
        yield Finding("open files", "ok", "unlimited" if soft == resource.RLIM_INFINITY else str(soft))
    limit = limit_nbytes()
    total = os.sysconf("SC_PHYS_PAGES") * resource.getpagesize()
    cache = fitting_cache(None, limit)
    found = f"{human(total)}" if limit is None else f"{human(limit)} by control group"
    if cache > total * 3 / 4:
        yield Finding("memory", "note", found, f"mount with --cache-size {int(total / 2) >> 20}M: the default is 4G")
    else:
        yield Finding("memory", "ok", f"{found}; the cache takes {human(cache)} at most")


def python() -> Iterator[Finding]:
    """Python, its libraries, and what of hydrafs was compiled."""
    yield Finding("Python", "ok" if sys.version_info >= (3, 10) else "bad", platform.python_version())
    for package in _PACKAGES:
        try:
            yield Finding(package, "ok", importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(package, "bad", "missing", f"pip install {package}")
    for module, (package, purpose) in _OPTIONAL.items():
        if importlib.util.find_spec(module) is not None:
            yield Finding(package, "ok", "there")
        else:
            yield Finding(package, "ok", "missing", f"{purpose} (pip install {package})")
    again = "apt-get install gcc python3-dev, then install hydrafs again"
    level = rans.level()
    if level.startswith("none"):
        yield Finding("native codec", "note", level, f"{again}: diffs get a third smaller and faster")
    else:
        yield Finding("native codec", "ok", level)
    if importlib.util.find_spec("hydrafs._formulas") is not None:
        yield Finding("native formulas", "ok", "built")
    else:
        yield Finding("native formulas", "note", "not built", f"{again}: virtual models are read twice as fast")
    if twins_available():
        yield Finding("hashing", "ok", "two SHA-256s at once, by the processor's instructions")
    elif importlib.util.find_spec("hydrafs._twins") is None:
        remedy = f"{again}: dehydrating gets a tenth faster"
        yield Finding("hashing", "note", "one SHA-256 at a time: extension not built", remedy)
    else:
        yield Finding("hashing", "ok", "one SHA-256 at a time: this processor has no instructions for it")


def mounts() -> Iterator[Finding]:
    """The mounts that are up, whether they answer, how far the kernel reads ahead; and the units of systemd."""
    found = our_mounts()
    if not found and os.geteuid() == 0:
        yield Finding("readahead", "ok", f"{READAHEAD_KIB} KiB, set when root mounts")
    elif not found:
        remedy = "reads through a user's mount are half as fast; once it is mounted, doctor tells what root can do"
        yield Finding("readahead", "note", "128 KiB: only root can set more", remedy)
    answers = ask_filesystems([mount.mountpoint for mount in found], _ANSWER_SECONDS)
    for mount, answer in zip(found, answers, strict=True):
        where = f"{mount.source} at {mount.mountpoint}"
        if answer is None:
            pid = daemon_at(mount.mountpoint)
            silent = does_not_answer(mount.mountpoint, pid)
            remedy = silent.remedy if pid else f"hydrafs umount --stale {mount.mountpoint}, or --lazy; then mount again"
            yield Finding("mount", "note", f"{where}: {silent.what}: {silent.detail}", remedy)
            continue
        try:
            wait_until_answers(mount.mountpoint, _ANSWER_SECONDS)
        except HydraError as error:
            remedy = f"hydrafs umount --stale {mount.mountpoint}, or --lazy; then mount again"
            yield Finding("mount", "note", f"{where}: {error.what}", remedy)
            continue
        yield Finding("mount", "ok", f"{where}, answers")
        knob = Path(f"/sys/class/bdi/{mount.device}/read_ahead_kb")
        kib = _number(knob)
        if kib is not None and kib < READAHEAD_KIB:
            yield Finding("readahead", "note", f"{kib} KiB at {mount.mountpoint}", f"as root: echo 1024 > {knob}")
        elif kib is not None:
            yield Finding("readahead", "ok", f"{kib} KiB at {mount.mountpoint}")


def units() -> Iterator[Finding]:
    """The units of hydrafs, where systemd runs."""
    if not os.path.isdir("/run/systemd/system"):
        yield Finding("systemd", "ok", "does not run here")
        return
    for scope in ([], ["--user"]) if os.geteuid() else ([],):
        for unit in _systemctl(*scope, "list-units", "--all", "hydrafs*"):
            name, state = str(unit.get("unit", "")), f"{unit.get('active')}, {unit.get('sub')}"
            look = " ".join(["journalctl", *scope, "-u", name])
            if unit.get("active") == "failed":
                yield Finding("systemd unit", "note", f"{name}: {state}", look)
            else:
                yield Finding("systemd unit", "ok", f"{name}: {state}")
    if not any(_systemctl("list-unit-files", "hydrafs@*")):
        folder = Path(sys.prefix, "share/hydrafs/systemd")
        yield Finding("systemd", "ok", "no unit hydrafs@ is installed", f"to mount at boot: {folder}, docs/SERVICE.md")


def _systemctl(*arguments: str) -> list[dict[str, Any]]:
    with contextlib.suppress(OSError, subprocess.SubprocessError, msgspec.DecodeError):
        done = subprocess.run(
            ["systemctl", *arguments, "--output=json", "--no-pager"], capture_output=True, timeout=10, check=False
        )
        return msgspec.json.decode(done.stdout, type=list[dict[str, Any]])
    return []


def clock() -> Iterator[Finding]:
    """Whether the clock can be right."""
    now = time.time()
    if now < _OLDEST_CLOCK:
        said = time.strftime("%F", time.gmtime(now))
        yield Finding("clock", "note", f"it says {said}", "set it: what is kept is told from what changed by its times")
    else:
        yield Finding("clock", "ok", time.strftime("%F %T %Z", time.localtime(now)))


def store(root: Path) -> Iterator[Finding]:
    """A store: its disk, its folder, the times of its files.

    Raises:
        HydraError: there is no such store.
    """
    with contextlib.closing(Store(root, looks=True)) as opened:
        yield from _disk(opened)
        newest, newest_path = 0.0, root
        for model in opened.models():
            with contextlib.suppress(OSError):
                changed = os.stat(model.path).st_mtime
                if changed > newest:
                    newest, newest_path = changed, model.path
        ahead = newest - time.time()
        if ahead > _FUTURE_SECONDS:
            remedy = "set the clock, or touch the file: what is newer than now never seems to rest"
            yield Finding("clock of the store", "note", f"{newest_path} is {ahead:.0f} s in the future", remedy)
        elif newest:
            yield Finding("clock of the store", "ok", "no file is newer than now")
        yield from _keeps(opened)
        for folder in (*opened.base_folders, *opened.base_files):
            if not folder.exists():
                remedy = f"bring it back, or take it out of {opened.private / 'config.toml'}"
                what = "base file" if folder in opened.base_files else "base folder"
                yield Finding(what, "note", f"{folder}: missing", remedy)


def _keeps(opened: Store) -> Iterator[Finding]:
    """What cannot be looked at, what is kept besides the listing, and what nothing keeps."""
    needs = census(opened)
    for trouble in needs.troubles:
        remedy = "nothing that might be needed is removed while it cannot be looked at: give the right, or restore it"
        yield Finding("cannot be looked at", "note", str(trouble), remedy)
    others = kept(opened, needs)
    if others:
        yield Finding("kept for others", "ok", kept_line(others).partition(": ")[2])
    for line in leftovers(opened):
        found, _, remedy = line.rpartition("; ")
        yield Finding("left over", "note", found, remedy)
    for need in unheld(opened, needs):
        found = f"{need.parent.name}: needed by {', '.join(need.dependents[:3]) or 'what is kept'}"
        remedy = "keep it safe: it is missing, or on another filesystem, and only its name keeps it"
        yield Finding("parent not held", "note", found, remedy)


def _disk(opened: Store) -> Iterator[Finding]:
    root = opened.root
    largest = listed = 0
    for model in opened.models():
        with contextlib.suppress(OSError, HydraError):
            size = trailer_of(model.path).size if model.is_diff else os.stat(model.path).st_size
            largest, listed = max(largest, size), listed + 1
    disk = os.statvfs(root)
    free = disk.f_bavail * disk.f_frsize
    found = f"{human(free)} free of {human(disk.f_blocks * disk.f_frsize)}"
    found += f"; {listed} models, the largest {human(largest)}"
    if free < largest:
        yield Finding("disk space", "note", found, "no room to rehydrate the largest model, or to take one like it in")
    else:
        yield Finding("disk space", "ok", found)
    if disk.f_files and disk.f_favail < 1000:
        yield Finding("inodes", "note", f"{disk.f_favail} free", "free some: each diff takes one")
    try:
        opened.check_locks()
    except NoLocks as error:
        yield Finding("locks", "bad", f"this filesystem has none ({error.detail})", error.remedy)
    above = [m for m in all_mounts() if root.is_relative_to(m.mountpoint)]
    kind = max(above, key=lambda m: len(m.mountpoint.parts)).fstype if above else "unknown"
    if kind in _SLOW_FILESYSTEMS:
        yield Finding("filesystem", "note", kind, _SLOW_FILESYSTEMS[kind])
    else:
        yield Finding("filesystem", "ok", kind)
    if os.access(root, os.W_OK):
        yield Finding("store", "ok", f"{root} can be written to")
    else:
        yield Finding("store", "note", f"{root} cannot be written to", "it can be mounted; nothing can be dehydrated")
