"""Runs one change of a store again and again, killed at a further file operation each time, and looks at what is left.

Started by ``test_crash.py`` as ``killing.py TEMPLATE SCRATCH SCENARIO MODE FIRST STEP LIMIT``; prints how many kills
there were. A process without torch, so that a fork is cheap.
"""

from __future__ import annotations

import os
import signal
import sys


class State:
    """Which operation is next, and at which of them the process dies."""

    done = 0
    armed = False
    count = 0
    mode = ""


def step(call, watched=lambda *args: True):  # type: ignore[no-untyped-def]
    def wrapped(*args, **kwargs):  # type: ignore[no-untyped-def]
        if not State.armed or not watched(*args):
            return call(*args, **kwargs)
        State.done += 1
        number = State.done
        if number == State.count and State.mode == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            return call(*args, **kwargs)
        finally:
            if number == State.count and State.mode == "after":
                os.kill(os.getpid(), signal.SIGKILL)

    return wrapped


# Before pathlib is imported: that of Python 3.10 keeps these functions.
for name in ("fsync", "link", "rename", "replace", "unlink", "fchmod", "fchown", "utime", "mkdir", "rmdir", "setxattr",
             "copy_file_range", "pwrite"):  # fmt: skip
    setattr(os, name, step(getattr(os, name)))
os.open = step(os.open, lambda path, flags, *rest: flags & os.O_CREAT)  # type: ignore[assignment]

import contextlib  # noqa: E402
import hashlib  # noqa: E402
import shutil  # noqa: E402
import subprocess  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402

from hydrafs import keeping, renaming, tending  # noqa: E402
from hydrafs.cache import ChunkCache  # noqa: E402
from hydrafs.dehydrate import Options, dehydrate  # noqa: E402
from hydrafs.opening import Opener  # noqa: E402
from hydrafs.restore import rehydrate  # noqa: E402
from hydrafs.store import Store  # noqa: E402

OPTIONS = Options(jobs=1, chunk_nbytes=256 << 10)
Contents = dict[str, str]


def contents(store: Store) -> Contents:
    """What each listed name reads as."""
    found = {}
    with contextlib.closing(Opener(store, ChunkCache(1 << 20))) as opener:
        for model in store.models():
            with contextlib.closing(opener.open(model)) as source:
                found[model.name] = hashlib.sha256(source.pread(0, source.size)).hexdigest()
    return found


def prepare(store: Store, scenario: str) -> None:
    """What has been done before the change that is killed."""
    if scenario.startswith("collect"):
        for name in ["child", "tuned0", "tuned1", "tuned2"]:
            keeping.remove_model(store, store.root / f"{name}.safetensors")
        keeping.remove_model(store, store.root / "base.safetensors")
    if scenario in ("rehome", "remove the last"):
        keeping.remove_model(store, store.root / "base.safetensors")
    if scenario == "rehome":
        for name in ("child", "tuned1", "tuned2"):
            keeping.remove_model(store, store.root / f"{name}.safetensors")
    if scenario == "remove the last":
        for name in ("child", "tuned0", "tuned1"):
            keeping.remove_model(store, store.root / f"{name}.safetensors")


def change(store: Store, scenario: str) -> None:
    """The change itself."""
    path = {n: store.root / f"{n}.safetensors" for n in ("base", "tuned0", "tuned1", "tuned2", "fresh", "child")}
    if scenario == "dehydrate":
        dehydrate(store, path["fresh"], OPTIONS)
    elif scenario == "remove a base":
        keeping.remove_model(store, path["base"])
    elif scenario == "remove a diff that is a parent":
        keeping.remove_model(store, path["tuned0"])
    elif scenario == "remove the last":
        keeping.remove_model(store, path["tuned2"])
    elif scenario == "file over base":
        renaming.rename_model(store, path["fresh"], path["base"])
    elif scenario == "file over diff":
        renaming.rename_model(store, path["fresh"], path["tuned0"])
    elif scenario == "diff over base":
        renaming.rename_model(store, path["tuned1"], path["base"])
    elif scenario == "diff over diff":
        renaming.rename_model(store, path["tuned1"], path["tuned0"])
    elif scenario == "overwrite a base":
        keeping.before_overwrite(store, path["base"])
    elif scenario == "truncate a base":
        keeping.before_overwrite(store, path["base"], truncate=True)
    elif scenario == "collect":
        tending.collect(store)
    elif scenario == "rehome":
        tending.rehome(store, OPTIONS)
        tending.collect(store)
    elif scenario == "rehydrate":
        rehydrate(store, store.locate(path["tuned0"]))
        keeping.remove_diff(store, path["tuned0"])
    else:
        raise ValueError(scenario)


def main() -> None:
    """See the top of this file."""
    template, scratch, scenario, State.mode = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4]
    first, stride, limit = (int(a) for a in sys.argv[5:])
    root = scratch / "store"

    def fresh() -> None:
        shutil.rmtree(root, ignore_errors=True)
        # Links between the files stay links.
        subprocess.run(["cp", "-a", template, root], check=True)

    def run(action: Callable[[Store], None]) -> int:
        child = os.fork()
        if not child:
            State.done, code = 0, 99
            try:
                with contextlib.closing(Store(root, create=True)) as store:
                    State.armed = True
                    action(store)
                    State.armed = False
                    code = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                os._exit(code)
        status = os.waitpid(child, 0)[1]
        return os.waitstatus_to_exitcode(status)

    fresh()
    with contextlib.closing(Store(root)) as store:
        prepare(store, scenario)
        before = contents(store)
    prepared = scratch / "prepared"
    shutil.rmtree(prepared, ignore_errors=True)
    root.rename(prepared)
    template = prepared
    fresh()
    State.count = 0
    assert run(lambda store: change(store, scenario)) == 0
    with contextlib.closing(Store(root)) as store:
        after = contents(store)
    empty = hashlib.sha256(b"").hexdigest()
    State.count, kills = first, 0
    while kills < limit:
        fresh()
        code = run(lambda store: change(store, scenario))
        if code == 0:
            break  # there are no more operations
        assert code == -signal.SIGKILL, f"{scenario}, operation {State.count}: it failed"
        kills += 1
        where = f"{scenario}, killed {State.mode} operation {State.count}"
        with contextlib.closing(Store(root)) as store:
            now = contents(store)
            assert now in (before, after) or is_between(now, before, after), f"{where}: {now}"
            tending.start(store)
            now = contents(store)
            assert now in (before, after), f"{where}: after a start {now}\nbefore {before}\nafter {after}"
            left = list(root.rglob(".hydrafs-tmp-*")) + list(store.private.glob("journal-*"))
            assert not left, f"{where}: {left} left"
            # What is in order now stays so when it is tended, and when the change is made after all.
            tending.hold_parents(store)
            tending.collect(store)
            assert contents(store) == now, f"{where}: collected too much"
        if now == before != after:
            keep, State.count = State.count, 0
            assert run(lambda store: change(store, scenario)) == 0, f"{where}: it cannot be made again"
            State.count = keep
            with contextlib.closing(Store(root)) as store:
                assert contents(store) == after, f"{where}: made again"
        State.count += stride
    assert empty not in before.values()
    print(kills)


def is_between(now: Contents, before: Contents, after: Contents) -> bool:
    """rename(2): for a moment both names may be there. Every content is there, and no name has one of its own."""
    lost = {n: s for n, s in before.items() if n not in now}
    odd = {n: s for n, s in now.items() if s not in (before.get(n), after.get(n))}
    return not odd and all(n not in after for n in lost) and set(after.values()) <= set(now.values())


if __name__ == "__main__":
    main()
