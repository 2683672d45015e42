"""The service around a mount: status, control, metrics, the supervisor's protocol, warming, logs."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Filled
from mounts import WAIT_SECONDS, hydrafs
from test_cli import Run, bad, good, run

from hydrafs.cache import ChunkCache
from hydrafs.errors import NotFound, UsageError
from hydrafs.mountpoints import our_mounts, unmount
from hydrafs.service.control import Server, ask, runtime_folders, socket_name
from hydrafs.service.metrics import parse_address
from hydrafs.service.notify import Notifier

__all__ = ["run"]  # a fixture


def eventually(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


@pytest.fixture
def point(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "mount"
    folder.mkdir()
    yield folder
    if any(mount.mountpoint == folder for mount in our_mounts()):
        unmount(folder, lazy=True)  # what warms it may have a file open for a moment yet


@pytest.fixture
def mounted(filled: Filled, point: Path) -> Path:
    filled.dehydrate()
    ran = hydrafs("mount", filled.root, point)
    assert ran.returncode == 0, ran.stderr
    return point


@pytest.mark.fuse
class TestStatus:
    def test_says_what_was_done(self, run: Run, mounted: Path, filled: Filled) -> None:
        assert (mounted / "tuned.safetensors").read_bytes() == filled.data
        with pytest.raises(FileNotFoundError):
            (mounted / "nothing").open("rb")
        facts = good(run("status", mounted, "--json")).json
        assert facts["store"] == str(filled.root)
        assert (facts["models"]["models"], facts["models"]["dehydrated"]) == (2, 1)
        assert facts["models"]["saved"] == len(filled.data) - filled.diff.stat().st_size
        assert facts["read_nbytes"] == len(filled.data)
        assert 0 < facts["decoded_nbytes"] <= len(filled.data)
        assert facts["opens"] == 1
        assert facts["reads_in_flight"] == facts["failed_reads"] == 0
        assert facts["rss_nbytes"] > 10e6
        eventually(
            lambda: good(run("status", mounted, "--json")).json["open_files"] == 0, "a closed file stays counted"
        )

    def test_for_people(self, run: Run, mounted: Path) -> None:
        (mounted / "tuned.safetensors").read_bytes()
        assert f"{mounted}: " in good(run("status")).out
        text = good(run("status", mounted)).out
        for word in ("models", "cache", "decoded", "reads", "process"):
            assert f"\n  {word}" in text
        lines = good(run("top", mounted, "--count", 2, "--interval", 0.1)).out
        assert lines.count("  cache ") == 2
        assert "  now " in lines

    def test_last_errors(self, run: Run, mounted: Path, filled: Filled) -> None:
        filled.base.rename(filled.root.parent / "away")
        filled.let_go()
        with pytest.raises(OSError, match="Input/output"):
            (mounted / "tuned.safetensors").read_bytes()
        facts = good(run("status", mounted, "--json")).json
        assert facts["failed_opens"] >= 1
        assert any("base.safetensors" in text for _, text in facts["errors"])

    def test_where_no_daemon_is(self, run: Run, tmp_path: Path) -> None:
        bad(run("status", tmp_path), 3, "no mount of hydrafs")
        bad(run("top", tmp_path), 3, "no mount of hydrafs")
        bad(run("control", tmp_path, "drop"), 3, "no mount of hydrafs")

    def test_the_socket_goes_with_the_daemon(self, mounted: Path) -> None:
        path = runtime_folders(os.geteuid())[0] / socket_name(mounted)
        assert path.stat().st_mode & 0o777 == 0o600
        unmount(mounted)
        eventually(lambda: not path.exists(), "the control socket stays")


@pytest.mark.fuse
class TestControl:
    def test_the_cache(self, run: Run, mounted: Path) -> None:
        (mounted / "tuned.safetensors").read_bytes()
        held = good(run("status", mounted, "--json")).json["cache_nbytes"]
        assert held > 0
        assert good(run("control", mounted, "drop", "--json")).json == {"dropped": held}
        assert good(run("status", mounted, "--json")).json["cache_nbytes"] == 0
        assert "at most" in good(run("control", mounted, "cache-size", "64M")).out
        assert good(run("status", mounted, "--json")).json["cache_budget_nbytes"] == 64 << 20
        bad(run("control", mounted, "cache-size", "10"), 2, "at least 1M")
        bad(run("control", mounted, "cache-size"), 2, "value is missing")
        bad(run("control", mounted, "drop", "4G"), 2, "not wanted")

    def test_the_log_level(self, run: Run, mounted: Path) -> None:
        good(run("control", mounted, "log-level", "debug"))
        good(run("control", mounted, "log-level", "INFO"))
        bad(run("control", mounted, "log-level", "loud"), 2, "choose one of debug, info, warning, error")

    def test_prefetch(self, run: Run, mounted: Path, filled: Filled) -> None:
        good(run("control", mounted, "prefetch", "tuned.safetensors"))

        def was_read() -> bool:
            return bool(good(run("status", mounted, "--json")).json["read_nbytes"] >= len(filled.data))

        deadline = time.monotonic() + WAIT_SECONDS
        while not was_read() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert was_read()
        path = mounted / "tuned.safetensors"
        for name in (path, os.path.relpath(path), "/tuned.safetensors"):
            assert good(run("control", mounted, "prefetch", name, "--json")).json == {"path": "/tuned.safetensors"}
        bad(run("control", mounted, "prefetch", filled.base), 2, "no such model")
        bad(run("control", mounted, "prefetch", "../nothing"), 2, "no such model")
        bad(run("control", mounted, "prefetch", "."), 2, "not a model")
        bad(run("control", mounted, "prefetch"), 2, "a value is missing")

    def test_base_folders_are_read_again(self, run: Run, mounted: Path, filled: Filled, tmp_path: Path) -> None:
        elsewhere = tmp_path / "bases"
        elsewhere.mkdir()
        filled.base.rename(elsewhere / "base.safetensors")
        filled.let_go()
        with pytest.raises(OSError, match="Input/output"):
            (mounted / "tuned.safetensors").read_bytes()
        (filled.root / ".hydrafs" / "config.toml").write_text(f'base_folders = ["{elsewhere}"]\n')
        assert str(elsewhere) in good(run("control", mounted, "reload")).out
        assert (mounted / "tuned.safetensors").read_bytes() == filled.data
        (filled.root / ".hydrafs" / "config.toml").write_text("base_folders = 3\n")
        bad(run("control", mounted, "reload"), 2, "base_folders is no list")
        assert (mounted / "tuned.safetensors").read_bytes() == filled.data


class TestSocket:
    @pytest.fixture
    def server(self, tmp_path: Path) -> Iterator[Server]:
        def fail(request: dict[str, Any]) -> Any:
            raise UsageError("no", detail=str(request.get("x")))

        server = Server([tmp_path / "run"], tmp_path / "m", {"echo": lambda r: r.get("x"), "fail": fail})
        server.start()
        yield server
        server.close()

    def talk(self, server: Server, data: bytes) -> bytes:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(20)
            client.connect(str(server.path))
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                client.sendall(data)
            answer = b""
            with contextlib.suppress(ConnectionResetError):
                while block := client.recv(1 << 16):
                    answer += block
            return answer

    def test_answers(self, server: Server, tmp_path: Path) -> None:
        assert ask([tmp_path / "run"], tmp_path / "m", "echo", x=[1, "ä"]) == [1, "ä"]
        with pytest.raises(UsageError, match="no: 5"):
            ask([tmp_path / "run"], tmp_path / "m", "fail", x=5)
        with pytest.raises(UsageError, match="known are echo, fail"):
            ask([tmp_path / "run"], tmp_path / "m", "sing")
        with pytest.raises(NotFound):
            ask([tmp_path / "run"], tmp_path / "other", "echo")

    @pytest.mark.parametrize(
        "data", [b"\n", b"{\n", b"[]\n", b"5\n", b'{"do": {"do": 1}}\n', b"\xff\xfe\n", b'"' * 9 + b"\n"]
    )
    def test_junk_gets_an_error_and_harms_nobody(self, server: Server, tmp_path: Path, data: bytes) -> None:
        assert "error" in json.loads(self.talk(server, data))
        assert ask([tmp_path / "run"], tmp_path / "m", "echo", x=1) == 1

    def test_too_much_is_dropped(self, server: Server, tmp_path: Path) -> None:
        assert self.talk(server, b"x" * 300_000) == b""
        assert ask([tmp_path / "run"], tmp_path / "m", "echo", x=1) == 1

    def test_a_client_that_says_nothing_blocks_nobody(self, server: Server, tmp_path: Path) -> None:
        with contextlib.ExitStack() as stack:
            for _ in range(20):
                silent = stack.enter_context(socket.socket(socket.AF_UNIX))
                silent.connect(str(server.path))
            assert ask([tmp_path / "run"], tmp_path / "m", "echo", x=1) == 1

    def test_a_folder_of_others_is_not_used(self, tmp_path: Path) -> None:
        (tmp_path / "open").mkdir(mode=0o777)
        (tmp_path / "open").chmod(0o777)
        (tmp_path / "link").symlink_to(tmp_path)
        server = Server([tmp_path / "open", tmp_path / "link", tmp_path / "mine"], tmp_path / "m", {})
        server.start()
        assert server.path is not None
        assert server.path.parent == tmp_path / "mine"
        server.close()

    @pytest.mark.logs("no control socket")
    def test_a_mount_does_without(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        server = Server([tmp_path / "file"], tmp_path / "m", {})
        server.start()
        assert server.path is None
        server.close()


@pytest.mark.fuse
def test_metrics(filled: Filled, point: Path) -> None:
    filled.dehydrate()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ran = hydrafs("mount", filled.root, point, "--metrics-address", f":{port}")
    assert ran.returncode == 0, ran.stderr
    (point / "tuned.safetensors").read_bytes()
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    values = {line.split("{")[0]: float(line.rpartition(" ")[2]) for line in text.splitlines() if line[:1] != "#"}
    assert values["hydrafs_read_bytes_total"] == len(filled.data)
    assert values["hydrafs_models"] == 2
    assert values["hydrafs_cache_bytes"] > 0
    assert f'mountpoint="{point}"' in text
    second = hydrafs("mount", filled.root, point.parent, "--metrics-address", f":{port}")
    assert second.returncode != 0


@pytest.mark.parametrize("text", ["", "x", "host:port", "1.2.3.4:99999"])
def test_a_bad_address(text: str) -> None:
    with pytest.raises(UsageError, match="not an address"):
        parse_address(text)
    assert parse_address("[::1]:80") == ("::1", 80)


class Supervisor:
    """A socket such as systemd has, and what came to it."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self.socket.settimeout(WAIT_SECONDS)

    def next(self) -> dict[str, str]:
        return dict(line.split("=", 1) for line in self.socket.recv(1 << 16).decode().splitlines())

    def until(self, name: str) -> dict[str, str]:
        deadline = time.monotonic() + WAIT_SECONDS
        while name not in (message := self.next()):
            assert time.monotonic() < deadline, name
        return message


@pytest.mark.parametrize("abstract", [False, True])
def test_what_a_supervisor_is_told(tmp_path: Path, abstract: bool) -> None:
    address = f"@hydrafs-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    supervisor = Supervisor(address)
    alive = threading.Event()
    alive.set()
    notifier = Notifier(address, 200_000)
    notifier.ready("5 models\nand a line")
    message = supervisor.next()
    assert (message["READY"], message["STATUS"], message["MAINPID"]) == ("1", "5 models and a line", str(os.getpid()))
    notifier.keep_alive(lambda: "fine", alive.is_set)
    assert supervisor.next() == {"WATCHDOG": "1", "STATUS": "fine"}
    alive.clear()  # what does not answer does not say that it is alive
    time.sleep(0.3)
    supervisor.socket.settimeout(0.5)
    with pytest.raises(TimeoutError):
        while True:
            supervisor.next()
    notifier.reloading()
    assert int(supervisor.next()["MONOTONIC_USEC"]) > 0
    notifier.stopping()
    assert supervisor.next()["STOPPING"] == "1"
    Notifier("").ready("nobody listens")
    Notifier(str(tmp_path / "gone"), 1000).ready("nobody listens")


@pytest.mark.fuse
def test_a_mount_under_a_supervisor(filled: Filled, point: Path, tmp_path: Path) -> None:
    filled.dehydrate()
    supervisor = Supervisor(str(tmp_path / "notify"))
    daemon = subprocess.Popen(
        [sys.executable, "-m", "hydrafs", "mount", filled.root, point, "--foreground", "--log-format", "json"],
        env={**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "400000"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        message = supervisor.until("READY")
        assert point.is_mount(), "ready before the mount answers"
        assert message["MAINPID"] == str(daemon.pid)
        # A count that takes longer than a moment is not waited for.
        assert re.search("2 models|being counted", message["STATUS"])
        supervisor.until("WATCHDOG")
        supervisor.until("WATCHDOG")
        daemon.send_signal(signal.SIGHUP)
        supervisor.until("RELOADING")
        supervisor.until("READY")
        assert point.is_mount(), "a supervisor's SIGHUP reloads"
        filled.base.rename(tmp_path / "away")
        filled.let_go()
        with pytest.raises(OSError, match="Input/output"):
            (point / "tuned.safetensors").read_bytes()
        daemon.send_signal(signal.SIGTERM)
        supervisor.until("STOPPING")
        _, err = daemon.communicate(timeout=WAIT_SECONDS)
    finally:
        daemon.kill()
    assert daemon.returncode == 0
    assert not point.is_mount()
    lines = [json.loads(line) for line in err.splitlines()]
    assert any(line["level"] == "error" and "base.safetensors" in line["message"] for line in lines)


@pytest.mark.fuse
class TestWarm:
    def test_reads_a_model(self, run: Run, mounted: Path, filled: Filled) -> None:
        path = mounted / "tuned.safetensors"
        assert good(run("warm", path, "--json")).json == [{"path": str(path), "size": len(filled.data)}]
        assert good(run("status", mounted, "--json")).json["read_nbytes"] == len(filled.data)
        bad(run("warm", filled.base), 2, "not in a mount")
        bad(run("warm"), 2, "nothing to warm")
        bad(run("warm", mounted / "nothing.ckpt"), 3, "cannot read")

    def test_names_that_are_no_text(self, run: Run, mounted: Path, filled: Filled) -> None:
        odd = os.fsencode(filled.root) + b"/gr\xfc\xdfe.ckpt"
        with open(odd, "wb") as file:
            file.write(b"x" * 1000)
        assert len((mounted / os.fsdecode(b"gr\xfc\xdfe.ckpt")).read_bytes()) == 1000
        assert len(good(run("warm", "--lately", mounted, "--json")).json) == 1
        unmount(mounted)
        eventually((filled.root / ".hydrafs" / "opened.json").exists, "nothing was noted")
        assert b"gr\\udcfc" in (filled.root / ".hydrafs" / "opened.json").read_bytes()

    def test_what_was_opened_lately_is_warmed_after_a_restart(self, run: Run, mounted: Path, filled: Filled) -> None:
        (mounted / "tuned.safetensors").open("rb").close()
        unmount(mounted)
        eventually((filled.root / ".hydrafs" / "opened.json").exists, "nothing was noted")
        ran = hydrafs("mount", filled.root, mounted, "--warm")
        assert ran.returncode == 0, ran.stderr
        nbytes = len(filled.data)
        eventually(lambda: good(run("status", mounted, "--json")).json["read_nbytes"] >= nbytes, "it was not read")


def test_a_cache_that_is_resized() -> None:
    import numpy as np

    cache = ChunkCache(100)
    for number in range(10):
        cache.get(("m", number), lambda: np.zeros(10, np.uint8))
    cache.get(("m", 0), lambda: np.zeros(10, np.uint8))
    cache.resize(30)
    assert [n for n in range(10) if cache.has(("m", n))] == [0, 8, 9]
    assert cache.statistics().nbytes == 30
    assert cache.drop() == 30
    assert cache.statistics().decoded_nbytes == 100
    cache.resize(1000)
    assert cache.budget_nbytes == 1000


def test_json_lines(tmp_path: Path) -> None:
    code = (
        "import logging, sys; from hydrafs.logs import Style, log_to; log_to(sys.stderr, Style(as_json=True)); "
        "logging.getLogger('hydrafs.x').error('a\\nb %s', 'ü'); logging.getLogger('hydrafs').info('quiet')"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    (line,) = ran.stderr.splitlines()
    assert json.loads(line)["message"] == "a\nb ü"
    assert json.loads(line)["level"] == logging.getLevelName(logging.ERROR).lower()


class TestCountingModels:
    @pytest.fixture
    def reporter(self, filled: Filled) -> Iterator[Any]:
        from hydrafs.service.observing import LastErrors, Observed
        from hydrafs.service.status import Reporter
        from hydrafs.vfs import StoreTree

        filled.dehydrate()
        tree = StoreTree(filled.root, 1 << 24)
        tree.start()
        yield Reporter(Observed(tree), filled.root, LastErrors())
        tree.stop()

    def test_nothing_is_counted_again_while_nothing_changes(
        self, reporter: Any, filled: Filled, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        read: list[Path] = []
        monkeypatch.setattr("hydrafs.service.status._COUNT_AGAIN_SECONDS", 0.0)
        real = sys.modules["hydrafs.service.status"].trailer_of  # type: ignore[attr-defined]
        monkeypatch.setattr("hydrafs.service.status.trailer_of", lambda path: read.append(path) or real(path))
        inner = filled.root / "inner"
        inner.mkdir()
        for folder in (filled.root, inner):
            os.utime(folder, (1e9, 1e9))
        assert reporter.models().dehydrated == reporter.models().dehydrated == 1
        assert len(read) == 1
        (inner / "copy.safetensors.hydra").write_bytes(filled.diff.read_bytes())
        assert reporter.models().dehydrated == 2
        assert len(read) == 3
        # A folder that changed a moment ago is not believed.
        assert reporter.models().dehydrated == 2
        assert len(read) == 5

    def test_what_the_worker_did_is_counted_at_once(
        self, reporter: Any, filled: Filled, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert reporter.models().dehydrated == 1
        (filled.root / "copy.safetensors.hydra").write_bytes(filled.diff.read_bytes())
        eventually(lambda: reporter.models().dehydrated == 2, "a count stays old")

    def test_nobody_waits_for_a_count(self, reporter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        hangs = threading.Event()
        monkeypatch.setattr("hydrafs.service.status.trailer_of", lambda path: hangs.wait(30))
        monkeypatch.setattr("hydrafs.service.status._WAIT_SECONDS", 0.1)
        assert reporter.line() == "models are being counted; 0 open"
        assert reporter.models(0.1).models == 0
        monkeypatch.undo()
        hangs.set()
        eventually(lambda: reporter.models().models, "it is never counted")
        assert reporter.line().startswith("2 models")

    def test_a_disk_that_does_not_answer_keeps_nobody(self, reporter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        hangs = threading.Event()
        monkeypatch.setattr("hydrafs.service.status.told", lambda store: hangs.wait(30))
        assert reporter.status(0.1).worker.state == "none"
        hangs.set()
