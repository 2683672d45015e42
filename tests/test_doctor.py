"""``hydrafs doctor``: each thing that can be missing is found where it is missing, and told with its remedy."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from conftest import Filled
from test_cli import Run, bad, good, run

from hydrafs.cli import findings
from hydrafs.cli.findings import Finding
from hydrafs.daemon import _libfuse_error
from hydrafs.mountpoints import MountInfo, our_mounts, unmount
from hydrafs.service.memory import fitting_cache, limit_nbytes

__all__ = ["run"]  # a fixture

Patch = pytest.MonkeyPatch


def of(found: Iterable[Finding], what: str) -> Finding:
    chosen = [f for f in found if f.what == what]
    assert len(chosen) == 1, chosen
    assert chosen[0].state in ("ok", "note", "bad")
    assert chosen[0].state == "ok" or chosen[0].remedy, "no remedy"
    return chosen[0]


@pytest.fixture
def without(monkeypatch: Patch) -> Callable[..., None]:
    """Some paths are not there, or hold something else."""

    def set_(replaced: dict[str, str | None]) -> None:
        real_read, real_exists, real_open = Path.read_text, os.path.exists, os.open

        def read(path: Path, *a: Any, **k: Any) -> str:
            if str(path) in replaced:
                text = replaced[str(path)]
                if text is None:
                    raise FileNotFoundError(2, "No such file or directory", str(path))
                return text
            return real_read(path, *a, **k)

        def open_(path: Any, *a: Any, **k: Any) -> int:
            if str(path) in replaced and replaced[str(path)] is None:
                raise FileNotFoundError(2, "No such file or directory", str(path))
            return real_open(path, *a, **k)

        monkeypatch.setattr(Path, "read_text", read)
        monkeypatch.setattr(os, "open", open_)
        monkeypatch.setattr(
            os.path, "exists", lambda p: replaced[str(p)] is not None if str(p) in replaced else real_exists(p)
        )

    return set_


def test_this_machine(run: Run, filled: Filled) -> None:
    ran = run("doctor", filled.root)
    assert (ran.code, ran.err) == (0, ""), ran.out
    facts = run("doctor", filled.root, "--json").json
    names = {f["what"] for f in facts["findings"]}
    assert facts["ok"] is True
    assert names >= {
        "kernel", "processor", "container", "/dev/fuse", "libfuse3", "libfuse2", "binding", "request size",
        "FUSE passthrough", "mount -t hydrafs", "open files", "memory", "Python", "numpy", "prometheus-client",
        "native codec", "native formulas",
        "hashing", "clock", "disk space", "filesystem", "store", "clock of the store",
    }  # fmt: skip
    bad(run("doctor", filled.root / "nothing"), 3, "nothing")


def test_a_machine_where_no_mount_works(run: Run, without: Callable[..., None]) -> None:
    without({"/dev/fuse": None})
    ran = run("doctor")
    assert ran.code == 11
    assert "modprobe fuse" in ran.out


def test_the_kernel(monkeypatch: Patch) -> None:
    monkeypatch.setattr(platform, "release", lambda: "4.15.0-20-generic")
    assert "4.20" in of(findings.system(), "kernel").remedy
    monkeypatch.setattr(platform, "release", lambda: "5.15.90.1-microsoft-standard-WSL2")
    assert "/mnt/c" in of(findings.system(), "WSL").remedy
    monkeypatch.setattr(platform, "release", lambda: "4.4.0-19041-Microsoft")
    assert of(findings.system(), "WSL").state == "bad"


def test_containers(without: Callable[..., None], monkeypatch: Patch) -> None:
    status = Path("/proc/self/status").read_text()
    lines = [("CapEff:\t0000000000000000" if line[:7] == "CapEff:" else line) for line in status.splitlines()]
    without({"/.dockerenv": None, "/run/.containerenv": "", "/proc/self/status": "\n".join(lines)})
    found = of(findings.system(), "container")
    assert found.found == "Podman"
    assert "--cap-add SYS_ADMIN" in found.remedy
    assert "rshared" in found.remedy
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert of(findings.fuse(), "privileges").state == "bad"


def test_a_user_without_fusermount(without: Callable[..., None], monkeypatch: Patch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr("shutil.which", lambda name: None)
    without({"/etc/fuse.conf": "#user_allow_other\n"})
    found = list(findings.fuse())
    assert of(found, "fusermount3").state == "bad"
    assert of(found, "user_allow_other").state == "note"
    helper = tmp_path / "fusermount3"
    helper.write_text("")
    monkeypatch.setattr("shutil.which", lambda name: str(helper))
    assert "chmod u+s" in of(findings.fuse(), "fusermount3").remedy
    helper.chmod(0o4755)
    without({"/etc/fuse.conf": "user_allow_other\n"})
    found = list(findings.fuse())
    assert of(found, "fusermount3").state == of(found, "user_allow_other").state == "ok"


def test_a_kernel_that_limits_requests(without: Callable[..., None]) -> None:
    without({"/proc/sys/fs/fuse/max_pages_limit": "32\n", "/proc/sys/fs/fuse/max_request_timeout": "60\n"})
    found = list(findings.fuse())
    assert of(found, "request size").found.startswith(f"{32 * resource.getpagesize() >> 10} KiB")
    assert "max_pages_limit" in of(found, "request size").remedy
    assert of(found, "request timeout").state == "note"


def test_the_older_libfuse(monkeypatch: Patch) -> None:
    monkeypatch.setenv("HYDRAFS_FUSE", "fusepy")
    code = "from hydrafs.cli.findings import fuse; print([f for f in fuse() if f.what == 'request size'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "128 KiB" in done.stdout
    monkeypatch.setenv("HYDRAFS_FUSE", "nothing")
    assert of(findings.fuse(), "binding").state == "bad"


def test_what_was_not_built(monkeypatch: Patch) -> None:
    monkeypatch.setattr("hydrafs.codecs.rans._native", None)
    real = findings.importlib.util.find_spec
    missing = ("hydrafs._formulas", "hydrafs._twins", "prometheus_client")
    monkeypatch.setattr(findings, "twins_available", lambda: False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in missing else real(name))
    found = list(findings.python())
    assert "gcc" in of(found, "native codec").remedy
    assert "gcc" in of(found, "native formulas").remedy
    assert "gcc" in of(found, "hashing").remedy
    assert of(found, "prometheus-client").found == "missing"
    assert "pip install prometheus-client" in of(found, "prometheus-client").remedy


def test_few_open_files_and_little_memory(monkeypatch: Patch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, 256))
    monkeypatch.setattr(os, "sysconf", lambda name: 500_000)
    monkeypatch.setattr(resource, "getpagesize", lambda: 4096)
    found = list(findings.limits())
    assert "ulimit -n" in of(found, "open files").remedy
    assert "--cache-size 976M" in of(found, "memory").remedy


def test_a_store_that_is_full_and_from_the_future(filled: Filled, monkeypatch: Patch) -> None:
    filled.dehydrate()
    assert of(findings.store(filled.root), "disk space").state == "ok"
    ahead = time.time() + 3600
    os.utime(filled.base, (ahead, ahead))
    real = os.statvfs

    def full(path: Any) -> Any:
        values = list(real(path))
        values[4] = 1  # f_bavail
        return os.statvfs_result(values)

    monkeypatch.setattr(os, "statvfs", full)
    (filled.root / ".hydrafs" / "config.toml").write_text('base_folders = ["/nothing/there"]\n')
    found = list(findings.store(filled.root))
    assert "no room" in of(found, "disk space").remedy
    assert "base.safetensors" in of(found, "clock of the store").found
    assert of(found, "base folder").state == "note"


def test_a_clock_that_was_never_set(monkeypatch: Patch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    assert of(findings.clock(), "clock").state == "note"


def test_a_disk_that_is_none(filled: Filled, monkeypatch: Patch) -> None:
    info = MountInfo(1, "0:1", filled.root.parent, "9p", "C:\\", ())
    monkeypatch.setattr(findings, "all_mounts", lambda: [info])
    assert "Windows" in of(findings.store(filled.root), "filesystem").remedy


def test_units(tmp_path: Path, monkeypatch: Patch) -> None:
    """Where systemd runs, its units are asked for; here a stand-in answers."""
    tool = tmp_path / "systemctl"
    tool.write_text(
        "#!/bin/sh\n"
        'case "$*" in *list-units*) echo \'[{"unit":"hydrafs@a.service","active":"failed","sub":"failed"},'
        '{"unit":"hydrafs@b.service","active":"active","sub":"running"}]\';; *) echo "[]";; esac\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    real = os.path.isdir
    monkeypatch.setattr(os.path, "isdir", lambda p: p == "/run/systemd/system" or real(p))
    found = list(findings.units())
    assert [(f.state, f.remedy) for f in found if f.what == "systemd unit"] == [
        ("note", "journalctl -u hydrafs@a.service"),
        ("ok", ""),
    ]
    assert "no unit" in of(found, "systemd").found


@pytest.mark.parametrize(("user", "state"), [(0, "ok"), (1000, "note")])
def test_readahead_before_anything_is_mounted(monkeypatch: Patch, user: int, state: str) -> None:
    monkeypatch.setattr(findings, "our_mounts", list)
    monkeypatch.setattr(os, "geteuid", lambda: user)
    assert of(findings.mounts(), "readahead").state == state


def test_readahead_of_a_mount(without: Callable[..., None], monkeypatch: Patch, tmp_path: Path) -> None:
    info = MountInfo(1, "0:99", tmp_path, "fuse.hydrafs", "hydrafs:store", ())
    monkeypatch.setattr(findings, "our_mounts", lambda: [info])
    monkeypatch.setattr(findings, "wait_until_answers", lambda path, seconds: info)
    knob = "/sys/class/bdi/0:99/read_ahead_kb"
    without({knob: "128\n"})
    assert of(findings.mounts(), "readahead").remedy == f"as root: echo 1024 > {knob}"
    without({knob: "1024\n"})
    assert of(findings.mounts(), "readahead").state == "ok"


def test_a_mount_that_does_not_answer(monkeypatch: Patch, tmp_path: Path) -> None:
    info = MountInfo(1, "0:1", tmp_path, "fuse.hydrafs", "hydrafs:store", ())
    monkeypatch.setattr(findings, "our_mounts", lambda: [info])
    monkeypatch.setattr(findings, "_ANSWER_SECONDS", 0.1)
    assert "--stale" in of(findings.mounts(), "mount").remedy


class TestMemory:
    def groups(self, tmp_path: Path, **limits: str) -> int | None:
        (tmp_path / "proc").mkdir()
        (tmp_path / "proc" / "cgroup").write_text("4:memory:/old\n0::/a/b\n")
        (tmp_path / "g" / "a" / "b").mkdir(parents=True)
        for name, text in limits.items():
            folder, _, knob = name.rpartition("_")
            (tmp_path / "g" / folder.replace("_", "/") / f"memory.{knob}").write_text(text + "\n")
        return limit_nbytes(tmp_path / "proc", tmp_path / "g")

    def test_none(self, tmp_path: Path) -> None:
        assert self.groups(tmp_path, a_b_max="max", a_high="max") is None
        assert limit_nbytes(tmp_path / "nothing", tmp_path) is None

    def test_the_lowest_counts(self, tmp_path: Path) -> None:
        assert self.groups(tmp_path, a_b_max="6000", a_b_high="5000", a_max="7000") == 5000

    def test_those_above_count(self, tmp_path: Path) -> None:
        assert self.groups(tmp_path, a_b_max="max", a_max="4000") == 4000

    def test_control_groups_of_version_1(self, tmp_path: Path) -> None:
        (tmp_path / "cgroup").write_text("9:name=systemd:/\n4:cpu,memory:/docker/abc\n0::/\n")
        groups = tmp_path / "g"
        inside = groups / "memory" / "docker" / "abc"
        inside.mkdir(parents=True)
        (groups / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
        assert limit_nbytes(tmp_path, groups) is None
        (inside / "memory.limit_in_bytes").write_text("5000\n")
        assert limit_nbytes(tmp_path, groups) == 5000
        (groups / "memory.max").write_text("4000\n")
        assert limit_nbytes(tmp_path, groups) == 4000, "of both, the lower"

    def test_a_container_sees_its_own_group_as_the_root(self, tmp_path: Path) -> None:
        (tmp_path / "cgroup").write_text("4:memory:/docker/abc\n")
        (tmp_path / "g" / "memory").mkdir(parents=True)
        (tmp_path / "g" / "memory" / "memory.limit_in_bytes").write_text("6000\n")
        assert limit_nbytes(tmp_path, tmp_path / "g") == 6000

    def test_the_cache_fits(self) -> None:
        gib = 1 << 30
        assert fitting_cache(None, None) == fitting_cache(None, 100 * gib) == 4 * gib
        assert fitting_cache(None, 4 * gib) == fitting_cache(8 * gib, 4 * gib) == 3 * gib
        assert fitting_cache(gib, 4 * gib) == gib
        assert fitting_cache(None, 40 * gib, fill=True) == 30 * gib
        assert fitting_cache(None, None, fill=True) == 4 * gib
        assert 0 < fitting_cache(None, 1) < 1 << 27


@pytest.mark.fuse
def test_the_cache_of_a_mount_fits_into_its_limit(
    run: Run, filled: Filled, tmp_path: Path, at_end: contextlib.ExitStack
) -> None:
    filled.dehydrate()
    point = tmp_path / "mount"
    point.mkdir()
    at_end.callback(lambda: [unmount(point, lazy=True) for m in our_mounts() if m.mountpoint == point])
    code = (
        "import sys, hydrafs.cli.mount as m; m.limit_nbytes = lambda: 400 << 20; "
        "from hydrafs.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "mount", filled.root, point, "--cache-size", "1G"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "300 MiB instead of 1024" in done.stderr
    assert good(run("status", point, "--json")).json["cache_budget_nbytes"] == 300 << 20
    bad(run("control", point, "cache-size", "1G"), 2, "leaves 300 MiB")
    assert good(run("control", point, "cache-size", "200M", "--json")).json == {"budget_nbytes": 200 << 20}


UBUNTU = """
profile fusermount3 /usr/bin/fusermount{,3} {
  mount fstype=@{fuse_types} options=(nosuid,nodev) options in (ro,rw,noatime) @{fuse_mount} -> @{HOME}/**/,
  mount fstype=@{fuse_types} options=(nosuid,nodev) options in (ro,rw) /dev/fuse -> /mnt/{,**/},
  mount fstype=fuse.* options=(nosuid,nodev) -> /media/**/,
  mount fstype=fuse.* -> /tmp/**/,
  mount fstype=fuse.* -> /run/user/[0-9]*/**/,
  # mount fstype=fuse.* -> /srv/**/,
  include if exists <local/fusermount3>
}
"""


class TestAppArmor:
    def facts(self, without: Callable[..., None], local: str | None = None) -> None:
        without(
            {
                "/etc/apparmor.d/fusermount3": UBUNTU,
                "/etc/apparmor.d/local/fusermount3": local,
                "/sys/kernel/security/apparmor/profiles": "fusermount3 (enforce)\nman (enforce)\n",
            }
        )

    @pytest.mark.parametrize(
        "place", ["/home/me/models", "/root/m", "/mnt/models", "/mnt", "/media/me/usb/m", "/tmp/m"]
    )
    def test_where_it_lets_users_mount(self, without: Callable[..., None], place: str) -> None:
        self.facts(without)
        assert of(findings.confined(Path(place)), "AppArmor").state == "ok"

    @pytest.mark.parametrize("user", [0, 1000])
    @pytest.mark.parametrize("place", ["/data/m", "/srv/models", "/opt/ComfyUI/models", "/home", "/mntx/a", "/tmp"])
    def test_where_it_does_not(self, without: Callable[..., None], monkeypatch: Patch, place: str, user: int) -> None:
        self.facts(without)
        monkeypatch.setattr(os, "geteuid", lambda: user)
        found = of(findings.confined(Path(place)), "AppArmor")
        assert found.state == ("bad" if user else "note")
        assert "/etc/apparmor.d/fusermount3" in found.found
        assert "/etc/apparmor.d/local/fusermount3" in found.remedy
        error = _libfuse_error(1, f"fusermount3: mount failed: Permission denied: {place}", Path(place))
        assert ("local/fusermount3" in str(error)) == bool(user)

    def test_what_was_added_counts(self, without: Callable[..., None]) -> None:
        self.facts(without, "  mount fstype=fuse.* -> /data/**/,\n")
        assert of(findings.confined(Path("/data/m")), "AppArmor").state == "ok"

    def test_without_it(self, without: Callable[..., None]) -> None:
        without({"/etc/apparmor.d/fusermount3": None, "/sys/kernel/security/apparmor/profiles": None})
        assert not list(findings.confined(Path("/data/m")))


def test_a_store_on_a_filesystem_without_locks(filled: Filled, monkeypatch: Patch) -> None:
    def refuse(fd: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    filled.dehydrate()
    monkeypatch.setattr(fcntl, "flock", refuse)
    found = of(findings.store(filled.root), "locks")
    assert found.state == "bad"
    assert "mount it with flock" in found.remedy
