"""``mount.hydrafs``: what mount(8) calls for ``mount -t hydrafs STORE MOUNTPOINT -o ...`` and for lines of fstab.

Source: mount(8), "External helpers", ``/sbin/mount.TYPE SPEC DIR [-sfnv] [-N NAMESPACE] [-o OPTIONS] [-t TYPE]``, and
its exit codes.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence

import click

from hydrafs.cli import run_command
from hydrafs.errors import HydraError, UsageError

_USAGE, _FAILED = 1, 32
_OURS = {"metrics_address": "--metrics-address", "log_file": "--log-file", "log_format": "--log-format"}
"""Options that are no mount options of the kernel's or FUSE's, and what they are called elsewhere."""


@click.command("mount.hydrafs", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("store", metavar="STORE")
@click.argument("mountpoint", metavar="MOUNTPOINT")
@click.option("-o", "options", multiple=True, metavar="OPTIONS", help="Those of hydrafs mount -o, and the ones above.")
@click.option("-s", "sloppy", is_flag=True, help="Leave options out that are not known.")
@click.option("-f", "fake", is_flag=True, help="Check everything, and do not mount.")
@click.option("-v", "verbose", is_flag=True, help="Say what was mounted.")
@click.option("-n", "no_mtab", is_flag=True, help="No effect: the table of mounts is the kernel's.")
@click.option("-t", "kind", metavar="TYPE", help="No effect: the type is hydrafs.")
@click.option("-N", "namespace", metavar="NAMESPACE", hidden=True)
def command(
    store: str,
    mountpoint: str,
    options: tuple[str, ...],
    sloppy: bool,
    fake: bool,
    verbose: bool,
    no_mtab: bool,
    kind: str | None,
    namespace: str | None,
) -> None:
    """Mount STORE at MOUNTPOINT; called by mount(8), also for lines of /etc/fstab.

    Options beside those of "hydrafs mount -o": cache_size=4G, warm, metrics_address=HOST:PORT, log_file=PATH,
    log_format=json.
    """
    # Both import what mounts: only when it is asked for.
    from hydrafs.cli.common import open_store  # noqa: PLC0415
    from hydrafs.cli.mount import command as mount  # noqa: PLC0415
    from hydrafs.mounting import parse_options, preflight  # noqa: PLC0415

    if namespace:
        raise UsageError("another mount namespace cannot be named", where=namespace, remedy="use nsenter")
    arguments, passed = _split(",".join(options))
    if sloppy:
        passed = [option for option in passed if _is_known(option)]
    parsed = parse_options(",".join(passed))
    if fake:
        with contextlib.closing(open_store(store)) as opened:
            preflight(mountpoint, store_paths=[opened.root, *opened.base_folders, *opened.base_files], options=parsed)
        return
    mount.main([store, mountpoint, "-o", ",".join(passed), *arguments], standalone_mode=False)
    if verbose:
        print(f"hydrafs: {store} mounted on {mountpoint}")


def _split(options: str) -> tuple[list[str], list[str]]:
    """The options that are arguments of ``hydrafs mount``, as these; and the others."""
    arguments, others = [], []
    for option in filter(None, (part.strip() for part in options.split(","))):
        name, equals, value = option.partition("=")
        if equals and name in _OURS:
            arguments += [_OURS[name], value]
        elif option == "warm":
            arguments.append("--warm")
        else:
            others.append(option)
    return arguments, others


def _is_known(option: str) -> bool:
    from hydrafs.mountoptions import parse_options  # noqa: PLC0415

    try:
        parse_options(option)
    except HydraError:
        return False
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Mount; the exit code is one of mount(8)'s: 0, 1 for what cannot be meant, 32 for a mount that failed."""
    code = run_command(command, arguments)
    return 0 if code == 0 else _USAGE if code == UsageError.exit_code else _FAILED


if __name__ == "__main__":
    sys.exit(main())
