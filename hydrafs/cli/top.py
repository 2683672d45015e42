"""``hydrafs top``: the status, live."""

from __future__ import annotations

import sys
import time
from typing import Any

import click
import msgspec

from hydrafs.cli.common import ask_daemons, human, mounts_of, say
from hydrafs.cli.status import line_of_silent, lines_of, rates
from hydrafs.errors import HydraError
from hydrafs.service.status import Status


@click.command("top", short_help="The status of all mounts, live in the terminal.")
@click.argument("mountpoint", metavar="[MOUNTPOINT]", required=False)
@click.option("--interval", type=click.FloatRange(0.1, 3600), default=1.0, show_default=True, help="Seconds between.")
@click.option("--count", type=click.IntRange(1), default=None, help="Stop after so many (default: until Ctrl-C).")
def command(mountpoint: str | None, interval: float, count: int | None) -> None:
    """Show the status of MOUNTPOINT, or of all mounts, again and again; Ctrl-C ends it."""
    before: dict[str, dict[str, Any]] = {}
    if not sys.stdout.isatty():
        for number in range(count or 1):
            if number:
                time.sleep(interval)
            for line in _screen(mountpoint, before):
                say(line)
        return
    from rich.live import Live  # noqa: PLC0415 - a tenth of a second that only a terminal pays
    from rich.text import Text  # noqa: PLC0415

    try:
        with Live(screen=True, auto_refresh=False) as live:
            shown = 0
            while count is None or shown < count:
                live.update(Text("\n".join(_screen(mountpoint, before))), refresh=True)
                shown += 1
                time.sleep(interval)
    except KeyboardInterrupt:
        return


def _screen(mountpoint: str | None, before: dict[str, dict[str, Any]]) -> list[str]:
    lines: list[str] = []
    points = mounts_of(mountpoint)
    for point, now in zip(points, ask_daemons(points, "status"), strict=True):
        if isinstance(now, HydraError):
            if len(points) == 1:
                raise now
            lines.append(line_of_silent(now))
            continue
        lines += lines_of(msgspec.convert(now, Status))
        then = before.get(str(point))
        if then and then["pid"] == now["pid"]:
            rate = rates(then, now)
            lines.append(
                f"  now       {human(rate['read_nbytes'])}/s read in {rate['reads']:.0f} reads/s, "
                f"{human(rate['decoded_nbytes'])}/s decoded, {100 * rate['cpu_seconds']:.0f} % of a core"
            )
        before[str(point)] = now
    return lines
