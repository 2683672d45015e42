"""``hydrafs umount``: take a mount down."""

from __future__ import annotations

import click

from hydrafs.errors import UsageError
from hydrafs.mountpoints import clear_stale, resolve, unmount


@click.command("umount", short_help="Take a mount down.")
@click.argument("mountpoint", metavar="MOUNTPOINT")
@click.option("--lazy", "-l", is_flag=True, help="Detach now, and finish when the last file is closed.")
@click.option("--stale", is_flag=True, help="Only what a dead daemon left; with nothing of that kind, do nothing.")
def command(mountpoint: str, lazy: bool, stale: bool) -> None:
    """Take the mount at MOUNTPOINT down."""
    if not stale:
        unmount(mountpoint, lazy=lazy)
    elif lazy:
        raise UsageError("options exclude each other", where="--lazy, --stale", remedy="leave --lazy out")
    else:
        clear_stale(resolve(mountpoint))
