"""``hydrafs umount``: take a mount down."""

from __future__ import annotations

import click

from hydrafs.mountpoints import unmount


@click.command("umount", short_help="Take a mount down.")
@click.argument("mountpoint", metavar="MOUNTPOINT")
@click.option("--lazy", "-l", is_flag=True, help="Detach now, and finish when the last file is closed.")
def command(mountpoint: str, lazy: bool) -> None:
    """Take the mount at MOUNTPOINT down."""
    unmount(mountpoint, lazy=lazy)
