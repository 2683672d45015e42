"""The command line is a contract: what each command prints, its JSON, one line and an exit code where it fails."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import Filled, ModelMaker

from hydrafs.cli import _COMMANDS, main
from hydrafs.diff import DiffFile

Capture = pytest.CaptureFixture[str]


@dataclass
class Ran:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def run(capsys: Capture) -> Callable[..., Ran]:
    """Run a command in this process, as from a pipe."""

    def run_(*arguments: object) -> Ran:
        capsys.readouterr()
        code = main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return Ran(code, out, err)

    return run_


Run = Callable[..., Ran]


def good(ran: Ran) -> Ran:
    assert (ran.code, ran.err) == (0, "")
    return ran


def bad(ran: Ran, code: int, *words: str) -> Ran:
    """One line on stderr, nothing on stdout, and the exit code."""
    assert ran.code == code, ran.err
    assert ran.out == ""
    assert ran.err.startswith("hydrafs: ")
    assert ran.err.count("\n") == 1
    assert ran.err.strip().isprintable()
    for word in words:
        assert word in ran.err
    return ran


@pytest.fixture
def dehydrated(filled: Filled) -> Filled:
    filled.dehydrate()
    return filled


# What works


def test_dehydrate_tells_what_it_did(run: Run, filled: Filled) -> None:
    ran = good(run("dehydrate", filled.tuned))
    assert "base.safetensors" in ran.out
    assert "proved by SHA-256" in ran.out
    assert filled.diff.exists()
    assert not filled.tuned.exists()
    assert "\x1b" not in ran.out + ran.err
    assert "\r" not in ran.out + ran.err


def test_dehydrate_json(run: Run, filled: Filled) -> None:
    base = filled.root / "base.safetensors"
    ran = good(run("dehydrate", "--json", "--keep", "--base", base, "-j", 1, filled.tuned))
    (facts,) = ran.json
    assert facts["diff"] == str(filled.diff)
    assert facts["size"] == len(filled.data)
    assert facts["stored"] == filled.diff.stat().st_size
    assert facts["sha256"] == filled.sha256.hex()
    assert facts["parents"] == ["base.safetensors"]
    assert facts["original_removed"] is False
    assert filled.tuned.exists()


def test_dehydrate_into_a_store(run: Run, filled: Filled, tmp_path: Path) -> None:
    store = tmp_path / "another"
    store.mkdir()
    (facts,) = good(run("dehydrate", "--json", "--store", store, "--base", filled.base, filled.tuned)).json
    assert facts["diff"] == str(store / "tuned.safetensors.hydra")
    assert not filled.tuned.exists()
    assert good(run("verify", store)).out.startswith("ok  tuned.safetensors")


def test_dehydrate_several_and_one_of_them_is_bad(run: Run, models: ModelMaker, filled: Filled) -> None:
    other = models.save(filled.root / "other.safetensors", models.tuned("bf16"))
    noise = filled.root / "noise.bin"
    noise.write_bytes(os.urandom(100_000))
    ran = run("dehydrate", "--json", "--base", filled.base, filled.tuned, filled.root / "none.ckpt", noise, other)
    assert ran.code == 3
    assert ran.err.count("\n") == 1
    assert "none.ckpt" in ran.err
    facts = ran.json
    assert [Path(f["model"]).name for f in facts] == ["tuned.safetensors", "noise.bin", "other.safetensors"]
    assert [bool(f["diff"]) for f in facts] == [True, False, True]
    assert facts[1]["stored"] == 100_000


def test_a_model_that_is_left_alone_is_said_so(run: Run, store: Path) -> None:
    (store / "noise.bin").write_bytes(os.urandom(100_000))
    ran = good(run("dehydrate", store / "noise.bin"))
    assert "left alone" in ran.out
    assert "no base" in ran.out
    (store / "empty.bin").write_bytes(b"")
    assert "left alone, it is empty" in good(run("dehydrate", store / "empty.bin")).out


def test_no_compress_and_uncompress(run: Run, filled: Filled) -> None:
    good(run("dehydrate", "--no-compress", "--keep", filled.tuned))
    plain = filled.diff.stat().st_size
    filled.diff.unlink()
    good(run("dehydrate", filled.tuned))
    small = filled.diff.stat().st_size
    facts = good(run("uncompress", "--json", filled.diff)).json
    assert facts == {"diff": str(filled.diff), "before": small, "after": filled.diff.stat().st_size}
    assert small < facts["after"]
    assert abs(facts["after"] - plain) < 2000
    assert "->" in good(run("uncompress", filled.tuned)).out
    good(run("verify", filled.diff))


def test_rehydrate(run: Run, dehydrated: Filled, tmp_path: Path) -> None:
    facts = good(run("rehydrate", "--json", "-o", tmp_path / "out.bin", dehydrated.tuned)).json
    assert facts == {"path": str(tmp_path / "out.bin"), "size": len(dehydrated.data), "sha256": dehydrated.sha256.hex()}
    assert (tmp_path / "out.bin").read_bytes() == dehydrated.data
    assert dehydrated.sha256.hex() in good(run("rehydrate", dehydrated.diff)).out
    assert dehydrated.tuned.read_bytes() == dehydrated.data
    assert dehydrated.diff.exists()


def test_ls(run: Run, dehydrated: Filled) -> None:
    (dehydrated.root / "broken.ckpt.hydra").write_bytes(b"junk")
    facts = good(run("ls", "--json", dehydrated.root)).json
    by_name = {m["name"]: m for m in facts["models"]}
    assert set(by_name) == {"base.safetensors", "tuned.safetensors", "broken.ckpt"}
    assert by_name["base.safetensors"]["state"] == "plain"
    assert by_name["broken.ckpt"]["state"] == "damaged"
    tuned = by_name["tuned.safetensors"]
    assert (tuned["state"], tuned["size"], tuned["sha256"]) == (
        "dehydrated", len(dehydrated.data), dehydrated.sha256.hex()
    )  # fmt: skip
    assert tuned["stored"] == dehydrated.diff.stat().st_size
    assert tuned["parents"][0]["name"] == "base.safetensors"
    assert facts["saved"] == facts["size"] - facts["stored"]
    ran = good(run("ls", dehydrated.root))
    rows = [line.split("\t") for line in ran.out.splitlines()]
    assert rows[0] == ["model", "size", "stored", "saved", "ratio", "parents"]
    assert {len(row) for row in rows} == {6}
    assert rows[-1][0] == "total"


def test_info(run: Run, dehydrated: Filled) -> None:
    for name in (dehydrated.tuned, dehydrated.diff):
        facts = good(run("info", "--json", name)).json
        assert facts["state"] == "dehydrated"
        assert facts["sha256"] == dehydrated.sha256.hex()
        assert facts["container"] == "safetensors"
        assert set(facts["hashes"]) == {"sha256", "blake3", "addnet_sha256", "partial_sha256"}
        assert facts["hashes"]["sha256"] == facts["sha256"]
        spans = {s["name"]: s for s in facts["spans"]}
        assert spans["frozen.weight"]["prediction"] == "same, base.safetensors"
        assert spans["frozen.weight"]["stored"] == 0
        assert spans["up.weight"]["prediction"] == "tensor, base.safetensors"
        assert 0 < spans["up.weight"]["stored"] < spans["up.weight"]["size"]
        assert sum(s["size"] for s in facts["spans"]) == facts["size"]
        assert abs(sum(s["stored"] for s in facts["spans"]) - facts["stored"]) < 4000
    text = good(run("info", dehydrated.tuned)).out
    assert f"BLAKE3 {facts['hashes']['blake3']}\n" in text
    assert "up.weight\tF16\t512x96\t" in text
    plain = good(run("info", "--json", dehydrated.base)).json
    assert plain["state"] == "plain"
    assert {s["name"] for s in plain["spans"]} >= {"up.weight"}
    assert "full file" in text or "base.safetensors" in text
    assert good(run("info", dehydrated.base)).out


def test_verify(run: Run, dehydrated: Filled) -> None:
    for target in (dehydrated.root, dehydrated.tuned, dehydrated.diff):
        assert "1 diffs checked, 0 bad" in good(run("verify", target)).out
    facts = good(run("verify", "--json", dehydrated.root)).json
    assert (facts["checked"], facts["bad"]) == (1, 0)
    assert facts["models"][0]["sha256"] == dehydrated.sha256.hex()


def test_verify_names_what_is_bad(run: Run, models: ModelMaker, dehydrated: Filled) -> None:
    other = models.save(dehydrated.root / "other.safetensors", models.tuned("bf16"))
    good(run("dehydrate", "--base", dehydrated.base, other))
    with DiffFile(dehydrated.diff) as diff:
        place = diff.chunk_offset[len(diff.chunk_offset) // 2] + 3
    data = bytearray(dehydrated.diff.read_bytes())
    data[place] ^= 0xFF
    dehydrated.diff.write_bytes(data)
    ran = run("verify", dehydrated.root)
    assert ran.code == 1
    lines = ran.out.splitlines()
    assert [line for line in lines if line.startswith("BAD tuned.safetensors: ")]
    assert [line for line in lines if line.startswith("ok  other.safetensors: ")]
    assert lines[-1] == "2 diffs checked, 1 bad"
    facts = run("verify", "--json", dehydrated.root)
    assert facts.code == 1
    assert [m["error"] for m in facts.json["models"] if not m["ok"]] == ["CorruptChunk"]
    dehydrated.let_go()
    dehydrated.base.unlink()
    assert {m["error"] for m in run("verify", "--json", dehydrated.root).json["models"]} == {"ParentMissing"}


def test_bases(run: Run, dehydrated: Filled, tmp_path: Path) -> None:
    facts = good(run("bases", "--json", dehydrated.root)).json
    (base,) = facts["bases"]
    assert (base["name"], base["state"], base["dependents"]) == ("base.safetensors", "plain", ["tuned.safetensors"])
    assert base["sha256"] == hashlib.sha256(dehydrated.base.read_bytes()).hexdigest()
    assert good(run("bases", dehydrated.root)).out.splitlines()[1].split("\t")[3] == "tuned.safetensors"
    dehydrated.base.unlink()
    assert [b["state"] for b in good(run("bases", "--json", dehydrated.root)).json["bases"]] == ["held"]
    dehydrated.let_go()
    assert [b["state"] for b in good(run("bases", "--json", dehydrated.root)).json["bases"]] == ["missing"]


def test_doctor(run: Run) -> None:
    ran = run("doctor")
    assert ran.code in (0, 1, 11)
    assert "fuse" in ran.out.lower()
    assert "Traceback" not in ran.out + ran.err
    assert isinstance(run("doctor", "--json").json, dict | list)


def test_nothing_to_list(run: Run, store: Path) -> None:
    assert good(run("ls", "--json", store)).json["models"] == []
    assert "0 models" in good(run("ls", store)).out
    assert good(run("bases", "--json", store)).json["bases"] == []
    assert "0 diffs checked" in good(run("verify", store)).out


def test_names_that_are_no_text(run: Run, models: ModelMaker, filled: Filled) -> None:
    """File names are bytes; a tab or a line feed in one must not make another column or line."""
    for raw in (
        b"caf\xe9.safetensors",
        b"tab\there.safetensors",
        b"line\nfeed.safetensors",
        b"\x1b[31mred.safetensors",
    ):
        name = filled.root / os.fsdecode(raw)
        models.save(name, models.tuned("fp16"))
        good(run("dehydrate", name))
        assert json.loads(run("info", "--json", name).out)["state"] == "dehydrated"
        good(run("info", name))
        good(run("verify", name))
    good(run("bases", filled.root))
    lines = good(run("ls", filled.root)).out.splitlines()
    assert len(lines) == 1 + 6 + 1
    assert {line.count("\t") for line in lines} == {5}
    assert all(line.replace("\t", "").isprintable() for line in lines)


# What fails


def test_what_is_not_there(run: Run, store: Path) -> None:
    none = store / "none.ckpt"
    for command in ("dehydrate", "rehydrate", "uncompress", "info", "verify"):
        bad(run(command, none), 3, "none.ckpt")
        bad(run(command, store / "no" / "folder" / "x.ckpt"), 3)
    for command in ("ls", "bases"):
        bad(run(command, none), 3, "none.ckpt")


@pytest.mark.parametrize(
    "arguments",
    [
        ["frobnicate"],
        ["dehydrate"],
        ["dehydrate", "--jobs", "none", "x"],
        ["dehydrate", "--jobs", "0", "x"],
        ["ls"],
        ["ls", "--nonsense", "."],
        ["info", "a", "b"],
        ["--nonsense"],
        ["dehydrate", "--no-compress", "--codec", "rans", "x"],
        ["mount", "--cache-size", "lots", ".", "/tmp/none"],
        ["mount", "--cache-size", "-1G", ".", "/tmp/none"],
    ],
)
def test_what_cannot_be_meant(run: Run, arguments: list[str]) -> None:
    bad(run(*arguments), 2)


def test_the_wrong_kind_of_thing(run: Run, dehydrated: Filled) -> None:
    root, base, diff = dehydrated.root, dehydrated.base, dehydrated.diff
    (root / "link.ckpt").symlink_to(base)
    bad(run("dehydrate", root), 2)
    bad(run("dehydrate", diff), 2, "already dehydrated")
    bad(run("dehydrate", dehydrated.tuned), 2, "already dehydrated")
    bad(run("dehydrate", "--store", root / "none", base), 3, "no such folder", "mkdir -p")
    bad(run("dehydrate", root / "link.ckpt"), 2, "link")
    bad(run("rehydrate", base), 2, "not a diff")
    bad(run("uncompress", base), 2, "not a diff")
    bad(run("verify", base), 3)
    bad(run("ls", base), 2)
    bad(run("info", root), 3)
    bad(run("info", "/"), 3)
    bad(run("rehydrate", "/"), 3)
    bad(run("info", ""), 3)
    bad(run("info", root / ("x" * 5000)), 3)


def test_what_is_in_the_way(run: Run, dehydrated: Filled) -> None:
    dehydrated.tuned.write_bytes(b"another model")
    bad(run("rehydrate", dehydrated.diff), 10, "tuned.safetensors")
    bad(run("dehydrate", dehydrated.tuned), 10)
    assert dehydrated.tuned.read_bytes() == b"another model"


def test_a_damaged_diff(run: Run, dehydrated: Filled) -> None:
    whole = dehydrated.diff.read_bytes()
    dehydrated.diff.write_bytes(whole[:-1])
    for command in ("rehydrate", "uncompress", "info"):
        bad(run(command, dehydrated.diff), 5, "tuned.safetensors.hydra")
    later = bytearray(whole)
    later[8] = 9
    dehydrated.diff.write_bytes(later)
    bad(run("info", dehydrated.diff), 6, "update hydrafs")


def test_a_parent_that_is_gone_or_changed(run: Run, dehydrated: Filled) -> None:
    data = dehydrated.base.read_bytes()
    dehydrated.base.write_bytes(data[:-1] + b"?")
    bad(run("rehydrate", dehydrated.diff), 7, "base.safetensors", hashlib.sha256(data).hexdigest())
    dehydrated.base.unlink()
    bad(run("rehydrate", dehydrated.diff), 7, "base.safetensors", hashlib.sha256(data).hexdigest())
    assert not dehydrated.tuned.exists()


def test_a_full_disk(run: Run, filled: Filled, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    usage = shutil.disk_usage(filled.root)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    bad(run("dehydrate", filled.tuned), 8, "free some space")
    assert filled.tuned.exists()


_AS_NOBODY = """
import os, sys
from hydrafs import cli
for name in cli._COMMANDS:
    cli._root.get_command(None, name)
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("writable", ["nothing", "the folder", "all but the model"])
def test_no_permission(models: ModelMaker, at_end: contextlib.ExitStack, writable: str) -> None:
    """Run by a user who may not write there; as root, by handing over to one."""
    root = Path(at_end.enter_context(tempfile.TemporaryDirectory(prefix="hydrafs-test-")))
    base = models.save(root / "base.safetensors", models.base("fp16"))
    tuned = models.save(root / "tuned.safetensors", models.tuned("fp16"))
    data = tuned.read_bytes()
    for path in (base, tuned):
        path.chmod(0o644)
    root.chmod(0o555 if writable == "nothing" else 0o777)
    at_end.callback(root.chmod, 0o755)
    if writable == "all but the model":
        tuned.chmod(0o000)
    ran = subprocess.run(
        [sys.executable, "-c", _AS_NOBODY, "dehydrate", "--base", base, tuned],
        check=False, capture_output=True, text=True, timeout=60, cwd="/",
    )  # fmt: skip
    if writable == "the folder":
        assert ran.returncode == 0
        assert "proved" in ran.stdout
        return
    bad(Ran(ran.returncode, ran.stdout, ran.stderr), 9, str(root))
    tuned.chmod(0o644)
    assert tuned.read_bytes() == data
    assert {p.name for p in root.iterdir()} <= {".hydrafs", "base.safetensors", "tuned.safetensors"}


def test_a_parent_that_may_not_be_read(models: ModelMaker, at_end: contextlib.ExitStack) -> None:
    """It is there: who is told that it is missing looks in vain."""
    root = Path(at_end.enter_context(tempfile.TemporaryDirectory(prefix="hydrafs-test-")))
    base = models.save(root / "base.safetensors", models.base("fp16"))
    tuned = models.save(root / "tuned.safetensors", models.tuned("fp16"))
    tuned.chmod(0o644)
    digest = hashlib.sha256(base.read_bytes()).hexdigest()
    assert main(["dehydrate", "--base", str(base), str(tuned)]) == 0
    base.chmod(0o000)
    root.chmod(0o777)
    ran = subprocess.run(
        [sys.executable, "-c", _AS_NOBODY, "rehydrate", f"{tuned}.hydra"],
        check=False, capture_output=True, text=True, timeout=60, cwd="/",
    )  # fmt: skip
    bad(Ran(ran.returncode, ran.stdout, ran.stderr), 7, str(base), "Permission denied", digest, "check the permissions")
    assert not tuned.exists()


def test_an_interrupt_is_one_line(run: Run, filled: Filled, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object, **more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hydrafs.dehydrate.prove", interrupt)
    ran = run("dehydrate", filled.tuned)
    bad(Ran(ran.code, ran.out, ran.err.lstrip("\n")), 130)  # the line that ^C was typed on is ended first
    assert filled.tuned.read_bytes() == filled.data
    assert sorted(p.name for p in filled.root.iterdir() if p.name != ".hydrafs") == [
        "base.safetensors", "tuned.safetensors"
    ]  # fmt: skip


def test_a_reader_that_goes_away(dehydrated: Filled) -> None:
    """As with ``hydrafs ls | head -0``."""
    read, write = os.pipe()
    os.close(read)
    ran = subprocess.run(
        [sys.executable, "-m", "hydrafs", "ls", "--json", dehydrated.root],
        check=False, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60,
    )  # fmt: skip
    os.close(write)
    assert "Traceback" not in ran.stderr
    assert ran.stderr == ""


def test_leftovers_of_a_crash_are_removed(run: Run, filled: Filled) -> None:
    (filled.root / ".hydrafs-tmp-0123").write_bytes(b"half")
    good(run("dehydrate", filled.tuned))
    assert not list(filled.root.glob(".hydrafs-tmp-*"))


# Help, and what it costs


def test_help_of_everything(run: Run) -> None:
    text = good(run("--help")).out
    for command in _COMMANDS:
        assert command in text
        assert "Usage: " in good(run(command, "--help")).out
    assert good(run("--version")).out.startswith("hydrafs")


_LOADED = """
import sys
from hydrafs.cli import main
code = main(sys.argv[1:])
heavy = ("torch", "numpy", "zstandard", "rich", "safetensors", "mfusepy")
print([m for m in heavy if m in sys.modules], file=sys.stderr)
sys.exit(code)
"""


def loaded(*arguments: object) -> list[str]:
    """Which heavy modules a command has loaded by its end."""
    ran = subprocess.run(
        [sys.executable, "-c", _LOADED, *map(str, arguments)],
        check=True, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return list(json.loads(ran.stderr.strip().splitlines()[-1].replace("'", '"')))


def test_help_loads_nothing_heavy() -> None:
    assert loaded("--help") == []
    assert loaded("--version") == []


def test_no_command_loads_torch(filled: Filled) -> None:
    for command in ("dehydrate", "info", "verify", "rehydrate"):
        assert "torch" not in loaded(command, filled.tuned if command != "verify" else filled.diff)
    assert "torch" not in loaded("ls", filled.root)
    assert "torch" not in loaded("bases", filled.root)


_SERVE = """
import sys
from hydrafs.cli import mount
from hydrafs import fuse, mounting
from hydrafs.vfs import StoreTree
tree = StoreTree(sys.argv[1], 1 << 20)
tree.start()
for entry in tree.readdir("/"):
    tree.getattr("/" + entry.name)
    file = tree.open("/" + entry.name, 0)
    buffer = memoryview(bytearray(1 << 20))
    offset = 0
    while count := file.pread_into(offset, buffer):
        offset += count
    file.close()
tree.stop()
print([m for m in ("torch", "safetensors") if m in sys.modules])
"""


def test_serving_models_loads_no_torch(models: ModelMaker, filled: Filled) -> None:
    for suffix, options in ((".ckpt", {}), (".pt", {"legacy": True})):
        model = models.save(filled.root / f"other{suffix}", models.tuned("bf16"), **options)
        assert main(["dehydrate", str(model), "--base", str(filled.base)]) == 0
    filled.dehydrate()
    ran = subprocess.run(
        [sys.executable, "-c", _SERVE, filled.root], check=True, capture_output=True, text=True, timeout=60
    )
    assert ran.stdout.strip() == "[]"


def test_the_package_and_mount_py_are_the_same_command_line() -> None:
    root = Path(__file__).parent.parent
    for command in (
        [sys.executable, "-m", "hydrafs", "mount", "--help"],
        [sys.executable, root / "mount.py", "--help"],
    ):
        ran = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
        assert "MOUNTPOINT" in ran.stdout
        assert ran.stderr == ""


@pytest.mark.parametrize("missing", ["click", "numpy"])
def test_a_python_without_the_packages_is_told_what_to_do(missing: str) -> None:
    """mount.py is what is run from a clone, by whatever Python is at hand."""
    root = Path(__file__).parent.parent
    code = f"import runpy, sys; sys.modules[{missing!r}] = None; sys.argv[1:] = ['a', 'b']; "
    ran = subprocess.run(
        [sys.executable, "-c", code + f"runpy.run_path({str(root / 'mount.py')!r}, run_name='__main__')"],
        check=False, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    bad(Ran(ran.returncode, ran.stdout, ran.stderr), 3, missing, sys.executable, "pip install")
