"""A question never writes: what only asks, and what is refused or fails before it acts, leaves no trace on the disk.

Every command is run, as it is meant and as it is refused, on a folder that is no store, on a store, on a damaged one,
and on one that cannot be written; before and after, everything in reach is the same: names, inodes, sizes, times,
modes, owners, link counts, extended attributes and bytes.
"""

from __future__ import annotations

import bz2
import contextlib
import hashlib
import os
import shutil
import signal
import stat
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import ModelMaker

from hydrafs.cli import _COMMANDS, main
from hydrafs.dehydrate import Options, dehydrate
from hydrafs.keeping import remove_model
from hydrafs.store import Store

Capture = pytest.CaptureFixture[str]


class Seen(NamedTuple):
    inode: int
    mode: int
    owner: tuple[int, int]
    links: int
    size: int
    mtime_ns: int
    ctime_ns: int
    attributes: tuple[tuple[str, bytes], ...]
    content: str


def seen(path: Path) -> Seen:
    found = os.lstat(path)
    names = sorted(os.listxattr(path, follow_symlinks=False))
    attributes = tuple((n, os.getxattr(path, n, follow_symlinks=False)) for n in names)
    content = ""
    if stat.S_ISREG(found.st_mode):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
    elif stat.S_ISLNK(found.st_mode):
        content = os.readlink(path)
    owner = (found.st_uid, found.st_gid)
    times = (found.st_mtime_ns, found.st_ctime_ns)
    return Seen(found.st_ino, found.st_mode, owner, found.st_nlink, found.st_size, *times, attributes, content)


def everything(top: Path) -> dict[str, Seen]:
    """All that is at ``top`` and below."""
    found = {str(top): seen(top)}
    for folder, folders, names in os.walk(top):
        for name in (*folders, *names):
            found[os.path.join(folder, name)] = seen(Path(folder, name))
    return found


def changed(before: dict[str, Seen], after: dict[str, Seen]) -> list[str]:
    names = sorted(before.keys() | after.keys())
    return [f"{n}: {before.get(n)} -> {after.get(n)}" for n in names if before.get(n) != after.get(n)]


class World:
    """Folders with everything that a command could ask about. ``top`` holds them all, and the user's home."""

    def __init__(self, top: Path, models: ModelMaker) -> None:
        self.top = top
        self.store = top / "work" / "store"
        self.home = top / "home"
        self.outside = top / "outside"
        for folder in (self.store, self.home, self.outside, self.store / "inner", top / "empty", top / "full"):
            folder.mkdir(parents=True)
        (top / "full" / "file").write_bytes(b"x")
        models.save(self.store / "base.safetensors", models.base("fp16"))
        models.save(self.outside / "base.safetensors", models.base("fp32"))
        models.save(self.store / "inner" / "tuned.safetensors", models.tuned("fp16"))
        models.save(self.store / "other.safetensors", {"embedding.weight": torch.randn(64, 64)})
        (self.store / "noise.bin").write_bytes(os.urandom(100_000))
        (self.store / "empty.safetensors").write_bytes(b"")
        (self.store / "broken.safetensors").write_bytes(b"\xff" * 64 + bytes(1000))
        (self.store / "broken.ckpt").write_bytes(b"PK\x03\x04" + bytes(1000))
        (self.store / "notes.txt").write_bytes(b"no model")
        (self.store / "damaged.pbz2").write_bytes(bz2.compress(os.urandom(5000))[:-100])
        (self.store / "foreign.pbz2").write_bytes(bz2.compress(b"no diff" * 1000))
        (self.store / "link.safetensors").symlink_to("base.safetensors")
        (self.store / "nowhere").symlink_to("nothing")

    def dehydrated(self, models: ModelMaker) -> World:
        """A store in use: a diff, a retired base, a pinned model, and facts in the catalog."""
        with contextlib.closing(Store(self.store, create=True)) as store:
            for seed, name in enumerate(("stored.safetensors", "recent.safetensors")):
                torch.manual_seed(seed)
                tensors = models.tuned("fp16")
                tensors["norm.bias"] = tensors["norm.bias"] + torch.randn(96).half()
                path = models.save(self.store / name, tensors)
                options = Options(bases=(self.store / "base.safetensors",), jobs=1, chunk_nbytes=32 << 10)
                assert dehydrate(store, path, options).original_removed
            shutil.copy(self.store / "base.safetensors", self.store / "pinned.safetensors")
            store.pin(["pinned.safetensors"])
            remove_model(store, self.store / "base.safetensors")
        models.save(self.store / "base.safetensors", models.base("bf16"))
        (self.store / "behind.safetensors.hydra").write_bytes((self.store / "stored.safetensors.hydra").read_bytes())
        (self.store / "behind.safetensors").write_bytes(b"a file that hides a diff")
        return self

    def damaged(self, models: ModelMaker) -> World:
        """A store after bad days: flipped bits, and what killed processes left."""
        self.dehydrated(models)
        private = self.store / ".hydrafs"
        diff = self.store / "stored.safetensors.hydra"
        data = bytearray(diff.read_bytes())
        data[-5] ^= 1
        diff.write_bytes(data)
        (private / "catalog.sqlite").write_bytes(b"no database" * 1000)
        (private / "journal-0123456789abcdef").write_bytes(b"{")
        (private / ".hydrafs-tmp-0123456789abcdef").write_bytes(b"left")
        (private / ".hydrafs-tmp-rehoming-x").mkdir()
        (self.store / ".hydrafs-tmp-0123456789abcdef").write_bytes(b"left")
        (self.store / "inner" / ".hydrafs-aside-0123456789abcdef").write_bytes(b"the only copy")
        (self.store / "loop").symlink_to("loop")
        return self


def _no_store(world: World, models: ModelMaker) -> None:
    del models
    (world.store / "stored.safetensors.hydra").write_bytes(b"no diff")


def _store(world: World, models: ModelMaker) -> None:
    world.dehydrated(models)


def _damaged(world: World, models: ModelMaker) -> None:
    world.damaged(models)


def _damaged_settings(world: World, models: ModelMaker) -> None:
    world.dehydrated(models)
    (world.store / ".hydrafs" / "config.toml").write_bytes(b"base_folders = [")


def _foreign_mark(world: World, models: ModelMaker) -> None:
    del models
    (world.store / ".hydrafs").write_bytes(b"somebody's file")
    (world.top / ".hydrafs").write_bytes(b"somebody's file")
    (world.home / ".hydrafs").mkdir()


SCENES = {
    "none": _no_store,
    "used": _store,
    "damaged": _damaged,
    "settings": _damaged_settings,
    "stray": _foreign_mark,
}

QUESTIONS = [
    "ls {store}", "ls --json {store}", "ls {store}/inner", "ls {top}/none", "ls {store}/base.safetensors",
    "info {store}/base.safetensors", "info {store}/stored.safetensors", "info --json {store}/recent.safetensors",
    "info --plot {store}/recent.safetensors", "info {store}/inner/tuned.safetensors", "info {store}/none",
    "info {store}/notes.txt",
    "verify {store}", "verify --json {store}", "verify {store}/inner", "verify {store}/recent.safetensors",
    "verify {store}/base.safetensors", "verify {top}/empty",
    "bases {store}", "bases --json {store}", "bases {top}/empty", "bases --pin none.safetensors {store}",
    "bases --unpin none.safetensors {store}", "bases --pin {store}/stored.safetensors {store}",
    "hashes {store}", "hashes --json {store}",
    "doctor", "doctor {store}", "doctor --json {store}", "doctor {top}/none",
    "gc --dry-run {store}", "gc --dry-run --json {store}", "gc --dry-run --rehome {store}", "gc --dry-run {top}/empty",
    "gc {top}/none",
    "status", "status --json", "status {top}/empty", "top", "control {top}/empty drop", "warm",
    "warm {store}/base.safetensors", "umount {top}/empty", "completion bash", "completion none",
]  # fmt: skip

REFUSED = [
    "dehydrate {store}", "dehydrate {store}/inner", "dehydrate {top}/empty", "dehydrate .", "dehydrate {home}",
    "dehydrate {store}/none.safetensors", "dehydrate {top}/none/none.safetensors",
    "dehydrate {store}/link.safetensors", "dehydrate {store}/nowhere", "dehydrate {store}/recent.safetensors.hydra",
    "dehydrate {store}/recent.safetensors", "dehydrate --codec none {store}/inner/tuned.safetensors",
    "dehydrate --no-compress --codec rans {store}/inner/tuned.safetensors",
    "dehydrate --base {store}/none.safetensors {store}/inner/tuned.safetensors",
    "dehydrate --base {top}/empty {store}/inner/tuned.safetensors",
    "dehydrate --base {store}/inner/tuned.safetensors {store}/inner/tuned.safetensors",
    "dehydrate --store {top}/none {store}/inner/tuned.safetensors",
    "dehydrate --store {store}/notes.txt {store}/inner/tuned.safetensors",
    "dehydrate --jobs 0 {store}/inner/tuned.safetensors", "dehydrate",
    "dehydrate {store}/pinned.safetensors {store}/none.safetensors",
    "dehydrate {store}/noise.bin", "dehydrate {store}/empty.safetensors",
    "rehydrate {store}/none.safetensors", "rehydrate {store}/base.safetensors",
    "rehydrate -o {store}/base.safetensors {store}/recent.safetensors",
    "rehydrate --virtual {store}/made.safetensors {store}/recent.safetensors",
    "rehydrate --strength nan --virtual {store}/made.safetensors {store}/recent.safetensors",
    "rehydrate --strength 1 --virtual {store}/made.safetensors {store}/base.safetensors",
    "uncompress {store}/base.safetensors", "uncompress {store}/none.safetensors",
    "merge {store}/base.safetensors {store}/other.safetensors --virtual {store}/made.safetensors",
    "merge {store}/base.safetensors {store}/none.safetensors --virtual {store}/made.safetensors",
    "merge {store}/base.safetensors {store}/noise.bin --virtual {store}/made.safetensors",
    "merge {store}/base.safetensors {outside}/base.safetensors",
    "merge {store}/base.safetensors {outside}/base.safetensors --virtual {store}/base.safetensors",
    "merge {store}/base.safetensors {outside}/base.safetensors --virtual {store}/none/made.safetensors",
    "merge {store}/base.safetensors {outside}/base.safetensors --virtual {store}/made.gguf",
    "merge {store}/base.safetensors {outside}/base.safetensors --output {store}/base.safetensors",
    "merge {store}/base.safetensors {outside}/base.safetensors --alpha nan --virtual {store}/made.safetensors",
    "unmerge {store}/base.safetensors {outside}/base.safetensors --alpha 0 --virtual {store}/made.safetensors",
    "unmerge {store}/base.safetensors {store}/other.safetensors --virtual {store}/made.safetensors",
    "convert {store}/base.safetensors --virtual {store}/made.safetensors",
    "convert {store}/base.safetensors --vae {store}/other.safetensors --virtual {store}/made.safetensors",
    "import {store}/notes.txt --base {store}/base.safetensors",
    "import {store}/damaged.pbz2 --base {store}/base.safetensors",
    "import {store}/foreign.pbz2 --base {store}/base.safetensors",
    "import {store}/none.pbz2 --base {store}/base.safetensors",
    "import {store}/notes.txt --base {store}/none.safetensors",
    "import {store}/notes.txt --base {store}/base.safetensors --name base.safetensors",
    "import {store}/notes.txt --base {outside}/base.safetensors --store {top}/empty",
    "import {store}/notes.txt --base {outside}/base.safetensors --store {top}/none",
    "export {store}/recent.safetensors --base {store}/base.safetensors",
    "export --seed {store}/none --base {store}/base.safetensors",
    "export --seed {store}/noise.bin --base {store}/base.safetensors",
    "export --seed {store}/base.safetensors --base {store}/base.safetensors",
    "export --seed {store}/base.safetensors --base {store}/base.safetensors -o {store}/notes.txt",
    "rm {store}/none.safetensors", "rm {store}/inner",
    "mount {store} {top}/none", "mount {store} {top}/full", "mount {top}/none {top}/empty",
    "mount {store} {store}/inner", "mount -o none {store} {top}/empty", "mount --cache-size none {store} {top}/empty",
    "mount --min-size none {store} {top}/empty", "mount --settle -1 {store} {top}/empty",
    "mount --metrics-address none {store} {top}/empty", "mount {store}/notes.txt {top}/empty",
    "watch {top}/none", "watch --min-size none {store}", "watch {store}/notes.txt",
    "hashes {top}/none", "report {store} -o {top}/none/page.html", "report {top}/none -o {outside}/page.html",
    "undelete {store} none.safetensors", "undelete {top}/none", "log {top}/empty",
]  # fmt: skip
"""Each of these is refused, or leaves a model as it is, in every scene; those that make something where the scene has
what it takes are not among them."""


@pytest.fixture(params=SCENES)
def world(request: pytest.FixtureRequest, tmp_path: Path, models: ModelMaker, monkeypatch: pytest.MonkeyPatch) -> World:
    world = World(tmp_path / "top", models)
    _alone(world, monkeypatch)
    SCENES[request.param](world, models)
    return world


def _alone(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is in reach but this world."""
    for name, folder in (("HOME", "."), ("XDG_CACHE_HOME", ".cache"), ("XDG_STATE_HOME", ".state")):
        monkeypatch.setenv(name, str(world.home / folder))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(world.home / "run"))
    monkeypatch.chdir(world.outside)
    for module in ("common", "findings", "warm"):  # whatever else is mounted on this machine
        monkeypatch.setattr(f"hydrafs.cli.{module}.our_mounts", list)


def _run(world: World, line: str, capsys: Capture) -> int:
    places = {"store": world.store, "top": world.top, "home": world.home, "outside": world.outside}

    def too_long(number: int, frame: object) -> None:
        raise AssertionError(f"no answer: {line}")

    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(30)
    try:
        return main([part.format(**places) for part in line.split(" ")])
    finally:
        signal.alarm(0)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # a service takes them for itself
            signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
        capsys.readouterr()


def _leave_no_trace(world: World, lines: list[str], capsys: Capture, *, refused: bool) -> None:
    before = everything(world.top)
    traces = {}
    accepted: list[str] = []
    for line in lines:
        if line.split(" ", 1)[0] not in _COMMANDS:
            continue
        code = _run(world, line, capsys)
        left_whole = ("noise.bin", "empty.safetensors", "pinned.safetensors")
        if refused and not code and not line.endswith(left_whole):
            accepted.append(line)
        after = everything(world.top)
        if before != after:
            traces[line] = changed(before, after)
            before = after
    assert not accepted
    assert not traces


def test_questions_leave_no_trace(world: World, capsys: Capture, caplog: pytest.LogCaptureFixture) -> None:
    del caplog
    _leave_no_trace(world, QUESTIONS, capsys, refused=False)


def test_what_is_refused_leaves_no_trace(world: World, capsys: Capture, caplog: pytest.LogCaptureFixture) -> None:
    del caplog
    _leave_no_trace(world, REFUSED, capsys, refused=True)


def test_a_store_that_cannot_be_written(
    tmp_path: Path,
    models: ModelMaker,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Questions are answered as where it can be written to, and whatever acts is refused."""
    del caplog
    world = World(tmp_path / "top", models).dehydrated(models)
    _alone(world, monkeypatch)
    asked = [line for line in QUESTIONS if line.split(" ", 1)[0] in _COMMANDS]
    codes = {line: _run(world, line, capsys) for line in asked}
    done = subprocess.run(["mount", "--bind", "-o", "ro", world.store, world.store], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("nothing can be mounted here")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", world.store], check=True)
        before = everything(world.top)
        assert {line: _run(world, line, capsys) for line in asked} == codes
        for line in (*REFUSED, "dehydrate {store}/inner/tuned.safetensors", "rm {store}/recent.safetensors"):
            if line.split(" ", 1)[0] in _COMMANDS:
                _run(world, line, capsys)
        assert not changed(before, everything(world.top))
    finally:
        subprocess.run(["umount", "-l", world.store], check=True)


def test_every_command_is_asked() -> None:
    asked = {line.split(" ", 1)[0] for line in (*QUESTIONS, *REFUSED)}
    assert set(_COMMANDS) - asked <= {"fstab"}
