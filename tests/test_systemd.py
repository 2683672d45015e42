"""The units: what systemd thinks of them, and their own command lines, run as systemd runs them.

The command lines are taken from the unit files, expanded as systemd.service(5) says, and run in a mount namespace of
their own with a socket such as a supervisor has. ``scripts/try_deb.sh`` runs them under a booted systemd.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
from conftest import Filled
from mounts import WAIT_SECONDS, has_ended
from test_service import Supervisor

from hydrafs.cli import _COMMANDS, _root
from hydrafs.errors import UsageError
from hydrafs.mountpoints import check_store_paths

UNITS = Path(__file__).parent.parent / "systemd"
MOUNT, WORKER, USER = UNITS / "hydrafs@.service", UNITS / "hydrafs-worker@.service", UNITS / "user/hydrafs@.service"
SERVICES = (MOUNT, WORKER, USER)
# systemd.exec(5): each of these gives the service mounts of its own, in which nobody else sees what it mounts.
HIDING = {
    "PrivateTmp", "PrivateDevices", "PrivateMounts", "PrivateUsers", "PrivateIPC", "ProtectSystem", "ProtectHome",
    "ProtectProc", "ProcSubset", "ProtectKernelTunables", "ProtectKernelModules", "ProtectKernelLogs",
    "ProtectControlGroups",
    "ProtectHostname", "ReadWritePaths", "ReadOnlyPaths", "InaccessiblePaths", "ExecPaths", "NoExecPaths",
    "TemporaryFileSystem", "BindPaths", "BindReadOnlyPaths", "MountFlags", "MountAPIVFS", "RootDirectory", "RootImage",
    "MountImages", "ExtensionImages", "ExtensionDirectories", "DynamicUser", "LogNamespace", "NetworkNamespacePath",
}  # fmt: skip
# Each of these implies NoNewPrivileges= for a service of a user's manager: fusermount3 would have no privileges.
UNPRIVILEGING = {
    "NoNewPrivileges", "SystemCallFilter", "SystemCallArchitectures", "SystemCallLog", "RestrictAddressFamilies",
    "RestrictNamespaces", "RestrictRealtime", "RestrictSUIDSGID", "LockPersonality", "MemoryDenyWriteExecute",
    "PrivateDevices", "ProtectKernelTunables", "ProtectKernelModules", "ProtectKernelLogs", "ProtectClock",
    "ProtectHostname", "DynamicUser",
}  # fmt: skip


def settings(unit: Path) -> list[tuple[str, str]]:
    lines = [line for line in unit.read_text().splitlines() if line and line[0] not in "#;["]
    return [(name, value) for name, _, value in (line.partition("=") for line in lines)]


def values(unit: Path, name: str) -> list[str]:
    return [value for n, value in settings(unit) if n == name]


def value(unit: Path, name: str) -> str:
    (found,) = values(unit, name)
    return found


def expanded(line: str, environment: dict[str, str]) -> list[str]:
    """A command line as systemd gives it: ``${NAME}`` is one word, ``$NAME`` as many as it has, ``$$`` a dollar."""
    words: list[str] = []
    for word in shlex.split(line, posix=True):
        whole = re.fullmatch(r"\$([A-Z_]+)", word)
        if whole:
            words += environment[whole[1]].split()
            continue
        kept = word.replace("$$", "\0")
        words.append(re.sub(r"\$\{([A-Z_]+)\}", lambda m: environment[m[1]], kept).replace("\0", "$"))
    return words


def defaults(unit: Path) -> dict[str, str]:
    pairs = [pair for line in values(unit, "Environment") for pair in shlex.split(line)]
    return dict(pair.split("=", 1) for pair in pairs)


# What systemd thinks of them


def analyze(*arguments: str | os.PathLike[str], **environment: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("systemd-analyze") is None:
        pytest.fail("no systemd-analyze here; scripts/setup.sh test installs the package systemd", pytrace=False)
    return subprocess.run(
        ["systemd-analyze", "--no-pager", *map(os.fspath, arguments)],
        env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The units, with a program that is there in hydrafs' place: verify looks for it."""
    folder = tmp_path / "units"
    folder.mkdir()
    stand_in = tmp_path / "hydrafs"
    stand_in.write_text("#!/bin/sh\n")
    stand_in.chmod(0o755)
    for unit in (MOUNT, WORKER, UNITS / "mnt-models.mount", UNITS / "mnt-models.automount"):
        text = re.sub(r"^(Exec\w+=)hydrafs ", rf"\1{stand_in} ", unit.read_text(), flags=re.MULTILINE)
        (folder / unit.name).write_text(text)
    return folder


def test_systemd_accepts_the_units(installed: Path) -> None:
    names = ["hydrafs@x.service", "hydrafs-worker@srv-models.service", "mnt-models.mount", "mnt-models.automount"]
    done = analyze("verify", "--man=no", *(installed / name for name in names), SYSTEMD_UNIT_PATH=f"{installed}:")
    complaints = [line for line in done.stderr.splitlines() if "hydrafs" in line or "mnt-models" in line]
    assert (done.returncode, complaints) == (0, []), done.stderr


def test_that_check_can_fail(installed: Path) -> None:
    unit = installed / "hydrafs@.service"
    unit.write_text(unit.read_text().replace("KillMode=mixed", "KillMode=most"))
    done = analyze("verify", "--man=no", installed / "hydrafs@x.service", SYSTEMD_UNIT_PATH=f"{installed}:")
    assert "hydrafs@.service" in done.stderr, "what is wrong would not be seen"


def test_systemd_accepts_the_users_unit(installed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "user"
    folder.mkdir()
    text = USER.read_text().replace("ExecStart=hydrafs ", f"ExecStart={tmp_path / 'hydrafs'} ")
    (folder / USER.name).write_text(text.replace("ExecStartPre=hydrafs ", f"ExecStartPre={tmp_path / 'hydrafs'} "))
    done = analyze(
        "--user", "verify", "--man=no", folder / "hydrafs@x.service",
        SYSTEMD_UNIT_PATH=f"{folder}:", XDG_RUNTIME_DIR=str(tmp_path), HOME=str(tmp_path),
    )  # fmt: skip
    complaints = [line for line in done.stderr.splitlines() if "hydrafs@" in line]
    assert (done.returncode, complaints) == (0, []), done.stderr


@pytest.mark.parametrize(("unit", "exposure"), [(MOUNT, 4.7), (WORKER, 1.8)], ids=["mount", "worker"])
def test_how_exposed_they_are(unit: Path, exposure: float) -> None:
    done = analyze("security", "--offline=true", unit)
    found = re.search(r"exposure level for \S+: ([0-9.]+)", done.stdout)
    assert found, done.stdout + done.stderr
    assert float(found[1]) <= exposure, done.stdout


# What they must not and must say


@pytest.mark.parametrize("unit", [MOUNT, USER], ids=["root's", "user's"])
def test_nothing_hides_the_mount(unit: Path) -> None:
    assert not {name for name, _ in settings(unit)} & HIDING


def test_the_users_unit_leaves_fusermount_its_privileges() -> None:
    assert not {name for name, _ in settings(USER)} & UNPRIVILEGING


@pytest.mark.parametrize("unit", [MOUNT, USER], ids=["root's", "user's"])
def test_what_a_supervisor_needs(unit: Path) -> None:
    assert value(unit, "Type") == "notify"
    assert value(unit, "NotifyAccess") == "main"
    # Told alive twice in each interval: no more than once a minute.
    assert int(value(unit, "WatchdogSec")) >= 120
    assert value(unit, "Restart") == "on-failure"
    assert int(value(unit, "MemoryHigh")[:-1]) < int(value(unit, "MemoryMax")[:-1])
    assert "--cache-size ${CACHE_SIZE}" in value(unit, "ExecStart")
    assert defaults(unit)["CACHE_SIZE"] == "auto"
    # Models from anywhere are parsed in a sandbox, where there can be one.
    assert defaults(unit)["DEHYDRATE"] == ("off" if unit == MOUNT else "auto")


def test_the_worker_can_write_to_its_store_only() -> None:
    assert value(WORKER, "ProtectSystem") == "strict"
    assert value(WORKER, "ReadWritePaths") == "%f"
    assert value(WORKER, "PrivateNetwork") == "yes"
    assert "CAP_SYS_ADMIN" not in value(WORKER, "CapabilityBoundingSet")


@pytest.mark.parametrize("unit", SERVICES, ids=["root's", "worker", "user's"])
def test_the_command_line_knows_every_command(unit: Path) -> None:
    environment = {"STORE": "/s", "MOUNTPOINT": "/m", "SERVICE_RESULT": "success", **defaults(unit)}
    lines = [line for name, line in settings(unit) if name.startswith("Exec") and line.startswith("hydrafs ")]
    assert lines
    for line in lines:
        _, name, *arguments = expanded(line.replace("%f", "/s"), environment)
        assert name in _COMMANDS
        command = _root.get_command(click.Context(_root), name)  # type: ignore[attr-defined]
        command.make_context(name, arguments)


# As systemd runs them


@pytest.fixture
def namespace() -> None:
    """The tests below mount, and look at who sees it."""
    if os.geteuid() != 0:
        pytest.skip("a mount namespace that others see into needs root")


class Service:
    """What systemd does for a unit: runs its lines with its environment, in the order that it has."""

    def __init__(self, unit: Path, tmp_path: Path, store: Path, point: Path) -> None:
        self.unit = unit
        self.supervisor = Supervisor(str(tmp_path / "notify"))
        self.environment = {**defaults(unit), "STORE": str(store), "MOUNTPOINT": str(point)}
        tools = tmp_path / "bin"
        tools.mkdir()
        launcher = tools / "hydrafs"
        launcher.write_text(f'#!/bin/sh\nexec {sys.executable} -m hydrafs "$@"\n')
        launcher.chmod(0o755)
        self.path = f"{tools}:{os.environ['PATH']}"
        self.main: subprocess.Popen[str] | None = None

    def _environment(self, **more: str) -> dict[str, str]:
        return {"PATH": self.path, "PYTHONPATH": os.environ.get("PYTHONPATH", ""), **self.environment, **more}

    def run(self, name: str, **more: str) -> None:
        for line in values(self.unit, name):
            words = expanded(line, {**self.environment, **more})
            done = subprocess.run(words, env=self._environment(**more), capture_output=True, text=True, check=False)
            assert done.returncode == 0, (line, done.stderr)

    def start(self) -> dict[str, str]:
        """Until the main process has said that it is ready."""
        self.run("ExecStartPre")
        address = self.supervisor.socket.getsockname()
        usec = str(int(value(self.unit, "WatchdogSec")) * 1_000_000)
        line = expanded(value(self.unit, "ExecStart"), self.environment)
        # The main process is the one that systemd starts, in mounts that it shares with everybody.
        self.main = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "shared", *line],
            env=self._environment(NOTIFY_SOCKET=address, WATCHDOG_USEC=usec),
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        return self.supervisor.until("READY")

    def stopped(self, result: str) -> None:
        self.run("ExecStopPost", SERVICE_RESULT=result)


@pytest.fixture
def shared_point(tmp_path: Path) -> Iterator[Path]:
    """A mountpoint below a folder whose mounts propagate, as / does where systemd runs."""
    top = tmp_path / "shared"
    top.mkdir()
    subprocess.run(["mount", "--bind", top, top], check=True)
    subprocess.run(["mount", "--make-shared", top], check=True)
    try:
        yield top / "mnt" / "models"
    finally:
        subprocess.run(["umount", "-R", "-l", top], check=False)


@pytest.fixture
def service(
    namespace: None, filled: Filled, tmp_path: Path, shared_point: Path, request: pytest.FixtureRequest
) -> Iterator[Service]:
    filled.dehydrate()
    made = Service(request.param, tmp_path, filled.root, shared_point)
    try:
        yield made
    finally:
        if made.main is not None and made.main.poll() is None:
            made.main.kill()
            made.main.wait()


def eventually(condition: Callable[[], object]) -> bool:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def is_dead(point: Path) -> bool:
    try:
        os.statvfs(point)
    except OSError as error:
        return error.strerror == os.strerror(107)
    return False


both = pytest.mark.parametrize("service", [MOUNT, USER], ids=["root's", "user's"], indirect=True)


@pytest.mark.fuse
@both
def test_start_reload_stop(service: Service, filled: Filled, shared_point: Path) -> None:
    message = service.start()
    assert service.main is not None
    assert message["MAINPID"] == str(service.main.pid), "NotifyAccess=main would not hear of it"
    # Here, outside of its namespace, is where the mount is to be seen.
    assert (shared_point / "tuned.safetensors").read_bytes() == filled.data
    service.run("ExecReload", MAINPID=str(service.main.pid))
    service.supervisor.until("RELOADING")
    service.supervisor.until("READY")
    assert (shared_point / "tuned.safetensors").stat().st_size == len(filled.data)
    service.main.send_signal(signal.SIGTERM)
    service.supervisor.until("STOPPING")
    assert service.main.wait(WAIT_SECONDS) == 0
    service.stopped("success")
    assert not os.path.ismount(shared_point)


@pytest.mark.fuse
@both
def test_a_crash_leaves_a_dead_mount_and_a_restart_clears_it(
    service: Service, filled: Filled, shared_point: Path
) -> None:
    service.start()
    assert service.main is not None
    service.main.kill()
    service.main.wait()
    assert eventually(lambda: has_ended(service.main.pid if service.main else 0))
    assert eventually(lambda: is_dead(shared_point))
    service.stopped("signal")
    assert is_dead(shared_point), "between crash and restart there must be no empty folder"
    service.start()
    assert (shared_point / "tuned.safetensors").read_bytes() == filled.data
    service.main.kill()
    service.main.wait()
    service.stopped("timeout")
    assert not os.path.ismount(shared_point), "where the service was told to stop, nothing is left"
    assert list(shared_point.iterdir()) == []


@pytest.mark.fuse
@pytest.mark.parametrize("service", [MOUNT], indirect=True)
def test_a_mount_namespace_would_hide_it(service: Service, filled: Filled, shared_point: Path) -> None:
    """What HIDING is for: the same line under mounts that do not propagate is ready, and nobody sees its models."""
    service.run("ExecStartPre")
    service.main = subprocess.Popen(
        ["unshare", "--mount", "--propagation", "slave", *expanded(value(MOUNT, "ExecStart"), service.environment)],
        env=service._environment(NOTIFY_SOCKET=service.supervisor.socket.getsockname()),
    )
    service.supervisor.until("READY")
    assert list(shared_point.iterdir()) == []


# mount -t hydrafs


@pytest.fixture
def helper(namespace: None, tmp_path: Path) -> Path:
    """mount.hydrafs, found by mount(8) in /sbin of a mount namespace: the folder is laid over the real one."""
    script = tmp_path / "mount.hydrafs"
    path = os.environ.get("PYTHONPATH", "")
    script.write_text(f'#!/bin/sh\nPYTHONPATH={path} exec {sys.executable} -m hydrafs.cli.fstab "$@"\n')
    script.chmod(0o755)
    return script


def under_mount_8(helper: Path, *lines: str) -> subprocess.CompletedProcess[str]:
    """Shell lines in a mount namespace in which /sbin has the helper."""
    sbin = os.path.realpath("/sbin")
    above = helper.parent / "sbin"
    above.mkdir()
    shutil.copy2(helper, above)
    script = "\n".join([f"mount -t overlay -o lowerdir={above}:{sbin} none {sbin} || exit 99", *lines])
    return subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", script],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


@pytest.mark.fuse
def test_mount_8_calls_the_helper(helper: Path, filled: Filled, tmp_path: Path) -> None:
    filled.dehydrate()
    point = tmp_path / "at"
    point.mkdir()
    fstab = tmp_path / "fstab"
    fstab.write_text(f"{filled.root} {point} hydrafs allow_other,cache_size=64M,nofail,x-systemd.automount 0 0\n")
    (tmp_path / "was").write_bytes(filled.data)
    done = under_mount_8(
        helper,
        f"mount -v -t hydrafs {filled.root} {point} -o ro,allow_other,log_format=json || exit 1",
        f"cmp {point}/tuned.safetensors {tmp_path / 'was'} || exit 2",
        f"umount {point} || exit 3",
        f"mount -T {fstab} {point} || exit 4",
        f"cmp {point}/tuned.safetensors {tmp_path / 'was'} || exit 5",
        "grep -q 'fuse.hydrafs hydrafs:' /proc/self/mountinfo || exit 6",
        f"umount {point} || exit 7",
    )
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
    assert f"{filled.root} mounted on {point}" in done.stdout


def fstab_helper(*arguments: str | os.PathLike[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hydrafs.cli.fstab", *map(os.fspath, arguments)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.fuse
def test_the_helper_answers_as_mount_8_expects(filled: Filled, tmp_path: Path) -> None:
    point = tmp_path / "at"
    point.mkdir()
    assert fstab_helper(filled.root, point, "-f", "-o", "rw,allow_other").returncode == 0
    assert not os.path.ismount(point)
    done = fstab_helper(filled.root, point, "-f", "-o", "rw,shiny")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "shiny" in done.stderr
    assert fstab_helper(filled.root, point, "-f", "-s", "-n", "-o", "rw,shiny").returncode == 0
    done = fstab_helper(filled.root, tmp_path / "nowhere")
    assert (done.returncode, done.stderr.count("\n")) == (32, 1)
    assert "mkdir -p" in done.stderr
    assert fstab_helper(tmp_path / "no store", point).returncode == 32
    assert fstab_helper(filled.root).returncode == 1


@pytest.mark.fuse
def test_an_automount(helper: Path, filled: Filled, tmp_path: Path) -> None:
    """Who looks waits for the mount, and the mount must not wait for who looks: nothing but the automounter's own
    process group gets through the trigger before mount(8) has ended."""
    if not os.path.exists("/dev/autofs"):
        pytest.skip("this kernel has no autofs")
    filled.dehydrate()
    point = tmp_path / "at"
    point.mkdir()
    automounter = subprocess.Popen(
        [sys.executable, Path(__file__).parent / "automounter.py", point, helper, filled.root, point, "-o", "rw"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert automounter.stdin and automounter.stdout
    try:
        assert automounter.stdout.readline() == "waiting\n"
        # From another process: what waits for an automount waits where no signal reaches it.
        shown = subprocess.run(["cat", point / "tuned.safetensors"], capture_output=True, timeout=30, check=False)
        assert (shown.stdout == filled.data, shown.stderr) == (True, b"")
        subprocess.run(["umount", point], check=True, timeout=30)
        # And again: the trigger is still there.
        assert subprocess.run(["ls", point], capture_output=True, timeout=30, check=True).stdout.split() != []
        subprocess.run(["umount", point], check=True, timeout=30)
        with pytest.raises(UsageError, match="hides the store"):
            check_store_paths(point, [point], over_store=True)
    finally:
        automounter.stdin.close()
        assert automounter.wait(30) == 0
    assert not os.path.ismount(point)
