"""``hydrafs warm``: read models into the kernel's cache before they are asked for."""

from __future__ import annotations

import os
from pathlib import Path

import click

from hydrafs.cli.common import ask_daemon, human, json_option, mounts_of, print_json, progress_bar, say
from hydrafs.errors import UsageError, from_oserror
from hydrafs.mountpoints import our_mounts
from hydrafs.store import looks_like_model

_READ_NBYTES = 4 << 20
_LATELY = 5


@click.command("warm", short_help="Read models into the kernel's cache.")
@click.argument("models", nargs=-1, metavar="MODEL...")
@click.option(
    "--lately", metavar="MOUNTPOINT", help="Those that were opened last in a mount, before it was mounted too."
)
@click.option("--count", type=click.IntRange(1), default=_LATELY, show_default=True, help="How many with --lately.")
@json_option
def command(models: tuple[str, ...], lately: str | None, count: int, as_json: bool) -> None:
    """Read each MODEL (in a mount) once, as fast as it can be decoded: the next program finds it in memory."""
    paths = [Path(os.path.abspath(Path(m).expanduser())) for m in models]
    if lately is not None:
        (point,) = mounts_of(lately)
        paths += _lately_opened(point, count)
    if not paths and lately is None:
        raise UsageError("nothing to warm", remedy="name models in a mount, or --lately MOUNTPOINT")
    warmed = []
    mounts = [m.mountpoint for m in our_mounts()]
    for path in paths:
        if not any(path.is_relative_to(mount) for mount in mounts):
            raise UsageError("not in a mount of hydrafs", where=path, remedy="name the model as the mount shows it")
        warmed.append({"path": str(path), "size": _read(path)})
        if not as_json:
            say(f"{path}: {human(path.stat().st_size)} in memory")
    if as_json:
        print_json(warmed)


def _lately_opened(point: Path, count: int) -> list[Path]:
    """What was opened last in the mount at ``point``: what its daemon saw, then what earlier ones left noted."""
    names = [str(name) for name, _ in ask_daemon(point, "lately-opened")]
    paths = [point / name.lstrip("/") for name in dict.fromkeys(names) if looks_like_model(name)]
    return [path for path in paths if path.is_file()][:count]


def _read(path: Path) -> int:
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            buffer = bytearray(_READ_NBYTES)
            with progress_bar(f"reading {path.name}", size) as progress:
                while nbytes := file.readinto(buffer):
                    progress(nbytes)
            return size
    except OSError as error:
        raise from_oserror(error, "cannot read", path) from error
