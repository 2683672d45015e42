"""Runs one change of a store again and again, killed at a further file operation each time, and looks at what is left.

Started by ``test_crash.py`` as ``killing.py TEMPLATE SCRATCH SCENARIO MODE FIRST STEP LIMIT``; prints how many kills
there were. A process without torch, so that a fork is cheap.
"""

from __future__ import annotations

import watched

watched.watch()  # before pathlib is imported

import contextlib  # noqa: E402
import hashlib  # noqa: E402
import os  # noqa: E402
import shutil  # noqa: E402
import signal  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402

from scenarios import (  # noqa: E402
    GOING,
    MANY,
    SLACK,
    change,
    contents,
    files,
    is_between,
    is_whole,
    loose_pins,
    prepare,
    tidy,
)
from watched import State  # noqa: E402

from hydrafs import tending  # noqa: E402
from hydrafs.store import Store  # noqa: E402


def main() -> None:
    """See the top of this file."""
    template, scratch, scenario = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    State.mode, State.kinds = {"before": "kill", "after": "killed"}[sys.argv[4]], frozenset(watched.CHANGES)
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
        before, files_before, pinned = contents(store), files(store), bool(store.pinned)
    prepared = scratch / "prepared"
    shutil.rmtree(prepared, ignore_errors=True)
    root.rename(prepared)
    template = prepared
    fresh()
    with contextlib.closing(Store(root)) as store:
        most = tidy(store)
    fresh()
    State.count = 0
    assert run(lambda store: change(store, scenario)) == 0
    with contextlib.closing(Store(root)) as store:
        after, files_after = contents(store), files(store)
        tending.start(store)
        assert files(store) == files_after, "a start took what was made on purpose"
        most = max(most, tidy(store))
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
            assert not pinned or not loose_pins(store, before), f"{where}: a pin is lost"
            tending.start(store)
            now = contents(store)
            whole = now in (before, after) or is_whole(now, before, after) or scenario in MANY
            assert whole, f"{where}: after a start {now}\nbefore {before}\nafter {after}"
            if scenario not in MANY:
                allowed = [files_before, files_after]
                if scenario in GOING:
                    allowed.append(
                        {f for f in files_before if f.removesuffix(".hydra") == f or f[:-6] not in files_before}
                    )
                assert files(store) in allowed, f"{where}: {files(store)}"
            left = [p for p in root.rglob(".hydrafs-*") if p != store.private]
            left += list(store.private.glob("journal-*"))
            assert not left, f"{where}: {left} left"
            # What is in order now stays so when it is tended, and when the change is made after all.
            used = tidy(store)
            assert contents(store) == now, f"{where}: collected too much"
            assert scenario in MANY or scenario == "cut a diff" or used <= most + SLACK, (
                f"{where}: {used} bytes, at most {most} before and after"
            )
        if now == before != after:
            keep, State.count = State.count, 0
            assert run(lambda store: change(store, scenario)) == 0, f"{where}: it cannot be made again"
            State.count = keep
            with contextlib.closing(Store(root)) as store:
                assert contents(store) == after, f"{where}: made again"
        State.count += stride
    assert empty not in before.values()
    print(kills)


if __name__ == "__main__":
    main()
