"""``hydrafs doctor``: what this machine has of what hydrafs needs."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from hydrafs.cli.common import json_option, print_json, print_table
from hydrafs.codecs import rans
from hydrafs.digests import twins_available
from hydrafs.errors import HydraError, MountFailed
from hydrafs.fuse import load_binding
from hydrafs.mountpoints import our_mounts

_PACKAGES = ("numpy", "zstandard", "xxhash", "msgspec", "cachetools", "safetensors")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. ``state``: ``ok``, ``note`` (it works, and could be better), ``bad``."""

    what: str
    state: str
    found: str
    remedy: str = ""


@click.command("doctor", short_help="What is there, and what to do.")
@json_option
def command(as_json: bool) -> int:
    """Look at everything that a mount needs, and say what to do about what is missing.

    Exit code 11 if a mount cannot work here.
    """
    findings = [
        *_system(),
        *_device(),
        *_libraries(),
        _binding(),
        *_helpers(),
        *_limits(),
        *_python(),
        _codec(),
        _formulas(),
        _hashing(),
        *_mounts(),
    ]
    bad = [f for f in findings if f.state == "bad"]
    if as_json:
        print_json({"ok": not bad, "findings": [asdict(f) for f in findings]})
    else:
        print_table(["what", "state", "found", "what to do"], [[f.what, f.state, f.found, f.remedy] for f in findings])
    return MountFailed.exit_code if bad else 0


def _system() -> list[Finding]:
    release = platform.release()
    version = tuple(int(p) if p.isdigit() else 0 for p in release.split("-")[0].split(".")[:2])
    kernel = Finding("kernel", "ok", release)
    if version < (4, 20):
        kernel = Finding("kernel", "note", release, "from 4.20 on, reads are of 1 MiB instead of 128 KiB")
    found = [kernel, Finding("processor", "ok", f"{os.cpu_count()} cores, {platform.machine()}{_simd()}")]
    if "microsoft" in release.lower():
        found.append(Finding("WSL", "note", release, "keep the store on the Linux filesystem, not under /mnt/c"))
    if Path("/.dockerenv").exists() or Path("/run/.containerenv").exists():
        remedy = "run the container with --device /dev/fuse --cap-add SYS_ADMIN; to show the mount outside, rshared"
        found.append(Finding("container", "note", "inside one", remedy))
    return found


def _simd() -> str:
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(errors="replace")
        flags = next((line.split(":", 1)[1].split() for line in text.splitlines() if line.startswith("flags")), [])
        names = [
            label for flag, label in (("avx2", "AVX2"), ("avx512bw", "AVX-512"), ("sha_ni", "SHA")) if flag in flags
        ]
        return f", {', '.join(names)}" if names else ""
    return ""


def _device() -> list[Finding]:
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        return [Finding("/dev/fuse", "bad", "missing", "modprobe fuse; in a container add --device /dev/fuse")]
    except OSError as error:
        return [Finding("/dev/fuse", "bad", error.strerror or "", "ask for permission to open it, or run as root")]
    return [Finding("/dev/fuse", "ok", "opens")]


def _libraries() -> list[Finding]:
    found = []
    for label, names in (("libfuse3", ("libfuse3.so.4", "libfuse3.so.3")), ("libfuse2", ("libfuse.so.2",))):
        loaded = ""
        for name in names:
            with contextlib.suppress(OSError):
                library = ctypes.CDLL(name)
                version = library.fuse_version()
                base = 10 if version < 100 else 100
                loaded = f"{name}, {version // base}.{version % base}"
                break
        if loaded:
            found.append(Finding(label, "ok", loaded))
        elif label == "libfuse3":
            found.append(
                Finding(label, "note", "missing", "apt-get install fuse3: requests are eight times larger with it")
            )
        else:
            found.append(Finding(label, "ok", "missing, and only needed by fusepy"))
    return found


def _binding() -> Finding:
    forced = os.environ.get("HYDRAFS_FUSE") or None
    try:
        binding = load_binding(forced)
    except HydraError as error:
        return Finding("binding", "bad", error.what + (f": {error.detail}" if error.detail else ""), error.remedy)
    return Finding("binding", "ok", str(binding.name) + (" (forced by HYDRAFS_FUSE)" if forced else ""))


def _helpers() -> list[Finding]:
    if os.geteuid() == 0:
        return [Finding("privileges", "ok", "root mounts directly")]
    helper = shutil.which("fusermount3") or shutil.which("fusermount")
    if not helper:
        return [Finding("fusermount3", "bad", "missing", "apt-get install fuse3")]
    found = [Finding("fusermount3", "ok", helper)]
    if not os.stat(helper).st_mode & 0o4000:
        found = [Finding("fusermount3", "bad", f"{helper} is not setuid root", f"chmod u+s {helper}")]
    allowed = False
    with contextlib.suppress(OSError):
        lines = Path("/etc/fuse.conf").read_text().splitlines()
        allowed = any(line.strip() == "user_allow_other" for line in lines)
    if allowed:
        found.append(Finding("user_allow_other", "ok", "in /etc/fuse.conf"))
    else:
        remedy = "for -o allow_other write user_allow_other into /etc/fuse.conf"
        found.append(Finding("user_allow_other", "note", "not in /etc/fuse.conf", remedy))
    return found


def _limits() -> list[Finding]:
    found = []
    with contextlib.suppress(OSError, ValueError):
        pages = int(Path("/proc/sys/fs/fuse/max_pages_limit").read_text())
        found.append(Finding("request size", "ok", f"up to {pages * 4} KiB"))
    for mount in our_mounts():
        with contextlib.suppress(OSError, ValueError):
            device = os.stat(mount.mountpoint).st_dev
            path = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
            readahead = int(path.read_text())
            if readahead < 1024:
                remedy = f"as root: echo 1024 > {path}"
                found.append(Finding("read-ahead", "note", f"{readahead} KiB at {mount.mountpoint}", remedy))
            else:
                found.append(Finding("read-ahead", "ok", f"{readahead} KiB at {mount.mountpoint}"))
    return found


def _python() -> list[Finding]:
    found = [Finding("Python", "ok" if sys.version_info >= (3, 10) else "bad", platform.python_version())]
    for package in _PACKAGES:
        try:
            found.append(Finding(package, "ok", importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            found.append(Finding(package, "bad", "missing", f"pip install {package}"))
    there = importlib.util.find_spec("torch") is not None
    found.append(Finding("torch", "ok", "there" if there else "missing, and not needed by a mount"))
    return found


def _codec() -> Finding:
    level = rans.level()
    if level.startswith("none"):
        remedy = "apt-get install gcc python3-dev, then install hydrafs again: diffs get a third smaller and faster"
        return Finding("native codec", "note", level, remedy)
    return Finding("native codec", "ok", level)


def _formulas() -> Finding:
    if importlib.util.find_spec("hydrafs._formulas") is None:
        remedy = "apt-get install gcc python3-dev, then install hydrafs again: virtual models are read twice as fast"
        return Finding("native formulas", "note", "none: extension not built", remedy)
    return Finding("native formulas", "ok", "there")


def _hashing() -> Finding:
    if twins_available():
        return Finding("hashing", "ok", "two SHA-256s at once, by the processor's instructions")
    if importlib.util.find_spec("hydrafs._twins") is None:
        remedy = "apt-get install gcc python3-dev, then install hydrafs again: dehydrating gets a tenth faster"
        return Finding("hashing", "note", "one SHA-256 at a time: extension not built", remedy)
    return Finding("hashing", "ok", "one SHA-256 at a time: this processor has no instructions for it")


def _mounts() -> list[Finding]:
    return [Finding("mount", "ok", f"{m.source} at {m.mountpoint}") for m in our_mounts()]
