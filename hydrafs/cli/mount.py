"""``hydrafs mount``: show a store as the full files that it stands for."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from pathlib import Path

import click

from hydrafs.cli.common import catalogs, log_to_stderr, open_store, parse_nbytes
from hydrafs.covered import keep_catalogs_in
from hydrafs.mounting import mount, parse_options
from hydrafs.mountpoints import check_mountpoint, clear_stale, resolve

_DEFAULT_CACHE = "4G"
_SILENCE_SECONDS = 60.0
_REMEMBERED_LINES = 1000


class _Repeats(logging.Filter):
    """Lets a line through once a minute: a WebUI that lists a broken model asks for it at every listing."""

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line is to be written."""
        line, now = record.getMessage(), time.monotonic()
        if now - self._last.get(line, -_SILENCE_SECONDS) < _SILENCE_SECONDS:
            return False
        if len(self._last) >= _REMEMBERED_LINES:
            self._last.clear()
        self._last[line] = now
        return True


@click.command("mount", short_help="Show a store as full files.")
@click.argument("store", metavar="STORE")
@click.argument("mountpoint", metavar="[MOUNTPOINT]", required=False)
@click.option("--read-only", is_flag=True, help="Let nothing be written.")
@click.option("--foreground", "-f", is_flag=True, help="Stay in the foreground and log to the terminal.")
@click.option(
    "--cache-size", default=None, metavar="SIZE", help=f"Decoded tensors to keep [default: {_DEFAULT_CACHE}]."
)
@click.option(
    "-o", "options", multiple=True, metavar="OPTS", help="Options as mount(8) takes them: allow_other,uid=..."
)
@click.option("--log-file", metavar="PATH", help="Where the daemon logs to [default: the store's .hydrafs/mount.log].")
def command(
    store: str,
    mountpoint: str | None,
    read_only: bool,
    foreground: bool,
    cache_size: str | None,
    options: tuple[str, ...],
    log_file: str | None,
) -> None:
    """Show STORE at MOUNTPOINT, each diff as the full file that it stands for; without MOUNTPOINT, over STORE itself.

    Returns when the mount answers; with --foreground, when it is taken down.
    """
    level = logging.getLevelName(os.environ.get("HYDRAFS_LOG_LEVEL", "WARNING").upper())
    log_to_stderr(level if isinstance(level, int) else logging.WARNING, with_time=True)
    for handler in logging.getLogger().handlers:
        handler.addFilter(_Repeats())
    point = resolve(mountpoint if mountpoint is not None else Path(store).expanduser())
    if mountpoint is None:
        # Before the store is looked at: that would be looking at what is mounted there now.
        clear_stale(point)
        check_mountpoint(point, nonempty=True)
    parsed = parse_options(",".join([*options, *(["ro"] if read_only else [])]))
    with contextlib.closing(open_store(store)) as opened:
        root, folders = opened.root, opened.base_folders
        private = opened.private
        writable = os.access(opened.root, os.W_OK)
    nbytes = parse_nbytes(cache_size) if cache_size else parsed.cache_nbytes or parse_nbytes(_DEFAULT_CACHE)
    log_path = log_file
    if log_path is None and writable and not foreground:
        private.mkdir(exist_ok=True)
        log_path = os.fspath(private / "mount.log")

    in_place = point == root
    if in_place:
        keep_catalogs_in(catalogs())

    def make_tree() -> object:
        from hydrafs.allocator import tune_allocator  # noqa: PLC0415 - in the process that serves
        from hydrafs.vfs import StoreTree  # noqa: PLC0415
        from hydrafs.writing import WritableTree  # noqa: PLC0415

        tune_allocator()
        return (StoreTree if parsed.read_only else WritableTree)(root, nbytes, point)

    mount(
        make_tree,  # type: ignore[arg-type]
        point,
        store_paths=[root, *folders, *([catalogs()] if in_place else [])],
        over_store=in_place,
        options=parsed,
        foreground=foreground,
        binding=os.environ.get("HYDRAFS_FUSE") or None,
        log_path=log_path,
    )
