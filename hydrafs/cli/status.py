"""``hydrafs status``: how the daemons are."""

from __future__ import annotations

import time
from typing import Any

import click
import msgspec

from hydrafs.cli.common import ask_daemons, human, json_option, mounts_of, print_json, say
from hydrafs.errors import HydraError, printable
from hydrafs.service.status import Status
from hydrafs.working import Work

_SHOWN = 5


@click.command("status", short_help="How a mount's daemon is, and what it saved.")
@click.argument("mountpoint", metavar="[MOUNTPOINT]", required=False)
@json_option
def command(mountpoint: str | None, as_json: bool) -> None:
    """Show how the daemon of MOUNTPOINT is, or of all mounts: models, bytes saved, cache, reads, last errors."""
    answers = ask_daemons(mounts_of(mountpoint), "status")
    silent = [answer for answer in answers if isinstance(answer, HydraError)]
    facts = [answer for answer in answers if not isinstance(answer, HydraError)]
    if silent and not facts:
        if not as_json:
            for missing in silent[:-1]:
                say(line_of_silent(missing))
        raise silent[-1]
    if as_json:
        print_json(facts[0] if mountpoint is not None else facts)
        return
    for number, one in enumerate(facts):
        if number:
            say("")
        for line in lines_of(msgspec.convert(one, Status)):
            say(line)
    for missing in silent:
        say(line_of_silent(missing))


def line_of_silent(silent: HydraError) -> str:
    """What is said of a mount whose daemon does not answer, beside others that do."""
    return f"{silent.where}: {silent.what}" + (f": {silent.detail}" if silent.detail else "")


def lines_of(s: Status) -> list[str]:
    """The status as people read it."""
    rate = s.decoded_nbytes / s.decode_seconds if s.decode_seconds else 0.0
    models = s.models
    share = f", {100 * models.saved / models.listed:.0f} %" if models.listed else ""
    lines = [
        f"{s.mountpoint}: {s.store}, served by process {s.pid} for {_duration(s.uptime_seconds)} (hydrafs {s.version})",
        f"  models    {models.models}, {models.dehydrated} of them diffs; {human(models.saved)} saved{share}",
        f"  cache     {human(s.cache_nbytes)} of {human(s.cache_budget_nbytes)}, {100 * s.hit_rate:.0f} % hits",
        f"  decoded   {human(s.decoded_nbytes)}" + (f", {human(rate)}/s per thread" if rate else ""),
        f"  reads     {s.reads}, {human(s.read_nbytes)}; {s.reads_in_flight} in flight, {s.failed_reads} failed",
        f"  files     {s.open_files} open; {s.opens} opened, {s.failed_opens} refused",
        f"  process   {human(s.rss_nbytes)} of memory, {s.cpu_seconds:.1f} s of processor time",
    ]
    if s.store_trouble:
        lines.insert(1, f"  store     IS NOT THERE: {s.store_trouble}")
    if s.worker.state != "none":
        lines.append(f"  worker    {worker_line(s.worker)}")
        lines += [f"            {line}" for line in worker_reasons(s.worker)]
    lines += [f"  {time.strftime('%F %T', time.localtime(at))}  {text}" for at, text in s.errors[-5:]]
    return lines


def worker_line(w: Work) -> str:
    """What the worker is doing, and has done."""
    done = f"{w.models} models dehydrated, {human(w.saved_nbytes)} saved, {w.left_whole} left whole"
    now = "off" if w.state == "off" else w.state
    if w.state in ("working", "waiting"):
        share = f", {w.stage} {100 * w.done_nbytes / w.total_nbytes:.0f} %" if w.total_nbytes else ""
        now = f"{'at' if w.state == 'working' else 'waits for readers at'} {printable(w.model)}{share}"
    elif w.state == "idle" and w.waits_until:
        now = f"next look in {_duration(max(0.0, w.waits_until - time.time()))}"
    return f"{now}; {done}" + (f"; last error: {w.last_error}" if w.last_error else "")


def worker_reasons(w: Work) -> list[str]:
    """Why nothing is dehydrated, and which files are in trouble or left whole unasked, one line each."""
    lines = [f"waits: {printable(w.hindered)}"] if w.hindered else []
    lines += [f"trouble: {printable(name)}: {printable(why)}" for name, why in w.troubles[:_SHOWN]]
    if w.troubled > _SHOWN:
        lines.append(f"and {w.troubled - _SHOWN} more in trouble")
    return lines + [f"stays whole: {printable(name)}: {printable(why)}" for name, why in w.whole[:_SHOWN]]


def _duration(seconds: float) -> str:
    minutes, hours, days = seconds / 60, seconds / 3600, seconds / 86400
    if days >= 2:
        return f"{days:.0f} days"
    if hours >= 2:
        return f"{hours:.0f} hours"
    return f"{minutes:.0f} minutes" if minutes >= 2 else f"{seconds:.0f} seconds"


def rates(before: dict[str, Any], after: dict[str, Any]) -> dict[str, float]:
    """What happened per second between two statuses: bytes read and decoded, reads, processor time."""
    seconds = max(1e-6, after["uptime_seconds"] - before["uptime_seconds"])
    names = ("read_nbytes", "decoded_nbytes", "reads", "cpu_seconds")
    return {name: (after[name] - before[name]) / seconds for name in names}
