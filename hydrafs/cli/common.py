"""What the commands share: finding the store and the model that are meant, and showing things."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click

from hydrafs.child import ask_filesystems
from hydrafs.covered import cover, keep_catalogs_in, shown
from hydrafs.errors import HydraError, NotFound, printable
from hydrafs.logs import Style
from hydrafs.mountpoints import mount_above, our_mounts, resolve
from hydrafs.retained import Kept, aside_files, unhashed_files
from hydrafs.service.control import ask, daemon_of, does_not_answer, runtime_folders
from hydrafs.store import ModelEntry, Store, find_root
from hydrafs.walk import Trouble

_NAMED = 3
_XATTR_PATH = "user.hydrafs.path"
_ANSWER_SECONDS = 2.0

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
log_format_option = click.option(
    "--log-format", type=click.Choice(["text", "json"]), default="text", help="How the log's lines look."
)
jobs_option = click.option(
    "--jobs", "-j", type=click.IntRange(1, 256), default=None, help="Threads that code (default: one per core)."
)


def real_path(path: str | os.PathLike[str]) -> Path:
    """Where ``path`` stands in the store, if it is inside a mount of ours; else itself."""
    absolute = Path(os.path.abspath(Path(path).expanduser()))
    resolved = resolve(absolute.parent) / absolute.name
    for mount in our_mounts():
        for name in (absolute, resolved):
            if name.is_relative_to(mount.mountpoint):
                return _in_store(name, mount.mountpoint) or absolute
    return absolute


def _in_store(path: Path, mountpoint: Path) -> Path | None:
    """Where a path in the mount at ``mountpoint`` stands; of one that is not there, where it would."""
    rest: list[str] = []
    while True:
        with contextlib.suppress(OSError):
            found = os.fsdecode(os.getxattr(path, _XATTR_PATH))
            root = os.fsdecode(os.getxattr(mountpoint, _XATTR_PATH))
            if root.startswith("/proc/"):
                cover(root, os.fspath(mountpoint))
                keep_catalogs_in(catalogs())
            return Path(found, *rest)
        if path == mountpoint:
            return None
        rest.insert(0, path.name)
        path = path.parent


def catalogs() -> Path:
    """The folder for catalogs of stores that are mounted over themselves."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(cache) / "hydrafs"


def open_store(folder: str | os.PathLike[str]) -> Store:
    """The store at ``folder``, or that the mount at ``folder`` shows; nothing is written to it before it is acted on
    (``Store.begin``)."""
    return Store(real_path(folder), looks=True)


def find_model(name: str | os.PathLike[str]) -> tuple[Store, ModelEntry]:
    """The model that an argument means, and the store that it is in: the nearest one above it, else its own folder.
    Nothing is written to the store before it is acted on."""
    path = real_path(name)
    store = store_of(path.parent)
    return store, store.locate(path)


def store_of(folder: Path) -> Store:
    """The store that ``folder`` is in, or that it will be once it is acted on, where it is in none."""
    return Store(find_root(folder) or folder, looks=True)


def default_jobs(jobs: int | None) -> int:
    """How many threads code."""
    return jobs or max(1, os.cpu_count() or 1)


def human(nbytes: float) -> str:
    """A size as people read it, in powers of 1000 as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(nbytes) < 999.5:
            return f"{nbytes:.0f} {unit}" if unit == "B" or nbytes >= 99.95 else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"


def percent(part: float, whole: float) -> str:
    """``part`` as a percentage of ``whole``."""
    return f"{100 * part / whole:.1f} %" if whole else "-"


def print_json(facts: object) -> None:
    """Facts for programs, on stdout."""
    sys.stdout.write(shown(json.dumps(facts, indent=2, default=str)))
    sys.stdout.write("\n")


def say(line: str) -> None:
    """A line for people, on stdout: names with line feeds or escapes in them stay on it."""
    print(printable(line))


def kept_line(kept: Sequence[Kept]) -> str:
    """What a store keeps besides what it lists, in a line for people; empty where that is nothing."""
    if not kept:
        return ""
    count = "1 file" if len(kept) == 1 else f"{len(kept)} files"
    shown_kept = sorted(kept, key=lambda k: -k.nbytes)[:_NAMED]
    more = f", and {len(kept) - _NAMED} more" if len(kept) > _NAMED else ""
    parts = "; ".join(f"{k.name or k.path.name[:16]} -> {kept_for(k)}" for k in shown_kept)
    return f"kept for others: {count}, {human(sum(k.nbytes for k in kept))} ({parts}{more})"


def kept_for(kept: Kept) -> str:
    """For whom a file is kept."""
    if kept.dependents:
        others = f" and {len(kept.dependents) - 1} more" if len(kept.dependents) > 1 else ""
        return f"needed by {kept.dependents[0]}{others}"
    if kept.is_needed:
        return "needed by what is kept itself"
    if kept.folder == "trash":
        return "removed lately; hydrafs undelete brings it back"
    return "needed by nobody; hydrafs gc removes it" if kept.sha256 else "not looked through yet; hydrafs gc does"


def kept_facts(kept: Kept) -> dict[str, object]:
    """The same for programs."""
    return {
        "name": kept.name,
        "folder": kept.folder,
        "sha256": kept.sha256.hex(),
        "size": kept.nbytes,
        "dependents": list(kept.dependents),
        "needed": kept.is_needed,
    }


def leftovers(store: Store) -> list[str]:
    """What is in a store that no listing shows and no model needs to be read: a line for each, with what to do."""
    lines = [
        f"{path}: put aside by a killed command; hydrafs gc ends what that began, else it may be an only copy"
        for path in aside_files(store)
    ]
    lines += [f"{path}: retired before its SHA-256 was known; hydrafs gc takes it" for path in unhashed_files(store)]
    return lines


def tell_troubles(troubles: Sequence[Trouble]) -> None:
    """Warn of what could not be looked at, on stderr."""
    for trouble in troubles:
        print(printable(f"hydrafs: warning: cannot look at {trouble}"), file=sys.stderr)


def tell_unheld(names: Sequence[str]) -> None:
    """Warn of parents that only their names keep, on stderr."""
    for name in names:
        line = f"hydrafs: warning: {name} is not held: it is missing, or not on the store's filesystem; keep it safe"
        print(printable(line), file=sys.stderr)


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> None:
    """A table: drawn on a terminal, tabs between columns in a pipe. ``right``: the columns of numbers."""
    if not sys.stdout.isatty():
        for row in (headers, *rows):
            print("\t".join(map(printable, row)))
        return
    from rich.console import Console  # noqa: PLC0415 - a tenth of a second that only a terminal pays
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, header in enumerate(headers):
        justify: Any = "right" if number in right else "left"
        table.add_column(header, justify=justify, overflow="fold", no_wrap=number in right)
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    Console().print(table)


@contextlib.contextmanager
def progress_bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar with rate and remaining time on a terminal; nothing in a pipe."""
    if not sys.stderr.isatty() or total <= 0:
        yield lambda nbytes: None
        return
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import (  # noqa: PLC0415
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=total)
        yield lambda nbytes: progress.advance(task, nbytes)


def service_log(*, as_json: bool = False, to_file: bool = False) -> Style:
    """How a service logs: by default what it does, each line with its time unless the journal notes that.

    Args:
        as_json: see ``hydrafs.logs.Style``.
        to_file: whether what is stderr now will be a file.
    """
    level = logging.getLevelName(os.environ.get("HYDRAFS_LOG_LEVEL", "INFO").upper())
    stat = os.fstat(2)
    is_journal = os.environ.get("JOURNAL_STREAM") == f"{stat.st_dev}:{stat.st_ino}"  # systemd.exec(5)
    return Style(
        level if isinstance(level, int) else logging.INFO,
        with_time=to_file or not is_journal,
        as_json=as_json,
        seldom=True,
    )


def mounts_of(mountpoint: str | os.PathLike[str] | None) -> list[Path]:
    """The mounts of ours that are meant: the one at ``mountpoint``, or all.

    Raises:
        NotFound: there is none.
    """
    found = list(dict.fromkeys(m.mountpoint for m in our_mounts()))
    if mountpoint is not None:
        point = resolve(Path(mountpoint).expanduser())
        if point not in found:
            raise NotFound("no mount of hydrafs", where=point, remedy="hydrafs mount makes one")
        return [point]
    if not found:
        raise NotFound("no mount of hydrafs", remedy="hydrafs mount makes one")
    return found


def _runtime_folders_of(mountpoint: Path) -> list[Path]:
    """Where the socket of the daemon of ``mountpoint`` may be: the user's own, or for root anybody's."""
    users = [os.geteuid()]
    for found in our_mounts():
        if found.mountpoint == mountpoint:
            users += [int(o[8:]) for o in found.options if o.startswith("user_id=") and o[8:].isdigit()]
    named = os.environ.get("XDG_RUNTIME_DIR", "")
    return list(dict.fromkeys(folder for user in dict.fromkeys(users) for folder in runtime_folders(user, named)))


def ask_daemon(mountpoint: Path, do: str, **request: Any) -> Any:
    """Ask the daemon of the mount at ``mountpoint``: the user's own, or for root anybody's.

    Raises:
        HydraError: as ``hydrafs.service.control.ask``, within three seconds.
    """
    return ask(_runtime_folders_of(mountpoint), mountpoint, do, **request)


def ask_daemons(mountpoints: Sequence[Path], do: str) -> list[Any]:
    """``ask_daemon`` of all, at a time: what each says, or the ``HydraError`` that asking it gave."""

    def answer(mountpoint: Path) -> Any:
        try:
            return ask_daemon(mountpoint, do)
        except HydraError as error:
            return error

    with ThreadPoolExecutor(max(1, min(32, len(mountpoints)))) as pool:
        return list(pool.map(answer, mountpoints))


def daemon_at(mountpoint: Path) -> int:
    """The process that serves the mount at ``mountpoint``, whether it answers or not; 0 where nobody can tell."""
    return daemon_of(_runtime_folders_of(mountpoint), mountpoint)


def check_answers(path: str | os.PathLike[str]) -> None:
    """Make sure, before ``path`` is touched, that the mount of ours that it lies in, if any, answers. A dead one does:
    with an error.

    Raises:
        MountFailed: its daemon hangs or is stopped; the message names its process, and what to do.
    """
    mount = mount_above(Path(path).expanduser())
    if mount is None:
        return
    (answer,) = ask_filesystems([mount.mountpoint], _ANSWER_SECONDS)
    if answer is None:
        raise does_not_answer(
            mount.mountpoint, daemon_at(mount.mountpoint), f"does not answer for {_ANSWER_SECONDS:g} s"
        )
